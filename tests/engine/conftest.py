"""Small runs on built-in text: a tokenizer trained once, rows in files, configurations by dotted overrides."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastalign.config import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastalign.data.sources import load_rows
from fastalign.engine.output import report
from runs import LLAMA, override


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """One thread, as in the processes that runs are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten plots take a second: only the tests of the report draw them."""
    monkeypatch.setattr(report, "plots", lambda records: "")


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory, new_cache: Callable[[Path], str]) -> Path:
    """A folder with ``tokenizer/``, ``rows.jsonl`` and ``held_out.jsonl``: 96 and 16 docstrings, the shorter ones."""
    folder = tmp_path_factory.mktemp("materials")
    new_cache(folder / "cache")
    texts = []
    for name, split, count in (("rows", "train", 96), ("held_out", "test", 16)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTALIGN_CACHE", str(folder / "cache"))
            rows = load_rows("builtin:docstrings", split, limit=1000)
        rows = [row for row in rows if 40 < len(row["chosen"]) < 300][:count]
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
    backend.decoder = decoders.ByteLevel()
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
