"""Divergences over a vocabulary that is split over ranks: each rank sweeps its own columns of both streams.

With ``w_r`` and ``u_r`` the shares of rank r's columns in ``p`` and in ``pi``, and ``KL_r`` the divergence of its own
softmaxes, which is what its sweep returns:

    KL(p || pi) = sum_r w_r (KL_r(p || pi) + ln w_r - ln u_r)          and KL(pi || p) likewise

One all-gather. The mixture of "jsd" needs the normalisers of all columns before its sums: two. Tables are combined in
rank order and in fp64, so that the ranks get the same bits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.token_logps import stats_dtype
from fastalign.ops.vocab_parallel import Shard, gathered
from fastalign.types import IGNORE_INDEX


def measure(
    kernels: ModuleType,
    shard: Shard | None,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    kind: str,
    mix: float,
    **scaling: Any,
) -> tuple[Tensor, Tensor]:
    """The kernels' value ``[n]`` and stats ``[5, n]`` over the columns of all ranks.

    Args:
        kernels: the backend's module.
        shard: this rank's place; None when the vocabulary is whole.
        logits, ref_logits: ``[n, V_r]``, the rank's columns; there may be none.
        labels: ``[n]``, localised.
        kind, mix, scaling: as the kernels take them.
    """
    if shard is None:
        return kernels.forward(logits, ref_logits, labels, kind=kind, mix=mix, **scaling)
    streams, masked = (logits, ref_logits, labels), labels == IGNORE_INDEX
    direction = "forward_kl" if kind == "jsd" else kind
    value, stats = kernels.forward(*streams, kind=direction, **scaling) if logits.shape[1] else _nothing(*streams)
    value, stats = _combined(gathered(shard, torch.stack([*stats[:4], value], 1)), direction)
    if kind == "jsd":
        sums = (
            kernels.mixture(*streams, stats, mix=mix, **scaling) if logits.shape[1] else value.new_zeros(2, len(value))
        )
        reference, policy = gathered(shard, sums.t().contiguous()).double().sum(0).t()
        value, stats[4] = mix * reference + (1 - mix) * policy, policy
    return value.to(stats.dtype).masked_fill_(masked, 0), stats.masked_fill_(masked, 0)


def _nothing(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """value and stats of a shard without columns."""
    value = torch.zeros(len(labels), dtype=stats_dtype(logits, ref_logits), device=labels.device)
    return value.masked_fill_(labels >= 0, torch.nan), torch.full_like(value, -torch.inf).expand(5, -1)


def _combined(tables: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """value and stats from every rank's maxima, logsums and value ``[R, n, 5]``.

    A shard without a finite logit in the first stream has no share in the sum; without one in the second alone it makes
    the sum infinite, by its share's logarithm.
    """
    maxima, logsums, ref_maxima, ref_logsums, values = tables.double().unbind(2)
    *policy, log_w = _shares(maxima, logsums)
    *reference, log_u = _shares(ref_maxima, ref_logsums)
    log_a, log_b = (log_u, log_w) if kind == "forward_kl" else (log_w, log_u)
    share, parts = log_a.exp(), torch.where(log_b == -torch.inf, 0, values) + (log_a - log_b)
    value = torch.where(share == 0, 0, share * parts).sum(0)
    pull = torch.zeros_like(value) if kind == "forward_kl" else value
    return value.to(tables.dtype), torch.stack([*policy, *reference, pull]).to(tables.dtype)


def _shares(maxima: Tensor, logsums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one stream: max and logsum over all columns ``[n]``, and the logarithm of each rank's share ``[R, n]``."""
    top = maxima.amax(0)
    parts = torch.where(maxima == -torch.inf, -torch.inf, (maxima - top) + logsums)
    total = parts.exp().sum(0).log()
    return top, total, parts - total
