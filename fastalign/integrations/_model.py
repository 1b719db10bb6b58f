"""What the integrations ask of a Hugging Face causal LM: its parts, and its head inside the head's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from fastalign.models.head import head_of

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
