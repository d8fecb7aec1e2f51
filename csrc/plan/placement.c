// placement.c - placing whole experts: contiguous, balanced, MoETuner's two stages, and what any placement is worth.
// SPDX-License-Identifier: Apache-2.0
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- one layer: balance ---------------------------------------------------------------------------------------------

void ms_layer_count(ms_layer *layer) {
  for (int32_t r = 0; r < layer->R; r++) {
    layer->load[r] = 0;
    layer->size[r] = 0;
  }
  for (int32_t i = 0; i < layer->n; i++) {
    layer->load[layer->owner[i]] += layer->weight[i];
    layer->size[layer->owner[i]]++;
  }
}

// Heap sort of order by key, decreasing; among equal keys the smaller number first, so that the order is one only.
static bool comes_before(const int64_t *key, int32_t i, int32_t j) {
  return key[i] != key[j] ? key[i] > key[j] : i < j;
}

static void sift(const int64_t *key, int32_t *order, int32_t at, int32_t count) {
  for (int32_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && comes_before(key, order[child], order[child + 1])) child++;
    if (!comes_before(key, order[at], order[child])) return;
    int32_t other = order[at];
    order[at] = order[child];
    order[child] = other;
  }
}

static void sort_by_key(const int64_t *key, int32_t *order, int32_t n) {
  for (int32_t i = 0; i < n; i++) order[i] = i;
  for (int32_t i = n / 2 - 1; i >= 0; i--) sift(key, order, i, n);
  for (int32_t count = n - 1; count > 0; count--) {
    int32_t other = order[0];
    order[0] = order[count];
    order[count] = other;
    sift(key, order, 0, count);
  }
}

void ms_layer_deal(ms_layer *layer, const int64_t *key, int32_t *order) {
  const int32_t R = layer->R, least = layer->n / R;
  int32_t wides = layer->n % R; // ranks that may still take one more than the others
  for (int32_t r = 0; r < R; r++) {
    layer->load[r] = 0;
    layer->size[r] = 0;
  }
  sort_by_key(key, order, layer->n);
  for (int32_t k = 0; k < layer->n; k++) {
    int32_t best = -1;
    for (int32_t r = 0; r < R; r++) {
      bool room = layer->size[r] < least || (layer->size[r] == least && wides > 0);
      if (room && (best < 0 || layer->load[r] < layer->load[best])) best = r;
    }
    int32_t i = order[k];
    if (layer->size[best] == least) wides--;
    layer->owner[i] = best;
    layer->load[best] += layer->weight[i];
    layer->size[best]++;
  }
}

// The exchange of an item of the heaviest rank that makes the heavier of the two ranks lightest; false: none helps.
static bool level_once(ms_layer *layer) {
  const int32_t R = layer->R;
  int32_t top = 0;
  for (int32_t r = 1; r < R; r++)
    if (layer->load[r] > layer->load[top]) top = r;
  int64_t best = layer->load[top];
  int32_t item = -1, other = -1, to = -1;
  for (int32_t i = 0; i < layer->n; i++) {
    if (layer->owner[i] != top) continue;
    for (int32_t r = 0; r < R; r++) {
      if (!ms_layer_may_move(layer, i, r)) continue;
      int64_t here = layer->load[top] - layer->weight[i], there = layer->load[r] + layer->weight[i];
      int64_t worst = here > there ? here : there;
      if (worst < best) best = worst, item = i, other = -1, to = r;
    }
    for (int32_t j = 0; j < layer->n; j++) {
      int64_t less = layer->weight[i] - layer->weight[j];
      if (less <= 0) continue;
      int64_t here = layer->load[top] - less, there = layer->load[layer->owner[j]] + less;
      int64_t worst = here > there ? here : there;
      if (layer->owner[j] != top && worst < best) best = worst, item = i, other = j;
    }
  }
  if (item < 0) return false;
  if (other >= 0) ms_layer_swap(layer, item, other);
  if (other < 0) ms_layer_move(layer, item, to);
  return true;
}

void ms_layer_level(ms_layer *layer) {
  // Every exchange lightens the heaviest rank and makes none as heavy as it was, so it ends; the limit only bounds the time.
  for (int32_t i = 0; i < 4 * layer->n && level_once(layer); i++) {
  }
}

// ---- the problem ----------------------------------------------------------------------------------------------------

void ms_problem_free(ms_problem *p) {
  free(p->n);
  free(p->expert);
  free(p->weight);
  free(p->place);
  free(p->bound);
  free(p->cap);
  free(p->balanced);
  *p = (ms_problem){0};
}

static ms_status check_spec(const ms_place_spec *s, ms_error *err) {
  if (s->L < 1 || s->L > MS_MAX_LAYERS)
    return ms_fail(err, MS_EINVAL, "layers: got %d, expected 1 to %d", s->L, MS_MAX_LAYERS);
  if (s->E < 1 || s->E > MS_MAX_EXPERTS)
    return ms_fail(err, MS_EINVAL, "num_experts: got %d, expected 1 to %d", s->E, MS_MAX_EXPERTS);
  if (s->R < 1 || s->R > MS_MAX_RANKS)
    return ms_fail(err, MS_EINVAL, "ranks: got %d, expected 1 to %d", s->R, MS_MAX_RANKS);
  if (!(s->slack >= 0) || s->slack > 1e6)
    return ms_fail(err, MS_EINVAL, "slack: got %g, expected 0 or more", s->slack);
  if (s->hops && (s->hops->L != s->L || s->hops->E != s->E))
    return ms_fail(err, MS_ESHAPE, "hops: of %d layers and %d experts, but counts are of %d and %d",
                   s->hops->L, s->hops->E, s->L, s->E);
  if (s->hops && s->hops->total > MS_MAX_COST)
    return ms_fail(err, MS_ERANGE, "hops: got %lld, expected at most 2^59",
                   (long long)s->hops->total);
  for (int32_t l = 0; l < s->L; l++) {
    int64_t total = 0;
    for (int32_t e = 0; e < s->E; e++) {
      int64_t count = s->counts[(int64_t)l * s->E + e];
      if (count < 0 || count > ((int64_t)1 << 44) - total)
        return ms_fail(
            err, MS_ERANGE,
            "counts: layer %d, expert %d: got %lld, expected 0 or more, at most 2^44 in a layer", l,
            e, (long long)count);
      total += count;
    }
  }
  return MS_OK;
}

static ms_status balance(const ms_place_spec *spec, ms_problem *p, ms_error *err) {
  int64_t *load = malloc((size_t)p->R * sizeof *load);
  int32_t *size = malloc((size_t)p->R * sizeof *size);
  int32_t *owner = malloc((size_t)p->E * sizeof *owner);
  int32_t *order = malloc((size_t)p->E * sizeof *order);
  ms_status status = MS_OK;
  if (!load || !size || !owner || !order) {
    status = ms_fail(err, MS_ENOMEM, "no memory to balance %d experts", p->E);
    goto done;
  }
  for (int32_t l = 0; l < p->L; l++) {
    const int64_t *weight = p->weight + (int64_t)l * p->E;
    ms_layer layer = {
        .n = p->n[l], .R = p->R, .weight = weight, .owner = owner, .load = load, .size = size};
    ms_layer_deal(&layer, weight, order);
    ms_layer_level(&layer);
    int64_t total = 0, hottest = 0, heaviest = 0;
    for (int32_t i = 0; i < layer.n; i++) {
      total += weight[i];
      if (weight[i] > hottest) hottest = weight[i];
    }
    for (int32_t r = 0; r < p->R; r++)
      if (load[r] > heaviest) heaviest = load[r];
    p->bound[l] = fmax((double)total / p->R, (double)hottest);
    double cap = floor((1 + spec->slack) * p->bound[l]);
    p->cap[l] = cap<(double)heaviest ? heaviest : cap>(double) total ? total : (int64_t)cap;
    int32_t *balanced = p->balanced + (int64_t)l * p->E;
    for (int32_t e = 0; e < p->E; e++) {
      int32_t i = p->place[(int64_t)l * p->E + e];
      balanced[e] = i < 0 ? -1 : owner[i];
    }
  }
done:
  free(load);
  free(size);
  free(owner);
  free(order);
  return status;
}

ms_status ms_problem_init(const ms_place_spec *spec, ms_problem *p, ms_error *err) {
  *p = (ms_problem){0};
  MS_TRY(check_spec(spec, err));
  const size_t L = (size_t)spec->L, all = L * (size_t)spec->E;
  p->L = spec->L;
  p->E = spec->E;
  p->R = spec->R;
  p->hops = spec->hops;
  p->n = calloc(L, sizeof *p->n);
  p->expert = calloc(all, sizeof *p->expert);
  p->weight = calloc(all, sizeof *p->weight);
  p->place = calloc(all, sizeof *p->place);
  p->bound = calloc(L, sizeof *p->bound);
  p->cap = calloc(L, sizeof *p->cap);
  p->balanced = calloc(all, sizeof *p->balanced);
  if (!p->n || !p->expert || !p->weight || !p->place || !p->bound || !p->cap || !p->balanced)
    return ms_fail(err, MS_ENOMEM, "no memory to place %d experts in %d layers", p->E, p->L);
  for (int32_t l = 0; l < p->L; l++)
    for (int32_t e = 0; e < p->E; e++) {
      const int64_t row = (int64_t)l * p->E;
      if (spec->apart && spec->apart[row + e]) {
        p->place[row + e] = -1;
        continue;
      }
      p->place[row + e] = p->n[l];
      p->expert[row + p->n[l]] = e;
      p->weight[row + p->n[l]++] = spec->counts[row + e];
    }
  return balance(spec, p, err);
}

void ms_problem_benefit(const ms_problem *p, const int32_t *owner, int32_t l, bool before,
                        bool after, int64_t *benefit) {
  const int32_t E = p->E, R = p->R;
  memset(benefit, 0, (size_t)p->n[l] * (size_t)R * sizeof *benefit);
  if (!p->hops) return;
  for (int32_t i = 0; i < p->n[l]; i++) {
    const int64_t e = p->expert[(int64_t)l * E + i];
    int64_t *row = benefit + (int64_t)i * R;
    if (before && l > 0) {
      const int64_t *at = p->hops->last_at + (l - 1) * (int64_t)E + e;
      const int32_t *of = owner + (l - 1) * (int64_t)E;
      for (int64_t k = at[0]; k < at[1]; k++) {
        int32_t r = of[p->hops->last[k].expert];
        if (r >= 0) row[r] += p->hops->last[k].count;
      }
    }
    if (after && l + 1 < p->L) {
      const int64_t *at = p->hops->next_at + l * (int64_t)E + e;
      const int32_t *of = owner + (l + 1) * (int64_t)E;
      for (int64_t k = at[0]; k < at[1]; k++) {
        int32_t r = of[p->hops->next[k].expert];
        if (r >= 0) row[r] += p->hops->next[k].count;
      }
    }
  }
}

void ms_problem_flow(const ms_problem *p, const int32_t *owner, int32_t l, int64_t *flow) {
  const int32_t E = p->E, R = p->R;
  const int32_t *here = owner + (int64_t)l * E, *there = here + E;
  memset(flow, 0, (size_t)R * (size_t)R * sizeof *flow);
  if (!p->hops) return;
  for (int32_t e = 0; e < E; e++) {
    if (here[e] < 0) continue;
    const int64_t *at = p->hops->next_at + (int64_t)l * E + e;
    for (int64_t k = at[0]; k < at[1]; k++) {
      int32_t r = there[p->hops->next[k].expert];
      if (r >= 0) flow[(int64_t)here[e] * R + r] += p->hops->next[k].count;
    }
  }
}

int64_t ms_problem_local(const ms_problem *p, const int32_t *owner, int32_t l) {
  const int32_t E = p->E, *here = owner + (int64_t)l * E, *there = here + E;
  int64_t local = 0;
  if (!p->hops) return 0;
  for (int32_t e = 0; e < E; e++) {
    if (here[e] < 0) continue;
    const int64_t *at = p->hops->next_at + (int64_t)l * E + e;
    for (int64_t k = at[0]; k < at[1]; k++)
      if (there[p->hops->next[k].expert] == here[e]) local += p->hops->next[k].count;
  }
  return local;
}

// ---- placements -----------------------------------------------------------------------------------------------------

ms_status ms_place_contiguous(const ms_place_spec *spec, int32_t *owner, ms_error *err) {
  ms_problem p;
  ms_status status = ms_problem_init(spec, &p, err);
  for (int32_t l = 0; l < p.L && status == MS_OK; l++)
    for (int32_t r = 0; r < p.R; r++) {
      const int64_t n = p.n[l], row = (int64_t)l * p.E;
      for (int64_t e = 0; r == 0 && e < p.E; e++) owner[row + e] = -1;
      for (int64_t i = n * r / p.R; i < n * (r + 1) / p.R; i++) owner[row + p.expert[row + i]] = r;
    }
  ms_problem_free(&p);
  return status;
}

ms_status ms_place_balanced(const ms_place_spec *spec, int32_t *owner, ms_error *err) {
  ms_problem p;
  ms_status status = ms_problem_init(spec, &p, err);
  if (status == MS_OK) memcpy(owner, p.balanced, (size_t)p.L * (size_t)p.E * sizeof *owner);
  ms_problem_free(&p);
  return status;
}

bool ms_problem_relabel(const ms_problem *p, int32_t *owner, int32_t l, ms_assigner *assigner,
                        int64_t *flow, int64_t *price, int32_t *name) {
  const int32_t R = p->R;
  ms_problem_flow(p, owner, l, flow);
  int64_t had = 0;
  for (int32_t a = 0; a < R; a++) {
    had += flow[(int64_t)a * R + a];
    for (
        int32_t b = 0; b <= a;
        b++) { // items are the ranks of l + 1, bins their new names: transpose; more hops cost less
      int64_t forth = flow[(int64_t)a * R + b], back = flow[(int64_t)b * R + a];
      flow[(int64_t)a * R + b] = -back;
      flow[(int64_t)b * R + a] = -forth;
    }
  }
  memset(price, 0, ((size_t)R + 1) * sizeof *price);
  if (-ms_assign(assigner, flow, R, price, name) <= had) return false;
  for (int64_t e = (l + 1) * (int64_t)p->E; e < p->L * (int64_t)p->E; e++)
    if (owner[e] >= 0) owner[e] = name[owner[e]];
  return true;
}

ms_status ms_place_two_stage(const ms_place_spec *spec, int32_t *owner, ms_error *err) {
  ms_problem p;
  ms_assigner *assigner = NULL;
  int64_t *flow = NULL, *price = NULL;
  int32_t *name = NULL;
  ms_status status = ms_problem_init(spec, &p, err);
  if (status != MS_OK) goto done;
  memcpy(owner, p.balanced, (size_t)p.L * (size_t)p.E * sizeof *owner);
  if (!p.hops) goto done;
  if ((status = ms_assigner_create(p.R, p.R, &assigner, err)) != MS_OK) goto done;
  flow = malloc((size_t)p.R * (size_t)p.R * sizeof *flow);
  price = malloc(((size_t)p.R + 1) * sizeof *price);
  name = malloc((size_t)p.R * sizeof *name);
  if (!flow || !price || !name) {
    status = ms_fail(err, MS_ENOMEM, "no memory to map the clusters of %d ranks", p.R);
    goto done;
  }
  for (int32_t l = 0; l + 1 < p.L; l++)
    ms_problem_relabel(&p, owner, l, assigner, flow, price, name);
done:
  free(flow);
  free(price);
  free(name);
  ms_assigner_free(assigner);
  ms_problem_free(&p);
  return status;
}

// ---- the score ------------------------------------------------------------------------------------------------------

// The largest `most` counts of a row whose experts are placed (largest first in `top`, which holds as many).
static int64_t sum_of_largest(const ms_hop *hop, int64_t from, int64_t to, const int32_t *place,
                              int32_t most, int64_t *top) {
  int32_t kept = 0;
  int64_t sum = 0;
  for (int64_t k = from; k < to; k++) {
    int64_t count = hop[k].count;
    if (place[hop[k].expert] < 0 || (kept == most && (!most || count <= top[kept - 1]))) continue;
    int32_t at = kept < most ? kept++ : kept - 1;
    for (; at > 0 && top[at - 1] < count; at--) top[at] = top[at - 1];
    top[at] = count;
  }
  for (int32_t i = 0; i < kept; i++) sum += top[i];
  return sum;
}

// No placement has more local hops between l and l + 1: an expert shares its rank with at most ceil(n/R) of the others.
static int64_t most_local(const ms_problem *p, int32_t l, int64_t *top) {
  const int64_t E = p->E, row = l * E;
  const ms_hops *hops = p->hops;
  int64_t forth = 0, back = 0;
  const int32_t most_there = (p->n[l + 1] + p->R - 1) / p->R,
                most_here = (p->n[l] + p->R - 1) / p->R;
  for (int32_t i = 0; i < p->n[l]; i++) {
    const int64_t *at = hops->next_at + row + p->expert[row + i];
    forth += sum_of_largest(hops->next, at[0], at[1], p->place + row + E, most_there, top);
  }
  for (int32_t i = 0; i < p->n[l + 1]; i++) {
    const int64_t *at = hops->last_at + row + p->expert[row + E + i];
    back += sum_of_largest(hops->last, at[0], at[1], p->place + row, most_here, top);
  }
  return forth < back ? forth : back;
}

static ms_status check_owner(const ms_problem *p, const int32_t *owner, ms_error *err) {
  for (int32_t l = 0; l < p->L; l++)
    for (int32_t e = 0; e < p->E; e++) {
      const int64_t at = (int64_t)l * p->E + e;
      bool placed = p->place[at] >= 0;
      if (placed ? owner[at] < 0 || owner[at] >= p->R : owner[at] != -1)
        return ms_fail(err, MS_EINVAL, "owner: layer %d, expert %d: got %d, expected %s%d", l, e,
                       owner[at], placed ? "0 to " : "", placed ? p->R - 1 : -1);
    }
  return MS_OK;
}

ms_status ms_place_measure(const ms_place_spec *spec, const int32_t *owner, ms_place_score *score,
                           ms_error *err) {
  ms_problem p;
  int64_t *top = NULL;
  ms_status status = ms_problem_init(spec, &p, err);
  if (status != MS_OK) goto done;
  if ((status = check_owner(&p, owner, err)) != MS_OK) goto done;
  if (!(top = malloc((size_t)p.E * sizeof *top))) {
    status = ms_fail(err, MS_ENOMEM, "no memory to measure a placement of %d experts", p.E);
    goto done;
  }
  const size_t L = (size_t)p.L;
  if (score->bound) memcpy(score->bound, p.bound, L * sizeof *p.bound);
  if (score->cap) memcpy(score->cap, p.cap, L * sizeof *p.cap);
  if (score->load) {
    memset(score->load, 0, L * (size_t)p.R * sizeof *score->load);
    for (int32_t l = 0; l < p.L; l++)
      for (int32_t i = 0; i < p.n[l]; i++) {
        const int64_t row = (int64_t)l * p.E;
        score->load[(int64_t)l * p.R + owner[row + p.expert[row + i]]] += p.weight[row + i];
      }
  }
  for (int32_t l = 0; l + 1 < p.L; l++) {
    if (score->local) score->local[l] = ms_problem_local(&p, owner, l);
    if (score->most) score->most[l] = p.hops ? most_local(&p, l, top) : 0;
  }
  if (score->gap) {
    memset(score->gap, 0, L * sizeof *score->gap);
    if (p.hops) status = ms_problem_gaps(&p, owner, score->gap, err);
  }
done:
  free(top);
  ms_problem_free(&p);
  return status;
}
