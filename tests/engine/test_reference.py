"""Reference log-probs as data: the same numbers and the same order, computed once, and no second model in memory."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastalign.engine import train
from fastalign.ops.attention import choose_backend
from fastalign.parallel.mesh import World
from runs import numbers, records

ALONE = World(0, 1, torch.device("cpu"))
EXAMPLES = 96
LN_2 = float(np.float32(math.log(2)))


@pytest.fixture
def cached(configure, tmp_path):
    """``cached("name")``: a dpo run whose reference log-probs are kept in ``tmp_path/logps``."""

    def make(name: str, **overrides):
        return configure("dpo", name, **{"reference.cache": str(tmp_path / "logps"), **overrides})

    return make


@pytest.fixture
def orders(monkeypatch):
    """The examples of every micro-batch that a step of training saw, in order."""
    seen: list[tuple[int, ...]] = []
    step = train.accumulate_gradients

    def watched(models, batches, *args):
        seen.extend(batch.example_ids for batch in batches)
        return step(models, batches, *args)

    monkeypatch.setattr(train, "accumulate_gradients", watched)
    return seen


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def tally(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """Hits and misses of the last run."""
    record = [r for r in caplog.records if r.msg.startswith("reference: %d examples from")][-1]
    return record.args[0], record.args[2]


def test_cold_warm_and_no_cache_give_the_same_run_to_the_bit(cached, orders, caplog, tmp_path):
    caplog.set_level(logging.INFO, "fastalign")
    seen, runs = {}, {}
    for name, where in (("off", "off"), ("cold", None), ("warm", None)):
        config = cached(name, **({"reference.cache": where} if where else {}))
        train.train(config)
        seen[name], runs[name] = list(orders), config.run.output_dir
        orders.clear()
        if where is None:
            assert tally(caplog) == ((0, 36) if name == "cold" else (36, 0))  # six steps of six pairs, and no more
    assert seen["off"] == seen["cold"] == seen["warm"]
    assert numbers(runs["off"]) == numbers(runs["cold"]) == numbers(runs["warm"])
    assert all(line["t_reference"] == 0 for line in records(runs["warm"]))
    assert records(runs["off"])[0]["t_reference"] > 0


def test_the_first_loss_is_ln_2_to_the_bit_and_no_reference_is_in_memory(cached, monkeypatch):
    config = cached("narrow", **{"run.steps": 2, "batch.tokens": 150})
    train.train(config)  # fills the cache in micro-batches of at most 150 tokens
    jobs = []
    monkeypatch.setattr(train, "run", lambda job, done: jobs.append(job))
    train.train(cached("wide", **{"run.steps": 1, "batch.tokens": 4096, "optim.lr": 0.1}))
    assert jobs[0].models.reference is None
    monkeypatch.undo()
    train.train(cached("again", **{"run.steps": 1, "batch.tokens": 4096, "batch.size": 4}))
    first = records(config.run.output_dir)[0], records(Path(config.run.output_dir).with_name("again"))[0]
    for line in first:
        assert line["loss"] == LN_2
        assert all(line[f"rewards/{name}"] == 0 for name in ("chosen", "rejected", "margins", "accuracies"))


def test_only_what_changes_a_log_prob_is_a_miss(cached, caplog, materials, tmp_path):
    caplog.set_level(logging.INFO, "fastalign")
    whole = {"run.steps": 16}  # one epoch
    train.train(cached("first", **whole))
    assert tally(caplog) == (0, EXAMPLES)
    for number, same in enumerate(({"optim.lr": 0.5}, {"batch.size": 12, "run.steps": 8}, {"batch.tokens": 90})):
        train.train(cached(f"same{number}", **whole | same))
        assert tally(caplog) == (EXAMPLES, 0), same
    chosen = {"model.attention": choose_backend("cpu", torch.float32)}  # what `auto` means
    other = [{"run.seed": 1}, {"model.autocast": True}, {"batch.share_prefix": False}, chosen]
    for number, changed in enumerate(other[1:]):
        train.train(cached(f"other{number}", **whole | changed))
        assert tally(caplog)[0] == (EXAMPLES if changed == chosen else 0), changed
    rows = (materials / "rows.jsonl").read_text().splitlines()
    new = [json.loads(rows[0]) | {"chosen": f"answer {i}"} for i in range(5)]
    (tmp_path / "more.jsonl").write_text("\n".join([*map(json.dumps, new), *rows[::-1]]) + "\n")
    more = {"data.path": str(tmp_path / "more.jsonl"), "batch.size": EXAMPLES + 5, "run.steps": 1}
    train.train(cached("more", **more))
    assert tally(caplog) == (EXAMPLES, 5)
    train.train(cached("seed", **whole | other[0]))  # other initial weights
    assert tally(caplog) == (0, EXAMPLES)
