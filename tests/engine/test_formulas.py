"""A step against its formula, computed apart: padded rows, the model's own forward, plain PyTorch in float64."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import steps
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu, softplus

from fastalign.data.examples import TokenExample
from fastalign.engine.methods import make_objective
from fastalign.engine.prepare import first_carried, prepare
from fastalign.engine.timing import Stopwatch
from fastalign.engine.update import measure_work

BETA = 0.1
"""The default of dpo, kto, bco and tdpo2."""


def padded(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, L]`` ids padded on the right, their attention mask, and which tokens are scored."""
    longest = max(len(ids) for ids, _ in sequences)
    ids, real, scored = (torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(3))
    for row, (tokens, mask) in enumerate(sequences):
        ids[row, : len(tokens)], real[row, : len(tokens)] = torch.tensor(tokens), 1
        scored[row, : len(tokens)] = torch.tensor(mask)
    return ids, real, scored.bool()


def all_of(examples: Sequence[TokenExample]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [sequence for example in examples for sequence in example.sequences]


def log_softmax(model: nn.Module, sequences: list) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, L-1, V]`` log-probs of what follows each position, the tokens that follow, and which are scored."""
    ids, real, scored = padded(sequences)
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    return logits.log_softmax(-1), ids[:, 1:], scored[:, 1:]


def logps(model: nn.Module, sequences: list) -> tuple[Tensor, Tensor]:
    """``[B]`` log-probs of the scored tokens, summed, and their number."""
    every, labels, scored = log_softmax(model, sequences)
    picked = every.gather(-1, labels[..., None])[..., 0]
    return torch.where(scored, picked, 0.0).sum(1), scored.sum(1)


def outputs(model: nn.Module, examples: Sequence[TokenExample]) -> Tensor:
    """The scalar head's outputs at the scored tokens, in order."""
    ids, real, scored = padded(all_of(examples))
    return model.score(model.transformer(input_ids=ids, attention_mask=real).last_hidden_state)[..., 0][scored]


def given(examples: Sequence[TokenExample]) -> Tensor:
    columns = [example.columns for example in examples]
    return torch.cat([c.scores if c.step_labels is None else c.step_labels for c in columns]).double()


def reward(policy, reference, examples):
    r, margins = outputs(policy, examples), given(examples)[0::2]
    return -logsigmoid(r[0::2] - r[1::2] - margins).mean()


def soft_label(policy, reference, examples):
    r, p = outputs(policy, examples), given(examples)[0::2]
    difference = r[0::2] - r[1::2]
    return -(p * logsigmoid(difference) + (1 - p) * logsigmoid(-difference)).mean()


def k_wise(policy, reference, examples):
    r, better = outputs(policy, examples).view(len(examples), -1), given(examples).view(len(examples), -1)
    pairs = better[:, :, None] > better[:, None, :]
    losses = torch.where(pairs, -logsigmoid(r[:, :, None] - r[:, None, :]), 0.0)
    return (losses.sum((1, 2)) / pairs.sum((1, 2))).mean()


def process(policy, reference, examples):
    x, right = outputs(policy, examples), given(examples)
    return (softplus(x) - right * x).mean()


def log_ratios(policy, reference, sequences):
    return logps(policy, sequences)[0] - logps(reference, sequences)[0].detach()


def kto(policy, reference, examples):
    sign = 2 * given(examples) - 1
    drift = log_ratios(policy, reference, [example.mismatched.sequences[0] for example in examples])
    baseline = drift.detach().mean().clamp(min=0)
    assert baseline > 0, "nothing is measured from 0"
    return torch.sigmoid(-BETA * sign * (log_ratios(policy, reference, all_of(examples)) - baseline)).mean()


def bco(policy, reference, examples):
    sign, rewards = 2 * given(examples) - 1, BETA * log_ratios(policy, reference, all_of(examples))
    return -logsigmoid(sign * (rewards - rewards.detach().mean())).mean()


def rrhf(policy, reference, examples):
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        (sums, counts), scores = logps(policy, list(example.sequences)), example.columns.scores
        p = sums / counts
        total = total - sums[int(scores.argmax())]
        total = total + sum(relu(p[i] - p[j]) for i in range(len(p)) for j in range(len(p)) if scores[i] < scores[j])
    return total / len(examples)


def gkd(policy, reference, examples):
    student, _, scored = log_softmax(policy, all_of(examples))
    teacher = log_softmax(reference, all_of(examples))[0].detach()
    mixture = ((student.exp() + teacher.exp()) / 2).log()
    both = [(p.exp() * (p - mixture)).sum(-1) for p in (student, teacher)]
    return (sum(both) / 2)[scored].mean()


def dpo(policy, reference, examples):
    d = log_ratios(policy, reference, all_of(examples))
    return -logsigmoid(BETA * (d[0::2] - d[1::2])).mean()


def tdpo2(policy, reference, examples):
    d = log_ratios(policy, reference, all_of(examples))
    p, _, scored = log_softmax(policy, all_of(examples))
    q = log_softmax(reference, all_of(examples))[0].detach()
    kl = torch.where(scored, (q.exp() * (q - p)).sum(-1), 0.0).sum(1)
    return -logsigmoid(BETA * (d[0::2] - d[1::2] - 0.5 * (kl[1::2] - kl[0::2].detach()))).mean()


def cpo(policy, reference, examples):
    sums, counts = logps(policy, all_of(examples))
    return -logsigmoid(BETA * (sums[0::2] - sums[1::2])).mean() - sums[0::2].sum() / counts[0::2].sum()


FORMULAS = {
    "reward": (reward, soft_label, k_wise, process),
    "kto": (kto, bco),
    "rrhf": (rrhf,),
    "distill": (gkd,),
    "dpo": (dpo, tdpo2, cpo),
}


def plain(policy) -> nn.Module:
    """The Hugging Face model with its own attention."""
    model = copy.deepcopy(policy.model)
    model.config.pad_token_id = 0
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("method, formula", [(m, f) for m, several in FORMULAS.items() for f in several])
def test_a_step_is_what_its_formula_says(method, formula):
    name = formula.__name__
    models, examples = steps.make_models(method), steps.make_examples(method, name)
    policy, reference = plain(models.policy), plain(models.reference)
    want = formula(policy, reference, examples)
    want.backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]

    totals, got = steps.run_step(models, steps.packed(examples, 60, True), method, name)
    total, count = totals[make_objective(method, {"name": name}).metric_names.index("loss")]
    assert (total / count).item() == pytest.approx(want.item(), rel=1e-12)
    largest = max(g.abs().max() for g in gradients)
    assert largest > 1e-3 and len(got) == len(gradients)
    for mine, theirs in zip(got, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * max(largest.item(), 1))


def test_bco_measures_from_the_mean_of_all_steps_so_far():
    models, examples = steps.make_models("kto"), steps.make_examples("kto", "bco")
    objective = make_objective("kto", {"name": "bco"})
    carried = first_carried()
    rewards = BETA * log_ratios(plain(models.policy), plain(models.reference), all_of(examples)).detach()
    for seen, step in ((4, examples[:4]), (7, examples[4:])):
        batches = steps.packed(step, 60, True)
        work, watch = measure_work(batches, steps.ALONE, 0), Stopwatch(steps.ALONE.device)
        ready = prepare(models, batches, objective, work, steps.ALONE, watch, carried)
        filled = torch.cat([batch.columns.baseline for batch in ready])
        assert len(filled) == len(step) and (filled == carried["baseline"].mean).all()
        assert carried["baseline"].count == seen
        assert filled[0].item() == pytest.approx(rewards[:seen].mean().item(), rel=1e-12)
