"""Two ranks over gloo: the same run as one process, and checkpoints that move between the two."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from test_resume_onpolicy import configure as onpolicy_run
from transformers import AutoModelForCausalLM

from fastalign.engine import train as engine
from fastalign.engine.output import export
from fastalign.engine.train import train
from fastalign.parallel.mesh import world
from runs import assert_close, finish, fork, numbers, write_yaml

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


@pytest.mark.slow
def test_split_layers_train_like_one_process_and_resume_to_the_bit(configure):
    settings = {"run.save_every": 4, "reference.cache": "off", "reference.offload": True}
    one, split, resumed = (configure("dpo", n, **settings) for n in ("one", "split", "resumed"))
    split.parallel.tp = resumed.parallel.tp = 2
    both = fork(split, ranks=2)
    train(one)
    assert "2 ranks (dp_replicate 1 x dp_shard 1 x tp 2)" in finish(both)
    assert_close(one.run.output_dir, split.run.output_dir, tolerance=1e-5)
    same_model(one.run.output_dir, split.run.output_dir)

    shutil.copytree(split.run.output_dir, resumed.run.output_dir)
    shutil.rmtree(Path(resumed.run.output_dir) / "checkpoints" / "step-6")
    resumed.run.resume = True
    finish(fork(resumed, ranks=2))
    assert numbers(resumed.run.output_dir) == numbers(split.run.output_dir)


@pytest.mark.slow
def test_split_layers_sample_what_one_process_does(tmp_path):
    one, split = (onpolicy_run(tmp_path, "grpo", name) for name in ("one", "split"))
    one.run.steps = split.run.steps = 2
    split.parallel.tp = 2
    both = fork(split, ranks=2)
    train(one)
    output = finish(both)
    assert "as training splits layers over 2 ranks (parallel.tp) and sampling has them whole" in output
    alone, together = (
        [json.loads(line) for line in (Path(config.run.output_dir) / "samples.jsonl").open()] for config in (one, split)
    )
    assert [line["completion"] for line in alone] == [line["completion"] for line in together]
    for mine, theirs in zip(numbers(one.run.output_dir), numbers(split.run.output_dir), strict=True):
        for key in ("loss", "grad_norm", "reward", "entropy", "num_tokens"):
            assert abs(mine[key] - theirs[key]) <= 1e-5 * max(1.0, abs(mine[key])), (mine["step"], key)
        assert (mine["sampling/exact"], theirs["sampling/exact"]) == (1.0, 0.0)


def same_model(run: str, other: str) -> None:
    """Both exports load and hold the same weights, to the rounding of twenty updates."""
    mine, theirs = (load_file(Path(directory) / "model" / "model.safetensors") for directory in (run, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(Path(other) / "model")


def test_ranks_that_do_not_have_the_same_are_refused(configure, materials, tmp_path):
    """Directories, settings, rows, weights; the mistakes of nodes without a common disk."""
    config = configure("dpo", **{"run.steps": 1})
    for rank in (0, 1):
        (tmp_path / f"home-{rank}").mkdir()
        lines = (materials / "rows.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"home-{rank}" / "rows.jsonl").write_text("".join(lines[rank:]))
    script = Path(__file__).with_name("ranks_common.py")
    said = forks.run(script, write_yaml(config), tmp_path, ranks=2, timeout=100)
    by_case = {}
    for case, text in sorted(re.findall(r"^(directory|settings|rows|weights|cache|late) (.*)$", said, re.MULTILINE)):
        by_case.setdefault(case, []).append(text)
    homes = [tmp_path / f"home-{rank}" for rank in (0, 1)]
    expected = {
        "directory": r"^run\.output_dir run is not one directory for all ranks: "
        rf"rank 0 on \S+ writes to {homes[0]}/run, and rank 1 on \S+ does not see that in {homes[1]}/run; "
        r"set run\.output_dir to an absolute path on a disk that all ranks share, or run\.shared_disk to false$",
        "settings": r"^optim\.lr is 0\.001 for rank 0 on \S+, 0\.002 for rank 1 on \S+: start every rank with the same",
        "rows": r"^rank 1 on \S+ made other tokens of its rows than rank 0 on \S+; give every rank the same data",
        "weights": r"^rank 1 on \S+ loaded other weights from model\.path than rank 0 on \S+; give every rank the same",
        "cache": r"^the reference cache is not one directory for all ranks "
        rf"\(rank 0 on \S+ writes to {homes[0]}/logps, and rank 1",
    }
    for case, words in expected.items():
        ours, theirs = by_case.pop(case)
        assert ours == theirs and re.search(words, ours), (case, ours, theirs)
    (late,) = by_case.pop("late")
    assert not by_case and re.search(
        r"^rank 0 has waited 0\.005 minutes \(parallel\.timeout_minutes\) for another", late
    )
    assert not (homes[1] / "run").exists()


def test_the_model_is_written_when_nobody_waits_for_the_main_rank_any_more(configure, monkeypatch):
    """A slow disk would keep the others waiting until they give up."""
    told = []

    @contextmanager
    def followed(parallel):
        with world(parallel) as ranks:
            yield ranks
        told.append("the ranks have parted")

    for name in ("save_pretrained", "write_report"):
        call = getattr(export, name)
        monkeypatch.setattr(export, name, lambda *args, name=name, call=call: (told.append(name), call(*args))[1])
    monkeypatch.setattr(engine, "world", followed)
    train(configure("sft", **{"run.steps": 1}))
    assert told == ["the ranks have parted", "save_pretrained", "write_report"]


def test_the_mesh_must_have_as_many_ranks_as_were_launched(configure):
    with pytest.raises(ValueError, match=r"dp_replicate 1 x dp_shard 2 x tp 1 does not make the 1 rank\(s\) launched"):
        train(configure("sft", **{"parallel.dp_shard": 2}))
