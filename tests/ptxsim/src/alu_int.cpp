// SPDX-License-Identifier: Apache-2.0
// alu_int.cpp - integer arithmetic, logic, shifts, carry chains and bit manipulation (PTX
// ISA 9.7.1, 9.7.2, 9.7.8). decodeArith is the entry for add, sub, mul, ... of every type;
// floating-point types go on to alu_float.cpp.
#include "alu.h"
#include <cstring>

namespace ptx {
namespace {
template <class T> void execAdd(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)((U<T>)a + (U<T>)b); });
}
template <class T> void execSub(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)((U<T>)a - (U<T>)b); });
}
template <class T> T mullo(T a, T b) {
  return (T)((uint64_t)a * (uint64_t)b);
}
template <class T> void execMulLo(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)(mullo(a, b)); });
}
template <class T> void execMin(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)(a < b ? a : b); });
}
template <class T> void execMax(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)(a > b ? a : b); });
}
template <class T> void execAnd(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)(a & b); });
}
template <class T> void execOr(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)(a | b); });
}
template <class T> void execXor(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)(a ^ b); });
}
template <class T> void execDiv(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) {
    return (T)(b == 0                                     ? (T)-1
               : (std::is_signed<T>::value && b == (T)-1) ? (T)(0 - (U<T>)a)
                                                          : (T)(a / b));
  });
}
template <class T> void execRem(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) {
    return (T)(b == 0 ? a : (std::is_signed<T>::value && b == (T)-1) ? (T)0 : (T)(a % b));
  });
}
template <class T> T mulhi(T a, T b) {
  if (sizeof(T) == 8)
    return std::is_signed<T>::value ? (T)(((__int128)a * (__int128)b) >> 64)
                                    : (T)(((unsigned __int128)(uint64_t)a * (uint64_t)b) >> 64);
  return std::is_signed<T>::value ? (T)(((int64_t)a * (int64_t)b) >> (8 * sizeof(T)))
                                  : (T)(((uint64_t)a * (uint64_t)b) >> (8 * sizeof(T)));
}
template <class T> void execMulHi(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return (T)(mulhi(a, b)); });
}
// add.sat / sub.sat exist for s32 only
template <class T> void execAddSat(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) {
    return (T)std::clamp<int64_t>((int64_t)a + (int64_t)b, INT32_MIN, INT32_MAX);
  });
}
// add.sat / sub.sat exist for s32 only
template <class T> void execSubSat(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) {
    return (T)std::clamp<int64_t>((int64_t)a - (int64_t)b, INT32_MIN, INT32_MAX);
  });
}

template <class T> void execShl(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  forEachLane(mask, [&](int lane) {
    uint32_t n = (uint32_t)b[lane];
    d[lane] = n >= 8 * sizeof(T) ? 0 : put<T>((T)((U<T>)get<T>(a[lane]) << n));
  });
}
template <class T> void execShr(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  constexpr uint32_t W = 8 * sizeof(T);
  forEachLane(mask, [&](int lane) {
    uint32_t n = (uint32_t)b[lane];
    T x = get<T>(a[lane]);
    if (n >= W)
      d[lane] = put<T>(std::is_signed<T>::value && x < 0 ? (T)-1 : (T)0);
    else
      d[lane] = put<T>((T)(x >> n));
  });
}
template <class T, class W2> void execMulWide(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  forEachLane(mask,
              [&](int lane) { d[lane] = put<W2>((W2)get<T>(a[lane]) * (W2)get<T>(b[lane])); });
}
template <class T, class W2> void execMadWide(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    d[lane] = put<W2>(
        (W2)(U<W2>)((U<W2>)((W2)get<T>(a[lane]) * (W2)get<T>(b[lane])) + (U<W2>)get<W2>(c[lane])));
  });
}
template <class T> void execMadLo(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) { d[lane] = put<T>((T)(a[lane] * b[lane] + c[lane])); });
}
template <class T> void execMadHi(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    d[lane] = put<T>((T)((U<T>)mulhi(get<T>(a[lane]), get<T>(b[lane])) + (U<T>)get<T>(c[lane])));
  });
}
// carry chain: sub 0 add, 1 sub, 2 mad.lo, 3 mad.hi; vec&1 = carry in, vec&2 = carry out
template <class T> void execCarry(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  const uint64_t* c = in.variant >= 2 ? warp.src(in.src[2]) : nullptr;
  forEachLane(mask, [&](int lane) {
    unsigned __int128 x = get<U<T>>(a[lane]), y = get<U<T>>(b[lane]), r;
    uint32_t ci = (in.vecLen & 1) ? (warp.cc >> lane & 1) : 0, co;
    if (in.variant >= 2) {
      x = in.variant == 2 ? (U<T>)mullo(get<T>(a[lane]), get<T>(b[lane]))
                          : (U<T>)mulhi(get<T>(a[lane]), get<T>(b[lane]));
      y = get<U<T>>(c[lane]);
    }
    if (in.variant == 1) {
      r = x - y - ci;
      co = x < y + ci;
    } else {
      r = x + y + ci;
      co = (uint32_t)(r >> (8 * sizeof(T))) & 1;
    }
    d[lane] = put<U<T>>((U<T>)r);
    if (in.vecLen & 2)
      warp.cc = (warp.cc & ~(1u << lane)) | co << lane;
  });
}
void execPopc32(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    uint32_t a = get<uint32_t>(x);
    return __builtin_popcount(a);
  });
}
void execPopc64(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    uint64_t a = get<uint64_t>(x);
    return __builtin_popcountll(a);
  });
}
void execClz32(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    uint32_t a = get<uint32_t>(x);
    return a ? __builtin_clz(a) : 32;
  });
}
void execClz64(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    uint64_t a = get<uint64_t>(x);
    return a ? __builtin_clzll(a) : 64;
  });
}
uint32_t brev(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++)
    r |= (x >> i & 1) << (31 - i);
  return r;
}
void execBrev32(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    uint32_t a = get<uint32_t>(x);
    return brev(a);
  });
}
void execBrev64(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    uint64_t a = get<uint64_t>(x);
    return ((uint64_t)brev((uint32_t)a) << 32) | brev((uint32_t)(a >> 32));
  });
}
template <class T> void execNot(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    U<T> a = get<U<T>>(x);
    return put<U<T>>((U<T>)~a);
  });
}
template <class T> void execCnot(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    U<T> a = get<U<T>>(x);
    return put<U<T>>((U<T>)(a == 0));
  });
}
template <class T> void execNeg(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    U<T> a = get<U<T>>(x);
    return put<U<T>>((U<T>)(0 - a));
  });
}
template <class T> void execAbs(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [](uint64_t x) -> uint64_t {
    T a = get<T>(x);
    return put<T>(a < 0 ? (T)(0 - (U<T>)a) : a);
  });
}
void execBfind(Warp& warp, const Instr& in, uint32_t mask) {
  unaryOp(warp, in, mask, [&](uint64_t x) -> uint64_t {
    if (in.type == T_S32 && (int32_t)x < 0)
      x = (uint32_t)~x;
    if (in.type == T_S64 && (int64_t)x < 0)
      x = ~x;
    if (!x)
      return 0xffffffffu;
    int p = 63 - __builtin_clzll(x);
    if (in.variant)
      p = (typeSize((Type)in.type) == 8 ? 63 : 31) - p;
    return (uint32_t)p;
  });
}
void execFns(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    uint32_t bits = (uint32_t)a[lane], base = (uint32_t)b[lane];
    int off = (int)c[lane];
    uint32_t r = 0xffffffff;
    if (off == 0) {
      if (bits >> base & 1)
        r = base;
    } else {
      int n = abs(off), pos = (int)base, inc = off > 0 ? 1 : -1;
      while (pos >= 0 && pos < 32) {
        if (bits >> pos & 1)
          if (--n == 0) {
            r = pos;
            break;
          }
        pos += inc;
      }
    }
    d[lane] = r;
  });
}
template <class T> void execBfe(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  constexpr uint32_t W = 8 * sizeof(T);
  forEachLane(mask, [&](int lane) {
    U<T> x = get<U<T>>(a[lane]);
    uint32_t pos = b[lane] & 255, len = c[lane] & 255;
    bool sb = std::is_signed<T>::value && len ? (x >> std::min(pos + len - 1, W - 1)) & 1 : false;
    U<T> r = pos >= W ? 0 : (U<T>)(x >> pos);
    uint32_t have = pos >= W ? 0 : std::min(len, W - pos);
    if (have < W)
      r &= ((U<T>)1 << have) - 1;
    if (sb && have < W)
      r |= (U<T>)~(((U<T>)1 << have) - 1);
    d[lane] = put<U<T>>(r);
  });
}
template <class T> void execBfi(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]),
                 *e = warp.src(in.src[3]);
  constexpr uint32_t W = 8 * sizeof(T);
  forEachLane(mask, [&](int lane) {
    T x = get<T>(a[lane]), y = get<T>(b[lane]);
    uint32_t pos = c[lane] & 255, len = e[lane] & 255;
    if (len && pos < W) {
      len = std::min(len, W - pos);
      T mk = (len >= W ? (T) ~(T)0 : (((T)1 << len) - 1)) << pos;
      y = (y & ~mk) | ((T)(x << pos) & mk);
    }
    d[lane] = put<T>(y);
  });
}
void execBmsk(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<uint32_t>(warp, in, mask, [&](uint32_t a, uint32_t b) {
    if (!in.variant) {
      a &= 31;
      b &= 31;
    }
    if (a >= 32 || !b)
      return 0u;
    return (b >= 32 ? ~0u : (1u << b) - 1) << a;
  });
}
void execSzext(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<uint32_t>(warp, in, mask, [&](uint32_t a, uint32_t b) -> uint32_t {
    if (!in.variant)
      b &= 31;
    if (b >= 32)
      return a;
    if (!b)
      return 0;
    uint32_t x = a << (32 - b);
    return in.type == T_S32 ? (uint32_t)((int32_t)x >> (32 - b)) : x >> (32 - b);
  });
}
void execPrmt(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    uint64_t v = (uint32_t)a[lane] | (b[lane] << 32);
    uint32_t s = (uint32_t)c[lane], r = 0;
    uint32_t k = s & 3;
    for (int i = 0; i < 4; i++) {
      uint32_t sel;
      switch (in.variant) {
        case 1: sel = (k + i) & 7; break;              // f4e
        case 2: sel = (k - i) & 7; break;              // b4e
        case 3: sel = k; break;                        // rc8
        case 4: sel = std::max<uint32_t>(k, i); break; // ecl
        case 5: sel = std::min<uint32_t>(k, i); break; // ecr
        case 6: sel = ((k & 1) << 1) + (i & 1); break; // rc16
        default: sel = s >> (4 * i) & 15;
      }
      uint32_t by = (uint32_t)(v >> (8 * (sel & 7))) & 255;
      if (sel & 8)
        by = by & 0x80 ? 0xff : 0;
      r |= by << (8 * i);
    }
    d[lane] = r;
  });
}
void execLop3(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  uint32_t lut = in.variant;
  forEachLane(mask, [&](int lane) {
    uint32_t x = (uint32_t)a[lane], y = (uint32_t)b[lane], z = (uint32_t)c[lane], r = 0;
    if (lut & 1)
      r |= ~x & ~y & ~z;
    if (lut & 2)
      r |= ~x & ~y & z;
    if (lut & 4)
      r |= ~x & y & ~z;
    if (lut & 8)
      r |= ~x & y & z;
    if (lut & 16)
      r |= x & ~y & ~z;
    if (lut & 32)
      r |= x & ~y & z;
    if (lut & 64)
      r |= x & y & ~z;
    if (lut & 128)
      r |= x & y & z;
    d[lane] = r;
  });
}
void execShf(Warp& warp, const Instr& in, uint32_t mask) { // sub: 1 right; sub2: 1 wrap
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    uint64_t v = (uint32_t)a[lane] | (b[lane] << 32);
    uint32_t n = (uint32_t)c[lane];
    n = in.variant2 ? n & 31 : std::min(n, 32u);
    d[lane] = in.variant ? (uint32_t)(v >> n) : (uint32_t)((v << n) >> 32);
  });
}
void execDp4a(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    int32_t s = (int32_t)c[lane];
    for (int i = 0; i < 4; i++) {
      int x = (a[lane] >> (8 * i)) & 255, y = (b[lane] >> (8 * i)) & 255;
      if (in.type == T_S32)
        x = (int8_t)x;
      if (in.type2 == T_S32)
        y = (int8_t)y;
      s += x * y;
    }
    d[lane] = (uint32_t)s;
  });
}
void execDp2a(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    int32_t s = (int32_t)c[lane];
    for (int i = 0; i < 2; i++) {
      int x = (a[lane] >> (16 * i)) & 0xffff,
          y = (b[lane] >> (8 * i + (in.variant ? 16 : 0))) & 255;
      if (in.type == T_S32)
        x = (int16_t)x;
      if (in.type2 == T_S32)
        y = (int8_t)y;
      s += x * y;
    }
    d[lane] = (uint32_t)s;
  });
}
void execSad(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]), *c = warp.src(in.src[2]);
  bool sg = isSignedType((Type)in.type);
  forEachLane(mask, [&](int lane) {
    int64_t x = sg ? (int32_t)a[lane] : (int64_t)(uint32_t)a[lane],
            y = sg ? (int32_t)b[lane] : (int64_t)(uint32_t)b[lane];
    d[lane] = (uint32_t)(c[lane] + (x < y ? y - x : x - y));
  });
}
// ------------------------------------------------------------------ decoders
// add sub mul mad fma min max div rem neg abs, and the carry forms addc subc madc
bool decodeWide(DecodeCtx& ctx, Type t, bool mad) {
  if (mad)
    ctx.ins.src[2] = ctx.source(ctx.raw.operands[3], typeSize(t) == 4 ? T_B64 : T_B32);
  switch (t) {
    case T_U16:
      ctx.ins.exec = mad ? execMadWide<uint16_t, uint32_t> : execMulWide<uint16_t, uint32_t>;
      return true;
    case T_S16:
      ctx.ins.exec = mad ? execMadWide<int16_t, int32_t> : execMulWide<int16_t, int32_t>;
      return true;
    case T_U32:
      ctx.ins.exec = mad ? execMadWide<uint32_t, uint64_t> : execMulWide<uint32_t, uint64_t>;
      return true;
    case T_S32:
      ctx.ins.exec = mad ? execMadWide<int32_t, int64_t> : execMulWide<int32_t, int64_t>;
      return true;
    default: return false;
  }
}
bool decodeCarry(DecodeCtx& ctx, Type t, bool carryIn, bool carryOut) {
  ctx.ins.vecLen = (carryIn ? 1 : 0) | (carryOut ? 2 : 0);
  ctx.ins.variant = ctx.raw.op[0] == 'a' ? 0 : ctx.raw.op[0] == 's' ? 1 : ctx.raw.has("hi") ? 3 : 2;
  return byIntType(ctx, t, [](auto x) -> Handler { return execCarry<decltype(x)>; });
}
bool decodeFloatArith(DecodeCtx& ctx, Type t) {
  static const std::unordered_map<std::string, FOp> ops = {
      {"add", F_ADD}, {"sub", F_SUB}, {"mul", F_MUL}, {"fma", F_FMA}, {"mad", F_FMA},
      {"min", F_MIN}, {"max", F_MAX}, {"div", F_DIV}, {"neg", F_NEG}, {"abs", F_ABS}};
  auto it = ops.find(ctx.raw.op);
  if (it == ops.end())
    return false;
  if ((it->second == F_MIN || it->second == F_MAX) && ctx.raw.operands.size() > 3)
    return false; // three-input min/max
  return pickFloatHandler(ctx, it->second, t);
}
bool decodeArith(DecodeCtx& ctx) {
  if (ctx.raw.operands.empty())
    return false;
  const std::string& op = ctx.raw.op;
  Type t = ctx.type();
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  readSources(ctx, t);
  bool carryIn = op == "addc" || op == "subc" || op == "madc", carryOut = ctx.raw.has("cc");
  if (carryIn || carryOut)
    return decodeCarry(ctx, t, carryIn, carryOut);
  if (isFloatType(t) || op == "fma")
    return decodeFloatArith(ctx, t);
  bool wide = ctx.raw.has("wide"), hi = ctx.raw.has("hi");
  if (wide)
    return decodeWide(ctx, t, op == "mad");
  if (ctx.ins.saturate && (op == "add" || op == "sub")) {
    ctx.ins.exec = op == "add" ? execAddSat<int32_t> : execSubSat<int32_t>;
    return true;
  }
  if ((op == "min" || op == "max") && ctx.raw.has("relu"))
    return false;
  if (op == "abs")
    return byIntWidth(ctx, t, [](auto x) -> Handler { return execAbs<decltype(x)>; });
  return byIntType(ctx, t, [&](auto x) -> Handler {
    using T = decltype(x);
    if (op == "add")
      return execAdd<T>;
    if (op == "sub")
      return execSub<T>;
    if (op == "mul")
      return hi ? execMulHi<T> : execMulLo<T>;
    if (op == "mad")
      return hi ? execMadHi<T> : execMadLo<T>;
    if (op == "div")
      return execDiv<T>;
    if (op == "rem")
      return execRem<T>;
    if (op == "min")
      return execMin<T>;
    if (op == "max")
      return execMax<T>;
    return execNeg<T>;
  });
}
bool decodeLogic(DecodeCtx& ctx) {
  const std::string& op = ctx.raw.op;
  Type t = ctx.type();
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  readSources(ctx, t);
  if (t == T_PRED) {
    ctx.ins.variant = op == "and" ? P_AND : op == "or" ? P_OR : op == "xor" ? P_XOR : P_NOT;
    ctx.ins.exec = execPredLogic;
    return true;
  }
  if (op == "not")
    return byIntWidth(ctx, t, [](auto x) -> Handler { return execNot<decltype(x)>; });
  if (op == "cnot")
    return byIntWidth(ctx, t, [](auto x) -> Handler { return execCnot<decltype(x)>; });
  return byIntType(ctx, t, [&](auto x) -> Handler {
    using T = decltype(x);
    return op == "and" ? execAnd<T> : op == "or" ? execOr<T> : execXor<T>;
  });
}
bool decodeShift(DecodeCtx& ctx) {
  Type t = ctx.type();
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], t);
  ctx.ins.src[1] = ctx.source(ctx.raw.operands[2], T_B32);
  bool left = ctx.raw.op == "shl";
  return byIntType(ctx, t, [&](auto x) -> Handler {
    return left ? execShl<decltype(x)> : execShr<decltype(x)>;
  });
}
// Bit-field operations have u32 positions whatever the type of the value.
bool decodeBitField(DecodeCtx& ctx) {
  bool insert = ctx.raw.op == "bfi";
  Type t = ctx.type();
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  for (size_t k = 1; k < ctx.raw.operands.size(); k++)
    ctx.ins.src[k - 1] = ctx.source(ctx.raw.operands[k], k == 1 || (insert && k == 2) ? t : T_B32);
  if (!insert)
    return byIntType(ctx, t, [](auto x) -> Handler { return execBfe<decltype(x)>; });
  ctx.ins.exec = typeSize(t) == 8 ? (Handler)execBfi<uint64_t> : execBfi<uint32_t>;
  return true;
}
bool decodePrmt(DecodeCtx& ctx) {
  static const char* modes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  for (int k = 1; k < 7; k++)
    if (ctx.raw.has(modes[k]))
      ctx.ins.variant = k;
  ctx.ins.exec = execPrmt;
  return true;
}
bool decodeLop3(DecodeCtx& ctx) {
  if (ctx.raw.operands.size() != 5 || ctx.raw.operands[4].kind != Operand::IMM ||
      ctx.raw.operands[0].second)
    return false;
  ctx.ins.variant = (uint8_t)ctx.raw.operands[4].imm;
  ctx.ins.exec = execLop3;
  return true;
}
// Operations with one handler, or one for 32 and one for 64 bits; `variant` is the modifier that
// the handler asks about
bool decodeBits(DecodeCtx& ctx) {
  struct Entry {
    Handler narrow, wide;
    const char* variant;
  };
  static const std::unordered_map<std::string, Entry> ops = {
      {"popc", {execPopc32, execPopc64, ""}},
      {"clz", {execClz32, execClz64, ""}},
      {"brev", {execBrev32, execBrev64, ""}},
      {"bfind", {execBfind, execBfind, "shiftamt"}},
      {"fns", {execFns, execFns, ""}},
      {"bmsk", {execBmsk, execBmsk, "clamp"}},
      {"szext", {execSzext, execSzext, "clamp"}},
      {"shf", {execShf, execShf, "r"}},
      {"dp4a", {execDp4a, execDp4a, ""}},
      {"dp2a", {execDp2a, execDp2a, "hi"}},
      {"sad", {execSad, nullptr, ""}}};
  Type t = ctx.type();
  ctx.ins.type = t;
  ctx.ins.type2 = ctx.type(1);
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  readSources(ctx, t);
  if (ctx.raw.op == "prmt")
    return decodePrmt(ctx);
  if (ctx.raw.op == "lop3")
    return decodeLop3(ctx);
  const Entry& e = ops.at(ctx.raw.op);
  ctx.ins.variant = ctx.raw.has(e.variant);
  ctx.ins.variant2 = ctx.raw.has("wrap");
  ctx.ins.exec = typeSize(t) == 8 ? e.wide : e.narrow;
  return ctx.ins.exec != nullptr;
}

} // namespace

void registerInteger(std::unordered_map<std::string, Decoder>& t) {
  for (auto n : {"add", "sub", "mul", "mad", "fma", "min", "max", "div", "rem", "neg", "abs",
                 "addc", "subc", "madc"})
    t[n] = decodeArith;
  for (auto n : {"and", "or", "xor", "not", "cnot"})
    t[n] = decodeLogic;
  t["shl"] = t["shr"] = decodeShift;
  t["bfe"] = t["bfi"] = decodeBitField;
  for (auto n : {"popc", "clz", "brev", "bfind", "fns", "bmsk", "szext", "prmt", "lop3", "shf",
                 "dp4a", "dp2a", "sad"})
    t[n] = decodeBits;
}

} // namespace ptx
