// SPDX-License-Identifier: Apache-2.0
// mbarrier.cpp - mbarrier objects, bulk copies that complete on them (cp.async.bulk without tensor
// maps) and cp.async.mbarrier.arrive (PTX ISA 9.7.13.15, 9.7.9.25.5). A bulk load is in flight
// until a poll of its mbarrier happens to deliver it.
#include "sim.h"
#include <cstring>

namespace ptx {
namespace {

enum MOp : uint8_t { M_INIT, M_INVAL, M_ARRIVE, M_EXPECT, M_COMPLETE, M_WAIT };

uint32_t shOff(Warp& warp, const Instr& in, uint64_t a, int lane) {
  if ((a & WIN_MASK) == WIN_SHARED)
    a &= ~WIN_MASK;
  warp.sharedPtr(in, (uint32_t)a, 8, lane);
  return (uint32_t)a;
}
void turn(MBarrier& b) {
  if (b.pending <= 0 && b.tx == 0) {
    b.phase++;
    b.pending = b.expected;
  }
}
MBarrier& barAt(Warp& warp, const Instr& in, uint32_t off, int lane) {
  auto it = warp.block->mbar.find(off);
  if (it == warp.block->mbar.end())
    warp.error(in, lane, strf("no mbarrier was initialised at shared offset %u", off));
  return it->second;
}
void arrive(Warp& warp, const Instr& in, uint32_t off, int lane, int64_t n) {
  MBarrier& b = barAt(warp, in, off, lane);
  if (b.pending < n)
    warp.error(in, lane, strf("mbarrier at %u: more arrivals than its count", off));
  joinClock(b.clock, warp.clock);
  joinClock(b.proxyClock, warp.proxyClock);
  b.pending -= n;
  turn(b);
}
void deliver(Block& blk, uint32_t mb) { // each poll may complete some bulk copies
  for (size_t i = 0; i < blk.bulk.size();) {
    BulkCopy o = blk.bulk[i];
    if (o.mbar != mb || blk.launch->rng.below(3)) {
      i++;
      continue;
    }
    for (uint32_t k = 0; k < o.bytes; k += 16) {
      memcpy(blk.smem.data() + o.dst + k, o.warp->globalPtr(*o.in, o.src + k, 16, o.lane, false),
             16);
      o.warp->checkGlobal(*o.in, o.src + k, 16, o.lane, false, false);
    }
    if (!blk.shWriter.empty())
      memset(&blk.shWriter[o.dst], 0, 4ull * o.bytes);
    blk.bulk.erase(blk.bulk.begin() + i);
    MBarrier& b = blk.mbar[mb];
    b.tx -= o.bytes;
    turn(b);
  }
}
void execMbar(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* base = warp.src(in.src[0]);
  uint32_t ok = 0;
  Block& blk = *warp.block;
  forEachLane(mask, [&](int lane) {
    uint32_t off = shOff(warp, in, base[lane] + in.offset, lane);
    uint64_t v = in.src[1] == NOCOL ? 1 : warp.src(in.src[1])[lane];
    switch (in.variant) {
      case M_INIT: {
        MBarrier b;
        b.expected = b.pending = (uint32_t)v;
        if (!(uint32_t)v)
          warp.error(in, lane, "mbarrier count 0");
        blk.mbar[off] = b;
        break;
      }
      case M_INVAL:
        barAt(warp, in, off, lane);
        blk.mbar.erase(off);
        break;
      case M_ARRIVE: {
        MBarrier& b = barAt(warp, in, off, lane);
        uint64_t ph = b.phase;
        if (in.vecLen == 2) {
          b.tx += (uint32_t)v;
          v = 1;
        }
        arrive(warp, in, off, lane, (uint32_t)v);
        if (in.dst[0] != NOCOL)
          warp.reg(in.dst[0])[lane] = ph;
        break;
      }
      case M_EXPECT: barAt(warp, in, off, lane).tx += (uint32_t)v; break;
      case M_COMPLETE: {
        MBarrier& b = barAt(warp, in, off, lane);
        b.tx -= (uint32_t)v;
        turn(b);
        break;
      }
      case M_WAIT: {
        barAt(warp, in, off, lane);
        deliver(blk, off);
        MBarrier& b = blk.mbar[off];
        bool done = in.vecLen == 2 ? (b.phase & 1) != (v & 1) : b.phase != v;
        if (done) {
          ok |= 1u << lane;
          warp.learn(b.clock, b.proxyClock);
        }
        break;
      }
    }
  });
  if (in.variant == M_ARRIVE)
    warp.tick();
  if (in.variant == M_WAIT) {
    warp.setPred(in.dst[0], ok, mask);
    if (ok != mask)
      warp.yields++;
    if (ok)
      warp.tick();
  }
}
void execBulkLoad(Warp& warp, const Instr& in, uint32_t mask) {
  forEachLane(mask, [&](int lane) {
    uint64_t d = warp.src(in.src[0])[lane] + in.offset, s = warp.src(in.src[1])[lane];
    uint32_t n = (uint32_t)warp.src(in.src[2])[lane];
    if ((d & WIN_MASK) == WIN_SHARED)
      d &= ~WIN_MASK;
    uint32_t mb = shOff(warp, in, warp.src(in.src[3])[lane] + in.target, lane);
    barAt(warp, in, mb, lane);
    if (d % 16 || s % 16 || n % 16)
      warp.error(in, lane,
                 strf("cp.async.bulk needs 16-byte aligned addresses and size (dst %llu, src "
                      "0x%llx, %u bytes)",
                      (unsigned long long)d, (unsigned long long)s, n),
                 716);
    if (!n)
      return;
    if (d + n > warp.block->smemSize)
      warp.error(in, lane, "cp.async.bulk destination outside the block's shared memory", 700);
    warp.globalPtr(in, s, 16, lane, false);
    warp.globalPtr(in, s + n - 16, 16, lane, false);
    for (uint32_t k = 0; k < n; k += 16)
      warp.checkShared(in, (uint32_t)d + k, 16, lane, true, false, nullptr, true);
    memset(warp.block->smem.data() + d, 0xFF, n);
    warp.block->bulk.push_back({(uint32_t)d, n, mb, s, &warp, lane, &in});
    warp.launch->c.cpasync++;
  });
}
void execBulkStore(Warp& warp, const Instr& in, uint32_t mask) {
  forEachLane(mask, [&](int lane) {
    uint64_t d = warp.src(in.src[0])[lane] + in.offset, s = warp.src(in.src[1])[lane] + in.target;
    uint32_t n = (uint32_t)warp.src(in.src[2])[lane];
    if ((s & WIN_MASK) == WIN_SHARED)
      s &= ~WIN_MASK;
    if (d % 16 || s % 16 || n % 16)
      warp.error(in, lane, "cp.async.bulk needs 16-byte aligned addresses and size", 716);
    for (uint32_t k = 0; k < n; k += 16) {
      char* p = warp.sharedPtr(in, (uint32_t)s + k, 16, lane);
      warp.checkShared(in, (uint32_t)s + k, 16, lane, false, false);
      warp.checkProxy(in, (uint32_t)s + k, 16, lane);
      char* q = warp.globalPtr(in, d + k, 16, lane, true);
      warp.checkGlobal(in, d + k, 16, lane, true, false, p);
      memcpy(q, p, 16);
    }
  });
}
void execCpMbarArrive(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* base = warp.src(in.src[0]);
  forEachLane(mask, [&](int lane) {
    uint32_t off = shOff(warp, in, base[lane] + in.offset, lane);
    warp.deliverCopies(lane, ~0u);
    if (in.variant)
      arrive(warp, in, off, lane, 1);
    else {
      barAt(warp, in, off, lane).pending++;
      arrive(warp, in, off, lane, 1);
    }
  });
  warp.tick();
}
void execMapa(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  forEachLane(mask, [&](int lane) { d[lane] = a[lane]; });
}

// ------------------------------------------------------------------ decoders
bool decodeMbar(DecodeCtx& ctx) {
  const auto& o = ctx.raw.operands;
  const std::string& k = ctx.raw.mods[0];
  size_t a = 0;
  if (k == "init")
    ctx.ins.variant = M_INIT;
  else if (k == "inval")
    ctx.ins.variant = M_INVAL;
  else if (k == "arrive")
    ctx.ins.variant = M_ARRIVE;
  else if (k == "expect_tx")
    ctx.ins.variant = M_EXPECT;
  else if (k == "complete_tx")
    ctx.ins.variant = M_COMPLETE;
  else if (k == "test_wait" || k == "try_wait")
    ctx.ins.variant = M_WAIT;
  else
    return false;
  if (ctx.ins.variant == M_ARRIVE && o[0].kind != Operand::MEM) {
    if (o[0].kind == Operand::REG)
      ctx.ins.dst[0] = ctx.dest(o[0]);
    a = 1;
  }
  if (ctx.ins.variant == M_WAIT) {
    ctx.ins.dst[0] = ctx.dest(o[0]);
    a = 1;
  }
  ctx.memory(o[a]);
  if (o.size() > a + 1)
    ctx.ins.src[1] = ctx.source(o[a + 1], T_B64);
  ctx.ins.vecLen = ctx.ins.variant == M_WAIT
                       ? (ctx.raw.has("parity") ? 2 : 1)
                       : (ctx.ins.variant == M_ARRIVE && ctx.raw.has("expect_tx") ? 2 : 1);
  ctx.ins.exec = execMbar;
  return true;
}
bool decodeMapa(DecodeCtx& ctx) {
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], T_B64);
  ctx.ins.exec = execMapa;
  return true;
}
} // namespace

bool decodeCpBulk(DecodeCtx& ctx) {
  const auto& o = ctx.raw.operands;
  if (ctx.raw.has("mbarrier")) {
    ctx.memory(o[0]);
    ctx.ins.variant = ctx.raw.has("noinc");
    ctx.ins.exec = execCpMbarArrive;
    return true;
  }
  if (ctx.raw.has("tensor") || ctx.raw.has("reduce"))
    return false;
  if (ctx.raw.has("commit_group") || ctx.raw.has("wait_group") || ctx.raw.has("prefetch")) {
    ctx.ins.exec = execNop;
    return true;
  }
  if (ctx.raw.has("multicast::cluster"))
    return false;
  if (ctx.raw.has("bulk_group")) {
    ctx.memory(o[1], 1);
    ctx.ins.target = (int)ctx.ins.offset;
    ctx.memory(o[0], 0);
    ctx.ins.src[2] = ctx.source(o[2], T_B32);
    ctx.ins.exec = execBulkStore;
    return true;
  }
  if (o.size() < 4)
    return false;
  ctx.memory(o[1], 1);
  if (ctx.ins.offset)
    return false;
  ctx.memory(o[3], 3);
  ctx.ins.target = (int)ctx.ins.offset;
  ctx.memory(o[0], 0);
  ctx.ins.src[2] = ctx.source(o[2], T_B32);
  ctx.ins.exec = execBulkLoad;
  return true;
}
void registerMbarrier(std::unordered_map<std::string, Decoder>& t) {
  t["mbarrier"] = decodeMbar;
  t["mapa"] = decodeMapa;
}

} // namespace ptx
