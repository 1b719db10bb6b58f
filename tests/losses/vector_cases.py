"""The published cases as calls of this package: one function per kind of case, which returns what the case expects.

Each function gets the case's inputs as tensors of the dtype under test and its parameters, and returns every value and
every coefficient of ``expected`` under the same key. Coefficients come from autograd through the functions that train.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.data import coreset
from fastalign.engine import lima
from fastalign.losses import policy, preference, preference_free, ranking, reward, supervised, unpaired
from fastalign.losses.distillation import gkd
from fastalign.losses.mixture import settings, weighted_sum
from fastalign.losses.pairs import log_ratios, pair_logps
from fastalign.losses.reduce import Totals, segment_sum, token_mean, token_weights
from fastalign.ops import divergence, gae, token_logps, whiten
from fastalign.pipelines import best_of_n, raft, rlaif
from fastalign.rl import advantages, ema, pairs, rewards, trpo
from fastalign.types import IGNORE_INDEX, LabelledLogps, PairLogps, RankedLogps


class Rows:
    """Padded rows ``[B, T]`` with a mask as packed tokens: masked entries are dropped, so nothing can read them."""

    def __init__(self, mask: Tensor):
        self.mask = mask.bool()
        self.cu_seqlens = torch.nn.functional.pad(self.mask.sum(1).cumsum(0), (1, 0))
        self.totals = {"tokens": int(self.mask.sum()), "sequences": len(mask)}

    def pack(self, x: Tensor) -> Tensor:
        return x.detach()[self.mask].clone()

    def leaf(self, x: Tensor) -> Tensor:
        return self.pack(x).requires_grad_()

    def pad(self, x: Tensor) -> Tensor:
        return x.detach().new_zeros(self.mask.shape).masked_scatter(self.mask, x.detach())

    def sums(self, x: Tensor) -> Tensor:
        return segment_sum(x, self.cu_seqlens)


# --- preference pairs ------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[str, Any]] = {
    "dpo_sigmoid": ("dpo", lambda beta: {"beta": beta}),
    "cdpo": ("cdpo", lambda beta, eps: {"beta": beta, "label_smoothing": eps}),
    "robust_dpo": ("robust", lambda beta, eps: {"beta": beta, "label_smoothing": eps}),
    "ipo_avg": ("ipo", lambda tau: {"beta": tau}),
    "ipo_sum": ("ipo_sum", lambda tau: {"beta": tau}),
    "hinge": ("hinge", lambda beta: {"beta": beta}),
    "slic_original": ("slic", lambda margin, lam: {"margin": margin, "lam": lam}),
    "dpop": ("dpop", lambda beta, lam: {"beta": beta, "lam": lam}),
    "r_dpo": ("r_dpo", lambda beta, alpha: {"beta": beta, "alpha": alpha}),
    "ln_dpo": ("ln_dpo", lambda beta: {"beta": beta}),
    "exo_pair": ("exo", lambda beta, eps: {"beta": beta, "label_smoothing": eps}),
    "nca_pair": ("nca", lambda beta: {"beta": beta}),
    "bco_pair": ("bco_pair", lambda beta: {"beta": beta}),
    "sppo_hard": ("sppo", lambda beta: {"beta": beta}),
    "aot": ("aot", lambda beta, eps: {"beta": beta, "label_smoothing": eps}),
    "aot_unpaired": ("aot_unpaired", lambda beta, eps: {"beta": beta, "label_smoothing": eps}),
    "apo_zero": ("apo_zero", lambda beta: {"beta": beta}),
    "apo_down": ("apo_down", lambda beta: {"beta": beta}),
    "simpo": ("simpo", lambda beta, gamma: {"beta": beta, "gamma_beta_ratio": gamma / beta}),
    "cpo_pref": ("cpo", lambda beta: {"beta": beta, "cpo_alpha": 0.0}),
    "orpo_or": ("orpo", lambda lam: {"beta": lam, "nll_weight": 0.0, "max_mean_logp": 0.0}),
    "cpo_full": ("cpo", lambda beta, alpha: {"beta": beta, "cpo_alpha": alpha}),
    "orpo_full": ("orpo", lambda lam: {"beta": lam}),
    "ld_dpo": ("ld_dpo", lambda beta, ld_alpha: {"beta": beta, "ld_alpha": ld_alpha}),
}
"""Our name of each pair loss, and our keyword arguments from the case's parameters."""


def pair_of_sums(name, inputs, params):
    """Cases that give sequence log-probs: one pair by hand, or extreme ones."""
    loss, options = PAIRS[name][0], PAIRS[name][1](**params)
    sums = {key: inputs[key].reshape(-1) for key in ("Lw", "Ll", "Rw", "Rl") if key in inputs}
    chosen, rejected = (sums[key].clone().requires_grad_() for key in ("Lw", "Ll"))
    references = (sums.get(key, torch.zeros_like(chosen)) for key in ("Rw", "Rl"))
    lengths = (inputs[key].reshape(-1).long() for key in ("nw", "nl"))
    pair = PairLogps(chosen, rejected, *references, *lengths)
    losses = preference.LOSSES[loss](pair, **options)
    shape = inputs["Lw"].shape
    c_w, c_x = (c.view(shape) for c in torch.autograd.grad(losses.mean(), (chosen, rejected)))
    result = {"loss_per_pair": losses, "loss": losses.mean(), "d_seq_w": c_w, "d_seq_l": c_x}
    if loss == "orpo":
        result["log1mexp_chosen_mean"] = preference_free.log1mexp(chosen / pair.chosen_lengths)
    return result


class Pairs:
    """Ragged pairs as packed neighbours, chosen before rejected."""

    def __init__(self, inputs, names=("logp", "ref")):
        mask = self.interleave(inputs["mask_w"], inputs["mask_l"])
        self.rows, self.number = Rows(mask), len(mask) // 2
        first, second = names
        self.logps = self.rows.leaf(self.interleave(inputs[f"{first}_w"], inputs[f"{first}_l"]))
        self.ref_logps = None
        if f"{second}_w" in inputs:
            self.ref_logps = self.rows.pack(self.interleave(inputs[f"{second}_w"], inputs[f"{second}_l"]))
        self.pair = pair_logps(self.logps, self.rows.cu_seqlens, self.ref_logps, tails=True)

    @staticmethod
    def interleave(chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.stack([chosen, rejected], 1).flatten(0, 1)

    def coefficients(self, loss: Tensor) -> dict[str, Tensor]:
        c_w, c_x, g = torch.autograd.grad(loss, (self.pair.chosen, self.pair.rejected, self.logps), allow_unused=True)
        padded = self.rows.pad(g)
        return {"d_seq_w": c_w, "d_seq_l": c_x, "d_logp_w": padded[0::2], "d_logp_l": padded[1::2]}


def ragged_pairs(name, inputs, params):
    loss, options = PAIRS[name][0], PAIRS[name][1](**params)
    options = {**settings({loss: preference.LOSSES[loss]}), **options}
    given = Pairs(inputs)
    losses = preference.LOSSES[loss](given.pair, **options)
    sums = preference.metrics(given.pair, losses, [loss], options)
    shown = losses[rank_order(loss, given.pair)]
    result = {"loss": losses.mean(), "loss_per_pair": shown, "metrics": mean_metrics(sums)}
    return {
        **result,
        **given.coefficients(losses.mean()),
        **PARTS.get(loss, lambda *_: {})(given.pair, result["metrics"]),
    }


def rank_order(loss, pair):
    """AOT's losses are listed by rank, not by pair."""
    by_rank = {"aot": pair.chosen - pair.rejected, "aot_unpaired": log_ratios(pair)[0]}
    return by_rank[loss].argsort() if loss in by_rank else torch.arange(len(pair.chosen))


def mean_metrics(sums):
    return {name: total[0] / total[1] for name, total in sums.items()}


PARTS = {
    "cpo": lambda pair, metrics: {
        "nll_loss": metrics["nll_loss"],
        "pref_loss": preference_free.cpo(pair, beta=0.1, cpo_alpha=0.0).mean(),
    },
    "orpo": lambda pair, metrics: {
        "nll_loss": metrics["nll_loss"],
        "or_loss": -metrics["log_odds_ratio"],
        "log_odds": preference_free.log_odds_ratio(pair, 0.0),
    },
}


def dpo_plus_sft(inputs, params):
    given = Pairs(inputs)
    options = {"beta": params["beta"], "loss_weights": [1.0, params["alpha"]]}
    chosen = {name: preference.LOSSES[name] for name in ("dpo", "sft")}
    loss = weighted_sum(chosen, given.pair, options).mean()
    return {"loss": loss, **given.coefficients(loss)}


def tdpo(inputs, params):
    name = "tdpo1" if params["alpha"] is None else "tdpo2"
    options = {key: value for key, value in params.items() if value is not None}
    shape = inputs["mask_w"].shape[0] * 2, *inputs["logits_w"].shape[1:]
    logits, ref_logits = (
        Pairs.interleave(inputs[f"{kind}_w"], inputs[f"{kind}_l"]).flatten(0, 1).clone()
        for kind in ("logits", "ref_logits")
    )
    rows = Rows(Pairs.interleave(inputs["mask_w"], inputs["mask_l"]))
    labels = Pairs.interleave(inputs["labels_w"], inputs["labels_l"]).flatten().long()
    labels = torch.where(rows.mask.flatten(), labels, IGNORE_INDEX)
    logits.requires_grad_()
    logps, ref_logps = token_logps(logits, labels), token_logps(ref_logits, labels)
    kls = divergence(logits, ref_logits, labels=labels)
    offsets = torch.arange(shape[0] + 1) * shape[1]
    pair = pair_logps(logps, offsets, ref_logps)
    kl_sums = segment_sum(kls, offsets)
    pair = replace(pair, chosen_kls=kl_sums[0::2], rejected_kls=kl_sums[1::2])
    losses = preference.LOSSES[name](pair, **options)
    g, f, dz = torch.autograd.grad(losses.mean(), (logps, kls, logits))
    chosen, rejected = log_ratios(pair)
    padded = {"d_logp": g.view(shape[:2]), "d_fkl": f.view(shape[:2]), "d_logits": dz.view(shape)}
    masked = {"d_logp": rows.mask, "d_fkl": rows.mask}
    padded = {key: torch.where(masked[key], x, 0.0) if key in masked else x for key, x in padded.items()}
    sides = {f"{key}_{side}": x[i::2] for key, x in padded.items() for i, side in enumerate("wl")}
    means = mean_metrics(preference.metrics(pair, losses, [name], options))
    known = {"seq_fkl_w": pair.chosen_kls, "seq_fkl_l": pair.rejected_kls, "metrics": means}
    return {"loss": losses.mean(), "logratio_w": chosen, "logratio_l": rejected, **known, **sides}


# --- unpaired and ranked ---------------------------------------------------------------------------------------------


def unpaired_case(name, inputs, params):
    rows = Rows(inputs["mask"])
    logps = rows.leaf(inputs["logp"])
    sums = rows.sums(logps)
    batch = LabelledLogps(sums, rows.sums(rows.pack(inputs["ref"])), inputs["label"].bool())
    if name == "kto":
        other = Rows(inputs["kl_mask"])
        mismatched = (other.sums(other.pack(inputs[key])) for key in ("kl_logp", "kl_ref"))
        baseline = unpaired.kto_baseline(unpaired.make_baseline(), *mismatched, beta=params["beta"])
        weights = {"desirable_weight": params["w_desirable"], "undesirable_weight": params["w_undesirable"]}
        losses = unpaired.kto(batch, baseline, beta=params["beta"], **weights)
        told = {"kl": baseline.mean}
    else:
        before = unpaired.make_baseline(params["running_mean"], params["running_count"])
        baseline = unpaired.bco_baseline(before, sums, batch.ref_logps, beta=params["beta"])
        losses = unpaired.bco(batch, baseline, beta=params["beta"])
        told = {"delta": baseline.mean, "new_running_count": baseline.count}
    c, g = torch.autograd.grad(losses.mean(), (sums, logps))
    return {"loss": losses.mean(), "loss_per_seq": losses, "d_seq": c, "d_logp": rows.pad(g), **told}


def rrhf(inputs, params):
    rows = Rows(inputs["mask"])
    logps = rows.leaf(inputs["logp"])
    offsets = torch.tensor([0, len(inputs["rewards"])])
    batch = RankedLogps(rows.sums(logps), rows.cu_seqlens.diff(), inputs["rewards"], offsets)
    losses = ranking.rrhf(batch, **params)
    (g,) = torch.autograd.grad(losses.sum(), logps)
    told = mean_metrics(ranking.metrics(batch, losses, **params))
    scores = ranking.candidate_scores(batch, params["length_penalty"])
    best = ranking.best(batch, batch.rewards).nonzero().item()
    parts = {key: told[key] for key in ("rank_loss", "sft_loss")}
    return {"loss": losses.sum(), "d_logp": rows.pad(g), "scores": scores, "best": best, **parts}


# --- policy gradients ------------------------------------------------------------------------------------------------


def weighted(rows, losses, reduction, budget=1):
    """The reduced loss, by weights and by the reduction of that name."""
    weights = token_weights(reduction, rows.cu_seqlens, Totals(**rows.totals, budget=budget))
    return (weights.to(losses.dtype) * losses).sum()


def clipped_surrogate(inputs, params, variant="ppo"):
    rows = Rows(inputs["mask"])
    logps, old = rows.leaf(inputs["logp"]), rows.pack(inputs["old"])
    credit, known = rows.pack(inputs["advantages"]), policy.VARIANTS[variant]
    assert known.reduction == params["reduction"]
    clips = {key: params[key] for key in ("clip_low", "clip_high")}
    losses = policy.LOSSES[known.loss](logps, old, credit, **clips, dual_clip=params["dual_clip"])
    told = mean_metrics(policy.metrics(logps, old, credit, **clips))
    shown = {
        "policy/clipfrac": told["policy/clipfrac_avg"],
        "policy/approxkl_k1": policy.k1(old, logps).mean(),
        "policy/approxkl_k2": told["policy/approxkl_avg"],
        "policy/approxkl_k3": policy.k3(old, logps).mean(),
        "policy/ratio_mean": told["val/ratio"],
    }
    if "ref" in inputs:
        kl = policy.k3(logps, rows.pack(inputs["ref"]))
        losses, shown["kl_ref_k3_mean"] = losses + params["kl_coef"] * kl, kl.mean()
    loss = weighted(rows, losses, params["reduction"], params["const"] or 1)
    (g,) = torch.autograd.grad(loss, logps)
    return {
        "loss": loss,
        "d_logp": rows.pad(g),
        "clip_active": active(rows, logps, old, credit, params),
        "metrics": shown,
    }


def active(rows, logps, old, credit, params):
    """Where the clipped surrogate has a gradient, told by the gradient itself; a zero advantage counts as positive."""
    leaf, nudged = logps.detach().requires_grad_(), torch.where(credit == 0, 1.0, credit)
    clips = {key: params[key] for key in ("clip_low", "clip_high", "dual_clip")}
    (g,) = torch.autograd.grad(policy.ppo(leaf, old, nudged, **clips).sum(), leaf)
    return rows.pad((g != 0).to(g.dtype))


def gspo(inputs, params):
    rows = Rows(inputs["mask"])
    logps, old = rows.leaf(inputs["logp"]), rows.pack(inputs["old"])
    credit = advantages.spread(inputs["advantages"], rows.cu_seqlens)
    loss = weighted(rows, policy.gspo(logps, old, credit, rows.cu_seqlens, **params), "seq-mean-token-mean")
    (g,) = torch.autograd.grad(loss, logps)
    moved = policy.gspo(logps, old, torch.ones_like(credit), rows.cu_seqlens, clip_low=1.0, clip_high=1e9)
    ratio = -moved[rows.cu_seqlens[:-1]]
    positive = advantages.spread(torch.where(inputs["advantages"] == 0, 1.0, inputs["advantages"]), rows.cu_seqlens)
    leaf = logps.detach().requires_grad_()
    (slope,) = torch.autograd.grad(policy.gspo(leaf, old, positive, rows.cu_seqlens, **params).sum(), leaf)
    starts = rows.cu_seqlens[:-1]
    on = (slope != 0).to(slope.dtype)[starts]
    return {"loss": loss, "seq_ratio": ratio, "clip_active": on, "d_seq": g[starts], "d_logp": rows.pad(g)}


def cispo(inputs, params):
    rows = Rows(inputs["mask"])
    logps, old = rows.leaf(inputs["logp"]), rows.pack(inputs["old"])
    bounds = {key: params[key] for key in ("ratio_min", "ratio_max")}
    losses = policy.cispo(logps, old, rows.pack(inputs["advantages"]), **bounds)
    loss = weighted(rows, losses, params["reduction"])
    (g,) = torch.autograd.grad(loss, logps)
    ratio = policy.token_ratio(logps, old)
    outside = (ratio > params["ratio_max"]) | (ratio < (params["ratio_min"] or 0.0))
    return {"loss": loss, "d_logp": rows.pad(g), "clipfrac": outside.double().mean()}


def rloo(inputs, params, clipped):
    rows = Rows(inputs["mask"])
    logps, old, ref = rows.leaf(inputs["logp"]), rows.pack(inputs["old"]), rows.pack(inputs["ref"])
    charged = rewards.charge_kl(inputs["rewards"], old, ref, rows.cu_seqlens, kl_coef=params["kl_coef"])
    credit = advantages.rloo(charged, inputs["group"])
    spread = advantages.spread(credit, rows.cu_seqlens)
    clips = {key: value for key, value in params.items() if key.startswith("clip")}
    losses = policy.rloo(logps, old, spread, rows.cu_seqlens, **clips) if clipped else policy.pg(logps, old, spread)
    loss = weighted(rows, losses, policy.VARIANTS["rloo"].reduction)
    (g,) = torch.autograd.grad(loss, logps)
    return {"rewards_with_kl": charged, "advantages": credit, "loss": loss, "d_logp": rows.pad(g)}


def reinforce(inputs, params):
    rows = Rows(inputs["mask"])
    logps, credit = rows.leaf(inputs["logp"]), advantages.batch_mean(inputs["rewards"])
    losses = policy.pg(logps, logps.detach(), advantages.spread(credit, rows.cu_seqlens))
    loss = weighted(rows, losses, params["reduction"])
    (g,) = torch.autograd.grad(loss, logps)
    return {"advantages": credit, "loss": loss, "d_logp": rows.pad(g)}


def remax(inputs, params, estimator):
    rows = Rows(inputs["mask"])
    logps, old, ref = rows.leaf(inputs["logp"]), rows.pack(inputs["old"]), rows.pack(inputs["ref"])
    knobs = {key: params[key] for key in ("gamma", "reward_clip") if params[key] is not None}
    scores = inputs["rewards"], inputs["greedy_rewards"]
    credit = estimator(*scores, params["kl_coef"] * (ref - old), rows.cu_seqlens, **knobs)
    loss = weighted(rows, policy.pg(logps, old, credit), policy.VARIANTS["remax"].reduction)
    (g,) = torch.autograd.grad(loss, logps)
    return {"advantages": rows.pad(credit), "loss": loss, "d_logp": rows.pad(g)}


def kl_estimators(inputs, params):
    rows = Rows(inputs["mask"])
    logps, ref = rows.leaf(inputs["logp"]), rows.pack(inputs["ref"])
    result = {}
    for name in ("k1", "k2", "k3"):
        values = policy.KL_ESTIMATORS[name](logps, ref)
        (g,) = torch.autograd.grad(values.sum(), logps)
        result |= {name: rows.pad(values), f"d_{name}": rows.pad(g)}
    return result


def ppo_step(inputs, params):
    rows = Rows(inputs["mask"])
    logps, values = rows.leaf(inputs["logp"]), rows.leaf(inputs["values"])
    old, old_values, credit, returns = (rows.pack(inputs[k]) for k in ("old", "old_values", "advantages", "returns"))
    clips = {key: params[key] for key in ("clip_low", "clip_high")}
    tokens = rows.totals["tokens"]
    actor = token_mean(policy.ppo(logps, old, credit, **clips), tokens)
    critic = token_mean(policy.value_loss(values, old_values, returns, value_clip=params["value_clip"]), tokens)
    loss = actor + params["vf_coef"] * critic
    g, gv = torch.autograd.grad(loss, (logps, values))
    told = {"actor_loss": actor, "critic_loss": critic, "loss": loss}
    return {**told, "d_logp": rows.pad(g), "d_value": rows.pad(gv)}


# --- advantages and rewards ------------------------------------------------------------------------------------------


def grpo_zero_std(inputs, params):
    keep = rewards.informative_groups(inputs["rewards"], inputs["group"])
    return {"advantages": advantages.grpo(inputs["rewards"], inputs["group"], **params), "keep_group": keep.item()}


def grpo_process(inputs, params):
    rows = Rows(inputs["mask"])
    starts = rows.cu_seqlens[:-1].tolist()
    ends = [start + end for start, row in zip(starts, inputs["step_end_index"], strict=True) for end in row]
    steps = torch.cat(list(map(inputs["mask"].new_tensor, inputs["step_rewards"])))
    group = torch.zeros(len(starts), dtype=torch.int64)
    return {
        "advantages": rows.pad(advantages.grpo_process(steps, torch.tensor(ends), group, rows.cu_seqlens, **params))
    }


def reinforce_pp(inputs, params):
    rows = Rows(inputs["mask"])
    old, ref = rows.pack(inputs["old"]), rows.pack(inputs["ref"])
    made = rewards.token_rewards(old, ref, inputs["rewards"], rows.cu_seqlens, kl_coef=params["kl_coef"])
    assert params["ddof"] == 1
    credit, returns = advantages.reinforce_pp(made, rows.cu_seqlens, gamma=params["gamma"], eps=params["eps"])
    return {"token_rewards": rows.pad(made), "returns": rows.pad(returns), "advantages": rows.pad(credit)}


def reinforce_pp_baseline(inputs, params):
    rows = Rows(inputs["mask"])
    assert params["ddof"] == 1
    credit = advantages.reinforce_pp_baseline(inputs["rewards"], inputs["group"], rows.cu_seqlens, eps=params["eps"])
    return {"advantages": rows.pad(credit)}


def rollout(inputs, params):
    rows = Rows(inputs["mask"])
    old, ref, values = (rows.pack(inputs[key]) for key in ("old", "ref", "old_values"))
    scores, last = inputs["score"], None
    if "truncated" in inputs:
        assert params["score_if_truncated"] is False
        scores, last = torch.where(inputs["truncated"].bool(), 0.0, scores), inputs["bootstrap_value"]
    made = rewards.token_rewards(old, ref, scores, rows.cu_seqlens, kl_coef=params["kl_coef"])
    credit, returns = gae(made, values, rows.cu_seqlens, params["gamma"], params["lam"], last_values=last)
    return {"rewards": rows.pad(made), "returns": rows.pad(returns), "advantages": rows.pad(credit)}


def normalised(inputs, params):
    eps_in = {"std+eps": "std", "sqrt(var+eps)": "variance"}[params["form"]]
    options = {"eps": params["eps"], "eps_in": eps_in, "unbiased": bool(params["ddof"])}
    return {"out": whiten(inputs["advantages"], inputs["mask"], **options)}


def ema_reference(inputs, params):
    reference = inputs["reference"].clone()
    for _ in range(params["steps"]):
        ema.ema_update([reference], [inputs["policy"]], eta=params["eta"])
    return {"reference": reference}


def adaptive_kl(inputs, params):
    coefficients, knobs = [params["init"]], {"target": params["target"], "horizon": params["horizon"]}
    for kl in inputs["current_kl"].tolist():
        coefficients.append(rewards.adapt_kl_coef(coefficients[-1], kl, num_samples=params["n_steps"], **knobs))
    return {"kl_coef": coefficients[1:]}


# --- straight from logits --------------------------------------------------------------------------------------------


def masked_ce(inputs, params):
    logits, labels, mask = inputs["logits"].clone().requires_grad_(), inputs["labels"].long(), inputs["mask"].bool()
    logps = token_logps(logits, torch.where(mask, labels, IGNORE_INDEX))
    loss = token_mean(supervised.sft(logps), int(mask.sum()))
    g, dz = torch.autograd.grad(loss, (logps, logits))
    everywhere = token_logps(inputs["logits"], labels)
    right = (inputs["logits"].argmax(1) == labels)[mask].double().mean()
    return {"loss": loss, "logp": everywhere, "d_logp": torch.where(mask, g, 0.0), "d_logits": dz, "accuracy": right}


def five_coefficients(inputs, params):
    logits, labels = inputs["logits"].clone().requires_grad_(), inputs["labels"].long()
    logps, entropy = token_logps(logits, labels, entropy=True)
    kinds = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"mix": params["jsd_beta"]}}
    kls = {kind: divergence(logits, inputs["ref_logits"], kind=kind, **mix) for kind, mix in kinds.items()}
    values = {"logp": logps, "entropy": entropy, **kls}
    coefficients = (inputs[f"coef_{key}"] for key in ("logp", "entropy", "fkl", "rkl", "jsd"))
    total = sum((c * value).sum() for c, value in zip(coefficients, values.values(), strict=True))
    return {**values, "d_logits": torch.autograd.grad(total, logits)[0]}


def entropy_bonus(inputs, params):
    logits, mask = inputs["logits"].clone().requires_grad_(), inputs["mask"].bool()
    _, entropy = token_logps(logits, torch.where(mask, 0, IGNORE_INDEX), entropy=True)
    loss = token_mean(policy.entropy_bonus(entropy, **params), int(mask.sum()))
    return {"loss": loss, "d_logits": torch.autograd.grad(loss, logits)[0]}


def distilled(inputs, params):
    logits, mask = inputs["student_logits"].clone().requires_grad_(), inputs["mask"].bool()
    measure = partial(divergence, logits, inputs["teacher_logits"], labels=torch.where(mask, 0, IGNORE_INDEX))
    options = {key: params[key] for key in ("beta", "temperature")}
    losses = gkd(measure, **options)
    loss = token_mean(losses, int(mask.sum()))
    everywhere = gkd(partial(divergence, inputs["student_logits"], inputs["teacher_logits"]), **options)
    return {"loss": loss, "per_token": everywhere, "d_logits": torch.autograd.grad(loss, logits)[0]}


# --- reward models ---------------------------------------------------------------------------------------------------


def bradley_terry(inputs, params, margins):
    chosen, rejected = (inputs[key].clone().requires_grad_() for key in ("chosen", "rejected"))
    losses = reward.reward(chosen, rejected, inputs["margin"] if margins else None, **params)
    c_w, c_x = torch.autograd.grad(losses.mean(), (chosen, rejected))
    told = mean_metrics(reward.metrics(chosen, rejected, losses))
    known = {"accuracy": told["accuracy"], "margin": told["margin"]}
    return {"loss": losses.mean(), "d_chosen": c_w, "d_rejected": c_x, **known}


def soft_label(inputs, params):
    first, second = (inputs[key].clone().requires_grad_() for key in ("score_a", "score_b"))
    loss = reward.soft_label(first, second, inputs["p_a"]).mean()
    c_a, c_b = torch.autograd.grad(loss, (first, second))
    return {"loss": loss, "d_a": c_a, "d_b": c_b}


def k_wise(inputs, params):
    scores = inputs["scores"].clone().requires_grad_()
    ranks = inputs["ranking_best_first"].long().argsort()
    loss = reward.k_wise(scores, ranks, torch.tensor([0, len(scores)])).sum()
    return {"loss": loss, "d_scores": torch.autograd.grad(loss, scores)[0]}


def process_reward(inputs, params):
    shape, labels = inputs["step_logits"].shape, inputs["labels"].flatten().long()
    logits = inputs["step_logits"].flatten().clone().requires_grad_()
    known, offsets = labels != params["ignore"], torch.arange(shape[0] + 1) * shape[1]
    loss = reward.process(logits, labels).sum() / known.sum()
    (g,) = torch.autograd.grad(loss, logits)
    probabilities = torch.where(known, logits.sigmoid(), 0.0).view(shape)
    scores = {f"solution_score_{how}": reward.solution_scores(logits, labels, offsets, how) for how in ("min", "prod")}
    return {"loss": loss, "d_logits": g.view(shape), "step_prob": probabilities, **scores}


# --- selection and labels --------------------------------------------------------------------------------------------


def lima_schedule(inputs, params):
    layers, first, last = params["n_layers"], params["lr0"], params["lr1"]
    dropout = [lima.residual_dropout(int(i), layers, top=params["p_max"]) for i in inputs["layer"]]
    rates = [lima.learning_rate(x, first=first, last=last) for x in inputs["progress"].tolist()]
    return {"residual_dropout": dropout, "lr": rates}


def core_set(inputs, params):
    embedding = coreset.embed(inputs["hidden"], inputs["mask"])
    chosen = coreset.select(embedding, num_clusters=params["k"], budget=params["budget"])
    told = {"cluster": chosen.clusters, "quota": chosen.quotas, "selected": chosen.selected}
    return {"embedding": embedding, **told}


def raft_select(inputs, params):
    scores = inputs["rewards"]
    local, kept = raft.best_of_each(scores)
    top = raft.top_fraction(scores, params["top_fraction"])
    return {
        "local_best_of_k": local,
        "global_top": top,
        "mean_reward": scores.mean(),
        "mean_reward_selected_local": scores[kept].gather(1, local[kept][:, None]).mean(),
        "mean_reward_selected_global": scores[top[:, 0], top[:, 1]].mean(),
    }


def best_of_n_case(inputs, params):
    expected = best_of_n.expected_best(inputs["scores"], params["draws"])[0]
    best = raft.best_of_each(inputs["scores"])[0]
    bound = best_of_n.kl_bound(params["n"])
    return {"best": best, "kl_upper_bound": bound, "expected_best_of_2_draws_row0": expected}


def cai_label(inputs, params):
    options = inputs["logp_A"], inputs["logp_B"]
    return {"p_A": rlaif.preference(*options), "p_A_clamped": rlaif.preference(*options, clamp=tuple(params["clamp"]))}


def cai_debiased(inputs, params):
    orders = [(inputs[f"{order}logp_A"], inputs[f"{order}logp_B"]) for order in ("", "swapped_")]
    return {"p_response1": rlaif.debiased_preference(*orders)}


def online_pairs(inputs, params):
    return dict(zip(("chosen", "rejected", "keep"), pairs.best_and_worst(inputs["rewards"]), strict=True))


CASES = {
    **{f"{name}/hand": partial(pair_of_sums, name) for name in PAIRS},
    **{f"{name}/extreme": partial(pair_of_sums, name) for name in PAIRS},
    **{f"{name}/ragged": partial(ragged_pairs, name) for name in PAIRS},
    "dpo_plus_sft/ragged": dpo_plus_sft,
    "tdpo1/ragged": tdpo,
    "tdpo2/ragged": tdpo,
    "kto/ragged": partial(unpaired_case, "kto"),
    "kto/ragged_kl_clamped": partial(unpaired_case, "kto"),
    "bco_unpaired/ragged": partial(unpaired_case, "bco"),
    "rrhf/sft_sum": rrhf,
    "rrhf/sft_mean": rrhf,
    "adv_grpo_outcome": lambda i, p: {"advantages": advantages.grpo(i["rewards"], i["group"], **p)},
    "adv_grpo_outcome_ddof0": lambda i, p: {"advantages": advantages.grpo(i["rewards"], i["group"], **p)},
    "adv_grpo_zero_std": grpo_zero_std,
    "adv_grpo_process": grpo_process,
    "adv_dr_grpo": lambda i, p: {"advantages": advantages.dr_grpo(i["rewards"], i["group"])},
    "adv_rloo": lambda i, p: {"advantages": advantages.rloo(i["rewards"], i["group"])},
    "adv_reinforce_pp": reinforce_pp,
    "adv_reinforce_pp_baseline": reinforce_pp_baseline,
    "adv_normalise/population_eps1e-5": normalised,
    "adv_normalise/bessel_rsqrt1e-8": normalised,
    "ppo_clip/token_mean": clipped_surrogate,
    "ppo_clip/all_positive_adv": clipped_surrogate,
    "ppo_dual_clip/token_mean": clipped_surrogate,
    "ppo_noclip_seed/token_mean": clipped_surrogate,
    "grpo/seq_mean_token_mean": partial(clipped_surrogate, variant="grpo"),
    "dr_grpo/constant": partial(clipped_surrogate, variant="dr_grpo"),
    "dapo/token_mean": partial(clipped_surrogate, variant="dapo"),
    "gspo": gspo,
    "cispo/minimax_1_plus_eps": cispo,
    "cispo/two_sided": cispo,
    "rloo/clipped_seq_ratio": partial(rloo, clipped=True),
    "rloo/reinforce": partial(rloo, clipped=False),
    "pg_reinforce_baseline": reinforce,
    "remax/local_kl_official": partial(remax, estimator=advantages.remax_local),
    "remax/kl_to_go_default": partial(remax, estimator=advantages.remax),
    "kl_estimators": kl_estimators,
    "dapo_overlong": lambda i, p: {
        "penalty": rewards.overlong_penalty(i["length"], max_length=p["l_max"], buffer=p["l_cache"])
    },
    "dapo_dynamic_sampling": lambda i, p: {"keep_group": rewards.informative_groups(i["rewards"], i["group"])},
    "ppo_rollout/seed_gamma1_lambda1": rollout,
    "ppo_rollout/gae": rollout,
    "ppo_rollout/gae_truncated_bootstrap": rollout,
    "ppo_step/seed_no_clip": ppo_step,
    "ppo_step/clip": ppo_step,
    "ema_reference": ema_reference,
    "adaptive_kl": adaptive_kl,
    "sft/masked_ce": masked_ce,
    "logits_backward/five_coefficients": five_coefficients,
    "entropy_bonus": entropy_bonus,
    **{f"gkd/{kind}_tau{t}": distilled for kind in ("forward_kl", "jsd_0.5", "jsd_0.1", "reverse_kl") for t in (1, 2)},
    "trpo_fisher_vp": lambda i, p: {"hvp": trpo.fisher_vector_product(i["logits"], i["vector"])},
    "reward/bt": partial(bradley_terry, margins=False),
    "reward/bt_centered": partial(bradley_terry, margins=False),
    "reward/bt_margin": partial(bradley_terry, margins=True),
    "reward/bt_margin_centered": partial(bradley_terry, margins=True),
    "reward/soft_label_rlaif": soft_label,
    "reward/k_wise": k_wise,
    "reward/prm_bce": process_reward,
    "lima_schedule": lima_schedule,
    "coreset": core_set,
    "raft_select": raft_select,
    "best_of_n": best_of_n_case,
    "cai_label": cai_label,
    "cai_label_swap_debiased": cai_debiased,
    "online_dpo_pairs": online_pairs,
}
