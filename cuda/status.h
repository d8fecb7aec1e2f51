// status.h - a failed call of the CUDA runtime as an ms_error; which device a thread works on.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_CUDA_STATUS_H
#define MS_CUDA_STATUS_H

#include "../csrc/moeshard.h"

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

// MS_OK; or MS_ENOMEM or MS_ECUDA with the name of the call, up to its bracket: "cudaMalloc: out of memory (2)".
ms_status ms_cuda_status(cudaError_t code, const char *call, ms_error *err);

// Work on a device until ms_cuda_leave gives the thread the one back that it had: libraries around us count on theirs.
// Errors: MS_ECUDA; then there is nothing to leave.
ms_status ms_cuda_enter(int32_t device, int *before, ms_error *err);
void ms_cuda_leave(int before);

// Hand a failed call of the runtime to the caller: MS_CUDA(cudaFree(p), err);
#define MS_CUDA(call, err) MS_TRY(ms_cuda_status((call), #call, err))

#ifdef __cplusplus
}
#endif
#endif
