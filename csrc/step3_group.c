// step3_group.c - group: which rows each expert multiplies.
//
// One stable counting sort of the N*K slots by expert. Tokens stay where they are; ffn reads their rows through
// `order`. Stable means that each expert meets its tokens in token order, on every rank alike.
//
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"

#include <string.h>

ms_status ms_group(ms_batch *batch, ms_error *err) {
  struct ms_batch_memory *memory = batch->memory;
  int64_t slots = batch->N * batch->K;
  int32_t E = batch->E;
  if (slots > INT32_MAX)
    return ms_fail(err, MS_EINVAL, "%lld tokens x %d choices: expected fewer than 2^31",
                   (long long)batch->N, batch->K);
  // One entry more than the offsets: counts are taken one place up, so that filling `order` leaves the offsets.
  MS_TRY(
      ms_buffer_grow(&memory->offset, (E + 2) * (int64_t)sizeof(int64_t), "expert offsets", err));
  MS_TRY(ms_buffer_grow(&memory->order, slots * (int64_t)sizeof(int32_t), "slot order", err));
  int64_t *offset = memory->offset.data;
  int32_t *order = memory->order.data;
  const int32_t *expert = batch->all_expert;

  memset(offset, 0, (size_t)(E + 2) * sizeof *offset);
  for (int64_t s = 0; s < slots; s++) {
    if (expert[s] < -1 || expert[s] >= E)
      return ms_fail(err, MS_ERANGE,
                     "top_k_index of gathered token %lld: got %d, expected -1 to %d",
                     (long long)(s / batch->K), expert[s], E - 1);
    if (expert[s] >= 0) offset[expert[s] + 2]++;
  }
  for (int32_t e = 1; e <= E; e++) offset[e + 1] += offset[e];
  for (int64_t s = 0; s < slots; s++)
    if (expert[s] >= 0) order[offset[expert[s] + 1]++] = (int32_t)s;
  batch->offset = offset;
  batch->order = order;
  return MS_OK;
}
