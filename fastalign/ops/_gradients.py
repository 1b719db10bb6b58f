"""From ``d logits`` to the gradients of hidden states, weight and bias: in one pass, or through recomputed logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops._head import (
    Head,
    Needs,
    Stats,
    add_product,
    cut,
    differentiate,
    hidden_rows,
    multiply,
    project,
    select,
    spread,
    workspace,
)
from fastalign.ops.plan import Plan
from fastalign.ops.token_logps import ELSEWHERE
from fastalign.ops.vocab_parallel import begin_sum

WORTH_COMPACTING = 0.25
"""Share of rows without a coefficient from which moving the others together costs less than their GEMMs."""


@dataclass
class Gradients:
    """What a pass has made so far: gradients of hidden ``[N, D]``, weight and bias; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def kept_rows(g: Tensor, e: Tensor | None, least: float = 0.0) -> Tensor | None:
    """Ascending positions of the rows with a coefficient, when at least the share ``least`` of all has none.

    None where all are needed, and on CUDA, where only the device knows. A NaN coefficient is not zero.
    """
    if g.device.type != "cpu":
        return None
    keep = ((g != 0) if e is None else (g != 0) | (e != 0)).nonzero().squeeze(1)
    idle = len(g) - len(keep)
    return keep if idle and idle >= least * len(g) else None


def needed(head: Head, stats: Stats, g: Tensor, e: Tensor | None) -> tuple[Head, Stats, Tensor, Tensor | None]:
    """The same without the rows whose coefficients are all zero: no GEMM for them, their gradient is exactly 0."""
    keep = kept_rows(g, e)
    if keep is None:
        return head, stats, g, e
    return select(head, keep), cut(stats, keep), g[keep], None if e is None else e[keep]


# --- while the logits are hot ----------------------------------------------------------------------------------------


def write_rows(head: Head, target: Tensor, start: int, stop: int, dz: Tensor) -> Callable[[], None]:
    """``target[rows] = dz @ weight`` for the scored rows ``start:stop``; in place where layouts allow.

    Of a shard the product is a partial sum: its exchange runs until the returned function is called.
    """
    if head.options.shard is not None:
        return _write_shared(head, target, start, stop, dz)
    if head.rows is None and target.dtype == dz.dtype:
        multiply(dz, head.weight, target[start:stop], None, head.options.batch_invariant)
    else:
        product = torch.empty(stop - start, head.weight.shape[1], dtype=dz.dtype, device=dz.device)
        _store(head, target, start, stop, multiply(dz, head.weight, product, None, head.options.batch_invariant))
    return _nothing_left


def _write_shared(head: Head, target: Tensor, start: int, stop: int, dz: Tensor) -> Callable[[], None]:
    """The partial sums are kept and added in the statistics' precision."""
    if head.options.shard is None or start == stop:
        return _nothing_left
    wide = torch.float64 if dz.dtype == torch.float64 else torch.float32
    partial = torch.zeros(stop - start, head.weight.shape[1], dtype=wide, device=dz.device)
    _add_hidden_gradient(head, partial, dz, head.weight)
    work = begin_sum(head.options.shard, partial)

    def finish() -> None:
        work.wait()
        _store(head, target, start, stop, partial)

    return finish


def _nothing_left() -> None:
    """The rows are written already."""


def _store(head: Head, target: Tensor, start: int, stop: int, rows: Tensor) -> None:
    if head.rows is None:
        target[start:stop] = rows
    else:
        target.index_copy_(0, head.rows[start:stop], rows.to(target.dtype))


def add_chunk(
    head: Head, grads: Gradients, logits: Tensor, stats: Stats, g: Tensor, e: Tensor | None, start: int, *, first: bool
) -> None:
    """The logits of the scored rows from ``start`` on become their gradient; then the two GEMMs of the chunk."""
    stop, hidden = start + len(logits), hidden_rows(head, start, start + len(logits))
    keep = kept_rows(g, e, WORTH_COMPACTING)
    if keep is not None:
        head, start, stop, hidden = select(head, keep + start), 0, len(keep), hidden[keep]
        logits, stats, g, e = _moved_up(logits, keep), cut(stats, keep), g[keep], None if e is None else e[keep]
    dz = differentiate(head, start, stop, logits, head.labels[start:stop], stats, g, e)
    _add_products(head, grads, dz, hidden, start, stop, first)


def _moved_up(logits: Tensor, keep: Tensor) -> Tensor:
    """The rows ``keep``, ascending, moved to the front one by one: no second buffer."""
    for to, row in enumerate(keep.tolist()):
        if to != row:
            logits[to] = logits[row]
    return logits[: len(keep)]


def _add_products(head: Head, grads: Gradients, dz: Tensor, hidden: Tensor, start: int, stop: int, first: bool) -> None:
    """Rows of ``d hidden`` are written, ``d weight`` and ``d bias`` accumulate."""
    finish = _nothing_left if grads.hidden is None else write_rows(head, grads.hidden, start, stop, dz)
    if grads.weight is not None:
        add_product(grads.weight, dz.t(), hidden, first=first)
    if grads.bias is not None:
        grads.bias += dz.sum(0, dtype=grads.bias.dtype)
    finish()


# --- second phase ----------------------------------------------------------------------------------------------------


def recomputed_gradients(
    head: Head, plan: Plan, stats: Stats, g: Tensor, e: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Second phase: logits again, slab by slab, into the gradients of hidden ``[n, D]``, weight and bias.

    A slab of the weight's gradient is finished before the next begins: no ``[V, D]`` accumulator. The gradient of the
    weight has the weight's dtype, the others the statistics'.
    """
    num_rows, (vocab, width), wide = len(head.labels), head.weight.shape, stats.max.dtype
    new = {"dtype": wide, "device": head.hidden.device}
    d_hidden = torch.zeros(num_rows, width, **new) if needs[0] else None
    d_weight = torch.zeros(vocab, width, dtype=head.weight_dtype, device=head.hidden.device) if needs[1] else None
    d_bias = torch.zeros(vocab, **new) if needs[2] else None
    hidden, buffer = hidden_rows(head, 0, num_rows), workspace(head, plan.block, plan.slab)
    finish = _summed(head, d_hidden) if not vocab else _nothing_left
    for first in range(0, vocab if num_rows else 0, plan.slab):
        last = min(vocab, first + plan.slab)
        slab_sum = None if d_weight is None else _slab_accumulator(d_weight[first:last], wide)
        for start in range(0, num_rows, plan.block):
            rows = slice(start, min(num_rows, start + plan.block))
            dz = _slab_gradient(head, hidden[rows], buffer, rows, (first, last), stats, g, e)
            if d_hidden is not None:
                _add_hidden_gradient(head, d_hidden[rows], dz, head.weight[first:last])
            if last == vocab and rows.stop == num_rows:
                finish = _summed(head, d_hidden)
            if slab_sum is not None:
                add_product(slab_sum, dz.t(), hidden[rows], first=start == 0)
            if d_bias is not None:
                d_bias[first:last] += dz.sum(0, dtype=wide)
        if d_weight is not None and slab_sum is not None and slab_sum.dtype != d_weight.dtype:
            d_weight[first:last] = slab_sum
    finish()
    return d_hidden, d_weight, d_bias


def _summed(head: Head, d_hidden: Tensor | None) -> Callable[[], object]:
    """Starts adding the ranks' parts of ``d hidden``; the returned function waits for it."""
    if head.options.shard is None or d_hidden is None or not len(d_hidden):
        return _nothing_left
    return begin_sum(head.options.shard, d_hidden).wait


def finish(
    head: Head, grads: tuple, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Second-phase gradients over scored rows to gradients of the inputs, each in its dtype."""
    d_hidden, d_weight, d_bias = grads
    return (
        hidden.new_empty(0) if d_hidden is None else spread(head, d_hidden, hidden.dtype),
        weight.new_empty(0) if d_weight is None else d_weight,
        hidden.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def _slab_accumulator(target: Tensor, dtype: torch.dtype) -> Tensor:
    """The slab of the gradient itself when it is precise enough to add into."""
    return target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype, device=target.device)


def _add_hidden_gradient(head: Head, total: Tensor, dz: Tensor, weight: Tensor) -> None:
    if not head.options.batch_invariant:
        add_product(total, dz, weight, first=False)
        return
    out = torch.empty(total.shape, dtype=dz.dtype, device=dz.device)
    total.add_(multiply(dz, weight, out, None, True))


def _slab_gradient(
    head: Head,
    hidden: Tensor,
    buffer: Tensor,
    rows: slice,
    columns: tuple[int, int],
    stats: Stats,
    g: Tensor,
    e: Tensor | None,
) -> Tensor:
    """``d logits`` of a block of rows and a slab of columns; labels of other slabs have no target term."""
    first, last = columns
    labels = head.labels[rows]
    local = torch.where((labels >= first) & (labels < last), labels - first, ELSEWHERE)
    local = torch.where(labels >= head.weight.shape[0], last - first, local)  # invalid stays invalid
    logits = project(head, hidden, buffer, first, last)
    entropy_grad = None if e is None else e[rows]
    part = cut(stats, rows)
    return differentiate(head, rows.start, rows.stop, logits, local, part, g[rows], entropy_grad)
