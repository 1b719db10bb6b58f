"""What a run is about to do, printed once before its first step: settings that matter, data, and one example."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastalign.config import SamplerConfig
from fastalign.data.examples import TokenExample
from fastalign.data.formats import ROWS
from fastalign.rl.rollouts import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastalign.engine.train import Job

LONGEST_PART = 320
"""Characters of a scored or unscored part of the example that are shown."""
MOST_PARTS = 8
"""Parts of a conversation that are shown."""
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that are escaped: control and format characters could change what the terminal shows."""


@dataclass(frozen=True)
class Part:
    """A stretch of a decoded sequence; ``scored`` when the loss reads its tokens."""

    text: str
    scored: bool


Line = tuple[str, list[Part]]
"""A name, and what is said of it."""


def show_overview(job: Job, done: int) -> None:
    """Print the block, on the main rank alone; ``done`` optimizer steps lie behind a resumed run."""
    if not job.world.is_main:
        return
    lines = [(name, [Part(text, False)]) for name, text in facts(job, done)]
    if job.config.run.show_example:
        lines += prompt_lines(job) or example_lines(job.dataset.fetch([0])[0], job.tokenizer, job.objective.data)
    show(lines)


# --- facts -----------------------------------------------------------------------------------------------------------


def facts(job: Job, done: int) -> Iterator[tuple[str, str]]:
    """The lines before the example, as (name, text)."""
    config = job.config
    yield "method", config.method
    yield "loss", describe_loss(config.loss)
    yield "model", describe_model(job)
    yield "parameters", describe_parameters(job)
    yield "dtype", describe_dtype(job)
    yield "device", describe_device(job)
    if job.objective.needs_reference:
        name = "teacher" if job.objective.method.teacher else "reference"
        yield name, config.reference.path or "the model as it starts"
    if isinstance(job.source, Rollouts):
        yield "rewards", describe_rewards(job.source)
        yield "sampler", describe_sampler(job.source.plan.sampler)
    yield "training", f"{training_source(job)}: {describe_counts(job.dataset.counts, config.data.max_length)}"
    if job.held_out_counts is not None:
        source = config.data.eval_path or f"data.eval_fraction {config.data.eval_fraction:g} of the training rows"
        yield "held out", f"{source}: {describe_counts(job.held_out_counts, config.data.max_length)}"
    resumed = f", going on after step {done:,}" if done else ""
    yield "steps", f"{job.total:,} of {job.source.describe()}{resumed}"
    yield "writes to", config.run.output_dir


def describe_loss(loss: Mapping[str, Any]) -> str:
    """``dpo (beta 0.1)``; the losses of a sum with a plus between them."""
    names = [loss["name"]] if isinstance(loss["name"], str) else loss["name"]
    options = [f"{key} {value}" for key, value in loss.items() if key != "name"]
    return " + ".join(names) + (f" ({', '.join(options)})" if options else "")


def describe_rewards(source: Rollouts) -> str:
    """``accuracy, 0.2 x format``."""
    each = zip(source.names, source.weights, strict=True)
    return ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in each)


def describe_sampler(sampler: SamplerConfig) -> str:
    """``native, temperature 1, up to 256 new tokens``, and what else is not as it is by default."""
    known = ["temperature", "top_k", "top_p", "min_p", "max_turns"]
    plain = SamplerConfig(temperature=-1)  # whatever it is, it is told
    asked = [f"{name} {getattr(sampler, name):g}" for name in known if getattr(sampler, name) != getattr(plain, name)]
    return f"{sampler.backend}, {', '.join(asked)}, up to {sampler.max_new_tokens} new tokens"


def describe_model(job: Job) -> str:
    """Where the weights come from, and of what kind the model is."""
    section, policy = job.config.model, job.models.policy
    layers = getattr(policy.config, "num_hidden_layers", None)
    kind = policy.config.model_type + (f", {layers} layers" if layers else "")
    head = ", one scalar output per token" if policy.has_scalar_head else ""
    return f"{section.path or 'random weights from model.config'}: {kind}{head}"


def describe_parameters(job: Job) -> str:
    """How many there are, and which share of them is trained."""
    sizes = [(count_elements(p), p.requires_grad) for p in job.models.policy.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    if trained == total:
        return f"{total:,}, all trained"
    return f"{total:,}, of which {trained:,} are trained ({trained / total:.2%})"


def count_elements(parameter: Tensor) -> int:
    """Elements of a weight; one quantised to 4 bits holds several in each element of its storage."""
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


def describe_dtype(job: Job) -> str:
    """What the weights are kept in, with or without masters, and whether forwards run under autocast."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in job.models.policy.parameters()})
    optimizer = job.trained["policy"].optimizer
    left = " with what rounding leaves of each" if optimizer.compensated else ""
    masters = " with float32 masters" if optimizer.masters else left
    return f"weights {' and '.join(kinds)}{masters}, autocast {'bfloat16' if job.models.autocast else 'off'}"


def describe_device(job: Job) -> str:
    """The device, and how many ranks share the work in which mesh."""
    world = job.world
    name = f"{world.device} ({torch.cuda.get_device_name(world.device)})" if world.device.type == "cuda" else "cpu"
    if world.mesh is None:
        return f"{name}, 1 rank"
    replicate, shard, tp = world.mesh.shape
    cut = f" x tp {tp}" if world.tensor else ""
    return f"{name}, {world.size} ranks (dp_replicate {replicate} x dp_shard {shard}{cut})"


def training_source(job: Job) -> str:
    """Where the training rows come from."""
    data = job.config.data
    split = "" if data.path is None or Path(data.path).is_file() else f", split {data.split}"
    return f"{data.path}{split}{'' if data.limit is None else f', first {data.limit} rows'}"


def describe_counts(counts: Mapping[str, int], max_length: int) -> str:
    """``98 of 100 rows kept; dropped: prompt too long 2; truncated to 256 tokens: 7``, whatever of it there is."""
    dropped = {name.partition("_")[2]: n for name, n in counts.items() if name.startswith("dropped_") and n}
    known = {"rows", "kept", "truncated", *(f"dropped_{name}" for name in dropped)}
    kept, rows = counts["kept"], counts["rows"]
    words = [f"{kept:,} of {rows:,} rows kept" if kept <= rows else f"{rows:,} rows make {kept:,} examples"]
    words += [f"dropped: {spell(dropped)}"] if dropped else ["none dropped"]
    words.append(f"truncated to {max_length} tokens: {counts.get('truncated', 0):,}")
    others = {name: n for name, n in counts.items() if name not in known and n}
    return "; ".join([*words, *([spell(others)] if others else [])])


def spell(counts: Mapping[str, int]) -> str:
    """Reasons in words, each with its count."""
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


# --- the example -----------------------------------------------------------------------------------------------------


def prompt_lines(job: Job) -> list[Line]:
    """The first prompt, of methods that sample what is scored."""
    if not isinstance(job.source, Rollouts):
        return []
    ids, scored = job.dataset.fetch([0])[0].sequences[0]
    return [("prompt", decode_parts(ids, np.zeros_like(scored), job.tokenizer))]


def example_lines(example: TokenExample, tokenizer: PreTrainedTokenizerBase, kind: str) -> list[Line]:
    """The first example in text: one sequence, or what several share and then each; of ranked ones best and worst.

    The rows were encoded for the method ``kind``.
    """
    sequences, names = list(example.sequences), ["chosen", "rejected"]
    scores = [] if example.columns.scores is None else example.columns.scores.tolist()
    if len(sequences) == 1:
        label = {0.0: " (bad)", 1.0: " (good)"}[scores[0]] if ROWS[kind].unit == "completion" else ""
        return [(f"example{label}", decode_parts(*sequences[0], tokenizer))]
    if ROWS[kind].unit == "candidate":
        ends = [int(np.argmax(scores)), int(np.argmin(scores))]
        sequences = [sequences[i] for i in ends]
        names = [f"{name} ({scores[i]:g})" for name, i in zip(("best", "worst"), ends, strict=True)]
    common = common_length(sequences[0][0], sequences[1][0])
    shared = min(common, *(int(np.argmax(scored)) for _, scored in sequences))
    first = "both begin" if example.own_rows else "prompt"
    ids, scored = sequences[0]
    lines = [(f"example: {first}", decode_parts(ids[:shared], scored[:shared], tokenizer))]
    for name, (ids, scored) in zip(names, sequences, strict=True):
        lines.append((f"example: {name}", decode_parts(ids, scored, tokenizer, start=shared)))
    return lines


def common_length(first: Sequence[Any] | np.ndarray, second: Sequence[Any] | np.ndarray) -> int:
    """With how many equal tokens or characters both begin.

    Example:
        >>> common_length("abc", "abd")
        2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def decode_parts(ids: np.ndarray, scored: np.ndarray, tokenizer: PreTrainedTokenizerBase, start: int = 0) -> list[Part]:
    """The text from token ``start`` on, cut where scored tokens begin and end.

    Beginnings of the sequence are decoded, never its pieces: those may lose spaces, or halves of a character.
    """
    if start >= len(ids):
        return []
    edges = [start, *(int(i) for i in np.flatnonzero(np.diff(scored[start:])) + start + 1), len(ids)]
    whole = decode(ids, tokenizer)

    def place(edge: int) -> int:
        return len(whole) if edge == len(ids) else common_length(decode(ids[:edge], tokenizer), whole)

    def part(first: int, last: int) -> Part:
        return Part(shorten(whole[place(first) : place(last)], LONGEST_PART), bool(scored[first]))

    spans, half = [*pairwise(edges)], MOST_PARTS // 2
    if len(spans) <= MOST_PARTS:
        return [part(*span) for span in spans]
    left_out = Part(f" ... {len(spans) - 2 * half} parts more ... ", False)
    return [*(part(*span) for span in spans[:half]), left_out, *(part(*span) for span in spans[-half:])]


def decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """All tokens as text, special ones too."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def shorten(text: str, limit: int) -> str:
    """A long text without its middle."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


# --- the page --------------------------------------------------------------------------------------------------------


def show(lines: list[Line]) -> None:
    """Print names and texts as a table; what is scored is green on a terminal with colours, else between brackets."""
    console = Console(highlight=False, markup=False, no_color=bool(os.environ.get("NO_COLOR")))
    colours = console.is_terminal and console.color_system is not None and not console.no_color
    has_example = any(part.scored for _, parts in lines for part in parts)
    legend = "(green text is scored)" if colours else "(text between [[ and ]] is scored)"
    lines = [*lines, *([("", [Part(legend, False)])] if has_example else [])]
    if not console.is_terminal:
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"{name:{width}}  {render(parts, False)}".rstrip() for name, parts in lines), flush=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, parts in lines:
        table.add_row(Text(name, style="bold"), render(parts, colours))
    console.print(table)


def render(parts: list[Part], colours: bool) -> Text:
    """The parts one after another, control characters escaped, the scored ones marked."""
    text = Text(overflow="fold")
    for part in filter(lambda part: part.text, parts):
        marked = part.scored and not colours
        words = escape(part.text)
        text.append(f"[[{words}]]" if marked else words, style="green" if part.scored and colours else "")
    return text


def escape(text: str) -> str:
    """The text on one line: control characters, and what the output cannot spell, as backslash escapes.

    Example:
        >>> print(escape("a\\n\\x1b[31m"))
        a\\n\\x1b[31m
    """
    visible = "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in INVISIBLE else c for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return visible.encode(encoding, "backslashreplace").decode(encoding)
