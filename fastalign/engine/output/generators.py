"""The generators of a process as JSON, ``rng-R.json`` of a checkpoint: nothing in training draws from them, a user's
code may."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError)
"""What a state that no generator can have raises; `binascii.Error` is a ValueError."""


def rng_file(checkpoint: Path, rank: int) -> Path:
    """Where a checkpoint keeps the generators of a rank."""
    return checkpoint / f"rng-{rank}.json"


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process, as JSON values."""
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    version, numbers, gauss = random.getstate()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "torch": encode(torch.get_rng_state()),
        "cuda": None if device is None else encode(device),
        "python": [version, list(numbers), gauss],
        "numpy": {**generator, "state": {k: np.asarray(v).tolist() for k, v in generator["state"].items()}},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of ``rng_state``."""
    torch.set_rng_state(decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(decode(state["cuda"]))
    random.setstate(python_state(state))
    np.random.set_state(numpy_state(state))


def rng_flaw(file: Path) -> str | None:
    """Why a file holds no state of the generators; this process's own are left alone."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON, or the encoding
        return f"{file.name} is not JSON ({error})"
    try:
        torch.Generator().set_state(decode(state["torch"]))
        random.Random().setstate(python_state(state))
        np.random.RandomState().set_state(numpy_state(state))
        if state["cuda"] is not None:
            decode(state["cuda"])
    except DAMAGED as error:
        return f"{file.name} is damaged ({one_line(error)})"
    return None


def python_state(state: dict[str, Any]) -> tuple[int, tuple[int, ...], float | None]:
    """As `random.setstate` takes it."""
    version, numbers, gauss = state["python"]
    return version, tuple(numbers), gauss


def numpy_state(state: dict[str, Any]) -> dict[str, Any]:
    """As `numpy.random.set_state` takes it."""
    inner = state["numpy"]["state"]
    return {**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}}


def encode(state: Tensor) -> str:
    """A uint8 tensor as base64."""
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decode(text: str) -> Tensor:
    """The inverse of ``encode``."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
