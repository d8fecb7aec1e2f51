// step3_group.cu - the launches of group: one for small batches, else two.
// SPDX-License-Identifier: Apache-2.0
#include "step3_group.cuh"
#include "status.h"

static int32_t pieces(int32_t n, int32_t of) { return (n + of - 1) / of; }

ms_status ms_cuda_group(const ms_cuda_shape *shape, const ms_cuda_view *view, void *stream, ms_error *err) {
  ms_group_args a = {};
  a.messages = view->messages;
  a.message_bytes = shape->message_bytes;
  a.expert_at = shape->expert_at;
  a.R = shape->R;
  a.E = shape->E;
  a.slots = (int32_t)shape->slots;
  a.rank_slots = (int32_t)(shape->T * shape->K);
  a.tile_rows = shape->tile_rows;
  a.ticket = view->tickets + 1;
  a.tiles_before = view->counts;
  a.counters = a.tiles_before + shape->E + 1;
  a.offset = view->offset;
  a.order = view->order;
  a.tiles = view->tiles;
  a.tile_count = view->tile_count;
  a.faults = view->faults;

  int32_t most = shape->sort_chunks ? shape->sort_chunks : MS_GROUP_SCAN_WARPS;
  a.chunk_slots = pieces(pieces(a.slots, most), 32) * 32;
  a.chunks = a.slots ? pieces(a.slots, a.chunk_slots) : 1;
  cudaStream_t on = (cudaStream_t)stream;
  if (!shape->sort_chunks) {
    int32_t bytes = a.E * a.chunks * (int32_t)sizeof(uint16_t);
    if (bytes > 48 << 10) // 64 KiB at most: E <= 1024 and 32 chunks
      MS_CUDA(cudaFuncSetAttribute(ms_group_small, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10), err);
    ms_group_small<<<1, MS_GROUP_SCAN_THREADS, (size_t)bytes, on>>>(a);
    return ms_cuda_status(cudaGetLastError(), "group", err);
  }
  ms_group_count<<<(unsigned)pieces(a.chunks, MS_GROUP_SCAN_WARPS), MS_GROUP_SCAN_THREADS, 0, on>>>(a);
  MS_TRY(ms_cuda_status(cudaGetLastError(), "group: count", err));
  ms_group_place<<<(unsigned)pieces(a.chunks, MS_GROUP_WARPS), 32 * MS_GROUP_WARPS, 0, on>>>(a);
  return ms_cuda_status(cudaGetLastError(), "group: place", err);
}
