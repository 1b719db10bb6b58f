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

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from fastalign.ops.rows import Stats
from fastalign.ops.transfer import on_device
from fastalign.types import IGNORE_INDEX


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


def is_split(process_group: dist.ProcessGroup | None) -> bool:
    """Whether several ranks share the vocabulary.

    Raises:
        ValueError: not a process group.
    """
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"process_group must be a torch.distributed ProcessGroup or None, got {type(process_group).__name__}"
        )
    return process_group is not None and process_group.size() > 1


@contextmanager
def checked_together(process_group: dist.ProcessGroup | None, local: Tensor) -> Iterator[None]:
    """Wrap the checks that come before ``agree``: where one rank raises, the others raise too instead of waiting."""
    try:
        yield
    except Exception as error:
        if isinstance(process_group, dist.ProcessGroup) and process_group.size() > 1:
            _gather(torch.tensor([[0, 0, 0, REFUSED]], device=local.device), process_group)
            _texts(f"{type(error).__name__}: {error}", process_group, local.device)
        raise


def agree(
    process_group: dist.ProcessGroup | None,
    local: Tensor,
    columns: int,
    same: dict[str, Any],
    flag: bool,
    labels: Tensor | None,
) -> tuple[str | None, list[int] | None, bool]:
    """The group's name, the columns of each rank, and whether any rank has the flag.

    Ranks whose arguments differ would wait for each other in collectives that the others never reach, or that have
    another shape there. So they compare first: one all-gather of four integers per call, the last of them a checksum
    of all that must be equal, however much that is. Only where it differs do they exchange the values as text.

    Args:
        process_group: the ranks that share the vocabulary; None, or a group of one, needs no collective.
        local: a tensor on the device that the ranks talk through.
        columns: of this rank.
        same: by name what must be equal on every rank: the op, its options, sizes, dtypes, and whether the inputs that
            all ranks differentiate together want a gradient.
        flag: whether this rank wants what all must do together.
        labels: ``[N]``, which must be the same on every rank; they are compared by a checksum.

    Raises:
        ValueError: not a process group; something differs, or the labels do; another rank refused its arguments.
    """
    if process_group is None or not is_split(process_group):
        return None, None, flag
    words = {name: _in_words(x) for name, x in same.items()}
    digest = zlib.crc32(json.dumps(words).encode())
    mine = torch.tensor([0, columns, int(flag), digest], device=local.device)
    if labels is not None:
        mine[0] = _checksum(labels)
    checksums, sizes, flags, digests = _gather(mine[None], process_group)[:, 0].t().tolist()
    if REFUSED in digests or len(set(digests)) > 1:
        raise ValueError(_difference(_texts(json.dumps(words), process_group, local.device), digests))
    if len(set(checksums)) > 1:
        raise ValueError(
            "process_group: the ranks that share a vocabulary need the same rows, their labels differ; where each rank "
            "has rows of its own (data parallelism, FSDP), gather the weight: weight.full_tensor()"
        )
    return process_group.group_name, sizes, any(flags)


REFUSED = -1
"""In the place of the checksum, from a rank that refused its arguments."""


def _in_words(x: Any) -> str:
    """A value as the ranks compare it: offsets by a checksum, per-row temperatures only by being given."""
    if not isinstance(x, Tensor):
        return str(x)
    if x.is_floating_point():
        return "one per row"
    return f"{len(x)} numbers with the checksum {zlib.crc32(str(x.tolist()).encode()):08x}"


def _checksum(labels: Tensor) -> Tensor:
    """``sum_i label_i w_i`` modulo 2^64 with weights of random bits: other labels have another one."""
    place = torch.arange(1, len(labels) + 1, device=labels.device) * -7046029254386353131  # 2^64 / golden ratio
    return (labels.long() * (place ^ (place >> 29)) * -4658895280553007687).sum()


def _difference(texts: list[str], digests: list[int]) -> str:
    """One line about the first thing that is not the same on every rank, or that a rank refused."""
    if REFUSED in digests:
        rank = digests.index(REFUSED)
        who = f"rank {rank} of the {len(texts)} that share the vocabulary"
        return f"process_group: {who} refused its arguments: {texts[rank]}"
    words = [json.loads(text) for text in texts]
    name = next(name for name in words[0] if len({rank.get(name) for rank in words}) > 1)
    values = ", ".join(str(rank.get(name, "nothing")) for rank in words)
    return f"process_group: every rank needs the same {name}, got {values} in rank order"


def _texts(text: str, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """The text of every rank, in rank order."""
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = _gather(torch.tensor([[len(mine)]], device=device), group).flatten().tolist()
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))[None].to(device)
    return [bytes(row[:size].tolist()).decode() for row, size in zip(_gather(padded, group)[:, 0], sizes, strict=True)]


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


def nothing(labels: Tensor, dtype: torch.dtype, entropy: bool, total: bool, top1: bool) -> Stats:
    """The statistics of a shard without columns; no two share their memory, which an operator must not return."""
    zeros = torch.zeros(len(labels), dtype=dtype, device=labels.device)
    logps, maximum = zeros.masked_fill(labels >= 0, torch.nan), torch.full_like(zeros, -torch.inf)
    h, t, hits = (torch.zeros_like(zeros) if wanted else None for wanted in (entropy, total, top1))
    return Stats(logps, h, maximum, zeros, t, hits)


def combine(
    shard: Shard,
    owners: Tensor,
    logps: Tensor,
    entropy: Tensor | None,
    maximum: Tensor,
    logsum: Tensor,
    total: Tensor | None,
    top1: Tensor | None,
) -> Stats:
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
    return Stats(target, h, top, everywhere, t, leads)


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
    """The group of this name: operator schemas can pass a string but no process group."""
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
