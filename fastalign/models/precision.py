"""A policy run more exactly than it trains, to see how far rounding alone moves what it puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastalign.models.policy import ATTENTION, Policy, register_attention
from fastalign.models.raised import HALF as HALF
from fastalign.models.raised import unrounded, used_dtype
from fastalign.models.support import transformer_blocks
from fastalign.ops import dispatch


def trained_dtype(policy: Policy, device: torch.device) -> torch.dtype:
    """What a forward under the present autocast rounds to; TF32 products count as bf16."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    dtype = used_dtype(policy.head)
    return torch.bfloat16 if tf32 and dtype == torch.float32 else dtype


def why_not_widened(policy: Policy, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `widened` cannot run a policy in ``dtype``; None when it can."""
    sharded = isinstance(policy, FSDPModule)
    elsewhere = not sharded and any(isinstance(p, DTensor) for p in policy.parameters())
    if elsewhere or any(p.is_meta or p.numel() == 0 for p in policy.parameters()):
        return "its weights are sharded or not on this device"
    if sharded and dtype == torch.float64:  # the embedding and the head of all ranks would be in memory at 8 bytes
        return "its weights are sharded"
    return None


@contextmanager
def widened(policy: Policy, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Run a policy in ``dtype``, without autocast and TF32; its weights are then put back, bit for bit.

    The weights of a layer are wide only while it runs, so that a second copy of the model is never in memory; the
    embedding, the last norm and the head are wide throughout. Quantised weights stay, their products are wide.
    """
    layers, was = transformer_blocks(policy), policy.attention
    inner = {module for layer in layers for module in layer.modules()}
    with ExitStack() as stack:
        if isinstance(policy, FSDPModule):
            stack.enter_context(gathered(policy))
        outer = [x for module in policy.modules() if module not in inner for x in places(module, recurse=False)]
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(exact_products(policy))
        stack.enter_context(unrounded(policy))
        stack.enter_context(eager_experts(policy.config))
        backend = was.removeprefix(ATTENTION).removeprefix("_")
        if backend and dispatch.without_attention(backend, device.type, dtype):  # flash and varlen: half precision
            stack.callback(policy.use_attention, was)
            policy.use_attention(register_attention("auto"))
        stack.enter_context(wide(outer, dtype))
        for layer in layers:
            stack.enter_context(wide_while_it_runs(layer, dtype))
        yield


@contextmanager
def gathered(policy: Any) -> Iterator[None]:
    """What a sharded policy has outside its layers, whole on every rank; its layers are, one by one, when they run.

    Hidden states are not rounded meanwhile to what FSDP computes in.
    """
    states = [module._get_fsdp_state() for module in policy.modules() if isinstance(module, FSDPModule)]
    was = [state._mp_policy for state in states]
    for state in states:
        state._mp_policy = replace(state._mp_policy, cast_forward_inputs=False)
    policy.unshard()
    try:
        yield
    finally:
        policy.reshard()
        for state, kept in zip(states, was, strict=True):
            state._mp_policy = kept


Place = tuple[dict[str, Any], str]
"""A dict of a module and a name in it: where a parameter or a buffer is kept."""


def places(module: nn.Module, recurse: bool = True) -> list[Place]:
    """Where floating-point parameters and buffers are kept."""
    modules = module.modules() if recurse else [module]
    dicts = [kept for owner in modules for kept in (owner._parameters, owner._buffers)]
    return [(kept, name) for kept in dicts for name, x in kept.items() if x is not None and x.is_floating_point()]


@contextmanager
def exact_products(policy: Policy) -> Iterator[None]:
    """Products in fp32 without TF32, those of quantised weights in fp32 too: bitsandbytes knows nothing wider."""
    was = torch.get_float32_matmul_precision()
    found: list[Any] = [module for module in policy.modules() if hasattr(module, "compute_dtype")]
    quantised = [(module, module.compute_dtype) for module in found]
    try:
        torch.set_float32_matmul_precision("highest")
        for module, _ in quantised:
            module.compute_dtype = torch.float32
        yield
    finally:
        torch.set_float32_matmul_precision(was)
        for module, kept in quantised:
            module.compute_dtype = kept


@contextmanager
def eager_experts(config: Any) -> Iterator[None]:
    """A mixture's experts one after the other: the grouped products take no fp64."""
    was = getattr(config, "_experts_implementation", None)
    if was is None:
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = was


@contextmanager
def wide(narrow: list[Place], dtype: torch.dtype) -> Iterator[None]:
    """Wider copies in place of the tensors, then the same tensors again.

    They are replaced, not changed: a parameter whose ``data`` has had another dtype is cut off from the hooks by which
    DistributedDataParallel sums gradients.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}  # tied weights stay one tensor
    try:
        for owner, name in narrow:
            x: Tensor = owner[name]
            if torch.promote_types(x.dtype, dtype) != x.dtype:
                kept.append((owner, name, x))
                if id(x) not in made:
                    made[id(x)] = _copy(x, dtype)
                owner[name] = made[id(x)]
        yield
    finally:
        for owner, name, x in kept:
            owner[name] = x


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    copy = x.detach().to(dtype)
    return nn.Parameter(copy, requires_grad=False) if isinstance(x, nn.Parameter) else copy


@contextmanager
def wide_while_it_runs(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Widen a layer's weights before each of its forwards and put them back after it, also after an error."""
    stack = ExitStack()

    def before(*_: Any) -> None:
        stack.enter_context(wide(places(layer), dtype))

    def after(*_: Any) -> None:
        stack.close()

    # prepended: of two of these the inner one is undone first
    hooks = (
        layer.register_forward_pre_hook(before),
        layer.register_forward_hook(after, always_call=True, prepend=True),
    )
    try:
        yield
    finally:
        stack.close()
        for hook in hooks:
            hook.remove()


@contextmanager
def roughened(policy: Policy, dtype: torch.dtype) -> Iterator[None]:
    """Run a policy with one rounding error more in every layer: each number is moved by half a unit in its last place.

    For a policy that cannot be widened. No generator of the program is drawn from.
    """
    with ExitStack() as stack:
        for seed, module in enumerate([*transformer_blocks(policy), policy.head]):
            stack.callback(module.register_forward_hook(_rough(seed, torch.finfo(dtype).eps / 2)).remove)
        yield


def _rough(seed: int, amount: float) -> Callable[..., Any]:
    def rough(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed)
        up = torch.randint(0, 2, x.shape, generator=generator, device=x.device) * 2 - 1
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * (1 + amount * up)).to(x.dtype)

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        return (rough(output[0]), *output[1:]) if isinstance(output, tuple) else rough(output)

    return hook
