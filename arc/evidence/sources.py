"""Sources: for every output cell, a colour taken from somewhere definite (a mirror image, a ray, a panel, a constant).

A source is a whole candidate output. Tables of kind "source" find out in which circumstances which source reproduces
the demonstrations; a source has no colour (`UNAVAILABLE`) at a cell where what it points to does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from arc.evidence.canvas import OUTSIDE, UNAVAILABLE
from arc.evidence.cells import OutputCells
from arc.evidence.changes import SAME_SHAPE
from arc.evidence.cuts import CUTS
from arc.tasks import Grid


@dataclass(frozen=True)
class Source:
    """`function(output cells)` gives one colour, or UNAVAILABLE, for each output cell: (N,); None: UNAVAILABLE for
    all."""

    name: str
    function: Callable[[OutputCells], np.ndarray | None]
    meaning: str


def _through(plane: str, anchor: str = "same") -> Callable[[OutputCells], np.ndarray]:
    """A colour plane of the input read through an anchor."""

    def source(cells: OutputCells) -> np.ndarray:
        values = cells.read(plane, anchor)
        return np.where((values >= 0) & (values < OUTSIDE), values, UNAVAILABLE)

    return source


def _moved(dr: int, dc: int) -> Callable[[OutputCells], np.ndarray]:
    """The input cell `dr` rows down and `dc` columns right."""

    def source(cells: OutputCells) -> np.ndarray:
        rows, cols = cells.r + dr, cells.c + dc
        inside = (rows >= 0) & (rows < cells.H) & (cols >= 0) & (cols < cells.W)
        rows, cols = np.where(inside, rows, 0), np.where(inside, cols, 0)
        return np.where(inside, cells.canvas.colour[cells.grid, rows, cols], UNAVAILABLE)

    return source


def _constant(colour: int) -> Callable[[OutputCells], np.ndarray]:
    return lambda cells: np.full(len(cells), colour)


def _ranked(rank: int) -> Callable[[OutputCells], np.ndarray]:
    """The foreground colour of a given rank by number of cells in the grid (-1: the rarest)."""

    def source(cells: OutputCells) -> np.ndarray:
        ranked = cells.canvas.colours
        picks = [colours[rank] if -len(colours) <= rank < len(colours) else UNAVAILABLE for colours in ranked]
        return np.array(picks)[cells.grid]

    return source


def _spread(cut: str) -> Callable[[OutputCells], np.ndarray]:
    """The one cell that a cut of one cell leaves, everywhere."""

    def source(cells: OutputCells) -> np.ndarray:
        results = cells.programs.cut(cut)
        picks = np.array([UNAVAILABLE if result is None else result[0, 0] for result in results])
        return picks[cells.grid]

    return source


def _cut(name: str) -> Callable[[OutputCells], np.ndarray | None]:
    """The part of the input that a cut leaves, where it has the output's size."""

    def source(cells: OutputCells) -> np.ndarray | None:
        results = cells.programs.cut(name)
        parts = [
            (place, part)
            for (grid, height, width), place in zip(cells.items, cells.slices, strict=True)
            if (part := results[grid]) is not None and part.shape == (height, width)
        ]
        return _placed(cells, parts)

    return source


def _changed(change: str) -> Callable[[OutputCells], np.ndarray | None]:
    """The whole input after a change that keeps its shape, where that is the output's size."""

    def source(cells: OutputCells) -> np.ndarray | None:
        result = cells.programs.result
        return _placed(cells, [(place, result(grid, "all", change)) for grid, place in cells.of_input_size])

    return source


def _placed(cells: OutputCells, parts: Sequence[tuple[slice, Grid | None]]) -> np.ndarray | None:
    """Grids put in the place of the items whose size they have; None if there are none."""
    values: np.ndarray | None = None
    for place, part in parts:
        if part is not None:
            if values is None:
                values = np.full(len(cells), UNAVAILABLE, np.uint8)
            values[place] = part.reshape(-1)
    return values


_ANCHORS = (
    ("flip_cols", "mirrored left to right"),
    ("flip_rows", "mirrored top to bottom"),
    ("half_turn", "turned by 180 degrees"),
    ("transpose", "mirrored at the main diagonal"),
    ("anti_transpose", "mirrored at the other diagonal"),
    ("turn_left", "turned left"),
    ("turn_right", "turned right"),
    ("scale", "stretched or shrunk to the output's size"),
    ("tile", "repeated"),
    ("fold", "repeated with every other copy mirrored"),
    ("fold_far", "repeated with every other copy mirrored, starting with a mirrored one"),
    ("end", "aligned at the bottom right"),
    ("centre", "aligned at the centre"),
)
_PLANES = (
    ("north", "first foreground colour above"),
    ("south", "first foreground colour below"),
    ("west", "first foreground colour to the left"),
    ("east", "first foreground colour to the right"),
    ("north_west", "first foreground colour up the diagonal to the left"),
    ("north_east", "first foreground colour up the diagonal to the right"),
    ("south_west", "first foreground colour down the diagonal to the left"),
    ("south_east", "first foreground colour down the diagonal to the right"),
    ("between_rows", "the colour met both above and below"),
    ("between_cols", "the colour met both left and right"),
    ("row_flat", "the one colour of the whole row"),
    ("col_flat", "the one colour of the whole column"),
    ("cluster_top", "commonest colour of the cell's cluster"),
    ("cluster_low", "rarest colour of the cell's cluster"),
    ("cluster_other", "the cluster's commonest colour other than the cell's"),
    ("region_rim", "commonest colour around the cell's region"),
    ("row_top", "commonest foreground colour of the row"),
    ("col_top", "commonest foreground colour of the column"),
    ("row_first", "the first cell of the row"),
    ("row_last", "the last cell of the row"),
    ("col_first", "the first cell of the column"),
    ("col_last", "the last cell of the column"),
    ("nearest_colour", "colour of the nearest foreground cell in the four directions"),
)


def _declare() -> tuple[Source, ...]:
    sources = [Source("input", _through("colour"), "the input cell at the same place")]
    for anchor, meaning in _ANCHORS:
        sources.append(Source(f"input_{anchor}", _through("colour", anchor), f"the input {meaning}"))
    sources.append(Source("background", lambda cells: cells.canvas.background[cells.grid], "the background colour"))
    for plane, meaning in _PLANES:
        sources.append(Source(plane, _through(plane), meaning))
    for rank in (0, 1, 2, -1, -2):
        sources.append(Source(f"ranked_{rank}", _ranked(rank), f"the foreground colour of rank {rank} in the grid"))
    for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)):
        sources.append(Source(f"moved_{dr}_{dc}", _moved(dr, dc), f"the input cell {dr} down and {dc} to the right"))
    for colour in range(10):
        sources.append(Source(f"colour_{colour}", _constant(colour), f"colour {colour}"))
    for name in SAME_SHAPE:
        sources.append(Source(f"changed_{name}", _changed(name), f"the input changed by {name}"))
    for name in CUTS:
        if name.startswith("colour_of_"):
            sources.append(Source(name, _spread(name), f"the {name.replace('_', ' ')} object of the input"))
    for name in CUTS:
        if name != "all":
            sources.append(Source(f"cut_{name}", _cut(name), f"the part of the input cut out by {name}"))
    return tuple(sources)


SOURCES = _declare()
NUM_SOURCES = len(SOURCES)
SOURCE_NUMBER = {source.name: number for number, source in enumerate(SOURCES)}


def source_values(cells: OutputCells) -> np.ndarray:
    """Every source at every output cell: (S, N) uint8."""
    values = np.empty((NUM_SOURCES, len(cells)), np.uint8)
    for index, source in enumerate(SOURCES):
        found = source.function(cells)
        values[index] = UNAVAILABLE if found is None else found
    return values
