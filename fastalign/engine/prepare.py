"""Before the first backward of a step: fill the columns that its loss reads, over all micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastalign.engine.forward import Models
from fastalign.engine.methods import Objective
from fastalign.engine.reference.frozen import reference_logps
from fastalign.engine.timing import Stopwatch
from fastalign.engine.update import Work
from fastalign.losses.pairs import pair_logps
from fastalign.losses.policy import KL_ESTIMATORS
from fastalign.losses.preference_wide import rank_margins, rank_ratios
from fastalign.losses.reduce import Totals, segment_sum, weight_columns
from fastalign.losses.unpaired import make_baseline
from fastalign.models.groups import pick_sequences, tokens_of
from fastalign.models.head import scores
from fastalign.ops import whiten
from fastalign.ops.checks import stats_dtype
from fastalign.parallel.mesh import Axis, World
from fastalign.rl.controllers import KLPrice, ValueNorm
from fastalign.rl.credit import Experience
from fastalign.types import Columns, PackedBatch


class Stateful(Protocol):
    """What a method takes from one step to the next, and a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to them."""
        ...


Carried = dict[str, Stateful]
"""What a method carries, by name."""
Batches = list[PackedBatch]


@dataclass(frozen=True)
class Step:
    """What the columns of a step are made from: the arguments of `prepare`."""

    models: Models
    objective: Objective
    work: Work
    world: World
    watch: Stopwatch
    carried: Carried
    exact: bool = False


def prepare(
    models: Models,
    batches: Sequence[PackedBatch],
    objective: Objective,
    work: Work,
    world: World,
    watch: Stopwatch,
    carried: Carried,
    *,
    exact: bool = False,
) -> Batches:
    """This rank's micro-batches of a step on its device, with every column that the loss reads.

    All ranks call it, with equally many micro-batches. A loss that compares the examples of a step costs a forward pass
    of all of them, whose head is cut into the chunks of the training pass: both see the same bits.

    Args:
        models: the policy as it is before the step, and the reference.
        batches: from the packer, on the host.
        objective: whose losses name the columns.
        work: of the whole step.
        world: the ranks.
        watch: where the time is booked.
        carried: what earlier steps left; brought up to date.
        exact: the log-probs of the sampler are bit for bit those of this policy.
    """
    step = Step(models, objective, work, world, watch, carried, exact)
    with watch("data"):
        prepared = [weigh(step, batch.to(world.device)) for batch in batches]
    for fill in dict.fromkeys(FILL[name] for name in objective.columns):  # one may fill several columns
        prepared = fill(step, prepared)
    return prepared


def weigh(step: Step, batch: PackedBatch) -> PackedBatch:
    """The reduction as weights; times the number of ranks, which undoes the average that gradient reduction takes."""
    return weigh_for(step.objective, step.work, step.world, batch)


def weigh_for(objective: Objective, work: Work, world: World, batch: PackedBatch) -> PackedBatch:
    """A batch with the weights that it has among the work of one update."""
    size, gradient = world.data.size, objective.policy_gradient
    tokens, sequences, examples = (max(count, 1) / size for count in (work.scored, work.nonempty, work.examples))
    budget = gradient.sampler.max_new_tokens if gradient else 1
    totals = Totals(tokens=tokens, sequences=sequences, examples=examples, budget=budget)
    offsets = batch.cu_seqlens.to(world.device)
    columns = weight_columns(objective.reduction, offsets, totals, batch.num_scored)
    if gradient and gradient.has_critic:
        columns["value_weights"] = weight_columns("token-mean", offsets, totals, batch.num_scored)["weights"]
    return batch.fill(**columns)


def fill_mean_lengths(step: Step, batches: Batches) -> Batches:
    """``mean_lengths``, from the counts of the step."""
    mean = max(step.work.imitated, 1) / max(step.work.examples, 1)
    options = {"dtype": torch.float64, "device": step.world.device}
    return [batch.fill(mean_lengths=torch.full((batch.num_sequences,), mean, **options)) for batch in batches]


def fill_reference(step: Step, batches: Batches) -> Batches:
    """``ref_logps``; none where the reference's whole distributions are computed beside the policy's.

    Where the loss reads companions, one pass scores these and the batch's own sequences behind their common prompts.
    """
    if step.objective.head == "distributions":
        return batches
    if not step.objective.reads_mismatched:
        return [with_reference(step, batch) for batch in batches]
    filled = []
    for batch in batches:
        companion = with_reference(step, batch.companion or batch)  # a rank without work makes the same passes
        ours = slice(None) if batch.companion is None else tokens_of(companion, slice(0, None, 2))
        own = companion.columns.pick({"token": ours})
        filled.append(replace(batch.fill(ref_logps=own.ref_logps), companion=companion))
    return filled


def with_reference(step: Step, batch: PackedBatch) -> PackedBatch:
    """The batch with log-probs under the reference: computed now if that is in memory, else they came with the data."""
    if step.models.reference is None:
        assert batch.columns.ref_logps is not None, "a batch without reference log-probs, and no reference"
        return batch
    return batch.fill(ref_logps=score(step, step.models.reference, batch, "reference"))


def score(step: Step, model: Any, batch: PackedBatch, booked: str) -> Tensor:
    """``[N]`` log-probs under a model, without gradient."""
    with step.watch(booked), step.models.precision(step.world.device):
        return reference_logps(model, batch, step.objective)


def sequence_logps(step: Step, batches: Batches) -> tuple[Tensor, Tensor]:
    """``[B]`` log-probs of the sequences of all micro-batches, under the policy as it is and under the reference."""
    sums = []
    for batch in batches:
        batch = with_reference(step, batch) if step.objective.head == "distributions" else batch
        logps = score(step, step.models.policy, batch, "forward")
        offsets, known = batch.cu_seqlens.to(logps.device), batch.columns.read("ref_logps", "the step")
        sums.append((segment_sum(logps, offsets), segment_sum(known.to(logps.dtype), offsets)))
    policy, reference = (torch.cat(part) for part in zip(*sums, strict=True))
    return policy, reference


def fill_ranks(step: Step, batches: Batches) -> Batches:
    """``rank_margins`` and ``rank_ratios``: among the pairs of all ranks."""
    policy, reference = sequence_logps(step, batches)
    everyone, first = gather_rows(torch.stack([policy, reference], dim=1), step.world.data)
    everyone = everyone.to(policy.device, policy.dtype)
    one_each = torch.arange(len(everyone) + 1, device=policy.device)  # sums as sequences of one token
    pair = pair_logps(everyone[:, 0], one_each, everyone[:, 1])
    columns = Columns(rank_margins=rank_margins(pair), rank_ratios=rank_ratios(pair))
    ends = pairwise(accumulate((batch.num_sequences for batch in batches), initial=first))
    ours = [columns.pick({"sequence": slice(start, stop)}) for start, stop in ends]
    return [batch.fill(**part.known()) for batch, part in zip(batches, ours, strict=True)]


def fill_baseline(step: Step, batches: Batches) -> Batches:
    """``baseline``: from the mismatched completions where the loss reads these, or from the step's own."""
    objective, scored = step.objective, batches
    if objective.reads_mismatched:
        theirs = slice(1, None, 2)
        scored = [pick_sequences(b.companion, theirs) if b.companion and b.example_ids else b for b in batches]
    policy, reference = sequence_logps(step, scored)
    before, (loss, *_) = step.carried["baseline"], objective.members.values()
    assert loss.baseline is not None
    options = {"beta": objective.options.get("beta", 1.0), "process_group": step.world.data.group}
    baseline = loss.baseline(before, policy, reference, **options)
    step.carried["baseline"] = baseline
    return [batch.fill(baseline=baseline.mean.expand(batch.num_sequences)) for batch in batches]


def gather_rows(table: Tensor, ranks: Axis) -> tuple[Tensor, int]:
    """``[n, k]`` fp64 rows of every rank on the host, in the order of ranks, and the position of this rank's first."""
    rows, width = table.shape
    counts = ranks.gather([rows])[:, 0].long().tolist()
    padded = torch.nn.functional.pad(table.double().cpu(), (0, 0, 0, max(counts) - rows))
    everyone = ranks.gather(padded.flatten().tolist()).view(ranks.size, -1, width)
    parts = [rank[:count] for rank, count in zip(everyone, counts, strict=True)]
    return torch.cat(parts), sum(counts[: ranks.rank])


def fill_old_logps(step: Step, batches: Batches) -> Batches:
    """``old_logps``: those of the sampler where these are exact; none where nothing is compared with them."""
    gradient = step.objective.policy_gradient
    assert gradient is not None
    if step.exact:
        return [batch.fill(old_logps=batch.columns.read("sampler_logps", "the step")) for batch in batches]
    if gradient.num_updates == 1 and not gradient.charges_kl and gradient.settings.correction == "none":
        return batches  # one update of fresh completions: the ratio is 1
    return [batch.fill(old_logps=score(step, step.models.policy, batch, "forward")) for batch in batches]


def fill_values(step: Step, batches: Batches) -> Batches:
    """``values`` of the critic, as its head gives them."""
    return [batch.fill(values=critic_values(step, batch)) for batch in batches]


@torch.no_grad()
def critic_values(step: Step, batch: PackedBatch) -> Tensor:
    """``[N]`` outputs of the critic at a batch's rows, fp32 (fp64 of an fp64 critic)."""
    models = step.models
    with step.watch("forward"), models.precision(step.world.device):
        if models.critic is not None:
            values = models.critic(batch, scores)
        else:
            values = models.policy(batch, lambda *_, values, **options: values, values=True)
    return values.to(stats_dtype(values))


def fill_advantages(step: Step, batches: Batches) -> Batches:
    """``advantages`` and, for a critic, ``returns``: the credit of all completions of this rank at once."""
    gradient = step.objective.policy_gradient
    assert gradient is not None and gradient.algorithm.credit is not None
    joined, offsets = Columns.join([batch.columns for batch in batches]), joined_offsets(batches, step.world.device)
    norm = cast(ValueNorm, step.carried["value_norm"]) if gradient.settings.normalize_values else None
    experience = gather_experience(step, batches, joined, offsets, norm)
    columns = gradient.algorithm.credit(experience)
    advantages = columns.read("advantages", "the credit")
    if columns.returns is not None and norm is not None:
        columns = replace(columns, returns=norm.update(columns.returns, step.world.data))
    if gradient.settings.normalize_advantages:
        columns = replace(columns, advantages=whiten(advantages, process_group=step.world.data.group))
    ends = pairwise(accumulate((batch.num_scored for batch in batches), initial=0))
    parts = [columns.pick({"token": slice(*end)}) for end in ends]
    return [batch.fill(**part.known()) for batch, part in zip(batches, parts, strict=True)]


def joined_offsets(batches: Batches, device: torch.device) -> Tensor:
    """``[B+1]`` int64 offsets of the sequences of all micro-batches in their tokens, one after the other."""
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches]).long()
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)


def gather_experience(
    step: Step, batches: Batches, columns: Columns, offsets: Tensor, norm: ValueNorm | None
) -> Experience:
    """What credit is given for."""
    gradient = step.objective.policy_gradient
    assert gradient is not None
    settings, scores = gradient.settings, columns.read("scores", "the step")
    values, last_values = columns.values, None
    if settings.truncation == "bootstrap":
        cut = columns.read("truncated", "the step") > 0
        behind = torch.cat([values_behind(step, batch) for batch in batches])
        last_values = torch.where(cut, behind if norm is None else norm.restore(behind), 0.0)
        scores = torch.where(cut, 0.0, scores)
    counts = torch.cat([batch.cu_groups.diff() for batch in batches]).long()
    groups = torch.arange(len(counts)).repeat_interleave(counts).to(scores.device)
    return Experience(
        scores=scores,
        groups=groups,
        cu_seqlens=offsets,
        kl_rewards=kl_rewards(step, columns, int(offsets[-1])),
        values=None if values is None else values if norm is None else norm.restore(values),
        last_values=last_values,
        greedy_scores=columns.greedy_scores,
        token_rewards=columns.token_rewards,
        gamma=settings.gamma,
        lam=1.0 if settings.lam is None else settings.lam,
        process_group=step.world.data.group,
    )


def kl_rewards(step: Step, columns: Columns, num_tokens: int) -> Tensor:
    """``[n]`` what the KL from the reference costs each token, negative; 0 where it is no part of the reward."""
    gradient = step.objective.policy_gradient
    if gradient is None or not gradient.charges_kl:
        return torch.zeros(num_tokens, device=step.world.device)
    old, reference = (columns.read(name, "the step") for name in ("old_logps", "ref_logps"))
    kl = KL_ESTIMATORS[gradient.settings.kl_estimator or "k1"](old, reference)
    return -cast(KLPrice, step.carried["kl_coef"]).value(gradient.settings.kl_coef or 0.0) * kl


def values_behind(step: Step, batch: PackedBatch) -> Tensor:
    """``[B]`` the critic's value of the state behind each sequence's last token."""
    assert batch.ends is not None
    rows = (batch.cu_segments[1:][batch.ends.long()].long() - 1).to(step.world.device)
    return critic_values(step, replace(batch, rows=rows, labels=torch.zeros_like(rows)))


FILL: dict[str, Callable[[Step, Batches], Batches]] = {
    "ref_logps": fill_reference,
    "old_logps": fill_old_logps,
    "values": fill_values,
    "advantages": fill_advantages,
    "mean_lengths": fill_mean_lengths,
    "rank_margins": fill_ranks,
    "rank_ratios": fill_ranks,
    "baseline": fill_baseline,
}
"""What fills each column that a loss may name."""
CARRIED: dict[str, Callable[[], Stateful]] = {"baseline": make_baseline, "value_norm": ValueNorm, "kl_coef": KLPrice}
"""What the columns of a step take over from the step before; a checkpoint holds all of it, whatever the method."""


def first_carried() -> Carried:
    """What is carried before the first step."""
    return {name: make() for name, make in CARRIED.items()}
