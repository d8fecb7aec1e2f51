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

#endif
