"""Loading and saving: Hugging Face names, directories and inline configs in, Hugging Face directories out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastalign import hub
from fastalign.config import ModelConfig
from fastalign.disk import flush
from fastalign.models import inline, lora, outline, vocabulary
from fastalign.models.inline import REFUSALS, SPECIAL_TOKENS, makes, one_line
from fastalign.models.native import use_native_layers
from fastalign.models.policy import Policy

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("*token*", "*vocab*", "*piece*", "tekken.json")
SCALAR_HEAD = "score.weight"
"""What transformers calls the head of a sequence classifier."""


def load_policy(
    model: ModelConfig,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scalar_head: bool = False,
    setting: str = "model.path",
    value_head: bool = False,
) -> Policy:
    """The policy that a model section describes.

    Args:
        model: the section; exactly one of `path` and `config` is set.
        vocab_size: tokens the tokenizer can produce; an inline config without one gets it, a smaller model is refused,
            or resized if the section says so.
        seed: of random initial weights; the global generator is left as it was.
        tokenizer: gives an inline config its special token ids, and `vocab_size` when that is not given.
        scalar_head: one output per token in place of the LM head, as reward models have; that of the checkpoint, or
            a new one where it has none.
        setting: what errors call the setting that names it.
        value_head: put a value head beside the LM head, at 0.

    Raises:
        ValueError: when path and config are both set or both missing, the model cannot be found, its vocabulary is too
            small, or it cannot run on packed rows.
    """
    check_named(model)
    saved = lora.saved_adapter(model, scalar_head)
    known = {"vocab_size": vocab_size, "seed": seed, "tokenizer": tokenizer, "scalar_head": scalar_head}
    base = load_base(model, saved, setting=setting, **known)
    policy = as_policy(lora.adapt(base, model, saved, seed), base, model, value_head=value_head)
    policy.base_digest = None if policy.adapted is None else lora.base_digest(policy.named_parameters())
    return policy


def as_policy(adapted: Any, base: PreTrainedModel, model: ModelConfig, *, value_head: bool = False) -> Policy:
    """A base below its adapter, or the base itself, as its section says to run it."""
    options: dict[str, Any] = {"attention": model.attention, "gradient_checkpointing": model.gradient_checkpointing}
    policy = Policy(adapted, value_head=value_head, **options)
    use_native_layers(base)
    return policy


def check_named(model: ModelConfig) -> None:
    """Refuse a section that names no model, or two."""
    if model.path is None and model.config is None:
        raise ValueError(
            "no model is given: set model.path to a hub name or a local directory, e.g. --model.path Qwen/Qwen3-0.6B, "
            "or model.config to start from random weights, e.g. {model_type: llama, hidden_size: 256, ...}"
        )
    if model.path is not None and model.config is not None:
        raise ValueError(
            "model.path and model.config are both set: leave out model.config to load model.path, "
            "or model.path to start from random weights"
        )


def load_base(
    model: ModelConfig,
    saved: Any = None,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scalar_head: bool = False,
    setting: str = "model.path",
) -> PreTrainedModel:
    """The model of `load_policy` without its adapter; ``saved`` is the config of a saved one, which names its base."""
    auto = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
    size = vocabulary.size(tokenizer) if vocab_size is None and tokenizer is not None else vocab_size
    if model.path is not None:
        base = _pretrained(*base_path(model, saved, setting), model, auto, seed)
    else:
        base = _from_scratch(model, auto, size, seed)
        if tokenizer is not None:
            set_special_tokens(base, tokenizer)
    fit_rows(base, model, saved, size, setting)
    return base


def fit_rows(base: PreTrainedModel, model: ModelConfig, saved: Any, size: int | None, setting: str) -> None:
    """A row for every token, and under an adapter one that trains."""
    path, where = ("", "") if model.path is None else base_path(model, saved, setting)
    name = f"{where}: {path!r}" if path else "model.config"
    if vocabulary.fit(base, size, name, resize=model.resize_embeddings) and (saved or model.lora) is not None:
        trained = (model.lora or {}).get("modules_to_save") if saved is None else saved.modules_to_save
        vocabulary.refuse_frozen_rows(base, name, trained or ())


def base_path(model: ModelConfig, saved: Any, setting: str) -> tuple[str, str]:
    """The directory or hub name of the weights below any adapter, and what errors call the setting that names it."""
    assert model.path is not None
    if saved is None:
        return model.path, setting
    return saved.base_model_name_or_path, f"{setting}: the base of the adapter {model.path!r}"


def _pretrained(path: str, setting: str, model: ModelConfig, auto: Any, seed: int) -> PreTrainedModel:
    tell_of_code(model, path, setting)
    options: dict[str, Any] = {"num_labels": 1} if (scalar := auto is AutoModelForSequenceClassification) else {}
    if model.quantization is not None:
        options["quantization_config"] = _quantization(model.quantization)
    with readable("model", path, "config.json and safetensors weights", setting):
        both: Any = auto.from_pretrained(
            path,
            dtype=DTYPES.get(model.dtype, "auto"),
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the shapes
            **options,
        )
    loaded, info = both
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ValueError(f"{setting}: {path!r} is an adapter on the hub: download it and give its directory")
    missing = set(info["missing_keys"])
    if scalar and SCALAR_HEAD in missing:
        new_scalar_head(loaded, seed)
    check_loaded(f"{setting}: {path!r}", {**info, "missing_keys": missing - ({SCALAR_HEAD} if scalar else set())})
    return loaded


def _quantization(options: Mapping[str, Any]) -> BitsAndBytesConfig:
    """bitsandbytes' config of a `model.quantization`."""
    try:
        made: Any = BitsAndBytesConfig.from_dict(dict(options), return_unused_kwargs=True)
    except REFUSALS as error:
        raise ValueError(f"model.quantization: {one_line(error)}") from error
    config, unknown = made
    if unknown:
        raise ValueError(f"unknown key {next(iter(unknown))!r} in model.quantization: see BitsAndBytesConfig")
    return config


def new_scalar_head(model: PreTrainedModel, seed: int) -> None:
    """Scores of about unit size: normal weights with a deviation of ``1 / sqrt(D + 1)``."""
    if (head := getattr(model, "score", None)) is None:
        return  # refused when the policy is made
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(noise / (head.in_features + 1) ** 0.5)


def separate_padding(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a reward model a padding token that ends no sequence, in its config and the tokenizer.

    transformers reads the score at the last token that is not padding: with EOS as padding that would be the token
    before EOS, and training reads EOS.
    """
    ends = [None, tokenizer.eos_token_id]
    free = [name for name in ("pad_token", "unk_token", "bos_token") if getattr(tokenizer, f"{name}_id") not in ends]
    if free:
        tokenizer.pad_token = getattr(tokenizer, free[0])
    else:
        log.warning("no padding token other than EOS: the saved reward model scores one sequence at a time")
    policy.config.pad_token_id = tokenizer.pad_token_id if free else None


def check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that left weights random; tied weights are not among the missing."""
    if mismatched := sorted(info["mismatched_keys"]):
        key, there, here = mismatched[0]
        raise ValueError(
            f"{name} does not fit its config.json: {key} is {(*there,)} there and {(*here,)} by its config"
        )
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{name} lacks {len(missing)} of the model's weights ({shown}), which would start random: "
            "choose a complete checkpoint of a causal LM"
        )


def _from_scratch(model: ModelConfig, auto: Any, vocab_size: int | None, seed: int) -> PreTrainedModel:
    scalar = auto is AutoModelForSequenceClassification
    config = inline.make(model.config or {}, scalar, vocab_size)
    dtype = DTYPES.get(model.dtype) or config.dtype or torch.float32
    with makes(config.model_type), torch.random.fork_rng():
        torch.manual_seed(seed)
        made = auto.from_config(config, dtype=dtype)
    if scalar:
        new_scalar_head(made, seed)
    return made


def set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set after construction: an embedding made with a padding id starts that row at zero."""
    for name in SPECIAL_TOKENS:
        setattr(model.config, name, getattr(tokenizer, name))
        if getattr(model, "generation_config", None) is not None:
            setattr(model.generation_config, name, getattr(tokenizer, name))


def load_tokenizer(
    model: ModelConfig, fallback: Callable[[str], Any] | None = None, *, setting: str = "model.path"
) -> Any:
    """The tokenizer of a model section.

    Args:
        model: `tokenizer` names it, else `path` does.
        fallback: makes the tokenizer of a `builtin:NAME`, called with that name.
        setting: what errors call the setting that names the path.

    Raises:
        ValueError: when none is named, it cannot be found, or a built-in one is asked for without a fallback.
    """
    name = model.tokenizer or _tokenizer_home(model)
    setting = "model.tokenizer" if model.tokenizer else setting
    if name is None:
        check_named(model)
        raise ValueError(
            "model.config has no tokenizer of its own: set model.tokenizer (a name, a path or builtin:bpe)"
        )
    if name.startswith("builtin:"):
        if fallback is None:
            raise ValueError(f"{setting}: no built-in tokenizers are available here: {name!r}")
        return fallback(name)
    tell_of_code(model, name, setting)
    if Path(name).is_dir() and not has_tokenizer(name):  # of which transformers says pages
        remedy = ", or set model.tokenizer" if setting == "model.path" else ""
        raise ValueError(f"{setting}: no tokenizer in {name!r}: expected a directory with tokenizer.json{remedy}")
    with readable("tokenizer", name, "tokenizer.json", setting):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)


def has_tokenizer(directory: str) -> bool:
    """Whether a directory holds a file of any tokenizer."""
    return any(file for pattern in TOKENIZER_FILES for file in Path(directory).glob(pattern))


def check_model(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    scalar_head: bool = False,
    setting: str = "model.path",
) -> None:
    """Refuses by its config alone, before data are tokenised for it, a model that cannot run or has too few rows.

    The arguments are those of `load_policy`.
    """
    size = None if tokenizer is None else vocabulary.size(tokenizer)
    if model.path is None:
        config, name = inline.make(model.config or {}, scalar_head, size), "model.config"
        rows = (model.config or {}).get("vocab_size")
    else:
        path, where = base_path(model, lora.saved_adapter(model), setting)
        tell_of_code(model, path, where)
        with readable("model", path, "config.json and safetensors weights", where):
            config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        rows, name = getattr(config.get_text_config(), "vocab_size", None), f"{where}: {path!r}"
    outline.check(config, name, scalar_head=scalar_head, trust_remote_code=model.trust_remote_code)
    if isinstance(rows, int) and size is not None:
        vocabulary.refuse_few(rows, size, name, resize=model.resize_embeddings)


def tell_of_code(model: ModelConfig, path: str, setting: str) -> None:
    """Name whose Python code may run in this process, where the section lets it."""
    if model.trust_remote_code:
        log.warning("%s: trust_remote_code is on: Python code that comes with %r runs in this process", setting, path)


def _tokenizer_home(model: ModelConfig) -> str | None:
    """Where the tokenizer of a path lies: an adapter without one has that of its base."""
    saved = lora.saved_adapter(model)
    if saved is None or model.path is None or (Path(model.path) / "tokenizer_config.json").is_file():
        return model.path
    return saved.base_model_name_or_path


def check_place(name: str | None, setting: str) -> None:
    """Refuses what can only be a directory here, and is none, before any work."""
    if name is None or name.startswith("builtin:") or Path(name).exists():
        return
    if hub.looks_local(name):
        run = Path(name).parent
        made = f"run.output_dir {run} leaves it, so train that first: fastalign sft --config ... --run.output_dir {run}"
        raise ValueError(
            f"{setting}: no directory at {name!r}: {made if Path(name).name == 'model' else 'check the path'}"
        )


@contextmanager
def readable(kind: str, name: str, files: str, setting: str) -> Iterator[None]:
    """Turns what transformers raises on absent and damaged files into one line that names them and the setting."""
    check_place(name, setting)
    local = Path(name).exists()
    try:
        with hub.quiet(), nullcontext() if local else hub.asked_once(f"{kind} {name!r}"):
            yield
    except OSError as error:
        expected = f"no {kind} in {name!r}: expected a directory with {files} ({one_line(error)})"
        raise ValueError(f"{setting}: {expected if local else hub.why_not(name, kind, error)}") from error
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, REFUSALS):  # tokenizers raises the bare class
            raise
        reason = f"the {kind} {name!r} cannot be loaded ({one_line(error)}): check its files"
        raise ValueError(f"{setting}: {reason}") from error


def save_pretrained(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    state_dict: Mapping[str, Tensor] | None = None,
    base: PreTrainedModel | None = None,
) -> Path:
    """Writes a Hugging Face directory that `from_pretrained` loads with equal logits, whole or not at all.

    Of a policy with an adapter it is the adapter's directory, in PEFT's format.

    Args:
        policy: the policy.
        tokenizer: written beside it, if any.
        directory: replaced when it exists.
        state_dict: full (unsharded) tensors under the policy's names, when its own parameters are shards.
        base: the model below an adapter when it came from an inline config: it is written beside the adapter.

    Returns:
        The directory.
    """
    final = Path(directory).resolve()  # behind a link the model goes where that leads, and the link stays
    check_target(final)
    fresh, old = (final.with_name(f".{final.name}.{word}") for word in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tensors = (
        None
        if state_dict is None
        else {name.removeprefix("model."): x for name, x in state_dict.items() if name.startswith("model.")}
    )
    try:
        if policy.adapted is None:
            policy.model.save_pretrained(fresh, state_dict=tensors)
        else:
            lora.save_adapter(policy, fresh, final, tensors, base)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        flush(fresh, inside=True)  # before the rename
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return Path(directory)


def check_target(directory: Path, otherwise: str = "choose another directory") -> None:
    """Refuses a place for a model's directory that a file takes."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, where the model's directory is to be: move it, or {otherwise}")
