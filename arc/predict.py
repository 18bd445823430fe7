"""Predicting test pairs, view by view, and scoring what was predicted.

Predicting looks at no test output; `score_predictions` is the only place that does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from arc.agent import AgentOutput
from arc.augment import Augmentation
from arc.batches import PredictionBatch, QueryBatch, unpad_grid
from arc.evaluate import Attempts, PairResult, SplitScore, cell_accuracy, paired_delta, score_split, two_attempts, vote
from arc.evidence import EvidenceStore
from arc.tasks import Grid, Task

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
        if not self.evidence:
            return two_attempts(views, vote(self.before))
        if self.trusted:
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


def predict_tasks(
    tasks: Sequence[Task],
    batches: Iterable[PredictionBatch],
    predict: Callable[[PredictionBatch], BatchPrediction],
    store: EvidenceStore,
) -> list[PairPrediction]:
    """Every test pair of `tasks`, in their order; `batches` hold positions in `tasks`."""
    found: dict[tuple[int, int], PairPrediction] = {}
    for batch in batches:
        positions, predicted = batch.task.tolist(), predict(batch)
        for query, before, after in predicted.passes:
            collect(query, before, after, positions, tasks, store, found)
        trusted = dict(zip(positions, predicted.trusted, strict=True))
        for (position, _), pair in found.items():
            pair.trusted = trusted.get(position, pair.trusted)
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
    sure = [certainty(output, query).tolist() for output in (before, after)]
    dihedral, colours = query.dihedral.tolist(), query.colours.tolist()
    for row, (owner, number) in enumerate(zip(query.owner.tolist(), query.number.tolist(), strict=True)):
        key = (positions[owner], number)
        if key not in found:
            task = tasks[key[0]]
            evidence = store.get(task).test(number)
            grid, votes = evidence.vote()
            found[key] = PairPrediction(task, number, grid, evidence=bool(votes.any()), dissent=evidence.dissent(grid))
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
            (agents, two_attempts(pair.agent(), [])),
        ):
            results.append(PairResult(pair.task.id, pair.test_index, target, attempts))
        for when, grids in (("before", pair.before), ("after", pair.after)):
            cells[when].append(float(np.mean([cell_accuracy(grid, target) for grid in grids])))
    delta, error = paired_delta(cells["before"], cells["after"]) if answers else (math.nan, math.nan)
    return SplitReport(
        score=score_split(name, answers),
        before=score_split(name, befores),
        training_free=score_split(name, votes),
        agent=score_split(name, agents),
        delta=delta,
        delta_error=error,
    )
