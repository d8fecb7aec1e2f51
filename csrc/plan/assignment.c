// assignment.c - items into bins of equal size at least cost, exactly: shortest paths between bins.
//
//   minimise  sum_i cost[i][owner[i]]   with floor(n/R) or ceil(n/R) items in every bin
//
// As a flow: each item goes to a bin; a bin passes floor(n/R) items on by itself; the n mod R items beyond that pass through
// a hub, which takes at most one from each bin (the bin is `wide` then). Prices are the dual. Each item starts in the bin
// with the least cost + price: optimal for these prices, but the sizes are wrong. While some bin (or the hub) has too many,
// one unit moves along a shortest path from those that have too many to one that lacks some; an edge from bin to bin is the
// item that moves most cheaply, and prices follow the distances, so that every step stays optimal for its sizes.
// There are R + 1 nodes, not n + R: an augmentation costs R*R and touches the lists of the few bins on its path.
//
// With costs up to M an edge is at most 2M. Prices end at most 2M apart (any item would move for more), so they start so; a
// distance is an edge and a difference of prices, 4M, and one more edge is looked at: 8M = 2^62 with M = MS_MAX_COST.
//
// Source: successive shortest paths with potentials (Ahuja, Magnanti, Orlin, Network Flows, 1993, section 9.7).
//
// SPDX-License-Identifier: Apache-2.0
#include "placement.h"

#include <stdlib.h>
#include <string.h>

struct ms_assigner {
  int32_t room, R;
  int64_t *edge;         // [R, R] least cost[i][s] - cost[i][r] over the items i of bin r
  int32_t *mover;        // [R, R] that item; -1: bin r is empty
  int32_t *head, *size;  // [R] items of a bin: a list
  int32_t *next, *last;  // [room]
  int32_t *excess, *via; // [R + 1]
  int64_t *distance;     // [R + 1]
  bool *wide, *done;     // [R + 1]
};

ms_status ms_assigner_create(int32_t room, int32_t R, ms_assigner **out, ms_error *err) {
  *out = NULL;
  if (room < 1 || R < 1)
    return ms_fail(err, MS_EINVAL, "assignment: got %d items, %d bins, expected at least 1", room,
                   R);
  ms_assigner *a = calloc(1, sizeof *a);
  if (!a) goto failed;
  size_t bins = (size_t)R, nodes = bins + 1, items = (size_t)room;
  a->room = room;
  a->R = R;
  a->edge = malloc(bins * bins * sizeof *a->edge);
  a->mover = malloc(bins * bins * sizeof *a->mover);
  a->head = malloc(bins * sizeof *a->head);
  a->size = malloc(bins * sizeof *a->size);
  a->next = malloc(items * sizeof *a->next);
  a->last = malloc(items * sizeof *a->last);
  a->excess = malloc(nodes * sizeof *a->excess);
  a->via = malloc(nodes * sizeof *a->via);
  a->distance = malloc(nodes * sizeof *a->distance);
  a->wide = malloc(nodes * sizeof *a->wide);
  a->done = malloc(nodes * sizeof *a->done);
  if (!a->edge || !a->mover || !a->head || !a->size || !a->next || !a->last || !a->excess ||
      !a->via || !a->distance || !a->wide || !a->done)
    goto failed;
  *out = a;
  return MS_OK;
failed:
  ms_assigner_free(a);
  return ms_fail(err, MS_ENOMEM, "no memory to assign %d items to %d bins", room, R);
}

void ms_assigner_free(ms_assigner *a) {
  if (!a) return;
  free(a->edge);
  free(a->mover);
  free(a->head);
  free(a->size);
  free(a->next);
  free(a->last);
  free(a->excess);
  free(a->via);
  free(a->distance);
  free(a->wide);
  free(a->done);
  free(a);
}

static void bin_add(ms_assigner *a, const int64_t *cost, int32_t r, int32_t i) {
  a->next[i] = a->head[r];
  a->last[i] = -1;
  if (a->head[r] >= 0) a->last[a->head[r]] = i;
  a->head[r] = i;
  a->size[r]++;
  const int64_t *row = cost + (int64_t)i * a->R;
  int64_t *edge = a->edge + (int64_t)r * a->R;
  int32_t *mover = a->mover + (int64_t)r * a->R;
  for (int32_t s = 0; s < a->R; s++) {
    int64_t length = row[s] - row[r];
    if (mover[s] >= 0 && length >= edge[s]) continue;
    edge[s] = length;
    mover[s] = i;
  }
}

static void bin_remove(ms_assigner *a, const int64_t *cost, int32_t r, int32_t i) {
  if (a->last[i] >= 0) a->next[a->last[i]] = a->next[i];
  if (a->last[i] < 0) a->head[r] = a->next[i];
  if (a->next[i] >= 0) a->last[a->next[i]] = a->last[i];
  a->size[r]--;
  int64_t *edge = a->edge + (int64_t)r * a->R;
  int32_t *mover = a->mover + (int64_t)r * a->R;
  for (int32_t s = 0; s < a->R; s++) {
    if (mover[s] != i) continue;
    mover[s] = -1;
    for (int32_t j = a->head[r]; j >= 0; j = a->next[j]) {
      int64_t length = cost[(int64_t)j * a->R + s] - cost[(int64_t)j * a->R + r];
      if (mover[s] >= 0 && length >= edge[s]) continue;
      edge[s] = length;
      mover[s] = j;
    }
  }
}

static void relax(ms_assigner *a, int32_t from, int32_t to, int64_t length) {
  int64_t distance = a->distance[from] + length;
  if (a->done[to] || distance >= a->distance[to]) return;
  a->distance[to] = distance;
  a->via[to] = from;
}

// The nearest node that lacks a unit, from any that has too many; -1: none has. `nodes` counts the hub, if there is one.
static int32_t nearest(ms_assigner *a, int32_t nodes, const int64_t *price) {
  const int32_t R = a->R, hub = R;
  bool any = false;
  for (int32_t v = 0; v < nodes; v++) {
    a->distance[v] = a->excess[v] > 0 ? 0 : INT64_MAX;
    any |= a->excess[v] > 0;
    a->via[v] = -1;
    a->done[v] = false;
  }
  while (any) {
    int32_t u = -1;
    for (int32_t v = 0; v < nodes; v++)
      if (!a->done[v] && a->distance[v] < INT64_MAX && (u < 0 || a->distance[v] < a->distance[u]))
        u = v;
    if (u < 0) break; // cannot be: a bin with too many has an edge to every other
    a->done[u] = true;
    if (a->excess[u] < 0) return u;
    if (u < R) {
      if (a->size[u] > 0)
        for (int32_t s = 0; s < R; s++)
          if (s != u) relax(a, u, s, a->edge[(int64_t)u * R + s] + price[s] - price[u]);
      if (nodes > R && !a->wide[u]) relax(a, u, hub, price[hub] - price[u]);
    } else {
      for (int32_t r = 0; r < R; r++)
        if (a->wide[r]) relax(a, hub, r, price[r] - price[hub]);
    }
  }
  return -1;
}

int64_t ms_assign(ms_assigner *a, const int64_t *cost, int32_t n, int64_t *price, int32_t *owner) {
  const int32_t R = a->R, hub = R, least = n / R, wides = n % R;
  const int32_t nodes = wides ? R + 1 : R;
  for (int32_t r = 0; r < R; r++) {
    a->head[r] = -1;
    a->size[r] = 0;
  }
  memset(a->mover, -1, (size_t)R * (size_t)R * sizeof *a->mover);
  for (int32_t i = 0; i < n; i++) {
    const int64_t *row = cost + (int64_t)i * R;
    int32_t best = 0;
    for (int32_t r = 1; r < R; r++)
      if (row[r] + price[r] < row[best] + price[best]) best = r;
    bin_add(a, cost, best, i);
  }
  a->excess[hub] = -wides;
  for (int32_t r = 0; r < R; r++) {
    a->wide[r] = wides && price[r] > price[hub];
    a->excess[r] = a->size[r] - least - a->wide[r];
    a->excess[hub] += a->wide[r];
  }

  for (int32_t to; (to = nearest(a, nodes, price)) >= 0;) {
    for (int32_t v = 0; v < nodes; v++)
      if (a->done[v]) price[v] += a->distance[to] - a->distance[v];
    a->excess[to]++;
    int32_t v = to;
    for (int32_t u; (u = a->via[v]) >= 0; v = u) {
      if (v == hub) {
        a->wide[u] = true;
      } else if (u == hub) {
        a->wide[v] = false;
      } else {
        int32_t i = a->mover[(int64_t)u * R + v];
        bin_remove(a, cost, u, i);
        bin_add(a, cost, v, i);
      }
    }
    a->excess[v]--;
  }

  int64_t total = 0, lowest = INT64_MAX;
  for (int32_t r = 0; r < R; r++)
    for (int32_t i = a->head[r]; i >= 0; i = a->next[i]) {
      owner[i] = r;
      total += cost[(int64_t)i * R + r];
    }
  for (int32_t v = 0; v < nodes;
       v++) // only differences count: do not let them drift from call to call
    if (price[v] < lowest) lowest = price[v];
  for (int32_t v = 0; v < nodes; v++) price[v] -= lowest;
  return total;
}
