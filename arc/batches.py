"""Batches of agent queries: evidence under an augmentation, collation, what is predicted.

A *query* is one input grid whose output the agent shall predict, seen under one augmentation. Queries of very different
sizes meet in one batch as flat token sequences (one token a canvas cell, row-major, coordinates carried along), so the
only padding is the difference in the *number* of cells, and batches are packed so that this difference is small.

Nothing here reads a test output: targets enter a `Query` only where the caller passes one (training, always a
demonstration pair).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from arc.augment import Augmentation
from arc.device import PASS_TOKENS
from arc.evidence import NUM_RULES, NUM_TABLES, EvidenceStore, QueryEvidence, augment_evidence, feedback_indices
from arc.run.host import to_host
from arc.tasks import MAX_SIDE, Grid, Task

OUTSIDE = 10  # the "colour" of a canvas cell that is not part of the input grid
IGNORE = -100  # a token without a target, cross_entropy's ignore_index


# --------------------------------------------------------------------------------------------------------------------
# one query
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Query:
    """One agent query, already under its augmentation.

    grid: (h_in, w_in) uint8, the input.  target: (h, w) uint8 or None.  out_size: the output rectangle that the
    evidence predicts (or that is known, for predicting an input back).  evidence: None when there is none to give.
    """

    grid: Grid
    target: Grid | None
    out_size: tuple[int, int]
    evidence: QueryEvidence | None
    augmentation: Augmentation
    owner: int  # index of the prompt, inside the batch, that this query is answered under
    number: int = 0  # of the owner's test pairs, in prediction

    @property
    def canvas(self) -> tuple[int, int]:
        """Rows and columns of the smallest rectangle that holds input and output as far as they are known."""
        (height, width), (rows, columns) = self.grid.shape, self.out_size
        more = self.evidence.room if self.evidence is not None else (1, 1)
        return max(height, rows, more[0]), max(width, columns, more[1])

    @property
    def cells(self) -> int:
        """Number of tokens of this query."""
        rows, columns = self.canvas
        return rows * columns


def make_query(
    grid: Grid, target: Grid | None, evidence: QueryEvidence, augmentation: Augmentation, owner: int, number: int = 0
) -> Query:
    """Query for input `grid` and its evidence, both given un-augmented."""
    turned = augment_evidence(evidence, augmentation)
    return Query(
        grid=augmentation.apply(grid),
        target=None if target is None else augmentation.apply(target),
        out_size=turned.size,
        evidence=turned,
        augmentation=augmentation,
        owner=owner,
        number=number,
    )


# --------------------------------------------------------------------------------------------------------------------
# a batch of queries
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class TensorBundle:
    """A dataclass of tensors that moves as one (also what DataLoader's `pin_memory` looks for)."""

    def mapped(self, function: Callable[[Any], Any], kind: type = Tensor) -> Self:
        """The same with every tensor (or what is of another `kind`) put through `function`."""

        def apply(value: Any) -> Any:
            if isinstance(value, kind):
                return function(value)
            if isinstance(value, TensorBundle):
                return value.mapped(function, kind)
            return [apply(part) for part in value] if isinstance(value, list) else value

        return type(self)(**{field.name: apply(getattr(self, field.name)) for field in dataclasses.fields(self)})

    def to(self, device: torch.device) -> Self:
        """Copy on `device`; asynchronous on CUDA, from pinned memory."""
        # On CUDA alone: elsewhere what is copied may be given back before it has been read (pytorch issue 139550).
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> Self:
        """Copy in page-locked memory."""
        return self.mapped(lambda tensor: tensor.pin_memory())


@dataclass
class QueryBatch(TensorBundle):
    """B queries of at most L tokens, T tables, R size rules. uint8 unless said otherwise."""

    neighbours: (
        Tensor  # (B, L, 9) input colours of the 3x3 around the token, row-major, centre at 4; OUTSIDE beyond the input
    )
    row: Tensor  # (B, L)
    column: Tensor  # (B, L)
    valid: Tensor  # (B, L) bool, False on padding
    in_output: Tensor  # (B, L) bool, inside the output rectangle `out_size`
    codes: Tensor  # (B, L, T) colour + 10 * confidence class, 0 where a table says nothing
    table_stats: Tensor  # (B, T, 3) float32
    vote_weight: Tensor  # (B, T) float32, the training-free vote's weights
    rule_sizes: Tensor  # (B, R, 2)
    rule_features: Tensor  # (B, R, 2) float32
    rule_logits: Tensor  # (B, R) float32, -inf where a rule does not apply
    in_size: Tensor  # (B, 2) int64
    out_size: Tensor  # (B, 2) int64
    canvas: Tensor  # (B, 2) int64
    dihedral: Tensor  # (B,) int64
    colours: Tensor  # (B, 10) int64, the colour permutation of the view
    target: Tensor  # (B, L) int64, IGNORE where there is none
    target_size: Tensor  # (B, 2) int64, 0 where there is none
    target_grid: Tensor  # (B, 30, 30) int64, -1 outside
    input_grid: Tensor  # (B, 30, 30) int64, -1 outside
    owner: Tensor  # (B,) int64, which prompt of the batch answers this query
    number: Tensor  # (B,) int64, which of its owner's test pairs this is
    padded: bool  # whether there is any padding: without it attention needs no mask
    silent: bool  # whether no table says anything in the whole batch: without evidence, and on the way back

    @property
    def tables(self) -> slice:
        """The tables that have to be looked at: where all are silent one is as good as all."""
        return slice(0, 1) if self.silent else slice(None)

    def __len__(self) -> int:
        return self.valid.shape[0]

    def rows(self, chosen: Tensor) -> QueryBatch:
        """The queries `chosen` (n,) of this batch, with the same padding."""
        return self.mapped(lambda tensor: tensor[chosen])

    def cell_counts(self) -> tuple[int, int]:
        """(real tokens, processed tokens): their ratio is 1 - padding."""
        return int(self.valid.sum()), self.valid.numel()


def pad_grid(grid: Grid) -> np.ndarray:
    """(30, 30) int64 copy of `grid`, -1 outside."""
    padded = np.full((MAX_SIDE, MAX_SIDE), -1, np.int64)
    padded[: grid.shape[0], : grid.shape[1]] = grid
    return padded


def unpad_grid(padded: np.ndarray) -> Grid:
    """Inverse of `pad_grid`."""
    return padded[: int((padded[:, 0] >= 0).sum()), : int((padded[0] >= 0).sum())].astype(np.uint8)


def collate_queries(queries: Sequence[Query]) -> QueryBatch:
    """Stack queries into one padded batch (see `QueryBatch` for shapes)."""
    count, length = len(queries), max(query.cells for query in queries)
    neighbours = np.full((count, length, 9), OUTSIDE, np.uint8)
    row, column = np.zeros((2, count, length), np.uint8)
    valid, in_output = np.zeros((2, count, length), bool)
    codes = np.zeros((count, length, NUM_TABLES), np.uint8)
    table_stats = np.zeros((count, NUM_TABLES, 3), np.float32)
    vote_weight = np.zeros((count, NUM_TABLES), np.float32)
    rule_sizes = np.zeros((count, NUM_RULES, 2), np.uint8)
    rule_features = np.zeros((count, NUM_RULES, 2), np.float32)
    rule_logits = np.full((count, NUM_RULES), -np.inf, np.float32)
    target = np.full((count, length), IGNORE, np.int64)
    for index, query in enumerate(queries):
        (height, width), (rows, columns), cells = query.grid.shape, query.canvas, query.cells
        out_rows, out_columns = query.out_size
        bordered = np.full((rows + 2, columns + 2), OUTSIDE, np.uint8)
        bordered[1 : height + 1, 1 : width + 1] = query.grid
        shifts = [bordered[i : i + rows, j : j + columns].reshape(-1) for i in range(3) for j in range(3)]
        neighbours[index, :cells] = np.stack(shifts, axis=-1)
        r, c = np.divmod(np.arange(cells), columns)
        row[index, :cells], column[index, :cells], valid[index, :cells] = r, c, True
        inside = (r < out_rows) & (c < out_columns)
        in_output[index, :cells] = inside
        if query.evidence is not None and not query.evidence.silent:
            codes[index, :cells][inside] = query.evidence.codes.reshape(NUM_TABLES, -1).T
            table_stats[index] = query.evidence.table_stats
            vote_weight[index] = query.evidence.weights()
            rule_sizes[index] = query.evidence.rule_sizes
            rule_features[index] = query.evidence.rule_features
            rule_logits[index] = query.evidence.rule_logits
        if query.target is not None:
            both = (r < query.target.shape[0]) & (c < query.target.shape[1])
            target[index, :cells][both] = query.target[r[both], c[both]]
    arrays: dict[str, np.ndarray] = {
        "neighbours": neighbours,
        "row": row,
        "column": column,
        "valid": valid,
        "in_output": in_output,
        "codes": codes,
        "table_stats": table_stats,
        "vote_weight": vote_weight,
        "rule_sizes": rule_sizes,
        "rule_features": rule_features,
        "rule_logits": rule_logits,
        "in_size": np.array([query.grid.shape for query in queries], np.int64),
        "out_size": np.array([query.out_size for query in queries], np.int64),
        "canvas": np.array([query.canvas for query in queries], np.int64),
        "dihedral": np.array([query.augmentation.dihedral for query in queries], np.int64),
        "colours": np.array([query.augmentation.colours for query in queries], np.int64),
        "target": target,
        "target_size": np.array([(0, 0) if q.target is None else q.target.shape for q in queries], np.int64),
        "target_grid": np.stack([np.full((30, 30), -1) if q.target is None else pad_grid(q.target) for q in queries]),
        "input_grid": np.stack([pad_grid(query.grid) for query in queries]),
        "owner": np.array([query.owner for query in queries], np.int64),
        "number": np.array([query.number for query in queries], np.int64),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return QueryBatch(**tensors, padded=not bool(valid.all()), silent=not bool(codes.any()))


def reverse_query(query: Query) -> Query:
    """The query that asks for the input of a training query, given its target."""
    assert query.target is not None
    return Query(query.target, query.grid, query.grid.shape, None, query.augmentation, query.owner)


def reverse_queries(grids: Sequence[Tensor], query: QueryBatch) -> tuple[list[int], QueryBatch | None]:
    """Queries asking for the inputs of `grids`, predictions (B, 30, 30) for the rows of `query`, where they differ:
    those rows, and one batch with all of the first grids, then all of the second, ...; None if they are nowhere
    different."""
    small = [grid.to(torch.int8) for grid in (query.input_grid, *grids)]
    known, *predicted, colours, dihedral, owner = (
        tensor.numpy() for tensor in to_host([*small, query.colours, query.dihedral, query.owner])
    )
    rows = [row for row in range(len(query)) if any((grid[row] != predicted[0][row]).any() for grid in predicted[1:])]
    views = [Augmentation(int(dihedral[row]), tuple(colours[row].tolist())) for row in rows]
    inputs = [unpad_grid(known[row]) for row in rows]
    queries = [
        Query(unpad_grid(grid[row]), given, given.shape, None, view, int(owner[row]))
        for grid in predicted
        for row, given, view in zip(rows, inputs, views, strict=True)
    ]
    return rows, collate_queries(queries).to(grids[0].device) if queries else None


def in_groups(sizes: Sequence[int], spare: int, most: float = math.inf) -> list[list[int]]:
    """Numbers of the things of these sizes, smallest first, in groups, each of which will be padded to its largest.

    As few tokens as can be in all, a group counting for `spare` besides its own. Of those groups one of more than
    `most` tokens is cut into several (of one thing at least).
    """
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    ends = [n for n in range(1, len(order) + 1) if n == len(order) or sizes[order[n - 1]] != sizes[order[n]]]
    cost, last = {0: 0}, {}  # of the first so many: tokens at least, and where their last group begins
    for end in ends:
        options = [(cost[start] + (end - start) * sizes[order[end - 1]] + spare, start) for start in cost]
        cost[end], last[end] = min(options)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        group, end = order[last[end] : end], last[end]
        room = max(1, int(min(len(group), most // max(1, sizes[group[-1]]))))
        groups[:0] = [group[at : at + room] for at in range(0, len(group), room)]
    return groups


def collate_in_buckets(
    queries: Sequence[Query], max_cells: float = math.inf, spare: int = PASS_TOKENS
) -> list[QueryBatch]:
    """The queries in several batches of similar size (`in_groups`), each of at most `max_cells` tokens (but at least
    one query). Empty list for no queries. Their order is lost, `owner` says whose they are."""
    groups = in_groups([query.cells for query in queries], spare, max_cells)
    return [collate_queries([queries[number] for number in group]) for group in groups]


@dataclass(frozen=True)
class Round:
    """Tasks under some of the views only: how a prediction that has to end in time goes over all tasks again and again.
    first: with what decides the tasks' prompts (feedback, trial), which later rounds know already."""

    positions: tuple[int, ...]
    views: tuple[int, ...]
    first: bool


@dataclass
class PredictionBatch(TensorBundle):
    """G tasks' test inputs under V views each, B queries in batches of similar size, and the demonstration pairs that
    give feedback."""

    context_ids: Tensor  # (G, S) int64
    context_lengths: Tensor  # (G,) int64
    reading: list[Texts]  # which contexts are read together
    task: Tensor  # (G,) int64 position in the list of tasks that is being predicted
    query: list[QueryBatch]  # owner says which of the G tasks, `number` which of its test pairs
    feedback: list[QueryBatch]
    trial: list[QueryBatch]  # every demonstration, to be answered from the others


class Prepared(torch.utils.data.Dataset):
    """Maps a tuple of task positions to itself, once their evidence is there (computed in this process, and cached)."""

    def __init__(self, tasks: Sequence[Task], store: EvidenceStore) -> None:
        self.tasks, self.store = tasks, store

    def __getitem__(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        for position in positions:
            self.store.get(self.tasks[position])
        return positions


class PredictionData(torch.utils.data.Dataset):
    """Maps a tuple of task positions to a `PredictionBatch`. It never touches a test output."""

    def __init__(
        self,
        tasks: Sequence[Task],
        store: EvidenceStore,
        encode: Any,
        *,
        views: Sequence[Augmentation],
        feedback_pairs: int,
        spare: int = PASS_TOKENS,
    ) -> None:
        self.tasks, self.store, self.encode, self.spare = tasks, store, encode, spare
        self.collate = functools.partial(collate_in_buckets, spare=spare)
        self.views, self.feedback_pairs = views, feedback_pairs

    def __getitem__(self, key: tuple[int, ...] | Round) -> PredictionBatch:
        everything = tuple(range(len(self.views)))
        wanted = key if isinstance(key, Round) else Round(key, everything, first=True)
        queries: list[Query] = []
        demonstrations: list[list[Query]] = []  # of each task, every one to be answered from the others
        for owner, position in enumerate(wanted.positions):
            task = self.tasks[position]
            known = self.store.get(task)
            for number, pair in enumerate(task.test):
                evidence = known.test(number)
                views = [self.views[view] for view in wanted.views]
                queries += [make_query(pair.input, None, evidence, view, owner, number) for view in views]
            shown = enumerate(task.train) if wanted.first else ()
            demonstrations.append(
                [
                    make_query(pair.input, pair.output, known.held_out(other), Augmentation.IDENTITY, owner)
                    for other, pair in shown
                ]
            )
        feedback = [
            pairs[k]
            for pairs in demonstrations
            if pairs
            for k in feedback_indices(len(pairs), None, self.feedback_pairs)
        ]
        texts = [self.encode(context_pairs(self.tasks[position])) for position in wanted.positions]
        ids, lengths, reading = pad_ids(texts, self.spare)
        return PredictionBatch(
            context_ids=ids,
            context_lengths=lengths,
            reading=reading,
            task=torch.tensor(wanted.positions),
            query=self.collate(queries),
            feedback=self.collate(feedback),
            trial=self.collate([query for pairs in demonstrations for query in pairs]),
        )


def prediction_order(tasks: Sequence[Task], *, views: int, max_cells: int) -> list[tuple[int, ...]]:
    """Positions of tasks in batches of similar size, at most about `max_cells` tokens each. Sizes are judged by test
    inputs and demonstration pairs alone."""

    def cells(task: Task) -> int:
        grids = [pair.input for pair in task.test] + [p.output for p in task.train if p.output is not None]
        return max(grid.shape[0] for grid in grids) * max(grid.shape[1] for grid in grids)

    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    used = 0
    for position in sorted(range(len(tasks)), key=lambda i: (cells(tasks[i]), i)):
        need = cells(tasks[position]) * len(tasks[position].test) * views
        if batch and used + need > max_cells:
            batches.append(tuple(batch))
            batch, used = [], 0
        batch.append(position)
        used += need
    if batch:
        batches.append(tuple(batch))
    return batches


def context_pairs(task: Task, held_out: int | None = None) -> list[tuple[Grid, Grid]]:
    """(input, output) of the demonstrations that Qwen reads: all, or all but the one that is the query."""
    pairs = [pair for number, pair in enumerate(task.train) if number != held_out]
    return [(pair.input, pair.output) for pair in pairs if pair.output is not None]


@dataclass
class Texts(TensorBundle):
    """Texts of contexts that are read in one pass."""

    which: Tensor  # (n,) int64: of the batch's contexts
    longest: int  # of their lengths


def pad_ids(texts: Sequence[Sequence[int]], spare: int = PASS_TOKENS) -> tuple[Tensor, Tensor, list[Texts]]:
    """Token ids of several texts -> ((G, S) int64 right-padded with 0, (G,) lengths, which are read together)."""
    sizes = [len(text) for text in texts]
    ids = torch.zeros(len(texts), max(sizes), dtype=torch.long)
    for index, text in enumerate(texts):
        ids[index, : len(text)] = torch.as_tensor(text, dtype=torch.long)
    together = [Texts(torch.tensor(group), sizes[group[-1]]) for group in in_groups(sizes, spare)]
    return ids, torch.tensor(sizes), together
