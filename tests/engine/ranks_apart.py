"""Run on two ranks with settings and a folder: each has a disk of its own, and rank 0 keeps what the run leaves."""

import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

from fastalign.arguments import parse_config
from fastalign.config import ParallelConfig
from fastalign.engine import train
from fastalign.parallel.mesh import world
from runs import numbers

if __name__ == "__main__":
    config, folder = parse_config("sft", ["--config", sys.argv[1]]), Path(sys.argv[2])
    with world(ParallelConfig()) as ranks:
        train.world = lambda parallel: nullcontext(ranks)
        (folder / f"home-{ranks.rank}").mkdir()
        os.chdir(folder / f"home-{ranks.rank}")
        config.run.output_dir = "run"
        train.train(config)
        expected = numbers("run") if ranks.is_main else []
        if ranks.is_main:
            shutil.rmtree("run/checkpoints/step-4")
        ranks.barrier()
        config.run.resume = "auto"
        train.train(config)
        assert ranks.is_main or not os.listdir(), os.listdir()
        assert not ranks.is_main or numbers("run") == expected
        os.write(1, b"went on\n") if ranks.is_main else None
