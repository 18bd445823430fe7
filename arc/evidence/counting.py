"""In-context evidence: what the demonstrations of a task prove about each cell of an output, without any training.

A *table* maps the context of an output cell (a hash of some features, `canvas.py`) to an outcome counted over
the demonstrations: a colour (kind "colour"), or the source that reproduces the true colour there (kind "source",
`sources.py`). Contexts depend on input grids and output sizes alone; outcomes are counted per demonstration, so
any set of demonstrations is left out by subtracting its counts. That is how a query is answered without its own
output, how each table is judged on demonstrations it has not seen, and why no test output can leak: this module
never receives one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from arc.evidence.canvas import UNAVAILABLE, Canvas, OutputCells, combine
from arc.evidence.changes import CHANGES
from arc.evidence.cuts import CUTS
from arc.evidence.programs import ProgramSearch
from arc.evidence.sizes import ALL_WEIGHT, FRACTION_WEIGHT, NUM_RULES, SIZE_RULES, Demo, Size, SizeEvidence
from arc.evidence.sources import NUM_SOURCES, SOURCES, source_values
from arc.evidence.tables import NUM_COLOUR_TABLES, NUM_PROGRAM_TABLES, NUM_SOURCE_TABLES, NUM_TABLES, TABLES

_REVISION = 3  # raise it when the meaning of a plane, anchor, source, rule or of the stored format changes


def _version() -> str:
    """Revision and a digest of everything declared, so that a new table or rule never meets an old cache file."""
    declared = [repr(table) for table in TABLES] + [source.name for source in SOURCES] + list(CHANGES) + list(CUTS)
    declared += [f"{rule.name} {rule.prior}" for rule in SIZE_RULES] + [f"{FRACTION_WEIGHT} {ALL_WEIGHT}"]
    return f"{_REVISION}-{hashlib.sha256(chr(10).join(declared).encode()).hexdigest()[:16]}"


VERSION = _version()
UNSEEN, MIXED, PURE, SURE = range(4)  # classes of a code; SURE: one outcome only, sighted at least SURE_SIGHTINGS times
SURE_SIGHTINGS = 3
CLASS_WEIGHTS = np.array([0.0, 0.01, 0.5, 1.0], np.float32)  # how much a vote of each class counts


NUM_HASHED_TABLES = NUM_COLOUR_TABLES + NUM_SOURCE_TABLES
_SOURCE_NUMBER = {source.name: number for number, source in enumerate(SOURCES)}
_KIND_WEIGHTS = np.ones(NUM_TABLES, np.float32)
_KIND_WEIGHTS[NUM_HASHED_TABLES:] = (10.0, 3.0, 1.0)


class PairLike(Protocol):
    """What is needed of a demonstration pair (`arc.tasks.Pair`): two (H, W) uint8 grids."""

    @property
    def input(self) -> np.ndarray: ...

    @property
    def output(self) -> np.ndarray | None: ...


def table_weights(stats: np.ndarray) -> np.ndarray:
    """Vote weight of each table from its held-out statistics (T, 3); constants chosen on the development split."""
    accuracy, coverage, exact = stats[:, 0], stats[:, 1], stats[:, 2]
    weight = coverage**2 * (10 * exact**4 + 3 * (exact == 1) + np.exp(100 * (accuracy - 1))) + 1e-6
    return (weight * _KIND_WEIGHTS).astype(np.float32)


@dataclass(frozen=True, eq=False)
class QueryEvidence:
    """Everything the demonstrations say about one query: arrays described in the field comments."""

    size: Size  # predicted output (h, w)
    rule_sizes: np.ndarray  # (R, 2) uint8: what each size rule says, 0 where silent
    rule_features: np.ndarray  # (R, 2) float32: fraction of usable demonstrations consistent with the rule, all of them
    rule_logits: np.ndarray  # (R,) float32: score of the rule in the choice of `size`, -inf where it does not apply
    codes: np.ndarray  # (T, h, w) uint8: colour + 10 * class for each table and output cell
    table_stats: np.ndarray  # (T, 3) float32: held-out accuracy where seen, coverage, share of pairs exactly right

    def weights(self) -> np.ndarray:
        """(T,) float32: vote weight of each table for this query, times `CLASS_WEIGHTS` of a cell's class."""
        complete = (self.codes >= 10 * PURE).mean((1, 2))  # (T,) share of cells where the table has one answer only
        return (table_weights(self.table_stats) * complete**4).astype(np.float32)

    def vote(self) -> tuple[np.ndarray, np.ndarray]:
        """Training-free answer: the (h, w) uint8 grid with most votes and the votes (10, h, w) float32."""
        colour, share = self.codes % 10, CLASS_WEIGHTS[self.codes // 10] * self.weights()[:, None, None]
        votes = np.zeros((10, *self.size), np.float32)
        for c in range(10):
            votes[c] = (share * (colour == c)).sum(0)
        return votes.argmax(0).astype(np.uint8), votes

    def dissent(self, answer: np.ndarray) -> np.ndarray | None:
        """The best other answer than `answer` (h, w) that tables give as a whole grid: of those with something to say
        about every cell, equal grids' weights added up. None if they all agree.

        Not the second choice cell by cell: a table that is right in every cell but outvoted keeps its cells together.
        """
        tables = len(self.codes)
        colour = (self.codes % 10).reshape(tables, -1)
        differs = (self.codes >= 10).all((1, 2)) & (colour != answer.reshape(-1)).any(1)
        if not differs.any():
            return None
        grids, which = np.unique(colour[differs], axis=0, return_inverse=True)
        totals = np.bincount(which.reshape(-1), weights=self.weights()[differs])
        return grids[totals.argmax()].reshape(answer.shape).astype(np.uint8)


class TaskEvidence:
    """All evidence of one task, computed from its demonstrations and its test inputs. Never receives a test output."""

    def __init__(self, train: Sequence[PairLike], test_inputs: Sequence[np.ndarray]):
        self.n = len(train)
        self.outputs = [np.asarray(pair.output) for pair in train]
        grids = [np.asarray(pair.input) for pair in train] + [np.asarray(grid) for grid in test_inputs]
        self.canvas = Canvas(grids)
        self.programs = ProgramSearch(grids[: self.n], self.outputs, grids[self.n :])
        demos = [Demo(*_shape(grids[j]), *_shape(self.outputs[j]), j) for j in range(self.n)]
        self.sizes = SizeEvidence(self.canvas, demos, self.programs)
        self._choices: dict[tuple[int, tuple[int, ...]], tuple] = {}
        planned = [self._plan(**_arguments(key)) for key in planned_queries(self.n, len(test_inputs))]
        items = [(i, *output.shape) for i, output in enumerate(self.outputs)]
        self._build(items + [(grid, *self._choose(grid, out)[0]) for grid, out in planned])

    # ------------------------------------------------------------------------------------------------------ queries
    def query(
        self, *, held_out: int | None = None, test: int | None = None, without: int | None = None
    ) -> QueryEvidence:
        """Evidence for demonstration `held_out` from the others (less `without`), or for test input `test` from all.

        The true outputs of `held_out` and `without` enter no number that comes out. With no usable demonstration left
        the answer has the input's size, every class 0 and all statistics 0.
        """
        if (held_out is None) == (test is None):
            raise ValueError("query: give exactly one of held_out and test")
        grid, out = self._plan(held_out, test, without)
        size, rule_sizes, rule_features, rule_logits = self._choose(grid, out)
        item = (grid, *size)
        if item not in self.items:
            self._build([*self.items, item])
        codes = self._predict(out, self.items.index(item))
        return QueryEvidence(
            size=size,
            rule_sizes=rule_sizes,
            rule_features=rule_features,
            rule_logits=rule_logits,
            codes=codes.reshape(NUM_TABLES, *size),
            table_stats=self._stats(out),
        )

    def _plan(self, held_out: int | None, test: int | None, without: int | None) -> tuple[int, tuple[int, ...]]:
        """(index of the query's input grid, demonstrations that must not be used)."""
        out = tuple(sorted({i for i in (held_out, without) if i is not None}))
        if test is not None and not 0 <= test < len(self.canvas.grids) - self.n:
            raise ValueError(f"query: no test input {test}, the task has {len(self.canvas.grids) - self.n}")
        if any(not 0 <= i < self.n for i in out):
            raise ValueError(f"query: no demonstration {out}, the task has {self.n}")
        return (held_out if held_out is not None else self.n + (test or 0)), out

    def _choose(self, grid: int, out: tuple[int, ...]) -> tuple[Size, np.ndarray, np.ndarray, np.ndarray]:
        if (grid, out) not in self._choices:
            self._choices[grid, out] = self.sizes.choose(grid, [j for j in range(self.n) if j not in out])
        return self._choices[grid, out]

    # -------------------------------------------------------------------------------------------------------- tables
    def _build(self, items: Sequence[tuple[int, int, int]]) -> None:
        """Contexts, sources and counts over the demonstrations' cells and the queries' cells."""
        self.items = list(dict.fromkeys(items))
        if len(self.items) < self.n:
            raise AssertionError("demonstration items must be distinct")
        self.cells = OutputCells(self.canvas, self.items, self.programs.result)
        self.demo_cells = slice(0, int(self.cells.starts[self.n]))
        self.truth = np.concatenate([output.reshape(-1) for output in self.outputs])
        self.pair = self.cells.grid[self.demo_cells]
        self._lookups: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._scores: dict[tuple[tuple[int, ...], int], np.ndarray] = {}
        self.all_values = source_values(self.cells).astype(np.int64)
        self.context = self._contexts()
        self._count_colours()
        self._count_sources()

    def _contexts(self) -> np.ndarray:
        """Context number of every cell under every table, (T, N): 0 where the context occurs for one grid only."""
        names = sorted({name for table in TABLES for name in table.features})
        feature = {n: self.all_values[_SOURCE_NUMBER[n[1:]]] if n[0] == "$" else self.cells.feature(n) for n in names}
        contexts = np.empty((NUM_HASHED_TABLES, len(self.cells)), np.int64)
        self.width = np.empty(NUM_HASHED_TABLES, np.int64)  # contexts of each table, the unshared one included
        grids = len(self.canvas.grids)
        for t, table in enumerate(TABLES[:NUM_HASHED_TABLES]):
            _, inverse = np.unique(combine([feature[name] for name in table.features]), return_inverse=True)
            present = np.bincount(inverse * grids + self.cells.grid, minlength=(inverse.max() + 1) * grids) > 0
            shared = present.reshape(-1, grids).sum(1) > 1
            contexts[t] = np.where(shared, np.cumsum(shared), 0)[inverse]
            self.width[t] = shared.sum() + 1
        return contexts

    def _count_colours(self) -> None:
        """Sightings of each colour: (contexts of all colour tables, n, 10)."""
        tables = slice(0, NUM_COLOUR_TABLES)
        offset = np.concatenate([[0], np.cumsum(self.width[tables])])
        self.colour_id = self.context[tables] + offset[:-1, None]
        flat = (self.colour_id[:, self.demo_cells] * self.n + self.pair) * 10 + self.truth
        counts = np.bincount(flat.reshape(-1), minlength=int(offset[-1]) * self.n * 10)
        counts = counts.reshape(-1, self.n, 10).astype(np.int16)  # one demonstration has at most 900 cells
        counts[offset[:-1]] = 0
        self.colour_counts, self.colour_total = counts, counts.sum(1, dtype=np.int32)

    def _count_sources(self) -> None:
        """Sightings (contexts, n) and hits of each source (contexts, n, S) over all source tables."""
        values = self.all_values.astype(np.uint8)
        useful = (values != UNAVAILABLE).any(1)
        first = np.unique(values, axis=0, return_index=True)[1]  # of equal sources only the first can be chosen
        useful &= np.isin(np.arange(NUM_SOURCES), first)
        self.values = values[useful]  # (S', N)
        tables = slice(NUM_COLOUR_TABLES, NUM_HASHED_TABLES)
        offset = np.concatenate([[0], np.cumsum(self.width[tables])])
        self.source_id = self.context[tables] + offset[:-1, None]
        hit = (self.values[:, self.demo_cells] == self.truth).T  # (N_demo, S)
        rows = int(offset[-1]) * self.n
        hits = np.zeros((rows, len(self.values)), np.int16)
        flat = self.source_id[:, self.demo_cells] * self.n + self.pair  # (tables, N_demo)
        seen = np.bincount(flat.reshape(-1), minlength=rows).astype(np.int16).reshape(-1, self.n)
        for t in range(NUM_SOURCE_TABLES):
            cells = np.flatnonzero(self.context[NUM_COLOUR_TABLES + t, self.demo_cells])
            cells = cells[np.argsort(flat[t, cells], kind="stable")]
            if len(cells):
                key = flat[t, cells]
                starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
                hits[key[starts]] = np.add.reduceat(hit[cells], starts, axis=0, dtype=np.int16)
        seen[offset[:-1]] = 0
        self.source_seen, self.source_hits = seen, hits.reshape(-1, self.n, len(self.values))
        self.seen_total, self.hits_total = seen.sum(1, dtype=np.int32), self.source_hits.sum(1, dtype=np.int32)

    def _lookup(self, out: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Without demonstrations `out`: code of each colour context, best source and class of each source context."""
        if out not in self._lookups:
            left = list(out)  # at most three: less to subtract than the others would be to add up
            colours = self.colour_total - self.colour_counts[:, left].sum(1, dtype=np.int32)  # (contexts, 10)
            code = colours.argmax(1) + 10 * _classes(colours.max(1), colours.sum(1))
            hits = self.hits_total - self.source_hits[:, left].sum(1, dtype=np.int32)  # (contexts, S)
            best = hits.argmax(1)
            most = np.take_along_axis(hits, best[:, None], axis=1)[:, 0]
            classes = _classes(most, self.seen_total - self.source_seen[:, left].sum(1, dtype=np.int32))
            self._lookups[out] = code.astype(np.uint8), best, classes.astype(np.uint8)
        return self._lookups[out]

    def _predict(self, out: tuple[int, ...], item: int) -> np.ndarray:
        """Codes of all tables at an item's cells, from the demonstrations not in `out`: (T, cells) uint8."""
        cells = self.cells.slice(item)
        code, best, classes = self._lookup(out)
        contexts = self.source_id[:, cells]
        value = self.values[best[contexts], np.arange(cells.start, cells.stop)]
        known = np.where(value == UNAVAILABLE, 0, classes[contexts])
        from_sources = np.where(known > 0, value, 0) + 10 * known
        from_programs = self._program_codes(out, item)
        return np.concatenate([code[self.colour_id[:, cells]], from_sources.astype(np.uint8), from_programs])

    def _program_codes(self, out: tuple[int, ...], item: int) -> np.ndarray:
        """Codes of the program tables; a program that fits is as sure as it has demonstrations to fit."""
        grid, height, width = self.items[item]
        codes = np.zeros((NUM_PROGRAM_TABLES, height * width), np.uint8)
        usable = [j for j in range(self.n) if j not in out]
        certainty = SURE if len(usable) >= SURE_SIGHTINGS else PURE
        for row, answer in enumerate(self.programs.answers(grid, usable, (height, width), NUM_PROGRAM_TABLES)):
            codes[row] = answer.reshape(-1) + 10 * certainty
        return codes

    def _score(self, out: tuple[int, ...], judged: int) -> np.ndarray:
        """Cells of demonstration `judged` (a member of `out`) seen and right under each table: (2, T)."""
        if (out, judged) not in self._scores:
            cells = self.cells.slice(judged)
            codes = self._predict(out, judged)
            seen = codes >= 10
            right = seen & (codes % 10 == self.truth[cells])
            self._scores[out, judged] = np.stack([seen.sum(1), right.sum(1)])
        return self._scores[out, judged]

    def _stats(self, out: tuple[int, ...]) -> np.ndarray:
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


def _shape(grid: np.ndarray) -> Size:
    return int(grid.shape[0]), int(grid.shape[1])


def _classes(most: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Class of a context from the count of its commonest outcome and of all its sightings."""
    return np.where(seen == 0, UNSEEN, np.where(most < seen, MIXED, np.where(seen < SURE_SIGHTINGS, PURE, SURE)))


def feedback_indices(n: int, held_out: int | None, limit: int = 2) -> tuple[int, ...]:
    """Demonstrations that serve as feedback for a query: those after it, cyclically; for a test query the first."""
    if held_out is None:
        return tuple(range(min(n, limit)))
    return tuple((held_out + step) % n for step in range(1, min(n - 1, limit) + 1))


# ----------------------------------------------------------------------------------------------------------------
# Store: every query of a task computed once, kept in memory and on disk
# ----------------------------------------------------------------------------------------------------------------
class TaskLike(Protocol):
    """What is needed of a task (`arc.tasks.Task`). Test outputs are never read."""

    @property
    def train(self) -> Sequence[PairLike]: ...

    @property
    def test(self) -> Sequence[PairLike]: ...


QueryKey = tuple[int, int, int]  # (held_out, test, without), -1 for None


def planned_queries(n: int, tests: int) -> list[QueryKey]:
    """What training and evaluation ask for: each demonstration, each feedback pair of a query, each test input."""
    plain = [(i, -1, -1) for i in range(n)]
    feedback = [(k, -1, i) for i in range(n) for k in feedback_indices(n, i)]
    return plain + feedback + [(-1, j, -1) for j in range(tests)]


class TaskQueries:
    """The evidence of all planned queries of one task; another query is computed when first asked for."""

    def __init__(self, task: TaskLike, answers: dict[QueryKey, QueryEvidence]):
        self._task, self._answers = task, answers

    @classmethod
    def compute(cls, task: TaskLike) -> TaskQueries:
        evidence = _evidence_of(task)
        keys = planned_queries(len(task.train), len(task.test))
        return cls(task, {key: evidence.query(**_arguments(key)) for key in keys})

    def held_out(self, index: int, without: int | None = None) -> QueryEvidence:
        """Demonstration `index` from the others, less `without`."""
        return self._answer((index, -1, -1 if without is None else without))

    def test(self, index: int) -> QueryEvidence:
        """Test input `index` from all demonstrations."""
        return self._answer((-1, index, -1))

    def _answer(self, key: QueryKey) -> QueryEvidence:
        if key not in self._answers:
            self._answers[key] = _evidence_of(self._task).query(**_arguments(key))
        return self._answers[key]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All planned answers as plain arrays, for `from_arrays`."""
        answers = [self._answers[key] for key in planned_queries(len(self._task.train), len(self._task.test))]
        return {
            "sizes": np.array([a.size for a in answers], np.uint8),
            "rule_sizes": np.stack([a.rule_sizes for a in answers]),
            "rule_features": np.stack([a.rule_features for a in answers]),
            "rule_logits": np.stack([a.rule_logits for a in answers]),
            "table_stats": np.stack([a.table_stats for a in answers]),
            "codes": np.concatenate([a.codes.reshape(NUM_TABLES, -1) for a in answers], axis=1),
        }

    @classmethod
    def from_arrays(cls, task: TaskLike, arrays: dict[str, np.ndarray]) -> TaskQueries:
        """Inverse of `to_arrays`; ValueError where a shape, type or value is not what it must be."""
        keys = planned_queries(len(task.train), len(task.test))
        count = len(keys)
        sizes = arrays["sizes"]
        if sizes.shape != (count, 2) or sizes.dtype != np.uint8 or sizes.min() < 1 or sizes.max() > 30:
            raise ValueError("sizes are not (queries, 2) uint8 in 1..30")
        areas = sizes.astype(np.int64).prod(1)
        expected = {
            "rule_sizes": ((count, NUM_RULES, 2), np.uint8),
            "rule_features": ((count, NUM_RULES, 2), np.float32),
            "rule_logits": ((count, NUM_RULES), np.float32),
            "table_stats": ((count, NUM_TABLES, 3), np.float32),
            "codes": ((NUM_TABLES, int(areas.sum())), np.uint8),
        }
        for name, (shape, dtype) in expected.items():
            if arrays[name].shape != shape or arrays[name].dtype != dtype:
                raise ValueError(f"{name} is {arrays[name].shape} {arrays[name].dtype}, not {shape} {np.dtype(dtype)}")
        ends = np.cumsum(areas)
        answers = {}
        for q, key in enumerate(keys):
            size = (int(sizes[q, 0]), int(sizes[q, 1]))
            codes = np.ascontiguousarray(arrays["codes"][:, ends[q] - areas[q] : ends[q]])
            answers[key] = QueryEvidence(
                size=size,
                rule_sizes=arrays["rule_sizes"][q],
                rule_features=arrays["rule_features"][q],
                rule_logits=arrays["rule_logits"][q],
                codes=codes.reshape(NUM_TABLES, *size),
                table_stats=arrays["table_stats"][q],
            )
        return cls(task, answers)


def _evidence_of(task: TaskLike) -> TaskEvidence:
    return TaskEvidence(task.train, [pair.input for pair in task.test])


def _arguments(key: QueryKey) -> dict[str, int | None]:
    return {name: None if v < 0 else v for name, v in zip(("held_out", "test", "without"), key, strict=True)}


def evidence_key(task: TaskLike) -> str:
    """SHA-256 of the task's demonstrations, test inputs and VERSION (not of its id, not of any test output)."""
    digest = hashlib.sha256(VERSION.encode())
    grids = [grid for pair in task.train for grid in (pair.input, pair.output)] + [pair.input for pair in task.test]
    digest.update(f"{len(task.train)} {len(task.test)}".encode())
    for grid in grids:
        cells = np.ascontiguousarray(grid, np.uint8)
        digest.update(f" {cells.shape} ".encode() + cells.tobytes())
    return digest.hexdigest()


class EvidenceStore:
    """Evidence by task: computed once, the latest `max_tasks_in_memory` kept in memory, all of them in `cache_dir`.

    A cache file is trusted only after its digest, then shapes and types, have been checked; else all is computed anew.
    """

    def __init__(self, cache_dir: Path | None, max_tasks_in_memory: int = 2000):
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.max_tasks_in_memory = max_tasks_in_memory
        self._memory: OrderedDict[str, TaskQueries] = OrderedDict()

    def is_prepared(self, task: TaskLike) -> bool:
        """Whether `get` will find the task's evidence without computing it (a damaged cache file aside)."""
        key = evidence_key(task)
        path = self._path(key)
        return key in self._memory or (path is not None and path.exists())

    def get(self, task: TaskLike) -> TaskQueries:
        """The task's evidence, from memory, from disk or computed."""
        key = evidence_key(task)
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        queries = self._read(key, task)
        if queries is None:
            queries = TaskQueries.compute(task)
            self._write(key, queries)
        self._memory[key] = queries
        while len(self._memory) > max(1, self.max_tasks_in_memory):
            self._memory.popitem(last=False)
        return queries

    def _path(self, key: str) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / f"{key}.evidence"

    def _read(self, key: str, task: TaskLike) -> TaskQueries | None:
        """The stored answers, or None where there is no file or not exactly the one that was written for this key."""
        path = self._path(key)
        try:
            content = b"" if path is None else path.read_bytes()
        except OSError:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != _digest(key, payload):
            return None
        try:
            with np.load(io.BytesIO(payload), allow_pickle=False) as stored:
                return TaskQueries.from_arrays(task, dict(stored))
        except (ValueError, KeyError, OSError, TypeError, zipfile.BadZipFile):  # well signed, but of another layout
            return None

    def _write(self, key: str, queries: TaskQueries) -> None:
        path = self._path(key)
        if path is None:
            return
        payload = _packed(queries.to_arrays())
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_digest(key, payload) + payload)
            os.replace(temporary, path)
        except OSError as error:
            problem = f"evidence cache {self.cache_dir} cannot be written ({error}); going on without it"
            warnings.warn(problem, stacklevel=3)
            self.cache_dir = None
            with contextlib.suppress(OSError):
                temporary.unlink()


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays as an .npz, compressed lightly (seconds matter more than bytes)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


_DIGEST_BYTES = 32


def _digest(key: str, payload: bytes) -> bytes:
    """SHA-256 over cache key and content, the first bytes of every cache file."""
    return hashlib.sha256(key.encode() + payload).digest()
