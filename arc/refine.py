"""Choosing prompts at test time: by how they do on the task's demonstrations, and, where refinement may take several
steps, their number by demonstrations that the steps did not see.

Nothing here knows a test output: what it is given are demonstration pairs as queries. How a step is made and how a
prompt is judged are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arc.agent import GridAgent
from arc.batches import Folds, QueryBatch

Context = Sequence[QueryBatch]
Act = Callable[[Tensor, Context], Tensor]  # prompts (P, K, D), pairs that give feedback -> the prompts a step further
Judge = Callable[[Tensor, Context], Tensor]  # prompts (P, K, D), pairs that try them -> (P,) losses


@dataclass
class Refinement:
    """prompt (G, K, D): the chosen ones. steps (G,) int64: how many steps each one took, 0 where none helped. held_out
    (S + 1, G): mean loss after 0..S steps of the demonstrations that the steps did not see; NaN for a task without."""

    prompt: Tensor
    steps: Tensor
    held_out: Tensor


def cross_fitted(prompt: Tensor, context: Context, folds: Folds, act: Act, judge: Judge, steps: int) -> Refinement:
    """Refine prompt (G, K, D) by the number of steps, 0 to `steps`, that does best on held-out demonstrations.

    Early stopping by cross-validation. Each fold holds one demonstration out as if it were the test pair: the prompt is
    refined with the feedback of others, whose evidence does not hold its output, and judged by it after each step. A
    task takes the number of steps with the smallest mean loss over its folds (the smaller number at a tie; 0 is among
    them, so a refinement that does not help on the context is dropped) with the feedback that it has as a whole. A task
    with a single demonstration has nothing to be judged by and takes one step. `steps` >= 1.
    """
    groups, everyone = len(prompt), torch.arange(len(prompt), device=prompt.device)
    trial = prompt[folds.task]  # (P, K, D)
    losses = [judge(trial, folds.judge)]
    for _ in range(steps):
        trial = act(trial, folds.learn)
        losses.append(judge(trial, folds.judge))
    count = torch.bincount(folds.task, minlength=groups)
    total = torch.zeros(steps + 1, groups, device=prompt.device).index_add(1, folds.task, torch.stack(losses))
    held_out = total / count  # (S + 1, G), 0 / 0 = NaN for a task without a fold
    # A loss that is not finite is never the best one, and the unrefined prompt stands where none is finite.
    finite = torch.where(held_out.isfinite(), held_out, torch.inf)
    best = torch.where(count > 0, finite.argmin(0), 1)
    trail = [prompt]
    for _ in range(int(best.max())):
        trail.append(act(trail[-1], context))
    return Refinement(torch.stack(trail)[best, everyone], best, held_out)


def best_first(prompts: Sequence[Tensor], pairs: Context, judge: Judge) -> Sequence[Tensor]:
    """Several prompts for each task, (G, K, D) each, in the order of their losses on the task's pairs; equals stay in
    theirs, and a loss that is not finite comes last. One alone is not judged."""
    if len(prompts) == 1:
        return prompts
    losses = torch.stack([judge(prompt, pairs) for prompt in prompts])  # (n, G)
    order = torch.where(losses.isfinite(), losses, torch.inf).argsort(dim=0, stable=True)
    return list(torch.stack(list(prompts))[order, torch.arange(order.shape[1], device=order.device)])


@torch.no_grad()
def pairs_loss(agent: GridAgent, prompt: Tensor, pairs: Context) -> Tensor:
    """(P,) mean cross-entropy of a pair's cells under prompt (P, K, D), summed over each prompt's pairs."""
    total = torch.zeros(len(prompt), device=prompt.device)
    for query in pairs:
        total.index_add_(0, query.owner, agent(query, prompt).pair_loss(query))
    return total
