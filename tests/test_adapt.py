"""--adapt: the evaluation tasks' demonstration pairs are trained on, their test outputs never."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, SmallBuild, SmallRun
from helpers import FAST, Tripwire, differences_of_runs, everything_below, load, run_into, timeless

from arc.datasets import load_dataset
from arc.episodes import epoch_batches
from arc.splits import NEW, adapted_tasks
from arc.tasks import Pair, Task
from trainloop_complete_with_fixes import parse_arguments

Json = dict[str, Any]
LABEL = "adapted split (evaluation tasks whose demonstration pairs were trained on): pass@1"


@pytest.fixture(scope="module")
def adapted(small_run: SmallRun, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two epochs with --adapt, evaluation tasks from the same folder; not to be written to."""
    flags = ("--epochs", "2", "--adapt", "--unseen", str(data_dir), *FAST)
    outcome = small_run(tmp_path_factory.mktemp("adapted") / "run", *flags)
    assert outcome.code == 0, outcome.stderr
    return outcome


# --------------------------------------------------------------------------------------------------------------------
# flags
# --------------------------------------------------------------------------------------------------------------------


def test_the_splits_follow() -> None:
    assert parse_arguments([])[0].val_splits == ("seed",)
    assert parse_arguments(["--adapt"])[0].val_splits == ("seed", "adapted")
    assert parse_arguments(["--adapt", "--val_splits", "adapted"])[0].val_splits == ("adapted",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--adapt", "--val_splits", "seed,unseen"), ["--val_splits unseen", "--adapt", "nothing is unseen"]),
        (("--val_splits", "seed,adapted"), ["--val_splits adapted needs --adapt"]),
    ],
)
def test_splits_that_would_not_be_what_they_say(
    flags: tuple[str, ...], words: list[str], small_run: SmallRun, tmp_path: Path
) -> None:
    refused = small_run(tmp_path / "run", *flags)
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert all(word in refused.stderr for word in words)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------------
# what is trained on
# --------------------------------------------------------------------------------------------------------------------


def test_every_demonstration_is_an_episode_once_an_epoch(small_build: SmallBuild, data_dir: Path) -> None:
    """The evaluation tasks' too, as often as the others'."""
    run = small_build("--adapt", "--unseen", str(data_dir))
    names = [task.id for task in run.training]
    assert names == ["count", "crop", "flip", "random", "recolour", "sort", "turn", "up"]
    seed, adapted = run.splits
    assert (seed.name, [task.id for task in seed.tasks], seed.numbers) == ("seed", names[:6], tuple(range(6)))
    assert (adapted.name, [task.id for task in adapted.tasks], adapted.numbers) == ("adapted", names[6:], (6, 7))
    batches = epoch_batches(run.training, seed=0, epoch=1, batch_size=8, views=2, max_cells=6144)
    seen = Counter((run.training[e.task].id, e.held_out) for batch in batches for e in batch)
    assert seen == {(name, pair): 1 for name in names for pair in range(4)}


def test_the_split_is_trained_on_scored_and_labelled(adapted: Outcome) -> None:
    assert "8 training tasks, 32 episodes x 2 views\n" in adapted.stdout
    assert " of 2 adapted tasks with " in adapted.stdout
    assert LABEL in adapted.stdout and "seed split (test pairs of the training tasks)" in adapted.stdout
    assert "unseen" not in adapted.stdout
    row = adapted.epochs[-1]
    assert row["val.adapted.pairs"] == 4 and row["val.pairs"] == 11
    assert json.loads((adapted.folder / "predictions-adapted.json").read_text()).keys() == {"turn", "up"}


def test_a_puzzle_in_both_sets_is_trained_on_once(
    small_build: SmallBuild, small_run: SmallRun, data_dir: Path, tmp_path: Path
) -> None:
    """A training task that is an evaluation task with its pairs in another order: the evaluation set's copy stays, or
    what is a test pair there would be a demonstration here."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    task = json.loads((data / "evaluation" / "turn.json").read_text())
    pairs = task["test"] + task["train"]
    (data / "training" / "aaa.json").write_text(json.dumps({"train": pairs[:4], "test": pairs[4:]}))
    run = small_build("--data", str(data), "--adapt", "--unseen", str(data))
    assert [task.id for task in run.training] == ["count", "crop", "flip", "random", "recolour", "sort", "turn", "up"]
    outcome = small_run(tmp_path / "run", "--data", str(data), "--adapt", "--unseen", str(data), "--max_batches", "1")
    assert "1 of 7 training tasks are also among the 2 evaluation tasks and are trained on once" in outcome.stdout


def test_twins_among_the_evaluation_tasks(data_dir: Path) -> None:
    """Trained on once; not at all where one shows what the other is asked."""
    up, turn = (load_dataset(str(data_dir)).evaluation[i] for i in (1, 0))
    again = Task("again", up.train, up.test)
    assert adapted_tasks([up, again, turn], 10) == ((up, turn), (10, 10, 11))
    shows = Task("shows", (*up.train[1:], up.test[0]), (Pair(up.train[0].input, None),))
    assert adapted_tasks([shows, turn, up], 10) == ((turn,), (NEW, 10, NEW))
    assert adapted_tasks([], 10) == ((), ())


@pytest.mark.parametrize("flags", [(), ("--dev", "--dev_tasks", "1")])
def test_twins_among_the_training_tasks(
    flags: tuple[str, ...], small_build: SmallBuild, data_dir: Path, tmp_path: Path
) -> None:
    """Copies of a puzzle that leave another pair out each: what one is asked no other shows."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    task = json.loads((data / "training" / "flip.json").read_text())
    pairs = task["train"] + task["test"]
    for number in range(3):
        copy = {"train": pairs[:number] + pairs[number + 1 :], "test": [pairs[number]]}
        (data / "training" / f"flip{number}.json").write_text(json.dumps(copy))
    run = small_build("--data", str(data), *flags)
    (split,) = (split for split in run.splits if split.name in ("seed", "dev_seen"))
    copies = [task for task in run.training if task.id.startswith("flip")]
    assert 0 < len(copies) < 4 and split.tasks == run.training[: len(split.tasks)]
    for one in copies:
        asked = {pair.input.tobytes() for other in copies if other is not one for pair in other.test}
        assert not asked & {pair.input.tobytes() for pair in one.train}
    assert run.log.folder is not None
    assert flags or "Left out: 3 of 9 tasks" in (run.log.folder / "train.log").read_text()


def test_evaluation_tasks_alone(small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    """A Kaggle test file: its demonstrations are trained on, its tasks predicted, nothing scored."""
    tasks = {file.stem: json.loads(file.read_text()) for file in (data_dir / "evaluation").glob("*.json")}
    for task in tasks.values():
        task["test"] = [{"input": pair["input"]} for pair in task["test"]]
    path = tmp_path / "arc-agi_test_challenges.json"
    path.write_text(json.dumps(tasks))
    submission = tmp_path / "submission.json"
    flags = ("--data", str(path), "--adapt", "--submission", str(submission))
    outcome = small_run(tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.stderr
    assert "2 training tasks, 8 episodes x 2 views\n" in outcome.stdout
    assert "adapted split (evaluation tasks whose demonstration pairs were trained on): no solutions" in outcome.stdout
    assert sorted(json.loads(submission.read_text())) == ["turn", "up"]
    assert not (outcome.folder / "predictions-seed.json").exists()

    empty = small_run(tmp_path / "other", *flags, "--val_splits", "seed")
    assert empty.code == 2 and "--val_splits seed" in empty.stderr and empty.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------------------------
# checkpoints
# --------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_the_uninterrupted_one(
    adapted: Outcome, small_run: SmallRun, small_flags: tuple[str, ...], data_dir: Path, tmp_path: Path
) -> None:
    flags = ("--epochs", "2", "--adapt", "--unseen", str(data_dir), *FAST)
    wire = Tripwire("[Batch    2]", 2, signal.SIGINT)
    assert run_into(wire, [*small_flags, *flags, "--output_dir", str(tmp_path / "run")]) == 130
    # --adapt and its splits come from the checkpoint
    resumed = small_run(tmp_path / "run", "--epochs", "2", "--resume")
    assert resumed.code == 0, resumed.stderr
    assert timeless(resumed.rows) == timeless(adapted.rows)
    assert differences_of_runs(resumed.folder, adapted.folder) == []


def test_scored_again(adapted: Outcome, small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    """By --eval_only, as the split it was; and in another file, as known tasks with the same attempts."""
    folder = shutil.copytree(adapted.folder, tmp_path / "run")
    before = json.loads((folder / "predictions-adapted.json").read_text())
    again = small_run(folder, "--eval_only", "--resume", "latest")
    assert again.code == 0 and LABEL in again.stdout
    assert json.loads((folder / "predictions-adapted.json").read_text()) == before
    other = small_run(folder, "--eval_only", "--resume", "latest", "--data", str(data_dir / "evaluation"))
    assert other.code == 0 and "new tasks" not in other.stdout
    assert json.loads((folder / "predictions-known.json").read_text()) == before


def test_a_run_is_adapted_from_its_start_or_not_at_all(small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    flags = ("--max_batches", "1", "--unseen", str(data_dir))
    assert small_run(tmp_path / "run", *flags).code == 0
    before = everything_below(tmp_path / "run")
    refused = small_run(tmp_path / "run", *flags, "--resume", "--adapt")
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith("error: --resume: cannot change --adapt")
    assert everything_below(tmp_path / "run") == before


def test_the_fingerprint_covers_the_adapted_tasks(
    adapted: Outcome, small_run: SmallRun, data_dir: Path, tmp_path: Path
) -> None:
    """They come from --unseen, which the fingerprint of --data says nothing about."""
    unseen = shutil.copytree(data_dir, tmp_path / "unseen")
    flags = ("--adapt", "--unseen", str(unseen), "--max_batches", "1")
    assert small_run(tmp_path / "run", *flags).code == 0
    recorded = load(tmp_path / "run").state["extra"]["data"]
    assert recorded["training"] == load(adapted.folder).state["extra"]["data"]["training"]

    path = unseen / "evaluation" / "up.json"
    task = json.loads(path.read_text())
    task["test"][0]["output"] = [[9]]
    path.write_text(json.dumps(task))
    assert small_run(tmp_path / "run", *flags, "--resume").code == 0  # test outputs are no part of it
    task["train"][0]["output"][0][0] = 9
    path.write_text(json.dumps(task))
    refused = small_run(tmp_path / "run", *flags, "--resume")
    assert refused.code == 2 and "other data" in refused.stderr and refused.stderr.count("\n") == 1
