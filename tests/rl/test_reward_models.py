"""Reward models score what was sampled as transformers scores it, whoever trained them."""

import numpy as np
import pytest
import torch
from scored import rollouts, tokenizer, train
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastalign.config import ModelConfig
from fastalign.models.load import load_policy, save_pretrained, separate_padding
from fastalign.rl.answers import RewardError
from fastalign.rl.scoring import Scorer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT = [{"role": "user", "content": "what is the sum"}]


@pytest.fixture
def save(tmp_path):
    """``save(tokenizer, model_type, **config)``: the directory of a new classifier."""

    def make(known: PreTrainedTokenizerFast, kind: str = "llama", labels: int = 1, name: str = "rm", **options) -> str:
        torch.manual_seed(len(name))
        config = AutoConfig.for_model(
            kind, vocab_size=len(known), num_labels=labels, pad_token_id=0, **SMALL, **options
        )
        model = AutoModelForSequenceClassification.from_config(config)
        for x in model.parameters():
            torch.nn.init.normal_(x, std=0.3)
        model.save_pretrained(tmp_path / name)
        known.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def score(path, prompt, group, device="cpu"):
    scorer = Scorer([{"model": path}], tokenizer(), device)
    try:
        return scorer.submit(group, {"prompt": prompt}).result().table[:, 0]
    finally:
        scorer.close()


def plainly(path, rows):
    """transformers' own scores, of one unpadded sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [model(torch.as_tensor(np.asarray(ids))[None]).logits[0, 0].item() for ids in rows]


def test_our_export_scores_the_sampled_tokens_as_they_are(tmp_path):
    section = ModelConfig(config={"model_type": "llama", **SMALL})
    known = tokenizer()
    policy = load_policy(section, tokenizer=known, scalar_head=True)
    torch.nn.init.normal_(policy.head.weight)
    separate_padding(policy, known)
    path = str(save_pretrained(policy, known, tmp_path / "model"))
    group = rollouts("what is the answer", "a number", "a letter, and it is not right", "")
    odd = rollouts("x", "", finish="length")[0]
    odd.tokens[:] = known.convert_tokens_to_ids("t")
    given = score(path, "what is the answer", group)
    wanted = plainly(path, [np.concatenate([r.prompt, r.tokens]) for r in group])
    np.testing.assert_allclose(given, wanted, atol=1e-5)
    assert len(set(given.round(4).tolist())) == 3
    np.testing.assert_allclose(score(path, "x", [odd]), plainly(path, [[*odd.prompt, *odd.tokens]]), atol=1e-5)


def test_a_conversation_is_read_at_the_end_that_its_template_writes(save):
    """In training the last token is the line break behind the answer, which no policy samples."""
    known = tokenizer()
    path = save(known)
    prompt = known.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    group = rollouts(prompt, "a number", "a letter")
    ids = known(f"{known.eos_token}\n", add_special_tokens=False)["input_ids"]
    assert ids[0] == known.eos_token_id and len(ids) == 2
    wanted = plainly(path, [[*r.prompt, *r.tokens, ids[1]] for r in group])
    np.testing.assert_allclose(score(path, CHAT, group), wanted, atol=1e-5)
    cut = rollouts(prompt, "a number", finish="length")
    np.testing.assert_allclose(score(path, CHAT, cut), plainly(path, [[*cut[0].prompt, *cut[0].tokens]]), atol=1e-5)


def test_another_tokenizer_reads_the_text(save):
    other = train("letters and numbers are not words", 280)
    other.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    path = save(other)
    group = rollouts("the sum", " is a number", " is it")
    wanted = [[*other.encode(f"the sum{text}"), other.eos_token_id] for text in (" is a number", " is it")]
    np.testing.assert_allclose(score(path, "the sum", group), plainly(path, wanted), atol=1e-5)
    cut = rollouts("the sum", " is a number", finish="length")
    np.testing.assert_allclose(score(path, "the sum", cut), plainly(path, [wanted[0][:-1]]), atol=1e-5)
    wanted = [other.encode(f"[what is the sum][{text}]") for text in (" is a number", " is it")]
    np.testing.assert_allclose(score(path, CHAT, group), plainly(path, wanted), atol=1e-5)


def test_a_model_that_reads_both_ways_scores_one_sequence_at_a_time(save, caplog):
    caplog.set_level("INFO")
    known = tokenizer()
    path = save(known, "bert")
    group = rollouts("the sum", " is a number", " is it")
    wanted = plainly(path, [known(f"the sum{text}")["input_ids"] for text in (" is a number", " is it")])
    np.testing.assert_allclose(score(path, "the sum", group), wanted, atol=1e-5)
    assert "scores one sequence at a time: it cannot run on packed rows: " in caplog.text


def test_several_models_score_at_once(save):
    known = tokenizer()
    paths = [save(known, name=name) for name in ("one", "other")]
    scorer = Scorer([{"model": paths[0], "weight": 2}, {"model": paths[1], "name": "b"}], known)
    assert scorer.names == ("one", "b")
    groups = [rollouts(prompt, "a", "b") for prompt in ("p", "q", "the sum")]
    given = scorer.collect([scorer.submit(group, {}) for group in groups])
    rows = [np.concatenate([r.prompt, r.tokens]) for group in groups for r in group]
    np.testing.assert_allclose(given, np.array([plainly(path, rows) for path in paths]).T, atol=1e-5)
    scorer.close()


def test_what_is_no_reward_model_is_refused_in_one_line(save, tmp_path):
    known = tokenizer()
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(known), **SMALL)).save_pretrained(
        tmp_path / "lm"
    )
    known.save_pretrained(tmp_path / "lm")
    for path, words in (
        (str(tmp_path / "lm"), "is LlamaForCausalLM: a reward model is a ...ForSequenceClassification"),
        (save(known, labels=2, name="two"), "has 2 labels: a reward model has one"),
        (str(tmp_path / "none"), "no directory at"),
        (5, "expected a directory or hub name, got a number"),
    ):
        with pytest.raises(ValueError, match=rf"^rewards\[0\]\.model: .*{words}") as caught:
            Scorer([{"model": path}], known)
        assert "\n" not in str(caught.value)


def test_a_sequence_that_is_too_long_is_named(save):
    path = save(tokenizer(), "mistral", sliding_window=8, num_key_value_heads=2)
    with pytest.raises(
        RewardError, match=r"fails on sample 1 of the prompt 'p' .*: a sequence of \d+ tokens is longer"
    ):
        score(path, "p", rollouts("p", "a", "a long answer to all of it that is no number"))
