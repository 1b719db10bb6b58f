"""One side of ``bench/train.py``, alone in its process: build, train, write the log."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from typing import Any

import torch

from bench import common, peers
from bench.peers import StepLog
from bench.workload import Workload


def _peak_mib() -> float:
    """Peak resident memory of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / common.MIB


def _build(side: str, work: Workload, log: StepLog) -> Callable[[], Any]:
    return peers.trl_dpo(work, log, select_rows=side == "trl-fair")


def run(side: str, work: Workload, profile: bool) -> None:
    """Train ``side`` on ``work`` and write its clock readings, losses and memory to ``<side>.json``."""
    torch.set_num_threads(work.threads)
    log = StepLog()
    train = _build(side, work, log)
    ready = _peak_mib()
    if profile:
        _profiled(train)
    else:
        train()
    result = {"wall": log.wall, "cpu": log.cpu, "losses": log.losses, "ready_mib": ready, "peak_mib": _peak_mib()}
    (work.path / f"{side}.json").write_text(json.dumps(result))


def _profiled(train: Callable[[], Any]) -> None:
    """Run ``train`` under torch's profiler and print the operations that took longest themselves."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))
