"""What a family of generated tasks is, what a task of it fixes, and how one of its pairs is drawn.

Nothing is left open: **every pair by itself shows all that any other pair of its task asks for.** Whichever pair is
held out as the query, and however few demonstrations are left, its answer is decided. Three things see to that:

* `draw` puts every colour that plays a part in the rule into each input (all three colours of a map, the wall and the
  thing that it stops), and nothing that the rule is silent about (a tie, a region closed only diagonally);
* a drawn input on which another variant of the family (another direction, axis, choice) would give the same output is
  thrown away, so that the output tells the variant;
* so is one that the rule leaves unchanged.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from arc.tasks import Grid, Pair

PAINTS = range(1, 10)  # the colours that a task may fix: all but the background
ATTEMPTS = 4000  # the hardest family needs about 60 on average for a test input
TEST_SHARE = 4  # one in so many possible inputs is a test input


class Fixed(NamedTuple):
    """What a task fixes: the same in all of its pairs, different between tasks."""

    colours: tuple[int, ...]  # each with a part of its own in the rule or the picture; all different
    palette: tuple[int, ...]  # further colours, ascending: they play one part together
    variant: Any  # one of the family's variants


Draw = Callable[[np.random.Generator, Fixed, int], Grid | None]
Rule = Callable[[Grid, Fixed], Grid]


@dataclass(frozen=True)
class Family:
    """A family of tasks that share a rule.

    name: part of the task ids; also the family's seed, so that other families may come and go beside it.
    meaning: the rule in one sentence.
    draw: (generator, fixed, side) -> an input grid with sides of at most `side`, whose output keeps to that too; or
        None where the attempt came to nothing. It is called again until an input passes `Family.pair`.
    rule: (input, fixed) -> output. It copes with an input that was drawn for another variant.
    colours, palette: how many colours a task fixes (see Fixed).
    variants: what else a task fixes is one of these.
    """

    name: str
    meaning: str
    draw: Draw
    rule: Rule
    colours: int = 0
    palette: int = 0
    variants: tuple[Any, ...] = (None,)

    @property
    def settings(self) -> int:
        """The number of different things that a task of this family can fix."""
        colourings = math.perm(len(PAINTS), self.colours) * math.comb(len(PAINTS) - self.colours, self.palette)
        return colourings * len(self.variants)

    def setting(self, code: int) -> Fixed:
        """The setting with number `code`, 0 <= code < settings."""
        code, choice = divmod(code, len(self.variants))
        paints, colours = list(PAINTS), []
        for _ in range(self.colours):
            code, position = divmod(code, len(paints))
            colours.append(paints.pop(position))
        palette = next(itertools.islice(itertools.combinations(paints, self.palette), code, None))
        return Fixed(tuple(colours), palette, self.variants[choice])

    def fixed(self, seed: int, index: int) -> Fixed:
        """What the task with this index fixes. Any `settings` successive indices get all settings, each once, and
        successive variants take turns as evenly as can be."""
        factor, offset = _shuffle(seed, self.name, self.settings)
        return self.setting((factor * index + offset) % self.settings)

    def pair(self, rng: np.random.Generator, fixed: Fixed, side: int, *, test: bool) -> Pair:
        """A pair that shows everything that `fixed` decides, with read-only (H, W) uint8 grids.

        test: whether the input is one of the inputs that only test pairs have, or one that they never have.
        Raises RuntimeError if none was found, which is a fault of the family.
        """
        rivals = [fixed._replace(variant=variant) for variant in self.variants if variant != fixed.variant]
        for _ in range(ATTEMPTS):
            grid = self.draw(rng, fixed, side)
            if grid is None or is_test_input(grid) != test:
                continue
            output = self.rule(grid, fixed)
            if same(grid, output) or any(same(self.rule(grid, rival), output) for rival in rivals):
                continue
            assert max(*grid.shape, *output.shape) <= side, (self.name, grid.shape, output.shape)
            return Pair(_frozen(grid), _frozen(output))
        raise RuntimeError(f"family {self.name}: no input in {ATTEMPTS} attempts ({fixed}, side {side})")


@lru_cache(maxsize=4096)
def _shuffle(seed: int, name: str, settings: int) -> tuple[int, int]:
    """(factor, offset) with which index -> factor * index + offset visits all settings."""
    rng = np.random.default_rng([seed, number_of(name)])
    while math.gcd(factor := int(rng.integers(settings)) + 1, settings) != 1:
        pass
    return factor, int(rng.integers(settings))


def number_of(name: str) -> int:
    """The number of a family in seeds: the same whichever other families there are."""
    return zlib.crc32(name.encode())


def is_test_input(grid: Grid) -> bool:
    """Whether a grid may be the input of test pairs only. A rule for all families and seeds, so that no demonstration
    of any task, however many are drawn, starts from a test input of the same or another task."""
    height, width = grid.shape
    return zlib.crc32(bytes((height, width)) + grid.astype(np.uint8).tobytes()) % TEST_SHARE == 0


def same(a: Grid, b: Grid) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _frozen(grid: Grid) -> Grid:
    copy = np.array(grid, dtype=np.uint8, order="C")
    copy.flags.writeable = False  # tasks are shared: nobody may change them in place
    return copy


# ----------------------------------------------------------------------------------------------------------------------
# Rules and drawings that know one direction or axis, turned to the task's

DIRECTIONS = ("right", "down", "left", "up")  # the position is the number of quarter turns that makes it "right"
AXES = ("across", "down")


def directed(rule: Rule) -> Rule:
    """A rule written for "right", for the direction that is the task's variant."""

    def turned(grid: Grid, fixed: Fixed) -> Grid:
        turns = DIRECTIONS.index(fixed.variant)
        return np.rot90(rule(np.rot90(grid, turns), fixed), -turns)

    return turned


def directed_draw(draw: Draw) -> Draw:
    """A drawing made for "right", for the direction that is the task's variant."""

    def turned(rng: np.random.Generator, fixed: Fixed, side: int) -> Grid | None:
        grid = draw(rng, fixed, side)
        return None if grid is None else np.rot90(grid, -DIRECTIONS.index(fixed.variant))

    return turned


def along(rule: Rule) -> Rule:
    """A rule written for "across", for the axis that is the task's variant."""
    return lambda grid, fixed: rule(grid, fixed) if fixed.variant == "across" else rule(grid.T, fixed).T


def along_draw(draw: Draw) -> Draw:
    """A drawing made for "across", for the axis that is the task's variant."""

    def turned(rng: np.random.Generator, fixed: Fixed, side: int) -> Grid | None:
        grid = draw(rng, fixed, side)
        return grid if grid is None or fixed.variant == "across" else grid.T

    return turned
