"""The layers of a Llama-like transformer for a new token of each row, in one native call on packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp.forest_decode import described
from fastalign.ops.backends.cpp.product import Packed
from fastalign.ops.forest_decode import Forest, Step, check_step

NONE = (0, 0, 0)


class Norm(NamedTuple):
    """``weight * x / rms(x)``."""

    weight: Tensor
    eps: float


class Linear:
    """Some linear layers of one input as one product in ``dtype``, in which its result is too."""

    def __init__(self, dtype: torch.dtype, *linears: Any) -> None:
        self.packed = Packed(torch.cat([x.weight.detach().to(dtype) for x in linears]))
        biases = [x.bias for x in linears]
        self.bias = None if biases[0] is None else torch.cat([x.detach() for x in biases])

    def described(self) -> tuple[Any, ...]:
        """As the binding takes it."""
        return self.packed.address, NONE if self.bias is None else _row(self.bias), *self.packed.shape


@dataclass(frozen=True)
class Layer:
    """``x += attention(norm(x)); x += mlp(norm(x))``.

    Attributes:
        norms: before the attention, before the MLP, and of the heads of q and k, where there are any.
        linears: q, k and v as one, o, gate, up, down.
        dtype: in which the products multiply.
        angle: the dtype of the rotation's cos and sin.
    """

    norms: Sequence[Norm]
    linears: Sequence[Linear]
    dtype: torch.dtype
    angle: torch.dtype

    def described(self) -> Any:
        """The native description, which is to live no longer than this layer."""
        from fastalign import _C

        kinds = [self.dtype, *(x.weight.dtype for x in self.norms[2:3])]
        normed = torch.promote_types(kinds[0], kinds[-1])
        dtypes = [cpp.DTYPES[x] for x in (self.dtype, normed, torch.promote_types(normed, self.angle))]
        norms = [(_row(x.weight), x.eps) for x in self.norms] + [(NONE, 0.0)] * (4 - len(self.norms))
        return _C.DecodeLayer(norms=norms, linears=[x.described() for x in self.linears], dtypes=dtypes)


def decode_layers(
    layers: Sequence[Any], x: Tensor, cos: Tensor, sin: Tensor, forest: Forest, step: Step, heads: int, scale: float
) -> None:
    """Take the hidden states of the rows of a step through all layers, in place; the bits are those of the modules.

    Args:
        layers: of each its description.
        x: ``[T, D]`` hidden states behind the embedding; the first rows are the step's, others are left alone.
        cos, sin: ``[T, d]`` the angles of the rotation.
        forest: the keys and values before; the new ones are written.
        step: of the forest.
        heads: of the queries.
        scale: factor of the scores.
    """
    from fastalign import _C

    check_step(forest, step)
    _C.decode_layers(
        layers=layers,
        x=_rows(x),
        cos=_rows(cos),
        sin=_rows(sin),
        rows=len(step.rows),
        columns=x.shape[1],
        keys=[keys.data_ptr() for keys in forest.keys],
        values=[values.data_ptr() for values in forest.values],
        dtype=cpp.DTYPES[forest.dtype],
        shape=(heads, forest.key_heads, forest.head_size),
        scale=scale,
        **described(step),
    )


def _rows(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), cpp.DTYPES[x.dtype], x.stride(0)


def _row(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), cpp.DTYPES[x.dtype], 0
