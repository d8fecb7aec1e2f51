// test_cuda_shape.c - what launches and memory of the CUDA engine depend on: sizes, offsets, bounds. No CUDA needed.
// SPDX-License-Identifier: Apache-2.0
#include "../../cuda/shape.c"
#include "check.h"

static ms_cuda_shape plan(int64_t T, int32_t R, int32_t K, int32_t E, int64_t D, int64_t F,
                          ms_dtype dtype) {
  ms_error err;
  ms_cuda_shape s = {.T = T,
                     .R = R,
                     .K = K,
                     .E = E,
                     .D = D,
                     .F = F,
                     .dtype = dtype,
                     .math = MS_CUDA_WGMMA,
                     .sms = 132,
                     .in_place = true};
  CHECK_OK(ms_cuda_shape_plan(&s, &err), err);
  return s;
}

static void test_tiles_are_as_tall_as_an_experts_share(void) {
  CHECK_INT(plan(120, 1, 1, 8, 768, 3072, MS_BF16).tile_rows, 16);
  CHECK_INT(plan(400, 1, 1, 8, 768, 3072, MS_BF16).tile_rows, 64);
  CHECK_INT(plan(4096, 1, 1, 8, 768, 3072, MS_BF16).tile_rows, 128);
  CHECK_INT(plan(120, 1, 1, 8, 768, 3072, MS_BF16).math, MS_CUDA_MMA); // a wgmma has 64 rows
  CHECK_INT(plan(400, 1, 1, 8, 768, 3072, MS_BF16).math, MS_CUDA_WGMMA);
}

// The worst routing for the table: one row too many in as many experts as there can be.
static void test_tiles_of_any_routing_fit_the_table(void) {
  for (int64_t slots = 0; slots < 700; slots++)
    for (int32_t E = 1; E < 40; E += 3) {
      ms_cuda_shape s = plan(slots, 1, 1, E, 32, 32, MS_F32);
      int64_t left = slots, tiles = 0;
      for (int32_t e = 0; e < E && left > 0; e++) {
        int64_t last = e == E - 1 ? left : 1;
        tiles += (last + s.tile_rows - 1) / s.tile_rows;
        left -= last;
      }
      CHECK(tiles <= s.max_tiles);
    }
}

// What the steps keep there: gather [ROUTE_BLOCKS] pairs of uint64; group by many blocks tiles [E], sums of shares
// 2 * [blocks], counters [E][chunks] and, 16 bits each, ranks [slots].
static int64_t counts_bytes(const ms_cuda_shape *s) {
  int64_t gather = 16 * MS_CUDA_ROUTE_BLOCKS;
  int64_t group = 4 * (s->E + 2 * s->sort_blocks + (int64_t)s->E * s->sort_chunks) + 2 * s->slots;
  return s->sort_chunks && group > gather ? group : gather;
}

static void test_sections_are_aligned_and_do_not_overlap(void) {
  for (int32_t R = 1; R <= 3; R++)
    for (int32_t K = 0; K <= 4; K++)
      for (int32_t E = 1; E < 5000; E += 900) {
        ms_cuda_shape s = plan(1000, R, K, E, 37, 41, MS_BF16);
        CHECK_INT(s.ld_x, 40);
        CHECK_INT(s.ld_h, 48);
        CHECK(!s.in_place); // rows of 74 bytes
        const int64_t message[] = {0, s.expert_at, s.weight_at, s.hidden_at, s.message_bytes};
        const int64_t needed[] = {(int64_t)sizeof(ms_cuda_header), s.T * K * 4, s.T * K * 4,
                                  s.T * s.ld_x * 2};
        for (int i = 0; i < 4; i++)
          CHECK(message[i] % 256 == 0 && message[i] + needed[i] <= message[i + 1]);
        const int64_t at[] = {0,          s.messages_at, s.counts_at, s.offset_at,      s.order_at,
                              s.tiles_at, s.h_at,        s.slot_at,   s.workspace_bytes};
        const int64_t bytes[] = {4 * MS_CUDA_TICKETS,  R * s.message_bytes,
                                 counts_bytes(&s),     4 * (E + 1),
                                 4 * s.slots,          4 + 12 * (int64_t)s.max_tiles,
                                 s.slots * s.ld_h * 2, s.slots * s.D * 4};
        for (int i = 0; i < 8; i++) CHECK(at[i] % 256 == 0 && at[i] + bytes[i] <= at[i + 1]);
        if (K != 1 && R > 1)
          CHECK(s.partial_at >= s.slot_at + bytes[7] &&
                s.partial_at + s.N * s.D * 4 <= s.workspace_bytes);
        else
          CHECK_INT(s.partial_at, s.slot_at);
      }
}

// 16-bit counters, whole steps of a block.
static void test_chunks_of_the_sort_are_short_enough(void) {
  const int32_t experts[] = {1, 8, 128, 1000, 2048, 65536};
  for (int64_t slots = 1; slots < 100000000; slots = slots * 3 + 1)
    for (size_t i = 0; i < sizeof experts / sizeof *experts; i++) {
      ms_cuda_shape s = plan(slots, 1, 1, experts[i], 1, 0, MS_F32);
      CHECK(s.sort_chunks ? slots <= (int64_t)s.sort_chunks * 32768 : slots <= 8192);
    }
}

// They wait for each other, one on each multiprocessor, and each thread of one adds up the shares before one share.
static void test_all_blocks_of_the_sort_can_run_at_once(void) {
  const int32_t experts[] = {1, 8, 2048, 65536}, multiprocessors[] = {1, 2, 14, 108, 132, 1000};
  for (int64_t slots = 1; slots < 100000000; slots = slots * 3 + 1)
    for (size_t i = 0; i < sizeof experts / sizeof *experts; i++)
      for (size_t j = 0; j < sizeof multiprocessors / sizeof *multiprocessors; j++) {
        ms_error err;
        ms_cuda_shape s = {
            .T = slots, .R = 1, .K = 1, .E = experts[i], .D = 1, .sms = multiprocessors[j]};
        CHECK_OK(ms_cuda_shape_plan(&s, &err), err);
        CHECK(s.sort_blocks >= 1 && s.sort_blocks <= s.sms && s.sort_blocks <= MS_CUDA_SORT_BLOCKS);
      }
}

static void test_bad_shapes_are_refused(void) {
  ms_error err;
  ms_cuda_shape s = {.T = -1, .R = 1, .K = 1, .E = 1, .D = 1};
  CHECK_STATUS(ms_cuda_shape_plan(&s, &err), MS_EINVAL, err);
  s = (ms_cuda_shape){.T = 1, .R = 1, .K = MS_MAX_CHOICES + 1, .E = 1, .D = 1};
  CHECK_STATUS(ms_cuda_shape_plan(&s, &err), MS_EINVAL, err);
  s = (ms_cuda_shape){.T = 1, .R = 1, .K = 1, .E = 1, .D = 1};
  CHECK_STATUS(ms_cuda_shape_plan(&s, &err), MS_EINVAL, err);
  CHECK_TEXT(err.msg, "0 multiprocessors");
  s = (ms_cuda_shape){.T = 1 << 25, .R = 1, .K = 64, .E = 1, .D = 1, .sms = 108};
  CHECK_STATUS(ms_cuda_shape_plan(&s, &err), MS_ESHAPE, err);
  CHECK_TEXT(err.msg, "33554432 tokens x 64 choices");
}

int main(void) {
  check_begin();
  test_tiles_are_as_tall_as_an_experts_share();
  test_tiles_of_any_routing_fit_the_table();
  test_sections_are_aligned_and_do_not_overlap();
  test_chunks_of_the_sort_are_short_enough();
  test_all_blocks_of_the_sort_can_run_at_once();
  test_bad_shapes_are_refused();
  return check_end("test_cuda_shape");
}
