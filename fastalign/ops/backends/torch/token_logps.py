"""The sweeps of ``token_logps`` in PyTorch: the same formulas, block of rows by block of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.ops.checks import stats_dtype
from fastalign.ops.rows import Coefficients, Stats, pick, zero_rows
from fastalign.ops.token_logps import ELSEWHERE
from fastalign.types import IGNORE_INDEX

BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Size of one fp32 temporary of the torch backend; it makes up to four of them."""

FLOOR = -1000.0
"""A bound for ln p where it multiplies p: exp(-1000) is already 0, and 0 * -inf would be NaN."""


def forward(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    total: bool = False,
    top1: bool = False,
) -> Stats:
    """One sweep over the vocabulary, block of rows by block of rows.

    Args:
        logits: ``[N, V]`` of any float dtype and row stride.
        labels: ``[N]``; -100 masks a row, -1 marks a target that lives in another slab.

    Returns:
        logps, entropy (or None), max, logsum, total = sum_v (z_v - max) (or None), top1 (or None), which is 1 where the
        label is the first column whose z is max and else 0: ``[N]`` fp32 (fp64 for fp64 logits); masked rows hold 0.
    """
    dtype = stats_dtype(logits)
    logps, maximum, logsum = (torch.empty(len(labels), dtype=dtype, device=logits.device) for _ in range(3))
    entropies, totals, hits = (torch.empty_like(logps) if wanted else None for wanted in (entropy, total, top1))
    for rows in row_blocks(logits):
        y = labels[rows]
        masked = y == IGNORE_INDEX
        z = scaled(logits[rows], rows_of(temperature, rows), softcap, logit_scale)
        m = z.amax(-1)
        target = z.gather(1, y.long().clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        leads = _is_argmax(z, target == m, y) if top1 else None
        z.sub_(m[:, None])
        if totals is not None:
            totals[rows] = z.sum(-1).masked_fill_(masked, 0)
        p = z.exp()
        norm = p.sum(-1)
        s = norm.log()
        logps[rows] = target_logps(target - m - s, y, logits.shape[1])
        maximum[rows] = m.masked_fill_(masked, 0)
        if entropies is not None:
            h = s - p.mul_(z.clamp_(min=torch.finfo(dtype).min)).sum(-1) / norm
            entropies[rows] = h.masked_fill_(masked, 0)
        logsum[rows] = s.masked_fill_(masked, 0)
        if hits is not None and leads is not None:
            hits[rows] = (leads & ~logps[rows].isnan()).to(dtype)
    return Stats(logps, entropies, maximum, logsum, totals, hits)


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    logsum: Tensor,
    coefficients: Coefficients,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Writes ``d logits`` into ``out``, which may be ``logits``; rows without a coefficient become zeros, unread."""
    for rows in row_blocks(logits):
        tau, y, part = rows_of(temperature, rows), labels[rows], pick(coefficients, rows)
        z = scaled(logits[rows], tau, softcap, logit_scale)
        slope = slope_of(z, tau, softcap, logit_scale)
        log_p = z.sub_(max[rows, None]).sub_(logsum[rows, None]).clamp_(min=FLOOR)
        dz = row_gradients(log_p, y, part).mul_(slope)
        out[rows] = dz.masked_fill_(((y == IGNORE_INDEX) | zero_rows(part))[:, None], 0)


def row_gradients(log_p: Tensor, labels: Tensor, coefficients: Coefficients) -> Tensor:
    """``dz`` from ``ln p``, which it overwrites; at the label ``1 - p`` is ``-expm1(ln p)``."""
    vocab = log_p.shape[1]
    g, alpha, beta, delta = (None if x is None else x[:, None] for x in coefficients)
    g = coefficients.g.masked_fill(out_of_range(labels, vocab), torch.nan)[:, None]
    targets, here = labels.long().clamp(0, vocab - 1)[:, None], ((labels >= 0) & (labels < vocab))[:, None]
    p, target = log_p.exp(), log_p.gather(1, targets)
    pull = torch.zeros_like(g) if alpha is None else alpha
    share = pull if beta is None else pull + beta * target
    dz = p.mul_(pull - g if beta is None else log_p.mul_(beta).add_(pull - g))
    at_label = target.exp() * share - g * target.expm1()
    dz.scatter_(1, targets, torch.where(here, at_label, dz.gather(1, targets)))
    return dz if delta is None else dz.add_(delta)


def _is_argmax(z: Tensor, tied: Tensor, labels: Tensor) -> Tensor:
    """``[n]`` which of the rows ``tied``, whose label has the largest z, have no other before it.

    On a CPU only these are searched; elsewhere only the device knows which they are.
    """
    if z.device.type != "cpu":
        return tied & (z.argmax(-1) == labels)
    rows = tied.nonzero().squeeze(1)
    return tied.index_put((rows,), z[rows].argmax(-1) == labels[rows])


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Row slices whose fp32 copies take about BLOCK_BYTES each."""
    item = 8 if logits.dtype == torch.float64 else 4
    budget = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"])
    step = max(1, budget // (item * max(1, logits.shape[1])))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def rows_of(temperature: float | Tensor, rows: slice) -> float | Tensor:
    """The temperature of some rows, beside their logits."""
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def scaled(logits: Tensor, tau: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """A fresh ``z`` in the statistics' dtype; skipped rows, which may hold NaN, are selected out by the caller."""
    z = logits.to(stats_dtype(logits), copy=True)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(tau) if isinstance(tau, Tensor) or tau != 1.0 else z


def slope_of(z: Tensor, tau: float | Tensor, softcap: float | None, logit_scale: float) -> float | Tensor:
    """``dz / d logits``: a number, ``[n, 1]``, or (with a softcap) a matrix."""
    slope = logit_scale / tau
    return slope if softcap is None else (z * tau).div_(softcap).square_().neg_().add_(1).mul_(slope)


def target_logps(logps: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """0 where there is no target here, NaN where the label is out of range."""
    logps = logps.masked_fill((labels == IGNORE_INDEX) | (labels == ELSEWHERE), 0)
    return logps.masked_fill(out_of_range(labels, vocab), torch.nan)


def out_of_range(labels: Tensor, vocab: int) -> Tensor:
    """``[n]`` whether a label is neither a column nor one of the two special values."""
    return (labels >= vocab) | ((labels < 0) & (labels != IGNORE_INDEX) & (labels != ELSEWHERE))
