"""What the linear ops are called with: checked, and in the order of their custom ops' schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.checks import (
    Lora,
    check_deterministic,
    check_linear,
    check_lora,
    check_memory,
    check_num_scored,
    check_scaling,
    check_smoothing,
    unpack_lora,
)
from fastalign.ops.head.dtensor import vocabulary_slices, whole
from fastalign.ops.head.gemm import INVARIANT_ROWS
from fastalign.ops.head.head import Head, Options, gemm_dtype, make_head
from fastalign.ops.parallel import agree, checked_together, is_split, make_shard
from fastalign.ops.token_logps import split_temperature, stats_dtype
from fastalign.types import IGNORE_INDEX

SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? up, Tensor? bias, Tensor labels, Tensor? temperatures, float temperature, "
    "float? softcap, float logit_scale, float label_smoothing, ScalarType dtype, int? memory, str? backend, "
    "bool batch_invariant, SymInt? num_scored, str? group, int[]? shards"
)
"""The fields of ``Call`` as operator schemas, which are flat, spell them."""
TENSORS = 6
"""So many fields are tensors, which autograd saves; the first four of them are differentiable."""


class Call(NamedTuple):
    """The arguments that the linear ops share; the tensors come first.

    Attributes:
        hidden: ``[N, D]``, with an adapter ``[N, D + r]``: beside each hidden state its image under the adapter's A.
        weight: ``[V, D]``.
        up: the adapter's B ``[V, r]``.
        temperatures, temperature: ``[N]``, or the number.
        dtype: of the GEMMs.
        num_scored: how many labels are not -100, where the caller knows.
        group, shards: the process group's name and the columns of each of its ranks.
    """

    hidden: Tensor
    weight: Tensor
    up: Tensor | None
    bias: Tensor | None
    labels: Tensor
    temperatures: Tensor | None
    temperature: float
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    dtype: torch.dtype
    memory: int | None
    backend: str | None
    batch_invariant: bool
    num_scored: int | None
    group: str | None
    shards: list[int] | None


def make_call(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    more: dict[str, Any],
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
    memory: int | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
    num_scored: int | None = None,
) -> tuple[Call, bool]:
    """The checked call, and whether any rank trains the head; ``more``: options of ``op``, for ranks to compare."""
    down, up, scale = unpack_lora(lora)
    local = {"hidden": hidden, "labels": labels, "temperature": temperature, "lora A": down}
    hidden, labels, temperature, down = (whole(name, x) for name, x in local.items())
    slices = {"weight": weight, "lora B": up, "bias": bias}
    (weight, up, bias), process_group = vocabulary_slices(slices, process_group)  # pyright: ignore  # weight stays one
    with checked_together(process_group, hidden):
        check_linear(hidden, weight, bias, labels)
        check_scaling(temperature, softcap, labels)
        check_smoothing(label_smoothing)
        check_memory(memory)
        check_num_scored(num_scored, labels)
        if batch_invariant:
            check_deterministic(hidden.device, process_group)
        if down is not None and up is not None:
            check_lora(down, up, hidden, weight)
        same = facts(op, hidden, weight, down, process_group, memory, backend)
    trainable = any(x is not None and x.requires_grad for x in (weight, up, bias))
    number, rows = split_temperature(temperature, hidden, stats_dtype(hidden, weight))
    dtype = gemm_dtype(hidden, weight)
    same |= {"bias": "None" if bias is None else bias.dtype, "lora": None if down is None else (len(down), scale)}
    same |= {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    same |= {"label_smoothing": label_smoothing, "memory": memory, "backend": backend}
    same |= {"batch_invariant": batch_invariant, "num_scored": num_scored, **more}
    if down is not None:
        scored = None if num_scored == len(labels) else labels != IGNORE_INDEX
        hidden = _with_image(hidden, scored, down.to(dtype), scale, batch_invariant)
    group, shards, trainable = agree(process_group, weight, weight.shape[0], same, trainable, labels)
    scaling = (rows, number, softcap, float(logit_scale), float(label_smoothing), dtype)
    run = (memory, backend, batch_invariant, num_scored, group, shards)
    return Call(hidden, weight, up, bias, labels, *scaling, *run), trainable


def facts(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    down: Tensor | None,
    group: dist.ProcessGroup | None,
    memory: int | None,
    backend: str | None,
) -> dict[str, Any]:
    """What the ranks of a split vocabulary need in common beside options: it decides about chunks and collectives.

    Raises:
        ValueError: the backend does not serve ``op`` here.
    """
    if not is_split(group):
        return {}
    device, enabled = hidden.device, torch.is_grad_enabled()
    planned = device.type == "cuda" and memory is None
    total = torch.cuda.get_device_properties(device).total_memory if planned else 0
    return {
        "op": op,
        "number of rows of hidden": len(hidden),
        "number of columns of weight (D)": weight.shape[1],
        "dtypes of hidden and weight": f"{hidden.dtype} and {weight.dtype}, GEMMs in {gemm_dtype(hidden, weight)}",
        "grad mode": enabled,
        "requires_grad of hidden or lora A": enabled and (hidden.requires_grad or _trains(down)),
        "kernels": dispatch.choose(op, backend, device.type),
        "device memory (or memory in bytes)": total,
    }


def _trains(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _with_image(hidden: Tensor, scored: Tensor | None, down: Tensor, scale: float, batch_invariant: bool) -> Tensor:
    """``[h, scale * h @ A.T]`` per row: ordinary autograd carries its gradient on to A, and to the hidden states.

    Rows that are not scored are selected out: there a product with their zero gradient could still be NaN.
    """
    rows = (hidden if scored is None else hidden.where(scored[:, None], 0.0)).to(down.dtype)
    return torch.cat([hidden, _image(rows, down, scale, batch_invariant).to(hidden.dtype)], 1)


def _image(rows: Tensor, down: Tensor, scale: float, batch_invariant: bool) -> Tensor:
    """``scale * rows @ down.T``, rounded once; batch-invariant: in products where a row's place is no matter."""
    if batch_invariant:
        tall, wide = (torch.nn.functional.pad(x, (0, 0, 0, -len(x) % INVARIANT_ROWS)) for x in (rows, down))
        images = [_image(part, wide, scale, False) for part in tall.split(INVARIANT_ROWS)]
        return torch.cat(images)[: len(rows), : len(down)]
    return torch.addmm(rows.new_zeros(1), rows, down.t(), beta=0, alpha=scale)


def head_of(op: str, call: Call) -> Head:
    """The scored rows and their head, with the kernels that serve ``op`` there."""
    options = Options(
        call.temperature if call.temperatures is None else call.temperatures,
        *(call.softcap, call.logit_scale, call.dtype, call.memory, call.backend, call.batch_invariant),
        make_shard(call.group, call.shards),
        call.label_smoothing,
    )
    kernels = dispatch.kernels(op, call.backend, call.hidden.device, call.dtype)
    tensors = (call.hidden, call.weight, call.bias, call.labels)
    return make_head(*tensors, options, kernels, call.up, call.num_scored)
