// ms_ptx.cuh - inline PTX of the ffn kernels that run on every device from sm_80 on: one instruction each.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PTX_CUH
#define MS_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Address of shared memory as PTX wants it.
__device__ __forceinline__ uint32_t ms_shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

// x, as if it were only known here: what is computed from it in a loop stays there and takes no registers outside.
__device__ __forceinline__ uint32_t ms_here(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Store 16 bytes to global memory, at a multiple of 16: as one instruction, which a plain uint4 is not always.
__device__ __forceinline__ void ms_st128(void *to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Copy 16 bytes of global memory to shared memory, asynchronously, past the L1 cache; zeros if not `there` (then `from`
// is not read, but must be a legal address).
__device__ __forceinline__ void ms_cp_async16(uint32_t to, const void *from, bool there) {
  int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
// The copies since the last commit are one group.
__device__ __forceinline__ void ms_cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Wait until at most N groups of this thread are under way.
template <int N> __device__ __forceinline__ void ms_cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers (8 x 4 of 32-bit): lane i gives the address of row i % 8 of matrix i / 8, and
// gets two numbers (one) of row lane / 4 of each.
__device__ __forceinline__ void ms_ldmatrix4(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// c += a . b: 16 rows of A, 8 columns of B, 32 bytes of K; fp32 sums. Floats are tf32 (ms_operands).
//   c[0], c[1]   row lane / 4, columns lane % 4 * 2 + {0, 1};   c[2], c[3]   row lane / 4 + 8
__device__ __forceinline__ void ms_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1, const __nv_bfloat16 *) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, "
               "%7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void ms_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1, const __half *) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, "
               "%7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void ms_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1, const float *) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, "
               "%7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Operands as ms_mma wants them: floats rounded to tf32, to nearest, ties away from zero; 16-bit numbers as they are.
__device__ __forceinline__ void ms_operands(uint32_t (&x)[4], const float *) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(x[i]) : "f"(__uint_as_float(x[i])));
}
template <typename Storage>
__device__ __forceinline__ void ms_operands(uint32_t (&)[4], const Storage *) {}

#endif
