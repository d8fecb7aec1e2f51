// pack.c - weight matrices in and out of 16-wide panels.
//
// A panel row is what one step of the k loop reads: 16 columns, one cache line in fp32. Packing is done once, at load;
// it makes the kernels' weight stream sequential and free of tails.
//
// SPDX-License-Identifier: Apache-2.0
#include "pack.h"
#include "simd.h"

#include <float.h> // for FLT_MIN
#include <math.h>  // for fabsf

enum { LINE = 64 }; // bytes

int64_t ms_panel_bytes(ms_dtype storage, int64_t K) {
  if (storage == MS_BF16) return (K + 1) / 2 * 2 * MS_PANEL * 2;
  int64_t bytes = K * MS_PANEL * ms_dtype_size(storage);
  return (bytes + LINE - 1) / LINE * LINE;
}

// Index of element (k, j) in a panel, in elements.
INLINE int64_t panel_index(const ms_dtype storage, int64_t k, int64_t j) {
  if (storage == MS_BF16) return (k / 2 * MS_PANEL + j) * 2 + k % 2;
  return k * MS_PANEL + j;
}

INLINE float load_float(const ms_dtype dtype, const void *data, int64_t i) {
  if (dtype == MS_F32) return ((const float *)data)[i];
  if (dtype == MS_F16) return widen_f16_bits(((const uint16_t *)data)[i]);
  uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// Largest magnitude / 127, at least the smallest normal number, so that dividing by it keeps its precision.
INLINE float int8_scale(const ms_dtype from, const void *source, int64_t i, int64_t step,
                        int64_t K) {
  float most = 0;
  for (int64_t k = 0; k < K; k++) {
    float x = fabsf(load_float(from, source, i + k * step));
    if (!(x <= FLT_MAX)) return NAN;
    if (x > most) most = x;
  }
  return most > 0 ? fmaxf(most / 127, FLT_MIN) : 0;
}

// The nearest integer to x / scale, ties to even: adding 1.5 * 2^23 leaves it in the low bits.
INLINE int8_t narrow_int8(float x, float scale) {
  if (!(scale > 0)) return 0;
  float shifted = x / scale + 0x1.8p23f;
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  return (int8_t)bits;
}

INLINE void move(const ms_dtype from, const void *source, int64_t i, const ms_dtype storage,
                 const float *scale, void *panel, int64_t at) {
  if (storage == MS_I8)
    ((int8_t *)panel)[at] = narrow_int8(load_float(from, source, i), *scale);
  else if (from == storage && storage != MS_F32)
    ((uint16_t *)panel)[at] = ((const uint16_t *)source)[i];
  else if (storage == MS_F32)
    ((float *)panel)[at] = load_float(from, source, i);
  else if (storage == MS_BF16)
    ((uint16_t *)panel)[at] = narrow_bf16_bits(load_float(from, source, i));
  else
    ((uint16_t *)panel)[at] = narrow_f16_bits(load_float(from, source, i));
}

INLINE void pack_as(const ms_dtype from, const ms_dtype storage, const ms_matrix *m, int64_t row,
                    int64_t col, int32_t columns, int64_t K, float *scale, void *panel) {
  enum { BLOCK = 16 }; // k at a time: both sides stay in a few cache lines
  if (columns < MS_PANEL || (storage == MS_BF16 && K % 2))
    memset(panel, 0, (size_t)ms_panel_bytes(storage, K));
  if (storage == MS_I8)
    for (int64_t j = 0; j < MS_PANEL; j++) {
      int64_t i = (row + j) * m->row_stride + col * m->col_stride;
      scale[j] = j < columns ? int8_scale(from, m->data, i, m->col_stride, K) : 0;
    }
  for (int64_t k0 = 0; k0 < K; k0 += BLOCK) {
    int64_t k1 = k0 + BLOCK < K ? k0 + BLOCK : K;
    for (int64_t j = 0; j < columns; j++) {
      int64_t i = (row + j) * m->row_stride + col * m->col_stride;
      for (int64_t k = k0; k < k1; k++)
        move(from, m->data, i + k * m->col_stride, storage, scale + j, panel,
             panel_index(storage, k, j));
    }
  }
}

void ms_panel_pack(const ms_matrix *m, int64_t row, int64_t col, int32_t columns, int64_t K,
                   ms_dtype storage, float *scale, void *panel) {
#define CASE(FROM, TO)                                                                             \
  if (m->dtype == FROM && storage == TO) pack_as(FROM, TO, m, row, col, columns, K, scale, panel)
  CASE(MS_F32, MS_F32);
  CASE(MS_F32, MS_BF16);
  CASE(MS_F32, MS_F16);
  CASE(MS_F32, MS_I8);
  CASE(MS_BF16, MS_F32);
  CASE(MS_BF16, MS_BF16);
  CASE(MS_BF16, MS_F16);
  CASE(MS_BF16, MS_I8);
  CASE(MS_F16, MS_F32);
  CASE(MS_F16, MS_BF16);
  CASE(MS_F16, MS_F16);
  CASE(MS_F16, MS_I8);
#undef CASE
}

void ms_panel_unpack(const void *panel, const float *scale, int32_t columns, int64_t K,
                     ms_dtype storage, void *to, int64_t row_stride) {
  for (int64_t j = 0; j < columns; j++)
    for (int64_t k = 0; k < K; k++) {
      int64_t at = panel_index(storage, k, j), i = j * row_stride + k;
      if (storage == MS_F32)
        ((float *)to)[i] = ((const float *)panel)[at];
      else if (storage == MS_I8)
        ((float *)to)[i] = scale[j] * (float)((const int8_t *)panel)[at];
      else
        ((uint16_t *)to)[i] = ((const uint16_t *)panel)[at];
    }
}
