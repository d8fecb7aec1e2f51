// parts.h - a table as lists of parts, expert by expert: what the cost model walks and the search builds.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PARTS_H
#define MS_PARTS_H

#include "../moeshard.h"

typedef struct ms_part {
  int32_t rank, copy;
  int64_t width; // columns; those of one copy follow each other in the order of its parts
} ms_part;

typedef struct ms_parts {
  int32_t R, E;
  int64_t F;
  int32_t filled;  // experts whose parts are there
  int64_t *first;  // [E+1] owned: parts of expert e are parts[first[e] .. first[e+1])
  int32_t *copies; // [E] owned
  ms_part *parts;  // owned
  int64_t room;
} ms_parts;

ms_status ms_parts_create(int32_t R, int32_t E, int64_t F, ms_parts *out, ms_error *err);
void ms_parts_free(ms_parts *layout); // zeroed is legal
void ms_parts_clear(ms_parts *layout);

// Experts are filled in order: begin with the number of copies and the most parts it may get, then add them. Parts of no
// width are left out.
ms_status ms_parts_begin(ms_parts *layout, int32_t copies, int64_t parts, ms_error *err);
void ms_parts_add(ms_parts *layout, int32_t rank, int32_t copy, int64_t width);

// The same from a table, and back. Copies are told apart by following them from column 0 on.
ms_status ms_parts_from_plan(const ms_plan *plan, ms_parts *out, ms_error *err);
ms_status ms_parts_to_plan(const ms_parts *layout, ms_plan *out, ms_error *err);

#endif
