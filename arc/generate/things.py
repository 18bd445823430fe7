"""Families about objects and what they have: size, number, place; and about two panels beside one another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from arc.generate.drawing import Cell, between, blank, blobs, dots, mosaic, objects, paint, shape
from arc.generate.family import AXES, Family, Fixed
from arc.tasks import Grid

Rng = np.random.Generator


# ----------------------------------------------------------------------------------------------------------------------
# Objects: connected cells of one colour


def _objects_of_sizes(rng: Rng, size: tuple[int, int], sizes: list[int], colour: int) -> Grid | None:
    grid = blank(size)
    found = blobs(rng, size, rng.permutation(sizes).tolist())
    for cells in found or ():
        paint(grid, cells, colour)
    return None if found is None else grid


def _different_sizes(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Two to six objects of one colour, one larger and one smaller than every other."""
    size = shape(rng, side, 4)
    count = between(rng, 2, max(2, min(6, size[0] * size[1] // 12)))
    middle = [between(rng, 2, 4) for _ in range(count - 2)]
    largest = between(rng, max(middle, default=2) + 1, 4 + max(2, side // 3))
    return _objects_of_sizes(rng, size, [1, *middle, largest], fixed.colours[0])


def _extreme_size(grid: Grid, fixed: Fixed) -> Grid:
    output = grid.copy()
    choose = max if fixed.variant == "largest" else min
    chosen = choose(objects(grid), key=len)
    paint(output, chosen, fixed.colours[1])
    return output


def _things_and_specks(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Objects of at least three cells and specks of one, each thing in either colour of the palette."""
    size = shape(rng, side, 4)
    room = max(1, min(4, size[0] * size[1] // 20))
    sizes = [between(rng, 3, 8) for _ in range(between(rng, 1, room))] + [1] * between(rng, 1, room + 1)
    found = blobs(rng, size, sizes)
    if found is None:
        return None
    grid = blank(size)
    for cells in found:
        paint(grid, cells, fixed.palette[rng.integers(len(fixed.palette))])
    return grid


def _without_specks(grid: Grid, fixed: Fixed) -> Grid:
    output = grid.copy()
    for cells in objects(grid):
        if len(cells) == 1:
            paint(output, cells, 0)
    return output


def _sizes_one_to_three(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    size = shape(rng, side, 5)
    more = between(rng, 0, min(5, size[0] * size[1] // 30))
    return _objects_of_sizes(rng, size, [1, 2, 3, *rng.integers(1, 4, size=more).tolist()], fixed.colours[0])


def _by_size(grid: Grid, fixed: Fixed) -> Grid:
    output = grid.copy()
    for cells in objects(grid):
        paint(output, cells, fixed.colours[len(cells)])
    return output


def _some_at_the_border(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Objects of one colour; at least one touches the border of the grid, at least one does not."""
    size = shape(rng, side, 4)
    sizes = [between(rng, 1, 5) for _ in range(between(rng, 2, max(2, min(6, size[0] * size[1] // 16))))]
    grid = _objects_of_sizes(rng, size, sizes, fixed.colours[0])
    if grid is None:
        return None
    touching = [_touches_border(cells, size) for cells in objects(grid)]
    return grid if any(touching) and not all(touching) else None


def _touches_border(cells: list[Cell], size: tuple[int, int]) -> bool:
    return any(row in (0, size[0] - 1) or column in (0, size[1] - 1) for row, column in cells)


def _touching(grid: Grid, fixed: Fixed) -> Grid:
    output = grid.copy()
    for cells in objects(grid):
        if _touches_border(cells, (grid.shape[0], grid.shape[1])) == (fixed.variant == "touching"):
            paint(output, cells, fixed.colours[1])
    return output


# ----------------------------------------------------------------------------------------------------------------------
# Counting and measuring


def _dots_to_count(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Two to `side` dots of the first colour, fewer than seven, and at least one of the second; no two touch."""
    size = shape(rng, side, 4)
    counted, other = between(rng, 2, min(side, 6)), between(rng, 1, 3)
    cells = dots(rng, size, counted + other, gap=1)
    if len(cells) < counted + other:
        return None
    grid = blank(size)
    paint(grid, cells[:counted], fixed.colours[0])
    paint(grid, cells[counted:], fixed.colours[1])
    return grid


def _count(grid: Grid, fixed: Fixed) -> Grid:
    count = int((grid == fixed.colours[0]).sum())
    return np.full((1, count) if fixed.variant == "row" else (count, 1), fixed.colours[0], dtype=np.uint8)


def _bars(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """A bar of the first colour stands in every column."""
    height, width = shape(rng, side)
    heights = rng.integers(1, height + 1, size=width)
    return np.where(np.arange(height)[:, None] >= height - heights, np.uint8(fixed.colours[0]), np.uint8(0))


def _bars_with_extremes(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """As `_bars`; one is taller and one shorter than every other."""
    grid = _bars(rng, fixed, side)
    heights = np.sort((grid > 0).sum(0))
    return grid if heights[0] < heights[1] and heights[-2] < heights[-1] else None


def _sort_bars(grid: Grid, fixed: Fixed) -> Grid:
    order = np.argsort((grid > 0).sum(0), kind="stable")
    return grid[:, order if fixed.variant == "rising" else order[::-1]]


def _extreme_bar(grid: Grid, fixed: Fixed) -> Grid:
    heights = (grid > 0).sum(0)
    column = heights.argmax() if fixed.variant == "tallest" else heights.argmin()
    output = grid.copy()
    output[grid[:, column] > 0, column] = fixed.colours[1]
    return output


_KEYS = {"top left": (0, 0), "top right": (0, -1), "bottom left": (-1, 0), "bottom right": (-1, -1)}


def _figure_and_key(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """A figure, and apart from it a cell of any other colour in the task's corner."""
    size = shape(rng, side, 4)
    grid = mosaic(rng, size, fixed.colours, 0.5)
    row, column = _KEYS[fixed.variant]
    grid[row, :] = 0
    grid[:, column] = 0
    grid[row, column] = rng.choice([colour for colour in range(1, 10) if colour != fixed.colours[0]])
    return grid


def _key(grid: Grid, fixed: Fixed) -> Grid:
    return np.where(grid == fixed.colours[0], grid[_KEYS[fixed.variant]], grid)


# ----------------------------------------------------------------------------------------------------------------------
# Two panels with a line between them


def _panels(first: Grid, second: Grid, line: int) -> Grid:
    return np.hstack([first, np.full((len(first), 1), line, dtype=np.uint8), second])


def _two_panels(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Each panel in its colour. All four cases are there: a cell drawn in both panels, in one, in the other, in none;
    so any logic of two panels is told by one pair."""
    height, width = between(rng, 2, side), between(rng, 2, (side - 1) // 2)
    first, second = (rng.random((height, width)) < 0.5 for _ in range(2))
    if len(np.unique(first + 2 * second)) < 4:
        return None
    grid = _panels(first * np.uint8(fixed.colours[0]), second * np.uint8(fixed.colours[1]), fixed.colours[2])
    return grid.T if fixed.variant[1] == "down" else grid


def _split(grid: Grid) -> tuple[Grid, Grid]:
    width = (grid.shape[1] - 1) // 2
    return grid[:, :width], grid[:, grid.shape[1] - width :]


_LOGIC: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "neither": lambda first, second: ~(first | second),
    "only the first": lambda first, second: first & ~second,
}


def _logic(grid: Grid, fixed: Fixed) -> Grid:
    operation, axis = fixed.variant
    first, second = _split(grid.T if axis == "down" else grid)
    output = _LOGIC[operation](first > 0, second > 0) * np.uint8(fixed.colours[3])
    return output.T if axis == "down" else output


def _two_pictures(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """As `_two_panels`, side by side."""
    height, width = between(rng, 2, side), between(rng, 2, (side - 1) // 2)
    first, second = (mosaic(rng, (height, width), (colour,), 0.5) for colour in fixed.colours[:2])
    return _panels(first, second, fixed.colours[2])


def _overlay(grid: Grid, fixed: Fixed) -> Grid:
    first, second = _split(grid)
    above, below = (first, second) if fixed.variant == "first above" else (second, first)
    return np.where(above > 0, above, below)


# ----------------------------------------------------------------------------------------------------------------------

FAMILIES = (
    Family(
        "extreme_size",
        "The largest (or the smallest) object changes colour.",
        _different_sizes,
        _extreme_size,
        colours=2,
        variants=("largest", "smallest"),
    ),
    Family("denoise", "Single cells vanish, larger objects stay.", _things_and_specks, _without_specks, palette=2),
    Family(
        "by_size",
        "Objects of one, two and three cells get a colour each.",
        _sizes_one_to_three,
        _by_size,
        colours=4,
    ),
    Family(
        "touching",
        "The objects that touch the border (or those that do not) change colour.",
        _some_at_the_border,
        _touching,
        colours=2,
        variants=("touching", "free"),
    ),
    Family(
        "count",
        "The output is a row (or column) with as many cells as one colour has dots.",
        _dots_to_count,
        _count,
        colours=2,
        variants=("row", "column"),
    ),
    Family(
        "sort_bars",
        "The bars are sorted by height.",
        _bars,
        _sort_bars,
        colours=1,
        variants=("rising", "falling"),
    ),
    Family(
        "extreme_bar",
        "The tallest (or the shortest) bar changes colour.",
        _bars_with_extremes,
        _extreme_bar,
        colours=2,
        variants=("tallest", "shortest"),
    ),
    Family(
        "key",
        "The figure gets the colour of the cell in one corner.",
        _figure_and_key,
        _key,
        colours=1,
        variants=tuple(_KEYS),
    ),
    Family(
        "logic",
        "Two panels are combined cell by cell: and, or, xor, neither, only the first.",
        _two_panels,
        _logic,
        colours=4,
        variants=tuple((operation, axis) for operation in _LOGIC for axis in AXES),
    ),
    Family(
        "overlay",
        "One panel is laid over the other.",
        _two_pictures,
        _overlay,
        colours=3,
        variants=("first above", "second above"),
    ),
)
