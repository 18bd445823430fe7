"""The backup: a mirror of the newest and the best checkpoints.

backup_dir/<run>/step-…/ as in the run (no links: frozen tensors in blobs/ only), the newest and the best ones, and
copies of config.json, metrics.jsonl and train.log. A checkpoint there is complete when its manifest is: the manifest
is written last and deleted first. ledger.json says what this module has put there and how much it takes.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from arc.persistence.files import (
    FileSpec,
    chunks,
    is_own_folder,
    make_own_folder,
    open_regular,
    size_of,
    tree_size,
    truncate_and_unlink,
    write_file,
)  # fmt: skip
from arc.persistence.manifest import (
    Entry,
    blob_name,
    frozen_path,
    is_whole,
    read_manifest,
    scan,
)  # fmt: skip
from arc.persistence.names import BEST_METRICS, MANIFEST, OLD_NAME, STEP_NAME, Corrupt, PersistenceError, old_name
from arc.persistence.tree import dump_json, parse_json

SIDE_FILES = ("config.json", "metrics.jsonl", "train.log")
_LEDGER = "ledger.json"


class _NotCopied(Exception):
    """A checkpoint was rotated out while it was being mirrored, or is damaged: no fault of the backup folder."""


class Mirror:
    """Copies checkpoints to a folder that may be slow, late, full or gone, in a thread of its own.

    One pass at a time, always of the newest state; after a pass it rests `REST` times the processor time that the pass
    took, so that training loses less than 5 % even where every core is busy. An error is retried after 1, 2, 4 …
    `LONGEST_DELAY` seconds and the mirror gives up, loudly, after `RETRIES` failures in a row. Nothing here ever
    raises into training.
    """

    FIRST_DELAY, LONGEST_DELAY, RETRIES, REST = 1.0, 120.0, 10, 20.0
    CLOSE_WAIT = 20.0  # seconds that close() leaves for a last pass
    LATE_WAIT = 30.0  # seconds that a file may take to show its full length

    def __init__(self, run: Path, backup_dir: Path, quota: int, log: Callable[[str], None]) -> None:
        self._run, self._backup_dir, self._quota, self._log = run, backup_dir, quota, log
        self._root: Path | None = None
        self._begun: set[Path] = set()  # found free and taken, though the mount may have failed before the ledger was
        self._told: set[str] = set()
        self._state = threading.Condition()
        self._wanted = False  # a pass is due
        self._busy = False
        self._closing = False
        self.failed = False
        threading.Thread(target=self._loop, daemon=True, name="checkpoint-mirror").start()

    def request(self) -> None:
        """Asks for a pass; returns at once."""
        with self._state:
            self._wanted = True
            self._state.notify_all()

    def close(self) -> None:
        """Gives the last pass `CLOSE_WAIT` seconds; says so if the backup is not up to date then."""
        deadline = time.monotonic() + self.CLOSE_WAIT
        with self._state:
            self._closing = True
            self._state.notify_all()
            while (self._wanted or self._busy) and not self.failed:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._log(f"[Backup] {self._backup_dir} is too slow: the last checkpoint is only in {self._run}")
                    return
                self._state.wait(left)

    def _loop(self) -> None:
        failures = 0
        while True:
            with self._state:
                self._state.wait_for(lambda: self._wanted or self._closing)
                if not self._wanted:
                    return
                self._wanted, self._busy = False, True
            started = time.thread_time()
            try:
                self._pass()
                failures, pause = 0, self.REST * (time.thread_time() - started)
            except Exception as error:  # whatever a mount comes up with, training goes on
                failures += 1
                pause = min(self.FIRST_DELAY * 2 ** (failures - 1), self.LONGEST_DELAY)
                self._report(error, failures)
            with self._state:
                self._busy = False
                self.failed = failures >= self.RETRIES or (failures > 0 and self._closing)
                self._wanted = self._wanted or failures > 0
                self._state.notify_all()
                if self.failed:
                    return
                self._state.wait_for(lambda: self._closing, timeout=pause)  # close() cuts a rest short

    def _report(self, error: Exception, failures: int) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if failures >= self.RETRIES or self._closing:
            self._log(
                f"[Backup] WARNING: OFF after {failures} failure(s) in a row ({self._backup_dir}: {reason}). "
                f"Training goes on; its newest checkpoints are only in {self._run}"
            )
        elif failures == 1:
            self._log(f"[Backup] {self._backup_dir}: {reason}; trying again")

    def _once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._log(f"[Backup] {line}")

    # -- one pass -----------------------------------------------------------------------------------------------------

    def _pass(self) -> None:
        """Makes the backup hold the newest and the best checkpoints. Raises: OSError, PersistenceError."""
        wanted = self._plan()
        if not wanted:
            return
        root = self._choose_root(wanted[0].run)
        for rank, entry in enumerate(wanted):
            if entry.digest in {have.digest for have in self._complete(root)}:
                continue
            if not self._make_room(root, wanted, rank):
                size = f"{entry.bytes / 1e9:.2f} GB"
                self._once(f"no room for step {entry.step} ({size}) within {self._quota / 1e9:g} GB: not backed up")
                continue
            with contextlib.suppress(_NotCopied):
                self._copy(entry, root)
        self._drop_unwanted(root, wanted)
        for name in SIDE_FILES:
            self._copy_side_file(root, name)
        self._write_ledger(root, wanted[0].run)

    def _plan(self) -> list[Entry]:
        """What should be there, most wanted first; of several saves of a step, which have one name there, one."""
        newest = [entry for entry in scan(self._run)[0] if is_whole(entry)][:1]
        out: dict[int, Entry] = {entry.step: entry for entry in newest}
        for metric in BEST_METRICS:
            with contextlib.suppress(Corrupt, OSError):
                entry = read_manifest(self._run / f"best-{metric}")[1]
                out.setdefault(entry.step, entry)
        return list(out.values())

    def _choose_root(self, run_id: str) -> Path:
        """backup_dir/<run name>, or with ".2", ".3" … where that name already holds anything but this run's backup."""
        if self._root is not None and self._root.is_dir():
            return self._root
        if not self._backup_dir.is_dir():
            os.mkdir(self._backup_dir)  # not its parents: a mount that is gone must not be replaced by a local folder
        for root in backup_roots(self._backup_dir, self._run.name):
            owner = _run_of_backup(root)
            if owner == run_id or (owner is None and (root in self._begun or _is_free(root))):
                root.mkdir(exist_ok=True)
                self._begun.add(root)
                self._write_ledger(root, run_id)
                self._root = root
                return root
        raise PersistenceError(f"no free name for {self._run.name} in {self._backup_dir}")

    @staticmethod
    def _complete(root: Path) -> list[Entry]:
        """Checkpoints that are there with every file at its full length, newest first."""
        return [entry for entry in scan(root)[0] if _is_complete(root, entry)]

    def _make_room(self, root: Path, wanted: Sequence[Entry], rank: int) -> bool:
        """Deletes what is worth less than `wanted[rank]` until that fits; never the only complete checkpoint, and
        nothing at all if it would not fit even so."""
        entry = wanted[rank]
        short = self._used(root) - self._quota + (entry.own_bytes if _has_blob(root, entry) else entry.bytes)
        complete = {have.path.name: have for have in self._complete(root)}
        worth = {other.digest: len(wanted) - i for i, other in enumerate(wanted)}
        rows = []
        for name in filter(STEP_NAME.fullmatch, os.listdir(root)):
            have = complete.get(name)
            value = worth.get(have.digest, 0) if have else -1  # half copied: worth nothing
            if value < worth[entry.digest]:
                rows.append((value, have.sequence if have else 0, name, tree_size(root / name)))
        victims, left = [], len(complete)
        for _, _, name, size in sorted(rows):
            if short > 0 and (name not in complete or left > 1):
                left -= name in complete
                short -= size
                victims.append(name)
        if short > 0:
            return False
        for name in victims:
            self._delete(root / name)
        return True

    def _used(self, root: Path) -> int:
        """Bytes under the backup folder: counted for this run, by their ledgers for the others."""
        total = tree_size(root)
        for ledger in self._backup_dir.glob(f"*/{_LEDGER}"):
            if ledger.parent != root:
                total += _read_ledger(ledger)[1]
        return total

    def _copy(self, entry: Entry, root: Path) -> None:
        """Copies one checkpoint, its digests checked on the way, the manifest last.

        Raises: _NotCopied, OSError (of the backup), PersistenceError (what was written is not there).
        """
        target = root / f"step-{entry.step:09d}"
        with contextlib.ExitStack() as stack:
            try:  # opened before anything is copied: what is open survives rotation
                sources = {name: stack.enter_context(open_regular(entry.path / name))[0] for name in entry.files}
                blob = stack.enter_context(open_regular(frozen_path(entry)))[0] if entry.frozen else None
                manifest = stack.enter_context(open_regular(entry.path / MANIFEST))[0].readall()
            except (Corrupt, OSError):
                raise _NotCopied from None
            if entry.digest.encode() not in manifest[:100]:  # the folder was replaced: its files may be of two saves
                raise _NotCopied
            old = self._put_aside(target)
            target.mkdir()
            for name, source in sources.items():
                self._copy_checked(source, target / name, entry.files[name])
            if blob is not None and entry.frozen is not None and not _has_blob(root, entry):
                make_own_folder(root / "blobs")
                self._copy_checked(blob, root / "blobs" / blob_name(entry.frozen), entry.frozen)
            self._settled(target / MANIFEST, write_file(target / MANIFEST, [memoryview(manifest)], anew=False).size)
            if old is not None:
                self._delete(old)

    def _put_aside(self, target: Path) -> Path | None:
        """Makes room for another save of a step. A complete one moves to the name returned, where it counts until its
        successor is complete: it may be the only one."""
        if not target.exists():
            return None
        try:
            complete = _is_complete(target.parent, read_manifest(target)[1])
        except (Corrupt, OSError):
            complete = False
        if not complete:
            self._delete(target)
            return None
        old = target.with_name(old_name(target.name))
        os.rename(target, old)
        return old

    def _copy_checked(self, source: io.FileIO, target: Path, spec: FileSpec) -> None:
        if write_file(target, chunks(source), anew=False) != spec:
            self._once(f"{target.parent.name}: the local {target.name} does not match its manifest: not backed up")
            raise _NotCopied
        self._settled(target, spec.size)

    def _settled(self, target: Path, size: int) -> None:
        """Waits until the mount shows all that was written: some acknowledge what arrives late or never."""
        deadline = time.monotonic() + self.LATE_WAIT
        while size_of(target) != size:
            if time.monotonic() > deadline:
                raise PersistenceError(f"{target} did not keep what was written to it")
            time.sleep(0.2)

    def _drop_unwanted(self, root: Path, wanted: Sequence[Entry]) -> None:
        """Once the newest is there: everything else that is not wanted, half-copied folders and unused blobs."""
        complete = self._complete(root)
        if wanted[0].digest not in {entry.digest for entry in complete}:
            return
        # Another run's are not this one's to delete, should two have come to share a folder.
        ours = {w.digest for w in wanted}
        kept = [entry for entry in complete if entry.digest in ours or entry.run != wanted[0].run]
        names = {entry.path.name for entry in kept}
        for name in os.listdir(root):
            if (STEP_NAME.fullmatch(name) or OLD_NAME.fullmatch(name)) and name not in names:
                self._delete(root / name)
        blobs = {blob_name(entry.frozen) for entry in kept if entry.frozen}
        for path in (root / "blobs").glob("sha256-*") if is_own_folder(root / "blobs") else []:
            if path.name not in blobs:
                truncate_and_unlink(path)

    @staticmethod
    def _delete(folder: Path) -> None:
        """The manifest first, so that what is half deleted never looks complete."""
        for name in sorted(os.listdir(folder), key=lambda name: name != MANIFEST):
            truncate_and_unlink(folder / name)
        folder.rmdir()

    def _copy_side_file(self, root: Path, name: str) -> None:
        with contextlib.suppress(Corrupt), open_regular(self._run / name) as (source, size):
            if self._used(root) + size <= self._quota:
                write_file(root / f"{name}.part", chunks(source), anew=False)
                os.replace(root / f"{name}.part", root / name)

    def _write_ledger(self, root: Path, run_id: str) -> None:
        checkpoints = {
            entry.path.name: {"sequence": entry.sequence, "bytes": entry.bytes, "manifest": entry.digest}
            for entry in self._complete(root)
        }
        ledger = {"run": run_id, "updated": time.time(), "bytes": self._used(root), "checkpoints": checkpoints}
        write_file(root / f"{_LEDGER}.part", [memoryview(dump_json(ledger) + b"\n")], anew=False)
        os.replace(root / f"{_LEDGER}.part", root / _LEDGER)


def backup_roots(backup_dir: Path, name: str) -> Iterator[Path]:
    yield backup_dir / name
    for n in range(2, 100):
        yield backup_dir / f"{name}.{n}"


def _is_free(root: Path) -> bool:
    """Whether nothing is there, or an empty folder: in one of nobody's, every file may be somebody's."""
    if not os.path.lexists(root):
        return True
    return root.is_dir() and not os.listdir(root)


def _run_of_backup(root: Path) -> str | None:
    """Id of the run whose checkpoints are in a backup folder: by their manifests or, if none is whole, the ledger."""
    entries, _ = scan(root)
    return entries[0].run if entries else _read_ledger(root / _LEDGER)[0]


def _read_ledger(path: Path) -> tuple[str | None, int]:
    """(run id, bytes) of a ledger; (None, 0) if it is missing or damaged."""
    with contextlib.suppress(OSError, PersistenceError, KeyError, TypeError, ValueError):
        with open_regular(path) as (file, _):
            ledger = parse_json(file.read(1 << 20) or b"")
        return str(ledger["run"]), max(0, int(ledger["bytes"]))
    return None, 0


def _is_complete(root: Path, entry: Entry) -> bool:
    return is_whole(entry) and (not entry.frozen or _has_blob(root, entry))


def _has_blob(root: Path, entry: Entry) -> bool:
    return entry.frozen is not None and size_of(root / "blobs" / blob_name(entry.frozen)) == entry.frozen.size
