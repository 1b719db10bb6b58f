"""One completion of a run drawn again: a token is a function of weights, seed, prompt, sample and position alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastalign.config import Config
from fastalign.engine.methods import objective_of
from fastalign.engine.output.checkpoints import RUN_STATE, Found, read_state, step_of, whole_checkpoints
from fastalign.engine.settings import settle
from fastalign.engine.setup import seed_everything
from fastalign.engine.train import resume, set_up
from fastalign.parallel.mesh import world
from fastalign.rl.rollouts import Rollouts
from fastalign.types import Prompt, Rollout


def replay(config: Config, directory: Path, step: int, number: int) -> tuple[str, bool]:
    """Sample a line of samples.jsonl again, with the weights that the step before it left.

    Args:
        config: the settings of the run.
        directory: of the run; the checkpoint of the step before is there, or it was the first.
        step: that it was sampled in.
        number: which of the step's lines, from 0.

    Returns:
        what was found, and whether tokens and log-probs are equal.

    Raises:
        ValueError: no such line, no checkpoint to draw it from, a run of another machine's settings.
    """
    line, checkpoint = find_line(directory, step, number), find_checkpoint(directory, step)
    with world(config.parallel) as ranks:
        config = settle(config, ranks.device)
        seed_everything(config.run)
        job = set_up(config, objective_of(config), ranks, checkpoint, writes=False)
        if checkpoint is not None:
            resume(job, checkpoint)
        assert isinstance(job.source, Rollouts)
        drawn = draw(job.source, line)
    equal = drawn.tokens.tolist() == line["token_ids"]
    text = str(job.tokenizer.decode(drawn.tokens.tolist()))
    same = "equal, token by token" if equal else f"NOT equal: the run has {line['completion']!r}"
    return f"step {step}, sample {number}: {text!r} is {same}; log-prob {drawn.sampler_logps.sum():.6f}", equal


def draw(source: Rollouts, line: dict[str, Any]) -> Rollout:
    """The completion, alone."""
    row, sample = line["prompt_index"], line["sample_index"]
    prompt = Prompt(source.prompts.ids(row), row)
    return next(one for one in source.sampler.generate([prompt], sample + 1, line["seed"]) if one.sample == sample)


def find_line(directory: Path, step: int, number: int) -> dict[str, Any]:
    """A line of samples.jsonl."""
    path = directory / "samples.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is not there: {directory} is no run that samples")
    lines = [
        record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if record["step"] == step
    ]
    if not 0 <= number < len(lines):
        has = f"step {step} has the samples 0 to {len(lines) - 1}" if lines else f"there is no step {step}"
        raise ValueError(f"{path}: {has}, and --sample is {number}")
    return lines[number]


def find_checkpoint(directory: Path, step: int) -> Found | None:
    """The checkpoint whose weights a step sampled with; None for the first step."""
    if step == 1:
        return None
    known = {step_of(path): path for path in whole_checkpoints(directory / "checkpoints", **RUN_STATE)}
    if step - 1 not in known:
        there = ", ".join(str(each + 1) for each in sorted(known)) or "none"
        raise ValueError(
            f"step {step} sampled with the weights after step {step - 1}, of which {directory} has no checkpoint; "
            f"steps that can be drawn again: 1, {there} (run.save_every and run.keep decide)"
        )
    return Found(known[step - 1], read_state(known[step - 1], **RUN_STATE))
