"""Log-prob of the label, entropy and log-sum-exp straight from logits: reference, custom op, public functions.

    z = softcap(logit_scale * logits) / temperature,    logps = z_y - lse(z),    entropy = -sum_v p_v ln p_v
    dz_v = g (1[v=y] - p_v) + p_v (alpha + beta ln p_v) + delta          what each objective makes of it: ``rows``

Statistics are saved as ``max`` and ``logsum = ln sum exp(z - max)``, not as their sum: at ``|lse|`` near 100 the
rounding of the sum alone exceeds eager's own error.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.checks import (
    check_in_place,
    check_labels,
    check_matrix,
    check_scaling,
    check_smoothing,
    kernel_labels,
    split_temperature,
    stats_dtype,
)
from fastalign.ops.final import no_double_backward
from fastalign.ops.parallel import (
    agree,
    checked_together,
    combine,
    is_split,
    localise,
    make_shard,
    nothing,
)
from fastalign.ops.rows import Coefficients, Stats, coefficients, smoothed
from fastalign.types import IGNORE_INDEX

ELSEWHERE = -1
"""The label of a row whose target lives in another slab or shard: statistics are valid, there is no target term."""


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    label_smoothing: float = 0.0,
    lse: bool = False,
) -> Any:
    """The specification: log-softmax, then gather, over scored rows; differentiable, in fp32 or (fp64 logits) fp64.

    Returns:
        logps, entropy (None unless asked for), and only where asked for the log-sum-exp.
    """
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    z = logits[rows].to(stats_dtype(logits)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[rows, None] if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    zeros = log_p.new_zeros(len(labels))
    picked = log_p.gather(1, labels[rows, None].long()).squeeze(1)
    if label_smoothing != 0:
        picked = (1 - label_smoothing) * picked + label_smoothing * log_p.mean(-1)
    p_log_p = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min))
    found = (picked, -p_log_p.sum(-1) if entropy else None, *([z.logsumexp(-1)] if lse else []))
    return tuple(x if x is None else zeros.index_put((rows,), x) for x in found)


# --- custom op -------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """The arguments that both ops begin with, in the order of their schemas."""

    logits: Tensor
    labels: Tensor
    temperatures: Tensor | None
    temperature: float
    softcap: float | None
    backend: str | None
    group: str | None
    shards: list[int] | None

    @property
    def sweep(self) -> ModuleType:
        """The kernels that serve the logits."""
        return dispatch.kernels("token_logps", self.backend, self.logits.device, self.logits.dtype)

    @property
    def scaling(self) -> dict[str, Any]:
        """The kernels' keyword arguments."""
        tau = self.temperature if self.temperatures is None else self.temperatures
        return {"temperature": tau, "softcap": self.softcap}

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Labels as the kernels read them and, with a split vocabulary, the rank that owns each."""
        shard = make_shard(self.group, self.shards)
        labels = kernel_labels(self.labels, columns(self.logits, self.shards))
        return (labels, None) if shard is None else localise(shard, labels)


SCHEMA = (
    "Tensor logits, Tensor labels, Tensor? temperatures, float temperature, float? softcap, str? backend, str? group, "
    "int[]? shards"
)


def columns(logits: Tensor, shards: list[int] | None) -> int:
    """V, over all ranks."""
    return logits.shape[1] if shards is None else sum(shards)


def statistics(call: Call, entropy: bool, total: bool = False, top1: bool = False) -> Stats:
    """Those over the columns of all ranks; one all-gather where there are several."""
    (labels, owners), logits = call.rows(), call.logits
    if logits.shape[1]:
        found = Stats(*call.sweep.forward(logits, labels, entropy=entropy, total=total, top1=top1, **call.scaling))
    else:
        found = nothing(labels, stats_dtype(logits), entropy, total, top1)
    shard = make_shard(call.group, call.shards)
    if shard is None or owners is None:
        return found
    found = combine(shard, owners, *found)
    for x in found:
        if x is not None:
            x.masked_fill_(labels == IGNORE_INDEX, 0)
    return found


@torch.library.custom_op(
    "fastalign::token_logps",
    mutates_args=(),
    schema=f"({SCHEMA}, bool entropy, float label_smoothing, bool lse, bool inplace_backward) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(*args) -> tuple[Tensor, ...]:
    """logps, entropy and log-sum-exp (``[0]`` when not asked for), max, logsum."""
    *args, entropy, label_smoothing, lse, _ = args
    call = Call(*args)
    logps, entropies, maximum, logsum, total, _ = statistics(call, entropy, label_smoothing != 0)
    if total is not None:
        logps = smoothed(logps, logsum, total, label_smoothing, columns(call.logits, call.shards))
    sums = maximum + logsum if lse else None
    return *(logps.new_empty(0) if x is None else x for x in (logps, entropies, sums)), maximum, logsum


@_op.register_fake
def _(logits, *args):
    *_, entropy, _, lse, _ = args
    row = logits.new_empty(logits.shape[0], dtype=stats_dtype(logits))
    return tuple(row.new_empty(row.shape if wanted else 0) for wanted in (True, entropy, lse, True, True))


@torch.library.custom_op(
    "fastalign::token_logps_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor max, Tensor logsum, Tensor g, Tensor? alpha, Tensor? beta, Tensor? delta) -> Tensor",
)
def _backward_op(*args) -> Tensor:
    """``d logits``, freshly allocated."""
    call, logits = Call(*args[: len(Call._fields)]), args[0]
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(out, call, *args[len(Call._fields) :])
    return out


@_backward_op.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _write_gradient(out: Tensor, call: Call, maximum: Tensor, logsum: Tensor, *row: Tensor | None) -> None:
    if out.numel():
        labels, _ = call.rows()
        call.sweep.backward(out, call.logits, labels, maximum, logsum, Coefficients(*row), **call.scaling)  # pyright: ignore


def _setup_context(ctx, inputs, output) -> None:
    logits, labels, temperatures, *ctx.options = inputs
    entropy, ctx.label_smoothing, lse, ctx.inplace = ctx.options[-4:]
    _, entropies, sums, maximum, logsum = output
    ctx.mark_non_differentiable(maximum, logsum, *([] if entropy else [entropies]), *([] if lse else [sums]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, temperatures, maximum, logsum, entropies if entropy else None)


def _backward(ctx, *upstream):
    grads = None if all(x is None for x in upstream[:3]) else _gradient(ctx, *upstream[:3])
    return grads, *(None,) * 11


def _gradient(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None) -> Tensor:
    logits, labels, temperatures, maximum, logsum, entropy = ctx.saved_tensors
    call = Call(logits, labels, temperatures, *ctx.options[:-4])
    row = coefficients(
        torch.zeros_like(logsum) if grad_logps is None else grad_logps,
        entropy=entropy,
        grad_entropy=grad_entropy,
        grad_lse=grad_lse,
        label_smoothing=ctx.label_smoothing,
        vocab=columns(logits, call.shards),
    )
    if not ctx.inplace:
        return _backward_op(*call, maximum, logsum, *row)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "token_logps: double backward is not supported (inplace_backward=True and create_graph=True)"
        )
    _write_gradient(logits, call, maximum, logsum, *row)
    torch.autograd.graph.increment_version(logits)  # whoever else saved these logits must fail, not read gradients
    return logits.detach()


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(no_double_backward)


# --- public ----------------------------------------------------------------------------------------------------------


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    label_smoothing: float = 0.0,
    lse: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-prob of each row's label, and on demand entropy and log-sum-exp, from logits that already exist.

    ``z = softcap(logits) / temperature;  logps = z_y - lse;  lse = ln sum_v exp(z_v);  entropy = -sum p ln p`` in nats,
    all differentiable. With ``label_smoothing`` eta, logps is ``(1 - eta) ln p_y + eta mean_v ln p_v`` (Szegedy et al.
    2016, as in ``torch.nn.functional.cross_entropy``); a z-loss is ``c * lse**2`` (PaLM, arXiv:2204.02311).

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, any strides.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored: its outputs and gradient are exactly 0 and
            its logits are never read.
        temperature: a positive number or ``[N]``; gets no gradient.
        softcap: ``cap * tanh(logits / cap)`` before the temperature.
        entropy: also return the entropy.
        label_smoothing: eta, from 0 to below 1; a banned (-inf) logit then makes the smoothed log-prob -inf.
        lse: also return the log-sum-exp.
        process_group: the ranks that share the vocabulary: ``logits`` are then this rank's columns, in rank order,
            shards may be uneven or empty; labels (global), upstream gradients and options are the same on every rank.
            Outputs are the same bits everywhere; the gradient is that of this rank's columns. Two all-gathers: the
            shapes, and one table of what the ranks know of each row.
        inplace_backward: backward overwrites ``logits`` with their gradient instead of allocating ``[N, V]``; any other
            use of the logits in a later backward raises, and so do logits whose elements share memory. Ignored under
            ``torch.compile``, where memory is planned.
        backend: "torch", "cpp", "triton", "cuda" or None for the best one here.

    Returns:
        logps ``[N]`` in fp32 (fp64 for fp64 logits); or a tuple: logps, then entropy, then lse, as asked for.

    Raises:
        ValueError: wrong rank, shape, dtype or device; a CPU label outside ``[0, V)`` (on CUDA that row becomes NaN);
            ranks that disagree about rows, labels or options; ``inplace_backward`` with logits that share memory.
        RuntimeError: double backward; a second backward after ``inplace_backward``.

    >>> token_logps(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor([-1.3863,  0.0000])
    >>> token_logps(torch.zeros(2, 4), torch.tensor([1, -100]), lse=True)[1]
    tensor([1.3863, 0.0000])
    """
    with checked_together(process_group, logits):
        check_matrix("logits", logits, "[N, V]")
        check_labels(labels, logits, "logits")
        check_scaling(temperature, softcap, labels)
        check_smoothing(label_smoothing)
        check_in_place("inplace_backward", inplace_backward, logits)
        same = facts("token_logps", logits, process_group, backend)
    number, rows = split_temperature(temperature, logits, stats_dtype(logits))
    same |= {"temperature": temperature, "softcap": softcap, "entropy": entropy}
    same |= {"label_smoothing": label_smoothing, "lse": lse}
    group, shards, _ = agree(process_group, logits, logits.shape[1], same, False, labels)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    call = Call(logits, labels, rows, number, softcap, backend, group, shards)
    logps, entropies, sums, *_ = _op(*call, entropy, float(label_smoothing), lse, inplace_backward)
    asked = [logps, *([entropies] if entropy else []), *([sums] if lse else [])]
    return tuple(asked) if len(asked) > 1 else logps


def facts(
    op: str, logits: Tensor, process_group: torch.distributed.ProcessGroup | None, backend: str | None
) -> dict[str, Any]:
    """What must be equal on the ranks of a split vocabulary, beside the options of an op on logits.

    Raises:
        ValueError: the backend does not serve ``op`` here.
    """
    if not is_split(process_group):
        return {}
    dispatch.choose(op, backend, logits.device.type)
    return {"op": op, "number of rows of logits": len(logits), "dtype of logits": logits.dtype, "backend": backend}


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """``log_softmax(logits).gather(-1, index)`` without the softmax, for any leading dimensions.

    Args:
        logits: ``[..., V]``.
        index: ``[...]``, or ``[..., K]`` for K log-probs per position.

    Returns:
        The shape of ``index``, fp32 (fp64 for fp64 logits).

    >>> selective_log_softmax(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])).shape
    torch.Size([1, 3])
    """
    if index.dim() == logits.dim() and index.shape[:-1] == logits.shape[:-1]:
        return torch.stack([selective_log_softmax(logits, column) for column in index.unbind(-1)], -1)
    if index.shape != logits.shape[:-1]:
        raise ValueError(
            f"index must be [...] or [..., K] for logits [..., V]; "
            f"got index {list(index.shape)}, logits {list(logits.shape)}"
        )
    logps = token_logps(logits.reshape(-1, logits.shape[-1]), index.reshape(-1))
    assert isinstance(logps, Tensor)
    return logps.view(index.shape)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of ``softmax(logits)`` over the last dimension: ``[..., V]`` to ``[...]``, differentiable.

    >>> entropy_from_logits(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """
    flat = logits.reshape(-1, logits.shape[-1])
    labels = torch.zeros(flat.shape[0], dtype=torch.int64, device=logits.device)
    return token_logps(flat, labels, entropy=True)[1].view(logits.shape[:-1])
