"""Any loss of token log-probs, from hidden states to gradients in one pass.

    for each chunk I of scored rows:
        Z     = hidden[I] @ weight.T + bias          in a reused workspace
        stats = sweep(Z)                             logps, entropy, lse
        g, e, zeta = d loss_fn(stats) / d stats      a tiny autograd graph: a few coefficients per row
        dZ    = g (1[v=y] - p) - e p (ln p + H) + zeta p      in place of Z
        d hidden[I] = dZ @ weight;   d weight += dZ.T @ hidden[I]      in fp32

Backward hands these gradients over, times its upstream scalar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.checks import Lora
from fastalign.ops.final import mark
from fastalign.ops.half import held_in
from fastalign.ops.head.backward import needed, recomputed_gradients
from fastalign.ops.head.head import Head, Leaves, Needs, Stats, Wanted, kernel_dtype, reported, spread
from fastalign.ops.head.loss_fn import DIFFERENTIABLE, LossFn, checked
from fastalign.ops.head.options import TENSORS, Call, head_of, make_call
from fastalign.ops.head.passes import Outcome, one_pass, two_phase
from fastalign.ops.head.plan import Plan
from fastalign.ops.head.units import Align, Units, make_units
from fastalign.ops.linear_logps import plan_for, row_stats, trained_columns
from fastalign.ops.rows import Coefficients
from fastalign.ops.transfer import on_device
from fastalign.types import IGNORE_INDEX, TokenStats

# --- autograd --------------------------------------------------------------------------------------------------------


class _Attach(torch.autograd.Function):
    """Puts a loss whose gradients exist already into the graph: the first backward hands them over, a later one makes
    them again. All tensors are saved through autograd, which lets go of them behind a backward that is the last."""

    @staticmethod
    def forward(ctx, loss, grads: Leaves, plan: Plan, outcome: Outcome, needs: Needs, *call):
        assert outcome.row is not None
        ctx.save_for_backward(*call[:TENSORS], *vars(outcome.stats).values(), *outcome.row)
        ctx.grads, ctx.settings = [grads], (plan, needs, call[TENSORS:])
        ctx.dtypes = [None if x is None else x.dtype for x in call[: len(grads)]]
        return loss.clone()

    @staticmethod
    def backward(ctx, *upstream):
        saved = ctx.saved_tensors if torch.is_grad_enabled() or not ctx.grads else (None,) * len(ctx.dtypes)
        with torch.no_grad():
            made = ctx.grads.pop() if ctx.grads else _again(ctx.settings, saved)
            _scale(made, upstream[0])
            made = [None if g is None else g.to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True)]
        if torch.is_grad_enabled():
            both = zip(made, saved, strict=False)
            made = (g if g is None or x is None else mark("linear_loss", g, x) for g, x in both)
        return *(None,) * 5, *made, *(None,) * (len(Call._fields) - len(ctx.dtypes))


def _again(settings: tuple[Plan, Needs, tuple], saved: Sequence[Any]) -> Leaves:
    """The gradients a second time, from what was saved."""
    plan, needs, options = settings
    call, rest = Call(*saved[:TENSORS], *options), saved[TENSORS:]
    stats, row = Stats(*rest[: len(fields(Stats))]), Coefficients(*rest[len(fields(Stats)) :])
    return _recomputed(head_of("linear_loss", call), plan, stats, row, Leaves(*call[:4]), needs)


def _scale(grads: Leaves, upstream: Tensor) -> None:
    """Times the upstream scalar, in place; for nothing when that is 1 and reading it costs no sync."""
    if upstream.device.type != "cpu" or upstream.item() != 1.0:
        for grad in grads:
            if grad is not None:
                grad.mul_(upstream)


def _new_gradients(head: Head, plan: Plan, inputs: Leaves, needs: Needs) -> Leaves:
    """Buffers of a one-pass call: rows that need no gradient stay 0, weight, adapter and bias are summed in fp32."""
    wide, single = kernel_dtype(head.options.dtype), len(plan.chunks) == 1 and head.options.dtype != torch.float16
    new = torch.empty if plan.chunks else torch.zeros

    def total(like: Tensor | None, need: bool) -> Tensor | None:
        if like is None or not need:
            return None
        dtype = like.dtype if single and like.dtype == head.options.dtype else wide
        return new(like.shape, dtype=dtype, device=like.device)

    hidden, dtype = None, held_in(head.hidden.dtype)
    if needs.hidden:
        hidden = torch.zeros_like(head.hidden, dtype=dtype, memory_format=torch.contiguous_format)
    bias = torch.zeros(len(head.weight), dtype=wide, device=head.hidden.device) if needs.bias else None
    return Leaves(hidden, total(inputs.weight, needs.weight), total(inputs.up, needs.up), bias)


def _cast(grads: Leaves, inputs: Leaves) -> Leaves:
    """Each gradient in its input's dtype; that of an fp16 input waits for its upstream in fp32."""
    both = zip(grads, inputs, strict=True)
    return Leaves(*(None if g is None or x is None else g.to(held_in(x.dtype)) for g, x in both))


def _run(head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, wanted: Wanted, inputs: Leaves, needs: Needs):
    """The planned pass: its outcome and (None when nothing needs them) its gradients."""
    gradient = any(needs)
    if plan.mode == "slabs":
        outcome = two_phase(head, plan, units, loss_fn, wanted, gradient)
        if outcome.row is None:
            return outcome, None
        return outcome, _recomputed(head, plan, outcome.stats, outcome.row, inputs, needs)
    grads = _new_gradients(head, plan, inputs, needs) if gradient else None
    outcome = one_pass(head, plan, units, loss_fn, wanted, grads)
    return outcome, None if grads is None else _cast(grads, inputs)


def _recomputed(head: Head, plan: Plan, stats: Stats, row: Coefficients, inputs: Leaves, needs: Needs) -> Leaves:
    """The gradients from the saved coefficients, through recomputed logits."""
    head, stats, row = needed(head, stats, row)
    return recomputed_gradients(head, plan, stats, row, inputs, needs, held=True)


# --- public ----------------------------------------------------------------------------------------------------------


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
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    memory: int | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
    num_scored: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """``loss_fn`` of token log-probs, with the gradients of ``hidden``, ``weight`` and ``bias`` made in the same pass.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature;  logps = z_y - lse(z)``; three GEMMs per row
    (two when the weight is frozen, one under ``no_grad``, which runs the same chunks and still evaluates ``loss_fn``).
    Gradients of fp16 inputs wait in fp32 for what comes upstream, so that a loss scaler finds them whole.

    Args:
        hidden: ``[N, D]``; a row labelled -100 is never read.
        weight: ``[V, D]``.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored.
        loss_fn: gets a ``TokenStats`` of scored rows and returns the chunk's share of the loss, a scalar sum whose
            normalisers are fixed beforehand, or (scalar, dict of metric sums). It runs once per chunk, possibly never,
            and may index its own detached tensors by ``stats.rows`` and ``stats.sequences``.
        cu_seqlens: ``[B+1]`` offsets of the sequences in the N rows; needed unless ``align="token"``. The host reads
            them: next to CUDA tensors keep them on the CPU.
        cu_groups: ``[G+1]`` offsets of the groups in the B sequences, for ``align="group"``.
        align: what a chunk never splits. "pair": sequences 2p (chosen) and 2p+1 (rejected). Aligned stats carry
            ``sequences`` and ``cu_seqlens``; each sequence comes exactly once, empty ones included.
        entropy, lse: give ``loss_fn`` these too; their gradients flow.
        bias, lora, temperature, softcap, logit_scale, label_smoothing, process_group, memory, backend,
            batch_invariant: see ``linear_logps``.
        num_scored: see ``linear_logps``; an aligned call needs N, the rows selected already, to spare the host's wait.

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
    call, trainable = make_call(
        "linear_loss",
        hidden,
        weight,
        labels,
        more,
        bias=bias,
        lora=lora,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        process_group=process_group,
        memory=memory,
        backend=backend,
        batch_invariant=batch_invariant,
        num_scored=num_scored,
    )
    wanted = Wanted(entropy, lse)
    if torch.compiler.is_compiling():
        return _composed(call, trainable, loss_fn, cu_seqlens, align, wanted)
    head, units = head_of("linear_loss", call), make_units(call.labels, cu_seqlens, cu_groups, align, num_scored)
    inputs = Leaves(*call[:4])
    needs, lengths = _needs(inputs), None if units is None else units.lengths
    trained, coefficients = trained_columns(inputs, needs), "token" if units is None else "unit"
    plan = plan_for(head, coefficients, trained=trained, wanted=wanted, units=lengths)
    outcome, grads = _run(head, plan, units, loss_fn, wanted, inputs, needs)
    stats = _all_rows(head, outcome, wanted, units, cu_seqlens)
    if grads is None:
        return outcome.loss, stats

    loss: Any = _Attach.apply(outcome.loss, grads, plan, outcome, needs, *call)
    return loss, stats


def _needs(inputs: Leaves) -> Needs:
    """Which inputs get a gradient; independent of it, the chunks are the same."""
    return Needs(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs))


def _all_rows(
    head: Head, outcome: Outcome, wanted: Wanted, units: Units | None, cu_seqlens: Tensor | None
) -> TokenStats:
    """The statistics of the N rows, zero where a row is not scored."""
    stats, device = outcome.stats, head.hidden.device
    seen = (None if x is None else spread(head, x, head.out_dtype) for x in reported(head, stats, wanted))
    logps, entropy, lse = seen
    assert logps is not None
    sequences = None if units is None else torch.arange(len(units.cu_scored) - 1, device=device)
    return TokenStats(
        logps,
        torch.arange(head.hidden.shape[0], device=device),
        entropy,
        spread(head, stats.is_top1, torch.bool),
        sequences,
        None if cu_seqlens is None else on_device(cu_seqlens, device),
        outcome.metrics,
        lse,
    )


def _composed(
    call: Call, trainable: bool, loss_fn: LossFn, cu_seqlens: Tensor | None, align: Align, wanted: Wanted
) -> tuple[Tensor, TokenStats]:
    """What ``torch.compile`` traces: a Python ``loss_fn`` cannot live inside a custom op, its log-probs can.

    The number of scored rows is data, which a graph cannot depend on: every row must be scored.
    """
    labels = call.labels
    torch.ops.aten._assert_async.msg(
        (labels != IGNORE_INDEX).all(), "linear_loss under torch.compile: select the scored rows first"
    )
    logps, entropy, lse, top1 = row_stats(call, wanted, trainable)
    sequences = None
    if align != "token" and cu_seqlens is not None:
        sequences = torch.arange(len(cu_seqlens) - 1, device=labels.device)
    offsets = None if cu_seqlens is None else cu_seqlens.to(labels.device).long()
    rows = torch.arange(len(labels), device=labels.device)
    stats = TokenStats(logps, rows, entropy, top1, sequences, offsets, lse=lse)
    loss, metrics = checked(loss_fn(stats))
    given = {name: getattr(stats, name) for name in DIFFERENTIABLE}
    detached = {name: x.detach() for name, x in given.items() if x is not None}
    return loss, replace(stats, metrics=metrics, **detached)
