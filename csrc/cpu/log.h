// The natural logarithm of vectors of floats, in the compiler's own vector arithmetic: one text for every LEVEL.
#pragma once

#include "cpu/vec.h"

namespace fastalign::LEVEL {

// ln x for normal positive x, at most 2 ulp, exactly 0 at 1. x = 2^k m with m in [2/3, 4/3); on f = m - 1 the polynomial
// is fitted for the least largest relative error of f - f^2/2 + f^3 P(f) (5e-9).
FORCE_INLINE vec log_of(vec x) {
  typedef int32_t lanes __attribute__((vector_size(sizeof(vec))));
  constexpr int32_t kTwoThirds = 0x3f2aaaab;
  lanes bits = (lanes)x - kTwoThirds;
  vec k = (vec)__builtin_convertvector(bits >> 23, decltype(vec{} + vec{}));
  vec f = (vec)((bits & 0x007fffff) + kTwoThirds) - set(1.0f);
  vec q = fma(f, set(-0x1.086ffep-3f), set(0x1.1ed0f0p-3f));
  q = fma(q, f, set(-0x1.f2e524p-4f));
  q = fma(q, f, set(0x1.1ec362p-3f));
  q = fma(q, f, set(-0x1.559f34p-3f));
  q = fma(q, f, set(0x1.99d13cp-3f));
  q = fma(q, f, set(-0x1.fffeeap-3f));
  q = fma(q, f, set(0x1.555504p-2f));
  vec square = f * f;
  q = fma(square * f, q, fma(square, set(-0.5f), k * set(-2.12194440e-4f)));
  return fma(k, set(0.693359375f), f + q);  // the high part of ln 2 has 9 bits: k times it is exact
}

}  // namespace fastalign::LEVEL
