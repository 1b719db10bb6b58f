"""The torch backend of ``policy_loss``, and its two halves: a table from statistics, a gradient from the table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastalign.ops import functors
from fastalign.ops.backends.torch.token_logps import backward, forward
from fastalign.ops.functors import COLUMNS, Knobs, columns
from fastalign.ops.rows import Coefficients, Stats
from fastalign.types import IGNORE_INDEX


def run(
    out: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    loss: str,
    kl_estimator: str,
    knobs: Knobs,
    entropy: bool,
    temperature: float | Tensor,
    softcap: float | None,
) -> Tensor:
    """Stats, functor, gradient: two sweeps of ``token_logps``. See ``cpp.policy_loss.run``."""
    scaling: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    found = forward(logits, labels, **scaling, entropy=entropy or knobs.entropy_coef != 0, top1=True)
    rows = (weights, advantages, old_logps, ref_logps)
    table = tabulate(found, labels, *rows, loss=loss, kl_estimator=kl_estimator, knobs=knobs)
    if out is not None:
        write_gradient(out, logits, labels, columns(table), knobs, backward, **scaling)
    return table


def tabulate(found: Stats, labels: Tensor, *rows: Tensor | None, loss: str, kl_estimator: str, knobs: Knobs) -> Tensor:
    """The table of ``COLUMNS`` from the statistics of ``token_logps`` and what is given per row."""
    logps, entropies, maximum, logsum, _, top1 = found
    table = logps.new_zeros(len(COLUMNS), len(labels))
    column = columns(table)
    for name, x in {"logps": logps, "entropy": entropies, "max": maximum, "logsum": logsum, "top1": top1}.items():
        if x is not None:
            column[name].copy_(x)
    functors.fill(table, labels == IGNORE_INDEX, *rows, loss=loss, kl_estimator=kl_estimator, knobs=knobs)  # pyright: ignore
    return table


def write_gradient(out: Tensor, logits: Tensor, labels: Tensor, column: dict[str, Tensor], knobs, sweep, **scaling):
    """The gradient of the summed losses from the logits and a table, by the backward sweep of ``token_logps``."""
    bonus = (column["alpha"], column["beta"]) if knobs.entropy_coef != 0 else ()
    sweep(out, logits, labels, column["max"], column["logsum"], Coefficients(column["g"], *bonus), **scaling)
