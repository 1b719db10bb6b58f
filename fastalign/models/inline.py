"""Inline configs, and keys of theirs that transformers would take and never read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
REFUSALS = (
    *(SafetensorError, StrictDataclassError, ValueError, TypeError, LookupError),
    *(AttributeError, ArithmeticError, RuntimeError),
)
"""What transformers raises on files that are damaged and on values that make no model."""

EVERY_CONFIG = {
    *("name_or_path", "transformers_version", "torch_dtype", "attn_implementation"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "layer_types", "num_local_experts"),
    *("output_attentions", "use_cache", "tie_word_embeddings", "num_labels", "is_decoder"),
}
"""Keys that each config has, or had: transformers still reads them or writes them itself."""


def make(described: Mapping[str, Any], scalar: bool, vocab_size: int | None) -> Any:
    """The Hugging Face config that `model.config` describes; with ``scalar`` that of a reward model."""
    options: dict[str, Any] = dict(described) | ({"num_labels": 1} if scalar else {})
    kind = options.pop("model_type", None)
    if kind is None:
        raise ValueError("model.config needs a model_type, e.g. {model_type: llama, hidden_size: 256, ...}")
    check_keys(kind, options)
    for name in SPECIAL_TOKENS:  # a config's default ids belong to some other tokenizer
        options.setdefault(name, None)
    if vocab_size is not None:
        options.setdefault("vocab_size", vocab_size)
    with makes(kind):
        return AutoConfig.for_model(kind, **options)


@contextmanager
def makes(kind: str) -> Iterator[None]:
    """Turns what transformers raises on values that make no model into one line."""
    try:
        yield
    except REFUSALS as error:
        raise ValueError(f"model.config makes no {kind}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error with its kind, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_keys(kind: str, options: Mapping[str, Any]) -> None:
    """Refuses a model type or a key that transformers does not know.

    Args:
        kind: the `model_type`.
        options: the other keys of the config.

    Raises:
        ValueError: with the nearest known name, if one is near.
    """
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"unknown model_type {kind!r} in model.config{nearest(kind, CONFIG_MAPPING)}")
    known = known_keys(CONFIG_MAPPING[kind])
    for key in options:
        if not {key, key.lstrip("_")} & known:  # a saved config has some under private names
            raise ValueError(f"unknown key {key!r} in model.config of a {kind}{nearest(key, known)}")


def known_keys(config: type) -> set[str]:
    """The fields of a config class, their aliases, and what its construction looks up in its keywords."""
    fields = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    return EVERY_CONFIG | fields | set(getattr(config, "attribute_map", {})) | set(_read_in_construction(config))


def _read_in_construction(config: type) -> Iterable[str]:
    """Names in the functions that build a config: its parameters, attributes it sets, old keywords it pops."""
    for cls in config.__mro__:
        for name in ("__init__", "__post_init__", "convert_rope_params_to_dict"):
            code = getattr(vars(cls).get(name), "__code__", None)
            if code is not None:
                yield from code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
                yield from code.co_names
                yield from (value for value in code.co_consts if isinstance(value, str) and value.isidentifier())


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
