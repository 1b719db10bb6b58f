"""The table of public ops: examples by case, a call, a definition. A new op is one entry of OPS.

Used by the matrix of backends (``test_backends.py``) and by ``test_determinism.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from fastalign import ops
from fastalign.losses.preference import LOSSES as PAIR_LOSSES
from fastalign.ops import dispatch
from fastalign.ops.attention import reference as attention_reference
from fastalign.ops.divergence import reference as divergence_reference
from fastalign.ops.forest_decode import Forest
from fastalign.ops.forest_decode import reference as decode_reference
from fastalign.ops.functors import FUNCTORS, Knobs
from fastalign.ops.linear_divergence import reference as linear_divergence_reference
from fastalign.ops.linear_logps import reference as linear_reference
from fastalign.ops.policy_loss import reference as policy_reference
from fastalign.ops.preference_loss import reference as preference_reference
from fastalign.ops.scan import gae_reference
from fastalign.ops.scan import reference as scan_reference
from fastalign.ops.token_logps import reference as token_reference
from fastalign.testing import (
    Example,
    attention_example,
    linear_example,
    logits_example,
    pairs_example,
    policy_example,
    scan_example,
    two_stream_example,
)

BACKENDS = ["torch", "cpp", "triton", "cuda"]
HERE = [name for name in BACKENDS if not dispatch.missing(name)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"


def serving(op):
    """The backends of an op that are usable here."""
    return [backend for backend in HERE if backend in dispatch.backends(op)]


def place(backend):
    """CUDA kernels want CUDA tensors, native ones want them on the CPU."""
    return "cpu" if backend == "cpp" else DEVICE


@dataclass(frozen=True)
class Op:
    """A column of the matrix: examples by case for a number of rows and a dtype, the op, its definition.

    Both return outputs by name; the op is told its backend. ``factor`` is what it may err more than eager: in fp32 more
    than 2 where few differences of log-probs, or one large ratio, decide which of the two was lucky.
    """

    cases: dict[str, Callable[[int, torch.dtype], Example]]
    run: Callable[[Example, str], dict]
    define: Callable[[Example], dict]
    backends: list[str]
    factor: float = 2.0


def given(x):
    return {**x.tensors, **x.constants, **x.options}


def chosen(cases, **choices):
    """Example makers for every case and every choice of each option, named by them."""

    def maker(make, picked, num_rows, dtype):
        x = make(num_rows, dtype)
        return replace(x, options={**x.options, **picked})

    named = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    return {
        "-".join([case, *(str(getattr(getattr(v, "fn", v), "__name__", v)) for v in picked.values())]): partial(
            maker, make, picked
        )
        for case, make in cases.items()
        for picked in named
    }


def plain_value(op):
    return lambda x, backend: {"value": op(**given(x), backend=backend)}


STREAMS = ("plain", "masked", "softcap", "row_temperature", "level", "everything")
LOGITS_STREAMS = {case: lambda rows, dtype, case=case: two_stream_example(case, rows, 507, dtype) for case in STREAMS}
HIDDEN_STREAMS = {
    case: lambda rows, dtype, case=case: two_stream_example(case, rows, 252, dtype, width=37)
    for case in ("plain", "everything")
}
KINDS = ["forward_kl", "reverse_kl", "jsd"]


def run_policy_loss(x, backend):
    loss, stats = ops.policy_loss(**given(x), backend=backend)
    return {"loss": loss, "logps": stats.logps}


def define_policy_loss(x):
    rows = {name: x.options.get(name) for name in ("weights", "advantages", "old_logps", "ref_logps")}
    scaling = {name: x.options[name] for name in ("temperature", "softcap") if name in x.options}
    coefs = (x.options.get("kl_coef", 0.0), x.options.get("entropy_coef", 0.0))
    knobs = Knobs(0.8, 1.2, float("inf"), 1.0, 1.05, *coefs)
    settings = {"loss": x.options["loss"], "kl_estimator": x.options.get("kl_estimator", "k3"), "knobs": knobs}
    loss = policy_reference(*x.tensors.values(), x.options["labels"], *rows.values(), **settings, **scaling)
    logps, _ = token_reference(*x.tensors.values(), x.options["labels"], **scaling)
    return {"loss": loss, "logps": logps.detach()}


def policy_case(num_rows, dtype, case, loss, **coefs):
    x = policy_example(case, num_rows, 252, dtype)
    rows = {"advantages": None} if loss == "sft" else {}
    return replace(x, options={**x.options, **rows, "loss": loss, **coefs})


POLICIES = {f"{loss}-plain": partial(policy_case, case="plain", loss=loss) for loss in FUNCTORS}
POLICIES |= {
    f"{loss}-everything": partial(policy_case, case="everything", loss=loss, kl_coef=0.3, entropy_coef=0.1)
    for loss in FUNCTORS
}
POLICIES["ppo-k2"] = partial(policy_case, case="masked", loss="ppo", kl_coef=0.3, kl_estimator="k2")
PAIRS = {case: lambda _, dtype, case=case: pairs_example(case, 507, dtype) for case in ("plain", "everything")}
SCANS = {
    name: lambda _, dtype, decay=decay: scan_example(decay, dtype)
    for name, decay in {"sums": 1.0, "discount": 0.93, "per_token": None}.items()
}


def gae_case(_, dtype, bootstrap):
    x = scan_example(1.0, dtype, ("rewards", "values"))
    last = torch.linspace(-1, 1, len(x.options["cu_seqlens"]) - 1) if bootstrap else None
    return replace(x, options={"cu_seqlens": x.options["cu_seqlens"], "gamma": 0.99, "lam": 0.95, "last_values": last})


def both(result):
    return dict(zip(("advantages", "returns"), result, strict=True))


def statistics(result):
    return dict(zip(("logps", "entropy", "lse"), (x for x in result if x is not None), strict=False))


def richest(case, make, *sizes):
    """Examples of the case with every option, the labels among them."""

    def maker(num_rows, dtype):
        x = make(case, num_rows, *sizes, dtype)
        return replace(x, options={**x.options, "labels": x.labels})

    return {case: maker}


def surrogate(stats):
    return (stats.logps.square() + stats.entropy.sin()).sum()


def run_linear_loss(x, backend):
    loss, stats = ops.linear_loss(**given(x), loss_fn=surrogate, backend=backend)
    return {"loss": loss, "logps": stats.logps, "entropy": stats.entropy}


def define_linear_loss(x):
    logps, entropy = linear_reference(**given(x))
    return {"loss": (logps.square() + entropy.sin()).sum(), "logps": logps.detach(), "entropy": entropy.detach()}


PROMPTS, PROMPT_OF, NUM_OWN = (5, 16, 18), [2, 0, 1, 2], 1
"""Prompts shorter and longer than a block and as long; rows of each, in no order, and the tokens they already have."""


def decode_case(_, dtype, heads, key_heads, size, **options):
    new, num_rows = torch.Generator().manual_seed(0), len(PROMPT_OF)
    counts = {"q": (num_rows, heads), "k": (num_rows, key_heads), "v": (num_rows, key_heads)}
    tensors = {name: torch.randn(*shape, size, generator=new).to(dtype) for name, shape in counts.items()}
    past = {name: torch.randn(sum(PROMPTS) + NUM_OWN * num_rows, key_heads, size, generator=new) for name in ("k", "v")}
    return Example(
        tensors, torch.zeros(num_rows), options, constants={f"past_{n}": x.to(dtype) for n, x in past.items()}
    )


def past_of(x):
    """Keys and values of the prompts, back to back, and of each row's own tokens ``[NUM_OWN, B, K, d]``."""
    whole = [x.constants["past_k"], x.constants["past_v"]]
    prompts = [part[: sum(PROMPTS)] for part in whole]
    return prompts, [part[sum(PROMPTS) :].unflatten(0, (NUM_OWN, -1)) for part in whole]


@torch.no_grad()
def run_forest_decode(x, backend):
    (q, k, v), (prompts, own) = x.tensors.values(), past_of(x)
    forest = Forest(1, *k.shape[1:], k.dtype, k.device)
    ids = forest.add_prompts(PROMPTS)
    forest.write_prompts(0, ids, *prompts)
    rows = [forest.add_row(ids[i]) for i in PROMPT_OF]
    for new in (*zip(*own, strict=True), (k, v)):
        step = forest.step(rows)
        out = ops.forest_decode(q, *new, forest, 0, step, **x.options, backend=backend)
        forest.advance(step)
    return {"out": out}


@torch.no_grad()
def define_forest_decode(x):
    (q, *new), (prompts, own) = x.tensors.values(), past_of(x)
    whole = [
        [torch.cat([past.split(PROMPTS)[i], tokens[:, row], last[row : row + 1]]) for row, i in enumerate(PROMPT_OF)]
        for past, tokens, last in zip(prompts, own, new, strict=True)
    ]
    return {"out": decode_reference(q, *whole, scale=q.shape[-1] ** -0.5, **x.options)}


HEADS = {"one_head": (1, 1, 3), "grouped": (6, 3, 16)}
OPS = {
    "token_logps": Op(
        richest("objectives", logits_example, 507),
        lambda x, backend: statistics(ops.token_logps(**given(x), backend=backend)),
        lambda x: statistics(token_reference(**given(x))),
        HERE,
    ),
    "linear_logps": Op(
        richest("everything", linear_example, 37, 252),
        lambda x, backend: statistics(ops.linear_logps(**given(x), backend=backend)),
        lambda x: statistics(linear_reference(**given(x))),
        HERE,
    ),
    "linear_loss": Op(richest("everything", linear_example, 37, 252), run_linear_loss, define_linear_loss, HERE),
    "divergence": Op(
        chosen(LOGITS_STREAMS, kind=KINDS),
        plain_value(ops.divergence),
        lambda x: {"value": divergence_reference(**given(x))},
        serving("divergence"),
        factor=3.0,
    ),
    "linear_divergence": Op(
        chosen(HIDDEN_STREAMS, kind=KINDS),
        plain_value(ops.linear_divergence),
        lambda x: {"value": linear_divergence_reference(**given(x))},
        serving("linear_divergence"),
        factor=3.0,
    ),
    "policy_loss": Op(POLICIES, run_policy_loss, define_policy_loss, HERE, factor=4.0),
    "preference_loss": Op(
        chosen(PAIRS, loss_fn=[PAIR_LOSSES[name] for name in ("dpo", "ipo", "simpo")]),
        lambda x, backend: {"loss": ops.preference_loss(**given(x), backend=backend)[0]},
        lambda x: {"loss": preference_reference(**given(x))},
        HERE,
    ),
    "segment_scan": Op(
        SCANS,
        lambda x, backend: {"y": ops.segment_scan(**given(x), backend=backend)},
        lambda x: {"y": scan_reference(**given(x))},
        serving("segment_scan"),
    ),
    "gae": Op(
        {name: partial(gae_case, bootstrap=name == "bootstrap") for name in ("ended", "bootstrap")},
        lambda x, backend: both(ops.gae(**given(x), backend=backend)),
        lambda x: both(gae_reference(**given(x))),
        serving("gae"),
    ),
    "packed_attention": Op(
        {name: lambda _, dtype, heads=heads: attention_example(*heads, dtype) for name, heads in HEADS.items()},
        lambda x, backend: {"out": ops.packed_attention(**given(x), backend=backend)},
        lambda x: {"out": attention_reference(**given(x))},
        list(dispatch.ATTENTION),
    ),
    "forest_decode": Op(
        {
            **{name: partial(decode_case, heads=a, key_heads=b, size=c) for name, (a, b, c) in HEADS.items()},
            "softcap": partial(decode_case, heads=4, key_heads=2, size=24, softcap=2.0),
        },
        run_forest_decode,
        define_forest_decode,
        serving("forest_decode"),
    ),
}

RICHEST = {"token_logps": "objectives", "segment_scan": "per_token", "gae": "bootstrap", "packed_attention": "grouped"}
RICHEST["forest_decode"] = "softcap"


def example_of(name, dtype, backend, num_rows=11):
    """The case of an op that has every option."""
    cases = OPS[name].cases
    case = RICHEST.get(name) or next(case for case in cases if "everything" in case)
    return cases[case](num_rows, dtype).on(place(backend))
