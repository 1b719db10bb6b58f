"""A tokenizer with more tokens than the model has rows: refused, or new rows that are the mean of the old ones."""

import logging
from dataclasses import replace

import pytest
import torch
from test_load import inline, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fastalign.config import ModelConfig
from fastalign.models import lora
from fastalign.models.load import check_model, load_policy, load_tokenizer, save_pretrained

V, MORE = 61, 70


@pytest.fixture
def small(tmp_path):
    """``small("gpt2")``: a saved model of 61 rows, loaded with a tokenizer of 70 tokens."""

    def make(kind="llama", resize=True, **options):
        base = save_pretrained(load_policy(inline(kind)), None, tmp_path / "base")
        make_tokenizer(MORE).save_pretrained(tmp_path / "tokenizer")
        return ModelConfig(path=str(base), tokenizer=str(tmp_path / "tokenizer"), resize_embeddings=resize, **options)

    return make


def load(section, **options):
    return load_policy(section, tokenizer=load_tokenizer(section), **options)


def logits(model, count=10):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(torch.arange(count)[None]).logits


def test_too_few_rows_are_refused_with_both_ways_out(small):
    section = small(resize=False)
    expected = (
        rf"^model\.path: '{section.path}': the tokenizer has 70 tokens and the model only 61: choose a matching pair, "
        r"or set model\.resize_embeddings to true"
    )
    with pytest.raises(ValueError, match=expected):
        load(section)
    with pytest.raises(ValueError, match=expected):  # its config says as much, before data are tokenised
        check_model(section, load_tokenizer(section))
    with pytest.raises(ValueError, match=r"^model\.config: the tokenizer has 70 tokens and the model only 61"):
        check_model(inline(vocab_size=V), make_tokenizer(MORE))
    check_model(inline(), make_tokenizer(V))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])  # gpt2 ties its head, phi's has a bias
def test_new_rows_are_the_mean_of_the_old(kind, small, tmp_path, caplog):
    section = small(kind)
    old = AutoModelForCausalLM.from_pretrained(section.path)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        policy = load(section)
    assert (
        f"model.path: '{section.path}': resized from 61 to 70 rows; the new ones are the mean of the old" in caplog.text
    )
    assert torch.equal(torch.get_rng_state(), before)
    new = policy.model
    assert new.config.vocab_size == MORE
    for mine, theirs in (
        (new.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (new.get_output_embeddings().weight, old.get_output_embeddings().weight),
        (new.get_output_embeddings().bias, old.get_output_embeddings().bias),
    ):
        if theirs is not None:
            assert torch.equal(mine[:V], theirs) and len(mine) == MORE
            torch.testing.assert_close(mine[V:], theirs.mean(0).expand_as(mine[V:]))
    tied = new.get_input_embeddings().weight is new.get_output_embeddings().weight
    assert tied == (old.get_input_embeddings().weight is old.get_output_embeddings().weight)
    torch.testing.assert_close(logits(new)[..., :V], logits(old), rtol=0, atol=1e-5)
    exported = save_pretrained(policy, load_tokenizer(section), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(exported)
    assert again.config.vocab_size == len(AutoTokenizer.from_pretrained(exported)) == MORE
    torch.testing.assert_close(logits(again, MORE), logits(new, MORE), rtol=0, atol=1e-6)


def test_a_reward_model_has_no_head_to_grow(small, tmp_path):
    section = small()
    policy = load(section, scalar_head=True)
    assert policy.head.weight.shape[0] == 1 and policy.model.get_input_embeddings().num_embeddings == MORE
    exported = save_pretrained(policy, load_tokenizer(section), tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(exported)
    assert torch.equal(again.model.embed_tokens.weight, policy.model.get_input_embeddings().weight)


@pytest.mark.parametrize("tokens", [V, 50])
def test_enough_rows_stay(tokens, small, caplog):
    """A vocabulary padded for the hardware, or a smaller tokenizer: nothing is added, nothing cut off."""
    section = small()
    with caplog.at_level(logging.INFO):
        policy = load_policy(section, tokenizer=make_tokenizer(tokens))
    assert "nothing to resize, the model has 61 rows" in caplog.text
    assert policy.config.vocab_size == len(policy.head.weight) == V


def test_ids_that_a_tokenizer_leaves_out_have_rows():
    """Three tokens, the last of id 9: as many rows as tokens would be too few to look it up."""
    words = models.WordLevel({"a": 0, "b": 1, "</s>": 9}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="</s>")
    section = inline()
    assert section.config is not None and "vocab_size" in section.config
    with pytest.raises(ValueError, match=r"10 tokens and the model only 9"):
        load_policy(inline(vocab_size=9), tokenizer=tokenizer)
    del section.config["vocab_size"]
    assert len(load_policy(section, tokenizer=tokenizer).head.weight) == 10


def test_an_inline_config_of_its_own_size():
    section = replace(inline(vocab_size=V), resize_embeddings=True)
    assert len(load_policy(section, tokenizer=make_tokenizer(MORE)).head.weight) == MORE


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_must_train_and_hold_the_new_rows(kind, small, tmp_path):
    peft = pytest.importorskip("peft")
    head = {"llama": "embed_tokens", "gpt2": "wte"}[kind]
    with pytest.raises(ValueError, match=f"stay frozen below the adapter.*add {head} and lm_head to model.lora"):
        load(small(kind, lora={"r": 2}))
    with pytest.raises(ValueError, match=r"add lm_head to model\.lora\.modules_to_save"):
        load(small(kind, lora={"r": 2, "modules_to_save": [head]}))
    section = small(kind, lora={"r": 2, "modules_to_save": [head, "lm_head"]})
    policy = load(section)
    for module in (policy.model.get_input_embeddings(), policy.head):
        assert module.weight.shape[0] == MORE and module.weight.requires_grad
    with torch.no_grad():  # as training would
        for number, p in enumerate(p for p in policy.parameters() if p.requires_grad):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    exported = save_pretrained(policy, load_tokenizer(section), tmp_path / "out")
    expected = logits(policy.model, MORE)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(exported)
    torch.testing.assert_close(logits(again.get_base_model(), MORE), expected, rtol=0, atol=1e-6)
    on = ModelConfig(path=str(exported), resize_embeddings=True)
    torch.testing.assert_close(logits(load(on).model, MORE), expected, rtol=0, atol=1e-6)


def test_quantised_weights_are_refused_before_any_work():
    section = ModelConfig(path="x", lora={"r": 2}, quantization={"load_in_4bit": True}, resize_embeddings=True)
    with pytest.raises(ValueError, match=r"model\.resize_embeddings excludes model\.quantization"):
        lora.check(section)
