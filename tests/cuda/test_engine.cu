// test_engine.cu - whole layers: experts and engine against ms_reference_layer, on ptxsim or on a GPU, alike.
//
//   nvcc -std=c++17 -O3 -cudart shared -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
//     [-gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a -DMS_CUDA_SM90]
//     -o test_engine tests/cuda/test_engine.cu cuda/*.cu cuda/*.c csrc/base/error.c csrc/base/memory.c csrc/layout.c
//     csrc/plan/plan.c csrc/exchange/exchange.c csrc/step2_gather.c csrc/reference.c -lm
//   test_engine [TEXT]        every case [whose line has TEXT], each line ok or FAIL; the exit code tells
//   test_engine --repeat N    one layer N times: the same bits each time
//   test_engine --time        microseconds of each step and of the layer, FLOP/s; a few tokens checked
//
// Several ranks are threads on one device, with an exchange of events and copies in place of NCCL.
//
// Tolerance, relative to the largest output. float32: 2e-6 (DESIGN section 6). 16-bit: two roundings, of H and of the
// output, each half an ulp at most; those of H are independent, so their sum stays below half an ulp of the largest
// output; and 1e-4 for tensor cores that cut (arXiv 2511.10909). tf32: one rounding, of H, to 11 bits as float16's.
//
// SPDX-License-Identifier: Apache-2.0
#include "layers.cuh"

namespace {

// The largest difference from the reference, relative to the largest output; NaN if there is one.
double error_of(const model &m, const batch &b) {
  const layer &l = m.l;
  std::vector<double> expected((size_t)(b.tokens * l.D));
  std::vector<int32_t> index(b.index.begin(), b.index.end());
  for (int32_t &e : index)
    if (e >= 0 && copies_of(l, e) == 0) e = -1;
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

double tolerance_of(const layer &l) {
  if (l.tf32) return 1e-4 + 1. / 2048;
  return l.dtype == MS_F32 ? 2e-6 : 1e-4 + (l.dtype == MS_BF16 ? 2. / 256 : 2. / 2048);
}

std::string too_far(const model &m, const batch &b, std::string *more) {
  double error = error_of(m, b), tolerance = tolerance_of(m.l);
  char text[80];
  snprintf(text, sizeof text, " error / tolerance %.3f", error / tolerance);
  *more = text;
  return error <= tolerance ? "" : "too far from the reference";
}

int64_t tokens_of(const layer &l, int32_t r) { return r == 0 || l.replicated ? l.T : std::max(0, l.T - 9 * r); }
uint64_t seed_of(const layer &l, uint64_t round, int32_t r) { return round * 8 + (l.replicated ? 0 : (uint64_t)r); }

// [E+1]: the slots that ms_cuda_experts_seen must tell of after some rounds.
std::vector<int64_t> seen_after(const layer &l, uint64_t rounds) {
  std::vector<int64_t> seen((size_t)l.E + 1);
  for (uint64_t round = 1; round <= rounds; round++)
    for (int32_t r = 0; r < (l.replicated ? 1 : l.R); r++)
      for (int64_t slot = 0; slot < tokens_of(l, r) * l.K; slot++) {
        int32_t e = choice(l, seed_of(l, round, r), slot);
        if (e >= 0) seen[(size_t)e]++;
        seen[(size_t)l.E]++;
      }
  return seen;
}

std::string check_layer(const layer &l, std::string *more) {
  model m(l);
  std::vector<std::string> wrong((size_t)l.R), how((size_t)l.R);
  on_ranks(m, [&](int32_t r, ms_cuda_engine *engine, ms_cuda_experts *experts, const ms_cuda_layout *layout,
                  cudaStream_t stream) {
    ms_error err = {};
    for (uint64_t round = 1; round <= 2; round++) {
      batch b(l, tokens_of(l, r), seed_of(l, round, r));
      ms_cuda_call call = b.call(l.T, layout);
      MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
      MUST_OK(ms_cuda_engine_faults(engine, &err));
      if (wrong[(size_t)r].empty()) wrong[(size_t)r] = too_far(m, b, &how[(size_t)r]);
    }
    std::vector<int64_t> seen((size_t)l.E + 1);
    MUST_OK(ms_cuda_experts_seen(experts, seen.data(), true, &err));
    if (seen != seen_after(l, 2)) wrong[(size_t)r] += " the counts of slots are wrong";
    MUST_OK(ms_cuda_experts_seen(experts, seen.data(), false, &err));
    if (seen != std::vector<int64_t>((size_t)l.E + 1)) wrong[(size_t)r] += " counts were not forgotten";
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
  ms_cuda_layout *layout;
  cudaStream_t stream;
  ms_error err = {};
  explicit one_rank(const layer &l) : m(l), experts(packed(m, 0, false, true)), layout(layout_of(l, 0)) {
    MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    MUST_OK(ms_cuda_engine_create(nullptr, 0, 1, &engine, &err));
  }
  ~one_rank() {
    ms_cuda_engine_free(engine);
    ms_cuda_experts_free(experts);
    ms_cuda_layout_free(layout);
    cudaStreamDestroy(stream);
  }
  std::vector<char> run(batch &b) {
    ms_cuda_call call = b.call(b.tokens, layout);
    MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
    MUST(cudaStreamSynchronize(stream));
    return b.out();
  }
};

// A graph holds kernels only, at most 6; replayed with other data it computes what a call computes.
std::string check_graph(const layer &l) {
  one_rank one(l);
  batch b(l, l.T, 1);
  ms_cuda_call call = b.call(l.T, one.layout);
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
  return one.run(aligned) == one.run(misaligned) ? "" : "hidden states and out that are not aligned give other bits";
}

// An infinite hidden state makes what the formula makes of it, and does not reach what no column is: here it is cut to
// zero by relu, in every column.
std::string check_infinite(const layer &l) {
  one_rank one(l);
  for (int64_t row = 0; row < l.E * l.F; row++) one.m.w_in[(size_t)(row * l.D)] = -0.5f;
  ms_cuda_experts_free(one.experts);
  one.experts = packed(one.m, 0, false, true);
  batch b(l, l.T, 1);
  for (int64_t t = 0; t < l.T; t += 3) b.hidden[(size_t)(t * l.D)] = INFINITY;
  b.upload();
  one.run(b);
  std::string more;
  return too_far(one.m, b, &more);
}

// Cutting the tokens in chunks changes no bit, on any rank.
std::string check_chunks(const layer &l) {
  std::vector<std::vector<char>> first((size_t)l.R);
  std::vector<std::string> wrong((size_t)l.R);
  for (int32_t chunks : {1, 2, 3, 8}) {
    layer cut = l;
    cut.chunks = chunks;
    model m(cut);
    on_ranks(m, [&](int32_t r, ms_cuda_engine *engine, ms_cuda_experts *experts, const ms_cuda_layout *layout,
                  cudaStream_t stream) {
      ms_error err = {};
      batch b(l, tokens_of(l, r), seed_of(l, 1, r));
      ms_cuda_call call = b.call(l.T, layout);
      MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
      MUST_OK(ms_cuda_engine_faults(engine, &err));
      if (chunks == 1)
        first[(size_t)r] = b.out();
      else if (b.out() != first[(size_t)r])
        wrong[(size_t)r] = std::to_string(chunks) + " chunks give other bits on rank " + std::to_string(r);
    });
  }
  if (l.replicated && first[0] != first.back()) return "ranks have other bits";
  for (auto &text : wrong)
    if (!text.empty()) return text;
  return "";
}

bool all_nan(const layer &l, const std::vector<char> &out) {
  for (float x : widened(l.dtype, out))
    if (!std::isnan(x)) return false;
  return true;
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
  if (!all_nan(l, bad.out())) return "the output of a call with a fault is not NaN";

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
  for (int32_t how = 0; how < (l.gated ? 8 : 4); how++) {
    ms_cuda_experts *experts = packed(m, 0, how & 1, how & 2, how & 4);
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
  on_ranks(m, [&](int32_t r, ms_cuda_engine *engine, ms_cuda_experts *experts, const ms_cuda_layout *layout,
                  cudaStream_t stream) {
    ms_error err = {};
    batch b(l, tokens_of(l, r), 8 + (uint64_t)r);
    if (r == 1) b.index[0] = l.E;
    b.upload();
    ms_cuda_call call = b.call(l.T, layout);
    MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
    status[(size_t)r] = ms_cuda_engine_faults(engine, &err);
    said[(size_t)r] = err.msg;
    std::vector<char> out = b.out();
    if (l.chunks == 1 && !all_nan(l, out)) again[(size_t)r] = "the output of a call with a fault is not NaN";
    b.index[0] = 0;
    b.upload();
    MUST_OK(ms_cuda_forward(engine, experts, &call, stream, &err));
    MUST_OK(ms_cuda_engine_faults(engine, &err));
    std::string more;
    again[(size_t)r] += too_far(m, b, &more);
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
    if (!strstr(disagreement[(size_t)r].c_str(), "the layer is 3 on "))
      return "layers that differ: " + disagreement[(size_t)r];
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
  return worst <= tolerance_of(l) * largest ? "" : "too far from the reference";
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
          MUST_OK(
              ms_cuda_gather_pack(&s, &v, &header, b.d_hidden, b.d_index, MS_I64, b.d_weight, MS_F32, stream, &err));
        });
        double group = microseconds(stream, [&] { MUST_OK(ms_cuda_group(&s, &v, nullptr, stream, &err)); });
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

// T, D, F, K, E, route, dtype, activation, gated, biased, ragged, R, chunks, replicated, tf32, copied
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
    {40, 64, 41, 2, 3, HOLES, MS_BF16, MS_CLAMPED_SWIGLU, true, true},
    {200, 64, 96, 2, 3, HOLES, MS_F16, MS_SILU, true, true},
    {50, 40, 48, 2, 8, NONE, MS_BF16},
    // one rank, one choice: down writes out itself
    {33, 37, 41, 1, 3, HOLES, MS_F32, MS_GELU, false, true},
    {20, 37, 41, 1, 3, HOLES, MS_F16, MS_RELU, false, true},
    {200, 37, 41, 1, 3, HOLES, MS_BF16, MS_RELU, false, true},
    {150, 64, 72, 1, 1, HOLES, MS_F16, MS_SILU, true, true},
    {50, 40, 48, 1, 8, NONE, MS_BF16},
    // float32 on tensor cores
    {33, 64, 48, 1, 3, HOLES, MS_F32, MS_GELU, false, true, false, 1, 1, false, true},
    {100, 37, 41, 1, 3, HOLES, MS_F32, MS_SILU, true, true, false, 1, 1, false, true},
    {130, 64, 72, 2, 1, HOLES, MS_F32, MS_RELU, false, true, false, 1, 1, false, true},
    {0, 40, 48, 2, 8, EVEN, MS_BF16},
    {1, 96, 32, 1, 8, EVEN, MS_BF16},
    {30, 32, 64, 2, 3, EVEN, MS_F32, MS_RELU, false, true, true, 2, 1},
    {40, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true, false, 2, 1},
    {40, 64, 96, 1, 8, HOLES, MS_BF16, MS_SILU, true, true, true, 3, 1},
    {41, 64, 96, 2, 8, HOLES, MS_BF16, MS_SILU, true, true, false, 2, 2},
    {41, 64, 96, 2, 8, SKEWED, MS_F32, MS_RELU, false, true, true, 2, 4},
    {50, 64, 96, 1, 3, EVEN, MS_F16, MS_RELU, false, true, false, 3, 3},
    {7, 64, 96, 1, 3, EVEN, MS_BF16, MS_RELU, false, true, false, 3, 8}, // ranks 1 and 2 have no tokens
    {40, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true, true, 2, 1, true},
    {41, 37, 41, 1, 3, SKEWED, MS_BF16, MS_SILU, true, true, true, 3, 2, true},
    {20, 32, 64, 4, 3, EVEN, MS_F32, MS_RELU, false, true, true, 3, 1, true},
    {0, 32, 64, 1, 3, EVEN, MS_F16, MS_RELU, false, true, false, 2, 1, true},
    // copies: each rank computes its share
    {30, 32, 48, 2, 5, HOLES, MS_F32, MS_RELU, false, true, true, 2, 1, false, false, true},
    {40, 64, 96, 1, 5, SKEWED, MS_BF16, MS_GELU, false, true, true, 3, 1, false, false, true},
    {41, 37, 41, 2, 5, EVEN, MS_BF16, MS_SILU, true, true, false, 3, 1, false, false, true},
    {33, 32, 41, 2, 5, EVEN, MS_F32, MS_RELU, false, true, false, 4, 1, false, false, true},
    {60, 64, 96, 1, 10, EVEN, MS_BF16, MS_RELU, false, true, true, 4, 1, false, false, true},
    {41, 64, 96, 2, 8, HOLES, MS_BF16, MS_RELU, false, true, true, 3, 3, false, false, true},
    {7, 64, 96, 2, 5, EVEN, MS_F16, MS_RELU, false, true, false, 3, 8, false, false, true}, // ranks 1 and 2 have no tokens
    {40, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true, true, 4, 2, true, false, true},
    {50, 64, 41, 1, 5, EVEN, MS_BF16, MS_RELU, false, true, false, 1, 1, false, false, true},
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
  const layer tall = {200, 64, 96, 1, 3, HOLES, MS_BF16, MS_RELU, false, true};
  check("graph", {4200, 16, 16, 2, 8, HOLES, MS_BF16, MS_RELU, false, true}, check_graph); // many blocks sort
  for (const layer &l : {bf16, gated, tall}) {
    check("graph", l, check_graph);
    check("misaligned", l, check_misaligned);
  }
  const layer pruned = {64, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true, false, 1, 1, false, false, true};
  check("graph", pruned, check_graph);
  check("faults", bf16, check_faults_of_one);
  for (ms_dtype dtype : {MS_F32, MS_BF16, MS_F16})
    for (int32_t T : {30, 200}) {
      layer odd = {T, 40, 41, 2, 3, EVEN, dtype, MS_RELU, false, true};
      if (T < 100 || dtype != MS_F32) check("infinite", odd, check_infinite);
    }
  for (ms_dtype dtype : {MS_F32, MS_BF16, MS_F16})
    for (bool gated : {true, false}) {
      layer odd = {1, 37, 41, 1, 3, EVEN, dtype, MS_RELU, gated, true};
      odd.ragged = true, odd.R = 2;
      check("experts", odd, check_experts);
    }
  layer ranks = {40, 64, 96, 2, 8, HOLES, MS_BF16, MS_GELU, false, true, false, 3, 1};
  check("faults", ranks, check_faults_of_ranks);
  ranks.chunks = 2;
  check("faults", ranks, check_faults_of_ranks);
  ranks.chunks = 1;
  for (bool replicated : {false, true}) {
    ranks.replicated = replicated;
    check("chunks", ranks, check_chunks);
  }
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
