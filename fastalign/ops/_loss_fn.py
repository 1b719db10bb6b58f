"""A user's loss of token log-probs: called on a chunk, checked, differentiated to one coefficient per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastalign.types import TokenStats

LossFn = Callable[[TokenStats], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


def evaluate(
    loss_fn: LossFn, stats: TokenStats, gradient: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None]:
    """The chunk's loss and metrics, detached; coefficients per row for logps and entropy (None: no gradient)."""
    if not gradient:
        loss, metrics = checked(loss_fn(stats))
        _refuse_captured_parameters(loss, [])
        return loss.detach(), metrics, None, None
    logps = stats.logps.detach().requires_grad_()
    entropy = None if stats.entropy is None else stats.entropy.detach().requires_grad_()
    with torch.enable_grad():
        loss, metrics = checked(loss_fn(replace(stats, logps=logps, entropy=entropy)))
    leaves = [leaf for leaf in (logps, entropy) if leaf is not None]
    grads: list[Tensor | None] = [None] * len(leaves)
    _refuse_captured_parameters(loss, leaves)
    if loss.requires_grad:
        grads = list(torch.autograd.grad(loss, leaves, allow_unused=True))
    g = torch.zeros_like(logps) if grads[0] is None else grads[0]
    return loss.detach(), metrics, g, grads[1] if entropy is not None else None


def checked(result: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a floating scalar tensor (or it and a dict of metric sums), got {got}")
    return loss, {name: torch.as_tensor(value).detach() for name, value in metrics.items()}


def _refuse_captured_parameters(loss: Tensor, leaves: list[Tensor]) -> None:
    """A trainable tensor inside loss_fn would silently get no gradient: coefficients are all that leaves a chunk."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                f"loss_fn uses a trainable tensor of shape {list(variable.shape)} besides the stats; it would get no "
                "gradient. Detach it, or use linear_logps, which composes with autograd"
            )
        stack.extend(parent for parent, _ in node.next_functions)
