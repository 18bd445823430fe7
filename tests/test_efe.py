"""Terms of the expected free energy (arc/efe.py)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from arc.agent import AgentOutput
from arc.augment import Augmentation
from arc.batches import Query, QueryBatch, collate_queries
from arc.efe import (
    TERMS,
    EfeWeights,
    Pass,
    Weights,
    ambiguity,
    combine,
    prompt_consistency,
    risk,
    size_loss,
    terms,
    weighted_cross_entropy,
)

IGNORED = -100
LOGITS = arrays(np.float32, (2, 5, 10), elements=st.floats(-20, 20, width=32))
TARGETS = arrays(np.int64, (2, 5), elements=st.sampled_from([IGNORED, *range(10)]))
WEIGHTS = arrays(np.float32, (2, 5), elements=st.floats(0, 4, width=32))


@given(LOGITS, TARGETS, WEIGHTS)
def test_weighted_cross_entropy_is_the_mean_over_grids_of_weighted_means(
    logits: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> None:
    found = float(weighted_cross_entropy(*map(torch.from_numpy, (logits, target, weight))))
    grids = []
    for scores, wanted, w in zip(logits.astype(np.float64), target, weight.astype(np.float64), strict=True):
        cells = [
            (w[i], np.logaddexp.reduce(scores[i]) - scores[i, colour]) for i, colour in enumerate(wanted) if colour >= 0
        ]
        total = sum(w for w, _ in cells)
        grids.append(sum(w * loss for w, loss in cells) / max(total, 1e-6))
    assert found == pytest.approx(np.mean(grids), rel=1e-4, abs=1e-4)


def test_a_grid_without_a_target_counts_zero_and_has_no_gradient() -> None:
    logits = torch.randn(1, 4, 10, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.full((1, 4), IGNORED), torch.ones(1, 4))
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and bool((logits.grad == 0).all())


def test_half_precision_logits_are_summed_in_full_precision() -> None:
    logits = (torch.randn(1, 400, 10) * 3).bfloat16()
    target, weight = torch.zeros(1, 400, dtype=torch.long), torch.ones(1, 400)
    assert weighted_cross_entropy(logits, target, weight).dtype == torch.float32
    assert ambiguity(logits, target).dtype == size_loss(logits.new_zeros(1, 30, 30), torch.ones(1, 2).long()).dtype


def test_risk_is_the_mean_over_the_passes() -> None:
    passes = [torch.randn(2, 5, 10) for _ in range(3)]
    target, weight = torch.randint(10, (2, 5)), torch.rand(2, 5)
    single = [float(weighted_cross_entropy(logits, target, weight)) for logits in passes]
    assert float(risk(passes, target, weight)) == pytest.approx(np.mean(single))


@given(LOGITS, TARGETS)
def test_ambiguity_is_an_entropy(logits: np.ndarray, target: np.ndarray) -> None:
    value = float(ambiguity(torch.from_numpy(logits), torch.from_numpy(target)))
    assert -1e-5 <= value <= math.log(10) + 1e-5
    if (target < 0).all():
        assert value == 0


def test_ambiguity_of_even_and_of_sure_cells() -> None:
    logits = torch.stack((torch.zeros(10), torch.eye(10)[3] * 100, torch.zeros(10)))[None]
    assert float(ambiguity(logits, torch.tensor([[1, IGNORED, IGNORED]]))) == pytest.approx(math.log(10))
    assert float(ambiguity(logits, torch.tensor([[IGNORED, 1, IGNORED]]))) == pytest.approx(0, abs=1e-6)
    assert float(ambiguity(logits, torch.tensor([[1, 1, IGNORED]]))) == pytest.approx(math.log(10) / 2)


def test_black_cells_count_as_the_others_do() -> None:
    logits = torch.stack((torch.zeros(10), torch.eye(10)[3] * 100))[None]
    assert float(ambiguity(logits, torch.tensor([[0, IGNORED]]))) == pytest.approx(math.log(10))
    assert float(ambiguity(logits, torch.tensor([[0, 1]]))) == pytest.approx(math.log(10) / 2)


def sure_of_size(height: int, width: int, other: float = 0.0, strength: float = 50.0) -> torch.Tensor:
    logits = torch.full((1, 30, 30), other)
    logits[0, height - 1, width - 1] = strength
    return logits


def test_size_loss_is_the_cross_entropy_of_the_size() -> None:
    assert float(size_loss(torch.zeros(2, 30, 30), torch.tensor([[1, 1], [30, 7]]))) == pytest.approx(math.log(900))
    logits = sure_of_size(3, 4)
    assert float(size_loss(logits, torch.tensor([[3, 4]]))) == pytest.approx(0, abs=1e-6)
    assert float(size_loss(logits, torch.tensor([[4, 3]]))) == pytest.approx(50, abs=1e-3)
    both = torch.cat((logits, logits))
    assert float(size_loss(both, torch.tensor([[3, 4], [4, 3]]))) == pytest.approx(25, abs=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# consistency of prompts
# --------------------------------------------------------------------------------------------------------------------

E1, E2 = torch.eye(4)[:2].view(2, 1, 2, 2)  # two orthogonal prompts of 2 vectors


@pytest.mark.parametrize(
    ("prompts", "tasks", "expected"),
    [
        ([E1, E1], [0, 0], 0.0),  # together
        ([E1, 5 * E1], [0, 0], 0.0),  # length does not count
        ([E1, E2], [0, 0], 1.0),
        ([E1, -E1], [0, 0], 2.0),
        ([E1, E2], [0, 1], 0.0),  # orthogonal is far enough
        ([E1, -E1], [0, 1], 0.0),
        ([E1, E1], [0, 1], 1.0),  # different tasks, same prompt
        ([E1, E1, E2], [0, 0, 1], 0.0),
        ([E1], [0], 0.0),  # nothing to compare with
    ],
)
def test_consistency_by_hand(prompts: list[torch.Tensor], tasks: list[int], expected: float) -> None:
    assert float(prompt_consistency(torch.cat(prompts), torch.tensor(tasks))) == pytest.approx(expected, abs=1e-6)


PROMPTS = arrays(np.float32, (5, 2, 3), elements=st.floats(-9, 9, width=32))


@given(PROMPTS, st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_consistency_is_bounded(prompts: np.ndarray, tasks: list[int]) -> None:
    value = float(prompt_consistency(torch.from_numpy(prompts), torch.tensor(tasks)))
    together = len(set(tasks)) < 5  # some two prompts belong to one task, which can cost 2; the others at most 1
    assert -1e-5 <= value <= (2 if together else 0) + (1 if len(set(tasks)) > 1 else 0) + 1e-5


def test_a_step_down_the_consistency_brings_one_task_together_and_others_apart() -> None:
    prompts = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)) + 1
    tasks = torch.tensor([0, 0, 1, 1])
    for reversed_sign, direction in ((False, 1), (True, -1)):
        leaf = prompts.clone().requires_grad_()
        gradient = torch.autograd.grad(prompt_consistency(leaf, tasks, reversed_sign=reversed_sign), leaf)[0]
        moved = prompts - 0.01 * gradient

        def cosine(p: torch.Tensor, i: int, j: int) -> float:
            return float(torch.nn.functional.cosine_similarity(p[i].flatten(), p[j].flatten(), dim=0))

        assert direction * (cosine(moved, 0, 1) - cosine(prompts, 0, 1)) > 0


# --------------------------------------------------------------------------------------------------------------------
# the total
# --------------------------------------------------------------------------------------------------------------------


FIVE = st.lists(st.floats(0, 10), min_size=5, max_size=5)


@given(FIVE, FIVE, st.floats(0, 1))
def test_the_total_is_the_weighted_sum(values: list[float], weights: list[float], size_weight: float) -> None:
    terms = {name: torch.tensor(value) for name, value in zip(TERMS, values, strict=True)}
    weight = dict(zip(TERMS, weights, strict=True))
    found = combine(terms, EfeWeights(**weight), size_weight)
    assert list(found) == [*TERMS, "total"] and all(found[name] is terms[name] for name in TERMS)
    expected = sum(weight[n] * float(terms[n]) * (size_weight if n == "size" else 1) for n in TERMS)
    assert float(found["total"]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def a_query(target: list[list[int]]) -> Query:
    grid = np.array(target, np.uint8)
    return Query(grid, grid, grid.shape, None, Augmentation.IDENTITY, 0)


def test_the_terms_are_means_over_the_passes_each_by_its_share() -> None:
    """Of two predictions with two passes each; what `portion` is asked of is what the mean goes over."""
    queries = collate_queries([a_query([[0, 1], [0, 0]]), a_query([[2]])])
    asked = collate_queries([a_query([[0, 3]])])
    generator = torch.Generator().manual_seed(0)

    def output(batch: QueryBatch) -> AgentOutput:
        shape = (*batch.target.shape, 10)
        colours = [torch.randn(shape, generator=generator) for _ in range(2)]
        return AgentOutput(colours, torch.randn(len(batch), 30, 30, generator=generator))

    passes = [
        Pass(queries, output(queries), Weights(torch.rand(2, 4, generator=generator), grid, torch.zeros(2)))
        for grid in (torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.25]))
    ]
    back = output(asked)
    shares = (0.75, 0.25)
    found = terms(passes, shares, asked, back, lambda count: torch.as_tensor(count) / 10)
    wanted: dict[str, float] = dict.fromkeys(("risk", "ambiguity", "size"), 0.0)
    for one, share in zip(passes, shares, strict=True):
        colours, target, weights = one.output.colour_logits, queries.target, one.weights
        of_grids = float(weights.grid.sum()) / 10
        wanted["risk"] += float(risk(colours, target, weights.cell, weights.grid)) * of_grids * share
        wanted["ambiguity"] += float(ambiguity(colours[-1], target)) * 5 / 10 * share  # five cells, three of them black
        wanted["size"] += float(size_loss(one.output.size_logits, queries.target_size)) * 2 / 10 * share
    ones = torch.ones(asked.target.shape)
    wanted["reversibility"] = float(risk(back.colour_logits, asked.target, ones)) / 10
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, rel=1e-5)
