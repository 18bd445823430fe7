"""Train a small ARC solver: grid agent, trainable Qwen and prompt policy, jointly, with seven named fixes.

    python trainloop_complete_with_fixes.py --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --resume

The file reads top to bottom: flags, the small classes that are the fixes, building, one training step's pieces,
validation, the training loop, main. Shapes: G episodes (a task with one demonstration pair held out), V views each, B
= G * V queries, L tokens, K prompt vectors of width D.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that wait must not spin for long: where cores are few, torch's threads share them with the data workers and
# with whatever else the machine does. libgomp reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from arc import efe as free_energy
from arc.agent import AgentOutput, GridAgent, voted_grid
from arc.augment import Augmentation, evaluation_views
from arc.batches import (
    EpisodeData,
    EpochSampler,
    PredictionBatch,
    PredictionData,
    Query,
    QueryBatch,
    TrainBatch,
    collate_queries,
    context_pairs,
    epoch_batches,
    prediction_order,
    unpad_grid,
)
from arc.controls import NoEvidence, carve
from arc.datasets import load_dataset
from arc.device import Precision, device_name, resolve_device, resolve_precision
from arc.efe import EfeWeights
from arc.evaluate import write_submission
from arc.evidence import NUM_RULES, NUM_TABLES, EvidenceStore
from arc.lora import Adapter, Base, problem_with_peft
from arc.memory import MemoryBank
from arc.optim import JointOptimizer, WeightAverage, learning_rate_factor, problem_with_eight_bit
from arc.predict import BatchPrediction, PairPrediction, SplitReport, all_attempts, predict_tasks, score_predictions
from arc.qwen import QwenPrompt, build_qwen, quiet_downloads
from arc.refine import cross_fitted
from arc.report import keep_predictions, try_report
from arc.run.config import read_config
from arc.run.files import cannot_look, cannot_write, cannot_write_file, default_cache
from arc.run.flags import Arguments, Number, ipython_shell, own_arguments
from arc.run.runlog import RunLog
from arc.run.terminal import Pace, duration, write_line
from arc.splits import LABELS, NEW, Split, adapted_tasks, input_digests, splits_by_content, training_fingerprint
from arc.tasks import DataSet, Task, drop_duplicates
from model_persistence import Checkpoint, ModelPersistence, PersistenceError, find_newest_run
from policy_refined import (
    Feedback,
    Prediction,
    PromptPolicy,
    SoftPrediction,
    cell_accuracy,
    compute_reward,
    exact_match,
    expected_reward,
    score_function_objective,
)

# ====================================================================================================================
# Flags
# ====================================================================================================================

ABLATION = {
    1: "Qwen frozen",
    2: "loss without the reward",
    3: "plain mean over cells",
    4: "no size warm-up",
    5: "fixed memory threshold 0.95",
    6: "consistency with the old sign",
    7: "no mixed precision, no loss scaling, no clipping",
}
DEV_SPLITS = ("dev_unseen", "dev_seen")
# What --old stands for: every fix turned back, and the seed's learning rates.
OLD_SETTINGS: Mapping[str, Any] = {"ablate": tuple(ABLATION), "agent_lr": 1e-5, "qwen_lr": 5e-5}
# What a resumed run takes from its own command line only: where it runs and how this command behaves.
OF_THE_COMMAND = {
    "resume", "output_dir", "eval_only", "device", "workers", "cache_dir", "time_budget", "strict", "quiet",
    "submission", "report", "backup_dir", "backup_quota_gb", "no_tensorboard",
}  # fmt: skip
# What it may change besides: none of these enters the maths of a training step. (The data is compared by content.)
HARMLESS = OF_THE_COMMAND | {
    "epochs", "data", "unseen", "save_every", "keep", "log_every", "val_every", "val_views", "val_limit",
    "refine_steps", "threads", "gradient_checkpointing",
}  # fmt: skip
# And under --eval_only, where nothing is trained: another machine, another copy of the same Qwen.
HARMLESS_TO_EVALUATE = HARMLESS | {"amp", "qwen", "max_cells"}


DEFAULT_THREADS = torch.get_num_threads()
CHECKPOINT_FORMAT = 3  # raise it when checkpoints of before can no longer be continued

# The order of --help: what every run needs, then what belongs to the fixes.
HEADINGS = (
    "run", "data", "agent", "validation and records", "checkpoints",
    "the seven fixes", "fix 1: Qwen trains", "fixes 2 and 6: the loss is the goal, and its signs",
    "fix 3: hard cells", "fix 4: size warm-up", "fix 5: memory", "fix 7: mixed precision and clipping",
)  # fmt: skip


def ablation_list(text: str) -> tuple[int, ...]:
    """'1,3' -> (1, 3)."""
    try:
        chosen = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        chosen = [0]
    if not all(number in ABLATION for number in chosen):
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of fixes 1 to 7")
    return tuple(chosen)


def split_list(text: str) -> tuple[str, ...]:
    """'seed,unseen' -> ('seed', 'unseen')."""
    splits = [part.strip() for part in text.split(",") if part.strip()]
    if not splits or not set(splits) <= {"seed", "unseen", "adapted", *DEV_SPLITS} or len(set(splits)) < len(splits):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seed, unseen, adapted")
    return tuple(splits)


def build_parser() -> Arguments:
    """Every flag, in groups; the names are part of the product."""
    parser = Arguments((__doc__ or "").split("\n\n")[0])
    number = Number
    parser.declare_groups(HEADINGS)
    g = parser.group("run")
    g.add_argument(
        "--config", metavar="FILE", help="flags as a JSON object, a run's config.json too; the command line wins"
    )
    g.add_argument(
        "--print_config", action="store_true", help="print the resolved flags as JSON and leave; nothing is written"
    )
    g.add_argument("--epochs", type=number(int, 1), default=20, help="passes over all episodes")
    g.add_argument("--max_batches", type=number(int, 0), default=0, help="batches an epoch at most; 0: all")
    g.add_argument(
        "--time_budget",
        type=number(float, 0),
        default=0.0,
        help="seconds for the whole command, final validation included (about); 0: no limit",
    )
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    g.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of everything random")
    g.add_argument("--threads", type=number(int, 0), default=0, help="CPU threads for torch; 0: torch's own choice")
    g.add_argument(
        "--workers", type=number(int, -1, 64), default=-1, help="processes that prepare batches; -1: by machine"
    )
    g.add_argument(
        "--eval_only",
        action="store_true",
        help="do not train: validate a checkpoint (with --resume) again, or score it on every task of another --data",
    )
    g.add_argument(
        "--submission",
        default=None,
        metavar="FILE",
        help="at the end write two attempts at every test input of --data there, in the ARC Prize format",
    )
    g.add_argument("--strict", action="store_true", help="a red flag saves and stops the run with exit code 3")
    g.add_argument("--quiet", action="store_true", help="no log lines or bars on stdout; train.log has them all")
    g = parser.group("data")
    g.add_argument("--data", default="arcagi2", help="arcagi2, arcagi1, kaggle2025, a JSON file or a folder")
    g.add_argument(
        "--adapt",
        action="store_true",
        help="train on the demonstration pairs of the evaluation tasks too (those of --unseen; of --data if it has no "
        "others), never on their test outputs",
    )
    g.add_argument("--augment", choices=("full", "dihedral", "colour", "none"), default="full", help="of each view")
    g.add_argument("--views", type=number(int, 1, 64), default=4, help="augmented views of an episode in a batch")
    g.add_argument("--batch_size", type=number(int, 1), default=32, help="queries in a batch at most")
    g.add_argument(
        "--max_cells",
        type=number(int, 1),
        default=6144,
        help="padded grid cells in a batch at most (but at least one episode)",
    )
    g.add_argument("--cache_dir", default=default_cache(), help="for the evidence and the built-in tiny Qwen")
    g = parser.group("fix 1: Qwen trains")
    g.add_argument(
        "--qwen", default="auto", help="auto: Qwen/Qwen2.5-0.5B on cuda, else tiny; tiny; a hub name; a folder"
    )
    g.add_argument(
        "--qwen_tune",
        choices=("full", "lora", "frozen"),
        default="full",
        help="what of Qwen trains; lora: small matrices beside the frozen ones (pip install peft)",
    )
    g.add_argument("--lora_rank", type=number(int, 1, 1024), default=16, help="rank of those matrices")
    g.add_argument(
        "--qwen_lr",
        type=number(float, 0, above=True),
        default=None,
        help="learning rate of Qwen; by default 3e-4 for the tiny one, 2e-5 for a pretrained one, 2e-4 for its lora",
    )
    g.add_argument(
        "--optim_qwen",
        "--optim",
        choices=("adamw", "adamw8bit"),
        default="adamw",
        help="adamw8bit: moments of Qwen's layers in 8 bits (pip install bitsandbytes)",
    )
    g.add_argument("--gradient_checkpointing", action="store_true", help="less memory for Qwen, a third more time")
    g.add_argument("--max_context_tokens", type=number(int, 16), default=1536, help="Qwen reads whole pairs up to this")
    g.add_argument("--prompt_len", type=number(int, 1, 64), default=4, help="K, vectors of a prompt")
    g.add_argument("--prompt_dim", type=number(int, 4, 4096), default=128, help="D, their width")
    g = parser.group("agent")
    g.add_argument("--agent_lr", type=number(float, 0, above=True), default=3e-4, help="learning rate of the agent")
    g.add_argument("--agent_width", type=number(int, 16, 4096), default=128, help="width of a token")
    g.add_argument("--agent_heads", type=number(int, 1, 64), default=2, help="attention heads")
    g.add_argument("--agent_blocks", type=number(int, 1, 64), default=2, help="blocks with weights of their own")
    g.add_argument(
        "--agent_passes", type=number(int, 1, 16), default=2, help="times the blocks are run, each supervised"
    )
    g.add_argument(
        "--optimizer", choices=("muon", "adamw"), default="muon", help="for the matrices of the agent's blocks"
    )
    g.add_argument(
        "--ema", type=number(float, 0, 0.99999), default=0.995, help="decay of the averaged weights; 0: none"
    )
    g = parser.group("fixes 2 and 6: the loss is the goal, and its signs")
    g.add_argument("--policy_lr", type=number(float, 0, above=True), default=1e-3, help="learning rate of the policy")
    g.add_argument(
        "--policy_objective",
        choices=("expected", "rloo"),
        default="expected",
        help="expected reward by back-propagation, or score function with leave-one-out advantages",
    )
    g.add_argument("--policy_samples", type=number(int, 2, 64), default=4, help="actions an episode under rloo")
    g.add_argument("--no_policy", action="store_true", help="control: no refinement, the agent trained on one pass")
    g.add_argument("--refined_views", type=number(int, 1, 64), default=2, help="views answered after refinement too")
    g.add_argument(
        "--refine_steps",
        type=number(int, 1, 100),
        default=1,
        help="of evaluation: 1: the policy's action; more: up to so many, as held-out demonstrations find best",
    )
    g.add_argument("--feedback_pairs", type=number(int, 1, 2), default=2, help="context pairs that give feedback")
    for weight in dataclasses.fields(EfeWeights):
        g.add_argument(
            f"--w_{weight.name}",
            type=number(float, 0),
            default=weight.default,
            help=f"weight of the efe term {weight.name}",
        )
    g = parser.group("fix 3: hard cells")
    g.add_argument("--grid_focus", type=number(float, 0), default=8.0, help="how much more nearly right grids count")
    g.add_argument("--hard_floor", type=number(float, 0, 1), default=0.5, help="weight of an already right cell")
    g.add_argument(
        "--keep_solved", type=number(float, 0), default=10.0, help="how much more grids count that the vote solves"
    )
    g = parser.group("fix 4: size warm-up")
    g.add_argument("--warmup_epochs", type=number(int, 1), default=3, help="epochs of the size curriculum")
    g = parser.group("fix 5: memory")
    g.add_argument("--memory_size", type=number(int, 1), default=1024, help="entries of the memory bank")
    g.add_argument("--no_memory", action="store_true", help="control: the bank is neither read nor written")
    g = parser.group("fix 7: mixed precision and clipping")
    g.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    g.add_argument(
        "--grad_clip", type=number(float, 0), default=1.0, help="largest gradient norm of each group; 0: none"
    )
    g.add_argument("--grad_accum", type=number(int, 1), default=1, help="batches for one optimizer step")
    g = parser.group("the seven fixes")
    g.add_argument("--ablate", type=ablation_list, default=(), help="fixes turned back to the old behaviour: 1,3,...")
    g.add_argument(
        "--old", action="store_true", help="the old settings: --ablate 1,2,3,4,5,6,7 --agent_lr 1e-5 --qwen_lr 5e-5"
    )
    g.add_argument(
        "--no_evidence",
        action="store_true",
        help="control: no table, record or size rule; canvases of the input's size",
    )
    g = parser.group("validation and records")
    g.add_argument("--val_every", type=number(int, 0), default=1, help="epochs between validations; 0: only at the end")
    g.add_argument(
        "--val_splits",
        type=split_list,
        default=("seed",),
        help="comma-separated: seed (test pairs of the training tasks), unseen, adapted; with --adapt seed,adapted",
    )
    g.add_argument(
        "--unseen", default="arcagi1", help="set whose evaluation tasks are the unseen or adapted split (as --data)"
    )
    g.add_argument(
        "--dev", action="store_true", help="train and validate on held-out demonstrations; no test pair is touched"
    )
    g.add_argument("--dev_tasks", type=number(int, 1), default=100, help="tasks held out whole under --dev")
    g.add_argument("--val_views", type=number(int, 1, 64), default=8, help="augmented views that vote")
    g.add_argument("--val_limit", type=number(int, 0), default=0, help="validate on the first N tasks only; 0: all")
    g.add_argument("--log_every", type=number(int, 1), default=10, help="batches between log lines")
    g.add_argument("--report", action="store_true", help="write report.html after --eval_only too, as training does")
    g.add_argument("--no_tensorboard", action="store_true", help="no event files, even if tensorboard is installed")
    g = parser.group("checkpoints")
    g.add_argument("--output_dir", default=None, help="the run's folder (default: runs/arc_complete_YYYYMMDD_HHMMSS)")
    g.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        default=None,
        metavar="latest|best|PATH",
        help="continue a run: the newest under runs/, or --output_dir's",
    )
    g.add_argument("--save_every", type=number(int, 1), default=50, help="batches between checkpoints")
    g.add_argument("--keep", type=number(int, 1), default=5, help="checkpoints kept, best ones aside")
    g.add_argument("--backup_dir", default=None, help="mirror checkpoints there (a mounted Drive)")
    g.add_argument("--backup_quota_gb", type=number(float, 0, above=True), default=15.0, help="at most this much there")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """Parse and check flags; all problems in one line and exit code 2. Returns also the flags given explicitly, on the
    command line or by --config."""
    argv = own_arguments() if argv is None else [str(argument) for argument in argv]  # numbers too, from a cell
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.problems.append(f"unknown: {' '.join(unknown)}")
    typed = {
        action.dest
        for action in parser._actions
        for option in action.option_strings
        if any(word == option or word.startswith(option + "=") for word in argv)
    }
    given = set(typed)
    if args.config is not None:
        for name, value in read_config(parser, Path(args.config), resuming=args.resume is not None).items():
            if name not in typed:
                setattr(args, name, value)
                given |= {name} if value is not None else set()  # null: decided when the model is built
    expand(args, typed, given)
    parser.problems += conflicts(args)
    if parser.problems:
        parser.report()
    return args, given


def expand(args: argparse.Namespace, typed: set[str], given: set[str]) -> None:
    """Flags that stand for others, or decide their defaults, where those are not given explicitly. One on the command
    line (`typed`) is stronger than what a --config says of the others."""
    if args.old:
        explicit = typed if "old" in typed else given
        vars(args).update({name: value for name, value in OLD_SETTINGS.items() if name not in explicit})
    if (args.adapt or args.dev) and "val_splits" not in (typed if {"adapt", "dev"} & typed else given):
        args.val_splits = DEV_SPLITS if args.dev else ("seed", "adapted")
    if {"qwen", "qwen_tune"} & typed and "qwen_lr" not in typed and not args.old:
        args.qwen_lr = None  # the config's is that of another model
        given.discard("qwen_lr")


def conflicts(args: argparse.Namespace) -> list[str]:
    """Problems between flags, or with this machine, that can be known before anything is built."""
    problems = []
    if args.agent_width % (4 * args.agent_heads):
        problems.append(
            f"--agent_width {args.agent_width} is not a multiple of 4 * --agent_heads ({4 * args.agent_heads})"
        )
    splits = set(args.val_splits)
    if args.adapt and "unseen" in splits:
        problems.append("--val_splits unseen: with --adapt nothing is unseen; adapted is the split that is trained on")
    if args.adapt and args.dev:
        problems.append("--adapt trains on evaluation tasks, --dev on nothing but a part of the training tasks")
    if not args.resume:  # there the checkpoint's --adapt and --dev hold
        if "adapted" in splits and not args.adapt:
            problems.append("--val_splits adapted needs --adapt")
        if splits & set(DEV_SPLITS) if not args.dev else splits - set(DEV_SPLITS):
            problems.append("--val_splits dev_unseen,dev_seen, and no others, go with --dev")
    if args.submission is not None:
        if problem := cannot_write_file(Path(args.submission)):
            problems.append(f"--submission: {problem}")
        if args.eval_only and args.val_limit:
            problems.append("--submission needs every task; leave out --val_limit")
    if args.views > args.batch_size:
        problems.append(f"--views {args.views} do not fit in --batch_size {args.batch_size}")
    if args.eval_only and not args.resume:
        problems.append("--eval_only needs --resume (latest, best or a checkpoint's path)")
    try:
        problems += problems_of_all(args)
    except ValueError as error:
        problems.append(str(error))
    for flag in ("output_dir", "cache_dir", "backup_dir"):
        folder = getattr(args, flag)
        if folder is not None and (problem := cannot_write(Path(folder))):
            problems.append(f"--{flag}: {problem}")
    return problems


def problems_of_all(args: argparse.Namespace) -> list[str]:
    """Problems that flags taken from a checkpoint may bring as well; one line each. ValueError for a device that is
    not there."""
    problems = missing_packages(args, resolve_device(args.device))
    if args.no_policy and args.refine_steps > 1:
        problems.append(f"--refine_steps {args.refine_steps}: there are no steps under --no_policy")
    if args.dev and args.submission is not None:
        problems.append("--submission predicts test inputs, which --dev keeps away from")
    return problems


def missing_packages(args: argparse.Namespace, device: torch.device) -> list[str]:
    """What the flags ask of packages that not everyone has, where it cannot be had; one line each."""
    lora = problem_with_peft() if args.qwen_tune == "lora" and 1 not in args.ablate else None
    trains = not args.eval_only and 1 not in args.ablate
    eight_bit = problem_with_eight_bit(device) if args.optim_qwen == "adamw8bit" and trains else None
    return [problem for problem in (lora, eight_bit) if problem]


# ====================================================================================================================
# The small classes that are the fixes' identity
# ====================================================================================================================


class GradientMonitor:
    """FIX 1: measures gradients after unscaling and before clipping, so that a module that does not train is seen."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def check_gradients(self, module: nn.Module, name: str) -> dict[str, float]:
        """{"norm": global gradient norm, "missing": trainable parameters without a gradient, "finite": 1.0 or 0.0}."""
        trainable = [p for p in module.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        self.last[name] = norm
        missing = float(len(trainable) - len(gradients))
        return {"norm": norm, "missing": missing, "finite": float(math.isfinite(norm))}


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


class DynamicMemoryThreshold:
    """FIX 5: what enters the memory must beat the running average by a tenth, however good the average is."""

    # 1.10 times an average above 0.909 would ask for more than a perfect solution. `offer` asks for accuracy >
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
    """What `--ablate 5` puts in its place: the old 0.95, whatever the model can do."""

    def get_threshold(self) -> float:
        return 0.95


def hard_cell_mask(predicted: Tensor, target: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """FIX 3: weight of each cell in the loss, so that wrong cells carry it.

    predicted, target (B, L): colours, negative where there is none. Weight 1 where the prediction is wrong (a target
    cell outside the predicted grid is wrong), `floor` where it is right: never zero by default, or right cells would
    drift. The loss divides by the sum of weights, so with floor 0 and 2 wrong cells of 9 each wrong cell weighs 1/2
    instead of 1/9: 4.5 times. Where no cell is wrong all weights are equal and the loss is the plain mean, with floor
    0 too. Returns (weights (B, L) float, mask_ratio (B,): share of target cells here that are wrong).
    """
    wanted = target >= 0
    wrong = (predicted != target) & wanted
    weights = torch.where(wrong, 1.0, floor) * wanted
    any_wrong = wrong.any(1, keepdim=True)
    weights = torch.where(any_wrong, weights, wanted.float())
    return weights, wrong.sum(1) / wanted.sum(1).clamp(min=1)


def goal_oriented_loss(efe_total: Tensor, reward_objective: Tensor) -> Tensor:
    """FIX 2: 0.7 * efe + 0.3 * (-reward). The only place where a reward is negated.

    reward_objective carries gradient: the expected reward under the agent's predictive distribution, or the
    score-function surrogate; the printed hard reward comes from argmax predictions and would be a constant to autograd.
    """
    return 0.7 * efe_total + 0.3 * (-reward_objective)


# ====================================================================================================================
# What a run consists of
# ====================================================================================================================


class RedFlag(RuntimeError):
    """A red flag under --strict: the run saves and stops with exit code 3."""


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived; args[0] is the signal's number."""


@dataclass
class TrainState:
    """Where the run is. Every field is in each checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch whose optimizer step is done
    step: int = 0  # batches of the whole run whose optimizer step is done
    updates: int = 0  # optimizer steps made
    skipped_steps: int = 0  # optimizer steps skipped for non-finite gradients
    queries: int = 0  # queries trained on
    trained: bool = False  # this epoch's batches are done, its summary and validation are not
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch, for its summary
    memory_updates: int = 0  # of this epoch
    memory_offers: int = 0
    accuracy_delta: float = math.nan  # of the last validation
    val_accuracy: float = math.nan


# Deliberately not saved, because they are functions of what is: the curriculum (of the epoch), the order and
# augmentation of episodes and the policy's noise (of seed, epoch and batch), learning rates (of the step), the
# evidence (of the data).


@dataclass
class Run:
    """Everything the loop works with."""

    args: argparse.Namespace
    log: RunLog
    device: torch.device
    precision: Precision
    data: DataSet
    training: tuple[Task, ...]
    splits: tuple[Split, ...]  # what is predicted and scored
    trained_on: dict[str, Any]  # what a checkpoint records of the data, to recognise them
    store: EvidenceStore
    qwen: QwenPrompt
    agent: GridAgent
    policy: PromptPolicy
    memory: MemoryBank
    optimizer: JointOptimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    threshold: DynamicMemoryThreshold
    curriculum: SizeWarmupCurriculum
    monitor: GradientMonitor
    weights: EfeWeights
    state: TrainState
    started: float
    persistence: ModelPersistence | None = None
    export_files: Mapping[str, str] = field(default_factory=dict)  # config and tokenizer of Qwen, for `export`
    stop_signal: int = 0
    flags_raised: set[str] = field(default_factory=set)
    validation_estimate: float = 0.0  # seconds
    seconds_per_cell: float = 0.0  # of training, measured; to know how long a validation will take
    pace: Pace = field(default_factory=Pace)
    unprepared: set[int] = field(default_factory=set)  # training tasks whose evidence this process has yet to wait for

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"agent": self.agent, "qwen": self.qwen, "policy": self.policy, "memory": self.memory}

    def ablated(self, fix: int) -> bool:
        return fix in self.args.ablate

    def autocast(self) -> torch.autocast:
        """FIX 7: matrix products in bf16 or fp16; losses and log-probabilities are computed in fp32 all the same."""
        on = self.precision.dtype is not None
        return torch.autocast(self.device.type, dtype=self.precision.dtype or torch.bfloat16, enabled=on)


def build_run(args: argparse.Namespace, log: RunLog, started: float, checkpoint: Checkpoint | None = None) -> Run:
    """Data, models, optimizer. ValueError with one line for what the user can mend; writes nothing into the run's
    folder. checkpoint: what will be restored; it says which data it was trained on, and which weights its adapter
    belongs to."""
    device = resolve_device(args.device)
    precision = resolve_precision("off" if 7 in args.ablate else args.amp, device)
    torch.set_num_threads(args.threads or DEFAULT_THREADS)  # an earlier run in this notebook may have changed it
    data = load_dataset(args.data)
    for note in data.notes:
        log(note)
    trained_on = checkpoint.state["extra"]["data"] if checkpoint else None
    if args.eval_only and trained_on and (args.submission or trained_on["data"] != data.fingerprint):
        training: tuple[Task, ...] = ()
        splits = splits_by_content(all_tasks(data), trained_on["inputs"])
    else:
        training, splits = split_tasks(args, data, log)
    seed_everything(args.seed)
    base = saved_base(checkpoint)
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
        revision=revision,
        gradient_checkpointing=args.gradient_checkpointing,
        cache_dir=Path(args.cache_dir),
        seed=args.seed,
        log=log,
    ).to(device)
    everything = [*training, *(task for split in splits for task in split.tasks)]
    largest = max(everything, key=lambda task: sum(pair.input.size for pair in task.train))
    qwen.encoder(context_pairs(largest))  # says here, not unseen in a worker, if contexts do not fit
    args.qwen = qwen.name  # not "auto": on another machine that may be another model
    if 1 in args.ablate:
        qwen.requires_grad_(False)
    if args.qwen_lr is None:
        # An adapter takes about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret").
        args.qwen_lr = 3e-4 if qwen.is_tiny else 2e-5 if qwen.adapter is None else 2e-4
    agent = GridAgent(
        NUM_TABLES,
        NUM_RULES,
        args.prompt_len,
        args.prompt_dim,
        width=args.agent_width,
        heads=args.agent_heads,
        blocks=args.agent_blocks,
        passes=args.agent_passes,
    ).to(device)
    policy = PromptPolicy(args.prompt_len, args.prompt_dim).to(device)
    memory = MemoryBank(args.memory_size, qwen.embedding_dim, args.prompt_len, args.prompt_dim).to(device)
    groups: dict[str, nn.Module] = {"agent": agent, "policy": nn.ModuleDict({"policy": policy, "memory": memory})}
    rates = {"agent": args.agent_lr, "policy": args.policy_lr}
    if 1 not in args.ablate:  # FIX 1: Qwen is a group of its own
        groups["qwen"], rates["qwen"] = qwen, args.qwen_lr
    eight_bit = {"qwen"} if args.optim_qwen == "adamw8bit" and not args.eval_only else set()
    optimizer = JointOptimizer(groups, rates, muon=args.optimizer == "muon", eight_bit=eight_bit)
    assert all(map(optimizer.covers, (agent, qwen, policy, memory))), "a trainable parameter is in no group"
    small = qwen.is_tiny or qwen.adapter is not None
    averaged = groups if small else {name: module for name, module in groups.items() if name != "qwen"}
    return Run(
        args=args,
        log=log,
        device=device,
        precision=precision,
        data=data,
        training=training,
        splits=tuple(split.first(args.val_limit) for split in splits),
        trained_on={
            "data": data.fingerprint,
            "training": training_fingerprint(training),
            "inputs": input_digests(training),
        },
        store=NoEvidence() if args.no_evidence else EvidenceStore(Path(args.cache_dir) / "evidence"),
        qwen=qwen,
        agent=agent,
        policy=policy,
        memory=memory,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.scale_loss),
        average=WeightAverage(averaged, args.ema) if args.ema > 0 else None,
        threshold=FixedMemoryThreshold() if 5 in args.ablate else DynamicMemoryThreshold(),
        curriculum=SizeWarmupCurriculum(args.warmup_epochs),
        monitor=GradientMonitor(),
        weights=EfeWeights(**{w.name: getattr(args, f"w_{w.name}") for w in dataclasses.fields(EfeWeights)}),
        state=TrainState(),
        started=started,
        export_files=qwen.export_files(),
    )


def split_tasks(
    args: argparse.Namespace, data: DataSet, log: Callable[[str], None]
) -> tuple[tuple[Task, ...], tuple[Split, ...]]:
    """What is trained on, and the splits of --val_splits.

    A training task that is also an evaluation task, by content, is not trained on: the unseen split holds it back,
    and the adapted one trains on the evaluation set's copy, whose test pairs are scored.
    """
    if not data.training and not args.adapt:
        raise ValueError(
            f"--data {args.data}: no training tasks in it, only {len(data.evaluation)} evaluation tasks; --adapt "
            "trains on their demonstration pairs, --eval_only predicts them"
        )
    if args.dev:
        development = carve(data.training, whole=args.dev_tasks, seed=args.seed)
        log(str(development))
        unseen, seen = development.unseen, development.seen
        splits = {
            "dev_unseen": Split("dev_unseen", unseen, (NEW,) * len(unseen)),
            "dev_seen": Split("dev_seen", seen, tuple(range(len(seen)))),
        }
        return development.training, tuple(splits[each] for each in args.val_splits if splits[each].tasks)
    name = "adapted" if args.adapt else "unseen"
    kept: tuple[Task, ...] = data.training
    evaluation: tuple[Task, ...] = ()
    if name in args.val_splits or args.adapt:
        evaluation = load_dataset(args.unseen).evaluation if data.training else data.evaluation
        if not evaluation:
            raise ValueError(f"--unseen {args.unseen}: there are no evaluation tasks in it")
        kept, dropped = drop_duplicates(data.training, evaluation)
        if dropped:
            log(
                f"{name.capitalize()} split: {len(dropped)} of {len(data.training)} training tasks are also among the "
                f"{len(evaluation)} evaluation tasks and are {'trained on once' if args.adapt else 'not trained on'}"
            )
    added, numbers = adapted_tasks(evaluation, len(kept)) if args.adapt else ((), (NEW,) * len(evaluation))
    if not kept and not added:
        raise ValueError(
            f"--unseen {args.unseen}: every training task is also an evaluation task; nothing is left to train"
        )
    splits = {"seed": Split("seed", kept, tuple(range(len(kept)))), name: Split(name, evaluation, numbers)}
    chosen = tuple(splits[each] for each in args.val_splits if splits[each].tasks)
    if not chosen:
        raise ValueError(f"--val_splits {','.join(args.val_splits)}: there is no such task in --data {args.data}")
    return kept + added, chosen


def all_tasks(data: DataSet) -> list[Task]:
    """Every task of the data, whatever part it is in, by id."""
    return sorted(data.training + data.evaluation, key=lambda task: task.id)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and python, and ask for deterministic kernels on CPU (on CUDA they cost speed: not asked
    for)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of every generator, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`; GPU generators are restored when there are as many GPUs as before."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(list(state["cuda"]))
    saved = state["numpy"]
    keys = saved["keys"].numpy().astype(np.uint32)
    np.random.set_state((saved["kind"], keys, saved["position"], saved["has_gauss"], saved["cached"]))
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))


# ====================================================================================================================
# Checkpoints
# ====================================================================================================================


def checkpoint_tree(run: Run) -> dict[str, Any]:
    """Everything that a resumed run needs, in the three groups that `ModelPersistence.save` takes."""
    return {
        "model": {name: part.state_dict() for name, part in saved_parts(run).items()},
        "optim": {
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "average": run.average.state_dict() if run.average else None,
        },
        "extra": {
            "format": CHECKPOINT_FORMAT,
            "state": dataclasses.asdict(run.state),
            "threshold": run.threshold.state_dict(),
            "rng": rng_state(),
            "flags": saved_flags(run.args),
            "data": run.trained_on,
            "rows": run.log.rows,
            "export": {"qwen": run.export_files},
            "lora": {"qwen": run.qwen.adapter.recipe(run.qwen.base)} if run.qwen.adapter else {},
        },
    }


def saved_parts(run: Run) -> dict[str, nn.Module | Adapter]:
    """The modules by the name they have in a checkpoint. Qwen's backbone stands alone, so that `model_persistence.py
    export` can write it in the form that AutoModel reads. Where it does not train it is among `frozen_parts`; with an
    adapter only that is saved and the backbone is named (see arc/lora.py)."""
    head = nn.ParameterDict({"query": run.qwen.query})
    parts: dict[str, nn.Module | Adapter] = {"agent": run.agent, "policy": run.policy, "memory": run.memory}
    parts |= {"qwen_query": head, "qwen_project": run.qwen.project}
    return parts if backbone_is_frozen(run) else parts | {"qwen": run.qwen.adapter or run.qwen.backbone}


def frozen_parts(run: Run) -> dict[str, Tensor] | None:
    """What does not train, stored once a run."""
    if not backbone_is_frozen(run):
        return None
    return {f"qwen/{name}": tensor for name, tensor in run.qwen.backbone.state_dict().items()}


def backbone_is_frozen(run: Run) -> bool:
    return not any(parameter.requires_grad for parameter in run.qwen.backbone.parameters())


def saved_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as plain values; those that only say where flags come from and go to are none of a run's."""
    values = {name: value for name, value in sorted(vars(args).items()) if name not in ("config", "print_config")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def save_checkpoint(run: Run, *, wait: bool = False) -> None:
    """Save now. metrics decide the best models: accuracy delta and validation accuracy of the last validation."""
    assert run.persistence is not None
    metrics = {"accuracy_delta": run.state.accuracy_delta, "val_accuracy": run.state.val_accuracy}
    run.persistence.save(
        checkpoint_tree(run), step=run.state.step, metrics=metrics, wait=wait, frozen=frozen_parts(run)
    )


def load_checkpoint(persistence: ModelPersistence, which: str) -> Checkpoint:
    """latest, best or a path, verified. ValueError for one that this version of the program did not write."""
    checkpoint = persistence.load(which)
    found = checkpoint.state.get("extra", {}).get("format", 1)
    if found != CHECKPOINT_FORMAT:
        raise ValueError(
            f"--resume: {checkpoint.path.name} was written by another version of this program (checkpoint format "
            f"{found}, here {CHECKPOINT_FORMAT}); continue it with that version, or start a new run"
        )
    return checkpoint


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a built run. Order: weights, optimizer and scaler, state, random generators last."""
    tree, extra = checkpoint.state, checkpoint.state["extra"]
    same = all(extra["data"][key] == run.trained_on[key] for key in ("data", "training"))
    if not same and run.training:  # with nothing to train, the checkpoint's model may predict anything
        raise ValueError("--resume: the checkpoint was made with other data; give the same --data")
    if (saved := saved_base(checkpoint)) and run.qwen.base and (problem := run.qwen.base.differs_from(saved)):
        raise ValueError(f"--resume: {problem}")
    for name, part in saved_parts(run).items():
        try:
            part.load_state_dict(tree["model"][name])
        except (KeyError, RuntimeError) as error:  # other shapes: --eval_only with another --qwen
            raise ValueError(f"--resume: the checkpoint's {name} does not fit the model that is built here") from error
    if checkpoint.frozen:
        run.qwen.backbone.load_state_dict({name.partition("/")[2]: t for name, t in checkpoint.frozen.items()})
    if not run.args.eval_only:  # nothing is trained; the moments may be of a package that is not here
        run.optimizer.load_state_dict(tree["optim"]["optimizer"])
    if tree["optim"]["scaler"]:  # empty where the loss was not scaled: then a scaler here starts afresh
        run.scaler.load_state_dict(dict(tree["optim"]["scaler"]))
    if run.average is not None:
        run.average.load_state_dict(tree["optim"]["average"])
    run.threshold.load_state_dict(extra["threshold"])
    run.state = TrainState(**extra["state"])
    restore_rng(extra["rng"])


def saved_base(checkpoint: Checkpoint | None) -> Base | None:
    """The weights that the checkpoint's adapter belongs to, if it has one."""
    recipe = checkpoint.state["extra"].get("lora", {}).get("qwen") if checkpoint else None
    return Base(**recipe["base"]) if recipe else None


def adopt_flags(args: argparse.Namespace, given: set[str], checkpoint: Checkpoint) -> None:
    """On resume: flags not given take the checkpoint's values; one given that changes the maths is refused by name."""
    changed = []
    own = OF_THE_COMMAND | {"val_limit"} if args.eval_only else OF_THE_COMMAND
    harmless = HARMLESS_TO_EVALUATE if args.eval_only else HARMLESS
    if saved_base(checkpoint):  # the base of an adapter is compared by content: its folder may have moved
        harmless = harmless | {"qwen"}
    for name, value in checkpoint.state["extra"]["flags"].items():
        if name not in vars(args) or name in own:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if name not in given or (name, args.qwen) == ("qwen", "auto"):
            setattr(args, name, value)
        elif name not in harmless and getattr(args, name) != value:
            changed.append(f"--{name} {getattr(args, name)} (the checkpoint has {value})")
    if changed:
        raise ValueError(f"--resume: cannot change {', '.join(changed)}")


# ====================================================================================================================
# Pieces of a training step
# ====================================================================================================================


def read_prompt(run: Run, batch: TrainBatch | PredictionBatch) -> tuple[Tensor, Tensor]:
    """Qwen reads each context once: prompt (G, K, D) with what the memory adds, and the context's embedding (G, E)."""
    prompt, embedding = run.qwen(batch.context_ids, batch.context_lengths)
    if run.args.no_memory:
        return prompt.float(), embedding
    return prompt.float() + run.memory.read(embedding, batch.task), embedding


def context_feedback(agent: GridAgent, context: Sequence[QueryBatch], prompt: Tensor) -> Feedback:
    """How the agent does on the context pairs under prompt (G, K, D), and which way the prompt should move.

    The gradient is that of the mean cross-entropy over a task's context pairs. Nothing is back-propagated through the
    feedback.
    """
    pairs, loss, accuracy, exact = torch.zeros(4, len(prompt), device=prompt.device)
    gradient = torch.zeros_like(prompt, dtype=torch.float32)
    for query in context:
        pairs.index_add_(0, query.owner, torch.ones_like(query.owner, dtype=torch.float32))
    for query in context:  # batches of similar size, each with a graph of its own
        with torch.enable_grad():
            leaf = prompt.detach().float().requires_grad_()
            output = agent(query, leaf)
            losses = pair_loss(output, query) / pairs[query.owner]
            gradient += torch.autograd.grad(losses.sum(), leaf)[0]
        with torch.no_grad():
            grid = output.predicted_grid(query)
            loss.index_add_(0, query.owner, losses.detach())
            accuracy.index_add_(0, query.owner, cell_accuracy(grid, query.target_grid) / pairs[query.owner])
            exact.index_add_(0, query.owner, exact_match(grid, query.target_grid) / pairs[query.owner])
    return Feedback(gradient, loss, accuracy, exact, pairs)


def pair_loss(output: AgentOutput, query: QueryBatch) -> Tensor:
    """(B,) mean cross-entropy of the target's cells, in nats."""
    wanted = query.target >= 0
    cells = nn.functional.cross_entropy(
        output.colour_logits[-1].transpose(1, 2), query.target.clamp(min=0), reduction="none"
    )
    return (cells * wanted).sum(1) / wanted.sum(1).clamp(min=1)


@torch.no_grad()
def held_out_loss(agent: GridAgent, prompt: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
    """(P,) `pair_loss` under prompt (P, K, D) of the demonstrations held out, one for each prompt."""
    total = torch.zeros(len(prompt), device=prompt.device)
    for query in pairs:
        total.index_add_(0, query.owner, pair_loss(agent(query, prompt), query))
    return total


def reverse_queries(grids: Tensor, query: QueryBatch, rows: Tensor) -> QueryBatch:
    """Queries asking for the input of `grids` (n, 30, 30), which stand for the outputs of `query`'s rows (n,)."""
    inputs, outputs = query.input_grid[rows].cpu().numpy(), grids.cpu().numpy()
    dihedral, colours, owner = query.dihedral.tolist(), query.colours.tolist(), query.owner.tolist()
    queries = []
    for number, row in enumerate(rows.tolist()):
        known = unpad_grid(inputs[number])
        view = Augmentation(dihedral[row], tuple(colours[row]))
        queries.append(Query(unpad_grid(outputs[number]), known, known.shape, None, view, owner[row]))
    return collate_queries(queries).to(grids.device)


@torch.no_grad()
def predictions(
    run: Run, query: QueryBatch, before: AgentOutput, after: AgentOutput, prompt: Tensor, refined: Tensor
) -> tuple[Prediction, Prediction]:
    """The hard predictions of both passes with the input predicted back from each.

    Where both passes predict the same grid, the way back is not computed: what it would give is taken to be the same,
    so d_rev is exactly 0 there.
    """
    grids = [output.predicted_grid(query) for output in (before, after)]
    reversed_grids = [torch.full_like(grids[0], -1) for _ in grids]
    changed = torch.nonzero((grids[0] != grids[1]).flatten(1).any(1)).flatten()
    if len(changed):
        for grid, back, under in zip(grids, reversed_grids, (prompt, refined), strict=True):
            asked = reverse_queries(grid[changed], query, changed)
            back[changed] = run.agent(asked, under, reverse=True).predicted_grid(asked, size=asked.out_size)
    return Prediction(grids[0], reversed_grids[0]), Prediction(grids[1], reversed_grids[1])


def soft_prediction(output: AgentOutput, query: QueryBatch) -> SoftPrediction:
    """What the expected reward needs of an agent's output."""
    return SoftPrediction(
        colour=output.colour_log_probs(),
        size=output.size_log_probs(),
        inside=output.inside_prediction(query),
        target=query.target,
        target_size=query.target_size,
        area=output.predicted_size(query).prod(1),
    )


def cell_weights(run: Run, output: AgentOutput, query: QueryBatch) -> Tensor:
    """(B, L) weight of each cell in the risk: hard cells first (FIX 3), or the plain mean under --ablate 3."""
    if run.ablated(3):
        return (query.target >= 0).float()
    return hard_cell_mask(predicted_colours(output, query), query.target, run.args.hard_floor)[0]


def grid_weights(run: Run, output: AgentOutput, query: QueryBatch, vote_right: Tensor) -> Tensor:
    """(B,) weight of each grid in the risk: share of right cells to the power of --grid_focus, times 1 + --keep_solved
    where the evidence's vote solves it; vote_right (B,) bool.

    Scoring asks for every cell of a grid. A cell that is wrong in a nearly right grid is one step from a solved task;
    one in a hopeless grid only drags the trust in tables along that other tasks rely on. And what the vote solves can
    only be broken: without a weight of their own such grids, whose loss is small, lose a cell here and there while the
    cells of all grids together improve (measured in benchmarks/RESULTS.md).
    """
    _, wrong = hard_cell_mask(predicted_colours(output, query), query.target, 1.0)
    if run.ablated(3):
        return torch.ones_like(wrong)
    return (1 - wrong) ** run.args.grid_focus * (1 + run.args.keep_solved * vote_right)


def predicted_colours(output: AgentOutput, query: QueryBatch) -> Tensor:
    """(B, L) int64: the predicted colour of each token, -1 outside the predicted grid."""
    return output.colour_logits[-1].argmax(-1).masked_fill(~output.inside_prediction(query), -1)


def efe_terms(
    run: Run,
    batch: TrainBatch,
    passes: Sequence[tuple[QueryBatch, AgentOutput, Tensor]],
    prompts: Sequence[Tensor],
    size_weight: float,
) -> dict[str, Tensor]:
    """The expected free energy's terms and total, averaged over the passes (before, after): the agent is trained on
    both, otherwise "before" would be an untrained straw man and the reward would prove nothing. Each pass: queries,
    output, and (B,) whether the vote solves them."""
    terms = {
        "risk": [
            free_energy.risk(o.colour_logits, q.target, cell_weights(run, o, q), grid_weights(run, o, q, right))
            for q, o, right in passes
        ],
        "ambiguity": [free_energy.ambiguity(o.colour_logits[-1], q.target) for q, o, _ in passes],
        "size": [free_energy.size_loss(o.size_logits, q.target_size) for q, o, _ in passes],
    }
    # The way back is trained on each episode's first view only: it costs a pass of its own.
    asked = reverse_queries(batch.query.target_grid[batch.first_view], batch.query, batch.first_view)
    back = run.agent(asked, prompts[-1], reverse=True)
    reversibility = free_energy.risk(back.colour_logits, asked.target, (asked.target >= 0).float())
    both = torch.cat([prompt.float() for prompt in prompts])
    consistency = free_energy.prompt_consistency(both, batch.task.repeat(len(prompts)), reversed_sign=run.ablated(6))
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    return free_energy.combine(
        {**means, "reversibility": reversibility, "prompt": consistency}, run.weights, size_weight
    )


def policy_noise(run: Run, samples: int, groups: int, batch_number: int) -> Tensor:
    """(samples, G, A) standard normal noise: a pure function of (seed, epoch, batch), so a resumed run draws the
    same."""
    key = np.random.SeedSequence([run.args.seed, run.state.epoch, batch_number, 0xAC7]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(key))
    return torch.randn(samples, groups, run.policy.log_std.numel(), generator=generator).to(run.device)


def sampled_objective(
    run: Run, query: QueryBatch, prompt: Tensor, feedback: Feedback, before: Prediction, noise: Tensor
) -> Tensor:
    """`--policy_objective rloo`: hard rewards of sampled actions, leave-one-out advantages, score function."""
    rewards, log_probs = [], []
    for sample in noise:
        action = run.policy.refine_prompt(prompt.detach(), feedback, noise=sample, observe=False)
        with torch.no_grad():
            grid = run.agent(query, action.prompt).predicted_grid(query)
            # The way back is left out of the sampled rewards (two more passes a sample); the printed reward has it.
            reward, _ = compute_reward(before, Prediction(grid, before.reverse), query.target_grid, query.input_grid)
        rewards.append(mean_per_owner(reward, query.owner, len(prompt)))
        log_probs.append(action.log_prob)
    return score_function_objective(torch.stack(rewards), torch.stack(log_probs))


def mean_per_owner(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    """(B,) values of queries -> (G,) means of each episode's."""
    total = torch.zeros(groups, device=values.device).index_add(0, owner, values.float())
    return total / torch.bincount(owner, minlength=groups).clamp(min=1)


# ====================================================================================================================
# Validation
# ====================================================================================================================


def make_loader(run: Run, data: torch.utils.data.Dataset, sampler: Any) -> DataLoader:
    """Batches arrive ready-made; evidence is computed in the workers the first time a task is met, then cached."""
    workers = worker_count(run)
    return DataLoader(
        data,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it draws from the global one, and a resumed run differs by that draw
    )


def evidence_bar(run: Run) -> Any:
    """A bar for the training tasks whose evidence is still to be prepared, which the workers do as tasks come up; none
    where all is there."""
    run.unprepared = {index for index, task in enumerate(run.training) if not run.store.is_prepared(task)}
    nothing = run.args.quiet or not run.unprepared
    return run.log.bar(total=len(run.unprepared), desc="evidence prepared", unit="task", disable=nothing)


def count_prepared(run: Run, batch: TrainBatch) -> int:
    """How many of the batch's tasks had to be prepared for it."""
    met = run.unprepared & set(batch.task.tolist())
    run.unprepared -= met
    return len(met)


def worker_count(run: Run) -> int:
    """--workers, by default one less than there are cores, between 1 and 4."""
    return run.args.workers if run.args.workers >= 0 else min(4, max(1, (os.cpu_count() or 1) - 1))


def start_worker(_: int) -> None:
    """Ctrl-C is for the main process, which saves first; a worker is ended by it afterwards."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):  # not on Windows; a terminal that closes sends it to every process, as Ctrl-C does
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def predict_split(run: Run, split: Split) -> list[PairPrediction]:
    """Predict every test pair of the split's tasks."""
    tasks, numbers = split.tasks, torch.tensor(split.numbers)
    views = evaluation_views(run.args.val_views)
    data = PredictionData(
        tasks,
        run.store,
        run.qwen.encoder,
        views=views,
        feedback_pairs=run.args.feedback_pairs,
        folds=run.args.refine_steps > 1,
    )
    order = prediction_order(tasks, views=len(views), max_cells=4 * run.args.max_cells)
    loader = make_loader(run, data, order)
    bar = run.log.bar(loader, total=len(order), desc=f"predicting {split.name}", unit="batch")
    return predict_tasks(tasks, bar, functools.partial(predict_batch, run, numbers), run.store)


@torch.no_grad()
def predict_batch(run: Run, numbers: Tensor, fetched: PredictionBatch) -> BatchPrediction:
    """The agent's output under the unrefined and the refined prompt; the policy takes the mean of its action.

    numbers: of all tasks being predicted, the number that the memory knows each by (`Split.numbers`)."""
    if run.stop_signal:
        raise Interrupted(run.stop_signal)
    batch = dataclasses.replace(fetched, task=numbers[fetched.task]).to(run.device)
    with run.autocast():
        prompt, _ = read_prompt(run, batch)
        trusted = beats_evidence(run.agent, prompt, batch.trial)
        if run.args.no_policy:
            outputs = [run.agent(query, prompt) for query in batch.query]
            passes = [(query, output, output) for query, output in zip(batch.query, outputs, strict=True)]
        else:
            refined = refine_for_test(run, batch, prompt)
            passes = [(query, run.agent(query, prompt), run.agent(query, refined)) for query in batch.query]
    return BatchPrediction(passes, trusted.tolist())


def beats_evidence(agent: GridAgent, prompt: Tensor, trial: Sequence[QueryBatch]) -> Tensor:
    """(G,) bool: whether the agent under prompt (G, K, D) does better than the evidence's vote on the demonstrations,
    each with the evidence of the others: more of them exact; or, where the vote has none exact, more cells right. (They
    say little of a task that the vote can solve: training mends cells and breaks grids that were right.) Never for a
    task with one demonstration, where there are no others.

    The prompt has read all demonstrations, and on tasks that were trained on the agent has met them, so the comparison
    leans to the agent; that it gains all the same was measured on the development split. It is the unrefined prompt:
    the refined one was fitted to some of these outputs."""
    totals = torch.zeros(len(prompt), 4, device=prompt.device)
    for query in trial:
        answer, vote, target = agent(query, prompt).predicted_grid(query), voted_grid(query), query.target_grid
        exact = exact_match(answer, target).float(), exact_match(vote, target).float()
        cells = cell_accuracy(answer, target) - cell_accuracy(vote, target)
        totals.index_add_(0, query.owner, torch.stack((*exact, cells, torch.ones_like(cells)), 1))
    ours, theirs, cells, count = totals.unbind(1)
    better = (ours > theirs) | ((theirs == 0) & (cells > 1e-6))  # sums of floats: equal up to rounding is no gain
    return better & (count > 1)


def refine_for_test(run: Run, batch: PredictionBatch, prompt: Tensor) -> Tensor:
    """The policy's action taken once on prompt (G, K, D), or with --refine_steps as often as held-out demonstrations
    find best, each time with feedback under the prompt that it starts from."""

    def act(start: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
        return run.policy.refine_prompt(start, context_feedback(run.agent, pairs, start)).prompt

    if batch.folds is None:
        return act(prompt, batch.feedback)
    judge = functools.partial(held_out_loss, run.agent)
    return cross_fitted(prompt, batch.feedback, batch.folds, act, judge, run.args.refine_steps).prompt


def validate(run: Run) -> dict[str, SplitReport]:
    """Predict and score every chosen split."""
    return score_splits(run, predict_splits(run, run.splits))


def predict_splits(run: Run, splits: Sequence[Split], *, show: bool = True) -> dict[str, list[PairPrediction]]:
    """Predict the splits under the averaged weights; write the attempts as JSON into the run's folder, and, if they are
    to `show`, what the report draws."""
    assert run.log.folder is not None
    was_training = run.agent.training
    for module in run.modules.values():
        module.eval()
    predicted = {}
    with run.average.applied() if run.average else contextlib.nullcontext():
        for split in splits:
            pairs = predicted[split.name] = predict_split(run, split)
            keep_attempts(run, split, pairs)
            if show:
                keep_predictions(run.log.folder, split.name, pairs, step=run.state.step, log=run.log)
            if run.log.events is not None and split.name in run.args.val_splits:
                run.log.events.pictures(split.name, run.state.step, pairs)
    for module in run.modules.values():
        module.train(was_training)
    return predicted


def keep_attempts(run: Run, split: Split, pairs: Sequence[PairPrediction]) -> None:
    """Write a split's attempts into the run's folder; say so and go on where that is not possible."""
    assert run.log.folder is not None
    try:
        write_submission(run.log.folder / f"predictions-{split.name}.json", all_attempts(pairs), split.tasks)
    except (ValueError, OSError) as problem:
        run.log(f"Predictions of the {split.name} split are not written: {problem}")


def score_splits(run: Run, predicted: Mapping[str, Sequence[PairPrediction]]) -> dict[str, SplitReport]:
    """Score the splits that have solutions; say so where none are given."""
    reports = {}
    for name, pairs in predicted.items():
        report = score_predictions(name, pairs)
        if report.score.pairs:
            reports[name] = report
        else:
            run.log(f"{LABELS[name]}: no solutions are given; the attempts are in predictions-{name}.json")
    return reports


def submit(run: Run, predicted: Mapping[str, Sequence[PairPrediction]]) -> int:
    """--submission: write the file, read back and checked, and log what is in it. Returns the exit code."""
    path, pairs = run.args.submission, [pair for part in predicted.values() for pair in part]
    try:
        write_submission(path, all_attempts(pairs), all_tasks(run.data))
    except ValueError as problem:  # a full disk, a folder that is gone: it was writable when the command started
        run.log(f"error: --submission: {problem}", error=True)
        return 1
    score = score_predictions("submission", pairs).score
    scored = f"{score.pass2_pairs} of {score.pairs} with a given solution right, {score.whole_tasks} tasks whole"
    run.log(
        f"Submission: {path}, {len(run.data.training + run.data.evaluation)} tasks, {len(pairs)} test inputs, two "
        f"attempts each; {scored if score.pairs else 'no solutions are given, so nothing is scored'}"
    )
    return 0


def log_validation(run: Run, epoch: int, reports: Mapping[str, SplitReport]) -> None:
    """The seed's two lines for the first split, then one line of detail for each."""
    if not reports:
        run.log.metrics({"step": run.state.step, "epoch": epoch, **memory_row(run)})
        return
    headline = next(iter(reports.values()))
    score = headline.score
    run.state.val_accuracy = score.pass1_pairs / max(1, score.pairs)
    run.state.accuracy_delta = headline.delta
    run.log(f"[Epoch {epoch}] Val Accuracy: {run.state.val_accuracy:.4f} ({score.pass1_pairs}/{score.pairs})")
    run.log(f"[Epoch {epoch}] Accuracy Delta: {headline.delta:+.4f}")
    row: dict[str, Any] = {"step": run.state.step, "epoch": epoch}
    if headline.score.name in run.args.val_splits:
        row["val.split"] = headline.score.name
    for name, report in reports.items():
        free, answer, n = report.training_free, report.score, max(1, report.score.pairs)
        run.log(
            f"[Epoch {epoch}] {LABELS[name]}: pass@1 {answer.pass1_pairs / n:.4f} pass@2 {answer.pass2_pairs / n:.4f} "
            f"({answer.pass2_pairs}/{answer.pairs}), official pass@2 {answer.pass2:.4f}, "
            f"sizes right {answer.size_acc:.4f}, cells right {answer.cell_acc:.4f}"
        )
        run.log(
            f"[Epoch {epoch}]   training-free vote {free.pass1_pairs / n:.4f} + learned "
            f"{(answer.pass1_pairs - free.pass1_pairs) / n:+.4f} = {answer.pass1_pairs / n:.4f}, with two attempts "
            f"{free.pass2_pairs / n:.4f} + {(answer.pass2_pairs - free.pass2_pairs) / n:+.4f} (the agent's views "
            f"alone: {report.agent.pass1_pairs / n:.4f})"
        )
        run.log(
            f"[Epoch {epoch}]   before refinement {report.before.pass1_pairs / n:.4f}, cell accuracy delta "
            f"{report.delta:+.4f} +- {report.delta_error:.4f}"
        )
        prefix = "val" if report is headline and name in run.args.val_splits else f"val.{name}"
        row |= {
            f"{prefix}.pass1": answer.pass1_pairs / n,
            f"{prefix}.pass2": answer.pass2_pairs / n,
            f"{prefix}.before_pass1": report.before.pass1_pairs / n,
            f"{prefix}.vote_pass1": free.pass1_pairs / n,
            f"{prefix}.vote_pass2": free.pass2_pairs / n,
            f"{prefix}.agent_pass1": report.agent.pass1_pairs / n,
            f"{prefix}.agent_cells": report.agent.cell_acc,
            f"{prefix}.agent_sizes": report.agent.size_acc,
            f"{prefix}.cell_acc": answer.cell_acc,
            f"{prefix}.size_acc": answer.size_acc,
            f"{prefix}.pairs": answer.pairs,
            f"{prefix}.accuracy_delta": report.delta,
            f"{prefix}.accuracy_delta_error": report.delta_error,
        }
    run.log.metrics({**row, "accuracy_delta": headline.delta, **memory_row(run)})


def memory_row(run: Run) -> dict[str, Any]:
    return {
        "memory.size": len(run.memory),
        "memory.updates": run.state.memory_updates,
        "memory.offers": run.state.memory_offers,
        "memory.threshold": run.threshold.get_threshold(),
    }


# ====================================================================================================================
# The training loop
# ====================================================================================================================


def training_data(run: Run) -> EpisodeData:
    """What the loader builds training batches with."""
    args = run.args
    return EpisodeData(
        run.training,
        run.store,
        run.qwen.encoder,
        seed=args.seed,
        views=args.views,
        augment=args.augment,
        feedback_pairs=args.feedback_pairs,
        refined_views=args.refined_views,
    )


def train(run: Run) -> None:
    """Epochs from where the state stands to the end, each with its summary, validation and checkpoint."""
    args, state = run.args, run.state
    sampler = EpochSampler([], 0)
    loader = make_loader(run, training_data(run), sampler)
    if state.epoch >= args.epochs:
        run.log(f"Nothing to train: all {args.epochs} epochs are done; a larger --epochs goes on")
    while state.epoch < args.epochs:
        started = time.monotonic()
        batches = epoch_batches(
            run.training,
            seed=args.seed,
            epoch=state.epoch,
            batch_size=args.batch_size,
            views=args.views,
            max_cells=args.max_cells,
        )[: args.max_batches or None]
        if not state.trained:
            run.log(f"[Epoch {state.epoch}] Size Warmup Weight: {size_weight(run):.3f} (FIX #4)")
            run.log(f"[Epoch {state.epoch}] Memory Threshold: {run.threshold.get_threshold():.4f} (FIX #5)")
            sampler.batches, sampler.epoch, sampler.start = batches, state.epoch, state.batch
            in_time = train_epoch(run, loader, len(batches))
            state.trained = in_time
            log_summary(run)
        else:
            in_time = True
        spent = not in_time
        if spent or state.epoch + 1 == args.epochs or (args.val_every and (state.epoch + 1) % args.val_every == 0):
            if in_time:
                save_checkpoint(run)  # a validation may take minutes; what was trained is safe by then
            log_validation(run, state.epoch, validate(run))
            spent = spent or out_of_time(run)  # it was the last validation that there was time for
        else:
            run.log.metrics({"step": state.step, "epoch": state.epoch, **memory_row(run)})
        run.log(f"[Epoch {state.epoch}] Time: {time.monotonic() - started:.2f}s")
        if in_time:
            run.threshold.update(state.sums.get("solved", 0.0) / max(1.0, state.sums.get("batches", 0.0)))
            state.epoch, state.batch, state.trained, state.sums = state.epoch + 1, 0, False, {}
            state.memory_updates = state.memory_offers = 0
        save_checkpoint(run)
        if spent:
            break


def window_size(grad_accum: int, first: int, count: int) -> int:
    """Batches whose gradients one optimizer step sums up, from batch `first` of an epoch of `count` on: fewer at its
    end."""
    return min(grad_accum, count - first)


def size_weight(run: Run) -> float:
    """FIX 4: the curriculum's weight of this epoch; --ablate 4 takes its final value from the start."""
    return run.curriculum.FINAL if run.ablated(4) else run.curriculum.get_size_loss_weight(run.state.epoch)


def train_epoch(run: Run, loader: DataLoader, count: int) -> bool:
    """The rest of this epoch's `count` batches. Returns False if the time budget ended it early."""
    args, state, agent, qwen, policy_rl = run.args, run.state, run.agent, run.qwen, run.policy
    weight = size_weight(run)
    last_saved, done, accumulated, began = state.step, state.batch, 0, 0.0
    pending: list[dict[str, Any]] = []
    bar = run.log.bar(total=count, initial=done, desc=f"epoch {state.epoch}", unit="batch")
    preparing = evidence_bar(run)
    with bar, preparing:
        for fetched in loader:  # starts at state.batch: a resumed run enters in mid-epoch
            if not accumulated:
                began = time.monotonic()
            batch: TrainBatch = fetched.to(run.device)
            preparing.update(count_prepared(run, batch))
            noise = policy_noise(run, args.policy_samples, len(batch.task), done)
            step = state.updates + state.skipped_steps
            rates = run.optimizer.set_rates(learning_rate_factor(step, progress(run, count)))
            with run.autocast():  # FIX 7
                prompt, embedding = read_prompt(run, batch)  # FIX 1: gradient flows into Qwen, no cache, no no_grad
                first = agent(batch.query, prompt)
                query, before = batch.query.rows(batch.refined), first.rows(batch.refined)
                if args.no_policy:
                    refined, after = prompt, before
                else:
                    feedback = context_feedback(agent, batch.feedback, prompt)
                    refined = policy_rl.refine_prompt(prompt, feedback, noise=noise[0]).prompt
                    after = agent(query, refined)
                vote_right = exact_match(voted_grid(batch.query), batch.query.target_grid)
                voted = vote_right[batch.refined]
                passes = [(batch.query, first, vote_right), (query, after, voted)]
                efe = efe_terms(run, batch, passes, (prompt, refined), weight)  # FIX 3 and 4 in there
                pred_before, pred_after = predictions(run, query, before, after, prompt, refined)
            # FIX 6: every delta is after - before
            reward, breakdown = compute_reward(pred_before, pred_after, query.target_grid, query.input_grid)
            if args.no_policy or run.ablated(2):
                reward_objective = torch.zeros((), device=run.device)
            elif args.policy_objective == "rloo":
                with run.autocast():
                    reward_objective = sampled_objective(run, query, prompt, feedback, pred_before, noise)
            else:
                soft = soft_prediction(before, query), soft_prediction(after, query)
                reward_objective = expected_reward(*soft, query.target_grid).mean()
            loss = efe["total"] if run.ablated(2) else goal_oriented_loss(efe["total"], reward_objective)  # FIX 2

            window = window_size(args.grad_accum, state.batch, count)
            run.scaler.scale(loss / window).backward()  # FIX 7
            solved = mean_per_owner(exact_match(pred_after.grid, query.target_grid), query.owner, len(batch.task))
            offers = 0 if args.no_memory else len(batch.task)
            stored = remember(run, batch, embedding, refined, solved) if offers else 0  # FIX 5
            wrong = 1 - cells_right(pred_after.grid, query.target_grid)
            done, accumulated = done + 1, accumulated + 1
            row = {
                "batch": done,
                "loss": float(loss.detach()),
                **{f"efe.{name}": float(value.detach()) for name, value in efe.items()},
                "reward": float(reward.mean()),
                **{name: float(value.mean()) for name, value in breakdown.items()},
                "reward_objective": float(reward_objective.detach()),
                "mask_ratio": float(wrong.mean()),
                "solved": float(solved.mean()),
                "vote_solved": float(mean_per_owner(voted, query.owner, len(batch.task)).mean()),
                "stored": stored,
                "offers": offers,
                "queries": len(batch.query),
                "prompt_spread": prompt_spread(prompt.detach(), batch.context_ids),
                **padding(batch),
                **{f"lr.{name}": rate for name, rate in rates.items()},
            }
            pending.append(row)

            if accumulated == window:
                run.optimizer.unscale_(run.scaler)  # FIX 7: gradients in their own units again ...
                monitored = run.monitor.check_gradients(qwen, "Qwen")  # FIX 1: ... measured before clipping ...
                norms = run.optimizer.clip(0.0 if run.ablated(7) else args.grad_clip)  # FIX 7: ... every group clipped
                finite = run.ablated(7) or all(map(math.isfinite, norms.values()))
                state.updates += run.optimizer.step(run.scaler, finite=finite)
                state.skipped_steps += not finite
                run.optimizer.zero_grad()
                if run.average is not None and finite:
                    run.average.update()
                accumulated = 0
                took = (time.monotonic() - began) / len(pending)
                for row in pending:  # a batch counts when its optimizer step is done
                    record_batch(run, row, monitored["norm"], norms, took)
                bar.update(done - bar.n)
                bar.set_postfix_str(f"{row['queries'] / took:.0f} samples/s, loss {row['loss']:.3f}", refresh=False)
                if (seconds := run.pace.measure(state.step)) is not None:
                    log_expected_time(run, seconds, count)
                for row in pending:
                    check_red_flags(run, row)
                pending.clear()
                if state.step // args.save_every > last_saved // args.save_every:
                    save_checkpoint(run)
                    last_saved = state.step
                if run.stop_signal:
                    raise Interrupted(run.stop_signal)
                if out_of_time(run):
                    return False
    return True


def cells_right(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) share of the target's cells that the predicted grid has right; cells outside the prediction are wrong."""
    wanted = target >= 0
    return ((prediction == target) & wanted).flatten(1).sum(1) / wanted.flatten(1).sum(1).clamp(min=1)


@torch.no_grad()
def prompt_spread(prompt: Tensor, context_ids: Tensor) -> float:
    """Standard deviation of prompt (G, K, D) across tasks relative to the root mean square; near 0: all tasks get the
    same prompt. 1.0 where all contexts (G, S) are the same, as those of tasks with a single demonstration are."""
    if len(context_ids.unique(dim=0)) < 2:
        return 1.0
    flat = prompt.float().flatten(1)
    return float(flat.std(0).square().mean().sqrt() / (flat.square().mean().sqrt() + 1e-12))


def padding(batch: TrainBatch) -> dict[str, int]:
    """Real and processed cells of the batch's agent passes."""
    counts = [part.cell_counts() for part in (batch.query, *batch.feedback)]
    return {"cells": sum(real for real, _ in counts), "cells_processed": sum(processed for _, processed in counts)}


def remember(run: Run, batch: TrainBatch, embedding: Tensor, prompts: Tensor, solved: Tensor) -> int:
    """FIX 5: offer each episode's refined prompt to the memory; returns how many were stored."""
    stored = 0
    for index, (task, accuracy) in enumerate(zip(batch.task.tolist(), solved.tolist(), strict=True)):
        stored += run.memory.offer(
            embedding[index].detach(),
            prompts[index].detach(),
            task,
            accuracy,
            run.threshold.get_threshold(),
            run.state.step,
        )
    return stored


def progress(run: Run, batches_per_epoch: int) -> float:
    """Share of the run that is over, for the learning rate: of its batches, or of its time budget if that is
    further."""
    share = run.state.step / max(1, run.args.epochs * batches_per_epoch)
    if run.args.time_budget:
        elapsed = time.monotonic() - run.started
        share = max(share, elapsed / max(1.0, run.args.time_budget - validation_seconds(run)))
    return share


# What a prediction costs in passes under one view, before and after refinement: a demonstration on which the agent is
# tried, one that gives feedback (backwards too), and a cross-fitted step: up to four folds, each two pairs back and
# forth and one. Fitted to validations on the machine that benchmarks/RESULTS.md names, as are the next two.
TRIAL_VIEWS, FEEDBACK_VIEWS, STEP_VIEWS = 0.2, 0.5, 14
VIEW_STEPS = 0.5  # a view in training steps of as many cells
EVIDENCE_SECONDS = 0.09  # to prepare one task on one core


def validation_seconds(run: Run) -> float:
    """What predicting at the end needs of the time budget, at most half of it. 0 until a speed is measured; looked at
    anew every 20 batches."""
    if not run.seconds_per_cell:
        return 0.0
    if run.state.step % 20 == 0 or not run.validation_estimate:
        expected = expected_seconds(run, [task for split in run.splits for task in split.tasks])
        if run.args.submission:
            expected += expected_seconds(run, all_tasks(run.data))
        run.validation_estimate = min(expected, 0.5 * run.args.time_budget)
    return run.validation_estimate


def expected_seconds(run: Run, tasks: Sequence[Task]) -> float:
    """Seconds that predicting the tasks will take, by the speed of training, with the preparation of evidence that is
    not there yet."""
    args = run.args
    views = args.val_views + (STEP_VIEWS * args.refine_steps if args.refine_steps > 1 else 0)
    cells = 0.0
    for task in tasks:
        demonstrations = [pair.input.size for pair in task.train]
        cells += views * sum(pair.input.size for pair in task.test) + TRIAL_VIEWS * sum(demonstrations)
        cells += 0.0 if args.no_policy else FEEDBACK_VIEWS * sum(demonstrations[: args.feedback_pairs])
    missing = sum(not run.store.is_prepared(task) for task in tasks) / max(1, worker_count(run))
    return VIEW_STEPS * cells * run.seconds_per_cell + EVIDENCE_SECONDS * missing


def log_expected_time(run: Run, seconds_per_batch: float, count: int) -> None:
    """How long an epoch of `count` batches, a validation and the run will take at the speed of the first batches."""
    args, epoch = run.args, seconds_per_batch * count
    validation = expected_seconds(run, [task for split in run.splits for task in split.tasks])
    submission = expected_seconds(run, all_tasks(run.data)) if args.submission else 0.0
    left = args.epochs - run.state.epoch - run.state.batch / count  # epochs
    validations = math.ceil(left / args.val_every) if args.val_every else 1
    whole = f"{duration(left * epoch + validations * validation + submission)} until epoch {args.epochs} is over"
    if args.time_budget:
        whole += f", if --time_budget {args.time_budget:g} s does not end it before"
    run.log(
        f"[Epoch {run.state.epoch}] Expected time: about {duration(epoch)} an epoch ({count} batches) and "
        f"{duration(validation)} a validation, {whole}"
    )
    if args.time_budget and validation + submission > 0.5 * args.time_budget:
        run.log(
            f"[Epoch {run.state.epoch}] Half of --time_budget is kept for training, so the prediction at the end will "
            "take longer than the rest; fewer --val_views or a --val_limit make it shorter"
        )


def out_of_time(run: Run) -> bool:
    """Whether what is left of the time budget is needed for the validation."""
    budget = run.args.time_budget
    return bool(budget) and time.monotonic() - run.started > budget - validation_seconds(run)


def record_batch(run: Run, row: dict[str, Any], qwen_grad: float, norms: Mapping[str, float], took: float) -> None:
    """Count a batch whose optimizer step is done: state, sums of the epoch, metrics row, log line."""
    state = run.state
    state.batch, state.step = row["batch"], state.step + 1
    state.queries += row["queries"]
    state.memory_updates += row["stored"]
    state.memory_offers += row["offers"]
    keys = ("loss", "reward", "solved", "vote_solved", "mask_ratio", "cells", "cells_processed")
    summed = {key: row[key] for key in keys}
    summed |= {"qwen_grad": qwen_grad, "batches": 1.0, "reward_square": row["reward"] ** 2}
    for key, value in summed.items():
        if math.isfinite(value):
            state.sums[key] = state.sums.get(key, 0.0) + value
        else:  # left out of the mean, which is over the others
            state.sums[f"{key}.missing"] = state.sums.get(f"{key}.missing", 0.0) + 1
    speed = took / max(1, row["cells_processed"])
    run.seconds_per_cell = speed if not run.seconds_per_cell else 0.95 * run.seconds_per_cell + 0.05 * speed
    row |= {"qwen_grad": qwen_grad, "agent_grad": norms["agent"], "policy_grad": norms["policy"]}
    run.log.metrics(
        {
            "step": state.step,
            "epoch": state.epoch,
            **row,
            "samples_per_s": round(row["queries"] / took, 2),
            "skipped_steps": state.skipped_steps,
        }
    )
    if row["batch"] % run.args.log_every == 0:
        run.log(
            f"[Batch {row['batch']:4d}] Reward: {row['reward']:+.4f} | Loss: {row['loss']:.4f} | "
            f"Qwen_grad: {qwen_grad:.2e} | Mask_ratio: {row['mask_ratio']:.4f}"
        )


def summary_title(args: argparse.Namespace) -> str:
    """What the summary's headline calls the run: what of it is turned off, if anything."""
    off = [f"fix {number}: {ABLATION[number]}" for number in args.ablate]
    off += [f"the {part}" for part in ("policy", "memory", "evidence") if getattr(args, f"no_{part}")]
    title = "without " + "; ".join(off) if off else "All 7 Problems Fixed"
    return f"the old settings: {title}" if args.old else title


def log_summary(run: Run) -> None:
    """The seed's block at the end of an epoch's training, then what else is worth knowing."""
    state = run.state
    count = max(1.0, state.sums.get("batches", 0.0))
    mean = {key: value / max(1.0, count - state.sums.get(f"{key}.missing", 0.0)) for key, value in state.sums.items()}
    real = state.sums.get("cells", 0.0) / max(1.0, state.sums.get("cells_processed", 1.0))
    title = summary_title(run.args)
    rule = "=" * 70
    run.log(
        "\n".join(
            [
                rule,
                f"EPOCH {state.epoch} SUMMARY ({title})",
                rule,
                f"  Average Loss: {mean.get('loss', math.nan):.4f}",
                f"  Average RL Reward: {mean.get('reward', math.nan):+.4f}",
                f"  Qwen Gradient Norm: {mean.get('qwen_grad', 0.0):.2e} (FIX #1 - verifying Qwen trains)",
                f"  Size Warmup Weight: {size_weight(run):.3f} (FIX #4 - early emphasis on size)",
                f"  Memory Threshold: {run.threshold.get_threshold():.4f} (FIX #5 - dynamic threshold)",
                rule,
            ]
        )
    )
    run.log(
        f"[Epoch {state.epoch}] Memory: {state.memory_updates} of {state.memory_offers} offers stored, "
        f"{len(run.memory)} entries | training queries solved "
        f"{mean.get('solved', math.nan):.4f}, by the vote alone {mean.get('vote_solved', math.nan):.4f} | "
        f"cells processed that are real {real:.3f} | skipped steps {state.skipped_steps}"
    )
    reward = mean.get("reward", 0.0)
    spread = math.sqrt(max(0.0, mean.get("reward_square", 0.0) - reward**2) / count)
    if reward + 2 * spread < 0:  # below 0 by more than chance
        raise_flag(
            run,
            "reward",
            f"Average RL Reward {reward:+.4f} below 0 for a whole epoch: refinement makes predictions worse (FIX #6, "
            "reward signs; or --policy_lr too high)",
        )


# ====================================================================================================================
# Red flags
# ====================================================================================================================


def check_red_flags(run: Run, row: Mapping[str, Any]) -> None:
    """The seed's red flags, checked by the program after each optimizer step."""
    if row["qwen_grad"] == 0.0:
        raise_flag(run, "qwen", "Qwen_grad: 0.00e+00, Qwen is not training (FIX #1)")
    if row["mask_ratio"] < 1e-3 and row["solved"] < 0.5:
        raise_flag(
            run, "mask", f"Mask_ratio: {row['mask_ratio']:.4f} with few queries solved, the mask is broken (FIX #3)"
        )
    if not math.isfinite(row["loss"]):
        raise_flag(run, "loss", "Loss is not finite, numerical instability (FIX #7)")
    if row["prompt_spread"] < 1e-3:
        raise_flag(run, "prompt", "all tasks get the same prompt, it has collapsed (FIX #6, prompt consistency)")


def raise_flag(run: Run, name: str, message: str) -> None:
    """Warn once for each kind of flag; under --strict stop the run (it is saved first)."""
    if name not in run.flags_raised:
        run.flags_raised.add(name)
        run.log(f"RED FLAG: {message}")
        if run.args.strict:
            raise RedFlag(message)


# ====================================================================================================================
# Main
# ====================================================================================================================


def describe(run: Run) -> None:
    """What runs: device, precision and why, models, data, checkpoint size."""
    args = run.args
    episodes = sum(len(task.train) for task in run.training)
    tree, frozen = checkpoint_tree(run), frozen_parts(run)
    growth = run.optimizer.bytes_to_come()
    size = (ModelPersistence.estimate_bytes(tree) + growth) / 2**20
    rates = ", ".join(f"{group} {rate:g}" for group, rate in sorted(run.optimizer.base_rates().items()))
    trained = f"{len(run.training)} training tasks, {episodes} episodes x {args.views} views"
    validated = ", ".join(
        f"{sum(len(task.test) for task in split.tasks)} test pairs of {len(split.tasks)} {split.name} tasks"
        for split in run.splits
    )
    lines = [
        run.qwen.description,
        f"Device: {device_name(run.device)} | AMP: {run.precision.name} ({run.precision.reason}), "
        f"{torch.get_num_threads()} threads",
        f"Agent: {sum(p.numel() for p in run.agent.parameters()):,} parameters, {args.agent_blocks} blocks x "
        f"{args.agent_passes} passes, width {args.agent_width} | learning rates: {rates}",
        f"Data: {run.data.name}" + (f", {trained}" if run.training else ""),
        f"Validation: {validated} with {args.val_views} views each",
        f"Checkpoint: {size:.1f} MiB every {args.save_every} batches, about {size * (args.keep + 2):.0f} MiB in all"
        if not args.eval_only
        else "Checkpoint: only read",
        f"Folder: {args.output_dir}" + (", with TensorBoard's events in it" if run.log.events is not None else ""),
    ]
    run.log("\n".join(lines))
    if run.persistence is not None and (warning := run.persistence.space_warning(tree, frozen, growth=growth)):
        run.log(warning)


def open_run_folder(args: argparse.Namespace) -> tuple[Path, str | None]:
    """The run's folder and, on resume, which checkpoint to continue from. ValueError for what the user can mend."""
    if args.resume is None:
        folder = Path(args.output_dir or f"runs/arc_complete_{time.strftime('%Y%m%d_%H%M%S')}")
        if folder.is_dir() and any(folder.glob("step-*")):
            raise ValueError(
                f"--output_dir: {folder} holds a run already; continue it with --resume or choose another folder"
            )
        return folder, None
    which: str = args.resume
    if which in ("latest", "best"):
        found = Path(args.output_dir) if args.output_dir else find_newest_run("runs")
        if found is None and args.backup_dir and (mirrored := find_newest_run(args.backup_dir)):
            found = Path("runs") / mirrored.name  # a new machine: the checkpoints are fetched from the backup
        if found is None:
            raise ValueError("--resume: no run with a checkpoint under runs/; give its folder with --output_dir")
    elif problem := cannot_look(Path(which)):
        raise ValueError(f"--resume: {problem}")
    elif (Path(which) / "manifest.json").is_file():
        found = Path(args.output_dir) if args.output_dir else Path(which).absolute().parent
        if args.eval_only:  # the checkpoint is only read, wherever it lies; logs and predictions go to --output_dir
            return found, which
    else:  # a run's folder is as good as its name under --output_dir
        found, which = Path(which), "latest"
        if args.output_dir and Path(args.output_dir).resolve() != found.resolve():
            raise ValueError(f"--resume: {found} is not a checkpoint, and --output_dir names another folder")
    if not args.backup_dir and not any([*found.glob("step-*"), *found.glob("best-*")]):
        if which not in ("latest", "best"):
            raise ValueError(f"--resume: {which} is not a checkpoint of the run in --output_dir {found}")
        raise ValueError(f"--resume: no checkpoint in {found}")
    return found, which


def install_signal_handlers(run: Run) -> Callable[[], None]:
    """SIGINT, SIGTERM and SIGHUP (unless it is ignored, as under nohup): finish the optimizer step, save, leave. A
    second one ends at once. Returns the undo."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def handle(number: int, _: Any) -> None:
        if run.stop_signal:
            raise KeyboardInterrupt
        run.stop_signal = number
        run.log(f"{signal.Signals(number).name}: saving and leaving after this step (again to leave at once)")

    try:
        previous = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not in the main thread, as in some notebook front ends: the caller's handling stays
        previous = {}

    def undo() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    return undo


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 1 (a checkpoint or the submission could not be written), 2 (the user can
    mend it), 3 (a red flag under --strict), 128 + n (signal n). Also called from notebook cells: main(["--epochs",
    "1"]), which therefore ends without an exception for --help, for wrong flags and for Stop, and leaves nothing
    locked."""
    try:
        return run_main(argv)
    except SystemExit as leave:  # argparse's way to end; what there is to say is printed
        return int(leave.code or 0)
    except KeyboardInterrupt:  # before training begins, or a second one while the first is being obeyed
        print("Interrupted: left at once, what was saved before counts", file=sys.stderr)
        return 128 + signal.SIGINT


def run_main(argv: Sequence[str] | None) -> int:
    """`main`, but --help and wrong flags raise SystemExit, and an interruption that cannot wait KeyboardInterrupt."""
    started = time.monotonic()
    args, given = parse_arguments(argv)
    # An evaluation may be of any checkpoint: its step would stand out of order among the events of the training.
    log = RunLog(quiet=args.quiet, tensorboard=not (args.no_tensorboard or args.eval_only))
    persistence, checkpoint = None, None
    try:
        if args.print_config:
            return print_config(args, given)
        folder, which = open_run_folder(args)
        if which is not None:
            persistence = open_persistence(args, folder, log)
            checkpoint = load_checkpoint(persistence, which)
            adopt_flags(args, given, checkpoint)
            if problems := problems_of_all(args):
                raise ValueError("; ".join(problems))
        args.output_dir = str(folder)
        with quiet_downloads() if args.quiet else contextlib.nullcontext():
            run = build_run(args, log, started, checkpoint)
        if checkpoint is not None:
            restore(run, checkpoint)
        if persistence is None:
            persistence = open_persistence(args, folder, log)
    except (ValueError, PersistenceError) as problem:
        # Everything above raises these for what the user can mend, with one line that says what and where.
        if persistence is not None:
            persistence.close()
        log(f"error: {problem}", error=True)
        return 2
    except BaseException:  # in a notebook the process lives on: it must not keep the run's lock
        if persistence is not None:
            persistence.close()
        raise
    run.persistence = persistence
    try:
        with persistence, contextlib.closing(log):
            code = run_command(run, checkpoint)
    except PersistenceError as problem:  # the last background write failed
        log(f"error: {problem}", error=True)
        return 1
    if code in (0, 1, 3) and (args.report or not args.eval_only):  # not when interrupted
        try_report(folder, log)
    return code


def print_config(args: argparse.Namespace, given: set[str]) -> int:
    """The flags as a run with this command line would have them, as JSON on stdout. What the model decides when it is
    built (--qwen_lr), and the name of a new run's folder, is null."""
    folder, which = open_run_folder(args)
    if which is not None:
        with ModelPersistence(folder, read_only=True, log=functools.partial(print, file=sys.stderr)) as persistence:
            adopt_flags(args, given, load_checkpoint(persistence, which))
        args.output_dir = str(folder)
    write_line(json.dumps(saved_flags(args), indent=2, allow_nan=False))
    return 0


def open_persistence(args: argparse.Namespace, folder: Path, log: RunLog) -> ModelPersistence:
    """The run's checkpoints; ValueError if its folder cannot be made."""
    try:
        return ModelPersistence(
            folder, keep=args.keep, backup_dir=args.backup_dir, backup_quota_gb=args.backup_quota_gb, log=log
        )
    except OSError as problem:
        raise ValueError(f"--output_dir: cannot write {folder}: {problem.strerror}") from problem


def run_command(run: Run, checkpoint: Checkpoint | None) -> int:
    """Train or evaluate, with the run's folder open; always saves what was trained."""
    rows = 0 if checkpoint is None else int(checkpoint.state["extra"]["rows"])
    run.log.open(Path(run.args.output_dir), rows=None if run.args.eval_only else rows)
    describe(run)
    if checkpoint is not None:
        run.log(f"Resumed from {checkpoint.path.name}: epoch {run.state.epoch}, batch {run.state.batch}")
    undo = install_signal_handlers(run)
    try:
        if run.args.eval_only:
            predicted = predict_splits(run, run.splits)
            log_validation(run, epoch_of_weights(run.state), score_splits(run, predicted))
            return submit(run, predicted) if run.args.submission else 0
        write_config(run)
        train(run)
        assert run.persistence is not None
        run.persistence.wait()  # what it saved last is on disk before the run is called done
        run.log(f"Done: {run.state.step} batches, {run.state.queries} queries in {time.monotonic() - run.started:.1f}s")
        if not run.args.submission:
            return 0
        splits = splits_by_content(all_tasks(run.data), run.trained_on["inputs"])
        return submit(run, predict_splits(run, splits, show=False))
    except Interrupted as stop:
        code = 128 + int(stop.args[0])
        if run.args.eval_only:  # nothing was trained
            return code
    except RedFlag:
        code = 3
    except PersistenceError as problem:
        run.log(f"error: {problem}", error=True)
        return 1
    finally:
        undo()
    try:
        save_checkpoint(run, wait=True)
    except PersistenceError as problem:
        run.log(f"error: {problem}", error=True)
        return 1
    run.log(f"Saved at epoch {run.state.epoch}, batch {run.state.batch}; continue with --resume")
    return code


def epoch_of_weights(state: TrainState) -> int:
    """The epoch that was trained last; between two epochs the state is at the beginning of the next."""
    return max(0, state.epoch - (state.batch == 0 and not state.trained))


def write_config(run: Run) -> None:
    """The resolved flags as config.json, for people and for --config; a resume reads the checkpoint's own copy."""
    path = Path(run.args.output_dir) / "config.json"
    flags = saved_flags(run.args) | {"resume": None, "submission": None}  # of this command, not of its settings
    path.write_text(json.dumps(flags, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_code = main()
    if ipython_shell() is None:  # else %run, or this file pasted into a cell: there SystemExit is shown as an error
        sys.exit(exit_code)
