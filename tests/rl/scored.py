"""What tests of rewards score: a small trained tokenizer, and texts as if a policy had sampled them."""

import functools

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastalign.types import Rollout

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The policy's."""
    return train("the answer of the sum is a number and not a letter, so it is right", 300)


def train(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with EOS and a chat template, trained on a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = TEMPLATE
    return made


def rollouts(prompt: str, *texts: str, row: int = 0, finish: str = "eos") -> list[Rollout]:
    """Samples of one prompt, each with its EOS."""
    known = tokenizer()
    ids, end = np.array(known.encode(prompt), dtype=np.int64), [known.eos_token_id]
    tokens = [np.array(known.encode(text) + end, dtype=np.int64) for text in texts]
    return [Rollout(ids, t, -np.ones(len(t), np.float32), row, i, finish, 0) for i, t in enumerate(tokens)]
