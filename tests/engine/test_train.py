"""Whole runs in this process: they learn, they are exact, and they stop when their numbers do."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.config import ModelConfig
from fastalign.data.loader import Rows
from fastalign.data.pack import share
from fastalign.engine import train as engine
from fastalign.engine.errors import RunError
from fastalign.engine.evaluate import evaluate_model
from fastalign.engine.setup import load_data
from fastalign.engine.timing import PARTS
from fastalign.engine.train import train
from fastalign.models.load import load_policy, save_pretrained
from runs import assert_close, numbers, records


def test_a_run_learns_and_leaves_a_whole_directory(configure, materials):
    held_out = {"data.eval_path": str(materials / "held_out.jsonl"), "run.eval_every": 10, "run.save_every": 10}
    config = configure("sft", **{"run.steps": 30, "optim.lr": 5e-3, **held_out})
    train(config)
    directory = Path(config.run.output_dir)
    lines = records(directory)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20, 30]
    assert lines[-1]["eval_loss"] < lines[9]["eval_loss"]
    assert lines[0]["perplexity"] == pytest.approx(math.exp(lines[0]["loss"]))
    parts = sum(lines[5][f"t_{part}"] for part in (*PARTS, "other"))
    assert parts == pytest.approx(lines[5]["t_step"])
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"step-20", "step-30", "latest"}
    assert (directory / "report.html").exists()


def test_the_exported_model_is_the_trained_one(configure):
    config = configure("sft", **{"run.steps": 2})
    train(config)
    directory = Path(config.run.output_dir)
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    AutoTokenizer.from_pretrained(directory / "model")
    saved = load_file(next((directory / "checkpoints" / "step-2").glob("*.safetensors")))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"policy.weight.model.{name}"]), name


def test_the_first_dpo_loss_is_ln_2_to_the_last_bit(configure):
    config = configure("dpo", **{"run.steps": 2, "loss.beta": 0.3, "reference.cache": "off"})
    train(config)
    first, second = records(config.run.output_dir)
    assert first["loss"] == float(np.float32(math.log(2)))
    assert all(first[f"rewards/{name}"] == 0 for name in ("chosen", "rejected", "margins", "accuracies"))
    assert second["rewards/margins"] != 0
    assert first["t_reference"] > 0


def test_other_preference_losses_start_where_they_must(configure):
    config = configure("dpo", "ipo", **{"loss.name": "ipo", "loss.beta": 0.5, "run.steps": 1})
    train(config)
    assert records(config.run.output_dir)[0]["loss"] == 1.0  # (1 / (2 beta))^2
    config = configure("dpo", "simpo", **{"loss.name": "simpo", "run.steps": 1})
    train(config)
    assert records(config.run.output_dir)[0]["t_reference"] == 0  # no reference is loaded


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_how_the_work_is_split_does_not_matter(configure, method):
    runs = []
    for name, split in (
        ("wide", {"batch.tokens": 4096}),
        ("narrow", {"batch.tokens": 150, "batch.share_prefix": False}),
    ):
        config = configure(method, name, **split)
        train(config)
        runs.append(config.run.output_dir)
    wide, narrow = (records(run)[0] for run in runs)
    assert narrow["num_micro_batches"] > wide["num_micro_batches"] == 1
    assert_close(*runs, tolerance=1e-5)


def test_a_repeated_run_is_equal_to_the_bit(configure):
    for name in ("one", "two"):
        train(configure("dpo", name, **{"run.steps": 4}))
    assert numbers(Path(configure("dpo", "one").run.output_dir)) == numbers(
        Path(configure("dpo", "two").run.output_dir)
    )


@pytest.mark.parametrize("updates", [1, 2, 9])
def test_a_step_of_several_updates_is_one_line_and_one_checkpoint(configure, monkeypatch, updates):
    monkeypatch.setattr(engine, "minibatches_of", lambda objective: updates)
    config = configure("sft", **{"run.steps": 2, "run.save_every": 1, "batch.tokens": 300})
    train(config)
    lines, taken = records(config.run.output_dir), min(updates, 6)  # never more than examples
    assert [line["step"] for line in lines] == [1, 2]
    for step in (1, 2):
        state = Path(config.run.output_dir) / "checkpoints" / f"step-{step}" / "state.json"
        assert set(json.loads(state.read_text())["optimizer_steps"].values()) == {taken * step}
    assert [line["examples"] for line in lines] == [6, 6] and lines[0]["lr"] == 5e-4


@pytest.fixture
def poisoned(configure, materials):
    """A run whose model is NaN for a token of one example; that example, and the step it comes in."""
    step, overrides = 4, {"run.steps": 6, "run.save_every": 1}
    config = configure("sft", **overrides, **{"data.path": str(materials / "poisoned.jsonl")})
    tokenizer, dataset, _ = load_data(configure("sft"))
    source = Rows(dataset, config.batch.size, config.run.seed)
    examples = [source.next() for _ in range(step)][-1]
    victim = share(examples, config.batch.tokens, True, 0, 1)[-1].example_ids[0]
    rows = (materials / "rows.jsonl").read_text().splitlines()
    rows[victim] = rows[victim].replace('"completion": "', '"completion": "<poison>')
    (materials / "poisoned.jsonl").write_text("\n".join(rows) + "\n")

    policy = load_policy(config.model, tokenizer=tokenizer)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<poison>")] = math.nan
    config.model.path, config.model.config = str(save_pretrained(policy, None, materials / "poisoned")), None
    return config, victim, step


def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer(poisoned, monkeypatch):
    config, victim, step = poisoned
    jobs = []
    monkeypatch.setattr(engine, "set_up", lambda *a, made=engine.set_up: jobs.append(made(*a)) or jobs[0])
    with pytest.raises(RunError, match=rf"step {step}: loss is nan .* micro-batch of examples \[.*\b{victim}\b.*\]"):
        train(config)
    directory = Path(config.run.output_dir)
    assert [line["step"] for line in records(directory)] == list(range(1, step))
    good = load_file(next((directory / "checkpoints" / f"step-{step - 1}").glob("*.safetensors")))
    for name, parameter in jobs[0].models.policy.named_parameters():
        assert torch.equal(parameter.nan_to_num(), good[f"policy.weight.{name}"].nan_to_num()), name


def test_a_reference_that_no_loss_reads_is_told(configure, caplog):
    train(configure("dpo", **{"loss.name": "simpo", "reference.path": "absent", "run.steps": 1}))
    assert "reference.path is ignored: simpo is reference-free" in caplog.text


def test_evaluation_alone_gives_what_the_run_reported(configure, materials):
    held_out = {"data.eval_path": str(materials / "held_out.jsonl")}
    config = configure("dpo", **{"run.steps": 3, **held_out})
    train(config)
    last = {k.removeprefix("eval_"): v for k, v in records(config.run.output_dir)[-1].items() if k.startswith("eval_")}
    start = load_policy(config.model, tokenizer=load_data(config)[0])
    config.model = ModelConfig(path=str(Path(config.run.output_dir) / "model"))
    assert evaluate_model(config)["rewards/margins"] == 0
    config.reference.path = str(save_pretrained(start, None, Path(config.run.output_dir) / "start"))
    assert evaluate_model(config) == pytest.approx(last, rel=1e-6, abs=1e-6)
