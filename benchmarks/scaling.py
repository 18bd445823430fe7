"""How the cost of a training step, and of a run's start, grows with what it is given.

    python benchmarks/scaling.py [--repeats 5] [--only cells context] [-- FLAGS]

Generated tasks without evidence, in this process; one thing grows, everything else stays:

- batch: queries in a batch;
- cells: rows and columns of the grids;
- context: demonstrations that Qwen reads;
- bank: entries of the memory bank, full;
- tasks: tasks that are trained on, for a step and for everything before the first one.

For each value the median of several steps on the same batch, in turn. The exponent is the slope of the logarithms, by
least squares over all values and over the last two: 1 grows in proportion, 2 with the square, 0 not at all. Prints
markdown.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from arc.run.files import default_cache  # noqa: E402
from benchmarks.runs import machine, parse, table  # noqa: E402
from benchmarks.speed import build, one_step, ready_batches  # noqa: E402
from trainloop_complete_with_fixes import Run  # noqa: E402

DRAWN = "--data generated --no_evidence --device cpu --quiet --families outline --seed 0".split()
Size = Callable[[Run, Any], float]


@dataclass(frozen=True)
class Growth:
    """One thing that grows: the flag, its values, what else is set, how large a batch has become by it."""

    flag: str
    values: tuple[int, ...]
    fixed: tuple[str, ...]
    size: Size
    what: str


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SMALL = "--max_side 6 --tasks 8"
GROWTHS = {
    "batch": Growth(
        "--batch_size", (16, 32, 64, 128, 256), words(SMALL), lambda run, batch: len(batch.query), "queries"
    ),
    "cells": Growth(
        "--max_side",
        (6, 9, 13, 18, 26),
        words("--tasks 8 --batch_size 16 --max_cells 100000"),
        lambda run, batch: batch.query.target.shape[1],
        "padded cells of a grid",
    ),
    "context": Growth(
        "--pairs",
        (2, 4, 8, 16, 30),
        words(f"{SMALL} --batch_size 32 --max_context_tokens 8192"),
        lambda run, batch: batch.context_ids.shape[1],
        "tokens that Qwen reads",
    ),
    "bank": Growth(
        "--memory_size",
        (64, 512, 4096, 32768, 262144),
        words(f"{SMALL} --batch_size 32"),
        lambda run, batch: len(run.memory.task),
        "entries of the bank",
    ),
    "tasks": Growth(
        "--tasks",
        (4, 16, 64, 256, 1024),
        words("--max_side 6 --batch_size 32"),
        lambda run, batch: len(run.training),
        "training tasks",
    ),
}


def fill(run: Run) -> None:
    """A full bank of other tasks' entries."""
    bank = run.memory
    generator = torch.Generator().manual_seed(0)
    bank.keys.copy_(torch.randn(bank.keys.shape, generator=generator))
    bank.task.copy_(torch.arange(len(bank.task)) + 10**6)
    bank.accuracy.fill_(1.0)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(size), by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in seconds]
    middle, level = statistics.fmean(x), statistics.fmean(y)
    spread = sum((each - middle) ** 2 for each in x)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / spread


def measure(growth: Growth, repeats: int, cache: Path, extra: Sequence[str]) -> str:
    runs, sizes, starts = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for value in growth.values:
            began = time.perf_counter()
            run = build([*DRAWN, *growth.fixed, growth.flag, str(value), *extra], cache, Path(scratch))
            (batch,) = ready_batches(run, 1)
            starts.append(time.perf_counter() - began)
            if growth.flag == "--memory_size":
                fill(run)
            runs.append((run, batch))
            sizes.append(growth.size(run, batch))
        times: list[list[float]] = [[] for _ in runs]
        for repeat in range(repeats + 1):
            for (run, batch), found in zip(runs, times, strict=True):
                began = time.perf_counter()
                one_step(run, batch)
                if repeat:  # the first one allocates
                    found.append(time.perf_counter() - began)
        for run, _ in runs:
            run.log.close()
    steps = [statistics.median(found) for found in times]
    rows = [
        [f"{size:,.0f}", f"{1000 * step:.0f}", f"{start:.2f}"]
        for size, step, start in zip(sizes, steps, starts, strict=True)
    ]
    fitted = [
        f"{exponent(sizes, found):.2f} (last two {exponent(sizes[-2:], found[-2:]):.2f})" for found in (steps, starts)
    ]
    rows.append(["exponent", *fitted])
    return table([growth.what, "ms a step", "s before the first"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each value (5)")
    parser.add_argument("--only", nargs="+", choices=list(GROWTHS), default=list(GROWTHS), help="all by default")
    parser.add_argument("--cache_dir", type=Path, default=Path(default_cache()), help="tiny Qwen")
    args, extra = parse(parser, argv)
    print(f"## Growth of cost\n\n- machine: {machine()}\n")
    for name in args.only:
        print(f"### {name}\n\n{measure(GROWTHS[name], args.repeats, args.cache_dir, extra)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
