"""Reference log-probs as data: the same numbers and the same order, computed once, and no second model in memory."""

import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastalign.config import ModelConfig
from fastalign.data.ref_cache import KEY_BYTES, RefCache, example_key
from fastalign.engine import train
from fastalign.engine import update as updates
from fastalign.engine.errors import RunError
from fastalign.engine.evaluate import evaluate_model
from fastalign.engine.output.generators import rng_state
from fastalign.engine.reference import cache as filling
from fastalign.engine.reference import frozen as reference
from fastalign.engine.reference.cache import Demand, Filling, cannot_share, look_up, missing_examples, open_cache
from fastalign.engine.reference.fingerprint import computation, fingerprint, hash_files, origin_of
from fastalign.engine.reference.precompute import precompute
from fastalign.engine.setup import load_data
from fastalign.models.load import load_policy, save_pretrained
from fastalign.ops import dispatch
from fastalign.parallel.mesh import Axis, World
from runs import LLAMA, finish, fork, numbers, records

ALONE = World(Axis(), torch.device("cpu"))
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
    step = updates.accumulate_gradients

    def watched(models, batches, *args):
        seen.extend(batch.example_ids for batch in batches)
        return step(models, batches, *args)

    monkeypatch.setattr(updates, "accumulate_gradients", watched)
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
    monkeypatch.setattr(train, "run", lambda job, *rest: jobs.append(job))
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
    auto = {"model.attention": dispatch.choose_attention(None, "cpu", torch.float32)}
    same = {"optim.lr": 0.5}, {"batch.size": 12, "run.steps": 8}, {"batch.tokens": 90}, auto
    other = {"run.seed": 1}, {"model.autocast": True}, {"batch.share_prefix": False}
    for number, changed in enumerate(({}, *same, *other)):
        train.train(cached(f"run{number}", **whole | changed))
        assert tally(caplog) == ((EXAMPLES, 0) if changed in same else (0, EXAMPLES)), changed
    rows = (materials / "rows.jsonl").read_text().splitlines()
    new = [json.loads(rows[0]) | {"chosen": f"answer {i}"} for i in range(5)]
    (tmp_path / "more.jsonl").write_text("\n".join([*map(json.dumps, new), *rows[::-1]]) + "\n")
    train.train(
        cached("more", **{"data.path": str(tmp_path / "more.jsonl"), "batch.size": EXAMPLES + 5, "run.steps": 1})
    )
    assert tally(caplog) == (EXAMPLES, 5)


def test_the_fingerprint_is_the_files_and_the_architecture(tmp_path):
    def of(path, **options):
        section = ModelConfig(path=str(path), **options)
        return fingerprint(load_policy(section), origin_of(section, 0, ALONE, adapted=False))

    policy = load_policy(ModelConfig(config={**LLAMA, "vocab_size": 64}))
    model, copy = (save_pretrained(policy, None, tmp_path / name) for name in ("model", "copy"))
    before = of(model)
    assert of(copy, attention="sdpa") == before != of(model, dtype="bfloat16")
    file, found = copy / "model.safetensors", {before}
    data = bytearray(file.read_bytes())
    for place in (-1, len(data) // 2):
        data[place] ^= 1  # one bit of one number
        file.write_bytes(data)
        found.add(of(copy))
    file.write_bytes((model / file.name).read_bytes())
    assert of(copy) == before and len(found) == 3
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-4}))
    assert of(copy) not in found


def test_every_rank_hashes_its_share_of_the_files(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(range(100)))
    monkeypatch.setattr("fastalign.engine.reference.fingerprint.PIECE", 30)
    read = []

    class One(World):
        def gather_objects(self, value):
            read.append(value)
            return read if self.rank == 1 else [value]

    hash_files(files, One(Axis(0, 2), ALONE.device))
    both = hash_files(files, One(Axis(1, 2), ALONE.device))
    assert [sorted(part) for part in read] == [[0, 2, 4, 6], [1, 3, 5, 7]] and both == hash_files(files, ALONE)


def test_how_log_probs_are_computed_is_part_of_their_place():
    policy = load_policy(ModelConfig(config={**LLAMA, "vocab_size": 64}))
    usual = {"autocast": False, "share_prefix": True, "temperature": 1.0}
    others = [{}, {"autocast": True}, {"share_prefix": False}, {"temperature": 0.7}]
    found = [computation(policy, ALONE, **usual | other) for other in others]
    two = World(Axis(0, 2), torch.device("cpu"))
    assert computation(policy, two, **usual) == found[0]
    assert len({*found, computation(policy, two, **usual | {"autocast": True})}) == 5  # FSDP gathers bf16


def test_filling_draws_from_no_generator(cached, monkeypatch):
    states = []
    fill = reference.fill

    def watched(*args):
        states.append(rng_state())
        fill(*args)
        states.append(rng_state())

    monkeypatch.setattr(reference, "fill", watched)
    train.train(cached("run"))
    assert states[0] == states[1]


def test_auto_fills_where_that_is_less_work(configure, monkeypatch, tmp_path):
    def opened(uses: int, where: str = "auto", directory: str = "cache") -> Filling | None:
        config.reference.cache, config.data.cache_dir = where, str(tmp_path / directory)
        return open_cache(config, "space", [Demand(dataset, range(20), uses)], policy, ALONE)

    config = configure("dpo")
    tokenizer, dataset, _ = load_data(config)
    policy = load_policy(config.model, tokenizer=tokenizer)
    assert opened(20) is None and opened(20, "off") is None  # a single pass is the same work either way
    twice = opened(40)
    assert twice is not None and twice.misses == 20 and twice.hits == 0
    assert opened(20, str(tmp_path / "named")) is not None
    monkeypatch.setattr(filling, "is_memory_short", lambda *_: True)
    assert opened(20) is not None
    monkeypatch.undo()
    twice.store.write({key: np.zeros(1) for key in twice.keys[:5]})
    warm = opened(20)
    assert warm is not None and (warm.hits, warm.misses) == (5, 15)
    assert opened(18) is None
    (tmp_path / "file").write_text("")
    assert opened(40, directory="file") is None  # nothing can be written there: a run goes on without
    with pytest.raises(OSError, match=r"cannot be written .*: set reference.cache to a directory that"):
        opened(40, str(tmp_path / "file"))


def test_auto_counts_the_mismatched_completions_on_both_sides(configure, tmp_path):
    config = configure("dpo", **{"data.cache_dir": str(tmp_path)})
    tokenizer, pairs, _ = load_data(config)
    policy = load_policy(config.model, tokenizer=tokenizer)

    class Mismatched:
        """Single sequences, each with another one that is scored beside it."""

        def __len__(self):
            return len(pairs)

        def fetch(self, indices):
            one, other = ([replace(x, sequences=x.sequences[i : i + 1]) for x in pairs.fetch(indices)] for i in (0, 1))
            return [replace(x, mismatched=y) for x, y in zip(one, other, strict=True)]

    def opened(uses):
        return open_cache(config, "space", [Demand(Mismatched(), range(20), uses)], policy, ALONE)

    twice = opened(40)
    assert opened(20) is None and twice is not None and twice.misses == 40


class Main(World):
    """The first of two ranks; what it sends is kept."""

    def gather_objects(self, value):
        return [value, value]

    def broadcast(self, values):
        sent.append(values.clone())
        return values


class Other(Main):
    """The second, which is sent what was kept."""

    def broadcast(self, values):
        return values.copy_(sent.pop(0))


sent: list[torch.Tensor] = []


def test_the_main_rank_looks_up_and_sends_a_bit_for_each_example(configure, monkeypatch, tmp_path):
    dataset = load_data(configure("dpo"))[1]
    demands = [Demand(dataset, range(20), 20), Demand(dataset, [3, 70, 70], 3, "held-out examples")]
    store = RefCache(tmp_path)
    store.write({example_key(example): np.zeros(1) for example in dataset.fetch([0, 5, 70])})
    store.refresh()
    main = look_up(store, demands, Main(Axis(0, 2), ALONE.device))
    assert (main.count, main.hits, main.misses, len(main.keys)) == (21, 3, 18, 21)
    assert [np.flatnonzero(~each).tolist() for each in main.missing] == [[0, 5], [0, 1, 2]]  # the 3 comes first above
    assert sum(values.nbytes for values in sent) == 8 + 3
    missing = list(missing_examples(main))
    with monkeypatch.context() as patch:
        patch.setattr(filling, "example_key", None)
        other = look_up(store, demands, Other(Axis(1, 2), ALONE.device))
    assert other.count == 21 and not other.keys and not sent
    for (mine, keys), (theirs, same) in zip(missing, missing_examples(other), strict=True):
        assert keys == same and [e.example_id for e in mine] == [e.example_id for e in theirs] == list(range(18))


def test_what_one_rank_does_not_see_is_missing(configure, tmp_path):
    class Later(World):
        def gather_objects(self, value):
            return [value, value[:1]]

    dataset = load_data(configure("dpo"))[1]
    for i in (0, 1):
        RefCache(tmp_path).write({example_key(example): np.zeros(1) for example in dataset.fetch([i])})
    store = RefCache(tmp_path)
    found = look_up(store, [Demand(dataset, range(4), 4)], Later(Axis(0, 2), ALONE.device))
    assert found.misses == 3 and (found.hits, len(store)) == (1, 2)


def test_a_directory_that_can_be_shared_is_left_empty(tmp_path):
    assert cannot_share(tmp_path / "here", ALONE) is None
    assert not list((tmp_path / "here").iterdir())


def test_a_cache_of_something_else_is_refused(cached, tmp_path):
    train.train(cached("first"))
    (shard,) = shards(tmp_path / "logps")
    cache = RefCache(shard.parent)
    keys = [key.ljust(KEY_BYTES, b"\0") for key in cache._keys.tolist()]
    wrong = dict(zip(keys, (logps + 1 for logps in cache.read(keys)), strict=True))
    shard.unlink()
    cache.write(wrong)
    with pytest.raises(RunError, match="cached reference log-probs differ by 1 from computed ones"):
        train.train(cached("second"))


def test_whole_distributions_are_never_kept(cached, monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(train, "run", lambda job, *rest: jobs.append(job))
    train.train(cached("tdpo", **{"loss.name": "tdpo2"}))
    assert jobs[0].models.reference is not None and not (tmp_path / "logps").exists()
    with pytest.raises(ValueError, match="reads whole distributions of its reference: there are no log-probs to keep"):
        precompute(cached("tdpo", **{"loss.name": "tdpo2"}))
    with pytest.raises(ValueError, match="reads no reference"):
        precompute(cached("simpo", **{"loss.name": "simpo"}))


def test_evaluation_reads_the_cache_also_of_another_reference(cached, caplog, tmp_path):
    caplog.set_level(logging.INFO, "fastalign")
    config = cached("run")
    policy = load_policy(config.model, tokenizer=load_data(config)[0], seed=5)
    save_pretrained(policy, load_data(config)[0], tmp_path / "other")
    config.reference.path = str(tmp_path / "other")
    online = cached("online", **{"reference.path": config.reference.path, "reference.cache": "off"})
    expected = evaluate_model(online)
    assert expected["rewards/margins"] != 0
    for counted in ((0, EXAMPLES), (EXAMPLES, 0)):
        assert evaluate_model(config) == expected
        assert tally(caplog) == counted
    train.train(config)
    assert tally(caplog) == (36, 0)
    train.train(online)
    assert numbers(config.run.output_dir) == numbers(online.run.output_dir)


def test_the_command_on_two_ranks_beside_a_process_that_is_killed(cached, materials, caplog, tmp_path):
    held_out = {"data.eval_path": str(materials / "held_out.jsonl"), "run.eval_every": 3}
    shared, alone = cached("shared", **held_out), cached("alone", **held_out)
    alone.reference.cache = str(tmp_path / "alone logps")
    killed, both = fork(shared, words=("ref-logps",)), fork(shared, ranks=2, words=("ref-logps", "dpo"))
    while not list((tmp_path / "logps").glob("*/*")) and killed.poll() is None:
        time.sleep(0.01)  # until one of them has begun to write
    killed.kill()
    killed.communicate()
    for summary in (finish(both), precompute(alone)):
        assert f"{EXAMPLES + 16} examples, " in summary and " tokens: " in summary and " bytes in " in summary
    theirs, mine = (RefCache(next(folder.iterdir())) for folder in (tmp_path / "logps", tmp_path / "alone logps"))
    assert mine.directory.name == theirs.directory.name and len(mine) == len(theirs) == EXAMPLES + 16
    keys = [key.ljust(KEY_BYTES, b"\0") for key in mine._keys.tolist()]
    assert all(map(np.array_equal, mine.read(keys), theirs.read(keys)))
    caplog.set_level(logging.INFO, "fastalign")
    train.train(shared)
    assert tally(caplog) == (36 + 16, 0)
    train.train(cached("off", **held_out, **{"reference.cache": "off"}))
    assert numbers(shared.run.output_dir) == numbers(tmp_path / "off")


def test_a_filling_that_was_stopped_goes_on_and_a_damaged_shard_is_made_again(cached, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(filling, "WINDOW", 12)
    monkeypatch.setattr(filling, "SHARD_SECONDS", 0.0)  # a shard per window
    monkeypatch.setattr(filling, "share", stop_after(7, filling.share))
    with pytest.raises(KeyboardInterrupt):
        train.train(cached("stopped", **{"run.steps": 16}))
    monkeypatch.undo()
    caplog.set_level(logging.INFO, "fastalign")
    train.train(cached("again", **{"run.steps": 16}))
    assert tally(caplog) == (7 * 12, EXAMPLES - 7 * 12)
    victim = shards(tmp_path / "logps")[3]
    lost = len(load_file(victim)["keys"])
    victim.write_bytes(victim.read_bytes()[:-4])
    train.train(cached("mended", **{"run.steps": 16}))
    assert tally(caplog) == (EXAMPLES - lost, lost)
    assert numbers(tmp_path / "again") == numbers(tmp_path / "mended")


def stop_after(times: int, function):
    """The function, which is interrupted at its next call after so many."""
    calls = []

    def stopped(*args):
        if len(calls) == times:
            raise KeyboardInterrupt
        calls.append(args)
        return function(*args)

    return stopped


@pytest.mark.parametrize(("method", "loss"), [("kto", "kto"), ("kto", "bco"), ("dpo", "aot"), ("dpo", "ipo")])
def test_losses_read_the_cache_as_they_read_a_reference(cached, method, loss, tmp_path):
    for name, where in (("kept", {}), ("online", {"reference.cache": "off"})):
        config = cached(name, **{"loss.name": loss, "run.steps": 2, **where})
        config.method = method
        train.train(config)
    assert numbers(tmp_path / "kept") == numbers(tmp_path / "online")


def test_a_rank_without_work_needs_no_reference_either(cached, tmp_path):
    online, kept = (cached(name, **{"batch.size": 1, "loss.name": "kto"}) for name in ("online", "kept"))
    online.method = kept.method = "kto"
    online.reference.cache = "off"
    both = fork(kept, ranks=2)  # one example per step
    train.train(online)
    finish(both)
    for mine, theirs in zip(records(kept.run.output_dir), records(online.run.output_dir), strict=True):
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-4)
