"""Liger-Kernel's fused linear losses with fastalign inside: names, arguments and results of liger-kernel 0.8.

    from fastalign.integrations.liger import LigerFusedLinearDPOLoss        # was: liger_kernel.chunked_loss

Rows that are not scored are dropped before the head, the rest is projected once, and gradients are made in the same
pass. ``compiled``, ``chunk_size`` and ``accum_dtype`` are accepted and not used: nothing is compiled, chunks are
planned, sums are fp32. Results beside the loss are detached. Options that are not served are refused when the loss is
made; each class says where its numbers differ from Liger's. Liger itself is not needed.
"""

from fastalign.integrations.liger.cross_entropy import (
    CrossEntropyOutput,
    LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyLoss,
)
from fastalign.integrations.liger.distillation import LigerFusedLinearJSD, LigerFusedLinearJSDLoss
from fastalign.integrations.liger.policy import LigerFusedLinearGRPOLoss
from fastalign.integrations.liger.preference import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from fastalign.integrations.liger.unpaired import LigerFusedLinearKTOLoss

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
