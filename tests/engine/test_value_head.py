"""A value head beside the LM head: exact, trained with the trunk, kept in checkpoints, left out of the export."""

import copy

import pytest
import steps
import torch
from actor_critic import accumulate, make_policy, plain, total_of
from safetensors.torch import load_file

from fastalign.config import OptimConfig
from fastalign.data.pack import pack
from fastalign.engine.optim import Trained, make_optimizer, take_step
from fastalign.engine.output.checkpoint import load_checkpoint, save_checkpoint
from fastalign.engine.output.export import whole_weights
from fastalign.models.load import save_pretrained
from fastalign.models.policy import Policy

EXAMPLES = steps.make_examples("sft", "sft")
FINITE = torch.tensor(True)


def stepped(policy, tokens=60):
    """The policy after an update of an actor-critic, with its optimizer; and the summed losses of the step."""
    optimizer = make_optimizer(policy, OptimConfig(lr=0.01))
    losses = accumulate(policy, pack(EXAMPLES, tokens, True), 1 / total_of(EXAMPLES))
    trained = Trained(policy, optimizer)
    return trained, losses, take_step(trained, 0.01, 1.0, FINITE)


@pytest.mark.parametrize("tokens", [60, 10**6])
def test_an_actor_critic_step_is_that_of_the_plain_model_in_float64(tokens):
    policy = make_policy(steps.VOCAB)
    eager = copy.deepcopy(policy)
    eager.model.set_attn_implementation("eager")
    trained, losses, norm = stepped(policy, tokens)
    want = plain(eager, EXAMPLES, 1 / total_of(EXAMPLES))
    torch.testing.assert_close(losses, want, rtol=1e-12, atol=1e-12)
    whole = torch.cat([p.grad.flatten() for p in eager.parameters()]).norm()
    torch.testing.assert_close(norm, whole, rtol=1e-12, atol=0)
    assert eager.value_head.weight.grad.norm() > 0.01 * whole, "the value loss takes part"
    adam = make_optimizer(eager, OptimConfig(lr=0.01))
    take_step(Trained(eager, adam), 0.01, 1.0, FINITE)
    for (name, mine), theirs in zip(policy.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=name)  # Adam divides by tiny gradients' size
    assert trained.module is policy


def test_a_new_value_head_says_nothing_and_other_passes_do_not_ask_it():
    policy = Policy(make_policy(steps.VOCAB).model, value_head=True)
    (batch,) = pack(EXAMPLES[:2], 10**6, True)
    assert policy(batch, lambda hidden, weight, labels, *, values: values, values=True).eq(0).all()
    assert policy(batch, lambda hidden, weight, labels: len(hidden)) == batch.num_scored
    hollow = Policy(copy.deepcopy(policy.model).to("meta"), value_head=True)
    assert hollow.value_head.weight.device.type == "cpu" and hollow.value_head.weight.eq(0).all()
    bare = Policy(policy.model)
    with pytest.raises(AssertionError, match="there is no value head"):
        bare(batch, lambda *tensors, **options: None, values=True)
    assert not any("value_head" in name for name in bare.state_dict())


def test_roles_come_back_to_the_bit_and_values_are_not_exported(tmp_path):
    roles = {"policy": stepped(make_policy(steps.VOCAB))[0], "critic": stepped(make_policy(steps.VOCAB), 10**6)[0]}
    path = save_checkpoint(tmp_path, 1, roles, {}, steps.ALONE, keep=1)
    names = {name for file in path.glob("*.safetensors") for name in load_file(file)}
    for role in roles:
        kinds = ("weight", "exp_avg", "exp_avg_sq")
        assert {f"{role}.{kind}.value_head.weight" for kind in kinds} < names
    fresh = {role: Trained(made := make_policy(steps.VOCAB), make_optimizer(made, OptimConfig())) for role in roles}
    load_checkpoint(path, fresh, steps.ALONE)
    for role, one in roles.items():
        again = fresh[role]
        for mine, theirs in zip(one.module.parameters(), again.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            states = one.optimizer.state[mine], again.optimizer.state[theirs]
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    policy = roles["policy"].module
    for weights in (None, whole_weights(policy)):
        exported = load_file(save_pretrained(policy, None, tmp_path / "model", weights) / "model.safetensors")
        assert exported and not any("value" in name for name in exported)
