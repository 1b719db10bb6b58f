"""Liger's policy-gradient losses of completions: GRPO, its variants and its KL penalty."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastalign.integrations.liger.rows import Rows, reference_logps, refuse, scored_rows
from fastalign.losses import policy
from fastalign.losses.reduce import Totals, repeat_segments, segment_sum, token_weights
from fastalign.ops import linear_loss
from fastalign.types import TokenStats

REDUCTIONS = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "constant",
}
"""Of the losses that are served."""


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO and its variants, with the KL penalty (k3) in the loss.

    ``loss_type`` is one of ``dapo grpo bnpo dr_grpo cispo sapo``; ``luspo`` and ``vespo`` are not served, nor is
    ``use_bias_correction_kl``. ``epsilon_high`` of ``cispo`` is the bound of the ratio itself. ``delta`` bounds the
    ratio from above, at ``1 + epsilon_high`` or more, for token ratios. Log-ratios are clamped to +-20 before ``exp``
    (a sequence's mean from above to 10), which Liger does not do. Losses are those of ``fastalign.losses.policy``.

    Returns of a call: loss, (kl, clip_ratio) with ``beta``, (clip_ratio,) without: means over tokens.

    Raises:
        ValueError: an option that is not served, or a setting that is missing.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        if loss_type not in REDUCTIONS:
            refuse("loss_type", loss_type, f"choose one of {', '.join(REDUCTIONS)}")
        if use_bias_correction_kl:
            refuse("use_bias_correction_kl", True, "the KL penalty is k3 without an importance weight")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length")
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.temperature = temperature
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length or 1
        self.sequences = importance_sampling_level == "sequence"
        clips = {"clip_low": epsilon_low, "clip_high": epsilon_high}
        self.clips = clips if loss_type not in ("cispo", "sapo") else {}
        if importance_sampling_level not in ("token", "sequence") or (self.sequences and not self.clips):
            refuse("importance_sampling_level", importance_sampling_level, f"{loss_type} takes 'token'")
        self.cap = epsilon_high if loss_type == "cispo" else None
        losses = {
            "cispo": partial(policy.cispo, ratio_max=epsilon_high),
            "sapo": partial(policy.sapo, tau_pos=sapo_temperature_pos, tau_neg=sapo_temperature_neg),
        }
        self.loss: Callable[..., Tensor] = losses.get(loss_type, partial(policy.ppo, **clips, dual_clip=delta))
        if self.sequences:
            self.loss = partial(policy.gspo, **clips)
        if delta is not None and (self.sequences or not self.clips or delta < 1 + epsilon_high):
            refuse("delta", delta, "it bounds token ratios of the clipped losses, at 1 + epsilon_high or more")

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[B, S, D]``, ``[V, D]``, ``[B, S]``, ``[B, S]``, ``[B]``, ``[V]``; log-probs ``[B, S]``; the reference.

        ``vllm_is_ratio`` ``[B, S]``, ``[B, 1]`` or ``[B]`` weighs the loss of each token before the KL penalty.
        ``num_items_in_batch`` counts the tokens of all micro-batches and ranks, for ``dapo`` and ``cispo``.
        """
        rows = scored_rows(selected_token_ids, attention_mask != 0)
        given = {"advantages": advantages.view(-1, 1), "old": old_per_token_logps, "importance": vllm_is_ratio}
        known = {name: _of_rows(rows, x, attention_mask) for name, x in given.items() if x is not None}
        if self.use_ref_model and self.beta:
            known["ref"] = (
                reference_logps(rows, ref_input, ref_weight, ref_bias, self.temperature)
                if ref_per_token_logps is None
                else _of_rows(rows, ref_per_token_logps, attention_mask)
            )
        known["weights"] = self._weights(rows, num_items_in_batch)
        loss, stats = linear_loss(
            rows.of(_input),
            lin_weight,
            rows.labels,
            lambda stats: self._of_chunk(stats, {name: x[stats.rows] for name, x in known.items()}),
            cu_seqlens=rows.cu_seqlens,
            align="sequence" if self.sequences else "token",
            bias=bias,
            temperature=self.temperature,
            num_scored=len(rows.labels),
        )
        tokens = max(1, len(rows.labels))
        names = ["kl", "clipped"] if self.beta else ["clipped"]
        return loss, tuple(stats.metrics.get(name, loss.new_zeros(())) / tokens for name in names)

    def _weights(self, rows: Rows, num_items: Tensor | int | None) -> Tensor:
        """``[N]`` weight of each token's loss."""
        tokens = torch.as_tensor(len(rows.labels), device=rows.labels.device)
        if self.loss_type in ("dapo", "cispo"):
            tokens = _global_tokens(tokens, num_items)
        sequences, budget = len(rows.cu_seqlens) - 1, self.max_completion_length
        totals = Totals(tokens=tokens.clamp(min=1), sequences=sequences, budget=budget)
        return token_weights(REDUCTIONS[self.loss_type], rows.cu_seqlens, totals)

    def _of_chunk(self, stats: TokenStats, known: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The chunk's share of the loss, and its sums of KL and clipped tokens."""
        logps, advantages = stats.logps, known["advantages"]
        old = known.get("old", logps.detach())
        sequences = () if not self.sequences else (stats.cu_seqlens,)
        losses = self.loss(logps, old, advantages, *sequences) * known.get("importance", 1.0)
        metrics = {"clipped": self._clipped(logps.detach(), old, advantages, stats.cu_seqlens).sum()}
        if self.beta:
            kl = policy.k3(logps, known.get("ref", logps.detach()))
            losses, metrics["kl"] = losses + self.beta * kl, kl.sum()
        return (known["weights"] * losses).sum().to(logps.dtype), metrics

    def _clipped(self, logps: Tensor, old: Tensor, advantages: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """``[n]`` bool: the tokens on which a bound acts."""
        ratio = policy.token_ratio(logps, old)
        if self.sequences and cu_seqlens is not None:
            counts = cu_seqlens.diff()
            mean = segment_sum(logps - old, cu_seqlens) / counts.clamp(min=1)
            ratio = repeat_segments(mean.exp(), cu_seqlens)
        if self.clips:
            bounds = 1 - self.clips["clip_low"], 1 + self.clips["clip_high"]
            low, high = policy.clip_bounds(ratio, advantages, *bounds)
            return low | high
        return torch.zeros_like(ratio, dtype=torch.bool) if self.cap is None else (advantages > 0) & (ratio > self.cap)


def _of_rows(rows: Rows, x: Tensor, like: Tensor) -> Tensor:
    """``[N]`` fp32 values of the scored rows, from ``[B, S]``, ``[B, 1]`` or ``[B]``."""
    x = x.view(-1, 1) if x.dim() == 1 else x
    if x.shape[0] != like.shape[0] or x.shape[1] not in (1, like.shape[1]):
        raise ValueError(f"expected [B, S], [B, 1] or [B] with [B, S] = {list(like.shape)}, got {list(x.shape)}")
    return x.detach().float().expand(like.shape).flatten()[rows.index]


def _global_tokens(tokens: Tensor, num_items: Tensor | int | None) -> Tensor:
    """The tokens that a rank's loss is divided by: those of all ranks over their number, as ranks are averaged."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is not None:
        return torch.as_tensor(num_items, device=tokens.device) / ranks
    if ranks > 1:
        tokens = tokens.clone()
        dist.all_reduce(tokens)
    return tokens / ranks
