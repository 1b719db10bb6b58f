"""Whole on-policy runs: what reward functions may do to them, and that nothing of what was done is lost."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from letters import configure
from safetensors import safe_open

from fastalign.engine import train as engine
from fastalign.engine.interrupt import Interrupted
from fastalign.engine.replay import replay
from fastalign.engine.train import train
from runs import fork, records


def samples(config):
    return [json.loads(line) for line in Path(config.run.output_dir, "samples.jsonl").read_text().splitlines()]


def scoring_threads():
    """Those of reward functions that still live, once they have had a moment to end."""
    deadline = time.monotonic() + 2
    while (found := [t.name for t in threading.enumerate() if "rewards" in t.name]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


ACCEPTED = {
    "numpy scalars": "import numpy as np\ndef reward(completions): return [np.float32(len(c)) for c in completions]",
    "torch scalars": "import torch\ndef reward(completions): return [torch.tensor(len(c) / 2) for c in completions]",
    "a tensor with a graph": "import torch\ndef reward(completions):\n"
    "    return torch.tensor([len(c) / 2 for c in completions], requires_grad=True)",
    "booleans": "def reward(completions): return [len(c) > 3 for c in completions]",
    "a tuple of fractions": "from fractions import Fraction\n"
    "def reward(completions): return tuple(Fraction(len(c), 3) for c in completions)",
    "prints": "def reward(completions):\n    print('scoring')\n    return [len(c) for c in completions]",
    "changes its arguments": "def reward(completions, completion_ids, answer, **more):\n"
    "    completion_ids.clear(), answer.clear(), more['prompts'].clear()\n    return [len(c) for c in completions]",
    "takes the generators": "import random, numpy, torch\ndef reward(completions):\n"
    "    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)\n    return [len(c) for c in completions]",
    "goes elsewhere": "import os\ndef reward(completions):\n"
    "    os.chdir('/')\n    return [len(c) for c in completions]",
    "nothing at all": "def reward(completions): return [None] * len(completions)",
}


@pytest.mark.parametrize("what", ACCEPTED)
def test_odd_rewards_that_are_accepted(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)  # and back, at the end
    config = configure(tmp_path, reward=ACCEPTED[what], steps=2, num_generations=2)
    config.run.output_dir = "run"  # relative
    train(config)
    monkeypatch.chdir(tmp_path)
    assert len(samples(config)) == 16 and len(records("run")) == 2 and Path("run/model/config.json").exists()
    if what not in ("takes the generators", "goes elsewhere", "nothing at all"):
        assert {line["reward"] for line in samples(config)} != {None}


REFUSED = {
    "texts": ("def reward(completions):\n    return ['1'] * len(completions)", "returned a string for sample 0 of the"),
    "a generator": ("def reward(completions):\n    return (1 for _ in completions)", "returned .* expected a list"),
    "a mapping": ("def reward(completions):\n    return dict(enumerate(completions))", "returned a mapping .* a list"),
    "nan": ("def reward(completions):\n    return [float('nan')] * len(completions)", "returned nan for sample 0"),
    "a column": (
        "import numpy\ndef reward(completions):\n    return numpy.ones((len(completions), 1))",
        "list of 1 for",
    ),
    "an exit": ("def reward(completions):\n    quit(3)", "SystemExit: 3"),
    "a handler": (
        "import signal\ndef reward(completions):\n    signal.signal(signal.SIGINT, signal.SIG_DFL)",
        "ValueError: signal only works in main thread",
    ),
    "a hanging await": (
        "import asyncio\nasync def reward(completions):\n    await asyncio.Event().wait()",
        r"hangs on samples 0 to 1 of the prompt .* no result within 0\.2 seconds",
    ),
}
ONCE_GOOD = "\ncalls, inner = [], reward\n{keyword} reward(completions):\n    calls.append(1)\n"
ONCE_GOOD += "    return [1, 0] if len(calls) <= 4 else {wait} inner(completions)\n"


@pytest.mark.parametrize("what", REFUSED)
def test_odd_rewards_that_end_a_run_in_one_line_lose_no_step(tmp_path, what):
    code, said = REFUSED[what]
    words = ("async def", "await") if "async" in code else ("def", "")
    config = configure(tmp_path, reward=code + ONCE_GOOD.format(keyword=words[0], wait=words[1]), num_generations=2)
    config.rewards[0]["timeout"] = 0.2 if what == "a hanging await" else 60.0
    with pytest.raises(ValueError, match=rf"^step 2: reward reward .*{said}.*; saved .*step-1, go on with run.res"):
        train(config)
    assert len(samples(config)) == 8 and len(records(config.run.output_dir)) == 1 and not scoring_threads()


def test_a_reward_that_fails_at_an_evaluation_loses_no_step(tmp_path):
    code = "import os\ndef reward(completions):\n"
    code += f"    assert len(completions) == 2 or os.path.exists({str(tmp_path / 'mended')!r})\n"
    config = configure(tmp_path, reward=code + "    return [1] * len(completions)", steps=3, num_generations=2)
    config.data, config.run.eval_every, config.run.save_every = replace(config.data, eval_fraction=0.1), 1, 0
    with pytest.raises(
        ValueError, match=r"^the evaluation after step 1: .*AssertionError.*; saved .*step-1, go on with"
    ):
        train(config)
    (tmp_path / "mended").touch()
    config.run.resume = True
    train(config)
    assert [(line["step"], line["eval_reward"]) for line in records(config.run.output_dir)] == [(1, 1), (2, 1), (3, 1)]


def test_a_reward_that_kills_its_process_leaves_the_last_checkpoint(tmp_path):
    dies = "import os\ncalls = []\ndef reward(completions):\n    calls.append(1)\n"
    dies += "    if len(calls) > 12: os._exit(5)\n    return [1, 0]\n"
    config = configure(tmp_path, reward=dies, num_generations=2)
    process = fork(config)
    process.communicate(timeout=100)
    assert process.returncode == 5
    assert Path(config.run.output_dir, "checkpoints", "step-2").is_dir()
    Path(config.rewards[0]["function"].rpartition(":")[0]).write_text(
        "def reward(completions):\n    return [1] * len(completions)"
    )
    config.run.resume = True
    train(config)
    assert [line["step"] for line in records(config.run.output_dir)] == [*range(1, 7)]


def test_a_stop_ends_what_scores(tmp_path):
    slow = "import time\ndef reward(completions):\n    time.sleep(0.02)\n    return [1, 0]"
    config = configure(tmp_path, reward=slow, steps=500, num_generations=2)
    with pytest.raises(Interrupted, match=r"interrupted after step \d+ of 500; (saved .*; )?go on with"):
        train(config, on_step=lambda step: step == 2 and os.kill(os.getpid(), signal.SIGINT))
    assert not scoring_threads()


SIZED = {
    "ppo": {"critic": "separate"},
    "grpo": {"num_generations": 2, "reference_sync": "ema", "kl_coef": 0.1},
}


@pytest.mark.parametrize("method", SIZED)
def test_the_room_that_a_run_asks_for_is_what_a_checkpoint_takes(tmp_path, monkeypatch, method):
    needs = []
    monkeypatch.setattr(engine, "make_room", lambda config, need, *_: needs.append(need))
    config = configure(tmp_path, method, steps=1, **SIZED[method])
    train(config)
    files = Path(config.run.output_dir, "checkpoints", "step-1").glob("*.safetensors")
    opened = [safe_open(file, "pt") for file in files]
    assert needs == [sum(one.get_tensor(name).nbytes for one in opened for name in one.keys())]  # noqa: SIM118


def test_the_start_of_a_run_tells_what_is_sampled_and_rewarded(tmp_path, capsys):
    config = configure(tmp_path, steps=1, num_generations=2)
    config.run.show_example, config.sampler.top_k = True, 5
    config.rewards.append({"builtin": "length", "target": 3, "weight": 0.1})
    train(config)
    said = capsys.readouterr().out
    assert re.search(r"^rewards +reward, 0\.1 x length$", said, re.M)
    assert re.search(r"^sampler +native, temperature 1, top_k 5, up to 6 new tokens$", said, re.M)
    assert re.search(r"^prompt +\w+ ->", said, re.M) and "is scored" not in said
    assert re.search(r"reward [\d.-]+  rewards/reward/mean [\d.-]+  rewards/length/mean -", said)


def test_truncated_sampling_trains_on_ratios_of_the_whole_distribution(tmp_path, caplog):
    config = configure(tmp_path, steps=1, num_generations=2, num_iterations=2)
    config.sampler.top_p, config.optim.lr = 0.7, 1e-9  # so that the second update has the ratios of the first
    train(config)
    (record,) = records(config.run.output_dir)
    assert record["val/ratio_max"] == pytest.approx(1, abs=1e-4) == record["val/ratio_min"]
    assert record["sampling/exact"] == 0 and record["sampling/sampling_logp_difference/mean"] > 0.1
    said = "ratios, KL and entropy are those of all tokens"
    assert sum(said in each.getMessage() for each in caplog.records) == 1


def test_a_completion_is_drawn_again_and_the_run_is_left_as_it_is(tmp_path):
    config = configure(tmp_path, steps=3, num_generations=2)
    train(config)
    directory = Path(config.run.output_dir)
    (directory / "checkpoints" / "step-9.tmp").mkdir()  # as of a run that writes it now
    for step, number in ((1, 0), (3, 7)):
        text, equal = replay(config, directory, step, number)
        assert equal and text.startswith(f"step {step}, sample {number}: ") and "is equal, token by token" in text
    assert (directory / "checkpoints" / "step-9.tmp").is_dir()
    with pytest.raises(ValueError, match=r"steps that can be drawn again: 1, 3, 4"):
        replay(config, directory, 2, 0)
    with pytest.raises(ValueError, match=r"step 3 has the samples 0 to 7, and --sample is 8"):
        replay(config, directory, 3, 8)
