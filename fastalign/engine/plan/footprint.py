"""One rank's model without its weights: its parameters, and the bytes that a forward and backward keep of a batch.

The model lies on the meta device, where tensors have shapes and no numbers; it runs by the code that will run, native
layers included, over a packed row. A dispatch mode sees every tensor come and go. What is kept grows evenly with layers
and with tokens, so that one and two layers, over few prompts and more, say it of all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.config import ModelConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.engine.plan.trace import Kept, Way, run
from fastalign.models import hollow, inline, lora
from fastalign.models.load import DTYPES, base_path, readable
from fastalign.models.native import use_native_layers
from fastalign.models.policy import Policy
from fastalign.models.support import transformer_blocks
from fastalign.parallel import tensor
from fastalign.types import PackedBatch

FEW, MORE = 2, 3
"""Prompts with their answers that are run."""


@dataclass(frozen=True)
class Group:
    """A prompt with its answers, in tokens.

    Attributes:
        prompt, answer: lengths.
        answers: how many.
        shared: the prompt is computed once.
        scored: rows of the head per answer.
    """

    prompt: int
    answer: int
    answers: int
    shared: bool
    scored: int

    @property
    def tokens(self) -> int:
        """What the backbone computes."""
        return self.prompt * (1 if self.shared else self.answers) + self.answer * self.answers

    @property
    def rows(self) -> int:
        """What the head scores."""
        return self.scored * self.answers


@dataclass(frozen=True)
class Weight:
    """A parameter of one rank before FSDP shards it; ``block`` is the layer that it is in, None outside of all."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    block: int | None
    matrix: bool

    @property
    def numel(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Weights:
    """The parameters of one rank's model, a tied one once.

    Attributes:
        every: all of them.
        width, vocab: of the head.
        head_trained: columns of the head's weight that get a gradient.
        head_bytes: of an element of it.
    """

    every: tuple[Weight, ...]
    width: int
    vocab: int
    head_trained: int
    head_bytes: int

    @staticmethod
    def of(policy: Policy) -> Weights:
        """What a policy has."""
        head = policy.head.weight if hasattr(policy.head, "weight") else next(policy.head.parameters())
        vocab, width = head.shape
        return Weights(parameters(policy), width, vocab, width * head.requires_grad, head.dtype.itemsize)


@dataclass(frozen=True)
class Footprint:
    """What a rank's model takes.

    Attributes:
        config: of one rank: under tensor parallelism with its share of heads, MLP and vocabulary.
        head: its parameters, and what its head is like.
        group: what the batch is made of.
        kept: by (layers, groups), each 1 or 2 and `FEW` or `MORE`.
    """

    config: Any
    head: Weights
    group: Group
    kept: Mapping[tuple[int, int], Kept]

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Its parameters."""
        return self.head.every

    @property
    def layers(self) -> int:
        """Of the whole model."""
        return self.config.num_hidden_layers

    def of(self, tokens: float) -> Kept:
        """What a micro-batch of so many computed tokens keeps."""
        share = tokens / self.group.tokens - FEW
        one, two = (self.kept[layers, FEW].along(self.kept[layers, MORE], share) for layers in (1, 2))
        return replace(one.along(two, self.layers - 1), backward=two.backward)

    def per_token(self) -> dict[str, tuple[float, float]]:
        """Bytes per computed token by kind: of one layer, and outside of the layers."""
        one, two = self._slopes(1), self._slopes(2)
        each = {name: two[name] - one.get(name, 0) for name in sorted(two)}
        return {name: (each[name], one.get(name, 0) - each[name]) for name in each}

    def _slopes(self, layers: int) -> dict[str, float]:
        few, more = (self.kept[layers, groups].kinds for groups in (FEW, MORE))
        return {name: (size - few.get(name, 0)) / self.group.tokens for name, size in more.items()}


def describe_model(section: ModelConfig, *, scalar_head: bool = False) -> Any:
    """The Hugging Face config of a model section; of a model with a name only that is read."""
    if section.path is None:
        return inline.make(section.config or {}, scalar_head, None)
    path, setting = base_path(section, lora.saved_adapter(section), "model.path")
    with readable("model", path, "config.json", setting):
        config = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    if scalar_head:
        config.num_labels = 1
    return config


def share_of(config: Any, tp: int) -> Any:
    """The config of what one of ``tp`` ranks has of each layer.

    Raises:
        ValueError: layers that cannot be split so, with what could.
    """
    if tp == 1:
        return config
    tensor.plan_of(config)
    tensor.check_sizes(config, tp)
    part = copy.deepcopy(config)
    part.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(part, name, getattr(config, name) // tp)
    part.vocab_size = -(-config.vocab_size // tp)
    return part


def without_weights(section: ModelConfig, config: Any, *, scalar_head: bool, value_head: bool, way: Way) -> Policy:
    """The policy on the meta device, adapters too."""
    auto = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
    base = hollow.on_meta(auto, copy.deepcopy(config), DTYPES.get(section.dtype))
    if (saved := lora.saved_adapter(section)) is not None:
        known = {name: getattr(saved, name) for name in lora.ACCEPTED if getattr(saved, name, None) is not None}
        section = replace(section, path=None, lora={**known, "lora_dropout": 0.0})
    with torch.device("meta"), quiet():
        adapted = lora.adapt(base, section, None, 0)
    policy = Policy(adapted, gradient_checkpointing=section.gradient_checkpointing, value_head=value_head)
    if way.native:
        use_native_layers(base)
    if way.dtype is not None:
        policy = policy.to(way.dtype)
    return policy._apply(lambda x: x if x.is_meta else torch.empty_like(x, device="meta")).train()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from the log what is said of models that are thrown away."""
    logger = logging.getLogger("fastalign")
    was = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(was)


def parameters(policy: Policy) -> tuple[Weight, ...]:
    """What the policy has, each tied parameter once."""
    where = {id(p): i for i, block in enumerate(transformer_blocks(policy)) for p in block.parameters()}
    made = ((Weight((*p.shape,), p.dtype, p.requires_grad, where.get(id(p)), p.dim() > 1)) for p in policy.parameters())
    return tuple(made)


def footprint(
    section: ModelConfig,
    config: Any,
    way: Way,
    group: Group,
    *,
    scalar_head: bool = False,
    value_head: bool = False,
    weights: Weights | None = None,
) -> Footprint:
    """Count one rank's model.

    Args:
        section: the settings of the model.
        config: its sizes on one rank, from `share_of`.
        way: how it computes.
        group: what a batch is made of.
        scalar_head, value_head: as `load_policy`.
        weights: those of the model, where they have been counted already.
    """
    made = {"scalar_head": scalar_head, "value_head": value_head, "way": way}
    own = {**made, "way": replace(way, dtype=None)}
    whole, kept = weights or Weights.of(without_weights(section, config, **own)), {}
    for layers in (1, 2):
        part = copy.deepcopy(config)
        part.num_hidden_layers = layers
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:layers]
        policy = without_weights(section, part, **made)
        for groups in (FEW, MORE):
            kept[layers, groups] = run(policy, batch_of(group, groups, scalar_head), way)
    return Footprint(config, whole, group, kept)


def batch_of(group: Group, number: int, own_rows: bool) -> PackedBatch:
    """Some groups, packed."""
    ends = np.arange(group.prompt + group.answer) >= group.prompt + group.answer - group.scored
    prompt = np.zeros(group.prompt, dtype=np.int64)
    sequences = tuple(
        (np.concatenate([prompt, np.full(group.answer, i + 1, dtype=np.int64)]), ends) for i in range(group.answers)
    )
    examples = [TokenExample(sequences, i, own_rows=own_rows) for i in range(number)]
    return build_batch(examples, share_prefix=group.shared).to("meta")
