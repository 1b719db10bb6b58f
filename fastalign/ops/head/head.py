"""The LM head as the linear ops see it: scored rows, GEMM precision, a reused workspace, statistics, coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.backends.torch.token_logps import BLOCK_BYTES
from fastalign.ops.checks import in_vocabulary, kernel_labels, stats_dtype
from fastalign.ops.half import one_for_all, row_bound, times
from fastalign.ops.head.gemm import INVARIANT_ROWS, add_product, multiply, padded
from fastalign.ops.head.options import Call
from fastalign.ops.head.plan import UPCAST_ROWS, Plan, cached_plan, log
from fastalign.ops.head.plan import Coefficients as Known
from fastalign.ops.parallel import Shard, combine, localise, make_shard, nothing
from fastalign.ops.rows import Coefficients, Stats, coefficients, smoothed
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


class Head(NamedTuple):
    """A call's n scored rows and its head, cast to the GEMM dtype.

    Attributes:
        hidden: ``[N, D]`` as given, with an adapter ``[N, D + r]``.
        rows: ``[n]`` positions of the scored rows; None when all N are scored.
        labels: ``[n]``; of a shard, counted from its first column, -1 for those of other shards.
        weight, bias: ``[V, D]`` and ``[V]`` in the GEMM dtype; of a shard, its columns.
        up: ``[V, r]``, the matrix that the last r columns of hidden meet, in the GEMM dtype.
        cast: columns of weight and up together that had another dtype.
        parts: weight and adapter, each with the columns of hidden that it multiplies; logits are the sum of products.
        temperature: a number or ``[n]``.
        options: the call's.
        sweep: the module with the kernels ``forward`` and ``backward``.
        shard: this rank's place in a split vocabulary, None when it is whole.
        out_dtype: of log-probs and loss: fp64 if an input is fp64, else fp32.
        owners: ``[n]`` the rank that owns each label, None when the vocabulary is whole.
    """

    hidden: Tensor
    rows: Tensor | None
    labels: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float | Tensor
    options: Call
    sweep: ModuleType
    out_dtype: torch.dtype
    shard: Shard | None = None
    owners: Tensor | None = None
    up: Tensor | None = None
    cast: int = 0
    parts: tuple[tuple[Tensor, slice], ...] = ()

    @property
    def width(self) -> int:
        """Columns of hidden."""
        return self.hidden.shape[1]

    @property
    def vocab(self) -> int:
        """Columns of all ranks."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab


def make_head(op: str, call: Call, *dtypes: torch.dtype) -> Head:
    """Select the scored rows (one host sync on CUDA unless ``num_scored`` is given) and cast the head once.

    ``dtypes``: of all logits that the kernels read, where they read others beside this call's.
    """
    sweep = dispatch.kernels(op, call.backend, call.hidden.device, *(dtypes or (call.dtype,)))
    shard, owners = None if call.group is None else make_shard(call.group, call.shards), None
    labels, rows = select_rows(call.labels, call.weight.shape[0] if shard is None else shard.vocab, call.num_scored)
    tau = call.temperature if call.temperatures is None else call.temperatures.to(kernel_dtype(call.dtype))
    if rows is not None:
        labels, tau = labels[rows], tau[rows] if isinstance(tau, Tensor) else tau
    if shard is not None:
        labels, owners = localise(shard, labels)
    cast, matrices = 0, []
    for x in (call.weight, call.bias, call.up):
        cast += x.shape[1] if x is not None and x.dim() == 2 and x.dtype != call.dtype else 0
        matrices.append(None if x is None else in_dtype(x.detach(), call.dtype))
    hidden, out, (weight, bias, up) = call.hidden.detach(), stats_dtype(call.hidden, call.weight), matrices
    width = weight.shape[1]
    parts = ((weight, slice(0, width)), *(() if up is None else ((up, slice(width, None)),)))
    return Head(hidden, rows, labels, weight, bias, tau, call, sweep, out, shard, owners, up, cast, parts)


def select_rows(labels: Tensor, vocab: int, num_scored: int | None) -> tuple[Tensor, Tensor | None]:
    """All labels as the kernels read them, and the positions of those that are not -100, None for all of them.

    Raises:
        ValueError: as `kernel_labels` and `scored_rows`.
    """
    if labels.device.type == "cpu" and num_scored in (None, labels.shape[0]) and in_vocabulary(labels, vocab):
        return labels, None
    labels = kernel_labels(labels, vocab)
    return labels, scored_rows(labels, num_scored)


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
    if num_scored == labels.shape[0]:
        return None
    return torch.nonzero_static(scored, size=num_scored).squeeze(1)


def planned_columns(head: Head) -> int:
    """Columns that every rank plans with: V, or those of the largest shard."""
    return head.weight.shape[0] if head.shard is None else head.shard.widest


def select(head: Head, keep: Tensor) -> Head:
    """The head with only the scored rows ``keep``, ``[k]`` ascending positions among the n."""
    tau = head.temperature
    return head._replace(
        rows=keep if head.rows is None else head.rows[keep],
        labels=head.labels[keep],
        temperature=tau[keep] if isinstance(tau, Tensor) else tau,
        owners=None if head.owners is None else head.owners[keep],
    )


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which in a small call mostly has nothing to do and costs more than this question."""
    return x if x.dtype == dtype else x.to(dtype)


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the statistics of logits in ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def held_in(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a gradient for an upstream of 1 is kept until backward multiplies it by the real one."""
    return torch.float32 if dtype == torch.float16 else dtype


def scratch_bytes(head: Head) -> int:
    """Workspace that no chunk's rows add to: cast weight, hidden with adapter columns, blocks of the sweep."""
    options, columns = head.options, planned_columns(head)
    cast = columns * head.cast * options.dtype.itemsize + (0 if head.up is None else head.hidden.nbytes)
    if options.logits_dtype != options.dtype:
        cast += 4 * UPCAST_ROWS * head.width
    if head.sweep.__name__ != "fastalign.ops.backends.torch.token_logps":
        return cast
    row = columns * kernel_dtype(options.dtype).itemsize
    block = max(row, BLOCK_BYTES.get(head.hidden.device.type, BLOCK_BYTES["cuda"]))
    return cast + 5 * min(block, row * head.hidden.shape[0])


def plan_for(
    head: Head, coefficients: Known, *, trained: int | None, wanted: Wanted, units: tuple[int, ...] | None = None
) -> Plan:
    """The plan of a call on this head, of which ``trained`` columns get a gradient; None: nothing of it does."""
    device, options = head.hidden.device, head.options
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    logit_bytes, itemsize = options.logits_dtype.itemsize, options.dtype.itemsize
    if logit_bytes != itemsize:  # a gradient in another dtype cannot take the logit's place
        logit_bytes += itemsize
    plan = cached_plan(
        head.labels.shape[0],
        planned_columns(head),
        head.hidden.shape[1],
        itemsize=itemsize,
        logit_bytes=logit_bytes,
        coefficients=coefficients,
        units=units,
        head_gradient=trained is not None,
        trained=trained,
        entropy=wanted.entropy or wanted.lse,
        memory=options.memory,
        device=device.type,
        total_memory=total,
        scratch=scratch_bytes(head),
        batch_invariant=options.batch_invariant,
    )
    log.debug("plan: %s", plan)
    return plan


def trained_columns(inputs: Leaves, needs: Needs) -> int | None:
    """Columns of weight and adapter that get a gradient; None when the head gets none at all."""
    if not (needs.weight or needs.up or needs.bias):
        return None
    width = 0 if inputs.weight is None or not needs.weight else inputs.weight.shape[1]
    return width + (0 if inputs.up is None or not needs.up else inputs.up.shape[1])


def rows_of(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start:stop``; in a small call they are mostly all, and a view costs more than this question."""
    return x if start == 0 and stop == x.shape[0] else x[start:stop]


def hidden_rows(head: Head, start: int, stop: int) -> Tensor:
    """``[n, D]`` hidden states of scored rows, in the GEMM dtype; the others are not read."""
    picked = (
        rows_of(head.hidden, start, stop)
        if head.rows is None
        else head.hidden.index_select(0, rows_of(head.rows, start, stop))
    )
    return in_dtype(picked, head.options.dtype)


def workspace(head: Head, rows: int, columns: int) -> Tensor:
    """Flat memory for ``rows * columns`` logits, reused for every tile."""
    return torch.empty(rows * columns, dtype=head.options.logits_dtype, device=head.hidden.device)


def sweep(head: Head, start: int, stop: int, logits: Tensor, entropy: bool) -> Stats:
    """Statistics of the scored rows ``start:stop`` from their logits, over all ranks' columns; top1 as bool."""
    labels, shard, total = rows_of(head.labels, start, stop), head.shard, head.options.label_smoothing != 0
    if logits.shape[1]:
        wanted = {"entropy": entropy, "total": total, "top1": True}
        found = Stats(*head.sweep.forward(logits, labels, **wanted, **scaling_of(head, start, stop)))
    else:
        found = nothing(labels, kernel_dtype(logits.dtype), entropy, total, True)
    if shard is not None and head.owners is not None:
        found = combine(shard, head.owners[start:stop], *found)
    logps, h, maximum, logsum, total, top1 = found
    return Stats(logps, h, maximum, logsum, total, top1 != 0)  # pyright: ignore  # it was asked for


def differentiate(
    head: Head, start: int, stop: int, logits: Tensor, labels: Tensor, stats: Stats, row: Coefficients
) -> Tensor:
    """From logits of the scored rows ``start:stop`` to their gradient, as the GEMMs take it: in place where it fits."""
    out = logits if logits.dtype == head.options.dtype else torch.empty_like(logits, dtype=head.options.dtype)
    if logits.numel():
        head.sweep.backward(out, logits, labels, stats.max, stats.logsum, row, **scaling_of(head, start, stop))
    return out


def scaled(head: Head, start: int, stop: int, row: Coefficients) -> tuple[Coefficients, Tensor | None]:
    """The rows' coefficients scaled so that fp16 gradients do not underflow, and the inverse factor for the products.

    In other dtypes the coefficients as they are, and None.
    """
    if head.options.dtype != torch.float16:
        return row, None
    scaling = scaling_of(head, start, stop)
    scale = one_for_all(row_bound(row, scaling["logit_scale"] / scaling["temperature"]))
    return times(row, scale), scale.reciprocal()


def row_coefficients(head: Head, stats: Stats, upstream: Mapping[str, Tensor | None]) -> Coefficients:
    """Coefficients of the rows from the gradients ``[n]`` of logps, entropy and lse, as the kernels read them."""
    g, dtype = upstream.get("logps"), stats.max.dtype
    g = torch.zeros_like(stats.max) if g is None else in_dtype(g, dtype).contiguous()
    if upstream.get("entropy") is None and upstream.get("lse") is None and not head.options.label_smoothing:
        return Coefficients(g)
    wide = {name: x.to(dtype).contiguous() for name, x in upstream.items() if x is not None}
    grads = {"grad_entropy": wide.get("entropy"), "grad_lse": wide.get("lse")}
    return coefficients(
        g, entropy=stats.entropy, **grads, label_smoothing=head.options.label_smoothing, vocab=head.vocab
    )


def reported(head: Head, stats: Stats, wanted: Wanted) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logps, entropy and lse as losses see them: the log-probs smoothed when that is asked for."""
    logps, dtype = stats.logps, head.out_dtype
    if stats.total is not None:
        logps = smoothed(logps, stats.logsum, stats.total, head.options.label_smoothing, head.vocab)
    entropy = None if stats.entropy is None else in_dtype(stats.entropy, dtype)
    return in_dtype(logps, dtype), entropy, (stats.max + stats.logsum).to(dtype) if wanted.lse else None


def scaling_of(head: Head, start: int, stop: int) -> dict:
    """The kernels' keyword arguments for the scored rows ``start:stop``."""
    tau = head.temperature
    return {
        "temperature": tau[start:stop] if isinstance(tau, Tensor) else tau,
        "softcap": head.options.softcap,
        "logit_scale": head.options.logit_scale,
    }


def cut(stats: Stats, rows: slice | Tensor) -> Stats:
    """The statistics of some rows."""
    parts: list[Any] = [None if x is None else x[rows] for x in stats]
    return Stats(*parts)


def join(head: Head, parts: list[Stats], entropy: bool) -> Stats:
    """The statistics of consecutive chunks as one."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        total = head.options.label_smoothing != 0
        none = nothing(head.labels, kernel_dtype(head.options.dtype), entropy, total, True)
        return none._replace(top1=none.top1 != 0)
    columns: list[Any] = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return Stats(*columns)


def scatter_rows(head: Head, values: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, ...]`` over scored rows to ``[N, ...]``, zero elsewhere."""
    if head.rows is None:
        return in_dtype(values, dtype)
    out = torch.zeros(head.hidden.shape[0], *values.shape[1:], dtype=dtype, device=values.device)
    return out.index_copy_(0, head.rows, values.to(dtype))


# --- products --------------------------------------------------------------------------------------------------------


def project(head: Head, hidden: Tensor, buffer: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Logits ``hidden @ weight[first:last].T + bias`` in ``buffer``.

    Half precision rounds between the products. The adapter's part, small, goes first, unless there is a bias: that
    joins the weight's product before any rounding, as in a linear layer; the two may be large and cancel.
    """
    last = head.weight.shape[0] if last is None else last
    shape = hidden.shape[0], last - first
    out = rows_of(buffer, 0, shape[0] * shape[1]).view(shape)
    plus = None if head.bias is None else rows_of(head.bias, first, last)
    joined = plus is not None and out.dtype.itemsize < 4
    for weight, part in head.parts if joined else reversed(head.parts):
        factor = hidden if head.up is None else hidden[:, part]
        multiply(factor, rows_of(weight, first, last).t(), out, plus, head.options.batch_invariant)
        plus = out
    return out


def multiply_back(head: Head, dz: Tensor, out: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """``out [n, D + r] = dz @ [weight, up][first:last]``."""
    for weight, part in head.parts:
        factor = rows_of(weight, first, weight.shape[0] if last is None else last)
        multiply(dz, factor, out if head.up is None else out[:, part], None, head.options.batch_invariant)
    return out


def add_back(
    head: Head, dz: Tensor, total: Tensor, alpha: Tensor | None, first: int = 0, last: int | None = None
) -> None:
    """``total [n, D + r] += alpha * dz @ [weight, up][first:last]`` in the precision of ``total``."""
    if head.options.batch_invariant and alpha is None:
        total.add_(multiply_back(head, dz, torch.empty(total.shape, dtype=dz.dtype, device=dz.device), first, last))
        return
    for weight, columns in head.parts:
        if not head.options.batch_invariant:
            add_product(total[:, columns], dz, weight[first:last], first=False, alpha=alpha)
            continue
        for rows, part in padded(dz):
            tile = total.new_empty(INVARIANT_ROWS, weight.shape[1])
            add_product(tile, part, weight[first:last], first=True, alpha=alpha)
            total[rows, columns] += tile[: rows.stop - rows.start]
