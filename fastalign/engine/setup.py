"""What a run is made of before its first step: checked settings, seeded generators, data, a verified policy."""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastalign.config import BatchConfig, Config, ModelConfig, RunConfig
from fastalign.data import builtin
from fastalign.data.files import PLACE
from fastalign.data.formats import ROWS
from fastalign.data.loader import (
    Examples,
    TokenDataset,
    check_state,
    encode_dataset,
    rows_after,
    rows_of,
    steps_until,
    visited,
)
from fastalign.data.mismatch import MismatchedDataset
from fastalign.data.prompt_dataset import encode_prompts
from fastalign.data.sources import load_train_eval
from fastalign.engine.agree import require_same
from fastalign.engine.fitting import check_columns, check_groups, held_out_source
from fastalign.engine.forward import Models
from fastalign.engine.loading import Start, load, verified
from fastalign.engine.methods import objective_of
from fastalign.engine.output.alarms import check_choices, warn_of_one_label, warn_of_ties
from fastalign.engine.output.checkpoints import Found
from fastalign.engine.reference.cache import Demand, Filling
from fastalign.engine.reference.frozen import reference_section, settle_reference
from fastalign.models.load import check_model, has_tokenizer, load_tokenizer, separate_padding
from fastalign.models.lora import WithoutAdapter
from fastalign.models.offload import Offload
from fastalign.models.policy import Policy
from fastalign.models.precision import HALF
from fastalign.models.vocabulary import refuse_other_tokens
from fastalign.parallel.host import rest
from fastalign.parallel.mesh import World

log = logging.getLogger(__name__)


def seed_everything(run: RunConfig) -> None:
    """The same generators on every rank; nothing in training draws from them, but a user's code may."""
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    torch.use_deterministic_algorithms(run.deterministic)


def horizon(config: Config, num_examples: int, checkpoint: Found | None) -> tuple[int, int]:
    """The steps of the whole run and the examples that they read, counted on from where a checkpoint stands.

    Every epoch reads every example once, its last step what is left. A last epoch may be a fraction; a run that is
    resumed with more epochs has then had a short step within its epoch.

    Raises:
        ValueError: the checkpoint is beyond the end, or of other data.
    """
    run, size = config.run, config.batch.size
    done = drawn = 0
    if checkpoint is not None:
        state = checkpoint.state
        check_state(state["loader"], run.seed, num_examples)
        done, drawn = state["step"], state["loader"]["drawn"]
    if config.algorithm is not None and config.algorithm.filter_zero_std:  # steps draw more than they train on
        return run.steps or steps_until(rows_of(run.epochs, num_examples), num_examples, size), num_examples
    if run.steps is None:
        rows = rows_of(run.epochs, num_examples)
        total = done + steps_until(rows, num_examples, size, drawn)
    else:
        rows, total = rows_after(run.steps - done, num_examples, size, drawn), run.steps
    if rows < drawn:
        end = f"run.epochs {run.epochs:g}" if run.steps is None else f"run.steps {run.steps}"
        raise ValueError(
            f"{checkpoint and checkpoint.path} is beyond {end}: it is after {done} steps and {drawn} examples; "
            "raise that, or name an earlier checkpoint in run.resume"
        )
    return total, rows


def what_is_read(
    config: Config, dataset: TokenDataset, held_out: TokenDataset | None, total: int, rows: int
) -> list[Demand]:
    """The examples that a run of ``total`` steps and ``rows`` examples reads, training's first, and how often."""
    demands = [Demand(dataset, visited(len(dataset), config.run.seed, rows), rows, "training examples")]
    if held_out is not None:
        times = math.ceil(total / (config.run.eval_every or total))
        demands.append(Demand(held_out, range(len(held_out)), times * len(held_out), "held-out examples"))
    return demands


def load_data(config: Config) -> tuple[PreTrainedTokenizerBase, TokenDataset, TokenDataset | None]:
    """The tokenizer, and the training and held-out examples in tokens."""
    tokenizer = load_tokenizer(config.model, fallback=builtin_tokenizer)
    check_models(config, tokenizer)
    rows, held_out = load_train_eval(config.data, config.run.seed)
    training, evaluated = f"data.path: {config.data.path!r}", held_out_source(config.data)
    dataset = encode(rows, tokenizer, config, training)
    held_out = encode(held_out, tokenizer, config, evaluated, rows.column_names) if held_out else None
    check_choices(dataset, config.data.max_length, "data.path", refuse=True)
    if config.method == "kto":
        warn_of_one_label(dataset, "data.path")
    elif ROWS[objective_of(config).data].unit == "candidate":
        warn_of_ties(dataset, "data.path")
    if held_out is not None:
        check_choices(held_out, config.data.max_length, "the held-out data", refuse=False)
    for examples, where in ((dataset, training), (held_out, evaluated)):
        check_groups(examples, config.batch, where)
    return tokenizer, dataset, held_out


def check_models(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a policy, and a reference of its own, that cannot run, before anything is tokenised."""
    objective = objective_of(config)
    check_model(config.model, tokenizer, scalar_head=objective.method.scalar_head)
    if config.reference.path is None and objective.needs_reference and objective.method.teacher:
        raise ValueError(f"{config.method} needs a teacher: set reference.path to its hub name or directory")
    if config.reference.path is not None and objective.needs_reference:
        section = reference_section(config)
        check_model(section, setting="reference.path")
        if not Path(str(section.path)).is_dir() or has_tokenizer(str(section.path)):  # else nothing can be compared
            refuse_other_tokens(tokenizer, load_tokenizer(section, setting="reference.path"), "reference.path")


def require_same_rows(ranks: World, *datasets: TokenDataset | None) -> None:
    """Refuse ranks that found other rows, or make other tokens of them."""
    mine = [dataset and dataset.fingerprint for dataset in datasets]
    remedy = "give every rank the same data, tokenizer and versions of the libraries"
    require_same(ranks, mine, "made other tokens of its rows", remedy)


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config, where: str, named: Sequence[str] = ()
) -> TokenDataset:
    """Rows as the tokens that the method's loss reads; the unread ones of the columns ``named`` were logged before."""
    objective = objective_of(config)
    check_columns([name for name in rows.column_names if name != PLACE], config.data, objective.data, where)
    if objective.on_policy:
        return encode_prompts(rows, tokenizer, config.data, objective.on_policy.sampler.max_new_tokens, named)
    dataset = encode_dataset(rows, tokenizer, config.data, objective.data, named)
    return MismatchedDataset(dataset, config.data.max_length) if objective.reads_mismatched else dataset


def hash_tokens(dataset: TokenDataset) -> str:
    """A hash of all examples in their order, tokens and scores, and of nothing else: no files, caches or versions."""
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.table.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "scored", "lengths", "scores"):
            column = cast(pa.Table, batch)[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy().tobytes())
            digest.update(column.flatten().to_numpy().tobytes())
    return digest.hexdigest()


def builtin_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer made of built-in text."""
    if name not in builtin.TOKENIZERS:
        raise ValueError(f"unknown model.tokenizer {name!r}: expected one of {', '.join(builtin.TOKENIZERS)}")
    return builtin.TOKENIZERS[name]()


@dataclass(frozen=True)
class Loaded:
    """What a run computes with.

    Attributes:
        models: policy and reference, sharded and checked against their plain forwards.
        data: the examples that will be read; with the reference's log-probs when these are kept, and no reference is
            in memory then.
        batch: the batch section, without prefix sharing where a model does not compute it exactly.
        filling: the cache that the log-probs are in.
    """

    models: Models
    data: Sequence[Examples]
    batch: BatchConfig
    filling: Filling | None


def load_models(start: Start, room: Callable[[Policy, Policy | None], None] = lambda policy, critic: None) -> Loaded:
    """Policy and reference, loaded and verified.

    Args:
        start: settings, data and ranks; all ranks call this.
        room: is given the policy, and a critic of its own, before anything is computed with a reference.

    Raises:
        ValueError: a model that cannot be used.
    """
    config, scalar = start.config, start.objective.method.scalar_head
    gradient = start.objective.policy_gradient
    shared = gradient is not None and gradient.settings.critic == "shared"
    policy = load(start, config.model, scalar_head=scalar, value_head=shared).train()
    if config.parallel.shard_gradients and {p.dtype for p in policy.parameters() if p.requires_grad} & {*HALF}:
        raise ValueError(
            "parallel.shard_gradients adds gradients up in the dtype of the weights, which is half precision here: set "
            "model.dtype to float32, or leave it out"
        )
    if scalar:
        separate_padding(policy, start.tokenizer)
    shares = verified(start, policy, config.batch.share_prefix)
    critic = load_critic(start) if gradient is not None and gradient.settings.critic == "separate" else None
    room(policy, critic)
    reference = settle_reference(start, policy, shares)
    if config.model.activation_offloading:
        offload_activations(start.world, *(x for x in (policy, critic) if x is not None))
    if config.reference.offload:
        rest_on_host(reference.model, policy, start.world)
    batch = start.batch(reference.share_prefix)
    for demand in start.demands if batch != config.batch else ():
        check_groups(cast(TokenDataset, demand.dataset), batch, f"the {demand.name}")
    if critic is not None:
        verified(start, critic, batch.share_prefix, "the critic")
    models = Models(policy, reference.model, start.autocast, reference.digest, critic)
    return Loaded(models, reference.data, batch, reference.filling)


def critic_section(config: Config) -> ModelConfig:
    """What a separate critic starts from."""
    path = config.algorithm and config.algorithm.critic_path
    section = replace(config.model, lora=None, quantization=None)
    return section if path is None else replace(section, path=path, config=None)


def rest_on_host(reference: Policy | WithoutAdapter | None, policy: Policy, world: World) -> None:
    """Let a reference rest in host memory, where it is one of its own and there is a GPU to keep free.

    Shards of several ranks rest there already.
    """
    if not isinstance(reference, Policy) or world.device.type == "cpu":
        log.info("reference.offload changes nothing: %s", "this is a CPU" if reference else "no reference is in memory")
        return
    if world.mesh is None:
        rest(reference, world.device, policy.parameters())
    log.info("reference: in host memory; each layer is on the GPU while it runs (reference.offload)")


def offload_activations(world: World, *models: Policy) -> None:
    """Let models that train keep activations in host memory, where there is a GPU to keep free."""
    if world.device.type == "cpu":
        log.info("model.activation_offloading changes nothing: this is a CPU")
        return
    for model in models:
        model.offload = Offload(world.device)
    log.info("activations: in host memory between forward and backward (model.activation_offloading)")


def load_critic(start: Start) -> Policy:
    """The critic that is a model of its own: the policy's weights or another model's, with a scalar head."""
    path = start.config.algorithm and start.config.algorithm.critic_path
    setting = "algorithm.critic_path" if path else "model.path"
    return load(start, critic_section(start.config), setting, scalar_head=True).train()
