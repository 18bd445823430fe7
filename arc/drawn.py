"""Tasks whose pairs are drawn anew for each episode: a few of them to be read, many to be answered.

One reading of a context then serves many queries, and pairs do not run out. Everything is a pure function of (seed,
epoch, index), so nothing is stored and a resumed run goes on with the same episodes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from arc import generate
from arc.augment import sample_augmentation
from arc.tasks import Task


class Source(Protocol):
    """Where episodes come from."""

    def episode(self, epoch: int, index: int) -> tuple[int, Task]:
        """The number of a task (for the memory, and for what belongs together) and the task as this episode has it: its
        demonstrations are what is read, its test pairs, with their outputs, what is asked."""
        ...


APART = 1 << 40  # numbers of tasks from here on are those of tasks that no checkpoint's training set has


@dataclass(frozen=True)
class DrawnTasks:
    """Generated tasks: `tasks` known ones of each family in turn, or, for 0, fresh ones without end.

    pairs: demonstrations that are read. Before it is augmented none of the pairs starts from a test input, and none is
    one of the demonstrations that a known task is validated with. known: the known ones are the run's training tasks,
    in the order that a data set has them; else they are tasks apart.
    """

    families: tuple[str, ...]
    tasks: int
    pairs: int
    max_side: int
    seed: int
    queries: int
    augment: str = "none"  # mode of half of the episodes, all grids of the task alike: as good as another task
    known: bool = True

    def episode(self, epoch: int, index: int) -> tuple[int, Task]:
        """See `Source`."""
        count, alone = self.pairs + self.queries, APART + _number(epoch, index)
        if self.tasks == 0:
            fresh = generate.FreshTasks(self.families, self.seed)
            number, (family, place), first = alone, fresh.place(epoch, index), 0
        else:
            number = _turn(self.seed, epoch, index, len(self.families) * self.tasks)
            family, place = sorted(self.families)[number // self.tasks], number % self.tasks
            first = self.pairs + _number(epoch, index) * count
        pairs = [generate.pair(self.seed, family, place, first + n, max_side=self.max_side) for n in range(count)]
        task = Task(f"{family}-{place:06d}", tuple(pairs[: self.pairs]), tuple(pairs[self.pairs :]))
        if self.augment != "none" and index % 2 == 0:
            return alone, sample_augmentation(self.seed, epoch, index, self.augment).apply_task(task)
        return number if self.known else APART + number, task


@dataclass(frozen=True)
class ManyPairs:
    """Tasks that have many pairs, as public generators write them: which are read and which are asked is drawn anew
    each time. A task of n <= pairs + queries demonstrations keeps at least one to be asked."""

    known: tuple[Task, ...]
    pairs: int
    seed: int
    queries: int
    augment: str = "none"

    def episode(self, epoch: int, index: int) -> tuple[int, Task]:
        """See `Source`."""
        number = _turn(self.seed, epoch, index, len(self.known))
        task, rng = self.known[number], np.random.default_rng([self.seed, epoch, index, 0xF11E])
        order = rng.permutation(len(task.train))
        shown = min(self.pairs, max(1, len(order) - 1))
        read, asked = ([task.train[n] for n in part] for part in (order[:shown], order[shown : shown + self.queries]))
        drawn = Task(task.id, tuple(read), tuple(asked))
        if self.augment != "none" and index % 2 == 0:
            return APART + _number(epoch, index), sample_augmentation(self.seed, epoch, index, self.augment).apply_task(
                drawn
            )
        return APART + number, drawn


def _number(epoch: int, index: int) -> int:
    """A number that no other episode has."""
    return (epoch << 24) + index


def _turn(seed: int, epoch: int, index: int, count: int) -> int:
    """Which of `count` tasks episode `index` is of: every task once before any of them comes again."""
    turn, step = divmod(index, count)
    return int(_order(seed, epoch, turn, count)[step])


@functools.lru_cache(maxsize=64)
def _order(seed: int, epoch: int, turn: int, count: int) -> np.ndarray:
    """In which order turn `turn` of an epoch takes `count` tasks."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, turn, 0xD4A]))).permutation(count)
