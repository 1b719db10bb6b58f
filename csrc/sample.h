// Draws of tokens from logits [N, V] by inverse CDF, in index order.
//
// token = the first column v with sum_{w <= v} q_w > noise * sum_w q_w, where q_w = exp(z_w - max z) of the columns that
// truncation keeps. Blocks of 512 columns are added in fp32 and then, as columns inside the chosen block, become integers
// in units of about V / 2^62: sums of those are exact, whatever their order.
#pragma once

#include "token_logps.h"

namespace fastalign {

struct Sample {
  TokenLogps rows;      // the logits and their scaling; labels and statistics are not read
  const double* noise;  // [rows] in [0, 1)
  int64_t* tokens;      // [rows]
  double* kept;         // [rows] share of the mass that truncation keeps
  int64_t top_k;        // 0: all
  double top_p, min_p;  // 1 and 0: all

  bool truncates() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

}  // namespace fastalign
