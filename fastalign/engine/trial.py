"""A loss is tried on three small examples before any work: which metrics it has, and whether it keeps to its shape."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.engine.prepare import FILL
from fastalign.losses.custom import is_custom, reason
from fastalign.types import AXES, PackedBatch, TokenStats
from fastalign.words import nearest

if TYPE_CHECKING:
    from fastalign.engine.methods import Objective

EXAMPLES = 3


def try_out(objective: Objective) -> tuple[str, ...]:
    """The names of the objective's metrics, sorted.

    Raises:
        ValueError: settings without a meaning; a user's loss that fails or returns another shape.
    """
    check_settings(objective)
    for name, loss in objective.members.items():
        if is_custom(name):
            options = {key: value for key, value in objective.options.items() if key != "loss_weights"}
            check_custom(replace(objective, members={name: loss}, options=options), name)
    batch = trial_batch(objective)
    _, metrics = objective.loss_fn(batch)(head_outputs(objective, batch))
    return tuple(sorted(metrics))


def check_settings(objective: Objective) -> None:
    """Refuse a temperature of the reward that would turn preferences round, and columns that nothing fills."""
    beta = objective.options.get("beta", 1)
    if objective.method.align in ("pair", "sequence") and not beta > 0:
        raise ValueError(f"loss.beta must be above 0, got {beta}")
    for column in objective.columns:
        if column not in FILL:
            known = f"{nearest(column, FILL)}, which nothing fills (all: {', '.join(FILL)})"
            raise ValueError(f"loss {', '.join(objective.names)} reads the column {column!r}{known}")


def check_custom(objective: Objective, name: str) -> None:
    """Refuse a user's loss that fails on the trial batch, or does not return one loss per unit that can be trained."""
    batch = trial_batch(objective)
    try:
        loss, metrics = objective.loss_fn(batch)(head_outputs(objective, batch))
    except Exception as error:
        raise ValueError(f"loss.name: {name} fails on {EXAMPLES} examples: {reason(error)}") from error
    per_token = objective.reduction == "token-mean"
    found, wanted = int(metrics["loss"][1]), batch.num_scored if per_token else batch.num_examples
    if found != wanted:
        unit = "scored token" if per_token else objective.method.align
        raise ValueError(f"loss.name: {name} returned {found} losses for {wanted}: expected one per {unit}")
    if not loss.requires_grad:
        raise ValueError(f"loss.name: {name} returned losses without a gradient: nothing would be learnt from them")


def trial_batch(objective: Objective) -> PackedBatch:
    """Three examples of the method's kind, each sequence with one scored token, and every column filled."""
    method = objective.method
    several = 2 if method.scalar_head or method.align in ("pair", "group") else 1
    sequence = (np.array([1, 2]), np.array([False, True]))
    columns = {**dict.fromkeys(AXES, np.ones(several)), "scores": np.linspace(1, 0, several)}
    if not objective.needs_reference:
        del columns["ref_logps"]
    examples = [TokenExample((sequence,) * several, i).fill(**columns) for i in range(EXAMPLES)]
    return build_batch(examples, share_prefix=False)


def head_outputs(objective: Objective, batch: PackedBatch) -> Any:
    """What the head makes of a batch: random numbers as good as any."""
    outputs = -torch.linspace(0.5, 2, batch.num_scored).requires_grad_()
    if objective.head == "scores":
        return outputs
    rows = torch.arange(len(outputs))
    stats = TokenStats(outputs, rows, entropy=-outputs.detach(), is_top1=rows > 0)
    if objective.align != "token":
        stats = replace(stats, sequences=torch.arange(batch.num_sequences), cu_seqlens=batch.cu_seqlens.long())
    if objective.head != "distributions":
        return stats
    token = objective.method.align == "token"
    return replace(stats, divergence=objective.losses(lambda **kind: -outputs) if token else -outputs, is_top1=None)
