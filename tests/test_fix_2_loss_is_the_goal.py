"""Fix 2: the loss holds the goal, 0.7 * efe + 0.3 * (-reward), and the reward's part of it carries gradient.

The hard reward comes from argmax and is a constant to autograd, so every test here takes the efe away: what still moves
is moved by the reward alone.
"""

from __future__ import annotations

import pytest
import torch
from conftest import SmallBuild, rows_of, train_batches, train_on
from torch import nn

from arc.efe import TERMS
from arc.episodes import TrainBatch
from policy_refined import (
    Prediction,
    SoftPrediction,
    colour_histogram,
    expected_goal,
    expected_reward,
    sampled_objective,
)
from trainloop_complete_with_fixes import Run, context_feedback, goal_oriented_loss, read_prompt

REWARD_ALONE = [word for term in TERMS for word in (f"--w_{term}", "0")]
FAST = ["--agent_lr", "1e-2", "--qwen_lr", "1e-3", "--policy_lr", "1e-2"]


def attentive_run(build: SmallBuild, *flags: str) -> Run:
    """A run whose agent listens to its prompt from the start (else that is learned first), with the reward alone."""
    run = build(*REWARD_ALONE, *FAST, *flags)
    nn.init.normal_(run.agent.prompt_trust.weight, generator=torch.Generator().manual_seed(0))
    return run


@torch.no_grad()
def expected_gains(run: Run, batches: list[TrainBatch]) -> tuple[float, float]:
    """Expected goal of the refined predictions, and the expected reward (after - before), the policy at its mean."""
    goals, rewards = [], []
    for batch in batches:
        prompt, _ = read_prompt(run, batch)
        feedback = context_feedback(run.agent, batch.feedback, prompt)
        refined = run.policy.refine_prompt(prompt, feedback, observe=False).prompt
        before, after = (SoftPrediction(**run.agent(batch.query, p).soft(batch.query)) for p in (prompt, refined))
        goals.append(expected_goal(after, colour_histogram(batch.query.target_grid)).mean())
        rewards.append(expected_reward(before, after, batch.query.target_grid).mean())
    return float(torch.stack(goals).mean()), float(torch.stack(rewards).mean())


def after_training(build: SmallBuild, rounds: int, *flags: str) -> tuple[float, float]:
    """`expected_gains` after training `rounds` times on four batches, on the reward alone."""
    run = attentive_run(build, *flags)
    batches = train_batches(run, 4)
    train_on(run, batches * rounds)
    return expected_gains(run, batches)


def test_the_reward_alone_raises_the_goal(small_build: SmallBuild) -> None:
    goal, _ = after_training(small_build, 4)
    ablated, _ = after_training(small_build, 4, "--ablate", "2")  # nothing but weight decay happens there
    assert goal > ablated + 0.03


@pytest.mark.parametrize(
    ("objective", "rounds", "rise"), [(("expected",), 6, 0.005), (("rloo", "--policy_samples", "8"), 10, 0.005)]
)
def test_the_policy_alone_raises_the_expected_reward(
    small_build: SmallBuild, objective: tuple[str, ...], rounds: int, rise: float
) -> None:
    flags = ("--policy_objective", *objective, "--agent_lr", "1e-9", "--qwen_lr", "1e-9")  # "before" stays as it is
    _, reward = after_training(small_build, rounds, *flags)
    _, ablated = after_training(small_build, rounds, *flags, "--ablate", "2")
    assert reward > ablated + rise


def observe_gradients(build: SmallBuild, *flags: str) -> dict[str, float]:
    """Largest gradient norm of each group in four steps on the reward alone."""
    run = attentive_run(build, *flags)
    train_on(run, train_batches(run, 4))
    rows = rows_of(run)
    return {group: max(row[f"{group}_grad"] for row in rows) for group in ("agent", "policy", "qwen")}


def test_the_expected_reward_moves_agent_policy_and_qwen(small_build: SmallBuild) -> None:
    assert min(observe_gradients(small_build).values()) > 1e-4
    assert max(observe_gradients(small_build, "--ablate", "2").values()) == 0


def test_the_score_function_moves_the_policy_and_nothing_else(small_build: SmallBuild) -> None:
    rloo = ("--policy_objective", "rloo")
    observed = observe_gradients(small_build, *rloo)
    assert observed["policy"] > 1e-4 and observed["agent"] == observed["qwen"] == 0
    assert max(observe_gradients(small_build, *rloo, "--ablate", "2").values()) == 0


def test_samples_do_not_count_in_the_scale_of_the_gradient(small_build: SmallBuild) -> None:
    """The scale is an average over batches; every sample of a batch would have a part in it of its own."""
    scales = []
    for objective in ("expected", "rloo"):
        run = small_build("--policy_objective", objective)
        train_on(run, train_batches(run, 1))
        scales.append(float(run.policy.gradient_square))
        batch = train_batches(run, 2)[1]
        prompt, _ = read_prompt(run, batch)
        feedback = context_feedback(run.agent, batch.feedback, prompt)
        assert feedback is not None
        nothing = Prediction(batch.query.target_grid, batch.query.input_grid)
        noise = torch.randn(2, len(prompt), run.policy.log_std.numel())
        sampled_objective(run.policy, run.agent, batch.query, prompt, feedback, nothing, noise)
        assert float(run.policy.gradient_square) == scales[-1]
    assert scales[0] == scales[1] > 0


@pytest.mark.parametrize("objective", ["expected", "rloo"])
def test_the_loss_is_seven_parts_efe_and_three_parts_reward(small_build: SmallBuild, objective: str) -> None:
    def observe(*flags: str) -> list[dict[str, float]]:
        run = small_build("--policy_objective", objective, *flags)
        nn.init.normal_(run.agent.prompt_trust.weight, generator=torch.Generator().manual_seed(0))
        train_on(run, train_batches(run, 3))
        return rows_of(run)

    rows = observe()
    for row in rows:
        assert row["loss"] == pytest.approx(0.7 * row["efe.total"] - 0.3 * row["reward_objective"], rel=1e-5)
    assert any(row["reward_objective"] != 0 for row in rows)
    for row in observe("--ablate", "2"):
        assert row["loss"] == row["efe.total"] and row["reward_objective"] == 0


def test_a_better_reward_is_a_lower_loss() -> None:
    efe, reward = torch.tensor(2.0), torch.tensor(1.0, requires_grad=True)
    loss = goal_oriented_loss(efe, reward)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.1)
    assert reward.grad is not None and float(reward.grad) == pytest.approx(-0.3)
