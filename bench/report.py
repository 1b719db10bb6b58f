"""Tables from measured rows: those of the running session, or those on file (``python bench/report.py``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import common

COLLECTED: list[dict[str, Any]] = []
"""What this session has measured."""

COLUMNS = ("who", "median ms", "p20", "p80", "/ eager", "/ fastalign", "target", "max error")


def _title(row: dict[str, Any]) -> str:
    return f"{row['case']}, {row['shape']}, {row['dtype']}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio, target = row["over_fastalign"], row["target"]
    kept = "" if target is None or ratio is None else f">= {target:.3g} {'kept' if ratio >= target else 'MISSED'}"
    error = f"{max(row['errors'].values()):.1e}" if row["errors"] else "roof"
    times = (f"{row[key]:.2f}" for key in ("p50_ms", "p20_ms", "p80_ms"))
    ratios = (f"{row['over_baseline']:.2f}", "-" if ratio is None else f"{ratio:.2f}")
    return ("  " + row["who"], *times, *ratios, kept, error)


def print_ops(rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """One line per candidate; ``/ fastalign`` above 1 means that fastalign is faster. Those without a number follow."""
    titles = list(dict.fromkeys(map(_title, rows)))
    timed = [row for row in rows if not row.get("failure")]
    lines = [line for title in titles for line in [(title,), *(_cells(row) for row in timed if _title(row) == title)]]
    caption = (
        f"{where['device']}, {where['threads']} thread(s), torch {where['versions']['torch']}, commit {where['commit']}"
    )
    common.print_table("Interleaved, random order, fresh inputs; error against float64", COLUMNS, lines, caption)
    silent = {(row["who"], row["failure"]) for row in rows if row.get("failure")}
    for who, reason in sorted(silent):
        print(f"no number: {who}: {reason}")


def record_ops(rows: list[dict[str, Any]]) -> Path:
    """Append rows to ``results/ops-cpu.json`` or ``ops-cuda.json``."""
    return common.record(
        "ops-cuda" if torch.cuda.is_available() else "ops-cpu", ({"bench": "ops", **row} for row in rows)
    )


def main() -> None:
    """Print the newest recorded session of each device."""
    for path in sorted(common.RESULTS.glob("ops-*.json")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        last = max(rows, key=lambda row: row["time"])
        print_ops([row for row in rows if row["time"] == last["time"]], last)


if __name__ == "__main__":
    main()
