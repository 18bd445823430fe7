"""Train a small ARC solver: grid agent, trainable Qwen and prompt policy, jointly, with seven named fixes.

    python trainloop_complete_with_fixes.py --epochs 20 --device cuda
    python trainloop_complete_with_fixes.py --resume

The file reads top to bottom: flags, the seven fixes, building, one training step, the training loop, validation, what a
checkpoint holds, main. Shapes: G episodes (a task with one demonstration pair held out), V views each, B = G * V
queries, L tokens, K prompt vectors of width D.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Threads that wait must not spin for long: where cores are few, torch's threads share them with the data workers and
# with whatever else the machine does. libgomp reads this when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from arc import efe as free_energy
from arc.agent import AgentOutput, GridAgent, voted_grid
from arc.augment import evaluation_views
from arc.batches import (
    Episode,
    EpisodeData,
    PredictionBatch,
    PredictionData,
    Prepared,
    QueryBatch,
    TrainBatch,
    context_pairs,
    epoch_batches,
    prediction_order,
    reverse_queries,
)
from arc.datasets import load_dataset
from arc.device import Precision, device_name, resolve_device, resolve_precision
from arc.efe import EfeWeights
from arc.evidence import NUM_RULES, NUM_TABLES, EvidenceStore, NoEvidence
from arc.loading import (
    EpochSampler,
    Unprepared,
    WorkerLost,
    batches_of,
    end_workers,
    make_loader,
    worker_count,
)
from arc.lora import Adapter, Base, problem_with_peft
from arc.memory import MemoryBank
from arc.optim import JointOptimizer, WeightAverage, learning_rate_factor, problem_with_eight_bit
from arc.predict import (
    BatchPrediction,
    PairPrediction,
    SplitReport,
    answers_in_time,
    keep_attempts,
    predict_tasks,
    rounds_of,
    score_splits,
    submit,
    until,
    views_reached,
)
from arc.qwen import QwenPrompt, build_qwen
from arc.qwen_source import quiet_downloads
from arc.refine import cross_fitted
from arc.report import keep_predictions, open_events, try_report
from arc.run.budget import FEEDBACK_VIEWS, STEP_VIEWS, TRIAL_VIEWS, Budget, PredictionCost
from arc.run.config import read_config
from arc.run.files import UserError, cannot_write, cannot_write_file, default_cache
from arc.run.flags import Arguments, Number, ipython_shell, own_arguments
from arc.run.folder import open_run_folder
from arc.run.interrupt import Interrupted, StopSignal
from arc.run.randomness import restore_rng, rng_state, seed_everything
from arc.run.records import Alarms, RedFlag, TrainState, batch_line, log_validation, summary_lines
from arc.run.runlog import RunLog
from arc.run.terminal import Pace, write_line
from arc.splits import (
    LABELS,
    Split,
    all_tasks,
    input_digests,
    split_tasks,
    splits_by_content,
    training_fingerprint,
)
from arc.tasks import DataSet, Task
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

Flags = argparse.Namespace

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


def saved_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as plain values; those that only say where flags come from and go to are none of a run's."""
    values = {name: value for name, value in sorted(vars(args).items()) if name not in ("config", "print_config")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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
        raise UserError(f"--resume: cannot change {', '.join(changed)}")


def summary_title(args: argparse.Namespace) -> str:
    """What the summary's headline calls the run: what of it is turned off, if anything."""
    off = [f"fix {number}: {ABLATION[number]}" for number in args.ablate]
    off += [f"the {part}" for part in ("policy", "memory", "evidence") if getattr(args, f"no_{part}")]
    title = "without " + "; ".join(off) if off else "All 7 Problems Fixed"
    return f"the old settings: {title}" if args.old else title


def print_config(args: argparse.Namespace, given: set[str]) -> int:
    """The flags as a run with this command line would have them, as JSON on stdout. What the model decides when it is
    built (--qwen_lr), and the name of a new run's folder, is null."""
    folder, which = open_run_folder(args, find_newest_run)
    if which is not None:
        with ModelPersistence(folder, read_only=True, log=functools.partial(print, file=sys.stderr)) as persistence:
            adopt_flags(args, given, load_checkpoint(persistence, which))
        args.output_dir = str(folder)
    write_line(json.dumps(saved_flags(args), indent=2, allow_nan=False))
    return 0


def write_config(run: Run) -> None:
    """The resolved flags as config.json, for people and for --config; a resume reads the checkpoint's own copy."""
    path = Path(run.args.output_dir) / "config.json"
    flags = saved_flags(run.args) | {"resume": None, "submission": None}  # of this command, not of its settings
    path.write_text(json.dumps(flags, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# ====================================================================================================================
# The seven fixes, each beside the OLD twin that --ablate puts in its place (1: Qwen is built frozen)
# ====================================================================================================================


class GradientMonitor:
    """FIX 1: measures gradients after unscaling and before clipping, so that a module that does not train is seen."""

    def check_gradients(self, module: nn.Module, name: str) -> dict[str, Tensor | float]:
        """{"norm": () global gradient norm, still on the device, "missing": trainable parameters without a gradient}.
        name: of the module, for people who print what this returns."""
        trainable = [p for p in module.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
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


@dataclass(frozen=True)
class Weights:
    """Of one pass in the risk: cell (B, L), grid (B,); ratio (B,) in [0, 1]: share of target cells that are wrong."""

    cell: Tensor
    grid: Tensor
    ratio: Tensor


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
        cell, ratio = hard_cell_mask(output.predicted_colours(query), query.target, self.floor)
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


# ====================================================================================================================
# Building a run
# ====================================================================================================================

# Deliberately not saved, because they are functions of what is: the curriculum (of the epoch), the order and
# augmentation of episodes and the policy's noise (of seed, epoch and batch), learning rates (of the step), the
# evidence (of the data).


@dataclass
class Run:
    """Everything the loop works with."""

    args: Flags
    log: RunLog
    alarms: Alarms
    stop: StopSignal
    budget: Budget
    device: torch.device
    precision: Precision
    data: DataSet
    training: tuple[Task, ...]
    splits: tuple[Split, ...]  # what is predicted and scored
    trained_on: dict[str, Any]  # what a checkpoint records of the data, to recognise them
    store: EvidenceStore
    fixes: Fixes
    qwen: QwenPrompt
    agent: GridAgent
    policy: PromptPolicy
    memory: MemoryBank
    optimizer: JointOptimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    weights: EfeWeights
    state: TrainState
    pace: Pace = field(default_factory=Pace)
    persistence: ModelPersistence | None = None
    export_files: Mapping[str, str] = field(default_factory=dict)  # config and tokenizer of Qwen, for `export`

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"agent": self.agent, "qwen": self.qwen, "policy": self.policy, "memory": self.memory}


def build_run(args: Flags, log: RunLog, started: float, checkpoint: Checkpoint | None = None) -> Run:
    """Data, models, optimizer. UserError with one line for what the user can mend; writes nothing into the run's
    folder. checkpoint: what will be restored; it says which data it was trained on, and which weights its adapter
    belongs to."""
    device = resolve_device(args.device)
    precision = resolve_precision("off" if 7 in args.ablate else args.amp, device)  # FIX 7
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
    splits = tuple(split.first(args.val_limit) for split in splits)
    seed_everything(args.seed)
    qwen = build_prompt_reader(
        args, device, [*training, *(task for split in splits for task in split.tasks)], checkpoint, log
    )
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
    optimizer, average = build_optimizer(args, qwen, agent, policy, memory)
    store = NoEvidence() if args.no_evidence else EvidenceStore(Path(args.cache_dir) / "evidence")
    predicted = [task for split in splits for task in split.tasks] + (all_tasks(data) if args.submission else [])
    return Run(
        args=args,
        log=log,
        alarms=Alarms(log, strict=args.strict),
        stop=StopSignal(log),
        budget=Budget(args.time_budget, started, lambda: prediction_cost(args, store, predicted)),
        device=device,
        precision=precision,
        data=data,
        training=training,
        splits=splits,
        trained_on={
            "data": data.fingerprint,
            "training": training_fingerprint(training),
            "inputs": input_digests(training),
        },
        store=store,
        fixes=Fixes.of(args),
        qwen=qwen,
        agent=agent,
        policy=policy,
        memory=memory,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.scale_loss),  # FIX 7
        average=average,
        weights=EfeWeights(**{w.name: getattr(args, f"w_{w.name}") for w in dataclasses.fields(EfeWeights)}),
        state=TrainState(),
        export_files=qwen.export_files(),
    )


def build_prompt_reader(
    args: Flags, device: torch.device, tasks: Sequence[Task], checkpoint: Checkpoint | None, log: RunLog
) -> QwenPrompt:
    """Qwen as --qwen names it (FIX 1: trainable, unless ablated). Sets args.qwen and args.qwen_lr to what they turn out
    to be. UserError if the largest context of `tasks` does not fit."""
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
    largest = max(tasks, key=lambda task: sum(pair.input.size for pair in task.train))
    qwen.encoder(context_pairs(largest))  # says here, not unseen in a worker, if contexts do not fit
    args.qwen = qwen.name  # not "auto": on another machine that may be another model
    if 1 in args.ablate:
        qwen.requires_grad_(False)
    if args.qwen_lr is None:
        # An adapter takes about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret").
        args.qwen_lr = 3e-4 if qwen.is_tiny else 2e-5 if qwen.adapter is None else 2e-4
    return qwen


def build_optimizer(
    args: Flags, qwen: QwenPrompt, agent: GridAgent, policy: PromptPolicy, memory: MemoryBank
) -> tuple[JointOptimizer, WeightAverage | None]:
    """Named groups with rates of their own, and the averaged weights (without a large Qwen that trains whole)."""
    groups: dict[str, nn.Module] = {"agent": agent, "policy": nn.ModuleDict({"policy": policy, "memory": memory})}
    rates = {"agent": args.agent_lr, "policy": args.policy_lr}
    if 1 not in args.ablate:  # FIX 1: Qwen is a group of its own
        assert args.qwen_lr is not None
        groups["qwen"], rates["qwen"] = qwen, args.qwen_lr
    eight_bit = {"qwen"} if args.optim_qwen == "adamw8bit" and not args.eval_only else set()
    optimizer = JointOptimizer(groups, rates, muon=args.optimizer == "muon", eight_bit=eight_bit)
    assert all(map(optimizer.covers, (agent, qwen, policy, memory))), "a trainable parameter is in no group"
    small = qwen.is_tiny or qwen.adapter is not None
    averaged = groups if small else {name: module for name, module in groups.items() if name != "qwen"}
    return optimizer, WeightAverage(averaged, args.ema) if args.ema > 0 else None


def prediction_cost(args: Flags, store: EvidenceStore, tasks: Sequence[Task]) -> PredictionCost:
    """What predicting the tasks' test pairs takes, from sizes that are known beforehand."""
    views = args.val_views + (STEP_VIEWS * args.refine_steps if args.refine_steps > 1 else 0)
    cells = 0.0
    for task in tasks:
        demonstrations = [pair.input.size for pair in task.train]
        cells += views * sum(pair.input.size for pair in task.test) + TRIAL_VIEWS * sum(demonstrations)
        cells += 0.0 if args.no_policy else FEEDBACK_VIEWS * sum(demonstrations[: args.feedback_pairs])
    missing = sum(not store.is_prepared(task) for task in tasks) / max(1, worker_count(args.workers))
    return PredictionCost(cells, missing)


# ====================================================================================================================
# One training step
# ====================================================================================================================


@dataclass(frozen=True)
class Pass:
    """One prediction of the step: B queries, the agent's output for them, their weights in the risk."""

    query: QueryBatch
    output: AgentOutput
    weights: Weights


@dataclass(frozen=True)
class Step:
    """What a batch leaves for the records: measured () tensors, still on the device, and counts."""

    measured: dict[str, Tensor]
    counted: dict[str, int]


def train_step(run: Run, batch: TrainBatch, noise: Tensor, window: int) -> Step:
    """Forward and backward of one batch; `update` steps. noise (S, G, A): the policy's; window: batches an update."""
    fixes, agent = run.fixes, run.agent
    with run.precision.autocast(run.device):  # FIX 7
        prompt, key = read_prompt(run, batch)  # FIX 1: gradient flows into Qwen, no cache, no no_grad
        first = agent(batch.query, prompt)
        query, before = batch.query.rows(batch.refined), first.rows(batch.refined)
        feedback = None if run.args.no_policy else context_feedback(agent, batch.feedback, prompt)
        refined = run.policy.refine_prompt(prompt, feedback, noise=noise[0]).prompt if feedback else prompt
        after = agent(query, refined) if feedback else before
        voted = exact_match(voted_grid(batch.query), batch.query.target_grid)
        passes = (
            Pass(batch.query, first, fixes.hard_cells(first, batch.query, voted)),  # FIX 3
            Pass(query, after, fixes.hard_cells(after, query, voted[batch.refined])),
        )
        efe = efe_terms(run, batch, passes, (prompt, refined))  # FIX 4 and 6 in there
        hard_before, hard_after = predictions(agent, query, (before, after), (prompt, refined))
    # FIX 6: every delta is after - before
    reward, deltas = compute_reward(hard_before, hard_after, query.target_grid, query.input_grid)
    reward_objective = reward_with_gradient(run, query, (before, after), prompt, feedback, hard_before, noise)
    loss = fixes.objective(efe["total"], reward_objective)  # FIX 2
    run.scaler.scale(loss / window).backward()  # FIX 7
    groups = len(batch.task)
    solved = mean_per_owner(exact_match(hard_after.grid, query.target_grid), query.owner, groups)
    stored = remember(run, batch.task, key, refined, solved)  # FIX 5
    measured = {
        "loss": loss,
        **{f"efe.{name}": value for name, value in efe.items()},
        "reward": reward.mean(),
        **{name: value.mean() for name, value in deltas.items()},
        "reward_objective": reward_objective,
        "mask_ratio": passes[1].weights.ratio.mean(),
        "solved": solved.mean(),
        "vote_solved": mean_per_owner(voted[batch.refined], query.owner, groups).mean(),
        "prompt_spread": prompt_spread(prompt, batch.context_ids),
    }
    counted = {"stored": stored, "offers": 0 if run.args.no_memory else groups, "queries": len(batch.query)}
    return Step({name: value.detach().float() for name, value in measured.items()}, counted)


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
            losses = output.pair_loss(query) / pairs[query.owner]
            gradient += torch.autograd.grad(losses.sum(), leaf)[0]
        with torch.no_grad():
            grid = output.predicted_grid(query)
            loss.index_add_(0, query.owner, losses.detach())
            accuracy.index_add_(0, query.owner, cell_accuracy(grid, query.target_grid) / pairs[query.owner])
            exact.index_add_(0, query.owner, exact_match(grid, query.target_grid) / pairs[query.owner])
    return Feedback(gradient, loss, accuracy, exact, pairs)


@torch.no_grad()
def predictions(
    agent: GridAgent, query: QueryBatch, outputs: tuple[AgentOutput, AgentOutput], prompts: tuple[Tensor, Tensor]
) -> tuple[Prediction, Prediction]:
    """The hard predictions before and after refinement with the input predicted back from each.

    Where both passes predict the same grid, the way back is not computed: what it would give is taken to be the same,
    so d_rev is exactly 0 there.
    """
    grids = [output.predicted_grid(query) for output in outputs]
    reversed_grids = [torch.full_like(grids[0], -1) for _ in grids]
    changed = torch.nonzero((grids[0] != grids[1]).flatten(1).any(1)).flatten()
    if len(changed):
        for grid, back, under in zip(grids, reversed_grids, prompts, strict=True):
            asked = reverse_queries(grid[changed], query, changed)
            back[changed] = agent(asked, under, reverse=True).predicted_grid(asked, size=asked.out_size)
    return Prediction(grids[0], reversed_grids[0]), Prediction(grids[1], reversed_grids[1])


def efe_terms(run: Run, batch: TrainBatch, passes: Sequence[Pass], prompts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The expected free energy's terms and total, averaged over the passes (before, after): the agent is trained on
    both, otherwise "before" would be an untrained straw man and the reward would prove nothing."""
    terms = {
        "risk": [
            free_energy.risk(p.output.colour_logits, p.query.target, p.weights.cell, p.weights.grid) for p in passes
        ],
        "ambiguity": [free_energy.ambiguity(p.output.colour_logits[-1], p.query.target) for p in passes],
        "size": [free_energy.size_loss(p.output.size_logits, p.query.target_size) for p in passes],
    }
    # The way back is trained on each episode's first view only: it costs a pass of its own.
    asked = reverse_queries(batch.query.target_grid[batch.first_view], batch.query, batch.first_view)
    back = run.agent(asked, prompts[-1], reverse=True)
    both = torch.cat([prompt.float() for prompt in prompts])
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    means["reversibility"] = free_energy.risk(back.colour_logits, asked.target, (asked.target >= 0).float())
    means["prompt"] = run.fixes.consistency(both, batch.task.repeat(len(prompts)))  # FIX 6
    size_weight = run.fixes.curriculum.get_size_loss_weight(run.state.epoch)  # FIX 4
    return free_energy.combine(means, run.weights, size_weight)


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
            return sampled_objective(run, query, prompt, feedback, hard_before, noise)
    soft_before, soft_after = (soft_prediction(output, query) for output in outputs)
    return expected_reward(soft_before, soft_after, query.target_grid).mean()


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


def policy_noise(run: Run, groups: int, batch_number: int) -> Tensor:
    """(S, G, A) standard normal noise: a pure function of (seed, epoch, batch), so a resumed run draws the same."""
    key = np.random.SeedSequence([run.args.seed, run.state.epoch, batch_number, 0xAC7]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(key))
    shape = (run.args.policy_samples, groups, run.policy.log_std.numel())
    return torch.randn(shape, generator=generator).to(run.device)


def mean_per_owner(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    """(B,) values of queries -> (G,) means of each episode's."""
    total = torch.zeros(groups, device=values.device).index_add(0, owner, values.float())
    return total / torch.bincount(owner, minlength=groups).clamp(min=1)


def remember(run: Run, tasks: Tensor, keys: Tensor, prompts: Tensor, solved: Tensor) -> int:
    """FIX 5: offer each episode's refined prompt to the memory; returns how many were stored. tasks (G,), keys (G, E),
    prompts (G, K, D), solved (G,)."""
    if run.args.no_memory:
        return 0
    threshold, stored = run.fixes.threshold.get_threshold(), 0
    for index, (task, accuracy) in enumerate(zip(tasks.tolist(), solved.tolist(), strict=True)):
        key, prompt = keys[index].detach(), prompts[index].detach()
        stored += run.memory.offer(key, prompt, task, accuracy, threshold, run.state.step)
    return stored


@torch.no_grad()
def prompt_spread(prompt: Tensor, context_ids: Tensor) -> Tensor:
    """(): standard deviation of prompt (G, K, D) across tasks relative to the root mean square; near 0: all tasks get
    the same prompt. 1.0 where all contexts (G, S) are the same, as those of tasks with a single demonstration are."""
    flat = prompt.float().flatten(1)
    if len(context_ids.unique(dim=0)) < 2:
        return flat.new_ones(())
    return flat.std(0).square().mean().sqrt() / (flat.square().mean().sqrt() + 1e-12)


def update(run: Run, steps: Sequence[Step], batches: int) -> list[dict[str, Any]]:
    """The optimizer step for the batches that were added up; returns their rows, complete. `batches` an epoch."""
    state, fixes = run.state, run.fixes
    rates = run.optimizer.set_rates(learning_rate_factor(state.updates + state.skipped_steps, progress(run, batches)))
    run.optimizer.unscale_(run.scaler)  # FIX 7: gradients in their own units again ...
    monitored = fixes.monitor.check_gradients(run.qwen, "Qwen")  # FIX 1: ... measured before clipping ...
    norms = fixes.guard.clip(run.optimizer)  # FIX 7: ... every group clipped
    rows, found = read_steps(steps, {"qwen_grad": torch.as_tensor(monitored["norm"]), **norms})
    finite = fixes.guard.allows(found[name] for name in norms)
    state.updates += run.optimizer.step(run.scaler, finite=finite)
    state.skipped_steps += not finite
    run.optimizer.zero_grad()
    if run.average is not None and finite:
        run.average.update()
    shared = {"qwen_grad": found["qwen_grad"], "agent_grad": found["agent"], "policy_grad": found["policy"]}
    shared |= {"skipped_steps": state.skipped_steps, **{f"lr.{name}": rate for name, rate in rates.items()}}
    return [{**row, **shared} for row in rows]


def read_steps(steps: Sequence[Step], norms: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Everything that an update measured as plain numbers, in one read: the only wait for the device. Returns a row for
    each step, and the norms."""
    device = next(iter(steps[0].measured.values())).device
    values = [value for step in steps for value in step.measured.values()] + list(norms.values())
    numbers = iter(torch.stack([value.detach().float().to(device) for value in values]).tolist())
    rows = [{**{name: next(numbers) for name in step.measured}, **step.counted} for step in steps]
    return rows, dict(zip(norms, numbers, strict=True))


# ====================================================================================================================
# The training loop
# ====================================================================================================================


def train(run: Run) -> None:
    """Epochs from where the state stands to the end, each with its summary, validation and checkpoint."""
    args, state = run.args, run.state
    sampler = EpochSampler([], 0)
    loader = make_loader(
        training_data(run), sampler, workers=worker_count(args.workers), pin_memory=run.device.type == "cuda"
    )
    if state.epoch >= args.epochs:
        run.log(f"Nothing to train: all {args.epochs} epochs are done; a larger --epochs goes on")
    while state.epoch < args.epochs:
        started, in_time = time.monotonic(), True
        if not state.trained:
            sampler.batches, sampler.epoch, sampler.start = epoch_order(run), state.epoch, state.batch
            in_time = train_epoch(run, loader, len(sampler.batches))
        validated = not in_time or state.epoch + 1 == args.epochs
        validated = validated or bool(args.val_every and (state.epoch + 1) % args.val_every == 0)
        reports: dict[str, SplitReport] = {}
        if validated:
            save_checkpoint(run)  # a validation may take minutes; what was trained is safe by then
            reports = validate(run)
            state.val_accuracy, state.accuracy_delta = headline(reports, state)
        log_validation(run.log, state.epoch, state.step, reports, LABELS, args.val_splits, memory_row(run))
        run.log(f"[Epoch {state.epoch}] Time: {time.monotonic() - started:.2f}s")
        # It may have been the last validation that there was time for.
        spent = not in_time or (validated and run.budget.is_spent(state.step))
        if in_time:
            run.fixes.threshold.update(state.sums.get("solved", 0.0) / max(1.0, state.sums.get("batches", 0.0)))
            state.next_epoch()
        save_checkpoint(run)
        if spent:
            break


def train_epoch(run: Run, loader: DataLoader, count: int) -> bool:
    """The rest of this epoch's `count` batches. Returns False if the time budget ended it early."""
    args, state, log, budget = run.args, run.state, run.log, run.budget
    size_weight, threshold = run.fixes.curriculum.get_size_loss_weight(state.epoch), run.fixes.threshold.get_threshold()
    log(f"[Epoch {state.epoch}] Size Warmup Weight: {size_weight:.3f} (FIX #4)")
    log(f"[Epoch {state.epoch}] Memory Threshold: {threshold:.4f} (FIX #5)")
    unprepared = Unprepared(run.training, run.store)
    bar = log.bar(total=count, initial=state.batch, desc=f"epoch {state.epoch}", unit="batch")
    preparing = log.bar(
        total=len(unprepared), desc="evidence prepared", unit="task", disable=args.quiet or not len(unprepared)
    )
    last_saved, began, in_time = state.step, 0.0, True
    steps: list[Step] = []
    with bar, preparing:
        for fetched in batches_of(loader):  # starts at state.batch: a resumed run enters in mid-epoch
            began = began if steps else time.monotonic()
            preparing.update(unprepared.met(fetched.task.tolist()))
            window = window_size(args.grad_accum, state.batch, count)
            noise = policy_noise(run, len(fetched.task), state.batch + len(steps))
            step = train_step(run, fetched.to(run.device), noise, window)
            steps.append(dataclasses.replace(step, counted={**step.counted, **padding(fetched)}))
            if len(steps) < window:
                continue
            rows = update(run, steps, count)  # a batch counts when its optimizer step is done
            record(run, rows, (time.monotonic() - began) / len(steps))
            bar.update(len(steps))
            bar.set_postfix_str(
                f"{rows[-1]['samples_per_s']:.0f} samples/s, loss {rows[-1]['loss']:.3f}", refresh=False
            )
            steps.clear()
            if (seconds := run.pace.measure(state.step)) is not None:
                left = args.epochs - state.epoch - state.batch / count
                for line in budget.expectation(seconds, count, left, args.val_every):
                    log(f"[Epoch {state.epoch}] {line}")
            if state.step // args.save_every > last_saved // args.save_every:
                save_checkpoint(run)
                last_saved = state.step
            run.stop.check()
            if budget.is_spent(state.step):
                in_time = False
                break
    state.trained = in_time
    lines = summary_lines(state, summary_title(args), size_weight, threshold, len(run.memory))
    log("\n".join(lines[:-1]))
    log(lines[-1])
    run.alarms.check_epoch(state)
    return in_time


def record(run: Run, rows: Sequence[dict[str, Any]], took: float) -> None:
    """Count batches whose optimizer step is done: state, speed, metrics, log line, red flags. took: seconds a batch."""
    for row in rows:
        run.state.count(row)
        run.budget.measure(took / max(1, row["cells_processed"]))
        row |= {"batch": run.state.batch, "samples_per_s": round(row["queries"] / took, 2)}
        run.log.metrics({"step": run.state.step, "epoch": run.state.epoch, **row})
        if row["batch"] % run.args.log_every == 0:
            run.log(batch_line(row))
    for row in rows:
        run.alarms.check_batch(row)


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


def epoch_order(run: Run) -> list[tuple[Episode, ...]]:
    """This epoch's batches: a pure function of tasks, seed and epoch."""
    args = run.args
    batches = epoch_batches(
        run.training,
        seed=args.seed,
        epoch=run.state.epoch,
        batch_size=args.batch_size,
        views=args.views,
        max_cells=args.max_cells,
    )
    return batches[: args.max_batches or None]


def window_size(grad_accum: int, first: int, count: int) -> int:
    """Batches whose gradients one optimizer step sums up, from batch `first` of an epoch of `count` on: fewer at its
    end."""
    return min(grad_accum, count - first)


def progress(run: Run, batches_per_epoch: int) -> float:
    """Share of the run that is over, for the learning rate: of its batches, or of its time budget if that is
    further."""
    return max(run.state.step / max(1, run.args.epochs * batches_per_epoch), run.budget.share(run.state.step))


def padding(batch: TrainBatch) -> dict[str, int]:
    """Real and processed cells of the batch's agent passes."""
    counts = [part.cell_counts() for part in (batch.query, *batch.feedback)]
    return {"cells": sum(real for real, _ in counts), "cells_processed": sum(processed for _, processed in counts)}


def memory_row(run: Run) -> dict[str, Any]:
    return {
        "memory.size": len(run.memory),
        "memory.updates": run.state.memory_updates,
        "memory.offers": run.state.memory_offers,
        "memory.threshold": run.fixes.threshold.get_threshold(),
    }


# ====================================================================================================================
# Validation
# ====================================================================================================================


def validate(run: Run) -> dict[str, SplitReport]:
    """Predict and score every chosen split. Under --time_budget in the time that is left (half of it, if all test
    inputs have to be predicted for --submission afterwards)."""
    deadline = run.budget.deadline
    if run.args.submission and math.isfinite(deadline):
        deadline -= max(0.0, deadline - time.monotonic()) / 2
    return score_splits(predict_splits(run, run.splits, deadline), LABELS, run.log)


def headline(reports: Mapping[str, SplitReport], state: TrainState) -> tuple[float, float]:
    """Validation accuracy and accuracy delta of the first split, which decide the best checkpoints; what stood before
    where nothing was scored."""
    for report in reports.values():
        return report.score.pair_accuracy, report.delta
    return state.val_accuracy, state.accuracy_delta


def predict_splits(
    run: Run, splits: Sequence[Split], deadline: float, *, show: bool = True
) -> dict[str, list[PairPrediction]]:
    """Predict the splits under the averaged weights by `deadline` (inf: every view of every pair), each in its share of
    the time; write the attempts as JSON into the run's folder, and, if they are to `show`, what the report draws."""
    assert run.log.folder is not None
    was_training = run.agent.training
    for module in run.modules.values():
        module.eval()
    predicted: dict[str, list[PairPrediction]] = {}
    with run.average.applied() if run.average else contextlib.nullcontext():
        for number, split in enumerate(splits):
            left = sum(each.pairs for each in splits[number:])
            share = split.pairs / max(1, left)
            until = time.monotonic() + share * (deadline - time.monotonic()) if math.isfinite(deadline) else deadline
            pairs = predicted[split.name] = predict_split(run, split, until)
            if math.isfinite(deadline):
                run.log(f"{split.name} split: {views_reached(pairs)} of {run.args.val_views} in the time that was left")
            keep_attempts(run.log.folder, split, pairs, run.log)
            if show:
                keep_predictions(run.log.folder, split.name, pairs, step=run.state.step, log=run.log)
            if run.log.events is not None and split.name in run.args.val_splits:
                run.log.events.pictures(split.name, run.state.step, pairs)
    for module in run.modules.values():
        module.train(was_training)
    return predicted


def predict_split(run: Run, split: Split, deadline: float = math.inf) -> list[PairPrediction]:
    """Predict every test pair of the split's tasks. With a deadline *anytime*: the evidence's answer for every pair
    first, then the agent's views in rounds over all pairs until the time is up."""
    args, tasks, views = run.args, split.tasks, evaluation_views(run.args.val_views)
    data = PredictionData(
        tasks,
        run.store,
        run.qwen.encoder,
        views=views,
        feedback_pairs=args.feedback_pairs,
        folds=args.refine_steps > 1,
    )
    order = prediction_order(tasks, views=len(views), max_cells=4 * args.max_cells)
    workers, pin = worker_count(args.workers), run.device.type == "cuda"

    def load(source: Dataset, keys: Sequence[Any], what: str) -> Any:
        loader = make_loader(source, keys, workers=workers, pin_memory=pin)
        return run.log.bar(batches_of(loader), total=len(keys), desc=f"{what} {split.name}", unit="batch")

    predict = functools.partial(predict_batch, run, torch.tensor(split.numbers), {})
    if not math.isfinite(deadline):
        return predict_tasks(tasks, load(data, order, "predicting"), predict, run.store)
    known = answers_in_time(tasks, load(Prepared(tasks, run.store), order, "evidence of"), run.store, deadline)
    batches = until(load(data, rounds_of(order, len(views)), "predicting"), deadline)
    return predict_tasks(tasks, batches, predict, run.store, known)


PromptsOfTasks = dict[tuple[int, ...], tuple[Tensor, Tensor, list[bool]]]


@torch.no_grad()
def predict_batch(run: Run, numbers: Tensor, known: PromptsOfTasks, fetched: PredictionBatch) -> BatchPrediction:
    """The agent's output under the unrefined and the refined prompt; the policy takes the mean of its action.

    numbers: of all tasks being predicted, the number that the memory knows each by (`Split.numbers`). known: prompts of
    earlier rounds, by the positions of a batch's tasks; a batch without demonstrations to try takes them from there."""
    run.stop.check()
    positions = tuple(fetched.task.tolist())
    batch = dataclasses.replace(fetched, task=numbers[fetched.task]).to(run.device)
    with run.precision.autocast(run.device):
        if positions not in known or batch.trial:
            prompt, _ = read_prompt(run, batch)
            trusted = beats_evidence(run.agent, prompt, batch.trial).tolist()
            refined = prompt if run.args.no_policy else refine_for_test(run, batch, prompt)
            known[positions] = prompt, refined, trusted
        prompt, refined, trusted = known[positions]
        passes = []
        for query in batch.query:
            before = run.agent(query, prompt)
            passes.append((query, before, before if refined is prompt else run.agent(query, refined)))
    return BatchPrediction(passes, trusted)


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


@torch.no_grad()
def held_out_loss(agent: GridAgent, prompt: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
    """(P,) mean cross-entropy under prompt (P, K, D) of the demonstrations held out, one for each prompt."""
    total = torch.zeros(len(prompt), device=prompt.device)
    for query in pairs:
        total.index_add_(0, query.owner, agent(query, prompt).pair_loss(query))
    return total


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
            "threshold": run.fixes.threshold.state_dict(),
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


def save_checkpoint(run: Run, *, wait: bool = False) -> None:
    """Save now. metrics decide the best models: accuracy delta and validation accuracy of the last validation."""
    assert run.persistence is not None
    metrics = {"accuracy_delta": run.state.accuracy_delta, "val_accuracy": run.state.val_accuracy}
    run.persistence.save(
        checkpoint_tree(run), step=run.state.step, metrics=metrics, wait=wait, frozen=frozen_parts(run)
    )


def load_checkpoint(persistence: ModelPersistence, which: str) -> Checkpoint:
    """latest, best or a path, verified. UserError for one that this version of the program did not write."""
    checkpoint = persistence.load(which)
    found = checkpoint.state.get("extra", {}).get("format", 1)
    if found != CHECKPOINT_FORMAT:
        raise UserError(
            f"--resume: {checkpoint.path.name} was written by another version of this program (checkpoint format "
            f"{found}, here {CHECKPOINT_FORMAT}); continue it with that version, or start a new run"
        )
    return checkpoint


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a built run. Order: weights, optimizer and scaler, state, random generators last."""
    tree, extra = checkpoint.state, checkpoint.state["extra"]
    same = all(extra["data"][key] == run.trained_on[key] for key in ("data", "training"))
    if not same and run.training:  # with nothing to train, the checkpoint's model may predict anything
        raise UserError("--resume: the checkpoint was made with other data; give the same --data")
    if (saved := saved_base(checkpoint)) and run.qwen.base and (problem := run.qwen.base.differs_from(saved)):
        raise UserError(f"--resume: {problem}")
    for name, part in saved_parts(run).items():
        try:
            part.load_state_dict(tree["model"][name])
        except (KeyError, RuntimeError) as error:  # other shapes: --eval_only with another --qwen
            raise UserError(f"--resume: the checkpoint's {name} does not fit the model that is built here") from error
    if checkpoint.frozen:
        run.qwen.backbone.load_state_dict({name.partition("/")[2]: t for name, t in checkpoint.frozen.items()})
    if not run.args.eval_only:  # nothing is trained; the moments may be of a package that is not here
        run.optimizer.load_state_dict(tree["optim"]["optimizer"])
    if tree["optim"]["scaler"]:  # empty where the loss was not scaled: then a scaler here starts afresh
        run.scaler.load_state_dict(dict(tree["optim"]["scaler"]))
    if run.average is not None:
        run.average.load_state_dict(tree["optim"]["average"])
    run.fixes.threshold.load_state_dict(extra["threshold"])
    run.state = TrainState(**extra["state"])
    restore_rng(extra["rng"])


def saved_base(checkpoint: Checkpoint | None) -> Base | None:
    """The weights that the checkpoint's adapter belongs to, if it has one."""
    recipe = checkpoint.state["extra"].get("lora", {}).get("qwen") if checkpoint else None
    return Base(**recipe["base"]) if recipe else None


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
    validated = ", ".join(f"{split.pairs} test pairs of {len(split.tasks)} {split.name} tasks" for split in run.splits)
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 1 (a checkpoint or the submission could not be written, a worker was
    lost), 2 (the user can mend it), 3 (a red flag under --strict), 128 + n (signal n). Also called from notebook cells:
    main(["--epochs", "1"]), which therefore ends without an exception for --help, for wrong flags and for Stop, and
    leaves nothing locked."""
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
    log = RunLog(quiet=args.quiet)
    persistence, checkpoint = None, None
    try:
        if args.print_config:
            return print_config(args, given)
        folder, which = open_run_folder(args, find_newest_run)
        if which is not None:
            persistence = open_persistence(args, folder, log)
            checkpoint = load_checkpoint(persistence, which)
            adopt_flags(args, given, checkpoint)
            if problems := problems_of_all(args):
                raise UserError("; ".join(problems))
        args.output_dir = str(folder)
        with quiet_downloads() if args.quiet else contextlib.nullcontext():
            run = build_run(args, log, started, checkpoint)
        if checkpoint is not None:
            restore(run, checkpoint)
        if persistence is None:
            persistence = open_persistence(args, folder, log)
    except (UserError, PersistenceError) as problem:
        # For what the user can mend, with one line that says what and where. Anything else shows its traceback.
        if persistence is not None:
            persistence.close()
        log(f"error: {problem}", error=True)
        return 2
    except BaseException:  # in a notebook the process lives on: it must not keep the run's lock
        if persistence is not None:
            persistence.close()
        raise
    run.persistence = persistence
    children = multiprocessing.active_children()
    try:
        with persistence, contextlib.closing(log):
            code = run_command(run, checkpoint)
    except PersistenceError as problem:  # the last background write failed
        log(f"error: {problem}", error=True)
        return 1
    finally:
        end_workers(children)
    if code in (0, 1, 3) and (args.report or not args.eval_only):  # not when interrupted
        try_report(folder, log)
    return code


def open_persistence(args: Flags, folder: Path, log: RunLog) -> ModelPersistence:
    """The run's checkpoints; UserError if its folder cannot be made."""
    try:
        return ModelPersistence(
            folder, keep=args.keep, backup_dir=args.backup_dir, backup_quota_gb=args.backup_quota_gb, log=log
        )
    except OSError as problem:
        raise UserError(f"--output_dir: cannot write {folder}: {problem.strerror}") from problem


def run_command(run: Run, checkpoint: Checkpoint | None) -> int:
    """Train or evaluate, with the run's folder open; always saves what was trained. Returns the exit code."""
    rows = 0 if checkpoint is None else int(checkpoint.state["extra"]["rows"])
    # An evaluation may be of any checkpoint: its step would stand out of order among the events of the training.
    events = None if run.args.no_tensorboard or run.args.eval_only else open_events
    run.log.open(Path(run.args.output_dir or "."), rows=None if run.args.eval_only else rows, open_events=events)
    describe(run)
    if checkpoint is not None:
        run.log(f"Resumed from {checkpoint.path.name}: epoch {run.state.epoch}, batch {run.state.batch}")
    try:
        with run.stop.listening():
            return evaluate(run) if run.args.eval_only else train_and_submit(run)
    except Interrupted as stop:
        code = 128 + int(stop.args[0])
    except RedFlag:
        code = 3
    except PersistenceError as problem:
        run.log(f"error: {problem}", error=True)
        return 1
    except WorkerLost as problem:
        run.log(f"error: {problem}", error=True)
        code = 1
    if not run.args.eval_only:  # else nothing was trained
        try:
            save_checkpoint(run, wait=True)
        except PersistenceError as problem:
            run.log(f"error: {problem}", error=True)
            return 1
        run.log(f"Saved at epoch {run.state.epoch}, batch {run.state.batch}; continue with --resume")
    return code


def train_and_submit(run: Run) -> int:
    """Train to the end; with --submission predict every task of the data. Returns the exit code."""
    write_config(run)
    train(run)
    assert run.persistence is not None
    run.persistence.wait()  # what it saved last is on disk before the run is called done
    run.log(f"Done: {run.state.step} batches, {run.state.queries} queries in {run.budget.elapsed():.1f}s")
    if not run.args.submission:
        return 0
    splits = splits_by_content(all_tasks(run.data), run.trained_on["inputs"])
    return submit(
        run.args.submission, predict_splits(run, splits, run.budget.deadline, show=False), all_tasks(run.data), run.log
    )


def evaluate(run: Run) -> int:
    """--eval_only: predict and score what was asked for. Returns the exit code."""
    predicted = predict_splits(run, run.splits, run.budget.deadline)
    reports = score_splits(predicted, LABELS, run.log)
    log_validation(
        run.log, run.state.trained_epoch, run.state.step, reports, LABELS, run.args.val_splits, memory_row(run)
    )
    return submit(run.args.submission, predicted, all_tasks(run.data), run.log) if run.args.submission else 0


if __name__ == "__main__":
    exit_code = main()
    if ipython_shell() is None:  # else %run, or this file pasted into a cell: there SystemExit is shown as an error
        sys.exit(exit_code)
