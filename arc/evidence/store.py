"""The evidence of whole tasks: every planned query computed once, kept in memory and in a cache folder.

A cache file is the SHA-256 of its key and its content, the queries' output sizes (uint8 pairs), and the other arrays
of all queries one after the other in one zlib stream. Nothing in it says how much to read: that follows from the task.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from arc.evidence.counting import QueryKey, TaskEvidence, arguments, planned_queries
from arc.evidence.sizes import NUM_RULES
from arc.evidence.tables import NUM_TABLES
from arc.evidence.vote import QueryEvidence
from arc.run.files import replace_file
from arc.tasks import MAX_SIDE, Grid, Pair, Task

Arrays = dict[str, np.ndarray]

_DIGEST_BYTES = 32
_MAX_FILE_BYTES = 256 * 2**20  # a hundred times what the largest public task takes


def package_version() -> str:
    """16 hex digits over the content of this package's own files, so that whatever is edited (a cut, a constant, a
    fitted prior) never meets a cache entry of before."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    files = (path for path in folder.iterdir() if path.suffix in (".py", ".json") and path.name[0] != ".")
    for path in sorted(files, key=lambda path: path.name):  # without what an editor keeps beside a file
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


VERSION = package_version()


def evidence_key(task: Task, feedback_pairs: int = 1) -> str:
    """SHA-256 of the task's demonstrations, test inputs, VERSION (not of its id, not of any test output) and which
    queries are planned."""
    return hashlib.sha256(f"{VERSION} {feedback_pairs} {task.digest}".encode()).hexdigest()


class TaskQueries:
    """The evidence of all planned queries of one task; another query is computed when first asked for."""

    def __init__(self, task: Task, answers: dict[QueryKey, QueryEvidence], feedback_pairs: int = 1):
        """feedback_pairs: of `planned_queries`."""
        self._task, self._answers, self._feedback_pairs = task, answers, feedback_pairs

    @classmethod
    def compute(cls, task: Task, feedback_pairs: int = 1) -> TaskQueries:
        queries = cls(task, {}, feedback_pairs)
        evidence = queries._count()  # not kept: it is many times as large as what it says
        queries._answers.update((key, evidence.query(**arguments(key))) for key in queries.planned)
        return queries

    @property
    def planned(self) -> list[QueryKey]:
        return planned_queries(len(self._task.train), len(self._task.test), self._feedback_pairs)

    def held_out(self, index: int, without: int | None = None) -> QueryEvidence:
        """Demonstration `index` from the others, less `without`."""
        return self._answer((index, -1, -1 if without is None else without))

    def test(self, index: int) -> QueryEvidence:
        """Test input `index` from all demonstrations."""
        return self._answer((-1, index, -1))

    def _answer(self, key: QueryKey) -> QueryEvidence:
        if key not in self._answers:
            self._answers[key] = self._evidence.query(**arguments(key))
        return self._answers[key]

    @cached_property
    def _evidence(self) -> TaskEvidence:
        return self._count()

    def _count(self) -> TaskEvidence:
        return TaskEvidence(self._task.train, [pair.input for pair in self._task.test], self._feedback_pairs)

    def to_arrays(self) -> Arrays:
        """All planned answers as plain arrays, for `from_arrays`: Q queries, as `_layout` tells, and `sizes` (Q, 2)."""
        answers = [self._answers[key] for key in self.planned]
        return {
            "sizes": np.array([a.size for a in answers], np.uint8),
            "rule_sizes": np.stack([a.rule_sizes for a in answers]),
            "rule_features": np.stack([a.rule_features for a in answers]),
            "rule_logits": np.stack([a.rule_logits for a in answers]),
            "table_stats": np.stack([a.table_stats for a in answers]),
            "codes": np.concatenate([a.codes.reshape(NUM_TABLES, -1) for a in answers], axis=1),
        }

    @classmethod
    def from_arrays(cls, task: Task, arrays: Arrays, feedback_pairs: int = 1) -> TaskQueries:
        """Inverse of `to_arrays`, for arrays of the right shapes and types. Raises ValueError where a value is not one
        that evidence can have."""
        _check_values(arrays)
        sizes = arrays["sizes"].astype(np.int64)
        ends = np.cumsum(sizes.prod(1))
        queries = cls(task, {}, feedback_pairs)
        for q, key in enumerate(queries.planned):
            height, width = sizes[q].tolist()
            codes = np.ascontiguousarray(arrays["codes"][:, ends[q] - height * width : ends[q]])
            queries._answers[key] = QueryEvidence(
                size=(height, width),
                rule_sizes=arrays["rule_sizes"][q],
                rule_features=arrays["rule_features"][q],
                rule_logits=arrays["rule_logits"][q],
                codes=codes.reshape(NUM_TABLES, height, width),
                table_stats=arrays["table_stats"][q],
            )
        return queries


def _check_values(arrays: Arrays) -> None:
    """Raises ValueError where a stored value is not one that evidence can have."""
    codes, logits = arrays["codes"], arrays["rule_logits"]
    if codes.max(initial=0) >= 40 or ((codes > 0) & (codes < 10)).any():
        raise ValueError("codes are not colour 0..9 + 10 * class 0..3, colour 0 where the class is 0")
    if arrays["rule_sizes"].max(initial=0) > MAX_SIDE:
        raise ValueError(f"rule_sizes are not 0..{MAX_SIDE}")
    for name in ("rule_features", "table_stats"):
        if not ((arrays[name] >= 0) & (arrays[name] <= 1)).all():  # False for NaN
            raise ValueError(f"{name} are not shares of 0..1")
    if np.isnan(logits).any() or (logits == np.inf).any():
        raise ValueError("rule_logits are neither finite nor -inf")


# ----------------------------------------------------------------------------------------------------------------
# Cache files
# ----------------------------------------------------------------------------------------------------------------
def _layout(count: int, cells: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each stored array but the sizes, for `count` queries that have `cells` output cells in all."""
    return {
        "rule_sizes": ((count, NUM_RULES, 2), "u1"),
        "rule_features": ((count, NUM_RULES, 2), "<f4"),
        "rule_logits": ((count, NUM_RULES), "<f4"),
        "table_stats": ((count, NUM_TABLES, 3), "<f4"),
        "codes": ((NUM_TABLES, cells), "u1"),
    }


def pack(arrays: Arrays) -> bytes:
    """The content of a cache file, compressed lightly (seconds matter more than bytes)."""
    layout = _layout(len(arrays["sizes"]), arrays["codes"].shape[1])
    rest = b"".join(arrays[name].astype(dtype, copy=False).tobytes() for name, (_, dtype) in layout.items())
    return arrays["sizes"].tobytes() + zlib.compress(rest, level=1)


def unpack(content: bytes, count: int) -> Arrays:
    """Inverse of `pack` for `count` queries; the arrays are read-only.

    Raises ValueError or zlib.error unless the content is exactly as long as its sizes demand: no more is ever
    decompressed.
    """
    sizes = np.frombuffer(content[: 2 * count], np.uint8)
    if len(sizes) != 2 * count or not ((sizes >= 1) & (sizes <= MAX_SIDE)).all():
        raise ValueError(f"sizes are not {count} pairs of 1..{MAX_SIDE}")
    sizes = sizes.reshape(count, 2)
    layout = _layout(count, int(sizes.astype(np.int64).prod(1).sum()))
    lengths = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in layout.items()}
    total = sum(lengths.values())
    stream = zlib.decompressobj()
    rest = stream.decompress(content[2 * count :], total + 1)
    if len(rest) != total or not stream.eof or stream.unused_data:
        raise ValueError(f"the arrays do not have {total} bytes")
    arrays, start = {"sizes": sizes}, 0
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.frombuffer(rest, dtype, int(np.prod(shape)), start).reshape(shape)
        start += lengths[name]
    return arrays


def sign(key: str, content: bytes) -> bytes:
    """SHA-256 over cache key and content, the first bytes of every cache file."""
    return hashlib.sha256(key.encode() + content).digest()


class EvidenceStore:
    """Evidence by task: computed once, the latest `max_tasks_in_memory` kept in memory, all of them in `cache_dir`.

    A cache file is trusted only after its digest, then shapes and values, have been checked; else all is computed anew.
    feedback_pairs: so many of each query are planned (`planned_queries`); more are computed when asked for, not cached.
    """

    def __init__(self, cache_dir: Path | str | None, feedback_pairs: int = 1, max_tasks_in_memory: int = 2000):
        self.cache_dir, self.feedback_pairs = None if cache_dir is None else Path(cache_dir), feedback_pairs
        self.max_tasks_in_memory = max_tasks_in_memory
        self._memory: OrderedDict[str, TaskQueries] = OrderedDict()

    def is_prepared(self, task: Task) -> bool:
        """Whether `get` will find the task's evidence without computing it (a damaged cache file aside)."""
        key = evidence_key(task, self.feedback_pairs)
        path = self._path(key)
        with contextlib.suppress(OSError):  # a folder that may not be looked into
            return key in self._memory or (path is not None and path.exists())
        return False

    def get(self, task: Task) -> TaskQueries:
        """The task's evidence, from memory, from disk or computed."""
        key = evidence_key(task, self.feedback_pairs)
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        queries = self._read(key, task)
        if queries is None:
            queries = TaskQueries.compute(task, self.feedback_pairs)
            self._write(key, queries)
        self._memory[key] = queries
        while len(self._memory) > max(1, self.max_tasks_in_memory):
            self._memory.popitem(last=False)
        return queries

    def passing(self, task: Task) -> TaskQueries:
        """The evidence of a task that will not come again: computed, and kept nowhere."""
        return TaskQueries(task, {})

    def _path(self, key: str) -> Path | None:
        return None if self.cache_dir is None else self.cache_dir / f"{key}.evidence"

    def _read(self, key: str, task: Task) -> TaskQueries | None:
        """The stored answers, or None where there is no file or not exactly the one that was written for this key."""
        path = self._path(key)
        if path is None:
            return None
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
                return None
            stored = path.read_bytes()
        except OSError:
            return None
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if digest != sign(key, content):
            return None
        try:
            count = len(planned_queries(len(task.train), len(task.test), self.feedback_pairs))
            return TaskQueries.from_arrays(task, unpack(content, count), self.feedback_pairs)
        except (ValueError, zlib.error):  # well signed, but nothing that `pack` makes of this task's evidence
            return None

    def _write(self, key: str, queries: TaskQueries) -> None:
        path = self._path(key)
        if path is None:
            return
        content = pack(queries.to_arrays())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, sign(key, content) + content, sync=False)  # `_read` knows a torn one
        except OSError as error:
            problem = f"evidence cache {self.cache_dir} cannot be written ({error}); going on without it"
            warnings.warn(problem, stacklevel=3)
            self.cache_dir = None


# ----------------------------------------------------------------------------------------------------------------
# No evidence
# ----------------------------------------------------------------------------------------------------------------
def silence(grid: Grid, demonstrations: Sequence[Pair] = ()) -> QueryEvidence:
    """What is said about input `grid` (H, W) where nothing is known: the output has the input's size, no table and no
    size rule speaks, every record is 0. An agent that starts from it has no vote, and a canvas with room for whatever
    size it decides on, as far as the `demonstrations` let expect it."""
    height, width = grid.shape
    return QueryEvidence(
        size=(int(height), int(width)),
        rule_sizes=np.zeros((NUM_RULES, 2), np.uint8),
        rule_features=np.zeros((NUM_RULES, 2), np.float32),
        rule_logits=np.full(NUM_RULES, -np.inf, np.float32),
        codes=np.zeros((NUM_TABLES, height, width), np.uint8),
        table_stats=np.zeros((NUM_TABLES, 3), np.float32),
        room=room_for(grid, demonstrations),
        silent=True,
    )


def room_for(grid: Grid, demonstrations: Sequence[Pair]) -> tuple[int, int]:
    """Rows and columns of a canvas for the output of `grid` (H, W): on each axis the longest of the input, of the
    demonstrations' outputs, and of what comes out if the output is a multiple of a side of the input, the same in all
    demonstrations."""
    sizes = [(pair.input.shape, pair.output.shape) for pair in demonstrations if pair.output is not None]
    room = []
    for axis in (0, 1):
        sides = [grid.shape[axis], *(after[axis] for _, after in sizes)]
        for source in (0, 1):
            ratios = [(after[axis], before[source]) for before, after in sizes]
            if ratios and all(a * ratios[0][1] == b * ratios[0][0] for a, b in ratios):
                sides.append(-(-ratios[0][0] * grid.shape[source] // ratios[0][1]))
        room.append(min(MAX_SIDE, max(sides)))
    return room[0], room[1]


class SilentQueries(TaskQueries):
    """A task about which no demonstration proves anything."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, {})

    def _answer(self, key: QueryKey) -> QueryEvidence:
        held_out, test, without = key
        asked = self._task.train[held_out] if held_out >= 0 else self._task.test[test]
        others = [pair for number, pair in enumerate(self._task.train) if number not in (held_out, without)]
        return silence(asked.input, others)


class NoEvidence(EvidenceStore):
    """`--no_evidence`: stands where the evidence is asked for and has none, so that none can reach anything; nothing is
    computed and nothing cached."""

    def __init__(self) -> None:
        super().__init__(None)

    def is_prepared(self, task: Task) -> bool:
        return True

    def get(self, task: Task) -> TaskQueries:
        return SilentQueries(task)

    def passing(self, task: Task) -> TaskQueries:
        return SilentQueries(task)
