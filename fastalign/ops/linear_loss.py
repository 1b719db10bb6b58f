"""Any loss of token log-probs, from hidden states to gradients in one pass.

    for each chunk I of scored rows:
        Z     = hidden[I] @ weight.T + bias          in a reused workspace
        stats = sweep(Z)                             logps, entropy, lse
        g, e, zeta = d loss_fn(stats) / d stats      a tiny autograd graph: a few coefficients per row
        dZ    = g (1[v=y] - p) - e p (ln p + H) + zeta p      in place of Z
        d hidden[I] = dZ @ weight;   d weight += dZ.T @ hidden[I]      in fp32

Backward returns these gradients, multiplied by its upstream scalar.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.final import mark
from fastalign.ops.head.backward import (
    DIFFERENTIABLE,
    WORTH_COMPACTING,
    LossFn,
    add_weight_gradients,
    checked,
    evaluate,
    in_input_dtypes,
    kept_rows,
    moved_up,
    needed,
    new_gradients,
    nothing_left,
    recomputed_gradients,
    write_rows,
)
from fastalign.ops.head.head import (
    Head,
    Leaves,
    Needs,
    Wanted,
    cut,
    differentiate,
    hidden_rows,
    in_dtype,
    join,
    make_head,
    plan_for,
    project,
    reported,
    row_coefficients,
    rows_of,
    scaled,
    scatter_rows,
    select,
    sweep,
    trained_columns,
    workspace,
)
from fastalign.ops.head.options import TENSORS, Call, make_call, trained, with_options
from fastalign.ops.head.plan import Plan
from fastalign.ops.head.units import Align, Units, make_units
from fastalign.ops.linear_logps import row_stats
from fastalign.ops.rows import Coefficients, Stats, joined, pick
from fastalign.ops.transfer import on_device
from fastalign.types import IGNORE_INDEX, TokenStats


@with_options
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_fn: LossFn,
    *,
    cu_seqlens: Tensor | None = None,
    cu_groups: Tensor | None = None,
    align: Align = "token",
    entropy: bool = False,
    lse: bool = False,
    **options: Any,
) -> tuple[Tensor, TokenStats]:
    """``loss_fn`` of token log-probs, with the gradients of ``hidden``, ``weight`` and ``bias`` made in the same pass.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature;  logps = z_y - lse(z)``; three GEMMs per row
    (two when the weight is frozen, one under ``no_grad``, which runs the same chunks and still evaluates ``loss_fn``).
    Gradients of fp16 inputs stay in fp32 until backward has multiplied them by its upstream gradient: they do not
    underflow before a loss scaler multiplies them.

    Args:
        hidden: ``[N, D]``; a row labelled -100 is never read.
        weight: ``[V, D]``.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored.
        loss_fn: gets a ``TokenStats`` of scored rows and returns the chunk's share of the loss, a scalar sum whose
            normalisers are fixed beforehand, or (scalar, dict of metric sums). It runs once per chunk, possibly never,
            and may index its own detached tensors by ``stats.rows`` and ``stats.sequences``.
        cu_seqlens: ``[B+1]`` offsets of the sequences in the N rows; needed unless ``align="token"``. Keep them on the
            CPU, also when the other tensors are on CUDA: the host reads them.
        cu_groups: ``[G+1]`` offsets of the groups in the B sequences, for ``align="group"``.
        align: what a chunk never splits. "pair": sequences 2p (chosen) and 2p+1 (rejected). Aligned stats carry
            ``sequences`` and ``cu_seqlens``; each sequence comes exactly once, empty ones included.
        entropy, lse: also give ``loss_fn`` the entropy, the log-sum-exp; both are differentiable.
        options: the fields of ``fastalign.ops.head.options.Options``: bias, lora, temperature, softcap, logit_scale,
            label_smoothing, process_group, memory, backend, batch_invariant, logits, num_scored. An aligned call
            avoids a host-device sync only with ``num_scored=N``, where all rows are scored.

    Returns:
        loss ``[]`` in fp32 (fp64 if an input is fp64), connected to the graph, and the ``TokenStats`` of all N rows,
        detached, zero on rows that are not scored, with the sums of the metrics.

    Raises:
        ValueError: a wrong argument; a ``loss_fn`` that returns no scalar or uses a trainable tensor besides the stats.
        RuntimeError: double backward. A second backward (``retain_graph``) recomputes.

    Under ``torch.compile`` the call traces as ``linear_logps`` followed by ``loss_fn`` on all rows, all of them scored.

    >>> hidden, weight, labels = torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, 2])
    >>> linear_loss(hidden, weight, labels, lambda stats: -stats.logps.sum() / 2)[0]
    tensor(1.3863)
    """
    more = {"entropy": entropy, "lse": lse, "align": align, "cu_seqlens": cu_seqlens, "cu_groups": cu_groups}
    call, trainable = make_call("linear_loss", hidden, weight, labels, options, more)
    wanted = Wanted(entropy, lse)
    if torch.compiler.is_compiling():
        return composed(call, trainable, loss_fn, cu_seqlens, align, wanted)
    head, enabled, inputs = make_head("linear_loss", call), torch.is_grad_enabled(), Leaves(*call[:4])
    units = None if align == "token" else make_units(call.labels, cu_seqlens, cu_groups, align, call.num_scored)
    needs = Needs(*map(trained, inputs)) if enabled else Needs(False, False, False, False)
    known, lengths = ("token", None) if units is None else ("unit", tuple(units.lengths))
    plan = plan_for(head, known, trained=trained_columns(inputs, needs), wanted=wanted, units=lengths)
    if plan.mode == "slabs":
        grads, (loss, metrics, stats, row) = None, two_phase(head, plan, units, loss_fn, wanted, any(needs))
        if row is not None:
            grads = recompute(head, plan, stats, row, inputs, needs)
    else:
        grads = new_gradients(head, plan, inputs, needs) if any(needs) else None
        loss, metrics, stats, row = one_pass(head, plan, units, loss_fn, wanted, grads)
        grads = None if grads is None else in_input_dtypes(grads, inputs)
    if grads is not None:
        loss = _Attach.apply(*inputs, (loss, grads, plan, stats, row, needs, call))
    return loss, all_rows(head, stats, metrics, wanted, units, cu_seqlens)  # pyright: ignore  # apply is not typed


# --- the passes ------------------------------------------------------------------------------------------------------

Outcome = tuple[Tensor, dict[str, Tensor], Stats, "Coefficients | None"]
"""Loss, sums of metrics, statistics of the scored rows, and their coefficients where gradients are wanted."""


def one_pass(
    head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, wanted: Wanted, grads: Leaves | None
) -> Outcome:
    """Run each group of chunks from hidden states to gradients while its logits are still in memory.

    Each chunk of a group keeps its logits in a slot of the buffer. Chunks beyond the last slot share it: their logits
    are computed twice. The gradients start with the last chunk, whose logits are still there.
    """
    vocab = head.weight.shape[0]
    buffer = workspace(head, plan.held_rows, vocab)
    losses, metrics, every_stats, every_row = [], {}, [], []
    for index, group in enumerate(plan.groups):
        begin, size = group[0][0], vocab * (plan.held_rows // min(plan.slots, len(group)))
        logits, parts = [], []
        for i, (start, stop) in enumerate(group):
            slot = buffer[min(i, plan.slots - 1) * size :] if i else buffer
            logits.append(project(head, hidden_rows(head, start, stop), slot))
            parts.append(sweep(head, start, stop, logits[i], wanted.entropy))
        stats = join(head, parts, wanted.entropy)
        span = plan.unit_spans[index] if plan.unit_spans else None
        seen = token_stats(head, stats, wanted, begin, group[-1][1], units, span, grads is not None)
        part, sums, upstream = evaluate(loss_fn, seen, grads is not None)
        losses.append(part)
        for name, x in sums.items():
            metrics[name] = metrics[name] + x if name in metrics else x
        every_stats.append(stats)
        if grads is None or upstream is None:
            continue
        row = row_coefficients(head, stats, upstream)
        every_row.append(row)
        for i, (start, stop) in reversed(list(enumerate(group))):
            if plan.slots - 1 <= i < len(group) - 1:
                project(head, hidden_rows(head, start, stop), logits[i].view(-1))
            rows, first = slice(start - begin, stop - begin), index == 0 and i == len(group) - 1
            both = (stats, row) if len(group) == 1 else (cut(stats, rows), pick(row, rows))
            add_chunk(head, grads, logits[i], *both, start, first=first)
    stats = join(head, every_stats, wanted.entropy)
    row = every_row[0] if len(every_row) == 1 else joined(every_row, stats.max)
    loss = losses[0] if len(losses) == 1 else added(losses, head.hidden.device)
    return in_dtype(loss, head.out_dtype), metrics, stats, None if grads is None else row


def added(losses: list[Tensor], device: torch.device) -> Tensor:
    """The chunks' losses as one, in fp64: their sum must not depend on the number of chunks."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for loss in losses:
        total += loss
    return total


def add_chunk(
    head: Head, grads: Leaves, logits: Tensor, stats: Stats, row: Coefficients, start: int, *, first: bool
) -> None:
    """Turn the logits of the scored rows from ``start`` on into their gradient, then run the chunk's two GEMMs.

    Rows of ``d hidden`` are written; ``d weight``, ``d up`` and ``d bias`` accumulate, or are set by the ``first``.
    """
    stop = start + logits.shape[0]
    hidden = hidden_rows(head, start, stop)
    keep = kept_rows(row, WORTH_COMPACTING)
    if keep is not None:
        if grads.hidden is not None and head.rows is None:
            grads.hidden[start:stop] = 0
        head, start, stop, hidden = select(head, keep + start), 0, len(keep), hidden[keep]
        logits, stats, row = moved_up(logits, keep), cut(stats, keep), pick(row, keep)
    row, alpha = scaled(head, start, stop, row)
    dz = differentiate(head, start, stop, logits, rows_of(head.labels, start, stop), stats, row)
    finish = nothing_left if grads.hidden is None else write_rows(head, grads.hidden, start, stop, dz, alpha)
    add_weight_gradients(head, (grads.weight, grads.up), grads.bias, dz, hidden, alpha, first=first)
    finish()


def two_phase(head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, wanted: Wanted, gradient: bool) -> Outcome:
    """Statistics of all chunks, then one call of ``loss_fn``; the caller computes gradients from its coefficients."""
    buffer, parts = workspace(head, plan.chunk_rows, len(head.weight)), []
    for start, stop in plan.chunks:
        parts.append(sweep(head, start, stop, project(head, hidden_rows(head, start, stop), buffer), wanted.entropy))
    stats, every = join(head, parts, wanted.entropy), None if units is None else (0, len(units.lengths))
    seen = token_stats(head, stats, wanted, 0, len(head.labels), units, every, gradient)
    loss, metrics, upstream = evaluate(loss_fn, seen, gradient)
    row = None if upstream is None else row_coefficients(head, stats, upstream)
    return loss.to(head.out_dtype), metrics, stats, row


def recompute(head: Head, plan: Plan, stats: Stats, row: Coefficients, inputs: Leaves, needs: Needs) -> Leaves:
    """The gradients from the coefficients; the logits are recomputed."""
    head, stats, row = needed(head, stats, row)
    return recomputed_gradients(head, plan, stats, row, inputs, needs, held=True)


def token_stats(
    head: Head,
    stats: Stats,
    wanted: Wanted,
    start: int,
    stop: int,
    units: Units | None,
    span: tuple[int, int] | None,
    gradient: bool,
) -> TokenStats:
    """What ``loss_fn`` sees of the scored rows ``start:stop``; with ``gradient`` leaves that require one."""
    device, sequences, cu_seqlens = head.hidden.device, None, None
    rows = torch.arange(start, stop, device=device) if head.rows is None else rows_of(head.rows, start, stop)
    if units is not None and span is not None:
        sequences, cu_seqlens = units.sequences(*span, device)
    logps, entropy, lse = reported(head, stats, wanted)
    logps = logps.detach().requires_grad_(gradient)
    entropy = None if entropy is None else entropy.detach().requires_grad_(gradient)
    lse = None if lse is None else lse.detach().requires_grad_(gradient)
    return TokenStats(logps, rows, entropy, stats.top1, sequences, cu_seqlens, lse=lse)


def all_rows(
    head: Head,
    stats: Stats,
    metrics: dict[str, Tensor],
    wanted: Wanted,
    units: Units | None,
    cu_seqlens: Tensor | None,
) -> TokenStats:
    """The statistics of the N rows, zero where a row is not scored."""
    device, (logps, entropy, lse) = head.hidden.device, reported(head, stats, wanted)
    entropy = None if entropy is None else scatter_rows(head, entropy, entropy.dtype)
    lse = None if lse is None else scatter_rows(head, lse, lse.dtype)
    sequences = None if units is None else torch.arange(len(units.cu_scored) - 1, device=device)
    offsets = None if cu_seqlens is None else on_device(cu_seqlens, device)
    rows = torch.arange(head.hidden.shape[0], device=device)
    top1 = scatter_rows(head, stats.top1, torch.bool)  # pyright: ignore  # it was asked for
    return TokenStats(scatter_rows(head, logps, logps.dtype), rows, entropy, top1, sequences, offsets, metrics, lse)


# --- autograd --------------------------------------------------------------------------------------------------------


class _Attach(torch.autograd.Function):
    """Connects a loss whose gradients are already computed to the autograd graph: the first backward returns them, a
    later one recomputes them. All tensors are saved through autograd, which frees them after the last backward."""

    @staticmethod
    def forward(ctx, hidden, weight, up, bias, made: tuple[Tensor, Leaves, Plan, Stats, Coefficients, Needs, Call]):
        loss, grads, plan, stats, row, needs, call = made
        ctx.save_for_backward(hidden, weight, up, bias, *call[len(grads) : TENSORS], *stats, *row)
        ctx.grads, ctx.settings = [grads], (plan, needs, call[TENSORS:])
        ctx.dtypes = []
        for x in (hidden, weight, up, bias):
            ctx.dtypes.append(None if x is None else x.dtype)
        return loss

    @staticmethod
    def backward(ctx, *upstream):
        saved = ctx.saved_tensors if torch.is_grad_enabled() or not ctx.grads else (None,) * len(ctx.dtypes)
        with torch.no_grad():
            made = ctx.grads.pop() if ctx.grads else recomputed(ctx.settings, saved)
            if upstream[0].device.type != "cpu" or upstream[0].item() != 1.0:  # free where reading it costs no sync
                made = [None if grad is None else grad.mul_(upstream[0]) for grad in made]
            made = [None if g is None else in_dtype(g, dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]
        if torch.is_grad_enabled():
            both = zip(made, saved, strict=False)
            made = [g if g is None or x is None else mark("linear_loss", g, x) for g, x in both]
        return *made, None


def recomputed(settings: tuple[Plan, Needs, tuple], saved: tuple[Any, ...]) -> Leaves:
    """The gradients, recomputed from what was saved for a second backward."""
    (plan, needs, options), tensors, rest = settings, saved[:TENSORS], saved[TENSORS:]
    split, call = len(Stats._fields), Call(*tensors, *options)
    stats, row = Stats(*rest[:split]), Coefficients(*rest[split:])
    return recompute(make_head("linear_loss", call), plan, stats, row, Leaves(*call[:4]), needs)


def composed(
    call: Call, trainable: bool, loss_fn: LossFn, cu_seqlens: Tensor | None, align: Align, wanted: Wanted
) -> tuple[Tensor, TokenStats]:
    """What ``torch.compile`` traces: a Python ``loss_fn`` cannot live inside a custom op, its log-probs can.

    The number of scored rows is data, which a graph cannot depend on: every row must be scored.
    """
    labels, sequences = call.labels, None
    torch.ops.aten._assert_async.msg(
        (labels != IGNORE_INDEX).all(), "linear_loss under torch.compile: select the scored rows first"
    )
    logps, entropy, lse, top1 = row_stats(call, wanted, trainable)
    if align != "token" and cu_seqlens is not None:
        sequences = torch.arange(len(cu_seqlens) - 1, device=labels.device)
    offsets = None if cu_seqlens is None else cu_seqlens.to(labels.device).long()
    rows = torch.arange(len(labels), device=labels.device)
    stats = TokenStats(logps, rows, entropy, top1, sequences, offsets, lse=lse)
    loss, metrics = checked(loss_fn(stats))
    given = {name: getattr(stats, name) for name in DIFFERENTIABLE}
    detached = {name: x.detach() for name, x in given.items() if x is not None}
    return loss, replace(stats, metrics=metrics, **detached)
