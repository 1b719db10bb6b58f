"""Rendering: from the normal form of a row to texts whose tokens can be told apart into given and scored.

A conversation is rendered twice, up to the completion (with the generation prompt) and whole; where the two token
sequences part, the completion begins. Text is never cut before it is tokenised: a merge may cross the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastalign.data.formats import Example, Text, Turns


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
    scored: list[int]

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
    """The text of a Jinja chat template file.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"data.chat_template: expected the path of a Jinja file, there is none at {path!r}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.chat_template: expected UTF-8 in {path!r}, got other bytes ({error.reason})") from error


def render(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> list[Rendered | Marked | Steps]:
    """One rendering per completion.

    Args:
        example: a row in normal form.
        tokenizer: gives the chat template and its variables; used for conversations only.
        template: replaces the tokenizer's template.

    Raises:
        ValueError: a conversation and no template, or one that the template refuses.
    """
    if isinstance(example.completions[0], str):
        prompt = str(example.prompt or "")
        return [Rendered(f"{prompt}{text}", ((prompt, None),), standard=True) for text in example.completions]
    chat = Chat(tokenizer, template, example.template)
    if example.prompt is None:
        return [chat.conversation(_turns(example.completions[0]))]
    return [chat.completion(_turns(example.prompt), _turns(completion)) for completion in example.completions]


def render_steps(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str | None, separator: str
) -> list[Rendered | Marked | Steps]:
    """One rendering of all steps; a prompt that is a conversation is written with its generation prompt.

    Raises:
        ValueError: as `render`.
    """
    steps = tuple(map(str, example.completions))
    if isinstance(example.prompt, str):
        return [Steps((example.prompt, True), steps, separator)]
    chat = Chat(tokenizer, template, example.template)
    return [Steps((chat.text(_turns(example.prompt or ""), True), False), steps, separator)]


class Chat:
    """A chat template with its arguments; ``template`` None is the tokenizer's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, arguments: dict[str, Any]) -> None:
        if template is None and not tokenizer.chat_template:
            message = "the data holds conversations and the tokenizer has no chat template"
            raise ValueError(f"{message}: set data.chat_template to the path of a Jinja file")
        self.tokenizer, self.template, self.arguments = tokenizer, template, arguments

    def completion(self, prompt: Turns, completion: Turns) -> Rendered:
        """Prompt and completion; everything after the prompt is scored."""
        return Rendered(self.text([*prompt, *completion]), ((self.text(prompt, True), None),), standard=False)

    def conversation(self, turns: Turns) -> Rendered | Marked:
        """A whole conversation with every assistant turn scored, its end token included."""
        if self.has_markers():
            return self.marked(turns)
        spans = tuple(
            (self.text(turns[:i], True), self.text(turns[: i + 1]))
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        )
        return Rendered(self.text(turns), spans, standard=False)

    def has_markers(self) -> bool:
        """Whether the template has ``{% generation %}`` markers and the tokenizer can place them."""
        text = self.template or self.tokenizer.get_chat_template(tools=self.arguments.get("tools"))
        return bool(self.tokenizer.is_fast) and "endgeneration" in text

    def text(self, turns: Turns, generation_prompt: bool = False) -> str:
        """The messages as the template writes them."""
        return str(self._apply(turns, tokenize=False, add_generation_prompt=generation_prompt)) if turns else ""

    def marked(self, turns: Turns) -> Marked:
        """The conversation in tokens, scored where the template says so."""
        encoded = self._apply(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return Marked(encoded["input_ids"], encoded["assistant_masks"])

    def _apply(self, turns: Turns, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(turns, chat_template=self.template, **options, **self.arguments)
        except (TemplateError, TypeError, LookupError, ArithmeticError) as error:  # a template can raise what it likes
            raise ValueError(f"the chat template refuses a conversation: {error}") from error


def _turns(text: Text) -> Turns:
    if isinstance(text, str):
        if text.strip():
            raise ValueError("prompt and completion must both be strings or both be lists of {role, content}")
        return []
    return text
