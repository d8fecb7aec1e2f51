// parts.c - lists of parts: filled expert by expert, from a table and back.
// SPDX-License-Identifier: Apache-2.0
#include "parts.h"

#include <stdlib.h>

ms_status ms_parts_create(int32_t R, int32_t E, int64_t F, ms_parts *out, ms_error *err) {
  *out = (ms_parts){.R = R, .E = E, .F = F};
  out->first = calloc((size_t)E + 1, sizeof *out->first);
  out->copies = calloc((size_t)E, sizeof *out->copies);
  if (out->first && out->copies) return MS_OK;
  ms_parts_free(out);
  return ms_fail(err, MS_ENOMEM, "no memory for a layout of %d experts", E);
}

void ms_parts_free(ms_parts *layout) {
  free(layout->first);
  free(layout->copies);
  free(layout->parts);
  *layout = (ms_parts){0};
}

void ms_parts_clear(ms_parts *layout) { layout->filled = 0; }

ms_status ms_parts_begin(ms_parts *layout, int32_t copies, int64_t parts, ms_error *err) {
  int32_t e = layout->filled++;
  int64_t needed = layout->first[e] + parts;
  if (needed > layout->room) {
    int64_t room = layout->room * 2 > needed ? layout->room * 2 : needed;
    ms_part *more = realloc(layout->parts, (size_t)room * sizeof *more);
    if (!more)
      return ms_fail(err, MS_ENOMEM, "no memory for a layout of %lld parts", (long long)room);
    layout->parts = more;
    layout->room = room;
  }
  layout->copies[e] = copies;
  layout->first[e + 1] = layout->first[e];
  return MS_OK;
}

void ms_parts_add(ms_parts *layout, int32_t rank, int32_t copy, int64_t width) {
  if (width > 0) layout->parts[layout->first[layout->filled]++] = (ms_part){rank, copy, width};
}

typedef struct piece {
  int64_t start, stop;
  int32_t rank;
} piece;

static int by_start(const void *a, const void *b) {
  const piece *x = a, *y = b;
  if (x->start != y->start) return x->start < y->start ? -1 : 1;
  return (x->rank > y->rank) - (x->rank < y->rank);
}

// `reached`: the end of each copy so far. Every column has as many holders as there are copies, so that a piece always
// begins where some copy has ended.
static ms_status take_expert(const ms_plan *plan, int32_t e, piece *pieces, int64_t *reached,
                             ms_parts *out, ms_error *err) {
  int32_t n = 0, copies = plan->copies[e];
  for (int32_t r = 0; r < plan->R; r++) {
    const int64_t *c = plan->columns + 2 * ((int64_t)r * plan->E + e);
    if (c[1] > c[0]) pieces[n++] = (piece){c[0], c[1], r};
  }
  MS_TRY(ms_parts_begin(out, copies, n, err));
  if (copies > 1) qsort(pieces, (size_t)n, sizeof *pieces, by_start);
  for (int32_t i = 0; i < copies && i < plan->R; i++) reached[i] = 0;
  for (int32_t i = 0; i < n; i++) {
    int32_t copy = 0;
    while (copies > 1 && copy < copies && reached[copy] != pieces[i].start) copy++;
    if (copy == copies)
      return ms_fail(err, MS_EINVAL, "columns: expert %d is not held by %d ranks everywhere", e,
                     copies);
    reached[copy] = pieces[i].stop;
    ms_parts_add(out, pieces[i].rank, copy, pieces[i].stop - pieces[i].start);
  }
  return MS_OK;
}

ms_status ms_parts_from_plan(const ms_plan *plan, ms_parts *out, ms_error *err) {
  MS_TRY(ms_parts_create(plan->R, plan->E, plan->F, out, err));
  piece *pieces = malloc((size_t)plan->R * sizeof *pieces);
  int64_t *reached = calloc((size_t)plan->R, sizeof *reached);
  ms_status status = MS_OK;
  if (!pieces || !reached) status = ms_fail(err, MS_ENOMEM, "no memory for %d ranks", plan->R);
  for (int32_t e = 0; e < plan->E && status == MS_OK; e++) {
    if (plan->copies[e] < 0 || plan->copies[e] > plan->R)
      status = ms_fail(err, MS_EINVAL, "copies[%d]: got %d, expected 0 to %d", e, plan->copies[e],
                       plan->R);
    else
      status = take_expert(plan, e, pieces, reached, out, err);
  }
  free(pieces);
  free(reached);
  if (status != MS_OK) ms_parts_free(out);
  return status;
}

ms_status ms_parts_to_plan(const ms_parts *layout, ms_plan *out, ms_error *err) {
  *out = (ms_plan){.R = layout->R, .E = layout->E, .F = layout->F};
  out->columns = calloc((size_t)layout->R * (size_t)layout->E, 2 * sizeof *out->columns);
  out->copies = malloc((size_t)layout->E * sizeof *out->copies);
  int64_t *reached = malloc((size_t)layout->R * sizeof *reached);
  if (!out->columns || !out->copies || !reached) {
    free(reached);
    ms_plan_free(out);
    return ms_fail(err, MS_ENOMEM, "no memory for a plan of %d ranks and %d experts", layout->R,
                   layout->E);
  }
  for (int32_t e = 0; e < layout->E; e++) {
    out->copies[e] = layout->copies[e];
    for (int32_t i = 0; i < layout->copies[e]; i++) reached[i] = 0;
    for (int64_t i = layout->first[e]; i < layout->first[e + 1]; i++) {
      const ms_part *part = &layout->parts[i];
      int64_t *c = out->columns + 2 * ((int64_t)part->rank * layout->E + e);
      c[0] = reached[part->copy];
      c[1] = reached[part->copy] += part->width;
    }
  }
  free(reached);
  return MS_OK;
}
