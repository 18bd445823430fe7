"""Qwen's weights, gradients and moments divided among the processes (FSDP2): what one device cannot hold.

Each layer is gathered when it is used, forward and backward, and freed again; its gradients are added up on the way
back, each process keeping its part. Everything else (agent, policy, memory) stays whole on every process. Checkpoints
do not know of it: they hold whole tensors, gathered one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shard(module: nn.Module, layers: Collection[nn.Module], device: torch.device, dtype: torch.dtype | None) -> None:
    """Divide `module` (whole on the CPU, the same on every process) among the processes of the job, each of its
    `layers` by itself and what is left together. Layer by layer it moves to `device`: it is never whole there.

    dtype: in which weights are gathered (bf16 under mixed precision; None: as they are kept). Gradients are summed in
    fp32, as a sum and not as a mean: a loss here is a process's part of a mean (arc/parallel.py).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # What flows between layers keeps its dtype, as without sharding: autocast decides what is computed in which.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    module.to(device)  # buffers


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked this way, a run on one device does not import them."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on this process's device; all processes take part. Others are returned."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def divided_like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, which all processes have, divided as `model` is. Nothing is exchanged."""
    if not is_sharded(model) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    there = value.to(model.device)
    return distribute_tensor(there, model.device_mesh, model.placements, src_data_rank=None)


def load_state(module: Any, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of whole tensors, into a module that may be sharded."""
    parts = module.state_dict()
    found = {name: divided_like(value, parts[name]) if name in parts else value for name, value in state.items()}
    module.load_state_dict(found)


@contextlib.contextmanager
def whole_on_all(module: nn.Module) -> Iterator[None]:
    """Inside, a sharded module is whole on every process, which may then use it by itself (each predicts as many tasks
    as there are for it); without gradient. Nothing happens to a module that is not sharded."""
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "set_reshard_after_forward")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)


def on_host(state: Any, *, keep: bool) -> Any:
    """A copy of a state in host memory, sharded tensors whole. All processes take part, tensor by tensor, so that only
    one of them is whole on a device at a time; those without `keep` end up with nothing."""

    def fetch(tensor: Tensor) -> Tensor | None:
        found = whole(tensor.detach())
        return (found.cpu() if is_sharded(tensor) else found.to("cpu", copy=True)) if keep else None

    return _mapped(state, fetch)


def outline(state: Any) -> Any:
    """A state with sharded tensors replaced by whole ones without content, to tell how much there will be."""
    return _mapped(state, lambda t: torch.empty(t.shape, dtype=t.dtype) if is_sharded(t) else t)


def _mapped(value: Any, change: Callable[[Tensor], Tensor | None]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
