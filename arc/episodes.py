"""From tasks to training batches: which episodes an epoch has, in which order, and what each batch holds.

An *episode* asks queries under one prompt. Where a task has a few demonstrations each is held out in turn and asked
under several views; where pairs can be drawn without end (arc/drawn.py), a few are read and many are asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from arc.augment import Augmentation, sample_augmentation
from arc.batches import (
    Query,
    QueryBatch,
    TensorBundle,
    Texts,
    collate_in_buckets,
    collate_queries,
    context_pairs,
    make_query,
    pad_ids,
    reverse_query,
)
from arc.device import PASS_TOKENS
from arc.drawn import DrawnTasks, ManyPairs, Source
from arc.evidence import EvidenceStore, NoEvidence, QueryEvidence, feedback_indices
from arc.generate import GENERATED
from arc.parallel import ALONE, Place, share_of
from arc.tasks import Grid, Task


class Plan(Protocol):
    """The flags that decide what is trained on, and how."""

    data: str
    extra_data: str | None
    unseen: str
    families: tuple[str, ...]
    tasks: int
    pairs: int
    max_side: int
    queries: int
    episodes: int
    seed: int
    augment: str
    views: int
    batch_size: int
    max_cells: int
    max_batches: int
    feedback_pairs: int
    refined_views: int


# --------------------------------------------------------------------------------------------------------------------
# the order of an epoch: a pure function of (tasks, seed, epoch)
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episode:
    """Task number `task` with demonstration `held_out` as the query; `index` keys its augmentations."""

    task: int
    held_out: int
    index: int


def all_episodes(tasks: Sequence[Task]) -> list[Episode]:
    """Every demonstration of every task held out once; tasks with one demonstration give one episode without
    context."""
    keys = [(number, held_out) for number, task in enumerate(tasks) for held_out in range(len(task.train))]
    return [Episode(task, held_out, index) for index, (task, held_out) in enumerate(keys)]


def episode_cells(task: Task, held_out: int) -> int:
    """Tokens that this episode is expected to need (exact when the evidence predicts the right size)."""
    pair = task.train[held_out]
    assert pair.output is not None
    rows = max(pair.input.shape[0], pair.output.shape[0])
    columns = max(pair.input.shape[1], pair.output.shape[1])
    return rows * columns


DRAWN_ROOM = 2  # times --max_cells: padded tokens that a batch may have of episodes whose sizes are not known before
VIEW_CELLS = 1024  # tokens that the views of one episode take together, about: large grids get fewer views


def views_of(cells: int, views: int) -> int:
    """How many views an episode of `cells` tokens gets: `views`, fewer for a large grid, at least one."""
    return max(1, min(views, VIEW_CELLS // cells))


@dataclass(frozen=True)
class Drawn:
    """An episode of a task whose pairs are drawn: number `index` of its epoch."""

    index: int


def source_of(args: Plan, extra: tuple[Task, ...]) -> Source | None:
    """Where --data generated, or else --extra_data, draws pairs from (`extra`: the tasks of its file); None where there
    are only demonstrations to hold out."""
    if GENERATED in (args.data, args.extra_data):
        shape = (args.families, args.tasks, args.pairs, args.max_side, args.seed, args.queries)
        # Turned or recoloured, a task may be one of those that are held back, where generated ones are.
        augment = "none" if args.unseen == GENERATED else args.augment
        return DrawnTasks(*shape, augment, known=args.data == GENERATED)
    return ManyPairs(extra, args.pairs, args.seed, args.queries, args.augment) if extra else None


def epoch_order(args: Plan, tasks: Sequence[Task], epoch: int) -> list[tuple[Episode | Drawn, ...]]:
    """The batches of an epoch, a pure function of tasks, seed and epoch: every episode of `tasks` once, or those that
    are drawn, or, under --extra_data, both in one shuffled order."""
    drawn: list[tuple[Episode | Drawn, ...]] = []
    if args.data == GENERATED or args.extra_data:
        cells = args.max_side**2 if GENERATED in (args.data, args.extra_data) else 1  # of a query; unknown in files
        size = max(1, min(args.batch_size, DRAWN_ROOM * args.max_cells // cells) // args.queries)
        wanted = size * args.max_batches if args.data == GENERATED and args.max_batches else args.episodes
        drawn = list(drawn_batches(min(args.episodes, wanted), size))
    if args.data == GENERATED:
        return drawn
    batches: list[tuple[Episode | Drawn, ...]] = list(
        epoch_batches(
            tasks, seed=args.seed, epoch=epoch, batch_size=args.batch_size, views=args.views, max_cells=args.max_cells
        )
    )
    if drawn:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([args.seed, epoch, 0xE27A])))
        batches += drawn
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches[: args.max_batches or None]


def drawn_batches(episodes: int, size: int) -> list[tuple[Drawn, ...]]:
    """The batches of an epoch of so many drawn episodes, `size` in each."""
    return [tuple(map(Drawn, range(at, min(at + size, episodes)))) for at in range(0, episodes, size)]


def epoch_batches(
    tasks: Sequence[Task], *, seed: int, epoch: int, batch_size: int, views: int, max_cells: int
) -> list[tuple[Episode, ...]]:
    """The batches of one epoch: every episode once, similar sizes together, the order of batches shuffled.

    A batch holds at most `batch_size` queries (`views` an episode) and at most `max_cells` padded tokens, but always
    at least one episode. Small grids therefore come in larger batches.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0xBA7C])))
    episodes = all_episodes(tasks)
    generator.shuffle(episodes)
    cells = {episode: episode_cells(tasks[episode.task], episode.held_out) for episode in episodes}
    batches: list[tuple[Episode, ...]] = []
    window = 32 * max(1, batch_size // views)  # sorting inside a window keeps batches varied from epoch to epoch
    for start in range(0, len(episodes), window):
        ordered = sorted(episodes[start : start + window], key=lambda episode: (cells[episode], episode.index))
        batch: list[Episode] = []
        queries = 0
        for episode in ordered:
            more = views_of(cells[episode], views)
            padded = (queries + more) * cells[episode]  # sorted ascending: the newest is the longest
            if batch and (queries + more > batch_size or padded > max_cells):
                batches.append(tuple(batch))
                batch, queries = [], 0
            batch.append(episode)
            queries += more
        batches.append(tuple(batch))
    order = generator.permutation(len(batches))
    return [batches[i] for i in order]


# --------------------------------------------------------------------------------------------------------------------
# training batches, built in DataLoader workers
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainBatch(TensorBundle):
    """G episodes with up to V views each, B queries in all, plus the context pairs that give feedback."""

    context_ids: Tensor  # (G, S) int64 token ids of the context's text, right-padded
    context_lengths: Tensor  # (G,) int64
    reading: list[Texts]  # which contexts are read together
    task: Tensor  # (G,) int64 task number
    query: QueryBatch  # B queries; owner says which of the G episodes
    feedback: list[QueryBatch]  # context pairs as queries, the true query's output in none of their evidence
    way_back: QueryBatch  # G queries: each episode's first view, asked for its input
    keep: Tensor  # (G,) bool: the episode has its task's latent
    refined: Tensor  # (n,) int64 indices of the queries that are answered under the refined prompt too
    whole: int  # episodes of the batch that all processes make together; G for one alone

    def cell_counts(self) -> dict[str, int]:
        """Real and processed cells of the agent's passes."""
        counts = [part.cell_counts() for part in (self.query, *self.feedback)]
        return {"cells": sum(real for real, _ in counts), "cells_processed": sum(processed for _, processed in counts)}


class EpisodeData(torch.utils.data.Dataset):
    """Maps a batch of episodes to a `TrainBatch`. Runs in DataLoader workers; a pure function of its arguments.

    encode: context pairs -> token ids (the Qwen tokenizer's text, see arc/qwen.py). refined_views: how many queries of
    an episode are answered under the refined prompt too; the others would teach the agent nearly the same a second
    time. source: where episodes whose pairs are drawn come from, with the evidence of `passing`.
    place: of the process, which makes its share of each batch. max_cells, spare: of `collate_in_buckets` (and of
    `pad_ids`); queries are padded to at most `DRAWN_ROOM` times `max_cells`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        store: EvidenceStore,
        encode: Any,
        *,
        seed: int,
        views: int,
        max_cells: float = math.inf,
        spare: int = PASS_TOKENS,
        augment: str,
        feedback_pairs: int,
        refined_views: int,
        source: Source | None = None,
        passing: EvidenceStore | None = None,
        place: Place = ALONE,
    ) -> None:
        self.tasks, self.store, self.encode = tasks, store, encode
        self.source, self.passing = source, passing or store
        self.seed, self.views, self.augment, self.feedback_pairs = seed, views, augment, feedback_pairs
        self.refined_views, self.place, self.max_cells = refined_views, place, max_cells
        self.spare = spare

    @classmethod
    def of(
        cls,
        args: Plan,
        tasks: Sequence[Task],
        extra: tuple[Task, ...],
        store: EvidenceStore,
        encode: Any,
        place: Place = ALONE,
        *,
        spare: int = PASS_TOKENS,
    ) -> Self:
        """As the flags have it. extra: see `source_of`."""
        return cls(
            tasks,
            store,
            encode,
            seed=args.seed,
            views=args.views,
            max_cells=args.max_cells,
            spare=spare,
            augment=args.augment,
            feedback_pairs=args.feedback_pairs,
            refined_views=args.refined_views,
            source=source_of(args, extra),
            # Beside ARC they are there to be learned from through the prompt alone; evidence of tasks that come once
            # would cost more than all the rest.
            passing=store if args.data == GENERATED else NoEvidence(),
            place=place,
        )

    def __getitem__(self, key: tuple[int, tuple[Episode | Drawn, ...]]) -> TrainBatch:
        epoch, batch = key
        episodes = share_of(batch, self.place)
        numbers: list[int] = []
        texts: list[Sequence[int]] = []
        views: list[list[Query]] = []
        feedback: list[Query] = []
        for owner, episode in enumerate(episodes):
            if isinstance(episode, Drawn):
                number, asked, shown, text = self.drawn(epoch, episode, owner)
            else:
                number, asked, shown, text = self.held_out(epoch, episode, owner)
            numbers.append(number)
            texts.append(self.encode(text))
            views.append(asked)
            feedback += shown
        views = as_many_as_fit(views, DRAWN_ROOM * self.max_cells)
        first_view = [sum(map(len, views[:owner])) for owner in range(len(views))]
        refined = [
            at + n for at, each in zip(first_view, views, strict=True) for n in range(len(each[: self.refined_views]))
        ]
        ids, lengths, reading = pad_ids(texts, self.spare)
        return TrainBatch(
            context_ids=ids,
            context_lengths=lengths,
            reading=reading,
            task=torch.tensor(numbers),
            query=collate_queries([query for asked in views for query in asked]),
            feedback=collate_in_buckets(feedback, self.max_cells, self.spare),
            way_back=collate_queries([reverse_query(each[0]) for each in views]),
            keep=torch.tensor([keeps_latent(self.seed, epoch, episode.index) for episode in episodes]),
            refined=torch.tensor(refined),
            whole=len(batch),
        )

    def held_out(self, epoch: int, episode: Episode, owner: int) -> Parts:
        """One demonstration of a task under several views, answered from the others."""
        task = self.tasks[episode.task]
        known, held_out = self.store.get(task), episode.held_out
        pair, evidence = task.train[held_out], known.held_out(held_out)
        first = episode.index * self.views  # keys its augmentations
        views = [
            sample_augmentation(self.seed, epoch, first + view, self.augment)
            for view in range(views_of(episode_cells(task, held_out), self.views))
        ]
        asked = [make_query(pair.input, pair.output, evidence, view, owner) for view in views]
        others = feedback_indices(len(task.train), held_out, self.feedback_pairs)
        shown = [demonstration(task, n, known.held_out(n, without=held_out), owner) for n in others]
        return episode.task, asked, shown, context_pairs(task, held_out)

    def drawn(self, epoch: int, episode: Drawn, owner: int) -> Parts:
        """Many pairs of a task, answered from a few."""
        assert self.source is not None
        number, task = self.source.episode(epoch, episode.index)
        known, same = self.passing.passing(task), Augmentation.IDENTITY
        asked = [make_query(pair.input, pair.output, known.test(n), same, owner) for n, pair in enumerate(task.test)]
        others = feedback_indices(len(task.train), None, self.feedback_pairs)
        return number, asked, [demonstration(task, n, known.held_out(n), owner) for n in others], context_pairs(task)


def as_many_as_fit(views: Sequence[list[Query]], max_cells: float) -> list[list[Query]]:
    """The first views of each episode, so many that their padded batch has no more tokens than `max_cells`, but one at
    least. Batches are made before anything is known of the sizes that the evidence predicts: where it is wrong, one
    large canvas would pad all the others to its size. Of several processes each sees its own share alone: to know the
    others' sizes it would have to prepare their evidence too."""
    longest = max(query.cells for asked in views for query in asked)
    most = max(1, *map(len, views))
    while most > 1 and sum(min(most, len(asked)) for asked in views) * longest > max_cells:
        most -= 1
    return [asked[:most] for asked in views]


def keeps_latent(seed: int, epoch: int, index: int) -> bool:
    """Whether an episode has its task's latent: a coin whose outcome is a function of the episode."""
    return bool(np.random.SeedSequence([seed, epoch, index, 0x1A7E]).generate_state(1)[0] & 1)


# Of an episode: the number of its task, its queries, the context pairs that give feedback, the pairs that are read.
Parts = tuple[int, list[Query], list[Query], list[tuple[Grid, Grid]]]


def demonstration(task: Task, number: int, evidence: QueryEvidence, owner: int) -> Query:
    """A demonstration as a query, as it is."""
    pair = task.train[number]
    return make_query(pair.input, pair.output, evidence, Augmentation.IDENTITY, owner)
