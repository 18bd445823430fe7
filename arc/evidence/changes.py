"""Changes: transforms of a whole grid, such as turning, tiling, growing, joining, falling, restoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from arc.evidence.canvas import OUTSIDE, Objects, Step, tally
from arc.evidence.drawing import DRAWINGS
from arc.evidence.moves import drop, front, wall
from arc.evidence.restore import MASKS, mirrored, repeated
from arc.evidence.scene import (
    Cells,
    Grid,
    Keeping,
    Scene,
    Shape,
    Transform,
    extent,
    flip_cols,
    flip_rows,
    half_turn,
    inside,
    merge_runs,
    over_background,
    over_foreground,
)


def _beside(*turns: Callable[[Grid], Grid], rows: int) -> Callable[[Grid], Grid]:
    """Copies of the grid, each transformed, laid out in `rows` rows."""

    def change(grid: Grid) -> Grid:
        copies = [turn(grid) for turn in turns]
        per_row = len(copies) // rows
        return np.concatenate(
            [np.concatenate(copies[k * per_row : (k + 1) * per_row], axis=1) for k in range(rows)], axis=0
        )

    return change


def _same(grid: Grid) -> Grid:
    return grid


def _square_only(change: Callable[[Grid], Grid]) -> Callable[[Grid], Grid | None]:
    return lambda grid: change(grid) if grid.shape[0] == grid.shape[1] else None


def _enlarged(rows: int, cols: int) -> Callable[[Grid], Grid]:
    return lambda grid: np.repeat(np.repeat(grid, rows, 0), cols, 1)


def _enlarged_by(counter: Callable[[Scene], int]) -> Transform:
    def change(scene: Scene) -> Grid | None:
        n = counter(scene)
        return _enlarged(n, n)(scene.grid) if 1 < n and n * max(scene.grid.shape) <= 30 else None

    return change


def _shrunk(scene: Scene) -> Grid | None:
    """Every k-th row and column, for the largest k whose k x k blocks are all uniform."""
    height, width = scene.grid.shape
    for k in range(min(height, width), 1, -1):
        if height % k == 0 and width % k == 0:
            small = scene.grid[::k, ::k]
            if (np.repeat(np.repeat(small, k, 0), k, 1) == scene.grid).all():
                return small
    return None


def _fractal(mask: Callable[[Scene], np.ndarray]) -> Transform:
    """A copy of the grid in the place of every cell of the mask, background elsewhere."""

    def change(scene: Scene) -> Grid | None:
        height, width = scene.grid.shape
        if max(height, width) > 5:
            return None
        cells = np.repeat(np.repeat(mask(scene), height, 0), width, 1)
        return np.where(cells, np.tile(scene.grid, (height, width)), scene.background).astype(np.uint8)

    return change


def _fall(axis: int, forward: bool) -> Transform:
    """Every foreground cell falls to the end of its row or column; order is kept."""

    def change(scene: Scene) -> Grid:
        order = np.argsort(scene.foreground if forward else ~scene.foreground, axis=axis, kind="stable")
        return np.take_along_axis(scene.grid, order, axis=axis)

    return change


def _merged_with(*mirrors: Callable[[Grid], Grid]) -> Transform:
    """Background cells filled from mirror images of the grid."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        result = scene.grid
        for mirror in mirrors:
            image = mirror(scene.grid)
            if image.shape != result.shape:
                return None
            result = np.where(result == scene.background, image, result)
        return result

    return change


def _box_mirrored(*mirrors: Callable[[Grid], Grid]) -> Transform:
    """The same inside the foreground's bounding box."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        area = extent(scene.foreground)
        if area is None:
            return None
        box, result = scene.grid[area], scene.grid.copy()
        for mirror in mirrors:
            image = mirror(box)
            if image.shape != box.shape:
                return None
            result[area] = np.where(result[area] == scene.background, image, result[area])
        return result

    return change


def _keep_objects(kind: str, keep: Callable[[Objects], np.ndarray]) -> Transform:
    """Only the objects for which `keep` holds stay."""

    @over_foreground
    def change(scene: Scene) -> Grid | None:
        objects: Objects = getattr(scene.canvas, kind)
        if not objects.count:
            return None
        kept = keep(objects)
        if kept.all():
            return None
        plane = objects.paint(kept.astype(np.int64), 0)[0]
        return np.where(plane == 1, scene.grid, scene.background).astype(np.uint8)

    return change


def _best(key: Callable[[Objects], np.ndarray]) -> Callable[[Objects], np.ndarray]:
    return lambda objects: key(objects) == key(objects).max()


def _keep_colour(rank: int) -> Transform:
    @over_foreground
    def change(scene: Scene) -> Grid | None:
        if len(scene.colours) < 2:
            return None
        return np.where(scene.grid == scene.colours[rank], scene.grid, scene.background).astype(np.uint8)

    return change


def _drop_colour(rank: int) -> Transform:
    @over_foreground
    def change(scene: Scene) -> Grid | None:
        if len(scene.colours) < 2:
            return None
        return np.where(scene.grid == scene.colours[rank], scene.background, scene.grid).astype(np.uint8)

    return change


def _joined(*lines_of_sight: Step) -> Transform:
    """Background between two cells of one colour that see each other along a line takes their colour."""

    @over_background
    def change(scene: Scene) -> Grid:
        result = scene.grid.copy()
        for step in lines_of_sight:
            colour = scene.between[step]
            np.copyto(result, colour, where=(result == scene.background) & (colour != OUTSIDE))
        return result

    return change


@over_background
def _joined_far(scene: Scene) -> Grid:
    """Background between the first and the last cell of a colour in a row or column takes that colour."""
    colours = np.array(scene.colours, np.uint8)
    masks, result = scene.grid == colours[:, None, None], scene.grid.copy()
    after = [np.logical_or.accumulate(masks, axis) for axis in (1, 2)]
    before = [np.flip(np.logical_or.accumulate(np.flip(masks, axis), axis), axis) for axis in (1, 2)]
    for colour, between in zip(colours, (after[0] & before[0]) | (after[1] & before[1]), strict=True):
        np.copyto(result, colour, where=between & (result == scene.background))
    return result


def _extended(*steps: Step) -> Transform:
    """Every foreground cell drawn on, straight, until the next foreground cell or the border."""

    @over_background
    def change(scene: Scene) -> Grid:
        result = scene.grid.copy()
        for dr, dc in steps:
            origin = scene.rays[-dr, -dc]
            np.copyto(result, origin, where=(result == scene.background) & (origin != OUTSIDE))
        return result

    return change


@over_background
def _filled(scene: Scene) -> Grid | None:
    """Enclosed background takes the colour around it."""
    regions = scene.canvas.regions
    inner = (regions.colour == scene.background) & ~regions.touches
    if not inner.any():
        return None
    plane = scene.canvas.region_rim[0]
    return np.where(regions.paint(inner.astype(np.int64), 0)[0] == 1, plane, scene.grid).astype(np.uint8)


@over_background
def _box_filled(scene: Scene) -> Grid | None:
    """Every object's bounding box filled with its colour."""
    shapes = scene.canvas.shapes
    if not shapes.count:
        return None
    result = scene.grid.copy()
    colours = shapes.colour.tolist()
    for index in np.argsort(-shapes.size, kind="stable").tolist():
        box = result[shapes.area(index)]
        box[box == scene.background] = colours[index]
    return result


def _objects_mirrored(kind: str, mirror: Callable[[Grid], Grid]) -> Transform:
    """Every object mirrored inside its own bounding box."""

    def change(scene: Scene) -> Grid | None:
        objects: Objects = getattr(scene.canvas, kind)
        if not objects.count:
            return None
        result = scene.grid.copy()
        for area in map(objects.area, range(objects.count)):
            result[area] = mirror(scene.grid[area])
        return result

    return change


def _swapped(scene: Scene) -> Grid | None:
    """Two colours exchanged, where the grid has exactly two."""
    colours = np.unique(scene.grid)
    if len(colours) != 2:
        return None
    return np.where(scene.grid == colours[0], colours[1], colours[0]).astype(np.uint8)


def _framed(scene: Scene) -> Grid | None:
    """One more ring of cells around the grid, in the commonest foreground colour."""
    return np.pad(scene.grid, 1, constant_values=scene.colours[0]) if scene.colours else None


def _falling_objects(dr: int, dc: int) -> Transform:
    """Every one-coloured object moves as a whole until the border or another object stops it."""

    def change(scene: Scene) -> Grid | None:
        shapes = scene.canvas.shapes
        if not 0 < shapes.count <= 12:
            return None
        result = np.full_like(scene.grid, scene.background)
        drop(result, scene, front(shapes, (dr, dc)), (dr, dc), wall(scene))  # the foremost first: none is in its way
        return result

    return change


def _line_majority(scene: Scene) -> Grid | None:
    """Every row (or every column, whichever is purer) in its commonest colour."""
    best: tuple[int, Grid] | None = None
    for view, turned in ((scene.grid, False), (scene.grid.T, True)):
        counts = tally(np.arange(len(view)).repeat(view.shape[1]), view.reshape(-1), len(view))
        fit = int(counts.max(1).sum())
        if best is None or fit > best[0]:
            stripes = np.repeat(counts.argmax(1)[:, None], view.shape[1], 1).astype(np.uint8)
            best = fit, stripes.T if turned else stripes
    return None if best is None else best[1]


def _outlined(diagonal: bool) -> Transform:
    """Background next to foreground takes its colour (of several: the upper, left, right, lower, then diagonal one)."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        height, width = scene.grid.shape
        padded = np.full((height + 2, width + 2), scene.background, np.uint8)
        padded[1:-1, 1:-1] = scene.grid
        result = scene.grid.copy()
        steps = [(0, 1), (1, 0), (1, 2), (2, 1)] + ([(0, 0), (0, 2), (2, 0), (2, 2)] if diagonal else [])
        for r, c in steps:
            near = padded[r : r + height, c : c + width]
            result = np.where(result == scene.background, near, result)
        return result

    return change


def _shapes_by(key: Callable[[Objects], np.ndarray]) -> Transform:
    """Every object painted with a small number (1, 2, 3, ...) that tells its rank; colours come from the colour map."""

    @over_foreground
    def change(scene: Scene) -> Grid | None:
        shapes = scene.canvas.shapes
        if shapes.count < 2:
            return None
        value = np.minimum(key(shapes), 8) + 1
        return shapes.paint(value, 0)[0].astype(np.uint8)

    return change


def _sorted_lines(axis: int) -> Transform:
    """Rows (or columns) sorted by number of foreground cells."""

    def change(scene: Scene) -> Grid:
        order = np.argsort(scene.foreground.sum(1 - axis), kind="stable")
        return np.take(scene.grid, order, axis=axis)

    return change


def _of_grid(change: Callable[[Grid], Grid | None]) -> Transform:
    return lambda scene: change(scene.grid)


Reach = Callable[[Shape, Shape], bool]


def _keeps(before: Shape, after: Shape) -> bool:
    return before == after


def _turns(before: Shape, after: Shape) -> bool:
    return before == after[::-1]


def _shrinks(before: Shape, after: Shape) -> bool:
    return after[0] <= before[0] and after[1] <= before[1]


def _squares(before: Shape, after: Shape) -> bool:
    return (before[0] ** 2, before[1] ** 2) == after


def _adds(margin: int) -> Reach:
    return lambda before, after: (before[0] + margin, before[1] + margin) == after


def _grows(rows: int, cols: int) -> Reach:
    return lambda before, after: (before[0] * rows, before[1] * cols) == after


def _multiplies(before: Shape, after: Shape) -> bool:
    return before[0] * after[1] == before[1] * after[0] and after[0] > before[0]


@dataclass(frozen=True)
class Change:
    """A transform of a whole grid.

    may: whether a grid of one shape (the first) can become one of another (the second).
    on_parts: whether programs try it on every cut of a grid; else on the whole grid only.
    adds_colours: whether the result can have a colour that the grid does not have.
    """

    apply: Transform
    may: Reach
    on_parts: bool = True
    adds_colours: bool = False

    @property
    def keeps(self) -> Cells | None:
        """Which cells come out as they were, if the change says so (`Keeping`)."""
        return self.apply.cells if isinstance(self.apply, Keeping) else None


def _turn_left(grid: Grid) -> Grid:
    return grid.T[::-1]


def _turn_right(grid: Grid) -> Grid:
    return grid[::-1].T


_MIRRORS_AND_COPIES: dict[str, tuple[Callable[[Grid], Grid | None], Reach]] = {
    "flip_cols": (flip_cols, _keeps),
    "flip_rows": (flip_rows, _keeps),
    "half_turn": (half_turn, _keeps),
    "transpose": (lambda g: g.T, _turns),
    "anti_transpose": (lambda g: g[::-1, ::-1].T, _turns),
    "turn_left": (_turn_left, _turns),
    "turn_right": (_turn_right, _turns),
    "twice_across": (_beside(_same, _same, rows=1), _grows(1, 2)),
    "twice_down": (_beside(_same, _same, rows=2), _grows(2, 1)),
    "thrice_across": (_beside(_same, _same, _same, rows=1), _grows(1, 3)),
    "thrice_down": (_beside(_same, _same, _same, rows=3), _grows(3, 1)),
    "two_by_two": (_beside(_same, _same, _same, _same, rows=2), _grows(2, 2)),
    "three_by_three": (_beside(*[_same] * 9, rows=3), _grows(3, 3)),
    "mirror_right": (_beside(_same, flip_cols, rows=1), _grows(1, 2)),
    "mirror_left": (_beside(flip_cols, _same, rows=1), _grows(1, 2)),
    "mirror_down": (_beside(_same, flip_rows, rows=2), _grows(2, 1)),
    "mirror_up": (_beside(flip_rows, _same, rows=2), _grows(2, 1)),
    "half_turn_right": (_beside(_same, half_turn, rows=1), _grows(1, 2)),
    "half_turn_down": (_beside(_same, half_turn, rows=2), _grows(2, 1)),
    "four_mirrors": (_beside(_same, flip_cols, flip_rows, half_turn, rows=2), _grows(2, 2)),
    "four_mirrors_in": (_beside(half_turn, flip_rows, flip_cols, _same, rows=2), _grows(2, 2)),
    "four_turns": (_square_only(_beside(_same, _turn_right, _turn_left, half_turn, rows=2)), _grows(2, 2)),
    "four_turns_left": (_square_only(_beside(_same, _turn_left, _turn_right, half_turn, rows=2)), _grows(2, 2)),
    "four_turns_half": (_square_only(_beside(_same, _turn_left, half_turn, _turn_right, rows=2)), _grows(2, 2)),
    "double": (_enlarged(2, 2), _grows(2, 2)),
    "triple": (_enlarged(3, 3), _grows(3, 3)),
    "quadruple": (_enlarged(4, 4), _grows(4, 4)),
    "double_across": (_enlarged(1, 2), _grows(1, 2)),
    "double_down": (_enlarged(2, 1), _grows(2, 1)),
}
_RESHAPING: dict[str, Change] = {
    "runs": Change(lambda s: merge_runs(s.grid), _shrinks),
    "foreground_box": Change(lambda s: s.foreground_box, _shrinks),
    "inside": Change(lambda s: inside(s.grid), _adds(-2)),
    "shrunk": Change(_shrunk, _shrinks),
    "enlarged_by_colours": Change(_enlarged_by(lambda s: len(s.colours)), _multiplies),
    "enlarged_by_cells": Change(_enlarged_by(lambda s: int(s.foreground.sum())), _multiplies),
    "fractal": Change(_fractal(lambda s: s.foreground), _squares),
    "fractal_inverse": Change(_fractal(lambda s: ~s.foreground), _squares),
    "fractal_top": Change(_fractal(lambda s: s.grid == (s.colours[0] if s.colours else -1)), _squares),
    "fractal_low": Change(_fractal(lambda s: s.grid == (s.colours[-1] if s.colours else -1)), _squares),
    "framed": Change(_framed, _adds(2)),
}
_ON_THE_SPOT: dict[str, Transform] = {
    "swapped": _swapped,
    "lines_majority": _line_majority,
    "grown": _outlined(False),
    "grown_diagonal": _outlined(True),
    "objects_down": _falling_objects(1, 0),
    "objects_up": _falling_objects(-1, 0),
    "objects_right": _falling_objects(0, 1),
    "objects_left": _falling_objects(0, -1),
    "numbered_by_size": _shapes_by(lambda o: o.rank),
    "numbered_by_size_up": _shapes_by(lambda o: o.rank_up),
    "joined_star": _joined((0, 1), (1, 0), (1, 1), (1, -1)),
    "fall_down": _fall(0, True),
    "fall_up": _fall(0, False),
    "fall_right": _fall(1, True),
    "fall_left": _fall(1, False),
    "sorted_rows": _sorted_lines(0),
    "sorted_cols": _sorted_lines(1),
    "sides_merged": _merged_with(flip_cols),
    "ends_merged": _merged_with(flip_rows),
    "mirrors_merged": _merged_with(flip_cols, flip_rows, half_turn),
    "transpose_merged": _merged_with(lambda g: g.T),
    "turns_merged": _merged_with(_turn_left, _turn_right, half_turn),
    "box_sides_merged": _box_mirrored(flip_cols),
    "box_ends_merged": _box_mirrored(flip_rows),
    "box_mirrors_merged": _box_mirrored(flip_cols, flip_rows, half_turn),
    "box_turns_merged": _box_mirrored(_turn_left, _turn_right, half_turn),
    "filled": _filled,
    "boxes_filled": _box_filled,
    "joined_rows": _joined((0, 1)),
    "joined_cols": _joined((1, 0)),
    "joined": _joined((0, 1), (1, 0)),
    "joined_far": _joined_far,
    "joined_diagonal": _joined((1, 1), (1, -1)),
    "extended_rows": _extended((0, 1), (0, -1)),
    "extended_cols": _extended((1, 0), (-1, 0)),
    "extended": _extended((0, 1), (0, -1), (1, 0), (-1, 0)),
    "extended_down": _extended((1, 0)),
    "extended_up": _extended((-1, 0)),
    "extended_right": _extended((0, 1)),
    "extended_left": _extended((0, -1)),
    "extended_diagonal": _extended((1, 1), (-1, -1), (1, -1), (-1, 1)),
    "shapes_flipped_cols": _objects_mirrored("shapes", flip_cols),
    "shapes_flipped_rows": _objects_mirrored("shapes", flip_rows),
    "clusters_flipped_cols": _objects_mirrored("clusters", flip_cols),
    "clusters_flipped_rows": _objects_mirrored("clusters", flip_rows),
    "without_dots": _keep_objects("shapes", lambda o: o.size > 1),
    "dots": _keep_objects("shapes", lambda o: o.size == 1),
    "largest_shape": _keep_objects("shapes", _best(lambda o: o.size)),
    "largest_cluster": _keep_objects("clusters", _best(lambda o: o.size)),
    "smallest_shape": _keep_objects("shapes", _best(lambda o: -o.size)),
    "odd_shape": _keep_objects("shapes", _best(lambda o: -o.twin_count)),
    "inner_shapes": _keep_objects("shapes", lambda o: ~o.touches),
    "outer_shapes": _keep_objects("shapes", lambda o: o.touches),
}


def _same_shape() -> dict[str, Transform]:
    """Changes that keep the grid's shape, drawings aside."""
    changes = dict(_ON_THE_SPOT)
    for name, mask in MASKS.items():
        changes[f"repeated_{name}"] = repeated(mask)
        changes[f"mirrored_{name}"] = mirrored(mask)
    for rank in (0, 1, -1):
        changes[f"keep_colour_{rank}"] = _keep_colour(rank)
        changes[f"drop_colour_{rank}"] = _drop_colour(rank)
    return changes


def _changes() -> dict[str, Change]:
    changes = {name: Change(_of_grid(change), may) for name, (change, may) in _MIRRORS_AND_COPIES.items()}
    changes |= _RESHAPING
    for name, change in _same_shape().items():
        changes[name] = Change(change, _keeps, adds_colours=name.startswith("numbered_"))
    return changes | {
        name: Change(change, _keeps, on_parts=False, adds_colours=True) for name, change in DRAWINGS.items()
    }


CHANGES = _changes()
SAME_SHAPE = (*_same_shape(), *DRAWINGS)  # those that draw on the grid and keep its shape
