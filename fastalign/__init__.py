"""fastalign aligns language models: fused losses, packed batches, shared prompts, on CPU and GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastalign.api import Run, evaluate, generate, score, train
    from fastalign.ops import (
        divergence,
        entropy_from_logits,
        forest_decode,
        gae,
        linear_divergence,
        linear_logps,
        linear_loss,
        linear_sample,
        packed_attention,
        policy_loss,
        preference_loss,
        sample,
        sample_keys,
        segment_scan,
        selective_log_softmax,
        token_logps,
        uniforms,
        whiten,
    )

__version__ = "0.1.0"

__all__ = [
    "Run",
    "divergence",
    "entropy_from_logits",
    "evaluate",
    "forest_decode",
    "gae",
    "generate",
    "linear_divergence",
    "linear_logps",
    "linear_loss",
    "linear_sample",
    "packed_attention",
    "policy_loss",
    "preference_loss",
    "sample",
    "sample_keys",
    "score",
    "segment_scan",
    "selective_log_softmax",
    "token_logps",
    "train",
    "uniforms",
    "whiten",
]


API = ("Run", "evaluate", "generate", "score", "train")


def __getattr__(name: str) -> Any:
    """Import ops and functions at first use: the command line answers without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'fastalign' has no attribute {name!r}")
    return getattr(import_module("fastalign.api" if name in API else "fastalign.ops"), name)
