"""What `fastalign plan` counts is what is there: parameters, kept tensors, states; and it says what fits."""

import json

import pytest
import torch
import yaml

from fastalign import cli
from fastalign.arguments import parse_config
from fastalign.commands import PlanConfig
from fastalign.config import ModelConfig
from fastalign.engine.methods import METHODS
from fastalign.engine.optim import make_optimizer
from fastalign.engine.plan.devices import bytes_of
from fastalign.engine.plan.footprint import (
    Group,
    batch_of,
    describe_model,
    footprint,
    parameters,
    share_of,
    without_weights,
)
from fastalign.engine.plan.memory import local, memory, states
from fastalign.engine.plan.search import changed, largest, plan
from fastalign.engine.plan.setting import make_setting
from fastalign.engine.plan.speed import communication, cost_of
from fastalign.engine.plan.trace import Head, Live, Way, forgets_gradients
from fastalign.models.costs import forward_cost
from fastalign.models.load import load_policy
from fastalign.ops.backends import cpp

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
GEMMA = {"model_type": "gemma2", **SIZES, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {"llama": LLAMA, "qwen3": QWEN, "gemma2": GEMMA}
GROUP = Group(prompt=9, answer=7, answers=2, shared=True, scored=7)
HERE = Way(native=True, attention="cpp" if cpp.unavailable() is None else "sdpa", autocast=False, dtype=None)
EIGHT = {
    **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}
"""Llama-3-8B."""
LARGE = {**EIGHT, "num_hidden_layers": 2}


def setting_of(method="dpo", asked=None, model=LLAMA, **flags):
    words = ["--model.config", json.dumps(model), "--data.max_length", "32", "--batch.size", "8"]
    flags = {"batch.tokens": 64, **({"sampler.max_new_tokens": 8} if METHODS[method].algorithms else {}), **flags}
    words += [word for key, value in flags.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    return make_setting(parse_config(method, words), asked or PlanConfig(device="cpu"))


@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name, lora):
    section = ModelConfig(config=MODELS[name], lora=lora)
    real = load_policy(section, vocab_size=97)
    found = parameters(without_weights(section, describe_model(section), scalar_head=False, value_head=False, way=HERE))
    assert [w.numel for w in found] == [p.numel() for p in real.parameters()]
    assert [w.trained for w in found] == [p.requires_grad for p in real.parameters()]


@pytest.mark.parametrize(
    "name, again, half",
    [
        *(("llama", again, half) for again in (False, "mlp", True) for half in ("", "autocast", "bfloat16")),
        *((name, again, "autocast" if again else "") for name in ("qwen3", "gemma2") for again in (False, True)),
    ],
)
def test_what_a_forward_keeps_is_what_is_counted_without_weights(name, again, half):
    """All three layers and five groups, run with numbers, against one and two layers over two and three groups."""
    section = ModelConfig(config=MODELS[name], gradient_checkpointing=again)
    section.dtype = "bfloat16" if half == "bfloat16" else "float32"
    way = Way(native=True, attention=HERE.attention, autocast=half == "autocast", dtype=None)
    expected = footprint(section, describe_model(section), way, GROUP).of(5 * GROUP.tokens)
    policy, batch = load_policy(section, vocab_size=97).train(), batch_of(GROUP, 5, False)
    batch = batch._moved(lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x)
    live = Live([*policy.parameters(), *policy.buffers()])
    with forgets_gradients(policy), torch.autocast("cpu", torch.bfloat16, enabled=way.autocast), live:
        loss = policy(batch, lambda hidden, *_, **__: Head.apply(hidden))
        kept = live.bytes
    tables = 1024  # of the native attention, of where segments begin: bytes that do not grow with the model
    assert loss.requires_grad and kept == pytest.approx(expected.total, abs=tables)


BLOCKS = {**LLAMA, "hidden_size": 64}
"""Moments of its weights are made of blocks, but those of down_proj and of the norms."""


@pytest.mark.parametrize(
    "dtype, masters, name",
    [
        ("float32", True, "adamw"),
        ("bfloat16", True, "adamw"),
        ("bfloat16", False, "adamw"),
        ("bfloat16", "compensated", "adamw"),
        ("float32", True, "adamw_8bit"),
        ("bfloat16", "compensated", "adamw_8bit"),
    ],
)
def test_states_are_those_of_the_optimizer(dtype, masters, name):
    flags = {"model.dtype": dtype, "optim.master_weights": masters, "optim.name": name}
    setting = setting_of("sft", model=BLOCKS, **flags)
    counted = states(setting.policy(), setting)
    policy = load_policy(setting.config.model, vocab_size=97)
    optimizer = make_optimizer(policy, setting.config.optim, tell=False)
    for p in policy.parameters():
        p.grad = torch.ones_like(p, dtype=torch.float32 if dtype == "bfloat16" and masters else p.dtype)
    assert counted.gradients == sum(p.grad.nbytes for p in policy.parameters())
    optimizer.step()
    kept = [(name, x) for state in optimizer.state.values() for name, x in state.items() if x.dim()]
    moments = [x for name, x in kept if name != "remainder"]
    assert counted.weights == sum(p.nbytes for p in policy.parameters())
    remainders = [x for name, x in kept if name == "remainder"]
    assert counted.masters == sum(p.nbytes for p in (*optimizer.masters.values(), *remainders))
    assert counted.moments == sum(x.nbytes for x in moments)


def test_steps_within_backward_leave_one_gradient_and_offloaded_states_none_on_the_device():
    within = {"optim.in_backward": True, "optim.clip_norm": 0, "batch.tokens": 256}
    alone, several = setting_of("sft", **within), setting_of("sft", PlanConfig(gpus=2, device="h100"), **within)
    learns = alone.policy().weights
    assert states(alone.policy(), alone).gradients == max(w.numel for w in learns) * 4
    assert 0 < states(several.policy(), several).gradients < sum(local(w, 2) for w in learns) * 4
    rests = setting_of("sft", PlanConfig(device="h100"), **{"optim.offload": True})
    own = states(rests.policy(), rests)
    assert own.masters == own.moments == own.temporaries == 0 and own.rests == sum(w.numel for w in learns) * 12
    assert memory(rests).kinds["in host memory"] == own.rests
    with pytest.raises(ValueError, match=r"optim\.in_backward: an update has \d micro-batches and may have 1"):
        plan(changed(alone, batch={"tokens": 64}))
    assert largest(alone) == alone.examples * alone.group.tokens


def test_a_shard_is_the_largest_piece_that_fsdp_cuts():
    for weight in parameters(load_policy(ModelConfig(config=LLAMA), vocab_size=97)):
        for ranks in (1, 2, 3, 8):
            pieces = torch.empty(weight.shape).chunk(ranks)
            assert local(weight, ranks) == max(piece.numel() for piece in pieces)


def test_operations_are_those_of_the_accounting():
    setting = setting_of("sft")
    assert cost_of(setting.policy()) == forward_cost(load_policy(setting.config.model, vocab_size=97))


def test_fsdp_receives_what_its_formula_says():
    setting = setting_of("sft", PlanConfig(device="cpu", gpus=4), **{"batch.size": 16})
    own = sum(w.numel for w in setting.policy().weights)
    assert setting.micro_batches == 2
    assert communication(setting, 100.0) == {"fsdp": (2 * 2 * 4 + 4) * own * 3 / 4}


def test_gradients_in_shards_take_their_share_of_memory_and_a_reduction_per_micro_batch():
    flags = {"batch.size": 16, "parallel.shard_gradients": True}
    setting = setting_of("sft", PlanConfig(device="cpu", gpus=4), **flags)
    own, counted = sum(w.numel for w in setting.policy().weights), states(setting.policy(), setting)
    assert communication(setting, 100.0) == {"fsdp": (2 * 2 * 4 + 2 * 4) * own * 3 / 4}
    assert counted.unsharded == 0 and counted.reduced == 4 * own


def test_tensor_parallel_sums_four_times_a_layer():
    setting = setting_of("sft", PlanConfig(device="cpu", gpus=2), **{"parallel.tp": 2})
    assert communication(setting, 100.0)["tp"] == 3 * 4 * 100 * 32 * 4
    whole = setting_of("sft").policy()
    parts = [sum(w.numel for w in model.weights if w.matrix) for model in (setting.policy(), whole)]
    assert 2 * parts[0] == parts[1] + 2 * 32  # 97 rows of embedding and head are 49 and 49


def test_split_tokens_leave_a_share_between_layers():
    flags = {"parallel.tp": 2, "model.gradient_checkpointing": True}
    kept = [
        setting_of("sft", PlanConfig(device="cpu", gpus=2), **flags, **{"parallel.sequence_parallel": split}).policy()
        for split in (False, True)
    ]
    whole, parts = (model.per_token()["residual"][0] for model in kept)
    assert whole == 2 * parts == 4 * 32


def test_a_copy_to_sample_from_is_split_over_those_that_sample_together():
    copies = {}
    for tp in (1, 2, 4):
        setting = setting_of("grpo", PlanConfig(device="cpu", gpus=4), **{"parallel.generate": {"tp": tp}})
        copies[tp] = memory(setting).kinds["copy to sample from"]
    assert copies[1] == 2 * copies[2] == 4 * copies[4]
    with pytest.raises(ValueError, match=r"^--gpus 4: parallel\.generate: tp 3 does not divide the ranks$"):
        memory(setting_of("grpo", PlanConfig(device="cpu", gpus=4), **{"parallel.generate": {"tp": 3}}))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(method):
    flags = {"reference.path": "teacher"} if method == "distill" else {}
    setting = setting_of(method, **{"model.config.tie_word_embeddings": True, **flags})
    if method == "distill":  # no such directory: the student's sizes stand in
        setting = changed(setting, reference={"path": None})
    found = plan(setting)
    assert found.fits and found.memory.peak > 0 and found.speed.step > 0
    assert bool(found.memory.rows) == bool(METHODS[method].algorithms)


def test_a_shorter_way_takes_less():
    base = setting_of("dpo", PlanConfig(device="h100"), model=LARGE, **{"data.max_length": 2048, "batch.tokens": 6144})
    peak = memory(base).peak
    for section, values in (
        ("model", {"gradient_checkpointing": True}),
        ("model", {"lora": {"r": 16}}),
        ("model", {"activation_offloading": True}),
        ("optim", {"name": "adamw_8bit"}),
        ("optim", {"offload": True}),
        ("batch", {"tokens": 3072}),
        ("batch", {"size": 1}),
    ):
        assert memory(changed(base, **{section: values})).peak < peak, values


def test_llama_3_8b_is_counted_on_eight_gpus():
    setting = setting_of("dpo", PlanConfig(gpus=8), model=EIGHT, **{"data.max_length": 2048, "batch.size": 64})
    found = memory(setting)
    assert sum(w.numel for w in setting.policy().weights) == 8_030_261_248
    assert found.kinds["weights"] == pytest.approx(4 * 8_030_261_248 / 8)
    assert found.kinds["moments"] == pytest.approx(8 * 8_030_261_248 / 8)
    assert largest(setting) is None and found.peak > setting.device.usable


def run(capsys, *words):
    code = cli.main(["plan", *words])
    return code, capsys.readouterr()


def test_the_command_says_what_is_too_much_and_writes_what_fits(capsys, tmp_path):
    settings = {"method": "dpo", "model": {"config": LLAMA}, "data": {"max_length": 512}, "batch": {"size": 8}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", str(tmp_path / "run.yaml"), "--gpus", "2", "--memory", "8MB"]
    code, said = run(capsys, *words)
    assert code == 1 and "too much by" in said.out and "model.gradient_checkpointing: true" in said.out
    code, said = run(capsys, *words, "--fit", str(tmp_path / "fit.yaml"), "--json")
    found = json.loads(said.out)
    assert code == 0 and found["fits"] and found["peak"] <= found["limit"]
    assert found["parameters"] == {"total": 29_472, "trained": 29_472}
    config = parse_config("dpo", [*words[:2], "--config", str(tmp_path / "fit.yaml")])
    assert config.batch.tokens == found["settings"]["batch"]["tokens"]


@pytest.mark.parametrize(
    "words, told",
    [
        (["--memory", "much"], "--memory: expected a size such as 80GB or 79GiB, got 'much'"),
        (["--gpus", "0"], "--gpus and --gpus_per_node must be at least 1"),
        (["--mfu", "2"], "--mfu and --bandwidth_share must be above 0 and at most 1"),
        (["--gpus", "8", "--parallel.tp", "3"], "--gpus 8: parallel: dp_replicate 1 x dp_shard -1 x tp 3"),
        (["--gpus", "3", "--parallel.tp", "3"], "parallel.tp 3 does not divide the model's 4 attention heads"),
        (["--prompt", "30", "--answer", "30"], "do not fit data.max_length 32"),
        (["--device", "gtx"], "device"),
        (["--gpu", "8"], "gpu"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys, words, told):
    code, said = run(capsys, "dpo", "--model.config", json.dumps(LLAMA), "--data.max_length", "32", *words)
    assert code in (1, 2) and told in said.err and said.err.count("\n") == 1


def test_sizes_are_read():
    assert bytes_of("80GB") == 80e9 and bytes_of("79GiB") == 79 * 2**30


def test_shares_of_heads_and_rows():
    part = share_of(describe_model(ModelConfig(config=LLAMA)), 2)
    assert (part.num_attention_heads, part.num_key_value_heads, part.intermediate_size) == (2, 1, 24)
    assert part.vocab_size == 49 and part.head_dim == 8
