"""The thread that writes, one save in flight."""

from __future__ import annotations

import threading
from collections.abc import Callable

from arc.persistence.names import PersistenceError


class Writer:
    """Runs one save at a time in a thread. Nobody is there to catch what goes wrong: it is kept and raised where the
    next save, `wait` or `close` asks for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None

    def start(self, save: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint-writer")
        self._thread.start()

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as error:
            self._failure = error

    def join(self) -> None:
        """Returns when no save is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def raise_failure(self) -> None:
        """Raises what the last save failed with, once, as a PersistenceError."""
        failure, self._failure = self._failure, None
        if isinstance(failure, PersistenceError):
            raise failure
        if failure is not None:
            raise PersistenceError(f"checkpoint was not saved: {type(failure).__name__}: {failure}") from failure

    def forget(self) -> None:
        """In a forked child: the thread stayed in the parent."""
        self._thread = None
