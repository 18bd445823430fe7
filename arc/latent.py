"""A learned vector for each training task, beside what Qwen reads of it (`--task_latent`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TaskLatent(nn.Module):
    """(count, K, D) latents, zero at the start, added to the prompts of the tasks that are trained on.

    All views of a task share one. In training an episode goes without it at random (`keep`), so that a prompt from the
    context alone stays usable: a task that was never trained on has no other.
    """

    def __init__(self, count: int, prompt_len: int, prompt_dim: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(count, prompt_len, prompt_dim))

    def forward(self, task: Tensor, keep: Tensor | None = None) -> Tensor:
        """(G, K, D) for task numbers (G,): zero for numbers that are none of the training tasks, and where `keep` (G,)
        is False."""
        known = (task >= 0) & (task < len(self.vectors))
        found = self.vectors[task.where(known, 0)] * known[:, None, None]
        return found if keep is None else found * keep[:, None, None]


def saved_latents(model: Mapping[str, Any]) -> int:
    """How many tasks a checkpoint's models have latents for: an evaluation has other tasks, but the same weights."""
    vectors = model.get("latent", {}).get("vectors")
    return len(vectors) if isinstance(vectors, Tensor) and vectors.dim() else 0
