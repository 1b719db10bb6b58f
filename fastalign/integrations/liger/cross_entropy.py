"""Liger's cross-entropies: of logits, and fused with the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.integrations._fields import Scaling, head_fields
from fastalign.integrations.liger.rows import refuse
from fastalign.losses.supervised import sft
from fastalign.models.head import Head
from fastalign.ops import linear_logps, linear_loss, token_logps
from fastalign.types import IGNORE_INDEX, TokenStats


@dataclass
class CrossEntropyOutput:
    """What a cross-entropy returns when more than the loss was asked for; None where it was not.

    Attributes:
        loss: reduced, or ``[N]``.
        z_loss: ``lse_square_scale * lse^2``, reduced like the loss, which contains it.
        token_accuracy: share of scored tokens whose label is the argmax of the logits; ``[N]`` with
            ``reduction="none"``.
        predicted_tokens: ``[N]`` largest logit's index, -1 where the label is ignored.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class _Batch(NamedTuple):
    """Labels ``[N]`` with -100 where ignored, what is scored, class weights of the labels, and the divisors."""

    labels: Tensor
    scored: Tensor
    weights: Tensor
    divisor: Tensor | int
    z_divisor: Tensor | int


class _CrossEntropy(nn.Module):
    """What both classes share.

    Attributes:
        options: of the op that computes log-probs.
    """

    def __init__(
        self,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        softcap: float | None,
        lse_square_scale: float,
        label_smoothing: float,
        return_z_loss: bool,
        use_token_scaling: bool = False,
    ):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        if label_smoothing and (weight is not None or use_token_scaling):
            refuse("label_smoothing", label_smoothing, "beside class weights or token scaling it has another meaning")
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.softcap = softcap
        self.lse_square_scale = lse_square_scale
        self.return_z_loss = return_z_loss
        self.use_token_scaling = use_token_scaling
        needs_lse = return_z_loss or lse_square_scale != 0
        self.options: dict[str, Any] = {"softcap": softcap, "label_smoothing": label_smoothing, "lse": needs_lse}

    def prepared(self, target: Tensor) -> _Batch:
        """The batch; a divisor of 0 is taken for 1."""
        labels = target.masked_fill(target == self.ignore_index, IGNORE_INDEX)
        scored = labels != IGNORE_INDEX
        weights = scored.float()
        if self.weight is not None:
            weights = weights * self.weight.float()[labels.clamp(min=0)]
        if self.reduction != "mean":
            return _Batch(labels, scored, weights, 1, 1)
        total = weights.sum()
        return _Batch(labels, scored, weights, total + (total == 0), scored.sum().clamp(min=1))

    def losses(self, batch: _Batch, logps: Tensor, lse: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's share of the loss, and of the z-loss in it."""
        z = logps.new_zeros(logps.shape) if lse is None else self.lse_square_scale * lse.square() * batch.scored[rows]
        scale = logps.detach().exp() if self.use_token_scaling else 1.0
        z = z * scale / batch.z_divisor
        return sft(logps) * scale * batch.weights[rows] / batch.divisor + z, z


class LigerFusedLinearCrossEntropyLoss(_CrossEntropy):
    """Cross-entropy of a linear head without its logits, with label smoothing and the z-loss ``scale * lse^2``.

    ``return_predicted_tokens`` is not served, nor is label smoothing beside class weights or token scaling. Sums are
    always in fp32. A batch without a scored token gives 0.

    Args:
        ce_weight: ``[V]`` class weights; the mean divides by the sum of those of the labels, that of the z-loss by the
            number of scored tokens.
        lse_square_scale: weight of the z-loss, which keeps the log-sum-exp of the logits near 0.
        label_smoothing: share of the loss that is the mean of ``-ln p`` over the vocabulary.
        use_token_scaling: weigh each token by its own probability, without a gradient.
        return_z_loss, return_token_accuracy: return a ``CrossEntropyOutput``; the z-loss in it is detached. The
            accuracy of each token (``reduction="none"``) costs one more product with the head.

    Raises:
        ValueError: options that are not served.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        z = (lse_square_scale, label_smoothing, return_z_loss)
        super().__init__(ce_weight, ignore_index, reduction, softcap, *z, use_token_scaling)
        if return_predicted_tokens:
            refuse("return_predicted_tokens", True, "no logit is kept to name the largest")
        self.return_token_accuracy = return_token_accuracy

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """``[V, D]``, ``[N, D]``, ``[N]``, ``[V]``; the loss in fp32."""
        batch = self.prepared(target)
        if self.reduction == "none":
            found: Any = linear_logps(_input, lin_weight, batch.labels, bias=bias, **self.options)
            logps, lse = found if self.options["lse"] else (found, None)
            loss, z_loss = self.losses(batch, logps, lse, torch.arange(len(target), device=target.device))
            accuracy = self._right(Head(lin_weight, bias), _input, batch.labels) if self.return_token_accuracy else None
        else:

            def loss_fn(stats: TokenStats) -> Tensor:
                return self.losses(batch, stats.logps, stats.lse, stats.rows)[0].sum()

            loss, stats = linear_loss(_input, lin_weight, batch.labels, loss_fn, bias=bias, **self.options)
            z_loss = self.losses(batch, stats.logps, stats.lse, stats.rows)[1].sum()
            accuracy = None if stats.is_top1 is None else stats.is_top1.sum() / batch.scored.sum().clamp(min=1)
        if not (self.return_z_loss or self.return_token_accuracy):
            return loss
        reported = z_loss.detach() if self.return_z_loss else None
        return CrossEntropyOutput(loss, reported, accuracy if self.return_token_accuracy else None)

    def _right(self, head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
        """``[N]`` 1 where the label is the argmax of the logits."""
        index = (labels != IGNORE_INDEX).nonzero()[:, 0]
        with torch.no_grad():
            *_, top1 = head_fields(hidden[index], head, labels[index], Scaling(softcap=self.softcap), ("is_top1",))
        assert top1 is not None
        return torch.zeros(len(labels), device=labels.device).index_put((index,), top1.float())


class LigerCrossEntropyLoss(_CrossEntropy):
    """Cross-entropy of logits that exist already, with label smoothing and the z-loss ``scale * lse^2``.

    Label smoothing is not served beside class weights. A batch without a scored token gives 0.

    Args:
        weight: ``[V]`` class weights, as those of the fused class.
        lse_square_scale, label_smoothing: as those of the fused class.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a ``CrossEntropyOutput``; the last two
            cost one more read of the logits.

    Raises:
        ValueError: options that are not served.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__(weight, ignore_index, reduction, softcap, lse_square_scale, label_smoothing, return_z_loss)
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """``[N, V]``, ``[N]``; the loss in fp32."""
        batch = self.prepared(target)
        found: Any = token_logps(_input, batch.labels, **self.options)
        logps, lse = found if self.options["lse"] else (found, None)
        losses, z = self.losses(batch, logps, lse, torch.arange(len(target), device=target.device))
        each = self.reduction == "none"
        loss, z_loss = (losses, z) if each else (losses.sum(), z.sum())
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        predicted = _input.detach().argmax(-1)
        right = ((predicted == batch.labels) & batch.scored).float()
        accuracy = right if each else right.sum() / batch.scored.sum().clamp(min=1)
        return CrossEntropyOutput(
            loss,
            z_loss.detach() if self.return_z_loss else None,
            accuracy if self.return_token_accuracy else None,
            predicted.masked_fill(~batch.scored, -1) if self.return_predicted_tokens else None,
        )
