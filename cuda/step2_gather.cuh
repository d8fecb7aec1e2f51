// step2_gather.cuh - gather: this rank's tokens and choices as one message, which an all-gather then carries.
//
//   message   [ms_cuda_header][expert int32 T*K][weight float T*K][hidden T * ld_x], sections at multiples of 256 bytes
//
// Replicated tokens: only the header travels; it holds a digest of the routing, by which ranks find out that their
// tokens are not the same. It is a sum over the slots, so that it does not matter who adds first.
//
// Rows that this rank does not have (from `tokens` to T) get expert -1, weight 0 and no hidden state: nobody reads it.
// What the router did wrong is not raised here but written to the header, so that all ranks learn of it and none
// computes: the smallest (kind, slot), which is what csrc/step1_route.c raises.
//
// One launch, 256 threads a block: blocks [0, route_blocks) check and convert the routing, a slot for each thread (8
// for each took twice as long on an H200: latencies), more for batches over 65536 slots; the last of them to finish
// writes the header. The others copy hidden states, 16 bytes a thread and step, rows of D to rows of ld_x (single
// elements where rows are not a whole number of 16 bytes).
// Cost: reads and writes T * (D * size + K * 12) bytes: memory bound.
// Slow twin: csrc/step1_route.c.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP2_GATHER_CUH
#define MS_STEP2_GATHER_CUH

#include "moeshard_cuda.h"
#include "ms_ptx_sync.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

enum { MS_GATHER_THREADS = 256, MS_GATHER_WARPS = MS_GATHER_THREADS / 32 };

typedef struct ms_gather_args {
  ms_cuda_header header; // all but the fault
  const char *hidden;
  const void *index, *weight;
  char *message;              // where expert_at, weight_at and hidden_at count from
  ms_cuda_header *own_header; // this rank's
  int32_t *ticket;
  unsigned long long *block_faults, *block_digests; // [route_blocks]
  int64_t T, tokens, D, ld_x;
  int64_t expert_at, weight_at, hidden_at;
  int32_t K, E, size, route_blocks;
  ms_dtype index_dtype, weight_dtype;
} ms_gather_args;

static const __device__ unsigned long long ms_no_fault = ~0ull;

__device__ __forceinline__ int64_t ms_load_index(const ms_gather_args &a, int64_t slot) {
  return a.index_dtype == MS_I64 ? ((const int64_t *)a.index)[slot] : ((const int32_t *)a.index)[slot];
}

__device__ __forceinline__ float ms_load_weight(const ms_gather_args &a, int64_t slot) {
  if (a.weight_dtype == MS_F32) return ((const float *)a.weight)[slot];
  if (a.weight_dtype == MS_BF16) return __bfloat162float(((const __nv_bfloat16 *)a.weight)[slot]);
  return __half2float(((const __half *)a.weight)[slot]);
}

// What a slot adds to the digest: a bijection of the choice for a given slot.
__device__ __forceinline__ unsigned long long ms_digest_of(int64_t slot, int32_t expert, float weight) {
  unsigned long long x = (unsigned long long)(uint32_t)expert << 32 | __float_as_uint(weight);
  x ^= (unsigned long long)slot * 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
  return x ^ x >> 33;
}

struct ms_smaller {
  __device__ __forceinline__ unsigned long long operator()(unsigned long long x, unsigned long long y) const {
    return y < x ? y : x;
  }
};
struct ms_sum {
  __device__ __forceinline__ unsigned long long operator()(unsigned long long x, unsigned long long y) const {
    return x + y;
  }
};
// The values of the block's threads, folded, in thread 0. `scratch` [MS_GATHER_WARPS] shared.
template <typename Fold>
__device__ __forceinline__ unsigned long long ms_block_fold(unsigned long long x, unsigned long long *scratch,
                                                            Fold fold) {
  for (int step = 16; step > 0; step /= 2) x = fold(x, __shfl_down_sync(0xffffffffu, x, step));
  __syncthreads(); // scratch may still be read by an earlier call
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < MS_GATHER_WARPS; w++) x = fold(x, scratch[w]);
  return x;
}

__device__ __forceinline__ void ms_gather_route(const ms_gather_args &a) {
  __shared__ unsigned long long scratch[MS_GATHER_WARPS];
  __shared__ bool last;
  int32_t *expert = (int32_t *)(a.message + a.expert_at);
  float *weight = (float *)(a.message + a.weight_at);
  unsigned long long fault = ms_no_fault, digest = 0;
  int64_t slots = a.T * a.K, step = (int64_t)a.route_blocks * MS_GATHER_THREADS;
  for (int64_t s = (int64_t)blockIdx.x * MS_GATHER_THREADS + threadIdx.x; s < slots; s += step) {
    int64_t e = -1;
    float w = 0.f;
    if (s < a.tokens * a.K) {
      unsigned long long kind = MS_CUDA_NO_FAULT;
      e = ms_load_index(a, s);
      if (e < -1 || e >= a.E) {
        kind = MS_CUDA_BAD_INDEX;
        e = -1;
      } else if (e >= 0) {
        w = ms_load_weight(a, s);
        if (!isfinite(w)) kind = MS_CUDA_BAD_WEIGHT;
      }
      unsigned long long found = kind << 32 | (unsigned long long)s;
      if (kind != MS_CUDA_NO_FAULT && found < fault) fault = found;
    }
    expert[s] = (int32_t)e;
    weight[s] = w;
    if (a.header.replicated) digest += ms_digest_of(s, (int32_t)e, w);
  }
  fault = ms_block_fold(fault, scratch, ms_smaller());
  if (a.header.replicated) digest = ms_block_fold(digest, scratch, ms_sum());
  if (threadIdx.x == 0) {
    a.block_faults[blockIdx.x] = fault;
    a.block_digests[blockIdx.x] = digest;
    last = ms_ticket_acq_rel(a.ticket) == (uint32_t)a.route_blocks - 1;
  }
  __syncthreads();
  if (!last) return;
  bool own = (int32_t)threadIdx.x < a.route_blocks;
  fault = ms_block_fold(own ? a.block_faults[threadIdx.x] : ms_no_fault, scratch, ms_smaller());
  if (a.header.replicated) digest = ms_block_fold(own ? a.block_digests[threadIdx.x] : 0, scratch, ms_sum());
  if (threadIdx.x != 0) return;
  ms_cuda_header header = a.header;
#ifndef MS_PLANT_19 // ranks with other choices are not told apart
  header.digest = digest;
#endif
  if (fault != ms_no_fault) {
    header.fault = (int32_t)(fault >> 32);
    header.fault_at = (int64_t)(fault & 0xffffffffu);
    int64_t index = ms_load_index(a, header.fault_at); // what int32 cannot hold is shown as its nearest
    header.fault_index = index > INT32_MAX ? INT32_MAX : index < INT32_MIN ? INT32_MIN : (int32_t)index;
  }
  *a.own_header = header;
#ifndef MS_PLANT_18 // the next launch never finds its last block
  *a.ticket = 0;
#endif
}

template <typename Piece> __device__ __forceinline__ void ms_gather_copy(const ms_gather_args &a) {
  const Piece *from = (const Piece *)a.hidden;
  Piece *to = (Piece *)(a.message + a.hidden_at);
  int32_t row = (int32_t)(a.D * a.size / (int64_t)sizeof(Piece)),
          ld = (int32_t)(a.ld_x * a.size / (int64_t)sizeof(Piece));
  int64_t step = (int64_t)(gridDim.x - a.route_blocks) * MS_GATHER_THREADS;
  int64_t i = (int64_t)(blockIdx.x - a.route_blocks) * MS_GATHER_THREADS + threadIdx.x;
  for (; i < a.tokens * ld; i += step) {
    int64_t t = i / ld, d = i - t * ld;
    to[i] = d < row ? from[t * row + d] : Piece{};
  }
}

__global__ void __launch_bounds__(MS_GATHER_THREADS) ms_gather_pack(const ms_gather_args a) {
  if ((int32_t)blockIdx.x < a.route_blocks)
    ms_gather_route(a);
  else if (a.ld_x == a.D && (uintptr_t)a.hidden % 16 == 0)
    ms_gather_copy<uint4>(a);
  else if (a.size == 4)
    ms_gather_copy<uint32_t>(a);
  else
    ms_gather_copy<uint16_t>(a);
}

#endif
