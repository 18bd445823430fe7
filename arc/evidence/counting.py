"""In-context evidence: what the demonstrations of a task prove about each cell of an output, without any training.

A *table* maps the context of an output cell (a hash of some features, `cells.py`) to an outcome counted over the
demonstrations: a colour (kind "colour"), or the source that reproduces the true colour there (kind "source",
`sources.py`). Contexts depend on input grids and output sizes alone; outcomes are counted per demonstration, so
any set of demonstrations is left out by subtracting its counts. That is how a query is answered without its own
output, how each table is judged on demonstrations it has not seen, and why no test output can leak: this module
never receives one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from arc.evidence.canvas import KEYS, UNAVAILABLE, Canvas
from arc.evidence.cells import Item, OutputCells
from arc.evidence.planes import Planes, all_planes
from arc.evidence.programs import ProgramSearch
from arc.evidence.sizes import Demo, Size, SizeEvidence
from arc.evidence.sources import SOURCE_NUMBER, source_values
from arc.evidence.tables import (
    NUM_COLOUR_TABLES,
    NUM_HASHED_TABLES,
    NUM_PROGRAM_TABLES,
    NUM_TABLES,
    TABLES,
)
from arc.evidence.vote import PURE, SURE, SURE_SIGHTINGS, QueryEvidence, classes_of
from arc.tasks import MAX_SIDE, Grid, Pair

Out = tuple[int, ...]  # demonstrations that must not be used, ascending
QueryKey = tuple[int, int, int]  # (held_out, test, without), -1 for None


def feedback_indices(n: int, held_out: int | None, limit: int) -> tuple[int, ...]:
    """Demonstrations that serve as feedback for a query: those after it, cyclically; for a test query the first."""
    if held_out is None:
        return tuple(range(min(n, limit)))
    return tuple((held_out + step) % n for step in range(1, min(n - 1, limit) + 1))


def planned_queries(n: int, tests: int, feedback_pairs: int) -> list[QueryKey]:
    """What training and evaluation ask for: each demonstration, the feedback pairs of each, each test input."""
    plain = [(i, -1, -1) for i in range(n)]
    feedback = [(k, -1, i) for i in range(n) for k in feedback_indices(n, i, feedback_pairs)]
    return plain + feedback + [(-1, j, -1) for j in range(tests)]


@dataclass(frozen=True, eq=False)
class ColourCounts:
    """How often each colour was sighted in each context. Row 0 of each table stands for contexts that one grid alone
    has: nothing is ever counted there."""

    row: np.ndarray  # (colour tables, N): each cell's row in `counts`
    counts: np.ndarray  # (n, 10, contexts) int32, by demonstration
    total: np.ndarray  # (10, contexts) int32

    @classmethod
    def of(cls, contexts: Contexts, pair: np.ndarray, truth: np.ndarray, n: int) -> ColourCounts:
        """pair, truth: (N_demo,) of the first cells."""
        row, total = contexts.row, int(contexts.width.sum())
        flat = (pair * 10 + truth) * total + row[:, : len(pair)]
        counts = np.bincount(flat.reshape(-1), minlength=n * 10 * total).reshape(n, 10, total).astype(np.int32)
        counts[:, :, contexts.offset] = 0
        return cls(row, counts, counts.sum(0, dtype=np.int32))

    def codes(self, out: Out) -> np.ndarray:
        """Code of each context without demonstrations `out`: (contexts,) uint8."""
        colours = _without(out, self.total, self.counts)  # (10, contexts)
        best = (colours * 16 + np.arange(9, -1, -1, dtype=np.int32)[:, None]).max(0)  # ties: the smaller colour
        return (9 - (best & 15) + 10 * classes_of(best >> 4, colours.sum(0))).astype(np.uint8)


def _without(out: Out, total: np.ndarray, by_demonstration: np.ndarray) -> np.ndarray:
    """Counts (...) of all demonstrations less those of the demonstrations `out`, from their counts (n, ...).

    At most three are left out: less to subtract than the others would be to add up.
    """
    left = total.copy()
    for demonstration in out:
        left -= by_demonstration[demonstration]
    return left


@dataclass(frozen=True, eq=False)
class SourceCounts:
    """How often each context was sighted, and how often each source had the true colour there."""

    row: np.ndarray  # (source tables, N): each cell's row in `seen` and `hits`
    values: np.ndarray  # (S, N) uint8: at every cell the sources that differ in the demonstrations' cells they hit
    seen: np.ndarray  # (n, contexts) int16, by demonstration
    hits: np.ndarray  # (n, contexts, S and none at the end up to a multiple of 4) int16
    seen_total: np.ndarray  # (contexts,) int16, or int32 where more demonstrations than that can hold
    hits_total: np.ndarray  # (contexts, S), likewise

    @classmethod
    def of(cls, contexts: Contexts, values: np.ndarray, pair: np.ndarray, truth: np.ndarray, n: int) -> SourceCounts:
        """values: all sources; pair, truth: (N_demo,) of the first cells."""
        values = values[(values != UNAVAILABLE).any(1)]
        hit = values[:, : len(pair)] == truth  # (S, N_demo)
        first: dict[bytes, int] = {}
        for source, pattern in enumerate(hit):
            first.setdefault(pattern.tobytes(), source)
        different = list(first.values())  # of sources that are right in the same cells only the first can be chosen
        values, hit = values[different], hit[different]
        lanes = np.zeros((len(pair), -(-len(values) // 4) * 4), np.int16)  # hits of a cell, four sources to a word:
        lanes[:, : len(values)] = hit.T  # one demonstration has at most 900 cells, so words add up without a carry
        seen, words = cls._sightings(contexts, lanes.view(np.int64), pair, n)
        hits = words.view(np.int16)
        wide = np.int16 if n * MAX_SIDE**2 < 2**15 else np.int32
        return cls(contexts.row, values, seen, hits, seen.sum(0, dtype=wide), hits.sum(0, dtype=wide))

    @staticmethod
    def _sightings(contexts: Contexts, words: np.ndarray, pair: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """How many cells of each demonstration have a context, (n, contexts) int16, and the sum of their `words`
        (N_demo, W), (n, contexts, W)."""
        # The demonstrations' cells by context, and of one context by demonstration, as these come one after the other
        counted = (contexts.ordered > 0) & (contexts.order < len(pair))
        cells, total = contexts.order[counted], int(contexts.width.sum())
        key = pair.take(cells) * total + (contexts.ordered + contexts.offset[:, None])[counted]
        starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
        rows, bounds = key[starts], np.append(starts, len(key))
        seen, sums = np.zeros(n * total, np.int16), np.zeros((n * total, words.shape[1]), np.int64)
        seen[rows] = np.diff(bounds)
        for part in range(0, len(starts), 512):  # few enough to stay in the processor's cache
            begin = starts[part : part + 512]
            end = bounds[part + len(begin)]
            sums[rows[part : part + 512]] = np.add.reduceat(words[cells[begin[0] : end]], begin - begin[0], axis=0)
        return seen.reshape(n, total), sums.reshape(n, total, -1)

    def best(self, out: Out) -> tuple[np.ndarray, np.ndarray]:
        """Without demonstrations `out`: the source with most hits in each context, and the context's class."""
        hits = _without(out, self.hits_total, self.hits)  # (contexts, S)
        best = hits.argmax(1)
        most = np.take_along_axis(hits, best[:, None], axis=1)[:, 0]
        return best, classes_of(most, _without(out, self.seen_total, self.seen))


class Counts:
    """What the hashed tables learn from the demonstrations about the cells of some items; never changed once built.

    The first items are the demonstrations themselves (input grid, true output size), the others are queries.
    """

    def __init__(self, cells: OutputCells, outputs: Sequence[Grid]):
        self.cells = cells
        n = len(outputs)
        truth = np.concatenate([output.reshape(-1) for output in outputs])
        pair = cells.grid[: len(truth)]
        values = source_values(cells)
        contexts = Contexts.of(cells, values)
        self._colours = ColourCounts.of(contexts.tables(slice(NUM_COLOUR_TABLES)), pair, truth, n)
        sources = slice(NUM_COLOUR_TABLES, NUM_HASHED_TABLES)
        self._sources = SourceCounts.of(contexts.tables(sources), values, pair, truth, n)
        self._lookups: dict[Out, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def codes(self, item: int, out: Out) -> np.ndarray:
        """Codes of the hashed tables at an item's cells, from demonstrations not in `out`: (tables, cells) uint8."""
        if out not in self._lookups:
            self._lookups[out] = self._colours.codes(out), *self._sources.best(out)
        code, best, classes = self._lookups[out]
        cells = self.cells.slices[item]
        contexts = self._sources.row[:, cells]
        values = self._sources.values
        value = values.reshape(-1).take(best.take(contexts) * values.shape[1] + np.arange(cells.start, cells.stop))
        known = classes.take(contexts)
        known[value == UNAVAILABLE] = 0
        from_sources = np.where(known > 0, value, np.uint8(0)) + np.uint8(10) * known
        return np.concatenate([code.take(self._colours.row[:, cells]), from_sources])


_FEATURES = sorted({name for table in TABLES[:NUM_HASHED_TABLES] for name in table.features})
_BY_LENGTH = sorted(range(NUM_HASHED_TABLES), key=lambda t: -len(TABLES[t].features))  # most features first
# For k = 0, 1, ...: the number of the k-th feature of those tables of `_BY_LENGTH` that have so many
_PARTS = [
    np.array([_FEATURES.index(TABLES[t].features[k]) for t in _BY_LENGTH if len(TABLES[t].features) > k])
    for k in range(len(TABLES[_BY_LENGTH[0]].features))
]
_PLACES = np.argsort(_BY_LENGTH)  # of each table in `_BY_LENGTH`


def _hashes(cells: OutputCells, values: np.ndarray) -> np.ndarray:
    """`combine` of every hashed table's features at every cell: (tables, N)."""
    feature = np.empty((len(_FEATURES), len(cells)), np.int64)
    for number, name in enumerate(_FEATURES):
        feature[number] = values[SOURCE_NUMBER[name[1:]]] if name[0] == "$" else cells.feature(name)
    hashes = (feature * KEYS[1000]).take(_PARTS[0], axis=0)
    for k, numbers in enumerate(_PARTS[1:], start=1001):
        hashes[: len(numbers)] += (feature * KEYS[k]).take(numbers, axis=0)
    return hashes.take(_PLACES, axis=0)


@dataclass(frozen=True, eq=False)
class Contexts:
    """Which cells look alike to each hashed table, as context numbers: 0 where the context occurs for one grid only."""

    number: np.ndarray  # (tables, N): of each cell
    width: np.ndarray  # (tables,): how many contexts a table has, number 0 included
    order: np.ndarray  # (tables, N): the cells by context, those of one context as they come
    ordered: np.ndarray  # (tables, N): `number` in that order

    @classmethod
    def of(cls, cells: OutputCells, values: np.ndarray) -> Contexts:
        """values: of all sources at the cells."""
        hashes, low = _hashes(cells, values), (1 << len(cells).bit_length()) - 1
        hashes &= ~low  # the cell's own number stands in the lowest bits, so that to sort is to order
        hashes |= np.arange(len(cells))
        hashes.sort(axis=1)
        order = hashes & low
        hashes &= ~low
        grid = cells.grid.take(order)
        first = np.ones(order.shape, bool)  # of the cells of its context, in this order
        first[:, 1:] = hashes[:, 1:] != hashes[:, :-1]
        group = first.reshape(-1).cumsum() - 1  # numbers the contexts of all tables
        crosses = np.zeros(order.shape, bool)  # cells of one context that follow each other, of two grids
        crosses[:, 1:] = ~first[:, 1:] & (grid[:, 1:] != grid[:, :-1])
        shared = np.bincount(group[crosses.reshape(-1)], minlength=int(group[-1]) + 1) > 0
        table_of = np.flatnonzero(first.reshape(-1)) // len(cells)
        number = np.cumsum(shared)
        before = np.concatenate([[0], number[np.cumsum(np.bincount(table_of)) - 1]])  # of earlier tables
        ordered = np.where(shared, number - before[table_of], 0).take(group).reshape(order.shape)
        contexts = np.empty_like(ordered)
        np.put_along_axis(contexts, order, ordered, axis=1)
        return cls(contexts, np.diff(before) + 1, order, ordered)

    @property
    def offset(self) -> np.ndarray:
        """(tables,): the row of each table's number 0, where all have theirs one after the other."""
        return np.cumsum(self.width) - self.width

    @property
    def row(self) -> np.ndarray:
        """(tables, N): each cell's row there."""
        return self.number + self.offset[:, None]

    def tables(self, chosen: slice) -> Contexts:
        """Those of some tables."""
        return Contexts(self.number[chosen], self.width[chosen], self.order[chosen], self.ordered[chosen])


class TaskEvidence:
    """All evidence of one task, computed from its demonstrations and its test inputs. Never receives a test output."""

    def __init__(self, train: Sequence[Pair], test_inputs: Sequence[Grid], feedback_pairs: int = 1):
        """feedback_pairs: of `planned_queries`; others are answered too, and take longer."""
        self.outputs = [np.asarray(pair.output) for pair in train]
        self.n, self._feedback_pairs = len(self.outputs), feedback_pairs
        grids = [np.asarray(pair.input) for pair in train] + [np.asarray(grid) for grid in test_inputs]
        self._canvas = Canvas(grids)
        self._programs = ProgramSearch(self._canvas, self.outputs)
        demos = [Demo(*_shape(grids[j]), *_shape(self.outputs[j]), j) for j in range(self.n)]
        self._sizes = SizeEvidence(self._canvas, demos, self._programs)
        self._choices: dict[tuple[int, Out], tuple[Size, np.ndarray, np.ndarray, np.ndarray]] = {}
        self._scores: dict[tuple[Out, int], np.ndarray] = {}
        self._kept_codes: dict[tuple[Item, Out], np.ndarray] = {}

    def query(
        self, *, held_out: int | None = None, test: int | None = None, without: int | None = None
    ) -> QueryEvidence:
        """Evidence for demonstration `held_out` from the others (less `without`), or for test input `test` from all.

        The true outputs of `held_out` and `without` enter no number that comes out. With no usable demonstration left
        the answer has the input's size, every class 0 and all statistics 0. Raises ValueError for a query that makes
        no sense.
        """
        if (held_out is None) == (test is None):
            raise ValueError("query: give exactly one of held_out and test")
        grid, out = self._plan(held_out, test, without)
        size, rule_sizes, rule_features, rule_logits = self._choose(grid, out)
        item = (grid, *size)
        counts = self._planned if item in self._planned.cells.items else self._count([item])
        return QueryEvidence(
            size=size,
            rule_sizes=rule_sizes,
            rule_features=rule_features,
            rule_logits=rule_logits,
            codes=self._codes(counts, counts.cells.items.index(item), out).reshape(NUM_TABLES, *size),
            table_stats=self._stats(out),
        )

    def _plan(self, held_out: int | None, test: int | None, without: int | None) -> tuple[int, Out]:
        """(index of the query's input grid, demonstrations that must not be used)."""
        out = tuple(sorted({i for i in (held_out, without) if i is not None}))
        tests = len(self._canvas.grids) - self.n
        if test is not None and not 0 <= test < tests:
            raise ValueError(f"query: no test input {test}, the task has {tests}")
        if any(not 0 <= i < self.n for i in out):
            raise ValueError(f"query: no demonstration {out}, the task has {self.n}")
        return (held_out if held_out is not None else self.n + (test or 0)), out

    def _choose(self, grid: int, out: Out) -> tuple[Size, np.ndarray, np.ndarray, np.ndarray]:
        if (grid, out) not in self._choices:
            self._choices[grid, out] = self._sizes.choose(grid, [j for j in range(self.n) if j not in out])
        return self._choices[grid, out]

    # -------------------------------------------------------------------------------------------------------- tables
    @cached_property
    def _planes(self) -> Planes:
        return all_planes(self._canvas)

    @cached_property
    def _planned(self) -> Counts:
        """Counts that serve every planned query."""
        return self._count([(grid, *self._choose(grid, out)[0]) for grid, out in self._plans])

    @cached_property
    def _plans(self) -> dict[tuple[int, Out], None]:
        """The planned queries, as `_plan` tells them, in order."""
        keys = planned_queries(self.n, len(self._canvas.grids) - self.n, self._feedback_pairs)
        return dict.fromkeys(self._plan(**arguments(key)) for key in keys)

    def _count(self, queries: Sequence[Item]) -> Counts:
        demonstrations = [(index, *_shape(output)) for index, output in enumerate(self.outputs)]
        items = list(dict.fromkeys([*demonstrations, *queries]))
        return Counts(OutputCells(self._canvas, self._planes, items, self._programs), self.outputs)

    def _codes(self, counts: Counts, item: int, out: Out) -> np.ndarray:
        """Codes of all tables at an item's cells, from the demonstrations not in `out`: (T, cells) uint8.

        Those of a planned query are kept: a demonstration is judged by them too, where its size was predicted rightly.
        """
        cells = counts.cells.items[item]
        codes = self._kept_codes.get((cells, out))
        if codes is None:
            codes = np.concatenate([counts.codes(item, out), self._program_codes(cells, out)])
            if (cells[0], out) in self._plans:
                self._kept_codes[cells, out] = codes
        return codes

    def _program_codes(self, item: Item, out: Out) -> np.ndarray:
        """Codes of the program tables; a program that fits is as sure as it has demonstrations to fit."""
        grid, height, width = item
        codes = np.zeros((NUM_PROGRAM_TABLES, height * width), np.uint8)
        usable = [j for j in range(self.n) if j not in out]
        certainty = SURE if len(usable) >= SURE_SIGHTINGS else PURE
        for row, answer in enumerate(self._programs.answers(grid, usable, (height, width), NUM_PROGRAM_TABLES)):
            codes[row] = answer.reshape(-1) + 10 * certainty
        return codes

    def _score(self, out: Out, judged: int) -> np.ndarray:
        """Cells of demonstration `judged` (a member of `out`) seen and right under each table: (2, T)."""
        if (out, judged) not in self._scores:
            codes = self._codes(self._planned, judged, out)
            above = codes - self.outputs[judged].reshape(-1).astype(np.uint8)  # 10 * class where the colour is right
            found = np.stack([codes > 0, (above == 10) | (above == 20) | (above == 30)])
            self._scores[out, judged] = np.bitwise_count(np.packbits(found, axis=2)).sum(2, dtype=np.int64)
        return self._scores[out, judged]

    def _stats(self, out: Out) -> np.ndarray:
        """Record of each table over the demonstrations not in `out`, each judged without itself: (T, 3).

        Accuracy over the cells it has seen the context of, share of such cells, share of demonstrations exactly right
        (1.0 is the perfect flag).
        """
        judged = [j for j in range(self.n) if j not in out]
        if len(judged) < 2:
            return np.zeros((NUM_TABLES, 3), np.float32)
        scores = np.stack([self._score(tuple(sorted((*out, j))), j) for j in judged])  # (judged, 2, T)
        seen, right = scores.sum(0)
        areas = np.array([self.outputs[j].size for j in judged])
        exact = (scores[:, 1] == areas[:, None]).mean(0)
        return np.stack([right / np.maximum(seen, 1), seen / areas.sum(), exact], axis=1).astype(np.float32)


def arguments(key: QueryKey) -> dict[str, int | None]:
    """The arguments of `TaskEvidence.query` for a key."""
    return {name: None if v < 0 else v for name, v in zip(("held_out", "test", "without"), key, strict=True)}


def _shape(grid: Grid) -> Size:
    return int(grid.shape[0]), int(grid.shape[1])
