"""The native sampler: exact, deterministic, and right about where completions end."""

from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from sampling import VOCAB, in_order, make_policy, make_prompts, make_sampler, told

from fastalign.models import decoding
from fastalign.models.packed_layers import PackedLayers, packed_layers
from fastalign.models.verify import stock_attention
from fastalign.ops.backends.cpp import product
from fastalign.rl import sampler as sampling
from fastalign.rl.exact import compare_many, largest_difference, probe, settle, trained_logps
from fastalign.rl.sampler import Stops, stops_of
from fastalign.types import Prompt

HALF = torch.bfloat16
EOS = Stops(frozenset(range(0, VOCAB, 12)))
"""So many end tokens that completions have all lengths."""

EXACT = {
    "llama": {},
    "llama in bf16": {"dtype": HALF},
    "qwen3, whose heads have norms": {"kind": "qwen3"},
    "qwen3 in bf16": {"kind": "qwen3", "dtype": HALF},
    "mistral": {"kind": "mistral", "sliding_window": None},
    "a tied head": {"tie_word_embeddings": True},
    "an adapter, also on the head": {"adapter": True},
    "an adapter in bf16": {"adapter": True, "dtype": HALF},
}


@pytest.fixture
def two_threads():
    was = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(was)


@pytest.mark.parametrize("name", EXACT)
def test_log_probs_are_bit_for_bit_those_of_training(name):
    policy = make_policy(**EXACT[name])
    for n, temperature in ((1, 1.0), (8, 0.7)):
        sampler = make_sampler(policy, EOS, temperature=temperature, max_new_tokens=18, max_rows=11)
        rollouts = in_order(sampler.generate(make_prompts(1, 9, 33), n, 3))
        assert len(rollouts) == 3 * n and len({len(rollout.tokens) for rollout in rollouts}) > 1
        assert largest_difference(rollouts, trained_logps(sampler, rollouts)) == 0
        for rollout in rollouts[:2]:  # without others, and without a shared prompt
            assert largest_difference([rollout], trained_logps(sampler, [rollout])) == 0


def test_a_hundred_thousand_log_probs_are_bit_for_bit_those_of_training():
    count, apart = compare_many(make_policy(), 100_000, tokens=98)
    assert count >= 100_000 and apart == 0


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_tokens_and_log_probs_do_not_depend_on_threads(dtype, two_threads):
    sampler = make_sampler(make_policy(dtype=dtype), EOS, max_new_tokens=8)
    rollouts = in_order(sampler.generate(make_prompts(9, 20), 3, 0))
    assert largest_difference(rollouts, trained_logps(sampler, rollouts)) == 0
    torch.set_num_threads(1)
    assert told(sampler.generate(make_prompts(9, 20), 3, 0)) == told(rollouts)


def test_log_probs_under_autocast_are_those_of_training():
    sampler = make_sampler(make_policy(), EOS, max_new_tokens=18)
    sampler.precision = lambda: torch.autocast("cpu", torch.bfloat16)
    rollouts = in_order(sampler.generate(make_prompts(4, 18), 8, 0))
    assert largest_difference(rollouts, trained_logps(sampler, rollouts)) == 0


PACKED = {
    "llama": {},
    "llama in bf16": {"dtype": HALF},
    "mistral": EXACT["mistral"],
    "a tied head": EXACT["a tied head"],
}
PACKED |= {"qwen3": {"kind": "qwen3"}, "qwen2, which has biases": {"kind": "qwen2", "dtype": HALF}}


@pytest.mark.skipif(not product.preferred(), reason="other products are faster on this processor")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_packed_layers_change_no_bit(name, autocast, monkeypatch):
    policy = make_policy(**PACKED[name])
    sampler = make_sampler(policy, EOS, max_new_tokens=18)
    sampler.precision = lambda: torch.autocast("cpu", HALF, enabled=autocast)
    made = told(sampler.generate(make_prompts(4, 18), 8, 0))
    assert isinstance(packed_layers(policy, 1e9), PackedLayers) and packed_layers(policy, 1e4) is None
    monkeypatch.setattr(sampling, "packed_layers", lambda *_: None)
    assert told(sampler.generate(make_prompts(4, 18), 8, 0)) == made


def test_layers_that_are_watched_or_adapted_run_as_modules():
    assert packed_layers(make_policy(adapter=True), 1e9) is None
    policy = make_policy()
    hook = policy.backbone.layers[1].register_forward_hook(lambda *_: None)
    assert packed_layers(policy, 1e9) is None
    hook.remove()


@pytest.mark.parametrize("kind, options", [("gemma2", {}), ("llama", {"attention": "sdpa"})])
def test_an_attention_without_native_kernel_is_not_called_exact(kind, options, caplog):
    sampler = make_sampler(make_policy(kind, **options))
    with caplog.at_level("INFO"):
        settle(sampler)
    said = caplog.records[-1].getMessage()
    assert sampler.exact or ("sampler: not exact: " in said and "first in layers.0.self_attn" in said)
    assert sampler.exact or ("exact with model.attention cpp" in said) == (kind == "llama")
    rollouts = in_order(sampler.generate(make_prompts(9, 33), 2, 3))
    assert largest_difference(rollouts, trained_logps(sampler, rollouts)) < 1e-5


def test_the_probe_says_exact_and_asks_nothing_when_off(caplog):
    for wanted, exact in (("auto", True), ("require", True), ("off", False)):
        sampler = make_sampler(make_policy(), exact=wanted)
        settle(sampler)
        assert sampler.exact is exact
    settle(sampler := make_sampler(make_policy(), top_p=0.9))
    assert not sampler.exact
    with pytest.raises(ValueError, match=r"sampler\.exact: require, but top_k, top_p and min_p draw from fewer tokens"):
        settle(make_sampler(make_policy(), top_p=0.9, exact="require"))


FAULTS = {
    "keys rounded in the store": lambda k, v: (k.bfloat16().to(k.dtype), v),
    "values moved by one unit in the last place": lambda k, v: (k, torch.nextafter(v, v + 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_phase_is_caught_and_its_layer_named(fault, monkeypatch):
    kept = decoding.Prefill.attend

    def attend(self, layer, q, k, v, **options):
        out = kept(self, layer, q, k, v, **options)
        if layer == 1:
            self.forest.write_prompts(layer, self.prompts, *FAULTS[fault](k[: self.num_kept], v[: self.num_kept]))
        return out

    monkeypatch.setattr(decoding.Prefill, "attend", attend)
    assert "first in layers.1.self_attn" in str(probe(make_sampler(make_policy())))
    with pytest.raises(ValueError, match=r"sampler.exact: require, but log-probs of sampling and training differ"):
        settle(make_sampler(make_policy(), exact="require"))


def test_keys_added_up_in_another_order_are_caught(monkeypatch):
    def reversed_order(q, k, v, forest, layer, step, **options):
        return decode(q.flip(-1), k.flip(-1), v, forest, layer, step, **options)

    decode, write = decoding.forest_decode, decoding.Forest.write_prompts
    monkeypatch.setattr(decoding, "forest_decode", reversed_order)
    flipped = lambda self, layer, prompts, k, v: write(self, layer, prompts, k.flip(-1), v)  # noqa: E731
    monkeypatch.setattr(decoding.Forest, "write_prompts", flipped)
    assert "first in layers.0.self_attn" in str(probe(make_sampler(make_policy())))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_sample_does_not_depend_on_what_is_sampled_beside_it(dtype):
    policy, prompts = make_policy(dtype=dtype), make_prompts(3, 30, 1, 70)

    def sample(some, n, **settings):
        return told(make_sampler(policy, EOS, max_new_tokens=12, **settings).generate(some, n, 7))

    whole = sample(prompts, 5)
    assert sample(prompts[::-1], 5, max_rows=3) == whole == sample(prompts, 5, max_rows=17)
    alone = sample(prompts[1:2], 2, max_rows=1)
    assert alone == {key: whole[key] for key in alone} and len(alone) == 2
    assert told(make_sampler(policy, EOS, max_new_tokens=12).generate(prompts, 5, 8)) != whole


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_sample_what_one_process_does(ranks):
    assert forks.run(Path(__file__).with_name("ranks_sampler.py"), ranks=ranks).count("agreed") == ranks


def test_greedy_is_for_sample_0_alone_and_takes_the_most_likely():
    sampler = make_sampler(make_policy(), temperature=0.7)
    plain = told(sampler.generate(make_prompts(5, 12), 3, 1))
    mixed = list(sampler.generate(make_prompts(5, 12), 3, 1, greedy=True))
    assert all(told([r]) == {(r.row, r.sample): plain[r.row, r.sample]} for r in mixed if r.sample)
    cold = told(make_sampler(make_policy(), temperature=0.0).generate(make_prompts(5, 12), 1, 99))
    assert told(r for r in mixed if r.sample == 0) == cold
    first = next(r for r in mixed if r.sample == 0)
    ids = torch.from_numpy(np.concatenate([first.prompt, first.tokens]))[None]
    with stock_attention(make_policy()):
        logits = make_policy().plain_logits(ids, torch.arange(len(first.prompt) - 1, ids.shape[1] - 1))[0]
    assert logits.argmax(-1).tolist() == first.tokens.tolist()


class Letters:
    """Decodes token i as a letter, and as two from 26 on; 0 ends."""

    eos_token_id = 0

    def decode(self, tokens, **options):
        assert options["skip_special_tokens"] is False
        return "".join(chr(97 + t % 26) * (1 + (t >= 26)) for t in tokens)


def test_a_completion_ends_with_eos_a_stop_text_or_its_length():
    policy = make_policy()
    free = list(make_sampler(policy, max_new_tokens=30).generate(make_prompts(4, 9), 8, 0))
    assert {(r.finish, len(r.tokens), r.version) for r in free} == {("length", 30, 0)}
    letters = Letters()
    sampler = make_sampler(policy, stops_of(policy, letters, ["ab", "q"]), max_new_tokens=30)
    sampler.sync(policy, 17)
    ended = told(sampler.generate(make_prompts(4, 9), 8, 0))
    for rollout in free:
        tokens = rollout.tokens.tolist()
        ends = [next((i for i, t in enumerate(tokens) if t == 0), 99)]
        texts = [letters.decode(tokens[: i + 1], skip_special_tokens=False) for i in range(30)]
        ends.append(next((i for i, text in enumerate(texts) if "ab" in text or "q" in text), 99))
        count, why = min(min(ends) + 1, 30), ["eos", "stop"][ends[1] < ends[0]] if min(ends) < 99 else "length"
        assert ended[rollout.row, rollout.sample][::2] == (tokens[:count], why)
    assert {why for *_, why in ended.values()} >= {"stop", "length"}
    assert all(r.version == 17 for r in sampler.generate(make_prompts(4), 1, 0))


def test_a_completion_of_one_token_and_one_that_fills_the_model():
    policy = make_policy()
    one = list(make_sampler(policy, max_new_tokens=1).generate(make_prompts(4), 3, 0))
    assert [len(rollout.tokens) for rollout in one] == [1, 1, 1] and {r.finish for r in one} == {"length"}
    narrow = make_policy("mistral", sliding_window=20)
    (full,) = make_sampler(narrow, max_new_tokens=30).generate(make_prompts(15), 1, 0)
    assert len(full.tokens) == 5 and full.finish == "length"
    assert probe(make_sampler(narrow)) is None


def test_truncated_sampling_keeps_its_mass():
    sampler = make_sampler(make_policy(), top_k=5)
    for rollout in sampler.generate(make_prompts(6), 2, 0):
        assert rollout.kept_mass is not None and ((rollout.kept_mass > 0) & (rollout.kept_mass < 1)).all()
        whole = rollout.sampler_logps + np.log(rollout.kept_mass)
        expected = trained_logps(make_sampler(make_policy()), [rollout]).detach().numpy()
        np.testing.assert_allclose(whole, expected, atol=1e-5)


def test_nothing_is_left_behind_in_the_policy():
    policy = make_policy().train()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for _ in make_sampler(policy).generate(make_prompts(4), 2, 0):
        assert torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads and policy.training
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_no_prompts_and_no_samples_are_no_work():
    sampler = make_sampler(make_policy())
    assert not list(sampler.generate([], 2, 0)) and not list(sampler.generate(make_prompts(3), 0, 0))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": -1.0}, r"sampler.temperature: expected a number of 0 or more, got -1.0"),
        ({"top_p": 0.0}, r"sampler.top_p: expected a number from 0 to 1, got 0.0"),
        ({"max_new_tokens": 0}, r"sampler.max_new_tokens: expected a number of 1 or more, got 0"),
        ({"max_rows": 0}, r"sampler.max_rows: expected a number of 1 or more, got 0"),
    ],
)
def test_settings_that_sample_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make_sampler(make_policy(), **settings)


def test_prompts_that_cannot_be_continued_are_refused():
    sampler = make_sampler(make_policy("mistral", sliding_window=20))
    with pytest.raises(ValueError, match="prompt 3 is empty"):
        list(sampler.generate([Prompt(np.zeros(0, dtype=np.int64), 3)], 1, 0))
    with pytest.raises(ValueError, match=r"prompt 10 has 20 tokens, which leaves none of 20 \(the model's sliding"):
        list(sampler.generate(make_prompts(20), 1, 0))
    with pytest.raises(ValueError, match=r"sampler\.stop holds an empty text"):
        stops_of(make_policy(), Letters(), ["x", ""])
