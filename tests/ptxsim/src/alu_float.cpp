// SPDX-License-Identifier: Apache-2.0
// alu_float.cpp - floating-point arithmetic: f32, f64, f16, bf16 scalar and packed, f32x2, and the
// approximate functions (PTX ISA 9.7.3 to 9.7.5). Rounding modes other than nearest-even switch the
// host's rounding mode. Approximate functions use libm, so they are more accurate than the
// hardware.
#include "alu.h"
#include <cstring>

namespace ptx {
namespace {
template <class T> inline T fop(uint8_t op, T a, T b, T c) {
  switch (op) {
    case F_ADD: return a + b;
    case F_SUB: return a - b;
    case F_MUL: return a * b;
    case F_FMA: return std::fma(a, b, c);
    case F_DIV: return a / b;
    case F_MIN:
      if (a == 0 && b == 0)
        return std::signbit(a) ? a : b;
      return std::fmin(a, b);
    case F_MAX:
      if (a == 0 && b == 0)
        return std::signbit(a) ? b : a;
      return std::fmax(a, b);
    case F_MINNAN: return std::isnan(a) || std::isnan(b) ? (T)NAN : fop<T>(F_MIN, a, b, c);
    case F_MAXNAN: return std::isnan(a) || std::isnan(b) ? (T)NAN : fop<T>(F_MAX, a, b, c);
    case F_NEG: return -a;
    case F_ABS: return std::fabs(a);
  }
  return 0;
}
template <class T, uint8_t OP> void execF(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  const uint64_t* b = in.src[1] == NOCOL ? a : warp.src(in.src[1]);
  const uint64_t* c = in.src[2] == NOCOL ? a : warp.src(in.src[2]);
  if (in.rounding == 'n' && !in.ftz && !in.saturate) {
    forEachLane(mask, [&](int lane) {
      d[lane] = put<T>(fop<T>(OP, get<T>(a[lane]), get<T>(b[lane]), get<T>(c[lane])));
    });
    return;
  }
  auto one = [&](int lane) {
    volatile T x = get<T>(a[lane]), y = get<T>(b[lane]), z = get<T>(c[lane]);
    if (in.ftz) {
      x = (T)ftz((float)x);
      y = (T)ftz((float)y);
      z = (T)ftz((float)z);
    }
    volatile T r = fop<T>(OP, x, y, z);
    if (in.ftz)
      r = (T)ftz((float)r);
    if (in.saturate) {
      T q = r;
      r = std::isnan(q) ? 0 : q < 0 ? 0 : q > 1 ? 1 : q;
    }
    d[lane] = put<T>((T)r);
  };
  if (in.rounding == 'n') {
    forEachLane(mask, one);
    return;
  }
  RoundGuard g(in.rounding);
  forEachLane(mask, one);
}
// f16 / bf16 scalar and packed, f32x2; sub = FOp
template <int N, bool BF> void execHalf(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  const uint64_t* b = in.src[1] == NOCOL ? a : warp.src(in.src[1]);
  const uint64_t* c = in.src[2] == NOCOL ? a : warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    uint64_t r = 0;
    for (int k = 0; k < N; k++) {
      uint16_t x = (uint16_t)(a[lane] >> (16 * k)), y = (uint16_t)(b[lane] >> (16 * k)),
               z = (uint16_t)(c[lane] >> (16 * k)), q;
      if (in.variant == F_NEG)
        q = x ^ 0x8000;
      else if (in.variant == F_ABS)
        q = x & 0x7fff;
      else {
        double v =
            fop<double>(in.variant, halfToDouble(x, BF), halfToDouble(y, BF), halfToDouble(z, BF));
        if (in.variant2 && v < 0)
          v = 0;
        if (in.saturate)
          v = std::isnan(v) ? 0 : v < 0 ? 0 : v > 1 ? 1 : v;
        q = doubleToHalf(v, BF);
      }
      r |= (uint64_t)q << (16 * k);
    }
    d[lane] = r;
  });
}
void execF32x2(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  const uint64_t* b = in.src[1] == NOCOL ? a : warp.src(in.src[1]);
  const uint64_t* c = in.src[2] == NOCOL ? a : warp.src(in.src[2]);
  forEachLane(mask, [&](int lane) {
    uint64_t r = 0;
    for (int k = 0; k < 64; k += 32) {
      float v = fop<float>(in.variant, get<float>(a[lane] >> k), get<float>(b[lane] >> k),
                           get<float>(c[lane] >> k));
      if (in.ftz)
        v = ftz(v);
      r |= put<float>(v) << k;
    }
    d[lane] = r;
  });
}
enum Trans : uint8_t { X_EX2, X_LG2, X_RCP, X_SQRT, X_RSQRT, X_SIN, X_COS, X_TANH };
double trans(uint8_t op, double x) {
  switch (op) {
    case X_EX2: return std::exp2(x);
    case X_LG2: return std::log2(x);
    case X_RCP: return 1.0 / x;
    case X_SQRT: return std::sqrt(x);
    case X_RSQRT: return x == 0 ? std::copysign(INFINITY, x) : 1.0 / std::sqrt(x);
    case X_SIN: return std::sin(x);
    case X_COS: return std::cos(x);
    default: return std::tanh(x);
  }
}
template <class T> void execTrans(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  if (in.rounding != 'n') {
    RoundGuard g(in.rounding);
    forEachLane(mask, [&](int lane) {
      volatile T x = get<T>(a[lane]);
      volatile T r;
      if (in.variant == X_RCP)
        r = (T)1 / x;
      else
        r = std::sqrt((T)x);
      d[lane] = put<T>((T)r);
    });
    return;
  }
  forEachLane(mask, [&](int lane) {
    T x = get<T>(a[lane]);
    if (in.ftz)
      x = (T)ftz((float)x);
    T r;
    if (in.variant == X_RCP)
      r = (T)1 / x;
    else if (in.variant == X_SQRT)
      r = std::sqrt(x);
    else
      r = (T)trans(in.variant, (double)x);
    if (in.ftz)
      r = (T)ftz((float)r);
    d[lane] = put<T>(r);
  });
}
void execTransHalf(Warp& warp, const Instr& in, uint32_t mask) { // ty f16, f16x2, bf16, bf16x2
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  bool bf = in.type == T_BF16 || in.type == T_BF16X2;
  int n = (in.type == T_F16X2 || in.type == T_BF16X2) ? 2 : 1;
  forEachLane(mask, [&](int lane) {
    uint64_t r = 0;
    for (int k = 0; k < n; k++)
      r |= (uint64_t)doubleToHalf(
               trans(in.variant, halfToDouble((uint16_t)(a[lane] >> (16 * k)), bf)), bf)
           << (16 * k);
    d[lane] = r;
  });
}
template <class T> void execCopysign(Warp& warp, const Instr& in, uint32_t mask) {
  binaryOp<T>(warp, in, mask, [](T a, T b) { return std::copysign(b, a); });
}
template <class T> void execTestp(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* a = warp.src(in.src[0]);
  uint32_t r = 0;
  forEachLane(mask, [&](int lane) {
    T x = get<T>(a[lane]);
    bool v = false;
    switch (in.variant) {
      case 0: v = std::isfinite(x); break;
      case 1: v = std::isinf(x); break;
      case 2: v = !std::isnan(x); break;
      case 3: v = std::isnan(x); break;
      case 4: v = std::isnormal(x); break;
      case 5: v = std::fpclassify(x) == FP_SUBNORMAL; break;
    }
    r |= (uint32_t)v << lane;
  });
  warp.setPred(in.dst[0], r, mask);
}
bool decodeTrans(DecodeCtx& ctx) {
  const std::string& op = ctx.raw.op;
  Type t = ctx.type();
  ctx.ins.type = t;
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  readSources(ctx, t);
  const char* n[] = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"};
  for (int k = 0; k < 8; k++)
    if (op == n[k])
      ctx.ins.variant = k;
  if (t == T_F32)
    ctx.ins.exec = execTrans<float>;
  else if (t == T_F64)
    ctx.ins.exec = execTrans<double>;
  else
    ctx.ins.exec = execTransHalf;
  return true;
}
bool decodeCopysign(DecodeCtx& ctx) {
  Type t = ctx.type();
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  readSources(ctx, t);
  ctx.ins.exec = t == T_F64 ? (Handler)execCopysign<double> : execCopysign<float>;
  return true;
}
bool decodeTestp(DecodeCtx& ctx) {
  Type t = ctx.type();
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  readSources(ctx, t);
  const char* n[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  for (int k = 0; k < 6; k++)
    if (ctx.raw.has(n[k]))
      ctx.ins.variant = k;
  ctx.ins.exec = t == T_F64 ? (Handler)execTestp<double> : execTestp<float>;
  return true;
}
} // namespace

// The handler templates take the operation as a constant, so that the common case is a tight loop.
template <class T> Handler floatHandler(uint8_t op) {
  switch (op) {
    case F_ADD: return execF<T, F_ADD>;
    case F_SUB: return execF<T, F_SUB>;
    case F_MUL: return execF<T, F_MUL>;
    case F_FMA: return execF<T, F_FMA>;
    case F_MIN: return execF<T, F_MIN>;
    case F_MAX: return execF<T, F_MAX>;
    case F_DIV: return execF<T, F_DIV>;
    case F_NEG: return execF<T, F_NEG>;
    case F_ABS: return execF<T, F_ABS>;
    case F_MINNAN: return execF<T, F_MINNAN>;
    default: return execF<T, F_MAXNAN>;
  }
}
bool pickFloatHandler(DecodeCtx& ctx, uint8_t op, Type t) {
  if (ctx.raw.has("NaN"))
    op = op == F_MIN ? F_MINNAN : op == F_MAX ? F_MAXNAN : op;
  ctx.ins.variant = op;
  ctx.ins.variant2 = ctx.raw.has("relu");
  switch (t) {
    case T_F32: ctx.ins.exec = floatHandler<float>(op); return true;
    case T_F64: ctx.ins.exec = floatHandler<double>(op); return true;
    case T_F16: ctx.ins.exec = execHalf<1, false>; return true;
    case T_F16X2: ctx.ins.exec = execHalf<2, false>; return true;
    case T_BF16: ctx.ins.exec = execHalf<1, true>; return true;
    case T_BF16X2: ctx.ins.exec = execHalf<2, true>; return true;
    case T_F32X2: ctx.ins.exec = execF32x2; return true;
    default: return false;
  }
}

void registerFloat(std::unordered_map<std::string, Decoder>& t) {
  for (auto n : {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"})
    t[n] = decodeTrans;
  t["copysign"] = decodeCopysign;
  t["testp"] = decodeTestp;
}

} // namespace ptx
