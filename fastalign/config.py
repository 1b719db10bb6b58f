"""Every setting of a run: one dataclass per section, defaults documented beside the field.

The command line and YAML are built from these classes (see ``cli.py``). ``loss`` is not here: the keyword arguments
of the chosen loss function are its schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml


def expand_homes(section: Any, *names: str) -> None:
    """Make paths of Python text, with the home directory for ``~``: in a file, and behind ``=``, no shell puts it."""
    for name in names:
        if isinstance(value := getattr(section, name), str | os.PathLike):
            setattr(section, name, os.path.expanduser(os.fspath(value)))


@dataclass
class ModelConfig:
    """Which model, in which precision."""

    path: str | None = None
    """Hub name or local directory of a causal LM, or directory of a saved adapter."""
    config: dict[str, Any] | None = None
    """Inline Hugging Face config (with `model_type`) to start from random weights instead of `path`."""
    tokenizer: str | None = None
    """Hub name, local directory or `builtin:bpe` (trained on built-in text); default: that of `path`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Parameter dtype; `auto` is the checkpoint's own."""
    autocast: bool | None = None
    """bf16 autocast over fp32 parameters; default: on CUDA only."""
    attention: Literal["auto", "sdpa", "cpp", "varlen", "flash"] = "auto"
    """Backend of the packed attention; `auto` takes the best one present and logs which."""
    on_mismatch: Literal["raise", "fallback"] = "raise"
    """When the first packed batch disagrees with the plain forward: stop, or go on without sharing prefixes."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in backward."""
    trust_remote_code: bool = False
    """Run model code shipped with the checkpoint."""
    resize_embeddings: bool = False
    """Where the tokenizer has more tokens than the model has rows: add rows, the mean of the old ones, to embedding and
    head. Below an adapter both must be in `lora.modules_to_save`."""
    lora: dict[str, Any] | None = None
    """Train a LoRA adapter over frozen weights: settings of `peft.LoraConfig`, e.g. `{r: 16, lora_alpha: 32}`; without
    `target_modules` every linear layer but the head. A `path` that is a saved adapter goes on training."""
    quantization: dict[str, Any] | None = None
    """Quantise the frozen weights below an adapter: settings of `BitsAndBytesConfig`, e.g. `{load_in_4bit: true}`."""

    def __post_init__(self) -> None:
        expand_homes(self, "path", "tokenizer")


@dataclass
class ReferenceConfig:
    """The frozen model that the policy is compared with: the reference of preference losses, the teacher of distill."""

    path: str | None = None
    """Hub name or local directory; default: the policy as it starts. distill needs one."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Parameter dtype; default: that of `model.dtype`."""
    cache: str = "auto"
    """Where the reference's log-probs are kept: a directory; `off`: computed with every batch; `auto`: below the cache
    of tokenised data, where that means less work. A reference is known there by the bytes of its files, or by the
    config and the seed of its random weights."""

    def __post_init__(self) -> None:
        expand_homes(self, "path", "cache")


@dataclass
class DataConfig:
    """Which examples, and how they become tokens."""

    path: str | None = None
    """Hub name, file (.jsonl .json .jsonl.gz .parquet .csv), directory, or `builtin:NAME`; a run needs one."""
    name: str | None = None
    """Configuration of a hub dataset that has several, e.g. `main` of `openai/gsm8k`."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; default: its newest."""
    split: str = "train"
    """Split of a hub dataset or directory, or slices of some: `train[:1000]`, `train+validation`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename map from the column fastalign expects to the data's own, e.g. `{prompt: question, completion: answer}`."""
    format: Literal["auto", "text", "prompt_completion", "preference", "unpaired", "ranked", "stepwise"] = "auto"
    """Row format; `auto` recognises it from the columns."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own."""
    step_separator: str = "\n"
    """Written after every step of a stepwise row; its last token is where a process reward model scores the step."""
    max_length: int = 1024
    """Longest sequence in tokens, prompt and completion together."""
    truncation: Literal["completion", "drop"] = "completion"
    """A longer sequence loses its completion's end, or is dropped; a prompt that fills `max_length` always drops it."""
    eval_path: str | None = None
    """Held-out data, in the same format."""
    eval_name: str | None = None
    """Configuration of `eval_path`; default: `name`, when it is the same dataset."""
    eval_split: str | None = None
    """Split of `eval_path`, or of `path` without one; default: its `test` or `validation`, or the only split it has."""
    eval_fraction: float = 0.0
    """Share of `path` held out when there is no `eval_path` or `eval_split`."""
    limit: int | None = None
    """Use only the first so many rows."""
    cache_dir: str | None = None
    """Where rows and tokenised data are kept; default `~/.cache/fastalign`."""
    num_proc: int | None = None
    """Processes that tokenise; default: one, whose tokenizer uses all cores."""

    def __post_init__(self) -> None:
        expand_homes(self, "path", "eval_path", "cache_dir", "chat_template")


@dataclass
class BatchConfig:
    """How much is computed at once."""

    size: int = 8
    """Examples per optimizer step over all ranks: sequences, pairs or prompts, as the method counts."""
    tokens: int | None = None
    """Budget of computed tokens per micro-batch; a longer group gets one of its own. Default: 4096, in fp32 on a CPU
    1536."""
    max_group_tokens: int | None = None
    """Most computed tokens of one group, a pair with its prompt; a larger one ends the run with both numbers."""
    share_prefix: bool = True
    """Compute what several sequences of a group begin with once: prompts, turns of a conversation."""

    @property
    def budget(self) -> int:
        """`tokens`, which every run settles before anything is packed."""
        assert self.tokens is not None, "batch.tokens is not settled"
        return self.tokens


@dataclass
class OptimConfig:
    """AdamW, its schedule and clipping."""

    lr: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW epsilon."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after warm-up; linear and cosine end at zero."""
    warmup: float = 0.0
    """Warm-up: a share of the steps below 1, a number of steps from 1 on."""
    clip_norm: float = 1.0
    """Global gradient norm limit; 0 switches clipping off."""
    master_weights: bool = True
    """Of trained weights in half precision (`model.dtype: bfloat16`), keep masters, gradients and moments in fp32: 18
    bytes a weight instead of 8. Without them steps of usual learning rates round to nothing."""


@dataclass
class ParallelConfig:
    """The device mesh (dp_replicate, dp_shard)."""

    dp_replicate: int = 1
    """Replicas of the sharded model."""
    dp_shard: int = -1
    """Ranks that share one copy of the weights (FSDP2); -1: all ranks that are left."""
    timeout_minutes: float = 60.0
    """Minutes that a rank waits for another, which reads data, loads a model or writes to a slow disk, before it gives
    the run up."""


@dataclass
class RunConfig:
    """Where a run writes, how long it goes on, how it repeats."""

    output_dir: str = "runs/latest"
    """Run directory: config, metrics, checkpoints, model, report."""
    steps: int | None = None
    """Optimizer steps; default: `epochs`."""
    epochs: float = 1.0
    """Passes over the data when `steps` is not given. Each reads every example once, and its last step is shorter when
    `batch.size` does not divide them; a fraction reads so many of the examples, rounded up."""
    seed: int = 0
    """Seed of initial weights and data order."""
    log_every: int = 1
    """Steps between lines on the console, each with means since the last; metrics.jsonl always gets every step."""
    show_example: bool = True
    """Show one decoded training example, its scored part marked, before the first step."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end only, when there is held-out data."""
    save_every: int = 0
    """Steps between checkpoints; 0: at the end only, and every `save_minutes`."""
    save_minutes: float = 15.0
    """Minutes after which a checkpoint is written anyway, counted from the last one; 0 switches this off."""
    keep: int = 2
    """Whole checkpoints kept."""
    resume: bool | str = False
    """true: from the newest whole checkpoint in `output_dir` (a new run if it has none); or a checkpoint's path."""
    overwrite_later: bool = False
    """With `resume` at a checkpoint that has later ones: move these, and their lines of metrics.jsonl, to
    `superseded-N/` in `output_dir`, and go on; otherwise that is refused."""
    deterministic: bool = False
    """Refuse any kernel whose result may differ between two runs."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Extra metric sinks, if installed."""

    def __post_init__(self) -> None:
        expand_homes(self, "output_dir", "resume")


@dataclass
class Config:
    """A whole run. `loss` holds the loss's name and keyword arguments, checked against its signature."""

    method: str
    model: ModelConfig = field(default_factory=ModelConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: dict[str, Any] = field(default_factory=dict)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)


def flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a nested mapping down to its leaves, each with its value; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Dumper(yaml.SafeDumper):
    """YAML that quotes a text which begins like a number: PyYAML does not read 1e5 and 0o17 as numbers."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\.?\d"), None)


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as a file that is read again as the same."""
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False)
