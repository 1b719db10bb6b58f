"""Calls the native CUDA kernel of ``policy_loss``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.ops.backends import cpp, cuda
from fastalign.ops.backends.cpp.policy_loss import ROWS, describe


def run(
    out: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    *rows: Tensor | None,
    cluster: int | None = None,
    **settings: Any,
) -> Tensor:
    """As ``cpp.policy_loss.run``, on CUDA tensors, in one launch.

    Args:
        cluster: how many blocks hold a row in their shared memory, a power of two; 0 reads rows twice; by default as
            many as the device needs. The bits are the same.
    """
    cpp.check(logits, labels, "cuda", cuda.DEVICE)
    op, table, _alive = describe(out, logits, labels, dict(zip(ROWS, rows, strict=True)), **settings)
    with cuda.on_stream(logits) as (kernels, stream):
        kernels.policy_loss(op, kernels.policy_loss_cluster(op) if cluster is None else cluster, stream)
    return table
