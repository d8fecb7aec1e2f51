// sweep.c - block-coordinate sweeps: one layer at a time, the layers before and after it fixed.
//
// A layer by itself, with benefit[i, r] = hops that stay if its expert i is on rank r (hops.c counts them, the neighbours'
// owners are known), weight[i] = slots of expert i:
//
//   maximise  sum_i benefit[i, owner[i]]   with floor(n/R) or ceil(n/R) experts and at most cap slots on every rank
//
// Without the cap it is an assignment problem (assignment.c, exact). With multipliers u[r] >= 0 for the cap it still is:
//
//   dual(u) = max_owner sum_i (benefit[i, owner[i]] - u[owner[i]] * weight[i]) + sum_r u[r] * cap   >= the maximum
//
// Subgradient steps lower the dual; what the inner assignment overloads is repaired by swaps and then improved by swaps.
// The best of these is taken if it beats what the layer has, so every solve helps or changes nothing; it stops early when dual and
// value meet. Sweeps repeat until no layer changes; relabelling all ranks from a layer on (which no single layer can do)
// is tried as well. Then kicks: a few layers are shuffled and swept again, kept if the whole got better.
//
// Costs, multipliers and duals are integers, hops times `scale`: assignments are exact, a dual is a bound to the last hop, and
// results are the same everywhere.
//
// Source: Lagrangian relaxation of the generalised assignment problem (Fisher, Management Science 27, 1981); Polyak's steps.
//
// SPDX-License-Identifier: Apache-2.0
#include "problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  SOLVE_STEPS =
      16, // subgradient steps of a layer in a sweep; they start from the last multipliers of the layer
  PROVE_STEPS = 200,       // when only the dual is wanted
  SWEEPS = 100,            // at most; some 5 to 10 are used
  KICKS = 24,              // of a start
  LARGEST_MULTIPLIER = 64, // hops for a slot
  FINEST_SCALE = 1 << 12
};

typedef struct sweeper {
  const ms_problem *p;
  ms_assigner *assigner;
  int64_t *benefit, *cost;  // [E, R] of the layer in hand; cost also [R, R] of ms_problem_relabel
  int64_t *price;           // [L, R + 1] of each layer's last assignment
  int64_t *multiplier;      // [L, R] u times scale
  int64_t *best_multiplier; // [R + 1]; the hub's price of ms_problem_relabel
  int64_t *load, *key;      // [R], [max(E, R)]
  int32_t *size, *order;    // [R], [E]
  int32_t *inner, *trial, *best; // [E] owners of the layer in hand
  int32_t *name;                 // [R]
  bool *stale;                   // [L] a neighbour or the layer has changed since it was solved
  int64_t scale;
  uint64_t random;
} sweeper;

static void sweeper_free(sweeper *s) {
  ms_assigner_free(s->assigner);
  free(s->benefit);
  free(s->cost);
  free(s->price);
  free(s->multiplier);
  free(s->best_multiplier);
  free(s->load);
  free(s->key);
  free(s->size);
  free(s->order);
  free(s->inner);
  free(s->trial);
  free(s->best);
  free(s->name);
  free(s->stale);
}

// The finest scale at which neither the costs of a layer (ms_assign) nor its dual can overflow.
static ms_status choose_scale(const ms_problem *p, int64_t *scale, ms_error *err) {
  *scale = FINEST_SCALE;
  for (int32_t l = 0; l < p->L; l++) {
    int64_t slots = p->R * p->cap[l]; // no more than MS_MAX_RANKS * 2^44
    for (int32_t i = 0; i < p->n[l]; i++) slots += p->weight[(int64_t)l * p->E + i];
    const int64_t largest = p->hops->total + LARGEST_MULTIPLIER * slots;
    if (largest > MS_MAX_COST)
      return ms_fail(err, MS_ERANGE,
                     "counts: layer %d: %lld hops and %d ranks of up to %lld slots are too many to "
                     "compute with exactly",
                     l, (long long)p->hops->total, p->R, (long long)p->cap[l]);
    while (largest > MS_MAX_COST / *scale) *scale /= 2;
  }
  return MS_OK;
}

static ms_status sweeper_init(sweeper *s, const ms_problem *p, uint64_t seed, ms_error *err) {
  const size_t L = (size_t)p->L, E = (size_t)p->E, R = (size_t)p->R, items = E > R ? E : R;
  *s = (sweeper){.p = p, .random = seed};
  MS_TRY(choose_scale(p, &s->scale, err));
  MS_TRY(ms_assigner_create((int32_t)items, p->R, &s->assigner, err));
  s->benefit = malloc(E * R * sizeof *s->benefit);
  s->cost = malloc(items * R * sizeof *s->cost);
  s->price = calloc(L * (R + 1), sizeof *s->price);
  s->multiplier = calloc(L * R, sizeof *s->multiplier);
  s->best_multiplier = malloc((R + 1) * sizeof *s->best_multiplier);
  s->load = malloc(R * sizeof *s->load);
  s->key = malloc(items * sizeof *s->key);
  s->size = malloc(R * sizeof *s->size);
  s->order = malloc(E * sizeof *s->order);
  s->inner = malloc(E * sizeof *s->inner);
  s->trial = malloc(E * sizeof *s->trial);
  s->best = malloc(E * sizeof *s->best);
  s->name = malloc(R * sizeof *s->name);
  s->stale = malloc(L * sizeof *s->stale);
  if (!s->benefit || !s->cost || !s->price || !s->multiplier || !s->best_multiplier || !s->load ||
      !s->key || !s->size || !s->order || !s->inner || !s->trial || !s->best || !s->name ||
      !s->stale)
    return ms_fail(err, MS_ENOMEM, "no memory to place %d experts on %d ranks", p->E, p->R);
  return MS_OK;
}

// splitmix64: a seed, 64 good bits, no state but a counter.
static uint64_t draw(sweeper *s) {
  uint64_t z = s->random += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
static int32_t draw_below(sweeper *s, int32_t n) {
  return (int32_t)((draw(s) >> 33) % (uint64_t)n);
}

// ---- one layer ------------------------------------------------------------------------------------------------------

// Its loads and sizes are still to be counted.
static ms_layer layer_of(const sweeper *s, int32_t l, int32_t *owner) {
  ms_layer layer = {.n = s->p->n[l],
                    .R = s->p->R,
                    .weight = s->p->weight + (int64_t)l * s->p->E,
                    .owner = owner,
                    .load = s->load,
                    .size = s->size};
  return layer;
}

static int64_t value_of(const ms_layer *layer, const int64_t *benefit) {
  int64_t value = 0;
  for (int32_t i = 0; i < layer->n; i++) value += benefit[(int64_t)i * layer->R + layer->owner[i]];
  return value;
}

static int64_t over(int64_t load, int64_t cap) { return load > cap ? load - cap : 0; }

static int64_t overload(const ms_layer *layer, int64_t cap) {
  int64_t sum = 0;
  for (int32_t r = 0; r < layer->R; r++) sum += over(layer->load[r], cap);
  return sum;
}

// By how much the overload shrinks if rank a, which is `excess` > 0 over the cap, gives less > 0 slots to a rank with `load`.
static int64_t relief(int64_t excess, int64_t less, int64_t load, int64_t cap) {
  const int64_t room = load < cap ? cap - load : 0;
  return (less < excess ? less : excess) - (less > room ? less - room : 0);
}

// Exchange experts of overloaded ranks, least hops lost for each slot of relief first, until no rank is over the cap.
// Given up (false) when stuck, or when `value`, the hops that stay, falls to `least`. benefit NULL: hops do not matter.
static bool repair(ms_layer *layer, int64_t cap, const int64_t *benefit, int64_t value,
                   int64_t least) {
  const int32_t n = layer->n, R = layer->R;
  for (int32_t round = 0; round < 4 * n && value > least; round++) {
    if (!overload(layer, cap)) return true;
    double best_lost = 0, best_gained = 0;
    int32_t item = -1, other = -1, to = -1;
    for (int32_t i = 0; i < n; i++) {
      const int32_t a = layer->owner[i];
      const int64_t excess = layer->load[a] - cap, weight = layer->weight[i];
      if (excess <= 0) continue;
      const int64_t *row = benefit ? benefit + (int64_t)i * R : NULL;
      for (int32_t b = 0; n % R && b < R; b++) {
        if (!ms_layer_may_move(layer, i, b)) continue;
        const int64_t gained = relief(excess, weight, layer->load[b], cap);
        const double lost = row ? (double)(row[a] - row[b]) : 0;
        if (gained <= 0 || (item >= 0 && lost * best_gained >= best_lost * (double)gained))
          continue;
        best_lost = lost, best_gained = (double)gained, item = i, other = -1, to = b;
      }
      for (int32_t j = 0; j < n; j++) {
        const int32_t b = layer->owner[j];
        const int64_t less = weight - layer->weight[j];
        if (less <= 0 || b == a) continue;
        const int64_t gained = relief(excess, less, layer->load[b], cap);
        if (gained <= 0) continue;
        const int64_t *with = benefit ? benefit + (int64_t)j * R : NULL;
        const double lost = row ? (double)(row[a] - row[b] + with[b] - with[a]) : 0;
        // lost / gained of both, compared without a division: this loop is most of the time of a sweep.
        if (item >= 0 && lost * best_gained >= best_lost * (double)gained) continue;
        best_lost = lost, best_gained = (double)gained, item = i, other = j;
      }
    }
    if (item < 0) return false;
    value -= (int64_t)best_lost;
    if (other >= 0) ms_layer_swap(layer, item, other);
    if (other < 0) ms_layer_move(layer, item, to);
  }
  return value > least && !overload(layer, cap);
}

// Swaps and moves that keep more hops and stay within the cap, until there is none.
static void improve(ms_layer *layer, int64_t cap, const int64_t *benefit) {
  const int32_t n = layer->n, R = layer->R;
  for (bool again = true; again;) {
    again = false;
    for (int32_t i = 0; i < n; i++) {
      const int64_t *row = benefit + (int64_t)i * R;
      if (n % R)
        for (int32_t b = 0; b < R; b++)
          if (row[b] > row[layer->owner[i]] && ms_layer_may_move(layer, i, b) &&
              layer->load[b] + layer->weight[i] <= cap) {
            ms_layer_move(layer, i, b);
            again = true;
          }
      for (int32_t j = i + 1; j < n; j++) {
        const int32_t a = layer->owner[i], b = layer->owner[j];
        const int64_t *with = benefit + (int64_t)j * R;
        if (a == b || row[b] - row[a] + with[a] - with[b] <= 0) continue;
        int64_t more = layer->weight[i] - layer->weight[j]; // to b
        if (layer->load[b] + more > cap || layer->load[a] - more > cap) continue;
        ms_layer_swap(layer, i, j);
        again = true;
      }
    }
  }
}

// Subgradient steps for the layer whose benefit is in s->benefit. `best` [n] holds owners within the cap and is replaced by better
// ones; *value is theirs. NULL: only the dual is wanted. Returns the least dual found, in hops, rounded down: no owners within
// the cap have a larger value. A dual is not negative, as the balanced placement is within the cap.
static int64_t solve(sweeper *s, int32_t l, int32_t steps, int32_t *best, int64_t *value) {
  const ms_problem *p = s->p;
  const int32_t n = p->n[l], R = p->R;
  const int64_t cap = p->cap[l], scale = s->scale, *weight = p->weight + (int64_t)l * p->E;
  int64_t *multiplier = s->multiplier + (int64_t)l * R, *price = s->price + (int64_t)l * (R + 1);
  double step = 1;
  int64_t least = INT64_MAX;
  int64_t repaired = -1; // the best before its swaps: those of a worse one seldom end higher
  int32_t idle = 0;
  memcpy(s->best_multiplier, multiplier, (size_t)R * sizeof *multiplier);
  for (int32_t k = 0; k < steps; k++) {
    for (int32_t i = 0; i < n; i++)
      for (int32_t r = 0; r < R; r++)
        s->cost[(int64_t)i * R + r] =
            multiplier[r] * weight[i] - s->benefit[(int64_t)i * R + r] * scale;
    int64_t dual = -ms_assign(s->assigner, s->cost, n, price, s->inner);
    for (int32_t r = 0; r < R; r++) dual += multiplier[r] * cap;
    ms_layer layer = layer_of(s, l, s->inner);
    ms_layer_count(&layer);
    double slope = 0;
    for (int32_t r = 0; r < R; r++) {
      double excess = (double)(layer.load[r] - cap);
      if (excess > 0 || multiplier[r] > 0) slope += excess * excess;
      s->key[r] = layer.load[r] - cap; // repair changes the loads
    }
    if (dual < least) {
      idle = dual < least - scale / 2 ? 0 : idle + 1;
      least = dual;
      memcpy(s->best_multiplier, multiplier, (size_t)R * sizeof *multiplier);
    } else {
      idle++;
    }
    if (best) {
      memcpy(s->trial, s->inner, (size_t)n * sizeof *s->trial);
      layer.owner = s->trial;
      int64_t found = repair(&layer, cap, s->benefit, value_of(&layer, s->benefit), repaired)
                          ? value_of(&layer, s->benefit)
                          : -1;
      if (found > repaired) {
        repaired = found;
        improve(&layer, cap, s->benefit);
        found = value_of(&layer, s->benefit);
        if (found > *value) {
          *value = found;
          memcpy(best, s->trial, (size_t)n * sizeof *best);
        }
      }
    }
    if (least - *value * scale < scale || slope == 0)
      break; // less than one hop is missing; or these owners need no multiplier
    if (idle == 3) {
      step /= 2;
      idle = 0;
      memcpy(multiplier, s->best_multiplier, (size_t)R * sizeof *multiplier);
    }
    double length = step * (double)(dual - *value * scale) / slope;
    const double most = (double)scale * LARGEST_MULTIPLIER;
    for (int32_t r = 0; r < R; r++) {
      double next = (double)multiplier[r] + length * (double)s->key[r];
      multiplier[r] = next > 0 ? (int64_t)fmin(next, most) : 0;
    }
  }
  memcpy(multiplier, s->best_multiplier, (size_t)R * sizeof *multiplier);
  return least / scale;
}

// Solve layer l with the neighbours that count; true: it changed.
static bool solve_layer(sweeper *s, int32_t *owner, int32_t l, bool before, bool after) {
  const ms_problem *p = s->p;
  const int64_t row = (int64_t)l * p->E;
  if (!p->n[l]) return false;
  ms_problem_benefit(p, owner, l, before, after, s->benefit);
  for (int32_t i = 0; i < p->n[l]; i++) s->best[i] = owner[row + p->expert[row + i]];
  ms_layer layer = layer_of(s, l, s->best);
  const int64_t had = value_of(&layer, s->benefit);
  int64_t value = had;
  solve(s, l, SOLVE_STEPS, s->best, &value);
  if (value == had) return false;
  for (int32_t i = 0; i < p->n[l]; i++) owner[row + p->expert[row + i]] = s->best[i];
  return true;
}

// ---- the whole ------------------------------------------------------------------------------------------------------

static int64_t local_of(const ms_problem *p, const int32_t *owner) {
  int64_t local = 0;
  for (int32_t l = 0; l + 1 < p->L; l++) local += ms_problem_local(p, owner, l);
  return local;
}

static void mark(sweeper *s, int32_t l) {
  s->stale[l] = true;
  if (l > 0) s->stale[l - 1] = true;
  if (l + 1 < s->p->L) s->stale[l + 1] = true;
}

// Solve the stale layers, forth and back, until none is.
static void sweep(sweeper *s, int32_t *owner) {
  const int32_t L = s->p->L;
  bool any = true;
  for (int32_t round = 0; any && round < SWEEPS; round++) {
    any = false;
    for (int32_t k = 0; k < L; k++) {
      int32_t l = round % 2 ? L - 1 - k : k;
      if (!s->stale[l]) continue;
      s->stale[l] = false;
      if (!solve_layer(s, owner, l, true, true)) continue;
      mark(s, l);
      s->stale[l] = false;
      any = true;
    }
    if (any) continue;
    for (int32_t l = 0; l + 1 < L; l++)
      if (ms_problem_relabel(s->p, owner, l, s->assigner, s->cost, s->best_multiplier, s->name)) {
        s->stale[l] = s->stale[l + 1] = any = true;
        if (l > 0) s->stale[l - 1] = true;
        if (l + 2 < L) s->stale[l + 2] = true;
      }
  }
}

// A random balanced layer: deal by random keys near the weights, repaired to the cap; else the balanced one.
static void deal_at_random(sweeper *s, int32_t *owner, int32_t l) {
  const ms_problem *p = s->p;
  const int64_t row = (int64_t)l * p->E;
  ms_layer layer = layer_of(s, l, s->trial);
  for (int32_t i = 0; i < layer.n; i++)
    s->key[i] = layer.weight[i] / 2 + (int64_t)(draw(s) % (uint64_t)(layer.weight[i] + 1));
  ms_layer_deal(&layer, s->key, s->order);
  bool fits = repair(&layer, p->cap[l], NULL, 0, -1);
  for (int32_t i = 0; i < layer.n; i++) {
    int32_t e = p->expert[row + i];
    owner[row + e] = fits ? s->trial[i] : p->balanced[row + e];
  }
}

// One layer at random, then outwards, each for the hops with the layer before it.
static void start_at_random(sweeper *s, int32_t *owner) {
  const ms_problem *p = s->p;
  const int32_t first = draw_below(s, p->L);
  for (int32_t l = 0; l < p->L; l++) deal_at_random(s, owner, l);
  for (int32_t l = first + 1; l < p->L; l++) solve_layer(s, owner, l, true, false);
  for (int32_t l = first - 1; l >= 0; l--) solve_layer(s, owner, l, false, true);
}

// Exchange a few pairs of experts within the cap in one to three layers.
static void kick(sweeper *s, int32_t *owner) {
  const ms_problem *p = s->p;
  const int32_t width = 1 + draw_below(s, p->L < 3 ? p->L : 3),
                first = draw_below(s, p->L - width + 1);
  for (int32_t l = first; l < first + width; l++) {
    const int64_t row = (int64_t)l * p->E;
    const int32_t n = p->n[l];
    if (n < 2) continue;
    for (int32_t i = 0; i < n; i++) s->trial[i] = owner[row + p->expert[row + i]];
    ms_layer layer = layer_of(s, l, s->trial);
    ms_layer_count(&layer);
    for (int32_t k = 0, pairs = 2 + n / 6; k < pairs; k++) {
      int32_t i = draw_below(s, n), j = draw_below(s, n);
      int64_t more = layer.weight[i] - layer.weight[j];
      const int32_t a = layer.owner[i], b = layer.owner[j];
      if (a != b && layer.load[b] + more <= p->cap[l] && layer.load[a] - more <= p->cap[l])
        ms_layer_swap(&layer, i, j);
    }
    for (int32_t i = 0; i < n; i++) owner[row + p->expert[row + i]] = s->trial[i];
    mark(s, l);
  }
}

ms_status ms_place_sweep(const ms_place_spec *spec, int32_t starts, uint64_t seed, int32_t *owner,
                         ms_error *err) {
  if (starts < 1) return ms_fail(err, MS_EINVAL, "starts: got %d, expected at least 1", starts);
  MS_TRY(ms_place_two_stage(spec, owner, err));
  if (!spec->hops || spec->R == 1) return MS_OK;
  ms_problem p;
  sweeper s = {0};
  int32_t *found = NULL, *kept = NULL;
  ms_status status = ms_problem_init(spec, &p, err);
  if (status != MS_OK) goto done;
  if ((status = sweeper_init(&s, &p, seed, err)) != MS_OK) goto done;
  const size_t bytes = (size_t)p.L * (size_t)p.E * sizeof *owner;
  found = malloc(bytes);
  kept = malloc(bytes);
  if (!found || !kept) {
    status = ms_fail(err, MS_ENOMEM, "no memory to place %d experts in %d layers", p.E, p.L);
    goto done;
  }
  int64_t best = -1;
  memcpy(found, owner, bytes);
  for (int32_t start = 0; start < starts; start++) {
    memset(s.price, 0, (size_t)p.L * ((size_t)p.R + 1) * sizeof *s.price);
    memset(s.multiplier, 0, (size_t)p.L * (size_t)p.R * sizeof *s.multiplier);
    if (start > 0) start_at_random(&s, found);
    for (int32_t l = 0; l < p.L; l++) s.stale[l] = true;
    sweep(&s, found);
    int64_t local = local_of(&p, found);
    for (int32_t k = 0; k < KICKS; k++) {
      memcpy(kept, found, bytes);
      kick(&s, found);
      sweep(&s, found);
      int64_t now = local_of(&p, found);
      if (now < local) memcpy(found, kept, bytes);
      if (now > local) local = now;
    }
    if (local > best) {
      best = local;
      memcpy(owner, found, bytes);
    }
  }
done:
  free(found);
  free(kept);
  sweeper_free(&s);
  ms_problem_free(&p);
  return status;
}

ms_status ms_problem_gaps(const ms_problem *p, const int32_t *owner, int64_t *gap, ms_error *err) {
  sweeper s = {0};
  ms_status status = sweeper_init(&s, p, 0, err);
  for (int32_t l = 0; l < p->L && status == MS_OK; l++) {
    const int64_t row = (int64_t)l * p->E;
    ms_problem_benefit(p, owner, l, true, true, s.benefit);
    int64_t value = 0;
    for (int32_t i = 0; i < p->n[l]; i++)
      value += s.benefit[(int64_t)i * p->R + owner[row + p->expert[row + i]]];
    int64_t most = p->n[l] ? solve(&s, l, PROVE_STEPS, NULL, &value) : 0;
    gap[l] = most > value ? most - value : 0;
  }
  sweeper_free(&s);
  return status;
}
