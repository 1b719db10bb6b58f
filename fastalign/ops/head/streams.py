"""The scored rows of ``linear_divergence`` under two heads: logits in two reused workspaces, two-phase gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.backends.torch.token_logps import BLOCK_BYTES
from fastalign.ops.checks import stats_dtype
from fastalign.ops.divergence_shards import measure
from fastalign.ops.half import one_for_all
from fastalign.ops.head.backward import write_rows
from fastalign.ops.head.gemm import add_product
from fastalign.ops.head.head import Head, hidden_rows, kernel_dtype, make_head, planned_columns, project, workspace
from fastalign.ops.head.options import Call as LinearCall
from fastalign.ops.head.plan import Plan, make_plan
from fastalign.ops.parallel import begin_sum
from fastalign.ops.token_logps import ELSEWHERE


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

    def logits(
        self, buffers: tuple[Tensor, Tensor], rows: slice, first: int = 0, last: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both logits of some rows and columns, in the buffers."""
        ours, theirs = (hidden_rows(head, rows.start, rows.stop) for head in (self.policy, self.ref))
        return project(self.policy, ours, buffers[0], first, last), project(self.ref, theirs, buffers[1], first, last)


def plan_for(streams: Streams, memory: int | None, coefficients: Any, trainable: bool) -> Plan:
    """That of ``linear_logps`` for half of the memory: there are two workspaces."""
    policy, ref = streams.policy, streams.ref
    device = policy.hidden.device
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return make_plan(
        len(policy.labels),
        planned_columns(policy),
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
    heads, columns = (streams.policy, streams.ref), planned_columns(streams.policy)
    casts = sum(columns * head.cast * head.options.dtype.itemsize for head in heads)
    if streams.policy.sweep.__name__ != "fastalign.ops.backends.torch.divergence":
        return casts
    row, device = columns * streams.dtype.itemsize, streams.policy.hidden.device.type
    block = max(row, BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"]))
    return casts + 8 * min(block, row * len(streams.policy.labels))


class Call(NamedTuple):
    """The arguments that both custom ops begin with, in the order of their schemas."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    labels: Tensor | None
    temperatures: Tensor | None
    temperature: float
    kind: str
    mix: float
    softcap: float | None
    ref_softcap: float | None
    logit_scale: float
    ref_logit_scale: float
    dtype: torch.dtype
    ref_dtype: torch.dtype
    memory: int | None
    backend: str | None
    group: str | None
    shards: list[int] | None


def make_streams(call: Call) -> Streams:
    """Both heads with their scored rows."""
    labels, ours, theirs = call.labels, (call.softcap, call.logit_scale), (call.ref_softcap, call.ref_logit_scale)
    if labels is None:
        labels = torch.zeros(call.hidden.shape[0], dtype=torch.int64, device=call.hidden.device)
    rows = labels, call.temperatures, call.temperature
    run = None, call.backend, False, None, call.group, call.shards
    one = LinearCall(call.hidden, call.weight, None, call.bias, *rows, *ours, 0.0, call.dtype, *run)
    other = LinearCall(call.ref_hidden, call.ref_weight, None, call.ref_bias, *rows, *theirs, 0.0, call.ref_dtype, *run)
    policy, ref = make_head("linear_divergence", one), make_head("linear_divergence", other)
    return Streams(policy, ref, call.kind, call.mix)


def forward(streams: Streams, plan: Plan, directions: Tensor) -> tuple[Tensor, Tensor]:
    """value ``[n]``, stats ``[5, n]``; with a frozen head each row's direction ``[N, D]`` too, while it is hot."""
    head, shard = streams.policy, streams.policy.shard
    new = {"dtype": streams.dtype, "device": head.hidden.device}
    value, stats = torch.empty(len(head.labels), **new), torch.empty(5, len(head.labels), **new)
    buffers = streams.buffers(plan.chunk_rows, head.weight.shape[0])
    for start, stop in plan.chunks:
        rows = slice(start, stop)
        pair, labels, scaling = streams.logits(buffers, rows), head.labels[rows], streams.scaling(rows)
        value[rows], stats[:, rows], *_ = measure(head.sweep, shard, None, *pair, labels, **scaling)
        if plan.mode == "frozen":
            part = stats[:, rows].contiguous()
            grad, alpha = scaled(streams, rows, part, torch.ones_like(value[rows]))
            dz = differentiate(streams, rows, pair, labels, part, grad)
            write_rows(head, directions, start, stop, dz, alpha)()
    return value, stats


def scaled(streams: Streams, rows: slice, stats: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The upstream of some rows as their products want it, and the factor that the products need; see ``half``.

    No element of ``dz`` exceeds ``2 K + 1``, with K the mean that it subtracts: ``p ln(p / pi)`` is at least
    ``-pi / e``, so that none of its sum K exceeds ``K + 1 / e``.
    """
    head = streams.policy
    if head.options.dtype != torch.float16:
        return grad, None
    tau = head.temperature[rows] if isinstance(head.temperature, Tensor) else head.temperature
    scale = one_for_all(grad.abs() * (2 * stats[4].abs() + 1) * abs(head.options.logit_scale / tau))
    return grad * scale, scale.reciprocal()


def differentiate(
    streams: Streams, rows: slice, pair: tuple[Tensor, Tensor], labels: Tensor, stats: Tensor, grad: Tensor
) -> Tensor:
    """Turns the policy's logits of some scored rows into their gradient, in place."""
    if pair[0].numel():
        streams.policy.sweep.backward(pair[0], *pair, labels, stats, grad, **streams.scaling(rows))
    return pair[0]


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
    """Adds both logits' slabs, made again and differentiated in place, into the gradients.

    Of a shard ``d_hidden`` is a partial sum: the ranks add it up while the last slab's other products are made.
    """
    head, buffers = streams.policy, streams.buffers(plan.block, plan.slab)
    grad, alpha = scaled(streams, slice(None), stats, grad)
    wide, vocab, num_rows, work = kernel_dtype(head.options.dtype), head.weight.shape[0], len(head.labels), None
    for first, last in _spans(vocab if num_rows else 0, plan.slab):
        slab_sum = None if d_weight is None else grad.new_empty(last - first, head.weight.shape[1], dtype=wide)
        for start, stop in _spans(num_rows, plan.block):
            rows, labels = slice(start, stop), _slab_labels(head, start, stop, first, last)
            pair = streams.logits(buffers, rows, first, last)
            dz = differentiate(streams, rows, pair, labels, stats[:, rows].contiguous(), grad[rows])
            if d_hidden is not None:
                add_product(d_hidden[rows], dz, head.weight[first:last], first=False, alpha=alpha)
            if (last, stop) == (vocab, num_rows):
                work = _begin_sum(head, d_hidden)
            if slab_sum is not None:
                add_product(slab_sum, dz.t(), hidden_rows(head, start, stop), first=start == 0, alpha=alpha)
            if d_bias is not None:
                total = dz.sum(0, dtype=wide)
                d_bias[first:last] += total if alpha is None else total * alpha
        if d_weight is not None and slab_sum is not None:
            d_weight[first:last] = slab_sum
    work = work if vocab else _begin_sum(head, d_hidden)
    if work is not None:
        work.wait()


def _slab_labels(head: Head, start: int, stop: int, first: int, last: int) -> Tensor:
    """Labels of some rows as a slab's kernel reads them: an invalid one stays invalid, any other is of no account."""
    labels = head.labels[start:stop]
    wrong = (labels >= head.weight.shape[0]) | (labels < ELSEWHERE)
    return torch.where(wrong, last - first, ELSEWHERE)


def _begin_sum(head: Head, d_hidden: Tensor | None) -> torch.distributed.Work | None:
    """The exchange of ``d_hidden``, under way; None when there is nothing to exchange."""
    shard = head.shard
    return None if shard is None or d_hidden is None or not len(d_hidden) else begin_sum(shard, d_hidden)


def _spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(total, start + step)) for start in range(0, total, step))
