"""What sets one training method apart: how a packed batch is counted, chunked and turned into a loss."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastalign.losses import preference, supervised
from fastalign.losses.mixture import Losses, settings, weighted_sum
from fastalign.losses.pairs import pair_logps
from fastalign.losses.reduce import sum_and_count
from fastalign.types import PackedBatch, PairLogps, TokenStats

Align = Literal["token", "sequence", "pair", "group"]
"""What a chunk of the head may not split."""
LossFn = Callable[[TokenStats], tuple[Tensor, dict[str, Tensor]]]
"""What `linear_loss` calls once per chunk: the chunk's share of the loss, and ``[2]`` (sum, count) per metric."""


@dataclass(frozen=True)
class Method:
    """How the loop treats one method.

    Attributes:
        align: what a chunk of the head may not split.
        count: how many units of a batch the loss is a mean over.
        losses: the losses it can name; the first is the default.
        build: ``(objective, ref_logps [N] | None, scale, facts) -> LossFn``.
        aliases: other spellings of the losses.
        reference_free: losses that read no reference.
        imitated: how many tokens of a batch an imitation term is a mean over.
        imitates: losses with an imitation term.
        step_coupled: losses that need the log-probs of the whole step before any coefficient.
        perplexity: a mean negative log-likelihood among the metrics, and the name under which its exp is reported.
    """

    align: Align
    count: Callable[[PackedBatch], int]
    losses: Mapping[str, Callable[..., Tensor]]
    build: Callable[[Objective, Tensor | None, float, StepFacts], LossFn]
    aliases: Mapping[str, str] = field(default_factory=dict)
    reference_free: frozenset[str] = frozenset()
    imitated: Callable[[PackedBatch], int] = lambda batch: 0
    imitates: frozenset[str] = frozenset()
    step_coupled: frozenset[str] = frozenset()
    perplexity: tuple[str, str] = ("loss", "perplexity")


@dataclass(frozen=True)
class StepFacts:
    """What a loss may know of the whole optimizer step, over all ranks, before its first coefficient.

    Attributes:
        imitated_per_unit: tokens of the imitation term per unit of the loss; None: of these units alone.
        pairs: the log-probs of all pairs, for losses that are coupled over the step.
        first_pair: position of the batch's first pair in them.
    """

    imitated_per_unit: float | None = None
    pairs: PairLogps | None = None
    first_pair: int = 0


NO_FACTS = StepFacts()


@dataclass(frozen=True)
class Objective:
    """A method with its loss chosen.

    Attributes:
        method: how batches are read.
        names: the loss, or the losses that are summed.
        options: their keyword arguments.
        metric_names: the metrics that its loss function returns, sorted; the same on every rank.
    """

    method: Method
    names: tuple[str, ...]
    options: dict[str, Any]
    metric_names: tuple[str, ...] = ()

    @property
    def name(self) -> str | list[str]:
        """The loss as a configuration names it."""
        return self.names[0] if len(self.names) == 1 else list(self.names)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads reference log-probs."""
        return not self.method.reference_free.issuperset(self.names)

    @property
    def imitates(self) -> bool:
        """Whether a loss has an imitation term."""
        return not self.method.imitates.isdisjoint(self.names)

    @property
    def is_step_coupled(self) -> bool:
        """Whether a loss needs the log-probs of the whole step first."""
        return not self.method.step_coupled.isdisjoint(self.names)

    def losses(self, data: Any) -> Tensor:
        """The loss function, or the weighted sum of several, on its data with options bound."""
        return weighted_sum({name: self.method.losses[name] for name in self.names}, data, self.options)

    def loss_fn(self, ref_logps: Tensor | None, scale: float, facts: StepFacts = NO_FACTS) -> LossFn:
        """The function that `linear_loss` differentiates; ``scale`` multiplies the sum of losses."""
        return self.method.build(self, ref_logps, scale, facts)


def make_objective(method: str, loss: Mapping[str, Any]) -> Objective:
    """Choose a method's loss from the ``loss`` section of a configuration.

    Args:
        method: a key of ``METHODS``.
        loss: ``name`` (default: the method's own), or several and ``loss_weights``; and their keyword arguments.

    Raises:
        ValueError: an unknown method, loss or keyword, with the accepted ones.
    """
    chosen = pick(METHODS, method, "method")
    losses = choose(chosen, loss.get("name"))
    options = {key: value for key, value in loss.items() if key != "name"}
    accepted = settings(losses)
    for key in options:
        pick(accepted, key, f"keyword of loss {'+'.join(losses)!r}")
    bare = Objective(chosen, tuple(losses), {**accepted, **options})
    _, metrics = bare.loss_fn(None, 1.0)(empty_stats(chosen))
    return replace(bare, metric_names=tuple(sorted(metrics)))


def choose(method: Method, name: str | list[str] | None) -> Losses:
    """The losses that a configuration names, by their canonical names; the method's default for None."""
    asked = [name] if isinstance(name, str) else name or [next(iter(method.losses))]
    names = [method.aliases.get(one, one) for one in asked]
    return {name: pick(method.losses, name, "loss.name") for name in names}


def pick(table: Mapping[str, Any], key: str, what: str) -> Any:
    """``table[key]``, or a ValueError that names the nearest accepted key and all of them."""
    if key in table:
        return table[key]
    close = difflib.get_close_matches(key, table, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {what} {key!r}: expected one of {', '.join(table) or '(none)'}{hint}")


def empty_stats(method: Method) -> TokenStats:
    """The statistics of no row at all."""
    nothing = torch.zeros(0)
    rows = torch.zeros(0, dtype=torch.int64)
    offsets = None if method.align == "token" else torch.zeros(1, dtype=torch.int64)
    sequences = None if offsets is None else rows
    return TokenStats(nothing, rows, nothing, nothing.bool(), sequences, offsets)


def supervised_loss(objective: Objective, ref_logps: Tensor | None, scale: float, facts: StepFacts) -> LossFn:
    """Token losses: ``scale * sum_t l_t``."""

    def loss_fn(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        losses = objective.losses(stats.logps)
        return losses.sum() * scale, supervised.metrics(stats, losses)

    return loss_fn


def preference_loss(objective: Objective, ref_logps: Tensor | None, scale: float, facts: StepFacts) -> LossFn:
    """Pair losses: ``scale * sum_p l_p``; the reference's log-probs are looked up by row."""
    if not objective.options.get("beta", 1) > 0:
        raise ValueError(f"loss.beta must be above 0, got {objective.options['beta']}")
    tails = not preference.READS_TAILS.isdisjoint(objective.names)
    known = {"tails": tails, "mean_chosen_length": facts.imitated_per_unit}

    def loss_fn(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        assert stats.cu_seqlens is not None and stats.sequences is not None
        reference = None if ref_logps is None else ref_logps[stats.rows]
        pair = pair_logps(stats.logps, stats.cu_seqlens, reference, **known)
        if facts.pairs is not None:
            pair = replace(pair, step=facts.pairs, places=facts.first_pair + stats.sequences[0::2] // 2)
        losses = objective.losses(pair)
        metrics = preference.metrics(pair, losses, objective.names, objective.options)
        return losses.sum() * scale, {**metrics, **pair_metrics(pair), **supervised.token_metrics(stats)}

    return loss_fn


def pair_metrics(pair: PairLogps) -> dict[str, Tensor]:
    """What the policy says of the pairs without a reference: does it prefer the chosen, at what cost per token."""
    return {
        "logps/accuracies": sum_and_count(pair.chosen > pair.rejected),
        "nll/chosen": torch.stack([-sum_and_count(pair.chosen)[0], sum_and_count(pair.chosen_lengths)[0]]),
    }


METHODS = {
    "sft": Method(
        align="token",
        count=lambda batch: batch.num_scored,
        losses=supervised.LOSSES,
        build=supervised_loss,
        reference_free=frozenset(supervised.LOSSES),
    ),
    "dpo": Method(
        align="pair",
        count=lambda batch: batch.num_sequences // 2,
        losses=preference.LOSSES,
        build=preference_loss,
        aliases=preference.ALIASES,
        reference_free=preference.REFERENCE_FREE,
        imitated=lambda batch: int(batch.cu_seqlens.diff()[0::2].sum()),
        imitates=preference.IMITATES,
        step_coupled=preference.STEP_COUPLED,
        perplexity=("nll/chosen", "perplexity/chosen"),
    ),
}
