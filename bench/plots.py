"""The plots of the report. Every function takes rows of the records and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import ops
from bench.field import OURS

BLUE, ORANGE, GREY, LIGHT, INK = "#2563a8", "#d9772b", "#8a8f98", "#c9ced6", "#22262b"
CURVES = (
    {"color": BLUE, "linewidth": 7, "alpha": 0.4},
    {"color": ORANGE, "linewidth": 2.4},
    {"color": INK, "linewidth": 1.6, "linestyle": (0, (1, 3))},
)
"""How curves are drawn, in order: those that agree lie on top of each other, and all are to be seen."""
SIDE_COLOURS = {"fastalign": BLUE, "trl": ORANGE, "trl-fair": INK}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LIGHT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 14,
    "svg.hashsalt": "fastalign",
}
ROW = 0.30
"""Inches per bar."""
WIDEST = 130
"""Where the axis of percentages ends: what fits a cache, or is dominated by calls, may pass its bound by far."""

Case = list[dict[str, Any]]


def label(row: dict[str, Any]) -> str:
    """A case's name and size, short enough for an axis."""
    short = {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
    return f"{row['case']}, {row['shape']}, {short}"


def _canvas(rows: int, title: str, xlabel: str) -> tuple[Figure, Axes]:
    """Room for so many horizontal bars, the first at the top."""
    figure = Figure(figsize=(11, 1.3 + ROW * max(rows, 2)), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def speed(groups: Sequence[Case], where: str) -> Figure:
    """How many times faster than the best peer, case by case, on a logarithmic scale; losing cases in orange."""
    pairs = [(ours, best) for rows in groups if (ours := ops.our_row(rows)) and (best := ops.best_peer(rows))]
    figure, axes = _canvas(
        len(pairs), "Speed beside the best peer of each case", f"times as fast as the best peer\n{where}"
    )
    for y, (ours, best) in enumerate(pairs):
        ratio = best["p50_ms"] / ours["p50_ms"]
        axes.barh(y, ratio - 1, left=1, height=0.62, color=BLUE if ratio >= 1 else ORANGE)
        text, side = f" {ratio:.2f}x  {best['who']} ", "left" if ratio >= 1 else "right"
        axes.text(ratio, y, text, va="center", ha=side, fontsize=8.5)
    axes.set_yticks(range(len(pairs)), [label(ours) for ours, _ in pairs], fontsize=8.5)
    _logarithmic(axes, [best["p50_ms"] / ours["p50_ms"] for ours, best in pairs])
    axes.axvline(1, color=INK, linewidth=1)
    return figure


def _logarithmic(axes: Axes, ratios: Sequence[float]) -> None:
    """A scale with room for the labels on both sides, and plain numbers as ticks."""
    low, high = min([1.0, *ratios]), max([1.0, *ratios])
    low, high = low / (3.5 if low < 1 else 1.15), high * max(3.0, (high / low) ** 0.35)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_xticks([], minor=True)


def roofs(groups: Sequence[Case], where: str) -> Figure:
    """The share of the hardware's bound that fastalign and the best peer reach, measured in the same run."""
    cases = [(ours, ops.best_peer(rows)) for rows in groups if (ours := ops.our_row(rows)) and ours.get("of_roof")]
    xlabel = f"% of the speed of bare matrix products, or of copying the least bytes\n{where}"
    figure, axes = _canvas(len(cases), "How much of the bound is reached", xlabel)
    for y, (ours, best) in enumerate(cases):
        share, rival = 100 * ours["of_roof"], 100 * ((best or {}).get("of_roof") or 0)
        axes.barh(y, min(share, WIDEST), height=0.62, color=BLUE)
        if rival:
            axes.plot(min(rival, WIDEST), y, "o", color=ORANGE, markersize=7, markeredgecolor="white")
        axes.text(min(max(share, rival + 1.5), WIDEST) + 1.5, y, f"{share:.0f} %", va="center", fontsize=8.5)
    axes.set_yticks(range(len(cases)), [label(ours) for ours, _ in cases], fontsize=8.5)
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_xlim(0, WIDEST + 12)
    axes.plot([], [], "s", color=BLUE, markersize=9, label="fastalign")
    axes.plot([], [], "o", color=ORANGE, markersize=7, label="best peer")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    return figure


def memory(groups: Sequence[Case], where: str) -> Figure:
    """Peak memory of forward and backward over the inputs, every candidate of every case."""
    lines: list[dict[str, Any] | str] = []
    for rows in groups:
        full = [row for row in rows if row["mode"] == "full" and not row.get("failure")]
        lines += [label(rows[0]), *sorted(full, key=lambda row: row["peak_mib"])] if full else []
    figure, axes = _canvas(
        len(lines),
        "Peak memory of forward and backward",
        f"MiB over the inputs; the line is the planner's figure\n{where}",
    )
    bars = [(y, row) for y, row in enumerate(lines) if isinstance(row, dict)]
    widest = max([1.0, *(row["peak_mib"] for _, row in bars)])
    for y, row in bars:
        peak, planned = row["peak_mib"], row.get("predicted_mib") or 0
        axes.barh(y, peak, height=0.68, color=BLUE if row["who"].startswith(OURS) else LIGHT)
        if planned:
            axes.plot([planned] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=1.6)
        after = planned if 0 <= planned - peak < 0.06 * widest else peak  # the line would cross the number
        axes.text(after, y, f" {peak:,.0f}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(lines)), [row["who"] if isinstance(row, dict) else row for row in lines], fontsize=8.5)
    for tick, row in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if isinstance(row, dict) else "bold")
    axes.set_xlim(0, 1.12 * widest)
    return figure


def training(rows: Case, where: str) -> Figure:
    """Loss curves of every side over each other, and their speeds."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[2, 1])
    for index, row in enumerate(rows):
        steps = range(1, len(row["losses"]) + 1)
        curves.plot(steps, row["losses"], label=name(row), **CURVES[min(index, 2)])
    curves.set(
        title=f"{rows[0]['task'].upper()} loss, same rows in the same order", xlabel=f"step\n{where}", ylabel="loss"
    )
    curves.legend(frameon=False, fontsize=9)
    bars.barh(
        [name(row) for row in rows],
        [row["examples_per_second"] for row in rows],
        color=[colour(r) for r in rows],
        height=0.6,
    )
    for y, row in enumerate(rows):
        bars.text(row["examples_per_second"], y, f" {row['examples_per_second']:.2f}", va="center")
    bars.set(title="Speed", xlabel=f"{rows[0].get('unit', 'examples')} per second")
    bars.set_xlim(0, 1.2 * max(row["examples_per_second"] for row in rows))
    bars.invert_yaxis()
    bars.spines["left"].set_visible(False)
    bars.tick_params(axis="y", length=0)
    return figure


def colour(row: dict[str, Any]) -> str:
    """A side's."""
    return SIDE_COLOURS.get(row["side"], GREY)


def name(row: dict[str, Any]) -> str:
    """A side's."""
    return {"trl": "TRL as installed", "trl-fair": "TRL, rows selected"}.get(row["side"], row["side"])
