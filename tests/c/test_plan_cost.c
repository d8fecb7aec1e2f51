// test_plan_cost.c - the cost model adds up what its comment says, and the search is as good as looking at every table.
// SPDX-License-Identifier: Apache-2.0
#include "check.h"
#include "moeshard.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_RANKS = 16, MOST_EXPERTS = 64 };

typedef struct scene {
  double flops[MOST_RANKS], bandwidth[MOST_RANKS], memory[MOST_RANKS], tokens[MOST_RANKS],
      load[MOST_EXPERTS];
  int32_t host[MOST_RANKS];
  ms_cluster cluster;
  ms_moe_layer layer;
} scene;

// Every rank alike: 1e9 flops/s, 1e9 bytes/s of memory, links of 1e8 bytes/s; nothing else costs anything.
static void plain(scene *s, int32_t R, int32_t E, int64_t F, int32_t K) {
  *s = (scene){0};
  for (int32_t r = 0; r < R; r++) {
    s->flops[r] = s->bandwidth[r] = 1e9;
    s->memory[r] = INFINITY;
    s->tokens[r] = 100;
  }
  for (int32_t e = 0; e < E; e++) s->load[e] = 100.0 * R * K / E;
  s->cluster = (ms_cluster){.R = R,
                            .flops = s->flops,
                            .bandwidth = s->bandwidth,
                            .memory = s->memory,
                            .host = s->host,
                            .host_bandwidth = INFINITY,
                            .inside = {0, 0, 1e8},
                            .between = {0, 0, 1e7},
                            .flops_share = 1,
                            .bandwidth_share = 1,
                            .panel = 1};
  s->layer = (ms_moe_layer){.E = E,
                            .K = K,
                            .D = 8,
                            .F = F,
                            .matrices = 2,
                            .weight_size = 4,
                            .token_size = 4,
                            .tokens = s->tokens,
                            .load = s->load,
                            .exact = true};
}

static ms_cost cost_of(const scene *s, const ms_plan *plan, const ms_rank_costs *ranks) {
  ms_cost cost;
  ms_error err;
  CHECK_OK(ms_plan_cost(plan, &s->cluster, &s->layer, &cost, ranks, &err), err);
  return cost;
}

#define CHECK_NEAR(got, wanted)                                                                    \
  CHECK_THAT(fabs((got) - (wanted)) <= 1e-9 * fabs((double)(wanted)) + 1e-15,                      \
             "%s is %.12g, expected %.12g", #got, (double)(got), (double)(wanted))

static void the_steps_are_what_the_comment_says(void) {
  scene s;
  ms_plan plan;
  ms_error err;
  double ffn[4], memory[4], gathered[4], combined[4];
  ms_rank_costs ranks = {ffn, memory, gathered, combined};
  plain(&s, 4, 8, 16, 1);

  CHECK_OK(ms_plan_shard(4, 8, 16, NULL, &plan, &err), err);
  ms_cost cost = cost_of(&s, &plan, &ranks);
  CHECK(!cost.sparse);
  double row = 8 * 4 + 8, partial = 8 * 4; // a choice is 8 bytes
  double weights = 2.0 * 8 * 4;            // of 4 of an expert's 16 columns
  double one = hypot(2 * 50 * weights / 1e9, weights * 4 / 1e9);
  CHECK_NEAR(cost.route, 100 * 2.0 * 8 * 8 / 1e9);
  CHECK_NEAR(cost.gather, 300 * row / 1e8);
  CHECK_NEAR(cost.ffn, 8 * one);
  CHECK_NEAR(cost.combine, 300 * partial / 1e8 + 400 * partial / 1e9);
  CHECK_NEAR(cost.total, cost.route + cost.gather + cost.group + cost.ffn + cost.combine);
  for (int r = 0; r < 4; r++) {
    CHECK_NEAR(memory[r], 8 * weights * 4);
    CHECK_NEAR(gathered[r], 300 * row);
    CHECK_NEAR(combined[r], 300 * partial);
    CHECK_NEAR(ffn[r], 8 * one);
  }
  ms_plan_free(&plan);

  // Expert parallel, one choice: a token goes to one rank of four, so three quarters of 100 tokens leave each rank.
  CHECK_OK(ms_plan_expert_parallel(4, 8, 16, NULL, &plan, &err), err);
  cost = cost_of(&s, &plan, &ranks);
  CHECK(cost.sparse);
  CHECK_NEAR(cost.gather, 75 * row / 1e8);
  CHECK_NEAR(cost.combine, 75 * partial / 1e8 + 100 * partial / 1e9);
  CHECK_NEAR(gathered[2], 75 * row);
  CHECK_NEAR(ffn[0], 2 * hypot(2 * 50 * weights * 4 / 1e9, weights * 16 / 1e9));

  // Between two hosts: two of three peers are elsewhere.
  s.host[2] = s.host[3] = 1;
  cost = cost_of(&s, &plan, NULL);
  CHECK_NEAR(cost.gather, 50 * row / 1e7);
  ms_plan_free(&plan);

  // All-gather between hosts: each of a host's two ranks carries half of what the other host has.
  CHECK_OK(ms_plan_shard(4, 8, 16, NULL, &plan, &err), err);
  cost = cost_of(&s, &plan, NULL);
  CHECK_NEAR(cost.gather, 100 * row / 1e7);
  ms_plan_free(&plan);
}

static void latency_counts_messages(void) {
  scene s;
  ms_plan plan;
  ms_error err;
  plain(&s, 8, 8, 16, 1);
  s.cluster.inside = (ms_link){1, 2, INFINITY};
  CHECK_OK(ms_plan_shard(8, 8, 16, NULL, &plan, &err), err);
  CHECK_NEAR(cost_of(&s, &plan, NULL).gather, 3);
  ms_plan_free(&plan);
  CHECK_OK(ms_plan_expert_parallel(8, 8, 16, NULL, &plan, &err), err);
  ms_cost cost =
      cost_of(&s, &plan, NULL); // seven messages, each further one 2 s: all-gather is faster
  CHECK(!cost.sparse);
  CHECK_NEAR(cost.gather, 3);
  s.cluster.inside.message = 0.1;
  cost = cost_of(&s, &plan, NULL);
  CHECK(cost.sparse);
  CHECK_NEAR(cost.gather, 1 + 6 * 0.1);
  ms_plan_free(&plan);
}

static void latency_of_a_ring_is_that_of_hosts_too(void) {
  scene s;
  ms_plan plan;
  ms_error err;
  plain(&s, 8, 8, 16, 1);
  s.cluster.inside = (ms_link){1, 100, INFINITY};
  s.cluster.between = (ms_link){10, 100, INFINITY};
  for (int r = 0; r < 8; r++) s.host[r] = r / 2; // four hosts of two
  CHECK_OK(ms_plan_shard(8, 8, 16, NULL, &plan, &err), err);
  CHECK_NEAR(cost_of(&s, &plan, NULL).gather, 1 + 2 * 10);
  ms_plan_free(&plan);
}

static void ranks_of_a_host_share_its_memory(void) {
  scene s;
  ms_plan plan;
  ms_error err;
  double ffn[2];
  plain(&s, 2, 4, 16, 1);
  s.flops[0] = s.flops[1] = 1e300;
  s.cluster.host_bandwidth = 1e9; // as much as one rank alone
  CHECK_OK(ms_plan_shard(2, 4, 16, NULL, &plan, &err), err);
  cost_of(&s, &plan, &(ms_rank_costs){.ffn = ffn});
  CHECK_NEAR(ffn[0], 4 * 2.0 * 8 * 16 * 4 / 1e9); // all experts, at the host's rate
  ms_plan_free(&plan);
  const int32_t owner[4] = {0, 0, 0, 1};
  CHECK_OK(ms_plan_expert_parallel(2, 4, 16, owner, &plan, &err), err);
  cost_of(&s, &plan, &(ms_rank_costs){.ffn = ffn});
  CHECK_NEAR(ffn[0],
             4 * 2.0 * 8 * 16 * 4 / 1e9); // the other rank is done first, and leaves it the rest
  ms_plan_free(&plan);
}

static void copies_split_tokens_and_keep_them_at_home(void) {
  scene s;
  double memory[4], gathered[4];
  plain(&s, 4, 1, 16, 1);
  int64_t columns[4][1][2] = {{{0, 16}}, {{0, 16}}, {{0, 16}}, {{0, 16}}};
  int32_t copies[1] = {4};
  ms_plan plan = {4, 1, 16, &columns[0][0][0], copies};
  ms_cost cost = cost_of(&s, &plan, &(ms_rank_costs){.memory = memory, .gathered = gathered});
  CHECK(cost.sparse);
  CHECK_NEAR(cost.ffn, hypot(2 * 100 * 256.0 / 1e9,
                             256.0 * 4 / 1e9)); // a quarter of 400 rows, all of the weights
  CHECK_NEAR(memory[3], 256.0 * 4);
  CHECK_NEAR(gathered[0], 0); // every rank has its own copy

  int64_t half[4][1][2] = {{{0, 8}}, {{8, 16}}, {{0, 8}}, {{8, 16}}}; // a copy for each two ranks
  copies[0] = 2;
  plan.columns = &half[0][0][0];
  cost = cost_of(&s, &plan, &(ms_rank_costs){.gathered = gathered});
  CHECK_NEAR(gathered[0], 100 * 40.0); // those of the other rank of its copy
  CHECK_NEAR(cost.ffn, hypot(2 * 200 * 128.0 / 1e9, 128.0 * 4 / 1e9));

  int64_t some[4][1][2] = {{{0, 16}}, {{0, 16}}, {{0, 0}}, {{0, 0}}}; // two ranks have nothing
  plan.columns = &some[0][0][0];
  cost_of(&s, &plan, &(ms_rank_costs){.gathered = gathered});
  CHECK_NEAR(gathered[0], 100 * 40.0); // half of those of ranks 2 and 3
  CHECK_NEAR(gathered[2], 0);
}

static void means_hit_experts_by_chance(void) {
  scene s;
  ms_plan plan;
  ms_error err;
  plain(&s, 1, 4, 16, 1);
  s.layer.exact = false;
  s.flops[0] = 1e300;
  s.tokens[0] = 4;
  for (int e = 0; e < 4; e++) s.load[e] = 1;
  CHECK_OK(ms_plan_shard(1, 4, 16, NULL, &plan, &err), err);
  ms_cost cost = cost_of(&s, &plan, NULL);
  CHECK_NEAR(cost.ffn, 4 * (1 - exp(-1)) * 256 * 4 / 1e9);
  CHECK_NEAR(cost.gather, 0);
  ms_plan_free(&plan);
}

static void bad_numbers_are_named(void) {
  scene s;
  ms_plan plan;
  ms_cost cost;
  ms_error err;
  plain(&s, 2, 4, 16, 1);
  CHECK_OK(ms_plan_shard(2, 4, 16, NULL, &plan, &err), err);
  const struct {
    double *where, value;
    const char *name;
  } bad[] = {{&s.flops[1], 0, "flops[1]"},
             {&s.bandwidth[0], NAN, "bandwidth[0]"},
             {&s.memory[1], -1, "memory[1]"},
             {&s.tokens[0], INFINITY, "tokens[0]"},
             {&s.load[3], -2, "load[3]"},
             {&s.cluster.host_bandwidth, 0, "host_bandwidth"},
             {&s.cluster.inside.latency, -1, "link"},
             {&s.cluster.flops_share, 0, "share"}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    double before = *bad[i].where;
    *bad[i].where = bad[i].value;
    CHECK_STATUS(ms_plan_cost(&plan, &s.cluster, &s.layer, &cost, NULL, &err), MS_EINVAL, err);
    CHECK_TEXT(err.msg, bad[i].name);
    *bad[i].where = before;
  }
  s.host[0] = 1;
  CHECK_STATUS(ms_plan_cost(&plan, &s.cluster, &s.layer, &cost, NULL, &err), MS_EINVAL, err);
  CHECK_TEXT(err.msg, "host[1]");
  s.host[0] = 0;
  s.layer.K = 5;
  CHECK_STATUS(ms_plan_cost(&plan, &s.cluster, &s.layer, &cost, NULL, &err), MS_EINVAL, err);
  CHECK_TEXT(err.msg, "top_k");
  ms_plan_free(&plan);
}

// ---- the search -----------------------------------------------------------------------------------------

static uint64_t state = 1;

static double random_between(double low, double high) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return low + (high - low) * (double)(state >> 11) * 0x1p-53;
}

// A random machine and routing: links, speeds, hosts and memory that make every kind of table win now and then.
static void random_scene(scene *s, int32_t R, int32_t E, int64_t F) {
  plain(s, R, E, F, E > 1 && random_between(0, 1) < 0.4 ? 2 : 1);
  s->layer.exact = random_between(0, 1) < 0.3;
  s->cluster.inside =
      (ms_link){random_between(0, 1e-5), random_between(0, 1e-6), pow(10, random_between(6, 10))};
  s->cluster.between =
      (ms_link){random_between(0, 1e-4), random_between(0, 1e-5), pow(10, random_between(5, 9))};
  s->cluster.step = random_between(0, 1e-5);
  s->cluster.expert = random_between(0, 1e-6);
  s->cluster.idle_rows = random_between(0, 4);
  s->cluster.panel = random_between(0, 1) < 0.5 ? 1 : 2;
  if (random_between(0, 1) < 0.5) s->cluster.host_bandwidth = 1.2e9;
  double whole = 2.0 * 8 * (double)F * 4 * E, total = 0, tokens = 0;
  bool tight = random_between(0, 1) < 0.5;
  for (int32_t r = 0; r < R; r++) {
    s->flops[r] = random_between(0, 1) < 0.5 ? 1e9 : random_between(3e8, 2e9);
    s->tokens[r] = floor(random_between(0, 200));
    tokens += s->tokens[r];
    s->host[r] = r > 0 ? s->host[r - 1] + (random_between(0, 1) < 0.3) : 0;
    if (tight) s->memory[r] = whole * random_between(0.4, 1.1);
  }
  for (int32_t e = 0; e < E; e++) total += s->load[e] = pow(random_between(0, 1), 3);
  for (int32_t e = 0; e < E; e++) {
    s->load[e] = floor(s->load[e] / total * tokens * s->layer.K);
    if (s->load[e] > tokens) s->load[e] = tokens;
  }
}

// Every way that R ranks can hold intervals of one expert so that each column is held equally often.
typedef struct way {
  int64_t columns[3][2];
  int32_t copies;
} way;

static int32_t all_ways(int32_t R, int64_t F, way *ways) {
  int64_t intervals[16][2] = {{0, 0}};
  int32_t kinds = 1, n = 0;
  for (int64_t a = 0; a < F; a++)
    for (int64_t b = a + 1; b <= F; b++, kinds++) intervals[kinds][0] = a, intervals[kinds][1] = b;
  int32_t all = 1;
  for (int32_t r = 0; r < R; r++) all *= kinds;
  for (int32_t code = 0; code < all; code++) {
    way now = {0};
    int32_t rest = code;
    for (int32_t r = 0; r < R; r++, rest /= kinds)
      memcpy(now.columns[r], intervals[rest % kinds], sizeof now.columns[r]);
    int32_t copies = 0;
    for (int32_t r = 0; r < R; r++) copies += now.columns[r][0] == 0 && now.columns[r][1] > 0;
    if (copies == 0) continue;
    now.copies = copies;
    int64_t table[3][2];
    memcpy(table, now.columns, sizeof table);
    ms_plan one = {R, 1, F, &table[0][0], &copies};
    if (ms_plan_check(&one, NULL) == MS_OK) ways[n++] = now;
  }
  return n;
}

static double best_of_all_tables(const scene *s) {
  int32_t R = s->cluster.R, E = s->layer.E, at[6] = {0}, copies[6];
  int64_t columns[3][6][2];
  double best = INFINITY, memory[3];
  way ways[64];
  int32_t count = all_ways(R, s->layer.F, ways);
  for (;;) {
    for (int32_t e = 0; e < E; e++) {
      copies[e] = ways[at[e]].copies;
      for (int32_t r = 0; r < R; r++) // [R][E][2] without gaps
        memcpy((int64_t *)columns + 2 * (r * E + e), ways[at[e]].columns[r], 2 * sizeof(int64_t));
    }
    ms_plan plan = {R, E, s->layer.F, &columns[0][0][0], copies};
    ms_cost cost = cost_of(s, &plan, &(ms_rank_costs){.memory = memory});
    bool fits = true;
    for (int32_t r = 0; r < R; r++) fits &= memory[r] <= s->memory[r];
    if (fits && cost.total < best) best = cost.total;
    int32_t e = 0;
    while (e < E && ++at[e] == count) at[e++] = 0;
    if (e == E) return best;
  }
}

static void search_equals_brute_force(void) {
  const struct {
    int32_t R, E;
    int64_t F;
    int tries;
  } sizes[] = {{2, 6, 2, 6}, {2, 3, 4, 6}, {3, 4, 1, 8}, {3, 3, 2, 8}, {3, 6, 1, 1}, {3, 2, 3, 6}};
  int simple = 0, fancy = 0;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (int t = 0; t < sizes[i].tries; t++) {
      scene s;
      random_scene(&s, sizes[i].R, sizes[i].E, sizes[i].F);
      double best = best_of_all_tables(&s);
      ms_plan plan;
      ms_candidate found[MS_CANDIDATES];
      int32_t count, chosen;
      bool proven;
      ms_error err;
      ms_status status =
          ms_plan_search(&s.cluster, &s.layer, ~0u, &plan, found, &count, &chosen, &proven, &err);
      if (isinf(best)) {
        CHECK_INT(status, MS_ERANGE);
        CHECK_TEXT(err.msg, "memory");
        continue;
      }
      CHECK_THAT(status == MS_OK, "R=%d E=%d F=%d, try %d: %s", sizes[i].R, sizes[i].E,
                 (int)sizes[i].F, t, err.msg);
      CHECK_THAT(proven, "R=%d E=%d F=%d, try %d is not proven", sizes[i].R, sizes[i].E,
                 (int)sizes[i].F, t);
      CHECK_OK(ms_plan_check(&plan, &err), err);
      double total = cost_of(&s, &plan, NULL).total;
      CHECK_NEAR(total, found[chosen].cost.total);
      CHECK_THAT(fabs(total - best) <= 1e-9 * best,
                 "R=%d E=%d F=%d, try %d: the search takes %.9g, the best table %.9g", sizes[i].R,
                 sizes[i].E, (int)sizes[i].F, t, total, best);
      if (found[chosen].kind == MS_LAYOUT_MIXED)
        fancy++;
      else
        simple++;
      ms_plan_free(&plan);
    }
  CHECK_THAT(simple > 3 && fancy > 3, "%d simple layouts and %d mixed ones", simple, fancy);
}

static void larger_searches_give_valid_tables_that_fit(void) {
  for (int t = 0; t < 12; t++) {
    const int32_t sizes[][2] = {{4, 16}, {6, 10}, {16, 64}, {8, 5}};
    int32_t R = sizes[t % 4][0], E = sizes[t % 4][1];
    scene s;
    random_scene(&s, R, E, 37);
    for (int32_t r = 0; r < R; r++)
      s.memory[r] = 2.0 * 8 * 37 * 4 * E * random_between(0.3, 1) * 3 / R;
    ms_plan plan;
    ms_candidate found[MS_CANDIDATES];
    int32_t count, chosen;
    double memory[MOST_RANKS];
    ms_error err;
    ms_status status =
        ms_plan_search(&s.cluster, &s.layer, ~0u, &plan, found, &count, &chosen, NULL, &err);
    if (status == MS_ERANGE) continue;
    CHECK_OK(status, err);
    CHECK_OK(ms_plan_check(&plan, &err), err);
    ms_cost cost = cost_of(&s, &plan, &(ms_rank_costs){.memory = memory});
    CHECK_NEAR(cost.total, found[chosen].cost.total);
    for (int32_t r = 0; r < R; r++) CHECK(memory[r] <= s.memory[r]);
    for (int32_t i = 0; i < count; i++)
      CHECK(!found[i].fits || found[i].cost.total >= found[chosen].cost.total);
    ms_plan_free(&plan);
  }
}

static void widths_follow_speed_until_ranks_are_done_together(void) {
  scene s;
  plain(&s, 3, 8, 300, 1);
  s.flops[1] = 3e9;
  s.flops[2] = 0.5e9;
  ms_plan plan;
  ms_candidate found[MS_CANDIDATES];
  int32_t count, chosen;
  ms_error err;
  CHECK_OK(ms_plan_search(&s.cluster, &s.layer, 1u << MS_LAYOUT_UNEVEN, &plan, found, &count,
                          &chosen, NULL, &err),
           err);
  double ffn[3];
  cost_of(&s, &plan, &(ms_rank_costs){.ffn = ffn});
  CHECK_THAT(fabs(ffn[0] / ffn[1] - 1) < 0.02 && fabs(ffn[0] / ffn[2] - 1) < 0.02, "%g, %g, %g s",
             ffn[0], ffn[1], ffn[2]);
  ms_plan_free(&plan);
}

static void speed_is_that_of_memory_where_memory_is_the_limit(void) {
  scene s;
  plain(&s, 2, 8, 300, 1);
  s.flops[0] = s.flops[1] = 1e15;
  s.bandwidth[1] = 3e9;
  ms_plan plan;
  ms_candidate found[MS_CANDIDATES];
  int32_t count, chosen;
  ms_error err;
  CHECK_OK(ms_plan_search(&s.cluster, &s.layer, 1u << MS_LAYOUT_UNEVEN, &plan, found, &count,
                          &chosen, NULL, &err),
           err);
  CHECK_INT(plan.columns[1] - plan.columns[0], 75); // of rank 0, expert 0: a quarter
  ms_plan_free(&plan);
}

// The rank with the popular expert has no room for others, the balance of work alone would give it one.
static void balanced_owners_respect_memory(void) {
  scene s;
  plain(&s, 2, 4, 16, 1);
  const double load[4] = {60, 50, 50, 40};
  memcpy(s.load, load, sizeof load);
  s.flops[0] = 2e9;
  double expert = 2.0 * 8 * 16 * 4;
  s.memory[0] = 1.5 * expert;
  s.memory[1] = 3 * expert;
  ms_plan plan;
  ms_candidate found[MS_CANDIDATES];
  int32_t count, chosen;
  ms_error err;
  CHECK_OK(ms_plan_search(&s.cluster, &s.layer, 1u << MS_LAYOUT_BALANCED, &plan, found, &count,
                          &chosen, NULL, &err),
           err);
  CHECK(found[chosen].fits);
  ms_plan_free(&plan);
}

// ---- the simulation -------------------------------------------------------------------------------------

static void simulation_agrees_with_the_prediction_on_average(void) {
  scene s;
  plain(&s, 4, 64, 64, 1);
  s.layer.exact = false;
  for (int r = 0; r < 4; r++) s.tokens[r] = 1000;
  for (int e = 0; e < 64; e++) s.load[e] = 4000.0 / 64;
  ms_error err;
  ms_plan shard, owners;
  CHECK_OK(ms_plan_shard(4, 64, 64, NULL, &shard, &err), err);
  CHECK_OK(ms_plan_expert_parallel(4, 64, 64, NULL, &owners, &err), err);
  const ms_plan *plans[] = {&shard, &owners};
  for (int i = 0; i < 2; i++) {
    double seconds[400], again[400], busy, mean = 0, planned = cost_of(&s, plans[i], NULL).total;
    ms_simulation how = {.steps = 400, .chunks = 1, .slow_factor = 1, .seed = 7};
    CHECK_OK(ms_plan_simulate(plans[i], &s.cluster, &s.layer, &how, seconds, &busy, &err), err);
    CHECK_OK(ms_plan_simulate(plans[i], &s.cluster, &s.layer, &how, again, NULL, &err), err);
    CHECK(memcmp(seconds, again, sizeof seconds) == 0);
    for (int j = 0; j < 400; j++) mean += seconds[j] / 400;
    CHECK_THAT(fabs(mean / planned - 1) < 0.03, "layout %d: %g s on average, planned %g", i, mean,
               planned);
    CHECK(busy > 0 && busy <= 1);
  }
  // Two pieces: the second travels while the first is computed, so that it takes less than one after the other.
  double whole[50], pieces[50], late[50];
  ms_simulation how = {.steps = 50, .chunks = 1, .slow_factor = 1};
  CHECK_OK(ms_plan_simulate(&shard, &s.cluster, &s.layer, &how, whole, NULL, &err), err);
  how.chunks = 4;
  CHECK_OK(ms_plan_simulate(&shard, &s.cluster, &s.layer, &how, pieces, NULL, &err), err);
  CHECK(pieces[0] < whole[0]);
  how = (ms_simulation){.steps = 50, .chunks = 1, .slow_chance = 1, .slow_factor = 2};
  CHECK_OK(ms_plan_simulate(&shard, &s.cluster, &s.layer, &how, late, NULL, &err), err);
  CHECK(late[0] > 1.2 * whole[0]);
  how.jitter = -1;
  CHECK_STATUS(ms_plan_simulate(&shard, &s.cluster, &s.layer, &how, late, NULL, &err), MS_EINVAL,
               err);
  CHECK_TEXT(err.msg, "jitter");
  ms_plan_free(&shard);
  ms_plan_free(&owners);
}

int main(void) {
  check_begin();
  the_steps_are_what_the_comment_says();
  latency_counts_messages();
  latency_of_a_ring_is_that_of_hosts_too();
  ranks_of_a_host_share_its_memory();
  copies_split_tokens_and_keep_them_at_home();
  means_hit_experts_by_chance();
  bad_numbers_are_named();
  search_equals_brute_force();
  larger_searches_give_valid_tables_that_fit();
  widths_follow_speed_until_ranks_are_done_together();
  speed_is_that_of_memory_where_memory_is_the_limit();
  balanced_owners_respect_memory();
  simulation_agrees_with_the_prediction_on_average();
  return check_end("test_plan_cost");
}
