// fragments.cu - which element each thread holds, as the chip says it, to compare with what ptxsim says.
//
//   fragments maps    mma.sync m16n8k16 and m16n8k8 (tf32), ldmatrix, stmatrix, wgmma through cuda/ms_ptx_sm90.cuh:
//                     sums that are the numbers of elements. The same text everywhere, or a map is wrong
//   fragments sums    products with exponents far apart, as the bits of the sums: they tell how a tensor core rounds
//
// expected/ holds what ptxsim printed. To make it again (on ptxsim, with PTXSIM_SM=90):
//   fragments maps > expected/maps.txt
//   for m in exact ampere hopper: PTXSIM_MMA=$m fragments sums > expected/sums_$m.txt
//
// SPDX-License-Identifier: Apache-2.0
#include "../../cuda/ms_ptx_sm90.cuh"

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

__device__ uint32_t halves(float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}

// Operand values, by what is asked: 0 A numbered, B picks column k = n; 1 the same, k = n + 8; 2 B numbered.
__device__ float a_of(int ask, int row, int k, int depth) {
  return ask == 2 ? (k == row % depth ? 1.f : 0.f) : (float)(row * depth + k);
}
__device__ float b_of(int ask, int k, int n, int depth) {
  return ask == 2 ? (float)(n * depth + k) : k == n % depth + (ask == 1 ? 8 : 0) ? 1.f : 0.f;
}

__global__ void m16n8k16(int *out, int ask) {
  int lane = threadIdx.x, row = lane / 4, k = lane % 4 * 2, n = lane / 4;
  auto a = [&](int r, int c) { return halves(a_of(ask, row + r, k + c, 16), a_of(ask, row + r, k + c + 1, 16)); };
  auto b = [&](int c) { return halves(b_of(ask, k + c, n, 16), b_of(ask, k + c + 1, n, 16)); };
  float d[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a(0, 0)), "r"(a(8, 0)), "r"(a(0, 8)), "r"(a(8, 8)), "r"(b(0)), "r"(b(8)));
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = (int)d[i];
}

__global__ void m16n8k8(int *out, int ask) {
  int lane = threadIdx.x, row = lane / 4, k = lane % 4, n = lane / 4;
  auto a = [&](int r, int c) { return __float_as_uint(a_of(ask, row + r, k + c, 8)); };
  auto b = [&](int c) { return __float_as_uint(b_of(ask, k + c, n, 8)); };
  float d[4] = {0, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a(0, 0)), "r"(a(8, 0)), "r"(a(0, 4)), "r"(a(8, 4)), "r"(b(0)), "r"(b(4)));
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = (int)d[i];
}

// Four 8x8 matrices numbered 0..255: loaded plain (ask 0), transposed (1), stored from fragments (2).
__global__ void matrices(int *out, int ask) {
  __shared__ __align__(16) uint16_t words[256];
  int lane = threadIdx.x;
  uint32_t own = ms_shared_address(words) + lane * 16, r[4];
  for (int i = lane; i < 256; i += 32) words[i] = ask == 2 ? 0xffff : i;
  __syncwarp();
  if (ask == 0)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(own)
                 : "memory");
  if (ask == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(own)
                 : "memory");
  if (ask == 2) {
    for (int i = 0; i < 4; i++) r[i] = i * 64 + lane * 2 | (i * 64 + lane * 2 + 1) << 16;
    ms_store_matrix4(own, r[0], r[1], r[2], r[3]);
    __syncwarp();
    for (int i = 0; i < 4; i++) r[i] = words[lane * 8 + 2 * i] | words[lane * 8 + 2 * i + 1] << 16;
  }
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = (int)r[i];
}

// One warpgroup, operands swizzled as ms_wgmma_operand says; the second 16 elements of K are multiplied.
template <typename Storage, typename A, typename B> __device__ void multiply(A a, B b, float (&sum)[64]) {
  extern __shared__ char dynamic[];
  uint32_t shift = (1024 - ms_shared_address(dynamic) % 1024) % 1024;
  Storage *at_a = (Storage *)(dynamic + shift), *at_b = (Storage *)(dynamic + shift + 64 * 128);
  for (int i = threadIdx.x; i < 192 * 64; i += 128) {
    int row = i / 64, k = i % 64, place = row % 64 * 64 + ((k / 8 ^ row % 8) * 8) + k % 8;
    if (row < 64)
      at_a[place] = (Storage)(k / 16 == 1 ? a(row, k - 16) : 0.f);
    else
      at_b[(row - 64) * 64 + ((k / 8 ^ row % 8) * 8) + k % 8] = (Storage)(k / 16 == 1 ? b(k - 16, row - 64) : 0.f);
  }
  ms_fence_async_proxy();
  __syncthreads();
  ms_wgmma_fence();
  ms_wgmma<Storage>(sum, ms_wgmma_operand(ms_shared_address(at_a)) + 2, ms_wgmma_operand(ms_shared_address(at_b)) + 2,
                    0);
  ms_wgmma_commit();
  ms_wgmma_wait<0>();
}

__global__ void m64n128k16(int *out, int ask) {
  float sum[64];
  multiply<__half>([=](int row, int k) { return a_of(ask, row, k, 16); },
                   [=](int k, int n) { return b_of(ask == 1 ? 0 : ask, k, n, 16); }, sum);
  for (int i = 0; i < 64; i++) out[threadIdx.x * 64 + i] = (int)sum[i];
}

// Factors 1 to 2 with exponents -range..range, by place: sums of such products differ with the rounding inside.
__device__ float factor(int which, int row, int k, int range) {
  uint32_t x = (uint32_t)(which * 7919 + row * 131 + k + 1) * 2654435761u;
  x ^= x >> 15, x *= 0x85ebca6bu, x ^= x >> 13, x *= 0xc2b2ae35u, x ^= x >> 16;
  float value = ldexpf(1.f + (x & 127) / 128.f, (int)(x >> 8) % (2 * range + 1) - range);
  return x >> 31 ? -value : value;
}

__global__ void sums_mma(int *out, int range) {
  int lane = threadIdx.x, row = lane / 4, k = lane % 4 * 2, n = lane / 4;
  auto pair = [&](int which, int r, int c) {
    __nv_bfloat162 two = __floats2bfloat162_rn(factor(which, r, c, range), factor(which, r, c + 1, range));
    return *reinterpret_cast<uint32_t *>(&two);
  };
  float d[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(pair(0, row, k)), "r"(pair(0, row + 8, k)), "r"(pair(0, row, k + 8)), "r"(pair(0, row + 8, k + 8)),
        "r"(pair(1, n, k)), "r"(pair(1, n, k + 8)));
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = __float_as_int(d[i]);
}

__global__ void sums_wgmma(int *out, int range) {
  float sum[64];
  multiply<__nv_bfloat16>([=](int row, int k) { return factor(0, row, k, range); },
                          [=](int k, int n) { return factor(1, n, k, range); }, sum);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = __float_as_int(sum[i]);
}

void must(cudaError_t code) {
  if (code == cudaSuccess) return;
  printf("FAIL %s\n", cudaGetErrorString(code));
  exit(1);
}

std::vector<int> run(void (*kernel)(int *, int), int threads, int each, int argument, int shared) {
  std::vector<int> got((size_t)threads * each);
  int *out = nullptr;
  must(cudaMalloc(&out, got.size() * 4));
  must(cudaMemset(out, 0xff, got.size() * 4));
  kernel<<<1, threads, shared>>>(out, argument);
  must(cudaGetLastError());
  must(cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost));
  must(cudaFree(out));
  return got;
}

void print(const char *name, int ask, const std::vector<int> &got, int threads, const char *format) {
  size_t each = got.size() / threads;
  for (int t = 0; t < threads; t++) {
    printf("%s %d thread %d:", name, ask, t);
    uint32_t rest = 0; // all of them in one number; a few in full
    for (size_t i = 0; i < each; i++) {
      uint32_t value = (uint32_t)got[t * each + i];
      rest = rest * 31 + value;
      if (i < 4 || i + 2 >= each) printf(format, value);
    }
    if (each > 4) printf(" all %08x", rest);
    printf("\n");
  }
}

} // namespace

int main(int argc, char **argv) {
  const int shared = 192 * 128 + 1024;
  if (argc == 2 && !strcmp(argv[1], "maps")) {
    for (int ask = 0; ask < 3; ask++) {
      print("m16n8k16", ask, run(m16n8k16, 32, 4, ask, 0), 32, " %d");
      if (ask != 1) print("m16n8k8", ask, run(m16n8k8, 32, 4, ask, 0), 32, " %d");
      print("matrices", ask, run(matrices, 32, 4, ask, 0), 32, " %08x");
      print("m64n128k16", ask, run(m64n128k16, 128, 64, ask, shared), 128, " %d");
    }
    return 0;
  }
  if (argc == 2 && !strcmp(argv[1], "sums")) {
    for (int range : {2, 6, 12}) {
      print("mma", range, run(sums_mma, 32, 4, range, 0), 32, " %08x");
      print("wgmma", range, run(sums_wgmma, 128, 4, range, shared), 128, " %08x");
    }
    return 0;
  }
  fprintf(stderr, "usage: fragments maps|sums\n");
  return 2;
}
