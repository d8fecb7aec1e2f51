// shape.c - what launches and memory depend on: no number here depends on the routing.
//
// Plain C, no CUDA header: tests run it on any machine.
//
// SPDX-License-Identifier: Apache-2.0
#include "moeshard_cuda.h"


static const int64_t REACH = INT64_C(64) << 30; // bytes: kernels keep offsets of rows in 32 bits, 16 bytes each

enum {
  ALIGN = 256, // of every piece of memory: what cudaMalloc gives
  PIECE = 16,  // bytes of the widest copy: rows start at multiples of it
  // group
  WARPS = 32,
  SMALL_SLOTS = 8192,      // one block sorts up to so many
  SMALL_BYTES = 96 << 10,  // in so much shared memory, which every device has
  CHUNK_STEP = 1024,       // else chunks are multiples of it,
  CHUNK_SLOTS = 32768,     // at most so long: their counters have 16 bits
  MOST_COUNTERS = 1 << 16, // no more of them than this for all experts, or than blocks, unless they were too long then
  BLOCK_EXPERTS = 1024     // whose counters a block adds up in one round
};

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

static int64_t place(int64_t *at, int64_t bytes) {
  int64_t here = *at;
  *at += round_up(bytes, ALIGN);
  return here;
}

// Tiles as tall as an expert's share when routing is uniform: small ones stream weights, tall ones feed tensor cores.
static int32_t choose_tile_rows(int64_t slots, int32_t E) {
  int64_t rows = slots / E;
  return rows <= 24 ? 16 : rows <= 96 ? 64 : 128;
}

// Chunks that are sorted side by side, 0: one block sorts all. Balances the blocks' rounds (1024 slots, 2 us) with the
// counters, E * chunks, that they write and add up. (Measured on an H200, when one block added up all: 15000 a us.)
static int32_t choose_chunks(int64_t slots, int32_t E, int32_t most_blocks) {
  int64_t warps = slots < WARPS * WARPS ? (slots + WARPS - 1) / WARPS : WARPS;
  if (slots <= SMALL_SLOTS && E * (8 + 2 * warps) <= SMALL_BYTES - 64) return 0;
  int64_t most = MOST_COUNTERS / E < most_blocks ? MOST_COUNTERS / E : most_blocks; // E <= MS_MAX_EXPERTS: not 0
  int64_t chunks = (slots + CHUNK_STEP - 1) / CHUNK_STEP, least = (slots + CHUNK_SLOTS - 1) / CHUNK_SLOTS;
  if (chunks > most) chunks = most;
  return (int32_t)(chunks > least ? chunks : least);
}

// How many blocks sort: one for each chunk and each round of counters. They wait for each other, so all must run at
// once: one fits on every multiprocessor.
static int32_t choose_blocks(int32_t chunks, int32_t E, int32_t most_blocks) {
  int32_t blocks = (E + BLOCK_EXPERTS - 1) / BLOCK_EXPERTS;
  if (blocks < chunks) blocks = chunks;
  return blocks < most_blocks ? blocks : most_blocks;
}

ms_status ms_cuda_shape_plan(ms_cuda_shape *s, ms_error *err) {
  if (s->T < 0 || s->D < 1 || s->F < 0 || s->K < 0 || s->K > MS_MAX_CHOICES || s->E < 1 || s->E > MS_MAX_EXPERTS ||
      s->R < 1 || s->R > MS_MAX_RANKS || s->rank < 0 || s->rank >= s->R || s->sms < 1)
    return ms_fail(err, MS_EINVAL, "cuda shape: T=%lld D=%lld F=%lld K=%d E=%d rank %d of %d, %d multiprocessors",
                   (long long)s->T, (long long)s->D, (long long)s->F, s->K, s->E, s->rank, s->R, s->sms);
  if (s->T > INT32_MAX)
    return ms_fail(err, MS_ESHAPE, "%lld tokens: expected fewer than 2^31", (long long)s->T);
  int64_t size = ms_dtype_size(s->dtype);
  s->N = s->replicated ? s->T : s->R * s->T;
  s->slots = s->N * s->K;
  if (s->slots > INT32_MAX - 2 * CHUNK_SLOTS) // kernels round up
    return ms_fail(err, MS_ESHAPE, "%lld tokens x %d choices: expected fewer than 2^31", (long long)s->N, s->K);
  s->ld_x = round_up(s->D, PIECE / size);
  s->ld_h = round_up(s->F, PIECE / size);
  bool travels = s->R > 1 && !s->replicated;
  if (travels || s->ld_x != s->D) s->in_place = false;
  s->tile_rows = choose_tile_rows(s->slots, s->E);
  if (s->math == MS_CUDA_WGMMA && s->tile_rows < 64) s->math = MS_CUDA_MMA; // fewer rows than one wgmma has
  s->max_tiles = (int32_t)(s->slots / s->tile_rows + (s->slots < s->E ? s->slots : s->E));
  int32_t most_blocks = s->sms < MS_CUDA_SORT_BLOCKS ? s->sms : MS_CUDA_SORT_BLOCKS;
  s->sort_chunks = choose_chunks(s->slots, s->E, most_blocks);
  s->sort_blocks = s->sort_chunks ? choose_blocks(s->sort_chunks, s->E, most_blocks) : 1;

  int64_t at = 0;
  for (int32_t r = 0; r < (s->replicated ? s->R : 1); r++) place(&at, (int64_t)sizeof(ms_cuda_header));
  s->expert_at = place(&at, s->T * s->K * 4);
  s->weight_at = place(&at, s->T * s->K * 4);
  s->hidden_at = place(&at, s->in_place ? 0 : s->T * s->ld_x * size);
  int64_t messages = travels ? s->R * at : at, hidden = s->in_place ? s->T * s->ld_x * size : messages;
  s->message_bytes = s->replicated ? round_up((int64_t)sizeof(ms_cuda_header), ALIGN) : at;
  if (hidden > REACH || s->slots * s->ld_h * size > REACH)
    return ms_fail(err, MS_ESHAPE,
                   "%lld tokens: %lld bytes of hidden states and %lld between the two matrices, expected at most %lld "
                   "of each: call the layer with fewer tokens at a time",
                   (long long)s->N, (long long)hidden, (long long)(s->slots * s->ld_h * size), (long long)REACH);

  at = 0;
  place(&at, 4 * MS_CUDA_TICKETS); // at the same place for every shape: they stay zero
  s->messages_at = place(&at, messages);
  // fault and digest of each block of gather; or tiles, rows, sums of shares, counters and ranks of the sort by many
  // blocks
  int64_t route = 4 * MS_CUDA_ROUTE_BLOCKS;
  int64_t sort = 2 * (int64_t)s->E + 2 * s->sort_blocks + s->sort_chunks * (int64_t)s->E + (s->slots + 1) / 2;
  s->counts_at = place(&at, 4 * (s->sort_chunks && sort > route ? sort : route));
  s->offset_at = place(&at, 4 * ((int64_t)s->E + 1));
  s->order_at = place(&at, 4 * s->slots);
  s->tiles_at = place(&at, 4 + (int64_t)sizeof(ms_cuda_tile) * s->max_tiles);
  s->h_at = place(&at, s->slots * s->ld_h * size);
  s->slot_at = place(&at, s->slots * s->D * 4);
  s->partial_at = s->K == 1 || s->R == 1 ? s->slot_at : place(&at, s->N * s->D * 4);
  s->workspace_bytes = at;
  return MS_OK;
}

ms_cuda_view ms_cuda_view_of(const ms_cuda_shape *s, const ms_cuda_experts *experts, void *workspace,
                             const void *hidden_in_place, ms_cuda_faults *faults) {
  char *base = workspace;
  const char *messages = base + s->messages_at;
  return (ms_cuda_view){
      .hidden = s->in_place ? hidden_in_place : messages + s->hidden_at,
      .messages = messages,
      .hidden_stride = s->message_bytes,
      .tickets = (int32_t *)base,
      .counts = (int32_t *)(base + s->counts_at),
      .offset = (int32_t *)(base + s->offset_at),
      .order = (int32_t *)(base + s->order_at),
      .tiles = (ms_cuda_tile *)(base + s->tiles_at + 4),
      .tile_count = (int32_t *)(base + s->tiles_at),
      .seen = experts->seen,
      .experts = experts->device_table,
      .h = base + s->h_at,
      .slot = (float *)(base + s->slot_at),
      .partial = (float *)(base + s->partial_at),
      .faults = faults,
  };
}
