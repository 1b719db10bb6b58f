"""What a Hugging Face model must be to run exactly on packed rows, and what its head needs."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastalign.models.head import unwrapped

log = logging.getLogger(__name__)

EXACT_LAYERS = {"full_attention", "sliding_attention", "attention"}
"""Layer types in which a token reads other tokens through attention alone."""


ACROSS = "carry state or read spans across sequence boundaries"


def check(model: PreTrainedModel) -> None:
    """Refuses a model whose packed forward would differ from the plain one."""
    if reason := refusal(model):
        raise ValueError(f"{type(model).__name__} cannot run on packed rows: {reason}")


def refusal(model: PreTrainedModel) -> str | None:
    """Why a model is refused; None for a model that is accepted."""
    if reason := refusal_of_config(model.config) or refusal_of_class(type(model)):
        return reason
    if not isinstance(head := unwrapped(output_layer(model)), nn.Linear):
        return f"its head is {type(head).__name__}; a Linear is expected"
    return refusal_of_numbers(model.config)


def refusal_of_config(config: Any) -> str | None:
    """Why any model of a config's kind is refused."""
    layers = set(getattr(config, "layer_types", None) or ()) - EXACT_LAYERS
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; a decoder-only causal LM is expected"
    if config.get_text_config() is not config:
        return "it reads more than text; load its text model"
    if layers:
        return f"{', '.join(sorted(layers))} layers {ACROSS}"
    return None


def refusal_of_class(kind: type) -> str | None:
    """Why any model of a class is refused."""
    if getattr(kind, "_is_stateful", False):
        return f"recurrent layers {ACROSS}"
    if not getattr(kind, "_supports_attention_backend", False):
        return "its attention is not behind transformers' AttentionInterface"
    return None


def output_layer(model: PreTrainedModel) -> nn.Module | None:
    """The LM head, or the `score` layer of a sequence classifier."""
    head = model.get_output_embeddings()
    return getattr(model, "score", None) if head is None else head


def refusal_of_numbers(config: Any) -> str | None:
    """Why what a config computes is refused."""
    if getattr(config, "output_router_logits", False):
        return "the router's auxiliary loss depends on how tokens are packed; set output_router_logits to false"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "it attends in both directions"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "absolute") not in (
        "absolute",
        "rope",
    ):
        return "its position biases are not part of the packed attention"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn computes attention outside the AttentionInterface; set it to false"
    return None


def max_length(config: Any) -> tuple[int, str] | None:
    """The longest sequence that is computed exactly and the reason, or None when there is no bound."""
    bounds: list[tuple[int, str]] = []
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if window and (layers is None or "sliding_attention" in layers):
        bounds.append((window, "the model's sliding window"))
    positions = getattr(config, "max_position_embeddings", None)
    learned = getattr(config, "rope_parameters", None) is None
    if positions and (learned or any(rope.get("rope_type") in ("dynamic", "longrope") for rope in _ropes(config))):
        bounds.append((positions, "the positions the model has"))
    return min(bounds, default=None)


def trained_positions(config: Any) -> int | None:
    """The positions that a model with rotary embeddings was made for, as far as its scaling reaches; else None."""
    positions, ropes = getattr(config, "max_position_embeddings", None), _ropes(config)
    if not positions or not ropes:
        return None
    reach = [(rope.get("original_max_position_embeddings") or positions) * (rope.get("factor") or 1) for rope in ropes]
    return max(positions, *map(int, reach))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of rotary embeddings, which some models have once for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    return nested or ([rope] if rope else [])


def head_options(model: PreTrainedModel) -> dict[str, float]:
    """`softcap` and `logit_scale` of the model's logits, where it defines them; a scalar head has neither."""
    config, options = model.config, {}
    if model.get_output_embeddings() is None:
        return options
    if getattr(config, "final_logit_softcapping", None):
        options["softcap"] = float(config.final_logit_softcapping)
    if getattr(config, "logit_scale", None) not in (None, 1.0):
        options["logit_scale"] = float(config.logit_scale)
    if getattr(config, "logits_scaling", None) not in (None, 1.0):
        options["logit_scale"] = 1.0 / float(config.logits_scaling)
    return options


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to zero: log-probs of a policy must not be random, nor differ between copies of a prefix."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            found.add(f"{name.split('.')[-1]}={module.p}")
            module.p = 0.0
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float) and value:
                found.add(f"{key}={value}")
                setattr(module, key, 0.0)
    if found:
        log.warning("dropout set to zero (%s): training log-probs must not be random", ", ".join(sorted(found)))


def train_every_embedding(model: PreTrainedModel) -> None:
    """Lets the padding token's embedding learn: packed rows hold no padding, and the pad id is often also the EOS."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers names as not to be split across devices: one per layer."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    kinds = {kind: {each.__name__ for each in kind.__mro__} for kind in {type(module) for module in model.modules()}}
    return [module for module in model.modules() if names & kinds[type(module)]]  # FSDP's class is below the layer's
