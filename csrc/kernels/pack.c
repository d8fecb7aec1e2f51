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

// ---- moving bits: a source of the storage's own dtype -------------------------------------------
//
// What lies side by side in a panel row is 16 units: an element, or for bf16 two elements of neighbouring k. A source
// whose rows are contiguous is then a matrix of units to transpose; two or four units at a time in a 64-bit word take a
// quarter to a half of the instructions that one unit at a time takes.

enum { BLOCK = MS_PANEL }; // units a side: both sides stay in 16 cache lines or fewer

INLINE uint64_t load_word(const char *from) {
  uint64_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

INLINE void store_word(char *to, uint64_t word) { memcpy(to, &word, sizeof word); }

// Of words a (low) and b (high): the low units of each pair of units, then the high ones.
INLINE void exchange(uint64_t *a, uint64_t *b, int bits, uint64_t low) {
  uint64_t x = *a, y = *b;
  *a = (x & low) | (y & low) << bits;
  *b = (x >> bits & low) | (y & ~low);
}

// to[i][j] = from[j][i], BLOCK x BLOCK units of `unit` bytes (2 or 4); rows are so many bytes apart.
INLINE void transpose_block(int unit, const char *from, int64_t from_row, char *to,
                            int64_t to_row) {
  const uint64_t low32 = 0x00000000ffffffff, low16 = 0x0000ffff0000ffff;
  int per_word = 8 / unit;
  for (int j = 0; j < BLOCK; j += per_word)
    for (int i = 0; i < BLOCK; i += per_word) {
      uint64_t w[4];
      for (int n = 0; n < per_word; n++) w[n] = load_word(from + (j + n) * from_row + i * unit);
      if (unit == 4) {
        exchange(&w[0], &w[1], 32, low32);
      } else {
        exchange(&w[0], &w[1], 16, low16);
        exchange(&w[2], &w[3], 16, low16);
        exchange(&w[0], &w[2], 32, low32);
        exchange(&w[1], &w[3], 32, low32);
      }
      for (int n = 0; n < per_word; n++) store_word(to + (i + n) * to_row + j * unit, w[n]);
    }
}

INLINE int64_t unit_bytes(const ms_dtype storage) { return storage == MS_F16 ? 2 : 4; }
INLINE int64_t unit_k(const ms_dtype storage) { return storage == MS_BF16 ? 2 : 1; }

// Rows of the source are contiguous.
INLINE int64_t pack_rows(const ms_dtype storage, const ms_matrix *m, const char *from, int64_t K,
                         char *panel) {
  int64_t unit = unit_bytes(storage), step = BLOCK * unit_k(storage), k = 0;
  for (; k + step <= K; k += step)
    transpose_block((int)unit, from + k * ms_dtype_size(storage),
                    m->row_stride * ms_dtype_size(storage),
                    panel + k / unit_k(storage) * BLOCK * unit, BLOCK * unit);
  return k;
}

// Columns of the source are contiguous (stored transposed): rows of the panel already, which bf16 zips in twos.
INLINE int64_t pack_columns(const ms_dtype storage, const ms_matrix *m, const char *from, int64_t K,
                            char *panel) {
  int64_t unit = unit_bytes(storage), step = unit_k(storage), k = 0;
  int64_t column = m->col_stride * ms_dtype_size(storage);
  for (; k + step <= K; k += step, panel += MS_PANEL * unit) {
    if (storage == MS_BF16) {
      uint16_t even[MS_PANEL], odd[MS_PANEL], pairs[MS_PANEL][2];
      memcpy(even, from + k * column, sizeof even);
      memcpy(odd, from + (k + 1) * column, sizeof odd);
      for (int j = 0; j < MS_PANEL; j++) {
        pairs[j][0] = even[j];
        pairs[j][1] = odd[j];
      }
      memcpy(panel, pairs, sizeof pairs);
    } else {
      memcpy(panel, from + k * column, (size_t)(MS_PANEL * unit));
    }
  }
  return k;
}

// The k that were packed: all but a tail, of a full panel of the source's dtype; else none.
INLINE int64_t pack_bits(const ms_dtype from, const ms_dtype storage, const ms_matrix *m,
                         int64_t row, int32_t columns, int64_t K, void *panel) {
  if (from != storage || columns < MS_PANEL) return 0;
  const char *source = (const char *)m->data + row * m->row_stride * ms_dtype_size(from);
  if (m->col_stride == 1) return pack_rows(storage, m, source, K, panel);
  if (m->row_stride == 1) return pack_columns(storage, m, source, K, panel);
  return 0;
}

INLINE void pack_as(const ms_dtype from, const ms_dtype storage, const ms_matrix *m, int64_t row,
                    int32_t columns, int64_t K, float *scale, void *panel) {
  if (columns < MS_PANEL || (storage == MS_BF16 && K % 2))
    memset(panel, 0, (size_t)ms_panel_bytes(storage, K));
  if (storage == MS_I8)
    for (int64_t j = 0; j < MS_PANEL; j++)
      scale[j] =
          j < columns ? int8_scale(from, m->data, (row + j) * m->row_stride, m->col_stride, K) : 0;
  for (int64_t k0 = pack_bits(from, storage, m, row, columns, K, panel); k0 < K; k0 += BLOCK) {
    int64_t k1 = k0 + BLOCK < K ? k0 + BLOCK : K;
    for (int64_t j = 0; j < columns; j++) {
      int64_t i = (row + j) * m->row_stride;
      for (int64_t k = k0; k < k1; k++)
        move(from, m->data, i + k * m->col_stride, storage, scale + j, panel,
             panel_index(storage, k, j));
    }
  }
}

void ms_panel_pack(const ms_matrix *m, int64_t row, int32_t columns, int64_t K, ms_dtype storage,
                   float *scale, void *panel) {
#define CASE(FROM, TO)                                                                             \
  if (m->dtype == FROM && storage == TO) pack_as(FROM, TO, m, row, columns, K, scale, panel)
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

// The inverse of pack_rows.
INLINE int64_t unpack_rows(const ms_dtype storage, const char *panel, int64_t K, char *to,
                           int64_t row_stride) {
  int64_t unit = unit_bytes(storage), step = BLOCK * unit_k(storage), k = 0;
  for (; k + step <= K; k += step)
    transpose_block((int)unit, panel + k / unit_k(storage) * BLOCK * unit, BLOCK * unit,
                    to + k * ms_dtype_size(storage), row_stride * ms_dtype_size(storage));
  return k;
}

INLINE void unpack_as(const ms_dtype storage, const void *panel, const float *scale,
                      int32_t columns, int64_t K, void *to, int64_t row_stride) {
  bool whole = storage != MS_I8 && columns == MS_PANEL;
  int64_t first = whole ? unpack_rows(storage, panel, K, to, row_stride) : 0;
  for (int64_t j = 0; j < columns; j++)
    for (int64_t k = first; k < K; k++) {
      int64_t at = panel_index(storage, k, j), i = j * row_stride + k;
      if (storage == MS_F32)
        ((float *)to)[i] = ((const float *)panel)[at];
      else if (storage == MS_I8)
        ((float *)to)[i] = scale[j] * (float)((const int8_t *)panel)[at];
      else
        ((uint16_t *)to)[i] = ((const uint16_t *)panel)[at];
    }
}

void ms_panel_unpack(const void *panel, const float *scale, int32_t columns, int64_t K,
                     ms_dtype storage, void *to, int64_t row_stride) {
#define CASE(STORAGE)                                                                              \
  if (storage == STORAGE) unpack_as(STORAGE, panel, scale, columns, K, to, row_stride)
  CASE(MS_F32);
  CASE(MS_BF16);
  CASE(MS_F16);
  CASE(MS_I8);
#undef CASE
}
