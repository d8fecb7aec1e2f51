// step2_gather.cu - the launch of gather.
// SPDX-License-Identifier: Apache-2.0
#include "step2_gather.cuh"
#include "status.h"

enum { SLOTS_PER_BLOCK = MS_GATHER_THREADS, PIECES_PER_BLOCK = 4 * MS_GATHER_THREADS, BLOCKS_PER_SM = 8 };

static int64_t at_most(int64_t x, int64_t most) { return x < most ? x : most; }

ms_status ms_cuda_gather_pack(const ms_cuda_shape *shape, const ms_cuda_view *view, const ms_cuda_header *header,
                              const void *hidden, const void *index, ms_dtype index_dtype, const void *weight,
                              ms_dtype weight_dtype, void *stream, ms_error *err) {
  ms_gather_args a = {};
  a.header = *header;
  a.hidden = (const char *)hidden;
  a.index = index;
  a.weight = weight;
  char *own = (char *)view->messages + shape->rank * shape->message_bytes;
  a.own_header = (ms_cuda_header *)own;
  a.message = shape->replicated ? (char *)view->messages : own;
  a.ticket = view->tickets;
  a.block_faults = (unsigned long long *)view->counts;
  a.block_digests = a.block_faults + MS_CUDA_ROUTE_BLOCKS;
  a.T = shape->T;
  a.tokens = header->T;
  a.D = shape->D;
  a.ld_x = shape->ld_x;
  a.expert_at = shape->expert_at;
  a.weight_at = shape->weight_at;
  a.hidden_at = shape->hidden_at;
  a.K = shape->K;
  a.E = shape->E;
  a.size = (int32_t)ms_dtype_size(shape->dtype);
  a.index_dtype = index_dtype;
  a.weight_dtype = weight_dtype;
  int64_t slots = shape->T * shape->K;
  a.route_blocks = (int32_t)at_most((slots + SLOTS_PER_BLOCK - 1) / SLOTS_PER_BLOCK, MS_CUDA_ROUTE_BLOCKS);
  if (a.route_blocks < 1) a.route_blocks = 1; // the header is written also without tokens
  int64_t pieces = shape->in_place ? 0 : shape->T * shape->ld_x * a.size / 16;
  int64_t copy_blocks =
      at_most((pieces + PIECES_PER_BLOCK - 1) / PIECES_PER_BLOCK, (int64_t)BLOCKS_PER_SM * shape->sms);
  ms_gather_pack<<<(unsigned)(a.route_blocks + copy_blocks), MS_GATHER_THREADS, 0, (cudaStream_t)stream>>>(a);
  return ms_cuda_status(cudaGetLastError(), "gather", err);
}
