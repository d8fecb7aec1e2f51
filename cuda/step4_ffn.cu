// step4_ffn.cu - launches of ffn: persistent blocks, as many as fit the device.
// SPDX-License-Identifier: Apache-2.0
#include "step4_ffn.cuh"
#include "step4_ffn_fma.cuh"
#ifdef MS_CUDA_SM90
#include "step4_ffn_sm90.h"
#endif
#include "status.h"

#include <atomic>

namespace {

// A kernel may use more than 48 KiB of shared memory only after its limit was raised on the device: done once a
// kernel and device, by whoever comes first; twice does no harm.
template <auto KERNEL> ms_status allow_shared(int32_t bytes, ms_error *err) {
  static std::atomic<uint64_t> allowed{0}; // bit d: device d
  int device = 0;
  MS_CUDA(cudaGetDevice(&device), err);
  uint64_t bit = device < 64 ? UINT64_C(1) << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return MS_OK;
  MS_CUDA(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), err);
  allowed.fetch_or(bit, std::memory_order_relaxed);
  return MS_OK;
}

ms_ffn_args args_of(const ms_cuda_shape *shape, const ms_cuda_view *view, bool up, int32_t block) {
  ms_ffn_args args = {};
  args.out_aligned = (uintptr_t)view->out % 16 == 0;
  args.message_bytes = shape->message_bytes;
  args.weight_at = shape->weight_at;
  args.ld_x = shape->ld_x;
  args.ld_h = shape->ld_h;
  args.T = (int32_t)shape->T;
  args.K = shape->K;
  args.D = (int32_t)shape->D;
  args.block = block;
  args.blocks = (int32_t)(((up ? shape->F : shape->D) + block - 1) / block);
  return args;
}

// Blocks for the items there can be, at most `each` on a multiprocessor.
unsigned blocks_of(const ms_cuda_shape *shape, const ms_ffn_args &args, int32_t each) {
  int64_t items = (int64_t)shape->max_tiles * args.blocks, most = (int64_t)shape->sms * each;
  return (unsigned)(items < most ? items : most);
}

template <bool UP, bool GATED, int ROWS, typename Storage>
ms_status launch_mma(const ms_cuda_shape *shape, const ms_cuda_view *view, ms_activation activation,
                     void *stream, ms_error *err) {
  using tile = ms_ffn_tile<ROWS>;
  static_assert(tile::BM * tile::STAGED * 4 <= tile::BYTES,
                "the sums of a tile are staged where the stages were");
  constexpr auto kernel = ms_ffn<UP, GATED, ROWS, Storage>;
  ms_ffn_args args = args_of(shape, view, UP, GATED ? tile::BN / 2 : tile::BN);
  unsigned blocks = blocks_of(shape, args, 2);
  if (blocks == 0) return MS_OK;
  MS_TRY(allow_shared<kernel>(tile::BYTES, err));
  kernel<<<blocks, MS_FFN_THREADS, tile::BYTES, (cudaStream_t)stream>>>(args, *view, activation);
  return ms_cuda_status(cudaGetLastError(), UP ? "ffn: up" : "ffn: down", err);
}

template <bool UP, bool GATED, int ROWS>
ms_status launch_fma(const ms_cuda_shape *shape, const ms_cuda_view *view, ms_activation activation,
                     void *stream, ms_error *err) {
  ms_ffn_args args = args_of(shape, view, UP, GATED ? MS_FMA_BN / 2 : MS_FMA_BN);
  unsigned blocks = blocks_of(shape, args, 4);
  if (blocks == 0) return MS_OK;
  ms_ffn_fma<UP, GATED, ROWS>
      <<<blocks, MS_FMA_THREADS, 0, (cudaStream_t)stream>>>(args, *view, activation);
  return ms_cuda_status(cudaGetLastError(), UP ? "ffn: up" : "ffn: down", err);
}

template <bool UP, bool GATED, int ROWS>
ms_status choose_math(const ms_cuda_shape *shape, const ms_cuda_view *view,
                      ms_activation activation, void *stream, ms_error *err) {
  switch (shape->math) {
  case MS_CUDA_FMA:
    return launch_fma<UP, GATED, ROWS>(shape, view, activation, stream, err);
  case MS_CUDA_TF32:
    return launch_mma<UP, GATED, ROWS, float>(shape, view, activation, stream, err);
  default:
    return shape->dtype == MS_BF16
               ? launch_mma<UP, GATED, ROWS, __nv_bfloat16>(shape, view, activation, stream, err)
               : launch_mma<UP, GATED, ROWS, __half>(shape, view, activation, stream, err);
  }
}

template <bool UP, bool GATED>
ms_status choose_rows(const ms_cuda_shape *shape, const ms_cuda_view *view,
                      ms_activation activation, void *stream, ms_error *err) {
  switch (shape->tile_rows) {
  case 16:
    return choose_math<UP, GATED, 16>(shape, view, activation, stream, err);
  case 64:
    return choose_math<UP, GATED, 64>(shape, view, activation, stream, err);
  default:
    return choose_math<UP, GATED, 128>(shape, view, activation, stream, err);
  }
}

} // namespace

ms_status ms_cuda_ffn_up(const ms_cuda_shape *shape, const ms_cuda_view *view,
                         ms_activation activation, void *stream, ms_error *err) {
#ifdef MS_CUDA_SM90
  if (shape->math == MS_CUDA_WGMMA)
    return ms_cuda_ffn_up_sm90(shape, view, activation, stream, err);
#endif
  return shape->gated ? choose_rows<true, true>(shape, view, activation, stream, err)
                      : choose_rows<true, false>(shape, view, activation, stream, err);
}

ms_status ms_cuda_ffn_down(const ms_cuda_shape *shape, const ms_cuda_view *view, void *stream,
                           ms_error *err) {
#ifdef MS_CUDA_SM90
  if (shape->math == MS_CUDA_WGMMA) return ms_cuda_ffn_down_sm90(shape, view, stream, err);
#endif
  return choose_rows<false, false>(shape, view, MS_IDENTITY, stream, err);
}
