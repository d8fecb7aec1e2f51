// kernels.h - the table of inner loops that one instruction set fills in.
// kernels.c is compiled once per instruction set (-DMS_ISA=generic|avx2|avx512|avx512bf16); each build defines one
// `const ms_kernels ms_kernels_<isa>`. Nothing here knows of experts, ranks or threads.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_KERNELS_H
#define MS_KERNELS_H

#include "../moeshard.h"

// Columns are packed in panels of MS_PANEL = 16; a kernel works on up to MS_TILE_PANELS of them at once.
// Panel p of a matrix [columns, K] holds columns 16p .. 16p+15 (zero beyond the last):
//   fp32, fp16   [K][16]
//   int8         [K][16]: integers; their column's scale multiplies the sums, in the epilogues
//   bf16         [ceil(K/2)][16][2]: rows 2i and 2i+1 interleaved, so that a shift and a mask widen a register
//                of pairs to two registers of fp32 (and the AVX-512 dot product takes it as it is).
#define MS_TILE_PANELS 4

// acc[row][0 .. 16*panels) (+)= sum over k0 <= k < k1 of a[row][k] * panel column: one chain of FMAs (or of dot products
// of pairs) from zero in increasing k, then one addition to acc. The bits depend on where k is cut in blocks, not on rows
// or panels.
typedef struct ms_tile {
  const void *const *a; // [rows] rows of the left matrix: fp32, for tile_dot bf16
  int64_t rows;         // any; the kernel cuts them in near-equal tiles
  const void *b;        // first panel at row k0 of the block
  int64_t b_stride;     // bytes from one panel to the next
  int32_t panels;       // 1 .. MS_TILE_PANELS
  int64_t k0, k1;       // k0 is even
  float *acc;           // [rows][64] aligned to 64 bytes; row stride is always 64 floats
  bool first;           // acc = the sum, else acc += the sum
  const char *ahead;    // what will be read next: fetched meanwhile (NULL: nothing)
  int64_t ahead_stride; // bytes between its panels
  int64_t ahead_bytes;  // bytes of each panel to fetch
  int32_t ahead_panels;
} ms_tile;

typedef struct ms_kernels {
  const char *isa;
  void (*tile[MS_I8 + 1])(const ms_tile *tile); // by the dtype of the weights
  void (*tile_dot)(const ms_tile *tile); // bf16 panels, bf16 rows; NULL without a bf16 dot product
  // The two epilogues; acc is [rows][64] as tile leaves it, scale and bias [16*panels] (scatter: [columns]) or NULL (1, 0).
  //   activate   x[n] = acc[i][n] * scale[n] + bias[n];  out[i * out_stride + n] = act(x[n]), n < 16*panels;
  //              gated: panels alternate gate, up and out[...] = act(x[gate]) * x[up] (or what ms_activation says), half as wide.
  //              out is fp32; activate_bf16 rounds it for tile_dot (NULL like it)
  //   scatter    out[i][n] = weight[i] * (acc[i][n] * scale[n] + bias[n]), n < columns
  void (*activate)(ms_activation activation, bool gated, const float *acc, const float *scale,
                   const float *bias, int64_t rows, int32_t panels, void *out, int64_t out_stride);
  void (*activate_bf16)(ms_activation activation, bool gated, const float *acc, const float *scale,
                        const float *bias, int64_t rows, int32_t panels, void *out,
                        int64_t out_stride);
  void (*scatter)(const float *acc, const float *scale, const float *bias, const float *weight,
                  int64_t rows, int64_t columns, float *const *out);
  // Rows of any length n.
  void (*sum)(const float *const *x, int32_t count, float *out, int64_t n); // in order
  void (*widen_bf16)(const uint16_t *x, float *out, int64_t n);
  void (*widen_f16)(const uint16_t *x, float *out, int64_t n);
  void (*narrow_bf16)(const float *x, uint16_t *out, int64_t n); // to nearest even, NaN stays NaN
  void (*narrow_f16)(const float *x, uint16_t *out, int64_t n);
  // The limits (machine.c). peak: `rounds` rounds in registers only; returns the flops of one round. peak_dot is NULL
  // without a bf16 dot product. read: all `bytes` (a multiple of 4 KiB), in as many streams as a tile has panels.
  int64_t (*peak_fma)(int64_t rounds);
  int64_t (*peak_dot)(int64_t rounds);
  void (*read)(const void *data, int64_t bytes);
} ms_kernels;

extern const ms_kernels ms_kernels_generic, ms_kernels_avx2, ms_kernels_avx512,
    ms_kernels_avx512bf16;

// The table of this process (see ms_isa). Never fails after ms_isa has succeeded once.
const ms_kernels *ms_kernels_get(void);

#endif
