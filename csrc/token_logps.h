// Log-probs of labels from logits [N, V]: what every backend of the op is given.
//
// z = softcap(logit_scale * logits) / temperature;  max = max_v z_v;  logsum = ln sum_v exp(z_v - max);
// logps = (z_y - max) - logsum;  entropy = logsum - sum_v p_v (z_v - max);  total = sum_v (z_v - max);
// top1 = 1 where y is the first of the columns whose z, as computed here, is max, else 0.
//
// The gradient of any objective has four coefficients per row:
// dz_v = g (1[v = y] - p_v) + p_v (alpha + beta ln p_v) + delta;  d logits = dz dz/da.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace fastalign {

enum class Dtype : int { float32, bfloat16, float16, float64 };

constexpr int64_t kIgnored = -100;   // the row is not scored: never read, outputs 0
constexpr int64_t kElsewhere = -1;   // the label lies in another slab of the vocabulary: statistics without a target

struct Matrix {
  void* data;
  int64_t row_stride, col_stride;  // in elements
};

// Pointers to statistics are float*, or double* when the logits are float64. A null pointer: not asked for.
struct TokenLogps {
  Matrix logits;
  Dtype dtype;
  int64_t rows, vocabulary;
  const void* labels;
  bool labels_are_int64;
  const double* temperatures;  // [rows], or null: one for all
  double temperature, logit_scale;
  double softcap;  // 0: none
  void *logps, *entropy, *max, *logsum, *total, *top1;  // forward writes them; backward reads max and logsum
  const void *g, *alpha, *beta, *delta;                 // backward only; null: 0 everywhere
  Matrix grad;                                          // backward only; may be the logits themselves
  Dtype grad_dtype;                                     // that of the logits; on a CPU, of fp32 logits, a narrower one too

  HOST_DEVICE int64_t label(int64_t row) const {
    return labels_are_int64 ? static_cast<const int64_t*>(labels)[row] : static_cast<const int32_t*>(labels)[row];
  }
  HOST_DEVICE double temperature_of(int64_t row) const { return temperatures ? temperatures[row] : temperature; }
};

}  // namespace fastalign
