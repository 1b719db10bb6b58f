"""What a forward pass of a policy costs, in multiply-adds."""

from __future__ import annotations

from torch import nn

from fastalign.models.policy import Policy
from fastalign.types import ForwardCost


def forward_cost(policy: Policy, trained: bool = False) -> ForwardCost:
    """Multiply-adds per computed token, per query-key pair of all layers and heads, and per scored row.

    A token meets every weight of the backbone once, embeddings excepted, which are looked up; of a layer's experts it
    meets those that it is routed to. Norms, activations and rotations are not counted.

    With ``trained`` only weights that are trained count, and attention, whose backward has the same shape as theirs.
    """
    config = policy.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = [w for name, w in policy.head.named_parameters() if w.dim() > 1 and not name.startswith("original_module.")]
    return ForwardCost(
        per_token=sum(_weights(policy, trained)),
        per_attended=2 * config.num_hidden_layers * heads * size,  # scores and their product with the values
        per_scored=sum(w.numel() for w in head if w.requires_grad or not trained),
    )


def _weights(policy: Policy, trained: bool) -> list[float]:
    looked_up = {id(p) for m in policy.backbone.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    looked_up |= {id(p) for p in policy.head.parameters()}  # an adapter's wrapping may put it below the backbone
    met = [p for p in policy.backbone.named_parameters() if p[1].dim() > 1 and id(p[1]) not in looked_up]
    met = [(name, w) for name, w in met if ".original_module." not in name]  # a trained copy serves in its place
    return [_size(w) * _routed(policy, name) for name, w in met if w.requires_grad or not trained]


def _size(weight: nn.Parameter) -> int:
    """Elements of a weight; a 4-bit one stores two per byte."""
    packed = getattr(weight, "quant_state", None)
    return weight.numel() if packed is None else packed.shape.numel()


def _routed(policy: Policy, name: str) -> float:
    """The share of a weight that one token meets."""
    config = policy.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts and ".experts." in f".{name}" else 1.0
