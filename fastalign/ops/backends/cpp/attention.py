"""The native attention over a packed row behind tensors: one call for all segments and heads, forward or backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.attention import Layout, out_dtype
from fastalign.ops.backends import cpp
from fastalign.ops.checks import NARROW
from fastalign.ops.final import applied, final


def unavailable(device: str, dtype: torch.dtype, softcap: bool) -> str | None:
    """Why it cannot serve tensors of this device and dtype; None when it can."""
    if device != "cpu":
        return f"needs CPU tensors, got {device}"
    if dtype not in NARROW:
        return f"computes in fp32, got {str(dtype).removeprefix('torch.')}"
    return cpp.unavailable()


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    """Causal attention of the calls of a layout, in fp32 inside: what autocast would round beforehand stays exact.

    Args:
        q: ``[T, H, d]`` fp32, bf16 or fp16; so are ``k`` and ``v``, ``[T, K, d]``, each in a dtype of its own.
        plan: the `Layout`.
        scale: factor of the scores.
        softcap: None or the cap.

    Returns:
        ``[T, H, d]``, in autocast's dtype where it is on.
    """
    return applied(_Attend, *(_neighbours(x) for x in (q, k, v)), plan, scale, softcap or 0.0, out_dtype(q))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, softcap, dtype):
        out = q.new_empty(q.shape, dtype=dtype)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        _call(q, k, v, plan, scale, softcap, lse, out=_heads(out))
        ctx.save_for_backward(q, k, v, lse)
        ctx.options = plan, scale, softcap
        return out

    @staticmethod
    @final("packed_attention by cpp")
    def backward(ctx, *grads):
        q, k, v, lse = ctx.saved_tensors
        grad_out, grad_q = _neighbours(grads[0]), q.new_empty(q.shape)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (k, v))
        new = {"grad_out": _heads(grad_out), "grad_q": _heads(grad_q)}
        plan, scale, softcap = ctx.options
        _call(q, k, v, plan, scale, softcap, lse, **new, grad_k=grad_k.data_ptr(), grad_v=grad_v.data_ptr())
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _call(
    q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float, lse: Tensor, **more: Any
) -> None:
    if q.is_meta:  # only the memory is counted
        return
    from fastalign import _C

    calls, spans, trees = _tables(plan)
    _C.attention(
        q=_heads(q),
        k=_heads(k),
        v=_heads(v),
        lse=lse.data_ptr(),
        shape=(q.shape[1], k.shape[1], q.shape[2]),
        scale=scale,
        softcap=softcap,
        calls=calls.data_ptr(),
        num_calls=len(calls),
        spans=spans.data_ptr(),
        trees=trees.data_ptr(),
        num_trees=len(trees) - 1,
        threads=torch.get_num_threads(),
        **more,
    )


def _neighbours(x: Tensor) -> Tensor:
    """The numbers of one head beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), cpp.DTYPES[x.dtype], x.stride(0), x.stride(1)


def _tables(plan: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """int64 ``[C, 4]`` query start, stop and range of spans of each call; ``[n, 2]`` spans; ``[trees+1]`` offsets.

    Calls of one tree, which share keys, come one after the other, in the order of the layout.
    """
    if "cpp" not in plan.cache:
        tree: list[int] = []  # the first call of each call's tree
        for i, call in enumerate(plan.calls):
            tree.append(tree[call.prefix[0].call] if call.prefix else i)
        order = sorted(range(len(tree)), key=lambda i: (tree[i], i))
        calls, spans = [], []
        for i in order:
            call, first = plan.calls[i], len(spans)
            spans += [(span.start, span.stop) for span in (*call.prefix, call)]
            calls.append((call.start, call.stop, first, len(spans)))
        ends = [n for n in range(1, len(order)) if tree[order[n]] != tree[order[n - 1]]]
        whole = partial(torch.tensor, dtype=torch.int64)
        plan.cache["cpp"] = whole(calls), whole(spans), whole([0, *ends, len(order)])
    return plan.cache["cpp"]
