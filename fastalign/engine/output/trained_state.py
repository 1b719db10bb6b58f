"""What a checkpoint holds of the modules that train, by role: weights, fp32 masters, Adam moments, numbers of updates.

A tensor is named ``ROLE.KIND.NAME``, such as ``policy.exp_avg.model.lm_head.weight``; NAME is the module's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor, nn

from fastalign.engine.optim import Trained

log = logging.getLogger(__name__)

T = TypeVar("T")

Roles = Mapping[str, Trained]
"""The modules that change, such as ``policy`` and ``critic``."""


def tensors_of(trained: Roles) -> dict[str, Tensor]:
    """All tensors by name, tied ones once; the live tensors, not copies."""
    return {f"{role}.{kind}.{name}": x for role, one in trained.items() for kind, name, x in kept(one)}


def kept(trained: Trained) -> Iterator[tuple[str, str, Tensor]]:
    """What is kept of a module and its optimizer: kind, name of the weight, tensor."""
    for name, x in weights(trained.module).items():
        yield "weight", name, x
    for name, parameter in trained.module.named_parameters():
        updated = trained.optimizer.updated(parameter)
        if updated is not parameter:
            yield "master", name, updated
        for kind, x in trained.optimizer.state.get(updated, {}).items():
            if kind != "step":
                yield kind, name, x


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and saved buffers; what is frozen is loaded again from where it came from.

    All of a module that follows another, in which nothing trains.
    """
    every = dict(module.named_parameters())
    names = {name for name, p in every.items() if p.requires_grad} or {*every}
    names |= {name for name, _ in module.named_buffers()}
    return {name: x for name, x in module.state_dict().items() if name in names}


def tied_names(module: nn.Module) -> set[str]:
    """Second and further names of shared parameters."""
    every = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in module.named_parameters()}


def named_weights(trained: Roles) -> Iterator[tuple[str, nn.Parameter, Trained]]:
    """Each parameter as ``ROLE.NAME``, with its role's module and optimizer."""
    for role, one in trained.items():
        for name, parameter in one.module.named_parameters():
            yield f"{role}.{name}", parameter, one


def optimizer_steps(trained: Roles) -> dict[str, float]:
    """How often each parameter was updated, by ``ROLE.NAME``; Adam's bias correction reads it."""
    states = {name: one.optimizer.state.get(one.optimizer.updated(p)) for name, p, one in named_weights(trained)}
    return {name: state["step"].item() for name, state in states.items() if state}


def make_moments(trained: Roles, steps: dict[str, float]) -> None:
    """Give the optimizers zero moments, of the right layout, for the parameters that had some."""
    for name, parameter, one in named_weights(trained):
        if name in steps:
            updated = one.optimizer.updated(parameter)
            one.optimizer.state[updated] = state = one.optimizer.first_state(updated)
            state["step"].fill_(steps[name])


def is_master(name: str) -> bool:
    """Whether a tensor of a checkpoint is a master, or what rounding has left of one."""
    return name.partition(".")[2].startswith(("master.", "remainder."))


def in_both(
    mine: dict[str, Tensor], saved: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Both without the masters, or remainders, that one side alone has: a run may begin or cease to keep them."""
    apart = {name for name in mine.keys() ^ saved.keys() if is_master(name)}
    if not apart or any(map(is_master, mine.keys() & saved.keys())):
        return mine, saved
    if apart & mine.keys():
        log.info("resume: the checkpoint has no fp32 masters of this kind: they start from its weights")
    else:
        log.info("resume: the checkpoint's fp32 masters are left out: optim.master_weights is false")
    return without(mine, apart), without(saved, apart)


def without(tensors: dict[str, T], names: set[str]) -> dict[str, T]:
    """The other tensors."""
    return {name: x for name, x in tensors.items() if name not in names}


def start_masters(trained: Roles, loaded: Iterable[str]) -> None:
    """Make masters that were not among the loaded tensors equal to their weights."""
    if not any(map(is_master, loaded)):
        for one in trained.values():
            one.optimizer.start_masters()
