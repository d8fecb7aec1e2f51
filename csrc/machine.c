// machine.c - what this machine can do at most: the denominators of every claim about speed.
//
// The kernels' own instruction set in loops that touch registers only, and reads from memory in as many streams as the
// kernels use. All threads of the pool run at once, on small units from the pool's counter: the figure is the work of
// all of them over the time until the last is done. Of several passes the best counts, since a limit is what can be
// reached: a neighbour on the same machine takes away, never adds.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "base/memory.h"
#include "kernels/kernels.h"

#include <string.h>
#include <time.h>

enum {
  PEAK_ROUNDS = 20000, // of a unit: some 100 us
  PEAK_UNITS = 16,     // a thread
  READ_BYTES = 4 << 20 // of a unit
};

// More than any last-level cache that one process has to itself.
static const int64_t POOL_BYTES = INT64_C(256) << 20;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct limit_work {
  const ms_kernels *kernels;
  char *pool;
} limit_work;

static void run_fma(void *context, int64_t unit, int32_t thread) {
  (void)unit, (void)thread;
  ((const limit_work *)context)->kernels->peak_fma(PEAK_ROUNDS);
}

static void run_dot(void *context, int64_t unit, int32_t thread) {
  (void)unit, (void)thread;
  ((const limit_work *)context)->kernels->peak_dot(PEAK_ROUNDS);
}

static void run_touch(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  memset(((const limit_work *)context)->pool + unit * READ_BYTES, 1, READ_BYTES);
}

static void run_read(void *context, int64_t unit, int32_t thread) {
  (void)thread;
  const limit_work *work = context;
  work->kernels->read(work->pool + unit * READ_BYTES, READ_BYTES);
}

// Best rate of passes over `units`, each worth `worth`, for about `seconds`, at least three.
static double best_rate(ms_threads *threads, int64_t units, ms_work *work, limit_work *context,
                        double worth, double seconds) {
  double best = 0, end = now() + seconds;
  for (int pass = 0; pass < 3 || now() < end; pass++) {
    double start = now();
    ms_threads_run(threads, units, work, context);
    double rate = (double)units * worth / (now() - start);
    if (rate > best) best = rate;
  }
  return best;
}

ms_status ms_machine_measure(ms_threads *threads, double seconds, ms_machine *out, ms_error *err) {
  *out = (ms_machine){0};
  if (!(seconds >= 0 && seconds <= 60))
    return ms_fail(err, MS_EINVAL, "seconds: got %g, expected 0 to 60", seconds);
  limit_work work = {.kernels = ms_kernels_get()};
  void *pool;
  MS_TRY(ms_pages_alloc(POOL_BYTES, "measuring memory bandwidth", &pool, err));
  work.pool = pool;
  int64_t pieces = POOL_BYTES / READ_BYTES, units = ms_threads_count(threads) * PEAK_UNITS;
  ms_threads_run(threads, pieces, run_touch, &work); // memory nobody wrote is one shared page
  out->bytes = best_rate(threads, pieces, run_read, &work, READ_BYTES, seconds / 2);
  double flops = (double)work.kernels->peak_fma(0) * PEAK_ROUNDS;
  out->flops = best_rate(threads, units, run_fma, &work, flops, seconds / 4);
  if (work.kernels->peak_dot) {
    flops = (double)work.kernels->peak_dot(0) * PEAK_ROUNDS;
    out->dot_flops = best_rate(threads, units, run_dot, &work, flops, seconds / 4);
  }
  ms_pages_free(pool, POOL_BYTES);
  return MS_OK;
}
