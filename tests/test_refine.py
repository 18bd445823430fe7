"""Choosing and refining prompts at test time (arc/refine.py, --refine_steps, --recall): the demonstrations decide, no
output that is to be predicted enters, and one step is the policy's action."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallBuild, SmallRun
from helpers import FAST, differences, load, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_no_leak import absent, data_with, garbage
from torch import Tensor

from arc.augment import evaluation_views
from arc.batches import PredictionBatch, PredictionData
from arc.refine import Context, best_first, farther, pairs_loss
from arc.splits import NEW
from arc.tasks import Task
from benchmarks import refinement as benchmark
from policy_refined import context_feedback
from trainloop_complete_with_fixes import (
    Run,
    predictor,
    read_prompt,
)

STEPS = 3
LOSSES = st.floats(-10, 10, allow_nan=False, width=32) | st.sampled_from([float("nan"), float("inf")])


# --------------------------------------------------------------------------------------------------------------------
# the choice, on losses that are given
# --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data(), st.integers(0, 5), st.integers(1, 3))
def test_as_many_steps_are_taken_as_do_best_and_none_is_among_them(
    data: st.DataObject, steps: int, groups: int
) -> None:
    """losses (S + 1, G): of each task after 0, 1, ... steps. Prompts count their own steps, from 0."""
    rows = st.lists(LOSSES, min_size=groups, max_size=groups)
    losses = torch.tensor(data.draw(st.lists(rows, min_size=steps + 1, max_size=steps + 1)))

    def judge(prompt: Tensor, _: Context) -> Tensor:
        return losses[prompt[:, 0, 0].long(), torch.arange(groups)]

    taken = farther(torch.zeros(groups, 1, 1), [], lambda p, _: p + 1, judge, steps)[:, 0, 0].long()
    usable = torch.where(losses.isfinite(), losses, torch.inf)
    for task in range(groups):
        best = float(usable[:, task].min())
        assert int(taken[task]) == usable[:, task].tolist().index(best)  # the fewest at a tie


@given(st.data(), st.integers(1, 5), st.integers(1, 3))
def test_prompts_come_in_the_order_of_their_losses(data: st.DataObject, count: int, groups: int) -> None:
    rows = st.lists(LOSSES, min_size=groups, max_size=groups)
    losses = torch.tensor(data.draw(st.lists(rows, min_size=count, max_size=count)))
    prompts = torch.arange(count * groups).view(count, groups, 1, 1).unbind()

    def judge(prompt: Tensor, _: Context) -> Tensor:
        return losses.flatten()[prompt[:, 0, 0]]

    ordered = torch.stack(list(best_first(prompts, [], judge)))[..., 0, 0]  # (n, G) places in the flat losses
    for task in range(groups):
        own = losses[:, task].tolist()
        key = [(loss if np.isfinite(loss) else np.inf, place) for place, loss in enumerate(own)]
        assert (ordered[:, task] // groups).tolist() == [place for _, place in sorted(key)]
        assert (ordered[:, task] % groups).tolist() == [task] * count  # its own prompts and no other's


# --------------------------------------------------------------------------------------------------------------------
# on an agent
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(small_build: SmallBuild) -> Run:
    """Untrained, but with parts that all speak: what starts at zero is noise, as training would make it."""
    run = small_build("--refine_steps", str(STEPS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*run.agent.parameters(), *run.policy.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        run.policy.gradient_square.fill_(1e-4)
    for module in run.modules.values():
        module.eval()
    return run


@pytest.fixture(scope="module")
def batch(run: Run) -> PredictionBatch:
    """The training tasks, and one of them with its first demonstration only."""
    first = run.training[0]
    tasks = [*run.training, Task(f"{first.id}-single", first.train[:1], first.test)]
    data = PredictionData(tasks, run.store, run.qwen.encoder, views=evaluation_views(2), feedback_pairs=2)
    return data[tuple(range(len(tasks)))]


def gradient_steps(run: Run, size: float) -> Any:
    """Steps of `size` against the context's gradient; with a negative size they make the context worse."""

    def act(prompt: Tensor, pairs: Context) -> Tensor:
        gradient = context_feedback(run.agent, pairs, prompt).gradient
        return prompt - size * gradient / (gradient.square().mean((1, 2), keepdim=True).sqrt() + 1e-12)

    return act


@torch.no_grad()
def test_steps_go_on_while_the_demonstrations_gain_and_no_task_ends_worse(run: Run, batch: PredictionBatch) -> None:
    prompt, judge = read_prompt(run, batch)[0], functools.partial(pairs_loss, run.agent)
    act, trail = gradient_steps(run, 0.5), [prompt]
    for _ in range(STEPS):
        trail.append(act(trail[-1], batch.trial))
    best = torch.stack([judge(step, batch.trial) for step in trail]).min(0).values
    found = judge(farther(prompt, batch.trial, act, judge, STEPS), batch.trial)
    assert torch.equal(found, best) and bool((best < judge(prompt, batch.trial)).any())
    assert same_bits(farther(prompt, batch.trial, lambda start, _: start * torch.nan, judge, STEPS), prompt)


@torch.no_grad()
def test_one_step_is_the_policy_s_action_bit_for_bit_and_more_do_not_harm(run: Run, batch: PredictionBatch) -> None:
    prompt, _ = read_prompt(run, batch)
    action = run.policy.refine_prompt(prompt, context_feedback(run.agent, batch.feedback, prompt)).prompt
    several = predictor(run)
    one = dataclasses.replace(several, args=dataclasses.replace(run.args, refine_steps=1))
    nothing = torch.zeros(0, *prompt.shape)
    assert same_bits(one.refine(batch, prompt, nothing), action)
    found = several.refine(batch, prompt, nothing)
    assert not torch.equal(found, action)
    assert bool((several.judge(found, batch.trial) <= several.judge(action, batch.trial)).all())


@torch.no_grad()
def test_what_the_memory_recalls_is_taken_where_it_does_better(run: Run, batch: PredictionBatch) -> None:
    """Each task takes, of its own prompt and three of others, the one that suits its demonstrations best."""
    judge = functools.partial(pairs_loss, run.agent)
    prompt, _ = read_prompt(run, batch)
    better, worse = (gradient_steps(run, size)(prompt, batch.trial) for size in (0.05, -0.5))
    stored = torch.stack((better[0], better[3], worse[1]))
    candidates = [prompt, *(value.expand_as(prompt) for value in stored)]
    best = torch.stack([judge(candidate, batch.trial) for candidate in candidates]).argmin(0).tolist()
    assert 0 in best and len(set(best)) > 2
    chosen = dataclasses.replace(predictor(run), act=None).refine(
        batch, prompt, stored[:, None].expand(-1, *prompt.shape)
    )
    for task, choice in enumerate(best):
        assert same_bits(chosen[task], candidates[choice][task])
    few, acted = predictor(run).refine(batch, prompt, stored[:, None].expand(-1, *prompt.shape)), predictor(run).act
    assert acted is not None
    assert bool((judge(few, batch.trial) <= judge(acted(chosen, batch.feedback), batch.trial)).all())


def test_refining_is_repeatable_and_draws_nothing(run: Run, batch: PredictionBatch) -> None:
    before = torch.get_rng_state()
    new = torch.full((int(batch.task.max()) + 1,), NEW)
    first, second = (predictor(run).batch(new, {}, batch).passes for _ in range(2))
    assert same_bits(torch.get_rng_state(), before)
    for (_, _, a), (_, _, b) in zip(first, second, strict=True):
        assert same_bits(a.size_logits, b.size_logits)
        assert all(same_bits(x, y) for x, y in zip(a.colour_logits, b.colour_logits, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# no output that is to be predicted enters
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [garbage, absent])
def test_predictions_do_not_depend_on_test_outputs_and_training_not_on_the_steps(
    change: Any, small_run: SmallRun, data_dir: Path, tmp_path: Path
) -> None:
    flags = ("--max_batches", "3", "--val_splits", "seed,unseen", "--refine_steps", str(STEPS), *FAST)
    data = data_with(change, data_dir, tmp_path / "data")
    places = {"ours": data_dir, "theirs": data}
    outcomes = [
        small_run(
            tmp_path / name, *flags, "--data", str(at), "--unseen", str(at), "--cache_dir", str(tmp_path / f"c-{name}")
        )
        for name, at in places.items()
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.stderr for outcome in outcomes]
    for split in ("seed", "unseen"):
        first, second = ((tmp_path / name / f"predictions-{split}.json").read_bytes() for name in places)
        assert first == second and len(json.loads(first)) > 1


def test_the_flag_is_for_evaluation_only_and_may_change_on_resume(small_run: SmallRun, tmp_path: Path) -> None:
    flags = ("--max_batches", "3", *FAST)
    one = small_run(tmp_path / "one", *flags)
    several = small_run(tmp_path / "several", *flags, "--refine_steps", str(STEPS))
    assert (one.code, several.code) == (0, 0)
    assert differences(load(one.folder).state["model"], load(several.folder).state["model"]) == []
    again = small_run(tmp_path / "one", "--resume", "--eval_only", "--refine_steps", str(STEPS))
    assert again.code == 0, again.stderr
    name = "predictions-seed.json"
    assert (one.folder / name).read_bytes() == (several.folder / name).read_bytes()


# --------------------------------------------------------------------------------------------------------------------
# the benchmark
# --------------------------------------------------------------------------------------------------------------------


def test_the_benchmark_scores_every_method_and_counts_its_passes(
    small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max_batches", "3", "--val_limit", "1", "--feedback_pairs", "2", *FAST)
    assert small_run(tmp_path / "run", *flags).code == 0
    cache = small_flags[small_flags.index("--cache_dir") + 1]
    capsys.readouterr()
    assert benchmark.main(["--run", str(tmp_path / "run"), "--cache_dir", cache]) == 0
    table = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    found = {row[0]: row for row in rows}
    assert "### demonstrations: 6 tasks, 6 pairs" in table
    passes = {
        name: [float(n) for n in re.findall(r"[\d.]+", row[4])]
        for name, row in found.items()
        if re.match(r"\d.*\+", row[4])
    }
    assert passes["**policy**"] == passes["gradient, step 0.3, 1"] == [2, 2]  # two feedback pairs, there and back
    assert passes["gradient, step 1, 10"] == [20, 20]
    assert passes["random, best of 4 on the context"] == [10, 0]
    # Three demonstrations are left of four: four steps on all, and five times judged.
    for name in ("gradient, step 0.3, up to 4, best on all", "policy, up to 4, best on all"):
        assert passes[name] == [3 * (4 + 5), 3 * 4]
    assert len(passes) == 4 * len(benchmark.STEPS) + 2 + len(benchmark.TRIES) + 4


def test_the_benchmark_names_what_it_does_not_have(small_run: SmallRun, tmp_path: Path) -> None:
    assert small_run(tmp_path / "run", "--max_batches", "1", "--val_limit", "1").code == 0
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--run", str(tmp_path / "run"), "--splits", "unseen"])
