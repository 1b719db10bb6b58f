"""Prefixes are shared by policy and reference alike, or by neither: both read the same batches."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from steps import ALONE

from fastalign.config import ModelConfig
from fastalign.data.pack import group_tokens
from fastalign.engine import evaluate as evaluation
from fastalign.engine import loading
from fastalign.engine.loading import Start
from fastalign.engine.methods import make_objective
from fastalign.engine.reference import frozen
from fastalign.engine.reference.cache import Demand
from fastalign.engine.reference.precompute import precompute
from fastalign.engine.setup import load_data, load_models
from fastalign.engine.train import pack_share, train
from fastalign.models import policy as policy_module
from fastalign.models.load import load_policy, save_pretrained
from fastalign.ops import attention
from fastalign.parallel.mesh import Axis, World
from fastalign.types import Segments

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
FALLBACK = {"model.on_mismatch": "fallback", "batch.size": 4, "batch.tokens": 400, "run.steps": 1}


@pytest.fixture
def faulty(monkeypatch):
    """``faulty("the reference")``: models that read packed rows exactly only where no prefix is shared.

    Returns the list of models and depths that were verified.
    """

    def make(*names):
        real, verify, seen = attention.layout, loading.verify_packed, []

        def with_the_fault(policy, batch, on_mismatch="raise", name="the model", **options):
            seen.append((name, batch.depth))
            lost = (lambda s: real(Segments(s.offsets, [-1] * len(s)))) if name in names else real
            monkeypatch.setattr(policy_module, "layout", lost)
            return verify(policy, batch, on_mismatch, name, **options)

        monkeypatch.setattr(loading, "verify_packed", with_the_fault)
        return seen

    return make


@pytest.fixture
def run(configure, monkeypatch, tmp_path):
    """The job that a configuration makes, before its first step."""

    def make(method, other=False, **settings):
        config = configure(method, **FALLBACK, **settings)
        if other:
            section = ModelConfig(config=GPT2)
            tokenizer = load_data(config)[0]
            save_pretrained(load_policy(section, tokenizer=tokenizer), tokenizer, tmp_path / "other")
            config.reference.path = str(tmp_path / "other")
        jobs = []
        with monkeypatch.context() as patch:
            patch.setattr("fastalign.engine.train.run", lambda job, *rest: jobs.append(job))
            train(config)
        return jobs[0]

    return make


POLICY, REFERENCE = "the model", "the reference"
KTO = {"data.format": "preference", "reference.cache": "off"}
CASES = {
    "the policy": ("dpo", True, {}, [POLICY]),
    "the reference": ("dpo", True, {}, [REFERENCE]),
    "the reference, kept log-probs": ("dpo", True, {"reference.cache": "logps"}, [REFERENCE]),
    "both": ("dpo", True, {}, [POLICY, REFERENCE]),
    "the policy, its own reference": ("dpo", False, {}, [POLICY]),
    "an adapter, without it the reference": ("dpo", False, {"model.lora": {"r": 2}}, [POLICY]),
    "whole distributions": ("dpo", True, {"loss.name": "tdpo2"}, [REFERENCE]),
    "mismatched completions": ("kto", False, KTO, [POLICY]),
    "mismatched completions of another": ("kto", True, KTO, [REFERENCE]),
    "no reference": ("rrhf", False, {"data.format": "preference"}, [POLICY]),
    "a scalar head": ("reward", False, {"data.format": "preference"}, [POLICY]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_one_model_cannot_share_is_shared_by_none(case, run, faulty, tmp_path):
    method, other, settings, names = CASES[case]
    if "model.lora" in settings:
        pytest.importorskip("peft")
    if "logps" in settings.values():
        settings = {"reference.cache": str(tmp_path / "logps")}
    seen = faulty(*names)
    job = run(method, other, **settings)
    assert job.batch.share_prefix is False  # which evaluations read, and the cache of log-probs
    assert job.config.batch.share_prefix  # what was asked for is what the run's files say
    batches = [batch for part in pack_share(job, job.source.next()) for batch in part]
    assert {each.depth for batch in batches for each in (batch, batch.companion) if each} == {1}
    for name in [POLICY, REFERENCE][: 1 + other]:
        assert [depth for who, depth in seen if who == name][-1] == 1, f"{name} was not verified as it runs"


def test_what_all_can_share_is_shared(run, faulty):
    faulty()
    job = run("dpo", True)
    assert (
        job.batch.share_prefix and max(batch.depth for part in pack_share(job, job.source.next()) for batch in part) > 1
    )


@pytest.mark.parametrize("command", ["evaluate", "precompute"])
def test_the_other_commands_do_likewise(configure, faulty, monkeypatch, tmp_path, command):
    faulty(POLICY)
    config = configure("dpo", **FALLBACK, **{"reference.cache": str(tmp_path / "logps")})
    taken = []
    if command == "evaluate":
        monkeypatch.setattr(evaluation, "evaluate", lambda *given: taken.append(given[3]))
        evaluation.evaluate_model(config)
    else:
        fill = frozen.fill
        monkeypatch.setattr(frozen, "fill", lambda *given: taken.append(given[2]) or fill(*given))
        precompute(config)
    assert [batch.share_prefix for batch in taken] == [False]


def verdict(config, ranks=ALONE):
    tokenizer, dataset, _ = load_data(config)
    config = replace(config, batch=replace(config.batch, tokens=400))
    demands = [Demand(dataset, range(len(dataset)), len(dataset))]
    start = Start(config, make_objective(config.method, config.loss), tokenizer, demands, ranks)
    return load_models(start).batch.share_prefix


def test_what_one_rank_cannot_share_is_shared_by_none(configure):
    answers = [True, False, True, True]  # the other rank's: finite, other numbers; finite, equal without sharing

    class OfTwo(World):
        def gather_objects(self, value):
            return [value, answers.pop(0) if value is True else value]

    config = configure("dpo", **FALLBACK)
    assert verdict(config)
    assert not verdict(config, OfTwo(Axis(0, 2), ALONE.device)) and not answers


def test_a_limit_of_tokens_is_held_without_sharing_before_the_first_step(configure, faulty):
    config = configure("dpo", **FALLBACK)
    dataset = load_data(config)[1]
    config.batch.max_group_tokens = max(group_tokens(example, True) for example in dataset)
    verdict(config)  # every pair fits while its prompt is shared
    faulty(POLICY)
    with pytest.raises(
        ValueError, match=r"^the examples: example \d+ takes \d+ computed tokens, more than batch.max_group_tokens"
    ):
        verdict(config)


def test_nothing_is_said_to_go_on_without_sharing_where_nothing_was_shared(configure, monkeypatch, caplog):
    """The fault is not one of sharing: sequences read their neighbours."""
    real = attention.layout
    monkeypatch.setattr(policy_module, "layout", lambda s: real(Segments([0, s.offsets[-1]], [-1])))
    config = configure("dpo", **FALLBACK, **{"batch.share_prefix": False})
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="is not computed exactly on packed rows"):
        train(config)
    assert "going on" not in caplog.text and not list(Path(config.run.output_dir).glob("*.*"))
