"""Two hours of a session in small: thousands of batches, dozens of ends and resumes, and nothing that grows.

    python benchmarks/soak.py                        7,200 batches twice, about a quarter of an hour on two cores
    python benchmarks/soak.py --batches 2400 --ends 8   (fewer do not fill what is kept before they are judged)

Two hours at a batch a second are 7,200 batches; a tiny model takes minutes for them. One run takes them at a stretch,
another is killed or told to end (SIGKILL, SIGTERM, SIGINT) at random moments and resumed each time. Both keep a backup
and have a memory bank at its bound. Held against each other and against themselves: resident memory, open files and
bytes on the disks of the second quarter against the last, the rows of metrics.jsonl, the weights at the end. Prints
markdown; the exit code is 1 where something grows, is missing or differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.faults import Ended, Trial  # noqa: E402
from benchmarks.runs import machine, resident_mib, rows_of, table  # noqa: E402

PATIENCE = 7200.0  # seconds for any command here
EPOCH = 300  # batches of an epoch, of two episodes each; a validation after it
RECORDS = ("metrics.jsonl", "train.log", "tensorboard", "report.html")  # these grow by a row a batch
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass(frozen=True)
class Sample:
    """What the training process and its folders hold at a moment."""

    memory: float  # resident, MiB
    files: int
    disk: float  # the run's checkpoints and those of the backup, MiB
    checkpoints: int


def held(root: Path) -> int:
    """Bytes of everything below it but records; files that vanish meanwhile count as nothing."""
    total = 0
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in RECORDS]
        for name in set(files) - set(RECORDS):
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).stat().st_size
    return total


class Watch(threading.Thread):
    """Looks at a process twice a second until it has ended."""

    def __init__(self, process: subprocess.Popen[str], run: Path, backup: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.run_folder, self.backup = process, run, backup
        self.samples: list[Sample] = []

    def run(self) -> None:
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                files = len(os.listdir(f"/proc/{self.process.pid}/fd"))
                disk = (held(self.run_folder) + held(self.backup)) / 2**20
                checkpoints = sum(1 for _ in self.run_folder.glob("step-*"))
                self.samples.append(Sample(resident_mib(self.process.pid), files, disk, checkpoints))
            time.sleep(0.5)


class Soak:
    """A run, its backup, and what was seen of them."""

    def __init__(self, base: Path, epochs: int, seed: int) -> None:
        base.mkdir()
        self.trial = Trial(base, random.Random(seed))
        self.backup = base / "backup"
        self.epochs = epochs
        self.samples: list[Sample] = []

    def start(self, *flags: str) -> tuple[subprocess.Popen[str], Watch]:
        own = f"--batch_size 8 --episodes {2 * EPOCH} --epochs {self.epochs} --save_every 50 --memory_size 8".split()
        # Its output goes nowhere: a pipe that nobody reads while we watch would fill up.
        process = self.trial.start(*own, "--backup_dir", str(self.backup), *flags, stdout=subprocess.DEVNULL)
        watch = Watch(process, self.trial.folder, self.backup)
        watch.start()
        return process, watch

    def end(self, process: subprocess.Popen[str], watch: Watch) -> Ended:
        ended = self.trial.end(process, patience=PATIENCE)
        watch.join()
        self.samples += watch.samples
        return ended

    def at_a_stretch(self) -> None:
        self.trial.must(self.end(*self.start()), 0)

    def interrupted(self, ends: int) -> int:
        """Ended `ends` times, evenly over the run with some chance, and resumed; how often it was."""
        total, done = self.epochs * EPOCH, 0
        for number in range(1, ends + 1):
            before = self.written()
            process, watch = self.start(*(("--resume",) if self.trial.saved() else ()))
            target = total * (number - self.trial.rng.random()) / (ends + 1)
            while process.poll() is None and (self.written() == before or self.trial.saved() < target):
                time.sleep(0.02)  # before its first row it may not yet listen to signals
            time.sleep(self.trial.rng.uniform(0, 2))
            kind = self.trial.rng.choice(list(CODES))
            done += process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, kind)
            self.trial.must(self.end(process, watch), CODES[kind], 0)
        self.trial.must(self.end(*self.start("--resume")), 0)
        return done

    def written(self) -> int:
        path = self.trial.folder / "metrics.jsonl"
        return path.stat().st_mtime_ns if path.is_file() else 0


def grown(samples: Sequence[Sample], what: str) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    values = [getattr(sample, what) for sample in samples]
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])


def judged(name: str, soak: Soak, straight: Soak) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and what is not as it must be."""
    rows, wrong = [], []
    for what, unit, slack in (
        ("memory", "MiB resident", 1.03),
        ("files", "open files", 1.2),
        ("disk", "MiB kept", 1.02),
    ):
        if soak is straight:
            early, late = grown(soak.samples, what)
            rows.append([f"{name}: {unit}, second and last quarter", f"{early:,.1f}, {late:,.1f}"])
        else:  # each part is a process of its own, which grows at its start
            early, late = (max(getattr(sample, what) for sample in each.samples) for each in (straight, soak))
            rows.append([f"{name}: {unit}, the most at a stretch and here", f"{early:,.1f}, {late:,.1f}"])
        if late > early * slack:
            wrong.append(f"{name}: {unit} grew from {early:,.1f} to {late:,.1f}")
    most = max(sample.checkpoints for sample in soak.samples)
    rows.append([f"{name}: most checkpoints at a time", str(most)])
    if most > 8:  # five kept, one being written, and what is about to go
        wrong.append(f"{name}: {most} checkpoints at a time")
    metrics = rows_of(soak.trial.folder)
    steps = [row["step"] for row in metrics if "loss" in row]
    rows.append([f"{name}: rows of training", f"{len(steps)}, of steps {steps[0]} to {steps[-1]}"])
    if steps != list(range(1, soak.epochs * EPOCH + 1)):
        wrong.append(f"{name}: its rows are not one a batch, in order")
    bank = (str(metrics[-1][f"memory.{what}"]) for what in ("size", "updates"))
    rows.append([f"{name}: entries of the bank, stored in all", ", ".join(bank)])
    if soak.trial.weights() != straight.trial.weights():
        wrong.append(f"{name}: other weights at the end")
    return rows, wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=7200, help=f"a multiple of {EPOCH} (7200)")
    parser.add_argument("--ends", type=int, default=24, help="how often the second run is ended (24)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    epochs = max(1, args.batches // EPOCH)
    print(f"## Soak: {epochs * EPOCH:,} batches\n\n- machine: {machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        straight = Soak(Path(scratch) / "straight", epochs, args.seed)
        parts = Soak(Path(scratch) / "parts", epochs, args.seed)
        started = time.monotonic()
        straight.at_a_stretch()
        between = time.monotonic()
        ends = parts.interrupted(args.ends)
        took = (between - started, time.monotonic() - between)
        first, wrong = judged("at a stretch", straight, straight)
        second, more = judged("in parts", parts, straight)
    rows = [["seconds at a stretch, in parts", "{:.0f}, {:.0f}".format(*took)], ["ended and resumed", f"{ends} times"]]
    print(table(["", "measured"], [*rows, *first, *second]))
    print("\nas it must be" if not (wrong := wrong + more) else "\n" + "\n".join(f"- {line}" for line in wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
