"""Refinement steps at test time (arc/refine.py, --refine_steps): their number is what held-out demonstrations find
best, no output that is to be predicted enters, and one step is the policy's action."""

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
from arc.batches import MAX_FOLDS, Folds, PredictionBatch, PredictionData, QueryBatch, TensorBundle
from arc.refine import Context, Refinement, best_first, cross_fitted, pairs_loss
from arc.splits import NEW
from arc.tasks import Pair, Task
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


def choose(losses: Tensor, owners: list[int], groups: int) -> Refinement:
    """What is chosen where the folds' losses after 0, 1, ... steps are the rows of `losses` (S + 1, P). Prompts count
    their own steps, from 0."""
    folds = Folds(task=torch.tensor(owners, dtype=torch.long), learn=[], judge=[])

    def judge(prompt: Tensor, _: Context) -> Tensor:
        return losses[prompt[:, 0, 0].long(), torch.arange(len(prompt))]

    return cross_fitted(torch.zeros(groups, 1, 1), [], folds, lambda p, _: p + 1, judge, len(losses) - 1)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_the_number_of_steps_is_the_best_on_held_out_pairs_and_none_is_among_them(
    data: st.DataObject, steps: int, folds: list[int]
) -> None:
    owners = [task for task, count in enumerate(folds) for _ in range(count)]
    rows = st.lists(LOSSES, min_size=len(owners), max_size=len(owners))
    losses = torch.tensor(data.draw(st.lists(rows, min_size=steps + 1, max_size=steps + 1)))
    chosen = choose(losses, owners, len(folds))
    assert torch.equal(chosen.prompt[:, 0, 0].long(), chosen.steps)  # the prompt has taken just so many
    for task in range(len(folds)):
        mean = losses[:, [fold for fold, owner in enumerate(owners) if owner == task]].mean(1)
        taken = int(chosen.steps[task])
        if not bool(torch.isfinite(mean).any()):
            assert taken == 0
        else:
            assert float(mean[taken]) <= float(mean[torch.isfinite(mean)].min()) + 1e-5


def test_ties_go_to_fewer_steps_and_a_task_without_folds_takes_one() -> None:
    losses = torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, 0.4], [1.0, 1.0, 0.3], [1.0, 3.0, 0.9]])
    chosen = choose(losses, [0, 1, 3], groups=4)
    assert chosen.steps.tolist() == [0, 1, 1, 2]
    assert bool(chosen.held_out[:, 2].isnan().all())


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


def fetched(run: Run, tasks: list[Task], *, folds: bool = True) -> PredictionBatch:
    data = PredictionData(tasks, run.store, run.qwen.encoder, views=evaluation_views(2), feedback_pairs=2, folds=folds)
    return data[tuple(range(len(tasks)))]


def single(task: Task) -> Task:
    """The task with its first demonstration only."""
    return Task(f"{task.id}-single", task.train[:1], task.test)


@pytest.fixture(scope="module")
def batch(run: Run) -> PredictionBatch:
    return fetched(run, [*run.training, single(run.training[0])])


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested bundles and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, TensorBundle):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, list) else []


def equal(a: Any, b: Any) -> bool:
    first, second = tensors_of(a), tensors_of(b)
    return len(first) == len(second) > 0 and all(same_bits(x, y) for x, y in zip(first, second, strict=True))


def gradient_steps(run: Run, size: float) -> Any:
    """Steps of `size` against the context's gradient; with a negative size they make the context worse."""

    def act(prompt: Tensor, pairs: Context) -> Tensor:
        gradient = context_feedback(run.agent, pairs, prompt).gradient
        return prompt - size * gradient / (gradient.square().mean((1, 2), keepdim=True).sqrt() + 1e-12)

    return act


@torch.no_grad()
def refine(run: Run, batch: PredictionBatch, prompt: Tensor, act: Any) -> Refinement:
    assert batch.folds is not None
    return cross_fitted(
        prompt, batch.feedback, batch.folds, act, lambda p, pairs: pairs_loss(run.agent, p, pairs), STEPS
    )


def test_refined_is_never_worse_than_unrefined_on_the_pairs_that_judge(run: Run, batch: PredictionBatch) -> None:
    prompt, _ = read_prompt(run, batch)
    assert batch.folds is not None
    found = refine(run, batch, prompt.detach(), gradient_steps(run, 0.5))
    several = torch.bincount(batch.folds.task, minlength=len(prompt)) > 0
    assert several.tolist() == [True] * len(run.training) + [False]
    best = found.held_out.gather(0, found.steps[None])[0][several]
    assert bool((best <= found.held_out[0][several]).all()) and bool((best < found.held_out[0][several]).any())
    # The losses are those of the held-out demonstrations: made again here from prompts refined fold by fold.
    trial = prompt.detach()[batch.folds.task]
    for held_out in found.held_out:
        losses = pairs_loss(run.agent, trial, batch.folds.judge)
        for task in range(len(run.training)):
            assert float(losses[batch.folds.task == task].mean()) == pytest.approx(float(held_out[task]), rel=1e-4)
        trial = gradient_steps(run, 0.5)(trial, batch.folds.learn)


def test_steps_that_help_nowhere_are_dropped(run: Run, batch: PredictionBatch) -> None:
    prompt = read_prompt(run, batch)[0].detach()

    def away(start: Tensor, _: Context) -> Tensor:
        return start * torch.nan

    found = refine(run, batch, prompt, away)
    assert found.steps.tolist() == [0] * len(run.training) + [1]  # the last one has nothing to be judged by
    assert same_bits(found.prompt[:-1], prompt[:-1])


def test_one_step_is_the_policy_s_action_bit_for_bit(run: Run, batch: PredictionBatch) -> None:
    with torch.no_grad():
        prompt, _ = read_prompt(run, batch)
        action = run.policy.refine_prompt(prompt, context_feedback(run.agent, batch.feedback, prompt)).prompt
        plain = fetched(run, [*run.training, single(run.training[0])], folds=False)
        assert plain.folds is None and equal(plain.query, batch.query) and equal(plain.feedback, batch.feedback)
        assert same_bits(predictor(run).refined(plain, prompt), action)
        several = predictor(run).refined(batch, prompt)
    assert same_bits(several[-1], action[-1])  # the task with a single demonstration stops at the first
    assert not torch.equal(several, action)


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
    few = predictor(run).refine(batch, prompt, stored[:, None].expand(-1, *prompt.shape))
    assert bool((judge(few, batch.trial) <= judge(predictor(run).refined(batch, chosen), batch.trial)).all())


def test_refining_is_repeatable_and_draws_nothing(run: Run, batch: PredictionBatch) -> None:
    before = torch.get_rng_state()
    new = torch.full((int(batch.task.max()) + 1,), NEW)
    first, second = (predictor(run).batch(new, {}, batch).passes for _ in range(2))
    assert same_bits(torch.get_rng_state(), before)
    for (_, _, a), (_, _, b) in zip(first, second, strict=True):
        assert equal([*a.colour_logits, a.size_logits], [*b.colour_logits, b.size_logits])


# --------------------------------------------------------------------------------------------------------------------
# no output that is to be predicted enters
# --------------------------------------------------------------------------------------------------------------------


def of_fold(batches: list[QueryBatch], fold: int) -> list[Tensor]:
    """What the queries of one fold hold, without the padding that other queries in their batch give them."""
    parts = [query.rows(query.owner == fold) for query in batches]
    columns = [
        (p.codes[p.valid], p.table_stats, p.vote_weight, p.rule_sizes, p.rule_logits, p.target_grid, p.input_grid)
        for p in parts
    ]
    return [torch.cat(column) for column in zip(*columns, strict=True)]


def test_a_fold_learns_nothing_from_the_output_that_judges_it(run: Run) -> None:
    """Another output for demonstration 1 changes what fold 1 is judged by, and the feedback of fold 0, which may know
    it; the feedback of fold 1 stays bit for bit."""
    task = next(task for task in run.training if task.id == "flip")
    pair = task.train[1]
    assert pair.output is not None
    changed = Pair(pair.input, ((pair.output + 3) % 10).astype(np.uint8)[:, :-1])
    other = Task("changed", (task.train[0], changed, *task.train[2:]), task.test)
    ours, theirs = (fetched(run, [task]).folds for task in (task, other))
    assert ours is not None and theirs is not None
    assert ours.task.tolist() == [0] * min(MAX_FOLDS, len(task.train))

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))

    assert len(torch.cat([query.owner for query in ours.learn])) == 2 * len(ours.task)
    assert same(of_fold(ours.learn, 1), of_fold(theirs.learn, 1))
    assert not same(of_fold(ours.judge, 1), of_fold(theirs.judge, 1))
    assert not same(of_fold(ours.learn, 0), of_fold(theirs.learn, 0))


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


def test_steps_without_a_policy_are_refused(small_run: SmallRun, tmp_path: Path) -> None:
    refused = small_run(tmp_path / "run", "--no_policy", "--refine_steps", "2")
    assert refused.code == 2 and refused.stderr.count("\n") == 1 and "--refine_steps 2" in refused.stderr


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
    # Three demonstrations are left of four, each judged five times after four steps of two pairs; then up to four more.
    for name in ("gradient, step 0.3, up to 4 cross-fitted", "policy, up to 4 cross-fitted"):
        forward, backward = passes[name]
        assert 3 * (5 + 4 * 2) <= forward <= 3 * (5 + 4 * 2) + 4 * 2 and backward == forward - 3 * 5
    assert len(passes) == 4 * len(benchmark.STEPS) + 2 + len(benchmark.TRIES) + 4


def test_the_benchmark_names_what_it_does_not_have(small_run: SmallRun, tmp_path: Path) -> None:
    assert small_run(tmp_path / "run", "--max_batches", "1", "--val_limit", "1").code == 0
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--run", str(tmp_path / "run"), "--splits", "unseen"])
