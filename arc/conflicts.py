"""Flags that do not go together, or not with this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from arc.device import resolve_device, resolve_precision
from arc.generate import GENERATED
from arc.lora import problem_with_peft
from arc.optim import problem_with_eight_bit
from arc.parallel import place
from arc.qwen import Tune
from arc.run.files import UserError, cannot_write, cannot_write_file
from arc.run.folder import is_of_a_run
from arc.splits import DEV_SPLITS


class Settings(Protocol):
    """The flags that are looked at."""

    data: str
    extra_data: str | None
    config: str | None
    tasks: int
    queries: int
    unseen: str
    augment: str
    views: int
    batch_size: int
    agent_width: int
    agent_heads: int
    val_splits: tuple[str, ...]
    val_limit: int
    adapt: bool
    dev: bool
    task_latent: bool
    device: str
    amp: str
    fsdp: bool
    qwen_tune: Tune
    optim_qwen: str
    ablate: tuple[int, ...]
    eval_only: bool
    resume: str | None
    submission: str | None
    output_dir: str | None
    cache_dir: str
    backup_dir: str | None


def conflicts(args: Settings) -> list[str]:
    """Problems between flags, or with this machine, that can be known before anything is built."""
    splits, own, heads = set(args.val_splits), set(DEV_SPLITS), 4 * args.agent_heads
    starting = not args.resume  # else the checkpoint's --adapt and --dev hold
    found = [
        (
            args.agent_width % heads,
            f"--agent_width {args.agent_width} is not a multiple of 4 * --agent_heads ({heads})",
        ),
        (
            args.adapt and "unseen" in splits,
            "--val_splits unseen: with --adapt nothing is unseen; adapted is the split that is trained on",
        ),
        (
            args.adapt and args.dev,
            "--adapt trains on evaluation tasks, --dev on nothing but a part of the training tasks",
        ),
        (
            args.data == GENERATED and (args.adapt or args.dev),
            "--data generated draws pairs anew and holds tasks back by itself; --adapt and --dev go with other data",
        ),
        (
            args.data == args.unseen == GENERATED and args.augment != "none",
            f"--augment {args.augment}: turned or recoloured, a generated task may be one of those held back",
        ),
        (
            starting and args.data != GENERATED and "families" in splits,
            "--val_splits families goes with --data generated",
        ),
        (args.task_latent and not args.tasks and args.data == GENERATED, "--task_latent: --tasks 0 has no task twice"),
        (starting and "adapted" in splits and not args.adapt, "--val_splits adapted needs --adapt"),
        (
            starting and (splits - own if args.dev else splits & own),
            "--val_splits dev_unseen,dev_seen, and no others, go with --dev",
        ),
        (
            args.submission is not None and args.eval_only and args.val_limit,
            "--submission needs every task; leave out --val_limit",
        ),
        (args.views > args.batch_size, f"--views {args.views} do not fit in --batch_size {args.batch_size}"),
        (
            starting and (args.data == GENERATED or args.extra_data) and args.queries > args.batch_size,
            f"--queries {args.queries} do not fit in --batch_size {args.batch_size}",
        ),
        (args.eval_only and starting, "--eval_only needs --resume (latest, best or a checkpoint's path)"),
    ]
    problems = [problem for wrong, problem in found if wrong]
    try:
        problems += problems_of_all(args)
    except UserError as error:
        problems.append(str(error))
    problems += in_the_way(args)
    if args.submission is not None and (problem := cannot_write_file(Path(args.submission))):
        problems.append(f"--submission: {problem}")
    for name in ("output_dir", "cache_dir", "backup_dir"):
        folder = getattr(args, name)
        if folder is not None and (problem := cannot_write(Path(folder))):
            problems.append(f"--{name}: {problem}")
    return problems


def in_the_way(args: Settings) -> list[str]:
    """What would be written where something else is read or written."""
    read = {name: getattr(args, name) for name in ("data", "unseen", "extra_data", "config")}
    places = {name: _resolved(value) for name, value in read.items() if value and os.path.exists(value)}
    written = {"output_dir": args.output_dir or "runs"}
    written |= {name: getattr(args, name) for name in ("backup_dir", "cache_dir", "submission")}
    targets = {name: _resolved(value) for name, value in written.items() if value is not None}
    problems = [
        f"--{name}: {target} lies in --{source}, where it would be read as tasks"
        for name, target in targets.items()
        for source, place in places.items()
        if place.is_dir() and place in (target, *target.parents)
    ]
    run = targets["output_dir"]
    if args.backup_dir is not None:
        backup = targets["backup_dir"]
        if args.output_dir is not None and backup == run.parent:
            problems.append(f"--backup_dir: {args.backup_dir} is the folder that holds the run itself")
        if not os.path.isdir(backup.parent):
            problems.append(f"--backup_dir: {backup.parent} is not there (a drive that is not mounted?)")
    if args.submission is not None:
        file = targets["submission"]
        problems += [f"--submission would replace --{name}" for name, place in places.items() if file == place]
        if args.output_dir is not None and (file == run or file in run.parents):
            problems.append(f"--submission: {args.submission} is the folder of the run, or holds it; name a file")
        if is_of_a_run(file, run):
            problems.append(f"--submission: {args.submission} is a file that a run keeps; name another")
    return problems


def _resolved(path: str) -> Path:
    """Without links, as far as they can be followed: one that leads to itself is refused where it is opened."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError):  # RuntimeError: Python 3.11's word for such a link
        return Path(os.path.abspath(path))


def problems_of_all(args: Settings) -> list[str]:
    """Problems that a checkpoint's flags may bring as well; one line each. UserError for a device that is not there."""
    device, ablated = resolve_device(args.device), 1 in args.ablate
    eight_bit = args.optim_qwen == "adamw8bit" and not args.eval_only and not ablated
    found = [
        problem_with_peft() if args.qwen_tune == "lora" and not ablated else None,
        problem_with_eight_bit(device) if eight_bit else None,
    ]
    if args.fsdp and place().size == 1:
        found.append("--fsdp divides Qwen among several processes: start it with torchrun, or leave it out")
    if args.fsdp and resolve_precision(args.amp, device).scale_loss:
        found.append("--fsdp computes in bf16 or fp32: --amp bf16, or --amp off")
    if args.fsdp and (args.qwen_tune != "full" or ablated or args.optim_qwen == "adamw8bit"):
        found.append("--fsdp divides a Qwen that trains whole: --qwen_tune full --optim_qwen adamw, without --ablate 1")
    if args.dev and args.submission is not None:
        found.append("--submission predicts test inputs, which --dev keeps away from")
    return [problem for problem in found if problem]
