// step4_ffn_sm90.cu - launches of ffn on wgmma: one persistent block for each multiprocessor.
//
// SPDX-License-Identifier: Apache-2.0
#include "step4_ffn_sm90.h"
#include "step4_ffn_sm90.cuh"

#include <atomic>
#include <limits.h>

namespace {

ms_status check(cudaError_t code, const char *call, ms_error *err) {
  if (code == cudaSuccess) return MS_OK;
  return ms_fail(err, MS_ECUDA, "%s: %s (%d)", call, cudaGetErrorString(code), (int)code);
}

// A kernel may use more than 48 KiB of shared memory only after its limit was raised on the device: done once a
// kernel and device, by whoever comes first; twice does no harm.
template <auto KERNEL> ms_status allow_shared(int32_t bytes, ms_error *err) {
  static std::atomic<uint64_t> allowed{0}; // bit d: device d (modulo 64)
  int device = 0;
  MS_TRY(check(cudaGetDevice(&device), "cudaGetDevice", err));
  uint64_t bit = UINT64_C(1) << (device % 64);
  if (device < 64 && (allowed.load(std::memory_order_relaxed) & bit)) return MS_OK;
  MS_TRY(check(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute",
               err));
  allowed.fetch_or(bit, std::memory_order_relaxed);
  return MS_OK;
}

template <bool UP, bool GATED, int ROWS, typename Storage>
ms_status launch(const ms_cuda_shape *shape, const ms_cuda_view *view, ms_activation activation, void *stream,
                 ms_error *err) {
  constexpr auto kernel = ms_ffn_sm90<UP, GATED, ROWS, Storage>;
  constexpr int32_t bytes = ms_sm90_shared<ROWS>::BYTES;
  ms_sm90_launch it = {};
  it.T = shape->T;
  it.K = shape->K;
  it.D = (int32_t)shape->D;
  it.aligned = shape->D % 4 == 0 && (uintptr_t)view->out % 16 == 0;
  it.ld_in = (shape->D + 7) / 8 * 8;
  it.ld_x = shape->ld_x;
  it.ld_h = shape->ld_h;
  it.message_bytes = shape->message_bytes;
  it.weight_at = shape->weight_at;
  it.block = GATED ? MS_SM90_COLUMNS / 2 : MS_SM90_COLUMNS;
  it.blocks = (int32_t)(((UP ? shape->F : shape->D) + it.block - 1) / it.block);
  int64_t items = (int64_t)shape->max_tiles * it.blocks;
  if (items == 0) return MS_OK;
  if (items > INT32_MAX - shape->sms)
    return ms_fail(err, MS_ESHAPE, "ffn on wgmma: %lld tiles are too many", (long long)items);
  MS_TRY(allow_shared<kernel>(bytes, err));
  kernel<<<(unsigned)(items < shape->sms ? items : shape->sms), MS_SM90_THREADS, bytes, (cudaStream_t)stream>>>(
      it, *view, activation);
  return check(cudaGetLastError(), UP ? "ms_cuda_ffn_up_sm90" : "ms_cuda_ffn_down_sm90", err);
}

template <bool UP, bool GATED>
ms_status choose(const ms_cuda_shape *shape, const ms_cuda_view *view, ms_activation activation, void *stream,
                 ms_error *err) {
  bool bf16 = shape->dtype == MS_BF16;
  if (!bf16 && shape->dtype != MS_F16)
    return ms_fail(err, MS_EDTYPE, "ffn on wgmma: expected bfloat16 or float16, got %s", ms_dtype_name(shape->dtype));
  if (shape->tile_rows == 128)
    return bf16 ? launch<UP, GATED, 128, __nv_bfloat16>(shape, view, activation, stream, err)
                : launch<UP, GATED, 128, __half>(shape, view, activation, stream, err);
  if (shape->tile_rows == 64)
    return bf16 ? launch<UP, GATED, 64, __nv_bfloat16>(shape, view, activation, stream, err)
                : launch<UP, GATED, 64, __half>(shape, view, activation, stream, err);
  return ms_fail(err, MS_EINVAL, "ffn on wgmma: expected tiles of 64 or 128 rows, got %d", (int)shape->tile_rows);
}

} // namespace

ms_status ms_cuda_ffn_up_sm90(const ms_cuda_shape *shape, const ms_cuda_view *view, ms_activation activation,
                              void *stream, ms_error *err) {
  return shape->gated ? choose<true, true>(shape, view, activation, stream, err)
                      : choose<true, false>(shape, view, activation, stream, err);
}

ms_status ms_cuda_ffn_down_sm90(const ms_cuda_shape *shape, const ms_cuda_view *view, void *stream, ms_error *err) {
  return choose<false, false>(shape, view, MS_IDENTITY, stream, err);
}
