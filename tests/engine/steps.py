"""Steps of every method and loss on random examples, in float64 on a model that computes in it throughout."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch, first_fit_decreasing, group_tokens
from fastalign.engine.forward import Models
from fastalign.engine.methods import METHODS, Objective, make_objective
from fastalign.engine.prepare import Carried, first_carried, prepare
from fastalign.engine.reference.frozen import frozen_copy
from fastalign.engine.timing import Stopwatch
from fastalign.engine.update import accumulate_gradients, add_sums, measure_work
from fastalign.models.policy import Policy
from fastalign.parallel.mesh import Axis, World
from fastalign.types import PackedBatch

VOCAB = 37
OBJECTIVES = [(name, loss) for name, method in METHODS.items() if not method.algorithms for loss in method.losses]
ALONE = World(Axis(), torch.device("cpu"))
RESPONSES = {"dpo": 2, "rrhf": 4, "reward": 2, "soft_label": 2, "k_wise": 4}
"""Sequences of an example by method or loss; the others have one."""


def make_examples(method: str, loss: str, number: int = 7) -> list[TokenExample]:
    """Groups of unequal sizes, with responses that agree further than their prompt."""
    draw = np.random.default_rng(5)
    return [make_example(draw, method, loss, i) for i in range(number)]


def make_example(draw: np.random.Generator, method: str, loss: str, index: int) -> TokenExample:
    prompt, count = tokens(draw, 4, 12), RESPONSES.get(loss, RESPONSES.get(method, 1))
    common = tokens(draw, 4, 8)
    answers = [np.concatenate([common[: len(common) * (n % 2)], tokens(draw, 1, 9)]) for n in range(count)]
    example = TokenExample(tuple(sequence(prompt, answer) for answer in answers), index)
    if method == "reward":
        return as_rewarded(draw, example, loss)
    if method == "kto":
        other = TokenExample((sequence(prompt, tokens(draw, 1, 9)),), index)
        return replace(example.fill(scores=[index % 2]), mismatched=other)
    return example.fill(scores=draw.normal(size=count)) if method == "rrhf" else example


def as_rewarded(draw: np.random.Generator, example: TokenExample, loss: str) -> TokenExample:
    """The same sequences for a scalar head: their last tokens are scored, or for process rewards every third."""
    step = 3 if loss == "process" else 100
    scored = tuple((ids, np.arange(len(ids))[::-1] % step == 0) for ids, _ in example.sequences)
    chosen = draw.random(dtype=np.float32)
    scores = {
        "reward": [chosen, 0],
        "soft_label": [chosen, 1 - chosen],
        "k_wise": draw.normal(size=len(scored)),
        "process": draw.integers(0, 2, sum(int(mask.sum()) for _, mask in scored)),
    }
    column = "step_labels" if loss == "process" else "scores"
    return replace(example, sequences=scored, own_rows=True).fill(**{column: scores[loss]})


def tokens(draw: np.random.Generator, least: int, most: int) -> np.ndarray:
    return draw.integers(0, VOCAB, draw.integers(least, most + 1))


def sequence(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([prompt, answer])
    return ids, np.arange(len(ids)) >= len(prompt)


def make_models(method: str) -> Models:
    """GPT-2, whose norms and attention have no fp32 inside, and a reference with other weights."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "vocab_size": VOCAB, "n_positions": 64}
    config = AutoConfig.for_model("gpt2", bos_token_id=None, eos_token_id=None, num_labels=1, **sizes)
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if METHODS[method].scalar_head else AutoModelForCausalLM
    policy = Policy(kind.from_config(config).double())
    reference = frozen_copy(policy)
    for model, size in ((policy, 0.1), (reference, 0.2)):  # a flat policy: kto's baseline is not clamped to 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn_like(parameter)
    return Models(policy, reference, autocast=False)


def packed(examples: list[TokenExample], tokens: int, share: bool) -> list[PackedBatch]:
    """Micro-batches that share agreements of a single token too."""
    bins = first_fit_decreasing([group_tokens(e, share, 1) for e in examples], tokens)
    return [build_batch([examples[i] for i in members], share, least=1) for members in bins]


def run_step(
    models: Models, batches: list[PackedBatch], method: str, loss: str, world: World = ALONE, reduces: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """``[m, 2]`` (sum, count) of the metrics, and whole gradients."""
    objective = make_objective(method, {"name": loss})
    models = models if objective.needs_reference else replace(models, reference=None)
    models.policy.zero_grad()
    sums = accumulate(models, batches, objective, world, first_carried(), reduces)
    totals = world.data.sum(add_sums(sums, objective.metric_names, world.device))
    gradients = [p.grad for p in models.policy.parameters() if p.grad is not None]
    return totals, [(g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for g in gradients]


def accumulate(
    models: Models,
    batches: list[PackedBatch],
    objective: Objective,
    world: World,
    carried: Carried,
    reduces: bool = False,
) -> list[dict[str, Tensor]]:
    """A step up to its gradients: the sums of each micro-batch."""
    work, watch = measure_work(batches, world, 0), Stopwatch(world.device)
    batches = prepare(models, batches, objective, work, world, watch, carried)
    return accumulate_gradients(models, batches, objective, world, watch, reduces)


def assert_same_step(got: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]], what: str) -> None:
    """Metrics, and gradients relative to the largest, to the reassociation of float64 sums."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-11, msg=lambda text: f"{what}: {text}")
    largest = max(g.abs().max() for g in want[1])
    assert largest > 1e-4, "gradients vanish: nothing is compared"
    error = max((a - b).abs().max() for a, b in zip(got[1], want[1], strict=True))
    assert error <= 1e-12 * max(largest, 1), f"{what}: gradients differ by {error} where the largest is {largest}"
