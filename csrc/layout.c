// layout.c - the column table made ready for the steps: the copies of each expert, and which slots each copy gets.
// SPDX-License-Identifier: Apache-2.0
#include "layout.h"
#include "base/memory.h"

#include <stdlib.h>

// ---- the copies ---------------------------------------------------------------------------------

typedef struct owner {
  int64_t start, stop;
  int32_t rank;
} owner;

static int by_start(const void *a, const void *b) {
  const owner *x = a, *y = b;
  if (x->start != y->start) return x->start < y->start ? -1 : 1;
  return (x->rank > y->rank) - (x->rank < y->rank);
}

// Owners by start and rank; `end` [copies] is scratch: how far each copy has come. The table was checked, so a copy waits
// for every owner.
static void form_copies(ms_layout *l, const ms_plan *plan, int32_t e, owner *owners, int64_t *end) {
  int32_t n = 0;
  for (int32_t r = 0; r < l->R; r++) {
    const int64_t *c = plan->columns + 2 * ((int64_t)r * l->E + e);
    l->copy[(int64_t)r * l->E + e] = -1;
    if (c[0] < c[1]) owners[n++] = (owner){c[0], c[1], r};
  }
  qsort(owners, (size_t)n, sizeof *owners, by_start);
  memset(end, 0, (size_t)l->copies[e] * sizeof *end);
  for (int32_t i = 0; i < n; i++) {
    int32_t copy = 0;
    while (end[copy] != owners[i].start) copy++;
    end[copy] = owners[i].stop;
    l->copy[(int64_t)owners[i].rank * l->E + e] = copy;
    uint64_t *set = l->sets + (l->first[e] + copy) * l->words;
    set[owners[i].rank / 64] |= (uint64_t)1 << owners[i].rank % 64;
  }
  l->sparse |= l->copies[e] != 1 || n < l->R;
  l->several |= l->copies[e] > 1;
}

// Any difference between two tables of one size, columns and copies, changes it with probability 1 - 2^-64.
static uint64_t digest_table(const ms_plan *plan) {
  uint64_t sum = 0x9e3779b97f4a7c15u ^ (uint64_t)plan->F;
  int64_t entries = (int64_t)plan->R * plan->E * 2;
  for (int64_t i = 0; i < entries + plan->E; i++) {
    int64_t value = i < entries ? plan->columns[i] : plan->copies[i - entries];
    sum = (sum ^ (uint64_t)value) * 0xff51afd7ed558ccdu;
    sum ^= sum >> 32;
  }
  return sum ? sum : 1;
}

static ms_status reserve(ms_layout *l, const ms_plan *plan, ms_error *err) {
  size_t R = (size_t)l->R, E = (size_t)l->E;
  l->copies = malloc(E * sizeof *l->copies);
  l->copy = malloc(R * E * sizeof *l->copy);
  l->first = malloc((E + 1) * sizeof *l->first);
  if (!l->copies || !l->copy || !l->first) goto failed;
  memcpy(l->copies, plan->copies, E * sizeof *l->copies);
  l->first[0] = 0;
  for (int32_t e = 0; e < l->E; e++) l->first[e + 1] = l->first[e] + l->copies[e];
  l->sets = calloc((size_t)l->first[E] * (size_t)l->words + 1, sizeof *l->sets);
  if (l->sets) return MS_OK;
failed:
  return ms_fail(err, MS_ENOMEM, "no memory for a layout of %d ranks and %d experts", l->R, l->E);
}

ms_status ms_layout_create(const ms_plan *plan, int32_t rank, ms_layout **out, ms_error *err) {
  *out = NULL;
  if (rank < 0 || rank >= plan->R)
    return ms_fail(err, MS_EINVAL, "rank: got %d, expected 0 to %d", rank, plan->R - 1);
  MS_TRY(ms_plan_check(plan, err));
  ms_status status = MS_OK;
  ms_layout *l = calloc(1, sizeof *l);
  owner *owners = malloc((size_t)plan->R * sizeof *owners);
  int64_t *end = malloc((size_t)plan->R * sizeof *end); // an expert has at most R copies
  if (!l || !owners || !end) {
    status = ms_fail(err, MS_ENOMEM, "no memory for a layout of %d ranks", plan->R);
    goto done;
  }
  l->R = plan->R;
  l->E = plan->E;
  l->rank = rank;
  l->words = (plan->R + 63) / 64;
  l->digest = digest_table(plan);
  if ((status = reserve(l, plan, err)) != MS_OK) goto done;
  for (int32_t e = 0; e < l->E; e++) form_copies(l, plan, e, owners, end);
  *out = l;
done:
  free(end);
  free(owners);
  if (status != MS_OK) ms_layout_free(l);
  return status;
}

void ms_layout_free(ms_layout *l) {
  if (!l) return;
  free(l->sets);
  free(l->first);
  free(l->copy);
  free(l->copies);
  free(l);
}

bool ms_layout_is_sparse(const ms_layout *l) { return l->sparse; }

int32_t ms_layout_copy_of(const ms_layout *l, int32_t r, int32_t e) {
  return l->copy[(int64_t)r * l->E + e];
}

ms_status ms_layout_fits(const ms_batch *b, ms_error *err) {
  const ms_layout *l = b->layout;
  if (!l || (l->R == b->R && l->E == b->E && l->rank == b->rank)) return MS_OK;
  return ms_fail(err, MS_ESHAPE,
                 "layout: it is rank %d's of %d and has %d experts, expected rank %d of %d and %d",
                 l->rank, l->R, l->E, b->rank, b->R, b->E);
}

// ---- dealing the slots --------------------------------------------------------------------------

typedef struct turn { // of one expert
  int64_t even;       // slots that every copy gets
  int64_t extra;      // copies that still may get one more
  int64_t next;       // the copy whose turn it is
} turn;

enum { NOT_DEALT = -1 };

static bool take(turn *t, int64_t *taken) {
  if (*taken > t->even || (*taken == t->even && t->extra == 0)) return false;
  t->extra -= *taken == t->even;
  ++*taken;
  return true;
}

// The slots of the tokens [from, to) of rank r, where that rank's own copy has room. r < 0: nobody's own.
static void deal_at_home(ms_batch *b, turn *turns, int64_t *taken, int32_t r, int64_t from,
                         int64_t to) {
  const ms_layout *l = b->layout;
  for (int64_t s = from * b->K; s < to * b->K; s++) {
    int32_t e = b->all_expert[s];
    b->copy[s] = 0;
    if (e < 0 || e >= l->E || l->copies[e] < 2) continue;
    int32_t home = r < 0 ? -1 : l->copy[(int64_t)r * l->E + e];
    bool at_home = home >= 0 && take(&turns[e], &taken[l->first[e] + home]);
    b->copy[s] = (int16_t)(at_home ? home : NOT_DEALT);
  }
}

static void deal_in_turns(ms_batch *b, turn *turns, int64_t *taken) {
  const ms_layout *l = b->layout;
  for (int64_t s = 0; s < b->N * b->K; s++) {
    if (b->copy[s] != NOT_DEALT) continue;
    int32_t e = b->all_expert[s];
    turn *t = &turns[e];
    while (!take(t, &taken[l->first[e] + t->next])) t->next = (t->next + 1) % l->copies[e];
    b->copy[s] = (int16_t)t->next;
    t->next = (t->next + 1) % l->copies[e];
  }
}

ms_status ms_layout_deal(ms_batch *b, ms_error *err) {
  const ms_layout *l = b->layout;
  b->copy = NULL;
  if (!l || !l->several) return MS_OK;
  struct ms_batch_memory *memory = b->memory;
  int64_t slots = b->N * b->K, sets = l->first[l->E];
  int64_t turns_bytes = l->E * (int64_t)sizeof(turn), taken_bytes = sets * (int64_t)sizeof(int64_t);
  // One byte at least: copy is there, if only for no slots.
  MS_TRY(
      ms_buffer_grow(&memory->copy, slots * (int64_t)sizeof(int16_t) + 1, "copies of slots", err));
  MS_TRY(ms_buffer_grow(&memory->turns, turns_bytes + taken_bytes, "turns of copies", err));
  turn *turns = memory->turns.data;
  int64_t *taken = (int64_t *)(void *)((char *)memory->turns.data + turns_bytes);
  memset(turns, 0, (size_t)(turns_bytes + taken_bytes));
  b->copy = memory->copy.data;

  for (int64_t s = 0; s < slots; s++) {
    int32_t e = b->all_expert[s];
    if (e >= 0 && e < l->E) turns[e].even++; // group refuses what is out of range
  }
  for (int32_t e = 0; e < l->E; e++) {
    int64_t n = turns[e].even, copies = l->copies[e];
    if (copies < 2) continue;
    turns[e] = (turn){.even = n / copies, .extra = n % copies, .next = e % copies};
  }
  if (b->replicated) deal_at_home(b, turns, taken, -1, 0, b->N);
  for (int32_t r = 0; r < b->R && !b->replicated; r++)
    deal_at_home(b, turns, taken, r, b->first[r], b->first[r + 1]);
  deal_in_turns(b, turns, taken);
  return MS_OK;
}
