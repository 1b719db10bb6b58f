"""Data by AI feedback, in two stages: `fastalign rlaif`.

    revise   an answer, then rounds of a critique by a principle and a revision    rows for `fastalign sft`
    label    two answers, compared by a feedback model in both orders              rows for `fastalign reward`

Source: Bai et al. 2022, Constitutional AI (arXiv:2212.08073). What a row says depends on the seed, its prompt and its
place in the data: not on the other rows, so a run that was stopped goes on with the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import IO

import torch
from datasets import Dataset
from torch import Tensor

from fastalign.commands import RlaifConfig
from fastalign.config import DataConfig, ModelConfig, SamplerConfig
from fastalign.data import columns, formats
from fastalign.data.messages import Text, is_empty
from fastalign.data.prompt_dataset import prompt_column, read_prompt
from fastalign.data.sources import load_rows
from fastalign.engine.output.progress import stage
from fastalign.pipelines.feedback import Asked, Endpoint, Item, Line, LocalModel, Model, Work, as_answer
from fastalign.pipelines.generate import check_out, read_prompts, resume
from fastalign.pipelines.principles import BUILTIN, Principle, read_principles
from fastalign.pipelines.revise import revise, revisions_in_words
from fastalign.pipelines.select import at_row, of
from fastalign.rl.sampler import check_settings

TOGETHER = 256
"""Prompts that are worked on at the same time; their rows are written when all of them are made."""


def rlaif(settings: RlaifConfig, model: ModelConfig, sampler: SamplerConfig, data: DataConfig) -> str:
    """Make and write the rows of a stage; returns what was done, in words.

    Raises:
        ValueError: settings, principles, data or a model that cannot be used, or no row left.
    """
    if settings.stage is None and settings.principles == "builtin":
        return BUILTIN.rstrip()
    check(settings, sampler)
    principles = read_principles(settings.principles, str(settings.stage))
    items = read_items(settings, data)
    mixed = read_mixed(settings, items)
    rows, seen = {item.row: item.prompt for item in items}, list[int]()
    resume(settings, partial(check_line, settings, rows, seen))
    work = Work(settings, principles, *models(settings, model, sampler, data))
    todo = [item for item in items if not seen or item.row > seen[-1]]
    with open(settings.out, "a", encoding="utf-8") as file:
        made = len(seen) + write_all(file, todo, work)
        write(file, mixed)
    dropped = "".join(f"; dropped, {why}: {number}" for why, number in work.dropped.items())
    if not made:
        raise ValueError(f"no row is left of {len(items)} prompts{dropped}")
    with open(settings.out, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    told = REPORTS[str(settings.stage)]([line for line in lines if "prompt_index" in line])
    behind = f", {len(mixed)} more of mix" if mixed else ""
    return f"done: {settings.out} holds {made} rows of {len(items)} prompts{behind}; {told}{dropped}"


def check(settings: RlaifConfig, sampler: SamplerConfig) -> None:
    """Refuse settings that say nothing, or would lose a file."""
    if settings.stage is None:
        raise ValueError("stage is not set: --stage revise makes rows for sft, --stage label pairs for reward")
    check_settings(sampler)
    if settings.rounds < 1:
        raise ValueError(f"rounds: expected critiques and revisions of each answer, 1 or more, got {settings.rounds}")
    bounds = settings.clamp
    if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1):
        raise ValueError(f"clamp: expected two probabilities, the lower first, e.g. [0.4, 0.6], got {bounds}")
    if settings.stage == "label" and settings.mix:
        raise ValueError("mix: only --stage revise writes rows for sft, with which others can be mixed")
    if settings.stage == "revise" and settings.answers == "data":
        raise ValueError("answers: data: only --stage label compares the answers of the data")
    if settings.endpoint_model and not settings.endpoint:
        raise ValueError("endpoint_model names a model of a server: set endpoint too")
    check_out("rlaif", settings)


def models(settings: RlaifConfig, model: ModelConfig, sampler: SamplerConfig, data: DataConfig) -> tuple[Model, Model]:
    """Who answers, and who gives the feedback."""
    if settings.endpoint is None:
        local = LocalModel(model, sampler, data)
        return local, local
    server = Endpoint(settings.endpoint, settings.endpoint_model, sampler)
    samples_here = settings.answers == "sample" and (model.path or model.config)
    return LocalModel(model, sampler, data) if samples_here else server, server


# --- the data --------------------------------------------------------------------------------------------------------


def read_items(settings: RlaifConfig, data: DataConfig) -> list[Item]:
    """The prompts that are not empty, or the pairs of answers that are not."""
    rows = read_prompts(settings, data)
    if settings.answers == "data":
        items = read_pairs(rows)
    else:
        formats.recognise(rows.column_names, "prompt")
        name = prompt_column(rows.column_names)
        prompts = ((i, row, at_row(i, partial(read_prompt, row, name))) for i, row in of(rows))
        items = [Item(i, prompt, formats.template_arguments(row)) for i, row, prompt in prompts if not is_empty(prompt)]
    if not items:
        raise ValueError("data.path holds no prompt that is not empty")
    return items


def read_pairs(rows: Dataset) -> list[Item]:
    """The pairs of `chosen` and `rejected`."""
    form = formats.recognise(rows.column_names, "dpo")
    layout, items = columns.layout(rows, form), []
    for i, row in of(rows):
        if formats.is_null(row, form, "dpo"):
            continue
        example = at_row(i, partial(formats.normalise, row, form, "dpo", *layout))
        if example is not None and not any(map(is_empty, example.completions)):
            items.append(Item(i, example.prompt or "", example.template, example.completions))
    return items


def read_mixed(settings: RlaifConfig, items: Sequence[Item]) -> list[Line]:
    """The rows that are written behind those that are made."""
    if settings.mix is None:
        return []
    rows = load_rows(settings.mix)
    form = formats.recognise(rows.column_names, "sft", "prompt_completion")
    layout, lines = columns.layout(rows, form), list[Line]()
    for i, row in of(rows):
        example = at_row(i, partial(formats.normalise, row, form, "sft", *layout))
        if example is not None and not is_empty(example.completions[0]):
            lines.append({"prompt": example.prompt, "completion": example.completions[0]})
    kinds = {isinstance(prompt, str) for prompt in (items[0].prompt, *(line["prompt"] for line in lines))}
    if len(kinds) > 1:
        raise ValueError(f"mix: prompts of {settings.mix!r} and of the data must all be texts or all conversations")
    return lines


def check_line(settings: RlaifConfig, rows: dict[int, Text], seen: list[int], line: bytes, count: int) -> bool:
    """Whether a line of the file stays: one of mix does not, it is written again. Notes the row in ``seen``.

    Raises:
        ValueError: it is a line of another command, stage or data.
    """
    where = f"out: line {count + 1} of {settings.out!r}"
    try:
        found = json.loads(line)
        if count and "prompt_index" not in found:
            return False
        index, prompt, _ = found["prompt_index"], found["prompt"], found[MARKS[str(settings.stage)]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{where} is no row of --stage {settings.stage}: choose another file, or --overwrite it"
        ) from error
    if prompt != rows.get(index) or (seen and index <= seen[-1]):
        raise ValueError(f"{where} is of another prompt: resume with the prompts that it was begun with")
    seen.append(index)
    return True


def write_all(file: IO[str], items: Sequence[Item], work: Work) -> int:
    """Make and write the rows of prompts; their number."""
    make, made = STAGES[str(work.settings.stage)], 0
    with stage(f"rlaif {work.settings.stage}", len(items), shown=True) as show:
        for start in range(0, len(items), TOGETHER):
            lines = [*make(items[start : start + TOGETHER], work)]
            write(file, lines)
            made += len(lines)
            show(min(start + TOGETHER, len(items)))
    return made


def write(file: IO[str], lines: Sequence[Line]) -> None:
    """Write rows, a line of JSON each."""
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.flush()


# --- label -----------------------------------------------------------------------------------------------------------


def label(items: Sequence[Item], work: Work) -> Iterator[Line]:
    """Pairs of answers, compared under a principle in both orders; those that could not be are dropped and counted."""
    pairs = items if work.settings.answers == "data" else with_answers(items, work)
    drawn = [work.draw(item) for item in pairs]
    orders = [
        [comparison(item, principle, swapped, work.feedback) for item, principle in zip(pairs, drawn, strict=True)]
        for swapped in (False, True)
    ]
    found = work.feedback.options([*orders[0], *orders[1]])
    compared = zip(pairs, drawn, found[: len(pairs)], found[len(pairs) :], strict=True)
    for item, principle, first, swapped in compared:
        if first is None or swapped is None:
            work.dropped[work.feedback.unanswered] += 1
        else:
            yield labelled(item, principle, first, swapped, work.settings)


def with_answers(items: Sequence[Item], work: Work) -> list[Item]:
    """The prompts with two sampled answers that say different things."""
    kept = []
    asked = [Asked(item, work.writer.opening(item.prompt)) for item in items]
    for item, texts in zip(items, work.writer.answers(asked, 2, work.settings.seed), strict=True):
        plain = [text.strip() for text in texts]
        why = "empty answer" if "" in plain else "equal answers" if len({*plain}) == 1 else None
        if reason := why if plain else work.writer.unanswered:
            work.dropped[reason] += 1
        else:
            kept.append(replace(item, answers=tuple(as_answer(item.prompt, text) for text in texts)))
    return kept


def comparison(item: Item, principle: Principle, swapped: bool, model: Model) -> Asked:
    """The question which answer is the better by a principle; swapped, the first answer is option (B)."""
    first, second = (spoken(text).strip() for text in item.answers[:: -1 if swapped else 1])
    parts = [spoken(item.prompt).strip(), principle["preference"].strip(), f"(A) {first}", f"(B) {second}"]
    text = "\n\n".join(["Compare two answers to this.", *filter(None, parts)])
    return Asked(item, model.question(item.prompt, text))


def spoken(text: Text) -> str:
    """A text, the one turn of an answer, or a conversation with its speakers."""
    if isinstance(text, str):
        return text
    said = [(turn["role"], str(turn.get("content") or "")) for turn in text]
    if [role for role, _ in said] == ["assistant"]:
        return said[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in said)


def labelled(
    item: Item,
    principle: Principle,
    first: tuple[float, float],
    swapped: tuple[float, float],
    settings: RlaifConfig,
) -> Line:
    """The row of a pair: the answer that is more likely the better one is ``chosen``."""
    logps = torch.tensor([first, swapped], dtype=torch.float64)
    clamp = None if settings.clamp is None else (settings.clamp[0], settings.clamp[1])
    probability = debiased_preference((logps[0, 0], logps[0, 1]), (logps[1, 0], logps[1, 1]), clamp=clamp).item()
    as_given = probability >= 0.5
    chosen, rejected = item.answers[:: 1 if as_given else -1]
    orders = (first, swapped) if as_given else (swapped, first)
    row = {"prompt_index": item.row, "prompt": item.prompt, "chosen": chosen, "rejected": rejected}
    row["probability"] = probability if as_given else 1 - probability
    row |= {"principle": principle["preference"], "logps_chosen_first": orders[0], "logps_chosen_second": orders[1]}
    return row | ({"agrees": as_given} if settings.answers == "data" else {})


def labels_in_words(lines: Sequence[Line]) -> str:
    """How sure the labels are, how often the order of the answers decided, and how often the data's label is met."""
    entropies = binary_entropy(torch.tensor([line["probability"] for line in lines], dtype=torch.float64))
    orders = [(line["logps_chosen_first"], line["logps_chosen_second"]) for line in lines]
    flips = fmean((a - b) * (d - c) < 0 for (a, b), (c, d) in orders)
    told = f"label entropy {entropies.mean().item():.3f} nats, order flips {flips:.1%}"
    gold = [0.5 if line["probability"] == 0.5 else line["agrees"] for line in lines if "agrees" in line]
    return f"{told}, agreement with the data {fmean(gold):.1%}" if gold else told


def binary_entropy(probability: Tensor) -> Tensor:
    """``-p ln p - (1 - p) ln(1 - p)`` in nats."""
    return torch.special.entr(probability) + torch.special.entr(1 - probability)


STAGES = {"revise": revise, "label": label}
MARKS = {"revise": "critiques", "label": "probability"}
"""A column that only a stage's rows have."""
REPORTS = {"revise": revisions_in_words, "label": labels_in_words}


# --- from log-probs to labels ----------------------------------------------------------------------------------------


def preference(logps_a: Tensor, logps_b: Tensor, *, clamp: tuple[float, float] | None = None) -> Tensor:
    """Probability that the feedback model prefers option A.

    ``P = exp(l_a) / (exp(l_a) + exp(l_b)) = s(l_a - l_b)``.
    Source: Bai et al. 2022, Constitutional AI (arXiv:2212.08073), section 4.1.

    Args:
        logps_a, logps_b: ``[P]`` log-probs of the two options' whole texts.
        clamp: bounds for labels after chain of thought, which are nearly 0 or 1: (0.4, 0.6) in the paper.

    Returns:
        ``[P]``.
    """
    probability = (logps_a - logps_b).sigmoid()
    return probability if clamp is None else probability.clamp(*clamp)


def debiased_preference(
    first: tuple[Tensor, Tensor], swapped: tuple[Tensor, Tensor], *, clamp: tuple[float, float] | None = None
) -> Tensor:
    """Probability that answer 1 is preferred, averaged over both orders of the answers.

    ``(s(l_a - l_b) + s(l'_b - l'_a)) / 2``; in ``swapped`` answer 1 is option B.

    Args:
        first, swapped: log-probs ``[P]`` of options A and B in either order.
        clamp: bounds for the label of either order.

    Returns:
        ``[P]``.
    """
    return torch.stack([preference(*first, clamp=clamp), preference(swapped[1], swapped[0], clamp=clamp)]).mean(0)
