"""The run directory: who may write into it, and whether a resumed run is the same run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fastalign.config import Config, as_dict
from fastalign.data import cache
from fastalign.disk import free_bytes, open_to_all, readable, write_whole, writing
from fastalign.engine.agree import not_shared, require_same
from fastalign.engine.errors import as_one
from fastalign.engine.output.checkpoints import (
    RUN_STATE,
    Found,
    checkpoints,
    flaw,
    move_later,
    newest_checkpoint,
    point_to_newest,
    read_state,
    reap,
    step_of,
    whole_checkpoints,
)
from fastalign.engine.output.metrics import read_lines, truncate_metrics
from fastalign.models.load import check_target
from fastalign.parallel.mesh import World
from fastalign.words import as_yaml, flatten

log = logging.getLogger(__name__)

FREE = {
    *("run.output_dir", "run.resume", "run.log_every", "run.eval_every", "run.save_every", "run.keep", "run.trackers"),
    *("run.save_minutes", "run.show_example", "run.overwrite_later", "data.cache_dir", "parallel.timeout_minutes"),
    *("run.async_save", "run.shared_disk", "run.keep_best", "model.activation_offloading"),
    *("data.num_proc", "batch.max_group_tokens", "sampler.url"),
}
"""Settings that a resumed run may change: no later number depends on them."""
LAYOUT = {
    *(
        "batch.tokens",
        "batch.share_prefix",
        "parallel.dp_replicate",
        "parallel.dp_shard",
        "parallel.tp",
        "parallel.sequence_parallel",
        "parallel.shard_gradients",
        "parallel.generate",
        "parallel.generate.tp",
        "parallel.generate.dtype",
        "run.deterministic",
    ),
    *("model.attention", "model.on_mismatch", "model.gradient_checkpointing", "reference.cache"),
    *("optim.master_weights", "optim.offload", "optim.in_backward", "reference.offload", "sampler.max_rows"),
}
"""Settings that change how the same sums are computed: later numbers agree to rounding, no longer to the bit."""
HORIZON = {"run.steps", "run.epochs"}
"""How long a run goes on: free when the learning rate does not depend on it."""
PLACES = {
    *("run.output_dir", "run.resume", "data.path", "data.eval_path", "data.cache_dir", "data.chat_template"),
    *("model.path", "model.tokenizer", "reference.path", "reference.cache"),
}
"""Settings that may have another value on another host: what is found there is compared."""

ROUNDED = "results will match the original run only up to floating-point rounding"
LOCK = ".lock"
HOLDER = "running.json"
"""Host, process and start of the run that is writing into a directory; gone when it has ended."""
FILES = ("config.yaml", "metrics.jsonl", "report.html", "trackers.json", "checkpoints/latest", LOCK, HOLDER)
FOLDERS = ("checkpoints", "model")
"""What a run writes, by kind."""


@contextmanager
def held(directory: Path, world: World, *, shared: bool = True) -> Iterator[None]:
    """Keep a run directory for this run alone; the main rank holds it for all, and all must see it if it is ``shared``.

    The operating system lets go of the lock when its process ends, however it ends. Other hosts of a shared
    disk may not see the lock: there the holder's file decides.
    """
    with as_one(world):
        if world.is_main:  # the others make no directory where this one is not
            probe(directory, world.rank)
            check_kinds(directory)
    if shared:
        check_shared(directory, world)
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


def check_shared(directory: Path, world: World) -> None:
    """Refuse a run directory that is not the same for all ranks, or that one cannot write."""
    if split := not_shared(directory, world):
        remedy = "set run.output_dir to an absolute path on a disk that all ranks share, or run.shared_disk to false"
        raise ValueError(f"run.output_dir {directory} is not one directory for all ranks: {split}; {remedy}")
    with as_one(world):
        probe(directory, world.rank)


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


def claim(config: Config, world: World) -> Found | None:
    """Return the checkpoint to resume from, or None for a new run; refuse a directory that cannot be used.

    Nothing in it is changed.
    """
    require_same_settings(config, world)
    found = None
    with as_one(world):
        if world.is_main and (checkpoint := choose(config)):
            found = Found(checkpoint, read_state(checkpoint, **RUN_STATE))
    found = world.gather_objects(found)[0]
    if found is not None and config.run.shared_disk:
        remedy = "name a checkpoint on a disk that all ranks share"
        require_same(world, content(found.path / "state.json"), f"sees another {found.path}", remedy)
    return found


def require_same_settings(config: Config, world: World) -> None:
    """Refuse ranks that were started with different settings."""
    settings = {key: value for key, value in by_key(as_dict(config)).items() if key not in PLACES}
    every = world.gather_objects((settings, socket.gethostname()))
    ours, host = every[0]
    for rank, (theirs, place) in enumerate(every):
        for key in ours | theirs:
            if ours.get(key) != theirs.get(key):
                pair = f"{ours.get(key)!r} for rank 0 on {host}, {theirs.get(key)!r} for rank {rank} on {place}"
                raise ValueError(f"{key} is {pair}: start every rank with the same settings")


def content(file: Path) -> str | None:
    """A hash of a file's bytes; None when there is none."""
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.is_file() else None


def choose(config: Config) -> Path | None:
    """The checkpoint that a run goes on from, its directory and its settings checked; None for a fresh start."""
    directory = Path(config.run.output_dir)
    checkpoint = find_checkpoint(config, directory)
    settings = as_dict(config)
    if config.run.overwrite_later and not config.run.resume:
        log.warning("run.overwrite_later changes nothing: it is about a checkpoint that run.resume goes back to")
    if not config.run.resume or (checkpoint and not is_own(checkpoint, directory)):
        refuse_occupied(directory)
    if checkpoint is not None:
        check_same_run(read_state(checkpoint, **RUN_STATE)["config"], settings, checkpoint)
    elif not config.run.resume and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        log.warning("torchrun may start the ranks again (--max-restarts): set run.resume=auto for them to go on then")
    elif config.run.resume and not config.run.shared_disk:
        told = "resume: no checkpoint in %s on %s: this is a new run, unless rank 0 was on another host before"
        log.warning(told, directory, socket.gethostname())
    metrics = read_lines(directory / "metrics.jsonl")
    lines = sum(record is not None for _, record in metrics)  # all: a broken one is refused before any work
    if not lines and not (checkpoint and is_own(checkpoint, directory)):
        refuse_model(directory)
    check_target(directory / "model", "choose another run.output_dir")
    if lines and not checkpoint and (directory / "config.yaml").exists():
        check_same_run(read_settings(directory), settings, directory)
    return checkpoint


def warn_of_open_places(config: Config, world: World) -> None:
    """Say which directories that are there already every user of this machine could change what a run reads in."""
    places = {"run.output_dir": Path(config.run.output_dir), "data.cache_dir": cache.root(config.data.cache_dir)}
    if config.reference.cache not in ("auto", "off"):
        places["reference.cache"] = Path(config.reference.cache)
    for setting, place in places.items():
        if world.is_main and open_to_all(place):
            log.warning("%s: every user of this machine can write to %s: chmod o-w %s", setting, place, place)


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


def check_kinds(directory: Path) -> None:
    """Refuse a directory where a run's files are directories, or its directories files: it would fail at its save."""
    steps = [path for path in directory.glob("checkpoints/step-*") if re.match(r"step-\d", path.name)]
    wrong = [(directory / name, "directory", "file") for name in FILES if (directory / name).is_dir()]
    folders = [*(directory / name for name in FOLDERS), *steps]
    wrong += [(path, "file", "directory") for path in folders if path.exists() and not path.is_dir()]
    for path, found, meant in wrong:
        raise ValueError(f"{path} is a {found} where a run keeps a {meant}: move it, or choose another run.output_dir")


def find_checkpoint(config: Config, directory: Path) -> Path | None:
    """The checkpoint that ``run.resume`` means: a path, or the newest whole one of the run."""
    if config.run.resume in (True, False, "auto"):
        return newest_checkpoint(directory / "checkpoints", **RUN_STATE) if config.run.resume else None
    path = Path(str(config.run.resume)).absolute()
    step = read_state(path, **RUN_STATE)["step"]
    if reason := flaw(path, **RUN_STATE):
        raise ValueError(f"{path} is not a whole checkpoint: {reason}; resume from another checkpoint")
    later = [p.name for p in whole_checkpoints(path.parent, **RUN_STATE) if step_of(p) > step]
    if later and is_own(path, directory) and not config.run.overwrite_later:
        raise ValueError(
            f"run.resume goes back to {path.name}, and {directory} has later checkpoints ({', '.join(later)}): set "
            "run.overwrite_later=true to move them and their lines of metrics.jsonl to a directory superseded-N there, "
            "or choose another run.output_dir"
        )
    return path


def is_own(checkpoint: Path, directory: Path) -> bool:
    """Whether a checkpoint was made by the run of this directory: it is there, or linked from there to another disk."""
    return (directory / "checkpoints").resolve() in (
        checkpoint.resolve().parent,
        checkpoint.absolute().parent.resolve(),
    )


def refuse_occupied(directory: Path) -> None:
    """A fresh run never writes over another."""
    metrics = directory / "metrics.jsonl"
    if checkpoints(directory / "checkpoints") or (metrics.exists() and metrics.stat().st_size):
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
    before, now = (by_key(as_dict(Config(method=""))) | by_key(x) for x in (old, new))
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)} - FREE
    if new["optim"]["schedule"] == "constant" and not 0 < new["optim"]["warmup"] < 1:
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
        log.warning("resume: %s was %r and is %r: %s", key, before.get(key), now.get(key), ROUNDED)


def by_key(tree: dict[str, Any]) -> dict[str, Any]:
    """The values by dotted keys; tuples as lists, as JSON and YAML have them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flatten(tree) if v != {}}


def make_room(config: Config, need: int, done: int, total: int, world: World) -> None:
    """Remove what interrupted writes left, and refuse a run whose next checkpoint does not fit on the disk.

    A checkpoint has ``need`` bytes; ``done`` of ``total`` steps are behind the run. All ranks call this.
    """
    directory, every = Path(config.run.output_dir) / "checkpoints", config.run.save_every or total
    with as_one(world):
        if world.is_main:
            reap(directory)
            coming = total // every - done // every + (total % every > 0) if done < total else 0
            with writing("checkpoints to", directory, need if coming else 0, "free some space before the run starts"):
                free = free_bytes(directory)
            beside = min(coming, config.run.keep + 1 - min(len(checkpoints(directory)), config.run.keep))
            if free < beside * need:
                text = "%s has room for %d more checkpoint(s) of %s (%s free) and the run will hold %d (run.keep is %d)"
                facts = directory, free // need, readable(need), readable(free), beside, config.run.keep
                log.warning(f"{text}, one of them while it is written: it may stop for lack of space", *facts)


def open_rundir(config: Config, step: int, world: World, checkpoint: Path | None = None) -> int:
    """Leave in the directory exactly what a run goes on from after ``step`` steps.

    Later checkpoints are moved away, later lines of ``metrics.jsonl`` cut off, and ``config.yaml`` is written. Call it
    when the checkpoint has loaded and everything else is ready: whatever fails before must find the directory as it
    was. Returns the step of the last line of ``metrics.jsonl``, 0 without any.
    """
    directory, last = Path(config.run.output_dir), 0
    with as_one(world):
        if world.is_main:
            set_aside(directory, step)
            write_whole(directory / "config.yaml", as_yaml(as_dict(config)), "the settings", "start again")
            last = cut_metrics(directory / "metrics.jsonl", step, checkpoint)
    return world.gather_objects(last)[0]


def set_aside(directory: Path, step: int) -> None:
    """Move checkpoints after a step, and copy their lines of ``metrics.jsonl``, to a new ``superseded-N/``."""
    if not any(step_of(path) > step for path in checkpoints(directory / "checkpoints")):
        point_to_newest(directory / "checkpoints")  # a kill during this has left no ``latest``
        return
    place = next(path for n in count(1) if not (path := directory / f"superseded-{n}").exists())
    with writing("the checkpoints that are left behind", place, then="start again"):
        place.mkdir()
        with (place / "metrics.jsonl").open("wb") as file:
            file.writelines(t for t, r in read_lines(directory / "metrics.jsonl") if r is None or r["step"] > step)
        names = move_later(directory / "checkpoints", step, place / "checkpoints")
    log.warning("resume: %s and the lines of metrics.jsonl after step %d are now in %s", ", ".join(names), step, place)


def cut_metrics(path: Path, step: int, checkpoint: Path | None) -> int:
    """Cut the lines after a step off, say what was or is missing; returns the step of the last line, or 0."""
    kept = truncate_metrics(path, step)
    if kept.was_cut:
        log.warning("resume: the last line of %s was cut short: it is removed", path)
    if kept.dropped:
        log.info("resume: %d line(s) of %s after step %d are removed: these steps come again", kept.dropped, path, step)
    if checkpoint is not None and is_own(checkpoint, path.parent):
        known = step - bool(read_state(checkpoint).get("owed"))  # the line of that step is still to come
        if kept.last < known:
            log.warning("resume: %s has no lines of steps %d to %d: they are missing", path, kept.last + 1, known)
    return kept.last


def read_settings(directory: Path) -> dict[str, Any]:
    """The resolved settings of a run; ValueError with the file's name when it holds none."""
    file = directory / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not YAML ({reason}); fix it, or choose another run.output_dir") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; fix it, or choose another run.output_dir")
    return settings
