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
  ms_hops_free(NULL);
}

int main(void) {
  check_begin();
  random_cases_keep_their_promises();
  bad_arguments_are_refused();
  return check_end("test_placement");
}
