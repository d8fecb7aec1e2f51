// test_route.c - ms_route_top1 against what it means, word for word, on random probabilities, under the sanitizers.
// SPDX-License-Identifier: Apache-2.0
#include "check.h"
#include "moeshard.h"

static uint64_t state = 1;

static int32_t below(int32_t n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int32_t)((state >> 33) % (uint64_t)n);
}

// Few different values, so that there are ties; and NaNs of both signs.
static float some_probability(void) {
  static const float values[] = {0, 0.125f, 0.25f, 0.5f, 1};
  int32_t which = below(60);
  return which == 0 ? NAN : which == 1 ? -NAN : values[below(5)];
}

static int32_t first_of_largest(const float *row, int32_t E) {
  for (int32_t e = 0; e < E; e++)
    if (isnan(row[e])) return e;
  int32_t best = E - 1;
  for (int32_t e = E - 1; e >= 0; e--)
    if (row[e] >= row[best]) best = e;
  return best;
}

static void check_case(int64_t B, int64_t S, int32_t E, int64_t capacity, bool narrow) {
  int64_t T = B * S;
  size_t n = (size_t)(T * E);
  // Of exactly their size, so that the sanitizer sees a step beyond.
  float *p = malloc(n * sizeof *p + 1), *best = malloc((size_t)T * sizeof *best + 1);
  uint16_t *p16 = malloc(n * sizeof *p16 + 1), *best16 = malloc((size_t)T * sizeof *best16 + 1);
  int64_t *mask = malloc(n * sizeof *mask + 1);
  CHECK(p && best && p16 && best16 && mask);
  for (size_t i = 0; i < n; i++) {
    p[i] = some_probability();
    uint32_t bits;
    memcpy(&bits, &p[i], sizeof bits);
    p16[i] = (uint16_t)(bits >> 16); // bfloat16 has these values
    mask[i] = -1;
  }
  ms_error err;
  const void *given = narrow ? (const void *)p16 : p;
  CHECK_OK(ms_route_top1(given, narrow ? MS_BF16 : MS_F32, T, E, S, capacity, mask,
                         narrow ? (void *)best16 : best, &err),
           err);
  for (int64_t b = 0; b < B; b++)
    for (int64_t s = 0; s < S; s++) {
      const float *row = p + (b * S + s) * E;
      int32_t e = first_of_largest(row, E);
      int64_t before = 0; // tokens of the sequence that chose e, kept or not
      for (int64_t t = b * S; t < b * S + s; t++) before += first_of_largest(p + t * E, E) == e;
      for (int32_t i = 0; i < E; i++)
        CHECK_INT(mask[(b * S + s) * E + i], i == e && before < capacity);
      if (narrow)
        CHECK_INT(best16[b * S + s], p16[(b * S + s) * E + e]);
      else
        CHECK(memcmp(&best[b * S + s], &row[e], sizeof *best) == 0);
    }
  free(p), free(p16), free(best), free(best16), free(mask);
}

static void test_choices_are_what_they_mean(void) {
  static const int32_t experts[] = {1, 2, 7, 255, 256, 257, 600};
  for (size_t i = 0; i < sizeof experts / sizeof *experts; i++)
    for (int32_t narrow = 0; narrow < 2; narrow++) {
      check_case(0, 5, experts[i], 1, narrow);
      check_case(1, 1, experts[i], 1, narrow);
      check_case(3, 1 + below(9), experts[i], below(3), narrow);
      check_case(2, 17, experts[i], INT64_MAX, narrow);
      check_case(2, 17, experts[i], -1, narrow);
    }
}

static void test_bad_arguments(void) {
  float p[6] = {0}, best[3];
  int64_t mask[6];
  ms_error err;
  CHECK_STATUS(ms_route_top1(p, MS_F32, 3, 0, 1, 1, mask, best, &err), MS_EINVAL, err);
  CHECK_STATUS(ms_route_top1(p, MS_F32, 3, MS_MAX_EXPERTS + 1, 1, 1, mask, best, &err), MS_EINVAL,
               err);
  CHECK_STATUS(ms_route_top1(p, MS_F32, -1, 2, 1, 1, mask, best, &err), MS_ESHAPE, err);
  CHECK_STATUS(ms_route_top1(p, MS_F32, 3, 2, 2, 1, mask, best, &err), MS_ESHAPE, err);
  CHECK_TEXT(err.msg, "sequence: got 2, which does not divide 3 tokens");
  CHECK_STATUS(ms_route_top1(p, MS_F32, 3, 2, 0, 1, mask, best, &err), MS_ESHAPE, err);
  CHECK_STATUS(ms_route_top1(p, MS_I64, 3, 2, 3, 1, mask, best, &err), MS_EDTYPE, err);
}

int main(void) {
  check_begin();
  test_choices_are_what_they_mean();
  test_bad_arguments();
  return check_end("test_route");
}
