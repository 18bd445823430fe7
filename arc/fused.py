"""The halves of the agent's blocks, attention and MLP, with their way back written by hand: for CPUs.

A step of the agent is many operations on small tensors, and on a CPU each costs about as much to start and to record as
to compute. Here the way back is a few products, and nothing is kept that it does not read. Element by element all is
in the dtype of x, fp32 in training; matrix products are in the autocast's, with one cast before and one after: tensors
of two dtypes in one operation take twice the time. The numbers are those of `arc.agent.Block.forward`'s plain form but
for rounding (tests/test_fused.py).

Shapes: B queries, L tokens, width W, H heads of width d = W / H, F = d / 2 frequencies, 10 colours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype the matrix products of x are: the autocast's where there is one."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in that dtype."""
    return torch.empty(x.shape, dtype=dtype).copy_(x)


def as_complex(x: Tensor) -> Tensor:
    """(..., d) with the two parts of a frequency beside each other -> (..., F) complex; a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def as_real(x: Tensor) -> Tensor:
    """Inverse of `as_complex`."""
    return torch.view_as_real(x).flatten(-2)


# --------------------------------------------------------------------------------------------------------------------
# norms
# --------------------------------------------------------------------------------------------------------------------


def normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., n) over its root mean square, as `F.rms_norm`, and what it was multiplied by (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    rate = square.add_(torch.finfo(x.dtype).eps).rsqrt_()
    return x * rate, rate


def normed_back(gradient: Tensor, unit: Tensor, rate: Tensor) -> Tensor:
    """Gradient of x for that of `unit`, both as `normed` returned them."""
    along = torch.linalg.vecdot(gradient, unit)[..., None].div_(unit.shape[-1])
    return torch.addcmul(gradient, unit, along, value=-1).mul_(rate)


class Unit(torch.autograd.Function):
    """`F.rms_norm` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        unit, rate = normed(x)
        ctx.save_for_backward(unit, rate)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return normed_back(gradient, *ctx.saved_tensors)


def modulated_back(gradient: Tensor, unit: Tensor, rate: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale (B, 1, W) for that (B, L, W) of `normed(x) * (1 + scale) + shift`."""
    of_shift, of_scale = gradient.sum(1, keepdim=True), (gradient * unit).sum(1, keepdim=True)
    return normed_back(gradient * (1 + scale), unit, rate), of_shift, of_scale


# --------------------------------------------------------------------------------------------------------------------
# the MLP
# --------------------------------------------------------------------------------------------------------------------


class Mlp(torch.autograd.Function):
    """x + down(relu(up(norm(x) * (1 + scale) + shift)) ** 2); see `mlp`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, down: Tensor, dtype: Any) -> Tensor:
        up, down = up.to(dtype), down.to(dtype)
        unit, rate = normed(x)
        read = torch.addcmul(shift, unit, 1 + scale).to(dtype).flatten(0, 1)  # (B * L, W)
        hidden = (read @ up.T).relu_()
        squared = hidden * hidden
        ctx.save_for_backward(unit, rate, scale, read, hidden, squared, up, down)
        return x + (squared @ down.T).view_as(x).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        unit, rate, scale, read, hidden, squared, up, down = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            told = gradient.to(up.dtype).flatten(0, 1)
            inner = (told @ down).mul_(hidden)  # half the gradient of what `up` gives
            weights = ctx.needs_input_grad[3]
            of_up = (inner.T @ read).to(unit.dtype).mul_(2) if weights else None
            of_down = (told.T @ squared).to(unit.dtype) if weights else None
            of_read = (inner @ up).view_as(unit).to(unit.dtype).mul_(2)
            of_x, of_shift, of_scale = modulated_back(of_read, unit, rate, scale)
        return of_x.add_(gradient), of_shift, of_scale, of_up, of_down, None


def mlp(x: Tensor, shift: Tensor, scale: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(B, L, W): x (B, L, W) and what the MLP of weights up (4W, W) and down (W, 4W) adds; shift, scale (B, 1, W)."""
    dtype = product_dtype(x)
    with torch.autocast("cpu", enabled=False):
        return Mlp.apply(x, shift.to(x.dtype), scale.to(x.dtype), up, down, dtype)


# --------------------------------------------------------------------------------------------------------------------
# attention
# --------------------------------------------------------------------------------------------------------------------


def paired(qkv: Tensor, heads: int) -> Tensor:
    """The rows of qkv (3W, W) with the two parts of a frequency beside each other in the rows of q and k. The scores
    are the same: both are permuted alike."""
    width = qkv.shape[1]
    both, values = qkv.split((2 * width, width))
    return torch.cat((both.view(2 * heads, 2, -1, width).transpose(1, 2).reshape(2 * width, width), values))


def unpaired(qkv: Tensor, heads: int) -> Tensor:
    """Inverse of `paired`."""
    width = qkv.shape[1]
    both, values = qkv.split((2 * width, width))
    return torch.cat((both.view(2 * heads, -1, 2, width).transpose(1, 2).reshape(2 * width, width), values))


def headings(looking: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """How each head looks, from looking (B, 4H): the complex number (B, H, 1, F) that turns its queries by the distance
    it looks away and stretches them by its sharpness (and the scores' 1 / sqrt(d)), and its gain (B, H, 1, 1)."""
    sharpness, gain, rows, columns = looking[..., None].chunk(4, 1)  # (B, H, 1) each
    angles = torch.cat((rows * frequencies, columns * frequencies), -1)  # (B, H, F)
    stretch = sharpness.clamp(max=2).exp() * (4 * len(frequencies)) ** -0.5
    return torch.polar(stretch.expand_as(angles), angles)[:, :, None], 1 + gain[..., None]


def headings_back(turned: Tensor, of_gain: Tensor, looking: Tensor, frequencies: Tensor) -> Tensor:
    """Gradient (B, 4H) of looking. turned (B, H, F): sum over tokens of the queries' gradient times their conjugate,
    whose real part is what stretching them by a share does, and whose imaginary part what turning them does."""
    sharpness = looking.chunk(4, 1)[0]
    of_sharpness = turned.real.sum(-1).masked_fill(sharpness > 2, 0.0)
    of_away = turned.imag.unflatten(-1, (2, -1)) @ frequencies  # (B, H, 2)
    return torch.cat((of_sharpness, of_gain, of_away[..., 0], of_away[..., 1]), 1)


class Attention(torch.autograd.Function):
    """See `attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        looking: Tensor,
        qkv: Tensor,
        out: Tensor,
        turns: tuple[Tensor, Tensor],
        frequencies: Tensor,
        mask: Tensor | None,
        colours: Tensor,
        dtype: Any,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        (B, L, W), H = x.shape, looking.shape[1] // 4
        qkv, out = paired(qkv, H).to(dtype), out.to(dtype)
        unit, rate = normed(x)
        read = torch.addcmul(shift, unit, 1 + scale).to(dtype).flatten(0, 1)  # (B * L, W)
        parts = (read @ qkv.T).view(B, L, 3, H, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, L, d)
        units, rates = normed(packed(parts[:2], x.dtype))
        heading, gain = headings(looking, frequencies)
        turn = turns[0] * heading  # (B, H, L, F)
        turned = as_complex(units[0]) * turn
        q, k = (as_real(part).to(dtype).flatten(0, 1) for part in (turned, as_complex(units[1]) * turns[1]))
        values = torch.cat((parts[2], colours[:, None].to(dtype).expand(-1, H, -1, -1)), -1).flatten(0, 1)
        mask = None if mask is None else mask.to(dtype).expand(-1, H, -1, -1).flatten(0, 1)  # (B * H, 1, L)
        looks = q.new_empty(B * H, L, L) if keep else None  # only the way back reads them again
        seen = values.new_empty(values.shape)
        for part in pieces(B * H, L):
            looking_at = softmax(scores(q[part], k[part], None if mask is None else mask[part]), looks, part)
            torch.bmm(looking_at, values[part], out=seen[part])
        seen = seen.view(B, H, L, -1)
        found = seen[..., : W // H].to(x.dtype)
        told = packed((found * gain).transpose(1, 2), dtype).view(B * L, W)
        ctx.save_for_backward(unit, rate, scale, read, units, rates, turn, turns[1], turned, q, k, values, looks)
        ctx.rest = (found, told, gain, looking, frequencies, qkv, out)
        return x + (told @ out.T).view_as(x).to(x.dtype), seen[..., W // H :].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_looked_at: Tensor) -> Any:
        unit, rate, scale, read, units, rates, turn, key_turn, turned, q, k, values, looks = ctx.saved_tensors
        found, told, gain, looking, frequencies, qkv, out = ctx.rest
        (B, L, W), H, dtype, weights = unit.shape, looking.shape[1] // 4, q.dtype, ctx.needs_input_grad[4]
        with torch.autocast("cpu", enabled=False):
            given = gradient.to(dtype).flatten(0, 1)
            of_out = (given.T @ told).to(unit.dtype) if weights else None
            of_told = (given @ out).view(B, L, H, -1).transpose(1, 2).to(unit.dtype)  # (B, H, L, d)
            of_gain = (of_told * found).sum((2, 3))
            of_seen = torch.cat((of_told * gain, of_looked_at), -1).to(dtype).flatten(0, 1)
            of_each = q.new_empty(3, *q.shape)  # of q, k and v
            for part in pieces(B * H, L):
                of_scores = softmax_back(of_seen[part] @ values[part].mT, looks[part])
                torch.bmm(of_scores, k[part], out=of_each[0, part])
                torch.bmm(of_scores.mT, q[part], out=of_each[1, part])
                torch.bmm(looks[part].mT, of_seen[part, :, : W // H], out=of_each[2, part])
            of_parts = read.new_empty(B, L, 3, H, W // H).permute(2, 0, 3, 1, 4)  # (3, B, H, L, d)
            of_parts[2] = of_each[2].view(B, H, L, -1)
            of_q, of_k = (as_complex(part.to(unit.dtype).view(B, H, L, -1)) for part in of_each[:2])
            of_looking = headings_back((of_q * turned.conj()).sum(2), of_gain, looking, frequencies)
            of_units = torch.stack((as_real(of_q * turn.conj()), as_real(of_k * key_turn.conj())))
            of_parts[:2] = normed_back(of_units, units, rates)
            of_projected = of_parts.permute(1, 3, 0, 2, 4).reshape(B * L, 3 * W)
            of_qkv = unpaired((of_projected.T @ read).to(unit.dtype), H) if weights else None
            of_read = (of_projected @ qkv).view_as(unit).to(unit.dtype)
            of_x, of_shift, of_scale = modulated_back(of_read, unit, rate, scale)
        return of_x.add_(gradient), of_shift, of_scale, of_looking, of_qkv, of_out, *[None] * 6


def softmax_back(gradient: Tensor, softmax: Tensor) -> Tensor:
    """Gradient of what the softmax over the last dimension was taken of, for that of its result."""
    return torch.ops.aten._softmax_backward_data.default(gradient, softmax, -1, softmax.dtype)  # noqa: SLF001


def scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """(N, L, L) of q, k (N, L, d); mask (N, 1, L) additive or None."""
    return q @ k.mT if mask is None else torch.baddbmm(mask, q, k.mT)


PIECE = 2**18  # scores that are looked at together: few enough to stay in the processor's cache


def pieces(count: int, length: int) -> list[slice]:
    """`count` squares of scores with sides of `length`, in parts of about PIECE scores."""
    step = max(1, PIECE // length**2)
    return [slice(at, at + step) for at in range(0, count, step)]


def softmax(piece: Tensor, whole: Tensor | None, part: slice) -> Tensor:
    """Of a piece of scores over the last dimension; it lies in its place of the whole where that is kept."""
    return piece.softmax(-1) if whole is None else torch.softmax(piece, -1, out=whole[part])


def attention(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    looking: Tensor,
    qkv: Tensor,
    out: Tensor,
    turns: tuple[Tensor, Tensor],
    frequencies: Tensor,
    mask: Tensor | None,
    colours: Tensor,
) -> tuple[Tensor, Tensor]:
    """(B, L, W): x (B, L, W) and what attention with weights qkv (3W, W) and out (W, W) adds, and the colours that each
    head looked at (B, H, L, 10).

    shift, scale (B, 1, W); looking (B, 4H): log-sharpness, gain, rows and columns away, of each head; turns: of the
    places that are looked from (B, 1, L, F) and of the keys (B, 1 or H, L, F); frequencies (d // 4,); mask (B, 1, 1, L)
    additive or None; colours (B, L, 10), one-hot.
    """
    dtype, exact, keep = product_dtype(x), x.dtype, torch.is_grad_enabled()
    with torch.autocast("cpu", enabled=False):
        shift, scale, looking = shift.to(exact), scale.to(exact), looking.to(exact)
        return Attention.apply(x, shift, scale, looking, qkv, out, turns, frequencies, mask, colours, dtype, keep)
