"""Inverse-CDF draws of ``sample`` in PyTorch: exponentials in index order, block of rows by block of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.backends.torch.token_logps import row_blocks, rows_of, scaled
from fastalign.ops.sample import BLOCK, Cut, fixed_point


def draw(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    cut: Cut,
) -> tuple[Tensor, Tensor]:
    """The token of each row and the mass that truncation keeps.

    Args:
        logits: ``[n, V]`` of any float dtype and strides.
        noise: ``[n]`` float64 in [0, 1).
        temperature: a positive number or ``[n]``.
        cut: the truncation.

    Returns:
        ``[n]`` int64 and ``[n]`` float64.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    kept = torch.ones(len(logits), dtype=torch.float64, device=logits.device)
    for rows in row_blocks(logits):
        mass = exponentials(logits[rows], None, rows_of(temperature, rows), softcap, logit_scale)
        if cut.active:
            mass, kept[rows] = truncated(logits[rows], mass, cut)
        running = block_sums(mass, logits.shape[1]).cumsum(-1)
        block, rest = find_block(running, targets(noise[rows], running[:, -1]))
        every = blocks_of(mass)
        columns = every[torch.arange(len(block), device=block.device), block]
        tokens[rows] = block * every.shape[2] + find_column(fixed_point(columns, logits.shape[1]), rest)
    return tokens.clamp_(max=logits.shape[1] - 1), kept


def exponentials(
    logits: Tensor, top: Tensor | None, tau: float | Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """``exp(z - max z)`` in the statistics' dtype, fresh; ``top`` ``[n, 1]`` is a largest logit from elsewhere."""
    z = scaled(logits.contiguous(), tau, softcap, logit_scale)
    largest = z.amax(-1, keepdim=True) if top is None else scaled(top, tau, softcap, logit_scale)
    return z.sub_(largest).exp_()


def truncated(logits: Tensor, mass: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """``mass`` with zeros for columns that are not kept, and the share of it that is."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ranked = fixed_point(mass.gather(1, order), mass.shape[1])
    before = ranked.cumsum(-1) - ranked
    count = cut.count(mass.gather(1, order), before, ranked)
    kept = torch.zeros_like(mass, dtype=torch.bool)
    kept.scatter_(1, order, torch.arange(mass.shape[1], device=mass.device) < count[:, None])
    total = before[:, -1] + ranked[:, -1]
    inside = (before + ranked).gather(1, count[:, None] - 1).squeeze(1)
    return mass.masked_fill_(~kept, 0), inside.double() / total.double()


def block_sums(mass: Tensor, vocab: int) -> Tensor:
    """``[n, blocks]`` sums of neighbouring columns, added in the dtype of ``mass``, in fixed point."""
    return fixed_point(blocks_of(mass).sum(-1), vocab)


def blocks_of(mass: Tensor) -> Tensor:
    """``[n, blocks, width]`` with a width of 512, or V where that is less; zeros behind the last column."""
    width = min(BLOCK, mass.shape[1])
    padded = torch.nn.functional.pad(mass, (0, -mass.shape[1] % width))
    return padded.view(len(mass), padded.shape[1] // width, width)


def targets(noise: Tensor, total: Tensor) -> Tensor:
    """``[n]`` int64 below the total: the chosen column is the first whose running sum is larger."""
    return torch.minimum((noise * total.double()).long(), total - 1)


def find_block(running: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``[n]`` the block in which the running sums ``[n, blocks]`` pass the target, and what of that is left for it."""
    block = (running <= target[:, None]).sum(-1).clamp_(max=running.shape[1] - 1)
    before = running.gather(1, (block - 1).clamp(min=0)[:, None]).squeeze(1)
    return block, target - torch.where(block > 0, before, 0)


def find_column(columns: Tensor, rest: Tensor) -> Tensor:
    """``[n]`` the column of a block, int64 ``[n, width]``, in which the running sum passes the rest.

    The columns, rounded one by one, may add up to less than their block: then it is the last that has any mass.
    """
    inside = (columns.cumsum(-1) <= rest[:, None]).sum(-1)
    last = columns.shape[1] - 1 - (columns > 0).flip(-1).int().argmax(-1)
    return torch.minimum(inside, last)
