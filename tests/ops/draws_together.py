"""Tokens drawn from a head that is split over ranks are those of one rank; for ``token_ranks.py``."""

import torch
import torch.distributed as dist
from vocab_ranks import counts, own, same_bits_everywhere

from fastalign.ops import linear_sample, sample_keys

ROWS, WIDTH, TIMES = 21, 16, 31
"""So many times the columns of the shards, so that a rank has several blocks of 512."""
SETTINGS = {
    "plain": {},
    "capped": {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5},
    "greedy rows": {"temperature": torch.tensor([0.0, 1.0, 0.3] * 7)},
    "truncated": {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
}


def check(sizes):
    sizes = tuple(TIMES * size for size in sizes)
    new, columns, numbers = torch.Generator().manual_seed(0), own(sizes), torch.arange(ROWS)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=new), torch.randn(sum(sizes), WIDTH, generator=new) / 2
    bias, keys = torch.randn(sum(sizes), generator=new), sample_keys(5, numbers, numbers)
    weight[7], bias[7] = weight[3], bias[3]  # equal logits
    for dtype in (torch.float32, torch.bfloat16):
        h, w, b = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
        for name, settings in SETTINGS.items():
            tokens, stats = linear_sample(h, w, keys, numbers, bias=b, **settings)
            for memory in (None, 200_000):
                shared = {"process_group": dist.group.WORLD, "memory": memory, **settings}
                found, seen = linear_sample(h, w[columns], keys, numbers, bias=b[columns], **shared)
                assert torch.equal(found, tokens), f"{name} {dtype} {sizes}"
                same_bits_everywhere(found, *vars(seen).values())
                assert all(
                    (x - y).abs().max() < 1e-5 for x, y in zip(vars(seen).values(), vars(stats).values(), strict=True)
                )
                counts()
    if len(sizes) > 1:
        check_refusals(hidden, weight[columns], keys, numbers)


def check_refusals(hidden, weight, keys, positions):
    """What differs between ranks, or is wrong on one of them, all ranks refuse."""
    first = dist.get_rank() == 0
    wrong = {
        "same keys": {"keys": keys + first},
        "same truncation": {"top_k": 3 + first},
        "top_p must lie in (0, 1]": {"top_p": 2.0 if first else 1.0},
    }
    for message, changed in wrong.items():
        try:
            named = {"keys": keys, "positions": positions, **changed}
            linear_sample(hidden, weight, **named, process_group=dist.group.WORLD)
            raise AssertionError(f"taken, though {message}")
        except ValueError as error:
            assert message in str(error), error
    counts()
