"""Attention of one new token per row over cached keys and values: a prompt's once, each row's own tokens behind them.

    out[b, h] = softmax(scale * q[b, h] . K(b)) V(b),   K(b), V(b): the prompt's, then the row's own, the new one's last

Letters: B rows, H query heads, K key/value heads, d head size, T prompt tokens, L layers. A `Forest` holds the keys and
values of all layers in blocks of `BLOCK` positions. Rows of one prompt share its full blocks; a row's own blocks begin
with a copy of what is left over, so that a block never spans two sequences and starts at a multiple of `BLOCK`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.attention import out_dtype
from fastalign.ops.checks import FLOATS, check_kinds

BLOCK = 16
"""Positions of a block: a vector of the widest instruction set holds one feature of all of them."""
SLACK = 16
"""Numbers behind an arena: the native kernel reads whole vectors."""


def reference(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, scale: float, softcap: float | None = None
) -> Tensor:
    """`forest_decode` by its definition; float64 in, float64 out.

    Args:
        q: `[B, H, d]`.
        keys, values: of each row `[n, K, d]`, its whole sequence: prompt, own tokens, new token.
    """
    out = []
    for row, k, v in zip(q, keys, values, strict=True):
        k, v = (x.repeat_interleave(len(row) // x.shape[1], dim=1) for x in (k, v))
        scores = scale * torch.einsum("hd,nhd->hn", row, k)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        out.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v))
    return torch.stack(out)


# --- the store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """What all layers of one decode step share; stale once one of its rows is advanced, or any row is dropped.

    Attributes:
        forest: the store whose rows these are.
        version: of the forest when the step was made.
        rows: `[B]` ids, in the order of q.
        chains: `[B, W]` int32, the blocks of each row's sequence in order; what is beyond its last means nothing.
        lengths: `[B]` int64, positions of each row, the new token's included.
        order: `[B]` int64 on the CPU, places in q, those of one prompt side by side.
        groups: `[G, 3]` int64 on the CPU, of each prompt's rows: first and last (exclusive) in `order`, and the number
            of blocks that they share. The most expensive group comes first.
    """

    forest: Forest
    version: int
    rows: np.ndarray
    chains: Tensor
    lengths: Tensor
    order: Tensor
    groups: Tensor


@dataclass
class _Prompt:
    length: int
    blocks: list[int]
    num_rows: int = 0


class Forest:
    """Keys and values of all layers: each prompt's once, and behind it those of every row that continues it.

    The arena of a layer grows by doubling; blocks that rows and prompts leave are given to the next.

    Args:
        num_layers: L.
        key_heads: K.
        head_size: d.
        dtype: fp32, bf16, fp16 or fp64; the widest that the model's keys and values have, so that nothing is rounded.
        device: where it lies.

    Attributes:
        keys: per layer `[blocks, K, d, BLOCK]`.
        values: per layer `[blocks, K, BLOCK, d]`.

    >>> forest = Forest(num_layers=1, key_heads=2, head_size=8, dtype=torch.float32, device="cpu")
    >>> prompt, = forest.add_prompts([5])
    >>> forest.write_prompts(0, [prompt], torch.randn(5, 2, 8), torch.randn(5, 2, 8))
    >>> step = forest.step([forest.add_row(prompt), forest.add_row(prompt)])
    >>> forest_decode(torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8), forest, 0, step).shape
    torch.Size([2, 4, 8])
    >>> forest.advance(step)
    """

    def __init__(
        self, num_layers: int, key_heads: int, head_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if min(num_layers, key_heads, head_size) < 1:
            got = f"{num_layers}, {key_heads} and {head_size}"
            raise ValueError(f"a forest needs at least one layer, head and column, got {got}")
        if dtype not in FLOATS:
            raise ValueError(f"a forest holds float32, bfloat16, float16 or float64, got {dtype}")
        self.key_heads, self.head_size, self.dtype, self.device = key_heads, head_size, dtype, torch.device(device)
        self.keys = [self._arena(0, head_size, BLOCK) for _ in range(num_layers)]
        self.values = [self._arena(0, BLOCK, head_size) for _ in range(num_layers)]
        self.version = 0
        self._free: list[int] = []
        self._prompts: dict[int, _Prompt] = {}
        self._num_prompts = 0  # ever added: ids are not used twice
        self._vacant: list[int] = []
        self._prompt_of = np.full(0, -1)  # by row; -1: no such row
        self._lengths = np.zeros(0, np.int64)
        self._chains = np.full((0, 1), -1, np.int32)  # -1: no block yet
        self._tails: dict[int, int] = {}  # a row's first own block -> the block of the prompt that it begins with
        self._sources: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of each arena, free ones included."""
        return len(self.keys[0])

    @property
    def num_free(self) -> int:
        """Blocks that nothing lies in."""
        return len(self._free)

    # prompts

    def add_prompts(self, lengths: Sequence[int]) -> list[int]:
        """Reserve blocks for prompts of so many tokens; returns their ids."""
        if any(length < 1 for length in lengths):
            raise ValueError(f"a prompt has at least one token, got lengths {list(lengths)}")
        first = self._num_prompts
        for length in lengths:
            self._prompts[self._num_prompts] = _Prompt(length, self._take(-(-length // BLOCK)))
            self._num_prompts += 1
        return list(range(first, self._num_prompts))

    def write_prompts(self, layer: int, prompts: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Write a layer's keys and values of these prompts, before the first step of their rows.

        Args:
            layer: below L.
            prompts: their ids.
            k: `[T, K, d]` the prompts' tokens back to back, as the packed prefill has them; no wider than the forest.
            v: `[T, K, d]` likewise.
        """
        total = sum(self._prompt(prompt).length for prompt in prompts)
        check_layer(self, layer)
        for name, x in (("k", k), ("v", v)):
            check_stored(self, name, x, total, "tokens of these prompts")
        blocks, rows = self._places(tuple(prompts))
        shape = (len(blocks), BLOCK, self.key_heads, self.head_size)
        k, v = (x.detach().to(self.dtype)[rows].view(shape) for x in (k, v))
        self.keys[layer].index_copy_(0, blocks, k.permute(0, 2, 3, 1))
        self.values[layer].index_copy_(0, blocks, v.transpose(1, 2))

    def drop_prompt(self, prompt: int) -> None:
        """Give back the blocks of a prompt that no row continues any more."""
        if self._prompt(prompt).num_rows:
            raise ValueError(f"prompt {prompt} is continued by {self._prompt(prompt).num_rows} rows: drop them first")
        self._free += self._prompts.pop(prompt).blocks
        self.version += 1

    def _prompt(self, prompt: int) -> _Prompt:
        if prompt not in self._prompts:
            raise ValueError(f"the forest has no prompt {prompt}")
        return self._prompts[prompt]

    def _places(self, prompts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Blocks `[n]` and the packed row of each of their positions `[16 n]`; kept for the next layer.

        Positions beyond a prompt's end get its last token: nobody reads them.
        """
        if self._sources is None or self._sources[0] != prompts:
            blocks, rows, start = [], [], 0
            for prompt in map(self._prompt, prompts):
                blocks += prompt.blocks
                rows.append(start + np.arange(len(prompt.blocks) * BLOCK).clip(max=prompt.length - 1))
                start += prompt.length
            places = torch.tensor(blocks), torch.from_numpy(np.concatenate(rows))
            self._sources = (prompts, places[0].to(self.device), places[1].to(self.device))
        return self._sources[1:]

    # rows

    def add_row(self, prompt: int) -> int:
        """Let a row continue a prompt; returns its id, which may be that of a row dropped before."""
        found = self._prompt(prompt)
        if not self._vacant:
            self._add_vacant_rows()
        row, (shared, rest) = self._vacant.pop(), divmod(found.length, BLOCK)
        found.num_rows += 1
        self._prompt_of[row], self._lengths[row] = prompt, found.length
        self._reserve_width(shared + 1)
        self._chains[row, :shared] = found.blocks[:shared]
        if rest:
            (own,) = self._take(1)
            self._chains[row, shared], self._tails[own] = own, found.blocks[-1]
        return row

    def drop_row(self, row: int) -> None:
        """Give back a row's own blocks."""
        (prompt,) = self._prompt_of[self._live_rows([row])].tolist()
        found = self._prompts[prompt]
        own = self._chains[row, found.length // BLOCK :]
        blocks = own[own >= 0].tolist()
        for block in blocks:
            self._tails.pop(block, None)
        self._free += blocks
        self._chains[row], self._prompt_of[row] = -1, -1
        self._vacant.append(row)
        found.num_rows -= 1
        self.version += 1

    def step(self, rows: Sequence[int]) -> Step:
        """What all layers share that decode one token of each of these rows, in this order; reserves its place."""
        rows_ = self._live_rows(rows)
        last = self._lengths[rows_] // BLOCK
        self._reserve_width(width := int(last.max()) + 1)
        short = self._chains[rows_, last] < 0
        if num_short := int(short.sum()):
            self._chains[rows_[short], last[short]] = self._take(num_short)
        self._copy_tails()
        lengths = self._lengths[rows_] + 1
        chains = np.ascontiguousarray(self._chains[rows_, :width].clip(min=0))
        order, groups = self._groups(self._prompt_of[rows_], lengths)
        chained, longer = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in (chains, lengths))
        return Step(self, self.version, rows_, chained, longer, order, groups)

    def advance(self, step: Step) -> None:
        """Once all layers have decoded a step: each of its rows is one token longer."""
        check_step(self, step)
        self._lengths[step.rows] += 1
        self.version += 1

    def _groups(self, prompts: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        order = prompts.argsort(kind="stable")
        first = np.flatnonzero(np.diff(prompts[order], prepend=-1))
        shared = [self._prompts[prompt].length // BLOCK for prompt in prompts[order[first]].tolist()]
        groups = np.stack([first, np.append(first[1:], len(order)), shared], axis=1)
        costs = np.add.reduceat(lengths[order], first)
        return torch.from_numpy(order), torch.from_numpy(groups[(-costs).argsort(kind="stable")])

    def _live_rows(self, rows: Sequence[int]) -> np.ndarray:
        """The ids as an array; refuses none, strangers and repetitions."""
        found = np.asarray(rows, np.int64)
        if found.ndim != 1 or not len(found):
            raise ValueError(f"expected ids of rows, got an array of shape {list(found.shape)}")
        strange = (found < 0) | (found >= len(self._prompt_of))
        if strange.any() or (strange := self._prompt_of[found] < 0).any():
            raise ValueError(f"the forest has no row {found[strange][0]}")
        if len(np.unique(found)) < len(found):
            raise ValueError("forest.step got the same row twice: a step decodes one token per row")
        return found

    # memory

    def _arena(self, num_blocks: int, *block: int) -> Tensor:
        shape = (num_blocks, self.key_heads, *block)
        size = num_blocks * self.key_heads * BLOCK * self.head_size
        return torch.empty(size + SLACK, dtype=self.dtype, device=self.device)[:size].view(shape)

    def _take(self, count: int) -> list[int]:
        """Free blocks; those of one call ascend where nothing has been given back yet."""
        if count > len(self._free):
            self._grow(max(2 * self.num_blocks, self.num_blocks + count - len(self._free)))
        kept = len(self._free) - count
        taken = self._free[kept:]
        del self._free[kept:]
        return taken[::-1]

    def _grow(self, num_blocks: int) -> None:
        for arenas in (self.keys, self.values):
            for layer, old in enumerate(arenas):
                arenas[layer] = self._arena(num_blocks, *old.shape[2:])
                arenas[layer][: len(old)] = old
        self._free = list(range(num_blocks - 1, len(old) - 1, -1)) + self._free

    def _add_vacant_rows(self) -> None:
        old = len(self._prompt_of)
        more = max(16, old)
        self._prompt_of = np.append(self._prompt_of, np.full(more, -1))
        self._lengths = np.append(self._lengths, np.zeros(more, np.int64))
        self._chains = np.pad(self._chains, ((0, more), (0, 0)), constant_values=-1)
        self._vacant += range(old + more - 1, old - 1, -1)

    def _reserve_width(self, width: int) -> None:
        if width > self._chains.shape[1]:
            more = max(width, 2 * self._chains.shape[1]) - self._chains.shape[1]
            self._chains = np.pad(self._chains, ((0, 0), (0, more)), constant_values=-1)

    def _copy_tails(self) -> None:
        """Let rows that have not been decoded yet begin with what their prompts' full blocks leave over."""
        if self._tails:
            own, tails = (torch.tensor([*x], device=self.device) for x in (self._tails, self._tails.values()))
            for arena in (*self.keys, *self.values):
                arena.index_copy_(0, own, arena[tails])
            self._tails.clear()


# --- the op ----------------------------------------------------------------------------------------------------------


def forest_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    layer: int,
    step: Step,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Write the key and value of each row's new token, then attend to its whole sequence, the new token included.

    For inference: there is no backward. On a CPU (`cpp`) the result is bit for bit that of `packed_attention` for the
    last token of the same sequence, whatever other rows are in the step.

    Args:
        q: `[B, H, d]` queries of the new tokens, in the order of the step; fp64, fp32, bf16 or fp16.
        k: `[B, K, d]` their keys, no wider than the forest; query head h reads key head h // (H / K).
        v: `[B, K, d]` their values, likewise.
        forest: the store; its arenas of this layer are written.
        layer: below the forest's L.
        step: what `forest.step` made for these rows.
        scale: factor of the scores; default `d ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        `[B, H, d]` in the dtype of q (the autocast dtype under autocast, which leaves fp64 alone).

    Raises:
        ValueError: on shapes, dtypes or devices that do not fit, tensors that want a gradient, or a stale step.
    """
    _check(q, k, v, forest, layer, step)
    kernels = dispatch.kernels("forest_decode", backend, q.device, q.dtype, forest.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return kernels.decode(q, k, v, forest.keys[layer], forest.values[layer], step, scale, softcap, out_dtype(q))


def _check(q: Tensor, k: Tensor, v: Tensor, forest: Forest, layer: int, step: Step) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("forest_decode has no backward: call it under torch.no_grad() or torch.inference_mode()")
    num_rows, heads, size = len(step.rows), forest.key_heads, forest.head_size
    if q.dim() != 3 or q.shape[0] != num_rows or q.shape[2] != size or q.shape[1] % heads:
        raise ValueError(
            f"q must be [B, H, d] with B = {num_rows} rows of the step, H a multiple of {heads} and d = {size}, "
            f"got shape {list(q.shape)}"
        )
    check_step(forest, step)
    check_layer(forest, layer)
    check_kinds(q, k, v)
    check_stored(forest, "k", k, num_rows, "rows of the step")
    check_stored(forest, "v", v, num_rows, "rows of the step")


def check_step(forest: Forest, step: Step) -> None:
    """The step was made for this forest, and its rows have not changed since."""
    if step.forest is not forest:
        raise ValueError("this step was made by another forest")
    if step.version != forest.version:
        raise ValueError("this step is over: rows were advanced or dropped since; make the next with forest.step(rows)")


def check_layer(forest: Forest, layer: int) -> None:
    """The forest has such a layer."""
    if not 0 <= layer < len(forest.keys):
        raise ValueError(f"layer must lie in [0, {len(forest.keys)}), got {layer}")


def check_stored(forest: Forest, name: str, x: Tensor, count: int, what: str) -> None:
    """Keys or values fit the forest, which keeps every bit of them."""
    if x.shape != (count, forest.key_heads, forest.head_size):
        expected = [count, forest.key_heads, forest.head_size]
        raise ValueError(f"{name} must be {expected} for {count} {what}, got shape {list(x.shape)}")
    if x.device != forest.device:
        raise ValueError(f"{name} is on {x.device} but the forest on {forest.device}; move them to one device")
    if x.dtype != forest.dtype and torch.promote_types(x.dtype, forest.dtype) != forest.dtype:
        raise ValueError(f"{name} is {x.dtype}, which a forest of {forest.dtype} would round: make the forest wider")
