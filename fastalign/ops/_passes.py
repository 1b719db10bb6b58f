"""The passes of ``linear_loss``: chunk after chunk with gradients at once, or statistics of all rows first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops._gradients import add_chunk
from fastalign.ops._head import Head, Leaves, Stats, cut, hidden_rows, join, project, sweep, workspace
from fastalign.ops._loss_fn import LossFn, evaluate
from fastalign.ops._units import Units
from fastalign.ops.plan import Chunk, Plan
from fastalign.types import TokenStats


@dataclass
class Outcome:
    """A finished pass: the loss, sums of metrics, statistics and coefficients of the scored rows."""

    loss: Tensor
    metrics: dict[str, Tensor]
    stats: Stats
    g: Tensor | None
    e: Tensor | None


def one_pass(
    head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, entropy: bool, grads: Leaves | None
) -> Outcome:
    """Every group of chunks from hidden states to gradients while its logits are hot."""
    buffer = workspace(head, plan.held_rows, head.weight.shape[0])
    losses, sums, parts, gs, es = [], {}, [], [], []
    for index, group in enumerate(plan.groups):
        span = plan.unit_spans[index] if plan.unit_spans else None
        logits, stats = _group_stats(head, plan, group, buffer, entropy)
        seen = _token_stats(head, stats, group[0][0], group[-1][1], units, span)
        loss, metrics, g, e = evaluate(loss_fn, seen, grads is not None)
        if grads is not None and g is not None:
            _add_group(head, plan, grads, group, logits, stats, *_like(stats, g, e), first=index == 0)
        losses.append(loss)
        parts.append(stats)
        gs.append(g)
        es.append(e)
        _add_metrics(sums, metrics)
    stats = join(head, parts, entropy)
    return Outcome(_total(losses, head), sums, stats, *_coefficients(stats, gs, es))


def _group_stats(
    head: Head, plan: Plan, group: tuple[Chunk, ...], buffer: Tensor, entropy: bool
) -> tuple[list[Tensor], Stats]:
    """Logits and statistics of a group; each chunk has its slot of the buffer, those beyond share the last."""
    logits, parts = [], []
    size = max(stop - start for start, stop in group) * head.weight.shape[0]
    for i, (start, stop) in enumerate(group):
        slot = buffer[min(i, plan.slots - 1) * size :]
        logits.append(project(head, hidden_rows(head, start, stop), slot))
        parts.append(sweep(head, start, stop, logits[i], entropy))
    return logits, join(head, parts, entropy)


def _add_group(
    head: Head,
    plan: Plan,
    grads: Leaves,
    group: tuple[Chunk, ...],
    logits: list[Tensor],
    stats: Stats,
    g: Tensor,
    e: Tensor | None,
    *,
    first: bool,
) -> None:
    """Gradients chunk by chunk, from the last, whose logits are there; those that lost their slot are made again."""
    for i, (start, stop) in reversed(list(enumerate(group))):
        if plan.slots - 1 <= i < len(group) - 1:
            project(head, hidden_rows(head, start, stop), logits[i].view(-1))
        rows = slice(start - group[0][0], stop - group[0][0])
        part = (cut(stats, rows), g[rows], None if e is None else e[rows])
        add_chunk(head, grads, logits[i], *part, start, first=first and i == len(group) - 1)


def two_phase(head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, entropy: bool, gradient: bool) -> Outcome:
    """Statistics of all chunks, then one call of ``loss_fn``; gradients are made from its coefficients afterwards."""
    buffer, parts = workspace(head, plan.chunk_rows, head.weight.shape[0]), []
    for start, stop in plan.chunks:
        parts.append(sweep(head, start, stop, project(head, hidden_rows(head, start, stop), buffer), entropy))
    stats = join(head, parts, entropy)
    everything = None if units is None else (0, len(units.lengths))
    seen = _token_stats(head, stats, 0, len(head.labels), units, everything)
    loss, metrics, g, e = evaluate(loss_fn, seen, gradient)
    g, e = (None, None) if g is None else _like(stats, g, e)
    return Outcome(_total([loss], head), metrics, stats, g, e)


def _token_stats(
    head: Head, stats: Stats, start: int, stop: int, units: Units | None, span: tuple[int, int] | None
) -> TokenStats:
    """What ``loss_fn`` sees of the scored rows ``start:stop``."""
    device = head.hidden.device
    rows = torch.arange(start, stop, device=device) if head.rows is None else head.rows[start:stop]
    sequences, cu_seqlens = units.sequences(*span, device) if units is not None and span is not None else (None, None)
    entropy = None if stats.entropy is None else stats.entropy.to(head.out_dtype)
    return TokenStats(stats.logps.to(head.out_dtype), rows, entropy, is_top1(stats), sequences, cu_seqlens)


def is_top1(stats: Stats) -> Tensor:
    """Whether the label has the largest logit, over the vocabulary of all ranks."""
    return stats.logps + stats.logsum == 0


def _like(stats: Stats, g: Tensor, e: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Coefficients as the kernels read them."""
    dtype = stats.logps.dtype
    return g.to(dtype).contiguous(), None if e is None else e.to(dtype).contiguous()


def _total(losses: list[Tensor], head: Head) -> Tensor:
    """The sum over chunks, in fp64: it must not depend on their number."""
    total = torch.zeros((), dtype=torch.float64, device=head.hidden.device)
    for loss in losses:
        total += loss
    return total.to(head.out_dtype)


def _add_metrics(sums: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value


def _coefficients(stats: Stats, gs: list, es: list) -> tuple[Tensor | None, Tensor | None]:
    """The chunks' coefficients as one vector each, kept for a second backward."""
    dtype = stats.logps.dtype
    if not gs:
        return torch.empty_like(stats.logps), None
    if gs[0] is None:
        return None, None
    e = None
    if any(x is not None for x in es):
        e = torch.cat([torch.zeros_like(g) if x is None else x for g, x in zip(gs, es, strict=True)]).to(dtype)
    return torch.cat(gs).to(dtype), e
