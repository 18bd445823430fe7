"""report.html: a run as one page, made from the files in its folder alone.

    python -m arc.report RUN        (re-)makes RUN/report.html

The page holds no script and its content security policy allows none, nor any request: whatever a task's name or a
flag's value contains, it stays text. Curves are drawn by charts.py, tasks by gallery.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc.report import charts
from arc.report.charts import Series, line_chart
from arc.report.gallery import CSS as GALLERY_CSS
from arc.report.gallery import (
    FILTERS,
    MAX_TASKS,
    Gallery,
    ShownTask,
    choose_tasks,
    make_gallery,
    read_gallery,
    task_html,
    write_gallery,
)
from arc.run.files import read_json, replace_file

if TYPE_CHECKING:
    from arc.predict import PairPrediction  # which imports torch

GALLERY_BYTES = 4_000_000  # of drawn tasks in a page, which stays below 5 MB with them
RED_FLAG = "RED FLAG: "
MAX_ROWS = 50  # of the table of validations

PAGE_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1d2127; --muted: #5b6470; --rule: #d9dde3;
  --s0: #1f6feb; --s1: #d1570c; --s2: #1a7f37; --s3: #a03bbd; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2127; --ink: #e8eaed; --muted: #a3adb9;
  --rule: #363d46; --s0: #6cb0ff; --s1: #ff9d5c; --s2: #5fce7a; --s3: #dc97f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .3rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 1.8rem 0 .6rem; }
p { margin: .4rem 0; } .muted { color: var(--muted); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.cards > *, .arc-task, .box { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.cards > *, .box { padding: .8rem; }
.alarm { border-left: 5px solid #d93025; } .alarm li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.scroll th, .scroll td { white-space: nowrap; }
td.value { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85rem; }
summary { cursor: pointer; font-weight: 600; }
.filter { position: absolute; opacity: 0; }
.filter + label { display: inline-block; border: 1px solid var(--rule); border-radius: 1em; padding: .15rem .8rem;
  margin: 0 .4rem .6rem 0; cursor: pointer; background: var(--card); }
.filter:checked + label { background: var(--s0); border-color: var(--s0); color: var(--page); }
.filter:focus-visible + label { outline: 2px solid var(--ink); outline-offset: 2px; }
.none { display: none; }
"""


# ----------------------------------------------------------------------------------------------------------------------
# What a validation leaves for the report


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


# ----------------------------------------------------------------------------------------------------------------------
# Reading a run


@dataclass
class Metrics:
    """metrics.jsonl, read once: the rows of batches as series by key, the other rows whole."""

    series: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    batches: int = 0
    unreadable: int = 0  # lines; a kill can tear the last one

    def of(self, key: str) -> list[tuple[float, float | None]]:
        return self.series.get(key, [])


BATCH_KEYS = ("loss", "reward", "d_acc", "d_size", "d_color", "d_rev", "qwen_grad", "mask_ratio")


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl line by line; a missing file is an empty one. Raises OSError."""
    found = Metrics()
    for line in _lines(path):
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            found.unreadable += 1
            continue
        if "loss" not in row:
            found.epochs.append(row)
            continue
        found.batches += 1
        for key in BATCH_KEYS:
            found.series.setdefault(key, []).append((step, _number(row.get(key))))
    return found


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file


def _number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def red_flags(log_file: Path) -> list[tuple[str, int]]:
    """The red flags in train.log in the order they first fired, each with how often (once a command at most)."""
    fired = (line.strip()[len(RED_FLAG) :] for line in _lines(log_file) if line.startswith(RED_FLAG))
    return list(Counter(fired).items())


def read_galleries(folder: Path) -> list[Gallery]:
    """The galleries of a run: first those of its --val_splits, then others by name. ValueError if one of the files is
    damaged."""
    config = folder / "config.json"
    flags = read_json(config) if config.is_file() else {}
    validated = flags.get("val_splits", []) if isinstance(flags, dict) else []
    galleries = [read_gallery(path) for path in sorted(folder.glob("gallery-*.json"))]
    order = [str(name) for name in validated] if isinstance(validated, list) else []
    return sorted(galleries, key=lambda g: order.index(g.split) if g.split in order else len(order))


# ----------------------------------------------------------------------------------------------------------------------
# The page


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, from what is there, and return its path.

    ValueError if `folder` is no run's folder or a file in it is damaged; OSError if the page cannot be written.
    """
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "train.log", "config.json")):
        raise ValueError(f"{folder}: no run in it (no metrics.jsonl, train.log or config.json)")
    path = folder / "report.html"
    replace_file(path, report_html(folder))
    return path


def report_html(folder: Path) -> str:
    """The whole page. ValueError if a file of the run is damaged."""
    metrics = read_metrics(folder / "metrics.jsonl")
    name = escape(folder.resolve().name)
    body = [
        f"<h1>{name}</h1>",
        _summary_html(metrics),
        _flags_html(red_flags(folder / "train.log")),
        "<h2>Validations</h2>",
        _validations_html(metrics.epochs),
        "<h2>Curves</h2>",
        _curves_html(metrics),
        "<h2>Tasks</h2>",
        _tasks_html(read_galleries(folder)),
        "<h2>Configuration</h2>",
        _config_html(folder / "config.json"),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'\">"
        f"<title>{name}</title><style>{PAGE_CSS}{charts.CSS}{GALLERY_CSS}{_FILTER_CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _summary_html(metrics: Metrics) -> str:
    losses = [value for _, value in metrics.of("loss")[-100:] if value is not None]
    parts = [f"{metrics.batches} batches"]
    if losses:
        parts.append(f"loss over the last {len(losses)}: {math.fsum(losses) / len(losses):.4f}")
    if metrics.unreadable:
        parts.append(f"{metrics.unreadable} unreadable lines of metrics.jsonl are left out")
    return f'<p class="muted">{" · ".join(parts)}</p>'


def _flags_html(flags: Sequence[tuple[str, int]]) -> str:
    if not flags:
        return '<p class="box">No red flag fired.</p>'
    items = "".join(f"<li>{escape(text)}{f' ({count} times)' if count > 1 else ''}</li>" for text, count in flags)
    return f'<div class="box alarm"><b>Red flags</b><ul>{items}</ul></div>'


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


def _splits(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Prefixes of the validated splits' keys in metrics.jsonl: "val" for the first split, "val.<name>" for others."""
    found = {key.removesuffix(".pass1") for row in rows for key in row if key.endswith(".pass1")}
    return sorted(prefix for prefix in found if prefix.split(".")[0] == "val")


def _split_name(prefix: str, row: dict[str, Any]) -> str:
    return prefix.partition(".")[2] or str(row.get("val.split", "first split"))


def _validations_html(rows: Sequence[dict[str, Any]]) -> str:
    """The latest validations as a table."""
    lines = []
    for row in rows[-MAX_ROWS:]:
        for prefix in _splits([row]):
            values = [_number(row.get(f"{prefix}.{key}")) for _, key, _ in COLUMNS]
            cells = [
                "–" if value is None else f"{value:{shape}}"
                for value, (_, _, shape) in zip(values, COLUMNS, strict=True)
            ]
            head = [str(row.get("epoch", "")), str(row["step"]), _split_name(prefix, row)]
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in (*head, *cells)) + "</tr>")
    if not lines:
        return '<p class="muted">There is no scored validation yet.</p>'
    heads = "".join(f"<th>{head}</th>" for head in ("epoch", "batch", "split", *(column[0] for column in COLUMNS)))
    return (
        f'<div class="box scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div><p class="muted">pass@1: first '
        "attempt exactly right; pass@2: one of two attempts; before: first attempt without refinement; vote alone: the "
        "evidence's answer without any training; agent alone: its views' answer without the evidence's.</p>"
    )


def _curves_html(metrics: Metrics) -> str:
    def of_epochs(key: str) -> list[tuple[float, float | None]]:
        return [(float(row["step"]), _number(row.get(key))) for row in metrics.epochs if key in row]

    deltas = ("d_acc", "d_size", "d_color", "d_rev")
    figures = [
        line_chart("Loss", [Series("loss", metrics.of("loss"))]),
        line_chart("Reward (after − before)", [Series("reward", metrics.of("reward"))]),
        line_chart("The reward's four deltas", [Series(key, metrics.of(key)) for key in deltas]),
        line_chart("Gradient norm of Qwen", [Series("qwen_grad", metrics.of("qwen_grad"))], log=True),
        line_chart("Mask ratio: share of wrong cells", [Series("mask_ratio", metrics.of("mask_ratio"))]),
        line_chart("Memory threshold", [Series("threshold", of_epochs("memory.threshold"))]),
        line_chart("Entries in the memory bank", [Series("entries", of_epochs("memory.size"))]),
    ]
    for prefix in _splits(metrics.epochs) or ["val"]:
        shown = [("after", "pass1"), ("after, two attempts", "pass2")]
        shown += [("before", "before_pass1"), ("vote alone", "vote_pass1")]
        named = [row for row in metrics.epochs if "val.split" in row]
        title = f"Accuracy per validation, {_split_name(prefix, named[-1] if named else {})}"
        figures.append(
            line_chart(title, [Series(label, of_epochs(f"{prefix}.{key}")) for label, key in shown], zero=False)
        )
    note = "Neighbouring batches are drawn as one: the line is their mean, the band reaches from least to greatest."
    many = metrics.batches > charts.MAX_POINTS
    return f'<div class="cards">{"".join(figures)}</div>' + (f'<p class="muted">{note}</p>' if many else "")


_FILTER_CSS = "".join(
    f"#show-{name}:checked ~ .arc-tasks .arc-task:not(.{name}) {{ display: none; }}\n"
    f"#show-{name}:checked ~ .none-{name} {{ display: block; }}\n"
    for name in FILTERS
)


def _tasks_of_page(gallery: Gallery, limit: int) -> list[ShownTask]:
    """Where several splits share a page, each shows fewer tasks than it keeps."""
    kept = {task.id: task for task in gallery.tasks}
    chosen = choose_tasks(kept, {task.id for task in gallery.tasks if task.changed}, limit)
    return [kept[task_id] for task_id in chosen]


def _tasks_html(galleries: Sequence[Gallery]) -> str:
    """The gallery with its filters, which are radio buttons and style: the page needs no script."""
    if not galleries:
        return '<p class="muted">No task was predicted yet.</p>'
    drawn, counts = [], Counter[str]()
    notes = []
    for gallery in galleries:
        pictures, full, room = [], "", GALLERY_BYTES // len(galleries)
        for task in _tasks_of_page(gallery, MAX_TASKS // len(galleries)):
            picture = task_html(task, gallery.split)
            if len(picture.encode()) > room:
                full = " (more would make the page too large)"
                break
            room -= len(picture.encode())
            pictures.append(picture)
            counts.update(name for name, (_, belongs) in FILTERS.items() if belongs(task))
        drawn += pictures
        notes.append(
            f"<p>{escape(gallery.split)} split after batch {gallery.step}: {len(pictures)} of {gallery.total} tasks "
            f"are drawn{full}. Refinement changed the views' answer for {gallery.changed_pairs} of all {gallery.pairs} "
            "test pairs.</p>"
        )
    chips = "".join(
        f'<input class="filter" type="radio" name="show" id="show-{name}"{" checked" if name == "all" else ""}>'
        f'<label for="show-{name}">{label} ({counts[name]})</label>'
        for name, (label, _) in FILTERS.items()
    )
    empty = "".join(f'<p class="none none-{name}">No drawn task is here.</p>' for name in FILTERS if not counts[name])
    return (
        f'{"".join(notes)}<p class="muted">The choice is fixed by a hash of the names (and is the same at every '
        "validation); about one in five may instead be a task that refinement changed. Solved: every test pair with "
        "two attempts.</p>"
        f'<div>{chips}{empty}<div class="arc-tasks">{"".join(drawn)}</div></div>'
    )


def _config_html(path: Path) -> str:
    if not path.is_file():
        return '<p class="muted">config.json is not there.</p>'
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not an object of flags")
    rows = "".join(
        f'<tr><td>--{escape(str(name))}</td><td class="value">{escape(json.dumps(value))}</td></tr>'
        for name, value in config.items()
    )
    return f'<details class="box"><summary>{len(config)} flags</summary><table>{rows}</table></details>'


# ----------------------------------------------------------------------------------------------------------------------
# For notebooks, and the command


def gallery_html(folder: Path, *, limit: int = 12, which: str = "all") -> str:
    """Up to `limit` tasks of a run's last validation as a self-contained HTML fragment, for `IPython.display.HTML`.

    `which`: "all", "solved", "unsolved" or "changed" (by refinement). ValueError for another `which`, a `limit` below
    1, or a folder without a gallery.
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
    kept = sum(len(gallery.tasks) for gallery in galleries)
    steps = ", ".join(f"{escape(gallery.split)} split after batch {gallery.step}" for gallery in galleries)
    pictures = "".join(task_html(task, gallery.split) for gallery, task in found[:limit])
    head = f"<p>{steps}. {label}: {min(limit, len(found))} of {len(found)} (of {kept} tasks kept for display)</p>"
    return f'<style>{GALLERY_CSS}</style><div>{head}<div class="arc-tasks">{pictures}</div></div>'


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m arc.report RUN`: exit code 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m arc.report", description="write report.html into a run's folder")
    parser.add_argument("run", type=Path, help="the run's folder")
    folder = parser.parse_args(argv).run
    try:
        print(write_report(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
