// placement.h - chapter L of the map: which rank holds which whole expert, layer by layer (once per model).
//
// Expert parallelism gives each expert whole to one rank. Two things are wanted of such a placement: in every layer the
// ranks get the same number of slots (token, choice), and a token's experts in consecutive layers lie on one rank, so that
// it need not travel. Slots come from a histogram; the second needs token paths (ms_hops). In every layer a rank holds
// floor(n/R) or ceil(n/R) of its n experts, and at most cap slots:
//
//   bound = max(slots of the layer / R, slots of its hottest expert)        no placement is below
//   cap   = max((1 + slack) * bound, the heaviest rank of the balanced placement)   so that there always is one
//
//   hops.c        token paths -> hops: how many tokens go from an expert to an expert of the next layer
//   assignment.c  items into bins of equal size at least cost, exactly
//   placement.c   contiguous, balanced, the two stages of MoETuner, and the score of any placement
//   sweep.c       block-coordinate sweeps: one layer at a time, its neighbours fixed
//   chain.c       the best placement of a small case, exactly
//
// Dims: L layers, E experts of a layer, R ranks, T tokens, K choices a token (as in moeshard.h).
// Results depend on the arguments only: no clock, no thread, no global state.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PLAN_PLACEMENT_H
#define MS_PLAN_PLACEMENT_H

#include "../moeshard.h"

#define MS_MAX_LAYERS 4096

// ---- hops ---------------------------------------------------------------------------------------------------------

typedef struct ms_hop {
  int32_t expert; // of the other layer
  int64_t count;  // pairs (token, choice here, choice there)
} ms_hop;

// Sparse in both directions. From expert e of layer l < L - 1 to layer l + 1: next[next_at[l*E + e] .. next_at[l*E + e + 1]);
// back from expert f of layer l + 1 to layer l: last[last_at[l*E + f] .. last_at[l*E + f + 1]).
typedef struct ms_hops {
  int32_t L, E;
  int64_t total;              // hops of all layers; MS_MAX_COST at most can be planned with
  int64_t *next_at, *last_at; // [(L-1)*E + 1] owned
  ms_hop *next, *last;        // owned
} ms_hops;

// Count the hops of token paths.
//   expert  [T, L, K] int32, row-major: the experts of each token in each layer; -1: none (no hop to or from it)
//   out     free with ms_hops_free
// A token with K choices in both layers makes K*K hops.
// Cost: O(T*L*K*K + L*E) time, 32 bytes for each pair of experts with a hop.
// Errors: MS_EINVAL a dimension; MS_ERANGE an index outside -1..E-1 (says token, layer, value); MS_ENOMEM.
ms_status ms_hops_count(const int32_t *expert, int64_t T, int32_t L, int32_t K, int32_t E,
                        ms_hops *out, ms_error *err);
void ms_hops_free(ms_hops *hops); // NULL and zeroed are legal

// ---- assignment ---------------------------------------------------------------------------------------------------

// Memory for problems of up to `room` items in R bins; grows with neither. Not for two threads at once.
typedef struct ms_assigner ms_assigner;
// Cost: O(room + R*R) memory. Errors: MS_EINVAL room or R < 1; MS_ENOMEM.
ms_status ms_assigner_create(int32_t room, int32_t R, ms_assigner **out, ms_error *err);
void ms_assigner_free(ms_assigner *assigner); // NULL is legal

// Put n <= room items into the R bins, floor(n/R) or ceil(n/R) in each, at least total cost. Exact.
//   cost   [n, R]; the largest magnitudes of the items sum to at most MS_MAX_COST (the caller sees to it: no sum overflows)
//   price  [R + 1] in: where to start, zeros or what an earlier call has left; out: optimal dual prices of the bins and of
//          the larger sizes. Prices of a problem like this one save most of the work.
//   owner  [n] out
// Returns the total cost. Of several best assignments one is chosen, the same every time.
// Cost: O(n*R) and, for each item that must leave the bin it likes best, O(R*R + n); no allocation.
#define MS_MAX_COST ((int64_t)1 << 59)
int64_t ms_assign(ms_assigner *assigner, const int64_t *cost, int32_t n, int64_t *price,
                  int32_t *owner);

// ---- placement ----------------------------------------------------------------------------------------------------

typedef struct ms_place_spec { // all borrowed
  int32_t L, E, R;
  const int64_t *counts; // [L, E] slots of each expert, 0 or more
  const ms_hops *hops;   // NULL: only balance is known
  const uint8_t
      *apart;   // [L, E] 1: not placed but cut over all ranks, owner -1. NULL: all are placed
  double slack; // 0 or more
} ms_place_spec;

// All write owner [L, E]: the rank of each expert, -1 where `apart`.

// Blocks of consecutive experts, whatever the routing: what expert parallelism does by default.
// Cost: O(L*E). Errors: MS_EINVAL the spec; MS_ENOMEM.
ms_status ms_place_contiguous(const ms_place_spec *spec, int32_t *owner, ms_error *err);

// Each layer for itself: the hottest expert first, to the rank with the fewest slots that has room; then swaps that
// lighten the heaviest rank.
// Cost: O(L * E * (log E + R)) and the swaps. Errors: as above.
// Source: Graham, Bounds on multiprocessing timing anomalies, 1969 (longest processing time first).
ms_status ms_place_balanced(const ms_place_spec *spec, int32_t *owner, ms_error *err);

// The balanced clusters of experts, mapped to ranks so that most hops stay. With one bandwidth between all ranks only the
// mapping of a layer relative to the one before it counts: a chain of assignment problems, solved exactly.
// Cost: balanced, and L assignments of R clusters. Errors: as above.
// Source: MoETuner, arXiv 2502.06643, section 4; deviation: stage 1 is balanced's heuristic instead of an ILP.
ms_status ms_place_two_stage(const ms_place_spec *spec, int32_t *owner, ms_error *err);

// Block-coordinate sweeps: with the layers before and after fixed, a layer is an assignment problem with a cap on the load
// of each rank: Lagrange multipliers on the loads, the assignment inside, swaps that repair and improve. Layers are solved
// in turn until none changes, then a few are shuffled and solved again (kept if better). Several starts: two_stage first,
// then random ones; the best is kept. Never worse than two_stage. Without hops: balanced.
// Cost: starts * O(L * (hops of a layer + E*E)) times a few hundred. Errors: as above; MS_EINVAL starts < 1; MS_ERANGE counts
// too large to be computed with exactly.
ms_status ms_place_sweep(const ms_place_spec *spec, int32_t starts, uint64_t seed, int32_t *owner,
                         ms_error *err);

// The best placement within the cap, by dynamic programming over all partitions of a layer.
// Cost: O(L * S*S*E), S partitions. Errors: as above; MS_EINVAL no hops, or more partitions than MS_PLACE_STATES in a layer,
// or more work than some seconds.
#define MS_PLACE_STATES 32768
ms_status ms_place_exact(const ms_place_spec *spec, int32_t *owner, ms_error *err);

typedef struct ms_place_score { // arrays are the caller's; NULL where not wanted
  int64_t *load;                // [L, R] slots of the placed experts
  double *bound;                // [L]
  int64_t *cap;                 // [L]
  int64_t *local;               // [L-1] hops that stay on their rank; those of a cut expert do not
  int64_t
      *most; // [L-1] no placement has more: each expert with the experts that fit on its rank best
  int64_t *gap; // [L] what changing this layer alone could save at most: a Lagrangian dual
} ms_place_score;

// What a placement is worth. Without hops local, most and gap are zero.
// Cost: O(hops); with gap some 100 assignments a layer. Errors: MS_EINVAL the spec, or an owner outside 0..R-1 (-1 only where
// `apart`); MS_ERANGE as sweep; MS_ENOMEM.
ms_status ms_place_measure(const ms_place_spec *spec, const int32_t *owner, ms_place_score *score,
                           ms_error *err);

#endif
