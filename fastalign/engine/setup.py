"""What a run is made of before its first step: checked settings, seeded generators, data, a verified policy."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastalign.config import BatchConfig, Config, RunConfig
from fastalign.data import builtin
from fastalign.data.files import PLACE
from fastalign.data.loader import Examples, TokenDataset, encode_dataset
from fastalign.data.mismatch import MismatchedDataset
from fastalign.data.sources import load_train_eval
from fastalign.engine.agree import require_same
from fastalign.engine.fitting import check_columns, check_groups, held_out_source
from fastalign.engine.forward import Models
from fastalign.engine.loading import Start, load, verified
from fastalign.engine.methods import make_objective
from fastalign.engine.output.alarms import check_choices
from fastalign.engine.reference.cache import Filling
from fastalign.engine.reference.frozen import reference_section, settle_reference
from fastalign.models.load import check_model, load_tokenizer, separate_padding
from fastalign.models.policy import Policy
from fastalign.parallel.mesh import World

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
    if config.reference.path is None and objective.needs_reference and objective.method.teacher:
        raise ValueError(f"{config.method} needs a teacher: set reference.path to its hub name or directory")
    if config.reference.path is not None and objective.needs_reference:
        check_model(reference_section(config), setting="reference.path")


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


def load_models(start: Start, room: Callable[[Policy], None] = lambda policy: None) -> Loaded:
    """Policy and reference, loaded and verified.

    Args:
        start: settings, data and ranks; all ranks call this.
        room: is given the policy before anything is computed with a reference.

    Raises:
        ValueError: a model that cannot be used.
    """
    config, scalar = start.config, start.objective.method.scalar_head
    policy = load(start, config.model, scalar_head=scalar).train()
    if scalar:
        separate_padding(policy, start.tokenizer)
    shares = verified(start, policy, config.batch.share_prefix)
    room(policy)
    reference = settle_reference(start, policy, shares)
    batch = start.batch(reference.share_prefix)
    for demand in start.demands if batch != config.batch else ():
        check_groups(cast(TokenDataset, demand.dataset), batch, f"the {demand.name}")
    models = Models(policy, reference.model, start.autocast, reference.digest)
    return Loaded(models, reference.data, batch, reference.filling)
