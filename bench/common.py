"""What every benchmark needs: options, the machine's description, appended records, quantiles, errors, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from shutil import which
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    *("torch", "triton", "transformers", "trl", "liger_kernel", "cut-cross-entropy", "quack-kernels", "verl"),
    *("datasets", "accelerate"),
)
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
MIB = 2**20
STATUS = Path("/proc/self/status")


# --- options ---------------------------------------------------------------------------------------------------------


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, the GPU if there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=found, help=f"where to measure (default {found})")


def add_records(parser: argparse.ArgumentParser) -> None:
    """``--record`` and ``--results``."""
    parser.add_argument("--record", action="store_true", help="append the figures to the results")
    add_results(parser)


def add_results(parser: argparse.ArgumentParser) -> None:
    """``--results``."""
    help = "where results are kept (default bench/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=help)


def positive(text: str) -> int:
    """A count."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def whole(text: str) -> int:
    """A count that may be none."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def check_device(device: str) -> None:
    """Refuse a GPU where there is none.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out to measure on the CPU")


# --- the machine -----------------------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    """The installed version of ``package``, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checked-out commit, with ``+`` when tracked files differ from it; ``unknown`` outside a git checkout."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def _gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature, where nvidia-smi tells them."""
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True) if which("nvidia-smi") else None
    values = run.stdout.splitlines()[0].split(",") if run is not None and run.returncode == 0 else []
    return {name: value.strip() for name, value in zip(GPU_FIELDS, values, strict=False)}


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where a figure was measured: device, threads, versions, commit, time."""
    gpu = {"gpu": _gpu_state(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        **gpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def peak_mib(device: str = "cpu") -> float:
    """Peak memory of this process so far: allocated on a GPU, resident on a CPU.

    Linux's own count (VmHWM, in KiB) begins with the program; getrusage's would begin with what the parent had in use.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS
    return status_bytes("VmHWM") / MIB


def status_bytes(name: str) -> int:
    """A figure of this process as Linux counts it, "VmHWM" or "VmRSS", in bytes.

    Raises:
        OSError: this is not Linux.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def synchronize(device: str) -> None:
    """Wait for everything that was queued on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def shared_data(name: str) -> Path | None:
    """``data/<name>`` in the shared folder (``FASTALIGN_SHARED``, else beside the checkout), or None when absent."""
    path = Path(os.environ.get("FASTALIGN_SHARED", ROOT.parent / "shared")) / "data" / name
    return path if path.exists() else None


# --- records and tables ----------------------------------------------------------------------------------------------


def record(name: str, rows: Iterable[dict[str, Any]], where: dict[str, Any], results: Path | None = None) -> Path:
    """Append ``rows`` to ``<results>/<name>.json``, one JSON object per line, each with the environment ``where``."""
    path = (results or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **where}) + "\n" for row in rows)
    return path


def read_records(pattern: str, results: Path | None = None) -> list[dict[str, Any]]:
    """All rows of the recorded files whose name matches, oldest first."""
    files = sorted((results or RESULTS).glob(f"{pattern}.json"))
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines() if line.strip()]
    return sorted(rows, key=lambda row: row["time"])


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[-1]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``max |value - truth| / max |truth|`` in float64; infinite when either is not finite or the shapes differ.

    A scalar's error is absolute below 1: losses cancel, and nothing is small beside a loss that happens to be 0.
    """
    if value.shape != truth.shape:
        return float("inf")
    scale = truth.double().abs().max().clamp_min(1e-300 if truth.dim() else 1.0)
    difference = (value - truth.double()).abs_().max() / scale
    return difference.item() if torch.isfinite(difference) else float("inf")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> None:
    """A table on the terminal; the first column is left-aligned, the others right."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # A pipe has no width of its own; 80 columns would fold the figures.
    (console if console.is_terminal else Console(width=140)).print(table)
