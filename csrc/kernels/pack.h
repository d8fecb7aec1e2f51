// pack.h - weight matrices in and out of 16-wide panels.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_KERNELS_PACK_H
#define MS_KERNELS_PACK_H

#include "../moeshard.h"

// Bytes of one panel of K rows: fp32, fp16 and int8 [K][16], bf16 [ceil(K/2)][16][2]; whole cache lines.
int64_t ms_panel_bytes(ms_dtype storage, int64_t K);

// panel[k][j] = source[row + j][k] for j < columns and k < K; the panel's other columns are zeroed.
// A 16-bit source of the same dtype is moved bit for bit. int8: a column is its scale times -127 .. 127, scale its largest
// magnitude / 127 (0 when it is all zeros, NaN when a value is not finite).
//   scale  [16] out, 0 where there is no column; NULL unless storage is int8
void ms_panel_pack(const ms_matrix *source, int64_t row, int32_t columns, int64_t K,
                   ms_dtype storage, float *scale, void *panel);

// The inverse into a destination of `storage` dtype, fp32 for int8: to[j * row_stride + k] = panel[k][j] (* scale[j]).
void ms_panel_unpack(const void *panel, const float *scale, int32_t columns, int64_t K,
                     ms_dtype storage, void *to, int64_t row_stride);

#endif
