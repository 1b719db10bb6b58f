"""Deliberate faults in losses, scans, attention and packing; see ``mutants.py``."""

from mutants import Mutant, matrix

POLICY = matrix("test_op and policy and float32")
FUNCTORS = "fastalign/ops/functors.py"

LOSSES = [
    Mutant(
        "policy_loss: clip the wrong side",
        FUNCTORS,
        "low = negative & (ratio < knobs.ratio_low)",
        "low = positive & (ratio < knobs.ratio_low)",
        POLICY,
        quick=True,
    ),
    Mutant(
        "policy_loss: flip the sign of k3's slope",
        FUNCTORS,
        "torch.where(clamped == y, -change,",
        "torch.where(clamped == y, change,",
        POLICY,
    ),
    Mutant(
        "policy_loss: k2 for its own square", FUNCTORS, "return y.square() / 2, -y", "return y.square(), -2 * y", POLICY
    ),
    Mutant(
        "policy_loss: leave the weight out of the KL",
        FUNCTORS,
        "total + weights * knobs.kl_coef * kl, g + weights * knobs.kl_coef * kl_slope",
        "total + knobs.kl_coef * kl, g + knobs.kl_coef * kl_slope",
        POLICY,
    ),
    Mutant(
        "policy_loss: let a clamped ratio keep its gradient",
        FUNCTORS,
        "inside = ~(log_ratio.abs() > LARGEST_LOG_RATIO)",
        "inside = log_ratio == log_ratio",
        "ops/test_policy_loss.py -k 'test_log_ratios_are_clamped and not cpp and not triton'",
    ),
    Mutant(
        "policy_loss: a clip acts on its boundary",
        FUNCTORS,
        "(positive & (ratio > knobs.ratio_high))",
        "(positive & (ratio >= knobs.ratio_high))",
        "ops/test_policy_loss.py -k 'test_a_clip_is_inactive and not cpp and not triton'",
    ),
    Mutant(
        "policy_loss: the gradient does not know the upstream scalar",
        "fastalign/ops/policy_loss.py",
        "grad.mul_(upstream)",
        "grad.mul_(1)",
        "ops/test_policy_loss.py -k 'test_upstream_scales and not cpp and not triton'",
    ),
    Mutant(
        "preference_loss: chosen and rejected swapped",
        "fastalign/ops/preference_loss.py",
        "return PairLogps(policy[0::2], policy[1::2],",
        "return PairLogps(policy[1::2], policy[0::2],",
        matrix("test_op and preference and float32"),
    ),
    Mutant(
        "preference_loss: read the reference of rows that are not scored",
        "fastalign/ops/preference_loss.py",
        "sums(torch.where(scored, ref_logps, 0))",
        "sums(ref_logps)",
        matrix("test_op and preference and float32"),
    ),
    Mutant(
        "dpo: flip the margin",
        "fastalign/losses/preference.py",
        "chosen, rejected = log_ratios(pair)\n    return -logsigmoid(beta * (chosen - rejected))",
        "chosen, rejected = log_ratios(pair)\n    return -logsigmoid(beta * (rejected - chosen))",
        "losses/test_preference.py",
    ),
    Mutant(
        "segment_sum: sum in fp32",
        "fastalign/losses/reduce.py",
        "x.double()",
        "x",
        "losses/test_reduce.py",
    ),
]

PACKED = [
    Mutant(
        "segment_scan: sum into the segment before",
        "fastalign/ops/backends/torch/scan.py",
        "torch.where(remaining[:reach] >= step, a[:reach] * y[step:], 0.0)",
        "a[:reach] * y[step:]",
        matrix("test_op and segment_scan and float32"),
        quick=True,
    ),
    Mutant(
        "segment_scan: lose the last term",
        "fastalign/ops/backends/torch/scan.py",
        "remaining[:reach] >= step",
        "remaining[:reach] > step",
        matrix("test_op and segment_scan and float32"),
    ),
    Mutant(
        "gae: bootstrap from the next segment",
        "fastalign/ops/backends/torch/scan.py",
        "torch.where(remaining == 0, last, values.roll(-1))",
        "values.roll(-1)",
        matrix("test_op and gae and float32"),
    ),
    Mutant(
        "gae: trace decay without the discount",
        "fastalign/ops/backends/torch/scan.py",
        "result = scan(deltas, cu_seqlens, gamma * lam, reverse=True)",
        "result = scan(deltas, cu_seqlens, lam, reverse=True)",
        matrix("test_op and gae and float32"),
    ),
    Mutant(
        "whiten: count what the mask leaves out",
        "fastalign/ops/whiten.py",
        "count = keep.sum(dtype=torch.float64)",
        "count = keep.sum(dtype=torch.float64) * 0 + keep.numel()",
        "ops/test_whiten.py -k test_matches",
    ),
    Mutant(
        "packed_attention: align the corner at the top left",
        "fastalign/ops/backends/sdpa/attention.py",
        "ones.tril(num_keys - num_queries)",
        "ones.tril()",
        "ops/test_attention.py -k test_equals_separate",
    ),
    Mutant(
        "packed_attention: forget the grandparents",
        "fastalign/ops/attention.py",
        "chain = (*chain, Span(start, stop, len(calls) - 1))",
        "chain = (Span(start, stop, len(calls) - 1),)",
        "ops/test_attention.py -k test_equals_separate",
    ),
    Mutant(
        "pack: the row before the predictor",
        "fastalign/data/pack.py",
        "if example.own_rows else targets - 1]",
        "if example.own_rows else targets - 2]",
        "ops/test_pitfalls_of_use.py -k test_13_a_label",
    ),
]
