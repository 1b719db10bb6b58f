// The layers of a transformer for one new token of each row, in one call: what the backend is given.
#pragma once

#include <cstdint>

#include "forest_decode.h"
#include "layers.h"
#include "product.h"

namespace fastalign {

// x weight^T + bias with the weight [n, k] as pack_product left it; bias.data null: none.
struct Linear {
  const void* packed;
  Rows bias;
  int64_t n, k;
};

// weight.data null: none.
struct Norm {
  Rows weight;
  double eps;
};

// x += attention(norm(x)), then x += down(silu(gate(h)) up(h)) of h = norm(x).
struct DecodeLayer {
  Norm first, second, q_norm, k_norm;
  Linear qkv, o, gate, up, down;
  Dtype dtype;   // in which all products multiply
  Dtype normed;  // of q and k behind their norms
  Dtype turned;  // behind the rotation
  void *keys, *values;  // as of ForestDecode
};

// The rows' hidden states, which become those behind the layers, and what all layers share: of `attend` all but q, k, v,
// out, keys and values.
struct DecodeStep {
  Rows x, cos, sin;
  int64_t rows, columns;
  ForestDecode attend;
};

}  // namespace fastalign
