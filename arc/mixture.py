"""The agent's mixture: what each evidence table says about a cell, how much it is trusted, what colour that makes.

A number for each of 132 tables at each cell: these are the agent's largest tensors, and an operation on one costs as
much as a block's matrix product. So there are few of them, with the way back by hand, and what a table says is looked
up and not computed.

Shapes: B queries, L tokens, T tables, width W, R other things that are read of a cell.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arc.fused import product_dtype, softmax_back
from arc.tasks import NUM_COLOURS

SILENT = -1e4  # logit of a table that says nothing; finite, so that a cell no table speaks about is no NaN
NOTHING = 255  # the colour of a table that says nothing, where it is compared
CLASSES = 4  # of confidence; 0 is silence


@functools.cache
def meanings(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`Sayings`' colour, place and confidence of every code, colour + 10 * confidence class: (256,) each."""
    code = torch.arange(256, device=device)
    confidence, place = code.div(10, rounding_mode="floor").clamp(max=CLASSES - 1), code % 10
    return place.masked_fill(confidence == 0, NOTHING).to(torch.uint8), place, confidence.to(torch.uint8)


@dataclass
class Sayings:
    """What tables say, (B, L, T) each: colour uint8, `NOTHING` where one is silent; place int64, the same as an index;
    confidence uint8, 0 for silence. spoken (B, L, 1) float32: 1 where any table speaks."""

    colour: Tensor
    place: Tensor
    confidence: Tensor
    spoken: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> Sayings:
        """Of `QueryBatch.codes` (B, L, T)."""
        index = codes.flatten().int()
        colour, place, confidence = (table.index_select(0, index).view(codes.shape) for table in meanings(codes.device))
        return cls(colour, place, confidence, confidence.amax(-1, keepdim=True).clamp(max=1).float())

    def classes(self, vote: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, 4 T): whether each table agrees with the `vote` (B, L), and whether it is of class 1, 2, 3."""
        marks = torch.empty(*self.colour.shape[:2], CLASSES, self.colour.shape[2], dtype=dtype, device=vote.device)
        torch.eq(self.colour, vote.to(torch.uint8)[..., None], out=marks[..., 0, :])
        for number in range(1, CLASSES):
            torch.eq(self.confidence, number, out=marks[..., number, :])
        return marks.flatten(2)


class Trust(torch.autograd.Function):
    """See `trust`."""

    @staticmethod
    def forward(ctx: Any, by_query: Tensor, by_class: Tensor, confidence: Tensor) -> Tensor:
        ctx.confidence = confidence
        values = torch.cat((by_class.new_full((1,), SILENT), by_class))
        return values.index_select(0, confidence.flatten().int()).view(confidence.shape).add_(by_query[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_class = None
        if ctx.needs_input_grad[1]:
            empty = gradient.new_zeros(*gradient.shape[:2], CLASSES)
            of_class = empty.scatter_add_(-1, ctx.confidence.long(), gradient).sum((0, 1))[1:]
        return gradient.sum(1), of_class, None


def trust(by_query: Tensor, by_class: Tensor, sayings: Sayings) -> Tensor:
    """(B, L, T): the logit of each table at each cell, of what the query (B, T) and its class of confidence (3,) give
    it, float32 both. About `SILENT` where it says nothing."""
    return Trust.apply(by_query, by_class, sayings.confidence)


def mix(weights: Tensor, sayings: Sayings) -> Tensor:
    """(B, L, 10): the sum of the weights (B, L, T) of the tables that say each colour; zero where none speaks."""
    colours = weights.new_zeros(*weights.shape[:-1], NUM_COLOURS)
    return colours.scatter_add_(-1, sayings.place, weights).mul_(sayings.spoken)


def vote(trusted: Tensor, sayings: Sayings) -> Tensor:
    """(B, L, 10) float32: the probability of each colour when each table is trusted by softmax(trusted) (B, L, T). Zero
    where no table speaks. Without a way back."""
    return mix(trusted.detach().softmax(-1), sayings)


class Readout(torch.autograd.Function):
    """See `readout`."""

    @staticmethod
    def forward(ctx: Any, read: Tensor, trusted: Tensor, weight: Tensor, sayings: Sayings, dtype: Any) -> Any:
        (B, L, T), read, weight = trusted.shape, read.to(dtype).flatten(0, 1), weight.to(dtype)
        told = (read @ weight.T).view(B, L, -1)
        weights = told[..., :T].to(trusted.dtype).add_(trusted).softmax(-1)
        ctx.save_for_backward(read, weight, weights, sayings.place, sayings.spoken)
        return mix(weights, sayings), told[..., T:].to(trusted.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mixture: Tensor, of_rest: Tensor) -> Any:
        read, weight, weights, place, spoken = ctx.saved_tensors
        (B, L, T), device = weights.shape, weights.device.type
        with torch.autocast(device, enabled=False):
            of_trusted = softmax_back((of_mixture * spoken).gather(-1, place), weights)
            told = read.new_empty(B, L, len(weight))
            told[..., :T], told[..., T:] = of_trusted, of_rest
            of_read = (told.flatten(0, 1) @ weight).to(weights.dtype).view(B, L, -1)
            of_weight = (told.flatten(0, 1).T @ read).to(weights.dtype) if ctx.needs_input_grad[2] else None
        return of_read, of_trusted, of_weight, None, None


def readout(read: Tensor, trusted: Tensor, weight: Tensor, sayings: Sayings) -> tuple[Tensor, Tensor]:
    """What the network makes of the tables after a pass: the mixture of their colours (B, L, 10) with each trusted as
    much as `trusted` (B, L, T) says and the cell's own reading adds, and the R other things that are read, (B, L, R).

    read (B, L, W); weight (T + R, W). Both results are in the dtype of `trusted`; the product is in the autocast's.
    """
    dtype = product_dtype(read)
    with torch.autocast(read.device.type, enabled=False):
        return Readout.apply(read.to(trusted.dtype), trusted, weight, sayings, dtype)
