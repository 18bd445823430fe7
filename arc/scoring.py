"""What predictions are worth: scores, the lines and rows that tell them, and the submission file.

`score_predictions` is the only place of the program that reads a test output.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arc.evaluate import (
    PairResult,
    SplitScore,
    cell_accuracy,
    exact,
    paired_delta,
    score_split,
    two_attempts,
    write_submission,
)
from arc.generate import origin
from arc.predict import PairPrediction, all_attempts
from arc.run.runlog import RunLog
from arc.splits import Split
from arc.tasks import Task


@dataclass
class SplitReport:
    """A split's scores: the answer, the same before refinement, the evidence alone, the agent's views alone; and what
    refinement did to cell accuracy (mean over pairs, paired standard error; NaN where there is no pair with a solution,
    or just one). families: of generated tasks, the share of pairs that the first attempt solves, by family.
    """

    score: SplitScore
    before: SplitScore
    training_free: SplitScore
    agent: SplitScore
    delta: float
    delta_error: float
    families: Mapping[str, float]


def score_predictions(name: str, pairs: Sequence[PairPrediction]) -> SplitReport:
    """Scoring: the only place where test outputs are read. Pairs without a given solution are left out."""
    answers: list[PairResult] = []
    befores: list[PairResult] = []
    votes: list[PairResult] = []
    agents: list[PairResult] = []
    cells: dict[str, list[float]] = {"before": [], "after": []}
    for pair in pairs:
        target = pair.task.test[pair.test_index].output
        if target is None:
            continue
        for results, attempts in (
            (answers, pair.attempts()),
            (befores, pair.attempts(refined=False)),
            (votes, pair.training_free_attempts()),
            (agents, two_attempts(pair.answers(), [])),
        ):
            results.append(PairResult(pair.task.id, pair.test_index, target, attempts))
        for when, grids in (("before", pair.before), ("after", pair.after)):
            cells[when] += [float(np.mean([cell_accuracy(grid, target) for grid in grids]))] if grids else []
    delta, error = paired_delta(cells["before"], cells["after"]) if cells["after"] else (math.nan, math.nan)
    return SplitReport(
        score=score_split(name, answers),
        before=score_split(name, befores),
        training_free=score_split(name, votes),
        agent=score_split(name, agents),
        delta=delta,
        delta_error=error,
        families=by_family(answers),
    )


def by_family(results: Sequence[PairResult]) -> dict[str, float]:
    """Share of pairs that the first attempt solves, for each family of generated tasks; empty for other tasks."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for result in results:
        if (known := origin(result.task_id)) is not None:
            found[known[0]].append(exact(result.attempts[0], result.target))
    return {family: sum(right) / len(right) for family, right in sorted(found.items())}


def score_splits(
    predicted: Mapping[str, Sequence[PairPrediction]], labels: Mapping[str, str], log: Callable[[str], None]
) -> dict[str, SplitReport]:
    """Score the splits that have solutions; say so where none are given."""
    reports = {}
    for name, pairs in predicted.items():
        report = score_predictions(name, pairs)
        if report.score.pairs:
            reports[name] = report
        else:
            log(f"{labels[name]}: no solutions are given; the attempts are in predictions-{name}.json")
    return reports


def keep_attempts(folder: Path, split: Split, pairs: Sequence[PairPrediction], log: Callable[[str], None]) -> None:
    """Write a split's attempts into the run's folder; say so and go on where that is not possible."""
    try:
        write_submission(folder / f"predictions-{split.name}.json", all_attempts(pairs), split.tasks)
    except (ValueError, OSError) as problem:
        log(f"Predictions of the {split.name} split are not written: {problem}")


def submit(path: str, predicted: Mapping[str, Sequence[PairPrediction]], tasks: Sequence[Task], log: RunLog) -> int:
    """--submission: write the file, read back and checked, and log what is in it (not where the log is mute: another
    process does). Returns the exit code."""
    if log.mute:
        return 0
    pairs = [pair for part in predicted.values() for pair in part]
    try:
        write_submission(path, all_attempts(pairs), tasks)
    except ValueError as problem:  # a full disk, a folder that is gone: it was writable when the command started
        log(f"error: --submission: {problem}", error=True)
        return 1
    score = score_predictions("submission", pairs).score
    scored = f"{score.pass2_pairs} of {score.pairs} with a given solution right, {score.whole_tasks} tasks whole"
    log(
        f"Submission: {path}, {len(tasks)} tasks, {len(pairs)} test inputs, two "
        f"attempts each; {scored if score.pairs else 'no solutions are given, so nothing is scored'}"
    )
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Lines and rows


def validation_lines(epoch: int, label: str, report: SplitReport) -> list[str]:
    """One split's figures, for people."""
    free, answer, n = report.training_free, report.score, max(1, report.score.pairs)
    families = ", ".join(f"{name} {share:.2f}" for name, share in report.families.items())
    return [
        f"[Epoch {epoch}] {label}: pass@1 {answer.pass1_pairs / n:.4f} pass@2 {answer.pass2_pairs / n:.4f} "
        f"({answer.pass2_pairs}/{answer.pairs}), official pass@2 {answer.pass2:.4f}, "
        f"sizes right {answer.size_acc:.4f}, cells right {answer.cell_acc:.4f}",
        f"[Epoch {epoch}]   training-free vote {free.pass1_pairs / n:.4f} + learned "
        f"{(answer.pass1_pairs - free.pass1_pairs) / n:+.4f} = {answer.pass1_pairs / n:.4f}, with two attempts "
        f"{free.pass2_pairs / n:.4f} + {(answer.pass2_pairs - free.pass2_pairs) / n:+.4f} (the agent's views "
        f"alone: {report.agent.pass1_pairs / n:.4f})",
        f"[Epoch {epoch}]   before refinement {report.before.pass1_pairs / n:.4f}, cell accuracy delta "
        f"{delta_text(report.delta, report.delta_error)}",
        *([f"[Epoch {epoch}]   by family: {families}"] if families else []),
    ]


def delta_text(delta: float, error: float | None = None) -> str:
    """A difference, with its standard error if that is to be told; one pair has none, and there is no difference where
    no view was reached."""
    if math.isnan(delta):
        return "not measured"
    spread = "" if error is None else " (one pair)" if math.isnan(error) else f" +- {error:.4f}"
    return f"{delta:+.4f}{spread}"


def validation_row(prefix: str, report: SplitReport) -> dict[str, Any]:
    """One split's figures for metrics.jsonl; prefix: "val" or "val.<split>"."""
    answer, n = report.score, max(1, report.score.pairs)
    figures = {
        "pass1": answer.pass1_pairs / n,
        "pass2": answer.pass2_pairs / n,
        "before_pass1": report.before.pass1_pairs / n,
        "vote_pass1": report.training_free.pass1_pairs / n,
        "vote_pass2": report.training_free.pass2_pairs / n,
        "agent_pass1": report.agent.pass1_pairs / n,
        "agent_cells": report.agent.cell_acc,
        "agent_sizes": report.agent.size_acc,
        "cell_acc": answer.cell_acc,
        "size_acc": answer.size_acc,
        "pairs": answer.pairs,
        "accuracy_delta": report.delta,
        "accuracy_delta_error": report.delta_error,
    }
    figures |= {f"family.{name}": share for name, share in report.families.items()}
    return {f"{prefix}.{name}": value for name, value in figures.items()}


def log_validation(
    log: RunLog,
    epoch: int,
    step: int,
    reports: Mapping[str, SplitReport],
    labels: Mapping[str, str],
    asked: Sequence[str],
    memory: Mapping[str, Any],
) -> None:
    """The seed's two lines for the first split, then the detail of each; one row. asked: --val_splits, whose figures
    stand under "val"; others are a data set's that was given to --eval_only."""
    if not reports:
        log.metrics({"step": step, "epoch": epoch, **memory})
        return
    headline = next(iter(reports.values()))
    score = headline.score
    log(f"[Epoch {epoch}] Val Accuracy: {score.pair_accuracy:.4f} ({score.pass1_pairs}/{score.pairs})")
    log(f"[Epoch {epoch}] Accuracy Delta: {delta_text(headline.delta)}")
    row: dict[str, Any] = {"step": step, "epoch": epoch}
    if score.name in asked:
        row["val.split"] = score.name
    for name, report in reports.items():
        for line in validation_lines(epoch, labels[name], report):
            log(line)
        row |= validation_row("val" if report is headline and name in asked else f"val.{name}", report)
    log.metrics({**row, "accuracy_delta": headline.delta, **memory})


def headline(reports: Mapping[str, SplitReport]) -> tuple[float, float] | None:
    """Validation accuracy and accuracy delta of the first split, which decide the best checkpoints; None where nothing
    was scored."""
    return next(((report.score.pair_accuracy, report.delta) for report in reports.values()), None)
