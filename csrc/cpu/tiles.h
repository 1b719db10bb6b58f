// Small fp32 products: a tile of sums in registers, terms added in the order of the inner dimension, so that the bits of
// an element do not depend on the rows and columns around it.
#pragma once

#include <algorithm>

#include "cpu/vec.h"

namespace fastalign::LEVEL {

constexpr int64_t kTileRows = 6;
constexpr int64_t kTileVectors = kLanes == 16 ? 4 : 2;  // with the rows they fill the registers
constexpr int64_t kStrip = kTileVectors * kLanes;

inline int64_t to_strips(int64_t n) { return (n + kStrip - 1) / kStrip * kStrip; }

// a[i, p] = data[i * row + p * step]
struct Left {
  const float* data;
  int64_t row, step;
};

// b[p, j] = data[j / kStrip * strip + p * step + j % kStrip]: rows with neighbouring columns have strip = kStrip.
struct Right {
  const float* data;
  int64_t step, strip;
};

template <int rows>
FORCE_INLINE void tile(const float* a, Left shape, const float* b, int64_t step, int64_t depth, float* out,
                       int64_t out_row, bool add) {
  vec sums[rows][kTileVectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = set(0);
  for (int64_t p = 0; p < depth; ++p, a += shape.step, b += step) {
    vec columns[kTileVectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTileVectors; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < rows; ++i) {
      vec x = set(a[i * shape.row]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTileVectors; ++j) sums[i][j] = fma(x, columns[j], sums[i][j]);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kTileVectors; ++j) {
      float* to = out + i * out_row + j * kLanes;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
}

// out [rows, columns] = a b, or += ; columns are whole strips.
inline void product(int64_t rows, int64_t columns, int64_t depth, Left a, Right b, float* out, int64_t out_row,
                    bool add) {
  for (int64_t j = 0; j < columns; j += kStrip) {
    const float* strip = b.data + j / kStrip * b.strip;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const float* left = a.data + i * a.row;
      float* to = out + i * out_row + j;
      switch (std::min(kTileRows, rows - i)) {
        case 1: tile<1>(left, a, strip, b.step, depth, to, out_row, add); break;
        case 2: tile<2>(left, a, strip, b.step, depth, to, out_row, add); break;
        case 3: tile<3>(left, a, strip, b.step, depth, to, out_row, add); break;
        case 4: tile<4>(left, a, strip, b.step, depth, to, out_row, add); break;
        case 5: tile<5>(left, a, strip, b.step, depth, to, out_row, add); break;
        default: tile<6>(left, a, strip, b.step, depth, to, out_row, add);
      }
    }
  }
}

}  // namespace fastalign::LEVEL
