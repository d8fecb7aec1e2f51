// shm_meet.c - ranks of one host wait for each other, and notice who has left, died or given up.
//
// A wait spins for a moment, then sleeps in a futex on the awaited peer's stage, and looks round
// every 50 ms. A rank that cannot go on breaks its exchange and says why: its peers fail with the
// same reason at once, instead of waiting until their own timeout.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "shm.h"

#include <inttypes.h>    // PRId64
#include <linux/futex.h> // FUTEX_WAIT, FUTEX_WAKE
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAUSES = 32, PLACE = 64 }; // pauses between two looks at the clock: about 1 us

static const int64_t SPIN_NS = 20 * 1000; // sleeping and waking costs more than that
static const int64_t LOOK_NS = 50 * 1000 * 1000;

int64_t ms_shm_now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

// Every way to return (woken, changed, late, a signal) is followed by another look at the word.
static void futex_wait(_Atomic uint32_t *word, uint32_t seen, int64_t ns) {
  struct timespec limit = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static void pause_briefly(void) {
  for (int i = 0; i < PAUSES; i++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    atomic_signal_fence(memory_order_seq_cst); // keeps the loop
#endif
  }
}

// ---- stages -------------------------------------------------------------------------------------

static ms_shm_control *own_control(const ms_shm *s) { return s->peers[s->base.rank].control; }

static uint32_t stage_of(const ms_shm *s, ms_shm_meeting at) {
  return (uint32_t)(2 * s->base.call + at);
}

ms_shm_record *ms_shm_record_of(const ms_shm *s, int32_t rank, ms_shm_meeting at) {
  return &s->peers[rank].control->records[stage_of(s, at) % 4];
}

static uint32_t load_stage(const ms_shm_peer *p) {
  return atomic_load_explicit(&p->control->stage, memory_order_acquire);
}

static bool reaches(uint32_t stage, uint32_t wanted) {
  return (int32_t)(stage - wanted) >= 0; // also when the word has wrapped round
}

static void place(const ms_shm *s, ms_shm_meeting at, char text[PLACE]) {
  if (s->base.call == 0)
    snprintf(text, PLACE, "while the group was forming");
  else
    snprintf(text, PLACE, "during call %" PRIu64 " (%s)", s->base.call,
             at == MS_SHM_GATHER ? "gather" : "combine");
}

// ---- who is there -------------------------------------------------------------------------------

struct flock ms_shm_lock(short type) {
  return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
}

bool ms_shm_is_alive(const ms_shm *s, const ms_shm_peer *p) {
  if (p->control->pid == s->pid && p->control->pid_space == s->pid_space) return true;
  struct flock probe = ms_shm_lock(F_WRLCK);
  return fcntl(p->fd, F_GETLK, &probe) != 0 || probe.l_type != F_UNLCK;
}

void ms_shm_leave(ms_shm *s) {
  atomic_store_explicit(&own_control(s)->left, MS_SHM_CLOSED, memory_order_release);
  futex_wake(&own_control(s)->stage);
}

ms_status ms_shm_give_up(ms_shm *s, bool relayed, const ms_error *err) {
  s->broken = *err;
  ms_shm_control *own = own_control(s);
  if (own) {
    // Late and mismatched ranks are the same news to everyone. Of anything else peers only need to
    // know that they have lost this rank.
    bool same = err->code == MS_ETIMEOUT || err->code == MS_EMISMATCH;
    own->reason = *err;
    if (!relayed)
      ms_fail(&own->reason, same ? err->code : MS_ELOST, "rank %d gave up: %s", s->base.rank,
              err->msg);
    atomic_store_explicit(&own->left, MS_SHM_GAVE_UP, memory_order_release);
    futex_wake(&own->stage);
  }
  return err->code;
}

// A peer that gave up at this meeting or before, and its reason in err. (One that has posted a
// later stage had met everybody here.)
static ms_status check_quitters(const ms_shm *s, ms_shm_meeting at, ms_error *err) {
  for (int32_t r = 0; r < s->base.R; r++) {
    const ms_shm_peer *p = &s->peers[r];
    if (p->ready &&
        atomic_load_explicit(&p->control->left, memory_order_acquire) == MS_SHM_GAVE_UP &&
        !reaches(load_stage(p), stage_of(s, at) + 1)) {
      *err = p->control->reason;
      return err->code;
    }
  }
  return MS_OK;
}

// A peer that left or died.
static ms_status check_absent(const ms_shm *s, ms_shm_meeting at, bool probe, ms_error *err) {
  char where[PLACE];
  for (int32_t r = 0; r < s->base.R; r++) {
    const ms_shm_peer *p = &s->peers[r];
    if (!p->ready || r == s->base.rank) continue;
    bool dead = probe && !ms_shm_is_alive(s, p); // asked first: leaving comes before dying
    bool left = atomic_load_explicit(&p->control->left, memory_order_acquire) == MS_SHM_CLOSED;
    if (!dead && !left) continue;
    place(s, at, where);
    return ms_fail(err, MS_ELOST, "rank %d (pid %" PRId64 ") %s %s", r, p->control->pid,
                   left ? "left" : "died", where);
  }
  return MS_OK;
}

static ms_status fail_late(const ms_shm *s, ms_shm_meeting at, int32_t awaited, ms_error *err) {
  bool missing[MS_MAX_RANKS];
  char where[PLACE], ranks[MS_RANK_LIST];
  for (int32_t r = 0; r < s->base.R; r++)
    missing[r] =
        awaited < 0 ? !s->peers[r].ready : !reaches(load_stage(&s->peers[r]), stage_of(s, at));
  ms_rank_list(missing, s->base.R, ranks);
  place(s, at, where);
  return ms_fail(err, MS_ETIMEOUT, "%s did not arrive within %g s %s", ranks, s->timeout, where);
}

// ---- waiting ------------------------------------------------------------------------------------

ms_shm_watch ms_shm_watch_from(const ms_shm *s, int64_t start) {
  return (ms_shm_watch){.next = start + LOOK_NS, .deadline = start + s->timeout_ns};
}

ms_status ms_shm_look(ms_shm *s, ms_shm_meeting at, int32_t awaited, ms_shm_watch *watch,
                      ms_error *err) {
  int64_t time = ms_shm_now();
  bool thorough = time >= watch->next;
  if (thorough) watch->next = time + LOOK_NS;
  if (check_quitters(s, at, err) != MS_OK) return ms_shm_give_up(s, true, err);
  if (check_absent(s, at, thorough, err) != MS_OK) {
    // It may have met all here and gone then, as after a last call; so the awaited rank is here.
    bool met = awaited >= 0 && reaches(load_stage(&s->peers[awaited]), stage_of(s, at));
    return met ? MS_OK : ms_shm_give_up(s, false, err);
  }
  if (thorough && s->poll && s->poll(s->poll_context) != 0) {
    char where[PLACE];
    place(s, at, where);
    ms_fail(err, MS_EINTR, "interrupted %s", where);
    return ms_shm_give_up(s, false, err);
  }
  if (time < watch->deadline) return MS_OK;
  fail_late(s, at, awaited, err);
  return ms_shm_give_up(s, false, err);
}

ms_status ms_shm_meet(ms_shm *s, ms_shm_meeting at, ms_error *err) {
  uint32_t wanted = stage_of(s, at), seen;
  atomic_store_explicit(&own_control(s)->stage, wanted, memory_order_release);
  futex_wake(&own_control(s)->stage);
  int64_t start = ms_shm_now();
  ms_shm_watch watch = ms_shm_watch_from(s, start);
  for (int32_t r = 0; r < s->base.R; r++) {
    while (!reaches(seen = load_stage(&s->peers[r]), wanted)) {
      int64_t time = ms_shm_now();
      if (time - start < SPIN_NS) {
        pause_briefly();
        continue;
      }
      int64_t rest = watch.deadline - time;
      if (rest > 0) futex_wait(&s->peers[r].control->stage, seen, rest < LOOK_NS ? rest : LOOK_NS);
      MS_TRY(ms_shm_look(s, at, r, &watch, err));
    }
  }
  // All have come, but some may not have waited for the last: then the call has failed for all.
  return check_quitters(s, at, err) == MS_OK ? MS_OK : ms_shm_give_up(s, true, err);
}
