"""The halves of the agent's blocks for CPUs (arc/fused.py): the plain formulas, forwards and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc import fused
from arc.agent import GridAgent, rotary_angles, rotary_frequencies, rotate
from arc.augment import Augmentation
from arc.batches import Query, QueryBatch, collate_queries
from arc.evidence import NUM_RULES, NUM_TABLES

B, L, H, W = 3, 5, 8, 32
Half = Callable[..., tuple[Tensor, Tensor]]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FREQUENCIES = rotary_frequencies(W // H).double()
PLACE = drawn(B, 1, L, 2, seed=1)  # looked from
KEYS = drawn(B, H, L, 2, seed=2)
COLOURS = F.one_hot(torch.arange(B * L).view(B, L) % 10, 10)
MASK = torch.zeros(B, 1, 1, L, dtype=torch.float64)
MASK[1, ..., 3:] = -1e4


def attention_arguments() -> list[Tensor]:
    looking = drawn(B, 4 * H, seed=6)
    looking[0, 0], looking[1, 1] = 3.0, 1.9  # beyond the bound of the sharpness, and just within
    x, shift, scale = drawn(B, L, W, seed=3), drawn(B, 1, W, seed=4), drawn(B, 1, W, seed=5)
    return [x, shift, scale, looking, drawn(3 * W, W, seed=7), drawn(W, W, seed=8)]


def mlp_arguments() -> list[Tensor]:
    return [*attention_arguments()[:3], drawn(4 * W, W, seed=9), drawn(W, 4 * W, seed=10)]


def plain_attention(mask: Tensor | None, *given: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of `Block.forward`, every line in the dtype that is given."""
    x, shift, scale, looking, qkv, out = given
    normed = F.rms_norm(x, x.shape[-1:]) * (1 + scale) + shift
    q, k, v = (normed @ qkv.T).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
    sharpness, gain, rows, columns = looking[:, :, None, None].chunk(4, dim=1)
    seen_from = rotary_angles(PLACE + torch.cat((rows, columns), -1), FREQUENCIES)
    q = rotate(F.rms_norm(q, q.shape[-1:]), *seen_from) * sharpness.clamp(max=2).exp()
    k = rotate(F.rms_norm(k, k.shape[-1:]), *rotary_angles(KEYS, FREQUENCIES))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    looks = (scores if mask is None else scores + mask).softmax(-1)
    values = ((looks @ v) * (1 + gain)).transpose(1, 2).flatten(2)
    return x + values @ out.T, looks @ COLOURS[:, None].to(v.dtype)


def plain_mlp(*given: Tensor) -> tuple[Tensor, Tensor]:
    x, shift, scale, up, down = given
    normed = F.rms_norm(x, x.shape[-1:]) * (1 + scale) + shift
    return x + F.relu(normed @ up.T).square() @ down.T, x.new_zeros(())


def fused_attention(mask: Tensor | None, *given: Tensor) -> tuple[Tensor, Tensor]:
    exact = given[0].dtype
    frequencies, place, keys = (tensor.to(exact) for tensor in (FREQUENCIES, PLACE, KEYS))
    turns = torch.complex(*rotary_angles(place, frequencies)), torch.complex(*rotary_angles(keys, frequencies))
    x, shift, scale, looking, qkv, out = given
    return fused.attention(x, shift, scale, looking, qkv, out, turns, frequencies, mask, COLOURS)


def fused_mlp(*given: Tensor) -> tuple[Tensor, Tensor]:
    x, shift, scale, up, down = given
    return fused.mlp(x, shift, scale, up, down), x.new_zeros(())


def masked(function: Half, mask: Tensor | None) -> Half:
    return lambda *given: function(mask, *given)


HALVES: dict[str, tuple[Half, Half, Callable[[], list[Tensor]]]] = {
    "attention": (masked(fused_attention, None), masked(plain_attention, None), attention_arguments),
    "attention with padding": (masked(fused_attention, MASK), masked(plain_attention, MASK), attention_arguments),
    "mlp": (fused_mlp, plain_mlp, mlp_arguments),
}


def results(half: Half, arguments: Sequence[Tensor]) -> list[Tensor]:
    """What it gives, and the gradients of an uneven sum of that."""
    leaves = [tensor.clone().requires_grad_() for tensor in arguments]
    given = half(*leaves)
    total = sum((out * torch.arange(out.numel()).view_as(out).cos()).sum() for out in given)
    assert isinstance(total, Tensor)
    return [*given, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("name", HALVES)
def test_the_halves_are_the_plain_formulas(name: str) -> None:
    own, plain, arguments = HALVES[name]
    for found, expected in zip(results(own, arguments()), results(plain, arguments()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.shape == expected.shape


@pytest.mark.parametrize("scores", [1, 7 * L * L])
@pytest.mark.parametrize("name", ["attention", "attention with padding"])
def test_scores_are_looked_at_in_pieces(name: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, plain, arguments = HALVES[name]
    monkeypatch.setattr(fused, "PIECE", scores)
    assert len(fused.pieces(B * H, L)) > 1
    for found, expected in zip(results(own, arguments()), results(plain, arguments()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # where they are not kept
        for found, expected in zip(own(*arguments()), plain(*arguments()), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HALVES)
def test_the_ways_back_are_those_of_differences(name: str) -> None:
    own, _, arguments = HALVES[name]
    leaves = [tensor.requires_grad_() for tensor in arguments()]
    assert torch.autograd.gradcheck(own, leaves, fast_mode=True)


@pytest.mark.parametrize("name", HALVES)
def test_held_weights_get_no_gradient_and_change_no_other(name: str) -> None:
    own, _, arguments = HALVES[name]
    first = len(arguments()) - 2
    held = [tensor.requires_grad_(index < first) for index, tensor in enumerate(arguments())]
    out, looked_at = own(*held)
    weight = torch.arange(out.numel()).view_as(out).cos()
    other = torch.arange(looked_at.numel()).view_as(looked_at).cos()
    ((out * weight).sum() + (looked_at * other).sum()).backward()
    assert all(tensor.grad is None for tensor in held[first:])
    for tensor, expected in zip(held[:first], results(own, arguments())[2:], strict=False):
        assert tensor.grad is not None and torch.equal(tensor.grad, expected)


@pytest.mark.parametrize("name", HALVES)
def test_under_autocast_only_products_are_in_its_dtype(name: str) -> None:
    own, plain, arguments = HALVES[name]
    single = [tensor.float() for tensor in arguments()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = own(*single)
    for out, expected in zip(found, plain(*arguments()), strict=True):
        assert out.dtype == torch.float32
        assert float((out - expected).norm()) <= 0.02 * float(expected.norm())


# --------------------------------------------------------------------------------------------------------------------
# the agent with them
# --------------------------------------------------------------------------------------------------------------------


def trained_agent(heads: int) -> GridAgent:
    """An agent whose parts all speak."""
    torch.manual_seed(0)
    agent = GridAgent(NUM_TABLES, NUM_RULES, 2, 8, width=32, heads=heads, blocks=2, passes=2)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return agent


def some_queries() -> QueryBatch:
    """Two grids of different sizes, so that there is padding."""
    grids = [np.arange(12).reshape(3, 4) % 10, np.arange(4).reshape(2, 2)]
    return collate_queries(
        [
            Query(grid.astype(np.uint8), grid[::-1].astype(np.uint8), grid.shape, None, Augmentation.IDENTITY, owner)
            for owner, grid in enumerate(grids)
        ]
    )


def gradients(agent: GridAgent, query: QueryBatch, *, held: bool = False) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The prompt's gradient, and the weights', of a loss."""
    agent.zero_grad()
    prompt = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = agent(query, prompt, held=held)
    (output.pair_loss(query).sum() + output.size_log_probs()[:, 1, 2].sum()).backward()
    assert prompt.grad is not None
    return prompt.grad, {name: parameter.grad for name, parameter in agent.named_parameters()}


@pytest.mark.parametrize("heads", [2, 8])
def test_the_agent_learns_the_same_with_fused_and_plain_blocks(heads: int) -> None:
    agent, query = trained_agent(heads), some_queries()
    fused_blocks = gradients(agent, query)
    agent.is_compiled = True  # what is compiled are the plain blocks
    plain_blocks = gradients(agent, query)
    torch.testing.assert_close(fused_blocks[0], plain_blocks[0], rtol=1e-4, atol=1e-5)
    for name, expected in plain_blocks[1].items():
        torch.testing.assert_close(fused_blocks[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_held_weights_leave_the_prompts_gradient_as_it_is() -> None:
    agent, query = trained_agent(2), some_queries()
    free, held = gradients(agent, query), gradients(agent, query, held=True)
    assert torch.equal(free[0], held[0])
    block = agent.blocks[0]
    assert isinstance(block.up, nn.Linear) and block.up.weight.grad is None
