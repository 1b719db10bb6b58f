"""Completions of several turns: what is sampled and what is read, tools, and what goes wrong in an environment."""

import numpy as np
import pytest
import torch
from sampling import VOCAB, make_policy, make_prompts, make_sampler

from fastalign.rl.environments import EnvironmentSampler, ToolUser, load_environment, tool_message
from fastalign.rl.exact import largest_difference, trained_logps
from fastalign.rl.sampler import Stops
from fastalign.rl.selection import scored_part, sequence
from fastalign.types import Prompt

EOS = Stops(frozenset(range(0, VOCAB, 3)))
"""Turns are short, and few are cut off."""


class Numbers:
    """A tokenizer whose words are token ids."""

    chat_template = None

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))

    def __call__(self, text, add_special_tokens=False):
        return type("Tokens", (), {"input_ids": [int(word) for word in text.split()]})


class Echo:
    """Says the last token again, twice, in the first two turns; pays half for each."""

    def init(self, first="", **row):
        self.turns = 0
        return first

    def step(self, text):
        self.turns += 1
        last = text.split()[-1]
        return (f"{last} {last}", 0.5, False) if self.turns < 3 else (None, 0.5, True)


@pytest.fixture
def talk():
    sampler = make_sampler(make_policy(), EOS, max_new_tokens=6)

    def make(environment=Echo, max_turns=8, max_length=200):
        return EnvironmentSampler(sampler, environment, Numbers(), max_turns, max_length)

    return make


def prompts(**columns):
    return [Prompt(each.ids, each.row, columns) for each in make_prompts(5, 9)]


def test_observations_are_read_and_not_scored_and_log_probs_stay_exact(talk):
    source = talk()
    rollouts = sorted(source.generate(prompts(first="7 8"), 3, 0), key=lambda one: (one.row, one.sample))
    assert [(one.row, one.sample) for one in rollouts] == [(row, i) for row in (10, 11) for i in range(3)]
    for one in rollouts:
        edges = np.flatnonzero(np.diff(one.scored.astype(int))) + 1
        parts = np.split(one.tokens, edges)
        assert parts[0].tolist() == [7, 8] and not one.scored[0]
        for said, heard in zip(parts[1::2], parts[2::2], strict=False):
            assert heard.tolist() == [said[-1], said[-1]]
        assert one.reward == (1.5 if one.finish == "eos" else 0.5 * (len(parts) // 2))  # a turn without EOS is the last
    whole = [one for one in rollouts if one.finish == "eos"]
    assert whole
    for one in whole:  # scored again as training does, from all tokens before
        logps = trained_logps(source.sampler, [one])
        assert torch.equal(logps[torch.from_numpy(one.scored)], torch.from_numpy(one.sampler_logps[one.scored]))
        part = scored_part([one], [sequence(one)], [one.sampler_logps])
        assert len(part) == one.scored.sum() == sequence(one)[1].sum()


def test_a_conversation_does_not_depend_on_the_others(talk):
    alone = {(o.row, o.sample): o.tokens.tolist() for p in prompts() for o in talk().generate([p], 2, 5)}
    assert alone == {(o.row, o.sample): o.tokens.tolist() for o in talk().generate(prompts(), 2, 5)}
    assert len({tuple(tokens) for tokens in alone.values()}) > 2, "turns and samples must not share their noise"


def test_turns_and_tokens_are_bounded(talk):
    assert {one.finish for one in talk(max_turns=1).generate(prompts(), 2, 0)} == {"length"}
    short = [*talk(max_length=12).generate(prompts(), 2, 0)]
    assert all(len(one.tokens) + len(one.prompt) <= 12 + 6 for one in short)


class Bad(Echo):
    def step(self, text):
        return {"no": "step"}["reward"]


class Wrong(Echo):
    def step(self, text):
        return "text alone"


@pytest.mark.parametrize(
    "kind, text",
    [(Bad, "prompt 10, sample 0: step failed: .*KeyError: 'reward'"), (Wrong, "step returned 'text alone'")],
)
def test_what_an_environment_does_wrong_is_one_line(talk, kind, text):
    with pytest.raises(ValueError, match=f"^sampler.environment: .*{text}"):
        list(talk(kind).generate(prompts()[:1], 1, 0))


class Tools:
    def reset(self, **row):
        self.total = 0

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    def get_reward(self):
        return self.total


def test_tools_are_called_and_errors_are_told_to_the_policy():
    user = ToolUser(Tools(), lambda text: text)
    assert user.init(answer="3") is None
    call = '<tool_call>{"name": "add", "arguments": {"number": 2}}</tool_call>'
    assert user.step(f"so {call} and {call}") == ("2\n4", 0.0, False)
    for words, answer in (
        ('{"name": "sub"}', "error: no tool 'sub', there are add"),
        ("{name}", "error: a call is a JSON object with name and arguments"),
        ('{"name": "add", "arguments": {"x": 1}}', "error: TypeError"),
        ('{"name": "get_reward"}', "error: no tool 'get_reward'"),
    ):
        observation, _, done = user.step(f"<tool_call>{words}</tool_call>")
        assert observation.startswith(answer) and not done
    assert user.step("the answer is 4") == (None, 4.0, True)


def test_environments_are_found_by_their_place(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Gym:\n    def init(self): ...\n    def step(self, text): ...\nclass None_: ...\n"
    )
    assert load_environment(f"{tmp_path}/mine.py:Gym", None).__name__ == "Gym"
    for name in ("None_", "Other"):
        with pytest.raises(ValueError, match="has no class with reset and tools, or with init and step"):
            load_environment(f"{tmp_path}/mine.py:{name}", None)
    with pytest.raises(ValueError, match=r"expected file\.py:Class"):
        load_environment("mine", None)


def test_a_chat_template_writes_what_tools_return():
    from fastalign.data.builtin import train_tokenizer

    tokenizer = train_tokenizer()
    assert tool_message(tokenizer, "42").strip("\n") == "<|tool|>\n42\n<|assistant|>"
    assert "<tool_response>\n42" in tool_message(Numbers(), "42")


def test_differences_are_seen(talk):
    source = talk()
    one = next(iter(source.generate(prompts(), 1, 0)))
    assert largest_difference([one], trained_logps(source.sampler, [one]) + 1) >= 1
