"""A head whose vocabulary is split over ranks: rank r owns consecutive columns, in rank order; shards may be empty.

Hidden states and labels are the same on every rank. Per chunk one all-gather carries what the ranks know of each row:

    M    = max_r m_r                                     a_r = (m_r - M) + logsum_r
    logS = ln sum_r exp(a_r)                             w_r = exp(a_r - logS)
    logp = ((logp_o + logsum_o) + (m_o - M)) - logS      o: the rank that owns the label
    H    = sum_r w_r (H_r - ln w_r)
    T    = sum_r T_r + V_r (m_r - M)                     T: the sum of z - max over V columns
    top1 = top1_o and m_o = M and m_r < M for r < o      a tie goes to the earlier rank; 0 where logp is NaN

The combination runs in rank order on each rank and gives the same bits everywhere. The gradient of the hidden states is
a sum over ranks, that of the weight is local. The number and shapes of collectives depend on shared values alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from fastalign.ops._transfer import on_device
from fastalign.types import IGNORE_INDEX

Statistics = tuple[Tensor, "Tensor | None", Tensor, Tensor, "Tensor | None", "Tensor | None"]
"""logps, entropy if asked for, max, logsum, total and top1 if asked for; each ``[n]``."""


@dataclass(frozen=True)
class Shard:
    """This rank's place in a split vocabulary.

    Attributes:
        group: name of the process group.
        sizes: columns of each rank.
        rank: this process's place in the group.
    """

    group: str
    sizes: tuple[int, ...]
    rank: int

    @property
    def vocab(self) -> int:
        """Columns of all ranks."""
        return sum(self.sizes)

    @property
    def widest(self) -> int:
        """Columns of the largest shard: what all ranks plan with."""
        return max(self.sizes)

    @property
    def stops(self) -> list[int]:
        """The first column after each rank's own."""
        return list(accumulate(self.sizes))


def exchange(
    process_group: dist.ProcessGroup | None,
    weight: Tensor,
    num_rows: int,
    trainable: bool,
    labels: Tensor | None = None,
) -> tuple[str | None, list[int] | None, bool]:
    """``agree`` about a head: the group's name, the columns of each rank, and whether any rank trains its slice.

    Args:
        process_group: the ranks that share the vocabulary.
        weight: ``[V_r, D]``, the rank's slice.
        num_rows: N, which must be the same on every rank.
        trainable: the rank's slice of weight or bias wants a gradient.
        labels: ``[N]``, which must be the same on every rank.
    """
    same = {"number of rows of hidden": num_rows, "number of columns of weight (D)": weight.shape[1]}
    return agree(process_group, weight, weight.shape[0], same, trainable, labels)


def agree(
    process_group: dist.ProcessGroup | None,
    local: Tensor,
    columns: int,
    same: dict[str, int],
    flag: bool,
    labels: Tensor | None,
) -> tuple[str | None, list[int] | None, bool]:
    """The group's name, the columns of each rank, and whether any rank has the flag; one small collective.

    Args:
        process_group: the ranks that share the vocabulary; None, or a group of one, needs no collective.
        local: a tensor on the device that the ranks talk through.
        columns: of this rank.
        same: numbers by name that must be equal on every rank.
        flag: whether this rank wants what all must do together.
        labels: ``[N]``, which must be the same on every rank; they are compared by a checksum.

    Raises:
        ValueError: not a process group; a number differs, or the labels do.
    """
    if process_group is None:
        return None, None, flag
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"process_group must be a torch.distributed ProcessGroup or None, got {type(process_group).__name__}"
        )
    if process_group.size() == 1:
        return None, None, flag
    mine = torch.tensor([0, columns, int(flag), *same.values()], device=local.device)
    if labels is not None:
        mine[0] = (labels.long() * torch.arange(1, len(labels) + 1, device=labels.device)).sum()
    checksums, sizes, flags, *numbers = _gather(mine[None], process_group)[:, 0].t().tolist()
    for name, values in zip(same, numbers, strict=True):
        if len(set(values)) > 1:
            raise ValueError(f"process_group: every rank needs the same {name}, got {values} in rank order")
    if len(set(checksums)) > 1:
        raise ValueError(
            "process_group: the ranks that share a vocabulary need the same rows, their labels differ; where each rank "
            "has rows of its own (data parallelism, FSDP), gather the weight: weight.full_tensor()"
        )
    return process_group.group_name, sizes, any(flags)


def make_shard(group: str | None, sizes: Sequence[int] | None) -> Shard | None:
    """The shard of this process, None when the vocabulary is whole."""
    if group is None or sizes is None:
        return None
    return Shard(group, tuple(sizes), dist.get_rank(_named(group)))


def localise(shard: Shard, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels ``[n]`` as this rank's kernels read them, and the rank that owns each.

    A label in another shard becomes -1; one outside the vocabulary stays invalid on every rank, and -100 stays -100.
    """
    stops = on_device(shard.stops, labels.device).to(labels.dtype)
    stop, size = shard.stops[shard.rank], shard.sizes[shard.rank]
    here = (labels >= stop - size) & (labels < stop)
    local = torch.where(here, labels - (stop - size), -1)
    local = torch.where((labels < 0) | (labels >= shard.vocab), size, local)
    local = torch.where(labels == IGNORE_INDEX, labels, local)
    owners = torch.bucketize(labels, stops, right=True).clamp(max=len(shard.sizes) - 1)
    return local, owners


def nothing(labels: Tensor, dtype: torch.dtype, entropy: bool, total: bool, top1: bool) -> Statistics:
    """The statistics of a shard without columns."""
    zeros = torch.zeros(len(labels), dtype=dtype, device=labels.device)
    logps, maximum = zeros.masked_fill(labels >= 0, torch.nan), torch.full_like(zeros, -torch.inf)
    return logps, zeros if entropy else None, maximum, zeros, zeros if total else None, zeros if top1 else None


def combine(
    shard: Shard,
    owners: Tensor,
    logps: Tensor,
    entropy: Tensor | None,
    maximum: Tensor,
    logsum: Tensor,
    total: Tensor | None,
    top1: Tensor | None,
) -> Statistics:
    """This rank's statistics ``[n]`` to those over the whole vocabulary; one all-gather of ``[n, 3]`` to ``[n, 6]``.

    A shard whose maximum is -inf has weight 0; a row that is -inf everywhere is NaN, as it is on one rank.
    """
    given = (maximum, logsum, logps, entropy, total, top1)
    gathered = iter(_gather(torch.stack([x for x in given if x is not None], 1), _named(shard.group)).unbind(2))
    maxima, logsums, targets, entropies, totals, firsts = (None if x is None else next(gathered) for x in given)
    assert maxima is not None and logsums is not None and targets is not None
    top = maxima.amax(0)
    banned = maxima == -torch.inf
    shares = torch.where(banned, -torch.inf, (maxima - top) + logsums)
    everywhere = shares.exp().sum(0).log()
    targets = torch.where(banned, -torch.inf, (targets + logsums) + (maxima - top))
    target = targets.gather(0, owners[None].long()).squeeze(0) - everywhere
    h = None if entropies is None else _entropy(entropies, shares - everywhere)
    t = None if totals is None else _total(shard, totals, maxima - top)
    leads = None if firsts is None else _top1(firsts, owners, maxima, top).masked_fill(target.isnan(), 0)
    return target, h, top, everywhere, t, leads


def _entropy(entropies: Tensor, log_w: Tensor) -> Tensor:
    w = log_w.exp()
    return torch.where(w == 0, 0, w * (entropies - log_w)).sum(0)


def _total(shard: Shard, totals: Tensor, shifts: Tensor) -> Tensor:
    """A shard that is -inf everywhere makes the sum -inf; one without columns adds nothing."""
    sizes = torch.tensor(shard.sizes, dtype=totals.dtype, device=totals.device)[:, None]
    lifted = torch.where(shifts == -torch.inf, -torch.inf, totals + sizes * shifts)
    return torch.where(sizes == 0, 0, lifted).sum(0)


def _top1(firsts: Tensor, owners: Tensor, maxima: Tensor, top: Tensor) -> Tensor:
    """1 where the owner of the label has it first and is itself the first rank with the largest logit."""
    best = maxima == top
    leads = best & (best.cumsum(0) == 1)
    return torch.where(leads, firsts, 0).gather(0, owners[None].long()).squeeze(0)


def _named(group: str) -> dist.ProcessGroup:
    """Operator schemas know strings, not groups."""
    return distributed_c10d._resolve_process_group(group)  # pyright: ignore  # the name's type is private too


def gathered(shard: Shard, table: Tensor) -> Tensor:
    """``[n, c]`` of every rank as ``[R, n, c]``."""
    return _gather(table, _named(shard.group))


def _gather(table: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n, c]`` of every rank as ``[R, n, c]``."""
    tables = table.new_empty(group.size(), *table.shape)
    dist.all_gather(list(tables.unbind(0)), table, group=group)
    return tables


def begin_sum(shard: Shard, partial: Tensor) -> dist.Work:
    """Starts the sum of ``partial`` over the ranks, in place; ``wait`` on what is returned before reading it."""
    work = dist.all_reduce(partial, group=_named(shard.group), async_op=True)
    assert work is not None
    return work
