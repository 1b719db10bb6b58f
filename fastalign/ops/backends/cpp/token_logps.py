"""The native sweeps of ``token_logps`` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.checks import stats_dtype
from fastalign.ops.rows import Coefficients, Stats


def forward(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    total: bool = False,
    top1: bool = False,
) -> Stats:
    """Log-probs of the labels and the row statistics that the backward needs, in one read of the logits.

    ``z = softcap(logit_scale * logits) / temperature``, ``max = max_v z_v``, ``logsum = ln sum_v exp(z_v - max)``,
    ``logps = (z_y - max) - logsum``, ``entropy = logsum - sum_v p_v (z_v - max)`` in nats,
    ``total = sum_v (z_v - max)``, ``top1 = 1`` where the label is the first column whose z is max, else 0.

    Args:
        logits: ``[N, V]`` fp32, bf16 or fp16 on the CPU, of any strides.
        labels: ``[N]`` int32 or int64; -100: row not scored (never read, all outputs 0); -1: the label is elsewhere
            (logps 0); any other label outside ``[0, V)`` gives NaN.
        temperature: a float or ``[N]``.
        softcap: ``cap * tanh(x / cap)`` when given.
        logit_scale: factor on the logits before the softcap.
        entropy, total, top1: whether to compute them.

    Returns:
        ``(logps, entropy or None, max, logsum, total or None, top1 or None)``: ``[N]`` fp32.

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    cpp.check(logits, labels)
    outputs = new_stats(logits, entropy, total, top1)
    op, _alive = cpp.describe(logits, labels, temperature, softcap, logit_scale, outputs._asdict())
    op.forward(torch.get_num_threads())
    return outputs


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
    """Write the gradient of the logits into ``out``, which may be the logits themselves.

    ``dz_v = g (1[v=y] - p_v) + p_v (alpha + beta ln p_v) + delta`` and
    ``d logits = dz * logit_scale / temperature * (1 - tanh^2)``, the last factor under a softcap. Rows that are not
    scored, or whose coefficients are zero, are zeros without their logits being read.

    Args:
        out: ``[N, V]`` of the dtype of the logits, of fp32 logits also bf16 or fp16; of any strides.
        logits, labels, temperature, softcap, logit_scale: as in ``forward``.
        max, logsum: ``[N]`` from ``forward``.
        coefficients: ``[N]`` each; None is 0 everywhere and costs nothing.

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    cpp.check(logits, labels)
    cpp.check_out(out, logits, narrower=True)
    inputs = cpp.vectors({"max": max, "logsum": logsum, **coefficients._asdict()}, logits)
    op, _alive = cpp.describe(logits, labels, temperature, softcap, logit_scale, inputs, out)
    op.backward(torch.get_num_threads())


def new_stats(logits: Tensor, entropy: bool, total: bool, top1: bool) -> Stats:
    """Fresh memory for the statistics, on the device of the logits."""
    rows, new = logits.shape[0], {"dtype": stats_dtype(logits), "device": logits.device}
    logps, maximum, logsum = torch.empty(rows, **new), torch.empty(rows, **new), torch.empty(rows, **new)
    h, t = torch.empty(rows, **new) if entropy else None, torch.empty(rows, **new) if total else None
    return Stats(logps, h, maximum, logsum, t, torch.empty(rows, **new) if top1 else None)
