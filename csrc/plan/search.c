// search.c - which table to take: the layouts that people use, mixtures of them, and for tiny layers every table.
//
// A recipe says how experts are placed: the `hot` ones, by load, over groups of hot_group ranks (all ranks: sharded; fewer:
// a copy for every group; all experts can be hot), the others each on one group of `group` consecutive ranks, in contiguous blocks or by
// longest-processing-time greedy (Graham 1969: at most 4/3 of the best), cut inside the group. All recipes are built and
// asked for their cost; hot experts are tried only with the groups that did best without them when there are many ranks.
//
// Tiny layers: depth-first over all tables whose widths are quarters of F, the longest expert first. A partial table's
// cost without luck is a bound for what it can become (cost.h), so most branches end early.
//
// SPDX-License-Identifier: Apache-2.0
#include "cost.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  SMALL = 1 << 13,     // R * E up to which hot experts are tried with every group
  GROUPS_WITH_HOT = 2, // above it: with this many
  EXACT_EXPERTS = 6,   // of a tiny layer, at most
  EXACT_RANKS = 3,
  UNITS = 4,      // pieces of an expert in a tiny layer, at most
  ROWS = 64,      // ways to place an expert there
  NODES = 400000, // partial tables that are looked at before giving up: below a second
  SPEED_ROUNDS = 4
};

typedef struct recipe {
  int32_t group;
  bool balanced, uneven;
  int32_t hot, hot_group;
} recipe;

typedef struct search {
  ms_costing costing;
  const ms_cluster *cluster;
  const ms_moe_layer *layer;
  ms_parts trial, best; // best: of all that fit
  double best_total;
  uint32_t kinds;
  ms_candidate *candidates;
  int32_t count, chosen;                          // chosen: -1 while nothing fits
  int32_t *order;                                 // [E] experts, the longest first
  double *seconds;                                // [E] of a whole expert, on rank 0
  double *speed;                                  // [R] columns in the same time
  double *group_load, *group_bytes, *group_speed; // [R]
  int32_t *owner;                                 // [E] group of each expert
  int64_t *width;                                 // [R]
} search;

static bool wanted(const search *s, ms_layout_kind kind) { return s->kinds >> kind & 1; }

// ---- building ---------------------------------------------------------------------------------------

// Widths of ranks [from, from + ranks), near-equal or within a column of what their speed asks for. Odd columns take turns
// with the expert: by the golden ratio, whose multiples fill [0, 1) evenly.
static void cut(search *s, int32_t e, int32_t from, int32_t ranks, bool uneven) {
  int64_t F = s->layer->F;
  if (!uneven) {
    int32_t odd = (int32_t)(F % ranks), turn = (int32_t)((int64_t)odd * e % ranks);
    for (int32_t i = 0; i < ranks; i++)
      s->width[i] = F / ranks + ((i - turn + ranks) % ranks < odd);
    return;
  }
  double total = 0, done = 0, phase = fmod(e * 0.6180339887498949, 1);
  for (int32_t i = 0; i < ranks; i++) total += s->speed[from + i];
  int64_t start = 0;
  for (int32_t i = 0; i < ranks; i++) {
    done += s->speed[from + i];
    int64_t stop = i + 1 == ranks ? F : (int64_t)(done / total * (double)F + phase);
    s->width[i] = (stop < F ? stop : F) - start;
    start += s->width[i];
  }
}

static ms_status place(search *s, int32_t e, int32_t from, int32_t ranks, int32_t copies,
                       bool uneven, ms_error *err) {
  MS_TRY(ms_parts_begin(&s->trial, copies, (int64_t)ranks * copies, err));
  for (int32_t copy = 0; copy < copies; copy++) {
    int32_t first = from + copy * ranks;
    cut(s, e, first, ranks, uneven);
    for (int32_t i = 0; i < ranks; i++) ms_parts_add(&s->trial, first + i, copy, s->width[i]);
  }
  return MS_OK;
}

// The group of each expert that is not hot.
static void choose_owners(search *s, const recipe *how) {
  int32_t E = s->layer->E, groups = s->cluster->R / how->group, rest = E - how->hot;
  if (!how->balanced) {
    int64_t at = 0;
    for (int32_t e = 0; e < E; e++) s->owner[e] = 0;
    for (int32_t i = 0; i < how->hot; i++) s->owner[s->order[i]] = -1;
    for (int32_t e = 0; e < E;
         e++) // block g begins at floor(rest * g / groups), as in ms_plan_hybrid
      if (s->owner[e] == 0) s->owner[e] = (int32_t)((at++ * groups + groups - 1) / rest);
    for (int32_t e = 0; e < E; e++)
      if (s->owner[e] >= groups) s->owner[e] = groups - 1;
    return;
  }
  double bytes =
      (double)s->layer->F * (double)s->layer->D * s->layer->matrices * s->layer->weight_size;
  for (int32_t g = 0; g < groups; g++) {
    s->group_load[g] = s->group_speed[g] = s->group_bytes[g] = 0;
    for (int32_t r = g * how->group; r < (g + 1) * how->group; r++) {
      s->group_speed[g] += s->speed[r];
      s->group_bytes[g] += s->cluster->memory[r];
    }
    for (int32_t i = 0; i < how->hot; i++) // each takes its part of every copy
      s->group_bytes[g] -= bytes * how->group / how->hot_group;
  }
  // Experts without tokens go where most room is left; every rank's own room, where memory has no limit.
  for (int32_t i = how->hot; i < E; i++) {
    int32_t e = s->order[i], best = -1;
    double least = INFINITY;
    for (int32_t g = 0; g < groups; g++) {
      if (s->group_bytes[g] < bytes) continue;
      double done = (s->group_load[g] + s->seconds[e] + 1e-12) / s->group_speed[g];
      if (done < least) {
        least = done;
        best = g;
      }
    }
    if (best < 0) best = i % groups; // it will not fit
    s->owner[e] = best;
    s->group_load[best] += s->seconds[e] + 1e-12;
    s->group_bytes[best] -= bytes;
  }
}

static ms_status build(search *s, const recipe *how, ms_error *err) {
  int32_t E = s->layer->E, R = s->cluster->R;
  ms_parts_clear(&s->trial);
  choose_owners(s, how);
  for (int32_t i = 0; i < how->hot; i++) s->owner[s->order[i]] = -1;
  for (int32_t e = 0; e < E; e++) {
    if (s->owner[e] < 0)
      MS_TRY(place(s, e, 0, how->hot_group, R / how->hot_group, how->uneven, err));
    else
      MS_TRY(place(s, e, s->owner[e] * how->group, how->group, 1, how->uneven, err));
  }
  return MS_OK;
}

// ---- asking -----------------------------------------------------------------------------------------

static bool better(const ms_candidate *a, const ms_candidate *b) {
  if (a->fits != b->fits) return a->fits;
  return a->fits ? a->cost.total < b->cost.total : a->memory < b->memory;
}

// Predict the trial and keep it if it is the best of its kind, or of all.
static ms_status ask(search *s, ms_layout_kind kind, const recipe *how, ms_error *err) {
  ms_candidate found = {
      .kind = kind, .group = how->group, .hot = how->hot, .hot_group = how->hot_group};
  ms_costing_run(&s->costing, &s->trial, &found.cost);
  found.fits = ms_costing_fits(&s->costing, &found.memory);
  int32_t i = 0;
  while (i < s->count && !(s->candidates[i].kind == kind &&
                           (kind != MS_LAYOUT_HYBRID || s->candidates[i].group == how->group)))
    i++;
  if (i == MS_CANDIDATES) return ms_fail(err, MS_EINVAL, "more than %d candidates", MS_CANDIDATES);
  if (i == s->count) {
    s->candidates[s->count++] = found;
  } else if (better(&found, &s->candidates[i])) {
    s->candidates[i] = found;
  }
  if (found.fits && found.cost.total < s->best_total) {
    s->best_total = found.cost.total;
    s->chosen = i;
    ms_parts swap = s->best;
    s->best = s->trial;
    s->trial = swap;
  }
  return MS_OK;
}

static ms_status try(search *s, ms_layout_kind kind, recipe how, ms_error *err) {
  MS_TRY(build(s, &how, err));
  return ask(s, kind, &how, err);
}

// ---- speeds -----------------------------------------------------------------------------------------

static bool alike(const ms_cluster *c) {
  for (int32_t r = 1; r < c->R; r++)
    if (c->flops[r] != c->flops[0] || c->bandwidth[r] != c->bandwidth[0]) return false;
  return true;
}

// Widths with which all ranks of the shard layout are done at once: each round scales them by how long the ranks take.
static ms_status find_speeds(search *s, ms_error *err) {
  ms_cost ignored;
  int32_t R = s->cluster->R;
  for (int32_t r = 0; r < R; r++) s->speed[r] = s->cluster->flops[r] / s->cluster->flops[0];
  for (int round = 0; round < SPEED_ROUNDS && !alike(s->cluster); round++) {
    recipe even = {.group = R, .uneven = true, .hot_group = R};
    MS_TRY(build(s, &even, err));
    ms_costing_run(&s->costing, &s->trial, &ignored);
    for (int32_t r = 0; r < R; r++)
      if (s->costing.ranks[r].ffn > 0) s->speed[r] /= s->costing.ranks[r].ffn;
    double first = s->speed[0];
    for (int32_t r = 0; r < R; r++) s->speed[r] /= first;
  }
  return MS_OK;
}

// ---- the usual layouts ------------------------------------------------------------------------------

// Numbers of hot experts worth trying, ascending: all of a small layer, else powers of two up to half, and all.
static int32_t next_hot(int32_t E, int32_t hot) {
  if (E <= 16) return hot + 1;
  return hot * 2 <= E / 2 || hot == E ? hot * 2 : E;
}

static ms_status try_hot(search *s, int32_t group, ms_error *err) {
  int32_t R = s->cluster->R, E = s->layer->E, host = s->costing.host_end[0];
  bool few = (int64_t)R * E > SMALL, uneven = !alike(s->cluster);
  for (int32_t hot = 1; hot <= E; hot = next_hot(E, hot))
    for (int32_t hot_group = 1; hot_group <= R; hot_group++) {
      if (R % hot_group || (hot_group == group && group > 1)) continue;
      if (few && hot_group != 1 && hot_group != R && hot_group != host) continue;
      if (hot == E && hot_group == R) continue; // shard
      ms_layout_kind kind = hot_group == R ? MS_LAYOUT_HOT_SHARDED : MS_LAYOUT_HOT_COPIED;
      if (!wanted(s, kind)) continue;
      MS_TRY(try(s, kind, (recipe){group, true, uneven, hot, hot_group}, err));
    }
  return MS_OK;
}

static ms_status try_usual(search *s, ms_error *err) {
  int32_t R = s->cluster->R, E = s->layer->E;
  bool uneven = !alike(s->cluster);
  recipe shard = {.group = R, .hot_group = R};
  if (wanted(s, MS_LAYOUT_SHARD) || R == 1) MS_TRY(try(s, MS_LAYOUT_SHARD, shard, err));
  if (R == 1) return MS_OK;
  shard.uneven = true;
  if (uneven && wanted(s, MS_LAYOUT_UNEVEN)) MS_TRY(try(s, MS_LAYOUT_UNEVEN, shard, err));
  if (wanted(s, MS_LAYOUT_EXPERT))
    MS_TRY(try(s, MS_LAYOUT_EXPERT, (recipe){.group = 1, .hot_group = 1}, err));
  if (wanted(s, MS_LAYOUT_BALANCED))
    MS_TRY(try(s, MS_LAYOUT_BALANCED, (recipe){.group = 1, .balanced = true, .hot_group = 1}, err));
  for (int32_t group = 2; group < R && wanted(s, MS_LAYOUT_HYBRID); group++)
    if (R % group == 0)
      for (int balanced = 0; balanced < 2; balanced++)
        MS_TRY(try(s, MS_LAYOUT_HYBRID, (recipe){group, balanced, uneven, 0, group}, err));

  if (!wanted(s, MS_LAYOUT_HOT_SHARDED) && !wanted(s, MS_LAYOUT_HOT_COPIED)) return MS_OK;
  if ((int64_t)R * E <= SMALL) {
    for (int32_t group = 1; group < R; group++)
      if (R % group == 0) MS_TRY(try_hot(s, group, err));
    return MS_OK;
  }
  int32_t tried[GROUPS_WITH_HOT] = {0};
  for (int i = 0; i < GROUPS_WITH_HOT; i++) {
    int32_t best = -1;
    for (int32_t j = 0; j < s->count; j++) {
      const ms_candidate *c = &s->candidates[j];
      if (c->hot || c->group == R) continue;
      bool before = false;
      for (int k = 0; k < i; k++) before |= tried[k] == c->group;
      if (!before && (best < 0 || better(c, &s->candidates[best]))) best = j;
    }
    tried[i] = best >= 0 ? s->candidates[best].group
               : i == 0  ? 1
                         : R; // nothing else was asked for: whole experts
    if (tried[i] < R) MS_TRY(try_hot(s, tried[i], err));
  }
  return MS_OK;
}

// ---- every table of a tiny layer --------------------------------------------------------------------

typedef struct row { // one way to place an expert
  int32_t copies, parts;
  int32_t units[EXACT_RANKS], copy[EXACT_RANKS]; // by rank; 0 units: nothing
} row;

typedef struct exact {
  row rows[ROWS];
  int32_t count, units;
  int32_t chosen[EXACT_EXPERTS], best[EXACT_EXPERTS];
  int64_t nodes;
  bool improved;
} exact;

// All ways: `copies` disjoint sets of ranks, each rank in one of them or in none, with units that add up to one expert in
// each set. Copies are numbered by their lowest rank, so that no way comes twice.
static void list_rows(exact *x, row *now, int32_t R, int32_t rank, const int32_t *left) {
  if (rank == R) {
    for (int32_t c = 0; c < now->copies; c++)
      if (left[c]) return;
    if (x->count < ROWS) x->rows[x->count++] = *now;
    return;
  }
  int32_t open = 0; // copies that lower ranks have begun
  for (int32_t r = 0; r < rank; r++)
    if (now->units[r] && now->copy[r] >= open) open = now->copy[r] + 1;
  for (int32_t c = 0; c <= open && c < now->copies; c++)
    for (int32_t u = 1; u <= left[c]; u++) {
      int32_t after[EXACT_RANKS];
      memcpy(after, left, sizeof after);
      after[c] -= u;
      now->units[rank] = u;
      now->copy[rank] = c;
      list_rows(x, now, R, rank + 1, after);
    }
  now->units[rank] = 0;
  list_rows(x, now, R, rank + 1, left);
}

static ms_status add_row(ms_parts *l, const row *way, int32_t units, ms_error *err) {
  MS_TRY(ms_parts_begin(l, way->copies, l->R, err));
  int64_t done[EXACT_RANKS] = {0};
  for (int32_t r = 0; r < l->R; r++) {
    if (!way->units[r]) continue;
    int64_t *at = &done[way->copy[r]], from = l->F * *at / units;
    *at += way->units[r];
    ms_parts_add(l, r, way->copy[r], l->F * *at / units - from);
  }
  return MS_OK;
}

// The experts are permuted for the search: `load` of the costing's layer is too, see search_exact.
static ms_status descend(search *s, exact *x, int32_t depth, ms_error *err) {
  ms_cost cost;
  double fullest, spread = s->costing.spread;
  bool leaf = depth == s->layer->E;
  if (++x->nodes > NODES) return MS_OK;
  if (!leaf) s->costing.spread = 0;
  ms_costing_run(&s->costing, &s->trial, &cost);
  s->costing.spread = spread;
  if (!ms_costing_fits(&s->costing, &fullest) || cost.total >= s->best_total * (1 - 1e-12))
    return MS_OK;
  if (leaf) {
    s->best_total = cost.total;
    memcpy(x->best, x->chosen, sizeof x->best);
    x->improved = true;
    return MS_OK;
  }
  for (int32_t i = 0; i < x->count; i++) {
    x->chosen[depth] = i;
    s->trial.filled = depth;
    MS_TRY(add_row(&s->trial, &x->rows[i], x->units, err));
    MS_TRY(descend(s, x, depth + 1, err));
  }
  return MS_OK;
}

static ms_status search_exact(search *s, bool *proven, ms_error *err) {
  int32_t E = s->layer->E, R = s->cluster->R;
  exact x = {.units = s->layer->F < UNITS ? (int32_t)s->layer->F : UNITS};
  for (int32_t copies = 1; copies <= (wanted(s, MS_LAYOUT_HOT_COPIED) ? R : 1); copies++) {
    row now = {.copies = copies};
    int32_t left[EXACT_RANKS] = {x.units, x.units, x.units};
    list_rows(&x, &now, R, 0, left);
  }
  const ms_moe_layer *own = s->layer;
  double load[EXACT_EXPERTS];
  for (int32_t i = 0; i < E; i++) load[i] = own->load[s->order[i]];
  ms_moe_layer sorted = *own;
  sorted.load = load;
  s->costing.layer = &sorted;
  ms_parts_clear(&s->trial);
  ms_status status = descend(s, &x, 0, err);
  s->costing.layer = own;
  *proven = status == MS_OK && x.nodes <= NODES && x.count < ROWS;
  if (status != MS_OK || !x.improved) return status;
  ms_parts_clear(&s->trial);
  int32_t place_of[EXACT_EXPERTS];
  for (int32_t i = 0; i < E; i++) place_of[s->order[i]] = i;
  for (int32_t e = 0; e < E; e++)
    MS_TRY(add_row(&s->trial, &x.rows[x.best[place_of[e]]], x.units, err));
  s->best_total = INFINITY; // of this very table, which adds up in another order
  return ask(s, MS_LAYOUT_MIXED, &(recipe){0}, err);
}

// ---- all together -----------------------------------------------------------------------------------

static int by_seconds(const void *a, const void *b, const double *seconds) {
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  if (seconds[x] != seconds[y]) return seconds[x] > seconds[y] ? -1 : 1;
  return x - y;
}

static void sift(int32_t *heap, int32_t n, int32_t i, const double *seconds) {
  for (;;) {
    int32_t child = 2 * i + 1, down = heap[i];
    if (child >= n) return;
    if (child + 1 < n && by_seconds(&heap[child], &heap[child + 1], seconds) < 0) child++;
    if (by_seconds(&down, &heap[child], seconds) >= 0) return;
    heap[i] = heap[child];
    heap[child] = down;
    i = child;
  }
}

// Heap sort: qsort has no way to reach the seconds.
static void sort_experts(search *s) {
  int32_t E = s->layer->E;
  for (int32_t e = 0; e < E; e++) {
    s->order[e] = e;
    s->seconds[e] = ms_costing_expert(&s->costing, 0, s->layer->load[e], s->layer->F);
  }
  for (int32_t i = E / 2 - 1; i >= 0; i--) sift(s->order, E, i, s->seconds);
  for (int32_t n = E - 1; n > 0; n--) {
    int32_t last = s->order[n];
    s->order[n] = s->order[0];
    s->order[0] = last;
    sift(s->order, n, 0, s->seconds);
  }
}

static ms_status nothing_fits(const search *s, ms_error *err) {
  const ms_candidate *least = &s->candidates[0];
  for (int32_t i = 1; i < s->count; i++)
    if (s->candidates[i].memory < least->memory) least = &s->candidates[i];
  double room = INFINITY;
  for (int32_t r = 0; r < s->cluster->R; r++)
    if (s->cluster->memory[r] < room) room = s->cluster->memory[r];
  return ms_fail(
      err, MS_ERANGE,
      "memory: the smallest layout puts %.0f bytes on one rank, but there is room for %.0f",
      least->memory, room);
}

static void drop(search *s) {
  ms_costing_free(&s->costing);
  ms_parts_free(&s->trial);
  ms_parts_free(&s->best);
  free(s->order);
  free(s->seconds);
  free(s->speed);
  free(s->group_load);
  free(s->group_bytes);
  free(s->group_speed);
  free(s->owner);
  free(s->width);
}

static ms_status take(search *s, ms_error *err) {
  MS_TRY(ms_costing_create(s->cluster, s->layer, &s->costing, err));
  int32_t R = s->cluster->R, E = s->layer->E;
  MS_TRY(ms_parts_create(R, E, s->layer->F, &s->trial, err));
  MS_TRY(ms_parts_create(R, E, s->layer->F, &s->best, err));
  size_t ranks = (size_t)R, experts = (size_t)E;
  s->order = malloc(experts * sizeof *s->order);
  s->seconds = malloc(experts * sizeof *s->seconds);
  s->owner = malloc(experts * sizeof *s->owner);
  s->speed = malloc(ranks * sizeof *s->speed);
  s->group_load = malloc(ranks * sizeof *s->group_load);
  s->group_bytes = malloc(ranks * sizeof *s->group_bytes);
  s->group_speed = malloc(ranks * sizeof *s->group_speed);
  s->width = malloc(ranks * sizeof *s->width);
  if (!s->order || !s->seconds || !s->owner || !s->speed || !s->group_load || !s->group_bytes ||
      !s->group_speed || !s->width)
    return ms_fail(err, MS_ENOMEM, "no memory to plan for %d ranks and %d experts", R, E);
  return MS_OK;
}

ms_status ms_plan_search(const ms_cluster *cluster, const ms_moe_layer *layer, uint32_t kinds,
                         ms_plan *out, ms_candidate *candidates, int32_t *count, int32_t *chosen,
                         bool *proven, ms_error *err) {
  search s = {.cluster = cluster,
              .layer = layer,
              .best_total = INFINITY,
              .kinds = kinds,
              .candidates = candidates,
              .chosen = -1};
  bool all = false;
  *out = (ms_plan){0};
  ms_status status = take(&s, err);
  if (status != MS_OK) goto done;
  sort_experts(&s);
  if ((status = find_speeds(&s, err)) != MS_OK) goto done;
  if ((status = try_usual(&s, err)) != MS_OK) goto done;
  if (wanted(&s, MS_LAYOUT_MIXED) && layer->E <= EXACT_EXPERTS && cluster->R > 1 &&
      cluster->R <= EXACT_RANKS)
    if ((status = search_exact(&s, &all, err)) != MS_OK) goto done;
  if (s.count == 0) {
    status = ms_fail(err, MS_EINVAL, "kinds: got 0x%x, none of which applies to %d ranks", kinds,
                     cluster->R);
    goto done;
  }
  status = s.chosen < 0 ? nothing_fits(&s, err) : ms_parts_to_plan(&s.best, out, err);
  *count = s.count;
  *chosen = s.chosen;
  if (proven) *proven = all;
done:
  drop(&s);
  return status;
}
