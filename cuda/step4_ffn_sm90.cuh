// step4_ffn_sm90.cuh - the two matrix products of ffn on Hopper's wgmma, bfloat16 and float16.
//
//   up     H[i, :]    = act(X[token of order[i], :] . w_in[e]^T + b_in[e])            (gated: act(gate) * up)
//   down   slot[s, :] = weight[s] * (H[i, :] . w_out[e]^T + b_out[e]),  s = order[i]
//
// Operands lie as moeshard_cuda.h says: K (D for up, the expert's width for down) contiguous, rows aligned to and
// padded with zeros to 16 bytes. What is beyond a row, beyond the tile's rows, beyond the expert's width is not read:
// the copies put zeros there. H gets its zeros from the expert's width to the next 16 bytes here.
//
// One block per multiprocessor, 384 threads, works through the items (tile of rows, 256 columns) that the table of
// tiles makes:
//
//   warpgroup 0      copies A (gathered rows) and B (weight rows) to a ring of stages of 64 elements of K:
//                    thread p copies the 16-byte piece p % 8 of rows p / 8, p / 8 + 16, ... of both
//   warpgroups 1, 2  multiply, then apply the epilogue and store. 128-row tiles: each 64 rows x 256 columns;
//                    64-row tiles: each 64 rows x 128 columns
//
//   "full" barriers  4 arrivals, one for each copying warp: its copies have landed and are fenced for wgmma
//   "empty" barriers 8 arrivals, one for each multiplying warp: its wgmma have read the stage
//
//   stage, 128-row tiles: A [128 rows][128 bytes] B [256 rows][128 bytes], pieces swizzled by row % 8: 48 KiB, 4 of
//   them; 64-row tiles: 40 KiB, 5 of them. Beside them 2 KiB for each multiplying warp, through which its results
//   become whole lines. One block fits: 209 (217) KiB of 227.
//   Registers: 168 at launch, then 88 for the copying threads and 208 for the others (128 sums each).
//
//   The copying warps know the items: while they copy the first step of one they find the next (table, expert, rows),
//   and write beside each first stage what the multiplying warps must know of it (ms_sm90_head).
//
// Gated: B interleaves 8 gate columns and 8 up columns, so that both sums of a hidden column meet in one thread.
//
// Order of the items: 16 tiles x 8 column blocks are at work at a time (2048 x 2048), which asks L2 for the fewest
// bytes; the weights of an expert with up to 2048 rows come from memory once.
// Cost of one step of K, 128-row tile: 2 MiMAC = 1024 cycles of the tensor cores, 48 KiB from L2 = 48 bytes a cycle
// and multiprocessor, 128 bytes of shared memory a cycle (48 written, 80 read), 96 copy instructions a warp
// scheduler. Bounds: tensor cores and shared memory alike, then L2. The tile's epilogue overlaps with the copies of
// the next item, and with the other warpgroup's products as far as the ring lets it drift.
// Slow twin: ms_reference_ffn in csrc/reference.c.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP4_FFN_SM90_CUH
#define MS_STEP4_FFN_SM90_CUH

#include "moeshard_cuda.h"
#include "ms_ptx_sm90.cuh"
#include "step4_ffn_epilogue.cuh"

enum : int32_t {
  MS_SM90_THREADS = 384,
  MS_SM90_COPY_REGISTERS = 88,
  MS_SM90_MULTIPLY_REGISTERS = 208,
  MS_SM90_COLUMNS = 256, // of B in a stage
  MS_SM90_BAND = 16,     // tiles that share their column blocks
  MS_SM90_ROW = 128,     // bytes of K in a stage: 64 elements
  MS_SM90_LAG = 2,       // stages that are copied before the first of them must have landed
  MS_SM90_STAGING = 2048 // bytes for each multiplying warp: 16 rows x 128 bytes
};

// Where things lie in shared memory, for a base at a multiple of 1024 bytes.
template <int ROWS> struct ms_sm90_shared {
  enum : int32_t {
    STAGES = ROWS == 128 ? 4 : 5,
    A_BYTES = ROWS * MS_SM90_ROW,
    STAGE = A_BYTES + MS_SM90_COLUMNS * MS_SM90_ROW,
    STAGING_AT = STAGES * STAGE,
    FULL_AT = STAGING_AT + 8 * MS_SM90_STAGING,
    EMPTY_AT = FULL_AT + STAGES * 8,
    HEAD_AT = EMPTY_AT + STAGES * 8,
    BYTES = HEAD_AT + STAGES * 32 + 1024 // the base is rounded up
  };
};

// Place in the ring of stages: `phase` changes each time round.
template <int STAGES> struct ms_sm90_ring {
  uint32_t stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// ---- items -----------------------------------------------------------------------------------------------------

struct ms_sm90_item {
  ms_cuda_tile tile;
  ms_cuda_expert expert;
  int32_t column; // first of H (up) or of D (down)
  int32_t steps;  // of K, at least one: of zeros if there is no K
};

// What the multiplying warps must know of an item: lies beside its first stage, and is given back with it.
struct __align__(16) ms_sm90_head {
  int32_t first, rows, column, steps; // no steps: there is no more
  int32_t width, unused;
  const float *bias;
};

// What one launch multiplies.
struct ms_sm90_launch {
  int64_t T, K, ld_in, ld_x;
  int64_t message_bytes, weight_at, ld_h;
  int32_t D, block, blocks; // block: columns of one item (gated: half of B's rows)
  bool aligned;             // rows of slot, or of view.out, can be written 4 columns at a time
};

// Item i, or false if it has nothing to do: a column block that its expert is too narrow for.
template <bool UP>
__device__ __forceinline__ bool ms_sm90_item_of(const ms_sm90_launch &launch, const ms_cuda_view &view, int32_t i,
                                                int32_t tiles, ms_sm90_item &item) {
  int32_t band_items = MS_SM90_BAND * launch.blocks;
  int32_t first = i / band_items * MS_SM90_BAND, at = i % band_items;
  int32_t band = min((int32_t)MS_SM90_BAND, tiles - first);
  item.tile = view.tiles[first + at % band];
  item.expert = view.experts[item.tile.expert];
  item.column = at / band * launch.block;
  int32_t depth = UP ? launch.D : item.expert.width;
  item.steps = max(1, (depth + 63) / 64);
  return item.tile.rows > 0 && item.column < (UP ? item.expert.width : launch.D);
}

// ---- copies: warpgroup 0 ---------------------------------------------------------------------------------------

// The rows that one thread copies of every stage of an item.
template <int ROWS> struct ms_sm90_copies {
  const char *a_base, *b_first; // at this thread's piece
  uint32_t a_row[ROWS / 16];    // 16-byte units from a_base
  int32_t a_rows;               // of the tile, less this thread's first
  int32_t b_stride;             // bytes from one of its rows of B to the next
  int32_t b_step, b_columns;    // columns from row to row; columns there are, less this thread's first
  int32_t depth;                // bytes of K in a row, less those before this thread's piece
};

// The slot of the row whose address this lane finds for its warp: of rows line % 4 + 16 i, lane line % 4 + 4 i.
__device__ __forceinline__ int32_t ms_sm90_slot_of(const ms_cuda_view &view, const ms_sm90_item &item) {
  int32_t row = threadIdx.x / 32 * 4 + threadIdx.x % 4 + threadIdx.x % 32 / 4 * 16;
  return view.order[item.tile.first + (row < item.tile.rows ? row : 0)];
}

// slot: ms_sm90_slot_of, loaded before, so that nobody waits for it here. All lanes of the warp.
template <bool UP, bool GATED, int ROWS>
__device__ __forceinline__ ms_sm90_copies<ROWS> ms_sm90_copies_of(const ms_sm90_launch &launch,
                                                                  const ms_cuda_view &view, const ms_sm90_item &item,
                                                                  int32_t slot) {
  ms_sm90_copies<ROWS> copies;
  int32_t line = threadIdx.x / 8, piece = threadIdx.x % 8;
  uint32_t own_row = 0;
  if (UP) {
    int32_t token = slot / (int32_t)launch.K, rank = token / (int32_t)launch.T;
    own_row = (uint32_t)((rank * view.hidden_stride + (token - rank * launch.T) * launch.ld_x * 2) / 16);
  }
  copies.a_base = (UP ? view.hidden : view.h) + piece * 16;
  copies.a_rows = item.tile.rows - line;
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++) {
    if (UP)
      copies.a_row[i] = __shfl_sync(~0u, own_row, line % 4 + 4 * i);
    else
      copies.a_row[i] = (uint32_t)((item.tile.first + (16 * i < copies.a_rows ? line + 16 * i : 0)) * launch.ld_h / 8);
  }
  const ms_cuda_expert &expert = item.expert;
  int64_t ld = UP ? launch.ld_in : expert.ld_out;
  int32_t column = item.column + (GATED ? line % 8 : line);
  int64_t row = column + (GATED && line >= 8 ? expert.width : 0); // gate rows, then up rows
  copies.b_step = GATED ? 8 : 16;
  copies.b_columns = (UP ? expert.width : launch.D) - column;
  copies.b_first = (const char *)(UP ? expert.w_in : expert.w_out) + row * ld * 2 + piece * 16;
  copies.b_stride = copies.b_step * (int32_t)ld * 2;
  copies.depth = (UP ? launch.D : expert.width) * 2 - piece * 16;
  return copies;
}

// Start the copies of step `step`: to_a, to_b are this thread's first pieces in the stage.
template <int ROWS>
__device__ __forceinline__ void ms_sm90_copy_step(const ms_sm90_copies<ROWS> &copies, int32_t step, uint32_t to_a,
                                                  uint32_t to_b) {
  int32_t at = step * MS_SM90_ROW;
  bool inside = at < copies.depth;
  if (!inside) at = 0; // beyond the row: the address must still be one of ours
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++)
    ms_copy16(to_a + i * 16 * MS_SM90_ROW, copies.a_base + (int64_t)copies.a_row[i] * 16 + at,
              inside && 16 * i < copies.a_rows);
  const char *b = copies.b_first + at;
#pragma unroll
  for (int i = 0; i < MS_SM90_COLUMNS / 16; i++, b += copies.b_stride)
    ms_copy16(to_b + i * 16 * MS_SM90_ROW, b, inside && i * copies.b_step < copies.b_columns);
}

template <bool UP, bool GATED, int ROWS>
__device__ __forceinline__ void ms_sm90_copy(const ms_sm90_launch &launch, const ms_cuda_view &view, uint32_t shared,
                                             int32_t tiles) {
  using layout = ms_sm90_shared<ROWS>;
  int32_t line = threadIdx.x / 8, piece = threadIdx.x % 8;
#ifdef MS_PLANT_2 // a swizzle that differs from the tensor cores'
  uint32_t own = shared + line * MS_SM90_ROW + ((piece ^ (line / 2 % 8)) * 16);
#else
  uint32_t own = shared + line * MS_SM90_ROW + ((piece ^ (line % 8)) * 16);
#endif
  ms_sm90_ring<layout::STAGES> ring, landed; // the stage to fill, the oldest that nobody was told of
  int32_t in_flight = 0;
  auto tell = [&] { // all lanes' copies to `landed` have landed
#ifndef MS_PLANT_1 // wgmma may read what was there before
    ms_fence_async_proxy();
#endif
    __syncwarp();
    if (threadIdx.x % 32 == 0) ms_mbarrier_arrive(shared + layout::FULL_AT + landed.stage * 8);
    landed.next();
  };
  auto head = [&] { return (ms_sm90_head *)__cvta_shared_to_generic(shared + layout::HEAD_AT + ring.stage * 32); };
  int32_t i = blockIdx.x, slot = 0;
  ms_sm90_item next;
  auto find = [&] { // the next item, and its order's first loads: long before they are needed
    for (; i < tiles * launch.blocks; i += gridDim.x) {
      if (!ms_sm90_item_of<UP>(launch, view, i, tiles, next)) continue;
      if (UP) slot = ms_sm90_slot_of(view, next);
      i += gridDim.x;
      return true;
    }
    return false;
  };
  for (bool there = find(); there;) {
    auto copies = ms_sm90_copies_of<UP, GATED, ROWS>(launch, view, next, slot);
    int32_t steps = next.steps;
    for (int32_t step = 0; step < steps; step++) {
      ms_mbarrier_wait(shared + layout::EMPTY_AT + ring.stage * 8, ring.phase ^ 1);
      if (step == 0 && threadIdx.x == 0)
        *head() = {next.tile.first, next.tile.rows,    next.column, steps,
                   next.expert.width, 0, UP ? next.expert.b_in : next.expert.b_out};
      uint32_t stage = own + ring.stage * layout::STAGE;
      ms_sm90_copy_step<ROWS>(copies, step, stage, stage + layout::A_BYTES);
      ms_copy_commit();
      ring.next();
      if (in_flight == MS_SM90_LAG) {
        ms_copy_wait<MS_SM90_LAG>();
        tell();
      } else
        in_flight++;
      if (step == 0) there = find();
    }
  }
  ms_copy_wait<0>();
  for (; in_flight > 0; in_flight--) tell();
  ms_mbarrier_wait(shared + layout::EMPTY_AT + ring.stage * 8, ring.phase ^ 1);
  if (threadIdx.x == 0) head()->steps = 0;
  tell();
}

// ---- products: warpgroups 1 and 2 ------------------------------------------------------------------------------

// A warp's place in the epilogue: 16 rows of the tile, from column `column` on.
struct ms_sm90_place {
  int32_t row, column; // first of this warp
  uint32_t staging;    // shared memory of this warp
};

// 16-byte piece of a row of the staging area, swizzled so that neither side meets bank conflicts.
__device__ __forceinline__ uint32_t ms_sm90_staged(uint32_t staging, int32_t row, int32_t piece) {
  return staging + row * 128 + ((piece ^ (row % 8)) * 16);
}
__device__ __forceinline__ uint4 ms_sm90_load_staged(uint32_t shared) {
  return *(const uint4 *)__cvta_shared_to_generic(shared);
}

// The first `count` of 8 columns, zeros in place of the others.
__device__ __forceinline__ uint4 ms_sm90_first(uint4 columns, int32_t count) {
  auto kept = [count](uint32_t pair, int32_t at) {
    return at + 1 < count ? pair : at < count ? pair & 0xffff : 0;
  };
  return make_uint4(kept(columns.x, 0), kept(columns.y, 2), kept(columns.z, 4), kept(columns.w, 6));
}

// The same for floats that 4 lanes of a row store 8 bytes of each: their rows' pieces are two apart.
__device__ __forceinline__ uint32_t ms_sm90_staged_floats(uint32_t staging, int32_t row, int32_t piece) {
  return staging + row * 128 + ((piece ^ (row % 4 * 2)) * 16);
}

// H from the sums: 64 columns at a time through the staging area, then 128 bytes of a row by 8 lanes.
template <typename Storage, ms_activation ACTIVATION, bool GATED, int SUMS>
__device__ __forceinline__ void ms_sm90_store_h(const ms_sm90_launch &launch, const ms_cuda_view &view,
                                                const ms_sm90_head &item, const ms_sm90_place &place,
                                                const float (&sum)[SUMS]) {
  constexpr int GROUPS = SUMS / (GATED ? 8 : 4); // of 8 columns of H
  const int32_t lane = threadIdx.x % 32, width = item.width;
  const float *bias = item.bias;
  auto biased = [&](int group, int c, int32_t skip, int at) { // sums c and c + 2 are of one column
    int32_t column = place.column + group * 8 + lane % 4 * 2 + c;
    float add = bias && column < width ? __ldg(bias + (column + skip)) : 0.f;
    return make_float2(sum[at + c] + add, sum[at + c + 2] + add);
  };
#pragma unroll
  for (int chunk = 0; chunk < GROUPS; chunk += 8) {
    __syncwarp(); // the last chunk has been read
#pragma unroll
    for (int group = chunk; group < chunk + 8; group += 2) {
      uint32_t fragment[4]; // rows 0-7 and 8-15 of `group`, then of the next
#pragma unroll
      for (int g = 0; g < 2; g++) {
        float2 h[2]; // of two columns: the sums of both rows
#pragma unroll
        for (int c = 0; c < 2; c++)
          if (GATED) {
            float2 gate = biased(group + g, c, 0, 8 * (group + g));
            float2 up = biased(group + g, c, width, 8 * (group + g) + 4);
            h[c] = make_float2(ms_activate<ACTIVATION>(gate.x) * ms_factor<ACTIVATION>(up.x),
                               ms_activate<ACTIVATION>(gate.y) * ms_factor<ACTIVATION>(up.y));
          } else {
            float2 s = biased(group + g, c, 0, 4 * (group + g));
            h[c] = make_float2(ms_activate<ACTIVATION>(s.x), ms_activate<ACTIVATION>(s.y));
          }
        fragment[2 * g] = ms_round2<Storage>(h[0].x, h[1].x);
        fragment[2 * g + 1] = ms_round2<Storage>(h[0].y, h[1].y);
      }
      ms_store_matrix4(ms_sm90_staged(place.staging, lane % 16, group - chunk + lane / 16), fragment[0], fragment[1],
                       fragment[2], fragment[3]);
    }
    __syncwarp();
    int32_t column = place.column + chunk * 8 + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int32_t row = 4 * i + lane / 8;
      uint4 value = ms_sm90_load_staged(ms_sm90_staged(place.staging, row, lane % 8));
      if (column + 8 > width) value = ms_sm90_first(value, width - column); // beyond it, 0 * infinity may be in the sum
#ifdef MS_PLANT_4 // the last row of a tile is never written
      if (place.row + row < item.rows - 1 && column < width)
#else
      if (place.row + row < item.rows && column < width)
#endif
        *(uint4 *)(view.h + ((item.first + place.row + row) * launch.ld_h + column) * 2) = value;
    }
  }
}

// The 4 rows of which this lane stores 4 columns at a time: where, and their routing weights.
struct ms_sm90_slots {
  int32_t slot[4]; // -1: beyond the tile
  float weight[4];
};

__device__ __forceinline__ ms_sm90_slots ms_sm90_slots_of(const ms_sm90_launch &launch, const ms_cuda_view &view,
                                                          const ms_sm90_head &item, const ms_sm90_place &place) {
  ms_sm90_slots slots;
  const int32_t per_rank = (int32_t)(launch.T * launch.K);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int32_t row = place.row + 4 * i + threadIdx.x % 32 / 8;
    slots.slot[i] = row < item.rows ? view.order[item.first + row] : -1;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int32_t slot = max(0, slots.slot[i]), rank = slot / per_rank;
    const float *weights = (const float *)(view.messages + rank * launch.message_bytes + launch.weight_at);
    slots.weight[i] = slots.slot[i] >= 0 ? weights[slot - rank * per_rank] : 0.f;
  }
  return slots;
}

// slot from the sums: 32 columns at a time, as above.
template <typename Storage, int SUMS>
__device__ __forceinline__ void ms_sm90_store_slots(const ms_sm90_launch &launch, const ms_cuda_view &view,
                                                    const ms_sm90_head &item, const ms_sm90_place &place,
                                                    const ms_sm90_slots &slots, const float (&sum)[SUMS]) {
  const int32_t lane = threadIdx.x % 32;
  const float *bias = item.bias;
#pragma unroll
  for (int chunk = 0; chunk < SUMS / 4; chunk += 4) { // groups of 8 columns
    __syncwarp();
#pragma unroll
    for (int g = 0; g < 4; g++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t piece =
            ms_sm90_staged_floats(place.staging, lane / 4 + 8 * half, 2 * g + lane % 4 / 2) + lane % 2 * 8;
        *(float2 *)__cvta_shared_to_generic(piece) =
            make_float2(sum[4 * (chunk + g) + 2 * half], sum[4 * (chunk + g) + 2 * half + 1]);
      }
    __syncwarp();
    int32_t column = place.column + chunk * 8 + lane % 8 * 4, there = launch.D - column;
    float b[4] = {0.f, 0.f, 0.f, 0.f};
    if (bias)
#pragma unroll
      for (int c = 0; c < 4; c++)
        if (c < there) b[c] = __ldg(bias + column + c);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint4 raw = ms_sm90_load_staged(ms_sm90_staged_floats(place.staging, 4 * i + lane / 8, lane % 8));
      float w = slots.weight[i];
      float4 y = make_float4(w * (__uint_as_float(raw.x) + b[0]), w * (__uint_as_float(raw.y) + b[1]),
                             w * (__uint_as_float(raw.z) + b[2]), w * (__uint_as_float(raw.w) + b[3]));
      if (slots.slot[i] < 0) continue;
      int64_t at = (int64_t)slots.slot[i] * launch.D + column;
      if (view.out) {
        const float rounded[4] = {y.x, y.y, y.z, y.w};
        if (there > 0) ms_store_rounded4((Storage *)view.out + at, rounded, there, launch.aligned);
        continue;
      }
      float *to = view.slot + at;
      if (launch.aligned) {
        if (there > 0) *(float4 *)to = y;
      } else
#pragma unroll 1
        for (int c = 0; c < there && c < 4; c++) to[c] = c == 0 ? y.x : c == 1 ? y.y : c == 2 ? y.z : y.w;
    }
  }
}

// The head beside a stage, for all lanes of a warp. The lane that gives the stage back reads it, and tells the others:
// so the read comes before the arrival in that lane's own program, without a __syncwarp between.
__device__ __forceinline__ ms_sm90_head ms_sm90_head_of(uint32_t shared) {
  uint4 words[2] = {};
  if (threadIdx.x % 32 == 0) {
    words[0] = ms_sm90_load_staged(shared);
    words[1] = ms_sm90_load_staged(shared + 16);
  }
  auto told = [](uint32_t x) { return (int32_t)__shfl_sync(~0u, x, 0); };
  ms_sm90_head head;
  head.first = told(words[0].x), head.rows = told(words[0].y);
  head.column = told(words[0].z), head.steps = told(words[0].w);
  head.width = told(words[1].x);
  uint32_t low = (uint32_t)told(words[1].z), high = (uint32_t)told(words[1].w);
  head.bias = (const float *)(uintptr_t)((uint64_t)high << 32 | low);
  return head;
}

template <bool UP, bool GATED, int ROWS, typename Storage>
__device__ __forceinline__ void ms_sm90_multiply(const ms_sm90_launch &launch, const ms_cuda_view &view,
                                                 ms_activation activation, uint32_t shared) {
  using layout = ms_sm90_shared<ROWS>;
  const int32_t group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4; // 0, 1; 0..7
  const bool leader = threadIdx.x % 32 == 0;
  // 128 rows: the groups share B; 64 rows: they share A, and each takes half of the columns.
  const uint32_t a_at = ROWS == 128 ? group * 64 * MS_SM90_ROW : 0;
  const uint32_t b_at = layout::A_BYTES + (ROWS == 128 ? 0 : group * 128 * MS_SM90_ROW);
  const int32_t half = ROWS == 128 ? 0 : group * (GATED ? 64 : 128);
  ms_sm90_place place;
  place.staging = shared + layout::STAGING_AT + warp * MS_SM90_STAGING;
  place.row = (ROWS == 128 ? group * 64 : 0) + warp % 4 * 16;
  ms_sm90_ring<layout::STAGES> ring;
  auto release = [&](uint32_t stage) {
    __syncwarp();
    if (leader) ms_mbarrier_arrive(shared + layout::EMPTY_AT + stage * 8);
  };
  for (;;) {
    ms_mbarrier_wait(shared + layout::FULL_AT + ring.stage * 8, ring.phase);
    const ms_sm90_head item = ms_sm90_head_of(shared + layout::HEAD_AT + ring.stage * 32);
    if (item.steps == 0) break;
    place.column = item.column + half;
    // A group whose rows or columns are all beyond the tile only passes the stages on.
    if (ROWS == 128 ? group * 64 >= item.rows : place.column >= (UP ? item.width : launch.D)) {
      for (int32_t step = 0; step < item.steps; step++, ring.next()) {
        ms_mbarrier_wait(shared + layout::FULL_AT + ring.stage * 8, ring.phase);
        release(ring.stage);
      }
      continue;
    }
    ms_sm90_slots slots;
    if constexpr (!UP) slots = ms_sm90_slots_of(launch, view, item, place);
    float sum[ROWS == 128 ? 128 : 64];
    uint32_t before = 0;
    for (int32_t step = 0; step < item.steps; step++, ring.next()) {
      ms_mbarrier_wait(shared + layout::FULL_AT + ring.stage * 8, ring.phase);
      uint64_t a = ms_wgmma_operand(shared + ring.stage * layout::STAGE + a_at);
      uint64_t b = ms_wgmma_operand(shared + ring.stage * layout::STAGE + b_at);
      ms_wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) ms_wgmma<Storage>(sum, a + 2 * k, b + 2 * k, step + k);
      ms_wgmma_commit();
#ifdef MS_PLANT_3 // the stage is given back while it is read
      release(ring.stage);
      ms_wgmma_wait<1>();
#else
      ms_wgmma_wait<1>();
      if (step > 0) release(before);
#endif
      before = ring.stage;
    }
    ms_wgmma_wait<0>();
#ifndef MS_PLANT_3
    release(before);
#endif
    if constexpr (UP) {
      MS_FOR_ACTIVATION(activation, GATED, (ms_sm90_store_h<Storage, ACT, GATED>(launch, view, item, place, sum)));
    } else
      ms_sm90_store_slots<Storage>(launch, view, item, place, slots, sum);
  }
}

// ---- kernels ---------------------------------------------------------------------------------------------------

template <bool UP, bool GATED, int ROWS, typename Storage>
__global__ void __launch_bounds__(MS_SM90_THREADS, 1)
    ms_ffn_sm90(const __grid_constant__ ms_sm90_launch launch, const __grid_constant__ ms_cuda_view view,
                ms_activation activation) {
  using layout = ms_sm90_shared<ROWS>;
  extern __shared__ char dynamic[];
  const uint32_t shared = (ms_shared_address(dynamic) + 1023) & ~1023u;
  if (threadIdx.x == 0)
    for (int s = 0; s < layout::STAGES; s++) {
      ms_mbarrier_init(shared + layout::FULL_AT + s * 8, 4);
      ms_mbarrier_init(shared + layout::EMPTY_AT + s * 8, 8);
    }
  __syncthreads();
  if (threadIdx.x < 128) {
    ms_registers_give<MS_SM90_COPY_REGISTERS>();
    ms_sm90_copy<UP, GATED, ROWS>(launch, view, shared, *view.tile_count);
  } else {
    ms_registers_take<MS_SM90_MULTIPLY_REGISTERS>();
    ms_sm90_multiply<UP, GATED, ROWS, Storage>(launch, view, activation, shared);
  }
}

#endif
