// test_ffn.cu - ffn by mma.sync, by tf32 and in strict float32 against sums in double, on ptxsim or on a GPU, alike.
//
//   nvcc -std=c++17 -O3 -cudart shared -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
//     -gencode arch=compute_90a,code=sm_90a -o test_ffn tests/cuda/test_ffn.cu cuda/step4_ffn.cu cuda/status.c
//     csrc/base/error.c                  (with cuda/step4_ffn_sm90.cu and -DMS_CUDA_SM90: --time also times wgmma)
//   test_ffn               every case, each line ok or FAIL
//   test_ffn NAME          the cases with NAME in theirs
//   test_ffn --repeat N    the same large cases N times: the same bits each time
//   test_ffn --time [NAME] up and down (medians, CUDA events, L2 flushed before each) at every number of tile rows, so
//                          that choose_tile_rows in cuda/shape.c can be checked; some rows verified
//
// SPDX-License-Identifier: Apache-2.0
#include "ffn_layer.cuh"

namespace {

bool check_any(const layer &l) {
  return l.dtype == MS_F32    ? check<float>(l)
         : l.dtype == MS_BF16 ? check<__nv_bfloat16>(l)
                              : check<__half>(l);
}

// ---- time ---------------------------------------------------------------------------------------------------------

// What the kernels must move at least: the weights of experts that have rows, hidden, H and the slots.
double bytes_up(const layer &l, const operands &o, double size) {
  std::vector<char> hit((size_t)l.E);
  for (const ms_cuda_tile &tile : o.tiles) hit[(size_t)tile.expert] = 1;
  double experts = (double)std::count(hit.begin(), hit.end(), 1), rows = (double)o.order.size();
  return size * (experts * l.D * l.F * (l.gated ? 2 : 1) + (double)o.shape.N * l.D + rows * l.F);
}
double bytes_down(const layer &l, const operands &o, double size) {
  layer plain = l; // w_out has no gate rows
  plain.gated = false;
  return bytes_up(plain, o, size) - size * (double)o.shape.N * l.D +
         4. * (double)o.order.size() * l.D;
}

template <typename Storage> bool time_one(const layer &l) {
  operands o;
  make<Storage>(l, o);
  const size_t flush = (size_t)128 << 20; // more than the L2 of any device
  char *flushed = o.take<char>((int64_t)flush);
  cudaEvent_t at[2];
  for (auto &event : at) MUST(cudaEventCreate(&event));
  auto time = [&](bool up) {
    std::vector<float> times;
    for (int i = 0; i < 13; i++) {
      MUST(cudaMemsetAsync(flushed, i,
                           flush)); // the host is ahead while this runs: no launch latency is timed
      MUST(cudaEventRecord(at[0]));
      run(l, o, up, !up);
      MUST(cudaEventRecord(at[1]));
      MUST(cudaEventSynchronize(at[1]));
      float ms;
      MUST(cudaEventElapsedTime(&ms, at[0], at[1]));
      if (i >= 3) times.push_back(ms);
    }
    return median(times);
  };
  double up = time(true), down = time(false);
  for (auto &event : at) MUST(cudaEventDestroy(event));
  double flops = 2. * (double)o.order.size() * l.D * l.F;
  double error = worst<Storage>(l, o, (int32_t)(o.order.size() / 2 + 1)); // two rows
  bool ok = error <= 1;
  const char *const maths[] = {"fma", "tf32", "mma", "wgmma"};
  printf("%-4s %-36s %-5s rows %3d  up %8.4f ms %6.1f TFLOP/s %5.0f GB/s  down %8.4f ms %6.1f "
         "TFLOP/s %5.0f GB/s  "
         "error / tolerance %.3f\n",
         ok ? "ok" : "FAIL", l.name, maths[l.math], l.rows, up,
         (l.gated ? 2 : 1) * flops / up * 1e-9, bytes_up(l, o, sizeof(Storage)) / up * 1e-6, down,
         flops / down * 1e-9, bytes_down(l, o, sizeof(Storage)) / down * 1e-6, error);
  fflush(stdout);
  return ok;
}

bool time_all(const layer &shape) {
  bool ok = true;
  layer l = shape;
  for (int32_t rows : {16, 64, 128}) {
    l.rows = rows;
    int64_t share = (int64_t)l.T * l.K / l.E;
    if ((rows == 16 && share > 256) || (rows == 128 && share < 16)) continue; // never chosen
    l.math = MS_CUDA_MMA, l.dtype = MS_BF16;
    ok &= time_one<__nv_bfloat16>(l);
#ifdef MS_CUDA_SM90
    l.math = MS_CUDA_WGMMA;
    if (rows > 16) ok &= time_one<__nv_bfloat16>(l);
#endif
    if (l.T > 8192) continue;
    l.dtype = MS_F32, l.math = MS_CUDA_TF32;
    ok &= time_one<float>(l);
    l.math = MS_CUDA_FMA;
    ok &= time_one<float>(l);
  }
  return ok;
}

bool repeat(int count) {
  int other = 0;
  for (int32_t rows : {16, 64, 128}) {
    layer l = {"repeat", 8192, 1,    768,     3072,    8,      2,          rows,
               false,    true, true, MS_GELU, MS_BF16, SKEWED, MS_CUDA_MMA};
    operands o;
    make<__nv_bfloat16>(l, o);
    auto *sums = o.take<unsigned long long>(count, 0);
    for (int i = 0; i < count; i++) {
      MUST(cudaMemsetAsync(o.view.slot, 0xff,
                           (size_t)(o.shape.slots * l.D) * 4)); // a row not written shows
      run(l, o, true, true);
      checksum<<<264, 256>>>((const uint32_t *)o.view.slot, o.shape.slots * l.D, sums + i);
      MUST(cudaGetLastError());
    }
    std::vector<unsigned long long> got((size_t)count);
    MUST(cudaMemcpy(got.data(), sums, got.size() * 8, cudaMemcpyDeviceToHost));
    for (auto sum : got) other += sum != got[0];
  }
  printf("%-4s 3 x %d repeats, %d differ from the first\n", other ? "FAIL" : "ok", count, other);
  return other == 0;
}

// ---- cases --------------------------------------------------------------------------------------------------------

const layer CASES[] = {
    //                                   T  R    D    F  E  K rows gated  biased ragged
    {"one token", 1, 1, 64, 64, 3, 1, 16, false, false, false, MS_RELU, MS_BF16, EVEN, MS_CUDA_MMA},
    {"no token", 0, 1, 64, 64, 3, 1, 16, false, false, false, MS_RELU, MS_BF16, EVEN, MS_CUDA_MMA},
    {"16 rows, 64 experts, most empty", 7, 1, 96, 160, 64, 2, 16, false, true, false, MS_GELU,
     MS_F16, EVEN, MS_CUDA_MMA},
    {"16 rows, many steps", 17, 1, 640, 640, 1, 1, 16, false, false, false, MS_RELU, MS_BF16, ONE,
     MS_CUDA_MMA},
    {"16 rows, a full tile", 16, 1, 160, 96, 1, 1, 16, false, true, false, MS_IDENTITY, MS_F16, ONE,
     MS_CUDA_MMA},
    {"16 rows, gated, 2 ranks, top 4", 9, 2, 96, 200, 3, 4, 16, true, true, true, MS_SILU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"16 rows, odd sizes, gated", 15, 1, 37, 75, 2, 2, 16, true, true, true, MS_GELU_TANH, MS_F16,
     EVEN, MS_CUDA_MMA},
    {"64 rows, a full tile", 64, 1, 32, 136, 1, 1, 64, false, true, false, MS_GELU, MS_F16, ONE,
     MS_CUDA_MMA},
    {"64 rows, one more, many steps", 65, 1, 448, 448, 1, 1, 64, false, false, false, MS_RELU,
     MS_BF16, ONE, MS_CUDA_MMA},
    {"64 rows, gated, one less", 63, 1, 104, 200, 1, 1, 64, true, false, false, MS_SILU, MS_F16,
     ONE, MS_CUDA_MMA},
    {"64 rows, 2 ranks, top 4", 20, 2, 160, 300, 3, 4, 64, false, true, true, MS_GELU_TANH, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"128 rows, a full tile", 128, 1, 64, 256, 1, 1, 128, false, false, false, MS_RELU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"128 rows, one less, ragged D", 127, 1, 100, 72, 1, 1, 128, false, true, false, MS_IDENTITY,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"128 rows, one more, odd widths", 129, 1, 37, 301, 2, 1, 128, false, true, true, MS_GELU,
     MS_F16, ONE, MS_CUDA_MMA},
    {"128 rows, gated, 2 ranks, top 2", 70, 2, 96, 200, 3, 2, 128, true, true, true, MS_SILU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"128 rows, many steps", 64, 1, 512, 320, 1, 1, 128, false, false, false, MS_RELU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"empty experts, slots without one", 150, 1, 200, 96, 8, 2, 128, false, false, false,
     MS_GELU_TANH, MS_F16, HOLES, MS_CUDA_MMA},
    {"narrow experts down to no column", 90, 1, 64, 64, 4, 1, 128, false, true, true, MS_RELU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"narrow experts, 16 rows", 12, 1, 64, 64, 4, 1, 16, false, true, true, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_MMA},
    {"16 rows, clamped", 15, 1, 104, 75, 2, 1, 16, true, true, false, MS_CLAMPED_SWIGLU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"128 rows, clamped", 100, 1, 96, 72, 1, 1, 128, true, true, false, MS_CLAMPED_SWIGLU, MS_F16,
     EVEN, MS_CUDA_MMA},
    {"fma, clamped", 20, 1, 96, 37, 1, 1, 64, true, true, false, MS_CLAMPED_SWIGLU, MS_F32, EVEN,
     MS_CUDA_FMA},
    {"tf32, 16 rows, many steps", 17, 1, 320, 320, 1, 1, 16, false, true, false, MS_GELU, MS_F32,
     ONE, MS_CUDA_TF32},
    {"tf32, 16 rows, gated", 12, 1, 64, 72, 2, 1, 16, true, true, false, MS_SILU, MS_F32, EVEN,
     MS_CUDA_TF32},
    {"tf32, 64 rows", 65, 1, 96, 72, 1, 1, 64, false, true, false, MS_GELU, MS_F32, EVEN,
     MS_CUDA_TF32},
    {"tf32, 128 rows, gated", 129, 1, 64, 72, 1, 1, 128, true, true, false, MS_SILU, MS_F32, EVEN,
     MS_CUDA_TF32},
    {"tf32, 64 rows, odd sizes, gated", 65, 1, 37, 75, 2, 1, 64, true, true, true, MS_SILU, MS_F32,
     EVEN, MS_CUDA_TF32},
    {"tf32, 128 rows, 2 ranks, top 2", 40, 2, 96, 160, 2, 2, 128, false, true, true, MS_RELU,
     MS_F32, EVEN, MS_CUDA_TF32},
    {"fma, one token", 1, 1, 32, 64, 3, 1, 16, false, false, false, MS_RELU, MS_F32, EVEN,
     MS_CUDA_FMA},
    {"fma, 16 rows, many steps", 17, 1, 256, 256, 1, 1, 16, false, true, false, MS_GELU, MS_F32,
     ONE, MS_CUDA_FMA},
    {"fma, 16 rows, gated, 2 ranks, top 4", 3, 2, 64, 96, 3, 4, 16, true, true, true, MS_SILU,
     MS_F32, EVEN, MS_CUDA_FMA},
    {"fma, 64 rows, odd sizes, gated", 65, 1, 37, 75, 2, 1, 64, true, true, true, MS_GELU_TANH,
     MS_F32, ONE, MS_CUDA_FMA},
    {"fma, 128 rows, holes", 129, 1, 33, 66, 3, 1, 128, false, true, true, MS_IDENTITY, MS_F32,
     HOLES, MS_CUDA_FMA},
    {"fma, 128 rows, a full tile", 128, 1, 64, 64, 1, 1, 128, false, true, false, MS_RELU, MS_F32,
     ONE, MS_CUDA_FMA},
};

const layer TIMED[] = {
    // rows, dtype and math: time_all's
    {"E=8 D=768 F=3072 T=120", 120, 1, 768, 3072, 8, 1, 0, false, false, false, MS_RELU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"E=8 D=768 F=3072 T=512", 512, 1, 768, 3072, 8, 1, 0, false, false, false, MS_RELU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"E=8 D=768 F=3072 T=2048", 2048, 1, 768, 3072, 8, 1, 0, false, false, false, MS_RELU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"E=8 D=768 F=3072 T=8192", 8192, 1, 768, 3072, 8, 1, 0, false, false, false, MS_RELU, MS_BF16,
     EVEN, MS_CUDA_MMA},
    {"E=8 D=768 F=3072 T=32768", 32768, 1, 768, 3072, 8, 1, 0, false, false, false, MS_RELU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"E=8 D=768 F=3072 T=32768 skewed", 32768, 1, 768, 3072, 8, 1, 0, false, false, false, MS_RELU,
     MS_BF16, SKEWED, MS_CUDA_MMA},
    {"E=128 D=768 F=3072 T=120", 120, 1, 768, 3072, 128, 1, 0, false, false, false, MS_RELU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"E=128 D=768 F=3072 T=2048", 2048, 1, 768, 3072, 128, 1, 0, false, false, false, MS_RELU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"E=128 D=768 F=3072 T=8192", 8192, 1, 768, 3072, 128, 1, 0, false, false, false, MS_RELU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"E=128 D=768 F=3072 T=32768", 32768, 1, 768, 3072, 128, 1, 0, false, false, false, MS_RELU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"E=128 D=F=640 top 4 gated T=120", 120, 1, 640, 640, 128, 4, 0, true, true, false, MS_SILU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"E=128 D=F=640 top 4 gated T=2048", 2048, 1, 640, 640, 128, 4, 0, true, true, false, MS_SILU,
     MS_BF16, EVEN, MS_CUDA_MMA},
    {"E=128 D=F=640 top 4 gated T=16384", 16384, 1, 640, 640, 128, 4, 0, true, true, false, MS_SILU,
     MS_BF16, EVEN, MS_CUDA_MMA},
};

} // namespace

int main(int argc, char **argv) {
  bool ok = true;
  ffn = {ms_cuda_ffn_up, ms_cuda_ffn_down, 1}; // few blocks: each goes from item to item
  if (argc == 3 && !strcmp(argv[1], "--repeat"))
    ok = repeat(atoi(argv[2]));
  else if (argc >= 2 && !strcmp(argv[1], "--time"))
    for (const layer &l : TIMED) {
      if (argc == 3 && !strstr(l.name, argv[2])) continue;
      ok &= time_all(l);
    }
  else
    for (const layer &l : CASES) {
      if (argc == 2 && !strstr(l.name, argv[1])) continue;
      ok &= check_any(l);
    }
  printf(ok ? "all ok\n" : "FAILED\n");
  return ok ? 0 : 1;
}
