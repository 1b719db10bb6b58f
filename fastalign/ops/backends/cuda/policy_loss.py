"""The native CUDA kernel of ``policy_loss`` behind tensors."""

from __future__ import annotations

from torch import Tensor

from fastalign.ops.backends import cpp, cuda
from fastalign.ops.backends.cpp.policy_loss import describe
from fastalign.ops.functors import Knobs


def run(
    out: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    loss: str,
    kl_estimator: str,
    knobs: Knobs,
    entropy: bool,
    temperature: float | Tensor,
    softcap: float | None,
    cluster: int | None = None,
) -> Tensor:
    """As ``cpp.policy_loss.run``, on CUDA tensors, in one launch.

    Args:
        cluster: how many blocks hold a row in their shared memory, a power of two; 0 reads rows twice; by default as
            many as the device needs. The bits are the same.
    """
    cpp.check(logits, labels, "cuda", cuda.DEVICE)
    rows = {"weights": weights, "advantages": advantages, "old_logps": old_logps, "ref_logps": ref_logps}
    scaling = {"temperature": temperature, "softcap": softcap}
    settings = {"loss": loss, "kl_estimator": kl_estimator, "knobs": knobs, "entropy": entropy}
    op, table, _alive = describe(out, logits, labels, rows, **settings, **scaling)
    with cuda.on_stream(logits) as (kernels, stream):
        kernels.policy_loss(op, kernels.policy_loss_cluster(op) if cluster is None else cluster, stream)
    return table
