"""Run under torchrun with a small and a large configuration: by how many bytes starting the large one grows a rank."""

import ctypes
import json
import os
import sys
from pathlib import Path

from fastalign.arguments import parse_config
from fastalign.config import Config
from fastalign.engine import train
from fastalign.engine.methods import make_objective
from fastalign.engine.settings import settle
from fastalign.models.support import transformer_blocks
from fastalign.parallel.mesh import World, world


def started(config: Config, ranks: World) -> train.Job:
    """A run before its first step."""
    return train.set_up(settle(config, ranks.device), make_objective(config.method, config.loss), ranks)


def memory(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def size(module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


if __name__ == "__main__":
    small, large = (parse_config("dpo", ["--config", path]) for path in sys.argv[1:])
    libc, policy = ctypes.CDLL("libc.so.6"), []
    libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back to the system

    def loaded(*_):
        """The policy is there and verified: smaller blocks that were freed meanwhile go back as well."""
        policy.append(memory("VmHWM") - before)
        libc.malloc_trim(0)

    with world(small.parallel) as ranks:
        started(small, ranks)  # libraries, threads and buffers of collectives are there afterwards
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        before, train.make_room = memory("VmRSS"), loaded
        model = started(large, ranks).models.policy
        grown = {"whole": size(model), "layer": size(transformer_blocks(model)[0])}
        grown |= {"policy": policy[0], "both": memory("VmHWM") - before}
        os.write(1, f"rank {ranks.rank}: {json.dumps(grown)}\n".encode())
