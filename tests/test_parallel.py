"""One training on several processes equals that of one; what is lost on the way ends it, and torchrun goes on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import train_batches, train_on
from helpers import FAST, PATIENCE, ROOT, SCRIPT, differences_of_runs, load, metrics, strict_json, timeless
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModel

from arc.device import resolve_device
from arc.parallel import ALONE, Place, Team, part_of, place, share_of
from arc.run.files import UserError
from arc.run.runlog import RunLog
from arc.sharding import is_sharded, on_host
from model_persistence import export_best
from trainloop_complete_with_fixes import build_run, parse_arguments

JOB = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
JOB |= {"MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2"}

# --------------------------------------------------------------------------------------------------------------------
# places and shares
# --------------------------------------------------------------------------------------------------------------------


def test_torchrun_says_where_a_process_stands() -> None:
    assert place(JOB) == Place(rank=1, size=4, local_rank=1, local_size=2, restarts=2)
    assert place({}) == place({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE
    without = {name: value for name, value in JOB.items() if "LOCAL_WORLD" not in name and "RESTART" not in name}
    assert place(without) == Place(rank=1, size=4, local_rank=1, local_size=4)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"^WORLD_SIZE is '4', but {name} not set: start with torchrun") as problem:
        place({key: value for key, value in JOB.items() if key != name})
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("-1", "4", "x", "1.0", "", "９")),
        *(("WORLD_SIZE", value) for value in ("", "0", "two", "9" * 30)),
        *(("LOCAL_RANK", value) for value in ("2", "-1")),
        *(("LOCAL_WORLD_SIZE", value) for value in ("5", "0", "x")),
        *(("MASTER_PORT", value) for value in ("0", "65536", "http")),
        ("TORCHELASTIC_RESTART_COUNT", "none"),
    ],
)
def test_what_is_no_place_is_refused_in_one_line(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name) as problem:
        place({**JOB, name: value})
    assert "\n" not in str(problem.value)


@given(st.integers(1, 100), st.integers(1, 20))
def test_every_episode_is_one_processs(count: int, size: int) -> None:
    items = list(range(count))
    places = [Place(rank, size) for rank in range(size)]
    assert [item for here in places for item in items[part_of(count, here)]] == items
    assert max(len(share_of(items, here)) for here in places) - count / size < 1
    assert share_of(items, places[0])[0] == 0  # it logs and writes, so it is never idle
    assert all(share_of(items, here) for here in places)


@given(st.integers(1, 9), st.integers(2, 6))
def test_what_all_compute_counts_once_and_its_gradient_with_each_that_takes_part(episodes: int, size: int) -> None:
    value, parts, gradients = 3.0, [], []
    for rank in range(size):
        team, own = Team(Place(rank, size)), torch.tensor(value, requires_grad=True)
        team.begin(episodes)
        part = team.once(own)
        part.backward()
        parts.append(part.item())
        gradients.append(float(own.grad or 0))
    assert sum(parts) == pytest.approx(value)
    assert sorted(gradients) == [0.0] * max(0, size - episodes) + [1.0] * min(size, episodes)


def test_too_few_gpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="^--device cuda: 2 processes on this machine, which has 1 GPUs$"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 1)


def test_a_process_alone_exchanges_nothing() -> None:
    team, value = Team(), torch.randn(3, 2, requires_grad=True)
    team.begin(3)
    assert team.gather(value) is value and team.once(value) is value
    assert team.portion(torch.tensor(3)) == 1.0 and torch.equal(team.mean(value), value.mean())
    assert team.everyones({"a": 1}) == [{"a": 1}] and team.most(15) == 15 and team.remembered() is None


class Company(Team):
    """A process that exchanges everything, be it with itself."""

    alone = property(lambda _: False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fsdp", [False, True])
def test_nccl_with_one_process(fsdp: bool, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Every sum goes through NCCL, Qwen is divided by one, and what is learned and saved is the same."""
    device = torch.device("cuda", 0)
    found: list[Any] = []
    torch.cuda.set_device(device)
    flags = [*small_flags, "--device", "cuda", "--optimizer", "adamw"]
    where = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=where, rank=0, world_size=1)
    try:
        for team in (Team(), Company()):
            args, _ = parse_arguments([*flags, "--output_dir", str(tmp_path / str(len(found)))])
            args.fsdp = fsdp and not team.alone  # as a flag it asks for several processes
            run = build_run(args, RunLog(quiet=True), time.monotonic(), team=team)
            team.same_weights(run.modules.values(), run.average.average.values() if run.average else ())
            run.log.open(tmp_path, rows=0)
            train_on(run, train_batches(run, 6))
            assert (run.state.skipped_steps, is_sharded(next(run.qwen.parameters()))) == (0, args.fsdp)
            assert team.everyones([1]) == [[1]] and team.most(3) == 3 and team.first(0.5) == 0.5
            found.append(on_host({name: part.state_dict() for name, part in run.modules.items()}, keep=True))
    finally:
        torch.distributed.destroy_process_group()
    alone, company = ({f"{m}.{k}": v for m, each in one.items() for k, v in each.items()} for one in found)
    assert alone.keys() == company.keys()
    assert [name for name in alone if not close(alone[name].float(), company[name].float(), 1e-4)] == []


# --------------------------------------------------------------------------------------------------------------------
# the same training
# --------------------------------------------------------------------------------------------------------------------

RLOO = ("--policy_objective", "rloo", "--policy_samples", "2")
STEPS: dict[str, tuple[tuple[str, ...], int]] = {
    "expected": ((), 1),
    "rloo": (RLOO, 1),
    "three batches": (("--grad_accum", "3"), 3),
    "rloo, three batches": ((*RLOO, "--grad_accum", "3"), 3),
    "fewer episodes than processes": (("--batch_size", "2"), 1),  # one episode
}
# AdamW: where Muon computes in bf16, rounding is larger than what is compared here.
RUN = (*FAST, *"--optimizer adamw --epochs 2 --save_every 4 --batch_size 8 --val_limit 2 --no_tensorboard".split())
# Twenty steps at the rates that people train at; later flags win.
LONGER = "--agent_lr 3e-4 --qwen_lr 3e-4 --policy_lr 1e-3 --epochs 4 --max_batches 5".split()
LIGHT = "--amp bf16 --gradient_checkpointing --epochs 1".split()


def torchrun(processes: int, *command: str, restarts: int = 0, **options: Any) -> subprocess.Popen[str]:
    """torchrun with this interpreter, in a process group of its own, on a port that is free."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen(
        [*start, f"--max_restarts={restarts}", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        text=True,
        start_new_session=True,
        **options,
    )


def do_jobs(processes: int, jobs: Sequence[dict[str, Any]], out: Path) -> list[list[int]]:
    """The jobs of tests/several.py: the exit codes of each process."""
    out.mkdir(exist_ok=True)
    (out / "jobs.json").write_text(json.dumps(jobs))
    command = (str(ROOT / "tests" / "several.py"), str(out / "jobs.json"), str(out))
    with torchrun(processes, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, text
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


@dataclass(frozen=True)
class Trained:
    """What one and two processes have left: gradients by case, and runs."""

    one: Path
    two: Path
    codes: list[list[int]]


@pytest.fixture(scope="module")
def trained(small_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The steps, a run, a run that is interrupted and resumed by as many processes, and one resumed by others."""
    folder = tmp_path_factory.mktemp("parallel")
    one, two = folder / "one", folder / "two"

    def run(name: str, *flags: str, trip: tuple[str, int] | None = None) -> dict[str, Any]:
        return {"flags": [*small_flags, *RUN, "--output_dir", str(folder / name), *flags], "trip": trip}

    steps = [
        {"name": name, "step": [*small_flags, *flags, "--output_dir", str(folder)], "batches": batches}
        for name, (flags, batches) in STEPS.items()
    ]
    stop = ("[Batch", 8)  # in the second epoch
    resume = ("--resume",)
    jobs = [*steps, run("one/run"), run("one/steps", *LONGER), run("one/stopped", trip=stop)]
    assert do_jobs(1, jobs, one) == [[0] * (len(jobs) - 1) + [143]]
    jobs = [*steps, run("two/run"), run("two/stopped", trip=stop), run("two/stopped", *resume)]
    jobs += [run("one/stopped", *resume), run("two/early", trip=stop)]
    jobs += [run("two/sharded", "--fsdp"), run("two/halves", "--fsdp", trip=stop), run("two/halves", "--fsdp", *resume)]
    jobs += [run("two/light", *LIGHT), run("two/sharded_light", *LIGHT, "--fsdp")]
    jobs += [run("two/steps", *LONGER), run("two/sharded_steps", *LONGER, "--fsdp")]
    jobs += [run("two/gathered", "--fsdp", trip=stop)]
    jobs += [run("two/told", trip=("Memory: ", 1)), run("two/told", *resume)]  # as a validation begins
    codes = do_jobs(2, jobs, two)
    assert do_jobs(1, [run("two/early", *resume), run("two/gathered", *resume)], one) == [[0, 0]]
    return Trained(one, two, codes)


def close(a: torch.Tensor, b: torch.Tensor, within: float) -> bool:
    """Whether two tensors differ by less than `within` of the larger of 1 and their largest value."""
    return float((a - b).abs().max()) <= within * max(1.0, float(a.abs().max()))


@pytest.mark.parametrize("case", STEPS)
def test_two_processes_have_the_gradients_of_one(case: str, trained: Trained) -> None:
    """Of every parameter, to 1e-6: each with half of the episodes, or one with all of the single one there is."""
    one, two = (load_file(folder / f"{case}.safetensors") for folder in (trained.one, trained.two))
    assert one.keys() == two.keys()
    gradients = [name for name in one if name.startswith("gradient.")]
    assert sum(bool(one[name].any()) for name in gradients) > 0.8 * len(gradients)
    assert [name for name in gradients if not close(one[name], two[name], 1e-6)] == []
    assert [name for name in one if name.startswith("weight.") and not close(one[name], two[name], 1e-5)] == []


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": t for part, tree in load(run).state["model"].items() for name, t in tree.items()}


def assert_close_runs(a: Path, b: Path) -> None:
    """The same batches and queries, weights to 1e-4 (learning rates are a thousand times the usual ones)."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    floating = [name for name in one if one[name].is_floating_point()]
    assert [name for name in floating if not close(one[name], two[name], 1e-4)] == []
    rows, others = (timeless([row for row in metrics(run) if "loss" in row]) for run in (a, b))
    counts = ("step", "epoch", "batch", "queries", "offers", "cells")
    assert [[row[key] for key in counts] for row in rows] == [[row[key] for key in counts] for row in others]
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-3, abs=1e-5)


def test_a_run_of_two_processes_is_that_of_one(trained: Trained) -> None:
    """The same metrics, and predictions of every test pair, each made by one of them."""
    codes = [0] * len(STEPS) + [0, 143, 0, 0, 143] + [0, 143, 0, 0, 0, 0, 0, 143, 143, 0]
    assert trained.codes[0] == trained.codes[1] == codes
    assert_close_runs(trained.one / "run", trained.two / "run")
    texts = [(folder / "run" / "predictions-seed.json").read_text() for folder in (trained.one, trained.two)]
    assert strict_json(texts[0]).keys() == strict_json(texts[1]).keys()
    scores = [
        [row["val.pairs"] for row in metrics(f / "run") if "val.pairs" in row] for f in (trained.one, trained.two)
    ]
    assert scores[0] == scores[1] and scores[0]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def largest_difference(a: Path, b: Path) -> float:
    """Of any weight of two runs, averaged ones and moments left aside."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one if one[name].is_floating_point())


def test_twenty_steps_of_two_processes_are_those_of_one(trained: Trained) -> None:
    assert len(losses(trained.one / "steps")) == 20
    assert largest_difference(trained.one / "steps", trained.two / "steps") < 1e-5


def test_a_qwen_that_is_divided_learns_the_same(trained: Trained) -> None:
    """FSDP2: loss for loss over twenty steps, and its checkpoint is one like any other."""
    whole, divided = trained.two / "steps", trained.two / "sharded_steps"
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-4)
    assert largest_difference(whole, divided) < 1e-5
    assert_close_runs(trained.two / "run", trained.two / "sharded")


def test_a_divided_qwen_learns_in_mixed_precision(trained: Trained) -> None:
    """Its layers gathered in bf16, and read again for the way back (--gradient_checkpointing)."""
    whole, divided = (losses(trained.two / name) for name in ("light", "sharded_light"))
    assert divided == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ((), "--fsdp divides Qwen among several processes: start it with torchrun"),
        (("--qwen_tune", "lora"), "--fsdp divides a Qwen that trains whole: --qwen_tune full"),
        (("--ablate", "1"), "--fsdp divides a Qwen that trains whole"),
        (("--amp", "fp16"), "--fsdp computes in bf16 or fp32: --amp bf16, or --amp off"),
    ],
)
def test_where_nothing_can_be_divided(flags: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--fsdp", *flags])
    assert end.value.code == 2 and problem in capsys.readouterr().err


def test_a_divided_qwen_is_exported_for_auto_model(trained: Trained, tmp_path: Path) -> None:
    export_best(trained.two / "sharded_steps", tmp_path / "export")
    model = AutoModel.from_pretrained(tmp_path / "export" / "qwen")
    state = load(trained.two / "sharded_steps", "best").state
    saved, averages = state["model"]["qwen"], state["optim"]["average"]["average"]
    saved |= {name: averages[f"qwen.backbone.{name}"] for name in saved if f"qwen.backbone.{name}" in averages}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {n: t.shape for n, t in saved.items()}
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in saved)


def test_an_interrupted_divided_run_goes_on_bit_for_bit(trained: Trained) -> None:
    assert differences_of_runs(trained.two / "sharded", trained.two / "halves") == []


def test_a_divided_run_goes_on_in_one_process(trained: Trained) -> None:
    """Its checkpoint knows nothing of processes: weights, moments and averages are whole."""
    assert_close_runs(trained.one / "run", trained.two / "gathered")


def test_an_interrupted_run_of_two_goes_on_as_if_nothing_had_been(trained: Trained) -> None:
    """Bit for bit; the signal had reached one of the two, in an epoch or before the test pairs that it predicts."""
    assert differences_of_runs(trained.two / "run", trained.two / "told") == []
    assert differences_of_runs(trained.two / "run", trained.two / "stopped") == []
    assert timeless(metrics(trained.two / "run")) == timeless(metrics(trained.two / "stopped"))


@pytest.mark.parametrize("run", ["one/stopped", "two/early"])
def test_a_run_goes_on_on_another_number_of_processes(run: str, trained: Trained) -> None:
    """In mid-epoch, from one to two and from two to one: no episode twice, none left out."""
    assert_close_runs(trained.one / "run", trained.one.parent / run)


# --------------------------------------------------------------------------------------------------------------------
# what is lost
# --------------------------------------------------------------------------------------------------------------------


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that torchrun has started, by rank."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error, KeyError):  # it has just begun, or ended
            found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith(line):
            return
    raise AssertionError(f"{line!r} never came")


def test_torchrun_goes_on_after_a_process_was_killed(
    small_flags: tuple[str, ...], tmp_path: Path, trained: Trained
) -> None:
    """From the latest checkpoint, in the same folder, to the same bits; nothing is left running."""
    command = (str(SCRIPT), *small_flags, *RUN, "--output_dir", str(tmp_path / "run"))
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with torchrun(2, *command, restarts=1, stdout=subprocess.PIPE, stderr=errors) as process:
            wait_for(process, "[Epoch 1] Size")
            (_, lost) = started = workers_of(process)
            lost.send_signal(signal.SIGKILL)
            out, _ = process.communicate(timeout=PATIENCE)
        errors.seek(0)
        said = errors.read()
    assert process.returncode == 0, said
    assert "Resumed from step-" in out and re.search(r"exitcode: -9\) local_rank: 1", said), (out, said)
    assert differences_of_runs(trained.two / "run", tmp_path / "run") == []
    with contextlib.suppress(psutil.TimeoutExpired):
        psutil.wait_procs(started, timeout=10)
    assert not any(child.is_running() for child in started)


@pytest.mark.soak
def test_twenty_kills_at_random_moments(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Of a random process: each attempt goes on where the last checkpoint stands, and the end is that of no kill."""
    random, run, kills = np.random.default_rng(0), tmp_path / "run", 20
    command = (str(SCRIPT), *small_flags, *RUN, "--save_every", "1", "--epochs", "12", "--output_dir")
    with torchrun(2, *command, str(tmp_path / "whole"), stdout=subprocess.DEVNULL) as process:
        assert process.wait(timeout=PATIENCE) == 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with torchrun(2, *command, str(run), restarts=kills, stdout=errors, stderr=errors) as process:
            started: list[psutil.Process] = []
            for _ in range(kills):
                while len(workers := [each for each in workers_of(process) if each not in started]) < 2:
                    assert process.poll() is None
                    time.sleep(0.05)
                started += workers
                time.sleep(random.uniform(0, 12))
                workers[random.integers(2)].send_signal(signal.SIGKILL)
            process.wait(timeout=PATIENCE)
        errors.seek(0)
        said = errors.read()
    assert process.returncode == 0, said
    resumed = [int(step) for step in re.findall(r"^Resumed from step-(\d+)", said, re.MULTILINE)]
    assert resumed == sorted(resumed) and len(resumed) > 2, said
    _, left = psutil.wait_procs(started, timeout=10)
    assert left == []
    assert differences_of_runs(tmp_path / "whole", run) == []


@pytest.mark.soak
def test_a_process_that_hangs_ends_the_job(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Within a minute, with a line that names it."""
    command = (str(SCRIPT), *small_flags, *RUN, "--epochs", "500", "--output_dir", str(tmp_path / "run"))
    with torchrun(2, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(process, "[Batch    2]")
        workers_of(process)[1].send_signal(signal.SIGSTOP)
        out, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert out.count("process 1 has given no sign of life for 20 s") == 1 and f'{SCRIPT.name}", line' not in out


@pytest.mark.soak
def test_one_that_leaves_first_is_not_missed(tmp_path: Path) -> None:
    """The first process may be writing for long after the others are done."""
    code = """
import time, torch
from arc.parallel import SILENCE, join
team = join(torch.device("cpu"))
if team.is_first:
    time.sleep(SILENCE + 8)
team.leave(orderly=team.is_first)
"""
    (tmp_path / "late.py").write_text(code)
    with torchrun(2, str(tmp_path / "late.py"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out


def test_a_mistake_is_said_once(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """By the first process; nothing is made."""
    command = (str(SCRIPT), *small_flags, "--data", str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "run"))
    with torchrun(2, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    lines = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "is neither one of" in lines[0] and not (tmp_path / "run").exists(), out
    assert "exitcode  : 2" in out
