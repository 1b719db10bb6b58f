"""What the loop does for methods that sample: the source is made, credit is measured, references and prices follow."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from fastalign.data.loader import TokenDataset
from fastalign.disk import WriteError, writing
from fastalign.engine.errors import as_one
from fastalign.engine.forward import Models
from fastalign.engine.methods import Objective
from fastalign.engine.optim import AdamW, Trained
from fastalign.engine.output.export import whole_weights
from fastalign.engine.output.metrics import MetricsLog, read_lines
from fastalign.engine.output.progress import stage
from fastalign.losses.policy import KL_ESTIMATORS
from fastalign.losses.reduce import segment_sum
from fastalign.models.hollow import hollow_policy
from fastalign.models.load import save_pretrained
from fastalign.models.policy import Policy
from fastalign.models.precision import HALF
from fastalign.parallel.mesh import World
from fastalign.parallel.reallocate import move
from fastalign.parallel.tensor import split_layers
from fastalign.rl.algorithms import OnPolicy
from fastalign.rl.backends import make_sampler
from fastalign.rl.controllers import KLPrice
from fastalign.rl.environments import EnvironmentSampler, load_environment
from fastalign.rl.groups import sample_lines
from fastalign.rl.rollouts import NoScorer, Rollouts
from fastalign.rl.sampler import truncates
from fastalign.rl.scoring import Scorer
from fastalign.types import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastalign.config import Config
    from fastalign.engine.train import Job
    from fastalign.engine.update import Work

log = logging.getLogger(__name__)


def make_scorer(
    config: Config, objective: Objective, tokenizer: PreTrainedTokenizerBase, world: World
) -> Scorer | NoScorer | None:
    """What scores completions; None for methods that sample none.

    Raises:
        ValueError: rewards that cannot be used.
    """
    if objective.on_policy is None:
        return None
    return Scorer(config.rewards, tokenizer, world.device) if config.rewards else NoScorer()


def make_source(
    config: Config,
    objective: Objective,
    models: Models,
    prompts: TokenDataset,
    rows: int,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer | NoScorer,
    world: World,
) -> Rollouts:
    """The source that samples with the policy; whether it is exact is tried now.

    Raises:
        ValueError: sampler settings that cannot be used, a reference that cannot follow the policy.
    """
    assert objective.on_policy is not None
    check_reference(objective.on_policy, models)
    settings = objective.on_policy.sampler
    lent = layout = None
    if config.parallel.generate is not None:
        tp = config.parallel.generate.get("tp", 1)
        layout = None if tp == 1 else world.split(tp, config.parallel.timeout_minutes)
        lent = empty_copy(config, models.policy, tokenizer, layout or world.alone)
    if truncates(settings) and objective.policy_gradient is not None and world.is_main:
        log.warning(TRUNCATED)
    known: dict[str, Any] = {"precision": partial(models.precision, world.device), "lent": lent}
    known["publish"] = partial(publish_weights, config, models, tokenizer, world)
    sampler = make_sampler(models.policy, settings, tokenizer, **known)
    if settings.environment is not None:
        make = load_environment(settings.environment, tokenizer)
        sampler = EnvironmentSampler(sampler, make, tokenizer, settings.max_turns, config.data.max_length)
    plan, batch = objective.on_policy, config.batch
    show = partial(stage, shown=world.is_main)
    return Rollouts(cast(Any, prompts), batch.size, config.run.seed, rows, plan, sampler, scorer, world, show, layout)


def empty_copy(config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase, layout: World) -> Policy:
    """A policy to sample from, split over the tensor axis of a layout, whose weights are still to come."""
    asked = config.parallel.generate or {}
    section = replace(config.model, dtype=asked.get("dtype", config.model.dtype), gradient_checkpointing=False)
    copy = hollow_policy(section, seed=config.run.seed, tokenizer=tokenizer).policy
    try:
        copy = split_layers(copy, layout).to_empty(device=layout.device)
    except ValueError as error:
        raise ValueError(str(error).replace("parallel.tp", "parallel.generate.tp")) from error
    for (name, ours), theirs in zip(policy.named_buffers(), copy.buffers(), strict=True):
        assert ours.shape == theirs.shape, f"{name}: {ours.shape} and {theirs.shape}"
        theirs.copy_(ours)
    return copy.train(policy.training).requires_grad_(False)


TRUNCATED = (
    "sampler.top_k, top_p, min_p: completions are drawn from the tokens that these keep, and their ratios, KL and "
    "entropy are those of all tokens, as in TRL and verl; algorithm.correction truncate weighs each token by the share "
    "that was kept, and sampling from all tokens needs no correction"
)


def publish_weights(
    config: Config,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    policy: Policy,
    version: int,
    read: Callable[[Path], None],
) -> None:
    """Write the weights to `weights/` of the run, in the precision of forwards, and have a server read them.

    All ranks call it, and go on when the server has them. Every version has a name of its own: a server may take one
    that it has read before for the same weights (vllm-project/vllm#32718).
    """
    place, tensors = Path(config.run.output_dir).resolve() / "weights", whole_weights(policy)
    if models.autocast:
        tensors = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
    with as_one(world):
        if world.is_main:
            need = sum(x.nbytes for x in tensors.values())
            earlier, directory = [*place.glob("step-*")], place / f"step-{version}-{time.time_ns()}"
            with writing("weights for the server", directory, need, then="go on with run.resume=true"):
                save_pretrained(policy, tokenizer, directory, tensors)
            read(directory)
            for old in earlier:
                shutil.rmtree(old, ignore_errors=True)


# --- after the columns are filled ------------------------------------------------------------------------------------


def sampled(
    job: Job, metrics: MetricsLog, source: Rollouts, step: int, batches: Sequence[PackedBatch], work: Work
) -> dict[str, float]:
    """What is known of a step's completions before its updates; they are written to samples.jsonl."""
    measured = credit_metrics(job.objective, batches, job.world, cast(KLPrice, job.carried["kl_coef"]))
    adapt(job, measured, work.sequences)
    advantages = advantages_of(batches, source, job.world)
    if job.world.is_main:
        decode = partial(job.tokenizer.decode, skip_special_tokens=False)
        try:
            write_samples(job.directory, source, step, lambda ids: str(decode(ids.tolist())), advantages)
        except WriteError as error:
            metrics.failure = error  # which ends the run on all ranks
    return {**source.metrics(), **measured, "sampling/exact": float(source.sampler.exact)}


def credit_metrics(
    objective: Objective, batches: Sequence[PackedBatch], world: World, price: KLPrice
) -> dict[str, float]:
    """What TRL's PPO logs of rewards and KL, and how much of the returns the critic foresaw; over all ranks."""
    gradient = objective.policy_gradient
    if gradient is None:
        return {}
    sums = torch.zeros(10, dtype=torch.float64, device=world.device)
    sums[9] = sum(batch.num_scored for batch in batches)
    for batch in batches:
        columns, offsets = batch.columns, batch.cu_seqlens.to(world.device)
        if not batch.num_sequences or columns.scores is None:
            continue
        charged = torch.zeros(2, dtype=torch.float64, device=world.device)
        old = columns.sampler_logps if columns.old_logps is None else columns.old_logps
        if columns.ref_logps is not None and old is not None:
            old, reference = old.double(), columns.ref_logps.double()
            cost = KL_ESTIMATORS[gradient.settings.kl_estimator or "k1"](old, reference)
            charged = torch.stack([segment_sum(old - reference, offsets).sum(), segment_sum(cost, offsets).sum()])
        ended = batch.num_sequences - columns.read("truncated", "metrics").double().sum()
        sums[:5] += torch.stack(
            [charged[0], charged[1], columns.scores.double().sum(), ended, ended.new_full((), batch.num_sequences)]
        )
        if columns.returns is not None and columns.values is not None:
            missed = columns.returns.double() - columns.values.double()
            for i, x in enumerate((columns.returns.double(), missed)):
                sums[5 + 2 * i : 7 + 2 * i] += torch.stack([x.sum(), x.square().sum()])
    kl, cost, scores, ended, count, *moments, number = world.data.sum(sums).tolist()
    count, number = max(count, 1.0), max(number, 1.0)
    paid = price.value(gradient.settings.kl_coef or 0.0) if gradient.charges_kl else 0.0
    found = {"objective/scores": scores / count, "val/num_eos_tokens": ended}
    if objective.needs_reference:
        found |= {"objective/kl": kl / count, "objective/non_score_reward": -paid * cost / count}
        found["objective/rlhf_reward"] = found["objective/scores"] + found["objective/non_score_reward"]
    if gradient.settings.kl_target is not None:
        found["kl_coef"] = paid
    if gradient.has_critic:
        returns, missed = (moments[i + 1] / number - (moments[i] / number) ** 2 for i in (0, 2))
        found["critic/vf_explained_var"] = 1 - missed / returns if returns > 0 else float("nan")
    return found


def adapt(job: Job, measured: dict[str, float], num_samples: int) -> None:
    """Move the price of KL after a step, where it has a target."""
    gradient = job.objective.policy_gradient
    if gradient is None or gradient.settings.kl_target is None:
        return
    s, price = gradient.settings, cast(KLPrice, job.carried["kl_coef"])
    price.adapt(s.kl_coef or 0.0, measured["objective/kl"], s.kl_target or 1.0, s.kl_horizon, num_samples)


def follow(job: Job, step: int) -> None:
    """Let the reference follow the policy, where it does."""
    gradient, reference = job.objective.on_policy, job.models.reference
    if gradient is None or gradient.settings.reference_sync == "none" or reference is None:
        return
    s, reference = gradient.settings, cast(Policy, reference)
    if s.reference_sync == "ema":
        move(job.models.policy, reference, rate=s.reference_alpha)
    elif step % s.reference_steps == 0:
        move(job.models.policy, reference)


def check_reference(plan: OnPolicy, models: Models) -> None:
    """Refuse an average in half precision, which a checkpoint of `model.dtype` auto may turn out to have."""
    averaged = models.reference if plan.settings.reference_sync == "ema" else None
    if isinstance(averaged, Policy) and (half := {p.dtype for p in averaged.parameters()} & {*HALF}):
        dtype = str(half.pop()).removeprefix("torch.")
        text = f"the reference has {dtype}, which cannot hold such small steps: set model.dtype to float32"
        raise ValueError(f"algorithm.reference_sync ema: {text}")


def kept(job: Job) -> dict[str, Trained]:
    """What a checkpoint holds: what trains, and a reference that has followed."""
    plan, reference = job.objective.on_policy, job.models.reference
    if plan is None or plan.settings.reference_sync == "none" or not isinstance(reference, Policy):
        return job.trained
    return {**job.trained, "reference": Trained(reference, AdamW([{"params": []}], {}))}


# --- samples.jsonl ---------------------------------------------------------------------------------------------------


def advantages_of(batches: Sequence[PackedBatch], source: Rollouts, world: World) -> dict[tuple[int, int], float]:
    """The mean advantage of each completion that is trained on, by (row, sample), of all ranks."""
    mine: list[tuple[int, list[float]]] = []
    for batch in batches:
        if batch.columns.advantages is None or not batch.num_examples:
            continue
        offsets = batch.cu_seqlens.tolist()
        values = batch.columns.advantages.cpu().tolist()
        means = [float(np.mean(values[a:b])) if b > a else 0.0 for a, b in pairwise(offsets)]
        mine += [
            (row, means[a:b]) for row, (a, b) in zip(batch.example_ids, pairwise(batch.cu_groups.tolist()), strict=True)
        ]
    found = {row: means for part in world.gather_objects(mine) for row, means in part}
    known = {}
    for group in source.groups:
        kept = [one for one, reward in zip(group.rollouts, group.rewards, strict=True) if not np.isnan(reward)]
        known |= {(one.row, one.sample): x for one, x in zip(kept, found.get(group.row, []), strict=False)}
    return known


def write_samples(
    directory: Path, source: Rollouts, step: int, decode: Callable[[np.ndarray], str], advantages: dict
) -> None:
    """Append a step's completions to samples.jsonl."""
    path = directory / "samples.jsonl"
    lines = [
        json.dumps(tidy(line)) + "\n" for line in sample_lines(source.groups, source.names, step, decode, advantages)
    ]
    with writing("samples", path, then="go on with run.resume=true"), path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def tidy(value: Any) -> Any:
    """JSON has no nan: null stands for it."""
    if isinstance(value, dict):
        return {key: tidy(x) for key, x in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def cut_samples(directory: Path, step: int) -> None:
    """Remove the lines after a step, so that a resumed run writes none twice."""
    path = directory / "samples.jsonl"
    if not path.exists():
        return
    size = sum(len(line) for line, record in read_lines(path) if record is not None and record["step"] <= step)
    with writing("samples", path, then="start again"), path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())
