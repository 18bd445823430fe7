"""Random parts of input grids, and what several rules ask about a grid.

Shapes are (height, width); `rng` is the pair's generator; a cell is (row, column).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from arc.augment import apply_dihedral
from arc.tasks import Grid

Shape = tuple[int, int]
Cell = tuple[int, int]
Box = tuple[slice, slice]

SIDES = ((0, 1), (1, 0), (0, -1), (-1, 0))
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def shape(rng: np.random.Generator, side: int, low: int = 3) -> Shape:
    height, width = rng.integers(low, side + 1, size=2)
    return int(height), int(width)


def between(rng: np.random.Generator, low: int, high: int) -> int:
    """A random integer from low to high, both included."""
    return int(rng.integers(low, high + 1))


def blank(size: Shape) -> Grid:
    return np.zeros(size, dtype=np.uint8)


def mosaic(rng: np.random.Generator, size: Shape, colours: Sequence[int], empty: float) -> Grid:
    """Cells of random colours, a share `empty` of them background; every colour is there at least once."""
    grid = np.array(colours, dtype=np.uint8)[rng.integers(len(colours), size=size)]
    grid[rng.random(size) < empty] = 0
    grid.flat[rng.permutation(grid.size)[: len(colours)]] = colours
    return grid


def lopsided(grid: Grid) -> bool:
    """Whether none of the square's symmetries maps the grid to itself."""
    images = (apply_dihedral(grid, d) for d in range(8))
    return len({(image.shape, image.tobytes()) for image in images}) == 8


def dots(rng: np.random.Generator, size: Shape, count: int, gap: int) -> list[Cell]:
    """At most `count` random cells, between any two of them at least `gap` cells in rows or in columns."""
    chosen: list[Cell] = []
    for position in rng.permutation(size[0] * size[1]).tolist():
        row, column = divmod(position, size[1])
        if all(max(abs(row - r), abs(column - c)) > gap for r, c in chosen):
            chosen.append((row, column))
            if len(chosen) == count:
                break
    return chosen


def rooks(rng: np.random.Generator, size: Shape, count: int) -> list[Cell]:
    """At most `count` random cells, no two in one row or column."""
    rows, columns = (rng.permutation(length)[:count].tolist() for length in size)
    return list(zip(rows, columns, strict=False))


def rectangles(rng: np.random.Generator, size: Shape, count: int, low: int, high: int) -> list[Box]:
    """At most `count` boxes with sides from low to high that do not touch one another."""
    taken = np.zeros(size, dtype=bool)
    boxes: list[Box] = []
    for _ in range(4 * count):
        height, width = (between(rng, low, max(low, min(high, length))) for length in size)
        if len(boxes) == count or height > size[0] or width > size[1]:
            continue
        top, left = between(rng, 0, size[0] - height), between(rng, 0, size[1] - width)
        around = np.s_[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1]
        if not taken[around].any():
            box = np.s_[top : top + height, left : left + width]
            taken[box] = True
            boxes.append(box)
    return boxes


def blobs(rng: np.random.Generator, size: Shape, cells: Iterable[int]) -> list[list[Cell]] | None:
    """Connected shapes with these numbers of cells that do not touch one another, or None if there was no room."""
    free = np.ones(size, dtype=bool)
    found = []
    for count in cells:
        blob = _grow(rng, free, count)
        if blob is None:
            return None
        found.append(blob)
        for row, column in blob:
            free[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = False
    return found


def _grow(rng: np.random.Generator, free: np.ndarray, count: int) -> list[Cell] | None:
    starts = np.argwhere(free)
    if not len(starts):
        return None
    row, column = starts[rng.integers(len(starts))].tolist()
    blob, edge = [(row, column)], neighbours((row, column), free)
    while len(blob) < count:
        if not edge:
            return None
        blob.append(edge.pop(int(rng.integers(len(edge)))))
        edge += [cell for cell in neighbours(blob[-1], free) if cell not in blob and cell not in edge]
    return blob


def neighbours(cell: Cell, allowed: np.ndarray) -> list[Cell]:
    """The cells beside a cell that are `allowed` (a boolean grid)."""
    height, width = allowed.shape
    near = [(cell[0] + r, cell[1] + c) for r, c in SIDES]
    return [(r, c) for r, c in near if 0 <= r < height and 0 <= c < width and allowed[r, c]]


def objects(grid: Grid) -> list[list[Cell]]:
    """The connected sets of cells of one colour, background left out, by their first cells in reading order."""
    left = grid > 0
    found = []
    for row, column in np.argwhere(left).tolist():
        if not left[row, column]:
            continue
        alike = left & (grid == grid[row, column])
        cells = [(row, column)]
        alike[row, column] = False
        for cell in cells:  # grows while it is read
            for other in neighbours(cell, alike):
                alike[other] = False
                cells.append(other)
        for cell in cells:
            left[cell] = False
        found.append(cells)
    return found


def paint(grid: Grid, cells: Iterable[Cell], colour: int) -> None:
    for cell in cells:
        grid[cell] = colour


def shifted(mask: np.ndarray, row: int, column: int) -> np.ndarray:
    """A grid moved by so many rows and columns; what leaves is lost, what comes in is zero."""
    height, width = mask.shape
    moved = np.zeros_like(mask)
    to = np.s_[max(row, 0) : height + min(row, 0), max(column, 0) : width + min(column, 0)]
    moved[to] = mask[max(-row, 0) : height - max(row, 0), max(-column, 0) : width - max(column, 0)]
    return moved


def box_of(mask: np.ndarray) -> Box:
    """The smallest box around the true cells; the whole grid where there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.s_[:, :]
    return np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def outside(grid: Grid, steps: Sequence[Cell]) -> np.ndarray:
    """The background that is reached from the border over background in these steps: a boolean grid."""
    ground = grid == 0
    reached = ground.copy()
    reached[1:-1, 1:-1] = False
    count = -1
    while count != (count := int(reached.sum())):
        for row, column in steps:
            reached |= shifted(reached, row, column) & ground
    return reached
