"""Counts of work: tokens, operations, shares of the budget and of the time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.data.pack import pack, share
from fastalign.engine.output.accounting import Accounting, account, peak_flops
from fastalign.engine.output.report import read_curves, time_table
from fastalign.engine.setup import load_data
from fastalign.engine.timing import PARTS
from fastalign.engine.train import train
from fastalign.engine.update import measure_work
from fastalign.models.costs import forward_cost
from fastalign.models.policy import Policy
from fastalign.parallel.mesh import Axis, World
from fastalign.types import ForwardCost
from runs import records

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 31}
CPU = torch.device("cpu")


def policy(kind, **options):
    return Policy(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options})))


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_pass_is_counted_weight_by_weight(tied):
    cost = forward_cost(policy("llama", num_key_value_heads=2, tie_word_embeddings=tied))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12  # q, k and v of two heads of size 2, o, the MLP
    assert cost == ForwardCost(per_token=3 * layer, per_attended=2 * 3 * 8, per_scored=8 * 31)


def test_a_token_meets_the_experts_it_is_routed_to():
    one, all_four = (
        policy("mixtral", num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=k) for k in (1, 4)
    )
    assert forward_cost(all_four).per_token - forward_cost(one).per_token == 3 * 3 * 3 * 8 * 12


def test_frozen_weights_cost_two_operations_less():
    model = policy("llama", num_key_value_heads=2)
    work = 100, 1000, 10
    whole = account(model, 1, 1, CPU, False).flops(*work)
    forward = forward_cost(model)
    assert whole == 6 * forward.of(*work)
    model.requires_grad_(False)
    assert account(model, 1, 1, CPU, False).flops(*work) == whole - 2 * (
        100 * forward.per_token + 10 * forward.per_scored
    )


def test_operations_are_those_that_torch_counts(configure):
    """Attention apart, which torch counts as full squares."""
    from torch.utils.flop_counter import FlopCounterMode

    model = policy("llama", num_key_value_heads=2)
    batch = pack(load_data(configure("dpo"))[1].fetch([0, 1, 2, 3]), 10_000, True)[0]
    batch.input_ids.remainder_(31)
    with FlopCounterMode(display=False) as counter:
        model(batch, lambda hidden, weight, labels: (hidden @ weight.T).sum()).backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    forward, got = forward_cost(model), counted["aten.mm"]
    assert got == 6 * (batch.num_tokens * forward.per_token + batch.num_scored * forward.per_scored)


def test_a_step_is_described(configure):
    _, dataset, _ = load_data(configure("dpo"))
    batches = pack(dataset.fetch(list(range(6))), 300, True)
    work = measure_work(batches, World(Axis(), CPU), 7)
    told = Accounting(ForwardCost(), ForwardCost(), 300, 1, None).describe(work)
    computed = sum(b.num_tokens for b in batches)
    assert told["tokens_computed"] == computed < told["tokens"] == sum(b.logical_tokens for b in batches)
    assert told["share_ratio"] == told["tokens"] / computed
    assert told["packing_efficiency"] == computed / (300 * len(batches))
    assert told["padding_fraction"] == 0 and told["sequences"] == 12 and told["peak_memory_rank_max"] == 7
    assert told["tokens_response"] == sum(b.num_scored for b in batches)


def test_a_rank_without_work_is_told_apart(configure):
    _, dataset, _ = load_data(configure("dpo"))
    idle = share(dataset.fetch([0]), 300, True, 1, 2)
    work = measure_work(idle, World(Axis(), CPU), 0)
    told = Accounting(ForwardCost(), ForwardCost(), 300, 2, None).describe(work)
    assert (told["tokens_computed"], told["padding_fraction"], told["flops_model"]) == (0, 1, 0)


def test_a_run_tells_where_its_time_went(configure):
    config = configure("dpo", **{"run.steps": 3})
    train(config)
    for record in records(config.run.output_dir):
        parts = [record[f"t_{part}"] for part in (*PARTS, "other")]
        assert sum(parts) == pytest.approx(record["t_step"]) and min(parts) >= 0
        assert record["mfu"] is None and record["flops_model"] > 0 and record["padding_fraction"] == 0
        assert 0 < record["packing_efficiency"] <= 1 < record["share_ratio"]
        assert record["tokens_computed_per_second"] == pytest.approx(record["tokens_computed"] / record["t_step"])
    assert "t_other" in time_table(read_curves(Path(config.run.output_dir) / "metrics.jsonl")[1])
    assert time_table({}) == ""


def test_devices_have_their_peaks():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 3060") is None
