"""ARC-like tasks drawn from declared families: as many as are wanted, each a pure function of a few numbers.

A task is given by (seed, family, index), a pair of it by its number as well. Nothing is stored, and neither the order
of the families nor what was drawn before matters. What a pair may leave open: nothing (arc/generate/family.py).

Three ways to be new, from easy to hard:

* known tasks on new inputs: no demonstration of any task, however many are drawn, starts from a test input
  (`is_test_input`);
* unseen tasks of known families: other colours, directions, choices than any task that is trained on, where a family
  has enough of them (`Family.settings`);
* unseen families: HELD_OUT.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from arc.generate import cells, things, whole
from arc.generate.family import Family, number_of
from arc.run.files import UserError
from arc.run.flags import comma_separated
from arc.tasks import MAX_SIDE, DataSet, Pair, Task

FAMILIES: dict[str, Family] = {family.name: family for family in (*whole.FAMILIES, *cells.FAMILIES, *things.FAMILIES)}
BASIC = (
    *("recolour", "fill", "outline", "line", "flip", "shift"),
    *("gravity", "crop", "enlarge", "tile", "commonest", "mirror"),
)
HELD_OUT = (
    "by_size",
    "continue",
    "fractal",
    "key",
    "overlay",
    "sort_bars",
)  # never trained on unless asked for by name
KNOWN = tuple(sorted(FAMILIES.keys() - set(HELD_OUT)))

GENERATED = "generated"  # what --data, --unseen and --extra_data call these tasks
MIN_SIDE = 6  # the least `max_side`: all families can be drawn in it
TESTS = 2  # test pairs of a task
UNSEEN = 10  # unseen tasks that are held back of each family, unless told otherwise
UNSEEN_TASK, UNSEEN_FAMILY = "unseen_task-", "unseen_family-"  # what ids of evaluation tasks start with

_MAX_REPEATS = 200  # draws for one more distinct input; only a family with too few possible inputs needs so many


def family_list(text: str) -> tuple[str, ...]:
    """'basic,key' -> the names of the basic families and "key", each once. A type for argparse: basic, known (those
    that are not held out), all, and names, separated by commas."""
    sets = {"basic": BASIC, "known": KNOWN, "all": tuple(sorted(FAMILIES))}
    words = comma_separated(text)
    if unknown := [word for word in words if word not in sets and word not in FAMILIES]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is none of basic, known, all and the families {', '.join(sorted(FAMILIES))}"
        )
    if not words:
        raise argparse.ArgumentTypeError("no family is named")
    return tuple(dict.fromkeys(name for word in words for name in sets.get(word, (word,))))


def pair(seed: int, family: str, index: int, number: int, *, max_side: int, test: bool = False) -> Pair:
    """Pair `number` of a task: demonstrations, or test pairs, without end. Two numbers may give the same input.

    The fresh pairs of a task with n demonstrations are the numbers from n on, or any larger ones.
    """
    _check(seed, (family,), max_side)
    rng = np.random.default_rng([seed, number_of(family), index, int(test), number])
    return FAMILIES[family].pair(rng, FAMILIES[family].fixed(seed, index), max_side, test=test)


def task(seed: int, family: str, index: int, *, pairs: int, tests: int, max_side: int, prefix: str = "") -> Task:
    """The task with this index, `prefix` before its id: the first `pairs` distinct demonstrations and the first `tests`
    distinct test pairs that `pair` gives, so that asking for more of them changes none of them.

    max_side: the most rows and columns of any grid, 6 to 30.
    """
    train, test = (
        _distinct_pairs(seed, family, index, count, max_side, test=test)
        for count, test in ((pairs, False), (tests, True))
    )
    return Task(f"{prefix}{family}-{index:06d}", train, test)


def _distinct_pairs(seed: int, family: str, index: int, count: int, max_side: int, *, test: bool) -> tuple[Pair, ...]:
    found: dict[tuple[tuple[int, ...], bytes], Pair] = {}
    repeats = 0
    for number in itertools.count():
        if len(found) == count:
            break
        new = pair(seed, family, index, number, max_side=max_side, test=test)
        repeats = repeats + 1 if found.setdefault((new.input.shape, new.input.tobytes()), new) is not new else 0
        if repeats > _MAX_REPEATS:
            raise UserError(f"family {family} has not {count} different pairs with sides of at most {max_side}")
    return tuple(found.values())


def origin(task_id: str) -> tuple[str, int] | None:
    """(family, index) of a generated task, from its id; None for any other id."""
    family, _, index = task_id.removeprefix(UNSEEN_TASK).removeprefix(UNSEEN_FAMILY).rpartition("-")
    if family not in FAMILIES or not index.isdecimal():
        return None
    return family, int(index)


# ----------------------------------------------------------------------------------------------------------------------
# What is trained on, and what is new


def generated_dataset(
    families: Sequence[str],
    tasks: int,
    pairs: int,
    max_side: int,
    seed: int,
    *,
    tests: int = TESTS,
    unseen: int = UNSEEN,
) -> DataSet:
    """`tasks` tasks of each of `families` to train on, and unseen ones to evaluate on.

    Each task has `pairs` demonstrations and `tests` test pairs. The evaluation part has `unseen` further tasks of each
    of `families` (ids "unseen_task-...") and `unseen` tasks of each family of HELD_OUT that is not one of `families`
    ("unseen_family-..."). With `tasks` 0 there are no training tasks: they are drawn by FreshTasks, without end.

    Raises UserError, one line, for arguments that cannot be used.
    """
    _check(seed, families, max_side, tasks=tasks, pairs=pairs, tests=tests, unseen=unseen)
    draw = partial(task, seed, pairs=pairs, tests=tests, max_side=max_side)
    training = [draw(name, index) for name in families for index in range(tasks)]
    evaluation = [
        draw(name, _unseen_index(FAMILIES[name], tasks, unseen, number), prefix=UNSEEN_TASK)
        for name in families
        for number in range(unseen)
    ]
    evaluation += [
        draw(name, number, prefix=UNSEEN_FAMILY)
        for name in HELD_OUT
        if name not in families
        for number in range(unseen)
    ]
    return DataSet.of("generated", training, evaluation)


@dataclass(frozen=True)
class FreshTasks:
    """Tasks to train on without end: each (epoch, index) is another one, whichever were drawn before.

    None of them fixes the same as one of the `unseen` tasks that `generated_dataset(..., tasks=0)` holds back: of each
    family it leaves out so many settings, but at most a quarter.
    """

    families: tuple[str, ...]
    seed: int
    unseen: int = UNSEEN

    def place(self, epoch: int, index: int) -> tuple[str, int]:
        """Family and index of the task."""
        words = np.random.SeedSequence([self.seed, epoch, index]).generate_state(2, np.uint64).tolist()
        name = sorted(self.families)[words[0] % len(self.families)]
        settings = FAMILIES[name].settings
        turn, place = divmod(words[1] >> 16, settings - _held_back(settings, 0, self.unseen))
        return name, settings * (turn + self.unseen + 1) + place  # beyond the indices of the unseen tasks


def _held_back(settings: int, tasks: int, unseen: int) -> int:
    """How many settings of a family are kept for unseen tasks: the last ones, while the training tasks take the first.

    tasks: the training tasks of the family; 0: without end.
    """
    return max(0, min(unseen, settings - tasks if tasks else settings // 4))


def _unseen_index(family: Family, tasks: int, unseen: int, number: int) -> int:
    """The index of unseen task `number` of a family: past all training tasks, with one of the settings held back.

    Where none can be held back the setting is one that training tasks have too, and only the inputs are new.
    """
    settings = family.settings
    place = settings - 1 - number % (_held_back(settings, tasks, unseen) or settings)
    return settings * (tasks // settings + 1 + number) + place


def _check(seed: int, families: Sequence[str], max_side: int, **counts: int) -> None:
    if unknown := [name for name in families if name not in FAMILIES]:
        raise UserError(f"unknown family of generated tasks {unknown[0]!r}; there are {', '.join(sorted(FAMILIES))}")
    if not families or len(set(families)) < len(families):
        raise UserError("families of generated tasks must be named, each once")
    if not MIN_SIDE <= max_side <= MAX_SIDE:
        raise UserError(f"sides of generated grids are limited to {MIN_SIDE}..{MAX_SIDE} cells, not {max_side}")
    if seed < 0:
        raise UserError(f"the seed of generated tasks must be 0 or more, not {seed}")
    for name, count in counts.items():
        if count < (1 if name in ("pairs", "tests") else 0):
            raise UserError(f"generated tasks cannot have {name} = {count}")
