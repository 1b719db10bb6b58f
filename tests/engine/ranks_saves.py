"""Run on four ranks with a folder: a checkpoint moves between layouts of the ranks and comes back to the bit."""

import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fastalign.config import ModelConfig, OptimConfig, ParallelConfig
from fastalign.engine.optim import Trained, make_optimizer
from fastalign.engine.output.checkpoint import load_checkpoint, save_checkpoint, write_checkpoint
from fastalign.engine.output.checkpoints import Retention
from fastalign.engine.output.snapshot import on_host, on_main, take_snapshot
from fastalign.engine.output.trained_state import tensors_of
from fastalign.models.load import load_policy
from fastalign.models.policy import Policy
from fastalign.parallel.mesh import Axis, World, axes_of, world
from fastalign.parallel.shard import region, shard
from fastalign.parallel.tensor import split_layers
from runs import LLAMA

LAYOUTS = ((2, 1, 2), (1, 2, 1), (1, 1, 1), (1, 4, 1))
"""dp_replicate, dp_shard and tp, one after the other; ranks beyond them look on."""


def part_of(ranks: World, *layout: int) -> World | None:
    """The first ranks as a world of their own."""
    size, tp = math.prod(layout), layout[-1]
    group, mesh = dist.new_group(range(size)), torch.arange(size).reshape(layout)
    made = DeviceMesh("cpu", mesh, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    if ranks.rank >= size:
        return None
    data, tensor = axes_of(made) if tp > 1 else (Axis(ranks.rank, size, group), None)
    return World(data, ranks.device, made if size > 1 else None, tensor, group)


def make_policy() -> Policy:
    """Two layers, and a vocabulary that no number of ranks divides; all but norms and down_proj are made of blocks."""
    torch.manual_seed(0)
    return load_policy(ModelConfig(config={**LLAMA, "hidden_size": 128, "intermediate_size": 96}), vocab_size=37)


def part_of_it(whole: torch.Tensor, like: DTensor) -> DTensor:
    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(whole[region(like)].contiguous(), like.device_mesh, like.placements, **layout)


def trained(ranks: World, seed: int) -> dict[str, Trained]:
    """A policy in bf16 with fp32 masters, and moments of one step, most in 8 bits, once it has made it."""
    policy = shard(split_layers(make_policy().bfloat16(), ranks), ranks)
    one = Trained(policy, make_optimizer(policy, OptimConfig(lr=1e-2, name="adamw_8bit")))
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = gradient.float() if ranks.mesh is None else part_of_it(gradient, p)
    one.optimizer.step()
    one.optimizer.zero_grad()
    return {"policy": one}


def whole(roles: dict[str, Trained]) -> dict[str, torch.Tensor]:
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in tensors_of(roles).items()}


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with world(ParallelConfig()) as ranks:
        first, path, before = None, None, None
        for number, layout in enumerate(LAYOUTS):
            place = part_of(ranks, *layout)
            if place is not None:
                roles = trained(place, seed=number)
                if path is not None:
                    load_checkpoint(path, roles, place, shared=number % 2 == 0)
                mine = whole(roles)
                first = first or mine
                assert sum(x.dtype == torch.uint8 for x in mine.values()) == 2 * (2 * 6 + 2), layout
                assert same(mine, first), (layout, "loaded")
                path = save_checkpoint(folder / str(number), 1, roles, {}, place, keep=1)
            path = folder / str(number) / "step-1"
            ranks.barrier()
        snapshot = take_snapshot(1, roles, {}, place)
        for name, copy, writers in (
            ("host", on_host(snapshot), ranks),
            ("main", on_main(snapshot, ranks), ranks.alone),
        ):
            for x in tensors_of(roles).values():
                getattr(x, "_local_tensor", x).add_(1)  # what a later step does
            if writers is ranks or ranks.is_main:
                write_checkpoint(folder / name, copy, writers, Retention(1))
            ranks.barrier()
            load_checkpoint(folder / name / "step-1", roles, ranks)
            assert same(whole(roles), first), name
        os.write(1, b"equal in every layout\n") if ranks.is_main else None
