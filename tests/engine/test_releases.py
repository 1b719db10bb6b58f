"""What every release of transformers, datasets and peft within the bounds of pyproject.toml must do.

`make oldest` and `make newest` run this file among others.
"""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastalign.arguments import parse_config
from fastalign.engine.train import train
from fastalign.models import native
from fastalign.models.load import load_policy, load_tokenizer
from fastalign.ops.backends import cpp
from runs import LLAMA, records, write_yaml

NATIVE = ("llama", "mistral", "qwen2", "qwen3")
"""Families that train through layers of our own, below transformers' names for their inputs."""


@pytest.mark.parametrize(
    "kind, lora", [*((kind, None) for kind in (*NATIVE, "gemma2")), ("llama", {"r": 4}), ("gemma2", {"r": 4})]
)
def test_one_step_of_every_family(kind, lora, configure):
    """From a file of settings and rows to a model that transformers, or peft, loads."""
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
    model = {**LLAMA, "model_type": kind, **({} if kind == "qwen2" else {"head_dim": 8})}
    asked = configure("dpo", **{"model.config": model, "model.lora": lora, "run.steps": 1, "optim.warmup": 0})
    config = parse_config("dpo", ["--config", str(write_yaml(asked)), "--loss.beta", "0.3"])
    train(config)
    (line,) = records(config.run.output_dir)
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-6) and line["grad_norm"] > 0
    auto = peft.AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    ids = torch.arange(20)[None]
    trained = auto.from_pretrained(Path(config.run.output_dir) / "model").eval()(input_ids=ids).logits
    start = load_policy(config.model, tokenizer=load_tokenizer(config.model))
    assert any(isinstance(m, native.Attention) for m in start.modules()) == (
        kind in NATIVE and cpp.unavailable() is None
    )
    start.model.set_attn_implementation("eager")
    assert trained.isfinite().all() and not torch.equal(trained, start.model(input_ids=ids).logits)
