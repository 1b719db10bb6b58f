"""Log-prob of the label, and entropy, straight from logits: reference, torch backend, custom op, public functions.

    z = softcap(logit_scale * logits) / temperature,    logps = z_y - lse(z),    entropy = -sum_v p_v ln p_v
    dz_v = g (1[v=y] - p_v) + p_v (alpha + beta ln p_v) + delta          what each objective makes of it: ``_rows``

Statistics are saved as ``max`` and ``logsum = ln sum exp(z - max)``, not as their sum: at ``|lse|`` near 100 the
rounding of the sum alone exceeds eager's own error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops._checks import check_labels, check_matrix, check_scaling, kernel_labels
from fastalign.ops._rows import Coefficients, coefficients, idle, pick
from fastalign.types import IGNORE_INDEX

ELSEWHERE = -1
"""The label of a row whose target lives in another slab or shard: statistics are valid, there is no target term."""

BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Size of one fp32 temporary of the torch backend; it makes up to four of them."""

FLOOR = -1000.0
"""A bound for ln p where it multiplies p: exp(-1000) is already 0, and 0 * -inf would be NaN."""


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The specification: log-softmax, then gather, over scored rows; differentiable, in fp32 or (fp64 logits) fp64."""
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    z = logits[rows].to(stats_dtype(logits)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[rows, None] if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    zeros = log_p.new_zeros(len(labels))
    logps = zeros.index_put((rows,), log_p.gather(1, labels[rows, None].long()).squeeze(1))
    if not entropy:
        return logps, None
    p_log_p = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min))
    return logps, zeros.index_put((rows,), -p_log_p.sum(-1))


def stats_dtype(*inputs: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32


# --- torch backend ---------------------------------------------------------------------------------------------------


def forward(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    total: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """One sweep over the vocabulary, block of rows by block of rows.

    Args:
        logits: ``[N, V]`` of any float dtype and row stride.
        labels: ``[N]``; -100 masks a row, -1 marks a target that lives in another slab.

    Returns:
        logps, entropy (or None), max, logsum, total = sum_v (z_v - max) (or None): ``[N]`` fp32 (fp64 for fp64
        logits); masked rows hold 0.
    """
    dtype = stats_dtype(logits)
    logps, maximum, logsum = (torch.empty(len(labels), dtype=dtype, device=logits.device) for _ in range(3))
    entropies, totals = (torch.empty_like(logps) if wanted else None for wanted in (entropy, total))
    for rows in _blocks(logits):
        y = labels[rows]
        masked = y == IGNORE_INDEX
        z = _scaled(logits[rows], _rows_of(temperature, rows), softcap, logit_scale)
        m = z.amax(-1)
        target = z.gather(1, y.long().clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        z.sub_(m[:, None])
        if totals is not None:
            totals[rows] = z.sum(-1).masked_fill_(masked, 0)
        p = z.exp()
        norm = p.sum(-1)
        s = norm.log()
        logps[rows] = _target_logps(target - m - s, y, logits.shape[1])
        maximum[rows] = m.masked_fill_(masked, 0)
        if entropies is not None:
            h = s - p.mul_(z.clamp_(min=torch.finfo(dtype).min)).sum(-1) / norm
            entropies[rows] = h.masked_fill_(masked, 0)
        logsum[rows] = s.masked_fill_(masked, 0)
    return logps, entropies, maximum, logsum, totals


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    logsum: Tensor,
    coefficients: Coefficients,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Writes ``d logits`` into ``out``, which may be ``logits``; rows without a coefficient become zeros, unread."""
    for rows in _blocks(logits):
        tau, y, part = _rows_of(temperature, rows), labels[rows], pick(coefficients, rows)
        z = _scaled(logits[rows], tau, softcap, logit_scale)
        slope = _slope(z, tau, softcap, logit_scale)
        log_p = z.sub_(max[rows, None]).sub_(logsum[rows, None]).clamp_(min=FLOOR)
        dz = _row_gradients(log_p, y, part).mul_(slope)
        out[rows] = dz.masked_fill_(((y == IGNORE_INDEX) | idle(part))[:, None], 0)


def _row_gradients(log_p: Tensor, labels: Tensor, coefficients: Coefficients) -> Tensor:
    """``dz`` from ``ln p``, which it overwrites; at the label ``1 - p`` is ``-expm1(ln p)``."""
    vocab = log_p.shape[1]
    g, alpha, beta, delta = (None if x is None else x[:, None] for x in coefficients)
    g = coefficients.g.masked_fill(_out_of_range(labels, vocab), torch.nan)[:, None]
    targets, here = labels.long().clamp(0, vocab - 1)[:, None], ((labels >= 0) & (labels < vocab))[:, None]
    p, target = log_p.exp(), log_p.gather(1, targets)
    pull = torch.zeros_like(g) if alpha is None else alpha
    share = pull if beta is None else pull + beta * target
    dz = p.mul_(pull - g if beta is None else log_p.mul_(beta).add_(pull - g))
    at_label = target.exp() * share - g * target.expm1()
    dz.scatter_(1, targets, torch.where(here, at_label, dz.gather(1, targets)))
    return dz if delta is None else dz.add_(delta)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Row slices whose fp32 copies take about BLOCK_BYTES each."""
    item = 8 if logits.dtype == torch.float64 else 4
    budget = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"])
    step = max(1, budget // (item * max(1, logits.shape[1])))
    return (slice(start, start + step) for start in range(0, logits.shape[0], step))


def _rows_of(temperature: float | Tensor, rows: slice) -> float | Tensor:
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def _scaled(logits: Tensor, tau: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """A fresh ``z`` in the statistics' dtype; skipped rows, which may hold NaN, are selected out by the caller."""
    z = logits.to(stats_dtype(logits), copy=True)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(tau) if isinstance(tau, Tensor) or tau != 1.0 else z


def _slope(z: Tensor, tau: float | Tensor, softcap: float | None, logit_scale: float) -> float | Tensor:
    """``dz / d logits``: a number, ``[n, 1]``, or (with a softcap) a matrix."""
    slope = logit_scale / tau
    return slope if softcap is None else (z * tau).div_(softcap).square_().neg_().add_(1).mul_(slope)


def _target_logps(logps: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """0 where there is no target here, NaN where the label is out of range."""
    logps = logps.masked_fill((labels == IGNORE_INDEX) | (labels == ELSEWHERE), 0)
    return logps.masked_fill(_out_of_range(labels, vocab), torch.nan)


def _out_of_range(labels: Tensor, vocab: int) -> Tensor:
    return (labels >= vocab) | ((labels < 0) & (labels != IGNORE_INDEX) & (labels != ELSEWHERE))


# --- custom op -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastalign::token_logps", mutates_args=())
def _op(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    inplace_backward: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy (``[0]`` when not asked for), max, logsum."""
    sweep = dispatch.kernels("token_logps", backend, logits.device)
    labels = kernel_labels(labels, logits.shape[1])
    tau = temperature if temperatures is None else temperatures
    logps, entropies, maximum, logsum, _ = sweep.forward(
        logits, labels, temperature=tau, softcap=softcap, entropy=entropy
    )
    return logps, logps.new_empty(0) if entropies is None else entropies, maximum, logsum


@_op.register_fake
def _(logits, labels, temperatures, temperature, softcap, entropy, inplace_backward, backend):
    row = logits.new_empty(logits.shape[0], dtype=stats_dtype(logits))
    return row, torch.empty_like(row) if entropy else row.new_empty(0), torch.empty_like(row), torch.empty_like(row)


@torch.library.custom_op("fastalign::token_logps_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    maximum: Tensor,
    logsum: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    delta: Tensor | None,
    backend: str | None,
) -> Tensor:
    """``d logits``, freshly allocated."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    row = Coefficients(g, alpha, beta, delta)
    _write_gradient(out, logits, labels, temperatures, temperature, softcap, maximum, logsum, row, backend)
    return out


@_backward_op.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _write_gradient(
    out, logits, labels, temperatures, temperature, softcap, maximum, logsum, coefficients, backend
) -> None:
    sweep = dispatch.kernels("token_logps", backend, logits.device)
    tau = temperature if temperatures is None else temperatures
    labels = kernel_labels(labels, logits.shape[1])
    sweep.backward(out, logits, labels, maximum, logsum, coefficients, temperature=tau, softcap=softcap)


def _setup_context(ctx, inputs, output) -> None:
    logits, labels, temperatures, temperature, softcap, entropy, inplace_backward, backend = inputs
    _, entropies, maximum, logsum = output
    ctx.mark_non_differentiable(maximum, logsum, *(() if entropy else (entropies,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, temperatures, maximum, logsum, entropies if entropy else None)
    ctx.options = temperature, softcap, inplace_backward, backend


def _backward(ctx, grad_logps, grad_entropy, _maximum, _logsum):
    grads = None if grad_logps is None and grad_entropy is None else _gradient(ctx, grad_logps, grad_entropy)
    return grads, *(None,) * 7


def _gradient(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    logits, labels, temperatures, maximum, logsum, entropy = ctx.saved_tensors
    temperature, softcap, inplace_backward, backend = ctx.options
    g = torch.zeros_like(logsum) if grad_logps is None else grad_logps.contiguous()
    row = coefficients(g, entropy=entropy, grad_entropy=grad_entropy)
    rest = (labels, temperatures, temperature, softcap, maximum, logsum)
    if not inplace_backward:
        return _backward_op(logits, *rest, *row, backend)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "token_logps: double backward is not supported (inplace_backward=True and create_graph=True)"
        )
    _write_gradient(logits, logits, *rest, row, backend)
    torch.autograd.graph.increment_version(logits)  # whoever else saved these logits must fail, not read gradients
    return logits.detach()


def _no_double_backward(ctx, *_):
    raise RuntimeError("fastalign ops do not support double backward: their gradients are final")


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_no_double_backward)


# --- public ----------------------------------------------------------------------------------------------------------


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each row's label, and the row's entropy, from logits that already exist.

    ``z = softcap(logits) / temperature;  logps = z_y - lse(z);  entropy = -sum p ln p`` in nats, both differentiable.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, any strides.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored: its outputs and gradient are exactly 0 and
            its logits are never read.
        temperature: a positive number or ``[N]``; gets no gradient.
        softcap: ``cap * tanh(logits / cap)`` before the temperature.
        entropy: also return the entropy.
        inplace_backward: backward overwrites ``logits`` with their gradient instead of allocating ``[N, V]``; any other
            use of the logits in a later backward raises. Ignored under ``torch.compile``, where memory is planned.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        logps ``[N]`` in fp32 (fp64 for fp64 logits), or (logps, entropy).

    Raises:
        ValueError: wrong rank, shape, dtype or device; a CPU label outside ``[0, V)`` (on CUDA that row becomes NaN).
        RuntimeError: double backward; a second backward after ``inplace_backward``.

    >>> token_logps(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor([-1.3863,  0.0000])
    """
    check_matrix("logits", logits, "[N, V]")
    check_labels(labels, logits, "logits")
    check_scaling(temperature, softcap, labels)
    number, rows = split_temperature(temperature, stats_dtype(logits))
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    logps, entropies, _, _ = _op(logits, labels, rows, number, softcap, entropy, inplace_backward, backend)
    return (logps, entropies) if entropy else logps


def split_temperature(temperature: float | Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """A number and an optional ``[N]`` tensor: operator schemas have no union."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature.to(dtype).contiguous()
    return float(temperature), None
