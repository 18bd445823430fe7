"""Parameter groups, schedule, guarded step and moving average (arc/optim.py), and the state a resumed run needs."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallBuild, train_batches, train_on
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from arc.optim import JointOptimizer, Muon, WeightAverage, learning_rate_factor
from arc.run.files import UserError
from trainloop_complete_with_fixes import TrainState, checkpoint_tree, restore_rng, rng_state

RATES = {"agent": 0.1, "qwen": 0.01}


def make_modules() -> dict[str, nn.Module]:
    """An agent with one block matrix (for Muon), a vector and a matrix outside the blocks; a Qwen with one layer."""
    torch.manual_seed(0)
    agent = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 2)})
    return {"agent": agent, "qwen": nn.Linear(4, 4, bias=False)}


def set_gradients(modules: dict[str, nn.Module], value: float) -> None:
    for module in modules.values():
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, value)


def weights_of(modules: dict[str, nn.Module]) -> list[Tensor]:
    return [parameter.detach().clone() for module in modules.values() for parameter in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


# --------------------------------------------------------------------------------------------------------------------
# groups
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--optimizer", "adamw"), ("--qwen_tune", "frozen"), ("--ablate", "1")])
def test_every_trainable_parameter_of_a_run_is_in_exactly_one_group(
    small_build: SmallBuild, flags: tuple[str, ...]
) -> None:
    run = small_build(*flags)
    wanted = sorted(id(p) for module in run.modules.values() for p in module.parameters() if p.requires_grad)
    named = sorted(id(p) for group in run.optimizer.groups.values() for p in group)
    stepped = sorted(
        id(p) for o in run.optimizer.optimizers.values() for group in o.param_groups for p in group["params"]
    )
    assert named == wanted == stepped


def test_a_parameter_in_two_groups_is_an_error() -> None:
    modules = make_modules()
    modules["qwen"].weight = modules["agent"]["blocks"][0].weight  # type: ignore[index]
    with pytest.raises(ValueError, match=r"parameter qwen\.weight is also in group 'agent'"):
        JointOptimizer(modules, RATES)


def test_a_group_without_a_trainable_parameter_is_an_error() -> None:
    modules = make_modules()
    modules["qwen"].requires_grad_(False)
    with pytest.raises(ValueError, match="parameter group 'qwen' has no trainable parameter"):
        JointOptimizer(modules, RATES)


def test_every_group_needs_a_rate_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"groups \['agent', 'qwen'\] need a learning rate each, got \['agent'\]"):
        JointOptimizer(make_modules(), {"agent": 0.1})


def test_muon_takes_the_matrices_of_the_agents_blocks_and_nothing_else() -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES)
    (muon,) = optimizer.optimizers["muon"].param_groups
    assert [id(p) for p in muon["params"]] == [id(modules["agent"]["blocks"][0].weight)]  # type: ignore[index]
    assert set(JointOptimizer(modules, RATES, muon=False).optimizers) == {"adamw"}


def test_only_matrices_decay() -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES)
    set_gradients(modules, 0.0)
    before = weights_of(modules)
    assert optimizer.step(NO_SCALER, finite=True)
    for old, new in zip(before, weights_of(modules), strict=True):
        assert torch.equal(old, new) == (old.ndim < 2)
        assert bool((new.abs() <= old.abs()).all())


@pytest.mark.parametrize("muon", [True, False])
def test_rates_are_those_of_the_groups_times_the_factor(muon: bool) -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES, muon=muon)
    for _ in range(2):  # of the base rate, not of the last one
        assert optimizer.set_rates(0.5) == {"agent": 0.05, "qwen": 0.005}
    for inner in optimizer.optimizers.values():
        assert all(group["lr"] == 0.5 * RATES[group["name"]] for group in inner.param_groups)


# --------------------------------------------------------------------------------------------------------------------
# clipping and stepping
# --------------------------------------------------------------------------------------------------------------------


def test_each_group_is_clipped_by_its_own_norm() -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES)
    set_gradients(modules, 1.0)
    sizes = {name: math.sqrt(sum(p.numel() for p in module.parameters())) for name, module in modules.items()}
    assert optimizer.clip(0.0) == pytest.approx(sizes)  # 0: measured, not clipped
    assert optimizer.clip(0.5) == pytest.approx(sizes)  # returned: the norms before
    assert optimizer.clip(9.0) == pytest.approx({"agent": 0.5, "qwen": 0.5}, rel=1e-3)


def test_optimizers_step_or_skip_together() -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES)
    set_gradients(modules, 1.0)
    before = weights_of(modules)
    assert not optimizer.step(NO_SCALER, finite=False) and equal(weights_of(modules), before)
    assert optimizer.step(NO_SCALER, finite=True)
    assert not any(map(torch.equal, weights_of(modules), before))


def test_an_overflow_in_one_group_holds_all_back_and_lowers_the_scale() -> None:
    """Muon's parameters have fine gradients; GradScaler by itself would step them."""
    modules = make_modules()
    optimizer, scaler = JointOptimizer(modules, RATES), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    set_gradients(modules, 1024.0)
    next(modules["qwen"].parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
    before = weights_of(modules)
    optimizer.unscale_(scaler)
    norms = optimizer.clip(1.0)
    assert math.isfinite(norms["agent"]) and not math.isfinite(norms["qwen"])
    assert not optimizer.step(scaler, finite=all(map(math.isfinite, norms.values())))
    assert equal(weights_of(modules), before) and scaler.get_scale() == 512.0

    set_gradients(modules, 512.0)
    optimizer.unscale_(scaler)
    assert optimizer.clip(0.0)["qwen"] == pytest.approx(4.0)  # in its own units again
    assert optimizer.step(scaler, finite=True) and not equal(weights_of(modules), before)


@pytest.mark.parametrize("muon", [True, False])
def test_the_moments_to_come_are_counted_beforehand(muon: bool) -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES, muon=muon)
    expected = optimizer.bytes_to_come()
    set_gradients(modules, 1.0)
    optimizer.step(NO_SCALER, finite=True)
    moments = [
        value
        for inner in optimizer.optimizers.values()
        for state in inner.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    ]
    assert expected == sum(value.numel() * value.element_size() for value in moments) > 0
    assert optimizer.bytes_to_come() == 0


def test_zero_grad_forgets_the_gradients() -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES)
    set_gradients(modules, 1.0)
    optimizer.zero_grad()
    assert all(p.grad is None for module in modules.values() for p in module.parameters())


def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    def steps(modules: dict[str, nn.Module], optimizer: JointOptimizer, values: list[float]) -> None:
        for value in values:
            set_gradients(modules, value)
            optimizer.step(NO_SCALER, finite=True)

    first = make_modules()
    whole = JointOptimizer(first, RATES)
    steps(first, whole, [1.0, -0.5])
    second = make_modules()
    resumed = JointOptimizer(second, RATES)
    for name, module in second.items():
        module.load_state_dict(first[name].state_dict())
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))  # torch keeps the tensors it is given
    steps(first, whole, [2.0, 0.1])
    steps(second, resumed, [2.0, 0.1])
    assert equal(weights_of(first), weights_of(second))
    with pytest.raises(ValueError, match="checkpoint has optimizers"):
        JointOptimizer(make_modules(), RATES, muon=False).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("state", [None, "x", 5, [], {}, {"y": 1}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    modules = make_modules()
    for part in (JointOptimizer(modules, RATES), WeightAverage(modules, 0.9)):
        with pytest.raises(UserError):
            part.load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"state": None},
        {"state": {99: {}}},
        {"state": {"0": {}}},
        {"state": {0: {"step": torch.zeros(())}}},
        {"state": {0: 5}},
        {"state": {0: {"step": torch.zeros(()), "exp_avg": torch.zeros(1, 9), "exp_avg_sq": torch.zeros(1, 9)}}},
        {"param_groups": [{"lr": "x", "betas": None}]},  # settings are not the checkpoint's
    ],
)
def test_moments_of_other_parameters_are_refused(damage: dict[str, Any]) -> None:
    modules = make_modules()
    optimizer = JointOptimizer(modules, RATES)
    set_gradients(modules, 1.0)
    optimizer.step(NO_SCALER, finite=True)
    damaged = copy.deepcopy(optimizer.state_dict())
    damaged["adamw"] |= damage
    if "param_groups" in damage:
        optimizer.load_state_dict(damaged)
        optimizer.step(NO_SCALER, finite=True)
    else:
        with pytest.raises(UserError, match=r"^--resume: the checkpoint's adamw "):
            optimizer.load_state_dict(damaged)


# --------------------------------------------------------------------------------------------------------------------
# schedule
# --------------------------------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_stays_and_falls() -> None:
    assert [learning_rate_factor(step, 0.0) for step in (0, 24, 49, 500)] == pytest.approx([0.02, 0.5, 1.0, 1.0])
    assert [learning_rate_factor(500, p) for p in (0.3, 0.65, 1.0)] == pytest.approx([1.0, 0.5, 0.02])
    assert learning_rate_factor(0, 0.0, warmup_steps=0) == 1.0


@given(st.integers(0, 10_000), st.floats(-1, 2), st.integers(0, 100), st.floats(0.01, 1))
def test_the_schedule_is_never_zero_and_never_above_one(step: int, progress: float, warmup: int, share: float) -> None:
    factor = learning_rate_factor(step, progress, warmup_steps=warmup, decay_share=share)
    assert 0 < factor <= 1
    assert learning_rate_factor(step, progress + 0.1, warmup_steps=warmup, decay_share=share) <= factor
    assert learning_rate_factor(step + 1, progress, warmup_steps=warmup, decay_share=share) >= factor


# --------------------------------------------------------------------------------------------------------------------
# moving average
# --------------------------------------------------------------------------------------------------------------------


def test_the_average_follows_the_weights_quickly_at_first() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = WeightAverage({"layer": layer}, decay=0.5)
    expected = float(layer.weight.detach())
    for update in range(30):
        layer.weight.data.fill_(float(update))
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
        assert float(average.average["layer.weight"]) == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_are_lent_and_raw_ones_come_back_whatever_happens() -> None:
    modules = make_modules()
    modules["agent"]["head"].requires_grad_(False)  # type: ignore[index]
    average = WeightAverage(modules, decay=0.9)
    raw = weights_of(modules)
    for parameter in modules["qwen"].parameters():
        parameter.data.add_(1.0)
    average.update()
    moved = weights_of(modules)
    with pytest.raises(KeyError), average.applied():
        lent = weights_of(modules)
        raise KeyError
    assert equal(weights_of(modules), moved)
    for old, new, middle in zip(raw, moved, lent, strict=True):
        between = (torch.minimum(old, new) <= middle) & (middle <= torch.maximum(old, new))
        assert bool(between.all()) and torch.equal(old, new) == torch.equal(middle, new)
    assert not any("head" in key for key in average.average)  # what does not train has no average


def test_a_restored_average_goes_on_as_if_nothing_had_happened() -> None:
    modules = make_modules()
    first, second = WeightAverage(modules, 0.9), WeightAverage(modules, 0.9)
    for average in (first, second):
        for parameter in modules["qwen"].parameters():
            parameter.data.add_(1.0)
        first.update()
        if average is first:
            second.load_state_dict({"updates": 1, "average": {k: v.clone() for k, v in first.average.items()}})
        else:
            second.update()
    assert first.updates == second.updates and all(map(torch.equal, first.average.values(), second.average.values()))
    with pytest.raises(ValueError, match="belong to another model"):
        WeightAverage({"qwen": modules["qwen"]}, 0.9).load_state_dict(first.state_dict())


# --------------------------------------------------------------------------------------------------------------------
# what a resumed run needs
# --------------------------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    """Numbers from every generator; gauss() of python keeps a second number back, which is state too."""
    return [*torch.rand(3).tolist(), *np.random.standard_normal(3), random.random(), random.gauss(0, 1)]


def test_every_random_generator_is_restored() -> None:
    draw()
    saved = rng_state()
    first = draw()
    assert draw() != first
    restore_rng(saved)
    assert draw() == first


def test_every_field_of_the_training_state_is_in_a_checkpoint(small_build: SmallBuild) -> None:
    run = small_build("--amp", "bf16")
    train_on(run, train_batches(run, 2))
    state = checkpoint_tree(run)["extra"]["state"]
    assert set(state) == {field.name for field in dataclasses.fields(TrainState)}
    assert repr(TrainState(**state)) == repr(run.state)  # by repr: nan is not equal to itself
    changed = {name for name, value in state.items() if repr(value) != repr(getattr(TrainState(), name))}
    assert {"batch", "step", "updates", "queries", "sums", "memory_offers"} <= changed


def test_everything_that_training_moves_is_in_a_checkpoint(small_build: SmallBuild) -> None:
    run = small_build()
    train_on(run, train_batches(run, 2))
    tree = checkpoint_tree(run)

    def tensors(node: object) -> list[Tensor]:
        if isinstance(node, Tensor):
            return [node]
        values = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
        return [tensor for value in values for tensor in tensors(value)]

    saved = {tensor.data_ptr() for tensor in tensors(tree)}
    state = {f"{n}.{key}": t for n, module in run.modules.items() for key, t in module.state_dict().items()}
    assert run.average is not None
    state |= {f"average of {name}": tensor for name, tensor in run.average.average.items()}
    for name, optimizer in run.optimizer.optimizers.items():
        moments = [t for of in optimizer.state.values() for t in of.values() if isinstance(t, Tensor)]
        state |= {f"{name} {number}": tensor for number, tensor in enumerate(moments)}
    assert [name for name, tensor in state.items() if tensor.data_ptr() not in saved] == []
    assert "qwen.query" in state and "memory.values" in state and "adamw 0" in state


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_is_torchs_in_the_dtype_of_the_machine(shape: tuple[int, int]) -> None:
    """The same update as torch's, in fp32 as near as bf16 gets, several matrices at once as well as one by one."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for _ in range(3)] for _ in range(2))
    optimizers = Muon(ours, torch.float32), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, torchs in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(shape, generator=generator)
            torchs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, torchs in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, torchs, atol=2e-5) and not torch.equal(mine, torch.ones(shape))
    assert all(mine.equal(torchs) for mine, torchs in zip(momenta(optimizers[0]), momenta(optimizers[1]), strict=True))


def momenta(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in optimizer.state.values()]
