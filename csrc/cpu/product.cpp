// Products of fp32 or bf16 matrices with sums in fp32.
//
// What is multiplied is cut into 32-bit words: one number, or two neighbours in the inner dimension k, which one
// instruction multiplies and adds. Words of `b` are packed into strips of kCols columns, some at a time, that all threads read, words of
// `a`, where its rows are no neighbours in memory, into panels of kRows rows; the innermost loop keeps a kRows x kCols
// tile of sums in registers. A tile belongs to one thread and k is walked in order, kDepth terms at a time, so the bits
// of a number depend neither on the number of threads nor on the rows and columns around it.
#include "product.h"

#if defined(LEVEL_avx512)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/scratch.h"

#define NATIVE __attribute__((target("avx512bf16,avx512bw,avx512vl,avx512dq,avx512f,fma")))
#define NATIVE_INLINE NATIVE inline __attribute__((always_inline))

namespace fastalign {
namespace {

constexpr int64_t kDepth = 512;  // words of k at a time: sums are read and written once per so many
constexpr int64_t kLanes = 16, kVectors = 4, kCols = kLanes * kVectors;
constexpr int64_t kRows = 6;    // 6 x 4 vectors of sums, 4 of b and one of a fill the 32 registers
constexpr int64_t kBlock = 48;  // rows that a thread multiplies with a strip: a multiple of kRows and kLanes
constexpr int64_t kRowsAtOnce = 64 * kBlock;
constexpr int64_t kGroup = 8;  // strips that are packed together: what the second-level cache holds
constexpr int64_t kWork = 1 << 17;  // multiply-adds for which a thread is worth waking

using Word = uint32_t;
using Words = LEVEL::Scratch<Word>;

int64_t blocks(int64_t n, int64_t width) { return (n + width - 1) / width; }

NATIVE_INLINE __mmask16 lanes(int64_t left) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(left, 0, kLanes)) - 1);
}

// How numbers of a dtype make words.
struct Whole {
  using Number = float;
  static constexpr int64_t kPair = 1;
  NATIVE_INLINE static __m512 add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  NATIVE_INLINE static __m512i neighbours(const float* x, int64_t, __mmask16 mask, bool) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, x));
  }
};
struct Half {
  using Number = uint16_t;
  static constexpr int64_t kPair = 2;
  NATIVE_INLINE static __m512 add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  // Words of one column each: the number itself below, that of the next row above, zeros where there is none.
  NATIVE_INLINE static __m512i neighbours(const uint16_t* x, int64_t stride, __mmask16 mask, bool two) {
    __m512i below = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    if (!two) return below;
    __m512i above = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + stride));
    return _mm512_or_si512(below, _mm512_slli_epi32(above, 16));
  }
};

template <class Kind>
using Number = typename Kind::Number;
template <class Kind>
const Number<Kind>* numbers(const void* data) { return static_cast<const Number<Kind>*>(data); }
template <class Kind>
int64_t words_of(int64_t numbers) { return blocks(numbers, Kind::kPair); }

// --- packing

NATIVE_INLINE void transpose(__m512i (&x)[kLanes]) {
  __m512i y[kLanes];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

// A strip of b, whose columns are neighbours: [words][kCols].
template <class Kind>
NATIVE void pack_columns(const Product& op, int64_t k, int64_t depth, int64_t column, Word* out) {
  auto* b = numbers<Kind>(op.b) + column;
  for (int64_t p = 0; p < depth; p += Kind::kPair, out += kCols)
    for (int64_t j = 0; j < kCols; j += kLanes)
      _mm512_store_si512(out + j, Kind::neighbours(b + (k + p) * op.b_row_stride + j, op.b_row_stride,
                                                   lanes(op.n - column - j), p + 1 < depth));
}

// Words first to first + kLanes of a row whose k are neighbours.
NATIVE_INLINE __m512i row_words(const float* x, int64_t left) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(left), x));
}
NATIVE_INLINE __m512i row_words(const uint16_t* x, int64_t left) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << std::min(2 * kLanes, left)) - 1), x);
}

// The same of a b whose rows are neighbours, as a weight's are that multiplies from the right.
template <class Kind>
NATIVE void pack_transposed(const Product& op, int64_t k, int64_t depth, int64_t column, Word* out) {
  int64_t words = words_of<Kind>(depth);
  for (int64_t j = 0; j < kCols; j += kLanes)
    for (int64_t p = 0; p < words; p += kLanes) {
      __m512i x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        bool there = column + j + i < op.n;
        auto* from = numbers<Kind>(op.b) + (there ? (column + j + i) * op.b_col_stride + k + p * Kind::kPair : 0);
        x[i] = there ? row_words(from, depth - p * Kind::kPair) : _mm512_setzero_si512();
      }
      transpose(x);
      for (int64_t i = 0; i < std::min(kLanes, words - p); ++i) _mm512_store_si512(out + (p + i) * kCols + j, x[i]);
    }
}

template <class Kind>
void pack_strip(const Product& op, int64_t k, int64_t depth, int64_t strip, Word* out) {
  (op.b_col_stride == 1 ? pack_columns<Kind> : pack_transposed<Kind>)(op, k, depth, strip * kCols, out);
}

// Panels of a whose rows are neighbours in memory: [kBlock / kRows][words][kRows].
template <class Kind>
NATIVE void pack_neighbours(const Product& op, int64_t k, int64_t depth, int64_t row, Word* out) {
  int64_t words = words_of<Kind>(depth);
  alignas(64) Word column[kBlock];
  for (int64_t p = 0; p < words; ++p) {
    auto* x = numbers<Kind>(op.a) + row + (k + p * Kind::kPair) * op.a_col_stride;
    for (int64_t i = 0; i < kBlock; i += kLanes)
      _mm512_store_si512(column + i, Kind::neighbours(x + i, op.a_col_stride, lanes(op.m - row - i),
                                                      p * Kind::kPair + 1 < depth));
    for (int64_t i = 0; i < kBlock; i += kRows)
      std::memcpy(out + i * words + p * kRows, column + i, kRows * sizeof(Word));
  }
}

// The same of any strides.
template <class Kind>
void pack_rows(const Product& op, int64_t k, int64_t depth, int64_t row, Word* out) {
  int64_t words = words_of<Kind>(depth), rows = std::min(kBlock, op.m - row);
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t p = 0; p < words; ++p) {
      Number<Kind> pair[Kind::kPair] = {};
      for (int64_t j = 0; j < Kind::kPair && i < rows && p * Kind::kPair + j < depth; ++j)
        pair[j] = numbers<Kind>(op.a)[(row + i) * op.a_row_stride + (k + p * Kind::kPair + j) * op.a_col_stride];
      std::memcpy(out + (i / kRows * words + p) * kRows + i % kRows, pair, sizeof(Word));
    }
}

// --- sums

// Rows of a: word p of row i is at data + i * row + p * step.
template <class Kind>
struct Rows {
  const Number<Kind>* data;
  int64_t row, step;
};

NATIVE_INLINE void put(float* out, __m512 sum, __mmask16 mask, bool accumulate) {
  if (accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sum);
  _mm512_mask_storeu_ps(out, mask, sum);
}
NATIVE_INLINE void put(uint16_t* out, __m512 sum, __mmask16 mask, bool) {
  _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(sum));
}

template <class Kind, int rows, class Out>
NATIVE_INLINE void add_tile(Rows<Kind> a, const Word* b, int64_t words, Out* out, int64_t stride, int64_t cols,
                            bool accumulate) {
  __m512 sums[rows][kVectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t p = 0; p < words; ++p, a.data += a.step, b += kCols) {
    __m512i columns[kVectors];
    for (int64_t j = 0; j < kVectors; ++j) columns[j] = _mm512_load_si512(b + j * kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < rows; ++i) {
      int word;
      std::memcpy(&word, a.data + i * a.row, sizeof word);
      __m512i x = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) sums[i][j] = Kind::add(sums[i][j], x, columns[j]);
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kVectors; ++j)
      put(out + i * stride + j * kLanes, sums[i][j], lanes(cols - j * kLanes), accumulate);
}

template <class Kind, class Out, int rows = 1>
NATIVE void add_rows(int64_t count, Rows<Kind> a, const Word* b, int64_t words, Out* out, int64_t stride, int64_t cols,
                     bool accumulate) {
  if constexpr (rows <= kRows) {
    if (count == rows) return add_tile<Kind, rows>(a, b, words, out, stride, cols, accumulate);
    add_rows<Kind, Out, rows + 1>(count, a, b, words, out, stride, cols, accumulate);
  }
}

// The rows of a block of a times a strip of b.
template <class Kind, class Out>
void add_block(const Product& op, Rows<Kind> a, bool packed, const Word* b, int64_t words, int64_t row, int64_t column,
               Out* out, int64_t stride, bool accumulate) {
  int64_t panel = packed ? words * kRows * Kind::kPair : kRows * a.row;
  for (int64_t i = row, last = std::min(op.m, row + kBlock); i < last; i += kRows, a.data += panel)
    add_rows<Kind>(std::min(kRows, last - i), a, b, words, out + i * stride + column, stride, op.n - column, accumulate);
}

// Part k to k + depth of the inner dimension. Called by all threads.
template <class Kind, class Out>
void add_part(const Product& op, int64_t k, int64_t depth, Word* strips, Word* panels, Out* out, int64_t stride,
              bool accumulate) {
  int64_t words = words_of<Kind>(depth), num_strips = blocks(op.n, kCols), num_blocks = blocks(op.m, kBlock);
  if (panels) {
#pragma omp for
    for (int64_t r = 0; r < num_blocks; ++r)
      (op.a_row_stride == 1 ? pack_neighbours<Kind> : pack_rows<Kind>)(op, k, depth, r * kBlock,
                                                                       panels + r * kBlock * words);
  }
  const Word* b = op.packed ? static_cast<const Word*>(op.packed) + num_strips * kCols * words_of<Kind>(k) : strips;
  for (int64_t first = 0, step = op.packed ? num_strips : kGroup; first < num_strips; first += step) {
    int64_t last = std::min(num_strips, first + step);
    if (!op.packed) {
#pragma omp for
      for (int64_t s = first; s < last; ++s) pack_strip<Kind>(op, k, depth, s, strips + (s - first) * kCols * words);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_blocks * (last - first); ++i) {
      int64_t row = i % num_blocks * kBlock, strip = i / num_blocks;
      Rows<Kind> a{numbers<Kind>(panels + row * words), Kind::kPair, kRows * Kind::kPair};
      if (!panels) a = {numbers<Kind>(op.a) + row * op.a_row_stride + k, op.a_row_stride, Kind::kPair};
      add_block<Kind>(op, a, panels, b + strip * kCols * words, words, row, (first + strip) * kCols, out, stride,
                      accumulate);
    }
  }
}

NATIVE void round_row(const float* from, uint16_t* out, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes) {
    __mmask16 mask = lanes(n - j);
    put(out + j, _mm512_maskz_loadu_ps(mask, from + j), mask, false);
  }
}

template <class Kind>
void run(const Product& op, int threads) {
  constexpr int64_t kPart = kDepth * Kind::kPair;
  int64_t part = std::min(op.k, kPart), num_strips = blocks(op.n, kCols), num_blocks = blocks(op.m, kBlock);
  bool half = op.out_dtype != Dtype::float32, in_parts = half && op.k > part;
  bool as_it_is = op.a_col_stride == 1 && op.k % Kind::kPair == 0;
  auto words = [](bool wanted, int64_t count) { return wanted ? LEVEL::scratch<Word>("product", count) : Words(); };
  Words strips = words(!op.packed, std::min(num_strips, kGroup) * kCols * words_of<Kind>(part));
  Words panels = words(!as_it_is, num_blocks * kBlock * words_of<Kind>(part));
  Words sums = words(in_parts, op.m * op.n);
  auto* wide = in_parts ? reinterpret_cast<float*>(sums.get()) : static_cast<float*>(op.out);
  int64_t stride = in_parts ? op.n : op.out_stride;
  auto* out = static_cast<uint16_t*>(op.out);
  int64_t tasks = std::max<int64_t>(1, num_strips * num_blocks);
  threads = int(std::min<int64_t>({threads, tasks, 1 + op.m * op.n * op.k / kWork}));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t k = 0; k < op.k; k += part) {
      int64_t depth = std::min(part, op.k - k);
      if (half && !in_parts) add_part<Kind>(op, k, depth, strips.get(), panels.get(), out, stride, false);
      else add_part<Kind>(op, k, depth, strips.get(), panels.get(), wide, stride, op.accumulate || k);
    }
    if (in_parts) {
#pragma omp for
      for (int64_t i = 0; i < op.m; ++i) round_row(wide + i * op.n, out + i * op.out_stride, op.n);
    }
  }
}

template <class Kind>
void pack(const Product& op, Word* out, int threads) {
  int64_t num_strips = blocks(op.n, kCols);
  for (int64_t k = 0; k < op.k; k += kDepth * Kind::kPair) {
    int64_t depth = std::min(kDepth * Kind::kPair, op.k - k), words = words_of<Kind>(depth);
    Word* part = out + num_strips * kCols * words_of<Kind>(k);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < num_strips; ++s) pack_strip<Kind>(op, k, depth, s, part + s * kCols * words);
  }
}

}  // namespace

bool has_product() { return __builtin_cpu_supports("avx512bf16"); }

// Some rows at a time, so that a copy of a, where one is made, stays small; no number's bits depend on it.
void product(const Product& op, int threads) {
  bool half = op.dtype != Dtype::float32;
  int64_t a_size = half ? 2 : 4, out_size = op.out_dtype == Dtype::float32 ? 4 : 2;
  for (int64_t row = 0; row < op.m; row += kRowsAtOnce) {
    Product some = op;
    some.m = std::min(kRowsAtOnce, op.m - row);
    some.a = static_cast<const char*>(op.a) + row * op.a_row_stride * a_size;
    some.out = static_cast<char*>(op.out) + row * op.out_stride * out_size;
    (half ? run<Half> : run<Whole>)(some, threads);
  }
}

int64_t packed_bytes(int64_t n, int64_t k, Dtype dtype) {
  int64_t words = dtype == Dtype::float32 ? words_of<Whole>(k) : words_of<Half>(k);
  return blocks(n, kCols) * kCols * words * int64_t(sizeof(Word));
}

void pack_product(const Product& op, void* out, int threads) {
  (op.dtype == Dtype::float32 ? pack<Whole> : pack<Half>)(op, static_cast<Word*>(out), threads);
}

}  // namespace fastalign
#elif defined(LEVEL_scalar) && !defined(FASTALIGN_AVX512)
#include <stdexcept>

namespace fastalign {
bool has_product() { return false; }
void product(const Product&, int) { throw std::logic_error("product needs AVX512-BF16"); }
int64_t packed_bytes(int64_t, int64_t, Dtype) { return 0; }
void pack_product(const Product&, void*, int) { throw std::logic_error("pack_product needs AVX512-BF16"); }
}  // namespace fastalign
#endif
