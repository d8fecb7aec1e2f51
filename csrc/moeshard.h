// moeshard.h - THE MAP: everything the C core offers, in the order data flows through a layer.
//
//   chapter 0  conventions: status, errors, dtypes, threads
//   chapter P  plan: which rank holds which columns of which expert (once per model)
//   chapter L  placement: which rank holds which whole expert        plan/placement.h
//   chapter W  experts: this rank's columns, packed for the kernels (once per model)
//   chapter X  exchange: how ranks reach each other (once per group)
//   chapter 1  route    the router's choices, checked                      step1_route.c
//   chapter 2  gather   every rank's tokens and choices                    step2_gather.c
//   chapter 3  group    which rows each expert multiplies                  step3_group.c
//   chapter 4  ffn      both matrices of every expert, this rank's columns step4_ffn.c
//   chapter 5  combine  sum of the k choices, then of the ranks            step5_combine.c
//   at the end: the slow twins; the planner                                reference.c, plan/
//
// A layer is five calls on one ms_batch:
//
//   ms_route  (batch, hidden, index, weight, out, ...);
//   ms_gather (batch, exchange);
//   ms_group  (batch);
//   ms_ffn    (batch, experts, threads);
//   ms_combine(batch, exchange, threads);
//
// and computes, for every token t of this rank, with the j-th choice e = index[t, j]:
//
//   out[t] = sum_j weight[t, j] * (act(hidden[t] . w_in[e]^T + b_in[e]) . w_out[e]^T + b_out[e])
//
// Dims, here and everywhere:
//   T  tokens of this rank           D  model width (d_model)        E  experts
//   N  tokens of all ranks           F  FFN width (d_ff)             K  choices per token (top-k)
//   R  ranks                         Fr this rank's columns of F     C  expert capacity
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MOESHARD_H
#define MOESHARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- chapter 0: conventions -------------------------------------------------------------------

#define MS_MAX_RANKS 1024
#define MS_MAX_CHOICES 64    // K at most
#define MS_MAX_EXPERTS 65536 // E at most
#define MS_PANEL 16 // columns per packed panel: one cache line of fp32, one AVX-512 register

typedef enum ms_status {
  MS_OK = 0,
  MS_EINVAL,    // an argument that cannot be used               -> ArgumentError(ValueError)
  MS_ESHAPE,    // a shape that does not fit the others           -> ShapeError(ValueError)
  MS_EDTYPE,    // a dtype that is not accepted                   -> DTypeError(TypeError)
  MS_ERANGE,    // a value outside its range (expert index, NaN)  -> RangeError(ValueError)
  MS_ENOMEM,    // no memory, or no room in shared memory         -> MemoryError
  MS_ECOMM,     // the exchange could not be set up or is broken  -> CommError(RuntimeError)
  MS_ELOST,     // a rank died                                    -> RankLost(CommError)
  MS_ETIMEOUT,  // a rank did not arrive in time                  -> CommTimeout(CommError)
  MS_EMISMATCH, // ranks disagree about the call                  -> RankMismatch(CommError)
  MS_EPEER,     // another rank reported an error in this call    -> PeerError(CommError)
  MS_ECUDA,     // a call of the CUDA runtime failed              -> CudaError(RuntimeError)
  MS_EINTR      // the caller's poll asked to stop (a signal is pending in Python)
} ms_status;

// The caller owns it and passes it last. Filled where the fault is known, with the numbers.
typedef struct ms_error {
  ms_status code;
  char msg[512];
} ms_error;

// Fill err and return code: `return ms_fail(err, MS_ESHAPE, "w_in: expected ...", ...)`. err may be NULL.
ms_status ms_fail(ms_error *err, ms_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// The one control macro: hand a failure to the caller. Functions with something to free use
// `if ((status = f(...)) != MS_OK) goto done;` instead.
#define MS_TRY(expr)                                                                               \
  do {                                                                                             \
    ms_status ms_try_status = (expr);                                                              \
    if (ms_try_status != MS_OK) return ms_try_status;                                              \
  } while (0)

typedef enum ms_dtype { MS_F32 = 0, MS_BF16, MS_F16, MS_I32, MS_I64, MS_I8 } ms_dtype;
int64_t ms_dtype_size(ms_dtype dtype);     // bytes
const char *ms_dtype_name(ms_dtype dtype); // "float32", "bfloat16", ...

typedef enum ms_activation {
  MS_IDENTITY = 0,
  MS_RELU,
  MS_GELU,      // x * Phi(x), erf form (torch gelu, approximate="none")
  MS_GELU_TANH, // torch gelu, approximate="tanh"
  MS_SILU,      // x * sigmoid(x)
  // gpt-oss and openai/privacy-filter, gated only: with g = min(gate, 7) and u = up held to [-7, 7],
  // g * sigmoid(1.702 g) * (u + 1) in place of act(gate) * up
  MS_CLAMPED_SWIGLU,
  MS_ACTIVATION_COUNT
} ms_activation;

// The instruction set the kernels of this process use: "avx512bf16", "avx512", "avx2" or "generic". Chosen once
// from CPU features; MOESHARD_ISA forces one (tests).
// Cost: O(1). Errors: MS_EINVAL if MOESHARD_ISA names one that does not exist or that this CPU lacks.
ms_status ms_isa(const char **name, ms_error *err);
// Names of the instruction sets this CPU can run, best first, NULL at the end.
const char *const *ms_isa_available(void);

// A pool of worker threads that sleep between calls. The calling thread is one of them, so a pool
// of 1 starts no thread. Results never depend on the number of threads.
// One pool serves one call at a time; concurrent calls are serialised.
typedef struct ms_threads ms_threads;
// Start count - 1 workers; fewer if the system refuses some (the others take their share).
// Cost: some 20 us a worker. Errors: MS_EINVAL count outside 1..4096; MS_ENOMEM.
ms_status ms_threads_create(int32_t count, ms_threads **out, ms_error *err);
void ms_threads_free(ms_threads *threads);           // NULL is legal
int32_t ms_threads_count(const ms_threads *threads); // 1 for NULL
// Run work(context, i) for i in [0, units), handed out in order from one counter; returns when all are done.
// `thread` is in [0, count). Safe after fork (workers are started again in the child).
// Cost: no allocation; about 1 us when the workers are awake, a futex wake when they sleep.
typedef void ms_work(void *context, int64_t unit, int32_t thread);
void ms_threads_run(ms_threads *threads, int64_t units, ms_work *work, void *context);

// What this machine can do at most with these threads: what measured times are held against.
typedef struct ms_machine {
  double
      flops; // fp32 multiply-adds of the instruction set in use, flops per second, registers only
  double dot_flops; // bf16 dot products, flops per second; 0 without the instruction
  double bytes;     // bytes per second read from memory, in as many streams as the kernels read
} ms_machine;
// Cost: about `seconds`, at least 0.1 s, and 256 MiB while it runs. Errors: MS_EINVAL seconds outside 0..60; MS_ENOMEM.
ms_status ms_machine_measure(ms_threads *threads, double seconds, ms_machine *out, ms_error *err);

// ---- chapter P: plan ----------------------------------------------------------------------------
// A layout is a table: columns[r][e] = [start, stop), the hidden columns of expert e that rank r
// holds. Shard, uneven shard, expert parallel, hybrid: the same table, no second code path.

typedef struct ms_plan {
  int32_t R, E;
  int64_t F;
  int64_t *columns; // [R][E][2] owned
  int32_t *copies;  // [E] owned: how many ranks hold each column of e, as declared (1; 0 = pruned)
} ms_plan;

void ms_plan_free(ms_plan *plan); // frees what the struct owns and zeroes it; zeroed is legal

// Every expert over every rank, widths in proportion to speed[R] (NULL: all alike). Widths of one
// expert differ from the exact share by less than one column; which rank gets the odd columns rotates
// with e, so that a rank's sum over experts is balanced too.
// Cost: O(R*E). Errors: MS_EINVAL R, E, F < 1 or a speed that is not positive and finite; MS_ENOMEM.
// Source: arXiv 2503.08467 section 3 (even widths); deviation: ragged and weighted widths.
ms_status ms_plan_shard(int32_t R, int32_t E, int64_t F, const double *speed, ms_plan *out,
                        ms_error *err);

// Expert parallelism: owner[e] has [0, F), the others [0, 0). owner NULL: contiguous blocks of experts.
// Cost: O(R*E). Errors: MS_EINVAL as above or an owner outside 0..R-1; MS_ENOMEM.
ms_status ms_plan_expert_parallel(int32_t R, int32_t E, int64_t F, const int32_t *owner,
                                  ms_plan *out, ms_error *err);

// Groups of `group` consecutive ranks own contiguous blocks of experts and cut them evenly inside the group.
// group = R is the shard layout, group = 1 expert parallelism.
// Cost: O(R*E). Errors: MS_EINVAL as above or R not a multiple of group; MS_ENOMEM.
ms_status ms_plan_hybrid(int32_t R, int32_t E, int64_t F, int32_t group, ms_plan *out,
                         ms_error *err);

// Check that every column of every expert is held by exactly copies[e] ranks and lies in [0, F).
// Cost: O(E * R log R), allocates O(R). Errors: MS_EINVAL naming expert, column and owners found.
ms_status ms_plan_check(const ms_plan *plan, ms_error *err);

// The work of each rank for a routing histogram: work[r] = sum_e counts[e] * columns held (token-columns;
// a token of an expert with c copies is split over them, so it counts 1/c at each).
// Cost: O(R*E), no allocation.
void ms_plan_work(const ms_plan *plan, const int64_t *counts, double *work);

// A table made ready for the steps of one rank: who computes which slot.
//
// The owners of an expert with c copies fall into c sets, each of which holds every column once. A rank holds one
// interval, so where one ends inside [0, F) another begins: copy i begins with the i-th of the ranks that hold column 0,
// by number; where copies end at a column they go on, the lowest first, with the ranks that begin there, by number.
//
// A slot is computed by all ranks of one copy. Of the n slots that an expert has in a call, n mod c copies get
// floor(n / c) + 1 and the others floor(n / c). In token order each slot takes the copy that its token's own rank is
// in, if that has room; then those that are left take, in token order, the copies with room by turns, from copy e mod c on
// (replicated tokens have no rank of their own). So it follows from the routing alone, and all ranks find the same.
typedef struct ms_layout ms_layout;

// Cost: O(E * R log R) time, R*E*4 bytes and a bit for each rank of each copy.
// Errors: MS_EINVAL rank outside 0..R-1, or as ms_plan_check; MS_ENOMEM.
ms_status ms_layout_create(const ms_plan *plan, int32_t rank, ms_layout **out, ms_error *err);
void ms_layout_free(ms_layout *layout); // NULL is legal
// Whether some rank holds no column of some expert, or some expert has not exactly one copy: then rows travel only to
// the ranks that compute them.
bool ms_layout_is_sparse(const ms_layout *layout);
// The copy of expert e that rank r is in; -1: it holds no column of it.
int32_t ms_layout_copy_of(const ms_layout *layout, int32_t r, int32_t e);

// ---- chapter W: experts ---------------------------------------------------------------------------
// This rank's columns of every expert, packed once into 16-wide panels (csrc/kernels/pack.c says how).

typedef struct ms_matrix { // a strided view of a weight matrix; strides in elements; borrowed
  const void *data;
  ms_dtype dtype; // MS_F32, MS_BF16 or MS_F16
  int64_t rows, cols, row_stride, col_stride;
} ms_matrix;

typedef struct ms_experts_spec {
  int32_t E;
  int64_t D, F;
  ms_dtype storage; // of the packed weights: MS_F32, MS_BF16, MS_F16, MS_I8
  ms_activation activation;
  bool gated; // y = act(x W_gate^T) * (x W_up^T): w_in holds the gate rows, then the up rows
  bool has_b_in, has_b_out;
  const int64_t *columns; // [E][2] this rank's row of the plan (copied)
  bool interleaved;       // gated: the rows of w_in and b_in alternate, gate 0, up 0, gate 1, ...
} ms_experts_spec;

typedef struct ms_experts ms_experts;

// Reserve packed memory for all experts (pages are touched only by ms_experts_pack).
// Cost: O(E), address space for the packed bytes.
// Errors: MS_EINVAL a dimension or column range; MS_EDTYPE the storage; MS_ENOMEM.
ms_status ms_experts_create(const ms_experts_spec *spec, ms_experts **out, ms_error *err);
void ms_experts_free(ms_experts *experts);                             // NULL is legal
const ms_experts_spec *ms_experts_get_spec(const ms_experts *experts); // borrowed
int64_t ms_experts_bytes(const ms_experts *experts);                   // packed bytes of this rank

// Pack expert e from full matrices or from slices: the sources hold hidden columns [first, first + count).
//   w_in   [count, D] (gated: [2*count, D], gate rows first) b_in   [count] ([2*count]) or NULL
//   w_out  [D, count]                                             b_out  [D] or NULL
// Only the columns of the plan are read; spec.interleaved says how gate and up rows lie in the sources. Biases are contiguous, of dtype `bias`.
// MS_I8: of each row of w_in and, over this rank's columns, of w_out: scale = its largest magnitude / 127, and a weight is
// the nearest of -127 .. 127 times that. A row with a NaN or an infinity becomes NaN throughout.
// The output bias is kept only by the rank that holds column 0 of e, so it is added once.
// Cost: one pass over the columns by `threads` (NULL: the caller alone), no allocation. Not for two calls at once on one
// expert.
// Errors: MS_EINVAL e or missing/unexpected bias; MS_ESHAPE with both shapes; MS_EDTYPE.
ms_status ms_experts_pack(ms_experts *experts, int32_t e, int64_t first, int64_t count,
                          const ms_matrix *w_in, const ms_matrix *w_out, const void *b_in,
                          const void *b_out, ms_dtype bias, ms_threads *threads, ms_error *err);

// The inverse: this rank's columns of expert e in the unpacked dtype, contiguous, as packed
// (bit for bit what was packed when the dtypes are equal; MS_I8: within half a scale). Any destination may be NULL.
//   w_in [Fr, D] (gated [2*Fr, D])   w_out [D, Fr]   b_in [Fr] ([2*Fr]) float32   b_out [D] float32
// b_out is written only where the rank holds column 0.
// Cost: as ms_experts_pack. Errors: MS_EINVAL e outside 0..E-1.
ms_status ms_experts_unpack(const ms_experts *experts, int32_t e, void *w_in, void *w_out,
                            float *b_in, float *b_out, ms_threads *threads, ms_error *err);
// The dtype that unpack writes weights in: the storage, MS_F32 for MS_I8.
ms_dtype ms_experts_unpacked(const ms_experts *experts);

// Give expert e's memory back to the system; pages that a neighbour shares stay. Pack it again before
// it is used. Cost: one system call. Errors: MS_EINVAL e outside 0..E-1.
ms_status ms_experts_release(ms_experts *experts, int32_t e, ms_error *err);

// ---- the batch: one forward pass, filled step by step ---------------------------------------------
// Grows to the largest shape seen and never shrinks: no allocation in the steady state.
// Public to read; only the steps write. Not for two threads at once.

typedef struct ms_batch {
  // route (this rank's tokens)
  int64_t T, D;
  int32_t K, E;
  ms_dtype dtype;     // of hidden and out: MS_F32, MS_BF16, MS_F16
  const void *hidden; // [T, D] contiguous, borrowed until combine returns
  void *out;          // [T, D] contiguous, written by combine; NULL: nothing is combined
  int32_t *expert;    // [T, K] owned: expert of each slot; -1 = no expert
  float *weight;      // [T, K] owned
  int64_t layer;      // which layer this is, compared between ranks
  bool replicated;    // all ranks hold the same tokens: nothing is gathered, out = sum over ranks
  // Set after route, borrowed until combine. NULL: every rank holds columns of every expert, once.
  const ms_layout *layout;

  // gather (all ranks' tokens; N = T when replicated or alone)
  int32_t R, rank;
  int64_t N;
  int64_t *first;      // [R+1] owned: rank r's tokens are rows [first[r], first[r+1])
  const void **row;    // [N] owned: each token's D values, wherever they lie
  int32_t *all_expert; // [N, K]
  float *all_weight;   // [N, K]
  // [N, D] where this rank's partial outputs go (memory of the exchange); rows of tokens that it computes nothing of are
  // not written, and not read.
  float *partial;

  // group
  int16_t *copy;  // [N*K] owned: which copy computes a slot; NULL: no expert has more than one
  int64_t *count; // [E] owned: slots of each expert, of all ranks, whoever computes them
  // [E+1] owned: of expert e this rank computes slots order[offset[e] .. offset[e+1]).
  int64_t *offset;
  int32_t *order; // [N*K] owned: slot = token * K + choice, by expert, stable

  int64_t tokens_read, partials_read; // rows of other ranks that ffn and combine read

  // ffn
  // [N*K, D] each choice's own output, where this rank computes it. K = 1: the same memory as partial.
  float *slot;

  struct ms_batch_memory *memory; // what the pointers above point into (private)
} ms_batch;

// Cost: two small allocations. Errors: MS_ENOMEM.
ms_status ms_batch_create(ms_batch **out, ms_error *err);
void ms_batch_free(ms_batch *batch);           // NULL is legal
int64_t ms_batch_bytes(const ms_batch *batch); // memory held

// ---- chapter X: exchange ---------------------------------------------------------------------------
// What every transport fills in is in exchange/exchange.h. All calls are collective.

typedef struct ms_exchange ms_exchange;

// Called about every 50 ms while waiting; nonzero ends the wait with MS_EINTR. May be NULL.
typedef int ms_poll(void *context);

// One rank: nothing travels. Cost: one small allocation. Errors: MS_ENOMEM.
ms_status ms_exchange_one(ms_exchange **out, ms_error *err);

// Ranks of one host, through POSIX shared memory.
//   name     the group's random name ([A-Za-z0-9-]+, the same on all ranks, used once)
//   timeout  seconds that a wait may take, here and in every later call
// The files (/moeshard-<name>-<rank>, mode 0600) are unlinked before this returns, also on failure.
// Cost: two pages of shared memory a rank, some milliseconds; zones grow with the first calls.
// Errors: MS_EINVAL; MS_ENOMEM; MS_ECOMM the file exists or /dev/shm is not usable; MS_ETIMEOUT names
// the ranks that did not come; MS_EINTR.
ms_status ms_exchange_shm(const char *name, int32_t rank, int32_t R, double timeout, ms_poll *poll,
                          void *poll_context, ms_exchange **out, ms_error *err);

void ms_exchange_free(ms_exchange *exchange); // NULL is legal; others then see MS_ELOST
int32_t ms_exchange_rank(const ms_exchange *exchange);
int32_t ms_exchange_ranks(const ms_exchange *exchange);

// In place of the gather (or combine) that the other ranks are in: tell them that this rank cannot take
// part. They return MS_EPEER with "rank r: <msg>"; afterwards all stand before the next call.
// Not after a gather or combine that failed: those have told the others themselves.
// Cost: as a gather without tokens. Errors: MS_ELOST, MS_ETIMEOUT, MS_EINTR, MS_ECOMM: they could not be told.
ms_status ms_exchange_refuse(ms_exchange *exchange, const char *msg, ms_error *err);

// What ranks tell each other before a call, and check alike on all of them.
typedef struct ms_header {
  uint64_t call; // number of this call on this exchange
  int64_t layer, T, D, K, E;
  int32_t dtype, replicated;
  uint64_t
      digest; // of the routing, when replicated (0 otherwise): the same tokens must be the same
  uint64_t layout; // digest of the table; 0 without one
} ms_header;

void ms_header_fill(const ms_batch *batch, uint64_t call, ms_header *out);
// The same verdict on every rank. Cost: O(R). Errors: MS_EINVAL R; MS_EMISMATCH naming the field, the ranks and both values.
ms_status ms_header_check(const ms_header *headers, int32_t R, ms_error *err);

// ---- chapter 1: route -------------------------------------------------------------------------------
// Take the router's choices for this rank's tokens.
//   hidden  [T, D] dtype, contiguous (borrowed until ms_combine returns)
//   index   [T, K] index_dtype (MS_I32 or MS_I64), contiguous; -1 = no expert; copied
//   weight  [T, K] weight_dtype (MS_F32, MS_BF16, MS_F16), contiguous; copied
//   out     [T, D] dtype, contiguous, not overlapping hidden; NULL: only gather is wanted (so a rank
//           without tokens passes some address if the others pass an out)
// A route that fails leaves the batch empty.
// Cost: O(T*K); allocates only when the shape grows.
// Errors: MS_EINVAL; MS_EDTYPE; MS_ERANGE an index outside -1..E-1 or a weight that is not finite
// (says token, choice and value; the weight of a -1 slot is not looked at).
ms_status ms_route(ms_batch *batch, const void *hidden, ms_dtype dtype, const void *index,
                   ms_dtype index_dtype, const void *weight, ms_dtype weight_dtype, int64_t T,
                   int64_t D, int32_t K, int32_t E, void *out, ms_error *err);

// What a Switch router makes of its probabilities: each token's best expert (the first of equals; a NaN is the largest),
// unless `capacity` tokens before it in its sequence chose the same.
//   probability  [T, E] dtype (MS_F32, MS_BF16, MS_F16), contiguous (borrowed until the call returns)
//   S            tokens of a sequence, which divides T
//   mask         [T, E] out: 1 for the expert of a token that has room, 0 else
//   best         [T] out, dtype: the largest probability, room or not
// Cost: O(T*E), one pass, no allocation. Errors: MS_EINVAL; MS_ESHAPE; MS_EDTYPE.
// Source: transformers 5.23.0, modeling_switch_transformers.py, SwitchTransformersTop1Router.
ms_status ms_route_top1(const void *probability, ms_dtype dtype, int64_t T, int32_t E, int64_t S,
                        int64_t capacity, int64_t *mask, void *best, ms_error *err);

// ---- chapter 2: gather ------------------------------------------------------------------------------
// All-gather tokens and choices. Index and weight travel with the tokens; every rank recounts them itself.
// Cost: one copy of this rank's tokens into shared memory; peers' tokens are read in place through batch->row.
// Errors: MS_EMISMATCH, MS_EPEER, MS_ELOST, MS_ETIMEOUT, MS_EINTR, MS_ENOMEM.
ms_status ms_gather(ms_batch *batch, ms_exchange *exchange, ms_error *err);

// The same from memory that a caller's own transport has filled (torch.distributed, MPI ...).
//   tokens  [R] tokens of each rank;  hidden [N, D], index [N, K], weight [N, K]: rank order, contiguous,
//   borrowed until the next ms_route. Replicated: N = T, and tokens is not 0 for this rank only.
// Cost: O(N) row pointers, no copy. Errors: MS_EINVAL tokens[rank] != T; MS_ENOMEM.
ms_status ms_gather_from(ms_batch *batch, int32_t rank, int32_t R, const int64_t *tokens,
                         const void *hidden, const int32_t *index, const float *weight,
                         ms_error *err);

// The same for a sparse layout, where a token goes only to the ranks that compute one of its slots. First the routing
// of all ranks; then each rank knows which rows go where; then those rows.
//   index, weight   as above, borrowed until the next ms_route
// Cost: O(N*K). Errors: as ms_gather_from; MS_ESHAPE a layout of other ranks or experts.
ms_status ms_gather_routing(ms_batch *batch, int32_t rank, int32_t R, const int64_t *tokens,
                            const int32_t *index, const float *weight, ms_error *err);
// The tokens of rank `source` that rank `reader` computes something of, ascending, counted from the source's first
// (replicated: of all tokens, whatever the source). Without a sparse layout: all.
//   token   [returned] or NULL: only count
// Returns how many there are. Cost: O(tokens of source * K), no allocation.
int64_t ms_gather_needed(const ms_batch *batch, int32_t source, int32_t reader, int32_t *token);
// Then the rows: those of each other rank that this one needs, in rank and token order, contiguous, borrowed until the
// next ms_route. Own rows are read from hidden. Cost: O(N*K), no copy, no allocation.
void ms_gather_received(ms_batch *batch, const void *hidden);

// ---- chapter 3: group --------------------------------------------------------------------------------
// Sort the slots that this rank computes by expert: one stable counting sort. Tokens are not moved.
// Cost: O(N*K + E). Errors: MS_ENOMEM; MS_ERANGE a gathered index outside -1..E-1; MS_EINVAL N*K >= 2^31; MS_ESHAPE a
// layout of other ranks or experts.
// Source: arXiv 2503.08467, algorithm 1; deviation: counting sort instead of one pass per expert.
ms_status ms_group(ms_batch *batch, ms_error *err);

// ---- chapter 4: ffn ----------------------------------------------------------------------------------
// Both matrices of every expert on this rank's columns: slot[s] = weight[s] * ffn_e(row[s / K]).
// Every slot that group has sorted is written.
// Same bits for any number of threads, and for a token whatever its neighbours are. fp32 arithmetic, but bf16 tokens with
// bf16 weights may be multiplied as they are, the rows between the matrices rounded to bf16 (docs/numerics.md).
// Cost: 2*D*Fr*(gated ? 3 : 2) flops a slot; every hit expert's weights are read once per 1024 slots.
// Errors: MS_ESHAPE experts of another D or E; MS_ENOMEM.
ms_status ms_ffn(ms_batch *batch, const ms_experts *experts, ms_threads *threads, ms_error *err);

// ---- chapter 5: combine --------------------------------------------------------------------------------
// out[t] = sum over ranks (in rank order) of the sum over choices (in choice order) of the slots that a rank computes.
// Ranks that compute nothing of a token are skipped: the same bits as with their zeros, but for the sign of a zero.
// With batch->out NULL it only closes the call (every gather needs its combine).
// Cost: at most K*N*D + R*T*D additions. Errors: as ms_gather.
ms_status ms_combine(ms_batch *batch, ms_exchange *exchange, ms_threads *threads, ms_error *err);

// The two halves for a caller's own transport. First sum the choices into batch->partial [N, D].
// Cost: K*N*D additions, no allocation. Errors: MS_EINVAL nothing gathered, or ffn has not run.
ms_status ms_combine_choices(ms_batch *batch, ms_threads *threads, ms_error *err);
// Then out[t] = sum_r parts[r][t] over parts [R][T, D] float32, in rank order.
//   packed   with a sparse layout: the parts of other ranks have only the rows of tokens that those computed something of
//            (ms_gather_needed(batch, rank, r, ...)), one after the other
// Cost: at most R*T*D additions; no allocation, but R*T*4 bytes the first time when packed. Errors: MS_EINVAL R; MS_ENOMEM.
ms_status ms_combine_ranks(ms_batch *batch, const float *const *parts, int32_t R, bool packed,
                           ms_threads *threads, ms_error *err);

// ---- the slow twins --------------------------------------------------------------------------------------
// reference.c: the formula at the top of this file, in double, one token at a time. For tests.
//   w_in [E, F, D] ([E, 2F, D]), w_out [E, D, F], b_in [E, F] ([E, 2F]) or NULL, b_out [E, D] or NULL: float32
void ms_reference_layer(const float *hidden, const int32_t *index, const float *weight, int64_t T,
                        int64_t D, int32_t K, int32_t E, int64_t F, const float *w_in,
                        const float *w_out, const float *b_in, const float *b_out,
                        ms_activation activation, bool gated, double *out);
void ms_reference_group(const int32_t *index, int64_t slots, int32_t E, int64_t *offset,
                        int32_t *order);
// Which copy computes each of the slots [slots] of one expert, -1 for those of others: the rule of chapter P.
//   home   [slots] the copy of e that the slot's own rank is in, -1: none;  copies of e, at least 1
void ms_reference_deal(const int32_t *index, const int32_t *home, int64_t slots, int32_t e,
                       int32_t copies, int32_t *copy);

// ---- the planner: what a table costs, and which one to take (csrc/plan) ----------------------------------
// Predicted times, from a description of the machine and of the routing: csrc/plan/cost.c says how.

typedef struct ms_link { // between two ranks, one direction
  double latency;        // seconds of a message of no bytes
  double message;        // seconds more for each further message at the same time
  double bandwidth;      // bytes per second of one rank; INFINITY is legal
} ms_link;

// The machine. Arrays are borrowed, [R]. Ranks of one host have consecutive numbers.
typedef struct ms_cluster {
  int32_t R;
  const double *flops;     // peak flops per second of each rank, for the dtype of the layer
  const double *bandwidth; // bytes per second that a rank reads from its memory when it is alone
  const double *memory;    // bytes that its weights may take; INFINITY: no limit
  const int32_t *host;     // number of its host, not descending
  double
      host_bandwidth; // bytes per second that all ranks of a host read together; INFINITY: each has its own
  ms_link inside, between; // ranks of one host, of different hosts
  double step;             // seconds that each of the five steps costs whatever its size
  double expert;           // seconds that each expert with rows costs a rank
  double slot;             // seconds of group, for each (token, choice)
  double router;           // seconds that the model's router costs whatever its size
  double logit;           // seconds of route, for each (token, expert), beside the router's product
  double flops_share;     // of the peak, that large products reach
  double bandwidth_share; // of the bandwidth, that streaming weights reaches
  double idle_rows;       // an expert's rows cost arithmetic as if they were so many more
  int64_t panel;          // columns are computed and stored in multiples of this many
} ms_cluster;

// A layer and what its tokens do. Arrays are borrowed.
typedef struct ms_moe_layer {
  int32_t E, K;
  int64_t D, F;
  int32_t matrices;     // of D x F weights in an expert: 2, gated 3
  int32_t weight_size;  // bytes of a stored weight
  int32_t token_size;   // bytes of an element of a token
  const double *tokens; // [R] tokens of each rank
  const double *load;   // [E] (token, choice) pairs of all ranks that want each expert
  bool
      exact; // load is the count of one batch; else the mean over batches, each token choosing at random
} ms_moe_layer;

typedef struct ms_cost { // seconds, of the slowest rank
  double route, gather, group, ffn, combine, total;
  bool
      sparse; // the exchange is all-to-all: a token goes to the ranks that hold one of its experts, not to all
} ms_cost;

// What each rank does: arrays [R] of the caller; any may be NULL.
typedef struct ms_rank_costs {
  double *ffn;      // seconds of group and ffn
  double *memory;   // bytes of weights
  double *gathered; // bytes that arrive in gather
  double *combined; // bytes that arrive in combine
} ms_rank_costs;

// Predict the time of one layer under any table that is correct (ms_plan_check).
// A copy of an expert gets 1/c of its tokens, those of its own ranks first.
// Cost: O(R * E), allocates as much. Errors: MS_EINVAL a number that is not positive or not finite where it must be, or
// sizes that do not fit; MS_ENOMEM.
ms_status ms_plan_cost(const ms_plan *plan, const ms_cluster *cluster, const ms_moe_layer *layer,
                       ms_cost *out, const ms_rank_costs *ranks, ms_error *err);

typedef enum ms_layout_kind { // of simple ones first: the first of equals is taken
  MS_LAYOUT_SHARD = 0,        // every expert over every rank, near-equal widths
  MS_LAYOUT_UNEVEN,           // the same, widths by the speed of the ranks
  MS_LAYOUT_EXPERT,           // each expert whole on one rank, contiguous blocks
  MS_LAYOUT_BALANCED, // the same, the longest experts first, each to the rank that is done first (LPT)
  MS_LAYOUT_HYBRID,      // groups of ranks in the place of ranks; inside, experts are cut
  MS_LAYOUT_HOT_SHARDED, // the hottest experts over all ranks, the others as above
  MS_LAYOUT_HOT_COPIED,  // the hottest experts once for every hot_group ranks, the others as above
  MS_LAYOUT_MIXED, // found by looking at every table (tiny layers only); copies only if those are wanted
  MS_LAYOUT_KINDS
} ms_layout_kind;

typedef struct ms_candidate { // the best of its kind (of its kind and group, for MS_LAYOUT_HYBRID)
  ms_layout_kind kind;
  int32_t group;     // ranks that share an expert
  int32_t hot;       // experts that are placed otherwise
  int32_t hot_group; // ranks that share one copy of such an expert
  bool fits;         // into the memory of every rank
  double memory;     // bytes on the fullest rank
  ms_cost cost;
} ms_candidate;

enum { MS_CANDIDATES = 64 };

// Find the layout with the least predicted time that fits. `kinds` is a mask of 1 << ms_layout_kind.
//   out         the table; owned by the caller afterwards
//   candidates  [MS_CANDIDATES]; count of them are filled, chosen is the index of the one in out
//   proven      every table was looked at: there is none with a smaller prediction. May be NULL. Sizes up to E = 6, R = 3, with
//               widths in quarters of F
// Cost: some 100 tables are built and predicted, each O(parts). E=128, R=8: some ms; E=2048, R=1024: seconds.
// Errors: as ms_plan_cost; MS_ERANGE nothing fits, with the bytes that the smallest layout needs.
ms_status ms_plan_search(const ms_cluster *cluster, const ms_moe_layer *layer, uint32_t kinds,
                         ms_plan *out, ms_candidate *candidates, int32_t *count, int32_t *chosen,
                         bool *proven, ms_error *err);

typedef struct ms_simulation {
  int32_t steps; // how many times the layer runs
  int32_t
      chunks; // the tokens come in so many pieces; a piece travels while another is computed. 1: no overlap
  double jitter; // each rank's ffn takes exp(jitter * normal) times its prediction
  double slow_chance,
      slow_factor; // of a rank in a step, to be a straggler, and how many times slower it is then
  bool drift;      // which experts are popular changes with every step: loads change places
  uint64_t seed;
} ms_simulation;

// Run a layer many times on paper: every step draws its own routing from the loads (Poisson, each expert by itself).
//   seconds  [steps] time of each step
//   busy     mean share of the ranks' time that ffn takes. May be NULL
// The same seed gives the same numbers on every machine with the same C library.
// Cost: steps * O(parts), allocates O(parts). Errors: as ms_plan_cost; MS_EINVAL a bad number of the simulation.
ms_status ms_plan_simulate(const ms_plan *plan, const ms_cluster *cluster,
                           const ms_moe_layer *layer, const ms_simulation *simulation,
                           double *seconds, double *busy, ms_error *err);

#ifdef __cplusplus
}
#endif
#endif
