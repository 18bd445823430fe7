"""Fix 6: every delta is after - before, a better prediction never lowers the reward, and likeness of one task's prompts
is rewarded (1 - cos), not punished.

What "better" can promise. Correcting cells always raises d_acc, but the colour histogram may move away from the
target's while it happens, so the sum is a theorem only under a condition:

- With the predicted size right, correcting k of n cells raises the reward by at least k / 2n.
- With any size, correcting k cells changes it by at least k / union - k / (2 * area) (union of the rectangles, area of
  the prediction): not below 0 as long as the union is at most twice the prediction.
- Correcting the size, the cells on the overlap kept, never lowers it, whatever stands in the new cells.
- A perfect prediction is never worse than anything.
"""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from conftest import SmallBuild, rows_of, train_batches, train_on
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from torch.nn import functional as F

from arc.batches import pad_grid
from arc.efe import TERMS
from policy_refined import REWARD_WEIGHTS, Prediction, compute_reward
from trainloop_complete_with_fixes import read_prompt

SIDES = st.tuples(st.integers(1, 6), st.integers(1, 6))
COLOURS = st.integers(0, 3)  # few, so that grids often agree in some cells
GRIDS = SIDES.flatmap(lambda shape: arrays(np.int64, shape, elements=COLOURS))
TOLERANCE = 1e-6


def padded(*grids: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([pad_grid(grid) for grid in grids]))


def rewarded(
    before: np.ndarray, after: np.ndarray, target: np.ndarray, back: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[float, dict[str, float]]:
    """Reward and deltas of a refinement; back: the inputs predicted back before and after (by default the same)."""
    source = np.ones((2, 2), np.int64)
    back = (source, source) if back is None else back
    first, second = (Prediction(padded(answer), padded(way)) for answer, way in zip((before, after), back, strict=True))
    reward, breakdown = compute_reward(first, second, padded(target), padded(source))
    return float(reward), {name: float(delta) for name, delta in breakdown.items()}


def corrected(prediction: np.ndarray, target: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, int]:
    """The prediction with those of its wrong cells put right that `choice` names, and how many these are."""
    rows, columns = (min(a, b) for a, b in zip(prediction.shape, target.shape, strict=True))
    better = prediction.copy()
    chosen = choice[:rows, :columns] & (prediction[:rows, :columns] != target[:rows, :columns])
    better[:rows, :columns][chosen] = target[:rows, :columns][chosen]
    return better, int(chosen.sum())


CHOICES = arrays(np.bool_, (6, 6))


@given(SIDES.flatmap(lambda shape: st.tuples(*[arrays(np.int64, shape, elements=COLOURS)] * 2)), CHOICES)
def test_correcting_cells_at_the_right_size_raises_the_reward(
    grids: tuple[np.ndarray, np.ndarray], choice: np.ndarray
) -> None:
    prediction, target = grids
    better, count = corrected(prediction, target, choice)
    reward, deltas = rewarded(prediction, better, target)
    assert deltas["d_acc"] == pytest.approx(count / target.size, abs=TOLERANCE)
    assert reward >= count / (2 * target.size) - TOLERANCE


@given(GRIDS, GRIDS, CHOICES)
def test_correcting_cells_at_any_size(prediction: np.ndarray, target: np.ndarray, choice: np.ndarray) -> None:
    better, count = corrected(prediction, target, choice)
    reward, deltas = rewarded(prediction, better, target)
    overlap = min(prediction.shape[0], target.shape[0]) * min(prediction.shape[1], target.shape[1])
    union = prediction.size + target.size - overlap
    assert deltas["d_acc"] == pytest.approx(count / union, abs=TOLERANCE) and deltas["d_size"] == 0
    assert reward >= count / union - count / (2 * prediction.size) - TOLERANCE


@given(GRIDS, GRIDS, st.randoms(use_true_random=False))
def test_correcting_the_size_never_lowers_the_reward(prediction: np.ndarray, target: np.ndarray, dice: Random) -> None:
    better = np.array([[dice.randrange(4) for _ in row] for row in target])
    rows, columns = (min(a, b) for a, b in zip(prediction.shape, target.shape, strict=True))
    better[:rows, :columns] = prediction[:rows, :columns]
    reward, deltas = rewarded(prediction, better, target)
    assert reward >= -TOLERANCE and min(deltas["d_acc"], deltas["d_size"]) >= 0


@given(GRIDS, GRIDS)
def test_a_perfect_prediction_is_never_worse(prediction: np.ndarray, target: np.ndarray) -> None:
    reward, deltas = rewarded(prediction, target, target)
    same = np.array_equal(prediction, target)
    assert (reward == 0) == same and reward >= 0 and min(deltas.values()) >= -TOLERANCE


@given(GRIDS, GRIDS, st.tuples(GRIDS, GRIDS))
def test_identical_predictions_give_exactly_zero(
    prediction: np.ndarray, target: np.ndarray, back: tuple[np.ndarray, np.ndarray]
) -> None:
    assert rewarded(prediction, prediction, target, (back[0], back[0])) == (0.0, dict.fromkeys(REWARD_WEIGHTS, 0.0))


@given(GRIDS, GRIDS, GRIDS, st.tuples(GRIDS, GRIDS))
def test_going_back_costs_what_going_there_gave(
    before: np.ndarray, after: np.ndarray, target: np.ndarray, back: tuple[np.ndarray, np.ndarray]
) -> None:
    there, deltas = rewarded(before, after, target, back)
    assert there == pytest.approx(sum(REWARD_WEIGHTS[name] * delta for name, delta in deltas.items()), abs=TOLERANCE)
    assert abs(there) <= 2.5
    assert rewarded(after, before, target, back[::-1])[0] == pytest.approx(-there, abs=TOLERANCE)


def grid(*rows: str) -> np.ndarray:
    return np.array([list(map(int, row)) for row in rows])


@pytest.mark.parametrize(
    ("before", "after", "positive"),
    [
        (grid("12", "21"), grid("12", "34"), {"d_acc", "d_color"}),  # cells
        (grid("21", "43"), grid("12", "34"), {"d_acc"}),  # cells, the colours were right already
        (grid("55", "55"), grid("43", "21"), {"d_color"}),  # colours, in the wrong places
        (grid("1"), grid("12", "34"), {"d_acc", "d_size", "d_color"}),
        (grid("5"), grid("55", "55"), {"d_size"}),
    ],
)
def test_each_delta_is_positive_where_the_refinement_is_better(
    before: np.ndarray, after: np.ndarray, positive: set[str]
) -> None:
    target = grid("12", "34")
    reward, deltas = rewarded(before, after, target)
    assert {name for name, delta in deltas.items() if delta > 0} == positive
    assert min(deltas.values()) == 0 and reward > 0
    reward, deltas = rewarded(after, before, target)
    assert {name for name, delta in deltas.items() if delta < 0} == positive
    assert max(deltas.values()) == 0 and reward < 0


def test_d_rev_is_positive_where_the_input_is_found_back() -> None:
    answer, source = grid("12", "34"), grid("11", "11")  # `rewarded` takes a 2 x 2 grid of ones for the input
    assert rewarded(answer, answer, answer, (grid("10", "00"), source)) == (
        pytest.approx(0.5 * 0.75),
        {"d_acc": 0, "d_size": 0, "d_color": 0, "d_rev": pytest.approx(0.75)},
    )
    assert rewarded(answer, answer, answer, (source, grid("10", "00")))[1]["d_rev"] == pytest.approx(-0.75)


# --------------------------------------------------------------------------------------------------------------------
# the consistency term, in the loss as the run builds it
# --------------------------------------------------------------------------------------------------------------------


def observe_likeness(build: SmallBuild, *flags: str) -> tuple[float, float]:
    """Mean cosine between the prompts that one task gets from different contexts, before and after 12 steps on the
    efe's prompt term alone."""
    others = [word for term in TERMS if term != "prompt" for word in (f"--w_{term}", "0")]
    run = build(*others, "--w_prompt", "1", "--qwen_lr", "3e-3", *flags)
    run.training = run.training[:1]
    batches = train_batches(run, 1)

    def likeness() -> float:
        with torch.no_grad():
            prompt = read_prompt(run, batches[0])[0].flatten(1)
        cosine = F.cosine_similarity(prompt[:, None], prompt[None], dim=-1)
        return float(cosine[~torch.eye(len(prompt), dtype=torch.bool)].mean())

    start = likeness()
    train_on(run, batches * 12)
    return start, likeness()


def test_the_prompt_term_draws_prompts_of_one_task_together(small_build: SmallBuild) -> None:
    start, end = observe_likeness(small_build, "--ablate", "2")  # without the reward, which pulls at prompts too
    assert end > start + (1 - start) / 4
    start, end = observe_likeness(small_build, "--ablate", "2,6")  # the seed's old sign drives them apart
    assert end < start - (1 - start) / 4


def test_the_logged_reward_is_the_weighted_sum_of_the_logged_deltas(small_build: SmallBuild) -> None:
    run = small_build()
    nn.init.normal_(run.agent.prompt_trust.weight, generator=torch.Generator().manual_seed(0))  # it hears its prompt
    train_on(run, train_batches(run, 3))
    rows = rows_of(run)
    assert any(row["reward"] != 0 for row in rows)
    for row in rows:
        assert row["reward"] == pytest.approx(sum(w * row[name] for name, w in REWARD_WEIGHTS.items()), abs=TOLERANCE)
