"""A learned vector a task (arc/latent.py): who has one, when it is left out, and that it is saved and trained."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import SmallBuild, SmallRun, train_batches, train_on
from helpers import differences, load

from arc.episodes import keeps_latent
from arc.latent import TaskLatent
from trainloop_complete_with_fixes import parse_arguments, read_prompt


def test_only_tasks_that_are_trained_on_have_one() -> None:
    latent = TaskLatent(3, 2, 4)
    with torch.no_grad():
        latent.vectors.copy_(torch.arange(24.0).view(3, 2, 4) + 1)
    task = torch.tensor([0, 2, -2, 3, 1 << 40])
    found = latent(task)
    assert torch.equal(found[:2], latent.vectors[[0, 2]]) and not bool(found[2:].any())
    kept = latent(task, torch.tensor([False, True, True, True, True]))
    assert not bool(kept[0].any()) and torch.equal(kept[1], latent.vectors[2])


def test_half_of_the_episodes_go_without_it_whatever_the_order() -> None:
    kept = [keeps_latent(0, 1, index) for index in range(2000)]
    assert 0.45 < sum(kept) / len(kept) < 0.55
    assert kept[7] == keeps_latent(0, 1, 7) and kept != [keeps_latent(0, 2, index) for index in range(2000)]


def test_it_is_part_of_the_prompt_and_learns(small_build: SmallBuild) -> None:
    run = small_build("--task_latent", "--agent_lr", "0.1")
    assert run.latent is not None and len(run.latent.vectors) == len(run.training)
    batches = train_batches(run, 3)
    without, _ = read_prompt(run, batches[0])
    train_on(run, batches)
    kept = {int(task) for batch in batches for task, keep in zip(batch.task, batch.keep, strict=True) if keep}
    moved = {number for number, vector in enumerate(run.latent.vectors) if bool(vector.any())}
    assert moved and moved <= kept
    number = min(moved)
    with torch.no_grad():
        run.latent.vectors[number] += 1.0
    batch = next(batch for batch in batches if number in batch.task.tolist())
    batch.keep[:] = True
    row = batch.task.tolist().index(number)
    changed, _ = read_prompt(run, batch)
    batch.keep[:] = False
    plain, _ = read_prompt(run, batch)
    assert not torch.equal(changed[row], plain[row]) and without.shape[1:] == plain.shape[1:]


def test_a_resumed_run_has_the_same_ones(small_run: SmallRun, tmp_path: Path) -> None:
    flags = ("--task_latent", "--epochs", "2", "--agent_lr", "0.1")
    whole = small_run(tmp_path / "whole", *flags)
    middle = min((tmp_path / "whole").glob("step-*"))
    parts = small_run(tmp_path / "parts", *flags, "--resume", str(middle))
    assert whole.code == parts.code == 0
    one, other = (load(tmp_path / name).state["model"] for name in ("whole", "parts"))
    assert bool(one["latent"]["vectors"].any()) and differences(one, other) == []
    again = small_run(tmp_path / "whole", "--resume", "--eval_only")
    assert again.code == 0
    assert small_run(tmp_path / "other", "--resume", str(middle), "--old").code == 2


def test_a_recipe_is_flags_that_others_override(small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    args, given = parse_arguments(["--recipe", "gpu", "--agent_width", "256"])
    assert (args.adapt, args.task_latent, args.agent_width, args.agent_blocks) == (True, True, 256, 8)
    assert args.val_splits == ("seed", "adapted") and "agent_blocks" not in given
    assert parse_arguments([])[0].agent_blocks == 2
    small = ("--recipe", "gpu", "--agent_width", "32", "--agent_blocks", "1", "--epochs", "1", "--max_batches", "2")
    done = small_run(tmp_path / "run", *small, "--val_views", "1", "--unseen", str(data_dir))
    assert done.code == 0 and "adapted split" in done.stdout


def test_old_settings_are_stronger_than_a_recipe() -> None:
    args, _ = parse_arguments(["--data", "generated", "--old"])
    assert (args.agent_lr, args.qwen_lr, args.agent_width) == (1e-5, 5e-5, 64)
    assert parse_arguments(["--data", "generated", "--old", "--agent_lr", "0.5"])[0].agent_lr == 0.5
