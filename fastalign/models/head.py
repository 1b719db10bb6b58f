"""The LM head of a Hugging Face model as the linear ops take it: plain, wrapped by PEFT, with LoRA adapters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.models.raised import as_used


class Head(NamedTuple):
    """An LM head as the linear ops take it.

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]``.
        lora: the active adapters ``(A [r, D], B [V, r], scale)``.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None


def head_of(module: Any) -> Head:
    """The parameters of an LM head module, active LoRA adapters included.

    Adapters that are switched off stay, with scale 0: the ops then cut the same chunks as with them, so that an adapter
    that adds nothing yet gives the same bits on and off.

    Raises:
        ValueError: a head that is no linear map of floating-point weights, and adapters that are no low-rank addition
            to its weight.
    """
    if hasattr(module, "token_adapter"):
        raise ValueError("single tokens of the LM head train, which is not served: leave trainable_token_indices out")
    if hasattr(module, "base_layer"):
        head = head_of(module.get_base_layer())
        adapters = [] if module.merged else [_adapter(module, name) for name in module.active_adapters]
        return head._replace(lora=_together(adapters))
    weight = as_used(module, "weight")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"the LM head must be a linear layer with a weight [V, D], got {type(module).__name__}")
    return Head(weight, as_used(module, "bias"))


def unwrapped(module: Any) -> nn.Module:
    """The head below what PEFT put around it."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    return module if inner is None else unwrapped(inner)


def scores(hidden: Tensor, weight: Tensor, labels: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``[N]`` outputs of a scalar head, in fp32 whatever computes the backbone; called as other head functions are."""
    with torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        shift = None if bias is None else bias.to(wide)
        return torch.nn.functional.linear(hidden.to(wide), weight.to(wide), shift)[:, 0]


def _adapter(module: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of one active adapter."""
    known = name in getattr(module, "lora_A", ()) and getattr(module, "lora_variant", {}).get(name) is None
    if not known or module.fan_in_fan_out or module.lora_B[name].bias is not None:
        raise ValueError(f"the adapter {name!r} of the LM head is not plain LoRA; leave the head out of target_modules")
    if module.training and getattr(module.lora_dropout[name], "p", 0.0) > 0:
        raise ValueError(f"the adapter {name!r} of the LM head has dropout, which is not served: set lora_dropout to 0")
    scale = 0.0 if module.disable_adapters else float(module.scaling[name])
    return module.lora_A[name].weight, module.lora_B[name].weight, scale


def _together(adapters: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float] | None:
    """Several adapters as one of the sum of their ranks."""
    if len(adapters) < 2:
        return adapters[0] if adapters else None
    down = torch.cat([a for a, _, _ in adapters])
    return down, torch.cat([b * scale for _, b, scale in adapters], 1), 1.0
