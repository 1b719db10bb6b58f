// bf16 products summed in fp32, with the instruction that multiplies pairs of bf16: the gradient of a weight over many
// chunks must be summed in fp32, and widening the operands first would cost the GEMM four times its time.
//
// Pairs of neighbours in the inner dimension k become one 32-bit word. Words of `b` are packed into strips of kCols
// columns that all threads read, words of `a` into panels of kRows rows that stay in a core's cache; the innermost loop
// keeps a kRows x kCols tile of sums in registers. A tile belongs to one thread and k is walked in order, so the bits do
// not depend on the number of threads.
#include "product.h"

#if defined(LEVEL_avx512)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/scratch.h"

#define BF16 __attribute__((target("avx512bf16,avx512bw,avx512vl,avx512dq,avx512f")))

namespace fastalign {
namespace {

constexpr int64_t kDepth = 1024;  // of k at a time: sums are read and written once per so many terms
constexpr int64_t kLanes = 16, kVectors = 4, kCols = kLanes * kVectors;
constexpr int64_t kRows = 6;   // 6 x 4 vectors of sums, 4 of b and one of a fill the 32 registers
constexpr int64_t kBlock = 48;  // rows packed at a time: a multiple of kRows and kLanes

using Word = uint32_t;
using Words = LEVEL::Scratch<Word>;

Words words(int64_t count) { return LEVEL::scratch<Word>("add_product", count); }

int64_t blocks(int64_t n, int64_t width) { return (n + width - 1) / width; }

BF16 __mmask16 lanes(int64_t left) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(left, 0, kLanes)) - 1); }

// Words of one column each: `low` below, `high` above, zeros where there is none.
BF16 __m512i interleave(const uint16_t* low, const uint16_t* high, __mmask16 low_mask, __mmask16 high_mask) {
  __m512i below = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low_mask, low));
  __m512i above = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high_mask, high));
  return _mm512_or_si512(below, _mm512_slli_epi32(above, 16));
}

// A strip of b, whose columns are neighbours: [pairs][kCols].
BF16 void pack_columns(const Product& op, int64_t k, int64_t depth, int64_t column, Word* out) {
  for (int64_t p = 0; p < depth; p += 2, out += kCols) {
    const uint16_t* low = op.b + (k + p) * op.b_row_stride + column;
    const uint16_t* high = p + 1 < depth ? low + op.b_row_stride : low;
    for (int64_t j = 0; j < kCols; j += kLanes) {
      __mmask16 mask = lanes(op.n - column - j);
      _mm512_store_si512(out + j, interleave(low + j, high + j, mask, p + 1 < depth ? mask : 0));
    }
  }
}

// The same of a b whose rows are neighbours, as a weight's are that multiplies from the right: there a pair of k is one
// word, and blocks of words are transposed.
BF16 void pack_transposed(const Product& op, int64_t k, int64_t depth, int64_t column, Word* out) {
  int64_t pairs = blocks(depth, 2), columns = std::min(kCols, op.n - column);
  if (columns < kCols) std::memset(out, 0, size_t(pairs * kCols) * sizeof(Word));
  for (int64_t p = 0; p < pairs; p += kLanes) {
    int64_t width = std::min(kLanes, pairs - p);
    __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << std::min(2 * kLanes, depth - 2 * p)) - 1);
    for (int64_t j = 0; j < columns; ++j) {
      alignas(64) Word words[kLanes];
      const uint16_t* x = op.b + (column + j) * op.b_col_stride + k + 2 * p;
      _mm512_store_si512(words, _mm512_maskz_loadu_epi16(mask, x));
      for (int64_t i = 0; i < width; ++i) out[(p + i) * kCols + j] = words[i];
    }
  }
}

// Panels of a whose rows are neighbours in memory: [kBlock / kRows][pairs][kRows].
BF16 void pack_neighbours(const Product& op, int64_t k, int64_t depth, int64_t row, Word* out) {
  int64_t pairs = blocks(depth, 2);
  alignas(64) Word column[kBlock];
  for (int64_t p = 0; p < pairs; ++p) {
    bool two = 2 * p + 1 < depth;
    const uint16_t* low = op.a + row + (k + 2 * p) * op.a_col_stride;
    const uint16_t* high = two ? low + op.a_col_stride : low;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      __mmask16 mask = lanes(op.m - row - i);
      _mm512_store_si512(column + i, interleave(low + i, high + i, mask, two ? mask : 0));
    }
    for (int64_t i = 0; i < kBlock; i += kRows)
      std::memcpy(out + i * pairs + p * kRows, column + i, kRows * sizeof(Word));
  }
}

// The same of any strides.
void pack_rows(const Product& op, int64_t k, int64_t depth, int64_t row, Word* out) {
  int64_t pairs = blocks(depth, 2), rows = std::min(kBlock, op.m - row);
  for (int64_t i = 0; i < kBlock; ++i) {
    Word* words = out + i / kRows * kRows * pairs + i % kRows;
    const uint16_t* x = op.a + (row + i) * op.a_row_stride + k * op.a_col_stride;
    int64_t whole = i < rows && op.a_col_stride == 1 ? depth / 2 : 0;
    for (int64_t p = 0; p < whole; ++p) std::memcpy(words + p * kRows, x + 2 * p, sizeof(Word));
    for (int64_t p = whole; p < pairs; ++p) {
      Word low = i < rows ? x[2 * p * op.a_col_stride] : 0;
      Word high = i < rows && 2 * p + 1 < depth ? x[(2 * p + 1) * op.a_col_stride] : 0;
      words[p * kRows] = low | high << 16;
    }
  }
}

BF16 void add_tile(const Word* a, const Word* b, int64_t pairs, float* out, int64_t stride, int64_t rows, int64_t cols,
                   bool accumulate) {
  __m512 sums[kRows][kVectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, a += kRows, b += kCols) {
    __m512bh columns[kVectors];
    for (int64_t j = 0; j < kVectors; ++j) columns[j] = (__m512bh)_mm512_load_si512(b + j * kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
      __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], row, columns[j]);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kVectors; ++j) {
      float* target = out + i * stride + j * kLanes;
      __mmask16 mask = lanes(cols - j * kLanes);
      __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, target) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(target, mask, _mm512_add_ps(before, sums[i][j]));
    }
}

void add_block(const Product& op, const Word* a, const Word* b, int64_t pairs, int64_t row, bool accumulate) {
  for (int64_t column = 0; column < op.n; column += kCols)
    for (int64_t i = 0; i < std::min(kBlock, op.m - row); i += kRows)
      add_tile(a + i * pairs, b + column * pairs, pairs, op.out + (row + i) * op.out_stride + column, op.out_stride,
               std::min(kRows, op.m - row - i), op.n - column, accumulate);
}

}  // namespace

bool has_bf16_product() { return __builtin_cpu_supports("avx512bf16"); }

void add_product(const Product& op, int threads) {
  int64_t strips = blocks(op.n, kCols), row_blocks = blocks(op.m, kBlock);
  Words b = words(strips * kCols * blocks(std::min(op.k, kDepth), 2));
  OutOfMemory missing{};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Words a;
    LEVEL::keep_failure(missing, [&] { a = words(kBlock * kDepth / 2); });
    for (int64_t k = 0; k < op.k; k += kDepth) {
      int64_t depth = std::min(kDepth, op.k - k), pairs = blocks(depth, 2);
#pragma omp for
      for (int64_t s = 0; s < strips; ++s)
        (op.b_col_stride == 1 ? pack_columns : pack_transposed)(op, k, depth, s * kCols, &b[s * kCols * pairs]);
#pragma omp for
      for (int64_t r = 0; r < row_blocks; ++r) {
        if (!a) continue;
        (op.a_row_stride == 1 ? pack_neighbours : pack_rows)(op, k, depth, r * kBlock, a.get());
        add_block(op, a.get(), b.get(), pairs, r * kBlock, op.accumulate || k);
      }
    }
  }
  LEVEL::throw_failure(missing);
}

}  // namespace fastalign
#elif defined(LEVEL_scalar) && !defined(FASTALIGN_AVX512)
#include <stdexcept>

namespace fastalign {
bool has_bf16_product() { return false; }
void add_product(const Product&, int) { throw std::logic_error("add_product needs AVX512-BF16"); }
}  // namespace fastalign
#endif
