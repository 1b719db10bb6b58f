"""Whether rows fit the method and the batch; errors name the setting that the rows came from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastalign.config import BatchConfig, DataConfig
from fastalign.data import feedback, formats
from fastalign.data.loader import TokenDataset
from fastalign.data.pack import group_tokens
from fastalign.engine.reference.cache import windows


def held_out_source(data: DataConfig) -> str:
    """The setting that names the held-out rows, and what it is."""
    names = ("eval_path", "eval_split", "eval_fraction")
    return next((f"data.{name}: {value!r}" for name in names if (value := getattr(data, name))), "data.eval_path")


def check_columns(columns: Sequence[str], data: DataConfig, method: str, where: str) -> None:
    """Refuse columns that do not fit the method, with the setting that names the rows."""
    try:
        formats.recognise(columns, method, data.format)
        if method == "reward:soft_label":
            feedback.check_columns(columns, method)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_groups(dataset: TokenDataset | None, batch: BatchConfig, where: str) -> None:
    """Refuse groups above ``batch.max_group_tokens`` before anything is computed."""
    if dataset is None or batch.max_group_tokens is None:
        return
    limit, totals = batch.max_group_tokens, dataset.totals()  # without what they share they may fit
    for window in windows(np.flatnonzero(totals > limit).tolist()):
        for example in dataset.fetch(window):
            if (tokens := group_tokens(example, batch.share_prefix)) > limit:
                raise ValueError(
                    f"{where}: example {example.example_id} takes {tokens} computed tokens, more than "
                    f"batch.max_group_tokens {limit}: lower data.max_length or raise the limit"
                )
