"""The benchmarks of single parts of a step, on toy sizes: what is compared is the same computation."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import ablation, common, ladder, learn, overlap, sharing, workload
from bench.ablation import lines
from bench.workload import Workload
from fastalign.arguments import parse_config
from fastalign.config import ModelConfig
from fastalign.models.load import load_policy

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def toy_pairs(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    texts = [
        " ".join(draw.choices(["alpha", "beta", "gamma", "delta"], k=draw.randint(2, 9))) for _ in range(3 * count)
    ]
    return [{"prompt": a, "chosen": f" {b}", "rejected": f" {c}"} for a, b, c in zip(*[iter(texts)] * 3, strict=True)]


@pytest.mark.parametrize("dtype, apart", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_every_line_of_the_ablation_trains_the_same(tmp_path, dtype, apart):
    sizes = {"max_length": 32, "vocab_size": 300, "hidden_size": 64, "layers": 1, "lr": 1e-2}
    work = Workload(str(tmp_path), steps=4, warmup=1, examples=3, threads=torch.get_num_threads(), dtype=dtype, **sizes)
    workload.prepare(work, toy_pairs(40))
    rows = ablation.figures(ablation.measure(work))
    assert [row["line"] for row in rows] == [line.name for line in lines()] and len(rows) == 8
    losses = rows[0]["losses"]
    assert len(losses) == 4 and max(losses) - min(losses) > 0.01, "the models learn"
    assert all(row["max_distance"] <= apart for row in rows)
    assert rows[-1]["held_mib"] < rows[0]["held_mib"], "a known reference is not in memory"


def test_each_line_of_the_ablation_changes_one_thing():
    for before, after in zip(lines(), lines()[1:], strict=False):
        changed = [name for name, value in vars(after).items() if value != getattr(before, name) and name != "name"]
        assert len(changed) == 1 and replace(before, **{changed[0]: True}, name=after.name) == after


@pytest.mark.parametrize("rung", [*ladder.RUNGS][-1:])
def test_a_rung_of_the_memory_ladder_is_measured(rung, monkeypatch):
    monkeypatch.setitem(ladder.MODELS, "tiny", TINY)
    row = ladder.measure(rung, SimpleNamespace(model="tiny", tokens=512, steps=1))
    assert row["peak_mib"] > 0 and row["cpu_s"] > 0


def test_what_lies_beside_computation_is_its_share_of_a_profile():
    spans = [("_Linear", 1, 0, 4), ("aten::mm", 1, 1, 3), ("packing", 2, 3, 5), ("aten::cat", 2, 3, 5)]
    spans += [("gloo:all_gather", 3, 2, 6), ("gloo:all_reduce", 3, 7, 8), ("c10d::allreduce_", 1, 7, 8)]
    times = [SimpleNamespace(start=1e6 * start, end=1e6 * end) for *_, start, end in spans]
    events = [SimpleNamespace(name=s[0], thread=s[1], time_range=x) for s, x in zip(spans, times, strict=True)]
    found = overlap.shares(events)
    assert found["step"] == 8 and found["computing"] == 5
    assert found["parts"] == {
        "packing": {"seconds": 2, "beside": 0.5},
        "gathers": {"seconds": 4, "beside": 0.75},
        "reductions": {"seconds": 1, "beside": 0},
    }


@pytest.mark.parametrize("size", [2, 3])
def test_sharing_is_timed_on_equal_losses(size):
    config = {"model_type": "llama", "vocab_size": 97, "max_position_embeddings": 64, "num_key_value_heads": 1, **TINY}
    policy = load_policy(ModelConfig(config=config)).train()
    case = sharing.Case(prompt=12, response=4, size=size, groups=2)
    row = sharing.figures(policy, case, sharing.measure(policy, case, rounds=1, autocast=False))
    assert row["token_ratio"] == pytest.approx(size * 16 / (12 + size * 4))
    assert 1 < row["operations_ratio"] < row["token_ratio"]
    with pytest.raises(ValueError, match="the loss with shared prompts is"):
        sharing.check({True: 1.0, False: 1.1}, autocast=False)


def test_what_learns_is_held_to_the_goal_and_a_collapse_to_its_alarm(capsys):
    def row(case, sampled, *alarms):
        shares = {"before": {"sampled": 0.5, "greedy": 0.7}, "after": {"sampled": sampled, "greedy": 0.8}}
        times = {"seconds": 60.0, "cpu_seconds": 80.0, "steps": 300}
        return {"case": case, "seed": 0, "alarms": list(alarms), **shares, **times}

    slow = row("rloo", 0.8) | {"cpu_seconds": 181.0, "before": {"sampled": 0.5, "greedy": 0.9}}
    assert learn.missed([slow]) == [
        "rloo, seed 0: greedy answers fell from 0.900 to 0.800",
        "rloo, seed 0: 181 CPU-seconds, the goal is 180",
    ]
    rows = [row("grpo", 0.8), row("ppo", 0.7), row("raft", 0.8, "step 3: kl"), row("collapse-lr", 0.1)]
    assert learn.missed([*rows, row("collapse-seed", 0.3, "step 3: val/ratio_max")]) == [
        "ppo, seed 0: 0.700 sampled, the goal is 0.75",
        "raft, seed 0: learned with an alarm: step 3: kl",
        "collapse-lr, seed 0: collapsed without an alarm",
    ]
    learn.show(rows, threads=2)
    assert "0.500 -> 0.800" in capsys.readouterr().out
    for case in learn.CASES.values():
        parse_config(case.method, ["--config", str(learn.EXAMPLES / f"{case.file}.yaml"), *case.flags])


def test_runs_of_the_same_settings_are_taken_over(tmp_path, monkeypatch):
    def keep(case, seed, **changes):
        row = {"case": case, "seed": seed, "settings": {**learn.settings(learn.CASES[case]), **changes}}
        common.record("learn", [row], {"time": str(seed)}, tmp_path)

    keep("grpo", 0)
    keep("grpo", 1, flags=["--optim.lr", "1"])
    keep("raft", 1)
    keep("raft", 3)
    known = learn.recorded(["grpo", "raft"], 3, tmp_path)
    assert set(known) == {("grpo", 0), ("raft", 1)}
    made = []
    monkeypatch.setattr(learn, "train", lambda method, file, out, *rest: made.append(out.name) or {})
    monkeypatch.setattr(learn, "judge", lambda model: {"sampled": 0.5})
    rows = list(learn.measure(["grpo", "raft"], 2, 1, tmp_path, known))
    assert made == ["sft-0", "raft-0", "sft-1", "grpo-1"], "nothing is made twice, and no start without a run"
    assert [(row["case"], row["seed"]) for row in rows] == [("raft", 0), ("grpo", 1)]


def test_turns_are_cut_at_the_last_answer():
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": f"{prompt} d", "rejected": f"{prompt} e"}
    assert workload.split_turns(row) == {"prompt": prompt, "chosen": " d", "rejected": " e"}
    assert workload.split_turns({**row, "rejected": "\n\nHuman: x\n\nAssistant: e"}) is None
