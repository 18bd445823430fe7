"""Scenes: a grid with the facts that whole-grid transforms ask for, and the small cuts that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from arc.evidence.canvas import DOWN, OUTSIDE, RIGHT, STAR, Canvas, Step, background, look, ranked_colours

Grid = np.ndarray
Shape = tuple[int, int]
Box = tuple[slice, slice]  # rows and columns
T = TypeVar("T")
Transform = Callable[["Scene"], "Grid | None"]  # None: does not apply
Cells = Callable[["Scene"], np.ndarray]  # a mask over the grid


class Scene:
    """A grid with the facts transforms ask for, each computed when first needed."""

    def __init__(self, grid: Grid, whole: Canvas | None = None, index: int = 0):
        """whole: a canvas that has the grid, as number `index`, beside others of the task: what they are made of is
        found in all of them at once."""
        self.grid, self._whole, self._index = grid, whole, index
        self._facts: dict[Hashable, Any] = {}

    def remember(self, name: Hashable, find: Callable[[], T]) -> T:
        """A fact about the grid by name, found when first asked for."""
        if name not in self._facts:
            self._facts[name] = find()
        return self._facts[name]

    @cached_property
    def counts(self) -> np.ndarray:
        """Cells of each colour: (10,)."""
        return np.bincount(self.grid.reshape(-1), minlength=10)

    @cached_property
    def variety(self) -> int:
        """How many different colours."""
        return int(np.count_nonzero(self.counts))

    @cached_property
    def background(self) -> int:
        return background(self.counts)

    @cached_property
    def foreground(self) -> np.ndarray:
        return self.grid != self.background

    @cached_property
    def foreground_box(self) -> Grid | None:
        return crop(self.grid, self.foreground)

    @cached_property
    def canvas(self) -> Canvas:
        return Canvas([self.grid]) if self._whole is None else self._whole.alone(self._index)

    @cached_property
    def _met(self) -> np.ndarray:
        """Flat index of the first foreground cell in each direction of STAR, one too large where there is none."""
        size = self.grid.size
        cells = np.where(self.foreground, np.arange(size, dtype=np.int16).reshape(self.grid.shape), np.int16(size))
        return look(cells, size, STAR)[0]

    def met(self, values: np.ndarray, nothing: int) -> dict[Step, np.ndarray]:
        """From each cell, of the first foreground cell in each direction of STAR, its value (of a plane (H, W));
        `nothing` where there is none."""
        found = np.append(values.reshape(-1), values.dtype.type(nothing)).take(self._met)
        return dict(zip(STAR, found, strict=True))

    @cached_property
    def rays(self) -> dict[Step, np.ndarray]:
        """Colour of the first foreground cell in each direction of STAR, OUTSIDE where there is none: uint8."""
        return self.met(self.grid, OUTSIDE)

    @cached_property
    def between(self) -> dict[Step, np.ndarray]:
        """The colour met both along a step and against it, OUTSIDE where there is no such: uint8."""
        return {
            (dr, dc): np.where(self.rays[dr, dc] == self.rays[-dr, -dc], self.rays[dr, dc], np.uint8(OUTSIDE))
            for dr, dc in (RIGHT, DOWN, (1, 1), (1, -1))
        }

    @cached_property
    def colours(self) -> list[int]:
        """Foreground colours, commonest first (ties: the smaller)."""
        return ranked_colours(self.counts, self.background)

    @cached_property
    def colour_boxes(self) -> list[Box]:
        """The bounding box of each foreground colour, commonest first."""
        return [box for colour in self.colours if (box := extent(self.grid == colour))]

    @cached_property
    def lines(self) -> tuple[list[int], list[int], int | None]:
        return lines(self.grid)

    @cached_property
    def panels(self) -> list[Grid]:
        """Equal panels between full lines of one colour, in reading order; none where there are no such lines."""
        rows, cols, colour = self.lines
        if colour is None:
            return []
        height, width = self.grid.shape
        cut = [self.grid[a:b, c:d] for a, b in spans(rows, height) for c, d in spans(cols, width)]
        return cut if len(cut) > 1 and len({p.shape for p in cut}) == 1 else []

    @cached_property
    def parts(self) -> list[Grid]:
        """The panels, or, without separators, equal square-ish parts along the longer side, or two halves."""
        if self.panels:
            return self.panels
        height, width = self.grid.shape
        if width > height and width % height == 0:
            return np.split(self.grid, width // height, axis=1)
        if height > width and height % width == 0:
            return np.split(self.grid, height // width, axis=0)
        if width >= height and width % 2 == 0:
            return np.split(self.grid, 2, axis=1)
        return np.split(self.grid, 2, axis=0) if height % 2 == 0 else []


@dataclass(frozen=True)
class Keeping:
    """A transform that keeps the grid's shape, and in some cells turns each colour into one colour (mostly itself)."""

    change: Transform
    cells: Cells

    def __call__(self, scene: Scene) -> Grid | None:
        return self.change(scene)


def _foreground(scene: Scene) -> np.ndarray:
    return scene.foreground


def _background(scene: Scene) -> np.ndarray:
    return ~scene.foreground


def over_background(change: Transform) -> Keeping:
    """A transform that leaves the foreground as it is."""
    return Keeping(change, _foreground)


def over_foreground(change: Transform) -> Keeping:
    """A transform that draws nothing on the background."""
    return Keeping(change, _background)


def once(fact: Callable[[Scene], T]) -> Callable[[Scene], T]:
    """A function of a scene that several transforms ask for, computed once a scene."""

    def recall(scene: Scene) -> T:
        return scene.remember(fact, lambda: fact(scene))

    return recall


def extent(mask: np.ndarray) -> Box | None:
    """Rows and columns of the bounding box of a mask; None for an empty mask."""
    rows = np.flatnonzero(mask.any(1)).tolist()
    if not rows:
        return None
    cols = np.flatnonzero(mask.any(0)).tolist()
    return slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)


def crop(grid: Grid, mask: np.ndarray) -> Grid | None:
    """The part of a grid inside the bounding box of a mask; None for an empty mask."""
    box = extent(mask)
    return None if box is None else grid[box]


def inside(grid: Grid) -> Grid | None:
    """The grid without its outermost ring."""
    return grid[1:-1, 1:-1] if min(grid.shape) > 2 else None


def merge_runs(grid: Grid) -> Grid:
    """Equal neighbouring rows and columns merged into one."""
    rows = np.concatenate([[True], (grid[1:] != grid[:-1]).any(1)])
    cols = np.concatenate([[True], (grid[:, 1:] != grid[:, :-1]).any(0)])
    return grid[rows][:, cols]


def lines(grid: np.ndarray) -> tuple[list[int], list[int], int | None]:
    """Rows and columns that are of one single colour from side to side, and that colour.

    The colour is the one with the most such lines (ties: the smaller); the grid's commonest colour does not count.
    """
    row_colour, row_flat = grid[:, 0], (grid == grid[:, :1]).all(1)
    col_colour, col_flat = grid[0], (grid == grid[:1]).all(0)
    tally = np.bincount(np.concatenate([row_colour[row_flat], col_colour[col_flat]]), minlength=10)
    tally[np.bincount(grid.reshape(-1), minlength=10).argmax()] = 0
    if not tally.any():
        return [], [], None
    colour = int(tally.argmax())
    rows = np.flatnonzero(row_flat & (row_colour == colour)).tolist()
    return rows, np.flatnonzero(col_flat & (col_colour == colour)).tolist(), colour


def period(grid: Grid) -> Shape:
    """Rows and columns of the smallest tile that the grid repeats in both directions."""

    def smallest(rows: Grid) -> int:
        cells, width = rows.tobytes(), rows.shape[1] * rows.itemsize
        return next(p for p in range(1, len(rows) + 1) if cells[p * width :] == cells[: len(cells) - p * width])

    return smallest(grid), smallest(grid.T)


def spans(separators: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Half-open intervals between separator positions, empty ones left out."""
    edges = [-1, *separators, length]
    return [(a + 1, b) for a, b in zip(edges, edges[1:], strict=False) if b > a + 1]


def flip_cols(grid: Grid) -> Grid:
    """Mirrored left to right."""
    return grid[:, ::-1]


def flip_rows(grid: Grid) -> Grid:
    """Mirrored top to bottom."""
    return grid[::-1]


def half_turn(grid: Grid) -> Grid:
    return grid[::-1, ::-1]
