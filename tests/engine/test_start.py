"""The start of a run: what a rank holds, and that weights do not depend on how they came there."""

import json
import re
import shutil
from pathlib import Path

import forks
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastalign.config import ModelConfig
from fastalign.engine.train import train
from fastalign.models.load import load_policy, save_pretrained
from runs import LLAMA, assert_close, finish, fork, write_yaml

LAYERS = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 8}
LAYERS |= {"num_key_value_heads": 8, "vocab_size": 512, "tie_word_embeddings": True}
HALF = 0.5
"""What one of two ranks has of a model."""


def test_sharded_first_the_weights_are_those_of_one_process(materials, tmp_path):
    shutil.copytree(materials / "tokenizer", tmp_path / "tokenizer")
    output = finish(forks.Forked(Path(__file__).with_name("ranks_start.py"), tmp_path, ranks=2))
    assert output.count("equal: ") == 19, output


def test_no_rank_holds_a_whole_model(configure, materials, tmp_path):
    """Two models of 46M weights are loaded: of each a rank has its half, and of one a layer for as long as it runs.

    A layer, 0.124 of a model, is there twice: in FSDP's buffer, and first in the one where gloo puts its parts
    together, as `all_gather_into_tensor` needs as much again as it gathers, then where it computes from. That makes
    0.75; 0.05 more, measured, is freed memory that malloc keeps. The second model is verified beside the first one's
    half.
    """
    tokenizer = AutoTokenizer.from_pretrained(materials / "tokenizer")
    files = []
    for name, sizes in (("small", {**LLAMA, "vocab_size": 512}), ("large", LAYERS)):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"model_type": "llama", **sizes}))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        path = {"model.path": str(tmp_path / name), "reference.path": str(tmp_path / name), "reference.cache": "off"}
        files.append(write_yaml(configure("dpo", f"run-{name}", **path, **{"batch.size": 2, "model.config": None})))
    output = finish(forks.Forked(Path(__file__).with_name("ranks_memory.py"), *files, ranks=2))
    for rank in (0, 1):
        numbers = re.search(rf"rank {rank}: (.*)", output)
        assert numbers is not None, output
        grown = json.loads(numbers[1])
        layer, policy, both = (grown[key] / grown["whole"] for key in ("layer", "policy", "both"))
        assert policy < 0.7 + layer and both < HALF + 0.7 + layer, grown


def test_two_ranks_train_as_one_from_a_directory(configure, materials, tmp_path):
    """An adapter that does not start at zero, over tied embeddings that it trains a copy of, and resumed."""
    policy = load_policy(ModelConfig(config={**LLAMA, "tie_word_embeddings": True}), vocab_size=512)
    path = str(save_pretrained(policy, AutoTokenizer.from_pretrained(materials / "tokenizer"), tmp_path / "base"))
    lora = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "modules_to_save": ["embed_tokens"]}
    settings = {"model.path": path, "model.config": None, "run.steps": 4, "run.save_every": 2, "reference.cache": "off"}
    one, two = (configure("dpo", name, **settings, **{"model.lora": lora}) for name in ("one", "two"))
    both = fork(two, ranks=2)
    train(one)
    finish(both)
    assert_close(one.run.output_dir, two.run.output_dir, tolerance=1e-5)
    shutil.rmtree(Path(two.run.output_dir) / "checkpoints" / "step-4")
    shutil.rmtree(Path(two.run.output_dir) / "model")
    two.run.resume = True
    assert "resumed from" in finish(fork(two, ranks=2))
    assert_close(one.run.output_dir, two.run.output_dir, tolerance=1e-5)
