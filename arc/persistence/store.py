"""ModelPersistence: writes and reads the checkpoints of one run folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from arc.persistence.files import image_of, make_folder
from arc.persistence.folder import RunFolder
from arc.persistence.lock import RunLock
from arc.persistence.manifest import Checkpoint, is_linked, is_whole, read_checkpoint, read_manifest, scan, seal
from arc.persistence.mirror import Mirror
from arc.persistence.names import BEST_METRICS, Corrupt, FrozenMissing, PersistenceError
from arc.persistence.restore import restore
from arc.persistence.retention import Retention
from arc.persistence.runs import CheckpointInfo, human, inspect_run
from arc.persistence.say import say
from arc.persistence.snapshot import Snapshot, Stager
from arc.persistence.tree import Encoder
from arc.persistence.writer import Writer

_OPEN: weakref.WeakSet[ModelPersistence] = weakref.WeakSet()


class ModelPersistence:
    """Writes and reads the checkpoints of one run folder. model_persistence.py says what is promised.

    Args:
        output_dir: the run folder; created if missing.
        keep: number of step checkpoints that rotation leaves (the newest saves); the best ones do not count.
        backup_dir: folder (on Google Drive, say) under which the newest and the best checkpoints are mirrored.
        backup_quota_gb: how many GB (10^9 bytes) everything under `backup_dir` may take.
        background: write in a thread; `save` then returns once the state is copied to host memory.
        log: receives one line for everything a user should know of.
        read_only: touches nothing: no lock, no sweep, no quarantine, no backup.

    Raises: PersistenceError if the folder can't be used or another process writes to it.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        keep: int = 5,
        backup_dir: str | os.PathLike[str] | None = None,
        backup_quota_gb: float = 15.0,
        background: bool = True,
        log: Callable[[str], None] = say,
        read_only: bool = False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep: {keep} checkpoints can't be kept, give 1 or more")
        self.output_dir = Path(output_dir)
        self.background = background
        self.read_only = read_only
        self.backup_dir = Path(backup_dir) if backup_dir is not None else None
        if self.backup_dir is not None and self.backup_dir.resolve() == self.output_dir.resolve().parent:
            raise ValueError(f"backup_dir: {backup_dir} is the folder that holds the run itself")
        self._log_line = log
        self._owner = os.getpid()
        self._closed = False
        self._damaged: set[Path] = set()  # found by a load that moves nothing: set aside by the next save
        self._stager = Stager(self._log)
        self._writer = Writer()
        self._folder = RunFolder(self.output_dir, self._log)
        self._retention = Retention(self._folder, keep)
        self._mirror: Mirror | None = None
        self._lock: RunLock | None = None
        if read_only:
            if not os.path.isdir(self.output_dir):
                raise PersistenceError(f"{self.output_dir} is not a folder")
            return
        self._lock = self._take()
        _OPEN.add(self)
        if self.backup_dir is not None:
            self._mirror = Mirror(self.output_dir.absolute(), self.backup_dir, int(backup_quota_gb * 1e9), self._log)

    def _take(self) -> RunLock:
        """The run folder, made if missing, locked and tidied. Raises: PersistenceError."""
        try:
            make_folder(self.output_dir)
            lock = RunLock(self.output_dir, self._log)
            try:
                self._retention.tidy()
            except BaseException:
                lock.release()
                raise
            return lock
        except OSError as error:
            raise PersistenceError(f"{self.output_dir} can't be used: {error.strerror or error}") from error

    # -- saving -------------------------------------------------------------------------------------------------------

    @property
    def keep(self) -> int:
        """How many step checkpoints rotation leaves; may be set: what a resumed run keeps stands in its checkpoint."""
        return self._retention.keep

    @keep.setter
    def keep(self, number: int) -> None:
        self._retention.keep = number

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
        frozen: Mapping[str, torch.Tensor] | None = None,
        given: bool = False,
    ) -> None:
        """Saves a checkpoint; returns when the state may change again.

        Args:
            state: {"model": {name: tree}, "optim": tree, "extra": tree}, each written to a file of its own. A tree is
                nested dict (str or int keys) / list / tuple / Tensor / numpy array / int / float / bool / str / None.
            step: number of finished optimizer steps; a checkpoint of the same step is replaced, never lost.
            metrics: figures of this checkpoint; "accuracy_delta" and "val_accuracy" decide which is the best.
            wait: return only when it is on disk.
            frozen: tensors that do not train, stored once a run, named "<entry of model>/<tensor>"; they are
                recognised by memory and version counter, so change them through torch (not through `.data`).
            given: the tensors of `state` are this save's alone, and nobody changes them: they are not copied.

        Raises: PersistenceError if this save can't be made, or if the one before failed in the background (then this
            one has not been made: call again). The checkpoints saved earlier are intact in every case.
        """
        self._check_writer()
        self._writer.join()
        self._writer.raise_failure()
        self._set_aside()
        snapshot = self._stager.take(state, step, metrics or {}, frozen, copy=self.background and not given)
        if not self.background:
            self._commit(snapshot)
            return
        if (
            snapshot.staged is None and not given
        ):  # no room for a host copy: the live tensors must not change while they are written
            wait = True
        self._writer.start(lambda: self._commit(snapshot))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in flight. Raises: PersistenceError if one has failed."""
        self._writer.join()
        self._writer.raise_failure()

    def close(self) -> None:
        """Waits for the save in flight and frees the run. Raises: PersistenceError if a save has failed."""
        if self._closed:
            return
        self._writer.join()
        self._closed = True
        if self._mirror is not None:
            self._mirror.close()
        _OPEN.discard(self)
        if self._lock is not None:
            self._lock.release()
        self._stager.buffers.clear()
        self._writer.raise_failure()

    def __enter__(self) -> ModelPersistence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except PersistenceError as failure:
            if kind is None:
                raise
            self._log(f"[Checkpoint] {failure}")  # the error already on its way says more

    def _commit(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint and moves it into place; see "Commit order" in model_persistence.py."""
        saved = False
        try:
            final = self._folder.write(snapshot)
            saved = True
            self._retention.after_save(final)
        except (OSError, PersistenceError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            head = "is saved, but tidying up after it failed" if saved else "was not saved"
            raise PersistenceError(f"checkpoint of step {snapshot.step} {head}: {self.output_dir}: {reason}") from error
        finally:
            if saved and self._mirror is not None:
                self._mirror.request()

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, which: str | os.PathLike[str] = "latest", *, aside: bool = True) -> Checkpoint:
        """Loads a checkpoint, every byte verified first.

        "latest" is the newest save; "best" the one with the best accuracy_delta, else the best val_accuracy, else the
        latest. One that fails verification is quarantined and named in the log, and the next is tried. Anything else
        is the path of a checkpoint folder, which is loaded or refused.

        aside: False: quarantined by the next save only, so that a command that is refused meanwhile has changed
        nothing (unless the backup has to help out).

        Raises: PersistenceError if there is no valid one.
        """
        if not self.read_only and not self._closed:
            self.wait()
        if which not in ("latest", "best"):
            return self._load_path(Path(which))
        self._damaged.clear()
        tried = self._try_all(str(which))
        if aside or not isinstance(tried, Checkpoint):
            self._set_aside()
        if isinstance(tried, Checkpoint):
            if self._mirror is not None:
                self._mirror.request()  # a backup that was only named now: nothing may be saved any more
            return tried
        if not self.read_only and self.backup_dir is not None and restore(self._folder, self.backup_dir):
            self._retention.adopt()
            restored = self._try_all(str(which))
            self._set_aside()
            if isinstance(restored, Checkpoint):
                return restored
        problem = f"none of {tried} is valid" if tried else "there is none yet"
        raise PersistenceError(f"no checkpoint to load in {self.output_dir}: {problem}")

    def _try_all(self, which: str) -> Checkpoint | int:
        """The first checkpoint that is valid, or how many were tried."""
        tried = 0
        for folder in self._order(which):
            if folder in self._damaged:
                continue
            try:
                return read_checkpoint(folder)
            except FrozenMissing as error:
                self._log(f"[Checkpoint] {error}; trying an older one")
            except Corrupt as error:
                if folder.exists():
                    self._damaged |= {folder, *self._links_of(folder)}
                    self._log(f"[Checkpoint] {folder.name} is corrupt ({error}); trying an older one")
            except OSError as error:
                self._log(f"[Checkpoint] {folder} can't be read ({error.strerror}); trying an older one")
            tried += 1
        return tried

    def _links_of(self, folder: Path) -> set[Path]:
        """The folders that are the same checkpoint, with the same files under other names (a best one and its step):
        if one is damaged, so are they."""
        with contextlib.suppress(PersistenceError, OSError):
            entry = read_manifest(folder)[1]
            others = [*(each.path for each in scan(self.output_dir)[0]), *self._bests()]
            return {other for other in others if is_linked(entry, other)}
        return set()

    def _bests(self) -> list[Path]:
        return [path for metric in BEST_METRICS if os.path.isdir(path := self.output_dir / f"best-{metric}")]

    def _load_path(self, folder: Path) -> Checkpoint:
        try:
            return read_checkpoint(folder)
        except (Corrupt, OSError) as error:
            if isinstance(error, Corrupt) and not os.path.isdir(folder):
                raise PersistenceError(f"{folder} is not a checkpoint folder") from None
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise PersistenceError(f"{folder} can't be loaded: {reason}") from error

    def _order(self, which: str) -> list[Path]:
        """Folders to try, in turn. Those with a broken manifest come first, to be set aside by name."""
        entries, broken = scan(self.output_dir)
        latest = [*broken, *(entry.path for entry in entries)]
        bests = self._bests()
        if which == "best":
            if not bests:
                self._log("[Checkpoint] no best checkpoint yet: using the latest")
            return [*bests, *latest]
        return [*latest, *bests]  # a best one is older than nothing at all

    def _set_aside(self) -> None:
        """Quarantine what loads have found damaged; what is only read stays as it is. Raises: PersistenceError."""
        if self.read_only:
            return
        for folder in sorted(self._damaged):
            try:
                if folder.exists():
                    self._folder.quarantine(folder)
            except OSError as error:
                raise PersistenceError(f"{folder} is damaged and can't be set aside: {error.strerror}") from error
            self._damaged.discard(folder)

    def latest(self) -> Path | None:
        """The newest checkpoint whose manifest is sound and whose files have the right sizes, or None."""
        return next((entry.path for entry in scan(self.output_dir)[0] if is_whole(entry)), None)

    def best(self, metric: str = "accuracy_delta") -> Path | None:
        """The best checkpoint by "accuracy_delta" or "val_accuracy", or None. Raises: ValueError for another metric."""
        if metric not in BEST_METRICS:
            raise ValueError(f"metric: {metric!r} is not one of {', '.join(BEST_METRICS)}")
        with contextlib.suppress(OSError):
            entry = self._retention.best_entry(metric)
            return entry.path if entry else None
        return None

    # -- looking ------------------------------------------------------------------------------------------------------

    def inspect(self) -> list[CheckpointInfo]:
        """Everything in the run folder that is or was a checkpoint, each fully read and verified; changes nothing."""
        return inspect_run(self.output_dir)

    @staticmethod
    def estimate_bytes(state: Mapping[str, Any], frozen: Mapping[str, torch.Tensor] | None = None) -> int:
        """Bytes that one checkpoint of `state` takes on disk (a few hundred more for names and metrics), frozen
        tensors included, which are written once a run. Raises: PersistenceError for a state that can't be saved."""
        encoded = Encoder().encode(state, frozen)
        tensors = sum(image_of(group).size for group in encoded.tensors.values())
        return tensors + len(seal({"tree": encoded.tree, "aliases": encoded.aliases}))

    def space_warning(
        self, state: Mapping[str, Any], frozen: Mapping[str, torch.Tensor] | None = None, *, growth: int = 0
    ) -> str | None:
        """One line if what this run will keep does not fit on the disk, else None. Counted: `keep` checkpoints, two
        best ones that rotation has left behind, and one more while it is written; the frozen tensors once. growth:
        bytes by which `state` is going to grow (the moments of an optimizer that has made no step yet)."""
        one = self.estimate_bytes(state) + growth
        once = self.estimate_bytes(state, frozen) + growth - one
        need = one * (self.keep + len(BEST_METRICS) + 1) + once
        have = sum(entry.own_bytes for entry in scan(self.output_dir)[0])  # will be rotated out
        free = shutil.disk_usage(self.output_dir).free + have
        if need <= free:
            return None
        fits = (free - once) // one - len(BEST_METRICS) - 1
        advice = f"use --keep {fits}" if fits >= 1 else "free some space or choose another folder"
        return (
            f"WARNING: {self.keep} checkpoints of {human(one)}, the two best and one in the making need "
            f"{human(need)}, {self.output_dir} has {human(free)}: {advice}"
        )

    # -- small things -------------------------------------------------------------------------------------------------

    def _check_writer(self) -> None:
        if self.read_only:
            raise PersistenceError(f"{self.output_dir} was opened read-only")
        if self._closed:
            raise PersistenceError(f"{self.output_dir}: saving after close")
        if os.getpid() != self._owner:
            raise PersistenceError(f"{self.output_dir}: saving from a forked process")

    def forked(self) -> None:
        if self._lock is not None:
            self._lock.abandon()
        self._writer.forget()

    def _log(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe or notebook must not fail a save
            self._log_line(line)


def _after_fork() -> None:
    for persistence in list(_OPEN):
        persistence.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def newest_checkpoint(run: str | os.PathLike[str]) -> Path:
    """The checkpoint folder of the newest valid save in a run that is only read. PersistenceError if there is none."""
    return ModelPersistence(run, read_only=True).load("latest").path
