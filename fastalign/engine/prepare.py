"""What some losses must know of the whole optimizer step before any of it has a coefficient: a first pass over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastalign.engine.forward import Models
from fastalign.engine.methods import Objective, StepFacts
from fastalign.engine.reference.frozen import reference_logps
from fastalign.engine.timing import Stopwatch
from fastalign.losses.pairs import pair_logps
from fastalign.losses.reduce import segment_sum
from fastalign.losses.unpaired import Baseline, make_baseline
from fastalign.parallel.mesh import World
from fastalign.types import PackedBatch, PairLogps

Known = list[tuple[PackedBatch, StepFacts]]


@dataclass
class Carried:
    """What a method takes from one step to the next.

    Attributes:
        baseline: what unpaired losses measured from in the last step.
    """

    baseline: Baseline = field(default_factory=make_baseline)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"baseline": self.baseline.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go back to a checkpoint."""
        self.baseline = make_baseline(**state["baseline"], device=device)


def look_ahead(
    models: Models,
    batches: Sequence[PackedBatch],
    objective: Objective,
    imitated_per_unit: float | None,
    world: World,
    watch: Stopwatch,
    carried: Carried,
) -> Known:
    """What each micro-batch's loss may know of the step; a step-coupled loss costs a forward pass of all of them.

    That pass cuts the head into the chunks of the training pass, so that both see the same bits, and keeps the
    reference's log-probs with the batches.
    """
    if not objective.is_step_coupled:
        return [(batch, StepFacts(imitated_per_unit)) for batch in batches]
    batches = [batch.to(world.device) for batch in batches]
    if objective.method.align == "pair":
        return all_pairs(models, batches, objective, imitated_per_unit, world, watch)
    return with_baseline(models, batches, objective, world, watch, carried)


def all_pairs(
    models: Models,
    batches: Sequence[PackedBatch],
    objective: Objective,
    imitated_per_unit: float | None,
    world: World,
    watch: Stopwatch,
) -> Known:
    """The log-probs of the step's pairs, over all ranks."""
    scored = [replace(b, ref_logps=score_reference(models, b, objective, world.device, watch)) for b in batches]
    logps = [score_policy(models, batch, objective, world, watch) for batch in scored]
    mine = [pair_logps(x, b.cu_seqlens.to(x.device), b.ref_logps) for x, b in zip(logps, scored, strict=True)]
    pairs, first = gather_pairs(mine, world)
    places = accumulate((len(pair.chosen) for pair in mine), initial=first)
    return [(b, StepFacts(imitated_per_unit, pairs, place)) for b, place in zip(scored, places, strict=False)]


def with_baseline(
    models: Models,
    batches: Sequence[PackedBatch],
    objective: Objective,
    world: World,
    watch: Stopwatch,
    carried: Carried,
) -> Known:
    """The baseline of an unpaired loss: from the mismatched completions, or from the step's own."""
    both, baseline_of = objective.reads_mismatched, next(iter(objective.members.values())).baseline
    assert baseline_of is not None
    pairs = [score_both(models, b, objective, world, watch) if both else (b, b) for b in batches]
    batches, scored = (list(side) for side in zip(*pairs, strict=True))
    scored = [replace(b, ref_logps=score_reference(models, b, objective, world.device, watch)) for b in scored]
    logps = [score_policy(models, batch, objective, world, watch) for batch in scored]
    sums = [sequence_sums(one, batch) for one, batch in zip(logps, scored, strict=True)]
    policy, reference = (torch.cat(part) for part in zip(*sums, strict=True))
    carried.baseline = baseline_of(
        carried.baseline, policy, reference, beta=objective.options.get("beta", 1.0), process_group=world.data.group
    )
    return [(batch, StepFacts(baseline=carried.baseline)) for batch in (batches if both else scored)]


def score_both(
    models: Models, batch: PackedBatch, objective: Objective, world: World, watch: Stopwatch
) -> tuple[PackedBatch, PackedBatch]:
    """A batch and its mismatched completions with the reference's log-probs, prompts computed once for both."""
    if batch.mismatched is None:  # of a rank without work: one pass, as the others make
        batch = replace(batch, ref_logps=score_reference(models, batch, objective, world.device, watch))
        return batch, batch
    if batch.both is None:
        return batch, batch.mismatched
    logps = score_reference(models, batch.both, objective, world.device, watch)
    assert logps is not None
    lengths = batch.both.cu_seqlens.diff().long()
    own = (torch.arange(len(lengths)) % 2 == 0).repeat_interleave(lengths)  # counted on the host: no wait for a device
    mine, theirs = (logps[rows.nonzero()[:, 0].to(logps.device)] for rows in (own, ~own))
    return replace(batch, ref_logps=mine), replace(batch.mismatched, ref_logps=theirs)


def sequence_sums(logps: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """``[B]`` sequence log-probs of policy and reference."""
    assert batch.ref_logps is not None
    offsets = batch.cu_seqlens.to(logps.device)
    return segment_sum(logps, offsets), segment_sum(batch.ref_logps.to(logps.dtype), offsets)


def score_policy(models: Models, batch: PackedBatch, objective: Objective, world: World, watch: Stopwatch) -> Tensor:
    """``[N]`` log-probs under the policy, without gradient."""
    with watch("forward"), models.precision(world.device):
        return reference_logps(models.policy, batch, objective)


def score_reference(
    models: Models, batch: PackedBatch, objective: Objective, device: torch.device, watch: Stopwatch
) -> Tensor | None:
    """``[N]`` reference log-probs: those that came with the batch, or computed now; None for losses without any."""
    if batch.ref_logps is not None or not objective.needs_reference or objective.head == "distributions":
        return batch.ref_logps
    if models.reference is None:
        assert batch.num_scored == 0, "a batch without reference log-probs, and no reference to compute them"
        return torch.zeros(0, device=device)
    with watch("reference"), models.precision(device):
        return reference_logps(models.reference, batch, objective)


def gather_pairs(mine: Sequence[PairLogps], world: World) -> tuple[PairLogps, int]:
    """The pairs of all micro-batches and ranks, in the order of ranks, and the position of this rank's first."""
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths")
    table = torch.cat([torch.stack([getattr(pair, name).double() for name in names], 1) for pair in mine]).cpu()
    counts = world.data.gather([len(table)])[:, 0].long().tolist()
    padded = torch.nn.functional.pad(table, (0, 0, 0, max(counts) - len(table)))
    everyone = world.data.gather(padded.flatten().tolist()).view(world.data.size, -1, len(names))
    rows = torch.cat([rank[:count] for rank, count in zip(everyone, counts, strict=True)])
    columns = rows.to(mine[0].chosen.device, mine[0].chosen.dtype).unbind(1)
    return PairLogps(**dict(zip(names, columns, strict=True))), sum(counts[: world.data.rank])
