"""What the objectives say of themselves: the page of methods is written from this and checked against it.

The docstring of a loss has a first line "NAME: purpose.", a paragraph with the formula in double backquotes that ends
with "Source: ...", and a line on every argument.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastalign.losses import distillation, policy, preference, ranking, reward, supervised, unpaired
from fastalign.losses.mixture import keywords


@dataclass(frozen=True)
class Family:
    """Losses of one kind of feedback.

    Attributes:
        title: heading on the page of methods.
        about: what all of them read and what their symbols mean.
        losses: the dict at the foot of the family's file: an entry added there is known here, to the command line and
            to the tests.
        command: how one of them is trained with, ``{name}`` in place of the loss; None for functions without a loop.
        watch: metrics to watch, and what they should do.
        flags: what the command of a loss needs beside, when it reads other rows than the example.
    """

    title: str
    about: str
    losses: Mapping[str, Callable[..., Any]]
    command: str | None
    watch: str
    flags: Mapping[str, str] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "supervised": Family(
        "Demonstrations",
        "Rows of `prompt` and `completion`, `messages` or plain `text`; every assistant turn of a conversation is "
        "scored, with the token that ends it. The mean is over scored tokens of the whole step, on all ranks.",
        supervised.LOSSES,
        "fastalign sft --config examples/sft.yaml",
        "`loss` and `perplexity` fall, `mean_token_accuracy` rises, also in their `eval_` twins; `entropy` near 0 is "
        "memorising.",
    ),
    "preference": Family(
        "Preference pairs",
        "Rows of `chosen` and `rejected`, with or without `prompt`. `L_w`, `L_x` are the log-probs of the chosen and "
        "the rejected completion summed over their tokens, `n_w`, `n_x` their counts, `a` and `b` the log-ratios "
        "to the reference, `s` the logistic function. The reference is the policy as it starts, or `reference.path`. "
        "Several losses make a weighted sum: `--loss.name dpo,sft --loss.loss_weights [1,0.2]`. TRL's names "
        "(`sigmoid`, `exo_pair`, `nca_pair`, `sppo_hard`, `sigmoid_norm`) are understood.",
        preference.LOSSES,
        "fastalign dpo --config examples/dpo.yaml --loss.name {name}",
        "`rewards/accuracies` and `rewards/margins` rise; `logps/chosen` may fall a little, a steady fall asks for "
        "`dpop`, an imitation term or a larger `beta`; `logps/accuracies` judges without the reference.",
    ),
    "unpaired": Family(
        "Completions called good or bad",
        "Rows of `prompt`, `completion` and `label`; preference rows count as one good and one bad completion. `d` is "
        "the log-ratio to the reference summed over the completion, `y` +1 for a good and -1 for a bad one. Both "
        "losses measure `d` from a baseline of the whole step over all ranks. kto's is of prompts with completions of "
        "other rows, paired over the dataset, not over a batch as in TRL, whose losses therefore part a little.",
        unpaired.LOSSES,
        "fastalign kto --config examples/kto.yaml --loss.name {name}",
        "`rewards/margins` rises, by `rewards/chosen` and not only by a fall of `rewards/rejected`; `kl` (kto) stays "
        "small; balance `desirable_weight` and `undesirable_weight` when labels are uneven.",
    ),
    "ranking": Family(
        "Ranked completions",
        "Rows of `prompt`, `completions` and `scores`, any number of candidates per prompt. No reference.",
        ranking.LOSSES,
        "fastalign rrhf --config examples/rrhf.yaml",
        "`rank_accuracy` and `best_is_top1` rise, `rank_loss` falls to 0, `sft_loss` falls.",
    ),
    "reward": Family(
        "Reward models",
        "A scalar head on the last token of each completion; the model is saved as a Hugging Face sequence classifier. "
        "Preference rows for `reward` (with `margin`, if there is one) and `soft_label` (with `probability`), rows of "
        "`completions` and `scores` for `k_wise`, of `completions` (steps) and `labels` for `process`.",
        reward.LOSSES,
        "fastalign reward --config examples/reward.yaml --loss.name {name}",
        "`accuracy` of held-out pairs, `margin`, and `ece`, the calibration error of `s(margin)`: an accuracy that "
        "stands still while `margin` and `ece` grow is overfitting.",
        {"process": " --data.path builtin:docstring-steps --data.eval_path builtin:docstring-steps"},
    ),
    "distillation": Family(
        "Distillation",
        "Rows as for demonstrations, and a teacher with the policy's vocabulary in `reference.path`; that of the "
        "example is what `fastalign sft --config examples/sft.yaml` leaves. No distribution "
        "is kept: both heads are swept together.",
        distillation.LOSSES,
        "fastalign distill --config examples/distill.yaml",
        "`loss` falls towards 0; `nll` says how the student fares on the data themselves; `entropy`.",
    ),
    "policy": Family(
        "Policy gradients",
        "Functions of log-probs and advantages for a loop of your own, through `linear_loss`, or straight from logits "
        "by the op `policy_loss`; advantages are in `fastalign.rl.advantages`, reductions in `fastalign.losses.reduce`"
        ". `r` is the ratio to the sampling policy, `A` the advantage, `sg` stops the gradient.",
        policy.LOSSES,
        None,
        "`ratio`, `clip_ratio/*`, `entropy` and the KL to the reference: a collapse shows there first.",
    ),
}


@dataclass(frozen=True)
class Description:
    """A loss in words.

    Attributes:
        title, purpose: the two halves of the first line.
        formula: the paragraph after it, with what its symbols mean.
        source: where it was published.
        defaults: its keyword arguments.
        arguments: what each argument means.
    """

    title: str
    purpose: str
    formula: str
    source: str
    defaults: dict[str, Any]
    arguments: dict[str, str]


def describe(loss: Callable[..., Any]) -> Description:
    """Read a loss's docstring.

    Raises:
        ValueError: it says nothing of the purpose, the formula, the source or an argument.
    """
    text = inspect.getdoc(loss) or ""
    match = re.match(
        r"(?P<title>[^\n:]+): (?P<purpose>[^\n]+)\n\n(?P<formula>.*?)\bSource: (?P<source>.*?)(\n\n|\Z)", text, re.S
    )
    if match is None or "``" not in match["formula"]:
        raise ValueError(f'{loss.__name__}: expected "NAME: purpose.", a formula in backquotes and "Source: ..."')
    found = {name: " ".join(words.split()) for name, words in match.groupdict().items()}
    return Description(**found, defaults=keywords(loss), arguments=arguments(loss, text))


def arguments(loss: Callable[..., Any], text: str) -> dict[str, str]:
    """What the docstring says of each argument of ``loss``."""
    section = re.search(r"\nArgs:\n(.*?)(\n\n|\Z)", text, re.S)
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", section[1] + "\n" if section else "", re.S | re.M)
    said = {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}
    silent = [name for name in inspect.signature(loss).parameters if name not in said]
    if silent:
        raise ValueError(f"{loss.__name__}: the docstring is silent on {', '.join(silent)}")
    return said


def catalogue() -> Iterator[tuple[str, str, Description]]:
    """(family, name, description) of every loss."""
    for family, members in FAMILIES.items():
        for name, loss in members.losses.items():
            yield family, name, describe(loss)


def page() -> str:
    """The page of methods in Markdown: what ``fastalign methods`` prints and ``docs/methods.md`` holds."""
    return "\n".join([PREFACE, *map(section, FAMILIES.values()), algorithms()])


def section(family: Family) -> str:
    """A family with its losses."""
    entries = [entry(name, describe(loss), family) for name, loss in family.losses.items()]
    return "\n".join([f"## {family.title}\n\n{family.about}\n\nWatch: {family.watch}\n", *entries])


def entry(name: str, loss: Description, family: Family) -> str:
    """One loss: what it is for, formula, source, settings and command."""
    settings = [f"- `{key}` ({value!r}): {loss.arguments[key]}" for key, value in loss.defaults.items()]
    lines = [f"### `{name}`\n", f"**{loss.title}**: {loss.purpose}", loss.formula, f"Source: {loss.source}\n"]
    text = "\n".join([*lines, *settings, *([""] if settings else [])]).replace("``", "`")
    if family.command is None:
        return text
    return f"{text}\n```\n{family.command.format(name=name)}{family.flags.get(name, '')}\n```\n"


def algorithms() -> str:
    """The objectives of published on-policy algorithms as a table."""
    rows = [
        f"| `{name}` | `{v.loss}` | {v.reduction} | {', '.join(f'{k} {x}' for k, x in v.options.items()) or '-'} "
        f"| {'-' if v.kl is None else f'{v.kl[1]} in the {v.kl[0]}'} |"
        for name, v in policy.VARIANTS.items()
    ]
    head = ["| algorithm | loss | reduction | settings | KL to the reference |", "|---|---|---|---|---|"]
    return "\n".join(["### Algorithms\n", "Which loss and reduction each of them is made of:\n", *head, *rows, ""])


PREFACE = """# Methods

Every objective: its formula, where it comes from, its settings with their defaults, a command, and what to watch.
`fastalign methods` prints this page from the docstrings, which is where it is edited.
"""
