"""Liger's cross-entropies: of logits, and fused with the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.integrations._fields import Scaling, head_fields
from fastalign.integrations._model import Head
from fastalign.integrations.liger.rows import refuse
from fastalign.losses.supervised import sft
from fastalign.ops import linear_logps, linear_loss, token_logps
from fastalign.types import IGNORE_INDEX, TokenStats


@dataclass
class CrossEntropyOutput:
    """What a cross-entropy returns when more than the loss was asked for; None where it was not.

    Attributes:
        loss: reduced, or ``[N]``.
        z_loss: ``lse_square_scale * lse^2``, reduced like the loss, which contains it.
        token_accuracy: share of scored tokens whose label has the largest logit; ``[N]`` with ``reduction="none"``.
        predicted_tokens: ``[N]`` largest logit's index, -1 where the label is ignored.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class _CrossEntropy(nn.Module):
    """What both classes share."""

    def __init__(self, weight: Tensor | None, ignore_index: int, reduction: str, softcap: float | None, **other: Any):
        super().__init__()
        for name, value in other.items():
            if value:
                refuse(name, value, "the loss is -ln p of the label alone")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        self.weight = weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.softcap = softcap

    def prepared(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels with -100 where ignored, class weights of the labels ``[N]``, and what their losses are divided by."""
        labels = target.masked_fill(target == self.ignore_index, IGNORE_INDEX)
        weights = (labels != IGNORE_INDEX).float()
        if self.weight is not None:
            weights = weights * self.weight.float()[labels.clamp(min=0)]
        total = weights.sum()
        return labels, weights, total + (total == 0) if self.reduction == "mean" else torch.ones_like(total)


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
        super().__init__(ce_weight, ignore_index, reduction, softcap, return_predicted_tokens=return_predicted_tokens)
        if label_smoothing and (ce_weight is not None or use_token_scaling):
            refuse("label_smoothing", label_smoothing, "with ce_weight or use_token_scaling it has another meaning")
        self.lse_square_scale = lse_square_scale
        self.use_token_scaling = use_token_scaling
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.options: dict[str, Any] = {"softcap": softcap, "label_smoothing": label_smoothing}
        self.options["lse"] = return_z_loss or lse_square_scale != 0

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """``[V, D]``, ``[N, D]``, ``[N]``, ``[V]``; the loss in fp32."""
        labels, weights, divisor = self.prepared(target)
        scored = labels != IGNORE_INDEX
        count = scored.sum().clamp(min=1) if self.reduction == "mean" else 1

        def losses(logps: Tensor, lse: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
            scale = logps.detach().exp() if self.use_token_scaling else 1.0
            z = logps.new_zeros(logps.shape) if lse is None else self.lse_square_scale * lse.square() * scored[rows]
            return sft(logps) * scale * weights[rows] / divisor + z * scale / count, z * scale / count

        if self.reduction == "none":
            found: Any = linear_logps(_input, lin_weight, labels, bias=bias, **self.options)
            logps, lse = found if self.options["lse"] else (found, None)
            loss, z_loss = losses(logps, lse, torch.arange(len(labels), device=labels.device))
            accuracy = self._right(Head(lin_weight, bias), _input, labels) if self.return_token_accuracy else None
        else:

            def loss_fn(stats: TokenStats) -> Tensor:
                return losses(stats.logps, stats.lse, stats.rows)[0].sum()

            loss, stats = linear_loss(_input, lin_weight, labels, loss_fn, bias=bias, **self.options)
            z_loss = losses(stats.logps, stats.lse, stats.rows)[1].sum()
            accuracy = None if stats.is_top1 is None else stats.is_top1.sum() / scored.sum().clamp(min=1)
        if not (self.return_z_loss or self.return_token_accuracy):
            return loss
        told = z_loss.detach() if self.return_z_loss else None
        return CrossEntropyOutput(loss, told, accuracy if self.return_token_accuracy else None)

    def _right(self, head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
        """``[N]`` 1 where the label has the largest logit."""
        index = (labels != IGNORE_INDEX).nonzero()[:, 0]
        with torch.no_grad():
            *_, top1 = head_fields(hidden[index], head, labels[index], Scaling(softcap=self.softcap), ("is_top1",))
        assert top1 is not None
        return torch.zeros(len(labels), device=labels.device).index_put((index,), top1.float())


class LigerCrossEntropyLoss(_CrossEntropy):
    """Cross-entropy of logits that exist already.

    ``lse_square_scale``, ``label_smoothing`` and ``return_z_loss`` are not served. A batch without a scored token
    gives 0.

    Args:
        weight: ``[V]`` class weights; the mean divides by the sum of those of the labels.
        return_token_accuracy, return_predicted_tokens: return a ``CrossEntropyOutput``, for one more read of logits.

    Raises:
        ValueError: an option that is not served.
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
        unserved = {"lse_square_scale": lse_square_scale, "label_smoothing": label_smoothing}
        super().__init__(weight, ignore_index, reduction, softcap, **unserved, return_z_loss=return_z_loss)
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """``[N, V]``, ``[N]``; the loss in fp32."""
        labels, weights, divisor = self.prepared(target)
        logps = token_logps(_input, labels, softcap=self.softcap)
        assert isinstance(logps, Tensor)
        losses = sft(logps) * weights / divisor
        loss = losses if self.reduction == "none" else losses.sum()
        if not (self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        scored, predicted = labels != IGNORE_INDEX, _input.detach().argmax(-1)
        right = ((predicted == labels) & scored).float()
        accuracy = right if self.reduction == "none" else right.sum() / scored.sum().clamp(min=1)
        return CrossEntropyOutput(
            loss,
            token_accuracy=accuracy if self.return_token_accuracy else None,
            predicted_tokens=predicted.masked_fill(~scored, -1) if self.return_predicted_tokens else None,
        )
