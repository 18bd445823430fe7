"""Files: written and hashed in one pass and synced, read only if every byte is the one that was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arc.persistence.names import CHUNK, MAX_FILE_BYTES, MAX_HEADER_BYTES, Corrupt, PersistenceError
from arc.persistence.tree import DTYPE_NAMES, DTYPES, dump_json, parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class FileSpec:
    """What a manifest says of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Image:
    """A safetensors file to be written: its header and the tensors behind it as (tensor, begin, end) byte ranges."""

    header: bytes
    slots: tuple[tuple[torch.Tensor, int, int], ...]
    data_bytes: int

    @property
    def size(self) -> int:
        return len(self.header) + self.data_bytes


def image_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Image:
    """Lays out a safetensors file: 8-byte little-endian header length, JSON header padded to 8 bytes, tensor bytes.

    Source: https://github.com/huggingface/safetensors, "Format". Widest types come first, so that every tensor is
    aligned without holes (the format allows none).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    slots, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        slots.append((tensor, begin, end))
    text = dump_json(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise PersistenceError(f"state: {len(tensors)} tensors are too many for one safetensors file")
    return Image(len(text).to_bytes(8, "little") + text, tuple(slots), end)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Memory of a contiguous CPU tensor as writable bytes."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # with 0 or 1 elements any stride counts as contiguous
    return flat.view(torch.uint8).numpy().data


def stream(image: Image) -> Iterator[memoryview]:
    """The file's bytes without a host copy of the whole: one tensor at a time."""
    yield memoryview(image.header)
    for tensor, _, _ in image.slots:
        yield _bytes_of(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())


def write_file(path: Path, parts: Iterable[memoryview], anew: bool = True) -> FileSpec:
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
    return FileSpec(size, digest.hexdigest())


def chunks(file: io.FileIO) -> Iterator[memoryview]:
    while chunk := file.read(CHUNK):
        yield memoryview(chunk)


def copy_file(source: Path, target: Path) -> FileSpec:
    """Plain copy in chunks, synced. Raises: Corrupt if the source is not a regular file, OSError."""
    with open_regular(source) as (file, _):
        return write_file(target, chunks(file))


def _fsync(fd: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # on macOS fsync leaves the bytes in the drive's cache
    if full is not None:
        fcntl.fcntl(fd, full)
    else:
        os.fsync(fd)


def fsync_dir(path: Path) -> None:
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
def open_regular(path: Path) -> Iterator[tuple[io.FileIO, int]]:
    """Opens a regular file for reading and yields (file, size); no symlink is followed, no pipe waited for.

    Raises: Corrupt if it is missing or something else, OSError if it can't be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise Corrupt(f"{path.name} is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Corrupt(f"{path.name} is a symbolic link") from None
        raise
    with io.FileIO(fd) as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise Corrupt(f"{path.name} is not a regular file")
        yield file, info.st_size


def read_into(file: io.FileIO, target: memoryview, digest: Any, name: str) -> None:
    for start in range(0, len(target), CHUNK):
        chunk = target[start : start + CHUNK]
        done = 0
        while done < len(chunk):
            count = file.readinto(chunk[done:])
            if not count:
                raise Corrupt(f"{name} ends early")
            done += count
        digest.update(chunk)


def _hash_rest(file: io.FileIO, digest: Any) -> None:
    scratch = memoryview(bytearray(CHUNK))
    while count := file.readinto(scratch):
        digest.update(scratch[:count])


def read_safetensors(path: Path, spec: FileSpec, keep: bool = True) -> dict[str, torch.Tensor]:
    """Reads and hashes in one pass; the tensors own their memory and are returned only if size and digest are right.
    Without `keep` everything is verified just so, but the tensors come back empty and take no memory.

    Raises: Corrupt, OSError.
    """
    with open_regular(path) as (file, size):
        if size != spec.size:
            raise Corrupt(f"{path.name} has {size:,} bytes, not {spec.size:,}")
        if size < 8:
            raise Corrupt(f"{path.name} is too short")
        digest = hashlib.sha256()
        prefix = bytearray(8)
        read_into(file, memoryview(prefix), digest, path.name)
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise Corrupt(f"{path.name} has a broken header length")
        header = bytearray(length)
        read_into(file, memoryview(header), digest, path.name)
        tensors = {}
        for name, dtype, shape in _parse_header(bytes(header), size - 8 - length, path.name):
            tensors[name] = torch.empty(shape if keep else 0, dtype=dtype)
            if keep:
                read_into(file, _bytes_of(tensors[name]), digest, path.name)
        _hash_rest(file, digest)
    if digest.hexdigest() != spec.sha256:
        raise Corrupt(f"{path.name} does not have the SHA-256 of its manifest")
    return tensors


def _parse_header(header: bytes, data_bytes: int, file: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Tensors in the order of their bytes. They must cover the data exactly, so a header can't ask for more memory
    than the file is long."""
    table = parse_json(header)
    if type(table) is not dict:
        raise Corrupt(f"{file}: the header is not an object")
    table.pop("__metadata__", None)
    rows = []
    for name, entry in table.items():
        if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Corrupt(f"{file}: broken header entry {name[:80]!r}")
        dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
        shape, offsets = entry["shape"], entry["data_offsets"]
        if dtype is None or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise Corrupt(f"{file}: broken header entry {name[:80]!r}")
        if math.prod(max(1, side) for side in shape) > MAX_FILE_BYTES:  # of an empty tensor too: torch refuses it
            raise Corrupt(f"{file}: {name[:80]!r} has an absurd shape")
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            raise Corrupt(f"{file}: {name[:80]!r} has the wrong number of bytes")
        rows.append((offsets[0], offsets[1], name, dtype, tuple(shape)))
    rows.sort(key=lambda row: row[:2])
    end = 0
    for begin, stop, name, _, _ in rows:
        if begin != end:
            raise Corrupt(f"{file}: a hole or an overlap before {name[:80]!r}")
        end = stop
    if end != data_bytes:
        raise Corrupt(f"{file}: bytes that belong to no tensor")
    return [(name, dtype, shape) for _, _, name, dtype, shape in rows]


def _is_sizes(value: Any) -> bool:
    return type(value) is list and len(value) <= 64 and all(type(v) is int and 0 <= v <= MAX_FILE_BYTES for v in value)


def remove_tree(path: Path) -> None:
    """Deletes a folder, or a file or link in its place; what is already gone is fine. Links are not followed."""
    try:
        if is_own_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Deletes an unfinished folder or file when the block fails; what can't be deleted now is swept later."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(path)
        raise


def is_own_folder(path: Path) -> bool:
    """Whether it is a folder, and no link to one that may be anybody's."""
    return path.is_dir() and not path.is_symlink()


def make_own_folder(path: Path) -> None:
    """mkdir unless it is there. Raises: PersistenceError if that is a link, through which nothing is written."""
    path.mkdir(exist_ok=True)
    if not is_own_folder(path):
        raise PersistenceError(f"{path} is a link: nothing is written through it")


def names_in(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing where there is none. Raises: PersistenceError if it can't be listed."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise PersistenceError(f"{folder} can't be listed: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """mkdir -p that survives a power loss: each new name is synced in its parent."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        fsync_dir(folder.parent)


def memory_available() -> int | None:
    """Bytes that can be allocated without swapping (Linux), else None."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def size_of(path: Path) -> int:
    """Length of a file, -1 if it is not there."""
    try:
        return path.lstat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def tree_size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def truncate_and_unlink(path: Path) -> None:
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
