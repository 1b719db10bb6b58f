"""The LM head as the linear ops see it: scored rows, GEMM precision, a reused workspace, statistics, coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops.backends.torch.token_logps import BLOCK_BYTES
from fastalign.ops.checks import kernel_labels
from fastalign.ops.half import one_for_all, row_bound, times
from fastalign.ops.parallel import Shard, Statistics, combine, localise, nothing
from fastalign.ops.rows import Coefficients, coefficients, smoothed
from fastalign.ops.token_logps import stats_dtype
from fastalign.types import IGNORE_INDEX


class Leaves(NamedTuple):
    """The differentiable inputs of a head, or their gradients: None for what is not there or not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    up: Tensor | None
    bias: Tensor | None


class Needs(NamedTuple):
    """Which of the differentiable inputs get a gradient."""

    hidden: bool
    weight: bool
    up: bool
    bias: bool


class Wanted(NamedTuple):
    """Which statistics are wanted beside the log-prob."""

    entropy: bool
    lse: bool


@dataclass(frozen=True)
class Options:
    """How logits become z, and where they are computed; the arguments shared by the linear ops."""

    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype
    memory: int | None
    backend: str | None
    batch_invariant: bool
    shard: Shard | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Head:
    """A call's n scored rows and its head, cast to the GEMM dtype.

    Attributes:
        hidden: ``[N, D]`` as given, with an adapter ``[N, D + r]``.
        rows: ``[n]`` positions of the scored rows; None when all N are scored.
        labels: ``[n]``; of a shard, counted from its first column, -1 for those of other shards.
        weight, bias: ``[V, D]`` and ``[V]`` in the GEMM dtype; of a shard, its columns.
        up: ``[V, r]``, the matrix that the last r columns of hidden meet, in the GEMM dtype.
        cast: columns of weight and up together that had another dtype.
        temperature: a number or ``[n]``.
        sweep: the module with the kernels ``forward`` and ``backward``.
        weight_dtype: that of the weight as given, and of its gradient.
        out_dtype: of log-probs and loss: fp64 if an input is fp64, else fp32.
        owners: ``[n]`` the rank that owns each label, None when the vocabulary is whole.
    """

    hidden: Tensor
    rows: Tensor | None
    labels: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float | Tensor
    options: Options
    sweep: ModuleType
    weight_dtype: torch.dtype
    out_dtype: torch.dtype
    owners: Tensor | None = None
    up: Tensor | None = None
    cast: int = 0

    @property
    def width(self) -> int:
        """Columns of hidden."""
        return self.hidden.shape[1]

    @property
    def vocab(self) -> int:
        """Columns of all ranks."""
        return self.weight.shape[0] if self.options.shard is None else self.options.shard.vocab


@dataclass(frozen=True)
class Stats:
    """What one sweep knows of n rows; entropy and total are None when they were not asked for.

    ``top1`` is 1 where the label is the first of the largest z over the vocabulary of all ranks, else 0; None in a
    backward, which does not read it.
    """

    logps: Tensor
    entropy: Tensor | None
    max: Tensor
    logsum: Tensor
    total: Tensor | None = None
    top1: Tensor | None = None

    @property
    def is_top1(self) -> Tensor:
        """``top1`` as bool."""
        assert self.top1 is not None
        return self.top1 != 0


def gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (fp64 excepted), else the narrower of the two; bf16 between the two halves."""
    device = hidden.device.type
    if torch.float64 not in (hidden.dtype, weight.dtype) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype and hidden.dtype.itemsize == weight.dtype.itemsize:
        return torch.bfloat16
    return min(hidden.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)


def make_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: Options,
    sweep: ModuleType,
    up: Tensor | None = None,
    num_scored: int | None = None,
) -> Head:
    """Selects the scored rows (on CUDA one host sync for their number, unless it is given) and casts the head once."""
    shard, owners = options.shard, None
    labels = kernel_labels(labels, weight.shape[0] if shard is None else shard.vocab)
    rows = scored_rows(labels, num_scored)
    temperature = options.temperature
    if rows is not None:
        labels = labels[rows]
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    if shard is not None:
        labels, owners = localise(shard, labels)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(kernel_dtype(options.dtype))
    out, cast = (
        stats_dtype(hidden, weight),
        sum(x.shape[1] for x in (weight, up) if x is not None and x.dtype != options.dtype),
    )
    matrix, bias, up = (None if x is None else x.detach().to(options.dtype) for x in (weight, bias, up))
    assert matrix is not None
    head = Head(hidden.detach(), rows, labels, matrix, bias, temperature, options, sweep, weight.dtype, out, owners)
    return replace(head, up=up, cast=cast)


def scored_rows(labels: Tensor, num_scored: int | None) -> Tensor | None:
    """Positions of the labels that are not -100, None for all of them; no sync when their number is given.

    Raises:
        ValueError: it is another one. Where only the device knows, on CUDA, a device-side assertion.
    """
    scored = labels != IGNORE_INDEX
    if num_scored is None:
        return None if bool(scored.all()) else scored.nonzero().squeeze(1)
    right = scored.sum() == num_scored
    if labels.device.type != "cpu":
        torch.ops.aten._assert_async.msg(right, f"num_scored is {num_scored}, but not so many labels differ from -100")
    elif not right:
        raise ValueError(f"num_scored is {num_scored}, but {int(scored.sum())} labels are not {IGNORE_INDEX}")
    if num_scored == len(labels):
        return None
    return torch.nonzero_static(scored, size=num_scored).squeeze(1)


def planned_columns(head: Head) -> int:
    """Columns that every rank plans with: V, or those of the largest shard."""
    return head.weight.shape[0] if head.options.shard is None else head.options.shard.widest


def select(head: Head, keep: Tensor) -> Head:
    """The head with only the scored rows ``keep``, ``[k]`` ascending positions among the n."""
    tau = head.temperature
    return replace(
        head,
        rows=keep if head.rows is None else head.rows[keep],
        labels=head.labels[keep],
        temperature=tau[keep] if isinstance(tau, Tensor) else tau,
        owners=None if head.owners is None else head.owners[keep],
    )


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the statistics of logits in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scratch_bytes(head: Head) -> int:
    """What does not depend on the rows of a chunk: the cast weight, the widened hidden, the torch sweep's blocks."""
    options, columns = head.options, planned_columns(head)
    cast = columns * head.cast * options.dtype.itemsize + (0 if head.up is None else head.hidden.nbytes)
    if head.sweep.__name__ != "fastalign.ops.backends.torch.token_logps":
        return cast
    row = columns * kernel_dtype(options.dtype).itemsize
    block = max(row, BLOCK_BYTES.get(head.hidden.device.type, BLOCK_BYTES["cuda"]))
    return cast + 5 * min(block, row * head.hidden.shape[0])


def hidden_rows(head: Head, start: int, stop: int) -> Tensor:
    """``[n, D]`` hidden states of scored rows, in the GEMM dtype; the others are not read."""
    picked = head.hidden[start:stop] if head.rows is None else head.hidden.index_select(0, head.rows[start:stop])
    return picked.to(head.options.dtype)


def workspace(head: Head, rows: int, columns: int) -> Tensor:
    """Flat room for ``rows * columns`` logits, used again for every tile."""
    return torch.empty(rows * columns, dtype=head.options.dtype, device=head.hidden.device)


def sweep(head: Head, start: int, stop: int, logits: Tensor, entropy: bool) -> Stats:
    """Statistics of the scored rows ``start:stop`` from their logits, over the vocabulary of all ranks."""
    labels, shard, total = head.labels[start:stop], head.options.shard, head.options.label_smoothing != 0
    found: Statistics
    if logits.shape[1]:
        wanted = {"entropy": entropy, "total": total, "top1": True}
        found = head.sweep.forward(logits, labels, **wanted, **_scaling(head, start, stop))
    else:
        found = nothing(labels, kernel_dtype(logits.dtype), entropy, total, True)
    if shard is None or head.owners is None:
        return Stats(*found)
    return Stats(*combine(shard, head.owners[start:stop], *found))


def differentiate(
    head: Head, start: int, stop: int, logits: Tensor, labels: Tensor, stats: Stats, row: Coefficients
) -> Tensor:
    """Turns logits of the scored rows ``start:stop`` into their gradient, in place."""
    if logits.numel():
        head.sweep.backward(logits, logits, labels, stats.max, stats.logsum, row, **_scaling(head, start, stop))
    return logits


def scaled(head: Head, start: int, stop: int, row: Coefficients) -> tuple[Coefficients, Tensor | None]:
    """Coefficients of the rows ``start:stop`` as their products want them, and the factor that the products need.

    In fp16 a power of two and its inverse; else the coefficients as they are, and None.
    """
    if head.options.dtype != torch.float16:
        return row, None
    scaling = _scaling(head, start, stop)
    scale = one_for_all(row_bound(row, scaling["logit_scale"] / scaling["temperature"]))
    return times(row, scale), scale.reciprocal()


def row_coefficients(head: Head, stats: Stats, upstream: Mapping[str, Tensor | None]) -> Coefficients:
    """What gradients ``[n]`` of logps, entropy and lse ask of the rows' logits, as the kernels read it."""
    wide = {name: x.to(stats.max.dtype).contiguous() for name, x in upstream.items() if x is not None}
    g = wide["logps"] if "logps" in wide else torch.zeros_like(stats.max)
    grads = {"grad_entropy": wide.get("entropy"), "grad_lse": wide.get("lse")}
    return coefficients(
        g, entropy=stats.entropy, **grads, label_smoothing=head.options.label_smoothing, vocab=head.vocab
    )


def reported(head: Head, stats: Stats, wanted: Wanted) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logps, entropy and lse as losses see them: the log-probs smoothed when that is asked for."""
    logps, lse = stats.logps, stats.max + stats.logsum if wanted.lse else None
    if stats.total is not None:
        logps = smoothed(logps, stats.logsum, stats.total, head.options.label_smoothing, head.vocab)
    return logps, stats.entropy, lse


def _scaling(head: Head, start: int, stop: int) -> dict:
    tau = head.temperature
    return {
        "temperature": tau[start:stop] if isinstance(tau, Tensor) else tau,
        "softcap": head.options.softcap,
        "logit_scale": head.options.logit_scale,
    }


def cut(stats: Stats, rows: slice | Tensor) -> Stats:
    """The statistics of some rows."""
    return _stats(None if x is None else x[rows] for x in vars(stats).values())


def join(head: Head, parts: list[Stats], entropy: bool) -> Stats:
    """The statistics of consecutive chunks as one."""
    if not parts:
        new = {"dtype": kernel_dtype(head.options.dtype), "device": head.hidden.device}
        wanted = (True, entropy, True, True, head.options.label_smoothing != 0, True)
        return _stats(torch.empty(0, **new) if asked else None for asked in wanted)
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return _stats(None if column[0] is None else torch.cat(column) for column in columns)


def _stats(columns: Iterable[Any]) -> Stats:
    return Stats(*columns)


def spread(head: Head, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, ...]`` over scored rows to ``[N, ...]``, zero elsewhere."""
    if head.rows is None:
        return values.to(dtype)
    out = torch.zeros(head.hidden.shape[0], *values.shape[1:], dtype=dtype, device=values.device)
    return out.index_copy_(0, head.rows, values.to(dtype))
