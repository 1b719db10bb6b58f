"""The checkpoints of a run: which are whole, which is the newest, which make room for a new one."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.disk import replace_file
from fastalign.engine.output.generators import rng_flaw
from fastalign.engine.output.tensor_files import tensors_flaw

log = logging.getLogger(__name__)

SCHEMA = 2
"""Version of the layout of a checkpoint."""
OTHER_RELEASE = "was written by another release of fastalign"
Layout = Mapping[str, Any]
"""Entries of a JSON object and their types; a mapping for those of an object in it."""
STATE: Layout = {"step": int, "world_size": int, "files": dict, "optimizer_steps": dict}
"""What every ``state.json`` says."""
RUN_STATE: Layout = {
    "config": {"method": str, "model": dict, "data": dict, "optim": dict, "run": dict},
    "loader": {"seed": int, "num_examples": int, "drawn": int},
    "data": str,
    "carried": {"baseline": {"mean": int | float, "count": int | float}},
    "base": str | None,
    "reference": str | None,
    "owed": dict | None,
}
"""What a run adds to that of its checkpoints."""


@dataclass(frozen=True)
class Retention:
    """Which whole checkpoints stay.

    Attributes:
        newest: so many of them; None: all.
        best: the step of one that stays beside them; None: none.
    """

    newest: int | None
    best: int | None = None


class Found(NamedTuple):
    """A whole checkpoint to go on from, and what its ``state.json`` says; read by rank 0 for all."""

    path: Path
    state: dict[str, Any]


def newest_checkpoint(directory: Path, **parts: Any) -> Path | None:
    """The whole checkpoint with the highest step, or None; later ones that are not whole are named in a warning.

    Args:
        directory: the run's ``checkpoints``.
        parts: what their ``state.json`` must say besides `STATE`.
    """
    broken: list[str] = []
    for path in reversed(checkpoints(directory)):
        if not (reason := flaw(path, **parts)):
            if broken:
                log.warning("resume: %s: going on from %s", "; ".join(broken), path)
            return path
        if OTHER_RELEASE in reason:
            read_state(path)  # raises
        broken.append(f"{path.name} is not a whole checkpoint ({reason})")
    if broken:
        remedy = "put back what is missing, or choose another run.output_dir to start a new run"
        raise ValueError(f"cannot resume from {directory}: {'; '.join(broken)}; {remedy}")
    return None


def whole_checkpoints(directory: Path, **parts: Any) -> list[Path]:
    """The checkpoints that can be resumed from, oldest first."""
    return [path for path in checkpoints(directory) if not flaw(path, **parts)]


def checkpoints(directory: Path) -> list[Path]:
    """Directories named as checkpoints, oldest first; what an interrupted write left is not among them."""
    return sorted((p for p in directory.glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def flaw(path: Path, **parts: Any) -> str | None:
    """Why a directory is no whole checkpoint: a part of it that is missing, was cut or cannot be read; else None.

    Numbers inside of tensors are not looked at.
    """
    if not (path / "state.json").is_file():
        return "state.json is missing"
    try:
        state = read_state(path, **parts)
        return files_flaw(path, state) or generators_flaw(path) or tensors_flaw(path, state["optimizer_steps"])
    except (ValueError, OSError) as error:
        return str(error).partition(";")[0]


def files_flaw(path: Path, state: dict[str, Any]) -> str | None:
    """The first file that is not there, not of its size, or there without having been written with the others."""
    listed = state["files"]
    if re.fullmatch(r"step-\d+", path.name) and step_of(path) != state["step"]:
        return f"its state.json is that of step {state['step']}"
    for name, written in listed.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (size := (path / name).stat().st_size) != written:
            return f"{name} has {size} bytes, {written} were written"
    if strangers := sorted({file.name for file in path.glob("*.safetensors")} - listed.keys()):
        return f"{strangers[0]} is not one of its files: move it away"
    ranks = sum(name.startswith("rng-") for name in listed)
    if state["world_size"] != ranks:
        return f"its state.json says world_size {state['world_size']}, and lists generators of {ranks} rank(s)"
    return None


def generators_flaw(path: Path) -> str | None:
    """The first file of a rank's generators that holds none; the list of files says whether all are there."""
    return next((reason for file in sorted(path.glob("rng-*.json")) if (reason := rng_flaw(file))), None)


def read_state(path: Path, **parts: Any) -> dict[str, Any]:
    """``state.json`` of a checkpoint, `STATE` and ``parts`` among its entries."""
    file = path / "state.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a whole checkpoint: it has no state.json; name a checkpoints/step-N directory")
    state = read_json(file)
    if not isinstance(state, dict) or "schema" not in state:
        raise ValueError(f"{file} is damaged: expected an object with a schema; resume from another checkpoint")
    if state["schema"] != SCHEMA:
        raise ValueError(
            f"{path} {OTHER_RELEASE} (checkpoint format {state['schema']}, this one reads {SCHEMA}); finish that run "
            "with the release that wrote it, or start again in another run.output_dir"
        )
    if expected := misfit(state, {**STATE, **parts}):
        raise ValueError(f"{file} is damaged: expected a {expected}; resume from another checkpoint")
    return state


def misfit(values: dict[str, Any], layout: Layout, within: str = "") -> str | None:
    """The type and name of the first entry of a layout that is missing or of another type; None when all fit."""
    for key, kind in layout.items():
        value, inner = values.get(key), isinstance(kind, Mapping)
        if not isinstance(value, dict if inner else kind) or isinstance(value, bool):
            name = "dict" if inner else getattr(kind, "__name__", None) or str(kind).replace(" | ", " or ")
            return f"{name} {within + key!r}"
        if inner and (deeper := misfit(value or {}, kind, f"{within}{key}.")):
            return deeper
    return None


def read_json(file: Path) -> Any:
    """The value in a JSON file; ValueError with the file's name when there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON, or the encoding
        raise ValueError(f"{file} is not JSON ({error}); resume from another checkpoint") from error


def reap(directory: Path) -> None:
    """Remove what interrupted writes left."""
    for path in directory.glob("step-*.tmp"):
        delete(path)


def move_later(directory: Path, step: int, place: Path) -> list[str]:
    """Move the checkpoints after a step that a run goes back to, whole or not; returns their names.

    Meanwhile there is no ``latest``: however this ends, it never names what is not there.
    """
    later = [path for path in checkpoints(directory) if step_of(path) > step]
    if later:
        place.mkdir(parents=True)
        for name in ("latest", "best"):
            (directory / name).unlink(missing_ok=True)
        for path in reversed(later):  # of what is left, the newest is always the one that a kill leaves to go on from
            move(path, place / path.name)
        point_to_newest(directory)
    return [path.name for path in later]


def move(path: Path, target: Path) -> None:
    """Move a checkpoint, to another disk too; of one that is a link, the link, which still leads where it led."""
    if path.is_symlink():
        target.symlink_to(path.resolve())
        path.unlink()
    else:
        shutil.move(path, target)


def publish(temporary: Path, final: Path, retention: Retention) -> None:
    """Rename a finished checkpoint into place, point ``latest`` at it, remove those that need not stay."""
    if final.exists():  # not whole: a step is saved once
        remove(final)
    temporary.rename(final)
    point_to(final)
    parts = {key: kind for key, kind in RUN_STATE.items() if key in read_state(final)}
    for old in whole_checkpoints(final.parent, **parts)[: -retention.newest] if retention.newest else []:
        if step_of(old) != retention.best:
            remove(old)


def mark_best(directory: Path, step: int) -> None:
    """Make ``best`` name the checkpoint of a step."""
    point_to(directory / f"step-{step}", "best")


def point_to_newest(directory: Path) -> None:
    """Make ``latest`` name the newest whole checkpoint, if it does not; where there is none, no ``latest`` stays."""
    newest, latest = whole_checkpoints(directory, **RUN_STATE)[-1:], directory / "latest"
    if not newest:
        latest.unlink(missing_ok=True)
    elif not latest.is_file() or latest.read_text(encoding="utf-8", errors="replace") != f"{newest[0].name}\n":
        point_to(newest[0])


def point_to(checkpoint: Path, name: str = "latest") -> None:
    """Make a file name a checkpoint beside it."""
    replace_file(checkpoint.with_name(name), f"{checkpoint.name}\n".encode(), flushed=True)


def remove(path: Path) -> None:
    """Delete a checkpoint; under another name first, so that a crash half-way leaves nothing that looks whole."""
    doomed = path.with_name(path.name + ".old.tmp")  # step-N.tmp is a new one that is being written
    if doomed.exists():
        delete(doomed)
    path.rename(doomed)
    delete(doomed)


def delete(path: Path) -> None:
    """Delete a directory, or the link to one that was moved to another disk."""
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
