// exchange.h - what every transport fills in. A new transport is one file with these functions.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_EXCHANGE_H
#define MS_EXCHANGE_H

#include "../moeshard.h"

// A call is a gather and its combine. A transport that fails inside one tells its peers by itself
// (as refuse does), so that they leave the call too; its caller does not refuse again.
typedef struct ms_exchange_ops {
  const char *name;
  // Fill the gather part of batch: R, rank, N, first, row, all_expert, all_weight, partial.
  ms_status (*gather)(ms_exchange *x, ms_batch *batch, ms_error *err);
  // out[t] = sum over ranks of their partial rows, in rank order. Closes the call, which is all
  // that it does when batch->out is NULL.
  ms_status (*combine)(ms_exchange *x, ms_batch *batch, ms_threads *threads, ms_error *err);
  // In place of the combine when x->open, else of the gather.
  ms_status (*refuse)(ms_exchange *x, const char *msg, ms_error *err);
  void (*free)(ms_exchange *x);
} ms_exchange_ops;

struct ms_exchange { // the first member of every transport's own struct
  const ms_exchange_ops *ops;
  int32_t rank, R;
  uint64_t call; // calls begun so far: the number of the present or last one, from 1
  bool open;     // gathered and not yet combined
};

// For transports, in this order (step2_gather.c). When one fails, ms_gather leaves batch not
// gathered: R = N = 0.
//
// Room for the gather part of batch; sets R, rank, N and first. Cost: O(R). Errors: MS_ENOMEM.
//   tokens  [R] of each rank; not read when batch->replicated: then N = T, first = {0, T, T, ...}
//   copied  all_expert and all_weight get memory of the batch; otherwise the transport sets them
ms_status ms_gather_begin(ms_batch *batch, int32_t rank, int32_t R, const int64_t *tokens,
                          bool copied, ms_error *err);
// row[] for the tokens of rank r, which lie in data [tokens of r, D]. Replicated: all are rank 0's.
void ms_gather_rows(ms_batch *batch, int32_t r, const void *data);
// Bytes of batch->partial; 0 when nothing will be written there (K = 0 and no out).
int64_t ms_gather_partial_bytes(const ms_batch *batch);
// partial in memory of the batch. Errors: MS_ENOMEM.
ms_status ms_gather_partial(ms_batch *batch, ms_error *err);

// "rank 2" or "ranks 0, 2": the ranks that are set in `in` [R], at most 8 of them by number.
enum { MS_RANK_LIST = 128 };
void ms_rank_list(const bool *in, int32_t R, char text[MS_RANK_LIST]);

#endif
