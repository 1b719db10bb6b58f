"""The native layers between the products of a transformer behind tensors, on a CPU: each one pass over its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp.product import multiplies, product
from fastalign.ops.final import applied, final

SERVED = (torch.float32, torch.bfloat16, torch.float16)


def serves(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors of a dtype that is computed in fp32, outside of a trace.

    Tensors of the meta device pass too: of them all is made but the numbers, so that memory can be counted.
    """
    plain = all(x.device.type in DEVICES and x.dtype in SERVED and type(x) in PLAIN for x in tensors)
    return plain and not torch.compiler.is_compiling()


DEVICES = ("cpu", "meta")
PLAIN = (Tensor, torch.nn.Parameter)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in fp32.

    Args:
        x: ``[..., D]`` fp32, bf16 or fp16.
        weight: ``[D]``, of such a dtype too.
        eps: added to the mean square.
        dtype: of the result.
    """
    return applied(_RmsNorm, x.contiguous(), weight, eps, dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of two ``[..., D]`` tensors of one dtype, rounded once."""
    return applied(_SiluMul, gate.contiguous(), up.contiguous())


def silu_mul_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``(silu(gate) * up) @ weight.T``; the product of gate and up is not kept but recomputed in backward.

    Args:
        gate, up: ``[..., K]`` of one dtype.
        weight: ``[N, K]`` of that dtype.
    """
    return applied(_SiluMulLinear, gate.contiguous(), up.contiguous(), weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of heads: columns j and j + d/2 are turned by the angle of their row.

    Args:
        x: ``[T, H, d]``, d even.
        cos, sin: ``[T, d]`` of one dtype; they get no gradient.

    Returns:
        ``[T, H, d]`` in the wider of both dtypes.
    """
    return applied(_Rotate, x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype))
        x = x if x.stride(-1) == 1 else x.contiguous()
        _turn(x, y, cos, sin, adjoint=False)
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @final("the native rotate")
    def backward(ctx, *grads):
        y = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        x = y.new_empty(y.shape, dtype=ctx.dtype)
        _turn(x, y, *ctx.saved_tensors, adjoint=True)
        return x, None, None


def _turn(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, *, adjoint: bool) -> None:
    if x.is_meta:
        return
    from fastalign import _C

    both = {"x": _heads(x), "y": _heads(y), "cos": _rows(cos), "sin": _rows(sin)}
    _C.rotate(**both, shape=tuple(x.shape), adjoint=adjoint, threads=torch.get_num_threads())


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), cpp.DTYPES[x.dtype], x.stride(0), x.stride(1)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        y = x.new_empty(x.shape, dtype=dtype)
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        _norm(x, weight, inverse, eps, y=_rows(y))
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    @final("the native rms_norm")
    def backward(ctx, *grads):
        x, weight, inverse = ctx.saved_tensors
        grad_y, grad_x = grads[0].contiguous(), torch.empty_like(x)
        grad_weight = x.new_empty(weight.shape, dtype=torch.float32)
        new = {"grad_y": _rows(grad_y), "grad_x": _rows(grad_x), "grad_weight": grad_weight.data_ptr()}
        _norm(x, weight, inverse, ctx.eps, **new)
        return grad_x, grad_weight.to(weight.dtype), None, None


def _norm(x: Tensor, weight: Tensor, inverse: Tensor, eps: float, **more: Any) -> None:
    if x.is_meta:
        return
    from fastalign import _C

    weight = weight.detach().contiguous()
    given = {"x": _rows(x), "weight": _rows(weight), "inverse": inverse.data_ptr(), "eps": eps}
    _C.rms_norm(**given, **more, rows=inverse.numel(), columns=x.shape[-1], threads=torch.get_num_threads())


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        y = torch.empty_like(gate)
        _silu(gate, up, y=_rows(y))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @final("the native silu_mul")
    def backward(ctx, *grads):
        gate, up = ctx.saved_tensors
        grad_y, grad_gate, grad_up = grads[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _silu(gate, up, grad_y=_rows(grad_y), grad_gate=_rows(grad_gate), grad_up=_rows(grad_up))
        return grad_gate, grad_up


class _SiluMulLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight):
        y = torch.empty_like(gate)
        _silu(gate, up, y=_rows(y))
        ctx.save_for_backward(gate, up, weight)
        if not multiplies(y, weight):
            return torch.nn.functional.linear(y, weight)
        return product(y.flatten(0, -2), weight.t()).view(*y.shape[:-1], len(weight))

    @staticmethod
    @final("the native silu_mul_linear")
    def backward(ctx, *grads):
        gate, up, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        multiplied = product if multiplies(grad, weight) else torch.mm
        y = multiplied(grad, weight)  # its gradient, until it is overwritten
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _silu(gate, up, y=_rows(y), grad_y=_rows(y), grad_gate=_rows(grad_gate), grad_up=_rows(grad_up))
        return grad_gate, grad_up, multiplied(grad.t(), y) if ctx.needs_input_grad[2] else None


def _silu(gate: Tensor, up: Tensor, **more: Any) -> None:
    if gate.is_meta:
        return
    from fastalign import _C

    size = {"rows": gate.numel() // max(gate.shape[-1], 1), "columns": gate.shape[-1]}
    _C.silu_mul(gate=_rows(gate), up=_rows(up), **more, **size, threads=torch.get_num_threads())


def _rows(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), cpp.DTYPES[x.dtype], x.shape[-1]
