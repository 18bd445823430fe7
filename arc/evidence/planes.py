"""Planes: integer arrays over all cells of all input grids of a task, such as a hash of a cell's neighbourhood.

A plane has one value for every cell of the canvas (demonstration and test inputs, padded); tables and sources name the
planes they read (`tables.py`, `sources.py`). To add one, add a line to the family it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from arc.evidence.canvas import (
    KEYS,
    MISSING,
    OUTSIDE,
    STAR,
    Canvas,
    Step,
    combine,
    dense_rank,
    tally,
)

Planes = dict[str, np.ndarray]

_COLOUR_KEYS = KEYS[3000:3011]  # one per colour and OUTSIDE, for multisets of colours


def all_planes(canvas: Canvas) -> Planes:
    """All planes by name, each (G, H, W) int64."""
    planes: Planes = {}
    for family in (colour_planes, window_planes, ray_planes, line_planes, object_planes, value_planes):
        planes.update(family(canvas))
    return planes


def colour_planes(canvas: Canvas) -> Planes:
    """The colour itself, seen in absolute terms and by how common it is in its grid."""
    x, (grids, _, _) = canvas.colour, canvas.shape
    counts = np.stack([np.bincount(g.reshape(-1), minlength=11) for g in canvas.grids])  # (G, 11)
    order = np.argsort(-counts[:, :10], axis=1, kind="stable")
    rank = np.full((grids, 11), MISSING)
    np.put_along_axis(rank, order, np.arange(10)[None, :], axis=1)
    role = np.where(counts > 0, rank, MISSING)
    role[np.arange(grids), canvas.background] = -2
    top = np.where(np.arange(10)[None, :] == canvas.background[:, None], -1, counts[:, :10]).argmax(1)
    return {
        "colour": x,
        "role": np.take_along_axis(role, x.reshape(grids, -1), axis=1).reshape(x.shape),
        "foreground": canvas.foreground.astype(np.int64),
        "grid_top": np.broadcast_to(top[:, None, None], x.shape),
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


def _window_key(offset: Step) -> int:
    return int(KEYS[1100 + 5 * (offset[0] + 2) + offset[1] + 2])


def _turned(seen: dict[Step, np.ndarray], offsets: Sequence[Step], key: Callable[[Step], int]) -> np.ndarray:
    """Hash of what is seen at some offsets in each of the eight orientations: (8, G, H, W)."""
    planes = np.stack([seen[offset] for offset in offsets])
    return (_turned_keys(tuple(offsets), key) @ planes.reshape(len(offsets), -1)).reshape(-1, *planes.shape[1:])


def _any_way(seen: dict[Step, np.ndarray], offsets: Sequence[Step], key: Callable[[Step], int]) -> np.ndarray:
    """The same, whatever the orientation: (G, H, W)."""
    return _turned(seen, offsets, key).min(0)


@cache
def _turned_keys(offsets: tuple[Step, ...], key: Callable[[Step], int]) -> np.ndarray:
    """The offsets' keys in each of the eight orientations: (8, offsets)."""
    return np.array([[key(turn(offset)) for offset in offsets] for turn in _ORIENTATIONS])


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
    key = {o: _window_key(o) for o in near}
    ring_hash = sum(near[o] * key[o] for o in ring)
    outer = [o for o in near if max(abs(o[0]), abs(o[1])) == 2]
    edge_bag, corner_bag = (sum(_COLOUR_KEYS[near[o]] for o in group) for group in (edge, corner))
    fg_ring = sum(look(padded_fg, *o) * bit[o] for o in ring)

    fg_near = {o: look(padded_fg, *o) for o in near}
    return {
        "n8_any": _any_way(near, ring, _window_key),
        "n24_any": _any_way(near, ring + outer, _window_key),
        "fg8_any": _any_way(fg_near, ring, _window_key),
        "fg24_any": _any_way(fg_near, ring + outer, _window_key),
        "same8_any": _any_way(same, ring, _window_key),
        "n4": sum(near[o] * key[o] for o in edge),
        "n8": ring_hash,
        "x4": sum(near[o] * key[o] for o in corner),
        "sides": near[0, -1] * 16 + near[0, 1],
        "ends": near[-1, 0] * 16 + near[1, 0],
        "edge_bag": edge_bag,
        "corner_bag": corner_bag,
        "ring_bag": edge_bag + corner_bag,
        "fg8": fg_ring,
        "fg24": fg_ring + sum(look(padded_fg, *o) << (8 + i) for i, o in enumerate(outer)),
        "same8": sum(same[o] * bit[o] for o in ring),
        "fg4_count": sum(look(padded_fg, *o) for o in edge),
        "fg8_count": sum(look(padded_fg, *o) for o in ring),
        "cross": near[-2, 0] * key[-2, 0] + near[2, 0] * key[2, 0] + near[0, -2] * key[0, -2] + near[0, 2] * key[0, 2],
    }


def ray_planes(canvas: Canvas) -> Planes:
    """The first foreground cell met in each of eight directions: its colour (OUTSIDE when there is none)."""
    hit = {name: canvas.sights[0][:, STAR.index(step)] for name, step in RAYS.items()}
    north, south, west, east = (hit[n] for n in ("north", "south", "west", "east"))
    diagonal = [hit[n] for n in ("north_west", "north_east", "south_west", "south_east")]
    distance = {n: _ray_distance(canvas, RAYS[n]) for n in ("north", "south", "west", "east")}
    seen = {RAYS[n]: h for n, h in hit.items()}
    gaps = {RAYS[n]: d for n, d in distance.items()}
    return {
        "rays8_any": _any_way(seen, list(seen), _ray_key),
        "rays4_any": _any_way(seen, list(gaps), _ray_key),
        "gaps_any": _any_way(gaps, list(gaps), _ray_key),
        "gaps_rays_any": (_turned(gaps, list(gaps), _ray_key) + _turned(seen, list(gaps), _ray_key_beside_gaps)).min(0),
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


def _ray_keys(first: int) -> Callable[[Step], int]:
    """A key for each of RAYS, from KEYS[first] on."""
    keys = dict(zip(RAYS.values(), KEYS[first : first + len(RAYS)].tolist(), strict=True))
    return lambda step: keys[step]


_ray_key, _ray_key_beside_gaps = _ray_keys(1000), _ray_keys(1004)


def _ray_distance(canvas: Canvas, step: Step) -> np.ndarray:
    """Steps to the first foreground cell in a direction, 99 where there is none."""
    colour, steps = (found[:, STAR.index(step)] for found in canvas.sights)
    return np.where(colour == OUTSIDE, 99, steps)


def line_planes(canvas: Canvas) -> Planes:
    """The cell's whole row and column."""
    x, fg = canvas.colour, canvas.foreground
    row_count, col_count = fg.sum(2, keepdims=True), fg.sum(1, keepdims=True)
    low_row, low_col = x.min(2, keepdims=True), x.min(1, keepdims=True)
    valued = np.where(canvas.inside, x, -1)
    flat_row, flat_col = valued.max(2, keepdims=True) == low_row, valued.max(1, keepdims=True) == low_col
    zero = np.zeros(canvas.shape, np.int64)
    last_row, last_col = canvas.heights[:, None, None] - 1, canvas.widths[:, None, None] - 1
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
    }


def object_planes(canvas: Canvas) -> Planes:
    """The region (4-connected, any colour), shape (8-connected, one colour) and cluster (8-connected) of a cell."""
    regions, shapes, clusters = canvas.regions, canvas.shapes, canvas.clusters
    down, right = shapes.offsets
    cluster_down, cluster_right = clusters.offsets
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
        "shape_holes": shapes.paint(hole_counts(canvas)),
        "shape_left_rank": shapes.paint(dense_rank(shapes.grid, shapes.left)),
        "shape_top_rank": shapes.paint(dense_rank(shapes.grid, shapes.top)),
        "shape_height": shapes.paint(shapes.height),
        "shape_width": shapes.paint(shapes.width),
        "shape_colour_twins": shapes.paint(shapes.twins(shapes.colour)),
        "grid_shapes": np.bincount(shapes.grid, minlength=len(canvas.grids))[:, None, None]
        + np.zeros_like(canvas.colour),
        "shape_offset": shapes.paint_cells(down * 32 + right),
        "cluster_size": clusters.paint(clusters.size),
        "cluster": clusters.paint(clusters.shape),
        "cluster_rank": clusters.paint(clusters.rank),
        "cluster_twins": clusters.paint(clusters.twins(clusters.shape)),
        "cluster_offset": clusters.paint_cells(cluster_down * 32 + cluster_right),
    }


def hole_counts(canvas: Canvas) -> np.ndarray:
    """How many enclosed background regions each shape has: a region belongs to the shape above its first cell."""
    regions, shapes = canvas.regions, canvas.shapes
    enclosed = (regions.colour == canvas.background[regions.grid]) & ~regions.touches
    above = shapes.labels.reshape(-1)[regions.first[enclosed] - canvas.shape[2]]
    return np.bincount(above, minlength=shapes.count)


def value_planes(canvas: Canvas) -> Planes:
    """Planes whose values are colours: candidates for what an output cell may show."""
    x, fg = canvas.colour, canvas.foreground
    clusters = canvas.clusters
    own = np.zeros((clusters.count, 11), np.int64)
    np.add.at(own, (clusters.of, x.reshape(-1)[clusters.cells]), 1)
    cell_colour = x.reshape(-1)[clusters.cells]
    others = own[clusters.of].copy()
    others[np.arange(len(cell_colour)), cell_colour] = 0
    grid, row, col = np.nonzero(fg)
    _, height, width = canvas.shape
    lines = {}
    for name, place, length, axis in (("row_top", row, height, 2), ("col_top", col, width, 1)):
        counts = tally(grid * length + place, x[fg], len(x) * length)
        top = np.where(counts.any(1), counts.argmax(1), MISSING).reshape(len(x), length)
        lines[name] = np.broadcast_to(np.expand_dims(top, axis), x.shape)
    return {
        "cluster_top": clusters.paint(own.argmax(1)),
        "cluster_low": clusters.paint(np.where(own > 0, own, 10**6).argmin(1)),
        "cluster_other": clusters.paint_cells(np.where(others.any(1), others.argmax(1), MISSING)),
        "region_rim": canvas.region_rim,
        "nearest_colour": _nearest_colour(canvas),
        **lines,
    }


def _nearest_colour(canvas: Canvas) -> np.ndarray:
    """Colour of the nearest foreground cell straight up, down, left or right (ties in this order)."""
    steps = [RAYS[n] for n in ("north", "south", "west", "east")]
    distance = np.stack([_ray_distance(canvas, step) for step in steps])
    colour = np.stack([canvas.sights[0][:, STAR.index(step)] for step in steps])
    return np.take_along_axis(colour, distance.argmin(0)[None], axis=0)[0]
