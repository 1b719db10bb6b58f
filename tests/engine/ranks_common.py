"""Run as two ranks with settings and a folder: ranks that do not have the same are refused with the same line."""

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from fastalign.arguments import parse_config
from fastalign.config import Config, ParallelConfig
from fastalign.engine import agree, train
from fastalign.engine.reference.cache import cannot_share
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained
from fastalign.parallel.mesh import World, failures_as_one_line, world


def directory(config: Config, ranks: World, common: Path) -> None:
    """A relative path, and two working directories."""
    train.train(replace(config, run=replace(config.run, output_dir="run")))


def settings(config: Config, ranks: World, common: Path) -> None:
    """A configuration file for each host, and one of them not up to date."""
    train.train(replace(config, optim=replace(config.optim, lr=config.optim.lr * (1 + ranks.rank))))


def rows(config: Config, ranks: World, common: Path) -> None:
    """A copy of the data on each host, and one of them not up to date."""
    train.train(replace(config, data=replace(config.data, path=str(Path("rows.jsonl").absolute()))))


def weights(config: Config, ranks: World, common: Path) -> None:
    """A copy of the model on each host, and one of them not up to date."""
    tokenizer = load_tokenizer(config.model)
    for rank in range(ranks.size) if ranks.is_main else ():  # transformers writes on rank 0 alone
        save_pretrained(load_policy(config.model, tokenizer=tokenizer, seed=rank), tokenizer, f"../home-{rank}/model")
    ranks.barrier()
    train.train(replace(config, model=replace(config.model, config=None, path=str(Path("model").absolute()))))


def cache(config: Config, ranks: World, common: Path) -> None:
    """Log-probs below a relative path, and two working directories."""
    raise ValueError(cannot_share(Path("logps"), ranks))


CASES = (directory, settings, rows, weights, cache)

if __name__ == "__main__":
    config, common = parse_config("dpo", ["--config", sys.argv[1]]), Path(sys.argv[2])
    agree.LATE_SECONDS = 0.2
    with world(ParallelConfig(timeout_minutes=2)) as ranks:
        for group in (dist.group.WORLD, *ranks.mesh.get_all_groups()):
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=2)
        os.chdir(common / f"home-{ranks.rank}")
        train.world = lambda parallel: nullcontext(ranks)
        for case in CASES:
            try:
                case(config, ranks, common)
            except ValueError as error:
                os.write(1, f"{case.__name__} {error}\n".encode())  # whole lines of both ranks
        _set_pg_timeout(timedelta(seconds=0.3), dist.group.WORLD)
        if ranks.is_main:
            try:
                with failures_as_one_line(0.005):
                    ranks.data.gather([1.0])
            except TimeoutError as error:
                os.write(1, f"late {error}\n".encode())
        else:
            time.sleep(1)
        os._exit(0)  # a group that has lost a collective cannot be closed
