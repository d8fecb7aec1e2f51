// step3_group.cuh - group: which rows each expert multiplies, and the tiles that ffn works through.
//
//   offset [E+1], order [slots]    the slots (token * K + choice) sorted by expert, stable: a counting sort
//   tiles [tile_count]             every expert's rows in pieces of tile_rows, experts in order
//
// The slots are cut in chunks:
//
//   count    counters[chunk][e] = slots of the chunk with expert e; each slot's rank among those of its chunk
//   scan     counters become sums over the chunks before; offset; tiles before each expert
//   place    order[offset[e] + counters[chunk][e] + rank] = slot; tile i's expert is searched for
//
// Small batches: one block does all in shared memory, 16-bit counters, a chunk for each warp, which walks it twice
// (count, place). Else many blocks, at most one for each multiprocessor, in a cooperative launch, which runs all of them
// at once, so that they can wait for each other, twice:
//
//   count    each its chunks, into counters [E][chunks]
//   scan     each its share of the experts: one running sum over their counters, and one over their tiles
//   place    each adds up the shares before each, then places the slots of its chunks, and some of the tiles
//
// Whoever counts does so in the order of slots, so nothing depends on timing.
//
// Where a rank computes only some slots of an expert (ms_cuda_turns), it orders those, by their numbers among all of
// them, which the sort finds anyway. The others become slots without an expert, in the messages too: combine reads there
// which slots this rank has computed.
//
// Headers of all ranks are compared here. If they disagree, or tell of a fault, tile_count is -1, so that no rank
// computes and outputs become NaN, and the host finds the headers in `faults`. Else the slots are counted in `seen`,
// expert by expert, whoever computes them: integers, so it does not matter who adds first.
//
// Many blocks: 32 registers and 2 * E bytes of shared memory, so that two fit on a multiprocessor: half of the device
// will do while a collective of another chunk has the rest.
// Cost: reads slots * 10 bytes, writes slots * 6 (one block: 8 and 4); counters 16 * E * chunks. Latency bound: one
// block some thousand cycles; else about 100 cycles for each warp of a chunk, two meetings, and a round of
// ms_block_exclusive for each 1024 counters of a share.
// Slow twins: ms_reference_group, ms_header_check.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP3_GROUP_CUH
#define MS_STEP3_GROUP_CUH

#include "moeshard_cuda.h"
#include "ms_ptx_sync.cuh"

enum { MS_GROUP_THREADS = 1024, MS_GROUP_WARPS = MS_GROUP_THREADS / 32 };

typedef struct ms_group_args {
  char *messages;
  int64_t message_bytes, expert_at;
  int32_t R, E, K, slots, rank_slots; // rank_slots = T * K
  int32_t chunks, chunk_slots, tile_rows;
  // Many blocks only. 2^share_bits experts are a share; its sums begin with 0.
  int32_t share_bits, shares;
  int32_t *meeting;                  // of ms_grid_meet
  int32_t *counters, *tiles_before;  // [E][chunks], [E]
  int32_t *own_before;               // [E] rows, with turns
  int32_t *share_rows, *share_tiles; // [shares]
  uint16_t *rank;                    // [slots]
  int32_t *offset, *order;
  ms_cuda_tile *tiles;
  int32_t *tile_count;
  const ms_cuda_turns *turns; // [E] or NULL: this rank computes all slots
  unsigned long long *seen;   // [E+1] or NULL
  ms_cuda_faults *faults;
} ms_group_args;

// Where a slot's expert is written.
__device__ __forceinline__ int32_t *ms_group_choice(const ms_group_args &a, int32_t slot) {
  int32_t r = slot / a.rank_slots;
  return (int32_t *)(a.messages + r * a.message_bytes + a.expert_at) + (slot - r * a.rank_slots);
}

// The expert of a slot, -1 for none; another rank's message may hold anything.
__device__ __forceinline__ int32_t ms_group_expert(const ms_group_args &a, int32_t slot) {
  int32_t e = *ms_group_choice(a, slot);
  return (uint32_t)e < (uint32_t)a.E ? e : -1;
}

__device__ __forceinline__ ms_cuda_turns ms_group_turns(const ms_group_args &a, int32_t e) {
  ms_cuda_turns turns = a.turns[e];
#ifdef MS_PLANT_40 // every copy computes all slots
  if (turns.first != MS_CUDA_NO_TURN) turns = ms_cuda_turns{0, 1};
#endif
  return turns;
}

// How many of an expert's slots this rank computes.
__device__ __forceinline__ int32_t ms_group_own(const ms_group_args &a, int32_t e, int32_t count) {
  if (!a.turns || !count) return count;
  ms_cuda_turns turns = ms_group_turns(a, e);
#ifdef MS_PLANT_41 // the last one is forgotten, unless the copies have equally many
  return count > turns.first ? (count - turns.first) / turns.step : 0;
#endif
  return count > turns.first ? (count - turns.first - 1) / turns.step + 1 : 0;
}

// Put the slot that is number `index` of expert e's, whose rows begin at `first`, where it belongs.
__device__ __forceinline__ void ms_group_put(const ms_group_args &a, int32_t first, int32_t e, int32_t index,
                                             int32_t slot) {
  if (a.turns) {
    ms_cuda_turns turns = ms_group_turns(a, e);
    index -= turns.first;
    if (index < 0 || index % turns.step) {
#ifndef MS_PLANT_42 // combine adds what another rank computes
      *ms_group_choice(a, slot) = -1;
#endif
      return;
    }
    index /= turns.step;
  }
  a.order[first + index] = slot;
}

// Walk one chunk, all lanes of a warp: 32 slots a step. Lanes with the same expert find each other; the first of them
// moves the counter by their number. A chunk belongs to one warp, so nothing depends on timing.
template <bool PLACE>
__device__ __forceinline__ void ms_group_walk(const ms_group_args &a, uint16_t *counters, const int32_t *offset,
                                              int32_t chunk) {
  int32_t lane = threadIdx.x % 32, begin = chunk * a.chunk_slots;
  int32_t end = begin + a.chunk_slots < a.slots ? begin + a.chunk_slots : a.slots;
  for (int32_t base = begin; base < end; base += 32) {
    int32_t slot = base + lane;
    int32_t e = slot < end ? ms_group_expert(a, slot) : -1;
    uint32_t same = __match_any_sync(0xffffffffu, e);
    int32_t leader = __ffs(same) - 1;
    int32_t first = 0;
    if (e >= 0 && lane == leader) {
      uint16_t *counter = counters + chunk * a.E + e;
      first = *counter;
      *counter = (uint16_t)(first + __popc(same));
    }
#ifndef MS_PLANT_11 // the counter may be read before it is written
    __syncwarp(); // the next step's leader is another lane
#endif
    if (PLACE) {
      first = __shfl_sync(0xffffffffu, first, leader);
      if (e >= 0) ms_group_put(a, offset[e], e, first + __popc(same & ((1u << lane) - 1)), slot);
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

// Sum over the threads before this one, of the whole block, and over all of it. `scratch` [32] shared.
__device__ __forceinline__ int32_t ms_block_exclusive(int32_t x, int32_t *scratch, int32_t *all) {
  int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t inclusive = ms_warp_inclusive(x);
  __syncthreads(); // scratch may still be read by an earlier call
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  int32_t warps = ms_warp_inclusive(scratch[lane]);
  *all = __shfl_sync(0xffffffffu, warps, 31);
  int32_t before = __shfl_sync(0xffffffffu, warps, warp > 0 ? warp - 1 : 0);
  return inclusive - x + (warp > 0 ? before : 0);
}

__device__ __forceinline__ bool ms_headers_agree(const ms_group_args &a) {
  const ms_cuda_header *own = (const ms_cuda_header *)a.messages;
  bool agree = true;
  for (int32_t r = threadIdx.x; r < a.R; r += blockDim.x) {
    const ms_cuda_header *other = (const ms_cuda_header *)(a.messages + r * a.message_bytes);
    agree &= own->call == other->call && own->layer == other->layer && own->D == other->D && own->K == other->K &&
             own->E == other->E && own->dtype == other->dtype && own->replicated == other->replicated &&
             (!own->replicated || (own->T == other->T && own->digest == other->digest)) &&
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

__device__ __forceinline__ void ms_group_see(const ms_group_args &a, int32_t e, int32_t count) {
  if (a.seen && count) atomicAdd(a.seen + e, (unsigned long long)count);
}

// All slots that ranks have (replicated tokens once).
__device__ __forceinline__ void ms_group_see_all(const ms_group_args &a) {
  if (!a.seen) return;
  for (int32_t r = threadIdx.x; r < a.R; r += blockDim.x) {
    const ms_cuda_header *header = (const ms_cuda_header *)(a.messages + r * a.message_bytes);
    if (r == 0 || !header->replicated) atomicAdd(a.seen + a.E, (unsigned long long)(header->T * a.K));
  }
}

// The verdict on the headers, by one block.
__device__ __forceinline__ void ms_group_judge(const ms_group_args &a, bool agree, int32_t tiles) {
  if (agree)
    ms_group_see_all(a);
  else
    ms_tell_faults(a);
  if (threadIdx.x == 0) *a.tile_count = agree ? tiles : -1;
}

// Tile i is of the last expert that has no more than i tiles before it: experts without tiles are passed over.
//   offset, tiles_before  what experts have before them: indexed by expert, E for all
template <typename Sums>
__device__ __forceinline__ void ms_group_tile(const ms_group_args &a, Sums offset, Sums tiles_before, int32_t i) {
  int32_t e = 0, end = a.E;
  while (end - e > 1) {
    int32_t middle = e + (end - e) / 2;
    if (tiles_before[middle] <= i)
      e = middle;
    else
      end = middle;
  }
  int32_t first = offset[e] + (i - tiles_before[e]) * a.tile_rows, rows = offset[e + 1] - first;
  a.tiles[i] = ms_cuda_tile{e, first, rows < a.tile_rows ? rows : a.tile_rows};
}

// ---- one block -------------------------------------------------------------------------------------------------

// The counters of one expert become sums over the chunks before each. Returns the sum over all.
__device__ __forceinline__ int32_t ms_group_sum(uint16_t *counters, int32_t E, int32_t chunks) {
  enum { AHEAD = 8 }; // loads in flight
  int32_t before = 0;
  for (int32_t c0 = 0; c0 < chunks; c0 += AHEAD) {
    int32_t count[AHEAD];
#pragma unroll
    for (int32_t i = 0; i < AHEAD; i++) count[i] = c0 + i < chunks ? counters[(int64_t)(c0 + i) * E] : 0;
#pragma unroll
    for (int32_t i = 0; i < AHEAD; i++)
      if (c0 + i < chunks) {
        counters[(int64_t)(c0 + i) * E] = (uint16_t)before;
        before += count[i];
      }
  }
  return before;
}

// The verdict on the headers; sums over chunks; offset and tiles_before. There is a barrier before the first of these
// sums, and one between the last and the return.
__device__ __forceinline__ void ms_group_scan(const ms_group_args &a, uint16_t *counters, int32_t *offset,
                                              int32_t *tiles_before) {
  __shared__ int32_t scratch[MS_GROUP_WARPS];
  int32_t rows = 0, tiles = 0;            // of the experts before
  const bool agree = ms_headers_agree(a); // a barrier: all has been counted
#ifdef MS_PLANT_20 // calls with a fault are counted
  const bool counted = true;
#else
  const bool counted = agree;
#endif
  for (int32_t base = 0; base < a.E; base += MS_GROUP_THREADS) {
    int32_t e = base + threadIdx.x, all_rows, all_tiles;
    int32_t count = e < a.E ? ms_group_sum(counters + e, a.E, a.chunks) : 0;
    if (counted) ms_group_see(a, e, count);
    count = ms_group_own(a, e, count);
    int32_t row = rows + ms_block_exclusive(count, scratch, &all_rows);
    int32_t tile = tiles + ms_block_exclusive((count + a.tile_rows - 1) / a.tile_rows, scratch, &all_tiles);
    if (e < a.E) {
      offset[e] = row;
      tiles_before[e] = tile;
    }
    rows += all_rows;
    tiles += all_tiles;
  }
  if (threadIdx.x == 0) {
    offset[a.E] = rows;
    tiles_before[a.E] = tiles;
  }
  ms_group_judge(a, agree, tiles);
#ifndef MS_PLANT_12 // offset may be read before it is written
  __syncthreads();
#endif
}

// All in one block; a chunk for each warp. Dynamic shared memory: ms_group_small_bytes.
// (Its 1: else ptxas saves registers for two blocks, and spills.)
__global__ void __launch_bounds__(MS_GROUP_THREADS, 1) ms_group_small(const ms_group_args a) {
  extern __shared__ int32_t ms_group_shared[];
  int32_t *offset = ms_group_shared, *tiles_before = offset + a.E + 1;
  uint16_t *counters = (uint16_t *)(tiles_before + a.E + 1); // [chunks][E]
  int32_t warp = threadIdx.x / 32;
  for (int32_t i = threadIdx.x; i < a.E * a.chunks; i += MS_GROUP_THREADS) counters[i] = 0;
  __syncthreads();
  if (warp < a.chunks) ms_group_walk<false>(a, counters, offset, warp);
  ms_group_scan(a, counters, offset, tiles_before);
  if (warp < a.chunks) ms_group_walk<true>(a, counters, offset, warp);
  for (int32_t i = threadIdx.x; i < tiles_before[a.E]; i += MS_GROUP_THREADS) ms_group_tile(a, offset, tiles_before, i);
  for (int32_t e = threadIdx.x; e <= a.E; e += MS_GROUP_THREADS) a.offset[e] = offset[e];
}

// ---- many blocks -----------------------------------------------------------------------------------------------

__device__ __forceinline__ int32_t ms_chunk_end(const ms_group_args &a, int32_t chunk) {
  int64_t end = (int64_t)(chunk + 1) * a.chunk_slots;
  return end < a.slots ? (int32_t)end : a.slots;
}

// Count one chunk, 1024 slots a round: warps take turns at the counters. `counters` [E] shared.
__device__ __forceinline__ void ms_group_count(const ms_group_args &a, uint16_t *counters, int32_t chunk) {
  int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, end = ms_chunk_end(a, chunk);
  for (int32_t e = threadIdx.x; e < a.E; e += MS_GROUP_THREADS) counters[e] = 0;
  __syncthreads();
  for (int32_t base = chunk * a.chunk_slots; base < end; base += MS_GROUP_THREADS) {
    int32_t slot = base + threadIdx.x, turns = (end - base + 31) / 32;
    int32_t e = slot < end ? ms_group_expert(a, slot) : -1;
    uint32_t same = __match_any_sync(0xffffffffu, e);
    int32_t leader = __ffs(same) - 1, first = 0;
    for (int32_t turn = 0; turn < turns && turn < MS_GROUP_WARPS; turn++) {
      if (turn == warp && e >= 0 && lane == leader) {
        first = counters[e];
        counters[e] = (uint16_t)(first + __popc(same));
      }
#ifndef MS_PLANT_13 // warps do not wait for their turn
      __syncthreads();
#endif
    }
    first = __shfl_sync(0xffffffffu, first, leader);
    if (slot < end) a.rank[slot] = (uint16_t)(first + __popc(same & ((1u << lane) - 1)));
  }
  __syncthreads(); // the next chunk's zeros are written by who reads here
  for (int32_t e = threadIdx.x; e < a.E; e += MS_GROUP_THREADS) a.counters[(int64_t)e * a.chunks + chunk] = counters[e];
}

// Running sums over one share: counters of its experts, chunk by chunk; then tiles, and with turns this rank's rows.
__device__ __forceinline__ void ms_group_share(const ms_group_args &a, int32_t share, bool agree, int32_t *scratch) {
  int32_t first = share << a.share_bits, last = first + (1 << a.share_bits) < a.E ? first + (1 << a.share_bits) : a.E;
  int32_t rows = 0, tiles = 0, own = 0;
  for (int64_t base = (int64_t)first * a.chunks; base < (int64_t)last * a.chunks; base += MS_GROUP_THREADS) {
    int64_t i = base + threadIdx.x;
    bool there = i < (int64_t)last * a.chunks;
    int32_t all, before = rows + ms_block_exclusive(there ? a.counters[i] : 0, scratch, &all);
    if (there) a.counters[i] = before;
    rows += all;
  }
  __syncthreads(); // the counters have been written
  for (int32_t base = first; base < last; base += MS_GROUP_THREADS) {
    int32_t e = base + threadIdx.x, count = 0, all;
    if (e < last) {
      const int32_t *counters = a.counters + (int64_t)e * a.chunks;
      count = (e + 1 < last ? counters[a.chunks] : rows) - counters[0];
    }
    if (agree) ms_group_see(a, e, count);
    count = ms_group_own(a, e, count);
    int32_t before = tiles + ms_block_exclusive((count + a.tile_rows - 1) / a.tile_rows, scratch, &all);
    if (e < last) a.tiles_before[e] = before;
    tiles += all;
    if (!a.turns) continue;
    before = own + ms_block_exclusive(count, scratch, &all);
    if (e < last) a.own_before[e] = before;
    own += all;
  }
  if (threadIdx.x == 0) {
    a.share_rows[share] = a.turns ? own : rows;
    a.share_tiles[share] = tiles;
  }
}

// What an expert has before it: in its share, and in the shares before that one.
struct ms_group_sums {
  const ms_group_args &a;
  const int32_t *shares, *within; // [a.shares + 1] shared; [E] `step` apart
  int32_t step;
  __device__ __forceinline__ int32_t operator[](int32_t e) const {
    return e < a.E ? shares[e >> a.share_bits] + within[(int64_t)e * step] : shares[a.shares];
  }
};

// Sums over the shares before each, for all of a block. `before` [shares + 1] shared.
__device__ __forceinline__ void ms_group_shares(const ms_group_args &a, const int32_t *of_share, int32_t *before,
                                                int32_t *scratch) {
  int32_t all, share = threadIdx.x;
  int32_t sum = ms_block_exclusive(share < a.shares ? of_share[share] : 0, scratch, &all);
  if (share <= a.shares) before[share] = sum;
}

// A cooperative launch. Dynamic shared memory: [E] uint16.
__global__ void __launch_bounds__(MS_GROUP_THREADS, 2) ms_group_large(const ms_group_args a) {
  extern __shared__ int32_t ms_group_shared[];
  __shared__ int32_t scratch[MS_GROUP_WARPS];
  __shared__ int32_t rows_before[MS_CUDA_SORT_BLOCKS + 1], tiles_before[MS_CUDA_SORT_BLOCKS + 1];
  __shared__ bool agree; // known throughout: a register for each thread would be one too many
  bool found = ms_headers_agree(a);
  if (threadIdx.x == 0) agree = found;
  for (int32_t chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x)
    ms_group_count(a, (uint16_t *)ms_group_shared, chunk);
#ifndef MS_PLANT_30 // counters may be added up before all is counted
  ms_grid_meet(a.meeting);
#endif
  if ((int32_t)blockIdx.x < a.shares) ms_group_share(a, blockIdx.x, agree, scratch);
#ifndef MS_PLANT_31 // slots may be placed before all is added up
  ms_grid_meet(a.meeting);
#endif
  ms_group_shares(a, a.share_rows, rows_before, scratch);
  ms_group_shares(a, a.share_tiles, tiles_before, scratch);
  __syncthreads();
  for (int32_t chunk = blockIdx.x; chunk < a.chunks; chunk += gridDim.x)
    for (int32_t slot = chunk * a.chunk_slots + threadIdx.x; slot < ms_chunk_end(a, chunk); slot += MS_GROUP_THREADS)
      if (int32_t e = ms_group_expert(a, slot); e >= 0) {
        const int32_t *counters = a.counters + (int64_t)e * a.chunks;
        int32_t first = rows_before[e >> a.share_bits], index = counters[chunk] + a.rank[slot];
        if (a.turns) first += a.own_before[e], index -= counters[0];
        ms_group_put(a, first, e, index, slot);
      }
  ms_group_sums row{a, rows_before, a.turns ? a.own_before : a.counters, a.turns ? 1 : a.chunks};
  ms_group_sums tile{a, tiles_before, a.tiles_before, 1};
  int32_t thread = blockIdx.x * MS_GROUP_THREADS + threadIdx.x, threads = gridDim.x * MS_GROUP_THREADS;
  for (int32_t i = thread; i < tiles_before[a.shares]; i += threads) ms_group_tile(a, row, tile, i);
  for (int32_t e = thread; e <= a.E; e += threads) a.offset[e] = row[e];
  if (blockIdx.x == 0) ms_group_judge(a, agree, tiles_before[a.shares]);
}

#endif
