"""The per-token fields of a language model's head, from the ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.linear_logps import linear_logps, op_arguments, row_stats


@dataclass(frozen=True)
class Scaling:
    """How hidden states become z: ``softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


def head_fields(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scaling: Scaling, wanted: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1 of scored rows.

    ``ln p_y``, ``-sum p ln p``, ``ln sum p^2``, ``mean z`` and ``p_y = max p``; the first two are differentiable.

    Args:
        hidden: ``[N, D]``; the GEMM runs in its dtype, or autocast's.
        weight, bias, labels: ``[V, D]``, ``[V]`` or None, ``[N]``.
        scaling: of the logits.
        wanted: names of the fields; those not named are None, log_probs is always computed.

    Returns:
        Five tensors ``[N]`` or None; fp32 (fp64 if an input is fp64), is_top1 bool. A label tied for the largest logit
        counts as top-1.
    """
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype.itemsize > weight.dtype.itemsize:
        weight = weight.to(hidden.dtype)  # the ops would take the narrower of the two
    options = (scaling.softcap, scaling.logit_scale, None, None, None, False)
    args, trainable = op_arguments(hidden, weight, labels, bias, scaling.temperature, *options)
    logps, entropy, top1 = row_stats(args, "entropy" in wanted, trainable)
    rest: dict[str, Any] = {"is_top1": top1}
    with torch.no_grad():
        if "log_sum_sq_probs" in wanted:
            rest["log_sum_sq_probs"] = 2 * logps - _sharpened(hidden, weight, bias, labels, scaling)
        if "mean_logits" in wanted:
            rest["mean_logits"] = mean_logits(hidden, weight, bias, scaling)
    return logps, entropy, *(rest[name] if name in wanted else None for name in _REST)


_REST = ("log_sum_sq_probs", "mean_logits", "is_top1")


def _sharpened(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scaling: Scaling) -> Tensor:
    """Log-probs at half the temperature: ``2 z_y - ln sum exp 2z``, so that ``2 ln p_y`` minus it is ``ln sum p^2``."""
    options: dict[str, Any] = {"softcap": scaling.softcap, "logit_scale": scaling.logit_scale}
    logps = linear_logps(hidden, weight, labels, bias=bias, temperature=scaling.temperature / 2, **options)
    assert isinstance(logps, Tensor)
    return logps


def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> Tensor:
    """``mean_v z_v`` of each row ``[N]``; without a softcap the mean commutes with the projection: no GEMM."""
    slope = scaling.logit_scale / scaling.temperature
    if scaling.softcap is None:
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) * slope
    rows = max(1, SOFTCAP_ELEMENTS // weight.shape[0])
    cap, parts = scaling.softcap, [hidden.new_empty(0, dtype=torch.float32)]
    for part in hidden.split(rows):
        z = torch.nn.functional.linear(part, weight, bias).float() * (scaling.logit_scale / cap)
        parts.append(z.tanh_().mean(-1) * (cap / scaling.temperature))
    return torch.cat(parts)


SOFTCAP_ELEMENTS = 1 << 24
"""Logits that exist at once where a softcap stands between projection and mean."""
