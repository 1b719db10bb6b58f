"""Run under torchrun: a sharded step over all ranks has the metrics and gradients of one process."""

import sys
import tempfile
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import actor_critic
import steps
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fastalign.config import ModelConfig, OptimConfig, ParallelConfig
from fastalign.data.pack import share
from fastalign.engine.adamw import AdamW
from fastalign.engine.forward import Models
from fastalign.engine.methods import make_objective
from fastalign.engine.optim import Trained, make_optimizer, stepping, take_step
from fastalign.engine.output.checkpoint import load_checkpoint, save_checkpoint
from fastalign.engine.prepare import first_carried
from fastalign.models.load import load_policy
from fastalign.models.policy import Policy
from fastalign.parallel.clip import local
from fastalign.parallel.mesh import World, world
from fastalign.parallel.shard import shard
from fastalign.types import ForwardCost

COST = ForwardCost(per_token=30.0, per_attended=1.0, per_scored=20.0)


def check(method: str, losses: list[str], ranks: World) -> None:
    alone, models = steps.make_models(method), steps.make_models(method)
    sharded = Models(shard(models.policy, ranks), shard(models.reference, ranks), models.autocast)
    for number, loss in enumerate(losses):
        examples = steps.make_examples(method, loss)
        examples = examples[:1] if number == 0 else examples  # once one rank has nothing to do
        want = steps.run_step(alone, steps.packed(examples, 10**6, False), method, loss)
        mine = share(examples, 50, True, ranks.rank, ranks.size, COST)
        steps.assert_same_step(steps.run_step(sharded, mine, method, loss, ranks), want, f"{method} {loss}")
        print("agreed on", method, loss, file=sys.stderr)


def masters(ranks: World) -> None:
    """fp32 masters are sharded as their weights are, and a checkpoint brings them back to the bit."""
    alone, sharded = (steps.make_models("sft").policy.bfloat16() for _ in range(2))
    shard(sharded, ranks)
    options = OptimConfig(lr=1e-3, weight_decay=0.1)
    optimizers = make_optimizer(alone, options), make_optimizer(sharded, options)
    torch.manual_seed(1)
    for _ in range(3):
        for mine, want in zip(sharded.parameters(), alone.parameters(), strict=True):
            assert isinstance(mine, DTensor)
            gradient = torch.randn(want.shape).bfloat16()
            mine.grad, want.grad = distribute_tensor(gradient, mine.device_mesh, mine.placements), gradient.float()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(kept(sharded, optimizers[1]), kept(alone, optimizers[0]), rtol=1e-6, atol=1e-8)
    assert all(m.placements == p.placements for p, m in optimizers[1].masters.items())
    batches = share(steps.make_examples("sft", "sft"), 50, True, ranks.rank, ranks.size, COST)
    gradients = steps.run_step(Models(sharded, None, False), batches, "sft", "sft", ranks)[1]
    assert {g.dtype for g in gradients} == {torch.bfloat16} and all(g.isfinite().all() for g in gradients)

    path = save_checkpoint(common_directory(ranks), 3, {"policy": Trained(sharded, optimizers[1])}, {}, ranks, keep=1)
    fresh = shard(steps.make_models("sft").policy.bfloat16(), ranks)
    again = make_optimizer(fresh, options)
    load_checkpoint(path, {"policy": Trained(fresh, again)}, ranks)
    for mine, want in zip(kept(fresh, again), kept(sharded, optimizers[1]), strict=True):
        assert torch.equal(mine, want)
    print("agreed on masters", file=sys.stderr)


def within_backward(ranks: World) -> None:
    """Steps of shards within backward are those after it, to the bit, and no gradient is left."""
    batches = share(steps.make_examples("sft", "sft"), 10**6, True, ranks.rank, ranks.size, COST)
    objective, ends = make_objective("sft", {"name": "sft"}), []
    for within in (False, True):
        policy = shard(steps.make_models("sft").policy, ranks)
        trained = Trained(policy, make_optimizer(policy, OptimConfig(weight_decay=0.1)))
        for finite in (True, False, True):
            yes = torch.tensor(finite)
            with stepping(trained, 1e-2, yes) if within else nullcontext() as squares:
                steps.accumulate(Models(policy, None, False), batches, objective, ranks, first_carried())
            assert all((p.grad is None) is within for p in policy.parameters())
            norm = take_step(trained, 1e-2, 0.0, yes) if squares is None else squares.norm()
        states = [trained.optimizer.state[p] for p in policy.parameters()]
        moments = [x for state in states for x in state.values()]
        ends.append(([local(x.detach()) for x in (*policy.parameters(), *moments)], norm))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-12, atol=0)
    print("agreed on steps within backward", file=sys.stderr)


def raised(ranks: World) -> None:
    """A score head of a bf16 model trains beside its adapter: sharded it has the gradients of one process."""
    sizes = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    section = ModelConfig(config=sizes, dtype="bfloat16", lora={"r": 2, "init_lora_weights": False})
    alone, sharded = (load_policy(section, vocab_size=steps.VOCAB, scalar_head=True).train() for _ in range(2))
    shard(sharded, ranks)
    assert {p.dtype for p in sharded.parameters() if p.requires_grad} == {torch.float32}
    examples = steps.make_examples("reward", "reward")
    every = [share(examples, 50, True, rank, ranks.size, COST) for rank in range(ranks.size)]
    want = steps.run_step(Models(alone, None, False), [x for mine in every for x in mine], "reward", "reward")
    got = steps.run_step(Models(sharded, None, False), every[ranks.rank], "reward", "reward", ranks)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert len(got[1]) == len(want[1]) > 4 and want[1][-1].shape == (1, 16)
    for mine, theirs in zip(got[1], want[1], strict=True):  # sums in fp32 of the same micro-batches
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    print("agreed on a raised head", file=sys.stderr)


def value_head(ranks: World) -> None:
    """An actor-critic step has the gradients of one process, and a checkpoint brings the sharded value head back."""
    alone, examples = actor_critic.make_policy(steps.VOCAB), steps.make_examples("sft", "sft")
    sharded = shard(actor_critic.make_policy(steps.VOCAB), ranks)
    assert isinstance(sharded.value_head.weight, DTensor)
    mine = share(examples, 50, True, ranks.rank, ranks.size, COST)
    total = actor_critic.total_of(examples)
    want = actor_critic.plain(with_eager_attention(alone), examples, 1 / total)
    got = actor_critic.accumulate(sharded, mine, ranks.size / total)
    torch.testing.assert_close(ranks.data.sum(got) / ranks.size, want, rtol=1e-12, atol=1e-12)
    gradients = [(whole(a.grad), b.grad) for a, b in zip(sharded.parameters(), alone.parameters(), strict=True)]
    largest = max(b.abs().max() for _, b in gradients)
    assert max((a - b).abs().max() for a, b in gradients) <= 1e-12 * max(largest, 1)

    trained = Trained(sharded, make_optimizer(sharded, OptimConfig()))
    take_step(trained, 0.01, 1.0, torch.tensor(True))
    path = save_checkpoint(common_directory(ranks), 1, {"policy": trained}, {}, ranks, keep=1)
    fresh = shard(actor_critic.make_policy(steps.VOCAB), ranks)
    load_checkpoint(path, {"policy": Trained(fresh, make_optimizer(fresh, OptimConfig()))}, ranks)
    for a, b in zip(fresh.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(whole(a.detach()), whole(b.detach()))
    print("agreed on a value head", file=sys.stderr)


def with_eager_attention(policy: Policy) -> Policy:
    policy.model.set_attn_implementation("eager")
    return policy


def common_directory(ranks: World) -> Path:
    return Path(ranks.gather_objects(tempfile.mkdtemp())[0])


def kept(policy: Policy, optimizer: AdamW) -> list[Tensor]:
    """Masters and moments, whole, and the weights, which are the masters rounded."""
    masters = [optimizer.masters[p] for p in policy.parameters()]
    moments = [optimizer.state[m][key] for m in masters for key in ("exp_avg", "exp_avg_sq")]
    weights, *others = ([whole(x.detach()) for x in part] for part in (policy.parameters(), masters, moments))
    assert all(torch.equal(weight, master.bfloat16()) for weight, master in zip(weights, others[0], strict=True))
    return [*others[0], *others[1]]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        masters(ranks)
        within_backward(ranks)
        value_head(ranks)
        if find_spec("peft"):
            raised(ranks)
        for method in dict.fromkeys(name for name, _ in steps.OBJECTIVES):
            check(method, [loss for name, loss in steps.OBJECTIVES if name == method], ranks)
