// step4_ffn_fma.cuh - the two matrix products of ffn in strict float32: fused multiply-adds, a chain a sum, K in order.
//
//   as step4_ffn.cuh; operands, zero filling and items are the same
//
// A block: 256 threads, ROWS x 64 sums, 16 numbers of K a step. A stage holds A and B transposed, [16][ROWS + 4] and
// [16][64 + 4], row r of number k at r ^ (k & 8): a thread reads 4 neighbouring rows, or columns, at a time, and a warp
// that stores 4 numbers each of 8 rows meets no bank twice. Two stages: the next step's numbers are loaded to registers
// before the products of this one, and stored after them.
//
//   ROWS 16: 1 row x 4 columns a thread    64: 4 x 4    128: 8 x 4
//
// Gated: the 64 columns of B are 32 of gate and the same 32 of up; a thread has 2 columns of each.
// Bound: 128 rows: 32 FMA for 3 16-byte loads from shared memory a number of K: the FMA pipe, at best 2/3 of it.
// Slow twin: ms_reference_layer.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP4_FFN_FMA_CUH
#define MS_STEP4_FFN_FMA_CUH

#include "step4_ffn_epilogue.cuh"
#include "step4_ffn_item.cuh"

enum { MS_FMA_THREADS = 256, MS_FMA_BN = 64, MS_FMA_BK = 16, MS_FMA_BAND = 16 };

template <int ROWS> struct ms_fma_tile {
  enum : int32_t {
    M = ROWS / 16, // rows of a thread
    A_STRIDE = ROWS + 4,
    B_STRIDE = MS_FMA_BN + 4,
    A_LOADS = (ROWS * MS_FMA_BK / 4 + MS_FMA_THREADS - 1) / MS_FMA_THREADS, // of 16 bytes, a thread
    STAGE = MS_FMA_BK * (A_STRIDE + B_STRIDE)                               // floats
  };
};

// Row of w_in or w_out, and its column, of row b of the block of B.
template <bool GATED>
__device__ __forceinline__ int32_t ms_fma_column(int32_t b) { // within the item
  // a thread's 4 columns are gate, gate, up, up
  return GATED ? b / 4 * 2 + b % 2 : b;
}

template <bool UP, bool GATED, int ROWS>
__global__ void __launch_bounds__(MS_FMA_THREADS)
    ms_ffn_fma(const ms_ffn_args args, const ms_cuda_view view, const ms_activation activation) {
  using tile = ms_fma_tile<ROWS>;
  __shared__ __align__(16) float shared[2][tile::STAGE];
  const int32_t tiles = *view.tile_count, thread = threadIdx.x;
  const int32_t tm = thread / 16, tn = thread % 16; // rows tm * M ..., columns tn * 4 ...
  for (int32_t i = blockIdx.x; i < tiles * args.blocks; i += gridDim.x) {
    ms_ffn_item item;
    if (!ms_ffn_item_of<UP, MS_FMA_BAND>(args, view, i, tiles, item)) continue;
    const ms_cuda_expert &e = item.expert;

    // What this thread loads: 4 numbers of K of a row of B and of rows of A.
    const int32_t line = thread / 4, k4 = thread % 4 * 4;
    const float *a_row[tile::A_LOADS];
    bool a_there[tile::A_LOADS];
#pragma unroll
    for (int l = 0; l < tile::A_LOADS; l++) {
      int32_t row = line + l * 64;
      a_there[l] = row < ROWS && row < item.tile.rows;
      a_row[l] =
          (const float *)ms_ffn_row<UP>(args, view, item.tile.first + (a_there[l] ? row : 0), 4) +
          k4;
    }
    const int32_t b_column = ms_fma_column<GATED>(line);
    const bool b_there = b_column < item.columns, b_up = GATED && line % 4 >= 2;
    const float *b_row = (const float *)(UP ? e.w_in : e.w_out) + k4 +
                         (b_there ? (item.column + b_column + (b_up ? e.width : 0)) *
                                        (UP ? args.ld_x : (int64_t)e.ld_out)
                                  : 0);
    float4 a_next[tile::A_LOADS], b_next;
    auto load = [&](int32_t k) {
      bool inside = k + k4 < item.depth; // rows are padded with zeros to 16 bytes
      const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int l = 0; l < tile::A_LOADS; l++)
        a_next[l] = inside && a_there[l] ? *(const float4 *)(a_row[l] + k) : zero;
      b_next = inside && b_there ? __ldg((const float4 *)(b_row + k)) : zero;
    };
    auto store = [&](float *stage) {
#pragma unroll
      for (int l = 0; l < tile::A_LOADS; l++) {
        int32_t row = line + l * 64;
        if (row >= ROWS) continue;
        row ^= k4 & 8;
        stage[(k4 + 0) * tile::A_STRIDE + row] = a_next[l].x;
        stage[(k4 + 1) * tile::A_STRIDE + row] = a_next[l].y;
        stage[(k4 + 2) * tile::A_STRIDE + row] = a_next[l].z;
        stage[(k4 + 3) * tile::A_STRIDE + row] = a_next[l].w;
      }
      stage += MS_FMA_BK * tile::A_STRIDE;
      const int32_t b_line = line ^ (k4 & 8);
      stage[(k4 + 0) * tile::B_STRIDE + b_line] = b_next.x;
      stage[(k4 + 1) * tile::B_STRIDE + b_line] = b_next.y;
      stage[(k4 + 2) * tile::B_STRIDE + b_line] = b_next.z;
      stage[(k4 + 3) * tile::B_STRIDE + b_line] = b_next.w;
    };

    float sum[tile::M][4] = {};
    const int32_t steps = (item.depth + MS_FMA_BK - 1) / MS_FMA_BK;
    if (steps > 0) {
      load(0);
      store(shared[0]);
    }
    __syncthreads();
    for (int32_t step = 0; step < steps; step++) {
      if (step + 1 < steps) load((step + 1) * MS_FMA_BK);
      const float *a = shared[step % 2], *b = a + MS_FMA_BK * tile::A_STRIDE;
#pragma unroll
      for (int k = 0; k < MS_FMA_BK; k++) {
        float4 w = *(const float4 *)(b + k * tile::B_STRIDE + (tn * 4 ^ (k & 8)));
#pragma unroll
        for (int m = 0; m < tile::M; m++) {
          float x = a[k * tile::A_STRIDE + (tm * tile::M ^ (k & 8)) + m];
          sum[m][0] = fmaf(x, w.x, sum[m][0]);
          sum[m][1] = fmaf(x, w.y, sum[m][1]);
          sum[m][2] = fmaf(x, w.z, sum[m][2]);
          sum[m][3] = fmaf(x, w.w, sum[m][3]);
        }
      }
      if (step + 1 < steps) store(shared[(step + 1) % 2]);
#ifndef MS_PLANT_28 // the next step's numbers may not be there yet
      __syncthreads();
#endif
    }

    // This thread's columns of the item: 4, or 2 of both matrices.
    const int32_t count = GATED ? 2 : 4, column = tn * count;
    const float *bias = UP ? e.b_in : e.b_out;
    float b_first[4] = {}, b_second[2] = {};
    for (int c = 0; c < count; c++)
      if (bias && column + c < item.columns) {
        b_first[c] = bias[item.column + column + c];
        if (GATED) b_second[c] = bias[e.width + item.column + column + c];
      }
#pragma unroll
    for (int m = 0; m < tile::M; m++) {
      int32_t row = tm * tile::M + m;
      if (row >= item.tile.rows) continue;
      int32_t at = item.tile.first + row;
      if (UP) {
        float h[4];
        MS_FOR_ACTIVATION(activation, GATED, {
          for (int c = 0; c < count; c++) {
            h[c] = ms_activate<ACT>(sum[m][c] + b_first[c]);
            if (GATED) h[c] *= ms_factor<ACT>(sum[m][2 + c] + b_second[c]);
            if (column + c >= item.columns) h[c] = 0.f;
          }
        });
        float *to = (float *)view.h + at * args.ld_h + item.column + column;
        if (column < (item.columns + 3) / 4 * 4) { // columns up to ld_h, a multiple of 4, are zeros
          if (GATED)
            *(float2 *)to = make_float2(h[0], h[1]);
          else
            *(float4 *)to = make_float4(h[0], h[1], h[2], h[3]);
        }
      } else {
        int32_t slot = view.order[at];
        float weight = ms_ffn_weight(args, view, slot);
        float *to = (view.out ? (float *)view.out : view.slot) + (int64_t)slot * args.D + item.column + column;
        float y[4];
        for (int c = 0; c < 4; c++) y[c] = weight * (sum[m][c] + b_first[c]);
        if (args.D % 4 == 0 && args.out_aligned) {
          if (column < item.columns) *(float4 *)to = make_float4(y[0], y[1], y[2], y[3]);
        } else {
          for (int c = 0; c < 4; c++)
            if (column + c < item.columns) to[c] = y[c];
        }
      }
    }
    __syncthreads();
  }
}

#endif
