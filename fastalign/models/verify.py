"""First-use self-verification: a packed batch against the plain forward of the same sequences.

Wrong packing raises nothing: sequences read each other, or a response loses its prompt, and training goes on. So the
first packed batch of a run is also computed the ordinary way, each sequence in a row of its own, by the model's own
forward and PyTorch's own attention, and the log-probs are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from fastalign.models.policy import Policy
from fastalign.ops.linear_logps import linear_logps
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)

TOLERANCES = {"full": (1e-5, 1e-6), "half": (3e-2, 3e-3)}
"""Largest and mean difference in nats while logits stay below `PEAK`: about ten roundings of such a logit in fp32, one
in bf16. A sequence that reads another one, or loses its prompt, is off by tenths of nats."""

PEAK = 8.0
"""Rounding grows with the logits; tolerances grow in proportion above this magnitude."""


@dataclass(frozen=True)
class Sequences:
    """The logical sequences of a group, and where each of the group's scored tokens lies in them.

    Attributes:
        input_ids: `[n, L]` padded on the right, which causal attention never reads.
        scored: `[m]` positions in the batch's N scored tokens.
        sequence, position: `[m]` the sequence and the position in it that predict the scored token.
    """

    input_ids: Tensor
    scored: Tensor
    sequence: Tensor
    position: Tensor


def verify_packed(
    policy: Policy,
    batch: PackedBatch,
    on_mismatch: Literal["raise", "fallback"] = "raise",
    name: str = "the model",
) -> bool:
    """Compares one group's log-probs from the packed batch with those of the plain forward.

    Two forwards without gradient: the whole packed batch, and the group's sequences in padded rows. Run it under the
    autocast of training. All ranks of a sharded policy must call it.

    Args:
        policy: left exactly as it was.
        batch: the first batch that holds a group with a shared prefix, if there is one.
        on_mismatch: `raise`, or `fallback` to warn and return False, after which the caller packs without sharing and
            verifies again.
        name: what messages call the policy.

    Returns:
        Whether they agree.

    Raises:
        ValueError: on disagreement, with both numbers, when `on_mismatch` is `raise`; when the plain log-probs are not
            finite; and when a label is not the token that follows its row in any sequence of its group.
    """
    if batch.num_scored == 0:
        return True
    scalar = policy.has_scalar_head
    what = "scores" if scalar else "log-probs"
    sequences = unpack_group(batch, own_rows=scalar)
    with torch.no_grad():
        read = _scores if scalar else _logps
        packed = policy(batch, lambda *args, **options: read(*args, keep=sequences.scored, **options))
        plain, peak = _plain_logps(policy, sequences, batch.labels[sequences.scored])
    if not plain.isfinite().all():
        bad = int((~plain.isfinite()).sum())
        raise ValueError(
            f"{name}'s own {what} are not finite on {bad} of {plain.numel()} tokens in a plain forward, without "
            "any packing: its weights hold NaN or infinity, or overflow in model.dtype; load another checkpoint"
        )
    difference = (packed.double() - plain.double()).abs()
    largest, mean = difference.max().item(), difference.mean().item()
    worst, average = (
        limit * max(1.0, peak / PEAK) for limit in TOLERANCES[forward_precision(policy, batch.input_ids.device)]
    )
    text = (
        f"packed and plain {what} differ by {largest:.2g} at most and {mean:.2g} on average "
        f"over {packed.numel()} tokens (allowed {worst:.2g} and {average:.2g})"
    )
    if largest <= worst and mean <= average:  # false for NaN
        log.info("attention verified: %s", text)
        return True
    if on_mismatch == "raise":
        advice = 'set model.attention to "sdpa", or batch.share_prefix to false, or model.on_mismatch to "fallback"'
        raise ValueError(f"{text}: this model or attention backend does not read packed rows exactly; {advice}")
    log.warning("%s: going on without sharing prefixes", text)
    return False


def unpack_group(batch: PackedBatch, own_rows: bool = False) -> Sequences:
    """The sequences of the group to compare: one with a shared prefix, not the first, small; as far as there is one.

    With ``own_rows`` a scored token is read at its own row, not at the one before.
    """
    tree, leaves = _choose_group(batch)
    chains = [_chain_rows(batch, leaf) for leaf in leaves[tree]]
    ids = batch.input_ids.tolist()
    if own_rows:
        places = [{(row, ids[row]): t for t, row in enumerate(rows)} for rows in chains]
    else:
        places = [{(row, ids[after]): t for t, (row, after) in enumerate(pairwise(rows))} for rows in chains]
    group_rows = {row for rows in chains for row in rows}
    scored, where = [], []
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        predictions = list(zip(batch.rows[start:stop].tolist(), batch.labels[start:stop].tolist(), strict=True))
        if predictions and predictions[0][0] in group_rows:
            scored += range(start, stop)
            where += _locate(predictions, places, start)
    device = batch.labels.device
    padded = torch.zeros(len(chains), max(map(len, chains)), dtype=torch.int64, device=device)
    for n, rows in enumerate(chains):
        padded[n, : len(rows)] = batch.input_ids[rows]
    sequence, position = torch.tensor(where, device=device).T
    return Sequences(padded, torch.tensor(scored, device=device), sequence, position)


def _locate(
    predictions: list[tuple[int, int]], places: list[dict[tuple[int, int], int]], start: int
) -> list[tuple[int, int]]:
    """`(sequence, position)` of one sequence's predictions `(row, label)`: all in one sequence of the group."""
    for n, place in enumerate(places):
        if all(prediction in place for prediction in predictions):
            return [(n, place[prediction]) for prediction in predictions]
    raise ValueError(
        f"scored tokens {start}:{start + len(predictions)} are not the next tokens of any sequence of their group: "
        "rows and labels do not match the segments"
    )


def _choose_group(batch: PackedBatch) -> tuple[int, dict[int, list[int]]]:
    """The root segment of the group, and the leaf segments below each root that has scored rows."""
    segments = batch.segments
    roots: list[int] = []
    depths: list[int] = []
    for s, parent in enumerate(segments.parents):
        roots.append(s if parent < 0 else roots[parent])
        depths.append(0 if parent < 0 else depths[parent] + 1)
    sizes: dict[int, int] = {}
    deepest: dict[int, int] = {}
    leaves: dict[int, list[int]] = {}
    for s, root in enumerate(roots):
        sizes[root] = sizes.get(root, 0) + segments.offsets[s + 1] - segments.offsets[s]
        deepest[root] = max(deepest.get(root, 0), depths[s])
        if s not in segments.parents:
            leaves.setdefault(root, []).append(s)
    ends = torch.tensor(segments.offsets[1:])
    homes = torch.searchsorted(ends, batch.rows.cpu(), right=True)
    scored_roots = {roots[s] for s in homes.unique().tolist()}
    first = min(scored_roots)
    best = min(scored_roots, key=lambda root: (-deepest[root], len(leaves[root]) < 2, root == first, sizes[root]))
    return best, leaves


def _chain_rows(batch: PackedBatch, leaf: int) -> list[int]:
    """Rows of the sequence that ends in a leaf segment, from its root on."""
    segments, rows = batch.segments, []
    while leaf >= 0:
        rows = [*range(segments.offsets[leaf], segments.offsets[leaf + 1]), *rows]
        leaf = segments.parents[leaf]
    return rows


def _logps(hidden: Tensor, weight: Tensor, labels: Tensor, *, keep: Tensor, **options: Any) -> Tensor:
    """Log-probs of some scored tokens through the fused head."""
    logps = linear_logps(hidden[keep], weight, labels[keep], **options)
    assert isinstance(logps, Tensor)
    return logps


def _scores(hidden: Tensor, weight: Tensor, labels: Tensor, *, keep: Tensor, bias: Tensor | None = None) -> Tensor:
    """Outputs of a scalar head at some scored tokens."""
    return nn.functional.linear(hidden[keep], weight, bias)[:, 0]


def _plain_logps(policy: Policy, sequences: Sequences, labels: Tensor) -> tuple[Tensor, float]:
    """The same log-probs (or scores) from the model's own forward in stock attention, and the largest logit."""
    register_fsdp_forward_method(policy, "plain_logits")  # does nothing to a policy that is not sharded
    positions, index = sequences.position.unique(return_inverse=True)
    with stock_attention(policy):
        logits = policy.plain_logits(sequences.input_ids, positions)[sequences.sequence, index]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide[:, 0] if policy.has_scalar_head else wide.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return chosen, wide.abs().max().item()


def stock_implementation(model: PreTrainedModel) -> str:
    """PyTorch's attention, or eager: PyTorch's has no softcap, and transformers before 5.21 leaves it out silently."""
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not softcap else "eager"


@contextmanager
def stock_attention(policy: Policy) -> Iterator[None]:
    """Runs the model in PyTorch's attention (eager where the model has no other), then puts ours back."""
    model: PreTrainedModel = policy.model
    model.set_attn_implementation(stock_implementation(model))
    try:
        yield
    finally:
        model.set_attn_implementation(policy.attention)


def forward_precision(policy: Policy, device: torch.device) -> Literal["full", "half"]:
    """Which of ``TOLERANCES`` holds for a forward on ``device`` under the present autocast: TF32 rounds like half."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    half = policy.head.weight.dtype in (torch.bfloat16, torch.float16)
    return "half" if half or tf32 or torch.is_autocast_enabled(device.type) else "full"
