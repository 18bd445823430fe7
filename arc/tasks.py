"""Tasks, pairs and grids, and which tasks are one puzzle.

No torch here, nor in arc/datasets.py, arc/augment.py and arc/evaluate.py: what handles grids only starts without it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from arc.run.files import describe

Grid = np.ndarray  # (H, W) uint8, colours 0..9, 1 <= H, W <= 30

MAX_SIDE = 30
NUM_COLOURS = 10

# ----------------------------------------------------------------------------------------------------------------------
# Grids


def parse_grid(raw: object) -> Grid:
    """Check one grid as read from JSON and return it as a read-only (H, W) uint8 array.

    A grid is a list of 1 to 30 equally long rows of 1 to 30 integers 0..9; booleans, floats, strings and null are not
    integers. Raises ValueError saying what is wrong first, rows and columns counted from 0.
    """
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"is {describe(raw)}, not a list of rows")
    if len(raw) > MAX_SIDE:
        raise ValueError(f"has {len(raw)} rows, at most {MAX_SIDE} are allowed")
    for r, row in enumerate(raw):
        if not isinstance(row, list) or not row:
            raise ValueError(f"row {r} is {describe(row)}, not a list of colours")
        if len(row) > MAX_SIDE:
            raise ValueError(f"row {r} has {len(row)} cells, at most {MAX_SIDE} are allowed")
        if len(row) != len(raw[0]):
            raise ValueError(f"row {r} has {len(row)} cells, row 0 has {len(raw[0])}")
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= NUM_COLOURS:  # type(True) is bool, not int
            c, value = next((c, v) for c, v in enumerate(row) if type(v) is not int or not 0 <= v < NUM_COLOURS)
            raise ValueError(f"row {r}, column {c} is {describe(value)}, not an integer 0..9")
    grid = np.array(raw, dtype=np.uint8)
    grid.flags.writeable = False  # shared by every epoch and every view: nobody may change it in place
    return grid


def _grid_bytes(grid: Grid) -> bytes:
    """Size and cells, whatever the array's memory layout: equal for equal grids only."""
    height, width = grid.shape
    return bytes((height, width)) + grid.astype(np.uint8).tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True, eq=False)
class Pair:
    """One input grid and its output; `output` is None for a test pair whose solution is not given."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True, eq=False)
class Task:
    """An ARC puzzle: demonstration pairs (`train`, outputs always known) and test pairs (`test`)."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what a solver may see: demonstrations and test inputs in order. No id, no test output."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.test)}".encode())
        for pair in self.train:
            assert pair.output is not None
            digest.update(_grid_bytes(pair.input))
            digest.update(_grid_bytes(pair.output))
        for pair in self.test:
            digest.update(_grid_bytes(pair.input))
        return digest.hexdigest()

    @cached_property
    def content_key(self) -> frozenset[bytes]:
        """Digests of all input grids: the same for any id, pair order and split into demonstration and test pairs."""
        return frozenset(hashlib.sha256(_grid_bytes(pair.input)).digest() for pair in (*self.train, *self.test))


@dataclass(frozen=True)
class DataSet:
    """Two parts, each sorted by task id so that an index means the same task however the files were listed.

    `fingerprint` detects a resume against other data. `notes` says which files of a folder were left out, and why.
    """

    name: str
    training: tuple[Task, ...]
    evaluation: tuple[Task, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, name: str, training: Iterable[Task], evaluation: Iterable[Task], notes: tuple[str, ...] = ()
    ) -> DataSet:
        """The tasks of both parts, sorted, with their fingerprint: SHA-256 (hex) over contents and ids, for ids decide
        the order of the tasks, and with it what an index of an epoch means."""
        parts = {"training": training, "evaluation": evaluation}
        ordered = {part: tuple(sorted(tasks, key=lambda task: task.id)) for part, tasks in parts.items()}
        lines = sorted(f"{part} {task.digest} {task.id}" for part, tasks in ordered.items() for task in tasks)
        fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return cls(name, **ordered, fingerprint=fingerprint, notes=notes)


# ----------------------------------------------------------------------------------------------------------------------
# Which tasks are one puzzle


def same_content(a: Task, b: Task) -> bool:
    """Whether two tasks are one puzzle: more than half of the distinct inputs of the smaller one are in the other too.

    Input grids survive what happens between published sets (pairs reordered or moved across the train/test boundary, an
    output corrected, a pair added). All 376 tasks that ARC-AGI-1 evaluation shares with ARC-AGI-2 training by id are
    found this way too, one of them with only 3 of its 4 inputs unchanged, as are twins under different ids (070dd51e
    and 40853293). Different puzzles over the same tiny grids share at most half (2 of 4: 2072aba6 and 8719f442), or
    are siblings that are safer apart (e179c5f4 and a3df8b1e: the same inputs, other outputs). Comparing grids up to
    rotation, reflection and recolouring finds no further twin in those sets, only more chance hits.
    """
    shared = len(a.content_key & b.content_key)
    return 2 * shared > min(len(a.content_key), len(b.content_key))


def twins_of(tasks: Iterable[Task]) -> Callable[[Task], list[Task]]:
    """Tells of a task which others of `tasks` are the same puzzle."""
    by_input: defaultdict[bytes, list[Task]] = defaultdict(list)
    for task in tasks:
        for key in task.content_key:
            by_input[key].append(task)

    def twins(task: Task) -> list[Task]:
        candidates = {other.id: other for key in task.content_key for other in by_input[key] if other is not task}
        return [other for other in candidates.values() if same_content(task, other)]

    return twins


def drop_duplicates(training: Iterable[Task], held_out: Iterable[Task]) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Split `training` into (kept, dropped): dropped tasks share their id or their content with a held-out task."""
    held_out = tuple(held_out)
    held_ids, twins = {task.id for task in held_out}, twins_of(held_out)
    kept: list[Task] = []
    dropped: list[Task] = []
    for task in training:
        (dropped if task.id in held_ids or twins(task) else kept).append(task)
    return tuple(kept), tuple(dropped)
