"""The losses against TRL's own code: its trainers' loss methods run on given log-probs, without a trainer or a model.

TRL takes means over tokens and sorts within a micro-batch, we within the step: on a single batch both are the same.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastalign.losses import policy, preference, reward, unpaired
from fastalign.losses.distillation import gkd
from fastalign.losses.mixture import settings, weighted_sum
from fastalign.losses.pairs import pair_logps
from fastalign.losses.preference_free import log_odds_ratio
from fastalign.losses.reduce import Totals, repeat_segments, token_weights
from fastalign.losses.traits import canonical
from fastalign.ops import divergence
from fastalign.rl import advantages, algorithms
from fastalign.types import LabelledLogps, PairLogps

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install fastalign[peers]")
if not trl.__version__.startswith("1.16"):
    pytest.skip(f"written for TRL 1.16, found {trl.__version__}", allow_module_level=True)

LENGTHS = [4, 7, 1, 5, 6, 2, 3, 3]
"""Four pairs as TRL lays them out: all chosen completions, then all rejected ones."""
WIDTH = 8


def rows(seed: int, low: float = -3.0) -> Tensor:
    """``[8, 8]`` fp64 log-probs, 0 where nothing is scored; the first column predicts the prompt's second token."""
    x = low * torch.rand(len(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(scored(), x, 0.0)


def scored() -> Tensor:
    places = torch.arange(WIDTH)
    return (places >= 1) & (places < 1 + torch.tensor(LENGTHS)[:, None])


class Accelerator:
    """The accelerator of a single process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def stand_in(**fields) -> SimpleNamespace:
    """What a trainer's loss method asks of its trainer."""
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False
    known = {
        "model": model,
        "accelerator": Accelerator(),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "is_encoder_decoder": False,
    }
    return SimpleNamespace(**{**known, **fields})


def fused(log_probs: Tensor):
    """A model whose fused head returns these log-probs."""
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **kwargs: outputs


# --- pairs -----------------------------------------------------------------------------------------------------------

PAIRS = {
    "sigmoid": {"beta": 0.3},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.3},
    "exo_pair": {"beta": 0.3, "label_smoothing": 0.05},
    "nca_pair": {"beta": 0.3},
    "robust": {"beta": 0.3, "label_smoothing": 0.05},
    "bco_pair": {"beta": 0.3},
    "sppo_hard": {"beta": 0.3},
    "aot": {"beta": 0.3, "label_smoothing": 0.05},
    "aot_unpaired": {"beta": 0.3, "label_smoothing": 0.05},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "sigmoid_norm": {"beta": 0.3},
    "ld_dpo": {"beta": 0.3, "ld_alpha": 0.4},
    "sigmoid+sft": {"beta": 0.3, "loss_weights": [1.0, 0.2]},
    "nca_pair+hinge+sft": {"beta": 0.3, "loss_weights": [0.5, 1.0, 2.0]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pair_losses_and_their_metrics(name):
    from trl.trainer.dpo_trainer import DPOTrainer

    options, leaf, ref = PAIRS[name], rows(0).requires_grad_(), rows(1)
    trainer = stand_in(
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        ld_alpha=options.get("ld_alpha"),
        loss_types=["sigmoid"] if name == "ld_dpo" else name.split("+"),
        loss_weights=options.get("loss_weights", [1.0]),
        f_divergence_type="reverse_kl",
        ref_model=fused(ref),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    mask = torch.nn.functional.pad(scored(), (1, 0)).long()
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    theirs = DPOTrainer._compute_loss(trainer, fused(leaf), inputs, False)
    (their_grad,) = torch.autograd.grad(theirs, leaf)

    order = torch.arange(8).view(2, 4).T.flatten()  # chosen and rejected as neighbours
    pick, cu_seqlens = scored()[order], torch.tensor([0, *torch.tensor(LENGTHS)[order].cumsum(0)])
    pair = pair_logps(leaf[order][pick], cu_seqlens, ref[order][pick], tails=True)
    names = [canonical(preference.LOSSES)[one] for one in name.split("+")]
    losses = {one: preference.LOSSES[one] for one in names}
    per_pair = weighted_sum(losses, options, pair)
    (grad,) = torch.autograd.grad(per_pair.mean(), leaf)
    tolerance = 1e-6 if name == "exo_pair" else 1e-12  # TRL keeps exo's epsilon in fp32
    torch.testing.assert_close(per_pair.mean(), theirs, rtol=tolerance, atol=0)
    their_grad = torch.where(scored(), their_grad, 0.0)  # the head masks the others
    torch.testing.assert_close(grad, their_grad, rtol=tolerance, atol=1e-9 if name == "exo_pair" else 1e-15)
    if name == "ld_dpo":
        return  # its rewards are of the weighted sums there
    sums = preference.metrics(pair, per_pair, list(losses.values()), {**settings(losses), **options})
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        mine = (sums[key][0] / sums[key][1]).item()
        assert mine == pytest.approx(trainer._metrics["train"][key][0], rel=1e-6), key  # accuracies are fp32 there


def reference_free_pair() -> PairLogps:
    sums = rows(0).sum(1).requires_grad_()
    lengths = torch.tensor(LENGTHS)
    nothing = torch.zeros(4, dtype=torch.float64)
    return PairLogps(sums[:4], sums[4:], nothing, nothing, lengths[:4], lengths[4:])


def test_simpo_and_cpo():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    pair, trainer = reference_free_pair(), stand_in(alpha=0.0, beta=2.5, simpo_gamma=0.8, label_smoothing=0.0)
    trainer.loss_type = "simpo"
    means = pair.chosen / pair.chosen_lengths, pair.rejected / pair.rejected_lengths
    theirs, chosen, _ = CPOTrainer.cpo_loss(trainer, *means)
    mine = preference.simpo(pair, beta=2.5, gamma_beta_ratio=0.8 / 2.5)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    told = preference.metrics(pair, mine, [preference.LOSSES["simpo"]], {"beta": 2.5})["rewards/chosen"]
    torch.testing.assert_close(told[0], chosen.sum(), rtol=1e-12, atol=0)
    trainer.loss_type = "sigmoid"
    theirs = CPOTrainer.cpo_loss(trainer, pair.chosen, pair.rejected)[0]
    torch.testing.assert_close(preference.cpo(pair, beta=2.5, cpo_alpha=0.0), theirs, rtol=1e-12, atol=0)


def test_orpo():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    pair = reference_free_pair()
    means = pair.chosen / pair.chosen_lengths, pair.rejected / pair.rejected_lengths
    losses, chosen, _, ratio, odds = ORPOTrainer.odds_ratio_loss(stand_in(beta=0.1), *means)
    mine = preference.orpo(pair, beta=0.1, nll_weight=0.0)
    torch.testing.assert_close(mine, -losses.double(), rtol=1e-5, atol=0)  # TRL casts to fp32
    torch.testing.assert_close(log_odds_ratio(pair, -1e-4).mean(), odds.double(), rtol=1e-5, atol=0)
    told = preference.metrics(pair, mine, [preference.LOSSES["orpo"]], settings({"orpo": preference.orpo}))
    assert (told["rewards/chosen"][0] / 4).item() == pytest.approx(chosen.mean().item(), rel=1e-6)
    assert (told["log_odds_ratio"][0] / 4).item() == pytest.approx(ratio.item(), rel=1e-5)


# --- unpaired --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mismatched", [2, 3], ids=["kl above 0", "kl clamped to 0"])
def test_kto(mismatched):
    from trl.trainer.kto_trainer import KTOTrainer

    leaf, ref, labels = rows(0).requires_grad_(), rows(1), torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    kl, ref_kl = rows(2, low=-1.0), rows(3, low=-2.0)
    if mismatched == 3:
        kl, ref_kl = ref_kl, kl

    def answers(own, other):
        pick = {8: fused(own), 16: fused(other)}  # told apart by the width of the input
        return lambda **kwargs: pick[kwargs["input_ids"].shape[1] - 1 if "label" not in kwargs else 8](**kwargs)

    mask = torch.nn.functional.pad(scored(), (1, 0)).long()
    wide = torch.nn.functional.pad(mask, (0, 8))
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.zeros_like(wide),
        "KL_attention_mask": torch.ones_like(wide),
        "KL_completion_mask": wide,
        "label": labels,
    }
    trainer = stand_in(
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.3,
        ref_model=answers(ref, torch.nn.functional.pad(ref_kl, (0, 8))),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    model = answers(leaf, torch.nn.functional.pad(kl, (0, 8)))
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, False)
    (their_grad,) = torch.autograd.grad(theirs, leaf)

    baseline = unpaired.kto_baseline(unpaired.make_baseline(), kl.sum(1), ref_kl.sum(1), beta=0.3)
    assert (baseline.mean > 0) == (mismatched == 2)
    batch = LabelledLogps(leaf.sum(1), ref.sum(1), labels.bool(), baseline.mean)
    losses = unpaired.kto(batch, beta=0.3, desirable_weight=1.0, undesirable_weight=1.3)
    (grad,) = torch.autograd.grad(losses.mean(), leaf)
    torch.testing.assert_close(losses.mean(), theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.where(scored(), their_grad, grad), rtol=1e-12, atol=0)
    told = unpaired.metrics(batch, losses, beta=0.3, loss=unpaired.LOSSES["kto"])
    for key in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        mine = (told[key][0] / told[key][1]).item()
        assert mine == pytest.approx(trainer._metrics["train"][key][0], rel=1e-6), key


# --- policy gradients ------------------------------------------------------------------------------------------------

GRPO = {
    "grpo": ("grpo", {}, "token"),
    "bnpo": ("dapo", {}, "token"),
    "dr_grpo": ("dr_grpo", {}, "token"),
    "dapo": ("dapo", {}, "token"),
    "cispo": ("cispo", {}, "token"),
    "sapo": ("sapo", {}, "token"),
    "delta": ("grpo", {"dual_clip": 1.6}, "token"),
    "gspo": ("gspo", {}, "sequence"),
}


@pytest.mark.parametrize("name", GRPO)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_policy_losses(name, beta):
    from trl.trainer.grpo_trainer import GRPOTrainer

    variant, extra, level = GRPO[name]
    leaf, old, ref = rows(0).requires_grad_(), rows(1), rows(2)
    credit = advantages.grpo(torch.linspace(-1, 2, 8, dtype=torch.float64).sin(), torch.arange(8) // 4)
    low, high = (0.2, 5.0 if name == "cispo" else 0.28) if level == "token" else (3e-4, 4e-4)
    args = {"delta": extra.get("dual_clip"), "use_bias_correction_kl": False, "steps_per_generation": 1}
    trainer = stand_in(
        loss_type={"gspo": "grpo", "delta": "grpo"}.get(name, name),
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        args=SimpleNamespace(**args, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=16,
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
    )
    mask, nothing = scored().long(), torch.zeros(8, 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": credit,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    (their_grad,) = torch.autograd.grad(theirs, leaf)

    known = algorithms.ALGORITHMS[variant]
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    logps, tokens = leaf[scored()], repeat_segments(credit, cu_seqlens)
    clips = {"clip_low": low, "clip_high": high} if known.loss in ("ppo", "gspo") else {}
    options = clips | extra | ({"ratio_max": high} if name == "cispo" else {})
    sequences = (cu_seqlens,) if policy.LOSSES[known.loss].sequences else ()
    losses = policy.LOSSES[known.loss](logps, old[scored()], tokens, *sequences, **options)
    losses = losses + beta * policy.k3(logps, ref[scored()])
    weights = token_weights(known.reduction, cu_seqlens, Totals(tokens=sum(LENGTHS), sequences=8, budget=16))
    loss = (weights * losses).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if name == "sapo" else {"rtol": 1e-12, "atol": 1e-15}  # fp32 tau in TRL
    torch.testing.assert_close(loss, theirs, **tolerance)
    torch.testing.assert_close(grad, their_grad, **tolerance)
    if known.loss == "ppo":
        told = policy.metrics(logps, old[scored()], tokens, **clips)
        for key in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert (told[key][0] / told[key][1]).item() == pytest.approx(trainer._metrics["train"][key][0]), key


def test_rloo():
    from trl.trainer.rloo_trainer import RLOOTrainer

    leaf, old = rows(0, low=-0.4).requires_grad_(), rows(1, low=-0.4)
    credit = advantages.rloo(torch.linspace(-1, 2, 8, dtype=torch.float64).sin(), torch.arange(8) // 4)
    trainer = stand_in(
        epsilon_low=0.2,
        epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
    )
    mask, nothing = scored().long(), torch.zeros(8, 1, dtype=torch.int64)
    inputs = {"prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask, "completion_mask": mask}
    theirs = RLOOTrainer._compute_loss(trainer, None, {**inputs, "old_logps": old.sum(1), "advantages": credit})
    (their_grad,) = torch.autograd.grad(theirs, leaf)
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    spread = repeat_segments(credit, cu_seqlens)
    loss = policy.rloo(leaf[scored()], old[scored()], spread, cu_seqlens).sum() / 8
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, torch.where(scored(), their_grad, 0.0), rtol=1e-12, atol=1e-15)


# --- reward models and distillation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("margins", [False, True])
def test_reward_model(center, margins):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = rows(0).sum(1).requires_grad_()
    given = {"margin": torch.tensor([1.0, 2 / 3, 0.0, 1 / 3], dtype=torch.float64)} if margins else {}
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=center))

    def model(**kwargs):
        return SimpleNamespace(logits=scores[:, None])

    inputs = {"attention_mask": torch.ones(8, 4), **given}
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)
    mine = reward.reward(scores[:4], scores[4:], given.get("margin"), center_coef=center or 0.0)
    torch.testing.assert_close(mine.mean(), theirs, rtol=1e-12, atol=0)
    told = reward.metrics(scores[:4], scores[4:], mine)
    for key in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert (told[key][0] / told[key][1]).item() == pytest.approx(trainer._metrics["train"][key][0]), key


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd(beta):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([1, -100, 3, 4, -100, 0])
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels[None], beta, 1.7)
    losses = gkd(partial(divergence, student, teacher, labels=labels), beta=beta, temperature=1.7)
    torch.testing.assert_close(losses.sum() / 4, theirs, rtol=1e-7, atol=0)  # TRL keeps beta in fp32
