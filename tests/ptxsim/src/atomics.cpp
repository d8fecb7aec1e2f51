// SPDX-License-Identifier: Apache-2.0
// atomics.cpp - atom and red on global and shared memory (PTX ISA 9.7.13.5, 9.7.13.7). Lanes run in
// lane order.
#include "sim.h"
#include <cstring>

namespace ptx {
namespace {

enum AOp : uint8_t { A_ADD, A_MIN, A_MAX, A_INC, A_DEC, A_AND, A_OR, A_XOR, A_EXCH, A_CAS };
template <class T> T aop(uint8_t op, T o, T b, T c) {
  switch (op) {
    case A_ADD: return o + b;
    case A_MIN: return std::min(o, b);
    case A_MAX: return std::max(o, b);
    case A_INC: return o >= b ? 0 : o + 1;
    case A_DEC: return o == 0 || o > b ? b : o - 1;
    case A_EXCH: return b;
    case A_CAS: return o == b ? c : o;
    default: break;
  }
  if constexpr (std::is_integral<T>::value)
    switch (op) {
      case A_AND: return o & b;
      case A_OR: return o | b;
      case A_XOR: return o ^ b;
    }
  return o;
}
uint64_t atomic1(const Instr& in, uint64_t o, uint64_t b, uint64_t c) {
  switch (in.type) {
    case T_S32:
      return put<int32_t>((in.variant == A_ADD)
                              ? (int32_t)((uint32_t)o + (uint32_t)b)
                              : aop<int32_t>(in.variant, (int32_t)o, (int32_t)b, (int32_t)c));
    case T_S64:
      return in.variant == A_ADD
                 ? o + b
                 : put<int64_t>(aop<int64_t>(in.variant, (int64_t)o, (int64_t)b, (int64_t)c));
    case T_U64:
    case T_B64: return aop<uint64_t>(in.variant, o, b, c);
    case T_F32:
      return put<float>(aop<float>(in.variant, get<float>(o), get<float>(b), get<float>(c)));
    case T_F64:
      return put<double>(aop<double>(in.variant, get<double>(o), get<double>(b), get<double>(c)));
    case T_F16: return d2h(aop<double>(in.variant, h2f((uint16_t)o), h2f((uint16_t)b), 0));
    case T_BF16: return d2bf(aop<double>(in.variant, bf2f((uint16_t)o), bf2f((uint16_t)b), 0));
    case T_F16X2:
      return (uint64_t)d2h(
                 aop<double>(in.variant, h2f((uint16_t)(o >> 16)), h2f((uint16_t)(b >> 16)), 0))
                 << 16 |
             d2h(aop<double>(in.variant, h2f((uint16_t)o), h2f((uint16_t)b), 0));
    case T_BF16X2:
      return (uint64_t)d2bf(
                 aop<double>(in.variant, bf2f((uint16_t)(o >> 16)), bf2f((uint16_t)(b >> 16)), 0))
                 << 16 |
             d2bf(aop<double>(in.variant, bf2f((uint16_t)o), bf2f((uint16_t)b), 0));
    case T_B16: return aop<uint16_t>(in.variant, (uint16_t)o, (uint16_t)b, (uint16_t)c);
    default: return aop<uint32_t>(in.variant, (uint32_t)o, (uint32_t)b, (uint32_t)c);
  }
}
void execAtom(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* base = warp.src(in.src[0]);
  int es = in.elemBytes, n = es * in.vecLen;
  warp.launch->c.atomics++;
  if (Options::get().counters)
    count(warp, in, mask, n, base);
  uint64_t found = 0;
  bool fixed = true;
  for (; mask; mask &= mask - 1) {
    int lane = __builtin_ctz(mask);
    uint32_t so;
    uint64_t a = base[lane] + in.offset;
    char* p = warp.resolve(in, a, n, lane, true, in.space, &so);
    bool shared = so != ~0u;
    if (shared)
      warp.checkShared(in, so, n, lane, true, true);
    else
      warp.checkGlobal(in, a, n, lane, true, true);
    warp.acquire(shared ? so : a, shared);
    found = pollHash(found, a, p, n);
    fixed &= shared || warp.lastRange->fixed();
    for (int k = 0; k < in.vecLen; k++) {
      uint64_t o = loadBits(p + k * es, es, false),
               c = in.src[2] == NOCOL ? 0 : warp.src(in.src[2])[lane];
      uint64_t r = atomic1(in, o, warp.src(in.srcVec[k])[lane], c);
      fixed &= memcmp(p + k * es, &r, es) == 0;
      memcpy(p + k * es, &r, es);
      if (!in.dstVec.empty())
        warp.reg(in.dstVec[k])[lane] = o;
    }
    warp.release(shared ? so : a, shared, in.variant2 & 8);
  }
  if (!fixed)
    warp.launch->progress++;
  warp.polled(in, found, fixed);
}
bool decodeAtom(DecodeCtx& ctx) {
  bool red = ctx.raw.op == "red";
  size_t k = red ? 0 : 1;
  if (ctx.raw.has("async") || clusterShared(ctx.raw))
    return false;
  Type t = ctx.type();
  if (t == T_B128)
    return false;
  ctx.ins.space = spaceOf(ctx.raw);
  ctx.ins.type = t;
  ctx.ins.elemBytes = typeSize(t);
  ctx.ins.vecLen = vecOf(ctx.raw);
  ctx.ins.strong = true;
  const char* n[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"};
  int op = -1;
  for (int j = 0; j < 10; j++)
    if (ctx.raw.has(n[j]))
      op = j;
  if (op < 0)
    return false;
  ctx.memory(ctx.raw.operands[k]);
  uint8_t keep = ctx.ins.variant2;
  if (!red)
    ctx.ins.dstVec = ctx.dests(ctx.raw.operands[0]);
  ctx.ins.srcVec = ctx.sources(ctx.raw.operands[k + 1], t);
  if (op == A_CAS)
    ctx.ins.src[2] = ctx.source(ctx.raw.operands[k + 2], t);
  ctx.ins.variant = (uint8_t)op;
  ctx.ins.variant2 = keep | ((ctx.raw.has("release") || ctx.raw.has("acq_rel")) ? 8 : 0);
  ctx.ins.exec = execAtom;
  if (!red) // who does not look at the result waits for nothing
    ctx.ins.control = CTL_POLL;
  return true;
}
} // namespace

void registerAtomics(std::unordered_map<std::string, Decoder>& t) {
  t["atom"] = t["red"] = decodeAtom;
}

} // namespace ptx
