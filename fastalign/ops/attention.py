"""Attention over a packed row: segments without padding, a shared prefix computed once for all that continue it.

A token sees its own segment up to itself, and the whole chain of prefixes of its segment:

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in prefixes(segment(i)) or j <= i in segment(i)

Letters: T packed tokens, H query heads, K key/value heads, d head size, S segments. A `Layout` turns the segments into
calls once per batch; every layer then runs the same calls. A response that directly follows its prompt is fused with
it, so `[P | R1]` is one ordinary causal call, and each later response is one call over its prefix and itself.

Backends: `sdpa` (one call of PyTorch's attention per segment, anywhere), `cpp` (native, all segments in one call, CPU),
`varlen` (torch's own variable-length kernel, CUDA, half precision), `flash` (the flash-attn package, CUDA, half
precision).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.checks import check_kinds
from fastalign.types import Segments


@dataclass(frozen=True)
class Span:
    """Rows `start:stop` of a prefix segment, which lie inside the call of index `call`."""

    start: int
    stop: int
    call: int


@dataclass(frozen=True)
class Call:
    """One causal attention call: queries `start:stop`, keys the prefix spans followed by the same rows."""

    start: int
    stop: int
    prefix: tuple[Span, ...]

    @property
    def length(self) -> int:
        """Number of queries."""
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        """Number of keys: the prefix and the call's own rows."""
        return self.length + sum(span.stop - span.start for span in self.prefix)


@dataclass(frozen=True)
class Layout:
    """The calls of a packed row, in row order; they cover its T rows exactly once.

    Attributes:
        calls: the causal calls.
        num_tokens: T.
        longest: tokens of the longest chain of segments, the length of the longest logical sequence.
        cache: tensors that backends derive from the layout; filled at first use, shared by the layers.
    """

    calls: tuple[Call, ...]
    num_tokens: int
    longest: int
    cache: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)


def layout(segments: Segments) -> Layout:
    """The calls that a packed row needs; a segment that directly follows its parent continues the parent's call.

    Raises:
        ValueError: when offsets do not start at 0 or decrease, or a parent does not precede its child.

    >>> [(c.start, c.stop, [(p.start, p.stop) for p in c.prefix])
    ...  for c in layout(Segments([0, 3, 5, 9], [-1, 0, 0])).calls]
    [(0, 5, []), (5, 9, [(0, 3)])]
    """
    offsets, parents = list(segments.offsets), list(segments.parents)
    _check_segments(offsets, parents)
    calls: list[Call] = []
    chains: list[tuple[Span, ...]] = []  # per segment: what its children see, empty segments left out
    longest = 0
    for s, parent in enumerate(parents):
        start, stop = offsets[s], offsets[s + 1]
        chain = chains[parent] if parent >= 0 else ()
        if stop > start:
            if chain and chain[-1].stop == start:
                calls[-1] = replace(calls[-1], stop=stop)
            else:
                calls.append(Call(start, stop, chain))
            chain = (*chain, Span(start, stop, len(calls) - 1))
        chains.append(chain)
        longest = max(longest, sum(span.stop - span.start for span in chain))
    return Layout(tuple(calls), offsets[-1], longest)


def _check_segments(offsets: list[int], parents: list[int]) -> None:
    if len(offsets) != len(parents) + 1 or offsets[0] != 0:
        raise ValueError(
            f"segments need one offset more than parents, starting at 0: got offsets {offsets[:4]}... "
            f"({len(offsets)}) for {len(parents)} parents"
        )
    for s, parent in enumerate(parents):
        if offsets[s + 1] < offsets[s] or not -1 <= parent < s:
            raise ValueError(
                f"segment {s} spans {offsets[s]}:{offsets[s + 1]} with parent {parent}; "
                "offsets must not decrease and a parent must precede its child"
            )


def reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """`packed_attention` by its definition, with a dense `[T, T]` mask; float64 in, float64 out."""
    k, v = expand_heads(q, k), expand_heads(q, v)
    scores = torch.einsum("ihd,jhd->hij", q, k) * _scale(q, scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~dense_mask(segments).to(q.device), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def dense_mask(segments: Segments) -> Tensor:
    """`[T, T]` bool, true where a row sees a column. For the reference and for tests: the engine never builds it."""
    offsets, parents = segments.offsets, segments.parents
    mask = torch.zeros(offsets[-1], offsets[-1], dtype=torch.bool)
    for s in range(len(parents)):
        rows = slice(offsets[s], offsets[s + 1])
        mask[rows, rows] = torch.ones(offsets[s + 1] - offsets[s], offsets[s + 1] - offsets[s]).tril().bool()
        ancestor = parents[s]
        while ancestor >= 0:
            mask[rows, offsets[ancestor] : offsets[ancestor + 1]] = True
            ancestor = parents[ancestor]
    return mask


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | Layout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention in which every segment sees itself and its chain of prefixes, and nothing else.

    Args:
        q: `[T, H, d]` queries; fp64, fp32, bf16 or fp16.
        k: `[T, K, d]` keys, fp64 where q is, otherwise of any other of these dtypes; K divides H, query head h reads
            key head h // (H / K).
        v: `[T, K, d]` values, likewise.
        segments: the segments of the row, or their `layout`, which many layers can share.
        scale: factor of the scores; default `d ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`; all but `varlen` know it, `sdpa` is slower then.
        backend: `sdpa`, `cpp`, `varlen`, `flash` or None for the best one here.

    Returns:
        `[T, H, d]` in the dtype of q (the autocast dtype under autocast, which leaves fp64 alone).

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, or a backend that cannot serve these tensors.

    >>> q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    >>> packed_attention(q, k, v, Segments([0, 3, 5, 9], [-1, 0, 0])).shape
    torch.Size([9, 4, 8])
    """
    plan = segments if isinstance(segments, Layout) else layout(segments)
    _check_shapes(q, k, v, plan)
    check_kinds(q, k, v)
    dtype = out_dtype(q)
    name = dispatch.choose_attention(backend, q.device.type, dtype, softcap is not None)
    if plan.num_tokens == 0:
        return q * 1.0
    if name != "cpp":  # which widens inside
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return dispatch.attention(name).attend(q, k, v, plan, _scale(q, scale), softcap)


def out_dtype(q: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (fp64 excepted), else that of the queries."""
    device = "cpu" if q.is_meta else q.device.type  # the meta device knows no autocast
    cast = torch.is_autocast_enabled(device) and q.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else q.dtype


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, plan: Layout) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"expected q [T, H, d] and k, v [T, K, d]; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != plan.num_tokens or k.shape[0] != plan.num_tokens:
        raise ValueError(f"the segments cover {plan.num_tokens} rows; q has {q.shape[0]} and k {k.shape[0]}")
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads of size {q.shape[2]} cannot share keys of shape {tuple(k.shape)}")


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def expand_heads(q: Tensor, x: Tensor) -> Tensor:
    """Key or value heads repeated to one per query head: the fast CPU kernel takes no grouped heads with a mask."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def needs_half_on_cuda(device: str, dtype: torch.dtype) -> str | None:
    """Why a backend that serves half precision on CUDA cannot serve these; None when it can."""
    if device != "cuda":
        return f"needs CUDA tensors, got {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    return None


def gathered(k: Tensor, v: Tensor, plan: Layout) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, int, int]]:
    """Keys and values call by call, and `cu_q, cu_k, max_q, max_k`.

    `torch.cat` rather than `index_select`: its backward sums in a fixed order, without atomics.
    """
    if any(call.prefix for call in plan.calls):
        rows = [(span.start, span.stop) for call in plan.calls for span in (*call.prefix, call)]
        k, v = (torch.cat([x[start:stop] for start, stop in rows]) for x in (k, v))
    key = ("offsets", k.device)
    if key not in plan.cache:
        lengths = [call.length for call in plan.calls], [call.num_keys for call in plan.calls]
        offsets = [torch.tensor([0, *x]).cumsum(0).int().to(k.device, non_blocking=True) for x in lengths]
        plan.cache[key] = (*offsets, max(lengths[0]), max(lengths[1]))
    return k, v, plan.cache[key]
