"""Output cells: which input cell each looks at, and the features that tables make contexts of.

An *anchor* maps a cell of an output grid to the input cell it looks at (the same position, a mirror image, the cell
it would come from if the input were scaled or tiled, ...). A *feature* of an output cell is a plane read through an
anchor (`"n8@scale"`), or something about its position alone (`".row"`).

Everything here is a function of input grids and output *sizes*. No output grid is ever seen by this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from arc.evidence.canvas import MISSING, Canvas
from arc.evidence.planes import Planes
from arc.evidence.programs import ProgramSearch

Item = tuple[int, int, int]  # index of the input grid, output height, output width


class OutputCells:
    """All cells of several output grids, each given as (index of its input grid, height, width), in one flat list."""

    def __init__(
        self,
        canvas: Canvas,
        planes: Planes,
        items: Sequence[Item],
        programs: ProgramSearch,
    ):
        """programs: what whole-grid transforms make of the grids. `slices` are the items' cells in the list, and
        `of_input_size` the input grids and cells of those items that have the size of their input."""
        self.canvas, self.planes, self.items, self.programs = canvas, planes, list(items), programs
        areas = np.array([h * w for _, h, w in items])
        ends = np.cumsum(areas)
        self.slices = [slice(end - area, end) for end, area in zip(ends.tolist(), areas.tolist(), strict=True)]
        local = np.arange(ends[-1]) - np.repeat(ends - areas, areas)
        self.grid, self.h, self.w = (np.repeat([item[k] for item in items], areas) for k in range(3))
        self.r, self.c = local // self.w, local % self.w
        self.H, self.W = canvas.heights[self.grid], canvas.widths[self.grid]
        self.of_input_size = [
            (grid, cells)
            for (grid, height, width), cells in zip(self.items, self.slices, strict=True)
            if canvas.grids[grid].shape == (height, width)
        ]
        self._anchors: dict[str, np.ndarray] = {}
        self._outside: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.grid)

    def anchor(self, name: str) -> np.ndarray:
        """Flat index into a plane for each output cell, one too large for "outside": (N,)."""
        if name not in self._anchors:
            rows, cols = ANCHORS[name](self)
            valid = (rows >= 0) & (rows < self.H) & (cols >= 0) & (cols < self.W)
            _, height, width = self.canvas.shape
            flat = (self.grid * height + rows) * width + cols
            self._anchors[name] = np.where(valid, flat, self.canvas.colour.size)
            self._outside[name] = np.flatnonzero(~valid)
        return self._anchors[name]

    def read(self, plane: str, anchor: str = "same") -> np.ndarray:
        """The plane's value at each output cell's anchor, MISSING where that lies outside: (N,)."""
        values = self.planes[plane].take(self.anchor(anchor), mode="clip")
        values[self._outside[anchor]] = MISSING
        return values

    def feature(self, name: str) -> np.ndarray:
        """A feature by name: `plane`, `plane@anchor` or `.position`: (N,) int64."""
        if name.startswith("."):
            return POSITIONS[name](self)
        plane, _, anchor = name.partition("@")
        return self.read(plane, anchor or "same")


def _fold(position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Mirror-tile: 0 1 2 2 1 0 0 1 2 ..."""
    phase = position % (2 * length)
    return np.minimum(phase, 2 * length - 1 - phase)


Anchor = Callable[[OutputCells], tuple[np.ndarray, np.ndarray]]
ANCHORS: dict[str, Anchor] = {
    "same": lambda o: (o.r, o.c),
    "flip_cols": lambda o: (o.r, o.W - 1 - o.c),
    "flip_rows": lambda o: (o.H - 1 - o.r, o.c),
    "half_turn": lambda o: (o.H - 1 - o.r, o.W - 1 - o.c),
    "transpose": lambda o: (o.c, o.r),
    "anti_transpose": lambda o: (o.H - 1 - o.c, o.W - 1 - o.r),
    "turn_left": lambda o: (o.c, o.W - 1 - o.r),
    "turn_right": lambda o: (o.H - 1 - o.c, o.r),
    "scale": lambda o: (o.r * o.H // o.h, o.c * o.W // o.w),
    "tile": lambda o: (o.r % o.H, o.c % o.W),
    "fold": lambda o: (_fold(o.r, o.H), _fold(o.c, o.W)),
    "fold_far": lambda o: (_fold(o.r + o.H, o.H), _fold(o.c + o.W, o.W)),
    "end": lambda o: (o.r + o.H - o.h, o.c + o.W - o.w),
    "centre": lambda o: (o.r + (o.H - o.h) // 2, o.c + (o.W - o.w) // 2),
}

POSITIONS: dict[str, Callable[[OutputCells], np.ndarray]] = {
    ".one": lambda o: np.zeros(len(o), np.int64),
    ".row": lambda o: o.r,
    ".col": lambda o: o.c,
    ".up": lambda o: o.h - 1 - o.r,
    ".left": lambda o: o.w - 1 - o.c,
    ".parity": lambda o: o.r % 2 * 2 + o.c % 2,
    ".mod3": lambda o: o.r % 3 * 3 + o.c % 3,
    ".border": lambda o: np.minimum(np.minimum(o.r, o.h - 1 - o.r), np.minimum(o.c, o.w - 1 - o.c)),
    ".diagonal": lambda o: o.r - o.c,
    ".within": lambda o: o.r * o.H % o.h // o.H * 32 + o.c * o.W % o.w // o.W,
    ".tile": lambda o: o.r // o.H * 32 + o.c // o.W,
}
