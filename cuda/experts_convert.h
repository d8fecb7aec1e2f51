// experts_convert.h - the launch of experts_convert.cu.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_EXPERTS_CONVERT_H
#define MS_EXPERTS_CONVERT_H

#include "../csrc/moeshard.h"

#ifdef __cplusplus
extern "C" {
#endif

// to[r * ld + c] = from[r, c], converted to `dtype`; both on the device; asynchronous.
// Errors: MS_EDTYPE; MS_ECUDA.
ms_status ms_cuda_convert(const ms_matrix *from, void *to, ms_dtype dtype, int64_t ld, void *stream, ms_error *err);

#ifdef __cplusplus
}
#endif
#endif
