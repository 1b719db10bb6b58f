"""The per-token fields that TRL asks of a language model's head, from the ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.models.head import Head
from fastalign.ops.head.head import Wanted
from fastalign.ops.head.options import make_call
from fastalign.ops.linear_logps import linear_logps, row_stats

SOFTCAP_ELEMENTS = 1 << 24
"""Logits that exist at once where a softcap is applied between projection and mean."""


@dataclass(frozen=True)
class Scaling:
    """How hidden states become z: ``softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``."""

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def options(self, temperature: float) -> dict[str, Any]:
        """Those of the linear ops, at a temperature."""
        return {"temperature": temperature, "softcap": self.softcap, "logit_scale": self.logit_scale}


def head_fields(
    hidden: Tensor, head: Head, labels: Tensor, scaling: Scaling, wanted: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1 of scored rows.

    ``ln p_y``, ``-sum p ln p``, ``ln sum p^2``, ``mean z`` and ``y = argmax z``; the first two are differentiable.

    Args:
        hidden: ``[N, D]``; the GEMM runs in its dtype, or autocast's.
        head: without an adapter, which TRL refuses.
        labels: ``[N]``, every one scored.
        scaling: of the logits.
        wanted: names of the fields; those not named are None, log_probs is always computed.

    Returns:
        Five tensors ``[N]`` or None; fp32 (fp64 if an input is fp64), is_top1 bool. Of equal logits the first is the
        choice, as in ``torch.argmax``.
    """
    assert head.lora is None
    weight = head.weight
    if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype.itemsize > weight.dtype.itemsize:
        weight = weight.to(hidden.dtype)  # the ops would take the narrower of the two
    options = {"bias": head.bias, "num_scored": len(labels), **scaling.options(scaling.temperature)}
    call, trainable = make_call("linear_logps", hidden, weight, labels, options, {})
    logps, entropy, _, top1 = row_stats(call, Wanted("entropy" in wanted, lse=False), trainable)
    sum_sq = mean = None
    with torch.no_grad():
        if "log_sum_sq_probs" in wanted:
            # at half the temperature ln p_y is 2 z_y - ln sum exp 2z
            halved: Any = linear_logps(
                hidden, weight, labels, bias=head.bias, **scaling.options(scaling.temperature / 2)
            )
            sum_sq = 2 * logps - halved
        if "mean_logits" in wanted:
            mean = mean_logits(hidden, weight, head.bias, scaling)
    return logps, entropy, sum_sq, mean, top1 if "is_top1" in wanted else None


def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> Tensor:
    """``mean_v z_v`` of each row ``[N]``; without a softcap the mean commutes with the projection: no GEMM."""
    slope, cap = scaling.logit_scale / scaling.temperature, scaling.softcap
    if cap is None:
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) * slope
    parts = [hidden.new_empty(0, dtype=torch.float32)]
    for part in hidden.split(max(1, SOFTCAP_ELEMENTS // weight.shape[0])):
        z = torch.nn.functional.linear(part, weight, bias).float() * (scaling.logit_scale / cap)
        parts.append(z.tanh_().mean(-1) * (cap / scaling.temperature))
    return torch.cat(parts)
