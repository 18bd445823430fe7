"""What a save takes from the live training state before training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from arc.persistence.files import Image, image_of, memory_available
from arc.persistence.names import MAX_STEP, PersistenceError
from arc.persistence.tree import Encoder


@dataclass
class Snapshot:
    """One save, cut off from the live training state: nothing in it changes when training goes on."""

    step: int
    metrics: dict[str, float]
    tree: dict[str, Any]
    aliases: dict[str, str]
    images: dict[str, Image]  # one a group, frozen tensors apart
    staged: dict[str, torch.Tensor] | None  # group -> host copy of the image's data; None: read the live tensors
    frozen: dict[str, torch.Tensor]  # read live: they do not train


class Stager:
    """Takes states apart and copies their tensors into host buffers, one a group, which later saves use again."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.buffers: dict[str, torch.Tensor] = {}
        self._log = log

    def take(
        self,
        state: Mapping[str, Any],
        step: int,
        metrics: Mapping[str, float],
        frozen: Mapping[str, torch.Tensor] | None,
        copy: bool,
    ) -> Snapshot:
        """The part of a save that holds training up. Without `copy` the live tensors are written.

        Raises: PersistenceError for a state or a step that can't be saved.
        """
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise PersistenceError(f"step: {step!r} is not an integer from 0 to {MAX_STEP}")
        figures = {str(name): float(value) for name, value in metrics.items()}
        encoded = Encoder().encode(state, frozen)
        still = encoded.tensors.pop("frozen", {})
        images = {group: image_of(tensors) for group, tensors in encoded.tensors.items()}
        staged = self._copy_to_host(images) if copy else None
        return Snapshot(step, figures, encoded.tree, encoded.aliases, images, staged, still)

    def _copy_to_host(self, images: Mapping[str, Image]) -> dict[str, torch.Tensor] | None:
        """Fills one reused byte buffer a group; None if the machine has no memory for it."""
        grow = sum(max(0, image.data_bytes - _capacity(self.buffers.get(group))) for group, image in images.items())
        available = memory_available()
        if available is not None and grow > 0.8 * available:
            self._log(
                f"[Checkpoint] {grow / 1e9:.1f} GB for a copy of the state do not fit in memory "
                f"({available / 1e9:.1f} GB free): training waits while checkpoints are written"
            )
            return None
        staged = {}
        devices = set()
        for group, image in images.items():
            cuda = {tensor.device for tensor, _, _ in image.slots if tensor.is_cuda}
            devices |= cuda
            if _capacity(self.buffers.get(group)) < image.data_bytes:
                self.buffers[group] = torch.empty(0)  # frees the old one first
                self.buffers[group] = torch.empty(image.data_bytes, dtype=torch.uint8, pin_memory=bool(cuda))
            staged[group] = self.buffers.get(group, torch.empty(0, dtype=torch.uint8))[: image.data_bytes]
            for tensor, begin, end in image.slots:
                target = staged[group][begin:end].view(tensor.dtype).view(tensor.shape)
                target.copy_(tensor, non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.synchronize(device)
        return staged


def _capacity(buffer: torch.Tensor | None) -> int:
    return 0 if buffer is None else buffer.numel()
