"""What a reference log-prob depends on besides its tokens: the weights, and how they are computed with."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import Tensor

from fastalign.data import cache
from fastalign.models import lora
from fastalign.models.policy import Policy
from fastalign.models.raised import used_dtype
from fastalign.ops import dispatch
from fastalign.ops.backends.torch import onednn
from fastalign.ops.dispatch import choose
from fastalign.parallel.mesh import World

INERT = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "output_attentions", "output_hidden_states"),
}
"""Entries of a Hugging Face config on which no log-prob depends: names, ids for generation, the weights' dtype."""
CODE = (
    *("fastalign.data.pack", "fastalign.data.forest"),
    *("fastalign.ops", "fastalign.models", "fastalign_kernels", "fastalign._C"),
)
"""What lays out and computes them here, by import name."""


def fingerprint(policy: Policy, world: World, weights: str | None = None) -> str:
    """A hash of everything that makes a policy the model it is: parameters, buffers, architecture, adapter.

    Args:
        policy: not yet sharded.
        world: the ranks, all of which call this.
        weights: the policy's `hash_weights`, where that is known.
    """
    architecture = {**policy.config.to_dict(), **lora.identity(policy)[1]}
    described = {key: value for key, value in architecture.items() if key not in INERT}
    return cache.key(weights or hash_weights(policy, world), json.dumps(described, sort_keys=True, default=str))


def hash_weights(policy: Policy, world: World) -> str:
    """A hash of a policy's tensors, each with its name, dtype and shape; of nothing that a library's version changes.

    Call it before the policy is sharded, on all ranks: each reads its share of the tensors.
    """
    tensors = sorted(dict(lora.identity(policy)[0]).items())
    mine = {name: hash_tensor(x) for i, (name, x) in enumerate(tensors) if i % world.size == world.rank}
    return cache.key(sorted(item for part in world.gather_objects(mine) for item in part.items()))


def hash_tensor(x: Tensor) -> str:
    """A hash of a tensor's dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{x.dtype} {tuple(x.shape)}".encode(), digest_size=16)
    digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def computation(policy: Policy, world: World, *, autocast: bool, share_prefix: bool, temperature: float) -> str:
    """A hash of how the log-probs are computed: precision, layout, attention, head, temperature, code, device."""
    dtype = torch.bfloat16 if autocast else used_dtype(policy.head)
    precision = (str(dtype), "gathered" if autocast and world.size > 1 else "cast" if autocast else "as it is")
    own = policy.attention.partition("_")[2]
    kernels = (
        own or dispatch.choose_attention(None, world.device.type, dtype),
        choose("linear_loss", None, world.device.type),
        onednn.preferred() and onednn.enabled(),
    )
    return cache.key(precision, share_prefix, kernels, temperature, code_version(), device_name(world.device))


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
