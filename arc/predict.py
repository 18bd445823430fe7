"""Predicting test pairs, view by view, and scoring what was predicted.

Predicting looks at no test output; `score_predictions` is the only place that does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from arc.agent import AgentOutput
from arc.batches import PredictionBatch, QueryBatch, unpad_grid
from arc.evaluate import Attempts, PairResult, SplitScore, cell_accuracy, paired_delta, score_split, two_attempts, vote
from arc.evidence import EvidenceStore
from arc.tasks import Augmentation, Grid, Task

# queries with the agent's output under the unrefined and under the refined prompt
TwoPasses = tuple[QueryBatch, AgentOutput, AgentOutput]


@dataclass
class PairPrediction:
    """What was predicted for one test pair, one grid a view, each turned back into the pair's own colours and pose."""

    task: Task
    test_index: int
    training_free: Grid  # the evidence's own vote
    before: list[Grid] = field(default_factory=list)
    after: list[Grid] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)  # mean probability of the chosen colours, of each `after`
    evidence: bool = True  # whether the evidence says anything: a vote that nobody cast is blank, and no answer

    def attempts(self) -> tuple[Grid, Grid]:
        """Two different grids. First: the vote of the views after refinement, where the evidence's own answer weighs as
        much as all views together, so that it is overruled only by (nearly) unanimous views. Second: the evidence's
        answer if it is another one, else the runner-up. Where the evidence is silent, the views alone decide."""
        weights = [1.0 + 0.5 * value for value in self.confidence]
        if not self.evidence:
            return two_attempts(vote(self.after, weights), vote(self.before))
        ranked = vote([*self.after, self.training_free], [*weights, float(len(self.after))])
        return two_attempts([ranked[0], self.training_free, *ranked], vote(self.before))


def all_attempts(pairs: Iterable[PairPrediction]) -> dict[str, list[Attempts]]:
    """The two attempts at each test pair by task id, test pairs in the order given."""
    attempts: dict[str, list[Attempts]] = {}
    for pair in pairs:
        attempts.setdefault(pair.task.id, []).append(pair.attempts())
    return attempts


def predict_tasks(
    tasks: Sequence[Task],
    batches: Iterable[PredictionBatch],
    predict: Callable[[PredictionBatch], list[TwoPasses]],
    store: EvidenceStore,
) -> list[PairPrediction]:
    """Every test pair of `tasks`, in their order; `batches` hold positions in `tasks`."""
    found: dict[tuple[int, int], PairPrediction] = {}
    for batch in batches:
        positions = batch.task.tolist()
        for query, before, after in predict(batch):
            collect(query, before, after, positions, tasks, store, found)
    return [found[key] for key in sorted(found)]


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
    inside = after.inside_prediction(query)
    certainty = after.colour_log_probs().exp().amax(-1)
    confidence = ((certainty * inside).sum(1) / inside.sum(1).clamp(min=1)).tolist()
    dihedral, colours = query.dihedral.tolist(), query.colours.tolist()
    for row, (owner, number) in enumerate(zip(query.owner.tolist(), query.number.tolist(), strict=True)):
        key = (positions[owner], number)
        if key not in found:
            task = tasks[key[0]]
            grid, votes = store.get(task).test(number).vote()
            found[key] = PairPrediction(task, number, grid, evidence=bool(votes.any()))
        view = Augmentation(dihedral[row], tuple(colours[row]))
        found[key].before.append(view.invert(unpad_grid(grids[0][row])))
        found[key].after.append(view.invert(unpad_grid(grids[1][row])))
        found[key].confidence.append(confidence[row])


@dataclass
class SplitReport:
    """A split's scores: the answer, the same before refinement, the training-free vote alone; and what refinement did
    to cell accuracy (mean over pairs, paired standard error; NaN where there is no pair with a solution, or just one).
    """

    score: SplitScore
    before: SplitScore
    training_free: SplitScore
    delta: float
    delta_error: float


def score_predictions(name: str, pairs: Sequence[PairPrediction]) -> SplitReport:
    """Scoring: the only place where test outputs are read. Pairs without a given solution are left out."""
    answers: list[PairResult] = []
    befores: list[PairResult] = []
    votes: list[PairResult] = []
    cells: dict[str, list[float]] = {"before": [], "after": []}
    for pair in pairs:
        target = pair.task.test[pair.test_index].output
        if target is None:
            continue
        for results, attempts in (
            (answers, pair.attempts()),
            (befores, two_attempts(vote(pair.before), [pair.training_free])),
            (votes, two_attempts([pair.training_free], pair.before)),
        ):
            results.append(PairResult(pair.task.id, pair.test_index, target, attempts))
        for when, grids in (("before", pair.before), ("after", pair.after)):
            cells[when].append(float(np.mean([cell_accuracy(grid, target) for grid in grids])))
    delta, error = paired_delta(cells["before"], cells["after"]) if answers else (math.nan, math.nan)
    return SplitReport(
        score=score_split(name, answers),
        before=score_split(name, befores),
        training_free=score_split(name, votes),
        delta=delta,
        delta_error=error,
    )
