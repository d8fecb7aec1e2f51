// status.c - a failed call of the CUDA runtime as an ms_error; which device a thread works on.
// SPDX-License-Identifier: Apache-2.0
#include "status.h"

#include <string.h>

ms_status ms_cuda_status(cudaError_t code, const char *call, ms_error *err) {
  if (code == cudaSuccess) return MS_OK;
  cudaGetLastError(); // told here: the next check of a launch must not find it again
  return ms_fail(err, code == cudaErrorMemoryAllocation ? MS_ENOMEM : MS_ECUDA, "%.*s: %s (%d)",
                 (int)strcspn(call, "("), call, cudaGetErrorString(code), (int)code);
}

ms_status ms_cuda_enter(int32_t device, int *before, ms_error *err) {
  MS_CUDA(cudaGetDevice(before), err);
  MS_CUDA(cudaSetDevice(device), err);
  return MS_OK;
}

void ms_cuda_leave(int before) {
  if (cudaSetDevice(before) != cudaSuccess) cudaGetLastError(); // a device that went away was told of already
}
