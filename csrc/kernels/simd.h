// simd.h - one vector type for the kernels: GCC/Clang vector extensions, as wide as the instruction set.
// What the extensions cannot say (half-precision conversion) is one function per instruction set here.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_KERNELS_SIMD_H
#define MS_KERNELS_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>            // for _mm512_cvtph_ps
enum { VW = 16, REGISTERS = 32 }; // floats in a vector
#elif defined(__AVX2__)
#include <immintrin.h> // for _mm256_cvtph_ps
enum { VW = 8, REGISTERS = 16 };
#elif defined(__aarch64__)
enum { VW = 4, REGISTERS = 32 };
#else
enum { VW = 4, REGISTERS = 16 };
#endif

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
// The same, loaded and stored at any address.
typedef float vf_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf v_load(const float *p) { return *(const vf_any *)p; }
INLINE void v_store(float *p, vf x) { *(vf_any *)p = x; }
INLINE vu v_load_words(const void *p) { return *(const vu_any *)p; }
INLINE vf v_set(float x) { return x - (vf){0}; } // every lane, also for NaN and -0
INLINE vu v_set_words(uint32_t x) { return x - (vu){0}; }
INLINE vf v_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// A word holds two bf16 values; bf16 is the upper half of a float.
INLINE vf v_low_bf16(vu words) { return (vf)(words << 16); }
INLINE vf v_high_bf16(vu words) { return (vf)(words & 0xffff0000u); }

#if defined(__AVX512BF16__)
// c[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1], both bf16; fp32 sum, subnormals count as zero.
INLINE vf v_dot_bf16(vf c, vu a, vu b) {
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

// To nearest even; subnormals become zero (the dot product would not see them).
INLINE void v_store_bf16(uint16_t *p, vf x) {
  _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#endif

// float16 -> float32 without hardware: shift exponent and mantissa into place, scale by 2^112 to move the bias
// (exact, also for subnormals), put infinities and NaN back.
INLINE float widen_f16_bits(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = (uint32_t)(h & 0x7fffu) << 13;
  float f;
  memcpy(&f, &rest, 4);
  f *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((h & 0x7c00u) == 0x7c00u) bits = 0x7f800000u | rest;
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}

INLINE vf v_load_f16(const uint16_t *p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
  vf x = {0};
  for (int i = 0; i < VW; i++) x[i] = widen_f16_bits(p[i]);
  return x;
#endif
}

INLINE vf v_load_int8(const int8_t *p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
#else
  vf x = {0};
  for (int i = 0; i < VW; i++) x[i] = p[i];
  return x;
#endif
}

// float32 -> float16 and bfloat16, to nearest even; NaN stays a (quiet) NaN.
INLINE uint16_t narrow_f16_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (rest >> 13 & 0x1ffu));
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); // rounds to 65536 or more
  if (rest < 0x38800000u) { // subnormal result: let a float addition round at 2^-24
    float magnitude;
    memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  rest += 0xfffu + (rest >> 13 & 1u);
  return (uint16_t)(sign | ((rest - 0x38000000u) >> 13));
}

INLINE uint16_t narrow_bf16_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif
