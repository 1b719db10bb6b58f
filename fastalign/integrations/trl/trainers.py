"""Subclasses of TRL's trainers whose models run on packed rows.

Everything but the forward is TRL's: arguments, data, losses, metrics, checkpoints. In each micro-batch rows with the
same prompt share it: both sides of a preference pair, the completions of a group.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastalign.integrations.trl.head import check_version
from fastalign.integrations.trl.packed import add_packed_head

TRAINERS = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
"""Those whose rows are a prompt and a completion; TRL's SFT packs by itself."""


class PackedHeads:
    """Mixed in before a trainer of TRL: its models get packed heads where it would give them fused ones."""

    def __init__(self, *args: Any, **kwargs: Any):
        with _packed_heads(type(self)):
            super().__init__(*args, **kwargs)


@functools.cache
def packed_trainer(name: str) -> type:
    """``trl.NAME`` on packed rows: no padding, and a prompt computed once for all of its completions in a micro-batch.

    Losses, metrics and gradients are TRL's. The model must be a causal LM that runs exactly on packed rows (text only,
    full or sliding attention); others are refused with the reason, and the first batch is checked against the plain
    forward. Dropout is set to zero; the padding token's embedding is trained where it occurs in the text.

    Raises:
        ValueError: TRL is not installed, or in a version other than 1.16.
    """
    check_version()
    import trl

    attributes = {"__doc__": packed_trainer.__doc__, "__module__": __name__.rpartition(".")[0]}
    return type(name, (PackedHeads, getattr(trl, name)), attributes)


@contextmanager
def _packed_heads(cls: type) -> Iterator[None]:
    """Inside the block the module of TRL's trainer adds packed heads."""
    modules = (vars(sys.modules[base.__module__]) for base in cls.__mro__ if base.__module__.startswith("trl."))
    module = next(names for names in modules if "add_fused_lm_head" in names)
    theirs, module["add_fused_lm_head"] = module["add_fused_lm_head"], add_packed_head
    try:
        yield
    finally:
        module["add_fused_lm_head"] = theirs
