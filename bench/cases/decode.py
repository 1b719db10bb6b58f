"""``forest_decode`` beside attention over padded key/value caches: the attention of one decode step, all layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.field import BF16, FP32, OURS, Field, Inputs, Outputs, Setting, draw
from bench.measure import Case

LAYERS = 6
GROUP = 8
"""Rows that continue one prompt."""


class Past:
    """Rows in the middle of their answers: as a forest, and as caches ``[B, K, longest, d]`` padded on the right."""

    def __init__(self, num_rows: int, prompt: int, own: int, key_heads: int, d: int, dtype: torch.dtype, device: str):
        from fastalign.ops.forest_decode import Forest

        new = torch.Generator(device).manual_seed(0)
        lengths = [max(1, prompt * (50 + 13 * i % 100) // 100) for i in range(-(-num_rows // GROUP))]
        self.owned = [i * 7 % own for i in range(num_rows)]
        self.forest = Forest(LAYERS, key_heads, d, dtype, device)
        prompts = self.forest.add_prompts(lengths)
        self.rows = [self.forest.add_row(prompts[i // GROUP]) for i in range(num_rows)]
        before = [lengths[i // GROUP] + n for i, n in enumerate(self.owned)]
        self.at = torch.tensor(before, device=device)
        shape = (num_rows, key_heads, max(before) + 1, d)
        self.caches = [[draw(new, *shape, dtype=dtype) for _ in "kv"] for _ in range(LAYERS)]
        for layer, padded in enumerate(self.caches):
            first = [[x[i * GROUP, :, :n].transpose(0, 1) for i, n in enumerate(lengths)] for x in padded]
            self.forest.write_prompts(layer, prompts, *(torch.cat(x) for x in first))
            for x in padded:
                for i in range(num_rows):
                    n = lengths[i // GROUP]
                    x[i, :, :n] = x[i // GROUP * GROUP, :, :n]
        self._decode_own(lengths, key_heads, d)
        self.step = self.forest.step(self.rows)
        self.mask = torch.arange(shape[2], device=device) <= self.at[:, None]

    def _decode_own(self, lengths: list[int], key_heads: int, d: int) -> None:
        from fastalign.ops import forest_decode

        for n in range(max(self.owned)):
            some = [i for i, owned in enumerate(self.owned) if owned > n]
            step = self.forest.step([self.rows[i] for i in some])
            at = [lengths[i // GROUP] + n for i in some]
            for layer, padded in enumerate(self.caches):
                k, v = (x[some, :, at] for x in padded)
                forest_decode(k, k, v, self.forest, layer, step)
            self.forest.advance(step)


def inputs(
    generator: torch.Generator, *, num_rows: int, heads: int, key_heads: int, d: int, dtype: torch.dtype
) -> Inputs:
    counts = {"q": heads, "k": key_heads, "v": key_heads}
    return {name: draw(generator, LAYERS, num_rows, n, d, dtype=dtype) for name, n in counts.items()}


def layers(x: Inputs) -> zip[tuple[Tensor, ...]]:
    return zip(x["q"], x["k"], x["v"], strict=True)


@torch.no_grad()
def our_step(x: Inputs, *, past: Callable[[], Past], **options) -> Outputs:
    from fastalign.ops import forest_decode

    forest, step = past().forest, past().step
    out = [forest_decode(q, k, v, forest, i, step, **options) for i, (q, k, v) in enumerate(layers(x))]
    return {"out": torch.stack(out)}


@torch.no_grad()
def padded_step(x: Inputs, *, past: Callable[[], Past], wide: bool = False) -> Outputs:
    """The new token written behind each row's last, then one attention over the longest row's length."""
    found, out = past(), []
    rows = torch.arange(len(found.rows), device=x["q"].device)
    for (q, k, v), (keys, values) in zip(layers(x), found.caches, strict=True):
        keys[rows, :, found.at], values[rows, :, found.at] = k, v
        heads = [t.double() if wide else t for t in (q[:, :, None], keys, values)]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=found.mask[:, None, None], enable_gqa=True)
        out.append(attended[:, :, 0])
    return {"out": torch.stack(out)}


def decode(setting: Setting, *, rows: int, prompt: int, own: int, heads: int, d: int, dtype: torch.dtype) -> Case:
    """One token of each row; prompts of about ``prompt`` tokens shared by `GROUP` rows, up to ``own`` of their own."""
    size = setting.sizes(B=rows, N=prompt, L=own, H=heads, d=d)
    rows, heads, d, key_heads = size["B"], size["H"], size["d"], size["H"] // 2
    past = cache(lambda: Past(rows, size["N"], size["L"], key_heads, d, dtype, setting.device))
    field = Field(setting)
    field.add("eager", partial(padded_step, past=past))
    field.add(OURS, partial(our_step, past=past))
    field.add("fastalign, torch backend", partial(our_step, past=past, backend="torch"))
    return Case(
        f"forest_decode, {LAYERS} layers",
        f"B{rows} prompt {size['N']} own {size['L']} H{heads} K{key_heads} d{d}",
        dtype,
        partial(inputs, num_rows=rows, heads=heads, key_heads=key_heads, d=d, dtype=dtype),
        partial(padded_step, past=past, wide=True),
        field,
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """The sampler's inner loop: 64 and 256 rows of a small model on a CPU, of a large one on a GPU."""
    shape = {"prompt": 512, "own": 256, "heads": 16, "d": 128} if setting.gpu else {}
    shape = shape or {"prompt": 100, "own": 128, "heads": 8, "d": 32}
    return {
        f"forest_decode-{rows}-{name}": partial(decode, setting, rows=rows, **shape, dtype=dtype)
        for rows in (64, 256)
        for name, dtype in (("fp32", FP32), ("bf16", BF16))
    }
