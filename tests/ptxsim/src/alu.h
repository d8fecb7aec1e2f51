// SPDX-License-Identifier: Apache-2.0
// alu.h - what the alu_*.cpp files share: lane-wise loops, rounding-mode guard, type dispatch,
// operand reading.
#pragma once
#include "sim.h"
#include <cfenv>

namespace ptx {

template <class T> using U = std::make_unsigned_t<T>;

// d = f(a, b) and d = f(a) for every lane of the mask
template <class T, class F> void binaryOp(Warp& warp, const Instr& in, uint32_t mask, F f) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t *a = warp.src(in.src[0]), *b = warp.src(in.src[1]);
  forEachLane(mask, [&](int lane) { d[lane] = put<T>(f(get<T>(a[lane]), get<T>(b[lane]))); });
}
template <class F> void unaryOp(Warp& warp, const Instr& in, uint32_t mask, F f) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  forEachLane(mask, [&](int lane) { d[lane] = f(a[lane]); });
}

// Sets the host's rounding mode for the life of the object: n nearest even, z zero, m down, p up.
struct RoundGuard {
  int old;
  explicit RoundGuard(char r) : old(fegetround()) {
    fesetround(r == 'z'   ? FE_TOWARDZERO
               : r == 'm' ? FE_DOWNWARD
               : r == 'p' ? FE_UPWARD
                          : FE_TONEAREST);
  }
  ~RoundGuard() { fesetround(old); }
};

inline double halfToDouble(uint16_t h, bool bf) {
  return bf ? bf2f(h) : h2f(h);
}
inline uint16_t doubleToHalf(double d, bool bf) {
  return bf ? d2bf(d) : d2h(d);
}

// Calls pick(x) with a value x of the C++ type behind an integer type, and stores the handler it
// returns.
template <class F> bool byIntType(DecodeCtx& ctx, Type t, F pick) {
  switch (t) {
    case T_U16:
    case T_B16: ctx.ins.exec = pick(uint16_t()); return true;
    case T_U32:
    case T_B32: ctx.ins.exec = pick(uint32_t()); return true;
    case T_U64:
    case T_B64: ctx.ins.exec = pick(uint64_t()); return true;
    case T_S16: ctx.ins.exec = pick(int16_t()); return true;
    case T_S32: ctx.ins.exec = pick(int32_t()); return true;
    case T_S64: ctx.ins.exec = pick(int64_t()); return true;
    default: return false;
  }
}
// The same by width only; handlers see the signed type.
template <class F> bool byIntWidth(DecodeCtx& ctx, Type t, F pick) {
  switch (t) {
    case T_S16:
    case T_B16:
    case T_U16: ctx.ins.exec = pick(int16_t()); return true;
    case T_S32:
    case T_B32:
    case T_U32: ctx.ins.exec = pick(int32_t()); return true;
    case T_S64:
    case T_B64:
    case T_U64: ctx.ins.exec = pick(int64_t()); return true;
    default: return false;
  }
}
// Source columns from operand 1 on
inline void readSources(DecodeCtx& ctx, Type t) {
  for (size_t k = 1; k < ctx.raw.operands.size() && k <= 5; k++) {
    ctx.ins.src[k - 1] = ctx.source(ctx.raw.operands[k], t);
    ctx.ins.negate[k - 1] = ctx.raw.operands[k].neg;
  }
}

enum FOp : uint8_t {
  F_ADD,
  F_SUB,
  F_MUL,
  F_FMA,
  F_MIN,
  F_MAX,
  F_DIV,
  F_NEG,
  F_ABS,
  F_MINNAN,
  F_MAXNAN
};
bool pickFloatHandler(DecodeCtx& ctx, uint8_t op,
                      Type t); // alu_float.cpp: picks the handler of a float operation
enum PredOp : uint8_t { P_AND, P_OR, P_XOR, P_NOT, P_MOV };
void execPredLogic(Warp& warp, const Instr& in, uint32_t mask); // alu_compare.cpp: sub is a PredOp

} // namespace ptx
