// plan.c - the column table: building the usual layouts, checking any, and the work it gives each rank.
// SPDX-License-Identifier: Apache-2.0
#include "../moeshard.h"

#include <math.h>
#include <stdlib.h>

static int64_t *columns_at(const ms_plan *plan, int32_t r, int32_t e) {
  return plan->columns + 2 * ((int64_t)r * plan->E + e);
}

static ms_status plan_init(ms_plan *plan, int32_t R, int32_t E, int64_t F, ms_error *err) {
  *plan = (ms_plan){0};
  if (R < 1 || R > MS_MAX_RANKS)
    return ms_fail(err, MS_EINVAL, "ranks: got %d, expected 1 to %d", R, MS_MAX_RANKS);
  if (E < 1 || E > MS_MAX_EXPERTS)
    return ms_fail(err, MS_EINVAL, "num_experts: got %d, expected 1 to %d", E, MS_MAX_EXPERTS);
  if (F < 1) return ms_fail(err, MS_EINVAL, "d_ff: got %lld, expected at least 1", (long long)F);
  plan->columns = calloc((size_t)R * (size_t)E, 2 * sizeof *plan->columns);
  plan->copies = malloc((size_t)E * sizeof *plan->copies);
  if (!plan->columns || !plan->copies) {
    ms_plan_free(plan);
    return ms_fail(err, MS_ENOMEM, "no memory for a plan of %d ranks and %d experts", R, E);
  }
  plan->R = R;
  plan->E = E;
  plan->F = F;
  for (int32_t e = 0; e < E; e++) plan->copies[e] = 1;
  return MS_OK;
}

void ms_plan_free(ms_plan *plan) {
  free(plan->columns);
  free(plan->copies);
  *plan = (ms_plan){0};
}

// Cut [0, F) of expert e over ranks [from, from + ranks). The odd columns go first to the ranks with the largest
// remainders and, among equal ones, to the ranks after those that got them in the expert before.
static void cut_expert(ms_plan *plan, int32_t e, int32_t from, int32_t ranks, const double *speed,
                       double *remainder) {
  double total = 0;
  for (int32_t i = 0; i < ranks; i++) total += speed ? speed[from + i] : 1.0;
  int64_t left = plan->F;
  for (int32_t i = 0; i < ranks; i++) {
    double exact = (double)plan->F * (speed ? speed[from + i] : 1.0) / total;
    int64_t whole = (int64_t)exact;
    columns_at(plan, from + i, e)[1] = whole;
    remainder[i] = exact - (double)whole;
    left -= whole;
  }
  int32_t turn = (int32_t)(left * e % ranks);
  for (; left > 0; left--) {
    int32_t best = -1;
    for (int32_t j = 0; j < ranks; j++) {
      int32_t i = (j + turn) % ranks;
      if (best < 0 || remainder[i] > remainder[best]) best = i;
    }
    columns_at(plan, from + best, e)[1]++;
    remainder[best] = -1;
  }
  int64_t start = 0;
  for (int32_t i = 0; i < ranks; i++) {
    int64_t *c = columns_at(plan, from + i, e);
    c[0] = start;
    c[1] = start += c[1];
  }
}

// First expert of block b when E experts are cut in `blocks` near-equal contiguous blocks.
static int32_t block_begin(int32_t E, int32_t blocks, int32_t b) {
  return (int32_t)((int64_t)E * b / blocks);
}

static ms_status plan_groups(int32_t R, int32_t E, int64_t F, int32_t group, const double *speed,
                             ms_plan *out, ms_error *err) {
  MS_TRY(plan_init(out, R, E, F, err));
  double *remainder = malloc((size_t)R * sizeof *remainder);
  if (!remainder) {
    ms_plan_free(out);
    return ms_fail(err, MS_ENOMEM, "no memory for a plan of %d ranks", R);
  }
  for (int32_t g = 0; g < R / group; g++)
    for (int32_t e = block_begin(E, R / group, g); e < block_begin(E, R / group, g + 1); e++)
      cut_expert(out, e, g * group, group, speed, remainder);
  free(remainder);
  return MS_OK;
}

ms_status ms_plan_shard(int32_t R, int32_t E, int64_t F, const double *speed, ms_plan *out,
                        ms_error *err) {
  *out = (ms_plan){0};
  if (speed)
    for (int32_t r = 0; r < R; r++)
      if (!(speed[r] > 0) || !isfinite(speed[r]))
        return ms_fail(err, MS_EINVAL, "speed[%d]: got %g, expected a positive number", r,
                       speed[r]);
  return plan_groups(R, E, F, R > 0 ? R : 1, speed, out, err);
}

ms_status ms_plan_hybrid(int32_t R, int32_t E, int64_t F, int32_t group, ms_plan *out,
                         ms_error *err) {
  *out = (ms_plan){0};
  if (group < 1 || R % group != 0)
    return ms_fail(err, MS_EINVAL, "group: got %d, expected a divisor of ranks=%d", group, R);
  return plan_groups(R, E, F, group, NULL, out, err);
}

ms_status ms_plan_expert_parallel(int32_t R, int32_t E, int64_t F, const int32_t *owner,
                                  ms_plan *out, ms_error *err) {
  if (!owner) return ms_plan_hybrid(R, E, F, 1, out, err);
  MS_TRY(plan_init(out, R, E, F, err));
  for (int32_t e = 0; e < E; e++) {
    if (owner[e] < 0 || owner[e] >= R) {
      ms_plan_free(out);
      return ms_fail(err, MS_EINVAL, "owner[%d]: got %d, expected 0 to %d", e, owner[e], R - 1);
    }
    columns_at(out, owner[e], e)[1] = F;
  }
  return MS_OK;
}

typedef struct edge { // a place where the number of owners changes
  int64_t column;
  int32_t step;
} edge;

static int by_column(const void *a, const void *b) {
  int64_t x = ((const edge *)a)->column, y = ((const edge *)b)->column;
  return (x > y) - (x < y);
}

static ms_status check_expert(const ms_plan *plan, int32_t e, edge *edges, ms_error *err) {
  int32_t n = 0;
  for (int32_t r = 0; r < plan->R; r++) {
    const int64_t *c = columns_at(plan, r, e);
    if (c[0] < 0 || c[0] > c[1] || c[1] > plan->F)
      return ms_fail(err, MS_EINVAL,
                     "columns[rank %d][expert %d]: got [%lld, %lld), expected a range in [0, %lld)",
                     r, e, (long long)c[0], (long long)c[1], (long long)plan->F);
    if (c[0] == c[1]) continue;
    edges[n++] = (edge){c[0], 1};
    edges[n++] = (edge){c[1], -1};
  }
  qsort(edges, (size_t)n, sizeof *edges, by_column);
  int32_t owners = 0;
  int64_t column = 0;
  for (int32_t i = 0; i <= n; i++) {
    int64_t end = i < n ? edges[i].column : plan->F;
    if (end > column && owners != plan->copies[e])
      return ms_fail(err, MS_EINVAL,
                     "expert %d, columns [%lld, %lld): held by %d ranks, expected %d", e,
                     (long long)column, (long long)end, owners, plan->copies[e]);
    if (i < n) owners += edges[i].step;
    column = end;
  }
  return MS_OK;
}

ms_status ms_plan_check(const ms_plan *plan, ms_error *err) {
  edge *edges = malloc((size_t)plan->R * 2 * sizeof *edges);
  if (!edges) return ms_fail(err, MS_ENOMEM, "no memory to check a plan of %d ranks", plan->R);
  ms_status status = MS_OK;
  for (int32_t e = 0; e < plan->E && status == MS_OK; e++)
    status = check_expert(plan, e, edges, err);
  free(edges);
  return status;
}

void ms_plan_work(const ms_plan *plan, const int64_t *counts, double *work) {
  for (int32_t r = 0; r < plan->R; r++) {
    work[r] = 0;
    for (int32_t e = 0; e < plan->E; e++) {
      const int64_t *c = columns_at(plan, r, e);
      if (plan->copies[e] > 0)
        work[r] += (double)counts[e] * (double)(c[1] - c[0]) / (double)plan->copies[e];
    }
  }
}
