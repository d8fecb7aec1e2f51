// step3_group.c - group: which rows each expert multiplies.
//
// One stable counting sort of the slots by expert: of all N*K slots, or with a sparse layout of those that this rank
// computes. Tokens stay where they are; ffn reads their rows through `order`. Stable means that each expert meets its
// tokens in token order, on every rank alike.
//
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"
#include "layout.h"

#include <string.h>

// Locals where loops write int64 or int32: the compiler would read the batch's own again after every write.

static ms_status count_all(const ms_batch *b, int64_t *count, ms_error *err) {
  const int32_t *expert = b->all_expert;
  const int32_t E = b->E;
  int64_t slots = b->N * b->K;
  for (int64_t s = 0; s < slots; s++) {
    int32_t e = expert[s];
    if (e < -1 || e >= E)
      return ms_fail(err, MS_ERANGE,
                     "top_k_index of gathered token %lld: got %d, expected -1 to %d",
                     (long long)(s / b->K), e, E - 1);
    if (e >= 0) count[e]++;
  }
  return MS_OK;
}

static void count_own(const ms_batch *b, const ms_layout *l, int64_t *own) {
  for (int64_t s = 0; s < b->N * b->K; s++) {
    int32_t e = b->all_expert[s];
    if (e >= 0 && ms_computes(b, l, l->rank, s, e)) own[e]++;
  }
}

static void place_all(ms_batch *b, int64_t *next) {
  const int32_t *expert = b->all_expert;
  int32_t *order = b->order;
  int64_t slots = b->N * b->K;
  for (int64_t s = 0; s < slots; s++)
    if (expert[s] >= 0) order[next[expert[s]]++] = (int32_t)s;
  b->tokens_read = b->replicated ? 0 : b->N - b->T;
  b->partials_read = (b->R - 1) * b->T;
}

static bool place_token(ms_batch *b, const ms_layout *l, int64_t n, int64_t *next) {
  bool here = false;
  for (int64_t s = n * b->K; s < (n + 1) * b->K; s++) {
    int32_t e = b->all_expert[s];
    if (e < 0 || !ms_computes(b, l, l->rank, s, e)) continue;
    b->order[next[e]++] = (int32_t)s;
    here = true;
  }
  return here;
}

static void place_own(ms_batch *b, const ms_layout *l, int64_t *next) {
  int64_t own = ms_own_first(b);
  b->tokens_read = b->partials_read = 0;
  for (int64_t n = 0; n < b->N; n++)
    b->tokens_read += place_token(b, l, n, next) && (n < own || n >= own + b->T);
  for (int64_t n = own; n < own + b->T; n++) {
    uint64_t ranks[MS_RANK_WORDS];
    ms_token_ranks(b, l, n, ranks);
    ranks[l->rank / 64] &= ~((uint64_t)1 << l->rank % 64);
    for (int32_t i = 0; i < l->words; i++) b->partials_read += __builtin_popcountll(ranks[i]);
  }
}

ms_status ms_group(ms_batch *batch, ms_error *err) {
  struct ms_batch_memory *memory = batch->memory;
  int64_t slots = batch->N * batch->K, E = batch->E, entry = (int64_t)sizeof(int64_t);
  if (slots > INT32_MAX)
    return ms_fail(err, MS_EINVAL, "%lld tokens x %d choices: expected fewer than 2^31",
                   (long long)batch->N, batch->K);
  MS_TRY(ms_layout_fits(batch, err));
  const ms_layout *layout = ms_sparse(batch);
  MS_TRY(ms_buffer_grow(&memory->count, 2 * E * entry, "slots of experts", err));
  MS_TRY(ms_buffer_grow(&memory->offset, (E + 1) * entry, "expert offsets", err));
  MS_TRY(ms_buffer_grow(&memory->order, slots * (int64_t)sizeof(int32_t), "slot order", err));
  int64_t *count = memory->count.data, *next = count + E, *offset = memory->offset.data;
  batch->count = count;
  batch->order = memory->order.data;

  memset(count, 0, (size_t)(2 * E * entry));
  MS_TRY(count_all(batch, count, err));
  if (layout) {
    if (!batch->copy) MS_TRY(ms_layout_deal(batch, err)); // else the gather has
    count_own(batch, layout, next);
  }
  offset[0] = 0;
  for (int64_t e = 0; e < E; e++) {
    offset[e + 1] = offset[e] + (layout ? next : count)[e];
    next[e] = offset[e];
  }
  if (layout)
    place_own(batch, layout, next);
  else
    place_all(batch, next);
  batch->offset = offset;
  return MS_OK;
}
