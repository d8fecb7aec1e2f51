// test_counts.cu - what a layer asks of the CUDA runtime: launches and collectives a chunk, whatever the number of
// experts and the routing are, and nothing else in the steady state; on ptxsim or on a GPU, alike.
//
//   built as test_engine.cu, with counted_calls.c and -ldl
//   test_counts               every case, each line ok or FAIL, then what was counted
//
// SPDX-License-Identifier: Apache-2.0
#include "counted_calls.h"
#include "layers.cuh"

namespace {

struct tally {
  counted_calls calls;
  int collectives;
};
thread_local int collectives;

// The exchange of layers.cuh, which is not counted but as a collective.
template <typename Collective> ms_status as_one(Collective collective) {
  count_calls(0);
  ms_status status = collective();
  count_calls(1);
  collectives++;
  return status;
}
ms_status counted_gather(ms_cuda_exchange *x, const void *send, void *receive, int64_t bytes, void *stream,
                         ms_error *err) {
  return as_one([&] { return all_gather(x, send, receive, bytes, stream, err); });
}
ms_status counted_scatter(ms_cuda_exchange *x, const float *send, float *receive, int64_t count, void *stream,
                          ms_error *err) {
  return as_one([&] { return reduce_scatter(x, send, receive, count, stream, err); });
}
ms_status counted_reduce(ms_cuda_exchange *x, float *sums, int64_t count, void *stream, ms_error *err) {
  return as_one([&] { return all_reduce(x, sums, count, stream, err); });
}

ms_cuda_experts *empty_experts(const layer &l, int32_t rank) { // zeros: only what is called matters here
  ms_error err = {};
  std::vector<int64_t> columns;
  for (int32_t e = 0; e < l.E; e++)
    columns.push_back(columns_of(l, e, rank).start), columns.push_back(columns_of(l, e, rank).stop);
  ms_experts_spec spec = {};
  spec.E = l.E, spec.D = l.D, spec.F = l.F, spec.storage = l.dtype, spec.activation = l.activation;
  spec.columns = columns.data();
  ms_cuda_experts *experts = nullptr;
  MUST_OK(ms_cuda_experts_create(&spec, 0, &experts, &err));
  return experts;
}

// What one call of each routing asks for, on each rank; the first call of the shape, which may allocate, is not
// counted.
std::vector<tally> tallies(const layer &l, const std::vector<routing> &routes) {
  ranks_of_test ranks(l.R);
  std::vector<tally> found((size_t)l.R * routes.size());
  std::vector<std::thread> threads;
  for (int32_t r = 0; r < l.R; r++)
    threads.emplace_back([&, r] {
      ms_error err = {};
      ranks.each[(size_t)r]->base.all_gather = counted_gather;
      ranks.each[(size_t)r]->base.reduce_scatter = counted_scatter;
      ranks.each[(size_t)r]->base.all_reduce = counted_reduce;
      ms_cuda_engine *engine = nullptr;
      ms_cuda_experts *experts = empty_experts(l, r);
      ms_cuda_layout *layout = layout_of(l, r);
      cudaStream_t stream;
      MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      MUST_OK(ms_cuda_engine_create(l.R > 1 ? &ranks.each[(size_t)r]->base : nullptr, 0, l.chunks, &engine, &err));
      for (size_t i = 0; i <= routes.size(); i++) {
        layer routed = l;
        routed.route = routes[i == 0 ? 0 : i - 1];
        batch b(routed, l.T, l.replicated ? 8 : 8 + (uint64_t)r);
        ms_cuda_call call = b.call(l.T, layout);
        calls_so_far(true);
        collectives = 0;
        count_calls(1);
        ms_status status = ms_cuda_forward(engine, experts, &call, stream, &err);
        count_calls(0);
        must(status, err, "ms_cuda_forward");
        if (i > 0) found[(size_t)r * routes.size() + i - 1] = {calls_so_far(true), collectives};
        MUST_OK(ms_cuda_engine_faults(engine, &err));
      }
      ranks.meet.wait(); // nothing is freed that another rank may still read
      ms_cuda_engine_free(engine);
      ms_cuda_experts_free(experts);
      ms_cuda_layout_free(layout);
      MUST(cudaStreamDestroy(stream));
    });
  for (auto &thread : threads) thread.join();
  return found;
}

void check(const layer &l) {
  const std::vector<routing> routes = {EVEN, SKEWED, ONE, HOLES, NONE};
  std::vector<tally> found = tallies(l, routes);
  std::string wrong;
  const tally &first = found[0];
  if (l.copied) {
    layer without = l;
    without.copied = false;
    if (tallies(without, routes)[0].calls.launches != first.calls.launches) wrong = "copies of experts cost launches";
  }
  const counted_calls &calls = first.calls;
  for (const tally &t : found) {
    if (t.calls.launches != calls.launches || t.calls.events != calls.events || t.collectives != first.collectives)
      wrong = "counts depend on routing or rank";
    if (t.calls.waits || t.calls.allocations || t.calls.copies) wrong = "there is a wait, an allocation or a copy";
  }
  int32_t chunks = std::min(l.R > 1 ? l.chunks : 1, l.T);
  if (calls.launches > 6 * chunks) wrong = "more than 6 launches a chunk";
  if (calls.launches < 4 * chunks) wrong = "launches are not seen";
  if (first.collectives != (l.R > 1 ? 2 * chunks : 0)) wrong = "other than 2 collectives a chunk";
  char text[160];
  snprintf(text, sizeof text, "  launches %d, collectives %d, events %d, waits %d, allocations %d, copies %d",
           calls.launches, first.collectives, calls.events, calls.waits, calls.allocations, calls.copies);
  report(name_of(l), wrong, text);
}

} // namespace

int main() {
  for (int32_t E : {1, 8, 128, 2048}) {
    check({64, 32, 32, 1, E});
    check({64, 32, 32, 1, E, EVEN, MS_BF16, MS_RELU, false, false, false, 2});
  }
  // many blocks sort
  check({4200, 16, 16, 2, 8});
  check({2100, 16, 16, 2, 8, EVEN, MS_BF16, MS_RELU, false, false, false, 2});
  check({600, 16, 16, 2, 2048, EVEN, MS_BF16, MS_RELU, false, false, false, 2});
  check({64, 32, 32, 2, 8, EVEN, MS_F32});
  check({64, 32, 32, 2, 8, EVEN, MS_BF16, MS_RELU, false, false, false, 2, 3});
  check({64, 32, 32, 2, 8, EVEN, MS_BF16, MS_RELU, false, false, false, 3, 1, true});
  check({64, 32, 32, 2, 8, EVEN, MS_BF16, MS_RELU, false, false, false, 3, 1, false, false, true});
  check({2100, 16, 16, 2, 8, EVEN, MS_BF16, MS_RELU, false, false, false, 2, 1, false, false, true});
  printf(failures ? "%d FAILED\n" : "all ok\n", failures);
  return failures != 0;
}
