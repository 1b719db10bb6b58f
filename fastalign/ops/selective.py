"""TRL's spellings of ``token_logps``, for any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.token_logps import token_logps


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """``log_softmax(logits).gather(-1, index)`` without the softmax, for any leading dimensions.

    Args:
        logits: ``[..., V]``.
        index: ``[...]``, or ``[..., K]`` for K log-probs per position.

    Returns:
        The shape of ``index``, fp32 (fp64 for fp64 logits).

    >>> selective_log_softmax(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])).shape
    torch.Size([1, 3])
    """
    if index.dim() == logits.dim() and index.shape[:-1] == logits.shape[:-1]:
        return torch.stack([selective_log_softmax(logits, column) for column in index.unbind(-1)], -1)
    if index.shape != logits.shape[:-1]:
        raise ValueError(
            f"index must be [...] or [..., K] for logits [..., V]; "
            f"got index {list(index.shape)}, logits {list(logits.shape)}"
        )
    logps = token_logps(logits.reshape(-1, logits.shape[-1]), index.reshape(-1))
    assert isinstance(logps, Tensor)
    return logps.view(index.shape)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of ``softmax(logits)`` over the last dimension: ``[..., V]`` to ``[...]``, differentiable.

    >>> entropy_from_logits(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """
    flat = logits.reshape(-1, logits.shape[-1])
    labels = torch.zeros(flat.shape[0], dtype=torch.int64, device=logits.device)
    return token_logps(flat, labels, entropy=True)[1].view(logits.shape[:-1])
