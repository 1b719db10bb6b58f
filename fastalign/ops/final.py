"""Gradients that cannot be differentiated again: under ``create_graph`` they say so, where they would give zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def mark(op: str, grad: Tensor, *sources: Tensor) -> Tensor:
    """The gradient as a function of ``sources`` whose own backward raises RuntimeError, naming ``op``."""
    return _Final.apply(op, grad, *sources)


def final(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the ``backward`` of an autograd Function whose gradients read its saved tensors and what came upstream.

    torch's own ``once_differentiable`` raises only where the upstream gradient needs one itself, as of ``square``; of
    a ``sum`` it gives a gradient that looks like a constant.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> Any:
            with torch.no_grad():
                made = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return made
            read = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
            marked = (x if x is None or not read else mark(op, x, *read) for x in as_tuple(made))
            return tuple(marked) if isinstance(made, tuple) else next(marked)

        return run

    return decorate


def no_double_backward(_ctx: Any, *_: Any) -> Any:
    """The backward of a custom op that computes gradients."""
    raise RuntimeError("fastalign ops do not support double backward: their gradients are final")


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One gradient, or several."""
    return value if isinstance(value, tuple) else (value,)


class _Unsaved:
    """The context of a forward that has no backward."""

    def save_for_backward(self, *_: Tensor) -> None:
        """Keep nothing."""


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``; where nothing is differentiated without autograd, whose calls cost 10 us each.

    That is a tenth of the time in which a small model samples.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*arguments)
    return function.forward(_Unsaved(), *arguments)


class _Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.op} does not support double backward: its gradients are final")
