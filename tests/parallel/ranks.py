"""Run under torchrun: sharded gradients, their norm and clipping equal those of one process, on every mesh."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fastalign.config import ParallelConfig
from fastalign.parallel.clip import clip_gradients
from fastalign.parallel.mesh import World, world
from fastalign.parallel.reallocate import move
from fastalign.parallel.shard import fill, shard, synchronise_gradients


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).tanh()


class Model(nn.Module):
    """Uneven sizes, a parameter of one element, blocks named as transformers names them."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x)).mul(self.scale).square().sum()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    whole = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters())
    return [gradient.clone() for gradient in whole]


def check(ranks: World) -> None:
    torch.manual_seed(1)
    micro_batches = torch.randn(2, ranks.size, 5, 7)  # two micro-batches, a share of each for every rank
    alone, sharded = Model(), shard(Model(), ranks)
    alone(micro_batches.flatten(0, 2)).backward()
    for i, shares in enumerate(micro_batches):
        synchronise_gradients(sharded, i == 1)
        (sharded(shares[ranks.data.rank]) * ranks.size).backward()
    for mine, theirs in zip(gradients(sharded), gradients(alone), strict=True):
        torch.testing.assert_close(mine, theirs)
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
    norm = clip_gradients(sharded.parameters(), 0.5)
    torch.testing.assert_close(norm.float(), expected)
    assert norm > 1
    for mine, theirs in zip(gradients(sharded), gradients(alone), strict=True):
        torch.testing.assert_close(mine, theirs)
    counts = ranks.data.gather([ranks.rank + 1.0, 2.0])
    assert counts.tolist() == [[rank + 1.0, 2.0] for rank in range(ranks.size)]


def check_cut_twice(ranks: World) -> None:
    """Weights that tensor parallelism and FSDP cut along one dimension have strided shards, which are no `Shard`."""
    mesh = init_device_mesh("cpu", (ranks.size, 1), mesh_dim_names=("dp_shard", "tp"))
    whole = torch.arange(1.0, 13.0).view(4, 3)
    mine = whole[ranks.rank :: 2].clone()
    weight = nn.Parameter(DTensor.from_local(torch.zeros(2, 3), mesh, [_StridedShard(0, split_factor=2), Shard(0)]))
    weight.grad = DTensor.from_local(mine.clone(), mesh, [_StridedShard(0, split_factor=2), Shard(0)])
    norm = clip_gradients([weight], 1.0)
    torch.testing.assert_close(norm, whole.double().norm())
    torch.testing.assert_close(weight.grad.to_local(), mine / norm.float())


def check_rest(ranks: World) -> None:
    """Shards that rest on the host: read there, computed with as others are, followed by an average, never moved."""
    trained, alone = shard(Model(), ranks), Model().requires_grad_(False)
    with torch.device("meta"):
        resting = Model().requires_grad_(False)
    fill(shard(resting, ranks, rests=True), lambda name, part, x: alone.get_parameter(name)[part].clone(), ranks)
    x = torch.randn(5, 7)
    for _ in range(2):
        torch.testing.assert_close(resting(x), alone(x))
        assert {p.device.type for p in resting.parameters()} == {"cpu"}
    with torch.no_grad():
        for parameter in (*trained.parameters(), *alone.parameters()):
            parameter.mul_(2 if isinstance(parameter, DTensor) else 1.5)
    move(trained, resting, rate=0.5)  # half of the way to twice the weights
    torch.testing.assert_close(resting(x), alone(x))


def check_partial(ranks: World) -> None:
    """A sum over ranks that was not taken yet has no norm."""
    weight = nn.Parameter(DTensor.from_local(torch.ones(3), ranks.data_mesh, [Replicate()]))
    weight.grad = DTensor.from_local(torch.ones(3), ranks.data_mesh, [Partial()])
    with pytest.raises(ValueError, match="expected reduced gradients"):
        clip_gradients([weight], 1.0)


if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        check(ranks)
        replicas = init_device_mesh("cpu", (ranks.size, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
        check(replace(ranks, mesh=replicas))
        check_cut_twice(ranks)
        check_rest(ranks)
        check_partial(ranks)
    print("agreed", file=sys.stderr)
