"""Ranks that no longer compute the same: named with the step, before another checkpoint is made of their weights.

Loss and gradient norm are sums over all ranks and equal on all. Replicas of the weights (``parallel.dp_replicate``) are
equal to the bit as well, since all take the same steps: some of their elements are compared at every step, all of them
before a checkpoint. What is compared travels with the counts of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastalign.engine.errors import RunError
from fastalign.parallel.clip import local
from fastalign.parallel.mesh import World
from fastalign.parallel.whereabouts import ranks_as_text

NAMES = ("loss", "grad_norm", "weights")
"""What is compared after a step, in this order."""
ELEMENTS = 16
"""Weights of which one element is, other ones at every step."""
STRIDE = 7919
"""Elements from one step to the next, a prime: in time all have been compared."""


def replicas(world: World) -> int:
    """How often each shard of the weights is there."""
    return 1 if world.mesh is None else world.mesh.size(0)


@torch.no_grad()
def some_of(modules: Iterable[nn.Module], step: int, world: World) -> float:
    """A sum over elements of this rank's weights, where there are replicas of them."""
    if replicas(world) == 1:
        return 0.0
    every = [local(p).reshape(-1) for module in modules for p in module.parameters() if p.requires_grad]
    every = [x for x in every if len(x)]
    first = step * ELEMENTS % max(len(every), 1)
    chosen = [x[step * STRIDE % len(x)].double() for x in (every[first:] + every[:first])[:ELEMENTS]]
    return float(torch.stack(chosen).sum()) if chosen else 0.0


def check(everyone: Tensor | None, step: int, world: World) -> None:
    """Refuse, on all ranks, to go on when one has other numbers after a step; ``[ranks, 3]``."""
    assert everyone is not None
    copies = everyone.view(
        replicas(world), -1, world.size // world.data.size, len(NAMES)
    )  # the last is the tensor axis
    sums, weights = copies[..., :2] != copies[0, 0, :, :2], copies[..., 2:] != copies[:1, ..., 2:]
    wrong = torch.cat([sums, weights], -1).view(everyone.shape)
    if wrong.any():
        what = [name for name, found in zip(NAMES, wrong.any(0).tolist(), strict=True) if found]
        refuse(wrong.any(1).nonzero()[:, 0].tolist(), " and ".join(what), f"step {step}")


def check_whole(tensors: Mapping[str, Tensor], step: int, world: World) -> None:
    """Refuse, on all ranks, to save replicas that differ in any bit."""
    if world.mesh is None or replicas(world) == 1:
        return
    mine = sum(bits(local(x)) for x in tensors.values() if isinstance(x, DTensor))
    every = world.gather_objects(((world.mesh.get_coordinate() or [])[1:], mine))
    wrong = [rank for rank, (part, found) in enumerate(every) if found != dict_of(every)[(*part,)]]
    if wrong:
        refuse(wrong, "weights", f"the checkpoint of step {step}")


def dict_of(every: Sequence[tuple[Sequence[int], int]]) -> dict[tuple[int, ...], int]:
    """What the first replica has, by the part of the weights that it is of."""
    return {(*part,): found for part, found in reversed(every)}


def bits(x: Tensor) -> int:
    """A sum over the bits of a tensor."""
    return int(x.reshape(-1).view(torch.uint8).view(torch.int16 if x.element_size() > 1 else torch.uint8).sum())


def refuse(ranks: Sequence[int], what: str, when: str) -> None:
    """Raise."""
    has = "have" if len(ranks) > 1 else "has"
    raise RunError(
        f"{when}: {ranks_as_text(list(ranks))} {has} other {what} than rank 0 and its like: memory or links may be "
        "faulty; earlier checkpoints are intact: go on without that machine, with run.resume=true"
    )
