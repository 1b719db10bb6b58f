"""Whole steps of every algorithm against their formulas, computed apart: padded rows, plain PyTorch in float64."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from onpolicy import MOST, make_groups, make_job, make_models, run
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastalign.rl.algorithms import ALGORITHMS

STEP = 0.5
"""The learning rate."""


# --- padded rows -----------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """``[B, L]`` padded completions of all groups that are trained on; what is told of them ``[B]``."""

    ids: Tensor
    real: Tensor
    scored: Tensor
    rewards: Tensor
    groups: Tensor
    cut: Tensor
    greedy: Tensor
    sampler: Tensor

    @property
    def counts(self) -> Tensor:
        return self.scored.sum(1)


def rows_of(groups, least=2, mask_cut=False, only=None) -> Rows:
    kept = []
    for g, group in enumerate(groups):
        some = [(r, float(x)) for r, x in zip(group.rollouts, group.rewards, strict=True) if not np.isnan(x)]
        some = some if only is None else [(r, x) for r, x in some if r.sample == only[g]]
        kept += [(one, x, g, group.greedy) for one, x in some if len(some) >= least]
    longest = max(len(one.prompt) + len(one.tokens) for one, *_ in kept)
    ids, real, scored = (torch.zeros(len(kept), longest, dtype=torch.long) for _ in range(3))
    sampler = torch.zeros(len(kept), longest, dtype=torch.float64)
    for i, (one, *_) in enumerate(kept):
        start, stop = len(one.prompt), len(one.prompt) + len(one.tokens)
        ids[i, :stop], real[i, :stop] = torch.tensor(np.concatenate([one.prompt, one.tokens])), 1
        scored[i, start:stop] = int(not (mask_cut and one.finish == "length"))
        sampler[i, start:stop] = torch.tensor(one.sampler_logps).double()
    told = [torch.tensor([each[k] for each in kept]) for k in (1, 2, 3)]
    cut = torch.tensor([one.finish == "length" for one, *_ in kept])
    return Rows(ids, real, scored.bool()[:, 1:], told[0].double(), told[1], cut, told[2].double(), sampler[:, 1:])


@dataclass
class Plain:
    """Hugging Face models with their own attention."""

    policy: Any
    reference: Any
    critic: Any = None
    head: Any = None

    @classmethod
    def of(cls, models):
        made = []
        for one in (models.policy, models.reference, models.critic):
            model = None if one is None else copy.deepcopy(one.model)
            if model is not None:
                model.set_attn_implementation("eager")
            made.append(model)
        head = getattr(models.policy, "value_head", None)
        return cls(*made, head=None if head is None else copy.deepcopy(head))

    @property
    def trained(self) -> list[nn.Parameter]:
        modules = [self.policy, self.head, self.critic]
        return [p for m in modules if m is not None for p in m.parameters()]


def log_probs(model, rows: Rows, temperature=1.0) -> Tensor:
    """``[B, L-1]``, 0 where nothing is scored."""
    logits = model(input_ids=rows.ids, attention_mask=rows.real).logits[:, :-1] / temperature
    picked = logits.log_softmax(-1).gather(-1, rows.ids[:, 1:, None])[..., 0]
    return torch.where(rows.scored, picked, 0.0)


def all_values(plain: Plain, rows: Rows) -> Tensor:
    """``[B, L]`` of every state."""
    if plain.critic is not None:
        hidden = plain.critic.transformer(input_ids=rows.ids, attention_mask=rows.real).last_hidden_state
        return plain.critic.score(hidden)[..., 0]
    hidden = plain.policy.transformer(input_ids=rows.ids, attention_mask=rows.real).last_hidden_state
    return plain.head(hidden)[..., 0]


# --- advantages ------------------------------------------------------------------------------------------------------


def to_go(x: Tensor, decay: float = 1.0) -> Tensor:
    """Discounted sums from each position on."""
    y = torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        y[:, t] = x[:, t] + (decay * y[:, t + 1] if t + 1 < x.shape[1] else 0)
    return y


def at_ends(rows: Rows, values: Tensor) -> Tensor:
    """``[B, L]`` with a number at the last scored token of each row."""
    out = torch.zeros(rows.scored.shape, dtype=torch.float64)
    for i, scored in enumerate(rows.scored):
        if scored.any():
            out[i, scored.nonzero()[-1]] = values[i]
    return out


def each_group(rows: Rows, change) -> Tensor:
    out = torch.zeros(len(rows.rewards), dtype=torch.float64)
    for g in rows.groups.unique():
        out[rows.groups == g] = change(rows.charged[rows.groups == g])
    return out


def over_tokens(rows: Rows, x: Tensor, bessel: bool, scale) -> Tensor:
    kept = x[rows.scored]
    return torch.where(rows.scored, (x - kept.mean()) / scale(kept.var(correction=int(bessel))), 0.0)


def spread(rows: Rows, x: Tensor) -> Tensor:
    return x[:, None] * rows.scored


def grpo(rows):
    return spread(rows, each_group(rows, lambda r: (r - r.mean()) / (r.std() + 1e-4)))


def dr_grpo(rows):
    return spread(rows, each_group(rows, lambda r: r - r.mean()))


def rloo(rows):
    return spread(rows, each_group(rows, lambda r: r - (r.sum() - r) / (len(r) - 1)))


def verl(variance):
    return (variance + 1e-8).sqrt()


def reinforce_pp(rows):
    return over_tokens(rows, to_go(at_ends(rows, rows.rewards) + rows.kl_rewards), True, verl)


def reinforce_pp_baseline(rows):
    return over_tokens(rows, dr_grpo(rows), True, verl)


def reinforce(rows):
    return to_go(at_ends(rows, rows.rewards - rows.rewards.mean()) + rows.kl_rewards) * rows.scored


def remax(rows):
    return to_go(at_ends(rows, rows.rewards - rows.greedy) + rows.kl_rewards) * rows.scored


def gae(rows, gamma, lam, normalise, bootstrap, whole=False):
    out = torch.zeros_like(rows.values)
    pay = at_ends(rows, torch.where(rows.cut, 0.0, rows.rewards) if bootstrap else rows.rewards) + rows.kl_rewards
    for i, scored in enumerate(rows.scored):
        after, following = 0.0, rows.last_values[i] if bootstrap and rows.cut[i] else 0.0
        for t in reversed(scored.nonzero()[:, 0].tolist()):
            delta = pay[i, t] + gamma * following - rows.values[i, t]
            after = delta + gamma * lam * after
            out[i, t], following = after, rows.values[i, t]
    rows.returns = (out + rows.values) * rows.scored
    if whole:
        kept = rows.returns[rows.scored]
        rows.returns = (rows.returns - kept.mean()) / kept.std(correction=0) * rows.scored
    return over_tokens(rows, out, False, lambda variance: variance.sqrt() + 1e-5) if normalise else out


# --- losses ----------------------------------------------------------------------------------------------------------


def clipped(ratio, a, low, high):
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def ppo_loss(logps, old, a, rows, low=0.2, high=0.2):
    return clipped((logps - old).exp(), a, low, high)


def gspo_loss(logps, old, a, rows):
    ratio = ((logps - old).sum(1) / rows.counts.clamp(min=1)).exp()
    return clipped(ratio[:, None].expand_as(a), a, 3e-4, 4e-4)


def cispo_loss(logps, old, a, rows):
    return -(logps - old).exp().clamp(max=1.28).detach() * a * logps


def sapo_loss(logps, old, a, rows):
    tau = torch.where(a > 0, a.new_tensor(1.0), a.new_tensor(1.05))
    return -a * 4 / tau * torch.sigmoid(tau * ((logps - old).exp() - 1))


def rloo_loss(logps, old, a, rows):
    ratio = (logps - old).sum(1).exp()
    return clipped(ratio[:, None].expand_as(a), a, 0.2, 0.2) / rows.counts.clamp(min=1)[:, None]


def pg_loss(logps, old, a, rows):
    return -a * logps


def reduce(losses: Tensor, rows: Rows, how: str) -> Tensor:
    losses, sequences = torch.where(rows.scored, losses, 0.0), (rows.counts > 0).sum()
    if how == "tokens":
        return losses.sum() / rows.scored.sum()
    if how == "sequences":
        return (losses.sum(1) / rows.counts.clamp(min=1)).sum() / sequences
    return losses.sum() / sequences / (MOST if how == "constant" else 1)


KL = {
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: (-d).exp() + d - 1,
    "k3+": lambda d: d**2 / 2 + ((-d).exp() + d - 1 - d**2 / 2).detach(),
}
CORRECTIONS = {
    "none": torch.ones_like,
    "truncate": lambda ratio: ratio.clamp(max=2),
    "mask": lambda ratio: ((ratio <= 2) & (ratio >= 0.5)).double(),
}


# --- the step --------------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """What an algorithm's step is."""

    credit: Any
    loss: Any
    how: str
    reward_kl: float = 0.0
    loss_kl: float = 0.0
    estimator: str = "k3"
    passes: int = 1
    parts: int = 1
    least: int = 2
    critic: str = "none"
    value_clip: float | None = 0.2
    temperature: float = 1.0
    entropy: float = 0.0
    correction: str = "none"
    settings: dict = field(default_factory=dict)


def measure(plain: Plain, rows: Rows, recipe: Recipe) -> None:
    """Everything that is fixed over the updates of a step."""
    with torch.no_grad():
        rows.old, rows.ref = (log_probs(m, rows, recipe.temperature) for m in (plain.policy, plain.reference))
        rows.kl_rewards = -recipe.reward_kl * (rows.old - rows.ref)
        rows.charged = rows.rewards + rows.kl_rewards.sum(1)
        if recipe.critic != "none":
            every = all_values(plain, rows)
            rows.values = torch.where(rows.scored, every[:, :-1], 0.0)
            rows.last_values = every.gather(1, rows.real.sum(1)[:, None] - 1)[:, 0]
        rows.advantages = recipe.credit(rows)


FIXED = ("old", "ref", "advantages", "values", "returns")


def expected(plain: Plain, groups, recipe: Recipe) -> dict[str, float]:
    """The updates of a step, made on the plain models; the metrics."""
    rows = rows_of(groups, recipe.least)
    measure(plain, rows, recipe)
    ids, sums = rows.groups.unique().tolist(), {}
    for _ in range(recipe.passes):
        for first in range(recipe.parts):
            at = torch.isin(rows.groups, torch.tensor(ids[first :: recipe.parts]))
            part = Rows(*(getattr(rows, name)[at] for name in rows.__dataclass_fields__))
            for name in FIXED:
                if hasattr(rows, name):
                    setattr(part, name, getattr(rows, name)[at])
            loss, told = total_loss(plain, part, recipe)
            gradients = torch.autograd.grad(loss, plain.trained, allow_unused=True)
            with torch.no_grad():
                for p, g in zip(plain.trained, gradients, strict=True):
                    p -= 0 if g is None else STEP * g
            for name, values in told.items():
                s = sums.setdefault(name, [0.0, 0])
                s[0] += values[part.scored].sum().item()
                s[1] += int(part.scored.sum())
    found = {name: s / n for name, (s, n) in sums.items()}
    told = rows.old if recipe.reward_kl or recipe.passes * recipe.parts > 1 else rows.sampler  # no pass for a metric
    score, kl = rows.rewards.mean().item(), (told - rows.ref).sum(1).mean().item()
    found["objective/scores"] = score
    if recipe.reward_kl or recipe.loss_kl:
        found |= {"objective/kl": kl, "objective/non_score_reward": rows.kl_rewards.sum(1).mean().item()}
        found["objective/rlhf_reward"] = score + found["objective/non_score_reward"]
    found["val/num_eos_tokens"] = int((~rows.cut).sum())
    if recipe.critic != "none":
        missed, returns = ((x[rows.scored]).var(correction=0) for x in (rows.returns - rows.values, rows.returns))
        found["critic/vf_explained_var"] = (1 - missed / returns).item()
    return found


def total_loss(plain: Plain, rows: Rows, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    logps = log_probs(plain.policy, rows, recipe.temperature)
    losses = recipe.loss(logps, rows.old, rows.advantages, rows)
    losses = losses * CORRECTIONS[recipe.correction]((rows.old - rows.sampler).exp())
    ratio = (logps - rows.old).exp()
    told = {"val/ratio": ratio, "policy/approxkl_avg": (logps - rows.old) ** 2 / 2, "loss/policy_avg": losses}
    if recipe.loss_kl or recipe.reward_kl:
        kl = KL[recipe.estimator if recipe.loss_kl else "k3"](logps - rows.ref)
        told["kl"] = kl
        losses = losses + recipe.loss_kl * kl
    if recipe.entropy:
        logits = plain.policy(input_ids=rows.ids, attention_mask=rows.real).logits[:, :-1] / recipe.temperature
        p = logits.log_softmax(-1)
        told["entropy"] = -(p.exp() * p).sum(-1)
        losses = losses - recipe.entropy * told["entropy"]
    loss = reduce(losses, rows, recipe.how)
    if recipe.critic != "none":
        v, e = all_values(plain, rows)[:, :-1], recipe.value_clip
        error = (v - rows.returns) ** 2
        if e is not None:
            near = rows.values + (v - rows.values).clamp(-e, e)
            error = torch.maximum(error, (near - rows.returns) ** 2)
        told["loss/value_avg"] = error / 2
        loss = loss + (0.1 if recipe.critic == "shared" else 1.0) * reduce(error / 2, rows, "tokens")
    return loss, {name: x.detach() for name, x in told.items()}


PPO = Recipe(
    partial(gae, gamma=1, lam=1, normalise=True, bootstrap=False),
    ppo_loss,
    "tokens",
    reward_kl=0.1,
    passes=4,
    least=2,
    critic="shared",
)
RECIPES: dict[str, Recipe] = {
    "ppo": PPO,
    "grpo": Recipe(grpo, ppo_loss, "sequences"),
    "dr_grpo": Recipe(dr_grpo, ppo_loss, "constant"),
    "dapo": Recipe(grpo, partial(ppo_loss, high=0.28), "tokens"),
    "gspo": Recipe(grpo, gspo_loss, "sequences"),
    "cispo": Recipe(grpo, cispo_loss, "tokens"),
    "sapo": Recipe(grpo, sapo_loss, "sequences"),
    "rloo": Recipe(rloo, rloo_loss, "sum", reward_kl=0.05),
    "reinforce_pp": Recipe(reinforce_pp, ppo_loss, "tokens", reward_kl=0.01),
    "reinforce_pp_baseline": Recipe(reinforce_pp_baseline, ppo_loss, "tokens", loss_kl=0.001, estimator="k2"),
    "reinforce": Recipe(reinforce, pg_loss, "tokens", reward_kl=0.05),
    "remax": Recipe(remax, pg_loss, "tokens", reward_kl=0.05),
}
KL_IN_LOSS = {
    f"grpo {kl}": Recipe(
        grpo, ppo_loss, "sequences", loss_kl=0.04, estimator=kl, settings={"kl_coef": 0.04, "kl_estimator": kl}
    )
    for kl in KL
}
CORRECTED = {
    f"grpo {how}": Recipe(grpo, ppo_loss, "sequences", correction=how, settings={"correction": how})
    for how in ("truncate", "mask")
}
VARIANTS = {
    **KL_IN_LOSS,
    **CORRECTED,
    "grpo warm": Recipe(
        grpo,
        ppo_loss,
        "sequences",
        temperature=0.7,
        entropy=0.01,
        settings={"sampler_temperature": 0.7, "entropy_coef": 0.01},
    ),
    "ppo separate": Recipe(**{**vars(PPO), "critic": "separate", "settings": {"critic": "separate"}}),
    "ppo strong": Recipe(
        partial(gae, gamma=1, lam=0.95, normalise=True, bootstrap=True, whole=True),
        ppo_loss,
        "tokens",
        reward_kl=0.05,
        parts=4,
        critic="separate",
        settings={"preset": "strong"},
    ),
    "ppo seed": Recipe(
        partial(gae, gamma=1, lam=1, normalise=False, bootstrap=False),
        partial(ppo_loss, low=np.inf, high=np.inf),
        "tokens",
        reward_kl=1.0,
        passes=4,
        critic="shared",
        value_clip=None,
        settings={"preset": "seed"},
    ),
}


def assert_same(job, plain: Plain, got: dict, want: dict) -> None:
    """The weights behind the step, and the metrics; the weights moved by much more than they differ."""
    modules = [
        job.models.policy.model,
        getattr(job.models.policy, "value_head", None),
        job.models.critic and job.models.critic.model,
    ]
    mine = [p for m in modules if m is not None for p in m.parameters()]
    for a, b in zip(mine, plain.trained, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-11), name


def several(name: str, recipe: Recipe) -> Recipe:
    """The same with two passes over two parts."""
    return Recipe(
        **{
            **vars(recipe),
            "passes": 2,
            "parts": 2,
            "settings": {**recipe.settings, "num_iterations": 2, "num_minibatches": 2},
        }
    )


CASES = [*RECIPES.items(), *((key.split()[0], recipe) for key, recipe in VARIANTS.items())]


@pytest.mark.parametrize("updates", ["as it is", "several"])
@pytest.mark.parametrize("name, recipe", CASES)
def test_a_step_is_what_its_formula_says(tmp_path, name, recipe, updates):
    recipe = several(name, recipe) if updates == "several" else recipe
    models, groups = make_models(recipe.critic), make_groups()
    plain, before = Plain.of(models), copy.deepcopy(models.policy)
    want = expected(plain, groups, recipe)
    layout = {"tokens": 80} if updates == "several" else {"tokens": 10**6, "share_prefix": False}
    job = make_job(
        name,
        models,
        groups,
        tmp_path,
        optim_lr=STEP,
        **{f"batch_{key}": value for key, value in layout.items()},
        **recipe.settings,
    )
    got = run(job)
    assert max((a - b).abs().max() for a, b in zip(before.parameters(), models.policy.parameters(), strict=True)) > 1e-3
    assert_same(job, plain, got, want)


@pytest.mark.parametrize("name", ["raft", "online_dpo"])
def test_selected_completions_are_trained_on_by_their_formula(tmp_path, name):
    models, groups = make_models(), make_groups()
    plain = Plain.of(models)
    chosen = [int(np.nanargmax(group.rewards)) for group in groups]
    worst = [int(np.nanargmin(group.rewards)) for group in groups]
    best, bad = (rows_of(groups, 1, only=places) for places in (chosen, worst))
    logps = log_probs(plain.policy, best)
    if name == "raft":
        loss = -logps.sum() / best.scored.sum()
    else:
        ratios = [
            log_probs(plain.policy, x).sum(1) - log_probs(plain.reference, x).sum(1).detach() for x in (best, bad)
        ]
        loss = -logsigmoid(0.1 * (ratios[0] - ratios[1])).mean()
    gradients = torch.autograd.grad(loss, plain.trained)
    with torch.no_grad():
        for p, g in zip(plain.trained, gradients, strict=True):
            p -= STEP * g
    job = make_job(name, models, groups, tmp_path, optim_lr=STEP)
    assert_same(job, plain, run(job), {"loss": loss.item()})


def test_every_algorithm_has_its_formula():
    assert {*RECIPES, "raft", "online_dpo"} == {*ALGORITHMS}
