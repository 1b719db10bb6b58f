"""Sampling beside transformers, and the call that measures it on a GPU."""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import gpu
from bench.__main__ import main as bench


def test_the_parts_of_the_gpu_call_are_commands_that_exist():
    for part in (*gpu.PARTS, *gpu.ON_POLICY, *gpu.QUICK):
        words = part.words.replace("DEVICE", "cpu").split()
        if words[:2] == ["-m", "bench"]:
            parser = argparse.ArgumentParser()
            importlib.import_module(f"bench.{words[2]}").arguments(parser)
            parser.parse_args(words[3:])
    assert sum(part.seconds for part in gpu.ON_POLICY) < 240


def test_rollouts_are_timed_beside_transformers(tmp_path, capsys):
    words = ["--prompts", "1", "--answers", "2", "--tokens", "3", "--rounds", "1", "--record", "--results"]
    assert bench(["rollout", "--device", "cpu", *words, str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rollout.json").read_text().splitlines()]
    assert {"fastalign", "transformers generate"} <= {row["side"] for row in rows}
    assert all(row["tokens_per_cpu_second"][1] > 0 for row in rows)
    assert "2 answers of 3 tokens, 9m-parameter Llama, float32, cpu" in capsys.readouterr().out
