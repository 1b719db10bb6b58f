"""Ranks of a split vocabulary that are not asked for the same: all refuse, in one line that names the difference."""

import torch
import torch.distributed as dist

from fastalign.ops import (
    divergence,
    linear_divergence,
    linear_logps,
    linear_loss,
    policy_loss,
    preference_loss,
    token_logps,
)

N, D, V = 12, 5, 11
LABELS = torch.arange(N) % V
CU_SEQLENS = torch.tensor([0, 3, 6, 7, 12])
OTHER = torch.tensor([0, 4, 6, 7, 12])
TAU = torch.ones(N)


def hinge(pair):
    return (1 - pair.chosen + pair.rejected).relu()


def hidden(**new):
    return torch.ones(N, D, **new)


def weight(**new):
    return torch.ones(V, D, **new)


def loss(**options):
    x = options.pop("x", None)
    options = {"align": "pair", "cu_seqlens": CU_SEQLENS, **options}
    return linear_loss(hidden() if x is None else x, weight(), LABELS, lambda s: s.logps.sum(), **options)


def logps(**options):
    return linear_logps(hidden(requires_grad=True), weight(requires_grad=True), LABELS, **options)


def tokens(**options):
    return token_logps(torch.ones(N, V, dtype=options.pop("dtype", torch.float32)), LABELS, **options)


def policy(**options):
    return policy_loss(torch.ones(N, V), LABELS, **{"advantages": TAU, "loss": "pg", **options})


def pairs(**options):
    offsets = options.pop("cu_seqlens", CU_SEQLENS)
    return preference_loss(torch.ones(N, V), LABELS, offsets, None, loss_fn=hinge, **options)


def kl(**options):
    return divergence(torch.ones(N, V), torch.ones(N, V), **options)


def linear_kl(**options):
    return linear_divergence(hidden(), weight(), hidden(), weight(), **options)


# What rank 0 is asked for, what the others are, and the name of what differs.
DIFFERENT = [
    (lambda **o: loss(x=hidden(requires_grad=True), **o), lambda **o: loss(**o), "requires_grad of hidden"),
    (logps, loss, "op, got linear_logps, linear_loss"),
    (loss, lambda **o: loss(memory=12_000, **o), "memory, got None, 12000"),
    (loss, lambda **o: loss(x=hidden(dtype=torch.bfloat16), **o), "dtypes of hidden and weight"),
    (loss, lambda **o: loss(cu_seqlens=OTHER, **o), "cu_seqlens"),
    (loss, lambda **o: loss(align="sequence", **o), "align, got pair, sequence"),
    (loss, lambda **o: loss(entropy=True, **o), "entropy, got False, True"),
    (loss, lambda **o: loss(lse=True, **o), "lse"),
    (loss, lambda **o: loss(temperature=TAU, **o), "temperature, got 1.0, one per row"),
    (loss, lambda **o: loss(bias=torch.ones(V), **o), "bias, got None, torch.float32"),
    (loss, lambda **o: loss(batch_invariant=True, **o), "batch_invariant"),
    (loss, lambda **o: loss(num_scored=N, **o), "num_scored"),
    (logps, lambda **o: logps(label_smoothing=0.1, **o), "label_smoothing"),
    (logps, lambda **o: logps(backend="torch", **o), "kernels|backend"),
    (tokens, lambda **o: tokens(entropy=True, **o), "entropy"),
    (tokens, lambda **o: tokens(dtype=torch.float64, **o), "dtype of logits"),
    (tokens, lambda **o: tokens(softcap=5.0, **o), "softcap, got None, 5.0"),
    (policy, lambda **o: policy(entropy_coef=0.1, **o), "entropy"),
    (policy, lambda **o: policy(advantages=None, loss="sft", **o), "advantages, got given, None"),
    (kl, lambda **o: kl(kind="jsd", **o), "kind, got forward_kl, jsd"),
    (kl, lambda **o: kl(labels=LABELS, **o), "labels, got None, given"),
    (linear_kl, lambda **o: linear_kl(memory=9000, **o), "memory"),
    (linear_kl, lambda **o: linear_kl(kind="reverse_kl", **o), "kind"),
]
# What one rank alone refuses, and why.
REFUSED = [
    (loss, lambda **o: loss(temperature=-1.0, **o), "temperature must be positive"),
    (logps, lambda **o: logps(backend="nonsense", **o), "backend 'nonsense' is not available"),
    (tokens, lambda **o: tokens(softcap=-1.0, **o), "softcap must be positive"),
    (policy, lambda **o: policy(loss="nonsense", **o), "loss must be one of"),
    (pairs, lambda **o: pairs(cu_seqlens=CU_SEQLENS[:4], **o), "cu_seqlens must be integer offsets"),
    (kl, lambda **o: kl(kind="nonsense", **o), "kind must be"),
    (linear_kl, lambda **o: linear_kl(memory=0, **o), "memory must be"),
]


def message_of(op):
    try:
        op(process_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "taken"


def check():
    rank, size = dist.get_rank(), dist.get_world_size()
    for first, other, name in DIFFERENT:
        message = message_of(other if rank else first)
        names = [f"every rank needs the same {one}" for one in name.split("|")]
        assert any(one in message for one in names) and "\n" not in message, (name, message)
    for right, wrong, why in REFUSED:
        message = message_of(wrong if rank == size - 1 else right)
        told = f"rank {size - 1} of the {size} that share the vocabulary refused its arguments: ValueError: "
        assert why in message and (rank == size - 1 or told in message), (why, message)
    for labels in (LABELS + (torch.arange(N) == 3), LABELS + torch.tensor([2, -1] + [0] * (N - 2))):
        message = message_of(lambda labels=labels, **o: token_logps(torch.ones(N, V), labels if rank else LABELS, **o))
        assert "their labels differ" in message, message
    for op in (loss, logps, tokens, policy, pairs, kl, linear_kl):
        assert message_of(op) == "taken", message_of(op)  # the group is as good as before
