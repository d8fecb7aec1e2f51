// SPDX-License-Identifier: Apache-2.0
// counters.cpp - what PTXSIM_COUNTERS reports about memory accesses: shared-memory wavefronts (32
// banks of 4 bytes; a request of 8 or 16 bytes a lane takes 2 or 4 passes) and global 32-byte
// sectors, each with the ideal.
#include "sim.h"
#include <cstdio>

namespace ptx {

// ------------------------------------------------------------------ counters
void countShared(Warp& warp, const uint32_t* off, uint32_t mask, int n) {
  Counters& c = warp.launch->c;
  c.sharedReq++;
  int per = n <= 4 ? 32 : n == 8 ? 16 : 8;
  uint64_t wave = 0, ideal = 0;
  for (int g = 0; g < 32; g += per) {
    uint32_t words[32][32];
    int cnt[32] = {}, mx = 0, tot = 0;
    for (int lane = g; lane < g + per; lane++)
      if (mask >> lane & 1)
        for (int k = 0; k < std::max(1, n / 4); k++) {
          uint32_t wd = off[lane] / 4 + k, b = wd & 31;
          bool seen = false;
          for (int j = 0; j < cnt[b]; j++)
            if (words[b][j] == wd)
              seen = true;
          if (!seen && cnt[b] < 32) {
            words[b][cnt[b]++] = wd;
            mx = std::max(mx, cnt[b]);
            tot++;
          }
        }
    wave += mx;
    ideal += (tot + 31) / 32;
  }
  c.sharedWave += wave;
  c.sharedIdeal += ideal;
}
void countGlobal(Warp& warp, const uint64_t* a, uint32_t mask, int n) {
  Counters& c = warp.launch->c;
  c.globalReq++;
  std::vector<uint64_t> s, by;
  for (; mask; mask &= mask - 1) {
    int lane = __builtin_ctz(mask);
    for (uint64_t x = a[lane] / 32; x <= (a[lane] + n - 1) / 32; x++)
      s.push_back(x);
    by.push_back(a[lane]);
  }
  std::sort(s.begin(), s.end());
  c.globalSect += std::unique(s.begin(), s.end()) - s.begin();
  std::sort(by.begin(), by.end());
  size_t u = std::unique(by.begin(), by.end()) - by.begin();
  c.globalIdeal += (u * n + 31) / 32;
}
void count(Warp& warp, const Instr& in, uint32_t mask, int n, const uint64_t* base) {
  uint64_t g[32];
  uint32_t s[32], gm = 0, sm = 0;
  forEachLane(mask, [&](int lane) {
    uint64_t a = base[lane] + in.offset;
    uint8_t sp = in.space;
    if (sp == SP_GENERIC)
      sp = (a & WIN_MASK) == WIN_SHARED  ? SP_SHARED
           : (a & WIN_MASK) == WIN_LOCAL ? SP_LOCAL
                                         : SP_GLOBAL;
    if (sp == SP_SHARED) {
      s[lane] = (uint32_t)a;
      sm |= 1u << lane;
    } else if (sp == SP_GLOBAL) {
      g[lane] = a;
      gm |= 1u << lane;
    } else if (sp == SP_LOCAL)
      warp.launch->c.localReq++;
  });
  if (sm)
    countShared(warp, s, sm, n);
  if (gm)
    countGlobal(warp, g, gm, n);
}

void writeCounters(const Launch& l, double seconds) {
  FILE* f = fopen(Options::get().counterFile.c_str(), "a");
  if (!f)
    return;
  fprintf(f, "{\"kernel\":\"%s\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"dyn_smem\":%u",
          l.fn->name.c_str(), l.grid[0], l.grid[1], l.grid[2], l.blockDim[0], l.blockDim[1],
          l.blockDim[2], l.dynSmem);
  const Counters& c = l.c;
  const std::pair<const char*, uint64_t> values[] = {{"static_smem", l.fn->staticShared},
                                                     {"warp_instr", c.warpInstr},
                                                     {"thread_instr", c.threadInstr},
                                                     {"mma", c.mma},
                                                     {"shared_req", c.sharedReq},
                                                     {"shared_wavefronts", c.sharedWave},
                                                     {"shared_ideal", c.sharedIdeal},
                                                     {"global_req", c.globalReq},
                                                     {"global_sectors", c.globalSect},
                                                     {"global_ideal", c.globalIdeal},
                                                     {"barriers", c.barriers},
                                                     {"cp_async", c.cpasync},
                                                     {"atomics", c.atomics},
                                                     {"local_req", c.localReq}};
  for (auto& [name, v] : values)
    fprintf(f, ",\"%s\":%llu", name, (unsigned long long)v);
  fprintf(f, ",\"sim_seconds\":%.4f}\n", seconds);
  fclose(f);
}

} // namespace ptx
