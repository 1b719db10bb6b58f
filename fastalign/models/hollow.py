"""Policies made without the weights of their base, to be sharded before these are read: see `engine.loading`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastalign.config import ModelConfig
from fastalign.models import inline, lora, vocabulary
from fastalign.models.inline import makes
from fastalign.models.load import (
    DTYPES,
    SCALAR_HEAD,
    as_policy,
    base_path,
    check_named,
    fit_rows,
    new_scalar_head,
    readable,
    set_special_tokens,
)
from fastalign.models.policy import Policy
from fastalign.models.weights import Region, Stored, locate


@dataclass(frozen=True)
class Hollow:
    """A policy made without the weights of its base, to be sharded before they are read.

    Attributes:
        policy: the base on the meta device; adapters and a new scalar head are there.
        stored: where the base's weights lie; None for a model that starts from random weights.
        whole: why only transformers can load the weights, all at once; else None.
    """

    policy: Policy
    stored: Stored | None = None
    whole: str | None = None

    def read(self, name: str, region: Region, like: Tensor) -> Tensor:
        """Part of one of the policy's tensors, from its file, in the dtype of another."""
        assert self.stored is not None
        return self.stored.read(lora.base_name(name.removeprefix("model.")), region).to(like.dtype)


def hollow_policy(
    model: ModelConfig,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scalar_head: bool = False,
    setting: str = "model.path",
    value_head: bool = False,
) -> Hollow:
    """The policy of `load_policy` before its weights are there; the arguments and errors are those."""
    check_named(model)
    saved = lora.saved_adapter(model, scalar_head)
    size = None if tokenizer is None else vocabulary.size(tokenizer)
    base, stored, whole = _hollow_base(model, saved, size, seed, scalar_head, setting)
    if tokenizer is not None and model.path is None:
        set_special_tokens(base, tokenizer)
    fit_rows(base, model, saved, size, setting)
    whole = whole or (lora.needs_base(model, saved) if model.path else None)
    adapted = lora.adapt_hollow(base, model, saved, seed)
    return Hollow(as_policy(adapted, base, model, value_head=value_head), stored, whole)


def _hollow_base(
    model: ModelConfig, saved: Any, size: int | None, seed: int, scalar: bool, setting: str
) -> tuple[PreTrainedModel, Stored | None, str | None]:
    """A base on the meta device; where its weights lie, or why they must be loaded whole."""
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    if model.path is None:
        config = inline.make(model.config or {}, scalar, size)
        with makes(config.model_type):
            return on_meta(auto, config, DTYPES.get(model.dtype)), None, None
    path, where = base_path(model, saved, setting)
    with readable("model", path, "config.json and safetensors weights", where):
        options: dict[str, Any] = {"num_labels": 1} if scalar else {}
        config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code, **options)
        config.name_or_path = path
        base = on_meta(auto, config, DTYPES.get(model.dtype), trust_remote_code=model.trust_remote_code).eval()
        stored = _why_whole(base, model) or locate(base, path, (SCALAR_HEAD,) if scalar else ())
        if isinstance(stored, str):
            return base, None, stored
        _finish(base, path)
    if scalar and SCALAR_HEAD not in stored.places:
        base.score.weight = nn.Parameter(torch.empty_like(base.score.weight, device="cpu"))
        new_scalar_head(base, seed)
    return base, stored, None


def on_meta(auto: Any, config: Any, dtype: torch.dtype | None, **options: Any) -> Any:
    """A model of a config, without weights."""
    with torch.device("meta"), torch.random.fork_rng():
        return auto.from_config(config, dtype=dtype or config.dtype or torch.float32, **options)


def _why_whole(base: Any, model: ModelConfig) -> str | None:
    """Why transformers must load the weights of a base: it does more to them than to read them."""
    if model.quantization is not None or getattr(base.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if model.dtype == "auto" and base.config.dtype is None:
        return "its config.json names no dtype"
    if getattr(base, "_keep_in_fp32_modules", None) or getattr(base, "_keep_in_fp32_modules_strict", None):
        return "some of its weights stay in fp32"
    return None


def _finish(base: Any, path: str) -> None:
    """What `from_pretrained` does beside loading: the buffers that are in no file, and the settings of generation."""
    for x in [*base.parameters(), *base.buffers()]:
        x._is_hf_initialized = True
    for module in base.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.random.fork_rng():
        base.initialize_weights()  # draws nothing: every weight counts as initialised
    if base.can_generate():
        try:
            base.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:  # it has none of its own
            base.generation_config = GenerationConfig.from_pretrained(path, "config.json", _from_model_config=True)
