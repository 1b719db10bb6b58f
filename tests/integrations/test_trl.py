"""TRL's own trainers with and without the patch: equal losses, gradients and metrics; the patch leaves no trace."""

import pytest
import torch
from wanted import require

require("trl", "1.16")

import trl_runs  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fastalign.integrations import trl as ours  # noqa: E402
from fastalign.integrations._fields import SOFTCAP_ELEMENTS, Scaling, head_fields  # noqa: E402
from fastalign.integrations.trl import head  # noqa: E402
from fastalign.models.head import Head  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
THEIRS = utils._ChunkedLogProbFunction, utils._use_triton
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def in_place():
    return utils._ChunkedLogProbFunction, utils._use_triton


@pytest.fixture(autouse=True)
def no_trace():
    yield
    assert in_place() == THEIRS


@pytest.mark.parametrize("name", trl_runs.CASES)
def test_losses_gradients_and_metrics_are_trls_over_several_steps(name, plain_run, tmp_path, monkeypatch):
    plain = plain_run(name)
    rows = []
    monkeypatch.setattr(head, "head_fields", lambda *args: rows.append(len(args[0])) or head_fields(*args))
    with ours.patch():
        patched = trl_runs.losses_of(name, tmp_path)
    assert len(rows) >= trl_runs.STEPS and len(patched) == trl_runs.STEPS
    trl_runs.assert_equal_runs(plain, patched)


def test_only_scored_rows_are_projected(tmp_path, monkeypatch):
    rows, counts = [], []
    monkeypatch.setattr(head, "head_fields", lambda *args: rows.append(len(args[0])) or head_fields(*args))
    monkeypatch.setattr(utils, "FusedCausalLMOutput", counting(counts, utils.FusedCausalLMOutput))
    with ours.patch():
        trl_runs.losses_of("dpo", tmp_path)
    assert rows == counts and min(rows) > 0


def counting(counts, output):
    def make(**fields):
        counts.append(int(fields["label_mask"].sum()))
        assert counts[-1] < fields["label_mask"].numel()
        return output(**fields)

    return make


def test_the_patch_ends_with_its_block_and_on_errors():
    with pytest.raises(KeyError, match="inside"), ours.patch():
        assert in_place() != THEIRS
        raise KeyError("inside")
    assert in_place() == THEIRS


def test_patches_nest_in_any_order():
    first, second = ours.patch(), ours.patch()
    first.undo()
    first.undo()
    assert in_place() != THEIRS
    with ours.patch(), second:
        pass
    assert in_place() == THEIRS


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "2.0", "1.160"])
def test_other_versions_are_refused_in_one_line(found, monkeypatch):
    monkeypatch.setattr(head.metadata, "version", lambda _: found)
    with pytest.raises(ValueError, match=rf"^fastalign.* supports trl 1\.16\.\*, found {found}: pip install"):
        ours.patch()


def test_an_absent_trl_is_named(monkeypatch):
    def absent(_):
        raise head.metadata.PackageNotFoundError

    monkeypatch.setattr(head.metadata, "version", absent)
    with pytest.raises(ValueError, match="found none"):
        ours.patch()


def test_a_partitioned_head_is_refused():
    weight = torch.nn.Parameter(torch.zeros(0))
    weight.ds_id = 7
    with pytest.raises(ValueError, match="ZeRO-3"):
        head.fused_head(torch.ones(1, 2), weight, None, torch.zeros(1, dtype=torch.int64), 1.0, 32768)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
def test_fields_are_those_of_the_logits(softcap, biased):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(7, 5), torch.randn(13, 5), torch.arange(7)
    bias = torch.randn(13) if biased else None
    z = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double()) * 0.7
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.9
    labels[:3] = z[:3].argmax(-1)
    p = z.softmax(-1)
    logps, entropy, sum_sq, mean, top1 = head_fields(
        hidden, Head(weight, bias), labels, Scaling(0.9, softcap, 0.7), ALL
    )
    expected = {
        "logps": (logps, p.log().gather(1, labels[:, None])[:, 0]),
        "entropy": (entropy, -(p * p.log()).sum(-1)),
        "log_sum_sq_probs": (sum_sq, p.square().sum(-1).log()),
        "mean_logits": (mean, z.mean(-1)),
    }
    for name, (found, exact) in expected.items():
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6, msg=name)
    assert torch.equal(top1, z.argmax(-1) == labels) and top1[:3].all()


def test_of_equal_logits_the_first_is_the_choice():
    hidden, labels = torch.randn(13, 5), torch.arange(13)
    *_, top1 = head_fields(hidden, Head(torch.zeros(13, 5)), labels, Scaling(), ("is_top1",))
    assert top1.tolist() == [True] + [False] * 12, "as in TRL's argmax"


def test_fields_that_nobody_wants_are_none():
    fields = head_fields(torch.ones(2, 3), Head(torch.ones(4, 3)), torch.zeros(2, dtype=torch.int64), Scaling(), ())
    assert [x is None for x in fields] == [False, True, True, True, True]


def test_means_under_a_softcap_are_taken_block_by_block(monkeypatch):
    hidden, weight = torch.randn(9, 5), torch.randn(13, 5)
    whole = head_fields(hidden, Head(weight), torch.zeros(9, dtype=torch.int64), Scaling(1.0, 2.0), ALL)[3]
    assert SOFTCAP_ELEMENTS > 26
    monkeypatch.setattr("fastalign.integrations._fields.SOFTCAP_ELEMENTS", 26)
    blocks = head_fields(hidden, Head(weight), torch.zeros(9, dtype=torch.int64), Scaling(1.0, 2.0), ALL)[3]
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=1e-6)


def test_a_wider_hidden_state_widens_the_head():
    # TRL's cast_lm_head_to_fp32 gives fp32 hidden states and a bf16 head, and wants products in fp32.
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 64, requires_grad=True), torch.randn(17, 64).bfloat16().requires_grad_()
    logps, *_ = head_fields(hidden, Head(weight), torch.arange(6), Scaling(), ())
    logps.sum().backward()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, torch.arange(6)[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=1e-5)
    assert weight.grad.dtype == torch.bfloat16 and hidden.grad.dtype == torch.float32
