"""Rows of the embedding and the LM head for every token of the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a tokenizer's tokens need: their number, or more where it leaves ids out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def fit(model: PreTrainedModel, vocab_size: int | None, name: str, *, resize: bool) -> bool:
    """Sees to it that a model has a row for every token; one that has more rows is left alone.

    New rows are the mean of the old ones, in the input embedding and in the LM head with its bias, tied or not: what a
    new token adds to the normaliser of the starting model is that of an average token, and nothing is random.

    The model is changed in place, before an adapter is put around it. Returns whether rows were added.
    """
    sizes = [len(weight) for weight in _matrices(model)]
    if vocab_size is None or not sizes or min(sizes) >= vocab_size:
        if resize:
            log.info(
                "%s: nothing to resize, the model has %s rows for %s tokens", name, min(sizes, default="no"), vocab_size
            )
        return False
    refuse_few(min(sizes), vocab_size, name, resize=resize)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{name}: rows of quantised weights cannot be added: resize the model beforehand")
    add_rows(model, max(vocab_size, *sizes))
    text = "%s: resized from %d to %d rows; the new ones are the mean of the old"
    log.info(text, name, min(sizes), max(vocab_size, *sizes))
    return True


def refuse_other_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a model that reads the ids of one tokenizer and was trained on those of another with other tokens.

    Added tokens may differ, as a chat model renames some that its base does not use: that is warned of.

    Args:
        tokenizer: makes the ids.
        other: the model's.
        name: what messages call the model.
    """
    ours, theirs = ({index: token for token, index in each.get_vocab().items()} for each in (tokenizer, other))
    added = {*tokenizer.added_tokens_decoder, *other.added_tokens_decoder}
    apart = [index for index in sorted(ours.keys() & theirs.keys()) if ours[index] != theirs[index]]
    plain = [index for index in apart if index not in added]
    for index in (plain or apart)[:1]:
        text = (
            f"{name}: its tokenizer has another token than the policy's for {len(plain or apart)} of {len(ours)} ids: "
            f"{index} is {theirs[index]!r} there and {ours[index]!r} here"
        )
        if plain:
            raise ValueError(f"{text}; it would read other texts: choose a model with the policy's tokenizer")
        log.warning("%s: added tokens, which it may never have seen", text)


def refuse_few(rows: int, vocab_size: int, name: str, *, resize: bool) -> None:
    """Refuses fewer rows than tokens unless rows are added."""
    if rows < vocab_size and not resize:
        raise ValueError(
            f"{name}: the tokenizer has {vocab_size} tokens and the model only {rows}: choose a matching pair, or set "
            "model.resize_embeddings to true (new rows are the mean of the old ones; a teacher gets none)"
        )


@torch.no_grad()
def add_rows(model: PreTrainedModel, vocab_size: int) -> None:
    """Grows the input embedding and the LM head, and says so in the config."""
    before = [(len(x), x.mean(0, dtype=torch.promote_types(x.dtype, torch.float32))) for x in _parameters(model)]
    with torch.random.fork_rng():  # transformers draws the new rows
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for (rows, mean), x in zip(before, _parameters(model), strict=True):
        x[rows:] = mean.to(x.dtype)


def refuse_frozen_rows(model: PreTrainedModel, name: str, trained: Iterable[str]) -> None:
    """Refuses new rows that are not among an adapter's ``trained`` modules: all new tokens would stay the same.

    The adapter also has to hold them: who loads it finds them in no other file.
    """
    trained = set(trained)
    places = [place for place, module in model.named_modules() if any(module is x for x in _modules(model))]
    if missing := [x for place in places if not trained & {place, x := place.rsplit(".", 1)[-1]}]:
        raise ValueError(
            f"{name}: its new rows would stay frozen below the adapter, and all new tokens the same: add "
            f"{' and '.join(missing)} to model.lora.modules_to_save, or resize and train the base beforehand"
        )


def _modules(model: PreTrainedModel) -> list[nn.Module]:
    """The input embedding, and the LM head where there is one."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module for module in both if isinstance(module, nn.Module)]


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """Their weights."""
    return [weight for module in _modules(model) if isinstance(weight := getattr(module, "weight", None), Tensor)]


def _parameters(model: PreTrainedModel) -> Iterator[Tensor]:
    """What has a row for every token: the two matrices and the head's bias."""
    yield from _matrices(model)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if isinstance(bias, nn.Parameter):
        yield bias
