"""A rank that dies, hangs or computes something else ends the run, which says where all ranks were."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forks
import torch
import torch.distributed as dist

from fastalign.engine import agreement
from fastalign.parallel import whereabouts
from fastalign.parallel.mesh import Axis, World, of_this_launch
from runs import records, write_yaml

ALONE = World(Axis(), torch.device("cpu"))


def test_replicas_that_drift_apart_and_a_rank_that_hangs_end_the_run(configure):
    config = configure("sft", **{"run.steps": 6, "run.save_every": 1, "run.keep": 9, "parallel.dp_replicate": 2})
    process = forks.Forked(Path(__file__).with_name("ranks_faults.py"), write_yaml(config), ranks=2)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 3, said
    told = re.findall(r"^(drift|hang) (.*)$", said, re.MULTILINE)
    drift = [text for case, text in told if case == "drift"]
    rest = (
        "rank 1 has other weights than rank 0 and its like: memory or links may be faulty; earlier checkpoints are "
        "intact: go on without that machine, with run.resume=true"
    )
    assert sorted(drift) == sorted([f"step 2: {rest}", f"the checkpoint of step 2: {rest}"] * 2)
    assert [path.name for path in Path(config.run.output_dir + "-1").glob("checkpoints/step-*")] == ["step-1"]
    hangs = [text for case, text in told if case == "hang"]
    assert len(hangs) == 1, said
    assert re.fullmatch(
        r"rank 0 has waited 0\.05 minutes \(parallel\.timeout_minutes\) for another rank: "
        r"rank 0: step 3, data, in all_gather of mesh\.py:\d+ gather; "
        r"rank 1: step 2, .*, not heard of for \d+ s; if it is only slow, raise parallel\.timeout_minutes",
        hangs[0],
    ), hangs
    assert len(records(config.run.output_dir)) == 2


def test_ranks_that_agree_may_go_on():
    numbers = torch.tensor([[1.0, 2.0, 3.0]])
    agreement.check(numbers, 1, ALONE)
    agreement.check_whole({"w": torch.ones(2)}, 1, ALONE)
    x = torch.arange(6.0)
    assert agreement.bits(x) != agreement.bits(x.nextafter(torch.full((), 9.0))) and agreement.bits(torch.ones(())) > 0


def test_ranks_that_are_started_again_find_each_other_and_not_those_before():
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:

        def launch(*order: int) -> list[dist.Store]:
            futures = {}
            for rank in order:
                futures[rank] = pool.submit(of_this_launch, store, rank, 3)
                time.sleep(0.05)
            return [futures[rank].result(timeout=10) for rank in range(3)]

        before = launch(0, 1, 2)
        before[0].set("address", "old")
        for order in ((2, 1, 0), (0, 2, 1), (1, 0, 2)):
            again = launch(*order)
            assert not again[1].check(["address"])
            again[1].set("address", "new")
            assert all(one.get("address") == b"new" for one in again) and before[2].get("address") == b"old"
            before = again
            before[0].set("address", "old")


def test_a_place_names_the_collective_and_the_line_of_ours_that_waits():
    before = whereabouts.NOW.part
    with whereabouts.doing("reward"):
        place = whereabouts.here()
    assert place.part == "reward" and re.search(r"in no collective \(\S+\.py:\d+ \w+\)", place.call)
    assert whereabouts.NOW.part == before
