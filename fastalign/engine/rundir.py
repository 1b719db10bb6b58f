"""The run directory: who may write into it, and whether a resumed run is the same run."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fastalign.config import Config
from fastalign.data.disk import write_whole
from fastalign.engine.checkpoint import newest_checkpoint, read_state, reap
from fastalign.engine.errors import as_one
from fastalign.engine.metrics import read_metrics, truncate_metrics
from fastalign.models.load import check_target
from fastalign.parallel.mesh import World

log = logging.getLogger(__name__)

FREE = {
    *("run.output_dir", "run.resume", "run.log_every", "run.eval_every", "run.save_every", "run.keep", "run.trackers"),
    *("run.save_minutes", "run.show_example", "data.cache_dir"),
}
"""Settings that a resumed run may change: no later number depends on them."""
LAYOUT = {
    *("batch.tokens", "batch.share_prefix", "parallel.dp_replicate", "parallel.dp_shard", "run.deterministic"),
    *("model.attention", "model.on_mismatch", "model.gradient_checkpointing", "reference.cache"),
    "optim.master_weights",
}
"""Settings that change how the same sums are computed: later numbers agree to rounding, no longer to the bit."""
RUN_STATE = {"config": dict, "loader": dict, "data": str, "carried": dict}
"""What a run adds to the ``state.json`` of its checkpoints."""
HORIZON = {"run.steps", "run.epochs"}
"""How long a run goes on: free when the learning rate does not depend on it."""


LOCK = ".lock"
HOLDER = "running.json"
"""Host, process and start of the run that is writing into a directory; gone when it has ended."""


@contextmanager
def held(directory: Path, world: World) -> Iterator[None]:
    """Keep a run directory for this run alone; the main rank holds it for all.

    The operating system lets go of the lock when its process ends, however it ends. Whether it tells other hosts of a
    shared disk depends on the disk: there the holder's file decides.

    Raises:
        RunError: on every rank, when another process holds it.
        OSError: it cannot be written.
    """
    probe(directory, world.rank)
    lock = FileLock(directory / LOCK)
    with as_one(world):
        if world.is_main:
            take(lock, directory)
    try:
        yield
    finally:
        if lock.is_locked:
            for name in (HOLDER, LOCK):  # while they are still ours
                (directory / name).unlink(missing_ok=True)
            lock.release()


def take(lock: FileLock, directory: Path) -> None:
    """Lock a directory and say so in it, or refuse with the name of the holder."""
    file, remedy = directory / HOLDER, "wait for it to end, or choose another run.output_dir"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = read_holder(file)
        raise ValueError(
            f"run.output_dir {directory} is in use by {holder.get('text', 'another run')}; {remedy}"
        ) from error
    holder = read_holder(file)
    if holder and holder["host"] != socket.gethostname():
        lock.release()
        remedy += f"; if that process is dead, remove {file}"
        raise ValueError(f"run.output_dir {directory} is in use by {holder['text']}; {remedy}")
    if holder:
        log.warning("%s was left by %s, which is gone: taking over", directory, holder["text"])
    now = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat(" ", "seconds")}
    try:
        write_whole(file, json.dumps(now) + "\n", "the holder of the run directory")
    except OSError as error:  # the disk is full, perhaps of what this run will clear away
        log.warning("%s; going on", error)


def read_holder(file: Path) -> dict[str, Any]:
    """What a ``running.json`` says, with a ``text`` of it all; empty when there is none."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return {**holder, "text": f"process {holder['pid']} on {holder['host']} since {holder['since']}"}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def claim(config: Config, world: World) -> Path | None:
    """Find out whether the run directory can be used, or refuse before any work; nothing in it is changed.

    Returns:
        the checkpoint to resume from; None for a fresh start.

    Raises:
        ValueError: the directory holds another run, or the run to resume had other settings.
    """
    directory = Path(config.run.output_dir)
    checkpoint = find_checkpoint(config, directory)
    settings = asdict(config)
    if not config.run.resume or (checkpoint and not is_own(checkpoint, directory)):
        refuse_occupied(directory)
    if checkpoint is not None:
        check_same_run(read_state(checkpoint, **RUN_STATE)["config"], settings, checkpoint)
    lines = read_metrics(directory / "metrics.jsonl")  # a broken line is refused now: later it is cut
    if not lines and not (checkpoint and is_own(checkpoint, directory)):
        refuse_model(directory)
    check_target(directory / "model", "choose another run.output_dir")
    if lines and not checkpoint and (directory / "config.yaml").exists():
        check_same_run(read_settings(directory), settings, directory)
    world.barrier()
    return checkpoint


def probe(directory: Path, rank: int) -> None:
    """Fail now rather than after an hour if the directory cannot be written."""
    file = directory / f".writable-{rank}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to run.output_dir {directory}: {error.strerror}; name a directory that can be made"
        ) from error


def find_checkpoint(config: Config, directory: Path) -> Path | None:
    """The checkpoint that ``run.resume`` means: a path, or the newest of the run."""
    if isinstance(config.run.resume, str):
        return Path(config.run.resume)
    return newest_checkpoint(directory / "checkpoints") if config.run.resume else None


def is_own(checkpoint: Path, directory: Path) -> bool:
    """Whether a checkpoint was made by the run of this directory."""
    return checkpoint.resolve().parent == (directory / "checkpoints").resolve()


def refuse_occupied(directory: Path) -> None:
    """A fresh run never writes over another."""
    metrics = directory / "metrics.jsonl"
    if newest_checkpoint(directory / "checkpoints") or (metrics.exists() and metrics.stat().st_size):
        raise ValueError(
            f"{directory} already holds a run: continue it with run.resume=true, or choose another run.output_dir"
        )


def refuse_model(directory: Path) -> None:
    """A run never writes its model over one that is not its own."""
    if (model := directory / "model").exists():
        raise ValueError(
            f"{model} is there, and of no run that left checkpoints or metrics: it would be replaced; "
            "move it, or choose another run.output_dir"
        )


def check_same_run(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    """Refuse to resume under settings that would make it another run, naming them."""
    # A setting that the older run did not know had its default there.
    before, now = (dict(flatten(asdict(Config(method="")))) | dict(flatten(x)) for x in (old, new))
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)} - FREE
    if horizon_is_free(new["optim"]):
        changed -= HORIZON
    fatal = sorted(changed - LAYOUT)
    if fatal:
        pairs = ", ".join(f"{key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in fatal)
        hint = (
            "; a schedule that ends cannot be extended: use optim.schedule=constant for that"
            if set(fatal) <= HORIZON
            else ""
        )
        raise ValueError(
            f"cannot resume {where} with other settings ({pairs}){hint}; restore them, or choose another run.output_dir"
        )
    for key in sorted(changed):
        log.warning("resume: %s was %r and is %r: numbers agree to rounding only", key, before.get(key), now.get(key))


def horizon_is_free(optim: dict[str, Any]) -> bool:
    """Whether the learning rate of a step is the same however many steps follow."""
    return optim["schedule"] == "constant" and not 0 < optim["warmup"] < 1


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; tuples as lists, as JSON and YAML have them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def prepare(config: Config, step: int, world: World) -> int:
    """Leave in the directory exactly what a run goes on from after ``step`` steps.

    Later checkpoints and lines of ``metrics.jsonl`` go, and ``config.yaml`` is written: call it when the checkpoint has
    loaded and everything else is ready, for whatever fails before must find the directory as it was.

    Returns:
        the step of the last line of ``metrics.jsonl``, 0 without any; the same on every rank.
    """
    directory, last = Path(config.run.output_dir), 0
    with as_one(world):
        if world.is_main:
            reap(directory / "checkpoints", after=step)  # first, for the room that it makes
            settings = yaml.safe_dump(plain(asdict(config)), sort_keys=False)
            write_whole(directory / "config.yaml", settings, "the settings", "start again")
            last = truncate_metrics(directory / "metrics.jsonl", step)
    return world.gather_objects(last)[0]


def read_settings(directory: Path) -> dict[str, Any]:
    """The resolved settings of a run; ValueError with the file's name when it holds none."""
    file = directory / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not YAML ({reason}); mend it, or choose another run.output_dir") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; mend it, or choose another run.output_dir")
    return settings


def plain(value: Any) -> Any:
    """Settings without tuples, which YAML would tag."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
