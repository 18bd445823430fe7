"""Gradients against central differences along random directions: terms of the efe, the reward, the policy's estimator,
and the whole step where it is a plain function of the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallBuild, train_batches
from torch import Tensor

from arc.efe import ambiguity, prompt_consistency, risk, size_loss
from policy_refined import SoftPrediction, colour_histogram, expected_goal, score_function_objective
from trainloop_complete_with_fixes import normal_noise, train_step

Function = Callable[[Tensor], Tensor]


def slopes(function: Function, at: Tensor, step: float, seed: int) -> tuple[float, float]:
    """(by back-propagation, by differences) of a scalar function along a random direction of length 1."""
    generator = torch.Generator().manual_seed(seed)
    direction = F.normalize(torch.randn(at.numel(), generator=generator), dim=0).view_as(at)
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    with torch.no_grad():
        difference = function(at + step * direction).double() - function(at - step * direction).double()
    return float((gradient * direction).sum()), float(difference / (2 * step))


def same(found: tuple[float, float]) -> bool:
    return found[0] == pytest.approx(found[1], rel=0.01, abs=2e-5) and found[0] != 0


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


TARGET = torch.tensor([[0, 3, 9, -100, 1], [2, 2, -100, -100, 5]])
TASKS = torch.tensor([0, 0, 1, 2, 1])
GRID = torch.full((2, 30, 30), -1)
GRID[0, :1, :4] = torch.tensor([0, 3, 9, 1])
GRID[1, :3, :1] = torch.tensor([2, 2, 5])[:, None]
SIZES = torch.tensor([[1, 4], [3, 1]])


def goal(colour: Tensor, size: Tensor) -> Tensor:
    inside = torch.tensor([[True, True, False, False, True], [True, True, True, False, True]])
    soft = SoftPrediction(
        colour=colour.log_softmax(-1),
        size=size.flatten(1).log_softmax(-1).view_as(size),
        inside=inside,
        target=TARGET,
        target_size=SIZES,
        area=torch.tensor([3, 4]),
    )
    return expected_goal(soft, colour_histogram(GRID)).sum()


TERMS: dict[str, tuple[Function, Tensor]] = {
    "risk": (lambda x: risk([x, 2 * x], TARGET, drawn(2, 5).abs(), drawn(2).abs()), drawn(2, 5, 10)),
    "ambiguity": (lambda x: ambiguity(x, TARGET), drawn(2, 5, 10)),
    "size": (lambda x: size_loss(x, SIZES), drawn(2, 30, 30)),
    "prompt": (lambda x: prompt_consistency(x, TASKS), drawn(5, 2, 4)),
    "prompt, old": (lambda x: prompt_consistency(x, TASKS, reversed_sign=True), drawn(5, 2, 4)),
    "reward by colours": (lambda x: goal(x, drawn(2, 30, 30)), drawn(2, 5, 10)),
    "reward by sizes": (lambda x: goal(drawn(2, 5, 10), x), 3 * drawn(2, 30, 30)),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_the_terms(name: str, seed: int) -> None:
    function, at = TERMS[name]
    assert same(slopes(function, at, 1e-2, seed))


def test_the_estimator_climbs_the_expected_reward() -> None:
    """The score function's gradient for the mean of a Gaussian policy, by differences of the mean reward over the same
    noise."""
    noise = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, std = torch.tensor([0.3, -0.5], dtype=torch.float64), 0.4

    def reward(code: Tensor) -> Tensor:
        return (code[..., 0] > 0).double() + 0.5 * torch.sin(3 * code[..., 1])  # with a jump, as hard rewards have

    leaf = mean.clone().requires_grad_()
    code = mean + std * noise
    log_prob = torch.distributions.Normal(leaf, std).log_prob(code).sum(-1)
    score_function_objective(reward(code)[:, None], log_prob[:, None]).backward()
    assert leaf.grad is not None
    for axis in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[axis] = 0.05
        difference = (reward(code + step).mean() - reward(code - step).mean()) / 0.1
        assert float(leaf.grad[axis]) == pytest.approx(float(difference), abs=0.01)


@pytest.mark.parametrize("module", ["agent", "qwen"])
def test_the_step_as_a_whole(module: str, small_build: SmallBuild) -> None:
    """Without what is held fixed on purpose (masks, feedback, the vote that a cell is told of, what the memory takes
    in, the prediction that a reward starts from) the loss is a function of the weights, and the step's gradient is its
    slope."""
    run = small_build(
        *"--no_policy --no_memory --no_evidence --ablate 2,3".split(),
        *"--grid_focus 0 --keep_solved 0 --optimizer adamw".split(),
    )
    (batch,) = train_batches(run, 1)
    weights = [p for p in run.modules[module].parameters() if p.requires_grad]
    with torch.no_grad():  # away from where all begins: many weights are 0 there, and their slopes too
        for weight in (p for each in run.modules.values() for p in each.parameters()):
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    noise = normal_noise((run.args.policy_samples, len(batch.task), run.policy.log_std.numel()), 0, 0, 0)

    def loss() -> float:
        return float(train_step(run, batch, noise, 1).measured["loss"].double())

    loss()
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
    length = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    step = 5e-4 / length
    found = []
    with torch.no_grad():
        before = [w.clone() for w in weights]
        for sign in (1, -1):
            for weight, old, gradient in zip(weights, before, gradients, strict=True):
                weight.copy_(old + sign * step * gradient)
            with torch.enable_grad():
                found.append(loss())
    assert length > 0 and (found[0] - found[1]) / (2 * 5e-4) == pytest.approx(length, rel=0.03)
