// step5_combine.c - combine: the K choices of each token, then the partial outputs of all ranks.
//
// Both sums run in a fixed order, choices by number and ranks by number, one addition after the
// other: the bits do not depend on threads, on timing, or on which rank adds. The ranks' sum is in
// fp32 and is rounded once, to out.
//
// With a sparse layout a rank sums only slots that it computed, and of each token only the ranks are added that computed
// something of it: the zeros of the others are neither written nor read.
//
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"
#include "exchange/exchange.h"
#include "layout.h"
#include "kernels/kernels.h"

#include <inttypes.h> // PRIu64
#include <string.h>

// Elements of one unit of work: 64 KiB of fp32, some microseconds.
enum { UNIT = 16384 };

// Elements summed before they are rounded: the sum is still in the L1 cache then.
enum { BLOCK = 1024 };

typedef struct choices_work {
  ms_batch *batch;
  const ms_layout *layout; // NULL: every slot with an expert is computed here
  int64_t tokens;          // of one unit
} choices_work;

static void sum_choices(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  const choices_work *work = context;
  const ms_batch *b = work->batch;
  const ms_kernels *kernels = ms_kernels_get();
  int64_t end = (unit + 1) * work->tokens < b->N ? (unit + 1) * work->tokens : b->N;
  for (int64_t t = unit * work->tokens; t < end; t++) {
    const float *x[MS_MAX_CHOICES];
    int32_t count = 0;
    for (int64_t s = t * b->K; s < (t + 1) * b->K; s++) {
      int32_t e = b->all_expert[s];
      if (e >= 0 && (!work->layout || ms_computes(b, work->layout, b->rank, s, e)))
        x[count++] = b->slot + s * b->D;
    }
    float *total = b->partial + t * b->D;
    if (count == 0) {
      if (!work->layout) memset(total, 0, (size_t)b->D * sizeof *total);
    } else if (x[0] != total || count > 1) { // K = 1: the slot is the row
      kernels->sum(x, count, total, b->D);
    }
  }
}

ms_status ms_combine_choices(ms_batch *batch, ms_threads *threads, ms_error *err) {
  if (batch->R < 1)
    return ms_fail(err, MS_EINVAL, "combine: nothing was gathered since the last route");
  if (batch->N == 0 || batch->D == 0) return MS_OK;
  if (!batch->partial)
    return ms_fail(err, MS_EINVAL, "combine: K = 0 and no out, so there is nothing to sum");
  if (batch->K > 0 && !batch->slot)
    return ms_fail(err, MS_EINVAL, "combine: ffn has not run since the last gather");
  const ms_layout *layout = ms_sparse(batch);
  if (layout && batch->K == 1) return MS_OK;
  int64_t width = batch->D * (batch->K > 1 ? batch->K : 1);
  choices_work work = {batch, layout, UNIT / width > 1 ? UNIT / width : 1};
  ms_threads_run(threads, (batch->N + work.tokens - 1) / work.tokens, sum_choices, &work);
  return MS_OK;
}

typedef struct ranks_work {
  const ms_batch *batch;
  const float *const *parts;
  int32_t R;
  const ms_layout *layout; // NULL: every rank has a row of every token
  const int32_t *places;   // [R][T] the row of a token in a rank's part; NULL: as the tokens
  int64_t tokens;          // of one unit, with a layout
} ranks_work;

// out[at .. at + n) = the sum of `count` rows; n <= BLOCK.
static void sum_block(const ms_batch *b, const float *const *x, int32_t count, int64_t at,
                      int64_t n) {
  const ms_kernels *kernels = ms_kernels_get();
  float block[BLOCK], *sum = b->dtype == MS_F32 ? (float *)b->out + at : block;
  const float *total = sum;
  if (count == 0)
    memset(sum, 0, (size_t)n * sizeof *sum);
  else if (count > 1)
    kernels->sum(x, count, sum, n);
  else if (b->dtype != MS_F32)
    total = x[0];
  else if (x[0] != sum)
    memcpy(sum, x[0], (size_t)n * sizeof *sum);
  if (b->dtype == MS_BF16) kernels->narrow_bf16(total, (uint16_t *)b->out + at, n);
  if (b->dtype == MS_F16) kernels->narrow_f16(total, (uint16_t *)b->out + at, n);
}

static void sum_ranks(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  const ranks_work *work = context;
  const ms_batch *b = work->batch;
  int64_t all = b->T * b->D, end = (unit + 1) * UNIT < all ? (unit + 1) * UNIT : all;
  for (int64_t i = unit * UNIT; i < end; i += BLOCK) {
    const float *x[MS_MAX_RANKS];
    for (int32_t r = 0; r < work->R; r++) x[r] = work->parts[r] + i;
    sum_block(b, x, work->R, i, end - i < BLOCK ? end - i : BLOCK);
  }
}

// The next rank of a set, which it leaves; -1: none is left.
static int32_t next_rank(uint64_t *set, int32_t words) {
  for (int32_t i = 0; i < words; i++)
    if (set[i]) {
      int32_t bit = __builtin_ctzll(set[i]);
      set[i] &= set[i] - 1;
      return 64 * i + bit;
    }
  return -1;
}

static void sum_computing_ranks(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  const ranks_work *work = context;
  const ms_batch *b = work->batch;
  int64_t end = (unit + 1) * work->tokens < b->T ? (unit + 1) * work->tokens : b->T;
  for (int64_t t = unit * work->tokens; t < end; t++) {
    uint64_t ranks[MS_RANK_WORDS];
    const float *x[MS_MAX_RANKS];
    int32_t count = 0;
    ms_token_ranks(b, work->layout, ms_own_first(b) + t, ranks);
    for (int32_t r; (r = next_rank(ranks, work->layout->words)) >= 0;)
      x[count++] = work->parts[r] + (work->places ? work->places[r * b->T + t] : t) * b->D;
    for (int64_t i = 0; i < b->D; i += BLOCK) {
      sum_block(b, x, count, t * b->D + i, b->D - i < BLOCK ? b->D - i : BLOCK);
      for (int32_t j = 0; j < count; j++) x[j] += BLOCK;
    }
  }
}

// Where each token's row is in parts that have only the rows of tokens that their rank computed.
static ms_status find_places(ms_batch *b, const ms_layout *l, ms_error *err) {
  ms_buffer *buffer = &b->memory->places;
  MS_TRY(ms_buffer_grow(buffer, b->R * b->T * (int64_t)sizeof(int32_t), "rows of parts", err));
  int32_t *places = buffer->data, rows[MS_MAX_RANKS] = {0};
  for (int64_t t = 0; t < b->T; t++) {
    uint64_t ranks[MS_RANK_WORDS];
    ms_token_ranks(b, l, ms_own_first(b) + t, ranks);
    for (int32_t r; (r = next_rank(ranks, l->words)) >= 0;)
      places[r * b->T + t] = r == b->rank ? (int32_t)t : rows[r]++;
  }
  return MS_OK;
}

ms_status ms_combine_ranks(ms_batch *batch, const float *const *parts, int32_t R, bool packed,
                           ms_threads *threads, ms_error *err) {
  if (R < 1 || R > MS_MAX_RANKS)
    return ms_fail(err, MS_EINVAL, "combine: got parts of %d ranks, expected 1 to %d", R,
                   MS_MAX_RANKS);
  int64_t all = batch->T * batch->D;
  if (!batch->out || all == 0) return MS_OK;
  const ms_layout *layout = ms_sparse(batch);
  ranks_work work = {.batch = batch, .parts = parts, .R = R, .layout = layout};
  if (!layout) {
    if (R == 1 && parts[0] == batch->out)
      return MS_OK; // one rank's fp32 partial outputs lie in out
    ms_threads_run(threads, (all + UNIT - 1) / UNIT, sum_ranks, &work);
    return MS_OK;
  }
  if (packed) {
    MS_TRY(find_places(batch, layout, err));
    work.places = batch->memory->places.data;
  }
  work.tokens = UNIT / batch->D > 1 ? UNIT / batch->D : 1;
  ms_threads_run(threads, (batch->T + work.tokens - 1) / work.tokens, sum_computing_ranks, &work);
  return MS_OK;
}

ms_status ms_combine(ms_batch *batch, ms_exchange *exchange, ms_threads *threads, ms_error *err) {
  ms_error own;
  if (!err) err = &own;
  if (!exchange->open)
    return ms_fail(err, MS_EINVAL, "combine: no call is open on this exchange, gather first");
  ms_status status = batch->out ? ms_combine_choices(batch, threads, err) : MS_OK;
  if (status != MS_OK) {
    ms_exchange_refuse(exchange, err->msg, NULL); // the other ranks are told why, and do not wait
    return status;
  }
  status = exchange->ops->combine(exchange, batch, threads, err);
  exchange->open = false;
  return status;
}
