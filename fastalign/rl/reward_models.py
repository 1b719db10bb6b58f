"""Reward models: a directory that `fastalign reward` left, or any Hugging Face sequence classifier with one label."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fastalign.config import DataConfig, ModelConfig
from fastalign.data import chat
from fastalign.data.encode import Encoder
from fastalign.data.examples import TokenExample
from fastalign.data.formats import Example
from fastalign.data.pack import build_batch
from fastalign.models import lora, outline
from fastalign.models.head import scores
from fastalign.models.load import load_policy, load_tokenizer, readable
from fastalign.models.policy import Policy
from fastalign.parallel.host import rest
from fastalign.rl.answers import Group
from fastalign.types import Rollout

log = logging.getLogger(__name__)


def load_reward_model(
    path: str, policy_tokenizer: PreTrainedTokenizerBase, device: torch.device, setting: str, *, offload: bool = False
) -> PackedModel | PlainModel:
    """What scores groups with the model in a directory; with ``offload`` its weights rest in host memory.

    Raises:
        ValueError: there is none, or it gives a sequence no single number.
    """
    section = ModelConfig(path=path, dtype="auto")
    tokenizer = load_tokenizer(section, setting=setting)
    why = check_classifier(section, setting)
    if why is None:
        policy = placed(load_policy(section, scalar_head=True, setting=setting), device, offload)
        return PackedModel(policy, tokenizer, same_tokenizer(tokenizer, policy_tokenizer), device)
    log.info("reward model %s scores one sequence at a time: it cannot run on packed rows: %s", path, why)
    with readable("model", path, "config.json and safetensors weights", setting):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype="auto")
    return PlainModel(placed(model, device, offload), tokenizer, device)


def placed(model: Any, device: torch.device, offload: bool) -> Any:
    """A frozen model on the device that it runs on, or on the host, from where its layers visit that device."""
    model = model.eval().requires_grad_(False)
    if not offload or device.type == "cpu":
        return model.to(device)
    rest(model, device)
    for owner, name in buffers(model):
        owner[name] = owner[name].to(device)
    return model


def buffers(model: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a model's buffers are kept, which stay on the device."""
    for module in model.modules():
        yield from ((module._buffers, name) for name, x in module._buffers.items() if x is not None)


def check_classifier(section: ModelConfig, setting: str) -> str | None:
    """Why a classifier cannot run on packed rows, None where it can; refuses what is no classifier with one label."""
    if lora.saved_adapter(section, scalar_head=True) is not None:
        return None
    path = str(section.path)
    with readable("model", path, "config.json and safetensors weights", setting):
        config = AutoConfig.from_pretrained(path)
    kinds = getattr(config, "architectures", None) or ["a model of no named class"]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ValueError(f"{setting}: {path!r} is {kinds[0]}: a reward model is a ...ForSequenceClassification")
    if config.num_labels != 1:
        raise ValueError(f"{setting}: {path!r} has {config.num_labels} labels: a reward model has one")
    return outline.why_not(config, scalar_head=True, trust_remote_code=False)


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers, and their chat templates, make the same tokens of all texts."""
    texts = [backend and backend.to_str() for backend in (getattr(x, "backend_tokenizer", None) for x in (one, other))]
    return texts[0] is not None and texts[0] == texts[1] and one.chat_template == other.chat_template


class PackedModel:
    """Scores the samples of a prompt in one packed row, the prompt computed once.

    With the policy's tokenizer the sampled tokens are scored as they are; else their text is tokenised anew, as
    `fastalign reward` does with its data.
    """

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, same: bool, device: torch.device) -> None:
        self.policy, self.tokenizer, self.same, self.device = policy, tokenizer, same, device
        self.encoder = Encoder(tokenizer, DataConfig(), "preference", "reward", None, raw_dialogue=False)
        self.closing = closing_tokens(tokenizer)

    @torch.no_grad()
    def __call__(self, group: Group) -> list[float]:
        """The score at the last token of each sample."""
        chats = [not isinstance(prompt, str) for prompt in group.arguments["prompts"]]
        if self.same:
            rows = [self.sampled(*one) for one in zip(group.rollouts, chats, strict=True)]
        else:
            rows = self.tokenised(group)
        sequences = tuple((ids, np.arange(len(ids)) == len(ids) - 1) for ids in rows)
        batch = build_batch([TokenExample(sequences, group.rollouts[0].row, own_rows=True)], share_prefix=True)
        return self.policy(batch.to(self.device), scores).tolist()

    def sampled(self, rollout: Rollout, is_chat: bool) -> np.ndarray:
        """The tokens of a sample, closed as the chat template closes a turn that has ended."""
        closing = self.closing if is_chat and rollout.finish == "eos" else []
        return np.concatenate([rollout.prompt, rollout.tokens, np.array(closing, dtype=np.int64)])

    def tokenised(self, group: Group) -> list[np.ndarray]:
        """The tokens of each sample's text, by this model's own tokenizer and chat template."""
        texts = [
            chat.render(Example(prompt, (completion,), {}), self.tokenizer, None, judged=True)[0]
            for prompt, completion in zip(group.arguments["prompts"], group.arguments["completions"], strict=True)
        ]
        lookup = self.encoder.tokenise([key for text in texts for key in text.to_tokenise()])
        rows = [self.encoder.tokens(text, lookup)[0] for text in texts]
        eos, cut = self.tokenizer.eos_token_id, [rollout.finish == "length" for rollout in group.rollouts]
        return [
            np.array(ids[:-1] if was_cut and ids[-1] == eos else ids, dtype=np.int64)
            for ids, was_cut in zip(rows, cut, strict=True)
        ]


class PlainModel:
    """Scores with the model's own forward, one sequence at a time, so that none is padded."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device

    @torch.no_grad()
    def __call__(self, group: Group) -> list[float]:
        """The score of each sample."""
        prompts, completions = group.arguments["prompts"], group.arguments["completions"]
        return [self.score(*one) for one in zip(prompts, completions, strict=True)]

    def score(self, prompt: Any, completion: Any) -> float:
        """The score of one text or conversation."""
        plain = isinstance(prompt, str)
        text = prompt + completion if plain else chat.Chat(self.tokenizer, None, {}).text([*prompt, *completion])
        inputs = self.tokenizer(text, add_special_tokens=plain, return_tensors="pt").to(self.device)
        return self.model(**inputs).logits[0, 0].item()


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> Sequence[int]:
    """What the chat template writes behind the EOS of an answer, such as the line break of many: a reward model was
    trained to be read at the last token, which is not the EOS then."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer(chat.Chat(tokenizer, None, {}).text(turns), add_special_tokens=False)["input_ids"]
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return ids[ends[-1] + 1 :] if ends else []
