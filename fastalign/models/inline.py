"""Inline configs: keys that transformers would take and never read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

EVERY_CONFIG = {
    *("name_or_path", "transformers_version", "torch_dtype", "attn_implementation"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "layer_types", "num_local_experts"),
    *("output_attentions", "use_cache", "tie_word_embeddings", "num_labels", "is_decoder"),
}
"""Keys that each config has, or had: transformers still reads them or writes them itself."""


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
