"""Small things that several test files share: a data set of small ARC-like tasks, a folder for caches, small runs.

Types are imported with `from conftest import ...`; everything else arrives as a fixture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from arc.episodes import TrainBatch, epoch_order  # noqa: E402
from arc.run.runlog import RunLog  # noqa: E402
from trainloop_complete_with_fixes import Run, build_run, main, parse_arguments, train_epoch, training_data  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)  # how long an example takes says nothing when cores are shared
settings.load_profile("busy machine")

# Everything as small as it may be while every part of the program still runs. Later flags win over earlier ones.
SMALL_FLAGS = (
    *("--device", "cpu", "--amp", "off", "--workers", "0", "--threads", "1", "--qwen", "tiny", "--epochs", "1"),
    *("--agent_width", "16", "--agent_heads", "1", "--agent_blocks", "1", "--prompt_len", "2", "--prompt_dim", "8"),
    *("--views", "2", "--batch_size", "8", "--val_views", "2", "--log_every", "1", "--memory_size", "16"),
)


# --------------------------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------------------------


def bounding_box(grid: np.ndarray) -> np.ndarray:
    """The smallest rectangle of `grid` that holds every cell that is not 0."""
    rows, columns = np.nonzero(grid)
    return grid[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def recolour(grid: np.ndarray) -> np.ndarray:
    """Colours 1 and 2 swapped."""
    return np.select([grid == 1, grid == 2], [2, 1], grid)


def write_tasks(folder: Path) -> Path:
    """Six training tasks (four demonstrations each, one or two test pairs) and two evaluation tasks below `folder`.

    Grids are 3 to 5 wide. The evidence finds the rules of `crop`, `flip` and `recolour`, gets most cells of `count` and
    some of `sort`; `random` has no rule at all, in cells or sizes, so that some of both are wrong in any run.
    """
    rng = np.random.default_rng(5)
    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "training/count": lambda grid: np.where(grid == 0, np.count_nonzero(grid) % 10, grid),
        "training/crop": bounding_box,
        "training/flip": np.fliplr,
        "training/random": lambda _: rng.integers(0, 10, rng.integers(2, 7, 2)),
        "training/recolour": recolour,
        "training/sort": lambda grid: np.sort(grid, axis=1),
        "evaluation/turn": np.rot90,
        "evaluation/up": np.flipud,
    }
    for name, rule in rules.items():
        pairs: list[dict[str, Any]] = []
        for _ in range(6):
            shape = rng.integers(3, 6, 2)
            grid = rng.integers(1, 5, shape) * (rng.random(shape) < 0.6)
            grid[1, 1] = 1 + len(pairs) % 4  # never empty
            pairs.append({"input": grid.tolist(), "output": rule(grid).tolist()})
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"train": pairs[:4], "test": pairs[4 : 5 if "flip" in name else 6]}))
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--data`: `write_tasks`."""
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--cache_dir`: evidence and the tiny Qwen are made once a session."""
    return tmp_path_factory.mktemp("cache")


# --------------------------------------------------------------------------------------------------------------------
# runs
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a command left behind. rows: metrics.jsonl, empty if there is none."""

    code: int
    folder: Path
    stdout: str
    stderr: str
    rows: list[dict[str, Any]]

    @property
    def batches(self) -> list[dict[str, Any]]:
        """The rows of batches."""
        return [row for row in self.rows if "loss" in row]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of epoch ends."""
        return [row for row in self.rows if "loss" not in row]


SmallRun = Callable[..., Outcome]  # small_run(folder, *flags)
SmallBuild = Callable[..., Run]  # small_build(*flags)


@pytest.fixture(scope="session")
def small_flags(data_dir: Path, cache_dir: Path) -> tuple[str, ...]:
    """Flags of a small run on the small data, all but `--output_dir`."""
    return (*SMALL_FLAGS, "--data", str(data_dir), "--cache_dir", str(cache_dir))


@pytest.fixture(scope="session")
def small_run(small_flags: tuple[str, ...]) -> SmallRun:
    """`small_run(folder, *flags)`: calls main in this process with small settings, `flags` added, output to folder."""

    def run(folder: Path, *flags: str) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*small_flags, "--output_dir", str(folder), *flags])
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return Outcome(code, folder, out.getvalue(), err.getvalue(), [json.loads(line) for line in lines])

    return run


@pytest.fixture(scope="session")
def small_build(small_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> SmallBuild:
    """`small_build(*flags)`: a `Run` built as main builds it (nothing trained yet), its log open in a new folder."""

    def build(*flags: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        args, _ = parse_arguments([*small_flags, "--output_dir", str(folder), *flags])
        run = build_run(args, RunLog(quiet=True), time.monotonic())
        run.log.open(folder, rows=0)
        return run

    return build


def train_batches(run: Run, count: int) -> list[TrainBatch]:
    """The first `count` batches of the run's current epoch, as its loader would give them."""
    data = training_data(run)
    order = epoch_order(dataclasses.replace(run.args, max_batches=0), run.training, run.state.epoch)
    return [data[run.state.epoch, episodes] for episodes in order[:count]]


def train_on(run: Run, batches: Sequence[TrainBatch]) -> None:
    """One call of the training loop over these batches (fewer than --save_every: nothing is saved)."""
    loader: Any = list(batches)
    train_epoch(run, loader, run.state.batch + len(batches))


def rows_of(run: Run) -> list[dict[str, Any]]:
    """The rows that the run has written to metrics.jsonl."""
    assert run.log.folder is not None
    return [json.loads(line) for line in (run.log.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's thread count is the process's: what a run changes is put back."""
    yield
    torch.set_num_threads(1)
