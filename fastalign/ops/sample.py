"""Draws of tokens with their log-probs, from logits: noise by counter, inverse CDF in index order, truncation.

    u     = top 53 bits of mix(key ^ mix(position)) / 2^53          one number in [0, 1) per row; mix is SplitMix64's
    token = the first column v with  sum_{w <= v} q_w > u sum_w q_w          q_w = exp((z_w - max z) / T) where kept
    logps = ln p_token - ln kept_mass                               ln p from the sweep that training uses

A token is a function of its row's logits, key and position: not of the rows around it, nor of threads.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.checks import check_device, check_matrix, stats_dtype
from fastalign.ops.rows import Stats
from fastalign.ops.token_logps import reference as token_reference
from fastalign.types import SampleStats

BLOCK = 512
"""Columns whose exponentials are added in fp32 before they join the row's exact sum."""
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Cut(NamedTuple):
    """Truncation after temperature, in this order, as in vLLM and transformers; of equal logits the first are kept.

    Attributes:
        top_k: keep so many of the most probable tokens; 0 keeps all.
        top_p: of these keep the fewest most probable that hold this share of their probability.
        min_p: of these keep those that are at least so many times as probable as the most probable one.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything may be cut."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def count(self, mass: Tensor, before: Tensor, ranked: Tensor) -> Tensor:
        """``[n]`` how many of the columns, in falling order of their logits, are kept.

        Args:
            mass: ``[n, V]`` exponentials in that order, 1 the first.
            before, ranked: the masses in front of each and its own, in a dtype whose sums are exact.
        """
        last = min(self.top_k or mass.shape[1], mass.shape[1]) - 1
        held = (before[:, last] + ranked[:, last]).double()[:, None]
        kept = (before.double() < self.top_p * held) & (mass >= self.min_p)
        return kept[:, : last + 1].sum(-1).clamp_(min=1)


# --- noise -----------------------------------------------------------------------------------------------------------

GOLDEN, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""SplitMix64's increment and factors (Steele, Lea and Flood 2014) as int64, whose arithmetic wraps."""


def mix(x: Tensor) -> Tensor:
    """One step of SplitMix64 from state ``x``, int64: a bijection whose outputs look random."""
    x = x + GOLDEN
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` with zeros coming in; of signed integers torch has only the shift that repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample_keys(seed: int, rows: Tensor, samples: Tensor) -> Tensor:
    """``mix(mix(mix(seed) ^ row) ^ sample)``: the key of each sequence's noise, equal on every device.

    Args:
        seed: any integer, of which 64 bits count.
        rows: ``[B]`` integers, for example the prompts' positions in the dataset.
        samples: ``[B]`` integers, which of the prompt's samples.

    Returns:
        ``[B]`` int64.

    >>> sample_keys(0, torch.tensor([0, 0]), torch.tensor([0, 1])).shape
    torch.Size([2])
    """
    if type(seed) is not int:
        raise ValueError(f"seed must be an integer, got {seed!r}")
    _check_integers("rows", rows, None)
    _check_integers("samples", samples, rows)
    start = torch.tensor((seed + (1 << 63)) % (1 << 64) - (1 << 63), device=rows.device)
    return mix(mix(mix(start) ^ rows.long()) ^ samples.long())


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """``[B]`` float64 in [0, 1): ``(mix(key ^ mix(position)) >> 11) / 2^53``, equal on every device.

    >>> uniforms(torch.tensor([0]), torch.tensor([0])).dtype
    torch.float64
    """
    _check_integers("keys", keys, None)
    _check_integers("positions", positions, keys)
    return _shifted(mix(keys.long() ^ mix(positions.long())), 11).double() * 2.0**-53


def _check_integers(name: str, x: Tensor, like: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.dim() != 1 or x.dtype not in INTEGERS:
        got = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a [B] tensor of integers, got {got}")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise ValueError(
            f"{name} must be [{len(like)}] on {like.device}, one for each row, got [{len(x)}] on {x.device}"
        )


# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, SampleStats]:
    """The specification, in float64: sort, cut, and the first column whose cumulated share of what is kept passes u."""
    logits, cut = logits.double(), Cut(top_k, top_p, min_p)
    tau, greedy = split_greedy(temperature, logits)
    z = logits * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = (z / (tau[:, None] if isinstance(tau, Tensor) else tau)).softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ranked = p.gather(1, order)
    count = cut.count(ranked / ranked[:, :1], ranked.cumsum(-1) - ranked, ranked)
    places = torch.arange(p.shape[1], device=p.device).expand_as(p)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, places < count[:, None])
    running = p.where(kept, 0).cumsum(-1)
    held = running[:, -1]
    passed = (running <= (uniforms(keys, positions) * held)[:, None]).sum(-1)
    last = places.where(kept & (p > 0), 0).amax(-1)
    tokens, held = torch.minimum(passed, last), held if cut.active else torch.ones_like(held)
    tokens, held = as_greedy(greedy, logits.argmax(-1), tokens, held)
    logps, entropy = token_reference(
        logits, tokens, temperature=tau, softcap=softcap, logit_scale=logit_scale, entropy=True
    )
    return tokens, SampleStats(logps - held.log(), entropy, held)


# --- what both ops share ---------------------------------------------------------------------------------------------


def fixed_point(mass: Tensor, vocab: int) -> Tensor:
    """``mass``, which sums to V at most, as int64: sums of integers are exact, so their order cannot matter.

    The unit is ``V / 2^62`` to the next power of two: about 2^-44 of the largest probability at V = 152064.
    """
    return (mass.double() * 2.0 ** (62 - math.ceil(math.log2(max(vocab, BLOCK))))).round_().long()


def split_greedy(temperature: float | Tensor, rows: Tensor) -> tuple[float | Tensor, bool | Tensor]:
    """The positive temperatures, with 1 for 0, and which rows have 0."""
    if not isinstance(temperature, Tensor):
        return float(temperature or 1.0), temperature == 0
    greedy = temperature == 0
    return temperature.masked_fill(greedy, 1).to(stats_dtype(rows)), greedy


def drawing_kernels(op: str, backend: str | None, device: torch.device, dtype: torch.dtype, cut: Cut) -> ModuleType:
    """The module with ``draw``; Triton's kernels do not truncate, there PyTorch's sort serves in their place."""
    chosen = dispatch.choose(op, backend, device.type, dtype == torch.float64)
    return dispatch.kernels(op, "torch" if cut.active and chosen == "triton" else backend, device, dtype)


def draw(
    kernels: ModuleType, logits: Tensor, noise: Tensor, greedy: bool | Tensor, cut: Cut, **scaling: Any
) -> tuple[Tensor, Tensor]:
    """Tokens and kept mass of some rows; where all are greedy nothing is drawn."""
    if greedy is True:
        return first_largest(logits), torch.ones_like(noise)
    tokens, kept = kernels.draw(logits, noise, cut=cut, **scaling)
    return (tokens, kept) if greedy is False else as_greedy(greedy, first_largest(logits), tokens, kept)


def first_largest(logits: Tensor) -> Tensor:
    """``[n]`` the first of the largest logits; of 16 bits a CPU finds it five times faster when they are widened."""
    return (logits.float() if logits.device.type == "cpu" and logits.dtype.itemsize == 2 else logits).argmax(-1)


def as_greedy(greedy: bool | Tensor, first: Tensor, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy rows get the first of their largest logits, and all of the mass."""
    here = torch.as_tensor(greedy, device=tokens.device)
    return torch.where(here, first, tokens), torch.where(here, 1.0, kept)


def check_sampling(rows: Tensor, keys: Tensor, positions: Tensor, temperature: float | Tensor, cut: Cut) -> None:
    """Keys, positions, temperature and truncation are right for ``rows [B, ...]``."""
    for name, x in (("keys", keys), ("positions", positions)):
        _check_integers(name, x, None)
        if len(x) != len(rows):
            raise ValueError(f"{name} must be [B] with B = {len(rows)} rows, got [{len(x)}]")
        check_device(name, x, "the rows", rows)
    _check_temperature(temperature, rows)
    if type(cut.top_k) is not int or cut.top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or a positive integer, got {cut.top_k!r}")
    if not 0 < cut.top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {cut.top_p}")
    if not 0 <= cut.min_p <= 1:
        raise ValueError(f"min_p must lie in [0, 1], got {cut.min_p}")


def _check_temperature(temperature: float | Tensor, rows: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
        return
    if temperature.shape != rows.shape[:1] or not temperature.is_floating_point():
        raise ValueError(
            f"temperature must be a number or a floating [B] with B = {len(rows)}, "
            f"got {temperature.dtype} of shape {list(temperature.shape)}"
        )
    check_device("temperature", temperature, "the rows", rows)
    if rows.device.type == "cpu" and not bool((temperature >= 0).all() & temperature.isfinite().all()):
        wrong = int((~((temperature >= 0) & temperature.isfinite())).nonzero()[0])
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature[wrong]:g} at row {wrong}")


def check_drawable(stats: Stats) -> None:
    """On a CPU: every row has a largest logit, and none is NaN; elsewhere such a row's log-prob is NaN.

    Raises:
        ValueError: a row whose largest logit is not finite, or that holds NaN.
    """
    if stats.max.device.type != "cpu" or bool(stats.logps.isfinite().all()):
        return
    row = int((~stats.logps.isfinite()).nonzero()[0])
    found = {math.inf: "+inf", -math.inf: "only -inf"}.get(float(stats.max[row]), "NaN")
    raise ValueError(f"no token can be drawn from row {row}: its logits hold {found}")


def sample_stats(stats: Stats, kept: Tensor, cut: Cut, dtype: torch.dtype) -> SampleStats:
    """Log-probs over what is kept."""
    assert stats.entropy is not None
    logps, kept = stats.logps.to(dtype), kept.to(dtype)
    return SampleStats(logps - kept.log() if cut.active else logps, stats.entropy.to(dtype), kept)


# --- public ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, SampleStats]:
    """A token of each row with its log-prob, entropy and kept mass; for inference, nothing is differentiable.

    ``z = softcap(logits)``; the token is drawn from ``softmax(z / temperature)``, truncated, by inverse CDF: the first
    column, in index order, whose cumulated probability exceeds ``uniforms(key, position)``. It depends on nothing but
    its row, key and position; backends differ only where the uniform falls within rounding (about 1e-7) of the boundary
    of two columns. Without truncation ``logps`` has the bits of ``token_logps`` for the same row and temperature.

    Args:
        logits: ``[B, V]`` fp32, bf16, fp16 or fp64, any strides; -inf bans a column, but not under a softcap.
        keys: ``[B]`` int64 of ``sample_keys``: one key for each sequence.
        positions: ``[B]`` integers, the place of the token in its sequence.
        temperature: a number, or ``[B]`` (rounded to the precision of the outputs: pass the number where training has
            one). 0 is greedy: the first of the largest logits, with its log-prob at temperature 1 and kept mass 1.
        top_k, top_p, min_p: truncation, off by default; see ``Cut``.
        softcap: ``cap * tanh(logits / cap)`` before the temperature.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        tokens ``[B]`` int64 and ``SampleStats``.

    Raises:
        ValueError: a wrong shape, dtype, device or setting; on a CPU a row with NaN, +inf or nothing but -inf (on CUDA
            its log-prob is NaN).

    >>> tokens, stats = sample(torch.tensor([[0.0, -torch.inf]]), torch.tensor([7]), torch.tensor([0]))
    >>> tokens.tolist(), stats.logps.tolist()
    ([0], [0.0])
    """
    cut = Cut(top_k, top_p, min_p)
    check_matrix("logits", logits, "[B, V]")
    if not logits.shape[1]:
        raise ValueError("logits must have at least one column, got [B, 0]")
    check_sampling(logits, keys, positions, temperature, cut)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    kernels = drawing_kernels("sample", backend, logits.device, logits.dtype, cut)
    sweep = dispatch.kernels("token_logps", backend, logits.device, logits.dtype)
    tau, greedy = split_greedy(temperature, logits)
    scaling = {"temperature": tau, "softcap": softcap, "logit_scale": 1.0}
    tokens, kept = draw(kernels, logits, uniforms(keys, positions), greedy, cut, **scaling)
    stats = Stats(*sweep.forward(logits, tokens, entropy=True, **scaling))
    check_drawable(stats)
    return tokens, sample_stats(stats, kept, cut, stats_dtype(logits))
