"""Distillation: the student's whole distribution follows the teacher's, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastalign.losses.traits import Family, Loss


def gkd(divergence: Callable[..., Tensor], *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """GKD: generalised Jensen-Shannon divergence of student and teacher, over the whole vocabulary.

    ``l_t = beta KL(pi || M) + (1 - beta) KL(p || M)`` with ``M = beta pi + (1 - beta) p`` of the teacher ``pi`` and the
    student ``p`` at the same temperature; ``KL(pi || p)`` for beta 0 and ``KL(p || pi)`` for beta 1, which are not its
    limits: the scale jumps. No factor of the squared temperature.
    Source: Agarwal et al. 2023 (arXiv:2306.13649), eq. 1.

    Args:
        divergence: ``fastalign.ops.divergence`` or ``linear_divergence`` with both models' data bound; called once with
            ``kind``, ``mix`` and ``temperature``.
        beta: weight of the teacher in the mixture, between 0 and 1.
        temperature: of both distributions.

    Returns:
        ``[n]`` losses, to be reduced by ``token_mean``.
    """
    return divergence(**divergence_options(beta, temperature))


def divergence_options(beta: float, temperature: float) -> dict[str, Any]:
    """The keyword arguments of a divergence op that `gkd` means.

    Raises:
        ValueError: ``beta`` outside of [0, 1], or a temperature that is not above 0.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"gkd: beta must be in [0, 1], got {beta}")
    if not temperature > 0:
        raise ValueError(f"gkd: temperature must be above 0, got {temperature}")
    endpoints = {0.0: "forward_kl", 1.0: "reverse_kl"}
    kind = endpoints.get(float(beta))
    mixture = {"kind": "jsd", "mix": beta} if kind is None else {"kind": kind}
    return {**mixture, "temperature": temperature}


LOSSES = {"gkd": Loss(gkd, distributions=True, per_token=True)}
FAMILY = Family(
    "Distillation",
    "Rows as for demonstrations, and a teacher with the policy's vocabulary in `reference.path`; that of the "
    "example is what `fastalign sft --config examples/sft.yaml` leaves. No distribution "
    "is kept: both heads are swept together.",
    "`loss` falls towards 0; `nll` says how the student fares on the data themselves; `entropy`.",
    LOSSES,
)
