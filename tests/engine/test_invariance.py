"""Every method and loss: one optimizer step is the same however its examples are packed, shared and dealt to ranks."""

from importlib.util import find_spec
from pathlib import Path

import forks
import pytest
import steps
import torch

from fastalign.engine import forward as heads

PACKINGS = {
    "all in one, shared": lambda examples: steps.packed(examples, 10**6, True),
    "all in one": lambda examples: steps.packed(examples, 10**6, False),
    "many, shared": lambda examples: steps.packed(examples, 60, True),
    "many, uneven": lambda examples: steps.packed(examples[:5], 50, False) + steps.packed(examples[5:], 10**6, True),
    "another order": lambda examples: steps.packed(examples[::-1], 90, True),
}


@pytest.mark.parametrize("method, loss", steps.OBJECTIVES)
def test_a_step_is_the_same_however_it_is_packed(method, loss):
    models, examples = steps.make_models(method), steps.make_examples(method, loss)
    alone = [batch for example in examples for batch in steps.packed([example], 1, False)]
    assert len(alone) == len(examples)
    want = steps.run_step(models, alone, method, loss)
    for name, pack in PACKINGS.items():
        steps.assert_same_step(steps.run_step(models, pack(examples), method, loss), want, name)


@pytest.mark.parametrize("method, loss", steps.OBJECTIVES)
def test_the_same_packing_has_the_same_bits(method, loss):
    models, examples = steps.make_models(method), steps.make_examples(method, loss)
    first, second = (steps.run_step(models, steps.packed(examples, 60, True), method, loss) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_two_ranks_have_the_step_of_one():
    output = forks.run(Path(__file__).with_name("ranks_steps.py"), ranks=2)
    beside = 3 + (find_spec("peft") is not None)  # masters, steps within backward, a value head, and a raised head
    assert output.count("agreed on") == 2 * (len(steps.OBJECTIVES) + beside)


def test_the_head_computes_scored_rows_alone_and_reads_the_last_prompt_row_once_per_response(monkeypatch):
    """Rows of the head's product over a step: the scored tokens, however many prompts and padding there might be."""
    examples, seen = steps.make_examples("rrhf", "rrhf"), []
    real = heads.linear_loss

    def counted(hidden, weight, labels, *arguments, **options):
        seen.append(hidden)
        return real(hidden, weight, labels, *arguments, **options)

    monkeypatch.setattr(heads, "linear_loss", counted)
    batches = steps.packed(examples, 60, True)
    steps.run_step(steps.make_models("rrhf"), batches, "rrhf", "rrhf")
    scored = [int(mask.sum()) for example in examples for _, mask in example.sequences]
    assert sum(len(hidden) for hidden in seen) == sum(scored)
    firsts = torch.cat([hidden[batch.cu_seqlens[:-1].long()] for hidden, batch in zip(seen, batches, strict=True)])
    assert len(firsts) == len(scored) == 4 * len(examples)
    assert len(firsts.unique(dim=0)) == len(examples), "four responses read one row"
