"""Checkpoints: written whole or not at all, safetensors and JSON only, resumed to the bit.

``checkpoints/step-N/`` holds weights, fp32 masters and Adam moments of all ranks (``torch.distributed.checkpoint`` in
safetensors), ``state.json`` (step, data position, settings, versions) and ``rng-R.json`` of each rank. It is written as
``step-N.tmp`` and renamed when every byte is on the disk. Nothing here is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import platform
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fastalign.data.disk import reason, writing
from fastalign.engine.errors import RunError, as_one
from fastalign.engine.optim import AdamW
from fastalign.engine.optim_state import has_masters, in_both, make_moments, moments, optimizer_steps
from fastalign.parallel.mesh import World

SCHEMA = 1
"""Version of the layout of a checkpoint."""
FILES = 16
"""A rank's tensors go into about so many files: writing takes twice the memory of one of them."""
FILE_BYTES = (1 << 20, 1 << 30)
"""The least and the most that a file is meant to hold; a larger tensor is a file of its own."""


def save_checkpoint(
    directory: Path,
    step: int,
    policy: nn.Module,
    optimizer: AdamW,
    state: dict[str, Any],
    world: World,
    keep: int,
) -> Path:
    """Write ``directory/step-N`` from all ranks and keep the newest ``keep``.

    Args:
        directory: the run's ``checkpoints``.
        step: optimizer steps done.
        policy, optimizer: plain or sharded.
        state: JSON values to find again: data position, settings.
        world: the ranks.
        keep: whole checkpoints that stay.

    Raises:
        RunError: on every rank, when any rank could not write.
    """
    final, temporary = directory / f"step-{step}", directory / f"step-{step}.tmp"
    tensors = {**weights(policy), **moments(policy, optimizer)}
    try:
        with as_one(world):
            if world.is_main:
                make_scratch(temporary, tensors)
        write_tensors(temporary, tensors, world)
        with as_one(world), writing("the checkpoint", final):
            (temporary / f"rng-{world.rank}.json").write_text(json.dumps(rng_state()), encoding="utf-8")
        with as_one(world), writing("the checkpoint", final):
            if world.is_main:
                header = {"schema": SCHEMA, "step": step, "world_size": world.size, "versions": versions()}
                files = sorted(file.name for file in temporary.glob("*.safetensors"))
                full = {**header, "files": files, "optimizer_steps": optimizer_steps(policy, optimizer), **state}
                (temporary / "state.json").write_text(json.dumps(full, indent=1), encoding="utf-8")
            flush_directory(temporary)
        with as_one(world), writing("the checkpoint", final):
            if world.is_main:
                publish(temporary, final, keep)
    except RunError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        rest = "; earlier checkpoints are intact" if whole_checkpoints(directory) else ""
        raise RunError(f"{error}{rest}") from error
    return final


def make_scratch(temporary: Path, tensors: dict[str, Tensor]) -> None:
    """An empty directory for a checkpoint, where there is plainly room for one."""
    shutil.rmtree(temporary, ignore_errors=True)
    with writing("the checkpoint", temporary.with_suffix(""), need_on_this_host(tensors)):
        temporary.mkdir(parents=True)


def need_on_this_host(tensors: dict[str, Tensor]) -> int:
    """Bytes that the ranks of this host write: replicas are written once, by ranks in turns."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return sum(x.nbytes for x in tensors.values()) * int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) // ranks


def load_checkpoint(path: Path, policy: nn.Module, optimizer: AdamW, world: World) -> dict[str, Any]:
    """Restore weights, masters, Adam moments and this rank's generators in place; returns what ``state.json`` says.

    A checkpoint without masters has them start from its weights; those of one with masters may be left out.

    Raises:
        ValueError: the checkpoint is damaged, or of another model, with the first difference.
    """
    state = read_state(path)
    check_files(path, state.get("files", []))
    make_moments(policy, optimizer, state["optimizer_steps"])
    tensors = {**weights(policy), **moments(policy, optimizer)}
    reader = HuggingFaceStorageReader(str(path))
    try:
        tensors, saved = in_both(tensors, saved_shapes(reader))
        check_shapes(path, tensors, saved)
        with alone_is_fine():
            load(tensors, storage_reader=reader, no_dist=world.mesh is None)
    except (SafetensorError, CheckpointException) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); resume from another checkpoint") from error
    if optimizer.masters and not has_masters(tensors):
        optimizer.start_masters()
    restore_generators(path / f"rng-{world.rank}.json")
    return state


def check_files(path: Path, names: list[str]) -> None:
    """Refuse a checkpoint that lost files of tensors."""
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} is incomplete: {', '.join(missing)} is missing; resume from another checkpoint")


def restore_generators(file: Path) -> None:
    """Set this process's generators from a file, if the rank had one."""
    if not file.exists():
        return
    try:
        set_rng_state(read_json(file))
    except (KeyError, TypeError, AttributeError, RuntimeError, binascii.Error) as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}); resume from another checkpoint") from error


def newest_checkpoint(directory: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None."""
    return max(whole_checkpoints(directory), key=step_of, default=None)


def whole_checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints, oldest first; what a crash left behind is not among them."""
    found = [p for p in directory.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "state.json").is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def reap(directory: Path, after: int | None = None) -> None:
    """Remove what interrupted writes left, and the checkpoints after a step that a run goes back to."""
    for path in directory.glob("step-*.tmp"):
        shutil.rmtree(path)
    later = [path for path in whole_checkpoints(directory) if after is not None and step_of(path) > after]
    if later:
        point_to(directory, [path for path in whole_checkpoints(directory) if path not in later][-1:])
    for path in reversed(later):
        remove(path)


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


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def weights(policy: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and saved buffers by name, tied ones once; the live tensors, not copies.

    What is frozen is loaded again from where it came from.
    """
    kept = {name for name, p in policy.named_parameters() if p.requires_grad}
    kept |= {name for name, _ in policy.named_buffers()}
    return {f"model.{name}": x for name, x in policy.state_dict().items() if name in kept}


def tied_names(policy: nn.Module) -> set[str]:
    """Second and further names of shared parameters."""
    every = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in policy.named_parameters()}


def saved_shapes(reader: HuggingFaceStorageReader) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor of a checkpoint."""
    saved = reader.read_metadata().state_dict_metadata
    return {name: tuple(x.size) for name, x in saved.items() if isinstance(x, TensorStorageMetadata)}


def check_shapes(path: Path, mine: dict[str, Tensor], saved: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose tensors are not this model's."""
    for name in sorted(mine.keys() | saved.keys()):
        here = tuple(mine[name].shape) if name in mine else "absent"
        there = saved.get(name, "absent")
        if here != there:
            raise ValueError(
                f"{path} is of another model: {name} is {there} there and {here} here; resume with its model"
            )


def write_tensors(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Every rank writes its shards, safetensors with the offsets of each in the header."""
    files = assign_files({name: x.nbytes for name, x in tensors.items()})
    try:
        with alone_is_fine():
            save(
                {name: x.detach() for name, x in tensors.items()},
                storage_writer=HuggingFaceStorageWriter(str(path), files, save_distributed=True),
                no_dist=world.mesh is None,
            )
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        with as_one(world):
            if world.is_main:
                shutil.rmtree(path, ignore_errors=True)  # before the free space is told
        why = reason(cause, path, need_on_this_host(tensors))
        whose = f" on rank {rank}" if world.size > 1 else ""
        raise RunError(f"cannot write the checkpoint {path.with_suffix('')}{whose}: {why}") from error


def assign_files(sizes: dict[str, int]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to: runs of whole tensors, filled in order.

    Args:
        sizes: bytes of each tensor over all ranks.

    Example:
        >>> assign_files({"a": 3 << 20, "b": 1 << 19, "c": 1 << 19, "d": 1})
        {'a': 1, 'b': 2, 'c': 2, 'd': 3}
    """
    least, most = FILE_BYTES
    limit = min(max(sum(sizes.values()) // FILES, least), most)
    files, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            number, filled = number + 1, 0
        files[name] = number
        filled += size
    return files


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """Keep torch.distributed.checkpoint from warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def flush_directory(path: Path) -> None:
    """Force the files of a directory and its entries to the disk."""
    for entry in [*path.iterdir(), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def publish(temporary: Path, final: Path, keep: int) -> None:
    """Rename a finished checkpoint into place, point ``latest`` at it, remove old ones."""
    if final.exists():
        remove(final)
    temporary.rename(final)
    point_to(final.parent, [final])
    flush_directory(final.parent)
    for old in whole_checkpoints(final.parent)[:-keep]:
        remove(old)


def point_to(directory: Path, newest: list[Path]) -> None:
    """Make ``latest`` name the one newest checkpoint, or nothing when there is none."""
    pointer = directory / "latest.tmp"
    pointer.write_text("".join(f"{path.name}\n" for path in newest), encoding="utf-8")
    pointer.replace(directory / "latest") if newest else (directory / "latest").unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a checkpoint; under another name first, so that a crash half-way leaves nothing that looks whole."""
    doomed = path.with_name(path.name + ".tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process, as JSON values."""
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    version, numbers, gauss = random.getstate()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "torch": encode(torch.get_rng_state()),
        "cuda": None if device is None else encode(device),
        "python": [version, list(numbers), gauss],
        "numpy": {**generator, "state": {k: np.asarray(v).tolist() for k, v in generator["state"].items()}},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of ``rng_state``."""
    torch.set_rng_state(decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(decode(state["cuda"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})


def encode(state: Tensor) -> str:
    """A uint8 tensor as base64."""
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decode(text: str) -> Tensor:
    """The inverse of ``encode``."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def versions() -> dict[str, str]:
    """What made the checkpoint."""
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
