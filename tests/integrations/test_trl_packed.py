"""TRL's trainers on packed rows: equal to the padded ones in losses, gradients and metrics, on fewer tokens."""

import pytest
import torch
from wanted import require

require("trl", "1.16")

import trl  # noqa: E402
import trl_runs  # noqa: E402

from fastalign.integrations import trl as ours  # noqa: E402
from fastalign.integrations.trl import packed  # noqa: E402
from fastalign.integrations.trl.packed import STATE, add_packed_head, pack_rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
PACKED = [name for name, case in trl_runs.CASES.items() if case[2] != "completions"]


@pytest.fixture
def batches(monkeypatch):
    """The packed batches of a run, with the padded size of each."""
    made = []

    def spy(input_ids, attention_mask, labels):
        batch, places = pack_rows(input_ids, attention_mask, labels)
        made.append((batch, input_ids.numel()))
        return batch, places

    monkeypatch.setattr(packed, "pack_rows", spy)
    return made


@pytest.mark.parametrize("name", PACKED)
def test_packed_trainers_train_as_trls_do(name, plain_run, tmp_path, batches):
    trainer = getattr(ours, trl_runs.CASES[name][0].__name__)
    trl_runs.assert_equal_runs(plain_run(name), trl_runs.losses_of(name, tmp_path, trainer))
    assert all(batch.num_tokens < padded for batch, padded in batches)
    assert any(batch.logical_tokens > batch.num_tokens for batch, _ in batches), "no prompt was shared"


def test_trainers_are_subclasses_that_can_be_subclassed_and_found_by_name():
    for name in ("DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer"):
        cls = getattr(ours, name)
        assert issubclass(cls, getattr(trl, name)) and cls is getattr(ours, name) and cls.__name__ == name
        assert cls.__module__ == "fastalign.integrations.trl"
    with pytest.raises(AttributeError, match="NoTrainer"):
        ours.NoTrainer  # noqa: B018


def test_an_adapter_trains_against_the_model_without_it(tmp_path):
    peft = pytest.importorskip("peft", reason="wanted peft, found none")
    steps = {}
    for cls in (trl.DPOTrainer, ours.DPOTrainer):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights="gaussian", target_modules=["q_proj", "v_proj"])
        options = {"learning_rate": 3e-2, "peft_config": lora}
        steps[cls] = trl_runs.run(cls, trl.DPOConfig, "pairs", tmp_path, reference=False, **options)
    trl_runs.assert_equal_runs(*steps.values())


def padded_model(kind="llama"):
    model = trl_runs.model(kind, 0)
    add_packed_head(model, outputs=("log_probs", "entropy"))
    return model


def test_calls_without_the_flag_are_the_models_own():
    model, own = padded_model(), trl_runs.model("llama", 0)
    ids = torch.randint(3, 300, (2, 9))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert torch.equal(model(ids).logits, own(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=3), own.generate(ids, max_new_tokens=3))


def test_left_and_right_padding_give_the_same_fields():
    model, ids = padded_model(), torch.randint(3, 300, (3, 11))
    lengths, prompts = [11, 7, 9], [4, 4, 2]
    ids[1, :4] = ids[0, :4]
    sides = {}
    for side in ("left", "right"):
        x, mask, labels = torch.zeros(3, 11).long(), torch.zeros(3, 11).long(), torch.full((3, 11), -100)
        for row, (n, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            at = slice(11 - n, 11) if side == "left" else slice(0, n)
            x[row, at], mask[row, at], labels[row, at] = ids[row, :n], 1, ids[row, :n]
            labels[row, at.start : at.start + prompt] = -100
        out = model(input_ids=x, attention_mask=mask, labels=labels, fused_lm_head=True)
        scored = labels[:, 1:] != -100
        assert torch.equal(out.label_mask, scored) and (out.log_probs[~scored] == 0).all()
        sides[side] = out.log_probs[scored], out.entropy[scored], out.loss
    own = trl_runs.model("llama", 0)
    alone = [own(ids[r : r + 1, :n]).logits[0].log_softmax(-1) for r, n in enumerate(lengths)]
    exact = torch.cat(
        [
            alone[r][torch.arange(p - 1, n - 1), ids[r, p:n]]
            for r, (n, p) in enumerate(zip(lengths, prompts, strict=True))
        ]
    )
    for logps, entropy, loss in sides.values():
        torch.testing.assert_close(logps, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, -exact.mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, sides["left"][1])


def test_rows_of_one_prompt_share_it_wherever_they_stand():
    prompt, other = [5, 6, 7, 4], [5, 8, 7, 4]
    rows = [[*prompt, 9, 10], [*other, 9, 10], [*prompt, 11, 12], [*prompt, 9, 13], [*other, 9, 11]]
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1] = -100  # not scored at all: left out
    batch, places = pack_rows(ids, torch.ones_like(ids), labels)
    assert batch.num_tokens == 4 + 3 * 2 + 6 and batch.logical_tokens == 24
    assert sorted(places.tolist()) == [3, 4, 13, 14, 18, 19, 23, 24]
    assert torch.equal(ids[:, 1:].flatten()[places], batch.labels)


def test_a_batch_without_scored_tokens_is_a_connected_zero():
    model, ids = padded_model(), torch.randint(3, 300, (2, 5))
    out = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.full_like(ids, -100), fused_lm_head=True
    )
    out.loss.backward()
    assert out.loss == 0 and model.lm_head.weight.grad.abs().max() == 0


def test_what_cannot_be_packed_is_refused():
    model, ids = padded_model(), torch.randint(3, 300, (1, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}
    with pytest.raises(ValueError, match="got pixel_values, shift_labels too"):
        model(**inputs, shift_labels=ids, pixel_values=ids, token_type_ids=None)
    stateful = trl_runs.model("llama", 0)
    stateful.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="cannot run on packed rows"):
        add_packed_head(stateful)
    assert not hasattr(stateful, STATE)


def test_a_failed_construction_leaves_trl_as_it_was():
    module = trl.trainer.dpo_trainer
    theirs = module.add_fused_lm_head
    with pytest.raises(TypeError):
        ours.DPOTrainer(no_such_argument=1)
    assert module.add_fused_lm_head is theirs
