// SPDX-License-Identifier: Apache-2.0
// basic.cu - opcode coverage against host results: arithmetic, calls, switch, printf, shuffles,
// atomics, streams.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector>
#define CK(x)                                                                                      \
  do {                                                                                             \
    cudaError_t e_ = (x);                                                                          \
    if (e_) {                                                                                      \
      printf("FAIL %s: %s\n", #x, cudaGetErrorString(e_));                                         \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)
#define EXPECT(c)                                                                                  \
  do {                                                                                             \
    if (!(c)) {                                                                                    \
      printf("FAIL line %d: %s\n", __LINE__, #c);                                                  \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)
__constant__ float cc[4] = {1, 2, 3, 4};
__device__ int gcount;
__device__ __noinline__ float foo(float a, int b) {
  return a * b + cc[b & 3];
}
__device__ __noinline__ int fib(int n) {
  return n < 2 ? n : fib(n - 1) + fib(n - 2);
}
extern __shared__ char sm[];
__global__ void k1(float* a, const __nv_bfloat16* b, int n) {
  __shared__ float t[64];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  t[threadIdx.x] = i < n ? a[i] : 0.f;
  __syncthreads();
  float s = t[(threadIdx.x + 1) & 63];
  s += __shfl_xor_sync(~0u, s, 1);
  unsigned m = __match_any_sync(~0u, i & 3);
  s += __popc(m) + foo(s, i);
  if (i < n) {
    a[i] = s + __bfloat162float(b[i]);
    atomicAdd(&gcount, 1);
  }
}
__global__ void k2(double* out, float x, double y, int z, unsigned u, long long q) {
  int i = 0;
  out[i++] = sinf(x);
  out[i++] = expf(x) / (1 + x);
  out[i++] = logf(x);
  out[i++] = sqrtf(x);
  out[i++] = tanhf(x);
  out[i++] = powf(x, 1.7f);
  out[i++] = sin(y);
  out[i++] = exp(y) / (1 + y);
  out[i++] = log(y);
  out[i++] = sqrt(y);
  out[i++] = z / 7;
  out[i++] = z % 7;
  out[i++] = u / 7;
  out[i++] = u % 7;
  out[i++] = (double)(q / 1000003);
  out[i++] = (double)(q % 1000003);
  out[i++] = __popc(u);
  out[i++] = __clz(u);
  out[i++] = __ffs(u);
  out[i++] = __brev(u);
  out[i++] = (double)__mulhi(z, 123456789);
  out[i++] = (double)__umul64hi(q, q * 3);
  out[i++] = __byte_perm(u, z, 0x5214);
  out[i++] = __funnelshift_l(u, z, 9);
  out[i++] = __dp4a((int)u, z, 5);
  out[i++] = rintf(x * 10.5f);
  out[i++] = (int)(x * -3.7f);
  out[i++] = __float2int_ru(x);
  out[i++] = __float2half_rn(x * 1.1f);
  out[i++] = __half2float(__hfma(__float2half(x), __float2half(1.5f), __float2half(0.1f)));
  out[i++] = __bfloat162float(__float2bfloat16(x * 3.3f));
  out[i++] = fib(10);
  out[i++] = fmaf(x, 2.f, 0.3f);
  out[i++] = __fdividef(x, 3.f);
  out[i++] = erff(x);
  out[i++] = fminf(x, NAN);
  out[i++] = (float)(z * 0x10001 >> 3);
  out[i++] = (double)(unsigned char)z;
  out[i++] = (double)(short)u;
  out[i++] = rsqrtf(x);
  out[i++] = cbrt(y);
  out[i++] = (double)__double2ll_rn(y * 1e10);
  switch (z & 7) {
    case 0: out[i++] = 1; break;
    case 1: out[i++] = 7; break;
    case 2: out[i++] = sinf(x); break;
    case 3: out[i++] = 33; break;
    case 4: out[i++] = 12; break;
    case 5: out[i++] = 99; break;
    case 6: out[i++] = 5; break;
    default: out[i++] = 17;
  }
}
static int fibh(int n) {
  return n < 2 ? n : fibh(n - 1) + fibh(n - 2);
}
__global__ void kspin(int* lock, int* v) {
  while (atomicCAS(lock, 0, 1)) {}
  *(volatile int*)v = *(volatile int*)v + 1;
  __threadfence();
  atomicExch(lock, 0);
}
struct Big {
  int a[5];
  double d;
};
__global__ void kstruct(Big b, double* o) {
  int i = threadIdx.x;
  o[i] = b.a[i % 5] + b.d;
}
__global__ void kreduce(const float* x, float* o, int n) {
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    s += x[i];
  for (int d = 16; d; d >>= 1)
    s += __shfl_down_sync(~0u, s, d);
  __shared__ float w[32];
  if (threadIdx.x % 32 == 0)
    w[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? w[threadIdx.x] : 0;
    for (int d = 16; d; d >>= 1)
      s += __shfl_down_sync(~0u, s, d);
    if (!threadIdx.x)
      *o = s;
  }
  int c = __syncthreads_count(threadIdx.x & 1);
  if (threadIdx.x == 5)
    o[1] = c;
}
int main() {
  int n = 128;
  std::vector<float> h(n), r(n);
  std::vector<__nv_bfloat16> hb(n);
  for (int i = 0; i < n; i++) {
    h[i] = i * 0.25f;
    hb[i] = __float2bfloat16(i);
  }
  float* a;
  __nv_bfloat16* b;
  CK(cudaMalloc(&a, n * 4));
  CK(cudaMalloc(&b, n * 2));
  CK(cudaMemcpy(a, h.data(), n * 4, cudaMemcpyHostToDevice));
  CK(cudaMemcpy(b, hb.data(), n * 2, cudaMemcpyHostToDevice));
  k1<<<2, 64>>>(a, b, n);
  CK(cudaGetLastError());
  CK(cudaMemcpy(r.data(), a, n * 4, cudaMemcpyDeviceToHost));
  int cnt;
  CK(cudaMemcpyFromSymbol(&cnt, gcount, 4));
  EXPECT(cnt == n);
  for (int i = 0; i < n; i++) {
    auto T = [&](int j) { return h[(j / 64) * 64 + ((j % 64) + 1) % 64]; };
    float s = T(i) + T(i ^ 1);
    float f[4] = {1, 2, 3, 4};
    s += 8 + (s * i + f[i & 3]);
    s += i;
    EXPECT(fabsf(s - r[i]) < 1e-3f * (1 + fabsf(s)));
  }
  double* o;
  CK(cudaMallocManaged(&o, 128 * 8));
  float x = 0.731f;
  double y = 1.234;
  int z = -123459;
  unsigned u = 0xdeadbe70u;
  long long q = 123456789012345ll;
  k2<<<1, 1>>>(o, x, y, z, u, q);
  CK(cudaDeviceSynchronize());
  double want[] = {sinf(x),
                   expf(x) / (1 + x),
                   logf(x),
                   sqrtf(x),
                   tanhf(x),
                   powf(x, 1.7f),
                   sin(y),
                   exp(y) / (1 + y),
                   log(y),
                   sqrt(y),
                   (double)(z / 7),
                   (double)(z % 7),
                   (double)(u / 7),
                   (double)(u % 7),
                   (double)(q / 1000003),
                   (double)(q % 1000003),
                   (double)__builtin_popcount(u),
                   (double)__builtin_clz(u),
                   (double)__builtin_ffs(u),
                   (double)0x0e7db57bu,
                   (double)(int)(((long long)z * 123456789) >> 32),
                   (double)(unsigned long long)(((unsigned __int128)(unsigned long long)q *
                                                 (unsigned long long)(q * 3)) >>
                                                64)};
  for (size_t i = 0; i < sizeof want / 8; i++)
    if (!(fabs(o[i] - want[i]) <= 2e-6 * (1 + fabs(want[i])))) {
      printf("FAIL k2[%zu] %.9g want %.9g\n", i, o[i], want[i]);
      return 1;
    }
  EXPECT(o[31] == 55 && fibh(10) == 55);
  EXPECT(o[25] == rintf(x * 10.5f));
  EXPECT(o[26] == (int)(x * -3.7f));
  EXPECT(o[27] == 1);
  EXPECT(o[35] == x);
  EXPECT(fabs(o[40] - cbrt(y)) < 1e-9);
  EXPECT(o[41] == llrint(y * 1e10));
  EXPECT(o[42] == 99);
  EXPECT(fabs(o[34] - erff(x)) < 1e-6);
  EXPECT(fabs(o[29] - (x * 1.5f + 0.1f)) < 1e-3);
  int* lk;
  CK(cudaMalloc(&lk, 8));
  CK(cudaMemset(lk, 0, 8));
  kspin<<<2, 64>>>(lk, lk + 1);
  int lv[2];
  CK(cudaMemcpy(lv, lk, 8, cudaMemcpyDeviceToHost));
  EXPECT(lv[1] == 128);
  Big bg = {{1, 2, 3, 4, 5}, 0.5};
  kstruct<<<1, 40>>>(bg, o);
  CK(cudaDeviceSynchronize());
  EXPECT(o[7] == 3.5 && o[39] == 5.5);
  float* d2;
  CK(cudaMalloc(&d2, 8));
  kreduce<<<1, 128>>>(a, d2, n);
  float hr[2];
  CK(cudaMemcpy(hr, d2, 8, cudaMemcpyDeviceToHost));
  double s = 0;
  for (float v : r)
    s += v;
  EXPECT(fabs(hr[0] - s) < 1e-4 * s);
  EXPECT(hr[1] == 64);
  cudaStream_t s1, s2;
  cudaEvent_t e;
  CK(cudaStreamCreate(&s1));
  CK(cudaStreamCreateWithFlags(&s2, cudaStreamNonBlocking));
  CK(cudaEventCreate(&e));
  cudaGraph_t g;
  cudaGraphExec_t ge;
  CK(cudaStreamBeginCapture(s1, cudaStreamCaptureModeGlobal));
  CK(cudaMemsetAsync(lk, 0, 8, s1));
  kspin<<<1, 32, 0, s1>>>(lk, lk + 1);
  CK(cudaEventRecord(e, s1));
  CK(cudaStreamWaitEvent(s2, e, 0));
  kspin<<<1, 32, 0, s2>>>(lk, lk + 1);
  CK(cudaEventRecord(e, s2));
  CK(cudaStreamWaitEvent(s1, e, 0));
  CK(cudaStreamEndCapture(s1, &g));
  CK(cudaGraphInstantiate(&ge, g, 0));
  for (int i = 0; i < 3; i++)
    CK(cudaGraphLaunch(ge, s1));
  CK(cudaStreamSynchronize(s1));
  CK(cudaMemcpy(lv, lk, 8, cudaMemcpyDeviceToHost));
  EXPECT(lv[1] == 64);
  CK(cudaStreamBeginCapture(s1, cudaStreamCaptureModeGlobal));
  EXPECT(cudaStreamSynchronize(s1) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamEndCapture(s1, &g) != cudaSuccess);
  cudaGetLastError();
  int occ;
  CK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&occ, kreduce, 128, 0));
  EXPECT(occ >= 8);
  cudaDeviceProp pr;
  CK(cudaGetDeviceProperties(&pr, 0));
  EXPECT(cudaMalloc(&a, 1ull << 50) == cudaErrorMemoryAllocation);
  EXPECT(cudaGetLastError() == cudaErrorMemoryAllocation);
  EXPECT(cudaGetLastError() == cudaSuccess);
  printf("basic ok (%s, occupancy %d)\n", pr.name, occ);
  return 0;
}
