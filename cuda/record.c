// record.c - events at the beginning of every step, and what the experts had seen before and after, for each call.
// SPDX-License-Identifier: Apache-2.0
#include "record.h"
#include "status.h"

#include <math.h> // NAN
#include <stdlib.h>

enum { BLOCK_BYTES = 1 << 20 };

typedef struct mark {
  cudaEvent_t event;
  ms_cuda_step step; // that begins
} mark;

typedef struct record {
  int64_t layer, tokens;
  int32_t K, E;
  ms_dtype dtype;
  cudaEvent_t block; // NULL: nobody said when the model's router began
  mark *marks;       // the last one is the end
  int32_t marked;
  int64_t *before, *after; // [E+1] pinned: seen slots; after the call is over, `after` less `before` is the call's
} record;

typedef struct pinned { // memory that the device copies to
  struct pinned *next;
  char *data;
  size_t used, bytes;
} pinned;

struct ms_cuda_recorder {
  int32_t most_marks;
  cudaEvent_t base, block; // block: of the call to come
  record *records;
  int64_t count, room;
  bool open; // the last record is a call that has not ended
  pinned *memory;
};

static record *last(const ms_cuda_recorder *r) { return &r->records[r->count - 1]; }

static ms_status event_now(cudaStream_t stream, cudaEvent_t *event, ms_error *err) {
  MS_CUDA(cudaEventCreate(event), err);
  MS_CUDA(cudaEventRecord(*event, stream), err);
  return MS_OK;
}

static ms_status take(ms_cuda_recorder *r, size_t bytes, int64_t **out, ms_error *err) {
  if (!r->memory || r->memory->bytes - r->memory->used < bytes) {
    pinned *more = calloc(1, sizeof *more);
    if (!more) return ms_fail(err, MS_ENOMEM, "no memory to record a call");
    more->next = r->memory;
    r->memory = more;
    more->bytes = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES;
    cudaError_t error = cudaMallocHost((void **)&more->data, more->bytes);
    if (error != cudaSuccess) {
      more->bytes = 0;
      return ms_cuda_status(error, "cudaMallocHost", err);
    }
  }
  *out = (int64_t *)(void *)(r->memory->data + r->memory->used);
  r->memory->used += bytes;
  return MS_OK;
}

static ms_status copy_seen(const ms_cuda_experts *experts, int64_t *to, cudaStream_t stream, ms_error *err) {
  size_t bytes = ((size_t)experts->spec.E + 1) * sizeof *to;
  MS_CUDA(cudaMemcpyAsync(to, experts->seen, bytes, cudaMemcpyDeviceToHost, stream), err);
  return MS_OK;
}

ms_status ms_cuda_recorder_create(int32_t marks, ms_cuda_recorder **out, ms_error *err) {
  *out = NULL;
  ms_cuda_recorder *r = calloc(1, sizeof *r);
  if (!r) return ms_fail(err, MS_ENOMEM, "no memory for a recorder");
  r->most_marks = marks;
  ms_status status = ms_cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize", err);
  if (status == MS_OK) status = event_now(NULL, &r->base, err);
  if (status == MS_OK) status = ms_cuda_status(cudaEventSynchronize(r->base), "cudaEventSynchronize", err);
  if (status == MS_OK)
    *out = r;
  else
    ms_cuda_recorder_free(r);
  return status;
}

void ms_cuda_recorder_free(ms_cuda_recorder *r) {
  if (!r) return;
  cudaDeviceSynchronize(); // copies to `memory` may be under way
  for (int64_t i = 0; i < r->count; i++) {
    for (int32_t m = 0; m < r->records[i].marked; m++) cudaEventDestroy(r->records[i].marks[m].event);
    if (r->records[i].block) cudaEventDestroy(r->records[i].block);
    free(r->records[i].marks);
  }
  free(r->records);
  if (r->base) cudaEventDestroy(r->base);
  if (r->block) cudaEventDestroy(r->block);
  while (r->memory) {
    pinned *next = r->memory->next;
    cudaFreeHost(r->memory->data);
    free(r->memory);
    r->memory = next;
  }
  free(r);
}

ms_status ms_cuda_recorder_stamp(ms_cuda_recorder *r, cudaStream_t stream, ms_error *err) {
  if (!r->block) return event_now(stream, &r->block, err);
  MS_CUDA(cudaEventRecord(r->block, stream), err);
  return MS_OK;
}

static ms_status grow(ms_cuda_recorder *r, ms_error *err) {
  if (r->count < r->room) return MS_OK;
  int64_t room = r->room ? 2 * r->room : 64;
  record *records = realloc(r->records, (size_t)room * sizeof *records);
  if (!records) return ms_fail(err, MS_ENOMEM, "no memory to record call %lld", (long long)r->count);
  r->records = records;
  r->room = room;
  return MS_OK;
}

ms_status ms_cuda_recorder_begin(ms_cuda_recorder *r, const ms_cuda_experts *experts, const ms_cuda_call *call,
                                 cudaStream_t stream, ms_error *err) {
  MS_TRY(grow(r, err));
  record *now = &r->records[r->count];
  *now =
      (record){.layer = call->layer, .tokens = call->tokens, .K = call->K, .E = experts->spec.E, .dtype = call->dtype};
  now->marks = calloc((size_t)r->most_marks, sizeof *now->marks);
  if (!now->marks) return ms_fail(err, MS_ENOMEM, "no memory to record a call");
  r->count++;
  r->open = true;
  now->block = r->block;
  r->block = NULL;
  size_t bytes = ((size_t)now->E + 1) * sizeof *now->before;
  MS_TRY(take(r, bytes, &now->before, err));
  MS_TRY(take(r, bytes, &now->after, err));
  return copy_seen(experts, now->before, stream, err);
}

ms_status ms_cuda_recorder_mark(ms_cuda_recorder *r, ms_cuda_step step, cudaStream_t stream, ms_error *err) {
  record *now = last(r);
  if (now->marked == r->most_marks) return ms_fail(err, MS_EINVAL, "recorder: more than %d marks", r->most_marks);
  mark *m = &now->marks[now->marked];
  m->step = step;
  MS_CUDA(cudaEventCreate(&m->event), err);
  now->marked++;
  MS_CUDA(cudaEventRecord(m->event, stream), err);
  return MS_OK;
}

ms_status ms_cuda_recorder_end(ms_cuda_recorder *r, const ms_cuda_experts *experts, cudaStream_t stream,
                               ms_error *err) {
  MS_TRY(ms_cuda_recorder_mark(r, MS_CUDA_STEPS, stream, err));
  MS_TRY(copy_seen(experts, last(r)->after, stream, err));
  r->open = false;
  return MS_OK;
}

int64_t ms_cuda_recorder_count(const ms_cuda_recorder *r) { return r->count - r->open; } // the last may have failed

static ms_status between(cudaEvent_t from, cudaEvent_t to, double *nanoseconds, ms_error *err) {
  float ms = 0;
  MS_CUDA(cudaEventElapsedTime(&ms, from, to), err);
  *nanoseconds = 1e6 * (double)ms;
  return MS_OK;
}

ms_status ms_cuda_recorder_at(const ms_cuda_recorder *r, int64_t i, ms_cuda_times *out, ms_error *err) {
  const record *call = &r->records[i];
  *out = (ms_cuda_times){.layer = call->layer, .tokens = call->tokens, .K = call->K, .E = call->E, .dtype = call->dtype,
                         .block = NAN, .before = call->before, .after = call->after};
  MS_TRY(between(r->base, call->marks[0].event, &out->begin, err));
  if (call->block) {
    double router = 0; // short times of float milliseconds are exact enough, those since `base` need not be
    MS_TRY(between(call->block, call->marks[0].event, &router, err));
    out->block = out->begin - router;
  }
  for (int32_t m = 0; m + 1 < call->marked; m++) {
    double took = 0;
    MS_TRY(between(call->marks[m].event, call->marks[m + 1].event, &took, err));
    out->step[call->marks[m].step] += took;
  }
  return MS_OK;
}
