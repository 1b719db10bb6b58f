"""Runs with adapters: their reference, their checkpoints, what they leave, one rank and two."""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastalign.config import ModelConfig, ParallelConfig
from fastalign.engine import train as engine
from fastalign.engine.methods import make_objective
from fastalign.engine.reference.fingerprint import fingerprint, origin_of
from fastalign.engine.train import set_up, train
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained
from fastalign.models.lora import WithoutAdapter
from fastalign.models.lora import identity as takes_part
from fastalign.parallel.mesh import Axis, World, world
from runs import LLAMA, assert_close, finish, fork, numbers

peft = pytest.importorskip("peft", reason="peft is not installed")

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
"""Equal weights: the engine's own layers round otherwise than those of transformers."""
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"]}
STEPS, MIDDLE = 6, 3


@pytest.fixture
def tune(configure, tmp_path):
    """A DPO run over an adapter, ``tune("name", lora={...})``, whose reference no other test has computed already."""

    def make(name, lora=LORA, **overrides):
        settings = {"run.steps": STEPS, "run.save_every": MIDDLE, "optim.lr": 1e-2, "model.lora": lora}
        settings["data.cache_dir"] = str(tmp_path / "cache")
        return configure("dpo", name, **{**settings, **overrides})

    return make


def first_step(config):
    return numbers(config.run.output_dir)[0]


def margins_start_at_zero_and_move(config):
    lines = numbers(config.run.output_dir)
    assert lines[0]["rewards/margins"] == lines[0]["rewards/chosen"] == 0.0
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert all(line["rewards/chosen"] != 0 for line in lines[2:])


def test_a_run_is_its_own_reference_and_leaves_what_peft_loads(tune, caplog):
    config = tune("run")
    with caplog.at_level("INFO"):
        train(config)
    assert "reference: the policy without its adapter (nothing else trains" in caplog.text
    margins_start_at_zero_and_move(config)

    directory = Path(config.run.output_dir)
    saved = load_file(directory / "model" / "adapter_model.safetensors")
    assert len(saved) == 2 * (2 * 2 + 1) and all(".lora_A." in n or ".lora_B." in n for n in saved)
    assert (directory / "model" / "tokenizer_config.json").exists()
    again = peft.AutoPeftModelForCausalLM.from_pretrained(directory / "model").eval()
    ids, section = torch.arange(20)[None], config.model
    trained = replace(section, path=str(directory / "model"), config=None, lora=None)
    close(again(input_ids=ids).logits, plain_logits(trained, ids))
    with again.disable_adapter():  # the base never moved
        close(again(input_ids=ids).logits, plain_logits(replace(section, lora=None), ids))


def plain_logits(section, ids):
    model = load_policy(section, tokenizer=load_tokenizer(section)).model.eval()
    model.set_attn_implementation("sdpa")
    return model(input_ids=ids).logits


def test_a_checkpoint_keeps_what_trains_and_goes_on_to_the_bit(tune):
    config = tune("run", {**LORA, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]})
    train(config)
    expected, directory = numbers(config.run.output_dir), Path(config.run.output_dir)
    exported = load_file(directory / "model" / "adapter_model.safetensors")
    names = []
    for file in (directory / "checkpoints" / f"step-{STEPS}").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    weights = [name for name in names if name.startswith("policy.weight.")]
    assert len(weights) == len(exported) == 2 * 2 + 1 and len(names) == 3 * len(weights)

    shutil.rmtree(directory / "checkpoints" / f"step-{STEPS}")
    shutil.rmtree(directory / "model")
    config.run.resume = True
    train(config)
    assert numbers(config.run.output_dir) == expected
    again = load_file(directory / "model" / "adapter_model.safetensors")
    assert again.keys() == exported.keys() and all(torch.equal(again[n], x) for n, x in exported.items())


def test_an_adapter_is_never_resumed_over_another_base(tune, tmp_path):
    config = tune("run", **{"run.steps": MIDDLE})
    section, base = replace(config.model, lora=None), tmp_path / "base"
    save_pretrained(load_policy(section, vocab_size=512), None, base)
    config.model.path, config.model.config = str(base), None
    train(config)
    save_pretrained(load_policy(section, vocab_size=512, seed=1), None, base)
    shutil.rmtree(Path(config.run.output_dir) / "model")
    config.run.resume = True
    with pytest.raises(ValueError, match="was trained over other frozen weights: resume with the base that"):
        train(config)


def test_a_continued_adapter_is_measured_from_where_it_starts(tune, caplog):
    first = tune("first")
    train(first)
    second = tune("second", None)
    second.model.path, second.model.config = str(Path(first.run.output_dir) / "model"), None
    with caplog.at_level("INFO"):
        train(second)
    assert "reference: a frozen copy of what trains; the frozen weights are shared (the adapter does not" in caplog.text
    margins_start_at_zero_and_move(second)
    assert first_step(second)["logps/chosen"] != first_step(first)["logps/chosen"]  # it goes on from the adapter
    config = peft.PeftConfig.from_pretrained(Path(second.run.output_dir) / "model")
    assert Path(config.base_model_name_or_path) == Path(first.run.output_dir).resolve() / "model" / "base"


@pytest.mark.parametrize("lora, copies", [(LORA, 0), ({**LORA, "init_lora_weights": False}, 1), (None, 1)])
def test_the_reference_costs_no_second_copy_of_frozen_weights(tune, lora, copies):
    config = tune("run", lora)
    with world(ParallelConfig()) as alone:
        models = set_up(config, make_objective("dpo", {}), alone).models
    reference = models.reference.policy if isinstance(models.reference, WithoutAdapter) else models.reference
    extra = {p.data_ptr(): p.nbytes for p in reference.parameters()}
    for parameter in models.policy.parameters():
        extra.pop(parameter.data_ptr(), None)
    trained = sum(p.nbytes for p in models.policy.parameters() if p.requires_grad)
    assert sum(extra.values()) == copies * trained
    assert len(engine.make_optimizer(models.policy, config.optim).param_groups[0]["params"]) == (10 if lora else 16)


def test_settings_are_refused_before_any_work(tune):
    config = tune("run", {"rank": 3}, **{"data.path": "absent.jsonl"})
    with pytest.raises(ValueError, match=r"unknown key 'rank' in model\.lora"):
        train(config)
    assert not Path(config.run.output_dir).exists()


def test_two_ranks_agree_with_one(tune):
    one, two = (tune(name) for name in ("one", "two"))
    both = fork(two, ranks=2)
    train(one)
    assert "reference: the policy without its adapter" in finish(both)
    assert_close(one.run.output_dir, two.run.output_dir, tolerance=1e-5)
    margins_start_at_zero_and_move(two)
    mine, theirs = (load_file(Path(c.run.output_dir) / "model" / "adapter_model.safetensors") for c in (one, two))
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-5) for name in mine)


def test_a_reward_model_trains_its_head_beside_the_adapter(configure):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    settings = {"data.format": "preference", "run.steps": STEPS, "optim.lr": 1e-2, "model.lora": lora}
    config = configure("reward", **settings)
    train(config)
    directory = Path(config.run.output_dir) / "model"
    saved = load_file(directory / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 2 + 1
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1).eval()
    ids = torch.arange(3, 20)[None]
    section = replace(config.model, path=str(directory), config=None, lora=None)
    policy = load_policy(section, scalar_head=True).eval()
    policy.model.set_attn_implementation("sdpa")
    close(again(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    with again.disable_adapter():
        assert (again(input_ids=ids).logits - policy.model(input_ids=ids).logits).abs().max() > 1e-3
    new = load_policy(replace(config.model, lora=None), tokenizer=load_tokenizer(config.model), scalar_head=True)
    assert not torch.equal(next(x for name, x in saved.items() if "score" in name), new.head.weight)
    with pytest.raises(ValueError, match="is an adapter of task SEQ_CLS, not CAUSAL_LM: merge it into its base"):
        load_policy(section)


def test_losses_of_whole_distributions_get_a_copy_and_no_adapter_on_the_head(tune, caplog):
    config = tune("run", {"r": 4}, **{"loss.name": "tdpo1", "run.steps": 2})
    with caplog.at_level("INFO"):
        train(config)
    assert "(the loss compares both models' whole distributions at once)" in caplog.text
    lines = numbers(config.run.output_dir)
    assert lines[0]["rewards/margins"] == 0.0 != lines[1]["rewards/margins"]
    with pytest.raises(ValueError, match=r"loss tdpo1 serves no adapter on a head"):
        train(tune("other", **{"loss.name": "tdpo1"}))


@pytest.mark.parametrize("lora", [LORA, {**LORA, "init_lora_weights": False}])
def test_cached_log_probs_are_those_of_the_policy_as_it_starts(tune, tmp_path, lora):
    now, kept = tune("now", lora), tune("kept", lora)
    now.reference.cache, kept.reference.cache = "off", str(tmp_path / "log-probs")
    train(now)
    train(kept)
    assert numbers(kept.run.output_dir) == numbers(now.run.output_dir)


def test_a_cache_knows_an_adapter_by_all_that_it_adds(materials):
    section, alone = (
        ModelConfig(config=dict(LLAMA), tokenizer=str(materials / "tokenizer")),
        World(Axis(), torch.device("cpu")),
    )

    def identity(lora):
        described = replace(section, lora=lora)
        policy = load_policy(described, vocab_size=512)
        return fingerprint(policy, origin_of(described, 0, alone, adapted=takes_part(policy) is not None))

    assert identity(LORA) == identity({**LORA, "r": 3, "lora_alpha": 1}) == identity(None)  # they add nothing
    random = {**LORA, "init_lora_weights": False}
    assert identity(random) == identity(random)
    assert len({identity(None), identity(random), identity({**random, "lora_alpha": 1})}) == 3


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}])
def test_the_weights_below_an_adapter_may_be_quantised(tune, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = save_pretrained(load_policy(tune("base", None).model, vocab_size=512), None, tmp_path / "base")
    settings = {"model.config": None, "model.path": str(base), "model.quantization": bits}
    now, kept = (tune(name, **settings) for name in ("now", "kept"))
    now.reference.cache, kept.reference.cache = "off", str(tmp_path / "log-probs")
    train(now)
    margins_start_at_zero_and_move(now)
    train(kept)
    assert numbers(kept.run.output_dir) == numbers(now.run.output_dir)
    shutil.rmtree(Path(now.run.output_dir) / "checkpoints" / f"step-{STEPS}")
    now.run.resume = True
    train(now)
    assert numbers(kept.run.output_dir) == numbers(now.run.output_dir)
    more = tune("more", None, **{**settings, "model.path": str(Path(now.run.output_dir) / "model")})
    train(more)
    margins_start_at_zero_and_move(more)
