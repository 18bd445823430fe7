"""Families whose rule draws from cells: outlines, rays, lines, fillings."""

from __future__ import annotations

import numpy as np

from arc.generate.drawing import (
    CORNERS,
    SIDES,
    between,
    blank,
    dots,
    mosaic,
    outside,
    paint,
    rectangles,
    rooks,
    shape,
    shifted,
)
from arc.generate.family import DIRECTIONS, Draw, Family, Fixed, directed, directed_draw
from arc.tasks import Grid

Rng = np.random.Generator

_NEIGHBOURS = {"around": SIDES + CORNERS, "beside": SIDES, "diagonally": CORNERS}


def _how_many(rng: Rng, size: tuple[int, int], cells: int, most: int) -> int:
    """A random number of things, at most one for so many cells of the grid and at most `most`, at least 1."""
    return between(rng, 1, max(1, min(most, size[0] * size[1] // cells)))


def _dots(cells: int, most: int, gap: int) -> Draw:
    """Dots at least `gap` cells apart, about one for so many cells of the grid and at most `most`."""

    def draw(rng: Rng, fixed: Fixed, side: int) -> Grid:
        size = shape(rng, side)
        grid = blank(size)
        paint(grid, dots(rng, size, _how_many(rng, size, cells, most), gap=gap), fixed.colours[0])
        return grid

    return draw


_lone_dots = _dots(cells=12, most=8, gap=3)  # so far apart that their outlines do not meet
_few_dots = _dots(cells=16, most=3, gap=1)  # no neighbours


def _outline(grid: Grid, fixed: Fixed) -> Grid:
    dot, colour = fixed.colours
    near = np.logical_or.reduce([shifted(grid == dot, *step) for step in _NEIGHBOURS[fixed.variant]])
    return np.where(near & (grid == 0), np.uint8(colour), grid)


def _walls(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Boxes drawn with walls, and pieces of wall elsewhere. No region is closed only for one who cannot pass
    diagonally."""
    size = shape(rng, side, 4)
    grid = mosaic(rng, size, fixed.colours[:1], 0.9)
    for _ in range(_how_many(rng, size, 30, 5)):
        height, width = (between(rng, 3, min(length, 9)) for length in size)
        top, left = between(rng, 0, size[0] - height), between(rng, 0, size[1] - width)
        grid[top : top + height, left : left + width] = fixed.colours[0]
        grid[top + 1 : top + height - 1, left + 1 : left + width - 1] = 0
    both_ways = (outside(grid, SIDES), outside(grid, SIDES + CORNERS))
    return grid if (both_ways[0] == both_ways[1]).all() else None


def _fill(grid: Grid, fixed: Fixed) -> Grid:
    return np.where((grid == 0) & ~outside(grid, SIDES), np.uint8(fixed.colours[1]), grid)


def _dots_of_two_colours(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """Dots of the palette, no two in one row or column."""
    size = shape(rng, side)
    grid = blank(size)
    for cell in rooks(rng, size, between(rng, 1, min(*size, 5) - 1)):
        grid[cell] = fixed.palette[rng.integers(len(fixed.palette))]
    return grid


def _line(grid: Grid, fixed: Fixed) -> Grid:
    output = grid.copy()
    for column in range(1, grid.shape[1]):
        output[:, column] = np.where(grid[:, column] == 0, output[:, column - 1], grid[:, column])
    return output


def _dots_before_obstacles(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Dots, no two in one row or column, with an obstacle to the right of at least the first; others lie about."""
    size = shape(rng, side, 4)
    dot, obstacle = fixed.colours
    grid = blank(size)
    cells = rooks(rng, size, between(rng, 1, min(*size, 5) - 1))
    row, column = cells[0]
    if column + 2 >= size[1]:
        return None
    grid[row, between(rng, column + 2, size[1] - 1)] = obstacle
    paint(grid, rooks(rng, size, _how_many(rng, size, 10, 8)), obstacle)
    paint(grid, cells, dot)
    return grid


def _ray(grid: Grid, fixed: Fixed) -> Grid:
    dot, obstacle = fixed.colours
    output = grid.copy()
    for column in range(1, grid.shape[1]):
        output[(output[:, column - 1] == dot) & (grid[:, column] != obstacle), column] = dot
    return output


def _facing_dots(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """Pairs of dots in one row or column, at least one cell between them; other rows and columns have one at most."""
    size = shape(rng, side, 4)
    free = [rng.permutation(length).tolist() for length in size]
    grid = blank(size)
    for _ in range(_how_many(rng, size, 15, 6)):
        axis = int(rng.integers(2))  # the line lies in one line of this axis and ends in two of the other
        if not free[axis] or len(free[1 - axis]) < 2:
            continue
        line, ends = free[axis].pop(), (free[1 - axis].pop(), free[1 - axis].pop())
        if abs(ends[0] - ends[1]) > 1:
            (grid if axis == 0 else grid.T)[line, ends] = fixed.colours[0]
    return grid


def _connect(grid: Grid, fixed: Fixed) -> Grid:
    output = grid.copy()
    for before, after in ((grid, output), (grid.T, output.T)):
        for row in range(before.shape[0]):
            columns = np.flatnonzero(before[row])
            if len(columns) == 2:
                after[row, columns[0] + 1 : columns[1]] = fixed.colours[1]
    return output


def _cross(grid: Grid, fixed: Fixed) -> Grid:
    dot, colour = fixed.colours
    rows, columns = ((grid == dot).any(axis, keepdims=True) for axis in (1, 0))
    marked = {"row": rows, "column": columns, "both": rows | columns}[fixed.variant]
    return np.where(marked & (grid == 0), np.uint8(colour), grid)


def _diagonal(grid: Grid, fixed: Fixed) -> Grid:
    dot, colour = fixed.colours
    height, width = grid.shape
    rows, columns = np.arange(height)[:, None], np.arange(width)
    numbers = (rows - columns, rows + columns)  # all cells of one diagonal have one number
    falling, rising = (np.isin(number, number[grid == dot]) for number in numbers)
    marked = {"falling": falling, "rising": rising, "both": falling | rising}[fixed.variant]
    return np.where(marked & (grid == 0), np.uint8(colour), grid)


def _solid_boxes(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Solid rectangles of the first colour, sides of at least 3, that do not touch."""
    size = shape(rng, side, 4)
    grid = blank(size)
    for box in rectangles(rng, size, _how_many(rng, size, 24, 6), 3, 8):
        grid[box] = fixed.colours[0]
    return grid


def _corners(grid: Grid, fixed: Fixed) -> Grid:
    box, colour = fixed.colours
    solid = grid == box
    down, across = (~(shifted(solid, *step) & shifted(solid, -step[0], -step[1])) for step in ((1, 0), (0, 1)))
    return np.where(solid & down & across, np.uint8(colour), grid)


def _hollow(grid: Grid, fixed: Fixed) -> Grid:
    box, colour = fixed.colours
    inner = np.logical_and.reduce([shifted(grid == box, *step) for step in SIDES + CORNERS])
    return np.where(inner & (grid == box), np.uint8(colour), grid)


def _marked_margins(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """Marks in the top row and in the left column, none in their common corner."""
    size = shape(rng, side)
    grid = blank(size)
    for line, colour in ((grid[0], fixed.colours[0]), (grid[:, 0], fixed.colours[1])):
        count = between(rng, 1, min(len(line) - 1, 4))
        line[1 + rng.permutation(len(line) - 1)[:count]] = colour
    return grid


def _crossing(grid: Grid, fixed: Fixed) -> Grid:
    top, left, colour = fixed.colours
    output = grid.copy()
    output[np.outer(grid[:, 0] == left, grid[0] == top)] = colour
    return output


# ----------------------------------------------------------------------------------------------------------------------

FAMILIES = (
    Family("fill", "Background that walls enclose gets a colour.", _walls, _fill, colours=2),
    Family(
        "outline",
        "Each dot gets neighbours of another colour: all eight, the four beside it, or the four diagonal ones.",
        _lone_dots,
        _outline,
        colours=2,
        variants=tuple(_NEIGHBOURS),
    ),
    Family(
        "line",
        "From each dot a line of its colour runs to the border in one direction.",
        _dots_of_two_colours,
        directed(_line),
        palette=2,
        variants=DIRECTIONS,
    ),
    Family(
        "ray",
        "From each dot a line runs in one direction up to the next obstacle or the border.",
        directed_draw(_dots_before_obstacles),
        directed(_ray),
        colours=2,
        variants=DIRECTIONS,
    ),
    Family("connect", "Two dots in one row or column are joined by a line.", _facing_dots, _connect, colours=2),
    Family(
        "cross",
        "The row, the column or both of each dot are drawn.",
        _few_dots,
        _cross,
        colours=2,
        variants=("row", "column", "both"),
    ),
    Family(
        "diagonal",
        "The falling diagonal, the rising one or both of each dot are drawn.",
        _few_dots,
        _diagonal,
        colours=2,
        variants=("falling", "rising", "both"),
    ),
    Family("hollow", "The inside of each solid rectangle changes colour.", _solid_boxes, _hollow, colours=2),
    Family("corners", "The corners of each solid rectangle change colour.", _solid_boxes, _corners, colours=2),
    Family(
        "crossing",
        "Where a marked row and a marked column meet, a colour appears.",
        _marked_margins,
        _crossing,
        colours=3,
    ),
)
