"""What the integrations ask of a Hugging Face causal LM: its parts, and its head inside the head's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

ON_HEAD = "_fastalign_on_head"


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


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, below a PEFT wrapper if there is one.

    Raises:
        ValueError: anything else, a DDP or accelerate wrapper for instance.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is None:
        raise ValueError(
            f"expected a Hugging Face causal LM or a PEFT model of one, got {type(model).__name__}: "
            "pass the model itself, before DDP, FSDP or accelerate wrap it"
        )
    return base


def on_head(model: PreTrainedModel, function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    """``function(hidden, head, *args)``, run as a forward of the LM head.

    An FSDP2 head of its own gathers its weight for the call and for its backward, as it does for its forward. The head
    is looked up at each call: FSDP and PEFT replace it.
    """
    module: Any = model.get_output_embeddings()
    if not isinstance(module, FSDPModule):
        return _call(module, function, hidden, *args)
    sharded: Any = module
    if ON_HEAD not in vars(sharded):
        setattr(sharded, ON_HEAD, MethodType(_call, sharded))
        register_fsdp_forward_method(sharded, ON_HEAD)
    return getattr(sharded, ON_HEAD)(function, hidden, *args)


def _call(module: nn.Module, function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    return function(hidden, head_of(module), *args)


def head_of(module: Any) -> Head:
    """The parameters of an LM head module, active LoRA adapters included.

    Raises:
        ValueError: a head that is no linear map, and adapters that are no low-rank addition to its weight.
    """
    if hasattr(module, "base_layer"):
        head = head_of(module.get_base_layer())
        if module.disable_adapters or module.merged:
            return head
        return head._replace(lora=_together([_adapter(module, name) for name in module.active_adapters]))
    if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.dim() != 2:
        raise ValueError(f"the LM head must be a linear layer with a weight [V, D], got {type(module).__name__}")
    return Head(module.weight, getattr(module, "bias", None))


def _adapter(module: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of one active adapter."""
    known = name in getattr(module, "lora_A", ()) and getattr(module, "lora_variant", {}).get(name) is None
    if not known or module.fan_in_fan_out or module.lora_B[name].bias is not None:
        raise ValueError(f"the adapter {name!r} of the LM head is not plain LoRA; leave the head out of target_modules")
    if module.training and getattr(module.lora_dropout[name], "p", 0.0) > 0:
        raise ValueError(f"the adapter {name!r} of the LM head has dropout, which is not served: set lora_dropout to 0")
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])


def _together(adapters: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float] | None:
    """Several adapters as one of the sum of their ranks."""
    if len(adapters) < 2:
        return adapters[0] if adapters else None
    down = torch.cat([a for a, _, _ in adapters])
    return down, torch.cat([b * scale for _, b, scale in adapters], 1), 1.0
