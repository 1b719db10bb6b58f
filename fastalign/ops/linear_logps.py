"""Log-prob of the label, and entropy, straight from hidden states: no ``[N, V]`` tensor outlives a chunk.

    z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature,    logps = z_y - lse(z)

Without gradients: one GEMM. With a frozen head the forward keeps ``U_i = d logps_i / d hidden_i`` and backward is one
scale per row. Else the forward keeps three numbers per row, and backward recomputes the logits, slab by slab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.checks import Lora, stats_dtype
from fastalign.ops.final import final, no_double_backward
from fastalign.ops.head.backward import needed, recomputed_gradients, write_rows
from fastalign.ops.head.head import (
    Head,
    Leaves,
    Needs,
    Wanted,
    differentiate,
    held_in,
    hidden_rows,
    join,
    kernel_dtype,
    make_head,
    plan_for,
    project,
    reported,
    row_coefficients,
    rows_of,
    scaled,
    scatter_rows,
    sweep,
    trained_columns,
    workspace,
)
from fastalign.ops.head.options import SCHEMA, TENSORS, Call, make_call, with_options
from fastalign.ops.head.plan import Plan
from fastalign.ops.rows import Stats
from fastalign.ops.token_logps import reference as token_reference
from fastalign.types import IGNORE_INDEX


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    entropy: bool = False,
    lse: bool = False,
) -> Any:
    """The specification: the logits of the scored rows in full, then the reference of ``token_logps``."""
    linear, scored = torch.nn.functional.linear, labels != IGNORE_INDEX
    logits = linear(hidden[scored], weight, bias)
    if lora is not None:
        logits = logits + linear(linear(hidden[scored], lora[0]), lora[1]) * lora[2]
    everywhere = logits.new_zeros(len(labels), weight.shape[0]).index_put((scored.nonzero().squeeze(1),), logits)
    scaling = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    asked = {"label_smoothing": label_smoothing, "entropy": entropy, "lse": lse}
    return token_reference(everywhere, labels, **scaling, **asked)


# --- custom op -------------------------------------------------------------------------------------------------------


def compute(*args):
    """logps, entropy, lse (``[0]`` when not asked for), top1, max, logsum ``[N]``; U ``[N, D]`` or ``[0, D]``."""
    *given, entropy, lse, gradient, trainable = args
    call, wanted = Call(*given), Wanted(entropy, lse)
    head = make_head("linear_logps", call)
    trained = head.width if trainable else None
    plan = plan_for(head, "upstream" if gradient else "none", trained=trained, wanted=wanted)
    directions = _new_directions(call.hidden, plan.mode == "frozen")
    stats = _forward(head, plan, directions, entropy)
    none, out = stats.logps.new_empty, head.out_dtype
    seen = [none(0, dtype=out) if x is None else scatter_rows(head, x, out) for x in reported(head, stats, wanted)]
    kept: Any = stats.top1, stats.max, stats.logsum
    saved = [scatter_rows(head, x, x.dtype) for x in kept]
    return *seen, *saved, directions


_op = torch.library.custom_op(
    "fastalign::linear_logps",
    compute,
    mutates_args=(),
    schema=f"({SCHEMA}, bool entropy, bool lse, bool gradient, bool trainable) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(*args):
    *given, entropy, lse, gradient, trainable = args
    call = Call(*given)
    row = call.hidden.new_empty(call.hidden.shape[0], dtype=stats_dtype(call.hidden, call.weight))
    seen = [torch.empty_like(row) if asked else row.new_empty(0) for asked in (True, entropy, lse)]
    saved = [row.new_empty(row.shape, dtype=dtype) for dtype in (torch.bool, *[kernel_dtype(call.dtype)] * 2)]
    return *seen, *saved, _new_directions(call.hidden, gradient and not (trainable or entropy or lse))


def _new_directions(hidden: Tensor, wanted: bool) -> Tensor:
    rows = hidden.shape[0] if wanted else 0
    return torch.zeros(rows, hidden.shape[1], dtype=held_in(hidden.dtype), device=hidden.device)


def _forward(head: Head, plan: Plan, directions: Tensor, entropy: bool) -> Stats:
    """Statistics of all scored rows; with a frozen head also each row's direction, while its logits are in memory."""
    buffer, parts = workspace(head, plan.chunk_rows, head.weight.shape[0]), []
    for start, stop in plan.chunks:
        logits = project(head, hidden_rows(head, start, stop), buffer)
        stats = sweep(head, start, stop, logits, entropy)
        parts.append(stats)
        if plan.mode == "frozen":
            row = row_coefficients(head, stats, {"logps": torch.ones_like(stats.logps)})
            row, alpha = scaled(head, start, stop, row)
            dz = differentiate(head, start, stop, logits, rows_of(head.labels, start, stop), stats, row)
            write_rows(head, directions, start, stop, dz, alpha)()
    return join(head, parts, entropy)


def scale_directions(hidden: Tensor, labels: Tensor | None, directions: Tensor, grad: Tensor) -> Tensor:
    """``g_i U_i``; a row that is not scored or whose ``g_i`` is 0 is exactly 0, whatever its direction holds.

    Only the dtype of ``hidden`` is read: through it autograd knows that the result must not be differentiated again.
    """
    skipped = grad == 0 if labels is None else (labels == IGNORE_INDEX) | (grad == 0)
    return torch.where(skipped[:, None], 0.0, grad[:, None] * directions).to(hidden.dtype)


scale_directions_op = torch.library.custom_op(
    "fastalign::scale_directions",
    scale_directions,
    mutates_args=(),
    schema="(Tensor hidden, Tensor? labels, Tensor directions, Tensor grad) -> Tensor",
)


@scale_directions_op.register_fake
def _(hidden, labels, directions, grad):
    return torch.empty_like(directions, dtype=hidden.dtype)


def gradients(*args):
    """Gradients of hidden, weight, adapter and bias in their dtypes; ``[0]`` for those that are not needed."""
    *given, entropy, maximum, logsum, grad_logps, grad_entropy, grad_lse, needs = args
    call, needs = Call(*given), Needs(*needs)
    head, inputs = make_head("linear_logps", call), Leaves(*call[:4])
    maximum, logsum, entropy = _scored(head, maximum), _scored(head, logsum), _scored(head, entropy)
    stats = Stats(maximum, entropy, maximum, logsum)  # logps are not read in backward
    upstream = {"logps": grad_logps, "entropy": grad_entropy, "lse": grad_lse}
    upstream = {name: _scored(head, x) for name, x in upstream.items()}
    head, stats, row = needed(head, stats, row_coefficients(head, stats, upstream))
    plan = plan_for(head, "upstream", trained=trained_columns(inputs, needs) or 0, wanted=Wanted(True, True))
    made = recomputed_gradients(head, plan, stats, row, inputs, needs)
    return tuple([call.hidden.new_empty(0) if grad is None else grad for grad in made])


_backward_op = torch.library.custom_op(
    "fastalign::linear_logps_backward",
    gradients,
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor? entropy, Tensor maximum, Tensor logsum, Tensor? grad_logps, Tensor? grad_entropy, "
    "Tensor? grad_lse, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _scored(head: Head, values: Any) -> Any:
    """``[N]`` to the scored rows, as the kernels read them; None stays None."""
    if values is None:
        return None
    picked = values if head.rows is None else values[head.rows]
    return picked.to(kernel_dtype(head.options.dtype)).contiguous()


@_backward_op.register_fake
def _(*args):
    inputs, needs = args[:4], args[-1]
    return tuple(x.new_empty(x.shape) if need else args[0].new_empty(0) for x, need in zip(inputs, needs, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    *given, entropy, lse, gradient, trainable = inputs
    call, (_, entropies, lses, top1, maximum, logsum, directions) = Call(*given), output
    unasked = [x for x, asked in ((entropies, entropy), (lses, lse)) if not asked]
    ctx.mark_non_differentiable(top1, maximum, logsum, directions, *unasked)
    ctx.set_materialize_grads(False)
    ctx.frozen, ctx.options = gradient and not (trainable or entropy or lse), call[TENSORS:]
    if ctx.frozen:
        ctx.save_for_backward(call.hidden, call.labels, directions)
    else:
        ctx.save_for_backward(*call[:TENSORS], entropies if entropy else None, maximum, logsum)


def _backward(ctx, *upstream: Any, scale: Any = scale_directions_op, make: Any = _backward_op):
    upstream = upstream[:3]  # of logps, entropy and lse; the other outputs have none
    if all(grad is None for grad in upstream):
        grads = (None,) * 4
    elif ctx.frozen:
        grads = scale(*ctx.saved_tensors, upstream[0]), None, None, None
    else:
        needs = list(ctx.needs_input_grad[:4])
        tensors, saved = ctx.saved_tensors[:TENSORS], ctx.saved_tensors[TENSORS:]
        made = make(*tensors, *ctx.options, *saved, *upstream, needs)
        grads = tuple(grad if need else None for grad, need in zip(made, needs, strict=True))
    return *grads, *(None,) * (len(ctx.needs_input_grad) - 4)


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(no_double_backward)
scale_directions_op.register_autograd(no_double_backward)


class _Eager(torch.autograd.Function):
    """The op without PyTorch's dispatcher, which takes longer than a small product."""

    forward = staticmethod(compute)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @final("linear_logps")
    def backward(ctx, *upstream):
        """The backward of the custom op, from the same functions."""
        return _backward(ctx, *upstream, scale=scale_directions, make=gradients)


def is_plain(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the dispatcher may be skipped: no tracing, no dispatch mode, no meta tensor, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(hidden) in PLAIN and type(weight) in PLAIN and hidden.device.type != "meta"


PLAIN = (Tensor, torch.nn.Parameter)


# --- public ----------------------------------------------------------------------------------------------------------


@with_options
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    entropy: bool = False,
    lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Log-prob of each row's label, and the row's entropy, composable with any autograd that follows.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``, ``logps = z_y - lse(z)``,
    ``entropy = -sum p ln p``.

    Args:
        hidden: ``[N, D]``.
        weight: ``[V, D]``; with mixed dtypes GEMMs run in the narrower one, and each gradient has its input's dtype.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored: outputs and gradients are exactly 0 and its
            hidden state is never read.
        entropy: also return the entropy in nats, differentiable.
        lse: also return the log-sum-exp of z, differentiable, as z-losses want it.
        options: the fields of ``fastalign.ops.head.options.Options``: bias, lora, temperature, softcap, logit_scale,
            label_smoothing, process_group, memory, backend, batch_invariant, logits, num_scored.

    Returns:
        logps ``[N]`` in fp32 (fp64 if an input is fp64), or a tuple of it and what else was asked for: entropy, lse.

    Raises:
        ValueError: wrong rank, shape, dtype or device; a CPU label outside ``[0, V)`` (on CUDA that row becomes NaN);
            ``batch_invariant=True`` where that cannot be promised; ranks that disagree.
        RuntimeError: double backward.

    >>> linear_logps(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
    tensor([-1.3863,  0.0000])
    """
    more = {"entropy": entropy, "lse": lse}
    call, trainable = make_call("linear_logps", hidden, weight, labels, options, more)
    logps, entropies, lses, _ = row_stats(call, Wanted(entropy, lse), trainable)
    others = tuple(x for x in (entropies, lses) if x is not None)
    return (logps, *others) if others else logps


def row_stats(call: Call, wanted: Wanted, trainable: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """logps, entropy and lse if asked for, and whether the label is the argmax of the logits."""
    gradient = torch.is_grad_enabled() and (trainable or call.hidden.requires_grad)
    op = _Eager.apply if is_plain(call.hidden, call.weight) else _op
    logps, entropies, lses, top1, *_ = op(*call, *wanted, gradient, trainable)  # pyright: ignore
    return logps, entropies if wanted.entropy else None, lses if wanted.lse else None, top1
