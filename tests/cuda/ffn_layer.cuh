// ffn_layer.cuh - one layer's operands on the device and ffn's results against sums in double, for test_ffn*.cu.
//
// Operands are hashes of their position, made on the device, so that any of them can be known here without a copy.
// Rows are padded with zeros to 16 bytes; what lies beyond that, and beyond rows and columns, is NaN: reading it
// shows. The tables of `group` are made here, so that ffn is tested alone.
//
// Tolerance: rounding of H to its type; and of a sum, relative to the sum of |products|: sqrt(terms) * 2^-24 for fp32
// additions in a chain, whose errors are as good as random; 3e-5 for tensor cores, which covers those that cut (arXiv
// 2511.10909); 2^-11 more in down with tf32, which rounds H (hidden and weights are exact in every type).
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_TESTS_FFN_LAYER_CUH
#define MS_TESTS_FFN_LAYER_CUH

#include "../../cuda/moeshard_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

void must(cudaError_t code, const char *call) {
  if (code == cudaSuccess) return;
  printf("FAIL %s: %s\n", call, cudaGetErrorString(code));
  exit(1);
}
#define MUST(call) must(call, #call)

// ---- operands that are hashes of their position -------------------------------------------------------------------

enum : uint64_t { HIDDEN = 1, W_IN = 2, W_OUT = 3, B_IN = 4, B_OUT = 5, WEIGHT = 6, ROUTE = 7 };

__host__ __device__ inline uint32_t hash(uint64_t which, uint64_t row, uint64_t column) {
  uint64_t x = (which << 56) ^ (row << 20) ^ column;
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return (uint32_t)(x >> 32);
}
// In -1..1, a multiple of 1/64: exact in both 16-bit types.
__host__ __device__ inline float element(uint64_t which, uint64_t row, uint64_t column) {
  return (float)((int)(hash(which, row, column) % 129) - 64) / 64.f;
}

template <typename Storage>
__global__ void fill(Storage *matrix, uint64_t which, int64_t first_row, int64_t rows,
                     int64_t columns, int64_t ld) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < rows * ld;
       i += (int64_t)gridDim.x * blockDim.x)
    matrix[i] = (Storage)(i % ld < columns ? element(which, first_row + i / ld, i % ld) : 0.f);
}

__global__ void checksum(const uint32_t *words, int64_t count, unsigned long long *sum) {
  unsigned long long own = 0;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count;
       i += (int64_t)gridDim.x * blockDim.x)
    own += (unsigned long long)words[i] * (2 * i + 1);
  atomicAdd(sum, own);
}

// ---- one layer's operands on the device ---------------------------------------------------------------------------

enum routing {
  EVEN,
  SKEWED,
  ONE,
  HOLES
}; // HOLES: every third expert empty, some slots without an expert

struct layer {
  const char *name;
  int32_t T, R, D, F, E, K, rows;
  bool gated, biased, ragged;
  ms_activation activation;
  ms_dtype dtype;
  routing route;
  ms_cuda_math math;
};

struct operands {
  ms_cuda_shape shape = {};
  ms_cuda_view view = {};
  std::vector<ms_cuda_expert> experts;
  std::vector<int32_t> order, expert_of; // expert_of[slot] or -1
  std::vector<ms_cuda_tile> tiles;
  std::vector<void *> memory;

  template <typename T> T *take(int64_t count, int byte = 0xff) {
    void *at = nullptr;
    MUST(cudaMalloc(&at, (size_t)std::max<int64_t>(count, 1) * sizeof(T)));
    MUST(cudaMemset(at, byte, (size_t)std::max<int64_t>(count, 1) * sizeof(T)));
    memory.push_back(at);
    return (T *)at;
  }
  template <typename T> T *copy(const std::vector<T> &from) {
    T *at = take<T>((int64_t)from.size());
    MUST(cudaMemcpy(at, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    return at;
  }
  ~operands() {
    for (void *at : memory) cudaFree(at);
  }
};

int32_t expert_of_slot(const layer &l, int64_t slot) {
  uint32_t h = hash(ROUTE, (uint64_t)slot, 0);
  switch (l.route) {
  case ONE:
    return l.E - 1;
  case SKEWED:
    return (int32_t)(h % 10 < 6 ? h / 16 % std::max(1, l.E / 10) : h / 16 % l.E);
  case HOLES:
    return h % 7 == 0 ? -1 : (int32_t)(h / 16 % l.E) / 3 * 3;
  default:
    return (int32_t)(h % l.E);
  }
}

template <typename Storage>
void fill_matrix(void *at, uint64_t which, int64_t first, int64_t rows, int64_t columns,
                 int64_t ld) {
  int64_t blocks = std::min<int64_t>((rows * ld + 255) / 256, 4096);
  if (blocks > 0)
    fill<Storage><<<(unsigned)blocks, 256>>>((Storage *)at, which, first, rows, columns, ld);
  MUST(cudaGetLastError());
}

template <typename Storage> void make(const layer &l, operands &o) {
  ms_cuda_shape &s = o.shape;
  s.T = l.T, s.R = l.R, s.K = l.K, s.E = l.E, s.D = l.D, s.F = l.F;
  s.dtype = l.dtype, s.math = l.math, s.gated = l.gated;
  const int32_t size = sizeof(Storage), piece = 16 / size;
  int device = 0, sms = 0;
  MUST(cudaGetDevice(&device));
  MUST(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  s.sms = sms;
  s.N = (int64_t)l.R * l.T, s.slots = s.N * l.K;
  s.ld_x = (l.D + piece - 1) / piece * piece, s.ld_h = (l.F + piece - 1) / piece * piece;
  s.tile_rows = l.rows;
  s.max_tiles = (int32_t)(s.slots / l.rows + std::min<int64_t>(l.E, s.slots));
  auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  s.weight_at = 256;
  s.hidden_at = s.weight_at + aligned((int64_t)l.T * l.K * 4);
  s.message_bytes = s.hidden_at + aligned(l.T * s.ld_x * size);

  char *messages = o.take<char>(l.R * s.message_bytes);
  for (int32_t r = 0; r < l.R; r++) {
    fill_matrix<float>(messages + r * s.message_bytes + s.weight_at, WEIGHT, (int64_t)r * l.T, l.T,
                       l.K, l.K);
    fill_matrix<Storage>(messages + r * s.message_bytes + s.hidden_at, HIDDEN, (int64_t)r * l.T,
                         l.T, l.D, s.ld_x);
  }
  for (int32_t e = 0; e < l.E; e++) {
    ms_cuda_expert x = {};
    x.width = l.ragged ? std::max(0, l.F - e * 37) : l.F;
    x.ld_out = (x.width + piece - 1) / piece * piece;
    int64_t in_rows = x.width * (l.gated ? 2 : 1);
    Storage *w_in = o.take<Storage>(in_rows * s.ld_x),
            *w_out = o.take<Storage>((int64_t)l.D * x.ld_out);
    fill_matrix<Storage>(w_in, W_IN, (int64_t)e * 2 * l.F, in_rows, l.D, s.ld_x);
    fill_matrix<Storage>(w_out, W_OUT, (int64_t)e * l.D, l.D, x.width, x.ld_out);
    x.w_in = w_in, x.w_out = w_out;
    if (l.biased) {
      float *b_in = o.take<float>(in_rows), *b_out = o.take<float>(l.D);
      fill_matrix<float>(b_in, B_IN, e, 1, in_rows, in_rows);
      fill_matrix<float>(b_out, B_OUT, e, 1, l.D, l.D);
      x.b_in = b_in, x.b_out = b_out;
    }
    o.experts.push_back(x);
  }
  std::vector<std::vector<int32_t>> slots_of((size_t)l.E);
  for (int32_t slot = 0; slot < s.slots; slot++) {
    int32_t e = expert_of_slot(l, slot);
    o.expert_of.push_back(e);
    if (e >= 0) slots_of[(size_t)e].push_back(slot);
  }
  for (int32_t e = 0; e < l.E; e++) {
    int32_t first = (int32_t)o.order.size(), rows = (int32_t)slots_of[(size_t)e].size();
    for (int32_t at = 0; at < rows; at += l.rows)
      o.tiles.push_back({e, first + at, std::min(l.rows, rows - at)});
    o.order.insert(o.order.end(), slots_of[(size_t)e].begin(), slots_of[(size_t)e].end());
  }
  std::vector<int32_t> count{(int32_t)o.tiles.size()}, order = o.order;
  std::vector<ms_cuda_tile> tiles = o.tiles;
  order.resize((size_t)s.slots, INT32_MAX);
  tiles.resize((size_t)s.max_tiles, {INT32_MAX, INT32_MAX, INT32_MAX});
  o.view.hidden = messages + s.hidden_at;
  o.view.hidden_stride = s.message_bytes;
  o.view.messages = messages;
  o.view.order = o.copy(order);
  o.view.tiles = o.copy(tiles);
  o.view.tile_count = o.copy(count);
  o.view.experts = o.copy(o.experts);
  o.view.h = (char *)o.take<Storage>(s.slots * s.ld_h);
  o.view.slot = o.take<float>(s.slots * l.D);
}

// The launchers under test, which main names; a program links those only.
struct launchers {
  decltype(&ms_cuda_ffn_up) up;
  decltype(&ms_cuda_ffn_down) down;
  int32_t sms; // multiprocessors to check with
} ffn;

void run(const layer &l, const operands &o, bool up, bool down) {
  ms_error err = {};
  ms_status status = up ? ffn.up(&o.shape, &o.view, l.activation, nullptr, &err) : MS_OK;
  if (status == MS_OK && down) status = ffn.down(&o.shape, &o.view, nullptr, &err);
  if (status == MS_OK) return;
  printf("FAIL %s: %s\n", l.name, err.msg);
  exit(1);
}

// ---- the same in double -------------------------------------------------------------------------------------------

double activate(ms_activation activation, double x) {
  switch (activation) {
  case MS_RELU:
    return x > 0 ? x : 0;
  case MS_GELU:
    return 0.5 * x * erfc(-x * 0.70710678118654752440);
  case MS_GELU_TANH:
    return 0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
  case MS_SILU:
    return x / (1 + exp(-x));
  case MS_CLAMPED_SWIGLU:
    return std::min(x, 7.) / (1 + exp(-1.702 * std::min(x, 7.)));
  default:
    return x;
  }
}

struct sum {
  double value, magnitude;
};

sum product(const layer &l, int32_t e, int64_t token, int32_t row, int32_t bias) { // row of w_in
  sum s = {l.biased ? element(B_IN, (uint64_t)e, (uint64_t)bias) : 0., 1};
  for (int32_t d = 0; d < l.D; d++) {
    double p = (double)element(HIDDEN, (uint64_t)token, (uint64_t)d) *
               element(W_IN, (uint64_t)e * 2 * l.F + (uint64_t)row, (uint64_t)d);
    s.value += p, s.magnitude += fabs(p);
  }
  return s;
}

// The largest error over its tolerance; NaN never passes. `stride`: check every stride-th row of `order`.
template <typename Storage> double worst(const layer &l, const operands &o, int32_t stride) {
  const ms_cuda_shape &s = o.shape;
  const double half_ulp = l.dtype == MS_BF16  ? 1. / 256
                          : l.dtype == MS_F16 ? 1. / 2048
                                              : 1. / (1 << 24);
  const double cut_up = l.math == MS_CUDA_FMA ? sqrt(l.D + 1.) / (1 << 24) : 3e-5;
  const double cut_down = l.math == MS_CUDA_FMA    ? sqrt(l.F + 1.) / (1 << 24)
                          : l.math == MS_CUDA_TF32 ? 3e-5 + 1. / 2048
                                                   : 3e-5;
  const int32_t piece = 16 / sizeof(Storage);
  double worst = 0;
  auto compare = [&](double got, double expected, double tolerance) {
    double ratio = fabs(got - expected) / tolerance;
    if (!(ratio <= worst)) worst = std::isnan(ratio) ? HUGE_VAL : std::max(worst, ratio);
  };
  std::vector<Storage> h((size_t)s.ld_h);
  std::vector<float> y((size_t)l.D);
  for (size_t i = 0; i < o.order.size(); i += (size_t)stride) {
    int32_t slot = o.order[i], e = o.expert_of[(size_t)slot], width = o.experts[(size_t)e].width;
    int64_t token = slot / l.K;
    MUST(cudaMemcpy(h.data(), o.view.h + (int64_t)i * s.ld_h * (int64_t)sizeof(Storage),
                    h.size() * sizeof(Storage), cudaMemcpyDeviceToHost));
    MUST(cudaMemcpy(y.data(), o.view.slot + (int64_t)slot * l.D, y.size() * 4,
                    cudaMemcpyDeviceToHost));
    for (int32_t f = 0; f < (width + piece - 1) / piece * piece; f++) {
      if (f >= width) { // zeros up to 16 bytes
        compare((double)(float)h[(size_t)f], 0, 1e-30);
        continue;
      }
      sum gate = product(l, e, token, f, f), up = {1, 0};
      if (l.gated) up = product(l, e, token, width + f, width + f);
      if (l.activation == MS_CLAMPED_SWIGLU) up.value = std::clamp(up.value, -7., 7.) + 1;
      double expected = activate(l.activation, gate.value) * up.value;
      double slack =
          cut_up * (1.2 * gate.magnitude * fabs(up.value) + fabs(gate.value) * up.magnitude) +
          1e-6 * (1 + fabs(up.value)); // the activation's own
      compare((double)(float)h[(size_t)f], expected, half_ulp * fabs(expected) + slack);
    }
    double weight = element(WEIGHT, (uint64_t)token, (uint64_t)(slot % l.K));
    for (int32_t d = 0; d < l.D; d++) {
      double expected = l.biased ? element(B_OUT, (uint64_t)e, (uint64_t)d) : 0, magnitude = 1;
      for (int32_t f = 0; f < width; f++) {
        double p = (double)(float)h[(size_t)f] *
                   element(W_OUT, (uint64_t)e * l.D + (uint64_t)d, (uint64_t)f);
        expected += p, magnitude += fabs(p);
      }
      compare(y[(size_t)d], weight * expected, cut_down * magnitude);
    }
  }
  return worst;
}

template <typename Storage>
int untouched(const layer &l, const operands &o) { // slots without an expert keep their NaN
  std::vector<uint32_t> y((size_t)l.D);
  for (int32_t slot = 0; slot < o.shape.slots; slot++) {
    if (o.expert_of[(size_t)slot] >= 0) continue;
    MUST(cudaMemcpy(y.data(), o.view.slot + (int64_t)slot * l.D, y.size() * 4,
                    cudaMemcpyDeviceToHost));
    for (uint32_t word : y)
      if (word != 0xffffffffu) return 0;
  }
  return 1;
}

template <typename Storage> bool check(const layer &l) {
  operands o;
  make<Storage>(l, o);
  o.shape.sms = ffn.sms;
  run(l, o, true, true);
  MUST(cudaDeviceSynchronize());
  double error = worst<Storage>(l, o, 1);
  bool ok = error <= 1 && untouched<Storage>(l, o);
  printf("%-4s %-34s error / tolerance %.3f\n", ok ? "ok" : "FAIL", l.name, error);
  fflush(stdout);
  return ok;
}

double median(std::vector<float> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

} // namespace

#endif
