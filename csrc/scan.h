// Scans over packed tokens: what the backend is given. Vectors are float*, or double* with `float64`.
#pragma once

#include <cstdint>

namespace fastalign {

struct Segments {
  const int64_t* offsets;  // [count + 1], rising from 0
  int64_t count;
};

// y_t = x_t + decay_t y_{t+1} inside each segment; the other way round y_t = x_t + decay_{t-1} y_{t-1}.
struct Scan {
  const void* x;
  const void* decays;  // per token, or null: one for all
  double decay;
  void* out;
  bool float64, reverse;
  Segments segments;
};

// delta_t = r_t + gamma v_{t+1} - v_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + v_t.
struct Gae {
  const void *rewards, *values;
  const void* last_values;  // [segments], the value after each one's last token; null: 0
  double gamma, lam;
  void *advantages, *returns;
  bool float64;
  Segments segments;
};

void segment_scan(const Scan& op, int threads);
void gae(const Gae& op, int threads);

}  // namespace fastalign
