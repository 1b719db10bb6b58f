"""A loss by import path: it trains as ours do, and what is wrong with it is said in one line before any work."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastalign import cli
from fastalign.arguments import UsageError, parse_config
from fastalign.config import Config, ModelConfig, RunConfig
from fastalign.engine.methods import METHODS, make_objective
from fastalign.engine.train import train
from fastalign.losses import Loss, preference, reward
from fastalign.losses.pairs import pair_logps
from fastalign.types import AXES, Columns

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = f"{ROOT}/examples/custom_loss.py:hinge_squared"
CODE = """
from dataclasses import replace

from fastalign.losses import Loss
from fastalign.losses.supervised import LOSSES

COUNT = 1
def tokens(logps, *, power: float = 1.0):
    return (-logps) ** power
def labelled(batch, *, gain: float = 2.0):
    return gain * (batch.ref_logps - batch.logps) * batch.desirable
def ranked(batch):
    counts = batch.cu_groups.diff()
    return -batch.logps.new_ones(len(counts)) * batch.logps.sum() / counts
def rewarded(chosen, rejected, margins):
    return rejected - chosen
def distilled(divergence, *, kind: str = "reverse_kl"):
    return divergence(kind=kind, mix=0.5, temperature=1.0)
def free(pair):
    return pair.rejected - pair.chosen
reference_free = Loss(free, reference=False)
mean_over_rows = replace(LOSSES["sft"], fn=tokens)

def two(chosen, rejected):
    return chosen - rejected
def mean(pair):
    return (pair.chosen - pair.rejected).mean()
def flat(pair):
    return pair.chosen.detach()
def raises(pair):
    return pair.missing
def untyped(pair, *, beta=0.1):
    return beta * pair.chosen
def required(pair, *, beta: float):
    return beta * pair.chosen
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The losses above in the working directory, in a file of a name that no other test uses."""
    (tmp_path / f"mine_{tmp_path.name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return f"mine_{tmp_path.name}"


FITTING = [
    ("sft", "tokens"),
    ("sft", "mean_over_rows"),
    ("dpo", "free"),
    ("dpo", "reference_free"),
    ("kto", "labelled"),
    ("rrhf", "ranked"),
    ("reward", "rewarded"),
    ("distill", "distilled"),
]


@pytest.mark.parametrize("method, name", FITTING)
def test_a_loss_of_every_method_has_the_metrics_and_traits_of_its_method(mine, method, name):
    usual = make_objective(method, {})
    for place in (f"{mine}:{name}", f"{mine}.py:{name}"):
        objective = make_objective(method, {"name": place})
        assert objective.name == place and objective.metric_names == usual.metric_names
        assert objective.needs_reference == (usual.needs_reference and name != "reference_free")
        assert (objective.head, objective.data) == (usual.head, usual.data)
        assert objective.columns == (usual.columns if objective.needs_reference == usual.needs_reference else ())


def test_its_keywords_are_settings(mine, capsys):
    path = f"{mine}.py:tokens"
    assert parse_config("sft", ["--loss.name", path, "--loss.power", "2"]).loss == {"name": path, "power": 2.0}
    Path("run.yaml").write_text(f"loss: {{name: [dpo, {EXAMPLE}], loss_weights: [1, 0.5], margin: 2}}")
    assert parse_config("dpo", ["--config", "run.yaml"]).loss["margin"] == 2.0
    for flags, words in (
        (["--loss.powr", "2"], "did you mean 'loss.power'"),
        (["--loss.power", "x"], "loss.power: expected a number, got x"),
    ):
        with pytest.raises(UsageError, match=words):
            parse_config("sft", ["--loss.name", path, *flags])
    with pytest.raises(SystemExit):
        parse_config("dpo", ["--loss.name", EXAMPLE, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the reward margin wanted. (type: a number, default: 1.0)" in text
    assert "--loss.beta BETA reward per nat." in text


@pytest.mark.parametrize(
    "method, name, words",
    [
        ("dpo", "{mine}.py:fre", r"mine_.*\.py has no function 'fre': did you mean 'free'\?"),
        ("dpo", "{mine}:COUNT", "has no function 'COUNT'"),
        ("dpo", "absent.py:free", r"loss.name: no file at /.*/absent\.py"),
        ("dpo", "absent_module:free", "loss.name: no module 'absent_module' in /.* or among the installed packages"),
        ("dpo", "broken.py:f", r"cannot import broken\.py: /.*/broken\.py, line 2: ZeroDivisionError"),
        ("dpo", "torn.py:f", r"cannot import torn\.py: /.*/torn\.py, line 1: SyntaxError: "),
        ("dpo", "needs.py:f", r"/.*/needs\.py, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("dpo", "{mine}.py:two", r"takes \(chosen, rejected\); expected \(pair, \*, settings\.\.\.\)"),
        ("dpo", "{mine}.py:untyped", "untyped needs a type and a default, such as `beta: float = 1.0`"),
        ("dpo", "{mine}.py:required", "the setting beta of .*:required needs a type"),
        ("dpo", "{mine}.py:mean", "mean returned 1 losses for 3: expected one per pair"),
        ("dpo", "{mine}.py:flat", "flat returned losses without a gradient"),
        ("dpo", "{mine}.py:raises", r"raises fails on 3 examples: /.*, line \d+: AttributeError: "),
    ],
)
def test_what_is_wrong_with_it_is_said_in_one_line(mine, method, name, words):
    Path("broken.py").write_text("x = 1\nx / 0\n")
    Path("torn.py").write_text("def f(:\n")
    Path("needs.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ValueError, match=words) as caught:
        make_objective(method, {"name": name.format(mine=mine)})
    assert "\n" not in str(caught.value)


def test_the_command_line_ends_before_any_work(mine, capsys):
    assert cli.main(["dpo", "--loss.name", "absent.py:f"]) == 2
    assert capsys.readouterr().err.startswith("fastalign: error: loss.name: no file at ")
    for name in (f"{mine}.py:mean", f"{mine}.py:raises"):
        assert cli.main(["dpo", "--loss.name", name, "--run.output_dir", "run"]) == 1
        assert capsys.readouterr().err.count("\n") == 1 and not Path("run").exists()


def test_it_trains_and_a_resume_goes_on_with_it(mine, tmp_path):
    llama = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = Config(
        "dpo",
        ModelConfig(config={**llama, "num_attention_heads": 2, "num_key_value_heads": 1}, tokenizer="builtin:bpe"),
        loss={"name": ["dpo", f"{mine}.py:free"], "loss_weights": [1.0, 0.1]},
        run=RunConfig(output_dir=str(tmp_path / "run"), steps=1, show_example=False),
    )
    config.data.path, config.data.limit, config.data.max_length = "builtin:docstrings", 16, 32
    config.data.cache_dir, config.reference.cache = str(tmp_path / "cache"), "off"
    config.optim.schedule = "constant"  # another is of as many steps as the run was to have
    train(config)
    train(replace(config, run=replace(config.run, steps=2, resume=True)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm"] > 0 for line in lines)


def pair_of(ref: torch.Tensor | None, generator: torch.Generator):
    logps = -torch.rand(30, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 10, 14, 17, 25, 30])
    pair = pair_logps(logps, offsets, ref, tails=True)
    kls = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    return replace(pair, chosen_kls=kls[0], rejected_kls=kls[1])


@pytest.mark.parametrize("name", preference.LOSSES)
def test_traits_say_what_a_pair_loss_reads(name):
    loss, new = preference.LOSSES[name], torch.Generator
    refs = [-torch.rand(30, generator=new().manual_seed(s), dtype=torch.float64) for s in (1, 2)]
    one, other = (pair_of(ref, new().manual_seed(0)) for ref in refs)
    told = loss(one)
    assert torch.equal(told, loss(other)) == (not loss.reference)
    filled = {name: 1 + torch.rand(6, dtype=torch.float64) for name, axis in AXES.items() if axis == "sequence"}
    read = loss(replace(one, columns=Columns(**filled)))
    for column, values in filled.items():
        doubled = Columns(**{**filled, column: 2 * values})
        assert torch.equal(read, loss(replace(one, columns=doubled))) == (column not in loss.columns), column
    assert torch.equal(told, loss(replace(one, chosen_kls=one.chosen_kls * 2))) == (not loss.distributions)
    assert torch.equal(told, loss(replace(one, chosen_tails=one.chosen_tails * 2))) == (not loss.tails)


def test_a_loss_is_its_function_from_python():
    pair = pair_of(None, torch.Generator().manual_seed(0))
    assert torch.equal(preference.LOSSES["dpo"](pair, beta=0.3), preference.dpo(pair, beta=0.3))
    assert all(isinstance(loss, Loss) for method in METHODS.values() for loss in method.losses.values())
    assert all(loss.read for loss in reward.LOSSES.values())
