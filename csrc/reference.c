// reference.c - the slow twins: what a layer means, readable in a minute. For tests.
// SPDX-License-Identifier: Apache-2.0
#include "moeshard.h"

#include <math.h>
#include <stdlib.h>

static double activate(ms_activation activation, double x) {
  const double sqrt_2_over_pi = 0.79788456080286535588;
  switch (activation) {
  case MS_RELU:
    return x > 0 || isnan(x) ? x : 0;
  case MS_GELU:
    return 0.5 * x * erfc(-x * 0.70710678118654752440);
  case MS_GELU_TANH:
    return 0.5 * x * (1 + tanh(sqrt_2_over_pi * (x + 0.044715 * x * x * x)));
  case MS_SILU:
    return x / (1 + exp(-x));
  case MS_CLAMPED_SWIGLU:
    x = x > 7 ? 7 : x;
    return x / (1 + exp(-1.702 * x));
  default:
    return x;
  }
}

// What the activated gate is multiplied by.
static double factor(ms_activation activation, double up) {
  if (activation != MS_CLAMPED_SWIGLU) return up;
  return (up > 7 ? 7 : up < -7 ? -7 : up) + 1;
}

static double dot(const float *a, const float *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
  return sum;
}

void ms_reference_layer(const float *hidden, const int32_t *index, const float *weight, int64_t T,
                        int64_t D, int32_t K, int32_t E, int64_t F, const float *w_in,
                        const float *w_out, const float *b_in, const float *b_out,
                        ms_activation activation, bool gated, double *out) {
  (void)E;
  int64_t rows = gated ? 2 * F : F; // of w_in, per expert
  double *h = malloc((size_t)(F > 0 ? F : 1) * sizeof *h);
  for (int64_t i = 0; i < T * D; i++) out[i] = 0;
  for (int64_t t = 0; t < T && h; t++) {
    const float *x = hidden + t * D;
    for (int32_t j = 0; j < K; j++) {
      int64_t e = index[t * K + j];
      if (e < 0) continue;
      for (int64_t f = 0; f < F; f++) {
        double first =
            dot(x, w_in + (e * rows + f) * D, D) + (b_in ? (double)b_in[e * rows + f] : 0);
        h[f] = activate(activation, first);
        if (gated)
          h[f] *= factor(activation, dot(x, w_in + (e * rows + F + f) * D, D) +
                                         (b_in ? (double)b_in[e * rows + F + f] : 0));
      }
      for (int64_t d = 0; d < D; d++) {
        double y = b_out ? (double)b_out[e * D + d] : 0;
        for (int64_t f = 0; f < F; f++) y += h[f] * (double)w_out[(e * D + d) * F + f];
        out[t * D + d] += (double)weight[t * K + j] * y;
      }
    }
  }
  free(h);
}

void ms_reference_group(const int32_t *index, int64_t slots, int32_t E, int64_t *offset,
                        int32_t *order) {
  int64_t n = 0;
  for (int32_t e = 0; e < E; e++) {
    offset[e] = n;
    for (int64_t s = 0; s < slots; s++)
      if (index[s] == e) order[n++] = (int32_t)s;
  }
  offset[E] = n;
}

void ms_reference_deal(const int32_t *index, const int32_t *home, int64_t slots, int32_t e,
                       int32_t copies, int32_t *copy) {
  int64_t n = 0, dealt[MS_MAX_RANKS] = {0},
          more = 0; // `more` copies have one slot more than the others
  for (int64_t s = 0; s < slots; s++) n += index[s] == e;
  int64_t even = n / copies, extra = n % copies;
  int32_t next = e % copies;
  for (int round = 0; round < 2; round++) // at home, then in turns
    for (int64_t s = 0; s < slots; s++) {
      if (round == 0) copy[s] = -1;
      if (index[s] != e || copy[s] >= 0) continue;
      for (int32_t i = 0; i < copies && copy[s] < 0; i++) {
        int32_t c = round == 0 ? home[s] : (next + i) % copies;
        if (c < 0 || dealt[c] >= even + (more < extra)) continue;
        more += dealt[c] == even;
        dealt[c]++;
        copy[s] = c;
        if (round == 1) next = (c + 1) % copies;
      }
    }
}
