"""What ``fastalign info`` prints: versions, devices, and which backend serves each op here, with the reason."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from fastalign import __version__
from fastalign.ops import dispatch

PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors")
OPTIONAL = ("flash-attn", "peft", "vllm", "tensorboard", "wandb", "trackio", "trl", "liger-kernel")


def collect() -> dict[str, Any]:
    """Everything that decides what runs here, as JSON types.

    Returns:
        ``fastalign``, ``python``, ``platform``: strings; ``packages``: name -> version, None when absent; ``cpu``:
        cores, threads and the native extension's level or why it is absent; ``cuda``: version or None; ``devices``: a
        string each; ``ranks``: how several processes talk, and the settings of their mesh; ``ops``: op -> ``chosen``
        (device type -> backend), ``backends`` (backend -> "usable" or why not).
    """
    native = dispatch.reasons("token_logps")["cpp"]  # its instruction set, or why there is none
    return {
        "fastalign": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in (*PACKAGES, *OPTIONAL)},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "extension": native},
        "cuda": torch.version.cuda,
        "devices": devices(),
        "ranks": {"talk": talk(), "mesh": ["parallel.dp_replicate", "parallel.dp_shard", "parallel.tp"]},
        "ops": {**{op: describe(op) for op in dispatch.OPS}, "packed_attention": describe_attention()},
    }


def installed(name: str) -> str | None:
    """The version of a distribution, None when it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> list[str]:
    """The CUDA devices: name, architecture, memory."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in found]


def talk() -> list[str]:
    """The libraries by which ranks exchange tensors."""
    return [name for name, found in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if found]


def describe(op: str) -> dict[str, Any]:
    """The backend that serves an op on each kind of device, and each backend's state."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {"chosen": {kind: dispatch.choose(op, None, kind) for kind in kinds}, "backends": dispatch.reasons(op)}


def describe_attention() -> dict[str, Any]:
    """The same for attention, which also depends on the dtype: half precision on CUDA, fp32 on CPU."""
    cuda = torch.cuda.is_available()
    kinds = {"cpu": torch.float32, **({"cuda": torch.bfloat16} if cuda else {})}
    best, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    states = {name: dispatch.without_attention(name, best, dtype) or "usable" for name in dispatch.ATTENTION}
    return {
        "chosen": {kind: dispatch.choose_attention(None, kind, dtype) for kind, dtype in kinds.items()},
        "backends": states,
    }


def render(facts: dict[str, Any], as_json: bool = False) -> str:
    """The facts of ``collect`` as text for people, or as JSON."""
    if as_json:
        return json.dumps(facts, indent=2)
    lines = [f"fastalign {facts['fastalign']}, Python {facts['python']}, {facts['platform']}", ""]
    lines += [f"  {name:14}{found}" for name, found in facts["packages"].items() if found or name in PACKAGES]
    absent = [name for name, found in facts["packages"].items() if found is None]
    lines += [f"  not installed: {', '.join(absent)}", ""]
    cpu = facts["cpu"]
    lines += [f"cpu   {cpu['cores']} cores, {cpu['threads']} threads; native extension {cpu['extension']}"]
    lines += [f"cuda  {device}" for device in facts["devices"] or ["no device"]]
    ranks = facts["ranks"]
    lines += [f"ranks {' and '.join(ranks['talk']) or 'one alone'}; mesh {' x '.join(ranks['mesh'])}"]
    for ops, state in grouped(facts["ops"]):
        chosen = ", ".join(f"{backend} on {kind}" for kind, backend in state["chosen"].items())
        lines += ["", f"{ops}: {chosen}", *(f"  {backend:8}{why}" for backend, why in state["backends"].items())]
    return "\n".join(lines)


def grouped(ops: dict[str, Any]) -> list[tuple[str, Any]]:
    """Ops of the same state under one heading."""
    states = [state for i, state in enumerate(ops.values()) if state not in list(ops.values())[:i]]
    return [(", ".join(op for op, other in ops.items() if other == state), state) for state in states]
