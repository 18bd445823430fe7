"""Between the device and the host's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `tensors` in the host's memory, whatever their shapes and dtypes, by one transfer: each is a wait for a
    GPU."""
    bits = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    parts = torch.cat(bits).cpu().split([len(part) for part in bits])
    # Cloned: a wider dtype may only begin where its size divides the place.
    return [part.clone().view(own.dtype).view(own.shape) for own, part in zip(tensors, parts, strict=True)]
