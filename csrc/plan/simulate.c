// simulate.c - a layer run many times on paper: routing drawn anew, ranks that are late, pieces that overlap.
//
// Every step draws a count for each expert (Poisson; the cost model then knows it exactly), and a slowness for each rank.
// The tokens come in `chunks` pieces. A rank computes one piece at a time, the links carry one exchange at a time; both
// are queues, served in the order in which pieces are ready:
//
//   gathered[i]  = links free + gather               the next piece travels while this one is computed
//   computed[i]  = for each rank: max(computed[i-1], gathered[i]) + its group and ffn
//   combined[i]  = max(links free, all ranks' computed[i]) + combine
//
// SPDX-License-Identifier: Apache-2.0
#include "cost.h"

#include <math.h>
#include <stdlib.h>

// ---- random numbers -----------------------------------------------------------------------------------

// splitmix64 (Steele, Lea and Flood 2014).
static uint64_t next(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// In (0, 1).
static double uniform(uint64_t *state) { return ((double)(next(state) >> 12) + 0.5) * 0x1p-52; }

// Box and Muller; the second number is thrown away.
static double normal(uint64_t *state) {
  double radius = sqrt(-2 * log(uniform(state)));
  return radius * cos(2 * M_PI * uniform(state));
}

static double poisson(uint64_t *state, double mean) {
  if (mean <= 0) return 0;
  if (mean > 50) {
    double count = floor(mean + sqrt(mean) * normal(state) + 0.5);
    return count > 0 ? count : 0;
  }
  double limit = exp(-mean), product = uniform(state), count = 0;
  for (; product > limit; count++) product *= uniform(state);
  return count;
}

// ---- steps --------------------------------------------------------------------------------------------

typedef struct run {
  ms_costing costing;
  ms_moe_layer layer; // of one piece of one step
  double *load;       // [E] of the step's piece
  double *mean;       // [E] what it is drawn from; changes places under drift
  double *tokens;     // [R] of a piece
  double *computed;   // [R] when each rank has computed the last piece
  double *slowness;   // [R]
} run;

static void drop(run *x) {
  ms_costing_free(&x->costing);
  free(x->load);
  free(x->mean);
  free(x->tokens);
  free(x->computed);
  free(x->slowness);
}

static ms_status take(run *x, const ms_cluster *cluster, const ms_moe_layer *layer, int32_t chunks,
                      ms_error *err) {
  size_t ranks = (size_t)cluster->R, experts = (size_t)layer->E;
  x->load = malloc(experts * sizeof *x->load);
  x->mean = malloc(experts * sizeof *x->mean);
  x->tokens = malloc(ranks * sizeof *x->tokens);
  x->computed = malloc(ranks * sizeof *x->computed);
  x->slowness = malloc(ranks * sizeof *x->slowness);
  if (!x->load || !x->mean || !x->tokens || !x->computed || !x->slowness)
    return ms_fail(err, MS_ENOMEM, "no memory to simulate %d ranks and %d experts", cluster->R,
                   layer->E);
  for (int32_t r = 0; r < cluster->R; r++) x->tokens[r] = layer->tokens[r] / chunks;
  for (int32_t e = 0; e < layer->E; e++) x->mean[e] = x->load[e] = layer->load[e] / chunks;
  x->layer = *layer;
  x->layer.tokens = x->tokens;
  x->layer.load = x->load;
  x->layer.exact = true;
  return ms_costing_create(cluster, &x->layer, &x->costing, err);
}

// Fisher and Yates.
static void shuffle(double *x, int32_t n, uint64_t *state) {
  for (int32_t i = n - 1; i > 0; i--) {
    int32_t j = (int32_t)(next(state) % (uint64_t)(i + 1));
    double swap = x[i];
    x[i] = x[j];
    x[j] = swap;
  }
}

static double larger(double a, double b) { return a > b ? a : b; }

// Time of one step; adds what the ranks computed to `work`.
static double step(run *x, const ms_parts *layout, const ms_simulation *how, uint64_t *state,
                   double *work) {
  int32_t R = layout->R, E = layout->E;
  double total = 0;
  if (how->drift) shuffle(x->mean, E, state);
  for (int32_t r = 0; r < R; r++) {
    x->computed[r] = 0;
    x->slowness[r] = exp(how->jitter * normal(state));
    if (uniform(state) < how->slow_chance) x->slowness[r] *= how->slow_factor;
  }
  double links = 0, gathered = 0;
  for (int32_t i = 0; i < how->chunks; i++) {
    for (int32_t e = 0; e < E; e++) x->load[e] = poisson(state, x->mean[e]);
    ms_cost cost;
    ms_costing_run(&x->costing, layout, &cost);
    if (i == 0) gathered = links = cost.route + cost.gather;
    double all = 0, begin = gathered;
    for (int32_t r = 0; r < R; r++) {
      double rows = cost.sparse ? x->costing.ranks[r].rows : x->costing.tokens;
      double seconds =
          (x->costing.ranks[r].ffn + rows * x->layer.K * x->costing.cluster->slot) * x->slowness[r];
      x->computed[r] = larger(x->computed[r], begin) + seconds + 2 * x->costing.cluster->step;
      all = larger(all, x->computed[r]);
      *work += seconds;
    }
    if (i + 1 < how->chunks) gathered = links += cost.gather; // the next piece goes first
    total = links = larger(links, all) + cost.combine;
  }
  return total;
}

static ms_status check(const ms_simulation *how, ms_error *err) {
  if (how->steps < 1)
    return ms_fail(err, MS_EINVAL, "steps: got %d, expected at least 1", how->steps);
  if (how->chunks < 1 || how->chunks > 1024)
    return ms_fail(err, MS_EINVAL, "chunks: got %d, expected 1 to 1024", how->chunks);
  if (!(how->jitter >= 0 && how->jitter <= 2))
    return ms_fail(err, MS_EINVAL, "jitter: got %g, expected 0 to 2", how->jitter);
  if (!(how->slow_chance >= 0 && how->slow_chance <= 1))
    return ms_fail(err, MS_EINVAL, "slow_chance: got %g, expected 0 to 1", how->slow_chance);
  if (!(how->slow_factor >= 1) || isinf(how->slow_factor))
    return ms_fail(err, MS_EINVAL, "slow_factor: got %g, expected at least 1", how->slow_factor);
  return MS_OK;
}

ms_status ms_plan_simulate(const ms_plan *plan, const ms_cluster *cluster,
                           const ms_moe_layer *layer, const ms_simulation *simulation,
                           double *seconds, double *busy, ms_error *err) {
  if (plan->R != cluster->R || plan->E != layer->E)
    return ms_fail(err, MS_EINVAL, "columns: got [%d, %d, 2], expected [%d ranks, %d experts, 2]",
                   plan->R, plan->E, cluster->R, layer->E);
  MS_TRY(check(simulation, err));
  run x = {0};
  ms_parts layout = {0};
  uint64_t state = simulation->seed;
  double work = 0, all = 0;
  ms_status status = take(&x, cluster, layer, simulation->chunks, err);
  if (status == MS_OK) status = ms_parts_from_plan(plan, &layout, err);
  for (int32_t i = 0; status == MS_OK && i < simulation->steps; i++)
    all += seconds[i] = step(&x, &layout, simulation, &state, &work);
  if (status == MS_OK && busy) *busy = all > 0 ? work / (all * cluster->R) : 0;
  ms_parts_free(&layout);
  drop(&x);
  return status;
}
