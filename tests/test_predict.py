"""Two attempts from the evidence and the agent's views, and who has the first one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SmallBuild

from arc.batches import PredictionData, QueryBatch
from arc.evaluate import exact
from arc.evidence import NUM_RULES, NUM_TABLES, SURE, QueryEvidence
from arc.predict import PairPrediction, predict_tasks
from arc.tasks import Grid, Pair, Task, evaluation_views
from trainloop_complete_with_fixes import beats_evidence, predict_batch, read_prompt


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
    """Stands before the agent and turns its answers, on some tasks, to the target (`right`) or away from the vote."""

    def __init__(self, agent: torch.nn.Module, right: list[int], wrong: list[int]) -> None:
        super().__init__()
        self.agent, self.right, self.wrong = agent, right, wrong

    def forward(self, query: QueryBatch, prompt: torch.Tensor) -> object:
        output = self.agent(query, prompt)
        logits = output.colour_logits[-1].clone()
        for row, owner in enumerate(query.owner.tolist()):
            wanted = query.target[row].clamp(min=0)
            if owner in self.right:
                logits[row] = 50.0 * torch.nn.functional.one_hot(wanted, 10)
            elif owner in self.wrong:
                logits[row] = 50.0 * torch.nn.functional.one_hot((wanted + 1) % 10, 10)
        output.colour_logits[-1] = logits
        return output


def test_the_first_attempt_is_earned_on_the_demonstrations(small_build: SmallBuild) -> None:
    """Better than the vote on a task's own demonstrations: trusted. As good, or worse: not."""
    run = small_build()
    torch.nn.init.zeros_(run.agent.prompt_trust.weight)  # under any prompt: what the evidence votes for
    data = PredictionData(run.training, run.store, run.qwen.encoder, views=evaluation_views(1), feedback_pairs=2)
    batch = data[tuple(range(len(run.training)))]
    assert sum(len(query) for query in batch.trial) == sum(len(task.train) for task in run.training)
    with torch.no_grad():
        prompt, _ = read_prompt(run, batch)
        fresh = beats_evidence(run.agent, prompt, batch.trial)
        assert not fresh.any()
        beaten = [
            index
            for index, task in enumerate(run.training)
            if any(
                not exact(run.store.get(task).held_out(k).vote()[0], pair.output)
                and run.store.get(task).held_out(k).size == pair.output.shape
                for k, pair in enumerate(task.train)
                if pair.output is not None
            )
        ]
        right, wrong = beaten[:1], [index for index in range(len(run.training)) if index not in beaten][:1]
        assert right and wrong
        judged = beats_evidence(Corrector(run.agent, right, wrong), prompt, batch.trial)  # type: ignore[arg-type]
    assert judged.tolist() == [index in right for index in range(len(run.training))]


def test_trust_reaches_the_pairs_of_its_task(small_build: SmallBuild) -> None:
    run = small_build()
    tasks = run.training[:3]
    data = PredictionData(tasks, run.store, run.qwen.encoder, views=evaluation_views(1), feedback_pairs=2)
    numbers = torch.arange(3)

    def predict(batch):
        predicted = predict_batch(run, numbers, batch)
        predicted.trusted = [position == 1 for position in batch.task.tolist()]
        return predicted

    found = predict_tasks(tasks, [data[2, 0], data[(1,)]], predict, run.store)
    assert {(pair.task.id, pair.trusted) for pair in found} == {(task.id, task is tasks[1]) for task in tasks}
