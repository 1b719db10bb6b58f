"""Logits whose largest value occurs more than once, and which label ``torch.argmax`` would name: the first."""

import torch

WIDE = 33001
"""Columns of ``wide_rows``: three slabs of the native sweep, several tiles of Triton's, four segments of CUDA's."""

TIES = {
    "with no other": ([20000], 20000, True),
    "with the neighbour before": ([20000, 19999], 20000, False),
    "with the neighbour behind": ([20000, 20001], 20000, True),
    "with the first column": ([0, 33000], 33000, False),
    "with the last column": ([0, 33000], 0, True),
    "in the same lane, a tile before": ([20000, 20000 - 1024], 20000, False),
    "in the same lane, tiles behind": ([20000, 20000 + 8192], 20000, True),
    "at the end of the slab before": ([16384, 16383], 16384, False),
    "at the start of the next slab": ([16383, 16384], 16383, True),
    "with the rest of the row": (range(WIDE), 7, False),
    "of all, with the first": (range(WIDE), 0, True),
}
"""Columns that have the largest logit, a label among them, and whether it is the first."""


def wide_rows(dtype):
    """``[11, WIDE]`` logits, labels and hits of ``TIES``."""
    background = torch.randn(WIDE, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    logits = background.to(dtype).repeat(len(TIES), 1)
    for row, (columns, _, _) in zip(logits, TIES.values(), strict=True):
        row[list(columns)] = 3
    labels, hits = (torch.tensor([tie[i] for tie in TIES.values()]) for i in (1, 2))
    assert torch.equal(logits.argmax(-1) == labels, hits)
    return logits, labels, hits


def few_values(dtype, rows=16, vocab=507):
    """Logits of five values, and labels among the largest of their row: the first, or one drawn from the tied."""
    new = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-2, 3, (rows, vocab), generator=new).to(dtype)
    drawn = (logits == logits.amax(-1, keepdim=True)).float().multinomial(1, generator=new).squeeze(1)
    labels = torch.where(torch.arange(rows) % 2 == 0, logits.argmax(-1), drawn)
    assert rows // 4 < (logits.argmax(-1) == labels).sum() < 3 * rows // 4 + 1
    return logits, labels
