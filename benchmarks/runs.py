"""What the comparing benchmarks share: runs of the real command, their figures, and tables of them.

Each run is a process of its own with a folder of its own below a work folder, named by its label, seed and a digest of
its flags. A run that is complete there is not repeated, so a measurement of hours can be stopped and started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arc.run.files import default_cache, replace_file  # noqa: E402
from benchmarks.evidence import processor  # noqa: E402

SCRIPT = ROOT / "trainloop_complete_with_fixes.py"
# Of a split, by its pairs. agent_*: of the agent's views without the evidence's answers.
RATES = ("pass1", "pass2", "before_pass1", "vote_pass1", "agent_pass1", "agent_cells", "agent_sizes")


class RunFailed(Exception):
    """A run ended with an exit code other than 0; the message says which and why."""


# --------------------------------------------------------------------------------------------------------------------
# jobs and their results
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: `label` for the tables, its seed, and the script's flags (all but seed and folders)."""

    label: str
    seed: int
    flags: tuple[str, ...]
    cold: bool = False  # with an empty cache of its own, so that preparing the evidence is part of the run

    @property
    def name(self) -> str:
        """Name of its folder: the same for the same flags, another for others."""
        digest = hashlib.sha256(json.dumps([self.flags, self.cold]).encode()).hexdigest()[:8]
        return f"{self.label.replace(' ', '_')}-seed{self.seed}-{digest}"


@dataclass(frozen=True)
class Split:
    """A split's scores, in [0, 1] over its `pairs`; accuracy_delta is after - before, with its paired standard error
    (NaN for a single pair; both are NaN where time ran out before a view of any pair)."""

    pairs: int
    pass1: float
    pass2: float
    before_pass1: float
    vote_pass1: float
    agent_pass1: float
    agent_cells: float
    agent_sizes: float
    accuracy_delta: float
    accuracy_delta_error: float


@dataclass(frozen=True)
class Result:
    """What a run came to. Means are over all its batches; `prepared`: evidence files that it had to compute."""

    splits: dict[str, Split]
    batches: int
    seconds: float
    reward: float
    solved: float
    vote_solved: float
    memory_updates: int
    skipped_steps: int
    finite: bool
    prepared: int
    device: str
    machine: str
    code: str
    command: str

    @property
    def pooled(self) -> Split:
        """All pairs of all splits together. The splits have no pair in common, so their errors are independent."""
        parts, pairs = list(self.splits.values()), sum(split.pairs for split in self.splits.values())

        def mean(name: str) -> float:
            return sum(getattr(split, name) * split.pairs for split in parts) / pairs

        error = math.hypot(*(split.accuracy_delta_error * split.pairs for split in parts)) / pairs
        rates = {name: mean(name) for name in (*RATES, "accuracy_delta")}
        return Split(pairs=pairs, accuracy_delta_error=error, **rates)


def read_result(folder: Path) -> Result | None:
    """The result that a complete run left in `folder`; None where there is none."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    try:
        splits = {name: Split(**split) for name, split in stored.pop("splits").items()}
        return Result(splits=splits, **stored)
    except TypeError:  # of another version of this file, with other figures
        return None


def run(job: Job, work: Path, cache: Path) -> Result:
    """The job's result: the one found below `work`, or that of running it now (what an interrupted try left goes).

    Raises RunFailed if the command ends with an exit code other than 0.
    """
    folder = work / job.name
    if (found := read_result(folder)) is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cache = folder / "cache" if job.cold else cache
    command = [sys.executable, str(SCRIPT), "--quiet", "--no_tensorboard", "--seed", str(job.seed)]
    command += ["--cache_dir", str(cache), "--output_dir", str(folder), *job.flags]
    before, started = evidence_files(cache), time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["(nothing on stderr)"]
        raise RunFailed(f"{job.label}, seed {job.seed}: exit code {done.returncode}: {said[-1]}")
    seconds, prepared = time.monotonic() - started, evidence_files(cache) - before
    shown = " ".join(["python", SCRIPT.name, "--seed", str(job.seed), *job.flags])
    result = summarize(folder, command=shown, seconds=seconds, prepared=prepared)
    for path in [*folder.glob("step-*"), *folder.glob("best-*"), folder / "blobs", folder / "cache"]:
        shutil.rmtree(path, ignore_errors=True)  # dozens of runs: only their records are kept
    for path in folder.glob("gallery-*.json"):
        path.unlink()
    replace_file(folder / "result.json", json.dumps(asdict(result), indent=2) + "\n")
    return result


def summarize(folder: Path, *, command: str, seconds: float, prepared: int) -> Result:
    """The figures of a finished run, from its metrics.jsonl and train.log."""
    rows = rows_of(folder)
    batches, epochs = ([row for row in rows if key in row] for key in ("loss", "memory.updates"))
    lines = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    return Result(
        splits=split_scores(epochs[-1], json.loads((folder / "config.json").read_text())["val_splits"]),
        batches=len(batches),
        seconds=seconds,
        reward=mean_of(batches, "reward"),
        solved=mean_of(batches, "solved"),
        vote_solved=mean_of(batches, "vote_solved"),
        memory_updates=sum(row["memory.updates"] for row in epochs),
        skipped_steps=batches[-1]["skipped_steps"] if batches else 0,
        finite=all(row["loss"] is not None for row in batches),
        prepared=prepared,
        device=next((line for line in lines if line.startswith("Device: ")), "Device: not in train.log"),
        machine=machine(),
        code=code_digest(),
        command=command,
    )


def split_scores(row: dict[str, Any], names: Sequence[str]) -> dict[str, Split]:
    """The scores in the row of the last validation: the first split's keys carry no name. RunFailed without scores."""
    found = {}
    for number, name in enumerate(names):
        prefix = "val" if number == 0 else f"val.{name}"
        if f"{prefix}.pairs" not in row:
            raise RunFailed(f"the {name} split was not scored: its solutions are not in the data")
        # Both are null where there is nothing to tell: a single pair, or no view of any pair before time ran out.
        delta = {key: row[f"{prefix}.{key}"] for key in ("accuracy_delta", "accuracy_delta_error")}
        found[name] = Split(
            pairs=row[f"{prefix}.pairs"],
            **{key: math.nan if value is None else value for key, value in delta.items()},
            **{key: row[f"{prefix}.{key}"] for key in RATES},
        )
    return found


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Mean over the rows where the value is finite (it is null in the file otherwise); NaN for none."""
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.fmean(values) if values else math.nan


def evidence_files(cache: Path) -> int:
    """How many tasks' evidence is in the cache."""
    return sum(1 for _ in (cache / "evidence").glob("*.evidence"))


def machine() -> str:
    """Processor, cores that may be used, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores; Python {platform.python_version()}, torch {version('torch')}"


def code_digest() -> str:
    """Digest of the product's source, so that a table made from several versions of it can say so."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "arc").rglob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------------
# the command line that both benchmarks have
# --------------------------------------------------------------------------------------------------------------------


def arguments(description: str, work: str) -> argparse.ArgumentParser:
    """A parser with the flags that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(work), help=f"folder for the runs and tables ({work})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (0 1 2)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run; 0: torch's own choice")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--val_views", type=int, default=4, help="augmented views that vote in validation (4)")
    parser.add_argument("--cache_dir", type=Path, default=Path(default_cache()), help="evidence and tiny Qwen")
    parser.add_argument("--table_only", action="store_true", help="run nothing: the table of the runs that are there")
    parser.epilog = "Flags after -- go to every run as they are."
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """The benchmark's own arguments, and those after `--`, which go to every run."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:cut]), tuple(words[cut + 1 :])


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> dict[Job, Result]:
    """Every job's result in the order of `jobs`, progress on stderr; under --table_only what is there."""
    if args.table_only:
        stored = {job: read_result(args.work / job.name) for job in jobs}
        return {job: found for job, found in stored.items() if found is not None}

    def one(numbered: tuple[int, Job]) -> tuple[Job, Result]:
        number, job = numbered
        found = run(job, args.work, args.cache_dir)
        said = f"{job.label}, seed {job.seed}: pass@1 {found.pooled.pass1:.4f} in {found.seconds:.0f} s"
        print(f"[{number}/{len(jobs)}] {said}", file=sys.stderr, flush=True)
        return job, found

    with ThreadPoolExecutor(max_workers=args.parallel) as pool:
        started = [pool.submit(one, numbered) for numbered in enumerate(jobs, 1)]
        try:
            return dict(future.result() for future in started)
        except BaseException:  # a run that failed, or Ctrl-C: those that have not begun never do
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def report(make_text: Callable[[dict[Job, Result]], str], jobs: Sequence[Job], args: argparse.Namespace) -> int:
    """Run the jobs, print the text made from their results and write it to table.md. Returns the exit code."""
    try:
        results = run_all(jobs, args)
    except RunFailed as problem:
        print(f"\nerror: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    if not results:
        print(f"error: no complete run of these in {args.work}", file=sys.stderr)
        return 1
    text = make_text(results)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


# --------------------------------------------------------------------------------------------------------------------
# tables
# --------------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def resident_mib(pid: int) -> float:
    """Resident memory of a process; 0 where /proc does not tell."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    return 0.0


def provenance(results: Iterable[Result]) -> str:
    """Where the figures come from: machines, devices, and a warning if the code changed between runs."""
    results = list(results)
    lines = [f"- machine: {text}" for text in sorted({result.machine for result in results})]
    lines += [f"- {text[0].lower()}{text[1:]}" for text in sorted({result.device for result in results})]
    versions = {result.code for result in results}
    if len(versions) > 1:
        lines.append(f"- **caution**: the source changed between these runs ({len(versions)} versions)")
    return "".join(f"{line}\n" for line in lines)


def percent(values: Sequence[float]) -> str:
    """Mean of shares in percent, and their range if there are several."""
    return spread([100 * value for value in values], "{:.1f}")


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and [smallest, largest] if there are several."""
    mean = form.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} [{form.format(min(values))}, {form.format(max(values))}]"


def difference(values: Sequence[float], scale: float = 100.0) -> str:
    """Paired differences in points: mean, standard error of the mean, [smallest, largest]."""
    scaled = [scale * value for value in values]
    mean = f"{statistics.fmean(scaled):+.2f}"
    if len(scaled) < 2:
        return mean
    return f"{mean} ± {standard_error(scaled):.2f} [{min(scaled):+.2f}, {max(scaled):+.2f}]"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))


# 97.5 % quantiles of Student's t by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def beyond_chance(values: Sequence[float]) -> bool:
    """Whether Student's 95 % interval around the mean of the differences leaves 0 out. Three seeds ask for 4.3 standard
    errors, five for 2.8: an error that comes of few seeds is itself uncertain."""
    if not 2 <= len(values) <= 1 + len(STUDENT):
        return False
    return abs(statistics.fmean(values)) > STUDENT[len(values) - 2] * standard_error(values)


def verdict(values: Sequence[float]) -> str:
    """What the signs of paired differences say, and whether that is more than chance; nothing is rounded up to an
    effect."""
    signs = signs_of(values)
    return f"{signs}, beyond chance" if beyond_chance(values) else signs


def signs_of(values: Sequence[float]) -> str:
    """On which side of 0 they are."""
    if all(value == 0 for value in values):
        return "zero"
    seeds = "with the one seed" if len(values) == 1 else "with every seed"
    if min(values) > 0:
        return f"positive {seeds}"
    if max(values) < 0:
        return f"negative {seeds}"
    mean = statistics.fmean(values)
    return f"{'positive' if mean > 0 else 'negative' if mean < 0 else 'zero'} on average, not with every seed"
