"""Cuts: transforms that choose a part of the grid (an object, a panel, the logic of panels) or sum it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from arc.evidence.canvas import Objects
from arc.evidence.restore import MASKS, hidden_patch, mirrored, repeated
from arc.evidence.scene import Grid, Scene, Transform, inside, merge_runs, period, spans

ObjectKey = Callable[[Objects], np.ndarray]


def _darkest(objects: Objects) -> np.ndarray:
    """Minus the number of cells of the object's colour in the whole grid: picks the object of the rarest colour."""
    counts = np.bincount(objects.colour, weights=objects.size, minlength=11)
    return -counts[objects.colour]


def _holes(objects: Objects) -> np.ndarray:
    return objects.height * objects.width - objects.size


OBJECT_KEYS: dict[str, ObjectKey] = {
    "largest": lambda o: o.size,
    "smallest": lambda o: -o.size,
    "biggest_box": lambda o: o.height * o.width,
    "most_colours": lambda o: o.colours,
    "odd_one": lambda o: -o.twin_count,
    "common_one": lambda o: o.twin_count,
    "rare_colour": _darkest,
    "emptiest": _holes,
    "fullest": lambda o: -_holes(o),
    "top": lambda o: -o.top,
    "bottom": lambda o: o.bottom,
    "left": lambda o: -o.left,
    "right": lambda o: o.right,
    "inner": lambda o: ~o.touches * o.size,
    "symmetric": lambda o: o.symmetries,
    "asymmetric": lambda o: -o.symmetries,
}


def _object(kind: str, key: ObjectKey, alone: bool) -> Transform:
    """The box of the object with the largest key (ties: the first); `alone` blanks what does not belong to it."""

    def cut(scene: Scene) -> Grid | None:
        objects: Objects = getattr(scene.canvas, kind)
        if objects.count == 0:
            return None
        index = objects.best(key)
        area = objects.area(index)
        if not alone:
            return scene.grid[area]
        return np.where(objects.labels[0][area] == index, scene.grid[area], scene.background).astype(np.uint8)

    return cut


def _colour_box(rank: int) -> Transform:
    def cut(scene: Scene) -> Grid | None:
        boxes = scene.colour_boxes
        return scene.grid[boxes[rank]] if -len(boxes) <= rank < len(boxes) else None

    return cut


def _inside_of(cut: Transform) -> Transform:
    return lambda scene: None if (box := cut(scene)) is None else inside(box)


def _part(pick: Callable[[list[Grid]], int]) -> Transform:
    def cut(scene: Scene) -> Grid | None:
        return scene.parts[pick(scene.parts)] if scene.parts else None

    return cut


def _part_at(index: int) -> Transform:
    def cut(scene: Scene) -> Grid | None:
        return scene.parts[index] if -len(scene.parts) <= index < len(scene.parts) else None

    return cut


def _odd_part(parts: list[Grid]) -> int:
    """The part that differs most from the others."""
    return int(np.argmax([sum(int((a != b).sum()) for b in parts) for a in parts]))


def _cells_in(part: Grid) -> int:
    return int((part != np.bincount(part.reshape(-1)).argmax()).sum())


def _logic(rule: Callable[[np.ndarray], np.ndarray]) -> Transform:
    """Parts combined cell by cell as foreground masks (parts, h, w); the result is 0 or 1, its colours come later."""

    def cut(scene: Scene) -> Grid | None:
        if len(scene.parts) < 2:
            return None
        return rule(np.stack(scene.parts) != scene.background).astype(np.uint8)

    return cut


def _overlay(order: Callable[[list[Grid]], list[Grid]]) -> Transform:
    """Parts laid over each other, later ones on top, background transparent."""

    def cut(scene: Scene) -> Grid | None:
        if len(scene.parts) < 2:
            return None
        result = np.full(scene.parts[0].shape, scene.background, np.uint8)
        for part in order(scene.parts):
            result = np.where(part != scene.background, part, result)
        return result

    return cut


def _pair_code(scene: Scene) -> Grid | None:
    """Two parts as one plane of 0..3: which of the two has foreground."""
    if len(scene.parts) != 2:
        return None
    first, second = (part != scene.background for part in scene.parts)
    return (first + 2 * second).astype(np.uint8)


def _triple_code(scene: Scene) -> Grid | None:
    """Three parts as one plane of 0..7."""
    if len(scene.parts) != 3:
        return None
    first, second, third = (part != scene.background for part in scene.parts)
    return (first + 2 * second + 4 * third).astype(np.uint8)


def _half(rows: slice | None, cols: slice | None) -> Transform:
    def cut(scene: Scene) -> Grid | None:
        height, width = scene.grid.shape
        h, w = (height + 1) // 2 if rows else height, (width + 1) // 2 if cols else width
        grid = scene.grid
        if rows:
            grid = grid[:h] if rows.start is None else grid[height - h :]
        if cols:
            grid = grid[:, :w] if cols.start is None else grid[:, width - w :]
        return grid

    return cut


def _period_tile(scene: Scene) -> Grid | None:
    """The smallest tile that the grid repeats."""
    height, width = period(scene.grid)
    return scene.grid[:height, :width]


def _without_empty_lines(scene: Scene) -> Grid | None:
    rows, cols = scene.foreground.any(1), scene.foreground.any(0)
    return scene.grid[rows][:, cols] if rows.any() else None


def _panel_summary(scene: Scene) -> Grid | None:
    """One cell a panel: its commonest foreground colour, or the background."""
    rows, cols, colour = scene.lines
    if colour is None:
        return None
    height, width = scene.grid.shape
    summary = []
    for a, b in spans(rows, height):
        line = []
        for c, d in spans(cols, width):
            counts = np.bincount(scene.grid[a:b, c:d].reshape(-1), minlength=10)
            counts[scene.background] = 0
            line.append(int(counts.argmax()) if counts.any() else scene.background)
        summary.append(line)
    return np.array(summary, np.uint8)


def _colour_list(vertical: bool, order: str) -> Transform:
    """The foreground colours as a line, by number of cells or by place."""

    def cut(scene: Scene) -> Grid | None:
        colours = scene.colours
        if order == "place":
            flat = (scene.grid if vertical else scene.grid.T).reshape(-1)
            first = {c: int((flat == c).argmax()) for c in colours}
            colours = sorted(colours, key=lambda c: first[c])
        line = np.array([colours], np.uint8)
        return None if not colours else line.T if vertical else line

    return cut


def _colour_bars(scene: Scene) -> Grid | None:
    """A bar for each foreground colour, commonest first, as long as it has cells, from the left."""
    counts = [int((scene.grid == c).sum()) for c in scene.colours]
    if not counts or counts[0] > 30:
        return None
    bars = np.full((len(counts), counts[0]), scene.background, np.uint8)
    for row, (colour, count) in enumerate(zip(scene.colours, counts, strict=True)):
        bars[row, :count] = colour
    return bars


def _single(pick: Callable[[Scene], int | None]) -> Transform:
    def cut(scene: Scene) -> Grid | None:
        colour = pick(scene)
        return None if colour is None else np.array([[colour]], np.uint8)

    return cut


def _top_object_colour(kind: str, key: ObjectKey) -> Callable[[Scene], int | None]:
    def pick(scene: Scene) -> int | None:
        objects: Objects = getattr(scene.canvas, kind)
        return int(objects.colour[objects.best(key)]) if objects.count else None

    return pick


_PLAIN: dict[str, Transform] = {
    "all": lambda s: s.grid,
    "foreground_box": lambda s: s.foreground_box,
    "foreground_box_inside": lambda s: None if s.foreground_box is None else inside(s.foreground_box),
    "inside": lambda s: inside(s.grid),
    "runs": lambda s: merge_runs(s.grid),
    "filled_lines": _without_empty_lines,
    "period": _period_tile,
    "panel_summary": _panel_summary,
    "left_half": _half(None, slice(None, 1)),
    "right_half": _half(None, slice(1, None)),
    "top_half": _half(slice(None, 1), None),
    "bottom_half": _half(slice(1, None), None),
    "top_left": _half(slice(None, 1), slice(None, 1)),
    "top_right": _half(slice(None, 1), slice(1, None)),
    "bottom_left": _half(slice(1, None), slice(None, 1)),
    "bottom_right": _half(slice(1, None), slice(1, None)),
    "first_part": _part_at(0),
    "second_part": _part_at(1),
    "third_part": _part_at(2),
    "last_part": _part_at(-1),
    "odd_part": _part(_odd_part),
    "fullest_part": _part(lambda ps: int(np.argmax([_cells_in(p) for p in ps]))),
    "emptiest_part": _part(lambda ps: int(np.argmin([_cells_in(p) for p in ps]))),
    "richest_part": _part(lambda ps: int(np.argmax([len(np.unique(p)) for p in ps]))),
    "parts_code": _pair_code,
    "three_parts_code": _triple_code,
    "parts_all": _logic(lambda m: np.logical_and.reduce(m)),
    "parts_any": _logic(lambda m: np.logical_or.reduce(m)),
    "parts_odd": _logic(lambda m: m.sum(0) % 2 == 1),
    "parts_one": _logic(lambda m: m.sum(0) == 1),
    "overlay": _overlay(lambda ps: ps),
    "overlay_reversed": _overlay(lambda ps: ps[::-1]),
    "overlay_by_fill": _overlay(lambda ps: sorted(ps, key=_cells_in, reverse=True)),
    "overlay_by_fill_reversed": _overlay(lambda ps: sorted(ps, key=_cells_in)),
    "colours_across": _colour_list(False, "count"),
    "colours_down": _colour_list(True, "count"),
    "colours_left_to_right": _colour_list(False, "place"),
    "colours_top_to_bottom": _colour_list(True, "place"),
    "colour_bars": _colour_bars,
    "commonest_colour": _single(lambda s: s.colours[0] if s.colours else None),
    "rarest_colour": _single(lambda s: s.colours[-1] if s.colours else None),
}


@dataclass(frozen=True)
class Cut:
    """A part of the grid, or of what the change `first` makes of it ("" for none)."""

    apply: Transform
    first: str = ""


def _plain_cuts() -> dict[str, Transform]:
    """Cuts of the grid as it is, but for what restoring it and one cell of a colour give."""
    cuts = dict(_PLAIN)
    for rank in (0, 1, 2, -1):
        cuts[f"colour_{rank}_box"] = _colour_box(rank)
        cuts[f"colour_{rank}_box_inside"] = _inside_of(cuts[f"colour_{rank}_box"])
    for kind in ("shapes", "clusters", "regions"):
        for name, key in OBJECT_KEYS.items():
            if kind == "regions" and name in ("symmetric", "asymmetric", "common_one", "odd_one"):
                continue
            cuts[f"{kind}_{name}"] = _object(kind, key, alone=False)
            if kind == "shapes":
                cuts[f"{kind}_{name}_alone"] = _object(kind, key, alone=True)
    return cuts


def _cuts() -> dict[str, Cut]:
    plain = _plain_cuts()
    cuts = {name: Cut(cut) for name, cut in plain.items()}
    for first in ("without_dots", "drop_colour_-1", "drop_colour_0"):
        for then in ("foreground_box", "shapes_largest", "clusters_largest"):
            cuts[f"{first}_{then}"] = Cut(plain[then], first)
    for name, mask in MASKS.items():
        cuts[f"repeated_patch_{name}"] = Cut(hidden_patch(repeated, mask))
        cuts[f"mirrored_patch_{name}"] = Cut(hidden_patch(mirrored, mask))
    for name in ("largest", "smallest", "odd_one", "common_one", "symmetric", "asymmetric", "emptiest"):
        cuts[f"colour_of_{name}"] = Cut(_single(_top_object_colour("shapes", OBJECT_KEYS[name])))
    return cuts


CUTS: dict[str, Cut] = _cuts()
