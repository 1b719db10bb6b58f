"""verl's fused log-prob functions on fastalign's head: the same signatures, shapes and outputs.

With ``actor_rollout_ref.model.use_fused_kernels=True`` verl's patched forwards import, at every call, either
``FusedLinearForPPO`` from ``verl.utils.experimental.torch_functional`` (torch backend) or ``linear_cross_entropy`` from
``verl.utils.kernel.linear_cross_entropy`` (triton backend). ``patch()`` replaces both names until it is undone.

Beside verl's own: log-probs are fp32 in both backends, the vocabulary needs no multiple of 1024, and a CPU will do.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastalign.integrations._patch import Patch
from fastalign.ops import linear_logps

__all__ = ["FusedLinearForPPO", "Patch", "linear_cross_entropy", "patch"]


class FusedLinearForPPO(nn.Module):
    """``verl.utils.experimental.torch_functional.FusedLinearForPPO``.

    Args:
        chunk_size, impl_backend: accepted and not used; the chunks are planned.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each label and entropy in nats, differentiable.

        Args:
            hidden_states: ``[N, D]`` or ``[B, S, D]``.
            vocab_weights: ``[V, D]``.
            input_ids: ``[N]`` or ``[B, S]`` labels, already rolled by one.
            temperature: a number, a tensor of one element, or one per token.

        Returns:
            log_probs in fp32 and entropy in the dtype of ``hidden_states``, in the shape of ``input_ids``.

        Raises:
            ValueError: as ``linear_logps``.
        """
        tau = _temperature(temperature, input_ids)
        log_probs, entropy = _rows(hidden_states, vocab_weights, input_ids, tau)
        return log_probs.view(input_ids.shape), entropy.view(input_ids.shape).to(hidden_states.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``: log-probs (their sign is not turned), entropy.

    Args:
        hidden: ``[N, D]`` or ``[B, S, D]``.
        weight: ``[V, D]``, or this rank's columns of it.
        labels: as many as rows, already rolled by one; of the whole vocabulary.
        temperature: a positive number.
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: the ranks that share the vocabulary. The gradient of ``hidden`` is then a part, as verl
            sums it over the ranks; outputs are complete.

    Returns:
        log-probs (reduced) and entropy ``[B * S]``, fp32, differentiable.

    Raises:
        ValueError: another reduction; else as ``linear_logps``.
    """
    name = (reduction or "none").lower()
    if name not in ("none", "sum", "mean"):
        raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
    tau = 1.0 if temperature is None else float(temperature)
    if dist_process_group is not None:
        hidden = cast(Tensor, _Shared.apply(hidden, torch.distributed.get_world_size(dist_process_group)))
    log_probs, entropy = _rows(hidden, weight, labels, tau, dist_process_group)
    return log_probs if name == "none" else getattr(log_probs, name)(), entropy


class _Shared(torch.autograd.Function):
    """Each rank's share of a gradient that the caller sums over ``size`` ranks; ours is complete on every one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int) -> Tensor:
        ctx.size = size
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.size, None


def patch() -> Patch:
    """Routes verl's fused log-probs and entropies through ``linear_logps``, in both of its backends.

    Returns:
        A handle with ``undo``, which is a context manager too.

    Raises:
        ImportError: verl is not installed.
    """
    return Patch(
        {
            ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"): FusedLinearForPPO,
            ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"): linear_cross_entropy,
        }
    )


def _rows(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Any, group: Any = None) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of flattened rows."""
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    options = {"temperature": temperature, "process_group": group}
    logps, entropy = linear_logps(rows, weight, targets, entropy=True, **options)
    return logps, entropy


def _temperature(temperature: float | Tensor, labels: Tensor) -> float | Tensor:
    """A number or ``[N]``; of a tensor with one element each row's, without waiting for its value."""
    if not isinstance(temperature, Tensor):
        return float(temperature)
    rows = temperature.detach().float().reshape(-1)
    return rows.expand(labels.numel()).contiguous() if rows.numel() == 1 else rows
