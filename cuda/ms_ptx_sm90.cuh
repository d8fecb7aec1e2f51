// ms_ptx_sm90.cuh - every line of PTX that only sm_90a has, one primitive each: mbarriers, the asynchronous proxy,
// registers handed between warpgroups, wgmma. The other inline PTX is in ms_ptx.cuh.
//
// Shared memory is named by its 32-bit address (ms_shared_address). A warpgroup is 4 consecutive warps; what is marked
// "warpgroup" must be executed by all 128 threads of one.
//
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PTX_SM90_CUH
#define MS_PTX_SM90_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ uint32_t ms_shared_address(const void *shared) {
  return (uint32_t)__cvta_generic_to_shared(shared);
}

// ---- mbarriers -------------------------------------------------------------------------------------------------

// One thread, before a __syncthreads: `count` arrivals complete a phase.
__device__ __forceinline__ void ms_mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void ms_mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Wait for the phase of this parity to complete; parity 1 of a fresh barrier is complete.
__device__ __forceinline__ void ms_mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// ---- copies that wgmma reads -----------------------------------------------------------------------------------

// 16 bytes from global to shared memory, or 16 zero bytes and no read. Past L1: this block reads them once.
__device__ __forceinline__ void ms_copy16(uint32_t shared, const void *global, bool read) {
  asm volatile("{\n"
               ".reg .pred zeros;\n"
               "setp.eq.u32 zeros, %2, 0;\n"
               "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, zeros;\n"
               "}" ::"r"(shared),
               "l"(global), "r"((uint32_t)read)
               : "memory");
}
__device__ __forceinline__ void ms_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING groups of this thread are in flight.
template <int PENDING> __device__ __forceinline__ void ms_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// What this thread wrote to shared memory becomes visible to wgmma. The thread that wrote must say it: after its
// copies have landed, before it tells the reader.
__device__ __forceinline__ void ms_fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroups ------------------------------------------------------------------------------------------------

// Warpgroup: from now on this many registers a thread.
template <int COUNT> __device__ __forceinline__ void ms_registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void ms_registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Four 8x8 matrices of 16-bit elements from fragments to shared memory; lane l gives the 16-byte row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void ms_store_matrix4(uint32_t shared_row, uint32_t m0, uint32_t m1, uint32_t m2,
                                                 uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_row), "r"(m0), "r"(m1),
               "r"(m2), "r"(m3)
               : "memory");
}

// ---- wgmma -----------------------------------------------------------------------------------------------------

// Descriptor of an operand whose rows (of A or of B^T) are 128 bytes of K, 8 rows to a 1024-byte block, the eight
// 16-byte pieces of row r permuted by piece ^ (r % 8). 16 elements further along K: + 2.
__device__ __forceinline__ uint64_t ms_wgmma_operand(uint32_t shared) {
  const uint64_t swizzle_128_bytes = 1ull << 62, stride_1024_bytes = 64ull << 32, unused = 1ull << 16;
  return swizzle_128_bytes | stride_1024_bytes | unused | (shared & 0x3ffff) >> 4;
}

// Before the first wgmma, and whenever other instructions have touched its registers. Warpgroup.
__device__ __forceinline__ void ms_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void ms_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void ms_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// sum[64, N] = (accumulate ? sum : 0) + A[64, 16] . B[N, 16]^T, asynchronously. Warpgroup.
// Of this thread, warp w of the warpgroup, lane l: sum[4g + i] is row 16w + l / 4 + 8 (i / 2), column
// 8g + 2 (l % 4) + i % 2.
template <typename Storage>
__device__ __forceinline__ void ms_wgmma(float (&sum)[64], uint64_t a, uint64_t b, int accumulate);
template <typename Storage>
__device__ __forceinline__ void ms_wgmma(float (&sum)[128], uint64_t a, uint64_t b, int accumulate);

#define MS_SUM8(i)                                                                                                    \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]),              \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define MS_WGMMA_N128(TYPE)                                                                                           \
  asm volatile("{\n"                                                                                                  \
               ".reg .pred p;\n"                                                                                      \
               "setp.ne.b32 p, %66, 0;\n"                                                                             \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                      \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                     \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                     \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                       \
               "}, %64, %65, p, 1, 1, 0, 0;\n"                                                                        \
               "}"                                                                                                    \
               : MS_SUM8(0),                                                                                          \
                 MS_SUM8(8),                                                                                          \
                 MS_SUM8(16),                                                                                         \
                 MS_SUM8(24),                                                                                         \
                 MS_SUM8(32),                                                                                         \
                 MS_SUM8(40),                                                                                         \
                 MS_SUM8(48),                                                                                         \
                 MS_SUM8(56)                                                                                          \
               : "l"(a), "l"(b), "r"(accumulate))

#define MS_WGMMA_N256(TYPE)                                                                                           \
  asm volatile("{\n"                                                                                                  \
               ".reg .pred p;\n"                                                                                      \
               "setp.ne.b32 p, %130, 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"                                      \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                     \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                     \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                     \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                     \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                     \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "         \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"       \
               "}, %128, %129, p, 1, 1, 0, 0;\n"                                                                      \
               "}"                                                                                                    \
               : MS_SUM8(0),                                                                                          \
                 MS_SUM8(8),                                                                                          \
                 MS_SUM8(16),                                                                                         \
                 MS_SUM8(24),                                                                                         \
                 MS_SUM8(32),                                                                                         \
                 MS_SUM8(40),                                                                                         \
                 MS_SUM8(48),                                                                                         \
                 MS_SUM8(56),                                                                                         \
                 MS_SUM8(64),                                                                                         \
                 MS_SUM8(72),                                                                                         \
                 MS_SUM8(80),                                                                                         \
                 MS_SUM8(88),                                                                                         \
                 MS_SUM8(96),                                                                                         \
                 MS_SUM8(104),                                                                                        \
                 MS_SUM8(112),                                                                                        \
                 MS_SUM8(120)                                                                                         \
               : "l"(a), "l"(b), "r"(accumulate))

template <>
__device__ __forceinline__ void ms_wgmma<__nv_bfloat16>(float (&sum)[64], uint64_t a, uint64_t b, int accumulate) {
  MS_WGMMA_N128("bf16");
}
template <>
__device__ __forceinline__ void ms_wgmma<__nv_bfloat16>(float (&sum)[128], uint64_t a, uint64_t b, int accumulate) {
  MS_WGMMA_N256("bf16");
}
template <>
__device__ __forceinline__ void ms_wgmma<__half>(float (&sum)[64], uint64_t a, uint64_t b, int accumulate) {
  MS_WGMMA_N128("f16");
}
template <>
__device__ __forceinline__ void ms_wgmma<__half>(float (&sum)[128], uint64_t a, uint64_t b, int accumulate) {
  MS_WGMMA_N256("f16");
}
#undef MS_WGMMA_N128
#undef MS_WGMMA_N256
#undef MS_SUM8

#endif
