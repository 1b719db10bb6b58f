"""The native kernels of ``divergence`` behind tensors: checks, memory, addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.rows import Coefficients

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


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
    """The divergence of each pair of rows in one read of both (two for "jsd"); see the torch backend for the contract.

    Args:
        logits, ref_logits: ``[N, V]`` on the CPU, of any dtypes and strides.
        labels: ``[N]``; -100: the row is never read.

    Returns:
        value ``[N]``, with ``apart`` ``[2, N]``, stats ``[5, N]``, logps ``[2, N]`` or None, entropy ``[N]`` or None,
        in fp32.

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    _check(logits, ref_logits, labels)
    value = torch.empty((2, len(labels)) if apart else len(labels))
    stats, entropies = value.new_empty(5, len(labels)), value.new_empty(len(labels)) if entropy else None
    logps = torch.empty(2, len(labels)) if tokens else None
    ours, theirs = (None, None) if logps is None else logps
    outputs = {"logps": ours, "entropy": entropies}
    policy, _alive = cpp.describe(logits, labels, temperature, softcap, logit_scale, outputs)
    reference, _also = cpp.describe(ref_logits, labels, temperature, ref_softcap, ref_logit_scale, {"logps": theirs})
    op = _describe(policy, reference, kind, mix, stats, value=value.data_ptr(), apart=apart)
    op.forward(torch.get_num_threads())
    return value, stats, logps, entropies


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
    """The second read of "jsd", over columns that may be a slab of the vocabulary; see the torch backend.

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    _check(logits, ref_logits, labels)
    stats, sums = (
        cpp.vector("stats", stats.reshape(-1), 5 * len(labels), torch.float32),
        torch.empty(2, len(labels)),
    )
    policy, _alive = cpp.describe(logits, labels, temperature, softcap, logit_scale, {})
    reference, _also = cpp.describe(ref_logits, labels, temperature, ref_softcap, ref_logit_scale, {})
    _describe(policy, reference, "jsd", mix, stats, value=sums.data_ptr()).mixture(torch.get_num_threads())
    return sums


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
    """Write the gradient of the logits into ``out``, which may be the logits themselves; see the torch backend.

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    _check(logits, ref_logits, labels)
    cpp.check_out(out, logits)
    grad = cpp.vector("grad", grad, len(labels), torch.float32)
    stats = cpp.vector("stats", stats.reshape(-1), 5 * len(labels), torch.float32)
    given = {} if coefficients is None else coefficients._asdict()
    row = {name: cpp.vector(name, x, len(labels), torch.float32) for name, x in given.items() if x is not None}
    policy, _alive = cpp.describe(logits, labels, temperature, softcap, logit_scale, row, out)
    reference, _also = cpp.describe(ref_logits, labels, temperature, ref_softcap, ref_logit_scale, {})
    _describe(policy, reference, kind, mix, stats, grad_value=grad.data_ptr()).backward(torch.get_num_threads())


def _check(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> None:
    """Shapes, dtypes and devices are right."""
    cpp.check(logits, labels)
    cpp.check(ref_logits, labels)
    if logits.shape != ref_logits.shape:
        raise ValueError(f"ref_logits must be {tuple(logits.shape)} like the logits, got {tuple(ref_logits.shape)}")


def _describe(policy: Any, reference: Any, kind: str, mix: float, stats: Tensor, **vectors: int) -> Any:
    from fastalign import _C

    return _C.Divergence(
        policy=policy, reference=reference, kind=KINDS[kind], mix=mix, stats=stats.data_ptr(), **vectors
    )
