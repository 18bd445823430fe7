"""Train a small ARC solver: grid agent, trainable Qwen and prompt policy, jointly, with seven named fixes.

    python trainloop_complete_with_fixes.py --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --resume

The file reads top to bottom: flags, the seven fixes, building, one training step, the training loop, validation, what a
checkpoint holds, main. Shapes: G episodes (a task with one demonstration pair held out), V views each, B = G * V
queries, L tokens, K prompt vectors of width D.
"""

from __future__ import annotations

import signal
import sys

# While Python imports, Ctrl-C ends the command as it would end any, without a traceback. A notebook's kernel lives on.
AS_A_COMMAND = __name__ == "__main__" and "IPython" not in sys.modules
if AS_A_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that wait must not spin for long: where cores are few, torch's threads share them with the data workers.
# libgomp reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from arc import efe as free_energy
from arc import recipes, sharding
from arc.agent import AgentOutput, GridAgent, there_and_back, voted_grid
from arc.batches import PredictionBatch, QueryBatch, context_pairs
from arc.conflicts import conflicts, problems_of_all
from arc.device import Precision, narrow_on_cpu, resolve_device, resolve_precision, spare_tokens, too_little_memory
from arc.efe import EfeWeights, Pass, Weights
from arc.episodes import EpisodeData, TrainBatch, epoch_order
from arc.evidence import NUM_RULES, NUM_TABLES, EvidenceStore, NoEvidence
from arc.generate import GENERATED, KNOWN, MIN_SIDE, family_list
from arc.latent import TaskLatent, saved_latents
from arc.loading import EpochSampler, Unprepared, WorkerLost, batches_of, end_workers, make_loader, worker_count
from arc.lora import Adapter, saved_base
from arc.memory import MemoryBank, Offers
from arc.opening import opening_lines, resumed_lines, summary_title
from arc.optim import JointOptimizer, WeightAverage, learning_rate_factor, window_size
from arc.parallel import PeerLost, Team, join, one_voice, share_of
from arc.predict import PairPrediction, Predictor, evaluating, gathered, prediction_cost, recall_count, views_reached
from arc.qwen import ContextText, QwenPrompt, Tune, build_qwen, context_codes, prompt_spread
from arc.qwen_source import quiet_downloads
from arc.recipes import RECIPES
from arc.report import keep_predictions, open_events, try_report
from arc.run.budget import Budget, part_of
from arc.run.files import UserError, default_cache
from arc.run.flags import (
    Arguments,
    NumbersOf,
    Resume,
    adopt_flags,
    declared,
    flag,
    ipython_shell,
    own_arguments,
    path,
    real,
    saved_flags,
    whole,
)
from arc.run.folder import memory_for_the_model, open_run_folder, usable, write_config
from arc.run.interrupt import Interrupted, StopSignal
from arc.run.randomness import normal_noise, restore_rng, rng_state, seed_everything
from arc.run.records import Records, RedFlag, TrainState, summary_lines
from arc.run.runlog import RunLog
from arc.run.terminal import Pace, write_line
from arc.scoring import SplitReport, headline, keep_attempts, log_validation, score_splits, submit
from arc.splits import (
    LABELS,
    Split,
    all_tasks,
    check_places,
    check_record,
    choose_tasks,
    split_list,
    splits_by_content,
)
from arc.steps import Step, read_steps
from arc.tasks import DataSet, Task
from model_persistence import Checkpoint, ModelPersistence, PersistenceError, find_newest_run, newest_checkpoint
from policy_refined import (
    Feedback,
    Prediction,
    PromptPolicy,
    SoftPrediction,
    cell_accuracy,
    compute_reward,
    context_feedback,
    exact_match,
    expected_reward,
    mean_per_owner,
    sampled_objective,
)

# == Flags ===========================================================================================================

ABLATION = {
    1: "Qwen frozen",
    2: "loss without the reward",
    3: "plain mean over cells",
    4: "no size warm-up",
    5: "fixed memory threshold 0.95",
    6: "consistency with the old sign",
    7: "no mixed precision, no loss scaling, no clipping",
}
DEFAULT_THREADS = torch.get_num_threads()
PROBLEMS = (UserError, PersistenceError)  # one line, which is all that there is to know
CHECKPOINT_FORMAT = 5  # raise it when checkpoints of before can no longer be continued

RUN, DATA, AGENT, RECORDS, SAVING = "run", "data", "agent", "validation and records", "checkpoints"
FIXES, FIX_1, FIX_26 = "the seven fixes", "fix 1: Qwen trains", "fixes 2 and 6: the loss is the goal, and its signs"
FIX_3, FIX_4, FIX_5 = "fix 3: hard cells", "fix 4: size warm-up", "fix 5: memory"
FIX_7 = "fix 7: mixed precision and clipping"
FREE, COMMAND, MODEL, UNSAVED = Resume.FREE, Resume.COMMAND, Resume.MODEL, Resume.UNSAVED


@dataclass
class Flags:
    """Every flag, in the order of --help: group, default, help, what it takes, and what --resume makes of it (where
    nothing is said, it enters the maths of a training step and cannot be changed). Names are part of the product."""

    # fmt: off
    config: str | None = flag(RUN, None, "flags as a JSON object, a run's config.json too; the command line wins",
                              path, UNSAVED, metavar="FILE")
    print_config: bool = flag(RUN, False, "print the resolved flags as JSON and leave; nothing is written",
                              resume=UNSAVED)
    recipe: str | None = flag(RUN, None, "flags that go together (others win); gpu: one card", tuple(RECIPES), UNSAVED)
    epochs: int = flag(RUN, 20, "passes over all episodes", whole(1), FREE)
    max_batches: int = flag(RUN, 0, "batches an epoch at most; 0: all", whole(0))
    time_budget: float = flag(RUN, 0.0, "seconds for all, last validation included; 0: no limit", real(0), COMMAND)
    device: str = flag(RUN, "auto", "where to compute", ("auto", "cpu", "cuda", "mps"), COMMAND)
    seed: int = flag(RUN, 0, "seed of everything random", whole(0, 2**31 - 1))
    threads: int = flag(RUN, 0, "CPU threads for torch; 0: torch's own choice", whole(0, 1024), FREE)
    compile: bool = flag(RUN, False, "the agent's blocks as fused kernels: faster after some minutes", resume=COMMAND)
    fsdp: bool = flag(RUN, False, "under torchrun: Qwen divided among the processes", resume=COMMAND)
    workers: int = flag(RUN, -1, "processes that prepare batches; -1: by machine", whole(-1, 64), COMMAND)
    eval_only: bool = flag(RUN, False, "do not train: validate a checkpoint (with --resume) again, or score it on "
                           "every task of another --data", resume=COMMAND)
    submission: str | None = flag(RUN, None, "at the end write two attempts at every test input of --data there, in "
                                  "the ARC Prize format", path, COMMAND, metavar="FILE")
    strict: bool = flag(RUN, False, "a red flag saves and stops the run with exit code 3", resume=COMMAND)
    quiet: bool = flag(RUN, False, "no log lines or bars on stdout; train.log has them all", resume=COMMAND)

    data: str = flag(DATA, "arcagi2", "arcagi2, arcagi1, kaggle2025, generated, a file, zip or folder", path, FREE)
    extra_data: str | None = flag(DATA, None, "trained on, never validated: generated, or files of many pairs", path)
    families: tuple[str, ...] = flag(DATA, KNOWN, "of --data generated: basic, known, all, or names", family_list)
    tasks: int = flag(DATA, 20, "of --data generated: tasks a family; 0: fresh ones without end", whole(0, 10_000))
    pairs: int = flag(DATA, 4, "of generated and extra data: demonstrations of a task", whole(2, 30))
    queries: int = flag(DATA, 4, "of generated and extra data: pairs asked after one reading", whole(1, 1024))
    episodes: int = flag(DATA, 8192, "of generated and extra data: contexts an epoch", whole(1, 2**20))
    max_side: int = flag(DATA, 10, "of --data generated: rows and columns at most", whole(MIN_SIDE, 30))
    adapt: bool = flag(DATA, False, "train on the demonstration pairs of the evaluation tasks too (those of --unseen; "
                       "of --data if it has no others), never on their test outputs")
    augment: str = flag(DATA, "full", "of each view", ("full", "dihedral", "colour", "none"))
    views: int = flag(DATA, 4, "augmented views of an episode in a batch", whole(1, 64))
    batch_size: int = flag(DATA, 32, "queries in a batch at most", whole(1))
    max_cells: int = flag(DATA, 6144, "padded cells in a batch at most (but one episode; of drawn data twice as many)",
                          whole(1), MODEL)
    cache_dir: str = flag(DATA, default_cache(), "for the evidence and the built-in tiny Qwen", path, COMMAND)

    agent_lr: float = flag(AGENT, 3e-4, "learning rate of the agent", real(0, 100, above=True))
    agent_width: int = flag(AGENT, 128, "width of a token", whole(16, 4096))
    agent_heads: int = flag(AGENT, 2, "attention heads", whole(1, 64))
    agent_blocks: int = flag(AGENT, 2, "blocks with weights of their own", whole(1, 64))
    agent_passes: int = flag(AGENT, 1, "times the blocks are run, each supervised", whole(1, 16))
    optimizer: str = flag(AGENT, "muon", "for the matrices of the agent's blocks", ("muon", "adamw"))
    ema: float = flag(AGENT, 0.995, "decay of the averaged weights; 0: none", real(0, 0.99999))

    val_every: int = flag(RECORDS, 1, "epochs between validations; 0: only at the end", whole(0), FREE)
    val_splits: tuple[str, ...] = flag(RECORDS, ("seed",), "comma-separated: seed (test pairs of the training tasks), "
                                       "unseen, adapted; with --adapt seed,adapted", split_list)
    unseen: str = flag(RECORDS, "arcagi1", "set whose evaluation tasks are the unseen or adapted split (as --data)",
                       path, FREE)
    dev: bool = flag(RECORDS, False, "train and validate on held-out demonstrations; no test pair is touched")
    dev_tasks: int = flag(RECORDS, 100, "tasks held out whole under --dev", whole(1))
    val_views: int = flag(RECORDS, 8, "augmented views that vote", whole(1, 64), FREE)
    val_limit: int = flag(RECORDS, 0, "validate on the first N tasks only; 0: all", whole(0), FREE)
    log_every: int = flag(RECORDS, 10, "batches between log lines", whole(1), FREE)
    report: bool = flag(RECORDS, False, "write report.html after --eval_only too, as training does", resume=COMMAND)
    no_tensorboard: bool = flag(RECORDS, False, "no event files, even if tensorboard is installed", resume=COMMAND)

    output_dir: str | None = flag(SAVING, None, "the run's folder (default: runs/arc_complete_YYYYMMDD_HHMMSS)",
                                  path, COMMAND)
    resume: str | None = flag(SAVING, None, "continue a run: the newest under runs/, or --output_dir's",
                              path, COMMAND, nargs="?", const="latest", metavar="latest|best|PATH")
    save_every: int = flag(SAVING, 50, "batches between checkpoints", whole(1), FREE)
    keep: int = flag(SAVING, 5, "checkpoints kept, best ones aside", whole(1, 1_000_000), FREE)
    backup_dir: str | None = flag(SAVING, None, "mirror checkpoints there (a mounted Drive)", path, COMMAND)
    backup_quota_gb: float = flag(SAVING, 15.0, "at most this much there", real(0, 1e9, above=True), COMMAND)

    ablate: tuple[int, ...] = flag(FIXES, (), "fixes turned back to the old behaviour: 1,3,...",
                                   NumbersOf(ABLATION, "fixes 1 to 7"))
    old: bool = flag(FIXES, False, "the old settings: --ablate 1,2,3,4,5,6,7 --agent_lr 1e-5 --qwen_lr 5e-5")
    no_evidence: bool = flag(FIXES, False, "control: no table, record or size rule; canvases of the input's size")

    qwen: str = flag(FIX_1, "auto", "auto: Qwen/Qwen2.5-0.5B on cuda, else tiny; tiny; a hub name; a folder",
                     path, MODEL)
    qwen_tune: Tune = flag(FIX_1, "full", "what of Qwen trains; lora: small matrices beside the frozen ones (pip "
                          "install peft)", ("full", "lora", "frozen"))
    lora_rank: int = flag(FIX_1, 16, "rank of those matrices", whole(1, 1024))
    qwen_lr: float | None = flag(FIX_1, None, "rate of Qwen; by default 3e-4 for the tiny one (1e-3 on generated "
                                 "tasks), 2e-5 for a pretrained one, 2e-4 for its lora", real(0, 100, above=True))
    optim_qwen: str = flag(FIX_1, "adamw", "adamw8bit: moments of Qwen's layers in 8 bits (pip install bitsandbytes)",
                           ("adamw", "adamw8bit"), also=("--optim",))
    gradient_checkpointing: bool = flag(FIX_1, False, "less memory for Qwen, a third more time", resume=FREE)
    context_text: ContextText = flag(FIX_1, "grids", "how Qwen reads a pair: grid after grid, or cell by cell",
                             ("grids", "cells"))
    max_context_tokens: int = flag(FIX_1, 1536, "Qwen reads whole pairs up to this", whole(16))
    prompt_len: int = flag(FIX_1, 4, "K, vectors of a prompt", whole(1, 64))
    prompt_dim: int = flag(FIX_1, 128, "D, their width", whole(4, 4096))
    task_latent: bool = flag(FIX_1, False, "a learned vector a training task beside Qwen's prompt, dropped at random")

    policy_lr: float = flag(FIX_26, 1e-3, "learning rate of the policy", real(0, 100, above=True))
    policy_objective: str = flag(FIX_26, "expected", "expected reward by back-propagation, or score function with "
                                 "leave-one-out advantages", ("expected", "rloo"))
    policy_samples: int = flag(FIX_26, 4, "actions an episode under rloo", whole(2, 64))
    no_policy: bool = flag(FIX_26, False, "control: no refinement, the agent trained on one pass")
    refined_views: int = flag(FIX_26, 1, "views answered after refinement too", whole(1, 64))
    refine_steps: int = flag(FIX_26, 1, "of evaluation: steps at most; demonstrations decide", whole(1, 100), FREE)
    feedback_pairs: int = flag(FIX_26, 1, "context pairs that give feedback", whole(1, 2))
    w_risk: float = flag(FIX_26, EfeWeights.risk, "weight of the efe term risk", real(0))
    w_ambiguity: float = flag(FIX_26, EfeWeights.ambiguity, "weight of the efe term ambiguity", real(0))
    w_size: float = flag(FIX_26, EfeWeights.size, "weight of the efe term size", real(0))
    w_reversibility: float = flag(FIX_26, EfeWeights.reversibility, "weight of the efe term reversibility", real(0))
    w_prompt: float = flag(FIX_26, EfeWeights.prompt, "weight of the efe term prompt", real(0))

    grid_focus: float = flag(FIX_3, 8.0, "how much more nearly right grids count", real(0))
    hard_floor: float = flag(FIX_3, 0.5, "weight of an already right cell", real(0, 1))
    keep_solved: float = flag(FIX_3, 10.0, "how much more grids count that the vote solves", real(0))

    warmup_epochs: int = flag(FIX_4, 3, "epochs of the size curriculum", whole(1))

    memory_size: int = flag(FIX_5, 1024, "entries of the memory bank", whole(1, 2**20))
    recall: int = flag(FIX_5, 0, "of evaluation: entries tried on a task's demonstrations", whole(0, 2**20), FREE)
    no_memory: bool = flag(FIX_5, False, "control: the bank is neither read nor written")

    amp: str = flag(FIX_7, "auto", "mixed precision", ("auto", "bf16", "fp16", "off"), MODEL)
    grad_clip: float = flag(FIX_7, 1.0, "largest gradient norm of each group; 0: none", real(0))
    grad_accum: int = flag(FIX_7, 1, "batches for one optimizer step, each of which counts alike", whole(1))
    # fmt: on


def build_parser() -> Arguments:
    """The parser of `Flags`."""
    return Arguments(Flags, (__doc__ or "").split("\n\n")[0])


def parse_arguments(argv: Sequence[str] | None) -> tuple[Flags, set[str]]:
    """Parse and check flags; all problems in one line and exit code 2. Returns also the flags given explicitly, on the
    command line or by --config."""
    parser = build_parser()
    # Numbers too, from a cell.
    values, chosen, given = parser.parse(own_arguments() if argv is None else [str(argument) for argument in argv])
    args = Flags(**values)
    recipes.expand(args, chosen, given, parser.config)
    parser.problems += conflicts(args)
    if parser.problems:
        parser.report()
    return args, given


def take_flags(args: Flags, given: set[str], checkpoint: Checkpoint) -> None:
    """On resume: what is not given is the checkpoint's; UserError where it is, and changes the maths."""
    free = {name for name, what in declared(Flags).items() if what.resume is MODEL} if args.eval_only else set()
    if args.eval_only and "data" in given:  # then these say which tasks are drawn
        free |= {"families", "tasks", "pairs", "max_side", "seed"}
    with usable(checkpoint.path.name):
        check_record(checkpoint.state)
        if saved_base(checkpoint.state["extra"]):  # an adapter's base is compared by content: its folder may have moved
            free |= {"qwen"}
        taken = given.union(RECIPES.get(args.recipe or "", ())) - ({"qwen"} if args.qwen == "auto" else set())
        own = {"val_limit"} if args.eval_only else set()
        adopt_flags(build_parser(), args, taken, checkpoint.state["extra"].get("flags"), free=free, own=own)
    check_places(args, given)


def print_config(args: Flags, given: set[str]) -> int:
    """The flags as a run with this command line would have them, as JSON on stdout. What the model decides when it is
    built (--qwen_lr), and the name of a new run's folder, is null."""
    folder, which = open_run_folder(args, find_newest_run, newest_checkpoint)
    if which is not None:
        with ModelPersistence(folder, read_only=True, log=functools.partial(print, file=sys.stderr)) as persistence:
            take_flags(args, given, load_checkpoint(persistence, which))
        args.output_dir = str(folder)
    return 0 if write_line(json.dumps(saved_flags(args), indent=2, allow_nan=False)) else 1


# == The seven fixes, each beside the OLD twin that --ablate puts in its place (1: Qwen is built frozen) =============


class GradientMonitor:
    """FIX 1: measures gradients after unscaling and before clipping, so that a module that does not train is seen."""

    def check_gradients(self, module: nn.Module, name: str) -> dict[str, Tensor | float]:
        """{"norm": () global gradient norm, still on the device, "missing": trainable parameters without a gradient}.
        name: of the module, for people who print what this returns."""
        trainable = [p for p in module.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable if p.grad is not None]
        norm = sharding.whole(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())
        return {"norm": norm, "missing": float(len(trainable) - len(gradients))}


def goal_oriented_loss(efe_total: Tensor, reward_objective: Tensor) -> Tensor:
    """FIX 2: 0.7 * efe + 0.3 * (-reward). The only place where a reward is negated.

    reward_objective carries gradient: the expected reward under the agent's predictive distribution, or the
    score-function surrogate; the printed hard reward comes from argmax predictions and would be a constant to autograd.
    """
    return 0.7 * efe_total + 0.3 * (-reward_objective)


def efe_alone(efe_total: Tensor, reward_objective: Tensor) -> Tensor:
    """OLD 2: the reward is printed and trains nothing."""
    return efe_total


def hard_cell_mask(predicted: Tensor, target: Tensor, cells: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """FIX 3: weight of each cell in the loss, so that wrong cells carry it.

    predicted, target (B, L): colours, negative where there is none; cells (B,): of the whole target, of which the
    canvas may leave some out. Weight 1 where the prediction is wrong (a target cell outside the predicted grid is
    wrong), `floor` where it is right: never zero by default, or right cells would drift. The loss divides by the sum of
    weights, so with floor 0 and 2 wrong cells of 9 each wrong cell weighs 1/2 instead of 1/9: 4.5 times. Where no cell
    is wrong all weights are equal and the loss is the plain mean, with floor 0 too. Returns (weights (B, L) float,
    mask_ratio (B,): share of target cells that are wrong, those beyond the canvas too).
    """
    wanted = target >= 0
    wrong = (predicted != target) & wanted
    weights = torch.where(wrong, 1.0, floor) * wanted
    any_wrong = wrong.any(1, keepdim=True)
    weights = torch.where(any_wrong, weights, wanted.float())
    right = (wanted & ~wrong).sum(1)
    return weights, (cells - right) / cells.clamp(min=1)


@dataclass(frozen=True)
class HardCells:
    """FIX 3: hard cells first (`hard_cell_mask`), and grids by how near they are to being solved.

    A grid weighs its share of right cells to the power of `focus`, times 1 + `keep` where the evidence's vote solves
    it. Scoring asks for every cell of a grid. A cell that is wrong in a nearly right grid is one step from a solved
    task; one in a hopeless grid only drags the trust in tables along that other tasks rely on. And what the vote
    solves can only be broken: without a weight of their own such grids, whose loss is small, lose a cell here and there
    while the cells of all grids together improve (measured in benchmarks/RESULTS.md).
    """

    floor: float  # --hard_floor
    focus: float  # --grid_focus
    keep: float  # --keep_solved

    def __call__(self, output: AgentOutput, query: QueryBatch, vote_right: Tensor) -> Weights:
        """vote_right (B,) bool: the evidence's vote solves the query."""
        cells = query.target_size.prod(1)
        cell, ratio = hard_cell_mask(output.predicted_colours(query), query.target, cells, self.floor)
        return Weights(cell, (1 - ratio) ** self.focus * (1 + self.keep * vote_right), ratio)


class PlainMean(HardCells):
    """OLD 3: every cell and every grid weighs the same."""

    def __call__(self, output: AgentOutput, query: QueryBatch, vote_right: Tensor) -> Weights:
        ratio = super().__call__(output, query, vote_right).ratio
        return Weights((query.target >= 0).float(), torch.ones_like(ratio), ratio)


class SizeWarmupCurriculum:
    """FIX 4: weight of the size term, 1.000, 0.833, 0.667, then 0.500. A pure function of the epoch."""

    FINAL = 0.5

    def __init__(self, warmup_epochs: int = 3) -> None:
        self.warmup_epochs = warmup_epochs

    def get_size_loss_weight(self, epoch: int) -> float:
        """1 - epoch / warmup_epochs / 2 while warming up, then 0.5."""
        if epoch < self.warmup_epochs:
            return 1.0 - (epoch / self.warmup_epochs) * (1.0 - self.FINAL)
        return self.FINAL


class NoWarmup(SizeWarmupCurriculum):
    """OLD 4: the final weight from the start."""

    def get_size_loss_weight(self, epoch: int) -> float:
        return self.FINAL


class DynamicMemoryThreshold:
    """FIX 5: what enters the memory must beat the running average by a tenth, however good the average is."""

    # 1.10 times an average above 0.909 would ask for more than a perfect solution. The bank asks for accuracy >
    # threshold, so the cap lies just below 1.
    CAP = 0.999

    def __init__(self, initial_threshold: float = 0.2, ema_alpha: float = 0.1) -> None:
        self.ema_accuracy = initial_threshold
        self.ema_alpha = ema_alpha

    def update(self, current_accuracy: float) -> None:
        """Running average: (1 - alpha) * average + alpha * current."""
        self.ema_accuracy = (1 - self.ema_alpha) * self.ema_accuracy + self.ema_alpha * current_accuracy

    def get_threshold(self) -> float:
        """A tenth above the running average, at most CAP."""
        return min(self.ema_accuracy * 1.10, self.CAP)

    def state_dict(self) -> dict[str, float]:
        return {"ema_accuracy": self.ema_accuracy}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.ema_accuracy = float(state["ema_accuracy"])


class FixedMemoryThreshold(DynamicMemoryThreshold):
    """OLD 5: 0.95, whatever the model can do."""

    def get_threshold(self) -> float:
        return 0.95


# FIX 6: the signs. Rewards: every delta of `compute_reward` is after - before. Prompts: consistency enters as 1 - cos.
right_signs: Callable[[Tensor, Tensor], Tensor] = free_energy.prompt_consistency
# OLD 6: the consistency of prompts as the cosine itself, which is smallest when they are opposite.
old_signs: Callable[[Tensor, Tensor], Tensor] = functools.partial(free_energy.prompt_consistency, reversed_sign=True)


@dataclass(frozen=True)
class GradientGuard:
    """FIX 7: every group is clipped to `limit` (0: none) by its own norm; a step that is not finite is skipped."""

    limit: float  # --grad_clip

    def clip(self, optimizer: JointOptimizer) -> dict[str, Tensor]:
        """Norm of each group before clipping, () each."""
        return optimizer.clip(self.limit)

    def allows(self, norms: Iterable[float]) -> bool:
        """One verdict over all groups."""
        return all(map(math.isfinite, norms))


class NoGuard(GradientGuard):
    """OLD 7: (besides fp32 without a scaled loss) no clipping, and every step is made."""

    def clip(self, optimizer: JointOptimizer) -> dict[str, Tensor]:
        return optimizer.clip(0.0)

    def allows(self, norms: Iterable[float]) -> bool:
        return True


@dataclass(frozen=True)
class Fixes:
    """The seven fixes in the form that this run has them; 1 and 7 also in how Qwen and the precision are built."""

    monitor: GradientMonitor  # 1
    objective: Callable[[Tensor, Tensor], Tensor]  # 2
    hard_cells: HardCells  # 3
    curriculum: SizeWarmupCurriculum  # 4
    threshold: DynamicMemoryThreshold  # 5
    consistency: Callable[[Tensor, Tensor], Tensor]  # 6
    guard: GradientGuard  # 7

    @classmethod
    def of(cls, args: Flags) -> Fixes:
        """Each as it is, or its OLD twin for those in --ablate."""
        old = set(args.ablate)
        cells = (args.hard_floor, args.grid_focus, args.keep_solved)
        return cls(
            monitor=GradientMonitor(),
            objective=efe_alone if 2 in old else goal_oriented_loss,
            hard_cells=PlainMean(*cells) if 3 in old else HardCells(*cells),
            curriculum=NoWarmup() if 4 in old else SizeWarmupCurriculum(args.warmup_epochs),
            threshold=FixedMemoryThreshold() if 5 in old else DynamicMemoryThreshold(),
            consistency=old_signs if 6 in old else right_signs,
            guard=NoGuard(args.grad_clip) if 7 in old else GradientGuard(args.grad_clip),
        )


# == Building a run ==================================================================================================

# Deliberately not saved, because they are functions of what is: the curriculum (of the epoch), the order and
# augmentation of episodes and the policy's noise (of seed, epoch and batch), learning rates (of the step), the
# evidence (of the data).


@dataclass
class Run:
    """Everything the loop works with."""

    args: Flags
    team: Team
    log: RunLog
    records: Records
    stop: StopSignal
    budget: Budget
    device: torch.device
    precision: Precision
    data: DataSet
    training: tuple[Task, ...]
    splits: tuple[Split, ...]  # what is predicted and scored
    trained_on: dict[str, Any]  # what a checkpoint records of the data, to recognise them
    extra: tuple[Task, ...]
    store: EvidenceStore
    fixes: Fixes
    qwen: QwenPrompt
    agent: GridAgent
    policy: PromptPolicy
    memory: MemoryBank
    latent: TaskLatent | None
    optimizer: JointOptimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    weights: EfeWeights
    state: TrainState
    pace: Pace = field(default_factory=Pace)
    persistence: ModelPersistence | None = None
    export_files: Mapping[str, str] = field(default_factory=dict)  # config and tokenizer of Qwen, for `export`
    origin: str = ""  # the checkpoint of another folder that this run began from

    @property
    def modules(self) -> dict[str, nn.Module]:
        parts = {"agent": self.agent, "qwen": self.qwen, "policy": self.policy, "memory": self.memory}
        return parts if self.latent is None else {**parts, "latent": self.latent}

    def memory_row(self) -> dict[str, Any]:
        """What metrics.jsonl has of the memory (FIX 5)."""
        row = {"size": len(self.memory), "updates": self.state.memory_updates, "offers": self.state.memory_offers}
        return {f"memory.{name}": n for name, n in row.items()} | {
            "memory.threshold": self.fixes.threshold.get_threshold()
        }


def build_run(
    args: Flags, log: RunLog, started: float, checkpoint: Checkpoint | None = None, team: Team | None = None
) -> Run:
    """Data, models, optimizer. UserError with one line for what the user can mend; writes nothing into the run's
    folder. checkpoint: what will be restored; it says which data it was trained on, and which weights its adapter
    belongs to."""
    device, team = resolve_device(args.device), team or Team()
    precision = resolve_precision("off" if 7 in args.ablate else args.amp, device, narrow_on_cpu(args))  # FIX 7
    torch.set_num_threads(args.threads or DEFAULT_THREADS)  # an earlier run in this notebook may have changed it
    chosen = choose_tasks(args, checkpoint.state["extra"]["data"] if checkpoint else None, log)
    predicted = [task for split in chosen.splits for task in split.tasks]
    seed_everything(args.seed)
    qwen = build_prompt_reader(args, device, [*chosen.training, *predicted], checkpoint, log)
    qwen = qwen.sharded(device, precision.dtype) if args.fsdp else qwen.to(device)
    shape = {name: getattr(args, f"agent_{name}") for name in ("width", "heads", "blocks", "passes")}
    agent = GridAgent(NUM_TABLES, NUM_RULES, args.prompt_len, args.prompt_dim, **shape).to(device)
    if args.compile:
        agent.compile_blocks(log)
    policy = PromptPolicy(args.prompt_len, args.prompt_dim).to(device)
    policy.total = team.total
    memory = MemoryBank(args.memory_size, qwen.embedding_dim, args.prompt_len, args.prompt_dim).to(device)
    known = saved_latents(checkpoint.state["model"]) if checkpoint else len(chosen.training)
    latent = TaskLatent(known, args.prompt_len, args.prompt_dim).to(device) if args.task_latent else None
    optimizer, average = build_optimizer(args, qwen, agent, policy, latent)
    store = NoEvidence() if args.no_evidence else EvidenceStore(f"{args.cache_dir}/evidence", args.feedback_pairs)
    predicted += all_tasks(chosen.data) if args.submission else []
    state = TrainState()
    budget = Budget(
        args.time_budget, started, functools.partial(prediction_cost, args, predicted, len(chosen.splits), store)
    )
    return Run(
        args=args,
        team=team,
        log=log,
        records=Records(log, state, budget, strict=args.strict, log_every=args.log_every),
        stop=StopSignal(log, saving=not args.eval_only, patient=not team.alone),
        budget=budget,
        device=device,
        precision=precision,
        **chosen._asdict(),
        store=store,
        fixes=Fixes.of(args),
        qwen=qwen,
        agent=agent,
        policy=policy,
        memory=memory,
        latent=latent,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.scale_loss),  # FIX 7
        average=average,
        weights=EfeWeights(**{w.name: getattr(args, f"w_{w.name}") for w in dataclasses.fields(EfeWeights)}),
        state=state,
        export_files=qwen.export_files(),
    )


def build_prompt_reader(
    args: Flags, device: torch.device, tasks: Sequence[Task], checkpoint: Checkpoint | None, log: RunLog
) -> QwenPrompt:
    """Qwen as --qwen names it (FIX 1: trainable, unless ablated). Sets args.qwen and args.qwen_lr to what they turn out
    to be. UserError if the largest context of `tasks` does not fit."""
    base = saved_base(checkpoint.state["extra"] if checkpoint else None)
    # What auto means, or the newest revision is, may have changed since the adapter's base was chosen.
    spec, revision = (base.name, base.revision) if base and args.qwen in ("auto", base.name) else (args.qwen, "")
    qwen = build_qwen(
        spec,
        device_type=device.type,
        prompt_len=args.prompt_len,
        prompt_dim=args.prompt_dim,
        max_context_tokens=args.max_context_tokens,
        tune="frozen" if 1 in args.ablate else args.qwen_tune,
        lora_rank=args.lora_rank,
        context_text=args.context_text,
        revision=revision,
        gradient_checkpointing=args.gradient_checkpointing,
        cache_dir=Path(args.cache_dir),
        seed=args.seed,
        log=log,
    )
    largest = max(tasks, key=lambda task: sum(pair.input.size for pair in task.train))
    qwen.encoder(context_pairs(largest))  # says here, not unseen in a worker, if contexts do not fit
    args.qwen = qwen.name  # not "auto": on another machine that may be another model
    if 1 in args.ablate:
        qwen.requires_grad_(False)
    if args.qwen_lr is None:
        # An adapter takes about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret").
        args.qwen_lr = recipes.tiny_qwen_lr(args.data) if qwen.is_tiny else 2e-5 if qwen.adapter is None else 2e-4
    return qwen


def build_optimizer(
    args: Flags, qwen: QwenPrompt, agent: GridAgent, policy: PromptPolicy, latent: TaskLatent | None
) -> tuple[JointOptimizer, WeightAverage | None]:
    """Named groups with rates of their own, and the averaged weights (without a large Qwen that trains whole)."""
    groups: dict[str, nn.Module] = {"agent": agent, "policy": policy}
    rates = {"agent": args.agent_lr, "policy": args.policy_lr}
    if latent is not None:
        groups["latent"], rates["latent"] = latent, args.agent_lr
    if 1 not in args.ablate:  # FIX 1: Qwen is a group of its own
        assert args.qwen_lr is not None
        groups["qwen"], rates["qwen"] = qwen, args.qwen_lr
    eight_bit = {"qwen"} if args.optim_qwen == "adamw8bit" and not args.eval_only else set()
    optimizer = JointOptimizer(groups, rates, muon=args.optimizer == "muon", eight_bit=eight_bit)
    assert all(map(optimizer.covers, (agent, qwen, policy))), "a trainable parameter is in no group"
    small = qwen.is_tiny or args.qwen_tune != "full"
    averaged = groups if small else {name: module for name, module in groups.items() if name != "qwen"}
    return optimizer, WeightAverage(averaged, args.ema) if args.ema > 0 else None


# == One training step ===============================================================================================


def train_step(run: Run, batch: TrainBatch, noise: Tensor, window: int) -> Step:
    """Forward and backward of this process's share of one batch; `update` steps. Every mean is over the whole batch:
    here is what these episodes contribute (`Team`). noise (S, G, A): the policy's; window: batches an update."""
    fixes, agent, team = run.fixes, run.agent, run.team
    with run.precision.autocast(run.device):  # FIX 7
        prompt, key = read_prompt(run, batch)  # FIX 1: gradient flows into Qwen, no cache, no no_grad
        first = agent(batch.query, prompt)
        query, before = batch.query.rows(batch.refined), first.rows(batch.refined)
        feedback = None if run.args.no_policy else context_feedback(agent, batch.feedback, prompt)
        refined = run.policy.refine_prompt(prompt, feedback, noise=noise[0]).prompt if feedback else prompt
        after = agent(query, refined) if feedback else before
        voted = exact_match(voted_grid(batch.query), batch.query.target_grid)
        passes = [
            Pass(batch.query, first, fixes.hard_cells(first, batch.query, voted)),  # FIX 3
            Pass(query, after, fixes.hard_cells(after, query, voted[batch.refined])),
        ]
        # The way back is trained on each episode's first view only: it costs a pass of its own.
        back = agent(batch.way_back, refined, reverse=True) if run.weights.reversibility else None
        trained = passes if feedback else passes[:1]  # the second is the first, of some queries: they would count twice
        shares = team.shares(len(p.query) for p in trained)
        terms = free_energy.terms(trained, shares, batch.way_back, back, team.portion)
        tasks, prompts = team.gather(batch.task), (team.gather(prompt), team.gather(refined.float()))
        terms["prompt"] = team.once(fixes.consistency(torch.cat(prompts), tasks.repeat(2)))  # FIX 6
        efe = free_energy.combine(terms, run.weights, fixes.curriculum.get_size_loss_weight(run.state.epoch))  # FIX 4
        found = there_and_back(agent, query, (before, after), (prompt, refined))
        hard_before, hard_after = (Prediction(*grids) for grids in found)
    # FIX 6: every delta is after - before
    reward, deltas = compute_reward(hard_before, hard_after, query.target_grid, query.input_grid)
    reward_objective = reward_with_gradient(run, query, (before, after), prompt, feedback, hard_before, noise)
    loss = fixes.objective(efe["total"], reward_objective)  # FIX 2
    run.scaler.scale(loss / window).backward()  # FIX 7
    right = exact_match(first.predicted_grid(batch.query), batch.query.target_grid)
    right[batch.refined] = exact_match(hard_after.grid, query.target_grid)
    solved = mean_per_owner(right, batch.query.owner, len(batch.task))  # graded: a share of an episode's queries
    offers = None if run.args.no_memory else Offers.of(team.gather(key), prompts[1], tasks, team.gather(solved))
    measured = {
        "loss": loss,
        **{f"efe.{name}": value for name, value in efe.items()},
        "reward": team.mean(reward),
        **{name: team.mean(value) for name, value in deltas.items()},
        "reward_objective": reward_objective,
        "mask_ratio": team.mean(passes[1].weights.ratio),
        "solved": team.mean(solved),
        "vote_solved": team.mean(mean_per_owner(voted, batch.query.owner, len(batch.task))),
        "prompt_spread": team.once(prompt_spread(prompts[0], team.gather(context_codes(batch.context_ids)))),
    }
    counted = {"queries": team.count(len(batch.query)), "offers": team.count(len(batch.task)) if offers else 0}
    return Step({name: value.detach().float() for name, value in measured.items()}, counted, offers)


def read_prompt(run: Run, batch: TrainBatch | PredictionBatch) -> tuple[Tensor, Tensor]:
    """Qwen reads each context once: prompt (G, K, D), and the context's embedding (G, E)."""
    prompt, embedding = run.qwen(batch.context_ids, batch.context_lengths, batch.reading)
    prompt = prompt.float()
    if run.latent is not None:
        prompt = prompt + run.latent(batch.task, batch.keep if isinstance(batch, TrainBatch) else None)
    return prompt, embedding


def reward_with_gradient(
    run: Run,
    query: QueryBatch,
    outputs: tuple[AgentOutput, AgentOutput],
    prompt: Tensor,
    feedback: Feedback | None,
    hard_before: Prediction,
    noise: Tensor,
) -> Tensor:
    """What FIX 2 maximises, (): by --policy_objective the expected reward or the score function's surrogate; 0 where
    nothing was refined, or the reward is not in the loss (OLD 2)."""
    if feedback is None or run.fixes.objective is efe_alone:
        return torch.zeros((), device=run.device)
    if run.args.policy_objective == "rloo":
        with run.precision.autocast(run.device):
            sampled = sampled_objective(run.policy, run.agent, query, prompt, feedback, hard_before, noise)
        return sampled * run.team.portion(len(prompt))
    before, after = (SoftPrediction(**output.soft(query)) for output in outputs)
    return run.team.mean(expected_reward(before, after, query.target_grid))


def update(run: Run, steps: Sequence[Step], batches: int) -> list[dict[str, Any]]:
    """The optimizer step for the batches that were added up; returns their rows, complete. `batches` an epoch."""
    state, fixes, threshold = run.state, run.fixes, run.fixes.threshold.get_threshold()
    # Of its batches, or of its time budget, if that is further.
    over = max(state.step / max(1, run.args.epochs * batches), run.team.first(run.budget.share(state.step)))
    rates = run.optimizer.set_rates(learning_rate_factor(state.updates + state.skipped_steps, over))
    run.team.sum_gradients(parameter for module in run.modules.values() for parameter in module.parameters())
    run.optimizer.unscale_(run.scaler)  # FIX 7: gradients in their own units again ...
    monitored = fixes.monitor.check_gradients(run.qwen, "Qwen")  # FIX 1: ... measured before clipping ...
    norms = fixes.guard.clip(run.optimizer)  # FIX 7: ... every group clipped
    rows, found, offered = read_steps(steps, {"qwen_grad": torch.as_tensor(monitored["norm"]), **norms})
    for step, row, numbers in zip(steps, rows, offered, strict=True):
        stored = run.memory.take(step.offers, numbers, threshold, state.step) if step.offers else 0  # FIX 5
        row["stored"] = stored if run.team.is_first else 0
    finite = fixes.guard.allows(found[name] for name in norms)
    state.updates += run.optimizer.step(run.scaler, finite=finite)
    state.skipped_steps += not finite
    run.optimizer.zero_grad()
    if run.average is not None and finite:
        run.average.update()
    shared = {"qwen_grad": found["qwen_grad"], "qwen_missing": int(monitored["missing"])}
    shared |= {"agent_grad": found["agent"], "policy_grad": found["policy"]}
    shared |= {"skipped_steps": state.skipped_steps, **{f"lr.{name}": rate for name, rate in rates.items()}}
    return [{**row, **shared} for row in run.team.sums(rows)]


# == The training loop ===============================================================================================


def train(run: Run) -> None:
    """Epochs from where the state stands to the end, each with its summary, validation and checkpoint."""
    args, state = run.args, run.state
    sampler, on_gpu = EpochSampler([], 0), run.device.type == "cuda"
    loader = make_loader(training_data(run), sampler, workers=worker_count(args.workers), pin_memory=on_gpu)
    if state.epoch >= args.epochs:
        run.log(f"Nothing to train: all {args.epochs} epochs are done; a larger --epochs goes on")
    while state.epoch < args.epochs:
        started, in_time = time.monotonic(), True
        if not state.trained:
            sampler.epoch, sampler.start = state.epoch, state.batch
            sampler.batches = epoch_order(args, run.training, state.epoch)
            in_time = train_epoch(run, loader, len(sampler.batches))
        validated = not in_time or state.epoch + 1 == args.epochs
        validated = validated or bool(args.val_every and (state.epoch + 1) % args.val_every == 0)
        reports: dict[str, SplitReport] = {}
        if validated:
            save_checkpoint(run)  # a validation may take minutes; what was trained is safe by then
            reports = validate(run)
            state.val_accuracy, state.accuracy_delta = headline(reports) or (state.val_accuracy, state.accuracy_delta)
        log_validation(run.log, state.epoch, state.step, reports, LABELS, args.val_splits, run.memory_row())
        run.log(f"[Epoch {state.epoch}] Time: {time.monotonic() - started:.2f}s")
        # It may have been the last validation that there was time for.
        spent = not in_time or (validated and bool(run.team.first(run.budget.is_spent(state.step))))
        if in_time:
            run.fixes.threshold.update(state.sums.get("solved", 0.0) / max(1.0, state.sums.get("batches", 0.0)))
            state.next_epoch()
        save_checkpoint(run)
        if spent:
            break


def train_epoch(run: Run, loader: DataLoader, count: int) -> bool:
    """The rest of this epoch's `count` batches. Returns False if the time budget ended it early."""
    args, state, log, budget, team = run.args, run.state, run.log, run.budget, run.team
    size_weight, threshold = run.fixes.curriculum.get_size_loss_weight(state.epoch), run.fixes.threshold.get_threshold()
    log(f"[Epoch {state.epoch}] Size Warmup Weight: {size_weight:.3f} (FIX #4)")
    log(f"[Epoch {state.epoch}] Memory Threshold: {threshold:.4f} (FIX #5)")
    unprepared = Unprepared(() if args.data == GENERATED else run.training, run.store)
    bar = log.bar(total=count, initial=state.batch, desc=f"epoch {state.epoch}", unit="batch")
    preparing = log.bar(
        total=len(unprepared), desc="evidence prepared", unit="task", disable=args.quiet or not len(unprepared)
    )
    last_saved, ready, began, in_time = state.step, time.monotonic(), 0.0, True
    steps: list[Step] = []
    with bar, preparing:
        for fetched in batches_of(loader):  # starts at state.batch: a resumed run enters in mid-epoch
            began = began if steps else time.monotonic()
            preparing.update(unprepared.met(fetched.task.tolist()))
            window = window_size(args.grad_accum, state.batch, count)
            shape = (args.policy_samples, fetched.whole, run.policy.log_std.numel())
            noise = normal_noise(shape, args.seed, state.epoch, state.batch + len(steps), 0xAC7)
            noise = noise[:, list(share_of(range(fetched.whole), team.place))]
            team.begin(fetched.whole)
            step = train_step(run, fetched.to(run.device), noise.to(run.device), window)
            cells = {name: team.count(number) for name, number in fetched.cell_counts().items()}
            steps.append(dataclasses.replace(step, counted={**step.counted, **cells}))
            if len(steps) < window:
                continue
            rows = update(run, steps, count)  # a batch counts when its optimizer step is done
            now = time.monotonic()
            run.records.add(rows, (now - ready) / len(steps), (now - began) / len(steps))
            bar.update(len(steps))
            speed, loss = rows[-1]["samples_per_s"], rows[-1]["loss"]
            bar.set_postfix_str(f"{speed:.0f} samples/s, loss {loss:.3f}", refresh=False)
            steps.clear()
            if (seconds := run.pace.measure(state.step)) is not None:
                left = args.epochs - state.epoch - state.batch / count
                for line in budget.expectation(seconds, count, left, args.val_every):
                    log(f"[Epoch {state.epoch}] {line}")
            if state.step // args.save_every > last_saved // args.save_every:
                save_checkpoint(run)
                last_saved = state.step
            run.stop.check(team.most)
            if team.first(budget.is_spent(state.step)):
                in_time = False
                break
            ready = time.monotonic()
    state.trained = in_time
    lines = summary_lines(state, summary_title(args, ABLATION), size_weight, threshold, len(run.memory))
    log("\n".join(lines[:-1]))
    log(lines[-1])
    run.records.check_epoch()
    return in_time


def training_data(run: Run) -> EpisodeData:
    """What the loader builds training batches with."""
    data = (run.args, run.training, run.extra, run.store, run.qwen.encoder, run.team.place)
    return EpisodeData.of(*data, spare=spare_tokens(run.device))


def validate(run: Run) -> dict[str, SplitReport]:
    """Predict and score every chosen split. Under --time_budget in the time that is left (half of it, if all test
    inputs have to be predicted for --submission afterwards)."""
    deadline, began = part_of(run.budget.deadline, 1, 2 if run.args.submission else 1), time.monotonic()
    predicted = predict_splits(run, run.splits, deadline)
    run.budget.last_prediction = time.monotonic() - began
    return score_splits(predicted, LABELS, run.log)


def predict_splits(
    run: Run, splits: Sequence[Split], deadline: float, *, show: bool = True
) -> dict[str, list[PairPrediction]]:
    """Predict the splits under the averaged weights by `deadline` (inf: every view of every pair), each in its share of
    the time; write the attempts as JSON into the run's folder, and, if they are to `show`, what the report draws. Of
    several processes each predicts a part, and the first has (and scores) them all; the others return nothing."""
    predicted: dict[str, list[PairPrediction]] = {}
    modules = list(run.modules.values())
    average = run.average.applied() if run.average else contextlib.nullcontext()
    with evaluating(modules), average, sharding.whole_on_all(run.qwen):
        run.records.check_weights(modules)
        for number, split in enumerate(splits):
            until = part_of(deadline, split.pairs, sum(each.pairs for each in splits[number:]))
            pairs = gathered(split, functools.partial(predictor(run).split, deadline=until), run.team, run.stop)
            if not run.team.is_first:
                continue
            predicted[split.name] = pairs
            assert run.log.folder is not None
            if math.isfinite(deadline):
                run.log(f"{split.name} split: {views_reached(pairs, run.args.val_views)}")
            keep_attempts(run.log.folder, split, pairs, run.log)
            if show:
                keep_predictions(run.log.folder, split.name, pairs, step=run.state.step, log=run.log)
            if run.log.events is not None and split.name in run.args.val_splits:
                run.log.events.pictures(split.name, run.state.step, pairs)
    return predicted


def predictor(run: Run) -> Predictor:
    """The run's modules as they predict: the policy takes the mean of its action, or up to --refine_steps."""

    def act(prompt: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
        return run.policy.refine_prompt(prompt, context_feedback(run.agent, pairs, prompt)).prompt

    return Predictor(
        args=run.args,
        agent=run.agent,
        read=functools.partial(read_prompt, run),
        recall=functools.partial(run.memory.recall, count=recall_count(run.args)),
        act=None if run.args.no_policy else act,
        score=lambda grid, target: (exact_match(grid, target), cell_accuracy(grid, target)),
        encode=run.qwen.encoder,
        store=run.store,
        precision=run.precision,
        device=run.device,
        log=run.log,
        check=run.stop.check,
    )


# == Checkpoints =====================================================================================================


def checkpoint_tree(run: Run) -> dict[str, Any]:
    """Everything that a resumed run needs, in the three groups that `ModelPersistence.save` takes."""
    return {
        "model": {name: part.state_dict() for name, part in saved_parts(run).items()},
        "optim": {
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "average": run.average.state_dict(saved_parts(run)) if run.average else None,
        },
        "extra": {
            "format": CHECKPOINT_FORMAT,
            "state": dataclasses.asdict(run.state),
            "threshold": run.fixes.threshold.state_dict(),
            "rng": rng_state(),
            "flags": saved_flags(run.args),
            "data": run.trained_on,
            "rows": run.log.rows,
            "origin": run.origin,
            "export": {"qwen": run.export_files},
            "lora": {"qwen": run.qwen.adapter.recipe(run.qwen.base)} if run.qwen.adapter else {},
        },
    }


def saved_parts(run: Run) -> dict[str, nn.Module | Adapter]:
    """The modules by the name they have in a checkpoint."""
    return {**{name: part for name, part in run.modules.items() if name != "qwen"}, **run.qwen.saved_parts()}


def save_checkpoint(run: Run, *, wait: bool = False) -> None:
    """Save now, by the first process. metrics decide the best models: accuracy delta and validation accuracy of the
    last validation."""
    persistence, tree, given = run.persistence, checkpoint_tree(run), run.args.fsdp
    if given:  # all bring their parts; the copy before is on disk then, so that there is one at a time
        if persistence is not None:
            persistence.wait()
        tree = sharding.on_host(tree, keep=persistence is not None)
    if persistence is not None:
        frozen = run.qwen.frozen_state()
        metrics = {"accuracy_delta": run.state.accuracy_delta, "val_accuracy": run.state.val_accuracy}
        persistence.save(tree, step=run.state.step, metrics=metrics, wait=wait, frozen=frozen, given=given)


def load_checkpoint(persistence: ModelPersistence, which: str) -> Checkpoint:
    """latest, best or a path, verified. UserError for one that this version of the program did not write."""
    checkpoint = persistence.load(which, aside=False)
    extra = checkpoint.state.get("extra")
    found = extra.get("format", 1) if isinstance(extra, dict) else 1
    if found != CHECKPOINT_FORMAT:
        raise UserError(
            f"--resume: {checkpoint.path.name} was written by another version of this program (checkpoint format "
            f"{found}, here {CHECKPOINT_FORMAT}); continue it with that version, or start a new run"
        )
    return checkpoint


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a built run. Order: weights, optimizer and scaler, state, random generators last."""
    tree, extra = checkpoint.state, checkpoint.state["extra"]
    of = ("data", "training") if run.args.eval_only else ("data", "training", "extra")
    same = all(extra["data"].get(key) == run.trained_on[key] for key in of)
    if not same and run.training:  # with nothing to train, the checkpoint's model may predict anything
        raise UserError("--resume: made with other data; give the same --data, --unseen and --extra_data")
    if (saved := saved_base(extra)) and run.qwen.base and (problem := run.qwen.base.differs_from(saved)):
        raise UserError(f"--resume: {problem}")
    for name, part in saved_parts(run).items():
        try:
            sharding.load_state(part, tree["model"][name])
        except (KeyError, RuntimeError) as error:  # other shapes: --eval_only with another --qwen
            raise UserError(f"--resume: the checkpoint's {name} does not fit the model that is built here") from error
    if checkpoint.frozen:
        run.qwen.backbone.load_state_dict({name.partition("/")[2]: t for name, t in checkpoint.frozen.items()})
    if not run.args.eval_only:  # nothing is trained; the moments may be of a package that is not here
        run.optimizer.load_state_dict(tree["optim"].get("optimizer"))
    if isinstance(scale := tree["optim"].get("scaler"), dict) and scale:  # where the loss was scaled; else afresh
        run.scaler.load_state_dict(dict(scale))
    if run.average is not None:
        run.average.load_state_dict(tree["optim"].get("average"))
    run.fixes.threshold.load_state_dict(extra["threshold"])
    run.state.load(extra["state"])
    run.log.rows, run.origin = len(range(extra["rows"])), str(extra.get("origin", ""))  # whoever wrote them
    restore_rng(extra["rng"])


# == Main ============================================================================================================


def describe(run: Run) -> None:
    """What runs: model, device, precision and why, data, checkpoint size and whether the disk has room for it."""
    tree, growth = sharding.outline(checkpoint_tree(run)), run.optimizer.bytes_to_come()
    size = ModelPersistence.estimate_bytes(tree) + growth
    run.log("\n".join(opening_lines(run, size, events=run.log.events is not None)))
    assert run.persistence is not None
    if warning := run.persistence.space_warning(tree, run.qwen.frozen_state(), growth=growth):
        run.log(warning)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 1 (a checkpoint or the submission could not be written, a worker was
    lost), 2 (the user can mend it), 3 (a red flag under --strict), 128 + n (signal n). Also called from notebook cells:
    main(["--epochs", "1"]), which so ends without an exception for --help, wrong flags and Stop, and leaves no lock."""
    try:
        return run_main(argv)
    except SystemExit as leave:  # argparse's way to end; what there is to say is printed
        return int(leave.code or 0)
    except PeerLost as problem:  # nothing is saved between two optimizer steps: the last checkpoint counts
        if problem.own or os.environ["RANK"] == "0":
            print(f"error: {problem}; what was saved before counts", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training begins, or a second one while the first is being obeyed
        print("Interrupted: left at once, what was saved before counts", file=sys.stderr)
        return 128 + signal.SIGINT


def run_main(argv: Sequence[str] | None) -> int:
    """`main`, but --help and wrong flags raise SystemExit, and an interruption that cannot wait KeyboardInterrupt."""
    started = time.monotonic()
    with one_voice():
        args, given = parse_arguments(argv)
    log, team = RunLog(quiet=args.quiet), Team()
    try:
        if args.print_config:
            return print_config(args, given)
        team = join(resolve_device(args.device))
        log = log if team.is_first else RunLog(mute=True)
        run, checkpoint = prepare(args, given, log, started, team)
    except PROBLEMS as problem:
        # For what the user can mend, with one line that says what and where. Anything else shows its traceback.
        log(f"error: {problem}", error=True)
        team.leave(orderly=True)
        return 2
    children, orderly = multiprocessing.active_children(), False
    try:
        with run.persistence or contextlib.nullcontext(), contextlib.closing(log):
            code = run_command(run, checkpoint)
        orderly = True
    except PROBLEMS as problem:  # the folder's files are in the way; the last background write failed
        log(f"error: {problem}", error=True)
        return 2 if isinstance(problem, UserError) else 1
    finally:
        end_workers(children)
        team.leave(orderly=orderly)
    code = log.exit_code(code)
    if team.is_first and code in (0, 1, 3) and (args.report or not args.eval_only):  # not when interrupted
        try_report(Path(args.output_dir or "."), log)
    return code


def prepare(args: Flags, given: set[str], log: RunLog, started: float, team: Team) -> tuple[Run, Checkpoint | None]:
    """The run with its checkpoints open (for writing in the first process), and the checkpoint that it continues."""
    # As the first process has it. Where torchrun starts a job again, it goes on in the folder where that was.
    where = functools.partial(open_run_folder, args, find_newest_run, newest_checkpoint, again=team.remembered())
    chosen = team.together(lambda: where() if team.is_first else None, PROBLEMS)
    name, which = team.everyones(chosen and (str(chosen[0]), chosen[1]))[0]
    folder = Path(name)
    with contextlib.ExitStack() as held:  # in a notebook the process lives on: it must not keep the run's lock

        def load(which: str) -> tuple[ModelPersistence, Checkpoint]:
            persistence = open_persistence(args, folder, log, read_only=not team.is_first)
            held.callback(persistence.close)
            checkpoint = load_checkpoint(persistence, which)
            take_flags(args, given, checkpoint)
            persistence.keep = args.keep
            return persistence, checkpoint

        # The first may pass over a damaged one, or fetch one from the backup: the others take what it has found.
        opened = team.together(lambda: load(which) if which and team.is_first else None, PROBLEMS)
        found = team.everyones(str(opened[1].path.absolute()) if opened else None)[0]

        def build() -> tuple[Run, Checkpoint | None]:
            persistence, checkpoint = opened or (load(found) if found else (None, None))
            if checkpoint is not None and (problems := problems_of_all(args)):
                raise UserError("; ".join(problems))
            args.output_dir = str(folder)
            with quiet_downloads() if args.quiet else contextlib.nullcontext(), memory_for_the_model():
                run = build_run(args, log, started, checkpoint, team)
            if checkpoint is not None:
                with usable(checkpoint.path.name):
                    restore(run, checkpoint)
                if checkpoint.path.parent.resolve() != folder.resolve() and not args.eval_only:
                    run.origin, run.log.rows = str(checkpoint.path), 0
                    run.state.forget_validation()  # of the other run: its best is not this one's
            if team.is_first:
                run.persistence = persistence or open_persistence(args, folder, log)
            return run, checkpoint

        run, checkpoint = team.together(build, PROBLEMS)
        held.pop_all()
    team.same_weights(run.modules.values(), run.average.average.values() if run.average else ())
    team.remember(str(folder.absolute()))
    return run, checkpoint


def open_persistence(args: Flags, folder: Path, log: RunLog, *, read_only: bool = False) -> ModelPersistence:
    """The run's checkpoints; UserError if its folder cannot be made."""
    if read_only:
        return ModelPersistence(folder, read_only=True, log=log)
    try:
        return ModelPersistence(
            folder, keep=args.keep, backup_dir=args.backup_dir, backup_quota_gb=args.backup_quota_gb, log=log
        )
    except (OSError, ValueError) as problem:  # or a backup where the run itself is
        raise UserError(f"--output_dir: {folder}: {getattr(problem, 'strerror', None) or problem}") from problem


def run_command(run: Run, checkpoint: Checkpoint | None) -> int:
    """Train or evaluate, with the run's folder open; always saves what was trained. Returns the exit code."""
    # An evaluation may be of any checkpoint: its step would stand out of order among the events of the training.
    evaluating = run.args.eval_only
    events = None if run.args.no_tensorboard or evaluating else open_events
    if run.team.is_first:
        run.log.open(Path(run.args.output_dir or "."), rows=None if evaluating else run.log.rows, open_events=events)
        describe(run)
    if checkpoint is not None:
        run.log("\n".join(resumed_lines(run, checkpoint.path.name, checkpoint.state["extra"]["flags"].get("epochs"))))
    try:
        with run.stop.listening():
            return evaluate(run) if evaluating else train_and_submit(run)
    except Interrupted as stop:
        code = 128 + int(stop.args[0])
    except RedFlag:
        code = 3
    except (PersistenceError, WorkerLost) as problem:
        if isinstance(problem, WorkerLost) and not run.team.alone:
            raise PeerLost(f"process {run.team.place.rank}: {problem}", own=True) from problem
        run.log(f"error: {problem}", error=True)
        if isinstance(problem, PersistenceError):  # nothing can be saved
            return 1
        code = 1
    except torch.OutOfMemoryError as problem:  # it may be in the middle of an update: nothing is saved
        raise PeerLost(too_little_memory(run.args), own=True) from problem
    if not evaluating:  # else nothing was trained
        try:
            save_checkpoint(run, wait=True)
        except PersistenceError as problem:
            run.log(f"error: {problem}", error=True)
            return 1
        run.log(f"Saved at epoch {run.state.epoch}, batch {run.state.batch}; continue with --resume")
    return code


def train_and_submit(run: Run) -> int:
    """Train to the end; with --submission predict every task of the data. Returns the exit code."""
    if run.team.is_first:
        write_config(Path(run.args.output_dir or "."), saved_flags(run.args))
    begun = run.state.step
    train(run)
    if run.persistence is not None:
        run.persistence.wait()  # what it saved last is on disk before the run is called done
    ours = f"; the last {run.state.step - begun} batches" if begun else ""
    run.log(f"Done: {run.state.step} batches, {run.state.queries} queries{ours} in {run.budget.elapsed():.1f}s")
    if not run.args.submission:
        return 0
    splits = splits_by_content(all_tasks(run.data), run.trained_on["inputs"])
    predicted = predict_splits(run, splits, run.budget.deadline, show=False)
    return submit(run.args.submission, predicted, all_tasks(run.data), run.log)


def evaluate(run: Run) -> int:
    """--eval_only: predict and score what was asked for. Returns the exit code."""
    predicted, state = predict_splits(run, run.splits, run.budget.deadline), run.state
    reports = score_splits(predicted, LABELS, run.log)
    log_validation(run.log, state.trained_epoch, state.step, reports, LABELS, run.args.val_splits, run.memory_row())
    return submit(run.args.submission, predicted, all_tasks(run.data), run.log) if run.args.submission else 0


if __name__ == "__main__":
    if AS_A_COMMAND and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_code = main()
    if ipython_shell() is None:  # else %run, or this file pasted into a cell: there SystemExit is shown as an error
        sys.exit(exit_code)
