"""Rendering: from the normal form of a row to texts whose tokens can be split into given and scored ones.

A conversation is rendered up to each turn that is learnt from (with the generation prompt), through it, and whole;
where the token sequences part, the turn begins. Text is never cut before it is tokenised: a merge may cross the
boundary. Where the template marks what the assistant generates, its marks count instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastalign.data.formats import Example
from fastalign.data.messages import Text, Turns, bare, is_trained


@dataclass(frozen=True)
class Rendered:
    """A sequence as text, and how to find its scored tokens.

    Attributes:
        whole: the sequence.
        spans: for each scored stretch the text before it, and the text through its end (None: to the very end).
        standard: plain text, which gets the tokenizer's own special tokens and EOS; a template writes its own.
    """

    whole: str
    spans: tuple[tuple[str, str | None], ...]
    standard: bool

    def to_tokenise(self) -> list[tuple[str, bool]]:
        """Every text that must be tokenised, each with `standard`."""
        texts = [self.whole, *(text for span in self.spans for text in span if text is not None)]
        return [(text, self.standard) for text in texts]


@dataclass(frozen=True)
class Marked:
    """A conversation already in tokens: the template itself marks what the assistant generates."""

    input_ids: list[int]
    scored: Sequence[int] | np.ndarray

    def to_tokenise(self) -> list[tuple[str, bool]]:
        """Nothing is left to tokenise."""
        return []


@dataclass(frozen=True)
class Steps:
    """An answer in steps, tokenised piece by piece, so that each step ends where a token does, and followed by the
    separator whose last token is scored.

    Attributes:
        prompt: what is given, and whether it is plain text that gets the tokenizer's special tokens.
        steps: the pieces.
        separator: written after every step.
    """

    prompt: tuple[str, bool]
    steps: tuple[str, ...]
    separator: str

    def to_tokenise(self) -> list[tuple[str, bool]]:
        """Every text that must be tokenised, each with whether it gets special tokens."""
        return [self.prompt, (self.separator, False), *((step, False) for step in self.steps)]


def read_template(path: str | None) -> str | None:
    """The text of a Jinja chat template file."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"data.chat_template: expected the path of a Jinja file, there is none at {path!r}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.chat_template: expected UTF-8 in {path!r}, got other bytes ({error.reason})") from error


def render(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str | None, judged: bool = False
) -> list[Rendered | Marked | Steps]:
    """One rendering per completion; ``judged`` ones are scored as a whole after the prompt, not turn by turn."""
    if isinstance(example.completions[0], str):
        prompt = str(example.prompt or "")
        return [Rendered(f"{prompt}{text}", ((prompt, None),), standard=True) for text in example.completions]
    chat = Chat(tokenizer, template, example.template)
    write = chat.completion if judged else chat.conversation
    return [write(_turns(example.prompt or ""), _turns(completion)) for completion in example.completions]


def render_steps(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str | None, separator: str
) -> list[Rendered | Marked | Steps]:
    """One rendering of all steps; a prompt that is a conversation is written with its generation prompt."""
    steps = tuple(map(str, example.completions))
    if isinstance(example.prompt, str):
        return [Steps((example.prompt, True), steps, separator)]
    chat = Chat(tokenizer, template, example.template)
    return [Steps((chat.before(_turns(example.prompt or "")), False), steps, separator)]


class Chat:
    """A chat template with its arguments; ``template`` None is the tokenizer's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, arguments: dict[str, Any]) -> None:
        if template is None and not tokenizer.chat_template:
            message = "the data holds conversations and the tokenizer has no chat template"
            raise ValueError(f"{message}: set data.chat_template to the path of a Jinja file")
        self.tokenizer, self.template, self.arguments = tokenizer, template, arguments

    def completion(self, prompt: Turns, completion: Turns) -> Rendered:
        """Prompt and completion; everything after the prompt is scored."""
        given = self.before(prompt) if prompt or completion[0]["role"] == "assistant" else ""
        return Rendered(self.text([*prompt, *completion]), ((given, None),), standard=False)

    def conversation(self, prompt: Turns, completion: Turns) -> Rendered | Marked:
        """Both, with the assistant turns of the completion scored that are learnt from, their end tokens included."""
        turns = [*prompt, *completion]
        learnt = [i for i in range(len(prompt), len(turns)) if is_trained(turns[i])]
        if self.has_markers():
            return self.marked(turns, learnt)
        through = [None if i + 1 == len(turns) else self.text(turns[: i + 1]) for i in learnt]
        before = [self.before(turns[:i]) for i in learnt]
        return Rendered(self.text(turns), tuple(zip(before, through, strict=True)), standard=False)

    def has_markers(self) -> bool:
        """Whether the template has ``{% generation %}`` markers and the tokenizer can place them."""
        text = self.template or self.tokenizer.get_chat_template(tools=self.arguments.get("tools"))
        return bool(self.tokenizer.is_fast) and "endgeneration" in text

    def before(self, turns: Turns) -> str:
        """The text before the assistant's next turn; before the first turn, what the template writes in front of it."""
        if turns:
            return self.text(turns, True)
        texts = [self.text([{"role": "assistant", "content": content}]) for content in ("0", "1")]
        if texts[0] == texts[1]:
            message = "the chat template does not write the content of a first turn that is the assistant's"
            raise ValueError(f"{message}: begin the conversation with the user, or set data.chat_template")
        parted = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), None)
        return texts[0][:parted]

    def text(self, turns: Turns, generation_prompt: bool = False) -> str:
        """The messages as the template writes them."""
        return str(self._apply(turns, tokenize=False, add_generation_prompt=generation_prompt)) if turns else ""

    def marked(self, turns: Turns, learnt: Sequence[int]) -> Marked:
        """The conversation in tokens, scored where the template marks one of the turns ``learnt``."""
        marked = self._marks(turns)
        speaking = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if list(learnt) == speaking:
            return marked
        counts = [self._count(turns[: i + 1]) - self._count(turns[:i]) for i in speaking]
        begins = np.diff(marked.scored, prepend=0) == 1
        if sum(counts) != begins.sum() or min(counts) < 1:
            message = (
                "which generation markers of the chat template belong to which assistant turn cannot be determined"
            )
            raise ValueError(f"{message}: expected {{% generation %}} around each, in every conversation")
        owners = np.repeat(speaking, counts)[np.cumsum(begins) - 1]  # of each token that is marked
        return Marked(marked.input_ids, np.isin(owners, learnt) & np.array(marked.scored, dtype=bool))

    def _marks(self, turns: Turns) -> Marked:
        """The conversation in tokens, scored where the template says so."""
        encoded = self._apply(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return Marked(encoded["input_ids"], encoded["assistant_masks"])

    def _count(self, turns: Turns) -> int:
        """How many stretches of a conversation the template marks."""
        return int(np.sum(np.diff(self._marks(turns).scored, prepend=0) == 1)) if turns else 0

    def _apply(self, turns: Turns, **options: Any) -> Any:
        try:
            messages = bare(turns)
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, **options, **self.arguments
            )
        except (TemplateError, TypeError, LookupError, ArithmeticError) as error:  # a template can raise what it likes
            raise ValueError(f"the chat template refuses a conversation: {error}") from error


def _turns(text: Text) -> Turns:
    if isinstance(text, str):
        if text.strip():
            raise ValueError("prompt and completion must both be strings or both be lists of {role, content}")
        return []
    return text
