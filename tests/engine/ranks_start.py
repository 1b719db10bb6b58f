"""Run under torchrun with a folder: models that are sharded before their weights are read are those that are not."""

import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from steps import make_examples
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from fastalign.config import Config, ModelConfig, ParallelConfig
from fastalign.data.pack import build_batch
from fastalign.engine import loading
from fastalign.engine.loading import Start, load
from fastalign.engine.methods import make_objective
from fastalign.engine.reference.frozen import sharded_copy
from fastalign.models.load import load_policy, save_pretrained
from fastalign.ops import linear_logps
from fastalign.parallel.mesh import world
from runs import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TIED = {**LLAMA, "tie_word_embeddings": True}
LORA = {"r": 2, "target_modules": ["q_proj"]}
RANDOM = {**LORA, "init_lora_weights": False}
COPIED = ("tied", "adapter", "an adapter in half", "a random adapter with norms", "norms")
"""Models of which a frozen copy is made as well."""
SIZE = 61
"""Rows of the vocabulary: two ranks do not share them evenly."""


def save(folder: Path) -> None:
    """Directories of models, by the main rank."""
    for name, config in {"llama": LLAMA, "tied": TIED, "gpt2": GPT2}.items():
        policy = load_policy(ModelConfig(config=config), vocab_size=SIZE, seed=1)
        policy.model.generation_config.temperature = 0.5
        policy.model.generation_config.do_sample = True
        save_pretrained(policy, None, folder / name)
    policy.model.save_pretrained(folder / "pieces", max_shard_size="20KB")
    policy.backbone.save_pretrained(folder / "headless")
    shutil.copytree(folder / "llama", folder / "bin")
    torch.save(load_file(folder / "bin" / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    half = load_policy(ModelConfig(config=TIED, dtype="bfloat16"), vocab_size=SIZE, seed=1)
    save_pretrained(half, None, folder / "half")
    adapted = ModelConfig(path=str(folder / "llama"), lora={**RANDOM, "bias": "all", "modules_to_save": ["lm_head"]})
    save_pretrained(load_policy(adapted), None, folder / "adapter")


def cases(folder: Path) -> dict[str, tuple[ModelConfig, str | None]]:
    """Sections by name, with what is said of those that are loaded whole."""

    def at(name: str, **options) -> ModelConfig:
        return ModelConfig(path=str(folder / name), **options)

    def new(**options) -> ModelConfig:
        return ModelConfig(config={**TIED, "vocab_size": SIZE}, **options)

    both = {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}
    sections = {name: at(name) for name in ("llama", "tied", "gpt2", "pieces", "headless", "half", "adapter")}
    sections |= {f"{name} in half": at(name, dtype="bfloat16") for name in ("tied", "adapter")}
    sections["llama, more tokens"] = at("llama", resize_embeddings=True)
    sections["tied, more tokens"] = at("tied", resize_embeddings=True)
    sections["more tokens that train"] = at("llama", resize_embeddings=True, lora=both)
    sections["an adapter in half"] = at("llama", lora=both, dtype="bfloat16")
    sections["random weights"] = new(dtype="bfloat16")
    sections["a random adapter"] = new(lora=RANDOM)
    sections["a random adapter with norms"] = new(lora={**RANDOM, "use_dora": True})
    found = {name: (section, None) for name, section in sections.items()}
    found["scores"] = at("llama"), None
    found["no safetensors"] = at("bin"), "it has no safetensors files"
    found["norms"] = at("llama", lora={**LORA, "use_dora": True}), "DoRA starts from the norms of the weights"
    return found


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def places(policy) -> list[tuple[str, str]]:
    """Every name of a parameter, with the first name of the same one."""
    first = {id(p): name for name, p in policy.named_parameters()}
    return [(name, first[id(p)]) for name, p in policy.named_parameters(remove_duplicate=False)]


def compare(name: str, start: Start, section: ModelConfig, scalar: bool) -> None:
    known = {"tokenizer": start.tokenizer, "seed": start.config.run.seed, "scalar_head": scalar}
    alone, mine = load_policy(section, **known), load(start, section, scalar_head=scalar)
    models = {"itself": mine}
    if name in COPIED:
        models["its copy"] = sharded_copy(replace(start, config=replace(start.config, model=section)), mine)
    for which, policy in models.items():
        assert places(policy) == places(alone), (name, which)
        tensors = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
        wanted = {**dict(alone.named_parameters()), **dict(alone.named_buffers())}
        for key, want in wanted.items():
            x = tensors[key]
            assert x.dtype == want.dtype and torch.equal(whole(x.detach()), want.detach()), (name, which, key)
            assert x.requires_grad == (want.requires_grad and which == "itself"), (name, which, key)
        batch = build_batch(make_examples("sft", "sft")[:3], True)
        if not scalar:
            with torch.no_grad():
                logps = [model(batch, linear_logps) for model in (policy, alone)]
            torch.testing.assert_close(*logps, msg=f"{name} {which}")
    for got, want in zip(written(mine), written(alone), strict=True):
        assert got == want, (name, got, want)


def written(policy) -> list:
    """What is saved of a policy beside its tensors, and the mode of each of its modules."""
    model = policy.model
    settings = model.generation_config.to_dict() if model.can_generate() else None
    renamed = [str(each) for each in getattr(model, "_weight_conversions", None) or ()]
    modes = [module.training for module in policy.modules()]
    return [policy.base_digest, model.config.to_dict(), settings, renamed, modes]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    loading.log.addHandler(handler)
    loading.log.setLevel(logging.INFO)
    with world(ParallelConfig()) as ranks:
        if ranks.is_main:
            save(folder)
        ranks.barrier()
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        for name, (section, reason) in cases(folder).items():
            told.clear()
            start = Start(Config("sft", model=section), make_objective("sft", {}), None, [], ranks)
            start = replace(start, tokenizer=tokenizer) if section.resize_embeddings else start
            compare(name, start, section, name == "scores")
            assert (reason is None and not told) or (reason is not None and reason in told[0]), (name, told)
            os.write(1, f"equal: {name}\n".encode()) if ranks.is_main else None
