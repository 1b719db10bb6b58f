"""Runs whose tokenizer has more tokens than the model has rows."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.config import ModelConfig
from fastalign.engine.train import train
from fastalign.models.load import load_policy, save_pretrained
from runs import LLAMA, assert_close, numbers


@pytest.fixture
def small(tmp_path):
    """A model of 500 rows; the tokenizer has 512 tokens."""
    return str(save_pretrained(load_policy(ModelConfig(config=LLAMA), vocab_size=500), None, tmp_path / "small"))


@pytest.fixture
def grown(configure, small):
    def make(name, method="dpo", **overrides):
        settings = {"model.path": small, "model.config": None, "model.resize_embeddings": True}
        return configure(method, name, **{**settings, "run.steps": 4, "optim.schedule": "constant", **overrides})

    return make


def test_refused_before_data_are_tokenised(grown, monkeypatch):
    monkeypatch.setattr("fastalign.engine.setup.encode", None)
    with pytest.raises(
        ValueError, match=r"^model\.path: .* 512 tokens and the model only 500: .* model\.resize_embeddings"
    ):
        train(grown("run", **{"model.resize_embeddings": False}))


def test_new_rows_train_resume_and_are_exported(grown, small):
    whole = grown("whole", **{"run.save_every": 2})
    train(whole)
    half = grown("half", **{"run.steps": 2})
    train(half)
    train(grown("half", **{"run.resume": True}))
    assert numbers(half.run.output_dir) == numbers(whole.run.output_dir)
    first = numbers(whole.run.output_dir)[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["rewards/margins"] == 0

    exported = Path(whole.run.output_dir) / "model"
    model, old = (AutoModelForCausalLM.from_pretrained(where) for where in (exported, small))
    assert model.config.vocab_size == len(model.lm_head.weight) == len(AutoTokenizer.from_pretrained(exported)) == 512
    new = model.lm_head.weight[500:]
    assert not torch.equal(new, old.lm_head.weight.mean(0).expand_as(new))  # every softmax moves every row
    again = AutoModelForCausalLM.from_pretrained(Path(half.run.output_dir) / "model")
    assert torch.equal(again(torch.arange(512)[None]).logits, model(torch.arange(512)[None]).logits)


def test_a_reference_of_its_own_grows_as_the_policy_does(grown, small):
    """That of the path which the policy starts from is the policy as it starts, whether or not it is named."""
    alone, named = grown("alone"), grown("named", **{"reference.path": small})
    for config in (alone, named):
        train(config)
    assert_close(alone.run.output_dir, named.run.output_dir, 1e-6)


def test_an_adapter_run_trains_and_holds_them(grown):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = grown("run", **{"model.lora": {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}})
    train(config)
    assert numbers(config.run.output_dir)[0]["rewards/margins"] == 0
    model = peft.AutoPeftModelForCausalLM.from_pretrained(Path(config.run.output_dir) / "model")
    rows = model.get_output_embeddings().weight
    assert len(rows) == 512 and not torch.equal(rows[500], rows[:500].mean(0))


def test_a_teacher_does_not_grow(grown, small):
    config = grown("run", "distill", **{"reference.path": small})
    with pytest.raises(
        ValueError, match=r"^reference\.path: .* 512 tokens and the model only 500: .*a teacher gets none"
    ):
        train(config)
