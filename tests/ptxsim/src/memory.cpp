// SPDX-License-Identifier: Apache-2.0
// memory.cpp - from addresses to host pointers: state spaces, bounds and alignment (PTX ISA 5.1
// and 6.4.1).
#include "sim.h"

namespace ptx {

static std::string nearby(uint64_t end, const Range* r) {
  if (!r)
    return "; in no live allocation";
  return strf("; %lld bytes past the end of a %llu-byte allocation", (long long)(end - r->end()),
              (unsigned long long)r->size);
}

char* Warp::globalPtr(const Instr& in, uint64_t a, int n, int lane, bool write) {
  const char* what = write ? "store" : "load";
  auto addr = (unsigned long long)a;
  const Range* r = lastRange;
  if (!r || a < r->base || a + n > r->end()) {
    r = DevMem::get().find(a);
    if (!r && a < 4096)
      error(in, lane, strf("global %s through a null pointer (address 0x%llx)", what, addr), 700);
    if (!r || a + n > r->end()) {
      const Range* below =
          r ? r : DevMem::get().find(a - 256); // allocations have a gap of 256 bytes behind
      error(in, lane,
            strf("global %s of %d bytes at 0x%llx out of bounds%s", what, n, addr,
                 nearby(a + n, below).c_str()),
            700);
    }
    if (r->kind == Range::DEVICE && !DevMem::get().peer(launch->device, r->device))
      error(in, lane,
            strf("kernel on device %d touches memory of device %d without peer access",
                 launch->device, r->device),
            700);
    lastRange = r;
  }
  if (a % n)
    error(in, lane, strf("misaligned global %s of %d bytes at 0x%llx", what, n, addr), 716);
  return r->sim(a);
}

char* Warp::sharedPtr(const Instr& in, uint64_t off, int n, int lane) {
  if (off + n > block->smemSize || off + n < off)
    error(in, lane,
          strf("shared access of %d bytes at offset %lld outside the block's %u bytes", n,
               (long long)off, block->smemSize),
          700);
  if (off % n)
    error(in, lane,
          strf("misaligned shared access of %d bytes at offset %llu", n, (unsigned long long)off),
          716);
  return (char*)block->smem.data() + off;
}

// Constant operands carry in variant2 what the address is relative to: 1 the frame (locals and
// parameters of called functions), 2 the kernel's parameters. Frame-relative parameter addresses in
// registers have bit 40 set.
char* Warp::resolve(const Instr& in, uint64_t a, int n, int lane, bool write, uint8_t space,
                    uint32_t* sharedOff) {
  *sharedOff = ~0u;
  if (space == SP_GENERIC) {
    uint64_t window = a & WIN_MASK;
    space = window == WIN_SHARED  ? SP_SHARED
            : window == WIN_LOCAL ? SP_LOCAL
            : window == WIN_PARAM ? SP_PARAM
                                  : SP_GLOBAL;
    if (space != SP_GLOBAL)
      a &= ~WIN_MASK;
  }
  switch (space) {
    case SP_SHARED:
      *sharedOff = (uint32_t)a; // shared addresses are 32 bits
      return sharedPtr(in, (uint32_t)a, n, lane);
    case SP_LOCAL: {
      if (in.variant2 == 1)
        a += f->localBase;
      if (a + n > (1u << 20) || a + n < a)
        error(in, lane, strf("local access at 0x%llx", (unsigned long long)a), 700);
      if (a % n)
        error(in, lane, "misaligned local access", 716);
      auto& mem = local[lane];
      if (mem.size() < a + n)
        mem.resize((a + n + 255) / 256 * 256, 0xFF);
      return (char*)mem.data() + a;
    }
    case SP_PARAM:
      if (in.variant2 == 1 || (a >> 40 & 1)) {
        a &= (1ull << 40) - 1;
        if (a + n > f->fn->frameParamBytes)
          error(in, lane, "parameter access out of range");
        return (char*)f->param(lane) + a;
      }
      if (a + n > launch->params.size())
        error(in, lane, "kernel parameter access out of range");
      return (char*)launch->params.data() + a;
    default: return globalPtr(in, a, n, lane, write);
  }
}

} // namespace ptx
