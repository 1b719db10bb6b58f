"""Run on two ranks with settings: replicas that drift apart, then a rank that hangs, end the run with what happened."""

import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace

from fastalign.arguments import parse_config
from fastalign.engine import train
from fastalign.parallel.clip import local
from fastalign.parallel.mesh import World, world

HANGS = 0.05
"""Minutes that a rank waits for the one that hangs."""


def drift(ranks: World) -> None:
    """One weight of the second replica changes after step 2, as by a fault of its memory."""
    call = train.follow

    def follow(job, step):
        if step == 2 and not ranks.is_main:
            weight = next(job.models.policy.parameters())
            local(weight.detach()).mul_(1.5)
        call(job, step)

    train.follow = follow


def hang(step: int) -> None:
    """The second rank stands still before step 3."""
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    config = parse_config("sft", ["--config", sys.argv[1]])
    kept, follow = train.world, train.follow
    with world(config.parallel) as ranks:
        drift(ranks)
        train.world = lambda parallel: nullcontext(ranks)
        for every in (0, 1):
            place = f"{config.run.output_dir}-{every}"
            try:
                train.train(replace(config, run=replace(config.run, output_dir=place, save_every=every)))
            except ValueError as error:
                os.write(1, f"drift {error}\n".encode())
    train.world, train.follow = kept, follow
    config.parallel.timeout_minutes = HANGS
    try:
        train.train(config, hang)
    except OSError as error:
        os.write(1, f"hang {error}\n".encode())
        os._exit(3)
