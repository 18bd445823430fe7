"""Goal metrics, the expected reward, the prompt policy and the score function (policy_refined.py)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from arc.batches import pad_grid
from policy_refined import (
    REWARD_WEIGHTS,
    Feedback,
    PromptPolicy,
    SoftPrediction,
    cell_accuracy,
    colour_agreement,
    colour_histogram,
    exact_match,
    expected_goal,
    expected_reward,
    leave_one_out_advantages,
    mean_per_owner,
    score_function_objective,
    size_agreement,
)

SIDES = st.tuples(st.integers(1, 30), st.integers(1, 30))
SMALL_SIDES = st.tuples(st.integers(1, 5), st.integers(1, 5))
GRIDS = (SIDES | SMALL_SIDES).flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(0, 9)))


def padded(*grids: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([pad_grid(grid) for grid in grids]))


def grid(*rows: str) -> np.ndarray:
    return np.array([list(map(int, row)) for row in rows])


# --------------------------------------------------------------------------------------------------------------------
# goal metrics
# --------------------------------------------------------------------------------------------------------------------


@given(GRIDS, GRIDS)
def test_metrics_are_symmetric_and_between_zero_and_one_for_any_two_sizes(a: np.ndarray, b: np.ndarray) -> None:
    for metric in (cell_accuracy, size_agreement, colour_agreement):
        there, back = (float(metric(padded(x), padded(y))) for x, y in ((a, b), (b, a)))
        assert -1e-6 <= there <= 1 + 1e-6 and there == pytest.approx(back, abs=1e-6)
    assert float(cell_accuracy(padded(a), padded(b))) <= float(size_agreement(padded(a), padded(b)))
    equal = np.array_equal(a, b)
    assert bool(exact_match(padded(a), padded(b))) == equal == (float(cell_accuracy(padded(a), padded(b))) == 1)
    assert (float(size_agreement(padded(a), padded(b))) == 1) == (a.shape == b.shape)


@given(GRIDS)
def test_a_grid_agrees_with_itself(a: np.ndarray) -> None:
    assert [float(m(padded(a), padded(a))) for m in (cell_accuracy, size_agreement, colour_agreement)] == [1, 1, 1]
    histogram = colour_histogram(padded(a))[0]
    assert histogram.tolist() == pytest.approx((np.bincount(a.ravel(), minlength=10) / a.size).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "target", "accuracy", "size", "colour"),
    [
        (grid("12", "34"), grid("12", "33"), 3 / 4, 1, 3 / 4),
        (grid("12"), grid("12", "34"), 2 / 4, 2 / 4, 1 / 2),
        (grid("123"), grid("1", "2", "3"), 1 / 5, 1 / 5, 1),  # the union of the two rectangles has five cells
        (grid("1111", "1111"), grid("1"), 1 / 8, 1 / 8, 1),  # too large costs as too small does
        (grid("0"), grid("1"), 0, 1, 0),
    ],
)
def test_metrics_by_hand(
    prediction: np.ndarray, target: np.ndarray, accuracy: float, size: float, colour: float
) -> None:
    found = [float(m(padded(prediction), padded(target))) for m in (cell_accuracy, size_agreement, colour_agreement)]
    assert found == pytest.approx([accuracy, size, colour])


def test_an_empty_prediction_scores_zero_and_is_no_nan() -> None:
    empty, target = torch.full((1, 30, 30), -1), padded(grid("12"))
    assert float(cell_accuracy(empty, target)) == float(size_agreement(empty, target)) == 0
    assert float(colour_agreement(empty, target)) == pytest.approx(0.5)
    assert float(cell_accuracy(empty, empty)) == 0 and torch.isfinite(colour_agreement(empty, empty)).all()


# --------------------------------------------------------------------------------------------------------------------
# the expected reward
# --------------------------------------------------------------------------------------------------------------------


def soft(
    target: np.ndarray, height: int, width: int, generator: torch.Generator, canvas: tuple[int, int] = (4, 4)
) -> SoftPrediction:
    """A random predictive distribution over grids on a canvas, most probable size height x width."""
    rows, columns = canvas
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    cells = padded(target)[0, row, column]
    scores = torch.randn(1, 30, 30, generator=generator)
    scores[0, height - 1, width - 1] = 6
    return SoftPrediction(
        colour=torch.randn(1, rows * columns, 10, generator=generator).mul(2).log_softmax(-1),
        size=scores.flatten(1).log_softmax(-1).view(1, 30, 30),
        inside=((row < height) & (column < width))[None],
        target=torch.where(cells < 0, -100, cells)[None],
        target_size=torch.tensor([target.shape]),
        area=torch.tensor([height * width]),
    )


@pytest.mark.parametrize("target", [grid("12", "34"), grid("121"), grid("1212", "2121", "1212", "0000"), grid("7")])
@pytest.mark.parametrize("size", [(2, 2), (1, 3), (4, 4), (3, 1)])
def test_the_expected_goal_is_the_mean_over_sampled_grids_and_sizes(target: np.ndarray, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = soft(target, *size, generator)
    count, truth = 20_000, padded(target)[:, :4, :4]
    cells = torch.multinomial(prediction.colour[0].exp(), count, replacement=True, generator=generator)  # (L, count)
    grids = cells.T.reshape(count, 4, 4).clone()
    grids[:, size[0] :], grids[:, :, size[1] :] = -1, -1
    sides = torch.multinomial(prediction.size[0].exp().flatten(), count, replacement=True, generator=generator)
    heights, widths = sides // 30 + 1, sides % 30 + 1
    overlap = heights.clamp(max=target.shape[0]) * widths.clamp(max=target.shape[1])

    accuracy = cell_accuracy(grids, truth).mean()
    size_score = (overlap / (heights * widths + target.size - overlap)).mean()
    # The histogram is averaged first (the docstring's Jensen bound), so its agreement is that of the mean histogram.
    colour = 1 - 0.5 * (colour_histogram(grids).mean(0) - colour_histogram(truth)[0]).abs().sum()
    exact = expected_goal(prediction, colour_histogram(truth))
    assert float(exact) == pytest.approx(float(1.0 * accuracy + 0.5 * size_score + 0.5 * colour), abs=0.015)
    assert float(colour) > float(colour_agreement(grids, truth).mean()) - 1e-6


def test_a_sure_prediction_expects_what_it_gets() -> None:
    target, answer = grid("12", "34"), grid("123", "330")
    prediction = soft(target, 2, 3, torch.Generator().manual_seed(0))
    colour, size = torch.full((1, 16, 10), -torch.inf), torch.full((1, 30, 30), -torch.inf)
    size[0, 1, 2] = 0
    colour.view(4, 4, 10).scatter_(2, torch.from_numpy(np.pad(answer, ((0, 2), (0, 1))))[..., None], 0.0)
    prediction = dataclasses.replace(prediction, colour=colour, size=size)
    metrics = {"d_acc": cell_accuracy, "d_size": size_agreement, "d_color": colour_agreement}
    hard = sum(REWARD_WEIGHTS[name] * float(m(padded(answer), padded(target))) for name, m in metrics.items())
    assert float(expected_goal(prediction, colour_histogram(padded(target)))) == pytest.approx(hard)


def test_the_expected_reward_has_no_gradient_through_before() -> None:
    generator, target = torch.Generator().manual_seed(0), grid("12", "34")
    leaves, sides = [], []
    for _ in range(2):
        side = soft(target, 2, 2, generator)
        leaf = (side.colour.clone().requires_grad_(), side.size.clone().requires_grad_())
        leaves.append(leaf)
        sides.append(dataclasses.replace(side, colour=leaf[0], size=leaf[1]))
    reward = expected_reward(sides[0], sides[1], padded(target))
    goals = [expected_goal(side, colour_histogram(padded(target))) for side in sides]
    assert torch.equal(reward, goals[1] - goals[0])
    reward.sum().backward()
    assert all(leaf.grad is None for leaf in leaves[0])
    assert all(leaf.grad is not None and bool(leaf.grad.abs().sum() > 0) for leaf in leaves[1])
    assert expected_reward(sides[0], sides[0], padded(target)).tolist() == [0]


# --------------------------------------------------------------------------------------------------------------------
# the policy
# --------------------------------------------------------------------------------------------------------------------

G, K, D, A = 3, 2, 4, 16  # episodes, prompt vectors, their width, dimensions of an action


def make_feedback(seed: int = 0, pairs: float = 2.0, scale: float = 1.0) -> Feedback:
    gradient = torch.randn(G, K, D, generator=torch.Generator().manual_seed(seed)) * scale
    known = torch.full((G,), pairs)
    return Feedback(gradient, torch.ones(G), torch.full((G,), 0.5), torch.zeros(G), known)


def make_policy(seed: int = 0) -> PromptPolicy:
    torch.manual_seed(seed)
    return PromptPolicy(K, D)


def test_a_fresh_policy_steps_down_the_feedbacks_gradient() -> None:
    policy, feedback, prompt = make_policy(), make_feedback(), torch.randn(G, K, D)
    action = policy.refine_prompt(prompt, feedback)
    assert torch.equal(action.code, torch.zeros(G, A))  # the learned part starts at zero
    delta = action.prompt - prompt
    assert torch.equal(delta.sign(), -feedback.gradient.sign())
    huge = make_policy().refine_prompt(prompt, make_feedback(scale=1e4))
    assert torch.allclose(huge.prompt, action.prompt, atol=1e-6)  # only the direction and relative size count


def test_outliers_of_the_gradient_are_clipped() -> None:
    policy = PromptPolicy(4, 16)
    gradient = torch.ones(1, 4, 16)
    gradient[0, 1, 2] = -1e6
    feedback = Feedback(gradient, torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1))
    assert float(policy.normalised_gradient(feedback)[0, 1, 2]) == -3  # 8 root mean squares of its 64 dimensions


def test_tasks_step_alike_but_one_without_errors_stands_still() -> None:
    """However different their gradients are; and far below the running scale there is nothing left to mend."""
    policy, feedback = make_policy(), make_feedback()
    policy.observe(feedback)
    feedback.gradient *= torch.tensor([3.0, 1.0, 1e-4])[:, None, None]
    sizes = policy.normalised_gradient(feedback).square().mean((1, 2)).sqrt().tolist()
    assert 0.85 < sizes[1] < sizes[0] < 1 and sizes[2] < 2e-3


def test_without_feedback_a_fresh_policy_changes_nothing() -> None:
    policy, prompt = make_policy(), torch.randn(G, K, D)
    nothing = Feedback(torch.zeros(G, K, D), torch.zeros(G), torch.zeros(G), torch.zeros(G), torch.zeros(G))
    assert torch.equal(policy.refine_prompt(prompt, nothing).prompt, prompt)
    assert float(policy.gradient_square) == 0  # and it says nothing about the scale of gradients


def test_noise_moves_the_action_along_learned_directions() -> None:
    policy, feedback, prompt = make_policy().eval(), make_feedback(), torch.randn(G, K, D)
    policy.observe(feedback)
    mean = policy.refine_prompt(prompt, feedback)
    assert torch.equal(policy.refine_prompt(prompt, feedback, noise=torch.zeros(G, A)).prompt, mean.prompt)
    noise = torch.randn(G, A)
    sample = policy.refine_prompt(prompt, feedback, noise=noise)
    assert torch.allclose(sample.code, noise * policy.log_std.exp())
    moved = torch.einsum("ga,akd->gkd", sample.code, policy.directions)
    assert torch.allclose(sample.prompt - mean.prompt, moved, atol=1e-6)


def test_the_log_density_is_that_of_the_code_and_holds_it_fixed() -> None:
    policy, feedback, prompt = make_policy(), make_feedback(), torch.randn(G, K, D)
    torch.nn.init.normal_(policy.mean.weight, std=0.3)
    noise = torch.randn(G, A)
    action = policy.refine_prompt(prompt, feedback, noise=noise)
    std = policy.log_std.exp()
    expected = (-0.5 * noise.square() - std.log() - 0.5 * np.log(2 * np.pi)).sum(-1)
    assert torch.allclose(action.log_prob, expected, atol=1e-4)
    gradient = torch.autograd.grad(action.log_prob.sum(), policy.mean.bias)[0]
    assert torch.allclose(gradient, (noise / std).sum(0), atol=1e-3)  # reparameterised it would be zero


def test_gradient_reaches_the_policy_and_the_prompt_through_the_refined_prompt() -> None:
    policy, prompt = make_policy(), torch.randn(G, K, D, requires_grad=True)
    action = policy.refine_prompt(prompt, make_feedback(), noise=torch.randn(G, A))
    action.prompt.square().sum().backward()
    assert prompt.grad is not None and bool((prompt.grad != 0).any())
    for name in ("mean.weight", "mean.bias", "log_std", "directions", "log_step"):
        gradient = policy.get_parameter(name).grad
        assert gradient is not None and bool((gradient != 0).any()), name


def test_only_training_updates_the_scale_of_the_gradient() -> None:
    policy, prompt = make_policy(), torch.randn(G, K, D)
    policy.refine_prompt(prompt, make_feedback(0))
    first = float(policy.gradient_square)
    assert first == pytest.approx(float(make_feedback(0).gradient.square().mean()))  # taken whole
    policy.refine_prompt(prompt, make_feedback(1, scale=10), observe=False)
    policy.eval().refine_prompt(prompt, make_feedback(1, scale=10))
    assert float(policy.gradient_square) == first
    policy.train().refine_prompt(prompt, make_feedback(1, scale=10))
    second = float(make_feedback(1, scale=10).gradient.square().mean())
    assert float(policy.gradient_square) == pytest.approx(0.99 * first + 0.01 * second, rel=1e-5)
    spoiled = make_feedback(2)
    spoiled.gradient[0, 0, 0] = torch.inf
    before = float(policy.gradient_square)
    policy.observe(spoiled)
    assert float(policy.gradient_square) == before


def test_an_episode_has_the_mean_of_its_queries() -> None:
    means = mean_per_owner(torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([2, 0, 2, 2]), 4)
    assert means.tolist() == pytest.approx([0, 0, 2.5 / 3, 0])


# --------------------------------------------------------------------------------------------------------------------
# the score function
# --------------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 6).flatmap(lambda s: arrays(np.float32, (s, 3), elements=st.floats(-5, 5, width=32))))
def test_advantages_compare_each_sample_with_the_others(rewards: np.ndarray) -> None:
    advantages = leave_one_out_advantages(torch.from_numpy(rewards))
    for sample in range(len(rewards)):
        others = np.delete(rewards, sample, axis=0).mean(0)
        assert advantages[sample].tolist() == pytest.approx((rewards[sample] - others).tolist(), abs=1e-4)


def test_one_sample_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        leave_one_out_advantages(torch.zeros(1, 3))


@pytest.mark.parametrize("samples", [2, 4])
def test_the_estimator_is_unbiased(samples: int) -> None:
    """Bernoulli arms: the mean of the estimator over every outcome, weighted by its probability, is the gradient."""
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([5.0, 7.0], dtype=torch.float64)  # far from zero: a wrong baseline would show
    chance = torch.sigmoid(logit)
    exact = torch.autograd.grad(chance * rewards[1] + (1 - chance) * rewards[0], logit)[0]
    total = 0.0
    for outcome in range(2**samples):
        arms = torch.tensor([outcome >> bit & 1 for bit in range(samples)])
        chance = torch.sigmoid(logit)
        log_probs = torch.where(arms == 1, chance, 1 - chance).log()
        surrogate = score_function_objective(rewards[arms][:, None], log_probs[:, None])
        weight = log_probs.sum().exp().detach()
        total += float(weight * torch.autograd.grad(surrogate, logit)[0])
    assert total == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_score_function_solves_a_bandit(seed: int) -> None:
    """The reward is how far the refined prompt lies in a direction that the policy is not told."""
    policy, feedback, prompt = make_policy(seed), make_feedback(seed), torch.zeros(G, K, D)
    secret = torch.nn.functional.normalize(torch.randn(K * D), dim=0).view(K, D)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)

    def reward(refined: Tensor) -> Tensor:
        return (refined.detach() * secret).sum((1, 2))

    start = reward(policy.refine_prompt(prompt, feedback).prompt).mean()
    for _ in range(60):
        actions = [policy.refine_prompt(prompt, feedback, noise=torch.randn(G, A)) for _ in range(4)]
        rewards = torch.stack([reward(action.prompt) for action in actions])
        loss = -score_function_objective(rewards, torch.stack([action.log_prob for action in actions]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert reward(policy.refine_prompt(prompt, feedback).prompt).mean() > start + 1
