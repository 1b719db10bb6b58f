"""The training methods, and the way from a configuration's ``loss`` section to an objective."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastalign.data.pack import empty_batch
from fastalign.engine import readings
from fastalign.engine.method import Method, Objective
from fastalign.losses import distillation, preference, ranking, reward, supervised, unpaired
from fastalign.losses.mixture import Losses, settings
from fastalign.types import TokenStats


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
    for key, value in options.items():
        pick(accepted, key, f"keyword of loss {'+'.join(losses)!r}")
        if key in WEIGHTS and not value >= 0:
            raise ValueError(f"loss.{key} must be at least 0, got {value}")
    bare = Objective(chosen, tuple(losses), {**accepted, **options}, data_of(method, tuple(losses)))
    _, metrics = bare.loss_fn(empty_batch(), 1.0)(nothing(bare))
    return replace(bare, metric_names=tuple(sorted(metrics)))


def choose(method: Method, name: str | list[str] | None) -> Losses:
    """The losses that a configuration names, by their canonical names; the method's default for None."""
    asked = [name] if isinstance(name, str) else name or [next(iter(method.losses))]
    names = [method.aliases.get(one, one) for one in asked]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"loss.name: {', '.join(repeated)} stands more than once; name each loss of a sum once")
    return {name: pick(method.losses, name, "loss.name") for name in names}


def pick(table: Mapping[str, Any], key: str, what: str) -> Any:
    """``table[key]``, or a ValueError that names the nearest accepted key and all of them."""
    if key in table:
        return table[key]
    close = difflib.get_close_matches(key, table, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {what} {key!r}: expected one of {', '.join(table) or '(none)'}{hint}")


def data_of(method: str, names: tuple[str, ...]) -> str:
    """What `encode_dataset` is to make of rows: the method, or one of its losses that reads other rows."""
    special = f"{method}:{names[0]}"
    return special if special in SPECIAL_DATA else method


def nothing(objective: Objective) -> Any:
    """What the head makes of no row at all."""
    floats, rows = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    if objective.head == "scores":
        return floats
    stats = TokenStats(floats, rows, entropy=floats, is_top1=floats.bool())
    if objective.method.align != "token":
        stats = replace(stats, sequences=rows, cu_seqlens=torch.zeros(1, dtype=torch.int64))
    return replace(stats, divergence=floats, is_top1=None) if objective.head == "distributions" else stats


SPECIAL_DATA = frozenset({"reward:soft_label", "reward:k_wise", "reward:process"})
"""Losses that read other rows than their method's default."""

WEIGHTS = frozenset(
    {"center_coef", "cpo_alpha", "desirable_weight", "lam", "nll_weight", "rank_weight", "undesirable_weight"}
)
"""Keywords that weigh a part of a loss; below 0 that part would be driven the wrong way, without bound."""

METHODS = {
    "sft": Method(
        align="token",
        losses=supervised.LOSSES,
        build=readings.supervised_loss,
        per_token=frozenset(supervised.LOSSES),
        reference_free=frozenset(supervised.LOSSES),
        derive=readings.perplexity,
    ),
    "reward": Method(
        align="token",
        losses=reward.LOSSES,
        build=readings.reward_loss,
        scalar_head=True,
        per_token=reward.PER_TOKEN,
        reference_free=frozenset(reward.LOSSES),
        derive=readings.calibration,
    ),
    "dpo": Method(
        align="pair",
        losses=preference.LOSSES,
        build=readings.preference_loss,
        aliases=preference.ALIASES,
        reference_free=preference.REFERENCE_FREE,
        distributions=preference.READS_KLS,
        imitated=lambda batch: int(batch.cu_seqlens.diff()[0::2].sum()),
        imitates=preference.IMITATES,
        step_coupled=preference.STEP_COUPLED,
        derive=readings.chosen_perplexity,
    ),
    "kto": Method(
        align="sequence",
        losses=unpaired.LOSSES,
        build=readings.unpaired_loss,
        step_coupled=unpaired.STEP_COUPLED,
        mismatched=unpaired.READS_MISMATCHED,
        derive=readings.margin_of_means,
    ),
    "rrhf": Method(
        align="group",
        losses=ranking.LOSSES,
        build=readings.ranking_loss,
        reference_free=frozenset(ranking.LOSSES),
    ),
    "distill": Method(
        align="token",
        losses=distillation.LOSSES,
        build=readings.distillation_loss,
        per_token=frozenset(distillation.LOSSES),
        distributions=frozenset(distillation.LOSSES),
        teacher=True,
    ),
}
