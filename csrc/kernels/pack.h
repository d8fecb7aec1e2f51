// pack.h - weight matrices in and out of 16-wide panels.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_KERNELS_PACK_H
#define MS_KERNELS_PACK_H

#include "../moeshard.h"

// Bytes of one panel of K rows: fp32 and fp16 [K][16], bf16 [ceil(K/2)][16][2].
int64_t ms_panel_bytes(ms_dtype storage, int64_t K);

// panel[k][j] = source[row + j][col + k] for j < columns and k < K; the panel's other columns are zeroed.
// A 16-bit source of the same dtype is moved bit for bit.
void ms_panel_pack(const ms_matrix *source, int64_t row, int64_t col, int32_t columns, int64_t K,
                   ms_dtype storage, void *panel);

// The inverse into a destination of `storage` dtype: to[j * row_stride + k] = panel[k][j].
void ms_panel_unpack(const void *panel, int32_t columns, int64_t K, ms_dtype storage, void *to,
                     int64_t row_stride);

#endif
