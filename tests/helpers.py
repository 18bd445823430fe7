"""What the end-to-end tests share: commands in a process of their own, interruptions, comparison of runs.

Nothing here replaces a part of the program: signals are real signals, and folders are compared byte by byte.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from arc.memory import MemoryBank, Offers
from model_persistence import Checkpoint, ModelPersistence
from trainloop_complete_with_fixes import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "trainloop_complete_with_fixes.py"
MEASURED_TIMES = {"samples_per_s"}  # what a second run of the same command cannot repeat
# Rates at which a run of a dozen batches changes its predictions, so that rewards and deltas are not all zero.
FAST = ("--agent_lr", "0.1", "--qwen_lr", "0.01", "--policy_lr", "1")
PATIENCE = 240.0  # seconds until a process that does not end is a failure; far above what any of them takes


# --------------------------------------------------------------------------------------------------------------------
# commands
# --------------------------------------------------------------------------------------------------------------------


def start(flags: Sequence[str], cwd: Path, errors: IO[str] | int) -> subprocess.Popen[str]:
    """The script in a process of its own, as a user starts it; its stderr goes to `errors`."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # a process group of its own, as a shell gives to each command
    )


def command(flags: Sequence[str], cwd: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the script in a process of its own."""
    with start(flags, cwd, subprocess.PIPE) as process:
        out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def signal_at_line(flags: Sequence[str], cwd: Path, line: str, send: Callable[[int], None]) -> tuple[int, str]:
    """Run the script in a process of its own and call `send` with its id once a line that starts with `line` is there.

    Returns (exit code, its stdout, only up to `line` if it was killed).
    """
    # A file and not a pipe, which could fill up with progress bars and stop the process while nobody reads it.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, start(flags, cwd, errors) as process:
        assert process.stdout is not None
        seen: list[str] = []
        for text in process.stdout:
            seen.append(text)
            if text.startswith(line):
                send(process.pid)
                break
        code = process.wait(timeout=PATIENCE)
        if code != -signal.SIGKILL:  # what a killed one leaves are worker processes, which hold its stdout for a while
            seen.append(process.stdout.read())
        errors.seek(0)
        assert any(text.startswith(line) for text in seen), f"{line!r} never came: {''.join(seen)}{errors.read()}"
    return code, "".join(seen)


def everything_below(*folders: Path) -> dict[str, bytes]:
    """Contents of every file below `folders` by path; folders count too, with empty contents."""
    paths = sorted(path for folder in folders for path in (folder, *folder.rglob("*")))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths if path.exists()}


# --------------------------------------------------------------------------------------------------------------------
# interruptions in this process
# --------------------------------------------------------------------------------------------------------------------


class Tripwire(io.StringIO):
    """Sends this process a real signal when `text` is written to it for the `occurrence`-th time.

    In the place of stdout it stops a run at an exact and repeatable point: the program's handler runs before the write
    returns.
    """

    def __init__(self, text: str, occurrence: int, number: signal.Signals) -> None:
        super().__init__()
        self.text, self.left, self.number = text, occurrence, number

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.text in text:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(self.number)
        return count


def run_into(wire: Tripwire, flags: Sequence[str]) -> int:
    """main(flags) in this process with `wire` for stdout; the exit code. A signal that the program does not handle is
    ignored here instead of ending the test session."""
    with ignored(wire.number), contextlib.redirect_stdout(wire), contextlib.redirect_stderr(io.StringIO()):
        return main(flags)


@contextlib.contextmanager
def ignored(number: signal.Signals) -> Iterator[None]:
    """Inside the block `number` has a handler that does nothing; the program must have put it back at the end."""

    def nothing(*_: object) -> None:
        pass

    before = signal.signal(number, nothing)
    try:
        yield
        assert signal.getsignal(number) is nothing, f"the handler of {number.name} was not put back"
    finally:
        signal.signal(number, before)


# --------------------------------------------------------------------------------------------------------------------
# comparison
# --------------------------------------------------------------------------------------------------------------------


def strict_json(text: str) -> Any:
    """JSON as RFC 8259 has it: no NaN, no Infinity, no key twice."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), f"a key occurs twice in {pairs}"
        return dict(pairs)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, strictly parsed."""
    return [strict_json(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what is measured by the clock."""
    return [{key: value for key, value in row.items() if key not in MEASURED_TIMES} for row in rows]


def load(run: Path, which: str = "latest") -> Checkpoint:
    """A verified checkpoint of a run that nobody writes to."""
    with ModelPersistence(run, read_only=True) as persistence:
        return persistence.load(which)


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Places at which two state trees differ; tensors and numbers are compared bit for bit."""
    if type(a) is not type(b):
        return [f"{place}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, torch.Tensor):
        return [] if same_bits(a, b) else [f"{place}: tensors {tuple(a.shape)} and {tuple(b.shape)} differ"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{place}: keys {sorted(map(str, a.keys() ^ b.keys()))} are on one side only"]
        return [found for key in a for found in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{place}: {len(a)} and {len(b)} items"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{place}/{i}")]
    equal = a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
    return [] if equal else [f"{place}: {a!r} and {b!r}"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and bytes: unlike `==`, -0.0 is not 0.0 and NaN is NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def differences_of_runs(a: Path, b: Path) -> list[str]:
    """Where the latest checkpoints of two runs differ, all but the flags (folders differ, and so may harmless ones)."""
    first, second = (
        {
            **checkpoint.state,
            "extra": {key: value for key, value in checkpoint.state["extra"].items() if key != "flags"},
            "frozen": checkpoint.frozen,
            "step": checkpoint.step,
        }
        for checkpoint in (load(a), load(b))
    )
    return differences(first, second)


def offer(
    bank: MemoryBank, key: Tensor, value: Tensor, task: int, accuracy: float, threshold: float, step: int
) -> bool:
    """Offer key (E,), value (K, D) of one task alone; whether it was stored."""
    tasks, accuracies = torch.tensor([task]), torch.tensor([accuracy], dtype=torch.float64)
    offers = Offers.of(key[None], value[None], tasks.to(key.device), accuracies.to(key.device))
    return bool(bank.take(offers, (tasks, offers.accuracies.cpu()), threshold, step))
