"""What devices can do by their makers' data sheets, and what share of it is assumed to be reached."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
KEPT_FREE = 0.08
"""Of a GPU's memory for the driver, NCCL's buffers and what the allocator cannot use."""


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        kind: "cuda", also of AMD's, or "cpu".
        memory: bytes.
        half, single: dense operations per second in bf16 and in fp32 (TF32 off).
        bandwidth: bytes per second of its memory.
        link: bytes per second to the others of its node, one way.
        network: bytes per second to other nodes, one way.
        source: where this is from.
    """

    kind: str
    memory: float
    half: float
    single: float
    bandwidth: float
    link: float
    network: float
    source: str

    @property
    def usable(self) -> float:
        """Bytes of memory that a run may take."""
        return self.memory * (1 - KEPT_FREE if self.kind == "cuda" else 1)


SHEET = "maker's data sheet; network of 400 Gb/s per GPU assumed"
OLDER = "maker's data sheet; network of 200 Gb/s per GPU assumed"
DEVICES = {
    "a100": Device("cuda", 80e9, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, f"A100 SXM 80GB, {OLDER}"),
    "h100": Device("cuda", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, f"H100 SXM, {SHEET}"),
    "h200": Device("cuda", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, f"H200 SXM, {SHEET}"),
    "b200": Device("cuda", 180e9, 2250e12, 75e12, 7.7e12, 900e9, 50e9, f"B200 SXM, {SHEET}"),
    "mi300x": Device("cuda", 192e9, 1307e12, 163e12, 5.3e12, 448e9, 50e9, f"MI300X, {SHEET}"),
}
"""GPUs by the word that names them."""


def cpu(ranks: int) -> Device:
    """One of several ranks on this machine's CPU."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    cores = (os.cpu_count() or 1) / ranks
    source = "this machine's memory; 100 GFLOP/s per core in fp32 and 450 in bf16, measured on an AVX-512 machine"
    return Device("cpu", memory, 450e9 * cores, 100e9 * cores, 20e9, 5e9, 5e9, source)


def device_of(name: str, memory: str | None, ranks: int) -> Device:
    """The device that a plan is for; ``memory`` in place of its own."""
    found = cpu(ranks) if name == "cpu" else DEVICES[name]
    return found if memory is None else Device(**{**vars(found), "memory": bytes_of(memory)})


def bytes_of(text: str) -> float:
    """Bytes of a size such as 80GB (10**9) or 80GiB (2**30).

    Raises:
        ValueError: it is no size.

    >>> bytes_of("80GB"), bytes_of("1.5 GiB")
    (80000000000.0, 1610612736.0)
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*(|[KMGT]I?)B?\s*", text.upper())
    try:
        size = float(match[1]) * UNITS[match[2]] if match else 0.0
    except ValueError:
        size = 0.0
    if not size > 0:
        raise ValueError(f"--memory: expected a size such as 80GB or 79GiB, got {text!r}")
    return size


def in_units(size: float) -> str:
    """Bytes for people.

    >>> in_units(16.06e9), in_units(3.2e6), in_units(0)
    ('16.1 GB', '3.2 MB', '0')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f}" if size == 0 else f"{size:.0f} B"


def as_json(device: Device) -> dict[str, Any]:
    """The figures of a device."""
    return dict(vars(device))
