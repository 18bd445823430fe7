"""Fix 1: Qwen trains. It is a parameter group of its own, every parameter of it gets a gradient and moves, and the
monitor that proves it looks after unscaling and before clipping."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallBuild, SmallRun, rows_of, train_batches, train_on
from torch import nn

from arc.run.records import RedFlag
from trainloop_complete_with_fixes import GradientMonitor


def observe_qwen(build: SmallBuild, *flags: str) -> dict[str, tuple[float, bool]]:
    """Name of each Qwen parameter -> (largest gradient that reached it, whether it moved) in one training step."""
    run = build(*flags)
    parameters = dict(run.qwen.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    largest = dict.fromkeys(parameters, 0.0)

    def watch(name: str, parameter: nn.Parameter) -> None:
        def keep(_: torch.Tensor) -> None:
            assert parameter.grad is not None
            largest[name] = float(parameter.grad.abs().max())

        parameter.register_post_accumulate_grad_hook(keep)

    for name, parameter in parameters.items():
        if parameter.requires_grad:
            watch(name, parameter)
    train_on(run, train_batches(run, 1))
    return {name: (largest[name], not torch.equal(parameters[name], before[name])) for name in parameters}


def test_every_parameter_of_qwen_has_a_gradient_and_moves_in_the_first_step(small_build: SmallBuild) -> None:
    observed = observe_qwen(small_build)
    assert any("embed_tokens" in name for name in observed) and "query" in observed
    assert [name for name, (gradient, moved) in observed.items() if not (gradient > 0 and moved)] == []

    frozen = observe_qwen(small_build, "--ablate", "1")
    assert frozen.keys() == observed.keys()
    assert [name for name, (gradient, moved) in frozen.items() if gradient > 0 or moved] == []


@pytest.mark.parametrize(("ablate", "trains"), [((), True), (("--ablate", "1"), False)])
def test_the_logged_gradient_of_qwen_is_never_zero(
    small_run: SmallRun, tmp_path: Path, ablate: tuple[str, ...], trains: bool
) -> None:
    outcome = small_run(tmp_path / "run", "--max_batches", "3", *ablate)
    assert outcome.code == 0
    logged = re.findall(r"Qwen_grad: (\d\.\d\de[+-]\d\d) \|", outcome.stdout)
    summary = re.search(r"Qwen Gradient Norm: (\d\.\d\de[+-]\d\d) ", outcome.stdout)
    assert len(logged) == len(outcome.batches) == 3 and summary is not None
    for value in (*map(float, logged), float(summary[1]), *(row["qwen_grad"] for row in outcome.batches)):
        assert (value > 0) == trains
    assert ("RED FLAG" in outcome.stdout and "FIX #1" in outcome.stdout.partition("RED FLAG")[2]) != trains


def test_a_part_of_qwen_that_is_cut_off_is_flagged(small_build: SmallBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm does not show it: what Qwen's layers find is projected by a layer that still trains."""
    run = small_build("--strict")
    train_on(run, train_batches(run, 1))
    layers = run.qwen.backbone.forward

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return layers(*args, **kwargs)

    monkeypatch.setattr(run.qwen.backbone, "forward", cut_off)
    with pytest.raises(RedFlag, match=r"^\d+ tensors of Qwen get no gradient, these do not train \(FIX #1\)$"):
        train_on(run, train_batches(run, 1))
    last = rows_of(run)[-1]
    assert last["qwen_grad"] > 0 and last["qwen_missing"] > 5


def test_qwen_has_a_named_group_with_its_own_rate(small_build: SmallBuild) -> None:
    run = small_build("--agent_lr", "1e-5", "--qwen_lr", "5e-5")  # the seed's rates
    rates = run.optimizer.set_rates(1.0)
    assert rates["agent"] == 1e-5 and rates["qwen"] == 5e-5
    assert {id(p) for p in run.optimizer.groups["qwen"]} == {id(p) for p in run.qwen.parameters()}
    assert "qwen" not in small_build("--ablate", "1").optimizer.groups


def test_qwen_grad_is_measured_after_unscaling_and_before_clipping(small_build: SmallBuild) -> None:
    def first_norm(*flags: str) -> float:
        run = small_build(*flags)
        train_on(run, train_batches(run, 1))
        return rows_of(run)[0]["qwen_grad"]

    plain = first_norm()
    assert plain > 0 and first_norm("--grad_clip", "1e-6") == plain  # clipping comes later
    assert first_norm("--amp", "fp16") == pytest.approx(plain, rel=0.1)  # scaled, it would be 65536 times as large


def test_the_monitor_measures_norm_missing_gradients_and_finiteness() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(3, 1, bias=False)})
    module["used"].bias.requires_grad_(False)
    monitor = GradientMonitor()
    assert monitor.check_gradients(module, "module") == {"norm": 0.0, "missing": 2.0}
    module["used"].weight.grad = torch.tensor([[3.0, 4.0]])
    assert monitor.check_gradients(module, "module") == {"norm": 5.0, "missing": 1.0}
    module["unused"].weight.grad = torch.tensor([[0.0, torch.nan, 0.0]])
    assert not torch.isfinite(torch.as_tensor(monitor.check_gradients(module, "module")["norm"]))
