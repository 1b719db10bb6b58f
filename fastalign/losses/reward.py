"""Losses of scalar heads that learn to score: reward models of pairs and rankings, and of single reasoning steps.

``s`` is the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from fastalign.losses.reduce import segment_ids, segment_sum, sum_and_count
from fastalign.losses.traits import Family, Loss, Sums
from fastalign.types import IGNORE_INDEX, Columns


def reward(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, center_coef: float = 0.0) -> Tensor:
    """Bradley-Terry: the chosen answer's reward should be the larger, by the margin if one is given.

    ``l = -ln s(r_w - r_x - m) + center_coef (r_w + r_x)^2``; the second term fixes the constant that rewards lack.
    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; margin: Touvron et al. 2023 (arXiv:2307.09288), eq. 2;
    centring: Eisenstein et al. 2023 (arXiv:2312.09244).

    Args:
        chosen, rejected: ``[P]`` rewards.
        margins: ``[P]``, by how much the chosen is better, such as 1, 2/3, 1/3, 0; None for 0.
        center_coef: weight of the centring term; 0.01 when used.

    Returns:
        ``[P]`` losses.
    """
    difference = chosen - rejected if margins is None else chosen - rejected - margins
    return -logsigmoid(difference) + center_coef * (chosen + rejected).square()


def soft_label(first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """Soft-label Bradley-Terry: a feedback model gave the probability that the first answer is the better one.

    ``l = -P ln s(r_a - r_b) - (1 - P) ln s(r_b - r_a)``.
    Source: Bai et al. 2022, Constitutional AI (arXiv:2212.08073), section 4.

    Args:
        first, second: ``[P]`` rewards.
        targets: ``[P]`` probabilities.

    Returns:
        ``[P]`` losses.
    """
    difference = first - second
    return -targets * logsigmoid(difference) - (1 - targets) * logsigmoid(-difference)


def k_wise(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> Tensor:
    """K-wise Bradley-Terry: the mean over all ordered pairs of one prompt's ranked answers.

    ``l_g = -mean_{i better than j} ln s(r_i - r_j)``.
    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1.

    Args:
        scores: ``[B]`` rewards.
        ranks: ``[B]`` place of each answer in its prompt's ranking, smaller is better; equal ranks form no pair.
        cu_groups: ``[G+1]`` offsets of the prompts in the B answers.

    Returns:
        ``[G]`` losses; 0 for a prompt without a pair.
    """
    group = segment_ids(cu_groups, len(scores))
    pairs = (group[:, None] == group[None, :]) & (ranks[:, None] < ranks[None, :])
    losses = torch.where(pairs, -logsigmoid(scores[:, None] - scores[None, :]), 0.0).sum(1)
    number = segment_sum(pairs.sum(1).to(losses.dtype), cu_groups).clamp(min=1)
    return segment_sum(losses, cu_groups) / number


def process(logits: Tensor, labels: Tensor) -> Tensor:
    """Process reward: is each reasoning step right, as a binary classification at its last token.

    ``l_t = softplus(x_t) - y_t x_t``, to be averaged over steps.
    Source: Lightman et al. 2023 (arXiv:2305.20050), section 2.6; TRL's two-class form with ``x`` the difference.

    Args:
        logits: ``[n]`` outputs of the head.
        labels: ``[n]`` 1 for a right step, 0 for a wrong one, -100 where no step ends.

    Returns:
        ``[n]`` losses, 0 where no step ends.
    """
    known = labels != IGNORE_INDEX
    losses = binary_cross_entropy_with_logits(
        torch.where(known, logits, 0.0), labels.clamp(min=0).to(logits.dtype), reduction="none"
    )
    return torch.where(known, losses, 0.0)


def solution_scores(logits: Tensor, labels: Tensor, cu_seqlens: Tensor, how: str = "min") -> Tensor:
    """Score of each solution from its steps' probabilities, ``min`` or ``prod``; 1 without steps, ``[B]``."""
    if how not in ("min", "prod"):
        raise ValueError(f"how must be min or prod, got {how!r}")
    probabilities = torch.where(labels != IGNORE_INDEX, logits.detach().sigmoid(), 1.0)
    return torch.segment_reduce(probabilities, how, offsets=cu_seqlens.to(torch.int64), initial=1.0)


def metrics(chosen: Tensor, rejected: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """``[2]`` (sum, count) over pairs: ``loss``, ``accuracy``, ``margin``, calibration bins, and under TRL's names the
    mean reward, and the least and largest of a call, averaged over calls.
    """
    rewards = torch.cat([chosen, rejected])
    values = {"loss": losses, "accuracy": chosen > rejected, "margin": chosen - rejected, "mean_reward": rewards}
    if len(rewards):
        values |= {"min_reward": rewards.min()[None], "max_reward": rewards.max()[None]}
    else:
        values |= {"min_reward": rewards, "max_reward": rewards}
    return {name: sum_and_count(value) for name, value in values.items()} | calibration_bins(chosen - rejected)


def summable(chosen: Tensor, rejected: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """`metrics` whose sums do not depend on how a step is cut into calls: the least and largest reward of each pair."""
    least, largest = torch.minimum(chosen, rejected), torch.maximum(chosen, rejected)
    extremes = {"min_reward": sum_and_count(least), "max_reward": sum_and_count(largest)}
    return metrics(chosen, rejected, losses) | extremes


def calibration_bins(margins: Tensor) -> dict[str, Tensor]:
    """Sums from which `calibration_error` follows: per bin of confidence, (how often right - confidence, pairs).

    The confidence of a pair is ``s(|margin|)``, in ``BINS`` bins from 1/2 to 1.
    """
    margins = margins.detach().double()
    confidence = margins.abs().sigmoid()
    bins = ((confidence.nan_to_num(0.5) - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)  # nan spoils the gap alone
    gaps = torch.zeros(BINS, dtype=torch.float64, device=margins.device).index_add(
        0, bins, (margins > 0).double() - confidence
    )
    counts = torch.bincount(bins, minlength=BINS).double()
    return {f"calibration/{i}": torch.stack([gaps[i], counts[i]]) for i in range(BINS)}


def calibration_error(bins: Tensor) -> Tensor:
    """Expected calibration error ``sum_b |gap_b| / number of pairs`` from the ``[BINS, 2]`` sums of all pairs.

    It is nan without pairs. Source: Guo et al. 2017 (arXiv:1706.04599).
    """
    return bins[:, 0].abs().sum() / bins[:, 1].sum()


# --- how each loss reads the head's outputs ---------------------------------------------------------------------------

Reading = tuple[tuple[Tensor | None, ...], Callable[[Tensor], dict[str, Tensor]]]
"""The arguments of a loss, and its metrics as a function of its losses."""


def read_pairs(outputs: Tensor, columns: Columns, cu_groups: Tensor) -> Reading:
    """Rewards of neighbours, chosen first; the data may say by how much the chosen is better."""
    chosen, rejected = outputs[0::2], outputs[1::2]
    margins = None if columns.scores is None else columns.scores[0::2] - columns.scores[1::2]
    return (chosen, rejected, margins), lambda losses: summable(chosen, rejected, losses)


def read_probabilities(outputs: Tensor, columns: Columns, cu_groups: Tensor) -> Reading:
    """Rewards of neighbours; the data say how likely the first is the better."""
    if columns.scores is None:
        raise ValueError("soft_label reads a probability beside each pair: give the data a column `probability`")
    first, second = outputs[0::2], outputs[1::2]
    return (first, second, columns.scores[0::2]), lambda losses: summable(first, second, losses)


def read_rankings(outputs: Tensor, columns: Columns, cu_groups: Tensor) -> Reading:
    """Rewards of each prompt's candidates, which the data score; metrics are over the pairs that they rank."""
    given, group = columns.read("scores", "k_wise"), segment_ids(cu_groups, len(outputs))
    better, worse = ((group[:, None] == group) & (given[:, None] > given)).nonzero(as_tuple=True)
    return (outputs, -given, cu_groups), lambda losses: summable(outputs[better], outputs[worse], losses)


def read_steps(outputs: Tensor, columns: Columns, cu_groups: Tensor) -> Reading:
    """One output per reasoning step, which the data call right or wrong."""
    given = columns.read("step_labels", "process")
    margins = torch.where(given > 0, outputs, -outputs)
    told = {"accuracy": sum_and_count(margins > 0), **calibration_bins(margins)}
    return (outputs, given), lambda losses: {"loss": sum_and_count(losses), **told}


def calibration(sums: Sums) -> dict[str, float | None]:
    """``ece``, the expected calibration error, in place of its bins."""
    bins = [name for name in sums if name.startswith("calibration/")]
    error = calibration_error(torch.tensor([sums[name] for name in bins], dtype=torch.float64))
    return {"ece": error.item(), **dict.fromkeys(bins)}


BINS = 10
LOSSES = {
    "reward": Loss(reward, reference=False, read=read_pairs, nonnegative=("center_coef",)),
    "soft_label": Loss(soft_label, reference=False, read=read_probabilities, rows="reward:soft_label"),
    "k_wise": Loss(k_wise, reference=False, read=read_rankings, rows="reward:k_wise"),
    "process": Loss(
        process,
        reference=False,
        read=read_steps,
        rows="reward:process",
        per_token=True,
        flags=" --data.path builtin:docstring-steps --data.eval_path builtin:docstring-steps",
    ),
}
FAMILY = Family(
    "Reward models",
    "A scalar head on the last token of each completion; the model is saved as a Hugging Face sequence classifier. "
    "Preference rows for `reward` (with `margin`, if there is one) and `soft_label` (with `probability`), rows of "
    "`completions` and `scores` for `k_wise`, of `completions` (steps) and `labels` for `process`.",
    "`accuracy` of held-out pairs, `margin`, and `ece`, the calibration error of `s(margin)`: an accuracy that "
    "stands still while `margin` and `ece` grow is overfitting.",
    LOSSES,
    derive=calibration,
)
