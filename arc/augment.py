"""The views of a task: the 8 symmetries of the square and the permutations of the colours, on all its grids alike.

Which view an episode sees is a function of its key, not of a generator's state. No torch here. What is
refused is a fault of the caller: ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from arc.tasks import NUM_COLOURS, Grid, Pair, Task

AUGMENT_MODES = ("none", "dihedral", "colour", "full")
KEEP_BACKGROUND_PROBABILITY = 0.8  # colour 0 is the background of nearly every task, and means nothing else there


def apply_dihedral(array: np.ndarray, d: int) -> np.ndarray:
    """Symmetry `d` of the square on the last two axes of (..., H, W): for 4..7 first a left-right mirror, then `d % 4`
    quarter turns counter-clockwise. A view; 0 is the identity. Raises ValueError unless 0 <= d <= 7."""
    _check_dihedral(d)
    if d >= 4:
        array = array[..., ::-1]
    return _turned(array, d % 4)


def invert_dihedral(array: np.ndarray, d: int) -> np.ndarray:
    """Undo `apply_dihedral(..., d)` on the last two axes. A view."""
    _check_dihedral(d)
    array = _turned(array, -d % 4)
    return array[..., ::-1] if d >= 4 else array


def _turned(array: np.ndarray, quarters: int) -> np.ndarray:
    """`np.rot90` of the last two axes by 0..3 quarters, without its checks: they take five times as long, and every
    batch is turned hundreds of times."""
    if quarters >= 2:
        array = array[..., ::-1, ::-1]
    return array[..., ::-1].swapaxes(-2, -1) if quarters % 2 else array


def dihedral_shape(height: int, width: int, d: int) -> tuple[int, int]:
    """(height, width) of a grid after `apply_dihedral(..., d)` and, the swap being its own inverse, before it."""
    _check_dihedral(d)
    return (width, height) if d % 2 else (height, width)


def _check_dihedral(d: int) -> None:
    if not 0 <= d <= 7:
        raise ValueError(f"a dihedral transform is 0..7, not {d}")


@dataclass(frozen=True)
class Augmentation:
    """One symmetry and one colour permutation, for all pairs of a task alike: `colours[c]` is the new colour of c."""

    dihedral: int
    colours: tuple[int, ...]

    IDENTITY: ClassVar[Augmentation]

    def __post_init__(self) -> None:
        _check_dihedral(self.dihedral)
        if sorted(self.colours) != list(range(NUM_COLOURS)):
            raise ValueError(f"colours must be a permutation of 0..9, not {self.colours}")

    def apply(self, grid: Grid) -> Grid:
        """The transformed grid (..., H, W), a new array."""
        return np.ascontiguousarray(apply_dihedral(np.array(self.colours, dtype=np.uint8)[grid], self.dihedral))

    def invert(self, grid: Grid) -> Grid:
        """The grid that `apply` maps to this one, exactly; a new array."""
        original = np.argsort(np.array(self.colours, dtype=np.uint8)).astype(np.uint8)
        return np.ascontiguousarray(invert_dihedral(original[grid], self.dihedral))

    def apply_task(self, task: Task) -> Task:
        """The task with every grid of every pair transformed; the id stays."""
        train, test = (tuple(self._apply_pair(pair) for pair in pairs) for pairs in (task.train, task.test))
        return Task(task.id, train, test)

    def _apply_pair(self, pair: Pair) -> Pair:
        return Pair(self.apply(pair.input), None if pair.output is None else self.apply(pair.output))


Augmentation.IDENTITY = Augmentation(0, tuple(range(NUM_COLOURS)))


def sample_augmentation(seed: int, epoch: int, index: int, mode: str) -> Augmentation:
    """The augmentation of episode `index` in `epoch`: a pure function of its arguments (all >= 0), so that a resumed
    run needs no generator state.

    `mode`: "none", "dihedral", "colour" or "full" (both). Modes share their draws: under one key "dihedral" and "full"
    turn alike, "colour" and "full" recolour alike. Colour 0, nearly always the background, stays with probability 0.8;
    otherwise all ten colours are permuted.
    """
    if mode not in AUGMENT_MODES:
        raise ValueError(f"augmentation mode {mode!r} is not one of {', '.join(AUGMENT_MODES)}")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index])))
    dihedral = int(rng.integers(8))
    keep_background = rng.random() < KEEP_BACKGROUND_PROBABILITY
    colours = _background_kept(rng) if keep_background else tuple(rng.permutation(NUM_COLOURS).tolist())
    return Augmentation(
        dihedral if mode in ("dihedral", "full") else 0,
        colours if mode in ("colour", "full") else Augmentation.IDENTITY.colours,
    )


def _background_kept(rng: np.random.Generator) -> tuple[int, ...]:
    return (0, *(1 + rng.permutation(NUM_COLOURS - 1)).tolist())


@lru_cache(maxsize=32)
def evaluation_views(n: int) -> tuple[Augmentation, ...]:
    """`n` >= 1 distinct augmentations to vote over, the same in every run; a larger `n` extends the smaller one's.

    The identity first, then the other symmetries with the colours unchanged, then rounds of all 8 symmetries, each view
    with its own permutation of the colours 1..9.
    """
    if n < 1:
        raise ValueError(f"the number of evaluation views must be at least 1, not {n}")
    views = dict.fromkeys(Augmentation(d, Augmentation.IDENTITY.colours) for d in range(8))
    rng = np.random.Generator(np.random.Philox(0))
    while len(views) < n:
        views[Augmentation(len(views) % 8, _background_kept(rng))] = None
    return tuple(views)[:n]
