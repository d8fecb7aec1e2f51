// test_plan.c - every column of every expert has the owners the table declares, whatever the layout.
// SPDX-License-Identifier: Apache-2.0
#include "check.h"
#include "moeshard.h"

#include <math.h>
#include <string.h>

static void layouts_cover_every_column_once(void) {
  const int64_t widths[] = {1, 2, 5, 16, 37, 640, 3072};
  ms_error err;
  for (int32_t R = 1; R <= 7; R++)
    for (int32_t E = 1; E <= 9; E += 2)
      for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        double speed[7];
        for (int32_t r = 0; r < R; r++) speed[r] = 0.3 + r * 1.7;
        ms_plan plan;
        CHECK(ms_plan_shard(R, E, widths[i], NULL, &plan, &err) == MS_OK);
        CHECK(ms_plan_check(&plan, &err) == MS_OK);
        int64_t least = INT64_MAX, most = 0;
        for (int32_t r = 0; r < R; r++) {
          int64_t total = 0;
          for (int32_t e = 0; e < E; e++) {
            int64_t *c = plan.columns + 2 * (r * E + e), width = c[1] - c[0];
            CHECK(width == widths[i] / R || width == widths[i] / R + 1);
            total += width;
          }
          if (total < least) least = total;
          if (total > most) most = total;
        }
        CHECK(most - least <= 1); // the odd columns take turns
        ms_plan_free(&plan);
        CHECK(ms_plan_shard(R, E, widths[i], speed, &plan, &err) == MS_OK);
        CHECK(ms_plan_check(&plan, &err) == MS_OK);
        ms_plan_free(&plan);
        CHECK(ms_plan_expert_parallel(R, E, widths[i], NULL, &plan, &err) == MS_OK);
        CHECK(ms_plan_check(&plan, &err) == MS_OK);
        ms_plan_free(&plan);
        for (int32_t group = 1; group <= R; group++) {
          ms_status status = ms_plan_hybrid(R, E, widths[i], group, &plan, &err);
          CHECK(status == (R % group ? MS_EINVAL : MS_OK));
          if (status == MS_OK) CHECK(ms_plan_check(&plan, &err) == MS_OK);
          ms_plan_free(&plan);
        }
      }
}

static void weighted_widths_follow_speed(void) {
  ms_error err;
  ms_plan plan;
  const double speed[] = {1, 3};
  CHECK(ms_plan_shard(2, 4, 100, speed, &plan, &err) == MS_OK);
  for (int32_t e = 0; e < 4; e++) {
    CHECK(plan.columns[2 * e + 1] - plan.columns[2 * e] == 25);
    CHECK(plan.columns[2 * (4 + e) + 1] - plan.columns[2 * (4 + e)] == 75);
  }
  ms_plan_free(&plan);
}

static void the_checker_finds_gaps_overlaps_and_ranges(void) {
  ms_error err;
  ms_plan plan;
  CHECK(ms_plan_shard(3, 2, 30, NULL, &plan, &err) == MS_OK);
  int64_t *c = plan.columns + 2 * (1 * 2 + 1); // rank 1, expert 1: [10, 20)
  c[0] = 11;
  CHECK(ms_plan_check(&plan, &err) == MS_EINVAL);
  CHECK(strstr(err.msg, "expert 1, columns [10, 11): held by 0 ranks, expected 1") != NULL);
  c[0] = 9;
  CHECK(ms_plan_check(&plan, &err) == MS_EINVAL);
  CHECK(strstr(err.msg, "expert 1, columns [9, 10): held by 2 ranks, expected 1") != NULL);
  c[0] = 21;
  CHECK(ms_plan_check(&plan, &err) == MS_EINVAL);
  CHECK(strstr(err.msg, "columns[rank 1][expert 1]: got [21, 20)") != NULL);
  ms_plan_free(&plan);

  // Replicated and pruned experts are declared in copies.
  CHECK(ms_plan_expert_parallel(2, 2, 8, NULL, &plan, &err) == MS_OK);
  plan.columns[2 * 2 + 1] = 8; // rank 1 holds expert 0 too
  CHECK(ms_plan_check(&plan, &err) == MS_EINVAL);
  plan.copies[0] = 2;
  CHECK(ms_plan_check(&plan, &err) == MS_OK);
  plan.columns[2 * 3 + 1] = 0; // nobody holds expert 1
  CHECK(ms_plan_check(&plan, &err) == MS_EINVAL);
  plan.copies[1] = 0;
  CHECK(ms_plan_check(&plan, &err) == MS_OK);
  ms_plan_free(&plan);
}

static void bad_arguments_are_named(void) {
  ms_error err;
  ms_plan plan;
  CHECK(ms_plan_shard(0, 8, 8, NULL, &plan, &err) == MS_EINVAL && strstr(err.msg, "ranks: got 0"));
  CHECK(ms_plan_shard(2, 0, 8, NULL, &plan, &err) == MS_EINVAL &&
        strstr(err.msg, "num_experts: got 0"));
  CHECK(ms_plan_shard(2, 8, 0, NULL, &plan, &err) == MS_EINVAL && strstr(err.msg, "d_ff: got 0"));
  const double speed[] = {1, NAN};
  CHECK(ms_plan_shard(2, 8, 8, speed, &plan, &err) == MS_EINVAL &&
        strstr(err.msg, "speed[1]: got nan"));
  const int32_t owner[] = {0, 2};
  CHECK(ms_plan_expert_parallel(2, 2, 8, owner, &plan, &err) == MS_EINVAL &&
        strstr(err.msg, "owner[1]: got 2"));
  CHECK(plan.columns == NULL);
  ms_plan_free(&plan); // zeroed is legal
}

static void work_counts_token_columns(void) {
  ms_error err;
  ms_plan plan;
  const int64_t counts[] = {100, 0, 7, 1};
  double work[2];
  CHECK(ms_plan_shard(2, 4, 64, NULL, &plan, &err) == MS_OK);
  ms_plan_work(&plan, counts, work);
  CHECK(work[0] == 108 * 32 && work[1] == 108 * 32);
  ms_plan_free(&plan);
  CHECK(ms_plan_expert_parallel(2, 4, 64, NULL, &plan, &err) == MS_OK);
  ms_plan_work(&plan, counts, work);
  CHECK(work[0] == 100 * 64 && work[1] == 8 * 64);
  ms_plan_free(&plan);
}

int main(void) {
  check_begin();
  layouts_cover_every_column_once();
  weighted_widths_follow_speed();
  the_checker_finds_gaps_overlaps_and_ranges();
  bad_arguments_are_named();
  work_counts_token_columns();
  return check_end("test_plan");
}
