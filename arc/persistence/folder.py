"""How a checkpoint gets into a run folder; see "Commit order" in model_persistence.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from arc.persistence.files import (
    FileSpec,
    fsync_dir,
    image_of,
    make_own_folder,
    read_safetensors,
    remove_tree,
    removed_on_error,
    stream,
    write_file,
)  # fmt: skip
from arc.persistence.manifest import Cache, Entry, blob_name, file_of, read_cached, seal
from arc.persistence.names import FORMAT, FROZEN, MANIFEST, VERSION, Corrupt, PersistenceError, old_name
from arc.persistence.snapshot import Snapshot
from arc.persistence.tree import float_node


class RunFolder:
    """A run folder as its one writer sees it: the run's id, the number of its last save, and the moves by which
    checkpoints come in and go out, so that none is ever seen half there."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self.path = path
        self.log = log
        self.run_id = uuid.uuid4().hex
        self.adopted = False  # whether the id is that of checkpoints that were here
        self.sequence = 0
        self.cache: Cache = {}
        self._blobs = _Blobs(path / "blobs")

    def entry_of(self, folder: Path) -> Entry:
        """The entry of a checkpoint folder, read again only if it has changed. Raises: Corrupt, OSError."""
        return read_cached(folder, self.cache)

    def write(self, snapshot: Snapshot) -> Path:
        """Writes a checkpoint and moves it into place. Raises: OSError, PersistenceError."""
        tmp = self.path / f".tmp-{snapshot.step:09d}-{uuid.uuid4().hex}"
        final = self.path / f"step-{snapshot.step:09d}"
        self._check_space(snapshot)
        with removed_on_error(tmp):
            self._write_checkpoint(tmp, snapshot)
            self.move_in(tmp, final)
        return final

    def _check_space(self, snapshot: Snapshot) -> None:
        """Refuses a save that can't fit before a byte of it is written."""
        need = sum(image.size for image in snapshot.images.values()) + (1 << 20)
        if snapshot.frozen and self._blobs.known(snapshot.frozen) is None:
            need += image_of(snapshot.frozen).size
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise PersistenceError(f"it needs {need / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free")

    def _write_checkpoint(self, tmp: Path, snapshot: Snapshot) -> None:
        """Everything of a checkpoint, each file synced, the manifest last, then the folder."""
        frozen = self._blobs.store(snapshot.frozen) if snapshot.frozen else None
        os.mkdir(tmp)
        files = _write_groups(tmp, snapshot)
        if frozen is not None:
            with contextlib.suppress(OSError):  # without hard links the run's blobs folder is used
                os.link(self._blobs.path_of(frozen), tmp / FROZEN)
        write_file(tmp / MANIFEST, [memoryview(seal(self._manifest(snapshot, files, frozen)))])
        fsync_dir(tmp)

    def _manifest(self, snapshot: Snapshot, files: Mapping[str, FileSpec], frozen: FileSpec | None) -> dict[str, Any]:
        self.sequence += 1
        return {
            "format": FORMAT,
            "version": VERSION,
            "run": self.run_id,
            "step": snapshot.step,
            "sequence": self.sequence,
            "created": time.time(),
            "metrics": {name: float_node(value) for name, value in snapshot.metrics.items()},
            "files": {name: vars(spec) for name, spec in files.items()},
            "frozen": vars(frozen) if frozen else None,
            "aliases": snapshot.aliases,
            "tree": snapshot.tree,
        }

    def move_in(self, tmp: Path, final: Path) -> None:
        """Renames a finished folder into place. One that is there is moved aside first: killed in between, the next
        writer puts it back."""
        old = self.path / old_name(final.name)
        replaced = final.exists()
        if replaced:
            os.rename(final, old)
        try:
            os.rename(tmp, final)
        except BaseException:
            if replaced:
                os.rename(old, final)
            raise
        fsync_dir(self.path)
        if replaced:
            self.discard(old)

    def discard(self, folder: Path) -> None:
        """Deletes a checkpoint folder; its name goes first, so that no half-deleted one is ever seen."""
        trash = self.path / f".tmp-discarded-{uuid.uuid4().hex}"
        os.rename(folder, trash)
        self.sweep(trash)

    def sweep(self, path: Path) -> None:
        """Deletes what no longer counts. What cannot be deleted yet (held open on a network mount) is in nobody's way:
        the next writer tries again."""
        try:
            remove_tree(path)
        except OSError as error:
            self.log(f"[Checkpoint] {path.name} can't be deleted yet ({error.strerror})")

    def quarantine(self, folder: Path) -> None:
        """Sets a checkpoint that fails verification aside, where nothing here ever deletes it. Raises: OSError."""
        bad = self.path / f".bad-{folder.name.removeprefix('.old-')}-{uuid.uuid4().hex[:8]}"
        os.rename(folder, bad)
        fsync_dir(self.path)
        self.log(f"[Checkpoint] {folder.name} is set aside as {bad.name}")


def _write_groups(tmp: Path, snapshot: Snapshot) -> dict[str, FileSpec]:
    files = {}
    for group, image in snapshot.images.items():
        if snapshot.staged is None:
            parts: Iterable[memoryview] = stream(image)
        else:
            parts = (memoryview(image.header), snapshot.staged[group].numpy().data)
        files[file_of(group)] = write_file(tmp / file_of(group), parts)
    return files


class _Blobs:
    """Tensors that do not train, each set stored once under the digest of its file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: tuple[tuple[Any, ...], dict[str, torch.Tensor], FileSpec] | None = None

    def path_of(self, spec: FileSpec) -> Path:
        return self._folder / blob_name(spec)

    def known(self, frozen: Mapping[str, torch.Tensor]) -> FileSpec | None:
        """The blob of these very tensors, if this process has written or verified it and it is still there."""
        if self._last is None or self._last[0] != _stamp(frozen):
            return None
        spec = self._last[2]
        with contextlib.suppress(OSError):
            return spec if self.path_of(spec).lstat().st_size == spec.size else None
        return None

    def store(self, frozen: Mapping[str, torch.Tensor]) -> FileSpec:
        """Puts the tensors under the digest of their file, unless they are there already and undamaged."""
        known = self.known(frozen)
        if known is not None:
            return known
        make_own_folder(self._folder)
        image = image_of(frozen)
        digest = hashlib.sha256()
        for part in stream(image):
            digest.update(part)
        spec = FileSpec(image.size, digest.hexdigest())
        target = self.path_of(spec)
        try:
            read_safetensors(target, spec, keep=False)
        except Corrupt:  # missing or damaged
            tmp = self._folder / f".tmp-{uuid.uuid4().hex}"
            with removed_on_error(tmp):
                if write_file(tmp, stream(image)) != spec:
                    raise PersistenceError("frozen tensors changed while they were written") from None
                os.replace(tmp, target)
            fsync_dir(self._folder)
        self._last = (_stamp(frozen), dict(frozen), spec)  # holding the tensors keeps their addresses theirs
        return spec


def _stamp(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """Identity of a set of tensors: memory, version counter, type and shape of each."""
    return tuple((name, t.data_ptr(), t._version, t.dtype, t.shape) for name, t in tensors.items())  # noqa: SLF001 (no other way)
