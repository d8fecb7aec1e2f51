// SPDX-License-Identifier: Apache-2.0
// load_store.cpp - ld, st, address conversion, fences, and hints that do nothing here (PTX
// ISA 9.7.9, 9.7.13).
#include "sim.h"
#include <cstring>

namespace ptx {
namespace {

void execLd(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* base = warp.src(in.src[0]);
  int es = in.elemBytes, n = es * in.vecLen;
  bool sg = isSignedType((Type)in.type);
  if (Options::get().counters && in.space != SP_PARAM && in.space != SP_CONST)
    count(warp, in, mask, n, base);
  uint64_t* D[8];
  uint64_t found = 0;
  bool fixed = true;
  for (int k = 0; k < in.vecLen; k++)
    D[k] = warp.reg(in.dstVec[k]);
  forEachLane(mask, [&](int lane) {
    uint32_t so;
    uint64_t a = base[lane] + in.offset;
    char* p = warp.resolve(in, a, n, lane, false, in.space, &so);
    if (so != ~0u) {
      if (in.strong)
        warp.acquire(so, true);
      warp.checkShared(in, so, n, lane, false, in.strong);
    } else if (warp.lastRange && p == warp.lastRange->sim(a)) {
      if (in.strong)
        warp.acquire(a, false);
      warp.checkGlobal(in, a, n, lane, false, in.strong);
    }
    for (int k = 0; k < in.vecLen; k++)
      D[k][lane] = loadBits(p + k * es, es, sg) & in.dstMask;
    if (in.strong) {
      found = pollHash(found, a, p, n);
      fixed &= so != ~0u || (warp.lastRange && warp.lastRange->fixed());
    }
  });
  if (in.strong)
    warp.polled(in, found, fixed);
}
void execSt(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* base = warp.src(in.src[0]);
  int es = in.elemBytes, n = es * in.vecLen;
  if (Options::get().counters && in.space != SP_PARAM)
    count(warp, in, mask, n, base);
  warp.launch->progress++;
  const uint64_t* S[8];
  for (int k = 0; k < in.vecLen; k++)
    S[k] = warp.src(in.srcVec[k]);
  forEachLane(mask, [&](int lane) {
    uint32_t so;
    uint64_t a = base[lane] + in.offset;
    char* p = warp.resolve(in, a, n, lane, true, in.space, &so);
    uint8_t buf[64];
    for (int k = 0; k < in.vecLen; k++)
      memcpy(buf + k * es, &S[k][lane], es);
    if (so != ~0u) {
      warp.checkShared(in, so, n, lane, true, in.strong, buf);
      if (in.strong)
        warp.release(so, true, in.variant & 1);
    } else if (warp.lastRange && p == warp.lastRange->sim(a)) {
      warp.checkGlobal(in, a, n, lane, true, in.strong, buf);
      if (in.strong)
        warp.release(a, false, in.variant & 1);
    }
    memcpy(p, buf, n);
  });
}
void execCvta(Warp& warp, const Instr& in, uint32_t mask) { // sub: 1 = to
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  uint64_t win = in.space == SP_SHARED  ? WIN_SHARED
                 : in.space == SP_LOCAL ? WIN_LOCAL
                 : in.space == SP_PARAM ? WIN_PARAM
                                        : 0;
  forEachLane(mask, [&](int lane) {
    if (!win) {
      d[lane] = a[lane];
      return;
    }
    d[lane] = in.variant ? a[lane] & ~WIN_MASK
                         : (a[lane] + (in.variant2 == 1 ? warp.f->localBase : 0)) | win;
  });
}
void execIsspacep(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* a = warp.src(in.src[0]);
  uint32_t r = 0;
  forEachLane(mask, [&](int lane) {
    uint64_t k = a[lane] & WIN_MASK;
    bool v = in.space == SP_SHARED   ? k == WIN_SHARED
             : in.space == SP_LOCAL  ? k == WIN_LOCAL
             : in.space == SP_PARAM  ? k == WIN_PARAM
             : in.space == SP_GLOBAL ? k == 0 && DevMem::get().find(a[lane])
                                     : false;
    r |= (uint32_t)v << lane;
  });
  warp.setPred(in.dst[0], r, mask);
}
// variant 1: fence.proxy.async; everything ordered before it may now be read through the async
// proxy
void execFence(Warp& warp, const Instr& in, uint32_t) {
  if (in.variant) {
    warp.proxyClock = warp.clock;
    warp.tick(); // later stores are not covered
    return;
  }
  warp.fenced = true;
  warp.unfencedStore = false;
}

bool strongOf(const RawInstr& r) {
  return r.has("volatile") || r.has("relaxed") || r.has("acquire") || r.has("release") ||
         r.has("mmio");
}
bool decodeLdSt(DecodeCtx& ctx) {
  Type t = ctx.type();
  bool ld = ctx.raw.op != "st";
  int mi = ld ? 1 : 0;
  if (t == T_NONE || t == T_B128 || clusterShared(ctx.raw) || ctx.raw.has("async"))
    return false;
  ctx.ins.space = spaceOf(ctx.raw);
  ctx.ins.type = t;
  ctx.ins.elemBytes = typeSize(t);
  ctx.ins.vecLen = vecOf(ctx.raw);
  ctx.ins.strong = strongOf(ctx.raw);
  ctx.ins.variant = ctx.raw.has("release");
  if (ctx.ins.space == SP_CONST)
    ctx.ins.space = SP_GLOBAL;
  ctx.memory(ctx.raw.operands[mi]);
  if (ld) {
    ctx.ins.dstVec = ctx.dests(ctx.raw.operands[0]);
    if ((int)ctx.ins.dstVec.size() != ctx.ins.vecLen)
      return false;
    const Operand& d =
        ctx.raw.operands[0].kind == Operand::VEC ? ctx.raw.operands[0].v[0] : ctx.raw.operands[0];
    ctx.ins.dstMask = d.kind == Operand::REG ? sizeMask(typeSize(d.ty)) : ~0ull;
    ctx.ins.exec = execLd;
    if (ctx.ins.strong)
      ctx.ins.control = CTL_POLL;
  } else {
    ctx.ins.srcVec = ctx.sources(ctx.raw.operands[1], t);
    if ((int)ctx.ins.srcVec.size() != ctx.ins.vecLen)
      return false;
    ctx.ins.exec = execSt;
  }
  return true;
}
bool decodeCvta(DecodeCtx& ctx) {
  ctx.ins.space = spaceOf(ctx.raw);
  ctx.ins.variant = ctx.raw.has("to");
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  const Operand& a = ctx.raw.operands[1];
  if (a.kind == Operand::SYM && a.var && (a.var->space == SP_LOCAL || a.var->space == SP_PARAM)) {
    ctx.ins.src[0] =
        ctx.constant(a.var->offset + a.off +
                     (a.var->space == SP_PARAM && !a.var->isEntryParam ? 1ull << 40 : 0));
    ctx.ins.variant2 = a.var->space == SP_LOCAL;
  } else
    ctx.ins.src[0] = ctx.source(a, T_U64);
  ctx.ins.exec = execCvta;
  return true;
}
bool decodeIsspacep(DecodeCtx& ctx) {
  ctx.ins.space = spaceOf(ctx.raw);
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], T_U64);
  ctx.ins.exec = execIsspacep;
  return true;
}
bool decodeFence(DecodeCtx& ctx) {
  ctx.ins.variant =
      ctx.raw.has("proxy") && (ctx.raw.has("async") || ctx.raw.has("async::shared::cta") ||
                               ctx.raw.has("async::shared::{cta,cluster}"));
  ctx.ins.exec = execFence;
  return true;
}
bool decodeNop(DecodeCtx& ctx) {
  if (ctx.raw.op == "createpolicy") {
    ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  }
  ctx.ins.exec = execNop;
  return true;
}
} // namespace

// ------------------------------------------------------------------ decoders
uint64_t pollHash(uint64_t found, uint64_t address, const char* p, int n) {
  for (int i = 0; i < n; i++)
    found = (found ^ (uint8_t)p[i]) * 0x100000001b3ull;
  return (found ^ address) * 0x9e3779b97f4a7c15ull;
}
uint64_t loadBits(const char* p, int n, bool sg) {
  uint64_t v = 0;
  memcpy(&v, p, n);
  if (!sg || n == 8)
    return v;
  int unused = 64 - 8 * n;
  return (uint64_t)((int64_t)(v << unused) >> unused);
}
uint8_t spaceOf(const RawInstr& r) {
  for (auto& s : r.mods) {
    if (s == "global")
      return SP_GLOBAL;
    if (s == "shared" || s == "shared::cta")
      return SP_SHARED;
    if (s == "local")
      return SP_LOCAL;
    if (s == "param" || s == "param::entry" || s == "param::func")
      return SP_PARAM;
    if (s == "const")
      return SP_CONST;
  }
  return SP_GENERIC;
}
bool clusterShared(const RawInstr& r) {
  return r.has("shared::cluster");
}
int vecOf(const RawInstr& r) {
  return r.has("v2") ? 2 : r.has("v4") ? 4 : r.has("v8") ? 8 : 1;
}
void registerMemory(std::unordered_map<std::string, Decoder>& t) {
  t["ld"] = t["ldu"] = t["st"] = decodeLdSt;
  t["cvta"] = decodeCvta;
  t["isspacep"] = decodeIsspacep;
  t["membar"] = t["fence"] = decodeFence;
  for (auto n : {"prefetch", "prefetchu", "createpolicy", "griddepcontrol", "applypriority",
                 "discard", "setmaxnreg", "pmevent"})
    t[n] = decodeNop;
}

} // namespace ptx
