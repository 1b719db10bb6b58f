"""What a reference log-prob depends on besides its tokens: the weights, and how they are computed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from fastalign.config import ModelConfig
from fastalign.data import cache
from fastalign.models import lora
from fastalign.models.policy import Policy
from fastalign.models.raised import used_dtype
from fastalign.models.weights import find, weight_files
from fastalign.ops import dispatch
from fastalign.ops.backends.cpp import product
from fastalign.ops.dispatch import choose
from fastalign.parallel.mesh import World

INERT = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states"),
}
"""Entries of a Hugging Face config on which no log-prob depends: names, ids for generation, the weights' dtype."""
PIECE = 16 << 20
"""Bytes of a file that are hashed at once, by one rank."""
CODE = (
    *("fastalign.data.pack", "fastalign.data.forest"),
    *("fastalign.ops", "fastalign.models", "fastalign.parallel.tensor", "fastalign_kernels", "fastalign._C"),
)
"""What lays out and computes them here, by import name."""


def fingerprint(policy: Policy, origin: str) -> str:
    """A hash of everything that makes a policy the model it is: where its numbers come from, architecture, adapter.

    Args:
        policy: as it starts; its weights are not read.
        origin: from `origin_of`.
    """
    described = {key: value for key, value in policy.config.to_dict().items() if key not in INERT}
    dtype, adapter = used_dtype(policy.head), lora.identity(policy)
    return cache.key(origin, dtype, json.dumps([described, adapter], sort_keys=True, default=str))


def origin_of(model: ModelConfig, seed: int, world: World, *, adapted: bool) -> str:
    """A hash of where a model's numbers come from: its files, or the config and the seed that random ones are made of.

    Args:
        model: the section that names it.
        seed: of random numbers.
        world: the ranks, all of which call this: each reads its share of the files.
        adapted: whether an adapter takes part.
    """
    saved = lora.saved_adapter(replace(model, lora=None))
    base = model.path if saved is None else saved.base_model_name_or_path
    random = json.dumps([model.config, seed], sort_keys=True, default=str)
    parts: list[Any] = [hash_model(base, world) if base else random, model.quantization]
    if adapted:
        files = sorted(Path(str(model.path)).glob("adapter_model.*"))
        parts.append(seed if saved is None else hash_files(files, world))
    return cache.key(*parts)


def hash_model(path: str, world: World) -> str:
    """A hash of the files of a model's weights; of one of the hub without safetensors, the commit that it is from."""
    files = weight_files(path, local=True) or sorted(Path(path).glob("*.bin"))
    config = find(path, "config.json", local=True)
    return hash_files(files, world) if files else cache.key(path, config and config.parent.name)


def hash_files(files: Sequence[Path], world: World) -> str:
    """A hash of the bytes of files in their order, whatever they are called."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, PIECE)]
    mine = {i: hash_piece(*pieces[i]) for i in range(world.rank, len(pieces), world.size)}
    return cache.key(sorted(item for part in world.gather_objects(mine) for item in part.items()))


def hash_piece(file: Path, at: int) -> str:
    """A hash of `PIECE` bytes of a file."""
    with file.open("rb") as opened:
        opened.seek(at)
        return hashlib.blake2b(opened.read(PIECE), digest_size=16).hexdigest()


def computation(policy: Policy, world: World, *, autocast: bool, share_prefix: bool, temperature: float) -> str:
    """A hash of how the log-probs are computed: precision, layout, attention, head, temperature, code, device."""
    dtype = torch.bfloat16 if autocast else used_dtype(policy.head)
    precision = (str(dtype), "gathered" if autocast and world.size > 1 else "cast" if autocast else "as it is")
    parts = world.tensor.size if world.tensor else 1
    own = policy.attention.partition("_")[2]
    kernels = (
        own or dispatch.choose_attention(None, world.device.type, dtype),
        choose("linear_loss", None, world.device.type),
        product.preferred(),
    )
    return cache.key(precision, parts, share_prefix, kernels, temperature, code_version(), device_name(world.device))


def device_name(device: torch.device) -> str:
    """What decides which kernels run: the instructions of a CPU, the architecture of a GPU."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_capability(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def code_version() -> str:
    """A hash of the code that computes log-probs here, its libraries' versions included."""
    files = sorted(path for name in CODE for path in sources(name))
    return cache.key(
        [(f.name, hashlib.blake2b(f.read_bytes()).hexdigest()) for f in files], torch.__version__, *others()
    )


def sources(name: str) -> list[Path]:
    """The files of a package or the file of a module; none when it is absent."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return []
    return list(Path(spec.origin).parent.glob("*.py")) if spec.submodule_search_locations else [Path(spec.origin)]


def others() -> list[str]:
    """Versions of the libraries that take part."""
    found = [f"transformers {transformers.__version__}"]
    for name in ("flash-attn", "triton"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
