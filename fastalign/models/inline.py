"""Inline configs, and keys of theirs that transformers would take and never read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig

from fastalign.words import nearest

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
REFUSALS = (
    *(SafetensorError, StrictDataclassError, ValueError, TypeError, LookupError),
    *(AttributeError, ArithmeticError, RuntimeError, UnpicklingError),
)
"""What transformers raises on files that are damaged and on values that make no model."""

READ_ANYWHERE = {*SPECIAL_TOKENS, "layer_types", "num_local_experts", "is_decoder"}
"""Keys that are read, in transformers or here, of configs that do not declare them."""


def make(described: Mapping[str, Any], scalar: bool, vocab_size: int | None) -> Any:
    """The Hugging Face config that `model.config` describes; with ``scalar`` that of a reward model."""
    options: dict[str, Any] = dict(described) | ({"num_labels": 1} if scalar else {})
    kind = options.pop("model_type", None)
    if kind is None:
        raise ValueError("model.config needs a model_type, e.g. {model_type: llama, hidden_size: 256, ...}")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {kind!r} in model.config{nearest(kind, CONFIG_MAPPING, cutoff=0.6)}")
    for name in SPECIAL_TOKENS:  # a config's default ids belong to some other tokenizer
        options.setdefault(name, None)
    if vocab_size is not None:
        options.setdefault("vocab_size", vocab_size)
    with makes(kind):
        config = AutoConfig.for_model(kind, **options)
    check_keys(config, described)
    return config


@contextmanager
def makes(kind: str) -> Iterator[None]:
    """Turns what transformers raises on values that make no model into one line."""
    try:
        yield
    except REFUSALS as error:
        raise ValueError(f"model.config makes no {kind}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error with its kind, on one line."""
    if isinstance(error, UnpicklingError):  # PyTorch's text advises to execute it
        return "its weights are a pickle of more than tensors, which is never executed: convert it to safetensors"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_keys(config: Any, described: Iterable[str]) -> None:
    """Refuses a key that transformers has kept as it came: one that it reads is declared, renamed or used up."""
    known = known_keys(type(config))
    for key in described:
        if key in vars(config) and key not in known:
            raise ValueError(
                f"unknown key {key!r} in model.config of a {config.model_type}{nearest(key, known, cutoff=0.6)}"
            )


def known_keys(config: type) -> set[str]:
    """The settings of a config class, and their other names."""
    return READ_ANYWHERE | vars(config()).keys() | getattr(config, "attribute_map", {}).keys()
