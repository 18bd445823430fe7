"""Fix 7: mixed precision, loss scaling, clipping of every group; and a step with a gradient that is not finite is
skipped for all weights alike, counted, and survived."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from conftest import SmallBuild, rows_of, train_batches, train_on
from torch import Tensor, nn

from arc.device import cpu_has_native_bf16, resolve_precision
from arc.optim import window_size
from trainloop_complete_with_fixes import Run


def weights_of(run: Run) -> dict[str, Tensor]:
    """A copy of everything that training moves: weights, their running average and the optimizers' moments."""
    live = {
        f"{name}.{key}": parameter
        for name, module in run.modules.items()
        for key, parameter in module.named_parameters()
    }
    moments = {
        f"moment.{number}.{key}": value
        for optimizer in run.optimizer.optimizers.values()
        for number, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    average = {} if run.average is None else {f"average.{key}": value for key, value in run.average.average.items()}
    return {key: value.detach().clone() for key, value in (live | moments | average).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in weights.values())


def poison(parameter: nn.Parameter, value: float) -> None:
    """The next gradient of `parameter` gets one entry of this value."""

    def spoil(_: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = value
        handle.remove()

    handle = parameter.register_post_accumulate_grad_hook(spoil)


def observe_injection(build: SmallBuild, group: str, value: float, *flags: str) -> tuple[Run, list[dict[str, Tensor]]]:
    """Three batches, the second with a poisoned gradient in `group`: the run, and the weights after each batch."""
    run = build("--log_every", "99", *flags)
    snapshots = []
    for number, batch in enumerate(train_batches(run, 3)):
        if number == 1:
            module = run.modules[group]
            poison(next(p for p in module.parameters() if p.requires_grad and p.ndim == 2), value)
        train_on(run, [batch])
        snapshots.append(weights_of(run))
    return run, snapshots


@pytest.mark.parametrize("group", ["agent", "qwen", "policy"])
@pytest.mark.parametrize(("amp", "value"), [("off", math.inf), ("bf16", math.nan), ("fp16", math.inf)])
def test_a_bad_gradient_anywhere_leaves_all_weights_and_training_goes_on(
    small_build: SmallBuild, group: str, amp: str, value: float
) -> None:
    run, (first, second, third) = observe_injection(small_build, group, value, "--amp", amp)
    assert same(first, second)
    assert finite(third) and not same(second, third)
    assert [row["skipped_steps"] for row in rows_of(run)] == [0, 1, 1]
    assert run.state.step == 3 and run.state.updates == 2 and run.state.skipped_steps == 1


def test_the_loss_scale_is_halved_by_a_skipped_step(small_build: SmallBuild) -> None:
    run = small_build("--amp", "fp16")
    scale = run.scaler.get_scale()
    assert scale > 1
    run, _ = observe_injection(small_build, "qwen", math.inf, "--amp", "fp16")
    assert run.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("group", ["agent", "policy"])
def test_without_the_fix_a_bad_gradient_ruins_the_weights(small_build: SmallBuild, group: str) -> None:
    run = small_build("--ablate", "7")
    batch = train_batches(run, 1)[0]
    before = weights_of(run)
    poison(next(p for p in run.modules[group].parameters() if p.ndim == 2), math.nan)
    train_on(run, [batch])
    assert finite(before) and not finite(weights_of(run))
    assert run.state.skipped_steps == 0


def test_an_activation_that_overflows_costs_one_step_and_not_the_run(small_build: SmallBuild) -> None:
    """The usual way to a bad gradient in fp16: a value in the forward pass is beyond 65504."""
    run = small_build("--amp", "off")
    batches = train_batches(run, 2)
    before = weights_of(run)
    handle = run.qwen.project.register_forward_hook(lambda module, inputs, output: output * math.inf)
    train_on(run, batches[:1])
    handle.remove()
    assert same(before, weights_of(run)) and run.state.skipped_steps == 1
    train_on(run, batches[1:])
    assert finite(weights_of(run)) and run.state.updates == 1


def test_a_bad_batch_is_seen_in_an_accumulated_step_and_left_out_of_the_mean(small_build: SmallBuild) -> None:
    run = small_build("--grad_accum", "2")
    batches = train_batches(run, 4)
    spoilt = run.qwen.project.register_forward_hook(lambda module, inputs, output: output * math.inf)
    run.qwen.register_forward_hook(lambda *_: spoilt.remove())  # after the first batch
    train_on(run, batches)
    losses = [row["loss"] for row in rows_of(run)]
    assert losses[0] is None and all(loss is not None for loss in losses[1:])
    assert "loss" in run.records.raised
    assert run.log.folder is not None
    shown = re.findall(r"Average Loss: ([\d.]+)", (run.log.folder / "train.log").read_text())
    assert float(shown[-1]) == pytest.approx(sum(losses[1:]) / 3, abs=1e-4)


@pytest.mark.parametrize(("first", "count", "size"), [(0, 5, 3), (3, 5, 2), (0, 2, 2)])
def test_the_last_accumulated_step_of_an_epoch_is_a_mean_too(first: int, count: int, size: int) -> None:
    assert window_size(3, first, count) == size


# --------------------------------------------------------------------------------------------------------------------
# clipping
# --------------------------------------------------------------------------------------------------------------------


def observe_norms(build: SmallBuild, *flags: str) -> dict[str, float]:
    """Gradient norm of each group as the optimizer gets it, in one step."""
    run = build(*flags)
    seen: dict[str, float] = {}

    def look(*_: Any) -> None:
        for name, parameters in run.optimizer.groups.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            seen[name] = float(nn.utils.get_total_norm(gradients))

    for optimizer in run.optimizer.optimizers.values():
        optimizer.register_step_pre_hook(look)
    train_on(run, train_batches(run, 1))
    return seen


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_every_group_is_clipped(small_build: SmallBuild, amp: str) -> None:
    limit = 1e-4  # below the natural norm of each group
    clipped = observe_norms(small_build, "--amp", amp, "--grad_clip", str(limit))
    assert clipped == {group: pytest.approx(limit, rel=0.02) for group in ("agent", "policy", "qwen")}
    free = observe_norms(small_build, "--amp", amp, "--grad_clip", str(limit), "--ablate", "7")
    assert min(free.values()) > 2 * limit


def test_zero_means_no_clipping_and_a_wide_limit_changes_nothing(small_build: SmallBuild) -> None:
    free = observe_norms(small_build, "--grad_clip", "0")
    assert observe_norms(small_build, "--grad_clip", "1e6") == free and min(free.values()) > 0


# --------------------------------------------------------------------------------------------------------------------
# precision
# --------------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_bf16_is_for_wide_layers(small_build: SmallBuild) -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu, narrow=True).dtype is None
    assert resolve_precision("bf16", cpu, narrow=True).dtype == torch.bfloat16
    native = torch.bfloat16 if cpu_has_native_bf16() else None
    assert resolve_precision("auto", cpu).dtype == native
    assert small_build("--amp", "auto").precision.dtype is None
    assert small_build("--amp", "auto", "--agent_width", "256").precision.dtype == native


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_like_full_precision(small_build: SmallBuild, amp: str) -> None:
    def losses(*flags: str) -> list[float]:
        run = small_build(*flags)
        train_on(run, train_batches(run, 3))
        assert all(value.dtype == torch.float32 for value in run.agent.state_dict().values())
        return [row["loss"] for row in rows_of(run)]

    assert losses("--amp", amp) == pytest.approx(losses("--amp", "off"), rel=0.02)


@pytest.mark.parametrize(
    ("flags", "dtype", "scaled"),
    [
        (("--amp", "bf16"), torch.bfloat16, False),
        (("--amp", "fp16"), torch.float16, True),
        (("--amp", "off"), None, False),
        (("--amp", "fp16", "--ablate", "7"), None, False),
        (("--amp", "bf16", "--ablate", "7"), None, False),
    ],
)
def test_matrix_products_run_in_the_chosen_precision(
    small_build: SmallBuild, flags: tuple[str, ...], dtype: torch.dtype | None, scaled: bool
) -> None:
    run = small_build(*flags)
    seen: set[torch.dtype] = set()
    run.agent.prompt_embedding.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train_on(run, train_batches(run, 1))
    assert seen == {dtype or torch.float32}
    assert run.scaler.is_enabled() == scaled
