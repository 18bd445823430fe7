"""Which folder a command works in, and which checkpoint it continues from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from arc.run.files import UserError, cannot_look, one_line


class Place(Protocol):
    """The flags that decide it."""

    resume: str | None
    output_dir: str | None
    backup_dir: str | None
    eval_only: bool


def refuse_a_used(folder: Path) -> None:
    """UserError if there are checkpoints in the folder in which a new run is to begin."""
    if folder.is_dir() and any(folder.glob("step-*")):
        raise UserError(
            f"--output_dir: {folder} holds a run already; continue it with --resume or choose another folder"
        )


@contextlib.contextmanager
def usable(checkpoint: str) -> Iterator[None]:
    """While a checkpoint is taken over: its bytes are as they were written, but whoever wrote them may have written
    anything, so what does not fit is the checkpoint's fault (UserError)."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        what = one_line(f"{type(problem).__name__}: {problem}")[:300]
        raise UserError(f"--resume: {checkpoint} does not hold what a run of this version writes ({what})") from problem


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
    elif problem := cannot_look(Path(which)):
        raise UserError(f"--resume: {problem}")
    elif (Path(which) / "manifest.json").is_file():
        found = Path(args.output_dir) if args.output_dir else Path(which).absolute().parent
        if args.eval_only:  # the checkpoint is only read, wherever it lies; logs and predictions go to --output_dir
            return found, which
        if Path(which).absolute().parent.resolve() != found.resolve() and not any(found.glob("step-*")):
            return found, which
    else:  # a run's folder is as good as its name under --output_dir
        found, which = Path(which), "latest"
        if args.output_dir and Path(args.output_dir).resolve() != found.resolve():
            refuse_a_used(Path(args.output_dir))
            return Path(args.output_dir), str(newest_checkpoint(found))
    if not args.backup_dir and not any([*found.glob("step-*"), *found.glob("best-*")]):
        if which not in ("latest", "best"):
            raise UserError(f"--resume: {which} is not a checkpoint of the run in --output_dir {found}")
        raise UserError(f"--resume: no checkpoint in {found}")
    return found, which
