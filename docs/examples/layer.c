// layer.c - one MoE layer with the C core alone: the plan, this rank's experts, the five steps.
//
//   layer                    one rank
//   layer NAME RANK RANKS    rank RANK of RANKS processes of this host; NAME is a new one for every run
//
// SPDX-License-Identifier: Apache-2.0
#include "moeshard.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 5, D = 24, F = 37, E = 4, K = 2 };

typedef struct model { // the experts, whole, in the layout of nn.Linear; the same on every rank
  float w_in[E][F][D], w_out[E][D][F];
} model;

typedef struct tokens { // of this rank, with the router's choices
  float hidden[T][D], out[T][D], weight[T][K];
  int32_t expert[T][K]; // -1: no expert
} tokens;

// Pack this rank's columns of every expert.
static ms_status pack(const model *m, const int64_t *columns, ms_experts **out, ms_error *err) {
  ms_experts_spec spec = {
      .E = E, .D = D, .F = F, .storage = MS_F32, .activation = MS_RELU, .columns = columns};
  MS_TRY(ms_experts_create(&spec, out, err));
  for (int32_t e = 0; e < E; e++) { // dtype, rows, columns, and the strides of both in elements
    ms_matrix w_in = {m->w_in[e], MS_F32, F, D, D, 1};
    ms_matrix w_out = {m->w_out[e], MS_F32, D, F, F, 1};
    MS_TRY(ms_experts_pack(*out, e, 0, F, &w_in, &w_out, NULL, NULL, MS_F32, NULL, err));
  }
  return MS_OK;
}

// The five steps: x->out = the layer's outputs. May be called again and again; nothing is allocated then.
static ms_status forward(ms_batch *batch, ms_exchange *exchange, const ms_experts *experts,
                         ms_threads *threads, tokens *x, ms_error *err) {
  MS_TRY(ms_route(batch, x->hidden, MS_F32, x->expert, MS_I32, x->weight, MS_F32, T, D, K, E,
                  x->out, err));
  MS_TRY(ms_gather(batch, exchange, err));
  MS_TRY(ms_group(batch, err));
  MS_TRY(ms_ffn(batch, experts, threads, err));
  return ms_combine(batch, exchange, threads, err);
}

// Everything that is made once, a forward pass, and everything freed.
static ms_status run(const char *name, int32_t rank, int32_t ranks, const model *m, tokens *x,
                     ms_error *err) {
  ms_plan plan = {0};
  ms_experts *experts = NULL;
  ms_exchange *exchange = NULL;
  ms_threads *threads = NULL;
  ms_batch *batch = NULL;
  ms_status status = ms_plan_shard(ranks, E, F, NULL, &plan, err);
  if (status != MS_OK) goto done;
  if ((status = pack(m, plan.columns + 2 * E * rank, &experts, err)) != MS_OK) goto done;
  if (ranks == 1)
    status = ms_exchange_one(&exchange, err);
  else // each rank waits at most 30 s for another, here and later
    status = ms_exchange_shm(name, rank, ranks, 30, NULL, NULL, &exchange, err);
  if (status != MS_OK) goto done;
  if ((status = ms_threads_create(1, &threads, err)) != MS_OK) goto done;
  if ((status = ms_batch_create(&batch, err)) != MS_OK) goto done;
  status = forward(batch, exchange, experts, threads, x, err);

done:
  ms_batch_free(batch);
  ms_threads_free(threads);
  ms_exchange_free(exchange);
  ms_experts_free(experts);
  ms_plan_free(&plan);
  return status;
}

// ---- numbers to run it on, and to check it with ---------------------------------------------------

static void fill(float *values, size_t count,
                 uint64_t seed) { // in [-1, 1); equal seeds, equal values
  for (size_t i = 0; i < count; i++) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    values[i] = (float)((double)(seed >> 11) * 0x1p-52 - 1);
  }
}

static double largest_difference(const model *m, const tokens *x) { // from the core's slow twin
  static double expected[T][D];
  ms_reference_layer(&x->hidden[0][0], &x->expert[0][0], &x->weight[0][0], T, D, K, E, F,
                     &m->w_in[0][0][0], &m->w_out[0][0][0], NULL, NULL, MS_RELU, false,
                     &expected[0][0]);
  double difference = 0, magnitude = 0;
  for (int t = 0; t < T; t++)
    for (int d = 0; d < D; d++) {
      difference = fmax(difference, fabs((double)x->out[t][d] - expected[t][d]));
      magnitude = fmax(magnitude, fabs(expected[t][d]));
    }
  return difference / magnitude;
}

int main(int argc, char **argv) {
  static model m;
  static tokens x;
  int32_t rank = argc == 4 ? atoi(argv[2]) : 0, ranks = argc == 4 ? atoi(argv[3]) : 1;
  fill(&m.w_in[0][0][0], sizeof m.w_in / sizeof(float), 1);
  fill(&m.w_out[0][0][0], sizeof m.w_out / sizeof(float), 2);
  fill(&x.hidden[0][0], sizeof x.hidden / sizeof(float), 3 + (uint64_t)rank);
  fill(&x.weight[0][0], sizeof x.weight / sizeof(float), 99 + (uint64_t)rank);
  for (int t = 0; t < T; t++)
    for (int k = 0; k < K; k++) x.expert[t][k] = t == 0 && k ? -1 : (t + 2 * k + rank) % E;

  ms_error err = {0};
  if (run(argc == 4 ? argv[1] : "", rank, ranks, &m, &x, &err) != MS_OK) {
    fprintf(stderr, "layer: %s\n", err.msg);
    return 1;
  }
  double difference = largest_difference(&m, &x);
  printf(
      "rank %d of %d: out[0][0] = %.6f, relative difference from a double-precision layer %.1e\n",
      rank, ranks, (double)x.out[0][0], difference);
  return difference <= 2e-6 ? 0 : 1;
}
