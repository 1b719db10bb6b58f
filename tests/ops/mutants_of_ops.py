"""Deliberate faults in the sweeps over logits and in the linear ops around them; see ``mutants.py``."""

from mutants import Mutant, matrix

TOKEN = matrix("test_token_logps and 252")
LINEAR = matrix("test_linear_loss and float32")
DIVERGENCE = matrix("test_op and divergence and not linear and float32")
RANKS = "ops/test_pitfalls.py -k test_09"

TOKEN_LOGPS = "fastalign/ops/backends/torch/token_logps.py"
ROWS = "fastalign/ops/rows.py"
CALL = "fastalign/ops/head/options.py"
HEAD = "fastalign/ops/head/head.py"
GRADIENTS = "fastalign/ops/head/backward.py"
STREAMS = "fastalign/ops/backends/torch/divergence.py"
SHARDS = "fastalign/ops/parallel.py"

SWEEPS = [
    Mutant(
        "token_logps: drop 1/temperature from z",
        TOKEN_LOGPS,
        "return z.div_(tau) if isinstance(tau, Tensor) or tau != 1.0 else z",
        "return z",
        TOKEN,
        quick=True,
    ),
    Mutant(
        "token_logps: a tie with an earlier column is a hit",
        TOKEN_LOGPS,
        "leads = _is_argmax(z, target == m, y) if top1 else None",
        "leads = (target == m) if top1 else None",
        "ops/test_top1.py -k 'near_and_far and torch and not cpp and not triton and float32'",
        quick=True,
    ),
    Mutant(
        "token_logps: drop 1/temperature from the slope",
        TOKEN_LOGPS,
        "slope = logit_scale / tau",
        "slope = logit_scale",
        TOKEN,
    ),
    Mutant(
        "token_logps: lose the softcap's slope",
        TOKEN_LOGPS,
        "return slope if softcap is None else (z * tau)",
        "return slope if softcap is None else (0 * z * tau)",
        TOKEN,
        quick=True,
    ),
    Mutant(
        "token_logps: drop the mask of the forward",
        TOKEN_LOGPS,
        "logps.masked_fill((labels == IGNORE_INDEX) | (labels == ELSEWHERE), 0)",
        "logps.masked_fill(labels == ELSEWHERE, 0)",
        TOKEN,
        quick=True,
    ),
    Mutant(
        "token_logps: drop the mask of the backward",
        TOKEN_LOGPS,
        "dz.masked_fill_(((y == IGNORE_INDEX) | idle(part))[:, None], 0)",
        "dz.masked_fill_(idle(part)[:, None], 0)",
        TOKEN,
    ),
    Mutant(
        "token_logps: read the rows of zero coefficients",
        TOKEN_LOGPS,
        "dz.masked_fill_(((y == IGNORE_INDEX) | idle(part))[:, None], 0)",
        "dz.masked_fill_((y == IGNORE_INDEX)[:, None], 0)",
        "ops/test_pitfalls.py -k 'test_03_a_row_without and not cpp and not triton'",
    ),
    Mutant(
        "token_logps: drop the target term",
        TOKEN_LOGPS,
        "torch.where(here, at_label, dz.gather(1, targets))",
        "dz.gather(1, targets)",
        TOKEN,
    ),
    Mutant(
        "token_logps: form p - 1 in bf16",
        TOKEN_LOGPS,
        "- g * target.expm1()",
        "- g * (target.exp().bfloat16() - 1)",
        "ops/test_pitfalls.py -k 'test_08_a_confident and not cpp and not triton'",
    ),
    Mutant(
        "token_logps: start the maximum at 0",
        TOKEN_LOGPS,
        "m = z.amax(-1)",
        "m = z.amax(-1).clamp(min=0)",
        "ops/test_pitfalls.py -k 'test_02 and not cpp and not triton'",
    ),
    Mutant(
        "token_logps: let a banned column meet its infinite log-prob",
        TOKEN_LOGPS,
        "p.mul_(z.clamp_(min=torch.finfo(dtype).min))",
        "p.mul_(z)",
        "ops/test_pitfalls.py -k 'test_02_a_banned and not cpp and not triton'",
    ),
    Mutant(
        "row algebra: flip the sign of the entropy's gradient",
        ROWS,
        "beta = -grad_entropy",
        "beta = grad_entropy",
        TOKEN,
    ),
    Mutant(
        "row algebra: forget the entropy in its own gradient",
        ROWS,
        "torch.where(beta == 0, 0.0, beta * entropy)",
        "torch.zeros_like(beta)",
        TOKEN,
    ),
    Mutant(
        "row algebra: take a row with an entropy gradient alone for idle",
        ROWS,
        "zero = zero if x is None else zero & (x == 0)",
        "zero = zero",
        "ops/test_pitfalls_of_use.py -k 'test_14 and token_logps and not cpp and not triton'",
    ),
    Mutant(
        "row algebra: forget what smoothing takes from the probabilities",
        ROWS,
        "alpha = -share if alpha is None else alpha - share",
        "alpha = alpha",
        matrix("test_token_logps and smoothing and float32"),
    ),
    Mutant(
        "row algebra: smooth with the whole share at every column",
        ROWS,
        "share / vocab",
        "share",
        matrix("test_token_logps and smoothing and float32"),
    ),
    Mutant(
        "smoothing: forget the normaliser in the mean",
        ROWS,
        "(total / vocab - logsum)",
        "(total / vocab)",
        matrix("test_token_logps and smoothing and float32"),
    ),
    Mutant(
        "tracing: a graph for every temperature",
        "fastalign/ops/checks.py",
        "not isinstance(temperature, Tensor) and temperature != 1:",
        "not isinstance(temperature, Tensor) and temperature < 0:",
        "ops/test_pitfalls_of_use.py -k test_15_another",
    ),
    Mutant(
        "divergence: forward and reverse KL swapped",
        STREAMS,
        "value = _kl(log_q, log_p, apart)",
        "value = _kl(log_p, log_q, apart)",
        DIVERGENCE,
        quick=True,
    ),
    Mutant(
        "divergence: the mixture's weights swapped",
        STREAMS,
        "far = torch.full_like(gap, mix).masked_fill_(gap > 0, 1 - mix)",
        "far = torch.full_like(gap, 1 - mix).masked_fill_(gap > 0, mix)",
        "ops/test_divergence.py -k 'test_matches_float64 and jsd and float32 and not cpp and not triton'",
    ),
    Mutant(
        "divergence: forget the mean that the gradient subtracts",
        STREAMS,
        "(log_p - log_q).sub_(pull)",
        "(log_p - log_q)",
        DIVERGENCE,
    ),
    Mutant(
        "divergence: the softcap of the other stream",
        STREAMS,
        "log_q, *q_stats = _normalised(_z(ref_logits[rows], dtype, tau, ref_softcap, ref_logit_scale))",
        "log_q, *q_stats = _normalised(_z(ref_logits[rows], dtype, tau, softcap, ref_logit_scale))",
        DIVERGENCE,
    ),
]

HALF = [
    Mutant(
        "fp16: leave the coefficients as small as they are",
        "fastalign/ops/half.py",
        "return torch.where((bound > 0) & bound.isfinite(), scale, 1.0)",
        "return torch.ones_like(bound)",
        "ops/test_half.py -k 'test_linear_loss and torch- and whole'",
    ),
    Mutant(
        "fp16: round before the loss scaler multiplies",
        "fastalign/ops/head/head.py",
        "return torch.float32 if dtype == torch.float16 else dtype",
        "return dtype",
        "ops/test_half.py -k 'test_linear_loss and torch- and whole'",
    ),
    Mutant(
        "fp16: forget the scale of a product",
        HEAD,
        "return times(row, scale), scale.reciprocal()",
        "return times(row, scale), torch.ones_like(scale)",
        "ops/test_half.py -k 'test_linear_loss and torch- and whole'",
    ),
]

LINEAR_OPS = [
    Mutant(
        "linear: shift the labels of the scored rows",
        HEAD,
        "labels[rows], tau[rows] if",
        "labels[rows].roll(1), tau[rows] if",
        LINEAR,
        quick=True,
    ),
    Mutant(
        "linear: read the first rows instead of the scored ones",
        HEAD,
        "head.hidden.index_select(0, head.rows[start:stop])",
        "head.hidden[start:stop]",
        LINEAR,
    ),
    Mutant(
        "linear: forget the bias",
        HEAD,
        "plus = None if head.bias is None else head.bias[first:last]",
        "plus = None",
        LINEAR,
    ),
    Mutant(
        "linear: forget the logit scale", HEAD, '"logit_scale": head.options.logit_scale', '"logit_scale": 1.0', LINEAR
    ),
    Mutant(
        "linear: every chunk takes the temperatures of the first",
        HEAD,
        '"temperature": tau[start:stop] if isinstance(tau, Tensor) else tau,',
        '"temperature": tau[: stop - start] if isinstance(tau, Tensor) else tau,',
        LINEAR,
    ),
    Mutant(
        "linear_loss: accumulate dW in the weight's dtype",
        GRADIENTS,
        "dtype = gemm if single and like is not None and like.dtype == gemm else wide",
        "dtype = wide if like is None else like.dtype",
        "ops/test_pitfalls.py -k 'test_08_more_chunks and not cpp and not triton'",
    ),
    Mutant(
        "linear_loss: every chunk sets dW",
        "fastalign/ops/linear_loss.py",
        "index == 0 and i == len(group) - 1",
        "True",
        "ops/test_linear_loss.py -k 'test_a_loss_equals_autograd and float32'",
    ),
    Mutant(
        "linear_loss: ignore the upstream gradient",
        "fastalign/ops/linear_loss.py",
        "grad.mul_(upstream[0])",
        "grad.mul_(1)",
        "ops/test_linear_loss.py -k test_upstream_scales",
    ),
    Mutant(
        "linear_loss: keep a logits chunk that lost its slot",
        "fastalign/ops/linear_loss.py",
        "if plan.slots - 1 <= i < len(group) - 1:",
        "if plan.slots <= i < len(group) - 1:",
        "ops/test_linear_loss.py -k test_a_unit_longer",
    ),
    Mutant(
        "linear_loss: pairs off by one sequence",
        "fastalign/ops/head/units.py",
        "return list(range(0, num_sequences + 1, 2))",
        "return [0, *range(1, num_sequences, 2), num_sequences]",
        "ops/test_linear_loss.py -k test_units_are_whole",
        quick=True,
    ),
    Mutant(
        "linear_loss: number each chunk's sequences from 0",
        "fastalign/ops/head/units.py",
        "torch.arange(first, last, device=device)",
        "torch.arange(last - first, device=device)",
        "ops/test_linear_loss.py -k 'test_a_loss_equals_autograd and float32'",
    ),
    Mutant(
        "linear: forget rows that have an entropy gradient alone",
        GRADIENTS,
        "keep = (~idle(row)).nonzero()",
        "keep = (row.g != 0).nonzero()",
        "ops/test_pitfalls_of_use.py -k 'test_14 and linear_logps and not cpp and not triton'",
    ),
    Mutant(
        "linear: take a NaN coefficient for none",
        ROWS,
        "zero = coefficients.g == 0",
        "zero = ~(coefficients.g.abs() > 0)",
        "ops/test_linear_loss.py -k 'test_rows_without_a_coefficient and float32'",
    ),
    Mutant(
        "linear_loss: move the wrong rows together",
        GRADIENTS,
        "logits[to] = logits[row]",
        "logits[row] = logits[to]",
        "ops/test_linear_loss.py -k 'test_rows_without_a_coefficient and float32'",
    ),
    Mutant(
        "linear_logps: ignore the upstream gradient per row",
        "fastalign/ops/linear_logps.py",
        "grad_logps[:, None] * directions",
        "grad_logps[0] * directions",
        matrix("test_linear_logps and frozen and float32"),
    ),
    Mutant(
        "linear_logps: leave out the last column",
        GRADIENTS,
        "last = min(vocab, first + plan.slab)",
        "last = min(vocab - 1, first + plan.slab)",
        matrix("test_linear_logps and trainable and float32"),
    ),
    Mutant(
        "linear_logps: a label one column off in its slab",
        GRADIENTS,
        "labels - first, ELSEWHERE)",
        "labels - first + 1, ELSEWHERE)",
        matrix("test_linear_logps and trainable and float32"),
    ),
    Mutant(
        "linear_logps: every block of rows sets its slab of dW",
        GRADIENTS,
        "hidden[rows], alpha, first=start == 0)",
        "hidden[rows], alpha, first=True)",
        "ops/test_linear_logps.py -k 'test_vocabulary_slabs and float32'",
    ),
    Mutant(
        "planner: leave the scratch out of the budget",
        "fastalign/ops/head/plan.py",
        "return max(1, (memory - scratch) // row_bytes)",
        "return max(1, memory // row_bytes)",
        "ops/test_plan.py",
    ),
    Mutant(
        "planner: drop the last row",
        "fastalign/ops/head/plan.py",
        "rows = stop - start\n    count",
        "rows = stop - start - 1\n    count",
        "ops/test_plan.py",
    ),
]

CALLS = [
    Mutant(
        "adapter: read rows that are not scored",
        CALL,
        "(hidden if scored is None else hidden.where(scored[:, None], 0.0))",
        "hidden",
        "ops/test_linear_lora.py -k 'test_a_frozen_head_serves'",
    ),
    Mutant(
        "adapter: forget the scale",
        CALL,
        "beta=0, alpha=scale)",
        "beta=0, alpha=1.0)",
        "ops/test_linear_lora.py -k 'test_a_frozen_head_serves'",
    ),
    Mutant(
        "adapter: give the hidden states the base's gradient alone",
        HEAD,
        "multiply(dz, weight[first:last], out[:, part]",
        "multiply(dz, weight[first:last] * (part.start == 0), out[:, part]",
        "ops/test_linear_lora.py -k 'test_a_frozen_head_serves'",
    ),
    Mutant(
        "z-loss: drop the gradient of the log-sum-exp",
        HEAD,
        '"grad_lse": wide.get("lse")',
        '"grad_lse": None',
        "ops/test_linear_objectives.py -k 'test_a_loss and float32'",
    ),
    Mutant(
        "smoothing: spread over the rank's own columns",
        HEAD,
        "return self.weight.shape[0] if self.shard is None else self.shard.vocab",
        "return self.weight.shape[0]",
        "ops/test_vocab_parallel.py -k 'test_ranks_agree_with_one and 2'",
    ),
    Mutant(
        "num_scored: believe any number",
        HEAD,
        "elif not right:",
        "elif False:",
        "ops/test_linear_waits.py -k 'test_the_number_is_checked'",
    ),
    Mutant(
        "num_scored: wait for the device all the same",
        HEAD,
        "torch.nonzero_static(scored, size=num_scored)",
        "scored.nonzero()",
        "ops/test_linear_waits.py -k 'test_log_probs_read_no_data'",
    ),
    Mutant(
        "deterministic: take a warning for a promise",
        "fastalign/ops/checks.py",
        "if not strict or (not tracing and torch.is_deterministic_algorithms_warn_only_enabled()):",
        "if not strict:",
        "ops/test_linear_deterministic.py -k 'test_cuda_needs'",
    ),
    Mutant(
        "DTensor: take a replicated bias beside a split weight",
        "fastalign/ops/head/dtensor.py",
        "if _named(group) != _named(chosen):",
        "if group is not None and _named(group) != _named(chosen):",
        "ops/test_vocab_parallel.py -k 'test_ranks_agree_with_one and 2'",
    ),
]

SPLIT = [
    Mutant(
        "split vocabulary: the first column of a shard has no owner",
        SHARDS,
        "here = (labels >= stop - size) & (labels < stop)",
        "here = (labels > stop - size) & (labels < stop)",
        RANKS,
    ),
    Mutant(
        "split vocabulary: the sentinel is a column",
        SHARDS,
        "local = torch.where(here, labels - (stop - size), -1)",
        "local = torch.where(here, labels - (stop - size), size - 1)",
        RANKS,
    ),
    Mutant(
        "split vocabulary: do not bring the sums to one maximum",
        SHARDS,
        "shares = torch.where(banned, -torch.inf, (maxima - top) + logsums)",
        "shares = torch.where(banned, -torch.inf, logsums)",
        RANKS,
    ),
    Mutant(
        "split vocabulary: a tie with an earlier rank is a hit",
        SHARDS,
        "leads = best & (best.cumsum(0) == 1)",
        "leads = best",
        "ops/test_vocab_parallel.py -k 'test_ranks_agree_with_one and vocab and 2'",
    ),
    Mutant(
        "split vocabulary: leave the hidden gradient unreduced",
        GRADIENTS,
        "return begin_sum(head.shard, d_hidden).wait",
        "return nothing_left",
        RANKS,
        quick=True,
    ),
    Mutant(
        "split divergence: forget the ranks' shares",
        "fastalign/ops/divergence_shards.py",
        "torch.where(log_b == -torch.inf, 0, values + (log_a - log_b))",
        "torch.where(log_b == -torch.inf, 0, values)",
        "ops/test_vocab_parallel.py -k 'divergence and 2'",
    ),
    Mutant(
        "split divergence: each rank decides which banned column has a share",
        "fastalign/ops/divergence_shards.py",
        "-torch.inf, banned + log_a).amax(0)",
        "-torch.inf, banned).amax(0)",
        "ops/test_vocab_parallel.py -k 'divergence and 2'",
    ),
    Mutant(
        "split vocabulary: let ranks differ in their options",
        SHARDS,
        "words = {name: _in_words(x) for name, x in same.items()}",
        "words = {}",
        "ops/test_vocab_parallel.py -k 'token and 2'",
    ),
]
