"""The checkpoints of a run: which are whole, which is the newest, which make room for a new one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the layout of a checkpoint."""


def newest_checkpoint(directory: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None; later ones that are not whole are named in a warning.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    broken: list[str] = []
    for path in reversed(checkpoints(directory)):
        if not (reason := flaw(path)):
            if broken:
                log.warning("resume: %s: going on from %s", "; ".join(broken), path)
            return path
        broken.append(f"{path.name} is not a whole checkpoint ({reason})")
    if broken:
        remedy = "put back what is missing, or choose another run.output_dir to start afresh"
        raise ValueError(f"cannot resume from {directory}: {'; '.join(broken)}; {remedy}")
    return None


def whole_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that can be resumed from, oldest first."""
    return [path for path in checkpoints(directory) if not flaw(path)]


def checkpoints(directory: Path) -> list[Path]:
    """Directories named as checkpoints, oldest first; what an interrupted write left is not among them."""
    return sorted((p for p in directory.glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def flaw(path: Path) -> str | None:
    """Why a directory is no whole checkpoint: a file of it that is missing, was cut or cannot be read; else None.

    Older checkpoints list their files without sizes, or not at all.
    """
    if not (path / "state.json").is_file():
        return "state.json is missing"
    try:
        state = read_state(path)
    except (ValueError, OSError) as error:
        return str(error).partition(";")[0]
    listed = state.get("files", {})
    if not isinstance(listed, dict | list):
        return "state.json is damaged: expected the files that were written"
    if re.fullmatch(r"step-\d+", path.name) and step_of(path) != state["step"]:
        return f"its state.json is that of step {state['step']}"
    for name in listed:
        if not (path / name).is_file():
            return f"{name} is missing"
        size = (path / name).stat().st_size
        if isinstance(listed, dict) and size != listed[name]:
            return f"{name} has {size} bytes, {listed[name]} were written"
    return None


def read_state(path: Path, **parts: type) -> dict[str, Any]:
    """``state.json`` of a checkpoint, its ``parts`` among the entries with these types.

    Raises:
        ValueError: there is none, it cannot be read, an entry is not there, or it is of another schema.
    """
    file = path / "state.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a whole checkpoint: it has no state.json; name a checkpoints/step-N directory")
    state = read_json(file)
    if not isinstance(state, dict) or "schema" not in state:
        raise ValueError(f"{file} is damaged: expected an object with a schema; resume from another checkpoint")
    if state["schema"] != SCHEMA:
        raise ValueError(f"{path} has checkpoint schema {state['schema']}, this version reads {SCHEMA}")
    for key, kind in {"step": int, "world_size": int, "optimizer_steps": dict, **parts}.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"{file} is damaged: expected a {kind.__name__} {key!r}; resume from another checkpoint")
    return state


def read_json(file: Path) -> Any:
    """The value in a JSON file; ValueError with the file's name when there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON, or the encoding
        raise ValueError(f"{file} is not JSON ({error}); resume from another checkpoint") from error


def reap(directory: Path) -> None:
    """Remove what interrupted writes left."""
    for path in directory.glob("step-*.tmp"):
        delete(path)


def move_later(directory: Path, step: int, place: Path) -> list[str]:
    """Move the checkpoints after a step that a run goes back to, whole or not; returns their names."""
    later = [path for path in checkpoints(directory) if step_of(path) > step]
    if later:
        place.mkdir(parents=True)
        point_to(directory, [path for path in whole_checkpoints(directory) if path not in later][-1:])
    for path in reversed(later):
        move(path, place / path.name)
    return [path.name for path in later]


def move(path: Path, target: Path) -> None:
    """Move a checkpoint, to another disk too; of one that is a link, the link, which still leads where it led."""
    if path.is_symlink():
        target.symlink_to(path.resolve())
        path.unlink()
    else:
        shutil.move(path, target)


def publish(temporary: Path, final: Path, keep: int | None) -> None:
    """Rename a finished checkpoint into place, point ``latest`` at it, remove old ones."""
    if final.exists():  # not whole: a step is saved once
        remove(final)
    temporary.rename(final)
    point_to(final.parent, [final])
    flush_directory(final.parent)
    for old in whole_checkpoints(final.parent)[:-keep] if keep else []:
        remove(old)


def point_to(directory: Path, newest: list[Path]) -> None:
    """Make ``latest`` name the one newest checkpoint, or nothing when there is none."""
    pointer = directory / "latest.tmp"
    pointer.write_text("".join(f"{path.name}\n" for path in newest), encoding="utf-8")
    pointer.replace(directory / "latest") if newest else (directory / "latest").unlink(missing_ok=True)


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


def flush_directory(path: Path) -> None:
    """Force the files of a directory and its entries to the disk."""
    for entry in [*path.iterdir(), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
