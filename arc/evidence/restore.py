"""Restoration: a pattern that repeats or mirrors itself, with some cells hidden under a mask colour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from arc.evidence.scene import Grid, Scene, Transform, crop

MaskPick = Callable[[Scene], "int | None"]


def _patch_colour(scene: Scene) -> int | None:
    """The colour whose cells all lie in one filled rectangle of more than two cells, the largest such."""
    best: tuple[int, int] | None = None
    for colour in np.unique(scene.grid).tolist():
        mask = scene.grid == colour
        box = crop(mask, mask)
        if box is not None and box.all() and box.size > 2 and box.size < mask.size // 2:
            best = max(best or (0, 0), (box.size, colour))
    return best[1] if best else None


def _overlap(a: Grid, b: Grid, hidden: int) -> int:
    """How many cells agree where neither is hidden; -1 if any disagree."""
    open_ = (a != hidden) & (b != hidden)
    return -1 if (a[open_] != b[open_]).any() else int(open_.sum())


def _moved_pair(grid: Grid, dr: int, dc: int) -> tuple[Grid, Grid]:
    """The grid's cells that have a partner (dr, dc) further on (dr >= 0), and those partners."""
    height, width = grid.shape
    here = grid[: height - dr, max(0, -dc) : width - max(0, dc)]
    there = grid[dr:, max(0, dc) : width - max(0, -dc)]
    return here, there


def _periods(grid: Grid, hidden: int) -> list[tuple[int, int]]:
    """The shortest shifts along rows, along columns and along either diagonal slope that contradict no visible cell."""
    height, width = grid.shape
    families = [
        [(0, k) for k in range(1, width * 2 // 3 + 1)],
        [(k, 0) for k in range(1, height * 2 // 3 + 1)],
        [(1, k) for k in range(1, width // 2)],
        [(1, -k) for k in range(1, width // 2)],
    ]
    found = []
    for family in families:
        for dr, dc in family:
            if _overlap(*_moved_pair(grid, dr, dc), hidden) >= grid.size // 4:
                found.append((dr, dc))
                break
    return found


def repeated(hidden: MaskPick) -> Transform:
    """Hidden cells filled in from the repetitions of the visible ones."""

    def change(scene: Scene) -> Grid | None:
        mask = hidden(scene)
        if mask is None or not (scene.grid == mask).any():
            return None
        shifts = _periods(scene.grid, mask)
        if not shifts:
            return None
        result = scene.grid.copy()
        for _ in range(max(result.shape)):
            before = int((result == mask).sum())
            for dr, dc in shifts:
                here, there = _moved_pair(result, dr, dc)
                np.copyto(here, there, where=here == mask)
                np.copyto(there, here, where=there == mask)
            left = int((result == mask).sum())
            if left in (0, before):
                break
        return result

    return change


def _best_axis(grid: Grid, hidden: int) -> int | None:
    """The sum r + r' of mirrored row numbers with the largest agreement, none contradicting."""
    height = len(grid)
    best, best_overlap = None, height * grid.shape[1] // 3
    for total in range(height // 2, 3 * height // 2):
        low, high = max(0, total - height + 1), min(height - 1, total)
        rows = np.arange(low, high + 1)
        overlap = _overlap(grid[rows], grid[total - rows], hidden)
        if overlap > best_overlap:
            best, best_overlap = total, overlap
    return best


def mirrored(hidden: MaskPick) -> Transform:
    """Hidden cells filled in from the mirror images of the visible ones, axes found by agreement."""

    def change(scene: Scene) -> Grid | None:
        mask = hidden(scene)
        if mask is None or not (scene.grid == mask).any():
            return None
        result = scene.grid.copy()
        square = scene.grid.shape[0] == scene.grid.shape[1]
        axes = [_best_axis(scene.grid, mask), _best_axis(scene.grid.T, mask)]
        turned = square and _overlap(scene.grid, scene.grid.T, mask) > 0
        if axes == [None, None] and not turned:
            return None
        for _ in range(2):
            for view, axis in zip((result, result.T), axes, strict=True):
                if axis is not None:
                    rows = np.arange(max(0, axis - len(view) + 1), min(len(view) - 1, axis) + 1)
                    view[rows] = np.where(view[rows] == mask, view[axis - rows], view[rows])
            if turned:
                result = np.where(result == mask, result.T, result)
        return result

    return change


def hidden_patch(restore: Callable[[MaskPick], Transform], hidden: MaskPick) -> Transform:
    """What the restoration puts into the hidden patch."""
    restored = restore(hidden)

    def cut(scene: Scene) -> Grid | None:
        whole = restored(scene)
        return None if whole is None else crop(whole, scene.grid == hidden(scene))

    return cut


MASKS: dict[str, MaskPick] = {
    "zero": lambda s: 0,
    "patch": _patch_colour,
    "top": lambda s: s.colours[0] if s.colours else None,
}
