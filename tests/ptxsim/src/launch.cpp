// SPDX-License-Identifier: Apache-2.0
// launch.cpp - the run of one kernel launch: block order, how many blocks are interleaved, the time
// limit.
#include "coverage.h"
#include "sim.h"
#include <cstdio>
#include <numeric>

namespace ptx {
namespace {

// Cooperative launches find a zeroed workspace for grid.sync() through %envreg1 and 2; its first
// word is its size.
struct GridWorkspace {
  uint64_t addr = 0;
  explicit GridWorkspace(const Launch& l) {
    if (!l.cooperative)
      return;
    uint32_t bytes = 64;
    addr = DevMem::get().alloc(l.device, bytes, true);
    char* p = DevMem::get().sim(addr, bytes);
    memset(p, 0, bytes);
    memcpy(p, &bytes, 4);
  }
  ~GridWorkspace() {
    if (addr)
      DevMem::get().free(addr);
  }
};

using Blocks = std::vector<std::unique_ptr<Block>>;

std::string positions(const Blocks& blocks, bool onlyRunnable) {
  std::string s;
  int lines = 0;
  for (auto& b : blocks)
    for (auto& w : b->warps) {
      if (b->done || !w.alive || (onlyRunnable && !w.runnable()) || lines++ >= 8)
        continue;
      w.flush();
      int lane = firstLane(w.alive);
      s += "\n    " + w.where(lane) +
           strf(" at PTX line %d", w.frames[lane]->fn->code[w.pc[lane]].raw->line);
    }
  return s;
}

// Nobody will change what all poll: blocks that have not started only start when others end.
void checkSpinning(const Launch& l, const Blocks& blocks, uint64_t notStarted) {
  for (auto& b : blocks)
    if (!b->done && !b->spins())
      return;
  throw SimError(
      strf("deadlock: all threads of kernel %s wait at barriers or poll memory that none of them "
           "will change",
           l.fn->name.c_str()) +
          (notStarted ? strf("; %llu blocks wait to start: only those of a cooperative launch run "
                             "all at once",
                             (unsigned long long)notStarted)
                      : "") +
          positions(blocks, true),
      719);
}

} // namespace

void Launch::runBlocks(bool skew, double deadline) {
  const Options& o = Options::get();
  uint64_t total = (uint64_t)grid[0] * grid[1] * grid[2];
  std::vector<uint32_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  if (o.shuffleBlocks)
    for (uint64_t i = total; i > 1; i--)
      std::swap(order[i - 1], order[rng.below((uint32_t)i)]);

  uint64_t resident = std::min<uint64_t>(total, cooperative ? total : o.resident), next = 0;
  Blocks blocks(resident);
  for (auto& b : blocks) {
    b = std::make_unique<Block>();
    b->start(this, order[next++]);
  }
  uint64_t live = resident;
  for (uint64_t turn = 0; live; turn++) {
    uint32_t k = resident > 1 ? rng.below((uint32_t)resident) : 0;
    if (blocks[k]->done)
      for (k = 0; blocks[k]->done;)
        k++;
    Block& b = *blocks[k];
    for (int s = 0; s < 8; s++) {
      Block::Step did = b.step(rng, skew);
      if (did == Block::RAN)
        continue;
      if (did == Block::ENDED && next < total)
        b.start(this, order[next++]);
      else if (did == Block::ENDED)
        live--;
      else if (b.spins() && (turn & 255) == 0)
        checkSpinning(*this, blocks, total - next);
      break;
    }
    if ((turn & 4095) == 0 && now() > deadline)
      throw SimError(strf("kernel %s runs longer than %.0f s (PTXSIM_TIMEOUT); spinning?",
                          fn->name.c_str(), o.timeout) +
                         positions(blocks, false),
                     702);
  }
}

void Launch::run() {
  const Options& o = Options::get();
  static uint64_t launches = 0;
  id = ++launches;
  rng = Rng(o.seed * 7919 + id);
  published.clear();
  bool skew = o.sched == Options::SKEW || (o.sched == Options::EITHER && rng.below(2));
  double start = now();
  coverageStart(*mod);
  GridWorkspace workspace(*this);
  gridWorkspace = workspace.addr;
  runBlocks(skew, start + o.timeout);
  if (o.counters)
    writeCounters(*this, now() - start);
  if (o.trace)
    fprintf(stderr, "ptxsim: %s grid %u,%u,%u block %u,%u,%u %.3f s, %llu warp instructions\n",
            fn->name.c_str(), grid[0], grid[1], grid[2], blockDim[0], blockDim[1], blockDim[2],
            now() - start, (unsigned long long)c.warpInstr);
  fflush(stdout);
}

} // namespace ptx
