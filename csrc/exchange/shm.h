// shm.h - the exchange of ranks on one host: what lies in shared memory, and who writes what when.
//
//   shm_group.c   forming the group, leaving it
//   shm_meet.c    waiting for each other, who is alive
//   shm.c         gather, combine, refuse
//
// Each rank owns one file, /moeshard-<name>-<rank>, and writes to no other (but see `told`).
// Peers map it and read:
//
//   offset 0      control page: who the rank is, how far it has come, the header of its call
//   offset 1 TiB  inputs:   hidden [T, D], index [T, K], weight [T, K] of this rank
//   offset 2 TiB  partials: this rank's partial outputs [N, D] for the tokens of all ranks
//
// The zones lie far apart in a sparse file, so that each can grow where it is. The owner allocates
// pages before anyone touches them: a full /dev/shm is an error message, not SIGBUS.
//
// One word per rank tells how far it has come: `stage` = 2 * call when its inputs are written, 2 *
// call + 1 when its partials are (call 0: 1 when it has mapped all peers). A rank posts its stage,
// then waits until every peer has posted the same or a later one. Why nothing is overwritten that a
// peer still reads:
//
//   inputs of n    are read until the reader posts its combine of n. The owner writes inputs n + 1
//                  after its combine n, which waits for that.
//   partials of n  are read until the reader posts its gather of n + 1. The owner's ffn of n + 1
//                  writes them after its gather n + 1, which waits for that.
//   records        (header, refusal) are read between two posts of the reader. No rank can be more
//                  than one post ahead of another, and there are four records, taken in turn by
//                  stage. So a call that ends at its gather, because headers differ or a rank
//                  refused, needs no closing barrier.
//
// A dead peer: each rank holds a POSIX record lock on its file. The kernel drops it when the
// process dies, also as a zombie, and a forked child does not inherit it. Waiters probe it with
// F_GETLK every 50 ms. Such a lock belongs to the process, which loses it when it closes any
// descriptor of the file: descriptors stay open until the end, and ranks that are threads of one
// process do not probe each other.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_EXCHANGE_SHM_H
#define MS_EXCHANGE_SHM_H

#include "exchange.h"

#include <fcntl.h> // struct flock
#include <stdatomic.h>
#include <sys/types.h> // pid_t

enum {
  MS_SHM_NAME = 200, // characters of a group's name: the file's name stays under 255
  MS_SHM_CONTROL_BYTES = 8192,
};

// The two points of a call where ranks meet.
typedef enum ms_shm_meeting { MS_SHM_GATHER, MS_SHM_COMBINE } ms_shm_meeting;
typedef enum ms_shm_zone { MS_SHM_INPUTS, MS_SHM_PARTIALS, MS_SHM_ZONES } ms_shm_zone;
enum { MS_SHM_HERE, MS_SHM_CLOSED, MS_SHM_GAVE_UP };

#define MS_SHM_ZONE_BYTES ((int64_t)1 << 40)

typedef struct ms_shm_record { // what a rank says at one meeting
  ms_header header;
  bool combined;    // it has an out, and its partials are there
  ms_error refusal; // code != MS_OK: it does not take part
} ms_shm_record;

typedef struct ms_shm_control {
  _Atomic uint64_t magic; // stored last: the page is complete
  int32_t rank, R;
  int64_t pid;
  uint64_t pid_space;    // containers that share /dev/shm may have equal pids
  _Atomic uint64_t told; // (rank + 1) << 32 | R by a peer that was started with another R

  _Alignas(64) _Atomic uint32_t stage;    // futex of the peers
  _Atomic uint32_t left;                  // MS_SHM_HERE ...; stored after `reason`
  ms_error reason;                        // to have given up, as peers are to report it
  _Atomic int64_t capacity[MS_SHM_ZONES]; // bytes allocated; mapped by peers when they need them
  ms_shm_record records[4];               // of stage % 4
} ms_shm_control;
_Static_assert(sizeof(ms_shm_control) <= MS_SHM_CONTROL_BYTES, "the control page has room");

typedef struct ms_shm_peer { // also this rank itself
  int fd;                    // -1: not opened yet
  bool ready;                // its control page is complete and fits ours
  ms_shm_control *control;
  char *zone[MS_SHM_ZONES];
  int64_t mapped[MS_SHM_ZONES];
} ms_shm_peer;

typedef struct ms_shm {
  ms_exchange base;
  char name[MS_SHM_NAME + 1];
  double timeout;
  int64_t timeout_ns;
  ms_poll *poll;
  void *poll_context;
  pid_t pid;
  uint64_t pid_space;
  bool created;        // our file exists under its name
  ms_error broken;     // code != MS_OK: why no further call is possible
  int64_t T, D, N;     // of the open call
  ms_shm_peer *peers;  // [R]
  ms_header *headers;  // [R]
  int64_t *tokens;     // [R]
  const float **parts; // [R]
} ms_shm;

// shm_meet.c
int64_t ms_shm_now(void); // ns, monotonic
struct flock ms_shm_lock(short type);
bool ms_shm_is_alive(const ms_shm *s, const ms_shm_peer *p);
ms_shm_record *ms_shm_record_of(const ms_shm *s, int32_t rank, ms_shm_meeting at);

// When to look round next, and when to end, while waiting.
typedef struct ms_shm_watch {
  int64_t next, deadline;
} ms_shm_watch;
ms_shm_watch ms_shm_watch_from(const ms_shm *s, int64_t start);

// Post our stage of the present call and wait for all peers to post theirs.
// Errors: MS_ELOST, MS_ETIMEOUT, MS_EINTR; the exchange is broken then.
ms_status ms_shm_meet(ms_shm *s, ms_shm_meeting at, ms_error *err);
// What a waiting rank looks at besides its peers' stages. `awaited` is the peer that it waits for,
// -1 while files of peers are missing. MS_OK: wait on. Errors: as ms_shm_meet.
ms_status ms_shm_look(ms_shm *s, ms_shm_meeting at, int32_t awaited, ms_shm_watch *watch,
                      ms_error *err);
// Break the exchange because of err, here and for the peers. relayed: err is a peer's own reason.
ms_status ms_shm_give_up(ms_shm *s, bool relayed, const ms_error *err);
// Tell peers that no more calls will come.
void ms_shm_leave(ms_shm *s);

// shm.c
extern const ms_exchange_ops ms_shm_ops;
// Allocate pages of a file. Returns 0 or an errno; then nothing more is allocated than before.
int ms_shm_allocate(int fd, int64_t offset, int64_t bytes);

// shm_group.c
void ms_shm_free(ms_exchange *x);

#endif
