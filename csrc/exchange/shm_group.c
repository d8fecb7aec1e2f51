// shm_group.c - ranks of one host form a group through files in /dev/shm, and leave it.
//
// Each rank creates its file, waits for those of its peers, maps them and says so. When all have,
// each unlinks its own file: from then on the memory lives in the mappings alone, and nothing is
// left behind however the ranks end.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "shm.h"

#include <errno.h>
#include <inttypes.h> // PRId64
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>     // shm_open
#include <sys/resource.h> // RLIMIT_FSIZE
#include <sys/stat.h>
#include <time.h> // nanosleep
#include <unistd.h>

enum { PATH = MS_SHM_NAME + 32, NAP_NS = 1000 * 1000 }; // between two looks for peers' files

static const uint64_t MAGIC = 0x6d6f657300000002; // "moes", version of the layout in shm.h

static void file_path(const ms_shm *s, int32_t rank, char path[PATH]) {
  snprintf(path, PATH, "/moeshard-%s-%d", s->name, rank);
}

// inode of the pid namespace, 0 where it cannot be told
static uint64_t own_pid_space(void) {
  struct stat info;
  return stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

static ms_status map_control(ms_shm_peer *p, int32_t rank, ms_error *err) {
  void *at = mmap(NULL, MS_SHM_CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, p->fd, 0);
  if (at == MAP_FAILED)
    return ms_fail(err, MS_ENOMEM, "cannot map rank %d's shared memory: %s", rank, strerror(errno));
  p->control = at;
  return MS_OK;
}

static ms_status create_file(ms_shm *s, ms_error *err) {
  ms_shm_peer *p = &s->peers[s->base.rank];
  char path[PATH];
  file_path(s, s->base.rank, path);
  struct rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 &&
      limit.rlim_cur < (rlim_t)((MS_SHM_ZONES + 1) * MS_SHM_ZONE_BYTES))
    return ms_fail(err, MS_ECOMM, "files are limited to %llu bytes (ulimit -f), expected unlimited",
                   (unsigned long long)limit.rlim_cur);
  p->fd = shm_open(path, O_CREAT | O_EXCL | O_RDWR, 0600); // close-on-exec, follows no link
  if (p->fd < 0 && errno == EEXIST)
    return ms_fail(err, MS_ECOMM,
                   "/dev/shm%s exists: every group needs a new name, and every rank its own number",
                   path);
  if (p->fd < 0)
    return ms_fail(err, errno == ENOSPC ? MS_ENOMEM : MS_ECOMM, "cannot create /dev/shm%s: %s",
                   path, strerror(errno));
  s->created = true;
  struct flock lock = ms_shm_lock(F_WRLCK);
  if (fchmod(p->fd, 0600) != 0 || fcntl(p->fd, F_SETLK, &lock) != 0) // 0600 whatever the umask
    return ms_fail(err, MS_ECOMM, "cannot lock /dev/shm%s: %s", path, strerror(errno));
  int error = ms_shm_allocate(p->fd, 0, MS_SHM_CONTROL_BYTES);
  if (error)
    return ms_fail(err, MS_ENOMEM, "no room in /dev/shm: rank %d needs %d bytes for %s (%s)",
                   s->base.rank, MS_SHM_CONTROL_BYTES, path, strerror(error));
  MS_TRY(map_control(p, s->base.rank, err));
  p->control->rank = s->base.rank;
  p->control->R = s->base.R;
  p->control->pid = s->pid;
  p->control->pid_space = s->pid_space;
  atomic_store_explicit(&p->control->magic, MAGIC, memory_order_release);
  p->ready = true;
  return MS_OK;
}

// The same text on both.
static ms_status fail_count(int32_t a, int32_t ranks_a, int32_t b, int32_t ranks_b, ms_error *err) {
  if (a > b) return fail_count(b, ranks_b, a, ranks_a, err);
  return ms_fail(err, MS_EMISMATCH, "rank %d was started with %d ranks, but rank %d with %d", a,
                 ranks_a, b, ranks_b);
}

// Look once for a peer's file. MS_OK and not p->ready: it is not there, or not complete.
static ms_status find_peer(ms_shm *s, int32_t r, ms_error *err) {
  ms_shm_peer *p = &s->peers[r];
  char path[PATH];
  file_path(s, r, path);
  if (p->fd < 0) p->fd = shm_open(path, O_RDWR, 0);
  if (p->fd < 0 && errno == ENOENT) return MS_OK;
  struct stat info;
  if (p->fd < 0 || fstat(p->fd, &info) != 0)
    return ms_fail(err, MS_ECOMM, "cannot open rank %d's /dev/shm%s: %s", r, path, strerror(errno));
  if (info.st_uid != geteuid())
    return ms_fail(err, MS_ECOMM, "/dev/shm%s belongs to user %u, not to %u", path,
                   (unsigned)info.st_uid, (unsigned)geteuid());
  if (info.st_size < MS_SHM_CONTROL_BYTES) return MS_OK;
  if (!p->control) MS_TRY(map_control(p, r, err));
  uint64_t magic = atomic_load_explicit(&p->control->magic, memory_order_acquire);
  if (magic == 0) return MS_OK;
  if (magic != MAGIC || p->control->rank != r)
    return ms_fail(err, MS_ECOMM,
                   "/dev/shm%s is not rank %d's: another version of moeshard, or another program",
                   path, r);
  if (p->control->R != s->base.R) {
    // It may never see our file, which goes now. The one word that we write into another's file.
    uint64_t told = (uint64_t)(s->base.rank + 1) << 32 | (uint32_t)s->base.R;
    atomic_store_explicit(&p->control->told, told, memory_order_release);
    return fail_count(s->base.rank, s->base.R, r, p->control->R, err);
  }
  p->ready = true;
  return MS_OK;
}

static ms_status find_peers(ms_shm *s, ms_error *err) {
  const struct timespec nap = {.tv_nsec = NAP_NS};
  ms_shm_watch watch = ms_shm_watch_from(s, ms_shm_now());
  for (;;) {
    int32_t missing = 0;
    for (int32_t r = 0; r < s->base.R; r++) {
      if (!s->peers[r].ready) MS_TRY(find_peer(s, r, err));
      missing += !s->peers[r].ready;
    }
    if (missing == 0) return MS_OK;
    uint64_t told =
        atomic_load_explicit(&s->peers[s->base.rank].control->told, memory_order_acquire);
    if (told)
      return fail_count(s->base.rank, s->base.R, (int32_t)(told >> 32) - 1, (int32_t)told, err);
    MS_TRY(ms_shm_look(s, MS_SHM_COMBINE, -1, &watch, err));
    nanosleep(&nap, NULL);
  }
}

// Ours, and if the group did not form, those of ranks that died before they could do this
// themselves.
static void unlink_files(const ms_shm *s, bool formed) {
  char path[PATH];
  for (int32_t r = 0; r < s->base.R; r++) {
    const ms_shm_peer *p = &s->peers[r];
    bool orphan = !formed && p->ready && !ms_shm_is_alive(s, p);
    if (r == s->base.rank ? !s->created : !orphan) continue;
    file_path(s, r, path);
    shm_unlink(path);
  }
}

static ms_status check_arguments(const char *name, int32_t rank, int32_t R, double timeout,
                                 ms_error *err) {
  static const char accepted[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-";
  size_t length = strlen(name);
  if (length == 0 || length > MS_SHM_NAME || strspn(name, accepted) != length)
    return ms_fail(err, MS_EINVAL,
                   "exchange name: got \"%.40s\", expected 1 to %d of A-Z a-z 0-9 -", name,
                   MS_SHM_NAME);
  if (R < 1 || R > MS_MAX_RANKS)
    return ms_fail(err, MS_EINVAL, "ranks: got %d, expected 1 to %d", R, MS_MAX_RANKS);
  if (rank < 0 || rank >= R)
    return ms_fail(err, MS_EINVAL, "rank: got %d, expected 0 to %d", rank, R - 1);
  if (!(timeout > 0))
    return ms_fail(err, MS_EINVAL, "timeout: got %g, expected seconds > 0", timeout);
  return MS_OK;
}

ms_status ms_exchange_shm(const char *name, int32_t rank, int32_t R, double timeout, ms_poll *poll,
                          void *poll_context, ms_exchange **out, ms_error *err) {
  *out = NULL;
  ms_error local;
  if (!err) err = &local;
  MS_TRY(check_arguments(name, rank, R, timeout, err));
  ms_shm *s = calloc(1, sizeof *s);
  if (!s) return ms_fail(err, MS_ENOMEM, "no memory for an exchange");
  ms_status status = MS_OK;
  s->base = (ms_exchange){.ops = &ms_shm_ops, .rank = rank, .R = R};
  memcpy(s->name, name, strlen(name));
  s->timeout = timeout;
  s->timeout_ns = timeout < 1e9 ? (int64_t)(timeout * 1e9) : INT64_MAX / 4;
  s->poll = poll;
  s->poll_context = poll_context;
  s->pid = getpid();
  s->pid_space = own_pid_space();
  s->peers = calloc((size_t)R, sizeof *s->peers);
  s->headers = calloc((size_t)R, sizeof *s->headers);
  s->tokens = calloc((size_t)R, sizeof *s->tokens);
  s->parts = calloc((size_t)R, sizeof *s->parts);
  for (int32_t r = 0; s->peers && r < R; r++) s->peers[r].fd = -1;
  if (!s->peers || !s->headers || !s->tokens || !s->parts) {
    status = ms_fail(err, MS_ENOMEM, "no memory for an exchange of %d ranks", R);
    goto done;
  }
  if ((status = create_file(s, err)) != MS_OK) goto done;
  if ((status = find_peers(s, err)) != MS_OK) goto done;
  status = ms_shm_meet(s, MS_SHM_COMBINE, err); // of call 0
done:
  if (s->peers) unlink_files(s, status == MS_OK);
  if (status != MS_OK) {
    if (s->peers && s->broken.code == MS_OK) ms_shm_give_up(s, false, err);
    ms_shm_free(&s->base);
    return status;
  }
  *out = &s->base;
  return MS_OK;
}

void ms_shm_free(ms_exchange *x) {
  ms_shm *s = (ms_shm *)x;
  bool joined = s->peers && s->peers[x->rank].control && s->broken.code == MS_OK;
  if (joined && s->pid == getpid()) ms_shm_leave(s); // a forked child only drops its own mappings
  for (int32_t r = 0; s->peers && r < x->R; r++) {
    ms_shm_peer *p = &s->peers[r];
    for (int zone = 0; zone < MS_SHM_ZONES; zone++)
      if (p->zone[zone]) munmap(p->zone[zone], (size_t)p->mapped[zone]);
    if (p->control) munmap(p->control, MS_SHM_CONTROL_BYTES);
    if (p->fd >= 0) close(p->fd);
  }
  free(s->parts);
  free(s->tokens);
  free(s->headers);
  free(s->peers);
  free(s);
}
