// threads.c - a pool of workers that take units of work from one counter and sleep between calls.
//
// One word, `ticket`, starts a call: workers wait for it to change, spinning for a short while (the steps of
// one layer follow each other within microseconds) and then on a futex, so that no core burns between layers.
// The caller works too. It returns when every unit is finished, not when every worker has woken up: a worker
// that the kernel runs late finds the counter exhausted and costs nothing.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "../moeshard.h"

#include <linux/futex.h> // FUTEX_WAIT_PRIVATE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

// About 20 us of pause instructions: longer than the gap between two steps, shorter than a time slice.
enum { SPINS = 1000 };

struct ms_threads {
  int32_t count;
  pid_t owner;            // of the workers: after fork the child has none
  pthread_mutex_t serial; // one call at a time
  pthread_t *workers;     // [count - 1]
  int32_t started;
  bool stop;

  _Atomic uint32_t ticket;   // changes with each call; futex of the workers
  _Atomic uint32_t sleepers; // workers in the futex
  _Atomic int32_t active;    // workers inside a call
  _Atomic uint32_t finished; // futex of the caller: changes when the last worker leaves

  _Atomic int64_t next; // first unit not handed out
  int64_t units;
  ms_work *work;
  void *context;
};

typedef struct worker_start {
  ms_threads *threads;
  int32_t thread;
} worker_start;

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  atomic_signal_fence(memory_order_seq_cst); // only keeps the loop a loop
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 0x7fffffff, NULL, NULL, 0);
}

static void take_units(ms_threads *p, int32_t thread) {
  for (;;) {
    int64_t unit = atomic_fetch_add_explicit(&p->next, 1, memory_order_acq_rel);
    if (unit >= p->units) return;
    p->work(p->context, unit, thread);
  }
}

static uint32_t wait_for_ticket(ms_threads *p, uint32_t seen) {
  uint32_t ticket;
  for (int spin = 0; spin < SPINS; spin++) {
    ticket = atomic_load_explicit(&p->ticket, memory_order_acquire);
    if (ticket != seen) return ticket;
    relax();
  }
  atomic_fetch_add(&p->sleepers, 1);
  while ((ticket = atomic_load(&p->ticket)) == seen) futex_wait(&p->ticket, seen);
  atomic_fetch_sub(&p->sleepers, 1);
  return ticket;
}

// The caller closes a call by taking `active` from 0 to a large negative number; a worker enters only
// while it is not negative. So a late worker can never touch the next call's fields half written.
enum { CLOSED = -1000000 };

static void *worker_main(void *argument) {
  worker_start start = *(worker_start *)argument;
  free(argument);
  ms_threads *p = start.threads;
  uint32_t seen = 0;
  for (;;) {
    seen = wait_for_ticket(p, seen);
    if (atomic_fetch_add(&p->active, 1) >= 0) {
      if (p->stop) {
        atomic_fetch_sub(&p->active, 1);
        return NULL;
      }
      take_units(p, start.thread);
    }
    if (atomic_fetch_sub(&p->active, 1) == 1) {
      atomic_fetch_add(&p->finished, 1);
      futex_wake(&p->finished);
    }
  }
}

static void open_call(ms_threads *p) {
  // Late workers of the last call may still be inside their +1/-1 on a closed pool: add, do not store.
  atomic_fetch_sub(&p->active, CLOSED);
  atomic_fetch_add(&p->ticket, 1);
  if (atomic_load(&p->sleepers)) futex_wake(&p->ticket);
}

static void close_call(ms_threads *p) {
  for (;;) {
    for (int spin = 0; spin < SPINS; spin++) {
      int32_t none = 0;
      if (atomic_compare_exchange_weak(&p->active, &none, CLOSED)) return;
      relax();
    }
    uint32_t seen = atomic_load(&p->finished);
    if (atomic_load(&p->active) > 0) futex_wait(&p->finished, seen);
  }
}

static void start_workers(ms_threads *p) {
  p->owner = getpid();
  p->started = 0;
  atomic_store(&p->ticket, 0);
  atomic_store(&p->sleepers, 0);
  atomic_store(&p->active, CLOSED);
  for (int32_t i = 0; i + 1 < p->count; i++) {
    worker_start *start = malloc(sizeof *start);
    if (!start) break;
    *start = (worker_start){p, i + 1};
    // Fewer workers than asked (a process limit) only make it slower: the caller takes all units.
    if (pthread_create(&p->workers[i], NULL, worker_main, start) != 0) {
      free(start);
      break;
    }
    p->started++;
  }
}

ms_status ms_threads_create(int32_t count, ms_threads **out, ms_error *err) {
  *out = NULL;
  if (count < 1 || count > 4096)
    return ms_fail(err, MS_EINVAL, "threads: got %d, expected 1 to 4096", count);
  ms_threads *p = calloc(1, sizeof *p);
  pthread_t *workers = calloc((size_t)count, sizeof *workers);
  if (!p || !workers) {
    free(p);
    free(workers);
    return ms_fail(err, MS_ENOMEM, "no memory for %d threads", count);
  }
  p->count = count;
  p->workers = workers;
  pthread_mutex_init(&p->serial, NULL);
  start_workers(p);
  *out = p;
  return MS_OK;
}

void ms_threads_free(ms_threads *p) {
  if (!p) return;
  if (p->owner == getpid() && p->started) {
    p->stop = true;
    open_call(p);
    for (int32_t i = 0; i < p->started; i++) pthread_join(p->workers[i], NULL);
  }
  pthread_mutex_destroy(&p->serial);
  free(p->workers);
  free(p);
}

int32_t ms_threads_count(const ms_threads *p) { return p ? p->count : 1; }

void ms_threads_run(ms_threads *p, int64_t units, ms_work *work, void *context) {
  if (!p || p->count == 1 || units <= 1) {
    for (int64_t unit = 0; unit < units; unit++) work(context, unit, 0);
    return;
  }
  if (p->owner != getpid()) { // forked: the workers stayed behind, and so may a held lock
    pthread_mutex_init(&p->serial, NULL);
    start_workers(p);
  }
  pthread_mutex_lock(&p->serial);
  p->units = units;
  p->work = work;
  p->context = context;
  atomic_store(&p->next, 0);
  open_call(p);
  take_units(p, 0);
  close_call(p);
  pthread_mutex_unlock(&p->serial);
}
