"""Settings of commands that train nothing; those of runs are in `fastalign.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastalign.config import expand_homes


@dataclass
class PlanConfig:
    """For which machine `fastalign plan` predicts memory, communication and time, and what it prints."""

    gpus: int = 1
    """Devices, one rank each."""
    device: Literal["a100", "h100", "h200", "b200", "mi300x", "cpu"] = "h100"
    """Which; of `cpu` the ranks share this machine."""
    memory: str | None = None
    """Memory of each, e.g. `80GB` (80 * 10**9 bytes) or `79GiB`; default: the device's own."""
    gpus_per_node: int = 8
    """Devices that are linked directly; beyond them the network counts."""
    prompt: int | None = None
    """Tokens of a prompt; default: what `data.max_length` leaves beside an answer."""
    answer: int | None = None
    """Tokens of an answer; default: `sampler.max_new_tokens`, or half of `data.max_length`."""
    mfu: float = 0.4
    """Share of the device's peak operations per second that is assumed."""
    bandwidth_share: float = 0.7
    """Share of its memory's speed that is assumed."""
    fit: str | None = None
    """File that gets the mesh, gradient checkpointing and `batch.tokens` of the fastest predicted step that fits: a
    further `--config` for the run."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        expand_homes(self, "fit")


@dataclass
class GenerateConfig:
    """Which completions `fastalign generate` samples, and where it writes them."""

    prompts: str | None = None
    """Prompts: a .txt file with one on each line, or what `data.path` takes; default: `data.path`."""
    out: str = "samples.jsonl"
    """File that gets a line of JSON per completion, in the order of the prompts."""
    n: int = 1
    """Completions per prompt."""
    seed: int = 0
    """Seed of the draws: the same seed gives a prompt the same completions."""
    resume: bool = False
    """Keep the completions that `out` has already, and go on behind them."""
    overwrite: bool = False
    """Replace `out` where it is there."""

    def __post_init__(self) -> None:
        expand_homes(self, "prompts", "out")


@dataclass
class ScoreConfig:
    """Which completions `fastalign score` gives rewards, and where it writes them."""

    samples: str = "samples.jsonl"
    """File of completions, as `fastalign generate` writes it; columns for reward functions come from `data.path`."""
    out: str = "scored.jsonl"
    """File that gets every line with its rewards; rows for `fastalign sft`, by their `prompt` and `completion`."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """What scores completions: `[{function: file.py:name}, {model: directory}, {builtin: name}, {code: {...}}]`."""
    best: int | None = None
    """Write only so many completions of each prompt, those with the highest rewards; default: all."""
    overwrite: bool = False
    """Replace `out` where it is there."""

    def __post_init__(self) -> None:
        expand_homes(self, "samples", "out")


@dataclass
class RlaifConfig:
    """Which data `fastalign rlaif` makes by AI feedback, and where it writes them."""

    stage: Literal["revise", "label"] | None = None
    """revise: answers, criticised and revised by principles, for `fastalign sft`; label: pairs of answers with the
    probability that one is the better, for `fastalign reward --loss.name soft_label`."""
    principles: str | None = None
    """YAML list of `{critique, revision, preference}`: the two requests of revise, the question of label. Default: a
    built-in sample, `builtin`, which is printed when no stage is given."""
    prompts: str | None = None
    """Prompts: a .txt file with one on each line, or what `data.path` takes; default: `data.path`."""
    out: str = "rlaif.jsonl"
    """File that gets a line of JSON per prompt, in their order."""
    rounds: int = 4
    """For revise: critiques and revisions of each answer, each by a principle drawn anew."""
    mix: str | None = None
    """For revise: rows with `prompt` and `completion`, as `data.path` takes them, written behind those that are made:
    helpful answers, so that the model does not learn to evade."""
    answers: Literal["sample", "data"] = "sample"
    """For label: sample two answers to each prompt, or compare `chosen` and `rejected` of the data."""
    clamp: list[float] | None = None
    """For label: bounds of the probability in either order, e.g. `[0.4, 0.6]` for a feedback model that is too sure."""
    endpoint: str | None = None
    """Server with OpenAI's chat API that gives the feedback, e.g. `http://localhost:8000/v1`; it also samples the
    answers where `model` names no model. A text is sent as one turn of the user. Default: the model gives it."""
    endpoint_model: str | None = None
    """What the server calls its model; default: the first that it lists."""
    seed: int = 0
    """Seed of the draws, of tokens and of principles."""
    resume: bool = False
    """Keep the rows that `out` has already, and go on behind them."""
    overwrite: bool = False
    """Replace `out` where it is there."""

    def __post_init__(self) -> None:
        expand_homes(self, "principles", "prompts", "out", "mix")


@dataclass
class SelectConfig:
    """Which rows `fastalign select` keeps, and where it writes them. The filters work in the order they have here."""

    out: str = "selected.jsonl"
    """File that gets a line of JSON per row that is kept, unchanged and in the order of the data."""
    report: str | None = None
    """Page that says what was dropped and why, e.g. `report.html`."""
    overwrite: bool = False
    """Replace `out` and `report` where they are there."""
    min_chars: int = 0
    """Fewest characters of an answer: a completion, the chosen one of a preference, what the assistant says."""
    max_chars: int | None = None
    """Most characters of an answer."""
    languages: list[str] = field(default_factory=list)
    """Codes of the languages that are kept, e.g. `[en, de]`; py3langid tells the whole row's. Default: all."""
    keep_duplicates: bool = False
    """Keep rows that say the same as an earlier one but for case and white space."""
    near_duplicates: float | None = None
    """Drop a row that has this share of its word triples in common with an earlier one, e.g. 0.8."""
    max_similarity: float | None = None
    """Drop a row whose embedding by the model has this cosine, or a larger one, with that of an earlier one."""
    budget: float | None = None
    """Rows of the core set: a share of those left below 1, a number from 1 on. They are taken from clusters of the
    embeddings, from each those that cover it best. Default: all that are left."""
    clusters: int | None = None
    """Clusters of the core set; default: the square root of the number of its rows."""

    def __post_init__(self) -> None:
        expand_homes(self, "out", "report")
