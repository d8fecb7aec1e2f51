// hops.c - token paths to hops: how many tokens go from an expert to an expert of the next layer.
// SPDX-License-Identifier: Apache-2.0
#include "placement.h"

#include <stdlib.h>
#include <string.h>

void ms_hops_free(ms_hops *hops) {
  if (!hops) return;
  free(hops->next_at);
  free(hops->last_at);
  free(hops->next);
  free(hops->last);
  *hops = (ms_hops){0};
}

typedef struct counter { // one layer at a time
  int64_t *at;           // [E + 1] where the slots of an expert begin
  int64_t *order;        // [T*K] tokens, by the expert of their slot
  int64_t *seen;         // [E] hops from one expert
  int32_t *met;          // [E] to which
  int64_t room;          // of hops->next
} counter;

static ms_status check_paths(const int32_t *expert, int64_t T, int32_t L, int32_t K, int32_t E,
                             ms_error *err) {
  if (T < 0 || L < 1 || L > MS_MAX_LAYERS || K < 1 || K > MS_MAX_CHOICES || E < 1 ||
      E > MS_MAX_EXPERTS)
    return ms_fail(
        err, MS_EINVAL,
        "paths: got %lld tokens, %d layers, %d choices, %d experts, expected at most %d layers, %d "
        "choices, %d experts",
        (long long)T, L, K, E, MS_MAX_LAYERS, MS_MAX_CHOICES, MS_MAX_EXPERTS);
  for (int64_t i = 0; i < T * L * K; i++)
    if (expert[i] < -1 || expert[i] >= E)
      return ms_fail(err, MS_ERANGE,
                     "paths: token %lld, layer %lld: got expert %d, expected -1 to %d",
                     (long long)(i / ((int64_t)L * K)), (long long)(i / K % L), expert[i], E - 1);
  return MS_OK;
}

static ms_status push(ms_hops *out, int64_t used, counter *c, ms_hop hop, ms_error *err) {
  if (used == c->room) {
    int64_t room = 2 * c->room + 1024;
    ms_hop *more = realloc(out->next, (size_t)room * sizeof *more);
    if (!more) return ms_fail(err, MS_ENOMEM, "no memory for %lld hops", (long long)room);
    out->next = more;
    c->room = room;
  }
  out->next[used] = hop;
  return MS_OK;
}

// The hops from layer l: tokens sorted by their expert there, then counted expert by expert.
static ms_status count_layer(const int32_t *expert, int64_t T, int32_t K, int32_t l, counter *c,
                             ms_hops *out, ms_error *err) {
  const int32_t L = out->L, E = out->E;
  memset(c->at, 0, ((size_t)E + 1) * sizeof *c->at);
  for (int64_t t = 0; t < T; t++)
    for (int32_t k = 0; k < K; k++) {
      int32_t e = expert[(t * L + l) * K + k];
      if (e >= 0) c->at[e + 1]++;
    }
  for (int32_t e = 0; e < E; e++) c->at[e + 1] += c->at[e];
  for (int64_t t = 0; t < T; t++)
    for (int32_t k = 0; k < K; k++) {
      int32_t e = expert[(t * L + l) * K + k];
      if (e >= 0) c->order[c->at[e]++] = t;
    }
  int64_t *next_at = out->next_at + (int64_t)l * E, from = 0; // at[e] is now where e ends
  for (int32_t e = 0; e < E; e++) {
    int32_t met = 0;
    for (; from < c->at[e]; from++)
      for (int32_t k = 0; k < K; k++) {
        int32_t f = expert[(c->order[from] * L + l + 1) * K + k];
        if (f < 0) continue;
        if (!c->seen[f]++) c->met[met++] = f;
        out->total++;
      }
    int64_t used = next_at[e];
    for (int32_t i = 0; i < met; i++) {
      int32_t f = c->met[i];
      MS_TRY(push(out, used++, c, (ms_hop){f, c->seen[f]}, err));
      c->seen[f] = 0;
    }
    next_at[e + 1] = used;
  }
  return MS_OK;
}

// `last` is the transpose of `next`, layer by layer.
static void turn_round(ms_hops *hops) {
  const int32_t E = hops->E;
  for (int32_t l = 0; l + 1 < hops->L; l++) {
    const int64_t *next_at = hops->next_at + (int64_t)l * E;
    int64_t *last_at = hops->last_at + (int64_t)l * E;
    for (int64_t i = next_at[0]; i < next_at[E]; i++) last_at[hops->next[i].expert + 1]++;
    last_at[0] = next_at[0];
    for (int32_t f = 0; f < E; f++) last_at[f + 1] += last_at[f];
    for (int32_t e = 0; e < E; e++)
      for (int64_t i = next_at[e]; i < next_at[e + 1]; i++)
        hops->last[last_at[hops->next[i].expert]++] = (ms_hop){e, hops->next[i].count};
    for (int32_t f = E; f > 0; f--) last_at[f] = last_at[f - 1]; // where each began
    last_at[0] = next_at[0];
  }
}

ms_status ms_hops_count(const int32_t *expert, int64_t T, int32_t L, int32_t K, int32_t E,
                        ms_hops *out, ms_error *err) {
  *out = (ms_hops){0};
  MS_TRY(check_paths(expert, T, L, K, E, err));
  size_t rows = (size_t)(L - 1) * (size_t)E + 1, slots = (size_t)T * (size_t)K;
  counter c = {.at = malloc(((size_t)E + 1) * sizeof *c.at),
               .order = calloc(slots + 1, sizeof *c.order),
               .seen = calloc((size_t)E, sizeof *c.seen),
               .met = malloc((size_t)E * sizeof *c.met)};
  ms_status status = MS_OK;
  out->L = L;
  out->E = E;
  out->next_at = calloc(rows, sizeof *out->next_at);
  out->last_at = calloc(rows, sizeof *out->last_at);
  if (!c.at || !c.order || !c.seen || !c.met || !out->next_at || !out->last_at) {
    status = ms_fail(err, MS_ENOMEM, "no memory for the hops of %lld tokens", (long long)T);
    goto done;
  }
  for (int32_t l = 0; l + 1 < L; l++)
    if ((status = count_layer(expert, T, K, l, &c, out, err)) != MS_OK) goto done;
  size_t hops = (size_t)out->next_at[rows - 1];
  out->last = malloc((hops + 1) * sizeof *out->last);
  if (!out->last) {
    status = ms_fail(err, MS_ENOMEM, "no memory for %zu hops", hops);
    goto done;
  }
  turn_round(out);
done:
  free(c.at);
  free(c.order);
  free(c.seen);
  free(c.met);
  if (status != MS_OK) ms_hops_free(out);
  return status;
}
