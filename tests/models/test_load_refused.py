"""Models that cannot be loaded as written are answered with one line."""

import json

import pytest
import torch
from packed_cases import ARCHITECTURES
from safetensors.torch import load_file, save_file
from test_load import inline, make_tokenizer

from fastalign.config import ModelConfig
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained


@pytest.fixture
def saved(tmp_path):
    """A small model and its tokenizer on disk."""
    return save_pretrained(load_policy(inline()), make_tokenizer(), tmp_path / "model")


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"\xff\xfe[1]"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_names_the_directory(saved, name, damage):
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    section = ModelConfig(path=str(saved))
    with pytest.raises(ValueError, match=rf"(model|tokenizer) .*{saved}") as raised:
        load_tokenizer(section) if "tokenizer" in name else load_policy(section)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[1]", "{}", '"a"', '{"added_tokens": [], "model": {"type": "B"}}'])
def test_a_tokenizer_file_of_another_kind_names_the_directory(saved, text):
    (saved / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=rf"the tokenizer '{saved}' cannot be loaded \("):
        load_tokenizer(ModelConfig(path=str(saved)))


def test_a_directory_without_a_tokenizer_is_told_in_a_line(saved):
    for file in saved.glob("*token*"):
        file.unlink()
    for section, words in (
        (ModelConfig(path=str(saved)), ", or set model.tokenizer$"),
        (ModelConfig(tokenizer=str(saved)), "$"),
    ):
        with pytest.raises(
            ValueError, match=rf"no tokenizer in '{saved}': expected a directory with tokenizer.json{words}"
        ):
            load_tokenizer(section)


@pytest.mark.parametrize("change", [{"hidden_size": "big"}, {"num_attention_heads": 5}])
def test_a_config_that_cannot_be_names_the_directory(saved, change):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=rf"the model '{saved}' cannot be loaded \(.*(big|multiple)"):
        load_policy(ModelConfig(path=str(saved)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": "big"}, r"model\.config .*Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, r"model\.config .*hidden size \(32\) is not a multiple"),
        ({"hidden_act": "bogus"}, r"model\.config .*bogus"),
        ({"dtype": "bogus"}, r"model\.config .*bogus"),
        ({"hidden_size": 0}, r"model\.config "),
    ],
)
def test_inline_values_that_cannot_be_are_refused(change, words):
    with pytest.raises(ValueError, match=words) as raised:
        load_policy(inline("llama", **change))
    assert "\n" not in str(raised.value)


def rewrite(where, change):
    file = where / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_checkpoint_with_missing_weights_is_refused(saved):
    lost = "model.layers.0.mlp.down_proj.weight"
    rewrite(saved, lambda tensors: tensors.pop(lost))
    with pytest.raises(ValueError, match=rf"lacks 1 of the model's weights \({lost}\)"):
        load_policy(ModelConfig(path=str(saved)))


def test_a_checkpoint_with_weights_of_another_shape_is_refused(saved):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(saved, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=rf"{name} is \(3, 3\) there and \(\d+, \d+\) by its config"):
        load_policy(ModelConfig(path=str(saved)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_hidden_layer": 3}, r"unknown key 'num_hidden_layer' .* did you mean 'num_hidden_layers'\?"),
        ({"zzz": 3}, r"unknown key 'zzz' in model\.config of a llama$"),
        ({"model_type": "lama"}, r"unknown model_type 'lama' in model\.config: did you mean 'llama'\?"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(change, words):
    with pytest.raises(ValueError, match=words):
        load_policy(inline("llama", **change))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_documented_keys_are_accepted(key):
    section = inline("llama", **{key: "bfloat16", "rope_theta": 500.0, "tie_word_embeddings": True, "use_cache": False})
    section.dtype = "auto"
    assert load_policy(section).head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_saved_config_can_be_written_inline(kind):
    config = load_policy(inline(kind)).config
    again = load_policy(ModelConfig(config=json.loads(config.to_json_string(use_diff=False))))
    assert again.config.to_dict().keys() == config.to_dict().keys()
