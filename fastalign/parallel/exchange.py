"""What the ranks of a tensor axis exchange in a layer, as functions with a gradient.

Where all ranks have all tokens, a layer is entered by `Enter` and left by `Leave`, a sum. Where each has some of the
tokens of norms and of the residual stream (`parallel.sequence_parallel`), it takes a gather and a scatter:

    embedding, parts of a sum  [T, D]  --Scatter-->  [T/tp, D]
                                                         |  norm, Gather
    attention or MLP           [T, D]  <-----------------+
        |  parts of a sum      [T, D]  ----------------->+
                                                         |  Scatter, add
    last norm                                        [T/tp, D]  --Join-->  [T, D]

These send together what the sum does. Rows are filled up with zeros to a multiple of the ranks, and the zeros are cut
off before anything reads them. A norm has seen some of the tokens: its gradient is a sum over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Their names from torch 2.13 on, and before."""


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, in memory of its own."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class Enter(torch.autograd.Function):
    """The identity, of something that the ranks use in different ways: their gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """``x``."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        """Its sum over ranks."""
        return summed(gradient, ctx.group), None


class Leave(torch.autograd.Function):
    """The sum of what the ranks have; each has the whole gradient of its part already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The sum over ranks."""
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        """The same for every part."""
        return gradient, None


class Share(torch.autograd.Function):
    """One of ``n`` equal shares of something that every rank adds to its part of a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        """``x / n``."""
        return x / n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        """That of the sum of all shares, which is whole on every rank."""
        return gradient, None


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[1, n t, D]`` of the ``[1, t, D]`` that each of n ranks has."""
    whole = x.new_empty(group.size() * x.shape[1], *x.shape[2:])
    all_gather(whole, x[0].contiguous(), group=group)
    return whole[None]


def scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's ``[1, t, D]`` of the sum over ranks of ``[1, T, D]``, where T is at most n t."""
    rows = -(-x.shape[1] // group.size())
    x = pad(x, (0, 0, 0, rows * group.size() - x.shape[1]))
    mine = x.new_empty(rows, *x.shape[2:])
    reduce_scatter(mine, x[0].contiguous(), group=group)
    return mine[None]


class Gather(torch.autograd.Function):
    """The first rows of what the ranks have, which they use in different ways: their gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int | None, group: dist.ProcessGroup) -> Tensor:
        """``[1, rows, D]``; all rows where there is no number."""
        ctx.group, ctx.rows = group, x.shape[1]
        return gathered(x, group)[:, :rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        """This rank's rows of the sum."""
        missing = ctx.rows * ctx.group.size() - gradient.shape[1]
        return scattered(pad(gradient, (0, 0, 0, missing)), ctx.group), None, None


class Scatter(torch.autograd.Function):
    """This rank's rows of a sum of what the ranks have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """``[1, t, D]``."""
        ctx.group, ctx.rows = group, x.shape[1]
        return scattered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        """The same for every part."""
        return gathered(gradient, ctx.group)[:, : ctx.rows], None


class Join(torch.autograd.Function):
    """The first rows of what the ranks have, of which all make the same: each has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
        """``[1, rows, D]``."""
        ctx.mine = slice(group.rank() * x.shape[1], (group.rank() + 1) * x.shape[1])
        ctx.rows = x.shape[1] * group.size()
        return gathered(x, group)[:, :rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        """This rank's rows."""
        return pad(gradient, (0, 0, 0, ctx.rows - gradient.shape[1]))[:, ctx.mine], None, None
