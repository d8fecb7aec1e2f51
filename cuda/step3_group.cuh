// step3_group.cuh - group: which rows each expert multiplies, and the tiles that ffn works through.
//
//   offset [E+1], order [slots]    the slots (token * K + choice) sorted by expert, stable: a counting sort
//   tiles [tile_count]             every expert's rows in pieces of tile_rows, experts in order
//
// The slots are cut in chunks, each walked twice by one warp, 32 slots a step:
//
//   count    counters[e][chunk] = slots of the chunk with expert e
//   scan     counters[e][chunk] = where the first of them goes; offset; tiles        by one block
//   place    order[counters[e][chunk]++] = slot
//
// In a step, lanes with the same expert find each other by match_any; the first of them moves the counter by their
// number. A chunk belongs to one warp, so no counter is ever shared and nothing depends on timing.
//
// Small batches (sort_chunks = 0): one block of 32 warps does all in shared memory, 16-bit counters. Else two launches:
// count, whose last block scans; and place.
//
// Headers of all ranks are compared here, by the block that scans. If they disagree, or tell of a fault, there are no
// tiles, so no rank computes, and the host finds the headers in `faults`.
//
// Cost: reads slots * 8 bytes, writes slots * 4; counters 8 * E * chunks. Latency bound: a step is one load of 32
// experts and one counter.
// Slow twins: ms_reference_group, ms_header_check.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP3_GROUP_CUH
#define MS_STEP3_GROUP_CUH

#include "moeshard_cuda.h"
#include "ms_ptx_sync.cuh"

enum { MS_GROUP_SCAN_THREADS = 1024, MS_GROUP_SCAN_WARPS = 32, MS_GROUP_WARPS = 4 };

typedef struct ms_group_args {
  const char *messages;
  int64_t message_bytes, expert_at;
  int32_t R, E, slots, rank_slots; // rank_slots = T * K
  int32_t chunks, chunk_slots, tile_rows;
  int32_t *ticket;
  int32_t *tiles_before; // [E+1] scratch
  int32_t *counters;     // [E][chunks] when chunks are sorted side by side
  int32_t *offset, *order;
  ms_cuda_tile *tiles;
  int32_t *tile_count;
  ms_cuda_faults *faults;
} ms_group_args;

// The expert of a slot, -1 for none; another rank's message may hold anything.
__device__ __forceinline__ int32_t ms_group_expert(const ms_group_args &a, int32_t slot) {
  int32_t r = slot / a.rank_slots;
  const int32_t *expert = (const int32_t *)(a.messages + r * a.message_bytes + a.expert_at);
  int32_t e = expert[slot - r * a.rank_slots];
  return (uint32_t)e < (uint32_t)a.E ? e : -1;
}

// Walk one chunk, all lanes of a warp. counter(e) is at counters[e * chunks + chunk].
template <bool PLACE, typename Counter>
__device__ __forceinline__ void ms_group_walk(const ms_group_args &a, Counter *counters, int32_t chunks, int32_t chunk) {
  int32_t lane = threadIdx.x % 32, begin = chunk * a.chunk_slots;
  int32_t end = begin + a.chunk_slots < a.slots ? begin + a.chunk_slots : a.slots;
  for (int32_t base = begin; base < end; base += 32) {
    int32_t slot = base + lane;
    int32_t e = slot < end ? ms_group_expert(a, slot) : -1;
    uint32_t same = __match_any_sync(0xffffffffu, e);
    int32_t leader = __ffs(same) - 1;
    int32_t first = 0;
    if (e >= 0 && lane == leader) {
      Counter *counter = counters + (int64_t)e * chunks + chunk;
      first = *counter;
      *counter = (Counter)(first + __popc(same));
    }
    __syncwarp(); // the next step's leader is another lane
    if (PLACE) {
      first = __shfl_sync(0xffffffffu, first, leader);
      if (e >= 0) a.order[first + __popc(same & ((1u << lane) - 1))] = slot;
    }
  }
}

__device__ __forceinline__ int32_t ms_warp_inclusive(int32_t x) {
  int32_t lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    int32_t before = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

// Sum over the threads before this one, of the whole block. `scratch` [32] shared.
__device__ __forceinline__ int32_t ms_block_exclusive(int32_t x, int32_t *scratch) {
  int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t inclusive = ms_warp_inclusive(x);
  __syncthreads(); // scratch may still be read by an earlier call
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  int32_t before = scratch[lane];
  before = ms_warp_inclusive(before) - before;
  return inclusive - x + __shfl_sync(0xffffffffu, before, warp);
}

__device__ __forceinline__ bool ms_headers_agree(const ms_group_args &a) {
  const ms_cuda_header *own = (const ms_cuda_header *)a.messages;
  bool agree = true;
  for (int32_t r = threadIdx.x; r < a.R; r += blockDim.x) {
    const ms_cuda_header *other = (const ms_cuda_header *)(a.messages + r * a.message_bytes);
    agree &= own->call == other->call && own->layer == other->layer && own->D == other->D && own->K == other->K &&
             own->E == other->E && own->dtype == other->dtype && own->replicated == other->replicated &&
             other->fault == MS_CUDA_NO_FAULT;
  }
  return __syncthreads_and(agree);
}

// Host memory: the host may look at any time, so `found` comes last. What it has not read yet stays.
__device__ __forceinline__ void ms_tell_faults(const ms_group_args &a) {
  if (__syncthreads_or(*(volatile int32_t *)&a.faults->found)) return;
  for (int32_t r = threadIdx.x; r < a.R; r += blockDim.x)
    a.faults->headers[r] = *(const ms_cuda_header *)(a.messages + r * a.message_bytes);
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) *(volatile int32_t *)&a.faults->found = 1;
}

// All of a block of MS_GROUP_SCAN_THREADS.
template <typename Counter>
__device__ __forceinline__ void ms_group_scan(const ms_group_args &a, Counter *counters, int32_t chunks) {
  __shared__ int32_t scratch[MS_GROUP_SCAN_WARPS];
  int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int32_t e = warp; e < a.E; e += MS_GROUP_SCAN_WARPS) { // within each expert
    Counter *own = counters + (int64_t)e * chunks;
    int32_t before = 0;
    for (int32_t base = 0; base < chunks; base += 32) {
      int32_t c = base + lane, count = c < chunks ? own[c] : 0;
      int32_t inclusive = ms_warp_inclusive(count);
      if (c < chunks) own[c] = (Counter)(before + inclusive - count);
      before += __shfl_sync(0xffffffffu, inclusive, 31);
    }
    if (lane == 0) a.offset[e] = before; // its number of slots, for now
  }
  __syncthreads();

  int32_t each = (a.E + MS_GROUP_SCAN_THREADS - 1) / MS_GROUP_SCAN_THREADS; // over experts, some each thread
  int32_t e0 = threadIdx.x * each, e1 = e0 + each < a.E ? e0 + each : a.E;
  int32_t rows = 0, tiles = 0;
  for (int32_t e = e0; e < e1; e++) {
    rows += a.offset[e];
    tiles += (a.offset[e] + a.tile_rows - 1) / a.tile_rows;
  }
  rows = ms_block_exclusive(rows, scratch);
  tiles = ms_block_exclusive(tiles, scratch);
  for (int32_t e = e0; e < e1; e++) {
    int32_t count = a.offset[e];
    a.offset[e] = rows;
    a.tiles_before[e] = tiles;
    rows += count;
    tiles += (count + a.tile_rows - 1) / a.tile_rows;
    if (e == a.E - 1) {
      a.offset[a.E] = rows;
      a.tiles_before[a.E] = tiles;
    }
  }
  bool agree = ms_headers_agree(a); // a barrier too
  if (!agree) ms_tell_faults(a);
  if (threadIdx.x == 0) *a.tile_count = agree ? a.tiles_before[a.E] : 0;

  for (int32_t e = warp; e < a.E; e += MS_GROUP_SCAN_WARPS) {
    int32_t first = a.offset[e], count = a.offset[e + 1] - first;
    if (count == 0) continue; // whole warps
    for (int32_t c = lane; c < chunks; c += 32) {
      Counter *own = counters + (int64_t)e * chunks + c;
      *own = (Counter)(*own + first);
    }
    int32_t tile = a.tiles_before[e];
    for (int32_t row = lane * a.tile_rows; row < count; row += 32 * a.tile_rows) {
      ms_cuda_tile t = {e, first + row, count - row < a.tile_rows ? count - row : a.tile_rows};
      a.tiles[tile + row / a.tile_rows] = t;
    }
  }
}

// ---- kernels ---------------------------------------------------------------------------------------------------

// All in one block. Dynamic shared memory: [E][chunks] uint16.
__global__ void __launch_bounds__(MS_GROUP_SCAN_THREADS) ms_group_small(const ms_group_args a) {
  extern __shared__ uint16_t ms_group_counters[];
  int32_t warp = threadIdx.x / 32;
  for (int32_t i = threadIdx.x; i < a.E * a.chunks; i += MS_GROUP_SCAN_THREADS) ms_group_counters[i] = 0;
  __syncthreads();
  if (warp < a.chunks) ms_group_walk<false>(a, ms_group_counters, a.chunks, warp);
  __syncthreads();
  ms_group_scan(a, ms_group_counters, a.chunks);
  __syncthreads();
  if (warp < a.chunks) ms_group_walk<true>(a, ms_group_counters, a.chunks, warp);
}

__global__ void __launch_bounds__(MS_GROUP_SCAN_THREADS) ms_group_count(const ms_group_args a) {
  __shared__ bool last;
  int32_t warps = MS_GROUP_SCAN_WARPS, chunk = blockIdx.x * warps + threadIdx.x / 32;
  if (chunk < a.chunks) {
    for (int32_t e = threadIdx.x % 32; e < a.E; e += 32) a.counters[(int64_t)e * a.chunks + chunk] = 0;
    __syncwarp();
    ms_group_walk<false>(a, a.counters, a.chunks, chunk);
  }
  __syncthreads();
  if (threadIdx.x == 0) last = ms_ticket_acq_rel(a.ticket) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  ms_group_scan(a, a.counters, a.chunks);
  if (threadIdx.x == 0) *a.ticket = 0;
}

__global__ void __launch_bounds__(32 * MS_GROUP_WARPS) ms_group_place(const ms_group_args a) {
  int32_t chunk = blockIdx.x * MS_GROUP_WARPS + threadIdx.x / 32;
  if (chunk < a.chunks) ms_group_walk<true>(a, a.counters, a.chunks, chunk);
}

#endif
