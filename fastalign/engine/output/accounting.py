"""What a step has computed, in tokens and floating-point operations, and how much of the hardware's peak that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastalign.engine.update import Work
from fastalign.models.costs import forward_cost
from fastalign.models.policy import Policy
from fastalign.models.raised import HALF, used_dtype
from fastalign.types import ForwardCost

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}
"""Dense half-precision peak of one device by a word of its name, from the makers' data sheets."""


@dataclass(frozen=True)
class Accounting:
    """The figures that turn counts of work into operations and shares.

    Attributes:
        forward: multiply-adds of the policy's forward pass.
        trained: those with weights that are trained, and attention's.
        budget: tokens per micro-batch.
        ranks: processes that have examples of their own.
        peak: operations per second of all of them together; None where the device has no entry.
    """

    forward: ForwardCost
    trained: ForwardCost
    budget: int
    ranks: int
    peak: float | None

    def flops(self, tokens: int, attended: int, scored: int) -> float:
        """Operations of forward and backward of the policy on computed tokens: 6 per multiply-add, 4 where frozen.

        Passes of a reference, recomputed activations, and the passes without gradient of losses that look at the whole
        step first (``kto``, ``bco``, ``aot``) are not counted, neither here nor among the computed tokens.
        """
        work = tokens, attended, scored
        return 4 * self.forward.of(*work) + 2 * self.trained.of(*work)

    def describe(self, work: Work) -> dict[str, Any]:
        """Fields of a step's record; a micro-batch of one group above the budget packs more than it."""
        return {
            "examples": work.examples,
            "sequences": work.sequences,
            "tokens": work.tokens,
            "tokens_computed": work.computed,
            "tokens_response": work.scored,
            "share_ratio": work.tokens / max(work.computed, 1),
            "packing_efficiency": work.computed / (work.micro_batches * self.ranks * self.budget),
            "padding_fraction": work.idle / max(work.computed + work.idle, 1),
            "num_micro_batches": work.micro_batches,
            "flops_model": self.flops(work.computed, work.attended, work.scored),
            "peak_memory_rank_max": work.memory,
        }


def account(
    policy: Policy, budget: int, ranks: int, device: torch.device, autocast: bool, tensor_ranks: int = 1
) -> Accounting:
    """The accounting of a run; call it before the policy is sharded or after. Each of ``ranks`` may be several."""
    half = autocast or used_dtype(policy.head) in HALF
    peak = peak_flops(torch.cuda.get_device_name(device)) if half and device.type == "cuda" else None
    costs = forward_cost(policy), forward_cost(policy, trained=True)
    return Accounting(*costs, budget, ranks, None if peak is None else peak * ranks * tensor_ranks)


def peak_flops(device_name: str) -> float | None:
    """The half-precision peak of a device.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3")
        989000000000000.0
    """
    words = device_name.replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)
