"""Restoration: a pattern that repeats or mirrors itself, with some cells hidden under a mask colour."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, lru_cache

import numpy as np

from arc.evidence.scene import Grid, Scene, Transform, crop, once

MaskPick = Callable[[Scene], "int | None"]


@once
def _patch_colour(scene: Scene) -> int | None:
    """The colour whose cells all lie in one filled rectangle of more than two cells, the largest such."""
    best: tuple[int, int] | None = None
    for colour in np.flatnonzero(scene.counts).tolist():
        size = int(scene.counts[colour])
        if not 2 < size < scene.grid.size // 2:
            continue
        box = crop(scene.grid, scene.grid == colour)
        if box is not None and box.size == size:
            best = max(best or (0, 0), (size, colour))
    return best[1] if best else None


def _overlap(a: Grid, b: Grid, hidden: int) -> int:
    """How many cells agree where neither is hidden; -1 if any disagree."""
    open_ = (a != hidden) & (b != hidden)
    return -1 if (open_ & (a != b)).any() else int(np.count_nonzero(open_))


def _moved_pair(grid: Grid, dr: int, dc: int) -> tuple[Grid, Grid]:
    """The grid's cells that have a partner (dr, dc) further on (dr >= 0), and those partners."""
    height, width = grid.shape
    here = grid[: height - dr, max(0, -dc) : width - max(0, dc)]
    there = grid[dr:, max(0, dc) : width - max(0, -dc)]
    return here, there


class _Agreement:
    """Where a grid (H, W) with a hidden colour agrees with moved and mirrored images of itself.

    What `_overlap` says is found for all shifts, or all axes, at once: the visible cells as one-hot colours, multiplied
    line by line, count the agreeing cells of every two lines; a shift or an axis is a diagonal of such a product.
    Counts are at most 900, so float32 holds them exactly.
    """

    def __init__(self, grid: Grid, hidden: int):
        visible = (grid[:, :, None] == np.delete(np.arange(10, dtype=np.uint8), hidden)).astype(np.float32)
        self.seen = np.concatenate([visible, visible.sum(2, keepdims=True)], axis=2)  # (H, W, 9 colours and "any")

    def _counts(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cells that agree, and cells visible in both, of each line of `first` with each of `second` (n, m, 10)."""
        n, m = len(first), len(second)
        agree = first[:, :, :9].reshape(n, -1) @ second[:, :, :9].reshape(m, -1).T
        return agree, first[:, :, 9] @ second[:, :, 9].T

    def _along(self, diagonal: np.ndarray, agree: np.ndarray, both: np.ndarray) -> np.ndarray:
        """Agreeing cells on each numbered diagonal, -1 where any disagree."""
        agree, both = (np.bincount(diagonal, counts.reshape(-1)) for counts in (agree, both))
        return np.where(agree == both, agree, -1)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        return self._counts(self.seen, self.seen)

    @cached_property
    def _cols(self) -> tuple[np.ndarray, np.ndarray]:
        turned = self.seen.transpose(1, 0, 2)
        return self._counts(turned, turned)

    def axes(self) -> list[int | None]:
        """Along rows and along columns the sum r + r' of mirrored line numbers with the largest agreement, none
        contradicting."""
        height, width = self.seen.shape[:2]
        best: list[int | None] = []
        for length, counts in ((height, self._rows), (width, self._cols)):
            first = length // 2
            overlaps = self._along(_sums(length), *counts)[first : 3 * length // 2]
            total = int(overlaps.argmax())
            best.append(first + total if overlaps[total] > height * width // 3 else None)
        return best

    def periods(self) -> list[tuple[int, int]]:
        """The shortest shifts along rows, along columns and along either diagonal slope that contradict no cell."""
        height, width = self.seen.shape[:2]
        across = self._along(_differences(width), *self._cols)[width - 1 :]
        down = self._along(_differences(height), *self._rows)[height - 1 :]
        turned = self.seen.transpose(1, 0, 2)
        sloped = self._along(_differences(width), *self._counts(turned[:, :-1], turned[:, 1:]))
        right, left = sloped[width - 1 :], sloped[width - 1 :: -1]  # one row down and 0, 1, 2, ... columns further
        found = []
        for (dr, dc), overlaps, end in (
            ((0, 1), across, width * 2 // 3 + 1),
            ((1, 0), down, height * 2 // 3 + 1),
            ((1, 1), right, width // 2),
            ((1, -1), left, width // 2),
        ):
            steps = np.flatnonzero(overlaps[1:end] >= height * width // 4)
            if len(steps):
                step = int(steps[0]) + 1
                found.append((step, 0) if dc == 0 else (dr, dc * step))
        return found


@lru_cache
def _sums(n: int) -> np.ndarray:
    """The sum of row and column number in an (n, n) matrix, flat: 0 .. 2n - 2."""
    return np.add.outer(np.arange(n), np.arange(n)).reshape(-1)


@lru_cache
def _differences(n: int) -> np.ndarray:
    """Column number less row number plus n - 1 in an (n, n) matrix, flat: 0 .. 2n - 2."""
    return np.subtract.outer(np.arange(n - 1, 2 * n - 1), np.arange(n)).T.reshape(-1)


def _agreement(scene: Scene, mask: int) -> _Agreement:
    return scene.remember((_Agreement, mask), lambda: _Agreement(scene.grid, mask))


@cache  # one change for a cut and a program that both ask for it: what it makes of a scene is found once
def repeated(hidden: MaskPick) -> Transform:
    """Hidden cells filled in from the repetitions of the visible ones."""

    @once
    def change(scene: Scene) -> Grid | None:
        mask = hidden(scene)
        if mask is None or not scene.counts[mask]:
            return None
        shifts = _agreement(scene, mask).periods()
        if not shifts:
            return None
        result = scene.grid.copy()
        left = int(scene.counts[mask])
        for _ in range(max(result.shape)):
            before = left
            for dr, dc in shifts:
                here, there = _moved_pair(result, dr, dc)
                np.copyto(here, there, where=here == mask)
                np.copyto(there, here, where=there == mask)
            left = int(np.count_nonzero(result == mask))
            if left in (0, before):
                break
        return result

    return change


@cache
def mirrored(hidden: MaskPick) -> Transform:
    """Hidden cells filled in from the mirror images of the visible ones, axes found by agreement."""

    @once
    def change(scene: Scene) -> Grid | None:
        mask = hidden(scene)
        if mask is None or not scene.counts[mask]:
            return None
        result = scene.grid.copy()
        square = scene.grid.shape[0] == scene.grid.shape[1]
        axes = _agreement(scene, mask).axes()
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
