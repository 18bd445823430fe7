"""Tasks whose pairs are drawn anew for each episode: what an episode holds, that it is a function of its number alone,
and that nothing a validation asks is ever among it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallBuild, SmallRun, train_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from arc.augment import Augmentation
from arc.batches import PredictionData
from arc.datasets import load_dataset
from arc.drawn import APART, DrawnTasks, ManyPairs
from arc.episodes import Drawn, drawn_batches, epoch_order, source_of
from arc.generate import BASIC, FAMILIES, generated_dataset, origin
from arc.generate.family import is_test_input
from arc.run.files import UserError
from arc.tasks import Task
from trainloop_complete_with_fixes import main, parse_arguments

GENERATED = ("--data", "generated", "--families", "flip,crop", "--max_side", "6", "--no_evidence", "--tasks", "3")
DRAWN = (*GENERATED, "--queries", "3", "--episodes", "6", "--batch_size", "6", "--unseen", "generated")


@given(
    epoch=st.integers(0, 50),
    index=st.integers(0, 5000),
    tasks=st.sampled_from([0, 1, 3]),
    augment=st.sampled_from(["none", "full"]),
)
@settings(max_examples=40, deadline=None)
def test_an_episode_is_a_task_with_a_few_pairs_to_read_and_many_to_answer(
    epoch: int, index: int, tasks: int, augment: str
) -> None:
    source = DrawnTasks(BASIC, tasks, pairs=3, max_side=6, seed=1, queries=5, augment=augment)
    number, task = source.episode(epoch, index)
    again, same = source.episode(epoch, index)
    assert (number, task.digest) == (again, same.digest) and source.episode(epoch, index + 1)[1].digest != task.digest
    assert (len(task.train), len(task.test)) == (3, 5)
    family, _ = origin(task.id) or ("", 0)
    assert family in BASIC
    if augment == "none":
        assert not any(is_test_input(pair.input) for pair in (*task.train, *task.test))
    assert max(max(pair.input.shape) for pair in task.train) <= 6


def test_a_turn_takes_every_known_task_once_and_keeps_its_rule() -> None:
    source = DrawnTasks(("shift", "fill"), 4, pairs=2, max_side=6, seed=0, queries=2)
    known = {task.id: task for task in generated_dataset(("shift", "fill"), 4, 2, 6, 0).training}
    turns = [[source.episode(0, index) for index in range(8 * turn, 8 * turn + 8)] for turn in range(2)]
    assert [number for number, _ in turns[0]] != [number for number, _ in turns[1]]
    for turn in turns:
        assert sorted(number for number, _ in turn) == list(range(8))
        for number, task in turn:
            assert task.id == list(known)[4 * ("fill-" in task.id) + number % 4] or task.id in known
            family, index = origin(task.id) or ("", 0)
            rule, fixed = FAMILIES[family].rule, FAMILIES[family].fixed(0, index)
            for pair in (*task.train, *task.test):
                assert pair.output is not None and np.array_equal(rule(pair.input, fixed), pair.output)
            shown = {(pair.input.shape, pair.input.tobytes()) for pair in known[task.id].train}
            asked = {(pair.input.shape, pair.input.tobytes()) for pair in task.test}
            assert len(asked - shown) > 0


def test_the_number_of_a_known_task_is_its_place_among_the_training_tasks() -> None:
    source = DrawnTasks(BASIC, 3, pairs=2, max_side=6, seed=0, queries=1)
    training = {task.id for task in generated_dataset(BASIC, 3, 2, 6, 0).training}
    places = {task.id: number for number, task in (source.episode(0, index) for index in range(36))}
    assert places.keys() == training
    assert places == {task_id: place for place, task_id in enumerate(sorted(training))}


def test_an_epoch_has_every_episode_once() -> None:
    batches = drawn_batches(11, 4)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert [one.index for batch in batches for one in batch] == list(range(11))
    assert drawn_batches(2, 1) == [(Drawn(0),), (Drawn(1),)]


@pytest.mark.parametrize(("max_side", "episodes"), [("6", 16), ("20", 7), ("30", 3)])
def test_large_grids_are_asked_as_often(max_side: str, episodes: int) -> None:
    """In smaller batches, and only as many as will be trained on are made."""
    flags = ("--data", "generated", "--max_side", max_side, "--max_batches", "5", "--episodes", str(2**20))
    order = epoch_order(parse_arguments(flags)[0], (), 0)
    assert [len(batch) for batch in order] == [episodes] * 5 and order[1][0] == Drawn(episodes)


def test_a_batch_of_drawn_episodes(small_build: SmallBuild) -> None:
    run = small_build(*DRAWN)
    batch = train_batches(run, 1)[0]
    assert len(batch.query) == 6 and batch.query.owner.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.way_back.owner.tolist() == [0, 1] and batch.refined.tolist() == [0, 3]
    assert torch.equal(batch.way_back.target_grid, batch.query.input_grid[[0, 3]])
    assert torch.equal(batch.way_back.input_grid, batch.query.target_grid[[0, 3]])
    assert bool((batch.query.dihedral == 0).all()) and sum(map(len, batch.feedback)) == 2
    assert bool((batch.query.canvas >= batch.query.target_size).all()), "no room for an answer"


@pytest.mark.parametrize("tasks", ["0", "3"])
def test_it_trains_validates_and_goes_on_where_it_was_stopped(small_run: SmallRun, tmp_path: Path, tasks: str) -> None:
    flags = (*DRAWN, "--tasks", tasks, "--val_splits", "seed,unseen,families", "--epochs", "2")
    whole = small_run(tmp_path / "whole", *flags)
    assert whole.code == 0
    assert ("Seed split: there is no task in it" in whole.stdout) == (tasks == "0")
    rows = whole.epochs
    assert ("val.split" in rows[-1]) and rows[-1]["val.split"] == ("seed" if tasks == "3" else "unseen")
    assert any(".family.crop" in key for key in rows[-1]) and any(key.startswith("val.families.") for key in rows[-1])
    part = small_run(tmp_path / "part", *flags, "--epochs", "1")
    assert part.code == 0
    again = small_run(tmp_path / "part", *flags, "--resume")
    assert again.code == 0
    assert [row["queries"] for row in again.batches] == [row["queries"] for row in whole.batches]


def many_pairs(folder: Path, outputs: int) -> Path:
    """Two tasks as public generators write them, a list of pairs each."""
    rng = np.random.default_rng(3)
    for name in ("one", "two"):
        grids = [rng.integers(0, 10, rng.integers(2, 5, 2)) for _ in range(30)]
        pairs = [{"input": grid.tolist(), "output": grid[::-1].tolist()} for grid in grids]
        path = folder / "training" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        test = {"input": [[1]], "output": [[outputs]]}
        path.write_text(json.dumps({"train": pairs, "test": [test]}))
    return folder


def test_extra_tasks_are_trained_on_and_never_validated(small_build: SmallBuild, tmp_path: Path) -> None:
    extra = ("--queries", "5", "--pairs", "3", "--episodes", "4", "--extra_data")
    runs = [small_build(*extra, str(many_pairs(tmp_path / str(n), outputs=n))) for n in (2, 3)]
    plain = small_build()
    validated = [[task.digest for split in run.splits for task in split.tasks] for run in (runs[0], plain)]
    assert validated[0] == validated[1] != []
    batches = [train_batches(run, 100) for run in runs]
    added = [batch for batch in batches[0] if int(batch.task.min()) >= APART]
    assert sum(len(batch.task) for batch in added) == 4
    assert sum(len(batch.query) for batch in added) == 4 * 5 and len(batches[0]) > len(added)
    for batch in added:
        assert batch.query.silent and not bool(batch.query.codes.any())
        assert torch.equal(batch.query.target_size, batch.query.in_size)
    # what stands as their test output reaches nothing
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.context_ids, other.context_ids) and torch.equal(one.query.target, other.query.target)
    extra_run = small_build("--extra_data", "generated", "--max_side", "6", "--tasks", "0", "--episodes", "3")
    assert sum(int((batch.task >= APART).sum()) for batch in train_batches(extra_run, 100)) == 3


def test_extra_data_has_nothing_of_what_is_validated(small_build: SmallBuild, data_dir: Path, tmp_path: Path) -> None:
    """The same tasks under other names, and files of many pairs of theirs: no new task is trained on, and no
    demonstration that starts from an asked input; under --dev that is the demonstration held out."""
    copies = tmp_path / "copies"
    for path in data_dir.rglob("*.json"):
        task = json.loads(path.read_text())
        renamed = copies / "training" / f"copy-of-{path.stem}.json"
        renamed.parent.mkdir(parents=True, exist_ok=True)
        renamed.write_text(json.dumps({"train": task["train"] + task["test"], "test": [{"input": [[1]]}]}))
    for path in many_pairs(tmp_path / "generator", outputs=1).rglob("one.json"):
        path.rename(copies / "training" / "turn.json")  # new inputs of an evaluation task, told by its id
    for flags, held_back in (
        (("--val_splits", "seed,unseen", "--unseen", str(data_dir)), {"turn", "copy-of-turn", "copy-of-up"}),
        (("--dev", "--dev_tasks", "2"), set()),
    ):
        run = small_build("--data", str(data_dir), "--extra_data", str(copies), *flags)
        new = {task.id.rpartition("-")[0] for split in run.splits if split.name == "dev_unseen" for task in split.tasks}
        names = {task.id for task in run.extra}
        assert len(new) == (2 if "--dev" in flags else 0)
        assert names and not names & (held_back | {f"copy-of-{name}" for name in new})
        asked = {pair.input.tobytes() for split in run.splits for task in split.tasks for pair in task.test}
        assert asked and not asked & {pair.input.tobytes() for task in run.extra for pair in task.train}
    with pytest.raises(UserError, match="--extra_data .* all that is in it is held back"):
        for path in (copies / "training").glob("copy-of-*"):
            path.unlink()
        small_build(
            "--data", str(data_dir), "--extra_data", str(copies), "--val_splits", "unseen", "--unseen", str(data_dir)
        )


@pytest.mark.parametrize("tasks", ["0", "2"])
def test_generated_tasks_may_be_validated_on_others(
    tasks: str, small_run: SmallRun, data_dir: Path, tmp_path: Path
) -> None:
    """--unseen with a data set of its own; the default splits then have no new families."""
    shape = ("--families", "flip", "--max_side", "6", "--no_evidence", "--tasks", tasks, "--queries", "3")
    flags = ("--data", "generated", *shape, "--episodes", "2", "--batch_size", "6", "--unseen", str(data_dir))
    outcome = small_run(tmp_path / "run", *flags, "--epochs", "1")
    assert outcome.code == 0, outcome.stderr
    assert {name for name in ("seed", "unseen") if f"{name} split" in outcome.stdout} == (
        {"unseen"} if tasks == "0" else {"seed", "unseen"}
    )
    assert "families split" not in outcome.stdout and outcome.epochs[-1]["val.split"] in ("seed", "unseen")


def test_extra_generated_tasks_are_not_turned_into_those_held_back(small_build: SmallBuild) -> None:
    flags = ("--extra_data", "generated", "--families", "flip", "--tasks", "2")
    apart, free = small_build(*flags, "--unseen", "generated"), small_build(*flags)
    sources = [source_of(run.args, run.extra) for run in (apart, free)]
    assert [isinstance(source, DrawnTasks) and source.augment for source in sources] == ["none", "full"]


def test_pairs_are_drawn_from_a_file_anew(tmp_path: Path) -> None:
    tasks = load_dataset(str(many_pairs(tmp_path, outputs=1))).training
    source = ManyPairs(tasks, pairs=3, seed=0, queries=6)
    seen = [source.episode(0, index) for index in range(8)]
    assert [number - APART for number, _ in seen[:2]] in ([0, 1], [1, 0])
    for _, task in seen:
        pairs = [(pair.input.tobytes(), pair.input.shape) for pair in (*task.train, *task.test)]
        assert (len(task.train), len(task.test)) == (3, 6) and len(set(pairs)) == 9
    assert len({task.digest for _, task in seen}) == 8
    assert source.episode(0, 3)[1].digest == seen[3][1].digest


def test_a_generators_list_of_pairs_is_drawn_from_whole(small_build: SmallBuild, tmp_path: Path) -> None:
    """As data the same folder has tasks of four demonstrations; the last pair, which it is validated on, is never
    drawn, not even where it stands in the list a second time."""
    folder = tmp_path / "lists"
    folder.mkdir()
    grids = [np.array([[number // 10, number % 10], [3, 4]]) for number in (*range(19), 5, 20)]
    pairs = [{"input": grid.tolist(), "output": grid[::-1].tolist()} for grid in (grids[20], *grids)]
    (folder / "one.json").write_text(json.dumps(pairs))
    run = small_build("--data", str(folder), "--extra_data", str(folder), "--queries", "6", "--episodes", "30")
    (known,) = run.training
    assert len(known.train) == 4 and known.test[0].input.tolist() == pairs[-1]["input"]
    source = source_of(run.args, run.extra)
    assert isinstance(source, ManyPairs) and len(source.known[0].train) == 20
    drawn = [pair for index in range(30) for pair in source.episode(0, index)[1].train]
    assert len({pair.input.tobytes() for pair in drawn}) > 10
    asked = {pair.input.tobytes() for index in range(30) for pair in source.episode(0, index)[1].test}
    assert known.test[0].input.tobytes() not in asked | {pair.input.tobytes() for pair in drawn}


def test_extra_tasks_are_not_unseen_later_either(small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    """An evaluation of the trained model may name others as unseen than the training did."""
    extra = many_pairs(tmp_path / "extra", outputs=2)
    flags = ("--extra_data", str(extra), "--episodes", "2", "--max_batches", "1", "--val_limit", "2")
    unseen = ("--val_splits", "unseen", "--unseen", str(data_dir))
    assert small_run(tmp_path / "run", *flags, *unseen).code == 0
    shutil.copytree(extra / "training", tmp_path / "both" / "evaluation")
    pairs = [{"input": [[n, 1]], "output": [[1, n]]} for n in range(3)]
    task = {"train": pairs[:2], "test": pairs[2:]}
    (tmp_path / "both" / "evaluation" / "new.json").write_text(json.dumps(task))
    asked = ("--eval_only", "--resume", "--unseen")
    done = small_run(tmp_path / "run", *asked, str(tmp_path / "both"))
    assert done.code == 0 and "Unseen split: 2 of 3 tasks were trained on: left out" in done.stdout, done.stderr
    assert done.epochs[-1]["val.pairs"] == 1
    (tmp_path / "both" / "evaluation" / "new.json").unlink()
    none = small_run(tmp_path / "run", *asked, str(tmp_path / "both"))
    assert none.code == 2 and "were trained on" in none.stderr and none.stderr.count("\n") == 1


def test_extra_data_that_cannot_be_trained_on(
    small_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is written; on resume, so is a file that has changed."""
    run, lists = str(tmp_path / "run"), tmp_path / "lists.json"
    pairs = [{"input": [[number, 1]], "output": [[1, number]]} for number in range(6)]
    lists.write_text(json.dumps([pairs[0], pairs[0]]))
    for spec, words in (("nope", "--extra_data: data 'nope'"), (str(lists), "no training task with two")):
        assert main([*small_flags, "--extra_data", spec, "--output_dir", run]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not Path(run).exists()
    assert main([*small_flags, "--data", "generated", "--extra_data", "generated", "--output_dir", run]) == 2
    lists.write_text(json.dumps(pairs))
    flags = [*small_flags, "--extra_data", str(lists), "--max_batches", "1", "--val_limit", "1", "--output_dir", run]
    assert main(flags) == 0
    lists.write_text(json.dumps(pairs[1:]))
    assert main([*flags, "--resume", "--epochs", "2"]) == 2 and "other data" in capsys.readouterr().err
    lists.unlink()
    assert main(["--eval_only", "--resume", run, "--device", "cpu", *small_flags[-4:]]) == 0


def test_a_trained_model_is_scored_on_other_drawn_tasks(small_run: SmallRun, tmp_path: Path) -> None:
    assert small_run(tmp_path / "run", *DRAWN, "--max_batches", "1", "--val_limit", "1").code == 0
    shape = ("--families", "outline", "--tasks", "1", "--max_side", "8", "--pairs", "2", "--batch_size", "6")
    other = ("--data", "generated", *shape)
    done = small_run(tmp_path / "run", "--eval_only", "--resume", *other, "--seed", "3")
    assert done.code == 0, done.stderr
    assert "new tasks (told by their inputs, none of them was trained on)" in done.stdout
    assert re.search(r"\n\[Epoch 0\]   by family: outline \d\.\d\d\n", done.stdout)  # and none that was not asked for
    assert small_run(tmp_path / "run", "--resume", *other).code == 2  # else it would change the maths


def test_nothing_that_a_validation_asks_is_trained_on(small_build: SmallBuild) -> None:
    """Nor does a task's id, which tells its family, reach a batch."""
    run = small_build(*DRAWN)
    source = DrawnTasks(run.args.families, run.args.tasks, run.args.pairs, run.args.max_side, 0, 3)
    data = PredictionData(
        run.splits[0].tasks, run.store, run.qwen.encoder, views=(Augmentation.IDENTITY,), feedback_pairs=1
    )
    renamed = tuple(Task("x" + str(n), task.train, task.test) for n, task in enumerate(run.splits[0].tasks))
    other = PredictionData(renamed, run.store, run.qwen.encoder, views=(Augmentation.IDENTITY,), feedback_pairs=1)
    one, two = data[(0, 1)], other[(0, 1)]
    assert torch.equal(one.context_ids, two.context_ids) and torch.equal(one.query[0].codes, two.query[0].codes)
    assert all(bool((query.target < 0).all()) for query in one.query)
    asked = {pair.input.tobytes() for split in run.splits for task in split.tasks for pair in task.test}
    for index in range(12):
        _, task = source.episode(0, index)
        assert not asked & {pair.input.tobytes() for pair in (*task.train, *task.test)}
