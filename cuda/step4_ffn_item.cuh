// step4_ffn_item.cuh - what a block of ffn works on: one tile of an expert's rows times one block of columns.
//
// Persistent blocks take items i, i + gridDim.x, ... of (tiles there are) x (column blocks of the widest expert). Items
// in a row are BAND tiles x all column blocks, tiles first: blocks that run together read the same weights.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_STEP4_FFN_ITEM_CUH
#define MS_STEP4_FFN_ITEM_CUH

#include "moeshard_cuda.h"

typedef struct ms_ffn_args { // of one launch, beside the view
  int64_t message_bytes, weight_at, ld_x, ld_h;
  int32_t T, K, D;
  int32_t block;  // columns of an item (of H: up; of D: down)
  int32_t blocks; // such blocks of the widest expert
  bool out_aligned; // view.out is at a multiple of 16 bytes
} ms_ffn_args;

typedef struct ms_ffn_item {
  ms_cuda_tile tile;
  ms_cuda_expert expert;
  int32_t column;  // first
  int32_t columns; // from there to the expert's last
  int32_t depth;   // K of the product
} ms_ffn_item;

// Item i, or false if its expert is too narrow for the column block.
template <bool UP, int BAND>
__device__ __forceinline__ bool ms_ffn_item_of(const ms_ffn_args &args, const ms_cuda_view &view,
                                               int32_t i, int32_t tiles, ms_ffn_item &item) {
  int32_t first = i / (BAND * args.blocks) * BAND, at = i % (BAND * args.blocks);
  int32_t band = tiles - first < BAND ? tiles - first : BAND;
  item.tile = view.tiles[first + at % band];
  item.expert = view.experts[item.tile.expert];
  item.column = at / band * args.block;
  item.columns = (UP ? item.expert.width : args.D) - item.column;
  item.depth = UP ? args.D : item.expert.width;
  return item.columns > 0;
}

// Where the left row of position `at` in the order begins: a token (up) or a row of H (down).
template <bool UP>
__device__ __forceinline__ const char *ms_ffn_row(const ms_ffn_args &args, const ms_cuda_view &view,
                                                  int32_t at, int32_t size) {
  if (!UP) return view.h + at * args.ld_h * size;
  int32_t token = view.order[at] / args.K, rank = token / args.T;
  return view.hidden + rank * view.hidden_stride + (token - rank * args.T) * args.ld_x * size;
}

// The routing weight of a slot.
__device__ __forceinline__ float ms_ffn_weight(const ms_ffn_args &args, const ms_cuda_view &view,
                                               int32_t slot) {
  int32_t rank = slot / (args.T * args.K);
  return ((const float *)(view.messages + rank * args.message_bytes +
                          args.weight_at))[slot - rank * args.T * args.K];
}

#endif
