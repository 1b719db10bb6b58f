"""``fastalign bench memory``: peak memory of every candidate, alone in a process, beside the planner's figure.

What counts is what a call adds: the inputs and everything that was there before are subtracted. On a CPU that is the
growth of the resident set to its peak, which Linux lets a process reset; on a GPU the allocator's own counts. A first
call, which loads code, compiles and fills the libraries' caches, is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import cases, common
from bench.common import MIB
from bench.field import OURS, Inputs, Loss, Setting
from bench.measure import Case, recorded_plans

MODES = {
    "no grad": "the loss under no_grad",
    "forward": "the loss with what its backward needs",
    "full": "forward and backward",
}
DEFAULT = "token_logps-backward-bf16,policy_loss-in-place-bf16,linear_loss,preference_head-long,grpo_head-bf16,jsd-bf16"
DEFAULT_GPU = "backward-qwen3,policy_loss-qwen3,linear_loss,linear_divergence"
SLACK = 1.05
"""How much more than the planner's figure a call may take on a GPU."""
LIMIT = 300
"""Seconds for one candidate."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    common.add_device(parser)
    new("--only", metavar="PATTERN", help="cases whose name holds this (default: one or two of each family)")
    new("--who", metavar="NAMES", default="", help="candidates whose name holds one of these, separated by commas")
    new("--mode", choices=list(MODES), action="append", help="measure these modes only")
    new("--threads", type=common.positive, help="CPU threads (default: torch's)")
    new("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    common.add_records(parser)
    new(
        "--enforce",
        action="store_true",
        help=f"exit with 1 where a GPU peak is over {SLACK} times the planner's figure",
    )
    new("--toy", action="store_true", help=argparse.SUPPRESS)
    new("--child", nargs="+", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """Measure the cases, print and record them; the exit code."""
    common.check_device(options.device)
    setting = Setting(options.device, options.compile, options.toy)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    builders = cases.cases(setting)
    if options.child:
        name, who, *modes = options.child
        print(json.dumps(child(builders[name](), who, modes)))
        return 0
    names = cases.matching(list(builders), options.only or (DEFAULT_GPU if setting.gpu else DEFAULT))
    where, rows = common.environment(setting.device), []
    for name in names:
        found = []
        for row in measured(name, builders[name](), options):
            found.append(row)
            if options.record:
                common.record(f"memory-{setting.device}", [row], where, options.results)
        print_case(found)
        rows += found
    planned = [row for row in rows if row.get("predicted_mib")]
    over = [row for row in planned if row["peak_mib"] > max(SLACK * row["predicted_mib"], row["predicted_mib"] + 1)]
    for row in over:
        print(f"over the planner's figure: {row['case']}, {row['who']}: {row['peak_mib']:.0f} MiB, "
              f"planned {row['predicted_mib']:.0f}")  # fmt: skip
    return int(bool(options.enforce and setting.gpu and over))


# --- the parent ------------------------------------------------------------------------------------------------------


def measured(name: str, case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for every candidate of a case and mode, as soon as it is there."""
    what = {"bench": "memory", "case": case.name, "shape": case.shape, "dtype": str(case.dtype).split(".")[-1]}
    modes, wanted = options.mode or list(MODES), options.who.split(",")
    for who in case.field.losses:
        if any(part in who for part in wanted):
            for mode, figures in spawn(name, who, modes, options).items():
                yield {**what, "who": who, "mode": mode, **figures}
    for who, reason in case.field.skipped.items():
        yield {**what, "who": who, "mode": modes[-1], "failure": reason}


def spawn(name: str, who: str, modes: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One candidate in a process of its own: its figures by mode, or why there are none."""
    command = [sys.executable, "-W", "ignore", "-m", "bench", "memory", "--device", options.device]
    command += ["--child", name, who, *modes] + ["--toy"] * options.toy + ["--no-compile"] * (not options.compile)
    command += ["--threads", str(torch.get_num_threads())]
    # Freed blocks of a MiB and more go back to the system: a peak above what is resident is then a peak of this call.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    try:
        done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {mode: {"failure": f"took more than {LIMIT} s"} for mode in modes}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
        return {mode: {"failure": reason} for mode in modes}
    return json.loads(done.stdout.splitlines()[-1])


def print_case(rows: list[dict[str, Any]]) -> None:
    """A line for each candidate, its modes side by side, ours beside the planner's figure."""
    timed = [row for row in rows if not row.get("failure")]
    lines = []
    for who in dict.fromkeys(row["who"] for row in timed):
        modes = {row["mode"]: row for row in timed if row["who"] == who}
        peaks = (f"{modes[mode]['peak_mib']:.1f}" if mode in modes else "" for mode in MODES)
        full = modes.get("full", {})
        planned = f"{full['predicted_mib']:.1f}" if full.get("predicted_mib") else ""
        lines.append((who, *peaks, f"{full.get('outputs_mib', 0):.1f}", planned))
    columns = ("peak MiB over the inputs", *MODES, "of it gradients", "planned")
    common.print_table(f"{rows[0]['case']}, {rows[0]['shape']}, {rows[0]['dtype']}", columns, lines)
    for row in timed:
        if row["mode"] == "full" and row["who"] == OURS and row["plans"]:
            print("plan of fastalign:", "; ".join(row["plans"]))
    for who, reason in dict.fromkeys((row["who"], row["failure"]) for row in rows if row.get("failure")):
        print(f"no number: {who}: {reason}")


# --- the child -------------------------------------------------------------------------------------------------------


def child(case: Case, who: str, modes: list[str]) -> dict[str, dict[str, Any]]:
    """What one call of each mode adds to this process's memory at its peak."""
    loss, x = case.field.losses[who], case.make(torch.Generator(case.device).manual_seed(0))
    call(loss, x, modes[-1])  # loads code and fills caches
    return {mode: added(case, loss, x, mode, who.startswith(OURS)) for mode in modes}


def added(case: Case, loss: Loss, x: Inputs, mode: str, ours: bool) -> dict[str, Any]:
    """The figures of one call."""
    clear(x)
    before = start(case.device)
    with recorded_plans() as plans:
        kept = call(loss, x, mode)
    peak, reserved = (value - was for value, was in zip(peaks(case.device), before, strict=True))
    del kept
    grads = [v.grad for v in x.values() if v.grad is not None]
    planned = prediction(plans, grads) if ours and plans and mode != "forward" else None
    return {
        "peak_mib": peak / MIB,
        "reserved_mib": reserved / MIB,
        "inputs_mib": sum(v.nbytes for v in x.values()) / MIB,
        "outputs_mib": sum(g.nbytes for g in grads) / MIB,
        "predicted_mib": None if planned is None else planned / MIB,
        "plans": list(dict.fromkeys(map(str, plans))),
    }


def clear(x: Inputs) -> None:
    """Forget the gradients of an earlier call."""
    for value in x.values():
        value.grad = None


def call(loss: Loss, x: Inputs, mode: str) -> torch.Tensor:
    """One call of a mode."""
    if mode == "no grad":
        with torch.no_grad():
            return loss(x)
    value = loss(x)
    if mode == "full":
        value.backward()
    return value


def prediction(plans: list[Any], grads: list[torch.Tensor]) -> int:
    """The planner's workspace and accumulator, and the gradients that are not that accumulator."""
    accumulator = max(plan.accumulator_bytes for plan in plans)
    made = sum(g.nbytes for g in grads if not (g.dtype == torch.float32 and g.nbytes == accumulator))
    return max(plan.workspace_bytes for plan in plans) + accumulator + made


def start(device: str) -> tuple[int, int]:
    """Begin a new peak; what is in use now: (allocated, reserved) on a GPU, twice the resident set on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident
    return common.status_bytes("VmRSS"), common.status_bytes("VmRSS")


def peaks(device: str) -> tuple[int, int]:
    """The peak since `start`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return common.status_bytes("VmHWM"), common.status_bytes("VmHWM")
