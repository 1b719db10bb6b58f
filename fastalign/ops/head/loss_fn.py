"""A user's loss of token log-probs: called on a chunk, checked, differentiated to one coefficient per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastalign.types import TokenStats

LossFn = Callable[[TokenStats], "Tensor | tuple[Tensor, dict[str, Tensor]]"]
Upstream = Mapping[str, "Tensor | None"]
"""Gradients ``[n]`` of what ``loss_fn`` may differentiate, by the field's name; None or absent is zero."""
DIFFERENTIABLE = ("logps", "entropy", "lse")


def evaluate(loss_fn: LossFn, stats: TokenStats, gradient: bool) -> tuple[Tensor, dict[str, Tensor], Upstream | None]:
    """The chunk's loss and metrics, detached, and its gradients per row (None when they are not wanted)."""
    if not gradient:
        loss, metrics = checked(loss_fn(stats))
        _refuse_captured_parameters(loss, [])
        return loss.detach(), metrics, None
    given = {name: getattr(stats, name) for name in DIFFERENTIABLE}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    with torch.enable_grad():
        loss, metrics = checked(loss_fn(replace(stats, **leaves)))
    _refuse_captured_parameters(loss, list(leaves.values()))
    if not loss.requires_grad:
        return loss.detach(), metrics, {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), metrics, dict(zip(leaves, grads, strict=True))


def checked(result: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``loss_fn`` returned as (loss, detached metrics)."""
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
