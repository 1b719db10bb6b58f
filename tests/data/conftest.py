"""Small real tokenizers, and caches that the tests do not share with the user."""

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is two and two? Two and two is four.",
    "The cat sat on the mat, and the dog sat by the door.",
    "Human: may I ask something? Assistant: of course you may, ask away.",
]


@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory: pytest.TempPathFactory, new_cache: Callable[[Path], str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTALIGN_CACHE", new_cache(tmp_path_factory.mktemp("data") / "cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``make_tokenizer(adds="bos eos", pad="</s>")``: a byte-level BPE tokenizer with the given habits."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<pad>", "<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)

    def make(adds: str = "", pad: str = "<pad>", bos: str = "<s>", **options: object) -> PreTrainedTokenizerFast:
        copy = Tokenizer.from_str(backend.to_str())
        if adds:
            template = " ".join([*([bos] if "bos" in adds else []), "$A", *(["</s>"] if "eos" in adds else [])])
            tokens = [(token, backend.token_to_id(token)) for token in {bos, "</s>"}]
            copy.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
        return PreTrainedTokenizerFast(tokenizer_object=copy, pad_token=pad, bos_token=bos, eos_token="</s>", **options)

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """``write(name, text)``: a file in a fresh directory; its path."""

    def put(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return put
