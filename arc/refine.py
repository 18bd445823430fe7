"""Choosing prompts at test time, by how they do on the task's demonstrations.

Nothing here knows a test output: what it is given are demonstration pairs as queries. How a step is made and how a
prompt is judged are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arc.agent import GridAgent
from arc.batches import QueryBatch

Context = Sequence[QueryBatch]
Act = Callable[[Tensor, Context], Tensor]  # prompts (P, K, D), pairs that give feedback -> the prompts a step further
Judge = Callable[[Tensor, Context], Tensor]  # prompts (P, K, D), pairs that try them -> (P,) losses


def best_first(prompts: Sequence[Tensor], pairs: Context, judge: Judge) -> Sequence[Tensor]:
    """Several prompts for each task, (G, K, D) each, in the order of their losses on the task's pairs; equals stay in
    theirs, and a loss that is not finite comes last. One alone is not judged."""
    if len(prompts) == 1:
        return prompts
    losses = torch.stack([judge(prompt, pairs) for prompt in prompts])  # (n, G)
    order = torch.where(losses.isfinite(), losses, torch.inf).argsort(dim=0, stable=True)
    return list(torch.stack(list(prompts))[order, torch.arange(order.shape[1], device=order.device)])


def farther(prompt: Tensor, pairs: Context, act: Act, judge: Judge, steps: int) -> Tensor:
    """prompt (G, K, D) after up to `steps` steps, each with the feedback of all pairs: for each task as many as do best
    on them, fewer at a tie. None is among them, so steps that do not help are not taken."""
    trail = [prompt]
    for _ in range(steps):
        trail.append(act(trail[-1], pairs))
    return best_first(trail, pairs, judge)[0]


@torch.no_grad()
def pairs_loss(agent: GridAgent, prompt: Tensor, pairs: Context) -> Tensor:
    """(P,) mean cross-entropy of a pair's cells under prompt (P, K, D), summed over each prompt's pairs."""
    total = torch.zeros(len(prompt), device=prompt.device)
    for query in pairs:
        total.index_add_(0, query.owner, agent(query, prompt).pair_loss(query))
    return total
