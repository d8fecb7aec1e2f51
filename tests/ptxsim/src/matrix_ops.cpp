// SPDX-License-Identifier: Apache-2.0
// matrix_ops.cpp - ldmatrix, stmatrix, movmatrix and mma (PTX ISA 9.7.14.5). Every handler runs
// once for the whole warp.
#include "sim.h"
#include "tensor_core.h"
#include <cstring>

namespace ptx {
namespace {
void rows(Warp& warp, const Instr& in, int lanes, uint32_t* off, bool write) {
  const uint64_t* base = warp.src(in.src[0]);
  for (int lane = 0; lane < lanes; lane++) {
    uint64_t a = base[lane] + in.offset;
    if ((a & WIN_MASK) == WIN_SHARED)
      a &= ~WIN_MASK;
    else if (in.space == SP_GENERIC)
      warp.error(in, lane, "ldmatrix address is not in shared memory");
    if ((uint32_t)a % 16)
      warp.error(in, lane,
                 strf("ldmatrix/stmatrix row address %u is not a multiple of 16", (uint32_t)a),
                 716);
    warp.sharedPtr(in, (uint32_t)a, 16, lane);
    off[lane] = (uint32_t)a;
    if (!write)
      warp.checkShared(in, off[lane], 16, 32, false, false);
  }
  if (Options::get().counters) {
    Counters& c = warp.launch->c;
    c.sharedReq++;
    for (int g = 0; g < lanes; g += 8) {
      int cnt[32] = {}, mx = 0;
      std::vector<uint32_t> seen;
      for (int lane = g; lane < g + 8; lane++)
        for (int k = 0; k < 4; k++) {
          uint32_t wd = off[lane] / 4 + k;
          if (std::find(seen.begin(), seen.end(), wd) == seen.end()) {
            seen.push_back(wd);
            mx = std::max(mx, ++cnt[wd & 31]);
          }
        }
      c.sharedWave += mx;
      c.sharedIdeal += (seen.size() + 31) / 32;
    }
  }
}
void execLdMatrix(Warp& warp, const Instr& in, uint32_t) {
  uint32_t off[32];
  int n = in.vecLen;
  rows(warp, in, 8 * n, off, false);
  const uint8_t* s = warp.block->smem.data();
  for (int i = 0; i < n; i++) {
    uint64_t* d = warp.reg(in.dstVec[i]);
    for (int lane = 0; lane < 32; lane++) {
      uint16_t e[2];
      for (int k = 0; k < 2; k++) {
        int row = in.variant ? 2 * (lane & 3) + k : lane >> 2,
            col = in.variant ? lane >> 2 : 2 * (lane & 3) + k;
        memcpy(&e[k], s + off[8 * i + row] + 2 * col, 2);
      }
      d[lane] = (uint32_t)e[0] | (uint32_t)e[1] << 16;
    }
  }
}
void execStMatrix(Warp& warp, const Instr& in, uint32_t) {
  uint32_t off[32];
  int n = in.vecLen;
  rows(warp, in, 8 * n, off, true);
  uint8_t* s = warp.block->smem.data();
  for (int i = 0; i < n; i++) {
    const uint64_t* d = warp.src(in.srcVec[i]);
    for (int lane = 0; lane < 32; lane++)
      for (int k = 0; k < 2; k++) {
        int row = in.variant ? 2 * (lane & 3) + k : lane >> 2,
            col = in.variant ? lane >> 2 : 2 * (lane & 3) + k;
        uint16_t e = (uint16_t)(d[lane] >> (16 * k));
        uint32_t o = off[8 * i + row] + 2 * col;
        warp.checkShared(in, o, 2, lane, true, false, &e);
        memcpy(s + o, &e, 2);
      }
  }
}
void execMovMatrix(Warp& warp, const Instr& in, uint32_t) {
  const uint64_t* a = warp.src(in.src[0]);
  uint64_t* d = warp.reg(in.dst[0]);
  uint16_t x[8][8];
  for (int lane = 0; lane < 32; lane++)
    for (int k = 0; k < 2; k++)
      x[lane >> 2][2 * (lane & 3) + k] = (uint16_t)(a[lane] >> (16 * k));
  for (int lane = 0; lane < 32; lane++)
    d[lane] = (uint32_t)x[2 * (lane & 3)][lane >> 2] | (uint32_t)x[2 * (lane & 3) + 1][lane >> 2]
                                                           << 16;
}

// Fragment maps: with E elements per 32-bit register, element (row, k) of A sits in register
// 2*(k/4E) + (row>=8) of lane 4*(row%8) + (k%4E)/E; (k, n) of B in register k/4E of lane 4n +
// (k%4E)/E; C rows lane/4 (+8), columns 2*(lane%4) (+1).
void execMma(Warp& warp, const Instr& in, uint32_t) {
  Type ta = (Type)in.type, tb = (Type)in.type2, tc = (Type)in.variant;
  int K = in.offset;
  int bits = ta == T_TF32 ? 32 : typeSize(ta) * 8, E = 32 / bits;
  static thread_local double A[16][64], B[8][64];
  uint64_t em = sizeMask(bits / 8);
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++)
      A[r][k] = elementValue(
          ta, warp.src(in.srcVec[2 * (k / (4 * E)) + (r >= 8)])[4 * (r & 7) + k % (4 * E) / E] >>
                      (bits * (k % E)) &
                  em);
  for (int n = 0; n < 8; n++)
    for (int k = 0; k < K; k++)
      B[n][k] = elementValue(
          tb, warp.src(in.srcVecB[k / (4 * E)])[4 * n + k % (4 * E) / E] >> (bits * (k % E)) & em);
  int mode = Options::get().mma;
  warp.launch->c.mma++;
  uint32_t out[4][32];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      int r = (lane >> 2) + (i >> 1) * 8, n = 2 * (lane & 3) + (i & 1);
      if (tc == T_S32) {
        int64_t s = (int32_t)warp.src(in.srcVecC[i])[lane];
        for (int k = 0; k < K; k++)
          s += (int64_t)(A[r][k] * B[n][k]);
        if (in.saturate)
          s = std::max<int64_t>(INT32_MIN, std::min<int64_t>(INT32_MAX, s));
        out[i][lane] = (uint32_t)s;
      } else if (tc == T_F16) {
        float c = h2f((uint16_t)(warp.src(in.srcVecC[i >> 1])[lane] >> (16 * (i & 1))));
        out[i][lane] = d2h(dotProduct(A[r], B[n], K, c, ta, mode));
      } else
        out[i][lane] = (uint32_t)put<float>(
            dotProduct(A[r], B[n], K, get<float>(warp.src(in.srcVecC[i])[lane]), ta, mode));
    }
  for (int lane = 0; lane < 32; lane++) {
    if (tc == T_F16)
      for (int i = 0; i < 2; i++)
        warp.reg(in.dstVec[i])[lane] = out[2 * i][lane] | out[2 * i + 1][lane] << 16;
    else
      for (int i = 0; i < 4; i++)
        warp.reg(in.dstVec[i])[lane] = out[i][lane];
  }
}
void execMmaF64(Warp& warp, const Instr& in,
                uint32_t) { // m8n8k4: A[lane/4][lane%4], B[lane%4][lane/4], C[lane/4][2*(lane%4)+i]
  const uint64_t *a = warp.src(in.srcVec[0]), *b = warp.src(in.srcVecB[0]);
  warp.launch->c.mma++;
  uint64_t out[2][32];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 2; i++) {
      double s = get<double>(warp.src(in.srcVecC[i])[lane]);
      for (int k = 0; k < 4; k++)
        s = std::fma(get<double>(a[4 * (lane >> 2) + k]),
                     get<double>(b[4 * (2 * (lane & 3) + i) + k]), s);
      out[i][lane] = put<double>(s);
    }
  for (int i = 0; i < 2; i++)
    memcpy(warp.reg(in.dstVec[i]), out[i], sizeof out[i]);
}

bool decodeLdMatrix(DecodeCtx& ctx) {
  if (ctx.raw.has("m8n16") || ctx.raw.has("m16n16") || !ctx.raw.has("m8n8"))
    return false;
  bool ld = ctx.raw.op == "ldmatrix";
  ctx.ins.control = CTL_COLL;
  ctx.ins.vecLen = ctx.raw.has("x4") ? 4 : ctx.raw.has("x2") ? 2 : 1;
  ctx.ins.variant = ctx.raw.has("trans");
  ctx.ins.space = (ctx.raw.has("shared") || ctx.raw.has("shared::cta")) ? SP_SHARED : SP_GENERIC;
  ctx.memory(ctx.raw.operands[ld ? 1 : 0]);
  if (ld)
    ctx.ins.dstVec = ctx.dests(ctx.raw.operands[0]);
  else
    ctx.ins.srcVec = ctx.sources(ctx.raw.operands[1], T_B32);
  if ((int)(ld ? ctx.ins.dstVec : ctx.ins.srcVec).size() != ctx.ins.vecLen)
    return false;
  ctx.ins.exec = ld ? execLdMatrix : execStMatrix;
  return true;
}
bool decodeMovMatrix(DecodeCtx& ctx) {
  ctx.ins.control = CTL_COLL;
  ctx.ins.dst[0] = ctx.dest(ctx.raw.operands[0]);
  ctx.ins.src[0] = ctx.source(ctx.raw.operands[1], T_B32);
  ctx.ins.exec = execMovMatrix;
  return true;
}
bool decodeMma(DecodeCtx& ctx) {
  if (!ctx.raw.has("sync") || !ctx.raw.has("row") || !ctx.raw.has("col") || ctx.raw.has("sp") ||
      ctx.raw.has("block_scale"))
    return false;
  int mm = 0, nn = 0, kk = 0;
  for (auto& s : ctx.raw.mods)
    if (s[0] == 'm' && isdigit(s[1]))
      sscanf(s.c_str(), "m%dn%dk%d", &mm, &nn, &kk);
  Type td = ctx.type(0), ta = ctx.type(1), tb = ctx.type(2), tc = ctx.type(3);
  ctx.ins.control = CTL_COLL;
  ctx.ins.dstVec = ctx.dests(ctx.raw.operands[0]);
  ctx.ins.srcVec = ctx.sources(ctx.raw.operands[1], T_B32);
  ctx.ins.srcVecB = ctx.sources(ctx.raw.operands[2], T_B32);
  ctx.ins.srcVecC = ctx.sources(ctx.raw.operands[3], td);
  if (td == T_F64) {
    if (mm != 8 || kk != 4)
      return false;
    ctx.ins.exec = execMmaF64;
    return true;
  }
  if (mm != 16 || nn != 8 || td != tc)
    return false;
  if (ta != T_F16 && ta != T_BF16 && ta != T_TF32 && ta != T_S8 && ta != T_U8 && ta != T_E4M3 &&
      ta != T_E5M2)
    return false;
  if (td != T_F32 && td != T_F16 && td != T_S32)
    return false;
  int bits = ta == T_TF32 ? 32 : typeSize(ta) * 8;
  size_t na = 16 * kk * bits / 32 / 32, nb = 8 * kk * bits / 32 / 32, nd = td == T_F16 ? 2 : 4;
  if (ctx.ins.srcVec.size() != na || ctx.ins.srcVecB.size() != nb || ctx.ins.dstVec.size() != nd ||
      ctx.ins.srcVecC.size() != nd || na < 2)
    ctx.fail("mma fragment size");
  ctx.ins.type = ta;
  ctx.ins.type2 = tb;
  ctx.ins.variant = td;
  ctx.ins.offset = kk;
  ctx.ins.exec = execMma;
  return true;
}
} // namespace

void registerMatrix(std::unordered_map<std::string, Decoder>& t) {
  t["ldmatrix"] = t["stmatrix"] = decodeLdMatrix;
  t["movmatrix"] = decodeMovMatrix;
  t["mma"] = decodeMma;
}

} // namespace ptx
