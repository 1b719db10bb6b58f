"""The passes of ``linear_loss``: chunk after chunk with gradients at once, or statistics of all rows first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops._gradients import Gradients, add_chunk
from fastalign.ops._head import Head, Stats, hidden_rows, join, project, sweep, workspace
from fastalign.ops._loss_fn import LossFn, evaluate
from fastalign.ops._units import Units
from fastalign.ops.plan import Plan
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
    head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, entropy: bool, grads: Gradients | None
) -> Outcome:
    """Every chunk from hidden states to gradients while its logits are hot."""
    buffer = workspace(head, plan.chunk_rows, head.weight.shape[0])
    losses, sums, parts, gs, es = [], {}, [], [], []
    for index, (start, stop) in enumerate(plan.chunks):
        logits = project(head, hidden_rows(head, start, stop), buffer)
        stats = sweep(head, start, stop, logits, entropy)
        seen = _token_stats(head, stats, start, stop, units, plan.unit_spans[index] if plan.unit_spans else None)
        loss, metrics, g, e = evaluate(loss_fn, seen, grads is not None)
        if grads is not None and g is not None:
            add_chunk(head, grads, logits, stats, *_like(stats, g, e), start, first=index == 0)
        losses.append(loss)
        parts.append(stats)
        gs.append(g)
        es.append(e)
        _add_metrics(sums, metrics)
    stats = join(head, parts, entropy)
    return Outcome(_total(losses, head), sums, stats, *_coefficients(stats, gs, es))


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
