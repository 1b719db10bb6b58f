"""Divergence of a policy from a reference straight from both hidden states: no ``[N, V]`` tensor outlives a chunk.

Chunks of rows, two GEMMs into two reused workspaces, one sweep over both. With a frozen head the forward keeps
``U_i = d value_i / d hidden_i`` and backward is one scale per row. Else it keeps five numbers per row, and backward
recomputes both logits, slab by slab of the vocabulary, so that a slab of the weight's gradient is finished in fp32
before the next begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.checks import check_device, check_linear, check_memory, split_temperature, stats_dtype
from fastalign.ops.divergence import Kind, check_choice, check_rows
from fastalign.ops.divergence import reference as logits_reference
from fastalign.ops.final import no_double_backward
from fastalign.ops.head.dtensor import vocabulary_slices, whole
from fastalign.ops.head.head import Leaves, Needs, held_in, scatter_rows
from fastalign.ops.head.options import facts, gemm_dtype
from fastalign.ops.head.streams import Call, forward, make_streams, plan_for, recomputed_gradients
from fastalign.ops.linear_logps import scale_directions_op
from fastalign.ops.parallel import agree, checked_together
from fastalign.ops.rows import Coefficients
from fastalign.types import IGNORE_INDEX


def reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The specification: both logits of the scored rows in full, then the reference of ``divergence``."""
    linear = torch.nn.functional.linear
    everywhere = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device) if labels is None else labels
    scored = (everywhere != IGNORE_INDEX).nonzero().squeeze(1)
    tau = options.get("temperature", 1.0)
    options["temperature"] = tau[scored] if isinstance(tau, Tensor) else tau
    streams = linear(hidden[scored], weight, bias), linear(ref_hidden[scored], ref_weight, ref_bias).detach()
    value = logits_reference(*streams, **options)
    return value.new_zeros(len(hidden)).index_put((scored,), value)


# --- custom op -------------------------------------------------------------------------------------------------------

SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, "
    "Tensor? labels, Tensor? temperatures, float temperature, str kind, float mix, float? softcap, float? ref_softcap, "
    "float logit_scale, float ref_logit_scale, ScalarType dtype, ScalarType ref_dtype, int? memory, str? backend, "
    "str? group, int[]? shards"
)
"""The arguments that both ops begin with: the fields of ``streams.Call``."""


@torch.library.custom_op(
    "fastalign::linear_divergence",
    mutates_args=(),
    schema=f"({SCHEMA}, bool tokens, bool gradient, bool trainable) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """value ``[N]``, logps ``[N]``, the reference's and entropy ``[N, 2]``, stats ``[N, 5]``, and U ``[N, D]``.

    U has no rows when it is not needed, and so have logps and what follows.
    """
    *args, tokens, gradient, trainable = args
    call = Call(*args)
    streams = make_streams(call)
    plan = plan_for(streams, call.memory, "upstream" if gradient else "none", trainable or tokens)
    rows, width = len(call.hidden) if plan.mode == "frozen" else 0, call.hidden.shape[1]
    directions = call.hidden.new_zeros(rows, width, dtype=held_in(call.hidden.dtype))
    head, out = streams.policy, stats_dtype(call.hidden, call.weight, call.ref_hidden, call.ref_weight)
    new = {"dtype": streams.dtype, "device": head.hidden.device}
    found = (torch.empty(len(head.labels), **new), torch.empty(2, len(head.labels), **new)) if tokens else None
    value, stats = forward(streams, plan, directions, found)
    logps, others = value.new_empty(0, dtype=out), value.new_empty(0, 2, dtype=out)
    if found is not None:
        logps, others = scatter_rows(head, found[0], out), scatter_rows(head, found[1].t().contiguous(), out)
    kept = scatter_rows(head, stats.t(), stats.dtype).contiguous()
    return scatter_rows(head, value, out), logps, others, kept, directions


@_op.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, *rest):
    call = Call(hidden, weight, bias, ref_hidden, ref_weight, *rest[:-3])
    tokens, gradient, trainable = rest[-3:]
    wide = torch.float64 if torch.float64 in (call.dtype, call.ref_dtype) else torch.float32
    value = hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden, weight, ref_hidden, ref_weight))
    kept = hidden.shape[0] if gradient and not trainable and not tokens else 0
    directions = hidden.new_empty(kept, hidden.shape[1], dtype=held_in(hidden.dtype))
    seen = hidden.shape[0] if tokens else 0
    rest = value.new_empty(seen, 2), hidden.new_empty(hidden.shape[0], 5, dtype=wide), directions
    return value, value.new_empty(seen), *rest


@torch.library.custom_op(
    "fastalign::linear_divergence_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor stats, Tensor grad, Tensor? grad_logps, bool needs_hidden, bool needs_weight, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(*args) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; ``[0]`` for those that are not needed."""
    *args, stats, grad, g, needs_hidden, needs_weight, needs_bias = args
    call = Call(*args)
    streams = make_streams(call)
    rows, plan = streams.policy.rows, plan_for(streams, call.memory, "upstream", True)
    if rows is not None:
        stats, grad, g = stats[rows], grad[rows], None if g is None else g[rows]
    grad, row = grad.to(stats.dtype).contiguous(), None if g is None else Coefficients(g.to(stats.dtype).contiguous())
    inputs = Leaves(call.hidden, call.weight, None, call.bias)
    needs = Needs(needs_hidden, needs_weight, False, needs_bias)
    made = recomputed_gradients(streams, plan, stats.t().contiguous(), grad, row, inputs, needs)
    hidden, weight, bias = (call.hidden.new_empty(0) if x is None else x for x in (made.hidden, made.weight, made.bias))
    return hidden, weight, bias


@_backward_op.register_fake
def _(hidden, weight, bias, *rest):
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        bias.new_empty(bias.shape) if needs_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    *inputs, tokens, gradient, trainable = inputs
    _, logps, others, stats, directions = output
    ctx.mark_non_differentiable(others, stats, directions, *(() if tokens else (logps,)))
    ctx.set_materialize_grads(False)
    ctx.frozen, ctx.options = gradient and not trainable and not tokens, inputs[8:]
    ctx.save_for_backward(*((inputs[0], inputs[6], directions) if ctx.frozen else (*inputs[:8], stats)))


def _backward(ctx, grad, grad_logps, *_):
    arguments = len(Call._fields) + 3
    if grad is None and grad_logps is None:
        return (None,) * arguments
    if ctx.frozen:
        return scale_directions_op(*ctx.saved_tensors, grad), *(None,) * (arguments - 1)
    *tensors, stats = ctx.saved_tensors
    grad = torch.zeros_like(grad_logps) if grad is None else grad
    needs = ctx.needs_input_grad[:3]
    grads = _backward_op(*tensors, *ctx.options, stats, grad, grad_logps, *needs)
    return *(x if needed else None for x, needed in zip(grads, needs, strict=True)), *(None,) * (arguments - 3)


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(no_double_backward)


# --- public ----------------------------------------------------------------------------------------------------------


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    labels: Tensor | None = None,
    kind: Kind = "forward_kl",
    mix: float = 0.5,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    memory: int | None = None,
    backend: str | None = None,
    tokens: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Divergence per row of a policy from a reference, straight from hidden states; ``divergence`` has the formulas.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``, and the reference's likewise.

    Args:
        hidden, weight, bias: ``[N, D]``, ``[V, D]`` and ``[V]`` of the policy; each gets a gradient of its own dtype.
        ref_hidden, ref_weight, ref_bias: ``[N, Dr]``, ``[V, Dr]`` and ``[V]`` of the reference; they get no gradient.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored: value and gradients are exactly 0 and
            neither hidden state is read. None: every row is scored.
        kind, mix, temperature: as in ``divergence``.
        softcap, ref_softcap, logit_scale, ref_logit_scale: of each stream.
        process_group: the ranks that share the vocabulary: both weights and biases are then this rank's columns, in
            rank order, with the same bounds in both; shards may be uneven, padded (a bias of -inf) or empty. Hidden
            states, labels (global) and options are the same on every rank, and so are the bits of the result; the
            gradient of ``hidden`` is complete on every rank. DTensors are taken as in ``linear_logps``.
        memory: bound on the workspace in bytes: both streams' logits and temporaries, not outputs.
        backend: "torch", "cpp", "triton" or None for the best one here.
        tokens: also return what ``linear_logps`` would of both models, from the same logits; needs ``labels``.

    Returns:
        ``[N]`` in fp32 (fp64 if an input is fp64). With ``tokens`` four of them: the divergence, the label's log-prob
        under the policy, which has a gradient too, and without one the label's under the reference and the policy's
        entropy.

    Raises:
        ValueError: wrong rank, shape, dtype or device; unknown kind; mix 0 or 1; a CPU label outside ``[0, V)``.
        RuntimeError: double backward.

    >>> linear_divergence(torch.ones(1, 2), torch.zeros(4, 2), torch.ones(1, 1), torch.eye(4)[:, :1])
    tensor([0.1180])
    """
    local = {"hidden": hidden, "ref_hidden": ref_hidden, "labels": labels, "temperature": temperature}
    hidden, ref_hidden, labels, temperature = (whole(name, x) for name, x in local.items())
    slices = {"weight": weight, "ref_weight": ref_weight, "bias": bias, "ref_bias": ref_bias}
    (weight, ref_weight, bias, ref_bias), process_group = vocabulary_slices(slices, process_group)  # pyright: ignore
    with checked_together(process_group, hidden):
        _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels)
        check_choice(kind, mix)
        if tokens and labels is None:
            raise ValueError("tokens=True returns log-probs of labels: pass labels [N]")
        check_rows(hidden, "hidden", labels, temperature, softcap, ref_softcap)
        check_memory(memory)
        same = facts("linear_divergence", hidden, weight, None, process_group, memory, backend)
    number, rows = split_temperature(temperature, hidden, stats_dtype(hidden, weight, ref_hidden, ref_weight))
    enabled = torch.is_grad_enabled()
    trainable = enabled and (weight.requires_grad or (bias is not None and bias.requires_grad))
    dtypes = gemm_dtype(hidden, weight), gemm_dtype(ref_hidden, ref_weight)
    biases = {"bias": bias, "ref_bias": ref_bias}
    same |= {name: "None" if x is None else x.dtype for name, x in biases.items()}
    same |= {"number of columns of ref_weight (Dr)": ref_weight.shape[1], "dtype of the reference": dtypes[1]}
    same |= {"labels": "None" if labels is None else "given", "kind": kind, "mix": mix, "temperature": temperature}
    same |= {"softcap": softcap, "ref_softcap": ref_softcap, "memory": memory, "backend": backend, "tokens": tokens}
    same |= {"logit_scale": logit_scale, "ref_logit_scale": ref_logit_scale}
    group, shards, trainable = agree(process_group, hidden, weight.shape[0], same, trainable, labels)
    ref = (ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
    scaling = (softcap, ref_softcap, float(logit_scale), float(ref_logit_scale))
    options = (labels, rows, number, kind, float(mix), *scaling, *dtypes, memory, backend, group, shards)
    gradient = enabled and (trainable or hidden.requires_grad)
    value, logps, others, *_ = _op(hidden, weight, bias, *ref, *options, tokens, gradient, trainable)
    return (value, logps, *others.unbind(1)) if tokens else value


def _check(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels) -> None:
    """Both heads fit their hidden states and each other."""
    per_row = hidden.new_empty(hidden.shape[0], dtype=torch.int64) if labels is None else labels
    check_linear(hidden, weight, bias, per_row)
    if ref_hidden.dim() != 2 or ref_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"ref_hidden must be [N, Dr] with N = {hidden.shape[0]} rows of hidden, got shape {list(ref_hidden.shape)}"
        )
    check_device("ref_hidden", ref_hidden, "hidden", hidden)
    try:
        check_linear(ref_hidden, ref_weight, ref_bias, per_row)
    except ValueError as error:
        raise ValueError(f"of the reference: {error}") from None
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight must have the V = {weight.shape[0]} rows of weight, got {ref_weight.shape[0]}: "
            "both models need one vocabulary"
        )
