// test_ffn_sm90.cu - ffn on wgmma against sums in double, on ptxsim or on a Hopper GPU, alike.
//
//   nvcc -std=c++17 -O3 -cudart shared -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a
//     -o test_ffn_sm90 tests/cuda/test_ffn_sm90.cu cuda/step4_ffn_sm90.cu csrc/base/error.c
//   test_ffn_sm90               every case, each line ok or FAIL
//   test_ffn_sm90 --repeat N    the same large case N times: the same bits each time
//   test_ffn_sm90 --time        TFLOP/s of up and down (medians, CUDA events); a few rows checked
//
// Operands are hashes of their position, made on the device, so that any of them can be known here without a copy.
// Rows are padded with zeros to 16 bytes; what lies beyond that, and beyond rows and columns, is NaN: reading it
// shows.
// Tolerance: rounding of H to 16 bits, and 3e-5 of the sum of |products|, which covers fp32 sums in tensor cores
// that cut (arXiv 2511.10909).
//
// SPDX-License-Identifier: Apache-2.0
#include "../../cuda/step4_ffn_sm90.h"

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
__global__ void fill(Storage *matrix, uint64_t which, int64_t first_row, int64_t rows, int64_t columns, int64_t ld) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < rows * ld; i += (int64_t)gridDim.x * blockDim.x)
    matrix[i] = (Storage)(i % ld < columns ? element(which, first_row + i / ld, i % ld) : 0.f);
}

__global__ void checksum(const uint32_t *words, int64_t count, unsigned long long *sum) {
  unsigned long long own = 0;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
    own += (unsigned long long)words[i] * (2 * i + 1);
  atomicAdd(sum, own);
}

// ---- one layer's operands on the device ---------------------------------------------------------------------------

enum routing { EVEN, SKEWED, ONE, HOLES }; // HOLES: every third expert empty, some slots without an expert

struct layer {
  const char *name;
  int32_t T, R, D, F, E, K, rows;
  bool gated, biased, ragged;
  ms_activation activation;
  ms_dtype dtype;
  routing route;
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
  case ONE: return l.E - 1;
  case SKEWED: return (int32_t)(h % 10 < 6 ? h / 16 % std::max(1, l.E / 10) : h / 16 % l.E);
  case HOLES: return h % 7 == 0 ? -1 : (int32_t)(h / 16 % l.E) / 3 * 3;
  default: return (int32_t)(h % l.E);
  }
}

template <typename Storage> void fill_matrix(void *at, uint64_t which, int64_t first, int64_t rows, int64_t columns,
                                             int64_t ld) {
  int64_t blocks = std::min<int64_t>((rows * ld + 255) / 256, 4096);
  if (blocks > 0) fill<Storage><<<(unsigned)blocks, 256>>>((Storage *)at, which, first, rows, columns, ld);
  MUST(cudaGetLastError());
}

template <typename Storage> void make(const layer &l, operands &o) {
  ms_cuda_shape &s = o.shape;
  s.T = l.T, s.R = l.R, s.K = l.K, s.E = l.E, s.D = l.D, s.F = l.F;
  s.dtype = l.dtype, s.math = MS_CUDA_WGMMA, s.gated = l.gated;
  int device = 0, sms = 0;
  MUST(cudaGetDevice(&device));
  MUST(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  s.sms = sms;
  s.N = (int64_t)l.R * l.T, s.slots = s.N * l.K;
  s.ld_x = (l.D + 7) / 8 * 8, s.ld_h = (l.F + 7) / 8 * 8;
  s.tile_rows = l.rows;
  s.max_tiles = (int32_t)(s.slots / l.rows + std::min<int64_t>(l.E, s.slots));
  auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  s.weight_at = 256;
  s.hidden_at = s.weight_at + aligned((int64_t)l.T * l.K * 4);
  s.message_bytes = s.hidden_at + aligned(l.T * s.ld_x * 2);

  char *messages = o.take<char>(l.R * s.message_bytes);
  for (int32_t r = 0; r < l.R; r++) {
    fill_matrix<float>(messages + r * s.message_bytes + s.weight_at, WEIGHT, (int64_t)r * l.T, l.T, l.K, l.K);
    fill_matrix<Storage>(messages + r * s.message_bytes + s.hidden_at, HIDDEN, (int64_t)r * l.T, l.T, l.D, s.ld_x);
  }
  for (int32_t e = 0; e < l.E; e++) {
    ms_cuda_expert x = {};
    x.width = l.ragged ? std::max(0, l.F - e * 37) : l.F;
    x.ld_out = (x.width + 7) / 8 * 8;
    int64_t in_rows = x.width * (l.gated ? 2 : 1);
    Storage *w_in = o.take<Storage>(in_rows * s.ld_x), *w_out = o.take<Storage>((int64_t)l.D * x.ld_out);
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
    for (int32_t at = 0; at < rows; at += l.rows) o.tiles.push_back({e, first + at, std::min(l.rows, rows - at)});
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

void run(const layer &l, const operands &o, bool up, bool down) {
  ms_error err = {};
  ms_status status = up ? ms_cuda_ffn_up_sm90(&o.shape, &o.view, l.activation, nullptr, &err) : MS_OK;
  if (status == MS_OK && down) status = ms_cuda_ffn_down_sm90(&o.shape, &o.view, nullptr, &err);
  if (status == MS_OK) return;
  printf("FAIL %s: %s\n", l.name, err.msg);
  exit(1);
}

// ---- the same in double -------------------------------------------------------------------------------------------

double activate(ms_activation activation, double x) {
  switch (activation) {
  case MS_RELU: return x > 0 ? x : 0;
  case MS_GELU: return 0.5 * x * erfc(-x * 0.70710678118654752440);
  case MS_GELU_TANH: return 0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
  case MS_SILU: return x / (1 + exp(-x));
  default: return x;
  }
}

struct sum { double value, magnitude; };

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
  const double half_ulp = l.dtype == MS_BF16 ? 1. / 256 : 1. / 2048, cut = 3e-5;
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
    MUST(cudaMemcpy(h.data(), o.view.h + (int64_t)i * s.ld_h * 2, h.size() * 2, cudaMemcpyDeviceToHost));
    MUST(cudaMemcpy(y.data(), o.view.slot + (int64_t)slot * l.D, y.size() * 4, cudaMemcpyDeviceToHost));
    for (int32_t f = 0; f < (width + 7) / 8 * 8; f++) {
      if (f >= width) { // zeros up to 16 bytes
        compare((double)(float)h[(size_t)f], 0, 1e-30);
        continue;
      }
      sum gate = product(l, e, token, f, f), up = {1, 0};
      if (l.gated) up = product(l, e, token, width + f, width + f);
      double expected = activate(l.activation, gate.value) * up.value;
      double slack = cut * (1.2 * gate.magnitude * fabs(up.value) + fabs(gate.value) * up.magnitude) + 1e-6;
      compare((double)(float)h[(size_t)f], expected, half_ulp * fabs(expected) + slack);
    }
    double weight = element(WEIGHT, (uint64_t)token, (uint64_t)(slot % l.K));
    for (int32_t d = 0; d < l.D; d++) {
      double expected = l.biased ? element(B_OUT, (uint64_t)e, (uint64_t)d) : 0, magnitude = 1;
      for (int32_t f = 0; f < width; f++) {
        double p = (double)(float)h[(size_t)f] * element(W_OUT, (uint64_t)e * l.D + (uint64_t)d, (uint64_t)f);
        expected += p, magnitude += fabs(p);
      }
      compare(y[(size_t)d], weight * expected, cut * magnitude);
    }
  }
  return worst;
}

template <typename Storage> int untouched(const layer &l, const operands &o) { // slots without an expert keep their NaN
  std::vector<uint32_t> y((size_t)l.D);
  for (int32_t slot = 0; slot < o.shape.slots; slot++) {
    if (o.expert_of[(size_t)slot] >= 0) continue;
    MUST(cudaMemcpy(y.data(), o.view.slot + (int64_t)slot * l.D, y.size() * 4, cudaMemcpyDeviceToHost));
    for (uint32_t word : y)
      if (word != 0xffffffffu) return 0;
  }
  return 1;
}

template <typename Storage> bool check(const layer &l) {
  operands o;
  make<Storage>(l, o);
  o.shape.sms = 2; // few blocks: each goes from item to item
  run(l, o, true, true);
  MUST(cudaDeviceSynchronize());
  double error = worst<Storage>(l, o, 1);
  bool ok = error <= 1 && untouched<Storage>(l, o);
  printf("%-4s %-34s error / tolerance %.3f\n", ok ? "ok" : "FAIL", l.name, error);
  fflush(stdout);
  return ok;
}

// ---- time ---------------------------------------------------------------------------------------------------------

double median(std::vector<float> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

bool time_one(const layer &l) {
  operands o;
  make<__nv_bfloat16>(l, o);
  cudaEvent_t at[3];
  for (auto &event : at) MUST(cudaEventCreate(&event));
  std::vector<float> up, down;
  for (int i = 0; i < 13; i++) {
    MUST(cudaEventRecord(at[0]));
    run(l, o, true, false);
    MUST(cudaEventRecord(at[1]));
    run(l, o, false, true);
    MUST(cudaEventRecord(at[2]));
    MUST(cudaEventSynchronize(at[2]));
    float ms[2];
    MUST(cudaEventElapsedTime(&ms[0], at[0], at[1]));
    MUST(cudaEventElapsedTime(&ms[1], at[1], at[2]));
    if (i >= 3) up.push_back(ms[0]), down.push_back(ms[1]);
  }
  for (auto &event : at) MUST(cudaEventDestroy(event));
  double flops = 2. * o.order.size() * l.D * l.F;
  double error = worst<__nv_bfloat16>(l, o, 997 * (int32_t)(1 + flops / 150e9)); // seconds on the host
  double ms_up = median(up), ms_down = median(down);
  printf("%-4s %-34s up %8.4f ms %6.1f TFLOP/s   down %8.4f ms %6.1f TFLOP/s   error / tolerance %.3f\n",
         error <= 1 ? "ok" : "FAIL", l.name, ms_up, (l.gated ? 2 : 1) * flops / ms_up * 1e-9, ms_down,
         flops / ms_down * 1e-9, error);
  fflush(stdout);
  return error <= 1;
}

bool repeat(int count) {
  layer l = {"repeat", 8192, 1, 768, 3072, 8, 2, 128, false, true, true, MS_GELU, MS_BF16, SKEWED};
  operands o;
  make<__nv_bfloat16>(l, o);
  auto *sums = o.take<unsigned long long>(count, 0);
  for (int i = 0; i < count; i++) {
    run(l, o, true, true);
    checksum<<<264, 256>>>((const uint32_t *)o.view.slot, o.shape.slots * l.D, sums + i);
    MUST(cudaGetLastError());
  }
  std::vector<unsigned long long> got((size_t)count);
  MUST(cudaMemcpy(got.data(), sums, got.size() * 8, cudaMemcpyDeviceToHost));
  int other = 0;
  for (auto sum : got) other += sum != got[0];
  printf("%-4s %d repeats, %d differ from the first\n", other ? "FAIL" : "ok", count, other);
  return other == 0;
}

const layer CASES[] = {
    //                           T   R    D    F  E  K rows gated  biased ragged
    {"one tile", 128, 1, 64, 256, 1, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"a row less, ragged D", 127, 1, 100, 72, 1, 1, 128, false, true, false, MS_IDENTITY, MS_BF16, EVEN},
    {"a row more, odd widths", 129, 1, 37, 301, 2, 1, 128, false, true, true, MS_GELU, MS_F16, ONE},
    {"gated, 2 ranks, top 2", 70, 2, 96, 200, 3, 2, 128, true, true, true, MS_SILU, MS_BF16, EVEN},
    {"empty experts, no expert", 150, 1, 200, 96, 8, 2, 128, false, false, false, MS_GELU_TANH, MS_F16, HOLES},
    {"narrow experts down to no column", 90, 1, 64, 64, 4, 1, 128, false, true, true, MS_RELU, MS_BF16, EVEN},
    {"many steps", 64, 1, 512, 320, 1, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"one token", 1, 1, 64, 64, 3, 1, 64, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"64 rows, 2 ranks, top 4", 20, 2, 160, 300, 3, 4, 64, false, true, true, MS_GELU, MS_BF16, EVEN},
    {"64 rows, gated", 65, 1, 104, 200, 1, 1, 64, true, false, false, MS_SILU, MS_F16, ONE},
    {"64 rows, many steps", 64, 1, 448, 448, 1, 1, 64, false, false, false, MS_RELU, MS_BF16, EVEN},
};

const layer TIMED[] = {
    {"E=8 D=768 F=3072 T=8192", 8192, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"E=8 D=768 F=3072 T=32768", 32768, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"E=8 D=768 F=3072 T=65536", 65536, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"E=8 D=768 F=3072 T=65536 skewed", 65536, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, SKEWED},
    {"E=128 D=768 F=3072 T=8192, 64 rows", 8192, 1, 768, 3072, 128, 1, 64, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"E=128 D=768 F=3072 T=32768", 32768, 1, 768, 3072, 128, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"E=128 D=768 F=3072 T=131072", 131072, 1, 768, 3072, 128, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN},
    {"E=128 D=F=640 top 4 gated T=8192", 8192, 1, 640, 640, 128, 4, 128, true, true, false, MS_SILU, MS_BF16, EVEN},
    {"E=128 D=F=640 top 4 gated T=32768", 32768, 1, 640, 640, 128, 4, 128, true, true, false, MS_SILU, MS_BF16, EVEN},
    {"E=8 D=4096 F=14336 T=8192 top 2", 8192, 1, 4096, 14336, 8, 2, 128, true, false, false, MS_SILU, MS_BF16, EVEN},
};

} // namespace

int main(int argc, char **argv) {
  bool ok = true;
  if (argc == 3 && !strcmp(argv[1], "--repeat"))
    ok = repeat(atoi(argv[2]));
  else if (argc == 2 && !strcmp(argv[1], "--time"))
    for (const layer &l : TIMED) ok &= time_one(l);
  else
    for (const layer &l : CASES) {
      if (argc == 2 && !strstr(l.name, argv[1])) continue;
      ok &= l.dtype == MS_BF16 ? check<__nv_bfloat16>(l) : check<__half>(l);
    }
  printf(ok ? "all ok\n" : "FAILED\n");
  return ok ? 0 : 1;
}
