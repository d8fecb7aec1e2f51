// chain.c - the best placement of a small case, exactly: dynamic programming over the layers.
//
// A state of a layer is a way to give its experts to the ranks within sizes and cap. Hops join only neighbouring layers, so
//
//   best[l][s] = max over states q of layer l - 1 of best[l - 1][q] + local(q, s)
//
// All ranks are alike, so of the first layer only one state of those that differ by the names of the ranks is kept.
//
// SPDX-License-Identifier: Apache-2.0
#include "problem.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_RANKS = 255, MOST_EXPERTS = 1024 }; // states are bytes; the enumeration is recursive
static const int64_t MOST_STEPS = (int64_t)1 << 26; // of the enumeration of a layer: under a second
static const int64_t MOST_ADDITIONS = (int64_t)1 << 33; // of the whole: some seconds

typedef struct states {
  int64_t count;
  uint8_t *owner; // [count, n]
} states;

typedef struct listing { // the enumeration of one layer's states
  const ms_problem *p;
  int32_t l, wides;
  bool canonical; // ranks are named in the order in which they come
  int64_t steps;
  int64_t *load;
  int32_t *size;
  uint8_t *owner;
  states *out;
} listing;

static ms_status too_many(const listing *c, ms_error *err) {
  return ms_fail(err, MS_EINVAL,
                 "exact: layer %d has more than %d ways to give %d experts to %d ranks: use sweep, "
                 "which is close to it",
                 c->l, MS_PLACE_STATES, c->p->n[c->l], c->p->R);
}

// Twice: without memory in `out` the states are counted.
static ms_status list_from(listing *c, int32_t i, int32_t used, ms_error *err) {
  const ms_problem *p = c->p;
  const int32_t n = p->n[c->l], least = n / p->R;
  states *out = c->out;
  if (i == n) {
    if (out->count == MS_PLACE_STATES) return too_many(c, err);
    if (out->owner) memcpy(out->owner + out->count * n, c->owner, (size_t)n);
    out->count++;
    return MS_OK;
  }
  const int64_t weight = p->weight[(int64_t)c->l * p->E + i];
  const int32_t ranks = c->canonical && used < p->R ? used + 1 : p->R;
  for (int32_t r = 0; r < ranks; r++) {
    bool wide = c->size[r] == least;
    if (c->size[r] > least || (wide && !c->wides) || c->load[r] + weight > p->cap[c->l]) continue;
    if (++c->steps > MOST_STEPS) return too_many(c, err);
    c->owner[i] = (uint8_t)r;
    c->size[r]++;
    c->load[r] += weight;
    c->wides -= wide;
    MS_TRY(list_from(c, i + 1, r == used ? used + 1 : used, err));
    c->wides += wide;
    c->load[r] -= weight;
    c->size[r]--;
  }
  return MS_OK;
}

static ms_status list_states(const ms_problem *p, int32_t l, states *out, ms_error *err) {
  listing c = {.p = p,
               .l = l,
               .wides = p->n[l] % p->R,
               .canonical = l == 0,
               .load = calloc((size_t)p->R, sizeof *c.load),
               .size = calloc((size_t)p->R, sizeof *c.size),
               .owner = malloc((size_t)p->E),
               .out = out};
  ms_status status = MS_OK;
  if (p->n[l] > MOST_EXPERTS)
    status = too_many(&c, err);
  else if (!c.load || !c.size || !c.owner)
    status = ms_fail(err, MS_ENOMEM, "no memory to list placements of %d experts", p->E);
  else
    status = list_from(&c, 0, 0, err);
  if (status == MS_OK) {
    out->owner = malloc((size_t)out->count * (size_t)p->n[l] + 1);
    if (!out->owner)
      status = ms_fail(err, MS_ENOMEM, "no memory for %lld placements", (long long)out->count);
  }
  if (status == MS_OK) {
    out->count = c.steps = 0;
    status = list_from(&c, 0, 0, err);
  }
  free(c.load);
  free(c.size);
  free(c.owner);
  return status;
}

// best [count of here] from best_before [count of before]; from: the state before that gives it.
static void step(const ms_problem *p, int32_t l, const states *before, const states *here,
                 const int64_t *best_before, int64_t *gain, int64_t *best, int32_t *from) {
  const int64_t E = p->E, row = (l - 1) * E;
  const int32_t n = p->n[l], m = p->n[l - 1], R = p->R;
  for (int64_t s = 0; s < here->count; s++) best[s] = -1;
  for (int64_t q = 0; q < before->count; q++) {
    const uint8_t *owner = before->owner + q * m;
    memset(gain, 0, (size_t)n * (size_t)R * sizeof *gain);
    for (int32_t i = 0; i < m; i++) {
      const int64_t *at = p->hops->next_at + row + p->expert[row + i];
      for (int64_t k = at[0]; k < at[1]; k++) {
        int32_t j = p->place[row + E + p->hops->next[k].expert];
        if (j >= 0) gain[(int64_t)j * R + owner[i]] += p->hops->next[k].count;
      }
    }
    for (int64_t s = 0; s < here->count; s++) {
      const uint8_t *to = here->owner + s * n;
      int64_t value = best_before[q];
      for (int32_t j = 0; j < n; j++) value += gain[(int64_t)j * R + to[j]];
      if (value <= best[s]) continue;
      best[s] = value;
      from[s] = (int32_t)q;
    }
  }
}

static ms_status run(const ms_problem *p, states *list, int32_t **from, int64_t **best,
                     int64_t *gain, int32_t *owner, ms_error *err) {
  const int64_t E = p->E;
  int64_t additions = 0;
  for (int32_t l = 0; l < p->L; l++) {
    MS_TRY(list_states(p, l, &list[l], err));
    if (l) additions += list[l - 1].count * list[l].count * (p->n[l] + 1);
    if (additions > MOST_ADDITIONS)
      return ms_fail(
          err, MS_EINVAL,
          "exact: more than %lld additions for %d layers: use sweep, which is close to it",
          (long long)MOST_ADDITIONS, p->L);
    from[l] = malloc((size_t)list[l].count * sizeof *from[l]);
    best[l] = calloc((size_t)list[l].count, sizeof *best[l]);
    if (!from[l] || !best[l])
      return ms_fail(err, MS_ENOMEM, "no memory for %lld placements", (long long)list[l].count);
    if (l) step(p, l, &list[l - 1], &list[l], best[l - 1], gain, best[l], from[l]);
  }
  int64_t s = 0;
  for (int64_t q = 1; q < list[p->L - 1].count; q++)
    if (best[p->L - 1][q] > best[p->L - 1][s]) s = q;
  for (int32_t l = p->L - 1; l >= 0; l--) {
    for (int64_t e = 0; e < E; e++) owner[l * E + e] = -1;
    for (int32_t i = 0; i < p->n[l]; i++)
      owner[l * E + p->expert[l * E + i]] = list[l].owner[s * p->n[l] + i];
    if (l) s = from[l][s];
  }
  return MS_OK;
}

ms_status ms_place_exact(const ms_place_spec *spec, int32_t *owner, ms_error *err) {
  ms_problem p;
  states *list = NULL;
  int32_t **from = NULL;
  int64_t **best = NULL, *gain = NULL;
  ms_status status = ms_problem_init(spec, &p, err);
  if (status != MS_OK) goto done;
  if (!p.hops || p.R > MOST_RANKS) {
    status = ms_fail(err, MS_EINVAL, "exact: needs token paths and at most %d ranks, got %s and %d",
                     MOST_RANKS, p.hops ? "paths" : "counts only", p.R);
    goto done;
  }
  const size_t L = (size_t)p.L;
  list = calloc(L, sizeof *list);
  from = calloc(L, sizeof *from);
  best = calloc(L, sizeof *best);
  gain = malloc((size_t)p.E * (size_t)p.R * sizeof *gain);
  if (!list || !from || !best || !gain)
    status = ms_fail(err, MS_ENOMEM, "no memory to place %d experts in %d layers", p.E, p.L);
  else
    status = run(&p, list, from, best, gain, owner, err);
done:
  for (int32_t l = 0; l < p.L; l++) {
    if (list) free(list[l].owner);
    if (from) free(from[l]);
    if (best) free(best[l]);
  }
  free(list);
  free(from);
  free(best);
  free(gain);
  ms_problem_free(&p);
  return status;
}
