"""What can be seen at a cell: planes over the input grids of a task, and where an output cell looks them up.

A *plane* is an integer array over all cells of all input grids of a task (demonstration and test inputs, padded to
one canvas), such as the colour of a cell, a hash of its neighbourhood or the size of the object it belongs to.
An *anchor* maps a cell of an output grid to the input cell it looks at (the same position, a mirror image, the cell
it would come from if the input were scaled or tiled, ...). A *feature* of an output cell is a plane read through an
anchor (`"n9@scale"`), or something about its position alone (`".row"`).

Everything here is a function of input grids and output *sizes*. No output grid is ever seen by this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

OUTSIDE = 10  # "colour" of positions outside a grid
MISSING = -1  # value of every plane where an anchor points outside the input
UNAVAILABLE = 255  # value of a source where it has no colour to offer

Planes = dict[str, np.ndarray]


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
_COLOUR_KEYS = KEYS[3000:3011]  # one per colour and OUTSIDE, for multisets of colours
_OFFSET_KEYS = KEYS[:900].reshape(30, 30)  # one per (row, column) offset inside an object


def combine(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Hash several integer arrays of one shape into one int64 array: sum of part * key, modulo 2**64."""
    total = parts[0] * KEYS[1000]
    for index, part in enumerate(parts[1:], start=1001):
        total = total + part * KEYS[index]
    return total


# ----------------------------------------------------------------------------------------------------------------
# Connected components
# ----------------------------------------------------------------------------------------------------------------
_STEPS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, 0), (1, 1), (1, -1))}


def components(key: np.ndarray, connectivity: int) -> np.ndarray:
    """Label connected cells of equal `key` (G, H, W); cells with a negative key belong to nothing.

    Returns int64 labels of the same shape: -1 for nothing, else 0..n-1 in order of each component's first cell.
    Minimum-label hooking over the edge list with pointer jumping, so the number of rounds is logarithmic.
    """
    index = np.arange(key.size).reshape(key.shape)
    _, height, width = key.shape
    heads, tails = [], []
    for dr, dc in _STEPS[connectivity]:
        here = (slice(None), slice(0, height - dr), slice(max(0, -dc), width - max(0, dc)))
        there = (slice(None), slice(dr, height), slice(max(0, dc), width - max(0, -dc)))
        linked = (key[here] == key[there]) & (key[here] >= 0)
        heads.append(index[here][linked])
        tails.append(index[there][linked])
    a, b = np.concatenate(heads), np.concatenate(tails)
    root = np.arange(key.size)
    while len(a):
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        np.minimum.at(root, high, low)
        while not np.array_equal(jumped := root[root], root):
            root = jumped
        open_edges = root[a] != root[b]
        a, b = a[open_edges], b[open_edges]
    active = key.reshape(-1) >= 0
    labels = np.full(key.size, -1)
    labels[active] = np.unique(root[active], return_inverse=True)[1]
    return labels.reshape(key.shape)


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
        cell_colour = canvas.reshape(-1)[cells]
        self.size = np.bincount(self.of, minlength=count)
        self.first = np.full(count, canvas.size)
        np.minimum.at(self.first, self.of, cells)
        self.grid, self.colour = self.first // plane, canvas.reshape(-1)[self.first]
        self.top, self.bottom = _extremes(self.row, self.of, count)
        self.left, self.right = _extremes(self.col, self.of, count)
        self.height, self.width = self.bottom - self.top + 1, self.right - self.left + 1
        self.colours = (np.bincount(self.of * 11 + cell_colour, minlength=count * 11).reshape(count, 11) > 0).sum(1)
        last_row, last_col = heights[self.grid] - 1, widths[self.grid] - 1
        self.touches = (self.top == 0) | (self.left == 0) | (self.bottom == last_row) | (self.right == last_col)

    @cached_property
    def _offsets(self) -> tuple[np.ndarray, np.ndarray]:
        return self.row - self.top[self.of], self.col - self.left[self.of]

    def _shape_hash(self, down: np.ndarray, right: np.ndarray) -> np.ndarray:
        total = np.zeros(self.count, np.int64)
        np.add.at(total, self.of, _OFFSET_KEYS[down, right])
        return total

    @cached_property
    def shape(self) -> np.ndarray:
        return self._shape_hash(*self._offsets)

    @cached_property
    def shape_any(self) -> np.ndarray:
        down, right = self._offsets
        up, left = self.height[self.of] - 1 - down, self.width[self.of] - 1 - right
        variants = [(down, right), (down, left), (up, right), (up, left)]
        variants += [(b, a) for a, b in variants]
        return np.min([self._shape_hash(a, b) for a, b in variants], axis=0)

    @cached_property
    def rank(self) -> np.ndarray:
        """0 for the largest component of its grid, 1 for the next smaller size, ... (equal sizes share a rank)."""
        return _dense_rank(self.grid, -self.size)

    @cached_property
    def rank_up(self) -> np.ndarray:
        """0 for the smallest component of its grid, 1 for the next larger size, ..."""
        return _dense_rank(self.grid, self.size)

    @cached_property
    def twin_count(self) -> np.ndarray:
        """How many components of the same grid have the same shape in some orientation, itself included."""
        return self.twins(self.shape_any)

    def area(self, index: int) -> tuple[slice, slice]:
        """Rows and columns of a component's bounding box, inside its grid."""
        rows = slice(int(self.top[index]), int(self.bottom[index]) + 1)
        return rows, slice(int(self.left[index]), int(self.right[index]) + 1)

    def box(self, index: int) -> np.ndarray:
        """The part of the canvas inside a component's bounding box."""
        return self.canvas[self.grid[index], *self.area(index)]

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


def _extremes(value: np.ndarray, of: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(count, 99), np.full(count, -1)
    np.minimum.at(low, of, value)
    np.maximum.at(high, of, value)
    return low, high


def _dense_rank(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Rank of each distinct value inside its group, 0 for the smallest."""
    pairs, inverse = np.unique(np.stack([group, value], 1), axis=0, return_inverse=True)
    start = np.searchsorted(pairs[:, 0], pairs[:, 0])  # first distinct pair of each group
    return (np.arange(len(pairs)) - start)[inverse.reshape(-1)]


# ----------------------------------------------------------------------------------------------------------------
# Planes over the input grids
# ----------------------------------------------------------------------------------------------------------------
def background(grid: np.ndarray) -> int:
    """0 where it covers at least a fifth of the grid, else the commonest colour (ties: the smaller)."""
    counts = np.bincount(grid.reshape(-1), minlength=10)
    return 0 if counts[0] * 5 >= grid.size else int(counts.argmax())


class Canvas:
    """The input grids of a task on one padded canvas (G, H, W), with all planes computed from them."""

    def __init__(self, grids: Sequence[np.ndarray]):
        self.grids = list(grids)
        self.heights = np.array([g.shape[0] for g in grids])
        self.widths = np.array([g.shape[1] for g in grids])
        self.shape = (len(grids), int(self.heights.max()), int(self.widths.max()))
        self.colour = np.full(self.shape, OUTSIDE, np.int64)
        for index, grid in enumerate(grids):
            self.colour[index, : grid.shape[0], : grid.shape[1]] = grid
        self.inside = self.colour != OUTSIDE
        self.background = np.array([background(g) for g in grids])
        self.foreground = self.inside & (self.colour != self.background[:, None, None])

    @cached_property
    def row(self) -> np.ndarray:
        return np.broadcast_to(np.arange(self.shape[1])[None, :, None], self.shape)

    @cached_property
    def col(self) -> np.ndarray:
        return np.broadcast_to(np.arange(self.shape[2])[None, None, :], self.shape)

    def objects(self, labels: np.ndarray) -> Objects:
        return Objects(labels, self.colour, self.heights, self.widths)

    @cached_property
    def regions(self) -> Objects:
        """4-connected regions of one colour, background included."""
        return self.objects(components(np.where(self.inside, self.colour, -1), 4))

    @cached_property
    def shapes(self) -> Objects:
        """8-connected objects of one colour, background excluded."""
        return self.objects(components(np.where(self.foreground, self.colour, -1), 8))

    @cached_property
    def clusters(self) -> Objects:
        """8-connected objects of any colours, background excluded."""
        return self.objects(components(np.where(self.foreground, 0, -1), 8))

    @cached_property
    def planes(self) -> Planes:
        """All feature planes by name, each (G, H, W) int64."""
        planes: Planes = {}
        for family in (colour_planes, window_planes, ray_planes, line_planes, object_planes, value_planes):
            planes.update(family(self))
        return planes


def shifted(plane: np.ndarray, dr: int, dc: int, fill: int) -> np.ndarray:
    """The value found `dr` rows down and `dc` columns right of each cell; `fill` beyond the canvas."""
    result = np.full_like(plane, fill)
    _, height, width = plane.shape
    rows, cols = max(0, height - abs(dr)), max(0, width - abs(dc))
    to_r, to_c, from_r, from_c = max(0, -dr), max(0, -dc), max(0, dr), max(0, dc)
    result[:, to_r : to_r + rows, to_c : to_c + cols] = plane[:, from_r : from_r + rows, from_c : from_c + cols]
    return result


def colour_planes(canvas: Canvas) -> Planes:
    """The colour itself, seen in absolute terms and by how common it is in its grid."""
    x, (grids, _, _) = canvas.colour, canvas.shape
    counts = np.stack([np.bincount(g.reshape(-1), minlength=11) for g in canvas.grids])  # (G, 11)
    order = np.argsort(-counts[:, :10], axis=1, kind="stable")
    rank = np.full((grids, 11), MISSING)
    np.put_along_axis(rank, order, np.arange(10)[None, :], axis=1)
    role = np.where(counts > 0, rank, MISSING)
    role[np.arange(grids), canvas.background] = -2
    palette = ((counts > 0) * KEYS[2900:2911]).sum(1)
    present = (counts[:, :10] > 0).sum(1)
    top = np.where(np.arange(10)[None, :] == canvas.background[:, None], -1, counts[:, :10]).argmax(1)
    low_counts = np.where(counts[:, :10] > 0, counts[:, :10], 10**6)
    low_counts[np.arange(grids), canvas.background] = 10**6
    spread = np.zeros(canvas.shape, np.int64)
    return {
        "colour": x,
        "role": np.take_along_axis(role, x.reshape(grids, -1), axis=1).reshape(x.shape),
        "count": np.take_along_axis(counts, x.reshape(grids, -1), axis=1).reshape(x.shape),
        "foreground": canvas.foreground.astype(np.int64),
        "grid_palette": spread + palette[:, None, None],
        "grid_colours": spread + present[:, None, None],
        "grid_top": spread + top[:, None, None],
        "grid_low": spread + low_counts.argmin(1)[:, None, None],
    }


_ORIENTATIONS: tuple[Callable[[tuple[int, int]], tuple[int, int]], ...] = (
    lambda o: (o[0], o[1]),
    lambda o: (o[0], -o[1]),
    lambda o: (-o[0], o[1]),
    lambda o: (-o[0], -o[1]),
    lambda o: (o[1], o[0]),
    lambda o: (o[1], -o[0]),
    lambda o: (-o[1], o[0]),
    lambda o: (-o[1], -o[0]),
)


def window_planes(canvas: Canvas) -> Planes:
    """Neighbourhoods: ordered, unordered, and free of colour."""
    x, fg = canvas.colour, canvas.foreground.astype(np.int64)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2)), constant_values=OUTSIDE)
    padded_fg = np.pad(fg, ((0, 0), (2, 2), (2, 2)))
    _, height, width = x.shape

    def look(source: np.ndarray, dr: int, dc: int) -> np.ndarray:
        return source[:, 2 + dr : 2 + dr + height, 2 + dc : 2 + dc + width]

    near = {(dr, dc): look(padded, dr, dc) for dr in range(-2, 3) for dc in range(-2, 3)}
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    edge, corner = [(-1, 0), (0, -1), (0, 1), (1, 0)], [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    same = {o: (near[o] == x).astype(np.int64) for o in ring}
    bit = {o: 1 << i for i, o in enumerate(ring)}
    key = {o: KEYS[1100 + 5 * (o[0] + 2) + o[1] + 2] for o in near}
    ring_hash = sum(near[o] * key[o] for o in ring)
    outer = [o for o in near if max(abs(o[0]), abs(o[1])) == 2]
    edge_bag, corner_bag = (sum(_COLOUR_KEYS[near[o]] for o in group) for group in (edge, corner))
    fg_ring = sum(look(padded_fg, *o) * bit[o] for o in ring)

    def any_way(source: dict[tuple[int, int], np.ndarray], offsets: list[tuple[int, int]]) -> np.ndarray:
        """Hash of a window that is the same in all eight orientations."""
        return np.minimum.reduce([sum(source[o] * key[turn(o)] for o in offsets) for turn in _ORIENTATIONS])

    fg_near = {o: look(padded_fg, *o) for o in near}
    return {
        "n8_any": any_way(near, ring),
        "n24_any": any_way(near, ring + outer),
        "fg8_any": any_way(fg_near, ring),
        "fg24_any": any_way(fg_near, ring + outer),
        "same8_any": any_way(same, ring),
        "n4": sum(near[o] * key[o] for o in edge),
        "n8": ring_hash,
        "n24": ring_hash + sum(near[o] * key[o] for o in outer),
        "x4": sum(near[o] * key[o] for o in corner),
        "sides": near[0, -1] * 16 + near[0, 1],
        "ends": near[-1, 0] * 16 + near[1, 0],
        "edge_bag": edge_bag,
        "corner_bag": corner_bag,
        "ring_bag": edge_bag + corner_bag,
        "fg8": fg_ring,
        "fg24": fg_ring + sum(look(padded_fg, *o) << (8 + i) for i, o in enumerate(outer)),
        "same8": sum(same[o] * bit[o] for o in ring),
        "same4_count": sum(same[o] for o in edge),
        "same8_count": sum(same[o] for o in ring),
        "fg4_count": sum(look(padded_fg, *o) for o in edge),
        "fg8_count": sum(look(padded_fg, *o) for o in ring),
        "cross": near[-2, 0] * key[-2, 0] + near[2, 0] * key[2, 0] + near[0, -2] * key[0, -2] + near[0, 2] * key[0, 2],
    }


def ray_planes(canvas: Canvas) -> Planes:
    """The first foreground cell met in each of eight directions: its colour (OUTSIDE when there is none)."""
    hit = {name: first_seen(canvas, dr, dc) for name, (dr, dc) in RAYS.items()}
    north, south, west, east = (hit[n] for n in ("north", "south", "west", "east"))
    diagonal = [hit[n] for n in ("north_west", "north_east", "south_west", "south_east")]
    distance = {n: _ray_distance(canvas, *RAYS[n]) for n in ("north", "south", "west", "east")}
    seen = {RAYS[n]: h for n, h in hit.items()}
    turned = [[seen[turn(o)] for o in seen] for turn in _ORIENTATIONS]
    gaps = {RAYS[n]: d for n, d in distance.items()}
    gaps_turned = [[gaps[turn(o)] for o in gaps] for turn in _ORIENTATIONS]
    return {
        "rays8_any": np.minimum.reduce([combine(parts) for parts in turned]),
        "rays4_any": np.minimum.reduce([combine(parts[:4]) for parts in turned]),
        "gaps_any": np.minimum.reduce([combine(parts) for parts in gaps_turned]),
        "gaps_rays_any": np.minimum.reduce([combine([*a, *b[:4]]) for a, b in zip(gaps_turned, turned, strict=True)]),
        **hit,
        "rays4": combine([north, south, west, east]),
        "rays4_bag": sum(_COLOUR_KEYS[h] for h in (north, south, west, east)),
        "rays_x": combine(diagonal),
        "rays8_bag": sum(_COLOUR_KEYS[h] for h in (north, south, west, east, *diagonal)),
        "rays4_open": combine([(h == OUTSIDE).astype(np.int64) for h in (north, south, west, east)]),
        "between_rows": np.where((north == south) & (north != OUTSIDE), north, MISSING),
        "between_cols": np.where((west == east) & (west != OUTSIDE), west, MISSING),
        "gap_ns": combine([distance["north"], distance["south"]]),
        "gap_we": combine([distance["west"], distance["east"]]),
        "nearest": np.min(list(distance.values()), axis=0),
    }


RAYS = {
    "north": (-1, 0),
    "south": (1, 0),
    "west": (0, -1),
    "east": (0, 1),
    "north_west": (-1, -1),
    "north_east": (-1, 1),
    "south_west": (1, -1),
    "south_east": (1, 1),
}


def first_seen(canvas: Canvas, dr: int, dc: int) -> np.ndarray:
    """Colour of the first foreground cell in direction (dr, dc), by doubling: each round looks twice as far."""
    found = shifted(np.where(canvas.foreground, canvas.colour, OUTSIDE), dr, dc, OUTSIDE)
    reach = 1
    while reach < max(canvas.shape[1:]):
        further = shifted(found, dr * reach, dc * reach, OUTSIDE)
        found = np.where(found == OUTSIDE, further, found)
        reach *= 2
    return found


def _ray_distance(canvas: Canvas, dr: int, dc: int) -> np.ndarray:
    """Steps to the first foreground cell in direction (dr, dc), 99 where there is none."""
    found = shifted(np.where(canvas.foreground, 1, 99), dr, dc, 99)
    reach = 1
    while reach < max(canvas.shape[1:]):
        further = shifted(found, dr * reach, dc * reach, 99)
        found = np.minimum(found, further + np.where(further < 99, reach, 0))
        reach *= 2
    return found


def line_planes(canvas: Canvas) -> Planes:
    """The cell's whole row and column, and where it lies in its grid."""
    x, fg = canvas.colour, canvas.foreground
    row_count, col_count = fg.sum(2, keepdims=True), fg.sum(1, keepdims=True)
    low_row, low_col = x.min(2, keepdims=True), x.min(1, keepdims=True)
    valued = np.where(canvas.inside, x, -1)
    flat_row, flat_col = valued.max(2, keepdims=True) == low_row, valued.max(1, keepdims=True) == low_col
    zero = np.zeros(canvas.shape, np.int64)
    last_row, last_col = canvas.heights[:, None, None] - 1, canvas.widths[:, None, None] - 1
    border = np.minimum(np.minimum(canvas.row, last_row - canvas.row), np.minimum(canvas.col, last_col - canvas.col))
    return {
        "row_fg": zero + row_count,
        "col_fg": zero + col_count,
        "row_flat": zero + np.where(flat_row, low_row, MISSING),
        "col_flat": zero + np.where(flat_col, low_col, MISSING),
        "row_palette": zero + np.bitwise_or.reduce(np.where(fg, 1 << x, 0), axis=2, keepdims=True),
        "col_palette": zero + np.bitwise_or.reduce(np.where(fg, 1 << x, 0), axis=1, keepdims=True),
        "row_first": zero + x[:, :, :1],
        "col_first": zero + x[:, :1, :],
        "row_last": zero + np.take_along_axis(x, np.broadcast_to(last_col, (len(x), x.shape[1], 1)), axis=2),
        "col_last": zero + np.take_along_axis(x, np.broadcast_to(last_row, (len(x), 1, x.shape[2])), axis=1),
        "grid_row": zero + canvas.row,
        "grid_col": zero + canvas.col,
        "border": border,
    }


def object_planes(canvas: Canvas) -> Planes:
    """The region (4-connected, any colour), shape (8-connected, one colour) and cluster (8-connected) of a cell."""
    regions, shapes, clusters = canvas.regions, canvas.shapes, canvas.clusters
    down, right = shapes._offsets
    cluster_down, cluster_right = clusters._offsets
    pattern = np.zeros(clusters.count, np.int64)
    cell_colour = canvas.colour.reshape(-1)[clusters.cells]
    np.add.at(pattern, clusters.of, _OFFSET_KEYS[cluster_down, cluster_right] * cell_colour)
    return {
        "region_size": regions.paint(regions.size),
        "region_open": regions.paint(regions.touches),
        "region_box": regions.paint(regions.height * 32 + regions.width),
        "region_square": regions.paint(regions.height - regions.width),
        "region_full": regions.paint(regions.size == regions.height * regions.width),
        "shape_size": shapes.paint(shapes.size),
        "shape": shapes.paint(shapes.shape),
        "shape_any": shapes.paint(shapes.shape_any),
        "shape_box": shapes.paint(shapes.height * 32 + shapes.width),
        "shape_full": shapes.paint(shapes.size == shapes.height * shapes.width),
        "shape_rank": shapes.paint(shapes.rank),
        "shape_rank_up": shapes.paint(shapes.rank_up),
        "shape_twins": shapes.paint(shapes.twins(shapes.shape_any)),
        "shape_open": shapes.paint(shapes.touches),
        "shape_holes": shapes.paint(hole_counts(canvas)),
        "shape_left_rank": shapes.paint(_dense_rank(shapes.grid, shapes.left)),
        "shape_top_rank": shapes.paint(_dense_rank(shapes.grid, shapes.top)),
        "shape_height": shapes.paint(shapes.height),
        "shape_width": shapes.paint(shapes.width),
        "shape_colour_twins": shapes.paint(shapes.twins(shapes.colour)),
        "grid_shapes": np.bincount(shapes.grid, minlength=len(canvas.grids))[:, None, None]
        + np.zeros_like(canvas.colour),
        "shape_offset": shapes.paint_cells(down * 32 + right),
        "shape_edge": shapes.paint_cells(_edge_distance(shapes)),
        "cluster_size": clusters.paint(clusters.size),
        "cluster": clusters.paint(clusters.shape),
        "cluster_rank": clusters.paint(clusters.rank),
        "cluster_rank_up": clusters.paint(clusters.rank_up),
        "cluster_colours": clusters.paint(clusters.colours),
        "cluster_twins": clusters.paint(clusters.twins(clusters.shape)),
        "cluster_offset": clusters.paint_cells(cluster_down * 32 + cluster_right),
        "cluster_pattern": clusters.paint(pattern),
        "cluster_box": clusters.paint(clusters.height * 32 + clusters.width),
    }


def hole_counts(canvas: Canvas) -> np.ndarray:
    """How many enclosed background regions each shape has: a region belongs to the shape above its first cell."""
    regions, shapes = canvas.regions, canvas.shapes
    enclosed = (regions.colour == canvas.background[regions.grid]) & ~regions.touches
    above = shapes.labels.reshape(-1)[regions.first[enclosed] - canvas.shape[2]]
    return np.bincount(above, minlength=shapes.count)


def _edge_distance(objects: Objects) -> np.ndarray:
    """Distance of each active cell to the nearest side of its object's bounding box."""
    down, right = objects._offsets
    up, left = objects.height[objects.of] - 1 - down, objects.width[objects.of] - 1 - right
    return np.minimum(np.minimum(down, up), np.minimum(right, left))


def value_planes(canvas: Canvas) -> Planes:
    """Planes whose values are colours: candidates for what an output cell may show."""
    x, fg = canvas.colour, canvas.foreground
    clusters = canvas.clusters
    own = np.zeros((clusters.count, 11), np.int64)
    np.add.at(own, (clusters.of, x.reshape(-1)[clusters.cells]), 1)
    cell_colour = x.reshape(-1)[clusters.cells]
    others = own[clusters.of].copy()
    others[np.arange(len(cell_colour)), cell_colour] = 0
    lines = {}
    for name, axis in (("row_top", 2), ("col_top", 1)):
        counts = np.stack([(fg & (x == colour)).sum(axis, keepdims=True) for colour in range(10)])
        lines[name] = np.broadcast_to(np.where(counts.any(0), counts.argmax(0), MISSING), x.shape)
    return {
        "cluster_top": clusters.paint(own.argmax(1)),
        "cluster_low": clusters.paint(np.where(own > 0, own, 10**6).argmin(1)),
        "cluster_other": clusters.paint_cells(np.where(others.any(1), others.argmax(1), MISSING)),
        "region_rim": region_rim(canvas),
        "nearest_colour": _nearest_colour(canvas),
        **lines,
    }


def region_rim(canvas: Canvas) -> np.ndarray:
    """Commonest colour among the cells that border each cell's region (ties: the smaller)."""
    x, regions = canvas.colour, canvas.regions
    rim = np.zeros((regions.count, 11), np.int64)
    for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        beyond = shifted(x, dr, dc, OUTSIDE).reshape(-1)[regions.cells]
        outward = (beyond != x.reshape(-1)[regions.cells]) & (beyond != OUTSIDE)
        np.add.at(rim, (regions.of[outward], beyond[outward]), 1)
    return regions.paint(np.where(rim.any(1), rim.argmax(1), MISSING))


def _nearest_colour(canvas: Canvas) -> np.ndarray:
    """Colour of the nearest foreground cell straight up, down, left or right (ties in this order)."""
    steps = [RAYS[n] for n in ("north", "south", "west", "east")]
    distance = np.stack([_ray_distance(canvas, *step) for step in steps])
    colour = np.stack([first_seen(canvas, *step) for step in steps])
    return np.take_along_axis(colour, distance.argmin(0)[None], axis=0)[0]


# ----------------------------------------------------------------------------------------------------------------
# Output cells
# ----------------------------------------------------------------------------------------------------------------
class OutputCells:
    """All cells of several output grids, each given as (index of its input grid, height, width), in one flat list."""

    def __init__(
        self,
        canvas: Canvas,
        items: Sequence[tuple[int, int, int]],
        transformed: Callable[[int, str, str], np.ndarray | None],
    ):
        """`transformed(grid, cut, change)` is the result of a whole-grid transform (`ProgramSearch.result`)."""
        self.canvas, self.items, self.transformed = canvas, list(items), transformed
        areas = np.array([h * w for _, h, w in items])
        self.starts = np.concatenate([[0], np.cumsum(areas)])
        local = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], areas)
        self.grid, self.h, self.w = (np.repeat([item[k] for item in items], areas) for k in range(3))
        self.r, self.c = local // self.w, local % self.w
        self.H, self.W = canvas.heights[self.grid], canvas.widths[self.grid]
        self._anchors: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def slice(self, item: int) -> slice:
        return slice(int(self.starts[item]), int(self.starts[item + 1]))

    def anchor(self, name: str) -> np.ndarray:
        """Flat index into a plane (with one extra slot at the end for "outside") for each output cell: (N,)."""
        if name not in self._anchors:
            rows, cols = ANCHORS[name](self)
            valid = (rows >= 0) & (rows < self.H) & (cols >= 0) & (cols < self.W)
            _, height, width = self.canvas.shape
            flat = (self.grid * height + rows) * width + cols
            self._anchors[name] = np.where(valid, flat, self.canvas.colour.size)
        return self._anchors[name]

    def read(self, plane: np.ndarray, anchor: str, missing: int = MISSING) -> np.ndarray:
        """The plane's value at each output cell's anchor: (N,)."""
        return np.append(plane.reshape(-1), missing)[self.anchor(anchor)]

    def feature(self, name: str) -> np.ndarray:
        """A feature by name: `plane`, `plane@anchor` or `.position`: (N,) int64."""
        if name.startswith("."):
            return POSITIONS[name](self)
        plane, _, anchor = name.partition("@")
        return self.read(self.canvas.planes[plane], anchor or "same")


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
    ".checker": lambda o: (o.r + o.c) % 2,
    ".mod3": lambda o: o.r % 3 * 3 + o.c % 3,
    ".border": lambda o: np.minimum(np.minimum(o.r, o.h - 1 - o.r), np.minimum(o.c, o.w - 1 - o.c)),
    ".diagonal": lambda o: o.r - o.c,
    ".anti": lambda o: o.r + o.c,
    ".within": lambda o: o.r * o.H % o.h // o.H * 32 + o.c * o.W % o.w // o.W,
    ".tile": lambda o: o.r // o.H * 32 + o.c // o.W,
    ".size": lambda o: o.h * 32 + o.w,
}
