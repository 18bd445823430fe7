"""The run's records: log lines and bars, train.log, metrics.jsonl, and TensorBoard's events where that is installed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from arc import events
from arc.terminal import is_live, progress_bar


class RunLog:
    """Writes log lines to stdout (around progress bars, not through them) and to train.log, and rows to metrics.jsonl
    and, if `tensorboard`, to event files below tensorboard/.

    Lines logged before `open` are kept and written to train.log once the run's folder exists, so that nothing is
    written anywhere while the arguments are still being checked.
    """

    def __init__(self, *, quiet: bool = False, tensorboard: bool = False) -> None:
        self.quiet, self.tensorboard = quiet, tensorboard
        self.events: events.EventLog | None = None
        self.folder: Path | None = None
        self.early: list[str] = []
        self.rows = 0  # rows in metrics.jsonl; goes into every checkpoint

    def open(self, folder: Path, *, rows: int | None) -> None:
        """Start writing in `folder`. rows: how many rows metrics.jsonl had when the checkpoint was made (0: a new run);
        later ones are dropped, since what they record is run again. None: nothing is run again, all stay."""
        self.folder = folder
        for line in self.early:
            self._append("train.log", line)
        self.early.clear()
        kept = self._keep_metrics(rows)
        if rows is not None:
            self.rows = rows
        if self.tensorboard and events.installed():
            self.events = events.open_events(folder / "tensorboard", [json.loads(line) for line in kept], self)

    def close(self) -> None:
        """Close the event file; everything else is closed after each line."""
        if self.events is not None:
            self.events.close()

    def bar(self, iterable: Any = None, **options: Any) -> Any:
        """A tqdm bar on stderr (see `arc.terminal.progress_bar`); none under --quiet."""
        return progress_bar(iterable, **{"disable": self.quiet, **options})

    def __call__(self, line: str = "", *, error: bool = False) -> None:
        """Log one line (or several, separated by newlines)."""
        if error or not self.quiet:
            stream = sys.stderr if error else sys.stdout
            if is_live():
                tqdm.write(line, file=stream)  # around bars that are redrawn in place
            else:
                print(line, file=stream, flush=True)
        if self.folder is None:
            self.early.append(line)
        else:
            self._append("train.log", line)

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
        """Keep the first `rows` rows (None: all), but no row that a kill has torn; the file is replaced atomically.
        Returns what is kept, a line each."""
        assert self.folder is not None
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines[:rows] if line.endswith(b"\n")]
        if len(kept) < len(lines):
            temporary = path.with_name(f".metrics-{os.getpid()}.tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        return kept


def replace_file(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`; a reader finds the old file or the whole new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
