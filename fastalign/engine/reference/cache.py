"""Filling the cache of reference log-probs: whether that is less work, what is missing, each rank's share of it."""

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
from fastalign.data.loader import Examples
from fastalign.data.pack import share
from fastalign.data.ref_cache import RefCache, example_key, parts
from fastalign.engine.agree import not_shared
from fastalign.engine.errors import RunError, as_one
from fastalign.engine.interrupt import Interrupted, leaving
from fastalign.engine.output.progress import stage
from fastalign.models.policy import Policy
from fastalign.models.precision import HALF
from fastalign.models.verify import Distance, Rounding
from fastalign.parallel.mesh import World
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)

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
    """A cache and what is missing in it.

    Attributes:
        store: the cache.
        demands: all that the run reads.
        missing: for each of them, `[n]` bool over its examples and their mismatched ones: to be computed, of equal ones
            the first; the same on every rank.
        count: how many different examples the demands have.
        keys: theirs, on the main rank; a million of them would take long to send.
    """

    store: RefCache
    demands: Sequence[Demand]
    missing: Sequence[np.ndarray]
    count: int
    keys: Sequence[bytes]

    @property
    def misses(self) -> int:
        """Examples that are to be computed."""
        return sum(int(np.count_nonzero(each)) for each in self.missing)

    @property
    def hits(self) -> int:
        """Examples that are there already."""
        return self.count - self.misses


def open_cache(config: Config, space: str, demands: Sequence[Demand], policy: Policy, world: World) -> Filling | None:
    """The cache that a run takes its reference log-probs from, or None when it computes them with every batch.

    ``auto`` compares the work: with every batch an example is scored as often as it is read, ahead of the run once, and
    not at all when the cache has it. A single pass over examples that no run has scored is the same work either way and
    starts at once without the cache, so that is what it does, unless a GPU has no room for a second copy of the
    weights. A directory is always filled: whoever names one means to read it again.

    Args:
        config: ``reference.cache`` decides.
        space: what the log-probs depend on besides tokens; the reference need not be in memory.
        demands: what will be read.
        policy: on this rank's device, sharded.
        world: the ranks, all of which call this.

    Raises:
        OSError: a directory was named that cannot be written, or that not all ranks see.
    """
    asked = config.reference.cache
    if asked == "off":
        return None
    root = default_directory(config) if asked == "auto" else Path(asked).expanduser()
    filling = look_up(RefCache(root / space), demands, world)
    uses = sum(demand.uses * parts_each(demand) for demand in demands)
    misses = filling.misses
    wanted = asked != "auto" or misses <= WORTH * uses
    if not wanted and not is_memory_short(policy, world, config.optim.master_weights):
        text = (
            "reference: with every batch, %d sequences or groups, %d of them not in the cache (reference.cache is auto)"
        )
        log.info(text, uses, misses)
        return None
    problem = cannot_share(filling.store.directory, world) if misses else None
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
    """Which of the demands a cache has: the main rank looks, the others are sent a bit for each example.

    Ranks may have opened the cache at different moments: what not all of them see is missing.
    """
    seen_by_all = frozenset.intersection(*map(frozenset, world.gather_objects(store.shards)))
    ends = np.cumsum([len(demand.indices) * parts_each(demand) for demand in demands])
    keys: Sequence[bytes] = ()
    missing = np.zeros(ends[-1], dtype=bool)
    if world.is_main:
        first = first_places(demands)
        keys, places = list(first), np.fromiter(first.values(), dtype=np.int64)
        missing[places[~store.has(keys, seen_by_all)]] = True
    count = world.broadcast(torch.tensor([len(keys)])).item()
    bits = world.broadcast(torch.from_numpy(np.packbits(missing))).numpy()
    missing = np.unpackbits(bits, count=len(missing)).astype(bool)
    return Filling(store, demands, np.split(missing, ends[:-1]), int(count), keys)


def first_places(demands: Sequence[Demand]) -> dict[bytes, int]:
    """The key of each different example, with where it comes first: counted over all demands, mismatched ones too."""
    first: dict[bytes, int] = {}
    fetched = (demand.dataset.fetch(window) for demand in demands for window in windows(demand.indices))
    for place, part in enumerate(part for examples in fetched for part in parts(examples)):
        first.setdefault(example_key(part), place)
    return first


def parts_each(demand: Demand) -> int:
    """What is scored by itself of an example: the example, and with ``mismatched`` another one."""
    return len(parts(demand.dataset.fetch(list(demand.indices[:1]))))


def windows(indices: Sequence[int]) -> Iterator[list[int]]:
    """``WINDOW`` of them at a time."""
    return (list(indices[start : start + WINDOW]) for start in range(0, len(indices), WINDOW))


def is_memory_short(policy: Policy, world: World, masters: bool | str = True) -> bool:
    """Whether what comes with weights that train leaves less than a quarter of a GPU, beside the weights."""
    if world.device.type != "cuda":
        return False
    shards = world.mesh["dp_shard"].size() * world.mesh["tp"].size() if world.mesh is not None else 1
    free, total = torch.cuda.mem_get_info(world.device)
    trained = [p for p in policy.parameters() if p.requires_grad] or [*policy.parameters()]
    beside = sum(p.numel() * bytes_beside(p.dtype, masters) for p in trained)
    return free - beside / shards < total / 4


def bytes_beside(dtype: torch.dtype, masters: bool | str) -> int:
    """Bytes beside a trained weight: gradient, two moments and a reference; with a master all but the last in fp32;
    with a compensated one the gradient alone, and the remainder beside.

    Example:
        >>> bytes_beside(torch.float32, True), bytes_beside(torch.bfloat16, True), bytes_beside(torch.bfloat16, False)
        (16, 18, 8)
        >>> bytes_beside(torch.bfloat16, "compensated")
        12
    """
    if dtype in HALF and masters:
        return 4 + 4 * dtype.itemsize if masters == "compensated" else 16 + dtype.itemsize
    return 4 * dtype.itemsize


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
    """Compute what is missing in a cache, each rank its share, and see that every rank can read it.

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
    written, done, misses = started, 0, filling.misses
    needed: list[bytes] = []
    try:
        with leaving(KEPT), stage("reference log-probs", misses, shown=world.is_main) as tell:
            for examples, keys in missing_examples(filling):
                needed += keys
                for micro in share(examples, batch.budget, batch.share_prefix, world.data.rank, world.data.size):
                    entries |= split(micro, score(micro.to(world.device)), keys)
                    done += micro.num_examples * world.data.size  # the other ranks have about as many
                    tell(min(done, misses))
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
    unseen = int((~store.has(needed)).sum())
    if any(world.gather_objects(unseen)):
        raise RunError(
            f"{unseen} examples written to {store.directory} cannot be read back: set reference.cache to off"
        )
    text = "reference: %d examples from %s, %d computed now in %.1f s"
    log.info(text, filling.hits, store.directory, misses, time.perf_counter() - started)


def write(store: RefCache, entries: dict[bytes, np.ndarray]) -> None:
    """Put a rank's log-probs into the cache, if it has any."""
    if entries:
        store.write(entries)


def missing_examples(filling: Filling) -> Iterator[tuple[list[TokenExample], list[bytes]]]:
    """Windows of examples that are not in the cache, equal ones once, numbered by place; and their keys."""
    for demand, missing in zip(filling.demands, filling.missing, strict=True):
        of_example = missing.reshape(len(demand.indices), -1)  # itself, and its mismatched one
        for start in range(0, len(demand.indices), WINDOW):
            places = start + np.flatnonzero(of_example[start : start + WINDOW].any(1))
            if len(places) == 0:
                continue
            fetched = parts(demand.dataset.fetch([demand.indices[i] for i in places.tolist()]))
            new = [part for part, wanted in zip(fetched, of_example[places].flat, strict=True) if wanted]
            numbered = [replace(part, example_id=i, mismatched=None) for i, part in enumerate(new)]
            yield numbered, [example_key(part) for part in new]


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
    micro = share(examples, batch.budget, batch.share_prefix, world.data.rank, world.data.size)[0].to(world.device)
    logps, known = score(micro), micro.columns.ref_logps
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
