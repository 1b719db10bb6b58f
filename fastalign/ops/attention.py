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

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops import _cpp_attention
from fastalign.ops._checks import NARROW, check_kinds
from fastalign.types import Segments

log = logging.getLogger(__name__)


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
    k, v = _expand_heads(q, k), _expand_heads(q, v)
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
        softcap: scores become `softcap * tanh(scores / softcap)`; `sdpa` (slower) and `flash` know it.
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
    dtype = _out_dtype(q)
    name = backend or choose_backend(q.device.type, dtype, softcap is not None)
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; known: {', '.join(BACKENDS)}")
    if reason := unavailable(name, q.device.type, dtype, softcap is not None):
        raise ValueError(f"attention backend {name!r} cannot serve this call: {reason}")
    if plan.num_tokens == 0:
        return q * 1.0
    if name != "cpp":  # which widens inside
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return BACKENDS[name](q, k, v, plan, _scale(q, scale), softcap)


def _out_dtype(q: Tensor) -> torch.dtype:
    device = q.device.type
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


def _expand_heads(q: Tensor, x: Tensor) -> Tensor:
    """Key or value heads repeated to one per query head: the fast CPU kernel takes no grouped heads with a mask."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


# ---------------------------------------------------------------- which backend


def unavailable(name: str, device: str, dtype: torch.dtype, softcap: bool = False) -> str | None:
    """Why a backend cannot serve tensors of this device and dtype; None when it can."""
    if name == "sdpa":
        return None
    if name == "cpp":
        return _cpp_unavailable(device, dtype, softcap)
    if device != "cuda":
        return f"needs CUDA tensors, got {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if name == "varlen":
        return _varlen_unavailable(softcap)
    return _flash_unavailable(softcap)


def _cpp_unavailable(device: str, dtype: torch.dtype, softcap: bool) -> str | None:
    if device != "cpu":
        return f"needs CPU tensors, got {device}"
    if dtype not in NARROW:
        return f"computes in fp32, got {str(dtype).removeprefix('torch.')}"
    return "the native attention has no softcap" if softcap else _cpp_attention.unavailable()


def _varlen_unavailable(softcap: bool) -> str | None:
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn (it came with 2.10)"
    return "varlen_attn has no softcap" if softcap else None


def _flash_unavailable(softcap: bool) -> str | None:
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    # before 2.1 its causal masks were aligned top-left, which is silently wrong for a response after its prefix
    found, needed = version("flash-attn"), (2, 6) if softcap else (2, 1)
    release = tuple(int(part) for part in found.split(".")[:2])
    return None if release >= needed else f"flash-attn >= {needed[0]}.{needed[1]} is needed, {found} is installed"


@lru_cache(maxsize=32)
def choose_backend(device: str, dtype: torch.dtype, softcap: bool = False) -> str:
    """The best backend for these tensors, logged with the reasons against the ones before it."""
    reasons = []
    for name in ("flash", "varlen", "cpp", "sdpa"):
        reason = unavailable(name, device, dtype, softcap)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    log.info("attention: %s%s", name, f" ({'; '.join(reasons)})" if reasons else "")
    return name


# ---------------------------------------------------------------- sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    """One call per segment over `[1, H, L, d]` views.

    `split` gives all views one backward; slicing instead fills and adds a whole `[T, H, d]` gradient per call, which
    makes the backward 1.8 times slower (4 heads of 64, 28 calls over 3832 rows).
    """
    lengths = [call.length for call in plan.calls]
    wide = (q, _expand_heads(q, k), _expand_heads(q, v))
    qs, ks, vs = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in wide)
    one = _causal if softcap is None else _softcapped
    outs = []
    for i, call in enumerate(plan.calls):
        keys, values = (_with_prefix(x, i, call, plan) for x in (ks, vs))
        outs.append(one(qs[i], keys, values, plan, scale, softcap))
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _with_prefix(pieces: Sequence[Tensor], i: int, call: Call, plan: Layout) -> Tensor:
    """Rows `[1, H, P + R, d]` that call i sees."""
    if not call.prefix:
        return pieces[i]
    firsts = (plan.calls[span.call].start for span in call.prefix)
    spans = zip(call.prefix, firsts, strict=True)
    return torch.cat([*(pieces[s.call][:, :, s.start - at : s.stop - at] for s, at in spans), pieces[i]], dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    # PyTorch aligns `is_causal` at the top left, which on a rectangle is silently wrong
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    mask = _corner_mask(q.shape[2], k.shape[2], plan, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    assert softcap is not None
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    mask = _corner_mask(q.shape[2], k.shape[2], plan, q.device)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=wide).to(v.dtype) @ v


def _corner_mask(num_queries: int, num_keys: int, plan: Layout, device: torch.device) -> Tensor:
    """`[R, P + R]` bool: causal, aligned at the lower right; shared by the layers of one batch."""
    key = (num_queries, num_keys, device)
    if key not in plan.cache:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        plan.cache[key] = ones.tril(num_keys - num_queries)
    return plan.cache[key]


# ---------------------------------------------------------------- cpp


def _native(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    """All calls at once; it widens inside, so what autocast would round beforehand stays exact."""
    return _cpp_attention.attend(q, k, v, plan, scale, _out_dtype(q))


# ---------------------------------------------------------------- one call over gathered keys (CUDA)


def _gathered(k: Tensor, v: Tensor, plan: Layout) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, int, int]]:
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


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters  # grew from 2.10 to 2.13
    if "scale" not in accepted:
        q, scale = q * (scale * q.shape[-1] ** 0.5), q.shape[-1] ** -0.5
    if "enable_gqa" not in accepted:
        k, v = _expand_heads(q, k), _expand_heads(q, v)
    options: dict[str, Any] = {
        "window_size": (-1, 0),  # causal
        "scale": scale,
        "enable_gqa": k.shape[1] != q.shape[1],
        "num_splits": 1,  # a row's result does not depend on the other rows of the batch
    }
    options = {name: value for name, value in options.items() if name in accepted}
    if "window_size" not in accepted:
        options["is_causal"] = True
    k, v, offsets = _gathered(k, v, plan)
    out = varlen_attn(q, k, v, *offsets, **options)
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    options = {} if softcap is None else {"softcap": softcap}
    k, v, offsets = _gathered(k, v, plan)
    return flash_attn_varlen_func(q, k, v, *offsets, softmax_scale=scale, causal=True, deterministic=True, **options)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, float, float | None], Tensor]] = {
    "sdpa": _sdpa,
    "cpp": _native,
    "varlen": _varlen,
    "flash": _flash,
}
