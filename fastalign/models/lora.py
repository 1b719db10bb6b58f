"""Adapters: LoRA by the `peft` library over frozen weights, and when such a policy can be its own reference.

`peft` is optional (`pip install 'fastalign[lora]'`) and imported where it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastalign.config import ModelConfig
from fastalign.models import inline
from fastalign.models.policy import Policy
from fastalign.models.raised import raise_trained, rounded
from fastalign.types import PackedBatch
from fastalign.words import nearest

log = logging.getLogger(__name__)

ACCEPTED = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "bias", "lora_bias"),
    *("use_rslora", "use_dora", "init_lora_weights", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
)
"""Settings of `peft.LoraConfig` that are exact on packed rows, sharded, and beside the fused head."""
OWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core"),
}
"""What `peft` writes beside them."""
STARTS = (True, False, "gaussian")
"""The `init_lora_weights` that leave the base weights alone and need no data."""
REFUSALS = (
    *(SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, UnpicklingError),
    UserWarning,  # made an error where it tells of weights that would stay random
)
"""What `peft` raises on settings that make no adapter and on files that are damaged."""
ADAPTER = "default"
TASKS = {False: "CAUSAL_LM", True: "SEQ_CLS"}
"""By whether the head is a scalar one."""
BASE = "base"
"""Beside an adapter, the directory of its base when that has no name of its own."""
SAMPLE = 256
"""Elements of a frozen weight that stand for it, at least."""
ZERO_ADAPTER = re.compile(r"\.lora_(embedding_)?[AB]\.")
"""Parameters that add nothing while one factor of each product is 0."""


def check(model: ModelConfig) -> None:
    """Refuses a `model` section whose adapter or quantisation cannot be meant, before any work.

    Raises:
        ValueError: unknown or excluded settings, with the accepted ones; a missing library, with what to install.
    """
    if model.lora is not None:
        check_options(model.lora, "model.lora")
        library()
    if model.quantization is not None:
        _check_quantization(model)


def _check_quantization(model: ModelConfig) -> None:
    if model.path is None:
        raise ValueError("model.quantization needs model.path: random weights of model.config are not worth quantising")
    if model.lora is None and saved_adapter(model) is None:
        raise ValueError("quantised weights cannot train: set model.lora beside model.quantization")
    if model.resize_embeddings:
        raise ValueError(
            "rows of quantised weights cannot be added: model.resize_embeddings excludes model.quantization"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("model.quantization needs bitsandbytes: pip install 'fastalign[qlora]'")


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Refuses keys and values outside of what is computed exactly."""
    for key in options:
        if key not in ACCEPTED:
            hint = nearest(key, ACCEPTED, cutoff=0.6)
            raise ValueError(f"unknown key {key!r} in {where}{hint}; expected one of {', '.join(ACCEPTED)}")
    if options.get("lora_dropout"):
        raise ValueError(
            f"{where}.lora_dropout must be 0, got {options['lora_dropout']}: copies of a shared prompt would draw "
            "different masks, and log-probs must not be random; set it to 0 or leave it out"
        )
    if (start := options.get("init_lora_weights", True)) not in STARTS:
        raise ValueError(
            f"{where}.init_lora_weights must be true, false or gaussian, got {start!r}: others change the base weights "
            "or need data"
        )


def library() -> Any:
    """The `peft` module; ValueError that names the extra when it is absent."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("adapters need the peft library: pip install 'fastalign[lora]'")
    import peft

    return peft


# --- making ----------------------------------------------------------------------------------------------------------


def saved_adapter(model: ModelConfig, scalar_head: bool | None = None) -> Any:
    """The `peft` config of the adapter directory that `model.path` is, its base where it is to be found; else None.

    Raises:
        ValueError: an adapter that is no plain LoRA, has no base, or is for another head than the one named.
    """
    if model.path is None or not (Path(model.path) / "adapter_config.json").is_file():
        return None
    with one_line(f"the adapter {model.path!r} cannot be loaded"):
        config = library().PeftConfig.from_pretrained(model.path)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"{model.path!r} is an adapter of type {kind}: only LORA is served")
    if scalar_head is not None and (task := TASKS[scalar_head]) != (config.task_type or task):
        raise ValueError(f"{model.path!r} is an adapter of task {config.task_type}, not {task}: merge it into its base")
    if model.lora is not None:
        raise ValueError(f"{model.path!r} is an adapter already, which goes on training: leave model.lora out")
    check_options(_settings(config), model.path)
    config.base_model_name_or_path = _base_of(config, model.path)
    return config


def _settings(config: Any) -> dict[str, Any]:
    """What a saved adapter sets otherwise than `peft` by default; the dropout, which is switched off, is left out."""
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config) if field.name not in {*OWN, "lora_dropout"}]
    return {name: value for name in names if (value := getattr(config, name)) != getattr(default, name)}


def _base_of(config: Any, path: str) -> str:
    """The base that lies beside an adapter, so that both can be moved; else the one that it names."""
    beside, named = Path(path) / BASE, config.base_model_name_or_path
    if beside.is_dir():
        return str(beside)
    if not named:
        raise ValueError(f"{path!r} names no base model: set base_model_name_or_path in its adapter_config.json")
    if (Path(named) / "adapter_config.json").is_file():
        raise ValueError(f"the base of {path!r}, {named!r}, is an adapter itself: merge that one into its base first")
    return named


def adapt(base: PreTrainedModel, model: ModelConfig, saved: Any, seed: int) -> Any:
    """The base below its adapter: a saved one, a new one, or the base alone.

    Args:
        base: frozen and changed in place.
        model: the section; `lora` holds the settings of a new adapter.
        saved: from `saved_adapter`.
        seed: of a new adapter's random factor; the global generator is left as it was.

    Returns:
        a `peft.PeftModel` whose every trained weight is fp32 at least, or `base` itself.

    Raises:
        ValueError: settings that fit no module of the base, files that are damaged or lack weights.
    """
    if saved is not None:
        assert model.path is not None
        adapted = _load(base, model.path, saved)
    elif model.lora is not None:
        adapted = _new(base, model.lora, seed)
    else:
        return base
    raise_trained(adapted)
    trained, every = adapted.get_nb_trainable_parameters()
    log.info("lora: %s of %s parameters train (%.2g %%)", f"{trained:,}", f"{every:,}", 100 * trained / every)
    return adapted


def _new(base: PreTrainedModel, options: Mapping[str, Any], seed: int) -> Any:
    """A new adapter; without `target_modules` on every linear layer but the head. A scalar head trains beside it."""
    check_options(options, "model.lora")
    peft = library()
    with one_line("model.lora makes no adapter"), torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(**{"target_modules": "all-linear", **options}, task_type=_task(base))
        return peft.get_peft_model(base, config)


def _load(base: PreTrainedModel, path: str, config: Any) -> Any:
    """A saved adapter, made trainable again; as the dropouts of models, the one that it was trained with is off."""
    if config.lora_dropout:
        log.warning("lora_dropout %s of %s set to zero: log-probs must not be random", config.lora_dropout, path)
    config.lora_dropout, config.task_type = 0.0, _task(base)
    with one_line(f"the adapter {path!r} cannot be loaded"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) (adapter )?keys.*")  # would be random
        return library().PeftModel.from_pretrained(base, path, config=config, is_trainable=True)


def _task(base: PreTrainedModel) -> str:
    """What `peft` calls a causal LM, and a sequence classifier, whose scalar head it trains and saves whole."""
    return TASKS[base.get_output_embeddings() is None]


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns what `peft` raises on settings and files into one line; its calls of deprecated functions are its own."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    except REFUSALS as error:
        raise ValueError(f"{what}: {inline.one_line(error)}") from error


def base_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes and some elements of every frozen weight: tells bases apart at no cost."""
    return sample((name, x) for name, x in tensors if not x.requires_grad)


def sample(tensors: Iterable[tuple[str, Tensor]], elements: Callable[[str], Tensor] | None = None) -> str:
    """A hash of names, shapes and some elements of tensors: tells models apart at no cost.

    Args:
        tensors: by name.
        elements: gives those at `sampled_places`, by name, where the tensors are not whole on this rank.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, x in tensors:
        some = elements(name) if elements else x.detach().flatten()[:: sampled_places(x).step]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sampled_places(x: Tensor) -> range:
    """The places of the elements that stand for a tensor, at least `SAMPLE` of them."""
    return range(0, x.numel(), max(1, x.numel() // SAMPLE))


# --- over a base whose weights are not there yet ---------------------------------------------------------------------


def base_name(name: str) -> str:
    """What a base calls a tensor that `peft` has put into a layer of its own."""
    return re.sub(rf"\.(base_layer|original_module|modules_to_save\.{ADAPTER})\b", "", name)


def needs_base(model: ModelConfig, saved: Any) -> str | None:
    """Why an adapter cannot be made before the base's weights are there; None for one that can."""
    dora = (model.lora or {}).get("use_dora") if saved is None else saved.use_dora
    return "DoRA starts from the norms of the weights" if dora else None


def adapt_hollow(base: PreTrainedModel, model: ModelConfig, saved: Any, seed: int) -> Any:
    """`adapt` for a base on the meta device: the adapter has its numbers, the base and copies of its layers have none.

    Meanwhile the base is on the CPU with weights that take no memory: `peft` moves an adapter to where its base is.
    """
    standing: dict[int, nn.Parameter] = {}
    for owner, name, x in _places(base):
        if x.is_meta:
            empty = torch.zeros((), dtype=x.dtype).expand(x.shape) if x.dim() > 1 else torch.zeros_like(x, device="cpu")
            owner[name] = standing.setdefault(id(x), nn.Parameter(empty, x.requires_grad))
    stands = {id(x) for x in standing.values()}
    hollow = {name for name, x in base.named_parameters(remove_duplicate=False) if id(x) in stands}
    adapted = adapt(base, model, saved, seed)
    names = {id(x): base_name(name) for name, x in base.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for owner, name, x in _places(base):
        loaded = saved is not None and x.requires_grad  # what trains of a saved adapter has its numbers
        if names[id(x)] in hollow and not loaded:
            owner[name] = made.setdefault(id(x), nn.Parameter(torch.empty_like(x, device="meta"), x.requires_grad))
    return adapted


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where each parameter is kept, tied ones at every place."""
    for module in model.modules():
        yield from ((module._parameters, name, x) for name, x in [*module._parameters.items()] if x is not None)


# --- the reference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithoutAdapter:
    """The policy with its adapter switched off, called as a policy is; the weights are the policy's own."""

    policy: Policy

    def __call__(self, batch: PackedBatch, head_fn: Callable[..., Any]) -> Any:
        """`policy(batch, head_fn)` of the base model."""
        with switched_off(self.policy):
            return self.policy(batch, head_fn)


@contextmanager
def switched_off(policy: Policy) -> Iterator[None]:
    """The policy without its adapter, every `requires_grad` left as it is.

    `peft` clears the flags meanwhile; FSDP, which gathers weights under the flags of that moment, must not see that.
    """
    assert policy.adapted is not None
    layers, flags = policy.adapted.base_model, [(p, p.requires_grad) for p in policy.parameters()]
    layers.disable_adapter_layers()
    try:
        _restore(flags)
        yield
    finally:
        layers.enable_adapter_layers()
        _restore(flags)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def why_not_its_own_reference(policy: Policy) -> str | None:
    """Why the policy as it is now differs from, or will not be kept by, its base; None when it equals its base.

    Switching the adapter off gives the starting policy back only if nothing but the adapter trains and the adapter
    adds exactly 0 now. Both are looked up in the weights, not in settings.
    """
    if policy.adapted is None:
        return "all weights train"
    others = [n for n, p in policy.named_parameters() if p.requires_grad and not ZERO_ADAPTER.search(n)]
    if others:
        name = others[0].removeprefix("model.").replace(f".{ADAPTER}", "")
        return f"{len(others)} other tensors train beside the adapter ({name})"
    if any(not _adds_zero(module) for module in policy.modules() if hasattr(module, "lora_A")):
        return "the adapter does not start at zero"
    return None


def identity(policy: Policy) -> dict[str, Any] | None:
    """The settings of an adapter that takes part; None without one, and with one that adds nothing to its base."""
    if why_not_its_own_reference(policy) is None or policy.adapted is None:
        return None
    settings = {key: sorted(x) if isinstance(x, set) else x for key, x in _settings(adapter_config(policy)).items()}
    return {"peft": library().__version__, **settings}


def adapter_config(policy: Policy) -> Any:
    """The `peft` config of a policy's adapter."""
    return policy.adapted.peft_config[ADAPTER]


@torch.no_grad()
def _adds_zero(layer: Any) -> bool:
    """Whether one factor of a LoRA layer is 0, and its bias if it has one."""
    factors = [
        *(module[ADAPTER].weight for module in (layer.lora_A, layer.lora_B) if ADAPTER in module),
        *(module[ADAPTER] for module in (layer.lora_embedding_A, layer.lora_embedding_B) if ADAPTER in module),
    ]
    bias = layer.lora_B[ADAPTER].bias if ADAPTER in layer.lora_B else None
    return any(not _whole(factor).any() for factor in factors) and (bias is None or not _whole(bias).any())


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- saving ----------------------------------------------------------------------------------------------------------


def save_adapter(
    policy: Policy, directory: Path, final: Path, state_dict: Mapping[str, Tensor] | None, base: PreTrainedModel | None
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which `peft` loads.

    Args:
        policy: one with an adapter.
        directory: where to write.
        final: where the files will lie in the end, which the config names when the base is beside them.
        state_dict: full tensors under the names of `policy.model`, when its own are shards.
        base: the base model when it has no name to be found by; written to `base/`.
    """
    adapted = policy.adapted
    assert adapted is not None
    name = Path(policy.model.name_or_path or "")
    if base is not None:
        base.save_pretrained(directory / BASE)
        name = final / BASE
    found = name.is_dir() or base is not None
    adapter_config(policy).base_model_name_or_path = str(name.resolve() if found else name)
    tensors = adapted.base_model.model.state_dict() if state_dict is None else state_dict
    named = {f"base_model.model.{key}": x for key, x in rounded(tensors, adapted.base_model.model).items()}
    adapted.save_pretrained(directory, state_dict=named, save_embedding_layers=False)
