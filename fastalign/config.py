"""Every setting of a run: one dataclass per section, defaults documented beside the field.

The command line and YAML are built from these classes (see ``cli.py``). ``loss`` is not here: the keyword arguments
of the chosen loss function are its schema.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


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
    """Hub name, local directory, `builtin:bpe` (trained on built-in text) or `builtin:letters` (for
    `builtin:sort_letters`); default: that of `path`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Parameter dtype; `auto` is the checkpoint's own."""
    autocast: bool | None = None
    """bf16 autocast over fp32 parameters; default: on CUDA only."""
    attention: Literal["auto", "sdpa", "cpp", "varlen", "flash"] = "auto"
    """Backend of the packed attention; `auto` takes the best one present and logs which."""
    on_mismatch: Literal["raise", "fallback"] = "raise"
    """When the first packed batch disagrees with the plain forward: stop, or go on without sharing prefixes."""
    gradient_checkpointing: bool | Literal["mlp"] = False
    """Recompute each layer's activations in backward; `mlp`: those of its MLP alone, which cost most memory and least
    time."""
    activation_offloading: bool = False
    """Keep what backward needs of each layer in host memory until then; with `gradient_checkpointing: true` that is the
    inputs of the layers alone. On a CPU nothing changes."""
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
    offload: bool = False
    """Keep its weights in host memory; each layer is on the GPU only while it runs. On a CPU nothing changes."""
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
    format: Literal["auto", "text", "prompt_completion", "preference", "unpaired", "ranked", "stepwise", "prompt"] = (
        "auto"
    )
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

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments in 8 bits, with a scale for every 64 of them: 2.1 bytes a weight instead of 8."""
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
    master_weights: bool | Literal["compensated"] = True
    """Of trained weights in half precision (`model.dtype: bfloat16`), keep masters, gradients and moments in fp32: 18
    bytes a weight instead of 8. Without them steps of usual learning rates round to nothing. `compensated` keeps what
    each rounding loses in a second bf16 number (Kahan), and the moments in bf16: 12 bytes."""
    offload: bool = False
    """Keep fp32 masters and moments in host memory, and compute the steps there. On a CPU nothing changes."""
    in_backward: bool = False
    """Update each weight as soon as backward has its gradient, which is then freed. An update must be one micro-batch,
    and `clip_norm` 0."""


@dataclass
class ParallelConfig:
    """The device mesh (dp_replicate, dp_shard, tp)."""

    dp_replicate: int = 1
    """Replicas of the sharded model."""
    dp_shard: int = -1
    """Ranks that share one copy of the weights (FSDP2); -1: all ranks that are left."""
    tp: int = 1
    """Ranks that compute each layer together, every one with its part of the heads, of the MLP and of the vocabulary
    (tensor parallelism); they get the same batches. Neighbouring ranks: keep them on one node."""
    sequence_parallel: bool = False
    """Split the tokens of norms and of the residual stream over `tp` too: less memory for activations, as much sent."""
    shard_gradients: bool = False
    """Reduce gradients after every micro-batch, not once per update: a rank adds up its shards of them, where it keeps
    those of whole layers otherwise: 4 bytes a weight. Costs a reduction per micro-batch."""
    generate: dict[str, Any] | None = None
    """Sample from a copy of the policy that takes its weights after each step: `{tp: 1}` whole on every rank, `{tp: 4}`
    split over 4 that sample together; `dtype: bfloat16` halves it. Default: from the weights that train, gathered."""
    timeout_minutes: float = 60.0
    """Minutes that a rank waits for another, which loads a model or writes to a slow disk, before it gives up."""


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
    keep_best: str | None = None
    """Save at every evaluation that is the best so far by this metric, e.g. `eval_loss`, and keep that checkpoint
    beside the `keep` newest."""
    async_save: bool = False
    """Write checkpoints beside the steps that follow, from a copy in the memory of the host."""
    shared_disk: bool = True
    """All ranks see one `output_dir`. false: rank 0 alone writes there, and reads for all when the run goes on."""
    resume: bool | str = False
    """true or auto: from the newest whole checkpoint in `output_dir` (a new run if it has none); or a checkpoint's
    path."""
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
class SamplerConfig:
    """How completions are sampled."""

    backend: Literal["native", "transformers", "vllm"] = "native"
    """native: in this process, on the training weights; transformers: its continuous batching; vllm: a server."""
    url: str | None = None
    """Of a server that speaks OpenAI's API, for `backend: vllm`, e.g. `http://localhost:8000/v1`."""
    temperature: float = 1.0
    """Logits are divided by it, in sampling and in training; 0 takes the most likely token."""
    top_k: int = 0
    """Sample from so many most likely tokens only; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens that have this probability together; 1: from all."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one; 0: from all."""
    max_new_tokens: int = 256
    """Tokens after which a completion is cut off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion, which keeps them."""
    max_rows: int | None = None
    """Completions that are sampled at the same time; default: as memory allows."""
    environment: str | None = None
    """What completions of several turns talk to: `file.py:Class`, with tools or as in gym; it may pay rewards. See
    `fastalign.rl.environments`."""
    max_turns: int = 8
    """Turns of the policy, with an environment; `max_new_tokens` and `stop` are of each."""
    exact: Literal["auto", "require", "off"] = "auto"
    """Log-probs of sampling are bit for bit those of training: auto checks it at the start and otherwise computes them
    again, require refuses to run otherwise, off always computes them again."""


@dataclass
class AlgorithmConfig:
    """What is made of the rewards. A setting that is null is the algorithm's own; see `fastalign.rl.algorithms`."""

    name: str | None = None
    """The algorithm, where one command has several: `grpo --algorithm.name dapo`."""
    preset: Literal["seed", "strong"] | None = None
    """ppo: seed has the values of the first papers (KL 1, no clip), strong those recommended for real runs."""
    num_generations: int | None = None
    """Completions per prompt."""
    num_iterations: int | None = None
    """Passes over each batch of completions."""
    num_minibatches: int | None = None
    """Optimizer updates per pass; each takes an equal share of the prompts."""
    kl_coef: float | None = None
    """Weight of the KL from the reference; 0: no reference is loaded."""
    kl_where: Literal["reward", "loss"] | None = None
    """Where the KL goes: charged per token in the reward, or a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] | None = None
    """How it is estimated from log-probs."""
    kl_target: float | None = None
    """Adapt `kl_coef` so that the KL of a completion comes to so many nats; null: keep it."""
    kl_horizon: int = 10_000
    """Completions over which `kl_coef` adapts."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float | None = None
    """Lambda of generalised advantage estimation."""
    normalize_advantages: bool | None = None
    """Give the advantages of all scored tokens of a step mean 0 and deviation 1."""
    critic: Literal["none", "shared", "separate"] | None = None
    """ppo: the critic is a linear head on the policy's trunk, or a model of its own."""
    critic_path: str | None = None
    """Hub name or directory that a separate critic starts from, a reward model for example; default: `model.path`."""
    critic_lr: float | None = None
    """Learning rate of a separate critic; default: `optim.lr`."""
    critic_warmup: int = 0
    """Steps in which only a separate critic trains."""
    vf_coef: float = 0.1
    """Weight of the value loss of a shared critic."""
    value_clip: float | None = 0.2
    """A value counts as moved by at most this much from what it was at sampling; null: no clip."""
    normalize_values: bool | None = None
    """Let the critic predict returns of mean 0 and deviation 1, by running statistics."""
    reward_scale: float = 1.0
    """Factor of the weighted sum of rewards."""
    reward_bias: float = 0.0
    """Added to it after scaling."""
    reward_clip: float | None = None
    """Bounds what comes of that to plus or minus this."""
    truncation: Literal["terminal", "bootstrap", "penalty", "mask"] | None = None
    """A completion that was cut off: scored as if it had ended; not scored, but valued by the critic where it was cut;
    scored less `truncation_penalty`; or left out of the loss."""
    truncation_penalty: float = 1.0
    """Subtracted from the reward of a completion that was cut off, for `truncation: penalty`."""
    reference_sync: Literal["none", "ema", "periodic"] | None = None
    """Keep the reference; let it follow the policy after every step, an fp32 average; or copy the policy at times."""
    reference_alpha: float = 0.001
    """Share of the way that the reference goes towards the policy."""
    reference_steps: int = 512
    """Steps between copies, for `periodic`."""
    filter_zero_std: bool | None = None
    """Replace prompts whose completions all have the same reward by further prompts (dynamic sampling of DAPO)."""
    max_resample_batches: int = 3
    """Batches of prompts that one step may sample for that."""
    target_kl: float | None = None
    """Skip an update, and those left of the step, when the policy has moved this far in nats per token."""
    max_ratio: float | None = None
    """Skip them when the mean ratio to the sampling policy is above this."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """For samplers that are not exact: weigh tokens by the ratio of trainer to sampler, up to a cap, or leave out those
    beyond it."""
    correction_cap: float = 2.0
    """That cap."""
    best_fraction: float | None = None
    """raft: train on this share of all completions, the best of them; default: on the best of each prompt."""

    def __post_init__(self) -> None:
        expand_homes(self, "critic_path")


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
    algorithm: AlgorithmConfig | None = None
    """On-policy methods have this section, `sampler` and `rewards`; the others have none of them."""
    sampler: SamplerConfig | None = None
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """What scores completions: `{function: file.py:name}`, `{model: directory}`, `{builtin: name}` or `{code: {...}}`,
    each with `weight` and `name`."""


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as a file has them: a method that does not sample has no sections for it."""
    settings = asdict(config)
    absent = [name for name in ("algorithm", "sampler") if settings[name] is None]
    absent += ["rewards"] if settings["sampler"] is None and not settings["rewards"] else []
    return {key: value for key, value in settings.items() if key not in absent}
