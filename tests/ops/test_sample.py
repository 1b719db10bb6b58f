"""Draws of tokens: noise, every backend against float64, frequencies, edges, and bits that do not depend on company."""

import pytest
import torch
from op_table import INTERPRETED, place
from test_determinism import LEVELS, settings

from fastalign import linear_logps, linear_loss, linear_sample, sample, sample_keys, token_logps, uniforms
from fastalign.ops import dispatch
from fastalign.ops.linear_sample import reference as linear_reference
from fastalign.ops.sample import Cut, mix, reference

pytestmark = pytest.mark.usefixtures("nan_memory")

BACKENDS = list(dispatch.available("sample"))
SLOW = {"triton"} if INTERPRETED else set()
"""Interpreted, a kernel takes a millisecond for a row: fewer rows, dtypes and cases."""
ALL, BELOW_ONE = {"cut": Cut(), "temperature": 1.0, "softcap": None, "logit_scale": 1.0}, 1 - 2.0**-53
SETTINGS = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "capped": {"softcap": 5.0, "temperature": 1.5},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7, "softcap": 20.0},
}


def noise_of(rows, seed=1, device="cpu"):
    """A key for each row and a position in its sequence."""
    numbers = torch.arange(rows, device=device)
    return sample_keys(seed, numbers // 4, numbers % 4), numbers


def logits_of(rows, vocab, dtype=torch.float32, device="cpu", spread=3.0, seed=0):
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    x[:, 1::5] = -torch.inf
    return x.to(device, dtype)


def drawn(backend, logits, noise, **changes):
    kernels = dispatch.kernels("sample", backend, logits.device, logits.dtype)
    return kernels.draw(logits, torch.as_tensor(noise, dtype=torch.float64), **{**ALL, **changes})[0].tolist()


# --- noise -----------------------------------------------------------------------------------------------------------


def splitmix64(x):
    """As published, in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_noise_is_that_of_the_published_generator():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the reference implementation for seed 0
    numbers = [0, 1, -1, 7, 2**62, -(2**63), 2**63 - 1]
    assert [x % 2**64 for x in mix(torch.tensor(numbers)).tolist()] == [splitmix64(x % 2**64) for x in numbers]
    for seed, row, number, position in [(0, 0, 0, 0), (1, 2, 3, 4), (-5, 10**9, 7, 4095), (2**64 + 3, 1, 0, 1)]:
        key = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ row) ^ number)
        keys = sample_keys(seed, torch.tensor([row]), torch.tensor([number]))
        assert keys.item() % 2**64 == key
        u = uniforms(keys, torch.tensor([position], dtype=torch.int32)).item()
        assert u == (splitmix64(key ^ splitmix64(position)) >> 11) / 2**53


def test_noise_has_these_values():
    """Runs that were sampled before must be sampled again: a change of this table breaks ``replay``."""
    keys = sample_keys(17, torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 0, 3]))
    assert keys.tolist() == KEYS
    assert uniforms(keys, torch.tensor([0, 1, 2, 100])).tolist() == UNIFORMS


KEYS = [201686943115110278, -2643844712039123370, 2875313244945324022, -6336890034005272732]
UNIFORMS = [0.49418202744565753, 0.030788593858354307, 0.8059659726826974, 0.7921601103299919]


def test_noise_of_neighbours_is_unrelated():
    keys, positions = noise_of(4000)
    u = torch.stack([uniforms(keys, positions * 0 + i) for i in range(4)])
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == u.numel()
    assert u.flatten().histc(10, 0, 1).sub(1600).abs().max() < 200  # 5 standard deviations
    assert torch.corrcoef(u).sub(torch.eye(4)).abs().max() < 0.08


FREQUENCIES = [
    (backend, case)
    for backend in BACKENDS
    if backend not in SLOW
    for case in (SETTINGS if backend != "torch" else ("cool", "all"))
]


# --- against float64 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", SETTINGS)
def test_tokens_and_statistics_match_float64(backend, dtype, case):
    device, rows = place(backend), 3 if backend in SLOW else 12
    if backend in SLOW and (case in ("top_k", "top_p", "min_p") or (dtype != torch.float32 and case != "capped")):
        pytest.skip("interpreted; truncated draws are PyTorch's there")
    for vocab in (1, 1025) if backend in SLOW else (1, 2, 507, 1024, 5003):
        logits, (keys, positions) = logits_of(rows, vocab, dtype, device), noise_of(rows, device=device)
        tokens, stats = sample(logits, keys, positions, **SETTINGS[case], backend=backend)
        expected, oracle = reference(logits, keys, positions, **SETTINGS[case])
        assert torch.equal(tokens, expected)  # of these seeds no noise lies within rounding of a boundary
        for name, value in vars(stats).items():
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert (value - getattr(oracle, name)).abs().max() < 1e-5, name
        if not {*SETTINGS[case]} & {"top_k", "top_p", "min_p"}:
            logps, entropy = token_logps(logits, tokens, entropy=True, backend=backend, **SETTINGS[case])
            assert torch.equal(stats.logps, logps) and torch.equal(stats.entropy, entropy)
            assert (stats.kept_mass == 1).all()


@pytest.mark.parametrize(("backend", "case"), FREQUENCIES)
def test_frequencies_match_probabilities(backend, case):
    """Chi-square of 1e5 draws: its mean is its degrees of freedom f, its standard deviation sqrt(2 f)."""
    draws, device = 100_000, place(backend)
    logits, (keys, positions) = logits_of(1, 64, device=device, spread=1.0), noise_of(draws, seed=3, device=device)
    tokens, stats = sample(logits.expand(draws, -1), keys, positions, **SETTINGS[case], backend=backend)
    p = torch.zeros(64, dtype=torch.float64, device=device)
    p[tokens] = stats.logps.double().exp()
    assert abs(p.sum() - 1) < 1e-3  # every token that is kept was drawn, but for the rarest
    counts, expected = tokens.bincount(minlength=64), p * draws
    often = expected > 5
    chi2, freedom = ((counts - expected)[often] ** 2 / expected[often]).sum().item(), int(often.sum()) - 1
    assert freedom > 4 and chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in SLOW])
def test_truncation_keeps_the_first_of_equal_logits(backend):
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]], device=place(backend)).expand(64, -1)
    for cut, kept in (
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.3}, {1, 2}),
        ({"min_p": 0.9}, {1, 2, 3}),
        ({"top_p": 1e-9}, {1}),
    ):
        keys, positions = noise_of(64, device=logits.device)
        tokens, stats = sample(logits, keys, positions, **cut, backend=backend)
        assert {*tokens.tolist()} == kept
        assert torch.allclose(stats.logps, -torch.full_like(stats.logps, len(kept)).log(), atol=1e-6)
        whole = token_logps(logits, tokens, backend=backend)
        assert torch.allclose(stats.logps + stats.kept_mass.log(), whole, atol=1e-6)


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_noise_falls_on_the_first_and_the_last_column_that_has_mass(backend):
    for vocab in (3, 512, 513, 1500):
        logits = torch.zeros(4, vocab, device=place(backend))
        logits[1, 0] = logits[1, -1] = logits[3] = -torch.inf
        logits[2, 1:], logits[3, vocab // 2] = -40, 7.0  # exp(-40) is small, but not nothing
        for u, expected in (0.0, [0, 1, 0, vocab // 2]), (BELOW_ONE, [vocab - 1, vocab - 2, None, vocab // 2]):
            found = drawn(backend, logits, [u] * 4)
            assert [x for x, y in zip(found, expected, strict=True) if y is not None] == [
                x for x in expected if x is not None
            ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_one_of_many_equal_columns_is_reached(backend):
    """fp32 sums would end at 2^24; here the columns of 2^24 equal logits all have their own piece of [0, 1)."""
    vocab = 1 << (24 if backend not in SLOW else 14)
    logits = torch.zeros(1, vocab, dtype=torch.bfloat16, device=place(backend))
    for column in (0, vocab // 3, vocab - 1):
        assert drawn(backend, logits, [(column + 0.5) / vocab]) == [column]
    assert drawn(backend, logits, [BELOW_ONE]) == [vocab - 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_vocabulary(backend):
    logits, (keys, positions) = logits_of(1, 152_064, device=place(backend)), noise_of(1, device=place(backend))
    for case in ("plain", "all"):
        tokens, _ = sample(logits, keys, positions, **SETTINGS[case], backend=backend)
        assert torch.equal(tokens, reference(logits, keys, positions, **SETTINGS[case])[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_zero_is_the_first_of_the_largest(backend, dtype):
    logits, (keys, positions) = logits_of(12, 507, dtype, place(backend)), noise_of(12, device=place(backend))
    logits[:4, 300], logits[:4, 20], logits[:4, 499] = 50, 50, 50
    greedy, stats = sample(logits, keys, positions, temperature=0, top_p=0.5, backend=backend)
    assert torch.equal(greedy, logits.float().argmax(-1)) and (greedy[:4] == 20).all() and (stats.kept_mass == 1).all()
    assert torch.equal(stats.logps, token_logps(logits, greedy, backend=backend))
    tau = torch.tensor([0.0, 0.7] * 6, device=logits.device)
    mixed, some = sample(logits, keys, positions, temperature=tau, backend=backend)
    warm, _ = sample(logits, keys, positions, temperature=torch.full_like(tau, 0.7), backend=backend)
    assert torch.equal(mixed, torch.where(tau == 0, greedy, warm)) and torch.allclose(some.logps[::2], stats.logps[::2])
    assert torch.equal(sample(logits[4:], keys[4:], positions[4:], temperature=1e-4, backend=backend)[0], greedy[4:])


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "all"])
def test_a_row_does_not_depend_on_its_company(backend, case):
    rows = 4 if backend in SLOW else 12
    logits, (keys, positions) = logits_of(rows, 1601, device=place(backend)), noise_of(rows, device=place(backend))

    def run(rows, x=logits):
        tokens, stats = sample(x[rows], keys[rows], positions[rows], **SETTINGS[case], backend=backend)
        return torch.stack([tokens.double(), *(value.double() for value in vars(stats).values())], 1)

    whole, order = run(slice(None)), torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([run([i]) for i in range(rows)]), whole)
    assert torch.equal(run(order), whole[order])
    strided = run(slice(None), logits.t().contiguous().t())
    assert torch.equal(strided[:, 0], whole[:, 0]) and (strided - whole).abs().max() < 1e-6
    for threads in (1, 2):
        with settings(threads=threads):
            assert torch.equal(run(slice(None)), whole) and torch.equal(run([3]), whole[3:4])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="cpp is not built")
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_draws_the_same_tokens(level):
    logits, (keys, positions) = logits_of(64, 2003), noise_of(64)
    for case, settings_of in SETTINGS.items():
        with settings(level=level):
            tokens, _ = sample(logits, keys, positions, **settings_of, backend="cpp")
        assert torch.equal(tokens, reference(logits, keys, positions, **settings_of)[0]), case


# --- from hidden states ----------------------------------------------------------------------------------------------


def head_of(rows, width, vocab, dtype=torch.float32, seed=0):
    new = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=new).to(dtype), torch.randn(vocab, width, generator=new).div(4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_few_rows_have_the_bits_of_a_training_batch(dtype, lora):
    hidden, weight = head_of(600, 128, 2053, dtype)
    wide = torch.mm(hidden, weight.t())
    if not all(torch.equal(torch.mm(hidden[:n], weight.t()), wide[:n]) for n in (12, 16, 33)):
        pytest.skip("this machine's matrix products depend on the number of rows")
    down, up = head_of(16, 128, 2053, dtype, seed=1)[0], head_of(1, 16, 2053, dtype, seed=2)[1]
    options = {"temperature": 0.7, "softcap": 30.0, "lora": (down, up, 0.5) if lora else None}
    keys, positions = noise_of(600)
    tokens, stats = linear_sample(hidden, weight, keys, positions, **options)
    trained = linear_loss(hidden, weight, tokens, lambda x: -x.logps.sum(), entropy=True, **options)[1]
    assert torch.equal(stats.logps, trained.logps) and torch.equal(stats.entropy, trained.entropy)
    for rows in range(1, 65):
        these = slice(500 - rows, 500)
        some, found = linear_sample(hidden[these], weight, keys[these], positions[these], **options)
        assert torch.equal(some, tokens[these]) and torch.equal(found.logps, trained.logps[these]), rows
        assert torch.equal(found.logps, linear_logps(hidden[these], weight, some, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["capped", "all"])
def test_draws_from_hidden_states_match_float64(backend, case):
    device = place(backend)
    hidden, weight = (x.to(device) for x in head_of(13, 24, 507))
    bias, keys, positions = torch.linspace(-1, 1, 507, device=device), *noise_of(13, device=device)
    lora = (hidden[:4] / 9, weight[:, :4].contiguous(), 0.5)
    options = {"bias": bias, "lora": lora, "logit_scale": 0.5, **SETTINGS[case]}
    expected, oracle = linear_reference(hidden, weight, keys, positions, **options)
    for memory in (None, 1):  # one chunk, and one for each row
        tokens, stats = linear_sample(hidden, weight, keys, positions, **options, memory=memory, backend=backend)
        assert torch.equal(tokens, expected)
        for name, value in vars(stats).items():
            assert (value - getattr(oracle, name)).abs().max() < 1e-5, name
    tau = torch.tensor([0.0] + [0.7] * 12, device=device)
    tokens, stats = linear_sample(hidden, weight, keys, positions, temperature=tau, backend=backend)
    assert torch.equal(tokens, linear_reference(hidden, weight, keys, positions, temperature=tau)[0])
    assert linear_sample(hidden[:0], weight, keys[:0], positions[:0], backend=backend)[0].shape == (0,)


def test_no_gradient_and_no_graph():
    hidden, weight = (x.requires_grad_() for x in head_of(3, 8, 50))
    for tokens, stats in (
        linear_sample(hidden, weight, *noise_of(3)),
        sample(torch.zeros(3, 5, requires_grad=True), *noise_of(3)),
    ):
        assert not tokens.requires_grad and not any(x.requires_grad for x in vars(stats).values())


# --- refusals --------------------------------------------------------------------------------------------------------

WRONG = {
    "keys must be [B] with B = 3 rows, got [2]": {"keys": torch.zeros(2, dtype=torch.int64)},
    "positions must be a [B] tensor of integers": {"positions": torch.zeros(3)},
    "temperature must be 0 (greedy) or positive, got -1": {"temperature": -1.0},
    "got -1 at row 2": {"temperature": torch.tensor([1.0, 0.0, -1.0])},
    "temperature must be a number or a floating [B]": {"temperature": torch.ones(2)},
    "top_k must be 0 (off) or a positive integer": {"top_k": -1},
    "top_p must lie in (0, 1], got 0": {"top_p": 0.0},
    "min_p must lie in [0, 1], got 2": {"min_p": 2.0},
    "softcap must be positive": {"softcap": 0.0},
    "backend 'cuda' is not available": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named_in_one_line(message):
    keys, positions = noise_of(3)
    for op, rows in (sample, (torch.zeros(3, 5),)), (linear_sample, head_of(3, 4, 5)):
        named = {"keys": keys, "positions": positions, **WRONG[message]}
        with pytest.raises(ValueError) as error:
            op(*rows, named.pop("keys"), named.pop("positions"), **named)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if place(name) == "cpu"])
@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "+inf"), (-torch.inf, "only -inf")])
def test_rows_without_a_distribution_are_refused(backend, value, word):
    logits, (keys, positions) = logits_of(3, 600), noise_of(3)
    logits[1, slice(None) if value == -torch.inf else 333] = value
    for cut in ({}, {"top_p": 0.9}, {"temperature": 0.0}):
        with pytest.raises(
            ValueError, match="no token can be drawn from row 1: its logits hold " + word.replace("+", r"\+")
        ):
            sample(logits, keys, positions, **cut, backend=backend)
