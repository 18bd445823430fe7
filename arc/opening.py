"""What a run says of itself before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from arc.agent import GridAgent
from arc.device import Precision, describe_device
from arc.generate import GENERATED
from arc.optim import JointOptimizer
from arc.qwen import QwenPrompt
from arc.splits import Split
from arc.tasks import DataSet, Task


class Settings(Protocol):
    """The flags that are told."""

    data: str
    extra_data: str | None
    queries: int
    episodes: int
    views: int
    val_views: int
    save_every: int
    keep: int
    eval_only: bool
    output_dir: str | None
    epochs: int
    time_budget: float
    ablate: tuple[int, ...]
    old: bool


class Position(Protocol):
    """Where a training stands."""

    epoch: int
    batch: int


class Opening(Protocol):
    """The parts of a run that are told."""

    @property
    def args(self) -> Settings: ...

    qwen: QwenPrompt
    agent: GridAgent
    optimizer: JointOptimizer
    device: torch.device
    precision: Precision
    data: DataSet
    training: tuple[Task, ...]
    splits: tuple[Split, ...]

    @property
    def state(self) -> Position: ...


def opening_lines(run: Opening, checkpoint_bytes: int, *, events: bool) -> Sequence[str]:
    """Model, device and precision and why, agent, data, checkpoint size, folder. events: whether TensorBoard's are
    written."""
    args = run.args
    size = checkpoint_bytes / 2**20
    rates = ", ".join(f"{group} {rate:g}" for group, rate in sorted(run.optimizer.base_rates().items()))
    episodes = sum(len(task.train) for task in run.training)
    trained = f", {len(run.training)} training tasks, {episodes} episodes x {args.views} views" if episodes else ""
    drawn = f"{args.episodes} episodes an epoch x up to {args.queries} fresh queries"
    if args.eval_only:
        trained = ""
    elif args.data == GENERATED:
        trained = f", {len(run.training) or 'fresh'} training tasks, {drawn}"
    elif args.extra_data:
        trained += f"; extra: {args.extra_data}, {drawn}, never validated"
    validated = ", ".join(f"{split.pairs} test pairs of {len(split.tasks)} {split.name} tasks" for split in run.splits)
    return [
        run.qwen.description,
        describe_device(run.device, run.precision),
        f"{run.agent.description} | learning rates: {rates}",
        f"Data: {run.data.name}{trained}",
        f"Validation: {validated} with {args.val_views} views each",
        f"Checkpoint: {size:.1f} MiB every {args.save_every} batches, about {size * (args.keep + 2):.0f} MiB in all"
        if not args.eval_only
        else "Checkpoint: only read",
        f"Folder: {args.output_dir}" + (", with TensorBoard's events in it" if events else ""),
    ]


def resumed_lines(run: Opening, name: str, epochs: object) -> list[str]:
    """What is continued, and what another end makes of it. epochs: the checkpoint's --epochs."""
    lines = [f"Resumed from {name}: epoch {run.state.epoch}, batch {run.state.batch}"]
    if epochs != run.args.epochs and not (run.args.eval_only or run.args.time_budget):
        lines.append(
            f"--epochs {run.args.epochs}, where the checkpoint has {epochs}: learning rates follow the new end, so "
            "they jump from where they stood"
        )
    return lines


def summary_title(args: Settings, fixes: Mapping[int, str]) -> str:
    """What an epoch's summary calls the run: what of it is turned off, if anything. fixes: what stands in for each."""
    off = [f"fix {number}: {fixes[number]}" for number in args.ablate]
    off += [f"the {part}" for part in ("policy", "memory", "evidence") if getattr(args, f"no_{part}")]
    title = "without " + "; ".join(off) if off else "All 7 Problems Fixed"
    return f"the old settings: {title}" if args.old else title
