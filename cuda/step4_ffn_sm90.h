// step4_ffn_sm90.h - ffn on wgmma, for devices of compute capability 9.0: what ms_cuda_ffn_up and ms_cuda_ffn_down
// call when shape->math is MS_CUDA_WGMMA and shape->tile_rows is 64 or 128. Built for sm_90a only (MS_CUDA_SM90).
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP4_FFN_SM90_H
#define MS_STEP4_FFN_SM90_H

#include "moeshard_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// As ms_cuda_ffn_up and ms_cuda_ffn_down. dtype: MS_BF16 or MS_F16. hidden and view.h 16-byte aligned.
// Cost: one launch. Errors: MS_EDTYPE another dtype; MS_EINVAL another number of tile rows; MS_ECUDA.
ms_status ms_cuda_ffn_up_sm90(const ms_cuda_shape *shape, const ms_cuda_view *view, ms_activation activation,
                              void *stream, ms_error *err);
ms_status ms_cuda_ffn_down_sm90(const ms_cuda_shape *shape, const ms_cuda_view *view, void *stream, ms_error *err);

#ifdef __cplusplus
}
#endif
#endif
