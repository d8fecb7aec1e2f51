// test_steps.cu - gather, group and combine alone, against plain loops, on ptxsim or on a GPU, alike.
//
//   nvcc -std=c++17 -O3 -cudart shared -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
//     -o test_steps tests/cuda/test_steps.cu cuda/step2_gather.cu cuda/step3_group.cu cuda/step5_combine.cu
//     cuda/layout.c cuda/shape.c cuda/status.c csrc/base/error.c csrc/reference.c -lm
//   test_steps                every case, each line ok or FAIL; the exit code tells
//   test_steps --repeat N     one large case N times: the same bits each time
//   test_steps --time         microseconds a step (medians; CUDA graphs of many steps, so that no host is measured)
//
// Several ranks are several messages in one workspace: an all-gather would leave the same. Everything that the steps
// may not leave as it was is NaN before, and each case runs twice on one workspace with other data.
// All comparisons are exact: sums of floats in the same order, rounded once, have the same bits everywhere.
//
// SPDX-License-Identifier: Apache-2.0
#include "../../cuda/moeshard_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

void must(cudaError_t code, const char *call) {
  if (code == cudaSuccess) return;
  printf("FAIL %s: %s\n", call, cudaGetErrorString(code));
  exit(1);
}
#define MUST(call) must(call, #call)

void must(ms_status code, const ms_error &err, const char *call) {
  if (code == MS_OK) return;
  printf("FAIL %s: %s\n", call, err.msg);
  exit(1);
}
#define MUST_OK(call) must(call, err, #call)

uint32_t hash(uint64_t seed, uint64_t i) {
  uint64_t x = seed * 0x9e3779b97f4a7c15ull + i;
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return (uint32_t)(x >> 32);
}
float element(uint64_t seed, uint64_t i) { return (float)((int)(hash(seed, i) % 20001) - 10000) / 10000.f; }

// A value of a dtype as its bits, in as many bytes.
void put(ms_dtype dtype, std::vector<char> &to, float x) {
  char bits[4];
  int size = 2;
  if (dtype == MS_BF16) {
    __nv_bfloat16 y = __float2bfloat16_rn(x);
    memcpy(bits, &y, 2);
  } else if (dtype == MS_F16) {
    __half y = __float2half_rn(x);
    memcpy(bits, &y, 2);
  } else {
    memcpy(bits, &x, 4);
    size = 4;
  }
  to.insert(to.end(), bits, bits + size);
}
float rounded(ms_dtype dtype, float x) {
  return dtype == MS_BF16  ? __bfloat162float(__float2bfloat16_rn(x))
         : dtype == MS_F16 ? __half2float(__float2half_rn(x))
                           : x;
}

struct device_memory {
  std::vector<void *> all;
  char *take(int64_t bytes) { // NaN
    void *at = nullptr;
    MUST(cudaMalloc(&at, (size_t)std::max<int64_t>(bytes, 1)));
    MUST(cudaMemset(at, 0xff, (size_t)std::max<int64_t>(bytes, 1)));
    all.push_back(at);
    return (char *)at;
  }
  template <typename T> char *copy(const std::vector<T> &from) {
    char *at = take((int64_t)(from.size() * sizeof(T)));
    if (!from.empty()) MUST(cudaMemcpy(at, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    return at;
  }
  ~device_memory() {
    for (void *at : all) cudaFree(at);
  }
};

template <typename T> std::vector<T> read(const void *from, int64_t count) {
  std::vector<T> to((size_t)count);
  if (count > 0) MUST(cudaMemcpy(to.data(), from, (size_t)count * sizeof(T), cudaMemcpyDeviceToHost));
  return to;
}

// ---- cases ---------------------------------------------------------------------------------------------------------

enum routing { EVEN, SKEWED, ONE, HOLES, NONE }; // HOLES: a third of the slots without an expert

struct layer {
  int32_t R, T, D, K, E;
  routing route;
  ms_dtype dtype = MS_BF16, index_dtype = MS_I64, weight_dtype = MS_F32;
  int32_t misaligned = 0; // elements that hidden lies past a multiple of 16 bytes
  bool in_place = false, replicated = false;
  int32_t sms = 0;     // 0: the device's; fewer: blocks of group have more to do
  bool copied = false; // experts with copies, without, on one rank, pruned: copies_of and copy_of
};

const char *const routing_names[] = {"even", "skewed", "one expert", "holes", "no expert"};

std::string name_of(const layer &l) {
  char text[160];
  snprintf(text, sizeof text, "R=%d T=%d D=%d K=%d E=%d %s %s%s%s%s%s%s", l.R, l.T, l.D, l.K, l.E, ms_dtype_name(l.dtype),
           routing_names[l.route], l.misaligned ? " misaligned" : "", l.in_place ? " in place" : "",
           l.replicated ? " replicated" : "", l.sms ? (" sms=" + std::to_string(l.sms)).c_str() : "",
           l.copied ? " copied" : "");
  return text;
}

int32_t choice(const layer &l, uint64_t seed, int64_t slot) {
  uint32_t h = hash(seed, (uint64_t)slot);
  switch (l.route) {
  case ONE: return l.E - 1;
  case NONE: return -1;
  case SKEWED: return (int32_t)(h % 10 < 6 ? h / 16 % std::max(1, l.E / 10) : h / 16 % l.E);
  case HOLES: return h % 3 == 0 ? -1 : (int32_t)(h / 16 % l.E) / 2 * 2;
  default: return (int32_t)(h % l.E);
  }
}

int64_t tokens_of(const layer &l, int32_t r) { // ranks differ
  return r == 0 || l.replicated ? l.T : std::max(0, l.T - 5 * r);
}

// Of a table with `copied`, by expert: on every rank; on one rank; cut over all; twice, by all ranks or by two; pruned.
int32_t copies_of(const layer &l, int32_t e) { return e % 5 == 0 ? l.R : e % 5 == 3 ? std::min(2, l.R) : e % 5 != 4; }
int32_t copy_of(const layer &l, int32_t e, int32_t r) { // -1: r has nothing of e
  switch (e % 5) {
  case 0: return r;
  case 1: return r == e % l.R ? 0 : -1;
  case 2: return 0;
  case 3: return e % 2 && r > 1 ? -1 : (r + 1) % std::min(2, l.R);
  default: return -1;
  }
}

// The slots that rank r computes, -1 in place of the others' experts.
std::vector<int32_t> computed_by(const layer &l, int32_t r, const std::vector<int32_t> &expert) {
  std::vector<int32_t> own(expert.size(), -1), home(expert.size(), -1), copy(expert.size());
  for (int32_t e = 0; e < l.E; e++) {
    if (copy_of(l, e, r) < 0) continue;
    ms_reference_deal(expert.data(), home.data(), (int64_t)expert.size(), e, copies_of(l, e), copy.data());
    for (size_t s = 0; s < expert.size(); s++)
      if (copy[s] == copy_of(l, e, r)) own[s] = e;
  }
  return own;
}

// What one rank's router and model hand to the layer.
struct rank_input {
  int64_t tokens = 0;
  std::vector<int32_t> expert; // [T*K], -1 beyond the tokens
  std::vector<float> weight;   // [T*K] as float after its dtype, 0 where there is no expert
  std::vector<int64_t> index;  // what is handed over
  std::vector<char> hidden, weights;
};

rank_input input_of(const layer &l, int32_t r, uint64_t seed) {
  rank_input in;
  in.tokens = tokens_of(l, r);
  if (l.replicated) r = 0; // the same on all
  for (int64_t s = 0; s < (int64_t)l.T * l.K; s++) {
    bool absent = s >= in.tokens * l.K;
    int32_t e = absent ? -1 : choice(l, seed * 16 + (uint64_t)r, s);
    float w = element(seed * 16 + (uint64_t)r + 7777, (uint64_t)s);
    in.expert.push_back(e);
    in.weight.push_back(e < 0 ? 0.f : rounded(l.weight_dtype, w));
    if (absent) continue;
    in.index.push_back(e);
    put(l.weight_dtype, in.weights, e < 0 ? NAN : w); // weights of slots without an expert are not looked at
  }
  for (int64_t i = 0; i < in.tokens * l.D; i++)
    put(l.dtype, in.hidden, element(seed * 16 + (uint64_t)r + 5555, (uint64_t)i));
  return in;
}

// ms_digest_of in step2_gather.cuh, summed.
uint64_t digest_of(const rank_input &in) {
  uint64_t sum = 0;
  for (size_t s = 0; s < in.expert.size(); s++) {
    uint32_t bits;
    memcpy(&bits, &in.weight[s], 4);
    uint64_t x = (uint64_t)(uint32_t)in.expert[s] << 32 | bits;
    x ^= s * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
    sum += x ^ (x >> 33);
  }
  return sum;
}

// A workspace, and what the host knows of it.
struct fixture {
  device_memory memory;
  ms_cuda_shape shape = {};
  ms_cuda_view view = {};
  ms_cuda_layout *layout = nullptr; // as long as nobody became a rank
  ms_cuda_faults *faults = nullptr;
  cudaStream_t stream = nullptr;
  ms_error err = {};

  explicit fixture(const layer &l) {
    int device = 0, sms = 0;
    MUST(cudaGetDevice(&device));
    MUST(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    shape.T = l.T, shape.R = l.R, shape.K = l.K, shape.E = l.E, shape.D = l.D, shape.F = 64;
    shape.dtype = l.dtype, shape.math = l.dtype == MS_F32 ? MS_CUDA_FMA : MS_CUDA_MMA, shape.sms = l.sms ? l.sms : sms;
    shape.in_place = l.in_place, shape.replicated = l.replicated;
    MUST_OK(ms_cuda_shape_plan(&shape, &err));
    size_t bytes = sizeof(ms_cuda_faults) + (size_t)l.R * sizeof(ms_cuda_header);
    MUST(cudaMallocHost((void **)&faults, bytes));
    memset(faults, 0, bytes);
    MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    ms_cuda_experts experts = {};
    experts.seen = (unsigned long long *)memory.take((l.E + 1) * 8);
    MUST(cudaMemset(experts.seen, 0, (size_t)(l.E + 1) * 8));
    char *workspace = memory.take(shape.workspace_bytes);
    view = ms_cuda_view_of(&shape, &experts, workspace, nullptr, faults);
    MUST(cudaMemset(view.tickets, 0, 4 * MS_CUDA_TICKETS)); // as the engine does once
    MUST(cudaDeviceSynchronize());
  }
  ~fixture() {
    ms_cuda_layout_free(layout);
    cudaStreamDestroy(stream);
    cudaFreeHost(faults);
  }

  ms_cuda_header header(const layer &l, int64_t tokens) const {
    ms_cuda_header h = {};
    h.call = 17, h.layer = 3, h.T = tokens, h.D = l.D, h.K = l.K, h.E = l.E, h.dtype = (int32_t)l.dtype;
    h.replicated = l.replicated;
    return h;
  }

  // One rank's gather, with the header that it claims.
  void pack(const layer &l, int32_t r, const rank_input &in, const ms_cuda_header &header) {
    std::vector<char> shifted((size_t)l.misaligned * (size_t)ms_dtype_size(l.dtype), 0);
    size_t skip = shifted.size();
    shifted.insert(shifted.end(), in.hidden.begin(), in.hidden.end());
    std::vector<int32_t> narrow(in.index.begin(), in.index.end());
    char *hidden = in.tokens ? memory.copy(shifted) + skip : nullptr;
    char *index = !in.tokens ? nullptr : l.index_dtype == MS_I64 ? memory.copy(in.index) : memory.copy(narrow);
    char *weights = in.tokens ? memory.copy(in.weights) : nullptr;
    MUST(cudaDeviceSynchronize()); // copies from pageable memory are on another stream
    shape.rank = r;
    MUST_OK(ms_cuda_gather_pack(&shape, &view, &header, hidden, index, l.index_dtype, weights, l.weight_dtype, stream,
                                &err));
  }
  // Be rank r.
  void become(const layer &l, int32_t r) {
    std::vector<int32_t> copies, copy;
    ms_cuda_layout_free(layout);
    for (int32_t e = 0; e < l.E; e++) copies.push_back(copies_of(l, e)), copy.push_back(copy_of(l, e, r));
    MUST_OK(ms_cuda_layout_create(l.E, copies.data(), copy.data(), 0, &layout, &err));
  }
  void group() { MUST_OK(ms_cuda_group(&shape, &view, layout, stream, &err)); }
  void wait() { MUST(cudaStreamSynchronize(stream)); }
};

int failures = 0;
void report(const std::string &name, const std::string &wrong) {
  printf("%-4s %s%s%s\n", wrong.empty() ? "ok" : "FAIL", name.c_str(), wrong.empty() ? "" : ": ", wrong.c_str());
  fflush(stdout);
  failures += !wrong.empty();
}

bool same(const ms_cuda_header &a, const ms_cuda_header &b) { // but for the padding
  return a.call == b.call && a.digest == b.digest && a.layer == b.layer && a.T == b.T && a.first == b.first &&
         a.D == b.D && a.K == b.K && a.E == b.E && a.dtype == b.dtype && a.replicated == b.replicated &&
         a.fault == b.fault && a.fault_index == b.fault_index && a.fault_at == b.fault_at;
}

template <typename T>
std::string differ(const char *what, const std::vector<T> &got, const std::vector<T> &expected) {
  for (size_t i = 0; i < expected.size(); i++)
    if (i >= got.size() || memcmp(&got[i], &expected[i], sizeof(T)) != 0) {
      char text[160];
      snprintf(text, sizeof text, "%s[%zu of %zu] is %g, expected %g", what, i, expected.size(),
               i < got.size() ? (double)got[i] : NAN, (double)expected[i]);
      return text;
    }
  return "";
}
#define SAME(what, got, expected)                                                                                      \
  do {                                                                                                                 \
    std::string wrong_here = differ(what, got, expected);                                                              \
    if (!wrong_here.empty()) return wrong_here;                                                                        \
  } while (0)

// ---- gather --------------------------------------------------------------------------------------------------------

std::string check_message(const layer &l, fixture &f, int32_t r, const rank_input &in) {
  const ms_cuda_shape &s = f.shape;
  const char *at = f.view.messages + r * s.message_bytes;
  ms_cuda_header expected = f.header(l, in.tokens), got = read<ms_cuda_header>(at, 1)[0];
  if (l.replicated) {
    expected.digest = digest_of(in);
    at = f.view.messages;
  }
  if (!same(got, expected)) return "the header is not what was given";
  SAME("expert", read<int32_t>(at + s.expert_at, s.T * l.K), in.expert);
  SAME("weight", read<float>(at + s.weight_at, s.T * l.K), in.weight);
  if (s.in_place) return "";
  int64_t row = l.D * ms_dtype_size(l.dtype), ld = s.ld_x * ms_dtype_size(l.dtype);
  std::vector<char> hidden = read<char>(at + s.hidden_at, in.tokens * ld), padded;
  for (int64_t t = 0; t < in.tokens; t++) {
    padded.insert(padded.end(), in.hidden.begin() + t * row, in.hidden.begin() + (t + 1) * row);
    padded.resize((size_t)((t + 1) * ld), 0);
  }
  SAME("hidden", hidden, padded);
  return "";
}

// ---- group ---------------------------------------------------------------------------------------------------------

std::string check_group(const layer &l, fixture &f, const std::vector<int32_t> &expert) {
  const ms_cuda_shape &s = f.shape;
  std::vector<int64_t> offset((size_t)l.E + 1);
  std::vector<int32_t> order((size_t)s.slots + 1);
  ms_reference_group(expert.data(), s.slots, l.E, offset.data(), order.data());
  order.resize((size_t)offset.back());
  SAME("offset", read<int32_t>(f.view.offset, l.E + 1), (std::vector<int32_t>(offset.begin(), offset.end())));
  SAME("order", read<int32_t>(f.view.order, (int64_t)order.size()), order);
  std::vector<int32_t> tiles;
  for (int32_t e = 0; e < l.E; e++)
    for (int64_t row = offset[(size_t)e], end = offset[(size_t)e + 1]; row < end; row += s.tile_rows) {
      tiles.push_back(e);
      tiles.push_back((int32_t)row);
      tiles.push_back((int32_t)std::min<int64_t>(s.tile_rows, end - row));
    }
  SAME("tile_count", read<int32_t>(f.view.tile_count, 1), (std::vector<int32_t>{(int32_t)(tiles.size() / 3)}));
  if ((int64_t)tiles.size() > 3 * (int64_t)s.max_tiles) return "more tiles than max_tiles";
  SAME("tiles", read<int32_t>(f.view.tiles, (int64_t)tiles.size()), tiles);
  if (f.faults->found) return "a fault was told of";
  return "";
}

// ---- combine -------------------------------------------------------------------------------------------------------

std::vector<char> bytes_of(ms_dtype dtype, const std::vector<float> &x) {
  std::vector<char> bytes;
  for (float value : x) put(dtype, bytes, value);
  return bytes;
}

std::string check_combine(const layer &l, fixture &f, const std::vector<int32_t> &expert, uint64_t seed) {
  const ms_cuda_shape &s = f.shape;
  std::vector<float> slot((size_t)(s.slots * l.D), NAN), sum((size_t)(s.N * l.D), 0.f);
  for (int64_t i = 0; i < s.slots * l.D; i++) {
    if (expert[(size_t)(i / l.D)] < 0) continue; // ffn leaves these as they are
    slot[(size_t)i] = element(seed + 99, (uint64_t)i);
  }
  for (int64_t n = 0; n < s.N; n++)
    for (int32_t d = 0; d < l.D; d++) {
      bool any = false;
      float &total = sum[(size_t)(n * l.D + d)];
      for (int64_t j = n * l.K; j < (n + 1) * l.K; j++) {
        if (expert[(size_t)j] < 0) continue;
        total = any ? total + slot[(size_t)(j * l.D + d)] : slot[(size_t)(j * l.D + d)];
        any = true;
      }
    }
  if (!slot.empty()) MUST(cudaMemcpy(f.view.slot, slot.data(), slot.size() * 4, cudaMemcpyHostToDevice));
  int64_t tokens = tokens_of(l, 0);
  char *out = f.memory.take(tokens * l.D * ms_dtype_size(l.dtype));
  MUST(cudaDeviceSynchronize());
  ms_error err = {};
  MUST_OK(ms_cuda_combine(&f.shape, &f.view, tokens, out, f.stream, &err));
  std::vector<float> own(sum.begin(), sum.begin() + tokens * l.D); // rank 0's
  if (l.R > 1) {
    f.wait();
    SAME("partial", read<float>(f.view.partial, s.N * l.D), sum);
    MUST_OK(ms_cuda_combine_round(&f.shape, f.view.partial, tokens, out, f.stream, &err));
  }
  f.wait();
  SAME("out", read<char>(out, tokens * l.D * ms_dtype_size(l.dtype)), bytes_of(l.dtype, own));
  return "";
}

// All steps of one batch, as rank `me` where tables are copied.
std::string check_batch(const layer &l, fixture &f, int32_t me, uint64_t seed, std::vector<unsigned long long> &seen) {
  std::vector<int32_t> expert;
  std::vector<rank_input> in;
  for (int32_t r = 0; r < l.R; r++) {
    in.push_back(input_of(l, r, seed));
    f.pack(l, r, in.back(), f.header(l, in.back().tokens));
    if (r == 0 || !l.replicated) expert.insert(expert.end(), in.back().expert.begin(), in.back().expert.end());
  }
  f.wait();
  for (int32_t r = 0; r < l.R; r++)
    if (std::string wrong = check_message(l, f, r, in[(size_t)r]); !wrong.empty()) return wrong;
  f.group();
  f.wait();
  for (int32_t e : expert)
    if (e >= 0) seen[(size_t)e]++;
  for (int32_t r = 0; r < (l.replicated ? 1 : l.R); r++) seen.back() += (unsigned long long)(tokens_of(l, r) * l.K);
  SAME("seen", read<unsigned long long>(f.view.seen, l.E + 1), seen);
  if (l.copied) expert = computed_by(l, me, expert);
  if (std::string wrong = check_group(l, f, expert); !wrong.empty()) return wrong;
  return check_combine(l, f, expert, seed);
}

std::string check_steps(const layer &l) {
  fixture f(l);
  std::vector<unsigned long long> seen((size_t)l.E + 1);
  for (uint64_t round = 1; round <= 2; round++) // the second finds what the first left in the workspace
    for (int32_t me = 0; me < (l.copied ? l.R : 1); me++) {
      if (l.copied) f.become(l, me);
      if (std::string wrong = check_batch(l, f, me, round, seen); !wrong.empty()) return wrong;
    }
  return "";
}

// A graph of group replayed with other routing, on a workspace as the replay before left it.
std::string check_replays(const layer &l) {
  fixture f(l);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  MUST(cudaStreamBeginCapture(f.stream, cudaStreamCaptureModeThreadLocal));
  f.group();
  MUST(cudaStreamEndCapture(f.stream, &graph));
  MUST(cudaGraphInstantiate(&exec, graph, 0));
  std::string wrong;
  for (uint64_t round = 1; round <= 3 && wrong.empty(); round++) {
    rank_input in = input_of(l, 0, round);
    f.pack(l, 0, in, f.header(l, l.T));
    MUST(cudaGraphLaunch(exec, f.stream));
    f.wait();
    wrong = check_group(l, f, in.expert);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return wrong;
}

// ---- faults --------------------------------------------------------------------------------------------------------

// `spoil` makes rank 1 of 3 wrong, in its routing or in its header; `expected` is then rank 1's header.
template <typename Spoil>
void check_fault(const char *name, int32_t E, int32_t T, Spoil spoil, bool replicated = false) {
  layer l = {3, T, 16, 2, E, HOLES};
  l.replicated = replicated;
  fixture f(l);
  ms_cuda_header expected = {};
  for (int32_t r = 0; r < l.R; r++) {
    rank_input in = input_of(l, r, 1);
    ms_cuda_header given = f.header(l, in.tokens);
    expected = given;
    if (r == 1) spoil(in, given, expected);
    if (given.replicated) expected.digest = digest_of(in);
    f.pack(l, r, in, given);
    if (r == 1) {
      f.wait();
      ms_cuda_header got = read<ms_cuda_header>(f.view.messages + f.shape.message_bytes, 1)[0];
      if (!same(got, expected)) return report(name, "the header does not tell of the fault");
    }
  }
  f.group();
  f.wait();
  if (read<int32_t>(f.view.tile_count, 1)[0] != -1) return report(name, "there are tiles");
  for (unsigned long long count : read<unsigned long long>(f.view.seen, E + 1))
    if (count) return report(name, "slots of a call with a fault were counted");
  MUST(cudaMemset(f.view.slot, 0, (size_t)(f.shape.slots * l.D) * 4));
  MUST(cudaMemset(f.view.partial, 0, (size_t)(f.shape.N * l.D) * 4));
  MUST(cudaDeviceSynchronize());
  ms_error err = {};
  MUST_OK(ms_cuda_combine(&f.shape, &f.view, T, nullptr, f.stream, &err));
  f.wait();
  for (float x : read<float>(f.view.partial, f.shape.N * l.D))
    if (!std::isnan(x)) return report(name, "an output of a call with a fault is not NaN");
  if (!f.faults->found) return report(name, "the host was not told");
  for (int32_t r = 0; r < l.R; r++) {
    ms_cuda_header gathered = read<ms_cuda_header>(f.view.messages + r * f.shape.message_bytes, 1)[0];
    if (!same(f.faults->headers[r], gathered)) return report(name, "the host was told otherwise");
  }
  // The next batch on this workspace computes again.
  f.faults->found = 0;
  std::vector<int32_t> expert;
  for (int32_t r = 0; r < l.R; r++) {
    rank_input in = input_of(l, r, 2);
    f.pack(l, r, in, f.header(l, in.tokens));
    if (r == 0 || !l.replicated) expert.insert(expert.end(), in.expert.begin(), in.expert.end());
  }
  f.group();
  f.wait();
  report(name, check_group(l, f, expert));
}

void shorten(rank_input &in, int32_t K) { // by a token, which is absent then
  for (int32_t j = 0; j < K; j++) in.expert[in.expert.size() - 1 - (size_t)j] = -1;
  for (int32_t j = 0; j < K; j++) in.weight[in.weight.size() - 1 - (size_t)j] = 0.f;
}
void set_weight(rank_input &in, size_t slot, float x) { memcpy(in.weights.data() + slot * 4, &x, 4); }

void check_faults() {
  for (int32_t E : {8, 2048}) // one block sorts, many do
    for (int32_t T : {40, 3000}) {
      if (E == 2048 && T == 3000) continue;
      auto bad_index = [&](int64_t value, int32_t shown) {
        return [=](rank_input &in, ms_cuda_header &, ms_cuda_header &expected) {
          in.index[7] = value;
          in.index[33] = E + 5; // later: not what is told of
          set_weight(in, 3, NAN);
          in.index[3] = 1; // an index is wrong before a weight is
          expected.fault = MS_CUDA_BAD_INDEX, expected.fault_at = 7, expected.fault_index = shown;
        };
      };
      check_fault("an index of E", E, T, bad_index(E, E));
      check_fault("an index of -2", E, T, bad_index(-2, -2));
      check_fault("an index that int32 cannot hold", E, T, bad_index(int64_t(1) << 32, INT32_MAX));
      for (float x : {(float)NAN, (float)INFINITY, -(float)INFINITY})
        check_fault("a weight that is not finite", E, T,
                    [=](rank_input &in, ms_cuda_header &, ms_cuda_header &expected) {
                      in.index[9] = in.index[60] = 2;
                      set_weight(in, 9, x);
                      set_weight(in, 60, x);
                      expected.fault = MS_CUDA_BAD_WEIGHT, expected.fault_at = 9, expected.fault_index = 2;
                    });
      check_fault("another call", E, T, [](rank_input &, ms_cuda_header &h, ms_cuda_header &x) { x.call = ++h.call; });
      check_fault("another layer", E, T,
                  [](rank_input &, ms_cuda_header &h, ms_cuda_header &x) { x.layer = ++h.layer; });
      check_fault("another dtype", E, T,
                  [](rank_input &, ms_cuda_header &h, ms_cuda_header &x) { x.dtype = ++h.dtype; });
      check_fault("another D", E, T, [](rank_input &, ms_cuda_header &h, ms_cuda_header &x) { x.D = ++h.D; });
      check_fault("another E", E, T, [](rank_input &, ms_cuda_header &h, ms_cuda_header &x) { x.E = ++h.E; });
      check_fault("another K", E, T, [](rank_input &, ms_cuda_header &h, ms_cuda_header &x) { x.K = ++h.K; });
      check_fault("replicated", E, T,
                  [](rank_input &, ms_cuda_header &h, ms_cuda_header &x) { x.replicated = h.replicated = 1; });
    }
  for (int32_t T : {40, 5000}) {
    check_fault("replicated: another number of tokens", 8, T,
                [](rank_input &in, ms_cuda_header &h, ms_cuda_header &x) { x.T = --h.T, in.tokens--, shorten(in, 2); },
                true);
    check_fault("replicated: other choices", 8, T,
                [](rank_input &in, ms_cuda_header &, ms_cuda_header &) {
                  in.index[4] = in.expert[4] = 1, in.index[5] = in.expert[5] = 2;
                  in.weight[4] = in.weight[5] = 0.5f;
                  set_weight(in, 4, 0.5f), set_weight(in, 5, 0.5f);
                },
                true);
    check_fault("replicated: another weight", 8, T,
                [](rank_input &in, ms_cuda_header &, ms_cuda_header &) {
                  in.index[4] = in.expert[4] = 1;
                  in.weight[4] = 3.f;
                  set_weight(in, 4, 3.f);
                },
                true);
  }
}

// A shape whose rows kernels could not reach is refused; one that just fits is not.
void check_reach() {
  auto as_expected = [](int64_t T, int64_t D, int64_t F, int32_t K, int32_t R, bool in_place, const char *text) {
    ms_cuda_shape s = {};
    s.T = T, s.R = R, s.K = K, s.E = 8, s.D = D, s.F = F, s.dtype = MS_BF16, s.math = MS_CUDA_MMA, s.sms = 100;
    s.in_place = in_place;
    ms_error err = {};
    ms_status status = ms_cuda_shape_plan(&s, &err);
    return text ? status == MS_ESHAPE && strstr(err.msg, text) != nullptr : status == MS_OK;
  };
  const int64_t M = 1 << 20;
  bool ok = as_expected(4 * M, 8192, 64, 1, 1, true, nullptr) &&                  // 64 GiB of hidden states in place
            as_expected(4 * M + 1, 8192, 64, 1, 1, true, "68719493120 bytes") &&  // a token more
            as_expected(4 * M, 8192, 64, 1, 1, false, "bytes of hidden states") && // with header and routing
            as_expected(M, 8192, 64, 1, 4, false, "bytes of hidden states") &&     // of 4 ranks
            as_expected(M, 64, 8192, 4, 1, true, nullptr) &&                      // 64 GiB of H
            as_expected(M + 1, 64, 8192, 4, 1, true, "between the two matrices") &&
            as_expected(int64_t(1) << 32, 8, 8, 0, 1, true, "tokens");
  report("shapes that kernels do not reach are refused", ok ? "" : "not so");
}

// ---- time ----------------------------------------------------------------------------------------------------------

// Microseconds of one `step`, from graphs of REPEATS steps.
template <typename Step> double microseconds(cudaStream_t stream, Step step) {
  enum { REPEATS = 20, SAMPLES = 21 };
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  MUST(cudaEventCreate(&begin));
  MUST(cudaEventCreate(&end));
  step(); // what is done once is done before
  MUST(cudaStreamSynchronize(stream));
  MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < REPEATS; i++) step();
  MUST(cudaStreamEndCapture(stream, &graph));
  MUST(cudaGraphInstantiate(&exec, graph, 0));
  std::vector<float> times;
  for (int i = 0; i < SAMPLES; i++) {
    float ms = 0;
    MUST(cudaEventRecord(begin, stream));
    MUST(cudaGraphLaunch(exec, stream));
    MUST(cudaEventRecord(end, stream));
    MUST(cudaEventSynchronize(end));
    MUST(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return 1000. * times[SAMPLES / 2] / REPEATS;
}

void time_steps() {
  cudaDeviceProp properties;
  MUST(cudaGetDeviceProperties(&properties, 0));
  printf("%s, %d multiprocessors; microseconds, D=768 bfloat16, one rank\n", properties.name,
         properties.multiProcessorCount);
  printf("%8s %6s %3s %5s | %9s %9s %9s %9s\n", "slots", "E", "K", "rows", "route", "pack", "group", "combine");
  for (int32_t slots : {120, 4096, 65536})
    for (int32_t E : {8, 128, 2048})
      for (int32_t K : {1, 2}) {
        double us[4] = {0};
        int32_t rows = 0;
        std::string wrong;
        for (bool in_place : {true, false}) {
          layer l = {1, slots / K, 768, K, E, EVEN};
          l.in_place = in_place;
          fixture f(l);
          rank_input in = input_of(l, 0, 1);
          f.pack(l, 0, in, f.header(l, l.T));
          f.wait();
          ms_cuda_header header = f.header(l, l.T);
          char *hidden = f.memory.copy(in.hidden), *index = f.memory.copy(in.index),
               *weight = f.memory.copy(in.weights);
          char *out = f.memory.take(2 * (int64_t)in.hidden.size());
          MUST(cudaDeviceSynchronize());
          us[in_place ? 0 : 1] = microseconds(f.stream, [&] {
            ms_error err = {};
            MUST_OK(
                ms_cuda_gather_pack(&f.shape, &f.view, &header, hidden, index, MS_I64, weight, MS_F32, f.stream, &err));
          });
          if (!in_place) continue;
          us[2] = microseconds(f.stream, [&] { f.group(); });
          if (wrong = check_group(l, f, in.expert); !wrong.empty()) break;
          us[3] = microseconds(f.stream, [&] {
            ms_error err = {};
            MUST_OK(ms_cuda_combine(&f.shape, &f.view, l.T, out, f.stream, &err));
          });
          rows = f.shape.tile_rows;
        }
        if (!wrong.empty()) {
          report("group", wrong);
          continue;
        }
        printf("%8d %6d %3d %5d | %9.2f %9.2f %9.2f %9.2f\n", slots, E, K, rows, us[0], us[1], us[2], us[3]);
        fflush(stdout);
      }
}

void repeat(int count) {
  for (int32_t E : {64, 2048}) {
    layer l = {1, 20000, 16, 4, E, SKEWED};
    fixture f(l);
    rank_input in = input_of(l, 0, 1);
    int other = 0;
    std::vector<int32_t> first;
    for (int i = 0; i < count; i++) {
      MUST(cudaMemsetAsync(f.view.order, 0xff, (size_t)f.shape.slots * 4, f.stream));
      if (i == 0) f.pack(l, 0, in, f.header(l, l.T));
      f.group();
      f.wait();
      std::vector<int32_t> order = read<int32_t>(f.view.order, f.shape.slots);
      if (i == 0)
        first = order;
      else
        other += order != first;
    }
    std::string wrong = check_group(l, f, in.expert);
    if (other) wrong = std::to_string(other) + " of " + std::to_string(count) + " runs differ";
    report("repeated: " + name_of(l), wrong);
  }
}

const layer layers[] = {
    // R, T, D, K, E
    {1, 7, 32, 1, 1, EVEN, MS_F32},
    {1, 1, 64, 1, 3, EVEN, MS_BF16, MS_I32, MS_BF16},
    {1, 64, 96, 2, 8, EVEN, MS_F16, MS_I64, MS_F16},
    {1, 130, 37, 2, 8, HOLES, MS_BF16},
    {1, 130, 37, 3, 8, HOLES, MS_F32},
    {1, 130, 64, 2, 8, HOLES, MS_BF16, MS_I32, MS_F32, 1},
    {1, 130, 64, 2, 8, HOLES, MS_F32, MS_I32, MS_F32, 1},
    {1, 64, 32, 4, 64, SKEWED, MS_F16, MS_I32, MS_BF16},
    {1, 33, 16, 64, 64, HOLES, MS_BF16},
    {1, 50, 40, 1, 2048, EVEN, MS_BF16},
    {1, 128, 16, 1, 8, ONE, MS_BF16},
    {1, 127, 16, 1, 8, ONE, MS_BF16},
    {1, 129, 16, 1, 1, ONE, MS_BF16},
    {1, 64, 16, 2, 8, NONE, MS_BF16},
    {1, 64, 64, 2, 8, HOLES, MS_BF16, MS_I64, MS_F32, 0, true},
    {1, 0, 64, 2, 8, EVEN, MS_BF16},
    {1, 9, 64, 0, 8, EVEN, MS_BF16},
    {2, 7, 64, 1, 3, HOLES, MS_BF16},
    {2, 60, 40, 2, 8, SKEWED, MS_F16},
    {3, 64, 36, 1, 64, HOLES, MS_F32},
    {3, 70, 37, 4, 8, HOLES, MS_BF16},
    {3, 4, 32, 2, 8, EVEN, MS_BF16}, // ranks 1 and 2 have no tokens
    {3, 50, 37, 2, 8, HOLES, MS_BF16, MS_I64, MS_F32, 0, false, true},
    {2, 50, 64, 1, 8, HOLES, MS_F32, MS_I64, MS_F32, 0, true, true},
    {2, 3000, 8, 3, 64, HOLES, MS_F16, MS_I64, MS_BF16, 0, false, true},
    // sorted by many blocks
    {1, 4099, 8, 2, 8, SKEWED, MS_BF16},
    {1, 9000, 8, 1, 64, HOLES, MS_BF16},
    {3, 1500, 8, 2, 2048, EVEN, MS_BF16},
    {1, 300, 8, 2, 1025, EVEN, MS_BF16},
    {1, 700, 8, 1, 65536, EVEN, MS_BF16},
    {1, 700, 8, 1, 65536, EVEN, MS_BF16, MS_I64, MS_F32, 0, false, false, 3}, // shares of many rounds
    {1, 33500, 8, 2, 64, HOLES, MS_BF16, MS_I64, MS_F32, 0, false, false, 2}, // more chunks than blocks
    {1, 4500, 8, 2, 8, EVEN, MS_BF16, MS_I64, MS_F32, 0, false, false, 1},    // a block alone
    // each rank computes its share
    {1, 64, 32, 2, 10, HOLES, MS_BF16, MS_I64, MS_F32, 0, false, false, 0, true},
    {2, 60, 40, 2, 8, SKEWED, MS_F16, MS_I64, MS_F32, 0, false, false, 0, true},
    {3, 64, 36, 1, 5, EVEN, MS_F32, MS_I32, MS_F32, 0, false, false, 0, true},
    {4, 37, 16, 2, 64, HOLES, MS_BF16, MS_I64, MS_F32, 0, false, false, 0, true},
    {3, 4, 32, 2, 8, EVEN, MS_BF16, MS_I64, MS_F32, 0, false, false, 0, true}, // ranks 1 and 2 have no tokens
    {3, 130, 16, 1, 4, ONE, MS_BF16, MS_I64, MS_F32, 0, false, false, 0, true},
    {4, 50, 32, 2, 8, HOLES, MS_BF16, MS_I64, MS_F32, 0, true, true, 0, true},
    {2, 3000, 8, 2, 8, SKEWED, MS_BF16, MS_I64, MS_F32, 0, false, false, 0, true}, // many blocks
    {2, 3000, 8, 2, 64, HOLES, MS_BF16, MS_I64, MS_F32, 0, false, false, 3, true},
    {3, 2000, 8, 2, 2048, EVEN, MS_F16, MS_I64, MS_F32, 0, false, true, 0, true},
    {2, 300, 8, 1, 5000, EVEN, MS_BF16, MS_I64, MS_F32, 0, false, false, 2, true}, // shares of many rounds
    // on both sides of where the ways part
    {1, 4096, 8, 2, 1024, EVEN, MS_BF16},
    {1, 256, 8, 1, 1024, ONE, MS_BF16},
};

} // namespace

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "--time") == 0) {
    time_steps();
  } else if (argc > 2 && strcmp(argv[1], "--repeat") == 0) {
    repeat(atoi(argv[2]));
  } else {
    for (const layer &l : layers)
      if (argc < 2 || name_of(l).find(argv[1]) != std::string::npos) report(name_of(l), check_steps(l));
    for (int32_t T : {50, 5000}) { // one block sorts, many do
      layer l = {1, T, 8, 2, 64, HOLES};
      if (argc < 2) report("graph: " + name_of(l), check_replays(l));
    }
    if (argc < 2) check_faults();
    if (argc < 2) check_reach();
  }
  printf(failures ? "%d FAILED\n" : "all ok\n", failures);
  return failures != 0;
}
