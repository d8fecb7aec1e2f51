// layout.h - the column table made ready: who computes a slot, asked by group, gather and combine.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_LAYOUT_H
#define MS_LAYOUT_H

#include "moeshard.h"

#include <string.h>

enum { MS_RANK_WORDS = (MS_MAX_RANKS + 63) / 64 }; // of a set of ranks, a bit each

struct ms_layout {
  int32_t R, E, rank;
  uint64_t digest; // of the whole table, not 0
  bool sparse;     // see ms_layout_is_sparse
  bool several;    // some expert has more than one copy: slots are dealt
  int32_t words;   // of a set of ranks
  int32_t *copies; // [E]
  int32_t *copy;   // [R][E] the copy that a rank is in, -1: none
  int64_t *first;  // [E+1] copies of the experts before: the sets of e are sets[first[e] + copy]
  uint64_t *sets;  // [first[E]][words] the ranks of each copy
};

// The batch's layout if there is anything to skip.
static inline const ms_layout *ms_sparse(const ms_batch *b) {
  return b->layout && b->layout->sparse ? b->layout : NULL;
}

// Whether rank r computes slot s, which is of expert e >= 0.
static inline bool ms_computes(const ms_batch *b, const ms_layout *l, int32_t r, int64_t s,
                               int32_t e) {
  return l->copy[(int64_t)r * l->E + e] == (b->copy ? b->copy[s] : 0);
}

// The ranks that compute something of token n: set [words].
static inline void ms_token_ranks(const ms_batch *b, const ms_layout *l, int64_t n, uint64_t *set) {
  memset(set, 0, (size_t)l->words * sizeof *set);
  for (int64_t s = n * b->K; s < (n + 1) * b->K; s++) {
    int32_t e = b->all_expert[s], copy = b->copy ? b->copy[s] : 0;
    if (e < 0 || copy >= l->copies[e]) continue;
    const uint64_t *of = l->sets + (l->first[e] + copy) * l->words;
    for (int32_t i = 0; i < l->words; i++) set[i] |= of[i];
  }
}

// Where this rank's own tokens begin among the gathered.
static inline int64_t ms_own_first(const ms_batch *b) {
  return b->replicated ? 0 : b->first[b->rank];
}

// Errors: MS_ESHAPE a layout of other ranks or experts than the batch.
ms_status ms_layout_fits(const ms_batch *batch, ms_error *err);

// Deal the slots of experts with several copies: batch->copy. Once a gather.
// Cost: O(N*K + E); memory grows only with the shape. Errors: MS_ENOMEM.
ms_status ms_layout_deal(ms_batch *batch, ms_error *err);

#endif
