"""``fastalign bench report``: the newest recorded figures as plots (PNG and SVG) and one self-contained HTML page."""

from __future__ import annotations

import argparse
import html
import importlib.util
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import common, ops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Rows = list[Row]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #22262b }
h1, h2, h3 { font-weight: 600 } h2 { margin-top: 2.2em; border-bottom: 2px solid #c9ced6; padding-bottom: .2em }
table { border-collapse: collapse; font-size: 13.5px; margin: .4em 0 1.2em }
th, td { padding: .18em .9em .18em 0; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #e8eaed }
.ours { font-weight: 600; color: #2563a8 } .roof, .note { color: #6a6f78 } .lost { color: #c0601a; font-weight: 600 }
details { margin: .3em 0 } summary { cursor: pointer } svg { width: 100%; height: auto }
"""
NO_PLOTS = "<p>No plots: matplotlib is not installed (pip install fastalign[report]).</p>"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    common.add_results(parser)
    parser.add_argument("--out", type=Path, help="where the report goes (default: report/ in the results)")


def main(options: argparse.Namespace) -> int:
    """Write ``index.html`` and the plots; the exit code.

    Raises:
        ValueError: there are no results.
    """
    sections = gather(options.results)
    if not sections:
        raise ValueError(f"no results in {options.results}: run `fastalign bench ops --record` first")
    out = options.out or options.results / "report"
    out.mkdir(parents=True, exist_ok=True)
    page = out / "index.html"
    page.write_text(document(sections, out), encoding="utf-8")
    print(page)
    return 0


# --- what is shown ---------------------------------------------------------------------------------------------------


def gather(results: Path) -> list[tuple[str, Rows]]:
    """The newest rows by kind and device, as (kind, rows): "ops", "memory" and "train"."""
    found = []
    for kind in ("ops", "memory", "train"):
        rows = common.read_records(f"{kind}-*", results)
        for device in dict.fromkeys(row["device"] for row in rows):
            found.append((kind, newest([row for row in rows if row["device"] == device], kind)))
    return found


def newest(rows: Rows, kind: str) -> Rows:
    """Of each case the rows of the last session that measured it, with the thread count of the very last."""
    threads = rows[-1]["threads"]
    rows = [row for row in rows if row["threads"] == threads]
    last = {key(row, kind): row["time"] for row in rows}  # oldest first: the last one stays
    return [row for row in rows if row["time"] == last[key(row, kind)]]


def key(row: dict[str, Any], kind: str) -> str:
    """What a row is compared within."""
    known = ", precomputed reference" if row.get("precomputed") else ""
    beside = f", beside {row['neighbours']} busy processes" if row.get("neighbours") else ""
    return f"{row['task']}{known}{beside}, {row['dtype']}, {row['parameters']}" if kind == "train" else ops.title(row)


def grouped(rows: Rows, kind: str) -> list[Rows]:
    """The rows of each case, cases in the order of their names: those of one op lie together."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(key(row, kind), []).append(row)
    return [found[name] for name in sorted(found)]


# --- the page --------------------------------------------------------------------------------------------------------


def document(sections: list[tuple[str, Rows]], out: Path) -> str:
    """The whole page; the plots are in it, and beside it as files."""
    render = {"ops": ops_section, "memory": memory_section, "train": train_section}
    body = "".join(render[kind](rows, Drawer(out, f"{kind}-{i}")) for i, (kind, rows) in enumerate(sections))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>fastalign beside its peers</title>"
        f"<style>{STYLE}</style><h1>fastalign beside its peers</h1>"
        "<p>Every figure is measured, in one run with those beside it: interleaved, in random order, on fresh inputs, "
        "with its largest error against float64. A candidate whose error exceeds twice eager's has no number. "
        f"Ratios are between medians.</p>{body}</html>\n"
    )


def can_plot() -> bool:
    """Whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


class Drawer:
    """Saves figures beside the page and returns them for it."""

    def __init__(self, out: Path, stem: str) -> None:
        self.out, self.stem = out, stem

    def __call__(self, name: str, *arguments: Any) -> str:
        """What ``<name>_plot`` draws, as an svg element."""
        if not can_plot():
            return NO_PLOTS
        import matplotlib

        with matplotlib.rc_context(PLOTS):
            figure, buffer = globals()[f"{name}_plot"](*arguments), io.StringIO()
            figure.savefig(self.out / f"{self.stem}-{name}.png", dpi=130)
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        (self.out / f"{self.stem}-{name}.svg").write_text(svg, encoding="utf-8")
        return svg[svg.index("<svg") :]


def table(columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A table of (class, cells)."""
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    lines = (f"<tr class='{kind}'>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) for kind, cells in rows)
    return f"<table><tr>{head}{''.join(lines)}</table>"


def short_machine(row: dict[str, Any]) -> str:
    """The line under a plot."""
    return f"{row['device']}, {row['threads']} thread(s), torch {row['versions']['torch']}, commit {row['commit']}"


def heading(text: str, rows: Rows) -> str:
    """A section's title and the machine and versions behind it."""
    last = rows[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items() if version)
    return (
        f"<h2>{html.escape(text)}: {html.escape(last['device'])}</h2>"
        f"<p class=note>{html.escape(ops.machine(last))}<br>{html.escape(versions)}; load {last['load']:.1f}</p>"
    )


def ops_section(rows: Rows, draw: Drawer) -> str:
    """Plots, the cases that lose, and a table for every case."""
    groups, where = grouped(rows, "ops"), short_machine(rows[-1])
    plots = draw("speed", groups, where)
    if any(row.get("of_roof") for row in rows):
        plots += draw("roofs", groups, where)
    details = "".join(case_details(group) for group in groups)
    return f"{heading('Ops', rows)}{plots}{losses(groups)}<h3>Every case</h3>{details}"


def losses(groups: list[Rows]) -> str:
    """The cases in which a peer is faster."""
    lines = []
    for group in groups:
        ours, best = ops.our_row(group), ops.best_peer(group)
        if ours and best and best["p50_ms"] < ours["p50_ms"]:
            times = f"{ours['p50_ms']:.2f}", best["who"], f"{best['p50_ms']:.2f}"
            lines.append(("lost", (ops.title(ours), *times, f"{best['p50_ms'] / ours['p50_ms']:.2f}")))
    if not lines:
        return "<p>No case of this run is lost.</p>"
    return "<h3>Where a peer is faster</h3>" + table(("case", "fastalign ms", "peer", "ms", "ratio"), lines)


OPS_COLUMNS = (*ops.COLUMNS, "n")


def case_details(rows: Rows) -> str:
    """A case's table, folded."""
    timed = [row for row in rows if not row.get("failure")]
    absent = "; ".join(f"{row['who']}: {row['failure']}" for row in rows if row.get("failure"))
    note = f"<p class=note>No number: {html.escape(absent)}</p>" if absent else ""
    plans = {plan for row in timed if row["who"] == ops.OURS for plan in row.get("plans", ())}
    note += "".join(f"<p class=note>Plan: {html.escape(plan)}</p>" for plan in plans)
    stamp = f"commit {rows[0]['commit']}, {rows[0]['time'][:16]}"
    body = table(OPS_COLUMNS, ((kind_of(row["who"]), ops_cells(row)) for row in timed))
    summary = f"{html.escape(ops.title(rows[0]))} <span class=note>{stamp}</span>"
    return f"<details><summary>{summary}</summary>{body}{note}</details>"


def kind_of(who: str) -> str:
    """The class of a candidate's row."""
    return "ours" if who == ops.OURS else "roof" if who.startswith(ops.ROOF) else ""


def ops_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A candidate's cells; older records lack some."""
    return (*ops.cells({"of_roof": None, "first_ms": 0.0, **row}), str(row["rounds"]))


def memory_section(rows: Rows, draw: Drawer) -> str:
    """The plot and a table for every case."""
    groups = grouped(rows, "memory")
    return f"{heading('Memory', rows)}{draw('memory', groups, short_machine(rows[-1]))}" + "".join(
        map(memory_details, groups)
    )


def memory_details(rows: Rows) -> str:
    """Every mode's peak in MiB over the inputs, folded."""
    timed = [row for row in rows if not row.get("failure")]
    number: Callable[[Any], str] = lambda value: "" if value is None else f"{value:.1f}"  # noqa: E731
    names = ("peak_mib", "reserved_mib", "outputs_mib", "predicted_mib")
    lines = ((kind_of(row["who"]), (row["who"], row["mode"], *(number(row[name]) for name in names))) for row in timed)
    body = table(("who", "mode", "peak MiB", "reserved", "gradients", "planned"), lines)
    return f"<details><summary>{html.escape(ops.title(rows[0]))}</summary>{body}</details>"


def train_section(rows: Rows, draw: Drawer) -> str:
    """Curves over each other, speed and memory of every side."""
    parts = [heading("Training", rows)]
    for index, group in enumerate(grouped(rows, "train")):
        draw.stem = f"{draw.stem}-{index}"
        parts.append(draw("training", group, short_machine(group[-1])) + train_table(group))
    return "".join(parts)


def train_table(rows: Rows) -> str:
    """A run's sides."""
    columns = ("side", "examples/s", "s/step p20", "p50", "p80", "peak MiB", "over start", "last loss")
    steps = ("step_seconds_p20", "step_seconds_p50", "step_seconds_p80")
    lines = (
        (kind_of(row["side"]),
         (row["side"], f"{row['examples_per_second']:.2f}", *(f"{row[name]:.3f}" for name in steps),
         f"{row['peak_mib']:.0f}", f"{row['peak_mib'] - row['ready_mib']:.0f}", f"{row['losses'][-1]:.5f}"))
        for row in rows
    )  # fmt: skip
    return table(columns, lines)


# --- plots -----------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY, LIGHT, INK = "#2563a8", "#d9772b", "#8a8f98", "#c9ced6", "#22262b"
CURVES = (
    {"color": BLUE, "linewidth": 7, "alpha": 0.4},
    {"color": ORANGE, "linewidth": 2.4},
    {"color": INK, "linewidth": 1.6, "linestyle": (0, (1, 3))},
)
"""How curves are drawn, in order: those that agree lie on top of each other, and all are to be seen."""
SIDE_COLOURS = {"fastalign": BLUE, "trl": ORANGE, "trl-fair": INK}
PLOTS = {
    **{"font.family": "sans-serif", "font.size": 10, "axes.edgecolor": LIGHT, "svg.hashsalt": "fastalign"},
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **{"axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlepad": 14},
}
"""matplotlib's settings."""
ROW = 0.30
"""Inches per bar."""
WIDEST = 130
"""Where the axis of percentages ends: what fits a cache, or is dominated by calls, may pass its bound by far."""


def label(row: Row) -> str:
    """A case's name and size, short enough for an axis."""
    short = {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
    return f"{row['case']}, {row['shape']}, {short}"


def _canvas(rows: int, title: str, xlabel: str) -> tuple[Figure, Axes]:
    """Room for so many horizontal bars, the first at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.3 + ROW * max(rows, 2)), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def speed_plot(groups: list[Rows], where: str) -> Figure:
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


def roofs_plot(groups: list[Rows], where: str) -> Figure:
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


def memory_plot(groups: list[Rows], where: str) -> Figure:
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
        axes.barh(y, peak, height=0.68, color=BLUE if row["who"].startswith(ops.OURS) else LIGHT)
        if planned:
            axes.plot([planned] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=1.6)
        after = planned if 0 <= planned - peak < 0.06 * widest else peak  # the line would cross the number
        axes.text(after, y, f" {peak:,.0f}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(lines)), [row["who"] if isinstance(row, dict) else row for row in lines], fontsize=8.5)
    for tick, row in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if isinstance(row, dict) else "bold")
    axes.set_xlim(0, 1.12 * widest)
    return figure


def training_plot(rows: Rows, where: str) -> Figure:
    """Curves of every side over each other, of rewards where answers are sampled, else of losses; and their speeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[2, 1])
    what = "rewards" if "rewards" in rows[0] else "losses"
    for index, row in enumerate(rows):
        curves.plot(range(1, len(row[what]) + 1), row[what], label=name(row), **CURVES[min(index, 2)])
    curves.set(
        title=f"{rows[0]['task'].upper()} {what}, same rows in the same order", xlabel=f"step\n{where}", ylabel=what
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


def colour(row: Row) -> str:
    """A side's."""
    return SIDE_COLOURS.get(row["side"], GREY)


def name(row: Row) -> str:
    """A side's."""
    return {"trl": "TRL as installed", "trl-fair": "TRL, rows selected"}.get(row["side"], row["side"])
