"""The scored rows of ``linear_divergence`` under two heads: logits in two reused workspaces, two-phase gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops._head import Head, Options, add_product, hidden_rows, kernel_dtype, make_head, project, workspace
from fastalign.ops.plan import Plan, make_plan
from fastalign.ops.token_logps import BLOCK_BYTES, stats_dtype


@dataclass(frozen=True)
class Streams:
    """The scored rows under both heads, and which divergence is wanted."""

    policy: Head
    ref: Head
    kind: str
    mix: float

    def scaling(self, rows: slice) -> dict:
        """The kernels' keyword arguments for some of the rows."""
        tau, ours, theirs = self.policy.temperature, self.policy.options, self.ref.options
        return {
            **{"kind": self.kind, "mix": self.mix, "temperature": tau[rows] if isinstance(tau, Tensor) else tau},
            **{"softcap": ours.softcap, "logit_scale": ours.logit_scale},
            **{"ref_softcap": theirs.softcap, "ref_logit_scale": theirs.logit_scale},
        }

    @property
    def dtype(self) -> torch.dtype:
        """That of the statistics."""
        return stats_dtype(self.policy.weight, self.ref.weight)

    def buffers(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Room for a tile of both logits."""
        return workspace(self.policy, rows, columns), workspace(self.ref, rows, columns)

    def logits(self, buffers: tuple[Tensor, Tensor], rows: slice, first: int = 0, last: int | None = None):
        """Both logits of some rows and columns, in the buffers."""
        heads = zip((self.policy, self.ref), buffers, strict=True)
        return [project(head, hidden_rows(head, rows.start, rows.stop), room, first, last) for head, room in heads]


def plan_for(streams: Streams, memory: int | None, coefficients: Any, trainable: bool) -> Plan:
    """That of ``linear_logps`` for half of the memory: there are two workspaces."""
    policy, ref = streams.policy, streams.ref
    device = policy.hidden.device
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return make_plan(
        len(policy.labels),
        policy.weight.shape[0],
        max(policy.weight.shape[1], ref.weight.shape[1]),
        itemsize=max(policy.options.dtype.itemsize, ref.options.dtype.itemsize),
        coefficients=coefficients,
        head_gradient=trainable,
        memory=None if memory is None else max(1, memory // 2),
        device=device.type,
        total_memory=total,
        scratch=_scratch_bytes(streams) // 2,
    )


def _scratch_bytes(streams: Streams) -> int:
    """Cast weights, and the temporaries of the torch sweep: about eight of one block each."""
    heads = (streams.policy, streams.ref)
    casts = sum(head.weight.nbytes for head in heads if head.weight_dtype != head.options.dtype)
    if streams.policy.sweep.__name__ != "fastalign.ops.divergence":
        return casts
    row, device = streams.policy.weight.shape[0] * streams.dtype.itemsize, streams.policy.hidden.device.type
    block = max(row, BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"]))
    return casts + 8 * min(block, row * len(streams.policy.labels))


def make_streams(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, tau, kind, mix, scaling, backend
) -> Streams:
    softcap, ref_softcap, logit_scale, ref_logit_scale, dtype, ref_dtype = scaling
    kernels = dispatch.kernels("linear_divergence", backend, hidden.device)
    if labels is None:
        labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    ours = Options(tau, softcap, logit_scale, dtype, None, backend, False)
    theirs = Options(tau, ref_softcap, ref_logit_scale, ref_dtype, None, backend, False)
    policy = make_head(hidden, weight, bias, labels, ours, kernels)
    return Streams(policy, make_head(ref_hidden, ref_weight, ref_bias, labels, theirs, kernels), kind, mix)


def forward(streams: Streams, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """value ``[n]``, stats ``[5, n]``; with a frozen head each row's direction ``[n, D]``, while its logits are hot."""
    head, width = streams.policy, streams.policy.weight.shape[1]
    new = {"dtype": streams.dtype, "device": head.hidden.device}
    value, stats = torch.empty(len(head.labels), **new), torch.empty(5, len(head.labels), **new)
    kept = len(head.labels) if plan.mode == "frozen" else 0
    directions = torch.empty(kept, width, dtype=head.options.dtype, device=head.hidden.device)
    buffers = streams.buffers(plan.chunk_rows, head.weight.shape[0])
    for start, stop in plan.chunks:
        rows = slice(start, stop)
        pair, labels, scaling = streams.logits(buffers, rows), head.labels[rows], streams.scaling(rows)
        value[rows], stats[:, rows] = head.sweep.forward(*pair, labels, **scaling)
        if plan.mode == "frozen":
            ones = torch.ones_like(value[rows])
            head.sweep.backward(pair[0], *pair, labels, stats[:, rows].contiguous(), ones, **scaling)
            torch.mm(pair[0], head.weight, out=directions[rows])
    return value, stats, directions


def accumulators(streams: Streams, needs_hidden: bool, needs_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Zeros for the sums over slabs ``[n, D]`` and over rows ``[V]``, in the statistics' dtype."""
    (vocab, width), head = streams.policy.weight.shape, streams.policy
    new = {"dtype": kernel_dtype(head.options.dtype), "device": head.hidden.device}
    d_hidden = torch.zeros(len(head.labels), width, **new) if needs_hidden else None
    return d_hidden, torch.zeros(vocab, **new) if needs_bias else None


def recompute(
    streams: Streams,
    plan: Plan,
    stats: Tensor,
    grad: Tensor,
    d_hidden: Tensor | None,
    d_bias: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Adds both logits' slabs, made again and differentiated in place, into the gradients."""
    head, buffers = streams.policy, streams.buffers(plan.block, plan.slab)
    wide = kernel_dtype(head.options.dtype)
    for first, last in _spans(head.weight.shape[0] if len(head.labels) else 0, plan.slab):
        slab_sum = None if d_weight is None else grad.new_empty(last - first, head.weight.shape[1], dtype=wide)
        for start, stop in _spans(len(head.labels), plan.block):
            rows = slice(start, stop)
            pair = streams.logits(buffers, rows, first, last)
            part, scaling = stats[:, rows].contiguous(), streams.scaling(rows)
            head.sweep.backward(pair[0], *pair, head.labels[rows], part, grad[rows], **scaling)
            if d_hidden is not None:
                add_product(d_hidden[rows], pair[0], head.weight[first:last], first=False)
            if slab_sum is not None:
                add_product(slab_sum, pair[0].t(), hidden_rows(head, start, stop), first=start == 0)
            if d_bias is not None:
                d_bias[first:last] += pair[0].sum(0, dtype=wide)
        if d_weight is not None and slab_sum is not None:
            d_weight[first:last] = slab_sum


def _spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(total, start + step)) for start in range(0, total, step))
