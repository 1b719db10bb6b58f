"""The passes of ``linear_loss``: chunk after chunk with gradients at once, or statistics of all rows first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.head.backward import add_chunk
from fastalign.ops.head.gemm import project
from fastalign.ops.head.head import (
    Head,
    Leaves,
    Stats,
    Wanted,
    cut,
    hidden_rows,
    join,
    reported,
    row_coefficients,
    sweep,
    workspace,
)
from fastalign.ops.head.loss_fn import LossFn, evaluate
from fastalign.ops.head.plan import Chunk, Plan
from fastalign.ops.head.units import Units
from fastalign.ops.rows import Coefficients, pick
from fastalign.types import TokenStats


@dataclass
class Outcome:
    """A finished pass: the loss, sums of metrics, statistics and coefficients of the scored rows."""

    loss: Tensor
    metrics: dict[str, Tensor]
    stats: Stats
    row: Coefficients | None


def one_pass(
    head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, wanted: Wanted, grads: Leaves | None
) -> Outcome:
    """Every group of chunks from hidden states to gradients while its logits are hot."""
    buffer = workspace(head, plan.held_rows, head.weight.shape[0])
    losses, sums, parts, rows = [], {}, [], []
    for index, group in enumerate(plan.groups):
        span = plan.unit_spans[index] if plan.unit_spans else None
        logits, stats = _group_stats(head, plan, group, buffer, wanted.entropy)
        seen = _token_stats(head, stats, wanted, group[0][0], group[-1][1], units, span)
        loss, metrics, upstream = evaluate(loss_fn, seen, grads is not None)
        if grads is not None and upstream is not None:
            rows.append(row_coefficients(head, stats, upstream))
            _add_group(head, plan, grads, group, logits, stats, rows[-1], first=index == 0)
        losses.append(loss)
        parts.append(stats)
        _add_metrics(sums, metrics)
    stats = join(head, parts, wanted.entropy)
    return Outcome(_total(losses, head), sums, stats, None if grads is None else _joined(stats, rows))


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
    row: Coefficients,
    *,
    first: bool,
) -> None:
    """Gradients chunk by chunk, from the last, whose logits are there; those that lost their slot are made again."""
    for i, (start, stop) in reversed(list(enumerate(group))):
        if plan.slots - 1 <= i < len(group) - 1:
            project(head, hidden_rows(head, start, stop), logits[i].view(-1))
        rows = slice(start - group[0][0], stop - group[0][0])
        part, last = (cut(stats, rows), pick(row, rows)), i == len(group) - 1
        add_chunk(head, grads, logits[i], *part, start, first=first and last)


def two_phase(head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, wanted: Wanted, gradient: bool) -> Outcome:
    """Statistics of all chunks, then one call of ``loss_fn``; gradients are made from its coefficients afterwards."""
    buffer, parts = workspace(head, plan.chunk_rows, head.weight.shape[0]), []
    for start, stop in plan.chunks:
        parts.append(sweep(head, start, stop, project(head, hidden_rows(head, start, stop), buffer), wanted.entropy))
    stats = join(head, parts, wanted.entropy)
    everything = None if units is None else (0, len(units.lengths))
    seen = _token_stats(head, stats, wanted, 0, len(head.labels), units, everything)
    loss, metrics, upstream = evaluate(loss_fn, seen, gradient)
    return Outcome(
        _total([loss], head), metrics, stats, None if upstream is None else row_coefficients(head, stats, upstream)
    )


def _token_stats(
    head: Head, stats: Stats, wanted: Wanted, start: int, stop: int, units: Units | None, span: tuple[int, int] | None
) -> TokenStats:
    """What ``loss_fn`` sees of the scored rows ``start:stop``."""
    device = head.hidden.device
    rows = torch.arange(start, stop, device=device) if head.rows is None else head.rows[start:stop]
    sequences, cu_seqlens = units.sequences(*span, device) if units is not None and span is not None else (None, None)
    logps, entropy, lse = (None if x is None else x.to(head.out_dtype) for x in reported(head, stats, wanted))
    assert logps is not None
    return TokenStats(logps, rows, entropy, stats.is_top1, sequences, cu_seqlens, lse=lse)


def _total(losses: list[Tensor], head: Head) -> Tensor:
    """The sum over chunks, in fp64: it must not depend on their number."""
    total = torch.zeros((), dtype=torch.float64, device=head.hidden.device)
    for loss in losses:
        total += loss
    return total.to(head.out_dtype)


def _add_metrics(sums: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value


def _joined(stats: Stats, rows: list[Coefficients]) -> Coefficients:
    """The chunks' coefficients as one vector each, kept for a second backward."""
    if not rows:
        return Coefficients(torch.empty_like(stats.logps))
    g = torch.cat([row.g for row in rows])
    rest = ([row[i] for row in rows] for i in range(1, len(Coefficients._fields)))
    return Coefficients(g, *(_filled(column, rows) for column in rest))


def _filled(column: list[Tensor | None], rows: list[Coefficients]) -> Tensor | None:
    if all(x is None for x in column):
        return None
    return torch.cat([torch.zeros_like(row.g) if x is None else x for x, row in zip(column, rows, strict=True)])
