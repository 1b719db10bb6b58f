"""Published cases of policy gradients, advantages and rewards, as calls of this package."""

from functools import partial
from typing import Any

import torch
from torch import nn
from vector_rows import Rows, mean_metrics

from fastalign.losses import policy
from fastalign.losses.reduce import Totals, repeat_segments, token_mean, token_weights
from fastalign.ops import gae, whiten
from fastalign.parallel.reallocate import move
from fastalign.rl import advantages, algorithms, rewards

# --- policy gradients ------------------------------------------------------------------------------------------------


def weighted(rows, losses, reduction, budget=1):
    """The reduced loss, by weights and by the reduction of that name."""
    weights = token_weights(reduction, rows.cu_seqlens, Totals(**rows.totals, budget=budget))
    return (weights.to(losses.dtype) * losses).sum()


def clipped_surrogate(inputs, params, variant="ppo"):
    rows = Rows(inputs["mask"])
    logps, old = rows.leaf(inputs["logp"]), rows.pack(inputs["old"])
    credit, known = rows.pack(inputs["advantages"]), algorithms.ALGORITHMS[variant]
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
    credit = repeat_segments(inputs["advantages"], rows.cu_seqlens)
    loss = weighted(rows, policy.gspo(logps, old, credit, rows.cu_seqlens, **params), "seq-mean-token-mean")
    (g,) = torch.autograd.grad(loss, logps)
    moved = policy.gspo(logps, old, torch.ones_like(credit), rows.cu_seqlens, clip_low=1.0, clip_high=1e9)
    ratio = -moved[rows.cu_seqlens[:-1]]
    positive = repeat_segments(torch.where(inputs["advantages"] == 0, 1.0, inputs["advantages"]), rows.cu_seqlens)
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
    spread = repeat_segments(credit, rows.cu_seqlens)
    clips = {key: value for key, value in params.items() if key.startswith("clip")}
    losses = policy.rloo(logps, old, spread, rows.cu_seqlens, **clips) if clipped else policy.pg(logps, old, spread)
    loss = weighted(rows, losses, algorithms.ALGORITHMS["rloo"].reduction)
    (g,) = torch.autograd.grad(loss, logps)
    return {"rewards_with_kl": charged, "advantages": credit, "loss": loss, "d_logp": rows.pad(g)}


def reinforce(inputs, params):
    rows = Rows(inputs["mask"])
    logps, credit = rows.leaf(inputs["logp"]), advantages.batch_mean(inputs["rewards"])
    losses = policy.pg(logps, logps.detach(), repeat_segments(credit, rows.cu_seqlens))
    loss = weighted(rows, losses, params["reduction"])
    (g,) = torch.autograd.grad(loss, logps)
    return {"advantages": credit, "loss": loss, "d_logp": rows.pad(g)}


def remax(inputs, params, estimator):
    rows = Rows(inputs["mask"])
    logps, old, ref = rows.leaf(inputs["logp"]), rows.pack(inputs["old"]), rows.pack(inputs["ref"])
    knobs = {key: params[key] for key in ("gamma", "reward_clip") if params[key] is not None}
    scores = inputs["rewards"], inputs["greedy_rewards"]
    credit = estimator(*scores, params["kl_coef"] * (ref - old), rows.cu_seqlens, **knobs)
    loss = weighted(rows, policy.pg(logps, old, credit), algorithms.ALGORITHMS["remax"].reduction)
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
    ours, theirs = (nn.ParameterDict({"weight": inputs[name].clone()}) for name in ("policy", "reference"))
    for _ in range(params["steps"]):
        move(ours, theirs, rate=params["eta"])
    return {"reference": theirs["weight"].detach()}


def adaptive_kl(inputs, params):
    coefficients, knobs = [params["init"]], {"target": params["target"], "horizon": params["horizon"]}
    for kl in inputs["current_kl"].tolist():
        coefficients.append(rewards.adapt_kl_coef(coefficients[-1], kl, num_samples=params["n_steps"], **knobs))
    return {"kl_coef": coefficients[1:]}


CASES: dict[str, Any] = {
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
}
