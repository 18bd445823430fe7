"""Predicting test pairs, view by view, and scoring what was predicted.

Predicting looks at no test output; `score_predictions` is the only place that does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from arc.agent import AgentOutput
from arc.augment import Augmentation
from arc.batches import PredictionBatch, QueryBatch, Round, unpad_grid
from arc.evaluate import (
    Attempts,
    PairResult,
    SplitScore,
    cell_accuracy,
    paired_delta,
    score_split,
    two_attempts,
    vote,
    write_submission,
)
from arc.evidence import EvidenceStore
from arc.run.runlog import RunLog
from arc.splits import Split
from arc.tasks import Grid, Task

T = TypeVar("T")
# queries with the agent's output under the unrefined and under the refined prompt
TwoPasses = tuple[QueryBatch, AgentOutput, AgentOutput]


@dataclass
class BatchPrediction:
    """What the agent makes of a `PredictionBatch`, and for each of its tasks whether it has earned the first attempt:
    it did better than the evidence on the task's own demonstrations, each with the evidence of the others."""

    passes: list[TwoPasses]
    trusted: list[bool]


@dataclass
class PairPrediction:
    """What was predicted for one test pair, one grid a view, each turned back into the pair's own colours and pose."""

    task: Task
    test_index: int
    training_free: Grid  # the evidence's own vote
    before: list[Grid] = field(default_factory=list)
    after: list[Grid] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)  # mean probability of the chosen colours, of each `after`
    confidence_before: list[float] = field(default_factory=list)  # and of each `before`
    evidence: bool = True  # whether the evidence says anything: a vote that nobody cast is blank, and no answer
    dissent: Grid | None = None  # the evidence's best other answer (`QueryEvidence.dissent`)
    trusted: bool = False  # see `BatchPrediction`

    def agent(self, *, refined: bool = True) -> list[Grid]:
        """The views' answers, the one with most votes first; a sure view counts up to half as much again."""
        views, sure = (self.after, self.confidence) if refined else (self.before, self.confidence_before)
        return vote(views, [1.0 + 0.5 * value for value in sure])

    def attempts(self, *, refined: bool = True) -> tuple[Grid, Grid]:
        """Two different grids, from the views after refinement (refined=False: before it).

        Where the agent did better than the evidence on the task's demonstrations (`trusted`), it has the first attempt
        and the evidence's vote the second. Elsewhere the vote comes first and then the evidence's best dissenting
        answer, or the agent's where the tables agree. Where the evidence is silent the agent has both.
        """
        views = self.agent(refined=refined)
        if not self.evidence:  # without views either, as where the time was up, the blank vote stands
            return two_attempts(views or [self.training_free], vote(self.before))
        if self.trusted and views:
            return two_attempts([views[0], self.training_free, *self._dissent(), *views], vote(self.before))
        return two_attempts([self.training_free, *self._dissent(), *views], vote(self.before))

    def training_free_attempts(self) -> tuple[Grid, Grid]:
        """The two attempts that the evidence makes alone."""
        return two_attempts([self.training_free, *self._dissent()], [])

    def _dissent(self) -> list[Grid]:
        return [] if self.dissent is None else [self.dissent]


def all_attempts(pairs: Iterable[PairPrediction]) -> dict[str, list[Attempts]]:
    """The two attempts at each test pair by task id, test pairs in the order given."""
    attempts: dict[str, list[Attempts]] = {}
    for pair in pairs:
        attempts.setdefault(pair.task.id, []).append(pair.attempts())
    return attempts


def evidence_answer(task: Task, number: int, store: EvidenceStore) -> PairPrediction:
    """What stands before the agent has said anything: the evidence's answer at test pair `number`."""
    evidence = store.get(task).test(number)
    grid, votes = evidence.vote()
    return PairPrediction(task, number, grid, evidence=bool(votes.any()), dissent=evidence.dissent(grid))


def predict_tasks(
    tasks: Sequence[Task],
    batches: Iterable[PredictionBatch],
    predict: Callable[[PredictionBatch], BatchPrediction],
    store: EvidenceStore,
    known: Mapping[tuple[int, int], PairPrediction] | None = None,
) -> list[PairPrediction]:
    """Every test pair of `tasks`, in their order; `batches` hold positions in `tasks` and may come back to a task with
    other views. known: what was answered before, by (position, test pair); it stands where no batch comes."""
    found = dict(known or {})
    for batch in batches:
        positions, predicted = batch.task.tolist(), predict(batch)
        for query, before, after in predicted.passes:
            collect(query, before, after, positions, tasks, store, found)
        trusted = dict(zip(positions, predicted.trusted, strict=True))
        for (position, _), pair in found.items():
            pair.trusted = trusted.get(position, pair.trusted)
    return [found[key] for key in sorted(found)]


def rounds_of(order: Sequence[tuple[int, ...]], views: int) -> list[Round]:
    """All tasks under the first view, then all under the second, ...: wherever that is cut off, no pair has more than
    one view more than another."""
    return [Round(positions, (view,), first=view == 0) for view in range(views) for positions in order]


def answers_in_time(
    tasks: Sequence[Task], prepared: Iterable[Sequence[int]], store: EvidenceStore, deadline: float
) -> dict[tuple[int, int], PairPrediction]:
    """The evidence's answer for every pair, task by task as their evidence is `prepared` (positions); a task that is
    not reached by `deadline` (time.monotonic) is answered with its input."""
    found: dict[tuple[int, int], PairPrediction] = {}
    for positions in until(prepared, deadline):
        for position in positions:
            for number in range(len(tasks[position].test)):
                found[position, number] = evidence_answer(tasks[position], number, store)
    for position, task in enumerate(tasks):
        for number, pair in enumerate(task.test):
            found.setdefault((position, number), PairPrediction(task, number, pair.input, evidence=False))
    return found


def until(items: Iterable[T], deadline: float) -> Iterator[T]:
    """The items while time.monotonic() is before `deadline`: looked at before each, so one may overrun it."""
    iterator = iter(items)
    while time.monotonic() < deadline:
        try:
            yield next(iterator)
        except StopIteration:
            return


def views_reached(pairs: Sequence[PairPrediction]) -> str:
    """How many views the pairs got, for people: "3 views each" or "1 to 2 views each"."""
    counts = [len(pair.after) for pair in pairs] or [0]
    least, most = min(counts), max(counts)
    return f"{most} views each" if least == most else f"{least} to {most} views each"


def collect(
    query: QueryBatch,
    before: AgentOutput,
    after: AgentOutput,
    positions: Sequence[int],
    tasks: Sequence[Task],
    store: EvidenceStore,
    found: dict[tuple[int, int], PairPrediction],
) -> None:
    """Sort a batch's predictions into `found`, turned back."""
    grids = [output.predicted_grid(query).cpu().numpy() for output in (before, after)]
    sure = [certainty(output, query).tolist() for output in (before, after)]
    dihedral, colours = query.dihedral.tolist(), query.colours.tolist()
    for row, (owner, number) in enumerate(zip(query.owner.tolist(), query.number.tolist(), strict=True)):
        key = (positions[owner], number)
        if key not in found:
            found[key] = evidence_answer(tasks[key[0]], number, store)
        view = Augmentation(dihedral[row], tuple(colours[row]))
        found[key].before.append(view.invert(unpad_grid(grids[0][row])))
        found[key].after.append(view.invert(unpad_grid(grids[1][row])))
        found[key].confidence_before.append(sure[0][row])
        found[key].confidence.append(sure[1][row])


def certainty(output: AgentOutput, query: QueryBatch) -> Tensor:
    """(B,) mean probability of the chosen colours, over the cells of the predicted grid."""
    inside = output.inside_prediction(query)
    return (output.colour_log_probs().exp().amax(-1) * inside).sum(1) / inside.sum(1).clamp(min=1)


@dataclass
class SplitReport:
    """A split's scores: the answer, the same before refinement, the evidence alone, the agent's views alone; and what
    refinement did to cell accuracy (mean over pairs, paired standard error; NaN where there is no pair with a solution,
    or just one).
    """

    score: SplitScore
    before: SplitScore
    training_free: SplitScore
    agent: SplitScore
    delta: float
    delta_error: float


def score_predictions(name: str, pairs: Sequence[PairPrediction]) -> SplitReport:
    """Scoring: the only place where test outputs are read. Pairs without a given solution are left out."""
    answers: list[PairResult] = []
    befores: list[PairResult] = []
    votes: list[PairResult] = []
    agents: list[PairResult] = []
    cells: dict[str, list[float]] = {"before": [], "after": []}
    for pair in pairs:
        target = pair.task.test[pair.test_index].output
        if target is None:
            continue
        for results, attempts in (
            (answers, pair.attempts()),
            (befores, pair.attempts(refined=False)),
            (votes, pair.training_free_attempts()),
            (agents, two_attempts(pair.agent() or [pair.training_free], [])),
        ):
            results.append(PairResult(pair.task.id, pair.test_index, target, attempts))
        for when, grids in (("before", pair.before), ("after", pair.after)):
            cells[when] += [float(np.mean([cell_accuracy(grid, target) for grid in grids]))] if grids else []
    delta, error = paired_delta(cells["before"], cells["after"]) if cells["after"] else (math.nan, math.nan)
    return SplitReport(
        score=score_split(name, answers),
        before=score_split(name, befores),
        training_free=score_split(name, votes),
        agent=score_split(name, agents),
        delta=delta,
        delta_error=error,
    )


def score_splits(
    predicted: Mapping[str, Sequence[PairPrediction]], labels: Mapping[str, str], log: Callable[[str], None]
) -> dict[str, SplitReport]:
    """Score the splits that have solutions; say so where none are given."""
    reports = {}
    for name, pairs in predicted.items():
        report = score_predictions(name, pairs)
        if report.score.pairs:
            reports[name] = report
        else:
            log(f"{labels[name]}: no solutions are given; the attempts are in predictions-{name}.json")
    return reports


def keep_attempts(folder: Path, split: Split, pairs: Sequence[PairPrediction], log: Callable[[str], None]) -> None:
    """Write a split's attempts into the run's folder; say so and go on where that is not possible."""
    try:
        write_submission(folder / f"predictions-{split.name}.json", all_attempts(pairs), split.tasks)
    except (ValueError, OSError) as problem:
        log(f"Predictions of the {split.name} split are not written: {problem}")


def submit(path: str, predicted: Mapping[str, Sequence[PairPrediction]], tasks: Sequence[Task], log: RunLog) -> int:
    """--submission: write the file, read back and checked, and log what is in it. Returns the exit code."""
    pairs = [pair for part in predicted.values() for pair in part]
    try:
        write_submission(path, all_attempts(pairs), tasks)
    except ValueError as problem:  # a full disk, a folder that is gone: it was writable when the command started
        log(f"error: --submission: {problem}", error=True)
        return 1
    score = score_predictions("submission", pairs).score
    scored = f"{score.pass2_pairs} of {score.pairs} with a given solution right, {score.whole_tasks} tasks whole"
    log(
        f"Submission: {path}, {len(tasks)} tasks, {len(pairs)} test inputs, two "
        f"attempts each; {scored if score.pairs else 'no solutions are given, so nothing is scored'}"
    )
    return 0
