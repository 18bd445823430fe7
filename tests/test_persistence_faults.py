"""The fault injection of benchmarks/persistence.py: a small share of it always, all of it under `-m soak`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import persistence as bench
from benchmarks.persistence import Figures

ROOT = Path(__file__).resolve().parents[1]
PARTS = bench.parts(1.0)
KILLS = ("kill_calls", "kill_random", "kill_pruning", "kill_load")


def run_script(*flags: str) -> list[Figures]:
    """The benchmark in a process of its own: only one without threads can fork children and kill them."""
    command = [sys.executable, "-W", "error", str(ROOT / "benchmarks" / "persistence.py"), "--json", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kills_at_calls_and_at_random_times_lose_and_leave_nothing() -> None:
    parts = run_script("--scale", "0.05", "--only", *KILLS)
    assert [figures["part"] for figures in parts] == list(KILLS)
    for figures in parts:
        assert figures["good"], figures
        assert figures["kills"] >= 2


def test_every_file_is_synced_before_the_rename_and_the_parent_after(tmp_path: Path) -> None:
    run = tmp_path / "run"
    figures = bench.check_order(bench.trace_in_process(run), str(run), str(run / "step-000000007"))
    assert figures.pop("files") == 4
    assert not any(figures.values()), figures


@pytest.mark.parametrize(
    ("pattern", "figure"),
    [(r"run$", "parent_not_synced"), (r"optim", "not_synced_before_rename"), (r"\.tmp-[^/]*$", "folder_not_synced")],
)
def test_the_check_of_the_order_finds_a_missing_sync(tmp_path: Path, pattern: str, figure: str) -> None:
    run = tmp_path / "run"
    calls = bench.trace_in_process(run)
    calls = [(name, path) for name, path in calls if name != "fsync" or not re.search(pattern, path)]
    assert bench.check_order(calls, str(run), str(run / "step-000000007"))[figure]


@pytest.mark.parametrize(
    ("part", "scale"),
    [
        ("disk_errors", 0.06),
        ("corruption", 0.06),
        ("hostile", 1.0),
        ("exact_resume", 0.08),
        ("rotation", 0.1),
        ("new_machine", 1.0),
    ],
)
def test_a_share_of(part: str, scale: float, tmp_path: Path) -> None:
    measure, demand = bench.parts(scale)[part]
    figures = measure(tmp_path)
    assert demand(figures), figures
    assert next(iter(figures.values())), "nothing was measured"


def test_a_change_to_a_file_of_a_checkpoint_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    """One bit in every byte of the small files: nothing in a checkpoint is unprotected."""
    template = tmp_path / "template"
    with bench.ModelPersistence(template, log=bench.quiet) as persistence:
        persistence.save({"model": {"w": bench.torch.ones(2)}, "extra": {"a": [1, None]}}, step=1, wait=True)
    folder = template / "step-000000001"
    with bench.ModelPersistence(template, read_only=True, log=bench.quiet) as persistence:
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            for at in range(len(data)):
                path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
                with pytest.raises(bench.PersistenceError):
                    persistence.load(folder)
            path.write_bytes(data)
        assert persistence.load(folder).step == 1


@pytest.mark.soak
@pytest.mark.parametrize("part", list(PARTS))
def test_all_of(part: str) -> None:
    (figures,) = run_script("--only", part)
    assert figures["good"], figures
