// ms_ptx_sync.cuh - inline PTX for what blocks of one launch tell each other.
// SPDX-License-Identifier: Apache-2.0
#ifndef MS_PTX_SYNC_CUH
#define MS_PTX_SYNC_CUH

#include <stdint.h>

// Take the next number. Who takes number n sees all that the takers of smaller numbers wrote before.
__device__ __forceinline__ uint32_t ms_ticket_acq_rel(int32_t *ticket) {
  uint32_t number;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(number) : "l"(ticket) : "memory");
  return number;
}

// All threads of all blocks of a cooperative launch meet: whoever goes on sees all that any of them wrote before. What
// the blocks add is 2^31 together, so the last to come turns the word's top bit: nothing has to be reset, and a word that
// was 0 is 0 again after the second meeting.
__device__ __forceinline__ void ms_grid_meet(int32_t *word) {
#ifndef MS_PLANT_34 // a block may come before all of its threads have
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
#ifdef MS_PLANT_33 // one block is waited for that there is not
    uint32_t blocks = gridDim.x + 1;
#else
    uint32_t blocks = gridDim.x;
#endif
    uint32_t add = blockIdx.x == 0 ? (1u << 31) - (blocks - 1) : 1, before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(add) : "memory");
#ifdef MS_PLANT_32 // the second meeting does not wait
    before = 0;
#endif
    do
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    while (((before ^ now) >> 31) == 0);
  }
  __syncthreads();
}

#endif
