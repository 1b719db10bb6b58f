"""Models that answer, criticise, revise and compare: one in this process, or one behind OpenAI's chat API."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastalign.commands import RlaifConfig
from fastalign.config import DataConfig, ModelConfig, SamplerConfig
from fastalign.data import chat
from fastalign.data.encode import Encoder, common_prefix
from fastalign.data.examples import TokenExample
from fastalign.data.messages import Text
from fastalign.data.pack import pack
from fastalign.engine.setup import builtin_tokenizer
from fastalign.models.load import load_tokenizer
from fastalign.ops import linear_logps, sample_keys
from fastalign.pipelines.generate import load
from fastalign.pipelines.principles import Principle
from fastalign.rl.backends import MOST_REQUESTS, ask, make_sampler
from fastalign.types import Prompt

TOKENS = 4096
"""Of a forward pass that compares."""
CLOSING = "\n\nThe better answer is"
"""Behind a comparison that is a text to go on with."""
MOST_LIKELY = 20
"""Tokens whose log-probs a server is asked for: as many as OpenAI's gives."""
AROUND = " ().:*\"'\n"
"""What may stand around the letter in a server's first token."""


@dataclass(frozen=True)
class Item:
    """A row of the data: its place, its prompt, what its chat template gets, and the two answers it may have."""

    row: int
    prompt: Text
    arguments: dict[str, Any] = field(default_factory=dict)
    answers: tuple[Text, ...] = ()


Line = dict[str, Any]
"""A row that is written."""


class Asked(NamedTuple):
    """What a model is to answer: the row, and a text to go on with or the turns of a conversation."""

    item: Item
    talk: Text


class Model(Protocol):
    """Answers in texts, and compares."""

    def opening(self, prompt: Text) -> Text:
        """A prompt as this model takes it."""
        ...

    def answers(self, asked: Sequence[Asked], n: int, seed: int) -> list[list[str]]:
        """Samples 0 to n - 1 of each; none for what is too long."""
        ...

    unanswered: str
    """Why `answers` or `options` has none."""

    def question(self, prompt: Text, text: str) -> Text:
        """A question about two options, as this model takes it."""
        ...

    def options(self, asked: Sequence[Asked]) -> list[tuple[float, float] | None]:
        """Log-probs of the options (A) and (B), as the answer to each question; None for one that has no answer."""
        ...


@dataclass
class Work:
    """What both stages work with: settings and principles, who answers, who gives feedback, and what was dropped."""

    settings: RlaifConfig
    principles: Sequence[Principle]
    writer: Model
    feedback: Model
    dropped: Counter[str] = field(default_factory=Counter)

    def draw(self, item: Item, number: int = 0) -> Principle:
        """A principle at random; the same one for a row and a round of it."""
        return random.Random(f"{self.settings.seed}:{item.row}:{number}").choice(self.principles)

    def seed(self, what: str, number: int) -> int:
        """A seed for the tokens of a critique or revision, which would else be drawn like those of the answer."""
        return random.Random(f"{self.settings.seed}:{what}:{number}").getrandbits(31)


def as_answer(prompt: Text, text: str) -> Text:
    """An answer as a row says it: of the prompt's kind."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


class LocalModel:
    """A model in this process: samples with the native sampler, and scores options with the packed forward.

    The log-prob of an option is that of its whole text, `(A)` or `(B)`, in the tokens that it has behind the question.
    """

    unanswered = "too long"

    def __init__(self, model: ModelConfig, sampler: SamplerConfig, data: DataConfig) -> None:
        if sampler.backend == "vllm":
            raise ValueError("sampler.backend: vllm gives no log-probs of options: name the server with --endpoint")
        self.tokenizer, self.data, self.room = load_tokenizer(model, builtin_tokenizer), data, sampler.max_new_tokens
        self.template = chat.read_template(data.chat_template)
        self.encoder = Encoder(self.tokenizer, data, "prompt", "prompt", self.template, raw_dialogue=False)
        ids = np.array(self.encode([("A text to try the model with.", True)])[0])
        self.policy, self.precision = load(model, self.tokenizer, [TokenExample(((ids, np.arange(len(ids)) > 0),), 0)])
        if sampler.exact == "auto":  # nothing here is compared with training
            sampler = replace(sampler, exact="off")
        self.sampler = make_sampler(self.policy, sampler, self.tokenizer, precision=self.precision)
        self.limit = min(data.max_length, (self.policy.max_length or (data.max_length, ""))[0])

    def opening(self, prompt: Text) -> Text:
        """A text is continued as it is, a conversation written by the chat template."""
        return prompt

    def answers(self, asked: Sequence[Asked], n: int, seed: int) -> list[list[str]]:
        """Samples of each; none where prompt and completion may have more than `data.max_length` tokens."""
        ids = self.encode([self.written(*one) for one in asked])
        fitting = [i for i, each in enumerate(ids) if 0 < len(each) <= self.limit - self.room]
        prompts = [Prompt(np.array(ids[i], dtype=np.int64), asked[i].item.row) for i in fitting]
        made = {(r.row, r.sample): r.tokens.tolist() for r in self.sampler.generate(prompts, n, seed)}

        def text(i: int, sample: int) -> str:
            return self.tokenizer.decode(made[asked[i].item.row, sample], skip_special_tokens=True)

        return [[text(i, sample) for sample in range(n)] if i in {*fitting} else [] for i in range(len(asked))]

    def question(self, prompt: Text, text: str) -> Text:
        """About answers to a text a text, else a turn of the user."""
        if isinstance(prompt, str):
            return text + CLOSING
        return [{"role": "user", "content": f"{text}\n\nAnswer with (A) or (B)."}]

    @torch.no_grad()
    def options(self, asked: Sequence[Asked]) -> list[tuple[float, float] | None]:
        """Log-probs of both options; None where the question is too long."""
        examples = [self.compared(i, *one) for i, one in enumerate(asked)]
        fitting = [x for x in examples if max(len(ids) for ids, _ in x.sequences) <= self.limit]
        found: dict[int, tuple[float, float]] = {}
        device = next(self.policy.parameters()).device
        for batch in pack(fitting, TOKENS, share_prefix=True):
            with self.precision():
                logps: Tensor = self.policy(batch.to(device), linear_logps)
            sums = [part.sum().item() for part in logps.double().cpu().split(batch.cu_seqlens.diff().tolist())]
            found |= dict(zip(batch.example_ids, zip(sums[::2], sums[1::2], strict=True), strict=True))
        return [found.get(i) for i in range(len(asked))]

    def written(self, item: Item, talk: Text) -> tuple[str, bool]:
        """A text as the model reads it, and whether the tokenizer's own special tokens belong to it."""
        if isinstance(talk, str):
            return talk, True
        return chat.Chat(self.tokenizer, self.template, item.arguments).before(talk), False

    def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Their tokens."""
        lookup = self.encoder.tokenise(texts)
        return [lookup[text] for text in texts]

    def compared(self, number: int, item: Item, question: Text) -> TokenExample:
        """A question with each option behind it, whose tokens are scored from where they part from the question's."""
        (text, special), space = self.written(item, question), " " if isinstance(question, str) else ""
        given, *both = self.encode([(text + behind, special) for behind in ("", f"{space}(A)", f"{space}(B)")])
        start = max(min(common_prefix(given, ids) for ids in both), 1)
        return TokenExample(tuple((np.array(ids), np.arange(len(ids)) >= start) for ids in both), number)


class Endpoint:
    """A server with OpenAI's chat API, asked for several answers at a time.

    The log-prob of an option is that of its letter as the answer's first token, summed over the spellings among the
    `MOST_LIKELY` tokens, which every such server can tell; an option that is not among them gets the least of theirs.
    """

    unanswered = "neither option among the most likely tokens"

    def __init__(self, url: str, name: str | None, sampler: SamplerConfig) -> None:
        self.url, self.sampler = url.rstrip("/"), sampler
        self.name = name or str(self.read(ask(f"{self.url}/models", None, "endpoint"), "data", 0, "id"))

    def opening(self, prompt: Text) -> Text:
        """A conversation; a text is one turn of the user."""
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def answers(self, asked: Sequence[Asked], n: int, seed: int) -> list[list[str]]:
        """Samples of each, a request and a seed for each sample."""
        sampler = self.sampler
        settings: dict[str, Any] = {"max_tokens": sampler.max_new_tokens, "temperature": sampler.temperature}
        cut = {"top_p": (sampler.top_p, 1.0), "top_k": (sampler.top_k, 0), "min_p": (sampler.min_p, 0.0)}
        settings |= {name: value for name, (value, off) in cut.items() if value != off}
        settings |= {"stop": sampler.stop} if sampler.stop else {}
        rows = torch.tensor([one.item.row for one in asked], dtype=torch.int64).repeat_interleave(n)
        samples = torch.arange(n).repeat(len(asked))
        seeds = [key & (2**31 - 1) for key in sample_keys(seed, rows, samples).tolist()]
        bodies = [{**settings, "messages": one.talk, "seed": seeds[i * n + sample]}
                  for i, one in enumerate(asked) for sample in range(n)]  # fmt: skip
        texts = [str(self.read(found, "choices", 0, "message", "content") or "") for found in self.post(bodies)]
        return [texts[i * n : i * n + n] for i in range(len(asked))]

    def question(self, prompt: Text, text: str) -> Text:
        """A turn of the user."""
        return [{"role": "user", "content": f"{text}\n\nAnswer with one letter, A or B."}]

    def options(self, asked: Sequence[Asked]) -> list[tuple[float, float] | None]:
        """Log-probs of both letters; None where neither is among the most likely tokens."""
        settings = {"max_tokens": 1, "temperature": 1.0, "logprobs": True, "top_logprobs": MOST_LIKELY}
        found = self.post([{**settings, "messages": one.talk} for one in asked])
        return [letters(self.read(x, "choices", 0, "logprobs", "content", 0, "top_logprobs")) for x in found]

    def post(self, bodies: Sequence[dict[str, Any]]) -> Iterator[Any]:
        """The server's answers, in order."""
        with ThreadPoolExecutor(self.sampler.max_rows or MOST_REQUESTS) as pool:
            url = f"{self.url}/chat/completions"
            yield from pool.map(lambda body: ask(url, {"model": self.name, **body}, "endpoint"), bodies)

    def read(self, found: Any, *path: str | int) -> Any:
        """A part of an answer."""
        whole = found
        for step in path:
            try:
                found = found[step]
            except (LookupError, TypeError) as error:
                what = ".".join(map(str, path))
                said = json.dumps(whole)[:200]
                raise ValueError(f"endpoint: {self.url} answers without {what}, which is needed: {said}") from error
        return found


def letters(likely: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Log-probs of A and B from those of the most likely tokens."""
    least = min((one["logprob"] for one in likely), default=0.0)
    found = [[one["logprob"] for one in likely if one["token"].strip(AROUND) == letter] for letter in "AB"]
    if not any(found):
        return None
    first, second = (math.log(sum(map(math.exp, each))) if each else least for each in found)
    return first, second
