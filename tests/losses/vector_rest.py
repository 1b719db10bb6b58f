"""Published cases straight from logits, of selection and of labels, as calls of this package."""

from functools import partial
from typing import Any

import torch

from fastalign.data import coreset
from fastalign.losses import policy, supervised
from fastalign.losses.distillation import gkd
from fastalign.losses.reduce import token_mean
from fastalign.ops import divergence, token_logps
from fastalign.pipelines import best_of_n, rlaif
from fastalign.rl import selection
from fastalign.types import IGNORE_INDEX

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


# --- selection and labels --------------------------------------------------------------------------------------------


def core_set(inputs, params):
    embedding = coreset.embed(inputs["hidden"], inputs["mask"])
    chosen = coreset.select(embedding, num_clusters=params["k"], budget=params["budget"])
    told = {"cluster": chosen.clusters, "quota": chosen.quotas, "selected": chosen.selected}
    return {"embedding": embedding, **told}


def raft_select(inputs, params):
    scores = inputs["rewards"]
    local, kept = selection.best_of_each(scores)
    top = selection.top_fraction(scores, params["top_fraction"])
    return {
        "local_best_of_k": local,
        "global_top": top,
        "mean_reward": scores.mean(),
        "mean_reward_selected_local": scores[kept].gather(1, local[kept][:, None]).mean(),
        "mean_reward_selected_global": scores[top[:, 0], top[:, 1]].mean(),
    }


def best_of_n_case(inputs, params):
    expected = best_of_n.expected_best(inputs["scores"], params["draws"])[0]
    best = selection.best_of_each(inputs["scores"])[0]
    bound = best_of_n.kl_bound(params["n"])
    return {"best": best, "kl_upper_bound": bound, "expected_best_of_2_draws_row0": expected}


def cai_label(inputs, params):
    options = inputs["logp_A"], inputs["logp_B"]
    return {"p_A": rlaif.preference(*options), "p_A_clamped": rlaif.preference(*options, clamp=tuple(params["clamp"]))}


def cai_debiased(inputs, params):
    orders = [(inputs[f"{order}logp_A"], inputs[f"{order}logp_B"]) for order in ("", "swapped_")]
    return {"p_response1": rlaif.debiased_preference(*orders)}


def online_pairs(inputs, params):
    return dict(zip(("chosen", "rejected", "keep"), selection.best_and_worst(inputs["rewards"]), strict=True))


CASES: dict[str, Any] = {
    "sft/masked_ce": masked_ce,
    "logits_backward/five_coefficients": five_coefficients,
    "entropy_bonus": entropy_bonus,
    **{f"gkd/{kind}_tau{t}": distilled for kind in ("forward_kl", "jsd_0.5", "jsd_0.1", "reverse_kl") for t in (1, 2)},
    "coreset": core_set,
    "raft_select": raft_select,
    "best_of_n": best_of_n_case,
    "cai_label": cai_label,
    "cai_label_swap_debiased": cai_debiased,
    "online_dpo_pairs": online_pairs,
}
