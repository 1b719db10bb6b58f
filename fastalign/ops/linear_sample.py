"""Draws of tokens straight from hidden states: no ``[B, V]`` tensor outlives a chunk of rows.

    z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature,    then as in ``sample``

The logits come from the head's own product and the log-probs from the same sweep as training's: equal bits. Of a split
vocabulary each rank adds up its own columns; the rank on whose columns the draw falls answers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.checks import Lora, check_matrix
from fastalign.ops.head.head import (
    Head,
    Wanted,
    hidden_rows,
    join,
    make_head,
    plan_for,
    project,
    scaling_of,
    sweep,
    workspace,
)
from fastalign.ops.head.options import Call, make_call
from fastalign.ops.parallel import checked_together, localise
from fastalign.ops.sample import (
    Cut,
    check_drawable,
    check_sampling,
    draw,
    drawing_kernels,
    sample_stats,
    split_greedy,
    uniforms,
)
from fastalign.ops.sample import reference as sample_reference
from fastalign.ops.sample_shards import draw_together
from fastalign.types import SampleStats


@torch.no_grad()
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
    memory: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, SampleStats]:
    """``sample`` from hidden states and the head's weight, in chunks of rows.

    On a CPU ``logps`` has the bits of ``linear_logps`` and ``linear_loss`` for the same hidden states, tokens and
    temperature, whatever rows are around them, as far as the matrix library's products do not depend on the number of
    rows: the head pads the few rows for which they do.

    Args:
        hidden: ``[B, D]``.
        weight: ``[V, D]``.
        keys, positions, temperature, top_k, top_p, min_p: as of ``sample``.
        bias, lora, softcap, logit_scale, memory: as of ``linear_logps``; ``logit_scale`` must be positive.
        process_group: the ranks that share the vocabulary, as of ``linear_logps``. Tokens are those of one process
            unless the draw falls within rounding (about 1e-7) of the boundary of two columns. For truncation the ranks
            exchange each chunk's logits, in fp32 and beyond ``memory``; otherwise a few numbers per row.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        tokens ``[B]`` int64 and ``SampleStats``, the same on every rank.

    Raises:
        ValueError: as of ``sample`` and ``linear_logps``.

    >>> weight = torch.tensor([[0.0], [9.0]])
    >>> linear_sample(torch.ones(1, 1), weight, torch.tensor([0]), torch.tensor([0]), temperature=0)[0]
    tensor([1])
    """
    cut = Cut(top_k, top_p, min_p)
    with checked_together(process_group, hidden):
        check_matrix("hidden", hidden, "[B, D]")
        check_sampling(hidden, keys, positions, temperature, cut)
        if not logit_scale > 0:
            raise ValueError(f"logit_scale must be positive, got {logit_scale}")
    tau, greedy = split_greedy(temperature, hidden)
    more = {"truncation": tuple(cut), "greedy rows": greedy, "keys": keys, "positions": positions}
    given = {"bias": bias, "lora": lora, "softcap": softcap, "logit_scale": logit_scale, "memory": memory}
    given |= {"process_group": process_group, "backend": backend, "num_scored": len(hidden), "temperature": tau}
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    call, _ = make_call("linear_sample", hidden, weight, labels, given, more)
    return _draw(call, uniforms(keys, positions), greedy, cut)


def reference(
    hidden: Tensor,
    weight: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    **options: Any,
) -> tuple[Tensor, SampleStats]:
    """The specification: the logits in full and in float64, then the reference of ``sample``."""
    linear = torch.nn.functional.linear
    logits = linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if lora is not None:
        logits = logits + linear(linear(hidden.double(), lora[0].double()), lora[1].double()) * lora[2]
    return sample_reference(logits, keys, positions, **options)


def _draw(call: Call, noise: Tensor, greedy: bool | Tensor, cut: Cut) -> tuple[Tensor, SampleStats]:
    """Tokens and statistics of a call, whose labels are written chunk by chunk."""
    head, parts = make_head("linear_logps", call), []
    kernels = drawing_kernels("linear_sample", call.backend, call.hidden.device, call.dtype, cut)
    plan = plan_for(head, "none", trained=None, wanted=Wanted(True, False))
    buffer = workspace(head, plan.chunk_rows, len(head.weight))
    tokens, kept = torch.empty_like(noise, dtype=torch.int64), torch.ones_like(noise)
    for start, stop in plan.chunks:
        rows, logits = slice(start, stop), project(head, hidden_rows(head, start, stop), buffer)
        flags, scaling = greedy[rows] if isinstance(greedy, Tensor) else greedy, scaling_of(head, start, stop)
        if head.shard is None:
            tokens[rows], kept[rows] = draw(kernels, logits, noise[rows], flags, cut, **scaling)
        else:
            tokens[rows], kept[rows] = draw_together(head.shard, kernels, logits, noise[rows], flags, cut, **scaling)
        write_labels(head, rows, tokens[rows])
        parts.append(sweep(head, start, stop, logits, True))
    stats = join(head, parts, True)
    check_drawable(stats)
    return tokens, sample_stats(stats, kept, cut, head.out_dtype)


def write_labels(head: Head, rows: slice, tokens: Tensor) -> None:
    """The drawn tokens as the sweep's labels."""
    if head.shard is None or head.owners is None:
        head.labels[rows] = tokens
    else:
        head.labels[rows], head.owners[rows] = localise(head.shard, tokens)
