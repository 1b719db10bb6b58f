"""How checkpoints are written: beside the run, on one rank's disk, the best of them kept; and read by other layouts."""

import json
import os
import shutil
import signal
from pathlib import Path
from threading import Event

import forks
import pytest
from safetensors.torch import load_file
from test_resume_onpolicy import configure as on_policy

from fastalign.engine import best, keeper
from fastalign.engine.errors import RunError
from fastalign.engine.interrupt import Interrupted
from fastalign.engine.output import saver
from fastalign.engine.train import train
from runs import finish, fork, numbers, override, records, write_yaml

HERE = Path(__file__).parent


def names(config) -> list[str]:
    return sorted(path.name for path in Path(config.run.output_dir).glob("checkpoints/*"))


def contents(config, step: int) -> dict[str, bytes]:
    directory = Path(config.run.output_dir) / "checkpoints" / f"step-{step}"
    tensors = [pair for path in directory.glob("*.safetensors") for pair in load_file(path).items()]
    return {name: x.numpy().tobytes() for name, x in tensors}


def test_a_checkpoint_is_written_while_the_run_goes_on(configure, monkeypatch):
    plain, beside = (configure("sft", name, **{"run.save_every": 2}) for name in ("plain", "beside"))
    train(plain)
    beside.run.async_save, written, seen = True, Event(), []
    call = saver.write_checkpoint
    monkeypatch.setattr(saver, "write_checkpoint", lambda *a: (written.wait(60), call(*a))[1])

    def on_step(step: int) -> None:
        seen.append((step, names(beside) if step > 1 else []))
        if step == 3:
            written.set()

    train(beside, on_step)
    assert seen[2:4] == [(2, []), (3, [])]  # two steps beyond the moment that it holds
    assert names(beside) == names(plain) == ["latest", "step-4", "step-6"]
    assert numbers(beside.run.output_dir) == numbers(plain.run.output_dir)
    for step in (4, 6):
        assert contents(beside, step) == contents(plain, step)


def test_a_checkpoint_that_cannot_be_written_beside_ends_the_run_at_the_next_step(configure, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    config = configure("sft", **{"run.save_every": 2, "run.async_save": True})
    call = saver.write_checkpoint

    def write(directory, snapshot, *rest):
        with monkeypatch.context() as patch:
            if snapshot.step == 4:
                patch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", full)
            return call(directory, snapshot, *rest)

    monkeypatch.setattr(saver, "write_checkpoint", write)
    waits = keeper.Keeper.asked

    def asked(self, step):
        if step == 4:  # which is quicker than a disk otherwise
            self.saver.pending.exception()
        return waits(self, step)

    monkeypatch.setattr(keeper.Keeper, "asked", asked)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*step-4: No space left .*earlier .* are intact"):
        train(config)
    assert names(config) == ["latest", "step-2"] and len(records(config.run.output_dir)) == 4


def test_a_stop_waits_for_the_checkpoint(configure, monkeypatch):
    config = configure("sft", **{"run.async_save": True})
    call = saver.write_checkpoint
    monkeypatch.setattr(saver, "write_checkpoint", lambda *a: (Event().wait(0.3), call(*a))[1])
    with pytest.raises(Interrupted, match=r"after step 3 of 6; saved .*step-3"):
        train(config, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    assert names(config) == ["latest", "step-3"]


def test_the_best_checkpoint_stays(configure, materials):
    held_out = {"data.eval_path": str(materials / "held_out.jsonl"), "run.eval_every": 1, "run.keep": 1}
    steep = {**held_out, "optim.lr": 1.0, "optim.schedule": "constant", "run.steps": 4, "run.keep_best": "eval_loss"}
    whole, config = (configure("sft", name, **steep) for name in ("whole", "run"))
    train(whole)
    losses = {line["step"]: line["eval_loss"] for line in records(whole.run.output_dir)}
    step = min(losses, key=losses.get)
    assert step < 4, losses  # so steep that it does not stay the best
    assert names(whole) == ["best", "latest", f"step-{step}", "step-4"]
    assert (Path(whole.run.output_dir) / "checkpoints" / "best").read_text() == f"step-{step}\n"

    train(configure("sft", **{**steep, "run.keep": 9}))
    for later in range(step + 1, 5):
        shutil.rmtree(Path(config.run.output_dir) / "checkpoints" / f"step-{later}", ignore_errors=True)
    config.run.resume = "auto"
    train(config)
    assert names(config) == names(whole) and numbers(config.run.output_dir) == numbers(whole.run.output_dir)


@pytest.mark.parametrize(
    "metric, words",
    [
        ("eval_los", r"run\.keep_best: expected one of eval_loss, .*, got 'eval_los'"),
        ("eval_rewards/rejected", r"run\.keep_best: expected one of .*, got 'eval_rewards/rejected'"),
        ("loss", r"run\.keep_best: expected one of .*, got 'loss'"),
    ],
)
def test_a_metric_that_no_evaluation_has_or_whose_direction_is_open_is_refused(configure, materials, metric, words):
    held_out = {"data.eval_path": str(materials / "held_out.jsonl"), "run.keep_best": metric}
    with pytest.raises(ValueError, match=words):
        train(configure("dpo", **held_out))


def test_the_best_needs_an_evaluation(configure):
    with pytest.raises(ValueError, match=r"run\.keep_best eval_loss: nothing is evaluated; set data\.eval_path"):
        train(configure("sft", **{"run.keep_best": "eval_loss"}))
    assert best.direction("eval_rewards/accuracies") == 1 and best.direction("eval_objective/kl") == -1


def test_a_checkpoint_moves_between_layouts_of_ranks(tmp_path):
    """Two replicas with a tensor axis of two, two ranks, one, four; read by all, or by rank 0 for all."""
    assert "equal in every layout" in forks.run(HERE / "ranks_saves.py", tmp_path, ranks=4)


def test_ranks_without_a_common_disk_leave_all_on_that_of_rank_0(configure, tmp_path):
    apart = {"run.shared_disk": False, "run.async_save": True, "run.steps": 4, "run.save_every": 2}
    path = write_yaml(configure("sft", **apart))
    assert "went on" in forks.run(HERE / "ranks_apart.py", path, tmp_path, ranks=2)


def test_an_on_policy_run_goes_on_with_other_ranks(tmp_path):
    """The same completions of the same prompts, rewards and losses to rounding."""
    one, two = (override(on_policy(tmp_path, "grpo", name), {"run.keep": 9}) for name in ("one", "two"))
    two.rewards = one.rewards
    train(one)
    shutil.copytree(one.run.output_dir, two.run.output_dir)
    shutil.rmtree(Path(two.run.output_dir) / "checkpoints" / "step-6")
    shutil.rmtree(Path(two.run.output_dir) / "checkpoints" / "step-4")
    two.run.resume = "auto"
    said = finish(fork(two, ranks=2))
    assert "resume: 1 rank(s) before, 2 now: weights, moments and the position in the data are those of then" in said
    third = [sampled(config.run.output_dir, step=3) for config in (one, two)]
    assert third[0] == third[1] and len(third[0]) > 8
    for mine, theirs in zip(numbers(one.run.output_dir), numbers(two.run.output_dir), strict=True):
        for name in ("loss", "grad_norm", "reward", "completions/mean_length"):  # others tell of micro-batches
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (mine["step"], name)


def sampled(directory: str, step: int) -> list[list[int]]:
    lines = map(json.loads, Path(directory, "samples.jsonl").read_text().splitlines())
    return [line["token_ids"] for line in lines if line["step"] == step]
