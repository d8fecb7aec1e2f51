// nccl.c - ms_cuda_exchange over NCCL: a non-blocking communicator, and the thread that watches it.
//
// The host never waits for the device here. What ends is seen through two events: `oldest` was recorded after the
// collective that is being watched, the other one after the newest of all; when the first is done the second takes its
// place. So a collective that never ends is always seen, however far the host has run ahead.
//
// One lock covers every call of NCCL, since its communicators are for one thread at a time; calls only enqueue. The
// one that may take long, the first collective (it connects the ranks), waits with the watchdog's own rule.
//
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE // pthread_setname_np
#include "nccl.h"

#include "../status.h"
#include "nccl_library.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { POLL_MS = 2, WATCH_MS = 100, POLLS_PER_CALLBACK = 25 };
static const double goodbye =
    5.0; // seconds that free waits at most for ranks that are still in a collective

typedef struct nccl_exchange {
  ms_cuda_exchange base;
  nccl_library nccl;
  double timeout;
  ms_poll *poll;
  void *poll_context;

  pthread_mutex_t lock; // of what follows, and round every call of NCCL
  nccl_comm comm;       // NULL: aborted, or not there yet
  ms_error broken;      // why it was aborted; MS_OK: it was not
  cudaEvent_t event[2];
  int oldest, pending; // events that are recorded and were not seen done: 0, 1 or both
  double since;        // when the oldest pending one came to be the oldest

  pthread_t watchdog;
  pthread_cond_t wake;
  bool watched, stop;
} nccl_exchange;

static nccl_exchange *as_nccl(ms_cuda_exchange *base) { return (nccl_exchange *)base; }

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- failure ------------------------------------------------------------------------------------

static ms_status nccl_failed(const nccl_library *nccl, nccl_comm comm, const char *call, int result,
                             ms_error *err) {
  const char *more = nccl->get_last_error(comm);
  ms_status code = result == NCCL_REMOTE_ERROR ? MS_ELOST
                   : result == NCCL_TIMEOUT    ? MS_ETIMEOUT
                                               : MS_ECOMM;
  return ms_fail(err, code, "%s: %s (%d)%s%s", call, nccl->get_error_string(result), result,
                 more && *more ? ": " : "", more ? more : "");
}

// Abort the communicator for the reason in err, which every later call gets too. Locked.
static ms_status give_up(nccl_exchange *x, const ms_error *err) {
  x->broken = *err;
  x->pending = 0;
  if (x->comm) x->nccl.comm_abort(x->comm); // whatever it says, there is nothing else to do
  x->comm = NULL;
  return err->code;
}

static ms_status still_good(const nccl_exchange *x, ms_error *err) {
  return x->comm ? MS_OK : ms_fail(err, x->broken.code, "%s", x->broken.msg);
}

// What became of a call that returned `result`: wait while it is in progress. The communicator is given up when it
// failed, took too long or was interrupted. Locked.
static ms_status settle(nccl_exchange *x, const char *call, int result, ms_error *err) {
  double start = now();
  for (int turn = 1; result == NCCL_IN_PROGRESS; turn++) {
    if (now() - start > x->timeout) {
      ms_fail(err, MS_ETIMEOUT, "%s: not all of %d ranks came within %g s (this is rank %d)", call,
              x->base.R, x->timeout, x->base.rank);
      return give_up(x, err);
    }
    if (turn % POLLS_PER_CALLBACK == 0 && x->poll && x->poll(x->poll_context)) {
      ms_fail(err, MS_EINTR, "%s: interrupted", call);
      return give_up(x, err);
    }
    nanosleep(&(struct timespec){.tv_nsec = POLL_MS * 1000000L}, NULL);
    int asked = x->nccl.comm_get_async_error(x->comm, &result);
    if (asked != NCCL_SUCCESS) result = asked;
  }
  if (result == NCCL_SUCCESS) return MS_OK;
  nccl_failed(&x->nccl, x->comm, call, result, err);
  return give_up(x, err);
}

// Errors that NCCL found by itself, between calls. Locked.
static ms_status asynchronous(nccl_exchange *x, ms_error *err) {
  int result = NCCL_SUCCESS;
  int asked = x->nccl.comm_get_async_error(x->comm, &result);
  if (asked != NCCL_SUCCESS) result = asked;
  if (result == NCCL_SUCCESS || result == NCCL_IN_PROGRESS) return MS_OK;
  nccl_failed(&x->nccl, x->comm, "ncclCommGetAsyncError", result, err);
  return give_up(x, err);
}

// A call of the CUDA runtime failed: because a collective did, if NCCL knows of one. Locked.
static ms_status cuda_failed(nccl_exchange *x, cudaError_t error, const char *call, ms_error *err) {
  ms_status status = asynchronous(x, err);
  if (status != MS_OK) return status;
  ms_cuda_status(error, call, err);
  return give_up(x, err);
}

// ---- watching -----------------------------------------------------------------------------------

// Watch what was just enqueued on `stream`. In a stream that is being captured nothing runs, so nothing is late.
// Locked.
static ms_status mark(nccl_exchange *x, cudaStream_t stream, ms_error *err) {
  enum cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &capturing);
  if (error == cudaSuccess && capturing == cudaStreamCaptureStatusNone) {
    if (x->pending == 0) x->since = now();
    if (x->pending < 2) x->pending++; // else the newest is recorded anew: a later end
    error = cudaEventRecord(x->event[(x->oldest + x->pending - 1) % 2], stream);
  }
  return error == cudaSuccess ? MS_OK : cuda_failed(x, error, "cudaEventRecord", err);
}

// Locked.
static void look(nccl_exchange *x) {
  ms_error err;
  if (!x->comm || asynchronous(x, &err) != MS_OK) return;
  cudaError_t error = cudaSuccess;
  while (x->pending && (error = cudaEventQuery(x->event[x->oldest])) == cudaSuccess) {
    x->oldest = 1 - x->oldest;
    x->pending--;
    x->since = now();
  }
  if (!x->pending) return;
  if (error != cudaErrorNotReady) {
    cuda_failed(x, error, "cudaEventQuery", &err);
  } else if (now() - x->since > x->timeout) {
    ms_fail(&err, MS_ETIMEOUT,
            "rank %d of %d: a collective did not end within %g s, so a rank died, is late or "
            "called something else; "
            "what its forward wrote is not valid",
            x->base.rank, x->base.R, x->timeout);
    give_up(x, &err);
  }
}

static void *watch(void *exchange) {
  nccl_exchange *x = exchange;
  cudaSetDevice(x->base.device);
  // Asking after an event must not break a capture that another thread is in.
  enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  pthread_mutex_lock(&x->lock);
  while (!x->stop) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += WATCH_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_cond_timedwait(&x->wake, &x->lock, &until);
    if (!x->stop) look(x);
  }
  pthread_mutex_unlock(&x->lock);
  return NULL;
}

static ms_status start_watchdog(nccl_exchange *x, ms_error *err) {
  for (int i = 0; i < 2; i++) {
    cudaError_t error = cudaEventCreateWithFlags(&x->event[i], cudaEventDisableTiming);
    if (error != cudaSuccess) return ms_cuda_status(error, "cudaEventCreate", err);
  }
  if (pthread_create(&x->watchdog, NULL, watch, x) != 0)
    return ms_fail(err, MS_ENOMEM, "nccl: cannot start the thread that watches the other ranks");
  pthread_setname_np(x->watchdog, "moeshard-nccl");
  x->watched = true;
  return MS_OK;
}

// ---- the exchange -------------------------------------------------------------------------------

static ms_status all_gather(ms_cuda_exchange *base, const void *send, void *receive, int64_t bytes,
                            void *stream, ms_error *err) {
  nccl_exchange *x = as_nccl(base);
  pthread_mutex_lock(&x->lock);
  ms_status status = still_good(x, err);
  if (status == MS_OK)
    status =
        settle(x, "ncclAllGather",
               x->nccl.all_gather(send, receive, (size_t)bytes, NCCL_UINT8, x->comm, stream), err);
  pthread_mutex_unlock(&x->lock);
  return status;
}

static ms_status reduce_scatter(ms_cuda_exchange *base, const float *send, float *receive,
                                int64_t count, void *stream, ms_error *err) {
  nccl_exchange *x = as_nccl(base);
  pthread_mutex_lock(&x->lock);
  ms_status status = still_good(x, err);
  if (status == MS_OK)
    status = settle(x, "ncclReduceScatter",
                    x->nccl.reduce_scatter(send, receive, (size_t)count, NCCL_FLOAT32, NCCL_SUM,
                                           x->comm, stream),
                    err);
  if (status == MS_OK) status = mark(x, stream, err); // it ends after the all_gather of its chunk
  pthread_mutex_unlock(&x->lock);
  return status;
}

static ms_status all_reduce(ms_cuda_exchange *base, float *sums, int64_t count, void *stream,
                            ms_error *err) {
  nccl_exchange *x = as_nccl(base);
  pthread_mutex_lock(&x->lock);
  ms_status status = still_good(x, err);
  if (status == MS_OK)
    status = settle(
        x, "ncclAllReduce",
        x->nccl.all_reduce(sums, sums, (size_t)count, NCCL_FLOAT32, NCCL_SUM, x->comm, stream),
        err);
  if (status == MS_OK) status = mark(x, stream, err);
  pthread_mutex_unlock(&x->lock);
  return status;
}

static ms_status check(ms_cuda_exchange *base, ms_error *err) {
  nccl_exchange *x = as_nccl(base);
  pthread_mutex_lock(&x->lock);
  ms_status status = still_good(x, err);
  if (status == MS_OK) status = asynchronous(x, err);
  pthread_mutex_unlock(&x->lock);
  return status;
}

static void free_nccl(ms_cuda_exchange *base) {
  nccl_exchange *x = as_nccl(base);
  if (x->watched) {
    pthread_mutex_lock(&x->lock);
    x->stop = true;
    pthread_cond_signal(&x->wake);
    pthread_mutex_unlock(&x->lock);
    pthread_join(x->watchdog, NULL);
  }
  if (x->comm) { // others may still be in the last collective: wait for them, but not for ever
    ms_error unused;
    x->poll = NULL;
    if (x->timeout > goodbye) x->timeout = goodbye;
    if (settle(x, "ncclCommFinalize", x->nccl.comm_finalize(x->comm), &unused) == MS_OK)
      x->nccl.comm_destroy(x->comm);
  }
  for (int i = 0; i < 2; i++)
    if (x->event[i]) cudaEventDestroy(x->event[i]);
  pthread_cond_destroy(&x->wake);
  pthread_mutex_destroy(&x->lock);
  free(x);
}

void ms_nccl_abort(ms_cuda_exchange *exchange, const char *why) {
  nccl_exchange *x = as_nccl(exchange);
  ms_error err;
  pthread_mutex_lock(&x->lock);
  if (x->comm) {
    ms_fail(&err, MS_ECOMM, "%s", why);
    give_up(x, &err);
  }
  pthread_mutex_unlock(&x->lock);
}

// ---- making one ---------------------------------------------------------------------------------

ms_status ms_nccl_unique_id(const char *const *search, char id[MS_NCCL_ID_BYTES], ms_error *err) {
  nccl_library nccl;
  nccl_id made;
  MS_TRY(nccl_library_load(search, &nccl, err));
  int result = nccl.get_unique_id(&made);
  if (result != NCCL_SUCCESS) return nccl_failed(&nccl, NULL, "ncclGetUniqueId", result, err);
  memcpy(id, made.bytes, sizeof made.bytes);
  return MS_OK;
}

static ms_status create(const char *const *search, int32_t rank, int32_t R, int32_t device,
                        double timeout, nccl_exchange **out, ms_error *err) {
  nccl_library nccl;
  if (R < 1 || R > MS_MAX_RANKS || rank < 0 || rank >= R)
    return ms_fail(err, MS_EINVAL, "nccl: rank %d of %d cannot be", rank, R);
  if (!(timeout > 0))
    return ms_fail(err, MS_EINVAL, "timeout: expected a positive number of seconds, got %g",
                   timeout);
  MS_TRY(nccl_library_load(search, &nccl, err));
  nccl_exchange *x = calloc(1, sizeof *x);
  if (!x) return ms_fail(err, MS_ENOMEM, "nccl: no memory");
  x->base = (ms_cuda_exchange){.rank = rank,
                               .R = R,
                               .device = device,
                               .all_gather = all_gather,
                               .reduce_scatter = reduce_scatter,
                               .all_reduce = all_reduce,
                               .check = check,
                               .free = free_nccl};
  x->nccl = nccl;
  x->timeout = timeout;
  pthread_mutex_init(&x->lock, NULL);
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&x->wake, &monotonic);
  pthread_condattr_destroy(&monotonic);
  *out = x;
  return MS_OK;
}

ms_status ms_cuda_exchange_nccl(const char *const *search, const char id[MS_NCCL_ID_BYTES],
                                int32_t rank, int32_t R, int32_t device, double timeout,
                                ms_poll *poll, void *poll_context, ms_cuda_exchange **out,
                                ms_error *err) {
  *out = NULL;
  nccl_exchange *x = NULL;
  MS_TRY(create(search, rank, R, device, timeout, &x, err));
  x->poll = poll;
  x->poll_context = poll_context;

  int before = 0; // a communicator belongs to the current device
  ms_status status = MS_OK;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    status = ms_cuda_status(error, "cudaSetDevice", err);
  } else {
    nccl_id name;
    memcpy(name.bytes, id, sizeof name.bytes);
    nccl_config config = nccl_config_non_blocking();
    int result = x->nccl.comm_init_rank_config(&x->comm, R, name, rank, &config);
    status = settle(x, "ncclCommInitRankConfig", result, err);
    if (status == MS_OK) status = start_watchdog(x, err);
    cudaSetDevice(before);
  }
  if (status == MS_OK)
    *out = &x->base;
  else
    free_nccl(&x->base);
  return status;
}
