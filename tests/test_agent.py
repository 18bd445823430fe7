"""The grid agent (arc/agent.py): where it starts, what it may not depend on, what its outputs look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from arc.agent import AgentOutput, GridAgent, rotary_angles, rotary_frequencies, rotate, voted_grid
from arc.augment import Augmentation, apply_dihedral, sample_augmentation
from arc.batches import Query, QueryBatch, collate_queries, make_query, unpad_grid
from arc.datasets import load_dataset
from arc.evidence import NUM_RULES, NUM_TABLES, EvidenceStore
from arc.tasks import Task

K, D = 2, 8


def make_agent(**options: int) -> GridAgent:
    """A fresh agent."""
    torch.manual_seed(0)
    return GridAgent(NUM_TABLES, NUM_RULES, K, D, **{"width": 32, "heads": 2, "blocks": 2, "passes": 2, **options})


def make_trained_agent(**options: int) -> GridAgent:
    """An agent whose parts all speak: what starts at zero has become noise, as training would make it."""
    agent = make_agent(**options)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return agent


def prompts(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, K, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tasks(data_dir: Path) -> tuple[Task, ...]:
    return load_dataset(str(data_dir)).training


@pytest.fixture(scope="module")
def store(cache_dir: Path) -> EvidenceStore:
    return EvidenceStore(cache_dir / "evidence")


@pytest.fixture(scope="module")
def queries(tasks: tuple[Task, ...], store: EvidenceStore) -> list[Query]:
    """Each demonstration of each task as a query under an augmentation, owner = number of the task."""
    return [
        make_query(pair.input, pair.output, store.get(task).held_out(index), view, owner)
        for owner, task in enumerate(tasks)
        for index, pair in enumerate(task.train)
        for view in [sample_augmentation(0, owner, index, "full")]
    ]


# --------------------------------------------------------------------------------------------------------------------
# where it starts
# --------------------------------------------------------------------------------------------------------------------


def agreement_with_vote(agent: GridAgent, tasks: Sequence[Task], store: EvidenceStore) -> list[bool]:
    """For each demonstration held out and each test input: does a fresh agent answer what the evidence votes for?"""
    agreed = []
    for task in tasks:
        known = store.get(task)
        answers = [(pair.input, known.held_out(number)) for number, pair in enumerate(task.train)]
        answers += [(pair.input, known.test(number)) for number, pair in enumerate(task.test)]
        for grid, evidence in answers:
            query = collate_queries([make_query(grid, None, evidence, Augmentation.IDENTITY, 0)])
            with torch.no_grad():
                answer = agent(query, torch.zeros(1, K, D)).predicted_grid(query)[0]
            agreed.append(unpad_grid(answer.numpy()).tolist() == evidence.vote()[0].tolist())
    return agreed


def test_a_fresh_agent_answers_what_the_evidence_votes_for(tasks: tuple[Task, ...], store: EvidenceStore) -> None:
    assert all(agreement_with_vote(make_agent(), tasks, store))


def test_a_fresh_agent_answers_the_vote_on_real_tasks(cache_dir: Path) -> None:
    real = [task for task in load_dataset("arcagi2").training if max(p.input.size for p in task.train) <= 100][:6]
    agreed = agreement_with_vote(make_agent(), real, EvidenceStore(cache_dir / "evidence"))
    assert len(agreed) >= 18 and sum(agreed) >= len(agreed) - 1  # an exact tie of two sizes or colours may fall apart


def test_the_vote_of_a_padded_batch_is_that_of_each_query(queries: list[Query]) -> None:
    batch = collate_queries(queries)
    for answer, query in zip(voted_grid(batch), queries, strict=True):
        assert query.evidence is not None and unpad_grid(answer.numpy()).shape == query.out_size
        grid, votes = query.evidence.vote()
        best, second = np.sort(votes, axis=0)[:-3:-1]
        clear = best > second * (1 + 1e-5)  # an exact tie may go either way
        assert clear.mean() > 0.5 and np.array_equal(unpad_grid(answer.numpy())[clear], grid[clear])


def test_gradient_reaches_the_prompt_in_the_very_first_step(queries: list[Query]) -> None:
    batch, prompt = collate_queries(queries), prompts(6).requires_grad_()
    output = make_agent()(batch, prompt)
    nn.functional.cross_entropy(output.colour_logits[-1].transpose(1, 2), batch.target).backward()
    assert prompt.grad is not None and bool((prompt.grad.flatten(1).abs().sum(1) > 0).all())


def test_every_parameter_gets_a_gradient_from_both_directions(queries: list[Query]) -> None:
    agent, batch = make_trained_agent(), collate_queries(queries)
    for reverse in (False, True):
        output = agent(batch, prompts(6), reverse=reverse)
        losses = [nn.functional.cross_entropy(logits.transpose(1, 2), batch.target) for logits in output.colour_logits]
        (sum(losses) + output.size_log_probs().mean()).backward()
    gradients = {name: parameter.grad for name, parameter in agent.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 0] == []


# --------------------------------------------------------------------------------------------------------------------
# what an answer may and may not depend on
# --------------------------------------------------------------------------------------------------------------------


def test_a_query_gets_the_same_answer_alone_and_in_a_padded_batch(queries: list[Query]) -> None:
    agent, prompt = make_trained_agent(), prompts(6)
    together = collate_queries(queries)
    assert together.padded
    with torch.no_grad():
        batched = agent(together, prompt)
        for index, query in enumerate(queries):
            alone = agent(collate_queries([query]), prompt)
            for one, many in zip(alone.colour_logits, batched.colour_logits, strict=True):
                assert torch.allclose(one[0], many[index, : query.cells], atol=1e-4)
            assert torch.allclose(alone.size_logits[0], batched.size_logits[index], atol=1e-4)


def test_a_query_is_answered_under_its_owners_prompt_alone(queries: list[Query]) -> None:
    agent, batch, prompt = make_trained_agent(), collate_queries(queries), prompts(6)
    other = prompt.clone()
    other[2] = prompts(1, seed=9)[0]
    with torch.no_grad():
        first, second = agent(batch, prompt).colour_logits[-1], agent(batch, other).colour_logits[-1]
    changed = (first != second).flatten(1).any(1)
    assert changed.tolist() == (batch.owner == 2).tolist()


def test_targets_do_not_enter_the_answer(queries: list[Query]) -> None:
    agent, batch, prompt = make_trained_agent(), collate_queries(queries), prompts(6)
    blind = collate_queries([Query(q.grid, None, q.out_size, q.evidence, q.augmentation, q.owner) for q in queries])
    with torch.no_grad():
        seen, unseen = agent(batch, prompt), agent(blind, prompt)
    assert torch.equal(seen.colour_logits[-1], unseen.colour_logits[-1])
    assert torch.equal(seen.size_logits, unseen.size_logits)


def test_the_direction_flag_changes_the_answer(queries: list[Query]) -> None:
    agent, batch, prompt = make_trained_agent(), collate_queries(queries), prompts(6)
    with torch.no_grad():
        there, back = agent(batch, prompt), agent(batch, prompt, reverse=True)
    assert bool((there.colour_logits[-1] != back.colour_logits[-1]).flatten(1).any(1).all())


def test_a_query_without_evidence_gets_a_finite_answer_of_its_known_size() -> None:
    agent, grid = make_trained_agent(), np.arange(6, dtype=np.uint8).reshape(2, 3)
    query = collate_queries([Query(grid, None, (3, 2), None, Augmentation.IDENTITY, 0)])
    output = agent(query, prompts(1), reverse=True)
    assert all(bool(torch.isfinite(logits).all()) for logits in (*output.colour_logits, output.size_logits))
    assert unpad_grid(output.predicted_grid(query, size=query.out_size)[0].numpy()).shape == (3, 2)


# --------------------------------------------------------------------------------------------------------------------
# shape and precision of outputs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("amp", [False, True])
def test_outputs_are_full_precision_and_one_for_each_pass(queries: list[Query], passes: int, amp: bool) -> None:
    agent, batch = make_trained_agent(passes=passes), collate_queries(queries)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp), torch.no_grad():
        output = agent(batch, prompts(6))
    assert len(output.colour_logits) == passes
    assert all(logits.shape == (*batch.valid.shape, 10) for logits in output.colour_logits)
    assert output.size_logits.shape == (len(queries), 30, 30)
    assert {logits.dtype for logits in (*output.colour_logits, output.size_logits)} == {torch.float32}
    for chances in (output.colour_log_probs().exp().sum(-1), output.size_log_probs().exp().sum((1, 2))):
        assert torch.allclose(chances, torch.ones_like(chances), atol=1e-5)


def test_bf16_answers_are_close_to_full_precision(queries: list[Query]) -> None:
    agent, batch = make_trained_agent(), collate_queries(queries)
    with torch.no_grad():
        exact = agent(batch, prompts(6)).colour_log_probs()[batch.valid]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = agent(batch, prompts(6)).colour_log_probs()[batch.valid]
    assert float((exact.exp() - rough.exp()).abs().max()) < 0.05


Size = tuple[int, int]


def answer_of_size(shape: Size, out_size: Size, wanted: Size) -> tuple[AgentOutput, QueryBatch]:
    """An output that is sure of the size `wanted`, and of colour (row + column) % 10 in each cell of the canvas."""
    query = collate_queries([Query(np.zeros(shape, np.uint8), None, out_size, None, Augmentation.IDENTITY, 0)])
    colours = (query.row.long() + query.column.long()) % 10
    size = torch.zeros(1, 30, 30)
    size[0, wanted[0] - 1, wanted[1] - 1] = 9
    return AgentOutput([nn.functional.one_hot(colours, 10).float()], size), query


SIDES = st.tuples(st.integers(1, 30), st.integers(1, 30))


@given(SIDES, SIDES, SIDES)
def test_predicted_grids_have_their_own_size(shape: Size, out_size: Size, wanted: Size) -> None:
    output, query = answer_of_size(shape, out_size, wanted)
    rows, columns = max(shape[0], out_size[0]), max(shape[1], out_size[1])
    found = unpad_grid(output.predicted_grid(query)[0].numpy())
    if wanted[0] <= rows and wanted[1] <= columns:
        assert found.shape == wanted
    assert found.shape[0] <= rows and found.shape[1] <= columns  # never beyond the cells that have a colour
    expected = np.add.outer(np.arange(found.shape[0]), np.arange(found.shape[1])) % 10
    assert np.array_equal(found, expected)
    assert int(output.inside_prediction(query).sum()) == found.size == int(output.predicted_size(query).prod())

    known = output.predicted_grid(query, size=torch.tensor([[1, columns]]))
    assert unpad_grid(known[0].numpy()).shape == (1, columns)


def test_predicted_grids_of_a_padded_batch_are_those_of_its_queries(queries: list[Query]) -> None:
    agent, batch, prompt = make_trained_agent(), collate_queries(queries), prompts(6)
    with torch.no_grad():
        together = agent(batch, prompt).predicted_grid(batch)
        for index, query in enumerate(queries):
            alone = collate_queries([query])
            assert torch.equal(agent(alone, prompt).predicted_grid(alone)[0], together[index])
        chosen = torch.tensor([5, 0])
        picked = agent(batch, prompt).rows(chosen).predicted_grid(batch.rows(chosen))
    assert torch.equal(picked, together[chosen])


# --------------------------------------------------------------------------------------------------------------------
# parts
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(30, 2), (24, 4), (18, 1)])
def test_a_width_that_heads_cannot_share_is_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"agent width {width} must be a multiple"):
        make_agent(width=width, heads=heads)


def test_rotation_makes_scores_depend_on_relative_position_alone() -> None:
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def score(first: tuple[float, float], second: tuple[float, float]) -> float:
        turned = []
        for vector, place in ((q, first), (k, second)):
            angles = rotary_angles(torch.tensor(place)[None, None, None], rotary_frequencies(16))
            turned.append(rotate(vector[None, None, None], *angles).flatten())
        return float(turned[0] @ turned[1])

    assert score((0, 0), (2, 5)) == pytest.approx(score((20, 11), (22, 16)), abs=1e-4)
    assert score((0, 0), (2, 5)) != pytest.approx(score((0, 0), (5, 2)), abs=1e-2)
    assert score((3, 3), (3, 3)) == pytest.approx(float(q @ k), abs=1e-4)


def test_each_of_eight_heads_sees_the_input_under_a_symmetry_of_its_own() -> None:
    """A head's keys stand where a symmetry of the square brings the input's cells: each symmetry has a head."""
    agent = make_agent(heads=8, width=64)
    numbered = np.arange(6).reshape(2, 3)
    query = collate_queries([Query(numbered.astype(np.uint8), None, (2, 3), None, Augmentation.IDENTITY, 0)])
    places = agent.places(query)
    met = set()
    for d in range(8):
        turned = apply_dihedral(numbered, d)
        where = torch.tensor([np.argwhere(turned == cell)[0].tolist() for cell in range(6)]).float()
        expected = rotary_angles(where, agent.frequencies)
        met |= {
            head
            for head in range(8)
            if all(torch.allclose(a[0, head], b, atol=1e-5) for a, b in zip(places.key, expected, strict=True))
        }
    assert met == set(range(8))
    plain = make_agent(heads=2).places(query)
    assert torch.equal(plain.key[0], rotary_angles(plain.place, rotary_frequencies(16))[0])


def test_the_heads_are_the_only_voices_where_no_table_speaks(queries: list[Query]) -> None:
    """What they look at is the input's colours; beside tables their share is too small to outvote one at first."""
    grid = np.array([[3, 3], [3, 3]], np.uint8)
    silent = collate_queries([Query(grid, None, (2, 2), None, Augmentation.IDENTITY, 0)])
    with torch.no_grad():
        logits = make_agent(heads=8, width=64)(silent, prompts(1)).colour_logits[-1]
    assert logits.argmax(-1).eq(3).all() and float(logits.softmax(-1)[..., 3].min()) > 0.9
