"""Run as ranks of a mesh with a tensor axis: steps have the metrics and gradients of one process.

All models compute norms in fp32 inside, so everything is fp32: gradients agree to 1e-5 of the largest.
"""

import copy
import re
import sys
import tempfile
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path += [str(Path(__file__).parents[1] / name) for name in ("engine", "rl")]

import onpolicy
import sampling
import steps
from sampling import in_order

from fastalign.config import ModelConfig, ParallelConfig, SamplerConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import share
from fastalign.engine.forward import Models
from fastalign.models.load import as_policy, load_policy
from fastalign.models.lora import base_digest
from fastalign.models.policy import Policy
from fastalign.models.verify import stock_attention, verify_packed
from fastalign.parallel.clip import clip_gradients
from fastalign.parallel.mesh import World, make_mesh, world
from fastalign.parallel.shard import base_digest as sharded_digest
from fastalign.parallel.shard import gathered, region, shard
from fastalign.parallel.tensor import split_layers
from fastalign.rl.algorithms import ALGORITHMS
from fastalign.rl.backends import make_sampler
from fastalign.rl.exact import probe
from fastalign.rl.sampler import Stops
from fastalign.types import ForwardCost

COST = ForwardCost(per_token=30.0, per_attended=1.0, per_scored=20.0)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": steps.VOCAB,  # 37: 19 and 18, or three of 10 and 7
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_labels": 1,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 4, "sliding_window": 64},
    "gemma3_text": {"query_pre_attn_scalar": 4, "sliding_window": 64},
}
LOSSES = {
    "sft": ("sft",),
    "dpo": ("dpo", "aot", "tdpo2", "orpo"),
    "kto": ("kto", "bco"),
    "reward": ("reward", "process"),
    "rrhf": ("rrhf",),
    "distill": ("gkd",),
}
"""Losses that read the heads in different ways, and each column that is filled over all ranks."""


def make_policy(
    kind: str = "llama",
    *,
    scalar: bool = False,
    seed: int = 0,
    value_head: bool = False,
    gradient_checkpointing: bool | str = False,
    **sizes: int,
) -> Policy:
    """A model whose norms and biases are not those that they start with."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind], **sizes})
    model = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    section = ModelConfig(gradient_checkpointing=gradient_checkpointing)
    return as_policy(model, model, section, value_head=value_head)


def spread(policy: Policy, ranks: World, *, sequence: bool = False, **options: bool) -> Policy:
    return shard(split_layers(copy.deepcopy(policy), ranks, sequence=sequence), ranks, **options)


def check(
    alone: Models,
    together: Models,
    ranks: World,
    method: str,
    loss: str,
    what: str,
    examples: list[TokenExample] | None = None,
) -> None:
    """One step, of all examples of a loss where none are given."""
    examples = examples or steps.make_examples(method, loss)
    want = steps.run_step(alone, steps.packed(examples, 10**6, False), method, loss)
    mine = share(examples, 50, True, ranks.data.rank, ranks.data.size, COST)
    got = steps.run_step(together, mine, method, loss, ranks)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")
    largest = max(g.abs().max() for g in want[1])
    assert largest > 1e-4, "gradients vanish: nothing is compared"
    assert len(got[1]) == len(want[1])
    error = max((a - b).abs().max() for a, b in zip(got[1], want[1], strict=True))
    assert error <= 1e-5 * largest, f"{what}: gradients differ by {error} where the largest is {largest}"
    norms = [clip_gradients(m.policy.parameters(), 0.1 * largest.item()) for m in (alone, together)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    print("agreed on", what, file=sys.stderr)


def methods(ranks: World, name: str, which: tuple[str, ...] = (*LOSSES,)) -> None:
    """Every method on a tensor axis alone; where there is data parallelism as well each with one loss."""
    for method in which:
        scalar = steps.METHODS[method].scalar_head
        policy, reference = make_policy(scalar=scalar), make_policy(scalar=scalar, seed=1).requires_grad_(False)
        alone = Models(policy, reference, False)
        together = Models(spread(policy, ranks), spread(reference, ranks), False)
        losses = LOSSES[method] if ranks.data.size == 1 else LOSSES[method][:1]
        for loss in losses:
            check(alone, together, ranks, method, loss, f"{method} {loss} on {name}")
        for words, examples in few(method, losses[0]).items():
            check(alone, together, ranks, method, losses[0], f"{method} {losses[0]} on {name}, {words}", examples)


def few(method: str, loss: str) -> dict[str, list[TokenExample]]:
    """Examples that leave data ranks without work: with an empty micro-batch, or with one that has no scored token."""
    first, second = steps.make_examples(method, loss, 2)
    found = {"an idle rank": [first]}
    if method == "sft":
        silent = tuple((ids, np.zeros_like(scored)) for ids, scored in second.sequences)
        found["nothing scored on a rank"] = [first, replace(second, sequences=silent)]
    return found


def families(ranks: World, name: str) -> None:
    """Every family, also with activations that are recomputed; where there is data parallelism as well one of them."""
    for kind in FAMILIES if ranks.data.size == 1 else ("llama",):
        for recompute in (False, True, "mlp") if kind == "llama" else (False,):
            policy = make_policy(kind, gradient_checkpointing=recompute).train()
            sharded = spread(policy, ranks)
            check_parts(policy, sharded)
            what = f"{kind}, recomputed: {recompute}, on {name}"
            check(Models(policy, None, False), Models(sharded, None, False), ranks, "sft", "sft", what)


def tokens_in_part(ranks: World, name: str) -> None:
    """Norms and the residual stream of some of the tokens, whose number the ranks need not divide."""
    odd, even = (steps.make_examples("sft", "sft", n) for n in (7, 1))
    for kind, recompute in (("llama", False), ("llama", True), ("qwen3", "mlp"), ("gemma2", True)):
        policy = make_policy(kind, gradient_checkpointing=recompute).train()
        models = Models(policy, None, False), Models(spread(policy, ranks, sequence=True), None, False)
        for examples in (odd, even):
            what = f"{kind} in parts of its tokens, recomputed: {recompute}, on {name}"
            check(*models, ranks, "sft", "sft", what, examples)
        batch = steps.packed(odd, 10**6, True)[0]
        assert verify_packed(models[1].policy, batch, together=lambda mine: all(ranks.gather_objects(mine)))


def check_parts(policy: Policy, sharded: Policy) -> None:
    """Each rank has the part of each weight that it is said to have, and the parts make up the whole."""
    theirs = dict(sharded.named_parameters())
    assert {*theirs} == {name for name, _ in policy.named_parameters()}
    for name, x in policy.named_parameters():
        mine = theirs[name].detach()
        assert isinstance(mine, DTensor) and mine.shape == x.shape, name
        assert torch.equal(mine.to_local(), x.detach()[region(mine)]), name
        assert torch.equal(mine.full_tensor(), x.detach()), name


def adapters(ranks: World, name: str) -> None:
    """Adapters on every layer and on the head, a bias of their own, and a whole embedding beside them."""
    lora = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    for extra in (
        {"target_modules": "all-linear"},
        {"modules_to_save": ["embed_tokens"], "lora_bias": True},
        {"target_modules": ["k_proj", "lm_head"]},
    ):
        sizes = {"model_type": "llama", **SIZES, **FAMILIES["llama"]}
        del sizes["num_labels"]
        section = ModelConfig(config=sizes, lora={**lora, **extra})
        policy, other = (load_policy(section, vocab_size=steps.VOCAB).train() for _ in range(2))
        sharded = shard(split_layers(other, ranks), ranks)
        assert base_digest(policy.named_parameters()) == sharded_digest(sharded, ranks)
        what = f"an adapter {extra} on {name}"
        check(Models(policy, None, False), Models(sharded, None, False), ranks, "sft", "sft", what)


def half(ranks: World, name: str) -> None:
    """bf16 products: losses agree to their rounding, gradients stay fp32."""
    policy = make_policy("qwen3").train()
    sharded = spread(policy, ranks, bf16=True)
    examples = steps.make_examples("sft", "sft")
    with torch.autocast("cpu", torch.bfloat16):
        want = steps.run_step(Models(policy, None, True), steps.packed(examples, 10**6, False), "sft", "sft")
        mine = share(examples, 50, True, ranks.data.rank, ranks.data.size, COST)
        got = steps.run_step(Models(sharded, None, True), mine, "sft", "sft", ranks)
    torch.testing.assert_close(got[0], want[0], rtol=0.02, atol=0.02)
    norm = torch.stack([g.norm() for g in want[1]]).norm()
    apart = torch.stack([(a - b).norm() for a, b in zip(got[1], want[1], strict=True)]).norm()
    assert apart < 0.03 * norm and {g.dtype for g in got[1]} == {torch.float32}
    print("agreed on bf16 on", name, file=sys.stderr)


def whole(ranks: World, name: str) -> None:
    """For a while every rank computes alone with whole layers; then it has its part again."""
    policy = make_policy("qwen3")
    sharded = spread(policy, ranks)
    models = Models(policy, None, False), Models(sharded, None, False)
    check(*models, ranks, "sft", "sft", f"split layers on {name}")
    tokens = torch.arange(12)[None] + ranks.rank
    with torch.no_grad(), stock_attention(policy), stock_attention(sharded):
        expected = policy.plain_logits(tokens, torch.arange(12))
        with gathered(sharded):
            for _ in range(ranks.rank):  # no two ranks compute equally often
                assert torch.equal(sharded.plain_logits(tokens, torch.arange(12)), expected)
    check_parts(policy, sharded)
    check(*models, ranks, "sft", "sft", f"whole layers on {name}")


def algorithms(ranks: World, name: str, which: tuple[str, ...] = (*ALGORITHMS,)) -> None:
    """An update: metrics, and how the weights move. Of every algorithm on a tensor axis alone; where there is data
    parallelism as well of one of each kind, by a single group of completions too."""
    which = which if ranks.data.size == 1 else tuple(one for one in which if one in ("ppo", "grpo", "online_dpo"))
    for algorithm, critic in (*((one, "shared" if one == "ppo" else "none") for one in which), ("ppo", "separate")):
        settings = {"preset": "strong", "num_minibatches": 1} if critic == "separate" else {}
        settings |= {"num_iterations": 1} if algorithm == "ppo" else {}
        idle = [[onpolicy.make_group(7, (3, 1, 8))]] if ranks.data.size > 1 else []
        for groups in (onpolicy.make_groups(), *idle):
            update = partial(updated, algorithm, critic, groups, settings=settings)
            want, alone = onpolicy.of_one_process(lambda update=update: update(place=onpolicy.ALONE))
            got, together = update(place=ranks)
            for key in ("loss", "grad_norm", "entropy", "num_tokens"):
                assert abs(got.get(key, 0) - want.get(key, 0)) <= 1e-5 * max(1, abs(want.get(key, 0))), (algorithm, key)
            largest = max(x.abs().max() for x in alone)
            error = max((a - b).abs().max() for a, b in zip(alone, together, strict=True))
            assert error <= 1e-5 * largest, f"{algorithm} {critic}: {error} apart where the largest is {largest}"
        print("agreed on", algorithm, critic, "on", name, file=sys.stderr)


def updated(algorithm: str, critic: str, groups: list, place: World, settings: dict) -> tuple[dict, list[torch.Tensor]]:
    """The metrics of a step, and by how much each weight moves."""
    models = make_models(critic)
    models = models if place.mesh is None else spread_all(models, place)
    folder = Path(tempfile.mkdtemp())
    job = onpolicy.make_job(algorithm, models, groups, folder, world=place, batch_tokens=60, **settings)
    trained = [p for one in job.trained.values() for p in one.module.parameters()]
    before = [whole_of(p) for p in trained]
    metrics = onpolicy.run(job)
    return metrics, [whole_of(p) - was for p, was in zip(trained, before, strict=True)]


def make_models(critic: str) -> Models:
    policy, reference = (make_policy(seed=n, value_head=n == 0 and critic == "shared") for n in range(2))
    other = make_policy(scalar=True) if critic == "separate" else None
    return Models(policy, reference.requires_grad_(False), autocast=False, critic=other)


def spread_all(models: Models, ranks: World) -> Models:
    made = {role: getattr(models, role) for role in ("policy", "reference", "critic")}
    return replace(models, **{role: one and spread(one, ranks) for role, one in made.items()})


def whole_of(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def sampled(ranks: World, name: str) -> None:
    """What is sampled has the bits of one process, on ranks with unequal work; the probe tells what training has."""
    alone = copy.deepcopy(sampling.make_policy())
    stops = Stops(frozenset(range(40)))
    prompts = sampling.make_prompts(3, 20, 7)
    expected = sampling.told(sampling.make_sampler(alone, stops).generate(prompts, 2, 5))
    sampler = sampling.make_sampler(spread(alone, ranks), stops)
    found = re.fullmatch(
        r"log-probs of sampling and training differ by up to (\S+), as .* over 2 ranks.*", probe(sampler)
    )
    assert float(found[1]) < 1e-4
    for _ in range(2):
        mine = prompts[ranks.rank :: ranks.size]
        got = sampling.told(sampler.generate(mine, 2, 5))
        assert got == {key: expected[key] for key in got} and len(got) == 2 * len(mine)
    lent = make_sampler(sampler.policy, sampler.settings, None, lent=copy.deepcopy(alone).requires_grad_(False))
    lent.sampler.stops = stops
    with torch.no_grad():
        for weight in (*alone.parameters(), *sampler.policy.parameters()):
            weight.mul_(1.5)
    lent.sync(sampler.policy, 1)  # from shards of parts to a whole model on every rank
    expected, got = (sampling.told(each.generate(mine, 2, 5)) for each in (sampling.make_sampler(alone, stops), lent))
    assert got == expected and not lent.exact
    print("agreed on samples on", name, file=sys.stderr)


def sampled_together(ranks: World, name: str) -> None:
    """Copies that are split over two ranks each, of a policy in its own layout and of one that FSDP alone shards."""
    whole, stops, prompts = sampling.make_policy(), Stops(frozenset(range(40))), sampling.make_prompts(3, 20, 7)
    for place in (ranks, laid_out(ranks, (1, ranks.size, 1))):
        alone, layout = copy.deepcopy(whole), place.split(2, 5.0)
        sharded, lent = spread(alone, place), split_layers(copy.deepcopy(alone), layout).requires_grad_(False)
        lent = make_sampler(sharded, SamplerConfig(max_new_tokens=10), None, lent=lent)
        lent.sampler.stops = stops
        with torch.no_grad():
            for weight in (*alone.parameters(), *sharded.parameters()):
                weight.mul_(1.5)
        lent.sync(sharded, 1)
        for greedy in (False, True):
            mine = prompts[layout.data.rank :: layout.data.size]
            expected = in_order(sampling.make_sampler(alone, stops).generate(mine, 2, 5, greedy=greedy))
            got = in_order(lent.generate(mine, 2, 5, greedy=greedy))
            assert [each.tokens.tolist() for each in got] == [each.tokens.tolist() for each in expected]
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a.sampler_logps, b.sampler_logps, rtol=0, atol=1e-4)
    print("agreed on samples of split copies on", name, file=sys.stderr)


def laid_out(ranks: World, shape: tuple[int, int, int]) -> World:
    """The same ranks in another mesh."""
    mesh, data, tensor = make_mesh(ranks.device, shape, 5.0)
    return replace(ranks, mesh=mesh, data=data, tensor=tensor)


def collectives(ranks: World, name: str) -> None:
    """Four sums of hidden states per layer, one of the embedding, and one of the head's gradient."""
    counts, original = [], dist.all_reduce

    def counted(x: torch.Tensor, *args: object, group: object = None, **options: object) -> object:
        counts.append(group is ranks.tensor.group)
        return original(x, *args, group=group, **options)

    for layers in (1, 3):
        sharded = spread(make_policy(num_hidden_layers=layers), ranks)
        mine = share(steps.make_examples("sft", "sft"), 10**6, True, ranks.data.rank, ranks.data.size, COST)
        assert len(mine) == 1
        counts.clear()
        dist.all_reduce = counted
        steps.run_step(Models(sharded, None, False), mine, "sft", "sft", ranks)
        dist.all_reduce = original
        assert sum(counts) == 4 * layers + 2, (layers, sum(counts))


def refusals(ranks: World, name: str) -> None:
    """In one line, before anything is split."""
    lora = {"r": 2, "target_modules": ["q_proj"]}
    sizes = {"model_type": "llama", **{key: x for key, x in SIZES.items() if key != "num_labels"}}
    for extra, words in (
        ({"use_dora": True}, r"layers\.0\.self_attn\.q_proj has lora_magnitude_vector"),
        ({"target_modules": ["embed_tokens"]}, "the embedding has lora_embedding_A"),
    ):
        policy = load_policy(ModelConfig(config=sizes, lora={**lora, **extra}), vocab_size=steps.VOCAB)
        with pytest.raises(ValueError, match=rf"^parallel\.tp: the adapter of {words}, which cannot be split"):
            split_layers(policy, ranks)


CASES = [methods, families, tokens_in_part, half, whole, algorithms, sampled, sampled_together, collectives]
CASES += [adapters, refusals] * bool(find_spec("peft"))


if __name__ == "__main__":
    shape, wanted = [int(n) for n in sys.argv[1].split("x")], sys.argv[2:]
    with world(ParallelConfig(dp_replicate=shape[0], dp_shard=shape[1], tp=shape[2])) as ranks:
        for case in CASES:
            if not wanted or case.__name__ in wanted:
                case(ranks, sys.argv[1])
        if not wanted and shape == [1, 2, 2]:
            for layout in ((2, 1, 2), (1, 1, 4)):
                other, name = laid_out(ranks, layout), "x".join(map(str, layout))
                methods(other, name, ("dpo",))
                algorithms(other, name, ("grpo",))
    print("agreed on all", file=sys.stderr)
