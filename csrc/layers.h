// Layers between the products of a transformer: what the backend is given. Rows are of float32, bfloat16 or float16.
#pragma once

#include <cstdint>

#include "attention.h"
#include "token_logps.h"

namespace fastalign {

// Rows whose columns are neighbours.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t stride;
};

// y = weight x / rms(x), rms(x) = sqrt(mean x^2 + eps); backward: x and the weight get gradients.
struct RmsNorm {
  Rows x, y;
  Rows weight;       // one row
  float* inverse;    // [rows] 1 / rms
  Rows grad_y, grad_x;
  float* grad_weight;  // [columns]
  int64_t rows, columns;
  double eps;
};

// y = gate sigmoid(gate) up; backward: gate and up get gradients, and y is recomputed if its memory is given, which may be
// grad_y's.
struct SiluMul {
  Rows gate, up, y;
  Rows grad_y, grad_gate, grad_up;
  int64_t rows, columns;
};

// Pairs of columns j and j + size / 2 turned by the angles of their row: y_j = x_j cos_j - x_j' sin_j and
// y_j' = x_j' cos_j' + x_j sin_j'. The adjoint takes y to x.
struct Rotation {
  Heads x, y;
  Rows cos, sin;
  int64_t rows, heads, size;
};

}  // namespace fastalign
