// status.c - a failed call of the CUDA runtime as an ms_error.
// SPDX-License-Identifier: Apache-2.0
#include "status.h"

#include <string.h>

ms_status ms_cuda_status(cudaError_t code, const char *call, ms_error *err) {
  if (code == cudaSuccess) return MS_OK;
  cudaGetLastError(); // told here: the next check of a launch must not find it again
  return ms_fail(err, code == cudaErrorMemoryAllocation ? MS_ENOMEM : MS_ECUDA, "%.*s: %s (%d)",
                 (int)strcspn(call, "("), call, cudaGetErrorString(code), (int)code);
}
