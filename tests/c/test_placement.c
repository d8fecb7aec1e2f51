// test_placement.c - placements of whole experts keep their promises on random cases, under the sanitizers.
// SPDX-License-Identifier: Apache-2.0
#include "check.h"
#include "plan/placement.h"

static uint64_t state = 1;

static int32_t below(int32_t n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int32_t)((state >> 33) % (uint64_t)n);
}

typedef ms_status place(const ms_place_spec *spec, int32_t *owner, ms_error *err);

static ms_status sweep(const ms_place_spec *spec, int32_t *owner, ms_error *err) {
  return ms_place_sweep(spec, 2, 7, owner, err);
}

static int64_t local_hops(const ms_hops *hops, const int32_t *owner, int32_t layer) {
  int64_t local = 0;
  for (int32_t e = 0; e < hops->E; e++) {
    int64_t at = (int64_t)layer * hops->E + e;
    for (int64_t i = hops->next_at[at]; i < hops->next_at[at + 1]; i++) {
      int32_t here = owner[at], there = owner[at + hops->E - e + hops->next[i].expert];
      if (here >= 0 && here == there) local += hops->next[i].count;
    }
  }
  return local;
}

// Sizes, caps and scores of what one way has placed. Returns the local hops of all layers.
static int64_t check_placement(const ms_place_spec *spec, const int32_t *owner, bool capped) {
  int32_t L = spec->L, E = spec->E, R = spec->R;
  ms_error err = {0};
  int64_t *load = malloc((size_t)L * (size_t)R * sizeof *load),
          *cap = malloc((size_t)L * sizeof *cap);
  int64_t *local = malloc((size_t)L * sizeof *local), *most = malloc((size_t)L * sizeof *most);
  int64_t *gap = malloc((size_t)L * sizeof *gap), all = 0;
  double *bound = malloc((size_t)L * sizeof *bound);
  ms_place_score score = {load, bound, cap, local, most, gap};
  CHECK(ms_place_measure(spec, owner, &score, &err) == MS_OK);
  for (int32_t l = 0; l < L; l++) {
    int32_t placed = 0;
    for (int32_t e = 0; e < E; e++) {
      bool apart = spec->apart && spec->apart[l * E + e];
      CHECK(apart ? owner[l * E + e] == -1 : owner[l * E + e] >= 0 && owner[l * E + e] < R);
      placed += !apart;
    }
    for (int32_t r = 0; r < R; r++) {
      int32_t held = 0;
      int64_t slots = 0;
      for (int32_t e = 0; e < E; e++)
        if (owner[l * E + e] == r) held++, slots += spec->counts[l * E + e];
      CHECK(held >= placed / R && held <= (placed + R - 1) / R);
      CHECK_INT(load[l * R + r], slots);
      if (capped) CHECK(slots <= cap[l]);
    }
    CHECK(gap[l] >= 0);
    if (l + 1 == L) continue;
    CHECK_INT(local[l], spec->hops ? local_hops(spec->hops, owner, l) : 0);
    CHECK(local[l] <= most[l]);
    all += local[l];
  }
  free(load), free(cap), free(local), free(most), free(gap), free(bound);
  return all;
}

static void random_cases_keep_their_promises(void) {
  for (int32_t round = 0; round < 60; round++) {
    int32_t L = 1 + below(4), E = 1 + below(9), R = 1 + below(4), T = 1 + below(50),
            K = 1 + below(2);
    size_t cells = (size_t)L * (size_t)E;
    int32_t *path = malloc((size_t)T * (size_t)L * (size_t)K * sizeof *path),
            *owner = malloc(cells * sizeof *owner);
    int64_t *counts = calloc(cells, sizeof *counts);
    uint8_t *apart = calloc(cells, 1);
    for (int32_t i = 0; i < T * L * K; i++) {
      path[i] = below(E + 1) - 1;
      if (path[i] >= 0) counts[i / K % L * E + path[i]]++;
    }
    if (round % 3 == 0)
      for (size_t i = 0; i < cells; i++) apart[i] = (uint8_t)(below(5) == 0);
    ms_error err = {0};
    ms_hops hops;
    CHECK(ms_hops_count(path, T, L, K, E, &hops, &err) == MS_OK);
    ms_place_spec spec = {L,   E, R, counts, round % 5 ? &hops : NULL, round % 3 ? NULL : apart,
                          0.02};
    CHECK(ms_place_contiguous(&spec, owner, &err) == MS_OK);
    check_placement(&spec, owner, false);
    int64_t found[4] = {0};
    place *const ways[] = {ms_place_balanced, ms_place_two_stage, sweep, ms_place_exact};
    for (int32_t way = 0; way < (spec.hops ? 4 : 3); way++) {
      CHECK(ways[way](&spec, owner, &err) == MS_OK);
      found[way] = check_placement(&spec, owner, true);
    }
    if (spec.hops) CHECK(found[1] <= found[2] && found[2] <= found[3]);
    ms_hops_free(&hops);
    free(path), free(owner), free(counts), free(apart);
  }
}

// Owner number `way` of the R^n there are; false: not floor(n/R) or ceil(n/R) items on every rank, or one above the cap.
static bool nth_owner(int64_t way, int32_t n, int32_t R, const int64_t *weight, int64_t cap,
                      int32_t *owner) {
  int64_t load[4] = {0};
  int32_t size[4] = {0};
  for (int32_t i = 0; i < n; i++, way /= R) {
    owner[i] = (int32_t)(way % R);
    load[owner[i]] += weight[i];
    size[owner[i]]++;
  }
  for (int32_t r = 0; r < R; r++)
    if (size[r] < n / R || size[r] > (n + R - 1) / R || load[r] > cap) return false;
  return true;
}

static int64_t ways(int32_t n, int32_t R) {
  int64_t all = 1;
  for (int32_t i = 0; i < n; i++) all *= R;
  return all;
}

// Hops that no token path could make, up to the largest that are taken: a bound that is one short is no bound.
static void gaps_are_bounds_to_the_last_hop(void) {
  for (int32_t round = 0; round < 400; round++) {
    const int32_t E = 3 + below(4), R = 2 + below(3);
    const int64_t most = ((int64_t)1 << (30 + below(24))), slots = ((int64_t)1 << below(40));
    int64_t next_at[7] = {0}, last_at[7] = {0}, counts[12], cap[2], gap[2];
    ms_hop next[36], last[36];
    ms_hops hops = {2, E, 0, next_at, last_at, next, last};
    for (int32_t e = 0; e < E; e++)
      for (int32_t f = 0; f < E; f++) {
        int64_t count = 1 + most / 1000 * below(1000) + below(1000);
        next[e * E + f] = (ms_hop){f, count};
        last[f * E + e] = (ms_hop){e, count};
        next_at[e + 1] = last_at[e + 1] = (e + 1) * (int64_t)E;
        hops.total += count;
      }
    for (int32_t i = 0; i < 2 * E; i++) counts[i] = slots + below(3);
    ms_place_spec spec = {2, E, R, counts, &hops, NULL, 0.02};
    int32_t owner[12], other[12];
    ms_error err = {0};
    ms_place_score score = {.cap = cap, .gap = gap};
    CHECK(ms_place_balanced(&spec, owner, &err) == MS_OK);
    CHECK(ms_place_measure(&spec, owner, &score, &err) == MS_OK);
    const int64_t here = local_hops(&hops, owner, 0);
    for (int32_t l = 0; l < 2; l++)
      for (int64_t way = 0; way < ways(E, R); way++) {
        memcpy(other, owner, sizeof other);
        if (nth_owner(way, E, R, counts + l * E, cap[l], other + l * E))
          CHECK(local_hops(&hops, other, 0) - here <= gap[l]);
      }
  }
}

// The largest costs that are taken, in all signs: no sum overflows (the sanitizer would say so), none beats the total.
static void assignments_are_exact_at_the_limit(void) {
  ms_assigner *assigner = NULL;
  ms_error err = {0};
  CHECK(ms_assigner_create(512, 4, &assigner, &err) == MS_OK);
  int64_t cost[512 * 4], price[5] = {0}, none[7] = {0};
  int32_t owner[512], other[7];
  for (int32_t round = 0; round < 200; round++) {
    const int32_t n = round % 4 ? 1 + below(7) : 512;
    const int64_t most = MS_MAX_COST / n;
    for (int32_t i = 0; i < n * 4; i++)
      cost[i] = (below(2) ? most : most / 3 - below(2)) * (1 - 2 * below(2));
    const int64_t total = ms_assign(assigner, cost, n, price, owner);
    int64_t sum = 0;
    for (int32_t i = 0; i < n; i++) sum += cost[i * 4 + owner[i]];
    CHECK_INT(total, sum);
    for (int64_t way = 0; n <= 7 && way < ways(n, 4); way++) {
      if (!nth_owner(way, n, 4, none, 0, other)) continue;
      sum = 0;
      for (int32_t i = 0; i < n; i++) sum += cost[i * 4 + other[i]];
      CHECK(sum >= total);
    }
  }
  ms_assigner_free(assigner);
}

static void bad_arguments_are_refused(void) {
  ms_error err = {0};
  ms_hops hops;
  int32_t path[] = {0, 4}, owner[4];
  int64_t counts[] = {1, 2, 3, 4};
  CHECK(ms_hops_count(path, 1, 2, 1, 4, &hops, &err) == MS_ERANGE);
  ms_place_spec spec = {1, 4, 0, counts, NULL, NULL, 0.02};
  CHECK(ms_place_balanced(&spec, owner, &err) == MS_EINVAL);
  spec.R = 2;
  spec.slack = -1;
  CHECK(ms_place_balanced(&spec, owner, &err) == MS_EINVAL);
  spec.slack = 0;
  CHECK(ms_place_exact(&spec, owner, &err) == MS_EINVAL);
  CHECK(ms_place_sweep(&spec, 0, 0, owner, &err) == MS_EINVAL);
  int32_t outside[] = {0, 1, 2, 0};
  ms_place_score score = {0};
  CHECK(ms_place_measure(&spec, outside, &score, &err) == MS_EINVAL);
  int64_t row[] = {0, 0, 0, 0, 0};
  ms_hops many = {.L = 2, .E = 4, .total = MS_MAX_COST + 1, .next_at = row, .last_at = row};
  int64_t most[8] = {(int64_t)1 << 44};
  ms_place_spec large = {2, 4, 2, most, &many, NULL, 0.02};
  int32_t placed[8] = {0};
  int64_t gap[2];
  ms_place_score gaps = {.gap = gap};
  CHECK(ms_place_balanced(&large, placed, &err) == MS_ERANGE);
  many.total = 0;
  CHECK(ms_place_sweep(&large, 1, 0, placed, &err) == MS_OK);
  large.R = MS_MAX_RANKS;
  CHECK(ms_place_measure(&large, placed, &gaps, &err) == MS_ERANGE);
  most[0]++;
  CHECK(ms_place_balanced(&large, placed, &err) == MS_ERANGE);
  ms_hops_free(NULL);
}

int main(void) {
  check_begin();
  random_cases_keep_their_promises();
  gaps_are_bounds_to_the_last_hop();
  assignments_are_exact_at_the_limit();
  bad_arguments_are_refused();
  return check_end("test_placement");
}
