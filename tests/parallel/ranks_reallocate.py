"""Run under torchrun: weights that move between any two layouts keep every bit, and no more travels than must."""

import copy
import sys
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from counting import Collectives
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.config import ParallelConfig
from fastalign.models.support import transformer_blocks
from fastalign.parallel.clip import local
from fastalign.parallel.mesh import World, world
from fastalign.parallel.reallocate import move

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "head_dim": 4}
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
PLAN = {f"model.layers.*.self_attn.{name}": ColwiseParallel() for name in COLUMNS[:3]}
PLAN |= {f"model.layers.*.mlp.{name}": ColwiseParallel() for name in COLUMNS[3:]}
PLAN |= {"model.layers.*.self_attn.o_proj": RowwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
PLAN |= {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": ColwiseParallel()}
"""Every weight but the norms is cut, those of columns along the dimension that FSDP cuts too."""
SHARDS = (Replicate(), Shard(0), Replicate())
Layout = tuple[int, int, int]
"""dp_replicate, dp_shard, tp; replicas of a model that is not sharded otherwise lie as (n, 1, tp)."""


def make(vocabulary: int, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, tie_word_embeddings=tied, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def layouts(size: int) -> list[Layout]:
    return [(a, b, c) for a, b, c in product((1, 2, 4), repeat=3) if a * b * c == size]


def laid_out(model: nn.Module, layout: Layout, meshes: dict[Layout, DeviceMesh]) -> nn.Module:
    """A copy of a model that lies so: tensor-parallel first, then FSDP; whole on every rank where neither is."""
    model, mesh = copy.deepcopy(model), meshes[layout]
    if layout[2] > 1:
        parallelize_module(model, mesh["tp"], PLAN)
        if model.config.tie_word_embeddings:  # each of them was cut by itself
            model.lm_head.weight = model.model.embed_tokens.weight
    if layout[1] > 1:
        for part in (*transformer_blocks(model), model):
            fully_shard(part, mesh=mesh["dp_replicate", "dp_shard"])
    return model


def zero(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).zero_()
    return model


def differing(one: nn.Module, other: nn.Module) -> Iterator[str]:
    """Weights of which this rank has not the same bits of the same place."""
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        assert type(x) is type(y) or DTensor not in (type(x), type(y)), name
        if not torch.equal(local(x), local(y)):
            yield name


def expected_bytes(model: nn.Module, source: Layout, target: Layout, size: int) -> float:
    """``P/tp b (1 - 1/dp)`` for shards of as many tp ranks as before, ``P b (1 - 1/(dp tp))`` for others; dp counts the
    parts that FSDP cuts, and the norms are not cut by tp."""
    total = 0.0
    for name, parameter in model.named_parameters():
        tp, dp = (1 if "norm" in name else source[2]), source[1]
        share = (1 - 1 / dp) / tp if tp == 1 or source[2] == target[2] else 1 - 1 / (dp * tp)
        total += parameter.numel() * size * share
    return total


def check_pairs(ranks: World, meshes: dict[Layout, DeviceMesh]) -> None:
    """A head that is the embedding; nothing but gathers, of as many bytes as the formula has."""
    model = make(40, tied=True)
    there, arrived = ({layout: laid_out(model, layout, meshes) for layout in meshes} for _ in range(2))
    for source, target in product(there, repeat=2):
        with Collectives() as counted:
            received = move(there[source], zero(arrived[target]))
        assert not [*differing(arrived[target], there[target])], (source, target)
        assert received == sum(counted.bytes.values()) and not counted.calls.keys() - {"_allgather_base_"}
        assert counted.calls.total() <= 3 * 2  # per layer, and for what is in none, over dp and over tp
        formula = expected_bytes(model, source, target, 4)
        if source == target:
            assert received == 0
        elif target[1] == 1 and target[2] in (1, source[2]):  # a layout to generate in
            assert received == formula, (source, target)
        else:  # some of the parts may be where they go to already
            assert received <= formula, (source, target)


def check_half(ranks: World, meshes: dict[Layout, DeviceMesh]) -> None:
    """Weights are rounded before they travel: half the bytes, and the bits of rounding the whole."""
    model = make(40)
    rounded, arrived, back = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16(), copy.deepcopy(model)
    widened = copy.deepcopy(rounded).float()
    for source in meshes:
        received = move(laid_out(model, source, meshes), zero(arrived))
        assert not [*differing(arrived, rounded)], source
        assert received == expected_bytes(model, source, (ranks.size, 1, 1), 2)
        assert move(laid_out(rounded, source, meshes), zero(back)) == received  # as narrow as they are
        assert not [*differing(back, widened)], source


def check_average(ranks: World, meshes: dict[Layout, DeviceMesh]) -> None:
    """The same operation with a rate, of rows that no number of ranks divides; nothing travels where layouts agree."""
    model, wanted = make(37), zero(make(37))
    there, averaged = ({layout: laid_out(each, layout, meshes) for layout in meshes} for each in (model, wanted))
    with torch.no_grad():
        for reference, parameter in zip(wanted.parameters(), model.parameters(), strict=True):
            reference.lerp_(parameter, 0.25)
    expected = {layout: laid_out(wanted, layout, meshes) for layout in meshes}
    for source, target in product(meshes, repeat=2):
        received = move(there[source], zero(averaged[target]), rate=0.25)
        assert not [*differing(averaged[target], expected[target])], (source, target)
        assert received == 0 or source != target
    with pytest.raises(ValueError, match=r"an average in torch\.bfloat16 does not move: keep model"):
        move(model, copy.deepcopy(model).bfloat16(), rate=0.25)


def check_rows_that_are_lost(ranks: World, meshes: dict[Layout, DeviceMesh]) -> None:
    """Where PyTorch relabels a shard given another mesh, `move` gives each rank its rows, and says where it cannot."""
    model = make(40)
    layout = next(each for each in meshes if each[1] > 1)
    short = nn.ParameterDict({"weight": torch.zeros(8, 1)})
    short["weight"] = nn.Parameter(
        DTensor.from_local(torch.zeros(1, 1), meshes[layout], SHARDS, shape=(8, 1), stride=(1, 1))
    )
    with pytest.raises(AssertionError, match=r"weight: this rank has \[1, 1\] of it, and \[\d, 1\] came"):
        move(nn.ParameterDict({"weight": torch.zeros(8, 1)}), short)
    partial = nn.Module()
    partial.weight = nn.Parameter(
        DTensor.from_local(torch.ones(3), meshes[layout], [Replicate(), Replicate(), Partial()])
    )
    with pytest.raises(ValueError, match="expected weights on a mesh of all ranks, got placements"):
        move(partial, copy.deepcopy(partial))
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight has the shape \[40, 16\] here and \[37, 16\] where"
    ):
        move(model, make(37))
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj.weight is in one of the models only"):
        move(partial, model)


if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        names = ("dp_replicate", "dp_shard", "tp")
        meshes = {each: init_device_mesh("cpu", each, mesh_dim_names=names) for each in layouts(ranks.size)}
        check_pairs(ranks, meshes)
        check_half(ranks, meshes)
        check_average(ranks, meshes)
        check_rows_that_are_lost(ranks, meshes)
    print("agreed", file=sys.stderr)
