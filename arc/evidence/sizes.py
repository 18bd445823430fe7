"""Output-size rules: what each says for an input grid, and how far the demonstrations bear it out.

A rule maps an input grid (or the sizes of the other demonstrations) to an output size. Rules are declared in
`SIZE_RULES`; a rule that two of three demonstrations contradict still counts a little, one that none confirms is out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from arc.evidence.canvas import Canvas, Objects
from arc.evidence.scene import extent, lines, period, spans
from arc.tasks import MAX_SIDE

Size = tuple[int, int]


@dataclass(frozen=True)
class Demo:
    """The sizes of one demonstration pair: input `H`, `W` and output `h`, `w`; `index` is its number in the task."""

    H: int
    W: int
    h: int
    w: int
    index: int


@dataclass(frozen=True, eq=False)
class View:
    """One input grid of a canvas, as size rules see it."""

    grid: np.ndarray
    canvas: Canvas
    index: int
    programs: Programs | None = None

    def count(self, kind: str) -> int:
        """How many `shapes`, `clusters` or `regions` this grid has."""
        objects: Objects = getattr(self.canvas, kind)
        return objects.per_grid[self.index]

    @cached_property
    def lines(self) -> tuple[list[int], list[int], int | None]:
        return lines(self.grid)

    @cached_property
    def foreground_box(self) -> Size | None:
        return _box(self.grid != self.canvas.background[self.index])

    @cached_property
    def colour_boxes(self) -> list[Size | None]:
        """The box of each foreground colour, commonest first."""
        return [_box(self.grid == colour) for colour in self.canvas.colours[self.index]]


class Programs(Protocol):
    """What size rules use of `arc.evidence.programs.ProgramSearch`."""

    def size(self, index: int, usable: Sequence[int]) -> Size | None: ...


SizeFunction = Callable[[View, Sequence[Demo]], Size | None]


@dataclass(frozen=True)
class SizeRule:
    """`function(view of the input grid, the usable demonstrations' sizes)` gives (h, w), or None where it is silent."""

    name: str
    function: SizeFunction
    meaning: str
    needs_demos: bool = False
    prior: float = 0.0  # fitted by benchmarks/fit_evidence.py, from PRIORS_FILE


# ----------------------------------------------------------------------------------------------------------------
# Functions the rules are made of
# ----------------------------------------------------------------------------------------------------------------
def _scaled(up: Size, down: Size = (1, 1), add: Size = (0, 0)) -> SizeFunction:
    """(H, W) plus `add`, times `up`, divided by `down`; silent unless the division leaves no remainder."""

    def rule(view: View, _: Sequence[Demo]) -> Size | None:
        (height, width) = view.grid.shape
        h, w = (height + add[0]) * up[0], (width + add[1]) * up[1]
        return None if h % down[0] or w % down[1] else (h // down[0], w // down[1])

    return rule


def _by_grid(function: Callable[[np.ndarray], Size | None]) -> SizeFunction:
    return lambda view, _: function(view.grid)


def _box(mask: np.ndarray) -> Size | None:
    box = extent(mask)
    return None if box is None else (box[0].stop - box[0].start, box[1].stop - box[1].start)


def _foreground_box(margin: int = 0) -> SizeFunction:
    def rule(view: View, _: Sequence[Demo]) -> Size | None:
        box = view.foreground_box
        return None if box is None else (box[0] + margin, box[1] + margin)

    return rule


def _colour_box(rank: int, margin: int = 0) -> SizeFunction:
    def rule(view: View, _: Sequence[Demo]) -> Size | None:
        boxes = view.colour_boxes
        if not -len(boxes) <= rank < len(boxes):
            return None
        box = boxes[rank]
        return None if box is None else (box[0] + margin, box[1] + margin)

    return rule


def _object_box(kind: str, key: Callable[[Objects], np.ndarray], margin: int = 0) -> SizeFunction:
    """Bounding box of the object with the largest key; silent when two of different size share it."""

    def rule(view: View, _: Sequence[Demo]) -> Size | None:
        objects: Objects = getattr(view.canvas, kind)
        box = objects.best_boxes(key)[view.index]
        return None if box is None else (box[0] + margin, box[1] + margin)

    return rule


def _count(counter: Callable[[View], int], shape: Callable[[int], Size]) -> SizeFunction:
    return lambda view, _: shape(counter(view))


def _panel_size(view: View, _: Sequence[Demo]) -> Size | None:
    rows, cols, colour = view.lines
    if colour is None:
        return None
    heights = {b - a for a, b in spans(rows, view.grid.shape[0])}
    widths = {b - a for a, b in spans(cols, view.grid.shape[1])}
    return (heights.pop(), widths.pop()) if len(heights) == 1 and len(widths) == 1 else None


def _panel_count(view: View, _: Sequence[Demo]) -> Size | None:
    rows, cols, colour = view.lines
    if colour is None:
        return None
    return len(spans(rows, view.grid.shape[0])), len(spans(cols, view.grid.shape[1]))


def _changes(axis: int) -> Callable[[np.ndarray], int]:
    """How many runs of equal rows (axis 0) or columns (axis 1)."""

    def count(grid: np.ndarray) -> int:
        g = grid if axis == 0 else grid.T
        return 1 + int((g[1:] != g[:-1]).any(1).sum())

    return count


def _distinct(grid: np.ndarray) -> int:
    """How many different rows."""
    return len({row.tobytes() for row in grid})


def _common(_: View, demos: Sequence[Demo]) -> Size | None:
    """The commonest output size of the demonstrations (ties: the first)."""
    sizes = [(d.h, d.w) for d in demos]
    return max(sizes, key=lambda s: (sizes.count(s), -sizes.index(s))) if sizes else None


def _all_equal(values: Sequence[float]) -> float | None:
    return values[0] if values and all(v == values[0] for v in values) else None


def _offset(view: View, demos: Sequence[Demo]) -> Size | None:
    """The input's size plus what the demonstrations agree on adding."""
    dh, dw = _all_equal([d.h - d.H for d in demos]), _all_equal([d.w - d.W for d in demos])
    return None if dh is None or dw is None else (view.grid.shape[0] + int(dh), view.grid.shape[1] + int(dw))


def _ratio(view: View, demos: Sequence[Demo]) -> Size | None:
    """The input's size times the ratio the demonstrations agree on."""
    rh, rw = _all_equal([d.h / d.H for d in demos]), _all_equal([d.w / d.W for d in demos])
    if rh is None or rw is None:
        return None
    h, w = view.grid.shape[0] * rh, view.grid.shape[1] * rw
    return (round(h), round(w)) if abs(h - round(h)) + abs(w - round(w)) < 1e-9 else None


def _mixed(view: View, demos: Sequence[Demo]) -> Size | None:
    """Each side for itself: constant if the demonstrations agree on it, else offset, else ratio."""
    sides = []
    for side, pairs in zip(view.grid.shape, ([(d.H, d.h) for d in demos], [(d.W, d.w) for d in demos]), strict=True):
        constant, delta = _all_equal([b for _, b in pairs]), _all_equal([b - a for a, b in pairs])
        ratio = _all_equal([b / a for a, b in pairs])
        value = constant if constant is not None else side + delta if delta is not None else None
        value = side * ratio if value is None and ratio is not None else value
        if value is None or abs(value - round(value)) > 1e-9:  # 21 * (9 / 7) is not quite 27
            return None
        sides.append(round(value))
    return sides[0], sides[1]


def _linear(view: View, demos: Sequence[Demo]) -> Size | None:
    """Each side a straight line through the demonstrations' sides, when one passes through all of them."""
    sides = []
    for side, pairs in zip(view.grid.shape, ([(d.H, d.h) for d in demos], [(d.W, d.w) for d in demos]), strict=True):
        (a0, b0), others = pairs[0] if pairs else (0, 0), [p for p in pairs[1:] if p[0] != pairs[0][0]]
        if not others:
            return None
        slope = (others[0][1] - b0) / (others[0][0] - a0)
        if any(abs(b0 + slope * (a - a0) - b) > 1e-6 for a, b in pairs):
            return None
        sides.append(round(b0 + slope * (side - a0)))
    return sides[0], sides[1]


def _program(view: View, demos: Sequence[Demo]) -> Size | None:
    """Size of what the first program that fits all demonstrations makes of the input."""
    return None if view.programs is None else view.programs.size(view.index, [d.index for d in demos])


def _colours(view: View) -> int:
    return len(view.canvas.colours[view.index])


def _foreground_cells(view: View) -> int:
    return int((view.grid != view.canvas.background[view.index]).sum())


def _times(counter: Callable[[View], int]) -> SizeFunction:
    def rule(view: View, _: Sequence[Demo]) -> Size | None:
        n = counter(view)
        return view.grid.shape[0] * n, view.grid.shape[1] * n

    return rule


# ----------------------------------------------------------------------------------------------------------------
# The declared rules
# ----------------------------------------------------------------------------------------------------------------
_WAYS: dict[str, Callable[[int], Size]] = {
    "across": lambda n: (1, n),
    "down": lambda n: (n, 1),
    "square": lambda n: (n, n),
}


def _from_the_demonstrations() -> list[SizeRule]:
    return [
        SizeRule("input", _scaled((1, 1)), "the input's size"),
        SizeRule("transposed", _by_grid(lambda g: (g.shape[1], g.shape[0])), "the input's size, sides swapped"),
        SizeRule("common", _common, "the demonstrations' commonest output size", needs_demos=True),
        SizeRule("offset", _offset, "the input's size plus what the demonstrations add", needs_demos=True),
        SizeRule("ratio", _ratio, "the input's size times the demonstrations' ratio", needs_demos=True),
        SizeRule("mixed", _mixed, "each side constant, offset or ratio", needs_demos=True),
        SizeRule("program", _program, "the result of a program that fits the demonstrations", needs_demos=True),
        SizeRule("linear", _linear, "each side on a line through the demonstrations", needs_demos=True),
    ]


def _ratios() -> list[SizeRule]:
    rules = []
    for up in ((2, 2), (3, 3), (1, 2), (2, 1), (1, 3), (3, 1), (4, 4), (5, 5), (6, 6), (1, 4), (4, 1)):
        rules.append(SizeRule(f"times_{up[0]}_{up[1]}", _scaled(up), f"the input's sides times {up}"))
    for down in ((2, 2), (3, 3), (1, 2), (2, 1), (1, 3), (3, 1), (4, 4), (1, 4), (4, 1), (5, 5)):
        name = f"{down[0]}_{down[1]}"
        rules.append(SizeRule(f"over_{name}", _scaled((1, 1), down), f"the input's sides divided by {down}"))
        add = (1 if down[0] > 1 else 0, 1 if down[1] > 1 else 0)
        less = (down[0] - 1, down[1] - 1)
        rules.append(
            SizeRule(
                f"split_{name}",
                _scaled((1, 1), down, (-less[0] * add[0], -less[1] * add[1])),
                f"one of {down} panels with separators of width 1 between them",
            )
        )
    for delta in ((1, 1), (2, 2), (-1, -1), (-2, -2), (-4, -4), (1, 0), (0, 1)):
        rules.append(
            SizeRule(f"plus_{delta[0]}_{delta[1]}", _scaled((1, 1), add=delta), f"the input's sides plus {delta}")
        )
    return rules


def _from_the_grid() -> list[SizeRule]:
    return [
        SizeRule("squared", _by_grid(lambda g: (g.shape[0] ** 2, g.shape[1] ** 2)), "the input's sides squared"),
        SizeRule("longer_side", _by_grid(lambda g: (max(g.shape), max(g.shape))), "a square of the longer side"),
        SizeRule("shorter_side", _by_grid(lambda g: (min(g.shape), min(g.shape))), "a square of the shorter side"),
        SizeRule("times_colours", _times(_colours), "the input's sides times the number of foreground colours"),
        SizeRule("times_cells", _times(_foreground_cells), "the input's sides times the number of foreground cells"),
        SizeRule("times_objects", _times(lambda v: v.count("shapes")), "the input's sides times the objects"),
        SizeRule("doubled_less_1", _by_grid(lambda g: (2 * g.shape[0] - 1, 2 * g.shape[1] - 1)), "2 H - 1, 2 W - 1"),
        SizeRule("period", _by_grid(period), "the smallest tile that the input repeats"),
        SizeRule(
            "distinct_runs",
            _by_grid(lambda g: (_changes(0)(g), _changes(1)(g))),
            "runs of equal rows, runs of equal columns",
        ),
        SizeRule(
            "distinct_lines",
            _by_grid(lambda g: (_distinct(g), _distinct(g.T))),
            "different rows, different columns",
        ),
        SizeRule("panel", _panel_size, "one panel of a grid cut by full lines"),
        SizeRule("panel_count", _panel_count, "the number of panels down and across"),
    ]


def _boxes() -> list[SizeRule]:
    rules = []
    for margin in (0, -2, 2, -4):
        meaning = f"box of the foreground, {margin:+d}"
        rules.append(SizeRule(f"foreground_box_{margin}", _foreground_box(margin), meaning))
    for rank in (0, 1, 2, 3, -1, -2):
        for margin in (0, -2):
            name = f"colour_box_{rank}_{margin}"
            rules.append(SizeRule(name, _colour_box(rank, margin), f"box of the colour of rank {rank}, {margin:+d}"))
    return rules


_OBJECT_KEYS: dict[str, Callable[[Objects], np.ndarray]] = {
    "largest": lambda o: o.size,
    "smallest": lambda o: -o.size,
    "tallest": lambda o: o.height,
    "widest": lambda o: o.width,
    "biggest_box": lambda o: o.height * o.width,
    "most_colours": lambda o: o.colours,
    "rarest": lambda o: -o.twin_count,
    "commonest": lambda o: o.twin_count,
    "inner": lambda o: ~o.touches * o.size,
    "solid": lambda o: (o.size == o.height * o.width) * o.size,
    "emptiest": lambda o: o.height * o.width - o.size,
}


def _objects() -> list[SizeRule]:
    rules = []
    for kind in ("shapes", "clusters", "regions"):
        for name, key in _OBJECT_KEYS.items():
            rules.append(SizeRule(f"{kind}_{name}", _object_box(kind, key), f"box of the {name} of the {kind}"))
    for kind, name in (("shapes", "largest"), ("clusters", "largest"), ("shapes", "emptiest"), ("regions", "largest")):
        rules.append(
            SizeRule(
                f"{kind}_{name}_inside",
                _object_box(kind, _OBJECT_KEYS[name], -2),
                f"inside of the {name} of the {kind}",
            )
        )
    return rules


def _counts() -> list[SizeRule]:
    rules = []
    counters: dict[str, Callable[[View], int]] = {
        "shapes": lambda v: v.count("shapes"),
        "clusters": lambda v: v.count("clusters"),
        "colours": _colours,
        "cells": _foreground_cells,
    }
    for name, counter in counters.items():
        for way, shape in _WAYS.items():
            rules.append(SizeRule(f"{name}_{way}", _count(counter, shape), f"the number of {name}, {way}"))
    return rules


def _declare() -> tuple[SizeRule, ...]:
    return (*_from_the_demonstrations(), *_ratios(), *_from_the_grid(), *_boxes(), *_objects(), *_counts())


PRIORS_FILE = Path(__file__).with_name("size_priors.json")
_FITTED = json.loads(PRIORS_FILE.read_text(encoding="utf-8"))

SIZE_RULES = tuple(replace(rule, prior=_FITTED["rules"].get(rule.name, 0.0)) for rule in _declare())
NUM_RULES = len(SIZE_RULES)

# Weights of the training-free choice: logit = prior + FRACTION_WEIGHT * fraction + ALL_WEIGHT * all consistent.
FRACTION_WEIGHT, ALL_WEIGHT = float(_FITTED["fraction"]), float(_FITTED["all"])


def legal(size: Size | None) -> Size:
    """The size itself where it is one a grid can have, else (0, 0)."""
    if size is None or not (1 <= size[0] <= MAX_SIDE and 1 <= size[1] <= MAX_SIDE):
        return (0, 0)
    return int(size[0]), int(size[1])


class SizeEvidence:
    """All rules on all grids of a task; `choose` answers for one query and one set of usable demonstrations."""

    def __init__(self, canvas: Canvas, demos: Sequence[Demo], programs: Programs | None = None):
        self.views = [View(grid, canvas, index, programs) for index, grid in enumerate(canvas.grids)]
        self.demos = list(demos)
        self._said: dict[tuple[int, ...], np.ndarray] = {}
        self.truth = np.array([(d.h, d.w) for d in demos], np.int64).reshape(-1, 2)  # (n, 2)
        self.fixed = np.zeros((NUM_RULES, len(self.views), 2), np.int64)
        for r, rule in enumerate(SIZE_RULES):
            if not rule.needs_demos:
                self.fixed[r] = [legal(rule.function(view, ())) for view in self.views]
        self.adaptive = [r for r, rule in enumerate(SIZE_RULES) if rule.needs_demos]
        self.prior = np.array([rule.prior for rule in SIZE_RULES])

    def says(self, grid: int, usable: Sequence[int]) -> np.ndarray:
        """Every rule's size for a grid, given the usable demonstrations: (R, 2), 0 where silent."""
        asked = grid, *usable
        if asked not in self._said:
            sizes = self._said[asked] = self.fixed[:, grid].copy()
            for r in self.adaptive:
                sizes[r] = legal(SIZE_RULES[r].function(self.views[grid], [self.demos[j] for j in usable]))
        return self._said[asked]

    def choose(self, grid: int, usable: Sequence[int]) -> tuple[Size, np.ndarray, np.ndarray, np.ndarray]:
        """Size for the query `grid` from the demonstrations `usable` (each judged from the remaining ones).

        Returns (size, rule_sizes (R, 2) uint8, rule_features (R, 2) float32, rule_logits (R,) float32).
        """
        sizes = self.says(grid, usable)
        if not usable:
            features, logits = np.zeros((NUM_RULES, 2)), np.full(NUM_RULES, -np.inf)
            logits[0] = 0.0
            height, width = self.views[grid].grid.shape
            return (height, width), sizes.astype(np.uint8), features.astype(np.float32), logits.astype(np.float32)
        said = np.stack([self.says(j, [k for k in usable if k != j]) for j in usable], 1)  # (R, m, 2)
        right = (said == self.truth[list(usable)]).all(2)  # (R, m)
        if len(usable) == 1:  # nothing is left to judge the adaptive rules by: they get the benefit of the doubt
            right[self.adaptive] = True
        features = np.stack([right.mean(1), right.all(1)], 1)
        logits = self.prior + features @ np.array([FRACTION_WEIGHT, ALL_WEIGHT])
        logits[(sizes[:, 0] == 0) | (features[:, 0] == 0)] = -np.inf
        size = self._vote(sizes, logits, grid)
        return size, sizes.astype(np.uint8), features.astype(np.float32), logits.astype(np.float32)

    def _vote(self, sizes: np.ndarray, logits: np.ndarray, grid: int) -> Size:
        """The size with the largest sum of exp(logit) over the rules that name it; the input's size if none does."""
        live = np.flatnonzero(np.isfinite(logits))
        if not len(live):
            height, width = self.views[grid].grid.shape
            return height, width
        weight = np.exp(logits[live] - logits[live].max())
        named, which = np.unique(sizes[live, 0] * 32 + sizes[live, 1], return_inverse=True)
        best = int(named[np.bincount(which, weight).argmax()])
        return best // 32, best % 32
