"""The workload of ``fastalign bench train``: real preference data, a tokenizer trained on it, a Llama."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bench import common
from fastalign.data import builtin
from fastalign.data.loader import epoch_order

EOS, PAD = "<|endoftext|>", "<|pad|>"


Row = dict[str, Any]


SIZES = {
    "9m": {"hidden_size": 256, "layers": 6, "vocab_size": 8192},
    "0.5b": {"hidden_size": 896, "layers": 24, "vocab_size": 151936},
}
"""Llamas of about that many parameters."""


def as_is(pair: Row) -> Row:
    """A preference pair."""
    return pair


def chosen_only(pair: Row) -> Row:
    """The better answer, to imitate."""
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


def labelled(pair: Row) -> Row:
    """One of the answers, called good or bad: which is decided by the prompt's length."""
    good = len(pair["prompt"]) % 2 == 0
    return {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}


def prompt_only(pair: Row) -> Row:
    """What is to be answered."""
    return {"prompt": pair["prompt"]}


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        row: a preference pair as a row of the task's data.
        unit: what is counted, in the plural.
        examples: of a step, by default.
        trainer: TRL's; empty where it has none.
        scores_rows: TRL scores rows with an LM head, so that its selection of rows matters.
        reference: passes of the reference per pass of the policy.
        samples: its answers are sampled in the step.
    """

    row: Callable[[Row], Row]
    unit: str
    examples: int
    trainer: str
    scores_rows: bool = True
    reference: bool = False
    samples: bool = False


TASKS = {
    "sft": Task(chosen_only, "sequences", 16, "SFTTrainer"),
    "reward": Task(as_is, "pairs", 8, "RewardTrainer", scores_rows=False),
    "dpo": Task(as_is, "pairs", 8, "DPOTrainer", reference=True),
    "kto": Task(labelled, "completions", 16, "KTOTrainer", reference=True),
    "grpo-update": Task(as_is, "groups of 8", 2, "GRPOTrainer"),
    "grpo": Task(prompt_only, "prompts with 8 answers", 8, "GRPOTrainer", samples=True),
    "ppo": Task(prompt_only, "prompts with 8 answers", 8, "", samples=True),
}


@dataclass(frozen=True)
class Workload:
    """A training run that every side executes alike.

    Attributes:
        directory: where the model, the rows and the results lie.
        task: what is trained, a key of ``TASKS``.
        steps: optimizer steps, ``examples`` of the task's units each.
        precomputed: the reference's log-probs are known before the first step.
        warmup: first steps left out of the timing.
        neighbours: busy processes beside it.
        answer: tokens of every answer that is sampled.
        tokens: entries of the tokenizer that is trained; the model's vocabulary may be larger.
    """

    directory: str
    task: str = "dpo"
    steps: int = 12
    warmup: int = 2
    examples: int = 8
    precomputed: bool = False
    max_length: int = 512
    answer: int = 128
    tokens: int = 8192
    vocab_size: int = 8192
    hidden_size: int = 256
    layers: int = 6
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    neighbours: int = 0
    beta: float = 0.1
    lr: float = 1e-4
    seed: int = 0

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def data(self) -> Path:
        return self.path / "rows.jsonl"

    @property
    def reward(self) -> Path:
        """The reward function of tasks that sample."""
        return self.path / "reward.py"

    @property
    def ordered(self) -> Path:
        """The rows in the order in which fastalign visits them."""
        return self.path / "ordered.jsonl"

    def save(self) -> Path:
        """Write the workload for a subprocess to read."""
        file = self.path / "workload.json"
        file.write_text(json.dumps(asdict(self)))
        return file

    @staticmethod
    def load(file: str | Path) -> Workload:
        """What `save` wrote."""
        return Workload(**json.loads(Path(file).read_text()))


def split_turns(row: dict[str, str]) -> dict[str, str] | None:
    """An hh-rlhf row as prompt, chosen, rejected: the prompt ends with the last assistant turn; None if not shared."""
    cut = row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
    prompt = row["chosen"][:cut]
    chosen, rejected = row["chosen"][cut:], row["rejected"][cut:]
    if row["rejected"][:cut] != prompt or not chosen.strip() or not rejected.strip():
        return None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_pairs() -> tuple[str, list[dict[str, str]]]:
    """The data's name and its pairs with a common prompt and two answers: hh-rlhf where it is, else built-in text."""
    folder = common.shared_data("hh-rlhf")
    if folder is None:
        print(
            "hh-rlhf is not here (put its files under ../shared/data, or set FASTALIGN_SHARED): built-in pairs instead"
        )
        rows = builtin.load("docstrings").select_columns(["prompt", "chosen", "rejected"])
        return "builtin", [dict(row) for row in rows]
    with gzip.open(folder / "harmless-base-test.jsonl.gz", "rt") as file:
        pairs = [split_turns(json.loads(line)) for line in file]
    return "hh-rlhf", [pair for pair in pairs if pair is not None]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end-of-text and a padding token."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[EOS, PAD], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS, pad_token=PAD)


def llama_config(work: Workload, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Heads of 64, grouped two to a key head; an MLP of three hidden sizes."""
    heads = max(1, work.hidden_size // 64)
    return LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=3 * work.hidden_size,
        num_hidden_layers=work.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=work.max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"num_labels": 1} if work.task == "reward" else {}),
    )


def _choose(pairs: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, work: Workload) -> list[dict[str, str]]:
    """``steps * examples`` pairs in a seeded order, none of which a side would drop or cut: all fit ``max_length``."""
    random.Random(work.seed).shuffle(pairs)

    def fits(pair: dict[str, str]) -> bool:
        if TASKS[work.task].samples:
            return len(tokenizer(pair["prompt"]).input_ids) + work.answer <= work.max_length
        longest = max(len(tokenizer(pair["prompt"] + pair[side]).input_ids) for side in ("chosen", "rejected"))
        return longest < work.max_length

    return list(islice(filter(fits, pairs), work.steps * work.examples))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(work: Workload, pairs: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """Write tokenizer, initial weights and rows; returns what the data is like."""
    name, pairs = read_pairs() if pairs is None else ("given", list(pairs))
    texts = [text for pair in pairs for text in pair.values()]
    tokenizer = train_tokenizer(texts, min(work.tokens, work.vocab_size))
    tokenizer.save_pretrained(work.model)
    torch.manual_seed(work.seed)
    kind = LlamaForSequenceClassification if work.task == "reward" else LlamaForCausalLM
    model = kind(llama_config(work, tokenizer))
    model.save_pretrained(work.model)
    chosen = _choose(pairs, tokenizer, work)
    rows = [TASKS[work.task].row(pair) for pair in chosen]
    _write(work.data, rows)
    _write(work.ordered, [rows[i] for i in epoch_order(len(rows), work.seed, epoch=0)])
    return {"data": name, "examples_seen": len(chosen), "parameters": model.num_parameters()}
