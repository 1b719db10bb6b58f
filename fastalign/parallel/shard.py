"""FSDP2 over the data-parallel mesh: each block is gathered when it runs, gradients are averaged over all ranks."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastalign.models.precision import HALF
from fastalign.models.support import transformer_blocks
from fastalign.parallel.mesh import World

Module = TypeVar("Module", bound=nn.Module)


def shard(model: Module, world: World, *, bf16: bool = False) -> Module:
    """Shard ``model`` in place over the ranks: every transformer block, then the root with what is left.

    The model must be run through its own ``forward``, where the hooks are. One process needs no sharding and gets the
    model back untouched.

    Args:
        model: the same weights on every rank.
        world: the ranks.
        bf16: gather and compute in bf16. Weights stay in their own dtype; gradients are added up in fp32, as are those
            of weights in half precision.

    Raises:
        ValueError: weights that FSDP cannot shard together.
    """
    if world.mesh is None:
        return model
    check_dtypes(model)
    half = bf16 or any(p.dtype in HALF for p in model.parameters() if p.requires_grad)
    computed, reduced = torch.bfloat16 if bf16 else None, torch.float32 if half else None
    precision = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=reduced)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=world.mesh, mp_policy=precision)
    fully_shard(model, mesh=world.mesh, mp_policy=precision)
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


def synchronise_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks; off for all but the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without backward left gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()
