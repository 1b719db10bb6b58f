"""A Hugging Face model's layers by the native CPU kernels, where those serve; anywhere else the layers' own code runs.

Only the class of a module changes: its parameters, their names and the model's file format stay.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp import layers, product

NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
"""``weight * x / rms(x)``, read by linear layers or, of bf16 heads, by the rotation."""
GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
"""``down(act(gate(x)) * up(x))``."""
ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
"""Projections, norms of heads where there are any, rotation, attention."""
SILU = {"SiLU", "SiLUActivation"}


def use_native_layers(model: nn.Module) -> None:
    """Let the known layers of a model run natively on a CPU."""
    native = cpp.unavailable() is None
    for module in model.modules():
        kind = type(module)
        known = native and kind.__module__.startswith("transformers.")
        if kind is nn.Linear:
            module.__class__ = Linear
        for ours, names in ((Norm, NORMS), (GatedMlp, GATED), (Attention, ATTENTIONS)):
            if known and kind.__name__ in names:
                module.__class__ = _native(ours, kind)


@cache
def _native(ours: type, theirs: type) -> type:
    """Their class with our forward before its own."""
    return type(theirs.__name__, (ours, theirs), {"__module__": __name__})


class Linear(nn.Linear):
    """A linear layer by the native products, where they are the faster choice."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        dtype = product_dtype(self.weight)
        served = dtype in product.SERVED and (dtype == input.dtype or torch.is_autocast_enabled("cpu"))
        if torch.compiler.is_compiling() or not served or not product.multiplies(input, self.weight):
            return super().forward(input)
        return product.linear(input, self.weight, self.bias, dtype)


def product_dtype(weight: Tensor) -> torch.dtype:
    """In which a weight multiplies: its own, or autocast's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


class Norm(nn.Module):
    """RMS norm in one pass. Under autocast the residual stream is rounded here, once for all products that read it."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        if not layers.serves(hidden_states, self.weight):
            return super().forward(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        if torch.is_autocast_enabled("cpu") and hidden_states.dtype == torch.float32:
            dtype = torch.get_autocast_dtype("cpu")
        return layers.rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype)


class GatedMlp(nn.Module):
    """The gate's activation and the product with it in one pass, not kept for the backward."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        if type(self.act_fn).__name__ not in SILU or torch.compiler.is_compiling():
            return super().forward(x)
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if gate.dtype != up.dtype or not layers.serves(gate, up):
            return down(self.act_fn(gate) * up)
        if isinstance(down, Linear) and down.bias is None and layers.serves(weight := down.weight.to(gate.dtype)):
            return layers.silu_mul_linear(gate, up, weight)
        return down(layers.silu_mul(gate, up))


class Attention(nn.Module):
    """Packed self-attention whose rotation is one pass."""

    head_dim: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    config: Any

    def forward(self, *args: Any, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """``[1, T, D]`` to ``[1, T, D]``; anything but a packed row by the layer's own code.

        That code gets its arguments as they came, by name or by place: releases of transformers rename them.
        """
        return super().forward(*args, **inputs) if args or not self._serves(inputs) else self._packed(**inputs)

    def _serves(self, inputs: dict[str, Any]) -> bool:
        """Whether these are the inputs of a packed row: no mask, no key/value cache."""
        if any(inputs.get(name) is None for name in ("hidden_states", "position_embeddings", "packed_layout")):
            return False
        if inputs.get("attention_mask") is not None or any(isinstance(x, Cache) for x in inputs.values()):
            return False
        cos, _ = inputs["position_embeddings"]
        return cos.shape[-1] == self.head_dim and layers.serves(inputs["hidden_states"], cos)

    def _packed(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = position_embeddings
        shape = (*hidden_states.shape[1:-1], -1, self.head_dim)
        project = ((self.q_proj, "q_norm"), (self.k_proj, "k_norm"), (self.v_proj, ""))
        q, k, v = (getattr(self, norm, _same)(to(hidden_states).view(shape)) for to, norm in project)
        q, k, v = (x.transpose(0, 1)[None] for x in (*(layers.rotate(x, cos[0], sin[0]) for x in (q, k)), v))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        out, weights = attend(self, q, k, v, None, scaling=self.scaling, sliding_window=window, **options)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _same(x: Tensor) -> Tensor:
    return x
