"""Generated tasks: every rule against a second, independent one; purity; nothing open; what is new is new."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, metrics
from rules_of_families import RULES

from arc.datasets import load_dataset
from arc.generate import (
    BASIC,
    FAMILIES,
    HELD_OUT,
    KNOWN,
    TESTS,
    UNSEEN,
    UNSEEN_FAMILY,
    UNSEEN_TASK,
    FreshTasks,
    generated_dataset,
    origin,
    pair,
    task,
)
from arc.generate.family import Family, Fixed, is_test_input, same
from arc.run.files import UserError
from arc.tasks import Grid, Pair, Task, drop_duplicates, parse_grid
from trainloop_complete_with_fixes import main, parse_arguments

NAMES = sorted(FAMILIES)


def drawn(name: str, max_side: int, tasks: int, pairs: int, seed: int = 0) -> list[tuple[Fixed, Pair]]:
    """Pairs of some tasks of a family, every fourth one a test pair."""
    return [
        (FAMILIES[name].fixed(seed, index), pair(seed, name, index, number, max_side=max_side, test=number % 4 == 3))
        for index in range(tasks)
        for number in range(pairs)
    ]


def output(found: Pair) -> Grid:
    assert found.output is not None
    return found.output


def digest(tasks: Sequence[Task]) -> str:
    """Over everything, ids and test outputs too."""
    total = hashlib.sha256()
    for one in tasks:
        total.update(f"{one.id} {len(one.train)} {len(one.test)}".encode())
        for found in (*one.train, *one.test):
            for grid in (found.input, output(found)):
                total.update(bytes(grid.shape) + grid.tobytes())
    return total.hexdigest()


def settings(tasks: Sequence[Task], seed: int) -> set[tuple[str, Fixed]]:
    return {(name, FAMILIES[name].fixed(seed, index)) for name, index in map(origin_of, tasks)}


# --------------------------------------------------------------------------------------------------------------------
# the families


def test_there_are_many_families_under_names_of_their_own() -> None:
    assert len(NAMES) >= 30 and len({family.meaning for family in FAMILIES.values()}) == len(NAMES)
    assert len(BASIC) == len(set(BASIC)) == 12 and set(BASIC) <= set(KNOWN)
    assert len(HELD_OUT) == 6 and set(KNOWN) | set(HELD_OUT) == set(NAMES) and not set(KNOWN) & set(HELD_OUT)
    assert all(name == family.name for name, family in FAMILIES.items())
    assert set(RULES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_rule_reproduces_every_output(name: str) -> None:
    for max_side, tasks, pairs in ((6, 10, 6), (10, 6, 4), (30, 4, 4)):
        for fixed, found in drawn(name, max_side, tasks, pairs):
            again = RULES[name](found.input.tolist(), *fixed)
            assert again == output(found).tolist(), (fixed, found.input)


@pytest.mark.parametrize("max_side", [6, 10, 30])
@pytest.mark.parametrize("name", NAMES)
def test_grids_are_valid_and_as_small_as_asked_for(name: str, max_side: int) -> None:
    for _, found in drawn(name, max_side, tasks=3, pairs=4, seed=1):
        for grid in (found.input, output(found)):
            assert grid.dtype == np.uint8 and not grid.flags.writeable and grid.flags.c_contiguous
            assert same(parse_grid(grid.tolist()), grid)
            assert max(grid.shape) <= max_side
        assert not same(found.input, output(found))


def test_larger_sides_are_used() -> None:
    for name in NAMES:
        largest = max(max(found.input.shape + output(found).shape) for _, found in drawn(name, 30, 2, 8))
        assert largest >= (9 if name == "fractal" else 15), name


@pytest.mark.parametrize("name", NAMES)
def test_successive_tasks_fix_all_there_is_each_once(name: str) -> None:
    family = FAMILIES[name]
    count = min(family.settings, 300)
    seen = [family.fixed(3, index) for index in range(count)]
    assert len(set(seen)) == count
    assert {fixed.variant for fixed in seen} == set(family.variants)
    assert family.fixed(3, family.settings) == seen[0]
    for colours, palette, _ in seen:
        both = colours + palette
        assert len(set(both)) == len(both) == family.colours + family.palette and 0 not in both


# --------------------------------------------------------------------------------------------------------------------
# nothing open


def others(family: Family, fixed: Fixed, rng: np.random.Generator) -> list[Fixed]:
    """Other settings: all variants, colours exchanged with one another or for any other one, and random ones."""
    found = [fixed._replace(variant=variant) for variant in family.variants]
    for changed in range(len(fixed.colours) + len(fixed.palette)):
        for colour in range(1, 10):
            both = [*fixed.colours, *fixed.palette]
            if colour in both:
                both[both.index(colour)] = both[changed]
            both[changed] = colour
            found.append(Fixed(tuple(both[: family.colours]), tuple(both[family.colours :]), fixed.variant))
    found += [family.setting(int(rng.integers(family.settings))) for _ in range(40)]
    return [other for other in found if other != fixed]


@pytest.mark.parametrize("name", NAMES)
def test_any_demonstration_alone_decides_every_other_pair(name: str) -> None:
    """A setting that explains one pair of a task explains all of its pairs: whichever is the query, and whichever
    demonstrations are left, there is one answer."""
    family, rng = FAMILIES[name], np.random.default_rng(0)
    for index in range(4):
        fixed = family.fixed(0, index)
        pairs = [found for _, found in drawn_of(name, index)]
        for other in others(family, fixed, rng):
            explained = [same(family.rule(found.input, other), output(found)) for found in pairs]
            assert all(explained) or not any(explained), (fixed, other)


def drawn_of(name: str, index: int) -> list[tuple[int, Pair]]:
    return [(number, pair(0, name, index, number, max_side=6, test=number % 4 == 3)) for number in range(8)]


@pytest.mark.parametrize(("name", "answers"), [("recolour", True), ("swap", True), ("by_size", False)])
def test_every_pair_shows_what_happens_to_every_colour(name: str, answers: bool) -> None:
    """Of a map each demonstration shows every line, and no query asks for another."""
    for index in range(20):
        maps = []
        for _, found in drawn_of(name, index):
            cells = zip(found.input.ravel().tolist(), output(found).ravel().tolist(), strict=True)
            maps.append(set(cells) - {(0, 0)})
        assert all(shown == maps[0] for shown in maps) and len(maps[0]) == 3
        assert (len({before for before, _ in maps[0]}) == 3) == answers  # by_size: one colour, told apart by size


def test_logic_shows_all_four_cases_in_every_pair() -> None:
    for fixed, found in drawn("logic", 6, tasks=20, pairs=4):
        grid = found.input if fixed.variant[1] == "across" else found.input.T
        width = grid.shape[1] // 2
        cases = zip((grid[:, :width] > 0).ravel().tolist(), (grid[:, width + 1 :] > 0).ravel().tolist(), strict=True)
        assert len(set(cases)) == 4


# --------------------------------------------------------------------------------------------------------------------
# purity

SOME = (("shift", 12), ("recolour", 0), ("logic", 7), ("denoise", 123456), ("fractal", 3))


def some_tasks() -> list[Task]:
    return [task(5, name, 2, pairs=2, tests=1, max_side=8) for name in NAMES]


def test_a_task_is_a_function_of_its_numbers_in_any_order() -> None:
    forward = {(name, i): task(9, name, i, pairs=3, tests=1, max_side=7) for name, i in SOME}
    backward = {(name, i): task(9, name, i, pairs=3, tests=1, max_side=7) for name, i in reversed(SOME)}
    assert all(digest([forward[key]]) == digest([backward[key]]) for key in forward)
    assert len({digest([task(seed, "shift", 12, pairs=3, tests=1, max_side=7)]) for seed in range(5)}) == 5
    assert forward["shift", 12].id == "shift-000012" and origin("shift-000012") == ("shift", 12)


def test_another_process_with_another_hash_seed_draws_the_same_bytes() -> None:
    code = "import test_generate as t; print(t.digest(t.some_tasks()), t.fresh_digest())"
    here = f"{digest(some_tasks())} {fresh_digest()}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == here


def fresh_digest() -> str:
    fresh = FreshTasks(KNOWN, seed=1)
    return digest([fresh_task(fresh, epoch, index) for epoch in range(2) for index in range(20)])


def fresh_task(fresh: FreshTasks, epoch: int, index: int) -> Task:
    return task(fresh.seed, *fresh.place(epoch, index), pairs=3, tests=1, max_side=6)


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_more_pairs_changes_none(name: str) -> None:
    few, many = (task(2, name, 4, pairs=p, tests=t, max_side=6) for p, t in ((2, 1), (12, 3)))
    assert digest([few]) == digest([Task(few.id, many.train[:2], many.test[:1])])
    inputs = {(found.input.shape, found.input.tobytes()) for found in (*many.train, *many.test)}
    assert len(inputs) == 15  # all different
    number = next(n for n in range(50) if same(pair(2, name, 4, n, max_side=6).input, many.train[-1].input))
    assert number >= 11  # its demonstrations are those that `pair` gives, repeated inputs left out


@pytest.mark.parametrize("name", NAMES)
def test_fresh_pairs_of_a_known_task_never_show_a_test_input(name: str) -> None:
    tests = task(0, name, 0, pairs=1, tests=4, max_side=6).test
    assert all(is_test_input(found.input) for found in tests)
    fresh = [pair(0, name, 0, 1000 + number, max_side=6).input for number in range(60)]
    assert not any(is_test_input(grid) for grid in fresh)
    assert len({(grid.shape, grid.tobytes()) for grid in fresh}) > 30  # and they are many


def origin_of(task: Task) -> tuple[str, int]:
    found = origin(task.id)
    assert found is not None
    return found


def family_of(task: Task) -> str:
    return origin_of(task)[0]


# --------------------------------------------------------------------------------------------------------------------
# data sets


def test_the_parts_of_a_generated_data_set() -> None:
    names = ("shift", "recolour", "key")  # key is trained on here: it is no unseen family then
    data = generated_dataset(names, tasks=8, pairs=3, max_side=6, seed=4, tests=2, unseen=3)
    assert [one.id for one in data.training] == sorted(f"{name}-{i:06d}" for name in names for i in range(8))
    unseen_tasks = [one for one in data.evaluation if one.id.startswith(UNSEEN_TASK)]
    unseen_families = [one for one in data.evaluation if one.id.startswith(UNSEEN_FAMILY)]
    assert len(unseen_tasks) + len(unseen_families) == len(data.evaluation)
    assert [one.id for one in data.evaluation] == sorted(one.id for one in data.evaluation)
    assert sorted(family_of(one) for one in unseen_tasks) == sorted(names * 3)
    assert {family_of(one) for one in unseen_families} == set(HELD_OUT) - {"key"}
    assert all(len(one.train) == 3 and len(one.test) == 2 for one in (*data.training, *data.evaluation))


@pytest.mark.parametrize("tasks", [1, 10, 40])
def test_unseen_tasks_fix_what_no_training_task_fixes(tasks: int) -> None:
    data = generated_dataset(KNOWN, tasks, pairs=1, max_side=6, seed=tasks)
    unseen = [one for one in data.evaluation if one.id.startswith(UNSEEN_TASK)]
    roomy = [one for one in unseen if FAMILIES[family_of(one)].settings > tasks]
    assert {family_of(one) for one in roomy} == {name for name in KNOWN if FAMILIES[name].settings > tasks}
    assert not settings(roomy, tasks) & settings(data.training, tasks)
    assert len({origin(one.id) for one in (*data.training, *unseen)}) == len(data.training) + len(unseen)
    assert drop_duplicates(data.training, data.evaluation)[1] == ()


def test_fresh_tasks_never_fix_what_the_unseen_ones_fix() -> None:
    names = ("flip", "crop", "sort_bars", "count", "denoise")  # families with few settings
    held = settings(generated_dataset(names, 0, pairs=1, max_side=6, seed=2).evaluation, 2)
    fresh = FreshTasks(names, seed=2)
    tasks = [fresh_task(fresh, epoch, index) for epoch in range(3) for index in range(150)]
    assert len({one.id for one in tasks}) == len(tasks)
    assert {family_of(one) for one in tasks} == set(names)
    assert not settings(tasks, 2) & held


def test_fresh_tasks_know_nothing_of_the_order_of_families_or_of_draws() -> None:
    one, other = (FreshTasks(names, seed=0) for names in (BASIC, BASIC[::-1]))
    assert [one.place(1, i) for i in range(12)] == [other.place(1, i) for i in range(11, -1, -1)][::-1]
    assert one.place(0, 3) != one.place(1, 3) != one.place(1, 4)


def test_no_tasks_means_fresh_ones_and_the_same_unseen_families() -> None:
    without = generated_dataset(BASIC, 0, pairs=2, max_side=6, seed=0)
    with_some = generated_dataset(BASIC, 2, pairs=2, max_side=6, seed=0)
    assert without.training == () and len(without.evaluation) == UNSEEN * (12 + 6)
    of_families = ([one for one in data.evaluation if one.id.startswith("unseen_f")] for data in (without, with_some))
    assert len({digest(tasks) for tasks in of_families}) == 1


def test_the_fingerprint_is_that_of_the_same_tasks_in_files(tmp_path: Path) -> None:
    data = generated_dataset(("crop", "line"), 3, pairs=2, max_side=6, seed=0, unseen=1)
    for part, tasks in (("training", data.training), ("evaluation", data.evaluation)):
        (tmp_path / part).mkdir()
        for one in tasks:
            kinds = {"train": one.train, "test": one.test}
            raw = {
                kind: [{"input": found.input.tolist(), "output": output(found).tolist()} for found in pairs]
                for kind, pairs in kinds.items()
            }
            (tmp_path / part / f"{one.id}.json").write_text(json.dumps(raw))
    loaded = load_dataset(str(tmp_path))
    assert loaded.fingerprint == data.fingerprint
    assert digest(loaded.training) == digest(data.training) and digest(loaded.evaluation) == digest(data.evaluation)
    assert generated_dataset(("crop", "line"), 3, 2, max_side=6, seed=1, unseen=1).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"families": ("shift", "shfit")}, "unknown family of generated tasks 'shfit'; there are by_size, "),
        ({"families": ()}, "must be named"),
        ({"families": ("shift", "shift")}, "each once"),
        ({"max_side": 5}, "limited to 6..30 cells, not 5"),
        ({"max_side": 31}, "limited to 6..30 cells, not 31"),
        ({"seed": -1}, "must be 0 or more, not -1"),
        ({"pairs": 0}, "cannot have pairs = 0"),
        ({"tests": 0}, "cannot have tests = 0"),
        ({"tasks": -1}, "cannot have tasks = -1"),
        ({"unseen": -2}, "cannot have unseen = -2"),
        (
            {"families": ("fractal",), "pairs": 400},
            "family fractal has not 400 different pairs with sides of at most 6",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(changed: dict[str, object], said: str) -> None:
    usual = {"families": ("shift",), "tasks": 1, "pairs": 2, "max_side": 6, "seed": 0}
    with pytest.raises(UserError) as error:
        generated_dataset(**{**usual, **changed})  # type: ignore[arg-type]
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("task_id", ["007bbfb7", "shift", "shift-", "shift-x", "unseen-shift-000001", "shfit-000001"])
def test_other_ids_have_no_origin(task_id: str) -> None:
    assert origin(task_id) is None


# --------------------------------------------------------------------------------------------------------------------
# as data of a run
# --------------------------------------------------------------------------------------------------------------------


def test_a_run_on_generated_tasks(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    """Known tasks on new inputs and unseen tasks are validated apart; a resumed run has the same tasks and bits."""
    flags = [
        *small_flags,
        "--data",
        "generated",
        "--families",
        "flip,recolour",
        "--tasks",
        "3",
        "--pairs",
        "3",
        "--max_side",
        "6",
    ]
    flags += ["--val_splits", "seed,unseen", "--no_evidence", "--epochs", "2", "--val_views", "2"]
    flags += ["--episodes", "12", "--queries", "2", "--save_every", "2"]
    assert main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    rows = metrics(tmp_path / "whole")
    assert (rows[-1]["val.pairs"], rows[-1]["val.unseen.pairs"]) == (2 * 3 * TESTS, UNSEEN * 2 * TESTS)
    middle = sorted((tmp_path / "whole").glob("step-*"))[0]
    assert main([*flags, "--resume", str(middle), "--output_dir", str(tmp_path / "parts")]) == 0
    newest = [max((tmp_path / name).glob("step-*")) for name in ("whole", "parts")]
    assert newest[0].name == newest[1].name != middle.name
    assert len({(folder / "model.safetensors").read_bytes() for folder in newest}) == 1
    assert main([*flags, "--tasks", "4", "--resume", "--output_dir", str(tmp_path / "parts")]) == 2


def test_families_by_name() -> None:
    def families(*words: str) -> tuple[str, ...]:
        return parse_arguments(["--data", "generated", "--families", *words])[0].families

    assert families("basic") == BASIC and families("key,basic,key") == ("key", *BASIC)
    assert set(families("all")) == set(FAMILIES) and families("known") == KNOWN
    args, _ = parse_arguments(["--data", "generated"])
    assert (args.unseen, args.families) == ("generated", KNOWN)
    with pytest.raises(SystemExit):
        families("basic,nonsense")
