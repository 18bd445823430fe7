"""Programs: which whole-grid transforms reproduce a task's demonstrations, up to one fixed map of colours.

Every demonstration is tried by itself: does a program's result have the output's shape, and is each of its colours
always replaced by one colour? The answers are kept per demonstration, so that any set of demonstrations can be left
out: a program serves a query if it fits every *usable* demonstration with colour maps that do not contradict.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arc.evidence.canvas import Canvas
from arc.evidence.changes import CHANGES, Change, Reach
from arc.evidence.cuts import CUTS
from arc.evidence.scene import Cells, Grid, Scene, Shape

MAX_LEFT_OUT = 3  # at most so many demonstrations are ever left out: a query, its feedback pair, the one being judged
UNKNOWN, UNFIT = -1, -2
_UNCHANGED = Change(lambda scene: scene.grid, operator.eq)


@dataclass(frozen=True, eq=False)
class Program:
    """A cut, and a change after it ("" for none), with its colour map on every demonstration (None: does not fit)."""

    cut: str
    change: str
    maps: tuple[np.ndarray | None, ...]  # (10,) int64 each: what replaces a colour, UNKNOWN for one that is not there


def colour_map(result: Grid, output: Grid) -> np.ndarray | None:
    """The map that turns `result` into `output` colour by colour, (10,) with UNKNOWN; None where there is none."""
    if result.shape != output.shape:
        return None
    pairs = set((result << 4 | output).tobytes())  # colours fit in four bits
    if len(pairs) > 10:
        return None
    replaced = [UNKNOWN] * 10
    for pair in pairs:
        if replaced[pair >> 4] != UNKNOWN:
            return None
        replaced[pair >> 4] = pair & 15
    return np.array(replaced)


class ProgramSearch:
    """All programs that fit enough demonstrations of a task to be of use to some query."""

    def __init__(self, canvas: Canvas, outputs: Sequence[Grid]):
        """`canvas`: demonstration inputs first, then test inputs; `outputs`: of the demonstrations."""
        self.n, self.outputs, self._canvas = len(outputs), list(outputs), canvas
        self._scenes: dict[tuple[Shape, bytes], Scene] = {}
        self._changed: dict[str, dict[Scene, Grid | None]] = {change: {} for change in CHANGES}
        self._results: dict[tuple[Shape, bytes], Grid] = {}
        self._maps: dict[tuple[int, int], np.ndarray | None] = {}
        self._variety = [int(np.count_nonzero(np.bincount(output.reshape(-1)))) for output in outputs]  # of colours
        self.allowed = min(MAX_LEFT_OUT, self.n - 1)  # so many demonstrations may fail
        self._same_as: dict[str, str] = {}
        self.cuts = self._cut_all()
        self.programs = self._search()
        unfit = np.full(10, UNFIT)
        maps = [[unfit if m is None else m for m in program.maps] for program in self.programs]
        self._map = np.array(maps, np.int64).reshape(-1, self.n, 10)  # (P, n, 10)
        self._choices: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}

    def _scenes_of(self, grids: Sequence[Grid | None], whole: Canvas | None = None) -> tuple[Scene | None, ...]:
        """One scene for all equal grids, so that equal cuts are changed once. whole: the canvas of the grids, if there
        is one; else those that are new share one."""
        scenes: list[Scene | None] = []
        shared = whole or Canvas([])
        for index, grid in enumerate(grids):
            if grid is None:
                scenes.append(None)
                continue
            key = (grid.shape, grid.tobytes())
            scene = self._scenes.get(key)
            if scene is None:
                scene = Scene(np.ascontiguousarray(grid), shared, index if whole else len(shared.grids))
                if not whole:
                    shared.grids.append(scene.grid)
                self._scenes[key], self._results[key] = scene, scene.grid
            scenes.append(scene)
        return tuple(scenes)

    def _cut_all(self) -> dict[str, tuple[Scene | None, ...]]:
        """Every cut of every grid; a cut whose results all equal an earlier cut's is left out."""
        distinct: dict[tuple[Scene | None, ...], str] = {}
        cuts: dict[str, tuple[Scene | None, ...]] = {}
        grids = {"": self._scenes_of(self._canvas.grids, self._canvas)}  # by what was changed first
        for name, cut in CUTS.items():
            if cut.first not in grids:
                grids[cut.first] = self._scenes_of([self._result(scene, cut.first) for scene in grids[""]])
            parts = [None if scene is None else _legal(cut.apply(scene)) for scene in grids[cut.first]]
            scenes = self._scenes_of(parts)
            self._same_as[name] = distinct.setdefault(scenes, name)
            if self._same_as[name] == name:
                cuts[name] = scenes
        return cuts

    def cut(self, name: str) -> list[Grid | None]:
        """What a cut leaves of each grid, as `result` has it without a change."""
        return [None if scene is None else scene.grid for scene in self.cuts[self._same_as[name]]]

    def result(self, index: int, cut: str, change: str) -> Grid | None:
        """What the program makes of grid `index` (demonstration inputs first, then test inputs)."""
        return self._result(self.cuts[self._same_as[cut]][index], change)

    def _result(self, scene: Scene | None, change: str) -> Grid | None:
        if scene is None or not change:
            return None if scene is None else scene.grid
        found = self._changed[change]
        if scene not in found:
            grid = _legal(CHANGES[change].apply(scene))
            found[scene] = None if grid is None else self._results.setdefault((grid.shape, grid.tobytes()), grid)
        return found[scene]

    def _search(self) -> list[Program]:
        """Programs by order of declaration; where shapes and colours alone rule one out it is not run."""
        programs: list[Program] = []
        alike = functools.cache(self._alike)
        possible = functools.cache(lambda may, *kind: self._possible(alike(*kind), may))  # most share one of few rules
        for name, change in {"": _UNCHANGED, **CHANGES}.items():
            for cut, fitting in possible(change.may, change.on_parts, change.adds_colours, change.keeps).items():
                maps = self._fits(cut, name, fitting)
                if maps is not None:
                    programs.append(Program(cut, name, maps))
        return programs

    def _alike(
        self, on_parts: bool, adds_colours: bool, keeps: Cells | None
    ) -> dict[tuple[Shape | None, ...], list[tuple[int, str]]]:
        """Cuts that changes of a kind are tried on, numbered by order of declaration, by what `_promising` says of the
        demonstrations."""
        groups: dict[tuple[Shape | None, ...], list[tuple[int, str]]] = {}
        for number, (name, scenes) in enumerate(self.cuts.items() if on_parts else [("all", self.cuts["all"])]):
            shapes = [self._promising(scene, j, adds_colours, keeps) for j, scene in enumerate(scenes[: self.n])]
            groups.setdefault(tuple(shapes), []).append((number, name))
        return groups

    def _promising(
        self, scene: Scene | None, demonstration: int, adds_colours: bool, keeps: Cells | None
    ) -> Shape | None:
        """The shape that a cut leaves of a demonstration; None where no change of a kind makes the output of it.

        There may be nothing left, or too few colours: a map makes no more of them, and a change only if it
        `adds_colours`. Or the cells that the change `keeps` become those of the output by no map of colours.
        """
        if scene is None or (not adds_colours and scene.variety < self._variety[demonstration]):
            return None
        if keeps is not None:
            output, cells = self.outputs[demonstration], keeps(scene)
            if scene.grid.shape != output.shape or colour_map(scene.grid[cells], output[cells]) is None:
                return None
        return scene.grid.shape

    def _possible(
        self, cuts: dict[tuple[Shape | None, ...], list[tuple[int, str]]], may: Reach
    ) -> dict[str, list[bool]]:
        """Cuts of which enough demonstrations may fit, and which, to judge by the shapes before and after."""
        possible = []
        for shapes, names in cuts.items():
            pairs = zip(shapes, self.outputs, strict=True)
            fitting = [shape is not None and may(shape, output.shape) for shape, output in pairs]
            if self.n - sum(fitting) <= self.allowed:
                possible += [(number, name, fitting) for number, name in names]
        return {name: fitting for _, name, fitting in sorted(possible)}

    def _fits(self, cut: str, change: str, fitting: list[bool]) -> tuple[np.ndarray | None, ...] | None:
        """Colour maps on all demonstrations, of which those of `fitting` may have one; None as soon as too many fail
        for any query to use the program."""
        maps: list[np.ndarray | None] = []
        failures = self.n - sum(fitting)
        for index, scene in enumerate(self.cuts[cut][: self.n]):
            if not fitting[index]:
                maps.append(None)
                continue
            result = self._result(scene, change)
            maps.append(None if result is None else self._map_once(index, result))
            failures += maps[-1] is None
            if failures > self.allowed:
                return None
        return tuple(maps)

    def _map_once(self, index: int, result: Grid) -> np.ndarray | None:
        key = (index, id(result))  # results are kept, so their ids are not reused; of equal results one is kept
        if key not in self._maps:
            self._maps[key] = colour_map(result, self.outputs[index])
        return self._maps[key]

    def fitting(self, usable: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        """Programs that fit all usable demonstrations, with their joint colour map (10,), the most natural first.

        First those that keep every colour, then by order of declaration: plain cuts before changes.
        """
        key = tuple(usable)
        if key not in self._choices:
            maps = self._map[:, list(key)]  # (P, m, 10)
            high = maps.max(1, initial=UNKNOWN)
            low = np.where(maps == UNKNOWN, 99, maps).min(1, initial=99)
            fits = (maps != UNFIT).all((1, 2)) & ((high == low) | (high == UNKNOWN)).all(1) & (len(key) > 0)
            keeps = ((high == np.arange(10)) | (high == UNKNOWN)).all(1)
            order = np.argsort(~keeps, kind="stable")
            self._choices[key] = [(int(p), high[p]) for p in order if fits[p]]
        return self._choices[key]

    def size(self, index: int, usable: Sequence[int]) -> tuple[int, int] | None:
        """Size of the first fitting program's result on a grid."""
        for number, _ in self.fitting(usable):
            result = self.result(index, self.programs[number].cut, self.programs[number].change)
            if result is not None:
                return result.shape
        return None

    def answers(self, index: int, usable: Sequence[int], size: tuple[int, int], limit: int) -> list[Grid]:
        """Up to `limit` different answers of the given size by the fitting programs, the most natural first."""
        found: dict[bytes, Grid] = {}
        for number, mapping in self.fitting(usable):
            result = self.result(index, self.programs[number].cut, self.programs[number].change)
            if result is not None and result.shape == size:
                answer = np.where(mapping == UNKNOWN, np.arange(10), mapping)[result].astype(np.uint8)
                found.setdefault(answer.tobytes(), answer)
                if len(found) == limit:
                    break
        return list(found.values())


def _legal(grid: Grid | None) -> Grid | None:
    if grid is None:
        return None
    height, width = grid.shape
    return grid if 0 < height <= 30 and 0 < width <= 30 else None
