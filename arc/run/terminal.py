"""What a person watches: bars, on a terminal and where there is none, and how long things take."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import std
from tqdm.auto import tqdm

from arc.run.flags import ipython_shell

LINE_SECONDS = 30.0  # between two lines of a bar where nothing can be redrawn


def is_live() -> bool:
    """Whether bars can be redrawn in place: stderr is a terminal, or a notebook's cell (whose shell has a kernel)."""
    return sys.stderr.isatty() or hasattr(ipython_shell(), "kernel")


def write_line(line: str, *, error: bool = False) -> bool:
    """Write a line to stdout (stderr if `error`), around bars that are redrawn in place. False: it is lost, for the
    stream cannot be written (its reader has ended, the terminal or the disk's last byte is gone), and so will be all
    that comes after it; a training must outlive that."""
    stream = sys.stderr if error else sys.stdout
    try:
        if is_live():
            tqdm.write(encodable(line, stream), file=stream)
        else:
            print(encodable(line, stream), file=stream, flush=True)
    except BlockingIOError:  # a full pipe that does not wait: this line only
        return True
    except OSError:
        drop(stream)
        return False
    return True


def encodable(text: str, stream: Any) -> str:
    """The text with an escape in place of each character that the stream's encoding does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def drop(stream: Any) -> None:
    """Let everything written to a stream from now on, and what is left in its buffer, go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class LineBar(std.tqdm):
    """A bar for log files: at most one line every LINE_SECONDS, one at the end, and no control characters."""

    disable: bool  # set by tqdm, which has no annotations

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        # No line before the first interval is over; maxinterval is when tqdm's monitor draws by itself.
        super().__init__(
            iterable, mininterval=LINE_SECONDS, maxinterval=2 * LINE_SECONDS, delay=LINE_SECONDS, **options
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        try:
            self.fp.write(encodable(f"{self}\n", self.fp))
        except OSError:
            drop(self.fp)
        return True

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            self.display()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> std.tqdm:
    """A tqdm bar on stderr. Where it can be redrawn it is, and vanishes at its end; elsewhere it is a `LineBar`.

    options: those of tqdm (total, initial, desc, unit, disable, ...).
    """
    if is_live():
        return tqdm(iterable, leave=False, **options)
    return LineBar(iterable, **options)


class Pace:
    """Seconds that a batch takes in this process, waiting for data included, from the first WINDOW batches after the
    first one (which has to wait for everything to start)."""

    WINDOW = 10

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None
        self._told = False

    def measure(self, step: int) -> float | None:
        """To be called after each optimizer step with the batches done. The seconds once, when they are known; before
        and after that None."""
        now = time.monotonic()
        if self._start is None:
            self._start = step, now
        batches = step - self._start[0]
        if self._told or batches < self.WINDOW:
            return None
        self._told = True
        return (now - self._start[1]) / batches


def duration(seconds: float) -> str:
    """About how long, for people: 48 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
