// SPDX-License-Identifier: Apache-2.0
// alu_move.cpp - mov in all its forms: registers, constants, addresses, packing and unpacking of
// vectors, and special registers such as %tid (PTX ISA 9.7.9.3 and chapter 10).
#include "alu.h"
#include <chrono>

namespace ptx {

void execMov(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  const uint64_t* a = warp.src(in.src[0]);
  uint64_t k = in.dstMask;
  forEachLane(mask, [&](int lane) { d[lane] = a[lane] & k; });
}

namespace {
void execMovLocal(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  forEachLane(mask, [&](int lane) { d[lane] = warp.f->localBase + (uint64_t)in.offset; });
}
void execMovPack(Warp& warp, const Instr& in, uint32_t mask) { // d <- {a, b, ...}
  uint64_t* d = warp.reg(in.dst[0]);
  int n = (int)in.srcVec.size(), bits = in.elemBytes * 8;
  uint64_t k = sizeMask(in.elemBytes);
  forEachLane(mask, [&](int lane) {
    uint64_t r = 0;
    for (int i = 0; i < n; i++)
      r |= (warp.src(in.srcVec[i])[lane] & k) << (bits * i);
    d[lane] = r;
  });
}
void execMovUnpack(Warp& warp, const Instr& in, uint32_t mask) {
  const uint64_t* a = warp.src(in.src[0]);
  int n = (int)in.dstVec.size(), bits = in.elemBytes * 8;
  uint64_t k = sizeMask(in.elemBytes);
  forEachLane(mask, [&](int lane) {
    uint64_t x = a[lane];
    for (int i = 0; i < n; i++)
      warp.reg(in.dstVec[i])[lane] = (x >> (bits * i)) & k;
  });
}
enum Sreg : uint8_t {
  S_TIDX,
  S_TIDY,
  S_TIDZ,
  S_NTIDX,
  S_NTIDY,
  S_NTIDZ,
  S_CTAX,
  S_CTAY,
  S_CTAZ,
  S_NCTAX,
  S_NCTAY,
  S_NCTAZ,
  S_LANE,
  S_WARP,
  S_NWARP,
  S_SM,
  S_NSM,
  S_GRID,
  S_EQ,
  S_LE,
  S_LT,
  S_GE,
  S_GT,
  S_CLOCK,
  S_GTIMER,
  S_DSM,
  S_TSM,
  S_ZERO,
  S_ONE,
  S_WSZ,
  S_ENV1,
  S_ENV2
};
uint64_t nowNs() {
  return (uint64_t)std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}
void execSreg(Warp& warp, const Instr& in, uint32_t mask) {
  uint64_t* d = warp.reg(in.dst[0]);
  Launch* L = warp.launch;
  const Block* b = warp.block;
  forEachLane(mask, [&](int lane) {
    uint32_t t = warp.tidLinear(lane);
    uint64_t v = 0;
    switch (in.variant) {
      case S_TIDX: v = t % L->blockDim[0]; break;
      case S_TIDY: v = t / L->blockDim[0] % L->blockDim[1]; break;
      case S_TIDZ: v = t / L->blockDim[0] / L->blockDim[1]; break;
      case S_NTIDX:
      case S_NTIDY:
      case S_NTIDZ: v = L->blockDim[in.variant - S_NTIDX]; break;
      case S_CTAX:
      case S_CTAY:
      case S_CTAZ: v = b->cta[in.variant - S_CTAX]; break;
      case S_NCTAX:
      case S_NCTAY:
      case S_NCTAZ: v = L->grid[in.variant - S_NCTAX]; break;
      case S_LANE: v = lane; break;
      case S_WARP: v = warp.id; break;
      case S_NWARP: v = b->warps.size(); break;
      case S_SM: v = (b->cta[0] + b->cta[1] * 7) % 108; break;
      case S_NSM: v = 108; break;
      case S_GRID: v = L->id; break;
      case S_EQ: v = 1u << lane; break;
      case S_LT: v = (1u << lane) - 1; break;
      case S_LE: v = (2u << lane) - 1; break;
      case S_GE: v = ~((1u << lane) - 1); break;
      case S_GT: v = ~((2u << lane) - 1); break;
      case S_CLOCK: v = L->c.warpInstr * 4; break;
      case S_GTIMER: v = nowNs(); break;
      case S_DSM: v = L->dynSmem; break;
      case S_TSM: v = b->smemSize; break;
      case S_ONE: v = 1; break;
      case S_WSZ: v = 32; break;
      case S_ENV1:
        v = L->gridWorkspace >> 32;
        break; // cooperative groups find their grid barrier here
      case S_ENV2: v = (uint32_t)L->gridWorkspace; break;
      default: v = 0;
    }
    d[lane] = v & in.dstMask;
  });
}
int sregCode(const std::string& s) {
  static const std::unordered_map<std::string, int> t = {{"%tid.x", S_TIDX},
                                                         {"%tid.y", S_TIDY},
                                                         {"%tid.z", S_TIDZ},
                                                         {"%ntid.x", S_NTIDX},
                                                         {"%ntid.y", S_NTIDY},
                                                         {"%ntid.z", S_NTIDZ},
                                                         {"%ctaid.x", S_CTAX},
                                                         {"%ctaid.y", S_CTAY},
                                                         {"%ctaid.z", S_CTAZ},
                                                         {"%nctaid.x", S_NCTAX},
                                                         {"%nctaid.y", S_NCTAY},
                                                         {"%nctaid.z", S_NCTAZ},
                                                         {"%laneid", S_LANE},
                                                         {"%warpid", S_WARP},
                                                         {"%nwarpid", S_NWARP},
                                                         {"%smid", S_SM},
                                                         {"%nsmid", S_NSM},
                                                         {"%gridid", S_GRID},
                                                         {"%lanemask_eq", S_EQ},
                                                         {"%lanemask_le", S_LE},
                                                         {"%lanemask_lt", S_LT},
                                                         {"%lanemask_ge", S_GE},
                                                         {"%lanemask_gt", S_GT},
                                                         {"%clock", S_CLOCK},
                                                         {"%clock64", S_CLOCK},
                                                         {"%clock_hi", S_ZERO},
                                                         {"%globaltimer", S_GTIMER},
                                                         {"%globaltimer_lo", S_GTIMER},
                                                         {"%dynamic_smem_size", S_DSM},
                                                         {"%total_smem_size", S_TSM},
                                                         {"WARP_SZ", S_WSZ},
                                                         {"%envreg1", S_ENV1},
                                                         {"%envreg2", S_ENV2},
                                                         {"%is_explicit_cluster", S_ZERO},
                                                         {"%cluster_ctarank", S_ZERO},
                                                         {"%cluster_nctarank", S_ONE},
                                                         {"%cluster_ctaid.x", S_ZERO},
                                                         {"%cluster_ctaid.y", S_ZERO},
                                                         {"%cluster_ctaid.z", S_ZERO},
                                                         {"%cluster_nctaid.x", S_ONE},
                                                         {"%cluster_nctaid.y", S_ONE},
                                                         {"%cluster_nctaid.z", S_ONE},
                                                         {"%clusterid.x", S_CTAX},
                                                         {"%clusterid.y", S_CTAY},
                                                         {"%clusterid.z", S_CTAZ}};
  auto it = t.find(s);
  return it == t.end() ? -1 : it->second;
}
bool decodeMov(DecodeCtx& ctx) {
  Type t = ctx.type();
  const Operand &d = ctx.raw.operands[0], &a = ctx.raw.operands[1];
  if (d.kind == Operand::VEC) {
    ctx.ins.src[0] = ctx.source(a, t);
    ctx.ins.dstVec = ctx.dests(d);
    ctx.ins.elemBytes = typeSize(t) / (int)d.v.size();
    if (t == T_B128)
      return false;
    ctx.ins.exec = execMovUnpack;
    return true;
  }
  ctx.ins.dst[0] = ctx.dest(d);
  if (a.kind == Operand::VEC) {
    int n = (int)a.v.size();
    ctx.ins.elemBytes = typeSize(t) / n;
    ctx.ins.srcVec = ctx.sources(a, ctx.ins.elemBytes == 4   ? T_B32
                                    : ctx.ins.elemBytes == 2 ? T_B16
                                                             : T_B8);
    if (t == T_B128)
      return false;
    ctx.ins.exec = execMovPack;
    return true;
  }
  ctx.ins.dstMask = d.kind == Operand::REG && d.ty != T_PRED ? sizeMask(typeSize(d.ty)) : ~0ull;
  if (a.kind == Operand::SREG) {
    int k = sregCode(a.sym);
    if (k < 0)
      return false;
    ctx.ins.variant = (uint8_t)k;
    ctx.ins.exec = execSreg;
    return true;
  }
  if (t == T_PRED) {
    ctx.ins.src[0] = ctx.source(a, T_PRED);
    ctx.ins.negate[0] = a.neg;
    ctx.ins.variant = P_MOV;
    ctx.ins.exec = execPredLogic;
    return true;
  }
  if (a.kind == Operand::SYM && a.var && a.var->space == SP_LOCAL) {
    ctx.ins.offset = a.var->offset + a.off;
    ctx.ins.exec = execMovLocal;
    return true;
  }
  if (a.kind == Operand::SYM && a.var && a.var->space == SP_PARAM) {
    ctx.ins.src[0] = ctx.constant(a.var->offset + a.off + (a.var->isEntryParam ? 0 : 1ull << 40));
    ctx.ins.exec = execMov;
    return true;
  }
  ctx.ins.src[0] = ctx.source(a, t);
  ctx.ins.exec = execMov;
  return true;
}
} // namespace

void registerMove(std::unordered_map<std::string, Decoder>& t) {
  t["mov"] = decodeMov;
}

} // namespace ptx
