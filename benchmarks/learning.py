"""Accuracy against seconds, in three regimes, over several seeds.

- seed: trained on the demonstrations of all training tasks, scored on those tasks' test pairs.
- unseen: scored on the evaluation tasks; nothing of them, by content, is trained on.
- adapted: scored on the evaluation tasks, whose demonstrations are trained on (never their test outputs).

A budget is the seconds of the whole command, validation included. With --control the same runs with the policy off
stand beside them. Test pairs are scored in every run of this benchmark: it is for reporting, not for choosing designs.

    python benchmarks/learning.py [--budgets 60 300 900] [--seeds 0 1 2] [--regimes seed unseen] [--control] [-- FLAGS]

Prints markdown, and writes it to table.md in the work folder. Runs that are complete there are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.runs import (  # noqa: E402
    Job,
    Result,
    Split,
    arguments,
    difference,
    parse,
    percent,
    provenance,
    report,
    spread,
    table,
)

REGIMES: dict[str, tuple[str, ...]] = {
    "seed": ("--val_splits", "seed"),
    "unseen": ("--val_splits", "unseen"),
    "adapted": ("--adapt", "--val_splits", "adapted"),
}
ENOUGH_FOR_VIEWS = 120  # seconds; in less, a validation with several views would leave no time to train
REFERENCE = "C++ search (icecuber, depth 2, three guesses): 129 of 419 unseen pairs"


def label(regime: str, budget: int, control: bool) -> str:
    return f"{regime} {budget} s" + (" no policy" if control else "")


def make_jobs(args: argparse.Namespace, extra: Sequence[str]) -> list[Job]:
    """Short budgets first, seed by seed."""
    jobs = []
    for budget in sorted(args.budgets):
        # More epochs than any budget lasts: the learning rate then follows the clock alone.
        length = ("--epochs", "1000", "--time_budget", str(budget), "--val_every", "0")
        views = args.val_views if budget >= ENOUGH_FOR_VIEWS else 1
        common = (*length, "--val_views", str(views), "--threads", str(args.threads), "--keep", "1")
        for seed in args.seeds:
            for regime in args.regimes:
                for control in (False, True) if args.control else (False,):
                    flags = (*common, *REGIMES[regime], *(["--no_policy"] if control else []), *extra)
                    jobs.append(Job(label(regime, budget, control), seed, flags, cold=args.cold))
    return jobs


def make_text(results: Mapping[Job, Result], args: argparse.Namespace, command: str) -> str:
    """A table for each regime, with what it comes from."""
    parts = [
        "## Accuracy against seconds\n",
        f"`{command}`\n",
        f"- seeds {' '.join(map(str, args.seeds))}; evidence "
        f"{'prepared in each run, from an empty cache' if args.cold else 'taken from the cache where it was there'}; "
        f"{args.val_views} views vote, one in less than {ENOUGH_FOR_VIEWS} s\n"
        f"{provenance(results.values())}",
        "Means over seeds [smallest, largest]; shares of test pairs in percent, exact match, size predicted. Agent "
        "alone: its views without the evidence's answers. Learned: pass@1 − vote alone, in points ± standard error "
        "over seeds. Accuracy delta: cells, after − before, with the mean of its paired standard errors.\n",
    ]
    for regime in args.regimes:
        runs = by_row(results, regime, args)
        if runs:
            parts += [f"### {regime} split\n", regime_table(runs, regime), *remarks(runs, regime)]
    return "\n".join(parts)


Rows = dict[tuple[int, bool], dict[int, Result]]  # by (budget, whether the policy is off), then by seed


def by_row(results: Mapping[Job, Result], regime: str, args: argparse.Namespace) -> Rows:
    """The regime's runs as its table has them."""
    found: Rows = {}
    for budget in sorted(args.budgets):
        for control in (False, True):
            name = label(regime, budget, control)
            runs = {job.seed: result for job, result in results.items() if job.label == name}
            if runs:
                found[budget, control] = runs
    return found


def regime_table(runs: Rows, regime: str) -> str:
    rows = []
    for (budget, control), by_seed in runs.items():
        results = list(by_seed.values())
        splits = [result.splits[regime] for result in results]
        errors = statistics.fmean(split.accuracy_delta_error for split in splits)
        rows.append(
            [
                f"{budget} s" + (", policy off" if control else ""),
                str(len(results)),
                *(percent([getattr(s, name) for s in splits]) for name in ("pass1", "pass2", "before_pass1")),
                percent([split.vote_pass1 for split in splits]),
                percent([split.agent_pass1 for split in splits]),
                difference([split.pass1 - split.vote_pass1 for split in splits]),
                f"{spread([split.accuracy_delta for split in splits], '{:+.4f}')} ± {errors:.4f}",
                spread([result.reward for result in results], "{:+.4f}"),
                spread([result.batches for result in results], "{:.0f}"),
                spread([result.seconds for result in results], "{:.0f}"),
                spread([result.prepared for result in results], "{:.0f}"),
            ]
        )
    header = (
        "budget|seeds|pass@1|pass@2|before (pass@1)|vote alone|agent alone|learned|accuracy delta|mean reward|batches"
    )
    return table([*header.split("|"), "seconds taken", "tasks prepared"], rows)


def remarks(runs: Rows, regime: str) -> list[str]:
    """Accuracy against the policy-off runs and against the budget; beside the unseen split the reference."""
    trained = {
        budget: [result.splits[regime] for result in by_seed.values()]
        for (budget, control), by_seed in runs.items()
        if not control
    }
    lines = [line for budget in trained if (line := against_control(runs, regime, budget))]
    if len(trained) > 1:
        lines.append(rising(trained))
    if regime == "unseen" and trained:
        last = trained[max(trained)]
        solved = statistics.fmean(split.pass2 * split.pairs for split in last)
        lines.append(f"{REFERENCE}. Here, {max(trained)} s, two guesses: {solved:.1f} of {last[0].pairs}.\n")
    return lines


def against_control(runs: Rows, regime: str, budget: int) -> str:
    """Paired by seed: pass@1 after and before refinement, less that of the run with the policy off; "" without one."""
    ours, control = runs[budget, False], runs.get((budget, True), {})
    pairs = [(ours[seed].splits[regime], control[seed].splits[regime]) for seed in ours if seed in control]
    if not pairs:
        return ""
    after = difference([a.pass1 - b.pass1 for a, b in pairs])
    before = difference([a.before_pass1 - b.pass1 for a, b in pairs])
    return f"{budget} s against policy off, pass@1 in points: after refinement {after}, before {before}.\n"


def rising(trained: Mapping[int, Sequence[Split]]) -> str:
    """One line: pass@2 at each budget, and where it falls."""
    means = {budget: 100 * statistics.fmean(split.pass2 for split in splits) for budget, splits in trained.items()}
    budgets = sorted(means)
    falls = [
        f"{b} s by {means[a] - means[b]:.2f}" for a, b in zip(budgets, budgets[1:], strict=False) if means[b] < means[a]
    ]
    course = ", ".join(f"{budget} s {means[budget]:.1f}" for budget in budgets)
    return f"pass@2 by budget: {course}; it {'falls at ' + ', '.join(falls) if falls else 'never falls'}.\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__ or "", work="runs/bench_learning")
    parser.add_argument("--budgets", type=int, nargs="+", default=[60, 300, 900], help="seconds (60 300 900)")
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES), help="all by default")
    parser.add_argument("--control", action="store_true", help="each run also with the policy off")
    parser.add_argument("--cold", action="store_true", help="an empty cache for each run: it prepares its evidence")
    args, extra = parse(parser, argv)
    if min(args.budgets) < 1:
        parser.error("--budgets: at least 1 second each")
    command = " ".join(["python benchmarks/learning.py", *(sys.argv[1:] if argv is None else argv)])
    return report(lambda results: make_text(results, args, command), make_jobs(args, extra), args)


if __name__ == "__main__":
    sys.exit(main())
