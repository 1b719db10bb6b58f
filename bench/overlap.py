"""``fastalign bench overlap``: what of packing, gathers and reductions lies beside computation, in a step's profile.

Ranks train a small Llama over gloo on one machine's CPU; torch.profiler records all threads of rank 0 during one step.
Beside computation is what runs while another thread of the rank computes. The second row packs the next step in a
thread, which the engine does on a GPU alone: on a CPU that thread would take a core from the step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import common
from bench.plan import Case, flags_of
from fastalign.arguments import parse_config

SHAPE = {
    **{"model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768},
    **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
}
STEP = 3
"""The step that is profiled."""
PARTS = {
    "packing": ("packing",),
    "gathers": ("gloo:all_gather",),
    "reductions": ("gloo:all_reduce", "gloo:reduce_scatter"),  # gloo scatters what it has reduced whole
}
WAITS = ("gloo:", "c10d::", "FSDP::", "record_param_comms", "autograd::", "RegisterPostBackward", "packing", "Profiler")
"""Beginnings of the names of events in which a rank may wait for others; the rest computes or moves its own memory."""
Spans = list[tuple[float, float]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--ranks", type=common.positive, default=4, help="ranks (default 4)")
    common.add_records(parser)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """Profile both ways, print and record them; the exit code."""
    if options.child:
        child(*options.child)
        return 0
    rows = [{"bench": "overlap", "ranks": options.ranks, **spawn(way, options.ranks)} for way in ("inline", "ahead")]
    lines = [(row["packs"], *(as_text(row["parts"][name]) for name in PARTS), f"{row['step']:.2f}") for row in rows]
    common.print_table(f"{options.ranks} ranks, gloo: ms of a step, and share beside computation", COLUMNS, lines)
    if options.record:
        common.record("overlap", rows, common.environment(), options.results)
    return 0


COLUMNS = ("packs", *PARTS, "s a step")


def as_text(part: dict[str, float]) -> str:
    """Milliseconds and share."""
    return f"{1000 * part['seconds']:.1f} ({part['beside']:.0%})" if part["seconds"] else "none"


def spawn(way: str, ranks: int) -> dict[str, Any]:
    """A run under torchrun, profiled."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"model.config": SHAPE, "batch.size": 8 * ranks, "batch.tokens": 1024, "run.steps": STEP + 1}
        words = flags_of(Case("sft", flags=flags), Path(folder))
        launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, "--nproc-per-node", str(ranks), "-m", "bench", "overlap", "--child", way, folder, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"a profile failed: {done.stderr.strip()[-600:]}")
        return {"packs": way, **json.loads((Path(folder) / "profile.json").read_text())}


def child(way: str, folder: str, *words: str) -> None:
    """Train as one rank; rank 0 leaves what its profile of one step says."""
    from fastalign.engine import train as engine

    pack = engine.pack_share

    def noted(*known: Any) -> Any:
        with record_function("packing"):
            return pack(*known)

    def feed(job: engine.Job) -> engine.Feed:
        return engine.Feed(job.source, partial(noted, job), ahead=way == "ahead")

    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    main_rank = os.environ["RANK"] == "0"
    profiler = profile(activities=[ProfilerActivity.CPU], experimental_config=config) if main_rank else nullcontext()

    def on_step(step: int) -> None:
        if step == STEP - 1:
            profiler.__enter__()
        if step == STEP:
            profiler.__exit__(None, None, None)
            if main_rank:
                (Path(folder) / "profile.json").write_text(json.dumps(shares(profiler.events())))

    engine.make_feed = feed
    engine.train(parse_config("sft", list(words)), on_step=on_step)


def shares(events: Iterable[Any]) -> dict[str, Any]:
    """Seconds of each part and of the step, and the share of each part that lies beside computation."""
    spans = [(e.name, e.thread, (e.time_range.start / 1e6, e.time_range.end / 1e6)) for e in events]
    begin, end = min(s[0] for *_, s in spans), max(s[1] for *_, s in spans)
    computes = union(s for name, _, s in spans if not name.startswith(WAITS))
    parts = {}
    for part, names in PARTS.items():
        mine = [(thread, s) for name, thread, s in spans if name.startswith(names)]
        if part == "packing":  # what it computes itself is not beside it
            threads = {thread for thread, _ in mine}
            others = union(s for name, thread, s in spans if not name.startswith(WAITS) and thread not in threads)
        else:
            others = computes
        found = union(s for _, s in mine)
        seconds, beside = length(found), length(common_spans(found, others))
        parts[part] = {"seconds": seconds, "beside": beside / seconds if seconds else 0.0}
    return {"step": end - begin, "computing": length(computes), "parts": parts}


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """The same time, in spans that do not meet."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def common_spans(one: Spans, other: Spans) -> Spans:
    """The time that is in both."""
    both = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return [(start, end) for start, end in both if start < end]


def length(spans: Spans) -> float:
    """Of spans that do not meet."""
    return sum(end - start for start, end in spans)
