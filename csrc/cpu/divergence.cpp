// Divergence of two rows of logits, with their statistics, in one read. Compiled once per instruction set.
#include "cpu/streams.h"

namespace fastalign::LEVEL {

void divergence_gradient(const Divergence& op, int threads);

namespace {

// --- statistics of both streams, and E_a[ln a - ln b], in one read -----------------------------------------------------

// Of one slab: maxima, sums of exp(z - max), and the sum over columns of exp(a) (a - b), both relative to their maxima;
// for the entropy of one stream, the sum of its exp(z - max) (z - max).
struct Pair {
  float a_max, a_sum, b_max, b_sum, cross, weighted;
};

enum class Entropy { none, a, b };

float decay(float max, float higher) { return max == higher ? 1 : ::expf(max - higher); }

float base_of(float max) { return max == -kInfinity ? 0 : max; }

float added(const vec (&x)[kAccumulators]) { return sum_lanes((x[0] + x[1]) + (x[2] + x[3])); }

// Folds blocks; KL(a || b) when `cross` is wanted.
template <bool wants_cross, Entropy entropy>
struct Fold {
  float a_max = -kInfinity, b_max = -kInfinity;
  vec a_sum[kAccumulators], b_sum[kAccumulators], cross[kAccumulators], weighted[kAccumulators];

  Fold() {
    for (int k = 0; k < kAccumulators; ++k) a_sum[k] = b_sum[k] = cross[k] = weighted[k] = set(0.0f);
  }
  // Moves both bases at once: where the streams agree the shifts cancel before they are multiplied.
  void raise(float a_higher, float b_higher) {
    float shift = (base_of(a_max) - base_of(a_higher)) - (base_of(b_max) - base_of(b_higher));
    float a_factor = decay(a_max, a_higher), b_factor = decay(b_max, b_higher);
    for (int k = 0; k < kAccumulators; ++k) {
      // What became negligible is dropped, an infinite divergence included.
      cross[k] = a_factor == 0 ? set(0.0f) : set(a_factor) * fma(set(shift), a_sum[k], cross[k]);
      if (entropy == Entropy::a) weighted[k] = moved(weighted[k], a_sum[k], a_max, a_higher, a_factor);
      if (entropy == Entropy::b) weighted[k] = moved(weighted[k], b_sum[k], b_max, b_higher, b_factor);
      a_sum[k] = set(a_factor) * a_sum[k];
      b_sum[k] = set(b_factor) * b_sum[k];
    }
    a_max = a_higher;
    b_max = b_higher;
  }
  static vec moved(vec weighted, vec sum, float max, float higher, float factor) {
    return factor == 0 ? set(0.0f) : set(factor) * fma(set(max - higher), sum, weighted);
  }
  void fold(const Block& a, const Block& b) {
    if (a.max > a_max || b.max > b_max) raise(std::max(a_max, a.max), std::max(b_max, b.max));
    vec a_base = set(base_of(a_max)), b_base = set(base_of(b_max));
    for (int64_t v = 0; v < a.size; v += kStep) {
#pragma GCC unroll 4
      for (int k = 0; k < kAccumulators; ++k) {
        vec x = clamp_low(load(a.z + v + k * kLanes) - a_base), y = load(b.z + v + k * kLanes) - b_base;
        vec e = exp_in_range(x), in_range = clamp_low(y), f = exp_in_range(in_range);
        a_sum[k] = a_sum[k] + e;
        b_sum[k] = b_sum[k] + f;
        if (entropy == Entropy::a) weighted[k] = fma(e, x, weighted[k]);
        if (entropy == Entropy::b) weighted[k] = fma(f, in_range, weighted[k]);
        // Selected, not multiplied: a banned column has no share, and one banned in b alone makes it infinite.
        if (wants_cross) cross[k] = cross[k] + where_less(set(kJustBelow), x, e * (x - y), set(0.0f));
      }
    }
  }
  Pair pair() const { return {a_max, added(a_sum), b_max, added(b_sum), added(cross), added(weighted)}; }
};

template <bool wants_cross, Entropy entropy>
Pair fold_slab(const TokenLogps& a, const TokenLogps& b, int64_t row, int64_t begin, int64_t end) {
  Read read_a = reader(a), read_b = reader(b);
  Fold<wants_cross, entropy> fold;
  Block x, y;
  for (; begin < end; begin += kBlock) {
    int64_t n = std::min(kBlock, end - begin);
    read_a(a, row, begin, n, x, nullptr);
    read_b(b, row, begin, n, y, nullptr);
    fold.fold(x, y);
  }
  return fold.pair();
}

struct Whole {
  float a_max, b_max;
  double a_logsum, b_logsum, divergence, entropy;
  bool bans;  // b may ban a column that has a share in a
};

double share_of(float max, float sum, float whole_max) {
  return sum == 0 || sum != sum ? sum : ::exp(double(max) - whole_max);
}

// Slabs in their order, in double: few numbers, and the row's precision depends on them.
Whole combine(const Pair* pairs, int64_t slabs, bool of_b) {
  float a_max = -kInfinity, b_max = -kInfinity;
  for (int64_t k = 0; k < slabs; ++k) {
    a_max = std::max(a_max, pairs[k].a_max);
    b_max = std::max(b_max, pairs[k].b_max);
  }
  double a_sum = 0, b_sum = 0, cross = 0, weighted = 0;
  for (int64_t k = 0; k < slabs; ++k) {
    const Pair& s = pairs[k];
    double a = share_of(s.a_max, s.a_sum, a_max), b = share_of(s.b_max, s.b_sum, b_max), own = of_b ? b : a;
    double lift = of_b ? (double(s.b_max) - b_max) * s.b_sum : (double(s.a_max) - a_max) * s.a_sum;
    if (own != 0) weighted += own * (s.weighted + lift);
    if (b != 0) b_sum += b * s.b_sum;
    if (a == 0) continue;
    double shift = (double(base_of(s.a_max)) - base_of(a_max)) - (double(base_of(s.b_max)) - base_of(b_max));
    a_sum += a * s.a_sum;
    cross += a * (s.cross + s.a_sum * shift);
  }
  if (a_sum != a_sum) a_max = kNaN;  // beside a NaN the largest may be -inf, which would say that all is banned
  if (b_sum != b_sum) b_max = kNaN;
  double a_logsum = ::log(a_sum), b_logsum = ::log(b_sum), own = of_b ? b_sum : a_sum;
  double divergence = cross / a_sum + (b_logsum - a_logsum), entropy = ::log(own) - weighted / own;
  return {a_max, b_max, a_logsum, b_logsum, divergence, entropy, cross == kInfinity};
}

struct Apart {
  double sum, banned;  // over the columns that b does not ban; the largest ln a among those that it bans
};

// Rows with a banned column are read once more: what its share is, only the whole row's maximum tells.
Apart take_apart(const TokenLogps& a, const TokenLogps& b, int64_t row, const Whole& s) {
  Read read_a = reader(a), read_b = reader(b);
  Apart found{0, -kInfinity};
  Block x, y;
  for (int64_t begin = 0; begin < a.vocabulary; begin += kBlock) {
    int64_t n = std::min(kBlock, a.vocabulary - begin);
    read_a(a, row, begin, n, x, nullptr);
    read_b(b, row, begin, n, y, nullptr);
    for (int64_t v = 0; v < n; ++v) {
      double log_a = (double(x.z[v]) - s.a_max) - s.a_logsum, log_b = (double(y.z[v]) - s.b_max) - s.b_logsum;
      if (y.z[v] == -kInfinity) found.banned = std::max(found.banned, log_a);
      else if (!(log_a < kNegligible)) found.sum += ::exp(log_a) * (log_a - log_b);
    }
  }
  return found;
}

// A row of b without any probability: all is NaN.
double whole_divergence(const Apart& s, double b_logsum) {
  return b_logsum == -kInfinity ? double(kNaN) : s.banned < kNegligible ? s.sum : double(kInfinity);
}

float& value_of(const Divergence& op, int64_t row) { return static_cast<float*>(op.value)[row]; }

// ln p of the label; 0 when it lives elsewhere, NaN when it is invalid.
float label_logp(const TokenLogps& op, int64_t row, float max, float logsum) {
  int64_t label = op.label(row);
  if (label == kElsewhere || label == kIgnored) return 0;
  if (label < 0 || label >= op.vocabulary) return kNaN;
  Block block;
  reader(op)(op, row, label, 1, block, nullptr);
  return (block.z[0] - max) - logsum;
}

void write_tokens(const TokenLogps& op, int64_t row, float max, float logsum, float entropy) {
  if (op.logps) static_cast<float*>(op.logps)[row] = label_logp(op, row, max, logsum);
  if (op.entropy) static_cast<float*>(op.entropy)[row] = entropy;
}

// a is the stream that the mean is taken over: the reference for forward_kl.
void finish_row(const Divergence& op, int64_t row, const Pair* pairs, int64_t slabs) {
  bool forward = op.kind == Kind::forward_kl, masked = op.masked(row);
  const TokenLogps &a = forward ? op.reference : op.policy, &b = forward ? op.policy : op.reference;
  Whole s = masked ? Whole{0, 0, 0, 0, 0, 0, false} : combine(pairs, slabs, forward);
  Apart apart{s.divergence, -kInfinity};
  if (s.bans && op.kind != Kind::jsd) {
    apart = take_apart(a, b, row, s);
    s.divergence = whole_divergence(apart, s.b_logsum);
  }
  stat(op, forward ? Stat::reference_max : Stat::max, row) = s.a_max;
  stat(op, forward ? Stat::reference_logsum : Stat::logsum, row) = float(s.a_logsum);
  stat(op, forward ? Stat::max : Stat::reference_max, row) = s.b_max;
  stat(op, forward ? Stat::logsum : Stat::reference_logsum, row) = float(s.b_logsum);
  stat(op, Stat::pull, row) = forward ? 0 : float(s.divergence);
  value_of(op, row) = op.invalid(row) ? kNaN : float(op.apart ? apart.sum : s.divergence);
  if (op.apart) value_of(op, op.rows() + row) = float(apart.banned);
  write_tokens(op.policy, row, stat(op, Stat::max, row), stat(op, Stat::logsum, row), float(s.entropy));
  write_tokens(op.reference, row, stat(op, Stat::reference_max, row), stat(op, Stat::reference_logsum, row), 0);
}

template <bool wants_cross, Entropy entropy>
void fold_rows_with(const Divergence& op, int threads) {
  int64_t slabs = num_slabs(op.vocabulary()), items = op.rows() * slabs;
  Scratch<Pair> pairs = scratch<Pair>("divergence", items);
  bool forward = op.kind == Kind::forward_kl;
  parallel_for(items, op.rows() * op.vocabulary(), threads, [&](int64_t item) {
    int64_t row = item / slabs, begin = item % slabs * kSlab;
    if (op.masked(row)) return;
    pairs[item] = fold_slab<wants_cross, entropy>(forward ? op.reference : op.policy, forward ? op.policy : op.reference,
                                                  row, begin, std::min(begin + kSlab, op.vocabulary()));
  });
  parallel_for(op.rows(), items, threads, [&](int64_t row) { finish_row(op, row, &pairs[row * slabs], slabs); });
}

template <bool wants_cross>
void fold_rows(const Divergence& op, int threads) {
  if (!op.policy.entropy) return fold_rows_with<wants_cross, Entropy::none>(op, threads);
  if (wants_cross && op.kind == Kind::forward_kl) return fold_rows_with<wants_cross, Entropy::b>(op, threads);
  fold_rows_with<wants_cross, Entropy::a>(op, threads);
}

// --- the mixture needs both normalisers first: a second read -----------------------------------------------------------

struct MixturePartial {
  float policy, reference;  // of one slab: sum p ln(p / M), sum pi ln(pi / M)
};

MixturePartial mix_slab(const Divergence& op, int64_t row, int64_t begin, int64_t end) {
  Read read_z = reader(op.policy), read_q = reader(op.reference);
  LogProbs log_probs(op, row);
  Mixture mixture(op.mix);
  vec policy[kAccumulators], reference[kAccumulators];
  for (int k = 0; k < kAccumulators; ++k) policy[k] = reference[k] = set(0.0f);
  Block z, q;
  for (; begin < end; begin += kBlock) {
    int64_t n = std::min(kBlock, end - begin);
    read_z(op.policy, row, begin, n, z, nullptr);
    read_q(op.reference, row, begin, n, q, nullptr);
    for (int64_t v = 0; v < z.size; v += kStep) {
#pragma GCC unroll 4
      for (int k = 0; k < kAccumulators; ++k) {
        vec log_p = clamp_low(log_probs.policy(load(z.z + v + k * kLanes)));
        vec log_q = clamp_low(log_probs.reference(load(q.z + v + k * kLanes)));
        mixture.compare(log_p, log_q);
        policy[k] = fma(exp_in_range(log_p), mixture.from_p, policy[k]);
        reference[k] = fma(exp_in_range(log_q), mixture.from_q, reference[k]);
      }
    }
  }
  return {added(policy), added(reference)};
}

// f(row, sum pi ln(pi / M), sum p ln(p / M)) for every row; 0 for masked ones.
template <class F>
void mix_rows(const Divergence& op, int threads, F f) {
  int64_t slabs = num_slabs(op.vocabulary()), items = op.rows() * slabs;
  Scratch<MixturePartial> partials = scratch<MixturePartial>("divergence", items);
  parallel_for(items, op.rows() * op.vocabulary(), threads, [&](int64_t item) {
    int64_t row = item / slabs, begin = item % slabs * kSlab;
    if (!op.masked(row)) partials[item] = mix_slab(op, row, begin, std::min(begin + kSlab, op.vocabulary()));
  });
  for (int64_t row = 0; row < op.rows(); ++row) {
    double policy = 0, reference = op.invalid(row) ? double(kNaN) : 0;
    for (int64_t k = 0; k < slabs && !op.masked(row); ++k) {
      policy += partials[row * slabs + k].policy;
      reference += partials[row * slabs + k].reference;
    }
    f(row, reference, policy);
  }
}

void finish_mixture(const Divergence& op, int threads) {
  mix_rows(op, threads, [&](int64_t row, double reference, double policy) {
    stat(op, Stat::pull, row) = float(policy);
    value_of(op, row) = float(op.mix * reference + (1 - op.mix) * policy);
  });
}

void mixture_sums(const Divergence& op, int threads) {
  mix_rows(op, threads, [&](int64_t row, double reference, double policy) {
    value_of(op, row) = float(reference);
    value_of(op, op.rows() + row) = float(policy);
  });
}

}  // namespace

void divergence(const Divergence& op, Walk walk, int threads) {
  if (walk == Walk::backward) return divergence_gradient(op, threads);
  if (walk == Walk::mixture) return mixture_sums(op, threads);
  if (op.kind != Kind::jsd) return fold_rows<true>(op, threads);
  fold_rows<false>(op, threads);
  finish_mixture(op, threads);
}

}  // namespace fastalign::LEVEL
