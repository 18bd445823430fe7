"""From episodes to batches (arc/batches.py): order, limits, padding, augmented evidence, collation, and that nothing of
a query's output, or of any test output, gets in."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import SmallBuild
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from arc.augment import Augmentation, apply_dihedral, evaluation_views
from arc.batches import (
    OUTSIDE,
    PredictionData,
    Query,
    TensorBundle,
    collate_in_buckets,
    collate_queries,
    context_pairs,
    in_groups,
    make_query,
    pad_grid,
    pad_ids,
    prediction_order,
    reverse_queries,
    unpad_grid,
)
from arc.datasets import load_dataset
from arc.episodes import Episode, all_episodes, as_many_as_fit, episode_cells, epoch_batches, views_of
from arc.evidence import CLASS_WEIGHTS, NUM_RULES, NUM_TABLES, QueryEvidence, augment_evidence
from arc.loading import EpochSampler
from arc.tasks import Grid, Pair, Task
from trainloop_complete_with_fixes import Run, rng_state, training_data

SIDES = st.tuples(st.integers(1, 30), st.integers(1, 30))
GRIDS = SIDES.flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 9)))
AUGMENTATIONS = st.builds(Augmentation, st.integers(0, 7), st.permutations(range(10)).map(tuple))


@st.composite
def small_tasks(draw: st.DrawFn) -> list[Task]:
    """Up to 12 tasks of 1 to 4 demonstrations with blank grids: only the sizes matter."""
    tasks = []
    for number in range(draw(st.integers(1, 12))):
        shapes = draw(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4))
        pairs = tuple(Pair(np.zeros(a, np.uint8), np.zeros(b, np.uint8)) for a, b in shapes)
        tasks.append(Task(str(number), pairs, pairs[:1]))
    return tasks


# --------------------------------------------------------------------------------------------------------------------
# the order of an epoch
# --------------------------------------------------------------------------------------------------------------------


KEYS = st.tuples(st.integers(0, 99), st.integers(0, 9))


@given(small_tasks(), KEYS, st.integers(1, 8), st.integers(1, 40), st.integers(1, 4000))
def test_every_episode_comes_once_an_epoch_within_the_limits(
    tasks: list[Task], key: tuple[int, int], views: int, more: int, max_cells: int
) -> None:
    (seed, epoch), batch_size = key, views + more - 1
    batches = epoch_batches(tasks, seed=seed, epoch=epoch, batch_size=batch_size, views=views, max_cells=max_cells)
    assert sorted((e for batch in batches for e in batch), key=lambda e: e.index) == all_episodes(tasks)
    for batch in batches:
        cells = [episode_cells(tasks[episode.task], episode.held_out) for episode in batch]
        queries = sum(views_of(count, views) for count in cells)
        assert len(batch) == 1 or (queries <= batch_size and queries * max(cells) <= max_cells)


@given(small_tasks())
def test_each_demonstration_is_held_out_once(tasks: list[Task]) -> None:
    episodes = all_episodes(tasks)
    assert [episode.index for episode in episodes] == list(range(len(episodes)))
    expected = [(number, held_out) for number, task in enumerate(tasks) for held_out in range(len(task.train))]
    assert [(episode.task, episode.held_out) for episode in episodes] == expected


@given(st.integers(1, 900), st.integers(1, 64))
def test_large_grids_get_fewer_views_but_one(cells: int, views: int) -> None:
    assert 1 <= views_of(cells, views) <= views
    assert views_of(cells + 1, views) <= views_of(cells, views)


@pytest.fixture(scope="module")
def real_tasks() -> tuple[Task, ...]:
    return load_dataset("arcagi2").training


def test_the_order_is_a_function_of_seed_and_epoch(real_tasks: tuple[Task, ...]) -> None:
    def order(seed: int, epoch: int) -> list[tuple[Episode, ...]]:
        return epoch_batches(real_tasks[:100], seed=seed, epoch=epoch, batch_size=32, views=4, max_cells=6144)

    state = rng_state()
    first = order(0, 0)
    assert order(0, 0) == first  # whatever was drawn in between
    assert str(rng_state()["numpy"]) == str(state["numpy"]) and torch.equal(torch.get_rng_state(), state["torch"])
    assert order(0, 1) != first != order(1, 0)


def test_at_least_seventy_percent_of_the_cells_are_real_on_arc_agi_2(real_tasks: tuple[Task, ...]) -> None:
    views = 4  # the flags' defaults
    batches = epoch_batches(real_tasks, seed=0, epoch=0, batch_size=32, views=views, max_cells=6144)
    real = processed = 0
    for batch in batches:
        cells = [episode_cells(real_tasks[episode.task], episode.held_out) for episode in batch]
        queries = [views_of(count, views) for count in cells]
        real += int(np.dot(cells, queries))
        processed += max(cells) * sum(queries)
    assert real / processed >= 0.7


def test_batches_are_not_sorted_by_size(real_tasks: tuple[Task, ...]) -> None:
    batches = epoch_batches(real_tasks, seed=0, epoch=0, batch_size=32, views=4, max_cells=6144)
    sizes = [episode_cells(real_tasks[batch[0].task], batch[0].held_out) for batch in batches]
    assert abs(np.corrcoef(np.arange(len(sizes)), sizes)[0, 1]) < 0.2


@given(st.integers(0, 12))
def test_a_sampler_enters_an_epoch_anywhere(start: int) -> None:
    batches = [(Episode(number, 0, number),) for number in range(12)]
    sampler = EpochSampler(batches, epoch=3, start=start)
    assert list(sampler) == [(3, batch) for batch in batches[start:]] and len(sampler) == len(batches) - start


@given(small_tasks(), st.integers(1, 8), st.integers(1, 20000))
def test_every_task_is_predicted_once(tasks: list[Task], views: int, max_cells: int) -> None:
    order = prediction_order(tasks, views=views, max_cells=max_cells)
    assert sorted(position for batch in order for position in batch) == list(range(len(tasks)))
    assert all(order)


# --------------------------------------------------------------------------------------------------------------------
# augmentation of evidence
# --------------------------------------------------------------------------------------------------------------------


def random_evidence(seed: int, size: tuple[int, int]) -> QueryEvidence:
    """Evidence of any content, unseen cells included."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 40, (NUM_TABLES, *size)).astype(np.uint8)
    return QueryEvidence(
        size=size,
        rule_sizes=rng.integers(0, 31, (NUM_RULES, 2)).astype(np.uint8),
        rule_features=rng.random((NUM_RULES, 2), np.float32),
        rule_logits=np.where(rng.random(NUM_RULES) < 0.5, -np.inf, rng.random(NUM_RULES)).astype(np.float32),
        codes=np.where(codes < 10, 0, codes).astype(np.uint8),
        table_stats=rng.random((NUM_TABLES, 3), np.float32),
    )


SMALL_SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=40)
@given(st.integers(0, 10**6), SMALL_SIZES, AUGMENTATIONS)
def test_voting_and_augmenting_commute(seed: int, size: tuple[int, int], view: Augmentation) -> None:
    evidence = random_evidence(seed, size)
    turned = augment_evidence(evidence, view)
    _, votes = evidence.vote()
    _, turned_votes = turned.vote()
    for colour in range(10):
        expected = apply_dihedral(votes[colour], view.dihedral)
        spoken = turned_votes[view.colours[colour]]
        assert turned.size == expected.shape and np.allclose(spoken, expected, atol=1e-5)
    transposed = view.dihedral % 2 == 1
    assert np.array_equal(turned.rule_sizes, evidence.rule_sizes[:, ::-1] if transposed else evidence.rule_sizes)


@settings(max_examples=40)
@given(st.integers(0, 10**6), SMALL_SIZES, AUGMENTATIONS)
def test_every_table_says_the_same_about_the_turned_cell(seed: int, size: tuple[int, int], view: Augmentation) -> None:
    evidence = random_evidence(seed, size)
    codes = augment_evidence(evidence, view).codes
    for table in (0, NUM_TABLES - 1):
        colour, confidence = evidence.codes[table] % 10, evidence.codes[table] // 10
        assert np.array_equal(codes[table] // 10, apply_dihedral(confidence, view.dihedral))
        spoken = codes[table] // 10 > 0
        assert np.array_equal((codes[table] % 10)[spoken], view.apply(colour)[spoken])
        assert (codes[table][~spoken] == 0).all()


def test_the_identity_changes_no_evidence() -> None:
    evidence = random_evidence(0, (3, 4))
    same = augment_evidence(evidence, Augmentation.IDENTITY)
    for field in dataclasses.fields(QueryEvidence):
        assert np.array_equal(getattr(same, field.name), getattr(evidence, field.name))


# --------------------------------------------------------------------------------------------------------------------
# collation
# --------------------------------------------------------------------------------------------------------------------


@given(GRIDS)
def test_padding_a_grid_is_undone(grid: Grid) -> None:
    padded = pad_grid(grid)
    assert padded.shape == (30, 30) and int((padded >= 0).sum()) == grid.size
    assert unpad_grid(padded).dtype == np.uint8 and np.array_equal(unpad_grid(padded), grid)


@st.composite
def queries(draw: st.DrawFn) -> Query:
    """A query with or without evidence and target, of three unrelated sizes."""
    sides = st.tuples(st.integers(1, 7), st.integers(1, 7))
    grid, target = (draw(sides.flatmap(lambda s: arrays(np.uint8, s, elements=st.integers(0, 9)))) for _ in range(2))
    out_size = draw(sides)
    evidence = random_evidence(draw(st.integers(0, 99)), out_size) if draw(st.booleans()) else None
    owner = draw(st.integers(0, 3))
    return Query(grid, target if draw(st.booleans()) else None, out_size, evidence, Augmentation.IDENTITY, owner)


@settings(max_examples=40)
@given(st.lists(queries(), min_size=1, max_size=4))
def test_a_batch_holds_its_queries_and_nothing_else(items: list[Query]) -> None:
    batch = collate_queries(items)
    assert len(batch) == len(items) and batch.padded == (len({query.cells for query in items}) > 1)
    assert batch.cell_counts() == (sum(query.cells for query in items), len(items) * max(q.cells for q in items))
    for index, query in enumerate(items):
        rows, columns = query.canvas
        real = slice(0, query.cells)
        assert batch.valid[index].tolist() == [True] * query.cells + [False] * (batch.valid.shape[1] - query.cells)
        assert np.array_equal(unpad_grid(batch.input_grid[index].numpy()), query.grid)
        canvas = np.full((rows, columns), OUTSIDE)
        canvas[: query.grid.shape[0], : query.grid.shape[1]] = query.grid
        around = batch.neighbours[index, real].reshape(rows, columns, 9).numpy()
        for place, (down, right) in enumerate((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            shifted = np.pad(canvas, 1, constant_values=OUTSIDE)[1 + down :, 1 + right :][:rows, :columns]
            assert np.array_equal(around[..., place], shifted)
        assert batch.row[index, real].tolist() == np.repeat(np.arange(rows), columns).tolist()
        assert batch.column[index, real].tolist() == np.tile(np.arange(columns), rows).tolist()
        assert int(batch.in_output[index].sum()) == query.out_size[0] * query.out_size[1]
        check_target(batch.target[index], batch.target_grid[index], batch.target_size[index], query)
        codes = batch.codes[index, real].reshape(rows, columns, NUM_TABLES).numpy()
        inside = codes[: query.out_size[0], : query.out_size[1]]
        assert codes.sum() == inside.sum()
        if query.evidence is not None:
            assert np.array_equal(np.moveaxis(inside, -1, 0), query.evidence.codes)


def check_target(tokens: Tensor, grid: Tensor, size: Tensor, query: Query) -> None:
    """The three forms of a target in a batch: tokens on the canvas, the whole grid, its size."""
    if query.target is None:
        assert tokens.lt(0).all() and grid.eq(-1).all() and size.tolist() == [0, 0]
        return
    rows, columns = query.canvas
    expected = np.full((rows, columns), -100)
    part = query.target[:rows, :columns]
    expected[: part.shape[0], : part.shape[1]] = part
    assert tokens[: query.cells].tolist() == expected.ravel().tolist() and tokens[query.cells :].lt(0).all()
    assert np.array_equal(unpad_grid(grid.numpy()), query.target) and tuple(size.tolist()) == query.target.shape


def padded(sizes: list[int], groups: list[list[int]], spare: int) -> int:
    """What the groups cost: all padded to their largest, and `spare` for each."""
    return sum(len(group) * max(sizes[n] for n in group) + spare for group in groups)


@given(st.lists(st.integers(1, 30), max_size=6), st.integers(0, 40))
def test_no_other_groups_have_less_padding(sizes: list[int], spare: int) -> None:
    groups = in_groups(sizes, spare)
    assert sorted(n for group in groups for n in group) == list(range(len(sizes)))
    assert [sizes[n] for group in groups for n in group] == sorted(sizes)
    order = sorted(range(len(sizes)), key=lambda n: sizes[n])
    for cuts in itertools.product((False, True), repeat=max(0, len(sizes) - 1)):
        at = [0, *(n for n, cut in enumerate(cuts, 1) if cut), len(sizes)]
        other = [order[a:b] for a, b in itertools.pairwise(at) if a < b]
        assert padded(sizes, groups, spare) <= padded(sizes, other, spare)


@settings(max_examples=40)
@given(st.lists(queries(), max_size=6), st.integers(1, 100), st.integers(0, 100))
def test_buckets_hold_every_query_and_are_of_a_limited_size(items: list[Query], max_cells: int, spare: int) -> None:
    batches = collate_in_buckets(items, max_cells, spare)
    assert sorted(int(n) for b in batches for n in b.valid.sum(1)) == sorted(query.cells for query in items)
    assert all(len(batch) == 1 or batch.valid.numel() <= max_cells for batch in batches)
    sizes = [query.cells for query in items]
    if items and len(items) * max(sizes) <= min(max_cells, sum(sizes) + spare):
        assert len(batches) == 1  # so little padding that it is cheaper than a pass more


@settings(max_examples=40)
@given(st.lists(st.lists(queries(), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 300))
def test_views_are_left_out_where_a_batch_would_be_too_large(views: list[list[Query]], max_cells: int) -> None:
    """The first view of each episode always stays; one more of each would be too many."""
    fitting = as_many_as_fit(views, max_cells)
    assert all(some == each[: len(some)] and some for some, each in zip(fitting, views, strict=True))
    longest, most = max(query.cells for each in views for query in each), max(map(len, fitting))
    assert most == 1 or sum(map(len, fitting)) * longest <= max_cells
    if fitting != views:
        assert sum(min(most + 1, len(each)) for each in views) * longest > max_cells


@settings(max_examples=20)
@given(GRIDS, GRIDS, AUGMENTATIONS, SMALL_SIZES)
def test_a_query_is_seen_under_its_augmentation_throughout(
    grid: Grid, target: Grid, view: Augmentation, size: tuple[int, int]
) -> None:
    query = make_query(grid, target, random_evidence(0, size), view, owner=2, number=1)
    assert np.array_equal(view.invert(query.grid), grid)
    assert query.target is not None and np.array_equal(view.invert(query.target), target)
    assert query.out_size == (size[::-1] if view.dihedral % 2 else size)
    assert (query.owner, query.number, query.augmentation) == (2, 1, view)


@given(st.lists(st.lists(st.integers(0, 2000), min_size=1, max_size=9), min_size=1, max_size=5))
def test_token_ids_are_padded_behind_their_length(texts: list[list[int]]) -> None:
    ids, lengths, reading = pad_ids(texts, spare=3)
    assert lengths.tolist() == [len(text) for text in texts] and ids.shape == (len(texts), max(map(len, texts)))
    assert [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)] == texts
    assert sorted(n for part in reading for n in part.which.tolist()) == list(range(len(texts)))
    assert all(part.longest == int(lengths[part.which].max()) for part in reading)


def test_class_zero_has_no_vote() -> None:
    assert CLASS_WEIGHTS[0] == 0  # which is why `augment_evidence` may leave the colour of unseen codes alone


# --------------------------------------------------------------------------------------------------------------------
# training batches
# --------------------------------------------------------------------------------------------------------------------


def tensors_of(bundle: TensorBundle, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a bundle by its path."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(bundle):
        value = getattr(bundle, field.name)
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            path = f"{prefix}{field.name}{number if isinstance(value, list) else ''}"
            if isinstance(part, TensorBundle):
                found |= tensors_of(part, f"{path}.")
            elif isinstance(part, Tensor):
                found[path] = part
    return found


def different(a: TensorBundle, b: TensorBundle) -> set[str]:
    """Paths of the tensors that differ between two bundles."""
    first, second = tensors_of(a), tensors_of(b)
    paths = first.keys() | second.keys()
    return {path for path in paths if path not in first or path not in second or not same(first[path], second[path])}


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


@pytest.fixture(scope="module")
def run(small_build: SmallBuild) -> Run:
    return small_build("--feedback_pairs", "2", "--refined_views", "2")


def an_epoch(run: Run, epoch: int = 0) -> list[tuple[Episode, ...]]:
    return epoch_batches(run.training, seed=0, epoch=epoch, batch_size=8, views=2, max_cells=6144)


def test_a_training_batch_is_a_function_of_its_key(run: Run) -> None:
    order = an_epoch(run)
    data = training_data(run)
    first = data[0, order[0]]
    _ = data[0, order[1]], torch.rand(3), np.random.random()
    assert different(first, training_data(run)[0, order[0]]) == set()
    changed = different(first, data[1, order[0]])  # another epoch, other augmentations of the same episodes
    assert "query.dihedral" in changed and not {"context_ids", "task"} & changed


def test_views_of_one_episode_are_the_same_pair(run: Run) -> None:
    episodes = an_epoch(run)[0]
    batch = training_data(run)[0, episodes]
    first = [batch.query.owner.tolist().index(owner) for owner in range(len(episodes))]
    query = batch.query.rows(torch.tensor(first))
    other = torch.where(query.target_grid == 0, 1, query.target_grid.clamp(max=0))  # a cell at least is another colour
    rows, asked = reverse_queries((query.target_grid, other), query)
    assert rows == list(range(len(query))) and asked is not None
    assert different(batch.way_back, asked.rows(torch.tensor(rows))) == set()
    assert reverse_queries((other, other), query) == ([], None)
    for row, owner in enumerate(batch.query.owner.tolist()):
        episode = episodes[owner]
        pair = run.training[episode.task].train[episode.held_out]
        view = Augmentation(int(batch.query.dihedral[row]), tuple(batch.query.colours[row].tolist()))
        assert np.array_equal(view.invert(unpad_grid(batch.query.input_grid[row].numpy())), pair.input)
        assert np.array_equal(view.invert(unpad_grid(batch.query.target_grid[row].numpy())), pair.output)
    refined = torch.bincount(batch.query.owner[batch.refined], minlength=len(episodes))
    assert bool((refined >= 1).all()) and bool((refined <= run.args.refined_views).all())


def test_feedback_pairs_are_other_demonstrations_of_the_same_task(run: Run) -> None:
    episodes = an_epoch(run)[0]
    batch = training_data(run)[0, episodes]
    counts = [0] * len(episodes)
    for part in batch.feedback:
        for row, owner in enumerate(part.owner.tolist()):
            episode, counts[owner] = episodes[owner], counts[owner] + 1
            shown = unpad_grid(part.input_grid[row].numpy()).tolist()
            inputs = [pair.input.tolist() for pair in run.training[episode.task].train]
            assert shown in inputs and shown != inputs[episode.held_out]
    assert counts == [2] * len(episodes)


def with_output(task: Task, index: int, output: Grid) -> Task:
    """The task with the output of one demonstration replaced."""
    pairs = list(task.train)
    pairs[index] = Pair(pairs[index].input, output)
    return Task(task.id, tuple(pairs), task.test)


def test_nothing_of_the_held_out_output_is_in_what_a_model_is_given(run: Run) -> None:
    """Only the targets know it, and the way back, which begins with it. A leak would be gone at test time, and the
    policy would have learned to rely on it."""
    rng = np.random.default_rng(0)
    training = run.training
    try:
        for episode in all_episodes(training)[::3]:
            known = training_data(run)[0, (episode,)]
            task = training[episode.task]
            shape = rng.integers(1, 6, 2)  # of another size and content
            changed = with_output(task, episode.held_out, rng.integers(0, 10, shape).astype(np.uint8))
            run.training = (*training[: episode.task], changed, *training[episode.task + 1 :])
            found = different(known, training_data(run)[0, (episode,)])
            run.training = training
            known_by = {name for name in found if not name.startswith("way_back.")}
            assert known_by == {"query.target", "query.target_size", "query.target_grid"}
    finally:
        run.training = training


def test_a_prediction_batch_never_touches_a_test_output(run: Run) -> None:
    def predicted(tasks: Sequence[Task]) -> list[TensorBundle]:
        data = PredictionData(tasks, run.store, run.qwen.encoder, views=evaluation_views(3), feedback_pairs=2)
        return [data[positions] for positions in prediction_order(tasks, views=3, max_cells=2000)]

    blind = [Task(t.id, t.train, tuple(Pair(pair.input, None) for pair in t.test)) for t in run.training]
    for seen, unseen in zip(predicted(run.training), predicted(blind), strict=True):
        assert different(seen, unseen) == set()
        targets = [part for name, part in tensors_of(seen).items() if name.startswith("query") and "target" in name]
        assert targets and all(bool((part <= 0).all()) for part in targets)  # sizes 0, cells negative


def test_qwen_reads_every_demonstration_but_the_held_out_one(run: Run) -> None:
    task = run.training[0]
    outputs = [pair.output.tolist() for pair in task.train if pair.output is not None]
    assert [output.tolist() for _, output in context_pairs(task)] == outputs
    assert [output.tolist() for _, output in context_pairs(task, 1)] == outputs[:1] + outputs[2:]


def test_bundles_move_as_one(run: Run) -> None:
    batch = training_data(run)[0, an_epoch(run)[0]]
    moved = batch.to(torch.device("cpu"))
    assert type(moved) is type(batch) and different(batch, moved) == set()
    assert moved.query.padded == batch.query.padded
    chosen = torch.tensor([2, 0])
    part = batch.query.rows(chosen)
    assert len(part) == 2 and torch.equal(part.target, batch.query.target[chosen])
