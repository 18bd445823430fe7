"""The memory bank (arc/memory.py): what is stored, what is given up, what comes back."""

from __future__ import annotations

import pytest
import torch
from helpers import offer as offer_one
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arc.memory import MemoryBank

E, K, D = 3, 2, 4


def make_bank(capacity: int = 3) -> MemoryBank:
    return MemoryBank(capacity, E, K, D)


def offer(bank: MemoryBank, task: int, accuracy: float, *, threshold: float = 0.2, step: int = 0) -> bool:
    """Offer a value that says whose it is and when it was made, under a key along the task's own axis."""
    return offer_one(
        bank, torch.eye(E)[task % E], torch.full((K, D), task + step / 100), task, accuracy, threshold, step
    )


def entries(bank: MemoryBank) -> dict[int, tuple[float, int]]:
    taken = bank.task >= 0
    columns = (column[taken].tolist() for column in (bank.task, bank.accuracy, bank.stored_at))
    return {task: (round(accuracy, 4), step) for task, accuracy, step in zip(*columns, strict=True)}


# --------------------------------------------------------------------------------------------------------------------
# storing
# --------------------------------------------------------------------------------------------------------------------


def test_accuracy_must_beat_the_threshold() -> None:
    bank = make_bank()
    assert not offer(bank, 0, 0.2, threshold=0.2) and len(bank) == 0
    assert not offer(bank, 0, float("nan")) and len(bank) == 0
    assert offer(bank, 0, 0.21, threshold=0.2) and len(bank) == 1


def test_a_task_keeps_its_best_entry_and_the_newer_of_equals() -> None:
    bank = make_bank()
    assert offer(bank, 0, 0.5, step=1)
    assert not offer(bank, 0, 0.4, step=2) and entries(bank) == {0: (0.5, 1)}
    assert offer(bank, 0, 0.5, step=3) and entries(bank) == {0: (0.5, 3)}
    assert offer(bank, 0, 0.75, step=4) and entries(bank) == {0: (0.75, 4)}


def test_a_full_bank_gives_up_its_worst_and_oldest_entry_and_only_if_that_is_no_better() -> None:
    bank = make_bank()
    for step, (task, accuracy) in enumerate(((0, 0.5), (1, 0.25), (2, 0.25))):
        offer(bank, task, accuracy, step=step)
    assert not offer(bank, 3, 0.24, step=3) and set(entries(bank)) == {0, 1, 2}
    assert offer(bank, 3, 0.3, step=4) and set(entries(bank)) == {0, 2, 3}  # 1 was as bad as 2, and older
    assert offer(bank, 4, 0.25, step=5) and set(entries(bank)) == {0, 3, 4}  # as good as 2, and newer


OFFERS = st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), max_size=40)


@given(OFFERS)
def test_the_bank_is_bounded_with_one_best_entry_a_task(offers: list[tuple[int, float]]) -> None:
    bank = make_bank()
    for step, (task, accuracy) in enumerate(offers):
        before = entries(bank)
        stored = offer(bank, task, accuracy, threshold=0.3, step=step)
        after = entries(bank)
        assert len(after) == len(bank) <= 3 and int((bank.task >= 0).sum()) == len(after)
        assert all(accuracy > 0.3 for accuracy, _ in after.values())
        assert len(after) >= len(before)  # nothing is given up for nothing
        if stored:
            assert after[task] == (accuracy, step)
            assert accuracy >= before.get(task, (0.0, 0))[0]
            gone = before.keys() - after.keys()
            assert all(before[other] == min(before.values()) for other in gone)  # the worst; of equals, the oldest
        else:
            assert after == before


# --------------------------------------------------------------------------------------------------------------------
# recalling
# --------------------------------------------------------------------------------------------------------------------


def recalled(bank: MemoryBank, key: Tensor, count: int) -> list[float]:
    """The tasks whose prompts come back for one key (values of `offer` at step 0 are their task's number)."""
    return bank.recall(key[None], count)[:, 0, 0, 0].tolist()


def test_an_empty_bank_recalls_nothing() -> None:
    assert make_bank().recall(torch.randn(2, E), 4).shape == (0, 2, K, D)
    full = make_bank()
    offer(full, 0, 0.5)
    assert full.recall(torch.randn(2, E), 0).shape == (0, 2, K, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_nearest_entries_come_back_nearest_first(dtype: torch.dtype) -> None:
    bank = make_bank(8)
    for task in (0, 1, 2):
        offer(bank, task, 0.5)
    key = torch.tensor([0.1, 0.9, 0.4])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert recalled(bank, key, 2) == [1, 2]
        assert recalled(bank, 1000 * key, 9) == [1, 2, 0]  # as many as there are; a key's length does not count
        assert bank.recall(key[None].to(dtype), 1).dtype == torch.float32


@given(OFFERS, st.lists(st.integers(0, E - 1), min_size=1, max_size=4), st.integers(0, 5))
def test_each_context_recalls_on_its_own(offers: list[tuple[int, float]], axes: list[int], count: int) -> None:
    bank = make_bank(8)
    for step, (task, accuracy) in enumerate(offers):
        offer(bank, task, accuracy, step=step)
    keys = torch.eye(E)[axes] + 0.1
    found = bank.recall(keys, count)
    assert found.shape == (min(count, len(bank)), len(axes), K, D)
    for number, key in enumerate(keys):
        assert torch.equal(found[:, number], bank.recall(key[None], count)[:, 0])


def test_the_bank_survives_a_checkpoint() -> None:
    bank, restored = make_bank(), make_bank()
    for task, accuracy in ((0, 0.5), (1, 0.75)):
        offer(bank, task, accuracy, step=task)
    restored.load_state_dict(bank.state_dict())
    assert entries(restored) == entries(bank) and len(restored) == 2
    assert torch.equal(restored.recall(torch.ones(1, E), 2), bank.recall(torch.ones(1, E), 2))
