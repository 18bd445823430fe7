"""One training on several processes, each with a device of its own (torchrun starts them, several machines included).

Every process holds the same weights, moments and memory. The episodes of a batch are divided among them, so batches,
steps and learning rates are those of one process: a checkpoint of any number of processes is continued by any other.
Each process computes its part of the loss (a mean over the *whole* batch, of which it sums up its own episodes), and
the gradients are added up before they are unscaled, measured and clipped.

Why not `DistributedDataParallel`: its hooks take part in every backward pass, that of the feedback (`autograd.grad`
inside the step) included, and it averages over processes as if each had as many queries, cells and grid weights as the
others. Here parts are weighted exactly, and an update costs one sum.

What is exchanged are tensors and JSON: nothing that arrives can run code.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from arc.run.files import UserError
from arc.run.terminal import write_line
from arc.sharding import is_sharded

T = TypeVar("T")
PATIENCE = datetime.timedelta(minutes=30)  # of a process for the others: between them lies at most a validation
JOINING = datetime.timedelta(minutes=5)  # until all are there
LEAVING = datetime.timedelta(minutes=2)  # of the others for the first, at the end
JOINED = itertools.count()  # a notebook's process may belong to one team after the other
SILENCE = 20.0  # seconds without a sign of life after which a process is taken to hang
LEFT = 2**40  # signs that nobody ever gives
BUCKET = 2**24  # numbers that are summed over the processes at a time: 64 MiB in fp32


class PeerLost(RuntimeError):
    """A process of this job has ended or does not answer, and nobody can go on; one line. own: it is this one."""

    def __init__(self, line: str, *, own: bool = False) -> None:
        super().__init__(line)
        self.own = own


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of its job, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0  # how often torchrun has started this job again


ALONE = Place()


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that torchrun's variables name; that of a process alone where there are none. UserError, one line, if
    some are missing or are no place."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return ALONE
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name)]:
        raise UserError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']!r}, but {', '.join(missing)} not set: start with torchrun, or "
            "unset WORLD_SIZE to train on one device"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
        text = environment.get(name, {"LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}.get(name, "0"))
        if not (text.isascii() and text.isdecimal() and int(text) < 2**31):
            raise UserError(f"{name} is {text!r}, not a number: it is set by torchrun")
        numbers[name] = int(text)
    rank, size, local_rank, local_size, port, restarts = numbers.values()
    if not (rank < size and local_rank < local_size <= size and 0 < port < 2**16):
        raise UserError(
            f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size}, MASTER_PORT "
            f"{port} is no place in a job: these are set by torchrun"
        )
    return Place(rank, size, local_rank, local_size, restarts)


def part_of(count: int, here: Place) -> slice:
    """Which of `count` things in a row are this process's: as even as possible, the first never without."""
    return slice(-(-count * here.rank // here.size), -(-count * (here.rank + 1) // here.size))


def share_of(items: Sequence[T], here: Place) -> Sequence[T]:
    """This process's items; the last one where there are fewer items than processes (see `Team.begin`)."""
    return items[part_of(len(items), here)] or items[-1:]


@dataclass
class Team:
    """The processes of a job, seen from one of them. Alone, nothing is exchanged and nothing changes a bit."""

    place: Place = field(default_factory=Place)
    watch: Watch | None = None
    episodes: int = 1  # of the batch that is being made, those of all processes
    part: slice = field(default_factory=lambda: slice(0, 1))  # and this process's

    @property
    def alone(self) -> bool:
        return self.place.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that logs and writes."""
        return self.place.rank == 0

    # -- a training step -----------------------------------------------------------------------------------------------

    def begin(self, episodes: int) -> None:
        """A batch of so many episodes begins. Where they are fewer than processes, some have none: they compute the
        last one again, so that all meet in the same sums, and it counts nothing."""
        self.episodes, self.part = episodes, part_of(episodes, self.place)

    @property
    def takes_part(self) -> bool:
        return self.part.start < self.part.stop

    def total(self, own: Tensor) -> Tensor:
        """The sum of a tensor over all processes that take part; without gradient."""
        if self.alone:
            return own.detach()
        found = own.detach().clone() if self.takes_part else torch.zeros_like(own)
        with lost_peers():
            dist.all_reduce(found)
        return found

    def portion(self, own: Tensor | float) -> Tensor | float:
        """What a mean over `own` things (a count or a sum of weights, ()) contributes to the mean over those of all
        processes: own / total, 1 alone, 0 for a process that only keeps company. The portions add up to 1."""
        if self.alone:
            return 1.0
        weight = torch.as_tensor(own, dtype=torch.float32)
        return weight / self.total(weight).clamp(min=1e-30) * self.takes_part

    def shares(self, counts: Iterable[int]) -> list[float]:
        """What each of these counts is of them all together, over all processes."""
        totals = self.total(torch.tensor(list(counts), dtype=torch.float32))
        return (totals / totals.sum()).tolist()

    def mean(self, values: Tensor) -> Tensor:
        """This process's part of the mean of values (n,) over all processes: () to be added up."""
        mean = values.float().mean()
        return mean if self.alone else mean * self.portion(len(values))

    def once(self, value: Tensor) -> Tensor:
        """() that every process computes from the same `gather`ed rows, for a sum over the processes: its value is
        divided among them, its gradient is not, since each has only that of its own rows."""
        sharing = min(self.place.size, self.episodes)
        return value if self.alone else (value - value.detach() * (1 - 1 / sharing)) * self.takes_part

    def gather(self, own: Tensor) -> Tensor:
        """Rows (n, ...) of this process's episodes -> those of all (N, ...), in the batch's order. Gradient flows
        through its own."""
        if self.alone:
            return own
        start, stop = self.part.start, self.part.stop
        found = own.new_zeros((self.episodes, *own.shape[1:]))
        found[start:stop] = own.detach()[: stop - start]
        with lost_peers():
            dist.all_reduce(found)
        return torch.cat([found[:start], own[: stop - start], found[stop:]])

    def count(self, own: int) -> int:
        """`own`, or 0 where this process only keeps company."""
        return own if self.takes_part else 0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all processes up, in place; a parameter that has none anywhere keeps none. Those of
        sharded parameters have been added up on the way back."""
        if self.alone:
            return
        everything = [p for p in parameters if p.requires_grad and not is_sharded(p)]
        has = torch.tensor([float(parameter.grad is not None) for parameter in everything])
        with lost_peers(), torch.no_grad():
            dist.all_reduce(has)
            reduced = [p for p, count in zip(everything, has.tolist(), strict=True) if count]
            for bucket in buckets(reduced):
                flat = torch.cat(
                    [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
                )
                dist.all_reduce(flat)
                for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    parameter.grad = gradient.view_as(parameter).clone()

    # -- what all have to know alike -----------------------------------------------------------------------------------

    def sums(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of numbers of the same keys, added up over the processes; whole numbers stay whole."""
        if self.alone:
            return list(rows)
        found = torch.tensor([[float(value) for value in row.values()] for row in rows], dtype=torch.float64)
        with lost_peers():
            dist.all_reduce(found)
        numbers = found.tolist()
        return [
            {key: type(own)(number) for (key, own), number in zip(row.items(), row_numbers, strict=True)}
            for row, row_numbers in zip(rows, numbers, strict=True)
        ]

    def first(self, value: float) -> float:
        """The first process's number: what the clock says must not differ."""
        if self.alone:
            return value
        found = torch.tensor([value], dtype=torch.float64)
        with lost_peers():
            dist.broadcast(found, 0)
        return float(found)

    def most(self, value: int) -> int:
        """The largest of all: a signal that has reached one has reached all."""
        if self.alone:
            return value
        found = torch.tensor([value])
        with lost_peers():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def everyones(self, value: Any) -> list[Any]:
        """What every process has to say, in their order: anything that JSON holds (arrays arrive as lists)."""
        if self.alone:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value, default=np.ndarray.tolist).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.place.size)]
        with lost_peers():
            dist.all_gather(sizes, torch.tensor([len(content)]))
            longest = int(max(sizes))
            found = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
            dist.all_gather(found, nn.functional.pad(content, (0, longest - len(content))))
        return [json.loads(bytes(each[: int(size)].numpy())) for each, size in zip(found, sizes, strict=True)]

    def together(self, work: Callable[[], T], problems: tuple[type[Exception], ...] = (UserError,)) -> T:
        """`work` on every process; what is a problem for one (of these kinds) ends it for all."""
        if self.alone:
            return work()
        result: T | None = None
        problem: Exception | None = None
        try:
            result = work()
        except problems as found:
            problem = found
        said = self.everyones(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        if (other := next((rank for rank, text in enumerate(said) if text is not None), None)) is not None:
            raise UserError(f"process {other}: {said[other]}")
        return result  # type: ignore[return-value]  # work has returned it

    def same_weights(self, modules: Iterable[nn.Module], averages: Iterable[Tensor] = ()) -> None:
        """The first process's weights, buffers and averages of weights for all: the same seed gives the same, but not
        on different processors."""
        if self.alone:
            return
        weights = (tensor for module in modules for tensor in module.state_dict(keep_vars=True).values())
        with lost_peers(), torch.no_grad():
            for tensor in (*weights, *averages):
                if not is_sharded(tensor):
                    dist.broadcast(tensor.detach(), 0)

    # -- the beginning and the end -------------------------------------------------------------------------------------

    def remember(self, folder: str) -> None:
        """For a restart: where this job's run is."""
        if self.watch is not None and self.is_first:
            self.watch.store.set("run", folder)

    def remembered(self) -> str | None:
        """The folder of the run that torchrun is starting again, if it had got so far."""
        if not self.place.restarts or self.watch is None or not self.watch.store.check(["run"]):
            return None
        return self.watch.store.get("run").decode()

    def leave(self, *, orderly: bool) -> None:
        """The end. orderly: the others wait for the first, which may still be writing: torchrun ends all where one ends
        with a problem. They do not wait in a sum, for another may be waiting in one of its own."""
        if self.watch is None:
            return
        if orderly:
            with contextlib.suppress(RuntimeError):  # too long, or it has gone
                self.watch.wait_for_first()
        self.watch.end()
        if orderly:  # else it may wait for one that has gone
            dist.destroy_process_group()


def join(device: torch.device) -> Team:
    """The team of this process, as torchrun's variables have it. UserError, one line, if the others are not found."""
    here = place()
    if here.size == 1:
        return Team()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        number = next(JOINED)
        store, rank, size = next(dist.rendezvous("env://", timeout=JOINING))
        # torchrun's store outlives a team: that of the attempt before, or of a notebook's cell.
        prefixed = dist.PrefixStore(f"team/{here.restarts}/{number}", store)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=PATIENCE)
        return Team(here, Watch(here, number))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"process {here.rank} of {here.size} cannot join the others at {where} ({reason})") from error


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Inside, only the first process of each machine is heard: what they have to say is the same. One that has no
    others is heard, whatever a job of before has left in the environment."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def lost_peers() -> Iterator[None]:
    """Inside, the processes wait for each other: PeerLost where one has gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PeerLost(f"a process of this job is lost or does not answer ({reason[:160]})") from error


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in a row, as many at a time as `BUCKET` numbers of one dtype hold (but at least one)."""
    bucket: list[nn.Parameter] = []
    numbers = 0
    for parameter in parameters:
        if bucket and (numbers + parameter.numel() > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, numbers = [], 0
        bucket.append(parameter)
        numbers += parameter.numel()
    if bucket:
        yield bucket


class Watch:
    """Signs of life. A process that was stopped, or hangs in a driver, would keep the others waiting in a sum; here
    each gives a sign every second, and ends at once, with one line, where another's has been missing for `SILENCE`
    seconds or torchrun itself has gone."""

    def __init__(self, here: Place, number: int) -> None:
        self.here, self.ended, self.number = here, threading.Event(), number
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=SILENCE))
        self.prefix = f"alive/{here.restarts}/{self.number}/"
        # A connection of its own: one that waits for an answer keeps others waiting.
        self.signs = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=SILENCE))
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def wait_for_first(self) -> None:
        """Until the first process has come here too. RuntimeError after `LEAVING`."""
        done = f"done/{self.here.restarts}/{self.number}"
        if self.here.rank == 0:
            self.store.set(done, "")
        else:
            self.store.wait([done], LEAVING)

    def end(self) -> None:
        """No more signs, and nobody misses them: the first may still be writing when another is done."""
        self.ended.set()
        with contextlib.suppress(RuntimeError):
            self.store.add(f"{self.prefix}{self.here.rank}", -LEFT)

    def _run(self) -> None:
        seen = {rank: (0, time.monotonic()) for rank in range(self.here.size) if rank != self.here.rank}
        while not self.ended.wait(1.0):
            try:
                self.signs.add(f"{self.prefix}{self.here.rank}", 1)
                counts = {rank: self.signs.add(f"{self.prefix}{rank}", 0) for rank in seen}
            except RuntimeError:  # the store is torchrun's, or the first process's
                self._end("torchrun, or the first process, has gone")
                return
            now = time.monotonic()
            for rank, count in counts.items():
                if count < 0 or count != seen[rank][0]:  # it has left, or lives
                    seen[rank] = (count, now)
                elif now - seen[rank][1] > SILENCE:
                    self._end(f"process {rank} has given no sign of life for {SILENCE:.0f} s")
                    return

    def _end(self, reason: str) -> None:
        """Leave from here: the main thread may be waiting in a sum for ever."""
        if not self.ended.wait(2.0):
            write_line(f"error: process {self.here.rank}: {reason}; what was saved before counts", error=True)
            os._exit(1)
