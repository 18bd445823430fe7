"""Run folders from elsewhere: checkpoints with any values under right digests, files that are links."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import ATTACK, VALUES, call, damaged_bytes, everything, places, refused_or_done

from model_persistence import Checkpoint, ModelPersistence, PersistenceError
from model_persistence import main as tools

FEWER = settings(ATTACK, max_examples=max(12, ATTACK.max_examples // 4))  # each is a run
LEAST = ("--epochs", "1", "--max_batches", "2", "--val_limit", "1", "--val_views", "1", "--no_tensorboard")


@pytest.fixture(scope="module")
def finished(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that is done: to resume it is to validate it once more."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = small_run(folder / "run", *LEAST)
    assert outcome.code == 0
    folder = outcome.folder
    (folder / "report.html").unlink()
    return Path(folder)


@pytest.fixture(scope="module")
def checkpoint(finished: Path) -> Checkpoint:
    with ModelPersistence(finished, read_only=True, log=lambda _: None) as persistence:
        return persistence.load()


def resume(run: Path, flags: tuple[str, ...], *more: str) -> None:
    """It goes on, or refuses in one line and leaves everything as it is. 1 and 3: weights or figures that are none."""
    refused_or_done([*flags, *LEAST, *more, "--val_limit", "1", "--output_dir", str(run), "--resume"], run, (0, 1, 3))


def again(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.getbasetemp() / "foreign"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished, run, symlinks=True)
    return run


REMOVED = object()
CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.one_of(*[VALUES] * 4, st.just(REMOVED))), min_size=1, max_size=2)
Changes = list[tuple[int, Any]]


def save_changed(checkpoint: Checkpoint, changes: Changes, run: Path) -> bool:
    """Save the checkpoint into `run` with other values; False if no checkpoint can hold them."""
    state = copy.deepcopy(checkpoint.state)
    for place, value in changes:
        found = list(places(state[("extra", "optim", "model")[place % 3]]))
        container, key = found[place // 3 % len(found)]
        if value is REMOVED:
            del container[key]
        else:
            container[key] = value
    try:
        with ModelPersistence(run, log=lambda _: None) as persistence:
            persistence.save(state, step=checkpoint.step, wait=True)
    except PersistenceError:
        return False
    return True


@FEWER
@given(CHANGES, st.booleans())
def test_any_values_in_a_checkpoint(
    finished: Path,
    checkpoint: Checkpoint,
    small_flags: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
    changes: Changes,
    solved: bool,
) -> None:
    run = again(finished, tmp_path_factory)
    if not save_changed(checkpoint, changes, run):
        return
    submission = tmp_path_factory.getbasetemp() / "submission.json"  # all tasks, told apart by what was trained on
    resume(run, small_flags, *(("--eval_only", "--submission", str(submission)) if solved else ()))


@FEWER
@given(CHANGES)
def test_the_tools_on_any_values(
    finished: Path, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, changes: Changes
) -> None:
    run, dest = again(finished, tmp_path_factory), tmp_path_factory.getbasetemp() / "exported"
    for best in run.glob("best-*"):
        shutil.rmtree(best)  # so that the changed one is exported
    if not save_changed(checkpoint, changes, run):
        return
    before = everything(run)
    for words in (["inspect", str(run)], ["verify", str(run)], ["export", str(run), str(dest)]):
        said = call(words, tools)
        assert said.code in (0, 1, 2) and len(said.err.splitlines()) == (said.code != 0), (words, said)
        assert dest.exists() == (said.code == 0 and words[0] == "export")
    shutil.rmtree(dest, ignore_errors=True)
    assert everything(run) == before and not list(dest.parent.glob(".tmp-*"))


@FEWER
@given(data=st.data())
def test_damaged_files_of_a_run(
    finished: Path, small_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = again(finished, tmp_path_factory)
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        (run / name).write_bytes(data.draw(damaged_bytes((run / name).read_bytes())))
    resume(run, small_flags)


@FEWER
@given(data=st.data())
def test_links_in_a_run(
    finished: Path, small_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Nothing outside the folder changes."""
    run, outside = again(finished, tmp_path_factory), tmp_path_factory.getbasetemp() / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("mine")
    before = everything(outside)
    names = (
        "config.json",
        "train.log",
        "metrics.jsonl",
        "report.html",
        "latest",
        "lock",
        ".lock",
        "attempts_seed.json",
    )
    present = sorted(path.name for path in run.iterdir() if path.is_file())
    for name in data.draw(st.lists(st.sampled_from(sorted({*names, *present})), max_size=4, unique=True)):
        (run / name).unlink(missing_ok=True) if not (run / name).is_dir() else shutil.rmtree(run / name)
        (run / name).symlink_to(outside / data.draw(st.sampled_from(["file", "folder", "nowhere"])))
    code_of_its_own = (0, 1, 3)
    words = [*small_flags, *LEAST, "--output_dir", str(run), "--resume"]
    refused_or_done(words, outside, code_of_its_own)
    assert everything(outside) == before and sorted(path.name for path in outside.iterdir()) == ["file", "folder"]
    assert list((outside / "folder").iterdir()) == []
