"""What the training-free evidence is worth, and what it costs.

Prints size accuracy, training-free pass@1 and pass@2, what the same tables give with untuned weights (`plain_vote`),
and the seconds to prepare them, on three splits:

- development: every demonstration of the ARC-AGI-2 training tasks that are not in ARC-AGI-1 evaluation, held out from
  its task. Designs and constants are chosen on this one only.
- seed: the test pairs of the ARC-AGI-2 training tasks.
- unseen: the test pairs of the ARC-AGI-1 evaluation tasks.

    python benchmarks/evidence.py [--tasks N] [--processes P] [--splits development seed unseen]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arc.datasets import load_dataset  # noqa: E402
from arc.evidence import NUM_RULES, NUM_SOURCES, NUM_TABLES, QueryEvidence, TaskQueries  # noqa: E402
from arc.tasks import Grid, Task, drop_duplicates  # noqa: E402

SPLITS = ("development", "seed", "unseen")


def plain_vote(answer: QueryEvidence) -> Grid:
    """The (h, w) grid that the same tables give with weights that nothing was tuned for: coverage * (3 * perfect +
    exp(12 * (accuracy - 1))), a vote counting alike whether the context had one outcome or several.

    The weights of the experiment this project began with. What `QueryEvidence.vote` solves beyond it is due to how far
    tables are trusted, which was chosen on the development split.
    """
    accuracy, coverage, exact = answer.table_stats.T
    weight = coverage * (3 * (exact == 1) + np.exp(12 * (accuracy - 1)))
    share = (answer.codes >= 10) * weight[:, None, None]
    return np.stack([(share * (answer.codes % 10 == c)).sum(0) for c in range(10)]).argmax(0).astype(np.uint8)


@dataclass
class Tally:
    """Counts over queries: all, right size, exact vote, exact vote or dissent, exact `plain_vote`, some table exact,
    every cell right in some table."""

    queries: int = 0
    sizes: int = 0
    exact: int = 0
    either: int = 0
    plain: int = 0
    some_table: int = 0
    every_cell: int = 0
    cpu_seconds: float = 0.0

    def add(self, other: Tally) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def score(self, answer: QueryEvidence, truth: Grid) -> None:
        self.queries += 1
        if answer.size != truth.shape:
            return
        right = (answer.codes >= 10) & (answer.codes % 10 == truth)
        self.sizes += 1
        vote = answer.vote()[0]
        dissent = answer.dissent(vote)
        exact = bool((vote == truth).all())
        self.exact += exact
        self.either += exact or (dissent is not None and bool((dissent == truth).all()))
        self.plain += bool((plain_vote(answer) == truth).all())
        self.some_table += bool(right.all((1, 2)).any())
        self.every_cell += bool(right.any(0).all())


def measure(job: tuple[Task, bool]) -> Tally:
    """One task: all its planned queries are prepared (timed), then held-out demonstrations or test pairs are scored."""
    task, held_out = job
    tally, start = Tally(), time.process_time()
    queries = TaskQueries.compute(task)
    tally.cpu_seconds = time.process_time() - start
    for index, pair in enumerate(task.train if held_out else task.test):
        if pair.output is not None:
            tally.score(queries.held_out(index) if held_out else queries.test(index), pair.output)
    return tally


def tasks_of(split: str) -> Sequence[Task]:
    if split == "unseen":
        return load_dataset("arcagi1").evaluation
    training = load_dataset("arcagi2").training
    return training if split == "seed" else drop_duplicates(training, load_dataset("arcagi1").evaluation)[0]


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=None, help="only the first N tasks of each split")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="worker processes")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="which splits to score")
    args = parser.parse_args()
    if args.processes < 1 or (args.tasks is not None and args.tasks < 1):
        parser.error("--processes and --tasks must be at least 1")
    print(f"{processor()}, {args.processes} processes, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{NUM_TABLES} tables, {NUM_SOURCES} sources, {NUM_RULES} size rules")
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for split in args.splits:
            tasks = tasks_of(split)[: args.tasks]
            total, start = Tally(), time.perf_counter()
            for tally in pool.imap_unordered(measure, [(t, split == "development") for t in tasks], chunksize=8):
                total.add(tally)
            n, wall = total.queries, time.perf_counter() - start
            print(
                f"{split:12s} {len(tasks)} tasks, {n} pairs: size {total.sizes} ({total.sizes / n:.1%}), "
                f"pass@1 {total.exact} ({total.exact / n:.1%}), pass@2 {total.either} ({total.either / n:.1%}), "
                f"untuned weights {total.plain} ({total.plain / n:.1%}), some table exact {total.some_table}, "
                f"every cell in some table {total.every_cell}; "
                f"{total.cpu_seconds:.0f} CPU s, {wall:.0f} s"
            )


if __name__ == "__main__":
    main()
