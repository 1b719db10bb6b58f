"""Filling the cache of reference log-probs: whether that is less work, what it lacks, and each rank's share of it."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.config import BatchConfig, Config
from fastalign.data import cache
from fastalign.data.examples import TokenExample
from fastalign.data.loader import Examples, rank_share
from fastalign.data.ref_cache import RefCache, example_key, parts
from fastalign.engine.agree import not_shared
from fastalign.engine.errors import RunError, as_one
from fastalign.engine.fingerprint import computation, fingerprint
from fastalign.engine.interrupt import Interrupted, leaving
from fastalign.engine.progress import stage
from fastalign.models.policy import Policy
from fastalign.models.verify import Distance, Rounding
from fastalign.parallel.mesh import World
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)

TEMPERATURE = 1.0
"""Of the reference's distribution, as of the policy's."""
WORTH = 0.8
"""Log-probs are computed ahead when that is at most so many times the work of computing them with every batch."""
WINDOW = 256
"""Examples that are packed together: enough for full micro-batches and even ranks."""
SHARD_SECONDS = 60.0
"""The most work that a killed process loses."""
KEPT = "the reference log-probs computed so far are kept: the same command goes on"
"""What is told of a filling that was stopped."""
SHARD_BYTES = 64 << 20
"""A shard is read whole when it is checked."""

Score = Callable[[PackedBatch], Tensor]
"""``[N]`` reference log-probs of a batch; all ranks call it equally often."""


@dataclass(frozen=True)
class Demand:
    """Examples whose reference log-probs a run reads.

    Attributes:
        dataset: where they are.
        indices: which.
        uses: how many it reads in all, repetitions counted.
        name: what messages call them.
    """

    dataset: Examples
    indices: Sequence[int]
    uses: int
    name: str = "examples"


@dataclass(frozen=True)
class Filling:
    """A cache and what it lacks.

    Attributes:
        store: the cache.
        demands: all that the run reads.
        keys: of the different examples among them.
        lacking: those that are not there, the same on every rank.
    """

    store: RefCache
    demands: Sequence[Demand]
    keys: Sequence[bytes]
    lacking: frozenset[bytes]

    @property
    def hits(self) -> int:
        """Examples that are there already."""
        return len(self.keys) - len(self.lacking)


def open_cache(
    config: Config,
    reference: Policy,
    demands: Sequence[Demand],
    world: World,
    *,
    autocast: bool,
    weights: str | None = None,
) -> Filling | None:
    """The cache that a run takes its reference log-probs from, or None when it computes them with every batch.

    ``auto`` compares the work: with every batch an example is scored as often as it is read, ahead of the run once, and
    not at all when the cache has it. A single pass over examples that no run has scored is the same work either way and
    starts at once without the cache, so that is what it does, unless a GPU has no room for a second copy of the
    weights. A directory is always filled: whoever names one means to read it again.

    Args:
        config: ``reference.cache`` decides.
        reference: on this rank's device, not yet sharded.
        demands: what will be read.
        world: the ranks, all of which call this.
        autocast: whether the forwards run under it.
        weights: the reference's `hash_weights`, where that is known.

    Raises:
        OSError: a directory was named that cannot be written, or that not all ranks see.
    """
    asked = config.reference.cache
    if asked == "off":
        return None
    how = {"share_prefix": config.batch.share_prefix, "temperature": TEMPERATURE, "autocast": autocast}
    space = cache.key(fingerprint(reference, world, weights), computation(reference, world, **how))
    root = default_directory(config) if asked == "auto" else Path(asked).expanduser()
    filling = look_up(RefCache(root / space), demands, world)
    uses = sum(demand.uses * parts_each(demand) for demand in demands)
    wanted = asked != "auto" or len(filling.lacking) <= WORTH * uses
    if not wanted and not is_memory_short(reference, world):
        text = "reference: with every batch, %d sequences or groups, as the cache lacks %d (reference.cache is auto)"
        log.info(text, uses, len(filling.lacking))
        return None
    problem = cannot_share(filling.store.directory, world) if filling.lacking else None
    if problem and asked == "auto":
        log.warning("reference: with every batch, as %s", problem)
        return None
    if problem:
        raise OSError(f"{problem}: set reference.cache to a directory that every rank can write, or to off")
    return filling


def default_directory(config: Config) -> Path:
    """Where log-probs are kept unless the configuration says otherwise."""
    return cache.root(config.data.cache_dir) / "ref_logps"


def look_up(store: RefCache, demands: Sequence[Demand], world: World) -> Filling:
    """What a cache has and lacks of the demands; ranks that opened it at different moments agree on what is lacking."""
    every: set[bytes] = set()
    for demand in demands:
        for window in windows(demand.indices):
            every.update(example_key(part) for part in parts(demand.dataset.fetch(window)))
    keys = list(every)
    mine = [key for key, known in zip(keys, store.has(keys), strict=True) if not known]
    lacking = frozenset(key for rank in world.gather_objects(mine) for key in rank)
    return Filling(store, demands, keys, lacking)


def parts_each(demand: Demand) -> int:
    """What is scored by itself of an example: the example, and with ``mismatched`` another one."""
    return len(parts(demand.dataset.fetch(list(demand.indices[:1]))))


def windows(indices: Sequence[int]) -> Iterator[list[int]]:
    """``WINDOW`` of them at a time."""
    return (list(indices[start : start + WINDOW]) for start in range(0, len(indices), WINDOW))


def is_memory_short(policy: Policy, world: World) -> bool:
    """Whether weights and, of what trains, gradients, moments and a reference leave less than a quarter of a GPU."""
    if world.device.type != "cuda":
        return False
    shards = world.mesh["dp_shard"].size() if world.mesh is not None else 1
    free, total = torch.cuda.mem_get_info(world.device)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad) or weights
    return free + weights - (weights + 4 * trained) / shards < total / 4


def cannot_share(directory: Path, world: World) -> str | None:
    """Why the ranks cannot fill a directory together, or None."""
    probe, problem = directory / f".probe-{uuid.uuid4().hex}", None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        problem = f"the reference cache {directory} cannot be written ({error.strerror})"
    if problems := [text for text in world.gather_objects(problem) if text]:
        return problems[0]
    split = not_shared(directory, world)
    return split and f"the reference cache is not one directory for all ranks ({split})"


def fill(filling: Filling, score: Score, batch: BatchConfig, world: World) -> None:
    """Compute what a cache lacks, each rank its share, and see that every rank can read it.

    Nothing here draws from a generator or moves the training data's position.

    Args:
        filling: from `open_cache`.
        score: the reference, sharded as it will be.
        batch: budget and prefix sharing.
        world: the ranks, all of which call this.

    Raises:
        RunError: a rank does not see what another wrote, or the cache cannot be written.
    """
    started, store = time.perf_counter(), filling.store
    entries: dict[bytes, np.ndarray] = {}
    written, done = started, 0
    try:
        with leaving(KEPT), stage("reference log-probs", len(filling.lacking), shown=world.is_main) as tell:
            for examples, keys in missing_examples(filling):
                for micro in rank_share(examples, batch.budget, batch.share_prefix, world.rank, world.size):
                    entries |= split(micro, score(micro.to(world.device)), keys)
                    done += micro.num_examples * world.size  # the other ranks have about as many
                    tell(min(done, len(filling.lacking)))
                now = time.perf_counter()
                with as_one(world):  # the disk of one rank may be full
                    if now - written > SHARD_SECONDS or sum(x.nbytes for x in entries.values()) > SHARD_BYTES:
                        write(store, entries)
                        entries, written = {}, now
    except Interrupted:  # what was computed is kept
        write(store, entries)
        raise
    with as_one(world):
        write(store, entries)
    store.refresh()
    unseen = int((~store.has(list(filling.lacking))).sum()) if filling.lacking else 0
    if any(world.gather_objects(unseen)):
        raise RunError(
            f"{unseen} examples written to {store.directory} cannot be read back: set reference.cache to off"
        )
    text = "reference: %d examples from %s, %d computed now in %.1f s"
    log.info(text, filling.hits, store.directory, len(filling.lacking), time.perf_counter() - started)


def write(store: RefCache, entries: dict[bytes, np.ndarray]) -> None:
    """Put a rank's log-probs into the cache, if it has any."""
    if entries:
        store.write(entries)


def missing_examples(filling: Filling) -> Iterator[tuple[list[TokenExample], list[bytes]]]:
    """Windows of examples that the cache lacks, equal ones once, numbered by place in the window; and their keys."""
    done: set[bytes] = set()
    for demand in filling.demands:
        for window in windows(demand.indices):
            found = {example_key(part): part for part in parts(demand.dataset.fetch(window))}
            new = {key: part for key, part in found.items() if key in filling.lacking and key not in done}
            done |= new.keys()
            if new:
                numbered = [replace(part, example_id=i, mismatched=None) for i, part in enumerate(new.values())]
                yield numbered, list(new)


def split(batch: PackedBatch, logps: Tensor, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
    """A batch's ``[N]`` log-probs by the key of their example."""
    values, offsets = logps.float().cpu().numpy(), batch.cu_seqlens[batch.cu_groups.long()].tolist()
    spans = zip(batch.example_ids, pairwise(offsets), strict=True)
    return {keys[number]: values[start:stop].copy() for number, (start, stop) in spans}


def check_agreement(
    examples: Sequence[TokenExample], score: Score, batch: BatchConfig, world: World, rounding: Rounding
) -> float:
    """The largest difference between cached log-probs and those of the run's own packing, over ranks; logged.

    It is 0 where a row's bits do not depend on its batch, as on a CPU with one thread.

    Args:
        examples: some that come with cached log-probs.
        score: the reference.
        batch: budget and prefix sharing.
        world: the ranks, all of which call this.
        rounding: of this reference in this precision, as `verify_packed` measured it.

    Raises:
        RunError: it is beyond rounding: the cache holds something else.
    """
    micro = rank_share(examples, batch.budget, batch.share_prefix, world.rank, world.size)[0].to(world.device)
    logps, known = score(micro), micro.ref_logps
    apart, agrees = Distance(0.0, 0.0), True
    if known is not None and known.numel():
        apart, agrees = rounding.judge((logps - known).abs())
    ranks = world.gather_objects((apart, agrees))
    largest, mean = max(one.largest for one, _ in ranks), max(one.mean for one, _ in ranks)
    log.info("reference: cached log-probs are within %.2g of those of this run's packing", largest)
    if not all(fine for _, fine in ranks):
        raise RunError(
            f"cached reference log-probs differ by {largest:.2g} from computed ones, by {mean:.2g} on average "
            f"({rounding.allowed} is rounding): set reference.cache to an empty directory, or to off"
        )
    return largest
