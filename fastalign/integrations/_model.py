"""What the integrations ask of a Hugging Face causal LM: its parts, and its head's weight inside the head's hooks."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

ON_HEAD = "_fastalign_on_head"


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
    """``function(hidden, weight, bias, *args)``, run as a forward of the LM head.

    An FSDP2 head of its own gathers its weight for the call and for its backward, as it does for its forward. Head and
    weight are looked up at each call: FSDP and PEFT replace them.
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(head, FSDPModule):
        return _call(head, function, hidden, *args)
    module: Any = head
    if ON_HEAD not in vars(module):
        setattr(module, ON_HEAD, MethodType(_call, module))
        register_fsdp_forward_method(module, ON_HEAD)
    return getattr(module, ON_HEAD)(function, hidden, *args)


def _call(head: nn.Module, function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    return function(hidden, *head_parameters(head), *args)


def head_parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the LM head, active PEFT adapters included.

    Of a LoRA head the weight is ``W + scaling B A``, built at each call and differentiable.

    Raises:
        ValueError: a head that is no linear map, and adapters that are no fixed addition to its weight.
    """
    if not hasattr(head, "base_layer"):
        if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.dim() != 2:
            raise ValueError(f"the LM head must be a linear layer with a weight [V, D], got {type(head).__name__}")
        return head.weight, getattr(head, "bias", None)
    weight, bias = head_parameters(head.get_base_layer())
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        weight = weight + _added(head, name)
    return weight, bias


def _added(head: Any, name: str) -> Tensor:
    """What one LoRA adapter adds to the weight."""
    if name not in getattr(head, "lora_A", ()) or getattr(head, "lora_variant", {}).get(name) is not None:
        raise ValueError(f"the adapter {name!r} of the LM head is not plain LoRA; leave the head out of target_modules")
    if head.training and getattr(head.lora_dropout[name], "p", 0.0) > 0:
        raise ValueError(f"the adapter {name!r} of the LM head has dropout, which is not served: set lora_dropout to 0")
    return head.get_delta_weight(name)
