// pack.c - weight matrices in and out of 16-wide panels.
//
// A panel row is what one step of the k loop reads: 16 columns, one cache line in fp32. Packing is done once, at load;
// it makes the kernels' weight stream sequential and free of tails.
//
// SPDX-License-Identifier: Apache-2.0
#include "pack.h"
#include "simd.h"

int64_t ms_panel_bytes(ms_dtype storage, int64_t K) {
  if (storage == MS_BF16) return (K + 1) / 2 * 2 * MS_PANEL * 2;
  return K * MS_PANEL * ms_dtype_size(storage);
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

INLINE void move(const ms_dtype from, const void *source, int64_t i, const ms_dtype storage,
                 void *panel, int64_t at) {
  if (from == storage && storage != MS_F32)
    ((uint16_t *)panel)[at] = ((const uint16_t *)source)[i];
  else if (storage == MS_F32)
    ((float *)panel)[at] = load_float(from, source, i);
  else if (storage == MS_BF16)
    ((uint16_t *)panel)[at] = narrow_bf16_bits(load_float(from, source, i));
  else
    ((uint16_t *)panel)[at] = narrow_f16_bits(load_float(from, source, i));
}

INLINE void pack_as(const ms_dtype from, const ms_dtype storage, const ms_matrix *m, int64_t row,
                    int64_t col, int32_t columns, int64_t K, void *panel) {
  enum { BLOCK = 16 }; // k at a time: both sides stay in a few cache lines
  if (columns < MS_PANEL || (storage == MS_BF16 && K % 2))
    memset(panel, 0, (size_t)ms_panel_bytes(storage, K));
  for (int64_t k0 = 0; k0 < K; k0 += BLOCK) {
    int64_t k1 = k0 + BLOCK < K ? k0 + BLOCK : K;
    for (int64_t j = 0; j < columns; j++) {
      int64_t i = (row + j) * m->row_stride + col * m->col_stride;
      for (int64_t k = k0; k < k1; k++)
        move(from, m->data, i + k * m->col_stride, storage, panel, panel_index(storage, k, j));
    }
  }
}

void ms_panel_pack(const ms_matrix *m, int64_t row, int64_t col, int32_t columns, int64_t K,
                   ms_dtype storage, void *panel) {
#define CASE(FROM, TO)                                                                             \
  if (m->dtype == FROM && storage == TO) pack_as(FROM, TO, m, row, col, columns, K, panel)
  CASE(MS_F32, MS_F32);
  CASE(MS_F32, MS_BF16);
  CASE(MS_F32, MS_F16);
  CASE(MS_BF16, MS_F32);
  CASE(MS_BF16, MS_BF16);
  CASE(MS_BF16, MS_F16);
  CASE(MS_F16, MS_F32);
  CASE(MS_F16, MS_BF16);
  CASE(MS_F16, MS_F16);
#undef CASE
}

void ms_panel_unpack(const void *panel, int32_t columns, int64_t K, ms_dtype storage, void *to,
                     int64_t row_stride) {
  for (int64_t j = 0; j < columns; j++)
    for (int64_t k = 0; k < K; k++) {
      int64_t at = panel_index(storage, k, j), i = j * row_stride + k;
      if (storage == MS_F32)
        ((float *)to)[i] = ((const float *)panel)[at];
      else
        ((uint16_t *)to)[i] = ((const uint16_t *)panel)[at];
    }
}
