"""How a call of a linear op is cut: a pure function from host integers to a frozen, printable plan.

Modes (N rows, V vocabulary, D hidden; one GEMM over the head costs 2NVD):

    stats     2NVD   no gradient is wanted: chunks of rows, statistics only
    one_pass  6NVD   coefficients are known while the chunk's logits are in memory (4NVD when the head is frozen)
    retained  6NVD + 2(1 - phi)NVD   units longer than a chunk: a share phi of the logits is kept, others are recomputed
    frozen    4NVD   frozen head, any upstream gradient: the forward keeps one direction per row
    slabs     8NVD   everything else: statistics first, then recomputed logits, one vocabulary slab after the other
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise
from typing import Literal

log = logging.getLogger("fastalign.plan")
"""Each call's plan, on the level of debugging."""

Mode = Literal["stats", "one_pass", "retained", "frozen", "slabs"]
Chunk = tuple[int, int]
Coefficients = Literal["none", "token", "unit", "upstream"]

MIN_ROWS = 256
"""Up to so many rows form one chunk: reading the weight dominates there."""
GPU_ROWS = 4096
"""Rows per chunk on a GPU: below, read-modify-write of the fp32 dW costs more than 6 % of the GEMMs."""
CPU_ROWS = 512
"""Rows per chunk on a CPU: measured, the three GEMMs run within 5 % of their full-size speed from 342 rows on."""
USEFUL_SHARE = 0.5
"""Keeping a smaller share of the logits is not worth thinner chunks and an accumulator for the weight's gradient."""
CPU_NARROW_ROWS = 2048
"""The same for 16-bit logits, whose dW needs widened operands as soon as there are two chunks."""
CPU_BYTES = 128 << 20
"""Default workspace on a CPU, unless 256 rows need more."""
GPU_SHARE = 16
"""Default workspace on a GPU: this fraction of its total memory (free memory would make chunking irreproducible)."""
SLAB = 16384
"""Columns per slab when memory allows."""
MIN_SLAB = 1024
"""Narrower slabs leave the GEMMs too thin; rows are cut into blocks instead."""
UPCAST_ROWS = 2048
"""Rows of a narrow operand that are widened at a time for an fp32 product."""


@dataclass(frozen=True)
class Plan:
    """What a linear op will do.

    Attributes:
        mode: see the module's docstring.
        groups: the chunks that each call of the loss sees, ``(start, stop)`` over the scored rows; all rows, in order.
        unit_spans: for aligned calls with whole groups ``(start, stop)`` over the units of each group, else None.
        slots: chunks of a group whose logits are held at once; those beyond share the last slot.
        phi: share of the rows whose logits are computed once.
        slab, block: columns and rows at a time when a backward recomputes logits.
        workspace_bytes: bound on chunk logits and temporaries, GEMM library scratch excluded.
        accumulator_bytes: the fp32 weight gradient of a trainable head, reported beside the workspace.
        flops: the GEMMs' cost in units of NVD.
        reason: why this mode.
    """

    mode: Mode
    groups: tuple[tuple[Chunk, ...], ...]
    unit_spans: tuple[tuple[int, int], ...] | None
    slots: int
    phi: float
    slab: int
    block: int
    workspace_bytes: int
    accumulator_bytes: int
    flops: float
    reason: str

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, in order."""
        return tuple(chain.from_iterable(self.groups))

    @cached_property
    def chunk_rows(self) -> int:
        """Rows of the largest chunk."""
        return _largest(self.chunks)

    @cached_property
    def held_rows(self) -> int:
        """Rows of logits that exist at once when gradients are made group by group."""
        return max((min(self.slots, len(group)) * _largest(group) for group in self.groups), default=0)

    def __str__(self) -> str:
        workspace, accumulator = self.workspace_bytes / 2**20, self.accumulator_bytes / 2**20
        return (
            f"{self.mode} ({self.reason}): {len(self.chunks)} chunks, up to {self.chunk_rows} rows, "
            f"{self.flops:.3g} NVD, workspace {workspace:.1f} MiB, accumulator {accumulator:.1f} MiB"
        )


def make_plan(
    num_rows: int,
    vocab: int,
    width: int,
    *,
    itemsize: int = 4,
    logit_bytes: int | None = None,
    coefficients: Coefficients = "token",
    units: Sequence[int] | None = None,
    head_gradient: bool = True,
    trained: int | None = None,
    entropy: bool = False,
    memory: int | None = None,
    device: str = "cpu",
    total_memory: int = 0,
    scratch: int = 0,
    batch_invariant: bool = False,
) -> Plan:
    """The plan of a call; equal arguments give equal plans.

    Args:
        num_rows: scored rows n.
        vocab, width: V, and D (with an adapter of rank r: D + r).
        itemsize: bytes of an operand of the GEMMs.
        logit_bytes: of a logit and its gradient; None: one in the place of the other, in the operands' dtype.
        coefficients: when the rows' coefficients are known: "none" (no gradient wanted), "token" or "unit" (inside the
            call), "upstream" (only in backward).
        units: scored rows of each coupling unit, in order, for "unit".
        head_gradient: weight, adapter or bias is trainable.
        trained: of the width, the columns whose weight gets a gradient; None for all of a trainable head.
        entropy: a gradient of another statistic than the log-prob may come: entropy, log-sum-exp.
        memory: bound on the workspace in bytes; None for the device's default.
        device: "cpu" or "cuda"; ``total_memory`` is the GPU's.
        scratch: bytes that do not depend on the rows of a chunk (casts of the weight, the sweep's temporaries).
        batch_invariant: the slab must not depend on the number of rows.
    """
    logit_bytes = logit_bytes or itemsize
    row_bytes = row_bytes_of(vocab, width, itemsize, logit_bytes)
    scratch += 64 * num_rows
    limit = _rows_that_fit(row_bytes, itemsize, memory, scratch, device, total_memory)
    starved = device == "cuda" and memory is not None and limit < min(num_rows, GPU_ROWS)
    budget = max(0, (memory or _default_bytes(device, total_memory)) - scratch)
    slots, piece = _slots(max(limit, budget // row_bytes), device)
    spans = _unit_spans(units, limit) if coefficients == "unit" and units is not None else None
    groups = () if units is None or spans is None else _unit_groups(units, spans, limit, piece)
    phi = _share_made_once(groups, slots, piece, device)
    trained = (width if head_gradient else 0) if trained is None else trained
    share = trained / width if width else 0.0
    mode, flops, reason = _mode(coefficients, units or (), limit, head_gradient, share, entropy, starved, phi)
    whole, phi = mode in ("one_pass", "retained"), 0.0 if mode == "slabs" else phi
    if not whole or spans is None:
        chunks, spans = _balanced(0, num_rows, limit), None
        groups = (chunks,) if mode == "slabs" else tuple((chunk,) for chunk in chunks)
    slab, block = _tile(num_rows, vocab, logit_bytes, budget, batch_invariant)
    accumulator = 4 * vocab * trained if whole else 0
    plan = Plan(
        mode, groups, spans, slots if mode == "retained" else 1, phi, slab, block, 0, accumulator, flops, reason
    )
    tile = logit_bytes * slab * block + _slab_bytes(num_rows, width, itemsize, slab, block)
    workspace = scratch + max(plan.held_rows * row_bytes, tile if mode == "slabs" else 0)
    return replace(plan, workspace_bytes=workspace)


cached_plan = lru_cache(maxsize=64)(make_plan)
"""``make_plan`` for arguments that can be hashed."""


def row_bytes_of(vocab: int, width: int, itemsize: int, logit_bytes: int | None = None) -> int:
    """One row of a chunk: its logits, hidden state and hidden gradient, and fp32 copies made for narrow products."""
    upcast = 4 * (UPCAST_ROWS + width) if itemsize < 4 else 0
    return (logit_bytes or itemsize) * vocab + 2 * itemsize * width + upcast


def _default_bytes(device: str, total_memory: int) -> int:
    return total_memory // GPU_SHARE if device == "cuda" else CPU_BYTES


def _rows_that_fit(
    row_bytes: int, itemsize: int, memory: int | None, scratch: int, device: str, total_memory: int
) -> int:
    """The largest chunk. Defaults have a floor, where thinner chunks would be slow; an explicit bound has none."""
    if memory is not None:
        return max(1, (memory - scratch) // row_bytes)
    fit = _default_bytes(device, total_memory) // row_bytes
    if device == "cuda":
        return max(GPU_ROWS, fit)
    return max(MIN_ROWS, min(fit, CPU_ROWS if itemsize >= 4 else CPU_NARROW_ROWS))


def _mode(
    coefficients: Coefficients,
    units: Sequence[int],
    limit: int,
    head_gradient: bool,
    share: float,
    entropy: bool,
    starved: bool,
    phi: float,
) -> tuple[Mode, float, str]:
    if coefficients == "none":
        return "stats", 2, "no gradient is wanted"
    two_phase = 6 + 2 * share
    if coefficients == "upstream":
        if not head_gradient and not entropy:
            return "frozen", 4, "frozen head: one direction per row serves any upstream gradient"
        why = "trainable head" if head_gradient else "a second direction costs what recomputing does"
        return "slabs", two_phase, f"coefficients arrive in backward; {why}"
    if starved:
        return "slabs", two_phase, f"memory holds fewer than {GPU_ROWS} rows of logits"
    known, hot = "per token" if coefficients == "token" else "per unit, and every unit fits", 4 + 2 * share
    if coefficients == "unit" and max(units, default=0) > limit:
        why = f"the largest unit has {max(units)} rows, a chunk holds {limit}"
        if phi < USEFUL_SHARE:
            return "slabs", two_phase, why
        return "retained", hot + 2 * (1 - phi), f"{why}; {phi:.0%} of the logits are made once"
    return "one_pass", hot, f"coefficients are known {known}"


def _largest(chunks: Sequence[Chunk]) -> int:
    return max((stop - start for start, stop in chunks), default=0)


def _balanced(start: int, stop: int, limit: int) -> tuple[Chunk, ...]:
    """As few chunks as fit, equal to within one row, so that the last one is not a sliver."""
    rows = stop - start
    count = -(-rows // limit)
    return tuple(pairwise(start + rows * i // count for i in range(count + 1))) if count else ()


def _slots(capacity: int, device: str) -> tuple[int, int]:
    """How many chunks of a long unit the budget holds, and their rows: as thin as is still efficient."""
    slots = max(1, capacity // _thinnest(device))
    return slots, max(1, capacity // slots)


def _thinnest(device: str) -> int:
    return GPU_ROWS if device == "cuda" else MIN_ROWS


def _share_made_once(groups: Sequence[Sequence[Chunk]], slots: int, piece: int, device: str) -> float:
    """Share of the rows whose logits are still in memory when their coefficients are known; 0 for too thin pieces."""
    if piece < _thinnest(device) and any(len(group) > 1 for group in groups):
        return 0.0
    again = sum(stop - start for group in groups for start, stop in group[slots - 1 : -1])
    return 1 - again / max(1, sum(stop - start for group in groups for start, stop in group))


def _unit_spans(units: Sequence[int], limit: int) -> tuple[tuple[int, int], ...]:
    """Units packed in order, each once, up to the balanced size; empty units join their neighbours."""
    count = max(1, -(-sum(units) // limit))
    target = min(limit, max(-(-sum(units) // count), max(units, default=0)))
    spans, start, size = [], 0, 0
    for index, unit in enumerate(units):
        if size and size + unit > target:
            spans.append((start, index))
            start, size = index, 0
        size += unit
    return (*spans, (start, len(units))) if units else ()


def _unit_groups(
    units: Sequence[int], spans: Sequence[tuple[int, int]], limit: int, piece: int
) -> tuple[tuple[Chunk, ...], ...]:
    """The rows of each span as one chunk, or in pieces where a unit is too long for one."""
    offsets = list(accumulate(units, initial=0))
    rows = [(offsets[start], offsets[stop]) for start, stop in spans]
    return tuple(_balanced(*span, piece) if span[1] - span[0] > limit else (span,) for span in rows)


def _tile(num_rows: int, vocab: int, logit_bytes: int, budget: int, batch_invariant: bool) -> tuple[int, int]:
    """Columns and rows of a recomputed tile: all rows and wide slabs if they fit, else narrower, else blocks."""
    elements = max(1, budget // (2 * logit_bytes))
    widest = MIN_SLAB if batch_invariant else min(SLAB, elements // max(1, num_rows))
    slab = min(vocab, max(MIN_SLAB, widest))
    block = max(1, min(num_rows, elements // max(1, slab)))
    return slab, block


def _slab_bytes(num_rows: int, width: int, itemsize: int, slab: int, block: int) -> int:
    """Beside a tile: the rows' hidden states and fp32 gradient, the slab's fp32 gradient and widened operands."""
    upcast = 4 * (UPCAST_ROWS * max(slab, width) + block * width + slab * width) if itemsize < 4 else 0
    return (itemsize + 4) * num_rows * width + 4 * slab * width + upcast
