// test_threads.c - the pool runs each unit once, survives fork, serialises callers and sleeps when idle.
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "check.h"
#include "moeshard.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { UNITS = 1000 };

typedef struct tally {
  _Atomic int32_t runs[UNITS];
  _Atomic int32_t bad_thread;
  int32_t threads;
} tally;

static void count_unit(void *context, int64_t unit, int32_t thread) {
  tally *t = context;
  atomic_fetch_add(&t->runs[unit], 1);
  if (thread < 0 || thread >= t->threads) atomic_fetch_add(&t->bad_thread, 1);
}

static void run_and_check(ms_threads *threads, int64_t units, int32_t calls) {
  tally *t = calloc(1, sizeof *t);
  t->threads = ms_threads_count(threads);
  for (int32_t i = 0; i < calls; i++) ms_threads_run(threads, units, count_unit, t);
  int32_t wrong = 0;
  for (int64_t u = 0; u < UNITS; u++) wrong += t->runs[u] != (u < units ? calls : 0);
  CHECK(wrong == 0 && t->bad_thread == 0);
  free(t);
}

static void every_unit_runs_once(void) {
  ms_error err;
  for (int32_t count = 1; count <= 5; count++) {
    ms_threads *threads;
    CHECK(ms_threads_create(count, &threads, &err) == MS_OK);
    CHECK(ms_threads_count(threads) == count);
    run_and_check(threads, 0, 3);
    run_and_check(threads, 1, 3);
    run_and_check(threads, 2, 200);
    run_and_check(threads, UNITS, 50);
    ms_threads_free(threads);
  }
  run_and_check(NULL, 10, 2);
}

static void *call_from_thread(void *threads) {
  run_and_check(threads, 100, 100);
  return NULL;
}

static void concurrent_callers_are_serialised(void) {
  ms_error err;
  ms_threads *threads;
  CHECK(ms_threads_create(3, &threads, &err) == MS_OK);
  pthread_t callers[4];
  for (int i = 0; i < 4; i++) pthread_create(&callers[i], NULL, call_from_thread, threads);
  for (int i = 0; i < 4; i++) pthread_join(callers[i], NULL);
  ms_threads_free(threads);
}

static void a_forked_child_gets_its_own_workers(void) {
  ms_error err;
  ms_threads *threads;
  CHECK(ms_threads_create(3, &threads, &err) == MS_OK);
  run_and_check(threads, UNITS, 2);
  pid_t child = fork();
  if (child == 0) {
    alarm(20);
    run_and_check(threads, UNITS, 10);
    ms_threads_free(threads);
    _exit(0);
  }
  check_children(&child, 1, -1, 0);
  run_and_check(threads, UNITS, 2);
  ms_threads_free(threads);
}

static double cpu_seconds(void) {
  struct rusage use;
  getrusage(RUSAGE_SELF, &use);
  return (double)use.ru_utime.tv_sec + (double)use.ru_stime.tv_sec +
         1e-6 * (double)(use.ru_utime.tv_usec + use.ru_stime.tv_usec);
}

static void idle_workers_burn_no_core(void) {
  ms_error err;
  ms_threads *threads;
  CHECK(ms_threads_create(4, &threads, &err) == MS_OK);
  run_and_check(threads, UNITS, 5);
  usleep(50000); // past the spin
  double before = cpu_seconds();
  usleep(500000);
  double used = cpu_seconds() - before;
  CHECK(used < 0.05);
  ms_threads_free(threads);
}

static void bad_counts_are_refused(void) {
  ms_error err;
  ms_threads *threads;
  CHECK(ms_threads_create(0, &threads, &err) == MS_EINVAL && threads == NULL &&
        strstr(err.msg, "got 0"));
  CHECK(ms_threads_create(5000, &threads, &err) == MS_EINVAL);
  ms_threads_free(NULL);
}

int main(void) {
  check_begin();
  every_unit_runs_once();
  concurrent_callers_are_serialised();
#ifndef __SANITIZE_THREAD__ // TSan does not support threads started after fork
  a_forked_child_gets_its_own_workers();
#endif
  idle_workers_burn_no_core();
  bad_counts_are_refused();
  return check_end("test_threads");
}
