"""What the optimizer adds to a checkpoint, by the names of the weights: masters, Adam moments, numbers of updates."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastalign.engine.optim import AdamW

log = logging.getLogger(__name__)

MASTER = "master."
"""Before the name of a weight, in that of its fp32 master."""


def moments(policy: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Masters by name, ``master.NAME``, and Adam moments, ``exp_avg.NAME``, ``exp_avg_sq.NAME``; the live tensors."""
    named = dict(policy.named_parameters())
    masters = {f"{MASTER}{name}": optimizer.masters[p] for name, p in named.items() if p in optimizer.masters}
    return {
        **masters,
        **{
            f"{key}.{name}": value
            for name, parameter in named.items()
            for key, value in optimizer.state.get(optimizer.updated(parameter), {}).items()
            if key != "step"
        },
    }


def optimizer_steps(policy: nn.Module, optimizer: AdamW) -> dict[str, float]:
    """How often each parameter was updated; Adam's bias correction reads it."""
    updated = {name: optimizer.updated(p) for name, p in policy.named_parameters()}
    return {n: optimizer.state[p]["step"].item() for n, p in updated.items() if p in optimizer.state}


def make_moments(policy: nn.Module, optimizer: AdamW, steps: dict[str, float]) -> None:
    """Give the optimizer zero moments, of the right layout, for the parameters that had some."""
    for name, parameter in policy.named_parameters():
        if name in steps:
            updated = optimizer.updated(parameter)
            optimizer.state[updated] = {
                "step": torch.tensor(steps[name], dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(updated),
                "exp_avg_sq": torch.zeros_like(updated),
            }


def has_masters(names: Iterable[str]) -> bool:
    """Whether masters are among the tensors of a checkpoint."""
    return any(name.startswith(MASTER) for name in names)


def in_both(
    mine: dict[str, Tensor], saved: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Both without masters, where one side has none at all: a run may begin or cease to keep them, and says so."""
    mine, saved = with_raised(mine, saved)
    here, there = has_masters(mine), has_masters(saved)
    if here == there:
        return mine, saved
    if here:
        log.info("resume: the checkpoint has no fp32 masters: they start from its weights")
    else:
        log.info("resume: the checkpoint's fp32 masters are left out: optim.master_weights is false")
    kept = {name for name in {*mine, *saved} if not name.startswith(MASTER)}
    return {n: x for n, x in mine.items() if n in kept}, {n: x for n, x in saved.items() if n in kept}


def with_raised(
    mine: dict[str, Tensor], saved: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Both, where weights in fp32 had masters in an earlier version: they are read from those, which are exact."""
    raised = {
        name: master
        for name, x in mine.items()
        if x.dtype == torch.float32
        and (master := f"{MASTER}{name.partition('.')[2]}") in saved
        and name.startswith("model.")
        and master not in mine
    }
    return {raised.get(n, n): x for n, x in mine.items()}, {n: x for n, x in saved.items() if n not in raised}
