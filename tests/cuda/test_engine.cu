// test_engine.cu - whole layers: experts and engine against ms_reference_layer, on ptxsim or on a GPU, alike.
//
//   nvcc -std=c++17 -O3 -cudart shared -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
//     [-gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a -DMS_CUDA_SM90]
//     -o test_engine tests/cuda/test_engine.cu cuda/*.cu cuda/*.c csrc/base/error.c csrc/base/memory.c
//     csrc/exchange/exchange.c csrc/step2_gather.c csrc/reference.c -lm
//   test_engine [TEXT]        every case [whose line has TEXT], each line ok or FAIL; the exit code tells
//   test_engine --repeat N    one layer N times: the same bits each time
//   test_engine --time        microseconds of each step and of the layer, FLOP/s; a few tokens checked
//
// Several ranks are threads on one device, with an exchange of events and copies in place of NCCL.
//
// Tolerance, relative to the largest output. float32: 2e-6 (DESIGN section 6). 16-bit: two roundings, of H and of the
// output, each half an ulp at most; those of H are independent, so their sum stays below half an ulp of the largest
// output; and 1e-4 for tensor cores that cut (arXiv 2511.10909).
//
// SPDX-License-Identifier: Apache-2.0
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
__host__ __device__ inline float element(uint64_t seed, uint64_t i) { return (float)((int)(hash(seed, i) % 129) - 64) / 64.f; }

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
};

std::string name_of(const layer &l) {
  static const char *const routes[] = {"even", "skewed", "one expert", "holes", "no expert"};
  static const char *const activations[] = {"identity", "relu", "gelu", "gelu_tanh", "silu"};
  char text[200];
  snprintf(text, sizeof text, "%s T=%d D=%d F=%d K=%d E=%d %s %s%s%s%s R=%d chunks=%d", ms_dtype_name(l.dtype), l.T,
           l.D, l.F, l.K, l.E, routes[l.route], activations[l.activation], l.gated ? " gated" : "",
           l.biased ? " biased" : "", l.ragged ? " ragged" : "", l.R, l.chunks);
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

ms_cuda_experts *packed(const model &m, int32_t rank, bool transposed, bool from_device) {
  const layer &l = m.l;
  ms_error err = {};
  std::vector<int64_t> columns;
  for (int32_t e = 0; e < l.E; e++) {
    columns.push_back(start_of(l, e, rank));
    columns.push_back(start_of(l, e, rank + 1));
  }
  ms_experts_spec spec = {};
  spec.E = l.E, spec.D = l.D, spec.F = l.F, spec.storage = l.dtype, spec.activation = l.activation;
  spec.gated = l.gated, spec.has_b_in = spec.has_b_out = l.biased, spec.columns = columns.data();
  ms_cuda_experts *experts = nullptr;
  MUST_OK(ms_cuda_experts_create(&spec, 0, &experts, &err));
  int64_t rows = l.gated ? 2 * l.F : l.F;
  for (int32_t e = 0; e < l.E; e++) {
    device_memory memory;
    std::vector<float> in(m.w_in.begin() + e * rows * l.D, m.w_in.begin() + (e + 1) * rows * l.D);
    std::vector<float> out(m.w_out.begin() + (int64_t)e * l.D * l.F, m.w_out.begin() + (e + 1) * (int64_t)l.D * l.F);
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
    MUST_OK(ms_cuda_experts_pack(experts, e, 0, l.F, &w_in, &w_out, l.biased ? &m.b_in[(size_t)(e * rows)] : nullptr,
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
    d_out = memory.take(bytes());
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
  ms_cuda_call call(int64_t capacity) const {
    ms_cuda_call c = {};
    c.hidden = d_hidden, c.index = d_index, c.weight = d_weight, c.out = d_out;
    if (tokens == 0) c.hidden = c.index = c.weight = c.out = nullptr;
    c.dtype = l.dtype, c.index_dtype = MS_I64, c.weight_dtype = MS_F32;
    c.tokens = tokens, c.capacity = capacity, c.K = l.K, c.layer = 3;
    return c;
  }
  std::vector<char> out() const { return read(d_out, bytes()); }
};

// The largest difference from the reference, relative to the largest output; NaN if there is one.
double error_of(const model &m, const batch &b) {
  const layer &l = m.l;
  std::vector<double> expected((size_t)(b.tokens * l.D));
  std::vector<int32_t> index(b.index.begin(), b.index.end());
  ms_reference_layer(b.hidden.data(), index.data(), b.weight.data(), b.tokens, l.D, l.K, l.E, l.F, m.w_in.data(),
                     m.w_out.data(), l.biased ? m.b_in.data() : nullptr, l.biased ? m.b_out.data() : nullptr,
                     l.activation, l.gated, expected.data());
  std::vector<float> got = widened(l.dtype, b.out());
  double worst = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    double error = fabs((double)got[i] - expected[i]);
    if (std::isnan(error)) return NAN;
    worst = std::max(worst, error);
    largest = std::max(largest, fabs(expected[i]));
  }
  return largest > 0 ? worst / largest : worst;
}

double tolerance_of(ms_dtype dtype) {
  return dtype == MS_F32 ? 2e-6 : 1e-4 + (dtype == MS_BF16 ? 2. / 256 : 2. / 2048) / 1;
}

std::string too_far(const model &m, const batch &b, std::string *more) {
  double error = error_of(m, b), tolerance = tolerance_of(m.l.dtype);
  char text[80];
  snprintf(text, sizeof text, " error / tolerance %.3f", error / tolerance);
  *more = text;
  return error <= tolerance ? "" : "too far from the reference";
}

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
};
struct ranks_of_test {
  meeting meet;
  std::vector<thread_exchange> each;
  explicit ranks_of_test(int32_t R);
  ~ranks_of_test() {
    for (auto &x : each) cudaEventDestroy(x.ready), cudaEventDestroy(x.done);
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
  for (auto &other : x->ranks->each) MUST(cudaStreamWaitEvent(stream, other.ready, 0));
  take();
  MUST(cudaEventRecord(x->done, stream));
  x->ranks->meet.wait();
  for (auto &other : x->ranks->each) MUST(cudaStreamWaitEvent(stream, other.done, 0));
  x->ranks->meet.wait(); // nobody records its events anew before all wait for these
}

ms_status all_gather(ms_cuda_exchange *base, const void *send, void *receive, int64_t bytes, void *stream, ms_error *) {
  auto *x = (thread_exchange *)base;
  together(x, send, (cudaStream_t)stream, [&] {
    for (auto &other : x->ranks->each) {
      char *to = (char *)receive + other.base.rank * bytes;
      if (to == other.send) continue;
      MUST(cudaMemcpyAsync(to, other.send, (size_t)bytes, cudaMemcpyDeviceToDevice, (cudaStream_t)stream));
    }
  });
  return MS_OK;
}

ms_status reduce_scatter(ms_cuda_exchange *base, const float *send, float *receive, int64_t count, void *stream,
                         ms_error *) {
  auto *x = (thread_exchange *)base;
  together(x, send, (cudaStream_t)stream, [&] {
    sources s = {};
    for (auto &other : x->ranks->each) s.from[other.base.rank] = (const float *)other.send;
    if (count > 0) sum_of_ranks<<<8, 128, 0, (cudaStream_t)stream>>>(s, base->R, base->rank * count, receive, count);
    MUST(cudaGetLastError());
  });
  return MS_OK;
}

ms_status nothing_wrong(ms_cuda_exchange *, ms_error *) { return MS_OK; }

ranks_of_test::ranks_of_test(int32_t R) : meet(R) {
  for (int32_t r = 0; r < R; r++) {
    thread_exchange x = {};
    x.base = {r, R, 0, all_gather, reduce_scatter, nothing_wrong, nullptr};
    x.ranks = this;
    MUST(cudaEventCreateWithFlags(&x.ready, cudaEventDisableTiming));
    MUST(cudaEventCreateWithFlags(&x.done, cudaEventDisableTiming));
    each.push_back(x);
  }
}

// `body(rank, engine, experts, stream)` on a thread for each rank.
using rank_body = std::function<void(int32_t, ms_cuda_engine *, ms_cuda_experts *, cudaStream_t)>;
void on_ranks(const model &m, const rank_body &body) {
  ranks_of_test ranks(m.l.R);
  std::vector<std::thread> threads;
  for (int32_t r = 0; r < m.l.R; r++)
    threads.emplace_back([&, r] {
      ms_error err = {};
      ms_cuda_engine *engine = nullptr;
      ms_cuda_experts *experts = packed(m, r, false, false);
      cudaStream_t stream;
      MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      MUST_OK(ms_cuda_engine_create(m.l.R > 1 ? &ranks.each[(size_t)r].base : nullptr, 0, m.l.chunks, &engine, &err));
      body(r, engine, experts, stream);
      ranks.meet.wait(); // nothing is freed that another rank may still read
      MUST(cudaDeviceSynchronize());
      ranks.meet.wait();
      ms_cuda_engine_free(engine);
      ms_cuda_experts_free(experts);
      MUST(cudaStreamDestroy(stream));
    });
  for (auto &thread : threads) thread.join();
}

int64_t tokens_of(const layer &l, int32_t r) { return r == 0 ? l.T : std::max(0, l.T - 9 * r); }

std::string check_layer(const layer &l, std::string *more) {
  model m(l);
  std::vector<std::string> wrong((size_t)l.R), how((size_t)l.R);
  on_ranks(m, [&](int32_t r, ms_cuda_engine *engine, ms_cuda_experts *experts, cudaStream_t stream) {
    ms_error err = {};
    for (uint64_t round = 1; round <= 2 && wrong[(size_t)r].empty(); round++) {
      batch b(l, tokens_of(l, r), round * 8 + (uint64_t)r);
      ms_cuda_call call = b.call(l.T);
      MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
      MUST_OK(ms_cuda_engine_faults(engine, &err));
      wrong[(size_t)r] = too_far(m, b, &how[(size_t)r]);
    }
  });
  *more = how[0];
  for (auto &text : wrong)
    if (!text.empty()) return text;
  return "";
}

// ---- one rank: graphs, faults, experts -----------------------------------------------------------------------------

struct one_rank {
  model m;
  ms_cuda_engine *engine = nullptr;
  ms_cuda_experts *experts;
  cudaStream_t stream;
  ms_error err = {};
  explicit one_rank(const layer &l) : m(l), experts(packed(m, 0, false, true)) {
    MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    MUST_OK(ms_cuda_engine_create(nullptr, 0, 1, &engine, &err));
  }
  ~one_rank() {
    ms_cuda_engine_free(engine);
    ms_cuda_experts_free(experts);
    cudaStreamDestroy(stream);
  }
  std::vector<char> run(batch &b) {
    ms_cuda_call call = b.call(b.tokens);
    MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
    MUST(cudaStreamSynchronize(stream));
    return b.out();
  }
};

// A graph holds kernels only, at most 6; replayed with other data it computes what a call computes.
std::string check_graph(const layer &l) {
  one_rank one(l);
  batch b(l, l.T, 1);
  ms_cuda_call call = b.call(l.T);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ms_error err = {};

  // A shape that needs a larger workspace cannot be captured, and says so.
  MUST(cudaStreamBeginCapture(one.stream, cudaStreamCaptureModeThreadLocal));
  ms_status status = ms_cuda_forward(one.engine, one.experts, &call, one.stream, &err);
  MUST(cudaStreamEndCapture(one.stream, &graph));
  if (graph) cudaGraphDestroy(graph);
  if (status != MS_EINVAL || !strstr(err.msg, "captured")) return "a capture that cannot be was not refused";

  one.run(b);
  MUST(cudaStreamBeginCapture(one.stream, cudaStreamCaptureModeThreadLocal));
  MUST_OK(ms_cuda_forward(one.engine, one.experts, &call, one.stream, &err));
  MUST(cudaStreamEndCapture(one.stream, &graph));
  size_t count = 0;
  MUST(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  MUST(cudaGraphGetNodes(graph, nodes.data(), &count));
  for (auto node : nodes) {
    cudaGraphNodeType type;
    MUST(cudaGraphNodeGetType(node, &type));
    if (type != cudaGraphNodeTypeKernel) return "a node of the graph is not a kernel";
  }
  if (count > 6) return std::to_string(count) + " launches";
  MUST(cudaGraphInstantiate(&exec, graph, 0));

  for (uint64_t seed = 2; seed <= 3; seed++) {
    b.fill(seed);
    b.upload();
    std::vector<char> called = one.run(b);
    MUST(cudaMemset(b.d_out, 0xff, (size_t)b.bytes()));
    if (seed == 3) { // the engine moves on to a larger workspace; the graph keeps its own
      layer larger = l;
      larger.T = 3 * l.T + 50;
      batch other(larger, larger.T, 9);
      one.run(other);
    }
    MUST(cudaDeviceSynchronize());
    MUST(cudaGraphLaunch(exec, one.stream));
    MUST(cudaStreamSynchronize(one.stream));
    if (b.out() != called) return "the graph's bits are others than the call's";
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  std::string more;
  return too_far(one.m, b, &more);
}

std::string check_misaligned(const layer &l) {
  one_rank one(l);
  batch aligned(l, l.T, 1), misaligned(l, l.T, 1, 1);
  return one.run(aligned) == one.run(misaligned) ? "" : "hidden states that are not aligned give other bits";
}

// What the router did wrong is told once, by the next call or at once, and that call computes.
std::string check_faults_of_one(const layer &l) {
  one_rank one(l);
  batch good(l, l.T, 1), bad(l, l.T, 1);
  std::vector<char> expected = one.run(good);
  ms_error err = {};
  ms_cuda_call call = bad.call(l.T), good_call = good.call(l.T);

  bad.index[(size_t)(3 * l.K + 1)] = l.E;
  bad.upload();
  MUST_OK(ms_cuda_forward(one.engine, one.experts, &call, one.stream, &err));
  char text[120];
  snprintf(text, sizeof text, "top_k_index[3, 1]: got %d, expected -1 (no expert) to %d", l.E, l.E - 1);
  if (ms_cuda_engine_faults(one.engine, &err) != MS_ERANGE || !strstr(err.msg, text)) return "not told at once";
  if (ms_cuda_engine_faults(one.engine, &err) != MS_OK) return "told twice";

  bad.index[(size_t)(3 * l.K + 1)] = 0;
  bad.weight[(size_t)(2 * l.K)] = NAN;
  bad.index[(size_t)(2 * l.K)] = 0;
  bad.upload();
  good.upload();
  MUST_OK(ms_cuda_forward(one.engine, one.experts, &call, one.stream, &err));
  MUST(cudaStreamSynchronize(one.stream));
  if (ms_cuda_forward(one.engine, one.experts, &good_call, one.stream, &err) != MS_ERANGE ||
      !strstr(err.msg, "top_k_weights[2, 0]"))
    return "not told by the next call";
  MUST(cudaStreamSynchronize(one.stream));
  if (good.out() != expected) return "the next call did not compute";

  call.dtype = l.dtype == MS_F32 ? MS_BF16 : MS_F32;
  if (ms_cuda_forward(one.engine, one.experts, &call, one.stream, &err) != MS_EDTYPE) return "another dtype is taken";
  return "";
}

// Experts come out as they went in, whatever the layout, the memory and the dtype they came from.
std::string check_experts(const layer &l) {
  model m(l);
  ms_error err = {};
  int64_t size = ms_dtype_size(l.dtype), rows = l.gated ? 2 * l.F : l.F;
  for (int32_t how = 0; how < 4; how++) {
    ms_cuda_experts *experts = packed(m, 0, how & 1, how & 2);
    for (int32_t e = 0; e < l.E; e++) {
      int64_t start = start_of(l, e, 0), width = start_of(l, e, 1) - start;
      std::vector<float> in, out;
      for (int64_t half = 0; half < (l.gated ? 2 : 1); half++) {
        auto from = m.w_in.begin() + (e * rows + half * l.F + start) * l.D;
        in.insert(in.end(), from, from + width * l.D);
      }
      for (int64_t d = 0; d < l.D; d++) {
        auto from = m.w_out.begin() + ((int64_t)e * l.D + d) * l.F + start;
        out.insert(out.end(), from, from + width);
      }
      std::vector<char> got_in(in.size() * (size_t)size), got_out(out.size() * (size_t)size);
      std::vector<float> b_in((size_t)(rows / l.F * width)), b_out((size_t)l.D, NAN);
      MUST_OK(ms_cuda_experts_unpack(experts, e, got_in.data(), got_out.data(), l.biased ? b_in.data() : nullptr,
                                     l.biased ? b_out.data() : nullptr, nullptr, &err));
      if (got_in != narrowed(l.dtype, in) || got_out != narrowed(l.dtype, out)) return "weights differ";
      if (!l.biased) continue;
      if (memcmp(b_out.data(), &m.b_out[(size_t)(e * l.D)], (size_t)l.D * 4) != 0) return "b_out differs";
      if (memcmp(b_in.data(), &m.b_in[(size_t)(e * rows)], (size_t)width * 4) != 0) return "b_in differs";
    }
    ms_cuda_experts_free(experts);
  }
  return "";
}

// ---- several ranks: faults -----------------------------------------------------------------------------------------

std::string check_faults_of_ranks(const layer &l) {
  model m(l);
  std::vector<std::string> said((size_t)l.R), again((size_t)l.R), disagreement((size_t)l.R);
  std::vector<ms_status> status((size_t)l.R);
  on_ranks(m, [&](int32_t r, ms_cuda_engine *engine, ms_cuda_experts *experts, cudaStream_t stream) {
    ms_error err = {};
    batch b(l, tokens_of(l, r), 8 + (uint64_t)r);
    if (r == 1) b.index[0] = l.E;
    b.upload();
    ms_cuda_call call = b.call(l.T);
    MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
    status[(size_t)r] = ms_cuda_engine_faults(engine, &err);
    said[(size_t)r] = err.msg;
    b.index[0] = 0;
    b.upload();
    MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
    MUST_OK(ms_cuda_engine_faults(engine, &err));
    std::string more;
    again[(size_t)r] = too_far(m, b, &more);
    call.layer = r == 1 ? 4 : 3;
    MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
    if (ms_cuda_engine_faults(engine, &err) == MS_EMISMATCH) disagreement[(size_t)r] = err.msg;
  });
  char text[120];
  snprintf(text, sizeof text, "top_k_index[0, 0]: got %d, expected -1 (no expert) to %d", l.E, l.E - 1);
  for (int32_t r = 0; r < l.R; r++) {
    if (status[(size_t)r] != (r == 1 ? MS_ERANGE : MS_EPEER)) return "the wrong status";
    if (said[(size_t)r] != (r == 1 ? "" : "rank 1: ") + std::string(text)) return said[(size_t)r];
    if (!again[(size_t)r].empty()) return "after a fault: " + again[(size_t)r];
    if (!strstr(disagreement[(size_t)r].c_str(), "the layer is 3 on ")) return "layers that differ: " + disagreement[(size_t)r];
    if (disagreement[(size_t)r] != disagreement[0]) return "ranks were told different things";
  }
  return "";
}

// ---- time ----------------------------------------------------------------------------------------------------------

__global__ void fill_bf16(__nv_bfloat16 *to, int64_t count, float scale) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
    to[i] = __float2bfloat16_rn(scale * element(11, (uint64_t)i));
}

// Microseconds of one `step`, from graphs of REPEATS steps.
template <typename Step> double microseconds(cudaStream_t stream, Step step) {
  enum { REPEATS = 10, SAMPLES = 11 };
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  MUST(cudaEventCreate(&begin));
  MUST(cudaEventCreate(&end));
  step();
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

// A few tokens' outputs in double, from the weights on the device.
std::string check_some(const batch &b, const ms_cuda_experts *experts) {
  const layer &l = b.l;
  std::vector<float> out = widened(l.dtype, b.out());
  double worst = 0, largest = 0;
  for (int64_t t : {(int64_t)0, b.tokens / 2, b.tokens - 1}) {
    std::vector<double> expected((size_t)l.D, 0.);
    for (int32_t j = 0; j < l.K; j++) {
      const ms_cuda_expert &x = experts->table[b.index[(size_t)(t * l.K + j)]];
      std::vector<float> w_in = widened(l.dtype, read(x.w_in, (int64_t)l.F * experts->ld_in * 2));
      std::vector<float> w_out = widened(l.dtype, read(x.w_out, (int64_t)l.D * x.ld_out * 2));
      std::vector<double> h((size_t)l.F);
      for (int64_t f = 0; f < l.F; f++) {
        double sum = 0;
        for (int64_t d = 0; d < l.D; d++)
          sum += (double)b.hidden[(size_t)(t * l.D + d)] * w_in[(size_t)(f * experts->ld_in + d)];
        h[(size_t)f] = std::max(sum, 0.);
      }
      for (int64_t d = 0; d < l.D; d++) {
        double sum = 0;
        for (int64_t f = 0; f < l.F; f++) sum += h[(size_t)f] * w_out[(size_t)(d * x.ld_out + f)];
        expected[(size_t)d] += (double)b.weight[(size_t)(t * l.K + j)] * sum;
      }
    }
    for (int64_t d = 0; d < l.D; d++) {
      double error = fabs((double)out[(size_t)(t * l.D + d)] - expected[(size_t)d]);
      worst = std::isnan(error) ? HUGE_VAL : std::max(worst, error);
      largest = std::max(largest, fabs(expected[(size_t)d]));
    }
  }
  return worst <= tolerance_of(l.dtype) * largest ? "" : "too far from the reference";
}

void time_layers() {
  cudaDeviceProp properties;
  MUST(cudaGetDeviceProperties(&properties, 0));
  printf("%s, %d multiprocessors; microseconds, D=768 F=3072 bfloat16 relu, one rank\n", properties.name,
         properties.multiProcessorCount);
  printf("%6s %6s %3s %5s %6s | %8s %8s %9s %9s %8s | %9s %8s %8s\n", "tokens", "E", "K", "rows", "math", "gather",
         "group", "up", "down", "combine", "layer", "TFLOP/s", "GB/s");
  for (int32_t E : {8, 128, 1024})
    for (int32_t K : {1, 2}) {
      layer shape_of_weights = {1, 768, 3072, K, E};
      ms_error err = {};
      std::vector<int64_t> columns;
      for (int32_t e = 0; e < E; e++) columns.push_back(0), columns.push_back(3072);
      ms_experts_spec spec = {};
      spec.E = E, spec.D = 768, spec.F = 3072, spec.storage = MS_BF16, spec.activation = MS_RELU;
      spec.columns = columns.data();
      ms_cuda_experts *experts = nullptr;
      MUST_OK(ms_cuda_experts_create(&spec, 0, &experts, &err));
      for (int32_t e = 0; e < E; e++) {
        fill_bf16<<<1024, 256>>>((__nv_bfloat16 *)experts->table[e].w_in, 768 * 3072, 1.f / 16);
        fill_bf16<<<1024, 256>>>((__nv_bfloat16 *)experts->table[e].w_out, 768 * 3072, 1.f / 32);
      }
      MUST(cudaDeviceSynchronize());
      for (int32_t tokens : {10, 120, 1024, 4096, 16384, 65536}) {
        layer l = shape_of_weights;
        l.T = tokens;
        batch b(l, tokens, 1);
        ms_cuda_engine *engine = nullptr;
        cudaStream_t stream;
        MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        MUST_OK(ms_cuda_engine_create(nullptr, 0, 1, &engine, &err));
        ms_cuda_call call = b.call(tokens);
        double layer_us =
            microseconds(stream, [&] { MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err)); });
        MUST_OK(ms_cuda_engine_faults(engine, &err));
        std::string wrong = check_some(b, experts);
        ms_cuda_engine_free(engine);

        ms_cuda_shape s = {}; // as the engine makes it
        s.T = tokens, s.R = 1, s.K = K, s.E = E, s.D = 768, s.F = 3072, s.dtype = MS_BF16, s.in_place = true;
        s.math = MS_CUDA_MMA, s.sms = properties.multiProcessorCount;
#ifdef MS_CUDA_SM90
        if (properties.major == 9) s.math = MS_CUDA_WGMMA;
#endif
        MUST_OK(ms_cuda_shape_plan(&s, &err));
        char *workspace = b.memory.take(s.workspace_bytes);
        MUST(cudaMemset(workspace, 0, (size_t)s.workspace_bytes));
        MUST(cudaDeviceSynchronize());
        ms_cuda_view v = ms_cuda_view_of(&s, experts, workspace, b.d_hidden, nullptr);
        ms_cuda_header header = {};
        header.T = tokens, header.D = 768, header.K = K, header.E = E, header.dtype = MS_BF16;
        double gather = microseconds(stream, [&] {
          MUST_OK(ms_cuda_gather_pack(&s, &v, &header, b.d_hidden, b.d_index, MS_I64, b.d_weight, MS_F32, stream, &err));
        });
        double group = microseconds(stream, [&] { MUST_OK(ms_cuda_group(&s, &v, stream, &err)); });
        double up = microseconds(stream, [&] { MUST_OK(ms_cuda_ffn_up(&s, &v, MS_RELU, stream, &err)); });
        double down = microseconds(stream, [&] { MUST_OK(ms_cuda_ffn_down(&s, &v, stream, &err)); });
        double combine =
            microseconds(stream, [&] { MUST_OK(ms_cuda_combine(&s, &v, tokens, b.d_out, stream, &err)); });
        std::vector<bool> hit((size_t)E);
        for (int64_t e : b.index) hit[(size_t)e] = true;
        double flops = 4. * tokens * K * 768 * 3072;
        double bytes = 2. * 2 * 768 * 3072 * (double)std::count(hit.begin(), hit.end(), true);
        printf("%6d %6d %3d %5d %6s | %8.2f %8.2f %9.2f %9.2f %8.2f | %9.2f %8.1f %8.0f%s\n", tokens, E, K, s.tile_rows,
               s.math == MS_CUDA_WGMMA ? "wgmma" : "mma", gather, group, up, down, combine, layer_us,
               flops / layer_us * 1e-6, bytes / layer_us * 1e-3, wrong.empty() ? "" : "  FAIL: too far");
        fflush(stdout);
        failures += !wrong.empty();
        MUST(cudaStreamDestroy(stream));
      }
      ms_cuda_experts_free(experts);
    }
}

void repeat(int count) {
  layer l = {4096, 768, 3072, 2, 8, SKEWED, MS_BF16, MS_GELU, false, true};
  one_rank one(l);
  batch b(l, l.T, 1);
  std::vector<char> first = one.run(b);
  int other = 0;
  for (int i = 1; i < count; i++) {
    MUST(cudaMemset(b.d_out, 0xff, (size_t)b.bytes()));
    MUST(cudaDeviceSynchronize());
    other += one.run(b) != first;
  }
  report("repeated: " + name_of(l), other ? std::to_string(other) + " of " + std::to_string(count) + " differ" : "");
}

// T, D, F, K, E, route, dtype, activation, gated, biased, ragged, R, chunks
const layer layers[] = {
    {7, 32, 64, 1, 1, EVEN, MS_F32, MS_RELU},
    {33, 37, 41, 2, 3, HOLES, MS_F32, MS_GELU, false, true},
    {40, 32, 48, 2, 8, SKEWED, MS_F32, MS_SILU, true, true},
    {64, 64, 96, 1, 8, EVEN, MS_BF16, MS_RELU},
    {64, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU_TANH, false, true},
    {65, 37, 41, 2, 3, SKEWED, MS_BF16, MS_SILU, true, true},
    {130, 64, 160, 1, 3, ONE, MS_BF16, MS_RELU, false, true},
    {130, 64, 96, 4, 64, EVEN, MS_BF16, MS_IDENTITY, true},
    {130, 64, 96, 1, 1, EVEN, MS_F16, MS_GELU, false, true},
    {200, 64, 96, 2, 3, HOLES, MS_F16, MS_SILU, true, true},
    {50, 40, 48, 2, 8, NONE, MS_BF16},
    {0, 40, 48, 2, 8, EVEN, MS_BF16},
    {1, 96, 32, 1, 8, EVEN, MS_BF16},
    {30, 32, 64, 2, 3, EVEN, MS_F32, MS_RELU, false, true, true, 2, 1},
    {40, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true, false, 2, 1},
    {40, 64, 96, 1, 8, HOLES, MS_BF16, MS_SILU, true, true, true, 3, 1},
    {41, 64, 96, 2, 8, HOLES, MS_BF16, MS_SILU, true, true, false, 2, 2},
    {41, 64, 96, 2, 8, SKEWED, MS_F32, MS_RELU, false, true, true, 2, 4},
    {50, 64, 96, 1, 3, EVEN, MS_F16, MS_RELU, false, true, false, 3, 3},
    {7, 64, 96, 1, 3, EVEN, MS_BF16, MS_RELU, false, true, false, 3, 8}, // ranks 1 and 2 have no tokens
};

void check(const std::string &name, const layer &l, std::string (*test)(const layer &)) {
  std::string whole = name + ": " + name_of(l);
  if (whole.find(wanted) != std::string::npos) report(whole, test(l));
}

void check_all() {
  for (const layer &l : layers) {
    std::string more, name = "layer: " + name_of(l);
    if (name.find(wanted) == std::string::npos) continue;
    std::string wrong = check_layer(l, &more);
    report(name, wrong, more);
  }
  const layer bf16 = {64, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true};
  const layer gated = {20, 32, 48, 1, 3, EVEN, MS_F32, MS_SILU, true, true};
  for (const layer &l : {bf16, gated}) {
    check("graph", l, check_graph);
    check("misaligned", l, check_misaligned);
  }
  check("faults", bf16, check_faults_of_one);
  for (ms_dtype dtype : {MS_F32, MS_BF16, MS_F16}) {
    layer odd = {1, 37, 41, 1, 3, EVEN, dtype, MS_RELU, true, true};
    check("experts", odd, check_experts);
  }
  layer ranks = {40, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true, false, 3, 1};
  check("faults", ranks, check_faults_of_ranks);
  ranks.chunks = 2;
  check("faults", ranks, check_faults_of_ranks);
}

} // namespace

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "--time") == 0) {
    time_layers();
  } else if (argc > 2 && strcmp(argv[1], "--repeat") == 0) {
    repeat(atoi(argv[2]));
  } else {
    if (argc > 1) wanted = argv[1];
    check_all();
  }
  printf(failures ? "%d FAILED\n" : "all ok\n", failures);
  return failures != 0;
}
