"""`fastalign export`: any checkpoint as a Hugging Face directory, with equal logits, without the training data."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume_onpolicy import configure as on_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastalign.cli import main
from fastalign.engine import train as engine
from fastalign.engine.train import set_up, train
from fastalign.parallel.mesh import Axis, World
from runs import override

IDS = torch.tensor([[3, 5, 7, 9, 11, 4]])
ALONE = World(Axis(), torch.device("cpu"))


def export(config, *words: str) -> None:
    assert main(["export", config.run.output_dir, *words]) == 0


@pytest.fixture
def refused(capsys):
    """The line with which an export is refused."""

    def run(config, *words: str) -> str:
        capsys.readouterr()
        assert main(["export", config.run.output_dir, *words]) == 1
        return capsys.readouterr().err.strip()

    return run


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_every_checkpoint_of_a_run_is_exported_while_it_goes_on_and_without_its_data(configure, refused, capsys):
    config = configure("sft", **{"run.save_every": 2, "run.keep": 9, "run.steps": 4})
    directory = Path(config.run.output_dir)
    train(config, lambda step: export(config, "--step", "2") if step == 3 else None)
    assert f"{directory}/export/step-2: the policy of {directory} after step 2" in capsys.readouterr().out
    config_file = directory / "config.yaml"
    text = config_file.read_text()
    config_file.write_text(text.replace("rows.jsonl", "gone.jsonl"))
    export(config, "--out", str(directory / "last"))
    want = (directory / "model" / "model.safetensors").read_bytes()
    assert (directory / "last" / "model.safetensors").read_bytes() == want
    assert (directory / "export" / "step-2" / "model.safetensors").read_bytes() != want
    AutoTokenizer.from_pretrained(directory / "last")

    export(config, "--dtype", "bfloat16")
    half = AutoModelForCausalLM.from_pretrained(directory / "export" / "step-4", dtype="auto")
    whole = AutoModelForCausalLM.from_pretrained(directory / "model").bfloat16()
    assert half.dtype == torch.bfloat16 and torch.equal(logits(half), logits(whole))

    assert "export/step-4 is there: set --overwrite to replace it" in refused(config)
    export(config, "--overwrite")
    assert "--step 3: " in (line := refused(config, "--step", "3")) and line.endswith("whole ones: step-2, step-4")
    assert "keeps no best checkpoint (run.keep_best)" in refused(config, "--step", "best")
    assert "--merge-lora: there is no adapter to merge" in refused(config, "--merge-lora", "--out", "x")
    assert "--critic: sft has none" in refused(config, "--critic", "--out", "x")
    shutil.rmtree(directory / "checkpoints")
    assert f"{directory} has no checkpoint yet" in refused(config, "--out", "x")


def test_an_adapter_is_exported_as_it_is_and_merged(configure):
    peft = pytest.importorskip("peft")
    config = configure("dpo", **{"run.steps": 2, "model.lora": {"r": 4}, "optim.lr": 1e-2})
    train(config)
    directory = Path(config.run.output_dir)
    export(config)
    adapter = load_file(directory / "export" / "step-2" / "adapter_model.safetensors")
    want = load_file(directory / "model" / "adapter_model.safetensors")
    assert adapter.keys() == want.keys() and all(torch.equal(x, want[name]) for name, x in adapter.items())
    export(config, "--merge-lora", "--out", str(directory / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(directory / "merged")
    apart = peft.AutoPeftModelForCausalLM.from_pretrained(directory / "export" / "step-2")
    torch.testing.assert_close(logits(merged), logits(apart), rtol=1e-5, atol=1e-6)  # products in another order
    with apart.disable_adapter():
        assert (logits(merged) - logits(apart)).abs().max() > 1e-3


def test_a_reward_model_is_exported(configure):
    config = configure("reward", **{"run.steps": 2, "data.format": "preference", "data.columns": {}})
    train(config)
    export(config)
    directory = Path(config.run.output_dir)
    ours, want = (
        AutoModelForSequenceClassification.from_pretrained(directory / name) for name in ("export/step-2", "model")
    )
    assert logits(ours).shape == (1, 1) and torch.equal(logits(ours), logits(want))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_critic_is_exported_as_a_sequence_classifier(tmp_path, critic):
    config = override(on_policy(tmp_path, "ppo", "run", critic=critic, normalize_values=False), {"run.steps": 2})
    train(config)
    export(config, "--critic")
    directory = Path(config.run.output_dir) / "export" / "step-2-critic"
    made = AutoModelForSequenceClassification.from_pretrained(directory)
    constant = json.loads((directory / "config.json").read_text()).get("value_head_bias", 0.0)
    torch.testing.assert_close(logits(made)[0, 0] + constant, value_of(config, critic), rtol=1e-5, atol=1e-6)
    export(config)
    AutoModelForCausalLM.from_pretrained(directory.with_name("step-2"))


def value_of(config, critic: str) -> torch.Tensor:
    """What the run's own critic says of the state after the last token."""
    config.run.resume = "auto"
    config = engine.filled_in(config, objective := engine.objective_of(config))
    found = engine.claim(config, ALONE)
    job = set_up(engine.settle(config, ALONE.device), objective, ALONE, found)
    engine.resume(job, found)
    policy = job.models.critic or job.models.policy
    policy.model.set_attn_implementation("sdpa")
    head = policy.head if critic == "separate" else policy.value_head
    with torch.no_grad():
        return head(policy.backbone(input_ids=IDS, use_cache=False).last_hidden_state)[0, -1, 0]
