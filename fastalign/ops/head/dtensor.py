"""DTensors as the linear ops take them: each rank's own part, and the group over which the vocabulary is split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

Group = torch.distributed.ProcessGroup


def whole(name: str, x: Any) -> Any:
    """The local tensor of a replicated DTensor, and anything else as it is.

    Raises:
        ValueError: a DTensor with another placement.
    """
    if not isinstance(x, DTensor):
        return x
    if any(not isinstance(placement, Replicate) for placement in x.placements):
        raise ValueError(
            f"{name} is a DTensor placed {x.placements}; every rank needs all of it: "
            f"pass {name}.redistribute(placements=[Replicate()] * mesh.ndim)"
        )
    return x.to_local()


def vocabulary_slices(
    tensors: dict[str, Tensor | None], process_group: Group | None
) -> tuple[list[Tensor | None], Group | None]:
    """The rank's columns of weight, bias and adapter, and the group that shares them.

    A DTensor placed ``Shard(0)`` over one dimension of its mesh is a slice of the vocabulary, and names the group; one
    that is replicated is its local tensor. Gradients come back as DTensors of the same placement.

    Args:
        tensors: by name; the first decides about the group.
        process_group: as given by the caller.

    Raises:
        ValueError: another placement, or one that contradicts the first tensor's or the process group.
    """
    groups = {name: _split_over(name, x) for name, x in tensors.items() if isinstance(x, DTensor)}
    first = next(iter(tensors))
    chosen = process_group or groups.get(first)
    for name, group in groups.items():
        if _named(group) != _named(chosen):
            other = "process_group" if process_group is not None else first
            raise ValueError(
                f"{name} and {other} disagree on how the vocabulary is split: {name} is {_described(group)}, "
                f"{other} says {_described(chosen)}; place both over the same mesh dimension"
            )
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors.values()], chosen


def _split_over(name: str, x: DTensor) -> Group | None:
    """The group of the mesh dimension over which dimension 0 is split; None when every rank holds all of it."""
    split = [dim for dim, placement in enumerate(x.placements) if type(placement) is Shard and placement.dim == 0]
    rest = [placement for dim, placement in enumerate(x.placements) if dim not in split]
    if len(split) > 1 or any(not isinstance(placement, Replicate) for placement in rest):
        raise ValueError(
            f"{name} is a DTensor placed {x.placements}: expected Shard(0), the vocabulary, over at most one dimension "
            f"of the mesh and Replicate() over the others; pass {name}.redistribute(...) or {name}.full_tensor()"
        )
    return x.device_mesh.get_group(split[0]) if split else None


def _named(group: Group | None) -> str | None:
    return None if group is None else group.group_name


def _described(group: Group | None) -> str:
    return "whole on every rank" if group is None else f"split over {group.size()} ranks ({group.group_name})"
