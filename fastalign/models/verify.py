"""First-use self-verification: a packed batch against the plain forward of the same sequences.

Wrong packing raises nothing: sequences read each other, or a response loses its prompt, and training goes on. So the
first packed batch of a run is also computed the ordinary way, each sequence in a row of its own, by the model's own
forward and PyTorch's own attention, and the log-probs are compared.

What may differ is rounding, and how much that is depends on the model: it is measured, as the distance between the
plain log-probs of the precision in use and of the next wider one. Of a model in half precision a few tokens at wrong
positions would hide in it, so the comparison is made once more in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from fastalign.models.groups import Sequences, cut_out, separate, unpack_group
from fastalign.models.policy import Policy, register_attention
from fastalign.models.precision import HALF, roughened, trained_dtype, why_not_widened, widened
from fastalign.ops.linear_logps import linear_logps
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)

MEAN, LARGEST = 8.0, 4.0
"""How many times as far as rounding moves the plain log-probs the packed ones may be from them. Trained models come to
1.8 times on average and 1.5 times at most, random ones of 13 architectures, where as little as one token is compared,
to 3 and 1.8. One token at a position that is off by one comes to 25 in fp32, what is read or lost wrongly to 10,000."""
SAMPLE = 256
"""Scored tokens on which rounding is measured: their logits over the vocabulary are in memory together."""


@dataclass(frozen=True)
class Distance:
    """How far two sets of log-probs or scores are apart, in nats or units of the score."""

    mean: float
    largest: float

    def __str__(self) -> str:
        return f"{self.largest:.2g} at most and {self.mean:.2g} on average"


@dataclass(frozen=True)
class Rounding:
    """How far rounding alone moves a model's log-probs or scores.

    Attributes:
        distance: from those of a wider precision.
        reroutes: of a mixture of experts in half precision: rounding sends a token to another expert now and then, and
            how far that moves it has no bound. Only the closer half of the tokens is compared then.
    """

    distance: Distance
    reroutes: bool = False

    @property
    def allowed(self) -> Distance:
        """What rounding explains."""
        return Distance(MEAN * self.distance.mean, LARGEST * self.distance.largest)

    def judge(self, difference: Tensor) -> tuple[Distance, bool]:
        """The distance of absolute differences `[m]`, and whether rounding explains it; never for NaN."""
        if self.reroutes:
            difference = difference.sort().values[: -(-len(difference) // 2)]
        apart, allowed = Distance(difference.mean().item(), difference.max().item()), self.allowed
        return apart, apart.mean <= allowed.mean and apart.largest <= allowed.largest


@dataclass(frozen=True)
class Comparison:
    """Packed against plain in one precision: whether rounding explains what they differ by, and both in words."""

    agrees: bool
    rounding: Rounding
    text: str


class Plain(NamedTuple):
    """What the model's own forward gives: `[m]` for the scored tokens, and all that it could predict or scored."""

    chosen: Tensor
    every: Tensor


def verify_packed(
    policy: Policy,
    batch: PackedBatch,
    on_mismatch: Literal["raise", "fallback"] = "raise",
    name: str = "the model",
    advice: str | None = None,
    together: Callable[[bool], bool] = bool,
) -> bool:
    """Compares one group's log-probs from the packed batch with those of the plain forward.

    Forwards without gradient: the whole packed batch; the group's sequences in padded rows, as they train and in the
    next wider precision, which gives the rounding that is allowed and is kept as `policy.rounding`; and in half
    precision the same once more in fp32, of the group and a neighbour alone. Run it under the autocast of training. All
    ranks of a sharded policy must call it.

    Args:
        policy: its weights, mode and attention are left exactly as they were.
        batch: the first batch that holds a group with a shared prefix, if there is one.
        on_mismatch: `raise`, or `fallback` to warn and return False, after which the caller packs without sharing and
            verifies again.
        name: what messages call the policy.
        advice: what the user should do on disagreement; by default the settings that help, found by trying them.
        together: of several ranks, whether they agree on all of them: given what this one found, on every rank alike.

    Returns:
        Whether they agree.

    Raises:
        ValueError: on disagreement, with both numbers, when `on_mismatch` is `raise`; when the plain log-probs are not
            finite; and when a label is not the token that follows its row in any sequence of its group.
    """
    if batch.num_scored == 0:
        return True
    with torch.no_grad():
        found = _examine(policy, batch, unpack_group(batch, policy.has_scalar_head), together, name)
        policy.rounding = found.rounding
        if found.agrees:
            log.info("attention verified: %s", found.text)
            return True
        if on_mismatch == "raise":
            advice = advice or _advice(policy, batch, together)
            raise ValueError(f"{found.text}: {name} is not computed exactly on packed rows; {advice}")
    log.warning("%s: going on without sharing prefixes", found.text)
    return False


Together = Callable[[bool], bool]


def _examine(
    policy: Policy, batch: PackedBatch, group: Sequences, together: Together, name: str = "the model"
) -> Comparison:
    """The comparison as the policy trains; where that is half precision and agrees, also the one in fp32.

    Ranks that share a policy must run the same forwards: none goes on by its own verdict alone.
    """
    device = batch.input_ids.device
    plain = _plain(policy, group)
    if not together(bool((finite := plain.chosen.isfinite()).all())):
        raise ValueError(
            f"{name}'s own {_outputs(policy)} are not finite on {int((~finite).sum())} of {finite.numel()} tokens in a "
            "plain forward, without any packing: its weights hold NaN or infinity, or overflow in model.dtype; load "
            "another checkpoint"
        )
    there, rounding, how = _measure_rounding(policy, group, plain)
    found = _compare(policy, batch, group, plain, rounding, how, together)
    narrow = any(p.dtype == torch.int8 for p in policy.parameters())  # rounds activations to integers, in any dtype
    if not found.agrees or trained_dtype(policy, device) not in HALF or there is None or narrow:
        return found
    row, few = cut_out(batch, group.sample(SAMPLE)[0])
    with widened(policy, torch.float32, device):
        exact = _compare(policy, row, few, there, *_measure_rounding(policy, few, there)[1:], together)
    text = f"{found.text}; {exact.text}" if exact.agrees else exact.text
    return Comparison(exact.agrees, found.rounding, text)


def _compare(
    policy: Policy,
    batch: PackedBatch,
    group: Sequences,
    plain: Plain,
    rounding: Rounding,
    how: str,
    together: Together,
) -> Comparison:
    """Packed against plain in the present precision."""
    read = _scores if policy.has_scalar_head else _logps
    packed = policy(batch, lambda *args, **options: read(*args, keep=group.scored, **options)).double()
    apart, agrees = rounding.judge((packed - plain.chosen).abs())
    dtype = _spell(trained_dtype(policy, packed.device))
    text = (
        f"packed and plain {_outputs(policy)} in {dtype} differ by {apart} over {packed.numel()} tokens "
        f"(allowed {rounding.allowed}: {LARGEST:.0f} and {MEAN:.0f} times the rounding of the plain ones, {how})"
    )
    return Comparison(together(agrees), rounding, text)


def _measure_rounding(policy: Policy, group: Sequences, plain: Plain) -> tuple[Plain | None, Rounding, str]:
    """The plain log-probs in a wider precision, if that can be; how far rounding moves them; how that was measured.

    It is measured over the whole vocabulary, as the few labels of a small group may be met by little of it.
    """
    device = group.input_ids.device
    few, kept = group.sample(SAMPLE)
    dtype = trained_dtype(policy, device)
    wider = torch.float32 if dtype in HALF else torch.float64
    there, how, reason = None, f"measured against {_spell(wider)}", why_not_widened(policy, wider)
    if reason is None:
        try:
            with widened(policy, wider, device):
                there = _plain(policy, few)
        except RuntimeError as error:  # no memory, or an operation that is not made for this dtype
            reason = f"it cannot run in {_spell(wider)} ({str(error).splitlines()[0]})"
    if there is not None and not there.chosen.isfinite().all():
        there, reason = None, f"it is not finite in {_spell(wider)}"
    if there is None:
        how = f"measured with one rounding more in each layer, as {reason}"
    with roughened(policy, dtype) if there is None else nullcontext():
        moved = there or _plain(policy, few)
    every = plain.every if policy.has_scalar_head else plain.every[kept]
    parts = [(a.double() - b).abs() for a, b in ((plain.chosen[kept], moved.chosen), (every, moved.every))]
    parts = [part[part.isfinite()] for part in parts]  # some models never predict some tokens
    least = torch.finfo(torch.float32).eps / 2 * max(1.0, plain.chosen.abs().max().item())  # of the result itself
    means, peaks = ([of(part).item() for part in parts if part.numel()] for of in (torch.mean, torch.max))
    reroutes = dtype in HALF and policy.model._can_set_experts_implementation()
    return there, Rounding(Distance(max(least, *means), max(least, *peaks)), reroutes), how


def _outputs(policy: Policy) -> str:
    return "scores" if policy.has_scalar_head else "log-probs"


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _advice(policy: Policy, batch: PackedBatch, together: Together) -> str:
    """The settings that were tried, and those with which packed and plain agree."""
    tried = dict(_remedies(policy, batch, together))
    if helpful := [setting for setting, helps in tried.items() if helps]:
        return f"it is with {' or with '.join(helpful)}: set that"
    also = f" (tried: {'; '.join(tried)})" if tried else ""
    return f"no setting helps{also}: choose another model"


def _remedies(policy: Policy, batch: PackedBatch, together: Together) -> Iterator[tuple[str, bool]]:
    """Each setting that changes anything here, and whether packed and plain agree with it."""
    device, was = batch.input_ids.device, policy.attention
    group = unpack_group(batch, policy.has_scalar_head)
    if was != (sdpa := register_attention("sdpa")):
        policy.use_attention(sdpa)
        helps = _examine(policy, batch, group, together).agrees
        policy.use_attention(was)
        yield "model.attention sdpa", helps
    if batch.depth > 1:
        yield "batch.share_prefix false", _examine(policy, *separate(group), together).agrees
    if trained_dtype(policy, device) in HALF and why_not_widened(policy) is None:
        with widened(policy, torch.float32, device):
            helps = _examine(policy, *cut_out(batch, group), together).agrees
        yield "model.dtype float32 and model.autocast false", helps


def _logps(hidden: Tensor, weight: Tensor, labels: Tensor, *, keep: Tensor, **options: Any) -> Tensor:
    """Log-probs of some scored tokens through the fused head."""
    logps = linear_logps(hidden[keep], weight, labels[keep], **options)
    assert isinstance(logps, Tensor)
    return logps


def _scores(hidden: Tensor, weight: Tensor, labels: Tensor, *, keep: Tensor, bias: Tensor | None = None) -> Tensor:
    """Outputs of a scalar head at some scored tokens."""
    return nn.functional.linear(hidden[keep], weight, bias)[:, 0]


def _plain(policy: Policy, group: Sequences) -> Plain:
    """Log-probs (or scores) of the group from the model's own forward in stock attention."""
    if "plain_logits" not in vars(policy):
        register_fsdp_forward_method(policy, "plain_logits")  # does nothing to a policy that is not sharded
    scalar = policy.has_scalar_head
    positions, index = group.position.unique(return_inverse=True)
    if scalar:  # cheap at every position, and few are scored
        positions, index = torch.arange(group.input_ids.shape[1], device=positions.device), group.position
    with stock_attention(policy):
        logits = policy.plain_logits(group.input_ids, positions)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    every = logits[group.sequence, index] if scalar else logits[group.sequence, index].log_softmax(-1)
    chosen = every[:, 0] if scalar else every.gather(1, group.labels[:, None])[:, 0]
    return Plain(chosen, logits if scalar else every)


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
        policy.use_attention(policy.attention)
