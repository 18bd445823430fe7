"""Expected free energy of a prediction: the supervised part of the loss, as named terms.

Active inference scores a policy by risk + ambiguity - information gain (Friston et al. 2015, "Active inference and
epistemic value"; Parr, Pezzulo & Friston 2022, eq. 4.7-4.10). Here the preferred outcome is the target grid;
information gain has no counterpart in a trainer that sees the outcome, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arc.agent import AgentOutput
from arc.batches import QueryBatch

TERMS = ("risk", "ambiguity", "size", "reversibility", "prompt")


@dataclass(frozen=True)
class EfeWeights:
    """Weight of each term in `total`; `size` is multiplied by the curriculum's weight on top (fix 4)."""

    risk: float = 1.0
    ambiguity: float = 0.01
    size: float = 0.1
    reversibility: float = 0.05
    prompt: float = 0.01


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, cell_weight: Tensor, grid_weight: Tensor | None = None
) -> Tensor:
    """Mean over grids of sum_cells(w * CE) / sum_cells(w), each grid weighing `grid_weight` (B,) (None: all alike).

    logits (B, L, 10), target (B, L) with negatives where there is nothing to predict, cell_weight (B, L) >= 0. A grid
    without a target cell, or with no weight at all, counts 0 (never NaN).
    """
    wanted = target >= 0
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.clamp(min=0).flatten(), reduction="none")
    weight = cell_weight * wanted
    per_grid = (loss.view_as(weight) * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
    if grid_weight is None:
        return per_grid.mean()
    return (per_grid * grid_weight).sum() / grid_weight.sum().clamp(min=1e-30)


def risk(
    colour_logits: Sequence[Tensor], target: Tensor, cell_weight: Tensor, grid_weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the predicted grid against the preferred outcome, on output cells only, averaged over the
    agent's passes (each pass is supervised). Equals KL[target || prediction] since the target is a point mass."""
    passes = [weighted_cross_entropy(logits, target, cell_weight, grid_weight) for logits in colour_logits]
    return torch.stack(passes).mean()


def ambiguity(logits: Tensor, target: Tensor) -> Tensor:
    """Expected entropy H[p(cell)] in nats over the output cells of logits (B, L, 10)."""
    wanted = (target >= 0).float()
    log_p = F.log_softmax(logits.float(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (entropy * wanted).sum() / wanted.sum().clamp(min=1)


def size_loss(size_logits: Tensor, target_size: Tensor) -> Tensor:
    """Cross-entropy of the output size; size_logits (B, 30, 30), heights by widths, target_size (B, 2) in 1..30."""
    height, width = target_size.unbind(-1)
    return F.cross_entropy(size_logits.float().flatten(1), (height - 1) * size_logits.shape[-1] + width - 1)


def prompt_consistency(prompts: Tensor, task: Tensor, *, reversed_sign: bool = False) -> Tensor:
    """Keeps prompts of one task together and those of different tasks apart, as a loss in [0, 3].

    prompts (N, K, D), task (N,). Together: mean of 1 - cos over pairs of the same task, 0 when identical. Apart: mean
    of relu(cos) over pairs of different tasks: orthogonal is far enough. reversed_sign=True is the seed's old, wrong
    term (fix 6, for --ablate 6): it *adds* the cosine of prompts of one task, which is smallest when they are opposite.
    """
    if len(prompts) < 2:
        return prompts.new_zeros(())
    unit = F.normalize(prompts.float().flatten(1), dim=-1)
    with torch.autocast(unit.device.type, enabled=False):  # in half precision 1 - cos of near ones is 0
        cosine = unit @ unit.T
    same = task[:, None] == task[None, :]
    other = ~same
    same = same & ~torch.eye(len(task), dtype=torch.bool, device=task.device)
    together = cosine if reversed_sign else 1 - cosine
    together = (together * same).sum() / same.sum().clamp(min=1)
    apart = (F.relu(cosine) * other).sum() / other.sum().clamp(min=1)
    return together + apart


@dataclass(frozen=True)
class Weights:
    """Of one pass's queries in the risk: cell (B, L), grid (B,); ratio (B,) in [0, 1]: share of target cells that are
    wrong."""

    cell: Tensor
    grid: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class Pass:
    """One prediction of the step: B queries, the agent's output for them, their weights in the risk."""

    query: QueryBatch
    output: AgentOutput
    weights: Weights


Portion = Callable[[Tensor | float], Tensor | float]


def terms(
    passes: Sequence[Pass], shares: Sequence[float], asked: QueryBatch, back: AgentOutput | None, portion: Portion
) -> dict[str, Tensor]:
    """All terms but that of the prompts, over the passes (before and after; one where nothing is refined): the agent is
    trained on both, otherwise "before" would be an untrained straw man and the reward would prove nothing. shares: of
    the passes in a term, those of their queries, so that every prediction counts alike: "after" is made of few queries,
    and with half of the loss on these the agent would learn less from the others than one without a policy does.
    back: the agent's output for the queries `asked` the way back; None where it weighs nothing. portion: what means
    over the grids, cells or queries here contribute to those over the whole batch (`arc.parallel.Team`)."""
    found: dict[str, list[Tensor]] = {"risk": [], "ambiguity": [], "size": []}
    for p, share in zip(passes, shares, strict=True):
        logits, target = p.output.colour_logits, p.query.target
        of_grids, of_cells = portion(p.weights.grid.sum()), portion((target >= 0).sum())
        found["risk"].append(risk(logits, target, p.weights.cell, p.weights.grid) * of_grids * share)
        found["ambiguity"].append(ambiguity(logits[-1], target) * of_cells * share)
        found["size"].append(size_loss(p.output.size_logits, p.query.target_size) * portion(len(p.query)) * share)
    means = {name: torch.stack(values).sum() for name, values in found.items()}
    if back is None:
        return {**means, "reversibility": torch.zeros_like(means["risk"])}
    wanted = (asked.target >= 0).float()
    reverse = risk(back.colour_logits, asked.target, wanted) * portion(len(asked))
    return {**means, "reversibility": reverse}


def combine(terms: Mapping[str, Tensor], weights: EfeWeights, size_weight: float) -> dict[str, Tensor]:
    """The terms with their weighted sum under "total". size_weight: the curriculum's weight of the size term."""
    total = torch.stack(
        [getattr(weights, name) * (size_weight if name == "size" else 1.0) * terms[name] for name in TERMS]
    ).sum()
    return {**terms, "total": total}
