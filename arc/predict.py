"""Predicting test pairs, view by view. Nothing here looks at a test output; scoring is in `arc.scoring`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from arc.agent import AgentOutput, GridAgent, voted_grid
from arc.augment import Augmentation, evaluation_views
from arc.batches import PredictionBatch, PredictionData, Prepared, QueryBatch, Round, prediction_order, unpad_grid
from arc.device import Precision, spare_tokens
from arc.evaluate import (
    Attempts,
    two_attempts,
    vote,
)
from arc.evidence import EvidenceStore
from arc.loading import batches_of, make_loader, waiting_workers, worker_count
from arc.parallel import Team
from arc.qwen import ContextEncoder
from arc.refine import Act, best_first, farther, pairs_loss
from arc.run.budget import CHOICE_VIEWS, FEEDBACK_VIEWS, TRIAL_VIEWS, PredictionCost
from arc.run.interrupt import Interrupted, StopSignal
from arc.run.runlog import RunLog
from arc.splits import Split
from arc.tasks import Grid, Task

NEAR = 0.9  # share of the demonstrations' cells that an agent has right which may answer first (development split)
REFINED_STARTS = 4  # of a task's prompts those that do best as they are; more of them brought nothing

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
    reached: bool = True  # before the time was up; else the test input stands for an answer

    def agent(self, *, refined: bool = True) -> list[Grid]:
        """The views' answers, the one with most votes first; a sure view counts up to half as much again."""
        views, sure = (self.after, self.confidence) if refined else (self.before, self.confidence_before)
        return vote(views, [1.0 + 0.5 * value for value in sure])

    def answers(self, *, refined: bool = True) -> list[Grid]:
        """`agent`, or the evidence's vote where time ran out before any view was predicted; never empty."""
        return self.agent(refined=refined) or [self.training_free]

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


def gathered(
    split: Split, predict: Callable[[Split], list[PairPrediction]], team: Team, stop: StopSignal
) -> list[PairPrediction]:
    """The predictions of a split's pairs, in its order, each by the process whose `Split.share` it is in. Interrupted
    if a signal ended one of them early, and then for all: one that left alone would leave the others waiting here."""
    own: list[PairPrediction] = []
    with contextlib.suppress(Interrupted):
        own = predict(split.share(team.place.rank, team.place.size))
    stop.check(team.most)
    if team.alone:
        return own
    place = {id(task): number for number, task in enumerate(split.tasks)}
    said = [{**vars(pair), "task": place[id(pair.task)]} for pair in own]
    found = [pair for part in team.everyones(said) for pair in part]
    found.sort(key=lambda pair: (pair["task"], pair["test_index"]))
    return [told_pair(split.tasks[pair["task"]], pair) for pair in found]


def told_pair(task: Task, said: Mapping[str, Any]) -> PairPrediction:
    """A prediction as another process tells it."""

    def grids(lists: Sequence[Any]) -> list[Grid]:
        return [np.array(grid, np.uint8) for grid in lists]

    free, dissent = grids([said["training_free"]])[0], said["dissent"]
    given = {"task": task, "training_free": free, "dissent": None if dissent is None else grids([dissent])[0]}
    return PairPrediction(**{**said, **given, "before": grids(said["before"]), "after": grids(said["after"])})


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
            found.setdefault(
                (position, number), PairPrediction(task, number, pair.input, evidence=False, reached=False)
            )
    return found


def until(items: Iterable[T], deadline: float) -> Iterator[T]:
    """The items while time.monotonic() is before `deadline`: looked at before each, so one may overrun it."""
    iterator = iter(items)
    while time.monotonic() < deadline:
        try:
            yield next(iterator)
        except StopIteration:
            return


def views_reached(pairs: Sequence[PairPrediction], views: int) -> str:
    """How many of `views` views the pairs got in the time that was left, and how many got no answer, for people."""
    counts = [len(pair.after) for pair in pairs] or [0]
    least, most = min(counts), max(counts)
    each = str(most) if least == most else f"{least} to {most}"
    found = f"{each} views each of {views} in the time that was left"
    if passed := sum(not pair.reached for pair in pairs):
        found += f"; for {passed} of {len(pairs)} test inputs there was none, they stand for their own answers"
    return found


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
        if not (math.isfinite(sure[0][row]) and math.isfinite(sure[1][row])):
            continue  # weights that are not finite predict nothing: what the evidence answers stands
        view = Augmentation(dihedral[row], tuple(colours[row]))
        found[key].before.append(view.invert(unpad_grid(grids[0][row])))
        found[key].after.append(view.invert(unpad_grid(grids[1][row])))
        found[key].confidence_before.append(sure[0][row])
        found[key].confidence.append(sure[1][row])


def certainty(output: AgentOutput, query: QueryBatch) -> Tensor:
    """(B,) mean probability of the chosen colours, over the cells of the predicted grid."""
    inside = output.inside_prediction(query)
    return (output.colour_log_probs().exp().amax(-1) * inside).sum(1) / inside.sum(1).clamp(min=1)


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While test pairs are predicted: the modules in eval mode, afterwards as they were."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


class Effort(Protocol):
    """The flags that decide how long a prediction takes."""

    val_views: int
    refine_steps: int
    feedback_pairs: int
    recall: int
    no_memory: bool
    no_policy: bool
    max_cells: int
    workers: int


def recall_count(args: Effort) -> int:
    """How many prompts of the memory are tried on each task's demonstrations."""
    return 0 if args.no_memory else args.recall


def prediction_cost(args: Effort, tasks: Sequence[Task], splits: int, store: EvidenceStore) -> PredictionCost:
    """What predicting the test pairs of the tasks of so many splits takes, from sizes that are known beforehand."""
    starts = 1 + recall_count(args)
    refined, steps = (0, 1) if args.no_policy else (min(starts, REFINED_STARTS), args.refine_steps)
    judged = sum(count for count in (starts, refined, steps) if count > 1)  # one alone is not
    tries = TRIAL_VIEWS + CHOICE_VIEWS * judged + FEEDBACK_VIEWS * (steps - 1)
    cells = 0.0
    for task in tasks:
        demonstrations = [pair.input.size for pair in task.train]
        cells += args.val_views * sum(pair.input.size for pair in task.test) + tries * sum(demonstrations)
        cells += FEEDBACK_VIEWS * refined * sum(demonstrations[: args.feedback_pairs])
    missing = sum(not store.is_prepared(task) for task in tasks) / max(1, waiting_workers(args.workers))
    return PredictionCost(cells, missing, sum(len(task.test) for task in tasks), splits)


# ----------------------------------------------------------------------------------------------------------------------
# The predictor
# ----------------------------------------------------------------------------------------------------------------------

Prompts = dict[tuple[int, ...], tuple[Tensor, Tensor, list[bool]]]


@dataclass(frozen=True)
class Predictor:
    """Predicts the test pairs of splits with the parts of a run that it is handed."""

    args: Effort
    agent: GridAgent
    read: Callable[[PredictionBatch], tuple[Tensor, Tensor]]  # the contexts' prompts (G, K, D) and embeddings (G, E)
    recall: Callable[[Tensor], Tensor]  # embeddings -> n prompts of the memory for each, (n, G, K, D)
    act: Act | None  # a step of the policy; None: no refinement
    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # grids, targets -> exact, share of cells right: (B,) each
    encode: ContextEncoder
    store: EvidenceStore
    precision: Precision
    device: torch.device
    log: RunLog
    check: Callable[[], None]  # called before each batch and trial; raises Interrupted to end it all

    def split(self, split: Split, deadline: float = math.inf) -> list[PairPrediction]:
        """Predict every test pair of the split's tasks. With a deadline *anytime*: the evidence's answer for every pair
        first, then the agent's views in rounds over all pairs until the time is up."""
        args, tasks, views = self.args, split.tasks, evaluation_views(self.args.val_views)
        spare, asked = spare_tokens(self.device), args.feedback_pairs
        data = PredictionData(tasks, self.store, self.encode, views=views, feedback_pairs=asked, spare=spare)
        # Larger batches are faster, but the clock is only looked at before each.
        room = args.max_cells if math.isfinite(deadline) else 4 * args.max_cells
        order = prediction_order(tasks, views=len(views), max_cells=room)
        predict = functools.partial(self.batch, torch.tensor(split.numbers), {})
        if not math.isfinite(deadline):
            return predict_tasks(tasks, self.load(data, order, f"predicting {split.name}"), predict, self.store)
        prepared: Iterable[Sequence[int]] = order
        if not all(map(self.store.is_prepared, tasks)):
            workers = waiting_workers(args.workers)
            prepared = self.load(Prepared(tasks, self.store), order, f"evidence of {split.name}", workers)
        known = answers_in_time(tasks, prepared, self.store, deadline)
        rounds = self.load(data, rounds_of(order, len(views)), f"predicting {split.name}")
        return predict_tasks(tasks, until(rounds, deadline), predict, self.store, known)

    def load(self, source: Dataset, keys: Sequence[Any], what: str, workers: int | None = None) -> Iterable[Any]:
        """The data set's batches by `keys`, prepared by workers, under a bar that says `what`."""
        workers = worker_count(self.args.workers) if workers is None else workers
        loader = make_loader(source, keys, workers=workers, pin_memory=self.device.type == "cuda")
        return self.log.bar(batches_of(loader), total=len(keys), desc=what, unit="batch")

    @torch.no_grad()
    def batch(self, numbers: Tensor, known: Prompts, fetched: PredictionBatch) -> BatchPrediction:
        """The agent's output under the prompt that Qwen reads and under the one that is chosen and refined; the policy
        takes the mean of its action.

        numbers: of all tasks being predicted, the number that its latent is found by (`Split.numbers`). known:
        prompts of earlier rounds, by the positions of a batch's tasks; a batch without demonstrations to try takes them
        from there."""
        self.check()
        positions = tuple(fetched.task.tolist())
        batch = dataclasses.replace(fetched, task=numbers[fetched.task]).to(self.device)
        with self.precision.autocast(self.device):
            if positions not in known or batch.trial:
                prompt, key = self.read(batch)
                trusted = self.beats_evidence(prompt, batch.trial).tolist()
                known[positions] = prompt, self.refine(batch, prompt, self.recall(key)), trusted
            prompt, refined, trusted = known[positions]
            passes = []
            for query in batch.query:
                before = self.agent(query, prompt)
                passes.append((query, before, before if refined is prompt else self.agent(query, refined)))
        return BatchPrediction(passes, trusted)

    def refine(self, batch: PredictionBatch, prompt: Tensor, recalled: Tensor) -> Tensor:
        """(G, K, D): of prompt (G, K, D) and what the memory recalled (n, G, K, D) the one under which the agent does
        best on the demonstrations, each with the evidence of the others. Where there is a policy it acts on the best
        few before the last choice, then on that again, as often as the demonstrations find best."""
        starts = best_first([prompt, *recalled], batch.trial, self.judge)
        if self.act is None:
            return starts[0]
        acted = [self.act(start, batch.feedback) for start in starts[:REFINED_STARTS]]
        best = best_first(acted, batch.trial, self.judge)[0]
        return farther(best, batch.trial, self.act, self.judge, self.args.refine_steps - 1)

    def judge(self, prompt: Tensor, pairs: Sequence[QueryBatch]) -> Tensor:
        """(P,) the agent's losses under prompt (P, K, D) on the pairs."""
        self.check()  # a batch with many prompts to try takes half a minute on a CPU
        return pairs_loss(self.agent, prompt, pairs)

    def beats_evidence(self, prompt: Tensor, trial: Sequence[QueryBatch]) -> Tensor:
        """(G,) bool: whether the agent under prompt (G, K, D) does better than the evidence's vote on the
        demonstrations, each with the evidence of the others: more of them exact; or, where the vote has none exact,
        more cells right. (They say little of a task that the vote can solve: training mends cells and breaks grids that
        were right.) Never where fewer than NEAR of its cells are right: it will not have a whole grid right then. Never
        for a task with one demonstration, where there are no others.

        The prompt has read all demonstrations, and on tasks that were trained on the agent has met them, so the
        comparison leans to the agent; that it gains all the same was measured on the development split. It is the
        prompt that Qwen reads: what the memory recalls was chosen, and the refined one fitted, by these outputs."""
        totals = torch.zeros(len(prompt), 5, device=prompt.device)
        for query in trial:
            exact, cells = self.score(self.agent(query, prompt).predicted_grid(query), query.target_grid)
            vote_exact, vote_cells = self.score(voted_grid(query), query.target_grid)
            found = (exact.float(), vote_exact.float(), cells, cells - vote_cells, torch.ones_like(cells))
            totals.index_add_(0, query.owner, torch.stack(found, 1))
        ours, theirs, cells, gain, count = totals.unbind(1)
        better = (ours > theirs) | ((theirs == 0) & (gain > 1e-6))  # sums of floats: equal up to rounding is no gain
        return better & (cells >= NEAR * count) & (count > 1)
