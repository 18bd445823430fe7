"""The prompt policy and what it is paid for.

Signs are decided here and nowhere else: every delta is *after - before*, a reward is better when higher, and the
training loss negates it once (`0.7 * efe + 0.3 * (-reward_objective)`).

Grids are (B, 30, 30) integer tensors holding -1 outside the grid, so a grid carries its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # the agent is called, not known
    from arc.agent import GridAgent
    from arc.batches import QueryBatch

REWARD_WEIGHTS = {"d_acc": 1.0, "d_size": 0.5, "d_color": 0.5, "d_rev": 0.5}
NUM_COLOURS = 10
GRADIENT_FLOOR = 0.1  # of the running scale: a task whose gradient is far below it hardly steps


# --------------------------------------------------------------------------------------------------------------------
# goal metrics, all in [0, 1], defined for any two sizes
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Prediction:
    """grid (B, 30, 30): the predicted output; reverse (B, 30, 30): the input predicted back from it."""

    grid: Tensor
    reverse: Tensor


def union_cells(a: Tensor, b: Tensor) -> Tensor:
    """(B,) cells of the union of the rectangles of `a` and `b`, both anchored at the top left corner; at least 1."""
    return ((a >= 0) | (b >= 0)).flatten(1).sum(1).clamp(min=1)


def cell_accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) in [0, 1]: matching cells on the overlap / cells of the union of the rectangles; a wrong size always
    costs."""
    matching = ((prediction == target) & (target >= 0)).flatten(1).sum(1)
    return matching / union_cells(prediction, target)


def size_agreement(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) in [0, 1]: intersection over union of the rectangles."""
    overlap = ((prediction >= 0) & (target >= 0)).flatten(1).sum(1)
    return overlap / union_cells(prediction, target)


def colour_histogram(grid: Tensor) -> Tensor:
    """(B, 10) share of each colour; all zero for an empty grid."""
    places = grid.flatten(1) + 1  # what is outside is counted first, and left out
    ones = torch.ones((), device=grid.device).expand_as(places)
    counts = torch.zeros(len(grid), 1 + NUM_COLOURS, device=grid.device).scatter_add(1, places.long(), ones)[:, 1:]
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def colour_agreement(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) in [0, 1]: 1 - half the L1 distance of the normalised colour histograms."""
    return 1 - 0.5 * (colour_histogram(prediction) - colour_histogram(target)).abs().sum(1)


def exact_match(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) bool: same size and same cells."""
    return (prediction == target).flatten(1).all(1)


def compute_reward(
    pred_before: Prediction, pred_after: Prediction, target: Tensor, inp: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hard reward of a refinement, the printed `Reward`: 1.0 d_acc + 0.5 d_size + 0.5 d_color + 0.5 d_rev.

    target, inp: (B, 30, 30). Every delta is after - before of a metric in [0, 1] (module's definitions; rev is the cell
    accuracy of the input predicted back), so the reward lies in [-2.5, 2.5] and is exactly 0 for identical predictions.
    At the right size, correcting k of n cells raises it by at least k / 2n; at a wrong size d_color, which compares
    shares of colours, can outweigh a corrected cell, and correcting the size never lowers it.
    Returns (B,) float32 and the four (B,) deltas by name. Constant to autograd: it comes from argmax predictions.
    """
    breakdown = {
        "d_acc": cell_accuracy(pred_after.grid, target) - cell_accuracy(pred_before.grid, target),
        "d_size": size_agreement(pred_after.grid, target) - size_agreement(pred_before.grid, target),
        "d_color": colour_agreement(pred_after.grid, target) - colour_agreement(pred_before.grid, target),
        "d_rev": cell_accuracy(pred_after.reverse, inp) - cell_accuracy(pred_before.reverse, inp),
    }
    reward = torch.stack([REWARD_WEIGHTS[name] * delta for name, delta in breakdown.items()]).sum(0)
    return reward, breakdown


# --------------------------------------------------------------------------------------------------------------------
# the differentiable counterpart
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class SoftPrediction:
    """What the expected reward needs of an agent's output for B queries of L tokens.

    colour (B, L, 10) and size (B, 30, 30): log-probabilities. inside (B, L) bool: token is part of the predicted grid.
    target (B, L) int64, negative where a token is outside the target; target_size (B, 2). area (B,): cells of the
    predicted grid.
    """

    colour: Tensor
    size: Tensor
    inside: Tensor
    target: Tensor
    target_size: Tensor
    area: Tensor


def expected_goal(prediction: SoftPrediction, target_histogram: Tensor) -> Tensor:
    """(B,) expected 1.0 acc + 0.5 size + 0.5 color under the agent's predictive distribution; differentiable.

    - acc: E[matching cells] = sum over cells on the overlap of p(target colour), by linearity of expectation, divided
    by the union of the rectangles at the predicted (most probable) size.
    - size: sum over heights and widths of P(h, w) IoU((h, w), target size).
    - color: 1 - half the L1 distance of the *expected* colour histogram from the target's (an upper bound of the
    expected agreement, by Jensen's inequality).
    The reversibility of the hard reward has no cheap expectation (it needs the agent run on a sampled grid) and is
    trained by the efe's own reversibility term. target_histogram: (B, 10).
    """
    overlap = prediction.inside & (prediction.target >= 0)
    probability = prediction.colour.exp()
    hit = probability.gather(-1, prediction.target.clamp(min=0)[..., None])[..., 0]
    target_area = prediction.target_size.prod(1)
    union = (prediction.area + target_area - overlap.sum(1)).clamp(min=1)
    accuracy = (hit * overlap).sum(1) / union

    sides = torch.arange(1, prediction.size.shape[-1] + 1, device=hit.device)
    smaller = torch.minimum(sides, prediction.target_size[..., None])  # (B, 2, 30)
    intersection = smaller[:, 0, :, None] * smaller[:, 1, None, :]  # (B, 30, 30)
    area = sides[:, None] * sides[None, :] + target_area[:, None, None] - intersection
    size = (prediction.size.exp() * intersection / area).flatten(1).sum(1)

    histogram = (probability * prediction.inside[..., None]).sum(1) / prediction.area.clamp(min=1)[:, None]
    colour = 1 - 0.5 * (histogram - target_histogram).abs().sum(1)
    return REWARD_WEIGHTS["d_acc"] * accuracy + REWARD_WEIGHTS["d_size"] * size + REWARD_WEIGHTS["d_color"] * colour


def expected_reward(before: SoftPrediction, after: SoftPrediction, target: Tensor) -> Tensor:
    """(B,) expected goal after - before, the `reward_objective` of `--policy_objective expected`.

    "before" is detached: otherwise the agent gains by weakening the prediction it starts from. target: (B, 30, 30).
    """
    histogram = colour_histogram(target)
    return expected_goal(after, histogram) - expected_goal(before, histogram).detach()


# --------------------------------------------------------------------------------------------------------------------
# the policy
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Feedback:
    """How the agent does on the context pairs under the unrefined prompt; known at test time too.

    gradient (G, K, D): of the mean context loss with respect to the prompt. loss, accuracy, exact: (G,) means over the
    context pairs; pairs (G,): how many there were (0: everything else is 0 too).
    """

    gradient: Tensor
    loss: Tensor
    accuracy: Tensor
    exact: Tensor
    pairs: Tensor


@dataclass
class Action:
    """prompt (G, K, D): the refined prompt. code (G, A): the low-dimensional action taken. log_prob (G,): its
    log-density, differentiable with respect to the policy, the code itself held fixed."""

    prompt: Tensor
    code: Tensor
    log_prob: Tensor


class PromptPolicy(nn.Module):
    """Gaussian policy over a low-dimensional prompt change, on top of a learned gradient step.

    delta = -step * g + U z,  z ~ Normal(mu(feedback, prompt), sigma).
    g is the feedback's gradient, normalised for each task and clipped; step is learned per prompt vector; U
    (A directions of the whole prompt) and mu are learned, mu starting at zero. The gradient step is what feedback-free
    refinement lacks (LPN, arXiv:2411.08706: gradient search 15.5 %, random search 10.75 %); few dimensions are what a
    score function can learn in a short run.
    """

    def __init__(self, prompt_len: int, prompt_dim: int, *, action_dim: int = 16, hidden: int = 128) -> None:
        super().__init__()
        features = 2 * prompt_len * prompt_dim + 4
        self.trunk = nn.Sequential(nn.Linear(features, hidden), nn.SiLU())
        self.mean = nn.Linear(hidden, action_dim)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        self.log_std = nn.Parameter(torch.full((action_dim,), -1.5))
        self.directions = nn.Parameter(torch.randn(action_dim, prompt_len, prompt_dim) * action_dim**-0.5 * 0.5)
        self.log_step = nn.Parameter(torch.full((prompt_len, 1), -1.6))
        self.register_buffer("gradient_square", torch.zeros(()))  # running mean square of the feedback's gradient
        self.gradient_square: Tensor
        self.total: Callable[[Tensor], Tensor] = torch.clone  # of a tensor over all processes; one alone has its own

    def refine_prompt(
        self, prompt: Tensor, feedback: Feedback, *, noise: Tensor | None = None, observe: bool | None = None
    ) -> Action:
        """Refined prompts of prompt (G, K, D). noise (G, A), standard normal: sample the action; None: take the mean.
        observe: whether this feedback enters the running scale of the gradient (by default: while training).

        The code is reparameterised (mu + sigma * noise), so gradient reaches mu and sigma through the refined prompt;
        `log_prob` treats it as fixed, which is what a score function needs (a reparameterised sample's log-density has
        no gradient for mu).
        """
        if self.training if observe is None else observe:
            self.observe(feedback)
        gradient = self.normalised_gradient(feedback)
        state = torch.stack((feedback.loss, feedback.accuracy, feedback.exact, feedback.pairs.clamp(max=4) / 4), -1)
        features = torch.cat((F.rms_norm(prompt.float(), prompt.shape[-1:]).flatten(1), gradient.flatten(1), state), -1)
        mean = self.mean(self.trunk(features)).float()
        std = self.log_std.clamp(-5, 0).exp()
        code = mean if noise is None else mean + std * noise
        # Unvalidated: a non-finite mean must reach the guarded optimizer step, which skips and counts it.
        density = torch.distributions.Normal(mean, std.expand_as(mean), validate_args=False)
        delta = torch.einsum("ga,akd->gkd", code, self.directions) - self.log_step.exp() * gradient
        return Action(prompt + delta, code, density.log_prob(code.detach()).sum(-1))

    def normalised_gradient(self, feedback: Feedback) -> Tensor:
        """(G, K, D): each task's gradient over (its own root mean square + GRADIENT_FLOOR times the running one over
        tasks), clipped to +-3; zero for a task without feedback.

        Gradients of different tasks differ by factors of hundreds. Over the running scale alone half of the tasks had
        a gradient below 0.17 (measured on a trained run), which moves nothing; over their own alone a task whose
        context is solved would step as far as any, on rounding noise.
        """
        own = feedback.gradient.square().mean((1, 2), keepdim=True).sqrt()
        scale = own + GRADIENT_FLOOR * self.gradient_square.sqrt() + 1e-12
        gradient = (feedback.gradient / scale).clamp(-3, 3)
        return torch.where((feedback.pairs > 0)[:, None, None], gradient, torch.zeros_like(gradient))

    @torch.no_grad()
    def observe(self, feedback: Feedback) -> None:
        """Update the running mean square of the gradient over the tasks with feedback, those of all processes (decay
        0.99; the first observation is taken whole, one that is not finite not at all)."""
        told = feedback.pairs > 0
        squares = feedback.gradient.square().mean((1, 2)).where(told, 0.0)
        square, count = self.total(torch.stack((squares.sum(), told.sum().float()))).unbind()
        square = square / count.clamp(min=1)
        decay = torch.where(self.gradient_square > 0, 0.99, 0.0)
        updated = decay * self.gradient_square + (1 - decay) * square
        counts = torch.isfinite(square) & (count > 0)
        self.gradient_square.copy_(torch.where(counts, updated, self.gradient_square))


def context_feedback(agent: GridAgent, context: Sequence[QueryBatch], prompt: Tensor) -> Feedback:
    """How the agent does on the context pairs under prompt (G, K, D), and which way the prompt should move.

    The gradient is that of the mean cross-entropy over a task's context pairs. Nothing is back-propagated through the
    feedback.
    """
    pairs, loss, accuracy, exact = torch.zeros(4, len(prompt), device=prompt.device)
    gradient = torch.zeros_like(prompt, dtype=torch.float32)
    for query in context:
        pairs.index_add_(0, query.owner, torch.ones_like(query.owner, dtype=torch.float32))
    for query in context:  # batches of similar size, each with a graph of its own
        with torch.enable_grad():
            leaf = prompt.detach().float().requires_grad_()
            output = agent(query, leaf, held=True)
            losses = output.pair_loss(query) / pairs[query.owner]
            gradient += torch.autograd.grad(losses.sum(), leaf)[0]
        with torch.no_grad():
            grid = output.predicted_grid(query)
            loss.index_add_(0, query.owner, losses.detach())
            accuracy.index_add_(0, query.owner, cell_accuracy(grid, query.target_grid) / pairs[query.owner])
            exact.index_add_(0, query.owner, exact_match(grid, query.target_grid) / pairs[query.owner])
    return Feedback(gradient, loss, accuracy, exact, pairs)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """(S, G) rewards of S >= 2 sampled actions -> advantages A_i = r_i - mean of the others' (RLOO, unbiased: Kool et
    al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!")."""
    samples = rewards.shape[0]
    if samples < 2:
        raise ValueError(f"leave-one-out advantages need at least 2 samples, got {samples}")
    return (rewards - rewards.mean(0, keepdim=True)) * samples / (samples - 1)


def score_function_objective(rewards: Tensor, log_probs: Tensor) -> Tensor:
    """Scalar to be maximised: mean of advantage * log-probability, both (S, G); its gradient with respect to the
    policy is an unbiased estimate of the gradient of the expected reward (REINFORCE, Williams 1992, with the RLOO
    baseline)."""
    return (leave_one_out_advantages(rewards).detach() * log_probs).mean()


def sampled_objective(
    policy: PromptPolicy,
    agent: GridAgent,
    query: QueryBatch,
    prompt: Tensor,
    feedback: Feedback,
    before: Prediction,
    noise: Tensor,
) -> Tensor:
    """`--policy_objective rloo`, (): hard rewards of actions on prompt (G, K, D) sampled with noise (S, G, A),
    leave-one-out advantages, score function."""
    rewards, log_probs = [], []
    for sample in noise:
        action = policy.refine_prompt(prompt.detach(), feedback, noise=sample, observe=False)
        with torch.no_grad():
            grid = agent(query, action.prompt).predicted_grid(query)
            # The way back is left out of the sampled rewards (two more passes a sample); the printed reward has it.
            reward, _ = compute_reward(before, Prediction(grid, before.reverse), query.target_grid, query.input_grid)
        rewards.append(mean_per_owner(reward, query.owner, len(prompt)))
        log_probs.append(action.log_prob)
    return score_function_objective(torch.stack(rewards), torch.stack(log_probs))


def mean_per_owner(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    """(B,) values of queries -> (G,) means of each episode's."""
    nothing = torch.zeros(groups, device=values.device)
    total, count = (nothing.index_add(0, owner, each) for each in (values.float(), torch.ones_like(values).float()))
    return total / count.clamp(min=1)
