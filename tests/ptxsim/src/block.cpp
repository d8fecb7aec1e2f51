// SPDX-License-Identifier: Apache-2.0
// block.cpp - one thread block: start, choice of the next warp, barriers (PTX ISA 9.7.13.1),
// deadlock reports.
#include "sim.h"

namespace ptx {

void Block::start(Launch* l, uint64_t linearId) {
  launch = l;
  linear = (uint32_t)linearId;
  cta[0] = linearId % l->grid[0];
  cta[1] = linearId / l->grid[0] % l->grid[1];
  cta[2] = (uint32_t)(linearId / l->grid[0] / l->grid[1]);
  nthreads = l->blockDim[0] * l->blockDim[1] * l->blockDim[2];
  int nwarps = (nthreads + 31) / 32;
  smemSize = (uint32_t)(l->dynSmem ? l->fn->dynBase + l->dynSmem : l->fn->staticShared);
  smem.assign(smemSize, 0xFF);
  shWgmmaReads.clear();
  if (Options::get().race && smemSize)
    for (auto* shadow : {&shWriter, &shReader, &shReader2})
      shadow->assign(smemSize, 0);
  else
    shWriter.clear();
  if ((int)warps.size() != nwarps)
    warps = std::vector<Warp>(nwarps);
  for (auto& b : bar)
    b = Barrier();
  published.clear();
  mbar.clear();
  bulk.clear();
  done = false;
  for (int i = 0; i < nwarps; i++) {
    warps[i].init(this, i);
    warps[i].prio = (int)l->rng.below(1000);
  }
}

// Uniform scheduling takes any warp that can run; skewed scheduling follows priorities that change
// rarely, so that some warps run far ahead of others.
Warp* Block::pickWarp(Rng& rng, bool skew) {
  Warp* pick = nullptr;
  int best = -1, candidates = 0;
  if (skew && rng.below(48) == 0)
    for (auto& w : warps)
      w.prio = (int)rng.below(1000);
  for (auto& w : warps) {
    if (!w.runnable())
      continue;
    candidates++;
    if (skew ? w.prio > best : rng.below(candidates) == 0) {
      best = w.prio;
      pick = &w;
    }
  }
  return pick;
}

Block::Step Block::step(Rng& rng, bool skew) {
  Warp* w = pickWarp(rng, skew);
  if (!w) {
    for (auto& x : warps)
      if (x.alive)
        deadlock();
    if (!bulk.empty())
      bulk[0].warp->error(*bulk[0].in, bulk[0].lane,
                          "block ends with a cp.async.bulk that nobody waited for");
    done = true;
    return ENDED;
  }
  uint64_t yields = w->yields;
  w->run(skew ? 1 + (int)rng.below(128) : 1 + (int)rng.below(24));
  if (w->yields == yields)
    return RAN;
  w->prio = 0; // nanosleep, a failed poll of memory or an mbarrier: let others go first
  return YIELDED;
}

bool Block::spins() const {
  constexpr uint32_t LONG = 20000; // a loop may also give up some day
  for (auto& w : warps)
    if (w.runnable() && (w.vainPolls < LONG || w.pollAt != launch->progress))
      return false;
  return bulk.empty();
}

void Block::deadlock() {
  std::string s = strf("deadlock: no thread of block (%u,%u,%u) of %s can run", cta[0], cta[1],
                       cta[2], launch->fn->name.c_str());
  int lines = 0;
  bool collective = false;
  for (auto& w : warps) {
    for (uint32_t rest = w.alive; rest;) {
      int lane = firstLane(rest);
      bool atBar = w.waitBar >> lane & 1;
      uint32_t same = 0;
      forEachLane(rest, [&](int j) {
        if (w.pc[j] == w.pc[lane] && w.frames[j] == w.frames[lane] && (w.waitBar >> j & 1) == atBar)
          same |= 1u << j;
      });
      rest &= ~same;
      collective |= !atBar;
      const Instr& in = atBar ? *w.barIn[lane] : w.frames[lane]->fn->code[w.pc[lane]];
      if (lines++ < 12)
        s += strf("\n    warp %d lanes 0x%08x wait at PTX line %d: %s%s", w.id, same, in.raw->line,
                  in.raw->text.c_str(),
                  atBar ? "" : strf(" (member mask 0x%08x)", w.collMask[lane]).c_str());
    }
  }
  if (collective)
    s += "\n    (a warp collective lacks lanes that its mask names)";
  throw SimError(s, 719);
}

// variant: 0 sync, 1 arrive, 2 reduction. src: barrier number, thread count, predicate.
void Block::barArrive(Warp& w, const Instr& in, uint32_t lanes) {
  launch->c.barriers++;
  launch->progress++;
  int lane = firstLane(lanes);
  uint32_t number = (uint32_t)w.src(in.src[0])[lane];
  uint32_t threads = in.src[1] == NOCOL ? 0 : (uint32_t)w.src(in.src[1])[lane];
  if (number > 15)
    w.error(in, lane, strf("barrier number %u", number));
  if (threads % 32)
    w.error(in, lane, strf("barrier thread count %u is not a multiple of 32", threads));
  Barrier& b = bar[number];
  if (b.used && b.expectWarps != threads / 32)
    w.error(in, lane,
            strf("barrier %u used with thread counts %u and %u at once", number, b.expectWarps * 32,
                 threads));
  b.used = true;
  b.expectWarps = threads / 32;
  if (Options::get().strictExit) {
    if (w.alive != w.exists)
      w.error(
          in, lane,
          strf("barrier in a warp where lanes 0x%08x have already exited", w.exists & ~w.alive));
    if (!b.expectWarps)
      for (auto& x : warps)
        if (!x.alive)
          w.error(in, lane, strf("block-wide barrier after warp %d has exited", x.id));
  }
  b.arrived.resize(warps.size());
  b.arrived[w.id] |= lanes;
  forEachLane(lanes, [&](int l) {
    w.barId[l] = (int)number;
    w.barIn[l] = &in;
  });
  if (in.variant == 2) {
    uint32_t p = w.pred(in.src[2], in.negate[2]) & lanes;
    b.popc += __builtin_popcount(p);
    b.orv |= p != 0;
    b.andv &= p == lanes;
  }
  if (in.variant != 1)
    w.waitBar |= lanes;
  joinClock(b.clock, w.clock);
  joinClock(b.proxyClock, w.proxyClock);
  joinForeign(b.foreign, w.foreign);
  b.unfencedStore |= w.unfencedStore;
  if (in.variant == 1)
    w.tick();
  barComplete((int)number);
}

void Block::barResult(Warp& w, const Barrier& b, int lane) {
  const Instr& in = *w.barIn[lane];
  if (in.variant != 2)
    return;
  uint64_t* d = w.frames[lane]->regs.data() + (size_t)in.dst[0] * 32;
  if (in.variant2 == 0) {
    d[lane] = b.popc;
    return;
  }
  bool v = in.variant2 == 1 ? b.andv : b.orv;
  d[0] = ((uint32_t)d[0] & ~(1u << lane)) | (uint32_t)v << lane;
}

// A barrier counts warps: one has arrived when all of its live lanes have.
void Block::barComplete(int id) {
  Barrier& b = bar[id];
  if (!b.used)
    return;
  uint32_t full = 0, live = 0;
  for (auto& w : warps) {
    live += w.alive != 0;
    full += b.arrived[w.id] && (b.arrived[w.id] & w.alive) == w.alive;
  }
  if (!full || full < (b.expectWarps ? b.expectWarps : live))
    return;
  Barrier finished = b;
  b = Barrier();
  for (auto& w : warps) {
    uint32_t released = 0;
    forEachLane(w.waitBar, [&](int lane) {
      if (w.barId[lane] == id)
        released |= 1u << lane;
    });
    if (!released)
      continue;
    forEachLane(released, [&](int lane) { barResult(w, finished, lane); });
    w.flush();
    w.waitBar &= ~released;
    w.fenced = false;
    w.unfencedStore |= finished.unfencedStore;
    joinForeign(w.foreign, finished.foreign);
    w.learn(finished.clock, finished.proxyClock);
    w.tick();
  }
}

void Block::onExit() {
  if (!Options::get().strictExit) {
    for (int i = 0; i < 16; i++)
      barComplete(i);
    return;
  }
  for (auto& w : warps) {
    if (!w.waitBar)
      continue;
    int lane = firstLane(w.waitBar);
    const Instr& in = *w.barIn[lane];
    if (w.alive != w.exists)
      w.error(in, lane, "threads of this warp exit while others wait at a barrier");
    if (in.src[1] == NOCOL)
      for (auto& x : warps)
        if (!x.alive)
          w.error(in, lane,
                  strf("warp %d exits while this warp waits at a block-wide barrier", x.id));
  }
}

} // namespace ptx
