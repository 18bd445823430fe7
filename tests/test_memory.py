"""The memory bank (arc/memory.py): what is stored, what is given up, what is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arc.memory import MemoryBank

E, K, D = 3, 2, 4


def make_bank(capacity: int = 3, **options: int) -> MemoryBank:
    return MemoryBank(capacity, E, K, D, **options)


def offer(bank: MemoryBank, task: int, accuracy: float, *, threshold: float = 0.2, step: int = 0) -> bool:
    """Offer a value that says whose it is and when it was made, under a key along the task's own axis."""
    return bank.offer(torch.eye(E)[task % E], torch.full((K, D), task + step / 100), task, accuracy, threshold, step)


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
# reading
# --------------------------------------------------------------------------------------------------------------------


def read(bank: MemoryBank, key: Tensor, task: int) -> Tensor:
    return bank.read(key[None], torch.tensor([task]))[0].detach() / bank.gate.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_bank_gives_zero_in_every_precision(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found = make_bank().read(torch.randn(2, E), torch.tensor([0, 1]))
    assert found.shape == (2, K, D) and torch.equal(found.float(), torch.zeros(2, K, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_task_never_reads_its_own_entry(dtype: torch.dtype) -> None:
    bank = make_bank()
    offer(bank, 0, 0.5)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found = bank.read(torch.eye(E)[[0, 0]], torch.tensor([0, 5])).float()
    assert torch.equal(found[0], torch.zeros(K, D))
    bank.values[0] = 1  # the other one does read it
    assert bool((bank.read(torch.eye(E)[:1], torch.tensor([5])) != 0).all())


@given(OFFERS, st.integers(0, 6), st.integers(0, E - 1))
def test_what_a_task_reads_does_not_depend_on_its_own_entry(
    offers: list[tuple[int, float]], reader: int, axis: int
) -> None:
    own, without = make_bank(8, neighbours=8), make_bank(8, neighbours=8)
    for step, (task, accuracy) in enumerate(offers):
        offer(own, task, accuracy, step=step)
        if task != reader:
            offer(without, task, accuracy, step=step)
    key = torch.eye(E)[axis] + 0.1
    assert torch.allclose(read(own, key, reader), read(without, key, reader), atol=1e-5)


def test_readers_of_a_batch_are_each_on_their_own() -> None:
    """Two keys of different lengths, two neighbours: weights by hand, likeness over 0.1."""
    bank = make_bank(8)
    for task in (0, 1):
        offer(bank, task, 0.5)
    keys = torch.tensor([[1.0, 0.9, 0.0], [90.0, 100.0, 0.0]])
    found = bank.read(keys, torch.tensor([98, 99])).detach() / bank.gate.detach()
    for key, value in zip(keys, found, strict=True):
        likeness = (key / key.norm())[:2] / 0.1
        assert torch.allclose(value, likeness.softmax(0)[1].expand(K, D), atol=1e-5)  # entry 1's prompt is all ones


def test_the_nearest_entries_are_read() -> None:
    bank = make_bank()
    for task in (0, 1, 2):
        offer(bank, task, 0.5)
    for near in (1, 2):
        found = read(bank, 10 * torch.eye(E)[near], 99)  # length of a key does not count
        assert torch.allclose(found, torch.full((K, D), float(near)), atol=1e-3)
    only = make_bank(8, neighbours=1)
    for task in (1, 2):
        offer(only, task, 0.5)
    assert torch.allclose(read(only, torch.tensor([0.0, 0.51, 0.49]), 99), torch.full((K, D), 1.0))


def test_gradient_flows_into_the_gate_and_into_the_readers_key() -> None:
    bank = make_bank()
    for task in (0, 1):
        offer(bank, task, 0.5)
    key = torch.randn(1, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bank.read(key, torch.tensor([9])).sum().backward()
    assert bank.gate.grad is not None and float(bank.gate.grad) != 0
    assert key.grad is not None and bool((key.grad != 0).any())


def test_the_bank_survives_a_checkpoint() -> None:
    bank, restored = make_bank(), make_bank()
    for task, accuracy in ((0, 0.5), (1, 0.75)):
        offer(bank, task, accuracy, step=task)
    restored.load_state_dict(bank.state_dict())
    assert entries(restored) == entries(bank) and len(restored) == 2
    assert torch.equal(read(restored, torch.ones(E), 9), read(bank, torch.ones(E), 9))
