// SPDX-License-Identifier: Apache-2.0
// kernels.cu - sample kernels with planted bugs (-DBUG=n). Usage: kernels
// <fp32|moe|hist|tf32|s8|sort|mask|exit|atomic> Exit code 0 = right answer and no error reported; 1
// = wrong answer; 2 = CUDA error.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_bf16.h>
#include <vector>
#ifndef BUG
#define BUG 0
#endif
#define CK(x)                                                                                      \
  do {                                                                                             \
    cudaError_t e_ = (x);                                                                          \
    if (e_) {                                                                                      \
      printf("CUDA error: %s: %s\n", #x, cudaGetErrorString(e_));                                  \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
static uint32_t rs = 12345;
static uint32_t rnd() {
  rs = rs * 1664525u + 1013904223u;
  return rs >> 8;
}
static float frnd() {
  return (rnd() % 2001 - 1000.f) / 1000.f;
}
template <class T> T* up(const std::vector<T>& v) {
  T* p;
  CK(cudaMalloc(&p, v.size() * sizeof(T)));
  CK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}
template <class T> std::vector<T> down(const T* p, size_t n) {
  std::vector<T> v(n);
  CK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
  return v;
}
static int check(const char* name, const std::vector<double>& got, const std::vector<double>& want,
                 double tol) {
  double worst = 0;
  for (size_t i = 0; i < want.size(); i++) {
    double d = fabs(got[i] - want[i]) / (1 + fabs(want[i]));
    if (!(d <= worst))
      worst = d;
    if (std::isnan(got[i]))
      worst = INFINITY;
  }
  printf("%s: max error %.3g %s\n", name, worst, worst <= tol ? "ok" : "WRONG");
  return !(worst <= tol);
}
// ---------------------------------------------------------------- fp32 tiled GEMM, C[M,N] = A[M,K]
// B[K,N]
__global__ void gemm32(const float* A, const float* B, float* C, int M, int N, int K) {
  __shared__ float As[16][17], Bs[16][17];
  int tx = threadIdx.x, ty = threadIdx.y, r = blockIdx.y * 16 + ty, c = blockIdx.x * 16 + tx;
  float s = 0;
  for (int k0 = 0; k0 < K; k0 += 16) {
    As[ty][tx] = r < M && k0 + tx < K ? A[r * K + k0 + tx] : 0;
    Bs[ty][tx] = k0 + ty < K && c < N ? B[(k0 + ty) * N + c] : 0;
#if BUG != 1
    __syncthreads();
#endif
    for (int k = 0; k < 16; k++)
      s += As[ty][k] * Bs[k][tx];
#if BUG != 2
    __syncthreads();
#endif
  }
#if BUG == 3
  C[r * N + c] = s;
#else
  if (r < M && c < N)
    C[r * N + c] = s;
#endif
}
static int fp32() {
  int M = 61, N = 70, K = 45;
  std::vector<float> a(M * K), b(K * N);
  for (auto& x : a)
    x = frnd();
  for (auto& x : b)
    x = frnd();
  float *A = up(a), *B = up(b), *C;
  CK(cudaMalloc(&C, M * N * 4));
  gemm32<<<dim3((N + 15) / 16, (M + 15) / 16), dim3(16, 16)>>>(A, B, C, M, N, K);
  CK(cudaGetLastError());
  auto c = down(C, M * N);
  std::vector<double> g(c.begin(), c.end()), w(M * N);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++)
      for (int k = 0; k < K; k++)
        w[i * N + j] += (double)a[i * K + k] * b[k * N + j];
  return check("fp32 gemm", g, w, 1e-5);
}
// ---------------------------------------------------------------- grouped expert GEMM: out[p,:] =
// silu(x[row[p],:] W[e]^T + bias[e])
__device__ __forceinline__ uint32_t sptr(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void cpa16(uint32_t d, const void* s, bool ok) {
  int n = ok ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(d), "l"(s), "r"(n) : "memory");
}
__device__ __forceinline__ void ldm4(uint32_t* r, uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
__device__ __forceinline__ void mma(float* c, const uint32_t* a, const uint32_t* b) {
#if BUG == 7
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#if BUG == 8
#define SWZ(row, ch) (ch)
#else
#define SWZ(row, ch) ((ch) ^ (((row) >> 1) & 3))
#endif
__global__ void __launch_bounds__(128)
    moe(const __nv_bfloat16* x, const int* rows, const int* offs, const __nv_bfloat16* W,
        const float* bias, __nv_bfloat16* out, int D, int H) {
  extern __shared__ __align__(16) char sm[]; // 2 stages x (A 64x32 + B 64x32) bf16 = 16 KiB
  int e = blockIdx.z, r0 = offs[e] + blockIdx.y * 64, r1 = offs[e + 1];
  if (r0 >= r1)
    return;
  int n0 = blockIdx.x * 64, t = threadIdx.x, lane = t & 31, w = t >> 5, wm = (w & 1) * 32,
      wn = (w >> 1) * 32;
  float c[2][4][4] = {};
  auto load = [&](int st, int k0) {
    for (int i = t; i < 256; i += 128) {
      int row = i >> 2, ch = i & 3, p = r0 + row;
#if BUG == 9
      bool ok = p <= r1;
      const void* s = x + (size_t)rows[p] * D + k0 + ch * 8;
#else
      bool ok = p < r1;
      const void* s = ok ? x + (size_t)rows[p] * D + k0 + ch * 8 : x;
#endif
      cpa16(sptr(sm + st * 8192 + row * 64 + SWZ(row, ch) * 16), s, ok && k0 + ch * 8 < D);
      bool okb = n0 + row < H && k0 + ch * 8 < D;
      const void* sb = okb ? W + ((size_t)e * H + n0 + row) * D + k0 + ch * 8 : W;
      cpa16(sptr(sm + st * 8192 + 4096 + row * 64 + SWZ(row, ch) * 16), sb, okb);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  load(0, 0);
  int KT = (D + 31) / 32;
  for (int kt = 0; kt < KT; kt++) {
    if (kt + 1 < KT)
      load((kt + 1) & 1, (kt + 1) * 32);
    else
      asm volatile("cp.async.commit_group;" ::: "memory");
#if BUG == 4
    asm volatile("cp.async.wait_group 2;" ::: "memory");
#else
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
#if BUG != 5
    __syncthreads();
#endif
    const char *a = sm + (kt & 1) * 8192, *b = a + 4096;
    for (int ks = 0; ks < 2; ks++) {
      uint32_t af[2][4], bf[2][4];
      for (int i = 0; i < 2; i++) {
        int row = wm + i * 16 + (lane & 15), ch = ks * 2 + (lane >> 4);
        ldm4(af[i], sptr(a + row * 64 + SWZ(row, ch) * 16));
      }
      for (int j = 0; j < 2; j++) {
        int row = wn + j * 16 + (lane & 7) + ((lane >> 4) << 3), ch = ks * 2 + ((lane >> 3) & 1);
        ldm4(bf[j], sptr(b + row * 64 + SWZ(row, ch) * 16));
      }
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
          mma(c[i][j], af[i], &bf[j >> 1][(j & 1) * 2]);
    }
#if BUG != 6
    __syncthreads();
#endif
  }
#if BUG != 10
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 4; j++)
      for (int h = 0; h < 2; h++) {
        int p = r0 + wm + i * 16 + (lane >> 2) + h * 8, n = n0 + wn + j * 8 + (lane & 3) * 2;
        if (p < r1 && n < H) {
          float u = c[i][j][2 * h] + bias[e * H + n], v = c[i][j][2 * h + 1] + bias[e * H + n + 1];
          u = u / (1 + __expf(-u));
          v = v / (1 + __expf(-v));
          *(__nv_bfloat162*)(out + (size_t)p * H + n) = __floats2bfloat162_rn(u, v);
        }
      }
}
static int moeTest() {
  int T = 150, D = 96, H = 128, E = 3;
  if (getenv("BIG")) {
    T = 256;
    D = 256;
    H = 256;
    E = 1;
  }
  std::vector<int> offs = {0, 0, 87, T};
  if (E == 1)
    offs = {0, T};
  std::vector<__nv_bfloat16> x(T * D), W((size_t)E * H * D);
  std::vector<float> bias(E * H);
  std::vector<int> rows(T);
  for (auto& v : x)
    v = __float2bfloat16(frnd());
  for (auto& v : W)
    v = __float2bfloat16(frnd() * 0.3f);
  for (auto& v : bias)
    v = frnd();
  for (auto& v : rows)
    v = rnd() % T;
  auto *X = up(x), *WW = up(W);
  auto* B = up(bias);
  auto *R = up(rows), *O = up(offs);
  __nv_bfloat16* out;
  CK(cudaMalloc(&out, T * H * 2));
  int smem = 16384;
#if BUG == 11
  smem = 8192;
#endif
  moe<<<dim3((H + 63) / 64, (T + 63) / 64, E), 128, smem>>>(X, R, O, WW, B, out, D, H);
  CK(cudaGetLastError());
  CK(cudaDeviceSynchronize());
  auto o = down(out, T * H);
  std::vector<double> g(T * H), w(T * H);
  for (int p = 0; p < T; p++) {
    int e = 0;
    while (p >= offs[e + 1])
      e++;
    for (int n = 0; n < H; n++) {
      double s = bias[e * H + n];
      for (int k = 0; k < D; k++)
        s += (double)__bfloat162float(x[rows[p] * D + k]) *
             __bfloat162float(W[((size_t)e * H + n) * D + k]);
      w[p * H + n] = s / (1 + exp(-s));
      g[p * H + n] = __bfloat162float(o[p * H + n]);
    }
  }
  return check("moe bf16", g, w, 6e-3);
}
// ---------------------------------------------------------------- histogram + scan + stable
// counting sort by key
__global__ void hist(const int* key, int n, int E, int* cnt,
                     int* pos) { // one block; cnt[E], pos[n] = place of element i
  __shared__ int h[64], start[64];
  int t = threadIdx.x, lane = t & 31, w = t >> 5;
  if (t < 64)
    h[t] = 0;
#if BUG != 20
  __syncthreads();
#endif
  for (int i = t; i < (n + 31) / 32 * 32; i += blockDim.x) {
    int k = i < n ? key[i] : -1;
    unsigned m = __match_any_sync(~0u, k);
    if (k >= 0 && lane == __ffs(m) - 1)
      atomicAdd(&h[k], __popc(m));
  }
#if BUG != 21
  __syncthreads();
#endif
  if (w == 0) { // exclusive scan of 64 counters by one warp
    int a = h[lane], b = h[lane + 32], s = a, u;
    for (int d = 1; d < 32; d <<= 1) {
      u = __shfl_up_sync(~0u, s, d);
      if (lane >= d)
        s += u;
    }
    int tot = __shfl_sync(~0u, s, 31);
    start[lane] = s - a;
    s = b;
    for (int d = 1; d < 32; d <<= 1) {
      u = __shfl_up_sync(~0u, s, d);
      if (lane >= d)
        s += u;
    }
    start[lane + 32] = tot + s - b;
    if (lane < E)
      cnt[lane] = a;
#if BUG != 22
    __syncwarp();
#endif
    for (int i0 = 0; i0 < n; i0 += 32) {
      int i = i0 + lane, k = i < n ? key[i] : -1;
      unsigned m = __match_any_sync(~0u, k), act = __ballot_sync(~0u, k >= 0);
      if (k >= 0) {
        int r = __popc(m & ((1u << lane) - 1));
        pos[i] = start[k] + r;
      }
      __syncwarp();
      if (k >= 0 && lane == 31 - __clz(m))
        start[k] += __popc(m & act);
      __syncwarp();
    }
  }
}
static int histTest() {
  int n = 333, E = 7;
  std::vector<int> k(n);
  for (auto& v : k)
    v = rnd() % E;
  int *K = up(k), *C, *P;
  CK(cudaMalloc(&C, E * 4));
  CK(cudaMalloc(&P, n * 4));
  hist<<<1, 128>>>(K, n, E, C, P);
  CK(cudaGetLastError());
  auto c = down(C, E);
  auto p = down(P, n);
  std::vector<double> g, w;
  std::vector<int> cnt(E), st(E);
  for (int v : k)
    cnt[v]++;
  for (int e = 1; e < E; e++)
    st[e] = st[e - 1] + cnt[e - 1];
  for (int e = 0; e < E; e++) {
    g.push_back(c[e]);
    w.push_back(cnt[e]);
  }
  for (int i = 0; i < n; i++) {
    g.push_back(p[i]);
    w.push_back(st[k[i]]++);
  }
  return check("hist/scan/sort", g, w, 0);
}
// ---------------------------------------------------------------- single-warp fragment tests: TF32
// m16n8k8 and s8 m16n8k32
__global__ void tf32k(const float* A, const float* B, float* C) {
  int l = threadIdx.x, g = l >> 2, t = l & 3;
  uint32_t a[4], b[2];
  float c[4] = {0, 0, 0, 0};
  auto cv = [](float f) {
    uint32_t u;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(f));
    return u;
  };
  a[0] = cv(A[g * 8 + t]);
  a[1] = cv(A[(g + 8) * 8 + t]);
  a[2] = cv(A[g * 8 + t + 4]);
  a[3] = cv(A[(g + 8) * 8 + t + 4]);
  b[0] = cv(B[t * 8 + g]);
  b[1] = cv(B[(t + 4) * 8 + g]);
#if BUG == 30
  if (l < 31)
#endif
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  C[g * 8 + 2 * t] = c[0];
  C[g * 8 + 2 * t + 1] = c[1];
  C[(g + 8) * 8 + 2 * t] = c[2];
  C[(g + 8) * 8 + 2 * t + 1] = c[3];
}
static int tf32Test() {
  std::vector<float> a(128), b(64);
  for (auto& x : a)
    x = frnd();
  for (auto& x : b)
    x = frnd();
  float *A = up(a), *B = up(b), *C;
  CK(cudaMalloc(&C, 512));
  tf32k<<<1, 32>>>(A, B, C);
  auto c = down(C, 128);
  std::vector<double> g(c.begin(), c.end()), w(128);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++)
      for (int k = 0; k < 8; k++)
        w[i * 8 + j] += (double)a[i * 8 + k] * b[k * 8 + j];
  return check("tf32 mma", g, w, 3e-3);
}
__global__ void s8k(const int8_t* A, const int8_t* B, int* C) { // A 16x32 row, B 8x32 (col-major k)
  int l = threadIdx.x, g = l >> 2, t = l & 3;
  const int *a = (const int*)A, *b = (const int*)B;
  int c[4] = {1, 2, 3, 4};
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
               "{%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[g * 8 + t]), "r"(a[(g + 8) * 8 + t]), "r"(a[g * 8 + t + 4]),
                 "r"(a[(g + 8) * 8 + t + 4]), "r"(b[g * 8 + t]), "r"(b[g * 8 + t + 4]));
  C[g * 8 + 2 * t] = c[0];
  C[g * 8 + 2 * t + 1] = c[1];
  C[(g + 8) * 8 + 2 * t] = c[2];
  C[(g + 8) * 8 + 2 * t + 1] = c[3];
}
static int s8Test() {
  std::vector<int8_t> a(512), b(256);
  for (auto& x : a)
    x = rnd();
  for (auto& x : b)
    x = rnd();
  int8_t *A = up(a), *B = up(b);
  int* C;
  CK(cudaMalloc(&C, 512));
  s8k<<<1, 32>>>(A, B, C);
  auto c = down(C, 128);
  std::vector<double> g(c.begin(), c.end()), w(128);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      w[i * 8 + j] = 1 + (i >= 8) * 2 + (j & 1);
      for (int k = 0; k < 32; k++)
        w[i * 8 + j] += a[i * 32 + k] * b[j * 32 + k];
    }
  return check("s8 mma", g, w, 0);
}
// ---------------------------------------------------------------- small bug magnets
__global__ void maskk(int* o) {
  int l = threadIdx.x;
  int v = l;
  if (l < 16)
    v = __shfl_sync(BUG == 40 ? ~0u : 0xffffu, v, 3);
  else if (BUG == 40)
    return;
  o[l] = v;
}
static int maskTest() {
  int* o;
  CK(cudaMalloc(&o, 128));
  maskk<<<1, 32>>>(o);
  CK(cudaGetLastError());
  auto r = down(o, 32);
  std::vector<double> g(r.begin(), r.end()), w(32);
  for (int i = 0; i < 32; i++)
    w[i] = i < 16 ? 3 : i;
  return check("mask", g, w, 0);
}
__global__ void divk(int* o) {
  int l = threadIdx.x;
  if (l & 1) {
    if (BUG == 41)
      __syncwarp(0xffffffffu);
    o[l] = 1;
  } else {
    if (BUG == 41) {
      volatile int x = 0;
      while (!x) {
        if (o[64] == 5)
          x = 1;
      }
    }
    o[l] = 2;
  }
}
__global__ void exitk(int* o, int n) {
  int t = threadIdx.x;
  if (BUG == 42 && t >= n)
    return;
  __shared__ int s[64];
  s[t] = t;
  __syncthreads();
  o[t] = s[63 - t];
}
static int exitTest() {
  int* o;
  CK(cudaMalloc(&o, 256));
  exitk<<<1, 64>>>(o, 40);
  CK(cudaGetLastError());
  auto r = down(o, 64);
  std::vector<double> g(r.begin(), r.end()), w(64);
  for (int i = 0; i < 64; i++)
    w[i] = 63 - i;
  return check("exit", g, w, 0);
}
__global__ void alignk(const char* p, float4* o) {
  o[threadIdx.x] = *(const float4*)(p + threadIdx.x * 16 + (BUG == 43 ? 4 : 0));
}
static int alignTest() {
  std::vector<char> a(1024, 0);
  char* A = up(a);
  float4* o;
  CK(cudaMalloc(&o, 512));
  alignk<<<1, 32>>>(A, o);
  CK(cudaGetLastError());
  CK(cudaDeviceSynchronize());
  puts("align ok");
  return 0;
}
__global__ void hostk(const int* p, int* o) {
  o[0] = p[0] + 1;
}
static int hostTest() {
  int h = 4, *d, *o;
  CK(cudaMalloc(&d, 4));
  CK(cudaMalloc(&o, 4));
  CK(cudaMemcpy(d, &h, 4, cudaMemcpyHostToDevice));
#if BUG == 45
  CK(cudaFree(d));
#endif
  hostk<<<1, 1>>>(BUG == 44 ? &h : d, o);
  CK(cudaGetLastError());
  auto r = down(o, 1);
  printf("host %d\n", r[0]);
  return r[0] != 5;
}
__global__ void slowk(int* p, int n) {
  for (int i = 0; i < n; i++)
    p[threadIdx.x] += 1;
}
static int streamTest() { // producer on s1, consumer on s2
  int *d, h[32];
  cudaStream_t s1, s2;
  cudaEvent_t e;
  CK(cudaMalloc(&d, 128));
  CK(cudaStreamCreateWithFlags(&s1, cudaStreamNonBlocking));
  CK(cudaStreamCreateWithFlags(&s2, cudaStreamNonBlocking));
  CK(cudaEventCreate(&e));
  int bad = 0;
  for (int it = 0; it < 12; it++) {
    CK(cudaMemsetAsync(d, 0, 128, s1));
    slowk<<<1, 32, 0, s1>>>(d, 10);
    CK(cudaEventRecord(e, s1));
#if BUG != 46
    CK(cudaStreamWaitEvent(s2, e, 0));
#endif
    slowk<<<1, 32, 0, s2>>>(d, 5);
    CK(cudaMemcpyAsync(h, d, 128, cudaMemcpyDeviceToHost, s2));
    CK(cudaStreamSynchronize(s2));
    for (int v : h)
      bad += v != 15;
    CK(cudaStreamSynchronize(s1));
  }
  printf("streams %s\n", bad ? "WRONG" : "ok");
  return bad != 0;
}
int main(int c, char** v) {
  const char* t = c > 1 ? v[1] : "";
  if (!strcmp(t, "fp32"))
    return fp32();
  if (!strcmp(t, "moe"))
    return moeTest();
  if (!strcmp(t, "hist"))
    return histTest();
  if (!strcmp(t, "tf32"))
    return tf32Test();
  if (!strcmp(t, "s8"))
    return s8Test();
  if (!strcmp(t, "mask"))
    return maskTest();
  if (!strcmp(t, "exit"))
    return exitTest();
  if (!strcmp(t, "align"))
    return alignTest();
  if (!strcmp(t, "host"))
    return hostTest();
  if (!strcmp(t, "streams"))
    return streamTest();
  puts("which test?");
  return 3;
}
