// step5_combine.cuh - combine: the K choices of each token, summed in order; then rounding.
//
//   one rank       out[t, :]     = round(sum over j of slot[t*K + j, :])
//   several        partial[n, :] = sum over j of slot[n*K + j, :], for the tokens of all ranks; K = 1: the slots are
//                  the partial outputs, only rows without an expert are written (zeros)
//   round          out[t, :]     = round(reduced[t, :])
//   one rank, K = 1: down has written out; rows without an expert become zeros here
//
// Choices without an expert count for nothing; a token without any gets zeros. fp32 sums, one addition after the other.
// In a call that has a fault all is NaN, so that nobody goes on with what is not a result.
// A thread takes VECTOR columns of a token: 4 where D is a multiple of 4 (16-byte loads of whole sectors), else 1.
// Cost: reads (K + 1) * N * D * 4 bytes at most, memory bound.
// Slow twin: sum_choices and sum_ranks of csrc/step5_combine.c.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP5_COMBINE_CUH
#define MS_STEP5_COMBINE_CUH

#include "moeshard_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h> // NAN

enum { MS_COMBINE_THREADS = 256 };

typedef struct ms_combine_args {
  const char *messages; // NULL: nothing but rounding
  int64_t message_bytes, expert_at;
  const int32_t *tile_count; // negative: a fault
  const float *from;         // slots, or reduced rows
  void *to;
  int64_t T, rows, D; // T of each rank in the messages; rows of `to`
  int32_t K;
  bool only_missing; // from and to are the same: write rows without an expert only
} ms_combine_args;

template <typename Out> __device__ __forceinline__ Out ms_rounded(float x);
template <> __device__ __forceinline__ float ms_rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 ms_rounded<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half ms_rounded<__half>(float x) { return __float2half_rn(x); }

template <int VECTOR> struct __align__(4 * VECTOR) ms_columns {
  float x[VECTOR];
};

template <int VECTOR> __device__ __forceinline__ ms_columns<VECTOR> ms_columns_load(const float *from) {
  ms_columns<VECTOR> c;
  if constexpr (VECTOR == 4) {
    *(float4 *)c.x = *(const float4 *)from;
  } else {
    c.x[0] = *from;
  }
  return c;
}

template <int VECTOR, typename Out>
__device__ __forceinline__ void ms_columns_store(Out *to, const ms_columns<VECTOR> &c) {
  if constexpr (VECTOR == 4) {
    alignas(16) Out out[4];
    for (int i = 0; i < 4; i++) out[i] = ms_rounded<Out>(c.x[i]);
    if constexpr (sizeof out == 16)
      *(uint4 *)to = *(const uint4 *)out;
    else
      *(uint2 *)to = *(const uint2 *)out;
  } else {
    *to = ms_rounded<Out>(c.x[0]);
  }
}

// Zeros in the rows of `to` without an expert, a warp for each row: most have one, and cost a look.
template <typename Out, int VECTOR> __device__ __forceinline__ void ms_combine_missing(const ms_combine_args &a) {
  int32_t warps = gridDim.x * (MS_COMBINE_THREADS / 32), lane = threadIdx.x % 32;
  for (int64_t n = blockIdx.x * (MS_COMBINE_THREADS / 32) + threadIdx.x / 32; n < a.rows; n += warps) {
    int64_t r = n / a.T, t = n - r * a.T;
    const int32_t *expert = (const int32_t *)(a.messages + r * a.message_bytes + a.expert_at) + t * a.K;
    bool any = false;
    for (int32_t j = 0; j < a.K; j++) any |= expert[j] >= 0;
#ifdef MS_PLANT_14 // rows without an expert are never zeroed
    any = true;
#endif
    for (int64_t d = lane * VECTOR; !any && d < a.D; d += 32 * VECTOR)
      ms_columns_store<VECTOR>((Out *)a.to + n * a.D + d, ms_columns<VECTOR>{});
  }
}

template <typename Out, int VECTOR>
__global__ void __launch_bounds__(MS_COMBINE_THREADS) ms_combine(ms_combine_args a) {
  int32_t pieces = (int32_t)(a.D / VECTOR); // VECTOR divides D
  int64_t step = (int64_t)gridDim.x * MS_COMBINE_THREADS;
  const bool fault = a.messages && *a.tile_count < 0;
  if (a.only_missing && !fault) {
    ms_combine_missing<Out, VECTOR>(a);
    return;
  }
  for (int64_t i = (int64_t)blockIdx.x * MS_COMBINE_THREADS + threadIdx.x; i < a.rows * pieces; i += step) {
    int64_t n = i / pieces, d = (i - n * pieces) * VECTOR;
    ms_columns<VECTOR> total = {};
    bool any = false;
    if (!a.messages) {
      total = ms_columns_load<VECTOR>(a.from + n * a.D + d);
    } else if (fault) {
      for (int v = 0; v < VECTOR; v++) total.x[v] = NAN;
    } else {
      int64_t r = n / a.T, t = n - r * a.T;
      const int32_t *expert = (const int32_t *)(a.messages + r * a.message_bytes + a.expert_at) + t * a.K;
      for (int32_t j = 0; j < a.K; j++) {
        if (expert[j] < 0) continue;
        ms_columns<VECTOR> x = ms_columns_load<VECTOR>(a.from + (n * a.K + j) * a.D + d);
        for (int v = 0; v < VECTOR; v++) total.x[v] = any ? total.x[v] + x.x[v] : x.x[v];
        any = true;
      }
#ifdef MS_PLANT_14 // rows without an expert are never zeroed
      if (!any) continue;
#endif
    }
    ms_columns_store<VECTOR>((Out *)a.to + n * a.D + d, total);
  }
}

#endif
