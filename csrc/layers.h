// Layers between the products of a transformer: what the backend is given. Rows are of float32, bfloat16 or float16.
#pragma once

#include <cstdint>

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

// y = gate sigmoid(gate) up
struct SiluMul {
  Rows gate, up, y;
  Rows grad_y, grad_gate, grad_up;
  int64_t rows, columns;
};

}  // namespace fastalign
