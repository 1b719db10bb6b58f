"""The native layers of a policy while it samples: weights packed once for as many tokens as are drawn from them.

A token of a few rows costs a model's modules more time than their products. Here a layer is nine calls of native
kernels, whose weights lie in the order in which these read them. The bits are those of the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import native
from fastalign.models.decoding import Cached
from fastalign.models.policy import Policy, register_attention
from fastalign.ops.backends.cpp import layers, product

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
        backend = "cpp" if policy.attention == register_attention("cpp") else None
        self.layers = [_Layer(layer, backend) for layer in self.model.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, cached: Cached) -> Tensor:
        """``[T]`` and ``[T]`` to ``[T, D]``."""
        x = self.model.embed_tokens(tokens)
        cos, sin = (angle[0] for angle in self.model.rotary_emb(x, position_ids=positions[None]))
        for layer in self.layers:
            x = layer(x, cos, sin, cached)
        return self.model.norm(x)


class _Product:
    """Some linear layers of one input as one product."""

    def __init__(self, *linears: Any) -> None:
        self.dtype = native.product_dtype(linears[0].weight)
        self.packed = product.Packed(torch.cat([x.weight.detach().to(self.dtype) for x in linears]))
        biases = [x.bias for x in linears]
        self.bias = None if biases[0] is None else torch.cat([x.detach() for x in biases])

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return product.with_bias(lambda dtype: self.packed(x, dtype), self.bias, self.dtype)


class _Layer:
    def __init__(self, layer: Any, backend: str | None) -> None:
        at, mlp = layer.self_attn, layer.mlp
        self.attention, self.norms = at, (layer.input_layernorm, layer.post_attention_layernorm)
        self.qkv, self.o = _Product(at.q_proj, at.k_proj, at.v_proj), _Product(at.o_proj)
        self.gate, self.up, self.down = (_Product(x) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.heads = [x.out_features // at.head_dim for x in (at.q_proj, at.k_proj, at.v_proj)]
        self.options = {"scale": at.scaling, "softcap": None, "backend": backend}

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cached: Cached) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        x = x + self.attend(self.norms[0].forward(x), cos, sin, cached)
        h = self.norms[1].forward(x)
        return x + self.down(layers.silu_mul(self.gate(h), self.up(h)))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, cached: Cached) -> Tensor:
        at, (num_q, num_k, _) = self.attention, self.heads
        heads = self.qkv(x).view(x.shape[0], -1, at.head_dim)
        if hasattr(at, "q_norm"):
            q, k, v = heads.split(self.heads, 1)
            q, k = layers.rotate(at.q_norm(q), cos, sin), layers.rotate(at.k_norm(k), cos, sin)
        else:
            v = heads[:, num_q + num_k :]
            q, k = layers.rotate(heads[:, : num_q + num_k], cos, sin).split(self.heads[:2], 1)
        return self.o(cached.attend(at.layer_idx, q, k, v, **self.options).flatten(1))


def _serves(policy: Policy) -> bool:
    """Whether all layers are native ones whose weights lie here as they are, and nothing waits for their calls."""
    model: Any = policy.backbone
    if type(model).__name__ not in MODELS or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    weights = [module.weight for module in _linears(model)]
    return all(type(layer).__name__ in DECODERS and _is_native(layer) for layer in model.layers) and (
        product.multiplies(*weights) and native.product_dtype(weights[0]) in product.SERVED
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
