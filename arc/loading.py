"""From a data set of batches to a loader of them: workers, their signals, their end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from arc.batches import TensorBundle
from arc.episodes import Drawn, Episode
from arc.evidence import EvidenceStore
from arc.parallel import place
from arc.run.interrupt import ENDINGS
from arc.tasks import Task

PATIENCE = 600.0  # seconds for one batch: evidence of a batch's tasks takes some; nothing here waits for ever


class WorkerLost(RuntimeError):
    """A process that prepares batches has ended or does not answer; one line."""


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, batch) keys of one epoch from batch `start` on: how a resumed run enters in mid-epoch."""

    def __init__(self, batches: Sequence[tuple[Episode | Drawn, ...]], epoch: int, start: int = 0) -> None:
        self.batches, self.epoch, self.start = batches, epoch, start

    def __iter__(self) -> Iterator[tuple[int, tuple[Episode | Drawn, ...]]]:
        for batch in self.batches[self.start :]:
            yield self.epoch, batch

    def __len__(self) -> int:
        return len(self.batches) - self.start


class Packed:
    """A batch on its way from a worker, as arrays: they go through the pipe. Tensors would go through /dev/shm, which
    containers keep small, and where it is full a batch is lost without a word."""

    def __init__(self, batch: TensorBundle) -> None:
        self.batch = batch.mapped(Tensor.numpy)

    def unpacked(self) -> TensorBundle:
        return self.batch.mapped(torch.from_numpy, np.ndarray)

    def pin_memory(self) -> TensorBundle:
        """What DataLoader asks for, in a thread of its own."""
        return self.unpacked().pin_memory()


class Packing(torch.utils.data.Dataset):
    """Data whose batches come from another process."""

    def __init__(self, data: torch.utils.data.Dataset) -> None:
        self.data = data

    def __getitem__(self, key: Any) -> Any:
        batch = self.data[key]
        return Packed(batch) if isinstance(batch, TensorBundle) else batch


def worker_count(asked: int) -> int:
    """--workers, by default (-1) one less than there are cores, between 1 and 4."""
    return asked if asked >= 0 else min(4, max(1, cores() - 1))


def waiting_workers(asked: int) -> int:
    """The same for work that this process only waits for: by default its own core is free for one more."""
    return asked if asked >= 0 else min(8, cores())


def cores() -> int:
    """Processor cores for this process: those of the machine, divided among the processes of its job there."""
    return max(1, (os.cpu_count() or 1) // place().local_size)


def make_loader(data: torch.utils.data.Dataset, sampler: Any, *, workers: int, pin_memory: bool) -> DataLoader:
    """Batches arrive ready-made; evidence is computed in the workers the first time a task is met, then cached.
    WorkerLost where there is no room for the workers' queues."""
    with starting():
        # As many locks as the queues need, tried first: an iterator of torch's that fails half-made cannot be ended
        # without a message of its own.
        tried = [multiprocessing.Lock() for _ in range(4 * workers + 8 if workers else 0)]
        del tried
    return DataLoader(
        Packing(data) if workers else data,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        timeout=PATIENCE if workers else 0,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it draws from the global one, and a resumed run differs by that draw
    )


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Inside, what workers need is made: WorkerLost, one line, where the system does not give it."""
    try:
        yield
    except OSError as error:
        reason = f"worker processes cannot be started: {error.strerror} (/dev/shm is full, or too many processes?)"
        raise WorkerLost(f"{reason}; --workers 0 needs none") from error


def start_worker(_: int) -> None:
    """Signals are for the main process, which saves first and ends its workers afterwards: those to the whole process
    group (Ctrl-C, `timeout`, SLURM, systemd) must not take a worker away while its batch is waited for. It leaves with
    the main process, though, however that ends: half of a batch may be in a pipe that nobody will ever read."""
    threading.Thread(target=leave_with_parent, name="leave with parent", daemon=True).start()
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def leave_with_parent() -> None:
    """End this process when the one that started it has gone."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """What the loader gives; WorkerLost, one line, where a worker cannot be started or was lost on the way."""
    try:
        with starting(), endings_later():
            batches = iter(loader)
    finally:
        DEATHS.adopt()
    try:
        while True:
            with DEATHS.told():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.unpacked() if isinstance(batch, Packed) else batch
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" not in text and "DataLoader timed out" not in text:
            raise
        reason = text.splitlines()[0].rstrip(".")
        raise WorkerLost(f"{reason} (out of memory, or /dev/shm is full?); --workers 0 needs no processes") from error


@contextlib.contextmanager
def endings_later() -> Iterator[None]:
    """Inside, the signals that end a run wait, for this process and for those that it starts, which inherit that: one
    is not ended before it has come to ignore them (`start_worker`)."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Deaths:
    """torch raises a worker's death from its handler of SIGCHLD, wherever the main process is just then: in the midst
    of an update or of a line of log. Here it is kept until a batch is waited for, which is where it is understood."""

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._waiting = False
        self._death: RuntimeError | None = None

    def adopt(self) -> None:
        """Take the place of torch's handler, which it installs with the first workers of a process."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._heard:
            self._handler = handler
            signal.signal(signal.SIGCHLD, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        assert self._handler is not None
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            if self._waiting:
                raise
            self._death = error

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Inside, a death is raised as torch does, the first one that came before it as well."""
        self._waiting = True
        try:
            if self._death is not None:
                raise self._death
            yield
        finally:
            self._waiting, self._death = False, None

    def forget(self) -> None:
        """What was kept is of workers that were ended on purpose."""
        self._death = None


DEATHS = Deaths()  # one a process, as its handlers of signals are


def end_workers(before: Sequence[Any]) -> None:
    """End the child processes that were not there `before` (multiprocessing.active_children()). They ignore SIGTERM, by
    which Python would end them at its exit and then wait for ever for one that does not answer."""
    known = {child.pid for child in before}
    ours = [child for child in multiprocessing.active_children() if child.pid not in known and child.daemon]
    for child in ours:
        child.kill()
        child.join(5)
    DEATHS.forget()


class Unprepared:
    """Training tasks whose evidence this process has yet to wait for, which the workers prepare as tasks come up."""

    def __init__(self, tasks: Sequence[Task], store: EvidenceStore) -> None:
        self.left = {number for number, task in enumerate(tasks) if not store.is_prepared(task)}

    def __len__(self) -> int:
        return len(self.left)

    def met(self, tasks: Sequence[int]) -> int:
        """How many of a batch's tasks had to be prepared for it."""
        found = self.left & set(tasks)
        self.left -= found
        return len(found)
