"""Log-prob of the label, and entropy, straight from hidden states: no ``[N, V]`` tensor outlives a chunk.

    z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature,    logps = z_y - lse(z)

Without gradients: one GEMM. With a frozen head the forward keeps ``U_i = d logps_i / d hidden_i`` and backward is one
scale per row. Else the forward keeps three numbers per row, and backward makes the logits again, slab by slab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops._checks import check_linear, check_memory, check_scaling
from fastalign.ops._gradients import finish, needed, recomputed_gradients, write_rows
from fastalign.ops._head import (
    Head,
    Options,
    Stats,
    differentiate,
    gemm_dtype,
    hidden_rows,
    join,
    kernel_dtype,
    make_head,
    planned_columns,
    project,
    scratch_bytes,
    spread,
    sweep,
    workspace,
)
from fastalign.ops.plan import Coefficients, Plan, make_plan
from fastalign.ops.token_logps import reference as token_reference
from fastalign.ops.token_logps import split_temperature, stats_dtype
from fastalign.ops.vocab_parallel import exchange, make_shard
from fastalign.types import IGNORE_INDEX


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The specification: the logits of the scored rows in full, then the reference of ``token_logps``."""
    logits = torch.nn.functional.linear(hidden[labels != IGNORE_INDEX], weight, bias)
    everywhere = logits.new_zeros(len(labels), weight.shape[0])
    everywhere = everywhere.index_put(((labels != IGNORE_INDEX).nonzero().squeeze(1),), logits)
    return token_reference(
        everywhere, labels, temperature=temperature, softcap=softcap, logit_scale=logit_scale, entropy=entropy
    )


def plan_for(
    head: Head, weight: Tensor, coefficients: Coefficients, *, trainable: bool, entropy: bool, units=None
) -> Plan:
    """The plan of a call on this head."""
    device, options = head.hidden.device, head.options
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return make_plan(
        len(head.labels),
        planned_columns(weight, options),
        weight.shape[1],
        itemsize=options.dtype.itemsize,
        coefficients=coefficients,
        units=units,
        head_gradient=trainable,
        entropy=entropy,
        memory=options.memory,
        device=device.type,
        total_memory=total,
        scratch=scratch_bytes(head.hidden, weight, options, head.sweep),
        batch_invariant=options.batch_invariant,
    )


# --- custom op -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastalign::linear_logps", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
    memory: int | None,
    backend: str | None,
    batch_invariant: bool,
    group: str | None,
    shards: list[int] | None,
    entropy: bool,
    gradient: bool,
    trainable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy (``[0]`` when not asked for), max, logsum ``[N]``; U ``[N, D]`` (``[0, D]`` when not needed)."""
    tau = temperature if temperatures is None else temperatures
    shard = make_shard(group, shards)
    options = Options(tau, softcap, logit_scale, dtype, memory, backend, batch_invariant, shard)
    kernels = dispatch.kernels("linear_logps", backend, hidden.device)
    head = make_head(hidden, weight, bias, labels, options, kernels)
    plan = plan_for(head, weight, "upstream" if gradient else "none", trainable=trainable, entropy=entropy)
    directions = _new_directions(hidden, plan.mode == "frozen")
    stats = _forward(head, plan, directions, entropy)
    out = stats_dtype(hidden, weight)
    entropies = stats.logps.new_empty(0, dtype=out) if stats.entropy is None else spread(head, stats.entropy, out)
    maximum, logsum = (spread(head, x, x.dtype) for x in (stats.max, stats.logsum))
    return spread(head, stats.logps, out), entropies, maximum, logsum, directions


@_op.register_fake
def _(hidden, weight, bias, labels, temperatures, temperature, softcap, logit_scale, dtype, *flags):
    *_, entropy, gradient, trainable = flags
    row = hidden.new_empty(hidden.shape[0], dtype=stats_dtype(hidden, weight))
    saved = [hidden.new_empty(hidden.shape[0], dtype=kernel_dtype(dtype)) for _ in range(2)]
    entropies = torch.empty_like(row) if entropy else row.new_empty(0)
    return row, entropies, *saved, _new_directions(hidden, gradient and not trainable and not entropy)


def _new_directions(hidden: Tensor, wanted: bool) -> Tensor:
    rows = hidden.shape[0] if wanted else 0
    return torch.zeros(rows, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)


def _forward(head: Head, plan: Plan, directions: Tensor, entropy: bool) -> Stats:
    """Statistics of all scored rows; with a frozen head also each row's direction, while its logits are hot."""
    buffer, parts = workspace(head, plan.chunk_rows, head.weight.shape[0]), []
    for start, stop in plan.chunks:
        logits = project(head, hidden_rows(head, start, stop), buffer)
        stats = sweep(head, start, stop, logits, entropy)
        parts.append(stats)
        if plan.mode == "frozen":
            ones = torch.ones_like(stats.logps)
            dz = differentiate(head, start, stop, logits, head.labels[start:stop], stats, ones, None)
            write_rows(head, directions, start, stop, dz)()
    return join(head, parts, entropy)


@torch.library.custom_op("fastalign::scale_directions", mutates_args=())
def _scale_directions(hidden: Tensor, labels: Tensor, directions: Tensor, grad_logps: Tensor) -> Tensor:
    """``g_i U_i``; a row without a coefficient is selected out, whatever its direction holds.

    ``hidden`` is not read: through it autograd knows that the result must not be differentiated again.
    """
    skipped = ((labels == IGNORE_INDEX) | (grad_logps == 0))[:, None]
    return torch.where(skipped, 0.0, grad_logps[:, None] * directions).to(directions.dtype)


@_scale_directions.register_fake
def _(hidden, labels, directions, grad_logps):
    return torch.empty_like(directions)


@torch.library.custom_op("fastalign::linear_logps_backward", mutates_args=())
def _backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
    memory: int | None,
    backend: str | None,
    batch_invariant: bool,
    group: str | None,
    shards: list[int] | None,
    entropy: Tensor | None,
    maximum: Tensor,
    logsum: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; ``[0]`` for those that are not needed."""
    tau = temperature if temperatures is None else temperatures
    shard = make_shard(group, shards)
    options = Options(tau, softcap, logit_scale, dtype, memory, backend, batch_invariant, shard)
    kernels = dispatch.kernels("linear_logps", backend, hidden.device)
    head = make_head(hidden, weight, bias, labels, options, kernels)
    g, e = _scored(head, grad_logps), None if grad_entropy is None else _scored(head, grad_entropy)
    saved = None if entropy is None else _scored(head, entropy)
    stats = Stats(g, saved, _scored(head, maximum), _scored(head, logsum))
    head, stats, g, e = needed(head, stats, g, e)
    plan = plan_for(head, weight, "upstream", trainable=True, entropy=True)
    needs = (needs_hidden, needs_weight, needs_bias)
    return finish(head, recomputed_gradients(head, plan, stats, g, e, needs), hidden, weight, bias)


def _scored(head: Head, values: Tensor) -> Tensor:
    """``[N]`` to the scored rows, as the kernels read them."""
    picked = values if head.rows is None else values[head.rows]
    return picked.to(kernel_dtype(head.options.dtype)).contiguous()


@_backward_op.register_fake
def _(hidden, weight, bias, *rest):
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        bias.new_empty(bias.shape) if needs_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, temperatures, *options, entropy, gradient, trainable = inputs
    _, entropies, maximum, logsum, directions = output
    ctx.mark_non_differentiable(maximum, logsum, directions, *(() if entropy else (entropies,)))
    ctx.set_materialize_grads(False)
    ctx.options, ctx.frozen = options, gradient and not trainable and not entropy
    if ctx.frozen:
        ctx.save_for_backward(hidden, labels, directions)
    else:
        saved = entropies if entropy else None
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, saved, maximum, logsum)


def _backward(ctx, grad_logps: Any, grad_entropy: Any, *_):
    if grad_logps is None and grad_entropy is None:
        grads = None, None, None
    elif ctx.frozen:
        grads = _scale_directions(*ctx.saved_tensors, grad_logps), None, None
    else:
        grads = _recomputed(ctx, grad_logps, grad_entropy)
    return *grads, *(None,) * 14


def _recomputed(ctx, grad_logps, grad_entropy):
    hidden, weight, bias, labels, temperatures, entropy, maximum, logsum = ctx.saved_tensors
    g = torch.zeros_like(logsum) if grad_logps is None else grad_logps
    needs = ctx.needs_input_grad[:3]
    grads = _backward_op(
        hidden, weight, bias, labels, temperatures, *ctx.options, entropy, maximum, logsum, g, grad_entropy, *needs
    )
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _no_double_backward(ctx, *_):
    raise RuntimeError("fastalign ops do not support double backward: their gradients are final")


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_no_double_backward)
_scale_directions.register_autograd(_no_double_backward)


# --- public ----------------------------------------------------------------------------------------------------------


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    memory: int | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each row's label, and the row's entropy, composable with any autograd that follows.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``, ``logps = z_y - lse(z)``,
    ``entropy = -sum p ln p``.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``; with mixed dtypes GEMMs run in the narrower one, and each gradient has its input's dtype.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored: outputs and gradients are exactly 0 and its
            hidden state is never read.
        bias: ``[V]``.
        temperature: a positive number or ``[N]``; gets no gradient.
        softcap: ``cap * tanh(x / cap)`` between logit scale and temperature.
        entropy: also return the entropy in nats, differentiable.
        process_group: the ranks that share the vocabulary: ``weight`` and ``bias`` are then this rank's columns, in
            rank order, shards may be uneven or empty; hidden, labels (global) and options are the same on every rank.
            Outputs are the same bits everywhere, the gradient of ``hidden`` is complete on every rank.
        memory: bound on the workspace in bytes (chunk logits and temporaries, not outputs).
        backend: "torch", "cpp", "triton" or None for the best one here.
        batch_invariant: a row's outputs do not depend, in any bit, on the rows around it; slower GEMMs.

    Returns:
        logps ``[N]`` in fp32 (fp64 if an input is fp64), or (logps, entropy).

    Raises:
        ValueError: wrong rank, shape, dtype or device; a CPU label outside ``[0, V)`` (on CUDA that row becomes NaN).
        RuntimeError: double backward.

    >>> linear_logps(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
    tensor([-1.3863,  0.0000])
    """
    args, trainable = op_arguments(
        hidden, weight, labels, bias, temperature, softcap, logit_scale, process_group, memory, backend, batch_invariant
    )
    logps, entropies, _ = row_stats(args, entropy, trainable)
    return logps if entropies is None else (logps, entropies)


def row_stats(args: tuple, entropy: bool, trainable: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """logps, entropy if asked for, and whether the label has the largest logit, from ``op_arguments``."""
    gradient = torch.is_grad_enabled() and (trainable or args[0].requires_grad)
    logps, entropies, _, logsum, _ = _op(*args, entropy, gradient, trainable)
    return logps, entropies if entropy else None, logps.detach().to(logsum.dtype) + logsum == 0


def op_arguments(
    hidden, weight, labels, bias, temperature, softcap, logit_scale, process_group, memory, backend, batch_invariant
) -> tuple[tuple, bool]:
    """Checked arguments in the order of the custom op's schema, up to its flags; whether any rank trains the head."""
    check_linear(hidden, weight, bias, labels)
    check_scaling(temperature, softcap, labels)
    check_memory(memory)
    trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
    group, shards, trainable = exchange(process_group, weight, len(hidden), trainable)
    number, rows = split_temperature(temperature, stats_dtype(hidden, weight))
    dtype = gemm_dtype(hidden, weight)
    args = (
        *(hidden, weight, bias, labels, rows, number, softcap, float(logit_scale)),
        *(dtype, memory, backend, batch_invariant, group, shards),
    )
    return args, trainable
