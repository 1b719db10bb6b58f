"""A Hugging Face directory of any whole checkpoint of a run, while the run goes on or later; no data are read."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from fastalign.config import Config, ModelConfig
from fastalign.disk import kept_from_others, writing
from fastalign.engine.methods import Objective, filled_in, objective_of
from fastalign.engine.output.checkpoint import check_shapes, intact, read_tensors, saved_shapes
from fastalign.engine.output.checkpoints import RUN_STATE, flaw, newest_checkpoint, read_state, step_of
from fastalign.engine.output.export import make_base_again
from fastalign.engine.output.trained_state import weights
from fastalign.engine.setup import builtin_tokenizer, critic_section
from fastalign.models.inline import makes
from fastalign.models.load import DTYPES, load_policy, load_tokenizer, save_pretrained, separate_padding
from fastalign.models.policy import Policy
from fastalign.parallel.mesh import Axis, World

log = logging.getLogger(__name__)


def export_checkpoint(
    config: Config,
    directory: Path,
    *,
    step: str | None = None,
    critic: bool = False,
    merge_lora: bool = False,
    dtype: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Write a checkpoint's policy, or its critic, as `from_pretrained` loads it.

    Args:
        config: the settings of the run.
        directory: of the run.
        step: of the checkpoint, or ``best``; None: the newest.
        critic: the critic in place of the policy; that of a shared trunk becomes a sequence classifier.
        merge_lora: add an adapter to its base, and write the whole model.
        dtype: of the weights that are written; None: as they are.
        out: where to; None: ``export/step-N`` of the run.
        overwrite: replace what is there.

    Returns:
        what was written where.

    Raises:
        ValueError: no such checkpoint, a place that is taken, an option that the run does not allow.
    """
    found = find(directory, step)
    place = out or directory / "export" / (found.name + "-critic" * critic)
    if place.exists() and not overwrite:
        raise ValueError(f"{place} is there: set --overwrite to replace it, or name another place with --out")
    objective = objective_of(config)
    config = filled_in(config, objective)
    tokenizer = load_tokenizer(config.model, fallback=builtin_tokenizer)
    policy = load_trained(found, config, objective, tokenizer, critic)
    adapter, shared = policy.adapted is not None, critic and policy.value_head is not None
    if merge_lora and not adapter:
        raise ValueError("--merge-lora: there is no adapter to merge")
    if adapter and (merge_lora or shared):
        merge(policy, config.model)
    if shared:
        policy = as_classifier(policy, tokenizer)
    if dtype is not None:
        policy.to(DTYPES[dtype])
    base = make_base_again(config, policy, tokenizer) if policy.adapted is not None and config.model.config else None
    need = sum(p.nbytes for x in (policy, base) if x is not None for p in x.parameters())
    with kept_from_others(), writing("the model", place, need):
        place.parent.mkdir(parents=True, exist_ok=True)
        save_pretrained(policy, tokenizer, place, base=base)
    what = "critic" if critic else "adapter" if policy.adapted is not None else "policy"
    return f"{place}: the {what} of {directory} after step {step_of(found)}"


def merge_adapter(adapter: Path, out: Path, dtype: str | None = None, overwrite: bool = False) -> str:
    """Write a base with its adapter added, as one model.

    Args:
        adapter: its directory.
        out: where to.
        dtype: of the weights that are written; None: the base's own.
        overwrite: replace what is there.

    Raises:
        ValueError: no adapter there, or a place that is taken.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is no adapter: expected a directory with adapter_config.json, such as RUN/model")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there: set --overwrite to replace it, or name another place with --out")
    section = ModelConfig(path=str(adapter), dtype="auto")
    tokenizer = load_tokenizer(section)
    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    policy = load_policy(section, tokenizer=tokenizer, scalar_head=kind == "SEQ_CLS")
    merge(policy, section)
    if dtype is not None:
        policy.to(DTYPES[dtype])
    with kept_from_others(), writing("the model", out, sum(p.nbytes for p in policy.parameters())):
        out.parent.mkdir(parents=True, exist_ok=True)
        save_pretrained(policy, tokenizer, out)
    return f"{out}: {adapter} added to its base"


def find(directory: Path, step: str | None) -> Path:
    """The checkpoint of a step, of the best one, or the newest."""
    place = directory / "checkpoints"
    if step is None:
        if (newest := newest_checkpoint(place, **RUN_STATE)) is None:
            raise ValueError(f"{directory} has no checkpoint yet")
        return newest
    if step == "best" and not (place / "best").is_file():
        raise ValueError(f"--step best: {directory} keeps no best checkpoint (run.keep_best)")
    name = (place / "best").read_text(encoding="utf-8").strip() if step == "best" else f"step-{step}"
    if reason := flaw(place / name, **RUN_STATE):
        there = ", ".join(sorted(p.name for p in place.glob("step-*") if not flaw(p, **RUN_STATE))) or "none"
        raise ValueError(f"--step {step}: {place / name} is no whole checkpoint ({reason}); whole ones: {there}")
    return place / name


def load_trained(
    found: Path, config: Config, objective: Objective, tokenizer: PreTrainedTokenizerBase, critic: bool
) -> Policy:
    """The policy of a checkpoint, or the model that its critic is or is part of."""
    plan, state = objective.policy_gradient, read_state(found, **RUN_STATE)
    kind = plan.settings.critic if plan else "none"
    if critic and kind not in ("shared", "separate"):
        raise ValueError(f"--critic: {config.method} has none (algorithm.critic shared or separate)")
    known: dict[str, Any] = {"tokenizer": tokenizer, "seed": config.run.seed}
    role = "critic" if critic and kind == "separate" else "policy"
    if role == "critic":
        policy = load_policy(critic_section(config), scalar_head=True, **known)
    else:
        scalar = objective.method.scalar_head
        policy = load_policy(config.model, scalar_head=scalar, value_head=kind == "shared", **known)
        if state["base"] != policy.base_digest:
            raise ValueError(
                f"{found} was trained over other frozen weights: restore the base that model.path had then"
            )
    if policy.has_scalar_head:
        separate_padding(policy, tokenizer)
    read_role(found, role, policy)
    return policy


def read_role(found: Path, role: str, policy: Policy) -> None:
    """Put the weights of one role of a checkpoint into a model."""
    prefix = f"{role}.weight."
    with intact(found):
        saved = {name: shape for name, shape in saved_shapes(found).items() if name.startswith(prefix)}
    mine = {prefix + name: x.detach() for name, x in weights(policy).items()}
    check_shapes(found, mine, saved)
    read_tensors(found, mine, World(Axis(), torch.device("cpu")))


def merge(policy: Policy, model: ModelConfig) -> None:
    """Add a policy's adapter to the weights below it, in fp32 and rounded once; the policy has no adapter then."""
    if model.quantization is not None:
        raise ValueError("an adapter over quantised weights cannot be merged: merge it into the base it was made of")
    dtype = next(p.dtype for p in policy.parameters() if not p.requires_grad)
    policy.model.float()
    policy.adapted.merge_and_unload()
    policy.to(dtype)
    policy._adapted = (None,)


def as_classifier(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """The trunk with its value head in place of the LM head, as transformers loads reward models and critics."""
    config, head = deepcopy(policy.config), policy.value_head
    assert head is not None
    config.num_labels = 1
    with makes(config.model_type):
        model: Any = AutoModelForSequenceClassification.from_config(config, dtype=head.weight.dtype)
    model.base_model.load_state_dict(policy.backbone.state_dict())
    constant = head.bias.item()
    with torch.no_grad():
        model.score.weight.copy_(head.weight)
    made = Policy(model)
    separate_padding(made, tokenizer)
    made.config.value_head_bias = constant
    log.info("a sequence classifier has no bias: its scores are the critic's values less %g (config.json)", constant)
    return made
