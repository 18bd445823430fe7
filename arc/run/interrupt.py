"""Signals: finish the optimizer step, save, leave."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

# SIGHUP is not there on Windows
ENDINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP arrived; args[0] is the signal's number."""


class StopSignal:
    """The signal that asks this run to end, if one has arrived. The first is obeyed after the step that is being made;
    a second one ends at once (KeyboardInterrupt), unless this is one process of several (`patient`): these save
    together, and whoever started them ends them if that takes too long."""

    def __init__(self, log: Callable[[str], None], *, saving: bool = True, patient: bool = False) -> None:
        self.log, self.number, self.saving, self.patient = log, 0, saving, patient

    def check(self, agreed: Callable[[int], int] = int) -> None:
        """Raise `Interrupted` if a signal has arrived. agreed: of this process's signal, 0 for none, makes the one that
        holds for all."""
        if number := agreed(self.number):
            raise Interrupted(number)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGINT, SIGTERM and SIGHUP (unless it is ignored, as under nohup) are handled here; afterwards as
        before. Outside the main thread, as in some notebook front ends, the caller's handling stays."""
        numbers = [n for n in ENDINGS if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]
        previous: dict[int, Any] = {}
        try:
            with contextlib.suppress(ValueError):  # not in the main thread
                previous = {number: signal.signal(number, self._handle) for number in numbers}
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        if self.number and not self.patient:
            raise KeyboardInterrupt
        self.number = number
        what = "saving and leaving after this step" if self.saving else "leaving after this batch"
        self.log(f"{signal.Signals(number).name}: {what} (again to leave at once)")
