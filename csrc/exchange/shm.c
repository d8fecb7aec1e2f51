// shm.c - gather and combine between ranks of one host, through shared memory (layout: shm.h).
//
// Gather costs one copy of this rank's tokens; peers read them where they lie. Combine reads the partial
// outputs of each peer that computed something of a token of this rank once, where they lie.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "shm.h"

#include <errno.h>
#include <inttypes.h> // PRId64
#include <string.h>
#include <sys/mman.h> // mremap
#include <sys/statvfs.h>
#include <unistd.h>

enum {
  ALIGNMENT = 64,
  GROWTH = 1 << 16,     // zones grow in steps of this many bytes
  ALLOCATION = 4 << 20, // and are allocated in pieces short enough to finish between two signals
};

// ---- zones --------------------------------------------------------------------------------------

// Map what the owner has allocated, if it is more than we have mapped.
static ms_status map_zone(const ms_shm *s, int32_t rank, ms_shm_zone zone, ms_error *err) {
  ms_shm_peer *p = &s->peers[rank];
  int64_t capacity = atomic_load_explicit(&p->control->capacity[zone], memory_order_relaxed);
  if (capacity <= p->mapped[zone]) return MS_OK;
  void *at = p->zone[zone]
                 ? mremap(p->zone[zone], (size_t)p->mapped[zone], (size_t)capacity, MREMAP_MAYMOVE)
                 : mmap(NULL, (size_t)capacity, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd,
                        (zone + 1) * MS_SHM_ZONE_BYTES);
  if (at == MAP_FAILED)
    return ms_fail(err, MS_ENOMEM, "cannot map %" PRId64 " bytes of rank %d's shared memory: %s",
                   capacity, rank, strerror(errno));
  p->zone[zone] = at;
  p->mapped[zone] = capacity;
  return MS_OK;
}

int ms_shm_allocate(int fd, int64_t offset, int64_t bytes) {
  struct statvfs room;
  if (fstatvfs(fd, &room) == 0 && room.f_blocks > 0 && // 0: a tmpfs without a limit
      (uint64_t)bytes > (uint64_t)room.f_bavail * room.f_frsize)
    return ENOSPC;
  int error = 0;
  for (int64_t done = 0; done < bytes && !error; done += ALLOCATION) {
    int64_t piece = bytes - done < ALLOCATION ? bytes - done : ALLOCATION;
    do error = posix_fallocate(fd, offset + done, piece);
    while (error == EINTR);
  }
  // Give back what was taken, for the peers and for a smaller call.
  if (error) fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
  return error;
}

// Make a zone of our own file hold `bytes`.
static ms_status grow_zone(const ms_shm *s, ms_shm_zone zone, int64_t bytes, ms_error *err) {
  ms_shm_peer *p = &s->peers[s->base.rank];
  _Atomic int64_t *published = &p->control->capacity[zone]; // peers read it after our next post
  int64_t capacity = atomic_load_explicit(published, memory_order_relaxed);
  if (bytes > capacity) {
    int64_t room = (bytes + GROWTH - 1) / GROWTH * GROWTH;
    int64_t end = (zone + 1) * MS_SHM_ZONE_BYTES + capacity;
    int error = room > MS_SHM_ZONE_BYTES ? EFBIG : ms_shm_allocate(p->fd, end, room - capacity);
    if (error)
      return ms_fail(err, MS_ENOMEM,
                     "no room in /dev/shm: rank %d needs %" PRId64 " bytes more for its %s (%s); "
                     "pass fewer tokens at once, remove old files there, or enlarge it "
                     "(mount -o remount,size=..., docker run --shm-size)",
                     s->base.rank, room - capacity,
                     zone == MS_SHM_INPUTS ? "tokens" : "partial outputs", strerror(error));
    atomic_store_explicit(published, room, memory_order_relaxed);
  }
  return map_zone(s, s->base.rank, zone, err);
}

typedef struct inputs { // where things lie in MS_SHM_INPUTS, in bytes; hidden at 0
  int64_t expert, weight, end;
} inputs;

static int64_t align(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static inputs inputs_of(const ms_header *h) {
  int64_t slots = h->T * h->K;
  inputs at = {.expert = align(h->T * h->D * ms_dtype_size((ms_dtype)h->dtype))};
  at.weight = align(at.expert + slots * (int64_t)sizeof(int32_t));
  at.end = at.weight + slots * (int64_t)sizeof(float);
  return at;
}

static void copy(void *to, const void *from, int64_t bytes) {
  if (bytes > 0) memcpy(to, from, (size_t)bytes); // empty tensors may be NULL
}

// ---- failing together ---------------------------------------------------------------------------

static ms_status check_usable(const ms_shm *s, ms_error *err) {
  if (s->pid != getpid())
    return ms_fail(err, MS_ECOMM, "this exchange belongs to process %d, not to its forked child %d",
                   (int)s->pid, (int)getpid());
  if (s->broken.code != MS_OK)
    return ms_fail(err, MS_ECOMM, "the exchange is broken, make a new group: %s", s->broken.msg);
  return MS_OK;
}

static ms_status refuse_at(ms_shm *s, ms_shm_meeting at, const char *msg, ms_error *err) {
  ms_fail(&ms_shm_record_of(s, s->base.rank, at)->refusal, MS_EPEER, "rank %d: %s", s->base.rank,
          msg);
  return ms_shm_meet(s, at, err);
}

// The call has failed here for a reason that peers do not know yet: `err`, which stays what it is.
static ms_status fail_at(ms_shm *s, ms_shm_meeting at, const ms_error *err) {
  ms_error ignored; // if peers cannot be told, the exchange is broken, and the next call says so
  refuse_at(s, at, err->msg, &ignored);
  return err->code;
}

static ms_status check_refusals(const ms_shm *s, ms_shm_meeting at, ms_error *err) {
  for (int32_t r = 0; r < s->base.R; r++) {
    const ms_error *refusal = &ms_shm_record_of(s, r, at)->refusal;
    if (refusal->code == MS_OK) continue;
    *err = *refusal;
    return err->code;
  }
  return MS_OK;
}

// All ranks have an out, or none has. The same verdict on every rank.
static ms_status check_combined(const ms_shm *s, ms_error *err) {
  bool in[2][MS_MAX_RANKS] = {{false}};
  char ranks[2][MS_RANK_LIST];
  int32_t count = 0;
  for (int32_t r = 0; r < s->base.R; r++) {
    bool combined = ms_shm_record_of(s, r, MS_SHM_COMBINE)->combined;
    in[combined][r] = true;
    count += combined;
  }
  if (count == 0 || count == s->base.R) return MS_OK;
  for (int side = 0; side < 2; side++) ms_rank_list(in[side], s->base.R, ranks[side]);
  return ms_fail(err, MS_EMISMATCH,
                 "ranks disagree in call %" PRIu64 ": out is given on %s but not on %s",
                 s->base.call, ranks[1], ranks[0]);
}

// ---- gather -------------------------------------------------------------------------------------

// Write our part: a header, and unless all ranks have the same tokens, the tokens and choices.
static ms_status send(const ms_shm *s, const ms_batch *batch, ms_error *err) {
  ms_shm_record *own = ms_shm_record_of(s, s->base.rank, MS_SHM_GATHER);
  own->refusal.code = MS_OK;
  ms_header_fill(batch, s->base.call, &own->header);
  if (batch->replicated) return MS_OK;
  inputs at = inputs_of(&own->header);
  MS_TRY(grow_zone(s, MS_SHM_INPUTS, at.end, err));
  char *to = s->peers[s->base.rank].zone[MS_SHM_INPUTS];
  copy(to, batch->hidden, batch->T * batch->D * ms_dtype_size(batch->dtype));
  if (batch->T * batch->K > 0) {
    copy(to + at.expert, batch->expert, batch->T * batch->K * (int64_t)sizeof(int32_t));
    copy(to + at.weight, batch->weight, batch->T * batch->K * (int64_t)sizeof(float));
  }
  return MS_OK;
}

// Point batch at what all ranks have written.
static ms_status receive(ms_shm *s, ms_batch *batch, ms_error *err) {
  int32_t rank = s->base.rank, R = s->base.R;
  for (int32_t r = 0; r < R; r++) s->tokens[r] = s->headers[r].T;
  MS_TRY(ms_gather_begin(batch, rank, R, s->tokens, !batch->replicated, err));
  MS_TRY(grow_zone(s, MS_SHM_PARTIALS, ms_gather_partial_bytes(batch), err));
  batch->partial = (float *)(void *)s->peers[rank].zone[MS_SHM_PARTIALS];
  if (batch->replicated) {
    ms_gather_rows(batch, 0, batch->hidden);
    batch->all_expert = batch->expert;
    batch->all_weight = batch->weight;
    return MS_OK;
  }
  for (int32_t r = 0; r < R; r++) {
    inputs at = inputs_of(&s->headers[r]);
    int64_t first = batch->first[r] * batch->K, slots = s->tokens[r] * batch->K;
    MS_TRY(map_zone(s, r, MS_SHM_INPUTS, err));
    const char *from = s->peers[r].zone[MS_SHM_INPUTS];
    ms_gather_rows(batch, r, r == rank ? batch->hidden : from);
    if (slots == 0) continue;
    copy(batch->all_expert + first, from + at.expert, slots * (int64_t)sizeof(int32_t));
    copy(batch->all_weight + first, from + at.weight, slots * (int64_t)sizeof(float));
  }
  return MS_OK;
}

static ms_status shm_gather(ms_exchange *x, ms_batch *batch, ms_error *err) {
  ms_shm *s = (ms_shm *)x;
  ms_error local;
  if (!err) err = &local;
  MS_TRY(check_usable(s, err));
  if (send(s, batch, err) != MS_OK) return fail_at(s, MS_SHM_GATHER, err);
  MS_TRY(ms_shm_meet(s, MS_SHM_GATHER, err));
  MS_TRY(check_refusals(s, MS_SHM_GATHER, err));
  for (int32_t r = 0; r < x->R; r++) s->headers[r] = ms_shm_record_of(s, r, MS_SHM_GATHER)->header;
  MS_TRY(ms_header_check(s->headers, x->R, err));
  // From here on the peers are in the call, and meet again at its combine.
  if (receive(s, batch, err) != MS_OK) return fail_at(s, MS_SHM_COMBINE, err);
  s->T = batch->T;
  s->D = batch->D;
  s->N = batch->N;
  return MS_OK;
}

// ---- combine, refuse ----------------------------------------------------------------------------

static ms_status shm_combine(ms_exchange *x, ms_batch *batch, ms_threads *threads, ms_error *err) {
  ms_shm *s = (ms_shm *)x;
  ms_error local;
  if (!err) err = &local;
  MS_TRY(check_usable(s, err));
  if (batch->R != x->R || batch->T != s->T || batch->D != s->D || batch->N != s->N) {
    ms_fail(err, MS_EINVAL, "combine: not the batch that was gathered in call %" PRIu64, x->call);
    return fail_at(s, MS_SHM_COMBINE, err);
  }
  ms_shm_record *own = ms_shm_record_of(s, x->rank, MS_SHM_COMBINE);
  own->refusal.code = MS_OK;
  own->combined = batch->out != NULL;
  MS_TRY(ms_shm_meet(s, MS_SHM_COMBINE, err));
  MS_TRY(check_refusals(s, MS_SHM_COMBINE, err));
  MS_TRY(check_combined(s, err));
  if (!batch->out || batch->N == 0) return MS_OK;
  int64_t skip = batch->replicated ? 0 : batch->first[x->rank] * batch->D;
  for (int32_t r = 0; r < x->R; r++) {
    MS_TRY(map_zone(s, r, MS_SHM_PARTIALS, err));
    s->parts[r] = (const float *)(const void *)s->peers[r].zone[MS_SHM_PARTIALS] + skip;
  }
  return ms_combine_ranks(batch, s->parts, x->R, false, threads, err);
}

static ms_status shm_refuse(ms_exchange *x, const char *msg, ms_error *err) {
  ms_shm *s = (ms_shm *)x;
  ms_error local;
  if (!err) err = &local;
  MS_TRY(check_usable(s, err));
  return refuse_at(s, x->open ? MS_SHM_COMBINE : MS_SHM_GATHER, msg, err);
}

const ms_exchange_ops ms_shm_ops = {"shm", shm_gather, shm_combine, shm_refuse, ms_shm_free};
