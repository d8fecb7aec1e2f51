// SPDX-License-Identifier: Apache-2.0
// hopper_async.cu - the asynchronous rules of Hopper: wgmma with A in registers, its fence and
// wait, fence.proxy.async, and stmatrix. Usage: hopper_async NAME; every name but the first three
// plants a bug.
#include "check.h"
#include <cstdint>
#include <cuda_bf16.h>
#include <string>
#include <vector>

using bf16 = __nv_bfloat16;
enum Bug { NONE, NO_FENCE, LATE_FENCE, NO_WAIT, NO_PROXY_FENCE, OVERWRITE };

__device__ uint32_t shared(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// C[64,8] = A[64,16] B[8,16]^T, twice into the same accumulators
__global__ void __launch_bounds__(128) registerA(const bf16* A, const bf16* B, float* C, int bug) {
  __shared__ __align__(128) bf16 b[2][8][8]; // two core matrices along k
  int t = threadIdx.x, lane = t & 31, row = t / 32 * 16 + lane / 4, col = 2 * (lane & 3);
  b[t % 16 / 8][t / 16][t % 8] = B[t];
  if (bug != NO_PROXY_FENCE)
    asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  float d[4] = {0, 0, 0, 0};
  uint32_t a[4];
  if (bug == LATE_FENCE)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int i = 0; i < 4; i++) // volatile: the loads must not move over the fence
    a[i] = *(volatile const uint32_t*)(A + (row + i % 2 * 8) * 16 + col + i / 2 * 8);
  if (bug != LATE_FENCE && bug != NO_FENCE)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  uint64_t desc = shared(b) >> 4 | (uint64_t)(128 >> 4) << 16 | (uint64_t)(256 >> 4) << 32;
  for (int k = 0; k < 2; k++)
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %9, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p, 1, 1, 0; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc), "r"(k)
        : "memory");
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  if (bug == OVERWRITE)
    b[0][t / 16][t % 8] = __float2bfloat16(0);
  if (bug != NO_WAIT)
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; i++)
    C[(row + i / 2 * 8) * 8 + col + i % 2] = d[i];
}

// Writes 32 values to shared memory and copies them out in bulk.
__global__ void bulkStore(int* out, int bug) {
  __shared__ __align__(16) int s[32];
  s[threadIdx.x] = threadIdx.x * 5;
  if (bug != NO_PROXY_FENCE)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x == 0)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;\n"
                 "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::"l"(out),
                 "r"(shared(s))
                 : "memory");
}

// Four 8x8 matrices to shared memory, plain or transposed; element (r, c) of matrix i is 64 i + 8 r
// + c.
__global__ void store(uint16_t* out, bool transposed) {
  __shared__ __align__(16) uint16_t s[4][8][8];
  int lane = threadIdx.x, r = lane / 4, c = 2 * (lane & 3);
  uint32_t v[4];
  for (int i = 0; i < 4; i++)
    v[i] = (64 * i + 8 * r + c) | (64 * i + 8 * r + c + 1) << 16;
  uint32_t row = shared(s[lane / 8][lane % 8]);
  if (transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  __syncwarp();
  for (int i = lane; i < 256; i += 32)
    out[i] = (&s[0][0][0])[i];
}

static void testRegisterA(int bug) {
  std::vector<bf16> a(64 * 16), b(8 * 16);
  for (size_t i = 0; i < a.size(); i++)
    a[i] = __float2bfloat16((i * 7 % 23) - 11.f);
  for (size_t i = 0; i < b.size(); i++)
    b[i] = __float2bfloat16((i * 5 % 19) - 9.f);
  bf16 *A, *B;
  float *C, c[64 * 8];
  CK(cudaMalloc(&A, a.size() * 2));
  CK(cudaMalloc(&B, b.size() * 2));
  CK(cudaMalloc(&C, sizeof c));
  CK(cudaMemcpy(A, a.data(), a.size() * 2, cudaMemcpyHostToDevice));
  CK(cudaMemcpy(B, b.data(), b.size() * 2, cudaMemcpyHostToDevice));
  registerA<<<1, 128>>>(A, B, C, bug);
  CK(cudaMemcpy(c, C, sizeof c, cudaMemcpyDeviceToHost));
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < 8; j++) {
      float sum = 0;
      for (int k = 0; k < 16; k++)
        sum += 2 * __bfloat162float(a[i * 16 + k]) * __bfloat162float(b[j * 16 + k]);
      EXPECT(c[i * 8 + j] == sum);
    }
}

static void testBulkStore(int bug) {
  int *out, h[32];
  CK(cudaMalloc(&out, sizeof h));
  bulkStore<<<1, 32>>>(out, bug);
  CK(cudaMemcpy(h, out, sizeof h, cudaMemcpyDeviceToHost));
  for (int i = 0; i < 32; i++)
    EXPECT(h[i] == i * 5);
}

static void testStmatrix() {
  uint16_t *out, h[256];
  CK(cudaMalloc(&out, sizeof h));
  for (int transposed = 0; transposed < 2; transposed++) {
    store<<<1, 32>>>(out, transposed);
    CK(cudaMemcpy(h, out, sizeof h, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 256; i++) {
      int m = i / 64, r = i / 8 % 8, c = i % 8;
      EXPECT(h[i] == (transposed ? 64 * m + 8 * c + r : i));
    }
  }
}

int main(int argc, char** argv) {
  std::string name = argc > 1 ? argv[1] : "";
  if (name == "register-a")
    testRegisterA(NONE);
  else if (name == "bulk-store")
    testBulkStore(NONE);
  else if (name == "stmatrix")
    testStmatrix();
  else if (name == "no-fence")
    testRegisterA(NO_FENCE);
  else if (name == "late-fence")
    testRegisterA(LATE_FENCE);
  else if (name == "no-wait")
    testRegisterA(NO_WAIT);
  else if (name == "overwrite")
    testRegisterA(OVERWRITE);
  else if (name == "wgmma-no-proxy-fence")
    testRegisterA(NO_PROXY_FENCE);
  else if (name == "bulk-no-proxy-fence")
    testBulkStore(NO_PROXY_FENCE);
  else
    return 3;
  puts("ok");
}
