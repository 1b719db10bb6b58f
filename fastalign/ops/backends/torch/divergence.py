"""The torch backend of ``divergence``: block of rows by block of rows, in the statistics' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.backends.torch.token_logps import (
    FLOOR,
    out_of_range,
    row_blocks,
    row_gradients,
    rows_of,
    scaled,
    slope_of,
)
from fastalign.ops.checks import stats_dtype
from fastalign.ops.rows import NEGLIGIBLE, Coefficients, pick, zero_rows
from fastalign.types import IGNORE_INDEX


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
    tokens: bool = False,
    entropy: bool = False,
    apart: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The divergence of each pair of rows, block of rows by block of rows.

    Args:
        logits, ref_logits: ``[N, V]`` of any float dtypes and strides.
        labels: ``[N]``; -100 masks a row, another one outside ``[0, V)`` makes it NaN, -1 (elsewhere) excepted.
        kind: "forward_kl", "reverse_kl" or "jsd"; ``mix`` is the weight of the reference in the mixture of "jsd".
        temperature: a number or ``[N]``, for both streams; softcap and logit scale are each stream's own.
        tokens, entropy: whether to return the label's log-probs, and the policy's entropy.
        apart: of a KL: value is ``[2, N]``, the sum over the columns that the second distribution does not ban, and the
            largest ln of the first's probability among those that it bans.

    Returns:
        value ``[N]``, stats ``[5, N]``, logps ``[2, N]`` or None, entropy ``[N]`` or None, in fp32 (fp64 if a stream is
        fp64), 0 in masked rows. The rows of stats: max and logsum of z, the same of q, and the mean that backward
        subtracts: KL(p || pi), for "jsd" KL(p || M). Those of logps: under policy and reference; 0 for the label -1.
    """
    dtype = stats_dtype(logits, ref_logits)
    value = torch.empty(2 if apart else 1, len(labels), dtype=dtype, device=logits.device)
    stats, entropies = value.new_empty(5, len(labels)), value.new_empty(len(labels)) if entropy else None
    logps = value.new_empty(2, len(labels)) if tokens else None
    for rows in row_blocks(logits):
        tau, y = rows_of(temperature, rows), labels[rows]
        log_p, *p_stats = _normalised(_z(logits[rows], dtype, tau, softcap, logit_scale))
        log_q, *q_stats = _normalised(_z(ref_logits[rows], dtype, tau, ref_softcap, ref_logit_scale))
        masked = y == IGNORE_INDEX
        if apart:
            value[1, rows] = _banned(*((log_q, log_p) if kind == "forward_kl" else (log_p, log_q)))
        result, pull = _values(log_p, log_q, kind, mix, apart)
        stats[:, rows] = torch.stack([*p_stats, *q_stats, pull]).masked_fill_(masked, 0)
        value[0, rows] = _marked(result.masked_fill(masked, 0), y, logits)
        if logps is not None:
            logps[:, rows] = torch.stack([_label_logps(log_p, y), _label_logps(log_q, y)])
        if entropies is not None:
            entropies[rows] = _mean(log_p, log_p, FLOOR).neg_().masked_fill_(masked, 0)
    return value if apart else value[0], stats, logps, entropies


def _label_logps(log_p: Tensor, labels: Tensor) -> Tensor:
    """0 for a label that lives elsewhere, NaN for an invalid one."""
    found = log_p.gather(1, labels.long().clamp(0, log_p.shape[1] - 1)[:, None]).squeeze(1)
    return _marked(found.masked_fill_(labels < 0, 0), labels, log_p)


def mixture(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    *,
    mix: float = 0.5,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
) -> Tensor:
    """The two sums of "jsd", ``[2, N]``: ``sum pi ln(pi / M)`` and ``sum p ln(p / M)``.

    The columns may be any slab of the vocabulary that the maxima and logsums in ``stats`` were made of.
    """
    sums = stats.new_empty(2, len(labels))
    for rows in row_blocks(logits):
        tau, (p_max, p_logsum, q_max, q_logsum, _) = rows_of(temperature, rows), stats[:, rows, None]
        log_p = _z(logits[rows], stats.dtype, tau, softcap, logit_scale).sub_(p_max).sub_(p_logsum)
        log_q = _z(ref_logits[rows], stats.dtype, tau, ref_softcap, ref_logit_scale).sub_(q_max).sub_(q_logsum)
        p_over_m, q_over_m = _over_mixture(log_p, log_q, mix)
        both = torch.stack([_mean(log_q, q_over_m), _mean(log_p, p_over_m)])
        sums[:, rows] = _marked(both.masked_fill_(labels[rows] == IGNORE_INDEX, 0), labels[rows], logits)
    return sums


def _marked(values: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    """NaN where a label is out of range."""
    return values.masked_fill_(out_of_range(labels, logits.shape[1]), torch.nan)


def backward(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad: Tensor,
    coefficients: Coefficients | None = None,
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

    The coefficients add to dz what ``token_logps`` makes of them. Masked rows and rows with zeros only become zeros,
    unread. The columns may be any slab of the vocabulary that the statistics were made of.
    """
    dtype = stats.dtype
    for rows in row_blocks(logits):
        tau, y, d = rows_of(temperature, rows), labels[rows], grad[rows]
        p_max, p_logsum, q_max, q_logsum, pull = stats[:, rows, None]
        z = _z(logits[rows], dtype, tau, softcap, logit_scale)
        slope = slope_of(z, tau, softcap, logit_scale)
        q = _z(ref_logits[rows], dtype, tau, ref_softcap, ref_logit_scale)
        log_p, log_q = z.sub_(p_max).sub_(p_logsum), q.sub_(q_max).sub_(q_logsum)
        dz = _slopes(log_p, log_q, pull, kind, mix).mul_(_marked(d.clone(), y, logits)[:, None])
        skipped = (y == IGNORE_INDEX) | (d == 0)
        if coefficients is not None:
            part = pick(coefficients, rows)
            dz = dz.masked_fill_(d[:, None] == 0, 0).add_(row_gradients(log_p.clamp_(min=FLOOR), y, part))
            skipped = (y == IGNORE_INDEX) | (zero_rows(part) & (d == 0))
        out[rows] = dz.mul_(slope).masked_fill_(skipped[:, None], 0).to(out.dtype)


def _z(x: Tensor, dtype: torch.dtype, tau: float | Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    return scaled(x.double() if dtype == torch.float64 else x, tau, softcap, logit_scale)


def _normalised(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities in place of ``z``, max and logsum."""
    maximum = z.amax(-1)
    z.sub_(maximum[:, None])
    logsum = z.exp().sum(-1).log_()
    return z.sub_(logsum[:, None]), maximum, logsum


def _values(log_p: Tensor, log_q: Tensor, kind: str, mix: float, apart: bool) -> tuple[Tensor, Tensor]:
    """The divergence, ``apart`` from columns that the second stream bans, and the mean that backward subtracts."""
    if kind == "forward_kl":
        value = _kl(log_q, log_p, apart)
        return value, torch.zeros_like(value)
    if kind == "reverse_kl":
        value = _kl(log_p, log_q, apart)
        return value, value
    p_over_m, q_over_m = _over_mixture(log_p, log_q, mix)
    pull = _mean(log_p, p_over_m)
    return mix * _mean(log_q, q_over_m) + (1 - mix) * pull, pull


def _kl(log_a: Tensor, log_b: Tensor, apart: bool) -> Tensor:
    gap = log_a - log_b
    return _mean(log_a, gap.masked_fill_(log_b == -torch.inf, 0) if apart else gap)


def _banned(log_a: Tensor, log_b: Tensor) -> Tensor:
    """The largest ``ln a_v`` where b is 0. A row of b without any probability, whose ``ln b`` is NaN, bans all."""
    return torch.where((log_b == -torch.inf) | log_b.isnan(), log_a, -torch.inf).amax(-1)


def _mean(log_a: Tensor, x: Tensor, least: float = NEGLIGIBLE) -> Tensor:
    """``sum_v a_v x_v`` over the columns with a share: ``ln a_v`` is not below ``least``."""
    return torch.where(log_a < least, 0, log_a.exp() * x).sum(-1)


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
        return torch.where(log_p < NEGLIGIBLE, 0, (log_p - log_q).sub_(pull).mul_(p))
    p_over_m, _ = _over_mixture(log_p, log_q, mix)
    return torch.where(p == 0, 0, p_over_m.sub_(pull).mul_(p)).mul_(1 - mix)
