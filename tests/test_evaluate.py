"""Attempts, voting, ARC scoring and the submission file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from arc.augment import evaluation_views
from arc.evaluate import (
    Attempts,
    PairResult,
    SplitScore,
    cell_accuracy,
    exact,
    paired_delta,
    score_split,
    two_attempts,
    vote,
    write_submission,
)
from arc.tasks import Grid, Pair, Task

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4))
GRIDS = SHAPES.flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 9)))
FEW_GRIDS = arrays(np.uint8, st.tuples(st.integers(1, 2), st.integers(1, 2)), elements=st.integers(0, 1))  # often equal


def grid(*rows: str) -> Grid:
    return np.array([list(map(int, row)) for row in rows], dtype=np.uint8)


A, B, C = grid("12", "34"), grid("12", "35"), grid("1")


def same(left: list[Grid], right: list[Grid]) -> bool:
    return [g.tolist() for g in left] == [g.tolist() for g in right]


# ----------------------------------------------------------------------------------------------------------------------
# Voting and attempts


def test_vote_by_count_by_weight_and_by_first_seen() -> None:
    assert same(vote([A, B, B, C]), [B, A, C])
    assert same(vote([A, B, B, C], [2.5, 1, 1, 2]), [A, B, C])  # B and C tie at 2: B was seen first
    assert same(vote([C, A], [0, 0]), [C, A])
    assert same(vote([A, B], [-1, -0.5]), [B, A])
    assert vote([]) == []


def test_vote_sums_exactly() -> None:
    """0.1 + 0.2 > 0.3 and 1e16 + 1 == 1e16 in floating point: neither may decide which answer is given."""
    assert same(vote([A, B, B, B], [1e16, 1e16, 1, 1]), [B, A])
    assert same(vote([A, A, A, B, B, B], [1e16, 1, 1, 1, 1, 1e16]), [A, B])


def test_vote_tells_grids_of_the_same_cells_apart_and_ignores_dtype_and_layout() -> None:
    assert len(vote([grid("12"), grid("1", "2")])) == 2
    assert len(vote([A, A.astype(np.int64), np.asfortranarray(A)])) == 1


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_vote_refuses_unusable_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        vote([A, B], weights)


@settings(deadline=None)
@given(votes=st.lists(st.tuples(FEW_GRIDS, st.floats(0, 10))), data=st.data())
def test_vote_ranks_distinct_grids_by_their_summed_weight(votes: list[tuple[Grid, float]], data: st.DataObject) -> None:
    ranked = vote([g for g, _ in votes], [w for _, w in votes])
    totals = [math.fsum(w for g, w in votes if exact(g, winner)) for winner in ranked]
    assert totals == sorted(totals, reverse=True)
    assert {str(g.tolist()) for g in ranked} == {str(g.tolist()) for g, _ in votes}
    assert len(ranked) == len({str(g.tolist()) for g in ranked})
    if len(set(totals)) == len(totals):  # without ties the order of the ballots means nothing
        shuffled = data.draw(st.permutations(votes))
        assert same(vote([g for g, _ in shuffled], [w for _, w in shuffled]), ranked)


@settings(deadline=None)
@given(target=GRIDS)
def test_votes_over_augmented_views_agree_when_each_is_mapped_back(target: Grid) -> None:
    views = evaluation_views(16)
    assert same(vote([view.invert(view.apply(target)) for view in views]), [target])


@settings(deadline=None)
@given(ranked=st.lists(FEW_GRIDS, max_size=4), fallback=st.lists(FEW_GRIDS, max_size=4))
def test_two_attempts_are_always_the_best_two_different_grids(ranked: list[Grid], fallback: list[Grid]) -> None:
    assume(ranked or fallback)
    first, second = two_attempts(ranked, fallback)
    assert not exact(first, second)
    distinct = vote([*ranked, *fallback], [0.0] * (len(ranked) + len(fallback)))  # ties only: the order first seen
    assert same([first, second][: len(distinct)], distinct[:2])


def test_two_attempts_use_the_fallback_and_then_vary() -> None:
    assert same(list(two_attempts([A, B], [C])), [A, B])
    assert same(list(two_attempts([A, A], [A, C])), [A, C])
    assert same(list(two_attempts([], [C, B])), [C, B])
    assert same(list(two_attempts([A], [A])), [A, grid("22", "34")])
    assert same(list(two_attempts([grid("9")], [])), [grid("9"), grid("0")])
    assert same([A], [grid("12", "34")])  # the variation is a copy
    with pytest.raises(ValueError, match="no prediction"):
        two_attempts([], [])


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


def test_cell_accuracy_worked_examples() -> None:
    assert cell_accuracy(A, A) == 1
    assert cell_accuracy(B, A) == 3 / 4
    assert cell_accuracy(grid("12"), A) == 2 / 4  # two of the four cells were not predicted
    assert cell_accuracy(grid("129", "349"), A) == 4 / 6  # two cells too many
    assert cell_accuracy(grid("111"), grid("1", "1", "1")) == 1 / 5  # the union of 1x3 and 3x1 has five cells


@settings(deadline=None)
@given(a=GRIDS, b=GRIDS)
def test_exact_and_cell_accuracy(a: Grid, b: Grid) -> None:
    accuracy = cell_accuracy(a, b)
    assert 0 <= accuracy <= 1
    assert accuracy == cell_accuracy(b, a)
    assert (accuracy == 1) == exact(a, b) == (a.tolist() == b.tolist())
    assert exact(a, a.copy()) and cell_accuracy(a, a.copy()) == 1
    if a.shape != b.shape:
        assert accuracy <= min(a.size, b.size) / max(a.size, b.size)


def test_the_official_score_is_a_mean_over_tasks_of_the_pairs_solved() -> None:
    results = [
        PairResult("x", 0, A, (A, B)),  # solved by the first attempt
        PairResult("x", 1, A, (B, A)),  # by the second
        PairResult("x", 2, A, (B, C)),  # not
        PairResult("x", 3, A, (C, B)),  # not
        PairResult("y", 0, C, (C, A)),  # solved by the first attempt
    ]
    score = score_split("seed", results)
    assert (score.name, score.tasks, score.pairs, score.pass1_pairs, score.pass2_pairs) == ("seed", 2, 5, 2, 3)
    assert score.pass1 == (1 / 4 + 1) / 2
    assert score.pass2 == (2 / 4 + 1) / 2
    assert score.pair_accuracy == 2 / 5
    assert score.cell_acc == pytest.approx((1 + 3 / 4 + 3 / 4 + 1 / 4 + 1) / 5)
    assert score.size_acc == 4 / 5
    assert score.whole_tasks == 1
    assert score_split("seed", iter(reversed(results))) == score


def test_a_split_without_pairs_scores_zero() -> None:
    score = score_split("unseen", [])
    assert score == SplitScore("unseen", 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0)
    assert score.pair_accuracy == 0


def test_a_pair_scored_twice_is_refused() -> None:
    result = PairResult("x", 1, A, (A, B))
    with pytest.raises(ValueError, match="seed: task x, test pair 1 is scored twice"):
        score_split("seed", [result, result])


RESULTS = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.integers(0, 3)), st.tuples(FEW_GRIDS, FEW_GRIDS, FEW_GRIDS), min_size=1
).map(lambda d: [PairResult(task, i, target, (one, two)) for (task, i), (target, one, two) in d.items()])


@settings(deadline=None)
@given(results=RESULTS)
def test_scores_are_ordered_and_bounded(results: list[PairResult]) -> None:
    score = score_split("any", results)
    assert 0 <= score.pass1 <= score.pass2 <= 1
    assert 0 <= score.pass1_pairs <= score.pass2_pairs <= score.pairs == len(results)
    assert score.pair_accuracy <= score.cell_acc <= 1 and score.pair_accuracy <= score.size_acc <= 1
    if all(result.test_index == 0 for result in results):  # one pair a task: both ways of counting agree
        assert score.pass1 == pytest.approx(score.pair_accuracy)
    perfect = score_split("any", [PairResult(r.task_id, r.test_index, r.attempts[0], r.attempts) for r in results])
    assert (perfect.pass1, perfect.pass2, perfect.cell_acc, perfect.size_acc) == (1, 1, 1, 1)


def test_paired_delta() -> None:
    mean, error = paired_delta([0.0, 0.5, 1.0, 0.5], [0.5, 0.5, 1.0, 1.0])
    assert mean == 0.25
    assert error == pytest.approx(math.sqrt((4 * 0.25**2) / 3) / 2)
    assert paired_delta([0.3, 0.9], [0.3, 0.9]) == (0.0, 0.0)
    mean, error = paired_delta([0.25], [0.5])
    assert mean == 0.25 and math.isnan(error)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_paired_delta_needs_pairs(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="same pairs twice"):
        paired_delta(before, after)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20))
def test_paired_delta_changes_sign_with_its_arguments(pairs: list[tuple[float, float]]) -> None:
    before, after = [p[0] for p in pairs], [p[1] for p in pairs]
    there, back = paired_delta(before, after), paired_delta(after, before)
    assert there[0] == pytest.approx(-back[0]) and there[1] == pytest.approx(back[1]) and there[1] >= 0


# ----------------------------------------------------------------------------------------------------------------------
# Submission


def task(task_id: str, tests: int) -> Task:
    return Task(task_id, (Pair(A, B),), tuple(Pair(A, None) for _ in range(tests)))


TASKS = [task("b", 2), task("a", 1)]


def attempts() -> dict[str, Any]:
    return {"a": [(C, A)], "b": [(A, B), (B, C)]}


def test_submission_has_the_arc_prize_format(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "submission.json"
    write_submission(path, attempts(), TASKS)
    assert json.loads(path.read_text()) == {
        "b": [
            {"attempt_1": [[1, 2], [3, 4]], "attempt_2": [[1, 2], [3, 5]]},
            {"attempt_1": [[1, 2], [3, 5]], "attempt_2": [[1]]},
        ],
        "a": [{"attempt_1": [[1]], "attempt_2": [[1, 2], [3, 4]]}],
    }
    assert os.listdir(path.parent) == ["submission.json"]


def with_attempts(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    given = attempts()
    change(given)
    return given


BAD_ATTEMPTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: s.pop("a"), "task a has no attempts"),
    (lambda s: s["b"].pop(), "task b has attempts for 1 test inputs, not 2"),
    (lambda s: s["b"].append((A, B)), "task b has attempts for 3 test inputs, not 2"),
    (lambda s: s.update(c=[(A, B)]), "task c is not in the data set"),
    (lambda s: s.update(a=[(A,)]), "task a, test pair 0 has 1 attempts, not 2"),
    (lambda s: s["b"].__setitem__(1, (A, A + 9)), "task b, test pair 1, attempt 2: row 0, column 0 is 10, not an int"),
    (lambda s: s.update(a=[(A[:0], B)]), "task a, test pair 0, attempt 1: is an empty list, not a list of rows"),
    (lambda s: s.update(a=[(A / 2, B)]), "task a, test pair 0, attempt 1: row 0, column 0 is 0.5, not an integer"),
    (lambda s: s.update(a=[(np.tile(A, 16), B)]), "attempt 1: row 0 has 32 cells, at most 30 are allowed"),
]


@pytest.mark.parametrize(("change", "problem"), BAD_ATTEMPTS, ids=[problem for _, problem in BAD_ATTEMPTS])
def test_an_incomplete_or_illegal_submission_is_refused_and_the_old_file_stays(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    path = tmp_path / "submission.json"
    path.write_text("old")
    with pytest.raises(ValueError) as caught:
        write_submission(path, with_attempts(change), TASKS)
    assert (
        str(caught.value).startswith(f"{path}: ") and problem in str(caught.value) and str(caught.value).isprintable()
    )
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["submission.json"]


def test_all_problems_of_a_submission_come_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        write_submission(tmp_path / "s.json", {"b": [(A, B)], "c": []}, TASKS)
    assert str(caught.value).split(": ", 1)[1].split("; ") == [
        "task c is not in the data set",
        "task b has attempts for 1 test inputs, not 2",
        "task a has no attempts",
    ]


def test_a_submission_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    path.write_text("old")
    write_submission(str(path), attempts(), TASKS)
    assert set(json.loads(path.read_text())) == {"a", "b"} and os.listdir(tmp_path) == ["submission.json"]


def test_an_unwritable_submission_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "s.json", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match="cannot write the submission") as caught:
            write_submission(path, attempts(), TASKS)
        assert str(caught.value).startswith(f"{path}: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and os.listdir(tmp_path / "folder") == []


def test_a_failing_rename_leaves_the_old_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "submission.json"
    path.write_text("old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, no_space)
            with pytest.raises(ValueError, match="cannot write the submission: No space left on device"):
                write_submission(path, attempts(), TASKS)
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["submission.json"]


@pytest.mark.parametrize("on_disk", [b"", b'{"a": [', b'{"a": []}'])
def test_a_submission_that_does_not_read_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bytes
) -> None:
    path = tmp_path / "submission.json"
    path.write_text("old")

    def lose_bytes(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, on_disk, 0)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lose_bytes)
        with pytest.raises(ValueError, match="reads back different"):
            write_submission(path, attempts(), TASKS)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["submission.json"]


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(GRIDS, GRIDS), min_size=1, max_size=3))
def test_what_is_read_back_is_what_was_attempted(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[Attempts]
) -> None:
    path = tmp_path_factory.mktemp("s") / "submission.json"
    write_submission(path, {"t": pairs}, [task("t", len(pairs))])
    back = json.loads(path.read_text())["t"]
    assert [(b["attempt_1"], b["attempt_2"]) for b in back] == [(one.tolist(), two.tolist()) for one, two in pairs]
