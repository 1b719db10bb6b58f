"""Killed runs go on to the bit, and nothing else passes for the same run."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from fastalign.engine.errors import RunError
from fastalign.engine.output.checkpoints import whole_checkpoints
from fastalign.engine.train import train
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained
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


def wait_for_lines(path: Path, count: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
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


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.glob("**/step-*"))


def test_going_back_to_a_named_checkpoint_keeps_what_came_after_in_another_place(configure, finished, caplog):
    expected, directory = numbers(finished.run.output_dir), Path(finished.run.output_dir)
    back = {"run.steps": 4, "run.save_every": 3, "run.resume": str(directory / "checkpoints" / "step-2")}
    words = r"goes back to step-2, and .* has later checkpoints \(step-4\): set run\.overwrite_later=true"
    with pytest.raises(ValueError, match=words):
        train(configure("sft", **back))
    assert names(directory) == ["checkpoints/step-2", "checkpoints/step-4"]
    assert numbers(directory) == expected
    for n, later in ((1, ["step-4"]), (2, ["step-3", "step-4"])):
        train(configure("sft", **back, **{"run.overwrite_later": True, "run.keep": 9}))
        assert f"resume: {', '.join(later)} and the lines of metrics.jsonl after step 2 are now in" in caplog.text
        assert numbers(directory / f"superseded-{n}") == expected[2:]
        assert not set(later) - {path.name for path in whole_checkpoints(directory / f"superseded-{n}" / "checkpoints")}
        assert [path.name for path in whole_checkpoints(directory / "checkpoints")] == ["step-2", "step-3", "step-4"]
        assert numbers(directory) == expected
    assert (directory / "checkpoints" / "latest").read_text() == "step-4\n"


def spoil(path: Path, how: str) -> str:
    """Damage a checkpoint; returns what is said of it."""
    tensors = next(path.glob("*.safetensors"))
    if how == "lost":
        tensors.unlink()
        return rf"{tensors.name} is missing"
    if how == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-9])
        return rf"{tensors.name} has \d+ bytes, \d+ were written"
    state = path / "state.json"
    state.unlink() if how == "headless" else state.write_text("{")
    return r"state\.json is missing" if how == "headless" else r"state\.json is not JSON"


@pytest.mark.parametrize("how", ["lost", "cut", "headless", "garbled"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_kept(configure, finished, caplog, how):
    expected, directory = numbers(finished.run.output_dir), Path(finished.run.output_dir)
    reason = spoil(directory / "checkpoints" / "step-4", how)
    named = {"run.steps": 4, "run.save_every": 2, "run.resume": str(directory / "checkpoints" / "step-4")}
    with pytest.raises(ValueError, match="|".join((reason, "it has no state"))):
        train(configure("sft", **named))
    train(configure("sft", **{**named, "run.resume": True}))
    (line,) = [r.getMessage() for r in caplog.records if "not a whole checkpoint" in r.getMessage()]
    assert re.search(rf"^resume: step-4 is not a whole checkpoint \(.*{reason}.*\): going on from .*step-2$", line)
    assert names(directory) == ["checkpoints/step-2", "checkpoints/step-4", "superseded-1/checkpoints/step-4"]
    assert numbers(directory) == expected and numbers(directory / "superseded-1") == expected[2:]
    assert len(whole_checkpoints(directory / "checkpoints")) == 2


def test_a_run_without_a_whole_checkpoint_is_not_started_afresh(configure, finished):
    directory = Path(finished.run.output_dir) / "checkpoints"
    for name in ("step-2", "step-4"):
        spoil(directory / name, "headless")
    words = (
        r"cannot resume from .*: step-4 is not a whole checkpoint \(.*\); step-2 is not .*; put back what is missing"
    )
    with pytest.raises(ValueError, match=words):
        train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    (directory.parent / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"already holds a run"):
        train(configure("sft", **{"run.steps": 4}))


@pytest.mark.parametrize("asked", [True, "step-4"])
def test_a_checkpoint_of_another_release_is_refused_in_one_line_with_what_to_do(configure, finished, asked):
    directory = Path(finished.run.output_dir) / "checkpoints"
    for file in directory.glob("*/state.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 1}))
    before = names(directory)
    words = (
        rf"^{directory}/step-4 was written by another release of fastalign \(checkpoint format 1, this one reads 2\); "
        r"finish that run with the release that wrote it, or start again in another run\.output_dir$"
    )
    resume = asked if asked is True else str(directory / asked)
    with pytest.raises(ValueError, match=words):
        train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": resume}))
    assert names(directory) == before


def test_what_is_missing_beside_a_checkpoint_is_told(configure, finished, caplog):
    directory = Path(finished.run.output_dir)
    (directory / "metrics.jsonl").unlink()
    go_on = configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True})
    train(go_on)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("resume: ")]
    assert told == [f"resume: {directory}/metrics.jsonl has no lines of steps 1 to 4: they are missing"]
    caplog.clear()
    train(configure("sft", "whole", **{"run.steps": 4, "run.save_every": 2}))
    train(configure("sft", "whole", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    assert "resume: " not in caplog.text


@pytest.mark.parametrize("section", ["model", "reference"])
def test_a_reference_with_other_weights_is_refused(configure, tmp_path, section):
    """Where it starts from has been trained on, for one."""
    config = configure("dpo", **{"run.steps": 2, "reference.cache": "off"})
    tokenizer = load_tokenizer(config.model)
    for name in ("model", "other"):
        policy = load_policy(config.model, tokenizer=tokenizer)
        policy.head.weight.data[-1, -1] += name == "other"
        save_pretrained(policy, tokenizer, tmp_path / name)
    if section == "model":
        config.model.path, config.model.config = str(tmp_path / "model"), None
    else:
        config.reference.path = str(tmp_path / "model")
    train(config)
    config.run.resume = True
    train(config)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "other").rename(tmp_path / "model")
    with pytest.raises(
        ValueError, match=rf"was trained against another reference: {section}\.path.* has other weights now"
    ):
        train(config)


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
    train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    assert not (directory / "step-9.tmp").exists()
    assert len(records(finished.run.output_dir)) == 4


def test_a_cut_last_line_does_no_harm(configure, finished, caplog):
    path = Path(finished.run.output_dir) / "metrics.jsonl"
    expected = numbers(finished.run.output_dir)
    path.write_text(path.read_text() + '{"schema": 1, "step": 5, "lo')
    train(configure("sft", **{"run.steps": 4, "run.save_every": 2, "run.resume": True}))
    assert numbers(finished.run.output_dir) == expected
    assert "metrics.jsonl was cut short: it is removed" in caplog.text


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
    with pytest.raises(RunError, match=r"cannot write to run\.output_dir"):
        train(configure("sft", "file/run", **{"data.path": "absent.jsonl"}))


@pytest.mark.parametrize("name", ["metrics.jsonl/", ".lock/", "running.json/", "config.yaml/", "checkpoints", "model"])
def test_a_file_or_directory_of_the_wrong_kind_is_refused_before_any_work(configure, name):
    config = configure("sft", **{"data.path": "absent.jsonl"})
    path = Path(config.run.output_dir) / name
    path.mkdir(parents=True)
    if not name.endswith("/"):
        path.rmdir()
        path.touch()
    found, meant = ("directory", "file") if name.endswith("/") else ("file", "directory")
    with pytest.raises(ValueError, match=rf"^{path} is a {found} where a run keeps a {meant}: move it, or choose"):
        train(config)


def test_a_file_named_as_a_checkpoint_is_refused_before_any_work(configure):
    config = configure("sft", **{"data.path": "absent.jsonl"})
    path = Path(config.run.output_dir) / "checkpoints" / "step-2"
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ValueError, match=rf"^{path} is a file where a run keeps a directory"):
        train(config)
