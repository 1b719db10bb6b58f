"""Loading and saving: what comes back is what was written, and a bad request gets one clear line."""

import numpy as np
import pytest
import torch
from packed_cases import ARCHITECTURES, PAIRS, logps_head, make_batch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fastalign.config import ModelConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained, separate_padding


def inline(kind="llama", **options):
    config = {"model_type": kind, **ARCHITECTURES[kind], **options}
    return ModelConfig(config={key: value for key, value in config.items() if not key.endswith("token_id")})


def make_tokenizer(size=61):
    words = {f"w{i}": i for i in range(size - 2)} | {"<s>": size - 2, "</s>": size - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])  # gpt2 and gemma2 tie head and embedding
@pytest.mark.parametrize("explicit", [False, True])
def test_round_trip(tmp_path, kind, explicit):
    policy = load_policy(inline(kind))
    state = dict(policy.state_dict()) if explicit else None
    where = save_pretrained(policy, make_tokenizer(), tmp_path / "model", state)
    again = AutoModelForCausalLM.from_pretrained(where, attn_implementation="eager")
    policy.model.set_attn_implementation("eager")
    ids = torch.arange(10)[None]
    # the policy may compute with native kernels, which add in another order
    torch.testing.assert_close(again.eval()(ids).logits, policy.model.eval()(ids).logits, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(where).eos_token == "</s>"
    reloaded = load_policy(ModelConfig(path=str(where)))
    policy.model.set_attn_implementation(policy.attention)
    batch, _ = make_batch(*PAIRS)
    assert torch.equal(policy(batch, logps_head), reloaded(batch, logps_head))


def packed_scores(hidden, weight, labels):
    return hidden @ weight[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])  # gemma2 bends the logits of an LM head alone
def test_a_saved_reward_model_scores_padded_rows_as_it_scored_packed_ones(tmp_path, kind):
    tokenizer, draw = make_tokenizer(), np.random.default_rng(0)
    policy = load_policy(inline(kind), tokenizer=tokenizer, scalar_head=True)
    separate_padding(policy, tokenizer)  # it was EOS
    prompt, end = draw.integers(1, 50, 6), [tokenizer.eos_token_id]
    rows = [np.concatenate([prompt, draw.integers(1, 50, length), end]) for length in (3, 11, 1, 7)]
    pairs = [
        TokenExample(tuple((ids, np.arange(len(ids)) == len(ids) - 1) for ids in rows[i : i + 2]), i, own_rows=True)
        for i in (0, 2)
    ]
    with torch.no_grad():
        mine = policy(build_batch(pairs, share_prefix=True), packed_scores)
        where = save_pretrained(policy, tokenizer, tmp_path / "model")
        padded = AutoTokenizer.from_pretrained(where).pad(
            {"input_ids": rows}, padding_side="right", return_tensors="pt"
        )
        theirs = AutoModelForSequenceClassification.from_pretrained(where)(**padded).logits[:, 0]
    assert mine.abs().max() > 0.1 and len(set(mine.tolist())) == 4
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_given_tensors_are_written_not_the_parameters(tmp_path):
    policy = load_policy(inline())
    state = {name: torch.full_like(x, 0.5) for name, x in policy.state_dict().items()}
    again = AutoModelForCausalLM.from_pretrained(save_pretrained(policy, None, tmp_path / "model", state))
    assert all((x == 0.5).all() for x in again.parameters())


def test_a_save_that_dies_leaves_the_old_model(tmp_path, monkeypatch):
    policy = load_policy(inline())
    where = save_pretrained(policy, None, tmp_path / "model")
    before = (where / "model.safetensors").read_bytes()

    def die(directory, **_):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(policy.model, "save_pretrained", die)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(policy, None, where)
    assert (where / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    save_pretrained(policy, None, where)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_seed_decides_the_weights_and_the_global_generator_stays():
    state = torch.get_rng_state()
    first, same, other = (load_policy(inline(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_dtypes(tmp_path):
    section = inline()
    assert load_policy(section).head.weight.dtype == torch.float32
    section.dtype = "bfloat16"
    policy = load_policy(section)
    assert policy.head.weight.dtype == torch.bfloat16
    where = str(save_pretrained(policy, None, tmp_path / "model"))
    for dtype, expected in {"auto": torch.bfloat16, "float32": torch.float32}.items():
        assert load_policy(ModelConfig(path=where, dtype=dtype)).head.weight.dtype == expected
    section.dtype = "auto"
    assert load_policy(section).head.weight.dtype == torch.float32


def test_tokenizer_gives_vocabulary_and_special_tokens():
    section = inline()
    del section.config["vocab_size"]
    policy = load_policy(section, tokenizer=make_tokenizer(53))
    assert policy.head.weight.shape[0] == 53
    assert (policy.config.bos_token_id, policy.config.eos_token_id, policy.config.pad_token_id) == (51, 52, 52)
    assert policy.model.generation_config.eos_token_id == 52
    assert policy.model.get_input_embeddings().weight[52].abs().max() > 0


def test_options_of_the_section_reach_the_policy():
    section = inline()
    section.attention, section.gradient_checkpointing = "sdpa", True
    policy = load_policy(section)
    assert policy.attention == policy.config._attn_implementation == "fastalign_sdpa"
    assert policy.backbone.gradient_checkpointing
    batch, _ = make_batch(*PAIRS)
    section.gradient_checkpointing = False
    assert torch.equal(policy(batch, logps_head), load_policy(section)(batch, logps_head))


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        (ModelConfig(), {}, "no model is given: set model.path"),
        (ModelConfig(path="a", config={}), {}, "model.path and model.config are both set"),
        (ModelConfig(config={"hidden_size": 4}), {}, "needs a model_type"),
        (inline(), {"vocab_size": 70}, "70 tokens and the model only 61"),
        (ModelConfig(path="./not/there"), {}, r"model\.path: no directory at '\./not/there'"),
        (ModelConfig(path="nobody/nothing"), {}, "HF_HUB_OFFLINE=1 forbids asking the hub"),
    ],
)
def test_bad_requests_get_one_line(section, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message) as raised:
        load_policy(section, **options)
    assert "\n" not in str(raised.value)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="Unrecognized model in"):
        load_policy(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"no model in .* expected a directory with"):
        load_policy(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_load_tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).eos_token == "</s>"
    assert load_tokenizer(ModelConfig(path="x", tokenizer=str(tmp_path))).eos_token == "</s>"
    section = ModelConfig(config={"model_type": "llama"}, tokenizer="builtin:bpe")
    assert load_tokenizer(section, fallback=lambda name: f"made {name}") == "made builtin:bpe"
    with pytest.raises(ValueError, match="no built-in tokenizers"):
        load_tokenizer(section)
    with pytest.raises(ValueError, match=r"set model\.tokenizer"):
        load_tokenizer(ModelConfig(config={"model_type": "llama"}))
