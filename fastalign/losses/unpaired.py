"""Losses of completions that were each called good or bad, without pairs.

``d = logps - ref_logps`` is the log-ratio summed over the completion, ``y`` +1 for a good and -1 for a bad one, ``s``
the logistic function. Both losses measure ``d`` from a baseline: a statistic of the whole step over all ranks, made
before any loss by the trait ``baseline`` of the loss from the one before, which a checkpoint keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.reduce import sum_and_count
from fastalign.losses.traits import Family, Loss, Sums
from fastalign.types import LabelledLogps


@dataclass
class Baseline:
    """What log-ratios or rewards are measured from: a mean over ``count`` completions, fp64 ``[]``, detached.

    Attributes:
        mean: the mean so far; 0 before anything was seen.
        count: how many completions it is over.
    """

    mean: Tensor
    count: Tensor

    def state_dict(self) -> dict[str, float]:
        """Plain numbers, for a checkpoint."""
        return {"mean": self.mean.item(), "count": self.count.item()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go back to those of ``state_dict``."""
        self.mean, self.count = vars(make_baseline(**state)).values()


def make_baseline(mean: float = 0.0, count: float = 0.0) -> Baseline:
    """A baseline from plain numbers: afresh, or with those of ``Baseline.state_dict``."""
    return Baseline(*torch.tensor([mean, count], dtype=torch.float64))


def kto(
    batch: LabelledLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: the prospect-theoretic value of each answer's reward against the policy's average drift.

    ``l = w (1 - s(beta y (d - z0)))``, ``z0 = max(0, mean d')`` over mismatched prompts and completions of the step.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7.

    Args:
        batch: sequence log-probs of B completions, their labels, and ``z0`` of this step, from `kto_baseline`.
        beta: weight of the KL penalty; larger stays closer to the reference.
        desirable_weight: ``w`` of good answers; balance the two so that their totals are in 1 to 4/3.
        undesirable_weight: ``w`` of bad answers.

    Returns:
        ``[B]`` losses.
    """
    log_ratio = batch.logps - batch.ref_logps - batch.baseline.to(batch.logps.dtype)
    gain = torch.where(batch.desirable, log_ratio, -log_ratio)
    weight = torch.where(batch.desirable, gain.new_tensor(desirable_weight), gain.new_tensor(undesirable_weight))
    return weight * (-beta * gain).sigmoid()


def kto_baseline(
    previous: Baseline, logps: Tensor, ref_logps: Tensor, *, beta: float, process_group: dist.ProcessGroup | None = None
) -> Baseline:
    """``z0`` of a step: the mean log-ratio of mismatched rows over all ranks, at least 0; earlier steps do not count.

    Args:
        previous: not read.
        logps, ref_logps: ``[B']`` of prompt i with the completion of prompt i + 1, over all micro-batches.
        beta: not read: the baseline is of log-ratios.
        process_group: the ranks; None: this process alone.
    """
    mean, count = mean_over_ranks(logps - ref_logps, process_group)
    return Baseline(mean.clamp(min=0), count)


def bco(batch: LabelledLogps, *, beta: float = 0.1) -> Tensor:
    """BCO: a binary classifier of good and bad answers whose logit is the implicit reward.

    ``l = -ln s(y (beta d - delta))``, ``delta`` the running mean of all rewards, this step's included.
    Source: Jung et al. 2024 (arXiv:2404.04656).

    Args:
        batch: sequence log-probs of B completions, their labels, and ``delta``, from `bco_baseline`.
        beta: reward per nat.

    Returns:
        ``[B]`` losses.
    """
    reward = beta * (batch.logps - batch.ref_logps) - batch.baseline.to(batch.logps.dtype)
    return -logsigmoid(torch.where(batch.desirable, reward, -reward))


def bco_baseline(
    previous: Baseline, logps: Tensor, ref_logps: Tensor, *, beta: float, process_group: dist.ProcessGroup | None = None
) -> Baseline:
    """``delta`` after a step: the mean of all rewards ever seen, weighted by their number.

    Args:
        previous: ``delta`` before.
        logps, ref_logps: ``[B']`` of the step's completions, over all micro-batches of this rank.
        beta: reward per nat.
        process_group: the ranks; None: this process alone.
    """
    mean, count = mean_over_ranks(beta * (logps - ref_logps), process_group)
    total = previous.count + count
    return Baseline(previous.mean + (mean - previous.mean) * count / total.clamp(min=1), total)


def mean_over_ranks(values: Tensor, process_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Mean (0 of nothing) and count of ``values`` of all ranks, fp64, detached; a rank without any must call too."""
    sums = sum_and_count(values)
    if process_group is not None:
        dist.all_reduce(sums, group=process_group)
    return sums[0] / sums[1].clamp(min=1), sums[1]


def metrics(batch: LabelledLogps, losses: Tensor, *, beta: float, loss: Loss) -> dict[str, Tensor]:
    """``[2]`` (sum, count): ``loss``, and under TRL's names ``rewards/*`` and ``logps/*`` of either label, ``kl``.

    ``rewards/margins`` of TRL is the difference of the two means. A baseline of mismatched rows is told as ``kl``,
    another as ``rewards/baseline``.
    """
    rewards, good = beta * (batch.logps - batch.ref_logps), batch.desirable
    told = batch.baseline.expand(len(losses))
    return {
        "loss": sum_and_count(losses),
        "rewards/chosen": where_sum(rewards, good),
        "rewards/rejected": where_sum(rewards, ~good),
        "logps/chosen": where_sum(batch.logps, good),
        "logps/rejected": where_sum(batch.logps, ~good),
        "kl" if loss.mismatched else "rewards/baseline": sum_and_count(told),
    }


def where_sum(values: Tensor, mask: Tensor) -> Tensor:
    """A metric's ``[2]`` fp64 (sum, count) over the entries that the mask keeps."""
    return torch.stack([torch.where(mask, values.detach(), 0.0).sum(dtype=torch.float64), mask.sum()])


def margin_of_means(sums: Sums) -> dict[str, float]:
    """``rewards/margins``, as TRL tells it; nan where one of the labels was not seen."""
    chosen, rejected = (
        total / count if count else math.nan for total, count in (sums["rewards/chosen"], sums["rewards/rejected"])
    )
    return {"rewards/margins": chosen - rejected}


LOSSES = {
    "kto": Loss(
        kto,
        columns=("baseline",),
        baseline=kto_baseline,
        mismatched=True,
        nonnegative=("desirable_weight", "undesirable_weight"),
    ),
    "bco": Loss(bco, columns=("baseline",), baseline=bco_baseline),
}
FAMILY = Family(
    "Completions called good or bad",
    "Rows of `prompt`, `completion` and `label`; preference rows count as one good and one bad completion. `d` is "
    "the log-ratio to the reference summed over the completion, `y` +1 for a good and -1 for a bad one. Both "
    "losses measure `d` from a baseline of the whole step over all ranks. kto's is of prompts with completions of "
    "other rows, paired over the dataset, not over a batch as in TRL, whose losses therefore part a little.",
    "`rewards/margins` rises, by `rewards/chosen` and not only by a fall of `rewards/rejected`; `kl` (kto) stays "
    "small; balance `desirable_weight` and `undesirable_weight` when labels are uneven.",
    LOSSES,
    derive=margin_of_means,
)
