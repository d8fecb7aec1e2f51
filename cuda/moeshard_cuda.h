// moeshard_cuda.h - THE MAP of the CUDA engine: the same five steps as csrc/moeshard.h, on a stream.
//
//   experts    this rank's columns on the device (once per model)              experts.c
//   layout     this rank's share of each expert's slots (once per model)       layout.c
//   shape      everything that launches and memory depend on, in plain C      shape.c
//   gather     header, tokens and choices into one message; all-gather        step2_gather.cuh, exchange/
//   group      stable sort of the slots by expert, and the table of tiles     step3_group.cuh
//   ffn        up (matrix 1, bias, activation, gate), down (matrix 2, weight) step4_ffn*.cuh
//   combine    sum of the choices; reduce-scatter; rounding to out            step5_combine.cuh
//   times      when the steps of each call began, for profiles                record.c
//
// A layer is 5 or 6 kernel launches and 2 collectives, whatever E and the routing are, with no host synchronisation,
// no allocation and no copy to the host in the steady state; it can be captured in a graph.
// Launch shapes and memory depend on (T, K, D, F, E, R, dtype) only. Where a token goes is decided on the device.
//
// Plain C: this header is read by .c, .cu and .cuh files. Dims are those of csrc/moeshard.h.
// Pointers named *device in comments are device memory; a stream is a cudaStream_t passed as void *.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MOESHARD_CUDA_H
#define MOESHARD_CUDA_H

#include "../csrc/moeshard.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- experts: this rank's columns on the device ------------------------------------------------
// nn.Linear layout, K contiguous, which is what the tensor cores' column operand wants: nothing is repacked, rows are
// only padded with zeros to 16 bytes, so that every row can be read by 16-byte copies.

typedef struct ms_cuda_expert { // one entry of the device's table
  const void *w_in;             // [width, ld_in] (gated [2 * width, ld_in], gate rows first)
  const void *w_out;            // [D, ld_out]: D rows of `width` columns
  const float *b_in;            // [width] ([2 * width]) or NULL
  const float *b_out;           // [D] or NULL (and NULL on ranks that do not hold column 0)
  int32_t width;                // Fr of this expert, may be 0
  int32_t ld_out;               // elements from row to row of w_out: width rounded up to 16 bytes
} ms_cuda_expert;

typedef struct ms_cuda_experts {
  ms_experts_spec spec;         // columns: owned copy
  int32_t device;               // the CUDA device's number
  int64_t max_width;            // largest width of an expert
  int64_t ld_in;                // elements from row to row of w_in: D rounded up to 16 bytes
  int64_t ld_h;                 // elements from row to row of H: max_width rounded up to 16 bytes
  ms_cuda_expert *table;        // [E] host copy, device pointers inside
  const ms_cuda_expert *device_table; // [E] device
  unsigned long long *seen;     // [E+1] device: slots that each expert got so far, then all slots; counted by group
  void *data;                   // device: one allocation for all
  int64_t bytes;
} ms_cuda_experts;

// Cost: one cudaMalloc of the slices' bytes, zeroed. Errors: MS_EINVAL, MS_EDTYPE, MS_ENOMEM, MS_ECUDA.
ms_status ms_cuda_experts_create(const ms_experts_spec *spec, int32_t device, ms_cuda_experts **out,
                                 ms_error *err);
void ms_cuda_experts_free(ms_cuda_experts *experts); // NULL is legal

// As ms_experts_pack; sources may be host or device memory, with unit stride along one dimension.
// Sources of another dtype than the storage are converted on the device. Returns when the sources may be freed.
ms_status ms_cuda_experts_pack(ms_cuda_experts *experts, int32_t e, int64_t first, int64_t count,
                               const ms_matrix *w_in, const ms_matrix *w_out, const void *b_in,
                               const void *b_out, ms_dtype bias, void *stream, ms_error *err);
// The slots that came in so far, over all ranks: seen[e] with expert e, seen[E] all of them (those without an expert
// too). Calls with a fault do not count; replays of a graph do.
//   seen   [E+1] host memory, or NULL
//   forget  begin anew
// Cost: waits for the device. Errors: MS_ECUDA.
ms_status ms_cuda_experts_seen(const ms_cuda_experts *experts, int64_t *seen, bool forget, ms_error *err);
// As ms_experts_unpack; destinations are device or host memory.
ms_status ms_cuda_experts_unpack(const ms_cuda_experts *experts, int32_t e, void *w_in, void *w_out,
                                 float *b_in, float *b_out, void *stream, ms_error *err);

// ---- layout: this rank's share of the slots ------------------------------------------------------
// The rule of csrc/moeshard.h, chapter P, for tokens that are nobody's own: rows go to all ranks anyway, so none would
// stay at home. Slot number i of an expert with c copies, in the order of tokens, goes to copy (e + i) mod c. That
// follows from the routing of a chunk alone, and all ranks find the same.

typedef struct ms_cuda_turns { // of the slots of an expert: numbers first, first + step, first + 2 * step ...
  int32_t first, step;         // first: MS_CUDA_NO_TURN where this rank computes none; step: copies of the expert
} ms_cuda_turns;

enum { MS_CUDA_NO_TURN = INT32_MAX };

typedef struct ms_cuda_layout {
  int32_t E, device;
  ms_cuda_turns *host;   // [E]
  ms_cuda_turns *turns; // [E] device
} ms_cuda_layout;

//   copies [E] of each expert, 0: pruned    copy [E] the one that this rank is in, -1: it holds no column
// Cost: one cudaMalloc of 8 E bytes. Errors: MS_EINVAL copies or copy; MS_ENOMEM; MS_ECUDA.
ms_status ms_cuda_layout_create(int32_t E, const int32_t *copies, const int32_t *copy, int32_t device,
                                ms_cuda_layout **out, ms_error *err);
void ms_cuda_layout_free(ms_cuda_layout *layout); // NULL is legal
// Of `count` slots that an expert has in a chunk, those that this rank computes.
int64_t ms_cuda_layout_own(const ms_cuda_layout *layout, int32_t e, int64_t count);

// ---- shape: what launches and memory depend on (shape.c, no CUDA header) ------------------------

typedef enum ms_cuda_math { // how matrices are multiplied
  MS_CUDA_FMA = 0,          // fp32, strict
  MS_CUDA_TF32,             // fp32 through tf32 tensor cores, only when asked for
  MS_CUDA_MMA,              // bf16 and fp16, mma.sync
  MS_CUDA_WGMMA             // bf16 and fp16, wgmma (sm_90a)
} ms_cuda_math;

// Message of one rank: what the all-gather carries. Sections start at multiples of 256 bytes.
//   [ms_cuda_header][expert int32 T*K][weight float T*K][hidden T * ld_x]
// Replicated tokens: headers travel alone and lie one after the other, the rest is there once, as if it were rank 0's:
//   [ms_cuda_header of rank 0][of rank 1]...[expert][weight][hidden]
typedef struct ms_cuda_header {
  uint64_t call, digest; // digest: of the routing, when replicated: the same tokens must be the same
  int64_t layer, T; // T: tokens that this rank has; rows beyond are absent (expert -1)
  int64_t first;    // this rank's number of token 0: later chunks of a batch do not start with 0
  int32_t D, K, E, dtype, replicated;
  int32_t fault;       // an ms_cuda_fault_kind: what this rank's router did wrong; then no rank computes
  int32_t fault_index; // MS_CUDA_BAD_INDEX: the index
  int64_t fault_at;    // the first slot that is wrong
} ms_cuda_header;

typedef enum ms_cuda_fault_kind { MS_CUDA_NO_FAULT = 0, MS_CUDA_BAD_INDEX, MS_CUDA_BAD_WEIGHT } ms_cuda_fault_kind;

// What the device tells the host, in host memory that it can write: the headers of a call that did not compute.
typedef struct ms_cuda_faults {
  int32_t found; // nonzero: headers holds what was gathered; the device changes nothing until the host has read it
  int32_t padding;
  ms_cuda_header headers[]; // [R]
} ms_cuda_faults;

typedef struct ms_cuda_shape {
  // given
  int64_t T;     // rows of each rank in this chunk, alike on all ranks (>= the tokens of any)
  int32_t R, rank, K, E;
  int64_t D, F;  // F: max_width of the experts
  ms_dtype dtype;
  ms_cuda_math math;
  bool gated;
  bool replicated;  // all ranks hold the same T tokens
  int32_t sms;      // multiprocessors of the device
  bool in_place;    // no tokens travel, and D is a whole number of 16 bytes: hidden is read where it lies
  // derived by ms_cuda_shape_plan
  int64_t N, slots;      // R*T (replicated: T), N*K
  int64_t ld_x;          // elements from token to token in the message
  int64_t ld_h;
  int32_t tile_rows;     // BM of both GEMMs: 16, 64 or 128, from slots / E
  int32_t max_tiles;     // slots / tile_rows + min(E, slots): what the table of tiles may need
  int64_t expert_at, weight_at, hidden_at; // from a rank's message on
  int64_t message_bytes;                   // of one rank: what travels
  // workspace: offsets in bytes, each a multiple of 256
  int32_t sort_chunks; // pieces of the slots that are sorted side by side; 0: one block sorts all in shared memory
  int32_t sort_blocks; // by so many blocks, all at once: no more than sms
  int64_t messages_at, counts_at, offset_at, order_at, tiles_at, h_at, slot_at, partial_at;
  int64_t workspace_bytes;
} ms_cuda_shape;

// Cost: O(1). Errors: MS_EINVAL a dimension; MS_ESHAPE slots >= 2^31, or more than the 64 GiB of hidden states or of H
// that kernels reach.
ms_status ms_cuda_shape_plan(ms_cuda_shape *shape, ms_error *err);

// ---- what the kernels get ------------------------------------------------------------------------

typedef struct ms_cuda_tile { // rows [first, first + rows) of `order`, all of one expert; rows <= tile_rows
  int32_t expert, first, rows;
} ms_cuda_tile;

typedef struct ms_cuda_view { // one chunk in the workspace; passed by value to every kernel
  // gathered
  const char *hidden;     // token n = r*T + t lies at hidden + r*hidden_stride + t*ld_x*size
  const char *messages;   // expert and weight of rank r at messages + r*message_bytes + {expert,weight}_at
                          // (group: expert becomes -1 where another rank computes the slot)
  int64_t hidden_stride;  // bytes
  // group
  int32_t *tickets;       // [MS_CUDA_TICKETS] at the start of the workspace, zero between kernels
  int32_t *counts;        // scratch of gather and group
  int32_t *offset;        // [E+1]
  int32_t *order;         // [slots] slot = n*K + j, by expert, stable
  ms_cuda_tile *tiles;    // [max_tiles]
  int32_t *tile_count;    // [1]; -1: the call has a fault, nothing is computed and the outputs are NaN
  unsigned long long *seen; // of the experts; NULL: not counted
  // ffn
  const ms_cuda_expert *experts;
  char *h;                // [slots, ld_h] in the order of `order`, dtype
  float *slot;            // [slots, D] by slot number; K = 1: the same memory as partial
  void *out;              // [T, D] one rank and K = 1: where down writes instead, rounded; else NULL
  // combine
  float *partial;         // [N, D]
  ms_cuda_faults *faults; // written when the headers disagree or tell of a fault; read by the host at the next call
} ms_cuda_view;

enum {
  MS_CUDA_TICKETS = 64,       // int32 counters for the blocks of one launch
  MS_CUDA_ROUTE_BLOCKS = 256, // blocks that check the routing, at most
  MS_CUDA_SORT_BLOCKS = 256   // blocks that sort side by side, at most
};

ms_cuda_view ms_cuda_view_of(const ms_cuda_shape *shape, const ms_cuda_experts *experts, void *workspace,
                             const void *hidden_in_place, ms_cuda_faults *faults);

// ---- the five steps: launchers (.cu), one launch each, asynchronous -----------------------------

// Write this rank's message: header, expert (int32, range-checked), weight (float, finite-checked), hidden.
//   hidden [tokens, D]; index [tokens, K] int32 or int64; weight [tokens, K] float32, bfloat16 or float16: device
// The message goes to this rank's place among the gathered ones.
ms_status ms_cuda_gather_pack(const ms_cuda_shape *shape, const ms_cuda_view *view, const ms_cuda_header *header,
                              const void *hidden, const void *index, ms_dtype index_dtype, const void *weight,
                              ms_dtype weight_dtype, void *stream, ms_error *err);
// Check the headers of all ranks, sort the slots that this rank computes, write the table of tiles.
//   layout  NULL: it computes all
ms_status ms_cuda_group(const ms_cuda_shape *shape, const ms_cuda_view *view, const ms_cuda_layout *layout,
                        void *stream, ms_error *err);
// H = act(X . w_in^T + b_in) (* gate)
ms_status ms_cuda_ffn_up(const ms_cuda_shape *shape, const ms_cuda_view *view, ms_activation activation,
                         void *stream, ms_error *err);
// slot[s] = weight[s] * (H . w_out^T + b_out); view->out: out[s] = that, rounded
ms_status ms_cuda_ffn_down(const ms_cuda_shape *shape, const ms_cuda_view *view, void *stream, ms_error *err);
// R = 1: out[t] = sum of the choices, rounded. R > 1: partial[n] = sum of the choices (0 where there are none).
// view->out: out[t] = 0 where there is no expert, the rest is there.
// NaN everywhere in a call that has a fault.
ms_status ms_cuda_combine(const ms_cuda_shape *shape, const ms_cuda_view *view, int64_t tokens, void *out,
                          void *stream, ms_error *err);
// R > 1, 16-bit dtypes: round this rank's reduced float rows to out.
ms_status ms_cuda_combine_round(const ms_cuda_shape *shape, const float *reduced, int64_t tokens, void *out,
                                void *stream, ms_error *err);

// ---- exchange: what carries messages between devices ---------------------------------------------

typedef struct ms_cuda_exchange ms_cuda_exchange;
struct ms_cuda_exchange { // filled in by exchange/nccl.c
  int32_t rank, R, device;
  // Asynchronous on `stream`. bytes is per rank; count is floats per rank.
  ms_status (*all_gather)(ms_cuda_exchange *, const void *send, void *receive, int64_t bytes, void *stream,
                          ms_error *err);
  ms_status (*reduce_scatter)(ms_cuda_exchange *, const float *send, float *receive, int64_t count,
                              void *stream, ms_error *err);
  ms_status (*all_reduce)(ms_cuda_exchange *, float *sums, int64_t count, void *stream,
                          ms_error *err); // in place; the same bits on all ranks
  ms_status (*check)(ms_cuda_exchange *, ms_error *err); // asynchronous errors so far; costs no synchronisation
  void (*free)(ms_cuda_exchange *);
};

// ---- the layer: chunks of the five steps on two streams (engine.c) -------------------------------

typedef struct ms_cuda_engine ms_cuda_engine; // workspace, streams, events, call number; one per device and group

ms_status ms_cuda_engine_create(ms_cuda_exchange *exchange_or_null, int32_t device, int32_t chunks,
                                ms_cuda_engine **out, ms_error *err);
void ms_cuda_engine_free(ms_cuda_engine *engine);

typedef struct ms_cuda_call {
  const void *hidden, *index, *weight; // device, contiguous, as ms_route's
  void *out;
  ms_dtype dtype, index_dtype, weight_dtype;
  int64_t tokens, capacity; // capacity: rows to reserve per rank, alike on all ranks, >= tokens of any (R = 1: tokens)
  int32_t K;
  int64_t layer;
  bool replicated; // all ranks hold the same tokens: they do not travel, out = sum over ranks
  bool tf32;
  const ms_cuda_layout *layout; // NULL: every rank holds columns of every expert, once
} ms_cuda_call;

// Enqueue a whole layer on `stream`. Faults of an earlier call (routing out of range, ranks that disagree) are raised
// here, by the first call after the device found them and after this call is enqueued, so that no rank waits for it;
// ms_cuda_engine_faults waits and raises them at once. A fault is raised once; while one waits to be raised, others are
// forgotten. A call (of several chunks: the chunk) that has a fault fills out with NaN on every rank.
// Calls may be on different streams, one after the other: a call waits for the one before.
// Cost: no allocation but when the shape grows, no synchronisation.
// Errors: MS_ESHAPE, MS_EDTYPE, MS_EINVAL (a growing shape while a graph is captured); MS_ENOMEM; MS_ECUDA; of an
// earlier call MS_ERANGE (MS_EPEER on the other ranks) and MS_EMISMATCH; MS_ECOMM, MS_ELOST, MS_ETIMEOUT.
ms_status ms_cuda_forward(ms_cuda_engine *engine, const ms_cuda_experts *experts, const ms_cuda_call *call,
                          void *stream, ms_error *err);
ms_status ms_cuda_engine_faults(ms_cuda_engine *engine, ms_error *err);

// ---- times of the steps, for profiles (record.c) -------------------------------------------------

typedef enum ms_cuda_step { // route: the message is written; gather: it travels
  MS_CUDA_ROUTE = 0,
  MS_CUDA_GATHER,
  MS_CUDA_GROUP,
  MS_CUDA_FFN,
  MS_CUDA_COMBINE,
  MS_CUDA_STEPS
} ms_cuda_step;

typedef struct ms_cuda_times { // one call
  int64_t layer, tokens;
  int32_t K, E;
  ms_dtype dtype;
  double block, begin;          // nanoseconds since recording began: the model's router (NAN: not known), the layer
  double step[MS_CUDA_STEPS];   // nanoseconds in each; with chunks their sums, as they lie on the caller's stream
  const int64_t *before, *after; // [E+1] ms_cuda_experts_seen before and after the call; borrowed
} ms_cuda_times;

// Record every call from now on that is not captured, or stop and forget. Legal twice.
// Recorded calls have events between their steps and copy counters to the host; the host does not wait for them.
// Cost: waits for the device. Errors: MS_ENOMEM; MS_ECUDA.
ms_status ms_cuda_engine_record(ms_cuda_engine *engine, bool on, ms_error *err);
// On `stream`, the model begins to decide about the routing of the next call. Nothing if not recording.
ms_status ms_cuda_engine_stamp(ms_cuda_engine *engine, void *stream, ms_error *err);
// Wait for the device; how many calls were recorded.
ms_status ms_cuda_engine_recorded(ms_cuda_engine *engine, int64_t *count, ms_error *err);
// One of them; what it points to lives until recording stops. Errors: MS_EINVAL i; MS_ECUDA.
ms_status ms_cuda_engine_times(const ms_cuda_engine *engine, int64_t i, ms_cuda_times *out, ms_error *err);

#ifdef __cplusplus
}
#endif
#endif
