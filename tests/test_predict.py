"""Two attempts from the evidence and the agent's views, and who has the first one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallBuild, train_batches
from helpers import offer

from arc.augment import evaluation_views
from arc.batches import PredictionBatch, PredictionData, QueryBatch
from arc.evaluate import exact
from arc.evidence import NUM_RULES, NUM_TABLES, SURE, QueryEvidence
from arc.predict import BatchPrediction, PairPrediction, predict_tasks, prediction_cost, views_reached
from arc.run.budget import CHOICE_VIEWS, FEEDBACK_VIEWS
from arc.run.interrupt import Interrupted
from arc.tasks import Grid, Pair, Task
from trainloop_complete_with_fixes import predictor, read_prompt


def single(colour: int) -> Grid:
    return np.full((2, 2), colour, np.uint8)


VOTE, DISSENT, VIEW, OTHER, UNREFINED = (single(colour) for colour in range(1, 6))


def pair(**changes: object) -> PairPrediction:
    views: dict = {"before": [UNREFINED] * 3, "after": [VIEW, OTHER, VIEW], "confidence": [0.5, 0.9, 0.5]}
    views |= {"confidence_before": [0.5] * 3, "dissent": DISSENT}
    return PairPrediction(Task("t", (), (Pair(single(0), None),)), 0, VOTE, **(views | changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, (VOTE, DISSENT)),
        ({"dissent": None}, (VOTE, VIEW)),
        ({"dissent": None, "after": [VOTE] * 3}, (VOTE, UNREFINED)),
        ({"trusted": True}, (VIEW, VOTE)),
        ({"trusted": True, "after": [VOTE] * 3}, (VOTE, DISSENT)),
        ({"trusted": True, "after": [VOTE, VOTE, OTHER], "dissent": None}, (VOTE, OTHER)),
        ({"evidence": False}, (VIEW, OTHER)),
        ({"evidence": False, "trusted": True, "after": [VIEW] * 3}, (VIEW, UNREFINED)),
    ],
)
def test_attempts(changes: dict, wanted: tuple[Grid, Grid]) -> None:
    assert [attempt[0, 0] for attempt in pair(**changes).attempts()] == [grid[0, 0] for grid in wanted]


def test_what_was_not_reached_is_said() -> None:
    pairs = [pair(), pair(after=[]), pair(after=[], reached=False)]
    assert views_reached(pairs[:1], 4) == "3 views each of 4 in the time that was left"
    assert views_reached(pairs, 4) == (
        "0 to 3 views each of 4 in the time that was left; for 1 of 3 test inputs there was none, they stand for their "
        "own answers"
    )


def test_attempts_before_refinement_and_without_the_agent() -> None:
    assert exact(pair(trusted=True).attempts(refined=False)[0], UNREFINED)
    assert [attempt[0, 0] for attempt in pair(trusted=True).training_free_attempts()] == [1, 2]


def test_a_sure_view_breaks_a_tie_and_no_more() -> None:
    assert exact(pair(after=[VIEW, OTHER], confidence=[0.5, 0.9]).agent()[0], OTHER)
    assert exact(pair(after=[VIEW, OTHER, VIEW], confidence=[0.1, 1.0, 0.1]).agent()[0], VIEW)


def evidence_of(codes: dict[int, list[int]], records: dict[int, float]) -> QueryEvidence:
    """Tables that say what `codes` lists for a grid of one row (negative: nothing); `records`: how often right."""
    width = len(next(iter(codes.values())))
    planes, stats = np.zeros((NUM_TABLES, 1, width), np.uint8), np.zeros((NUM_TABLES, 3), np.float32)
    for table, colours in codes.items():
        planes[table, 0] = [colour + 10 * SURE if colour >= 0 else 0 for colour in colours]
        stats[table] = records[table], 1, float(records[table] == 1)
    zeros = np.zeros(NUM_RULES, np.float32)
    return QueryEvidence((1, width), np.zeros((NUM_RULES, 2), np.uint8), np.zeros((NUM_RULES, 2)), zeros, planes, stats)


def test_dissent_is_the_weightiest_whole_grid_that_differs() -> None:
    codes = {0: [1, 1, 1], 1: [2, 2, 2], 2: [2, 2, 2], 3: [3, 3, 3], 4: [4, 4, -1]}
    evidence = evidence_of(codes, {0: 1.0, 1: 0.9, 2: 0.9, 3: 0.9, 4: 1.0})
    vote = evidence.vote()[0]
    assert vote.tolist() == [[1, 1, 1]]
    dissent = evidence.dissent(vote)
    assert dissent is not None and dissent.dtype == np.uint8
    assert dissent.tolist() == [[2, 2, 2]]  # two tables together; the one that is silent about a cell has none
    again = evidence.dissent(dissent)
    assert again is not None and again.tolist() == [[1, 1, 1]]


def test_no_dissent_where_all_agree() -> None:
    evidence = evidence_of({0: [1, 2], 1: [1, 2], 2: [3, -1]}, {0: 1.0, 1: 0.9, 2: 1.0})
    assert evidence.dissent(evidence.vote()[0]) is None


class Corrector(torch.nn.Module):
    """Stands before the agent and changes its answers on some tasks: to the target but for as many of its first cells
    as `wrong` says (0: the target itself)."""

    def __init__(self, agent: torch.nn.Module, names: list[str], wrong: dict[str, int]) -> None:
        super().__init__()
        self.agent, self.names, self.wrong = agent, names, wrong

    def forward(self, query: QueryBatch, prompt: torch.Tensor) -> object:
        output = self.agent(query, prompt)
        logits = output.colour_logits[-1].clone()
        for row, owner in enumerate(query.owner.tolist()):
            name, wanted = self.names[owner], query.target[row].clamp(min=0)
            if name in self.wrong:
                shift = (torch.arange(len(wanted)) < self.wrong[name]).long()
                logits[row] = 50.0 * torch.nn.functional.one_hot((wanted + shift) % 10, 10)
        output.colour_logits[-1] = logits
        return output


def test_the_first_attempt_is_earned_on_the_demonstrations(
    small_build: SmallBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vote solves all demonstrations of crop, flip and recolour, and none of the others."""
    run = small_build()
    torch.nn.init.zeros_(run.agent.prompt_trust.weight)  # under any prompt: what the evidence votes for
    names = [task.id for task in run.training]
    data = PredictionData(run.training, run.store, run.qwen.encoder, views=evaluation_views(1), feedback_pairs=2)
    batch = data[tuple(range(len(names)))]
    assert sum(len(query) for query in batch.trial) == sum(len(task.train) for task in run.training)

    def trusted(**wrong: int) -> set[str]:
        corrector: Any = Corrector(run.agent, names, wrong)
        judged = dataclasses.replace(predictor(run), agent=corrector).beats_evidence(prompt, batch.trial).tolist()
        return {name for name, better in zip(names, judged, strict=True) if better}

    with torch.no_grad():
        prompt, _ = read_prompt(run, batch)
        assert trusted() == set()  # as good as the vote is not better
        assert trusted(count=0, crop=0, sort=99, flip=99) == {"count"}
        assert trusted(sort=1, crop=1, flip=1) == {"sort"}  # nearly right beats a vote with none right
        assert trusted(sort=3) == set()  # too far from right, though better than the vote:
        with monkeypatch.context() as patched:
            patched.setattr("arc.predict.NEAR", 0.0)
            assert trusted(sort=3) == {"sort"}
        one = [query.rows(torch.tensor([0])) for query in batch.trial]  # a demonstration of some tasks, and no more
        corrector: Any = Corrector(run.agent, names, dict.fromkeys(names, 0))
        assert not dataclasses.replace(predictor(run), agent=corrector).beats_evidence(prompt, one).any()


def test_trust_reaches_the_pairs_of_its_task(small_build: SmallBuild) -> None:
    run = small_build()
    tasks = run.training[:3]
    data = PredictionData(tasks, run.store, run.qwen.encoder, views=evaluation_views(1), feedback_pairs=2)
    numbers = torch.arange(3)

    def predict(batch: PredictionBatch) -> BatchPrediction:
        predicted = predictor(run).batch(numbers, {}, batch)
        predicted.trusted = [position == 1 for position in batch.task.tolist()]
        return predicted

    found = predict_tasks(tasks, [data[2, 0], data[(1,)]], predict, run.store)
    assert {(pair.task.id, pair.trusted) for pair in found} == {(task.id, task is tasks[1]) for task in tasks}


def test_trying_what_the_memory_recalls_and_further_steps_are_reckoned_with(small_build: SmallBuild) -> None:
    """Its prompts and the one that Qwen reads answer every demonstration, the four best once more when refined; each
    further step has the feedback of all, and as many prompts as there are steps are judged."""
    run = small_build()
    demonstrations = sum(pair.input.size for task in run.training for pair in task.train)
    first = sum(task.train[0].input.size for task in run.training)

    def cells(**changes: Any) -> float:
        args = dataclasses.replace(run.args, feedback_pairs=1, **changes)
        return prediction_cost(args, run.training, 1, run.store).cells

    without = cells(recall=0)
    assert cells(recall=9, no_memory=True) == without
    more = CHOICE_VIEWS * (10 + 4) * demonstrations + FEEDBACK_VIEWS * 3 * first
    assert cells(recall=9) == pytest.approx(without + more)
    further = (CHOICE_VIEWS * 3 + FEEDBACK_VIEWS * 2) * demonstrations
    assert cells(recall=0, refine_steps=3) == pytest.approx(without + further)
    assert cells(recall=0, refine_steps=3, no_policy=True) == cells(recall=0, no_policy=True)
    refining = FEEDBACK_VIEWS * first
    assert cells(recall=0, no_policy=True) == pytest.approx(without - refining)
    assert cells(recall=1, no_policy=True) == pytest.approx(without - refining + CHOICE_VIEWS * 2 * demonstrations)


def test_a_signal_is_obeyed_between_the_prompts_that_are_tried(small_build: SmallBuild) -> None:
    """One batch may have half a minute of them."""
    run, calls = small_build("--recall", "2", "--val_limit", "1"), iter(range(9))
    (batch,) = train_batches(run, 1)
    with torch.no_grad():
        prompt, key = read_prompt(run, batch)
    for number in range(2):
        assert offer(run.memory, key[0], prompt[0] + number, 1000 + number, 1.0, 0.5, step=0)

    def check() -> None:
        if next(calls) == 2:  # the batch itself, then two trials
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        dataclasses.replace(predictor(run), check=check).split(run.splits[0])
    assert next(calls) == 3 and len(run.splits[0].tasks) == 1
