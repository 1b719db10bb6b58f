"""From a loss to its coefficients, and from ``d logits`` to the gradients of hidden states, weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastalign.ops.head.gemm import add_product
from fastalign.ops.head.head import (
    Head,
    Leaves,
    Needs,
    add_back,
    cut,
    differentiate,
    held_in,
    hidden_rows,
    in_dtype,
    kernel_dtype,
    multiply_back,
    project,
    rows_of,
    scaled,
    scatter_rows,
    select,
    workspace,
)
from fastalign.ops.head.plan import Plan
from fastalign.ops.parallel import begin_sum
from fastalign.ops.rows import Coefficients, Stats, pick, zero_rows
from fastalign.ops.token_logps import ELSEWHERE
from fastalign.types import TokenStats

WORTH_COMPACTING = 0.25
"""Share of rows without a coefficient from which moving the others together costs less than their GEMMs."""


def kept_rows(row: Coefficients, least: float = 0.0) -> Tensor | None:
    """Ascending positions of the rows with a coefficient, when at least the share ``least`` of all has none.

    None where all are needed, and on CUDA, where only the device knows. A NaN coefficient is not zero.
    """
    num_rows = row.g.shape[0]
    if row.g.device.type != "cpu" or int(row.g.count_nonzero()) == num_rows:  # a NaN counts as not zero
        return None
    keep = (~zero_rows(row)).nonzero().squeeze(1)
    skipped = num_rows - len(keep)
    return keep if skipped and skipped >= least * num_rows else None


def needed(head: Head, stats: Stats, row: Coefficients) -> tuple[Head, Stats, Coefficients]:
    """The same without the rows whose coefficients are all zero: no GEMM for them, their gradient is exactly 0."""
    keep = kept_rows(row)
    return (head, stats, row) if keep is None else (select(head, keep), cut(stats, keep), pick(row, keep))


# --- from a loss to coefficients --------------------------------------------------------------------------------------

LossFn = Callable[[TokenStats], "Tensor | tuple[Tensor, dict[str, Tensor]]"]
Upstream = Mapping[str, "Tensor | None"]
"""Gradients ``[n]`` of what ``loss_fn`` may differentiate, by the field's name; None or absent is zero."""
DIFFERENTIABLE = ("logps", "entropy", "lse")


def evaluate(loss_fn: LossFn, stats: TokenStats, gradient: bool) -> tuple[Tensor, dict[str, Tensor], Upstream | None]:
    """The chunk's loss and metrics, detached, and its gradients per row (None when they are not wanted).

    With ``gradient`` the differentiable statistics are leaves that require one.
    """
    leaves = {}
    for name in DIFFERENTIABLE if gradient else ():
        if (x := getattr(stats, name)) is not None:
            leaves[name] = x
    loss, metrics = checked(loss_fn(stats))
    refuse_captured_parameters(loss, list(leaves.values()))
    if not gradient:
        return loss.detach(), metrics, None
    if not loss.requires_grad:
        return loss.detach(), metrics, {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), metrics, dict(zip(leaves, grads, strict=True))


def checked(result: Tensor | tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``loss_fn`` returned as (loss, detached metrics)."""
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a floating scalar tensor (or it and a dict of metric sums), got {got}")
    return loss, metrics and {name: torch.as_tensor(value).detach() for name, value in metrics.items()}


def refuse_captured_parameters(loss: Tensor, leaves: list[Tensor]) -> None:
    """A trainable tensor inside loss_fn would silently get no gradient: coefficients are all that leaves a chunk."""
    seen, stack, known = set(), [loss.grad_fn], {*map(id, leaves)}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = node.next_functions
        variable = None if parents else getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"loss_fn uses a trainable tensor of shape {list(variable.shape)} besides the stats; it would get no "
                "gradient. Detach it, or use linear_logps, which composes with autograd"
            )
        for parent, _ in parents:
            stack.append(parent)


# --- while the logits are in memory ----------------------------------------------------------------------------------


def new_gradients(head: Head, plan: Plan, inputs: Leaves, needs: Needs) -> Leaves:
    """Buffers of a one-pass call: rows that are not scored are 0; weight, adapter and bias are summed in fp32."""
    gemm, device = head.options.dtype, head.hidden.device
    wide, single = kernel_dtype(gemm), len(plan.chunks) == 1 and gemm != torch.float16
    new, hidden, totals = torch.empty if plan.chunks else torch.zeros, None, []
    for like, need in ((inputs.weight, needs.weight), (inputs.up, needs.up)):
        dtype = gemm if single and like is not None and like.dtype == gemm else wide
        totals.append(new(like.shape, dtype=dtype, device=device) if need and like is not None else None)
    if needs.hidden:
        hidden = new if head.rows is None else torch.zeros
        hidden = hidden(head.hidden.shape, dtype=held_in(head.hidden.dtype), device=device)
    bias = torch.zeros(head.weight.shape[0], dtype=wide, device=device) if needs.bias else None
    return Leaves(hidden, totals[0], totals[1], bias)


def in_input_dtypes(grads: Leaves, inputs: Leaves) -> Leaves:
    """Each gradient in its input's dtype; that of an fp16 input stays in fp32 until backward."""
    made: list[Tensor | None] = []
    for g, x in zip(grads, inputs, strict=True):
        made.append(None if g is None or x is None else in_dtype(g, held_in(x.dtype)))
    return Leaves(*made)


def write_rows(
    head: Head, target: Tensor, start: int, stop: int, dz: Tensor, alpha: Tensor | None
) -> Callable[[], None]:
    """``target[rows] = dz @ [weight, up]`` for the scored rows ``start:stop``; in place where layouts allow.

    ``alpha`` is the factor that an fp16 ``dz`` needs. Of a shard the product is a partial sum: its exchange runs until
    the returned function is called.
    """
    if head.shard is not None:
        return _write_shared(head, target, start, stop, dz, alpha)
    if alpha is not None:
        product = torch.zeros(stop - start, head.width, dtype=alpha.dtype, device=dz.device)
        add_back(head, dz, product, alpha)
        _store(head, target, start, stop, product)
    elif head.rows is None and target.dtype == dz.dtype:
        multiply_back(head, dz, rows_of(target, start, stop))
    else:
        product = torch.empty(stop - start, head.width, dtype=dz.dtype, device=dz.device)
        _store(head, target, start, stop, multiply_back(head, dz, product))
    return nothing_left


def _write_shared(
    head: Head, target: Tensor, start: int, stop: int, dz: Tensor, alpha: Tensor | None
) -> Callable[[], None]:
    """The partial sums are kept and added in the statistics' precision."""
    if head.shard is None or start == stop:
        return nothing_left
    wide = torch.float64 if dz.dtype == torch.float64 else torch.float32
    partial = torch.zeros(stop - start, head.width, dtype=wide, device=dz.device)
    add_back(head, dz, partial, alpha)
    work = begin_sum(head.shard, partial)

    def finish() -> None:
        work.wait()
        _store(head, target, start, stop, partial)

    return finish


def nothing_left() -> None:
    """Nothing to wait for: the rows are written already."""


def _store(head: Head, target: Tensor, start: int, stop: int, rows: Tensor) -> None:
    if head.rows is None:
        target[start:stop] = rows
    else:
        target.index_copy_(0, head.rows[start:stop], rows.to(target.dtype))


def moved_up(logits: Tensor, keep: Tensor) -> Tensor:
    """The rows ``keep``, ascending, moved to the front one by one: no second buffer."""
    for to, row in enumerate(keep.tolist()):
        if to != row:
            logits[to] = logits[row]
    return logits[: len(keep)]


def add_weight_gradients(
    head: Head,
    sums: Sequence[Tensor | None],
    bias: Tensor | None,
    dz: Tensor,
    hidden: Tensor,
    alpha: Tensor | None,
    *,
    first: bool,
) -> None:
    """``dz.T @ hidden``, in its parts, and the column sums of dz; ``first`` sets the products instead of adding."""
    for (_, columns), total in zip(head.parts, sums, strict=False):
        if total is not None:
            part = hidden if head.up is None else hidden[:, columns]
            add_product(total, dz.t(), part, first=first, alpha=alpha)
    if bias is not None:
        total = dz.sum(0, dtype=bias.dtype)
        bias += total if alpha is None else total * alpha


# --- second phase ----------------------------------------------------------------------------------------------------


MakeGradient = Callable[[Tensor, slice, int, int], Tensor]
"""``d logits`` of a block of rows and a slab of columns, from the rows' hidden states, through recomputed logits."""


def recomputed_gradients(
    head: Head, plan: Plan, stats: Stats, row: Coefficients, inputs: Leaves, needs: Needs, *, held: bool = False
) -> Leaves:
    """Second phase of one stream: the gradients of ``row`` in the inputs."""
    row, alpha = scaled(head, 0, len(head.labels), row)
    buffer = workspace(head, plan.block, plan.slab)

    def make(hidden: Tensor, rows: slice, first: int, last: int) -> Tensor:
        logits, labels = project(head, hidden, buffer, first, last), slab_labels(head, rows, first, last)
        return differentiate(head, rows.start, rows.stop, logits, labels, cut(stats, rows), pick(row, rows))

    return slab_by_slab(head, plan, make, alpha, inputs, needs, held=held)


def slab_by_slab(
    head: Head,
    plan: Plan,
    make: MakeGradient,
    alpha: Tensor | None,
    inputs: Leaves,
    needs: Needs,
    *,
    held: bool = False,
) -> Leaves:
    """The gradients of the inputs, each in its input's dtype, from the ``d logits`` that ``make`` returns per slab.

    A slab of the weight's gradient is finished before the next begins: no ``[V, D]`` accumulator. ``held``: backward
    has yet to multiply by its upstream gradient; until then fp16 gradients stay in fp32.
    """
    num_rows, vocab, wide = len(head.labels), head.weight.shape[0], kernel_dtype(head.options.dtype)
    new = {"dtype": wide, "device": head.hidden.device}
    d_hidden = torch.zeros(num_rows, head.width, **new) if needs.hidden else None
    d_weights = _zeros(inputs.weight, needs.weight, held), _zeros(inputs.up, needs.up, held)
    d_bias = torch.zeros(vocab, **new) if needs.bias else None
    hidden = hidden_rows(head, 0, num_rows)
    finish = _summed(head, d_hidden) if not vocab else nothing_left
    for first in range(0, vocab if num_rows else 0, plan.slab):
        last = min(vocab, first + plan.slab)
        slabs = [None if d is None else d[first:last] for d in d_weights]
        sums = [None if slab is None else _accumulator(slab, wide) for slab in slabs]
        d_slab = None if d_bias is None else d_bias[first:last]
        for start in range(0, num_rows, plan.block):
            rows = slice(start, min(num_rows, start + plan.block))
            dz = make(hidden[rows], rows, first, last)
            if d_hidden is not None:
                add_back(head, dz, d_hidden[rows], alpha, first, last)
            if last == vocab and rows.stop == num_rows:
                finish = _summed(head, d_hidden)
            add_weight_gradients(head, sums, d_slab, dz, hidden[rows], alpha, first=start == 0)
        for slab, total in zip(slabs, sums, strict=True):
            if slab is not None and total is not None and total is not slab:
                slab.copy_(total)
    finish()
    return _dense(head, inputs, held, d_hidden, *d_weights, d_bias)


def slab_labels(head: Head, rows: slice, first: int, last: int) -> Tensor:
    """Labels of some rows counted from a slab's first column; those of other slabs have no target term."""
    labels = head.labels[rows]
    local = torch.where((labels >= first) & (labels < last), labels - first, ELSEWHERE)
    return torch.where(labels >= head.weight.shape[0], last - first, local)  # invalid stays invalid


def _dtype(like: Tensor, held: bool) -> torch.dtype:
    return held_in(like.dtype) if held else like.dtype


def _zeros(like: Tensor | None, needed: bool, held: bool) -> Tensor | None:
    return (
        torch.zeros(like.shape, dtype=_dtype(like, held), device=like.device) if needed and like is not None else None
    )


def _dense(
    head: Head, inputs: Leaves, held: bool, d_hidden: Tensor | None, d_weight, d_up, d_bias: Tensor | None
) -> Leaves:
    """``d hidden`` over all rows, and the sums in their inputs' dtypes."""
    hidden = (
        None if d_hidden is None or inputs.hidden is None else scatter_rows(head, d_hidden, _dtype(inputs.hidden, held))
    )
    bias = None if d_bias is None or inputs.bias is None else d_bias.to(_dtype(inputs.bias, held))
    return Leaves(hidden, d_weight, d_up, bias)


def _summed(head: Head, d_hidden: Tensor | None) -> Callable[[], object]:
    """Starts adding the ranks' parts of ``d hidden``; the returned function waits for it."""
    if head.shard is None or d_hidden is None or not len(d_hidden):
        return nothing_left
    return begin_sum(head.shard, d_hidden).wait


def _accumulator(target: Tensor, dtype: torch.dtype) -> Tensor:
    """The slab of the gradient itself when it is precise enough to add into."""
    return target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype, device=target.device)
