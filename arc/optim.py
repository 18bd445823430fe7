"""Parameter groups, learning-rate schedule, clipping, the guarded optimizer step and the moving average of the
weights."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from arc.device import matrix_dtype
from arc.run.files import UserError
from arc.sharding import divided_like, own_part, whole


def learning_rate_factor(step: int, progress: float, *, warmup_steps: int = 50, decay_share: float = 0.7) -> float:
    """Multiplier of every learning rate: linear warm-up over `warmup_steps`, then 1, then linear to 0.02 over the last
    `decay_share` of the run. step counts optimizer steps; progress in [0, 1] is the share of the run that is over."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = (1.0 - min(max(progress, 0.0), 1.0)) / decay_share
    return warm * max(0.02, min(1.0, left))


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About the nearest matrices (n, rows, columns) with orthogonal rows or columns, in the dtype that is given: the
    quintic Newton-Schulz iteration of Muon (Jordan et al. 2024)."""
    a, b, c = coefficients
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Muon):
    """Torch's Muon with the learning rate matched to AdamW's, but equal shapes are orthogonalised together, in `dtype`:
    torch's always does it in bf16, which many processors only emulate (there it took a fifth of a training step)."""

    def __init__(self, params: Any, dtype: torch.dtype) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                by_shape[parameter.shape].append((parameter, update))
            for shape, pairs in by_shape.items():
                stacked = torch.stack([update.to(self.dtype) for _, update in pairs])
                updates = orthogonalise(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # as "match_rms_adamw" (Liu et al. 2025, eq. 4)
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


class JointOptimizer:
    """Named parameter groups under library optimizers that step, or skip, together.

    AdamW takes every parameter; with `muon`, the weight matrices inside the agent's blocks go to `torch.optim.Muon`
    (Jordan et al. 2024) instead, its rate matched to AdamW's by root mean square. The groups named in `eight_bit` keep
    their moments in 8 bits, block by block (bitsandbytes; Dettmers et al. 2022), all but the embeddings, which need 32
    bits there too: rows are seen too unevenly to share a scale. Each named module (agent, qwen, policy, ...) keeps its
    own learning rate and its own clipping. A parameter in two groups, or a group without any, is a ValueError at build
    time; `covers` tells whether a module's parameters are all in some group.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        rates: Mapping[str, float],
        *,
        muon: bool = True,
        eight_bit: Collection[str] = (),
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
    ) -> None:
        if set(modules) != set(rates):
            raise ValueError(f"groups {sorted(modules)} need a learning rate each, got {sorted(rates)}")
        self.groups: dict[str, list[nn.Parameter]] = {}
        parts: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": [], "adamw8bit": []}  # groups by optimizer
        owner: dict[int, str] = {}
        for name, module in modules.items():
            trainable = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
            if not trainable:
                raise ValueError(f"parameter group {name!r} has no trainable parameter")
            for key, parameter in trainable:
                if id(parameter) in owner:
                    raise ValueError(f"parameter {name}.{key} is also in group {owner[id(parameter)]!r}")
                owner[id(parameter)] = name
            self.groups[name] = [p for _, p in trainable]
            matrices = [p for key, p in trainable if muon and is_block_matrix(name, key, p)]
            embeddings = [m.weight for m in module.modules() if name in eight_bit and isinstance(m, nn.Embedding)]
            taken = {id(p) for p in (*matrices, *embeddings)}
            rest = [p for _, p in trainable if id(p) not in taken]
            # Decay only what is a matrix: gains, biases and embeddings of positions have no reason to shrink.
            for optimizer, params, decay in (
                ("muon", matrices, weight_decay),
                ("adamw", [p for p in embeddings if p.requires_grad], weight_decay),
                ("adamw8bit" if name in eight_bit else "adamw", [p for p in rest if p.ndim >= 2], weight_decay),
                ("adamw8bit" if name in eight_bit else "adamw", [p for p in rest if p.ndim < 2], 0.0),
            ):
                if params:
                    group = {"params": params, "lr": rates[name], "base_lr": rates[name], "name": name}
                    parts[optimizer].append({**group, "weight_decay": decay})
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        if parts["adamw"]:
            # In one call on a CPU, where torch by itself goes through the parameters one by one.
            fused = True if parts["adamw"][0]["params"][0].device.type == "cpu" else None
            self.optimizers["adamw"] = torch.optim.AdamW(parts["adamw"], betas=betas, fused=fused)
        if parts["muon"]:
            self.optimizers["muon"] = Muon(parts["muon"], matrix_dtype(parts["muon"][0]["params"][0].device))
        if parts["adamw8bit"]:
            self.optimizers["adamw8bit"] = load_bitsandbytes().optim.AdamW8bit(parts["adamw8bit"], betas=betas)

    def set_rates(self, factor: float) -> dict[str, float]:
        """Multiply every group's base rate by `factor`; returns the rate of each named group."""
        rates = {}
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
                rates[group["name"]] = group["lr"]
        return rates

    def covers(self, module: nn.Module) -> bool:
        """Whether every trainable parameter of `module` is in a group."""
        known = {id(parameter) for parameters in self.groups.values() for parameter in parameters}
        return all(id(parameter) in known for parameter in module.parameters() if parameter.requires_grad)

    def base_rates(self) -> dict[str, float]:
        """The rate of each named group before warm-up and decay."""
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        return {group["name"]: group["base_lr"] for group in groups}

    def bytes_to_come(self) -> int:
        """Bytes of the moments that the first step will add to the state: two fp32 numbers a parameter, Muon one, two
        bytes under adamw8bit. 0 once they are there."""
        each = {"adamw": 8, "muon": 4, "adamw8bit": 2}
        return sum(
            each[name] * parameter.numel()
            for name, optimizer in self.optimizers.items()
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter not in optimizer.state
        )

    def zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def unscale_(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the loss scale (nothing to do when the scaler is disabled)."""
        for optimizer in self.optimizers.values():
            scaler.unscale_(optimizer)

    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """Clip each named group to `max_norm` by its own global norm (0 or less: do not clip). Returns the norms
        before, () each, still on the device: reading them is a wait, and the caller has more to read. A group may be
        sharded, all of it or nothing."""
        limit = max_norm if max_norm > 0 else math.inf
        return {name: whole(nn.utils.clip_grad_norm_(params, limit)) for name, params in self.groups.items()}

    def step(self, scaler: torch.amp.GradScaler, *, finite: bool) -> bool:
        """One update of all optimizers, or of none if the gradients are not finite. Returns whether it was made.

        GradScaler decides for each optimizer by itself, so an inf in Qwen alone would still move the agent; therefore
        the caller's verdict over all groups holds for all. `update` lowers the loss scale after an inf in any of them.
        """
        if finite:
            for optimizer in self.optimizers.values():
                scaler.step(optimizer)
        scaler.update()
        return finite

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the moments. The groups with their settings, and how a step is computed, are this run's: what a
        checkpoint says of them is not believed. Raises: UserError where its moments are not those of these parameters.
        """
        if not isinstance(state, Mapping):
            raise UserError("--resume: the checkpoint has no optimizer's state")
        if set(state) != set(self.optimizers):
            raise UserError(f"checkpoint has optimizers {sorted(state)}, this run has {sorted(self.optimizers)}")
        for name, optimizer in self.optimizers.items():
            params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            saved = state[name].get("state") if isinstance(state[name], dict) else None
            if not isinstance(saved, dict) or not set(saved) <= set(range(len(params))):
                raise UserError(f"--resume: the checkpoint's {name} is not that of this model")
            moments = {
                index: {
                    key: divided_like(value, params[index]) if is_moment(value, params[index]) else value
                    for key, value in checked_moments(name, own, params[index]).items()
                }
                for index, own in saved.items()
            }
            groups = optimizer.state_dict()["param_groups"]
            for group, rate in zip(groups, saved_rates(state[name].get("param_groups")), strict=False):
                group["lr"] = rate  # until `set_rates`, which comes before the next step
            optimizer.load_state_dict({"state": moments, "param_groups": groups})


def saved_rates(groups: Any) -> list[float]:
    """The learning rates that a checkpoint's groups had; none where it does not say."""
    rates: list[Any] = [group.get("lr") for group in groups if isinstance(group, dict)] if type(groups) is list else []
    return rates if all(type(rate) is float for rate in rates) else []


# What torch's optimizers keep of a parameter (bitsandbytes checks its own).
KEPT = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}


def checked_moments(optimizer: str, saved: Any, parameter: Tensor) -> dict[str, Any]:
    """What a checkpoint has for a parameter; UserError unless it is what that optimizer keeps."""
    kept = KEPT.get(optimizer)
    sound = isinstance(saved, dict) and (kept is None or saved.keys() == kept)
    if sound and kept:
        moments = {key: value for key, value in saved.items() if key != "step"}
        sound = all(is_moment(value, parameter) and value.is_floating_point() for value in moments.values())
        step = saved.get("step", torch.zeros(()))
        sound = sound and isinstance(step, Tensor) and step.numel() == 1 and step.is_floating_point()
    if not sound:
        raise UserError(f"--resume: the checkpoint's {optimizer} does not fit the parameters of this model")
    return dict(saved)


def is_moment(value: Any, parameter: Tensor) -> bool:
    """Whether a value of an optimizer's state is there for each number of the parameter."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


@contextlib.contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Inside, the import of bitsandbytes (peft does that too) does not warn of kernels for 4-bit models, which nothing
    here uses."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_bitsandbytes() -> Any:
    """The package bitsandbytes; UserError, one line, if it is not there."""
    try:
        with quiet_bitsandbytes():
            import bitsandbytes
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--optim_qwen adamw8bit needs the package bitsandbytes ({reason}): pip install -U bitsandbytes"
        ) from error
    return bitsandbytes


def problem_with_eight_bit(device: torch.device) -> str | None:
    """One line that says why 8-bit moments cannot be had on `device`, or None: one small step is tried out."""
    try:
        package = load_bitsandbytes()
    except UserError as problem:
        return str(problem)
    try:
        weight = nn.Parameter(torch.zeros(64, 64, device=device))  # 4,096 values: below that it keeps 32 bits
        weight.grad = torch.ones_like(weight)
        package.optim.AdamW8bit([weight], lr=1.0, weight_decay=0.0).step()
        moved = bool((weight.detach() < -0.5).all())
    except Exception as error:  # a library that lacks the device's kernels says so in many ways
        return f"--optim_qwen adamw8bit: bitsandbytes cannot compute on {device.type} ({' '.join(str(error).split())})"
    return None if moved else f"--optim_qwen adamw8bit: bitsandbytes computes wrongly on {device.type}; use adamw"


def is_block_matrix(group: str, key: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: the matrices of the agent's blocks, not its modulation, embeddings or
    heads."""
    return group == "agent" and key.startswith("blocks.") and parameter.ndim == 2 and "modulation" not in key


class Named(Protocol):
    """What has trainable parameters by name: a module, or an adapter."""

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...


class WeightAverage:
    """Exponential moving average of the trainable weights, used for evaluation; the raw weights stay for resuming.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not held at its start.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.live = {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.average = {key: parameter.detach().clone() for key, parameter in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in."""
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average, live = ([own_part(p.detach()) for p in each.values()] for each in (self.average, self.live))
        torch._foreach_lerp_(average, live, rate)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the modules hold the averaged weights; afterwards the raw ones again, whatever happens."""
        raw = {key: parameter.detach().clone() for key, parameter in self.live.items()}
        try:
            self._copy(self.average)
            yield
        finally:
            self._copy(raw)

    @torch.no_grad()
    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for key, parameter in self.live.items():
            parameter.copy_(source[key])

    def state_dict(self, parts: Mapping[str, Named] | None = None) -> dict[str, Any]:
        """parts: as whose weights a checkpoint has the raw ones; `names` tells of each the averages' names here, by the
        names there."""
        own = {id(parameter): key for key, parameter in self.live.items()}
        names = {
            name: {key: own[id(p)] for key, p in part.named_parameters(remove_duplicate=False) if id(p) in own}
            for name, part in (parts or {}).items()
        }
        return {"updates": self.updates, "average": self.average, "names": names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved, updates = (state.get(key) if isinstance(state, Mapping) else None for key in ("average", "updates"))
        if not isinstance(saved, dict) or set(saved) != set(self.average) or type(updates) is not int or updates < 0:
            raise UserError("the checkpoint's averaged weights belong to another model")
        for key, value in saved.items():
            if not is_moment(value, self.average[key]):
                raise UserError(f"the checkpoint's averaged {key} has another shape")
            self.average[key].copy_(divided_like(value, self.average[key]))
        self.updates = updates


def window_size(grad_accum: int, first: int, count: int) -> int:
    """Batches whose gradients one optimizer step sums up, from batch `first` of an epoch of `count` on: fewer at its
    end."""
    return min(grad_accum, count - first)
