"""Checkpoints: written whole or not at all, safetensors and JSON only, resumed to the bit.

``checkpoints/step-N/`` holds weights, fp32 masters and Adam moments of all ranks (``torch.distributed.checkpoint`` in
safetensors), ``state.json`` (step, data position, settings, versions, the files with their sizes) and ``rng-R.json`` of
each rank. It is written as ``step-N.tmp`` and renamed when every byte is on the disk. Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from fastalign.config import OptimConfig
from fastalign.disk import WriteError, flush, reason, writing
from fastalign.engine.eight_bit import BYTES, can_be_coded
from fastalign.engine.errors import RunError, as_one
from fastalign.engine.output.checkpoints import (
    Retention,
    flaw,
    publish,
    read_json,
    read_state,
    whole_checkpoints,
)
from fastalign.engine.output.generators import DAMAGED, one_line, rng_file, set_rng_state
from fastalign.engine.output.snapshot import Snapshot, size_of, take_snapshot
from fastalign.engine.output.trained_state import (
    Roles,
    in_both,
    make_moments,
    start_masters,
    tensors_of,
    weights,
)
from fastalign.models.precision import HALF
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import region

log = logging.getLogger(__name__)

FILES = 16
"""A rank's tensors go into about so many files: writing takes twice the memory of one of them."""
FILE_BYTES = (1 << 20, 1 << 30)
"""The least and the most that a file is meant to hold; a larger tensor is a file of its own."""


def save_checkpoint(
    directory: Path,
    step: int,
    trained: Roles,
    state: dict[str, Any],
    world: World,
    keep: int | None,
) -> Path:
    """`write_checkpoint` of what there is now, of which the newest ``keep`` stay."""
    return write_checkpoint(directory, take_snapshot(step, trained, state, world), world, Retention(keep))


def write_checkpoint(directory: Path, snapshot: Snapshot, world: World, retention: Retention) -> Path:
    """Write ``directory/step-N`` from all ranks and remove those that the retention lets go.

    Args:
        directory: the run's ``checkpoints``.
        snapshot: what it holds.
        world: the ranks that write.
        retention: which whole checkpoints stay.
    """
    final, temporary = directory / f"step-{snapshot.step}", directory / f"step-{snapshot.step}.tmp"
    tensors = snapshot.tensors
    try:
        with as_one(world):
            if world.is_main:
                make_scratch(temporary, tensors)
        write_tensors(temporary, tensors, world)
        with as_one(world), writing("the checkpoint", final):
            for rank, generators in snapshot.generators.items():
                rng_file(temporary, rank).write_text(json.dumps(generators), encoding="utf-8")
        with as_one(world), writing("the checkpoint", final):
            if world.is_main:
                full = {**snapshot.state, "files": written_files(temporary, snapshot)}
                (temporary / "state.json").write_text(json.dumps(full, indent=1), encoding="utf-8")
            flush(temporary, inside=True)
        with as_one(world), writing("the checkpoint", final):
            if world.is_main:
                publish(temporary, final, retention)
    except RunError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        rest = "; earlier checkpoints are intact" if whole_checkpoints(directory) else ""
        raise RunError(f"{error}{rest}") from error
    return final


def make_scratch(temporary: Path, tensors: dict[str, Tensor]) -> None:
    """An empty directory for a checkpoint, where there is plainly room for one."""
    shutil.rmtree(temporary, ignore_errors=True)
    with writing("the checkpoint", temporary.with_suffix(""), size_of(tensors)):
        temporary.mkdir(parents=True)


def expected_size(modules: Sequence[nn.Module], optim: OptimConfig, copies: Sequence[nn.Module] = ()) -> int:
    """Bytes of the tensors in a checkpoint before any step: weights, masters and Adam moments of what trains.

    Of ``copies``, such as a reference that follows the policy, only the weights are kept.
    """
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    kept = sum(size_of(weights(module)) for module in (*modules, *copies))
    return kept + round(sum(bytes_beside(p, optim) for p in trained))


def bytes_beside(weight: Tensor, optim: OptimConfig) -> float:
    """What a checkpoint holds beside a trained weight: its master, moments and what rounding has left."""
    on_host, half = optim.offload and weight.is_cuda, weight.dtype in HALF
    master = 4 * (optim.master_weights is True and (half or on_host))
    moment = BYTES if optim.name == "adamw_8bit" and can_be_coded(weight) else master or weight.element_size()
    left = weight.element_size() * (half and optim.master_weights == "compensated")
    return weight.numel() * (master + 2 * moment + left)


def written_files(temporary: Path, snapshot: Snapshot) -> dict[str, int]:
    """The files of tensors and generators and their bytes, as ``state.json`` lists them."""
    ranks = snapshot.state["world_size"]
    sizes = {file.name: file.stat().st_size for file in sorted(temporary.glob("*.safetensors"))}
    generators = [file for rank in range(ranks) if (file := rng_file(temporary, rank)).is_file()]
    text = None
    if sum(sizes.values()) < snapshot.size:
        text = f"rank 0 sees {sum(sizes.values())} of at least {snapshot.size} bytes: does every rank write there?"
    elif len(generators) < ranks:
        text = f"rank 0 sees the generators of {len(generators)} of {ranks} ranks: does every rank write there?"
    if text:
        raise WriteError(f"cannot write the checkpoint {temporary.with_suffix('')}: {text}")
    return sizes | {file.name: file.stat().st_size for file in generators}


def load_checkpoint(path: Path, trained: Roles, world: World, *, shared: bool = True) -> dict[str, Any]:
    """Restore weights, masters, Adam moments and this rank's generators in place; returns what ``state.json`` says.

    A checkpoint without masters has them start from its weights; those of one with masters may be left out.

    Args:
        path: the checkpoint.
        trained: the modules that train and their optimizers, by role, on any number of ranks.
        world: the ranks.
        shared: all ranks can read it; otherwise rank 0 reads for all.
    """
    with as_one(world) if not shared else nullcontext():
        reads = shared or world.is_main
        state, saved = read_whole(path) if reads else ({}, {})
    if not shared:
        state, saved = world.gather_objects((state, saved))[0]
    make_moments(trained, state["optimizer_steps"])
    tensors, saved = in_both(tensors_of(trained), saved)
    check_shapes(path, tensors, saved)
    if shared:
        read_tensors(path, tensors, world)
    else:
        read_for_all(path, tensors, world)
    start_masters(trained, tensors)
    restore_generators(path, state["world_size"], world, shared)
    return state


def read_whole(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """``state.json`` of a whole checkpoint, and the whole shape of each of its tensors."""
    state = read_state(path)
    if reason := flaw(path):
        raise ValueError(f"{path} is not a whole checkpoint: {reason}; resume from another checkpoint")
    with intact(path):
        return state, saved_shapes(path)


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Turn what reading damaged tensors raises into one line."""
    try:
        yield
    except (SafetensorError, CheckpointException) as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}); resume from another checkpoint") from error


def read_tensors(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fill tensors, of sharded ones this rank's part, however they were sharded when they were saved."""
    with intact(path), alone_is_fine():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=world.mesh is None)


@torch.no_grad()
def read_for_all(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """`read_tensors` by rank 0, which sends one tensor after the other to the other ranks."""
    for name, x in tensors.items():
        whole = torch.empty(x.shape, dtype=x.dtype)
        with as_one(world):
            if world.is_main:
                read_tensors(path, {name: whole}, world.alone)
        part = world.broadcast(whole)[region(x)] if x.dim() else world.broadcast(whole)
        (x.to_local() if isinstance(x, DTensor) else x).copy_(part)


def restore_generators(path: Path, ranks: int, world: World, shared: bool) -> None:
    """Set this process's generators to those of its rank; one more than there were keeps those of ``run.seed``."""
    file, state = rng_file(path, world.rank), None
    if not shared:
        there = {rank: read_json(rng_file(path, rank)) for rank in range(ranks)} if world.is_main else {}
        state = world.gather_objects(there)[0].get(world.rank)
    elif world.rank < ranks:
        state = read_json(file)
    try:
        set_rng_state(state) if state is not None else None
    except DAMAGED as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}); resume from another checkpoint") from error


def saved_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor of a checkpoint."""
    saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
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
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(path), files, save_distributed=True),
                process_group=world.group,
                no_dist=world.mesh is None,
            )
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        with as_one(world):
            if world.is_main:
                shutil.rmtree(path, ignore_errors=True)  # before the free space is measured
        why = reason(cause, path, size_of(tensors))
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
