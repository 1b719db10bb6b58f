"""The peers of the ops: what is installed, and how each is run as its own documentation recommends.

Every function has the same shape of arguments, whatever the peer calls them: hidden ``[N, D]``, weight ``[V, D]``,
labels ``[N]``. Imports happen at the first call: an absent peer costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.common import version

EXTRA = "pip install 'fastalign[peers]'"
WANTED = {
    "trl": ("1.16.", EXTRA),
    "liger_kernel": ("0.8.", EXTRA),
    "cut-cross-entropy": ("25.", EXTRA),
    "quack-kernels": ("0.", "pip install quack-kernels"),
    "verl": ("0.", "pip install --no-deps verl"),
}
"""Distribution -> the beginning of the versions that this benchmark was written for, and how to get it."""


def missing(package: str) -> str | None:
    """Why ``package`` cannot be measured, or None when it can."""
    found, (wanted, how) = version(package), WANTED[package]
    if found is None:
        return f"{package} is not installed (wanted {wanted}x: {how})"
    if not found.startswith(wanted):
        return f"{package} {found} is installed, {wanted}x is what this benchmark was written for"
    return None


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs ``[N]`` from logits ``[N, V]`` as TRL's trainers compute them."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, labels)


def trl_logps_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy ``[N]`` by TRL's two functions, one after the other."""
    from trl.trainer.utils import entropy_from_logits

    return trl_logps(logits, labels), entropy_from_logits(logits)


def trl_kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy ``[N]`` by TRL's Triton kernel."""
    from trl.kernels import selective_log_softmax_and_entropy

    logps, entropy = selective_log_softmax_and_entropy(logits[None], labels[None])[:2]
    return logps[0], entropy[0]


def trl_head(hidden: Tensor, weight: Tensor, labels: Tensor, *, select: bool | None = None) -> Tensor:
    """Log-probs ``[N]`` by the fused head of TRL's trainers, with their tile width and no optional output.

    Args:
        select: project scored rows only. None: as TRL does, where it has Triton, but not on a CPU.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    mask = labels != -100
    if hidden.is_cuda if select is None else select:
        logps = ChunkedLogProbFunction.apply(hidden[mask], weight, None, labels[mask], *options)[0]
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels.clamp(min=0), *options)[0] * mask


def trl_jsd(logits: Tensor, ref_logits: Tensor, mix: float) -> Tensor:
    """The summed divergence by the trainer for generalised knowledge distillation; mix 0 is the forward KL."""
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(logits[None], ref_logits[None], beta=mix, reduction="sum")


def trl_divergence_head(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, mix: float) -> Tensor:
    """Divergence ``[N]`` from hidden states by TRL's distillation trainer; mix 0 is the forward, 1 the reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, mix)[0]


# --- Liger -----------------------------------------------------------------------------------------------------------


def liger_cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Log-probs ``[N]``: minus the unreduced loss, whose gradient takes the place of the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy as loss

    return -loss(logits, labels, reduction="none", softcap=softcap)


def liger_head(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Mean cross-entropy from hidden states by the fused Triton head."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    return loss(hidden, weight, labels, softcap=softcap)


def liger_token_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs ``[N]``: a native kernel on SM90, chunks of 512 rows derived from verl's head elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as head

    return -head.apply(hidden, weight, labels)


def liger_dpo(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, length: int, beta: float, compiled: bool = False
) -> Tensor:
    """Chunked DPO against a reference of zeros; it wants all chosen sequences before all rejected ones."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    halves = torch.stack(hidden.view(-1, 2, length, hidden.shape[-1]).unbind(1)).flatten(0, 1)
    targets = torch.stack(labels.view(-1, 2, length).unbind(1)).flatten(0, 1)
    loss = LigerFusedLinearDPOLoss(beta=beta, compiled=compiled, use_ref_model=False)
    return loss(weight, halves, targets)[0]


def liger_grpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    length: int,
    clip: float,
    compiled: bool = False,
) -> Tensor:
    """Chunked clipped policy loss, the mean over tokens; advantages ``[B]``, sequences of equal length."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    settings = {"beta": 0.0, "use_ref_model": False, "loss_type": "bnpo", "epsilon_low": clip, "epsilon_high": clip}
    ids = labels.view(-1, length)
    return LigerFusedLinearGRPOLoss(compiled=compiled, **settings)(
        _input=hidden.view(*ids.shape, -1),
        lin_weight=weight,
        selected_token_ids=ids,
        attention_mask=torch.ones_like(ids),
        advantages=advantages,
        old_per_token_logps=old_logps.view_as(ids),
    )[0]


def liger_grpo_logits(
    logits: Tensor, labels: Tensor, old_logps: Tensor, advantages: Tensor, *, sequences: int, clip: float, inplace: bool
) -> Tensor:
    """Clipped policy loss from logits by the Triton kernel, which does not score each sequence's last row."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    rows = labels.view(sequences, -1)
    return triton_grpo_loss(
        logits.view(*rows.shape, -1),
        old_logps.view_as(rows)[:, :-1],
        None,
        rows[:, :-1].contiguous(),
        advantages.view_as(rows)[:, 0].contiguous(),
        temperature=1.0,
        beta=0.0,
        eps_low=clip,
        eps_high=clip,
        inplace=inplace,
        loss_type="bnpo",
        reduce=True,
    )[0]


def liger_jsd(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *, mix: float) -> Tensor:
    """Chunked distillation loss, the mean divergence over rows; its mix counts as TRL's."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=mix, compiled=False)
    return loss(hidden, weight, ref_hidden, ref_weight, labels)


# --- others ----------------------------------------------------------------------------------------------------------


def cut_cross_entropy(softcap: float | None = None, **options: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Mean cross-entropy from hidden states by Apple's cut-cross-entropy.

    Args:
        options: ``impl="torch_compile"`` off the GPU; ``filter_eps=None`` for gradients without its approximation.
    """

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, softcap=softcap, **options)

    return loss


def quack_cross_entropy(logits: Tensor, labels: Tensor, *, inplace: bool = False) -> Tensor:
    """Log-probs ``[N]`` from logits by quack."""
    from quack.cross_entropy import cross_entropy

    return -cross_entropy(logits, labels, reduction="none", inplace_backward=inplace)


def quack_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy from hidden states by quack, in its own choice of pipeline."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


def verl_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs ``[N]`` by verl's chunked torch head."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO().forward(hidden, weight, labels)[0]
