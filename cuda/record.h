// record.h - what a profile knows of the calls of an engine: when each step began on the device, and what came in.
//
// Only while somebody records is anything allocated or copied here. Captured calls are not recorded.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_CUDA_RECORD_H
#define MS_CUDA_RECORD_H

#include "moeshard_cuda.h"

#include <cuda_runtime_api.h>

typedef struct ms_cuda_recorder ms_cuda_recorder;

// Begin: times count from the moment at which this returns.
//   marks  a call makes at most
// Cost: waits for the device. Errors: MS_ENOMEM; MS_ECUDA.
ms_status ms_cuda_recorder_create(int32_t marks, ms_cuda_recorder **out, ms_error *err);
void ms_cuda_recorder_free(ms_cuda_recorder *recorder); // waits for the device; NULL is legal

// The model is about to decide about the next call's routing.
ms_status ms_cuda_recorder_stamp(ms_cuda_recorder *recorder, cudaStream_t stream, ms_error *err);
// A call begins; its steps are marked as they begin on its stream; it ends.
ms_status ms_cuda_recorder_begin(ms_cuda_recorder *recorder, const ms_cuda_experts *experts, const ms_cuda_call *call,
                                 cudaStream_t stream, ms_error *err);
ms_status ms_cuda_recorder_mark(ms_cuda_recorder *recorder, ms_cuda_step step, cudaStream_t stream, ms_error *err);
ms_status ms_cuda_recorder_end(ms_cuda_recorder *recorder, const ms_cuda_experts *experts, cudaStream_t stream,
                               ms_error *err);

int64_t ms_cuda_recorder_count(const ms_cuda_recorder *recorder);
// Call i, which has ended on the device. Errors: MS_ECUDA.
ms_status ms_cuda_recorder_at(const ms_cuda_recorder *recorder, int64_t i, ms_cuda_times *out, ms_error *err);

#endif
