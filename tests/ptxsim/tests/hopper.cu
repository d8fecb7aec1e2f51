// SPDX-License-Identifier: Apache-2.0
// hopper.cu - mbarrier + cp.async.bulk pipeline, and wgmma m64n64k16 bf16 with 128-byte swizzle
// (compute_90a).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_bf16.h>
#include <vector>
#define CK(x)                                                                                      \
  do {                                                                                             \
    cudaError_t e_ = (x);                                                                          \
    if (e_) {                                                                                      \
      printf("CUDA error: %s: %s\n", #x, cudaGetErrorString(e_));                                  \
      exit(2);                                                                                     \
    }                                                                                              \
  } while (0)
__device__ uint32_t sp(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ void waitp(uint64_t* b, uint32_t ph) {
  asm volatile("{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra "
               "DONE; bra WAIT; DONE: }" ::"r"(sp(b)),
               "r"(ph)
               : "memory");
}
__global__ void pipe(const float* x, float* o,
                     int chunks) { // 2 stages of 128 floats; warp 0 lane 0 produces
  __shared__ alignas(128) float buf[2][128];
  __shared__ alignas(8) uint64_t full[2], empty[2];
  int t = threadIdx.x;
  if (t == 0) {
    for (int i = 0; i < 2; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(sp(&full[i])));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 128;" ::"r"(sp(&empty[i])));
    }
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  float s = 0;
  if (t >= 128) {
    if (t == 128)
      for (int c = 0; c < chunks; c++) {
        int i = c & 1;
        if (c >= 2)
          waitp(&empty[i], ((c >> 1) - 1) & 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 512;" ::"r"(sp(&full[i]))
                     : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                     "[%1], 512, [%2];" ::"r"(sp(buf[i])),
                     "l"(x + c * 128), "r"(sp(&full[i]))
                     : "memory");
      }
  } else {
    for (int c = 0; c < chunks; c++) {
      int i = c & 1;
#ifndef NOWAIT
      waitp(&full[i], (c >> 1) & 1);
#endif
      s += buf[i][t] * (c + 1);
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sp(&empty[i])) : "memory");
    }
    o[t] = s;
  }
}
__global__ void __launch_bounds__(128)
    wg(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C) { // C[64,64] = A[64,64] B[64,64]^T
  extern __shared__ __align__(1024) char sm[];
  int t = threadIdx.x, lane = t & 31, w = t >> 5;
  for (int i = t; i < 64 * 8; i += 128) {
    int r = i >> 3, ch = i & 7;
    *(uint4*)(sm + r * 128 + ((ch ^ (r & 7)) << 4)) = *(const uint4*)(A + r * 64 + ch * 8);
    *(uint4*)(sm + 8192 + r * 128 + ((ch ^ (r & 7)) << 4)) = *(const uint4*)(B + r * 64 + ch * 8);
  }
  asm volatile("fence.proxy.async;");
  __syncthreads();
  float d[32];
  for (auto& v : d)
    v = 0;
  auto desc = [](uint32_t a) {
    return (uint64_t)((a & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
  };
  asm volatile("wgmma.fence.sync.aligned;");
  for (int k = 0; k < 4; k++) {
    uint64_t da = desc(sp(sm) + k * 32), db = desc(sp(sm) + 8192 + k * 32);
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%"
                 "22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0; }"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                   "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
                   "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),
                   "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                   "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
                   "+f"(d[30]), "+f"(d[31])
                 : "l"(da), "l"(db), "r"(k));
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 4; i++)
      C[(w * 16 + (lane >> 2) + (i >> 1) * 8) * 64 + j * 8 + (lane & 3) * 2 + (i & 1)] =
          d[j * 4 + i];
}
int main() {
  int ch = 7;
  std::vector<float> x(ch * 128), r(128);
  for (size_t i = 0; i < x.size(); i++)
    x[i] = (i * 37 % 101) * 0.5f;
  float *X, *O;
  CK(cudaMalloc(&X, x.size() * 4));
  CK(cudaMalloc(&O, 512));
  CK(cudaMemcpy(X, x.data(), x.size() * 4, cudaMemcpyHostToDevice));
  pipe<<<1, 160>>>(X, O, ch);
  CK(cudaGetLastError());
  CK(cudaMemcpy(r.data(), O, 512, cudaMemcpyDeviceToHost));
  for (int t = 0; t < 128; t++) {
    float s = 0;
    for (int c = 0; c < ch; c++)
      s += x[c * 128 + t] * (c + 1);
    if (!(s == r[t])) {
      printf("pipe WRONG at %d: %g %g\n", t, s, r[t]);
      return 1;
    }
  }
  std::vector<__nv_bfloat16> a(4096), b(4096);
  std::vector<float> c(4096);
  for (int i = 0; i < 4096; i++) {
    a[i] = __float2bfloat16((i * 7 % 23 - 11) / 8.f);
    b[i] = __float2bfloat16((i * 5 % 19 - 9) / 8.f);
  }
  __nv_bfloat16 *A, *B;
  float* C;
  CK(cudaMalloc(&A, 8192));
  CK(cudaMalloc(&B, 8192));
  CK(cudaMalloc(&C, 16384));
  CK(cudaMemcpy(A, a.data(), 8192, cudaMemcpyHostToDevice));
  CK(cudaMemcpy(B, b.data(), 8192, cudaMemcpyHostToDevice));
  wg<<<1, 128, 16384>>>(A, B, C);
  CK(cudaGetLastError());
  CK(cudaMemcpy(c.data(), C, 16384, cudaMemcpyDeviceToHost));
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < 64; j++) {
      double s = 0;
      for (int k = 0; k < 64; k++)
        s += (double)__bfloat162float(a[i * 64 + k]) * __bfloat162float(b[j * 64 + k]);
      if (!(fabs(s - c[i * 64 + j]) < 1e-3)) {
        printf("wgmma WRONG at %d,%d: %g %g\n", i, j, s, c[i * 64 + j]);
        return 1;
      }
    }
  puts("hopper ok");
  return 0;
}
