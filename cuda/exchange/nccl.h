// nccl.h - the exchange between CUDA devices: an ms_cuda_exchange (moeshard_cuda.h) that NCCL carries.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_CUDA_NCCL_H
#define MS_CUDA_NCCL_H

#include "../moeshard_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MS_NCCL_ID_BYTES = 128 };

// A name for a new communicator: rank 0 makes it and sends it to the others, as bytes. Used once.
//   search  files to look for NCCL in, NULL at the end (borrowed; NULL: none); see nccl_library.h
// Cost: opens a socket, which rank 0 keeps until all are there. Errors: MS_ECOMM.
ms_status ms_nccl_unique_id(const char *const *search, char id[MS_NCCL_ID_BYTES], ms_error *err);

// Meet the other ranks. Collective.
//   device   this rank's CUDA device; two ranks cannot share one
//   timeout  seconds that a rank may be late, here and in every later collective
//   poll     called while this waits for other ranks, about every 50 ms (moeshard.h); NULL: nothing is called
// Every collective is watched by a thread of the exchange. When a rank is lost, NCCL reports it, or the collective does
// not end within `timeout` seconds of its turn; then the communicator is aborted, which ends the kernels that wait on
// the device, so that no stream hangs. A forward that has returned by then cannot raise: what it writes is undefined.
// check() and every later collective return MS_ELOST or MS_ETIMEOUT, again and again; only free is left to do.
// Not to be used, nor freed, in a child after fork: CUDA itself does not survive it.
// Cost: 0.1 to some seconds; one thread that wakes ten times a second; afterwards a collective costs the host its
// enqueueing and an event.
// Errors: MS_EINVAL a rank or timeout that cannot be; MS_ECOMM no NCCL, or its error by name; MS_ECUDA; MS_ETIMEOUT;
// MS_EINTR; MS_ENOMEM.
ms_status ms_cuda_exchange_nccl(const char *const *search, const char id[MS_NCCL_ID_BYTES],
                                int32_t rank, int32_t R, int32_t device, double timeout,
                                ms_poll *poll, void *poll_context, ms_cuda_exchange **out,
                                ms_error *err);

// End what waits for other ranks on the device, because they are known to be lost; check() and every later collective
// return MS_ECOMM with `why`. For exchanges made here. Legal twice, and from any thread.
// Cost: milliseconds; waits for kernels to leave.
void ms_nccl_abort(ms_cuda_exchange *exchange, const char *why);

#ifdef __cplusplus
}
#endif
#endif
