"""What a run is made of before its first step: checked settings, seeded generators, data, a verified policy."""

from __future__ import annotations

import gc
import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastalign.config import BatchConfig, Config, ModelConfig, RunConfig
from fastalign.data import builtin
from fastalign.data.files import PLACE
from fastalign.data.loader import Examples, TokenDataset, encode_dataset
from fastalign.data.mismatch import MismatchedDataset
from fastalign.data.pack import pack
from fastalign.data.sources import load_train_eval
from fastalign.engine.agree import require_same
from fastalign.engine.fitting import check_columns, check_groups, held_out_source
from fastalign.engine.forward import Models, wants_autocast
from fastalign.engine.methods import Objective, make_objective
from fastalign.engine.output.alarms import check_choices
from fastalign.engine.reference.cache import Demand
from fastalign.engine.reference.frozen import frozen_copy, with_reference
from fastalign.models import lora
from fastalign.models.head import head_of
from fastalign.models.load import (
    check_model,
    load_policy,
    load_tokenizer,
    separate_padding,
)
from fastalign.models.policy import Policy
from fastalign.models.support import trained_positions
from fastalign.models.verify import verify_packed
from fastalign.parallel.mesh import World
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)


def seed_everything(run: RunConfig) -> None:
    """The same generators on every rank; nothing in training draws from them, but a user's code may."""
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    torch.use_deterministic_algorithms(run.deterministic)


def load_data(config: Config) -> tuple[PreTrainedTokenizerBase, TokenDataset, TokenDataset | None]:
    """The tokenizer, and the training and held-out examples in tokens."""
    tokenizer = load_tokenizer(config.model, fallback=builtin_tokenizer)
    check_models(config, tokenizer)
    rows, held_out = load_train_eval(config.data, config.run.seed)
    training, evaluated = f"data.path: {config.data.path!r}", held_out_source(config.data)
    dataset = encode(rows, tokenizer, config, training)
    held_out = encode(held_out, tokenizer, config, evaluated, rows.column_names) if held_out else None
    check_choices(dataset, config.data.max_length, "data.path", refuse=True)
    if held_out is not None:
        check_choices(held_out, config.data.max_length, "the held-out data", refuse=False)
    for examples, where in ((dataset, training), (held_out, evaluated)):
        check_groups(examples, config.batch, where)
    return tokenizer, dataset, held_out


def check_models(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a policy, and a reference of its own, that cannot run, before anything is tokenised."""
    objective = make_objective(config.method, config.loss)
    check_model(config.model, tokenizer, scalar_head=objective.method.scalar_head)
    if config.reference.path is not None and objective.needs_reference:
        check_model(described_reference(config), setting="reference.path")


def require_same_rows(ranks: World, *datasets: TokenDataset | None) -> None:
    """Refuse ranks that found other rows, or make other tokens of them."""
    mine = [dataset and dataset.fingerprint for dataset in datasets]
    remedy = "give every rank the same data, tokenizer and versions of the libraries"
    require_same(ranks, mine, "made other tokens of its rows", remedy)


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: Config, where: str, named: Sequence[str] = ()
) -> TokenDataset:
    """Rows as the tokens that the method's loss reads; the unread ones of the columns ``named`` were logged before."""
    objective = make_objective(config.method, config.loss)
    check_columns([name for name in rows.column_names if name != PLACE], config.data, objective.data, where)
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
    """The tokenizer trained on built-in text."""
    if name != "builtin:bpe":
        raise ValueError(f"unknown model.tokenizer {name!r}: the only built-in one is builtin:bpe")
    return builtin.train_tokenizer()


def load_models(
    config: Config,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    demands: Sequence[Demand],
    ranks: World,
    room: Callable[[Policy], None] = lambda policy: None,
) -> tuple[Models, list[Examples], Config]:
    """Policy and reference, checked against their plain forwards and sharded; the data, and the settings that are left.

    The data bring the reference's log-probs when these are kept; no reference is in memory then. The check may take
    prefix sharing from the settings. ``room`` is given the policy before anything is computed.

    Raises:
        ValueError: a model that cannot be used, or a method without its teacher.
    """
    policy, source, config = load_weights(config, objective, tokenizer, demands, ranks)
    room(policy)
    models, data = with_reference(config, objective, policy, source, demands, ranks)
    if source is not None and models.reference is None:
        del source
        gc.collect()  # a sharded model is in cycles: its memory would be held until the collector comes by
    return models, data, config


def load_weights(
    config: Config, objective: Objective, tokenizer: PreTrainedTokenizerBase, demands: Sequence[Demand], ranks: World
) -> tuple[Policy, Policy | None, Config]:
    """The policy and what its loss compares it with, checked, not yet sharded; and the settings that are left.

    Both read the same batches: prefixes are shared if both compute them exactly, on every rank.
    """
    autocast, scalar = wants_autocast(config.model, ranks.device), objective.method.scalar_head
    policy = load_policy(config.model, tokenizer=tokenizer, seed=config.run.seed, scalar_head=scalar)
    require_same(ranks, lora.sample(policy.named_parameters()), *other_weights("model.path"))
    if scalar:
        separate_padding(policy, tokenizer)
    asked, config = config.batch, checked(config, policy.train(), autocast, demands, ranks)
    source = load_reference(config, objective, policy, tokenizer)
    if objective.head == "distributions":
        refuse_heads(objective, policy, source)
    if source is not None and source is not policy:
        require_same(ranks, lora.sample(source.named_parameters()), *other_weights("reference.path"))
        name = "the teacher" if objective.method.teacher else "the reference"
        before, config = config.batch, checked(config, source, autocast, demands, ranks, name)
        if config.batch != before:  # what the policy was checked on is not what it will read
            verified(config, Models(policy, None, autocast), demands[0], ranks)
    for demand in demands if config.batch != asked else ():
        check_groups(cast(TokenDataset, demand.dataset), config.batch, f"the {demand.name}")
    return policy, source, config


def other_weights(setting: str) -> tuple[str, str]:
    """What `require_same` says of a rank that loaded another model than the main one, and what to do."""
    return f"loaded other weights from {setting}", f"give every rank the same {setting}"


def checked(
    config: Config, policy: Policy, autocast: bool, demands: Sequence[Demand], ranks: World, name: str = "the model"
) -> Config:
    """The settings that are left for a model, moved to its device, that takes all sequences and packs exactly."""
    check_lengths(policy, demands, config.data.max_length, name)
    models = Models(policy.to(ranks.device), None, autocast)
    config = replace(config, batch=verified(config, models, demands[0], ranks, name))
    check_lengths(policy, demands, config.data.max_length, name, warn=False)  # a forward pass shows every window
    return config


def check_lengths(
    policy: Policy, demands: Sequence[Demand], max_length: int, name: str = "the model", *, warn: bool = True
) -> None:
    """Refuse sequences longer than a model computes exactly; warn of those beyond the positions it was made for.

    Args:
        policy: on any device.
        demands: what will be read.
        max_length: no sequence is longer.
        name: what messages call the model.
        warn: whether to.
    """
    limit, why = policy.max_length or (max_length, "")
    positions = (trained_positions(policy.config) if warn else None) or max_length
    if min(limit, positions) >= max_length:
        return
    for demand in demands:
        lengths = demand.dataset.lengths()[np.asarray(demand.indices)]
        longest = lengths.max(initial=0)
        told = "{} of {} {} are longer than {} (the longest has {} tokens): set data.max_length to {}"
        if longest > limit:
            text = f"{limit} tokens, {why.replace('the model', name)}"
            text = told.format((lengths > limit).sum(), len(lengths), demand.name, text, longest, limit)
            raise ValueError(f"{text}, which cuts completions there, or with data.truncation drop leaves these out")
        if longest > positions:
            text = f"the {positions} positions that {name} was made for"
            text = told.format((lengths > positions).sum(), len(lengths), demand.name, text, longest, positions)
            log.warning("%s unless it is meant so", text)


def refuse_heads(objective: Objective, *models: Any) -> None:
    """Refuse two heads whose distributions cannot be compared, and adapters, which their divergence leaves out."""
    heads = [head_of(model.head) for model in models]
    if any(head.lora is not None for head in heads):
        raise ValueError(
            f"loss {objective.name} serves no adapter on a head: leave it out of model.lora.target_modules"
        )
    ours, theirs = (len(head.weight) for head in heads)
    if ours != theirs:
        raise ValueError(
            f"loss {objective.name} compares distributions over one vocabulary, and the head of the model has {ours} "
            f"rows, that of reference.path {theirs}: choose two models with heads of one size"
        )


def load_reference(
    config: Config, objective: Objective, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> Policy | None:
    """The model that the loss reads: another, frozen, or the policy itself as it starts; None when it reads none."""
    path = config.reference.path
    if not objective.needs_reference:
        if path is not None:
            log.warning("reference.path is not read: loss %s compares with no reference", objective.name)
        return None
    if path is None and objective.method.teacher:
        raise ValueError(f"{config.method} needs a teacher: set reference.path to its hub name or directory")
    if path is None:
        return policy
    described = described_reference(config)
    if objective.method.teacher:  # new rows would teach that a new token is an average one
        described = replace(described, resize_embeddings=False)
    return frozen_copy(load_policy(described, tokenizer=tokenizer, setting="reference.path"))


def described_reference(config: Config) -> ModelConfig:
    """The model section of the model that ``reference.path`` names."""
    dtype = config.reference.dtype or config.model.dtype
    plain: dict[str, Any] = {"config": None, "tokenizer": None, "lora": None, "gradient_checkpointing": False}
    return replace(config.model, path=config.reference.path, dtype=dtype, **plain)


def verified(config: Config, models: Models, demand: Demand, ranks: World, name: str = "the model") -> BatchConfig:
    """The batch section, once a packed batch agrees with the plain forward; without sharing if only that agrees.

    All ranks go on alike: one whose batch disagrees takes sharing from all.
    """
    on_mismatch = config.model.on_mismatch if config.batch.share_prefix else "raise"
    with models.precision(ranks.device):
        first = first_batch(demand, config.batch).to(ranks.device)
        if all(ranks.gather_objects(verify_packed(models.policy, first, on_mismatch, name))):
            return config.batch
        unshared = replace(config.batch, share_prefix=False)
        verify_packed(models.policy, first_batch(demand, unshared).to(ranks.device), name=name)
        return unshared


def first_batch(demand: Demand, batch: BatchConfig) -> PackedBatch:
    """A packed batch of the first examples, the one that shares deepest; the source's position is left alone.

    Of kto's examples the two completions that a prompt is computed for: its own and the mismatched one.
    """
    batches = pack(demand.dataset.fetch(list(demand.indices[: batch.size])), batch.budget, batch.share_prefix)
    every = [*batches, *(packed.both for packed in batches if packed.both is not None)]
    return max(every, key=lambda packed: packed.depth)
