// Products of large matrices: what the backend is given.
#pragma once

#include <cstdint>

#include "token_logps.h"

namespace fastalign {

// out [m, n] = a [m, k] b [k, n], or += when it holds something already; a and b are both fp32 or both bf16, out is fp32,
// or bf16 as they are. Strides count elements; columns of `out` are neighbours; of `a` and of `b` either rows or columns
// are. `packed` is b as pack_product left it, in place of b.
struct Product {
  void* out;
  const void *a, *b, *packed;
  Dtype out_dtype, dtype;
  int64_t m, n, k, out_stride, a_row_stride, a_col_stride, b_row_stride, b_col_stride;
  bool accumulate;
};

// Whether this processor has what the product is written for: AVX-512 that also multiplies bf16 into fp32.
bool has_product();
void product(const Product& op, int threads);

// Bytes of `b` packed, and the packing of it into `out`, which is aligned to 64 bytes.
int64_t packed_bytes(int64_t n, int64_t k, Dtype dtype);
void pack_product(const Product& op, void* out, int threads);

}  // namespace fastalign
