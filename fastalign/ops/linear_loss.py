"""Any loss of token log-probs, from hidden states to gradients in one pass.

    for each chunk I of scored rows:
        Z     = hidden[I] @ weight.T + bias          in a reused workspace
        stats = sweep(Z)                             logps, entropy
        g, e  = d loss_fn(stats) / d stats           a tiny autograd graph: one coefficient per row
        dZ    = g (1[v=y] - p) - e p (ln p + H)      in place of Z
        d hidden[I] = dZ @ weight;   d weight += dZ.T @ hidden[I]      in fp32

Backward hands these gradients over, times its upstream scalar.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops._gradients import Gradients, finish, needed, recomputed_gradients
from fastalign.ops._head import Head, Needs, Options, make_head, spread
from fastalign.ops._loss_fn import LossFn, checked
from fastalign.ops._passes import Outcome, is_top1, one_pass, two_phase
from fastalign.ops._units import Align, Units, make_units
from fastalign.ops.linear_logps import op_arguments, plan_for, row_stats
from fastalign.ops.plan import Plan
from fastalign.ops.vocab_parallel import make_shard
from fastalign.types import IGNORE_INDEX, TokenStats

Inputs = tuple[Tensor, Tensor, "Tensor | None"]


# --- autograd --------------------------------------------------------------------------------------------------------


class _Attach(torch.autograd.Function):
    """Puts a loss whose gradients exist already into the graph: the first backward hands them over, a later one asks
    ``again`` for them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, grads: list[Gradients], again):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.grads, ctx.again = grads, again
        return loss.clone()

    @staticmethod
    def backward(ctx, *upstream):
        inputs = ctx.saved_tensors if torch.is_grad_enabled() or not ctx.grads else (None,) * 3
        with torch.no_grad():
            grads = ctx.grads.pop() if ctx.grads else ctx.again(*inputs)
            made = (grads.hidden, grads.weight, grads.bias)
            _scale(made, upstream[0])
        del grads
        if torch.is_grad_enabled():
            made = (None if g is None else _Final.apply(g, x) for g, x in zip(made, inputs, strict=True))
        return *made, None, None, None


class _Final(torch.autograd.Function):
    """Marks a gradient made under ``create_graph``: differentiating it again must raise, not give zero."""

    @staticmethod
    def forward(ctx, grad, source):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("linear_loss does not support double backward: its gradients are final")


def _scale(grads: tuple[Tensor | None, ...], upstream: Tensor) -> None:
    """Times the upstream scalar, in place; for nothing when that is 1 and reading it costs no sync."""
    if upstream.device.type != "cpu" or upstream.item() != 1.0:
        for grad in grads:
            if grad is not None:
                grad.mul_(upstream)


def _new_gradients(head: Head, plan: Plan, inputs: Inputs, needs: Needs) -> Gradients:
    """Buffers of a one-pass call: rows that need no gradient stay 0, weight and bias are summed in fp32."""
    hidden, weight, _ = inputs
    wide = torch.float64 if weight.dtype == torch.float64 and head.options.dtype == torch.float64 else torch.float32
    single = len(plan.chunks) == 1 and weight.dtype == head.options.dtype
    new = torch.empty if plan.chunks else torch.zeros
    device = hidden.device
    return Gradients(
        torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if needs[0] else None,
        new(weight.shape, dtype=weight.dtype if single else wide, device=device) if needs[1] else None,
        torch.zeros(weight.shape[0], dtype=wide, device=device) if needs[2] else None,
    )


def _cast(grads: Gradients, inputs: Inputs) -> Gradients:
    """Each gradient in its input's dtype."""
    made = (grads.hidden, grads.weight, grads.bias)
    return Gradients(*(None if g is None or x is None else g.to(x.dtype) for g, x in zip(made, inputs, strict=True)))


def _run(head: Head, plan: Plan, units: Units | None, loss_fn: LossFn, entropy: bool, inputs: Inputs, needs: Needs):
    """The planned pass: its outcome and (None when nothing needs them) its gradients."""
    gradient = any(needs)
    if plan.mode == "slabs":
        outcome = two_phase(head, plan, units, loss_fn, entropy, gradient)
        return outcome, _made_again(head, plan, outcome, inputs, needs) if gradient else None
    grads = _new_gradients(head, plan, inputs, needs) if gradient else None
    outcome = one_pass(head, plan, units, loss_fn, entropy, grads)
    return outcome, None if grads is None else _cast(grads, inputs)


def _made_again(head: Head, plan: Plan, outcome: Outcome, inputs: Inputs, needs: Needs) -> Gradients:
    """The gradients from the saved coefficients, through recomputed logits."""
    assert outcome.g is not None
    head, stats, g, e = needed(head, outcome.stats, outcome.g, outcome.e)
    made = recomputed_gradients(head, plan, stats, g, e, needs)
    dense = finish(head, made, *inputs)
    return Gradients(*(grad if needed else None for grad, needed in zip(dense, needs, strict=True)))


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
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    memory: int | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, TokenStats]:
    """``loss_fn`` of token log-probs, with the gradients of ``hidden``, ``weight`` and ``bias`` made in the same pass.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature;  logps = z_y - lse(z)``; three GEMMs per row
    (two when the head is frozen, one under ``no_grad``, which runs the same chunks and still evaluates ``loss_fn``).

    Args:
        hidden: ``[N, D]``; a row labelled -100 is never read.
        weight: ``[V, D]``.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored.
        loss_fn: gets a ``TokenStats`` of scored rows and returns the chunk's share of the loss, a scalar sum whose
            normalisers are fixed beforehand, or (scalar, dict of metric sums). It runs once per chunk, possibly never,
            and may index its own detached tensors by ``stats.rows`` and ``stats.sequences``.
        cu_seqlens: ``[B+1]`` offsets of the sequences in the N rows; needed unless ``align="token"``.
        cu_groups: ``[G+1]`` offsets of the groups in the B sequences, for ``align="group"``.
        align: what a chunk never splits. "pair": sequences 2p (chosen) and 2p+1 (rejected). Aligned stats carry
            ``sequences`` and ``cu_seqlens``; each sequence comes exactly once, empty ones included.
        entropy: give ``loss_fn`` the entropy too; its gradient flows.
        bias, temperature, softcap, logit_scale, process_group, memory, backend, batch_invariant: see ``linear_logps``.

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
    args, trainable = op_arguments(
        hidden, weight, labels, bias, temperature, softcap, logit_scale, process_group, memory, backend, batch_invariant
    )
    if torch.compiler.is_compiling():
        return _composed(args, trainable, loss_fn, cu_seqlens, align, entropy)
    shard = make_shard(*args[12:])
    options = Options(temperature, softcap, float(logit_scale), args[8], memory, backend, batch_invariant, shard)
    kernels = dispatch.kernels("linear_loss", backend, hidden.device)
    head = make_head(hidden, weight, bias, labels, options, kernels)
    units = make_units(labels, cu_seqlens, cu_groups, align)
    inputs, needs = (hidden, weight, bias), _needs(hidden, weight, bias)
    plan = plan_for(
        head,
        weight,
        "token" if units is None else "unit",
        trainable=needs[1] or needs[2],
        entropy=entropy,
        units=None if units is None else units.lengths,
    )
    outcome, grads = _run(head, plan, units, loss_fn, entropy, inputs, needs)
    stats = _all_rows(head, outcome, units, cu_seqlens)
    if grads is None:
        return outcome.loss, stats

    def again(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
        head = make_head(hidden, weight, bias, labels, options, kernels)
        return _made_again(head, plan, outcome, (hidden, weight, bias), needs)

    loss: Any = _Attach.apply(hidden, weight, bias, outcome.loss, [grads], again)
    return loss, stats


def _needs(*inputs: Tensor | None) -> Needs:
    """Which of hidden, weight and bias get a gradient; independent of it, the chunks are the same."""
    hidden, weight, bias = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    return hidden, weight, bias


def _all_rows(head: Head, outcome: Outcome, units: Units | None, cu_seqlens: Tensor | None) -> TokenStats:
    """The statistics of the N rows, zero where a row is not scored."""
    stats, device = outcome.stats, head.hidden.device
    sequences = None if units is None else torch.arange(len(units.cu_scored) - 1, device=device)
    return TokenStats(
        spread(head, stats.logps, head.out_dtype),
        torch.arange(head.hidden.shape[0], device=device),
        None if stats.entropy is None else spread(head, stats.entropy, head.out_dtype),
        spread(head, is_top1(stats), torch.bool),
        sequences,
        None if cu_seqlens is None else cu_seqlens.long(),
        outcome.metrics,
    )


def _composed(
    args: tuple, trainable: bool, loss_fn: LossFn, cu_seqlens: Tensor | None, align: Align, entropy: bool
) -> tuple[Tensor, TokenStats]:
    """What ``torch.compile`` traces: a Python ``loss_fn`` cannot live inside a custom op, its log-probs can.

    The number of scored rows is data, which a graph cannot depend on: every row must be scored.
    """
    labels = args[3]
    torch.ops.aten._assert_async.msg(
        (labels != IGNORE_INDEX).all(), "linear_loss under torch.compile: select the scored rows first"
    )
    logps, entropies, top1 = row_stats(args, entropy, trainable)
    sequences = None
    if align != "token" and cu_seqlens is not None:
        sequences = torch.arange(len(cu_seqlens) - 1, device=labels.device)
    offsets = None if cu_seqlens is None else cu_seqlens.long()
    stats = TokenStats(logps, torch.arange(len(labels), device=labels.device), entropies, top1, sequences, offsets)
    loss, metrics = checked(loss_fn(stats))
    detached = replace(stats, logps=logps.detach(), metrics=metrics)
    return loss, detached if entropies is None else replace(detached, entropy=entropies.detach())
