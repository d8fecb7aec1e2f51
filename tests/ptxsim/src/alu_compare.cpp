// SPDX-License-Identifier: Apache-2.0
// alu_compare.cpp - comparison, selection and predicate logic: setp, set, selp, slct (PTX
// ISA 9.7.6, 9.7.7).
#include "alu.h"

namespace ptx {
namespace {
enum Cmp : uint8_t { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANC };
template <class T> inline bool cmp(uint8_t c, T a, T b) {
  bool un = false;
  if constexpr (std::is_floating_point<T>::value)
    un = std::isnan(a) || std::isnan(b);
  switch (c) {
    case EQ: return !un && a == b;
    case NE: return !un && a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case EQU: return un || a == b;
    case NEU: return un || a != b;
    case LTU: return un || a < b;
    case LEU: return un || a <= b;
    case GTU: return un || a > b;
    case GEU: return un || a >= b;
    case NUM: return !un;
    default: return un;
  }
}
int cmpCode(const std::string& s, Type t) {
  static const char* n[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                            "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  for (int i = 0; i < 14; i++)
    if (s == n[i])
      return i;
  if (s == "lo")
    return LT;
  if (s == "ls")
    return LE;
  if (s == "hi")
    return GT;
  if (s == "hs")
    return GE;
  (void)t;
  return -1;
}
// combine with s[2]: sub2 0 none, 1 and, 2 or, 3 xor
void storeCmp(Warp& warp, const Instr& in, uint32_t r, uint32_t mask) {
  uint32_t c = in.variant2 ? warp.pred(in.src[2], in.negate[2]) : 0, p = r, q = ~r;
  if (in.variant2 == 1) {
    p &= c;
    q &= c;
  } else if (in.variant2 == 2) {
    p |= c;
    q |= c;
  } else if (in.variant2 == 3) {
    p ^= c;
    q ^= c;
  }
  warp.setPred(in.dst[0], p, mask);
  if (in.dst[1] != NOCOL)
    warp.setPred(in.dst[1], q, mask);
}
template <class T> uint32_t cmpMask(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  uint32_t r = 0;
  forEachLane(mask, [&](int lane) {
    T x = get<T>(a[lane]), y = get<T>(b[lane]);
    if constexpr (std::is_same<T, float>::value)
      if (in.ftz) {
        x = ftz(x);
        y = ftz(y);
      }
    r |= (uint32_t)cmp<T>(in.variant, x, y) << lane;
  });
  return r;
}
template <class T> void execSetp(Warp& warp, const Instr& in, uint32_t mask) {
  storeCmp(warp, in, cmpMask<T>(warp, in, mask), mask);
}
void execSetpHalf(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  bool bf = in.type == T_BF16 || in.type == T_BF16X2,
       two = in.type == T_F16X2 || in.type == T_BF16X2;
  uint32_t r = 0, r2 = 0;
  forEachLane(mask, [&](int lane) {
    r |= (uint32_t)cmp<double>(in.variant, halfToDouble((uint16_t)a[lane], bf),
                               halfToDouble((uint16_t)b[lane], bf))
         << lane;
    if (two)
      r2 |= (uint32_t)cmp<double>(in.variant, halfToDouble((uint16_t)(a[lane] >> 16), bf),
                                  halfToDouble((uint16_t)(b[lane] >> 16), bf))
            << lane;
  });
  if (!two) {
    storeCmp(warp, in, r, mask);
    return;
  }
  uint32_t c = in.variant2 ? warp.pred(in.src[2], in.negate[2]) : 0;
  auto comb = [&](uint32_t x) {
    return in.variant2 == 1 ? x & c : in.variant2 == 2 ? x | c : in.variant2 == 3 ? x ^ c : x;
  };
  warp.setPred(in.dst[0], comb(r), mask);
  if (in.dst[1] != NOCOL)
    warp.setPred(in.dst[1], comb(r2), mask);
}
template <class T> void execSet(Warp& warp, const Instr& in, uint32_t mask) { // set.cmp.dtype.stype
  uint32_t r = cmpMask<T>(warp, in, mask);
  if (in.variant2) {
    uint32_t c = warp.pred(in.src[2], in.negate[2]);
    r = in.variant2 == 1 ? r & c : in.variant2 == 2 ? r | c : r ^ c;
  }
  uint64_t* d = warp.reg(in.dst[0]);
  forEachLane(mask, [&](int lane) {
    bool v = r >> lane & 1;
    d[lane] = in.type == T_F32 ? put<float>(v ? 1.f : 0.f) : v ? 0xffffffffu : 0;
  });
}
void execSetHalf(Warp& warp, const Instr& in, uint32_t mask) { // set.cmp.{f16x2,u32,...}.f16x2
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  bool bf = in.type2 == T_BF16 || in.type2 == T_BF16X2;
  int n = (in.type2 == T_F16X2 || in.type2 == T_BF16X2) ? 2 : 1;
  forEachLane(mask, [&](int lane) {
    uint64_t r = 0;
    for (int k = 0; k < n; k++) {
      bool v = cmp<double>(in.variant, halfToDouble((uint16_t)(a[lane] >> (16 * k)), bf),
                           halfToDouble((uint16_t)(b[lane] >> (16 * k)), bf));
      uint64_t one = isFloatType((Type)in.type)
                         ? (in.type == T_F32                             ? 0x3f800000
                            : (in.type == T_BF16 || in.type == T_BF16X2) ? 0x3f80
                                                                         : 0x3c00)
                         : (n == 2                         ? 0xffff
                            : typeSize((Type)in.type) == 2 ? 0xffff
                                                           : 0xffffffff);
      if (v)
        r |= one << (16 * k);
    }
    d[lane] = r;
  });
}
void execSelp(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  uint32_t p = warp.pred(in.src[2], in.negate[2]);
  forEachLane(mask, [&](int lane) { d[lane] = p >> lane & 1 ? a[lane] : b[lane]; });
}
void execSlct(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    bool ge = in.type2 == T_F32 ? get<float>(c[lane]) >= 0 : (int32_t)c[lane] >= 0;
    d[lane] = ge ? a[lane] : b[lane];
  });
}
bool decodeSetp(DecodeCtx& ctx) {
  bool isSet = ctx.raw.op == "set";
  Type t = ctx.type(isSet ? 1 : 0);
  ctx.ins.type = isSet ? ctx.type(0) : t;
  ctx.ins.type2 = t;
  int k = cmpCode(ctx.raw.mods[0], t);
  if (k < 0)
    return false;
  ctx.ins.variant = (uint8_t)k;
  if (ctx.raw.mods.size() > 1)
    ctx.ins.variant2 = ctx.raw.mods[1] == "and"   ? 1
                       : ctx.raw.mods[1] == "or"  ? 2
                       : ctx.raw.mods[1] == "xor" ? 3
                                                  : 0;
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  if (ctx.raw.operands[0].second)
    ctx.ins.dst[1] = ctx.dest(*ctx.raw.operands[0].second);
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], t);
  ctx.ins.src[1] = ctx.source(ctx.raw.operands[2], t);
  if (ctx.ins.variant2) {
    ctx.ins.src[2] = ctx.source(ctx.raw.operands[3], T_PRED);
    ctx.ins.negate[2] = ctx.raw.operands[3].neg;
  }
  if (t == T_F16 || t == T_BF16 || t == T_F16X2 || t == T_BF16X2) {
    ctx.ins.exec = isSet ? execSetHalf : execSetpHalf;
    return true;
  }
  if (t == T_F32) {
    ctx.ins.exec = isSet ? (Handler)execSet<float> : execSetp<float>;
    return true;
  }
  if (t == T_F64) {
    ctx.ins.exec = isSet ? (Handler)execSet<double> : execSetp<double>;
    return true;
  }
  return byIntType(ctx, t, [&](auto x) -> Handler {
    return isSet ? execSet<decltype(x)> : execSetp<decltype(x)>;
  });
}
bool decodeSelp(DecodeCtx& ctx) {
  Type t = ctx.type();
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], t);
  ctx.ins.src[1] = ctx.source(ctx.raw.operands[2], t);
  ctx.ins.src[2] = ctx.source(ctx.raw.operands[3], T_PRED);
  ctx.ins.negate[2] = ctx.raw.operands[3].neg;
  ctx.ins.exec = execSelp;
  return true;
}
bool decodeSlct(DecodeCtx& ctx) {
  Type t = ctx.type();
  ctx.ins.type2 = ctx.type(1);
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], t);
  ctx.ins.src[1] = ctx.source(ctx.raw.operands[2], t);
  ctx.ins.src[2] = ctx.source(ctx.raw.operands[3], (Type)ctx.ins.type2);
  ctx.ins.exec = execSlct;
  return true;
}
} // namespace

void execPredLogic(Warp& warp, const Instr& in, uint32_t mask) {
  uint32_t a = warp.pred(in.src[0], in.negate[0]),
           b = in.src[1] == NOCOL ? 0 : warp.pred(in.src[1], in.negate[1]), r = 0;
  switch (in.variant) {
    case P_AND: r = a & b; break;
    case P_OR: r = a | b; break;
    case P_XOR: r = a ^ b; break;
    case P_NOT: r = ~a; break;
    default: r = a;
  }
  warp.setPred(in.dst[0], r, mask);
}
void registerCompare(std::unordered_map<std::string, Decoder>& t) {
  t["setp"] = t["set"] = decodeSetp;
  t["selp"] = decodeSelp;
  t["slct"] = decodeSlct;
}

} // namespace ptx
