"""Which folder a command works in, and which checkpoint it continues from."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from arc.run.files import UserError, cannot_look, one_line, replace_file


class Place(Protocol):
    """The flags that decide it."""

    resume: str | None
    output_dir: str | None
    backup_dir: str | None
    eval_only: bool


RECORDS = ("config.json", "metrics.jsonl", "report.html", "tensorboard", "predictions-*.json", "gallery-*.json")
LOGS = ("train.log", "metrics-before-resume.jsonl", "LOCK")


def holds_a_run(folder: Path) -> bool:
    """Whether there are checkpoints in it."""
    return folder.is_dir() and any([*folder.glob("step-*"), *folder.glob("best-*")])


def is_of_a_run(file: Path, run: Path) -> bool:
    """Whether the file is among those that `run`, or another run whose folder it is in, writes itself: its records, or
    a part of a checkpoint."""
    folder = file.parent
    of_checkpoint = any((parent / "manifest.json").is_file() for parent in (folder, *folder.parents[:2]))
    recorded = any(file.match(name) for name in (*RECORDS, *LOGS))
    return of_checkpoint or (recorded and (folder == run or os.path.lexists(folder / "train.log")))


def refuse_a_used(folder: Path) -> None:
    """UserError if a run, or an evaluation of another one, may not begin in the folder: there are checkpoints in it, or
    files that it would replace and that no run wrote, for a run begins with its `train.log`."""
    if holds_a_run(folder):
        raise UserError(
            f"--output_dir: {folder} holds a run already; continue it with --resume or choose another folder"
        )
    if folder.is_dir() and not os.path.lexists(folder / "train.log"):
        foreign = sorted(path.name for name in RECORDS for path in folder.glob(name))
        if foreign:
            raise UserError(
                f"--output_dir: {folder} has {', '.join(foreign[:3])}, which a run would replace; choose another folder"
            )


def write_config(folder: Path, flags: Mapping[str, Any]) -> None:
    """`config.json`, for people and for --config; a resume reads the checkpoint's own copy. UserError if that cannot
    be: nothing has been trained yet."""
    # Those two are of this command, not of its settings.
    content = json.dumps({**flags, "resume": None, "submission": None}, indent=2, allow_nan=False) + "\n"
    try:
        replace_file(folder / "config.json", content)
    except OSError as problem:
        raise UserError(f"--output_dir: cannot write {folder / 'config.json'}: {problem.strerror}") from problem


@contextlib.contextmanager
def usable(checkpoint: str) -> Iterator[None]:
    """While a checkpoint is taken over: its bytes are as they were written, but whoever wrote them may have written
    anything, so what does not fit is the checkpoint's fault (UserError)."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as problem:
        what = one_line(f"{type(problem).__name__}: {problem}")[:300]
        raise UserError(f"--resume: {checkpoint} does not hold what a run of this version writes ({what})") from problem


@contextlib.contextmanager
def memory_for_the_model() -> Iterator[None]:
    """While a run is built: UserError where there is no room for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        full = isinstance(problem, MemoryError) or any(f"{w} memory" in str(problem) for w in ("allocate", "out of"))
        if not full:
            raise
        raise UserError("no memory for such a model: a smaller --qwen, --agent_width or --memory_size") from problem


def open_run_folder(
    args: Place,
    find_newest_run: Callable[[str], Path | None],
    newest_checkpoint: Callable[[Path], Path],
    *,
    again: str | None = None,
) -> tuple[Path, str | None]:
    """`find_run_folder`, but again: the folder of a run that was started with the same command line before and was
    lost; it goes on from its latest checkpoint, or begins once more."""
    if again is not None and any(Path(again).glob("step-*")):
        return Path(again), "latest"
    return find_run_folder(args, find_newest_run, newest_checkpoint, again)


def find_run_folder(
    args: Place,
    find_newest_run: Callable[[str], Path | None],
    newest_checkpoint: Callable[[Path], Path],
    again: str | None,
) -> tuple[Path, str | None]:
    """The run's folder and, on resume, which checkpoint to continue from. UserError for what the user can mend.

    A checkpoint of another folder than --output_dir, or the newest of another run, is where a new run begins; nothing
    is written into the old folder, which may be read-only. find_newest_run: the newest run with a checkpoint below a
    folder, if there is one; newest_checkpoint: of a run's folder; again: where a new run without --output_dir begins.
    """
    if args.resume is None:
        folder = Path(args.output_dir or again or f"runs/arc_complete_{time.strftime('%Y%m%d_%H%M%S')}")
        refuse_a_used(folder)
        return folder, None
    which: str = args.resume
    if which in ("latest", "best"):
        found = Path(args.output_dir) if args.output_dir else find_newest_run("runs")
        if found is None and args.backup_dir and (mirrored := find_newest_run(args.backup_dir)):
            found = Path("runs") / mirrored.name  # a new machine: the checkpoints are fetched from the backup
        if found is None:
            raise UserError("--resume: no run with a checkpoint under runs/; give its folder with --output_dir")
    elif problem := cannot_look(Path(which) / "manifest.json"):  # the folder itself may be one that is not entered
        raise UserError(f"--resume: {problem}")
    elif (Path(which) / "manifest.json").is_file():
        found = Path(args.output_dir) if args.output_dir else Path(which).absolute().parent
        foreign = Path(which).absolute().parent.resolve() != found.resolve()
        if args.eval_only or (foreign and not holds_a_run(found)):  # it is only read, wherever it lies
            if foreign:  # what is written, logs and predictions at least, goes to --output_dir
                refuse_a_used(found)
            return found, which
    else:  # a run's folder is as good as its name under --output_dir
        found, which = Path(which), "latest"
        if args.output_dir and Path(args.output_dir).resolve() != found.resolve():
            refuse_a_used(Path(args.output_dir))
            return Path(args.output_dir), str(newest_checkpoint(found))
    if not args.backup_dir and not holds_a_run(found):
        if which not in ("latest", "best"):
            raise UserError(f"--resume: {which} is not a checkpoint of the run in --output_dir {found}")
        of_a_run = holds_a_run(found.parent)
        hint = f"; {found.parent} has others, that of the best validation only once one was scored" if of_a_run else ""
        raise UserError(f"--resume: no checkpoint in {found}{hint}")
    return found, which
