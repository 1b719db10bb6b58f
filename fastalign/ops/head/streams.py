"""The scored rows of ``linear_divergence`` under two heads: logits in two reused workspaces, two-phase gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.backends.torch.token_logps import BLOCK_BYTES
from fastalign.ops.checks import stats_dtype
from fastalign.ops.divergence_shards import measure
from fastalign.ops.half import one_for_all, row_bound, times
from fastalign.ops.head.backward import slab_by_slab, slab_labels, write_rows
from fastalign.ops.head.head import Head, Leaves, Needs, hidden_rows, make_head, planned_columns, project, workspace
from fastalign.ops.head.options import Call as LinearCall
from fastalign.ops.head.plan import Plan, log, make_plan
from fastalign.ops.rows import Coefficients, pick


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
    plan = make_plan(
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
    log.debug("plan: %s", plan)
    return plan


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
    one = LinearCall(call.hidden, call.weight, None, call.bias, *rows, *ours, 0.0, call.dtype, call.dtype, *run)
    dtypes = call.ref_dtype, call.ref_dtype
    other = LinearCall(call.ref_hidden, call.ref_weight, None, call.ref_bias, *rows, *theirs, 0.0, *dtypes, *run)
    policy, ref = (make_head("linear_divergence", x, call.dtype, call.ref_dtype) for x in (one, other))
    return Streams(policy, ref, call.kind, call.mix)


def forward(
    streams: Streams, plan: Plan, directions: Tensor, tokens: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """value ``[n]``, stats ``[5, n]``; with a frozen head each row's direction ``[N, D]`` too.

    ``tokens``, ``[n]`` and ``[2, n]``, is filled with the label's log-prob under the policy, that under the reference
    and the policy's entropy.
    """
    head, shard, wanted = streams.policy, streams.policy.shard, tokens is not None
    new = {"dtype": streams.dtype, "device": head.hidden.device}
    value, stats = torch.empty(len(head.labels), **new), torch.empty(5, len(head.labels), **new)
    buffers = streams.buffers(plan.chunk_rows, head.weight.shape[0])
    for start, stop in plan.chunks:
        rows = slice(start, stop)
        pair, labels, scaling = streams.logits(buffers, rows), head.labels[rows], streams.scaling(rows)
        owners = None if head.owners is None else head.owners[rows]
        found = measure(head.sweep, shard, owners, *pair, labels, tokens=wanted, entropy=wanted, **scaling)
        value[rows], stats[:, rows] = found.value, found.stats
        if tokens is not None and found.logps is not None and found.entropy is not None:
            tokens[0][rows], tokens[1][0, rows], tokens[1][1, rows] = *found.logps, found.entropy
        if plan.mode == "frozen":
            part = stats[:, rows].contiguous()
            grad, _, alpha = scaled(streams, rows, part, torch.ones_like(value[rows]), None)
            dz = differentiate(streams, rows, pair, labels, part, grad, None)
            write_rows(head, directions, start, stop, dz, alpha)()
    return value, stats


def scaled(
    streams: Streams, rows: slice, stats: Tensor, grad: Tensor, row: Coefficients | None
) -> tuple[Tensor, Coefficients | None, Tensor | None]:
    """The rows' upstream gradients scaled for fp16, and the inverse factor for the products; see ``half``.

    No element of the divergence's ``dz`` exceeds ``2 K + 1``, with K the mean that it subtracts: ``p ln(p / pi)`` is at
    least ``-pi / e``, so that none of its sum K exceeds ``K + 1 / e``.
    """
    head = streams.policy
    if head.options.dtype != torch.float16:
        return grad, row, None
    tau = head.temperature[rows] if isinstance(head.temperature, Tensor) else head.temperature
    chain = head.options.logit_scale / tau
    bound = grad.abs() * (2 * stats[4].abs() + 1) * abs(chain)
    scale = one_for_all(bound if row is None else bound + row_bound(row, chain))
    return grad * scale, None if row is None else times(row, scale), scale.reciprocal()


def differentiate(
    streams: Streams,
    rows: slice,
    pair: tuple[Tensor, Tensor],
    labels: Tensor,
    stats: Tensor,
    grad: Tensor,
    row: Coefficients | None,
) -> Tensor:
    """Turns the policy's logits of some scored rows into their gradient, in place."""
    if pair[0].numel():
        streams.policy.sweep.backward(pair[0], *pair, labels, stats, grad, row, **streams.scaling(rows))
    return pair[0]


def recomputed_gradients(
    streams: Streams, plan: Plan, stats: Tensor, grad: Tensor, row: Coefficients | None, inputs: Leaves, needs: Needs
) -> Leaves:
    """The gradients of ``grad . value``, and of the coefficients of log-probs, in the policy's inputs."""
    head, buffers = streams.policy, streams.buffers(plan.block, plan.slab)
    grad, row, alpha = scaled(streams, slice(None), stats, grad, row)

    def make(hidden: Tensor, rows: slice, first: int, last: int) -> Tensor:
        pair, part = streams.logits(buffers, rows, first, last), None if row is None else pick(row, rows)
        labels = slab_labels(head, rows, first, last)
        return differentiate(streams, rows, pair, labels, stats[:, rows].contiguous(), grad[rows], part)

    return slab_by_slab(head, plan, make, alpha, inputs, needs)
