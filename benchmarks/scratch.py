"""What the trainer learns from nothing (generated tasks, no evidence, sizes predicted), and what each part is worth.

Two measurements, both of the real command on the basic families with grids up to 6 x 6:

- budgets: the full program for so many seconds of the whole command, from short to long;
- parts: every variant with one thing turned off, over the same episodes as the full program (`--steps` batches: about
  as many as it sees in five minutes), seconds beside them.

    python benchmarks/scratch.py [--budgets 300 900 2700] [--steps 640] [--seeds 0 1 2] [--only ablate_1 old] [-- FLAGS]

`--parallel 2` runs two at a time, one thread each. Prints markdown, and writes it to table.md in the work folder, with
curves.html beside it. Runs that are complete there are not repeated, so it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arc.episodes import epoch_order  # noqa: E402
from arc.report.charts import Series, line_chart  # noqa: E402
from benchmarks.fixes import ARC_ONLY, FULL, MEANING, VARIANTS, Measure, paired  # noqa: E402
from benchmarks.runs import (  # noqa: E402
    Job,
    Result,
    arguments,
    difference,
    parse,
    percent,
    provenance,
    report,
    rows_of,
    spread,
    table,
    verdict,
)
from trainloop_complete_with_fixes import parse_arguments  # noqa: E402

TASKS = ("--data", "generated", "--families", "basic", "--max_side", "6", "--no_evidence")
SPLITS = {"seed": "known tasks, new inputs", "unseen": "unseen tasks", "families": "unseen families"}
PARTS = {name: flags for name, flags in VARIANTS.items() if name not in ARC_ONLY}
MEASURES: dict[str, Measure] = {
    "known tasks": lambda result: result.splits["seed"].pass1,
    "unseen tasks": lambda result: result.splits["unseen"].pass1,
    "known, cells": lambda result: result.splits["seed"].agent_cells,
    "known, sizes": lambda result: result.splits["seed"].agent_sizes,
}
Rows = Sequence[Mapping[str, Any]]
# What a fix is about by its own text, and when: (name, key in metrics.jsonl, part of the run, how much of it is good).
ABOUT: dict[str, tuple[str, str, tuple[float, float], int]] = {
    "ablate_2": ("Reward, last quarter", "reward", (0.75, 1.0), 1),
    "ablate_3": ("share of wrong cells, last quarter", "mask_ratio", (0.75, 1.0), -1),
    "ablate_4": ("loss of the sizes in nats, first quarter", "efe.size", (0.0, 0.25), -1),
    "ablate_5": ("entries of the memory after the first epoch", "memory.size", (0.0, 0.25), 1),
    "ablate_7": ("loss, last quarter", "loss", (0.75, 1.0), -1),
}


def make_jobs(args: argparse.Namespace, extra: Sequence[str]) -> list[Job]:
    """The budgets, then the parts, seed by seed, so that what is complete at any time can be compared."""
    common = (*TASKS, "--threads", str(args.threads), "--keep", "1", *extra)
    chosen = [name for name in PARTS if name == FULL or args.only is None or name in args.only]
    jobs = [
        Job(f"{budget} s", seed, ("--epochs", "1000", "--time_budget", str(budget), *common))
        for seed in args.seeds
        for budget in sorted(args.budgets)
    ]
    epoch = ("--epochs", str(args.epochs), "--max_batches", str(args.steps // args.epochs), "--val_every", "0")
    if args.steps:
        jobs += [Job(name, seed, (*epoch, *PARTS[name], *common)) for seed in args.seeds for name in chosen]
    return jobs


def make_text(results: Mapping[Job, Result], args: argparse.Namespace, command: str) -> str:
    """The tables with what they come from; draws the curves."""
    example = next(iter(results.values()))
    pairs = ", ".join(f"{SPLITS[name]} {split.pairs}" for name, split in example.splits.items())
    parts = [
        "## From scratch\n",
        f"`{command}`\n",
        f"- seeds {' '.join(map(str, args.seeds))}; pairs: {pairs}; {args.parallel} at a time\n"
        f"{provenance(results.values())}",
        "Exact match of the first attempt in percent, sizes predicted; means over seeds [smallest, largest].\n",
    ]
    if budgets := sorted({int(job.label[:-2]) for job in results if job.label.endswith(" s")}):
        parts += ["### By budget\n", budget_table(results, budgets), "By family, known tasks / unseen tasks:\n"]
        parts.append(family_table(args.work, results, budgets))
        (args.work / "curves.html").write_text(curves(args.work, results, budgets), encoding="utf-8")
    if any(job.label == FULL for job in results):
        parts += [
            f"### What each part is worth ({args.steps} batches in {args.epochs} epochs)\n",
            "Full program − variant with the same seed and the same episodes, in points: mean ± standard error over "
            "seeds [smallest, largest].\n",
            worth_table(args.work, results),
            "What a fix is about by its own text: means over seeds, and with how many of them it is better.\n",
            about_table(args.work, results),
            "The runs themselves:\n",
            absolute_table(results),
        ]
    return "\n".join(parts)


def budget_table(results: Mapping[Job, Result], budgets: Sequence[int]) -> str:
    rows = []
    for budget in budgets:
        runs = [result for job, result in results.items() if job.label == f"{budget} s"]
        rows.append([f"{budget} s", str(len(runs)), *figures(runs)])
    return table(["budget", "seeds", *FIGURES], rows)


FIGURES = (*SPLITS.values(), "known, before", "unseen, before", "delta known", "delta unseen", "batches", "seconds")


def figures(runs: Sequence[Result]) -> list[str]:
    def delta(name: str) -> str:
        values = [run.splits[name].accuracy_delta for run in runs]
        errors = [run.splits[name].accuracy_delta_error for run in runs]
        return f"{spread(values, '{:+.4f}')} ± {sum(errors) / len(errors):.4f}"

    return [
        *(percent([run.splits[name].pass1 for run in runs]) for name in SPLITS),
        *(percent([run.splits[name].before_pass1 for run in runs]) for name in ("seed", "unseen")),
        *(delta(name) for name in ("seed", "unseen")),
        spread([run.batches for run in runs], "{:.0f}"),
        spread([run.seconds for run in runs], "{:.0f}"),
    ]


def validations(work: Path, job: Job) -> list[dict[str, float]]:
    """The rows of a run's validations."""
    return [row for row in rows_of(work / job.name) if "val.pass1" in row]


def family_table(work: Path, results: Mapping[Job, Result], budgets: Sequence[int]) -> str:
    """Exact match by family at the end of each budget, means over seeds."""
    columns: dict[int, dict[str, list[float]]] = {}
    for budget in budgets:
        last = [validations(work, job)[-1] for job in results if job.label == f"{budget} s"]
        keys = [key for key in last[0] if ".family." in key and ".families." not in key]
        columns[budget] = {key: [row[key] for row in last] for key in keys}
    names = sorted({key.rpartition(".")[2] for column in columns.values() for key in column})

    def cell(column: Mapping[str, list[float]], name: str) -> str:
        found = [column.get(f"{split}.family.{name}") for split in ("val", "val.unseen")]
        return " / ".join("–" if values is None else f"{100 * sum(values) / len(values):.0f}" for values in found)

    rows = [[name, *(cell(columns[budget], name) for budget in budgets)] for name in names]
    return table(["family", *(f"{budget} s" for budget in budgets)], rows)


def curves(work: Path, results: Mapping[Job, Result], budgets: Sequence[int]) -> str:
    """Exact match, cells and sizes of the known tasks, and exact match of unseen ones, in the longest run: a page."""
    job = next(job for job in results if job.label == f"{budgets[-1]} s")
    rows = validations(work, job)
    shown = {"val.pass1": "known", "val.cell_acc": "cells", "val.size_acc": "sizes", "val.unseen.pass1": "unseen"}
    series = [Series(name, [(row["step"], row.get(key)) for row in rows]) for key, name in shown.items()]
    style = "body{--s0:#2563eb;--s1:#d97706;--s2:#059669;--s3:#dc2626;--muted:#666;--rule:#ddd;font-family:sans-serif}"
    chart = line_chart(f"Learning from nothing, {job.label}, seed {job.seed}", series)
    return f"<!doctype html><meta charset=utf-8><title>Learning curves</title><style>{style}</style>{chart}"


def worth_table(work: Path, results: Mapping[Job, Result]) -> str:
    """Training queries of the last quarter are many times as many as the pairs of known tasks, so their share is
    told from chance soonest."""
    rows = []
    solved = {job: mean_over(rows_of(work / job.name), "solved", (0.75, 1.0)) for job in results}
    for variant in PARTS:
        differences = {name: paired(results, variant, measure) for name, measure in MEASURES.items()}
        if variant != FULL and (known := differences["known tasks"]):
            queries = paired(solved, variant, float)
            shown = [difference(values) for values in (*differences.values(), queries)]
            rows.append([MEANING[variant], str(len(known)), *shown, verdict(known), verdict(queries)])
    columns = ["training queries solved, last quarter", "effect on known tasks", "effect on training queries"]
    return table(["part", "seeds", *MEASURES, *columns], rows)


def about_table(work: Path, results: Mapping[Job, Result]) -> str:
    rows = []
    for variant, (name, key, part, sign) in ABOUT.items():
        figures = {
            job: mean_over(rows_of(work / job.name), key, part) for job in results if job.label in (FULL, variant)
        }
        with_it, without = (
            {job.seed: n for job, n in figures.items() if job.label == label} for label in (FULL, variant)
        )
        if seeds := sorted(with_it.keys() & without.keys()):
            better = sum(sign * (with_it[seed] - without[seed]) > 0 for seed in seeds)
            shown = [spread([each[seed] for seed in seeds], "{:.4g}") for each in (with_it, without)]
            rows.append([MEANING[variant], name, *shown, f"{better} of {len(seeds)}"])
    return table(["part", "measure", "with it", "without", "better with it"], rows)


def mean_over(rows: Rows, key: str, part: tuple[float, float]) -> float:
    """Mean of `key` over a part of the rows that have it, from and to these shares of them; one row at least."""
    values = [row[key] for row in rows if row.get(key) is not None]
    first = int(part[0] * len(values))
    return statistics.fmean(values[first : max(first + 1, int(part[1] * len(values)))])


def absolute_table(results: Mapping[Job, Result]) -> str:
    rows = []
    for variant in PARTS:
        if runs := [result for job, result in results.items() if job.label == variant]:
            rows.append([variant, str(len(runs)), *figures(runs)])
    return table(["variant", "seeds", *FIGURES], rows)


def options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """The benchmark's own flags, and those for every run."""
    parser = arguments(__doc__ or "", work="runs/bench_scratch")
    parser.add_argument("--budgets", type=int, nargs="*", default=[300, 900, 2700], help="seconds (300 900 2700)")
    parser.add_argument("--steps", type=int, default=640, help="batches of a run with a part off (640); 0: none")
    parser.add_argument("--epochs", type=int, default=4, help="in as many equal epochs (4)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=None, help="these, besides full")
    args, extra = parse(parser, argv)
    if args.epochs < 1 or args.steps % args.epochs:
        parser.error(f"--steps {args.steps} is not a multiple of --epochs {args.epochs}")
    most = len(epoch_order(parse_arguments([*TASKS, *extra])[0], (), 0))
    if args.steps > args.epochs * most:
        parser.error(
            f"--steps {args.steps}: an epoch has {most} batches, so that takes more than {args.epochs} --epochs"
        )
    return args, extra


def main(argv: Sequence[str] | None = None) -> int:
    args, extra = options(argv)
    command = " ".join(["python benchmarks/scratch.py", *(sys.argv[1:] if argv is None else argv)])
    return report(lambda results: make_text(results, args, command), make_jobs(args, extra), args)


if __name__ == "__main__":
    sys.exit(main())
