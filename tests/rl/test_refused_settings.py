"""Settings of on-policy runs that cannot be meant: one line each, before anything is loaded."""

from pathlib import Path

import pytest
import yaml

from fastalign.arguments import parse_config
from fastalign.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceConfig,
    RunConfig,
    SamplerConfig,
)
from fastalign.engine.train import train
from fastalign.written import UsageError

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32}


def config_of(tmp_path: Path, method: str, algorithm=None, sampler=None, rewards=None, **others) -> Config:
    model = {"config": LLAMA, "tokenizer": "builtin:letters", **others.get("model", {})}
    return Config(
        method,
        model=ModelConfig(**model),
        reference=ReferenceConfig(**others.get("reference", {})),
        data=DataConfig(**{"path": str(tmp_path / "absent.jsonl"), "max_length": 32, **others.get("data", {})}),
        run=RunConfig(**{"output_dir": str(tmp_path / "run"), "steps": 2, **others.get("run", {})}),
        parallel=ParallelConfig(generate=others.get("generate")),
        algorithm=AlgorithmConfig(**(algorithm or {})),
        sampler=SamplerConfig(**{"max_new_tokens": 12, **(sampler or {})}),
        rewards=[{"builtin": "exact_match"}] if rewards is None else rewards,
    )


CASES = [
    ("grpo", {"generate": {"tp": 0}}, r"parallel\.generate: tp 0: expected how many ranks sample together, 1 or more"),
    (
        "grpo",
        {"generate": {"tp": 2}, "sampler": {"backend": "transformers"}},
        r"parallel\.generate: tp 2: only sampler\.backend native samples with several ranks: set tp to 1",
    ),
    (
        "grpo",
        {"generate": {"tp": 2}, "sampler": {"environment": "guess.py:make"}},
        r"parallel\.generate: tp 2: each rank would have answers of its own from sampler\.environment: set tp to 1",
    ),
    ("grpo", {"generate": {"dp": 1}}, r"parallel\.generate: unknown dp; it takes tp and dtype"),
    (
        "grpo",
        {"generate": {"dtype": "int4"}},
        r"parallel\.generate: dtype 'int4': expected one of auto, float32, bfloat",
    ),
    (
        "grpo",
        {"generate": {}, "sampler": {"backend": "vllm"}},
        r"parallel\.generate: a server .* has weights of its own",
    ),
    ("grpo", {"rewards": []}, r"grpo learns from rewards of its samples, and none is set: e\.g\. rewards"),
    ("grpo", {"algorithm": {"name": "gpro"}}, r"unknown algorithm\.name 'gpro': did you mean '.*'\?"),
    ("grpo", {"algorithm": {"name": "ppo"}}, r"unknown algorithm\.name 'ppo'.*all: grpo, dr_grpo"),
    ("grpo", {"algorithm": {"preset": "strong"}}, r"algorithm\.preset: grpo has no presets, got 'strong'"),
    ("ppo", {"algorithm": {"preset": "weak"}}, r"algorithm\.preset: expected one of seed, strong, or null, got 'weak'"),
    ("grpo", {"algorithm": {"num_generations": 1}}, r"algorithm\.num_generations must be at least 2 for grpo, which"),
    ("grpo", {"algorithm": {"num_generations": "8"}}, r"algorithm\.num_generations: expected .*, got '8'"),
    ("grpo", {"algorithm": {"kl_coef": -0.1}}, r"algorithm\.kl_coef must be at least 0, got -0\.1"),
    ("ppo", {"algorithm": {"gamma": 1.5}}, r"algorithm\.gamma must be in \[0, 1\], got 1\.5"),
    ("ppo", {"algorithm": {"lam": -0.5}}, r"algorithm\.lam must be in \[0, 1\], got -0\.5"),
    ("ppo", {"algorithm": {"lam": float("nan")}}, r"algorithm\.lam must be in \[0, 1\], got nan"),
    ("ppo", {"algorithm": {"value_clip": 0.0}}, r"algorithm\.value_clip must be above 0, got 0\.0"),
    ("ppo", {"algorithm": {"max_ratio": 1.0}}, r"algorithm\.max_ratio must be above 1, got 1\.0"),
    (
        "grpo",
        {"algorithm": {"critic_lr": 0.1}},
        r"algorithm\.critic_path, critic_lr and critic_warmup are of a separate",
    ),
    (
        "ppo",
        {"algorithm": {"critic_warmup": 2}},
        r"algorithm\.critic_path, critic_lr and critic_warmup are of a separate",
    ),
    ("ppo", {"algorithm": {"critic": "none"}}, r"algorithm\.critic none: ppo needs a critic"),
    ("grpo", {"algorithm": {"normalize_values": True}}, r"algorithm\.normalize_values: there is no critic"),
    ("grpo", {"algorithm": {"truncation": "bootstrap"}}, r"algorithm\.truncation bootstrap needs a critic"),
    ("grpo", {"algorithm": {"kl_coef": 0.1, "kl_estimator": "k1"}}, r"kl_estimator k1 has no gradient that means"),
    ("grpo", {"algorithm": {"kl_target": 6.0}}, r"algorithm\.kl_target adapts the price of KL in the reward"),
    ("grpo", {"algorithm": {"reference_sync": "ema"}}, r"reference_sync ema: no reference is read where kl_coef is 0"),
    ("raft", {"algorithm": {"num_iterations": 4}}, r"algorithm\.num_iterations 4: raft trains on selected completions"),
    ("online-dpo", {"algorithm": {"kl_coef": 0.1}}, r"algorithm\.kl_coef 0\.1: online_dpo trains on selected"),
    (
        "grpo",
        {"algorithm": {"name": "dapo"}, "run": {"steps": None}},
        r"filter_zero_std \(dapo\) draws .*: set run\.steps",
    ),
    ("grpo", {"algorithm": {"num_minibatches": 16}}, r"algorithm\.num_minibatches 16 is more than batch\.size 8"),
    ("grpo", {"sampler": {"temperature": 0.0}}, r"sampler\.temperature 0 makes all completions of a prompt equal"),
    ("grpo", {"sampler": {"temperature": -1.0}}, r"sampler\.temperature: expected a number of 0 or more, got -1\.0"),
    (
        "grpo",
        {"sampler": {"max_new_tokens": 32}},
        r"data\.max_length 32 leaves no room for a prompt beside sampler\.max",
    ),
    (
        "grpo",
        {"algorithm": {"kl_coef": 0.1, "reference_sync": "ema"}, "model": {"dtype": "bfloat16"}},
        r"reference_sync ema moves the reference by less than bfloat16 can hold: set model\.dtype to float32",
    ),
    (
        "grpo",
        {"algorithm": {"kl_coef": 0.1, "reference_sync": "periodic"}, "model": {"lora": {"r": 2}}},
        r"reference_sync periodic: the reference of an adapter is the model below it",
    ),
    ("dpo", {}, r"dpo does not sample: algorithm, sampler and rewards are of grpo, ppo"),
]


@pytest.mark.parametrize("method, changes, words", CASES)
def test_settings_that_cannot_be_meant(tmp_path, method, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        train(config_of(tmp_path, method, **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_reward_model_that_is_absent_is_told_before_the_policy_is_loaded(tmp_path):
    data = {"path": "builtin:sort_letters", "cache_dir": str(tmp_path / "cache"), "limit": 4}
    rewards = [{"model": str(tmp_path / "absent")}]
    with pytest.raises(ValueError, match=r"rewards\[0\]\.model: .*absent"):
        train(config_of(tmp_path, "grpo", data=data, rewards=rewards))


@pytest.mark.parametrize(
    "method, tree, words",
    [
        ("dpo", {"method": "grpo"}, r"is for 'grpo', not 'dpo': run fastalign grpo --config"),
        ("grpo", {"method": "dpo"}, r"is for 'dpo', not 'grpo': run fastalign dpo --config"),
        ("dpo", {"rewards": [{"builtin": "gsm8k"}]}, r"dpo does not sample: rewards in .* is of grpo, ppo"),
        ("dpo", {"algorithm": {"name": "grpo"}}, r"dpo does not sample: algorithm in .* is of grpo, ppo"),
        ("sft", {"sampler": {"top_k": 3}}, r"sft does not sample: sampler in .* is of grpo, ppo"),
    ],
)
def test_files_of_other_methods(tmp_path, method, tree, words):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UsageError, match=words):
        parse_config(method, ["--config", str(path)])


def test_flags_of_other_methods(tmp_path):
    with pytest.raises(UsageError, match=r"dpo does not sample: algorithm is of grpo, ppo"):
        parse_config("dpo", ["--algorithm.name", "grpo"])
