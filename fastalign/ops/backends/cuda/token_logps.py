"""The native CUDA sweeps of ``token_logps``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.backends import cpp, cuda
from fastalign.ops.backends.cpp.token_logps import new_stats
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
    """As ``cpp.token_logps.forward``, on CUDA tensors."""
    cpp.check(logits, labels, "cuda", cuda.DEVICE)
    outputs = new_stats(logits, entropy, total, top1)
    op, _alive = cpp.describe(logits, labels, temperature, softcap, logit_scale, outputs._asdict())
    with cuda.on_stream(logits) as (kernels, stream):
        blocks = kernels.blocks_per_row(*logits.shape)
        scratch = torch.empty(kernels.scratch(op) if blocks > 1 else 0, dtype=torch.uint8, device=logits.device)
        kernels.token_logps_forward(op, blocks, scratch.data_ptr(), stream)
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
    """As ``cpp.token_logps.backward``, on CUDA tensors; ``out`` may be the logits.

    The kernel writes the dtype that it reads: a narrower ``out`` is rounded from a gradient in place of the logits.
    """
    cpp.check(logits, labels, "cuda", cuda.DEVICE)
    cpp.check_out(out, logits, narrower=True)
    target = out if out.dtype == logits.dtype else logits
    inputs = cpp.vectors({"max": max, "logsum": logsum, **coefficients._asdict()}, logits)
    op, _alive = cpp.describe(logits, labels, temperature, softcap, logit_scale, inputs, target)
    with cuda.on_stream(logits) as (kernels, stream):
        kernels.token_logps_backward(op, kernels.blocks_per_row(*logits.shape), stream)
    if target is not out:
        out.copy_(target)
