"""What a finished run leaves besides its metrics: ``model/`` for others to load, and the report."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastalign.config import Config
from fastalign.disk import writing
from fastalign.engine.interrupt import resume_command
from fastalign.engine.output.report import write_report
from fastalign.engine.output.trained_state import tied_names
from fastalign.models.load import load_base, save_pretrained
from fastalign.models.policy import Policy

if TYPE_CHECKING:
    from fastalign.engine.train import Job

log = logging.getLogger(__name__)


def export(job: Job, weights: dict[str, Tensor] | None) -> None:
    """``model/``: a Hugging Face directory of the final weights, or of the adapter; on the main rank, alone."""
    policy, model, directory = job.models.policy, job.config.model, job.directory
    job.signals.where = "in the export"
    log.info("writing %s and report.html", directory / "model")
    base = None
    if policy.adapted is not None and model.config is not None:
        base = make_base_again(job.config, policy, job.tokenizer)
    written = [x for x in (policy, base) if x is not None]
    need = sum(p.nbytes for x in written for p in x.parameters() if p.requires_grad or x is base)
    then = f"export again with: {resume_command(job.config)}"
    with writing("the model", directory / "model", need, then=then):
        save_pretrained(policy, job.tokenizer, directory / "model", weights, base)


def report(job: Job) -> None:
    """Write the report of a run that has all else: a failure is only told."""
    later = f"the run is complete: write it later with: fastalign report {shlex.quote(str(job.directory))}"
    job.signals.where, job.signals.rest = "in the report", later
    try:
        write_report(job.directory)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.warning("no report (%s); %s", reason, later)


def make_base_again(config: Config, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base of an adapter that no directory holds: from its config and seed, with the special tokens of now."""
    scalar = policy.has_scalar_head
    base = load_base(config.model, seed=config.run.seed, tokenizer=tokenizer, scalar_head=scalar)
    base.config.pad_token_id = policy.config.pad_token_id
    return base


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    """Full tensors of a sharded policy, tied ones once, on the host of the main rank; all ranks must call it.

    Of a policy with an adapter, only what trains.
    """
    adapted = policy.adapted is not None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
    state = get_model_state_dict(policy, options=options)
    tied = tied_names(policy)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in tied}
