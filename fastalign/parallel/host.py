"""Host memory: copies there, and frozen weights that are on the device only while their layer runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastalign.models.support import transformer_blocks


def rest(model: nn.Module, device: torch.device, beside: Iterable[nn.Parameter] = ()) -> None:
    """Keep a model's weights on the host from now on; its forward runs on the device as before.

    Each transformer block comes in when it runs and leaves when it has run, what is in no block for the whole forward.
    Nothing is copied back, so that the weights must not train. Buffers stay where they are.

    Args:
        model: frozen, not sharded; it is called, not its parts.
        device: where it runs.
        beside: weights of other models; those that are shared with them stay on the device.
    """
    shared = {id(p) for p in beside}
    blocks = transformer_blocks(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    places = [(block, [*block.parameters()]) for block in blocks]
    places.append((model, [p for p in model.parameters() if id(p) not in inside]))
    for module, weights in places:
        visit(module, [p for p in weights if id(p) not in shared], device)


def visit(module: nn.Module, weights: list[nn.Parameter], device: torch.device) -> None:
    """Bring a module's weights to the device for the length of its forward, however it ends."""
    homes = [home_of(weight, device) for weight in weights]

    def arrive(*_: Any) -> None:
        for weight, home in zip(weights, homes, strict=True):
            weight.data = home.to(device, non_blocking=True, copy=True)

    def leave(*_: Any) -> None:
        for weight, home in zip(weights, homes, strict=True):
            weight.data = home

    leave()
    module.register_forward_pre_hook(arrive)
    module.register_forward_hook(leave, always_call=True)


def home_of(weight: nn.Parameter, device: torch.device) -> Tensor:
    """A weight's numbers in host memory, pinned where a GPU reads them."""
    if weight.requires_grad:
        raise ValueError("weights that train cannot rest on the host: what they learn would be lost")
    home = weight.detach().cpu()
    return home.pin_memory() if device.type == "cuda" else home


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory; from a GPU it is pinned and under way: synchronise before it is read."""
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return copy.copy_(x, non_blocking=True)


def placed(part: Tensor, like: Tensor) -> Tensor:
    """A rank's part as a part of what it is like; `DTensor.from_local` would move it to the device of the mesh."""
    return DTensor(part, like._spec, requires_grad=False) if isinstance(like, DTensor) else part  # pyright: ignore
