// SPDX-License-Identifier: Apache-2.0
// cp_async.cpp - Ampere's cp.async: copies stay in flight (the destination is poisoned, any access
// is an error) until the issuing thread waits for their group (PTX ISA 9.7.9.25.3).
#include "sim.h"
#include <cstring>

namespace ptx {

// Performs the copies of groups up to upToGroup; the bytes become ordinary writes of this lane.
void Warp::deliverCopies(int lane, uint32_t upToGroup) {
  auto& queue = copies[lane];
  size_t left = 0;
  for (auto& o : queue) {
    if (o.group > upToGroup) {
      queue[left++] = o;
      continue;
    }
    char* d = (char*)block->smem.data() + o.dst;
    memset(d, 0, o.size);
    if (o.srcSize) {
      bool whole = o.srcSize == o.size;
      memcpy(d, globalPtr(*o.in, o.src, whole ? o.size : 1, lane, false), o.srcSize);
      checkGlobal(*o.in, o.src, o.srcSize, lane, false, false);
    }
    if (!block->shWriter.empty()) {
      std::fill_n(&block->shWriter[o.dst], o.size, 0);
      checkShared(*o.in, o.dst, o.size, lane, true, false);
    }
  }
  queue.resize(left);
}

namespace {

void execCpAsync(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t *db = warp.src(in.src[0]), *sb = warp.src(in.src[1]);
  warp.launch->c.cpasync++;
  uint32_t so[32];
  uint64_t ga[32];
  uint32_t ign = in.src[3] == NOCOL ? 0 : warp.pred(in.src[3], in.negate[3]);
  forEachLane(mask, [&](int lane) {
    uint64_t d = db[lane] + in.offset, s = sb[lane] + (int64_t)(intptr_t)in.target;
    int sz = in.elemBytes;
    uint64_t ss = in.src[2] == NOCOL ? sz : warp.src(in.src[2])[lane] & 0xffffffff;
    if (ign >> lane & 1)
      ss = 0;
    if ((d & WIN_MASK) == WIN_SHARED)
      d &= ~WIN_MASK;
    char* p = warp.sharedPtr(in, (uint32_t)d, sz, lane);
    if (ss > (uint64_t)sz)
      warp.error(in, lane,
                 strf("cp.async src-size %llu larger than cp-size %d", (unsigned long long)ss, sz));
    if (s % sz)
      warp.error(in, lane,
                 strf("cp.async source 0x%llx not aligned to %d", (unsigned long long)s, sz), 716);
    if (ss)
      warp.globalPtr(in, s, ss == (uint64_t)sz ? sz : 1, lane, false),
          (ss < (uint64_t)sz ? (void)warp.globalPtr(in, s + ss - 1, 1, lane, false) : (void)0);
    warp.checkShared(in, (uint32_t)d, sz, lane, true, false, nullptr, true);
    memset(p, 0xFF, sz);
    warp.copies[lane].push_back(
        {(uint32_t)d, s, (uint8_t)sz, (uint8_t)ss, warp.copiesCommitted[lane] + 1, &in});
    so[lane] = (uint32_t)d;
    ga[lane] = s;
  });
  if (Options::get().counters) {
    countShared(warp, so, mask, in.elemBytes);
    countGlobal(warp, ga, mask, in.elemBytes);
  }
}
void execCpCommit(Warp& warp, const Instr&, uint32_t mask) {
  forEachLane(mask, [&](int lane) { warp.copiesCommitted[lane]++; });
}
void execCpWait(Warp& warp, const Instr& in, uint32_t mask) {
  forEachLane(mask, [&](int lane) {
    uint32_t c = warp.copiesCommitted[lane], n = (uint32_t)in.offset;
    if (in.variant)
      warp.deliverCopies(lane, c + 1);
    else if (c >= n)
      warp.deliverCopies(lane, c - n);
  });
}
bool decodeCp(DecodeCtx& ctx) {
  if (ctx.raw.mods.empty() || ctx.raw.mods[0] != "async")
    return false;
  if (ctx.raw.has("bulk") || ctx.raw.has("mbarrier") || ctx.raw.has("reduce"))
    return decodeCpBulk(ctx);
  if (ctx.raw.has("commit_group")) {
    ctx.ins.exec = execCpCommit;
    return true;
  }
  if (ctx.raw.has("wait_all")) {
    ctx.ins.exec = execCpWait;
    ctx.ins.variant = 1;
    return true;
  }
  if (ctx.raw.has("wait_group")) {
    ctx.ins.exec = execCpWait;
    ctx.ins.offset = (int64_t)ctx.raw.operands[0].imm;
    return true;
  }
  const auto& o = ctx.raw.operands;
  if (o.size() < 3)
    return false;
  ctx.memory(o[1], 1);
  ctx.ins.target = (int)ctx.ins.offset;
  ctx.memory(o[0], 0);
  ctx.ins.elemBytes = (uint8_t)o[2].imm;
  size_t k = 3;
  if (ctx.raw.has("L2::cache_hint") && o.size() > 3) {
    if (o.size() == 5) {
      ctx.ins.src[2] = ctx.source(o[3], T_B32);
    }
    k = o.size();
  }
  if (k < o.size()) {
    if (o[k].kind == Operand::REG && o[k].ty == T_PRED) {
      ctx.ins.src[3] = ctx.source(o[k], T_PRED);
      ctx.ins.negate[3] = o[k].neg;
    } else
      ctx.ins.src[2] = ctx.source(o[k], T_B32);
  }
  if (ctx.raw.has("cg") && ctx.ins.elemBytes != 16)
    ctx.fail("cp.async.cg needs 16 bytes");
  ctx.ins.exec = execCpAsync;
  return true;
}
} // namespace

void registerCpAsync(std::unordered_map<std::string, Decoder>& t) {
  t["cp"] = decodeCp;
}

} // namespace ptx
