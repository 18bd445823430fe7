"""Fix 4: sizes come first. The curriculum weighs the size term (not the whole loss), and a prediction of another size
than the target still gives a loss and a reward, at its own size."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, SmallBuild, SmallRun, rows_of, train_batches, train_on
from hypothesis import given
from hypothesis import strategies as st

from arc.augment import Augmentation
from arc.batches import Query, collate_queries, unpad_grid
from arc.efe import TERMS, EfeWeights, risk, size_loss
from policy_refined import Prediction, SoftPrediction, compute_reward, expected_reward
from trainloop_complete_with_fixes import Run, SizeWarmupCurriculum, goal_oriented_loss

EXPECTED = [1.000, 0.833, 0.667, 0.500, 0.500]


def logged_weights(outcome: Outcome) -> list[float]:
    return [float(x) for x in re.findall(r"\] Size Warmup Weight: (\d\.\d{3}) \(FIX #4\)", outcome.stdout)]


def effective_weights(outcome: Outcome) -> list[float]:
    """What the size term really counts in the efe of each epoch (one batch an epoch), solved from the logged terms."""
    weights = EfeWeights()
    found = []
    for row in outcome.batches:
        others = sum(getattr(weights, name) * row[f"efe.{name}"] for name in TERMS if name != "size")
        found.append((row["efe.total"] - others) / (weights.size * row["efe.size"]))
    return found


def test_a_run_weighs_the_size_term_by_the_curriculum(small_run: SmallRun, tmp_path: Path) -> None:
    flags = ("--epochs", "5", "--max_batches", "1", "--val_every", "0", "--val_limit", "1")
    outcome = small_run(tmp_path / "run", *flags)
    assert logged_weights(outcome) == EXPECTED
    assert effective_weights(outcome) == pytest.approx(EXPECTED, abs=1e-3)

    ablated = small_run(tmp_path / "ablated", *flags, "--ablate", "4")
    assert logged_weights(ablated) == [0.5] * 5
    assert effective_weights(ablated) == pytest.approx([0.5] * 5, abs=1e-3)


@given(st.integers(1, 50), st.integers(0, 100))
def test_the_curriculum_falls_from_one_to_a_half(warmup_epochs: int, epoch: int) -> None:
    weight = SizeWarmupCurriculum(warmup_epochs).get_size_loss_weight
    assert weight(0) == 1.0
    assert 0.5 <= weight(epoch + 1) <= weight(epoch) <= 1
    assert (weight(epoch) == 0.5) == (epoch >= warmup_epochs)


# --------------------------------------------------------------------------------------------------------------------
# mismatched sizes
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(small_build: SmallBuild) -> Run:
    return small_build()


SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))


@given(asked=SIZES, predicted=SIZES, target=SIZES)
def test_any_sizes_give_a_loss_and_a_reward(
    run: Run, asked: tuple[int, int], predicted: tuple[int, int], target: tuple[int, int]
) -> None:
    """asked: of the input; predicted: what the agent answers; target: of the truth."""
    wanted = np.ones(target, np.uint8)
    query = collate_queries([Query(np.zeros(asked, np.uint8), wanted, predicted, None, Augmentation.IDENTITY, 0)])
    output = run.agent(query, torch.zeros(1, 2, 8))
    with torch.no_grad():
        output.size_logits[0, predicted[0] - 1, predicted[1] - 1] = 50.0
    grid = output.predicted_grid(query)
    assert unpad_grid(grid[0].numpy()).shape == predicted  # its own size, not the target's

    answers = Prediction(grid, query.input_grid), Prediction(query.target_grid, query.input_grid)
    reward, breakdown = compute_reward(*answers, query.target_grid, query.input_grid)
    assert torch.isfinite(reward).all() and bool(breakdown["d_size"] > 0) == (predicted != target)
    soft = SoftPrediction(**output.soft(query))
    weights = run.fixes.hard_cells(output, query, torch.tensor([False])).cell
    efe = risk(output.colour_logits, query.target, weights) + size_loss(output.size_logits, query.target_size)
    loss = goal_oriented_loss(efe, expected_reward(soft, soft, query.target_grid).mean())
    loss.backward()
    assert torch.isfinite(loss)


def test_training_on_unpredictable_sizes_never_raises(small_build: SmallBuild) -> None:
    run = small_build()
    run.training = tuple(task for task in run.training if task.id == "random")  # most of its sizes are guessed wrong
    batches = train_batches(run, 2)
    wrong = [(batch.query.out_size != batch.query.target_size).any(1).float().mean() for batch in batches]
    assert max(wrong) > 0.5
    train_on(run, batches)
    for row in rows_of(run):
        assert np.isfinite([row["loss"], row["reward"], row["efe.size"], row["agent_grad"]]).all()
