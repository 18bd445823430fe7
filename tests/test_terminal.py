"""What a person watches: bars on a terminal, lines in a log file, the block at the start, the expected time."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import termios
import types
from pathlib import Path

import pytest
from conftest import Outcome, SmallBuild, SmallRun, train_batches
from helpers import ROOT, SCRIPT

from arc.loading import Unprepared
from arc.run.runlog import RunLog
from arc.run.terminal import Pace, duration


@pytest.fixture(scope="module")
def long_enough(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of 12 batches, so that the expected time is said; its outputs are no terminal."""
    flags = ("--views", "2", "--batch_size", "2", "--max_batches", "12", "--val_limit", "1")
    return small_run(tmp_path_factory.mktemp("long") / "run", *flags)


def test_the_block_at_the_start(long_enough: Outcome) -> None:
    block = long_enough.stdout.partition("[Epoch 0]")[0]
    for pattern in (
        r"^Qwen: tiny .*\d M parameters",
        r"^Device: cpu \| AMP: off \(.+\), 1 threads$",
        r"^Agent: [\d,]+ parameters",
        r"^Data: .*6 training tasks, 24 episodes x 2 views",
        r"^Validation: 2 test pairs of 1 seed tasks with 2 views",
        r"^Checkpoint: [\d.]+ MiB every 50 batches",
        r"^Folder: .*, with TensorBoard's events in it$",
    ):
        assert re.search(pattern, block, re.MULTILINE), pattern


def test_expected_time_is_said_once(long_enough: Outcome) -> None:
    lines = [line for line in long_enough.stdout.splitlines() if "Expected time" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"\[Epoch 0\] Expected time: about .+ an epoch \(12 batches\) and .+ until .+", lines[0])


def test_bars_do_not_flood_a_log_file(long_enough: Outcome) -> None:
    """No redrawing, no control characters: a whole line at the end of each bar."""
    assert "\r" not in long_enough.stderr and "\x1b" not in long_enough.stderr
    lines = long_enough.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines if "evidence" not in line] == ["epoch 0", "predicting seed"]
    assert re.search(r"12/12 \[\d\d:\d\d<.*samples/s, loss", lines[0] + lines[1])


def test_bars_on_a_terminal(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """A real one: bars are redrawn and gone at the end, log lines stand whole, and nothing is coloured."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 120))
    flags = [*small_flags, "--max_batches", "3", "--val_limit", "1", "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], stdout=terminal, stderr=terminal, cwd=ROOT)
    os.close(terminal)
    shown = b""
    with open(screen, "rb", buffering=0) as file:
        while part := read_some(file):
            shown += part
    assert process.wait() == 0
    text = "\n" + shown.decode()
    assert re.search(r"\repoch 0: +\d+%", text) and re.search(r"\rpredicting seed: +\d+%", text)
    assert not re.search(r"\x1b\[[\d;]*m", text)  # colours; the cursor may move
    for line in (tmp_path / "run" / "train.log").read_text().splitlines():
        assert re.search(rf"(\r|\n|\x1b\[A){re.escape(line)}\r\n", text), line


def read_some(file: io.FileIO) -> bytes:
    """What a terminal shows next; b"" once nobody writes to it, which Linux tells as an error."""
    try:
        return file.read(4096)
    except OSError:
        return b""


def test_quiet_bars(capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(quiet=True).bar(total=2, desc="nothing") as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_bar_over_an_iterable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In lines, whether or not something has imported a notebook's packages."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert list(RunLog().bar([1, 2, 3], total=3, desc="three")) == [1, 2, 3]
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("three: 100%") and err.count("\n") == 1


def test_evidence_that_is_prepared_is_counted_once(small_build: SmallBuild, tmp_path: Path) -> None:
    run = small_build("--cache_dir", str(tmp_path / "cold"))
    unprepared = Unprepared(run.training, run.store)
    assert len(unprepared) == 6
    batches = train_batches(run, 6)
    counts = [unprepared.met(batch.task.tolist()) for batch in batches]
    assert sum(counts) == len({task for batch in batches for task in batch.task.tolist()}) > 1
    assert [unprepared.met(batch.task.tolist()) for batch in batches] == [0] * 6
    assert len(unprepared) == len(Unprepared(run.training, run.store)) == 6 - sum(counts)  # the store has them now


def test_pace_leaves_the_first_batch_out_and_speaks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, *(100.0 + 2.0 * n for n in range(1, 30))])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    pace = Pace()
    said = [pace.measure(step) for step in range(5, 30)]
    assert said == [None] * 10 + [2.0] + [None] * 14


def test_durations() -> None:
    seconds = (0.2, 48, 99, 120, 5400, 7200)
    assert [duration(value) for value in seconds] == ["1 s", "48 s", "99 s", "2 min", "90 min", "2.0 h"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_ends_does_not_end_the_run(stream: str, small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """As `| head` does, and a terminal that is gone: the lines go on in train.log."""
    read, write = os.pipe()
    os.close(read)
    folder = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), *small_flags, "--log_every", "1", "--output_dir", str(folder)]
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
    ended = subprocess.run(command, cwd=ROOT, text=True, **outputs)  # type: ignore[call-overload]
    os.close(write)
    assert ended.returncode == 0, ended
    lines = (folder / "train.log").read_text().splitlines()
    assert lines[-1].startswith("Report: ") and any(line.startswith("Done: ") for line in lines)
    if stream == "stdout":
        assert sum("stdout cannot be written any more" in line for line in lines) == 1
        assert "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr


def test_a_full_disk_behind_stdout_is_told_in_the_log(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from arc.run.runlog import RunLog; log = RunLog()"
    code += "; log.open(Path(sys.argv[1]), rows=0); log('one'); log('two')"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert (ended.returncode, ended.stderr) == (0, b"")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["one", "stdout", "two"]
