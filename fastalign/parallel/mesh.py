"""The ranks of a run: process group, device and the (dp_replicate, dp_shard, tp) mesh, from torchrun's environment.

Neighbouring ranks share a copy of each weight's part in a layer (tensor parallelism) and get the same batches; the
ranks with equal tensor rank, one of each such group, get different ones (data parallelism). For 8 ranks with
dp_replicate 2, dp_shard 2 and tp 2:

                 dp_shard 0   dp_shard 1
    replicate 0     0  1         2  3         data ranks 0, 1
    replicate 1     4  5         6  7         data ranks 2, 3
                   tp 0 1       tp 0 1
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from fastalign.config import ParallelConfig
from fastalign.parallel.waiting import sharing_cores
from fastalign.parallel.whereabouts import GRACE, Watch, waited

JOIN_SECONDS = 0.02
"""Between two looks of a rank whether rank 0 has seen it."""
LAST_WORK_SECONDS = 0.2
"""How long a rank leaves the interpreter lock to gloo's threads before it may exit.

They take it to drop the tensors of their last collective, and FSDP's caches keep them alive past
``destroy_process_group``. One that asks for the lock while the interpreter shuts down aborts the process.
"""


class LostRank(ConnectionError):
    """Another rank has ended, and the collective that waits for it has failed."""


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as a rank sees it: whoever deals batches, sums or gathers names the axis he means.

    Attributes:
        rank, size: this rank's place, and how many there are.
        group: their process group; None where there is one process, which needs no collective.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over the axis, in place when there is more than one rank."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest of ``values`` over the axis, in place when there is more than one rank."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def gather(self, values: Sequence[float]) -> Tensor:
        """``[size, n]`` fp64 on the host: a few numbers of every rank, without touching the device."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.group is None:
            return mine[None]
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        return torch.stack(everyone)


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks.

    Attributes:
        data: the axis over which batches are dealt; its ranks have different examples.
        device: where this rank computes.
        mesh: ``(dp_replicate, dp_shard, tp)``; None for a single process.
        tensor: the axis over which layers are cut, whose ranks have the same examples; None where tp is 1.
        group: of all ranks, for what is exchanged on the host; None: the default one.
        watch: knows where the other ranks are; None for a single process.
    """

    data: Axis
    device: torch.device
    mesh: DeviceMesh | None = None
    tensor: Axis | None = None
    group: dist.ProcessGroup | None = None
    watch: Watch | None = None

    def beside(self, minutes: float) -> World:
        """The same ranks with a group of their own, whose exchanges a thread may have beside those of the run."""
        if self.mesh is None:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes)))

    def split(self, tp: int, minutes: float) -> World:
        """The same ranks with another tensor axis, of ``tp`` neighbours each: a layout for a copy of a model.

        All ranks must call it.

        Raises:
            ValueError: there are not so many ranks, or they do not divide into such groups.
        """
        if self.size % tp:
            raise ValueError(f"parallel.generate: tp {tp} does not divide the {self.size} rank(s) launched")
        if self.tensor is not None and self.tensor.size == tp:
            return self
        mesh, data, tensor = make_mesh(self.device, (1, self.size // tp, tp), minutes)
        return replace(self, mesh=mesh, data=data, tensor=tensor)

    @property
    def alone(self) -> World:
        """This rank as if there were no others."""
        return World(Axis(), self.device)

    @property
    def rank(self) -> int:
        """Among all ranks; neighbours are those of the tensor axis."""
        return self.data.rank if self.tensor is None else self.data.rank * self.tensor.size + self.tensor.rank

    @property
    def size(self) -> int:
        """Of all ranks."""
        return self.data.size * (1 if self.tensor is None else self.tensor.size)

    @cached_property
    def data_mesh(self) -> DeviceMesh | None:
        """``(dp_replicate, dp_shard)``, over which FSDP shards; None for a single process.

        One replica has no dimension of its own: FSDP would all-reduce every gradient over that one rank.
        """
        if self.mesh is None:
            return None
        return self.mesh["dp_shard"] if self.mesh.size(0) == 1 else self.mesh["dp_replicate", "dp_shard"]

    @property
    def everyone(self) -> Axis:
        """All ranks as one axis, in the order of `rank`."""
        return Axis(self.rank, self.size, None if self.mesh is None else self.group or dist.group.WORLD)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the console."""
        return self.rank == 0

    def gather_objects(self, value: object) -> list:
        """A small object of every rank; for error messages, not for the hot path."""
        everyone: list = [value] * self.size
        if self.mesh is not None:
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def broadcast(self, values: Tensor) -> Tensor:
        """``values`` of the main rank, on the host, put into those of every other rank."""
        if self.mesh is not None:
            dist.broadcast(values, 0, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.mesh is not None:
            dist.barrier(group=self.group)


@contextmanager
def world(parallel: ParallelConfig) -> Iterator[World]:
    """Join the other ranks for the length of a run: gloo on CPU, nccl on CUDA.

    Raises:
        ValueError: when the mesh asked for does not have as many ranks as were launched.
        TimeoutError: when this rank has waited ``parallel.timeout_minutes`` for another.
        LostRank: when another rank has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shape = mesh_shape(parallel, size)
    device = local_device()
    if size == 1:
        with sharing_cores():
            yield World(Axis(), device)
        return
    timeout = patience(device, parallel.timeout_minutes)
    with failures_as_one_line(parallel.timeout_minutes):
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        backend, store = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", of_this_launch(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        watch = Watch(dist.get_rank(), size, parallel.timeout_minutes)
        try:
            mesh, data, tensor = make_mesh(device, shape, parallel.timeout_minutes)
            with sharing_cores(), failures_as_one_line(parallel.timeout_minutes, watch):
                yield World(data, device, mesh, tensor, watch=watch)
        finally:
            watch.close()
            dist.destroy_process_group()
            time.sleep(LAST_WORK_SECONDS)


def of_this_launch(store: Store, rank: int, size: int) -> Store:
    """The part of a store that ranks of an earlier launch have left nothing in.

    torchrun starts ranks again with the store of those before, where the addresses of these still stand. Rank 0 names
    the launch; a name counts once rank 0 has read under it what this process has written.
    """
    mine, deadline = secrets.token_hex(8), time.monotonic() + store.timeout.total_seconds()  # pyright: ignore
    if rank == 0:
        store.set("launch", mine)
        store.set(f"{mine}/ranks", " ".join(store.get(f"{mine}/{other}").decode() for other in range(1, size)))
        return PrefixStore(mine, store)
    while time.monotonic() < deadline:
        launch = store.get("launch").decode()
        store.set(f"{launch}/{rank}", mine)
        if store.check([f"{launch}/ranks"]) and mine.encode() in store.get(f"{launch}/ranks"):
            return PrefixStore(launch, store)
        time.sleep(JOIN_SECONDS)
    raise RuntimeError("timed out: rank 0 has not come")


def patience(device: torch.device, minutes: float) -> timedelta:
    """How long a collective may wait."""
    grace = 2 * GRACE if device.type == "cuda" else 0  # nccl ends the process then: ours is to say more before
    return timedelta(minutes=minutes, seconds=grace)


def make_mesh(
    device: torch.device, shape: tuple[int, int, int], minutes: float
) -> tuple[DeviceMesh, Axis, Axis | None]:
    """A mesh of all ranks and its axes; its groups wait as long as that of all ranks."""
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    data, tensor = axes_of(mesh)
    groups = (*mesh.get_all_groups(), data.group, tensor and tensor.group)
    for group in groups:  # those of one dimension would have PyTorch's default
        if group is not None:
            _set_pg_timeout(patience(device, minutes), group)
    return mesh, data, tensor


def axes_of(mesh: DeviceMesh) -> tuple[Axis, Axis | None]:
    """This rank's data axis, over both its dimensions, and its tensor axis."""
    replicate, shard, tp = mesh.shape
    if tp == 1:
        return Axis(dist.get_rank(), replicate * shard, dist.group.WORLD), None
    data = mesh["dp_replicate", "dp_shard"]._flatten("dp")
    group = data.get_group() if data.size() > 1 else None
    return Axis(data.get_local_rank(), data.size(), group), Axis(mesh.get_local_rank("tp"), tp, mesh.get_group("tp"))


@contextmanager
def failures_as_one_line(minutes: float, watch: Watch | None = None) -> Iterator[None]:
    """Turn what gloo raises after a long wait, or when a rank is gone, into one line with where all ranks are."""
    try:
        yield
    except RuntimeError as error:
        places = watch.places(error) if watch else ""
        if watch is None and "connect" in str(error):
            raise ConnectionError(
                f"the ranks do not reach each other: {next(iter(str(error).splitlines()))}"
            ) from error
        if "timed out" in str(error).lower():
            raise TimeoutError(waited(int(os.environ.get("RANK", "0")), minutes, places)) from error
        if is_lost(error):
            raise LostRank(f"another rank has ended{places and f'; last heard: {places}'}") from error
        raise


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective has failed since a rank of it is gone."""
    return "gloo" in str(error) or type(error).__name__.startswith("Dist")  # torch's errors of communication


def local_device() -> torch.device:
    """The GPU of this rank's LOCAL_RANK, made current, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def mesh_shape(parallel: ParallelConfig, size: int) -> tuple[int, int, int]:
    """``(dp_replicate, dp_shard, tp)`` for ``size`` ranks, -1 filled in; ValueError when they do not multiply to it."""
    replicate, shard, tp = parallel.dp_replicate, parallel.dp_shard, parallel.tp
    if replicate < 1 or tp < 1 or (shard < 1 and shard != -1):
        raise ValueError(
            "parallel: dp_replicate and tp are 1 or more and dp_shard 1 or more or -1, "
            f"got {replicate}, {tp} and {shard}"
        )
    shard = size // (replicate * tp) if shard == -1 else shard
    if replicate * shard * tp != size:
        needed = max(replicate * shard * tp, replicate * tp)
        raise ValueError(
            f"parallel: dp_replicate {replicate} x dp_shard {parallel.dp_shard} x tp {tp} does not make the {size} "
            f"rank(s) launched; launch with `torchrun --nproc-per-node {needed} -m fastalign ...` or change the section"
        )
    return replicate, shard, tp
