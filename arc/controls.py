"""What a comparison needs besides the program itself: no evidence, and a development split.

A control takes one part of the program away and changes nothing else. The development split lets designs be chosen
without a look at a test pair: it is made from demonstrations, and the tasks it is made of have no test pairs left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arc.evidence import NUM_RULES, NUM_TABLES, EvidenceStore, QueryEvidence, QueryKey, TaskLike, TaskQueries
from arc.tasks import Grid, Task, drop_duplicates

# --------------------------------------------------------------------------------------------------------------------
# no evidence
# --------------------------------------------------------------------------------------------------------------------


def silence(grid: Grid) -> QueryEvidence:
    """What is said about input `grid` (H, W) where nothing is known: the output has the input's size, no table and no
    size rule speaks, every record is 0. An agent that starts from it has the canvas of the input and no vote."""
    height, width = grid.shape
    return QueryEvidence(
        size=(int(height), int(width)),
        rule_sizes=np.zeros((NUM_RULES, 2), np.uint8),
        rule_features=np.zeros((NUM_RULES, 2), np.float32),
        rule_logits=np.full(NUM_RULES, -np.inf, np.float32),
        codes=np.zeros((NUM_TABLES, height, width), np.uint8),
        table_stats=np.zeros((NUM_TABLES, 3), np.float32),
    )


class SilentQueries(TaskQueries):
    """A task about which no demonstration proves anything."""

    def __init__(self, task: TaskLike) -> None:
        super().__init__(task, {})

    def _answer(self, key: QueryKey) -> QueryEvidence:
        held_out, test, _ = key
        return silence((self._task.train[held_out] if held_out >= 0 else self._task.test[test]).input)


class NoEvidence(EvidenceStore):
    """`--no_evidence`: stands where the evidence is asked for and has none, so that none can reach anything; nothing is
    computed and nothing cached."""

    def __init__(self) -> None:
        super().__init__(None)

    def is_prepared(self, task: TaskLike) -> bool:
        return True

    def get(self, task: TaskLike) -> TaskQueries:
        return SilentQueries(task)


# --------------------------------------------------------------------------------------------------------------------
# a development split, made from demonstrations
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Development:
    """Tasks whose test pairs are held-out demonstrations, one each, or that have none.

    training: what is trained on; its first `len(seen)` tasks are `seen`, so that a number means the same task in both.
    seen: less one demonstration, which is their test pair. unseen: every demonstration of the tasks held out whole,
    each as a task that has the others. dropped: number of training tasks with the content of one that is held out.
    """

    training: tuple[Task, ...]
    seen: tuple[Task, ...]
    unseen: tuple[Task, ...]
    dropped: int

    def __str__(self) -> str:
        return (
            f"Development split (no test pair is used): dev_unseen has {len(self.unseen)} demonstrations of tasks held "
            f"out whole, dev_seen one demonstration of each of {len(self.seen)} of the {len(self.training)} training "
            f"tasks; {self.dropped} training tasks with the content of a held-out one are left out"
        )


def hold_out(task: Task, demonstration: int) -> Task:
    """The task as it is where `demonstration` is not known: its only test pair, the others demonstrate."""
    rest = tuple(pair for number, pair in enumerate(task.train) if number != demonstration)
    return Task(f"{task.id}-{demonstration}", rest, (task.train[demonstration],))


def carve(tasks: Sequence[Task], *, whole: int, seed: int) -> Development:
    """Draw a development split: `whole` tasks are held out whole, the others keep all but one demonstration.

    Test pairs are removed first: neither what is drawn nor what is trained on or predicted depends on them. A task of
    two demonstrations would be left with one, which is no context, so it is trained on complete and not scored. Raises
    ValueError if nothing would be left to train on.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0xDE7])))
    bare = [Task(task.id, task.train, ()) for task in tasks]
    order = rng.permutation(len(bare)).tolist()
    chosen = [number for number in order if len(bare[number].train) > 1][:whole]
    held = [bare[number] for number in sorted(chosen)]
    rest, dropped = drop_duplicates([bare[number] for number in sorted(set(order) - set(chosen))], held)
    if len(held) < whole or not rest:
        raise ValueError(f"--dev_tasks {whole}: of {len(bare)} training tasks none would be left to train on")
    draws = {task.id: int(rng.integers(len(task.train))) for task in rest}
    seen = tuple(hold_out(task, draws[task.id]) for task in rest if len(task.train) > 2)
    complete = tuple(task for task in rest if len(task.train) <= 2)
    unseen = tuple(hold_out(task, number) for task in held for number in range(len(task.train)))
    return Development((*seen, *complete), seen, unseen, len(dropped))
