"""report.html: the settings, a table and the curves of a run in one self-contained file."""

from __future__ import annotations

import html
import importlib.util
import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.disk import write_whole
from fastalign.engine.output.metrics import read_lines
from fastalign.engine.output.rundir import read_settings
from fastalign.engine.timing import PARTS
from fastalign.words import as_yaml

PLOTTED = (
    *("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"),
    *("objective/kl", "val/ratio_max", "val/ratio_min", "clip_ratio/region_mean", "critic/vf_explained_var"),
    *("sampling/sampling_logp_difference/max",),
    *("loss", "accuracy", "margin", "ece", "rank_accuracy", "best_is_top1", "rank_loss", "sft_loss", "nll", "kl"),
    *("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"),
    *("logps/chosen", "logps/rejected", "mean_token_accuracy", "entropy", "grad_norm", "lr"),
    *("tokens_per_second", "tokens_computed_per_second", "share_ratio", "packing_efficiency", "mfu"),
)
"""Metrics that get a plot, in this order, if a run has them; ``eval_`` twins share it."""
BUCKETS = 400
"""Stretches of steps in a plot of a long run, about one for each pixel; each shows its lowest and highest value."""
MOST_POINTS = 2000
"""Points of a metric that are held, and drawn; beyond, each bucket keeps two."""
BATCH = 4096
"""Lines that are in memory together."""
SHOWN_SAMPLES = 12
"""Completions that are shown of the first step, and of the last."""
TAIL = 2**22
"""Bytes at the end of samples.jsonl in which the last step is looked for."""
NO_METRICS = {"step", "schema", "wall_time"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2 { font-weight: 600 } table { border-collapse: collapse } td, th { padding: .2em 1em .2em 0; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #eee }
pre { background: #f6f6f6; padding: 1em }
.samples td { text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere }
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
    steps, curves = read_curves(directory / "metrics.jsonl")
    if not steps and not (directory / "config.yaml").exists():
        raise ValueError(
            f"{directory} holds no run: expected config.yaml and metrics.jsonl; name the output_dir of a run"
        )
    settings = read_settings(directory) if (directory / "config.yaml").exists() else {}
    path = directory / "report.html"
    samples = samples_table(directory / "samples.jsonl")
    write_whole(path, page(directory.name, settings, steps, curves, samples), "the report", "run this again")
    return path


class Curve:
    """A metric over the steps, in the memory of a few points however many there are.

    Attributes:
        first, last, total: of all values.
        steps, values: to draw: all, or of a long run the lowest and highest of each bucket, so that no spike is lost.
    """

    def __init__(self, steps: np.ndarray, values: np.ndarray) -> None:
        self.first, self.total = float(values[0]), 0.0
        self.steps, self.values = steps[:0], values[:0]
        self.add(steps, values)

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Take up the next steps."""
        self.last, self.total = float(values[-1]), self.total + float(values.sum())
        self.steps, self.values = np.concatenate([self.steps, steps]), np.concatenate([self.values, values])
        if len(self.steps) > MOST_POINTS:
            kept = extremes(self.steps, self.values)
            self.steps, self.values = self.steps[kept], self.values[kept]


def extremes(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Positions of the lowest and the highest value in each of ``BUCKETS`` equal stretches of steps, in order."""
    buckets = (steps - steps.min()) * BUCKETS // (np.ptp(steps) + 1)
    order = np.lexsort((values, buckets))  # by bucket, then by value
    edges = np.flatnonzero(np.diff(buckets[order], prepend=-1, append=BUCKETS))
    return np.unique([order[edges[:-1]], order[edges[1:] - 1]])


def read_curves(path: Path) -> tuple[int, dict[str, Curve]]:
    """The last step, 0 without any, and the numeric metrics in order of appearance, from one pass over the lines."""
    last, curves = 0, {}
    records = (record for _, record in read_lines(path) if record is not None)
    while some := list(islice(records, BATCH)):
        last = some[-1]["step"]
        for name in dict.fromkeys(name for record in some for name in record if name not in NO_METRICS):
            found = [(r["step"], v) for r in some if isinstance(v := r.get(name), int | float) and math.isfinite(v)]
            if found:
                steps, values = np.array([step for step, _ in found]), np.array([v for _, v in found], np.float64)
                curves[name].add(steps, values) if name in curves else curves.update({name: Curve(steps, values)})
    return last, curves


def page(name: str, settings: dict[str, Any], steps: int, curves: dict[str, Curve], samples: str = "") -> str:
    """The whole document."""
    title = html.escape(f"{settings.get('method', 'run')}: {name}")
    config = html.escape(as_yaml(settings))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>{summary_table(steps, curves)}{time_table(curves)}{plots(curves)}{samples}"
        f"<h2>Settings</h2><pre>{config}</pre></html>\n"
    )


def summary_table(steps: int, curves: dict[str, Curve]) -> str:
    """First, last, lowest and highest value of every numeric metric."""
    rows = [(name, (c.first, c.last, c.values.min(), c.values.max())) for name, c in curves.items()]
    cells = "".join(f"<tr><td>{html.escape(name)}" + "".join(f"<td>{v:.5g}" for v in four) for name, four in rows)
    read = f"{steps} steps" if steps else "no step finished yet"
    return f"<h2>Metrics ({read})</h2><table><tr><th>metric<th>first<th>last<th>lowest<th>highest{cells}</table>"


def time_table(curves: dict[str, Curve]) -> str:
    """Where the time of all steps went: seconds and share of each part."""
    names = [f"t_{part}" for part in ("step", *PARTS, "other")]
    totals = {name: curves[name].total if name in curves else 0.0 for name in names}
    whole = totals["t_step"]
    if not whole:
        return ""
    cells = "".join(f"<tr><td>{name}<td>{t:.4g}<td>{t / whole:.1%}" for name, t in totals.items())
    return f"<h2>Time</h2><table><tr><th>part<th>seconds<th>share{cells}</table>"


def samples_table(path: Path) -> str:
    """Sampled completions of the first and of the last step, with their rewards; nothing without samples.jsonl."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        first = parsed(islice(file, SHOWN_SAMPLES))
        file.seek(max(path.stat().st_size - TAIL, 0))
        last = parsed(file)
    steps = {record["step"]: some for some in (first, last) for record in some[-1:]}
    tables = [samples_of(step, [r for r in some if r["step"] == step][:SHOWN_SAMPLES]) for step, some in steps.items()]
    return "".join(["<h2>Sampled completions</h2>", *tables]) if tables else ""


def parsed(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The objects of those lines that are whole: the first may begin in the middle of one, the last be cut short."""
    found = []
    for line in lines:
        with suppress(ValueError):
            found += [record] if isinstance(record := json.loads(line), dict) else []
    return found


def samples_of(step: int, records: Sequence[dict[str, Any]]) -> str:
    """The samples of a step as rows."""

    def cell(value: Any) -> str:
        text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<td>{html.escape(text)}"

    names = ("prompt", "completion", "finish_reason", "reward", "advantage")
    rows = "".join("<tr>" + "".join(cell(record.get(name)) for name in names) for record in records)
    head = "".join(f"<th>{name}" for name in names)
    return f"<h3>Step {step}</h3><table class=samples><tr>{head}{rows}</table>"


def plots(curves: dict[str, Curve]) -> str:
    """Curves as inline SVG; matplotlib draws them."""
    if importlib.util.find_spec("matplotlib") is None:
        return "<p>No plots: matplotlib is not installed (pip install fastalign[report], then `fastalign report`).</p>"
    drawn = [plot(curves, name) for name in PLOTTED if name in curves or f"eval_{name}" in curves]
    return f"<h2>Curves</h2><div class=plots>{''.join(drawn)}</div>"


def plot(curves: dict[str, Curve], name: str) -> str:
    """One metric over steps, with its held-out twin, as an svg element."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.8))
    figure.subplots_adjust(left=0.17, right=0.96, bottom=0.18, top=0.88)
    axes = figure.add_subplot(title=name, xlabel="step")
    for key, style in ((name, "-"), (f"eval_{name}", "o--")):
        if key in curves:
            axes.plot(curves[key].steps, curves[key].values, style, label=key, linewidth=1.2, markersize=3)
    axes.legend(fontsize="small")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
