"""Two ranks over gloo: the same run as one process, and checkpoints that move between the two."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastalign.engine.train import train
from runs import assert_close, finish, fork, numbers

STEPS, MIDDLE = 20, 12


@pytest.mark.slow
def test_two_ranks_agree_with_one_and_resume_to_the_bit(configure, materials, tmp_path):
    held_out = {"data.eval_path": str(materials / "held_out.jsonl"), "run.eval_every": 5}
    settings = {"run.steps": STEPS, "run.save_every": MIDDLE, **held_out}
    one, two, resumed, moved = (configure("dpo", n, **settings) for n in ("one", "two", "resumed", "moved"))
    both = fork(two, ranks=2)
    train(one)
    assert finish(both).count("\nwrites to ") == 1  # the main rank alone tells of the run
    assert_close(one.run.output_dir, two.run.output_dir, tolerance=1e-5)
    same_model(one.run.output_dir, two.run.output_dir)

    for config in (resumed, moved):
        shutil.copytree(two.run.output_dir, config.run.output_dir)
        shutil.rmtree(Path(config.run.output_dir) / "checkpoints" / f"step-{STEPS}")
        config.run.resume = True
    again = fork(resumed, ranks=2)
    train(moved)  # a checkpoint of two ranks, gone on with by one
    finish(again)
    assert numbers(resumed.run.output_dir) == numbers(two.run.output_dir)
    assert_close(moved.run.output_dir, two.run.output_dir, tolerance=1e-5)


def same_model(run: str, other: str) -> None:
    """Both exports load and hold the same weights, to the rounding of twenty updates."""
    mine, theirs = (load_file(Path(directory) / "model" / "model.safetensors") for directory in (run, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(Path(other) / "model")


def test_the_mesh_must_have_as_many_ranks_as_were_launched(configure):
    with pytest.raises(ValueError, match=r"dp_replicate 1 x dp_shard 2 does not make the 1 rank\(s\) launched"):
        train(configure("sft", **{"parallel.dp_shard": 2}))
