"""Families whose rule moves, repeats, cuts or recolours the grid as a whole."""

from __future__ import annotations

import math

import numpy as np

from arc.generate.drawing import between, blank, box_of, lopsided, mosaic, rectangles, shape, shifted
from arc.generate.family import AXES, DIRECTIONS, Family, Fixed, along, along_draw, directed, same
from arc.tasks import NUM_COLOURS, Grid

Rng = np.random.Generator


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


def _picture(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """All of the palette, more than half background, no symmetry."""
    grid = mosaic(rng, shape(rng, side), fixed.palette, 0.6)
    return grid if lopsided(grid) else None


def _small_picture(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """As `_picture`, with sides of at most half of what is allowed."""
    grid = mosaic(rng, shape(rng, side // 2, 2), fixed.palette, 0.4)
    return grid if lopsided(grid) else None


def _roles(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """All colours and all of the palette."""
    return mosaic(rng, shape(rng, side), fixed.colours + fixed.palette, 0.3)


def _sources(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """All of the palette, and none of the colours."""
    return mosaic(rng, shape(rng, side), fixed.palette, 0.3)


def _inlay(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """A small lopsided picture somewhere in an empty grid."""
    size = shape(rng, side, 4)
    grid = blank(size)
    height, width = (between(rng, 2, length - 1) for length in size)
    top, left = between(rng, 0, size[0] - height), between(rng, 0, size[1] - width)
    patch = mosaic(rng, (height, width), fixed.palette, 0.4)
    grid[top : top + height, left : left + width] = patch
    return grid if lopsided(patch) else None


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def _recolour(grid: Grid, fixed: Fixed) -> Grid:
    table = np.arange(NUM_COLOURS, dtype=np.uint8)
    table[list(fixed.palette)] = fixed.colours
    return table[grid]


def _swap(grid: Grid, fixed: Fixed) -> Grid:
    table = np.arange(NUM_COLOURS, dtype=np.uint8)
    table[list(fixed.palette)] = fixed.palette[::-1]
    return table[grid]


def _tally(grid: Grid) -> np.ndarray:
    """(10,) How often each colour is there; none of the background."""
    counts = np.bincount(grid.ravel(), minlength=NUM_COLOURS)
    counts[0] = 0
    return counts


def _full_mosaic(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """No background, and one colour more frequent than every other."""
    grid = mosaic(rng, shape(rng, side), fixed.palette, 0.0)
    counts = np.sort(_tally(grid))
    return grid if counts[-1] > counts[-2] else None


def _one_is_rare(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """All of the palette, one colour rarer than every other."""
    grid = mosaic(rng, shape(rng, side), fixed.palette, 0.4)
    counts = np.sort(_tally(grid)[list(fixed.palette)])
    return grid if counts[0] < counts[1] else None


def _rarest(grid: Grid, fixed: Fixed) -> Grid:
    counts = _tally(grid)
    return np.array([[min(np.flatnonzero(counts), key=lambda colour: counts[colour])]], dtype=np.uint8)


def _rows_with_majority(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """No background; in each row one colour has more than half of the cells."""
    height, width = shape(rng, side)
    palette = np.array(fixed.palette, dtype=np.uint8)
    grid = palette[rng.integers(len(palette), size=(height, width))]
    for row in range(height):
        few = between(rng, 1, (width - 1) // 2)
        grid[row, rng.permutation(width)[few:]] = palette[rng.integers(len(palette))]
    return grid


def _row_majority(grid: Grid, fixed: Fixed) -> Grid:
    winners = np.array([np.bincount(row).argmax() for row in grid], dtype=np.uint8)
    return np.repeat(winners[:, None], grid.shape[1], axis=1)


def _one_colour(rng: Rng, fixed: Fixed, side: int) -> Grid:
    return mosaic(rng, shape(rng, side), fixed.colours[:1], 0.35)


def _stripes(grid: Grid, fixed: Fixed) -> Grid:
    axis, first = fixed.variant
    output = grid.copy()
    lines = (output if axis == "down" else output.T)[first::2]
    lines[lines == fixed.colours[0]] = fixed.colours[1]
    return output


# ----------------------------------------------------------------------------------------------------------------------
# Moves and symmetries

_FLIPS = {
    "left-right": lambda grid: grid[:, ::-1],
    "up-down": lambda grid: grid[::-1],
    "diagonal": lambda grid: grid.T,
    "other diagonal": lambda grid: grid[::-1, ::-1].T,
}
_STEPS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}


def _shift(grid: Grid, fixed: Fixed) -> Grid:
    direction, distance = fixed.variant
    row, column = _STEPS[direction]
    return shifted(grid, distance * row, distance * column)


def _stays_in_sight(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    grid = _inlay(rng, fixed, side)
    return grid if grid is not None and _shift(grid, fixed).any() else None


def _four_busy_edges(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """A picture with something in each outer row and column, so that what leaves on one side is seen to come back."""
    grid = _picture(rng, fixed, side)
    if grid is None or not all(edge.any() for edge in (grid[0], grid[-1], grid[:, 0], grid[:, -1])):
        return None
    return grid


def _fall(grid: Grid, fixed: Fixed) -> Grid:
    return np.take_along_axis(grid, np.argsort(grid > 0, axis=1, kind="stable"), axis=1)


def _half_a_picture(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """The left or the right half of an even number of columns has a picture, the other is empty."""
    height, width = shape(rng, side)
    half = mosaic(rng, (height, max(width // 2, 2)), fixed.palette, 0.4)
    if not lopsided(half):
        return None
    halves = [half, np.zeros_like(half)]
    return np.hstack(halves[:: 1 if rng.integers(2) else -1])


def _complete(grid: Grid, fixed: Fixed) -> Grid:
    return np.where(grid == 0, grid[:, ::-1], grid)


def _mirrored_twice_with_a_patch(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """A picture that is symmetric both ways, a box of it painted over, not beyond both of its middle lines."""
    height, width = (between(rng, 2, side // 2) for _ in range(2))
    quarter = mosaic(rng, (height, width), fixed.palette, 0.15)
    grid = np.vstack([np.hstack([quarter, quarter[:, ::-1]]), np.hstack([quarter, quarter[:, ::-1]])[::-1]])
    patch_height, patch_width = between(rng, 1, min(height, 6)), between(rng, 1, min(width, 6))
    top, left = between(rng, 0, height - patch_height), between(rng, 0, 2 * width - patch_width)
    grid[top : top + patch_height, left : left + patch_width] = fixed.colours[0]
    return np.rot90(grid, int(rng.integers(4))) if lopsided(quarter) else None


def _repair(grid: Grid, fixed: Fixed) -> Grid:
    left = np.where(grid == fixed.colours[0], 0, grid)
    return np.maximum.reduce([left, left[::-1], left[:, ::-1], left[::-1, ::-1]])


# ----------------------------------------------------------------------------------------------------------------------
# Sizes: crops, repeats, scales


def _enlarge(grid: Grid, down: int, across: int) -> Grid:
    return grid.repeat(down, axis=0).repeat(across, axis=1)


def _even_picture(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """All of the palette, both sides even."""
    height, width = shape(rng, side // 2, 2)
    return mosaic(rng, (2 * height, 2 * width), fixed.palette, 0.3)


def _enlarged(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    grid = _small_picture(rng, fixed, side)
    return None if grid is None else _enlarge(grid, 2, 2)


def _seed_of_fractal(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Some of the palette and some background: which colours are there says nothing about the rule."""
    colours = rng.permutation(fixed.palette)[: between(rng, 1, len(fixed.palette))].tolist()
    grid = mosaic(rng, shape(rng, min(math.isqrt(side), 3), 2), colours, 0.4)
    return grid if (grid == 0).any() else None


def _fractal(grid: Grid, fixed: Fixed) -> Grid:
    return np.kron(grid > 0, grid).astype(np.uint8)


def _room_for_a_frame(rng: Rng, fixed: Fixed, side: int) -> Grid:
    return mosaic(rng, shape(rng, side - 2, 2), fixed.palette, 0.4)


def _pad(grid: Grid, fixed: Fixed) -> Grid:
    return np.pad(grid, 1, constant_values=fixed.colours[0])


def _two_shapes(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """A shape of each of the two colours; neither fills its box, and the boxes do not touch."""
    size = shape(rng, side, 5)
    boxes = rectangles(rng, size, 2, 2, max(3, side // 2))
    if len(boxes) < 2:
        return None
    grid = blank(size)
    for box, colour in zip(boxes, fixed.colours, strict=True):
        part = mosaic(rng, grid[box].shape, (colour,), 0.35)
        if grid[box].shape != part[box_of(part > 0)].shape:
            return None
        grid[box] = part
    return grid


def _framed_picture(rng: Rng, fixed: Fixed, side: int) -> Grid:
    """A frame with a mosaic in it; the same colours lie around it here and there."""
    size = shape(rng, side, 4)
    height, width = (between(rng, 4, length) for length in size)
    top, left = between(rng, 0, size[0] - height), between(rng, 0, size[1] - width)
    grid = mosaic(rng, size, fixed.palette, 0.8)
    grid[top : top + height, left : left + width] = fixed.colours[0]
    grid[top + 1 : top + height - 1, left + 1 : left + width - 1] = mosaic(
        rng, (height - 2, width - 2), fixed.palette, 0.4
    )
    return grid


def _inside(grid: Grid, fixed: Fixed) -> Grid:
    frame = grid == fixed.colours[0]
    return grid[box_of(frame)][1:-1, 1:-1] if frame.any() else grid


def _begun_pattern(rng: Rng, fixed: Fixed, side: int) -> Grid | None:
    """Columns of a period of 2 or 3, shown at least twice, and then background."""
    height, width = shape(rng, side, 3)[0], between(rng, 5, side)
    period = between(rng, 2, min((width - 1) // 2, 3))
    shown = between(rng, 2 * period, width - 1)
    motif = mosaic(rng, (height, period), fixed.palette, 0.0)
    if any(same(motif[:, :1], motif[:, i : i + 1]) for i in range(1, period)):
        return None
    grid = motif[:, np.arange(width) % period]
    grid[:, shown:] = 0
    return grid


def _go_on(grid: Grid, fixed: Fixed) -> Grid:
    shown = int((grid > 0).any(0).sum())
    period = next((p for p in range(1, shown) if same(grid[:, p:shown], grid[:, : shown - p])), shown)
    return grid[:, np.arange(grid.shape[1]) % period]


# ----------------------------------------------------------------------------------------------------------------------

FAMILIES = (
    Family("recolour", "Each of three colours becomes another colour.", _sources, _recolour, colours=3, palette=3),
    Family("flip", "The grid is mirrored.", _picture, lambda g, f: _FLIPS[f.variant](g), 0, 3, tuple(_FLIPS)),
    Family(
        "shift",
        "Everything moves one or two steps in one direction; what leaves the grid is lost.",
        _stays_in_sight,
        _shift,
        palette=2,
        variants=tuple((direction, distance) for direction in DIRECTIONS for distance in (1, 2)),
    ),
    Family("gravity", "Every cell falls to one side.", _picture, directed(_fall), palette=2, variants=DIRECTIONS),
    Family("crop", "The output is the box around all that is drawn.", _inlay, lambda g, f: g[box_of(g > 0)], palette=3),
    Family("enlarge", "Each cell becomes 2 by 2 cells.", _small_picture, lambda g, f: _enlarge(g, 2, 2), palette=3),
    Family(
        "tile",
        "The grid is repeated: beside it, below it, or both.",
        _small_picture,
        lambda g, f: np.tile(g, f.variant),
        palette=2,
        variants=((1, 2), (2, 1), (2, 2)),
    ),
    Family(
        "commonest",
        "The whole grid gets its commonest colour.",
        _full_mosaic,
        lambda g, f: np.full_like(g, _tally(g).argmax()),
        palette=3,
    ),
    Family(
        "mirror",
        "The empty half becomes the mirror image of the other half.",
        along_draw(_half_a_picture),
        along(_complete),
        palette=3,
        variants=AXES,
    ),
    Family("rotate", "The grid is turned.", _picture, lambda g, f: np.rot90(g, f.variant), 0, 3, (1, 2, 3)),
    Family("swap", "Two colours change places, a third stays.", _roles, _swap, colours=1, palette=2),
    Family(
        "roll",
        "Everything moves one step in one direction and comes back on the other side.",
        _four_busy_edges,
        directed(lambda g, f: np.roll(g, 1, axis=1)),
        palette=2,
        variants=DIRECTIONS,
    ),
    Family("pad", "The grid gets a frame around it.", _room_for_a_frame, _pad, colours=1, palette=2),
    Family(
        "half",
        "One half of the grid is left: the left, right, upper or lower one.",
        _even_picture,
        directed(lambda g, f: g[:, (g.shape[1] + 1) // 2 :]),
        palette=3,
        variants=DIRECTIONS,
    ),
    Family(
        "crop_colour",
        "The output is the box around one colour.",
        _two_shapes,
        lambda g, f: g[box_of(g == f.colours[0])],
        colours=2,
    ),
    Family("inside", "The output is what the frame has in it.", _framed_picture, _inside, colours=1, palette=2),
    Family(
        "stretch",
        "Each cell becomes two cells: beside one another, or one above the other.",
        _small_picture,
        along(lambda g, f: _enlarge(g, 1, 2)),
        palette=3,
        variants=AXES,
    ),
    Family(
        "mirror_tile",
        "The grid gets its mirror image beside it, on one side.",
        _small_picture,
        directed(lambda g, f: np.hstack([g, g[:, ::-1]])),
        palette=3,
        variants=DIRECTIONS,
    ),
    Family("shrink", "Each 2 by 2 cells become one.", _enlarged, lambda g, f: g[::2, ::2], palette=3),
    Family(
        "fractal",
        "Each coloured cell becomes a copy of the whole grid, each empty one stays empty.",
        _seed_of_fractal,
        _fractal,
        palette=3,
    ),
    Family(
        "continue",
        "The pattern goes on to the end of the grid.",
        along_draw(_begun_pattern),
        along(_go_on),
        palette=3,
        variants=AXES,
    ),
    Family(
        "stripes",
        "In every second column (or row) the colour changes.",
        _one_colour,
        _stripes,
        colours=2,
        variants=tuple((axis, first) for axis in AXES for first in (0, 1)),
    ),
    Family(
        "row_majority",
        "Each row (or column) gets its commonest colour.",
        along_draw(_rows_with_majority),
        along(_row_majority),
        palette=3,
        variants=AXES,
    ),
    Family(
        "repair",
        "The painted-over box gets back what the symmetry of the picture says.",
        _mirrored_twice_with_a_patch,
        _repair,
        colours=1,
        palette=3,
    ),
    Family("rarest", "The output is one cell of the rarest colour.", _one_is_rare, _rarest, palette=3),
)
