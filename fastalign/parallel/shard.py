"""FSDP2 over the data-parallel mesh: each block is gathered when it runs, gradients are averaged over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fastalign.models import lora
from fastalign.models.precision import HALF
from fastalign.models.support import transformer_blocks
from fastalign.parallel.mesh import World
from fastalign.parallel.tensor import whole_layers

Module = TypeVar("Module", bound=nn.Module)


def shard(model: Module, world: World, *, bf16: bool = False, rests: bool = False) -> Module:
    """Shard ``model`` in place over the ranks: every transformer block, then the root with what is left.

    The model must be run through its own ``forward``, where the hooks are. One process needs no sharding and gets the
    model back untouched.

    Args:
        model: the same weights on every rank.
        world: the ranks.
        bf16: gather and compute in bf16. Weights stay in their own dtype; gradients are added up in fp32, as are those
            of weights in half precision.
        rests: keep each rank's shards in host memory; they are on the device only while their layer is gathered.

    Raises:
        ValueError: weights that FSDP cannot shard together.
    """
    if world.mesh is None:
        return model
    check_dtypes(model)
    half = bf16 or any(p.dtype in HALF for p in model.parameters() if p.requires_grad)
    computed, reduced = torch.bfloat16 if bf16 else None, torch.float32 if half else None
    known: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=reduced)}
    known["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if rests else OffloadPolicy()
    for block in transformer_blocks(model):
        fully_shard(block, mesh=world.data_mesh, **known)
    fully_shard(model, mesh=world.data_mesh, **known)
    if world.device.type == "cpu":  # else FSDP keeps what it gathered of a layer until the next one is there as well
        cast(FSDPModule, model)._set_unshard_async_op(True)
    return model


def check_dtypes(model: nn.Module) -> None:
    """Refuse quantised weights, and trainable ones of several dtypes, whose gradients FSDP reduces together."""
    if any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError("quantised weights cannot be sharded: leave model.quantization out, or run one process")
    trained = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    if len(trained) > 1:
        raise ValueError(
            f"trainable weights in {' and '.join(trained)} cannot be sharded together: set model.dtype to float32 "
            "(model.autocast still computes in bf16)"
        )


Read = Callable[[str, tuple[slice, ...], Tensor], Tensor]
"""Gives part of a tensor, by its name in the model: called with the name, the part, and the tensor without its data."""


@torch.no_grad()
def fill(model: nn.Module, read: Read, world: World, *, every: bool = False, rests: bool = False) -> None:
    """Put weights into a sharded model that was made on the meta device, one tensor at a time.

    FSDP takes up parameters that were replaced like this when the model first runs. All ranks ask for the tensors in
    one order.

    Args:
        model: sharded by `shard`.
        read: gives this rank's part of each tensor, on any device.
        world: the ranks.
        every: whether to read the tensors as well that have data already.
        rests: the parameters stay in host memory.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by what stood there, which stays alive meanwhile: tied ones stay one
    for name, owner, key in _places(model):
        x = owner[key]
        if id(x) in made:
            owner[key] = made[id(x)][1]
        elif x.is_meta:
            home = "cpu" if rests and isinstance(x, nn.Parameter) else world.device
            made[id(x)] = x, _with_data(x, read(name, region(x), x).to(home))
            owner[key] = made[id(x)][1]
        elif every:
            made[id(x)] = x, x
            (x.to_local() if isinstance(x, DTensor) else x).copy_(read(name, region(x), x))


def _with_data(x: Tensor, part: Tensor) -> Tensor:
    """A parameter or buffer like one on the meta device, with this rank's part of its data."""
    if isinstance(x, DTensor):
        layout: dict[str, Any] = {"shape": x.shape, "stride": x.stride()}
        part = DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, **layout)
    return nn.Parameter(part, x.requires_grad) if isinstance(x, nn.Parameter) else part


def _places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The name of every parameter and buffer, and where it is kept; tied ones at every place."""
    for place, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            yield from ((f"{place}.{key}", owner, key) for key, x in [*owner.items()] if x is not None)


def region(x: Tensor) -> tuple[slice, ...]:
    """The part of a tensor that is on this rank."""
    shape, offsets = x.shape, (0,) * x.dim()
    if isinstance(x, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


def base_digest(model: nn.Module, world: World) -> str:
    """`lora.base_digest` of a sharded model: every rank gives the elements that it has."""
    frozen = [(name, x.detach()) for name, x in model.named_parameters() if not x.requires_grad]
    ranks = world.gather_objects({name: _elements(x) for name, x in frozen})

    def whole(name: str) -> Tensor:
        places, values = (torch.cat(parts) for parts in zip(*(each[name] for each in ranks), strict=True))
        _, first = np.unique(places.numpy(), return_index=True)  # replicas have the same
        return values[torch.from_numpy(first)]

    return lora.sample(((name, x) for name, x in frozen), whole)


def _elements(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the elements that stand for a tensor those on this rank: their places in it and their values."""
    places = torch.tensor(lora.sampled_places(x))
    at, part = torch.unravel_index(places, x.shape), region(x)
    here = torch.ones_like(places, dtype=torch.bool)
    for index, own in zip(at, part, strict=True):
        here &= (index >= own.start) & (index < own.stop)
    local = x.to_local() if isinstance(x, DTensor) else x
    mine = tuple((index[here] - own.start).to(local.device) for index, own in zip(at, part, strict=True))
    return places[here], (local[mine] if mine else local.flatten()).cpu()


def synchronise_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks; off for all but the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without backward left gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep all weights of a sharded model whole on every rank meanwhile, so that forwards need no other rank.

    All ranks must enter it together; inside each runs as many forwards as it likes, without gradients. Layers that are
    split over the tensor axis are whole as well. A model that is not sharded, or is gathered already, is left as it is.
    """
    if not isinstance(model, FSDPModule) or vars(model).get("is_gathered"):
        yield
        return
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states = [module._get_fsdp_state() for module in modules]
    groups = [group for state in states for group in state._fsdp_param_groups]
    was = [state._auto_reshard_after_forward for state in states], [group.post_forward_mesh_info for group in groups]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        with whole_layers(model):
            model.is_gathered = True  # pyright: ignore
            yield
    finally:
        model.is_gathered = False  # pyright: ignore
        for state, automatic in zip(states, was[0], strict=True):
            state._auto_reshard_after_forward = automatic
        for group, mesh in zip(groups, was[1], strict=True):
            group.post_forward_mesh_info = mesh
            group.comm_ctx.post_forward_order.clear()  # of forwards that have no backward: the next would gather by it
            group._post_forward_indices.clear()
        for module in modules:
            module.reshard()
