"""Divergence of a policy from a reference over the whole vocabulary, straight from their logits.

    p = softmax(z), pi = softmax(q) of the reference, M = mix pi + (1 - mix) p

    forward_kl = KL(pi || p)                               dz_v = p_v - pi_v
    reverse_kl = KL(p || pi)                               dz_v = p_v (ln(p_v / pi_v) - KL(p || pi))
    jsd = mix KL(pi || M) + (1 - mix) KL(p || M)           dz_v = (1 - mix) p_v (ln(p_v / M_v) - KL(p || M))

A column without probability has no share in a sum and no gradient: banned (-inf) logits make no NaN. A column banned in
one stream alone makes the KL over the other honestly infinite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops._checks import check_device, check_labels, check_matrix, check_scaling, kernel_labels
from fastalign.ops.token_logps import _blocks, _rows_of, _scaled, _slope, split_temperature, stats_dtype
from fastalign.types import IGNORE_INDEX

Kind = Literal["forward_kl", "reverse_kl", "jsd"]

# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    labels: Tensor | None = None,
    kind: Kind = "forward_kl",
    mix: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
) -> Tensor:
    """The specification: two log-softmaxes in full, differentiable in the logits; fp32 or (any fp64 input) fp64."""
    dtype, num_rows = stats_dtype(logits, ref_logits), logits.shape[0]
    scored = torch.ones(num_rows, device=logits.device) if labels is None else labels != IGNORE_INDEX
    rows = scored.nonzero().squeeze(1)
    tau = temperature[rows, None] if isinstance(temperature, Tensor) else temperature
    log_p = _log_softmax(logits[rows].to(dtype), tau, softcap, logit_scale)
    log_q = _log_softmax(ref_logits.detach()[rows].to(dtype), tau, ref_softcap, ref_logit_scale)
    if kind == "jsd":
        dead = (log_p == -torch.inf) & (log_q == -torch.inf)  # logaddexp of two -inf has no gradient
        parts = log_p.masked_fill(dead, 0) + math.log1p(-mix), log_q.masked_fill(dead, 0) + math.log(mix)
        log_m = torch.logaddexp(*parts)
        value = mix * _kl(log_q, log_m) + (1 - mix) * _kl(log_p, log_m)
    else:
        value = _kl(log_q, log_p) if kind == "forward_kl" else _kl(log_p, log_q)
    return value.new_zeros(num_rows).index_put((rows,), value)


def _log_softmax(x: Tensor, tau: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = x * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / tau).log_softmax(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``KL(a || b)`` over the last dimension."""
    banned = log_a == -torch.inf
    return (log_a.exp() * (log_a.masked_fill(banned, 0) - log_b.masked_fill(banned, 0))).sum(-1)


# --- torch backend ---------------------------------------------------------------------------------------------------


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    kind: str,
    mix: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The divergence of each pair of rows, block of rows by block of rows.

    Args:
        logits, ref_logits: ``[N, V]`` of any float dtypes and strides.
        labels: ``[N]``; -100 masks a row, no other label is looked at.
        kind: "forward_kl", "reverse_kl" or "jsd"; ``mix`` is the weight of the reference in the mixture of "jsd".
        temperature: a number or ``[N]``, for both streams; softcap and logit scale are each stream's own.

    Returns:
        value ``[N]`` and stats ``[5, N]`` in fp32 (fp64 if a stream is fp64), 0 in masked rows. The rows of stats: max
        and logsum of z, the same of q, and the mean that backward subtracts: KL(p || pi), for "jsd" KL(p || M).
    """
    dtype = stats_dtype(logits, ref_logits)
    value = torch.empty(len(labels), dtype=dtype, device=logits.device)
    stats = torch.empty(5, len(labels), dtype=dtype, device=logits.device)
    for rows in _blocks(logits):
        tau, masked = _rows_of(temperature, rows), labels[rows] == IGNORE_INDEX
        log_p, *p_stats = _normalised(_z(logits[rows], dtype, tau, softcap, logit_scale))
        log_q, *q_stats = _normalised(_z(ref_logits[rows], dtype, tau, ref_softcap, ref_logit_scale))
        result, pull = _values(log_p, log_q, kind, mix)
        stats[:, rows] = torch.stack([*p_stats, *q_stats, pull]).masked_fill_(masked, 0)
        value[rows] = result.masked_fill(masked, 0)
    return value, stats


def backward(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad: Tensor,
    *,
    kind: str,
    mix: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
) -> None:
    """Writes the gradient of ``grad . value`` in the logits into ``out`` ``[N, V]``, which may be ``logits``.

    Masked rows and rows whose ``grad`` is 0 become zeros, unread. The columns may be any slab of the vocabulary that
    the statistics were made of.
    """
    dtype = stats.dtype
    for rows in _blocks(logits):
        tau, g = _rows_of(temperature, rows), grad[rows]
        p_max, p_logsum, q_max, q_logsum, pull = stats[:, rows, None]
        z = _z(logits[rows], dtype, tau, softcap, logit_scale)
        slope = _slope(z, tau, softcap, logit_scale)
        q = _z(ref_logits[rows], dtype, tau, ref_softcap, ref_logit_scale)
        dz = _slopes(z.sub_(p_max).sub_(p_logsum), q.sub_(q_max).sub_(q_logsum), pull, kind, mix)
        skipped = (labels[rows] == IGNORE_INDEX) | (g == 0)
        out[rows] = dz.mul_(g[:, None]).mul_(slope).masked_fill_(skipped[:, None], 0).to(out.dtype)


def _z(x: Tensor, dtype: torch.dtype, tau: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    return _scaled(x.double() if dtype == torch.float64 else x, tau, softcap, logit_scale)


def _normalised(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities in place of ``z``, max and logsum."""
    maximum = z.amax(-1)
    z.sub_(maximum[:, None])
    logsum = z.exp().sum(-1).log_()
    return z.sub_(logsum[:, None]), maximum, logsum


def _values(log_p: Tensor, log_q: Tensor, kind: str, mix: float) -> tuple[Tensor, Tensor]:
    """The divergence and the mean that backward subtracts."""
    if kind == "forward_kl":
        value = _mean(log_q, log_q - log_p)
        return value, torch.zeros_like(value)
    if kind == "reverse_kl":
        value = _mean(log_p, log_p - log_q)
        return value, value
    p_over_m, q_over_m = _over_mixture(log_p, log_q, mix)
    pull = _mean(log_p, p_over_m)
    return mix * _mean(log_q, q_over_m) + (1 - mix) * pull, pull


def _mean(log_a: Tensor, x: Tensor) -> Tensor:
    """``sum_v a_v x_v`` over the columns with ``a_v > 0``."""
    a = log_a.exp()
    return torch.where(a == 0, 0, a * x).sum(-1)


def _over_mixture(log_p: Tensor, log_q: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """``ln(p / M)`` and ``ln(pi / M)``, by way of the larger of the two: exactly 0 where p and pi agree."""
    gap = log_q - log_p
    far = torch.full_like(gap, mix).masked_fill_(gap > 0, 1 - mix)
    log_m = gap.abs().neg_().expm1_().mul_(far).log1p_()  # ln(M / the larger one)
    return gap.neg().clamp_(max=0).sub_(log_m), gap.clamp_(max=0).sub_(log_m)


def _slopes(log_p: Tensor, log_q: Tensor, pull: Tensor, kind: str, mix: float) -> Tensor:
    """``dz`` for an upstream gradient of 1."""
    p = log_p.exp()
    if kind == "forward_kl":
        return p.sub_(log_q.exp_())
    if kind == "reverse_kl":
        return torch.where(p == 0, 0, (log_p - log_q).sub_(pull).mul_(p))
    p_over_m, _ = _over_mixture(log_p, log_q, mix)
    return torch.where(p == 0, 0, p_over_m.sub_(pull).mul_(p)).mul_(1 - mix)


# --- custom op -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastalign::divergence", mutates_args=())
def _op(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: str,
    mix: float,
    softcap: float | None,
    ref_softcap: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """value ``[N]`` and stats ``[5, N]``."""
    kernels = dispatch.kernels("divergence", backend, logits.device)
    options = _options(temperatures, temperature, kind, mix, softcap, ref_softcap)
    return kernels.forward(logits, ref_logits, _row_labels(logits, labels), **options)


@_op.register_fake
def _(logits, ref_logits, *_):
    new = {"dtype": stats_dtype(logits, ref_logits)}
    return logits.new_empty(logits.shape[0], **new), logits.new_empty(5, logits.shape[0], **new)


@torch.library.custom_op("fastalign::divergence_backward", mutates_args=())
def _backward_op(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: str,
    mix: float,
    softcap: float | None,
    ref_softcap: float | None,
    backend: str | None,
    stats: Tensor,
    grad: Tensor,
) -> Tensor:
    """``d logits``, freshly allocated."""
    kernels = dispatch.kernels("divergence", backend, logits.device)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = _options(temperatures, temperature, kind, mix, softcap, ref_softcap)
    kernels.backward(out, logits, ref_logits, _row_labels(logits, labels), stats, grad.contiguous(), **options)
    return out


@_backward_op.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _options(temperatures, temperature, kind, mix, softcap, ref_softcap) -> dict:
    tau = temperature if temperatures is None else temperatures
    return {"temperature": tau, "kind": kind, "mix": mix, "softcap": softcap, "ref_softcap": ref_softcap}


def _row_labels(logits: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    return kernel_labels(labels, logits.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    logits, ref_logits, labels, temperatures, *ctx.options = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ref_logits, labels, temperatures, stats)


def _backward(ctx, grad, _stats):
    if grad is None:
        return (None,) * 10
    *tensors, stats = ctx.saved_tensors
    return _backward_op(*tensors, *ctx.options, stats, grad), *(None,) * 9


def _no_double_backward(ctx, *_):
    raise RuntimeError("fastalign ops do not support double backward: their gradients are final")


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(_no_double_backward)


# --- public ----------------------------------------------------------------------------------------------------------


def divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    labels: Tensor | None = None,
    kind: Kind = "forward_kl",
    mix: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence per row of the policy's distribution from the reference's, over the whole vocabulary, in nats.

    ``p = softmax(softcap(logits) / temperature)``, ``pi`` likewise of the reference; "forward_kl" is ``KL(pi || p)``,
    "reverse_kl" ``KL(p || pi)``, "jsd" ``mix KL(pi || M) + (1 - mix) KL(p || M)`` with ``M = mix pi + (1 - mix) p``
    (generalised Jensen-Shannon, arXiv:2306.13649; ``mix`` is TRL's beta). The temperature scales the gradient by its
    inverse; there is no factor of its square.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, any strides.
        ref_logits: ``[N, V]``, of a dtype of its own; gets no gradient.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored: its value and gradient are exactly 0 and
            neither stream's logits are read. None: every row is scored.
        kind: "forward_kl", "reverse_kl" or "jsd".
        mix: weight of the reference in the mixture, inside (0, 1); used by "jsd" alone.
        temperature: a positive number or ``[N]``, for both streams; gets no gradient.
        softcap, ref_softcap: ``cap * tanh(x / cap)`` of each stream before the temperature.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        ``[N]`` in fp32 (fp64 if an input is fp64); +inf where the KL is.

    Raises:
        ValueError: wrong rank, shape, dtype or device; unknown kind; mix 0 or 1; a CPU label outside ``[0, V)``.
        RuntimeError: double backward.

    >>> divergence(torch.zeros(2, 4), torch.eye(4)[:2], labels=torch.tensor([1, -100]))
    tensor([0.1180, 0.0000])
    """
    check_matrix("logits", logits, "[N, V]")
    check_matrix("ref_logits", ref_logits, "[N, V]")
    if logits.shape != ref_logits.shape:
        raise ValueError(f"ref_logits must be {list(logits.shape)} like the logits, got {list(ref_logits.shape)}")
    check_device("ref_logits", ref_logits, "logits", logits)
    check_choice(kind, mix)
    check_rows(logits, "logits", labels, temperature, softcap, ref_softcap)
    number, rows = split_temperature(temperature, stats_dtype(logits, ref_logits))
    options = (rows, number, kind, float(mix), softcap, ref_softcap, backend)
    return _op(logits, ref_logits.detach(), labels, *options)[0]


def check_rows(
    rows: Tensor,
    name: str,
    labels: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ref_softcap: float | None,
) -> None:
    """What is given per row fits ``rows``, and the caps are positive."""
    if labels is not None:
        check_labels(labels, rows, name)
    per_row = rows.new_empty(rows.shape[0], dtype=torch.int64) if labels is None else labels
    check_scaling(temperature, softcap, per_row)
    if ref_softcap is not None and not ref_softcap > 0:
        raise ValueError(f"ref_softcap must be positive or None, got {ref_softcap}")


def check_choice(kind: str, mix: float) -> None:
    """``kind`` is known, and ``mix`` lies inside (0, 1) where it is used."""
    if kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f'kind must be "forward_kl", "reverse_kl" or "jsd", got {kind!r}')
    if kind == "jsd" and mix in (0, 1):
        other = "forward_kl" if mix == 0 else "reverse_kl"
        raise ValueError(
            f'mix must lie inside (0, 1), got {mix}: at its ends "jsd" is 0 everywhere; for the limit that is meant '
            f'there use kind="{other}"'
        )
    if kind == "jsd" and not 0 < mix < 1:
        raise ValueError(f"mix must lie inside (0, 1), got {mix}")
