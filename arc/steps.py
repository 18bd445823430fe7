"""What a batch leaves until its optimizer step is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arc.memory import Offers
from arc.run.host import to_host


@dataclass(frozen=True)
class Step:
    """What a batch leaves: measured () tensors and offers to the memory, still on the device, and counts."""

    measured: dict[str, Tensor]
    counted: dict[str, int]
    offers: Offers | None


def read_steps(
    steps: Sequence[Step], norms: Mapping[str, Tensor]
) -> tuple[list[dict[str, Any]], dict[str, float], list[list[Tensor]]]:
    """Everything that an update measured, in one read: its only wait for the device. Returns for each step a row of
    plain numbers, the norms, and for each step its offers' tasks and accuracies."""
    device = next(iter(steps[0].measured.values())).device
    values = [value for step in steps for value in step.measured.values()] + list(norms.values())
    measured = torch.stack([value.detach().float().to(device) for value in values])
    offered = [[step.offers.tasks, step.offers.accuracies] if step.offers else [] for step in steps]
    parts = iter(to_host([measured, *(part for own in offered for part in own)]))
    numbers = iter(next(parts).tolist())
    rows = [{**{name: next(numbers) for name in step.measured}, **step.counted} for step in steps]
    return rows, dict(zip(norms, numbers, strict=True)), [[next(parts) for _ in own] for own in offered]
