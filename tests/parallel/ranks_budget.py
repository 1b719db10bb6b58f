"""Run under torchrun: what a step of a sharded policy sends, counted and held against the formula."""

import sys
from pathlib import Path

import torch
from counting import Collectives, elements
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.config import ParallelConfig
from fastalign.data.pack import build_batch
from fastalign.engine.forward import Models, run_head
from fastalign.engine.methods import make_objective
from fastalign.models.policy import Policy
from fastalign.models.support import transformer_blocks
from fastalign.parallel.clip import clip_gradients
from fastalign.parallel.mesh import World, axes_of, world
from fastalign.parallel.shard import shard, synchronise_gradients
from fastalign.parallel.tensor import split_layers
from fastalign.types import PackedBatch

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from steps import make_examples

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 4, "vocab_size": 40}
"""Of a model whose every dimension two and four ranks divide, so that no shard is filled up."""


def counted_step(
    ranks: World, micro_batches: int, *, sequence: bool = False, **precision: bool
) -> tuple[Collectives, Policy]:
    """Forward and backward of some micro-batches, whose gradients are reduced once."""
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)))
    sharded, objective = split_layers(policy, ranks, sequence=sequence), make_objective("sft", {})
    shard(sharded, ranks, **precision)
    batch = make_batch()
    with Collectives() as ours:
        for i in range(micro_batches):
            synchronise_gradients(sharded, i == micro_batches - 1)
            run_head(Models(sharded, None, False), batch, objective)[0].backward()
    return ours, sharded


def make_batch() -> PackedBatch:
    batch = build_batch(make_examples("sft", "sft", 2), True)
    return batch.fill(weights=torch.full((batch.num_scored,), 1.0 / batch.num_scored))


def check_tp(ranks: World) -> None:
    """Four sums of the hidden states per layer, one of the embeddings; one of the scored rows' gradient."""
    mesh = init_device_mesh("cpu", (1, 1, ranks.size), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    data, tensor = axes_of(mesh)
    ranks = World(data, ranks.device, mesh, tensor)
    ours, _ = counted_step(ranks, 1)
    batch, row = make_batch(), SIZES["hidden_size"] * 4
    sums = {size: n for (name, size), n in ours.sizes.items() if name == "allreduce_" and size >= row}
    expected = {batch.num_tokens * row: 4 * SIZES["num_hidden_layers"] + 1, batch.num_scored * row: 1}
    assert sums == expected, sums
    assert not ours.bytes["_reduce_scatter_base_"]  # there is one data rank
    ours, _ = counted_step(ranks, 1, sequence=True)  # in place of a sum a gather and a scatter of what each rank has
    missed = -(-batch.num_tokens // ranks.size) * row * (ranks.size - 1)
    assert ours.bytes["_allgather_base_"] == (4 * SIZES["num_hidden_layers"] + 2) * missed
    assert ours.bytes["_reduce_scatter_base_"] == (4 * SIZES["num_hidden_layers"] + 1) * missed
    assert ("allreduce_", batch.num_tokens * row) not in ours.sizes


def check_fsdp(ranks: World) -> None:
    """A micro-batch receives ``2 b_p (d-1)/d`` bytes of a weight, a step ``b_g (d-1)/d`` of its gradient.

    Every block is gathered for the forward and for the backward; what is outside stays gathered between the two.
    """
    for micro_batches, (bf16, b_p, b_g) in ((1, (False, 4, 4)), (2, (False, 4, 4)), (1, (True, 2, 4))):
        ours, policy = counted_step(ranks, micro_batches, bf16=bf16)
        layers, share = SIZES["num_hidden_layers"], (ranks.size - 1) / ranks.size
        inside = sum(p.numel() for block in transformer_blocks(policy) for p in block.parameters())
        gathers = {"inside": 2 * layers, "outside": 1}
        assert ours.calls["_allgather_base_"] == sum(gathers.values()) * micro_batches
        assert ours.calls["_reduce_scatter_base_"] == layers + 1
        moved = 2 * inside + (elements(policy) - inside)
        assert ours.bytes["_allgather_base_"] == b_p * moved * share * micro_batches
        assert ours.bytes["_reduce_scatter_base_"] == b_g * elements(policy) * share
        assert ours.calls.keys() == {"_allgather_base_", "_reduce_scatter_base_"}, ours.calls
    with CommDebugMode() as theirs, Collectives() as ours:  # PyTorch's own count fails on the forwards of HF models
        clip_gradients(policy.parameters(), 1.0)
    assert ours.calls == {"allreduce_": 1} and theirs.get_total_counts() == 1


if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        check_fsdp(ranks)
        check_tp(ranks)
    print("agreed", file=sys.stderr)
