"""The optimizer that a run asks for, its steps, and the learning rate."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastalign.config import OptimConfig
from fastalign.engine.adamw import AdamW
from fastalign.engine.eight_bit import can_be_coded
from fastalign.models.precision import HALF
from fastalign.parallel.clip import Squares, clip_gradients, local
from fastalign.parallel.host import placed, to_host

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A module that trains, plain or sharded, and the optimizer of its weights."""

    module: nn.Module
    optimizer: AdamW


def make_optimizer(model: nn.Module, config: OptimConfig, *, tell: bool = True) -> AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, not on norms and biases.

    The fused implementation is used everywhere: on two CPU cores a step over 6M parameters takes 2.4 ms, against 8.0
    with foreach and 10.5 with neither; it alone can skip a step without asking the device (``found_inf``).

    Args:
        model: plain or sharded.
        config: the section; without ``master_weights`` weights in half precision are updated as they are.
        tell: log what half precision costs; of several ranks one does.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    on_host = config.offload and any(p.is_cuda for p in trainable)
    if tell:
        warn_of_half(trainable, config)
    if tell and config.offload and not on_host:
        log.info("optim.offload changes nothing: this is a CPU")
    masters = make_masters(trainable, on_host=on_host) if config.master_weights is True else {}
    compensated = frozenset(p for p in trainable if p.dtype in HALF and config.master_weights == "compensated")
    add_up_in_fp32(compensated)
    updated = [masters.get(p, p) for p in trainable]
    coded = frozenset(p for p in updated if config.name == "adamw_8bit" and can_be_coded(p))
    groups = [
        {"params": [p for p in updated if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in updated if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        masters,
        compensated,
        coded,
        on_host,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
        foreach=False,
    )


def make_masters(trainable: Iterable[nn.Parameter], *, on_host: bool = False) -> dict[nn.Parameter, nn.Parameter]:
    """fp32 copies of the weights in half precision, whose gradients are from now on added up in fp32 too.

    Those of a sharded weight FSDP adds up: see `parallel.shard`. In host memory all weights have one.
    """
    halves = [p for p in trainable if p.dtype in HALF]
    add_up_in_fp32(halves)
    if not on_host:
        return {p: nn.Parameter(p.detach().float()) for p in halves}
    copies = {p: to_host(local(p.detach()).float()) for p in trainable}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {p: nn.Parameter(placed(copy, p.detach())) for p, copy in copies.items()}


def add_up_in_fp32(weights: Iterable[nn.Parameter]) -> None:
    """Let the gradients of weights be fp32 whatever these are; sharded ones have it from FSDP."""
    for weight in weights:
        if not isinstance(weight, DTensor):
            weight.grad_dtype = torch.float32


def warn_of_half(trainable: Iterable[nn.Parameter], config: OptimConfig) -> None:
    """Say what is lost of weights in half precision: their steps without masters, small gradients in fp16."""
    dtypes = {p.dtype for p in trainable if p.dtype in HALF}
    if dtypes and not config.master_weights:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        told = "optim.master_weights false: steps of optim.lr %g on %s weights mostly round to nothing"
        log.warning(told, config.lr, names)
    if torch.float16 in dtypes:
        log.warning(
            "float16 weights train without loss scaling: gradients below 6e-8 are lost; set model.dtype to bfloat16"
        )


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step ``step`` (1-based) of ``total``.

    Warm-up rises linearly to the peak, which its last step reaches. Then ``constant`` stays, ``linear`` falls as
    ``1 - x`` and ``cosine`` as ``(1 + cos(pi x)) / 2``, x going from 0 to 1 over the steps that remain.
    """
    warmup = warmup_steps(total, config)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - 1 - warmup) / max(total - warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.lr * shape[config.schedule]


def warmup_steps(total: int, config: OptimConfig) -> int:
    """``warmup`` below 1 is a share of the steps, rounded up; from 1 on a number of steps."""
    return math.ceil(config.warmup * total) if config.warmup < 1 else round(config.warmup)


def take_step(trained: Trained, lr: float, clip_norm: float, finite: Tensor) -> Tensor:
    """Clip the gradients and update the weights, unless something is not finite; nothing is read from the device.

    Args:
        trained: with its gradients, which are forgotten afterwards.
        lr: of this update.
        clip_norm: see `clip_gradients`.
        finite: ``[]`` bool, whether the loss is.

    Returns:
        ``[]`` fp64 norm of the gradients before clipping.
    """
    optimizer = trained.optimizer
    norm = clip_gradients(trained.module.parameters(), clip_norm)
    set_rate(optimizer, lr)
    optimizer.found_inf = 1 - (finite & norm.isfinite()).float()  # 1 skips the update
    optimizer.step()
    optimizer.zero_grad()
    return norm


def set_rate(optimizer: AdamW, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextmanager
def stepping(trained: Trained, lr: float, finite: Tensor) -> Iterator[Squares]:
    """Update each weight as soon as a backward inside has its whole gradient, which is freed at once.

    The weights are those of `take_step` without clipping, to the bit. A gradient that is not finite leaves its weight
    as it was: the others are updated already.

    Args:
        trained: without gradients.
        lr, finite: as `take_step`.

    Yields:
        what adds up to the norm of the gradients.
    """
    optimizer, squares, wanted = trained.optimizer, Squares(), finite.float()
    set_rate(optimizer, lr)

    def step(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        optimizer.found_inf = 1 - wanted * squares.add(weight.grad).isfinite()
        optimizer.step_now(weight)
        weight.grad = None

    weights = [p for p in trained.module.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(step) for p in weights]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()
