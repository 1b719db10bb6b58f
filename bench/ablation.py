"""``fastalign bench ablation``: what each part of a DPO step on a CPU is worth, one change per line.

Every line trains a model of its own from the same weights on the same pairs in the same order. The lines take turns in
random order at every step of one process, so that they are compared on the same pairs and under the same load. What a
step adds to memory is measured once, in an untimed step.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaForCausalLM

from bench import common, memory, workload
from bench.workload import Workload
from fastalign.config import DataConfig, OptimConfig
from fastalign.data.examples import TokenExample
from fastalign.data.loader import encode_dataset
from fastalign.data.pack import build_batch, pack
from fastalign.data.sources import load_rows
from fastalign.engine.forward import Models, run_head
from fastalign.engine.methods import Objective, make_objective
from fastalign.engine.optim import AdamW, make_optimizer
from fastalign.engine.prepare import prepare
from fastalign.engine.reference.frozen import reference_logps
from fastalign.engine.settings import BUDGET
from fastalign.engine.timing import Stopwatch
from fastalign.engine.update import measure_work
from fastalign.losses.reduce import segment_sum
from fastalign.models.native import use_native_layers
from fastalign.models.policy import Policy
from fastalign.parallel.clip import clip_gradients
from fastalign.parallel.mesh import Axis, World
from fastalign.types import Columns, PackedBatch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Line:
    """What a line has; all of it is the engine's own step.

    Attributes:
        packed: sequences back to back in one row, without padding, in place of rows of equal length.
        scored: the head reads the rows that predict a scored token, in place of all.
        fused: `linear_loss`, in place of logits, their log-softmax and autograd.
        shared: a pair's prompt is computed once.
        native_attention: all segments in one native call, in place of one call of PyTorch's attention each.
        native_layers: norms, gates, rotations and fp32 products by native kernels.
        known: the reference's log-probs come with the data.
    """

    name: str
    packed: bool = True
    scored: bool = True
    fused: bool = True
    shared: bool = True
    native_attention: bool = True
    native_layers: bool = True
    known: bool = True


CHANGES = (
    ("packed, one segment per sequence", "packed"),
    ("head on scored rows", "scored"),
    ("fused head", "fused"),
    ("shared prompts", "shared"),
    ("native attention", "native_attention"),
    ("native layers", "native_layers"),
    ("cached reference", "known"),
)


def lines() -> list[Line]:
    """Padded rows in plain PyTorch, then one change at a time."""
    line = Line("padded rows, full logits, plain PyTorch", **dict.fromkeys((part for _, part in CHANGES), False))
    found = [line]
    for name, part in CHANGES:
        line = replace(line, name=name, **{part: True})
        found.append(line)
    return found


@dataclass(frozen=True)
class Trainee:
    """A line's model, optimizer and frozen reference; ``policy`` is a plain causal LM where rows are padded."""

    line: Line
    policy: Any
    reference: Any
    optimizer: AdamW
    objective: Objective
    work: Workload

    @property
    def models(self) -> Models:
        """The policy and the reference as the engine takes them."""
        return Models(self.policy, self.reference, self.work.dtype == "bfloat16")

    @property
    def held_bytes(self) -> int:
        """Weights, the optimizer's moments, the reference's weights."""
        models = [self.policy] if self.reference is None else [self.policy, self.reference]
        moments = (x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        return sum(x.nbytes for model in models for x in model.parameters()) + sum(x.nbytes for x in moments)


def trainee(line: Line, work: Workload) -> Trainee:
    """A line with its initial weights, which are every line's."""
    policy = model(line, work).train()
    reference = None if line.known else model(line, work).requires_grad_(False)
    optimizer = make_optimizer(policy, OptimConfig(lr=work.lr, schedule="constant"))
    return Trainee(line, policy, reference, optimizer, make_objective("dpo", {"beta": work.beta}), work)


def model(line: Line, work: Workload) -> Any:
    """The model as the line computes it."""
    plain = LlamaForCausalLM.from_pretrained(work.model, attn_implementation="sdpa", dtype=torch.float32)
    if not line.packed:
        return plain
    policy = Policy(plain, attention="cpp" if line.native_attention else "sdpa")
    if line.native_layers:
        use_native_layers(plain)
    return policy


def read_examples(work: Workload) -> list[TokenExample]:
    """The workload's pairs in tokens."""
    data = DataConfig(path=str(work.data), max_length=work.max_length, cache_dir=str(work.path / "cache"))
    dataset = encode_dataset(load_rows(str(work.data)), AutoTokenizer.from_pretrained(work.model), data, "dpo")
    return [dataset[i] for i in range(len(dataset))]


def with_reference(examples: Sequence[TokenExample], one: Trainee) -> list[TokenExample]:
    """The examples with their log-probs under the weights as they are now."""

    def logps(example: TokenExample) -> Any:
        with one.models.precision(CPU):
            return reference_logps(one.policy, build_batch([example], share_prefix=True), one.objective).numpy()

    return [example.fill(ref_logps=logps(example)) for example in examples]


# --- a step ----------------------------------------------------------------------------------------------------------


def train_step(one: Trainee, examples: Sequence[TokenExample]) -> float:
    """One optimizer step; the mean loss of its pairs."""
    total = 0.0
    for batch in batches(one, examples):
        with one.models.precision(CPU):
            loss = loss_of(one, batch, 1 / len(examples))
        loss.backward()
        total += loss.item()
    clip_gradients(one.policy.parameters(), 1.0)
    one.optimizer.step()
    one.optimizer.zero_grad()
    return total


def batches(one: Trainee, examples: Sequence[TokenExample]) -> list[Any]:
    """One padded batch of all sequences, or packed micro-batches, for the fused head with their columns."""
    if not one.line.packed:
        return [pad(examples)]
    packed, world = pack(examples, BUDGET, one.line.shared), World(Axis(), CPU)
    if not one.line.fused:
        return packed
    return prepare(one.models, packed, one.objective, measure_work(packed, world, 0), world, Stopwatch(CPU), {})


def loss_of(one: Trainee, batch: Any, scale: float) -> Tensor:
    """``scale`` times the sum of a batch's losses."""
    if one.line.fused:
        return run_head(one.models, batch, one.objective)[0]
    sums = packed_sums if one.line.packed else padded_sums
    with torch.no_grad():
        reference = sums(one, one.reference, batch)
    ratios = sums(one, one.policy, batch) - reference
    return -scale * logsigmoid(one.work.beta * (ratios[0::2] - ratios[1::2])).sum()


# --- in plain PyTorch ------------------------------------------------------------------------------------------------


def plain_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of the labels, by way of all others."""
    return logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def pad(examples: Sequence[TokenExample]) -> dict[str, Tensor]:
    """``[2P, L]`` ids, which of them are there, and which are scored; padded on the right."""
    rows = [row for example in examples for row in example.sequences]
    ids, scored = ([torch.as_tensor(row[i]) for row in rows] for i in (0, 1))
    there = [torch.ones(len(x), dtype=torch.long) for x in ids]
    names, parts = ("ids", "scored", "there"), (ids, scored, there)
    return {name: pad_sequence(part, batch_first=True) for name, part in zip(names, parts, strict=True)}


def padded_sums(one: Trainee, plain: Any, batch: dict[str, Tensor]) -> Tensor:
    """``[2P]`` log-probs of the completions."""
    logits = plain(input_ids=batch["ids"], attention_mask=batch["there"], use_cache=False).logits
    return (plain_logps(logits[:, :-1], batch["ids"][:, 1:]) * batch["scored"][:, 1:]).sum(-1)


def packed_sums(one: Trainee, policy: Policy, batch: PackedBatch) -> Tensor:
    """``[2P]`` log-probs of the completions; the head reads every row unless the line says otherwise."""

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain_logps(torch.nn.functional.linear(hidden, weight), labels)

    if one.line.scored:
        return segment_sum(policy(batch, head), batch.cu_seqlens)
    return segment_sum(policy(every_row(batch), head)[batch.rows], batch.cu_seqlens)


def every_row(batch: PackedBatch) -> PackedBatch:
    """The batch with all its T rows read; those that predict no scored token have label 0."""
    labels = torch.zeros(batch.num_tokens, dtype=torch.long)
    labels[batch.rows] = batch.labels
    return replace(batch, rows=torch.arange(batch.num_tokens), labels=labels)


# --- measuring -------------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    new(
        "--model",
        choices=list(workload.SIZES),
        default="9m",
        help="parameters of the Llama that is trained (default 9m)",
    )
    new("--steps", type=common.positive, default=9, help="optimizer steps of each line, the two untimed ones included")
    new("--examples", type=common.positive, default=8, help="pairs per step (default 8)")
    new("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast in every line")
    new("--threads", type=common.positive, default=2, help="CPU threads (default 2)")
    common.add_records(parser)


@dataclass
class Log:
    """What a line's steps took: wall and CPU seconds of the timed ones, all losses, memory."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_mib: float = 0.0
    added_mib: float = 0.0


def measure(work: Workload) -> dict[str, Log]:
    """Train all lines step by step."""
    torch.set_num_threads(work.threads)
    trainees = [trainee(line, work) for line in lines()]
    known = with_reference(read_examples(work), trainees[-1])
    logs = {one.line.name: Log() for one in trainees}
    for step in range(work.steps):
        examples = known[step * work.examples : (step + 1) * work.examples]
        for one in random.Random(step).sample(trainees, len(trainees)):
            run_step(one, examples, logs[one.line.name], step - work.warmup)
    return logs


def run_step(one: Trainee, examples: Sequence[TokenExample], log: Log, timed: int) -> None:
    """One step of a line; the last untimed one, -1, is that whose memory is measured."""
    if not one.line.known:
        examples = [replace(example, columns=Columns()) for example in examples]
    before = memory.start("cpu")[0] if timed == -1 else 0
    wall, cpu = time.perf_counter(), time.process_time()
    log.losses.append(train_step(one, examples))
    if timed >= 0:
        log.wall.append(time.perf_counter() - wall)
        log.cpu.append(time.process_time() - cpu)
    elif timed == -1:
        log.added_mib = (memory.peaks("cpu")[0] - before) / common.MIB
        log.held_mib = one.held_bytes / common.MIB


def figures(logs: dict[str, Log]) -> list[dict[str, Any]]:
    """A row per line: factors are of total times, distances the largest over all steps."""
    rows, first = [], next(iter(logs.values()))
    before = first
    for name, log in logs.items():
        low, middle, high = common.quantiles(log.wall)
        rows.append(
            {
                "line": name,
                "step_seconds_p20": low,
                "step_seconds_p50": middle,
                "step_seconds_p80": high,
                "over_line_before": sum(before.wall) / sum(log.wall),
                "over_first": sum(first.wall) / sum(log.wall),
                "cpu_over_line_before": sum(before.cpu) / sum(log.cpu),
                "cpu_seconds_per_step": sum(log.cpu) / len(log.cpu),
                "peak_mib": log.held_mib + log.added_mib,
                "held_mib": log.held_mib,
                "max_distance": max(abs(a - b) for a, b in zip(log.losses, first.losses, strict=True)),
                "losses": log.losses,
            }
        )
        before = log
    return rows


def print_figures(rows: Sequence[dict[str, Any]], facts: dict[str, Any], work: Workload) -> None:
    """The table; the losses' largest distance stands beside the speed."""
    cells = []
    for row in rows:
        steps = "/".join(f"{row[f'step_seconds_p{p}']:.2f}" for p in (20, 50, 80))
        factors = (
            f"{row['over_line_before']:.2f}x",
            f"{row['over_first']:.2f}x",
            f"{row['cpu_over_line_before']:.2f}x",
        )
        peak, loss = (f"{row['peak_mib']:.0f}", f"{row['held_mib']:.0f}"), f"{row['losses'][-1]:.5f}"
        cells.append((row["line"], steps, *factors, *peak, loss, f"{row['max_distance']:.1e}"))
    columns = ("", "s/step p20/50/80", "to line before", "to first", "CPU before", "peak MiB", "of it held")
    what = f"{facts['parameters'] / 1e6:.1f}M-parameter Llama"
    timed = f"{work.steps - work.warmup} timed steps after {work.warmup}"
    common.print_table(
        f"DPO on {facts['data']}, {what}, {work.dtype}, {work.examples} pairs a step, {work.threads} threads",
        (*columns, "last loss", "max distance"),
        cells,
        caption=f"{timed}; held: weights, moments, reference; distance of the losses from the first line's",
    )
    print(f"largest distance of any loss from the first line's: {max(row['max_distance'] for row in rows):.2e}")


def main(options: argparse.Namespace) -> int:
    """Measure on hh-rlhf where it is; the exit code."""
    if options.steps <= Workload.warmup:
        raise ValueError(f"--steps: the first {Workload.warmup} are not timed, expected more, got {options.steps}")
    if common.shared_data("hh-rlhf") is None:
        print("skipped: hh-rlhf is not here (put its files under ../shared/data, or set FASTALIGN_SHARED)")
        return 0
    wanted = {name: getattr(options, name) for name in ("steps", "examples", "dtype", "threads")}
    with tempfile.TemporaryDirectory(prefix="fastalign-bench-") as directory:
        work = Workload(directory, **workload.SIZES[options.model], **wanted)
        facts = workload.prepare(work)
        rows = figures(measure(work))
    print_figures(rows, facts, work)
    if options.record:
        what = {"bench": "ablation", "dtype": work.dtype, "steps": work.steps, "examples": work.examples, **facts}
        where = {**common.environment("cpu"), "threads": work.threads}
        print("recorded in", common.record("ablation", ({**what, **row} for row in rows), where, options.results))
    return 0
