"""AdamW for weights in any precision: masters, what rounding leaves of them, moments in 8 bits, states on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastalign.engine import eight_bit
from fastalign.engine.eight_bit import SUFFIX
from fastalign.parallel.clip import local
from fastalign.parallel.host import to_host

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""The names of both moments, and whether they may be below 0."""
CPU_PIECE, PIECE = 1 << 20, 1 << 24
"""Elements that are in fp32 at the same time while a step widens them, on a CPU and on other devices."""


class AdamW(torch.optim.AdamW):
    """AdamW whose step can be called off on the device, and which keeps weights in half precision twice.

    bf16 has 8 bits: of a weight of 0.02 it cannot hold a change below 6e-5, and a step of a usual learning rate rounds
    to nothing. So the steps, with weight decay and both moments, are those of a master in fp32, sharded as the weight
    is, and the weight is the master rounded.

    Attributes:
        masters: the fp32 master of each trained weight that has one.
        compensated: weights in half precision that have a second number instead, for what rounding leaves of a master.
        coded: masters and other weights whose moments are in 8 bits.
        on_host: the masters and their moments are in host memory, and all weights have one.
        found_inf: ``[]`` fp32 read by the fused step: 1 leaves weights and moments as they were.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Any,
        masters: dict[nn.Parameter, nn.Parameter],
        compensated: frozenset[nn.Parameter] = frozenset(),
        coded: frozenset[nn.Parameter] = frozenset(),
        on_host: bool = False,
        **options: Any,
    ) -> None:
        self.masters, self.compensated, self.coded, self.on_host = masters, compensated, coded, on_host
        super().__init__(groups, **options)
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}

    def updated(self, weight: nn.Parameter) -> nn.Parameter:
        """What the steps of a weight are added to, and its moments belong to: its master, or the weight itself."""
        return self.masters.get(weight, weight)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of masters and other weights, by their gradients."""
        if self.on_host:
            self.step_on_host()
        for weight, master in self.masters.items():
            gradient = None if self.on_host else weight.grad
            master.grad = None if gradient is None else gradient.to(master.dtype)
        for updated in self.compensated | self.coded:
            if updated.grad is not None:
                self.step_one(updated, local(updated.grad))
                updated.grad = None
        super().step()
        copy_all(self.masters.values(), self.masters)

    def step_on_host(self) -> None:
        """The steps of masters in host memory, computed there; the device waits meanwhile."""
        gradients = {weight: to_host(local(weight.grad)) for weight in self.masters if weight.grad is not None}
        if any(local(weight).is_cuda for weight in gradients):
            torch.cuda.synchronize()
        called_off, self.found_inf = self.found_inf, None if self.found_inf is None else self.found_inf.cpu()
        for weight, gradient in gradients.items():
            self.step_one(self.masters[weight], gradient.float())
        self.found_inf = called_off

    @torch.no_grad()
    def step_now(self, weight: nn.Parameter) -> None:
        """What `step` does of one weight, to the bit."""
        assert weight.grad is not None
        updated, gradient = self.updated(weight), local(weight.grad)
        if updated is weight:
            self.step_one(weight, gradient)
        else:
            self.step_one(updated, gradient.to(updated.dtype))
            copy_all([updated], [weight])

    def step_one(self, updated: nn.Parameter, gradient: Tensor) -> None:
        """A step of this rank's part of a weight or master; what is not kept in fp32 is widened piece by piece."""
        if not self.state[updated]:
            self.state[updated] = self.first_state(updated)
        state, group = {name: local(x) for name, x in self.state[updated].items()}, self.group_of[updated]
        options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        options["beta1"], options["beta2"] = group["betas"]
        step = state.pop("step")

        def take(weight: Tensor, gradient: Tensor, *moments: Tensor) -> None:
            lists: Any = [weight], [gradient], *([x] for x in moments), [], [step]
            adamw(*lists, fused=True, found_inf=self.found_inf, **options)

        if updated not in self.compensated | self.coded:
            take(local(updated), gradient, *(state[name] for name in MOMENTS))
            return
        begun = step.clone()
        for piece in pieces({"weight": local(updated), "gradient": gradient, **state}):
            step.copy_(begun)
            in_fp32(piece, take)

    def first_state(self, updated: nn.Parameter) -> dict[str, Tensor]:
        """The moments of what is updated, at 0, before its first step."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=local(updated).device)}
        for name, signed in MOMENTS.items():
            if updated in self.coded:
                state[name], state[name + SUFFIX] = eight_bit.zeros(updated, signed)
            else:
                state[name] = torch.zeros_like(updated)
        return {**state, **({"remainder": torch.zeros_like(updated)} if updated in self.compensated else {})}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        super().zero_grad(set_to_none)
        for weight in self.masters:
            weight.grad = None

    @torch.no_grad()
    def start_masters(self) -> None:
        """Make the masters equal to the weights."""
        copy_all(self.masters, self.masters.values())


def pieces(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A weight and what belongs to it, some rows at a time; one without elements is one piece."""
    weight = tensors["weight"]
    if weight.dim() == 0:
        yield tensors
        return
    most = CPU_PIECE if weight.device.type == "cpu" else PIECE
    rows = max(1, most // max(1, weight[:1].numel()))
    for start in range(0, max(1, len(weight)), rows):
        yield {name: x[start : start + rows] for name, x in tensors.items()}


def in_fp32(parts: dict[str, Tensor], step: Callable[..., None]) -> None:
    """A step of one piece in fp32.

    Args:
        parts: weight, gradient, moments with their scales if they are in 8 bits, and the remainder of a compensated
            weight; all but the gradient are changed.
        step: called with weight, gradient and moments.
    """
    weight, lost = parts["weight"], parts.get("remainder")
    master, moments = weight.float(), {name: read_moment(parts, name) for name in MOMENTS}
    if lost is not None:
        master += lost
    step(master, parts["gradient"].float(), *moments.values())
    for name, x in moments.items():
        write_moment(parts, name, x)
    if master is not weight:
        weight.copy_(master)
    if lost is not None:
        lost.copy_(master.sub_(weight))


def read_moment(parts: dict[str, Tensor], name: str) -> Tensor:
    """A moment in fp32; of the second in 8 bits the root is kept."""
    if name + SUFFIX not in parts:
        return parts[name].float()
    x = eight_bit.decode(parts[name], parts[name + SUFFIX], MOMENTS[name])
    return x if MOMENTS[name] else x.square_()


def write_moment(parts: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Keep a moment as `read_moment` reads it."""
    if name + SUFFIX not in parts:
        parts[name].copy_(x)
        return
    codes, scales = eight_bit.encode(x if MOMENTS[name] else x.sqrt_(), MOMENTS[name])
    parts[name].copy_(codes)
    parts[name + SUFFIX].copy_(scales)


def copy_all(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    """Round or widen each source into its target, in place."""
    pairs = [(local(target), local(source)) for source, target in zip(sources, targets, strict=True)]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # pyright: ignore
