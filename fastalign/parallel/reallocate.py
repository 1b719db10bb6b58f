"""The weights of a model in another layout over the same ranks: gathered, cut anew and written, layer by layer.

A model has one layout in which it trains, and lends copies of its weights to others:

    train   FSDP over tensor-parallel shards        (dp_replicate, dp_shard, tp), fp32
    gen     replicas of tensor-parallel shards      (replicas, tp'), often bf16
    full    a whole model on every rank

Nobody is told which is which: a tensor's mesh and placements say how it lies. Each of its dimensions has a chain of
cuts, the outermost first. The cuts that both chains begin with stay; the others of the source are undone, the innermost
first, by one all-gather over the ranks of that cut, and those of the target are made by slicing:

    source, 8 rows on (dp 2, tp 2)     rows: tp, then dp             8 -> 4 -> 2
    target, (replicas 2, tp 2)         rows: tp                      8 -> 4          one all-gather over dp
    target, whole                      rows: none                    8               ... and one over tp

A rank receives ``P b (1 - 1/(dp tp))`` bytes of P weights of b bytes for whole ones, and ``P/tp b (1 - 1/dp)`` where tp
stays. PyTorch's own ``redistribute`` does not do this: given another mesh with the same placements it relabels the
shard that it has, and the tensor has lost rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from fastalign.models.support import transformer_blocks
from fastalign.parallel.clip import local
from fastalign.parallel.shard import reshard

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""


class Cut(NamedTuple):
    """A dimension of a tensor cut over the ranks of a group, as ``torch.chunk`` does."""

    dim: int
    group: dist.ProcessGroup

    def widest(self, size: int) -> int:
        """Rows of the first part of ``size``, than which no other has more."""
        return -(-size // self.group.size())

    def mine(self, size: int) -> slice:
        """This rank's part of ``size`` rows; empty where there are fewer rows than ranks."""
        start = min(self.group.rank() * self.widest(size), size)
        return slice(start, min(start + self.widest(size), size))

    def is_like(self, other: Cut) -> bool:
        """Whether the same ranks have the same parts of both."""
        return dist.get_process_group_ranks(self.group) == dist.get_process_group_ranks(other.group)


@dataclass
class Load:
    """One weight on its way.

    Attributes:
        name: in the model.
        part: what this rank has of it so far.
        undo: cuts to undo, the innermost last, each with the rows of its dimension before that cut.
        make: cuts to make, the outermost first.
        target: where it goes.
    """

    name: str
    part: Tensor
    undo: list[tuple[Cut, int]]
    make: list[Cut]
    target: Tensor


@torch.no_grad()
def move(source: nn.Module, target: nn.Module, *, rate: float = 1.0, trained: bool = False) -> int:
    """Put the weights of a model into another of the same architecture, whatever the layout of either.

    ``target <- target + rate * (source - target)``. All ranks of both must call it. At most one layer is gathered at a
    time, and all of its weights that lie alike travel in one collective, in the narrower of both dtypes.

    Args:
        source: plain, or of DTensors on any mesh of all ranks.
        target: likewise; its weights are written in place. What the source has beside them, as a value head, stays.
        rate: share of the way; below 1 an exponential moving average.
        trained: move only what trains in the source; the rest is in the target already.

    Returns:
        bytes that this rank has received.

    Raises:
        ValueError: models of different weights; a rate below 1 towards weights in half precision.
    """
    reshard(source)  # a forward without backward leaves the outermost weights gathered
    reshard(target)
    received, given = 0, dict(source.named_parameters(remove_duplicate=False))
    wanted = dict(target.named_parameters())
    for names in layers(target):
        loads = [*planned(given, {name: wanted[name] for name in names}, trained)]
        while any(load.undo for load in loads):
            received += gather(loads)
        for load in loads:
            write(load, rate)
    return received


def layers(model: nn.Module) -> Iterator[list[str]]:
    """The names of a model's weights: those of each transformer block, then those that are in none."""
    blocks = set(transformer_blocks(model))
    inside = [name for name, module in model.named_modules() if module in blocks]
    names = [name for name, _ in model.named_parameters()]
    for block in inside:
        yield [name for name in names if name.startswith(f"{block}.")]
    yield [name for name in names if not name.startswith(tuple(f"{block}." for block in inside))]


def planned(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], trained: bool) -> Iterator[Load]:
    """What becomes of the weights of a layer."""
    for name, y in wanted.items():
        if (x := given.get(name)) is None:
            raise ValueError(f"{name} is in one of the models only: both must have the same weights")
        if x.shape != y.shape:
            raise ValueError(
                f"{name} has the shape {[*x.shape]} here and {[*y.shape]} where it goes: they must be equal"
            )
        if x.requires_grad or not trained:
            yield plan(name, x.detach(), y.detach())


def plan(name: str, x: Tensor, y: Tensor) -> Load:
    """Which cuts of a weight are undone and made; it is rounded before it travels, if it is at all."""
    undo, make = list[tuple[Cut, int]](), list[Cut]()
    theirs, ours = cuts(x), cuts(y)
    for dim in reversed(range(x.dim())):  # FSDP cuts the first: that is undone first, of all weights together
        chains = [[cut for cut in found if cut.dim == dim] for found in (theirs, ours)]
        stay = common(*chains)
        size = x.shape[dim]
        for i, cut in enumerate(chains[0]):
            undo += [(cut, size)] if i >= stay else []
            size = cut.mine(size).stop - cut.mine(size).start
        make += chains[1][stay:]
    part = local(x)
    part = part.to(y.dtype) if y.element_size() < part.element_size() else part
    return Load(name, part, undo, make, local(y))


def cuts(x: Tensor) -> list[Cut]:
    """The cuts of a tensor, the outermost first.

    Raises:
        ValueError: a sum that has not been taken over its ranks yet, or a mesh that this rank is not on.
    """
    if not isinstance(x, DTensor):
        return []
    if x.device_mesh.get_coordinate() is None or any(p.is_partial() for p in x.placements):
        raise ValueError(f"expected weights on a mesh of all ranks, got placements {x.placements} on {x.device_mesh}")
    # a strided shard is a part of what an axis further right has cut before it
    order = sorted(enumerate(x.placements), key=lambda each: isinstance(each[1], _StridedShard))
    found = [(p.dim, axis) for axis, p in order if not p.is_replicate()]  # pyright: ignore
    return [Cut(dim, x.device_mesh.get_group(axis)) for dim, axis in found if x.device_mesh.size(axis) > 1]


def common(theirs: list[Cut], ours: list[Cut]) -> int:
    """With how many equal cuts two chains begin."""
    equal = [a.is_like(b) for a, b in zip(theirs, ours, strict=False)]
    return (*equal, False).index(False)


def gather(loads: list[Load]) -> int:
    """Undo the innermost cut of every weight that has one left, in one collective for those that lie alike.

    Returns:
        bytes received.
    """
    alike: dict[tuple, list[Load]] = defaultdict(list)
    for load in loads:
        if load.undo:
            alike[load.undo[-1][0].group, load.part.dtype].append(load)
    return sum(gather_alike(group, each) for (group, _), each in alike.items())


def gather_alike(group: dist.ProcessGroup, loads: list[Load]) -> int:
    """Undo the innermost cut of weights whose parts are with the same ranks; parts of unequal size are filled up."""
    number = group.size()
    mine = torch.cat([filled_up(load.part, *load.undo[-1]) for load in loads])
    every = mine.new_empty(number, len(mine))
    all_gather(every.view(-1), mine, group=group)
    start = 0
    for load in loads:
        cut, size = load.undo.pop()
        rest = [n for dim, n in enumerate(load.part.shape) if dim != cut.dim]
        stop = start + cut.widest(size) * math.prod(rest)
        rows = every[:, start:stop].reshape(number * cut.widest(size), *rest)
        load.part, start = rows[:size].movedim(0, cut.dim), stop
    return (number - 1) * mine.nbytes


def filled_up(part: Tensor, cut: Cut, size: int) -> Tensor:
    """A part as a vector, the cut dimension outermost and as long as the widest part's."""
    rows = part.movedim(cut.dim, 0)
    missing = cut.widest(size) - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]).reshape(-1) if missing else rows.reshape(-1)


def write(load: Load, rate: float) -> None:
    """Cut this rank's part of a weight, and write it or go some of the way to it."""
    part, target = load.part, load.target
    for cut in load.make:
        part = part[(slice(None),) * cut.dim + (cut.mine(part.shape[cut.dim]),)]
    assert part.shape == target.shape, f"{load.name}: this rank has {[*target.shape]} of it, and {[*part.shape]} came"
    if rate == 1:
        target.copy_(part)
    elif target.dtype in (torch.float32, torch.float64):
        target.lerp_(part.to(target), rate)
    else:
        raise ValueError(f"an average in {target.dtype} does not move: keep {load.name} in float32")
