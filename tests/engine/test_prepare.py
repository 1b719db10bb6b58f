"""What losses read besides the policy's outputs: every column by its axis, filled before the first backward."""

from dataclasses import fields, replace

import pytest
import steps
import torch

from fastalign.engine import prepare
from fastalign.engine.forward import run_head
from fastalign.engine.methods import make_objective
from fastalign.engine.reference.frozen import reference_logps
from fastalign.losses import preference
from fastalign.losses.traits import Loss
from fastalign.models.groups import pick_sequences
from fastalign.types import AXES, Columns, TokenStats

SIZES = {"token": 7, "sequence": 4}


def random_columns(sizes: dict[str, int] = SIZES) -> Columns:
    return Columns(**{name: torch.rand(sizes[axis], dtype=torch.float64) for name, axis in AXES.items()})


def test_every_column_has_an_axis():
    assert list(AXES) == [f.name for f in fields(Columns)] and set(AXES.values()) == set(SIZES)
    assert set(prepare.FILL) <= set(AXES)
    assert Columns().known() == {} and set(random_columns().known()) == set(AXES)


@pytest.mark.parametrize("name", AXES)
def test_every_column_is_packed_moved_and_cut_by_its_axis(name):
    one, other = random_columns(), random_columns({"token": 2, "sequence": 3})
    values, axis = getattr(one, name).tolist(), AXES[name]
    joined = Columns.join([one, other])
    assert getattr(joined, name).tolist() == values + getattr(other, name).tolist()
    assert getattr(Columns.join([one, Columns()]), name) is None, "not known of all"
    assert getattr(one.map(lambda x: x.to("meta")), name).is_meta

    rows, sequences = torch.tensor([2, 3, 6]), torch.tensor([1, 2])
    stats = TokenStats(torch.zeros(3), rows, sequences=sequences, cu_seqlens=torch.tensor([0, 2, 3]))
    chosen = [values[i] for i in (rows if axis == "token" else sequences)]
    assert getattr(one.at(stats), name).tolist() == chosen
    tokens_alone = getattr(one.at(replace(stats, sequences=None)), name)
    assert tokens_alone.tolist() == chosen if axis == "token" else tokens_alone is None
    assert getattr(one.pick({axis: slice(1, 3)}), name).tolist() == values[1:3]


@pytest.mark.parametrize(
    ("method", "loss", "column"),
    [
        ("sft", "sft", "weights"),
        ("dpo", "dpo", "ref_logps"),
        ("dpo", "simpo", "example_weights"),
        ("kto", "bco", "baseline"),
    ],
)
def test_a_column_that_was_not_filled_is_refused(method, loss, column):
    models, objective = steps.make_models(method), make_objective(method, {"name": loss})
    (batch,) = steps.packed(steps.make_examples(method, loss), 10**6, True)
    sizes = {"token": batch.num_scored, "sequence": batch.num_sequences}
    known = {name: torch.ones(sizes[axis]) for name, axis in AXES.items() if name not in (column, "scores")}
    with pytest.raises(ValueError, match=f"^{loss} reads the column {column} of the batch, which was not filled"):
        run_head(models, batch.fill(**known), objective)


def test_a_loss_names_the_columns_that_it_reads(monkeypatch):
    """Every filler is asked for by some loss, in the order of the names; an unknown name is refused at once."""
    asked = {name for method in steps.METHODS.values() for loss in method.losses.values() for name in loss.columns}
    assert asked | set(make_objective("ppo", {}).columns) == set(prepare.FILL)
    assert make_objective("dpo", {"name": ["aot", "orpo"]}).columns == ("ref_logps", "rank_margins", "mean_lengths")
    monkeypatch.setitem(preference.LOSSES, "mine", Loss(preference.dpo, columns=("rank_margin",)))
    wrong = "loss mine reads the column 'rank_margin'.*rank_margins.*, which nothing fills"
    with pytest.raises(ValueError, match=wrong):
        make_objective("dpo", {"name": "mine"})


def test_one_sequence_of_each_group_stands_alone():
    """The mismatched completions, cut out of the row in which a reference reads them beside the batch's own."""
    models, examples = steps.make_models("kto"), steps.make_examples("kto", "kto")
    (batch,) = steps.packed(examples, 10**6, True)
    (alone,) = steps.packed([example.mismatched for example in examples], 10**6, False)
    companion = batch.companion.fill(ref_logps=torch.arange(float(batch.companion.num_scored)))
    other, own = (pick_sequences(companion, slice(first, None, 2)) for first in (1, 0))
    for name in ("input_ids", "position_ids", "labels", "cu_seqlens"):
        assert torch.equal(getattr(other, name), getattr(alone, name)), name
    assert own.num_sequences == other.num_sequences == len(examples) and own.cu_groups.tolist() == list(range(8))
    both = torch.cat([own.columns.ref_logps, other.columns.ref_logps]).sort().values
    assert torch.equal(both, companion.columns.ref_logps)
    objective = make_objective("kto", {"name": "kto"})
    got, want = (reference_logps(models.policy, one, objective) for one in (other, alone))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
