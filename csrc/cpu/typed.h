// From a dtype known at run time to a type known to the compiler.
#pragma once

#include "cpu/vec.h"
#include "token_logps.h"

namespace fastalign::LEVEL {

// f(null pointer to the numbers' type), for the dtypes that are computed in fp32.
template <class F>
void with_type(Dtype dtype, F f) {
  if (dtype == Dtype::float32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::bfloat16) return f(static_cast<bfloat16*>(nullptr));
  return f(static_cast<float16*>(nullptr));
}

}  // namespace fastalign::LEVEL
