"""report.html: the settings, a table and the curves of a run in one self-contained file."""

from __future__ import annotations

import html
import importlib.util
import io
from pathlib import Path
from typing import Any

import yaml

from fastalign.data.disk import write_whole
from fastalign.engine.metrics import PARTS, read_metrics
from fastalign.engine.rundir import read_settings

PLOTTED = (
    *("loss", "accuracy", "margin", "ece", "rank_accuracy", "best_is_top1", "rank_loss", "sft_loss", "nll", "kl"),
    *("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"),
    *("logps/chosen", "logps/rejected", "mean_token_accuracy", "entropy", "grad_norm", "lr"),
    *("tokens_per_second", "tokens_computed_per_second", "share_ratio", "packing_efficiency", "mfu"),
)
"""Metrics that get a plot, in this order, if a run has them; ``eval_`` twins share it."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { font-weight: 600 } table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #eee }
pre { background: #f6f6f6; padding: 1em }
.plots { display: flex; flex-wrap: wrap; gap: 1em } .plots svg { width: 340px; height: auto }
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` from what a run directory holds, finished or not.

    Args:
        run_dir: the ``output_dir`` of a run.

    Returns:
        the path of the report.

    Raises:
        ValueError: the directory holds no run.
        OSError: the report cannot be written.
    """
    directory = Path(run_dir)
    records = read_metrics(directory / "metrics.jsonl")
    if not records and not (directory / "config.yaml").exists():
        raise ValueError(
            f"{directory} holds no run: expected config.yaml and metrics.jsonl; name the output_dir of a run"
        )
    settings = read_settings(directory) if (directory / "config.yaml").exists() else {}
    path = directory / "report.html"
    write_whole(path, page(directory.name, settings, records), "the report", "run this again")
    return path


def page(name: str, settings: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The whole document."""
    title = html.escape(f"{settings.get('method', 'run')}: {name}")
    config = html.escape(yaml.safe_dump(settings, sort_keys=False))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>{summary_table(records)}{time_table(records)}{plots(records)}<h2>Settings</h2><pre>{config}</pre></html>\n"
    )


def summary_table(records: list[dict[str, Any]]) -> str:
    """First, last, lowest and highest value of every numeric metric."""
    rows = [(name, [y for _, y in series(records, name)]) for name in metric_names(records)]
    cells = "".join(
        f"<tr><td>{html.escape(name)}" + "".join(f"<td>{v:.5g}" for v in (ys[0], ys[-1], min(ys), max(ys)))
        for name, ys in rows
        if ys
    )
    steps = f"{records[-1]['step']} steps" if records else "no step finished yet"
    return f"<h2>Metrics ({steps})</h2><table><tr><th>metric<th>first<th>last<th>lowest<th>highest{cells}</table>"


def time_table(records: list[dict[str, Any]]) -> str:
    """Where the time of all steps went: seconds and share of each part."""
    totals = {f"t_{part}": sum(y for _, y in series(records, f"t_{part}")) for part in ("step", *PARTS, "other")}
    whole = totals["t_step"]
    if not whole:
        return ""
    cells = "".join(f"<tr><td>{name}<td>{t:.4g}<td>{t / whole:.1%}" for name, t in totals.items())
    return f"<h2>Time</h2><table><tr><th>part<th>seconds<th>share{cells}</table>"


def plots(records: list[dict[str, Any]]) -> str:
    """Curves as inline SVG; matplotlib draws them."""
    if importlib.util.find_spec("matplotlib") is None:
        return "<p>No plots: matplotlib is not installed (pip install fastalign[report], then `fastalign report`).</p>"
    drawn = [plot(records, name) for name in PLOTTED if series(records, name) or series(records, f"eval_{name}")]
    return f"<h2>Curves</h2><div class=plots>{''.join(drawn)}</div>"


def plot(records: list[dict[str, Any]], name: str) -> str:
    """One metric over steps, with its held-out twin, as an svg element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.8))
    figure.subplots_adjust(left=0.17, right=0.96, bottom=0.18, top=0.88)
    axes = figure.add_subplot(title=name, xlabel="step")
    for key, style in ((name, "-"), (f"eval_{name}", "o--")):
        points = series(records, key)
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key, linewidth=1.2, markersize=3)
    axes.legend(fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def metric_names(records: list[dict[str, Any]]) -> list[str]:
    """Numeric fields in order of appearance."""
    names = dict.fromkeys(k for record in records for k, v in record.items() if isinstance(v, (int, float)))
    return [name for name in names if name not in ("step", "schema", "wall_time")]


def series(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """``(step, value)`` where the metric is a number."""
    return [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
