// step3_group.cu - the launch of group: by one block for small batches, else by many that meet.
// SPDX-License-Identifier: Apache-2.0
#include "step3_group.cuh"
#include "status.h"

static int32_t pieces(int32_t n, int32_t of) { return (n + of - 1) / of; }

// A kernel may use more than 48 KiB of shared memory only after its limit was raised; rare, and twice does no harm.
template <auto KERNEL> static ms_status allow_shared(int32_t bytes, ms_error *err) {
  if (bytes > 48 << 10) MS_CUDA(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), err);
  return MS_OK;
}

static ms_status one_block(ms_group_args a, cudaStream_t stream, ms_error *err) {
  a.chunk_slots = pieces(pieces(a.slots, MS_GROUP_THREADS / 32), 32) * 32; // whole steps of a warp
  a.chunks = a.slots ? pieces(a.slots, a.chunk_slots) : 1;
  int32_t bytes = 8 * (a.E + 1) + 2 * a.E * a.chunks;
  MS_TRY(allow_shared<ms_group_small>(bytes, err));
  ms_group_small<<<1, MS_GROUP_THREADS, (size_t)bytes, stream>>>(a);
  return ms_cuda_status(cudaGetLastError(), "group", err);
}

static ms_status many_blocks(ms_group_args a, int32_t chunks, int32_t blocks, cudaStream_t stream, ms_error *err) {
  a.chunk_slots = pieces(pieces(a.slots, chunks), MS_GROUP_THREADS) * MS_GROUP_THREADS;
  a.chunks = pieces(a.slots, a.chunk_slots);
  while (pieces(a.E, 1 << a.share_bits) > blocks) a.share_bits++;
  a.shares = pieces(a.E, 1 << a.share_bits);
  int32_t bytes = 2 * a.E;
  MS_TRY(allow_shared<ms_group_large>(bytes, err));
  void *arguments[] = {&a};
  return ms_cuda_status(cudaLaunchCooperativeKernel(ms_group_large, dim3((unsigned)blocks), dim3(MS_GROUP_THREADS),
                                                    arguments, (size_t)bytes, stream),
                        "group", err);
}

ms_status ms_cuda_group(const ms_cuda_shape *shape, const ms_cuda_view *view, const ms_cuda_layout *layout,
                        void *stream, ms_error *err) {
  ms_group_args a = {};
  a.messages = (char *)view->messages;
  a.message_bytes = shape->message_bytes;
  a.expert_at = shape->expert_at;
  a.R = shape->R;
  a.E = shape->E;
  a.slots = (int32_t)shape->slots;
  a.rank_slots = (int32_t)(shape->T * shape->K);
  a.tile_rows = shape->tile_rows;
  a.meeting = view->tickets + 1;
  a.tiles_before = view->counts;
  a.own_before = a.tiles_before + shape->E;
  a.share_rows = a.own_before + shape->E;
  a.share_tiles = a.share_rows + shape->sort_blocks;
  a.counters = a.share_tiles + shape->sort_blocks;
  a.rank = (uint16_t *)(a.counters + (int64_t)shape->sort_chunks * shape->E);
  a.offset = view->offset;
  a.order = view->order;
  a.tiles = view->tiles;
  a.tile_count = view->tile_count;
  a.turns = layout ? layout->turns : nullptr;
  a.seen = view->seen;
  a.K = shape->K;
  a.faults = view->faults;
  return shape->sort_chunks ? many_blocks(a, shape->sort_chunks, shape->sort_blocks, (cudaStream_t)stream, err)
                            : one_block(a, (cudaStream_t)stream, err);
}
