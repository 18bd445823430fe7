"""What everything that reads or writes files shares: checks of a path, JSON with limits, replacing a file whole."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 256 * 2**20  # the largest public set is 4 MB; anything near this is not ARC data
MAX_REPORTED = 10  # problems spelled out in one message


class UserError(ValueError):
    """Something that the user can mend: one line on stderr, exit code 2. Anything else that is raised is a fault of the
    program and shows its traceback."""


def cannot_write(folder: Path) -> str | None:
    """Why nothing could be written below `folder`, or None; creates nothing."""
    place = folder.absolute()
    try:
        while not place.exists() and place != place.parent:
            if place.is_symlink():
                return f"{place} is a link to what is not there (a drive that is not mounted?)"
            place = place.parent
    except (OSError, ValueError) as error:
        return _unreachable(folder, error)
    if not place.is_dir():
        return f"{place} is a file, not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"no permission to write in {place}"
    return None


def cannot_look(path: Path) -> str | None:
    """Why it cannot even be told whether `path` is there (too long a name, a NUL in it, no permission), or None."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return _unreachable(path, error)
    return None


def _unreachable(path: Path, error: OSError | ValueError) -> str:
    """Too long a name, a NUL in it, no permission to look: the system's reason, with as much of the name as helps."""
    return f"{str(path)[:60]!r}: {getattr(error, 'strerror', None) or error}"


def cannot_write_file(path: Path) -> str | None:
    """Why `path` could not become a file, or replace the regular file that is there, or None; creates nothing."""
    if problem := cannot_look(path):
        return problem
    if path.exists() and not path.is_file():
        return f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; name a file"
    return cannot_write(path.parent)


def default_cache() -> str:
    """The user's cache folder; for a user without a home one in the current folder."""
    home = os.path.expanduser("~")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("" if home == "~" else home, ".cache")
    return os.path.join(caches, "arc-trainloop")


def replace_file(
    path: Path, content: str | bytes, *, check: Callable[[Path], None] | None = None, sync: bool = True
) -> None:
    """Write `content` (text as UTF-8) to `path`; a reader finds the old file or the whole new one, and a symbolic link
    is replaced, not followed.

    check: called with the new file, whole and synced, before it takes the place of the old one; what it raises leaves
    the old one. sync: False where a file that a crash leaves torn is known for it and made anew. Raises OSError.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # short, whatever length the name has
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # gone after the rename, or never made
            temporary.unlink()


def read_json(path: Path) -> object:
    """The value in a UTF-8 JSON file. Raises UserError, one line naming the file, for anything that is not one."""
    return parse_json(read_whole(path), str(path))


def read_whole(path: Path) -> bytes:
    """The bytes of a regular file (never of a pipe or a device, which could block or never end), at most MAX_FILE_BYTES
    of them. Raises UserError, one line naming the file."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                problem = "is not a regular file"
            elif status.st_size > MAX_FILE_BYTES:
                problem = f"has {status.st_size >> 20} MiB, more than the {MAX_FILE_BYTES >> 20} MiB allowed"
            else:
                return file.read()
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    raise UserError(one_line(f"{path}: {problem}"))


def parse_json(data: bytes, where: str) -> object:
    """The value of UTF-8 JSON. Raises UserError, one line that begins with `where`, for anything that is not."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError as error:  # a key twice, or an integer of thousands of digits
        problem = str(error)
    raise UserError(one_line(f"{where}: {problem}"))


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) < len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise ValueError(f"has the key {describe(twice)} more than once in one object")
    return result


def join_problems(problems: Sequence[str]) -> str:
    """All problems in one line: the first ten spelled out, the others counted, what cannot be printed escaped."""
    more = len(problems) - MAX_REPORTED
    return one_line("; ".join([*problems[:MAX_REPORTED], *([f"and {more} more"] if more > 0 else [])]))


def describe(value: object) -> str:
    """A JSON value for a message. Containers are not printed: they may be huge, or too deeply nested to print."""
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object of {len(value)}" if value else "an empty object"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    return text if text.isprintable() and 0 < len(text) <= 60 else describe(text)


def one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
