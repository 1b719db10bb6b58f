"""What a checkpoint will hold: the live tensors, copies of them on the host, or all of them on rank 0."""

from __future__ import annotations

import platform
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastalign.engine.output.checkpoints import SCHEMA
from fastalign.engine.output.generators import rng_state
from fastalign.engine.output.trained_state import Roles, optimizer_steps, tensors_of
from fastalign.parallel.clip import local
from fastalign.parallel.host import placed
from fastalign.parallel.mesh import World


@dataclass(frozen=True)
class Snapshot:
    """A run after a step.

    Attributes:
        step: optimizer steps done.
        tensors: weights, masters and moments by name, plain or sharded; none on a rank that does not write.
        state: what ``state.json`` says, the list of files left out.
        generators: the states of the generators that this rank writes, by rank.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    generators: dict[int, dict[str, Any]]

    @property
    def size(self) -> int:
        """Bytes of the whole tensors: all ranks write to one disk, and a replica is written once."""
        return size_of(self.tensors)


def size_of(tensors: dict[str, Tensor]) -> int:
    """Bytes of whole tensors."""
    return sum(x.nbytes for x in tensors.values())


def take_snapshot(step: int, trained: Roles, state: dict[str, Any], world: World) -> Snapshot:
    """What a checkpoint of now holds; the tensors are the live ones.

    Args:
        step: optimizer steps done.
        trained: the modules that train and their optimizers, by role.
        state: JSON values to find again: data position, settings.
        world: the ranks.
    """
    header = {"schema": SCHEMA, "step": step, "world_size": world.size, "versions": versions()}
    whole = {**header, "optimizer_steps": optimizer_steps(trained), **state}
    tensors = {name: x.detach() for name, x in tensors_of(trained).items()}
    return Snapshot(step, tensors, whole, {world.rank: rng_state()})


def on_host(snapshot: Snapshot) -> Snapshot:
    """A copy in the memory of the host, which later steps do not change."""
    tensors = {name: copied(x) for name, x in snapshot.tensors.items()}
    return replace(snapshot, tensors=tensors, state=deepcopy(snapshot.state))


def copied(x: Tensor) -> Tensor:
    """A tensor, or this rank's part of one, copied to the host."""
    return placed(local(x).to("cpu", copy=True), x)


def on_main(snapshot: Snapshot, world: World) -> Snapshot:
    """All of it in the memory of rank 0, nothing on the others; all ranks call this."""
    whole = ((name, x.full_tensor() if isinstance(x, DTensor) else x) for name, x in snapshot.tensors.items())
    tensors = {name: x.to("cpu", copy=True) for name, x in whole if world.is_main}
    every = {rank: state for part in world.gather_objects(snapshot.generators) for rank, state in part.items()}
    return replace(snapshot, tensors=tensors, state=deepcopy(snapshot.state), generators=every)


def versions() -> dict[str, str]:
    """What made the checkpoint."""
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
