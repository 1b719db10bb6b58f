"""Learning from rewards works: GRPO from a small SFT model, and a run without the engine."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from fastalign.arguments import parse_config
from fastalign.data.builtin import sort_letters
from fastalign.engine.output.metrics import read_metrics
from fastalign.engine.train import train

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "vocab_size": 32,
    "max_position_embeddings": 32,
}


def write_words(path, split, longest=5):
    """The short words of the task, of which a few seconds teach something."""
    rows = [row for row in sort_letters(split).to_list() if len(row["answer"]) <= longest]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(method, directory, *words):
    """Train as the example's file says, with some settings changed; the records of all steps."""
    file = ROOT / "examples" / "sort_letters" / f"{method}.yaml"
    flags = ["--run.output_dir", str(directory), "--data.path", str(directory.parent / "train.jsonl"), *words]
    held_out = ["--data.eval_path", str(directory.parent / "test.jsonl")]
    train(parse_config(method, ["--config", str(file), *flags, *held_out]))
    return read_metrics(directory / "metrics.jsonl")


def test_grpo_raises_the_share_of_right_answers(tmp_path):
    """Held-out words, sampled: 104 updates gain at least 0.15."""
    for split in ("train", "test"):
        write_words(tmp_path / f"{split}.jsonl", split)
    size = json.dumps(SIZES)
    run("sft", tmp_path / "sft", "--model.config", size, "--run.steps", "35")
    flags = ["--model.path", str(tmp_path / "sft" / "model"), "--run.eval_every", "0"]
    first = run("grpo", tmp_path / "before", *flags, "--run.steps", "1", "--optim.lr", "1e-12")
    last = run("grpo", tmp_path / "grpo", *flags, "--run.steps", "26", "--optim.lr", "3e-4", "--optim.warmup", "2")
    before, after = first[-1]["eval_reward"], last[-1]["eval_reward"]
    assert 0.1 < before < 0.5 and after >= before + 0.15
    assert np.mean([r["reward"] for r in last[-6:]]) >= np.mean([r["reward"] for r in last[:6]]) + 0.15
    assert all(r["sampling/sampling_logp_difference/max"] == 0 for r in last), "exact"


def test_the_example_without_the_engine_runs(capsys):
    path = ROOT / "examples" / "grpo_from_scratch.py"
    assert len(path.read_text().splitlines()) <= 150
    spec = importlib.util.spec_from_file_location("grpo_from_scratch", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert len(example.main(["--imitate", "20", "--steps", "3"])) == 3
    assert capsys.readouterr().out.count("held-out words right: ") == 2
