// Causal attention over a packed row: what the backend is given.
#pragma once

#include <cstdint>

#include "token_logps.h"

namespace fastalign {

// Numbers [T, heads, size] of float32, bfloat16 or float16; those of one head are neighbours.
struct Heads {
  void* data;
  Dtype dtype;
  int64_t row_stride, head_stride;
};

// One causal call: queries `start` to `stop`; keys are the rows of spans `first` to `last`, of which the last is the
// queries' own.
struct AttentionCall {
  int64_t start, stop, first, last;
};

struct Span {
  int64_t start, stop;
};

struct Attention {
  Heads q, k, v, out;  // q and out have `heads` heads, k and v `key_heads`
  float* lse;          // [T, heads], written by forward, read by backward
  Heads grad_out, grad_q;
  float *grad_k, *grad_v;  // [T, key_heads, size], zeros that backward adds to
  int64_t heads, key_heads, size;
  float scale, softcap;  // scores become softcap tanh(scores / softcap); 0: they do not
  const AttentionCall* calls;
  int64_t num_calls;
  const Span* spans;
  const int64_t* trees;  // [num_trees + 1] offsets in the calls: those of one tree share keys with no other
  int64_t num_trees;
};

}  // namespace fastalign
