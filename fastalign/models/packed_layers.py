"""The native layers of a policy while it samples: weights packed once for as many tokens as are drawn from them.

A token of a few rows costs a model's modules more time than their products. Here all layers are one call of the native
kernels, whose weights lie in the order in which these read them. The bits are those of the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import native
from fastalign.models.decoding import Decode
from fastalign.models.policy import Policy
from fastalign.ops.backends.cpp import product
from fastalign.ops.backends.cpp.decode_layers import Layer, Linear, Norm, decode_layers

DECODERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""``x += attention(norm(x)); x += mlp(norm(x))``"""
MODELS = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
"""The embedding, such layers, a norm."""


def packed_layers(policy: Policy, memory: float) -> PackedLayers | None:
    """The layers in the dtype in which they multiply now, packed; None where the model's own modules must run.

    Args:
        memory: bytes that the copies of the weights may take.
    """
    if not _serves(policy) or sum(x.numel() * 4 for x in policy.backbone.parameters()) > memory:
        return None
    return PackedLayers(policy)


class PackedLayers:
    """As `Decode.layers`: tokens and positions to hidden states. Stale once a weight changes."""

    def __init__(self, policy: Policy) -> None:
        self.model: Any = policy.backbone
        self.layers = [_layer(layer, self.model.embed_tokens.weight.dtype) for layer in self.model.layers]
        self.described = [layer.described() for layer in self.layers]
        at: Any = self.model.layers[0].self_attn
        self.num_heads = at.q_proj.out_features // at.head_dim
        self.scale = at.scaling

    def __call__(self, tokens: Tensor, positions: Tensor, cached: Decode) -> Tensor:
        """``[T]`` and ``[T]`` to ``[T, D]``."""
        x = self.model.embed_tokens(tokens)
        cos, sin = (angle[0].contiguous() for angle in self.model.rotary_emb(x, position_ids=positions[None]))
        decode_layers(self.described, x, cos, sin, cached.forest, cached.step, self.num_heads, self.scale)
        return self.model.norm(x)


def _layer(layer: Any, angle: torch.dtype) -> Layer:
    at, mlp = layer.self_attn, layer.mlp
    dtype = native.product_dtype(at.q_proj.weight)
    projections = ((at.q_proj, at.k_proj, at.v_proj), (at.o_proj,))
    gated = ((mlp.gate_proj,), (mlp.up_proj,), (mlp.down_proj,))
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    norms += (at.q_norm, at.k_norm) if hasattr(at, "q_norm") else ()
    described = [Norm(x.weight.detach().contiguous(), x.variance_epsilon) for x in norms]
    return Layer(described, [Linear(dtype, *x) for x in (*projections, *gated)], dtype, angle)


def _serves(policy: Policy) -> bool:
    """Whether all layers are native ones whose weights lie here as they are, and nothing waits for their calls."""
    model: Any = policy.backbone
    if type(model).__name__ not in MODELS or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    weights, stream = [module.weight for module in _linears(model)], model.embed_tokens.weight.dtype
    dtype = native.product_dtype(weights[0])
    return all(type(layer).__name__ in DECODERS and _is_native(layer) for layer in model.layers) and (
        product.multiplies(*weights) and dtype in product.SERVED and torch.promote_types(stream, dtype) == stream
    )


def _is_native(layer: Any) -> bool:
    parts = {native.Attention: layer.self_attn, native.GatedMlp: layer.mlp, native.Norm: layer.input_layernorm}
    native_parts = all(isinstance(part, kind) for kind, part in parts.items())
    return (
        native_parts
        and type(layer.mlp.act_fn).__name__ in native.SILU
        and all(type(linear) is native.Linear for linear in _linears(layer))
    )


def _linears(module: nn.Module) -> Iterator[Any]:
    """All modules with a matrix below the embedding: what is no `native.Linear` is refused by its type."""
    for each in module.modules():
        weight = getattr(each, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and not isinstance(each, nn.Embedding):
            yield each
