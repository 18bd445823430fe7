"""The input grids of a task on one padded canvas, the objects in them, and what is met along a line of cells.

Everything here is a function of input grids. No output grid is ever seen by this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np

Step = tuple[int, int]  # rows down, columns right
DOWN, UP, RIGHT, LEFT = (1, 0), (-1, 0), (0, 1), (0, -1)
CROSS: tuple[Step, ...] = (DOWN, UP, RIGHT, LEFT)
DIAGONALS: tuple[Step, ...] = ((1, 1), (1, -1), (-1, 1), (-1, -1))
STAR = (*CROSS, *DIAGONALS)

OUTSIDE = 10  # "colour" of positions outside a grid
MISSING = -1  # value of every plane where there is nothing to tell
UNAVAILABLE = 255  # value of a source where it has no colour to offer


# ----------------------------------------------------------------------------------------------------------------
# Hashing: fixed 64-bit mixing, so that results never depend on the process, the platform or PYTHONHASHSEED
# ----------------------------------------------------------------------------------------------------------------
def mix64(values: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014) on integers of any shape; returns int64."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).view(np.int64)


KEYS = mix64(np.arange(4096)) | 1  # odd: multiplication by a key loses nothing
OFFSET_KEYS = KEYS[:900].reshape(30, 30)  # one per (row, column) offset inside an object


def combine(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Hash several integer arrays of one shape into one int64 array: sum of part * key, modulo 2**64."""
    total = parts[0] * KEYS[1000]
    for index, part in enumerate(parts[1:], start=1001):
        total = total + part * KEYS[index]
    return total


# ----------------------------------------------------------------------------------------------------------------
# Connected components
# ----------------------------------------------------------------------------------------------------------------
def components(key: np.ndarray, connectivity: int) -> np.ndarray:
    """Label connected cells of equal `key` (G, H, W); cells with a negative key belong to nothing.

    Returns int64 labels of the same shape: -1 for nothing, else 0..n-1 in order of each component's first cell.
    Minimum-label hooking over runs of cells along rows with pointer jumping, so the number of rounds is logarithmic.
    """
    grids, height, width = key.shape
    stride = width + 1
    flat = np.full((grids, height + 1, stride), -1, key.dtype)  # a cell of nothing behind every row and grid
    flat[:, :height, :width] = key
    flat = flat.reshape(-1)
    index = np.arange(flat.size)
    root = np.maximum.accumulate(np.where(flat[1:] == flat[:-1], 0, index[1:]), out=index[1:].copy())
    root = np.concatenate([index[:1], root])  # first cell of each run along a row
    heads = [
        np.flatnonzero((flat[step:] == flat[:-step]) & (flat[step:] >= 0)) for step in _steps(connectivity, stride)
    ]
    a = root[np.concatenate(heads)]
    b = root[np.concatenate([head + step for head, step in zip(heads, _steps(connectivity, stride), strict=True)])]
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not ((jumped := root[root]) == root).all():
            root = jumped
        a, b = root[a], root[b]
        a, b = a[a != b], b[a != b]
    first = (root == index) & (flat >= 0)
    labels = np.where(flat >= 0, (np.cumsum(first) - 1)[root], -1)
    return labels.reshape(grids, height + 1, stride)[:, :height, :width]


def _steps(connectivity: int, stride: int) -> tuple[int, ...]:
    """Steps from a cell to its neighbours in the next row, in cells."""
    return (stride,) if connectivity == 4 else (stride - 1, stride, stride + 1)


class Objects:
    """Facts about labelled components of the canvas: one array entry a component.

    `grid`, `size`, `top`, `bottom`, `left`, `right` (inclusive), `colour` (of the first cell), `colours` (how many
    different), `height`, `width`, `touches` (the border of its grid), `shape` (hash of the cells' positions inside
    the bounding box), `shape_any` (the same for all eight orientations).
    """

    def __init__(self, labels: np.ndarray, canvas: np.ndarray, heights: np.ndarray, widths: np.ndarray):
        self.labels, self.canvas = labels, canvas
        flat = labels.reshape(-1)
        cells = np.flatnonzero(flat >= 0)
        self.cells, self.of = cells, flat[cells]
        self.count = count = int(self.of.max()) + 1 if len(cells) else 0
        plane, width = canvas.shape[1] * canvas.shape[2], canvas.shape[2]
        self.row, self.col = cells % plane // width, cells % width
        self.size = np.bincount(self.of, minlength=count)
        self.first, last = np.empty(count, np.int64), np.empty(count, np.int64)
        self.first[self.of[::-1]] = cells[::-1]
        last[self.of] = cells
        self.grid, self.colour = self.first // plane, canvas.reshape(-1)[self.first]
        self.top, self.bottom = self.first % plane // width, last % plane // width  # cells are in reading order
        self.left, self.right = np.full(count, width), np.full(count, -1)
        np.minimum.at(self.left, self.of, self.col)
        np.maximum.at(self.right, self.of, self.col)
        self.height, self.width = self.bottom - self.top + 1, self.right - self.left + 1
        self._last_row, self._last_col = heights - 1, widths - 1
        self._best_boxes: dict[Callable[[Objects], np.ndarray], list[tuple[int, int] | None]] = {}

    @cached_property
    def colours(self) -> np.ndarray:
        cell_colour = self.canvas.reshape(-1)[self.cells]
        return (np.bincount(self.of * 11 + cell_colour, minlength=self.count * 11).reshape(-1, 11) > 0).sum(1)

    @cached_property
    def touches(self) -> np.ndarray:
        bottom, right = self._last_row[self.grid], self._last_col[self.grid]
        return (self.top == 0) | (self.left == 0) | (self.bottom == bottom) | (self.right == right)

    @cached_property
    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of each active cell inside the bounding box of its component."""
        return self.row - self.top[self.of], self.col - self.left[self.of]

    def _shape_hash(self, down: np.ndarray, right: np.ndarray) -> np.ndarray:
        total = np.zeros(self.count, np.int64)
        np.add.at(total, self.of, OFFSET_KEYS[down, right])
        return total

    @cached_property
    def shape(self) -> np.ndarray:
        return self._shape_hash(*self.offsets)

    @cached_property
    def shape_any(self) -> np.ndarray:
        down, right = self.offsets
        up, left = self.height[self.of] - 1 - down, self.width[self.of] - 1 - right
        variants = [(down, right), (down, left), (up, right), (up, left)]
        variants += [(b, a) for a, b in variants]
        return np.min([self._shape_hash(a, b) for a, b in variants], axis=0)

    @cached_property
    def rank(self) -> np.ndarray:
        """0 for the largest component of its grid, 1 for the next smaller size, ... (equal sizes share a rank)."""
        return dense_rank(self.grid, -self.size)

    @cached_property
    def rank_up(self) -> np.ndarray:
        """0 for the smallest component of its grid, 1 for the next larger size, ..."""
        return dense_rank(self.grid, self.size)

    @cached_property
    def twin_count(self) -> np.ndarray:
        """How many components of the same grid have the same shape in some orientation, itself included."""
        return self.twins(self.shape_any)

    def area(self, index: int) -> tuple[slice, slice]:
        """Rows and columns of a component's bounding box, inside its grid."""
        if index not in self._areas:
            top, bottom, left, right = (side.item(index) for side in (self.top, self.bottom, self.left, self.right))
            self._areas[index] = slice(top, bottom + 1), slice(left, right + 1)
        return self._areas[index]

    @cached_property
    def _areas(self) -> dict[int, tuple[slice, slice]]:
        return {}

    def box(self, index: int) -> np.ndarray:
        """The part of the canvas inside a component's bounding box."""
        return self.canvas[self.grid[index], *self.area(index)]

    @cached_property
    def symmetries(self) -> np.ndarray:
        """How many of the two mirror images of each component's coloured box equal the box itself."""
        result = np.full(self.count, 2)
        for index in np.flatnonzero(self.height * self.width > 1).tolist():
            box = self.box(index)
            result[index] = int((box == box[::-1]).all()) + int((box == box[:, ::-1]).all())
        return result

    @cached_property
    def per_grid(self) -> list[int]:
        """How many components each grid has; those of a grid follow each other."""
        return np.bincount(self.grid, minlength=self.labels.shape[0]).tolist()

    @cached_property
    def _best(self) -> dict[Callable[[Objects], np.ndarray], int]:
        return {}

    def best(self, key: Callable[[Objects], np.ndarray]) -> int:
        """The first component with the largest key; there must be one."""
        if key not in self._best:
            self._best[key] = int(key(self).argmax())
        return self._best[key]

    def best_boxes(self, key: Callable[[Objects], np.ndarray]) -> list[tuple[int, int] | None]:
        """For each grid the size of the box of the component with the largest key; None where there is no component, or
        two of different size share the largest key."""
        if key not in self._best_boxes:
            self._best_boxes[key] = self._find_best_boxes(key(self))
        return self._best_boxes[key]

    @cached_property
    def _by_grid(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The grids that have components, the first of each, and how many."""
        per_grid = np.array(self.per_grid)
        first = np.cumsum(per_grid) - per_grid
        grids = np.flatnonzero(per_grid)
        return grids.tolist(), first[grids], per_grid[grids]

    def _find_best_boxes(self, key: np.ndarray) -> list[tuple[int, int] | None]:
        boxes: list[tuple[int, int] | None] = [None] * self.labels.shape[0]
        grids, first, counts = self._by_grid
        if grids:
            best = key == np.maximum.reduceat(key, first).repeat(counts)
            size = self.height * 32 + self.width
            least = np.minimum.reduceat(np.where(best, size, 2**15), first).tolist()
            most = np.maximum.reduceat(np.where(best, size, 0), first).tolist()
            for grid, low, high in zip(grids, least, most, strict=True):
                boxes[grid] = divmod(low, 32) if low == high else None
        return boxes

    def twins(self, value: np.ndarray) -> np.ndarray:
        """How many components of the same grid share each component's `value`."""
        _, inverse, counts = np.unique(combine([self.grid, value]), return_inverse=True, return_counts=True)
        return counts[inverse]

    def paint(self, value: np.ndarray, default: int = MISSING) -> np.ndarray:
        """Spread one value a component over its cells; `default` elsewhere."""
        plane = np.full(self.labels.size, default, np.int64)
        plane[self.cells] = value[self.of]
        return plane.reshape(self.labels.shape)

    def paint_cells(self, value: np.ndarray, default: int = MISSING) -> np.ndarray:
        """Write one value an active cell (in the order of `cells`); `default` elsewhere."""
        plane = np.full(self.labels.size, default, np.int64)
        plane[self.cells] = value
        return plane.reshape(self.labels.shape)


def _of_whole(name: str) -> cached_property[np.ndarray]:
    """A fact about the components of one grid, as it was found for those of all."""
    return cached_property(lambda objects: getattr(objects._whole, name)[objects._members])  # noqa: SLF001


class ObjectsOfGrid(Objects):
    """The components of one grid of a canvas as those of a canvas of its own (1, H, W): what is known of all of them
    together is not found again."""

    def __init__(self, whole: Objects, grid: int, canvas: np.ndarray):
        plane, width = whole.canvas.shape[1] * whole.canvas.shape[2], canvas.shape[2]
        start, end = np.searchsorted(whole.cells, (grid * plane, (grid + 1) * plane)).tolist()
        first, last = np.searchsorted(whole.grid, (grid, grid + 1)).tolist()
        self._whole, self._members = whole, slice(first, last)
        self.canvas, self.count = canvas, last - first
        labels = whole.labels[grid : grid + 1, : canvas.shape[1], :width]
        self.labels = np.where(labels >= 0, labels - first, -1)
        self.of, self.row, self.col = whole.of[start:end] - first, whole.row[start:end], whole.col[start:end]
        self.cells = self.row * width + self.col
        self.first = np.empty(self.count, np.int64)
        self.first[self.of[::-1]] = self.cells[::-1]
        self.grid = np.zeros(self.count, np.int64)
        for name in ("size", "colour", "top", "bottom", "left", "right", "height", "width"):
            setattr(self, name, getattr(whole, name)[self._members])

    colours = _of_whole("colours")
    touches = _of_whole("touches")
    shape = _of_whole("shape")
    shape_any = _of_whole("shape_any")
    rank = _of_whole("rank")
    rank_up = _of_whole("rank_up")
    twin_count = _of_whole("twin_count")
    symmetries = _of_whole("symmetries")


def dense_rank(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Rank of each distinct value inside its group, 0 for the smallest."""
    low = value.min(initial=0)
    span = int(value.max(initial=0) - low) + 1
    pairs, inverse = np.unique(group * span + (value - low), return_inverse=True)
    start = np.searchsorted(pairs, pairs // span * span)  # first distinct pair of each group
    return (np.arange(len(pairs)) - start)[inverse]


# ----------------------------------------------------------------------------------------------------------------
# The canvas
# ----------------------------------------------------------------------------------------------------------------
def background(counts: np.ndarray) -> int:
    """0 where it covers at least a fifth of the grid with so many cells of each colour (10,), else the commonest colour
    (ties: the smaller)."""
    return 0 if counts[0] * 5 >= counts.sum() else int(counts.argmax())


def ranked_colours(counts: np.ndarray, ground: int) -> list[int]:
    """Colours other than the background `ground` of a grid with so many cells of each colour (10,), commonest first
    (ties: the smaller)."""
    ranked = sorted((-count, colour) for colour, count in enumerate(counts.tolist()) if count and colour != ground)
    return [colour for _, colour in ranked]


def tally(group: np.ndarray, colour: np.ndarray, groups: int) -> np.ndarray:
    """How many cells of each colour each group has, of cells given by group and colour: (groups, 10)."""
    return np.bincount(group * 10 + colour, minlength=groups * 10).reshape(groups, 10)


class Canvas:
    """Grids of a task on one padded canvas (G, H, W); or one of them alone, `of` the canvas of all."""

    def __init__(self, grids: Sequence[np.ndarray], of: tuple[Canvas, int] | None = None):
        """Everything about the grids is found when first asked for."""
        self.grids, self._of = list(grids), of

    @cached_property
    def heights(self) -> np.ndarray:
        return np.array([g.shape[0] for g in self.grids])

    @cached_property
    def widths(self) -> np.ndarray:
        return np.array([g.shape[1] for g in self.grids])

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        return len(self.grids), int(self.heights.max()), int(self.widths.max())

    @cached_property
    def colour(self) -> np.ndarray:
        """(G, H, W) int64, OUTSIDE beside a grid."""
        colour = np.full(self.shape, OUTSIDE, np.int64)
        for index, grid in enumerate(self.grids):
            colour[index, : grid.shape[0], : grid.shape[1]] = grid
        return colour

    @cached_property
    def inside(self) -> np.ndarray:
        return self.colour != OUTSIDE

    @cached_property
    def counts(self) -> list[np.ndarray]:
        """Cells of each colour, (10,) a grid."""
        return [np.bincount(g.reshape(-1), minlength=10) for g in self.grids]

    @cached_property
    def background(self) -> np.ndarray:
        """(G,)"""
        return np.array([background(counts) for counts in self.counts])

    @cached_property
    def foreground(self) -> np.ndarray:
        return self.inside & (self.colour != self.background[:, None, None])

    @cached_property
    def colours(self) -> list[list[int]]:
        """Each grid's foreground colours, commonest first."""
        return [
            ranked_colours(counts, int(ground)) for counts, ground in zip(self.counts, self.background, strict=True)
        ]

    @cached_property
    def sights(self) -> tuple[np.ndarray, np.ndarray]:
        """The colour of the first foreground cell met from each cell in the directions of STAR, OUTSIDE where there is
        none, and how many steps away it is: (G, 8, H, W) both."""
        return look(np.where(self.foreground, self.colour, OUTSIDE), OUTSIDE, STAR)

    def alone(self, index: int) -> Canvas:
        """One of the grids as a canvas of its own."""
        return Canvas([self.grids[index]], (self, index))

    def _objects(self, name: str, colour: np.ndarray, connectivity: int) -> Objects:
        """Components of equal `colour` (G, H, W), none where it is negative, kept under `name`."""
        if self._of is not None:
            whole, index = self._of
            return ObjectsOfGrid(getattr(whole, name), index, self.colour)
        return Objects(components(colour, connectivity), self.colour, self.heights, self.widths)

    @cached_property
    def regions(self) -> Objects:
        """4-connected regions of one colour, background included."""
        return self._objects("regions", np.where(self.inside, self.colour, -1), 4)

    @cached_property
    def region_rim(self) -> np.ndarray:
        """Commonest colour among the cells that border each cell's region (ties: the smaller): (G, H, W)."""
        if self._of is not None:
            whole, index = self._of
            return whole.region_rim[index : index + 1, : self.shape[1], : self.shape[2]]
        regions = self.regions
        own, rim = self.colour.reshape(-1)[regions.cells], np.zeros((regions.count, 11), np.int64)
        for dr, dc in CROSS:
            beyond = shifted(self.colour, dr, dc, OUTSIDE).reshape(-1)[regions.cells]
            outward = (beyond != own) & (beyond != OUTSIDE)
            np.add.at(rim, (regions.of[outward], beyond[outward]), 1)
        return regions.paint(np.where(rim.any(1), rim.argmax(1), MISSING))

    @cached_property
    def shapes(self) -> Objects:
        """8-connected objects of one colour, background excluded."""
        return self._objects("shapes", np.where(self.foreground, self.colour, -1), 8)

    @cached_property
    def clusters(self) -> Objects:
        """8-connected objects of any colours, background excluded."""
        return self._objects("clusters", np.where(self.foreground, 0, -1), 8)


# ----------------------------------------------------------------------------------------------------------------
# Lines of sight
# ----------------------------------------------------------------------------------------------------------------
def shifted(plane: np.ndarray, dr: int, dc: int, fill: int) -> np.ndarray:
    """The value found `dr` rows down and `dc` columns right of each cell of (..., H, W); `fill` beyond the border."""
    result = np.full_like(plane, fill)
    height, width = plane.shape[-2:]
    rows, cols = max(0, height - abs(dr)), max(0, width - abs(dc))
    to_r, to_c, from_r, from_c = max(0, -dr), max(0, -dc), max(0, dr), max(0, dc)
    result[..., to_r : to_r + rows, to_c : to_c + cols] = plane[..., from_r : from_r + rows, from_c : from_c + cols]
    return result


@lru_cache(maxsize=128)
def _sight_lines(height: int, width: int, steps: tuple[Step, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every line of cells along each of `steps`, from the border it leads to, and where each cell's own line has what
    lies before it.

    Returns (lines, M) flat indices of cells, height * width where there is none (as in the whole first column); for
    all steps and cells, flat, the flat index into that array of the slot before the cell's own, and its column there.
    """
    row, col = np.indices((height, width))
    slots = max(height, width) + 1
    lines, before, count = [], [], 0
    for dr, dc in steps:
        line = col if dc == 0 else row if dr == 0 else row - dc * dr * col
        down, right = (
            {-1: p, 0: np.full_like(p, 99), 1: n - 1 - p}[d] for p, n, d in ((row, height, dr), (col, width, dc))
        )
        place = (line - line.min()) * slots + np.minimum(down, right)
        cells = np.full((int(line.max() - line.min()) + 1) * slots, height * width)
        cells[place + 1] = row * width + col
        lines.append(cells.reshape(-1, slots))
        before.append(place + count * slots)
        count += len(lines[-1])
    flat = np.stack(before).reshape(-1)
    return np.concatenate(lines), flat, flat % slots


def look(values: np.ndarray, nothing: int, steps: tuple[Step, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What is met from each cell of (..., H, W) in each direction of `steps`, the cell's own value left out: the first
    value other than `nothing` (`nothing` where there is none), and how many steps away it is: (..., steps, H, W) both.
    """
    height, width = values.shape[-2:]
    lines, before, own = _sight_lines(height, width, steps)
    flat = np.full((values.size // (height * width), height * width + 1), nothing, values.dtype)
    flat[:, :-1] = values.reshape(len(flat), -1)
    seen = flat.take(lines, axis=1)  # (grids, lines, M)
    latest = np.where(seen == nothing, np.int8(0), np.arange(lines.shape[1], dtype=np.int8))
    latest = np.maximum.accumulate(latest, axis=2).reshape(len(flat), -1).take(before, axis=1)  # slots in the lines
    start = before - own + np.arange(0, seen.size, lines.size)[:, None]  # of the lines
    shape = (*values.shape[:-2], len(steps), height, width)
    return seen.take(start + latest).reshape(shape), (own + 1 - latest).reshape(shape)
