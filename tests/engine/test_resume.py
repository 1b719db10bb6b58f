"""Killed runs go on to the bit, and nothing else passes for the same run."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from fastalign.engine import checkpoint
from fastalign.engine.train import train
from runs import LLAMA, finish, fork, numbers, records

DPO = {"run.steps": 14, "run.save_every": 3, "run.eval_every": 4}


def test_a_killed_run_goes_on_to_the_bit(configure, materials):
    held_out = {"data.eval_path": str(materials / "held_out.jsonl")}
    whole, killed = (configure("dpo", name, **DPO, **held_out) for name in ("whole", "killed"))
    unbroken, broken = fork(whole), fork(killed)
    draw = random.Random(time.time_ns())  # another moment every time: the outcome must not depend on it
    lines, pause = draw.randint(4, 12), draw.uniform(0, 0.1)
    wait_for_lines(Path(killed.run.output_dir) / "metrics.jsonl", lines)
    time.sleep(pause)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    killed.run.resume = True
    finish(fork(killed))
    finish(unbroken)
    assert numbers(killed.run.output_dir) == numbers(whole.run.output_dir), f"killed after {lines} lines and {pause} s"
    assert len(records(whole.run.output_dir)) == DPO["run.steps"]


def wait_for_lines(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"{path} has not reached {count} lines"
        time.sleep(0.002)


@pytest.fixture
def finished(configure):
    """A short run with checkpoints at steps 2 and 4."""
    config = configure("sft", **{"run.steps": 4, "run.save_every": 2})
    train(config)
    return config


def test_a_step_is_never_written_twice(configure, finished):
    expected = numbers(finished.run.output_dir)
    shutil.rmtree(Path(finished.run.output_dir) / "checkpoints" / "step-4")
    train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    assert numbers(finished.run.output_dir) == expected


def test_a_running_mean_goes_on_where_it_was(configure):
    settings = {
        "run.steps": 4,
        "run.save_every": 2,
        "loss.name": "bco",
        "data.format": "preference",
        "data.columns": {},
    }
    config = configure("kto", **settings)
    train(config)
    expected = numbers(config.run.output_dir)
    assert all(line["rewards/baseline"] for line in expected[1:])
    shutil.rmtree(Path(config.run.output_dir) / "checkpoints" / "step-4")
    config.run.resume = True
    train(config)
    assert numbers(config.run.output_dir) == expected


def test_going_back_to_a_named_checkpoint_drops_what_came_after(configure, finished):
    expected, directory = numbers(finished.run.output_dir), Path(finished.run.output_dir) / "checkpoints"
    train(configure("sft", **{"run.steps": 4, "run.save_every": 3, "run.resume": str(directory / "step-2")}))
    assert numbers(finished.run.output_dir) == expected
    assert [p.name for p in checkpoint.whole_checkpoints(directory)] == ["step-3", "step-4"]


def test_a_checkpoint_can_be_carried_into_a_new_directory_only(configure, finished, tmp_path):
    expected, directory = numbers(finished.run.output_dir), Path(finished.run.output_dir)
    carried = (directory / "checkpoints" / "step-2").rename(tmp_path / "carried")
    with pytest.raises(ValueError, match="already holds a run"):
        train(configure("sft", **{"run.steps": 4, "run.resume": str(carried)}))
    branch = configure("sft", "branch", **{"run.steps": 4, "run.resume": str(carried)})
    train(branch)
    assert numbers(branch.run.output_dir) == expected[2:]
    with pytest.raises(ValueError, match=r"absent is not a whole checkpoint"):
        train(configure("sft", "other", **{"run.resume": str(tmp_path / "absent")}))


def test_resume_without_a_checkpoint_starts_afresh(configure, finished):
    expected = numbers(finished.run.output_dir)
    shutil.rmtree(Path(finished.run.output_dir) / "checkpoints")
    train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    assert numbers(finished.run.output_dir) == expected


def test_what_a_crash_left_is_ignored_and_removed(configure, finished):
    directory = Path(finished.run.output_dir) / "checkpoints"
    (directory / "step-9.tmp").mkdir()
    (directory / "step-9.tmp" / "state.json").write_text("{}")
    (directory / "step-8").mkdir()  # not ours: no state.json
    train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    assert not (directory / "step-9.tmp").exists()
    assert len(records(finished.run.output_dir)) == 4


def test_a_cut_last_line_does_no_harm(configure, finished):
    path = Path(finished.run.output_dir) / "metrics.jsonl"
    expected = numbers(finished.run.output_dir)
    path.write_text(path.read_text() + '{"schema": 1, "step": 5, "lo')
    train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    assert numbers(finished.run.output_dir) == expected


def test_a_fresh_run_never_writes_over_another(configure, finished):
    with pytest.raises(ValueError, match=r"already holds a run: continue it with run\.resume=true"):
        train(configure("sft"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"optim.lr": 2e-3}, r"optim\.lr: 0\.001 there, 0\.002 here"),
        ({"run.seed": 1, "data.max_length": 100}, r"data\.max_length: 192 there, 100 here, run\.seed: 0 there, 1 here"),
        ({"run.steps": 8}, r"a schedule that ends cannot be extended"),
        ({"model.config": {**LLAMA, "hidden_size": 64}}, r"model\.config\.hidden_size: 32 there, 64 here"),
    ],
)
def test_another_configuration_is_refused(configure, finished, change, words):
    with pytest.raises(ValueError, match=words):
        train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True, **change}))


def test_a_constant_schedule_can_be_extended(configure):
    constant = {"optim.schedule": "constant", "run.save_every": 2}
    train(configure("sft", **constant, **{"run.steps": 2}))
    train(configure("sft", **constant, **{"run.steps": 4, "run.resume": True, "batch.tokens": 300}))
    train(configure("sft", "whole", **constant, **{"run.steps": 4}))
    mine, whole = (numbers(configure("sft", name).run.output_dir, ("num_micro_batches",)) for name in ("run", "whole"))
    assert mine[:2] == whole[:2]
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def test_a_checkpoint_of_another_shape_is_refused(configure, finished):
    state = Path(finished.run.output_dir) / "checkpoints" / "step-4" / "state.json"
    text = json.loads(state.read_text())
    text["config"]["model"]["config"]["intermediate_size"] = 52
    state.write_text(json.dumps(text))
    other = {"model.config": {**LLAMA, "intermediate_size": 52}}
    with pytest.raises(ValueError, match=r"is of another model: .*mlp.* is \(.*48.*\) there and \(.*52.*\) here"):
        train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True, **other}))


def test_an_output_directory_that_cannot_be_made_is_refused_before_any_work(configure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to run\.output_dir"):
        train(configure("sft", "file/run", **{"data.path": "absent.jsonl"}))
