"""Deliberate faults in the Triton and C++ kernels; see ``mutants.py``."""

from mutants import Mutant, matrix

TRITON = matrix("test_token_logps and triton and float32 and 252")
TRITON_POLICY = matrix("test_op and policy and triton and float32")
TRITON_STREAMS = "ops/test_divergence.py -k 'test_matches_float64 and triton and float32'"
ROWS = "kernels/fastalign_kernels/rows.py"
TOKEN_LOGPS = "kernels/fastalign_kernels/token_logps.py"
FUNCTORS = "kernels/fastalign_kernels/functors.py"
TILES = "kernels/fastalign_kernels/divergence_tiles.py"
SCAN = "kernels/fastalign_kernels/scan.py"

IN_TRITON = [
    Mutant(
        "triton: start the running maximum at 0",
        TOKEN_LOGPS,
        'm = tl.full((COLS,), float("-inf"), dtype)',
        "m = tl.full((COLS,), 0.0, dtype)",
        "ops/test_pitfalls.py -k 'test_02 and triton'",
        quick=True,
    ),
    Mutant("triton: count the padding of the last tile", ROWS, 'z = tl.where(mask, z, float("-inf"))', "z = z", TRITON),
    Mutant(
        "triton: skip the last column tile",
        TOKEN_LOGPS,
        "range(whole, vocab_size, COLS):\n            mask = start",
        "range(whole, vocab_size - COLS, COLS):\n            mask = start",
        "ops/test_pitfalls.py -k 'test_02 and triton'",
    ),
    Mutant("triton: drop 1/temperature", ROWS, "inner = scale / tau", "inner = scale", TRITON),
    Mutant(
        "triton: lose the softcap's slope",
        ROWS,
        "slope = inner * outer * (1 - tanh) * (1 + tanh)",
        "slope = inner * outer",
        TRITON,
    ),
    Mutant("triton: drop the mask", TOKEN_LOGPS, "if label != IGNORE:", "if label != IGNORE + 1:", TRITON),
    Mutant(
        "triton: drop the target term",
        ROWS,
        "return tl.where(col == target, at_label, dz * slope)",
        "return dz * slope",
        TRITON,
        quick=True,
    ),
    Mutant(
        "triton: the entropy's gradient loses its floor",
        ROWS,
        "coefficient += beta * tl.maximum(log_p, FLOOR)",
        "coefficient += beta * log_p",
        "ops/test_triton.py -k test_banned_columns",
    ),
    Mutant(
        "triton: flip the sign of the entropy's gradient",
        ROWS,
        "coefficient += beta * tl.maximum(log_p, FLOOR)",
        "coefficient -= beta * tl.maximum(log_p, FLOOR)",
        TRITON,
    ),
    Mutant(
        "triton: form p - 1 in bf16",
        ROWS,
        "- g * _expm1(log_p)",
        "- g * (_exp(log_p).to(tl.bfloat16).to(log_p.dtype) - 1)",
        "ops/test_pitfalls.py -k 'test_08_a_confident and triton'",
    ),
    Mutant(
        "triton: lanes keep their own maxima",
        ROWS,
        "norm = _sum_lanes(s * decay, LOG_COLS)",
        "norm = _sum_lanes(s, LOG_COLS)",
        TRITON,
    ),
    Mutant(
        "triton: the total forgets that the maximum rose",
        ROWS,
        "u += num_seen * tl.maximum(shift, LOWEST)",
        "u += 0 * num_seen",
        "ops/test_rows.py -k 'test_total and triton and float32'",
    ),
    Mutant(
        "triton: a label outside the vocabulary reads on",
        TOKEN_LOGPS,
        'tl.where(inside, (target - top) - logsum, float("nan"))',
        "(target - top) - logsum",
        "ops/test_triton.py -k test_a_bad_label",
    ),
    Mutant(
        "triton: a tie with an earlier column is a hit",
        ROWS,
        "return hit & (tl.max(earlier, 0) == 0)",
        "return hit",
        "ops/test_top1.py -k 'near_and_far and triton and float32'",
        quick=True,
    ),
    Mutant(
        "triton: a tie is sought in the first tile alone",
        ROWS,
        "for start in range(0, tl.where(hit, label, 0).to(tl.int32), COLS):",
        "for start in range(0, tl.where(hit, 1, 0).to(tl.int32), COLS):",
        "ops/test_top1.py -k 'near_and_far and triton and float32'",
    ),
    Mutant(
        "triton: clip the wrong side",
        FUNCTORS,
        "low = (advantage < 0) & (ratio < low_bound)",
        "low = (advantage > 0) & (ratio < low_bound)",
        TRITON_POLICY,
    ),
    Mutant(
        "triton: flip the sign of k3's slope",
        FUNCTORS,
        "slope = tl.where(inside, -tl.where(near, x + series, change), 0.0)",
        "slope = tl.where(inside, tl.where(near, x + series, change), 0.0)",
        TRITON_POLICY,
    ),
    Mutant(
        "triton: streams moved without each other",
        TILES,
        "w = tl.where(decay > 0, (w + s * shift) * decay, 0.0) + tl.sum(share, 0)",
        "w = tl.where(decay > 0, w * decay, 0.0) + tl.sum(share, 0)",
        TRITON_STREAMS,
    ),
    Mutant(
        "triton: the mixture's weights swapped",
        TILES,
        "far = tl.where(gap > 0, 1 - mix, mix)",
        "far = tl.where(gap > 0, mix, 1 - mix)",
        TRITON_STREAMS,
    ),
    Mutant(
        "triton: a scan forgets what the block before carried",
        SCAN,
        "y = b + a * carry",
        "y = b",
        "ops/test_scan.py -k 'test_values and triton and float32'",
    ),
    Mutant(
        "triton: a scan reads the decay beyond the segment",
        SCAN,
        "linked = inside & (step > 0)\n        if REVERSE:",
        "linked = inside\n        if REVERSE:",
        matrix("test_op and segment_scan and triton and float32"),
        quick=True,
    ),
    Mutant(
        "triton: gae bootstraps every token",
        SCAN,
        "following = tl.where(linked, tl.load(values_ptr + position + 1, mask=linked, other=0.0), last)",
        "following = tl.load(values_ptr + position + 1, mask=linked, other=0.0) + last",
        matrix("test_op and gae and triton and float32"),
    ),
]

NATIVE = matrix("test_token_logps and cpp and float32")
WIDE = "ops/test_cpp.py -k 'test_agrees and scalar and 32001'"
NATIVE_POLICY = matrix("test_op and policy and cpp and float32")
NATIVE_STREAMS = "ops/test_divergence.py -k 'test_matches_float64 and cpp and float32'"
NATIVE_SCAN = matrix("test_op and segment_scan and cpp and float32")
NATIVE_GAE = matrix("test_op and gae and cpp and float32")

IN_CPP = [
    Mutant(
        "c++: drop the mask",
        "csrc/cpu/rows.h",
        "if (label == kIgnored) return write_row(op, row, 0, {0, 0, 0, 0, 0}, false);",
        "",
        NATIVE,
        ("token_logps",),
    ),
    Mutant(
        "c++: count the padding of the last vector",
        "csrc/cpu/rows.h",
        "keep(transform(load(x + v, left)), left, -kInfinity)",
        "transform(load(x + v, left))",
        NATIVE,
        ("token_logps",),
    ),
    Mutant(
        "c++: start the running maximum at 0",
        "csrc/cpu/rows.h",
        "vec top = set(-kInfinity), base = set(0.0f)",
        "vec top = set(0.0f), base = set(0.0f)",
        "ops/test_pitfalls.py -k 'test_02 and cpp'",
        ("token_logps",),
    ),
    Mutant(
        "c++: lose the softcap's slope",
        "csrc/cpu/rows.h",
        "return form == Form::capped ? d * z.slope : d;",
        "return d;",
        NATIVE,
        ("token_logps",),
    ),
    Mutant(
        "c++: slabs keep their own maxima in the entropy",
        "csrc/cpu/rows.h",
        "weighted += factor * (partials[k].weighted + partials[k].sum * shift);",
        "weighted += factor * partials[k].weighted;",
        WIDE,
        ("token_logps",),
    ),
    Mutant(
        "c++: the total forgets that the maximum rose",
        "csrc/cpu/rows.h",
        "if (total && columns) lift += double(columns) * (double(max) - higher);",
        "",
        "ops/test_rows.py -k 'test_total and cpp and float32'",
        ("token_logps",),
    ),
    Mutant(
        "c++: form p - 1 with the eight bits of bf16",
        "csrc/cpu/rows.h",
        "double d = -g * ::expm1(x)",
        "double d = -g * (::round(p * 256) / 256 - 1)",
        "ops/test_pitfalls.py -k 'test_08_a_confident and cpp'",
        ("token_logps",),
    ),
    Mutant(
        "c++: drop the target term",
        "csrc/cpu/rows.h",
        "if (labelled) store(",
        "if (false) store(",
        NATIVE,
        ("token_logps",),
    ),
    Mutant(
        "c++: a tie within the group of the first is a hit",
        "csrc/cpu/rows.h",
        "return max_lane(largest) < s.max;",
        "return true;",
        "ops/test_top1.py -k 'near_and_far and cpp and float32'",
        ("token_logps",),
    ),
    Mutant(
        "c++: a tie with an earlier slab is a hit",
        "csrc/cpu/rows.h",
        "if (partials[k].max > max) max = partials[k].max",
        "if (partials[k].max >= max) max = partials[k].max",
        "ops/test_top1.py -k 'near_and_far and cpp and float32'",
        ("token_logps",),
    ),
    Mutant(
        "c++: the group of the first is forgotten",
        "csrc/cpu/rows.h",
        "    first = columns;\n",
        "",
        "ops/test_top1.py -k 'near_and_far and cpp and float32'",
        ("token_logps",),
    ),
    Mutant(
        "c++: clip the wrong side",
        "csrc/cpu/functors.h",
        "bool low = t.advantage < 0 && t.ratio < op.ratio_low;",
        "bool low = t.advantage > 0 && t.ratio < op.ratio_low;",
        NATIVE_POLICY,
        ("policy_loss",),
    ),
    Mutant(
        "c++: flip the sign of k3's slope",
        "csrc/cpu/functors.h",
        "inside ? -change : 0",
        "inside ? change : 0",
        NATIVE_POLICY,
        ("policy_loss",),
    ),
    Mutant(
        "c++: streams moved without each other",
        "csrc/cpu/divergence.cpp",
        "float shift = (base_of(a_max) - base_of(a_higher)) - (base_of(b_max) - base_of(b_higher));",
        "float shift = base_of(a_max) - base_of(a_higher);",
        NATIVE_STREAMS,
        ("divergence",),
    ),
    Mutant(
        "c++: the backward scan takes the wrong token's decay",
        "csrc/cpu/scan.cpp",
        "decay(t - 1) * carry",
        "decay(t) * carry",
        NATIVE_SCAN,
        ("scan",),
        quick=True,
    ),
    Mutant(
        "c++: gae never moves on to the next value", "csrc/cpu/scan.cpp", "next = value;", "", NATIVE_GAE, ("scan",)
    ),
    Mutant(
        "c++: segments one token short",
        "csrc/cpu/scan.cpp",
        "f(i, segments.offsets[i], segments.offsets[i + 1]);",
        "f(i, segments.offsets[i], segments.offsets[i + 1] - 1);",
        NATIVE_SCAN,
        ("scan",),
    ),
]
