"""The training methods, and the way from a configuration's ``loss`` section to an objective.

``METHODS`` is the one table of methods: an entry makes a command, its help and its page. What it names is imported when
it is asked for, so that the command line can list the methods without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from fastalign.words import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from fastalign.engine.readings import LossFn
    from fastalign.losses.traits import Family, Loss
    from fastalign.types import PackedBatch

Align = Literal["token", "sequence", "pair", "group"]
"""What a chunk of the head may not split."""
Head = Literal["logps", "scores", "distributions"]
"""What is made of hidden states: log-probs of labels, outputs of a scalar head, or two whole distributions."""


@dataclass(frozen=True)
class Method:
    """How the loop treats one method.

    Attributes:
        help: its line in ``fastalign --help``.
        stem: names its losses, ``losses/STEM.py``, and how they read a batch, ``STEM_loss`` of ``engine/readings.py``.
        align: what a chunk of the head may not split.
        scalar_head: the model has a scalar head instead of an LM head.
        teacher: the reference must be a model of its own.
    """

    help: str
    stem: str
    align: Align
    scalar_head: bool = False
    teacher: bool = False

    @cached_property
    def family(self) -> Family:
        """The losses with what they say of themselves."""
        return import_module(f"fastalign.losses.{self.stem}").FAMILY

    @property
    def losses(self) -> Mapping[str, Loss]:
        """The losses it can name, the default first."""
        return self.family.losses

    @cached_property
    def build(self) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """From an objective, a batch and what the head made of it to a share of the loss, and metrics."""
        return getattr(import_module("fastalign.engine.readings"), f"{self.stem}_loss")


METHODS = {
    "sft": Method("fine-tune on demonstrations or plain text", "supervised", "token"),
    "dpo": Method("align on preference pairs", "preference", "pair"),
    "kto": Method("align on single completions that were called good or bad", "unpaired", "sequence"),
    "rrhf": Method("align on ranked completions of a prompt", "ranking", "group"),
    "reward": Method(
        "train a reward model on preference pairs, rankings or steps", "reward", "token", scalar_head=True
    ),
    "distill": Method("match the distribution of a teacher", "distillation", "token", teacher=True),
}


@dataclass(frozen=True)
class Objective:
    """A method with its loss chosen.

    Attributes:
        method: how batches are read.
        members: the loss by its name, or the losses that are summed.
        options: their keyword arguments.
        data: what `encode_dataset` is to make of rows.
        metric_names: the metrics that its loss function returns, sorted; the same on every rank.
    """

    method: Method
    members: Mapping[str, Loss]
    options: dict[str, Any]
    data: str
    metric_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the losses."""
        return tuple(self.members)

    @property
    def name(self) -> str | list[str]:
        """The loss as a configuration names it."""
        return one_or_list(self.members)

    def has(self, trait: str) -> bool:
        """Whether a loss has a trait, an attribute of `Loss`."""
        return any(getattr(loss, trait) for loss in self.members.values())

    @property
    def head(self) -> Head:
        """What the losses read."""
        return "scores" if self.method.scalar_head else "distributions" if self.has("distributions") else "logps"

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads a reference."""
        return self.has("reference")

    @property
    def reads_mismatched(self) -> bool:
        """Whether a loss reads prompts with completions of other examples."""
        return self.has("mismatched")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are filled for the losses before a step, in order."""
        members = self.members.values()
        return (*["ref_logps"] * self.needs_reference, *(name for loss in members for name in loss.columns))

    @property
    def depends_on_step(self) -> bool:
        """Whether the loss of an example depends on which others are in its optimizer step."""
        return self.has("columns")

    @property
    def reduction(self) -> str:
        """What makes one number of the losses: a name of `fastalign.losses.reduce`."""
        return "token-mean" if all(loss.per_token for loss in self.members.values()) else "example-mean"

    def losses(self, *data: Any) -> Tensor:
        """The loss function, or the weighted sum of several, on its data with options bound."""
        from fastalign.losses.mixture import weighted_sum

        return weighted_sum(self.members, self.options, *data)

    def loss_fn(self, batch: PackedBatch) -> LossFn:
        """The function of a batch's head outputs that is differentiated."""
        return partial(self.method.build, self, batch)


def make_objective(method: str, loss: Mapping[str, Any]) -> Objective:
    """Choose a method's loss from the ``loss`` section of a configuration.

    Args:
        method: a key of ``METHODS``.
        loss: ``name`` (default: the method's own), or several and ``loss_weights``; and their keyword arguments.

    Raises:
        ValueError: an unknown method, loss or keyword, with the accepted ones; a loss that fails on a trial batch.
    """
    from fastalign.engine.trial import try_out
    from fastalign.losses.mixture import settings

    chosen = METHODS[pick(METHODS, method, "method")]
    losses = choose(method, names_of(loss))
    given = {key: value for key, value in loss.items() if key != "name"}
    accepted = settings(losses)
    for key, value in given.items():
        pick(accepted, key, f"keyword of loss {'+'.join(losses)!r}")
        if any(key in one.nonnegative for one in losses.values()) and not value >= 0:
            raise ValueError(f"loss.{key} must be at least 0, got {value}")
    rows = next(iter(losses.values())).rows or method
    objective = Objective(chosen, losses, {**accepted, **given}, rows)
    return replace(objective, metric_names=try_out(objective))


def names_of(loss: Mapping[str, Any]) -> list[str]:
    """The names in a section ``loss``, none for the method's default."""
    name = loss.get("name") or []
    return [name] if isinstance(name, str) else list(name)


def choose(method: str, asked: Sequence[str]) -> dict[str, Loss]:
    """The losses that a configuration names, by their canonical names; the method's default for none.

    Raises:
        ValueError: an unknown name, one that is listed twice, a user's loss that cannot be imported or called.
    """
    from fastalign.losses import custom
    from fastalign.losses.traits import canonical

    known = METHODS[method].losses
    aliases, default = canonical(known), next(iter(known))
    names = [aliases.get(name, name) for name in asked or [default]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"loss.name: {', '.join(twice)} is listed more than once; name each loss of a sum once")
    for name in names:
        if name not in known and not custom.is_custom(name):
            raise ValueError(
                f"loss.name: {method} has no loss {name!r}{nearest(name, aliases)} (all: {', '.join(aliases)})"
            )
    return {name: known[name] if name in known else custom.load(name, known[default]) for name in names}


def one_or_list(names: Mapping[str, Any]) -> str | list[str]:
    """``loss.name`` as it is written down."""
    return next(iter(names)) if len(names) == 1 else list(names)


def pick(table: Mapping[str, Any], key: str, what: str) -> str:
    """``key``, or a ValueError that names the nearest accepted key and all of them."""
    if key in table:
        return key
    raise ValueError(f"unknown {what} {key!r}{nearest(key, table)} (all: {', '.join(table) or 'none'})")


def families() -> dict[str, Family]:
    """The families of losses by method, and under no name that of policy gradients, which no method trains with."""
    from fastalign.losses import policy

    return {**{name: method.family for name, method in METHODS.items()}, "": policy.FAMILY}
