// problem.h - what the placement files share: a checked spec with its bounds, loads and benefits of a layer.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PLAN_PROBLEM_H
#define MS_PLAN_PROBLEM_H

#include "placement.h"

typedef struct ms_problem {
  int32_t L, E, R;
  const ms_hops *hops; // borrowed, may be NULL
  int32_t *n;          // [L] experts that are placed
  int32_t *expert;     // [L, E] which: the first n[l] of row l
  int64_t *weight;     // [L, E] their slots, in the same order
  int32_t *place;      // [L, E] from expert to its number in that order; -1: not placed
  double *bound;       // [L]
  int64_t *cap;        // [L]
  int32_t *balanced;   // [L, E] owner of the balanced placement, by expert
} ms_problem;

// Check a spec and balance each layer. Free with ms_problem_free, also after a failure.
ms_status ms_problem_init(const ms_place_spec *spec, ms_problem *out, ms_error *err);
void ms_problem_free(ms_problem *problem); // zeroed is legal

// A layer by itself: owner, weight ... of its n placed experts in order. Sizes are floor(n/R) or ceil(n/R).
typedef struct ms_layer {
  int32_t n, R;
  const int64_t *weight; // [n]
  int32_t *owner;        // [n]
  int64_t *load;         // [R]
  int32_t *size;         // [R]
} ms_layer;

// Fill load and size from owner.
void ms_layer_count(ms_layer *layer);
// Hottest first (by `key` [n], decreasing), to the rank with the fewest slots that has room. `order` [n] is scratch.
void ms_layer_deal(ms_layer *layer, const int64_t *key, int32_t *order);
// Swaps and moves that lighten the heaviest rank, until none does.
void ms_layer_level(ms_layer *layer);
// Whether item i may move to rank r by itself: from a larger rank to a smaller one.
static inline bool ms_layer_may_move(const ms_layer *layer, int32_t i, int32_t r) {
  return layer->size[layer->owner[i]] > layer->size[r];
}
static inline void ms_layer_move(ms_layer *layer, int32_t i, int32_t r) {
  int32_t from = layer->owner[i];
  layer->load[from] -= layer->weight[i];
  layer->load[r] += layer->weight[i];
  layer->size[from]--;
  layer->size[r]++;
  layer->owner[i] = r;
}
static inline void ms_layer_swap(ms_layer *layer, int32_t i, int32_t j) {
  int32_t from = layer->owner[i], to = layer->owner[j];
  ms_layer_move(layer, i, to);
  ms_layer_move(layer, j, from);
}

// benefit[i, r]: hops of the i-th placed expert of layer l with experts on rank r, in layer l - 1 (if before) and l + 1 (if
// after), for owner [L, E].
void ms_problem_benefit(const ms_problem *problem, const int32_t *owner, int32_t l, bool before,
                        bool after, int64_t *benefit);
// flow[a, b]: hops from rank a in layer l to rank b in layer l + 1; [R, R].
void ms_problem_flow(const ms_problem *problem, const int32_t *owner, int32_t l, int64_t *flow);
// Give the ranks other names from layer l + 1 on, so that most hops from l stay; false, and nothing done, if none gains.
// Loads and sizes stay, and so do the hops between later layers. Scratch: flow [R, R], price [R + 1], name [R]; the assigner
// has room for R items.
bool ms_problem_relabel(const ms_problem *problem, int32_t *owner, int32_t l, ms_assigner *assigner,
                        int64_t *flow, int64_t *price, int32_t *name);
// Hops between layers l and l + 1 that stay.
int64_t ms_problem_local(const ms_problem *problem, const int32_t *owner, int32_t l);

// The least gap of each layer that the duals prove (sweep.c). gap is [L].
ms_status ms_problem_gaps(const ms_problem *problem, const int32_t *owner, int64_t *gap,
                          ms_error *err);

#endif
