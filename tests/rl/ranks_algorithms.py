"""Run as two ranks with a folder: the steps of every algorithm over all ranks are those of one process."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from onpolicy import ALONE, make_group, make_groups, make_job, make_models, of_one_process, run

from fastalign.config import ParallelConfig
from fastalign.engine.forward import Models
from fastalign.parallel.mesh import World, world
from fastalign.parallel.shard import shard
from fastalign.rl.algorithms import ALGORITHMS

CASES = [(name, {}) for name in ALGORITHMS] + [("ppo", {"preset": "strong"})]
LAYOUT = (
    "num_micro_batches",
    "tokens_computed",
    "share_ratio",
    "flops_model",
    "packing_efficiency",
    "padding_fraction",
)


def critic_of(name: str, settings: dict) -> str:
    return "none" if name != "ppo" else "separate" if settings else "shared"


def spread(models: Models, ranks: World) -> Models:
    made = {role: getattr(models, role) for role in ("policy", "reference", "critic")}
    return replace(models, **{role: one and shard(one, ranks) for role, one in made.items()})


def check(name: str, settings: dict, ranks: World, folder: Path) -> None:
    several = {} if name in ("raft", "online_dpo") else {"num_iterations": 2, "num_minibatches": 2}
    idle = [[make_group(7, (3, 1, 8))]] if name in ("grpo", "ppo", "online_dpo") else []  # a rank without work
    for groups in (make_groups(), *idle):

        def updated(place: World, groups: list = groups) -> tuple[dict, list[torch.Tensor]]:
            models = make_models(critic_of(name, settings))
            models = models if place is ALONE else spread(models, ranks)
            at = folder / f"{name}-{place.size}-{ranks.rank}"
            at.mkdir(parents=True, exist_ok=True)
            job = make_job(name, models, groups, at, world=place, batch_tokens=60, **{**several, **settings})
            return run(job), [whole(p) for m in job.trained.values() for p in m.module.parameters()]

        want, alone = of_one_process(lambda updated=updated: updated(ALONE))
        got, both = updated(ranks)
        for key, value in want.items():
            if isinstance(value, float) and not key.startswith(LAYOUT) and value == value and "peak" not in key:
                assert abs(got[key] - value) <= 1e-10 * max(1, abs(value)), (name, key, got[key], value)
        for a, b in zip(alone, both, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    print(f"agreed on {name} {settings}", file=sys.stderr)


def whole(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).clone()


if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        for name, settings in CASES:
            check(name, settings, ranks, Path(sys.argv[1]))
