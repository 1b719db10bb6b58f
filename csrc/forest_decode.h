// One new token per row against a forest of cached keys and values: what the backend is given.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fastalign {

constexpr int64_t kForestBlock = 16;  // positions of a block

// Rows `first` to `last` of the order have the prompt whose full blocks, `shared` of them, begin their chains.
struct ForestGroup {
  int64_t first, last, shared;
};

struct ForestDecode {
  Heads q, k, v, out;  // [rows, heads or key_heads, size]; k and v are of the new tokens
  void *keys, *values;  // [blocks][key_heads][size][kForestBlock] and [blocks][key_heads][kForestBlock][size]
  Dtype dtype;          // of both; after the last block of values there is room for a vector
  int64_t heads, key_heads, size;
  float scale, softcap;  // 0: none
  const int32_t* chains;  // [rows, width] blocks of each row's sequence
  int64_t width;
  const int64_t* lengths;  // [rows] positions, the new one included
  const int64_t* order;    // [rows] rows, those of a group side by side
  const ForestGroup* groups;
  int64_t num_groups;
};

}  // namespace fastalign
