"""What sets a training method apart, as plain data: how a batch is counted, read by the head and turned into a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fastalign.losses.mixture import weighted_sum
from fastalign.losses.unpaired import Baseline
from fastalign.types import PackedBatch, PairLogps

Align = Literal["token", "sequence", "pair", "group"]
"""What a chunk of the head may not split."""
Head = Literal["logps", "scores", "distributions"]
"""What is made of hidden states: log-probs of labels, outputs of a scalar head, or two whole distributions."""
LossFn = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
"""From what the head made to a share of the loss, and ``[2]`` (sum, count) per metric."""
Sums = Mapping[str, tuple[float, float]]
"""(sum, count) of each metric over a step."""


@dataclass(frozen=True)
class StepFacts:
    """What a loss may know of the whole optimizer step, over all ranks, before its first coefficient.

    Attributes:
        imitated_per_unit: tokens of the imitation term per unit of the loss; None: of these units alone.
        pairs: the log-probs of all pairs, for losses that are coupled over the step.
        first_pair: position of the batch's first pair in them.
        baseline: what unpaired losses measure log-ratios from.
    """

    imitated_per_unit: float | None = None
    pairs: PairLogps | None = None
    first_pair: int = 0
    baseline: Baseline | None = None


NO_FACTS = StepFacts()


@dataclass(frozen=True)
class Method:
    """How the loop treats one method.

    Attributes:
        align: what a chunk of the head may not split.
        losses: the losses it can name; the first is the default.
        build: ``(objective, batch, scale, facts) -> LossFn``; ``scale`` multiplies the sum of losses.
        aliases: other spellings of the losses.
        scalar_head: the model has a scalar head instead of an LM head.
        per_token: losses that are a mean over scored tokens; all others are one over examples.
        reference_free: losses that read no reference.
        distributions: losses that read the whole distributions of policy and reference.
        teacher: the reference must be a model of its own.
        imitated: how many tokens of a batch an imitation term is a mean over.
        imitates: losses with an imitation term.
        step_coupled: losses that need statistics of the whole step before any coefficient.
        mismatched: losses that read prompts with completions of other examples.
        derive: metrics that follow from the sums of others, and None for those that are not to be told themselves.
    """

    align: Align
    losses: Mapping[str, Callable[..., Tensor]]
    build: Callable[[Objective, PackedBatch, float, StepFacts], LossFn]
    aliases: Mapping[str, str] = field(default_factory=dict)
    scalar_head: bool = False
    per_token: frozenset[str] = frozenset()
    reference_free: frozenset[str] = frozenset()
    distributions: frozenset[str] = frozenset()
    teacher: bool = False
    imitated: Callable[[PackedBatch], int] = lambda batch: 0
    imitates: frozenset[str] = frozenset()
    step_coupled: frozenset[str] = frozenset()
    mismatched: frozenset[str] = frozenset()
    derive: Callable[[Sums], Mapping[str, float | None]] = lambda sums: {}


@dataclass(frozen=True)
class Objective:
    """A method with its loss chosen.

    Attributes:
        method: how batches are read.
        names: the loss, or the losses that are summed.
        options: their keyword arguments.
        data: what `encode_dataset` is to make of rows.
        metric_names: the metrics that its loss function returns, sorted; the same on every rank.
    """

    method: Method
    names: tuple[str, ...]
    options: dict[str, Any]
    data: str
    metric_names: tuple[str, ...] = ()

    @property
    def name(self) -> str | list[str]:
        """The loss as a configuration names it."""
        return self.names[0] if len(self.names) == 1 else list(self.names)

    @property
    def head(self) -> Head:
        """What the losses read."""
        if self.method.scalar_head:
            return "scores"
        return "logps" if self.method.distributions.isdisjoint(self.names) else "distributions"

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads a reference."""
        return not self.method.reference_free.issuperset(self.names)

    @property
    def imitates(self) -> bool:
        """Whether a loss has an imitation term."""
        return not self.method.imitates.isdisjoint(self.names)

    @property
    def reads_mismatched(self) -> bool:
        """Whether a loss reads prompts with completions of other examples."""
        return not self.method.mismatched.isdisjoint(self.names)

    @property
    def is_step_coupled(self) -> bool:
        """Whether a loss needs the log-probs of the whole step first."""
        return not self.method.step_coupled.isdisjoint(self.names)

    @property
    def depends_on_step(self) -> bool:
        """Whether the loss of an example depends on which others are in its optimizer step."""
        return self.is_step_coupled or self.imitates

    def count(self, batch: PackedBatch) -> int:
        """How many units of a batch the loss is a mean over: scored tokens or examples."""
        return batch.num_scored if self.method.per_token.issuperset(self.names) else batch.num_examples

    def losses(self, *data: Any) -> Tensor:
        """The loss function, or the weighted sum of several, on its data with options bound."""
        return weighted_sum({name: self.method.losses[name] for name in self.names}, self.options, *data)

    def loss_fn(self, batch: PackedBatch, scale: float, facts: StepFacts = NO_FACTS) -> LossFn:
        """The function of a batch's head outputs that is differentiated; ``scale`` multiplies the sum of losses."""
        return self.method.build(self, batch, scale, facts)
