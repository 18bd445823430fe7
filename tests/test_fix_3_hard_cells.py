"""Fix 3: wrong cells carry the loss. The seed's own snippet multiplies the mean by the share of wrong cells, which
weakens the signal as the model improves; what it means is the mean over the wrong cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SmallBuild, rows_of, train_batches, train_on
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arc.agent import AgentOutput
from arc.augment import Augmentation
from arc.batches import Query, QueryBatch, collate_queries
from arc.efe import risk
from trainloop_complete_with_fixes import Run, hard_cell_mask

# The seed's worked example: two of nine cells are wrong.
TARGET = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8)
PREDICTED = np.array([[1, 0, 3], [4, 5, 0], [7, 8, 9]], np.uint8)
WRONG = torch.tensor([False, True, False, False, False, True, False, False, False])
UNSOLVED = torch.tensor([False])


def example(predicted: np.ndarray, target: np.ndarray) -> tuple[AgentOutput, QueryBatch]:
    """An agent's output that predicts `predicted`, with even confidence in every cell, for a query with this target."""
    canvas = np.zeros_like(predicted)
    query = collate_queries([Query(canvas, target, canvas.shape, None, Augmentation.IDENTITY, 0)])
    colour = torch.nn.functional.one_hot(torch.from_numpy(predicted).long(), 10).float().reshape(1, -1, 10)
    return AgentOutput([colour.requires_grad_()], sure_of_size(*predicted.shape)), query


def sure_of_size(height: int, width: int) -> Tensor:
    """(1, 30, 30) size logits that predict this size."""
    logits = torch.zeros(1, 30, 30)
    logits[0, height - 1, width - 1] = 50
    return logits


def pull(build: SmallBuild, predicted: np.ndarray, *flags: str) -> Tensor:
    """(L,) size of the risk's gradient in each cell of the worked example, relative to that of the plain mean."""
    run = build(*flags)
    output, query = example(predicted, TARGET)
    gradients = []
    hard = run.fixes.hard_cells(output, query, UNSOLVED).cell
    for weights in (hard, torch.ones_like(hard)):
        loss = risk(output.colour_logits, query.target, weights)
        gradients.append(torch.autograd.grad(loss, output.colour_logits[0])[0].norm(dim=-1))
    return (gradients[0] / gradients[1])[0]


def test_the_worked_example_pulls_four_and_a_half_times_as_hard(small_build: SmallBuild) -> None:
    observed = pull(small_build, PREDICTED, "--hard_floor", "0")
    assert observed[WRONG].tolist() == pytest.approx([4.5, 4.5])
    assert observed[~WRONG].tolist() == [0] * 7
    assert pull(small_build, PREDICTED, "--hard_floor", "0", "--ablate", "3").tolist() == pytest.approx([1.0] * 9)


def test_before_the_fix_black_cells_counted_as_the_others(small_build: SmallBuild) -> None:
    output, query = example(PREDICTED, np.array([[0, 2, 3], [4, 0, 6], [7, 8, 0]], np.uint8))
    assert bool((small_build("--ablate", "3").fixes.hard_cells(output, query, UNSOLVED).cell == 1).all())


def test_by_default_wrong_cells_pull_harder_and_right_cells_still_pull(small_build: SmallBuild) -> None:
    observed = pull(small_build, PREDICTED)
    assert observed[WRONG].min() > 1.2 and 0.1 < observed[~WRONG].min() <= observed[~WRONG].max() < 1
    assert pull(small_build, PREDICTED, "--ablate", "3").tolist() == pytest.approx([1.0] * 9)


@pytest.mark.parametrize("floor", ["0", "0.5", "1"])
def test_a_grid_that_is_all_right_gets_the_plain_mean(small_build: SmallBuild, floor: str) -> None:
    assert pull(small_build, TARGET, "--hard_floor", floor).tolist() == pytest.approx([1.0] * 9)


def test_a_target_cell_outside_the_predicted_grid_is_wrong(small_build: SmallBuild) -> None:
    output, query = example(PREDICTED, TARGET)
    narrow = AgentOutput(output.colour_logits, sure_of_size(3, 2))
    weights = small_build("--hard_floor", "0").fixes.hard_cells(narrow, query, UNSOLVED).cell
    assert weights.reshape(3, 3).tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 1]]


def test_the_mask_ratio_is_the_share_of_wrong_cells() -> None:
    predicted, target = (torch.from_numpy(grid).long().reshape(1, 9) for grid in (PREDICTED, TARGET))
    _, ratio = hard_cell_mask(predicted, target, torch.tensor([9]), 0.5)
    assert float(ratio) == pytest.approx(2 / 9)
    _, ratio = hard_cell_mask(predicted, target, torch.tensor([14]), 0.5)  # five cells lie beyond the canvas
    assert float(ratio) == pytest.approx(7 / 14)


CELLS = st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 9)), min_size=1, max_size=12)


@given(CELLS, st.integers(0, 20), st.floats(0, 1))
def test_weights_of_any_cells(cells: list[tuple[int, int]], beyond: int, floor: float) -> None:
    predicted, target = torch.tensor(cells).T[:, None]  # (1, L) each
    wanted = target >= 0
    weights, ratio = hard_cell_mask(predicted, target, wanted.sum(1) + beyond, floor)
    wrong = wanted & (predicted != target)
    assert weights[~wanted].eq(0).all()  # there is nothing to predict
    assert weights[wrong].eq(1).all()
    right = weights[wanted & ~wrong]
    assert torch.allclose(right, torch.full_like(right, floor if bool(wrong.any()) else 1.0))
    assert bool(weights.sum() > 0) == bool(wanted.any())  # something always pulls, whatever the floor
    assert float(ratio) == pytest.approx((int(wrong.sum()) + beyond) / max(1, int(wanted.sum()) + beyond))


def weight(run: Run, example: tuple[AgentOutput, QueryBatch], *, vote_right: bool = False) -> float:
    return float(run.fixes.hard_cells(*example, torch.tensor([vote_right])).grid)


def test_a_nearly_right_grid_weighs_more_than_a_hopeless_one(small_build: SmallBuild) -> None:
    nearly, hopeless = example(PREDICTED, TARGET), example(np.zeros_like(TARGET), TARGET)

    def weigh(*flags: str) -> tuple[float, float]:
        run = small_build(*flags)
        return weight(run, nearly), weight(run, hopeless)

    assert weigh("--grid_focus", "2") == pytest.approx(((7 / 9) ** 2, 0))
    assert weigh()[0] > 10 * weigh()[1]
    assert weigh("--ablate", "3") == weigh("--grid_focus", "0") == (1, 1)


def test_a_grid_that_the_vote_solves_weighs_more(small_build: SmallBuild) -> None:
    right = example(TARGET, TARGET)

    def weigh(*flags: str) -> tuple[float, float]:
        run = small_build(*flags)
        return weight(run, right, vote_right=True), weight(run, right)

    assert weigh("--keep_solved", "4") == (5, 1)
    assert weigh() == (11, 1)
    assert weigh("--ablate", "3") == weigh("--keep_solved", "0") == (1, 1)


def test_grid_weights_share_out_the_risk() -> None:
    logits, target = torch.randn(2, 4, 10), torch.randint(0, 10, (2, 4))
    alone = [float(risk([logits[i : i + 1]], target[i : i + 1], torch.ones(1, 4))) for i in range(2)]
    found = float(risk([logits], target, torch.ones(2, 4), torch.tensor([3.0, 1.0])))
    assert found == pytest.approx((3 * alone[0] + alone[1]) / 4, rel=1e-5)
    faint = float(risk([logits], target, torch.ones(2, 4), torch.tensor([3e-7, 1e-7])))
    assert faint == pytest.approx(found, rel=1e-5)  # nearly hopeless ones are shared out in the same way
    assert float(risk([logits], target, torch.ones(2, 4), torch.zeros(2))) == 0  # all hopeless: no NaN


@pytest.mark.parametrize("floor", ["0", "0.5"])
def test_training_is_finite_with_solved_and_unsolved_queries_in_a_batch(small_build: SmallBuild, floor: str) -> None:
    run = small_build("--hard_floor", floor)
    train_on(run, train_batches(run, 6))
    rows = rows_of(run)
    assert any(0 < row["solved"] < 1 for row in rows)
    assert all(math.isfinite(row["efe.risk"]) and math.isfinite(row["agent_grad"]) for row in rows)
    assert run.state.skipped_steps == 0
