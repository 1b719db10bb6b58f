"""Reference log-probs ahead of any run: all examples, training's and held-out, in the cache that runs will read."""

from __future__ import annotations

import time
from dataclasses import replace

from fastalign.config import Config
from fastalign.engine.interrupt import handled
from fastalign.engine.loading import Start
from fastalign.engine.methods import objective_of
from fastalign.engine.reference.cache import Demand, default_directory
from fastalign.engine.settings import check_settings, settle
from fastalign.engine.setup import load_data, load_models, require_same_rows
from fastalign.parallel.mesh import world


def precompute(config: Config) -> str:
    """Fill the cache that runs with this configuration read, from all ranks.

    Args:
        config: of such a run; what does not change a log-prob plays no part.

    Returns:
        a line that says what was there, what was computed, and what it took; only the main rank's counts tokens.

    Raises:
        ValueError: a loss that reads no reference log-probs, or settings, data and models that cannot be used.
        OSError: the cache cannot be written.
    """
    objective, started = objective_of(config), time.perf_counter()
    if objective.on_policy:
        raise ValueError(f"{config.method} samples its completions: there are no log-probs to keep")
    if not objective.needs_reference or objective.head != "logps":
        reads = "whole distributions of its reference" if objective.needs_reference else "no reference"
        raise ValueError(f"{config.method} with loss {objective.name} reads {reads}: there are no log-probs to keep")
    if config.reference.cache == "off":
        raise ValueError("reference.cache is off: leave it out, or set it to a directory, to keep log-probs")
    if config.reference.cache == "auto":  # a directory is filled whatever it costs
        section = replace(config.reference, cache=str(default_directory(config)))
        config = replace(config, reference=section)
    check_settings(config)
    tokenizer, *datasets = load_data(config)
    demands = [
        Demand(data, range(len(data)), len(data), name)
        for data, name in zip(datasets, ("training examples", "held-out examples"), strict=True)
        if data is not None
    ]
    with handled() as signals, world(config.parallel) as ranks:
        signals.where = "while the reference scored examples"
        signals.rest = "what was computed is kept: the same command goes on"
        config = settle(config, ranks.device)
        require_same_rows(ranks, *datasets)
        filling = load_models(Start(config, objective, tokenizer, demands, ranks)).filling
    assert filling is not None  # as a directory is named, and the loss reads log-probs
    store, misses = filling.store, filling.misses
    return (
        f"{filling.count} examples, {store.num_tokens(filling.keys)} tokens: {filling.hits} hits, {misses} misses, "
        f"{time.perf_counter() - started:.1f} s; {store.num_bytes} bytes in {store.directory}"
    )
