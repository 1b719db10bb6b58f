"""Rows of prompts and answers in every shape, and what becomes of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastalign.config import DataConfig
from fastalign.data import formats
from fastalign.data.encode import Encoder, encode_dataset

Make = Callable[..., PreTrainedTokenizerFast]
Turn = dict[str, Any]

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTION = "What is 2+2?"
ASKED = "<user>What is 2+2?</s><assistant>"


def turn(role: str, text: str) -> Turn:
    return {"role": role, "content": text}


def user(text: str = QUESTION) -> Turn:
    return turn("user", text)


def answer(text: str) -> Turn:
    return turn("assistant", text)


def human(text: str = QUESTION) -> Turn:
    return {"from": "human", "value": text}


def gpt(text: str) -> Turn:
    return {"from": "gpt", "value": text}


def parts(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], method: str, **layout: Any) -> list[tuple[str, str]]:
    """For each sequence of a row the text that is given and the text that is scored."""
    columns = {name: [value] for name, value in row.items()}
    encoder = Encoder(tokenizer, DataConfig(), formats.recognise(columns, method), method, None, False, **layout)
    out = encoder.batch(columns, [0])
    found = []
    for ids, scored, lengths in zip(out["input_ids"], out["scored"], out["lengths"], strict=True):
        ends = np.cumsum(lengths)[:-1]
        for tokens, mask in zip(np.split(np.array(ids), ends), np.split(np.array(scored) > 0, ends), strict=True):
            found.append((tokenizer.decode(tokens[~mask]), tokenizer.decode(tokens[mask])))
    return found


def pair(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected, "probability": 0.9, **more}


WHOLE = pair([user(), answer("four")], [user(), answer("five")])
ALONE = pair([answer("four")], [answer("five")])
ONE = pair(answer("four"), answer("five"))
STRINGS = pair("four", "five")
SHAREGPT = pair(gpt("four"), gpt("five"))


def encode(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, method: str) -> list[tuple[str, str]]:
    encoded = encode_dataset(Dataset.from_list(rows), tokenizer, DataConfig(), method)
    sequences = [sequence for example in encoded for sequence in example.sequences]
    return [(str(tokenizer.decode(ids[~mask])), str(tokenizer.decode(ids[mask]))) for ids, mask in sequences]
