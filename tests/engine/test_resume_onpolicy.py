"""On-policy runs that are killed go on to the bit: metrics, samples and weights."""

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from letters import configure

from fastalign.config import Config
from fastalign.engine.train import train
from runs import fork, numbers

CLOCK = ("timing_s/", "step_time", "perf/")
STEPS = 6
SETTINGS = {
    "grpo": {
        "num_iterations": 2,
        "num_minibatches": 2,
        "kl_coef": 0.05,
        "reference_sync": "ema",
        "reference_alpha": 0.1,
    },
    "ppo": {"critic": "separate", "normalize_values": True, "kl_target": 0.5, "kl_horizon": 100},
}


def left(config: Config) -> tuple:
    """What a run leaves, times aside."""
    directory = Path(config.run.output_dir)
    lines = [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in numbers(directory)]
    return lines, (directory / "samples.jsonl").read_text(), (directory / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", [*SETTINGS])
def test_a_killed_run_goes_on_to_the_bit(tmp_path, method):
    """Also one that samples from a copy of the weights, which changes nothing."""
    whole, killed = (configure(tmp_path, method, name, steps=STEPS, **SETTINGS[method]) for name in ("whole", "killed"))
    killed.rewards = whole.rewards
    killed.parallel.generate = {"tp": 1} if method == "grpo" else None
    broken = fork(killed)
    draw = random.Random(time.time_ns())  # another moment every time: the outcome must not depend on it
    lines, pause = draw.randint(2, STEPS - 2), draw.uniform(0, 0.05)
    wait_for_lines(Path(killed.run.output_dir) / "metrics.jsonl", lines)
    time.sleep(pause)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    train(whole)
    killed.run.resume = True
    train(killed)
    for mine, theirs in zip(left(killed), left(whole), strict=True):
        assert mine == theirs, f"killed after {lines} lines and {pause} s"
    samples = [json.loads(line) for line in left(whole)[1].splitlines()]
    assert [one["step"] for one in samples] == sorted(one["step"] for one in samples) and samples[-1]["step"] == STEPS

    other = replace(killed, rewards=[{**killed.rewards[0], "weight": 2.0}])
    with pytest.raises(
        ValueError, match=r"cannot resume .* with other settings \(rewards: \[.*\] there, \[.*\] here\)"
    ):
        train(other)
    with pytest.raises(ValueError, match=r"with other settings \(algorithm\.gamma: 1\.0 there, 0\.9 here\)"):
        train(replace(killed, algorithm=replace(killed.algorithm, gamma=0.9)))


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"{path} has not reached {count} lines"
        time.sleep(0.002)
