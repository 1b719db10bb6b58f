"""The native draws of ``sample`` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.sample import Cut


def draw(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    cut: Cut,
) -> tuple[Tensor, Tensor]:
    """As of the torch backend, in two reads of the logits."""
    from fastalign import _C

    tokens = torch.empty(len(logits), dtype=torch.int64)
    cpp.check(logits, tokens)
    kept, noise = torch.empty(len(logits), dtype=torch.float64), noise.contiguous()
    rows, _alive = cpp.describe(logits, tokens, temperature, softcap, logit_scale, {})
    _C.sample(
        rows=rows,
        noise=noise.data_ptr(),
        tokens=tokens.data_ptr(),
        kept=kept.data_ptr(),
        **cut._asdict(),
        threads=torch.get_num_threads(),
    )
    return tokens, kept
