// SPDX-License-Identifier: Apache-2.0
// warp_ops.cpp - warp collectives on registers: shuffle, vote, match, redux, elect, and the
// decoding of barriers (PTX ISA 9.7.9 and 9.7.13). Handlers here run once, with the mask of all
// lanes taking part (Warp::collective).
#include "sim.h"
#include <cstring>

namespace ptx {
namespace {
void execShfl(Warp& warp, const Instr& in, uint32_t mask) { // sub: 0 up 1 down 2 bfly 3 idx
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  uint64_t v[32], r[32];
  uint32_t p = 0;
  memcpy(v, a, sizeof v);
  forEachLane(mask, [&](int lane) {
    int bb = (int)(b[lane] & 31), clamp = (int)(c[lane] & 31), seg = (int)(c[lane] >> 8 & 31);
    int maxL = (lane & seg) | (clamp & ~seg), minL = lane & seg, j;
    bool ok;
    switch (in.variant) {
      case 0:
        j = lane - bb;
        ok = j >= maxL;
        break;
      case 1:
        j = lane + bb;
        ok = j <= maxL;
        break;
      case 2:
        j = lane ^ bb;
        ok = j <= maxL;
        break;
      default: j = minL | (bb & ~seg); ok = j <= maxL;
    }
    if (!ok)
      j = lane;
    p |= (uint32_t)ok << lane;
    r[lane] = (mask >> (j & 31) & 1)
                  ? v[j & 31]
                  : 0xffffffffu; // source lane not taking part: undefined, poisoned
  });
  forEachLane(mask, [&](int lane) { d[lane] = r[lane]; });
  if (in.dst[1] != NOCOL)
    warp.setPred(in.dst[1], p, mask);
}
void execVote(Warp& warp, const Instr& in, uint32_t mask) { // sub: 0 all 1 any 2 uni 3 ballot
  uint32_t p = warp.pred(in.src[0], in.negate[0]) & mask;
  if (in.variant == 3) {
    uint64_t* d = warp.reg(in.dst[0]);
    forEachLane(mask, [&](int lane) { d[lane] = p; });
    return;
  }
  bool r = in.variant == 0 ? p == mask : in.variant == 1 ? p != 0 : p == mask || p == 0;
  warp.setPred(in.dst[0], r ? ~0u : 0, mask);
}
void execMatch(Warp& warp, const Instr& in, uint32_t mask) { // sub: 0 any 1 all
  uint64_t* d = warp.reg(in.dst[0]);
  uint64_t v[32];
  memcpy(v, warp.src(in.src[0]), sizeof v);
  uint64_t k = sizeMask(in.elemBytes);
  uint32_t r[32];
  bool all = true;
  int first = __builtin_ctz(mask);
  forEachLane(mask, [&](int lane) {
    r[lane] = 0;
    forEachLane(mask, [&](int j) {
      if ((v[j] & k) == (v[lane] & k))
        r[lane] |= 1u << j;
    });
    if ((v[lane] & k) != (v[first] & k))
      all = false;
  });
  forEachLane(mask, [&](int lane) { d[lane] = in.variant ? (all ? mask : 0) : r[lane]; });
  if (in.dst[1] != NOCOL)
    warp.setPred(in.dst[1], all ? ~0u : 0, mask);
}
void execRedux(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  uint32_t r = 0;
  bool first = true;
  forEachLane(mask, [&](int lane) {
    uint32_t x = (uint32_t)a[lane];
    if (first) {
      r = x;
      first = false;
      return;
    }
    bool sg = in.type == T_S32;
    switch (in.variant) {
      case 0: r += x; break;
      case 1: r = sg ? (uint32_t)std::min((int32_t)r, (int32_t)x) : std::min(r, x); break;
      case 2: r = sg ? (uint32_t)std::max((int32_t)r, (int32_t)x) : std::max(r, x); break;
      case 3: r &= x; break;
      case 4: r |= x; break;
      case 5: r ^= x; break;
    }
  });
  forEachLane(mask, [&](int lane) { d[lane] = r; });
}
void execElect(Warp& warp, const Instr& in, uint32_t mask) {
  int lead = __builtin_ctz(mask);
  if (in.dst[0] != NOCOL) {
    uint64_t* d = warp.reg(in.dst[0]);
    forEachLane(mask, [&](int lane) { d[lane] = lead; });
  }
  warp.setPred(in.dst[1], 1u << lead, mask);
}
void execWarpSync(Warp& warp, const Instr&, uint32_t) {
  warp.tick();
}
void execActive(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  forEachLane(mask, [&](int lane) { d[lane] = warp.mask; });
}
void execTrap(Warp& warp, const Instr& in, uint32_t mask) {
  warp.error(in, __builtin_ctz(mask), "trap executed", 719);
}

// ------------------------------------------------------------------ decoders
bool decodeShfl(DecodeCtx& ctx) {
  if (!ctx.raw.has("sync"))
    return false;
  const auto& o = ctx.raw.operands;
  ctx.ins.control = CTL_COLL;
  ctx.ins.variant = ctx.raw.has("up") ? 0 : ctx.raw.has("down") ? 1 : ctx.raw.has("bfly") ? 2 : 3;
  ctx.ins.dst[0] = ctx.dest(o[0]);
  if (o[0].second)
    ctx.ins.dst[1] = ctx.dest(*o[0].second);
  for (int k = 0; k < 3; k++)
    ctx.ins.src[k] = ctx.source(o[k + 1], T_B32);
  ctx.ins.memberMask = ctx.source(o[4], T_B32);
  ctx.ins.exec = execShfl;
  return true;
}
bool decodeVote(DecodeCtx& ctx) {
  if (!ctx.raw.has("sync"))
    return false;
  const auto& o = ctx.raw.operands;
  ctx.ins.control = CTL_COLL;
  ctx.ins.variant = ctx.raw.has("all") ? 0 : ctx.raw.has("any") ? 1 : ctx.raw.has("uni") ? 2 : 3;
  ctx.ins.dst[0] = ctx.dest(o[0]);
  ctx.ins.src[0] = ctx.source(o[1], T_PRED);
  ctx.ins.negate[0] = o[1].neg;
  ctx.ins.memberMask = ctx.source(o[2], T_B32);
  ctx.ins.exec = execVote;
  return true;
}
bool decodeMatch(DecodeCtx& ctx) {
  const auto& o = ctx.raw.operands;
  ctx.ins.control = CTL_COLL;
  ctx.ins.variant = ctx.raw.has("all");
  ctx.ins.elemBytes = typeSize(ctx.type());
  ctx.ins.dst[0] = ctx.dest(o[0]);
  if (o[0].second)
    ctx.ins.dst[1] = ctx.dest(*o[0].second);
  ctx.ins.src[0] = ctx.source(o[1], ctx.type());
  ctx.ins.memberMask = ctx.source(o[2], T_B32);
  ctx.ins.exec = execMatch;
  return true;
}
bool decodeRedux(DecodeCtx& ctx) {
  const auto& o = ctx.raw.operands;
  ctx.ins.control = CTL_COLL;
  const char* n[] = {"add", "min", "max", "and", "or", "xor"};
  for (int k = 0; k < 6; k++)
    if (ctx.raw.has(n[k]))
      ctx.ins.variant = k;
  ctx.ins.type = ctx.type();
  if (ctx.ins.type == T_F32)
    return false;
  ctx.ins.dst[0] = ctx.dest(o[0]);
  ctx.ins.src[0] = ctx.source(o[1], T_B32);
  ctx.ins.memberMask = ctx.source(o[2], T_B32);
  ctx.ins.exec = execRedux;
  return true;
}
bool decodeElect(DecodeCtx& ctx) {
  const auto& o = ctx.raw.operands;
  ctx.ins.control = CTL_COLL;
  ctx.ins.dst[0] = o[0].kind == Operand::SINK ? NOCOL : ctx.dest(o[0]);
  if (!o[0].second)
    return false;
  ctx.ins.dst[1] = ctx.dest(*o[0].second);
  ctx.ins.memberMask = ctx.source(o[1], T_B32);
  ctx.ins.exec = execElect;
  return true;
}
bool decodeActive(DecodeCtx& ctx) {
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.exec = execActive;
  return true;
}
bool decodeTrap(DecodeCtx& ctx) {
  ctx.ins.exec = execTrap;
  return true;
}
bool decodeSleep(DecodeCtx& ctx) {
  ctx.ins.control = CTL_YIELD;
  return true;
}
bool decodeBar(DecodeCtx& ctx) {
  const auto& o = ctx.raw.operands;
  if (ctx.raw.has("warp")) {
    ctx.ins.control = CTL_COLL;
    ctx.ins.memberMask = ctx.source(o[0], T_B32);
    ctx.ins.exec = execWarpSync;
    return true;
  }
  if (ctx.raw.has("cluster"))
    return false;
  ctx.ins.control = CTL_BAR;
  ctx.ins.variant = ctx.raw.has("arrive") ? 1 : ctx.raw.has("red") ? 2 : 0;
  size_t k = 0;
  if (ctx.ins.variant == 2) {
    ctx.ins.dst[0] = ctx.dest(o[k++]);
    ctx.ins.variant2 = ctx.raw.has("popc") ? 0 : ctx.raw.has("and") ? 1 : 2;
  }
  ctx.ins.src[0] = ctx.source(o[k++], T_B32);
  size_t last = ctx.ins.variant == 2 ? o.size() - 1 : o.size();
  if (k < last)
    ctx.ins.src[1] = ctx.source(o[k], T_B32);
  if (ctx.ins.variant == 2) {
    ctx.ins.src[2] = ctx.source(o.back(), T_PRED);
    ctx.ins.negate[2] = o.back().neg;
  }
  return true;
}
} // namespace

void registerWarp(std::unordered_map<std::string, Decoder>& t) {
  t["shfl"] = decodeShfl;
  t["vote"] = decodeVote;
  t["match"] = decodeMatch;
  t["redux"] = decodeRedux;
  t["elect"] = decodeElect;
  t["activemask"] = decodeActive;
  t["trap"] = t["brkpt"] = decodeTrap;
  t["nanosleep"] = decodeSleep;
  t["bar"] = t["barrier"] = decodeBar;
}

} // namespace ptx
