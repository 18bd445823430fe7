"""The JSON files of a data set, wherever they lie: in folders, gzipped, or in a zip archive.

Nothing is extracted to disk, what is unpacked is bounded, and what a system left behind (names that begin with a dot,
`__MACOSX`) is no data.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from arc.run.files import MAX_FILE_BYTES, UserError, one_line, parse_json, read_json, read_whole

MAX_FILES = 100_000  # files and folders looked at below one folder; the largest public set has a few thousand

Place = tuple[str, ...]  # names of folders, from the root of a tree down


@dataclass(frozen=True)
class JsonFile:
    """A JSON file: its folders below the root of its tree, its name without `.gz`, and how messages call it."""

    folders: Place
    name: str
    where: str
    read: Callable[[], object]  # its value; UserError, one line naming `where`

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem


class Tree(Protocol):
    """Folders with JSON files in them. What cannot be listed is reported as a problem and left out."""

    def folders(self, at: Place) -> list[str]:
        """Names of the folders directly in `at`, sorted."""

    def files(self, at: Place, *, deep: bool) -> list[JsonFile]:
        """The JSON files in `at`, directly or at any depth, sorted by their path."""


def is_hidden(name: str) -> bool:
    """Whether a name is of the system's or an editor's making: `._x.json`, `.ipynb_checkpoints`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def plain_name(name: str) -> str:
    """A file's name without `.gz`."""
    return name[:-3] if name.lower().endswith(".gz") else name


def is_json(name: str) -> bool:
    return plain_name(name).lower().endswith(".json") and not is_hidden(name)


def file_on_disk(path: Path, folders: Place = ()) -> JsonFile:
    """The file at `path`, gunzipped when it is read if its name ends in `.gz`."""
    read = partial(_read_gzip, path) if path.name.lower().endswith(".gz") else partial(read_json, path)
    return JsonFile(folders, plain_name(path.name), str(path), read)


def _read_gzip(path: Path) -> object:
    packed = read_whole(path)
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(one_line(f"{path}: cannot be unpacked: {error}")) from None
    if len(data) > MAX_FILE_BYTES:
        raise UserError(one_line(f"{path}: unpacks to more than the {MAX_FILE_BYTES >> 20} MiB allowed"))
    return parse_json(data, str(path))


def _sorted(files: list[JsonFile]) -> list[JsonFile]:
    return sorted(files, key=lambda file: (*file.folders, file.name))


class DiskTree:
    """A folder on disk. Links to folders are followed, to each folder once."""

    def __init__(self, root: Path, problems: list[str]) -> None:
        self.root, self._problems = root, problems

    def folders(self, at: Place) -> list[str]:
        folder = self.root.joinpath(*at)
        try:
            names = os.listdir(folder)
        except OSError as error:
            self._report(error)
            return []
        return sorted(name for name in names if not is_hidden(name) and os.path.isdir(folder / name))

    def files(self, at: Place, *, deep: bool) -> list[JsonFile]:
        top, seen = self.root.joinpath(*at), 0
        found: list[JsonFile] = []
        met = {os.path.realpath(top)}
        for where, folders, files in os.walk(top, onerror=self._report, followlinks=True):
            place = (*at, *Path(where).relative_to(top).parts)
            found += [file_on_disk(Path(where, name), place) for name in files if is_json(name)]
            real = {name: os.path.realpath(os.path.join(where, name)) for name in sorted(folders) if deep}
            folders[:] = [name for name, path in real.items() if not is_hidden(name) and path not in met]
            met.update(real.values())
            seen += len(folders) + len(files)
            if deep and seen > MAX_FILES:
                self._add(
                    f"{top}: has more than {MAX_FILES:,} files and folders below it; name the folder of the tasks"
                )
                break
        return _sorted(found)

    def _report(self, error: OSError) -> None:
        self._add(f"{error.filename}: this folder cannot be read: {error.strerror}")

    def _add(self, problem: str) -> None:
        if problem not in self._problems:  # a folder may be listed twice
            self._problems.append(problem)


class ZipTree:
    """A zip archive, read into memory. What its JSON files declare to unpack to is bounded together, and zipfile reads
    no more of a file than it declares."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self._path, self._members = path, list[tuple[Place, zipfile.ZipInfo]]()
        try:
            self._open(read_whole(path))
        except UserError as error:
            problems.append(str(error))
        except _ZIP_FAULTS as error:
            problems.append(one_line(f"{path}: is not a readable zip archive ({error})"))

    def _open(self, data: bytes) -> None:
        if data.count(b"PK\x01\x02") > MAX_FILES:  # one for each file: refused before a list of them is made
            raise UserError(f"{self._path}: holds more than {MAX_FILES:,} files")
        self._archive = zipfile.ZipFile(io.BytesIO(data))
        for info in self._archive.infolist():
            parts = tuple(part for part in info.filename.replace("\\", "/").split("/") if part)
            if parts and not info.is_dir() and is_json(parts[-1]) and not any(map(is_hidden, parts)):
                self._members.append((parts, info))
        total = sum(info.file_size for _, info in self._members)
        if total > MAX_FILE_BYTES:
            self._members.clear()
            allowed = f"the {MAX_FILE_BYTES >> 20} MiB allowed"
            raise UserError(f"{self._path}: its JSON files unpack to {total >> 20} MiB, more than {allowed}")

    def folders(self, at: Place) -> list[str]:
        depth = len(at)
        return sorted({parts[depth] for parts, _ in self._members if parts[:depth] == at and len(parts) > depth + 1})

    def files(self, at: Place, *, deep: bool) -> list[JsonFile]:
        depth = len(at)
        inside = [(parts, info) for parts, info in self._members if parts[:depth] == at]
        return _sorted([self._file(parts, info) for parts, info in inside if deep or len(parts) == depth + 1])

    def _file(self, parts: Place, info: zipfile.ZipInfo) -> JsonFile:
        where = f"{self._path}/{'/'.join(parts)}"
        return JsonFile(parts[:-1], parts[-1], where, partial(self._read, info, where))

    def _read(self, info: zipfile.ZipInfo, where: str) -> object:
        if info.filename.lower().endswith(".gz"):
            raise UserError(one_line(f"{where}: is packed twice; unpack it, or leave it out"))
        try:
            data = self._archive.read(info)
        except _ZIP_FAULTS as error:  # RuntimeError: encrypted; NotImplementedError: a rare way of packing
            raise UserError(one_line(f"{where}: cannot be unpacked: {error}")) from None
        return parse_json(data, where)


_ZIP_FAULTS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(OSError, EOFError, RuntimeError, ValueError, OverflowError, KeyError),
)
