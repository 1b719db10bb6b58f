"""Whole weights that train beside an adapter: in fp32 as it does, and rounded to the model's half precision where used.

That is what masters are to the weights of other runs, but in one tensor: FSDP shards no two dtypes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def raise_trained(model: nn.Module) -> None:
    """Raise the trained weights in half precision to fp32, in place; each forward rounds them to what they were.

    Those of a quantised layer, which rounds its bias itself, stay.
    """
    found = [(module, half) for module in model.modules() if (half := _trained_half(module))]
    for module, half in found:
        module.rounds_to = half  # pyright: ignore
        module.register_forward_pre_hook(_round)
        module.register_forward_hook(_put_back, always_call=True)
        for name in half:
            weight = module.get_parameter(name)
            weight.data = weight.data.float()  # a tied one stays one


def _trained_half(module: nn.Module) -> dict[str, torch.dtype]:
    own = dict(module.named_parameters(recurse=False))
    if not all(p.is_floating_point() for p in own.values()):
        return {}
    return {name: p.dtype for name, p in own.items() if p.requires_grad and p.dtype in HALF}


def _round(module: Any, _: Any) -> None:
    module._whole = {name: module._parameters[name] for name in module.rounds_to}
    module._parameters.update({name: x.to(module.rounds_to[name]) for name, x in module._whole.items()})


def _put_back(module: Any, *_: Any) -> None:
    module._parameters.update(module.__dict__.pop("_whole", {}))


def rounding(module: Any) -> Mapping[str, torch.dtype]:
    """What the raised weights of a module, or of the one that PEFT has put in its place, are rounded to, by name."""
    return getattr(module, "rounds_to", {})


def as_used(module: Any, name: str) -> Tensor | None:
    """A weight of a module as its forwards use it."""
    weight = getattr(module, name, None)
    return weight.to(rounding(module)[name]) if weight is not None and name in rounding(module) else weight


def used_dtype(module: Any) -> torch.dtype:
    """The dtype of a module's `weight` in its forwards."""
    return rounding(module).get("weight", module.weight.dtype)


def rounded(tensors: Mapping[str, Tensor], model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The tensors, those that are raised weights of a model, by their names after a prefix, rounded."""
    names = {
        f"{prefix}{owner}{'.' if owner else ''}{name}": dtype
        for owner, module in model.named_modules()
        for name, dtype in vars(module).get("rounds_to", {}).items()
    }
    return {name: x.to(names[name]) if name in names else x for name, x in tensors.items()}


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Let forwards use the weights of a model as they are."""
    kept = [(module, module.rounds_to) for module in model.modules() if "rounds_to" in vars(module)]
    try:
        for module, _ in kept:
            module.rounds_to = {}  # pyright: ignore
        yield
    finally:
        for module, was in kept:
            module.rounds_to = was  # pyright: ignore
