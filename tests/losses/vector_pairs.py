"""Published cases of pairs, labels, rankings and rewards, as calls of this package."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vector_rows import Rows, mean_metrics

from fastalign.losses import preference, preference_free, ranking, reward, unpaired
from fastalign.losses.mixture import settings, weighted_sum
from fastalign.losses.pairs import log_ratios, pair_logps
from fastalign.losses.reduce import segment_sum
from fastalign.ops import divergence, token_logps
from fastalign.types import IGNORE_INDEX, LabelledLogps, PairLogps, RankedLogps

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
    sums = preference.metrics(given.pair, losses, [preference.LOSSES[loss]], options)
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
    loss = weighted_sum(chosen, options, given.pair).mean()
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
    means = mean_metrics(preference.metrics(pair, losses, [preference.LOSSES[name]], options))
    known = {"seq_fkl_w": pair.chosen_kls, "seq_fkl_l": pair.rejected_kls, "metrics": means}
    return {"loss": losses.mean(), "logratio_w": chosen, "logratio_l": rejected, **known, **sides}


# --- unpaired and ranked ---------------------------------------------------------------------------------------------


def unpaired_case(name, inputs, params):
    rows = Rows(inputs["mask"])
    logps = rows.leaf(inputs["logp"])
    sums = rows.sums(logps)
    ref = rows.sums(rows.pack(inputs["ref"]))
    if name == "kto":
        other = Rows(inputs["kl_mask"])
        mismatched = (other.sums(other.pack(inputs[key])) for key in ("kl_logp", "kl_ref"))
        baseline = unpaired.kto_baseline(unpaired.make_baseline(), *mismatched, beta=params["beta"])
        weights = {"desirable_weight": params["w_desirable"], "undesirable_weight": params["w_undesirable"]}
        batch = LabelledLogps(sums, ref, inputs["label"].bool(), baseline.mean)
        losses = unpaired.kto(batch, beta=params["beta"], **weights)
        told = {"kl": baseline.mean}
    else:
        before = unpaired.make_baseline(params["running_mean"], params["running_count"])
        baseline = unpaired.bco_baseline(before, sums, ref, beta=params["beta"])
        losses = unpaired.bco(LabelledLogps(sums, ref, inputs["label"].bool(), baseline.mean), beta=params["beta"])
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


CASES: dict[str, Any] = {
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
    "reward/bt": partial(bradley_terry, margins=False),
    "reward/bt_centered": partial(bradley_terry, margins=False),
    "reward/bt_margin": partial(bradley_terry, margins=True),
    "reward/bt_margin_centered": partial(bradley_terry, margins=True),
    "reward/soft_label_rlaif": soft_label,
    "reward/k_wise": k_wise,
    "reward/prm_bce": process_reward,
}
