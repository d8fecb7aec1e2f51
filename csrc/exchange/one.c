// one.c - the exchange of one rank: nothing travels, nothing is copied.
// SPDX-License-Identifier: Apache-2.0
#include "exchange.h"

#include <stdlib.h>

static ms_status one_gather(ms_exchange *x, ms_batch *batch, ms_error *err) {
  MS_TRY(ms_gather_begin(batch, x->rank, x->R, &batch->T, false, err));
  ms_gather_rows(batch, 0, batch->hidden);
  batch->all_expert = batch->expert;
  batch->all_weight = batch->weight;
  // The fp32 partial outputs of one rank are the output: they are written where the caller wants
  // them.
  if (!batch->out || batch->dtype != MS_F32) return ms_gather_partial(batch, err);
  batch->partial = batch->out;
  return MS_OK;
}

static ms_status one_combine(ms_exchange *x, ms_batch *batch, ms_threads *threads, ms_error *err) {
  const float *part = batch->partial;
  return ms_combine_ranks(batch, &part, x->R, false, threads, err);
}

static ms_status one_refuse(ms_exchange *x, const char *msg, ms_error *err) {
  (void)x, (void)msg, (void)err; // nobody is there to be told
  return MS_OK;
}

static void one_free(ms_exchange *x) { free(x); }

static const ms_exchange_ops one_ops = {"one", one_gather, one_combine, one_refuse, one_free};

ms_status ms_exchange_one(ms_exchange **out, ms_error *err) {
  *out = malloc(sizeof **out);
  if (!*out) return ms_fail(err, MS_ENOMEM, "no memory for an exchange");
  **out = (ms_exchange){.ops = &one_ops, .rank = 0, .R = 1};
  return MS_OK;
}
