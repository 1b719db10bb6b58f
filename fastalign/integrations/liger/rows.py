"""From Liger's padded batches to the scored rows that the ops take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.models.policy import gather_rows
from fastalign.ops import linear_logps


class Rows(NamedTuple):
    """The scored rows of a batch ``[B, S]``, sequence after sequence.

    Attributes:
        index: ``[N]`` positions in the flattened batch.
        labels: ``[N]``.
        cu_seqlens: ``[B+1]`` offsets of the sequences.
    """

    index: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def of(self, x: Tensor) -> Tensor:
        """The rows of a tensor ``[B, S]`` or ``[B, S, D]``, differentiable."""
        return gather_rows(x.flatten(0, 1), self.index)


def scored_rows(target: Tensor, scored: Tensor, order: Tensor | None = None) -> Rows:
    """The scored rows of ``target [B, S]``, its sequences taken in ``order``."""
    if target.dim() != 2:
        raise ValueError(f"target must be [B, S], got shape {list(target.shape)}")
    where = torch.arange(target.numel(), device=target.device).view(target.shape)
    if order is not None:
        where, scored = where[order], scored[order]
    index = where[scored]
    counts = torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0))
    return Rows(index, target.flatten()[index], counts)


def neighbours(sequences: int, device: torch.device) -> Tensor:
    """The order in which the halves, chosen and rejected, become neighbours: 0, P, 1, P + 1, ..."""
    if sequences % 2:
        raise ValueError(f"the batch must hold chosen sequences, then as many rejected ones; got {sequences} sequences")
    return torch.arange(sequences, device=device).view(2, -1).t().flatten()


def reference_logps(
    rows: Rows, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """``[N]`` log-probs of the scored rows under the reference, without a graph."""
    if ref_input is None or ref_weight is None:
        raise ValueError("use_ref_model=True needs ref_input and ref_weight")
    with torch.no_grad():
        options = {"bias": ref_bias, "temperature": temperature, "num_scored": len(rows.labels)}
        logps = linear_logps(rows.of(ref_input), ref_weight, rows.labels, **options)
    assert isinstance(logps, Tensor)
    return logps


def refuse(option: str, value: object, instead: str) -> None:
    """Refuses an option that is not served.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{option}={value!r} is not served: {instead}")
