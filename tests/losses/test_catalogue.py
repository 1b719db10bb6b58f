"""A loss is one function and one entry: what it says of itself is complete, and command line and page follow."""

import re
from pathlib import Path

import pytest
import torch

from fastalign.arguments import UsageError, parse_config
from fastalign.engine.methods import METHODS, families, make_objective
from fastalign.losses import Loss, catalogue, policy, preference, reduce
from fastalign.losses.traits import keywords
from fastalign.rl import algorithms

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    *("dpo", "cdpo", "robust", "ipo", "ipo_sum", "hinge", "slic", "dpop", "r_dpo", "ln_dpo", "ld_dpo", "exo", "nca"),
    *("bco_pair", "sppo", "aot", "aot_unpaired", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "tdpo1", "tdpo2"),
]
ALGORITHMS = [
    *("ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"),
    *("reinforce", "reinforce_pp", "reinforce_pp_baseline", "remax"),
]
EVERY = [(method, name) for method, family in families().items() for name in family.losses]


@pytest.mark.parametrize("method, name", EVERY)
def test_a_docstring_names_purpose_formula_source_and_arguments(method, name):
    described = catalogue.describe(families()[method].losses[name])
    assert described.purpose.endswith(".") and described.source.endswith(".")
    assert re.search(r"(19|20)\d\d", described.source), described.source
    assert described.defaults.keys() <= described.arguments.keys()


def test_the_published_names_are_all_there():
    assert [name for name in preference.LOSSES if name != "sft"] == PAIRS
    assert set(PAIRS) | {"sft", "kto", "bco", "rrhf", "reward", "gkd"} <= {name for _, name in EVERY}
    assert algorithms.ALGORITHMS.keys() >= set(ALGORITHMS)
    for one in algorithms.ALGORITHMS.values():
        own = policy.LOSSES.get(one.loss)
        assert one.reduction in reduce.WEIGHTS and (own is None) == (one.select != "all")
        assert own is None or one.loss_options.keys() <= keywords(own).keys()
        assert one.defaults.get("kl_estimator", "k3") in policy.KL_ESTIMATORS
    trl = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down sigmoid_norm"
    )
    for name in trl.split():
        assert make_objective("dpo", {"name": name}).name in PAIRS


def mine(pair, *, gamma: float = 1.5):
    """Mine: a loss that was added just now.

    ``l = gamma (b - a)``.
    Source: nobody, 2024.

    Args:
        pair: sequence log-probs of P pairs.
        gamma: its only setting.
    """
    return gamma * (pair.rejected - pair.chosen)


def test_a_new_entry_reaches_the_command_line_the_engine_and_the_page(monkeypatch, capsys):
    with pytest.raises(UsageError, match="has no loss 'mine'"):
        parse_config("dpo", ["--loss.name", "mine"])
    monkeypatch.setitem(preference.LOSSES, "mine", Loss(mine))
    assert parse_config("dpo", ["--loss.name", "mine"]).loss == {"name": "mine", "gamma": 1.5}
    assert parse_config("dpo", ["--loss.name", "mine", "--loss.gamma", "2"]).loss["gamma"] == 2
    with pytest.raises(UsageError, match=r"unknown key 'loss.gama'.* did you mean 'loss.gamma'.*the loss is 'mine'"):
        parse_config("dpo", ["--loss.name", "mine", "--loss.gama", "2"])
    with pytest.raises(SystemExit):
        parse_config("dpo", ["--loss.name", "mine", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "its only setting. (type: a number, default: 1.5)" in help_text and ", mine;" in help_text
    objective = make_objective("dpo", {"name": "mine", "gamma": 3.0})
    assert objective.options == {"gamma": 3.0} and objective.needs_reference
    page = catalogue.page(families())
    assert "### `mine`" in page and "- `gamma` (1.5): its only setting." in page


def test_a_docstring_without_a_part_is_refused(monkeypatch):
    for part in (r"Source: .*", r"``", "gamma: its only setting."):
        monkeypatch.setattr(mine, "__doc__", re.sub(part, "", mine.__doc__))
        with pytest.raises(ValueError, match="mine: "):
            catalogue.describe(mine)
        monkeypatch.undo()
    assert catalogue.describe(mine).formula == "``l = gamma (b - a)``."


def test_the_page_of_methods_is_what_the_losses_say_of_themselves(monkeypatch):
    page = (ROOT / "docs" / "methods.md").read_text()
    assert page == catalogue.page(families()) + algorithms.page(), "write it anew: fastalign methods > docs/methods.md"
    commands = re.findall(r"^fastalign (\w+) (--config .*)$", page, re.M)
    monkeypatch.chdir(ROOT)
    named = [(method, parse_config(method, words.split()).loss["name"]) for method, words in commands]
    assert named == [(method, loss) for method, family in families().items() for loss in family.losses]


@pytest.mark.parametrize("name", [*PAIRS, "sft"])
def test_every_pair_loss_makes_an_objective(name):
    objective = make_objective("dpo", {"name": name})
    assert objective.head == ("distributions" if name in ("tdpo1", "tdpo2") else "logps")
    assert "loss" in objective.metric_names and "rewards/margins" in objective.metric_names
    assert objective.needs_reference == (name not in ("slic", "simpo", "cpo", "orpo", "sft"))
    assert objective.options == keywords(preference.LOSSES[name])


def test_a_sum_of_losses_from_flags_and_files(tmp_path):
    expected = {"name": ["dpo", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.5}
    file = tmp_path / "run.yaml"
    file.write_text("loss: {name: [sigmoid, sft], loss_weights: [1, 0.2], beta: 0.5}")
    assert parse_config("dpo", ["--config", str(file)]).loss == expected
    for word in ("dpo,sft", "[dpo, sft]", '["sigmoid", "sft"]'):
        flags = ["--loss.name", word, "--loss.loss_weights", "[1, 0.2]", "--loss.beta", "0.5"]
        assert parse_config("dpo", flags).loss == expected
    with pytest.raises(UsageError, match=r"did you mean 'loss.loss_weights'"):
        parse_config("dpo", ["--loss.name", "dpo,sft", "--loss.weights", "[1, 2]"])
    with pytest.raises(UsageError, match=r"'dpo' is alone; name several first"):
        parse_config("dpo", ["--loss.loss_weights", "[1]"])
    objective = make_objective("dpo", expected)
    assert objective.name == ["dpo", "sft"] and objective.columns == ("ref_logps", "mean_lengths")
    assert not make_objective("dpo", {"name": ["cpo", "sft"]}).needs_reference
    with pytest.raises(ValueError, match=r"loss_weights: expected 2, one for each of dpo, sft; got \[1.0\]"):
        make_objective("dpo", {"name": ["dpo", "sft"], "loss_weights": [1.0]})
    with pytest.raises(ValueError, match=r"unknown keyword of loss 'dpo\+sft' 'lam'"):
        make_objective("dpo", {"name": ["dpo", "sft"], "lam": 1.0})


@pytest.mark.parametrize(
    "loss, words",
    [
        ({"name": "robust", "label_smoothing": 0.5}, r"robust: label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"name": "exo", "label_smoothing": 0.0}, r"exo: label_smoothing must be in \(0, 1\), got 0.0"),
        ({"name": "cdpo", "label_smoothing": -0.1}, r"cdpo: label_smoothing must be in \[0, 1\), got -0.1"),
        ({"name": "aot", "label_smoothing": 1.0}, r"aot: label_smoothing must be in \[0, 1\), got 1.0"),
        ({"name": "ipo", "beta": 0.0}, "loss.beta must be above 0, got 0.0"),
    ],
)
def test_settings_without_a_meaning_are_refused_before_any_work(loss, words):
    with pytest.raises(ValueError, match=words):
        make_objective("dpo", loss)


def test_methods_share_the_dict_of_losses():
    assert METHODS["dpo"].losses is preference.LOSSES  # not a copy: an entry added later must count
    assert torch.is_tensor(METHODS["sft"].losses["sft"](torch.zeros(1)))
