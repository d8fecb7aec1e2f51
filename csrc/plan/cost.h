// cost.h - the cost model, prepared once for a machine and a layer, then asked about many layouts.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_COST_H
#define MS_COST_H

#include "parts.h"

typedef struct ms_rank_state { // of one rank under one layout
  double bytes, memory;        // weight bytes that ffn is expected to read; that are held
  double ffn, variance;        // seconds; of what is this rank's own luck, seconds squared
  double received[2], sent[2]; // rows in an all-to-all, inside and between hosts
  double rows;                 // that it holds after an all-to-all, its own included
  int32_t regions;             // of senders that reach it with different experts
} ms_rank_state;

typedef struct ms_region { // senders [from, to) choose this rank's experts with these probabilities
  int32_t from, to;
  double sum, largest;
} ms_region;

enum { MS_REGIONS = 6 }; // of one rank; more are joined

typedef struct ms_costing {
  const ms_cluster *cluster;
  const ms_moe_layer *layer;
  double tokens; // of all ranks
  double spread; // standard deviations by which the slowest of R ranks is expected above the mean
  double route, dense_gather, dense_combine;
  double *before;                           // [R+1] owned: tokens of the ranks before each
  int32_t *host_of;                         // [R] owned: the first rank of each rank's host
  int32_t *host_end;                        // [R] owned: the end of it
  double *host_bytes;                       // [R] owned: by first rank
  double *difference;                       // [3][R+1] owned
  int32_t *copy_from, *copy_to, *copy_size; // [R] owned: of the copies of one expert: its ranks
  ms_rank_state *ranks;                     // [R] owned: of the layout asked about last
  ms_region *regions;                       // [R][MS_REGIONS] owned
} ms_costing;

// Cost: allocates O(R). Errors: as ms_plan_cost.
ms_status ms_costing_create(const ms_cluster *cluster, const ms_moe_layer *layer, ms_costing *out,
                            ms_error *err);
void ms_costing_free(ms_costing *costing); // zeroed is legal

// Predict; costing->ranks tells of each rank. Only the filled experts count: adding one never makes a layout cheaper, so
// that the cost of a part is a bound for the whole. Cost: O(R + parts), no allocation.
void ms_costing_run(ms_costing *costing, const ms_parts *layout, ms_cost *out);

// After a run: whether every rank's weights fit into its memory, and the bytes on the fullest rank.
bool ms_costing_fits(const ms_costing *costing, double *fullest);

// Seconds that rows of one expert take rank r, `width` columns of it, when nobody else reads memory.
double ms_costing_expert(const ms_costing *costing, int32_t r, double rows, int64_t width);

#endif
