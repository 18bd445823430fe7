"""The manifest of a checkpoint folder, the checkpoint that it describes, and the checkpoints of a run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from arc.persistence.files import FileSpec, names_in, open_regular, read_into, read_safetensors, size_of
from arc.persistence.names import (
    FORMAT,
    FROZEN,
    GROUPS,
    HEX,
    MANIFEST,
    MAX_DEPTH,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_STEP,
    OLD_NAME,
    RUN_ID,
    STEP_NAME,
    VERSION,
    Corrupt,
    FrozenMissing,
    PersistenceError,
)  # fmt: skip
from arc.persistence.tree import Decoder, dump_json, parse_json

_ENVELOPE = re.compile(rb'\{"digest":"([0-9a-f]{64})","body":')  # the rest of a manifest is the body, "}" and "\n"


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
class Entry:
    """The part of a manifest that rotation and the choice of a checkpoint need."""

    path: Path
    run: str  # the same in all checkpoints of a run, wherever they are copied
    step: int
    sequence: int
    created: float
    metrics: dict[str, float]
    files: dict[str, FileSpec]
    frozen: FileSpec | None
    digest: str

    @property
    def own_bytes(self) -> int:
        return sum(spec.size for spec in self.files.values())

    @property
    def bytes(self) -> int:
        return self.own_bytes + (self.frozen.size if self.frozen else 0)


def seal(body: Mapping[str, Any]) -> bytes:
    """A manifest file: the body under its own SHA-256, so that the digest is checked before anything is parsed."""
    text = dump_json(body)
    if len(text) > MAX_MANIFEST_BYTES:
        raise PersistenceError(
            f"state: the part that is not tensors takes {len(text):,} bytes of JSON (limit {MAX_MANIFEST_BYTES:,}); "
            "keep long lists of numbers as tensors"
        )
    return b'{"digest":"' + hashlib.sha256(text).hexdigest().encode() + b'","body":' + text + b"}\n"


def read_manifest(folder: Path) -> tuple[dict[str, Any], Entry]:
    """Reads, authenticates and checks `folder/manifest.json`. Raises: Corrupt, OSError."""
    if folder.is_symlink():
        raise Corrupt("the checkpoint folder is a symbolic link")
    with open_regular(folder / MANIFEST) as (file, size):
        if size > MAX_MANIFEST_BYTES + 128:
            raise Corrupt(f"{MANIFEST} has an absurd size")
        raw = bytearray(size)
        read_into(file, memoryview(raw), hashlib.sha256(), MANIFEST)
    match = _ENVELOPE.match(raw)
    if match is None or raw[-2:] != b"}\n":
        raise Corrupt(f"{MANIFEST} is not a manifest of this program")
    text = bytes(raw[match.end() : -2])
    digest = hashlib.sha256(text).hexdigest()
    if digest != match.group(1).decode():
        raise Corrupt(f"{MANIFEST} does not have its own SHA-256")
    body = parse_json(text)
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


def _check_manifest(folder: Path, body: Any, digest: str) -> Entry:
    """Types, ranges and names of a manifest; file names are compared with a fixed list, so no path can be smuggled."""
    if type(body) is not dict or body.get("format") != FORMAT:
        raise Corrupt(f"{MANIFEST} is of another format")
    if type(body.get("run")) is not str or not RUN_ID.fullmatch(body["run"]):
        raise Corrupt(f"{MANIFEST}: broken run id")
    if type(body.get("version")) is not int or body["version"] != VERSION:
        raise Corrupt(f"{MANIFEST} has format version {str(body.get('version'))[:20]}, this program reads {VERSION}")
    if body.keys() != _MANIFEST_TYPES.keys():
        raise Corrupt(f"{MANIFEST} lacks a key or has one too many")
    for key, types in _MANIFEST_TYPES.items():
        if type(body[key]) not in types:
            raise Corrupt(f"{MANIFEST}: {key} has the wrong type")
    step, sequence = body["step"], body["sequence"]
    if not 0 <= step <= MAX_STEP or not 0 <= sequence < 1 << 62 or not abs(body["created"]) < 1 << 62:
        raise Corrupt(f"{MANIFEST}: step, sequence or time is out of range")
    named = STEP_NAME.fullmatch(folder.name)
    if named and int(named.group(1)) != step:
        raise Corrupt(f"{MANIFEST} is that of step {step}")
    groups = body["tree"].keys() - {"frozen"}
    if not groups <= set(GROUPS) or body["files"].keys() != {file_of(g) for g in groups}:
        raise Corrupt(f"{MANIFEST}: files and tree do not agree")
    if ("frozen" in body["tree"]) != (body["frozen"] is not None):
        raise Corrupt(f"{MANIFEST}: frozen tensors and tree do not agree")
    if any(type(target) is not str for target in body["aliases"].values()):
        raise Corrupt(f"{MANIFEST}: broken alias list")
    files = {name: check_spec(spec) for name, spec in body["files"].items()}
    frozen = None if body["frozen"] is None else check_spec(body["frozen"])
    metrics = {name: _check_metric(value) for name, value in body["metrics"].items()}
    return Entry(folder, body["run"], step, sequence, float(body["created"]), metrics, files, frozen, digest)


def check_spec(spec: Any) -> FileSpec:
    if type(spec) is not dict or spec.keys() != {"size", "sha256"}:
        raise Corrupt(f"{MANIFEST}: broken file entry")
    size, sha256 = spec["size"], spec["sha256"]
    if type(size) is not int or not 8 <= size <= MAX_FILE_BYTES:
        raise Corrupt(f"{MANIFEST}: absurd file size")
    if type(sha256) is not str or not HEX.fullmatch(sha256):
        raise Corrupt(f"{MANIFEST}: broken SHA-256")
    return FileSpec(size, sha256)


def _check_metric(node: Any) -> float:
    value = Decoder({}, {}).value("metrics", node, MAX_DEPTH)
    if type(value) is not float:
        raise Corrupt(f"{MANIFEST}: a metric is not a number")
    return value


def file_of(group: str) -> str:
    return f"{group}.safetensors"


def blob_name(spec: FileSpec) -> str:
    return f"sha256-{spec.sha256}.safetensors"


def read_checkpoint(folder: Path, keep: bool = True) -> Checkpoint:
    """Verifies everything in a checkpoint folder and returns it (without `keep`: with empty tensors).

    Raises: Corrupt, FrozenMissing, OSError.
    """
    body, entry = read_manifest(folder)
    tensors: dict[str, torch.Tensor] = {}
    for group in body["tree"]:
        if group == "frozen":
            assert entry.frozen is not None  # by _check_manifest
            loaded = _read_frozen(entry, entry.frozen, keep)
        else:
            loaded = read_safetensors(folder / file_of(group), entry.files[file_of(group)], keep)
        tensors.update({f"{group}/{name}": tensor for name, tensor in loaded.items()})
    state = Decoder(tensors, body["aliases"]).decode(body["tree"])
    frozen = state.pop("frozen", {})
    if type(frozen) is not dict:
        raise Corrupt(f"{MANIFEST}: frozen tensors are not a mapping")
    return Checkpoint(state, entry.step, entry.metrics, folder, body, frozen)


def _read_frozen(entry: Entry, spec: FileSpec, keep: bool) -> dict[str, torch.Tensor]:
    """Frozen tensors from the folder's own link or, where the file system has no hard links, from the run's blobs."""
    problems = []
    for path in (entry.path / FROZEN, entry.path.parent / "blobs" / blob_name(spec)):
        try:
            return read_safetensors(path, spec, keep)
        except Corrupt as error:
            problems.append(str(error))
    raise FrozenMissing(f"{entry.path.name}: frozen tensors: {'; '.join(problems)}")


def is_whole(entry: Entry) -> bool:
    """All files there with the right sizes: the cheap check, without reading them."""
    return all(size_of(entry.path / name) == spec.size for name, spec in entry.files.items())


def is_linked(entry: Entry, folder: Path) -> bool:
    """Whether `folder` holds the very files of a checkpoint, not copies of them."""
    with contextlib.suppress(OSError):
        return all((entry.path / name).samefile(folder / name) for name in entry.files)
    return False


Cache = dict[tuple[Path, int, int, int], Entry]  # by path, inode, time and length of the manifest


def scan(run: Path, cache: Cache | None = None) -> tuple[list[Entry], list[Path]]:
    """Step checkpoints of a run, newest save first, and the folders whose manifest can't be used.

    A checkpoint that was moved aside by a replacement that never arrived (.old-…) counts, after its successor. With
    `cache`, manifests that have not changed since they were last read are not read again: good enough for rotation.

    Raises: PersistenceError if the folder may not be looked into.
    """
    entries, broken = [], []
    for name in names_in(run):
        old = OLD_NAME.fullmatch(name)
        if not STEP_NAME.fullmatch(name) and not (old and old.group(2)):
            continue
        try:
            entries.append(read_manifest(run / name)[1] if cache is None else read_cached(run / name, cache))
        except (Corrupt, OSError):
            if os.path.isdir(run / name):  # else a reader met a checkpoint that its writer was just pruning
                broken.append(run / name)
    return sorted(entries, key=lambda e: (e.sequence, e.path.name), reverse=True), broken


def read_cached(folder: Path, cache: Cache) -> Entry:
    """The entry of a checkpoint folder. Raises: Corrupt, OSError."""
    info = (folder / MANIFEST).lstat()
    key = (folder, info.st_ino, info.st_mtime_ns, info.st_size)
    if key not in cache:
        entry = read_manifest(folder)[1]
        for old in [other for other in cache if other[0] == folder or not other[0].exists()]:
            del cache[old]
        cache[key] = entry
    return cache[key]


def frozen_path(entry: Entry) -> Path:
    own = entry.path / FROZEN
    return own if own.exists() or entry.frozen is None else entry.path.parent / "blobs" / blob_name(entry.frozen)
