"""What a whole training outlives: signals, lost workers, full disks, stopped clocks, folders that are taken away.

    python benchmarks/faults.py                       everything, about half an hour on two cores
    python benchmarks/faults.py --rounds 2 --only full_disk worker_killed
    FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz   its other half: inputs of all kinds

In each round a small run (three epochs, a checkpoint every two batches) meets one fault at a random moment. Whatever
happens, it ends with the exit code that the README promises and without a traceback, no process of it is left, and what
was saved before is still there; then `--resume` brings it to its end, and the weights that it ends with are those of a
run that met no fault, bit for bit. Prints markdown; the exit code is 1 if a round ends otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import ROOT, SCRIPT, machine, table  # noqa: E402

FLAGS = (
    *"--device cpu --amp off --threads 1 --qwen tiny --data generated --families basic --max_side 6 --tasks 2".split(),
    *"--no_evidence --agent_width 16 --agent_heads 1 --agent_blocks 1 --prompt_len 2 --prompt_dim 8".split(),
    *"--memory_size 32 --batch_size 16 --episodes 48 --epochs 3 --save_every 2 --val_limit 2 --log_every 1".split(),
    *"--no_tensorboard --workers 1".split(),
)
PATIENCE = 180.0  # seconds for any command here; each takes about ten
HOOKED = """
import errno, sys
from benchmarks.persistence import fail_at, hooked
from trainloop_complete_with_fixes import main
number, error, torn, under = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
with hooked(fail_at(number, error, torn, under)):
    sys.exit(main(sys.argv[5:]))
"""
CLOCK = """
import random, sys, time
real, offset, draw = time.time, 0.0, random.Random(int(sys.argv[1]))
def jumping():
    global offset
    if draw.random() < 0.2:
        offset += draw.uniform(-86400, 86400)
    return real() + offset
time.time = jumping
from trainloop_complete_with_fixes import main
sys.exit(main(sys.argv[2:]))
"""


class Broken(Exception):
    """What should not have happened; one line."""


class Skipped(Exception):
    """This machine does not allow it; why."""


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


# ---------------------------------------------------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------------------------------------------------


class Trial:
    """One run folder, the commands that work on it, and how they have to end."""

    def __init__(self, base: Path, rng: random.Random) -> None:
        self.rng, self.base = rng, base
        self.folder = base / "run"

    def words(self, *flags: str) -> list[str]:
        cache = ("--cache_dir", str(self.base.parent / "cache"))
        return [*FLAGS, *cache, "--output_dir", str(self.folder), *flags]

    def start(
        self, *flags: str, code: str = "", before: Sequence[str] = (), **options: object
    ) -> subprocess.Popen[str]:
        """The script (or `code`, with the words `before` in front of its own), in a process group of its own."""
        program = [sys.executable, "-c", code, *before] if code else [sys.executable, str(SCRIPT)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        settings: dict[str, object] = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [*program, *self.words(*flags)],
            text=True,
            cwd=self.base,
            start_new_session=True,
            **(settings | options),  # type: ignore[call-overload]
        )

    def end(self, process: subprocess.Popen[str], patience: float = PATIENCE) -> Ended:
        """Wait for it, so many seconds at most; no traceback, and nothing of it left."""
        try:
            out, err = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Broken(f"still there after {patience:.0f} s") from None
        if "Traceback" in (err or "") or "Exception ignored" in (err or ""):
            raise Broken(f"a traceback: {err.strip().splitlines()[-1][:200]}")
        deadline = time.monotonic() + 20  # a worker notices within seconds that its trainer was killed
        while left := self.processes():
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise Broken(f"{len(left)} processes left behind")
            time.sleep(0.2)
        return Ended(process.returncode, out or "", err or "")

    def run(self, *flags: str, **options: object) -> Ended:
        return self.end(self.start(*flags, **options))  # type: ignore[arg-type]

    def processes(self) -> list[int]:
        """Processes whose command names the folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if os.fsencode(self.folder) in path.read_bytes():
                    found.append(int(path.parent.name))
        return [pid for pid in found if pid != os.getpid()]

    def at_a_moment(self, process: subprocess.Popen[str]) -> None:
        """Some time into its training: it begins when the first rows are there."""
        rows, deadline = self.folder / "metrics.jsonl", time.monotonic() + 60
        while not (rows.is_file() and rows.stat().st_size) and process.poll() is None:
            if time.monotonic() > deadline:
                raise Broken("no batch within 60 s")
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0, 1.5))

    def saved(self) -> int:
        """Step of the newest checkpoint that is there."""
        return max((int(path.name[5:]) for path in self.folder.glob("step-*")), default=0)

    def must(self, ended: Ended, *codes: int) -> None:
        if ended.code not in codes:
            raise Broken(f"exit code {ended.code}, not {' or '.join(map(str, codes))}: {ended.err.strip()[-200:]}")

    def finish(self, expected: str, at_least: int = 0) -> None:
        """Resume to the end: what was saved is there, and the end is that of a run without faults."""
        if self.saved() < at_least:
            raise Broken(f"step {at_least} was saved, {self.saved()} is left")
        flags = ("--resume",) if self.saved() else ()
        if not flags:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.must(self.run(*flags), 0)
        if self.weights() != expected:
            raise Broken("other weights than a run without faults")

    def weights(self) -> str:
        newest = self.folder / f"step-{self.saved():09d}"
        files = [newest / f"{group}.safetensors" for group in ("model", "optim")]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


Attack = Callable[[Trial, str], None]  # the trial, and the weights that it must end with
ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------------------------------
# signals
# ---------------------------------------------------------------------------------------------------------------------


def signalled(trial: Trial, expected: str, number: int, codes: Sequence[int], *, group: bool = False) -> None:
    process = trial.start()
    trial.at_a_moment(process)
    step = trial.saved()
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(process.pid, number)
    trial.must(trial.end(process), *codes, 0)  # 0: it was done by then
    trial.finish(expected, step)


@attack
def killed(trial: Trial, expected: str) -> None:
    """SIGKILL, out of memory for example."""
    signalled(trial, expected, signal.SIGKILL, [-signal.SIGKILL])


@attack
def killed_with_its_workers(trial: Trial, expected: str) -> None:
    signalled(trial, expected, signal.SIGKILL, [-signal.SIGKILL], group=True)


@attack
def terminated(trial: Trial, expected: str) -> None:
    """SIGTERM, to it or (timeout, SLURM, systemd) to its whole group."""
    signalled(trial, expected, signal.SIGTERM, [143], group=trial.rng.random() < 0.5)


@attack
def interrupted(trial: Trial, expected: str) -> None:
    """Ctrl-C, or a terminal that is closed."""
    number = trial.rng.choice([signal.SIGINT, signal.SIGHUP])
    signalled(trial, expected, number, [128 + number], group=True)


@attack
def interrupted_many_times(trial: Trial, expected: str) -> None:
    """Several signals at once: the second one leaves at once."""
    process = trial.start()
    trial.at_a_moment(process)
    step = trial.saved()
    for _ in range(trial.rng.randint(2, 6)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, trial.rng.choice([signal.SIGINT, signal.SIGTERM]))
        time.sleep(trial.rng.choice([0, 0, 0.02]))
    # It may have saved already and be at its end, where signals are no longer its own: 143 as well, to a shell.
    trial.must(trial.end(process), 130, 143, 0, -signal.SIGTERM)
    trial.finish(expected, step)


@attack
def worker_killed(trial: Trial, expected: str) -> None:
    process = trial.start()
    trial.at_a_moment(process)
    step, workers = trial.saved(), [pid for pid in trial.processes() if pid != process.pid]
    for pid in workers[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ended = trial.end(process)
    trial.must(ended, 1, 0)
    if ended.code == 1 and ended.err.count("error: ") != 1:
        raise Broken(f"not one line: {ended.err[-300:]}")
    trial.finish(expected, step)


@attack
def stopped_for_a_while(trial: Trial, expected: str) -> None:
    """SIGSTOP and SIGCONT: a laptop that sleeps."""
    process = trial.start()
    trial.at_a_moment(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(trial.rng.uniform(0.5, 3))
        os.killpg(process.pid, signal.SIGCONT)
    trial.must(trial.end(process), 0)
    trial.finish(expected)


# ---------------------------------------------------------------------------------------------------------------------
# disks and folders
# ---------------------------------------------------------------------------------------------------------------------


@attack
def a_write_fails(trial: Trial, expected: str) -> None:
    """ENOSPC or EIO once, at any call that changes the run's folder; half of the bytes may be there."""
    number, torn = trial.rng.randint(0, 250), trial.rng.randint(0, 1)
    error = trial.rng.choice([errno.ENOSPC, errno.EIO])
    before = [str(number), str(error), str(torn), str(trial.folder)]
    trial.must(trial.run(code=HOOKED, before=before), 0, 1, 2)
    trial.finish(expected)


@attack
def full_disk(trial: Trial, expected: str) -> None:
    """A disk with room for a part of the run, which is given more before it is resumed."""
    size = trial.rng.randint(1, 8)
    trial.folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", trial.folder], capture_output=True
    ).returncode:
        raise Skipped("mounting a disk takes root")
    try:
        trial.must(trial.run(), 0, 1, 2)
        subprocess.run(["mount", "-o", "remount,size=256m", trial.folder], check=True)
        trial.finish(expected)
    finally:
        subprocess.run(["umount", trial.folder], check=True)


@attack
def records_cannot_be_written(trial: Trial, expected: str) -> None:
    """metrics.jsonl or train.log is taken away and cannot be made again: training goes on, saves, and says so."""
    process = trial.start()
    trial.at_a_moment(process)
    path = trial.folder / trial.rng.choice(["metrics.jsonl", "train.log"])
    path.unlink()
    path.mkdir()
    ended = trial.end(process)
    trial.must(ended, 1, 0)
    path.rmdir()
    trial.finish(expected)


@attack
def folder_deleted(trial: Trial, expected: str) -> None:
    """Nothing can be resumed then; but it ends in one line, and a new run is not in its way."""
    process = trial.start()
    trial.at_a_moment(process)
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.must(trial.end(process), 0, 1)
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.finish(expected)


@attack
def two_in_one_folder(trial: Trial, expected: str) -> None:
    """The second is refused, and the first does not notice."""
    process = trial.start()
    trial.at_a_moment(process)
    alive = process.poll() is None
    second = trial.start("--resume")
    out, err = second.communicate(timeout=PATIENCE)
    if alive and process.poll() is None and second.returncode != 2:
        raise Broken(f"the second ended with {second.returncode}: {err[-200:]}")
    trial.must(trial.end(process), 0)
    trial.finish(expected)


# ---------------------------------------------------------------------------------------------------------------------
# what surrounds it
# ---------------------------------------------------------------------------------------------------------------------


@attack
def nobody_reads(trial: Trial, expected: str) -> None:
    """`| head -n 3`."""
    process = trial.start(stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    for _ in range(trial.rng.randint(0, 20)):
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    trial.must(trial.end(process), 0)
    trial.finish(expected)


@attack
def clock_jumps(trial: Trial, expected: str) -> None:
    """The time of day jumps by up to a day, forwards and backwards."""
    trial.must(trial.run(code=CLOCK, before=[str(trial.rng.randint(0, 999))]), 0)
    trial.finish(expected)


@attack
def no_home(trial: Trial, expected: str) -> None:
    """HOME is not set, or nothing can be written there; the cache is named on the command line."""
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"HOME": "/proc"} if trial.rng.random() < 0.5 else {})
    trial.must(trial.run(env=environment), 0)
    trial.finish(expected)


# ---------------------------------------------------------------------------------------------------------------------
# all of them
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def trial_in(base: Path, seed: str) -> Iterator[Trial]:
    folder = Path(tempfile.mkdtemp(dir=base))
    try:
        yield Trial(folder, random.Random(seed))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each attack (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), help="all by default")
    args = parser.parse_args(argv)
    print(f"## Faults\n\n- machine: {machine()}\n", flush=True)
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        with trial_in(base, "0") as trial:
            trial.must(trial.run(), 0)
            expected = trial.weights()
        for name in args.only:
            problems, done, started = [], 0, time.monotonic()
            for number in range(args.rounds):
                with trial_in(base, f"{args.seed} {name} {number}") as trial:
                    try:
                        ATTACKS[name](trial, expected)
                        done += 1
                    except Broken as problem:
                        problems.append(f"round {number}: {problem}")
                    except Skipped as why:
                        problems = [f"skipped: {why}"]
                        break
            bad += sum(not problem.startswith("skipped") for problem in problems)
            rows.append([name.replace("_", " "), f"{done} of {args.rounds}", "; ".join(problems)[:400] or "none"])
            print(
                f"{name}: {rows[-1][1]}, {rows[-1][2]} ({time.monotonic() - started:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    print(table(["fault", "as it must be", "otherwise"], rows))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
