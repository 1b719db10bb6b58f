"""One conformance test for every sampler: greedy tokens, log-probs, ends, versions."""

import json
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from letters import configure
from safetensors.torch import load_file
from sampling import in_order, make_policy, make_prompts
from sampling import make_sampler as make_native
from servers import JsonHandler, serving
from test_sampler import Letters
from transformers import AutoModelForCausalLM

from fastalign.config import SamplerConfig
from fastalign.engine.output.metrics import read_metrics
from fastalign.engine.train import train
from fastalign.models.policy import Policy
from fastalign.rl.backends import ServerSampler, make_sampler
from fastalign.rl.exact import trained_logps
from fastalign.rl.sampler import Stops
from fastalign.types import Prompt

BACKENDS = ("native", "transformers", "vllm")
ENDS = {0, 2}
"""The tokenizer's EOS, and the one in a Llama's generation config."""


def decode(tokens):
    return Letters().decode(tokens, skip_special_tokens=False)


class Server(JsonHandler):
    """Speaks as vLLM does of `make_policy()`, or of the weights that it has read since, with token ids."""

    one_at_a_time = threading.Lock()
    seen: ClassVar[list] = []
    policy: ClassVar[Policy] = make_policy()
    develops = True
    """Whether it is in the mode that takes new weights."""

    def do_GET(self):
        if self.path == "/collective_rpc":
            self.answer({"detail": "Method Not Allowed" if self.develops else "Not Found"}, 405 - (not self.develops))
            return
        self.answer({"object": "list", "data": [{"id": "a-model", "object": "model"}]})

    def do_POST(self):
        asked = self.asked()
        self.seen.append(asked)
        if not self.path.startswith("/v1/"):
            self.control(asked)
            return
        if asked["model"] != "a-model":
            self.answer({"error": {"message": f"The model `{asked['model']}` does not exist."}}, 404)
            return
        stops = Stops(frozenset(asked["stop_token_ids"]), tuple(asked["stop"]), decode)
        native = make_native(self.policy, stops, temperature=asked["temperature"], max_new_tokens=asked["max_tokens"])
        with self.one_at_a_time:
            (made,) = native.generate([Prompt(np.array(asked["prompt"]), asked["seed"])], 1, 0)
        choice = {"index": 0, "finish_reason": "length" if made.finish == "length" else "stop", "text": ""}
        if asked["return_token_ids"]:
            choice["token_ids"] = made.tokens.tolist()
        self.answer({"choices": [{**choice, "logprobs": {"token_logprobs": made.sampler_logps.tolist()}}]})

    def control(self, asked):
        if self.path != "/collective_rpc":
            self.answer(None)
            return
        try:
            assert asked["method"] == "reload_weights"
            model = AutoModelForCausalLM.from_pretrained(asked["kwargs"]["weights_path"])
            type(self).policy = Policy(model)
            self.answer({"results": [None]})
        except Exception as error:
            self.answer({"error": str(error)}, 500)


@pytest.fixture(scope="module")
def url():
    with serving(Server) as url:
        yield url


@pytest.fixture
def sampler(request, url):
    def make(backend, **settings):
        config = SamplerConfig(backend=backend, url=url, exact="off", **{"max_new_tokens": 12, **settings})
        return make_sampler(None if backend == "vllm" else make_policy(), config, Letters())

    return make


def expected_logps(rollouts, temperature=1.0):
    return trained_logps(make_native(make_policy(), temperature=temperature), in_order(rollouts)).detach().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sampler_conforms(backend, sampler):
    prompts = make_prompts(3, 21)
    for settings in ({"temperature": 0.8}, {"stop": ["ab", "q"]}, {"max_new_tokens": 1}):
        rollouts = in_order(sampler(backend, **settings).generate(prompts, 3, 5, greedy=True))
        assert [(r.row, r.sample) for r in rollouts] == [(row, i) for row in (10, 11) for i in range(3)]
        assert all(r.version == 0 and r.scored is None and r.sampler_logps.dtype == np.float32 for r in rollouts)
        for rollout in rollouts:
            tokens = rollout.tokens.tolist()
            text = decode(tokens)
            stopped = any(stop in text for stop in settings.get("stop", []))
            ended = "eos" if tokens[-1] in ENDS else "stop" if stopped else "length"
            assert rollout.finish == ended and not ENDS & {*tokens[:-1]}
            assert (len(tokens) == settings.get("max_new_tokens", 12)) or ended != "length"
        native = in_order(sampler("native", **settings).generate(prompts, 1, 0, greedy=True))
        assert [r.tokens.tolist() for r in rollouts if r.sample == 0] == [r.tokens.tolist() for r in native]
        for some, temperature in (
            (rollouts[::3], 1.0),
            (rollouts[1:3] + rollouts[4:], settings.get("temperature", 1.0)),
        ):
            found = np.concatenate([rollout.sampler_logps for rollout in in_order(some)])
            np.testing.assert_allclose(found, expected_logps(some, temperature), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_samples_in_the_precision_of_training(dtype):
    config = SamplerConfig(backend="transformers", max_new_tokens=12)
    precision = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    policy = make_policy(dtype=dtype)
    found = make_sampler(policy, config, Letters(), precision=precision)
    rollouts = in_order(found.generate(make_prompts(3, 21), 3, 5))
    native = make_native(policy)
    native.precision = precision
    sampled = torch.from_numpy(np.concatenate([rollout.sampler_logps for rollout in rollouts]))
    under, plain = trained_logps(native, rollouts), expected_logps(rollouts)
    assert (sampled - under).abs().mean() < 0.01 < (sampled - plain).abs().max()


def test_the_policy_trains_on_after_another_sampler(sampler):
    policy = make_policy().train()
    before = policy.model.config._attn_implementation
    found = sampler("transformers")
    found.sync(policy, 4)
    assert [rollout.version for rollout in found.generate(make_prompts(5), 2, 0)] == [4, 4]
    assert policy.model.config._attn_implementation == before and policy.training


def test_a_server_is_told_which_tokens_and_seeds(sampler):
    Server.seen.clear()
    found = sampler("vllm", top_k=7)
    assert len(list(found.generate(make_prompts(5), 3, 0))) == 3
    assert len({asked["seed"] for asked in Server.seen}) == 3 and Server.seen[0]["top_k"] == 7
    assert Server.seen[0]["prompt"] == make_prompts(5)[0].ids.tolist()


def configured(folder, url):
    config = configure(folder, steps=3, num_generations=4, num_iterations=2)
    config.sampler.backend, config.sampler.url, config.optim.lr = "vllm", url, 0.03
    return config


@pytest.fixture
def own_weights():
    yield
    Server.policy, Server.develops = make_policy(), True


@pytest.mark.parametrize("autocast, apart", [(False, 1e-5), (True, 0.1)])
def test_a_server_samples_from_the_weights_that_train(tmp_path, url, own_weights, autocast, apart):
    config = configured(tmp_path, url)
    config.model.autocast = autocast
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {(line["step"], line["weight_version"]) for line in lines} == {(1, 0), (2, 1), (3, 2)}
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert record["sampling/sampling_logp_difference/max"] < apart
    (last,) = (tmp_path / "run" / "weights").iterdir()
    written = load_file(last / "model.safetensors")
    assert {x.dtype for x in written.values()} == {torch.bfloat16 if autocast else torch.float32}


def test_a_server_with_stale_weights_does_not_pass_silently(tmp_path, url, own_weights, monkeypatch):
    config = configured(tmp_path, url)
    monkeypatch.setattr(Server, "control", lambda self, asked: self.answer({"error": "CUDA out of memory"}, 500))
    with pytest.raises(
        ValueError, match=r"did not take the weights in .*/run/weights/step-0-\d+: .* answers 500: .*CUDA out of"
    ):
        train(config)
    Server.develops = False
    with pytest.raises(ValueError, match=r"no /collective_rpc: start it by VLLM_SERVER_DEV_MODE=1 vllm serve MODEL"):
        train(config)
    config.model.lora = {"r": 4}
    with pytest.raises(ValueError, match=r"sampler.backend vllm .* model.lora"):
        train(config)


def test_servers_that_do_not_serve_are_refused_in_one_line(sampler, url, monkeypatch):
    with pytest.raises(ValueError, match=r"sampler.url is not set"):
        ServerSampler(SamplerConfig(backend="vllm"), Stops())
    with pytest.raises(ValueError, match=r"sampler.url: http://127.0.0.1:9/v1/models does not answer"):
        ServerSampler(SamplerConfig(backend="vllm", url="http://127.0.0.1:9/v1"), Stops())
    found = sampler("vllm")
    found.model = "another"
    with pytest.raises(ValueError, match=r"/v1/completions answers 404: .*The model `another` does not exist"):
        list(found.generate(make_prompts(4), 1, 0))
    with pytest.raises(ValueError, match=r"only sampler\.backend native can be, got vllm"):
        make_sampler(None, SamplerConfig(backend="vllm", url=url, exact="require"), Letters())
    kept = Server.answer
    monkeypatch.setattr(
        Server, "answer", lambda self, x: kept(self, json.loads(json.dumps(x).replace("token_ids", "ids")))
    )
    with pytest.raises(ValueError, match=r"gives no token_ids with log-probs"):
        list(sampler("vllm").generate(make_prompts(4), 1, 0))
