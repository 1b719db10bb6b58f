"""One conformance test for every sampler: greedy tokens, log-probs, ends, versions."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from sampling import in_order, make_policy, make_prompts
from sampling import make_sampler as make_native
from test_sampler import Letters

from fastalign.config import SamplerConfig
from fastalign.rl.backends import ServerSampler, make_sampler
from fastalign.rl.exact import trained_logps
from fastalign.rl.sampler import Stops
from fastalign.types import Prompt

BACKENDS = ("native", "transformers", "vllm")
ENDS = {0, 2}
"""The tokenizer's EOS, and the one in a Llama's generation config."""


def decode(tokens):
    return Letters().decode(tokens, skip_special_tokens=False)


class Server(BaseHTTPRequestHandler):
    """Speaks as vLLM does of `make_policy()`, with token ids."""

    one_at_a_time = threading.Lock()
    seen: ClassVar[list] = []

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "a-model", "object": "model"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(asked)
        if asked["model"] != "a-model":
            self.answer({"error": {"message": f"The model `{asked['model']}` does not exist."}}, 404)
            return
        stops = Stops(frozenset(asked["stop_token_ids"]), tuple(asked["stop"]), decode)
        native = make_native(make_policy(), stops, temperature=asked["temperature"], max_new_tokens=asked["max_tokens"])
        with self.one_at_a_time:
            (made,) = native.generate([Prompt(np.array(asked["prompt"]), asked["seed"])], 1, 0)
        choice = {"index": 0, "finish_reason": "length" if made.finish == "length" else "stop", "text": ""}
        if asked["return_token_ids"]:
            choice["token_ids"] = made.tokens.tolist()
        self.answer({"choices": [{**choice, "logprobs": {"token_logprobs": made.sampler_logps.tolist()}}]})

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


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


def test_the_policy_trains_on_after_another_sampler(sampler):
    policy = make_policy().train()
    before = policy.model.config._attn_implementation
    found = sampler("transformers")
    found.sync(policy, 4)
    assert [rollout.version for rollout in found.generate(make_prompts(5), 2, 0)] == [4, 4]
    assert policy.model.config._attn_implementation == before and policy.training


def test_a_server_is_told_which_tokens_and_seeds(sampler, caplog):
    Server.seen.clear()
    found = sampler("vllm", top_k=7)
    assert len(list(found.generate(make_prompts(5), 3, 0))) == 3
    assert len({asked["seed"] for asked in Server.seen}) == 3 and Server.seen[0]["top_k"] == 7
    assert Server.seen[0]["prompt"] == make_prompts(5)[0].ids.tolist()
    found.sync(make_policy(), 2)
    found.sync(make_policy(), 3)
    assert [r.getMessage() for r in caplog.records].count(
        "sampler.backend vllm: the server keeps its weights, of version 0"
    ) == 1


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
