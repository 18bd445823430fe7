"""Objects that move as a whole: each a mask of bits, so that a step is a shift and a collision one `and`.

The cell (row, column) of a grid (H, W) is bit (row + 1) * (W + 1) + column: every row ends with a bit of wall, and
there is a row of wall above and below, so that a step over any border meets a wall.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arc.evidence.canvas import Objects, Step
from arc.evidence.scene import Grid, Scene, once


@once
def shape_masks(scene: Scene) -> list[int]:
    """The mask of each one-coloured object."""
    shapes, stride = scene.canvas.shapes, scene.grid.shape[1] + 1
    masks = [0] * shapes.count
    for index, bit in zip(shapes.of.tolist(), ((shapes.row + 1) * stride + shapes.col).tolist(), strict=True):
        masks[index] |= 1 << bit
    return masks


@once
def wall(scene: Scene) -> int:
    """The mask of all that lies around the grid."""
    height, width = scene.grid.shape
    line = (1 << width) - 1
    inside = sum(line << ((row + 1) * (width + 1)) for row in range(height))
    return ((1 << (height + 2) * (width + 1)) - 1) ^ inside


def moved(scene: Scene, mask: int, step: Step) -> int:
    """A mask one step on; a part of it may then lie on the wall."""
    shift = step[0] * (scene.grid.shape[1] + 1) + step[1]
    return mask << shift if shift > 0 else mask >> -shift


def slide(scene: Scene, mask: int, step: Step, blocked: int) -> tuple[int, int]:
    """How many steps a mask can take before it meets a blocked bit (among them the wall), and where it then is."""
    steps = 0
    while not (further := moved(scene, mask, step)) & blocked:
        mask, steps = further, steps + 1
    return steps, mask


def front(objects: Objects, step: Step) -> list[int]:
    """Objects, the foremost in the direction of a step first (ties: in reading order)."""
    (dr, dc) = step
    reach = objects.bottom if dr > 0 else -objects.top if dr < 0 else objects.right if dc > 0 else -objects.left
    return np.argsort(-reach, kind="stable").tolist()


def drop(result: Grid, scene: Scene, order: Sequence[int], step: Step, blocked: int) -> None:
    """The one-coloured objects of `order` drawn into `result`, each after the other as far on along a step as neither
    `blocked` bits nor those before it are in its way."""
    masks, steps = shape_masks(scene), np.zeros(scene.canvas.shapes.count, np.int64)
    for index in order:
        steps[index], mask = slide(scene, masks[index], step, blocked)
        blocked |= mask
    draw_moved(result, scene.canvas.shapes, order, step[0] * steps, step[1] * steps)


def draw_moved(result: Grid, objects: Objects, order: Sequence[int], down: np.ndarray, right: np.ndarray) -> None:
    """Draws the objects of `order` into `result`, later over earlier ones, each moved `down` and `right` (objects,)."""
    turn = np.full(objects.count, -1)
    turn[list(order)] = np.arange(len(order))
    turns = turn[objects.of]
    cells = np.argsort(turns, kind="stable")[np.count_nonzero(turns < 0) :]
    of = objects.of[cells]
    result[objects.row[cells] + down[of], objects.col[cells] + right[of]] = objects.colour[of]
