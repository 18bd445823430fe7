"""Memory bank: refined prompts that solved their task, found again by the likeness of tasks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """At most `capacity` entries, one (the best) for each task; key: Qwen's embedding of the task's context, value: the
    refined prompt (K, D).

    The bank is read when a prompt is built, so storing has a consequence. A task never reads its own entry: that was
    made from all of its demonstrations, the one held out as the query included, which no prompt of a new task can be.
    Entries hold nothing of any test pair; they are offered during training on demonstration pairs only.
    """

    def __init__(self, capacity: int, key_dim: int, prompt_len: int, prompt_dim: int, *, neighbours: int = 4) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.gate = nn.Parameter(torch.tensor(0.1))  # how much of what is remembered enters a prompt; learned
        self.register_buffer("keys", torch.zeros(capacity, key_dim))
        self.register_buffer("values", torch.zeros(capacity, prompt_len, prompt_dim))
        self.register_buffer("task", torch.full((capacity,), -1, dtype=torch.long))  # -1: free
        self.register_buffer("accuracy", torch.zeros(capacity))
        self.register_buffer("stored_at", torch.zeros(capacity, dtype=torch.long))
        self.keys: Tensor
        self.values: Tensor
        self.task: Tensor
        self.accuracy: Tensor
        self.stored_at: Tensor

    def __len__(self) -> int:
        return int((self.task >= 0).sum())

    def read(self, key: Tensor, task: Tensor) -> Tensor:
        """What is remembered for embeddings key (G, E) of tasks (G,): (G, K, D), zero while the bank is empty.

        The mean of the nearest entries' prompts, weighted by a softmax over cosine likeness (temperature 0.1), times a
        learned gate; gradient flows into the gate and, through the weights, into the keys of the readers.
        """
        with torch.autocast(key.device.type, enabled=False):  # a likeness over 0.1 does not fit fp16's range
            likeness = F.normalize(key.float(), dim=-1) @ F.normalize(self.keys, dim=-1).T  # (G, capacity)
            hidden = (self.task < 0) | (self.task == task[:, None])
            likeness = likeness.masked_fill(hidden, -torch.inf)
            best, place = likeness.topk(min(self.neighbours, likeness.shape[1]), dim=-1)  # (G, n)
            found = torch.isfinite(best)
            weights = (best.masked_fill(~found, -1e4) / 0.1).softmax(-1) * found
            return self.gate * torch.einsum("gn,gnkd->gkd", weights, self.values[place])

    @torch.no_grad()
    def offer(self, key: Tensor, value: Tensor, task: int, accuracy: float, threshold: float, step: int) -> bool:
        """Store (key (E,), value (K, D)) of `task` if accuracy beats the threshold and the task's own entry.

        An equally good entry replaces an older one of the same task: prompts age as the agent moves on. A full bank
        gives up its least accurate, oldest entry, if that is no better. A prompt that is not finite is never stored: it
        would spread to other tasks. Returns whether it was stored.
        """
        if not accuracy > threshold or not bool(torch.isfinite(value).all()):
            return False
        own = torch.nonzero(self.task == task).flatten()
        free = torch.nonzero(self.task < 0).flatten()
        if len(own):
            place = int(own[0])
        elif len(free):
            place = int(free[0])
        else:
            worst = torch.nonzero(self.accuracy == self.accuracy.min()).flatten()
            place = int(worst[self.stored_at[worst].argmin()])
        if self.task[place] >= 0 and float(self.accuracy[place]) > accuracy:
            return False
        self.keys[place], self.values[place] = key.float(), value.float()
        self.task[place], self.accuracy[place], self.stored_at[place] = task, accuracy, step
        return True

    def offer_batch(
        self, keys: Tensor, values: Tensor, tasks: Tensor, accuracies: Tensor, threshold: float, step: int
    ) -> int:
        """`offer` for each episode of a batch: keys (G, E), values (G, K, D), tasks (G,), accuracies (G,). Returns how
        many were stored."""
        stored = 0
        for index, (task, accuracy) in enumerate(zip(tasks.tolist(), accuracies.tolist(), strict=True)):
            stored += self.offer(keys[index].detach(), values[index].detach(), task, accuracy, threshold, step)
        return stored
