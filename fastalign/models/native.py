"""A Hugging Face model's layers by the native CPU kernels, where those serve; anywhere else the layers' own code runs.

Only the class of a module changes: its parameters, their names and the model's file format stay.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from fastalign.ops import _cpp_layers, _onednn

NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}
"""``weight * x / rms(x)``, read by linear layers or, of bf16 heads, by the rotation."""
GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}
"""``down(act(gate(x)) * up(x))``."""
SILU = {"SiLU", "SiLUActivation"}


def use_native_layers(model: nn.Module) -> None:
    """Let the known layers of a model run natively on a CPU."""
    native = _cpp_layers.unavailable() is None
    for module in model.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.__class__ = Linear
        elif native and kind.__name__ in NORMS and kind.__module__.startswith("transformers."):
            module.__class__ = _native(Norm, kind)
        elif native and kind.__name__ in GATED and kind.__module__.startswith("transformers."):
            module.__class__ = _native(GatedMlp, kind)


@cache
def _native(ours: type, theirs: type) -> type:
    """Their class with our forward before its own."""
    return type(theirs.__name__, (ours, theirs), {"__module__": __name__})


class Linear(nn.Linear):
    """A linear layer whose fp32 products are oneDNN's where MKL is slow."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        if torch.compiler.is_compiling() or not _onednn.serves(input, self.weight):
            return super().forward(input)
        return _onednn.linear(input, self.weight, self.bias)


class Norm(nn.Module):
    """RMS norm in one pass. Under autocast the residual stream is rounded here, once for all products that read it."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        if not _cpp_layers.serves(hidden_states, self.weight):
            return super().forward(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        if torch.is_autocast_enabled("cpu") and hidden_states.dtype == torch.float32:
            dtype = torch.get_autocast_dtype("cpu")
        return _cpp_layers.rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype)


class GatedMlp(nn.Module):
    """The gate's activation and the product with it in one pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        if type(self.act_fn).__name__ not in SILU or torch.compiler.is_compiling():
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype == up.dtype and _cpp_layers.serves(gate, up):
            return self.down_proj(_cpp_layers.silu_mul(gate, up))
        return self.down_proj(self.act_fn(gate) * up)
