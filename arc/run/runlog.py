"""The run's records: log lines and bars, train.log, metrics.jsonl, and TensorBoard's events where that is installed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from arc.run.files import replace_file
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
    written anywhere while the arguments are still being checked.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.events: Events | None = None
        self.folder: Path | None = None
        self.early: list[str] = []
        self.rows = 0  # rows in metrics.jsonl; goes into every checkpoint

    def open(self, folder: Path, *, rows: int | None, open_events: OpenEvents | None = None) -> None:
        """Start writing in `folder`. rows: how many rows metrics.jsonl had when the checkpoint was made (0: a new run);
        later ones are dropped, since what they record is run again. None: nothing is run again, all stay."""
        self.folder = folder
        for line in self.early:
            self._append("train.log", line)
        self.early.clear()
        kept = self._keep_metrics(rows)
        if rows is not None:
            self.rows = len(kept)
            if len(kept) < rows:
                self(f"metrics.jsonl has {len(kept)} rows, the checkpoint was made after {rows}: the others are lost")
        if open_events is not None:
            self.events = open_events(folder, [json.loads(line) for line in kept], self)

    def close(self) -> None:
        """Close the event file; everything else is closed after each line."""
        if self.events is not None:
            self.events.close()

    def bar(self, iterable: Any = None, **options: Any) -> Any:
        """A tqdm bar on stderr (see `arc.run.terminal.progress_bar`); none under --quiet."""
        return progress_bar(iterable, **{"disable": self.quiet, **options})

    def __call__(self, line: str = "", *, error: bool = False) -> None:
        """Log one line (or several, separated by newlines)."""
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
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        self._append("metrics.jsonl", json.dumps(clean, allow_nan=False))
        self.rows += 1
        if self.events is not None:
            self.events.scalars(clean)

    def _append(self, name: str, line: str) -> None:
        assert self.folder is not None
        # One write of one line on an O_APPEND descriptor: a kill leaves whole lines, at worst one torn at the very end.
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)

    def _keep_metrics(self, rows: int | None) -> list[bytes]:
        """Keep the first `rows` rows (None: all), but no row that a kill has torn. Returns what is kept, a line each.

        Rows that are cut off stay in metrics-before-resume.jsonl, for a run that is resumed from an older checkpoint
        may end before it has saved anything, and then be resumed from a newer one.
        """
        assert self.folder is not None
        path, former = self.folder / "metrics.jsonl", self.folder / "metrics-before-resume.jsonl"
        content, saved = (file.read_bytes() if file.exists() else b"" for file in (path, former))
        lines, before = _whole_lines(content), _whole_lines(saved)
        if rows is not None and len(lines) < rows <= len(before) and before[: len(lines)] == lines:
            kept = before[:rows]
        else:
            kept = lines[:rows]
        if len(kept) < len(lines) > len(before):
            replace_file(former, b"".join(lines))
        if b"".join(kept) != content:
            replace_file(path, b"".join(kept))
        return kept


def _whole_lines(content: bytes) -> list[bytes]:
    """The lines that end as lines do; a torn one at the end is left out."""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
