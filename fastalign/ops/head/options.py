"""The options that the linear ops share, their checks, and the ``Call`` made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

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
    split_temperature,
    stats_dtype,
    unpack_lora,
)
from fastalign.ops.head.dtensor import vocabulary_slices, whole
from fastalign.ops.head.gemm import FEW_ROWS, INVARIANT_ROWS
from fastalign.ops.parallel import agree, checked_together, is_split
from fastalign.types import IGNORE_INDEX


@dataclass(frozen=True)
class Options:
    """The keyword arguments that the linear ops share.

    Attributes:
        bias: ``[V]``.
        lora: an adapter of the head, ``(A [r, D], B [V, r], scale)``: the logits gain ``scale * (hidden @ A.T) @ B.T``.
            It is cast to the GEMMs' dtype. A frozen weight costs no gradient beside a trained adapter.
        temperature: a positive number or ``[N]``; gets no gradient.
        softcap: ``cap * tanh(x / cap)`` between logit scale and temperature.
        logit_scale: factor of the logits.
        label_smoothing: eta; the log-prob becomes ``(1 - eta) logps + eta mean_v ln p_v`` over the whole vocabulary.
        process_group: the ranks that share the vocabulary: ``weight`` and ``bias`` are then this rank's columns, in
            rank order, shards may be uneven or empty (B is cut likewise, A whole); hidden, labels (global) and options
            are the same on every rank. Ranks whose options, sizes or labels differ all raise, and say in what.
            Outputs are the same bits everywhere, the gradient of ``hidden`` is complete on every rank. A DTensor weight
            (bias, B) placed ``Shard(0)`` over one dimension of its mesh brings its group; replicated DTensors count as
            their local tensors. Gradients are placed like their inputs.
        memory: bound on the workspace in bytes (chunk logits and temporaries, not outputs).
        backend: "torch", "cpp", "triton", "cuda" or None for the best one here.
        batch_invariant: a row's outputs have the same bits whatever the other rows are, and in every run (with equal
            threads, on the same hardware); slower GEMMs. Refused where that cannot be guaranteed: on CUDA without
            ``torch.use_deterministic_algorithms(True)``.
        logits: "float32" keeps the logits of bf16 or fp16 products in fp32, as they are summed, and adds a bias there:
            they are never rounded. None keeps them in the dtype of the products, in a third of the memory.
        num_scored: the number of labels that are not -100, if the host knows it: on CUDA the call then never waits for
            the device, and can be captured in a CUDA graph; but the ranks of a process group still tell each other
            their sizes. N when the rows are selected already.
    """

    bias: Tensor | None = None
    lora: Lora | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    process_group: dist.ProcessGroup | None = None
    memory: int | None = None
    backend: str | None = None
    batch_invariant: bool = False
    logits: Literal["float32"] | None = None
    num_scored: int | None = None


NAMES = frozenset(field.name for field in fields(Options))
Op = TypeVar("Op", bound=Callable[..., Any])


def with_options(op: Op) -> Op:
    """Shows the fields of ``Options`` in the signature of a public op, which takes them as ``**options``."""
    own = [x for x in signature(op).parameters.values() if x.kind is not Parameter.VAR_KEYWORD]
    ours = [Parameter(x.name, Parameter.KEYWORD_ONLY, default=x.default, annotation=x.type) for x in fields(Options)]
    op.__signature__ = signature(op).replace(parameters=[*own, *ours])  # pyright: ignore
    return op


class Call(NamedTuple):
    """The arguments of the linear ops, checked; the tensors come first, the differentiable ones before.

    Attributes:
        hidden: ``[N, D]``, with an adapter ``[N, D + r]``: beside each hidden state its image under the adapter's A.
        weight: ``[V, D]``; of a split vocabulary, this rank's columns.
        up: the adapter's B ``[V, r]``.
        bias: ``[V]``.
        labels: ``[N]``, over the columns of all ranks.
        temperatures, temperature: ``[N]``, or the number.
        dtype, logits_dtype: of the GEMMs' operands, and of the logits that they make.
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
    logits_dtype: torch.dtype
    memory: int | None
    backend: str | None
    batch_invariant: bool
    num_scored: int | None
    group: str | None
    shards: list[int] | None


TENSORS = 6
"""So many fields of a call are tensors, which autograd saves; the first four of them are differentiable."""

SCHEMA_TYPES = {
    **{"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "float | None": "float?", "bool": "bool"},
    **{"torch.dtype": "ScalarType", "int | None": "int?", "str | None": "str?", "list[int] | None": "int[]?"},
}
SCHEMA = ", ".join(f"{SCHEMA_TYPES[kind.__forward_arg__]} {name}" for name, kind in Call.__annotations__.items())
"""The fields of a call as operator schemas, which are flat, spell them; the number of scored rows may be symbolic."""
SCHEMA = SCHEMA.replace("int? num_scored", "SymInt? num_scored")


def make_call(
    op: str, hidden: Tensor, weight: Tensor, labels: Tensor, given: dict[str, Any], more: dict[str, Any]
) -> tuple[Call, bool]:
    """The checked call, and whether any rank trains the head.

    Args:
        given: the fields of ``Options`` as a caller of ``op`` gave them.
        more: what else ``op`` was given, for ranks to compare.

    Raises:
        TypeError: ``given`` holds what is none of the fields.
    """
    for name in given:
        if name not in NAMES:
            raise TypeError(f"{op}() got an unexpected keyword argument {name!r}")
    options = Options(**given)
    bias, tau, group = options.bias, options.temperature, options.process_group
    down, up, scale = (None, None, 1.0) if options.lora is None else unpack_lora(options.lora)
    if DTensor in [*map(type, (hidden, weight, labels, bias, tau, down, up))]:
        local = {"hidden": hidden, "labels": labels, "temperature": tau, "lora A": down}
        hidden, labels, tau, down = (whole(name, x) for name, x in local.items())
        slices = {"weight": weight, "lora B": up, "bias": bias}
        (weight, up, bias), group = vocabulary_slices(slices, group)  # pyright: ignore  # weight stays one
    checked, same = (hidden, weight, labels, bias, tau, down, up, options, group), {}
    if group is None:
        check(*checked)
    else:
        with checked_together(group, hidden):
            check(*checked)
            same = facts(op, hidden, weight, down, group, options.memory, options.backend)
    dtype, shards, trainable = gemm_dtype(hidden, weight), None, any(map(trained, (weight, up, bias)))
    number, rows = split_temperature(tau, hidden, stats_dtype(hidden, weight))
    if down is not None:
        scored = None if options.num_scored == len(labels) else labels != IGNORE_INDEX
        hidden = with_image(hidden, scored, down.to(dtype), scale, options.batch_invariant)
    if group is not None:
        same |= {"bias": "None" if bias is None else bias.dtype, "lora": None if down is None else (len(down), scale)}
        same |= {name: getattr(options, name) for name in SHARED} | {"temperature": tau, **more}
        group, shards, trainable = agree(group, weight, weight.shape[0], same, trainable, labels)
    scaling = (rows, number, options.softcap, float(options.logit_scale), float(options.label_smoothing))
    dtypes = (dtype, torch.float32 if options.logits and dtype.itemsize == 2 else dtype)
    run = (options.memory, options.backend, options.batch_invariant, options.num_scored, group, shards)
    return Call(hidden, weight, up, bias, labels, *scaling, *dtypes, *run), trainable


SHARED = ("softcap", "logit_scale", "label_smoothing", "memory", "backend", "batch_invariant", "logits", "num_scored")
"""Options that the ranks of a split vocabulary compare as they are."""


def check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    tau: float | Tensor,
    down: Tensor | None,
    up: Tensor | None,
    options: Options,
    group: dist.ProcessGroup | None,
) -> None:
    """Shapes, dtypes, devices and numbers are right."""
    check_linear(hidden, weight, bias, labels)
    check_scaling(tau, options.softcap, labels)
    if options.label_smoothing:
        check_smoothing(options.label_smoothing)
    if options.memory is not None:
        check_memory(options.memory)
    if options.num_scored is not None:
        check_num_scored(options.num_scored, labels)
    if options.batch_invariant:
        check_deterministic(hidden.device, group)
    if options.logits not in (None, "float32"):
        raise ValueError(f'logits must be "float32" or None, the dtype of the products; got {options.logits!r}')
    if down is not None and up is not None:
        check_lora(down, up, hidden, weight)


def trained(x: Tensor | None) -> bool:
    """Whether an input is there and gets a gradient."""
    return x is not None and x.requires_grad


def gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (fp64 excepted), else the narrower of the two; bf16 between the two halves."""
    device, one, other = hidden.device.type, hidden.dtype, weight.dtype
    if torch.is_autocast_enabled(device) and torch.float64 not in (one, other):
        return torch.get_autocast_dtype(device)
    if one != other and one.itemsize == other.itemsize:
        return torch.bfloat16
    return one if one.itemsize <= other.itemsize else other


def facts(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    down: Tensor | None,
    group: dist.ProcessGroup | None,
    memory: int | None,
    backend: str | None,
) -> dict[str, Any]:
    """What must be equal on the ranks of a split vocabulary beside options, because chunks and collectives follow it.

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
        "requires_grad of hidden or lora A": enabled and (hidden.requires_grad or trained(down)),
        "kernels": dispatch.choose(op, backend, device.type),
        "device memory (or memory in bytes)": total,
    }


def with_image(hidden: Tensor, scored: Tensor | None, down: Tensor, scale: float, batch_invariant: bool) -> Tensor:
    """``[h, scale * h @ A.T]`` per row: ordinary autograd carries its gradient on to A, and to the hidden states.

    Rows that are not scored are selected out: there a product with their zero gradient could still be NaN.
    """
    rows = (hidden if scored is None else hidden.where(scored[:, None], 0.0)).to(down.dtype)
    return torch.cat([hidden, image(rows, down, scale, batch_invariant).to(hidden.dtype)], 1)


def image(rows: Tensor, down: Tensor, scale: float, batch_invariant: bool) -> Tensor:
    """``scale * rows @ down.T``, rounded once; batch-invariant: in products where a row's place is no matter.

    Few rows are padded as the head's other products pad them.
    """
    if batch_invariant:
        tall, wide = (torch.nn.functional.pad(x, (0, 0, 0, -len(x) % INVARIANT_ROWS)) for x in (rows, down))
        images = [image(part, wide, scale, False) for part in tall.split(INVARIANT_ROWS)]
        return torch.cat(images)[: len(rows), : len(down)]
    if rows.dtype == torch.float32 and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        few = FEW_ROWS - len(rows)
        if 0 < few < FEW_ROWS:
            return image(torch.nn.functional.pad(rows, (0, 0, 0, few)), down, scale, False)[: len(rows)]
    return torch.addmm(rows.new_zeros(1), rows, down.t(), beta=0, alpha=scale)
