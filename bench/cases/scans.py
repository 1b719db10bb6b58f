"""``gae`` and ``segment_scan``: recurrences over packed sequences of unequal lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from bench.field import FP32, OURS, ROOF, Field, Inputs, Outputs, Setting, draw
from bench.measure import Case

GAMMA, LAM = 0.99, 0.95


def inputs(generator: torch.Generator, *, segments: int, longest: int) -> Inputs:
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


def copy(x: Inputs) -> Outputs:
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
    field.runs[ROOF + "add"] = copy
    return Case(
        kind,
        f"B{segments} of 1-{longest}",
        FP32,
        partial(inputs, segments=segments, longest=longest),
        lambda x: eager({k: v.double() if v.is_floating_point() else v for k, v in x.items()}),
        field,
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """A rollout's sizes, and one sequence."""
    make = partial(partial, scan, setting)
    segments, longest = (512, 4096) if setting.gpu else (64, 512)
    return {
        "gae": make(segments=segments, longest=longest, kind="gae"),
        "gae-one-segment": make(segments=1, longest=1, kind="gae"),
        "segment_scan": make(segments=segments, longest=longest, kind="segment_scan"),
    }
