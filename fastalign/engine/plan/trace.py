"""Forward and backward of a policy on the meta device, with every tensor that is alive counted.

Layers run by the code that will run, the native ones included. Attention, which has kernels for real devices only, and
autocast, which the meta device does not have, are stood in for by what keeps the same.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from fastalign.models.policy import Policy
from fastalign.models.support import transformer_blocks
from fastalign.ops import dispatch
from fastalign.ops.attention import Layout, expand_heads, gathered
from fastalign.ops.backends.cpp.product import preferred
from fastalign.parallel import tensor
from fastalign.types import PackedBatch

KINDS = {"norm": "norms", "attention": "attention", "attn": "attention", "mlp": "MLP", "expert": "MLP", "moe": "MLP"}
"""What a word in the name of a module's class says of where it is; elsewhere is the residual stream."""
RESIDUAL = "residual"
ATTENTION = "fastalign_plan"
"""The name in transformers of the attention that keeps what a backend keeps."""


@dataclass(frozen=True)
class Way:
    """How a model computes: on which kind of device, and in what precision.

    Attributes:
        native: on a CPU, with the native layers where they serve.
        attention: backend of the packed attention.
        autocast: bf16 over weights in fp32, by autocast.
        dtype: what FSDP gathers the weights in; None: their own.
        parts: ranks over which tokens are split outside of attentions and MLPs.
    """

    native: bool
    attention: str
    autocast: bool
    dtype: torch.dtype | None
    parts: int = 1


@dataclass(frozen=True)
class Kept:
    """Bytes of a batch at the end of its forward, by kind, and the most that its backward had beyond them."""

    kinds: Mapping[str, float]
    backward: float

    def along(self, other: Kept, share: float) -> Kept:
        """What is found ``share`` of the way from here to another, beyond it too."""
        names = {*self.kinds, *other.kinds}
        mixed = {name: _mix(self.kinds.get(name, 0), other.kinds.get(name, 0), share) for name in names}
        return Kept(mixed, _mix(self.backward, other.backward, share))

    @property
    def total(self) -> float:
        """All that is kept."""
        return sum(self.kinds.values())


def _mix(one: float, other: float, share: float) -> float:
    return one + share * (other - one)


def run(policy: Policy, batch: PackedBatch, way: Way) -> Kept:
    """Forward and backward of a batch; of the head only what comes in and goes back."""
    ignored = [*policy.parameters(), *policy.buffers()]
    with ExitStack() as stack:
        live = Live(ignored)
        stack.enter_context(forgets_gradients(policy))
        stack.enter_context(live.watching(policy))
        stack.enter_context(live.marking(transformer_blocks(policy)[-1]))
        stack.enter_context(_attention(policy, way))
        stack.enter_context(_tokens_in_part(policy, way.parts))
        caches = not (way.native and preferred())  # the native products cast for themselves
        copies = stack.enter_context(_autocast(policy, live, caches)) if way.autocast else {}
        stack.enter_context(live)
        loss = policy(batch, lambda hidden, *_, **__: Head.apply(hidden))
        kinds, end = live.kinds(), live.bytes
        copies.clear()  # autocast's cache ends with the forward
        live.most = live.bytes
        loss.backward()
    return Kept(kinds, (live.last_layer or live.most) - end)


@contextmanager
def forgets_gradients(policy: Policy) -> Iterator[None]:
    """Gradients of weights are counted with the weights: here each goes as soon as it is there."""

    def forget(weight: Tensor) -> None:
        weight.grad = None

    hooks = [p.register_post_accumulate_grad_hook(forget) for p in policy.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Head(torch.autograd.Function):
    """Makes the gradient of hidden states in the forward, as the fused head does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        """``[]`` a loss without a value."""
        ctx.gradient = torch.empty_like(hidden)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """``[N, D]`` what the forward has made."""
        return ctx.gradient


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, by the kind of module that made them, and their most."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[str, int]] = {}
        self.bytes = self.most = self.last_layer = 0
        self.place = [RESIDUAL]
        self.ignored = {x.untyped_storage()._cdata for x in ignored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.see(x.untyped_storage())
        return out

    def see(self, storage: Any) -> None:
        """Count memory that is new."""
        key = storage._cdata
        if key in self.sizes or key in self.ignored:
            return
        self.sizes[key] = self.place[-1], storage.nbytes()
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        """Memory is gone."""
        self.bytes -= self.sizes.pop(key)[1]

    def kinds(self) -> dict[str, float]:
        """What is alive, by kind."""
        found: Counter[str] = Counter()
        for kind, size in self.sizes.values():
            found[kind] += size
        return dict(found)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know meanwhile in which kind of module a tensor is made."""
        hooks = []
        for module in model.modules():
            if (kind := kind_of(module)) is not None:
                hooks.append(module.register_forward_pre_hook(lambda *_, kind=kind: self.place.append(kind)))
                hooks.append(module.register_forward_hook(lambda *_: self.leave(), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def marking(self, block: nn.Module) -> Iterator[None]:
        """Keep the most that was alive until a backward is through the last layer: what comes is less or gradients."""

        def passed(*_: Any) -> None:
            self.last_layer = self.most

        def mark(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3)
            if hidden.requires_grad:
                hidden.register_hook(passed)

        hook = block.register_forward_pre_hook(mark, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def leave(self) -> None:
        """Back in the module around."""
        self.place.pop()


def kind_of(module: nn.Module) -> str | None:
    """Of the outermost module of a kind; None for modules that only hold others."""
    name = type(module).__name__.lower()
    return next((kind for word, kind in KINDS.items() if word in name), None)


# --- what runs in the place of a device's kernels --------------------------------------------------------------------


@contextmanager
def _attention(policy: Policy, way: Way) -> Iterator[None]:
    """Attention that keeps what the backend keeps."""
    was = policy.attention
    AttentionInterface.register(ATTENTION, _attend(way.attention))
    policy.use_attention(ATTENTION)
    try:
        yield
    finally:
        policy.use_attention(was)


@contextmanager
def _tokens_in_part(policy: Policy, parts: int) -> Iterator[None]:
    """Outside of attentions and MLPs the share of one rank."""
    if parts == 1:
        yield
        return
    team: Any = _Part(parts)
    backbone: nn.Module = policy.backbone
    hooks = [policy.model.get_input_embeddings().register_forward_hook(lambda *given: team.leave(given[-1]))]
    for module in tensor.joint_modules(backbone, tensor.plan_of(policy.config)):
        hooks.append(module.register_forward_pre_hook(tensor.entering(team), with_kwargs=True))
        hooks.append(module.register_forward_hook(tensor.leaving(team)))
    hooks.append(backbone.register_forward_hook(tensor.ending(team), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Part:
    """Stands in for a `tensor.Team` of so many ranks: shapes are theirs."""

    size: int
    whole, parted = False, True

    def enter(self, x: Tensor, rows: int | None) -> Tensor:
        return torch.cat([x] * self.size, 1)[:, :rows]

    def leave(self, x: Tensor) -> Tensor:
        return x[:, : -(-x.shape[1] // self.size)].clone()

    join = enter


def _attend(backend: str) -> Any:
    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        plan: Layout = options["packed_layout"]
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        if backend == "cpp":
            out = dispatch.attention("cpp").attend(q, k, v, plan, 1.0, options.get("softcap"))
            return out[None], None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if backend == "sdpa":
            k, v = expand_heads(q, k), expand_heads(q, v)
        k, v, _ = gathered(k, v, plan)
        return _Fused.apply(q, k, v)[None], None

    return attend


class _Fused(torch.autograd.Function):
    """An attention that keeps its inputs, its output and a number per row and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        q, k, v, *_rest = ctx.saved_tensors
        return tuple(torch.empty_like(x) for x in (q, k, v))


@contextmanager
def _autocast(policy: Policy, live: Live, caches: bool) -> Iterator[dict[int, Tensor]]:
    """Linear layers as autocast runs them, which the meta device has not; gives its copies of trained weights."""
    copies: dict[int, Tensor] = {}
    layers = [module for module in policy.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.forward = partial(_half_linear, layer, copies, live, caches)  # pyright: ignore
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield copies
    finally:
        for layer in layers:
            del layer.forward


def _half_linear(layer: nn.Linear, copies: dict[int, Tensor], live: Live, caches: bool, x: Tensor) -> Tensor:
    weight, bias, half = layer.weight, layer.bias, torch.bfloat16
    live.place.append("bf16 copies of weights")
    narrow = copies.get(id(weight), weight).to(half)
    live.place.pop()
    if weight.requires_grad and caches:
        copies[id(weight)] = narrow
    return nn.functional.linear(x.to(half), narrow, None if bias is None else bias.to(half))
