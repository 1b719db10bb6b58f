// Divergence between p = softmax(z) of logits and pi = softmax(q) of reference logits: what the native kernel is given.
//
// forward_kl = KL(pi || p);  reverse_kl = KL(p || pi);  jsd = mix KL(pi || M) + (1 - mix) KL(p || M),
// M = mix pi + (1 - mix) p.
#pragma once

#include "token_logps.h"

namespace fastalign {

// The least ln of the first probability with a share in a KL; below, about where normal fp32 numbers end, instruction sets
// differ. A column that the second distribution bans makes the KL infinite from here on.
constexpr float kNegligible = -87.0f;
constexpr float kJustBelow = -0x1.5c0002p+6f;  // the next float

enum class Kind : int { forward_kl, reverse_kl, jsd };

// The rows of the statistics [5, rows]; `pull` is the mean that the gradient subtracts: KL(p || pi), or KL(p || M) for jsd.
enum class Stat : int { max, logsum, reference_max, reference_logsum, pull };

// The walks over both streams. `mixture` is the second one of jsd alone, for columns that are a slab of the vocabulary: from
// the statistics of all columns it makes the sums of pi ln(pi / M) and of p ln(p / M), which it leaves in value [2, rows].
enum class Walk : int { forward, mixture, backward };

// value, stats and grad_value point to float.
// `apart`, of a forward KL walk: value is [2, rows], the sum over the columns that the second distribution does not ban and
// the largest ln of the first's probability among those that it bans: what a slab of the vocabulary knows.
// The streams' logps and the policy's entropy are written if their pointers are given; the policy's coefficients add their
// gradient of token_logps.
struct Divergence {
  TokenLogps policy, reference;  // the policy's labels say which rows are masked or invalid; backward writes its grad
  Kind kind;
  double mix;
  void *value, *stats;     // forward writes them; the others read stats
  const void* grad_value;  // backward only
  bool apart;

  int64_t rows() const { return policy.rows; }
  int64_t vocabulary() const { return policy.vocabulary; }
  bool masked(int64_t row) const { return policy.label(row) == kIgnored; }
  bool invalid(int64_t row) const {
    int64_t label = policy.label(row);
    return label != kIgnored && (label < kElsewhere || label >= vocabulary());
  }
};

}  // namespace fastalign
