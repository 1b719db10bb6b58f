"""``fastalign bench saves``: how long a checkpoint holds a run up, written while it waits and beside it."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from bench import common
from fastalign.config import Config, OptimConfig, RunConfig
from fastalign.engine.optim import Trained, make_optimizer
from fastalign.engine.output.checkpoints import Retention
from fastalign.engine.output.saver import Saver
from fastalign.engine.output.snapshot import take_snapshot
from fastalign.parallel.mesh import Axis, World

LAYERS = 32


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--millions", type=common.positive, default=64, help="parameters, in millions (default 64)")
    parser.add_argument("--repeats", type=common.positive, default=3, help="checkpoints of each kind (default 3)")
    parser.add_argument("--directory", help="on the disk to write to (default: that of temporary files)")
    common.add_records(parser)


def make_trained(millions: int) -> dict[str, Trained]:
    """fp32 weights of so many parameters, with Adam moments."""
    model = nn.Sequential(*(nn.Linear(1000, 1000 * millions // LAYERS, bias=False) for _ in range(LAYERS)))
    trained = Trained(model, make_optimizer(model, OptimConfig()))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    return {"policy": trained}


def measure(trained: dict[str, Trained], beside: bool, repeats: int, place: Path) -> dict[str, float]:
    """Medians of the seconds that the run is held up, and of those until the checkpoint is whole."""
    world = World(Axis(), torch.device("cpu"))
    saver = Saver(Config("sft", run=RunConfig(output_dir=str(place), async_save=beside)), world)
    held, whole = [], []
    for step in range(1, repeats + 1):
        start = time.perf_counter()
        saver.save(take_snapshot(step, trained, {}, world), Retention(1))
        held.append(time.perf_counter() - start)
        saver.finish()
        whole.append(time.perf_counter() - start)
    saver.close()
    return {"held_up": statistics.median(held), "whole_after": statistics.median(whole)}


def main(options: argparse.Namespace) -> int:
    """Run the command."""
    trained, rows = make_trained(options.millions), []
    for beside in (False, True):
        with tempfile.TemporaryDirectory(dir=options.directory) as place:
            figures = measure(trained, beside, options.repeats, Path(place))
        rows.append({"bench": "saves", "millions": options.millions, "async_save": beside, **figures})
    size = 12 * options.millions / 1000
    lines = [(str(row["async_save"]), f"{row['held_up']:.2f}", f"{row['whole_after']:.2f}") for row in rows]
    common.print_table(f"A checkpoint of {size:.2f} GB", ("run.async_save", "s held up", "s until whole"), lines)
    if options.record:
        common.record("saves", rows, common.environment(), options.results)
    return 0
