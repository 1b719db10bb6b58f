"""Packed attention by one ``scaled_dot_product_attention`` per segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.ops.attention import Call, Layout, expand_heads


def unavailable(device: str, dtype: torch.dtype, softcap: bool) -> str | None:
    """None: it serves every device and dtype."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    """One call per segment over `[1, H, L, d]` views.

    `split` gives all views one backward; slicing instead fills and adds a whole `[T, H, d]` gradient per call, which
    makes the backward 1.8 times slower (4 heads of 64, 28 calls over 3832 rows).
    """
    lengths = [call.length for call in plan.calls]
    wide = (q, expand_heads(q, k), expand_heads(q, v))
    qs, ks, vs = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in wide)
    one = causal if softcap is None else _softcapped
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


def causal(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    """One call: a square, or a rectangle whose last rows see everything."""
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
