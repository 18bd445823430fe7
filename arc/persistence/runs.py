"""Finding runs and their backups, and looking at what is in a run folder."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from arc.persistence.files import names_in
from arc.persistence.manifest import read_checkpoint, read_manifest, scan
from arc.persistence.names import BEST_NAME, STEP_NAME, PersistenceError
from arc.persistence.say import say


@dataclass(frozen=True)
class CheckpointInfo:
    """One line of `inspect`. `kind` is step, best, quarantined or unfinished; `problem` is None if all is verified."""

    path: Path
    kind: str
    step: int | None
    metrics: dict[str, float]
    bytes: int
    created: float | None
    problem: str | None


def _kind_of(name: str) -> str | None:
    if STEP_NAME.fullmatch(name):
        return "step"
    if BEST_NAME.fullmatch(name):
        return "best"
    if name.startswith(".bad-"):
        return "quarantined"
    return "unfinished" if name.startswith((".tmp-", ".old-")) else None


def inspect_run(run: Path) -> list[CheckpointInfo]:
    """Everything in a run folder that is or was a checkpoint, each fully read and verified; changes nothing."""
    infos = []
    for name in sorted(os.listdir(run)):
        kind = _kind_of(name)
        if kind is not None and os.path.isdir(run / name):
            infos.append(_inspect_folder(run / name, kind))
    return infos


def _inspect_folder(folder: Path, kind: str) -> CheckpointInfo:
    entry, problem = None, None
    try:
        entry = read_manifest(folder)[1]
        read_checkpoint(folder, keep=False)
    except (PersistenceError, OSError) as error:
        problem = str(error)
    if entry is None:
        size = 0
        with contextlib.suppress(OSError):  # it may not be looked into, which `problem` says
            size = sum(path.lstat().st_size for path in folder.iterdir())
        return CheckpointInfo(folder, kind, None, {}, size, None, problem)
    return CheckpointInfo(folder, kind, entry.step, entry.metrics, entry.bytes, entry.created, problem)


def find_newest_run(runs_dir: str | os.PathLike[str] = "runs") -> Path | None:
    """The run folder under `runs_dir`, or linked there, with the most recent checkpoint; None if no run has one.

    A run that may not be looked into is passed over. Raises: PersistenceError if `runs_dir` itself may not be.
    """
    root, found = Path(runs_dir), []
    for name in names_in(root):
        with contextlib.suppress(PersistenceError):
            entries, broken = scan(root / name)
            if entries or broken:
                found.append((max((entry.created for entry in entries), default=0.0), name, root / name))
    return max(found)[2] if found else None


def setup_drive_backup(output_dir: str | os.PathLike[str]) -> str | None:
    """The folder on Google Drive for `backup_dir` when running on Colab, mounting Drive if that is possible.

    Mounting works only inside a notebook cell; a script run with `!python` finds a Drive that a cell has mounted.
    Elsewhere, or if Drive refuses: None, and one printed line that says why.
    """
    drive = Path("/content/drive/MyDrive")
    if not _on_colab():
        say("[Backup] none: not running on Colab, no Google Drive to mount (use --backup_dir for another folder)")
        return None
    if not drive.is_dir():
        try:
            from google.colab import drive as colab_drive  # type: ignore[import-not-found, unused-ignore]

            colab_drive.mount("/content/drive")
        except Exception as error:  # Colab raises many kinds, ValueError and AttributeError among them
            say(f"[Backup] none: Google Drive is not mounted ({error}); mount it in a cell with drive.mount")
            return None
    if not drive.is_dir():
        say(f"[Backup] none: {drive} did not appear after mounting")
        return None
    if Path(output_dir).resolve().is_relative_to(drive.resolve()):
        say(f"[Backup] none: {output_dir} is on Google Drive itself")
        return None
    return str(drive / "arc_backups")


def _on_colab() -> bool:
    return "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules


def human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
