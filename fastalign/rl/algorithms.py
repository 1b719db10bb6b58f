"""The on-policy algorithms: one table of what each samples, credits and minimises, and the defaults of its settings.

An algorithm is: sample completions of each prompt, turn their rewards into advantages (`rl.credit`) or select
demonstrations and pairs (`rl.rollouts`), and minimise a loss (`losses`). Everything else is the loop's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fastalign.config import AlgorithmConfig, SamplerConfig
from fastalign.rl import credit
from fastalign.rl.credit import Credit
from fastalign.words import nearest


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    Attributes:
        loss: the loss of its method that it minimises, unless ``loss.name`` says otherwise.
        credit: makes advantages of rewards; None where completions are selected instead.
        reduction: makes one number of the losses of tokens, a name of `losses.reduce`.
        select: what is trained on: all completions, the best of each prompt, or the best against the worst.
        greedy: each prompt is answered greedily as well, for a baseline.
        defaults: of its settings, where they differ from ``DEFAULTS``.
        loss_options: keyword arguments of the loss that differ from its own defaults.
        presets: further settings by the name of a preset; ``loss`` among them are keyword arguments of the loss.
    """

    loss: str
    credit: Credit | None = None
    reduction: str = "token-mean"
    select: Literal["all", "best", "best_and_worst"] = "all"
    greedy: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


DEFAULTS: dict[str, Any] = {
    "num_generations": 8,
    "num_iterations": 1,
    "num_minibatches": 1,
    "kl_coef": 0.0,
    "kl_where": "loss",
    "kl_estimator": "k3",
    "lam": 1.0,
    "normalize_advantages": False,
    "critic": "none",
    "truncation": "terminal",
    "reference_sync": "none",
    "filter_zero_std": False,
}
"""Of the settings of every algorithm, from GRPO as it is used in practice (TRL's defaults)."""
IN_REWARD = {"kl_where": "reward", "kl_estimator": "k1"}

ALGORITHMS = {
    "ppo": Algorithm(
        "ppo",
        credit.gae,
        defaults={
            **IN_REWARD,
            **{"kl_coef": 0.1, "num_generations": 1, "num_iterations": 4},
            **{"critic": "shared", "normalize_advantages": True},
        },
        presets={
            "seed": {
                **{"kl_coef": 1.0, "value_clip": None, "normalize_advantages": False},
                "loss": {"clip_low": math.inf, "clip_high": math.inf},
            },
            "strong": {
                **{"lam": 0.95, "critic": "separate", "normalize_values": True, "kl_coef": 0.05},
                **{"num_iterations": 1, "num_minibatches": 4, "truncation": "bootstrap", "reward_clip": 20.0},
                "reference_sync": "ema",
            },
        },
    ),
    "grpo": Algorithm("ppo", credit.grpo, "seq-mean-token-mean"),
    "dr_grpo": Algorithm("ppo", credit.dr_grpo, "constant"),
    "dapo": Algorithm(
        "ppo",
        credit.grpo,
        defaults={"num_generations": 16, "filter_zero_std": True},
        loss_options={"clip_high": 0.28},
    ),
    "gspo": Algorithm("gspo", credit.grpo, "seq-mean-token-mean"),
    "cispo": Algorithm("cispo", credit.grpo),
    "sapo": Algorithm("sapo", credit.grpo, "seq-mean-token-mean"),
    "rloo": Algorithm(
        "rloo",
        credit.rloo,
        "seq-mean-token-sum",
        defaults={**IN_REWARD, "kl_coef": 0.05, "num_generations": 4},
    ),
    "reinforce_pp": Algorithm(
        "ppo", credit.reinforce_pp, defaults={**IN_REWARD, "kl_coef": 0.01, "num_generations": 1}
    ),
    "reinforce_pp_baseline": Algorithm(
        "ppo", credit.reinforce_pp_baseline, defaults={"kl_coef": 0.001, "kl_estimator": "k2"}
    ),
    "reinforce": Algorithm("pg", credit.reinforce, defaults={**IN_REWARD, "kl_coef": 0.05, "num_generations": 1}),
    "remax": Algorithm("pg", credit.remax, greedy=True, defaults={**IN_REWARD, "kl_coef": 0.05, "num_generations": 1}),
    "raft": Algorithm("sft", select="best"),
    "online_dpo": Algorithm("dpo", select="best_and_worst", defaults={"num_generations": 2}),
}
LEAST = sys.float_info.min
"""The smallest number above 0."""
GROUPED = (credit.grpo, credit.dr_grpo, credit.rloo, credit.reinforce_pp_baseline)
"""Credits that compare the completions of one prompt, of which there must be several."""


@dataclass(frozen=True)
class OnPolicy:
    """An algorithm with its settings filled in, and how it samples."""

    algorithm: Algorithm
    settings: AlgorithmConfig
    sampler: SamplerConfig

    @property
    def charges_kl(self) -> bool:
        """Whether the KL from the reference is part of the reward."""
        return bool(self.settings.kl_coef) and self.settings.kl_where == "reward"

    @property
    def adds_kl(self) -> bool:
        """Whether it is a term of the loss."""
        return bool(self.settings.kl_coef) and self.settings.kl_where == "loss"

    @property
    def has_critic(self) -> bool:
        """Whether values are learned."""
        return self.settings.critic != "none"

    @property
    def num_updates(self) -> int:
        """Optimizer updates of a step."""
        assert self.settings.num_iterations is not None and self.settings.num_minibatches is not None
        return self.settings.num_iterations * self.settings.num_minibatches


def settle(known: Sequence[str], given: AlgorithmConfig) -> AlgorithmConfig:
    """The settings with those filled in that were left to the algorithm.

    Args:
        known: the algorithms that the command has, its default first.
        given: the section.

    Raises:
        ValueError: an unknown name or preset, or settings that exclude each other.
    """
    name = given.name or known[0]
    if name not in known:
        raise ValueError(f"unknown algorithm.name {name!r}{nearest(name, known)} (all: {', '.join(known)})")
    values = {**DEFAULTS, **ALGORITHMS[name].defaults, **preset(name, given.preset)}
    unset = {f.name for f in fields(given) if getattr(given, f.name) == f.default}
    settled = replace(given, name=name, **{key: value for key, value in values.items() if key in unset})
    check(ALGORITHMS[name], settled)
    return settled


def loss_defaults(name: str, preset_name: str | None) -> dict[str, Any]:
    """Keyword arguments of the algorithm's loss that differ from the loss's own defaults."""
    presets = ALGORITHMS[name].presets
    return {**ALGORITHMS[name].loss_options, **presets.get(preset_name or "", {}).get("loss", {})}


def preset(name: str, asked: str | None) -> dict[str, Any]:
    """The settings of a preset, none where none is asked for."""
    presets = ALGORITHMS[name].presets
    if asked is None:
        return {}
    if asked not in presets:
        raise ValueError(f"algorithm.preset: {name} has {', '.join(presets) or 'no presets'}, got {asked!r}")
    return {key: value for key, value in presets[asked].items() if key != "loss"}


RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("gamma", "lam"), (0, 1, "in [0, 1]")),
    **dict.fromkeys(("kl_coef", "entropy_coef", "vf_coef", "critic_lr", "critic_warmup"), (0, math.inf, "at least 0")),
    "truncation_penalty": (0, math.inf, "at least 0"),
    **dict.fromkeys(("kl_horizon", "reference_steps", "correction_cap"), (1, math.inf, "at least 1")),
    **dict.fromkeys(("value_clip", "reward_clip", "kl_target", "target_kl"), (LEAST, math.inf, "above 0")),
    "max_ratio": (math.nextafter(1, 2), math.inf, "above 1"),
    **dict.fromkeys(("reference_alpha", "best_fraction"), (LEAST, 1, "above 0 and at most 1")),
    **dict.fromkeys(("reward_scale", "reward_bias"), (-sys.float_info.max, sys.float_info.max, "finite")),
}
"""The least and the most that settings may be, None excepted, and how errors say it. NaN is in no range."""


def check(algorithm: Algorithm, settings: AlgorithmConfig) -> None:
    """Refuse settings that cannot be meant, alone or together."""
    for key, (least, most, text) in RANGES.items():
        value = getattr(settings, key)
        if value is not None and not least <= value <= most:
            raise ValueError(f"algorithm.{key} must be {text}, got {value}")
    several = algorithm.credit in GROUPED or algorithm.select != "all"
    bounds = {
        "num_generations": 2 if several else 1,
        "num_iterations": 1,
        "num_minibatches": 1,
        "max_resample_batches": 1,
    }
    for key, least in bounds.items():
        if getattr(settings, key) < least:
            why = f" for {settings.name}, which compares the completions of a prompt" if least == 2 else ""
            raise ValueError(f"algorithm.{key} must be at least {least}{why}, got {getattr(settings, key)}")
    refuse = {
        "kl_estimator k1 has no gradient that means anything: use k2 or k3 where kl_where is loss": (
            settings.kl_where == "loss" and settings.kl_estimator == "k1" and bool(settings.kl_coef)
        ),
        "kl_target adapts the price of KL in the reward: set kl_where to reward": (
            settings.kl_target is not None and settings.kl_where != "reward"
        ),
        "truncation bootstrap needs a critic": settings.truncation == "bootstrap" and settings.critic == "none",
        f"critic {settings.critic}: {settings.name} has no critic": (
            settings.critic != "none" and algorithm.credit is not credit.gae
        ),
        "critic none: ppo needs a critic; grpo and rloo do without": (
            settings.critic == "none" and algorithm.credit is credit.gae
        ),
        "critic_path, critic_lr and critic_warmup are of a separate critic: set critic to separate": (
            settings.critic != "separate"
            and bool(settings.critic_path or settings.critic_warmup or settings.critic_lr is not None)
        ),
        "normalize_values: there is no critic whose values these are": bool(settings.normalize_values)
        and settings.critic == "none",
        f"reference_sync {settings.reference_sync}: no reference is read where kl_coef is 0": (
            settings.reference_sync != "none" and algorithm.loss != "dpo" and not settings.kl_coef
        ),
        "filter_zero_std needs completions that are compared: set num_generations to 2 or more": (
            bool(settings.filter_zero_std) and settings.num_generations == 1
        ),
        "best_fraction is of raft": settings.best_fraction is not None and algorithm.select != "best",
    }
    refuse |= {
        f"{key} {value}: {settings.name} trains on selected completions, which has no such setting: leave it out": True
        for key, value in unread(algorithm, settings).items()
    }
    for text, wrong in refuse.items():
        if wrong:
            raise ValueError(f"algorithm.{text}")


def unread(algorithm: Algorithm, settings: AlgorithmConfig) -> dict[str, Any]:
    """Settings of policy gradients that were changed for an algorithm that selects completions."""
    if algorithm.credit is not None:
        return {}
    own = ("num_iterations", "num_minibatches", "kl_coef", "normalize_advantages", "entropy_coef", "kl_target")
    own += ("target_kl", "max_ratio", "correction")
    unset = {**{f.name: f.default for f in fields(settings)}, **DEFAULTS}
    changed = {key: getattr(settings, key) for key in own if getattr(settings, key) != unset[key]}
    return changed | ({"truncation": "mask"} if settings.truncation == "mask" else {})


def page() -> str:
    """The algorithms as a table in Markdown, for the page of methods."""
    head = ["| algorithm | loss | reduction | trained on | defaults |", "|---|---|---|---|---|"]
    rows = []
    for name, one in ALGORITHMS.items():
        own = {**one.defaults, **{f"loss.{key}": value for key, value in one.loss_options.items()}}
        words = ", ".join(f"{key} {value}" for key, value in own.items()) or "-"
        rows.append(f"| `{name}` | `{one.loss}` | {one.reduction} | {one.select.replace('_', ' ')} | {words} |")
    common = ", ".join(f"{key} {value}" for key, value in DEFAULTS.items())
    about = f"What each is made of, and its settings (`algorithm.*`) where they differ from {common}:\n"
    return "\n".join(["### Algorithms\n", about, *head, *rows, ""])
