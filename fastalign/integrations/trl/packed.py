"""TRL's fused head on packed rows: the padded batch goes in and padded fields come out, what is between is not padded.

A batch ``[R, S]`` of TRL holds prompts and completions side by side. Its rows are laid out in one packed row without
padding, rows of one prompt share it, the backbone runs once, and every field of the scored tokens returns to its place
in ``[R, S-1]``. The trainer's losses and metrics are untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch, empty_batch
from fastalign.integrations._fields import Scaling, head_fields
from fastalign.integrations._model import on_head
from fastalign.models.policy import Policy
from fastalign.models.verify import verify_packed
from fastalign.types import IGNORE_INDEX, PackedBatch

STATE = "_fastalign_packed"


@dataclass
class _State:
    """What a model with a packed head remembers; no module, so that the model does not contain itself."""

    policy: Policy
    plain: Callable[..., Any]
    attention: str
    scaling: Scaling
    outputs: tuple[str, ...]
    wide: bool
    verified: bool = False


def add_packed_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's ``add_fused_lm_head`` with packed rows: ``model(..., labels=labels, fused_lm_head=True)``.

    Calls without the flag run the model's own forward in its own attention.

    Args:
        model: a causal LM that ``Policy`` accepts; its dropout is set to zero.
        temperature: of the logits.
        cast_lm_head_to_fp32: run the head in fp32, outside autocast.
        outputs: fields to compute besides ``log_probs``.

    Raises:
        ValueError: a model that cannot be computed exactly on packed rows, with the reason.
    """
    attention, plain = str(model.config._attn_implementation), model.forward
    policy = Policy(model)
    model.set_attn_implementation(attention)
    options: dict[str, Any] = policy.head_options
    state = _State(policy, plain, attention, Scaling(temperature, **options), outputs, cast_lm_head_to_fp32)
    setattr(model, STATE, state)
    model.forward = MethodType(_forward_of(type(model)), model)


def _forward_of(cls: type[PreTrainedModel]) -> Callable[..., Any]:
    """A forward with the signature of the class's own, which ``generate`` inspects."""

    @functools.wraps(cls.forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        state: _State = getattr(self, STATE)
        # Left as it is after the call: backward may run the layers again.
        packed = state.policy.attention
        if fused_lm_head:
            _use_attention(self, packed, instead_of=state.attention)
            return _fused(self, state, *args, **kwargs)
        _use_attention(self, state.attention, instead_of=packed)
        return state.plain(*args, **kwargs)

    return forward


def _use_attention(model: PreTrainedModel, name: str, instead_of: str) -> None:
    if model.config._attn_implementation == instead_of:
        model.set_attn_implementation(name)


def _fused(
    model: PreTrainedModel,
    state: _State,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    use_cache: bool | None = None,
    **other: Any,
) -> Any:
    """TRL's ``FusedCausalLMOutput`` of a padded batch."""
    if unknown := sorted(name for name, value in other.items() if value is not None):
        raise ValueError(f"packed rows are made of input_ids, attention_mask and labels; got {', '.join(unknown)} too")
    batch, places = pack_rows(input_ids, attention_mask, labels)
    if not (state.verified or isinstance(model, FSDPModule) or torch.compiler.is_compiling()):
        verify_packed(state.policy, batch, advice="train it with TRL's own trainer")
        state.verified = True
    hidden = state.policy.hidden_states(batch)
    wide = torch.autocast(hidden.device.type, enabled=False) if state.wide else nullcontext()
    with wide:
        rows = hidden.float() if state.wide else hidden
        fields = on_head(model, head_fields, rows, batch.labels, state.scaling, state.outputs)
    return _output(fields, places, labels, num_items_in_batch)


def pack_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[PackedBatch, Tensor]:
    """A padded batch as a packed one.

    Args:
        input_ids, attention_mask, labels: ``[R, S]``, padded on either side; a label is -100 or the token of its place.

    Returns:
        The packed batch on the device of ``input_ids``, rows without a scored token left out, and ``[N]`` places of its
        scored tokens in the flattened ``[R, S-1]``.
    """
    ids, mask, scored = (x.cpu().numpy() for x in (input_ids, attention_mask != 0, labels != IGNORE_INDEX))
    width, groups = ids.shape[1] - 1, {}
    for row in range(len(ids)):
        columns = np.flatnonzero(mask[row])
        targets = scored[row, columns]
        targets[:1] = False
        if targets.any():
            prompt = ids[row, columns[: targets.argmax()]].tobytes()
            place = row * width + columns[targets] - 1
            groups.setdefault(prompt, []).append((ids[row, columns], targets, place))
    examples = [
        TokenExample(tuple((tokens, targets) for tokens, targets, _ in group), number)
        for number, group in enumerate(groups.values())
    ]
    places = np.concatenate([place for group in groups.values() for *_, place in group] or [np.empty(0, np.int64)])
    batch = build_batch(examples, share_prefix=True) if examples else empty_batch()
    return batch.to(input_ids.device), torch.from_numpy(places).to(input_ids.device)


def _output(
    fields: tuple[Tensor | None, ...], places: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
) -> Any:
    """Fields ``[N]`` at their places in ``[R, S-1]``, zero elsewhere."""
    from trl.trainer.utils import FusedCausalLMOutput

    mask = labels[:, 1:] != IGNORE_INDEX

    def padded(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(mask.numel()).index_put((places,), x).view(mask.shape)

    log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = map(padded, fields)
    assert log_probs is not None
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=entropy,
        log_sum_sq_probs=log_sum_sq_probs,
        mean_logits=mean_logits,
        is_top1=is_top1,
        label_mask=mask,
    )
