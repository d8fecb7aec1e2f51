// test_layer.c - route, group, ffn and combine on one rank against the double-precision twin: every storage,
// activation and option, odd sizes, empty experts, any thread count, every instruction set (MOESHARD_ISA).
// SPDX-License-Identifier: Apache-2.0
#include "check.h"
#include "moeshard.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t seed = 88172645463325252u;

static float uniform(void) { // in [-1, 1)
  seed ^= seed << 13;
  seed ^= seed >> 7;
  seed ^= seed << 17;
  return (float)((double)(seed >> 11) * 0x1p-52 - 1.0);
}

static float *random_floats(int64_t n, float scale) {
  float *x = malloc((size_t)(n + 1) * sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = scale * uniform();
  return x;
}

static uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float from_bf16(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

typedef struct problem {
  int64_t T, D, F;
  int32_t K, E;
  ms_activation activation;
  bool gated, b_in, b_out;
  float *hidden, *weight, *w_in, *w_out, *bias_in, *bias_out;
  int32_t *index;
  double *expected;
} problem;

static float largest(const float *x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i]));
  return most;
}

// Rows of length K as int8 keeps them: integers times a scale of the row.
static void round_to_int8(float *w, int64_t rows, int64_t K) {
  for (float *end = w + rows * K; w < end; w += K) {
    double scale = largest(w, K) / 127;
    for (int64_t k = 0; k < K; k++) w[k] = (float)(scale * rint(w[k] / scale));
  }
}

// The weights as `storage` keeps them, so that what is left to compare is float32 arithmetic.
static void round_weights(problem *p, ms_dtype storage) {
  float *const tensors[] = {p->w_in, p->w_out};
  const int64_t sizes[] = {p->E * (p->gated ? 2 : 1) * p->F * p->D, p->E * p->F * p->D};
  for (int i = 0; i < 2; i++)
    for (int64_t j = 0; j < sizes[i]; j++) {
      float *w = &tensors[i][j];
      if (storage == MS_BF16) *w = from_bf16(to_bf16(*w));
      if (storage == MS_F16) *w = (float)(_Float16)*w;
    }
  if (storage == MS_I8) {
    round_to_int8(p->w_in, p->E * (p->gated ? 2 : 1) * p->F, p->D);
    round_to_int8(p->w_out, p->E * p->D, p->F);
  }
  ms_reference_layer(p->hidden, p->index, p->weight, p->T, p->D, p->K, p->E, p->F, p->w_in,
                     p->w_out, p->bias_in, p->bias_out, p->activation, p->gated, p->expected);
}

static problem make(int64_t T, int64_t D, int64_t F, int32_t K, int32_t E, ms_activation activation,
                    bool gated, bool biases) {
  problem p = {.T = T, .D = D, .F = F, .K = K, .E = E, .activation = activation, .gated = gated};
  p.b_in = p.b_out = biases;
  int64_t rows = gated ? 2 * F : F;
  p.hidden = random_floats(T * D, 1);
  p.weight = random_floats(T * K, 1);
  p.w_in = random_floats(E * rows * D, 1 / sqrtf((float)D));
  p.w_out = random_floats(E * D * F, 1 / sqrtf((float)F));
  p.bias_in = biases ? random_floats(E * rows, 0.5f) : NULL;
  p.bias_out = biases ? random_floats(E * D, 0.5f) : NULL;
  p.index = malloc((size_t)(T * K + 1) * sizeof *p.index);
  for (int64_t i = 0; i < T * K; i++) {
    p.index[i] = (int32_t)((uniform() + 1) / 2 * (float)(E + 1)) - 1; // -1 too
    if (p.index[i] == E / 2 && E > 2) p.index[i] = 0; // one expert stays empty, one is hot
  }
  p.expected = malloc((size_t)(T * D + 1) * sizeof *p.expected);
  round_weights(&p, MS_F32);
  return p;
}

static void free_problem(problem *p) {
  free(p->hidden);
  free(p->weight);
  free(p->w_in);
  free(p->w_out);
  free(p->bias_in);
  free(p->bias_out);
  free(p->index);
  free(p->expected);
}

// Columns [start, stop) of every expert, from slices that begin at `first`.
static ms_experts *pack(const problem *p, ms_dtype storage, int64_t start, int64_t stop) {
  ms_error err = {0};
  int64_t *columns = malloc((size_t)p->E * 2 * sizeof *columns);
  for (int32_t e = 0; e < p->E; e++) {
    columns[2 * e] = start;
    columns[2 * e + 1] = stop;
  }
  ms_experts_spec spec = {p->E,     p->D,    p->F,     storage, p->activation,
                          p->gated, p->b_in, p->b_out, columns, false};
  ms_experts *x = NULL;
  CHECK(ms_experts_create(&spec, &x, &err) == MS_OK);
  free(columns);
  int64_t rows = p->gated ? 2 * p->F : p->F;
  for (int32_t e = 0; e < p->E; e++) {
    ms_matrix w_in = {p->w_in + e * rows * p->D, MS_F32, rows, p->D, p->D, 1};
    ms_matrix w_out = {p->w_out + e * p->D * p->F, MS_F32, p->D, p->F, p->F, 1};
    CHECK(ms_experts_pack(x, e, 0, p->F, &w_in, &w_out, p->b_in ? p->bias_in + e * rows : NULL,
                          p->b_out ? p->bias_out + e * p->D : NULL, MS_F32, NULL, &err) == MS_OK);
  }
  return x;
}

// Two passes over the layer; hidden and out are of `dtype`.
static void run_as(const problem *p, ms_dtype dtype, const void *hidden, void *out, ms_experts *x,
                   int32_t thread_count) {
  ms_error err = {0};
  ms_threads *threads = NULL;
  ms_batch *batch = NULL;
  ms_exchange *one = NULL;
  CHECK(ms_threads_create(thread_count, &threads, &err) == MS_OK);
  CHECK(ms_batch_create(&batch, &err) == MS_OK);
  CHECK(ms_exchange_one(&one, &err) == MS_OK);
  for (int pass = 0; pass < 2; pass++) { // the second on used memory
    CHECK(ms_route(batch, hidden, dtype, p->index, MS_I32, p->weight, MS_F32, p->T, p->D, p->K,
                   p->E, out, &err) == MS_OK);
    CHECK(ms_gather(batch, one, &err) == MS_OK);
    CHECK(ms_group(batch, &err) == MS_OK);
    CHECK(ms_ffn(batch, x, threads, &err) == MS_OK);
    CHECK(ms_combine(batch, one, threads, &err) == MS_OK);
  }
  ms_exchange_free(one);
  ms_batch_free(batch);
  ms_threads_free(threads);
}

static float *run(const problem *p, ms_experts *x, int32_t thread_count) {
  float *out = malloc((size_t)(p->T * p->D + 1) * sizeof *out);
  for (int64_t i = 0; i < p->T * p->D; i++) out[i] = NAN; // every output must be written
  run_as(p, MS_F32, p->hidden, out, x, thread_count);
  return out;
}

// p->hidden must hold bf16 values. The tokens are copied, so that reading past the last one is seen.
static uint16_t *run_bf16(const problem *p, ms_experts *x, int32_t thread_count) {
  int64_t n = p->T * p->D;
  uint16_t *hidden = malloc((size_t)n * 2), *out = malloc((size_t)n * 2);
  for (int64_t i = 0; i < n; i++) {
    hidden[i] = to_bf16(p->hidden[i]);
    out[i] = 0xffff; // NaN
  }
  run_as(p, MS_BF16, hidden, out, x, thread_count);
  free(hidden);
  return out;
}

static void check_problem(int64_t T, int64_t D, int64_t F, int32_t K, int32_t E,
                          ms_activation activation, bool gated, bool biases) {
  problem p = make(T, D, F, K, E, activation, gated, biases);
  const ms_dtype storages[] = {MS_F32, MS_F16, MS_BF16,
                               MS_I8}; // each rounds the weights of the one before
  for (int i = 0; i < 4; i++) {
    round_weights(&p, storages[i]);
    ms_experts *x = pack(&p, storages[i], 0, F);
    float *one = run(&p, x, 1), *three = run(&p, x, 3);
    double error = check_relative_difference(one, p.expected, T * D);
    CHECK_THAT(error <= 2e-6, "T=%lld D=%lld F=%lld K=%d E=%d act=%d gated=%d %s: error %.2e",
               (long long)T, (long long)D, (long long)F, K, E, (int)activation, gated,
               ms_dtype_name(storages[i]), error);
    CHECK(memcmp(one, three, (size_t)(T * D) * sizeof *one) == 0); // same bits for any thread count
    free(one);
    free(three);
    ms_experts_free(x);
  }
  free_problem(&p);
}

static void layers_equal_the_reference(void) {
  for (ms_activation a = MS_IDENTITY; a < MS_ACTIVATION_COUNT; a++)
    for (int gated = a == MS_CLAMPED_SWIGLU; gated < 2; gated++)
      for (int biases = 0; biases < 2; biases++) check_problem(23, 40, 37, 2, 5, a, gated, biases);
  const int64_t sizes[][3] = {{0, 8, 8},     {1, 1, 1},     {1, 64, 64},  {2, 17, 33},
                              {7, 65, 31},   {64, 48, 96},  {13, 96, 16}, {97, 160, 100},
                              {5, 801, 770}, {33, 16, 1000}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (int32_t K = 1; K <= 4; K += K) {
      check_problem(sizes[i][0], sizes[i][1], sizes[i][2], K, 1, MS_RELU, false, true);
      check_problem(sizes[i][0], sizes[i][1], sizes[i][2], K, 8, MS_GELU, false, false);
      check_problem(sizes[i][0], sizes[i][1], sizes[i][2], K, 3, MS_SILU, true, i % 2 == 0);
      check_problem(sizes[i][0], sizes[i][1], sizes[i][2], K, 2, MS_CLAMPED_SWIGLU, true, true);
    }
  check_problem(2500, 16, 24, 1, 2, MS_RELU, false, false);  // several waves, one hot expert
  check_problem(1025, 16, 24, 1, 1, MS_RELU, false, false);  // one row over a wave
  check_problem(40, 768, 3072, 1, 3, MS_RELU, false, false); // the contract's size
}

static void a_token_does_not_depend_on_its_neighbours(void) {
  problem p = make(61, 100, 70, 2, 3, MS_GELU, false, true);
  const ms_dtype storages[] = {MS_F32, MS_BF16, MS_F16, MS_I8};
  for (int i = 0; i < 4; i++) {
    ms_experts *x = pack(&p, storages[i], 0, p.F);
    float *all = run(&p, x, 2);
    for (int64_t t = 0; t < p.T; t += 7) {
      problem single = p;
      single.T = 1;
      single.hidden += t * p.D;
      single.index += t * p.K;
      single.weight += t * p.K;
      float *alone = run(&single, x, 1);
      CHECK(memcmp(alone, all + t * p.D, (size_t)p.D * sizeof *alone) == 0);
      free(alone);
    }
    free(all);
    ms_experts_free(x);
  }
  free_problem(&p);
}

static void slices_add_up_to_the_whole(void) {
  problem p = make(29, 50, 37, 2, 4, MS_SILU, true, true);
  const int64_t cuts[] = {0, 10, 10, 19, 37}; // one empty, one odd
  double *sum = calloc((size_t)(p.T * p.D), sizeof *sum);
  for (int i = 0; i < 4; i++) {
    ms_experts *x = pack(&p, MS_F32, cuts[i], cuts[i + 1]);
    float *part = run(&p, x, 2);
    for (int64_t j = 0; j < p.T * p.D; j++) sum[j] += (double)part[j];
    free(part);
    ms_experts_free(x);
  }
  float *total = malloc((size_t)(p.T * p.D) * sizeof *total);
  for (int64_t j = 0; j < p.T * p.D; j++) total[j] = (float)sum[j];
  CHECK_CLOSE(total, p.expected, p.T * p.D, 2e-6);
  free(total);
  free(sum);
  free_problem(&p);
}

static void sixteen_bit_tokens_are_widened_and_narrowed(void) {
  problem p = make(19, 48, 40, 2, 3, MS_RELU, false, false);
  uint16_t *hidden = malloc((size_t)(p.T * p.D) * 2), *out = malloc((size_t)(p.T * p.D) * 2);
  for (int64_t i = 0; i < p.T * p.D; i++) {
    hidden[i] = to_bf16(p.hidden[i]);
    p.hidden[i] = from_bf16(hidden[i]);
  }
  ms_reference_layer(p.hidden, p.index, p.weight, p.T, p.D, p.K, p.E, p.F, p.w_in, p.w_out, NULL,
                     NULL, p.activation, p.gated, p.expected);
  ms_error err;
  ms_experts *x = pack(&p, MS_F32, 0, p.F);
  ms_batch *batch;
  ms_exchange *one;
  int64_t *index = malloc((size_t)(p.T * p.K) * sizeof *index); // and int64 indices
  for (int64_t i = 0; i < p.T * p.K; i++) index[i] = p.index[i];
  CHECK(ms_batch_create(&batch, &err) == MS_OK && ms_exchange_one(&one, &err) == MS_OK);
  CHECK(ms_route(batch, hidden, MS_BF16, index, MS_I64, p.weight, MS_F32, p.T, p.D, p.K, p.E, out,
                 &err) == MS_OK);
  CHECK(ms_gather(batch, one, &err) == MS_OK && ms_group(batch, &err) == MS_OK);
  CHECK(ms_ffn(batch, x, NULL, &err) == MS_OK && ms_combine(batch, one, NULL, &err) == MS_OK);
  for (int64_t i = 0; i < p.T * p.D; i++) {
    double got = (double)from_bf16(out[i]);
    CHECK(fabs(got - p.expected[i]) <= fabs(p.expected[i]) * 0x1.02p-8 + 1e-6);
  }
  ms_exchange_free(one);
  ms_batch_free(batch);
  ms_experts_free(x);
  free(index);
  free(hidden);
  free(out);
  free_problem(&p);
}

// With bf16 weights too, H may be rounded to bf16 (docs/numerics.md). Without negative numbers all terms of an output are
// positive, so that its relative error is at most that of its two roundings, 2^-8 each, and a little of fp32 (2^-16).
static void bf16_layers_round_twice_at_most(int64_t T, int64_t D, int64_t F, int32_t K, int32_t E,
                                            ms_activation activation, bool gated, bool biases) {
  problem p = make(T, D, F, K, E, activation, gated, biases);
  float *const tensors[] = {p.hidden, p.weight, p.w_in, p.w_out, p.bias_in, p.bias_out};
  const int64_t rows = gated ? 2 * F : F;
  const int64_t sizes[] = {T * D, T * K, E * rows * D, E * D * F, E * rows, E * D};
  for (int i = 0; i < 6; i++)
    for (int64_t j = 0; tensors[i] && j < sizes[i]; j++) tensors[i][j] = fabsf(tensors[i][j]);
  for (int64_t i = 0; i < T * D; i++) p.hidden[i] = from_bf16(to_bf16(p.hidden[i]));
  round_weights(&p, MS_BF16);
  ms_experts *x = pack(&p, MS_BF16, 0, F);
  uint16_t *one = run_bf16(&p, x, 1), *three = run_bf16(&p, x, 3);
  for (int64_t i = 0; i < T * D; i++) {
    double got = (double)from_bf16(one[i]);
    CHECK_THAT(fabs(got - p.expected[i]) <= p.expected[i] * (0x1p-7 + 0x1p-15),
               "T=%lld D=%lld F=%lld K=%d act=%d gated=%d: %g, expected %g", (long long)T,
               (long long)D, (long long)F, K, (int)activation, gated, got, p.expected[i]);
  }
  CHECK(memcmp(one, three, (size_t)(T * D) * 2) == 0); // same bits for any thread count
  for (int64_t t = 0; t < T; t += 5) {                 // and for any neighbours
    problem single = p;
    single.T = 1;
    single.hidden += t * D;
    single.index += t * K;
    single.weight += t * K;
    uint16_t *alone = run_bf16(&single, x, 1);
    CHECK(memcmp(alone, one + t * D, (size_t)D * 2) == 0);
    free(alone);
  }
  free(one);
  free(three);
  ms_experts_free(x);
  free_problem(&p);
}

static void bf16_tokens_with_bf16_weights_round_twice_at_most(void) {
  for (ms_activation a = MS_IDENTITY; a < MS_ACTIVATION_COUNT; a++)
    for (int gated = a == MS_CLAMPED_SWIGLU; gated < 2; gated++)
      bf16_layers_round_twice_at_most(23, 37, 41, 2, 5, a, gated, true); // odd K in both matrices
  const int64_t sizes[][3] = {{1, 1, 1}, {200, 3, 1}, {7, 65, 31}, {97, 160, 100}, {5, 801, 770}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    bf16_layers_round_twice_at_most(sizes[i][0], sizes[i][1], sizes[i][2], 1, 3, MS_RELU, i % 2,
                                    false);
}

static void packing_is_undone_bit_for_bit(void) {
  problem p = make(1, 35, 37, 1, 3, MS_SILU, true, true);
  ms_error err;
  ms_experts *x = pack(&p, MS_F32, 5, 28);
  int64_t width = 23;
  float *w_in = malloc((size_t)(2 * width * p.D) * 4), *w_out = malloc((size_t)(width * p.D) * 4);
  float b_in[46];
  CHECK(ms_experts_unpack(x, 1, w_in, w_out, b_in, NULL, NULL, &err) == MS_OK);
  int32_t wrong = 0;
  for (int64_t half = 0; half < 2; half++)
    for (int64_t f = 0; f < width; f++) {
      int64_t row = 1 * 2 * p.F + half * p.F + 5 + f;
      wrong += memcmp(w_in + (half * width + f) * p.D, p.w_in + row * p.D, (size_t)p.D * 4) != 0;
      wrong += memcmp(&b_in[half * width + f], &p.bias_in[row], 4) != 0;
    }
  for (int64_t d = 0; d < p.D; d++)
    wrong += memcmp(w_out + d * width, p.w_out + (1 * p.D + d) * p.F + 5, (size_t)width * 4) != 0;
  CHECK(wrong == 0);
  free(w_in);
  free(w_out);
  ms_experts_free(x);
  free_problem(&p);
}

// |w - got| <= scale / 2, and the rounding of the division and of the product in fp32: 127 units of 2^-24 each.
static void check_int8_row(const float *got, const float *w, int64_t K) {
  float scale = largest(w, K) / 127, bound = scale * (0.5f + 127 * 0x1p-23f);
  for (int64_t k = 0; k < K; k++)
    CHECK_THAT(fabsf(got[k] - w[k]) <= bound, "%g is kept as %g, scale %g", w[k], got[k], scale);
}

static void int8_keeps_weights_within_half_a_scale(void) {
  problem p = make(1, 35, 37, 1, 2, MS_SILU, true, true);
  const int64_t start = 5, stop = 28, width = stop - start;
  for (int64_t d = 0; d < p.D;
       d++) { // rows of every size; whole rows of zeros; nothing but subnormals
    p.w_in[(start + 1) * p.D + d] = 0;
    p.w_in[(start + 2) * p.D + d] *= 0x1p-130f;
    p.w_in[(start + 3) * p.D + d] *= 0x1p120f;
    p.w_in[(start + 4) * p.D + d] = d == 3 ? NAN : 1;
    p.w_in[(start + 5) * p.D + d] = d == 4 ? -INFINITY : 1;
  }
  memset(p.w_out + 7 * p.F, 0, (size_t)p.F * sizeof(float));
  p.w_out[8 * p.F + start - 1] = 1000; // not this rank's: its scale does not see it
  ms_error err;
  ms_experts *x = pack(&p, MS_I8, start, stop);
  CHECK(ms_experts_unpacked(x) == MS_F32);
  float *w_in = malloc((size_t)(2 * width * p.D) * 4), *w_out = malloc((size_t)(width * p.D) * 4);
  CHECK(ms_experts_unpack(x, 0, w_in, w_out, NULL, NULL, NULL, &err) == MS_OK);
  for (int64_t half = 0; half < 2; half++)
    for (int64_t f = 0; f < width; f++) {
      const float *got = w_in + (half * width + f) * p.D;
      bool broken = half == 0 && (f == 4 || f == 5); // not finite: NaN throughout
      if (half == 0 && f == 2)                       // scales are normal numbers
        for (int64_t d = 0; d < p.D; d++) CHECK(got[d] == 0);
      else if (!broken)
        check_int8_row(got, p.w_in + (half * p.F + start + f) * p.D, p.D);
      for (int64_t d = 0; d < p.D; d++) CHECK((bool)isnan(got[d]) == broken);
    }
  for (int64_t d = 0; d < p.D; d++)
    check_int8_row(w_out + d * width, p.w_out + d * p.F + start, width);
  free(w_in);
  free(w_out);
  ms_experts_free(x);
  free_problem(&p);
}

static void transposed_sources_and_slices_pack_alike(void) {
  problem p = make(9, 24, 20, 1, 1, MS_RELU, false, false);
  ms_error err;
  ms_experts *whole = pack(&p, MS_F32, 4, 15), *other = pack(&p, MS_F32, 4, 15);
  float *in_t = malloc((size_t)(p.D * p.F) * 4), *out_slice = malloc((size_t)(p.D * 12) * 4);
  for (int64_t f = 0; f < p.F; f++)
    for (int64_t d = 0; d < p.D; d++) in_t[d * p.F + f] = p.w_in[f * p.D + d];
  for (int64_t d = 0; d < p.D; d++)
    memcpy(out_slice + d * 12, p.w_out + d * p.F + 4, 12 * sizeof(float));
  ms_matrix w_in = {in_t + 4, MS_F32, 12, p.D, 1, p.F}, w_out = {out_slice, MS_F32, p.D, 12, 12, 1};
  CHECK(ms_experts_pack(other, 0, 4, 12, &w_in, &w_out, NULL, NULL, MS_F32, NULL, &err) == MS_OK);
  float *a = run(&p, whole, 1), *b = run(&p, other, 1);
  CHECK(memcmp(a, b, (size_t)(p.T * p.D) * 4) == 0);
  free(a);
  free(b);
  free(in_t);
  free(out_slice);
  ms_experts_free(whole);
  ms_experts_free(other);
  free_problem(&p);
}

static void not_a_number_reaches_its_own_token_only(void) {
  problem p = make(12, 33, 37, 1, 2, MS_RELU, false, false);
  for (int64_t i = 0; i < p.T; i++) p.index[i] = (int32_t)(i % 2);
  p.hidden[5 * p.D + 3] = NAN;
  for (ms_activation a = MS_IDENTITY; a < MS_CLAMPED_SWIGLU; a++) { // that one is for gated experts
    p.activation = a;
    ms_experts *x = pack(&p, MS_F32, 0, p.F);
    float *out = run(&p, x, 1);
    for (int64_t i = 0; i < p.T * p.D; i++) CHECK(isnan(out[i]) == (i / p.D == 5));
    free(out);
    ms_experts_free(x);
    x = pack(&p, MS_BF16, 0, p.F);
    uint16_t *narrow = run_bf16(&p, x, 1);
    for (int64_t i = 0; i < p.T * p.D; i++)
      CHECK((bool)isnan(from_bf16(narrow[i])) == (i / p.D == 5));
    free(narrow);
    ms_experts_free(x);
  }
  free_problem(&p);
}

static void grouping_equals_the_reference(void) {
  ms_error err;
  ms_batch *batch;
  ms_exchange *one;
  CHECK(ms_batch_create(&batch, &err) == MS_OK && ms_exchange_one(&one, &err) == MS_OK);
  for (int round = 0; round < 50; round++) {
    int64_t T = round * 3 % 70;
    int32_t K = 1 + round % 4, E = 1 + round * 7 % 40;
    int32_t *index = malloc((size_t)(T * K + 1) * 4), *order = malloc((size_t)(T * K + 1) * 4);
    int64_t *offset = malloc((size_t)(E + 1) * 8);
    float *weight = random_floats(T * K, 1), hidden[70] = {0};
    for (int64_t i = 0; i < T * K; i++)
      index[i] = (int32_t)((uniform() + 1) / 2 * (float)(E + 1)) - 1;
    ms_reference_group(index, T * K, E, offset, order);
    CHECK(ms_route(batch, hidden, MS_F32, index, MS_I32, weight, MS_F32, T, 1, K, E, NULL, &err) ==
          MS_OK);
    CHECK(ms_gather(batch, one, &err) == MS_OK && ms_group(batch, &err) == MS_OK);
    CHECK(memcmp(batch->offset, offset, (size_t)(E + 1) * 8) == 0);
    CHECK(offset[E] == 0 || memcmp(batch->order, order, (size_t)offset[E] * 4) == 0);
    CHECK(ms_combine(batch, one, NULL, &err) == MS_OK);
    free(index);
    free(order);
    free(offset);
    free(weight);
  }
  ms_exchange_free(one);
  ms_batch_free(batch);
}

static void bad_input_is_named(void) {
  ms_error err;
  ms_batch *batch;
  CHECK(ms_batch_create(&batch, &err) == MS_OK);
  float hidden[4] = {0}, weight[4] = {1, 1, 1, 1}, out[4];
  int32_t index[4] = {0, 1, -1, 2};
#define ROUTE(K, E)                                                                                \
  ms_route(batch, hidden, MS_F32, index, MS_I32, weight, MS_F32, 2, 2, K, E, out, &err)
  CHECK(ROUTE(2, 3) == MS_OK);
  CHECK(ROUTE(2, 2) == MS_ERANGE &&
        strstr(err.msg, "top_k_index[1, 1]: got 2, expected -1 (no expert) to 1"));
  index[2] = -2;
  CHECK(ROUTE(2, 3) == MS_ERANGE && strstr(err.msg, "top_k_index[1, 0]: got -2"));
  index[2] = -1;
  weight[2] = NAN; // the weight of a slot without expert is not looked at
  CHECK(ROUTE(2, 3) == MS_OK);
  weight[1] = INFINITY;
  CHECK(ROUTE(2, 3) == MS_ERANGE && strstr(err.msg, "top_k_weights[0, 1]: got inf"));
  CHECK(ROUTE(65, 3) == MS_ESHAPE && strstr(err.msg, "got K=65"));
  CHECK(ROUTE(2, 0) == MS_EINVAL && strstr(err.msg, "num_experts: got 0"));
#undef ROUTE
  CHECK(ms_route(batch, hidden, MS_I32, index, MS_I32, weight, MS_F32, 2, 2, 2, 3, out, &err) ==
        MS_EDTYPE);
  CHECK(ms_route(batch, hidden, MS_F32, index, MS_F32, weight, MS_F32, 2, 2, 2, 3, out, &err) ==
        MS_EDTYPE);
  CHECK(ms_route(batch, hidden, MS_F32, index, MS_I32, weight, MS_I64, 2, 2, 2, 3, out, &err) ==
        MS_EDTYPE);
  ms_batch_free(batch);
  ms_batch_free(NULL);

  problem p = make(2, 8, 8, 1, 2, MS_RELU, false, false);
  ms_experts *x = pack(&p, MS_F32, 0, 8);
  ms_matrix w_in = {p.w_in, MS_F32, 8, 8, 8, 1}, w_out = {p.w_out, MS_F32, 8, 7, 7, 1};
  CHECK(ms_experts_pack(x, 2, 0, 8, &w_in, &w_out, NULL, NULL, MS_F32, NULL, &err) == MS_EINVAL);
  CHECK(strstr(err.msg, "expert: got 2, expected 0 to 1"));
  CHECK(ms_experts_pack(x, 0, 0, 8, &w_in, &w_out, NULL, NULL, MS_F32, NULL, &err) == MS_ESHAPE);
  CHECK(strstr(err.msg, "w_out: got [8, 7], expected [8, 8]"));
  CHECK(ms_experts_pack(x, 0, 1, 7, &w_in, &w_out, NULL, NULL, MS_F32, NULL, &err) == MS_ESHAPE);
  CHECK(strstr(err.msg, "sources hold columns [1, 8), this rank needs [0, 8)"));
  w_out.cols = w_out.row_stride = 8;
  CHECK(ms_experts_pack(x, 0, 0, 8, &w_in, &w_out, p.w_in, NULL, MS_F32, NULL, &err) == MS_EINVAL);
  CHECK(strstr(err.msg, "b_in: unexpected"));
  ms_experts_free(x);
  ms_experts_free(NULL);
  free_problem(&p);
}

// The instruction set is chosen once a process: run this program again for each that the CPU has.
static int on_every_isa(char *program) {
  for (const char *const *isa = ms_isa_available(); *isa; isa++) {
    pid_t child = fork();
    if (child == 0) {
      setenv("MOESHARD_ISA", *isa, 1);
      execl(program, program, (char *)NULL);
      _exit(127);
    }
    int status = 0;
    if (waitpid(child, &status, 0) != child || status != 0) {
      fprintf(stderr, "MOESHARD_ISA=%s %s failed\n", *isa, program);
      return 1;
    }
  }
  return 0;
}

int main(int argc, char **argv) {
  (void)argc;
  if (!getenv("MOESHARD_ISA")) return on_every_isa(argv[0]);
  check_begin();
  layers_equal_the_reference();
  a_token_does_not_depend_on_its_neighbours();
  slices_add_up_to_the_whole();
  sixteen_bit_tokens_are_widened_and_narrowed();
  bf16_tokens_with_bf16_weights_round_twice_at_most();
  packing_is_undone_bit_for_bit();
  int8_keeps_weights_within_half_a_scale();
  transposed_sources_and_slices_pack_alike();
  not_a_number_reaches_its_own_token_only();
  grouping_equals_the_reference();
  bad_input_is_named();
  const char *isa = "";
  ms_error err;
  CHECK_OK(ms_isa(&isa, &err), err);
  CHECK(strcmp(isa, getenv("MOESHARD_ISA")) == 0);
  return check_end(isa);
}
