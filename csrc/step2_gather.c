// step2_gather.c - gather: every rank's tokens and choices, as rows that any rank can read.
//
// Index and weight travel with the tokens, so each rank counts them itself and no second round is
// needed. Before anything is used, all ranks compare the headers of all ranks: those that disagree
// all fail with the same text.
//
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"
#include "exchange/exchange.h"
#include "layout.h"

#include <inttypes.h> // PRId64
#include <stdio.h>
#include <string.h>

// ---- the header ---------------------------------------------------------------------------------

// Each step is a bijection of the sum for a given slot and of the slot for a given sum: routings
// that differ in one slot never collide, others with probability 2^-64. Weights of slots without an
// expert count for nothing.
static uint64_t digest_routing(const ms_batch *batch) {
  uint64_t sum = 0x9e3779b97f4a7c15u;
  for (int64_t s = 0; s < batch->T * batch->K; s++) {
    uint32_t bits = 0;
    if (batch->expert[s] >= 0) memcpy(&bits, &batch->weight[s], sizeof bits);
    sum = (sum ^ ((uint64_t)(uint32_t)batch->expert[s] << 32 | bits)) * 0xff51afd7ed558ccdu;
    sum ^= sum >> 32;
  }
  return sum;
}

void ms_header_fill(const ms_batch *batch, uint64_t call, ms_header *out) {
  *out = (ms_header){.call = call,
                     .layer = batch->layer,
                     .T = batch->T,
                     .D = batch->D,
                     .K = batch->K,
                     .E = batch->E,
                     .dtype = (int32_t)batch->dtype,
                     .replicated = batch->replicated,
                     .digest = batch->replicated ? digest_routing(batch) : 0,
                     .layout = batch->layout ? batch->layout->digest : 0};
}

// In the order in which a difference explains the ones after it.
typedef enum field {
  CALL,
  LAYER,
  REPLICATED,
  DTYPE,
  WIDTH,
  EXPERTS,
  LAYOUT,
  CHOICES,
  TOKENS,
  DIGEST,
  FIELDS
} field;

static const char *const field_names[FIELDS] = {
    "the number of the call",
    "the layer",
    "replicated",
    "the dtype",
    "the model width D",
    "the number of experts E",
    "the plan, which rank holds which columns (its digest)",
    "the choices per token K",
    "the number of replicated tokens T",
    "the routing of the replicated tokens (its digest)",
};

static int64_t field_value(const ms_header *h, field f) {
  switch (f) {
  case CALL:
    return (int64_t)h->call;
  case LAYER:
    return h->layer;
  case REPLICATED:
    return h->replicated;
  case DTYPE:
    return h->dtype;
  case WIDTH:
    return h->D;
  case EXPERTS:
    return h->E;
  case LAYOUT:
    return (int64_t)h->layout;
  case CHOICES:
    return h->K;
  case TOKENS:
    return h->replicated ? h->T : 0; // free to differ otherwise
  case DIGEST:
    return h->replicated ? (int64_t)h->digest : 0;
  case FIELDS:
    break;
  }
  return 0;
}

enum { VALUE_TEXT = 32 };

static void field_text(const ms_header *h, field f, char text[VALUE_TEXT]) {
  int64_t value = field_value(h, f);
  if (f == DTYPE)
    snprintf(text, VALUE_TEXT, "%s", ms_dtype_name((ms_dtype)value));
  else if (f == REPLICATED)
    snprintf(text, VALUE_TEXT, "%s", value ? "true" : "false");
  else if (f == DIGEST || f == LAYOUT)
    snprintf(text, VALUE_TEXT, "%016" PRIx64, (uint64_t)value);
  else
    snprintf(text, VALUE_TEXT, "%" PRId64, value);
}

// The ranks with rank 0's value against those with the first other value.
static ms_status disagree(const ms_header *headers, int32_t R, field f, int32_t other,
                          ms_error *err) {
  bool in[2][MS_MAX_RANKS];
  char value[2][VALUE_TEXT], ranks[2][MS_RANK_LIST];
  const int32_t model[2] = {0, other};
  for (int side = 0; side < 2; side++) {
    for (int32_t r = 0; r < R; r++)
      in[side][r] = field_value(&headers[r], f) == field_value(&headers[model[side]], f);
    field_text(&headers[model[side]], f, value[side]);
    ms_rank_list(in[side], R, ranks[side]);
  }
  return ms_fail(err, MS_EMISMATCH,
                 "ranks disagree in call %" PRIu64 ": %s is %s on %s but %s on %s", headers[0].call,
                 field_names[f], value[0], ranks[0], value[1], ranks[1]);
}

ms_status ms_header_check(const ms_header *headers, int32_t R, ms_error *err) {
  if (R < 1 || R > MS_MAX_RANKS)
    return ms_fail(err, MS_EINVAL, "header check: got %d ranks, expected 1 to %d", R, MS_MAX_RANKS);
  for (field f = 0; f < FIELDS; f++)
    for (int32_t r = 1; r < R; r++)
      if (field_value(&headers[r], f) != field_value(&headers[0], f))
        return disagree(headers, R, f, r, err);
  return MS_OK;
}

// ---- what transports fill in a batch with -------------------------------------------------------

ms_status ms_gather_begin(ms_batch *batch, int32_t rank, int32_t R, const int64_t *tokens,
                          bool copied, ms_error *err) {
  struct ms_batch_memory *memory = batch->memory;
  MS_TRY(ms_buffer_grow(&memory->first, (R + 1) * (int64_t)sizeof(int64_t), "row ranges", err));
  int64_t *first = memory->first.data;
  first[0] = 0;
  for (int32_t r = 0; r < R; r++)
    first[r + 1] = first[r] + (!batch->replicated ? tokens[r] : r == 0 ? batch->T : 0);
  int64_t N = first[R], slots = N * batch->K;
  MS_TRY(ms_buffer_grow(&memory->row, N * (int64_t)sizeof(void *), "row pointers", err));
  if (copied) {
    MS_TRY(ms_buffer_grow(&memory->all_expert, slots * (int64_t)sizeof(int32_t), "gathered index",
                          err));
    MS_TRY(ms_buffer_grow(&memory->all_weight, slots * (int64_t)sizeof(float), "gathered weights",
                          err));
    batch->all_expert = memory->all_expert.data;
    batch->all_weight = memory->all_weight.data;
  }
  batch->rank = rank;
  batch->R = R;
  batch->N = N;
  batch->first = first;
  batch->row = memory->row.data;
  return MS_OK;
}

void ms_gather_rows(ms_batch *batch, int32_t r, const void *data) {
  int64_t stride = batch->D * ms_dtype_size(batch->dtype);
  const char *row = data;
  for (int64_t i = batch->first[r]; i < batch->first[r + 1]; i++, row += stride)
    batch->row[i] = row;
}

int64_t ms_gather_partial_bytes(const ms_batch *batch) {
  return batch->K > 0 || batch->out ? batch->N * batch->D * (int64_t)sizeof(float) : 0;
}

ms_status ms_gather_partial(ms_batch *batch, ms_error *err) {
  ms_buffer *partial = &batch->memory->partial;
  MS_TRY(ms_buffer_grow(partial, ms_gather_partial_bytes(batch), "partial outputs", err));
  batch->partial = partial->data;
  return MS_OK;
}

// Forget an earlier gather: what later steps find is either all of one gather or nothing.
static void ungather(ms_batch *batch) {
  batch->R = 0;
  batch->N = 0;
  batch->partial = NULL;
  batch->copy = NULL;
  batch->slot = NULL;
}

// ---- the step -----------------------------------------------------------------------------------

ms_status ms_gather(ms_batch *batch, ms_exchange *exchange, ms_error *err) {
  if (exchange->open)
    return ms_fail(err, MS_EINVAL,
                   "gather: call %" PRIu64 " is still open, combine (or refuse) it first",
                   exchange->call);
  ungather(batch);
  exchange->call++;
  ms_status status = exchange->ops->gather(exchange, batch, err);
  if (status != MS_OK) ungather(batch);
  exchange->open = status == MS_OK;
  return status;
}

// The routing of all ranks in memory of the caller, which is never written: the members are shared with gathers that own it.
static ms_status begin_from(ms_batch *batch, int32_t rank, int32_t R, const int64_t *tokens,
                            const int32_t *index, const float *weight, ms_error *err) {
  if (R < 1 || R > MS_MAX_RANKS || rank < 0 || rank >= R)
    return ms_fail(err, MS_EINVAL, "gather: got rank %d of %d, expected 0 <= rank < ranks <= %d",
                   rank, R, MS_MAX_RANKS);
  for (int32_t r = 0; r < R; r++)
    if (tokens[r] < 0)
      return ms_fail(err, MS_EINVAL, "gather: rank %d has %" PRId64 " tokens", r, tokens[r]);
  if (tokens[rank] != batch->T)
    return ms_fail(err, MS_EINVAL,
                   "gather: rank %d routed %" PRId64 " tokens, but tokens[%d] is %" PRId64, rank,
                   batch->T, rank, tokens[rank]);
  ungather(batch);
  MS_TRY(ms_gather_begin(batch, rank, R, tokens, false, err));
  MS_TRY(ms_gather_partial(batch, err));
  batch->all_expert = (int32_t *)(uintptr_t)index;
  batch->all_weight = (float *)(uintptr_t)weight;
  MS_TRY(ms_layout_fits(batch, err));
  return ms_layout_deal(batch, err);
}

ms_status ms_gather_from(ms_batch *batch, int32_t rank, int32_t R, const int64_t *tokens,
                         const void *hidden, const int32_t *index, const float *weight,
                         ms_error *err) {
  ms_status status = begin_from(batch, rank, R, tokens, index, weight, err);
  if (status != MS_OK) {
    ungather(batch);
    return status;
  }
  for (int32_t r = 0; r < R; r++) {
    int64_t bytes = batch->first[r] * batch->D * ms_dtype_size(batch->dtype);
    ms_gather_rows(batch, r, (const char *)hidden + bytes);
  }
  return MS_OK;
}

ms_status ms_gather_routing(ms_batch *batch, int32_t rank, int32_t R, const int64_t *tokens,
                            const int32_t *index, const float *weight, ms_error *err) {
  ms_status status = begin_from(batch, rank, R, tokens, index, weight, err);
  if (status != MS_OK) ungather(batch);
  return status;
}

static bool needs(const ms_batch *b, const ms_layout *l, int32_t reader, int64_t n) {
  for (int64_t s = n * b->K; s < (n + 1) * b->K; s++) {
    int32_t e = b->all_expert[s];
    if (e >= 0 && e < l->E && ms_computes(b, l, reader, s, e)) return true;
  }
  return false;
}

int64_t ms_gather_needed(const ms_batch *batch, int32_t source, int32_t reader, int32_t *token) {
  const ms_layout *l = ms_sparse(batch);
  int64_t first = batch->replicated ? 0 : batch->first[source];
  int64_t end = batch->replicated ? batch->N : batch->first[source + 1], count = 0;
  for (int64_t n = first; n < end; n++) {
    if (l && !needs(batch, l, reader, n)) continue;
    if (token) token[count] = (int32_t)(n - first);
    count++;
  }
  return count;
}

void ms_gather_received(ms_batch *batch, const void *hidden) {
  const ms_layout *l = ms_sparse(batch);
  int64_t stride = batch->D * ms_dtype_size(batch->dtype);
  const char *row = hidden;
  for (int32_t r = 0; r < batch->R; r++) {
    if (r == batch->rank || batch->replicated) continue;
    for (int64_t n = batch->first[r]; n < batch->first[r + 1]; n++) {
      bool here = !l || needs(batch, l, batch->rank, n);
      batch->row[n] = here ? row : NULL;
      if (here) row += stride;
    }
  }
  ms_gather_rows(batch, batch->replicated ? 0 : batch->rank, batch->hidden);
}
