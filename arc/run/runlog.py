"""The run's records: log lines and bars, train.log, metrics.jsonl, and TensorBoard's events where that is installed."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from arc.run.files import UserError, replace_file
from arc.run.terminal import progress_bar, write_line


class Events(Protocol):
    """What else keeps the rows of metrics.jsonl, and pictures of predictions: event files for TensorBoard."""

    def scalars(self, row: Mapping[str, Any]) -> None:
        """Append a row."""

    def pictures(self, split: str, step: int, pairs: Sequence[Any]) -> None:
        """Append pictures of a split's predictions, before the row of their validation."""

    def close(self) -> None:
        """Append nothing more."""


# Called with the run's folder, the rows that are in metrics.jsonl, and where to say something; None: no events.
OpenEvents = Callable[[Path, Sequence[Mapping[str, Any]], Callable[[str], None]], Events | None]


class RunLog:
    """Writes log lines to stdout (around progress bars, not through them) and to train.log, and rows to metrics.jsonl
    and to the event log that `open` is handed.

    Lines logged before `open` are kept and written to train.log once the run's folder exists, so that nothing is
    written anywhere while the arguments are still being checked. `mute`: says and writes nothing, for all processes of
    a job but the first.
    """

    def __init__(self, *, quiet: bool = False, mute: bool = False) -> None:
        self.quiet, self.mute = quiet or mute, mute
        self.events: Events | None = None
        self.folder: Path | None = None
        self.early: list[str] = []
        self.rows = 0  # rows in metrics.jsonl; goes into every checkpoint
        self.waiting: dict[str, bytes] = {}  # what could not be written yet, by the file's name

    def open(self, folder: Path, *, rows: int | None, open_events: OpenEvents | None = None) -> None:
        """Start writing in `folder`. rows: how many rows metrics.jsonl had when the checkpoint was made (0: a new run);
        later ones are dropped, since what they record is run again. None: nothing is run again, all stay."""
        self.folder = folder
        own = self._unlink_links()
        for line in self.early:
            self._append("train.log", line)
        self.early.clear()
        for name in own:
            self(f"{name} was a symbolic link to somewhere else; nothing is written there, it is a file of its own now")
        kept = self._keep_metrics(rows)
        if rows is not None:
            self.rows = len(kept)
            if len(kept) < rows:
                self(f"metrics.jsonl has {len(kept)} rows, the checkpoint was made after {rows}: the others are lost")
        if open_events is not None:
            rows_of_events = [row for line in kept if (row := _row(line)) is not None]
            if len(rows_of_events) < len(kept):
                self(f"metrics.jsonl: {len(kept) - len(rows_of_events)} damaged rows are left out of the event files")
            self.events = open_events(folder, rows_of_events, self)

    def close(self) -> None:
        """Close the event file; everything else is closed after each line. What could not be written before is tried a
        last time: see `exit_code`."""
        if self.events is not None:
            self.events.close()
        for name in list(self.waiting):
            self._write(name, b"")

    def exit_code(self, code: int) -> int:
        """After `close`: `code`; where something could never be written that is said, and 0 becomes 1."""
        if not self.waiting:
            return code
        names = ", ".join(sorted(self.waiting))
        write_line(f"error: {names} in {self.folder} could not be written to the end: the rest is lost", error=True)
        return code or 1

    def bar(self, iterable: Any = None, **options: Any) -> Any:
        """A tqdm bar on stderr (see `arc.run.terminal.progress_bar`); none under --quiet."""
        return progress_bar(iterable, **{**options, "disable": self.quiet or options.get("disable", False)})

    def __call__(self, line: str = "", *, error: bool = False) -> None:
        """Log one line (or several, separated by newlines)."""
        if self.mute:
            return
        lines = [line]
        if (error or not self.quiet) and not write_line(line, error=error):
            lines.append(f"{'stderr' if error else 'stdout'} cannot be written any more; going on with train.log alone")
        for each in lines:
            if self.folder is None:
                self.early.append(each)
            else:
                self._append("train.log", each)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl in a single write. Non-finite numbers become null (strict JSON)."""
        if self.mute:
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        self._append("metrics.jsonl", json.dumps(clean, allow_nan=False))
        self.rows += 1
        if self.events is not None:
            self.events.scalars(clean)

    def _append(self, name: str, line: str) -> None:
        self._write(name, (line + "\n").encode("utf-8", "backslashreplace"))

    def _write(self, name: str, lines: bytes) -> None:
        """Append whole lines to a file, those that are waiting first. Where that is not possible (a full disk, a folder
        that is gone) they wait, which is said once: a training must outlive its records."""
        assert self.folder is not None
        first, lines = name not in self.waiting, self.waiting.pop(name, b"") + lines
        try:
            append(self.folder / name, lines)
        except OSError as error:
            self.waiting[name] = lines
            if first:
                problem = f"{name} cannot be written ({error.strerror or error}); its lines are kept until it can be"
                write_line(f"Warning: {problem}", error=True)

    def _unlink_links(self) -> list[str]:
        """Remove symbolic links among the run's records: a folder from elsewhere could have them point anywhere."""
        assert self.folder is not None
        own = [name for name in ("train.log", "metrics.jsonl", "tensorboard") if (self.folder / name).is_symlink()]
        for name in own:
            (self.folder / name).unlink()
        return own

    def _keep_metrics(self, rows: int | None) -> list[bytes]:
        """Keep the first `rows` rows (None: all), but no row that a kill has torn. Returns what is kept, a line each.

        Rows that are cut off stay in metrics-before-resume.jsonl, for a run that is resumed from an older checkpoint
        may end before it has saved anything, and then be resumed from a newer one.
        """
        assert self.folder is not None
        path, former = self.folder / "metrics.jsonl", self.folder / "metrics-before-resume.jsonl"
        content, saved = map(_content, (path, former))
        lines, before = _whole_lines(content), _whole_lines(saved)
        # The checkpoint was saved when there were more rows than now, so before they were cut off. Rows since then, of
        # a way that was left without being saved, go.
        kept = before[:rows] if rows is not None and len(lines) < rows <= len(before) else lines[:rows]
        try:
            if len(kept) < len(lines) > len(before):
                replace_file(former, b"".join(lines))
            if b"".join(kept) != content:
                replace_file(path, b"".join(kept))
        except OSError as problem:
            raise UserError(f"--output_dir: cannot write {path}: {problem.strerror or problem}") from problem
        return kept


def _content(path: Path) -> bytes:
    """Of a run's record; nothing where there is none. UserError for what cannot be read, or would never end."""
    try:
        if not path.exists():
            return b""
        if path.is_file():
            return path.read_bytes()
    except OSError as error:
        raise UserError(f"--output_dir: cannot read {path}: {error.strerror}") from error
    raise UserError(f"--output_dir: {path} is not a regular file")


def append(path: Path, lines: bytes) -> None:
    """Append `lines` to a file, following no symbolic link; all of them or, as far as the disk allows, none. OSError.

    One write on an O_APPEND descriptor: a kill leaves whole lines, at worst one torn at the very end.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        before, written = os.fstat(descriptor).st_size, os.write(descriptor, lines)
        if written < len(lines):  # the disk is full: half a line would be taken for a damaged one
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line of metrics.jsonl holds; None where it holds something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53
    return row if whole else None


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines that end as lines do; a torn one at the end is left out."""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
