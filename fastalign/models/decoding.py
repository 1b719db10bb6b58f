"""What attention does while a policy samples: keep the keys and values of prompts, then read them token by token.

Each stands in the place of a packed row's `Layout` in the policy's forward, so that layers, native or not, need no code
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalign.ops.attention import Layout, packed_attention
from fastalign.ops.forest_decode import Forest, Step, forest_decode
from fastalign.types import PackedBatch

LEAST_ROWS = 16
"""Forwards of fewer rows are padded to so many. Products of a row then have the same bits whatever the other rows are:
measured on CPU, those of MKL in fp32 have them from 12 rows up on two threads and from 4 on one, those in
bf16 always, and the native ones."""


@dataclass(frozen=True)
class Cached:
    """An attention that reads or writes more than the row at hand.

    Attributes:
        longest: tokens of the longest sequence, those before the row included.
        cache: as that of `Layout`.
    """

    longest: int
    cache: dict[object, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """``[T, H, d]`` from q ``[T, H, d]`` and k, v ``[T, K, d]`` of a layer; options are `packed_attention`'s."""
        raise NotImplementedError


@dataclass(frozen=True)
class Prefill(Cached):
    """A packed row that begins with prompts, whose keys and values go to a forest.

    Attributes:
        layout: of the whole row.
        forest: where they go.
        prompts: their numbers there, in the order of the row.
        num_kept: rows of these prompts; what is behind is padding.
    """

    layout: Layout
    forest: Forest
    prompts: Sequence[int]
    num_kept: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The packed attention, as training computes it."""
        self.forest.write_prompts(layer, self.prompts, k[: self.num_kept], v[: self.num_kept])
        return packed_attention(q, k, v, self.layout, **options)


@dataclass(frozen=True)
class Decode(Cached):
    """One new token of each of the first ``num_rows`` sequences; what is behind is padding and gets zeros.

    Attributes:
        forest: holds what came before.
        step: the sequences.
        num_rows: how many they are.
        layers: computes them in place of the model's own modules, with equal bits: `[T]` tokens and positions to
            `[T, D]` hidden states.
    """

    forest: Forest
    step: Step
    num_rows: int
    layers: Callable[[Tensor, Tensor, Decode], Tensor] | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The new tokens' attention to all before them and to themselves."""
        if options.get("backend") not in (None, "cpp"):  # those that only packed rows have
            options["backend"] = None
        n, padding = self.num_rows, q.shape[0] - self.num_rows
        out = forest_decode(q[:n], k[:n], v[:n], self.forest, layer, self.step, **options)
        return out if padding == 0 else torch.cat([out, out.new_zeros(padding, *out.shape[1:])])


@dataclass(frozen=True)
class Shapes(Cached):
    """Notes what keys and values each layer makes, to make a forest for them.

    Attributes:
        layout: of the row.
        seen: for each layer the number of key heads, their size and the dtype that holds keys and values.
    """

    layout: Layout
    seen: dict[int, tuple[int, int, torch.dtype]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The packed attention."""
        self.seen[layer] = (k.shape[1], k.shape[2], torch.promote_types(k.dtype, v.dtype))
        return packed_attention(q, k, v, self.layout, **options)

    def forest(self, name: str, device: torch.device) -> Forest:
        """A forest for these layers of a model, which is called ``name`` in errors."""
        kinds = {*self.seen.values()}
        if len(kinds) != 1 or sorted(self.seen) != list(range(len(self.seen))):
            raise ValueError(
                f"{name} has layers with keys of different shapes ({self.seen}): it cannot be sampled from"
            )
        return Forest(len(self.seen), *kinds.pop(), device)


def prompt_batch(prompts: Sequence[np.ndarray], copies: int, device: torch.device) -> PackedBatch:
    """A packed row of prompts, padded to `LEAST_ROWS`; the last token of each is read ``copies`` times."""
    lengths = [len(ids) for ids in prompts]
    parts = [*prompts, np.zeros(max(0, LEAST_ROWS - sum(lengths)), dtype=np.int64)]
    rows = (np.cumsum(lengths) - 1).repeat(copies)
    offsets = np.cumsum([0, *(len(part) for part in parts if len(part))])
    return _batch(
        np.concatenate(parts), np.concatenate([np.arange(len(part)) for part in parts]), rows, offsets, device
    )


def token_batch(tokens: Sequence[int], positions: Sequence[int], device: torch.device) -> PackedBatch:
    """One token of each of some sequences, padded to `LEAST_ROWS`; only a `Decode` attends in it."""
    size = max(LEAST_ROWS, len(tokens))
    ids, at = np.zeros((2, size), dtype=np.int64)
    ids[: len(tokens)], at[: len(tokens)] = tokens, positions
    return _batch(ids, at, np.arange(len(tokens)), np.array([0, size]), device)


def _batch(ids: np.ndarray, at: np.ndarray, rows: np.ndarray, offsets: np.ndarray, device: torch.device) -> PackedBatch:
    """A batch of root segments, without labels: the head draws them."""
    tokens, positions, read = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (ids, at, rows))
    none, roots = torch.zeros(1, dtype=torch.int32), torch.full((len(offsets) - 1,), -1, dtype=torch.int32)
    return PackedBatch(
        input_ids=tokens,
        position_ids=positions,
        cu_segments=torch.from_numpy(offsets.astype(np.int32)),
        parents=roots,
        rows=read,
        labels=read,
        cu_seqlens=none,
        example_ids=(),
        logical_tokens=len(ids),
        cu_groups=none,
    )
