"""Run under torchrun: a patched model under DDP and FSDP2 has the gradients of one process without the patch, and the
parts that ranks sharing a vocabulary get from verl's function add up."""

import os
import sys
from importlib import metadata

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.integrations.transformers import patch_model
from fastalign.integrations.trl.packed import add_packed_head
from fastalign.integrations.verl import linear_cross_entropy


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def make(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, **options))
    model.get_output_embeddings().weight.data.normal_(std=0.3)
    return model


def wrapped(kind, patch=patch_model, **options):
    model = make(**options)
    patch(model)
    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if kind == "fsdp2, head apart":
        fully_shard(model.lm_head)
    return fully_shard(model)


def gradients(model):
    whole = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters())
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in whole}


def check(kind, **options):
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    ids = torch.randint(97, (2 * size, 9))
    labels = ids.masked_fill(torch.arange(9) < 1 + torch.arange(2 * size)[:, None], -100)
    count = int((labels[:, 1:] != -100).sum())
    alone, split = make(**options), wrapped(kind, **options)
    own, mine = slice(2 * rank, 2 * rank + 2), []
    for _ in range(2):  # twice: the first call compares the head with the model's own logits
        alone.zero_grad()
        split.zero_grad()
        alone(ids, labels=labels, num_items_in_batch=count).loss.backward()
        output = split(input_ids=ids[own], labels=labels[own], num_items_in_batch=count)
        assert output.logits is None
        (output.loss * size).backward()  # ranks are averaged
        mine.append(gradients(split))
        for name, gradient in gradients(alone).items():
            torch.testing.assert_close(mine[-1][name], gradient, rtol=1e-5, atol=1e-6, msg=f"{kind}: {name}")
    assert any(gradient.abs().max() > 1e-3 for gradient in mine[-1].values())


def check_packed(kind):
    """Padded pairs of one prompt through packed rows, against TRL's fused head on one process."""
    from trl.trainer.utils import add_fused_lm_head

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    ids = torch.randint(1, 97, (2 * size, 9))
    ids[1::2, :4] = ids[::2, :4]
    mask = (torch.arange(9) < 9 - torch.arange(2 * size)[:, None]).long()
    labels = ids.masked_fill((torch.arange(9) < 4) | (mask == 0), -100)
    alone, split = make(), wrapped(kind, add_packed_head)
    add_fused_lm_head(alone)
    own = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # twice: where it can, the first call checks the packed rows
        alone.zero_grad()
        split.zero_grad()
        whole = alone(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        whole.square().sum().backward()
        part = split(input_ids=ids[own], attention_mask=mask[own], labels=labels[own], fused_lm_head=True).log_probs
        torch.testing.assert_close(part, whole[own], rtol=1e-5, atol=1e-5)
        (part.square().sum() * size).backward()
        mine = gradients(split)
        for name, gradient in gradients(alone).items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-4, msg=f"{kind}: {name}")


def check_shared_vocabulary():
    torch.manual_seed(0)
    hidden, whole, labels = torch.randn(5, 8).requires_grad_(), torch.randn(12, 8), torch.randint(12, (5,))
    own = whole.chunk(2)[dist.get_rank()].clone().requires_grad_()
    split = linear_cross_entropy(hidden, own, labels, 0.7, "none", dist.group.WORLD)
    part, columns = torch.autograd.grad((2 * split[0] + split[1]).sum(), (hidden, own))
    dist.all_reduce(part)
    whole.requires_grad_()
    alone = linear_cross_entropy(hidden, whole, labels, 0.7)
    true, weight = torch.autograd.grad((2 * alone[0] + alone[1]).sum(), (hidden, whole))
    torch.testing.assert_close(split, alone)
    torch.testing.assert_close(part, true)
    torch.testing.assert_close(columns, weight.chunk(2)[dist.get_rank()])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in ("ddp", "fsdp2", "fsdp2, head apart"):
        check(kind)
    check("fsdp2", tie_word_embeddings=True)
    check_shared_vocabulary()
    if version("trl").startswith("1.16."):
        for kind in ("ddp", "fsdp2", "fsdp2, head apart"):
            check_packed(kind)
    dist.barrier()
    dist.destroy_process_group()
    print("agreed", file=sys.stderr, flush=True)
    os._exit(0)  # gloo's threads may outlive the interpreter
