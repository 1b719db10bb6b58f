"""Whether a model can run on packed rows, from its config alone: no weight is loaded and no text tokenised for it.

What the config and the class say is looked up. What only the code says, such as what its layers call attention with,
is seen by running a model without weights (on PyTorch's meta device) over a row of a few tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.initialization import no_init_weights

from fastalign.models import support
from fastalign.models.policy import check_call
from fastalign.ops.attention import Layout, layout
from fastalign.types import Segments

log = logging.getLogger(__name__)

ATTENTION = "fastalign_outline"
"""The name in transformers of the attention that only looks at how it is called."""
LENGTH = 3
"""Tokens of the row; no window is shorter."""
KINDS = {
    False: (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "a causal LM"),
    True: (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "a sequence classifier"),
}
"""By whether the head is a scalar one: what makes the model, the classes it makes, and what they are called."""


class Refused(ValueError):
    """A layer calls attention in a way that packed rows do not serve."""


def check(config: Any, name: str, *, scalar_head: bool = False, trust_remote_code: bool = False) -> None:
    """Refuse a model that cannot run on packed rows, by its config; ``name`` is the setting that names it."""
    if reason := why_not(config, scalar_head, trust_remote_code):
        raise ValueError(f"{name}: a {config.model_type} model cannot run on packed rows: {reason}")


def why_not(config: Any, scalar_head: bool, trust_remote_code: bool) -> str | None:
    """Why a model is refused; None for one of which nothing speaks against it."""
    auto, classes, kind = KINDS[scalar_head]
    remote = auto.__name__ in (getattr(config, "auto_map", None) or {})
    found = None if remote else classes.get(type(config), None)
    if reason := support.refusal_of_config(config):
        return reason
    if found is None and not remote:
        return f"transformers has no class that makes {kind} of it"
    if found is not None and (reason := support.refusal_of_class(found) or support.refusal_of_numbers(config)):
        return reason
    return seen(config, auto, trust_remote_code)


def seen(config: Any, auto: Any, trust_remote_code: bool) -> str | None:
    """What a model without weights shows to speak against it."""
    try:
        with quiet(), torch.device("meta"), no_init_weights(), torch.no_grad():
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
            if reason := support.refusal(model):
                return reason
            run(model.eval())
    except Refused as refused:
        return str(refused)
    except Exception as error:  # not every operation knows that device; the model itself is checked when it is loaded
        log.debug("no outline of a %s model: %s", config.model_type, error)
    return None


def run(model: Any) -> None:
    """One packed row through the layers of a model; its attention computes nothing."""
    AttentionInterface.register(ATTENTION, look)
    model.set_attn_implementation(ATTENTION)
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    inputs = {"input_ids": tokens, "position_ids": tokens, "attention_mask": None, "use_cache": False}
    model.base_model(**inputs, packed_layout=layout(Segments([0, LENGTH], [-1])))


def look(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: Layout | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers that refuses what ours would."""
    if packed_layout is None:
        raise Refused("its layers do not pass on the keywords of a forward, by which attention learns of packed rows")
    try:
        check_call(module, query, key, value, attention_mask, 0.0, None, packed_layout, other)
    except ValueError as error:
        raise Refused(str(error)) from error
    return query.transpose(1, 2), None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' logs about a model that is thrown away."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
