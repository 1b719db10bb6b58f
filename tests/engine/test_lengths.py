"""Sequences that a model cannot take are refused before the first step, whoever would read them."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.config import ModelConfig
from fastalign.data.examples import TokenDataset
from fastalign.data.loader import visited
from fastalign.data.pack import build_batch
from fastalign.engine.evaluate import evaluate_model
from fastalign.engine.loading import check_lengths
from fastalign.engine.reference.cache import Demand
from fastalign.engine.reference.precompute import precompute
from fastalign.engine.setup import load_data
from fastalign.engine.train import train
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained
from fastalign.models.support import max_length, trained_positions
from runs import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ONE = {"run.steps": 1, "batch.size": 4, "batch.tokens": 400}


@pytest.fixture
def write(tmp_path):
    """A file of rows with so many words in prompt and completion; a word is some tokens."""

    def make(name, *sizes, **more):
        texts = [("word " * prompt, "again " * completion) for prompt, completion in sizes]
        rows = [{"prompt": p, "completion": f"{c}{i}", **more} for i, (p, c) in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / f"{name}.jsonl")

    return make


@pytest.fixture
def other(materials, tmp_path):
    """The directory of another model, with its number of positions."""

    def make(positions, **options):
        described = {**GPT2, "n_positions": positions, **options}
        section = ModelConfig(config=described, tokenizer=str(materials / "tokenizer"))
        tokenizer = load_tokenizer(section)
        save_pretrained(load_policy(section, tokenizer=tokenizer), tokenizer, tmp_path / "other")
        return str(tmp_path / "other")

    return make


def lengths_of(config, held_out=False):
    """Tokens of each example by reading it."""
    dataset = load_data(config)[2 if held_out else 1]
    examples = dataset.fetch(list(range(len(dataset))))
    every = [[*e.sequences, *(e.mismatched.sequences if e.mismatched else ())] for e in examples]
    return np.array([max(len(ids) for ids, _ in sequences) for sequences in every])


def refused(config, command=train):
    with pytest.raises(ValueError, match=r"are longer than") as error:
        command(config)
    assert not list(Path(config.run.output_dir).glob("*.*")) and "\n" not in str(error.value)
    return str(error.value)


def message(lengths, limit, name="training examples", why="the positions the model has"):
    longer, longest = (lengths > limit).sum(), lengths.max()
    return (
        f"{longer} of {len(lengths)} {name} are longer than {limit} tokens, {why} (the longest has {longest} tokens): "
        f"set data.max_length to {limit}, which cuts completions there, or with data.truncation drop leaves these out"
    )


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_training_rows(configure, method):
    config = configure(method, **{"model.config": GPT2, **ONE, "run.steps": 64})
    lengths = lengths_of(config)
    assert 0 < (lengths > 64).sum() < len(lengths)
    assert refused(config) == message(lengths, 64)
    config.data.max_length, config.run.steps = 64, 1
    train(config)


def test_a_sliding_window(configure):
    config = configure("sft", **{"model.config": {**LLAMA, "model_type": "mistral", "sliding_window": 50}, **ONE})
    config.run.steps = 24
    assert refused(config) == message(lengths_of(config), 50, why="the model's sliding window")


def test_held_out_rows(configure, write):
    files = {"data.path": write("rows", *[(3, 2)] * 8), "data.eval_path": write("held", (3, 4), (3, 40), (3, 30))}
    config = configure("sft", **{"model.config": GPT2, **files, **ONE})
    assert refused(config) == message(lengths_of(config, held_out=True), 64, "held-out examples")
    said = refused(config, evaluate_model)
    assert said == message(lengths_of(config, held_out=True), 64, "examples")


def test_log_probs_ahead_of_runs(configure, tmp_path):
    config = configure("dpo", **{"model.config": GPT2, "reference.cache": str(tmp_path / "cache"), **ONE})
    assert refused(config, precompute) == message(lengths_of(config), 64)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("method", "name"), [("dpo", "reference"), ("distill", "teacher")])
def test_the_limit_of_another_model(configure, other, method, name):
    config = configure(method, **{"reference.path": other(48), **ONE, "run.steps": 24})
    assert refused(config) == message(lengths_of(config), 48, why=f"the positions the {name} has")
    config.data.max_length, config.run.steps = 48, 1
    train(config)


def test_mismatched_completions(configure, write):
    """Each row fits, and a long prompt with the long completion of the next does not."""
    path = write("rows", *[(14, 2), (2, 14)] * 4, label=True)
    config = configure(
        "kto", **{"model.config": GPT2, "data.path": path, "data.format": "unpaired", **ONE, "batch.size": 8}
    )
    lengths = lengths_of(config)
    assert max(len(e.sequences[0][0]) for e in load_data(config)[1]) <= 64 < lengths.max()
    assert refused(config) == message(lengths, 64)
    config.data.max_length = 64
    train(config)


def test_a_run_whose_rows_fit_is_accepted(configure, write):
    path = write("rows", *[(3, 2)] * 8)
    config = configure("sft", **{"model.config": GPT2, "data.path": path, "data.max_length": 4096, **ONE})
    train(config)


def test_rows_that_are_not_read_do_not_matter(configure, write):
    read = visited(12, 0, 4)
    path = write("rows", *[(3, 2) if i in read else (3, 90) for i in range(12)])
    config = configure("sft", **{"model.config": GPT2, "data.path": path, "data.max_length": 4096, **ONE})
    train(config)
    config.run.steps, config.run.output_dir = 2, config.run.output_dir + "-more"
    assert refused(config).startswith("4 of 8 training examples")


@pytest.mark.parametrize("method", ["sft", "dpo", "rrhf", "kto", "reward"])
def test_lengths_are_read_from_their_column(configure, method, monkeypatch):
    config = configure(method)
    config.data.format = "auto"
    expected = lengths_of(config)
    dataset = load_data(config)[1]
    monkeypatch.setattr(TokenDataset, "fetch", None)
    assert np.array_equal(dataset.lengths(), expected)


def test_a_window_that_only_the_layers_name(configure):
    """Code of a checkpoint may call its setting anything; the first forward pass shows it."""
    config = configure("sft", **{"model.config": {**LLAMA, "model_type": "mistral", "sliding_window": 50}, **ONE})
    tokenizer, dataset, _ = load_data(config)
    policy = load_policy(config.model, tokenizer=tokenizer)
    policy.max_length = None
    short = [e for e in dataset.fetch(list(range(len(dataset)))) if len(e.sequences[0][0]) <= 50][:2]
    with torch.no_grad():
        policy(build_batch(short, True), lambda hidden, *more, **options: hidden)
    demand = Demand(dataset, range(len(dataset)), 1, "training examples")
    with pytest.raises(ValueError, match="the model's sliding window"):
        check_lengths(policy, [demand], config.data.max_length)


# --- beyond the positions of a rotary embedding ----------------------------------------------------------------------


def test_rotary_positions_that_were_never_trained_are_told_once(configure, caplog):
    config = configure("sft", **{"model.config": {**LLAMA, "max_position_embeddings": 64}, **ONE, "run.steps": 24})
    lengths = lengths_of(config)
    config.run.steps, config.batch.size = 1, len(lengths)
    with caplog.at_level(logging.WARNING, "fastalign"):
        train(config)
    told = [r.getMessage() for r in caplog.records if "positions" in r.getMessage()]
    assert told == [
        f"{(lengths > 64).sum()} of {len(lengths)} training examples are longer than the 64 positions that the model "
        f"was made for (the longest has {lengths.max()} tokens): set data.max_length to 64 unless it is meant so"
    ]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, 64),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 256),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                }
            },
            128,
        ),
        ("gemma3_text", {"head_dim": 8}, 64),
        ("gpt2", {}, None),
    ],
)
def test_the_positions_a_model_was_made_for(kind, options, expected):
    sizes = {} if kind == "gpt2" else {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = AutoConfig.for_model(kind, vocab_size=61, max_position_embeddings=64, **sizes, **options)
    assert trained_positions(config) == expected
    assert AutoModelForCausalLM.from_config(config) is not None


def test_a_rotation_that_depends_on_the_length_is_a_limit_in_any_layer():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    usual = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    for full in (dynamic, usual):
        rope = {"full_attention": full, "sliding_attention": usual}
        config = AutoConfig.for_model(
            "gemma3_text", max_position_embeddings=64, sliding_window=None, rope_parameters=rope, **sizes
        )
        expected = (64, "the positions the model has") if full is dynamic else None
        assert max_length(config) == expected


# --- what else is known before the first step ------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "loss"), [("distill", {}), ("dpo", {"loss.name": "tdpo2"})])
def test_another_vocabulary(configure, other, method, loss):
    config = configure(method, **{"reference.path": other(512, vocab_size=600), **loss, **ONE})
    with pytest.raises(ValueError, match=r"the head of the model has 512 rows, that of reference\.path 600: choose"):
        train(config)
    assert not list(Path(config.run.output_dir).glob("*.*"))
