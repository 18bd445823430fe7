"""A run that was interrupted and resumed is the run that was not: final state bit for bit, metrics row by row."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, SmallRun
from helpers import (
    FAST,
    SCRIPT,
    Tripwire,
    differences,
    differences_of_runs,
    everything_below,
    load,
    metrics,
    run_into,
    signal_at_line,
    timeless,
)

import trainloop_complete_with_fixes as trainloop
from arc.run.files import UserError
from arc.run.runlog import RunLog
from model_persistence import ModelPersistence
from trainloop_complete_with_fixes import main

FLAGS = ("--epochs", "2", "--save_every", "4", *FAST)
# Gradient accumulation, a loss scale, the score function's own noise, a frozen backbone: state that FLAGS do not have.
ACCUMULATION = 4
RICH_FLAGS = (
    *("--epochs", "2", "--save_every", "4", "--grad_accum", str(ACCUMULATION), "--amp", "fp16"),
    *("--policy_objective", "rloo", "--policy_samples", "2", "--qwen_tune", "frozen"),
)


@pytest.fixture(scope="module")
def uninterrupted(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run with FLAGS that nothing disturbed."""
    outcome = small_run(tmp_path_factory.mktemp("uninterrupted") / "run", *FLAGS)
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def rich(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run with RICH_FLAGS that nothing disturbed."""
    outcome = small_run(tmp_path_factory.mktemp("rich") / "run", *RICH_FLAGS)
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def interrupted_once(small_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with FLAGS, interrupted after batch 3 of epoch 0; not to be written to."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    wire = Tripwire("[Batch    3]", 1, signal.SIGINT)
    assert run_into(wire, [*small_flags, *FLAGS, "--output_dir", str(folder)]) == 130
    return folder


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """A copy of `interrupted_once` for the test alone."""
    return shutil.copytree(interrupted_once, tmp_path / "run")


def assert_same_run(resumed: Path, original: Path) -> None:
    """Every tensor and number of the final checkpoint, every row of metrics.jsonl, every prediction."""
    assert timeless(metrics(resumed)) == timeless(metrics(original))
    assert differences_of_runs(resumed, original) == []
    assert load(resumed, "best").step == load(original, "best").step
    predictions = [(folder / "predictions-seed.json").read_bytes() for folder in (resumed, original)]
    assert predictions[0] == predictions[1]


def batches_of_epoch(outcome: Outcome) -> int:
    return max(row["batch"] for row in outcome.batches)


# --------------------------------------------------------------------------------------------------------------------
# where it stops
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "occurrence", "number"),
    [
        ("[Batch    1]", 1, signal.SIGTERM),
        ("EPOCH 0 SUMMARY", 1, signal.SIGINT),  # between training and validation
        ("[Epoch 0] Time:", 1, signal.SIGINT),  # between two epochs
        ("[Batch    4]", 2, signal.SIGINT),
        ("EPOCH 1 SUMMARY", 1, signal.SIGTERM),
        ("[Batch    3]", 1, signal.SIGHUP),  # the terminal is gone
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    line: str,
    occurrence: int,
    number: signal.Signals,
    uninterrupted: Outcome,
    small_run: SmallRun,
    small_flags: tuple[str, ...],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    wire = Tripwire(line, occurrence, number)
    assert run_into(wire, [*small_flags, *FLAGS, "--output_dir", str(folder)]) == 128 + number
    assert wire.getvalue().splitlines()[-1].startswith("Saved at epoch ")
    assert len(metrics(folder)) < len(uninterrupted.rows)

    resumed = small_run(folder, *FLAGS, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert "Resumed from step-" in resumed.stdout
    assert_same_run(folder, uninterrupted.folder)


def test_stop_at_the_last_batch_of_an_epoch(
    uninterrupted: Outcome, small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    last = batches_of_epoch(uninterrupted)
    wire = Tripwire(f"[Batch {last:4d}]", 1, signal.SIGINT)
    assert run_into(wire, [*small_flags, *FLAGS, "--output_dir", str(tmp_path / "run")]) == 130
    assert load(tmp_path / "run").state["extra"]["state"]["batch"] == last
    assert small_run(tmp_path / "run", *FLAGS, "--resume").code == 0
    assert_same_run(tmp_path / "run", uninterrupted.folder)


@pytest.mark.parametrize("batch", [2, 5])
def test_stop_in_the_middle_of_an_accumulation(
    batch: int,
    rich: Outcome,
    small_run: SmallRun,
    small_flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch counts when its optimizer step is done, not when it is computed: the run finishes the accumulation."""
    reward, calls = trainloop.compute_reward, 0

    def signal_while_computing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == batch:  # of the printed reward; the sampled ones are computed elsewhere
            signal.raise_signal(signal.SIGINT)
        return reward(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainloop, "compute_reward", signal_while_computing)
    folder = tmp_path / "run"
    wire = Tripwire("no such line", 1, signal.SIGINT)
    assert run_into(wire, [*small_flags, *RICH_FLAGS, "--output_dir", str(folder)]) == 130
    monkeypatch.undo()
    stopped = load(folder).state["extra"]["state"]
    expected = min(ACCUMULATION * -(-batch // ACCUMULATION), batches_of_epoch(rich))
    assert (stopped["epoch"], stopped["batch"]) == (0, expected)

    resumed = small_run(folder, *RICH_FLAGS, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert_same_run(folder, rich.folder)


def test_several_resumes_in_a_row(uninterrupted: Outcome, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Interrupted at every second batch until there is nothing left to do."""
    flags = [*small_flags, *FLAGS, "--output_dir", str(tmp_path / "run")]
    codes = [run_into(Tripwire("[Batch ", 2, signal.SIGINT), flags)]
    while codes[-1] != 0 and len(codes) <= len(uninterrupted.rows):
        codes.append(run_into(Tripwire("[Batch ", 2, signal.SIGINT), [*flags, "--resume"]))
    assert codes == [130] * (len(codes) - 1) + [0]
    assert len(codes) > 4
    assert_same_run(tmp_path / "run", uninterrupted.folder)


class Impatient(Tripwire):
    """Sends its signal a second time when the program says that it is obeying the first."""

    def write(self, text: str) -> int:
        if "again to leave at once" in text:
            signal.raise_signal(self.number)
        return super().write(text)


def test_a_second_interruption_leaves_at_once(
    uninterrupted: Outcome, small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Nothing is saved then, and nothing left behind: in a notebook the same process goes on."""
    flags = [*small_flags, *FLAGS, "--save_every", "2", "--output_dir", str(tmp_path / "run")]
    assert run_into(Impatient("[Batch    4]", 1, signal.SIGINT), flags) == 130
    assert load(tmp_path / "run").step == 2
    assert multiprocessing.active_children() == []
    assert small_run(tmp_path / "run", *FLAGS, "--resume").code == 0
    assert_same_run(tmp_path / "run", uninterrupted.folder)


def test_ctrl_c_while_python_imports(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """For some seconds on a cold machine: it ends, and without a traceback."""
    flags = [*small_flags, "--output_dir", str(tmp_path / "run")]
    python = [sys.executable, "-X", "importtime", str(SCRIPT), *flags]  # says on stderr what has been imported
    with subprocess.Popen(python, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.rstrip().endswith(" typing_extensions"))  # torch's
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
        assert process.wait() == -signal.SIGINT and rest == []


def test_an_interruption_while_the_run_is_built(small_flags: tuple[str, ...], data_dir: Path, tmp_path: Path) -> None:
    """There is nothing to save yet; the run's folder, which a resume has opened by then, is free again."""
    unseen = tmp_path / "unseen"  # one of the training tasks, so that building logs a line
    shutil.copytree(data_dir / "training", unseen / "evaluation", ignore=lambda _, names: {*names} - {"flip.json"})
    flags = [*small_flags, *FLAGS, "--val_splits", "seed,unseen", "--unseen", str(unseen)]
    flags += ["--output_dir", str(tmp_path / "run")]
    assert run_into(Tripwire("[Batch    3]", 1, signal.SIGINT), flags) == 130
    before = everything_below(tmp_path / "run")
    wire = Tripwire("Unseen split: 1 of 6", 1, signal.SIGINT)
    with contextlib.redirect_stdout(wire), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([*flags, "--resume"])  # Python's own handler of SIGINT is in place here
    assert (code, err.getvalue().count("\n")) == (130, 1) and err.getvalue().startswith("Interrupted: ")
    assert everything_below(tmp_path / "run") == before
    assert run_into(Tripwire("[Batch", 1, signal.SIGINT), [*flags, "--resume"]) == 130
    assert load(tmp_path / "run").step == 4


def test_signals_to_a_process_with_workers(small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """A run with two worker processes is stopped by SIGTERM, goes on until Ctrl-C, goes on until it is killed, and
    ends in this process without workers: as if nothing had happened."""
    flags = [*small_flags, "--epochs", "3", "--save_every", "1", "--workers", "2", "--output_dir", "run"]
    code, out = signal_at_line(flags, tmp_path, "[Batch    2]", lambda pid: os.kill(pid, signal.SIGTERM))
    assert code == 143, out
    assert "SIGTERM: saving and leaving" in out and out.splitlines()[-1].startswith("Saved at epoch 0, batch ")
    steps = [load(tmp_path / "run").step]

    resume = [*flags, "--resume"]
    # A terminal sends Ctrl-C to the workers too.
    code, out = signal_at_line(resume, tmp_path, "[Batch ", lambda pid: os.killpg(pid, signal.SIGINT))
    assert code == 130, out
    steps.append(load(tmp_path / "run").step)

    # Its workers live a few seconds longer, and must not keep the run's folder from who comes next.
    code, _ = signal_at_line(resume, tmp_path, "[Batch ", lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    steps.append(load(tmp_path / "run").step)
    assert steps == sorted(steps) and steps[0] < steps[1]

    resumed = small_run(tmp_path / "run", "--epochs", "3", "--save_every", "1", "--resume")
    assert resumed.code == 0, resumed.stderr
    original = small_run(tmp_path / "original", "--epochs", "3", "--save_every", "1")
    assert_same_run(resumed.folder, original.folder)


# --------------------------------------------------------------------------------------------------------------------
# what it continues from
# --------------------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_a_line(interrupted: Path, uninterrupted: Outcome, small_run: SmallRun) -> None:
    """Rows after the checkpoint, the last of them torn, are dropped: what they record is run again."""
    with open(interrupted / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "epoch": 0, "loss": 1.0}) + '\n{"step": 5, "epo')
    assert small_run(interrupted, *FLAGS, "--resume").code == 0
    assert_same_run(interrupted, uninterrupted.folder)


def test_falls_back_to_an_older_checkpoint(
    interrupted: Path, uninterrupted: Outcome, small_run: SmallRun, small_flags: tuple[str, ...]
) -> None:
    wire = Tripwire("[Batch    4]", 1, signal.SIGINT)
    assert run_into(wire, [*small_flags, *FLAGS, "--output_dir", str(interrupted), "--resume"]) == 130
    newest = interrupted / "step-000000004" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)

    before = everything_below(interrupted)
    refused = small_run(interrupted, *FLAGS, "--resume", "--data", "nowhere")
    assert refused.code == 2 and everything_below(interrupted) == before  # what is refused has changed nothing
    resumed = small_run(interrupted, *FLAGS, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert "Resumed from step-000000003" in resumed.stdout
    assert "step-000000004 is corrupt" in resumed.stdout and len(list(interrupted.glob(".bad-step-000000004-*"))) == 1
    assert_same_run(interrupted, uninterrupted.folder)


def test_resume_a_path_and_the_best(uninterrupted: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    """Both go back in time; what came later is run again and does not stand in metrics.jsonl twice."""
    folder = shutil.copytree(uninterrupted.folder, tmp_path / "run")
    best = load(folder, "best")
    for which in (str(folder / f"step-{batches_of_epoch(uninterrupted):09d}"), "best"):
        resumed = small_run(folder, *FLAGS, "--resume", which)
        assert resumed.code == 0, resumed.stderr
        assert_same_run(folder, uninterrupted.folder)
    assert "Resumed from best-" in resumed.stdout and f"epoch {best.state['extra']['state']['epoch']}" in resumed.stdout


@pytest.mark.parametrize("change", [{"format": 1}, None])
def test_a_checkpoint_of_another_version_is_refused(
    change: dict[str, int] | None, interrupted: Path, small_run: SmallRun
) -> None:
    checkpoint = load(interrupted)
    checkpoint.state["extra"] = checkpoint.state["extra"] | change if change else {}
    with ModelPersistence(interrupted, log=lambda _: None) as persistence:
        persistence.save(checkpoint.state, step=checkpoint.step, metrics=checkpoint.metrics, wait=True)
    before = everything_below(interrupted)
    refused = small_run(interrupted, "--resume")
    assert refused.code == 2 and refused.stderr.count("\n") == 1 and "another version" in refused.stderr
    assert everything_below(interrupted) == before


def test_random_generators_go_on_where_the_checkpoint_left_them(
    interrupted: Path, uninterrupted: Outcome, small_run: SmallRun
) -> None:
    """The loop keys its own noise by batch, so only generators in another state than the seed's show what happens."""
    checkpoint = load(interrupted)
    before = trainloop.rng_state()
    trainloop.seed_everything(12345)
    checkpoint.state["extra"]["rng"] = trainloop.rng_state()
    trainloop.restore_rng(before)
    with ModelPersistence(interrupted, log=lambda _: None) as persistence:
        persistence.save(checkpoint.state, step=checkpoint.step, metrics=checkpoint.metrics, wait=True)
    assert small_run(interrupted, *FLAGS, "--resume").code == 0
    ours, theirs = (load(folder).state["extra"]["rng"] for folder in (interrupted, uninterrupted.folder))
    for generator in ("torch", "numpy", "python"):
        assert differences(ours[generator], theirs[generator]), generator


def test_finds_the_newest_run(
    interrupted: Path,
    uninterrupted: Outcome,
    small_flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--resume` without a folder: under runs/, the run with the most recent checkpoint, whatever its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    interrupted.rename(tmp_path / "runs" / "b")
    wire = Tripwire("[Batch    1]", 1, signal.SIGINT)
    assert run_into(wire, [*small_flags, *FLAGS, "--output_dir", "runs/a"]) == 130
    (tmp_path / "runs" / "c").mkdir()  # a run without a checkpoint
    before = everything_below(tmp_path / "runs" / "b")
    assert trainloop.main([*small_flags, *FLAGS, "--resume"]) == 0
    assert "Resumed from step-000000001" in capsys.readouterr().out
    assert everything_below(tmp_path / "runs" / "b") == before
    assert_same_run(tmp_path / "runs" / "a", uninterrupted.folder)


def test_more_epochs_continue_a_finished_run(uninterrupted: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted.folder, tmp_path / "run")
    longer = small_run(folder, *FLAGS, "--epochs", "3", "--resume")
    assert longer.code == 0, longer.stderr
    assert "--epochs 3, where the checkpoint has 2: learning rates follow the new end" in longer.stdout
    assert timeless(longer.rows)[: len(uninterrupted.rows)] == timeless(uninterrupted.rows)
    assert [row["epoch"] for row in longer.epochs] == [0, 1, 2]
    again = small_run(folder, *FLAGS, "--epochs", "3", "--resume")
    assert again.code == 0 and "Nothing to train: all 3 epochs are done" in again.stdout
    assert again.rows == longer.rows


# --------------------------------------------------------------------------------------------------------------------
# flags
# --------------------------------------------------------------------------------------------------------------------


def test_flags_not_given_are_the_checkpoints(
    interrupted: Path,
    uninterrupted: Outcome,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--resume` alone continues the same run: data, sizes, rates, number of epochs, validation views."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert trainloop.main(["--resume", "--output_dir", str(interrupted), "--cache_dir", str(cache_dir)]) == 0
    assert_same_run(interrupted, uninterrupted.folder)


def test_data_that_only_the_checkpoint_names(
    small_flags: tuple[str, ...], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path means nothing in another folder: the line says that it is the checkpoint's."""
    shutil.copytree(data_dir, tmp_path / "here" / "own")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = [*small_flags, "--data", "own", "--max_batches", "1", "--val_limit", "1"]
    assert trainloop.main([*flags, "--output_dir", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = everything_below(tmp_path / "run")
    captured = io.StringIO()
    with contextlib.redirect_stderr(captured):
        assert trainloop.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 2
    assert captured.getvalue() == "error: --resume: the checkpoint's --data 'own' is not here; give --data\n"
    assert everything_below(tmp_path / "run") == before


def test_harmless_flags_may_change(interrupted: Path, uninterrupted: Outcome, small_run: SmallRun) -> None:
    changed = ("--save_every", "1", "--keep", "2", "--log_every", "3", "--val_views", "1", "--val_limit", "2")
    resumed = small_run(interrupted, *FLAGS, "--resume", *changed, "--quiet")
    assert (resumed.code, resumed.stdout) == (0, "")
    assert timeless(resumed.batches) == timeless(uninterrupted.batches)
    assert differences(load(interrupted).state["model"], load(uninterrupted.folder).state["model"]) == []
    assert len(list(interrupted.glob("step-*"))) == 2


def test_flags_that_change_the_maths_are_refused_by_name(
    interrupted: Path, uninterrupted: Outcome, small_run: SmallRun
) -> None:
    before = everything_below(interrupted)
    changed = {"agent_lr": "0.25", "seed": "7", "batch_size": "4", "hard_floor": "0.125", "ablate": "4"}
    flags = [word for name, value in changed.items() for word in (f"--{name}", value)]
    refused = small_run(interrupted, *FLAGS, "--resume", *flags)
    assert (refused.code, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: --resume: cannot change ")
    for name in changed:
        assert f"--{name} " in refused.stderr
    assert "--views" not in refused.stderr  # given, but as it was
    assert everything_below(interrupted) == before

    # Nothing stays locked or half open in this process: a notebook's user tries again in the next cell.
    assert small_run(interrupted, *FLAGS, "--resume").code == 0
    assert_same_run(interrupted, uninterrupted.folder)


@pytest.mark.parametrize("flags", [(), ("--recipe", "gpu")])
def test_auto_is_the_checkpoints_qwen(flags: tuple[str, ...], interrupted: Path, small_run: SmallRun) -> None:
    outcome = small_run(interrupted, *FLAGS, "--resume", "--qwen", "auto", *flags)
    assert outcome.code == (2 if flags else 0) and "--qwen" not in outcome.stderr


def test_a_recipe_is_no_way_to_change_the_maths(interrupted: Path, small_run: SmallRun) -> None:
    refused = small_run(interrupted, *FLAGS, "--resume", "--recipe", "gpu")
    assert refused.code == 2 and refused.stderr.startswith("error: --resume: cannot change ")
    for name in ("adapt True", "ema 0.999", "task_latent True"):
        assert f"--{name} " in refused.stderr


def test_other_data_are_refused(
    data_dir: Path, small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    data = shutil.copytree(data_dir, tmp_path / "data")
    flags = ("--data", str(data), *FLAGS)
    wire = Tripwire("[Batch    1]", 1, signal.SIGINT)
    assert run_into(wire, [*small_flags, *flags, "--output_dir", str(tmp_path / "run")]) == 130
    before = everything_below(tmp_path / "run")

    path = data / "training" / "flip.json"
    task = json.loads(path.read_text())
    task["train"][0]["output"][0][0] = 9
    path.write_text(json.dumps(task))
    refused = small_run(tmp_path / "run", *flags, "--resume")
    assert refused.code == 2 and "other data" in refused.stderr and refused.stderr.count("\n") == 1
    assert everything_below(tmp_path / "run") == before


# --------------------------------------------------------------------------------------------------------------------
# folders
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["latest", "best", "no/such/checkpoint"])
def test_resume_without_a_run(which: str, small_run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = everything_below(tmp_path)
    for folder in ("empty", "missing"):
        refused = small_run(tmp_path / folder, *FLAGS, "--resume", which)
        assert (refused.code, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert refused.stderr.startswith("error: ")
    assert everything_below(tmp_path) == before


def test_resume_a_folder_that_may_not_be_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It can be looked at itself, what is in it cannot (by others than root)."""
    folder, look = tmp_path / "run", os.stat
    folder.mkdir()

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, (str, os.PathLike)) and folder in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert trainloop.main([*FLAGS, "--resume", str(folder)]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: --resume: ") and found.endswith(": Permission denied\n") and found.count("\n") == 1


def test_resume_the_folder_of_a_run_touches_nothing_beside_it(
    uninterrupted: Outcome, small_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--resume RUN` where RUN/step-… is meant: whatever is said of it, what lies beside RUN is somebody else's."""
    shutil.copytree(uninterrupted.folder, tmp_path / "run")
    (tmp_path / ".tmp-notes").write_text("not a checkpoint's")
    trainloop.main([*small_flags, *FLAGS, "--resume", str(tmp_path / "run")])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", "run"]


def test_a_new_run_does_not_enter_a_used_folder(uninterrupted: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    folder = shutil.copytree(uninterrupted.folder, tmp_path / "run")
    before = everything_below(folder)
    refused = small_run(folder, *FLAGS)
    assert refused.code == 2 and "--resume" in refused.stderr and refused.stderr.count("\n") == 1
    assert everything_below(folder) == before


def test_a_second_writer_is_refused(interrupted: Path, uninterrupted: Outcome, small_run: SmallRun) -> None:
    with ModelPersistence(interrupted, log=lambda _: None):
        refused = small_run(interrupted, *FLAGS, "--resume")
        assert refused.code == 2 and "in use" in refused.stderr and refused.stderr.count("\n") == 1
    assert small_run(interrupted, *FLAGS, "--resume").code == 0
    assert_same_run(interrupted, uninterrupted.folder)


# --------------------------------------------------------------------------------------------------------------------
# the long loop
# --------------------------------------------------------------------------------------------------------------------

POSITIONS = 50
LONG_FLAGS = ("--epochs", "12", "--save_every", "7", "--val_every", "5", *FAST)


@pytest.mark.soak
def test_fifty_stopping_positions(small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Stopped after each of the first 50 batches in turn, resumed to the end: always the same run, bit for bit."""
    original = small_run(tmp_path / "original", *LONG_FLAGS)
    assert original.code == 0 and len(original.batches) > POSITIONS, original.stderr
    for position in range(1, POSITIONS + 1):
        folder = tmp_path / f"stopped-{position}"
        flags = [*small_flags, *LONG_FLAGS, "--output_dir", str(folder)]
        assert run_into(Tripwire("[Batch ", position, signal.SIGINT), flags) == 130
        resumed = small_run(folder, *LONG_FLAGS, "--resume")
        assert resumed.code == 0, resumed.stderr
        assert_same_run(folder, original.folder)
        shutil.rmtree(folder)
    print(f"stopping positions: {POSITIONS}, runs that differ from the uninterrupted one: 0")


def metrics_file(folder: Path, rows: int) -> list[int]:
    """What a run that is opened for `rows` rows keeps of metrics.jsonl, by their steps."""
    log = RunLog(quiet=True)
    log.open(folder, rows=rows)
    assert log.rows == len(metrics(folder))
    return [row["step"] for row in metrics(folder)]


def test_rows_cut_off_by_resuming_from_an_older_checkpoint_come_back_with_the_newer_one(tmp_path: Path) -> None:
    """--resume best that is killed before it has saved anything, and then --resume."""
    log = RunLog(quiet=True)
    log.open(tmp_path, rows=0)
    for step in range(1, 10):
        log.metrics({"step": step})
    assert metrics_file(tmp_path, 5) == [1, 2, 3, 4, 5]
    assert metrics_file(tmp_path, 5) == [1, 2, 3, 4, 5]
    assert metrics_file(tmp_path, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert metrics_file(tmp_path, 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    # The same, killed after some batches: what they wrote is of a way that was not saved.
    assert metrics_file(tmp_path, 5) == [1, 2, 3, 4, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60}\n{"step": 70}\n')
    assert metrics_file(tmp_path, 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_rows_that_cannot_be_cut_off_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunLog(quiet=True).open(tmp_path, rows=0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("arc.run.runlog.replace_file", full)
    with pytest.raises(UserError, match=r"^--output_dir: cannot write .*metrics\.jsonl: No space left on device$"):
        RunLog(quiet=True).open(tmp_path, rows=1)


def test_rows_that_are_lost_are_not_counted(tmp_path: Path) -> None:
    log = RunLog(quiet=True)
    log.open(tmp_path, rows=0)
    log.metrics({"step": 1})
    assert metrics_file(tmp_path, 4) == [1]  # the run's file was deleted, say: later checkpoints count from here
    assert "metrics.jsonl has 1 rows, the checkpoint was made after 4" in (tmp_path / "train.log").read_text()
