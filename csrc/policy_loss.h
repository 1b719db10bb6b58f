// Token losses straight from logits [N, V]: what every backend of the op is given.
//
// Of each row: its statistics, then loss = -w A value(l) + w kl_coef kl(l) - w entropy_coef H, with l the label's
// log-prob, then the gradient d loss / d logits from the coefficients g, alpha and beta of token_logps.h.
#pragma once

#include "token_logps.h"

namespace fastalign {

enum class Surrogate : int { pg, ppo, cispo, sapo };

// The rows of the table [kColumns, N] that every call writes; those of the statistics are where `rows` points.
enum Column : int {
  kLoss, kLogps, kMax, kLogsum, kEntropy, kG, kAlpha, kBeta, kRatio, kKl, kClipLow, kClipHigh, kTop1, kColumns
};

// Pointers to numbers are float*, or double* when the logits are float64. A null pointer: not given.
struct PolicyLoss {
  TokenLogps rows;  // its `grad` has null data when no gradient is wanted; it may be the logits themselves
  Surrogate surrogate;
  bool k2;             // the KL estimator, else k3
  void* table;
  const void* weights;
  const void *advantages, *old_logps, *ref_logps;  // null: 1, the log-probs themselves, no KL
  double ratio_low, ratio_high, ratio_cap;         // absolute bounds; the cap is of ratios under negative advantages
  double tau_pos, tau_neg;                         // of sapo's gates
  double kl_coef, entropy_coef;
};

}  // namespace fastalign
