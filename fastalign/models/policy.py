"""The policy: a Hugging Face causal LM run on packed rows, its heads left to a head function.

No model code is patched. Attention is registered with transformers' `AttentionInterface`; the layout of the packed row
travels as a keyword of the backbone's forward. transformers builds no mask for an implementation that has no mask
function, so none exists, and the attention function refuses to see one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Cache, PreTrainedModel

from fastalign.models import support
from fastalign.models.decoding import Cached, Decode
from fastalign.models.head import head_of, scores
from fastalign.models.offload import Offload
from fastalign.ops import dispatch
from fastalign.ops.attention import Layout, layout, packed_attention
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)

ATTENTION = "fastalign"
"""The name of our attention in transformers, followed by `_BACKEND` when one was asked for."""

HARMLESS = {"position_ids", "use_cache", "is_causal", "cache_position", "output_attentions", "output_hidden_states"}
"""Keywords of HF attention calls that carry nothing the packed layout does not."""
KNOWN = {"s_aux": "attention sinks (s_aux)"}
"""What some of the others are called."""


class Policy(nn.Module):
    """A causal LM as backbone and head; the head may be a scalar one, of a reward model, or have a value head beside.

    A value head makes one number of each hidden state that predicts a token: what a critic expects from there on. It
    trains with the trunk, starts at 0, is in checkpoints and never in what is exported.

    Args:
        model: the HF model, a causal LM or a sequence classifier with one label, or a `peft.PeftModel` of one; its
            attention is set to ours and its dropout to zero.
        attention: backend of the packed attention, `auto` for the best one here.
        gradient_checkpointing: recompute each layer's activations in backward; `mlp` those of its MLP alone.
        value_head: put a value head beside the LM head.

    Raises:
        ValueError: for a model that cannot be computed exactly on packed rows, with the reason.
    """

    base_digest: str | None = None
    """What the checkpoints of an adapter know its frozen base by."""
    rounding: Any = None
    """How far rounding moves its log-probs, a `verify.Rounding`, once `verify_packed` has measured it."""
    team: Any = None
    """The ranks that compute its layers together, a `parallel.tensor.Team`; None: each rank has the whole layers."""
    offload: Offload | None = None
    """Keeps activations in host memory; None: they stay where they are made."""

    def __init__(
        self,
        model: Any,
        *,
        attention: str = "auto",
        gradient_checkpointing: bool | str = False,
        value_head: bool = False,
    ):
        super().__init__()
        adapted = None if isinstance(model, PreTrainedModel) else model
        model = model if adapted is None else adapted.get_base_model()
        support.check(model)
        head_of(support.output_layer(model))  # refuses adapters that the fused head cannot serve
        support.disable_dropout(model)
        support.train_every_embedding(model)
        self.model: PreTrainedModel = model
        self._adapted = (adapted,)  # in a tuple: as a submodule it would name every parameter twice
        self.use_attention(register_attention(attention))
        self.max_length = support.max_length(model.config)
        self.head_options = support.head_options(model)
        self.value_head = make_value_head(head_of(self.head).weight) if value_head else None
        if gradient_checkpointing == "mlp":
            recompute_mlps(model)
        elif gradient_checkpointing:
            word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.x
            enable = getattr(model, f"{word}_checkpointing_enable")
            enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})

    def use_attention(self, name: str) -> None:
        """Run packed rows through an attention that `register_attention` named."""
        self.attention = name
        self.model.set_attn_implementation(register_attention("auto"))
        # transformers takes any name with "sdpa" or "flash" in it for its own, which not every model has
        self.model.config._attn_implementation = name

    @property
    def backbone(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @property
    def head(self) -> Any:
        """The LM head, or the scalar head of a reward model: a `nn.Linear`, or what PEFT put around it."""
        return support.output_layer(self.model)

    @property
    def adapted(self) -> Any:
        """The `peft.PeftModel` around `model`; None without adapters."""
        return self._adapted[0]

    @property
    def has_scalar_head(self) -> bool:
        """Whether it scores tokens instead of predicting them."""
        return self.model.get_output_embeddings() is None

    @property
    def num_tokens(self) -> int:
        """The size of the vocabulary, whichever part of it this rank has."""
        return self.config.vocab_size

    @property
    def head_group(self) -> Any:
        """The ranks that have parts of the LM head now; None where this rank has it whole."""
        return None if self.team is None or self.team.whole or self.has_scalar_head else self.team.group

    @property
    def config(self) -> Any:
        """The HF config."""
        return self.model.config

    def forward(
        self, batch: PackedBatch, head_fn: Callable[..., Any], *, values: bool = False, cached: Cached | None = None
    ) -> Any:
        """Hidden states of the scored rows through a head function.

        Args:
            batch: the packed batch; N may be 0.
            head_fn: called as `head_fn(hidden [N, D], weight [V, D], labels [N], **options)`, where options are those
                of `bias`, `lora`, `softcap`, `logit_scale` that the model defines, and the `process_group` of the ranks
                that have parts of the vocabulary. It runs inside the module, where FSDP has gathered the weights and
                autocast is on.
            values: give it the value head's outputs too, as `values [N]`, connected to the graph.
            cached: keep the keys and values of the row, or read those of earlier tokens, in place of the attention that
                the batch's segments describe.

        Returns:
            What `head_fn` returns.
        """
        hidden = self.hidden_states(batch, cached)
        weight, bias, lora = head_of(self.head)
        given = {"bias": bias, "lora": lora, "process_group": self.head_group}
        options: dict[str, Any] = {name: x for name, x in given.items() if x is not None}
        if values:
            assert self.value_head is not None, "values are asked for, and there is no value head"
            options["values"] = scores(hidden, self.value_head.weight, bias=self.value_head.bias)
        return head_fn(hidden, weight, batch.labels, **options, **self.head_options)

    def hidden_states(self, batch: PackedBatch, cached: Cached | None = None) -> Tensor:
        """`[N, D]` hidden states that predict the batch's labels; the engine calls `forward`, which FSDP hooks."""
        plan = layout(batch.segments) if cached is None else cached
        self.check_batch(plan)
        if isinstance(cached, Decode) and cached.layers is not None:
            return gather_rows(cached.layers(batch.input_ids, batch.position_ids, cached), batch.rows)
        with nullcontext() if self.offload is None else self.offload(batch.num_tokens):
            output = self.backbone(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                attention_mask=None,
                use_cache=False,
                packed_layout=plan,
            )
        self._note_window(plan)
        assert not _caches(output), "a key/value cache changes how packed rows are read"
        return gather_rows(output.last_hidden_state[0], batch.rows)

    def plain_logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """`[n, p, V]` logits at p positions of `[n, L]` ordinary rows, by the model's own forward and active attention.

        Rows may be padded on the right: causal attention never reads the padding. V is 1 for a scalar head.
        """
        at = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        row = {"input_ids": input_ids, "position_ids": at, "attention_mask": None, "use_cache": False}
        if self.has_scalar_head:
            return self.head(self.backbone(**row).last_hidden_state[:, positions])
        logits = self.model(**row, logits_to_keep=positions).logits
        return logits if self.head_group is None else self.team.gather_columns(logits, self.num_tokens)

    def check_batch(self, plan: Layout | Cached) -> None:
        """Refuses a batch that the model cannot compute exactly."""
        active = self.model.config._attn_implementation
        if active != self.attention:
            raise ValueError(
                f"packed rows need the attention implementation {self.attention!r}; the model has {active!r}: "
                f"call model.set_attn_implementation({self.attention!r})"
            )
        if self.max_length is not None and plan.longest > self.max_length[0]:
            limit, why = self.max_length
            raise ValueError(
                f"a sequence of {plan.longest} tokens is longer than {limit}, {why}: lower data.max_length"
            )

    def _note_window(self, plan: Layout | Cached) -> None:
        """Keep in `max_length` the narrowest window that a layer asked for, which not every config names."""
        window = plan.cache.get("window")
        if window is not None and (self.max_length is None or window < self.max_length[0]):
            self.max_length = (window, "the model's sliding window")


def recompute_mlps(model: nn.Module) -> None:
    """Let the backward compute what is inside of every MLP again: it reads twice the intermediate size of each token,
    more than all else of a layer, and the last of its three products is not needed for it."""
    found: list[Any] = [mlp for block in support.transformer_blocks(model) if (mlp := getattr(block, "mlp", None))]
    if not found:
        name = type(model).__name__
        raise ValueError(f"model.gradient_checkpointing mlp: the layers of {name} have no mlp: set it to true")
    for mlp in found:
        mlp.forward = partial(_recomputed, mlp)


def _recomputed(mlp: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(mlp).forward  # which native layers or a split over ranks may have put there since
    if not torch.is_grad_enabled():
        return forward(mlp, *args, **kwargs)
    return checkpoint(forward, mlp, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def make_value_head(weight: Tensor) -> nn.Linear:
    """A value head beside an LM head, at 0: no token looks better than another before the critic has learned.

    It has its numbers where those of the model are still to be read.
    """
    device = "cpu" if weight.is_meta else weight.device
    head = nn.Linear(weight.shape[1], 1, dtype=weight.dtype, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _caches(output: Any) -> list[str]:
    """Key/value caches among a model's outputs, whatever the release of transformers calls that field."""
    return [name for name, value in output.items() if isinstance(value, Cache)]


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """`hidden[rows]`; a row that predicts several tokens gets the sum of their gradients, added in a fixed order."""
    # On CPU index_select is three times faster and adds row by row; on CUDA its backward uses atomics, indexing sorts.
    return hidden[rows] if hidden.is_cuda else hidden.index_select(0, rows)


def register_attention(backend: str) -> str:
    """Registers our attention with transformers; returns the name it got."""
    if backend != "auto" and backend not in dispatch.ATTENTION:
        raise ValueError(f"unknown attention backend {backend!r}; known: auto, {', '.join(dispatch.ATTENTION)}")
    # transformers takes any name with "flash" in it for a kernel of its own, and looks for that
    name = ATTENTION if backend == "auto" else f"{ATTENTION}_{backend.replace('flash', 'fa')}"
    AttentionInterface.register(name, _attention_function(None if backend == "auto" else backend))
    return name


def _attention_function(backend: str | None) -> Callable[..., tuple[Tensor, None]]:
    """An HF attention function: q `[1, H, T, d]`, k and v `[1, K, T, d]` in, `[1, T, H, d]` out."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        packed_layout: Layout | Cached | None = None,
        **other: Any,
    ) -> tuple[Tensor, None]:
        if packed_layout is None:
            raise ValueError("this model's attention reads packed rows only: call it through Policy")
        check_call(module, query, key, value, attention_mask, dropout, sliding_window, packed_layout, other)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "backend": backend}
        if isinstance(packed_layout, Cached):
            return packed_layout.attend(layer_of(module), q, k, v, **options)[None], None
        return packed_attention(q, k, v, packed_layout, **options)[None], None

    return attention


def layer_of(module: Any) -> int:
    """Which layer an attention module is of: under that number its keys and values are kept."""
    if (layer := getattr(module, "layer_idx", None)) is None:
        raise ValueError(
            f"{type(module).__name__} does not say which layer it is (layer_idx): it cannot be sampled from"
        )
    return layer


def check_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    window: int | None,
    plan: Layout | Cached,
    other: dict[str, Any],
) -> None:
    """Refuses what the packed attention would silently leave out."""
    name = type(module).__name__
    unknown = sorted(KNOWN.get(word, word) for word, x in other.items() if x is not None and word not in HARMLESS)
    if unknown:
        raise ValueError(f"{name} passes {', '.join(unknown)}, which the packed attention does not compute")
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        raise ValueError(
            f"{name} has keys of {key.shape[-1]} and values of {value.shape[-1]} numbers (multi-head latent attention);"
            " the packed attention takes both of one width"
        )
    if mask is not None or query.shape[0] != 1:
        raise ValueError(f"{name}: packed rows take no attention mask and one row, got a mask or {query.shape[0]} rows")
    if dropout:
        raise ValueError(f"{name} has dropout {dropout}: copies of a shared prefix would draw different masks")
    if not getattr(module, "is_causal", True) or other.get("is_causal") is False:
        raise ValueError(f"{name} is bidirectional; packed rows are causal")
    if window is None:
        return
    plan.cache["window"] = min(window, plan.cache.get("window", window))
    if plan.longest > window:
        raise ValueError(f"{name} sees {window} tokens back and a sequence has {plan.longest}: lower data.max_length")
