"""An evaluation tells what training would tell of the same rows if the weights stood still."""

from pathlib import Path

import numpy as np
import pytest
import steps
import torch

from fastalign.config import BatchConfig, ModelConfig
from fastalign.data.loader import evaluation_steps
from fastalign.engine.evaluate import evaluate
from fastalign.engine.methods import make_objective
from fastalign.engine.output.metrics import means
from fastalign.engine.prepare import first_carried
from fastalign.engine.setup import load_data
from fastalign.engine.train import train
from fastalign.engine.update import add_sums
from fastalign.models.load import load_policy, save_pretrained
from runs import records

BATCH = BatchConfig(size=3, tokens=60)
OBJECTIVES = {(method, loss): make_objective(method, {"name": loss}) for method, loss in steps.OBJECTIVES}
DEPENDENT = [names for names, objective in OBJECTIVES.items() if objective.depends_on_step]
COLUMNS = {"rank_margins", "rank_ratios", "baseline"}
COUPLED = {"aot", "aot_unpaired", "kto", "bco"}
"""Each loss of a step depends on all of its examples; imitation terms depend on how many tokens these have."""
BCO = OBJECTIVES["kto", "bco"]


class Examples(list):
    def fetch(self, indices):
        return [self[i] for i in indices]


def an_epoch(models, examples, objective, carried):
    """Metrics over the steps of an epoch, the last of them short, without an optimizer."""
    total = torch.zeros(len(objective.metric_names), 2, dtype=torch.float64)
    order = np.random.default_rng([0, 0]).permutation(len(examples))
    for batches in evaluation_steps(examples, BATCH.budget, BATCH.share_prefix, size=BATCH.size, order=order):
        sums = steps.accumulate(models, batches, objective, steps.ALONE, carried)
        total += add_sums(sums, objective.metric_names, torch.device("cpu"))
    return means(objective, total)


def test_which_losses_depend_on_their_step():
    assert {loss for (_, loss), objective in OBJECTIVES.items() if COLUMNS & {*objective.columns}} == COUPLED
    assert {loss for _, loss in DEPENDENT} >= COUPLED | {"orpo", "cpo"}
    assert not set(DEPENDENT) & {("sft", "sft"), ("dpo", "dpo"), ("reward", "reward"), ("rrhf", "rrhf")}


@pytest.mark.parametrize(("method", "loss"), [*DEPENDENT, ("dpo", "dpo"), ("sft", "sft")])
def test_of_the_training_rows_it_is_the_training_loss(method, loss):
    """In float64, so that only the order of a few sums may differ."""
    models, examples = steps.make_models(method), Examples(steps.make_examples(method, loss))
    objective = OBJECTIVES[method, loss]
    told = an_epoch(models, examples, objective, first_carried())
    assert evaluate(models, examples, objective, BATCH, steps.ALONE) == pytest.approx(told, rel=1e-11, nan_ok=True)


def test_it_leaves_what_training_carries():
    models, examples, carried = (
        steps.make_models("kto"),
        Examples(steps.make_examples("kto", "bco")),
        first_carried(),
    )
    an_epoch(models, examples, BCO, carried)
    before, kept = carried["baseline"].state_dict(), dict(carried)
    later = evaluate(models, examples, BCO, BATCH, steps.ALONE, carried)
    assert carried == kept and carried["baseline"].state_dict() == before and before["count"] == len(examples)
    afresh = evaluate(models, examples, BCO, BATCH, steps.ALONE)
    assert abs(later["rewards/baseline"] - afresh["rewards/baseline"]) > 1e-4


@pytest.mark.parametrize(("method", "loss"), [("dpo", "aot"), ("kto", "kto")])
def test_a_run_whose_learning_rate_is_zero(configure, tmp_path, method, loss):
    settings = {"loss.name": loss, "loss.beta": 2.0, "optim.lr": 0.0, "run.steps": None, "data.format": "preference"}
    config = configure(method, **settings)
    rows = Path(config.data.path).read_text().splitlines()[:16]
    for setting in ("path", "eval_path"):
        (tmp_path / f"{setting}.jsonl").write_text("\n".join(rows))
        setattr(config.data, setting, str(tmp_path / f"{setting}.jsonl"))
    start = {**config.model.config, "initializer_range": 0.2}
    section = ModelConfig(config=start, tokenizer=config.model.tokenizer)
    save_pretrained(load_policy(section, tokenizer=load_data(config)[0], seed=1), None, tmp_path / "reference")
    config.reference.path = str(tmp_path / "reference")
    train(config)
    lines = records(config.run.output_dir)
    told = sum(line["loss"] * line["examples"] for line in lines) / sum(line["examples"] for line in lines)
    assert len(lines) > 2 and lines[-1]["examples"] < config.batch.size
    assert lines[-1]["eval_loss"] == pytest.approx(told, rel=1e-5)  # fp32, packed otherwise
