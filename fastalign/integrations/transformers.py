"""The loss of any Hugging Face causal LM without its logits, under ``Trainer``, accelerate, DDP, FSDP2 and PEFT.

    patch_model(model)
    loss = model(**batch, labels=labels).loss       # no [B, S, V] tensor, gradients made in the same pass

Without labels the model runs as before: generation, and evaluation that wants logits, are untouched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastalign.integrations._model import causal_lm, on_head
from fastalign.models.head import Head, head_of
from fastalign.models.support import head_options
from fastalign.ops import linear_logps, linear_loss
from fastalign.types import IGNORE_INDEX, TokenStats

__all__ = ["FusedTrainer", "patch_model", "plain_forward", "unpatch_model"]

PATCH = "_fastalign_patch"
PROBE = 8
"""Tokens of the first batch on which the head is compared with the model's own logits."""
ROUNDINGS = {torch.bfloat16: 0.5, torch.float32: 10.0}
"""By how many units in the last place of the largest log-prob they may differ. Both multiply the same hidden states
once, so that no training of the model widens this: trained and random ones come to 0.03 and 0.94."""


@dataclass
class _Patch:
    """What a patched model remembers.

    Attributes:
        plain: its own forward.
        instance: whether that forward was the instance's, not the class's.
        verified: whether the head has been compared with the model's own logits.
        off: whether calls with labels go to ``plain`` for now.
    """

    plain: Callable[..., Any]
    instance: bool
    verified: bool = False
    off: bool = False


# --- public ----------------------------------------------------------------------------------------------------------


def patch_model(model: nn.Module) -> nn.Module:
    """Makes ``model(**batch, labels=...)`` return the loss without computing logits.

    ``loss = -sum of ln p(label) / num_items_in_batch``, as transformers defines it: labels are shifted here
    (``shift_labels`` are taken as they are), ``ignore_index`` (-100) is not scored and never projected, and without
    ``num_items_in_batch`` the divisor is the number of scored tokens. A batch without a scored token gives 0, not NaN.
    The output has ``logits=None``; hidden states and attentions come on request. The key/value cache is off.

    The first call with labels compares the head with the model's own logits on a few tokens.

    Args:
        model: a causal LM, or a PEFT model of one, before accelerate, DDP or FSDP wrap it. Patching twice does nothing.

    Returns:
        ``model``, changed in place; ``unpatch_model`` undoes it.

    Raises:
        ValueError: a model without a linear head, with a loss of its own, or already prepared by accelerate; at the
            first call, one whose logits are more than its head's.
    """
    base = causal_lm(model)
    if hasattr(base, PATCH):
        return model
    if hasattr(base, "_original_forward"):
        raise ValueError("call patch_model before accelerate prepares the model, whose autocast wraps its forward")
    if base.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"{type(base).__name__} has a loss_function of its own, which reads logits: it cannot be fused"
        )
    if base.base_model is base:
        raise ValueError(f"{type(base).__name__} has no backbone apart from its head")
    head_of(base.get_output_embeddings())
    setattr(base, PATCH, _Patch(base.forward, "forward" in vars(base)))
    base.forward = MethodType(_forward_of(type(base)), base)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Gives a patched model its own forward back; one that is not patched is left as it is."""
    base = causal_lm(model)
    patch: _Patch | None = getattr(base, PATCH, None)
    if patch is not None:
        del base.forward
        if patch.instance:
            base.forward = patch.plain
        delattr(base, PATCH)
    return model


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Inside the block a patched model runs its own forward, logits included, with labels too."""
    patch: _Patch = getattr(causal_lm(model), PATCH)
    was, patch.off = patch.off, True
    try:
        yield
    finally:
        patch.off = was


class FusedTrainer(Trainer):
    """``transformers.Trainer`` on a patched model: the same losses and gradients without logits.

    Evaluation with ``compute_metrics`` wants logits and computes them. ``label_smoothing_factor`` and
    ``compute_loss_func`` read logits in training too, and are refused, as is ``nn.DataParallel``.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, used in {
            "label_smoothing_factor": self.label_smoother is not None,
            "compute_loss_func": self.compute_loss_func is not None,
        }.items():
            if used:
                raise ValueError(f"{name} reads logits, which FusedTrainer never computes: use transformers.Trainer")
        if self.args.n_gpu > 1:
            raise ValueError("nn.DataParallel cannot run a patched model: launch one process per GPU with torchrun")
        assert isinstance(self.model, nn.Module)
        patch_model(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model, patched."""
        return patch_model(super().call_model_init(trial))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """As the base class; with the model's own forward where logits are wanted."""
        options = {"prediction_loss_only": prediction_loss_only, "ignore_keys": ignore_keys}
        if prediction_loss_only:
            return super().prediction_step(model, inputs, **options)
        assert isinstance(self.model, nn.Module)
        with plain_forward(self.model):
            return super().prediction_step(model, inputs, **options)


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward_of(cls: type[PreTrainedModel]) -> Callable[..., Any]:
    """A forward with the signature of the class's own, which ``Trainer`` and ``generate`` inspect."""
    names = list(inspect.signature(cls.forward).parameters)[1:]

    @functools.wraps(cls.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        patch: _Patch = getattr(self, PATCH)
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if kwargs.get("labels") is None or patch.off:
            return patch.plain(**kwargs)
        if not patch.verified and not torch.compiler.is_compiling():
            _verify(self, patch.plain, kwargs)
            patch.verified = True
        return _fused(self, **kwargs)

    return forward


def _fused(
    model: PreTrainedModel,
    *,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    logits_to_keep: int | Tensor = 0,
    return_dict: bool | None = None,
    **inputs: Any,
) -> Any:
    """The output of a call with labels."""
    if inputs.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
        raise ValueError("the router's auxiliary loss is not computed here: set output_router_logits to false")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError("logits_to_keep has no meaning with labels, for which no logits are computed")
    backbone = model.base_model(**{**inputs, "use_cache": False, "return_dict": True})
    hidden = backbone.last_hidden_state
    targets = pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX).to(hidden.device)
    loss = on_head(model, _loss, hidden, targets, num_items_in_batch, head_options(model))
    output = CausalLMOutputWithPast(
        loss=loss,
        hidden_states=getattr(backbone, "hidden_states", None),
        attentions=getattr(backbone, "attentions", None),
    )
    wanted = getattr(model.config, "return_dict", True) if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


def _loss(
    hidden: Tensor, head: Head, targets: Tensor, num_items: Tensor | int | None, options: dict[str, Any]
) -> Tensor:
    """``-sum ln p / num_items`` of hidden states ``[B, S, D]`` and targets ``[B, S]``."""
    rows, labels = hidden.flatten(0, -2), targets.flatten()
    if num_items is None:
        num_items = (labels != IGNORE_INDEX).sum().clamp(min=1)
    divisor = num_items.to(rows.device) if isinstance(num_items, Tensor) else num_items
    if torch.compiler.is_compiling():  # a graph cannot select rows by number; the custom op does
        logps = linear_logps(rows, head.weight, labels, bias=head.bias, lora=head.lora, **options)
        assert isinstance(logps, Tensor)
        return -logps.sum() / divisor

    def nll(stats: TokenStats) -> Tensor:
        return -stats.logps.sum() / divisor

    return linear_loss(rows, head.weight, labels, nll, bias=head.bias, lora=head.lora, **options)[0]


# --- first use -------------------------------------------------------------------------------------------------------


def _verify(model: PreTrainedModel, plain: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Compares log-probs through the head with those of the model's own logits, on the first tokens of a batch.

    A model that does more to its logits than its config says, or to its hidden states before its head, would train on
    another loss without a word.
    """
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    probe = {name: inputs[name][:1, :PROBE], "use_cache": False, "return_dict": True}
    with torch.no_grad(), _evaluating(model):
        wanted = plain(**probe).logits[0].float().log_softmax(-1)
        hidden = model.base_model(**probe).last_hidden_state[0]
        labels = wanted.argmin(-1)
        got = on_head(model, _logps, hidden, labels.to(hidden.device), head_options(model))
    wanted = wanted.gather(1, labels[:, None])[:, 0].to(got.device)
    half = hidden.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.bfloat16 if half else torch.float32
    allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * max(8.0, wanted.abs().max().item())
    apart = (got - wanted).abs().max().item()
    if not apart <= allowed:  # true for NaN
        raise ValueError(
            f"{type(model).__name__} computes its logits otherwise than by its LM head: log-probs differ by "
            f"{apart:.2g} (allowed {allowed:.2g}); unpatch_model(model) gives its own loss back"
        )


def _logps(hidden: Tensor, head: Head, labels: Tensor, options: dict[str, Any]) -> Any:
    return linear_logps(hidden, head.weight, labels, bias=head.bias, lora=head.lora, **options)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
