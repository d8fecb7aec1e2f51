// test_ffn_sm90.cu - ffn on wgmma against sums in double, on ptxsim or on a Hopper GPU, alike.
//
//   nvcc -std=c++17 -O3 -cudart shared -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a
//     -o test_ffn_sm90 tests/cuda/test_ffn_sm90.cu cuda/step4_ffn_sm90.cu csrc/base/error.c
//   test_ffn_sm90               every case, each line ok or FAIL
//   test_ffn_sm90 --repeat N    the same large case N times: the same bits each time
//   test_ffn_sm90 --time        TFLOP/s of up and down (medians, CUDA events); a few rows checked
//
// SPDX-License-Identifier: Apache-2.0
#include "../../cuda/step4_ffn_sm90.h"
#include "ffn_layer.cuh"

namespace {

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
  layer l = {"repeat", 8192, 1, 768, 3072, 8, 2, 128, false, true, true, MS_GELU, MS_BF16, SKEWED, MS_CUDA_WGMMA};
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
    {"one tile", 128, 1, 64, 256, 1, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN, MS_CUDA_WGMMA},
    {"a row less, ragged D", 127, 1, 100, 72, 1, 1, 128, false, true, false, MS_IDENTITY, MS_BF16, EVEN, MS_CUDA_WGMMA},
    {"a row more, odd widths", 129, 1, 37, 301, 2, 1, 128, false, true, true, MS_GELU, MS_F16, ONE, MS_CUDA_WGMMA},
    {"gated, 2 ranks, top 2", 70, 2, 96, 200, 3, 2, 128, true, true, true, MS_SILU, MS_BF16, EVEN, MS_CUDA_WGMMA},
    {"empty experts, no expert", 150, 1, 200, 96, 8, 2, 128, false, false, false, MS_GELU_TANH, MS_F16, HOLES,
     MS_CUDA_WGMMA},
    {"narrow experts down to no column", 90, 1, 64, 64, 4, 1, 128, false, true, true, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"many steps", 64, 1, 512, 320, 1, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN, MS_CUDA_WGMMA},
    {"one token", 1, 1, 64, 64, 3, 1, 64, false, false, false, MS_RELU, MS_BF16, EVEN, MS_CUDA_WGMMA},
    {"64 rows, 2 ranks, top 4", 20, 2, 160, 300, 3, 4, 64, false, true, true, MS_GELU, MS_BF16, EVEN, MS_CUDA_WGMMA},
    {"64 rows, float16", 63, 1, 104, 96, 1, 1, 64, false, true, false, MS_GELU, MS_F16, EVEN, MS_CUDA_WGMMA},
    {"64 rows, gated", 65, 1, 104, 200, 1, 1, 64, true, false, false, MS_SILU, MS_F16, ONE, MS_CUDA_WGMMA},
    {"clamped", 100, 1, 96, 72, 1, 1, 128, true, true, false, MS_CLAMPED_SWIGLU, MS_BF16, EVEN, MS_CUDA_WGMMA},
    {"64 rows, many steps", 64, 1, 448, 448, 1, 1, 64, false, false, false, MS_RELU, MS_BF16, EVEN, MS_CUDA_WGMMA},
};

const layer TIMED[] = {
    {"E=8 D=768 F=3072 T=8192", 8192, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=8 D=768 F=3072 T=32768", 32768, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=8 D=768 F=3072 T=65536", 65536, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=8 D=768 F=3072 T=65536 skewed", 65536, 1, 768, 3072, 8, 1, 128, false, false, false, MS_RELU, MS_BF16, SKEWED,
     MS_CUDA_WGMMA},
    {"E=128 D=768 F=3072 T=8192, 64 rows", 8192, 1, 768, 3072, 128, 1, 64, false, false, false, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=128 D=768 F=3072 T=32768", 32768, 1, 768, 3072, 128, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=128 D=768 F=3072 T=131072", 131072, 1, 768, 3072, 128, 1, 128, false, false, false, MS_RELU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=128 D=F=640 top 4 gated T=8192", 8192, 1, 640, 640, 128, 4, 128, true, true, false, MS_SILU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=128 D=F=640 top 4 gated T=32768", 32768, 1, 640, 640, 128, 4, 128, true, true, false, MS_SILU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
    {"E=8 D=4096 F=14336 T=8192 top 2", 8192, 1, 4096, 14336, 8, 2, 128, true, false, false, MS_SILU, MS_BF16, EVEN,
     MS_CUDA_WGMMA},
};

} // namespace

int main(int argc, char **argv) {
  bool ok = true;
  ffn = {ms_cuda_ffn_up_sm90, ms_cuda_ffn_down_sm90, 2}; // few blocks: each goes from item to item
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
