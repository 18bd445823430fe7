"""What goes wrong around a training: records that cannot be written or were damaged, links, odd names and streams."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import SmallBuild, SmallRun
from helpers import SCRIPT, command, everything_below, metrics

from arc.agent import GridAgent
from arc.episodes import epoch_order
from arc.loading import WorkerLost, batches_of, end_workers, make_loader
from arc.run import runlog
from arc.run.runlog import RunLog
from arc.scoring import delta_text
from model_persistence import ModelPersistence, find_newest_run
from trainloop_complete_with_fixes import main, parse_arguments, training_data

# --------------------------------------------------------------------------------------------------------------------
# places that are full before anything is written there
# --------------------------------------------------------------------------------------------------------------------


# The tokenizer does not fit, the model does not, the texts of an export do not.
@pytest.mark.parametrize(("what", "kibibytes"), [("--cache_dir", 1), ("--cache_dir", 100), ("TMPDIR", 1)])
def test_no_room_for_what_is_made_first(
    what: str, kibibytes: int, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Neither safetensors nor tokenizers raise an OSError then."""
    small, flags = tmp_path / "small", [*small_flags, "--output_dir", str(tmp_path / "run")]
    small.mkdir()
    flags += ["--cache_dir", str(small)] if what == "--cache_dir" else []
    outcome = subprocess.run(
        ["bash", "-c", f"ulimit -f {kibibytes}; exec {shlex.join([sys.executable, str(SCRIPT), *flags])}"],
        env={**os.environ, "TMPDIR": str(small)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    assert f"cannot write to {small} (" in outcome.stderr and os.strerror(errno.EFBIG) in outcome.stderr


# --------------------------------------------------------------------------------------------------------------------
# records that cannot be written
# --------------------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, fails: range, *, halves: bool = False) -> None:
    """The writes of records with these numbers find the disk full; halves: half a line is written first."""
    write, calls = os.write, iter(range(10**6))

    def limited(descriptor: int, data: bytes) -> int:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name in ("metrics.jsonl", "train.log") and next(calls) in fails:
            if halves:
                return write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(runlog.os, "write", limited)


@pytest.mark.parametrize("halves", [False, True])
def test_rows_wait_for_room_on_the_disk(
    halves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(quiet=True)
    log.open(tmp_path, rows=0)
    with monkeypatch.context() as patch:
        full_disk(patch, range(3, 6), halves=halves)
        for step in range(1, 11):
            log.metrics({"step": step})
    log.close()
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 11)) and log.rows == 10
    assert capsys.readouterr().err.count("Warning: metrics.jsonl cannot be written (No space left on device)") == 1
    assert log.exit_code(0) == 0


def test_what_could_never_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(quiet=True)
    log.open(tmp_path, rows=0)
    log.metrics({"step": 1})
    full_disk(monkeypatch, range(10**6))
    log.metrics({"step": 2})
    log("a line")
    log.close()
    assert [log.exit_code(code) for code in (0, 3)] == [1, 3] and [row["step"] for row in metrics(tmp_path)] == [1]
    assert "error: metrics.jsonl, train.log in" in capsys.readouterr().err


def test_a_training_outlives_a_full_disk_of_its_records(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, range(12, 20))
    outcome = small_run(tmp_path / "run", "--epochs", "2", "--log_every", "1")
    assert outcome.code == 0, outcome.stderr
    assert [row["step"] for row in outcome.batches] == list(range(1, len(outcome.batches) + 1))
    assert "cannot be written" in outcome.stderr and "EPOCH 1 SUMMARY" in (tmp_path / "run" / "train.log").read_text()


# --------------------------------------------------------------------------------------------------------------------
# a run folder that was damaged, or comes from elsewhere
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = small_run(tmp_path_factory.mktemp("faults") / "run", "--epochs", "1", "--val_limit", "1")
    assert outcome.code == 0, outcome.stderr
    return outcome.folder


def test_damaged_rows_do_not_end_a_resume(
    finished: Path, small_flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[0] += lines[1]
    lines[1:6] = ["5", "{}", '{"step": 1e400, "loss": 1}', "\0\0\0", json.dumps({"step": 10**40, "loss": 10**400})]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main([*small_flags, "--output_dir", str(folder), "--epochs", "2", "--val_limit", "1", "--resume"]) == 0
    assert "metrics.jsonl: 6 damaged rows are left out of the event files" in capsys.readouterr().out


def test_nothing_is_written_through_links(finished: Path, small_run: SmallRun, tmp_path: Path) -> None:
    folder, outside = shutil.copytree(finished, tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    events = next((folder / "tensorboard").iterdir()).name
    places = {"config.json": folder, "train.log": folder, "metrics.jsonl": folder, "report.html": folder}
    for name, where in {**places, "predictions-seed.json": folder, events: folder / "tensorboard"}.items():
        (outside / name).write_text("precious")
        (where / name).unlink(missing_ok=True)
        (where / name).symlink_to(outside / name)
    outcome = small_run(folder, "--epochs", "2", "--val_limit", "1", "--resume")
    assert outcome.code == 0, outcome.stderr
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}
    assert "train.log was a symbolic link" in outcome.stdout

    shutil.rmtree(folder / "tensorboard")
    (outside / "tensorboard").mkdir()
    (folder / "tensorboard").symlink_to(outside / "tensorboard")
    assert small_run(folder, "--epochs", "3", "--val_limit", "1", "--resume").code == 0
    assert list((outside / "tensorboard").iterdir()) == []


def test_the_newest_run_may_be_linked(tmp_path: Path) -> None:
    for name in ("older", "newer"):
        with ModelPersistence(tmp_path / "elsewhere" / name, log=lambda _: None) as persistence:
            persistence.save({"extra": {"name": name}}, step=1, wait=True)
    runs = tmp_path / "runs"
    shutil.copytree(tmp_path / "elsewhere" / "older", runs / "older")
    (runs / "newer").symlink_to(tmp_path / "elsewhere" / "newer")
    assert find_newest_run(runs) == runs / "newer"


# --------------------------------------------------------------------------------------------------------------------
# weights that are not finite
# --------------------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_leave_the_evidence_s_answers(
    finished: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    """As after one bad step without the guard of fix 7: each later command says so and ends in order."""
    with ModelPersistence(finished, read_only=True, log=lambda _: None) as original:
        checkpoint = original.load()
    for weights in (checkpoint.state["model"]["agent"], checkpoint.state["optim"]["average"]["average"]):
        for name in [name for name in weights if name.endswith("head.weight")]:
            weights[name].fill_(math.nan)
    with ModelPersistence(tmp_path / "run", log=lambda _: None) as persistence:
        persistence.save(checkpoint.state, step=checkpoint.step, wait=True)
    for flags, code in ((("--eval_only",), 0), ((), 0), (("--strict",), 3)):
        outcome = small_run(tmp_path / "run", "--epochs", "2" if code == 0 else "3", "--resume", *flags)
        assert outcome.code == code, outcome.stderr
        assert outcome.stdout.count("RED FLAG: weights are not finite") + (code == 3) == 1
        if code == 0 and not flags:
            last = outcome.epochs[-1]
            assert last["val.pass1"] == last["val.vote_pass1"] and last["val.accuracy_delta"] is None


# --------------------------------------------------------------------------------------------------------------------
# a new run from a checkpoint that must not be touched
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_a_new_run_begins_from_another_folder_s_checkpoint(
    what: str, finished: Path, small_run: SmallRun, tmp_path: Path
) -> None:
    before, steps = everything_below(finished), sorted(finished.glob("step-*"))
    old = finished if what == "run" else steps[-1]
    flags = ("--epochs", "2", "--val_limit", "1", "--save_every", "1", "--resume")
    outcome = small_run(tmp_path / "new", *flags, str(old))
    assert outcome.code == 0, outcome.stderr
    assert everything_below(finished) == before
    first = outcome.batches[0]["step"]
    assert first == int(steps[-1].name.partition("-")[2]) + 1 and outcome.batches[-1]["step"] > first
    with ModelPersistence(tmp_path / "new", read_only=True, log=lambda _: None) as persistence:
        latest = persistence.load()
        assert latest.state["extra"]["origin"] == str(steps[-1])
        # What the other run's validation said is not said of weights that this one has yet to validate.
        assert persistence.load("best").step == latest.step
    # The same as going on where it was, bit for bit.
    there = shutil.copytree(finished, tmp_path / "there")
    assert small_run(there, *flags).code == 0
    newest = [max(folder.glob("step-*")) / "model.safetensors" for folder in (there, tmp_path / "new")]
    assert newest[0].read_bytes() == newest[1].read_bytes()

    refused = small_run(there, *flags, str(finished))
    assert refused.code == 2 and "holds a run already" in refused.stderr


# --------------------------------------------------------------------------------------------------------------------
# names and streams
# --------------------------------------------------------------------------------------------------------------------


def test_home_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flags.json").write_text(json.dumps({"backup_dir": "~/drive", "epochs": 7}))
    names = ("output_dir", "cache_dir", "data", "unseen")
    flags = [word for name in names for word in (f"--{name}", f"~/{name}")]
    args, _ = parse_arguments([*flags, "--config", "~/flags.json"])
    assert [getattr(args, name) for name in names] == [f"{tmp_path}/{name}" for name in names]
    assert (args.backup_dir, args.epochs) == (f"{tmp_path}/drive", 7)
    assert parse_arguments(["--resume", "~/run"])[0].resume == f"{tmp_path}/run"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_streams_that_lack_a_character(encoding: str, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Their lines have escapes; train.log has what was said."""
    folder = tmp_path / "运行-é"
    flags = [*small_flags, "--output_dir", str(folder), "--max_batches", "1", "--val_limit", "1", "--no_tensorboard"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"\\u8fd0\\u884c" in done.stdout and str(folder) in (folder / "train.log").read_text(encoding="utf-8")


def test_a_name_that_is_no_text(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/run-\xff"
    flags = [*small_flags, "--max_batches", "1", "--val_limit", "1", "--no_tensorboard", "--output_dir"]
    done = subprocess.run([sys.executable, SCRIPT, *flags, folder], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert os.path.isfile(folder + b"/metrics.jsonl")


# --------------------------------------------------------------------------------------------------------------------
# a checkpoint that someone else wrote: sound, signed, and with any values
# --------------------------------------------------------------------------------------------------------------------

Foreign = tuple[tuple[str, ...], Any]


def foreign(*place: str, values: Sequence[Any]) -> list[Foreign]:
    return [(place, value) for value in values]


GONE = "no longer there"
FOREIGN: list[Foreign] = [
    *(((name,), GONE) for name in ("flags", "state", "threshold", "rng", "data", "rows")),
    *foreign("flags", values=(None, [], "flags", 3)),
    *foreign("flags", "views", values=(0, -1, "many", None, 10**30, [1])),
    *((("flags", name), value) for name, value in (("ema", 2.0), ("agent_lr", "x"), ("threads", 10**9))),
    *((("flags", name), value) for name, value in (("ablate", [9]), ("no_policy", 1), ("qwen_tune", "half"))),
    *foreign("state", values=(None, {}, [], {"epoch": 0})),
    *foreign("state", "epoch", values=(-1, "0", 0.5, None)),
    *foreign("state", "sums", values=([], {"loss": "x"})),
    *foreign("threshold", values=(None, {}, {"ema_accuracy": "x"})),
    *foreign("rng", values=(None, {}, {"torch": 3})),
    *foreign("data", values=(None, {}, {"data": 1})),
    *(each for name in ("data", "training", "extra", "inputs") for each in foreign("data", name, values=(GONE, 3, []))),
    *foreign("data", "inputs", values=(torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.tensor(1))),
    *foreign("state", "step", values=(10**30,)),
    *foreign("threshold", "ema_accuracy", values=(10**400,)),
    *foreign("rng", "python", "internal", values=([-1] * 625,)),
    *foreign("rows", values=(None, 0.5, "x", 10**30)),
    *foreign("lora", values=(None, {"qwen": 3}, {"qwen": {"base": {"no": 1}}})),
]


@pytest.mark.parametrize(("place", "value"), FOREIGN, ids=lambda each: str(each)[:40])
def test_values_of_a_foreign_checkpoint_are_checked(
    place: tuple[str, ...],
    value: Any,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ModelPersistence(finished, read_only=True, log=lambda _: None) as original:
        checkpoint = original.load()
    inner = checkpoint.state["extra"]
    for name in place[:-1]:
        inner = inner[name]
    if value == GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with ModelPersistence(tmp_path / "run", log=lambda _: None) as persistence:
        persistence.save(checkpoint.state, step=checkpoint.step, wait=True)
    before, flags = everything_below(tmp_path / "run"), ["--resume", "--output_dir", str(tmp_path / "run")]
    solving = ["--eval_only", "--submission", str(tmp_path / "submission.json")]  # tasks told apart by the record
    more_ways = [solving] if place[0] == "data" else [["--print_config"]] if place[0] in ("flags", "lora") else []
    for more in (["--epochs", "9"], *more_ways):
        code = main([*flags, *more, "--cache_dir", str(tmp_path / "c")])
        out, err = capsys.readouterr()
        assert code == 2 and err.startswith("error: --resume: ") and err.count("\n") == 1, (code, out, err)
        assert everything_below(tmp_path / "run") == before


# --------------------------------------------------------------------------------------------------------------------
# workers, and what is said of too little
# --------------------------------------------------------------------------------------------------------------------


def test_workers_end_without_a_word() -> None:
    """torch's handler of SIGCHLD would raise that a worker was killed: a second traceback over the first."""
    before = multiprocessing.active_children()
    data: Any = torch.utils.data.TensorDataset(torch.arange(64))
    batches = batches_of(make_loader(data, range(64), workers=2, pin_memory=False))
    assert next(batches) is not None
    ours = [child for child in multiprocessing.active_children() if child not in before]
    handler = signal.getsignal(signal.SIGCHLD)
    assert len(ours) == 2
    end_workers(before)
    time.sleep(0.1)
    assert not any(child.is_alive() for child in ours) and signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_s_death_is_told_where_a_batch_is_waited_for() -> None:
    """torch's handler of SIGCHLD would raise it wherever the main process is."""
    before = multiprocessing.active_children()
    data: Any = torch.utils.data.TensorDataset(torch.arange(64))
    batches = batches_of(make_loader(data, range(64), workers=1, pin_memory=False))
    assert next(batches) is not None
    for child in set(multiprocessing.active_children()) - set(before):
        child.kill()
    time.sleep(0.5)  # an update, in whose midst it dies
    with pytest.raises(WorkerLost, match="is killed by signal"):
        next(batches)
    end_workers(before)
    assert next(batches_of(make_loader(data, range(64), workers=1, pin_memory=False))) is not None
    end_workers(before)


WORKING = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
from arc.loading import batches_of, make_loader

class Data(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return "x" * 10**6  # more than a pipe holds

signal.signal(signal.SIGTERM, lambda number, frame: print("told", flush=True))
os.register_at_fork(after_in_child=lambda: (print("born", os.getpid(), flush=True), time.sleep({asleep})))
batches = batches_of(make_loader(Data(), range(20), workers=1, pin_memory=False))
first = next(batches)
print("first", flush=True)
time.sleep({pause})
print(1 + sum(1 for _ in batches), flush=True)
"""


def working(asleep: float = 0, pause: float = 0) -> tuple[subprocess.Popen[str], int]:
    """A process with a worker, and the worker's id; the worker is `asleep` at first, its trainer `pause`s later on."""
    code = WORKING.format(root=str(SCRIPT.parent), asleep=asleep, pause=pause)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline().split()[1])


def test_a_worker_may_not_be_ended_before_it_works() -> None:
    """`timeout` and SLURM tell the whole process group; what ends is for the main process to say."""
    process, _ = working(asleep=1)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert out.split() == ["told", "first", "20"] and process.returncode == 0


def test_a_killed_trainer_leaves_no_worker() -> None:
    """One that has half a batch in a pipe, which nobody will read, does not come to ask whether it is still there."""
    process, worker = working(pause=60)
    assert process.stdout is not None and process.stdout.readline() == "first\n"
    time.sleep(0.5)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether there is such a process and it is no zombie."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors of a batch, in order."""
    if dataclasses.is_dataclass(value):
        return [leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_batches_of_workers_are_those_without(small_build: SmallBuild) -> None:
    run = small_build()
    keys = [(0, episodes) for episodes in epoch_order(run.args, run.training, 0)[:2]]
    before = multiprocessing.active_children()
    found = []
    for workers in (0, 1):
        sampler: Any = keys
        loader = make_loader(training_data(run), sampler, workers=workers, pin_memory=False)
        found.append([leaves(batch) for batch in batches_of(loader)])
    end_workers(before)
    for ours, theirs in zip(*found, strict=True):
        assert len(ours) == len(theirs) > 5
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def with_shared_memory(size: str, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The script where /dev/shm, its own, has room for `size`; skips where that cannot be made."""
    make = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", make], capture_output=True).returncode:
        pytest.skip("no mounts of its own for a process here")
    words = shlex.join([sys.executable, str(SCRIPT), *flags])
    return subprocess.run(["unshare", "-m", "sh", "-c", f"{make} && exec {words}"], capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare(1)")
def test_shared_memory_may_be_small(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Containers give 64 MiB and less. Batches go through pipes; where not even a lock fits, one line says so."""
    more = ("--workers", "2", "--max_batches", "2", "--val_limit", "1", "--no_tensorboard", "--output_dir")
    done = with_shared_memory("512k", [*small_flags, *more, str(tmp_path / "small")])
    assert done.returncode == 0, done.stderr
    done = with_shared_memory("16k", [*small_flags, *more, str(tmp_path / "none")])
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(errors) == 1 and "/dev/shm is full" in errors[0] and "--workers 0" in errors[0], done.stderr


def test_too_little_memory_is_one_line(small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved before counts: the step may have been in the middle of an update."""
    calls, forward = iter(range(10**6)), GridAgent.forward

    def full(*args: Any, **more: Any) -> Any:
        if next(calls) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.90 GiB.")
        return forward(*args, **more)

    monkeypatch.setattr(GridAgent, "forward", full)
    outcome = small_run(tmp_path / "run", "--save_every", "2", "--no_tensorboard")
    assert outcome.code == 1 and outcome.stderr.count("error: ") == 1 and "Traceback" not in outcome.stderr
    assert "--max_cells (now 6144)" in outcome.stderr and "what was saved before counts" in outcome.stderr
    monkeypatch.undo()
    assert small_run(tmp_path / "run", "--resume").code == 0


def test_where_nothing_can_be_compiled_it_goes_on(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    flags = [*small_flags, "--output_dir", str(tmp_path / "run"), "--max_batches", "1", "--val_limit", "1"]
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = [sys.executable, str(SCRIPT), *flags, "--no_tensorboard", "--compile"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "--compile: not compiled, this machine cannot (" in done.stdout


@pytest.mark.soak
def test_compiled_blocks_learn_the_same(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    flags = [*small_flags, *"--val_limit 2 --no_tensorboard --optimizer adamw --agent_lr 0.02".split()]
    losses = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        code, out, err = command([*flags, "--output_dir", str(tmp_path / name), *more], tmp_path)
        assert code == 0 and "not compiled" not in out, err
        losses.append([row["loss"] for row in metrics(tmp_path / name) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != losses[1]


def test_a_delta_says_of_how_much_it_is() -> None:
    assert delta_text(0.0125, 0.5) == "+0.0125 +- 0.5000"
    assert delta_text(-0.25, math.nan) == "-0.2500 (one pair)"
    assert delta_text(math.nan, math.nan) == "not measured"
