"""What sets one training method apart: how a packed batch is counted, chunked and turned into a loss."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastalign.losses import preference, supervised
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
        build: ``(objective, ref_logps [N] | None, scale) -> LossFn``.
        aliases: other spellings of the losses.
        reference_free: losses that read no reference.
        perplexity: a mean negative log-likelihood among the metrics, and the name under which its exp is reported.
    """

    align: Align
    count: Callable[[PackedBatch], int]
    losses: Mapping[str, Callable[..., Tensor]]
    build: Callable[[Objective, Tensor | None, float], LossFn]
    aliases: Mapping[str, str] = field(default_factory=dict)
    reference_free: frozenset[str] = frozenset()
    perplexity: tuple[str, str] = ("loss", "perplexity")


@dataclass(frozen=True)
class Objective:
    """A method with its loss chosen.

    Attributes:
        method: how batches are read.
        name: the loss.
        options: its keyword arguments.
        metric_names: the metrics that its loss function returns, sorted; the same on every rank.
    """

    method: Method
    name: str
    options: dict[str, Any]
    metric_names: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads reference log-probs."""
        return self.name not in self.method.reference_free

    def losses(self, data: Any) -> Tensor:
        """The loss function on its data, options bound."""
        return self.method.losses[self.name](data, **self.options)

    def loss_fn(self, ref_logps: Tensor | None, scale: float) -> LossFn:
        """The function that `linear_loss` differentiates; ``scale`` multiplies the sum of losses."""
        return self.method.build(self, ref_logps, scale)


def make_objective(method: str, loss: Mapping[str, Any]) -> Objective:
    """Choose a method's loss from the ``loss`` section of a configuration.

    Args:
        method: a key of ``METHODS``.
        loss: ``name`` (default: the method's own) and the keyword arguments of that loss.

    Raises:
        ValueError: an unknown method, loss or keyword, with the accepted ones.
    """
    chosen = pick(METHODS, method, "method")
    name = loss.get("name") or next(iter(chosen.losses))
    name = chosen.aliases.get(name, name)
    options = {key: value for key, value in loss.items() if key != "name"}
    accepted = keywords(pick(chosen.losses, name, "loss.name"))
    for key in options:
        pick(accepted, key, f"keyword of loss {name!r}")
    bare = Objective(chosen, name, {**accepted, **options})
    _, metrics = bare.loss_fn(None, 1.0)(empty_stats(chosen))
    return Objective(chosen, name, bare.options, tuple(sorted(metrics)))


def keywords(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """The keyword arguments of a loss with their defaults: its part of the configuration."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


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


def supervised_loss(objective: Objective, ref_logps: Tensor | None, scale: float) -> LossFn:
    """Token losses: ``scale * sum_t l_t``."""

    def loss_fn(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        losses = objective.losses(stats.logps)
        return losses.sum() * scale, supervised.metrics(stats, losses)

    return loss_fn


def preference_loss(objective: Objective, ref_logps: Tensor | None, scale: float) -> LossFn:
    """Pair losses: ``scale * sum_p l_p``; the reference's log-probs are looked up by row."""

    def loss_fn(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        assert stats.cu_seqlens is not None
        reference = None if ref_logps is None else ref_logps[stats.rows]
        pair = preference.pair_logps(stats.logps, stats.cu_seqlens, reference)
        losses = objective.losses(pair)
        metrics = preference.metrics(pair, losses, objective.name, objective.options["beta"])
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
        perplexity=("nll/chosen", "perplexity/chosen"),
    ),
}
