"""Draws over a vocabulary that is split over ranks: each rank adds up its columns, one of them answers.

    M = max_r m_r        C_r = sum_{s <= r} S_s        S_r: this rank's sum of q = exp(z - M), as an integer: exact
    o = the first rank with C_o > u C_R                its column, where the sum passes u C_R - C_{o-1}, is the token

Three exchanges of a few numbers per row: the maxima, the sums, the answers; the same bits on every rank.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastalign.ops.backends.torch.sample import block_sums, exponentials, find_block, find_column, targets
from fastalign.ops.backends.torch.token_logps import row_blocks, rows_of
from fastalign.ops.parallel import Shard, gathered
from fastalign.ops.sample import BLOCK, Cut, as_greedy, draw, fixed_point


def draw_together(
    shard: Shard,
    kernels: ModuleType,
    logits: Tensor,
    noise: Tensor,
    greedy: bool | Tensor,
    cut: Cut,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """Tokens and kept mass of the rows of which ``logits [n, V_r]`` are this rank's columns."""
    if cut.active:
        scaling = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        return draw(kernels, _whole_rows(shard, logits), noise, greedy, cut, **scaling)
    first = shard.stops[shard.rank] - shard.sizes[shard.rank]
    tops, leaders = gathered(shard, _largest(logits, noise, first)).unbind(2)
    top, leader = tops.max(0)
    scaling = (top[:, None].to(logits.dtype), temperature, softcap, logit_scale)
    running = _running(shard, logits, *scaling)
    ends = gathered(shard, running[:, -1:])[..., 0].cumsum(0)
    target = targets(noise, ends[-1])
    owner = (ends <= target).sum(0).clamp_(max=len(ends) - 1)
    block, rest = find_block(running, target - (ends[shard.rank] - running[:, -1]))
    columns = fixed_point(_exponentials_of(logits, block, *scaling), shard.vocab)
    answer = first + block * BLOCK + find_column(columns, rest)
    tokens = _of(owner, gathered(shard, answer[:, None])[..., 0]).clamp_(max=shard.vocab - 1)
    return as_greedy(greedy, _of(leader, leaders).long(), tokens, torch.ones_like(noise))


def _whole_rows(shard: Shard, logits: Tensor) -> Tensor:
    """``[n, V]``: the columns of all ranks, fp32 in place of half precision, which not every transport knows."""
    wide = logits if logits.dtype.itemsize > 2 else logits.float()
    parts = gathered(shard, pad(wide, (0, shard.widest - logits.shape[1])))
    return torch.cat([part[:, :size] for part, size in zip(parts, shard.sizes, strict=True)], 1)


def _largest(logits: Tensor, like: Tensor, first: int) -> Tensor:
    """``[n, 2]`` float64: this rank's largest logit and the first column that has it."""
    if not logits.shape[1]:
        return torch.stack([torch.full_like(like, -torch.inf), torch.zeros_like(like)], 1)
    top, place = logits.max(-1)
    return torch.stack([top.double(), (place + first).double()], 1)


def _running(
    shard: Shard, logits: Tensor, top: Tensor, tau: float | Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """``[n, blocks]`` running sums over blocks of this rank's columns, at least one block."""
    count = max(1, -(-logits.shape[1] // BLOCK))
    sums = torch.zeros(len(logits), count, dtype=torch.int64, device=logits.device)
    for rows in row_blocks(logits) if logits.shape[1] else ():
        mass = exponentials(logits[rows], top[rows], rows_of(tau, rows), softcap, logit_scale)
        sums[rows] = block_sums(mass, shard.vocab)
    return sums.cumsum_(-1)


def _exponentials_of(
    logits: Tensor, block: Tensor, top: Tensor, tau: float | Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """``[n, 512]`` those of one block in each row; 0 beyond the last column."""
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    there = columns < logits.shape[1]
    if not logits.shape[1]:
        return torch.zeros_like(columns, dtype=torch.float32)
    picked = logits.gather(1, columns.clamp(max=logits.shape[1] - 1))
    tau = tau[:, None] if isinstance(tau, Tensor) else tau
    return exponentials(picked, top, tau, softcap, logit_scale).masked_fill_(~there, 0)


def _of(rank: Tensor, values: Tensor) -> Tensor:
    """``[n]`` what rank ``rank[i]`` said about row i, from ``[R, n]``."""
    return values.gather(0, rank[None]).squeeze(0)
