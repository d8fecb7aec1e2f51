// shm.c - the exchange of ranks on one host: POSIX shared memory and futexes.
//
// Each rank owns one file, /moeshard-<name>-<rank>, and writes to no other (but see `told`). Peers map it and read:
//
//   offset 0      control page: who the rank is, how far it has come, the header of its call
//   offset 1 TiB  inputs:   hidden [T, D], index [T, K], weight [T, K] of this rank
//   offset 2 TiB  partials: this rank's partial outputs [N, D] for the tokens of all ranks
//
// The zones lie far apart in a sparse file, so that each can grow where it is. The owner allocates pages before
// anyone touches them: a full /dev/shm is an error message, not SIGBUS.
//
// One word per rank tells how far it has come: `stage` = 2 * call when its inputs are written, 2 * call + 1 when
// its partials are (call 0: 1 when it has mapped all peers). A rank posts its stage, then waits until every peer
// has posted the same or a later one. Why nothing is overwritten that a peer still reads:
//   inputs of call n    are read until the reader posts its combine of n; the owner returns from combine n, and so
//                       comes to write inputs n + 1, only after all have posted that.
//   partials of call n  are read until the reader posts its gather of n + 1; the owner's ffn n + 1 writes them only
//                       after its gather n + 1, which waits for that.
//   headers, refusals   are read between two posts of the reader. They alternate between four records (stage % 4),
//                       and no rank can be more than one post ahead of another: even a call that ends at its
//                       gather, because headers differ or a rank refused, needs no closing barrier.
//
// A dead peer: each rank holds a POSIX record lock on its file. The kernel drops it when the process dies, also as
// a zombie, and a forked child does not inherit it. Waiters probe it with F_GETLK every 50 ms. Such a lock belongs
// to the process, which loses it when it closes any descriptor of the file: descriptors stay open until the end,
// and ranks that are threads of one process do not probe each other.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "exchange.h"

#include <errno.h>
#include <fcntl.h> // record locks, fallocate(FALLOC_FL_PUNCH_HOLE)
#include <inttypes.h>
#include <linux/futex.h> // FUTEX_WAIT, FUTEX_WAKE
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h> // RLIMIT_FSIZE
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
  MESSAGE = 480,         // of a refusal
  NAME = 200,            // of a group, so that the file name stays under 255
  PATH = NAME + 32,
  CONTROL_BYTES = 8192,
  GROWTH = 1 << 16,      // zones grow in steps of this many bytes
  ALLOCATION = 4 << 20,  // and are allocated in pieces short enough to finish between two signals
  PAUSES = 32,           // between two looks at the clock: about 1 us
  ALIGNMENT = 64,
};
#define ZONE_BYTES ((int64_t)1 << 40)
#define MAGIC 0x6d6f6573'0001u

static const int64_t SPIN_NS = 20 * 1000;         // a step's jitter between ranks; sleeping and waking costs 50 us
static const int64_t LOOK_NS = 50 * 1000 * 1000;  // between two looks for signals and dead peers
static const int64_t MEET_NS = 1000 * 1000;       // between two looks for a peer's file
