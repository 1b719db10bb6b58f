"""Settings: refused before any work where they cannot be meant, completed where they were left to the device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from fastalign.config import Config, ModelConfig
from fastalign.data.sources import training_path
from fastalign.engine.forward import wants_autocast
from fastalign.engine.methods import ON_POLICY
from fastalign.engine.output.console import check_trackers
from fastalign.models import lora
from fastalign.models.load import DTYPES, check_named, check_place
from fastalign.ops import dispatch
from fastalign.words import describe_type

MOST_MINUTES = 1_000_000
"""A wait of two years; torch counts it in milliseconds, and cannot count for ever."""
NO_DIRECTORY = ("", "null", "true", "false", "on", "yes", "no")
"""Words for `reference.cache` that are meant otherwise than as the name of a directory."""


def at_least(least: int, *keys: str) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """The rule that settings have a smallest value."""
    return {key: (lambda value: value >= least, f"must be at least {least}") for key in keys}


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **at_least(1, "run.steps", "run.keep", "run.log_every", "batch.size", "batch.tokens", "batch.max_group_tokens"),
    **at_least(0, "run.save_every", "run.save_minutes", "run.eval_every"),
    **at_least(0, "optim.lr", "optim.warmup", "optim.clip_norm", "optim.weight_decay"),
    "parallel.timeout_minutes": (lambda m: 0 < m < MOST_MINUTES, f"must be above 0 and below {MOST_MINUTES:,}"),
    "optim.eps": (lambda value: value > 0, "must be above 0"),
    "optim.betas": (lambda betas: all(0 <= value < 1 for value in betas), "must be in [0, 1)"),
    "run.seed": (lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32"),
    "reference.cache": (lambda word: word.lower() not in NO_DIRECTORY, "must be auto, off or a directory"),
}
"""What values of settings must hold, None excepted, and how errors say it. NaN holds nothing."""
BUDGET, WIDE_BUDGET = 4096, 1536
"""Default tokens of a micro-batch, and those in fp32 on a CPU, where more cost memory and save no time."""
BF16_BETA = 0.99
"""The largest decay with which moments in bf16 fall when gradients do: by 1 % a step; rounding takes 0.4 %."""
HALF = "half precision (model.dtype bfloat16 or model.autocast true)"
ATTENTION_NEEDS = {
    "cpp": "a CPU and fastalign's native extension",
    "varlen": f"a CUDA GPU and {HALF}",
    "flash": f"a CUDA GPU, {HALF} and the flash-attn package (pip install 'fastalign[flash]')",
}
"""What the backends of attention need, for those who ask for one."""
KERNELS = 32
"""Matrix products of different shapes whose oneDNN kernels are kept: more than a micro-batch has, about 1 MiB each."""


def check_settings(config: Config) -> None:
    """Refuse settings that cannot be meant, before any work."""
    check_types(config)
    for key, (holds, text) in RULES.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not holds(value):
            raise ValueError(f"{key} {text}, got {value!r}")
    run = config.run
    if run.steps is None and not 0 < run.epochs < math.inf:
        raise ValueError(f"run.epochs must be above 0 and finite when run.steps is not given, got {run.epochs}")
    if not run.output_dir.strip():
        raise ValueError("run.output_dir is empty: name a directory for the run, e.g. runs/first")
    check_trackers(run.trackers)
    if config.method in ON_POLICY and not (config.rewards or (config.sampler and config.sampler.environment)):
        example = "rewards: [{function: my_rewards.py:accuracy}]"
        raise ValueError(f"{config.method} learns from rewards of its samples, and none is set: e.g. {example}")
    if config.method not in ON_POLICY and (config.algorithm or config.sampler or config.rewards):
        raise ValueError(
            f"{config.method} does not sample: algorithm, sampler and rewards are of {', '.join(ON_POLICY)}"
        )
    check_generate(config)
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        raise ValueError(
            "parallel.sequence_parallel splits tokens over parallel.tp, which is 1: raise it, or leave it out"
        )
    check_optimizer(config)
    training_path(config.data)
    check_named(config.model)
    check_place(config.model.path, "model.path")
    check_place(config.model.tokenizer, "model.tokenizer")
    check_place(config.reference.path, "reference.path")
    lora.check(config.model)


def check_optimizer(config: Config) -> None:
    """Refuse moments of 8 bits that would stand still, and settings of the optimizer that exclude each other."""
    optim, beta = config.optim, config.optim.betas[1]
    coded, algorithm = optim.name == "adamw_8bit", config.algorithm
    holds = f"holds no steps of optim.betas {beta:g}: set the second to {BF16_BETA} or less"
    wrong = {
        f"optim.master_weights compensated keeps moments in bfloat16, which {holds}": (
            optim.master_weights == "compensated" and beta > BF16_BETA
        ),
        f"optim.name adamw_8bit keeps moments in 8 bits, which {holds}": coded and beta > BF16_BETA,
        "optim.offload keeps masters and moments in fp32 in host memory, where they cost nothing of a GPU: set "
        "optim.name to adamw and optim.master_weights to true": (
            optim.offload and (coded or optim.master_weights is not True)
        ),
        "optim.in_backward and optim.offload exclude each other: the steps of optim.offload wait for all gradients": (
            optim.in_backward and optim.offload
        ),
        f"optim.in_backward updates weights before the norm of all gradients is known: optim.clip_norm is "
        f"{optim.clip_norm:g}, set it to 0": optim.in_backward and optim.clip_norm > 0,
        "optim.in_backward trains one model: algorithm.critic is separate, set it to shared": (
            optim.in_backward and algorithm is not None and algorithm.critic == "separate"
        ),
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(text)


def check_alone(micro_batches: int, config: Config) -> None:
    """Refuse to add micro-batches up where weights are updated within backward."""
    if config.optim.in_backward and micro_batches > 1:
        raise ValueError(
            f"optim.in_backward: an update has {micro_batches} micro-batches and may have 1: raise batch.tokens "
            f"({config.batch.tokens}), lower batch.size ({config.batch.size}), or leave optim.in_backward out"
        )


def check_generate(config: Config) -> None:
    """Refuse a copy to sample from that cannot be made."""
    asked = config.parallel.generate
    if asked is None:
        return
    unknown, dtype, tp = sorted(asked.keys() - {"tp", "dtype"}), asked.get("dtype", "auto"), asked.get("tp", 1)
    backend = "native" if config.sampler is None else config.sampler.backend
    plays, split = config.sampler is not None and config.sampler.environment, tp != 1
    wrong = {
        f"{config.method} does not sample: leave it out": config.method not in ON_POLICY,
        f"unknown {', '.join(unknown)}; it takes tp and dtype, e.g. {{tp: 1, dtype: bfloat16}}": unknown,
        f"tp {tp!r}: expected how many ranks sample together, 1 or more": type(tp) is not int or tp < 1,
        f"tp {tp}: only sampler.backend native samples with several ranks: set tp to 1": (
            split and backend == "transformers"
        ),
        f"tp {tp}: each rank would have answers of its own from sampler.environment: set tp to 1": split and plays,
        f"dtype {dtype!r}: expected one of auto, {', '.join(DTYPES)}": dtype not in ("auto", *DTYPES),
        "a server (sampler.backend vllm) has weights of its own: leave one of the two out": backend == "vllm",
        "weights that are quantised (model.quantization) cannot be copied so: leave it out": config.model.quantization,
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"parallel.generate: {text}")


def check_sampling(config: Config) -> None:
    """Refuse settings of sampling that cannot be meant, once those of the algorithm are filled in."""
    algorithm, sampler = config.algorithm, config.sampler
    if config.method not in ON_POLICY:
        return
    from fastalign.rl.sampler import check_settings as check_sampler

    assert algorithm is not None and algorithm.name is not None and sampler is not None
    check_sampler(sampler)
    updates, room = algorithm.num_minibatches or 1, sampler.max_new_tokens
    wrong = {
        "sampler.temperature 0 makes all completions of a prompt equal, from which nothing is learnt: set it above 0": (
            sampler.temperature == 0
        ),
        f"algorithm.num_minibatches {updates} is more than batch.size {config.batch.size}, the prompts of a step": (
            updates > config.batch.size
        ),
        f"data.max_length {config.data.max_length} leaves no room for a prompt beside sampler.max_new_tokens {room}: "
        "raise one or lower the other": room >= config.data.max_length,
        f"algorithm.filter_zero_std ({algorithm.name}) draws as many prompts as it needs: set run.steps": (
            bool(algorithm.filter_zero_std) and config.run.steps is None
        ),
        **needs_whole_models(config),
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(text)


def needs_whole_models(config: Config) -> dict[str, bool]:
    """What neither a server nor a reference that follows the policy can be."""
    assert config.algorithm is not None
    sync, other = config.algorithm.reference_sync, config.reference.path is not None
    dtype = (other and config.reference.dtype) or config.model.dtype
    adapter = config.model.lora is not None or lora.saved_adapter(config.model) is not None
    return {
        "sampler.backend vllm takes whole models alone, and model.lora trains an adapter: leave sampler.backend out, "
        "which samples in the process": adapter and config.sampler is not None and config.sampler.backend == "vllm",
        f"algorithm.reference_sync {sync}: the reference of an adapter is the model below it, which stays: set none, "
        "or leave model.lora out": sync != "none" and adapter,
        "algorithm.reference_sync ema moves the reference by less than bfloat16 can hold: set model.dtype to float32, "
        "with model.autocast true to compute in bfloat16": sync == "ema" and dtype == "bfloat16",
    }


def check_types(config: Config) -> None:
    """Refuse values that are none of their setting's: the command line lets none pass, Python does."""
    for section, values in vars(config).items():
        for name, kind in get_type_hints(type(values)).items() if is_dataclass(values) else ():
            value, kinds = getattr(values, name), get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
            if not any(fits(value, each) for each in kinds):
                key, annotation = f"{section}.{name}", type(values).__annotations__[name]
                raise ValueError(f"{key}: expected {describe_type(annotation, key)}, got {value!r}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; what lists and mappings hold is not looked at."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    plain = {float: (int, float), tuple: (tuple, list)}.get(get_origin(kind) or kind, get_origin(kind) or kind)
    return plain is Any or (isinstance(value, plain) and (plain is bool or not isinstance(value, bool)))


def settle(config: Config, device: torch.device) -> Config:
    """Return the config with device-dependent defaults filled in. Call before any compute."""
    check_attention(config.model, device)
    bound_kernels()
    if config.batch.tokens is not None:
        return config
    wide = device.type == "cpu" and config.model.dtype == "float32" and not wants_autocast(config.model, device)
    return replace(config, batch=replace(config.batch, tokens=WIDE_BUDGET if wide else BUDGET))


def check_attention(model: ModelConfig, device: torch.device) -> None:
    """Refuse a backend of attention that cannot be used on this device, in this precision or without its package."""
    if model.attention in ("auto", "sdpa"):
        return
    dtype = torch.bfloat16 if wants_autocast(model, device) else DTYPES.get(model.dtype, torch.bfloat16)
    if reason := dispatch.without_attention(model.attention, device.type, dtype):
        raise ValueError(
            f"model.attention: {model.attention} needs {ATTENTION_NEEDS[model.attention]}; here: {reason}; "
            "set it to auto for the best one of this machine"
        )


def bound_kernels() -> None:
    """Let oneDNN and PyTorch's layer above it keep few compiled products, unless the environment says how many.

    They would keep 1024 each. Hardly two steps have equally many tokens, so that few are ever used again, and the
    memory of a CPU process grew by 7 MiB per step.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))
