"""From ``d logits`` to the gradients of hidden states, weight and bias: in one pass, or through recomputed logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastalign.ops.half import held_in
from fastalign.ops.head.gemm import add_back, add_product, multiply_back, parts, project
from fastalign.ops.head.head import (
    Head,
    Leaves,
    Needs,
    Stats,
    cut,
    differentiate,
    hidden_rows,
    kernel_dtype,
    scaled,
    select,
    spread,
    workspace,
)
from fastalign.ops.head.plan import Plan
from fastalign.ops.parallel import begin_sum
from fastalign.ops.rows import Coefficients, idle, pick
from fastalign.ops.token_logps import ELSEWHERE

WORTH_COMPACTING = 0.25
"""Share of rows without a coefficient from which moving the others together costs less than their GEMMs."""


def kept_rows(row: Coefficients, least: float = 0.0) -> Tensor | None:
    """Ascending positions of the rows with a coefficient, when at least the share ``least`` of all has none.

    None where all are needed, and on CUDA, where only the device knows. A NaN coefficient is not zero.
    """
    if row.g.device.type != "cpu":
        return None
    keep = (~idle(row)).nonzero().squeeze(1)
    skipped = len(row.g) - len(keep)
    return keep if skipped and skipped >= least * len(row.g) else None


def needed(head: Head, stats: Stats, row: Coefficients) -> tuple[Head, Stats, Coefficients]:
    """The same without the rows whose coefficients are all zero: no GEMM for them, their gradient is exactly 0."""
    keep = kept_rows(row)
    return (head, stats, row) if keep is None else (select(head, keep), cut(stats, keep), pick(row, keep))


# --- while the logits are hot ----------------------------------------------------------------------------------------


def write_rows(
    head: Head, target: Tensor, start: int, stop: int, dz: Tensor, alpha: Tensor | None
) -> Callable[[], None]:
    """``target[rows] = dz @ [weight, up]`` for the scored rows ``start:stop``; in place where layouts allow.

    ``alpha`` is the factor that an fp16 ``dz`` needs. Of a shard the product is a partial sum: its exchange runs until
    the returned function is called.
    """
    if head.options.shard is not None:
        return _write_shared(head, target, start, stop, dz, alpha)
    if alpha is not None:
        product = torch.zeros(stop - start, head.width, dtype=alpha.dtype, device=dz.device)
        add_back(head, dz, product, alpha)
        _store(head, target, start, stop, product)
    elif head.rows is None and target.dtype == dz.dtype:
        multiply_back(head, dz, target[start:stop])
    else:
        product = torch.empty(stop - start, head.width, dtype=dz.dtype, device=dz.device)
        _store(head, target, start, stop, multiply_back(head, dz, product))
    return _nothing_left


def _write_shared(
    head: Head, target: Tensor, start: int, stop: int, dz: Tensor, alpha: Tensor | None
) -> Callable[[], None]:
    """The partial sums are kept and added in the statistics' precision."""
    if head.options.shard is None or start == stop:
        return _nothing_left
    wide = torch.float64 if dz.dtype == torch.float64 else torch.float32
    partial = torch.zeros(stop - start, head.width, dtype=wide, device=dz.device)
    add_back(head, dz, partial, alpha)
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
    head: Head, grads: Leaves, logits: Tensor, stats: Stats, row: Coefficients, start: int, *, first: bool
) -> None:
    """The logits of the scored rows from ``start`` on become their gradient; then the two GEMMs of the chunk."""
    stop, hidden = start + len(logits), hidden_rows(head, start, start + len(logits))
    keep = kept_rows(row, WORTH_COMPACTING)
    if keep is not None:
        head, start, stop, hidden = select(head, keep + start), 0, len(keep), hidden[keep]
        logits, stats, row = _moved_up(logits, keep), cut(stats, keep), pick(row, keep)
    row, alpha = scaled(head, start, stop, row)
    dz = differentiate(head, start, stop, logits, head.labels[start:stop], stats, row)
    # Rows of d hidden are written, those of weight, adapter and bias accumulate.
    finish = _nothing_left if grads.hidden is None else write_rows(head, grads.hidden, start, stop, dz, alpha)
    _add_weight_gradients(head, (grads.weight, grads.up), grads.bias, dz, hidden, alpha, first=first)
    finish()


def _moved_up(logits: Tensor, keep: Tensor) -> Tensor:
    """The rows ``keep``, ascending, moved to the front one by one: no second buffer."""
    for to, row in enumerate(keep.tolist()):
        if to != row:
            logits[to] = logits[row]
    return logits[: len(keep)]


def _add_weight_gradients(
    head: Head,
    sums: Sequence[Tensor | None],
    bias: Tensor | None,
    dz: Tensor,
    hidden: Tensor,
    alpha: Tensor | None,
    *,
    first: bool,
) -> None:
    """``dz.T @ hidden``, in its parts, and the column sums of dz; ``first`` sets the products instead of adding."""
    for (_, columns), total in zip(parts(head), sums, strict=False):
        if total is not None:
            add_product(total, dz.t(), hidden[:, columns], first=first, alpha=alpha)
    if bias is not None:
        total = dz.sum(0, dtype=bias.dtype)
        bias += total if alpha is None else total * alpha


# --- second phase ----------------------------------------------------------------------------------------------------


MakeGradient = Callable[[Tensor, slice, int, int], Tensor]
"""``d logits`` of a block of rows and a slab of columns, from the rows' hidden states: their logits are made again."""


def recomputed_gradients(
    head: Head, plan: Plan, stats: Stats, row: Coefficients, inputs: Leaves, needs: Needs, *, held: bool = False
) -> Leaves:
    """Second phase of one stream: the gradients of ``row`` in the inputs."""
    row, alpha = scaled(head, 0, len(head.labels), row)
    buffer = workspace(head, plan.block, plan.slab)

    def make(hidden: Tensor, rows: slice, first: int, last: int) -> Tensor:
        logits, labels = project(head, hidden, buffer, first, last), slab_labels(head, rows, first, last)
        return differentiate(head, rows.start, rows.stop, logits, labels, cut(stats, rows), pick(row, rows))

    return slab_by_slab(head, plan, make, alpha, inputs, needs, held=held)


def slab_by_slab(
    head: Head,
    plan: Plan,
    make: MakeGradient,
    alpha: Tensor | None,
    inputs: Leaves,
    needs: Needs,
    *,
    held: bool = False,
) -> Leaves:
    """What ``make`` makes, slab by slab, into the gradients of the inputs, each in its input's dtype.

    A slab of the weight's gradient is finished before the next begins: no ``[V, D]`` accumulator. ``held``: the
    upstream is yet to come, and what would be fp16 waits for it in fp32.
    """
    num_rows, vocab, wide = len(head.labels), head.weight.shape[0], kernel_dtype(head.options.dtype)
    new = {"dtype": wide, "device": head.hidden.device}
    d_hidden = torch.zeros(num_rows, head.width, **new) if needs.hidden else None
    d_weights = _zeros(inputs.weight, needs.weight, held), _zeros(inputs.up, needs.up, held)
    d_bias = torch.zeros(vocab, **new) if needs.bias else None
    hidden = hidden_rows(head, 0, num_rows)
    finish = _summed(head, d_hidden) if not vocab else _nothing_left
    for first in range(0, vocab if num_rows else 0, plan.slab):
        last = min(vocab, first + plan.slab)
        slabs = [None if d is None else d[first:last] for d in d_weights]
        sums = [None if slab is None else _accumulator(slab, wide) for slab in slabs]
        d_slab = None if d_bias is None else d_bias[first:last]
        for start in range(0, num_rows, plan.block):
            rows = slice(start, min(num_rows, start + plan.block))
            dz = make(hidden[rows], rows, first, last)
            if d_hidden is not None:
                add_back(head, dz, d_hidden[rows], alpha, first, last)
            if last == vocab and rows.stop == num_rows:
                finish = _summed(head, d_hidden)
            _add_weight_gradients(head, sums, d_slab, dz, hidden[rows], alpha, first=start == 0)
        for slab, total in zip(slabs, sums, strict=True):
            if slab is not None and total is not None and total is not slab:
                slab.copy_(total)
    finish()
    return _dense(head, inputs, held, d_hidden, *d_weights, d_bias)


def slab_labels(head: Head, rows: slice, first: int, last: int) -> Tensor:
    """Labels of some rows counted from a slab's first column; those of other slabs have no target term."""
    labels = head.labels[rows]
    local = torch.where((labels >= first) & (labels < last), labels - first, ELSEWHERE)
    return torch.where(labels >= head.weight.shape[0], last - first, local)  # invalid stays invalid


def _dtype(like: Tensor, held: bool) -> torch.dtype:
    return held_in(like.dtype) if held else like.dtype


def _zeros(like: Tensor | None, needed: bool, held: bool) -> Tensor | None:
    return (
        torch.zeros(like.shape, dtype=_dtype(like, held), device=like.device) if needed and like is not None else None
    )


def _dense(
    head: Head, inputs: Leaves, held: bool, d_hidden: Tensor | None, d_weight, d_up, d_bias: Tensor | None
) -> Leaves:
    """``d hidden`` over all rows, and the sums in their inputs' dtypes."""
    hidden = None if d_hidden is None or inputs.hidden is None else spread(head, d_hidden, _dtype(inputs.hidden, held))
    bias = None if d_bias is None or inputs.bias is None else d_bias.to(_dtype(inputs.bias, held))
    return Leaves(hidden, d_weight, d_up, bias)


def _summed(head: Head, d_hidden: Tensor | None) -> Callable[[], object]:
    """Starts adding the ranks' parts of ``d hidden``; the returned function waits for it."""
    if head.options.shard is None or d_hidden is None or not len(d_hidden):
        return _nothing_left
    return begin_sum(head.options.shard, d_hidden).wait


def _accumulator(target: Tensor, dtype: torch.dtype) -> Tensor:
    """The slab of the gradient itself when it is precise enough to add into."""
    return target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype, device=target.device)
