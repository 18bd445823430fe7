"""More changes of a whole grid: rays and lines of chosen cells, symmetry about a pivot, moves to an anchor, stamps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from arc.evidence.canvas import CROSS, DIAGONALS, DOWN, LEFT, RIGHT, STAR, UP, Objects, Step, look, shifted
from arc.evidence.moves import draw_moved, drop, front, moved, shape_masks, slide, wall
from arc.evidence.scene import (
    Grid,
    Scene,
    Transform,
    extent,
    flip_cols,
    flip_rows,
    half_turn,
    once,
    over_background,
    over_foreground,
    spans,
)

Mask = np.ndarray
Place = tuple[np.ndarray, np.ndarray]  # rows and columns
Choice = Callable[[Scene], "Mask | None"]
NOTHING, BLOCKED = 255, 254  # no colours

DIRECTIONS: dict[str, tuple[Step, ...]] = {"cross": CROSS, "diagonals": DIAGONALS, "star": STAR}


# ----------------------------------------------------------------------------------------------------------------
# Which cells: a choice is a mask over the grid, None where it would be empty or everything
# ----------------------------------------------------------------------------------------------------------------
def of_colour(rank: int) -> Choice:
    """Cells of the foreground colour of a rank (0 the commonest, -1 the rarest of at least two)."""

    def choice(scene: Scene) -> Mask | None:
        return scene.grid == scene.colours[rank] if len(scene.colours) > 1 else None

    return choice


def of_shapes(keep: Callable[[Objects], np.ndarray]) -> Choice:
    """Cells of the one-coloured objects for which `keep` holds."""

    @once
    def choice(scene: Scene) -> Mask | None:
        shapes = scene.canvas.shapes
        if not shapes.count:
            return None
        kept = keep(shapes)
        if kept.all() or not kept.any():
            return None
        return shapes.paint(kept.astype(np.int64), 0)[0] == 1

    return choice


CHOICES: dict[str, Choice] = {
    "rare": of_colour(-1),
    "top": of_colour(0),
    "dots": of_shapes(lambda o: o.size == 1),
    "largest": of_shapes(lambda o: o.size == o.size.max()),
}


# ----------------------------------------------------------------------------------------------------------------
# Rays and lines
# ----------------------------------------------------------------------------------------------------------------
def _met(choice: Choice, through: bool) -> Callable[[Scene], dict[Step, np.ndarray] | None]:
    """The colour of the first chosen cell met in each direction of STAR, BLOCKED behind another foreground cell,
    NOTHING where there is none: uint8; with `through` in those of CROSS, whatever else lies before it."""

    @once
    def met(scene: Scene) -> dict[Step, np.ndarray] | None:
        chosen = choice(scene)
        if chosen is None:
            return None
        if not through:
            return scene.met(np.where(chosen, scene.grid, np.uint8(BLOCKED)), NOTHING)
        colours, _ = look(np.where(chosen, scene.grid, np.uint8(NOTHING)), NOTHING, CROSS)
        return dict(zip(CROSS, colours, strict=True))

    return met


def rays(met: Callable[[Scene], dict[Step, np.ndarray] | None], steps: tuple[Step, ...]) -> Transform:
    """Chosen cells drawn on, straight, over the background, as far as they are met (`_met`)."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        origins = met(scene)
        if origins is None:
            return None
        result = scene.grid.copy()
        for dr, dc in steps:
            origin = origins[-dr, -dc]
            np.copyto(result, origin, where=(result == scene.background) & (origin < BLOCKED))
        return result

    return change


def grown(choice: Choice, steps: tuple[Step, ...]) -> Transform:
    """The background next to chosen cells takes their colour."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        chosen = choice(scene)
        if chosen is None:
            return None
        values = np.where(chosen, scene.grid, np.uint8(NOTHING))
        result = scene.grid.copy()
        for dr, dc in steps:
            near = shifted(values, -dr, -dc, NOTHING)
            np.copyto(result, near, where=(result == scene.background) & (near != NOTHING))
        return result

    return change


def linked_to(choice: Choice) -> Transform:
    """Background between a chosen cell and another foreground cell that see each other takes the latter's colour."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        chosen = choice(scene)
        if chosen is None:
            return None
        met = scene.met(np.where(chosen, np.uint8(BLOCKED), scene.grid), NOTHING)
        result = scene.grid.copy()
        for dr, dc in CROSS:
            colour, anchor = met[-dr, -dc], met[dr, dc]
            np.copyto(result, colour, where=~scene.foreground & (anchor == BLOCKED) & (colour < BLOCKED))
        return result

    return change


def elbow(rows_first: bool) -> Transform:
    """From the upper of two dots to the other, along a row and a column, in a colour that the grid does not have."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        row, col = np.nonzero(scene.foreground)
        if len(row) != 2:
            return None
        (r0, r1), (c0, c1) = row.tolist(), col.tolist()
        turn_row, turn_col = (r0, c1) if rows_first else (r1, c0)
        spare = next(c for c in range(9, -1, -1) if c not in (scene.background, *scene.colours))
        result = scene.grid.copy()
        result[turn_row, min(c0, c1) : max(c0, c1) + 1] = spare
        result[min(r0, r1) : max(r0, r1) + 1, turn_col] = spare
        result[row, col] = scene.grid[row, col]
        return result

    return change


# ----------------------------------------------------------------------------------------------------------------
# Symmetry about a pivot
# ----------------------------------------------------------------------------------------------------------------
def _pivot_of(choice: Choice) -> Callable[[Scene], tuple[int, int] | None]:
    """Row and column sums (first + last) of a choice's bounding box: mirror images add up to them."""

    def pivot(scene: Scene) -> tuple[int, int] | None:
        chosen = choice(scene)
        box = None if chosen is None else extent(chosen)
        return None if box is None else (box[0].start + box[0].stop - 1, box[1].start + box[1].stop - 1)

    return pivot


def _pivot_of_lines(scene: Scene) -> tuple[int, int] | None:
    """The middle of the full lines that cross the grid."""
    rows, cols, colour = scene.lines
    if colour is None:
        return None
    height, width = scene.grid.shape
    return (rows[0] + rows[-1] if rows else height - 1), (cols[0] + cols[-1] if cols else width - 1)


def _mirrored(row: np.ndarray, col: np.ndarray, pivot: tuple[int, int]) -> list[Place]:
    """Where cells go in the three mirror images about a pivot."""
    p, q = pivot
    return [(p - row, col), (row, q - col), (p - row, q - col)]


def _turned(row: np.ndarray, col: np.ndarray, pivot: tuple[int, int]) -> list[Place]:
    """Where they go in the four other orientations; none if these do not map cells onto cells."""
    (p, q), half = pivot, (pivot[0] - pivot[1]) // 2
    row, col = col + half, row - half
    return [] if (p - q) % 2 else [(row, col), *_mirrored(row, col, pivot)]


def _images(scene: Scene, start: Grid, places: Callable[..., list[Place]], pivot: tuple[int, int]) -> Grid:
    """The foreground drawn at other `places` too, onto what is background in `start`."""
    height, width = scene.grid.shape
    row, col = np.nonzero(scene.foreground)
    result = start.copy()
    for r, c in places(row, col, pivot):
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        r, c, colour = r[inside], c[inside], scene.grid[row[inside], col[inside]]
        free = result[r, c] == scene.background
        result[r[free], c[free]] = colour[free]
    return result


def symmetric(pivot_of: Callable[[Scene], tuple[int, int] | None]) -> tuple[Transform, Transform]:
    """The foreground's mirror images about a pivot drawn onto the background; and its images in all orientations."""

    @once
    def mirrored(scene: Scene) -> Grid | None:
        pivot = pivot_of(scene)
        return None if pivot is None else _images(scene, scene.grid, _mirrored, pivot)

    def turned(scene: Scene) -> Grid | None:
        pivot, start = pivot_of(scene), mirrored(scene)
        return None if pivot is None or start is None else _images(scene, start, _turned, pivot)

    return over_background(mirrored), over_background(turned)


def clusters_symmetric(*mirrors: Callable[[Grid], Grid]) -> Transform:
    """Every cluster merged with mirror images of itself inside its own box."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        clusters = scene.canvas.clusters
        if not 0 < clusters.count <= 30:
            return None
        result = scene.grid.copy()
        for index in range(clusters.count):
            area = clusters.area(index)
            for mirror in mirrors:
                image = mirror(scene.grid[area])
                if image.shape == result[area].shape:
                    result[area] = np.where(result[area] == scene.background, image, result[area])
        return result

    return change


# ----------------------------------------------------------------------------------------------------------------
# Moves
# ----------------------------------------------------------------------------------------------------------------
def moved_to(choice: Choice) -> Transform:
    """Every other object moves straight until it touches what is chosen (if it lies in its way)."""

    def change(scene: Scene) -> Grid | None:
        anchor = choice(scene)
        shapes = scene.canvas.shapes
        if anchor is None or not 1 < shapes.count <= 30:
            return None
        box = extent(anchor)
        if box is None:
            return None
        rows, cols = box
        down = (shapes.bottom < rows.start).astype(np.int64) - (shapes.top >= rows.stop)
        right = (shapes.right < cols.start).astype(np.int64) - (shapes.left >= cols.stop)
        masks, borders = shape_masks(scene), wall(scene)
        chosen = anchor.reshape(-1)[shapes.first].tolist()
        taken = sum(mask for mask, anchored in zip(masks, chosen, strict=True) if anchored)
        order, steps = (
            [index for index, anchored in enumerate(chosen) if not anchored],
            np.zeros(shapes.count, np.int64),
        )
        for index in order:
            step, mask = (int(down[index]), int(right[index])), masks[index]
            if (step[0] == 0) != (step[1] == 0):
                far, place = slide(scene, mask, step, taken | borders)
                if not moved(scene, place, step) & borders:
                    steps[index], mask = far, place
            taken |= mask
        result = np.where(anchor, scene.grid, np.uint8(scene.background))
        draw_moved(result, shapes, order, down * steps, right * steps)
        return result

    return change


def falling(choice: Choice, dr: int, dc: int) -> Transform:
    """Only the chosen objects move, each until the border or another cell stops it."""

    def change(scene: Scene) -> Grid | None:
        chosen = choice(scene)
        shapes = scene.canvas.shapes
        if chosen is None or not 0 < shapes.count <= 40:
            return None
        moving = chosen.reshape(-1)[shapes.first].tolist()
        standing = sum(mask for mask, moves in zip(shape_masks(scene), moving, strict=True) if not moves)
        order = [index for index in front(shapes, (dr, dc)) if moving[index]]
        result = np.where(chosen, np.uint8(scene.background), scene.grid)
        drop(result, scene, order, (dr, dc), wall(scene) | standing)
        return result

    return change


def dots_to_own_colour(scene: Scene) -> Grid | None:
    """Every dot moves straight to the largest object of its colour, to lie against it; a dot without one vanishes."""
    shapes = scene.canvas.shapes
    dots = np.flatnonzero(shapes.size == 1)
    if not len(dots) or len(dots) == shapes.count:
        return None
    result = scene.grid.copy()
    result[shapes.top[dots], shapes.left[dots]] = scene.background
    for dot in dots:
        homes = np.flatnonzero((shapes.colour == shapes.colour[dot]) & (shapes.size > 1))
        if not len(homes):
            continue
        home = homes[shapes.size[homes].argmax()]
        row, col = int(shapes.top[dot]), int(shapes.left[dot])
        near_row = int(np.clip(row, shapes.top[home] - 1, shapes.bottom[home] + 1))
        near_col = int(np.clip(col, shapes.left[home] - 1, shapes.right[home] + 1))
        if shapes.top[home] <= row <= shapes.bottom[home]:
            result[row, near_col] = shapes.colour[dot]
        elif shapes.left[home] <= col <= shapes.right[home]:
            result[near_row, col] = shapes.colour[dot]
    return result


# ----------------------------------------------------------------------------------------------------------------
# Filling, thinning, cleaning
# ----------------------------------------------------------------------------------------------------------------
@over_background
def colour_boxes(scene: Scene) -> Grid | None:
    """The box around all cells of a colour filled with it, where the background is; larger boxes first."""
    if not scene.colours:
        return None
    boxes = zip(scene.colour_boxes, scene.colours, strict=True)
    result = scene.grid.copy()
    for area, colour in sorted(boxes, key=lambda box: -scene.grid[box[0]].size):
        result[area] = np.where(scene.foreground[area], result[area], colour)
    return result


@over_foreground
def hollowed(scene: Scene) -> Grid | None:
    """Cells whose four neighbours all have their colour are emptied."""
    grid = np.pad(scene.grid.astype(np.int64), 1, constant_values=10)
    inner = scene.foreground.copy()
    for dr, dc in (DOWN, UP, RIGHT, LEFT):
        height, width = inner.shape
        inner &= grid[1 + dr : 1 + dr + height, 1 + dc : 1 + dc + width] == scene.grid
    return np.where(inner, scene.background, scene.grid).astype(np.uint8) if inner.any() else None


def absorbed(limit: int) -> Transform:
    """Regions of at most `limit` cells take the commonest colour around them."""

    def change(scene: Scene) -> Grid | None:
        regions = scene.canvas.regions
        small = regions.size <= limit
        if not small.any():
            return None
        rim = scene.canvas.region_rim[0]
        mask = (regions.paint(small.astype(np.int64), 0)[0] == 1) & (rim >= 0)
        return np.where(mask, rim, scene.grid).astype(np.uint8)

    return change


def erased(rank: int) -> Transform:
    """The colour of a rank taken away: its cells take the commonest other colour around them, from the outside in."""

    @over_foreground
    def change(scene: Scene) -> Grid | None:
        if len(scene.colours) < 2:
            return None
        result = np.where(scene.grid == scene.colours[rank], np.uint8(NOTHING), scene.grid)
        for _ in range(15):
            hidden = result == NOTHING
            if not hidden.any():
                return result
            counts = np.zeros((int(hidden.sum()), 10), np.int8)
            for dr, dc in STAR:
                near = shifted(result, -dr, -dc, NOTHING)[hidden]
                known = np.flatnonzero(near != NOTHING)
                counts[known, near[known]] += 1
            result[hidden] = np.where(counts.any(1), counts.argmax(1), NOTHING)
        return None

    return change


def flooded(rank: int) -> Transform:
    """Background regions inside walls of the colour of a rank take the one other colour they touch."""

    @over_background
    def change(scene: Scene) -> Grid | None:
        if len(scene.colours) < 2:
            return None
        regions, wall = scene.canvas.regions, scene.colours[rank]
        seen = np.zeros((regions.count, 10), bool)
        for dr, dc in CROSS:
            near = shifted(scene.grid, -dr, -dc, NOTHING).reshape(-1)[regions.cells]
            valid = near != NOTHING
            seen[regions.of[valid], near[valid]] = True
        seen[:, [wall, scene.background]] = False
        flood = (regions.colour == scene.background) & (seen.sum(1) == 1)
        plane = regions.paint(np.where(flood, seen.argmax(1), NOTHING), NOTHING)[0]
        return np.where(plane != NOTHING, plane, scene.grid).astype(np.uint8)

    return change


@over_background
def ringed(scene: Scene) -> Grid | None:
    """A ring in the object's colour around every object's box."""
    shapes = scene.canvas.shapes
    if not 0 < shapes.count <= 30:
        return None
    result = scene.grid.copy()
    for index in range(shapes.count):
        rows = slice(max(0, int(shapes.top[index]) - 1), int(shapes.bottom[index]) + 2)
        cols = slice(max(0, int(shapes.left[index]) - 1), int(shapes.right[index]) + 2)
        area, inner = result[rows, cols], shapes.area(index)
        kept = result[inner].copy()
        area[area == scene.background] = shapes.colour[index]
        result[inner] = kept
    return result


@over_background
def continued(scene: Scene) -> Grid | None:
    """The pattern of foreground cells carried on over the background by the shortest shift that maps it onto itself."""
    grid, foreground = scene.grid, scene.foreground
    seen, (height, width) = np.count_nonzero(foreground), grid.shape
    for step in range(1, min(16, max(height, width))):
        for dr, dc in ((0, step), (step, 0), (step, step), (step, -step)):
            if dr >= height or abs(dc) >= width:
                continue
            here = slice(height - dr), slice(max(0, -dc), width - max(0, dc))
            there = slice(dr, height), slice(max(0, dc), width - max(0, -dc))
            both = foreground[here] & foreground[there]
            matched = np.count_nonzero(both)
            if 4 * matched >= seen and matched > 1 and (grid[here][both] == grid[there][both]).all():
                return _carried(scene, dr, dc)
    return None


def _carried(scene: Scene, dr: int, dc: int) -> Grid:
    result = scene.grid.copy()
    height, width = result.shape
    values = np.where(scene.foreground, result, np.uint8(NOTHING))
    for sign in (1, -1):
        for step in range(1, 30):
            if step * dr >= height or step * abs(dc) >= width:
                break
            image = shifted(values, -sign * step * dr, -sign * step * dc, NOTHING)
            np.copyto(result, image, where=(result == scene.background) & (image != NOTHING))
    return result


# ----------------------------------------------------------------------------------------------------------------
# Stamps and panels
# ----------------------------------------------------------------------------------------------------------------
def _stamps(scene: Scene) -> list[tuple[Grid, Mask, int]]:
    """Clusters of several colours as (box, mask of own cells, cluster number), largest first."""
    clusters = scene.canvas.clusters
    order = np.argsort(-clusters.size, kind="stable")
    several = [int(k) for k in order if clusters.colours[k] > 1]
    return [(clusters.box(k), clusters.labels[0][clusters.area(k)] == k, k) for k in several]


def stamped_at_markers(scene: Scene) -> Grid | None:
    """The largest cluster of several colours copied to every dot whose colour occurs in it exactly once."""
    clusters = scene.canvas.clusters
    stamps = _stamps(scene)
    if not stamps:
        return None
    box, mask, number = stamps[0]
    result = scene.grid.copy()
    height, width = result.shape
    row, col = np.nonzero(mask)
    colours = box[row, col]
    once = np.bincount(colours, minlength=10) == 1
    for index in np.flatnonzero(clusters.size == 1):
        colour = int(clusters.colour[index])
        if index == number or not once[colour]:
            continue
        at = int(np.flatnonzero(colours == colour)[0])
        r, c = row - row[at] + clusters.top[index], col - col[at] + clusters.left[index]
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        result[r[inside], c[inside]] = colours[inside]
    return result


def stamped_on_twins(scene: Scene) -> Grid | None:
    """One-coloured clusters of the outline of a cluster of several colours take its colours."""
    clusters = scene.canvas.clusters
    if not 1 < clusters.count <= 60:
        return None
    result, done = scene.grid.copy(), False
    for box, mask, number in _stamps(scene):
        for index in np.flatnonzero((clusters.shape == clusters.shape[number]) & (clusters.colours == 1)):
            area = result[clusters.area(int(index))]
            if area.shape == mask.shape:
                area[mask] = box[mask]
                done = True
    return result if done else None


def panels_kept(pick: Callable[[list[Grid]], int], fill: bool) -> Transform:
    """Only the picked panel keeps its cells; with `fill` it becomes solid in its commonest foreground colour."""

    def change(scene: Scene) -> Grid | None:
        panels = scene.panels
        if not panels:
            return None
        best = pick([np.where(p == scene.background, 0, 1) for p in panels])
        _, _, line_colour = scene.lines
        result = np.where(scene.grid == line_colour, scene.grid, scene.background).astype(np.uint8)
        top, left = _panel_corners(scene)[best]
        height, width = panels[best].shape
        counts = np.bincount(panels[best].reshape(-1), minlength=10)
        counts[scene.background] = 0
        area = result[top : top + height, left : left + width]
        area[:] = counts.argmax() if fill else panels[best]
        return result

    return change


def _panel_corners(scene: Scene) -> list[tuple[int, int]]:
    rows, cols, _ = scene.lines
    height, width = scene.grid.shape
    return [(a, c) for a, _ in spans(rows, height) for c, _ in spans(cols, width)]


def _fullest(masks: list[Grid]) -> int:
    return int(np.argmax([m.sum() for m in masks]))


def _emptiest(masks: list[Grid]) -> int:
    return int(np.argmin([m.sum() for m in masks]))


def _rolled(dr: int, dc: int) -> Transform:
    return lambda scene: np.roll(scene.grid, (dr, dc), (0, 1))


def _drawings() -> dict[str, Transform]:
    mirrored_at_lines, turned_at_lines = symmetric(_pivot_of_lines)
    drawings: dict[str, Transform] = {
        "colour_boxes": colour_boxes,
        "hollowed": hollowed,
        "absorbed_1": absorbed(1),
        "absorbed_2": absorbed(2),
        "ringed": ringed,
        "continued": continued,
        "stamped_at_markers": stamped_at_markers,
        "stamped_on_twins": stamped_on_twins,
        "panel_fullest": panels_kept(_fullest, False),
        "panel_fullest_filled": panels_kept(_fullest, True),
        "panel_emptiest": panels_kept(_emptiest, False),
        "symmetric_lines": mirrored_at_lines,
        "symmetric_lines_turned": turned_at_lines,
        "dots_to_own_colour": dots_to_own_colour,
        "clusters_mirrors": clusters_symmetric(flip_cols, flip_rows, half_turn),
        "elbow_rows_first": elbow(True),
        "elbow_cols_first": elbow(False),
        "rolled_down": _rolled(1, 0),
        "rolled_up": _rolled(-1, 0),
        "rolled_right": _rolled(0, 1),
        "rolled_left": _rolled(0, -1),
    }
    for name in ("rare", "dots"):
        met = _met(CHOICES[name], through=False)
        for way in ("cross", "diagonals", "star"):
            drawings[f"rays_{name}_{way}"] = rays(met, DIRECTIONS[way])
        drawings[f"lines_{name}"] = rays(_met(CHOICES[name], through=True), CROSS)
        drawings[f"grown_{name}"] = grown(CHOICES[name], STAR)
    for name in ("rare", "top", "largest"):
        drawings[f"symmetric_{name}"], drawings[f"symmetric_{name}_turned"] = symmetric(_pivot_of(CHOICES[name]))
        drawings[f"moved_to_{name}"] = moved_to(CHOICES[name])
        drawings[f"linked_to_{name}"] = linked_to(CHOICES[name])
    for rank in (0, -1):
        drawings[f"erased_{rank}"] = erased(rank)
        drawings[f"flooded_{rank}"] = flooded(rank)
    for way, step in (("down", DOWN), ("up", UP), ("right", RIGHT), ("left", LEFT)):
        drawings[f"rare_falls_{way}"] = falling(CHOICES["rare"], *step)
    return drawings


DRAWINGS: dict[str, Transform] = _drawings()
