"""Ops over packed sequences: ``packed_attention`` beside padded batches, and ``gae`` and ``segment_scan``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.field import BF16, FP32, OURS, ROOF, Field, Inputs, Outputs, Setting, draw, in64
from bench.measure import Case

# --- attention -------------------------------------------------------------------------------------------------------

LEAVES = ("q", "k", "v")
RAGGED = (1.0, 0.12, 0.4, 0.2, 0.75, 0.08, 0.3, 0.15)
"""Sequence lengths in units of the longest: what chat data looks like, a third of it the longest's."""


def inputs(
    generator: torch.Generator, *, heads: int, d: int, dtype: torch.dtype, places: Tensor, inside: Tensor
) -> Inputs:
    """Queries, keys and values of packed rows, an upstream gradient, and where padding puts the rows."""
    shape, device = (int(places.max()) + 1, heads, d), generator.device
    x = {name: draw(generator, *shape, dtype=dtype).requires_grad_() for name in LEAVES}
    return {**x, "upstream": draw(generator, *shape), "places": places.to(device), "inside": inside.to(device)}


def our_attention(x: Inputs, *, segments, **options) -> Tensor:
    from fastalign.ops.attention import packed_attention

    out = packed_attention(x["q"], x["k"], x["v"], segments, **options)
    return (out * x["upstream"]).mean()


def dense_attention(x: Inputs, *, segments) -> Tensor:
    """The definition, with a ``[T, T]`` mask."""
    from fastalign.ops.attention import reference

    return (reference(x["q"], x["k"], x["v"], segments) * x["upstream"]).mean()


def padded_attention(x: Inputs) -> Tensor:
    """Rows gathered to ``[B, longest]``, a shared prompt once per response; causal attention; the mean of what counts.

    ``places`` is ``[B, longest]``, the packed row of each place; a prompt's copies after the first are not ``inside``.
    """
    places, inside = x["places"], x["inside"]
    q, k, v = (x[name][places].transpose(1, 2) for name in LEAVES)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return (out[inside] * x["upstream"][places[inside]]).mean()


def ragged(longest: int) -> tuple[list[int], list[int], list[list[int]]]:
    """Offsets and parents of independent sequences, and the packed rows of each."""
    lengths = [max(1, round(longest * share)) for share in RAGGED]
    offsets = [0, *accumulate(lengths)]
    return offsets, [-1] * len(lengths), [list(range(a, a + n)) for a, n in zip(offsets, lengths, strict=False)]


def shared(longest: int, group: int) -> tuple[list[int], list[int], list[list[int]]]:
    """One prompt and ``group`` responses, each half of ``longest``."""
    half = max(1, longest // 2)
    offsets = [half * i for i in range(group + 2)]
    prompt = list(range(half))
    responses = [prompt + list(range(a, a + half)) for a in offsets[1:-1]]
    return offsets, [-1] + [0] * group, responses


def padded_layout(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """``[B, longest]`` places and those that count: each packed row once."""
    longest = max(map(len, rows))
    places = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    inside, seen = torch.zeros_like(places, dtype=torch.bool), set()
    for i, row in enumerate(rows):
        for j, place in enumerate(row):
            inside[i, j] = place not in seen
            seen.add(place)
    return places, inside


def attention(
    setting: Setting,
    *,
    longest: int,
    heads: int,
    d: int,
    dtype: torch.dtype,
    group: int = 0,
    equal: bool = False,
    targets: dict[str, float] | None = None,
) -> Case:
    """Forward and backward over ragged sequences, or over a prompt shared by ``group`` responses.

    Args:
        equal: sequences of one length, where padding costs nothing.
    """
    from fastalign.types import Segments

    size = setting.sizes(N=longest, H=heads, d=d)
    longest, heads, d = size["N"], size["H"], size["d"]
    offsets, parents, rows = shared(longest, group) if group else ragged(longest)
    if equal:
        offsets, parents = [longest * i for i in range(5)], [-1] * 4
        rows = [list(range(a, a + longest)) for a in offsets[:-1]]
    segments, (places, inside) = Segments(offsets, parents), padded_layout(rows)
    field = Field(setting)
    field.add_loss("eager", padded_attention, LEAVES)
    field.add_loss(OURS, partial(our_attention, segments=segments), LEAVES)
    if dtype == FP32 or setting.gpu:
        field.add_loss("dense mask", partial(dense_attention, segments=segments), LEAVES)
    kind = f"prompt shared by {group}" if group else "equal lengths" if equal else "ragged"
    return Case(
        f"packed_attention, {kind}",
        f"T{offsets[-1]} longest {longest} H{heads} d{d}",
        dtype,
        partial(inputs, heads=heads, d=d, dtype=dtype, places=places, inside=inside),
        lambda x: field.runs["eager"](in64(x)),
        field,
        targets=targets or {},
    )


# --- recurrences -----------------------------------------------------------------------------------------------------

GAMMA, LAM = 0.99, 0.95


def scan_inputs(generator: torch.Generator, *, segments: int, longest: int) -> Inputs:
    """Rewards and values of sequences whose lengths run evenly from 1 to ``longest``, in random order."""
    new = {"generator": generator, "device": generator.device}
    lengths = torch.linspace(1, longest, segments, device=generator.device).round().long()
    lengths = lengths[torch.randperm(segments, **new)]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    n = int(offsets[-1])
    return {"rewards": draw(generator, n), "values": draw(generator, n), "cu_seqlens": offsets}


def padded_places(cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """``[B, longest]`` row of each place, and whether it holds a token."""
    places = cu_seqlens[:-1, None] + torch.arange(longest, device=cu_seqlens.device)
    inside = places < cu_seqlens[1:, None]
    return places.where(inside, 0), inside


def eager_gae(x: Inputs, *, longest: int) -> Outputs:
    """The loop over time on a padded batch, as trainers write it."""
    places, inside = padded_places(x["cu_seqlens"], longest)
    rewards, values = (x[name][places] * inside for name in ("rewards", "values"))
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(last)
    for t in reversed(range(longest)):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        last = (delta + GAMMA * LAM * last) * inside[:, t]
        advantages[:, t], following = last, values[:, t]
    packed = advantages[inside]
    return {"advantages": packed, "returns": packed + x["values"]}


def eager_suffix_sums(x: Inputs) -> Outputs:
    """A cumulative sum of each sequence turned round."""
    spans = pairwise(x["cu_seqlens"].tolist())
    return {"sums": torch.cat([x["rewards"][a:b].flip(0).cumsum(0).flip(0) for a, b in spans])}


def our_gae(x: Inputs, **options) -> Outputs:
    from fastalign.ops import gae

    advantages, returns = gae(x["rewards"], x["values"], x["cu_seqlens"], GAMMA, LAM, **options)
    return {"advantages": advantages, "returns": returns}


def our_suffix_sums(x: Inputs, **options) -> Outputs:
    from fastalign.ops import segment_scan

    return {"sums": segment_scan(x["rewards"], x["cu_seqlens"], 1.0, **options)}


def add(x: Inputs) -> Outputs:
    """The bytes that must move."""
    x["rewards"] + x["values"]
    return {}


def scan(setting: Setting, *, segments: int, longest: int, kind: str) -> Case:
    """Advantages and returns, or suffix sums, of packed rewards."""
    size = setting.sizes(B=segments, N=longest)
    segments, longest = size["B"], size["N"]
    eager, ours = (
        (partial(eager_gae, longest=longest), our_gae) if kind == "gae" else (eager_suffix_sums, our_suffix_sums)
    )
    field = Field(setting)
    field.add("eager", eager)
    field.add(OURS, ours)
    field.add("fastalign, torch backend", partial(ours, backend="torch"))
    field.runs[ROOF + "add"] = add
    return Case(
        kind,
        f"B{segments} of 1-{longest}",
        FP32,
        partial(scan_inputs, segments=segments, longest=longest),
        lambda x: eager({k: v.double() if v.is_floating_point() else v for k, v in x.items()}),
        field,
    )


# --- the list --------------------------------------------------------------------------------------------------------


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Attention where padding and repeated prompts cost, and where they do not; scans of a rollout's sizes."""
    make, scans = partial(partial, attention, setting), partial(partial, scan, setting)
    if setting.gpu:
        big, ahead = {"longest": 2048, "heads": 16, "d": 128, "dtype": BF16}, {"eager": 1.0}
        rollout = {"segments": 512, "longest": 4096}
    else:
        big, ahead = {"longest": 512, "heads": 8, "d": 64, "dtype": FP32}, {}
        rollout = {"segments": 64, "longest": 512}
    return {
        "gae": scans(**rollout, kind="gae"),
        "gae-one-segment": scans(segments=1, longest=1, kind="gae"),
        "segment_scan": scans(**rollout, kind="segment_scan"),
        "attention-ragged": make(**big, targets=ahead),
        "attention-shared-prompt-2": make(**big, group=2, targets=ahead),
        "attention-shared-prompt-8": make(**big, group=8, targets=ahead),
        "attention-equal-lengths": make(**big, equal=True),
    }
