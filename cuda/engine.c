// engine.c - a layer on the device: the five steps of each chunk, on the caller's stream and one more.
//
// With one rank the steps follow each other on the caller's stream. With several, the tokens of every rank are cut in
// chunks: while a chunk is computed, the next one is gathered and the one before is reduced, on a second stream:
//
//   caller's     pack 0  pack 1  [group ffn combine] 0            pack 2  [group ffn combine] 1  round 0 ...
//   exchange             gather 0            gather 1  reduce 0            gather 2   reduce 1 ...
//
// All ranks enqueue their collectives in this order. Chunks take turns in two workspaces. The second stream is forked
// from the caller's by an event and joined to it before forward returns, so that all can be captured in a graph.
// Streams of callers may change: the workspaces are one call's at a time, so each call waits for the one before.
//
// A workspace that a graph was captured with is kept until the engine goes: the graph may be replayed.
//
// SPDX-License-Identifier: Apache-2.0
#include "moeshard_cuda.h"
#include "record.h"
#include "status.h"

#include <stdio.h> // snprintf
#include <stdlib.h>
#include <string.h>

enum { SPACES = 2, MOST_CHUNKS = 64 };

typedef struct kept { // a workspace that graphs may still use
  void *data;
  struct kept *next;
} kept;

typedef struct space {
  void *data;
  int64_t bytes;
  cudaEvent_t packed, gathered, computed, reduced;
} space;

struct ms_cuda_engine {
  ms_cuda_exchange *exchange; // borrowed; NULL: one rank
  int32_t device, chunks, sms;
  bool wgmma;
  cudaStream_t stream; // of the exchange
  space spaces[SPACES];
  bool captured; // the present workspaces are in a graph
  kept *kept;
  cudaStream_t last;  // of the latest call that was not captured
  cudaEvent_t done;   // that call has ended
  uint64_t calls;
  uint64_t told;      // the call that a fault was told of last, and where its chunk began
  int64_t told_first;
  ms_cuda_recorder *recorder;    // NULL: nobody records
  ms_cuda_faults *faults;        // pinned host memory
  ms_cuda_faults *device_faults; // the same for the device
};

static int32_t ranks_of(const ms_cuda_engine *g) { return g->exchange ? g->exchange->R : 1; }
static int32_t rank_of(const ms_cuda_engine *g) { return g->exchange ? g->exchange->rank : 0; }

// ---- life -------------------------------------------------------------------------------------------------------

static ms_status start(ms_cuda_engine *g, ms_error *err) {
  int major = 0, minor = 0;
  MS_CUDA(cudaDeviceGetAttribute(&g->sms, cudaDevAttrMultiProcessorCount, g->device), err);
  MS_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, g->device), err);
  MS_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, g->device), err);
#ifdef MS_CUDA_SM90
  g->wgmma = major == 9 && minor == 0;
#endif
  size_t bytes = sizeof(ms_cuda_faults) + (size_t)ranks_of(g) * sizeof(ms_cuda_header);
  MS_CUDA(cudaHostAlloc((void **)&g->faults, bytes, cudaHostAllocMapped), err);
  memset(g->faults, 0, bytes);
  MS_CUDA(cudaHostGetDevicePointer((void **)&g->device_faults, g->faults, 0), err);
  MS_CUDA(cudaEventCreateWithFlags(&g->done, cudaEventDisableTiming), err);
  if (!g->exchange) return MS_OK;
  MS_CUDA(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking), err);
  for (int i = 0; i < SPACES; i++) {
    cudaEvent_t *events[] = {&g->spaces[i].packed, &g->spaces[i].gathered, &g->spaces[i].computed,
                             &g->spaces[i].reduced};
    for (size_t j = 0; j < sizeof events / sizeof *events; j++)
      MS_CUDA(cudaEventCreateWithFlags(events[j], cudaEventDisableTiming), err);
  }
  return MS_OK;
}

static void free_on_device(ms_cuda_engine *g) {
  for (int i = 0; i < SPACES; i++) {
    space *s = &g->spaces[i];
    cudaFree(s->data); // waits for the device
    if (s->packed) cudaEventDestroy(s->packed);
    if (s->gathered) cudaEventDestroy(s->gathered);
    if (s->computed) cudaEventDestroy(s->computed);
    if (s->reduced) cudaEventDestroy(s->reduced);
  }
  while (g->kept) {
    kept *next = g->kept->next;
    cudaFree(g->kept->data);
    free(g->kept);
    g->kept = next;
  }
  if (g->done) cudaEventDestroy(g->done);
  if (g->stream) cudaStreamDestroy(g->stream);
  cudaFreeHost(g->faults);
}

ms_status ms_cuda_engine_create(ms_cuda_exchange *exchange, int32_t device, int32_t chunks, ms_cuda_engine **out,
                                ms_error *err) {
  *out = NULL;
  if (chunks < 1 || chunks > MOST_CHUNKS)
    return ms_fail(err, MS_EINVAL, "chunks: got %d, expected 1 to %d", chunks, MOST_CHUNKS);
  if (exchange && exchange->device != device)
    return ms_fail(err, MS_EINVAL, "exchange: it is on device %d, expected %d", exchange->device, device);
  ms_cuda_engine *g = calloc(1, sizeof *g);
  if (!g) return ms_fail(err, MS_ENOMEM, "no memory for an engine");
  if (exchange && exchange->R == 1) exchange = NULL; // nothing travels
  *g = (ms_cuda_engine){.exchange = exchange, .device = device, .chunks = exchange ? chunks : 1};
  int before;
  ms_status status = ms_cuda_enter(device, &before, err);
  if (status == MS_OK) {
    status = start(g, err);
    ms_cuda_leave(before);
  }
  if (status == MS_OK)
    *out = g;
  else
    ms_cuda_engine_free(g);
  return status;
}

void ms_cuda_engine_free(ms_cuda_engine *g) {
  if (!g) return;
  int before;
  if (ms_cuda_enter(g->device, &before, NULL) == MS_OK) { // else there is nothing on it
    ms_cuda_recorder_free(g->recorder);
    free_on_device(g);
    ms_cuda_leave(before);
  }
  free(g);
}

// ---- workspace --------------------------------------------------------------------------------------------------

static ms_status release(ms_cuda_engine *g, void *data, ms_error *err) {
  if (!data) return MS_OK;
  if (!g->captured) {
    MS_CUDA(cudaFree(data), err); // waits for what uses it
    return MS_OK;
  }
  kept *keep = malloc(sizeof *keep);
  if (!keep) return ms_fail(err, MS_ENOMEM, "no memory to keep a workspace");
  *keep = (kept){data, g->kept};
  g->kept = keep;
  return MS_OK;
}

static ms_status reserve(ms_cuda_engine *g, int64_t bytes, bool capturing, ms_error *err) {
  bool grows = false;
  for (int i = 0; i < (g->chunks > 1 ? SPACES : 1); i++) {
    space *s = &g->spaces[i];
    if (s->bytes >= bytes) continue;
    if (capturing)
      return ms_fail(err, MS_EINVAL,
                     "a graph is being captured, and this shape needs %lld bytes of workspace where %lld are: call the "
                     "layer once with the largest shape before",
                     (long long)bytes, (long long)s->bytes);
    MS_TRY(release(g, s->data, err));
    s->data = NULL;
    s->bytes = 0;
    MS_CUDA(cudaMalloc(&s->data, (size_t)bytes), err);
    MS_CUDA(cudaMemset(s->data, 0, (size_t)bytes), err); // tickets start at zero, wherever a shape has them
    s->bytes = bytes;
    grows = true;
  }
  if (grows) {
    MS_CUDA(cudaDeviceSynchronize(), err); // the caller's stream need not wait for the memset
    g->captured = false;
  }
  g->captured |= capturing;
  return MS_OK;
}

// ---- faults -----------------------------------------------------------------------------------------------------

static void header_of(const ms_cuda_header *from, ms_header *to) {
  *to = (ms_header){.call = from->call,
                    .layer = from->layer,
                    .T = from->T,
                    .D = from->D,
                    .K = from->K,
                    .E = from->E,
                    .dtype = from->dtype,
                    .replicated = from->replicated,
                    .digest = from->digest};
}

// As csrc/step1_route.c says it.
static void describe(const ms_cuda_header *h, char *text, size_t bytes) {
  long long t = h->first + h->fault_at / h->K, j = h->fault_at % h->K;
  if (h->fault == MS_CUDA_BAD_INDEX)
    snprintf(text, bytes, "top_k_index[%lld, %lld]: got %d, expected -1 (no expert) to %d", t, j, h->fault_index,
             h->E - 1);
  else
    snprintf(text, bytes, "top_k_weights[%lld, %lld]: expected a finite number", t, j);
}

// What the device found so far; forgotten by telling it. All chunks of a call may have the same fault: the first is
// told. (A graph has the number of its call whenever it is replayed, so an earlier number is no reason to say nothing.)
static ms_status tell_faults(ms_cuda_engine *g, ms_error *err) {
  if (!__atomic_load_n(&g->faults->found, __ATOMIC_ACQUIRE)) return MS_OK;
  int32_t R = ranks_of(g);
  const ms_cuda_header *found = g->faults->headers;
  bool later_chunk = found[0].call == g->told && found[0].first > g->told_first;
  ms_header *headers = calloc((size_t)R, sizeof *headers);
  if (!headers) return ms_fail(err, MS_ENOMEM, "no memory for the headers of %d ranks", R);
  for (int32_t r = 0; r < R; r++) header_of(&found[r], &headers[r]);
  ms_status status = later_chunk ? MS_OK : ms_header_check(headers, R, err);
  free(headers);
  for (int32_t r = 0; r < R && status == MS_OK && !later_chunk; r++) {
    if (found[r].fault == MS_CUDA_NO_FAULT) continue;
    char text[256];
    describe(&found[r], text, sizeof text);
    status = r == rank_of(g) ? ms_fail(err, MS_ERANGE, "%s", text) : ms_fail(err, MS_EPEER, "rank %d: %s", r, text);
  }
  g->told = found[0].call;
  g->told_first = found[0].first;
  __atomic_store_n(&g->faults->found, 0, __ATOMIC_RELEASE);
  return status;
}

ms_status ms_cuda_engine_faults(ms_cuda_engine *g, ms_error *err) {
  int before;
  MS_TRY(ms_cuda_enter(g->device, &before, err));
  ms_status status = ms_cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize", err);
  ms_cuda_leave(before);
  return status == MS_OK ? tell_faults(g, err) : status;
}

// ---- the layer --------------------------------------------------------------------------------------------------

typedef struct layer {
  ms_cuda_engine *engine;
  const ms_cuda_experts *experts;
  const ms_cuda_call *call;
  ms_cuda_shape shape; // of a chunk
  int32_t chunks;
  cudaStream_t stream; // the caller's
  cudaStream_t travel; // of collectives
  bool recording;
} layer;

enum { MARKS_OF_CHUNK = 8 }; // at most

// A step begins on the caller's stream.
static ms_status mark(const layer *l, ms_cuda_step step, ms_error *err) {
  return l->recording ? ms_cuda_recorder_mark(l->engine->recorder, step, l->stream, err) : MS_OK;
}

static ms_status check_call(const ms_cuda_engine *g, const ms_cuda_experts *x, const ms_cuda_call *c, ms_error *err) {
  if (x->device != g->device)
    return ms_fail(err, MS_EINVAL, "experts: they are on device %d, expected %d", x->device, g->device);
  if (c->layout && (c->layout->device != g->device || c->layout->E != x->spec.E))
    return ms_fail(err, MS_EINVAL, "layout: it has %d experts on device %d, expected %d on device %d", c->layout->E,
                   c->layout->device, x->spec.E, g->device);
  if (c->dtype != x->spec.storage)
    return ms_fail(err, MS_EDTYPE, "hidden_states: got %s, expected %s as the experts", ms_dtype_name(c->dtype),
                   ms_dtype_name(x->spec.storage));
  if (c->index_dtype != MS_I32 && c->index_dtype != MS_I64)
    return ms_fail(err, MS_EDTYPE, "top_k_index: got %s, expected int32 or int64", ms_dtype_name(c->index_dtype));
  if (c->weight_dtype != MS_F32 && c->weight_dtype != MS_BF16 && c->weight_dtype != MS_F16)
    return ms_fail(err, MS_EDTYPE, "top_k_weights: got %s, expected float32, bfloat16 or float16",
                   ms_dtype_name(c->weight_dtype));
  if (c->tokens < 0 || c->capacity < c->tokens)
    return ms_fail(err, MS_EINVAL, "capacity: got %lld, expected at least the %lld tokens", (long long)c->capacity,
                   (long long)c->tokens);
  return MS_OK;
}

// This rank's tokens in a chunk.
static int64_t tokens_in(const layer *l, int32_t chunk) {
  int64_t left = l->call->tokens - chunk * l->shape.T;
  return left < 0 ? 0 : left < l->shape.T ? left : l->shape.T;
}

static const void *rows_from(const void *data, int64_t row, int64_t bytes) {
  return data ? (const char *)data + row * bytes : NULL;
}

static space *space_of(const layer *l, int32_t chunk) { return &l->engine->spaces[chunk % SPACES]; }

static ms_cuda_view view_of(const layer *l, int32_t chunk) {
  const void *hidden = rows_from(l->call->hidden, chunk * l->shape.T, l->shape.D * ms_dtype_size(l->shape.dtype));
  ms_cuda_view view =
      ms_cuda_view_of(&l->shape, l->experts, space_of(l, chunk)->data, hidden, l->engine->device_faults);
  if (l->shape.K == 1 && !l->engine->exchange) view.out = l->call->out; // a slot is a token: nothing to sum
  return view;
}

static ms_status order(cudaStream_t first, cudaEvent_t event, cudaStream_t then, ms_error *err) {
  if (first == then) return MS_OK;
  MS_CUDA(cudaEventRecord(event, first), err);
#ifndef MS_PLANT_17 // messages and partial outputs may travel before they are there
  MS_CUDA(cudaStreamWaitEvent(then, event, 0), err);
#endif
  return MS_OK;
}

static ms_status gather(const layer *l, int32_t chunk, ms_error *err) {
  const ms_cuda_shape *s = &l->shape;
  const ms_cuda_call *c = l->call;
  ms_cuda_view view = view_of(l, chunk);
  ms_cuda_header header = {.call = l->engine->calls,
                           .layer = c->layer,
                           .T = tokens_in(l, chunk),
                           .first = chunk * s->T,
                           .D = (int32_t)s->D,
                           .K = s->K,
                           .E = s->E,
                           .dtype = (int32_t)s->dtype,
                           .replicated = s->replicated};
  int64_t row = chunk * s->T;
  MS_TRY(mark(l, MS_CUDA_ROUTE, err));
  MS_TRY(ms_cuda_gather_pack(s, &view, &header, rows_from(c->hidden, row, s->D * ms_dtype_size(c->dtype)),
                             rows_from(c->index, row, s->K * ms_dtype_size(c->index_dtype)), c->index_dtype,
                             rows_from(c->weight, row, s->K * ms_dtype_size(c->weight_dtype)), c->weight_dtype,
                             l->stream, err));
  if (!l->engine->exchange) return MS_OK;
  MS_TRY(mark(l, MS_CUDA_GATHER, err));
  MS_TRY(order(l->stream, space_of(l, chunk)->packed, l->travel, err));
  char *messages = (char *)(uintptr_t)view.messages;
  MS_TRY(l->engine->exchange->all_gather(l->engine->exchange, messages + s->rank * s->message_bytes, messages,
                                         s->message_bytes, l->travel, err));
  if (l->travel != l->stream) MS_CUDA(cudaEventRecord(space_of(l, chunk)->gathered, l->travel), err);
  return MS_OK;
}

static void *out_of(const layer *l, int32_t chunk) {
  return (void *)(uintptr_t)rows_from(l->call->out, chunk * l->shape.T,
                                      l->shape.D * ms_dtype_size(l->shape.dtype));
}

// group, ffn, combine; then this chunk's partial outputs set out to the other ranks.
static ms_status compute(const layer *l, int32_t chunk, ms_error *err) {
  const ms_cuda_shape *s = &l->shape;
  ms_cuda_view view = view_of(l, chunk);
  if (l->travel != l->stream) MS_TRY(mark(l, MS_CUDA_GATHER, err)); // what is waited for
#ifndef MS_PLANT_15 // group may come before the messages of the others
  if (l->travel != l->stream) MS_CUDA(cudaStreamWaitEvent(l->stream, space_of(l, chunk)->gathered, 0), err);
#endif
  MS_TRY(mark(l, MS_CUDA_GROUP, err));
  MS_TRY(ms_cuda_group(s, &view, l->call->layout, l->stream, err));
  MS_TRY(mark(l, MS_CUDA_FFN, err));
  if (s->slots) {
    MS_TRY(ms_cuda_ffn_up(s, &view, l->experts->spec.activation, l->stream, err));
    MS_TRY(ms_cuda_ffn_down(s, &view, l->stream, err));
  }
  MS_TRY(mark(l, MS_CUDA_COMBINE, err));
  MS_TRY(ms_cuda_combine(s, &view, tokens_in(l, chunk), out_of(l, chunk), l->stream, err));
  if (!l->engine->exchange) return MS_OK;
  MS_TRY(order(l->stream, space_of(l, chunk)->computed, l->travel, err));
  ms_cuda_exchange *ranks = l->engine->exchange;
  int64_t count = s->T * s->D;
  if (s->replicated)
    MS_TRY(ranks->all_reduce(ranks, view.partial, count, l->travel, err));
  else
    MS_TRY(ranks->reduce_scatter(ranks, view.partial, view.partial + s->rank * count, count, l->travel, err));
  if (l->travel != l->stream) MS_CUDA(cudaEventRecord(space_of(l, chunk)->reduced, l->travel), err);
  return MS_OK;
}

static ms_status finish(const layer *l, int32_t chunk, ms_error *err) {
  if (!l->engine->exchange) return MS_OK;
  const ms_cuda_shape *s = &l->shape;
  ms_cuda_view view = view_of(l, chunk);
  MS_TRY(mark(l, MS_CUDA_COMBINE, err));
#ifndef MS_PLANT_16 // rounding may come before the reduction
  if (l->travel != l->stream) MS_CUDA(cudaStreamWaitEvent(l->stream, space_of(l, chunk)->reduced, 0), err);
#endif
  const float *reduced = s->replicated ? view.partial : view.partial + s->rank * s->T * s->D;
  return ms_cuda_combine_round(s, reduced, tokens_in(l, chunk), out_of(l, chunk), l->stream, err);
}

static ms_status enqueue(const layer *l, ms_error *err) {
  MS_TRY(gather(l, 0, err));
  for (int32_t chunk = 0; chunk < l->chunks; chunk++) {
    if (chunk + 1 < l->chunks) MS_TRY(gather(l, chunk + 1, err));
    MS_TRY(compute(l, chunk, err));
    if (chunk > 0) MS_TRY(finish(l, chunk - 1, err));
  }
  return finish(l, l->chunks - 1, err);
}

static ms_status forward(ms_cuda_engine *g, const ms_cuda_experts *experts, const ms_cuda_call *call, void *stream,
                         ms_error *err) {
  if (g->exchange) MS_TRY(g->exchange->check(g->exchange, err));
  const ms_experts_spec *spec = &experts->spec;
  int64_t most = call->capacity < g->chunks ? call->capacity : g->chunks;
  layer l = {.engine = g, .experts = experts, .call = call, .chunks = most > 1 ? (int32_t)most : 1, .stream = stream};
  l.travel = g->exchange && l.chunks > 1 ? g->stream : l.stream;
  l.shape = (ms_cuda_shape){
      .T = (call->capacity + l.chunks - 1) / l.chunks,
      .R = ranks_of(g),
      .rank = rank_of(g),
      .K = call->K,
      .E = spec->E,
      .D = spec->D,
      .F = experts->max_width,
      .dtype = call->dtype,
      .math = call->dtype == MS_F32 ? (call->tf32 ? MS_CUDA_TF32 : MS_CUDA_FMA)
              : g->wgmma            ? MS_CUDA_WGMMA
                                    : MS_CUDA_MMA,
      .gated = spec->gated,
      .replicated = g->exchange && call->replicated,
      .sms = g->sms,
      .in_place = (uintptr_t)call->hidden % 16 == 0,
  };
  MS_TRY(ms_cuda_shape_plan(&l.shape, err));
  enum cudaStreamCaptureStatus capture;
  MS_CUDA(cudaStreamIsCapturing(l.stream, &capture), err);
  bool capturing = capture != cudaStreamCaptureStatusNone;
  MS_TRY(reserve(g, l.shape.workspace_bytes, capturing, err));
  ms_error said;
  ms_status earlier = tell_faults(g, &said); // raised at the end: the other ranks count on this call
  if (!capturing && g->last != l.stream) MS_CUDA(cudaStreamWaitEvent(l.stream, g->done, 0), err);
  g->calls++;
  l.recording = g->recorder && !capturing;
  if (l.recording) MS_TRY(ms_cuda_recorder_begin(g->recorder, experts, call, l.stream, err));
  MS_TRY(enqueue(&l, err));
  if (l.recording) MS_TRY(ms_cuda_recorder_end(g->recorder, experts, l.stream, err));
  if (!capturing) {
    g->last = l.stream;
    MS_CUDA(cudaEventRecord(g->done, l.stream), err);
  }
  return earlier == MS_OK ? MS_OK : ms_fail(err, earlier, "%s", said.msg);
}

ms_status ms_cuda_forward(ms_cuda_engine *g, const ms_cuda_experts *experts, const ms_cuda_call *call, void *stream,
                          ms_error *err) {
  MS_TRY(check_call(g, experts, call, err));
  int before;
  MS_TRY(ms_cuda_enter(g->device, &before, err));
  ms_status status = forward(g, experts, call, stream, err);
  ms_cuda_leave(before);
  return status;
}

// ---- times of the steps -----------------------------------------------------------------------------------------

ms_status ms_cuda_engine_record(ms_cuda_engine *g, bool on, ms_error *err) {
  int before;
  MS_TRY(ms_cuda_enter(g->device, &before, err));
  ms_status status = MS_OK;
  if (!on) {
    ms_cuda_recorder_free(g->recorder);
    g->recorder = NULL;
  } else if (!g->recorder) {
    status = ms_cuda_recorder_create(MARKS_OF_CHUNK * g->chunks + 1, &g->recorder, err);
  }
  ms_cuda_leave(before);
  return status;
}

ms_status ms_cuda_engine_stamp(ms_cuda_engine *g, void *stream, ms_error *err) {
  if (!g->recorder) return MS_OK;
  int before;
  MS_TRY(ms_cuda_enter(g->device, &before, err));
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  ms_status status = ms_cuda_status(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing", err);
  if (status == MS_OK && capture == cudaStreamCaptureStatusNone)
    status = ms_cuda_recorder_stamp(g->recorder, stream, err);
  ms_cuda_leave(before);
  return status;
}

ms_status ms_cuda_engine_recorded(ms_cuda_engine *g, int64_t *count, ms_error *err) {
  *count = g->recorder ? ms_cuda_recorder_count(g->recorder) : 0;
  int before;
  MS_TRY(ms_cuda_enter(g->device, &before, err));
  ms_status status = ms_cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize", err);
  ms_cuda_leave(before);
  return status;
}

ms_status ms_cuda_engine_times(const ms_cuda_engine *g, int64_t i, ms_cuda_times *out, ms_error *err) {
  if (i < 0 || !g->recorder || i >= ms_cuda_recorder_count(g->recorder))
    return ms_fail(err, MS_EINVAL, "call %lld was not recorded", (long long)i);
  return ms_cuda_recorder_at(g->recorder, i, out, err);
}
