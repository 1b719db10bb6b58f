"""The tensors that a checkpoint holds, by the headers of its files alone: whether they are all there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

SHARDS = "DCP_SHARDING_INFO"
"""Where `torch.distributed.checkpoint` notes in a header at which offsets the parts of tensors belong."""
DAMAGED = (SafetensorError, ValueError, TypeError, LookupError, AttributeError)
"""What a header that was not written so raises."""


class Part(NamedTuple):
    """What one file holds of a tensor."""

    name: str
    dtype: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def tensors_flaw(path: Path, updates: Mapping[str, Any]) -> str | None:
    """Why the files of tensors are not those of a checkpoint, by their headers; None when they are.

    Args:
        path: the checkpoint.
        updates: its ``optimizer_steps``: how often each weight was updated, by ``ROLE.NAME``.
    """
    whole: dict[str, tuple[str, tuple[int, ...]]] = {}
    held: dict[str, int] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            parts = list(parts_of(file))
        except DAMAGED as error:
            return f"{file.name} is damaged ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
        for name, dtype, offsets, shape in parts:
            ends = tuple(map(sum, zip(offsets, shape, strict=True)))
            whole[name] = dtype, tuple(map(max, zip(ends, whole.get(name, (dtype, ends))[1], strict=True)))
            held[name] = held.get(name, 0) + math.prod(shape)
    if torn := [name for name, (_, shape) in whole.items() if held[name] < math.prod(shape)]:
        return f"{torn[0]} is not whole: {held[torn[0]]} of its {math.prod(whole[torn[0]][1])} numbers are there"
    return moments_flaw(whole, updates)


def parts_of(file: Path) -> Iterator[Part]:
    """What a file's header says of it; `safe_open` raises on one that does not fit the file's size."""
    with safe_open(file, "pt") as opened:
        noted = json.loads((opened.metadata() or {}).get(SHARDS, "{}"))
        if noted and noted.keys() != (names := set(opened.keys())):
            raise ValueError(f"its header has no {min(noted.keys() ^ names)}, or does not say where that belongs")
        for name in opened.keys():  # noqa: SIM118 - no mapping
            piece = opened.get_slice(name)
            shape = tuple(piece.get_shape())
            offsets = tuple(noted[name]["saved_offsets"]) if noted else (0,) * len(shape)
            yield Part(name, piece.get_dtype(), offsets, shape)


def moments_flaw(whole: Mapping[str, tuple[str, tuple[int, ...]]], updates: Mapping[str, Any]) -> str | None:
    """The first weight whose number of updates, moments and values do not all say that it was updated."""
    parts = [name.split(".", 2) for name in whole]  # role, kind, name
    kept = {f"{part[0]}.{part[2]}" for part in parts if len(part) == 3 and part[1].startswith("exp_avg")}
    for weight in sorted(kept | updates.keys()):
        if not is_count(updates.get(weight)):
            return f"state.json is damaged: optimizer_steps has no number for {weight}"
        role, _, name = weight.partition(".")
        kinds = [f"{role}.{kind}.{name}" for kind in ("weight", "exp_avg", "exp_avg_sq")]
        for kind in kinds:
            if kind not in whole:
                return f"{kind} is missing"
            if whole[kind][1] != whole[kinds[0]][1]:
                return f"{kind} is {whole[kind][1]}, its weight {whole[kinds[0]][1]}"
    return None


def is_count(value: Any) -> bool:
    """Whether a value can be how often something was done."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
