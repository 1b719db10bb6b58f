// A product of bf16 matrices added to an fp32 one: what the backend is given.
#pragma once

#include <cstdint>

namespace fastalign {

// out [m, n] = a [m, k] b [k, n], or += when it holds something already. Strides count elements; columns of `out` are
// neighbours; of `a` and of `b` either rows or columns are.
struct Product {
  float* out;
  const uint16_t *a, *b;
  int64_t m, n, k, out_stride, a_row_stride, a_col_stride, b_row_stride, b_col_stride;
  bool accumulate;
};

// Whether this processor multiplies bf16 into fp32.
bool has_bf16_product();
void add_product(const Product& op, int threads);

}  // namespace fastalign
