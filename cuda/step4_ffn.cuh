// step4_ffn.cuh - the two matrix products of ffn on tensor cores by mma.sync: bfloat16, float16, and float32 as tf32.
//
//   up     H[i, :]    = act(X[token of order[i], :] . w_in[e]^T + b_in[e])            (gated: act(gate) * up)
//   down   slot[s, :] = weight[s] * (H[i, :] . w_out[e]^T + b_out[e]),  s = order[i]
//
// Operands lie as moeshard_cuda.h says, K (D for up, the expert's width for down) contiguous, rows 16-byte aligned.
// What is beyond K, beyond the tile's rows or the expert's columns is filled with zeros by the copies: not read. H gets
// zeros from the expert's width to the next 16 bytes, so that `down` may copy whole pieces.
//
// A block: 128 threads. Items: step4_ffn_item.cuh. A stage of shared memory holds BK bytes of BM rows of A and of BN
// rows of B, as rows of 16-byte pieces, piece p of row r at p ^ (r % 8): neither copies nor ldmatrix meet bank
// conflicts. Gated: B interleaves 8 gate rows and 8 up rows, so that both sums of a column meet in one thread.
//
//            BM x BN    warp tile  warps  BK bytes  stages  shared     for
//   rows 16   16 x 64    16 x 16   1 x 4    256       4      80 KiB    streaming weights: 64 KiB in flight a block
//   rows 64   64 x 128   64 x 32   1 x 4    128       4      96 KiB    between
//   rows 128  128 x 128  64 x 64   2 x 2    128       3      96 KiB    tensor cores: 4096 MACs for 4 + 4 ldmatrix
//
// Two blocks a multiprocessor. A thread copies pieces thread % (BK / 16) of every (128 / (BK / 16))th row, from
// thread / (BK / 16) on. Epilogue: sums go through the stages' memory, so that stores are 16 bytes of consecutive columns.
// Bound: rows 128, bf16: 32 mma (m16n8k16) for 8 ldmatrix.x4 a warp and 32 bytes of K: tensor pipe.
// Slow twin: ms_reference_layer.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP4_FFN_CUH
#define MS_STEP4_FFN_CUH

#include "ms_ptx.cuh"
#include "step4_ffn_epilogue.cuh"
#include "step4_ffn_item.cuh"

enum { MS_FFN_THREADS = 128, MS_FFN_PIECE = 16, MS_FFN_BAND = 16 };

template <int ROWS> struct ms_ffn_tile {
  enum : int32_t {
    BM = ROWS,
    BN = ROWS == 16 ? 64 : 128,
    BK = ROWS == 16 ? 256 : 128, // bytes
    STAGES = ROWS == 128 ? 3 : 4,
    WARPS_M = ROWS == 128 ? 2 : 1,
    WARPS_N = 4 / WARPS_M,
    M16 = BM / WARPS_M / 16, // of a warp
    N16 = BN / WARPS_N / 16,
    PIECES = BK / MS_FFN_PIECE,
    LINES = MS_FFN_THREADS / PIECES, // rows that the block copies at a time
    STAGE = (BM + BN) * BK,
    BYTES = STAGES * STAGE,
    STAGED = BN + 8 // floats from row to row of staged sums
  };
};

// Byte offset of a piece in a stage.
template <int BK> __device__ __forceinline__ uint32_t ms_ffn_at(int32_t row, int32_t piece) {
  return (uint32_t)(row * BK + (piece ^ (row % 8)) * MS_FFN_PIECE);
}

// ---- copies ----------------------------------------------------------------------------------------------------

template <bool UP, bool GATED, int ROWS, typename Storage> struct ms_ffn_copies {
  using tile = ms_ffn_tile<ROWS>;
  enum : int32_t { A_COPIES = tile::BM / tile::LINES, B_COPIES = tile::BN / tile::LINES };
  const char *a_base, *b;
  // pieces from a_base to the row: half the registers of pointers, and reaches 64 GiB
  uint32_t a[A_COPIES];
  int64_t b_stride; // bytes to the next 8 columns (gated) or LINES columns
  int64_t b_up;     // bytes from gate rows to up rows
  int32_t a_rows, b_columns, depth, line, piece;

  __device__ __forceinline__ void start(const ms_ffn_args &args, const ms_cuda_view &view,
                                        const ms_ffn_item &item) {
    const int32_t size = sizeof(Storage);
    line = threadIdx.x / tile::PIECES, piece = threadIdx.x % tile::PIECES;
    a_rows = item.tile.rows - line;
    a_base = UP ? view.hidden : view.h;
#pragma unroll
    for (int i = 0; i < A_COPIES; i++) {
      bool there = i * tile::LINES < a_rows;
      const char *row =
          ms_ffn_row<UP>(args, view, item.tile.first + (there ? line + i * tile::LINES : 0), size);
      a[i] = (uint32_t)((row - a_base) / MS_FFN_PIECE);
    }
    const ms_cuda_expert &e = item.expert;
    int64_t row_bytes = (UP ? args.ld_x : e.ld_out) * size; // ld_in is ld_x
    bool up_line = GATED && line % 16 >= 8;
    int32_t column = GATED ? line % 8 : line; // within the block
    b = (const char *)(UP ? e.w_in : e.w_out) +
        (item.column + column + (up_line ? e.width : 0)) * row_bytes;
    b_stride = (GATED ? 8 : (int32_t)tile::LINES) * row_bytes;
    b_up = e.width * row_bytes;
    b_columns = item.columns - column;
    depth = item.depth * size - piece * MS_FFN_PIECE;
  }

  // Start the copies of K bytes [step * BK, + BK) to a stage.
  __device__ __forceinline__ void copy(int32_t step, uint32_t stage) const {
    int32_t at = step * tile::BK;
    bool inside = at < depth;
    int32_t from = inside ? at + piece * MS_FFN_PIECE : 0;
    const char *a_from = a_base + from, *row = b + from;
#pragma unroll
    for (int i = 0; i < A_COPIES; i++)
      ms_cp_async16(stage + ms_ffn_at<tile::BK>(line + i * tile::LINES, piece),
                    a_from + (int64_t)ms_here(a[i]) * MS_FFN_PIECE,
                    inside && i * tile::LINES < a_rows);
    stage += tile::BM * tile::BK;
#pragma unroll
    for (int i = 0; i < B_COPIES; i++) {
      // gated, 8 lines at a time: every other copy is of up rows
      bool alternate = GATED && tile::LINES == 8;
      int32_t columns = (alternate ? i / 2 : i) * (GATED ? 8 : (int32_t)tile::LINES);
#ifdef MS_PLANT_23 // one column too many is read
      bool there = inside && columns <= b_columns;
#else
      bool there = inside && columns < b_columns;
#endif
      ms_cp_async16(stage + ms_ffn_at<tile::BK>(line + i * tile::LINES, piece),
                    there ? row + (alternate && i % 2 ? b_up : 0) : b, there);
      if (!alternate || i % 2) row += b_stride;
    }
  }
};

// ---- products --------------------------------------------------------------------------------------------------

// sums += the stage's A . B^T, this warp's part. n8 tile 2j and 2j + 1 of the warp: B rows 16j .. 16j + 15.
template <int ROWS, typename Storage>
__device__ __forceinline__ void
ms_ffn_multiply(uint32_t stage,
                float (&sum)[ms_ffn_tile<ROWS>::M16][2 * ms_ffn_tile<ROWS>::N16][4]) {
  using tile = ms_ffn_tile<ROWS>;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t m0 = warp / tile::WARPS_N * tile::M16 * 16,
                n0 = warp % tile::WARPS_N * tile::N16 * 16;
  const uint32_t b_stage = stage + tile::BM * tile::BK;
  // tf32: rounding takes registers; all four steps at a time would spill
  constexpr int UNROLL = sizeof(Storage) == 4 && ROWS == 128 ? 2 : tile::PIECES / 2;
#pragma unroll UNROLL
  for (int k = 0; k < tile::PIECES; k += 2) {
    uint32_t a[tile::M16][4];
#pragma unroll
    for (int m = 0; m < tile::M16; m++) {
      ms_ldmatrix4(a[m], stage + ms_ffn_at<tile::BK>(m0 + m * 16 + lane % 16, k + lane / 16));
      ms_operands(a[m], (const Storage *)nullptr);
    }
#pragma unroll
    for (int n = 0; n < tile::N16; n++) {
      uint32_t b[4];
#ifdef MS_PLANT_24 // a swizzle that differs from the copies'
      ms_ldmatrix4(b, b_stage + ms_ffn_at<tile::BK>(n0 + n * 16 + lane % 8 + lane / 16 * 8,
                                                    (k + lane / 8 % 2) ^ 1));
#else
      ms_ldmatrix4(b, b_stage + ms_ffn_at<tile::BK>(n0 + n * 16 + lane % 8 + lane / 16 * 8,
                                                    k + lane / 8 % 2));
#endif
      ms_operands(b, (const Storage *)nullptr);
#pragma unroll
      for (int m = 0; m < tile::M16; m++) {
#ifdef MS_PLANT_26 // two registers swapped
        ms_mma(sum[m][2 * n], a[m], b[1], b[0], (const Storage *)nullptr);
#else
        ms_mma(sum[m][2 * n], a[m], b[0], b[1], (const Storage *)nullptr);
#endif
        ms_mma(sum[m][2 * n + 1], a[m], b[2], b[3], (const Storage *)nullptr);
      }
    }
  }
}

// ---- epilogues -------------------------------------------------------------------------------------------------
// Sums are staged as floats [BM][BN + 8], where the stages were: 8 rows of float2 then lie in different banks. A thread
// has the same 16 bytes of columns in all its rows, so its biases stay in registers.

// The sums as they are; gated: gate columns in the left half, up columns in the right.
template <bool GATED, int ROWS>
__device__ __forceinline__ void
ms_ffn_stage_sums(float *staged,
                  const float (&sum)[ms_ffn_tile<ROWS>::M16][2 * ms_ffn_tile<ROWS>::N16][4]) {
  using tile = ms_ffn_tile<ROWS>;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t row = warp / tile::WARPS_N * tile::M16 * 16 + lane / 4;
  const int32_t n8 = warp % tile::WARPS_N * tile::N16 * (GATED ? 1 : 2); // of the staged columns
  float *to = staged + row * tile::STAGED + n8 * 8 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < tile::M16; m++)
#pragma unroll
    for (int g = 0; g < 2 * tile::N16; g++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *(float2 *)(to + (m * 16 + half * 8) * tile::STAGED +
                    (GATED ? g / 2 * 8 + g % 2 * (tile::BN / 2) : g * 8)) =
            make_float2(sum[m][g][2 * half], sum[m][g][2 * half + 1]);
}

// COUNT staged sums; of 8, every other 4 lanes take the second half first: no bank is asked twice.
template <int COUNT>
__device__ __forceinline__ void ms_ffn_staged(const float *from, float (&to)[COUNT]) {
  const int32_t flip = COUNT == 8 ? threadIdx.x / 4 % 2 : 0;
  float4 first = ((const float4 *)from)[flip], second = first;
  if (COUNT == 8) {
    second = ((const float4 *)from)[1 - flip];
    if (flip) {
      float4 other = first;
      first = second, second = other;
    }
  }
  to[0] = first.x, to[1] = first.y, to[2] = first.z, to[3] = first.w;
  if (COUNT == 8)
    to[COUNT - 4] = second.x, to[COUNT - 3] = second.y, to[COUNT - 2] = second.z,
               to[COUNT - 1] = second.w;
}

// COUNT biases from `column` on; 0 beyond the columns and where there is none.
template <int COUNT>
__device__ __forceinline__ void ms_ffn_biases(const float *bias, int32_t column, int32_t columns,
                                              float (&to)[COUNT]) {
#pragma unroll
  for (int c = 0; c < COUNT; c++) to[c] = bias && column + c < columns ? bias[column + c] : 0.f;
}

__device__ __forceinline__ uint4 ms_ffn_round(const float (&x)[4], const float *) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                    __float_as_uint(x[3]));
}
template <typename Storage>
__device__ __forceinline__ uint4 ms_ffn_round(const float (&x)[8], const Storage *) {
  return make_uint4(ms_round2<Storage>(x[0], x[1]), ms_round2<Storage>(x[2], x[3]),
                    ms_round2<Storage>(x[4], x[5]), ms_round2<Storage>(x[6], x[7]));
}

template <bool GATED, int ROWS, typename Storage, ms_activation ACTIVATION>
__device__ __forceinline__ void ms_ffn_store_h(const ms_ffn_args &args, const ms_cuda_view &view,
                                               const ms_ffn_item &item, const float *staged) {
  using tile = ms_ffn_tile<ROWS>;
  constexpr int32_t EACH = 16 / sizeof(Storage), PIECES = (GATED ? tile::BN / 2 : tile::BN) / EACH;
  const int32_t column = threadIdx.x % PIECES * EACH;
  if (column >= item.columns) return;
  const float *b_in = item.expert.b_in ? item.expert.b_in + item.column : nullptr;
  float bias[EACH], bias_up[EACH];
  ms_ffn_biases<EACH>(b_in, column, item.columns, bias);
  if (GATED)
    ms_ffn_biases<EACH>(b_in ? b_in + item.expert.width : b_in, column, item.columns, bias_up);
  for (int32_t row = threadIdx.x / PIECES; row < item.tile.rows; row += MS_FFN_THREADS / PIECES) {
    float h[EACH], up[EACH];
    ms_ffn_staged<EACH>(staged + row * tile::STAGED + column, h);
    if (GATED) ms_ffn_staged<EACH>(staged + row * tile::STAGED + tile::BN / 2 + column, up);
#pragma unroll
    for (int c = 0; c < EACH; c++) {
      h[c] = ms_activate<ACTIVATION>(h[c] + bias[c]);
      if (GATED) h[c] *= ms_factor<ACTIVATION>(up[c] + bias_up[c]);
#ifndef MS_PLANT_29 // an infinite hidden state makes NaN of what no column is
      if (column + c >= item.columns) h[c] = 0.f;
#endif
    }
    Storage *to = (Storage *)view.h + (item.tile.first + row) * args.ld_h + item.column + column;
    ms_st128(to, ms_ffn_round(h, (const Storage *)nullptr));
  }
}

template <int ROWS, typename Storage>
__device__ __forceinline__ void ms_ffn_store_slots(const ms_ffn_args &args,
                                                   const ms_cuda_view &view,
                                                   const ms_ffn_item &item, const float *staged) {
  using tile = ms_ffn_tile<ROWS>;
  constexpr int32_t EACH = 4, PIECES = tile::BN / EACH;
  const int32_t column = threadIdx.x % PIECES * EACH;
  if (column >= item.columns) return;
  float bias[EACH];
  ms_ffn_biases<EACH>(item.expert.b_out ? item.expert.b_out + item.column : nullptr, column,
                      item.columns, bias);
  for (int32_t row = threadIdx.x / PIECES; row < item.tile.rows; row += MS_FFN_THREADS / PIECES) {
#ifdef MS_PLANT_25 // the last row of a tile is never written
    if (row == item.tile.rows - 1) continue;
#endif
    int32_t slot = view.order[item.tile.first + row];
    float weight = ms_ffn_weight(args, view, slot), y[EACH];
    ms_ffn_staged<EACH>(staged + row * tile::STAGED + column, y);
#pragma unroll
    for (int c = 0; c < EACH; c++) y[c] = weight * (y[c] + bias[c]);
    int64_t at = (int64_t)slot * args.D + item.column + column;
    if (view.out) {
      ms_store_rounded4((Storage *)view.out + at, y, item.columns - column, args.D % EACH == 0 && args.out_aligned);
      continue;
    }
    float *to = view.slot + at;
    if (args.D % EACH == 0) {
      ms_st128(to, ms_ffn_round(y, to));
    } else {
#pragma unroll
      for (int c = 0; c < EACH; c++)
        if (column + c < item.columns) to[c] = y[c];
    }
  }
}

// ---- the kernel ------------------------------------------------------------------------------------------------

template <bool UP, bool GATED, int ROWS, typename Storage>
__global__ void __launch_bounds__(MS_FFN_THREADS, 2)
    ms_ffn(const ms_ffn_args args, const ms_cuda_view view, const ms_activation activation) {
  using tile = ms_ffn_tile<ROWS>;
  extern __shared__ __align__(128) char ms_ffn_shared[];
  const uint32_t shared = ms_shared_address(ms_ffn_shared);
  const int32_t tiles = *view.tile_count;
  for (int32_t i = blockIdx.x; i < tiles * args.blocks; i += gridDim.x) {
    ms_ffn_item item;
    if (!ms_ffn_item_of<UP, MS_FFN_BAND>(args, view, i, tiles, item)) continue;
    ms_ffn_copies<UP, GATED, ROWS, Storage> copies;
    copies.start(args, view, item);
    const int32_t steps = (item.depth * (int32_t)sizeof(Storage) + tile::BK - 1) / tile::BK;
    float sum[tile::M16][2 * tile::N16][4] = {};
#pragma unroll
    for (int s = 0; s < tile::STAGES - 1; s++) {
      if (s < steps) copies.copy(s, shared + s * tile::STAGE);
      ms_cp_async_commit();
    }
    for (int32_t step = 0; step < steps; step++) {
#ifdef MS_PLANT_22 // off by one: the step's copies may be under way
      ms_cp_async_wait<tile::STAGES - 1>();
#else
      ms_cp_async_wait<tile::STAGES - 2>();
#endif
#ifndef MS_PLANT_21
      __syncthreads(); // the step's copies are seen by all, and all have read the stage that is filled next
#endif
      int32_t next = step + tile::STAGES - 1;
      if (next < steps) copies.copy(next, shared + next % tile::STAGES * tile::STAGE);
      ms_cp_async_commit();
      ms_ffn_multiply<ROWS, Storage>(shared + step % tile::STAGES * tile::STAGE, sum);
    }
    ms_cp_async_wait<0>();
    __syncthreads(); // the stages are free
    float *staged = (float *)ms_ffn_shared;
    ms_ffn_stage_sums<GATED, ROWS>(staged, sum);
    __syncthreads();
    if (UP) {
      MS_FOR_ACTIVATION(activation, GATED,
                        (ms_ffn_store_h<GATED, ROWS, Storage, ACT>(args, view, item, staged)));
    } else {
      ms_ffn_store_slots<ROWS, Storage>(args, view, item, staged);
    }
#ifndef MS_PLANT_27 // the next item's copies may come before that
    __syncthreads(); // staged has been read
#endif
  }
}

#endif
