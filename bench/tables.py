"""Tables of measured rows on the terminal, and their way into the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import common
from bench.field import OURS, ROOF

COLLECTED: list[dict[str, Any]] = []
"""What a pytest session has measured."""

COLUMNS = ("who", "median ms", "p20", "p80", "/ eager", "/ fastalign", "of roof", "target", "max error", "first ms")


def title(row: dict[str, Any]) -> str:
    """A case in one line."""
    return f"{row['case']}, {row['shape']}, {row['dtype']}"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A candidate's figures as text."""
    ratio, target, roof = row["over_fastalign"], row["target"], row["of_roof"]
    kept = "" if target is None or ratio is None else f">= {target:.3g} {'kept' if ratio >= target else 'MISSED'}"
    error = f"{max(row['errors'].values()):.1e}" if row["errors"] else "roof"
    times = (f"{row[key]:.2f}" for key in ("p50_ms", "p20_ms", "p80_ms"))
    ratios = (f"{row['over_baseline']:.2f}", "-" if ratio is None else f"{ratio:.2f}")
    return (row["who"], *times, *ratios, f"{roof:.0%}" if roof else "", kept, error, f"{row['first_ms']:.0f}")


def machine(where: dict[str, Any]) -> str:
    """The environment in one line."""
    gpu = ", ".join(f"{name} {value}" for name, value in where.get("gpu", {}).items())
    threads = f"{where['threads']} thread(s)"
    versions = f"torch {where['versions']['torch']}, commit {where['commit']}, {where['time']}"
    return ", ".join(part for part in (where["device"], gpu, threads, versions) if part)


def by_case(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each case under its title, in order of appearance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(title(row), []).append(row)
    return found


def print_case(rows: list[dict[str, Any]]) -> None:
    """One line per candidate; ``/ fastalign`` above 1 means that fastalign is faster. Those without a number follow."""
    common.print_table(title(rows[0]), COLUMNS, [cells(row) for row in rows if not row.get("failure")])
    for row in rows:
        if row.get("failure"):
            print(f"no number: {row['who']}: {row['failure']}")


def print_summary(rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """fastalign beside the best of the others in each case."""
    caption = f"{machine(where)}; load {where['load']:.1f}; interleaved, random order, fresh inputs"
    columns = ("case", "fastalign ms", "best peer", "its ms", "ratio", "max error")
    lines = [line for group in by_case(rows).values() if (line := _summary(group))]
    common.print_table("fastalign beside the best peer of each case", columns, lines, caption)


def _summary(rows: list[dict[str, Any]]) -> tuple[str, ...] | None:
    ours, best = our_row(rows), best_peer(rows)
    if ours is None or best is None:
        return None
    error = f"{max(ours['errors'].values()):.1e}"
    ratio = best["p50_ms"] / ours["p50_ms"]
    return title(ours), f"{ours['p50_ms']:.2f}", best["who"], f"{best['p50_ms']:.2f}", f"{ratio:.2f}", error


def our_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """fastalign's own row, if it has a number."""
    return next((row for row in rows if row["who"] == OURS and not row.get("failure")), None)


def best_peer(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest row that has a number and is neither ours nor a roof."""
    rivals = [row for row in rows if not row.get("failure") and not row["who"].startswith((OURS, ROOF))]
    return min(rivals, key=lambda row: row["p50_ms"], default=None)


def record_ops(rows: list[dict[str, Any]], device: str, where: dict[str, Any], results: Path | None = None) -> Path:
    """Append rows to ``ops-cpu.json`` or ``ops-cuda.json``."""
    return common.record(f"ops-{device}", ({"bench": "ops", **row} for row in rows), where, results)


def print_profile(profiler: torch.profiler.profile, device: str, limit: int = 15) -> None:
    """The operations that took longest themselves."""
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=limit, max_name_column_width=60))
