"""One loss or a weighted sum of several, and their keyword arguments: the section ``loss`` of a configuration.

    loss: {name: dpo, beta: 0.1}            loss: {name: [dpo, sft], loss_weights: [1.0, 0.2], beta: 0.1}

A keyword that several losses have is one setting for all of them, with the first one's default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastalign.losses.traits import keywords

Losses = Mapping[str, Callable[..., Tensor]]
"""The losses of a sum by name; a single one for no sum."""


def settings(losses: Losses) -> dict[str, Any]:
    """The keyword arguments of all the losses with their defaults, and ``loss_weights`` when there are several."""
    known: dict[str, Any] = {"loss_weights": None} if len(losses) > 1 else {}
    for loss in losses.values():
        known |= {key: value for key, value in keywords(loss).items() if key not in known}
    return known


def weighted_sum(losses: Losses, options: Mapping[str, Any], *data: Any) -> Tensor:
    """``sum_i loss_weights_i loss_i(*data)``, each loss with the keywords it has.

    Args:
        losses: the losses by name.
        options: values of ``settings``, all or some.
        data: what each of them reads, the same for all.

    Raises:
        ValueError: not as many weights as losses.
    """
    weights = options.get("loss_weights") or [1.0] * len(losses)
    if len(weights) != len(losses):
        raise ValueError(f"loss_weights: expected {len(losses)}, one for each of {', '.join(losses)}; got {weights}")
    parts = [loss(*data, **{k: options[k] for k in keywords(loss) if k in options}) for loss in losses.values()]
    return add([part if weight == 1 else weight * part for weight, part in zip(weights, parts, strict=True)])


def add(parts: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor or more; a single one is returned as it is, to the last bit."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
