"""Memory bank: refined prompts of episodes that were solved, or partly, found again by the likeness of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc.run.host import to_host


@dataclass(frozen=True)
class Offers:
    """What a batch's G episodes offer to the bank, still on the device: keys (G, E), values (G, K, D), tasks (G,) and
    accuracies (G,), NaN where a value is not finite."""

    keys: Tensor
    values: Tensor
    tasks: Tensor
    accuracies: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, tasks: Tensor, accuracies: Tensor) -> Offers:
        finite = torch.isfinite(values).flatten(1).all(1)
        return cls(keys.detach(), values.detach(), tasks, torch.where(finite, accuracies, torch.nan))


class MemoryBank(nn.Module):
    """At most `capacity` entries, one (the best) for each task; key: Qwen's embedding of the task's context, value: the
    refined prompt (K, D). Its accuracy is the share of the episode's queries that were right: under this prompt those
    that were refined, under the one it was made from the others, as in training no more is known.

    What is stored is tried on the demonstrations of a task whose test pairs are predicted, beside the prompt that Qwen
    reads from them. Mixed into prompts, by a learned share and in training too, it was worth nothing
    (benchmarks/RESULTS.md). Entries hold nothing of any test pair; they are offered during training on demonstration
    pairs only, so there a task may find its own entry again.
    """

    def __init__(self, capacity: int, key_dim: int, prompt_len: int, prompt_dim: int) -> None:
        super().__init__()
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
        self._known: list[Tensor] = []
        self.register_load_state_dict_post_hook(lambda bank, _: bank.forget())

    def __len__(self) -> int:
        return int((self._columns()[0] >= 0).sum())

    def forget(self) -> None:
        """Look at the columns again: they were loaded."""
        self._known = []

    def _columns(self) -> list[Tensor]:
        """task, accuracy and stored_at in the host's memory, where offers are judged: on a GPU every look at a number
        is a wait."""
        self._known = self._known or to_host([self.task, self.accuracy, self.stored_at])
        return self._known

    def recall(self, key: Tensor, count: int) -> Tensor:
        """(n, G, K, D): the prompts of the n entries that are most like the contexts embedded as key (G, E), the most
        like one first; n is `count`, or all that there are."""
        with torch.autocast(key.device.type, enabled=False):
            likeness = F.normalize(key.float(), dim=-1) @ F.normalize(self.keys, dim=-1).T  # (G, capacity)
            nearest = likeness.masked_fill(self.task < 0, -torch.inf).topk(min(count, len(self)), dim=-1).indices
            return self.values[nearest.T]

    @torch.no_grad()
    def take(self, offers: Offers, numbers: Sequence[Tensor], threshold: float, step: int) -> int:
        """Store each of the offers, in order, whose accuracy beats the threshold and the task's own entry; numbers:
        their tasks and accuracies in the host's memory. Returns how many were stored.

        An equally good entry replaces an older one of the same task: prompts age as the agent moves on. A full bank
        gives up its least accurate, oldest entry, if that is no better. A prompt that is not finite is never stored: it
        would spread to other tasks.
        """
        entering: dict[int, int] = {}  # place in the bank -> which of the offered
        stored, columns = 0, self._columns()
        for number, (task, accuracy) in enumerate(zip(*(column.tolist() for column in numbers), strict=True)):
            if not accuracy > threshold:
                continue
            place = place_for(task, *columns)
            if not (columns[0][place] >= 0 and columns[1][place] > accuracy):
                for column, entry in zip(columns, (task, accuracy, step), strict=True):
                    column[place] = entry
                entering[place] = number
                stored += 1
        if not entering:
            return 0
        places, chosen = list(entering), list(entering.values())
        self.keys[places] = offers.keys[chosen].float()
        self.values[places] = offers.values[chosen].float()
        for column, found in zip((self.task, self.accuracy, self.stored_at), columns, strict=True):
            column.copy_(found)
        return stored


def place_for(task: int, owners: Tensor, accuracy: Tensor, stored_at: Tensor) -> int:
    """Where an entry of `task` goes in a bank with these columns, (capacity,) each; owners is -1 where one is free: its
    own place, a free one, or that of the least accurate entry, the oldest of those."""
    if len(own := torch.nonzero(owners == task)):
        return int(own[0])
    if len(free := torch.nonzero(owners < 0)):
        return int(free[0])
    worst = torch.nonzero(accuracy == accuracy.min()).flatten()
    return int(worst[stored_at[worst].argmin()])
