"""Checkpoints that never lose a run: crash-safe, verified before use, exact.

What is promised
    * A checkpoint that `save` has acknowledged (`wait` returned, or the next `save` did not raise) survives a kill at
      any instant and a power loss; a checkpoint that was being written is either wholly there or not there at all.
    * Nothing is loaded that differs in one bit from what was saved: every file has its size and SHA-256 in the
      manifest and the manifest has its own; what fails is set aside by name and the next older one is used.
    * Nothing that is loaded can run code: tensors are in safetensors files, everything else is strict JSON.
    * The tree that comes back is the tree that went in: key types, tuples, dtypes, ties, non-finite numbers.

Layout of a run folder
    LOCK                                     held by the one writer
    blobs/sha256-<hex>.safetensors           tensors that do not train, stored once, hard-linked into the checkpoints
    step-000000050/                          model.safetensors optim.safetensors extra.safetensors manifest.json
    best-accuracy_delta/ best-val_accuracy/  hard links to a step's files and a manifest of their own
    .tmp-…                                   unfinished or being deleted: swept by the next writer
    .old-<name>-<id>                         a checkpoint while its replacement is moved in; put back if that fails
    .bad-<name>-<id>                         quarantined: named in the log, never deleted by this module

Commit order
    write and fsync each file -> manifest, fsync -> fsync the folder -> rename -> fsync the parent -> best -> prune.
    There is no file that says which checkpoint is the latest: each manifest carries a sequence number that grows with
    every save of the run, and readers scan. (A step number would not do: after resuming from an older checkpoint the
    steps of the abandoned future are larger than those of the new saves.)

Use
    with ModelPersistence("runs/x", backup_dir=setup_drive_backup("runs/x")) as persistence:
        checkpoint = persistence.load("latest")                  # .state, .step, .metrics, .frozen
        state = {"model": {"agent": agent.state_dict()}, "optim": optimizer.state_dict(), "extra": {"epoch": 3}}
        persistence.save(state, step=150, metrics={"accuracy_delta": 0.02})
    python model_persistence.py inspect runs/x  |  verify runs/x  |  export runs/x DEST

What it does not promise: a disk that lies about fsync, two writers on a network folder that has no locks and clocks
that differ by minutes, or someone who edits a file *and* forges the digests.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows: the lock falls back to a heartbeat file
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "ModelPersistence",
    "PersistenceError",
    "export_best",
    "find_newest_run",
    "setup_drive_backup",
]

# ---------------------------------------------------------------------------------------------------------------------
# Names and limits
# ---------------------------------------------------------------------------------------------------------------------

FORMAT = "arc-checkpoint"
VERSION = 1
GROUPS = ("model", "optim", "extra")
BEST_METRICS = ("accuracy_delta", "val_accuracy")  # in the order in which load("best") prefers them
MANIFEST = "manifest.json"
FROZEN = "frozen.safetensors"

MAX_STEP = 999_999_999
MAX_MANIFEST_BYTES = 32 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_FILE_BYTES = 1 << 44
MAX_DEPTH = 64
MAX_INT_BITS = 4096  # Python refuses to parse decimal strings beyond 4,300 digits
CHUNK = 4 << 20  # large enough for the disk, small enough to be hashed while it is still in the cache

_STEP_NAME = re.compile(r"step-(\d{9})")
_BEST_NAME = re.compile(r"best-(" + "|".join(BEST_METRICS) + ")")
_OLD_NAME = re.compile(rf"\.old-({_STEP_NAME.pattern}|{_BEST_NAME.pattern})-[0-9a-f]{{32}}")
_TMP_NAME = re.compile(r"\.tmp-[0-9A-Za-z_.-]+")
_BLOB_NAME = re.compile(r"sha256-([0-9a-f]{64})\.safetensors")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_HEX = re.compile(r"[0-9a-f]{64}")
_ENVELOPE = re.compile(rb'\{"digest":"([0-9a-f]{64})","body":')  # the rest of a manifest is the body, "}" and "\n"

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class PersistenceError(RuntimeError):
    """A save, load or lock that failed; the message is one line that names the file or the place in the state."""


class _Corrupt(PersistenceError):
    """Content that fails verification: the checkpoint is set aside and an older one is tried."""


class _FrozenMissing(PersistenceError):
    """The blob of a checkpoint is gone or damaged: the checkpoint's own files may be fine, so it stays in place."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, all tensors on the CPU.

    `state` is the tree given to `save`; `frozen` the tensors given as `frozen`; `manifest` the parsed manifest.
    """

    state: dict[str, Any]
    step: int
    metrics: dict[str, float]
    path: Path
    manifest: dict[str, Any]
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)


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


# ---------------------------------------------------------------------------------------------------------------------
# State tree <-> (JSON nodes, named tensors)
#
# None, bool, str, int and finite float are JSON literals and a list is a JSON array; everything else is an object with
# exactly one key, so that no user dictionary can be mistaken for it:
#   {"f": "nan" | "inf" | "-inf"}   {"t": [tuple items]}   {"d": {str keys}}   {"m": [[int or str key, value], …]}
#   {"T": name} torch tensor        {"N": name} numpy array                    {"S": name} numpy scalar
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Encoded:
    """A state taken apart: `tree[group]` is a JSON node, `tensors[group]` what its names stand for, `aliases` maps
    "group/name" of a tied tensor to the "group/name" under which its bytes are stored."""

    tree: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


class _Encoder:
    """Walks a state once. Two leaves are tied when they are the same memory seen through the same shape and strides
    (a parameter and its detached twin are); other views of one storage are stored as values of their own."""

    def __init__(self) -> None:
        self.out = _Encoded()
        self._ids: dict[tuple[Any, ...], str] = {}

    def encode(self, state: Mapping[str, Any], frozen: Mapping[str, torch.Tensor] | None = None) -> _Encoded:
        if not isinstance(state, Mapping) or not state or any(key not in GROUPS for key in state):
            raise PersistenceError(f"state: expected a mapping with some of the keys {', '.join(GROUPS)}")
        for name, tensor in (frozen or {}).items():
            if not isinstance(tensor, torch.Tensor):
                raise _refused("frozen", (name,), f"a {type(tensor).__qualname__}, not a tensor")
        everything = {**state, "frozen": dict(frozen)} if frozen else dict(state)
        for group in (g for g in (*GROUPS, "frozen") if g in everything):
            self.out.tensors[group] = {}
            self.out.tree[group] = self._node(group, everything[group], ())
        return self.out

    def _node(self, group: str, value: Any, path: tuple[str | int, ...]) -> Any:
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            if value.bit_length() > MAX_INT_BITS:
                raise _refused(group, path, f"an integer of more than {MAX_INT_BITS} bits")
            return value
        if type(value) is float:
            return _float_node(value)
        if isinstance(value, torch.Tensor):
            return {"T": self._tensor(group, value, path)}
        if isinstance(value, np.ndarray):
            return {"N": self._array(group, value, path)}
        if isinstance(value, np.generic):
            return {"S": self._array(group, np.array(value), path, tie=False)}
        if len(path) >= MAX_DEPTH:
            raise _refused(group, path, f"nested deeper than {MAX_DEPTH} levels")
        if type(value) in (list, tuple):
            items = [self._node(group, item, (*path, i)) for i, item in enumerate(value)]
            return items if type(value) is list else {"t": items}
        if type(value) in (dict, OrderedDict):
            return self._mapping(group, value, path)
        raise _refused(group, path, f"a {type(value).__module__}.{type(value).__qualname__}")

    def _mapping(self, group: str, value: Mapping[Any, Any], path: tuple[str | int, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise _refused(group, path, f"a key of type {type(key).__qualname__}")
        pairs = [[key, self._node(group, item, (*path, key))] for key, item in value.items()]
        return {"d": dict(pairs)} if all(type(key) is str for key in value) else {"m": pairs}

    def _tensor(self, group: str, tensor: torch.Tensor, path: tuple[str | int, ...]) -> str:
        plain = tensor.detach()
        if type(plain) is not torch.Tensor or plain.layout is not torch.strided or plain.is_meta or plain.is_quantized:
            raise _refused(group, path, f"a {type(tensor).__qualname__} that is not a plain dense tensor")
        if plain.dtype not in _DTYPE_NAMES:
            raise _refused(group, path, f"a tensor of dtype {plain.dtype}")
        lazy = (plain.is_conj(), plain.is_neg())
        where = ("T", plain.device, plain.data_ptr(), plain.dtype, plain.shape, plain.stride(), lazy)
        return self._name(group, plain, path, where if plain.numel() else ("T", id(tensor)))

    def _array(self, group: str, array: np.ndarray, path: tuple[str | int, ...], tie: bool = True) -> str:
        if type(array) not in (np.ndarray, np.memmap) or not array.dtype.isnative:
            raise _refused(group, path, f"a {type(array).__qualname__} of dtype {array.dtype}")
        where = ("N", array.__array_interface__["data"][0], array.dtype, array.shape, array.strides)
        try:
            # A copy only where torch can't look at the memory: read-only, or with strides it does not know.
            tensor = torch.from_numpy(array if array.flags.c_contiguous and array.flags.writeable else array.copy("C"))
            known = tensor.dtype in _DTYPE_NAMES
        except TypeError:
            known = False
        if not known:
            raise _refused(group, path, f"a numpy array of dtype {array.dtype}")
        if not tie:  # made here, so its address may be used again
            return self._name(group, tensor, path, ("S", len(self._ids)))
        return self._name(group, tensor, path, where if array.size else ("N", id(array)))

    def _name(self, group: str, tensor: torch.Tensor, path: tuple[str | int, ...], where: tuple[Any, ...]) -> str:
        """Name of a leaf in its group's file, "a/0/b"; a leaf seen before becomes an alias of the first."""
        stem = "/".join(map(str, path)) or "value"
        name, n = stem, 1
        taken = self.out.tensors[group]
        while name in taken or f"{group}/{name}" in self.out.aliases or name == "__metadata__":
            n += 1
            name = f"{stem}~{n}"  # {0: …, "0": …} and {"a/b": …, "a": {"b": …}} have the same joined path
        if where in self._ids:
            self.out.aliases[f"{group}/{name}"] = self._ids[where]
        else:
            taken[name] = tensor
            self._ids[where] = f"{group}/{name}"
        return name


def _float_node(value: float) -> Any:
    return value if math.isfinite(value) else {"f": str(value)}


def _refused(group: str, path: tuple[str | int, ...], what: str) -> PersistenceError:
    place = "/".join([group, *map(str, path)])
    return PersistenceError(f"state: {place} is {what}; a checkpoint holds tensors, numbers, strings and containers")


class _Decoder:
    """Turns JSON nodes back into a state. Everything is checked: a manifest may have been written by anyone."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
        self._tensors = tensors  # "group/name" -> tensor
        self._aliases = aliases
        self._made: dict[tuple[str, str], Any] = {}
        self._used: set[str] = set()

    def decode(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        state = {group: self._value(group, node, 0) for group, node in tree.items()}
        unused = self._tensors.keys() - self._used
        if unused:
            raise _Corrupt(f"tensor {min(unused)!r} belongs to nothing in the manifest")
        return state

    def _value(self, group: str, node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _Corrupt("manifest: nested too deeply")
        if node is None or type(node) in (bool, str, int, float):
            return node
        if type(node) is list:
            return [self._value(group, item, depth + 1) for item in node]
        if len(node) != 1:
            raise _Corrupt("manifest: a node has more than one tag")
        ((tag, body),) = node.items()
        if tag in ("T", "N", "S") and type(body) is str:
            return self._leaf(tag, f"{group}/{body}")
        if tag == "f" and type(body) is str and body in ("nan", "inf", "-inf"):
            return float(body)
        if tag == "t" and type(body) is list:
            return tuple(self._value(group, item, depth + 1) for item in body)
        if tag == "d" and type(body) is dict:
            return {key: self._value(group, item, depth + 1) for key, item in body.items()}
        if tag == "m" and type(body) is list:
            return self._pairs(group, body, depth)
        raise _Corrupt(f"manifest: unknown node {tag[:40]!r}")

    def _pairs(self, group: str, body: list[Any], depth: int) -> dict[int | str, Any]:
        out: dict[int | str, Any] = {}
        for pair in body:
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (int, str) or pair[0] in out:
                raise _Corrupt("manifest: a mapping with broken or repeated keys")
            out[pair[0]] = self._value(group, pair[1], depth + 1)
        return out

    def _leaf(self, tag: str, name: str) -> Any:
        stored = self._aliases.get(name, name)
        tensor = self._tensors.get(stored)
        if tensor is None:
            raise _Corrupt(f"tensor {name!r} is in no file")
        self._used.add(stored)
        if (tag, stored) not in self._made:  # tied leaves come back as one object
            if tag != "T" and tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
                raise _Corrupt(f"tensor {name!r} has no numpy type")
            self._made[tag, stored] = tensor if tag == "T" else tensor.numpy() if tag == "N" else tensor.numpy()[()]
        return self._made[tag, stored]


# ---------------------------------------------------------------------------------------------------------------------
# Strict JSON
# ---------------------------------------------------------------------------------------------------------------------


def _dump_json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def _parse_json(data: bytes) -> Any:
    """Parses RFC 8259 JSON; repeated keys, NaN, numbers that overflow and deep nesting are refused.

    Raises: _Corrupt.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"number {text[:20]} is out of range")
        return value

    def constant(text: str) -> float:
        raise ValueError(f"{text} is not JSON")

    try:
        text = data.decode("ascii")  # we write ASCII only
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise _Corrupt(f"not strict JSON: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FileSpec:
    """What a manifest says of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class _Image:
    """A safetensors file to be written: its header and the tensors behind it as (tensor, begin, end) byte ranges."""

    header: bytes
    slots: tuple[tuple[torch.Tensor, int, int], ...]
    data_bytes: int

    @property
    def size(self) -> int:
        return len(self.header) + self.data_bytes


def _image(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> _Image:
    """Lays out a safetensors file: 8-byte little-endian header length, JSON header padded to 8 bytes, tensor bytes.

    Source: https://github.com/huggingface/safetensors, "Format". Widest types come first, so that every tensor is
    aligned without holes (the format allows none).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    slots, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        slots.append((tensor, begin, end))
    text = _dump_json(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise PersistenceError(f"state: {len(tensors)} tensors are too many for one safetensors file")
    return _Image(len(text).to_bytes(8, "little") + text, tuple(slots), end)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Memory of a contiguous CPU tensor as writable bytes."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # with 0 or 1 elements any stride counts as contiguous
    return flat.view(torch.uint8).numpy().data


def _stream(image: _Image) -> Iterator[memoryview]:
    """The file's bytes without a host copy of the whole: one tensor at a time."""
    yield memoryview(image.header)
    for tensor, _, _ in image.slots:
        yield _bytes_of(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())


def _write_file(path: Path, parts: Iterable[memoryview], anew: bool = True) -> _FileSpec:
    """Writes and hashes in one pass and syncs. `anew`: `path` must not exist yet; else it is overwritten, as on the
    mounts of a backup. Raises: OSError."""
    digest, size = hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags | (os.O_EXCL if anew else os.O_TRUNC), 0o644)
    try:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(fd, chunk) :]
        _fsync(fd)
    finally:
        os.close(fd)
    return _FileSpec(size, digest.hexdigest())


def _chunks(file: io.FileIO) -> Iterator[memoryview]:
    while chunk := file.read(CHUNK):
        yield memoryview(chunk)


def _copy_file(source: Path, target: Path) -> _FileSpec:
    """Plain copy in chunks, synced. Raises: _Corrupt if the source is not a regular file, OSError."""
    with _open_regular(source) as (file, _):
        return _write_file(target, _chunks(file))


def _fsync(fd: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # on macOS fsync leaves the bytes in the drive's cache
    if full is not None:
        fcntl.fcntl(fd, full)
    else:
        os.fsync(fd)


def _fsync_dir(path: Path) -> None:
    """Makes the names in a folder durable; file systems that can't sync a folder (some network mounts) are let off."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[tuple[io.FileIO, int]]:
    """Opens a regular file for reading and yields (file, size); no symlink is followed, no pipe waited for.

    Raises: _Corrupt if it is missing or something else, OSError if it can't be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise _Corrupt(f"{path.name} is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _Corrupt(f"{path.name} is a symbolic link") from None
        raise
    with io.FileIO(fd) as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise _Corrupt(f"{path.name} is not a regular file")
        yield file, info.st_size


def _read_into(file: io.FileIO, target: memoryview, digest: Any, name: str) -> None:
    for start in range(0, len(target), CHUNK):
        chunk = target[start : start + CHUNK]
        done = 0
        while done < len(chunk):
            count = file.readinto(chunk[done:])
            if not count:
                raise _Corrupt(f"{name} ends early")
            done += count
        digest.update(chunk)


def _hash_rest(file: io.FileIO, digest: Any) -> None:
    scratch = memoryview(bytearray(CHUNK))
    while count := file.readinto(scratch):
        digest.update(scratch[:count])


def _read_safetensors(path: Path, spec: _FileSpec, keep: bool = True) -> dict[str, torch.Tensor]:
    """Reads and hashes in one pass; the tensors own their memory and are returned only if size and digest are right.
    Without `keep` everything is verified just so, but the tensors come back empty and take no memory.

    Raises: _Corrupt, OSError.
    """
    with _open_regular(path) as (file, size):
        if size != spec.size:
            raise _Corrupt(f"{path.name} has {size:,} bytes, not {spec.size:,}")
        if size < 8:
            raise _Corrupt(f"{path.name} is too short")
        digest = hashlib.sha256()
        prefix = bytearray(8)
        _read_into(file, memoryview(prefix), digest, path.name)
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _Corrupt(f"{path.name} has a broken header length")
        header = bytearray(length)
        _read_into(file, memoryview(header), digest, path.name)
        tensors = {}
        for name, dtype, shape in _parse_header(bytes(header), size - 8 - length, path.name):
            tensors[name] = torch.empty(shape if keep else 0, dtype=dtype)
            if keep:
                _read_into(file, _bytes_of(tensors[name]), digest, path.name)
        _hash_rest(file, digest)
    if digest.hexdigest() != spec.sha256:
        raise _Corrupt(f"{path.name} does not have the SHA-256 of its manifest")
    return tensors


def _parse_header(header: bytes, data_bytes: int, file: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Tensors in the order of their bytes. They must cover the data exactly, so a header can't ask for more memory
    than the file is long."""
    table = _parse_json(header)
    if type(table) is not dict:
        raise _Corrupt(f"{file}: the header is not an object")
    table.pop("__metadata__", None)
    rows = []
    for name, entry in table.items():
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise _Corrupt(f"{file}: broken header entry {name[:80]!r}")
        dtype = _DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
        shape, offsets = entry["shape"], entry["data_offsets"]
        if dtype is None or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise _Corrupt(f"{file}: broken header entry {name[:80]!r}")
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            raise _Corrupt(f"{file}: {name[:80]!r} has the wrong number of bytes")
        rows.append((offsets[0], offsets[1], name, dtype, tuple(shape)))
    rows.sort(key=lambda row: row[:2])
    end = 0
    for begin, stop, name, _, _ in rows:
        if begin != end:
            raise _Corrupt(f"{file}: a hole or an overlap before {name[:80]!r}")
        end = stop
    if end != data_bytes:
        raise _Corrupt(f"{file}: bytes that belong to no tensor")
    return [(name, dtype, shape) for _, _, name, dtype, shape in rows]


def _is_sizes(value: Any) -> bool:
    return type(value) is list and len(value) <= 64 and all(type(v) is int and 0 <= v <= MAX_FILE_BYTES for v in value)


def _remove_tree(path: Path) -> None:
    """Deletes a folder, or a file or link in its place; what is already gone is fine. Links are not followed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    """Deletes an unfinished folder or file when the block fails; what can't be deleted now is swept later."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _remove_tree(path)
        raise


def _make_folder(path: Path) -> None:
    """mkdir -p that survives a power loss: each new name is synced in its parent."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        _fsync_dir(folder.parent)


def _host_memory_available() -> int | None:
    """Bytes that can be allocated without swapping (Linux), else None."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Manifest and checkpoint folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """The part of a manifest that rotation and the choice of a checkpoint need."""

    path: Path
    run: str  # the same in all checkpoints of a run, wherever they are copied
    step: int
    sequence: int
    created: float
    metrics: dict[str, float]
    files: dict[str, _FileSpec]
    frozen: _FileSpec | None
    digest: str

    @property
    def own_bytes(self) -> int:
        return sum(spec.size for spec in self.files.values())

    @property
    def bytes(self) -> int:
        return self.own_bytes + (self.frozen.size if self.frozen else 0)


def _seal(body: Mapping[str, Any]) -> bytes:
    """A manifest file: the body under its own SHA-256, so that the digest is checked before anything is parsed."""
    text = _dump_json(body)
    if len(text) > MAX_MANIFEST_BYTES:
        raise PersistenceError(
            f"state: the part that is not tensors takes {len(text):,} bytes of JSON (limit {MAX_MANIFEST_BYTES:,}); "
            "keep long lists of numbers as tensors"
        )
    return b'{"digest":"' + hashlib.sha256(text).hexdigest().encode() + b'","body":' + text + b"}\n"


def _read_manifest(folder: Path) -> tuple[dict[str, Any], _Entry]:
    """Reads, authenticates and checks `folder/manifest.json`. Raises: _Corrupt, OSError."""
    if folder.is_symlink():
        raise _Corrupt("the checkpoint folder is a symbolic link")
    with _open_regular(folder / MANIFEST) as (file, size):
        if size > MAX_MANIFEST_BYTES + 128:
            raise _Corrupt(f"{MANIFEST} has an absurd size")
        raw = bytearray(size)
        _read_into(file, memoryview(raw), hashlib.sha256(), MANIFEST)
    match = _ENVELOPE.match(raw)
    if match is None or raw[-2:] != b"}\n":
        raise _Corrupt(f"{MANIFEST} is not a manifest of this program")
    text = bytes(raw[match.end() : -2])
    digest = hashlib.sha256(text).hexdigest()
    if digest != match.group(1).decode():
        raise _Corrupt(f"{MANIFEST} does not have its own SHA-256")
    body = _parse_json(text)
    return body, _check_manifest(folder, body, digest)


_MANIFEST_TYPES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "version": (int,),
    "run": (str,),
    "step": (int,),
    "sequence": (int,),
    "created": (float, int),
    "metrics": (dict,),
    "files": (dict,),
    "frozen": (dict, type(None)),
    "aliases": (dict,),
    "tree": (dict,),
}


def _check_manifest(folder: Path, body: Any, digest: str) -> _Entry:
    """Types, ranges and names of a manifest; file names are compared with a fixed list, so no path can be smuggled."""
    if type(body) is not dict or body.get("format") != FORMAT:
        raise _Corrupt(f"{MANIFEST} is of another format")
    if type(body.get("run")) is not str or not _RUN_ID.fullmatch(body["run"]):
        raise _Corrupt(f"{MANIFEST}: broken run id")
    if type(body.get("version")) is not int or body["version"] != VERSION:
        raise _Corrupt(f"{MANIFEST} has format version {str(body.get('version'))[:20]}, this program reads {VERSION}")
    if body.keys() != _MANIFEST_TYPES.keys():
        raise _Corrupt(f"{MANIFEST} lacks a key or has one too many")
    for key, types in _MANIFEST_TYPES.items():
        if type(body[key]) not in types:
            raise _Corrupt(f"{MANIFEST}: {key} has the wrong type")
    step, sequence = body["step"], body["sequence"]
    if not 0 <= step <= MAX_STEP or not 0 <= sequence < 1 << 62:
        raise _Corrupt(f"{MANIFEST}: step or sequence is out of range")
    named = _STEP_NAME.fullmatch(folder.name)
    if named and int(named.group(1)) != step:
        raise _Corrupt(f"{MANIFEST} is that of step {step}")
    groups = body["tree"].keys() - {"frozen"}
    if not groups <= set(GROUPS) or body["files"].keys() != {_file_of(g) for g in groups}:
        raise _Corrupt(f"{MANIFEST}: files and tree do not agree")
    if ("frozen" in body["tree"]) != (body["frozen"] is not None):
        raise _Corrupt(f"{MANIFEST}: frozen tensors and tree do not agree")
    if any(type(target) is not str for target in body["aliases"].values()):
        raise _Corrupt(f"{MANIFEST}: broken alias list")
    files = {name: _check_spec(spec) for name, spec in body["files"].items()}
    frozen = None if body["frozen"] is None else _check_spec(body["frozen"])
    metrics = {name: _check_metric(value) for name, value in body["metrics"].items()}
    return _Entry(folder, body["run"], step, sequence, float(body["created"]), metrics, files, frozen, digest)


def _check_spec(spec: Any) -> _FileSpec:
    if type(spec) is not dict or spec.keys() != {"size", "sha256"}:
        raise _Corrupt(f"{MANIFEST}: broken file entry")
    size, sha256 = spec["size"], spec["sha256"]
    if type(size) is not int or not 8 <= size <= MAX_FILE_BYTES:
        raise _Corrupt(f"{MANIFEST}: absurd file size")
    if type(sha256) is not str or not _HEX.fullmatch(sha256):
        raise _Corrupt(f"{MANIFEST}: broken SHA-256")
    return _FileSpec(size, sha256)


def _check_metric(node: Any) -> float:
    value = _Decoder({}, {})._value("metrics", node, MAX_DEPTH)
    if type(value) is not float:
        raise _Corrupt(f"{MANIFEST}: a metric is not a number")
    return value


def _file_of(group: str) -> str:
    return f"{group}.safetensors"


def _blob_name(spec: _FileSpec) -> str:
    return f"sha256-{spec.sha256}.safetensors"


def _read_checkpoint(folder: Path, keep: bool = True) -> Checkpoint:
    """Verifies everything in a checkpoint folder and returns it (without `keep`: with empty tensors).

    Raises: _Corrupt, _FrozenMissing, OSError.
    """
    body, entry = _read_manifest(folder)
    tensors: dict[str, torch.Tensor] = {}
    for group in body["tree"]:
        if group == "frozen":
            assert entry.frozen is not None  # by _check_manifest
            loaded = _read_frozen(entry, entry.frozen, keep)
        else:
            loaded = _read_safetensors(folder / _file_of(group), entry.files[_file_of(group)], keep)
        tensors.update({f"{group}/{name}": tensor for name, tensor in loaded.items()})
    state = _Decoder(tensors, body["aliases"]).decode(body["tree"])
    frozen = state.pop("frozen", {})
    if type(frozen) is not dict:
        raise _Corrupt(f"{MANIFEST}: frozen tensors are not a mapping")
    return Checkpoint(state, entry.step, entry.metrics, folder, body, frozen)


def _read_frozen(entry: _Entry, spec: _FileSpec, keep: bool) -> dict[str, torch.Tensor]:
    """Frozen tensors from the folder's own link or, where the file system has no hard links, from the run's blobs."""
    problems = []
    for path in (entry.path / FROZEN, entry.path.parent / "blobs" / _blob_name(spec)):
        try:
            return _read_safetensors(path, spec, keep)
        except _Corrupt as error:
            problems.append(str(error))
    raise _FrozenMissing(f"{entry.path.name}: frozen tensors: {'; '.join(problems)}")


def _is_whole(entry: _Entry) -> bool:
    """All files there with the right sizes: the cheap check, without reading them."""
    return all(_size(entry.path / name) == spec.size for name, spec in entry.files.items())


_Cache = dict[tuple[Path, int, int, int], _Entry]  # by path, inode, time and length of the manifest


def _scan(run: Path, cache: _Cache | None = None) -> tuple[list[_Entry], list[Path]]:
    """Step checkpoints of a run, newest save first, and the folders whose manifest can't be used.

    A checkpoint that was moved aside by a replacement that never arrived (.old-…) counts, after its successor. With
    `cache`, manifests that have not changed since they were last read are not read again: good enough for rotation.
    """
    entries, broken = [], []
    try:
        names = sorted(os.listdir(run))
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    for name in names:
        old = _OLD_NAME.fullmatch(name)
        if not _STEP_NAME.fullmatch(name) and not (old and old.group(2)):
            continue
        try:
            entries.append(_read_manifest(run / name)[1] if cache is None else _read_cached(run / name, cache))
        except (_Corrupt, OSError):
            if (run / name).is_dir():  # else a reader met a checkpoint that its writer was just pruning
                broken.append(run / name)
    return sorted(entries, key=lambda e: (e.sequence, e.path.name), reverse=True), broken


def _read_cached(folder: Path, cache: _Cache) -> _Entry:
    """The entry of a checkpoint folder. Raises: _Corrupt, OSError."""
    info = (folder / MANIFEST).lstat()
    key = (folder, info.st_ino, info.st_mtime_ns, info.st_size)
    if key not in cache:
        entry = _read_manifest(folder)[1]
        for old in [other for other in cache if other[0] == folder or not other[0].exists()]:
            del cache[old]
        cache[key] = entry
    return cache[key]


# ---------------------------------------------------------------------------------------------------------------------
# Lock
# ---------------------------------------------------------------------------------------------------------------------


class _RunLock:
    """One writer a run. flock where there is one: the kernel frees it when its holder dies, however it dies. On a
    folder without flock (some network mounts): a file created exclusively whose holder refreshes it every
    `HEARTBEAT` seconds; one not refreshed for `STALE` seconds, or whose holder was on this machine and is dead, is
    taken over."""

    HEARTBEAT, STALE = 20.0, 120.0

    def __init__(self, run: Path, log: Callable[[str], None]) -> None:
        self._path = run / "LOCK"
        self._log = log
        self._fd: int | None = None
        self._stop = threading.Event()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self._path, flags, 0o644)
        try:
            self._exclusive = self._flock(fd)
            if not self._exclusive:
                self._take_by_heartbeat(fd)
            self._write_card(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        if not self._exclusive:
            threading.Thread(target=self._beat, daemon=True, name="checkpoint-lock").start()

    def _flock(self, fd: int) -> bool:
        if fcntl is None:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise PersistenceError(f"{self._path.parent} is in use by another run ({self._holder(fd)})") from None
        except OSError:
            return False  # ENOTSUP, ENOLCK, ENOSYS, EINVAL: this file system has no such locks

    def _take_by_heartbeat(self, fd: int) -> None:
        try:
            pid, host = self._read_card(fd)
        except (ValueError, KeyError, TypeError):
            return  # released, or never written
        dead = host == socket.gethostname() and not _is_alive(pid)
        age = time.time() - os.fstat(fd).st_mtime
        if not dead and age < self.STALE and (pid, host) != (os.getpid(), socket.gethostname()):
            raise PersistenceError(
                f"{self._path.parent} is in use by process {pid} on {host}, last seen {age:.0f} s ago; "
                f"if that is gone, wait {self.STALE:.0f} s or delete {self._path}"
            )
        self._log(f"[Checkpoint] taking over the lock that process {pid} on {host} left in {self._path.parent}")

    def _write_card(self, fd: int) -> None:
        card = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time()), "id": uuid.uuid4().hex}
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, json.dumps(card).encode())
        if not self._exclusive:  # two that found the lock free at the same instant: the one that wrote last has it
            time.sleep(0.2)
            os.lseek(fd, 0, os.SEEK_SET)
            if json.loads(os.read(fd, 4096)) != card:
                raise PersistenceError(f"{self._path.parent} was taken by another process at this moment")

    @staticmethod
    def _read_card(fd: int) -> tuple[int, str]:
        os.lseek(fd, 0, os.SEEK_SET)
        held = json.loads(os.read(fd, 4096))
        return int(held["pid"]), str(held["host"])[:80]

    def _holder(self, fd: int) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return "process {} on {}".format(*self._read_card(fd))
        return "another process"

    def _beat(self) -> None:
        while not self._stop.wait(self.HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def abandon(self) -> None:
        """In a forked child: drops the child's share of the lock, or it would outlive a killed parent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def release(self) -> None:
        self._stop.set()
        if self._fd is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)  # not unlinked: another process may be opening it right now
        os.close(self._fd)
        self._fd = None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


_OPEN: weakref.WeakSet[ModelPersistence] = weakref.WeakSet()


def _after_fork() -> None:
    for persistence in list(_OPEN):
        persistence._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ---------------------------------------------------------------------------------------------------------------------
# Backup mirror
#
# backup_dir/<run>/step-…/ as in the run (no links: frozen tensors in blobs/ only), the newest and the best ones, and
# copies of config.json, metrics.jsonl and train.log. A checkpoint there is complete when its manifest is: the manifest
# is written last and deleted first. ledger.json says what this module has put there and how much it takes.
# ---------------------------------------------------------------------------------------------------------------------

_SIDE_FILES = ("config.json", "metrics.jsonl", "train.log")
_LEDGER = "ledger.json"


class _NotCopied(Exception):
    """A checkpoint was rotated out while it was being mirrored, or is damaged: no fault of the backup folder."""


class _Mirror:
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
        for name in _SIDE_FILES:
            self._copy_side_file(root, name)
        self._write_ledger(root, wanted[0].run)

    def _plan(self) -> list[_Entry]:
        """What should be there, most wanted first."""
        newest = [entry for entry in _scan(self._run)[0] if _is_whole(entry)][:1]
        out: dict[str, _Entry] = {entry.digest: entry for entry in newest}
        for metric in BEST_METRICS:
            with contextlib.suppress(_Corrupt, OSError):
                entry = _read_manifest(self._run / f"best-{metric}")[1]
                out.setdefault(entry.digest, entry)
        return list(out.values())

    def _choose_root(self, run_id: str) -> Path:
        """backup_dir/<run name>, or with ".2", ".3" … where that name already holds another run's checkpoints."""
        if self._root is not None and self._root.is_dir():
            return self._root
        if not self._backup_dir.is_dir():
            os.mkdir(self._backup_dir)  # not its parents: a mount that is gone must not be replaced by a local folder
        for root in _backup_roots(self._backup_dir, self._run.name):
            steps = root.is_dir() and any(_STEP_NAME.fullmatch(name) for name in os.listdir(root))
            if not steps or _run_of_backup(root) == run_id:
                root.mkdir(exist_ok=True)
                self._write_ledger(root, run_id)
                self._root = root
                return root
        raise PersistenceError(f"no free name for {self._run.name} in {self._backup_dir}")

    @staticmethod
    def _complete(root: Path) -> list[_Entry]:
        """Checkpoints that are there with every file at its full length, newest first."""
        return [entry for entry in _scan(root)[0] if _is_whole(entry) and (not entry.frozen or _has_blob(root, entry))]

    def _make_room(self, root: Path, wanted: Sequence[_Entry], rank: int) -> bool:
        """Deletes what is worth less than `wanted[rank]` until that fits; never the only complete checkpoint, and
        nothing at all if it would not fit even so."""
        entry = wanted[rank]
        short = self._used(root) - self._quota + (entry.own_bytes if _has_blob(root, entry) else entry.bytes)
        complete = {have.path.name: have for have in self._complete(root)}
        worth = {other.digest: len(wanted) - i for i, other in enumerate(wanted)}
        rows = []
        for name in filter(_STEP_NAME.fullmatch, os.listdir(root)):
            have = complete.get(name)
            value = worth.get(have.digest, 0) if have else -1  # half copied: worth nothing
            if value < worth[entry.digest]:
                rows.append((value, have.sequence if have else 0, name, _tree_size(root / name)))
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
        total = _tree_size(root)
        for ledger in self._backup_dir.glob(f"*/{_LEDGER}"):
            if ledger.parent != root:
                total += _read_ledger(ledger)[1]
        return total

    def _copy(self, entry: _Entry, root: Path) -> None:
        """Copies one checkpoint, its digests checked on the way, the manifest last.

        Raises: _NotCopied, OSError (of the backup), PersistenceError (what was written is not there).
        """
        target = root / f"step-{entry.step:09d}"
        with contextlib.ExitStack() as stack:
            try:  # opened before anything is copied: what is open survives rotation
                sources = {name: stack.enter_context(_open_regular(entry.path / name))[0] for name in entry.files}
                blob = stack.enter_context(_open_regular(_frozen_path(entry)))[0] if entry.frozen else None
                manifest = stack.enter_context(_open_regular(entry.path / MANIFEST))[0].readall()
            except (_Corrupt, OSError):
                raise _NotCopied from None
            if entry.digest.encode() not in manifest[:100]:  # the folder was replaced: its files may be of two saves
                raise _NotCopied
            if target.exists():
                self._delete(target)
            target.mkdir()
            for name, source in sources.items():
                self._copy_checked(source, target / name, entry.files[name])
            if blob is not None and entry.frozen is not None and not _has_blob(root, entry):
                (root / "blobs").mkdir(exist_ok=True)
                self._copy_checked(blob, root / "blobs" / _blob_name(entry.frozen), entry.frozen)
            self._settled(target / MANIFEST, _write_file(target / MANIFEST, [memoryview(manifest)], anew=False).size)

    def _copy_checked(self, source: io.FileIO, target: Path, spec: _FileSpec) -> None:
        if _write_file(target, _chunks(source), anew=False) != spec:
            self._once(f"{target.parent.name}: the local {target.name} does not match its manifest: not backed up")
            raise _NotCopied
        self._settled(target, spec.size)

    def _settled(self, target: Path, size: int) -> None:
        """Waits until the mount shows all that was written: some acknowledge what arrives late or never."""
        deadline = time.monotonic() + self.LATE_WAIT
        while _size(target) != size:
            if time.monotonic() > deadline:
                raise PersistenceError(f"{target} did not keep what was written to it")
            time.sleep(0.2)

    def _drop_unwanted(self, root: Path, wanted: Sequence[_Entry]) -> None:
        """Once the newest is there: everything else that is not wanted, half-copied folders and unused blobs."""
        complete = self._complete(root)
        if wanted[0].digest not in {entry.digest for entry in complete}:
            return
        kept = [entry for entry in complete if entry.digest in {w.digest for w in wanted}]
        names = {entry.path.name for entry in kept}
        for name in os.listdir(root):
            if _STEP_NAME.fullmatch(name) and name not in names:
                self._delete(root / name)
        blobs = {_blob_name(entry.frozen) for entry in kept if entry.frozen}
        for path in (root / "blobs").glob("sha256-*"):
            if path.name not in blobs:
                _truncate_and_unlink(path)

    @staticmethod
    def _delete(folder: Path) -> None:
        """The manifest first, so that what is half deleted never looks complete."""
        for name in sorted(os.listdir(folder), key=lambda name: name != MANIFEST):
            _truncate_and_unlink(folder / name)
        folder.rmdir()

    def _copy_side_file(self, root: Path, name: str) -> None:
        with contextlib.suppress(_Corrupt), _open_regular(self._run / name) as (source, size):
            if self._used(root) + size <= self._quota:
                _write_file(root / f"{name}.part", _chunks(source), anew=False)
                os.replace(root / f"{name}.part", root / name)

    def _write_ledger(self, root: Path, run_id: str) -> None:
        checkpoints = {
            entry.path.name: {"sequence": entry.sequence, "bytes": entry.bytes, "manifest": entry.digest}
            for entry in self._complete(root)
        }
        ledger = {"run": run_id, "updated": time.time(), "bytes": self._used(root), "checkpoints": checkpoints}
        _write_file(root / f"{_LEDGER}.part", [memoryview(_dump_json(ledger) + b"\n")], anew=False)
        os.replace(root / f"{_LEDGER}.part", root / _LEDGER)


def _backup_roots(backup_dir: Path, name: str) -> Iterator[Path]:
    yield backup_dir / name
    for n in range(2, 100):
        yield backup_dir / f"{name}.{n}"


def _run_of_backup(root: Path) -> str | None:
    """Id of the run whose checkpoints are in a backup folder: by their manifests or, if none is whole, the ledger."""
    entries, _ = _scan(root)
    return entries[0].run if entries else _read_ledger(root / _LEDGER)[0]


def _read_ledger(path: Path) -> tuple[str | None, int]:
    """(run id, bytes) of a ledger; (None, 0) if it is missing or damaged."""
    with contextlib.suppress(OSError, PersistenceError, KeyError, TypeError, ValueError):
        with _open_regular(path) as (file, _):
            ledger = _parse_json(file.read(1 << 20) or b"")
        return str(ledger["run"]), max(0, int(ledger["bytes"]))
    return None, 0


def _has_blob(root: Path, entry: _Entry) -> bool:
    return entry.frozen is not None and _size(root / "blobs" / _blob_name(entry.frozen)) == entry.frozen.size


def _size(path: Path) -> int:
    """Length of a file, -1 if it is not there."""
    try:
        return path.lstat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _tree_size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _truncate_and_unlink(path: Path) -> None:
    """Deletes a file by emptying it first: what Drive moves to its trash still counts against the quota."""
    flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    with contextlib.suppress(OSError):  # a link, or a mount that can't truncate
        fd = os.open(path, flags)
        try:
            if os.fstat(fd).st_nlink == 1:
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)
    path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The module's one class
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One save, cut off from the live training state: nothing in it changes when training goes on."""

    step: int
    metrics: dict[str, float]
    tree: dict[str, Any]
    aliases: dict[str, str]
    images: dict[str, _Image]  # one a group, frozen tensors apart
    staged: dict[str, torch.Tensor] | None  # group -> host copy of the image's data; None: read the live tensors
    frozen: dict[str, torch.Tensor]  # read live: they do not train


class ModelPersistence:
    """Writes and reads the checkpoints of one run folder. See the module docstring for what is promised.

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
        log: Callable[[str], None] = print,
        read_only: bool = False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep: {keep} checkpoints can't be kept, give 1 or more")
        self.output_dir = Path(output_dir)
        self.keep = keep
        self.background = background
        self.read_only = read_only
        self._log_line = log
        self._owner = os.getpid()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._blob: tuple[tuple[Any, ...], dict[str, torch.Tensor], _FileSpec] | None = None
        self._run_id = uuid.uuid4().hex
        self._sequence = 0
        self._cache: _Cache = {}
        self._mirror: _Mirror | None = None
        self._lock: _RunLock | None = None
        self.backup_dir = Path(backup_dir) if backup_dir is not None else None
        if self.backup_dir is not None and self.backup_dir.resolve() == self.output_dir.resolve().parent:
            raise ValueError(f"backup_dir: {backup_dir} is the folder that holds the run itself")
        if read_only:
            if not self.output_dir.is_dir():
                raise PersistenceError(f"{self.output_dir} is not a folder")
            return
        try:
            _make_folder(self.output_dir)
            self._lock = _RunLock(self.output_dir, self._log)
            try:
                self._tidy()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise PersistenceError(f"{self.output_dir} can't be used: {error.strerror or error}") from error
        _OPEN.add(self)
        if self.backup_dir is not None:
            self._mirror = _Mirror(self.output_dir.absolute(), self.backup_dir, int(backup_quota_gb * 1e9), self._log)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
        frozen: Mapping[str, torch.Tensor] | None = None,
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

        Raises: PersistenceError if this save can't be made, or if the one before failed in the background (then this
            one has not been made: call again). The checkpoints saved earlier are intact in every case.
        """
        self._check_writer()
        self._join()
        self._raise_failure()
        job = self._stage(state, step, metrics or {}, frozen)
        if not self.background:
            self._commit(job)
            return
        if job.staged is None:  # no room for a host copy: the live tensors must not change while they are written
            wait = True
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in flight. Raises: PersistenceError if one has failed."""
        self._join()
        self._raise_failure()

    def close(self) -> None:
        """Waits for the save in flight and frees the run. Raises: PersistenceError if a save has failed."""
        if self._closed:
            return
        self._join()
        self._closed = True
        if self._mirror is not None:
            self._mirror.close()
        _OPEN.discard(self)
        if self._lock is not None:
            self._lock.release()
        self._host.clear()
        self._raise_failure()

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

    def _stage(
        self,
        state: Mapping[str, Any],
        step: int,
        metrics: Mapping[str, float],
        frozen: Mapping[str, torch.Tensor] | None,
    ) -> _Job:
        """The blocking part: takes the tree apart and copies its tensors into host buffers that are reused."""
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise PersistenceError(f"step: {step!r} is not an integer from 0 to {MAX_STEP}")
        figures = {str(name): float(value) for name, value in metrics.items()}
        encoded = _Encoder().encode(state, frozen)
        still = encoded.tensors.pop("frozen", {})
        images = {group: _image(tensors) for group, tensors in encoded.tensors.items()}
        staged = self._copy_to_host(images) if self.background else None
        return _Job(step, figures, encoded.tree, encoded.aliases, images, staged, still)

    def _copy_to_host(self, images: Mapping[str, _Image]) -> dict[str, torch.Tensor] | None:
        """Fills one reused byte buffer a group; None if the machine has no memory for it."""
        grow = sum(max(0, image.data_bytes - _capacity(self._host.get(group))) for group, image in images.items())
        available = _host_memory_available()
        if available is not None and grow > 0.8 * available:
            self._log(
                f"[Checkpoint] {grow / 1e9:.1f} GB for a copy of the state do not fit in memory "
                f"({available / 1e9:.1f} GB free): training waits while checkpoints are written"
            )
            return None
        staged = {}
        devices = set()
        for group, image in images.items():
            cuda = {tensor.device for tensor, _, _ in image.slots if tensor.is_cuda}
            devices |= cuda
            if _capacity(self._host.get(group)) < image.data_bytes:
                self._host[group] = torch.empty(0)  # frees the old one first
                self._host[group] = torch.empty(image.data_bytes, dtype=torch.uint8, pin_memory=bool(cuda))
            staged[group] = self._host.get(group, torch.empty(0, dtype=torch.uint8))[: image.data_bytes]
            for tensor, begin, end in image.slots:
                target = staged[group][begin:end].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.synchronize(device)
        return staged

    def _run(self, job: _Job) -> None:
        try:
            self._commit(job)
        except BaseException as error:  # nobody is there to catch it: it is raised at the next save, wait or close
            self._failure = error

    def _commit(self, job: _Job) -> None:
        """Writes a checkpoint and moves it into place; see "Commit order" in the module docstring."""
        saved = False
        tmp = self.output_dir / f".tmp-{job.step:09d}-{uuid.uuid4().hex}"
        final = self.output_dir / f"step-{job.step:09d}"
        try:
            self._check_space(job)
            with _removed_on_error(tmp):
                self._write_checkpoint(tmp, job)
                self._move_in(tmp, final)
            saved = True
            self._update_best(_read_cached(final, self._cache))
            self._prune()
        except (OSError, PersistenceError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            head = "is saved, but tidying up after it failed" if saved else "was not saved"
            raise PersistenceError(f"checkpoint of step {job.step} {head}: {self.output_dir}: {reason}") from error
        finally:
            if saved and self._mirror is not None:
                self._mirror.request()

    def _write_checkpoint(self, tmp: Path, job: _Job) -> None:
        """Everything of a checkpoint, each file synced, the manifest last, then the folder."""
        frozen = self._store_frozen(job.frozen) if job.frozen else None
        os.mkdir(tmp)
        files = self._write_groups(tmp, job)
        if frozen is not None:
            with contextlib.suppress(OSError):  # without hard links the run's blobs folder is used
                os.link(self.output_dir / "blobs" / _blob_name(frozen), tmp / FROZEN)
        _write_file(tmp / MANIFEST, [memoryview(_seal(self._manifest(job, files, frozen)))])
        _fsync_dir(tmp)

    def _write_groups(self, tmp: Path, job: _Job) -> dict[str, _FileSpec]:
        files = {}
        for group, image in job.images.items():
            if job.staged is None:
                parts: Iterable[memoryview] = _stream(image)
            else:
                parts = (memoryview(image.header), job.staged[group].numpy().data)
            files[_file_of(group)] = _write_file(tmp / _file_of(group), parts)
        return files

    def _manifest(self, job: _Job, files: Mapping[str, _FileSpec], frozen: _FileSpec | None) -> dict[str, Any]:
        self._sequence += 1
        return {
            "format": FORMAT,
            "version": VERSION,
            "run": self._run_id,
            "step": job.step,
            "sequence": self._sequence,
            "created": time.time(),
            "metrics": {name: _float_node(value) for name, value in job.metrics.items()},
            "files": {name: vars(spec) for name, spec in files.items()},
            "frozen": vars(frozen) if frozen else None,
            "aliases": job.aliases,
            "tree": job.tree,
        }

    def _check_space(self, job: _Job) -> None:
        """Refuses a save that can't fit before a byte of it is written."""
        need = sum(image.size for image in job.images.values()) + (1 << 20)
        if job.frozen and self._known_blob(job.frozen) is None:
            need += _image(job.frozen).size
        free = shutil.disk_usage(self.output_dir).free
        if free < need:
            raise PersistenceError(f"it needs {need / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free")

    def _known_blob(self, frozen: Mapping[str, torch.Tensor]) -> _FileSpec | None:
        """The blob of these very tensors, if this process has written or verified it and it is still there."""
        if self._blob is None or self._blob[0] != _stamp(frozen):
            return None
        spec = self._blob[2]
        with contextlib.suppress(OSError):
            return spec if (self.output_dir / "blobs" / _blob_name(spec)).lstat().st_size == spec.size else None
        return None

    def _store_frozen(self, frozen: Mapping[str, torch.Tensor]) -> _FileSpec:
        """Puts the frozen tensors under the digest of their file, unless they are there already and undamaged."""
        known = self._known_blob(frozen)
        if known is not None:
            return known
        folder = self.output_dir / "blobs"
        folder.mkdir(exist_ok=True)
        image = _image(frozen)
        digest = hashlib.sha256()
        for part in _stream(image):
            digest.update(part)
        spec = _FileSpec(image.size, digest.hexdigest())
        target = folder / _blob_name(spec)
        try:
            _read_safetensors(target, spec, keep=False)
        except _Corrupt:  # missing or damaged
            tmp = folder / f".tmp-{uuid.uuid4().hex}"
            with _removed_on_error(tmp):
                if _write_file(tmp, _stream(image)) != spec:
                    raise PersistenceError("frozen tensors changed while they were written") from None
                os.replace(tmp, target)
            _fsync_dir(folder)
        self._blob = (_stamp(frozen), dict(frozen), spec)  # holding the tensors keeps their addresses theirs
        return spec

    def _move_in(self, tmp: Path, final: Path) -> None:
        """Renames a finished folder into place. One that is there is moved aside first: killed in between, `_tidy`
        puts it back."""
        old = self.output_dir / f".old-{final.name}-{uuid.uuid4().hex}"
        replaced = final.exists()
        if replaced:
            os.rename(final, old)
        try:
            os.rename(tmp, final)
        except BaseException:
            if replaced:
                os.rename(old, final)
            raise
        _fsync_dir(self.output_dir)
        if replaced:
            self._discard(old)

    def _discard(self, folder: Path) -> None:
        """Deletes a checkpoint folder; its name goes first, so that no half-deleted one is ever seen."""
        trash = self.output_dir / f".tmp-discarded-{uuid.uuid4().hex}"
        os.rename(folder, trash)
        _remove_tree(trash)

    # -- best and rotation --------------------------------------------------------------------------------------------

    def _best_entry(self, metric: str) -> _Entry | None:
        """The best checkpoint by `metric`, None if there is no sound one. Raises: OSError if it can't be read."""
        with contextlib.suppress(_Corrupt, FileNotFoundError):
            entry = _read_cached(self.output_dir / f"best-{metric}", self._cache)
            if math.isfinite(entry.metrics.get(metric, math.nan)) and _is_whole(entry):
                return entry
        return None

    def _update_best(self, entry: _Entry) -> None:
        """Makes `entry` the best where its metric is finite and strictly above the best so far."""
        for metric in BEST_METRICS:
            value = entry.metrics.get(metric, math.nan)
            if not math.isfinite(value):
                continue
            try:
                best = self._best_entry(metric)
            except OSError as error:  # it may be better than this one: it stays
                self._log(f"[Checkpoint] best-{metric} can't be read ({error.strerror}): left as it is")
                continue
            if best is None or value > best.metrics[metric]:
                self._make_best(metric, entry)

    def _make_best(self, metric: str, entry: _Entry) -> None:
        tmp = self.output_dir / f".tmp-best-{uuid.uuid4().hex}"
        with _removed_on_error(tmp):
            os.mkdir(tmp)
            for name in [*entry.files, *([FROZEN] if (entry.path / FROZEN).exists() else [])]:
                try:
                    os.link(entry.path / name, tmp / name)
                except OSError:  # no hard links here: a copy
                    _copy_file(entry.path / name, tmp / name)
            _copy_file(entry.path / MANIFEST, tmp / MANIFEST)  # its own: one damaged manifest must not be two
            _fsync_dir(tmp)
            self._move_in(tmp, self.output_dir / f"best-{metric}")

    def _prune(self) -> None:
        """Leaves the `keep` newest step checkpoints, and the blobs that something still needs."""
        entries, broken = _scan(self.output_dir, self._cache)
        whole = [entry for entry in entries if _is_whole(entry)]  # a sound one is not pushed out by one without files
        for entry in whole[self.keep :]:
            self._discard(entry.path)
        if len(whole) > self.keep:
            _fsync_dir(self.output_dir)
        if not broken:  # what those need can't be known
            self._prune_blobs(entries)
        for folder in broken:
            self._log(f"[Checkpoint] {folder.name} can't be read: neither counted nor deleted")

    def _prune_blobs(self, entries: Sequence[_Entry]) -> None:
        folder = self.output_dir / "blobs"
        if not folder.is_dir() or any(name.startswith(".bad-") for name in os.listdir(self.output_dir)):
            return
        bests = [entry for metric in BEST_METRICS if (entry := self._best_entry(metric)) is not None]
        kept = [entry for entry in entries if entry.path.exists()]
        needed = {_blob_name(entry.frozen) for entry in [*kept, *bests] if entry.frozen}
        for name in os.listdir(folder):
            if _BLOB_NAME.fullmatch(name) and name not in needed and (folder / name).lstat().st_nlink == 1:
                (folder / name).unlink()

    def _tidy(self) -> None:
        """What a killed writer may have left: unfinished folders go, a replaced checkpoint without its replacement
        comes back, a best that was not yet made is made."""
        swept = 0
        for name in sorted(os.listdir(self.output_dir)):
            path = self.output_dir / name
            old = _OLD_NAME.fullmatch(name)
            if old and not (self.output_dir / old.group(1)).exists():
                os.rename(path, self.output_dir / old.group(1))
            elif old or _TMP_NAME.fullmatch(name):
                _remove_tree(path)
                swept += 1
        blobs = self.output_dir / "blobs"
        for name in os.listdir(blobs) if blobs.is_dir() else []:
            if _TMP_NAME.fullmatch(name):
                _remove_tree(blobs / name)
                swept += 1
        if swept:
            self._log(f"[Checkpoint] swept {swept} unfinished item(s) from {self.output_dir}")
        self._adopt()

    def _adopt(self) -> None:
        """Goes on with the run that is in the folder: its id, its sequence numbers, its best checkpoints."""
        entries, _ = _scan(self.output_dir)
        bests = [entry for metric in BEST_METRICS if (entry := self._best_entry(metric)) is not None]
        # Best ones count too: after a quarantine they may be all that is left.
        for entry in sorted([*entries, *bests], key=lambda e: e.sequence):
            self._run_id, self._sequence = entry.run, entry.sequence
            if _is_whole(entry):
                self._update_best(entry)

    # -- loading ------------------------------------------------------------------------------------------------------

    def load(self, which: str | os.PathLike[str] = "latest") -> Checkpoint:
        """Loads a checkpoint, every byte verified first.

        "latest" is the newest save; "best" the one with the best accuracy_delta, else the best val_accuracy, else the
        latest. One that fails verification is quarantined and named in the log, and the next is tried. Anything else
        is the path of a checkpoint folder, which is loaded or refused.

        Raises: PersistenceError if there is no valid one.
        """
        if not self.read_only and not self._closed:
            self.wait()
        if which not in ("latest", "best"):
            return self._load_path(Path(which))
        tried = self._try_all(str(which))
        if isinstance(tried, Checkpoint):
            if self._mirror is not None:
                self._mirror.request()  # a backup that was only named now: nothing may be saved any more
            return tried
        if not self.read_only and self._restore():
            restored = self._try_all(str(which))
            if isinstance(restored, Checkpoint):
                return restored
        problem = f"none of {tried} is valid" if tried else "there is none yet"
        raise PersistenceError(f"no checkpoint to load in {self.output_dir}: {problem}")

    def _try_all(self, which: str) -> Checkpoint | int:
        """The first checkpoint that is valid, or how many were tried."""
        tried = 0
        for folder in self._order(which):
            try:
                return _read_checkpoint(folder)
            except _FrozenMissing as error:
                self._log(f"[Checkpoint] {error}; trying an older one")
            except _Corrupt as error:
                if folder.exists():
                    self._quarantine(folder, str(error))
            except OSError as error:
                self._log(f"[Checkpoint] {folder} can't be read ({error.strerror}); trying an older one")
            tried += 1
        return tried

    def _restore(self) -> bool:
        """Brings back from the backup what is not here, every file re-hashed on the way; True if a checkpoint came."""
        restored = 0
        try:
            source = self._backup_of_run()
            if source is None:
                return False
            for entry in reversed(_scan(source)[0]):  # oldest first
                if not (self.output_dir / entry.path.name).exists():
                    restored += self._restore_checkpoint(entry)
            for name in _SIDE_FILES if restored else ():
                if _size(self.output_dir / name) <= 0 < _size(source / name):
                    (self.output_dir / name).unlink(missing_ok=True)
                    _copy_file(source / name, self.output_dir / name)
        except (OSError, PersistenceError) as error:
            self._log(f"[Backup] {self.backup_dir}: {error}")
        if restored:
            self._log(f"[Backup] restored {restored} checkpoint(s) from {source}")
            self._adopt()
        return restored > 0

    def _backup_of_run(self) -> Path | None:
        """The folder of this run in the backup: by its id where the run is known here, else the most recent."""
        if self.backup_dir is None:
            return None
        known = bool(_scan(self.output_dir)[0])
        found = []
        for root in _backup_roots(self.backup_dir, self.output_dir.absolute().name):
            entries, _ = _scan(root)
            if entries and (not known or entries[0].run == self._run_id):
                found.append((max(entry.created for entry in entries), str(root)))
        return Path(max(found)[1]) if found else None

    def _restore_checkpoint(self, entry: _Entry) -> bool:
        tmp = self.output_dir / f".tmp-restored-{uuid.uuid4().hex}"
        try:
            with _removed_on_error(tmp):
                os.mkdir(tmp)
                for name, spec in [*entry.files.items(), *([(FROZEN, entry.frozen)] if entry.frozen else [])]:
                    source = _frozen_path(entry) if name == FROZEN else entry.path / name
                    if _copy_file(source, tmp / name) != spec:
                        raise _Corrupt(f"{source} does not match its manifest")
                _copy_file(entry.path / MANIFEST, tmp / MANIFEST)
                if _read_manifest(tmp)[1].digest != entry.digest:
                    raise _Corrupt(f"{entry.path} changed while it was read")
                _fsync_dir(tmp)
                self._move_in(tmp, self.output_dir / entry.path.name)
        except (OSError, PersistenceError) as error:
            self._log(f"[Backup] {entry.path} can't be restored: {error}")
            return False
        return True

    def _load_path(self, folder: Path) -> Checkpoint:
        try:
            return _read_checkpoint(folder)
        except (_Corrupt, OSError) as error:
            if not folder.is_dir():
                raise PersistenceError(f"{folder} is not a checkpoint folder") from None
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise PersistenceError(f"{folder} can't be loaded: {reason}") from error

    def _order(self, which: str) -> list[Path]:
        """Folders to try, in turn. Those with a broken manifest come first, to be set aside by name."""
        entries, broken = _scan(self.output_dir)
        latest = [*broken, *(entry.path for entry in entries)]
        bests = [self.output_dir / f"best-{metric}" for metric in BEST_METRICS]
        bests = [path for path in bests if path.is_dir()]
        if which == "best":
            if not bests:
                self._log("[Checkpoint] no best checkpoint yet: using the latest")
            return [*bests, *latest]
        return [*latest, *bests]  # a best one is older than nothing at all

    def _quarantine(self, folder: Path, reason: str) -> None:
        if self.read_only:
            self._log(f"[Checkpoint] {folder} is corrupt ({reason}); trying an older one")
            return
        bad = self.output_dir / f".bad-{folder.name.removeprefix('.old-')}-{uuid.uuid4().hex[:8]}"
        os.rename(folder, bad)
        _fsync_dir(self.output_dir)
        self._log(f"[Checkpoint] {folder.name} is corrupt ({reason}): set aside as {bad.name}, trying an older one")

    def latest(self) -> Path | None:
        """The newest checkpoint whose manifest is sound and whose files have the right sizes, or None."""
        return next((entry.path for entry in _scan(self.output_dir)[0] if _is_whole(entry)), None)

    def best(self, metric: str = "accuracy_delta") -> Path | None:
        """The best checkpoint by "accuracy_delta" or "val_accuracy", or None. Raises: ValueError for another metric."""
        if metric not in BEST_METRICS:
            raise ValueError(f"metric: {metric!r} is not one of {', '.join(BEST_METRICS)}")
        with contextlib.suppress(OSError):
            entry = self._best_entry(metric)
            return entry.path if entry else None
        return None

    # -- looking ------------------------------------------------------------------------------------------------------

    def inspect(self) -> list[CheckpointInfo]:
        """Everything in the run folder that is or was a checkpoint, each fully read and verified; changes nothing."""
        infos = []
        for name in sorted(os.listdir(self.output_dir)):
            kind = _kind(name)
            if kind is not None and (self.output_dir / name).is_dir():
                infos.append(_inspect_folder(self.output_dir / name, kind))
        return infos

    @staticmethod
    def estimate_bytes(state: Mapping[str, Any], frozen: Mapping[str, torch.Tensor] | None = None) -> int:
        """Bytes that one checkpoint of `state` takes on disk (a few hundred more for names and metrics), frozen
        tensors included, which are written once a run. Raises: PersistenceError for a state that can't be saved."""
        encoded = _Encoder().encode(state, frozen)
        tensors = sum(_image(group).size for group in encoded.tensors.values())
        return tensors + len(_seal({"tree": encoded.tree, "aliases": encoded.aliases}))

    def space_warning(
        self, state: Mapping[str, Any], frozen: Mapping[str, torch.Tensor] | None = None, *, growth: int = 0
    ) -> str | None:
        """One line if what this run will keep does not fit on the disk, else None. Counted: `keep` checkpoints, two
        best ones that rotation has left behind, and one more while it is written; the frozen tensors once. growth:
        bytes by which `state` is going to grow (the moments of an optimizer that has made no step yet)."""
        one = self.estimate_bytes(state) + growth
        once = self.estimate_bytes(state, frozen) + growth - one
        need = one * (self.keep + len(BEST_METRICS) + 1) + once
        have = sum(entry.own_bytes for entry in _scan(self.output_dir)[0])  # will be rotated out
        free = shutil.disk_usage(self.output_dir).free + have
        if need <= free:
            return None
        fits = (free - once) // one - len(BEST_METRICS) - 1
        advice = f"use --keep {fits}" if fits >= 1 else "free some space or choose another folder"
        return (
            f"WARNING: {self.keep} checkpoints of {_human(one)}, the two best and one in the making need "
            f"{_human(need)}, {self.output_dir} has {_human(free)}: {advice}"
        )

    # -- small things -------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if isinstance(failure, PersistenceError):
            raise failure
        if failure is not None:
            raise PersistenceError(f"checkpoint was not saved: {type(failure).__name__}: {failure}") from failure

    def _check_writer(self) -> None:
        if self.read_only:
            raise PersistenceError(f"{self.output_dir} was opened read-only")
        if self._closed:
            raise PersistenceError(f"{self.output_dir}: saving after close")
        if os.getpid() != self._owner:
            raise PersistenceError(f"{self.output_dir}: saving from a forked process")

    def _forked(self) -> None:
        if self._lock is not None:
            self._lock.abandon()
        self._thread = None

    def _log(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe or notebook must not fail a save
            self._log_line(line)


def _stamp(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """Identity of a set of tensors: memory, version counter, type and shape of each."""
    return tuple((name, t.data_ptr(), t._version, t.dtype, t.shape) for name, t in tensors.items())


def _capacity(buffer: torch.Tensor | None) -> int:
    return 0 if buffer is None else buffer.numel()


def _frozen_path(entry: _Entry) -> Path:
    own = entry.path / FROZEN
    return own if own.exists() or entry.frozen is None else entry.path.parent / "blobs" / _blob_name(entry.frozen)


def _kind(name: str) -> str | None:
    if _STEP_NAME.fullmatch(name):
        return "step"
    if _BEST_NAME.fullmatch(name):
        return "best"
    if name.startswith(".bad-"):
        return "quarantined"
    return "unfinished" if name.startswith((".tmp-", ".old-")) else None


def _inspect_folder(folder: Path, kind: str) -> CheckpointInfo:
    entry, problem = None, None
    try:
        entry = _read_manifest(folder)[1]
        _read_checkpoint(folder, keep=False)
    except (PersistenceError, OSError) as error:
        problem = str(error)
    if entry is None:
        size = sum(path.lstat().st_size for path in folder.iterdir())
        return CheckpointInfo(folder, kind, None, {}, size, None, problem)
    return CheckpointInfo(folder, kind, entry.step, entry.metrics, entry.bytes, entry.created, problem)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def find_newest_run(runs_dir: str | os.PathLike[str] = "runs") -> Path | None:
    """The run folder under `runs_dir` with the most recent checkpoint, or None if no run has one."""
    root = Path(runs_dir)
    found = []
    for run in sorted(root.iterdir()) if root.is_dir() else []:
        if run.is_dir() and not run.is_symlink():
            entries, broken = _scan(run)
            if entries or broken:
                found.append((max((entry.created for entry in entries), default=0.0), run.name, run))
    return max(found)[2] if found else None


def setup_drive_backup(output_dir: str | os.PathLike[str]) -> str | None:
    """The folder on Google Drive for `backup_dir` when running on Colab, mounting Drive if that is possible.

    Mounting works only inside a notebook cell; a script run with `!python` finds a Drive that a cell has mounted.
    Elsewhere, or if Drive refuses: None, and one printed line that says why.
    """
    drive = Path("/content/drive/MyDrive")
    if not _on_colab():
        print("[Backup] none: not running on Colab, no Google Drive to mount (use --backup_dir for another folder)")
        return None
    if not drive.is_dir():
        try:
            from google.colab import drive as colab_drive  # type: ignore[import-not-found, unused-ignore]

            colab_drive.mount("/content/drive")
        except Exception as error:  # Colab raises many kinds, ValueError and AttributeError among them
            print(f"[Backup] none: Google Drive is not mounted ({error}); mount it in a cell with drive.mount")
            return None
    if not drive.is_dir():
        print(f"[Backup] none: {drive} did not appear after mounting")
        return None
    if Path(output_dir).resolve().is_relative_to(drive.resolve()):
        print(f"[Backup] none: {output_dir} is on Google Drive itself")
        return None
    return str(drive / "arc_backups")


def _on_colab() -> bool:
    return "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def export_best(
    run: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    log: Callable[[str], None] = print,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the weights of the best model (else the latest) of `run` for other programs into the new folder `dest`.

    Each entry of state["model"] becomes `dest/<entry>/model.safetensors`: its tensors, nested keys joined by ".", ties
    written out, and the frozen tensors named "<entry>/…" (an entry may be frozen altogether). Entries of
    state["extra"]["export"][<entry>] = {file name: text} are written next to it (config.json, tokenizer.json …), after
    which `AutoModel.from_pretrained(dest/<entry>)` reads a Hugging Face model. An entry with a recipe in
    state["extra"]["lora"] is an adapter and is written merged (see `_merged`); its base is read from the folder that
    the recipe names, or from `base`.

    Raises: PersistenceError if there is no valid checkpoint or it can't be exported, ValueError if `dest` is not new.
    """
    target = Path(dest)
    if target.exists():
        raise ValueError(f"{target} exists: give a new folder")
    with ModelPersistence(run, read_only=True, log=log) as persistence:
        checkpoint = persistence.load("best")
    texts, recipes = _export_texts(checkpoint), _lora_recipes(checkpoint)
    tmp = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}")
    try:
        with _removed_on_error(tmp):
            trained = checkpoint.state.get("model", {})
            for entry in [*trained, *sorted({name.partition("/")[0] for name in checkpoint.frozen} - trained.keys())]:
                folder = tmp / _safe_name(entry)
                folder.mkdir(parents=True)
                tensors = {**_frozen_of(entry, checkpoint), **dict(_flat_tensors(trained.get(entry), ""))}
                if entry in recipes:
                    tensors = _merged(tensors, recipes[entry], base)
                _write_file(folder / "model.safetensors", _stream(_image(tensors, {"format": "pt"})))
                for name, text in texts.get(entry, {}).items():
                    _write_file(folder / _safe_name(name), [memoryview(text.encode())])
            os.rename(tmp, target)
    except OSError as error:
        raise PersistenceError(f"{target} can't be written: {error.strerror or error}") from error
    log(f"step {checkpoint.step} of {checkpoint.path} -> {target}")
    return target


def _export_texts(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    extra = checkpoint.state.get("extra")
    texts = extra.get("export", {}) if isinstance(extra, dict) else {}
    for entry, files in texts.items():
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise PersistenceError(f"extra/export/{entry} is not a mapping of file names to texts")
    return texts


def _frozen_of(entry: str, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    prefix = f"{entry}/"
    return {name[len(prefix) :]: t for name, t in checkpoint.frozen.items() if name.startswith(prefix)}


def _flat_tensors(tree: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield prefix or "value", tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flat_tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _lora_recipes(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    extra = checkpoint.state.get("extra")
    recipes = extra.get("lora", {}) if isinstance(extra, dict) else {}
    fields = {"name", "revision", "folder", "files", "prefix", "tensors"}
    for entry, recipe in recipes.items():
        if recipe.keys() != {"base", "scale"} or recipe["base"].keys() != fields:
            raise PersistenceError(f"extra/lora/{entry} is not a recipe of this version")
    return recipes


def _merged(
    adapter: Mapping[str, torch.Tensor], recipe: Mapping[str, Any], folder: str | os.PathLike[str] | None
) -> dict[str, torch.Tensor]:
    """The weights of a base with a LoRA adapter added, in fp32: W + scale * B A for each layer that has
    "<layer>.lora_A.weight" (rank, in) and "<layer>.lora_B.weight" (out, rank), the base's own for all others.

    recipe: {"scale": float, "base": {"name", "revision", "folder", "files": {file: {"size", "sha256"}}, "prefix",
    "tensors": [name]}}; tensor `name` is stored as prefix + name. Raises: PersistenceError unless `folder` (by default
    the recipe's) holds exactly those files.
    """
    base = recipe["base"]
    where = Path(folder if folder is not None else base["folder"])
    wanted = {base["prefix"] + name: name for name in base["tensors"]}
    merged: dict[str, torch.Tensor] = {}
    for file, spec in base["files"].items():
        try:
            # Resolved: in the cache of the Hugging Face hub the files are symbolic links.
            stored = _read_safetensors((where / _safe_name(file)).resolve(), _check_spec(spec))
        except (_Corrupt, OSError) as error:
            revision = f" (revision {base['revision']})" if base["revision"] else ""
            raise PersistenceError(
                f"the adapter's base {base['name']}{revision} is not in {where}: {error}; name its folder with --base"
            ) from error
        merged |= {wanted[name]: tensor.float() for name, tensor in stored.items() if name in wanted}
    if missing := set(base["tensors"]) - merged.keys():
        raise PersistenceError(f"the adapter's base {base['name']} has no tensor {min(missing)!r}")
    for name, down in adapter.items():
        layer, is_down, _ = name.partition(".lora_A.")
        if is_down:
            merged[f"{layer}.weight"] += (adapter[f"{layer}.lora_B.weight"] @ down) * recipe["scale"]
    return merged


def _safe_name(name: Any) -> str:
    if type(name) is not str or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", name):
        raise PersistenceError(f"{str(name)[:80]!r} can't be the name of an exported file")
    return name


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _print_inspection(infos: Sequence[CheckpointInfo]) -> None:
    print(f"{'checkpoint':<24} {'step':>9} {'size':>10}  {'saved (UTC)':<19}  {'verified':<10} metrics")
    for info in infos:
        step = "-" if info.step is None else str(info.step)
        when = "-" if info.created is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(info.created))
        metrics = " ".join(f"{name}={value:.6g}" for name, value in info.metrics.items())
        verified = "ok" if info.problem is None else "FAILED"
        print(f"{info.path.name:<24} {step:>9} {_human(info.bytes):>10}  {when:<19}  {verified:<10} {metrics}".rstrip())
        if info.problem is not None:
            print(f"{'':<24} {info.problem}")


def _verify(infos: Sequence[CheckpointInfo]) -> int:
    live = [info for info in infos if info.kind in ("step", "best")]
    for info in live:
        print(f"{info.path.name}: {'ok' if info.problem is None else f'FAILED: {info.problem}'}")
    if not live:
        print("no checkpoints")
    return 0 if live and all(info.problem is None for info in live) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python model_persistence.py`; returns 0, 1 (something is not valid) or 2 (wrong arguments)."""
    parser = argparse.ArgumentParser(description="Look at, verify and export checkpoints; changes no run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("inspect", "list checkpoints with step, size, metrics and verification result"),
        ("verify", "read every byte of every checkpoint; exit code 1 if one fails"),
        ("export", "write the weights of the best model to a new folder DEST"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", metavar="RUN", type=Path, help="run folder, of runs/ or of a backup")
        if name == "export":
            command.add_argument("dest", metavar="DEST", type=Path, help="folder to create")
            command.add_argument("--base", metavar="DIR", type=Path, help="of a LoRA run: where its base model is now")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        print(f"{args.run} is not a folder", file=sys.stderr)
        return 2
    try:
        if args.command == "export":
            export_best(args.run, args.dest, base=args.base)
            return 0
        infos = ModelPersistence(args.run, read_only=True).inspect()
        if args.command == "verify":
            return _verify(infos)
        if not infos:
            print(f"{args.run} holds no checkpoint", file=sys.stderr)
            return 1
        _print_inspection(infos)
        return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (PersistenceError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
