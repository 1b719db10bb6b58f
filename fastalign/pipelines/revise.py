"""Answers that a model criticises and revises by principles: the first stage of `fastalign rlaif`.

Source: Bai et al. 2022, Constitutional AI (arXiv:2212.08073), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from fastalign.data.messages import Text
from fastalign.pipelines.feedback import Asked, Item, Line, Model, Work, as_answer
from fastalign.pipelines.principles import Principle


@dataclass
class Draft:
    """An answer on its way through the rounds."""

    item: Item
    answer: str = ""
    first: str = ""
    critiques: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    principles: list[Principle] = field(default_factory=list)

    def to_criticise(self, opening: Text) -> Text:
        """The prompt with the answer as it is now, and the request for a critique."""
        return asking(opening, self.answer, self.principles[-1]["critique"], "Critique")

    def to_revise(self, opening: Text) -> Text:
        """The same with the critique, and the request for a revision."""
        return asking(self.to_criticise(opening), self.critiques[-1], self.principles[-1]["revision"], "Revision")

    def begin(self, text: str) -> None:
        """Take the first answer."""
        self.first = self.answer = text

    def criticise(self, text: str) -> None:
        """Take a critique."""
        self.critiques.append(text.strip())

    def revise(self, text: str) -> None:
        """Take a revision in the place of the answer, behind the white space that the first answer began with."""
        self.answer = self.first[: -len(self.first.lstrip())] + text.strip()
        self.revisions.append(self.answer)

    def line(self) -> Line:
        """The row for sft."""
        row = {"prompt_index": self.item.row, "prompt": self.item.prompt}
        row["completion"] = as_answer(self.item.prompt, self.answer)
        row |= {"first": self.first, "critiques": self.critiques, "revisions": self.revisions}
        return {**row, "principles": [principle["critique"] for principle in self.principles]}


def asking(talk: Text, answer: str, request: str, what: str) -> Text:
    """A text or conversation, gone on with an answer and a request."""
    if isinstance(talk, str):
        return f"{talk}{answer}\n\n{what} request: {request}\n\n{what}:"
    return [*talk, {"role": "assistant", "content": answer}, {"role": "user", "content": request}]


def revise(items: Sequence[Item], work: Work) -> Iterator[Line]:
    """Answers that were criticised and revised in rounds; those that could not be are dropped and counted."""
    drafts = [Draft(item) for item in items]
    drafts = replied(work, work.writer, drafts, lambda _, opening: opening, Draft.begin, work.settings.seed)
    for number in range(work.settings.rounds):
        for draft in drafts:
            draft.principles.append(work.draw(draft.item, number))
        seeds = [work.seed(what, number) for what in ("critique", "revision")]
        drafts = replied(work, work.feedback, drafts, Draft.to_criticise, Draft.criticise, seeds[0])
        drafts = replied(work, work.feedback, drafts, Draft.to_revise, Draft.revise, seeds[1])
    return map(Draft.line, drafts)


def replied(
    work: Work,
    model: Model,
    drafts: Sequence[Draft],
    talk: Callable[[Draft, Text], Text],
    take: Callable[[Draft, str], None],
    seed: int,
) -> list[Draft]:
    """The drafts that got a reply, which they have taken.

    Args:
        work: counts those that are dropped.
        model: replies.
        drafts: what it replies to.
        talk: makes what it is asked, of a draft and its prompt.
        take: gives a draft the reply.
        seed: of the draws.
    """
    kept = []
    asked = [Asked(draft.item, talk(draft, model.opening(draft.item.prompt))) for draft in drafts]
    for draft, texts in zip(drafts, model.answers(asked, 1, seed), strict=True):
        if texts and texts[0].strip():
            take(draft, texts[0])
            kept.append(draft)
        else:
            work.dropped["empty answer" if texts else model.unanswered] += 1
    return kept


def revisions_in_words(lines: Sequence[Line]) -> str:
    """By how much revising has changed the length of answers: shorter and shorter ones evade."""
    first, last = (fmean(len(text) for text in texts) for texts in
                   ([line["first"] for line in lines], [line["revisions"][-1] for line in lines]))  # fmt: skip
    return f"mean characters of an answer {first:.0f}, revised {last:.0f}"
