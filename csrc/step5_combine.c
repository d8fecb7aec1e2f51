// step5_combine.c - combine: the K choices of each token, then the partial outputs of all ranks.
//
// Both sums run in a fixed order, choices by number and ranks by number, one addition after the
// other: the bits do not depend on threads, on timing, or on which rank adds. The ranks' sum is in
// fp32 and is rounded once, to out.
//
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"
#include "exchange/exchange.h"
#include "kernels/kernels.h"

#include <inttypes.h> // PRIu64
#include <string.h>

// Elements of one unit of work: 64 KiB of fp32, some microseconds.
enum { UNIT = 16384 };

typedef struct choices_work {
  ms_batch *batch;
  int64_t tokens; // of one unit
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
    for (int64_t s = t * b->K; s < (t + 1) * b->K; s++)
      if (b->all_expert[s] >= 0) x[count++] = b->slot + s * b->D;
    float *total = b->partial + t * b->D;
    if (count == 0)
      memset(total, 0, (size_t)b->D * sizeof *total);
    else if (x[0] != total || count > 1) // K = 1: the slot is the row
      kernels->sum(x, count, total, b->D);
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
  int64_t width = batch->D * (batch->K > 1 ? batch->K : 1);
  choices_work work = {batch, UNIT / width > 1 ? UNIT / width : 1};
  ms_threads_run(threads, (batch->N + work.tokens - 1) / work.tokens, sum_choices, &work);
  return MS_OK;
}

typedef struct ranks_work {
  const ms_batch *batch;
  const float *const *parts;
  int32_t R;
} ranks_work;

// Cut once more, so that a 16-bit result is rounded from a sum that is still in the L1 cache.
static void sum_ranks(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  enum { BLOCK = 1024 };
  const ranks_work *work = context;
  const ms_batch *b = work->batch;
  const ms_kernels *kernels = ms_kernels_get();
  int64_t all = b->T * b->D, end = (unit + 1) * UNIT < all ? (unit + 1) * UNIT : all;
  for (int64_t i = unit * UNIT; i < end; i += BLOCK) {
    int64_t n = end - i < BLOCK ? end - i : BLOCK;
    const float *x[MS_MAX_RANKS];
    for (int32_t r = 0; r < work->R; r++) x[r] = work->parts[r] + i;
    float block[BLOCK];
    const float *total = x[0];
    if (b->dtype == MS_F32) {
      kernels->sum(x, work->R, (float *)b->out + i, n);
      continue;
    }
    if (work->R > 1) {
      kernels->sum(x, work->R, block, n);
      total = block;
    }
    uint16_t *out = (uint16_t *)b->out + i;
    if (b->dtype == MS_BF16)
      kernels->narrow_bf16(total, out, n);
    else
      kernels->narrow_f16(total, out, n);
  }
}

ms_status ms_combine_ranks(ms_batch *batch, const float *const *parts, int32_t R,
                           ms_threads *threads, ms_error *err) {
  if (R < 1 || R > MS_MAX_RANKS)
    return ms_fail(err, MS_EINVAL, "combine: got parts of %d ranks, expected 1 to %d", R,
                   MS_MAX_RANKS);
  int64_t all = batch->T * batch->D;
  if (!batch->out || all == 0) return MS_OK;
  if (R == 1 && parts[0] == batch->out) return MS_OK; // one rank's fp32 partial outputs lie in out
  ranks_work work = {batch, parts, R};
  ms_threads_run(threads, (all + UNIT - 1) / UNIT, sum_ranks, &work);
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
