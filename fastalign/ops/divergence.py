"""Divergence of a policy from a reference over the whole vocabulary, straight from their logits.

    p = softmax(z), pi = softmax(q) of the reference, M = mix pi + (1 - mix) p

    forward_kl = KL(pi || p)                               dz_v = p_v - pi_v
    reverse_kl = KL(p || pi)                               dz_v = p_v (ln(p_v / pi_v) - KL(p || pi))
    jsd = mix KL(pi || M) + (1 - mix) KL(p || M)           dz_v = (1 - mix) p_v (ln(p_v / M_v) - KL(p || M))

A column without probability has no share in a sum and no gradient: banned (-inf) logits make no NaN. So has one whose
probability under the first distribution of a KL is below ``e^-87`` (1.6e-38, about the least normal fp32 number), on
every backend and in every dtype. A column banned in the second distribution alone, at ``e^-87`` or above in the first,
makes the KL infinite.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.checks import (
    check_device,
    check_labels,
    check_matrix,
    check_scaling,
    kernel_labels,
    split_temperature,
    stats_dtype,
)
from fastalign.ops.divergence_shards import measure
from fastalign.ops.final import no_double_backward
from fastalign.ops.parallel import Shard, agree, checked_together, localise, make_shard
from fastalign.ops.rows import NEGLIGIBLE
from fastalign.ops.token_logps import ELSEWHERE, facts
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
    banned = log_a < NEGLIGIBLE
    return (log_a.exp() * (log_a.masked_fill(banned, 0) - log_b.masked_fill(banned, 0))).sum(-1)


# --- custom op -------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """The arguments that both ops begin with, in the order of their schemas."""

    logits: Tensor
    ref_logits: Tensor
    labels: Tensor | None
    temperatures: Tensor | None
    temperature: float
    kind: str
    mix: float
    softcap: float | None
    ref_softcap: float | None
    backend: str | None
    group: str | None
    shards: list[int] | None

    @property
    def kernels(self) -> ModuleType:
        return dispatch.kernels(
            "divergence", self.backend, self.logits.device, self.logits.dtype, self.ref_logits.dtype
        )

    @property
    def options(self) -> dict[str, Any]:
        """The kernels' keyword arguments."""
        tau = self.temperature if self.temperatures is None else self.temperatures
        choice = {"kind": self.kind, "mix": self.mix, "temperature": tau}
        return {**choice, "softcap": self.softcap, "ref_softcap": self.ref_softcap}

    def rows(self) -> tuple[Shard | None, Tensor]:
        """This rank's shard, and labels ``[N]`` as the kernels read them."""
        shard, logits = make_shard(self.group, self.shards), self.logits
        if self.labels is None:
            return shard, torch.full(logits.shape[:1], ELSEWHERE, device=logits.device)
        labels = kernel_labels(self.labels, logits.shape[1] if shard is None else shard.vocab)
        return shard, labels if shard is None else localise(shard, labels)[0]


SCHEMA = (
    "Tensor logits, Tensor ref_logits, Tensor? labels, Tensor? temperatures, float temperature, str kind, float mix, "
    "float? softcap, float? ref_softcap, str? backend, str? group, int[]? shards"
)


@torch.library.custom_op("fastalign::divergence", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
def _op(*args) -> tuple[Tensor, Tensor]:
    """value ``[N]`` and stats ``[5, N]``."""
    call = _Call(*args)
    shard, labels = call.rows()
    return measure(call.kernels, shard, None, call.logits, call.ref_logits, labels, **call.options)[:2]


@_op.register_fake
def _(logits, ref_logits, *_):
    new = {"dtype": stats_dtype(logits, ref_logits)}
    return logits.new_empty(logits.shape[0], **new), logits.new_empty(5, logits.shape[0], **new)


@torch.library.custom_op(
    "fastalign::divergence_backward", mutates_args=(), schema=f"({SCHEMA}, Tensor stats, Tensor grad) -> Tensor"
)
def _backward_op(*args) -> Tensor:
    """``d logits``, freshly allocated."""
    *args, stats, grad = args
    call = _Call(*args)
    out = torch.empty(call.logits.shape, dtype=call.logits.dtype, device=call.logits.device)
    if out.numel():
        streams = (call.logits, call.ref_logits, call.rows()[1])
        call.kernels.backward(out, *streams, stats, grad.contiguous(), **call.options)
    return out


@_backward_op.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output) -> None:
    logits, ref_logits, labels, temperatures, *ctx.options = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ref_logits, labels, temperatures, stats)


def _backward(ctx, grad, _stats):
    if grad is None:
        return (None,) * 12
    *tensors, stats = ctx.saved_tensors
    return _backward_op(*tensors, *ctx.options, stats, grad), *(None,) * 11


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(no_double_backward)


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
    process_group: torch.distributed.ProcessGroup | None = None,
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
        process_group: the ranks that share the vocabulary: both logits are then this rank's columns ``[N, V_r]``, in
            rank order, with the same bounds in both; shards may be uneven, padded with -inf, or empty. Labels (global)
            and options are the same on every rank, and so are the bits of the result.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        ``[N]`` in fp32 (fp64 if an input is fp64); +inf where the KL is: where a column that the second distribution
        bans (-inf) has a probability of ``e^-87`` or more under the first. Less counts as none, on every backend.

    Raises:
        ValueError: wrong rank, shape, dtype or device; unknown kind; mix 0 or 1; a CPU label outside ``[0, V)``.
        RuntimeError: double backward.

    >>> divergence(torch.zeros(2, 4), torch.eye(4)[:2], labels=torch.tensor([1, -100]))
    tensor([0.1180, 0.0000])
    """
    with checked_together(process_group, logits):
        check_matrix("logits", logits, "[N, V]")
        check_matrix("ref_logits", ref_logits, "[N, V]")
        if logits.shape != ref_logits.shape:
            raise ValueError(f"ref_logits must be {list(logits.shape)} like the logits, got {list(ref_logits.shape)}")
        check_device("ref_logits", ref_logits, "logits", logits)
        check_choice(kind, mix)
        check_rows(logits, "logits", labels, temperature, softcap, ref_softcap)
        same = facts("divergence", logits, process_group, backend)
    number, rows = split_temperature(temperature, logits, stats_dtype(logits, ref_logits))
    same |= {"dtype of ref_logits": ref_logits.dtype, "labels": "None" if labels is None else "given"}
    same |= {"kind": kind, "mix": mix, "temperature": temperature, "softcap": softcap, "ref_softcap": ref_softcap}
    group, shards, _ = agree(process_group, logits, logits.shape[1], same, False, labels)
    options = (rows, number, kind, float(mix), softcap, ref_softcap, backend, group, shards)
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
