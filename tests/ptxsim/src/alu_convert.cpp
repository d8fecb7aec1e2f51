// SPDX-License-Identifier: Apache-2.0
// alu_convert.cpp - cvt between all scalar types and to packed pairs (PTX ISA 9.7.9.21). Integers
// go through
// __int128 and floats through double, rounded once; frequent conversions have a fast path.
#include "alu.h"

namespace ptx {
namespace {
double toD(Type t, uint64_t x) {
  switch (t) {
    case T_F32: return get<float>(x);
    case T_F64: return get<double>(x);
    case T_F16: return h2f((uint16_t)x);
    case T_BF16: return bf2f((uint16_t)x);
    default: return 0;
  }
}
template <class T> T satInt(double r) {
  if (std::isnan(r))
    return 0;
  if (r <= (double)std::numeric_limits<T>::min())
    return std::numeric_limits<T>::min();
  if (r >= (double)std::numeric_limits<T>::max())
    return std::numeric_limits<T>::max();
  return (T)r;
}
uint64_t intResult(Type t, __int128 v, bool sat, uint64_t dmask) {
  if (sat) {
    __int128 lo = 0, hi = 0;
    int b = typeSize(t) * 8;
    if (isSignedType(t)) {
      hi = ((__int128)1 << (b - 1)) - 1;
      lo = -hi - 1;
    } else
      hi = ((__int128)1 << b) - 1;
    if (v < lo)
      v = lo;
    if (v > hi)
      v = hi;
  }
  switch (t) {
    case T_S8: return (uint64_t)(int64_t)(int8_t)v & dmask;
    case T_S16: return (uint64_t)(int64_t)(int16_t)v & dmask;
    case T_S32: return (uint64_t)(int64_t)(int32_t)v & dmask;
    case T_U8:
    case T_B8: return (uint8_t)v;
    case T_U16:
    case T_B16: return (uint16_t)v;
    case T_U32:
    case T_B32: return (uint32_t)v;
    default: return (uint64_t)v & dmask;
  }
}
uint64_t fltResult(Type t, double x, char rnd, bool sat, bool fz, bool relu, Type from) {
  if (relu && (x < 0))
    x = 0;
  if (sat)
    x = std::isnan(x) ? 0 : x < 0 ? 0 : x > 1 ? 1 : x;
  switch (t) {
    case T_F64: return put<double>(x);
    case T_F32: {
      float f;
      if (rnd == 'n' || from != T_F64)
        f = (float)x;
      else {
        RoundGuard g(rnd);
        volatile double v = x;
        volatile float q = (float)v;
        f = q;
      }
      if (fz)
        f = ftz(f);
      return put<float>(f);
    }
    case T_F16: return d2h(x, rnd);
    case T_BF16: return d2bf(x, rnd);
    case T_TF32: return put<float>(tf32((float)x, rnd));
    default: return 0;
  }
}
void execCvt(Warp& warp, const Instr& in, uint32_t mask) {
  Type D = (Type)in.type, S = (Type)in.type2;
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  bool df = isFloatType(D), sf = isFloatType(S);
  forEachLane(mask, [&](int lane) {
    uint64_t x = a[lane];
    if (!df && !sf) {
      __int128 v;
      switch (S) {
        case T_S8: v = (int8_t)x; break;
        case T_S16: v = (int16_t)x; break;
        case T_S32: v = (int32_t)x; break;
        case T_S64: v = (int64_t)x; break;
        default: v = x & sizeMask(typeSize(S));
      }
      d[lane] = intResult(D, v, in.saturate, in.dstMask);
    } else if (!df) {
      double v = toD(S, x);
      if (in.ftz && S == T_F32)
        v = ftz((float)v);
      double r = in.rounding == 'z'   ? std::trunc(v)
                 : in.rounding == 'm' ? std::floor(v)
                 : in.rounding == 'p' ? std::ceil(v)
                                      : std::nearbyint(v);
      __int128 iv;
      if (std::isnan(r)) {
        d[lane] = (typeSize(D) == 8) ? 0x8000000000000000ull : (D == T_S32 || D == T_U32) ? 0 : 0;
        return;
      }
      if (r >= 1.8446744073709552e19)
        iv = (__int128)1 << 64;
      else if (r <= -9.3e18)
        iv = -((__int128)1 << 63);
      else
        iv = (__int128)r;
      d[lane] = intResult(D, iv, true, in.dstMask);
    } else if (!sf) {
      if (D == T_F32 || D == T_F64) { // single rounding from the integer
        uint64_t u = x & sizeMask(typeSize(S));
        bool sg = isSignedType(S);
        int64_t s = S == T_S8    ? (int8_t)x
                    : S == T_S16 ? (int16_t)x
                    : S == T_S32 ? (int32_t)x
                                 : (int64_t)x;
        RoundGuard g(in.rounding);
        volatile int64_t vs = s;
        volatile uint64_t vu = u;
        if (D == T_F32) {
          volatile float q = sg ? (float)vs : (float)vu;
          d[lane] = put<float>(q);
        } else {
          volatile double q = sg ? (double)vs : (double)vu;
          d[lane] = put<double>(q);
        }
      } else {
        double v;
        switch (S) {
          case T_S8: v = (int8_t)x; break;
          case T_S16: v = (int16_t)x; break;
          case T_S32: v = (int32_t)x; break;
          case T_S64: v = (double)(int64_t)x; break;
          default: v = (double)(x & sizeMask(typeSize(S)));
        }
        d[lane] = fltResult(D, v, in.rounding, false, false, false, T_F64);
      }
    } else {
      double v = toD(S, x);
      if (in.ftz && S == T_F32)
        v = ftz((float)v);
      if (in.variant) {
        v = in.rounding == 'z'   ? std::trunc(v)
            : in.rounding == 'm' ? std::floor(v)
            : in.rounding == 'p' ? std::ceil(v)
                                 : std::nearbyint(v);
        d[lane] = fltResult(D, v, 'n', in.saturate, in.ftz, in.vecLen == 2, S);
      } else
        d[lane] = fltResult(D, v, in.rounding, in.saturate, in.ftz, in.vecLen == 2, S);
    }
  });
}
// common conversions, fast
void execCvtU64U32(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  forEachLane(mask, [&](int lane) { d[lane] = (uint32_t)a[lane]; });
}
void execCvtS64S32(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  forEachLane(mask, [&](int lane) { d[lane] = (uint64_t)(int64_t)(int32_t)a[lane]; });
}
void execCvtPack(Warp& warp, const Instr& in,
                 uint32_t mask) { // cvt.rn{.relu}.{bf16x2,f16x2,e4m3x2,e5m2x2}.f32 d, a, b
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  forEachLane(mask, [&](int lane) {
    float hi = get<float>(a[lane]), lo = get<float>(b[lane]);
    if (in.vecLen == 2) {
      if (hi < 0)
        hi = 0;
      if (lo < 0)
        lo = 0;
    }
    switch (in.type) {
      case T_BF16X2:
        d[lane] = in.rounding == 'n'
                      ? ((uint64_t)f2bf(hi) << 16 | f2bf(lo))
                      : ((uint64_t)d2bf(hi, in.rounding) << 16 | d2bf(lo, in.rounding));
        break;
      case T_F16X2: d[lane] = (uint64_t)d2h(hi, in.rounding) << 16 | d2h(lo, in.rounding); break;
      case T_E4M3X2: d[lane] = (uint64_t)f2e4m3(hi) << 8 | f2e4m3(lo); break;
      default: d[lane] = (uint64_t)f2e5m2(hi) << 8 | f2e5m2(lo);
    }
  });
}
void execCvtFp8(Warp& warp, const Instr& in, uint32_t mask) { // fp8x2 <-> f16x2
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  forEachLane(mask, [&](int lane) {
    if (in.type == T_F16X2) {
      uint8_t b0 = (uint8_t)a[lane], b1 = (uint8_t)(a[lane] >> 8);
      bool e4 = in.type2 == T_E4M3X2;
      d[lane] =
          (uint64_t)d2h(e4 ? e4m32f(b1) : e5m22f(b1)) << 16 | d2h(e4 ? e4m32f(b0) : e5m22f(b0));
    } else {
      float lo = h2f((uint16_t)a[lane]), hi = h2f((uint16_t)(a[lane] >> 16));
      bool e4 = in.type == T_E4M3X2;
      d[lane] = (uint64_t)(e4 ? f2e4m3(hi) : f2e5m2(hi)) << 8 | (e4 ? f2e4m3(lo) : f2e5m2(lo));
    }
  });
}

bool decodeCvt(DecodeCtx& ctx) {
  if (ctx.raw.has("pack"))
    return false;
  Type D = ctx.type(0), S = ctx.type(1);
  ctx.ins.type = D;
  ctx.ins.type2 = S;
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.dstMask =
      ctx.raw.operands[0].kind == Operand::REG ? sizeMask(typeSize(ctx.raw.operands[0].ty)) : ~0ull;
  ctx.ins.vecLen = ctx.raw.has("relu") ? 2 : 1;
  if (D == T_BF16X2 || D == T_F16X2 || D == T_E4M3X2 || D == T_E5M2X2) {
    if (S == T_F32) {
      if (ctx.raw.operands.size() != 3)
        return false;
      ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], S);
      ctx.ins.src[1] = ctx.source(ctx.raw.operands[2], S);
      ctx.ins.exec = execCvtPack;
      return true;
    }
    if ((D == T_F16X2 && (S == T_E4M3X2 || S == T_E5M2X2)) || S == T_F16X2) {
      ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], T_B32);
      ctx.ins.exec = execCvtFp8;
      return true;
    }
    return false;
  }
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], S);
  if (ctx.raw.has("satfinite") && D != T_TF32)
    return false;
  for (auto& s : ctx.raw.mods)
    if (s == "rni" || s == "rzi" || s == "rmi" || s == "rpi")
      ctx.ins.variant = 1;
  if (S == T_TF32 || S == T_NONE || D == T_NONE)
    return false;
  if (D == T_TF32 && ctx.ins.rounding == 'n' && !ctx.raw.has("rn"))
    ctx.ins.rounding = 'a';
  if ((D == T_U64 || D == T_B64 || D == T_S64) && (S == T_U32 || S == T_B32))
    ctx.ins.exec = execCvtU64U32;
  else if ((D == T_S64 || D == T_U64) && S == T_S32 && !ctx.ins.saturate)
    ctx.ins.exec = execCvtS64S32;
  else
    ctx.ins.exec = execCvt;
  return true;
}
} // namespace

void registerConvert(std::unordered_map<std::string, Decoder>& t) {
  t["cvt"] = decodeCvt;
}

} // namespace ptx
