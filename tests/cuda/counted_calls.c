// counted_calls.c - these functions stand in front of the CUDA runtime's under the same names, so that whatever the
// engine calls passes through them. (A .cu file cannot define them: some exist on the device too.)
// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE // RTLD_NEXT
#include "counted_calls.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static _Thread_local counted_calls counted;
static _Thread_local int counting;

void count_calls(int on) { counting = on; }
counted_calls calls_so_far(int forget) {
  counted_calls so_far = counted;
  if (forget) counted = (counted_calls){0};
  return so_far;
}

static void *real(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (found) return found;
  printf("FAIL there is no %s\n", name);
  exit(1);
}

#define COUNTED(what, name, parameters, arguments)                                                 \
  cudaError_t name parameters {                                                                    \
    cudaError_t(*library) parameters;                                                              \
    *(void **)&library = real(#name);                                                              \
    if (counting) counted.what++;                                                                  \
    return library arguments;                                                                      \
  }

COUNTED(launches, __cudaLaunchKernel, // what <<<>>> is from CUDA 13 on; cudaLaunchKernel before
        (cudaKernel_t f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s),
        (f, grid, block, args, shared, s))
COUNTED(launches, cudaLaunchKernel,
        (const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s),
        (f, grid, block, args, shared, s))
COUNTED(launches, cudaLaunchCooperativeKernel,
        (const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s),
        (f, grid, block, args, shared, s))
COUNTED(launches, cudaLaunchKernelExC, (const cudaLaunchConfig_t *how, const void *f, void **args),
        (how, f, args))
COUNTED(waits, cudaDeviceSynchronize, (void), ())
COUNTED(waits, cudaStreamSynchronize, (cudaStream_t s), (s))
COUNTED(waits, cudaEventSynchronize, (cudaEvent_t e), (e))
COUNTED(waits, cudaEventQuery, (cudaEvent_t e), (e))
COUNTED(waits, cudaStreamQuery, (cudaStream_t s), (s))
COUNTED(allocations, cudaMalloc, (void **p, size_t n), (p, n))
COUNTED(allocations, cudaMallocAsync, (void **p, size_t n, cudaStream_t s), (p, n, s))
COUNTED(allocations, cudaMallocHost, (void **p, size_t n), (p, n))
COUNTED(allocations, cudaHostAlloc, (void **p, size_t n, unsigned how), (p, n, how))
COUNTED(allocations, cudaFree, (void *p), (p))
COUNTED(allocations, cudaEventCreate, (cudaEvent_t * e), (e))
COUNTED(allocations, cudaEventCreateWithFlags, (cudaEvent_t * e, unsigned how), (e, how))
COUNTED(allocations, cudaStreamCreateWithFlags, (cudaStream_t * s, unsigned how), (s, how))
COUNTED(copies, cudaMemcpy, (void *to, const void *from, size_t n, enum cudaMemcpyKind kind),
        (to, from, n, kind))
COUNTED(copies, cudaMemcpyAsync,
        (void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s),
        (to, from, n, kind, s))
COUNTED(copies, cudaMemset, (void *to, int x, size_t n), (to, x, n))
COUNTED(copies, cudaMemsetAsync, (void *to, int x, size_t n, cudaStream_t s), (to, x, n, s))
COUNTED(events, cudaEventRecord, (cudaEvent_t e, cudaStream_t s), (e, s))
COUNTED(events, cudaStreamWaitEvent, (cudaStream_t s, cudaEvent_t e, unsigned how), (s, e, how))
