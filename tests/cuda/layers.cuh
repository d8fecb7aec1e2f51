// layers.cuh - whole layers on the device, for test_engine.cu and test_counts.cu: weights and batches that are hashes
// of their position, packed experts, and several ranks as threads on one device, with an exchange of events and copies
// in place of NCCL.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_TESTS_LAYERS_CUH
#define MS_TESTS_LAYERS_CUH

#include "../../cuda/moeshard_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
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

__host__ __device__ inline uint32_t hash(uint64_t seed, uint64_t i) {
  uint64_t x = seed * 0x9e3779b97f4a7c15ull + i;
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return (uint32_t)(x >> 32);
}
// In -1..1, a multiple of 1/64: exact in all three dtypes.
__host__ __device__ inline float element(uint64_t seed, uint64_t i) {
  return (float)((int)(hash(seed, i) % 129) - 64) / 64.f;
}

std::vector<float> elements(uint64_t seed, int64_t count, float scale = 1) {
  std::vector<float> x((size_t)count);
  for (int64_t i = 0; i < count; i++) x[(size_t)i] = scale * element(seed, (uint64_t)i);
  return x;
}

std::vector<char> narrowed(ms_dtype dtype, const std::vector<float> &x) {
  std::vector<char> to(x.size() * (size_t)ms_dtype_size(dtype));
  for (size_t i = 0; i < x.size(); i++) {
    __nv_bfloat16 b = __float2bfloat16_rn(x[i]);
    __half h = __float2half_rn(x[i]);
    if (dtype == MS_F32) memcpy(&to[4 * i], &x[i], 4);
    if (dtype == MS_BF16) memcpy(&to[2 * i], &b, 2);
    if (dtype == MS_F16) memcpy(&to[2 * i], &h, 2);
  }
  return to;
}

std::vector<float> widened(ms_dtype dtype, const std::vector<char> &from) {
  std::vector<float> x(from.size() / (size_t)ms_dtype_size(dtype));
  for (size_t i = 0; i < x.size(); i++) {
    __nv_bfloat16 b;
    __half h;
    if (dtype == MS_F32) memcpy(&x[i], &from[4 * i], 4);
    if (dtype == MS_BF16) memcpy(&b, &from[2 * i], 2), x[i] = __bfloat162float(b);
    if (dtype == MS_F16) memcpy(&h, &from[2 * i], 2), x[i] = __half2float(h);
  }
  return x;
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
    put(at, from);
    return at;
  }
  template <typename T> void put(void *at, const std::vector<T> &from) {
    if (!from.empty()) MUST(cudaMemcpy(at, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~device_memory() {
    for (void *at : all) cudaFree(at);
  }
};

std::vector<char> read(const void *from, int64_t bytes) {
  std::vector<char> to((size_t)bytes);
  if (bytes > 0) MUST(cudaMemcpy(to.data(), from, (size_t)bytes, cudaMemcpyDeviceToHost));
  return to;
}

int failures = 0;
const char *wanted = "";
void report(const std::string &name, const std::string &wrong, const std::string &more = "") {
  printf("%-4s %s%s%s%s\n", wrong.empty() ? "ok" : "FAIL", name.c_str(), more.c_str(), wrong.empty() ? "" : ": ",
         wrong.c_str());
  fflush(stdout);
  failures += !wrong.empty();
}

// ---- layers --------------------------------------------------------------------------------------------------------

enum routing { EVEN, SKEWED, ONE, HOLES, NONE };

struct layer {
  int32_t T, D, F, K, E;
  routing route = EVEN;
  ms_dtype dtype = MS_BF16;
  ms_activation activation = MS_RELU;
  bool gated = false, biased = false, ragged = false;
  int32_t R = 1, chunks = 1;
  bool replicated = false, tf32 = false;
  bool copied = false; // experts with copies, without, on one rank, pruned: columns_of
};

std::string name_of(const layer &l) {
  static const char *const routes[] = {"even", "skewed", "one expert", "holes", "no expert"};
  static const char *const activations[] = {"identity", "relu", "gelu", "gelu_tanh", "silu", "clamped_swiglu"};
  char text[200];
  snprintf(text, sizeof text, "%s T=%d D=%d F=%d K=%d E=%d %s %s%s%s%s R=%d chunks=%d%s%s",
           l.tf32 ? "tf32" : ms_dtype_name(l.dtype), l.T, l.D, l.F, l.K, l.E, routes[l.route],
           activations[l.activation], l.gated ? " gated" : "", l.biased ? " biased" : "", l.ragged ? " ragged" : "", l.R,
           l.chunks, l.replicated ? " replicated" : "", l.copied ? " copied" : "");
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

// Weights scaled so that values stay near 1 through the layer. Multiples of powers of two: exact in all dtypes.
struct model {
  layer l;
  std::vector<float> w_in, w_out, b_in, b_out;
  explicit model(const layer &of) : l(of) {
    int64_t rows = l.gated ? 2 * l.F : l.F;
    float in = exp2f(-floorf(log2f((float)l.D) / 2)), out = exp2f(-floorf(log2f((float)l.F) / 2));
    w_in = elements(1, l.E * rows * l.D, in);
    w_out = elements(2, (int64_t)l.E * l.D * l.F, out);
    if (l.biased) b_in = elements(3, l.E * rows), b_out = elements(4, (int64_t)l.E * l.D);
  }
};

int64_t start_of(const layer &l, int32_t e, int32_t r) { // near-equal slices; ragged: ranks hold very different ones
  if (!l.ragged) return (int64_t)l.F * r / l.R;
  return r == 0 ? 0 : r == l.R ? l.F : std::min<int64_t>(l.F, (int64_t)l.F * r / l.R + (e * 13) % (l.F / l.R + 1));
}

// The columns [start, stop) that rank r holds. Copied tables, by expert: whole on every rank; whole on one; cut over
// all; twice, on the first rank and the last or (4 ranks) cut over two pairs; pruned.
struct columns {
  int64_t start, stop;
};
columns columns_of(const layer &l, int32_t e, int32_t r) {
  columns cut = {start_of(l, e, r), start_of(l, e, r + 1)}, whole = {0, l.F}, none = {0, 0};
  if (!l.copied || e % 5 == 2) return cut;
  int64_t inner = l.F / (2 + r / 2); // other pairs cut elsewhere
  switch (e % 5) {
  case 0: return whole;
  case 1: return r == e % l.R ? whole : none;
  case 3: return l.R == 4 ? (r % 2 ? columns{inner, l.F} : columns{0, inner}) : r == 0 || r == l.R - 1 ? whole : none;
  default: return none;
  }
}
int32_t copies_of(const layer &l, int32_t e) {
  return !l.copied ? 1 : e % 5 == 0 ? l.R : e % 5 == 3 ? std::min(2, l.R) : e % 5 != 4;
}

// What the CPU's layout makes of that table; NULL for one without copies.
ms_cuda_layout *layout_of(const layer &l, int32_t rank) {
  if (!l.copied) return nullptr;
  ms_error err = {};
  std::vector<int64_t> table;
  std::vector<int32_t> copies, copy;
  for (int32_t r = 0; r < l.R; r++)
    for (int32_t e = 0; e < l.E; e++) {
      columns c = columns_of(l, e, r);
      table.push_back(c.start), table.push_back(c.stop);
    }
  for (int32_t e = 0; e < l.E; e++) copies.push_back(copies_of(l, e));
  ms_plan plan = {l.R, l.E, l.F, table.data(), copies.data()};
  ms_layout *layout = nullptr;
  MUST_OK(ms_layout_create(&plan, rank, &layout, &err));
  for (int32_t e = 0; e < l.E; e++) copy.push_back(ms_layout_copy_of(layout, rank, e));
  ms_layout_free(layout);
  ms_cuda_layout *shares = nullptr;
  MUST_OK(ms_cuda_layout_create(l.E, copies.data(), copy.data(), 0, &shares, &err));
  return shares;
}

ms_cuda_experts *packed(const model &m, int32_t rank, bool transposed, bool from_device, bool interleaved = false) {
  const layer &l = m.l;
  ms_error err = {};
  std::vector<int64_t> columns;
  for (int32_t e = 0; e < l.E; e++) {
    columns.push_back(columns_of(l, e, rank).start);
    columns.push_back(columns_of(l, e, rank).stop);
  }
  ms_experts_spec spec = {};
  spec.E = l.E, spec.D = l.D, spec.F = l.F, spec.storage = l.dtype, spec.activation = l.activation;
  spec.gated = l.gated, spec.has_b_in = spec.has_b_out = l.biased, spec.columns = columns.data();
  spec.interleaved = interleaved;
  ms_cuda_experts *experts = nullptr;
  MUST_OK(ms_cuda_experts_create(&spec, 0, &experts, &err));
  int64_t rows = l.gated ? 2 * l.F : l.F;
  for (int32_t e = 0; e < l.E; e++) {
    device_memory memory;
    std::vector<float> in(m.w_in.begin() + e * rows * l.D, m.w_in.begin() + (e + 1) * rows * l.D);
    std::vector<float> out(m.w_out.begin() + (int64_t)e * l.D * l.F, m.w_out.begin() + (e + 1) * (int64_t)l.D * l.F);
    std::vector<float> b_in;
    if (l.biased) b_in.assign(m.b_in.begin() + e * rows, m.b_in.begin() + (e + 1) * rows);
    if (interleaved) { // gate 0, up 0, gate 1, ...
      std::vector<float> in_rows = in, biases = b_in;
      for (int64_t row = 0; row < rows; row++) {
        int64_t from = row % 2 * l.F + row / 2;
        std::copy(in_rows.begin() + from * l.D, in_rows.begin() + (from + 1) * l.D, in.begin() + row * l.D);
        if (l.biased) b_in[(size_t)row] = biases[(size_t)from];
      }
    }
    ms_matrix w_in = {nullptr, MS_F32, rows, l.D, l.D, 1}, w_out = {nullptr, MS_F32, l.D, l.F, l.F, 1};
    if (transposed) {
      std::vector<float> t_in(in.size()), t_out(out.size());
      for (int64_t f = 0; f < rows; f++)
        for (int64_t d = 0; d < l.D; d++) t_in[(size_t)(d * rows + f)] = in[(size_t)(f * l.D + d)];
      for (int64_t d = 0; d < l.D; d++)
        for (int64_t f = 0; f < l.F; f++) t_out[(size_t)(f * l.D + d)] = out[(size_t)(d * l.F + f)];
      in = t_in, out = t_out;
      w_in.row_stride = w_out.row_stride = 1, w_in.col_stride = rows, w_out.col_stride = l.D;
    }
    w_in.data = from_device ? memory.copy(in) : (char *)in.data();
    w_out.data = from_device ? memory.copy(out) : (char *)out.data();
    MUST_OK(ms_cuda_experts_pack(experts, e, 0, l.F, &w_in, &w_out, l.biased ? b_in.data() : nullptr,
                                 l.biased ? &m.b_out[(size_t)(e * l.D)] : nullptr, MS_F32, nullptr, &err));
  }
  return experts;
}

// One rank's batch on the device.
struct batch {
  layer l;
  int64_t tokens;
  std::vector<float> hidden, weight;
  std::vector<int64_t> index;
  device_memory memory;
  char *d_hidden, *d_index, *d_weight, *d_out;
  batch(const layer &of, int64_t tokens, uint64_t seed, int32_t misaligned = 0) : l(of), tokens(tokens) {
    fill(seed);
    size_t skip = (size_t)(misaligned * ms_dtype_size(l.dtype));
    d_hidden = memory.take((int64_t)skip + tokens * l.D * ms_dtype_size(l.dtype)) + skip;
    d_index = memory.take(tokens * l.K * 8);
    d_weight = memory.take(tokens * l.K * 4);
    d_out = memory.take((int64_t)skip + bytes()) + skip;
    upload();
  }
  int64_t bytes() const { return tokens * l.D * ms_dtype_size(l.dtype); }
  void fill(uint64_t seed) {
    hidden = elements(seed * 16 + 5, tokens * l.D);
    weight = elements(seed * 16 + 6, tokens * l.K);
    index.resize((size_t)(tokens * l.K));
    for (int64_t s = 0; s < tokens * l.K; s++) index[(size_t)s] = choice(l, seed, s);
  }
  void upload() {
    memory.put(d_hidden, narrowed(l.dtype, hidden));
    memory.put(d_index, index);
    memory.put(d_weight, weight);
    MUST(cudaMemset(d_out, 0xff, (size_t)bytes()));
    MUST(cudaDeviceSynchronize());
  }
  ms_cuda_call call(int64_t capacity, const ms_cuda_layout *layout = nullptr) const {
    ms_cuda_call c = {};
    c.layout = layout;
    c.hidden = d_hidden, c.index = d_index, c.weight = d_weight, c.out = d_out;
    if (tokens == 0) c.hidden = c.index = c.weight = c.out = nullptr;
    c.dtype = l.dtype, c.index_dtype = MS_I64, c.weight_dtype = MS_F32;
    c.tokens = tokens, c.capacity = capacity, c.K = l.K, c.layer = 3, c.replicated = l.replicated, c.tf32 = l.tf32;
    return c;
  }
  std::vector<char> out() const { return read(d_out, bytes()); }
};

// ---- ranks as threads ----------------------------------------------------------------------------------------------

struct meeting { // a barrier
  std::mutex mutex;
  std::condition_variable all_here;
  int count, here = 0, round = 0;
  explicit meeting(int count) : count(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    int mine = round;
    if (++here == count) {
      here = 0, round++;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return round != mine; });
    }
  }
};

struct ranks_of_test;
struct thread_exchange {
  ms_cuda_exchange base; // first: what the engine sees
  ranks_of_test *ranks;
  cudaEvent_t ready, done;
  const void *send;
  device_memory memory; // sums of an all-reduce, before they go where the others still read
  float *sums;
  int64_t room;
};
struct ranks_of_test {
  meeting meet;
  std::vector<std::unique_ptr<thread_exchange>> each;
  explicit ranks_of_test(int32_t R);
  ~ranks_of_test() {
    for (auto &x : each) cudaEventDestroy(x->ready), cudaEventDestroy(x->done);
  }
};

struct sources {
  const float *from[8];
};
__global__ void sum_of_ranks(sources s, int32_t R, int64_t first, float *to, int64_t count) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
    float sum = s.from[0][first + i];
    for (int32_t r = 1; r < R; r++) sum += s.from[r][first + i];
    to[i] = sum;
  }
}

// All ranks say where their data is and when it is there; then each takes what it needs; none goes on before all did.
template <typename Take> void together(thread_exchange *x, const void *send, cudaStream_t stream, Take take) {
  x->send = send;
  MUST(cudaEventRecord(x->ready, stream));
  x->ranks->meet.wait();
  for (auto &other : x->ranks->each) MUST(cudaStreamWaitEvent(stream, other->ready, 0));
  take();
  MUST(cudaEventRecord(x->done, stream));
  x->ranks->meet.wait();
  for (auto &other : x->ranks->each) MUST(cudaStreamWaitEvent(stream, other->done, 0));
  x->ranks->meet.wait(); // nobody records its events anew before all wait for these
}

ms_status all_gather(ms_cuda_exchange *base, const void *send, void *receive, int64_t bytes, void *stream, ms_error *) {
  auto *x = (thread_exchange *)base;
  together(x, send, (cudaStream_t)stream, [&] {
    for (auto &other : x->ranks->each) {
      char *to = (char *)receive + other->base.rank * bytes;
      if (to == other->send) continue;
      MUST(cudaMemcpyAsync(to, other->send, (size_t)bytes, cudaMemcpyDeviceToDevice, (cudaStream_t)stream));
    }
  });
  return MS_OK;
}

void sum_from(thread_exchange *x, int64_t first, float *to, int64_t count, cudaStream_t stream) {
  sources s = {};
  for (auto &other : x->ranks->each) s.from[other->base.rank] = (const float *)other->send;
  if (count > 0) sum_of_ranks<<<8, 128, 0, stream>>>(s, x->base.R, first, to, count);
  MUST(cudaGetLastError());
}

ms_status reduce_scatter(ms_cuda_exchange *base, const float *send, float *receive, int64_t count, void *stream,
                         ms_error *) {
  auto *x = (thread_exchange *)base;
  together(x, send, (cudaStream_t)stream,
           [&] { sum_from(x, base->rank * count, receive, count, (cudaStream_t)stream); });
  return MS_OK;
}

ms_status all_reduce(ms_cuda_exchange *base, float *sums, int64_t count, void *stream, ms_error *) {
  auto *x = (thread_exchange *)base;
  if (x->room < count) {
    x->sums = (float *)x->memory.take(4 * count), x->room = count;
    MUST(cudaDeviceSynchronize()); // it is filled with NaN on another stream
  }
  together(x, sums, (cudaStream_t)stream, [&] { sum_from(x, 0, x->sums, count, (cudaStream_t)stream); });
  if (count > 0)
    MUST(cudaMemcpyAsync(sums, x->sums, (size_t)count * 4, cudaMemcpyDeviceToDevice, (cudaStream_t)stream));
  return MS_OK;
}

ms_status nothing_wrong(ms_cuda_exchange *, ms_error *) { return MS_OK; }

ranks_of_test::ranks_of_test(int32_t R) : meet(R) {
  for (int32_t r = 0; r < R; r++) {
    auto x = std::make_unique<thread_exchange>();
    x->base = {r, R, 0, all_gather, reduce_scatter, all_reduce, nothing_wrong, nullptr};
    x->ranks = this;
    MUST(cudaEventCreateWithFlags(&x->ready, cudaEventDisableTiming));
    MUST(cudaEventCreateWithFlags(&x->done, cudaEventDisableTiming));
    each.push_back(std::move(x));
  }
}

// `body(rank, engine, experts, layout, stream)` on a thread for each rank.
using rank_body =
    std::function<void(int32_t, ms_cuda_engine *, ms_cuda_experts *, const ms_cuda_layout *, cudaStream_t)>;
void on_ranks(const model &m, const rank_body &body) {
  ranks_of_test ranks(m.l.R);
  std::vector<std::thread> threads;
  for (int32_t r = 0; r < m.l.R; r++)
    threads.emplace_back([&, r] {
      ms_error err = {};
      ms_cuda_engine *engine = nullptr;
      ms_cuda_experts *experts = packed(m, r, false, false);
      ms_cuda_layout *layout = layout_of(m.l, r);
      cudaStream_t stream;
      MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      MUST_OK(ms_cuda_engine_create(m.l.R > 1 ? &ranks.each[(size_t)r]->base : nullptr, 0, m.l.chunks, &engine, &err));
      body(r, engine, experts, layout, stream);
      ranks.meet.wait(); // nothing is freed that another rank may still read
      MUST(cudaDeviceSynchronize());
      ranks.meet.wait();
      ms_cuda_engine_free(engine);
      ms_cuda_experts_free(experts);
      ms_cuda_layout_free(layout);
      MUST(cudaStreamDestroy(stream));
    });
  for (auto &thread : threads) thread.join();
}

} // namespace

#endif
