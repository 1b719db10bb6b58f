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

    from fastalign.config import AlgorithmConfig, Config, SamplerConfig
    from fastalign.engine.readings import LossFn
    from fastalign.losses.traits import Family, Loss
    from fastalign.rl.algorithms import OnPolicy
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
        algorithms: on-policy, the names in `rl.algorithms` that it can run, its default first.
    """

    help: str
    stem: str
    align: Align
    scalar_head: bool = False
    teacher: bool = False
    algorithms: tuple[str, ...] = ()

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
    "grpo": Method(
        "learn from rewards of sampled completions, compared within their group",
        "policy",
        "token",
        algorithms=("grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"),
    ),
    "ppo": Method("learn from rewards of sampled completions, with a critic", "policy", "token", algorithms=("ppo",)),
    "rloo": Method(
        "learn from rewards, each compared with the others of its group", "policy", "token", algorithms=("rloo",)
    ),
    "remax": Method("learn from rewards, compared with the greedy answer's", "policy", "token", algorithms=("remax",)),
    "reinforce-pp": Method(
        "learn from rewards, compared over the whole step",
        "policy",
        "token",
        algorithms=("reinforce_pp", "reinforce_pp_baseline", "reinforce"),
    ),
    "raft": Method("fine-tune on the best of sampled completions", "supervised", "token", algorithms=("raft",)),
    "online-dpo": Method(
        "align on pairs of sampled completions, the best against the worst",
        "preference",
        "pair",
        algorithms=("online_dpo",),
    ),
}
CRITIC_METRICS = ("loss/value_avg", "val/clipfrac_avg")
"""Of `losses.policy.value_metrics`, beside those of the policy's loss."""
ON_POLICY = tuple(name for name, method in METHODS.items() if method.algorithms)
"""The methods that sample: they have the sections algorithm and sampler, and rewards."""


@dataclass(frozen=True)
class Objective:
    """A method with its loss chosen.

    Attributes:
        method: how batches are read.
        members: the loss by its name, or the losses that are summed.
        options: their keyword arguments.
        data: what `encode_dataset` is to make of rows.
        metric_names: the metrics that its loss function returns, sorted; the same on every rank.
        on_policy: the algorithm with its settings, for methods that sample.
    """

    method: Method
    members: Mapping[str, Loss]
    options: dict[str, Any]
    data: str
    metric_names: tuple[str, ...] = ()
    on_policy: OnPolicy | None = None

    @property
    def policy_gradient(self) -> OnPolicy | None:
        """The algorithm, where the losses are those of policy gradients."""
        return self.on_policy if self.method.stem == "policy" else None

    @property
    def align(self) -> Align:
        """What a chunk of the head may not split."""
        return "sequence" if self.method.align == "token" and self.has("sequences") else self.method.align

    @property
    def temperature(self) -> float:
        """What logits are divided by, as they were when completions were sampled; greedy ones are of temperature 1."""
        return (self.policy_gradient.sampler.temperature or 1.0) if self.policy_gradient else 1.0

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
        """Whether a loss reads a reference, or the KL from it."""
        gradient = self.policy_gradient
        return self.has("reference") if gradient is None else gradient.charges_kl or gradient.adds_kl

    @property
    def reads_mismatched(self) -> bool:
        """Whether a loss reads prompts with completions of other examples."""
        return self.has("mismatched")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are filled for the losses before a step, in order."""
        members, gradient = self.members.values(), self.policy_gradient
        own = ("old_logps", *["values"] * gradient.has_critic, "advantages") if gradient else ()
        return (*["ref_logps"] * self.needs_reference, *own, *(name for loss in members for name in loss.columns))

    @property
    def depends_on_step(self) -> bool:
        """Whether the loss of an example depends on which others are in its optimizer step."""
        return self.has("columns")

    @property
    def reduction(self) -> str:
        """What makes one number of the losses: a name of `fastalign.losses.reduce`."""
        if gradient := self.policy_gradient:
            return gradient.algorithm.reduction
        return "token-mean" if all(loss.per_token for loss in self.members.values()) else "example-mean"

    def losses(self, *data: Any) -> Tensor:
        """The loss function, or the weighted sum of several, on its data with options bound."""
        from fastalign.losses.mixture import weighted_sum

        return weighted_sum(self.members, self.options, *data)

    def loss_fn(self, batch: PackedBatch) -> LossFn:
        """The function of a batch's head outputs that is differentiated."""
        return partial(self.method.build, self, batch)


def minibatches_of(objective: Objective) -> int:
    """Into how many updates a pass over a step is cut."""
    plan = objective.policy_gradient
    return 1 if plan is None else plan.settings.num_minibatches or 1


def passes_of(objective: Objective) -> int:
    """How often a step is passed over."""
    plan = objective.policy_gradient
    return 1 if plan is None else plan.settings.num_iterations or 1


def objective_of(config: Config) -> Objective:
    """The objective of a run; raises as `make_objective` does."""
    return make_objective(config.method, config.loss, config.algorithm, config.sampler)


def make_objective(
    method: str,
    loss: Mapping[str, Any],
    algorithm: AlgorithmConfig | None = None,
    sampler: SamplerConfig | None = None,
) -> Objective:
    """Choose a method's loss from the ``loss`` section of a configuration.

    Args:
        method: a key of ``METHODS``.
        loss: ``name`` (default: the method's own), or several and ``loss_weights``; and their keyword arguments.
        algorithm, sampler: the sections of an on-policy method.

    Raises:
        ValueError: an unknown method, loss, algorithm or keyword, with the accepted ones; a loss that fails on a trial
            batch.
    """
    from fastalign.engine.trial import try_out
    from fastalign.losses.mixture import settings

    chosen = METHODS[pick(METHODS, method, "method")]
    on_policy = plan_sampling(chosen, algorithm, sampler)
    losses = choose(method, names_of(loss), on_policy.algorithm.loss if on_policy else None)
    given = {key: value for key, value in loss.items() if key != "name"}
    accepted = settings(losses)
    if on_policy:
        accepted |= own_options(losses, on_policy.settings)
    for key, value in given.items():
        pick(accepted, key, f"keyword of loss {'+'.join(losses)!r}")
        if any(key in one.nonnegative for one in losses.values()) and not value >= 0:
            raise ValueError(f"loss.{key} must be at least 0, got {value}")
    rows = "prompt" if on_policy else next(iter(losses.values())).rows or method
    objective = Objective(chosen, losses, {**accepted, **given}, rows, on_policy=on_policy)
    critic = CRITIC_METRICS if objective.policy_gradient and objective.policy_gradient.has_critic else ()
    return replace(objective, metric_names=tuple(sorted({*try_out(objective), *critic})))


def plan_sampling(method: Method, algorithm: AlgorithmConfig | None, sampler: SamplerConfig | None) -> OnPolicy | None:
    """The algorithm with its settings filled in; None for a method that does not sample."""
    if not method.algorithms:
        return None
    from fastalign.config import AlgorithmConfig, SamplerConfig
    from fastalign.rl.algorithms import ALGORITHMS, OnPolicy, settle

    settings = settle(method.algorithms, algorithm or AlgorithmConfig())
    assert settings.name is not None
    return OnPolicy(ALGORITHMS[settings.name], settings, sampler or SamplerConfig())


def own_options(losses: Mapping[str, Loss], settings: AlgorithmConfig) -> dict[str, Any]:
    """What an algorithm gives its own loss in place of that loss's defaults; nothing where it was exchanged."""
    from fastalign.rl.algorithms import ALGORITHMS, loss_defaults

    assert settings.name is not None
    own = ALGORITHMS[settings.name].loss in losses
    return loss_defaults(settings.name, settings.preset) if own else {}


def names_of(loss: Mapping[str, Any]) -> list[str]:
    """The names in a section ``loss``, none for the method's default."""
    name = loss.get("name") or []
    return [name] if isinstance(name, str) else list(name)


def choose(method: str, asked: Sequence[str], default: str | None = None) -> dict[str, Loss]:
    """The losses that a configuration names, by their canonical names; ``default`` or the method's own for none.

    Raises:
        ValueError: an unknown name, one that is listed twice, a user's loss that cannot be imported or called.
    """
    from fastalign.losses import custom
    from fastalign.losses.traits import canonical

    known = METHODS[method].losses
    aliases, default = canonical(known), default or next(iter(known))
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
    """The families of losses by the first method that reads them."""
    found: dict[str, Family] = {}
    for name, method in METHODS.items():
        if method.family not in found.values():
            found[name] = method.family
    return found


def filled_in(config: Config, objective: Objective) -> Config:
    """The settings with the defaults of the loss and of the algorithm."""
    config = replace(config, loss={"name": objective.name, **objective.options})
    plan = objective.on_policy
    return config if plan is None else replace(config, algorithm=plan.settings, sampler=plan.sampler)
