// test_layout.c - any valid table: its copies hold every column once, slots are dealt by the rule, and the ranks
// together compute the layer, with all rows or only with those that they need.
// SPDX-License-Identifier: Apache-2.0
#include "check.h"
#include "layout.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS = 5, EXPERTS = 7 }; // at most

static uint64_t seed = 0x2545f4914f6cdd1du;

static int32_t below(int32_t n) { // 0 .. n - 1
  seed ^= seed << 13;
  seed ^= seed >> 7;
  seed ^= seed << 17;
  return (int32_t)((seed >> 11) % (uint64_t)n);
}

static float uniform(void) { return (float)below(2000001) * 1e-6f - 1; } // [-1, 1]

static float *random_floats(int64_t n, float scale) {
  float *x = malloc((size_t)(n + 1) * sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = scale * uniform();
  return x;
}

// ---- random tables --------------------------------------------------------------------------------

static int64_t *columns_of(const ms_plan *p, int32_t r, int32_t e) {
  return p->columns + 2 * ((int64_t)r * p->E + e);
}

// Ranks in random order, cut in groups, each group cut over F; cuts often meet those of other groups.
static void random_expert(ms_plan *p, int32_t e, bool pruned) {
  int32_t order[RANKS], used = 0;
  for (int32_t r = 0; r < p->R; r++) {
    int32_t other = below(r + 1);
    order[r] = order[other];
    order[other] = r;
  }
  p->copies[e] = pruned ? below(p->R + 1) : 1 + below(p->R);
  for (int32_t copy = 0; copy < p->copies[e]; copy++) {
    int32_t most = p->R - used - (p->copies[e] - 1 - copy), members = 1 + below(most);
    int64_t start = 0;
    for (int32_t i = 0; i < members; i++) {
      int64_t left = p->F - start;
      int64_t stop = i + 1 == members ? p->F
                     : below(2)       ? start + left / 2
                                      : start + below((int32_t)left + 1);
      columns_of(p, order[used], e)[0] = start;
      columns_of(p, order[used++], e)[1] = start = stop;
    }
  }
}

static ms_plan random_plan(int32_t R, int32_t E, int64_t F, bool pruned) {
  ms_plan p = {.R = R, .E = E, .F = F};
  p.columns = calloc((size_t)R * (size_t)E, 2 * sizeof *p.columns);
  p.copies = calloc((size_t)E, sizeof *p.copies);
  for (int32_t e = 0; e < E; e++) random_expert(&p, e, pruned);
  ms_error err;
  CHECK_OK(ms_plan_check(&p, &err), err);
  return p;
}

static ms_layout *layout_of(const ms_plan *p, int32_t rank) {
  ms_error err;
  ms_layout *l = NULL;
  CHECK_OK(ms_layout_create(p, rank, &l, &err), err);
  return l;
}

static void test_each_copy_holds_every_column_once(void) {
  for (int trial = 0; trial < 400; trial++) {
    ms_plan p = random_plan(1 + below(RANKS), 1 + below(EXPERTS), 1 + below(20), true);
    ms_layout *l = layout_of(&p, below(p.R));
    bool sparse = false;
    for (int32_t e = 0; e < p.E; e++) {
      for (int32_t copy = 0; copy < p.copies[e]; copy++)
        for (int64_t f = 0; f < p.F; f++) {
          int owners = 0;
          for (int32_t r = 0; r < p.R; r++) {
            const int64_t *c = columns_of(&p, r, e);
            owners += ms_layout_copy_of(l, r, e) == copy && c[0] <= f && f < c[1];
          }
          CHECK_INT(owners, 1);
        }
      for (int32_t r = 0; r < p.R; r++) {
        const int64_t *c = columns_of(&p, r, e);
        int32_t copy = ms_layout_copy_of(l, r, e);
        CHECK_INT(copy >= 0, c[0] < c[1]);
        CHECK(copy < p.copies[e]);
        for (int32_t i = 0; i < p.copies[e]; i++)
          CHECK_INT(l->sets[l->first[e] + i] >> r & 1, i == copy);
        sparse |= copy < 0 || p.copies[e] != 1;
      }
    }
    CHECK_INT(ms_layout_is_sparse(l), sparse);
    ms_layout_free(l);
    ms_plan_free(&p);
  }
}

static void test_copies_go_on_lowest_first_with_the_lowest_rank(void) {
  // Two copies that both end at column 4: rank 1 (copy 0) and rank 4 (copy 1); ranks 0 and 3 begin there.
  int64_t columns[] = {4, 8, 0, 4, 0, 0, 4, 8, 0, 4};
  int32_t copies[] = {2};
  ms_plan p = {.R = 5, .E = 1, .F = 8, .columns = columns, .copies = copies};
  ms_layout *l = layout_of(&p, 0);
  const int32_t expected[] = {0, 0, -1, 1, 1};
  for (int32_t r = 0; r < 5; r++) CHECK_INT(ms_layout_copy_of(l, r, 0), expected[r]);
  ms_layout_free(l);
}

static void test_many_ranks_are_sets_of_several_words(void) {
  enum { R = 200 };
  ms_error err;
  ms_plan p;
  CHECK_OK(ms_plan_shard(R, 2, 150, NULL, &p, &err), err); // narrower than there are ranks
  ms_layout *l = layout_of(&p, 150);
  int32_t holders = 0, counted = 0;
  for (int32_t r = 0; r < R; r++) holders += ms_layout_copy_of(l, r, 1) == 0;
  for (int32_t i = 0; i < l->words; i++)
    counted += __builtin_popcountll(l->sets[l->first[1] * l->words + i]);
  CHECK_INT(l->words, 4);
  CHECK_INT(holders, 150);
  CHECK_INT(counted, 150);
  CHECK(ms_layout_is_sparse(l));
  ms_layout_free(l);
  ms_plan_free(&p);
}

static void test_bad_layouts_are_refused(void) {
  ms_error err;
  ms_layout *l = NULL;
  ms_plan p;
  CHECK_OK(ms_plan_shard(2, 3, 8, NULL, &p, &err), err);
  CHECK_STATUS(ms_layout_create(&p, 2, &l, &err), MS_EINVAL, err);
  CHECK_TEXT(err.msg, "rank: got 2, expected 0 to 1");
  columns_of(&p, 1, 2)[0]++;
  CHECK_STATUS(ms_layout_create(&p, 0, &l, &err), MS_EINVAL, err);
  CHECK_TEXT(err.msg, "expert 2, columns [4, 5): held by 0 ranks, expected 1");
  CHECK(l == NULL);
  ms_plan_free(&p);
  ms_layout_free(NULL);
}

static void test_any_change_of_a_table_changes_its_digest(void) {
  ms_plan p = random_plan(4, 5, 24, true);
  ms_layout *l = layout_of(&p, 0), *other = layout_of(&p, 3);
  CHECK(l->digest != 0 && l->digest == other->digest); // the same on all ranks
  ms_layout_free(other);
  for (int trial = 0; trial < 200; trial++) {
    ms_plan q = random_plan(4, 5, 24, true);
    bool same = memcmp(p.columns, q.columns, 4 * 5 * 2 * sizeof *p.columns) == 0 &&
                memcmp(p.copies, q.copies, 5 * sizeof *p.copies) == 0;
    other = layout_of(&q, 0);
    CHECK_INT(l->digest == other->digest, same);
    ms_layout_free(other);
    ms_plan_free(&q);
  }
  ms_layout_free(l);
  ms_plan_free(&p);
}

// ---- a layer on ranks of one process ----------------------------------------------------------------

typedef struct problem {
  ms_plan plan;
  int64_t tokens[RANKS], D, N;
  int32_t K;
  bool gated, biases, replicated;
  float *hidden, *weight, *w_in, *w_out, *b_in, *b_out;
  int32_t *index;
  double *expected;
} problem;

static problem make(int32_t R, bool pruned, bool replicated) {
  problem p = {.plan = random_plan(R, 1 + below(EXPERTS), 1 + below(40), pruned),
               .D = 1 + below(30),
               .K = 1 + below(3),
               .gated = below(2),
               .biases = below(2),
               .replicated = replicated};
  for (int32_t r = 0; r < R; r++) {
    p.tokens[r] = replicated ? (r ? p.tokens[0] : 9) : below(3) ? below(20) : 0;
    p.N += replicated && r ? 0 : p.tokens[r];
  }
  int64_t E = p.plan.E, F = p.plan.F, rows = p.gated ? 2 * F : F;
  p.hidden = random_floats(p.N * p.D, 1);
  p.weight = random_floats(p.N * p.K, 1);
  p.w_in = random_floats(E * rows * p.D, 1 / sqrtf((float)p.D));
  p.w_out = random_floats(E * p.D * F, 1 / sqrtf((float)F));
  p.b_in = p.biases ? random_floats(E * rows, 0.5f) : NULL;
  p.b_out = p.biases ? random_floats(E * p.D, 0.5f) : NULL;
  p.index = malloc((size_t)(p.N * p.K + 1) * sizeof *p.index);
  int32_t *computed = malloc((size_t)(p.N * p.K + 1) * sizeof *computed); // without pruned experts
  for (int64_t s = 0; s < p.N * p.K; s++) {
    p.index[s] = below(2) ? 0 : below((int32_t)E + 1) - 1; // a hot expert
    computed[s] = p.index[s] >= 0 && p.plan.copies[p.index[s]] ? p.index[s] : -1;
  }
  p.expected = malloc((size_t)(p.N * p.D + 1) * sizeof *p.expected);
  ms_reference_layer(p.hidden, computed, p.weight, p.N, p.D, p.K, (int32_t)E, F, p.w_in, p.w_out,
                     p.b_in, p.b_out, MS_SILU, p.gated, p.expected);
  free(computed);
  return p;
}

static void free_problem(problem *p) {
  ms_plan_free(&p->plan);
  free(p->hidden);
  free(p->weight);
  free(p->w_in);
  free(p->w_out);
  free(p->b_in);
  free(p->b_out);
  free(p->index);
  free(p->expected);
}

static ms_experts *pack(const problem *p, int32_t rank) {
  ms_error err;
  ms_experts *x = NULL;
  int64_t F = p->plan.F, rows = p->gated ? 2 * F : F;
  ms_experts_spec spec = {.E = p->plan.E,
                          .D = p->D,
                          .F = F,
                          .storage = MS_F32,
                          .activation = MS_SILU,
                          .gated = p->gated,
                          .has_b_in = p->biases,
                          .has_b_out = p->biases,
                          .columns = columns_of(&p->plan, rank, 0)};
  CHECK_OK(ms_experts_create(&spec, &x, &err), err);
  for (int32_t e = 0; e < p->plan.E; e++) {
    ms_matrix w_in = {p->w_in + e * rows * p->D, MS_F32, rows, p->D, p->D, 1};
    ms_matrix w_out = {p->w_out + e * p->D * F, MS_F32, p->D, F, F, 1};
    CHECK_OK(ms_experts_pack(x, e, 0, F, &w_in, &w_out, p->biases ? p->b_in + e * rows : NULL,
                             p->biases ? p->b_out + e * p->D : NULL, MS_F32, NULL, &err),
             err);
  }
  return x;
}

typedef struct rank_state {
  ms_batch *batch;
  ms_layout *layout;
  ms_experts *experts;
  float *out;
  int64_t first; // of its tokens in the problem
} rank_state;

static void begin(const problem *p, rank_state *ranks) {
  ms_error err;
  int64_t first = 0;
  for (int32_t r = 0; r < p->plan.R; r++) {
    rank_state *k = &ranks[r];
    *k = (rank_state){.layout = layout_of(&p->plan, r), .experts = pack(p, r), .first = first};
    k->out = malloc((size_t)(p->tokens[r] * p->D + 1) * sizeof *k->out);
    CHECK_OK(ms_batch_create(&k->batch, &err), err);
    if (!p->replicated) first += p->tokens[r];
  }
}

static void end(const problem *p, rank_state *ranks) {
  for (int32_t r = 0; r < p->plan.R; r++) {
    ms_batch_free(ranks[r].batch);
    ms_layout_free(ranks[r].layout);
    ms_experts_free(ranks[r].experts);
    free(ranks[r].out);
  }
}

static void route(const problem *p, rank_state *k, int32_t r) {
  ms_error err;
  for (int64_t i = 0; i < p->tokens[r] * p->D; i++) k->out[i] = NAN; // every output must be written
  CHECK_OK(ms_route(k->batch, p->hidden + k->first * p->D, MS_F32, p->index + k->first * p->K,
                    MS_I32, p->weight + k->first * p->K, MS_F32, p->tokens[r], p->D, p->K,
                    p->plan.E, k->out, &err),
           err);
  k->batch->layout = k->layout;
  k->batch->replicated = p->replicated;
}

// The tokens of all ranks; of a replicated batch only `rank` has any.
static const int64_t *tokens_of(const problem *p, int32_t rank, int64_t tokens[RANKS]) {
  for (int32_t r = 0; r < p->plan.R; r++) tokens[r] = p->replicated && r != rank ? 0 : p->tokens[r];
  return tokens;
}

// Rows of other ranks as they come when each sends what is needed; NAN follows them. Freed by the caller.
static float *received(const problem *p, const rank_state *ranks, int32_t rank) {
  const ms_batch *b = ranks[rank].batch;
  float *rows = malloc((size_t)(p->N * p->D + 1) * sizeof *rows);
  int32_t *tokens = malloc((size_t)(p->N + 1) * sizeof *tokens);
  int64_t count = 0;
  for (int32_t r = 0; r < p->plan.R && !p->replicated; r++) {
    if (r == rank) continue;
    int64_t needed = ms_gather_needed(ranks[r].batch, r, rank, tokens); // as the sender finds it
    CHECK_INT(needed, ms_gather_needed(b, r, rank, NULL));
    for (int64_t i = 0; i < needed; i++, count++)
      memcpy(rows + count * p->D, p->hidden + (ranks[r].first + tokens[i]) * p->D,
             (size_t)p->D * sizeof *rows);
  }
  rows[count * p->D] = NAN;
  free(tokens);
  return rows;
}

// The parts of all ranks for the tokens of `rank`, packed.
static void packed_parts(const problem *p, const rank_state *ranks, int32_t rank,
                         float *parts[RANKS]) {
  int64_t T = p->tokens[rank];
  int32_t *tokens = malloc((size_t)(T + 1) * sizeof *tokens);
  for (int32_t r = 0; r < p->plan.R; r++) {
    const float *from = ranks[r].batch->partial + (p->replicated ? 0 : ranks[rank].first) * p->D;
    parts[r] = malloc((size_t)(T * p->D + 1) * sizeof **parts);
    int64_t n = ms_gather_needed(ranks[r].batch, rank, r, tokens);
    if (r == rank && T > 0)
      memcpy(parts[r], from, (size_t)(T * p->D) * sizeof *from);
    else if (r != rank)
      for (int64_t i = 0; i < n; i++)
        memcpy(parts[r] + i * p->D, from + tokens[i] * p->D, (size_t)p->D * sizeof *from);
  }
  free(tokens);
}

typedef enum way { ALL_ROWS, NEEDED_ROWS } way;

// One forward pass on all ranks, one after the other. out of rank r: ranks[r].out.
static void forward(const problem *p, rank_state *ranks, way how) {
  ms_error err;
  int64_t tokens[RANKS];
  float *rows[RANKS] = {NULL}, *parts[RANKS];
  int32_t R = p->plan.R;
  for (int32_t r = 0; r < R; r++) {
    route(p, &ranks[r], r);
    if (how == ALL_ROWS)
      CHECK_OK(ms_gather_from(ranks[r].batch, r, R, tokens_of(p, r, tokens), p->hidden, p->index,
                              p->weight, &err),
               err);
    else
      CHECK_OK(ms_gather_routing(ranks[r].batch, r, R, tokens_of(p, r, tokens), p->index, p->weight,
                                 &err),
               err);
  }
  for (int32_t r = 0; r < R; r++) {
    if (how == NEEDED_ROWS) ms_gather_received(ranks[r].batch, rows[r] = received(p, ranks, r));
    CHECK_OK(ms_group(ranks[r].batch, &err), err);
    for (int64_t i = 0; i < p->N * p->D; i++)
      ranks[r].batch->partial[i] = NAN; // what is not computed is not read
    CHECK_OK(ms_ffn(ranks[r].batch, ranks[r].experts, NULL, &err), err);
    CHECK_OK(ms_combine_choices(ranks[r].batch, NULL, &err), err);
  }
  for (int32_t r = 0; r < R; r++) {
    packed_parts(p, ranks, r, parts);
    const float *in_place[RANKS];
    for (int32_t i = 0; i < R; i++)
      in_place[i] = ranks[i].batch->partial + (p->replicated ? 0 : ranks[r].first) * p->D;
    const float *const *given = how == ALL_ROWS ? in_place : (const float *const *)parts;
    CHECK_OK(ms_combine_ranks(ranks[r].batch, given, R, how == NEEDED_ROWS, NULL, &err), err);
    for (int32_t i = 0; i < R; i++) free(parts[i]);
  }
  for (int32_t r = 0; r < R; r++) free(rows[r]);
}

static void check_counts(const problem *p, const rank_state *ranks) {
  for (int32_t r = 0; r < p->plan.R; r++) {
    const ms_batch *b = ranks[r].batch;
    int64_t read = 0, back = 0;
    for (int32_t other = 0; other < p->plan.R; other++) {
      if (other == r) continue;
      if (!p->replicated) read += ms_gather_needed(b, other, r, NULL);
      back += ms_gather_needed(b, r, other, NULL);
    }
    CHECK_INT(b->tokens_read, ms_sparse(b) ? read : p->replicated ? 0 : p->N - p->tokens[r]);
    CHECK_INT(b->partials_read, ms_sparse(b) ? back : (p->plan.R - 1) * p->tokens[r]);
    for (int32_t e = 0; e < p->plan.E; e++) {
      int64_t all = 0;
      for (int64_t s = 0; s < p->N * p->K; s++) all += p->index[s] == e;
      CHECK_INT(b->count[e], all);
      int64_t own = b->offset[e + 1] - b->offset[e], copies = p->plan.copies[e];
      if (ms_layout_copy_of(ranks[r].layout, r, e) < 0)
        CHECK_INT(own, 0);
      else
        CHECK(own == all / copies || own == all / copies + (all % copies > 0));
    }
  }
}

// Of single numbers that nearly cancel, a relative error says nothing: all operands are of size 1.
static void check_close(const float *found, const double *expected, int64_t n) {
  double error = 0, scale = 1;
  for (int64_t i = 0; i < n; i++) {
    CHECK(!isnan(found[i]));
    error = fmax(error, fabs((double)found[i] - expected[i]));
    scale = fmax(scale, fabs(expected[i]));
  }
  CHECK_THAT(error <= 2e-6 * scale, "error %g at scale %g", error, scale);
}

static void check_layer(int32_t R, bool pruned, bool replicated) {
  problem p = make(R, pruned, replicated);
  rank_state ranks[RANKS];
  begin(&p, ranks);
  float *first[RANKS];
  for (int pass = 0; pass < 4; pass++) { // on new and on used memory, both ways
    forward(&p, ranks, pass % 2 ? NEEDED_ROWS : ALL_ROWS);
    check_counts(&p, ranks);
    for (int32_t r = 0; r < R; r++) {
      size_t bytes = (size_t)(p.tokens[r] * p.D) * sizeof(float);
      if (pass == 0) {
        check_close(ranks[r].out, p.expected + ranks[r].first * p.D, p.tokens[r] * p.D);
        memcpy(first[r] = malloc(bytes + 1), ranks[r].out, bytes);
      }
      CHECK(memcmp(first[r], ranks[r].out, bytes) == 0); // the same bits
    }
  }
  for (int32_t r = 0; r < R; r++) free(first[r]);
  end(&p, ranks);
  free_problem(&p);
}

static void test_ranks_together_compute_the_layer(void) {
  for (int trial = 0; trial < 120; trial++) check_layer(1 + trial % RANKS, trial % 3 == 0, false);
}

static void test_replicated_tokens_are_computed_once(void) {
  for (int trial = 0; trial < 40; trial++) check_layer(1 + trial % RANKS, trial % 3 == 0, true);
}

// ---- the rule ---------------------------------------------------------------------------------------

static void test_slots_are_dealt_by_the_rule(void) {
  for (int trial = 0; trial < 200; trial++) {
    problem p = make(2 + below(RANKS - 1), false, trial % 5 == 0);
    rank_state ranks[RANKS];
    begin(&p, ranks);
    int64_t slots = p.N * p.K, tokens[RANKS];
    int32_t *home = malloc((size_t)(slots + 1) * sizeof *home);
    int32_t *copy = malloc((size_t)(slots + 1) * sizeof *copy);
    ms_error err;
    for (int32_t r = 0; r < p.plan.R; r++) { // all ranks find the same
      ms_batch *b = ranks[r].batch;
      route(&p, &ranks[r], r);
      CHECK_OK(ms_gather_routing(b, r, p.plan.R, tokens_of(&p, r, tokens), p.index, p.weight, &err),
               err);
      for (int32_t e = 0; e < p.plan.E; e++) {
        for (int32_t source = 0; source < p.plan.R; source++)
          for (int64_t n = ranks[source].first; n < ranks[source].first + p.tokens[source]; n++)
            for (int64_t s = n * p.K; s < (n + 1) * p.K; s++)
              home[s] = p.replicated ? -1 : ms_layout_copy_of(ranks[r].layout, source, e);
        ms_reference_deal(p.index, home, slots, e, p.plan.copies[e], copy);
        for (int64_t s = 0; s < slots; s++)
          if (p.index[s] == e) CHECK_INT(b->copy ? b->copy[s] : 0, copy[s]);
      }
    }
    free(home);
    free(copy);
    end(&p, ranks);
    free_problem(&p);
  }
}

// Four tokens on rank 0 and none on rank 1, both with all of one expert: two stay, two travel. With two tokens each, all stay.
static void test_tokens_stay_at_home_as_far_as_the_balance_lets_them(void) {
  int64_t columns[] = {0, 4, 0, 4};
  int32_t copies[] = {2}, index[] = {0, 0, 0, 0};
  float hidden[4] = {0}, weight[4] = {1, 1, 1, 1}, out[4];
  ms_plan plan = {.R = 2, .E = 1, .F = 4, .columns = columns, .copies = copies};
  ms_layout *l = layout_of(&plan, 0);
  ms_error err;
  ms_batch *b = NULL;
  CHECK_OK(ms_batch_create(&b, &err), err);
  for (int64_t own = 2; own <= 4; own++) {
    const int64_t tokens[] = {own, 4 - own};
    CHECK_OK(ms_route(b, hidden, MS_F32, index, MS_I32, weight, MS_F32, own, 1, 1, 1, out, &err),
             err);
    b->layout = l;
    CHECK_OK(ms_gather_routing(b, 0, 2, tokens, index, weight, &err), err);
    CHECK_INT(ms_gather_needed(b, 0, 1, NULL), own - 2);
    CHECK_INT(ms_gather_needed(b, 0, 0, NULL), 2);
  }
  ms_batch_free(b);
  ms_layout_free(l);
}

static void test_a_layout_of_others_is_refused(void) {
  ms_error err;
  ms_plan plan;
  CHECK_OK(ms_plan_expert_parallel(2, 3, 8, NULL, &plan, &err), err);
  ms_layout *l = layout_of(&plan, 1);
  ms_batch *b = NULL;
  CHECK_OK(ms_batch_create(&b, &err), err);
  const int64_t tokens[] = {1, 0};
  float hidden[1] = {1}, weight[1] = {1}, out[1];
  int32_t index[1] = {0}, bad[1] = {7};
  CHECK_OK(ms_route(b, hidden, MS_F32, index, MS_I32, weight, MS_F32, 1, 1, 1, 3, out, &err), err);
  b->layout = l;
  CHECK_STATUS(ms_gather_routing(b, 0, 2, tokens, index, weight, &err), MS_ESHAPE, err);
  CHECK_TEXT(err.msg, "layout: it is rank 1's of 2 and has 3 experts, expected rank 0 of 2 and 3");
  CHECK_INT(b->R, 0);
  ms_layout_free(l);
  l = layout_of(&plan, 0);
  b->layout = l;
  CHECK_OK(ms_gather_routing(b, 0, 2, tokens, bad, weight, &err), err); // only counted so far
  CHECK_INT(ms_gather_needed(b, 0, 0, NULL), 0);
  CHECK_STATUS(ms_group(b, &err), MS_ERANGE, err);
  ms_batch_free(b);
  ms_layout_free(l);
  ms_plan_free(&plan);
}

int main(void) {
  check_begin();
  test_each_copy_holds_every_column_once();
  test_copies_go_on_lowest_first_with_the_lowest_rank();
  test_many_ranks_are_sets_of_several_words();
  test_bad_layouts_are_refused();
  test_any_change_of_a_table_changes_its_digest();
  test_ranks_together_compute_the_layer();
  test_replicated_tokens_are_computed_once();
  test_slots_are_dealt_by_the_rule();
  test_tokens_stay_at_home_as_far_as_the_balance_lets_them();
  test_a_layout_of_others_is_refused();
  return check_end("test_layout");
}
