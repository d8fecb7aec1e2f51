// step5_combine.cu - the launches of combine.
// SPDX-License-Identifier: Apache-2.0
#include "step5_combine.cuh"
#include "status.h"

enum { BLOCKS_PER_SM = 8 };

template <typename Out, int VECTOR>
static ms_status launch(const ms_cuda_shape *shape, const ms_combine_args &a, void *stream, ms_error *err) {
  int64_t threads = a.rows * (a.D / VECTOR), blocks = (threads + MS_COMBINE_THREADS - 1) / MS_COMBINE_THREADS;
  int64_t most = (int64_t)BLOCKS_PER_SM * shape->sms;
  if (blocks == 0) return MS_OK;
  ms_combine<Out, VECTOR>
      <<<(unsigned)(blocks < most ? blocks : most), MS_COMBINE_THREADS, 0, (cudaStream_t)stream>>>(a);
  return ms_cuda_status(cudaGetLastError(), "combine", err);
}

template <typename Out>
static ms_status choose(const ms_cuda_shape *shape, const ms_combine_args &a, void *stream, ms_error *err) {
  bool aligned = a.D % 4 == 0 && ((uintptr_t)a.from | (uintptr_t)a.to) % 16 == 0;
  return aligned ? launch<Out, 4>(shape, a, stream, err) : launch<Out, 1>(shape, a, stream, err);
}

static ms_status choose_dtype(const ms_cuda_shape *shape, ms_dtype dtype, const ms_combine_args &a, void *stream,
                              ms_error *err) {
  if (dtype == MS_BF16) return choose<__nv_bfloat16>(shape, a, stream, err);
  if (dtype == MS_F16) return choose<__half>(shape, a, stream, err);
  return choose<float>(shape, a, stream, err);
}

ms_status ms_cuda_combine(const ms_cuda_shape *shape, const ms_cuda_view *view, int64_t tokens, void *out,
                          void *stream, ms_error *err) {
  ms_combine_args a = {};
  a.messages = view->messages;
  a.message_bytes = shape->message_bytes;
  a.tile_count = view->tile_count;
  a.expert_at = shape->expert_at;
  a.from = view->out ? (const float *)view->out : view->slot;
  a.T = shape->T;
  a.D = shape->D;
  a.K = shape->K;
  bool one = shape->R == 1;
  a.to = one ? out : view->partial;
  a.rows = one ? tokens : shape->N;
  a.only_missing = a.to == (const void *)a.from;
  return choose_dtype(shape, one ? shape->dtype : MS_F32, a, stream, err);
}

ms_status ms_cuda_combine_round(const ms_cuda_shape *shape, const float *reduced, int64_t tokens, void *out,
                                void *stream, ms_error *err) {
  ms_combine_args a = {};
  a.from = reduced;
  a.to = out;
  a.rows = tokens;
  a.D = shape->D;
  return choose_dtype(shape, shape->dtype, a, stream, err);
}
