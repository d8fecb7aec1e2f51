// SPDX-License-Identifier: Apache-2.0
// misc.cu - cooperative grid sync, brx, function pointers, vote/redux, named barriers, f16/bf16
// arithmetic, pinned and symbol copies, three devices with NCCL ranks as threads, fork check.
#include "../src/nccl_abi.h"
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cstdio>
#include <cstdlib>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>
namespace cg = cooperative_groups;
#define CK(x)                                                                                      \
  do {                                                                                             \
    cudaError_t e_ = (x);                                                                          \
    if (e_) {                                                                                      \
      printf("FAIL %s: %s\n", #x, cudaGetErrorString(e_));                                         \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
#define NK(x)                                                                                      \
  do {                                                                                             \
    ncclResult_t e_ = (x);                                                                         \
    if (e_) {                                                                                      \
      printf("FAIL %s: %s\n", #x, ncclGetErrorString(e_));                                         \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
#define EXPECT(c)                                                                                  \
  do {                                                                                             \
    if (!(c)) {                                                                                    \
      printf("FAIL line %d: %s\n", __LINE__, #c);                                                  \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)
__global__ void gridsync(int* a, int* sum) {
  auto g = cg::this_grid();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  a[i] = i;
  g.sync();
  int j = (i + 77) % (gridDim.x * blockDim.x);
  int v = a[j];
  auto w = cg::tiled_partition<32>(cg::this_thread_block());
  int s = cg::reduce(w, v, cg::plus<int>());
  if (w.thread_rank() == 0)
    atomicAdd(sum, s);
}
__device__ int fa(int x) {
  return x + 1;
}
__device__ int fb(int x) {
  return x * 3;
}
__device__ int (*table[2])(int) = {fa, fb};
__global__ void fptr(int* o) {
  int t = threadIdx.x;
  o[t] = table[t & 1](t);
}
__global__ void named(int* o) { // two warp pairs hand over through named barriers
  __shared__ int b[64];
  int t = threadIdx.x, w = t / 32;
  if (w < 2) {
    b[t] = t * 2;
    asm volatile("bar.arrive 1, 128;");
  } else {
    asm volatile("bar.sync 1, 128;");
    o[t - 64] = b[127 - t];
  }
}
__global__ void half2k(const __half2* x, __half2* y, __nv_bfloat162* z) {
  int t = threadIdx.x;
  y[t] = __hfma2(x[t], __float2half2_rn(1.5f), __hmax2(x[t], __float2half2_rn(0.f)));
  z[t] = __hmul2(__floats2bfloat162_rn(t, -t), __float2bfloat162_rn(0.25f));
}
__global__ void votes(unsigned* o) {
  int t = threadIdx.x;
  o[t] = __ballot_sync(~0u, t % 3 == 0) + __reduce_add_sync(~0u, t) +
         (__any_sync(~0u, t == 5) ? 1 : 0) + (__all_sync(~0u, t < 32) ? 2 : 0) + __activemask();
}
__global__ void addk(float* p, float v, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    p[i] += v;
}
int main() {
  int n = 8 * 64, *a, *s;
  CK(cudaMallocManaged(&a, n * 4));
  CK(cudaMallocManaged(&s, 4));
  *s = 0;
  void* args[] = {&a, &s};
  CK(cudaLaunchCooperativeKernel((void*)gridsync, dim3(8), dim3(64), args, 0, nullptr));
  CK(cudaDeviceSynchronize());
  EXPECT(*s == n * (n - 1) / 2);
  fptr<<<1, 32>>>(a);
  CK(cudaDeviceSynchronize());
  for (int i = 0; i < 32; i++)
    EXPECT(a[i] == (i & 1 ? i * 3 : i + 1));
  named<<<1, 128>>>(a);
  CK(cudaDeviceSynchronize());
  for (int i = 0; i < 64; i++)
    EXPECT(a[i] == (63 - i) * 2);
  __half2 *x, *y;
  __nv_bfloat162* z;
  CK(cudaMallocManaged(&x, 128));
  CK(cudaMallocManaged(&y, 128));
  CK(cudaMallocManaged(&z, 128));
  for (int i = 0; i < 32; i++)
    x[i] = __floats2half2_rn(i - 16, i * 0.5f);
  half2k<<<1, 32>>>(x, y, z);
  CK(cudaDeviceSynchronize());
  for (int i = 0; i < 32; i++) {
    float v = i - 16;
    EXPECT(__low2float(y[i]) == v * 1.5f + (v > 0 ? v : 0));
    EXPECT(__high2float(z[i]) == -i * 0.25f);
  }
  votes<<<1, 32>>>((unsigned*)a);
  CK(cudaDeviceSynchronize());
  unsigned bal = 0;
  for (int i = 0; i < 32; i++)
    if (i % 3 == 0)
      bal |= 1u << i;
  EXPECT((unsigned)a[7] == bal + 496 + 3 + 0xffffffffu);
  int nd;
  CK(cudaGetDeviceCount(&nd));
  const int N = 257;
  std::vector<ncclComm_t> cm(nd);
  NK(ncclCommInitAll(cm.data(), nd, nullptr));
  std::vector<std::thread> th;
  std::vector<int> good(nd);
  for (int r = 0; r < nd; r++)
    th.emplace_back([&, r] {
      CK(cudaSetDevice(r));
      float* p;
      CK(cudaMalloc(&p, N * 4));
      cudaStream_t st;
      CK(cudaStreamCreate(&st));
      float* h;
      CK(cudaMallocHost(&h, N * 4));
      for (int i = 0; i < N; i++)
        h[i] = i;
      CK(cudaMemcpyAsync(p, h, N * 4, cudaMemcpyHostToDevice, st));
      for (int it = 0; it < 4; it++) {
        addk<<<(N + 63) / 64, 64, 0, st>>>(p, r, N);
        NK(ncclAllReduce(p, p, N, ncclFloat32, ncclAvg, cm[r], st));
      }
      CK(cudaMemcpyAsync(h, p, N * 4, cudaMemcpyDeviceToHost, st));
      CK(cudaStreamSynchronize(st));
      bool ok = true;
      float m = (nd - 1) / 2.f;
      for (int i = 0; i < N; i++)
        if (!(fabsf(h[i] - (i + 4 * m)) < 1e-3f))
          ok = false;
      good[r] = ok;
      NK(ncclCommDestroy(cm[r]));
    });
  for (auto& t : th)
    t.join();
  for (int g : good)
    EXPECT(g);
  if (nd > 1) {
    CK(cudaSetDevice(1));
    float* q;
    CK(cudaMalloc(&q, 64));
    CK(cudaSetDevice(0));
    int can;
    CK(cudaDeviceCanAccessPeer(&can, 0, 1));
    CK(cudaDeviceEnablePeerAccess(1, 0));
    addk<<<1, 16>>>(q, 1, 16);
    CK(cudaDeviceSynchronize());
  }
  pid_t c = fork();
  if (!c) {
    void* p;
    _exit(cudaMalloc(&p, 4) == cudaErrorInitializationError ? 0 : 1);
  }
  int st;
  waitpid(c, &st, 0);
  EXPECT(st == 0);
  puts("misc ok");
  return 0;
}
