"""The weights of a model as they lie on the disk: the files, which tensor of the model each holds, and slices alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

WEIGHTS = "model.safetensors"
SAMPLE, SAMPLE_BYTES = 4096, 64
"""Places of a file that stand for it, and how much there."""
Region = tuple[slice, ...]
"""Part of a tensor: a range of each of its dimensions."""
Place = tuple[Path, str, torch.dtype]
"""The file of a tensor, its name there, and the dtype that the model is loaded in."""


@dataclass(frozen=True)
class Stored:
    """Where the tensors of a model lie.

    Attributes:
        files: all its safetensors files.
        places: where each tensor is, by its name in the model.
    """

    files: Sequence[Path]
    places: Mapping[str, Place]

    def read(self, name: str, region: Region) -> Tensor:
        """A part of a tensor, and nothing else of its file; rows beyond those there are the mean of them."""
        path, key, dtype = self.places[name]
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice(key)
            rows, there = region[:1], stored.get_shape()
            if not rows or rows[0].stop <= there[0]:
                return _copy(stored, region, dtype)
            old = _copy(stored, (slice(rows[0].start, max(rows[0].start, there[0])), *region[1:]), dtype)
            every = stored[:].to(dtype)
            mean = every.mean(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)[region[1:]]
            return torch.cat([old, mean.expand(rows[0].stop - rows[0].start - len(old), *mean.shape)])

    def sample(self) -> str:
        """A hash of some bytes of every file: tells copies apart at no cost."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb", buffering=0) as file:  # mapped into memory, its pages would count as the rank's
                for at in range(0, size, max(1, size // SAMPLE)):
                    digest.update(os.pread(file.fileno(), SAMPLE_BYTES, at))
        return digest.hexdigest()


def _copy(stored: object, region: Region, dtype: torch.dtype) -> Tensor:
    """Memory of our own: what safetensors returns may be the file itself."""
    shape = [part.stop - part.start for part in region]
    made = torch.empty(shape, dtype=dtype)
    return made.copy_(stored[region] if region else stored[...]) if made.numel() else made  # type: ignore[index]


def weight_files(path: str, *, local: bool = False) -> list[Path]:
    """The safetensors files of a directory or of a model of the hub, in a fixed order; none where it has no others.

    With ``local`` the hub is not asked: they have been loaded from there before.
    """
    if single := find(path, WEIGHTS, local):
        return [single]
    index = find(path, f"{WEIGHTS}.index.json", local)
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())) if index else []
    found = [find(path, name, local) for name in names]
    return [file for file in found if file is not None] if all(found) else []


def find(path: str, name: str, local: bool = False) -> Path | None:
    """A file of a directory or of a model of the hub; None where it has no such file."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    found = cached_file(path, name, local_files_only=local, **quiet)
    return None if found is None else Path(found)


def locate(model: PreTrainedModel, path: str, absent: Sequence[str] = ()) -> Stored | str:
    """Where the weights of a model lie, or why they must be loaded whole, by transformers.

    Args:
        model: on the meta device.
        path: a directory or a model of the hub.
        absent: names that need not be there.
    """
    files, state = weight_files(path), model.state_dict()
    if not files:
        return "it has no safetensors files"
    mapping = get_model_conversion_mapping(model)
    places: dict[str, Place] = {}
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    known = model.base_model_prefix, state
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                name, pattern = rename_source_key(key, renamings, converters, *known)
                if name not in state and key in state:
                    name, pattern = rename_source_key(key, [], [], *known)
                if name not in state:
                    continue
                if pattern is not None:
                    return f"transformers converts {key} while it loads"
                if tuple(opened.get_slice(key).get_shape()) != tuple(state[name].shape):
                    return f"{key} has another shape than its config says"
                places[name] = (file, key, state[name].dtype)
    # undone when the model is saved
    model._weight_conversions = [each for each in mapping if each.was_used()]  # pyright: ignore
    return _with_tied(model, places, files, absent)


def _with_tied(
    model: PreTrainedModel, places: dict[str, Place], files: Sequence[Path], absent: Sequence[str]
) -> Stored | str:
    """The places under every name that a tied weight has."""
    names: dict[int, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        names.setdefault(id(x), []).append(name)
    for tied in names.values():
        found = [name for name in tied if name in places]
        if len(found) > 1:
            return f"it holds the tied weights {' and '.join(found)}"
        if not found and tied[0] not in absent:
            return f"it is missing {tied[0]}"
        places |= {name: places[found[0]] for name in tied if found}
    return Stored(files, places)
