"""The policy's forward up to the loss: hidden states go through a head inside the module, no logits are kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.config import ModelConfig
from fastalign.engine.methods import Objective
from fastalign.engine.readings import critic_loss, extremes
from fastalign.models.head import scores
from fastalign.models.lora import WithoutAdapter
from fastalign.models.policy import Policy
from fastalign.ops import linear_divergence, linear_logps, linear_loss
from fastalign.types import PackedBatch, TokenStats

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Models:
    """The models of a run by role, and whether they compute under bf16 autocast.

    Attributes:
        policy: what is trained.
        reference: frozen, what the policy is compared with; None for losses that compare with none, and where its
            log-probs came with the data.
        critic: trained beside the policy; None without one, and where the policy has a value head.
        rewards: frozen, score completions.
    """

    policy: Policy
    reference: Policy | WithoutAdapter | None
    autocast: bool
    reference_digest: str | None = None
    """A hash of the weights that the reference has on the disk; None without one, or one that a seed made."""
    critic: Policy | None = None
    rewards: tuple[Policy, ...] = ()

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The context in which both run forward."""
        return torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()


def wants_autocast(model: ModelConfig, device: torch.device) -> bool:
    """Whether forwards run under bf16 autocast: as the section says, else on CUDA."""
    return device.type == "cuda" if model.autocast is None else model.autocast


def run_head(models: Models, batch: PackedBatch, objective: Objective) -> tuple[Tensor, Metrics]:
    """A batch's share of the loss, and ``[2]`` (sum, count) of each metric; none when no row is scored."""
    if objective.head == "distributions":
        return run_distributions(models, batch, objective)
    loss_fn = objective.loss_fn(batch)
    if objective.head == "scores":
        return models.policy(batch, lambda *tensors, **options: loss_fn(scores(*tensors, **options)))

    def head(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Metrics]:
        loss, stats = linear_loss(hidden, weight, labels, loss_fn, **chunks(batch, objective), **options)
        return with_critic(objective, batch, loss, stats, values)

    return models.policy(batch, head, values=models.policy.value_head is not None)


def with_critic(
    objective: Objective, batch: PackedBatch, loss: Tensor, stats: TokenStats, values: Tensor | None
) -> tuple[Tensor, Metrics]:
    """A batch's share of the loss with that of a critic on the same trunk, if there is one, and all metrics."""
    metrics, gradient = stats.metrics, objective.policy_gradient
    if values is not None:
        assert gradient is not None
        value_loss, theirs = critic_loss(objective, batch, values)
        loss = loss + gradient.settings.vf_coef * value_loss
        metrics = {**metrics, **theirs} if batch.num_scored else metrics
    if gradient is not None and batch.num_scored:
        metrics = {**metrics, **extremes(objective, batch, stats)}
    return loss, metrics


def run_critic(critic: Policy, batch: PackedBatch, objective: Objective) -> tuple[Tensor, Metrics]:
    """The share of the loss of a critic that is a model of its own, and its metrics."""
    return critic(batch, lambda *tensors, **options: critic_loss(objective, batch, scores(*tensors, **options)))


def chunks(batch: PackedBatch, objective: Objective) -> dict[str, Any]:
    """How `linear_loss` cuts a batch; the reference's pass is cut alike, so that equal weights give equal bits."""
    align = objective.align
    groups = {"cu_groups": batch.cu_groups} if align == "group" else {}
    offsets = None if align == "token" else batch.cu_seqlens
    known = {"align": align, "entropy": True, "num_scored": batch.num_scored, "temperature": objective.temperature}
    return {"cu_seqlens": offsets, **known, **groups}


def run_distributions(models: Models, batch: PackedBatch, objective: Objective) -> tuple[Tensor, Metrics]:
    """Losses that compare whole distributions: the policy's forward runs inside the reference's.

    The divergence reads both heads' weights at once, row by row, and keeps no distribution. FSDP has a model's head
    gathered only while that model's forward runs, so one forward must enclose the other:

        reference.forward       no gradient         head gathered, its hidden states known
          `- policy.forward     with gradient       head gathered, its hidden states known
               `- both_heads                        the divergence of both: the loss

    The reference is outside, as it has no backward whose graph would have to leave the policy's forward through it.
    """
    assert models.reference is not None
    trains = torch.is_grad_enabled()

    def beside(ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, **ref_options: Any) -> tuple[Tensor, Metrics]:
        reference = (ref_hidden, ref_weight, ref_options)
        with torch.set_grad_enabled(trains):
            return models.policy(batch, partial(both_heads, batch=batch, objective=objective, reference=reference))

    with torch.no_grad():
        return models.reference(batch, beside)


def both_heads(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    batch: PackedBatch,
    objective: Objective,
    reference: tuple[Tensor, Tensor, dict[str, Any]],
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """The divergence between both models and their log-probs, in one sweep over both logits, then the losses."""
    ref_hidden, ref_weight, ref_options = reference
    theirs = {f"ref_{name}": value for name, value in ref_options.items() if name != "process_group"}  # the same ranks
    divergence = partial(linear_divergence, hidden, weight, ref_hidden, ref_weight, labels=labels, **options, **theirs)
    if objective.method.align == "token":  # the divergence is the loss; log-probs only tell how the policy fares
        losses = objective.losses(divergence)
        with torch.no_grad():
            logps, entropy = linear_logps(hidden, weight, labels, entropy=True, **options)
    else:
        losses, logps, ref_logps, entropy = divergence(kind="forward_kl", tokens=True)
        batch = batch.fill(ref_logps=ref_logps)
    rows = torch.arange(len(labels), device=labels.device)
    stats = TokenStats(logps, rows, entropy.detach(), divergence=losses)
    return objective.loss_fn(batch)(with_sequences(stats, batch))


def with_sequences(stats: TokenStats, batch: PackedBatch) -> TokenStats:
    """The statistics of a whole batch with its sequences."""
    device = stats.logps.device
    sequences = torch.arange(batch.num_sequences, device=device)
    return replace(stats, sequences=sequences, cu_seqlens=batch.cu_seqlens.to(device, torch.int64))
