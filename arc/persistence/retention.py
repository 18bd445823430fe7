"""Which checkpoints stay: the newest, the best, and the frozen tensors that they need."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from arc.persistence.files import copy_file, fsync_dir, is_own_folder, removed_on_error
from arc.persistence.folder import RunFolder
from arc.persistence.manifest import Entry, blob_name, is_whole, scan
from arc.persistence.names import (
    BEST_METRICS,
    BLOB_NAME,
    FROZEN,
    MANIFEST,
    OLD_NAME,
    TMP_NAME,
    Corrupt,
)  # fmt: skip


class Retention:
    """Keeps the `keep` newest checkpoints of a run and the best by each metric, and clears up after a killed writer."""

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder = folder
        self._run = folder.path
        self.keep = keep

    def after_save(self, saved: Path) -> None:
        """Makes a new checkpoint the best where it is, and lets the oldest go. Raises: OSError, PersistenceError."""
        self._update_best(self._folder.entry_of(saved))
        self._prune()

    def best_entry(self, metric: str) -> Entry | None:
        """The best checkpoint by `metric`, None if there is no sound one. Raises: OSError if it can't be read."""
        with contextlib.suppress(Corrupt, FileNotFoundError):
            entry = self._folder.entry_of(self._run / f"best-{metric}")
            if math.isfinite(entry.metrics.get(metric, math.nan)) and is_whole(entry):
                return entry
        return None

    def _update_best(self, entry: Entry) -> None:
        """Makes `entry` the best where its metric is finite and strictly above the best so far."""
        for metric in BEST_METRICS:
            value = entry.metrics.get(metric, math.nan)
            if not math.isfinite(value):
                continue
            try:
                best = self.best_entry(metric)
            except OSError as error:  # it may be better than this one: it stays
                self._folder.log(f"[Checkpoint] best-{metric} can't be read ({error.strerror}): left as it is")
                continue
            if best is None or value > best.metrics[metric]:
                self._make_best(metric, entry)

    def _make_best(self, metric: str, entry: Entry) -> None:
        tmp = self._run / f".tmp-best-{uuid.uuid4().hex}"
        with removed_on_error(tmp):
            os.mkdir(tmp)
            for name in [*entry.files, *([FROZEN] if (entry.path / FROZEN).exists() else [])]:
                try:
                    os.link(entry.path / name, tmp / name)
                except OSError:  # no hard links here: a copy
                    copy_file(entry.path / name, tmp / name)
            copy_file(entry.path / MANIFEST, tmp / MANIFEST)  # its own: one damaged manifest must not be two
            fsync_dir(tmp)
            self._folder.move_in(tmp, self._run / f"best-{metric}")

    def _prune(self) -> None:
        """Leaves the `keep` newest step checkpoints, and the blobs that something still needs."""
        entries, broken = scan(self._run, self._folder.cache)
        whole = [entry for entry in entries if is_whole(entry)]  # a sound one is not pushed out by one without files
        for entry in whole[self.keep :]:
            self._folder.discard(entry.path)
        if len(whole) > self.keep:
            fsync_dir(self._run)
        if not broken:  # what those need can't be known
            self._prune_blobs(entries)
        for folder in broken:
            self._folder.log(f"[Checkpoint] {folder.name} can't be read: neither counted nor deleted")

    def _prune_blobs(self, entries: Sequence[Entry]) -> None:
        folder = self._run / "blobs"
        if not is_own_folder(folder) or any(name.startswith(".bad-") for name in os.listdir(self._run)):
            return
        bests = [entry for metric in BEST_METRICS if (entry := self.best_entry(metric)) is not None]
        kept = [entry for entry in entries if entry.path.exists()]
        needed = {blob_name(entry.frozen) for entry in [*kept, *bests] if entry.frozen}
        for name in os.listdir(folder):
            if BLOB_NAME.fullmatch(name) and name not in needed and (folder / name).lstat().st_nlink == 1:
                (folder / name).unlink()

    def tidy(self) -> None:
        """What a killed writer may have left: unfinished folders go, a replaced checkpoint without its replacement
        comes back, a best that was not yet made is made."""
        swept = 0
        for name in sorted(os.listdir(self._run)):
            path = self._run / name
            old = OLD_NAME.fullmatch(name)
            if old and not (self._run / old.group(1)).exists():
                os.rename(path, self._run / old.group(1))
            elif old or TMP_NAME.fullmatch(name):
                self._folder.sweep(path)
                swept += 1
        blobs = self._run / "blobs"
        for name in os.listdir(blobs) if is_own_folder(blobs) else []:
            if TMP_NAME.fullmatch(name):
                self._folder.sweep(blobs / name)
                swept += 1
        if swept:
            self._folder.log(f"[Checkpoint] swept {swept} unfinished item(s) from {self._run}")
        self.adopt()

    def adopt(self) -> None:
        """Goes on with the run that is in the folder: its id, its sequence numbers, its best checkpoints."""
        entries, _ = scan(self._run)
        bests = [entry for metric in BEST_METRICS if (entry := self.best_entry(metric)) is not None]
        # Best ones count too: after a quarantine they may be all that is left.
        for entry in sorted([*entries, *bests], key=lambda e: e.sequence):
            self._folder.run_id, self._folder.sequence, self._folder.adopted = entry.run, entry.sequence, True
            if is_whole(entry):
                self._update_best(entry)
