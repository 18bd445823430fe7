"""The mixture of what the tables say (arc/mixture.py): the plain formulas, forwards and back."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arc import mixture
from arc.fused import Unit
from arc.mixture import NOTHING, Sayings

B, L, T, W, R = 2, 5, 7, 8, 3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes() -> Tensor:
    """(B, L, T): colours and classes at random; no table speaks about cell 1, one alone about cell 2."""
    generator = torch.Generator().manual_seed(5)
    colour, confidence = (torch.randint(0, end, (B, L, T), generator=generator) for end in (10, 4))
    confidence[:, 1] = 0
    confidence[:, 2], confidence[:, 2, 0] = 0, 1
    return torch.where(confidence > 0, colour + 10 * confidence, 0).to(torch.uint8)


def plain_trust(by_query: Tensor, by_class: Tensor) -> Tensor:
    values = torch.cat((torch.tensor([-1e4], dtype=by_class.dtype), by_class))
    return by_query[:, None] + values[codes().long() // 10]


def plain_readout(read: Tensor, trusted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    told, speaks = read @ weight.T, codes() >= 10
    weights = (told[..., :T] + trusted).softmax(-1) * speaks
    return torch.einsum("blt,bltc->blc", weights, F.one_hot(codes().long() % 10, 10).double()), told[..., T:]


def arguments() -> list[Tensor]:
    return [drawn(B, T, seed=1), drawn(3, seed=2), drawn(B, L, W, seed=3), drawn(T + R, W, seed=4)]


def plain(*given: Tensor) -> tuple[Tensor, ...]:
    by_query, by_class, read, weight = given
    return plain_readout(read, plain_trust(by_query, by_class), weight)


def by_hand(*given: Tensor) -> tuple[Tensor, ...]:
    by_query, by_class, read, weight = given
    sayings = Sayings.of(codes())
    sayings.spoken = sayings.spoken.to(read.dtype)
    return mixture.readout(read, mixture.trust(by_query, by_class, sayings), weight, sayings)


def test_every_code_means_its_colour_and_its_class() -> None:
    every = [(colour, confidence) for colour, confidence in product(range(10), range(4)) if confidence or not colour]
    sayings = Sayings.of(torch.tensor([[[colour + 10 * confidence for colour, confidence in every]]]).to(torch.uint8))
    assert sayings.place.tolist() == [[[colour for colour, _ in every]]]
    assert sayings.confidence.tolist() == [[[confidence for _, confidence in every]]]
    assert sayings.colour.tolist() == [[[colour if confidence else NOTHING for colour, confidence in every]]]
    assert sayings.spoken.tolist() == [[[1.0]]]
    assert Sayings.of(codes()).spoken[:, :, 0].tolist() == [[1, 0, 1, 1, 1]] * B


def test_the_mixture_weighs_what_the_tables_say() -> None:
    sayings = Sayings.of(torch.tensor([[[17, 27, 33, 0]]], dtype=torch.uint8))  # the last table is silent
    trusted = mixture.trust(torch.tensor([[0.0, 0.0, math.log(2), 5.0]]), torch.zeros(3), sayings)
    assert mixture.vote(trusted, sayings)[0, 0].tolist() == pytest.approx([0, 0, 0, 0.5, 0, 0, 0, 0.5, 0, 0])
    silent = Sayings.of(torch.zeros(1, 1, 4, dtype=torch.uint8))
    assert mixture.vote(torch.full((1, 1, 4), -1e4), silent).eq(0).all()


def test_classes_are_marked_table_by_table() -> None:
    sayings = Sayings.of(torch.tensor([[[17, 27, 33, 0]]], dtype=torch.uint8))
    agrees, mixed, few, many = sayings.classes(torch.tensor([[7]]), torch.bfloat16).view(4, 4).tolist()
    assert (agrees, mixed, few, many) == ([1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0])
    assert sayings.classes(torch.tensor([[0]]), torch.float32)[0, 0, :4].eq(0).all()  # silence agrees with nothing


def test_forwards_it_is_the_plain_formula() -> None:
    for ours, theirs in zip(by_hand(*arguments()), plain(*arguments()), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_the_way_back_is_that_of_the_plain_formula() -> None:
    gradients = []
    for function in (by_hand, plain):
        given = [argument.requires_grad_() for argument in arguments()]
        mixed, rest = function(*given)
        told = (mixed * drawn(B, L, 10, seed=6)).sum() + (rest * drawn(B, L, R, seed=7)).sum()
        gradients.append(torch.autograd.grad(told, given))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 1e-2
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_what_is_held_gets_no_gradient() -> None:
    by_query, by_class, read, weight = arguments()
    mixed, rest = by_hand(by_query.requires_grad_(), by_class, read.requires_grad_(), weight)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(mixed[..., 3].sum(), (by_query, read)))


def test_the_norm_is_torchs() -> None:
    x = drawn(3, 4, 8, seed=8).requires_grad_()
    ours, theirs = Unit.apply(x), F.rms_norm(x, x.shape[-1:])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    toward = drawn(3, 4, 8, seed=9)
    back, plain_back = (torch.autograd.grad((result * toward).sum(), x)[0] for result in (ours, theirs))
    assert torch.allclose(back, plain_back, rtol=0, atol=1e-12)


def test_products_are_in_the_autocasts_dtype() -> None:
    exact = by_hand(*(argument.float() for argument in arguments()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = by_hand(*(argument.float() for argument in arguments()))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert 0 < float((a - b).abs().max()) < 0.05
