"""Liger's loss of completions called good or bad: KTO."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastalign.integrations._fields import Scaling, mean_logits
from fastalign.integrations.liger.rows import reference_logps, scored_rows
from fastalign.losses.pairs import token_counts
from fastalign.losses.reduce import lengths, segment_sum
from fastalign.losses.unpaired import kto
from fastalign.ops import linear_loss
from fastalign.types import LabelledLogps, TokenStats


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO: ``1 - s(beta y (log-ratio - kl))``, ``y`` +1 for good and -1 for bad, averaged over the batch.

    ``kl`` is one number for the batch, as TRL passes it; Liger's broadcasting of a ``[B]`` tensor is refused. ``kl`` is
    not clamped here.

    Returns of a call: loss, and the sums over good and over bad sequences of log-probs, of logits at all positions and
    of rewards: (chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards, rejected_rewards).

    Raises:
        ValueError: a missing reference or label, a ``kl`` of several numbers.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[B, S, D]``, ``[V, D]``, ``[B, S]``, ``[V]``, ``[B]`` bool; the reference; one number."""
        if preference_labels is None or preference_labels.shape != target.shape[:1]:
            raise ValueError(f"preference_labels must be [B] with B = {len(target)} sequences")
        rows, good = scored_rows(target, target != self.ignore_index), preference_labels.bool()
        ref = reference_logps(rows, ref_input, ref_weight, ref_bias) if self.use_ref_model else None
        baseline = _baseline(kl, target.device)

        def batch_of(logps: Tensor, cu_seqlens: Tensor, ref: Tensor | None, good: Tensor) -> LabelledLogps:
            divisor = token_counts(lengths(cu_seqlens)) if self.average_log_prob else 1
            sums = segment_sum(logps, cu_seqlens) / divisor
            ref_sums = torch.zeros_like(sums) if ref is None else segment_sum(ref, cu_seqlens) / divisor
            return LabelledLogps(sums, ref_sums, good, baseline)

        def loss_fn(stats: TokenStats) -> Tensor:
            assert stats.cu_seqlens is not None and stats.sequences is not None
            part = None if ref is None else ref[stats.rows]
            batch = batch_of(stats.logps, stats.cu_seqlens, part, good[stats.sequences])
            return kto(batch, beta=self.beta).sum() / len(target)

        options = {"cu_seqlens": rows.cu_seqlens, "align": "sequence", "bias": bias, "num_scored": len(rows.labels)}
        loss, stats = linear_loss(rows.of(_input), lin_weight, rows.labels, loss_fn, **options)
        batch = batch_of(stats.logps, rows.cu_seqlens, ref, good)
        with torch.no_grad():
            logits = mean_logits(_input.flatten(0, 1), lin_weight, bias, Scaling()) * len(lin_weight)
        results = (batch.logps, logits.view(target.shape).sum(1), self.beta * (batch.logps - batch.ref_logps))
        return loss, tuple(x[side].sum() for x in results for side in (good, ~good))


def _baseline(kl: Tensor | None, device: torch.device) -> Tensor:
    """The number that log-ratios are measured from; 0 without one."""
    mean = torch.zeros((), dtype=torch.float64, device=device) if kl is None else torch.as_tensor(kl, device=device)
    if mean.numel() != 1:
        raise ValueError(f"kl must be one number for the batch, got shape {list(mean.shape)}; pass its mean")
    return mean.detach().double().reshape(())
