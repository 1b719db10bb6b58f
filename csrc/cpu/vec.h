// Vectors of floats, one definition per instruction set, under one set of names.
//
// This header is compiled several times with different flags, so all of it lives in the namespace of its LEVEL: two
// copies of one inline function would be merged by the linker, and the merged one might not run on this processor.
// max_(a, b) and min_(a, b) return b when either is NaN, as x86 does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(LEVEL_avx512) || defined(LEVEL_avx2)
#include <immintrin.h>
#endif

#define FORCE_INLINE inline __attribute__((always_inline))

namespace fastalign::LEVEL {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

FORCE_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

FORCE_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

#if defined(LEVEL_avx512)

constexpr int kLanes = 16;
using vec = __m512;
using ivec = __m512i;

FORCE_INLINE vec set(float x) { return _mm512_set1_ps(x); }
FORCE_INLINE vec max_(vec a, vec b) { return _mm512_max_ps(a, b); }
FORCE_INLINE vec min_(vec a, vec b) { return _mm512_min_ps(a, b); }
FORCE_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
FORCE_INLINE vec abs(vec x) { return _mm512_abs_ps(x); }
FORCE_INLINE vec copy_sign(vec x, vec sign) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x), _mm512_castps_si512(sign),
                                                       _mm512_set1_epi32(int(0x80000000)), 0xD8));
}
FORCE_INLINE vec where_less(vec a, vec b, vec yes, vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
FORCE_INLINE bool any_greater(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
constexpr float kExpLow = -104.5f;  // below it exp rounds to 0

FORCE_INLINE vec load(const float* x) { return _mm512_loadu_ps(x); }
FORCE_INLINE vec load(const bfloat16* x) {
  __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
FORCE_INLINE vec load(const float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
FORCE_INLINE void store(float* out, vec x) { _mm512_storeu_ps(out, x); }
FORCE_INLINE void store(bfloat16* out, vec x) {
  ivec bits = _mm512_castps_si512(x);
  ivec odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  ivec rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(rounded));
}
FORCE_INLINE void store(float16* out, vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(LEVEL_avx2)

constexpr int kLanes = 8;
using vec = __m256;
using ivec = __m256i;

FORCE_INLINE vec set(float x) { return _mm256_set1_ps(x); }
FORCE_INLINE vec max_(vec a, vec b) { return _mm256_max_ps(a, b); }
FORCE_INLINE vec min_(vec a, vec b) { return _mm256_min_ps(a, b); }
FORCE_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
FORCE_INLINE vec round(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FORCE_INLINE vec abs(vec x) { return _mm256_andnot_ps(set(-0.0f), x); }
FORCE_INLINE vec copy_sign(vec x, vec sign) {
  return _mm256_or_ps(_mm256_andnot_ps(set(-0.0f), x), _mm256_and_ps(set(-0.0f), sign));
}
FORCE_INLINE vec where_less(vec a, vec b, vec yes, vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FORCE_INLINE bool any_greater(vec a, vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
// p * 2^n for integral n in [-127, 127], by way of the exponent field; n = -127 gives 0.
FORCE_INLINE vec scale(vec p, vec n) {
  ivec exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return p * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
constexpr float kExpLow = -87.9f;  // ln 2^-126.5 and below: n = -127

FORCE_INLINE vec load(const float* x) { return _mm256_loadu_ps(x); }
FORCE_INLINE vec load(const bfloat16* x) {
  __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
FORCE_INLINE vec load(const float16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
FORCE_INLINE void store(float* out, vec x) { _mm256_storeu_ps(out, x); }
FORCE_INLINE void store(bfloat16* out, vec x) {
  ivec bits = _mm256_castps_si256(x);
  ivec odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  ivec rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  ivec nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  ivec packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}
FORCE_INLINE void store(float16* out, vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else  // portable: four floats that the compiler maps to whatever the processor has

constexpr int kLanes = 4;
typedef float vec __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(16)));

FORCE_INLINE vec set(float x) { return vec{x, x, x, x}; }
FORCE_INLINE vec select(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
FORCE_INLINE vec max_(vec a, vec b) { return select(a > b, a, b); }
FORCE_INLINE vec min_(vec a, vec b) { return select(a < b, a, b); }
FORCE_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }  // two roundings; a library fma would be a call
FORCE_INLINE vec round(vec x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: for |x| < 2^22
FORCE_INLINE vec abs(vec x) { return (vec)((ivec)x & 0x7fffffff); }
FORCE_INLINE vec copy_sign(vec x, vec sign) { return (vec)(((ivec)x & 0x7fffffff) | ((ivec)sign & ~0x7fffffff)); }
FORCE_INLINE vec where_less(vec a, vec b, vec yes, vec no) { return select(a < b, yes, no); }
FORCE_INLINE bool any_greater(vec a, vec b) {
  ivec mask = a > b;
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
}
FORCE_INLINE vec scale(vec p, vec n) {
  ivec exponent = (ivec)(n + 12582912.0f) - 0x4b400000 + 127;  // the integer sits in the low bits of the sum
  return p * (vec)(exponent << 23);
}
constexpr float kExpLow = -87.9f;

FORCE_INLINE float widen(float x) { return x; }
FORCE_INLINE float widen(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
FORCE_INLINE float widen(float16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  float value = from_bits(magnitude << 13) * 0x1p112f;  // re-bias the exponent; exact, subnormals included
  return from_bits(sign | to_bits(value));
}
FORCE_INLINE void narrow(float x, float* out) { *out = x; }
FORCE_INLINE void narrow(float x, bfloat16* out) {
  uint32_t bits = to_bits(x);
  out->bits = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
FORCE_INLINE void narrow(float x, float16* out) {
  uint32_t sign = to_bits(x) >> 16 & 0x8000, bits = to_bits(x) & 0x7fffffff, half;
  if (bits > 0x7f800000) half = 0x7e00;                   // NaN
  else if (bits >= 0x477ff000) half = 0x7c00;             // rounds to 65536 or more: infinity
  else if (bits >= 0x38800000) half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  else half = to_bits(from_bits(bits) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds to multiples of 2^-24
  out->bits = uint16_t(sign | half);
}
template <class T>
FORCE_INLINE vec load(const T* x) {
  return vec{widen(x[0]), widen(x[1]), widen(x[2]), widen(x[3])};
}
template <class T>
FORCE_INLINE void store(T* out, vec x) {
  for (int i = 0; i < kLanes; ++i) narrow(x[i], out + i);
}

#endif

// The first n lanes from memory, the others 0; and back.
template <class T>
FORCE_INLINE vec load(const T* x, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, x, sizeof(T) * n);
  return load(lanes);
}
template <class T>
FORCE_INLINE void store(T* out, vec x, int64_t n) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(out, lanes, sizeof(T) * n);
}

struct Lanes {
  float lane[kLanes];
};

FORCE_INLINE Lanes lanes_of(vec x) {
  Lanes out;
  store(out.lane, x);
  return out;
}

FORCE_INLINE float first(vec x) { return lanes_of(x).lane[0]; }

// Lanes n and above become `fill`.
FORCE_INLINE vec keep(vec x, int64_t n, float fill) {
  Lanes values = lanes_of(x);
  for (int64_t i = n; i < kLanes; ++i) values.lane[i] = fill;
  return load(values.lane);
}

FORCE_INLINE float max_lane(vec x) {
  Lanes v = lanes_of(x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] = v.lane[i] > v.lane[i + half] ? v.lane[i] : v.lane[i + half];
  return v.lane[0];
}

FORCE_INLINE float sum_lanes(vec x) {
  Lanes v = lanes_of(x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v.lane[i] += v.lane[i + half];
  return v.lane[0];
}

// exp(x) for kExpLow <= x <= 88, NaN passed on; at most 2 ulp.
#if defined(LEVEL_avx512)
// x = n ln 2 + r with n in sixteenths: adding 1.5 * 2^19 rounds to them and leaves 16 times the fraction of n in the
// low four bits, where a permutation looks up its power of two. |r| <= ln 2 / 32, so a cubic is enough (2e-9).
FORCE_INLINE vec exp_in_range(vec x) {
  const vec magic = set(786432.0f);
  const vec powers = _mm512_setr_ps(  // 2^(k/16)
      0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f,
      0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f, 0x1.ae89fap+0f, 0x1.c199bep+0f,
      0x1.d5818ep+0f, 0x1.ea4afap+0f);
  vec shifted = fma(x, set(1.44269504f), magic);
  vec n = shifted - magic;
  vec r = fma(n, set(-0.693359375f), x);  // the high part of ln 2 has 9 bits: n times it is exact
  r = fma(n, set(2.12194440e-4f), r);
  vec q = fma(fma(r, set(0x1.55574ap-3f), set(0x1.000220p-1f)), r, set(1.0f)) * r;
  vec power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), powers);
  return _mm512_scalef_ps(fma(power, q, power), n);  // scalef takes the floor of n
}
#else
// x = n ln 2 + r; exp(r) by a polynomial fitted for the least largest relative error on |r| <= ln 2 / 2 (3e-9).
FORCE_INLINE vec exp_in_range(vec x) {
  vec n = round(x * set(1.44269504f));
  vec r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  vec q = fma(r, set(0x1.6a23d0p-10f), set(0x1.123a20p-7f));
  q = fma(q, r, set(0x1.5558f2p-5f));
  q = fma(q, r, set(0x1.555492p-3f));
  q = fma(q, r, set(0x1.fffffcp-2f));
  q = fma(q, r, set(1.0f));
  q = fma(q, r, set(1.0f));
  return scale(q, n);
}
#endif

// x brought into the range of exp_in_range: -inf becomes a number whose exp is 0, NaN stays.
FORCE_INLINE vec clamp_low(vec x) { return max_(set(kExpLow), x); }

struct TanhSlope {
  vec tanh, slope;
};

// tanh(x) and 1 - tanh(x)^2. Away from 0 both come from q = 1 / (exp(2|x|) + 1) without cancellation:
// tanh = 1 - 2q, slope = 4q(1 - q); near 0 tanh is an odd polynomial (relative error 5e-9).
FORCE_INLINE TanhSlope tanh_slope(vec x) {
  vec a = abs(x);
  vec q = set(1.0f) / (exp_in_range(min_(set(80.0f), a + a)) + set(1.0f));
  vec square = a * a;
  vec series = fma(square, set(-0x1.756234p-8f), set(0x1.520b2ap-6f));
  series = fma(series, square, set(-0x1.b83854p-5f));
  series = fma(series, square, set(0x1.11070ap-3f));
  series = fma(series, square, set(-0x1.555532p-2f));
  series = fma(series * square, a, a);
  vec t = where_less(a, set(0.625f), series, fma(q, set(-2.0f), set(1.0f)));
  return {copy_sign(t, x), set(4.0f) * q * (set(1.0f) - q)};
}

}  // namespace fastalign::LEVEL
