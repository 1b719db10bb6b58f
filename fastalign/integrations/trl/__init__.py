"""TRL 1.16 on fastalign: one line for the fused head of its trainers, subclasses for packed batches.

with fastalign.integrations.trl.patch():                # TRL's own trainers, their log-probs through our op
    trl.DPOTrainer(...).train()

from fastalign.integrations.trl import DPOTrainer       # besides: no padding, prompts computed once
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastalign.integrations.trl.head import Patch, patch
from fastalign.integrations.trl.trainers import TRAINERS, packed_trainer

if TYPE_CHECKING:
    DPOTrainer: Any
    GRPOTrainer: Any
    KTOTrainer: Any
    RLOOTrainer: Any

__all__ = ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "Patch", "RLOOTrainer", "patch"]


def __getattr__(name: str) -> Any:
    """The trainers, whose base classes are TRL's: made at first use."""
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return packed_trainer(name)
