"""The global gradient norm and clipping, for plain tensors and for shards on any mesh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def clip_gradients(parameters: Iterable[Tensor], clip_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most ``clip_norm``; 0 only measures.

    ``g <- g * min(1, clip_norm / norm)``. Nothing is read back from the device.

    Args:
        parameters: those with gradients, plain or DTensor, on one mesh or on several.
        clip_norm: the limit.

    Returns:
        ``[]`` fp64 norm before clipping, the same on every rank; not finite when any gradient is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(gradients)
    if clip_norm > 0 and gradients:
        torch._foreach_mul_([local(g) for g in gradients], (clip_norm / norm).clamp(max=1.0).float())  # pyright: ignore
    return norm


def global_norm(tensors: list[Tensor]) -> Tensor:
    """2-norm over all elements of all tensors; each shard is counted on its rank, each replica once."""
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[layout_of(tensor)].append(tensor)
    squares = [sum_of_squares(group) for group in groups.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def layout_of(tensor: Tensor) -> tuple:
    """Mesh and placements of a DTensor; empty for a plain tensor.

    Raises:
        ValueError: a sum that has not been taken over its ranks yet: squares of its parts do not add up to its square.
    """
    if not isinstance(tensor, DTensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"expected reduced gradients, got one with placements {tensor.placements}: redistribute first")
    return tensor.device_mesh, tensor.placements


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """``[]`` fp64 over tensors of one mesh and placement, summed over the mesh dimensions that shard them."""
    return over_shards(squares_here(tensors), layout_of(tensors[0]))


def squares_here(tensors: list[Tensor]) -> Tensor:
    """``[]`` fp64 of what this rank has of them."""
    # In fp32 the norm of 2M elements is off by 3e-5 on CPU, which would make clipping depend on how they are sharded.
    mine = [local(t) for t in tensors]
    if mine[0].is_cuda:
        return torch.stack(torch._foreach_norm(mine, ord=2, dtype=torch.float64)).square().sum()  # pyright: ignore
    return torch.stack([row_squares(t) for t in mine]).sum()


def over_shards(total: Tensor, layout: tuple) -> Tensor:
    """A sum over this rank's parts of tensors, in place that over all parts."""
    if layout:
        mesh, placements = layout
        for dimension, placement in enumerate(placements):
            if not placement.is_replicate():  # a strided shard, of weights cut twice, is no Shard
                dist.all_reduce(total, group=mesh.get_group(dimension))
    return total


class Squares:
    """The norm of gradients that come one after the other and go."""

    def __init__(self) -> None:
        self.sums: dict[tuple, Tensor] = {}

    def add(self, gradient: Tensor) -> Tensor:
        """Count a gradient; returns its ``[]`` fp64 sum of squares on this rank."""
        mine, layout = squares_here([gradient]), layout_of(gradient)
        self.sums[layout] = self.sums[layout] + mine if layout in self.sums else mine
        return mine

    def norm(self) -> Tensor:
        """``[]`` fp64 over all of them, the same on every rank; all ranks call it."""
        squares = [over_shards(total.clone(), layout) for layout, total in self.sums.items()]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


ROW = 256
"""Elements whose squares are summed in fp32 on a CPU."""


def row_squares(tensor: Tensor) -> Tensor:
    """``[]`` fp64 sum of squares, in fp32 over ``ROW`` of them only: widening each first takes ten times as long."""
    wide, flat = torch.promote_types(tensor.dtype, torch.float32), tensor.reshape(-1)
    whole = flat.numel() // ROW * ROW
    parts = flat[:whole].view(-1, ROW), flat[whole:].view(1, -1)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=wide).double() for part in parts]
    return sum(norm.square().sum() for norm in norms)  # pyright: ignore


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
