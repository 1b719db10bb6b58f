"""Liger's distillation: generalised Jensen-Shannon divergence of student and teacher, with or without hard labels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.losses.distillation import gkd
from fastalign.losses.supervised import sft
from fastalign.ops import linear_divergence, linear_loss
from fastalign.types import IGNORE_INDEX

Pair = tuple[Tensor, Tensor, "Tensor | None"]


class LigerFusedLinearJSDLoss(nn.Module):
    """``weight_hard_loss CE + weight_soft_loss JSD(beta)``, means over the tokens whose label is not ignored.

    The soft loss is at ``temperature``, the hard one at 1, as Liger's. Both heads need one vocabulary: Liger's padding
    of a smaller student with zero logits is refused. Only ``loss`` has a gradient: soft and hard are detached.

    Returns of a call: loss, or (loss, soft_loss, hard_loss).

    Raises:
        ValueError: beta outside [0, 1]; heads of different vocabularies.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """``[N, D]``, ``[V, D]``, ``[N, Dt]``, ``[V, Dt]``, ``[N]``, ``[V]``, ``[V]``."""
        labels = true_labels.masked_fill(true_labels == self.ignore_index, IGNORE_INDEX)
        count = (labels != IGNORE_INDEX).sum().clamp(min=1)
        student, teacher = (student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias)
        soft = _divergence(student, teacher, labels, self.beta, self.temperature) / count
        hard = soft.new_zeros(())
        if self.weight_hard_loss or self.return_soft_hard_loss:
            tokens = linear_loss(
                student_input, student_weight, labels, lambda s: sft(s.logps).sum() / count, bias=student_bias
            )
            hard = tokens[0]
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


class LigerFusedLinearJSD(nn.Module):
    """The generalised Jensen-Shannon divergence alone, a mean over the tokens whose label is not ignored.

    Raises:
        ValueError: jsd_beta outside [0, 1]; heads of different vocabularies.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """``[N, D]``, ``[V, D]``, ``[N, Dt]``, ``[V, Dt]``, ``[N]``."""
        labels = torch.zeros(len(student_input), dtype=torch.int64, device=student_input.device)
        if shift_labels is not None:
            labels = labels.masked_fill(shift_labels == self.ignore_index, IGNORE_INDEX)
        student, teacher = (student_input, student_weight, None), (teacher_input, teacher_weight, None)
        value = _divergence(student, teacher, labels, self.jsd_beta, self.temperature)
        return value / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _divergence(student: Pair, teacher: Pair, labels: Tensor, beta: float, temperature: float) -> Tensor:
    """The sum of the scored rows' divergences."""
    biases = {"bias": student[2], "ref_bias": teacher[2]}
    divergence: Any = partial(linear_divergence, *student[:2], *teacher[:2], labels=labels, **biases)
    return gkd(divergence, beta=beta, temperature=temperature).sum()
