"""Which tasks are predicted together, under which name, and which of them a run has trained on.

Looks at demonstration pairs and test inputs, never at a test output.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from arc.datasets import BUILT_IN_SETS, load_dataset
from arc.generate import GENERATED, UNSEEN_FAMILY, UNSEEN_TASK, generated_dataset, origin
from arc.run.files import UserError
from arc.run.flags import comma_separated
from arc.tasks import DataSet, Pair, Task, drop_duplicates, twins_of

# The number of a task that is none of the training tasks: no latent is its own.
NEW = -2

DEV_SPLITS = ("dev_unseen", "dev_seen")
LABELS = {
    "seed": "seed split (test pairs of the training tasks)",
    "unseen": "unseen split (tasks never trained on)",
    "adapted": "adapted split (evaluation tasks whose demonstration pairs were trained on)",
    "families": "families split (tasks of families never trained on)",
    "dev_unseen": "dev_unseen split (demonstrations of tasks held out whole)",
    "dev_seen": "dev_seen split (a held-out demonstration of each training task)",
    "new": "new tasks (told by their inputs, none of them was trained on)",
    "known": "known tasks (the same puzzle, told by its inputs, was trained on)",
}


@dataclass(frozen=True)
class Split:
    """Tasks whose test pairs are predicted and scored together.

    numbers: for each task its position among the training tasks, which is the number its latent is found by, or NEW.
    """

    name: str
    tasks: tuple[Task, ...]
    numbers: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """How many test pairs there are."""
        return sum(len(task.test) for task in self.tasks)

    def first(self, limit: int) -> Split:
        """The split with its first `limit` tasks only; 0: all."""
        return Split(self.name, self.tasks[: limit or None], self.numbers[: limit or None])

    def share(self, rank: int, size: int) -> Split:
        """Every `size`-th task from `rank` on: what one of several processes predicts."""
        return Split(self.name, self.tasks[rank::size], self.numbers[rank::size])


def split_list(text: str) -> tuple[str, ...]:
    """'seed,unseen' -> ('seed', 'unseen')."""
    splits = comma_separated(text)
    known = {"seed", "unseen", "adapted", "families", *DEV_SPLITS}
    if not splits or not set(splits) <= known or len(set(splits)) < len(splits):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seed, unseen, adapted, families")
    return tuple(splits)


def adapted_tasks(evaluation: Sequence[Task], start: int) -> tuple[tuple[Task, ...], tuple[int, ...]]:
    """The evaluation tasks whose demonstration pairs are trained on, numbered from `start` on, and the number of each
    evaluation task.

    A puzzle that is there twice is trained on once. One whose demonstrations show a test input of its twin is not
    trained on at all: the twin's test output would be among them.
    """
    twins_in = twins_of(evaluation)
    chosen: list[Task] = []
    number_of: dict[str, int] = {}  # by task id
    for task in evaluation:
        twins = twins_in(task)
        earlier = [number_of[twin.id] for twin in twins if number_of.get(twin.id, NEW) != NEW]
        if earlier:
            number_of[task.id] = min(earlier)
        elif _shows(task, twins):
            number_of[task.id] = NEW
        else:
            number_of[task.id] = start + len(chosen)
            chosen.append(task)
    return tuple(chosen), tuple(number_of[task.id] for task in evaluation)


def apart_from_twins(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """The tasks without those that show a test input of an earlier twin, or have one that it shows: the twin's test
    output would be trained on. In published sets there are none, in a folder of copies that leave another pair out each
    there are."""
    twins = twins_of(tasks)
    kept: dict[str, Task] = {}
    for task in tasks:
        earlier = [twin for twin in twins(task) if twin.id in kept]
        if not (_shows(task, earlier) or any(_shows(twin, [task]) for twin in earlier)):
            kept[task.id] = task
    return tuple(kept.values())


def _shows(task: Task, others: Iterable[Task]) -> bool:
    """Whether a demonstration of `task` starts from a test input of one of `others`."""
    return len(_not_asked(task, _asked(others))) < len(task.train)


Inputs = Set[tuple[tuple[int, ...], bytes]]


def _asked(tasks: Iterable[Task]) -> Inputs:
    """The test inputs of the tasks."""
    return {(pair.input.shape, pair.input.tobytes()) for task in tasks for pair in task.test}


def _less(tasks: Iterable[tuple[Task, Inputs]]) -> tuple[Task, ...]:
    """Each task without the demonstrations that start from the inputs beside it; those that have two left."""
    kept = (Task(task.id, _not_asked(task, asked), task.test) for task, asked in tasks)
    return tuple(task for task in kept if len(task.train) > 1)


def _not_asked(task: Task, asked: Inputs) -> tuple[Pair, ...]:
    """The demonstrations of `task` that start from none of these inputs."""
    return tuple(pair for pair in task.train if (pair.input.shape, pair.input.tobytes()) not in asked)


# ----------------------------------------------------------------------------------------------------------------------
# A development split, made from demonstrations: designs are chosen on it without a look at a test pair


@dataclass(frozen=True)
class Development:
    """Tasks whose test pairs are held-out demonstrations, one each, or that have none.

    training: what is trained on; its first `len(seen)` tasks are `seen`, so that a number means the same task in both.
    seen: less one demonstration, which is their test pair. unseen: every demonstration of the tasks held out whole,
    each as a task that has the others. dropped: number of training tasks with the content of one that is held out.
    """

    training: tuple[Task, ...]
    seen: tuple[Task, ...]
    unseen: tuple[Task, ...]
    dropped: int

    def __str__(self) -> str:
        return (
            f"Development split (no test pair is used): dev_unseen has {len(self.unseen)} demonstrations of tasks held "
            f"out whole, dev_seen one demonstration of each of {len(self.seen)} of the {len(self.training)} training "
            f"tasks; {self.dropped} training tasks with the content of a held-out one are left out"
        )


def hold_out(task: Task, demonstration: int) -> Task:
    """The task as it is where `demonstration` is not known: its only test pair, the others demonstrate."""
    rest = tuple(pair for number, pair in enumerate(task.train) if number != demonstration)
    return Task(f"{task.id}-{demonstration}", rest, (task.train[demonstration],))


def carve(tasks: Sequence[Task], *, whole: int, seed: int) -> Development:
    """Draw a development split: `whole` tasks are held out whole, the others keep all but one demonstration.

    Test pairs are removed first: neither what is drawn nor what is trained on or predicted depends on them. A task of
    two demonstrations would be left with one, which is no context, so it is trained on complete and not scored. Raises
    UserError if nothing would be left to train on.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0xDE7])))
    bare = [Task(task.id, task.train, ()) for task in tasks]
    order = rng.permutation(len(bare)).tolist()
    chosen = [number for number in order if len(bare[number].train) > 1][:whole]
    held = [bare[number] for number in sorted(chosen)]
    rest, dropped = drop_duplicates([bare[number] for number in sorted(set(order) - set(chosen))], held)
    if len(held) < whole or not rest:
        raise UserError(f"--dev_tasks {whole}: of {len(bare)} training tasks none would be left to train on")
    draws = {task.id: int(rng.integers(len(task.train))) for task in rest}
    seen = tuple(hold_out(task, draws[task.id]) for task in rest if len(task.train) > 2)
    complete = tuple(task for task in rest if len(task.train) <= 2)
    unseen = tuple(hold_out(task, number) for task in held for number in range(len(task.train)))
    training = apart_from_twins((*seen, *complete))
    return Development(training, tuple(task for task in training if task.test), unseen, len(dropped))


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint records of the tasks it was trained on


def training_fingerprint(training: Sequence[Task]) -> str:
    """SHA-256 (hex) over the training tasks in their order; any other task, id or order gives another one."""
    return hashlib.sha256("\n".join(f"{task.digest} {task.id}" for task in training).encode()).hexdigest()


def input_digests(tasks: Sequence[Task]) -> Tensor:
    """(n, 2) int64: for each distinct input grid of each task, the task's position and 64 bits of the grid's digest.

    Enough to tell later, without the data, whether a task is one of these.
    """
    rows = [(number, digest) for number, task in enumerate(tasks) for digest in sorted(_digests(task))]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


def _digests(task: Task) -> set[int]:
    return {int.from_bytes(key[:8], "little", signed=True) for key in task.content_key}


def splits_by_content(tasks: Sequence[Task], trained: Tensor) -> tuple[Split, ...]:
    """`tasks` divided into `new` and `known` (those that are there), by what the training tasks contained.

    trained: their `input_digests`. Two tasks are the same puzzle by the rule of `same_content`: more than half of the
    inputs of the smaller one are in the other too.
    """
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for number, digest in trained.tolist():
        owners[digest].append(number)
    sizes = Counter(trained[:, 0].tolist())
    parts: dict[str, list[tuple[Task, int]]] = {"new": [], "known": []}
    for task in tasks:
        digests = _digests(task)
        shared = Counter(number for digest in sorted(digests) for number in owners.get(digest, ()))
        same = [(n, -number) for number, n in shared.items() if 2 * n > min(len(digests), sizes[number])]
        number = -max(same)[1] if same else NEW
        parts["known" if same else "new"].append((task, number))
    return tuple(
        Split(name, tuple(task for task, _ in part), tuple(number for _, number in part))
        for name, part in parts.items()
        if part
    )


def not_known(splits: Iterable[Split], trained: Tensor, log: Callable[[str], None]) -> tuple[Split, ...]:
    """The splits, those of tasks that were never trained on without what by content is among them: an evaluation may
    name others as unseen than the training did. UserError if nothing is left."""
    found: list[Split] = []
    for split in splits:
        parts = splits_by_content(split.tasks, trained) if split.name in ("unseen", "families") else ()
        known = {task.id for part in parts if part.name == "known" for task in part.tasks}
        if known:
            log(f"{split.name.capitalize()} split: {len(known)} of {len(split.tasks)} tasks were trained on: left out")
            kept = tuple(task for task in split.tasks if task.id not in known)
            split = Split(split.name, kept, (NEW,) * len(kept))
        if split.tasks:
            found.append(split)
    if not found:
        raise UserError("--eval_only: all tasks of --val_splits were trained on; --data PATH scores them as known")
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------------------
# What a command trains on and predicts


class Choice(Protocol):
    """The flags that decide it."""

    data: str
    unseen: str
    adapt: bool
    dev: bool
    dev_tasks: int
    seed: int
    val_splits: tuple[str, ...]
    val_limit: int
    eval_only: bool
    submission: str | None
    families: tuple[str, ...]
    tasks: int
    pairs: int
    max_side: int
    extra_data: str | None


def load(args: Choice, spec: str, *, as_evaluation: bool = False) -> DataSet:
    """The data set that --data or --unseen (as_evaluation) names."""
    if spec == GENERATED:
        return generated_dataset(args.families, args.tasks, args.pairs, args.max_side, args.seed)
    return load_dataset(spec, as_evaluation=as_evaluation)


def check_places(args: Any, given: Collection[str]) -> None:
    """UserError if data whose name a checkpoint brought (not one of the flags `given`) is not on this machine, or not
    below this folder."""
    for name in ("data",) if args.eval_only else ("data", "extra_data"):
        spec = getattr(args, name)
        known = spec is None or name in given or spec in (*BUILT_IN_SETS, GENERATED)
        if not (known or os.path.exists(spec)):
            raise UserError(f"--resume: the checkpoint's --{name} {spec!r} is not here; give --{name}")


class Chosen(NamedTuple):
    """The tasks of a command. trained_on: what a checkpoint records of the data, to recognise them."""

    data: DataSet
    training: tuple[Task, ...]
    splits: tuple[Split, ...]  # what is predicted and scored
    trained_on: dict[str, Any]
    extra: tuple[Task, ...]  # from a file of --extra_data: trained on, never predicted


def choose_tasks(args: Choice, trained_on: Mapping[str, Any] | None, log: Callable[[str], None]) -> Chosen:
    """Load --data and choose from it. trained_on: what the checkpoint to be continued or evaluated recorded. An
    evaluation on other data, or for a submission, is of every task of it."""
    data = load(args, args.data)
    for note in data.notes:
        log(note)
    if args.eval_only and trained_on and (args.submission or trained_on["data"] != data.fingerprint):
        training: tuple[Task, ...] = ()
        if args.data == GENERATED:
            data = of_families(data, args.families)
        splits = splits_by_content(all_tasks(data), trained_on["inputs"])
    else:
        training, splits = split_tasks(args, data, log)
        looked_at = args.adapt or args.extra_data or {"unseen", "adapted"} & set(args.val_splits)
        if args.unseen not in (*BUILT_IN_SETS, GENERATED) and not looked_at:
            log(f"--unseen {args.unseen} is not looked at: --val_splits seed,unseen scores it")
        if args.eval_only and trained_on:
            splits = not_known(splits, trained_on["inputs"], log)
    extra = () if args.eval_only or args.extra_data is None else held_apart(args, load_extra(args), splits, log)
    record = {
        "data": data.fingerprint,
        "training": training_fingerprint(training),
        "extra": training_fingerprint(extra),
        "inputs": input_digests((*training, *extra)),
    }
    return Chosen(data, training, tuple(split.first(args.val_limit) for split in splits), record, extra)


def check_record(state: Mapping[str, Any]) -> None:
    """KeyError, TypeError or AttributeError if a checkpoint's `state` does not hold what a run is built from: on which
    data it was trained (`Chosen.trained_on`), and its models by name."""
    record = state["extra"]["data"]
    inputs = record["inputs"]
    if not all(isinstance(record[name], str) for name in ("data", "training", "extra")):
        raise TypeError("data: not the fingerprints of data")
    if not isinstance(inputs, Tensor) or inputs.dtype != torch.int64 or inputs.shape[1:] != (2,):
        raise TypeError("data/inputs: not the digests of inputs")
    for name, part in state["model"].items():
        if not isinstance(part, Mapping):
            raise TypeError(f"model/{name}: not tensors by name")


def load_extra(args: Choice) -> tuple[Task, ...]:
    """The tasks of a file or folder of --extra_data, of each list of pairs all but the last; none for generated ones,
    which are drawn when they are needed. No demonstration starts from a test input of its task: the same file may be
    validated on. UserError for what cannot be trained on."""
    if args.data == GENERATED:
        raise UserError(f"--extra_data {args.extra_data}: goes with other --data than {GENERATED}")
    if args.extra_data == GENERATED:
        return ()
    try:
        tasks = load_dataset(str(args.extra_data), whole_lists=True).training
    except UserError as error:
        raise UserError(f"--extra_data: {error}") from None
    found = _less((task, _asked([task])) for task in tasks)
    if not found:
        raise UserError(f"--extra_data {args.extra_data}: no training task with two demonstrations in it")
    return found


def held_apart(
    args: Choice, extra: tuple[Task, ...], splits: Sequence[Split], log: Callable[[str], None]
) -> tuple[Task, ...]:
    """What of `extra` may be trained on beside `splits`: no task, by id or content, of those that are new there, and no
    demonstration that starts from an input which is asked there. UserError if that leaves nothing."""
    new = [task for split in splits for task, number in zip(split.tasks, split.numbers, strict=True) if number == NEW]
    if args.dev:  # `hold_out` has put the number of the demonstration behind the id
        new = [Task(task.id.rpartition("-")[0], task.train, task.test) for task in new]
    kept, dropped = drop_duplicates(extra, new)
    if dropped:
        log(f"Extra data: {len(dropped)} of {len(extra)} tasks are also among those held back, and are not trained on")
    asked = _asked(task for split in splits for task in split.tasks)
    found = _less((task, asked) for task in kept)
    if extra and not found:
        raise UserError(f"--extra_data {args.extra_data}: all that is in it is held back for --val_splits")
    return found


def split_tasks(args: Choice, data: DataSet, log: Callable[[str], None]) -> tuple[tuple[Task, ...], tuple[Split, ...]]:
    """What is trained on, and the splits of --val_splits.

    A training task that is also an evaluation task, by content, is not trained on: the unseen split holds it back,
    and the adapted one trains on the evaluation set's copy, whose test pairs are scored.
    """
    drawn = args.data == GENERATED
    if drawn and args.unseen == GENERATED and not (args.adapt or args.dev):
        return generated_splits(args, data, log)
    if not (data.training or args.adapt or drawn):
        raise UserError(
            f"--data {args.data}: no training tasks in it, only {len(data.evaluation)} evaluation tasks; --adapt "
            "trains on their demonstration pairs, --eval_only predicts them"
        )
    training = data.training if args.dev or drawn else apart_from_twins(data.training)
    if fewer := len(data.training) - len(training):
        log(f"Left out: {fewer} of {len(data.training)} tasks share test pairs with the same puzzle by another id")
    if args.dev:
        development = carve(data.training, whole=args.dev_tasks, seed=args.seed)
        log(str(development))
        unseen, seen = development.unseen, development.seen
        splits = {
            "dev_unseen": Split("dev_unseen", unseen, (NEW,) * len(unseen)),
            "dev_seen": Split("dev_seen", seen, tuple(range(len(seen)))),
        }
        return development.training, chosen_splits(args, splits, log)
    name = "adapted" if args.adapt else "unseen"
    kept: tuple[Task, ...] = training
    evaluation: tuple[Task, ...] = ()
    if name in args.val_splits or args.adapt:
        own = not (data.training or drawn)
        evaluation = data.evaluation if own else load(args, args.unseen, as_evaluation=True).evaluation
        if not evaluation:
            raise UserError(f"--unseen {args.unseen}: there are no evaluation tasks in it")
        kept, dropped = drop_duplicates(training, evaluation)
        if dropped:
            log(
                f"{name.capitalize()} split: {len(dropped)} of {len(training)} training tasks are also among the "
                f"{len(evaluation)} evaluation tasks and are {'trained on once' if args.adapt else 'not trained on'}"
            )
    added, numbers = adapted_tasks(evaluation, len(kept)) if args.adapt else ((), (NEW,) * len(evaluation))
    if not (kept or added or drawn):
        raise UserError(
            f"--unseen {args.unseen}: every training task is also an evaluation task; nothing is left to train"
        )
    splits = {"seed": Split("seed", kept, tuple(range(len(kept)))), name: Split(name, evaluation, numbers)}
    return kept + added, chosen_splits(args, splits, log)


def generated_splits(
    args: Choice, data: DataSet, log: Callable[[str], None]
) -> tuple[tuple[Task, ...], tuple[Split, ...]]:
    """Three ways to be new: new inputs of the tasks that are trained on (seed; none where fresh tasks are), other tasks
    of their families (unseen), and families that are not trained on."""
    training = data.training
    unseen, families = (
        tuple(task for task in data.evaluation if task.id.startswith(prefix)) for prefix in (UNSEEN_TASK, UNSEEN_FAMILY)
    )
    splits = {
        "seed": Split("seed", training, tuple(range(len(training)))),
        "unseen": Split("unseen", unseen, (NEW,) * len(unseen)),
        "families": Split("families", families, (NEW,) * len(families)),
    }
    return training, chosen_splits(args, splits, log)


def chosen_splits(args: Choice, splits: Mapping[str, Split], log: Callable[[str], None]) -> tuple[Split, ...]:
    """Those of --val_splits that have tasks, the others are said; UserError if there is none."""
    asked = [splits[each] for each in args.val_splits if each in splits]
    chosen = tuple(split for split in asked if split.tasks)
    if not chosen:
        raise UserError(f"--val_splits {','.join(args.val_splits)}: there is no such task in --data {args.data}")
    for split in asked:
        if not split.tasks:
            log(f"{split.name.capitalize()} split: there is no task in it")
    return chosen


def of_families(data: DataSet, families: Collection[str]) -> DataSet:
    """The generated tasks of these families: what is held back for a training has others too."""
    kept = [task for task in data.evaluation if (found := origin(task.id)) is not None and found[0] in families]
    return DataSet.of(data.name, data.training, kept)


def all_tasks(data: DataSet) -> list[Task]:
    """Every task of the data, whatever part it is in, by id."""
    return sorted(data.training + data.evaluation, key=lambda task: task.id)
