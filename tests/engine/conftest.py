"""Small runs on built-in text: a tokenizer trained once, rows in files, configurations by dotted overrides."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastalign.config import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastalign.data.sources import load_rows
from fastalign.engine import report

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYOUT = ("num_micro_batches", "share_ratio", "tokens_computed")
"""Fields that tell how the work was split; everything else is about the run itself."""
CLOCK = ("t_", "wall_time", "peak_memory", "tokens_per_second", "tokens_computed_per_second", "examples_per_second")


@pytest.fixture(scope="session", autouse=True)
def alone() -> Iterator[None]:
    """One thread, as in the processes that runs are compared with, and no word to the network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten plots take a second: only the tests of the report draw them."""
    monkeypatch.setattr(report, "plots", lambda records: "")


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tokenizer/``, ``rows.jsonl`` and ``held_out.jsonl``: 96 and 16 docstrings, the shorter ones."""
    folder = tmp_path_factory.mktemp("materials")
    texts = []
    for name, split, count in (("rows", "train", 96), ("held_out", "test", 16)):
        rows = [r for r in load_rows("builtin:docstrings", split, limit=1000) if 40 < len(r["chosen"]) < 300][:count]
        assert len(rows) == count
        rows = [{key: row[key] for key in ("prompt", "completion", "chosen", "rejected")} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts += [text for row in rows for text in row.values()]
    train_tokenizer(texts).save_pretrained(folder / "tokenizer")
    return folder


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<pad>", "<eos>", "<poison>"], pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 512, "special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(**options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def configure(materials: Path, tmp_path: Path) -> Callable[..., Config]:
    """``configure("dpo", "name", **{"optim.lr": 1e-3})``: a run in ``tmp_path/name`` of a tiny Llama."""

    def make(method: str, name: str = "run", **overrides: Any) -> Config:
        config = Config(
            method=method,
            model=ModelConfig(config=dict(LLAMA), tokenizer=str(materials / "tokenizer")),
            data=DataConfig(path=str(materials / "rows.jsonl"), max_length=192, cache_dir=str(materials / "cache")),
            batch=BatchConfig(size=6, tokens=700),
            optim=OptimConfig(lr=1e-3, warmup=2, weight_decay=0.1),
            run=RunConfig(output_dir=str(tmp_path / name), steps=6),
        )
        if method == "dpo":
            config.data.columns, config.data.format = {}, "preference"
        else:
            config.data.format = "prompt_completion"
        return override(config, overrides)

    return make


def override(config: Config, values: dict[str, Any]) -> Config:
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section == "loss":
            config.loss[name] = value
        else:
            assert hasattr(getattr(config, section), name), key
            setattr(getattr(config, section), name, value)
    return config


def launch(config: Config, ranks: int = 1, **options: Any) -> subprocess.Popen:
    """The same run through the command line, under torchrun for more than one rank."""
    Path(config.run.output_dir).parent.mkdir(parents=True, exist_ok=True)
    path = Path(config.run.output_dir + ".yaml")
    settings = yaml.safe_load(json.dumps(asdict(config)))
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v or k != "loss"}))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "fastalign", config.method, "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **{**pipes, **options})


def finish(process: subprocess.Popen) -> str:
    """Wait for a run to end well; its output."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def records(directory: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def numbers(directory: str | Path, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The records of a run, clocks left out."""
    return [{k: v for k, v in r.items() if not k.startswith(CLOCK) and k not in without} for r in records(directory)]


def assert_close(run: str | Path, other: str | Path, tolerance: float) -> None:
    """Every metric of every step agrees, relative to the metric's magnitude or to 1."""
    pairs = list(zip(numbers(run, LAYOUT), numbers(other, LAYOUT), strict=True))
    assert pairs
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert abs(value - theirs[key]) <= tolerance * max(1.0, abs(value)), (mine["step"], key, value, theirs[key])
