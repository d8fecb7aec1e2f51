// step1_route.c - route: take the router's choices for this rank's tokens, and refuse bad ones.
//
// The choices come from the model's own router, in its dtypes; every later step reads int32 and float32. What a Switch
// router does after its softmax, in one pass, is here too.
//
// SPDX-License-Identifier: Apache-2.0
#include "base/memory.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

// One loop per index dtype, one pass: convert and find the worst offender without a branch in the loop.
#define IMPORT_INDEX(type)                                                                         \
  const type *from = index;                                                                        \
  bool bad = false;                                                                                \
  for (int64_t i = 0; i < n; i++) {                                                                \
    bad |= from[i] < -1 || from[i] >= E;                                                           \
    to[i] = (int32_t)from[i];                                                                      \
  }                                                                                                \
  if (!bad) return MS_OK;                                                                          \
  int64_t i = 0;                                                                                   \
  while (from[i] >= -1 && from[i] < E) i++;                                                        \
  return ms_fail(err, MS_ERANGE,                                                                   \
                 "top_k_index[%lld, %lld]: got %lld, expected -1 (no expert) to %d",               \
                 (long long)(i / K), (long long)(i % K), (long long)from[i], E - 1);

static ms_status import_index_i32(const void *index, int64_t n, int32_t K, int32_t E, int32_t *to,
                                  ms_error *err) {
  IMPORT_INDEX(int32_t)
}

static ms_status import_index_i64(const void *index, int64_t n, int32_t K, int32_t E, int32_t *to,
                                  ms_error *err) {
  IMPORT_INDEX(int64_t)
}

static ms_status check_weights(const float *weight, const int32_t *expert, int64_t n, int32_t K,
                               ms_error *err) {
  for (int64_t i = 0; i < n; i++)
    if (expert[i] >= 0 && !isfinite(weight[i]))
      return ms_fail(err, MS_ERANGE, "top_k_weights[%lld, %lld]: got %g, expected a finite number",
                     (long long)(i / K), (long long)(i % K), (double)weight[i]);
  return MS_OK;
}

static ms_status import_weights(const void *weight, ms_dtype dtype, int64_t n, float *to,
                                ms_error *err) {
  const ms_kernels *kernels = ms_kernels_get();
  switch (dtype) {
  case MS_F32:
    for (int64_t i = 0; i < n; i++) to[i] = ((const float *)weight)[i];
    return MS_OK;
  case MS_BF16:
    kernels->widen_bf16(weight, to, n);
    return MS_OK;
  case MS_F16:
    kernels->widen_f16(weight, to, n);
    return MS_OK;
  case MS_I32:
  case MS_I64:
  case MS_I8:
    break;
  }
  return ms_fail(err, MS_EDTYPE, "top_k_weights: got %s, expected float32, bfloat16 or float16",
                 ms_dtype_name(dtype));
}

ms_status ms_route(ms_batch *batch, const void *hidden, ms_dtype dtype, const void *index,
                   ms_dtype index_dtype, const void *weight, ms_dtype weight_dtype, int64_t T,
                   int64_t D, int32_t K, int32_t E, void *out, ms_error *err) {
  struct ms_batch_memory *memory = batch->memory;
  *batch = (ms_batch){.memory = memory}; // a failed route leaves nothing of an earlier one
  if (T < 0 || D < 1)
    return ms_fail(err, MS_ESHAPE, "hidden_states: got [%lld, %lld], expected [T >= 0, D >= 1]",
                   (long long)T, (long long)D);
  if (K < 0 || K > MS_MAX_CHOICES)
    return ms_fail(err, MS_ESHAPE, "top_k_index: got K=%d choices, expected 0 to %d", K,
                   MS_MAX_CHOICES);
  if (E < 1 || E > MS_MAX_EXPERTS)
    return ms_fail(err, MS_EINVAL, "num_experts: got %d, expected 1 to %d", E, MS_MAX_EXPERTS);
  if (dtype != MS_F32 && dtype != MS_BF16 && dtype != MS_F16)
    return ms_fail(err, MS_EDTYPE, "hidden_states: got %s, expected float32, bfloat16 or float16",
                   ms_dtype_name(dtype));
  if (index_dtype != MS_I32 && index_dtype != MS_I64)
    return ms_fail(err, MS_EDTYPE, "top_k_index: got %s, expected int32 or int64",
                   ms_dtype_name(index_dtype));

  int64_t n = T * K;
  MS_TRY(ms_buffer_grow(&memory->expert, n * (int64_t)sizeof(int32_t), "top_k_index", err));
  MS_TRY(ms_buffer_grow(&memory->weight, n * (int64_t)sizeof(float), "top_k_weights", err));
  int32_t *expert = memory->expert.data;
  if (index_dtype == MS_I32)
    MS_TRY(import_index_i32(index, n, K, E, expert, err));
  else
    MS_TRY(import_index_i64(index, n, K, E, expert, err));
  MS_TRY(import_weights(weight, weight_dtype, n, memory->weight.data, err));
  MS_TRY(check_weights(memory->weight.data, expert, n, K, err));

  *batch = (ms_batch){.T = T,
                      .D = D,
                      .K = K,
                      .E = E,
                      .dtype = dtype,
                      .hidden = hidden,
                      .out = out,
                      .expert = expert,
                      .weight = memory->weight.data,
                      .memory = memory};
  return MS_OK;
}

// The first of the largest; a NaN is larger than all else, as in torch.
static int32_t best_of(const void *row, ms_dtype dtype, int32_t E) {
  enum { AT_ONCE = 256 }; // 1 KiB of stack
  const ms_kernels *kernels = ms_kernels_get();
  float wide[AT_ONCE], top = 0;
  int32_t best = -1;
  for (int32_t first = 0; first < E; first += AT_ONCE) {
    int32_t n = E - first < AT_ONCE ? E - first : AT_ONCE;
    const float *p = wide;
    if (dtype == MS_F32)
      p = (const float *)row + first;
    else if (dtype == MS_BF16)
      kernels->widen_bf16((const uint16_t *)row + first, wide, n);
    else
      kernels->widen_f16((const uint16_t *)row + first, wide, n);
    if (best < 0) best = 0, top = p[0];
    for (int32_t i = 0; i < n; i++) {
      if (p[i] <= top || isnan(top)) continue;
      top = p[i];
      best = first + i;
    }
  }
  return best;
}

ms_status ms_route_top1(const void *probability, ms_dtype dtype, int64_t T, int32_t E, int64_t S,
                        int64_t capacity, int64_t *mask, void *best, ms_error *err) {
  if (E < 1 || E > MS_MAX_EXPERTS)
    return ms_fail(err, MS_EINVAL, "num_experts: got %d, expected 1 to %d", E, MS_MAX_EXPERTS);
  if (T < 0 || S < 1 || T % S)
    return ms_fail(err, MS_ESHAPE, "sequence: got %lld, which does not divide %lld tokens",
                   (long long)S, (long long)T);
  if (dtype != MS_F32 && dtype != MS_BF16 && dtype != MS_F16)
    return ms_fail(err, MS_EDTYPE, "probabilities: got %s, expected float32, bfloat16 or float16",
                   ms_dtype_name(dtype));

  size_t size = (size_t)ms_dtype_size(dtype);
  memset(mask, 0, (size_t)(T * E) * sizeof *mask);
  for (int64_t t = 0; t < T; t++) {
    // Until its own turn, the row of a sequence's last token counts what each expert got.
    int64_t *count = mask + (t - t % S + S - 1) * E;
    const char *row = (const char *)probability + (size_t)(t * E) * size;
    int32_t e = best_of(row, dtype, E);
    bool kept = ++count[e] <= capacity;
    if (t % S == S - 1) memset(count, 0, (size_t)E * sizeof *count);
    mask[t * E + e] = kept;
    memcpy((char *)best + (size_t)t * size, row + (size_t)e * size, size);
  }
  return MS_OK;
}
