"""A patched model against itself unpatched: loss, gradients, training, memory, and everything it refuses."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, Trainer, TrainingArguments

from fastalign.integrations.transformers import FusedTrainer, patch_model, plain_forward, unpatch_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
VOCAB, ROWS, LENGTH = 307, 3, 17
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.5, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": True},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its head has a bias
}


def make(kind="llama", **config):
    """Logits far from uniform: a forgotten scale, softcap or bias shows."""
    torch.manual_seed(0)
    settings = {**SIZES, **ARCHITECTURES[kind], **config}
    if kind == "gpt2":
        settings = {key: value for key, value in settings.items() if key in ("vocab_size", *ARCHITECTURES["gpt2"])}
        settings |= {"attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    head = model.get_output_embeddings()
    head.weight.data.normal_(std=0.2)
    if head.bias is not None:
        head.bias.data.normal_(std=0.5)
    return model


def batch():
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, :4], labels[1, 9:], labels[2] = -100, -100, -100
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [9], [LENGTH]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, **inputs):
    """The loss of a call and the gradients it leaves, both copied."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    largest = max(gradient.abs().max() for gradient in one[1].values())
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).abs().max() <= 1e-6 * largest, name


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("count", [None, torch.tensor(11), 11], ids=["mean", "tensor", "int"])
def test_loss_and_gradients_are_the_models_own(kind, count):
    model, inputs = make(kind), batch() | ({} if count is None else {"num_items_in_batch": count})
    plain = gradients(model, **inputs)
    assert_same(plain, gradients(patch_model(model), **inputs))
    assert plain[1] and "forward" in vars(model)


def test_labels_that_are_shifted_already_and_other_ignored_values():
    model, inputs = make(), batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    other = inputs["labels"].masked_fill(inputs["labels"] == -100, -7)
    plain = gradients(model, **inputs)
    patch_model(model)
    assert_same(plain, gradients(model, **inputs, shift_labels=shifted))
    assert_same(plain, gradients(model, **{**inputs, "labels": other}, ignore_index=-7))


def test_the_output_has_a_loss_and_what_was_asked_for():
    model, inputs = patch_model(make(attn_implementation="eager")), batch()
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert output.logits is None and len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert model(**inputs).keys() == {"loss"}
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], model(**inputs).loss)


def test_positional_arguments_keep_their_places():
    model, inputs = make(), batch()
    own = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss
    patch_model(model)
    assert torch.allclose(own, model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss)


def test_without_labels_nothing_changes():
    model, inputs = make(), batch()
    ids = inputs["input_ids"]
    own = model(ids).logits, model.generate(ids, max_new_tokens=3)
    patch_model(model)
    assert torch.equal(model(ids).logits, own[0]) and torch.equal(model.generate(ids, max_new_tokens=3), own[1])
    with plain_forward(model):
        assert model(**inputs).logits is not None
    assert model(**inputs).logits is None


def test_patching_is_undone_and_survives_copies():
    model = make()
    assert patch_model(patch_model(model)) is model
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.zero_()
    assert torch.equal(twin(batch()["input_ids"]).logits, torch.zeros(ROWS, LENGTH, VOCAB))
    assert model(batch()["input_ids"]).logits.abs().max() > 0
    assert unpatch_model(unpatch_model(model)) is model and "forward" not in vars(model)
    assert model(**batch()).logits is not None and twin(**batch()).logits is None


def test_no_tensor_as_large_as_the_logits_is_made():
    model, inputs = make(), batch()
    logits = ROWS * LENGTH * VOCAB
    for patched in (False, True):
        if patched:
            patch_model(model)(**inputs)  # compares itself with the plain forward once
        with Sizes() as sizes:
            model(**inputs).loss.backward()
        assert (sizes.largest < logits) == patched, sizes.largest
    scored = int((inputs["labels"][:, 1:] != -100).sum())
    assert sizes.largest <= max(scored * VOCAB, VOCAB * 32)


def test_a_batch_without_scored_tokens_is_a_connected_zero():
    model, inputs = patch_model(make()), batch()
    loss, made = gradients(model, **{**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    assert loss == 0 and made["lm_head.weight"].abs().max() == 0


def test_dropout_and_modes_are_as_they_were_after_the_first_call():
    model = make("gpt2", resid_pdrop=0.5)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    patch_model(model)(**batch())
    assert modes == [module.training for module in model.modules()]


def test_compiled_models_keep_the_loss():
    model, inputs = make(), batch()
    plain = gradients(model, **inputs)
    patch_model(model)
    model(**inputs)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**inputs).loss
    model.zero_grad()
    loss.backward()
    assert_same(plain, (loss.detach(), {name: p.grad for name, p in model.named_parameters()}))


def test_autocast_runs_the_head_in_half_precision():
    model, inputs = make(), batch()
    patch_model(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
        with plain_forward(model):
            own = model(**inputs).loss
    assert loss.dtype == torch.float32 and abs(loss - own) < 2e-2


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_whose_logits_are_more_than_its_heads_is_refused_at_its_first_call():
    config = BertConfig(
        **{k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=1,
        num_attention_heads=4,
        is_decoder=True,
    )
    bert, inputs = patch_model(BertLMHeadModel(config)), batch()
    with pytest.raises(ValueError, match=r"^BertLMHeadModel computes its logits otherwise than by its LM head"):
        bert(**inputs)
    scaled = make("cohere")
    patch_model(scaled)
    scaled.logit_scale = 0.25  # what forward reads, beside the config
    with pytest.raises(ValueError, match="log-probs differ by"):
        scaled(**inputs)


def test_other_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="got Linear: pass the model itself, before DDP"):
        patch_model(torch.nn.Linear(2, 2))
    own = make()
    own.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(ValueError, match="has a loss_function of its own"):
        patch_model(own)
    prepared = make()
    prepared._original_forward = prepared.forward
    with pytest.raises(ValueError, match="before accelerate prepares"):
        patch_model(prepared)
    model, inputs = patch_model(make()), batch()
    with pytest.raises(ValueError, match="output_router_logits"):
        model(**inputs, output_router_logits=True)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**inputs, logits_to_keep=1)


# --- Trainer ---------------------------------------------------------------------------------------------------------


def examples(count=12):
    torch.manual_seed(2)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, VOCAB, (count, 9))]


def arguments(directory, **options):
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(
        str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        **quiet,
        **options,
    )


@pytest.fixture
def accelerate():
    """What ``Trainer`` needs of its own."""
    return pytest.importorskip("accelerate", reason="wanted accelerate, which Trainer needs, found none")


def train(cls, directory, kind="llama", model=None, **options):
    trainer = cls(
        model or make(kind), arguments(directory, **options), train_dataset=examples(), eval_dataset=examples()
    )
    trainer.train()
    return trainer, [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox"])
def test_the_trainer_trains_as_without_the_patch(kind, accelerate, tmp_path):
    theirs, own = train(Trainer, tmp_path, kind)
    ours, fused = train(FusedTrainer, tmp_path, kind)
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(own), rtol=1e-5, atol=1e-5)
    assert len(own) == 3 and own[-1][0] != own[0][0]
    assert abs(theirs.evaluate()["eval_loss"] - ours.evaluate()["eval_loss"]) < 1e-5


def test_gradient_checkpointing_and_half_precision_train(accelerate, tmp_path):
    for options, allowed in (({"gradient_checkpointing": True}, 1e-5), ({"bf16": True}, 3e-2)):
        pairs = zip(train(Trainer, tmp_path, **options)[1], train(FusedTrainer, tmp_path, **options)[1], strict=True)
        assert all(abs(a - b) <= allowed * max(1, a) for own, fused in pairs for a, b in zip(own, fused, strict=True))


def test_evaluation_with_metrics_gets_its_logits(accelerate, tmp_path):
    def metrics(prediction):
        return {"vocabulary": prediction.predictions.shape[-1]}

    trainer = FusedTrainer(make(), arguments(tmp_path), eval_dataset=examples(4), compute_metrics=metrics)
    assert trainer.evaluate()["eval_vocabulary"] == VOCAB
    assert trainer.model(**batch()).logits is None


def test_a_model_made_by_the_trainer_is_patched(accelerate, tmp_path):
    trainer = FusedTrainer(args=arguments(tmp_path), train_dataset=examples(), model_init=lambda: make())
    assert trainer.model(**batch()).logits is None and trainer.call_model_init()(**batch()).logits is None


def test_losses_that_read_logits_are_refused(accelerate, tmp_path):
    with pytest.raises(ValueError, match=r"^label_smoothing_factor reads logits"):
        FusedTrainer(make(), arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match=r"^compute_loss_func reads logits"):
        FusedTrainer(make(), arguments(tmp_path), compute_loss_func=lambda *_, **__: None)


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"], ["v_proj", "saved head"]])
def test_adapters_train_as_without_the_patch(targets, accelerate, tmp_path):
    peft = pytest.importorskip("peft", reason="wanted peft, found none")
    saved = ["lm_head"] if "saved head" in targets else None
    targets = [name for name in targets if name != "saved head"]
    runs = []
    for cls in (Trainer, FusedTrainer):
        lora = peft.LoraConfig(
            r=4, init_lora_weights="gaussian", target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM"
        )
        torch.manual_seed(3)
        runs.append(train(cls, tmp_path, model=peft.get_peft_model(make(), lora)))
    torch.testing.assert_close(torch.tensor(runs[1][1]), torch.tensor(runs[0][1]), rtol=1e-5, atol=1e-5)
    model = runs[1][0].model
    with model.disable_adapter():
        loss = model(**batch()).loss
        with plain_forward(model):
            torch.testing.assert_close(loss, model(**batch()).loss)


def test_adapters_of_the_head_that_are_no_addition_are_refused():
    peft = pytest.importorskip("peft", reason="wanted peft, found none")
    for options, words in (({"lora_dropout": 0.5}, "has dropout"), ({"use_dora": True}, "not plain LoRA")):
        lora = peft.LoraConfig(target_modules=["lm_head"], **options)
        model = peft.get_peft_model(make(), lora)
        with pytest.raises(ValueError, match=words):
            patch_model(model)(**batch())
