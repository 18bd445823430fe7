"""No test output reaches the model: with other ones in the data set, no bit of what is learned or predicted changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome, SmallRun
from helpers import FAST, differences, load, timeless

from arc.datasets import load_dataset

FLAGS = ("--epochs", "2", "--save_every", "4", "--recall", "4", *FAST)
Change = Callable[[dict[str, Any]], None]
RunOn = Callable[[Path], Outcome]


def garbage(pair: dict[str, Any]) -> None:
    """Another size and other colours, nothing to do with the task."""
    rng = np.random.default_rng(len(json.dumps(pair)))
    shape = (len(pair["output"]) % 30 + 1, len(pair["output"][0]) % 7 + 2)
    pair["output"] = rng.integers(0, 10, shape).tolist()


def absent(pair: dict[str, Any]) -> None:
    """As in a competition, where nobody has the solutions."""
    del pair["output"]


def data_with(change: Change, source: Path, target: Path) -> Path:
    """A copy of a data folder, training and evaluation part, with every test pair changed."""
    shutil.copytree(source, target)
    files = sorted(target.rglob("*.json"))
    assert len(files) > 6
    for file in files:
        task = json.loads(file.read_text())
        for pair in task["test"]:
            change(pair)
        file.write_text(json.dumps(task))
    return target


@pytest.fixture(scope="module", params=["unseen", "adapted"])
def split(request: pytest.FixtureRequest) -> str:
    """What becomes of the evaluation tasks: held back, or their demonstrations trained on."""
    return request.param


@pytest.fixture(scope="module")
def run_on(split: str, small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> RunOn:
    """`run_on(data)`: a run with a cache of its own, or the evidence found for the first data would serve the second
    and hide what the second would have leaked."""
    flags = (*FLAGS, "--val_splits", f"seed,{split}", *(["--adapt"] if split == "adapted" else []))

    def run(data: Path) -> Outcome:
        place = tmp_path_factory.mktemp("run")
        cache = ("--cache_dir", str(place / "cache"))
        outcome = small_run(place / "run", *flags, "--data", str(data), "--unseen", str(data), *cache)
        assert outcome.code == 0, outcome.stderr
        return outcome

    return run


@pytest.fixture(scope="module")
def original(run_on: RunOn, data_dir: Path) -> Outcome:
    return run_on(data_dir)


@pytest.fixture(scope="module", params=[garbage, absent])
def other(
    request: pytest.FixtureRequest, run_on: RunOn, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """The run on data that differ from the original's in every test output and in nothing else."""
    data = data_with(request.param, data_dir, tmp_path_factory.mktemp("changed") / "data")
    assert load_dataset(str(data)).fingerprint == load_dataset(str(data_dir)).fingerprint  # what a resume compares
    return run_on(data)


def test_predictions_are_the_same_byte_for_byte(split: str, original: Outcome, other: Outcome) -> None:
    for name in ("predictions-seed.json", f"predictions-{split}.json"):
        assert (other.folder / name).read_bytes() == (original.folder / name).read_bytes()


def test_everything_learned_is_the_same_bit_for_bit(original: Outcome, other: Outcome) -> None:
    assert timeless(other.batches) == timeless(original.batches)
    steps = sorted(path.name for path in original.folder.glob("step-*"))
    assert len(steps) > 2
    for step in steps:
        ours, theirs = (load(run.folder, str(run.folder / step)).state for run in (original, other))
        for state in (ours, theirs):  # flags name folders; scores of validations are what may differ
            state["extra"] = {"rng": state["extra"]["rng"], "threshold": state["extra"]["threshold"]}
        assert differences(ours, theirs) == []


def test_scores_do_change(original: Outcome, other: Outcome) -> None:
    """The outputs are read where they belong, or the tests above would prove nothing."""
    scored, changed = original.epochs[-1], other.epochs[-1]
    assert scored["val.pass2"] > 0 and scored["val.size_acc"] > 0
    if "no solutions are given" in other.stdout:
        assert "val.pass1" not in changed
    else:
        assert changed["val.pass2"] == changed["val.pass1"] == 0
        assert changed["val.pairs"] == scored["val.pairs"]


def test_a_demonstration_does_change_something(
    split: str, original: Outcome, run_on: RunOn, data_dir: Path, tmp_path: Path
) -> None:
    """The comparison can fail: one cell of one demonstration is enough, and adapted, one of an evaluation task."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    file = data / ("evaluation/turn.json" if split == "adapted" else "training/flip.json")
    task = json.loads(file.read_text())
    task["train"][0]["output"][0][0] = (task["train"][0]["output"][0][0] + 1) % 10
    file.write_text(json.dumps(task))
    changed = run_on(data)
    assert differences(load(original.folder).state["model"], load(changed.folder).state["model"])
    assert timeless(changed.batches) != timeless(original.batches)
