"""Who takes part in a case, and the drawing of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import peers

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Run = Callable[[Inputs], Outputs]
Loss = Callable[[Inputs], Tensor]

OURS = "fastalign"
ROOF = "roof: "
"""How the names of candidates begin that do less than the task: bounds, not rivals."""
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOY = {"N": 12, "V": 61, "D": 16, "P": 2, "L": 5, "B": 4, "H": 2, "d": 8}
"""The largest sizes of a toy case."""


@dataclass(frozen=True)
class Setting:
    """Where cases run and how large they are.

    Attributes:
        device: "cpu" or "cuda".
        compiled: torch.compile takes part; its compilation is slow.
        toy: sizes are cut to `TOY`, for tests.
    """

    device: str = "cpu"
    compiled: bool = False
    toy: bool = False

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def sizes(self, **sizes: int) -> dict[str, int]:
        """The sizes asked for, by letter, or a toy's."""
        return {letter: min(size, TOY[letter]) if self.toy else size for letter, size in sizes.items()}


class Field:
    """The candidates of a case by name, and those that cannot run here with the reason.

    Attributes:
        runs: functions from inputs to the outputs that are checked; roofs return none.
        losses: the losses behind the runs that train, for measuring memory.
        skipped: name -> why it is not among the runs.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.runs: dict[str, Run] = {}
        self.losses: dict[str, Loss] = {}
        self.skipped: dict[str, str] = {}

    def add(self, name: str, run: Run, **needs: Any) -> None:
        """Enter a candidate, or its reason to be absent; ``needs`` as for `absent`."""
        reason = absent(self.setting, **needs)
        if reason is None:
            self.runs[name] = run
        else:
            self.skipped[name] = reason

    def add_loss(self, name: str, loss: Loss, leaves: tuple[str, ...] = ("hidden", "weight"), **needs: Any) -> None:
        """Enter a candidate that returns a loss; its gradients with respect to ``leaves`` are checked too."""
        self.add(name, partial(trained, loss, leaves=leaves), **needs)
        if name in self.runs:
            self.losses[name] = loss


def absent(
    setting: Setting,
    *,
    package: str | None = None,
    gpu: str = "",
    hopper: bool = False,
    compiled: bool = False,
    backend: str | None = None,
) -> str | None:
    """Why a candidate cannot run here, or None when it can.

    Args:
        package: the distribution that it needs.
        gpu: why it needs a GPU, "its kernels are Triton"; empty when it does not.
        hopper: it needs a GPU of capability 9.0 or newer.
        compiled: it needs torch.compile.
        backend: the backend of fastalign that it asks for.
    """
    from fastalign.ops import dispatch

    if gpu and not setting.gpu:
        return f"needs a GPU: {gpu}"
    if hopper and capability() < (9, 0):
        return "needs a GPU of capability 9.0 or newer"
    if compiled and not setting.compiled:
        return "torch.compile was not asked for (--no-compile)"
    if backend is not None and (reason := dispatch.missing(backend)):
        return reason
    return None if package is None else peers.missing(package)


def capability() -> tuple[int, int]:
    """The GPU's compute capability, (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def draw(generator: torch.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = FP32) -> Tensor:
    """Normal numbers on the generator's device, rounded to ``dtype``."""
    return torch.randn(*shape, generator=generator, device=generator.device).mul_(scale).to(dtype)


def integers(generator: torch.Generator, high: int, n: int) -> Tensor:
    """``[n]`` labels below ``high``."""
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def in64(x: Inputs) -> Inputs:
    """The same numbers in float64, as fresh leaves."""
    wide = {name: v.detach().double() if v.is_floating_point() else v for name, v in x.items()}
    return {name: v.requires_grad_(x[name].requires_grad) for name, v in wide.items()}


def gradient(leaf: Tensor) -> Tensor:
    """What backward left in a leaf."""
    assert leaf.grad is not None
    return leaf.grad


def trained(loss: Loss, x: Inputs, leaves: tuple[str, ...] = ("hidden", "weight")) -> Outputs:
    """Forward and backward: the loss, and the gradients of the leaves that want one."""
    value = loss(x)
    value.backward()
    grads = {f"d_{name}": gradient(x[name]) for name in leaves if x[name].requires_grad}
    return {"loss": value.detach(), **grads}
