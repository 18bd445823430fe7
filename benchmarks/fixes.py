"""What each of the seven fixes, Qwen, the policy, the memory and the evidence are worth.

Every variant is the real command with one thing turned off, trained on the same batches in the same order for the same
number of steps (but where half of the batches are of generated tasks), with several seeds; it is compared with the full
program of the same seed. Scored on the development split (`--dev`): demonstrations of tasks held out whole, and one
held-out demonstration of each training task. No test pair is touched. Several short epochs, because fixes 4 and 5 act
across epochs.

    python benchmarks/fixes.py [--steps 150] [--epochs 3] [--seeds 0 1 2] [--only ablate_3 no_policy] [-- FLAGS]

Prints markdown, and writes it to table.md in the work folder. Runs that are complete there are not repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.runs import (  # noqa: E402
    RATES,
    Job,
    Result,
    arguments,
    difference,
    parse,
    percent,
    provenance,
    report,
    spread,
    table,
    verdict,
)
from trainloop_complete_with_fixes import ABLATION  # noqa: E402

FULL = "full"
VARIANTS: dict[str, tuple[str, ...]] = {
    FULL: (),
    **{f"ablate_{number}": ("--ablate", str(number)) for number in ABLATION},
    # The three things that fix 3 is made of.
    "hard_cells": ("--hard_floor", "1"),
    "grid_focus": ("--grid_focus", "0"),
    "keep_solved": ("--keep_solved", "0"),
    "frozen_qwen": ("--qwen_tune", "frozen"),
    "no_policy": ("--no_policy",),
    "no_memory": ("--no_memory",),
    "no_evidence": ("--no_evidence",),
    "generated": ("--extra_data", "generated", "--episodes", "1776"),
    "no_fixes": ("--ablate", ",".join(map(str, ABLATION))),
    "old": ("--old",),
}
# From nothing the first is the whole of fix 3, and the others are off, or not there.
ARC_ONLY = ("hard_cells", "grid_focus", "keep_solved", "no_evidence", "generated")
MEANING = {
    **{f"ablate_{number}": f"fix {number} (off: {text})" for number, text in ABLATION.items()},
    "hard_cells": "of fix 3, wrong cells weigh more than right ones (off: --hard_floor 1)",
    "grid_focus": "of fix 3, grids that are nearly right weigh more (off: --grid_focus 0)",
    "keep_solved": "of fix 3, grids that the vote solves weigh more (off: --keep_solved 0)",
    "frozen_qwen": "Qwen's backbone trains (off: frozen, queries and projection train)",
    "no_policy": "the policy (off: no second pass in training, no refinement of prompts at test time)",
    "no_memory": "the memory bank",
    "no_evidence": "the evidence (off: no tables, no size rules, canvases of the input's size)",
    "generated": "training on ARC alone (off: about half of the batches are of generated tasks)",
    "no_fixes": "all seven fixes (off: each turned back, at the program's learning rates)",
    "old": "all seven fixes and the learning rates (off: each turned back, at the seed's rates, 1e-5 and 5e-5)",
}
T = TypeVar("T")
Measure = Callable[[Result], float]
MEASURES: dict[str, Measure] = {
    "pass@1": lambda result: result.pooled.pass1,
    "pass@2": lambda result: result.pooled.pass2,
    "agent alone": lambda result: result.pooled.agent_pass1,
    "its cells": lambda result: result.pooled.agent_cells,
    "its sizes": lambda result: result.pooled.agent_sizes,
    "training queries solved": lambda result: result.solved,
}


def make_jobs(args: argparse.Namespace, extra: Sequence[str]) -> list[Job]:
    """Seed by seed, so that what is complete at any time can be compared."""
    budget = ("--epochs", str(args.epochs), "--max_batches", str(args.steps // args.epochs), "--val_every", "0")
    common = (*budget, "--dev", "--val_views", str(args.val_views), "--threads", str(args.threads))
    chosen = [name for name in VARIANTS if name == FULL or args.only is None or name in args.only]
    kept = ("--keep", "1", "--save_every", str(10 * args.steps))  # saved at epoch ends only
    return [Job(name, seed, (*common, *kept, *VARIANTS[name], *extra)) for seed in args.seeds for name in chosen]


def paired(results: Mapping[Job, T], variant: str, measure: Callable[[T], float]) -> list[float]:
    """full - variant for every seed that has both: what the part that is off is worth."""
    by_seed = {(job.label, job.seed): measure(result) for job, result in results.items()}
    seeds = sorted({job.seed for job in results})
    both = [seed for seed in seeds if (FULL, seed) in by_seed and (variant, seed) in by_seed]
    return [by_seed[FULL, seed] - by_seed[variant, seed] for seed in both]


def make_text(results: Mapping[Job, Result], args: argparse.Namespace, command: str) -> str:
    """The two tables with what they come from."""
    example = next(iter(results.values()))
    splits = ", ".join(f"{name} {split.pairs}" for name, split in example.splits.items())
    return "\n".join(
        [
            "## What each part is worth\n",
            f"`{command}`\n",
            f"- {example.batches} batches in {args.epochs} epochs, seeds {' '.join(map(str, args.seeds))}; pairs "
            f"(first seed): {splits}\n{provenance(results.values())}",
            "Full program − variant with the same seed and the same batches, in points: mean ± standard error over "
            "seeds [smallest, largest]. Positive: the part helps. Agent alone: pass@1 of its views without the "
            "evidence's answers, which the last column judges; in the attempts it replaces the vote only where it has "
            "proved better.\n",
            worth_table(results),
            "The runs themselves, means over seeds [smallest, largest], both splits together; shares in percent.\n",
            absolute_table(results),
        ]
    )


def worth_table(results: Mapping[Job, Result]) -> str:
    rows = []
    for variant in VARIANTS:
        differences = {name: paired(results, variant, measure) for name, measure in MEASURES.items()}
        if variant != FULL and differences["pass@1"]:
            shown = [difference(values) for values in differences.values()]
            runs = str(len(differences["pass@1"]))
            rows.append([MEANING[variant], runs, *shown, verdict(differences["agent alone"])])
    return table(["part", "seeds", *MEASURES, "effect on the agent alone"], rows)


def absolute_table(results: Mapping[Job, Result]) -> str:
    rows = []
    for variant in VARIANTS:
        runs = [result for job, result in results.items() if job.label == variant]
        if runs:
            rows.append([variant, str(len(runs)), *absolute_row(runs)])
    header = (
        "variant|seeds|pass@1|pass@2|before|vote alone|agent alone|its cells|its sizes|accuracy delta|± (paired)|"
        "mean reward|queries solved|by the vote|memory updates|skipped steps|loss finite|seconds"
    )
    return table(header.split("|"), rows)


def absolute_row(runs: Sequence[Result]) -> list[str]:
    pooled = [run.pooled for run in runs]
    return [
        *(percent([getattr(split, name) for split in pooled]) for name in RATES),
        spread([split.accuracy_delta for split in pooled], "{:+.4f}"),
        spread([split.accuracy_delta_error for split in pooled], "{:.4f}"),
        spread([run.reward for run in runs], "{:+.4f}"),
        percent([run.solved for run in runs]),
        percent([run.vote_solved for run in runs]),
        spread([run.memory_updates for run in runs], "{:.0f}"),
        spread([run.skipped_steps for run in runs], "{:.0f}"),
        "yes" if all(run.finite for run in runs) else "NO",
        spread([run.seconds for run in runs], "{:.0f}"),
    ]


def options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """The benchmark's own flags, and those for every run."""
    parser = arguments(__doc__ or "", work="runs/bench_fixes")
    parser.add_argument("--steps", type=int, default=150, help="batches of a run (150)")
    parser.add_argument("--epochs", type=int, default=3, help="in as many equal epochs (3)")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=None, help="these, besides full")
    args, extra = parse(parser, argv)
    if args.epochs < 1 or args.steps < args.epochs or args.steps % args.epochs:
        parser.error(f"--steps {args.steps} is not a multiple of --epochs {args.epochs}")
    return args, extra


def main(argv: Sequence[str] | None = None) -> int:
    args, extra = options(argv)
    command = " ".join(["python benchmarks/fixes.py", *(sys.argv[1:] if argv is None else argv)])
    return report(lambda results: make_text(results, args, command), make_jobs(args, extra), args)


if __name__ == "__main__":
    sys.exit(main())
