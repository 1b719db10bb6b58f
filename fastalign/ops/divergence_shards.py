"""Divergences over a vocabulary that is split over ranks: each rank sweeps its own columns of both streams.

With ``w_r`` and ``u_r`` the shares of rank r's columns in ``p`` and in ``pi``, and ``KL_r`` the divergence of its own
softmaxes, which is what its sweep returns:

    KL(p || pi) = sum_r w_r (KL_r(p || pi) + ln w_r - ln u_r)          and KL(pi || p) likewise

over the columns that the second distribution does not ban (a logit of -inf); the largest probability among those that
it bans, over all ranks, says whether the KL is infinite.

One all-gather. The mixture of "jsd" needs the normalisers of all columns before its sums: two. Tables are combined in
rank order and in fp64, so that the ranks get the same bits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.checks import stats_dtype
from fastalign.ops.parallel import Shard, gathered
from fastalign.ops.rows import NEGLIGIBLE
from fastalign.types import IGNORE_INDEX


class Measured(NamedTuple):
    """What one sweep over both streams knows of n rows.

    Attributes:
        value: ``[n]`` the divergence.
        stats: ``[5, n]`` max and logsum of the policy, of the reference, and the mean that the gradient subtracts.
        logps: ``[2, n]`` log-prob of the label under policy and reference, when asked for.
        entropy: ``[n]`` of the policy, when asked for.
    """

    value: Tensor
    stats: Tensor
    logps: Tensor | None
    entropy: Tensor | None


def measure(
    kernels: ModuleType,
    shard: Shard | None,
    owners: Tensor | None,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    kind: str,
    mix: float,
    tokens: bool = False,
    entropy: bool = False,
    **scaling: Any,
) -> Measured:
    """The statistics over the columns of all ranks.

    Args:
        kernels: the backend's module.
        shard: this rank's place; None when the vocabulary is whole.
        owners: ``[n]`` the rank that owns each label; needed for the log-probs of a shard.
        logits, ref_logits: ``[n, V_r]``, the rank's columns; there may be none.
        labels: ``[n]``, localised.
        tokens, entropy: whether to return logps and entropy.
        kind, mix, scaling: as the kernels take them.
    """
    if shard is None:
        more = {"tokens": tokens, "entropy": entropy}
        return Measured(*kernels.forward(logits, ref_logits, labels, kind=kind, mix=mix, **more, **scaling))
    streams, masked = (logits, ref_logits, labels), labels == IGNORE_INDEX
    first = "forward_kl" if kind == "jsd" else kind
    found = _local(kernels, *streams, kind=first, tokens=tokens, entropy=entropy, **scaling)
    rows = (*found.stats[:4], *found.value, *(() if found.logps is None else found.logps))
    table = torch.stack([*rows, *(() if found.entropy is None else (found.entropy,))], 1)
    found = _combined(gathered(shard, table), first, owners if tokens else None, entropy)
    if kind == "jsd":
        sums = (
            kernels.mixture(*streams, found.stats, mix=mix, **scaling)
            if logits.shape[1]
            else table.new_zeros(2, len(table))
        )
        reference, policy = gathered(shard, sums.t().contiguous()).double().sum(0).t()
        found.stats[4] = policy
        found = found._replace(value=(mix * reference + (1 - mix) * policy).to(table.dtype))
    return Measured(*(None if x is None else x.masked_fill(masked, 0) for x in found))  # pyright: ignore


def _local(kernels: ModuleType, logits: Tensor, ref_logits: Tensor, labels: Tensor, **options: Any) -> Measured:
    """The statistics of the rank's own columns; of none: nothing at all, and NaN for an invalid label.

    ``value`` is ``[2, n]``: ``apart``.
    """
    if logits.shape[1]:
        return Measured(*kernels.forward(logits, ref_logits, labels, **options, apart=True))
    value = torch.zeros(len(labels), dtype=stats_dtype(logits, ref_logits), device=labels.device)
    value.masked_fill_(labels >= 0, torch.nan)
    logps = value.expand(2, -1) if options["tokens"] else None
    none = torch.full_like(value, -torch.inf)
    return Measured(torch.stack([value, none]), none.expand(5, -1), logps, value if options["entropy"] else None)


def _combined(tables: Tensor, kind: str, owners: Tensor | None, entropy: bool) -> Measured:
    """The statistics over all columns from every rank's, ``[R, n, 6]`` and more columns as asked for.

    A shard without a finite logit in the first stream has no share in the sum, nor has one without any in the second.
    """
    maxima, logsums, ref_maxima, ref_logsums, values, banned, *more = tables.double().unbind(2)
    *policy, log_w = _shares(maxima, logsums)
    *reference, log_u = _shares(ref_maxima, ref_logsums)
    log_a, log_b = (log_u, log_w) if kind == "forward_kl" else (log_w, log_u)
    value = _weighed(log_a, torch.where(log_b == -torch.inf, 0, values + (log_a - log_b)))
    worst = torch.where(log_a == -torch.inf, -torch.inf, banned + log_a).amax(0)
    value = torch.where((worst >= NEGLIGIBLE) & ~value.isnan(), torch.inf, value)
    pull = torch.zeros_like(value) if kind == "forward_kl" else value
    logps = None if owners is None else torch.stack([_owned(log_w, more[0], owners), _owned(log_u, more[1], owners)])
    entropies = _weighed(log_w, more[-1] - log_w) if entropy else None
    made = (value, torch.stack([*policy, *reference, pull]), logps, entropies)
    return Measured(*(None if x is None else x.to(tables.dtype) for x in made))  # pyright: ignore


def _shares(maxima: Tensor, logsums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one stream: max and logsum over all columns ``[n]``, and the logarithm of each rank's share ``[R, n]``."""
    top = maxima.amax(0)
    parts = torch.where(maxima == -torch.inf, -torch.inf, (maxima - top) + logsums)
    total = parts.exp().sum(0).log()
    return top, total, parts - total


def _weighed(log_w: Tensor, parts: Tensor) -> Tensor:
    """``sum_r w_r x_r`` over the ranks with a share."""
    w = log_w.exp()
    return torch.where(w == 0, 0, w * parts).sum(0)


def _owned(log_w: Tensor, logps: Tensor, owners: Tensor) -> Tensor:
    """The label's log-prob over all columns, from the rank that has it: its own there, and that rank's share."""
    return torch.where(log_w == -torch.inf, -torch.inf, logps + log_w).gather(0, owners[None].long()).squeeze(0)
