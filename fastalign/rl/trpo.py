"""Trust-region policy optimisation: the product of the Fisher matrix with a vector, in the space of logits."""

from __future__ import annotations

from torch import Tensor


def fisher_vector_product(logits: Tensor, vector: Tensor) -> Tensor:
    """``p (u - sum_v p_v u_v)`` per row, with ``p = softmax(logits)``: the Hessian of KL(old || new) at old = new.

    The product over parameters is ``J^T (this) (J x)``, a forward and a backward derivative of the logits around it.
    Source: Schulman et al. 2015 (arXiv:1502.05477), appendix C.

    Args:
        logits: ``[N, V]``.
        vector: ``[N, V]`` direction in the space of logits.

    Returns:
        ``[N, V]``, detached.
    """
    p = logits.detach().softmax(-1)
    return p * (vector - (p * vector).sum(-1, keepdim=True))
