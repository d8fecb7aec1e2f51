// SPDX-License-Identifier: Apache-2.0
// wgmma.cpp - warpgroup mma of Hopper (PTX ISA 9.7.15), computed warp by warp: each of the four
// warps of the warpgroup owns 16 of the 64 rows. Operations are asynchronous: results stay aside
// until wgmma.wait_group, and until then any access to the result registers, and any write to
// operands in registers or shared memory, is an error. So is an operand register that ordinary
// instructions have written since the last wgmma.fence.
#include "sim.h"
#include "tensor_core.h"
#include <set>

namespace ptx {

struct WgmmaState {
  struct Result {
    std::array<uint64_t, 32> value;
    int group;
  };
  int committed = 0;             // groups; operations now issued belong to group committed + 1
  std::map<int, Result> results; // in flight, by register
  std::map<int, int> operands;   // registers that operations in flight read -> group
  std::vector<std::pair<uint32_t, int>> reads; // 16-byte pieces of shared memory in use, with group
  std::set<int> dirty;                         // registers written since the last wgmma.fence
};

namespace {

enum Step : uint8_t { FENCE, COMMIT, WAIT };

template <class F> void forEachSource(const Instr& in, F f) {
  for (int r : in.src)
    f(r);
  for (auto* v : {&in.srcVec, &in.srcVecB, &in.srcVecC})
    for (int r : *v)
      f(r);
}

template <class F> void forEachDest(const Instr& in, F f) {
  for (int r : in.dst)
    f(r);
  for (int r : in.dstVec)
    f(r);
}

// Compilers move accumulators between registers; ptxas removes such moves, so they count as the
// same register.
void trackMove(WgmmaState& s, const Instr& in) {
  int to = in.dst[0], from = in.src[0];
  auto it = s.results.find(from);
  if (it != s.results.end())
    s.results[to] = it->second;
  if (s.dirty.count(from))
    s.dirty.insert(to);
  else
    s.dirty.erase(to);
}

void retire(Warp& w, int upToGroup) {
  WgmmaState& s = *w.wgmma;
  for (auto it = s.results.begin(); it != s.results.end();)
    if (it->second.group <= upToGroup) {
      std::copy_n(it->second.value.begin(), 32, w.reg(it->first));
      it = s.results.erase(it);
    } else
      ++it;
  for (auto it = s.operands.begin(); it != s.operands.end();)
    it = it->second <= upToGroup ? s.operands.erase(it) : std::next(it);
  auto done = [&](const std::pair<uint32_t, int>& r) {
    if (r.second > upToGroup)
      return false;
    w.block->shWgmmaReads[r.first]--;
    return true;
  };
  s.reads.erase(std::remove_if(s.reads.begin(), s.reads.end(), done), s.reads.end());
}

void execStep(Warp& w, const Instr& in, uint32_t) {
  if (!w.wgmma)
    w.wgmma = std::make_shared<WgmmaState>();
  if (in.variant == FENCE)
    w.wgmma->dirty.clear();
  else if (in.variant == COMMIT)
    w.wgmma->committed++;
  else
    retire(w, w.wgmma->committed - (int)in.offset);
}

// Byte offset of element (mn, k) of the matrix that a descriptor names (PTX ISA 9.7.15.5.1,
// canonical layouts). Swizzled layouts XOR address bits 4.. with bits 7.., over rows of 128, 64 or
// 32 bytes.
struct Descriptor {
  uint32_t base, leading, stride;
  int rowBytes; // 0: no swizzle
  explicit Descriptor(uint64_t d)
      : base((uint32_t)(d & 0x3fff) << 4), leading((uint32_t)(d >> 16 & 0x3fff) << 4),
        stride((uint32_t)(d >> 32 & 0x3fff) << 4) {
    static const int widths[] = {0, 128, 64, 32};
    rowBytes = widths[d >> 62];
  }
  uint32_t address(int mn, int k, int bytes, bool mnMajor) const {
    if (!rowBytes) { // 8x16-byte core matrices
      int perRow = 16 / bytes;
      return base + mn / 8 * stride + k / perRow * leading + mn % 8 * 16 + k % perRow * bytes;
    }
    int perRow = rowBytes / bytes;
    uint32_t a = mnMajor ? base + mn / perRow * leading + k / 8 * stride + k % 8 * rowBytes +
                               mn % perRow * bytes
                         : base + mn / 8 * stride + mn % 8 * rowBytes + k * bytes;
    return a ^ ((a >> 7 & (rowBytes / 16 - 1)) << 4);
  }
};

// One operation of one warp. Fields: dstVec accumulators, src A and B descriptors (or srcVecB: A in
// registers), src[2] scale-d, negate A and B, variant2 bits "A, B is MN-major", target N.
struct Operation {
  Warp& w;
  const Instr& in;
  WgmmaState& s;
  Type ta = (Type)in.type, tb = (Type)in.type2;
  int bytes = ta == T_TF32 ? 4 : typeSize(ta), K = 32 / bytes, N = in.target;
  std::set<uint32_t> pieces;

  uint64_t fetch(const Descriptor& d, int mn, int k, bool mnMajor) {
    if (mnMajor && !d.rowBytes)
      w.error(in, 0, "wgmma: MN-major operand without swizzle is not supported");
    uint32_t off = d.address(mn, k, bytes, mnMajor);
    char* p = w.sharedPtr(in, off, bytes, 0);
    w.checkShared(in, off, bytes, 32, false, false);
    w.checkProxy(in, off, bytes, 0);
    pieces.insert(off / 16);
    uint64_t v = 0;
    memcpy(&v, p, bytes);
    return v;
  }

  // Fragment of A in registers, as of mma.m16n8k*: with E elements a register, element (row, k) is
  // in register 2 * (k / 4E) + (row >= 8) of lane 4 * (row % 8) + (k % 4E) / E.
  uint64_t fromRegister(int row, int k) {
    int E = 4 / bytes, reg = in.srcVecB[2 * (k / (4 * E)) + (row >= 8)];
    return w.src(reg)[4 * (row & 7) + k % (4 * E) / E] >> (8 * bytes * (k % E)) & sizeMask(bytes);
  }

  void checkRegisters() {
    auto check = [&](int r) {
      if (s.dirty.count(r))
        w.error(in, 0, "wgmma uses a register that was written since the last wgmma.fence");
    };
    for (int r : in.dstVec)
      check(r);
    for (int r : in.srcVecB) {
      check(r);
      if (s.results.count(r))
        w.error(in, 0, "wgmma operand is the result of a wgmma that has not been waited for");
      s.operands[r] = s.committed + 1;
    }
  }

  void run() {
    checkRegisters();
    static thread_local double A[16][32], B[256][32];
    double signA = in.negate[0] ? -1 : 1, signB = in.negate[1] ? -1 : 1;
    Descriptor b(w.src(in.src[1])[0]), a(in.srcVecB.empty() ? w.src(in.src[0])[0] : 0);
    int firstRow = (w.id & 3) * 16;
    for (int k = 0; k < K; k++) {
      for (int n = 0; n < N; n++)
        B[n][k] = signB * elementValue(tb, fetch(b, n, k, in.variant2 & 2));
      for (int r = 0; r < 16; r++)
        A[r][k] =
            signA * elementValue(ta, in.srcVecB.empty() ? fetch(a, firstRow + r, k, in.variant2 & 1)
                                                        : fromRegister(r, k));
    }
    accumulate(A, B);
    auto& reads = w.block->shWgmmaReads;
    reads.resize((w.block->smemSize + 15) / 16);
    for (uint32_t piece : pieces) {
      reads[piece]++;
      s.reads.push_back({piece, s.committed + 1});
    }
  }

  // D rows lane / 4 (+8), columns 2 * (lane % 4) (+1) of every 8 columns (PTX ISA figure "WGMMA
  // .m64nNk16 D").
  void accumulate(const double (*A)[32], const double (*B)[32]) {
    uint32_t keep = in.src[2] == NOCOL ? ~0u : w.pred(in.src[2], false);
    for (int i = 0; i < N / 2; i++) {
      int reg = in.dstVec[i];
      auto old = s.results.find(reg);
      WgmmaState::Result d;
      d.group = s.committed + 1;
      std::copy_n(old == s.results.end() ? w.reg(reg) : old->second.value.data(), 32,
                  d.value.begin());
      for (int lane = 0; lane < 32; lane++) {
        int row = (lane >> 2) + (i >> 1 & 1) * 8, n = 8 * (i / 4) + 2 * (lane & 3) + (i & 1);
        uint64_t& x = d.value[lane];
        bool add = keep >> lane & 1;
        if (in.variant == T_S32) {
          int64_t sum = add ? (int32_t)x : 0;
          for (int k = 0; k < K; k++)
            sum += (int64_t)(A[row][k] * B[n][k]);
          x = (uint32_t)sum;
        } else
          x = put<float>(
              dotProduct(A[row], B[n], K, add ? get<float>(x) : 0.f, ta, Options::get().mma));
      }
      s.results[reg] = d;
    }
  }
};

void execWgmma(Warp& w, const Instr& in, uint32_t) {
  if (!w.wgmma)
    w.error(in, 0, "wgmma.mma_async with no wgmma.fence before it");
  w.launch->c.mma++;
  Operation{w, in, *w.wgmma}.run();
}

// wgmma.mma_async.sp and f16 accumulators are not supported.
bool decodeWgmma(DecodeCtx& ctx) {
  const auto& o = ctx.raw.operands;
  ctx.ins.control = CTL_COLL;
  if (!ctx.raw.has("mma_async")) {
    ctx.ins.variant = ctx.raw.has("fence") ? FENCE : ctx.raw.has("commit_group") ? COMMIT : WAIT;
    if (ctx.ins.variant == WAIT)
      ctx.ins.offset = (int64_t)o[0].imm;
    ctx.ins.exec = execStep;
    return true;
  }
  int n = 0;
  for (auto& s : ctx.raw.mods)
    if (s[0] == 'm' && isdigit(s[1]))
      sscanf(s.c_str(), "m64n%d", &n);
  Type td = ctx.type(0);
  if (ctx.raw.has("sp") || (td != T_F32 && td != T_S32))
    return false;
  ctx.ins.dstVec = ctx.dests(o[0]);
  if ((int)ctx.ins.dstVec.size() != n / 2)
    ctx.fail("wgmma fragment size");
  if (o[1].kind == Operand::VEC)
    ctx.ins.srcVecB = ctx.sources(o[1], T_B32);
  else
    ctx.ins.src[0] = ctx.source(o[1], T_B64);
  ctx.ins.src[1] = ctx.source(o[2], T_B64);
  ctx.ins.src[2] = ctx.source(o[3], T_PRED);
  if (o.size() > 5) {
    ctx.ins.negate[0] = (int64_t)o[4].imm < 0;
    ctx.ins.negate[1] = (int64_t)o[5].imm < 0;
  }
  if (o.size() == 8)
    ctx.ins.variant2 = (o[6].imm ? 1 : 0) | (o[7].imm ? 2 : 0);
  else if (o.size() == 7) // A in registers
    ctx.ins.variant2 = o[6].imm ? 2 : 0;
  ctx.ins.type = ctx.type(1);
  ctx.ins.type2 = ctx.type(2);
  ctx.ins.variant = td;
  ctx.ins.target = n;
  ctx.ins.exec = execWgmma;
  return true;
}

} // namespace

void trackRegisters(Warp& w, const Instr& in, uint32_t mask) {
  WgmmaState& s = *w.wgmma;
  if (in.exec == execWgmma || in.exec == execStep || in.control == CTL_CALL)
    return;
  if (in.exec == execMov) {
    trackMove(s, in);
    if (s.results.count(in.src[0]))
      return;
  }
  int lane = firstLane(mask);
  auto check = [&](int r) {
    if (r >= 0 && s.results.count(r))
      w.error(
          in, lane,
          "register holds the result of a wgmma that has not been waited for (wgmma.wait_group)");
  };
  if (!s.results.empty()) {
    forEachSource(in, check);
    forEachDest(in, [&](int r) {
      if (in.exec != execMov)
        check(r);
      else if (r >= 0)
        s.results.erase(r);
    });
  }
  if (in.exec == execMov)
    return;
  forEachDest(in, [&](int r) {
    if (r < 0)
      return;
    if (s.operands.count(r))
      w.error(in, lane, "write to a register that a wgmma in flight still reads");
    s.dirty.insert(r);
  });
}

void wgmmaAtExit(Warp& w, const Instr& in) {
  if (!w.wgmma->results.empty())
    w.error(in, 0, "warp exits with wgmma operations that were not waited for");
}

void registerWgmma(DecoderTable& t) {
  t["wgmma"] = decodeWgmma;
}

} // namespace ptx
