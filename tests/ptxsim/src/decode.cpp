// SPDX-License-Identifier: Apache-2.0
// decode.cpp - turns raw instructions into handlers: operand columns, control flow, module loading.
#include "sim.h"
#include <cstdlib>
#include <cstring>

namespace ptx {

int DecodeCtx::constant(uint64_t v) {
  auto it = fn.constIndex.find(v);
  if (it != fn.constIndex.end())
    return -2 - it->second;
  int n = (int)fn.consts.size();
  fn.consts.push_back(v);
  fn.constIndex[v] = n;
  return -2 - n;
}
void DecodeCtx::fail(const char* why) {
  throw SimError(
      strf("%s: PTX line %d: %s: %s", module.source.c_str(), raw.line, why, raw.text.c_str()), 218);
}
Type DecodeCtx::type(int n) const {
  for (auto& s : raw.mods) {
    Type t = typeFromName(s);
    if (t != T_NONE && n-- == 0)
      return t;
  }
  return T_NONE;
}
uint64_t DecodeCtx::symValue(const Operand& o) {
  if (o.var) {
    const Var& v = *o.var;
    if (v.space == SP_SHARED) {
      uint64_t base = v.dynShared ? (fn.root->dynBase + v.align - 1) / v.align * v.align : v.offset;
      return base + o.off;
    }
    if (v.space == SP_GLOBAL || v.space == SP_CONST) {
      if (!v.addr)
        fail("variable not loaded");
      return v.addr + o.off;
    }
    return v.offset + o.off;
  }
  for (size_t k = 0; k < module.funcById.size(); k++)
    if (module.funcById[k]->name == o.sym)
      return WIN_FUNC + k * 16;
  fail("unknown symbol");
}
static uint64_t immFor(const Operand& o, Type t) {
  if (o.isFloat)
    return o.imm;
  if (t == T_F32)
    return put<float>((float)(int64_t)o.imm);
  if (t == T_F64)
    return put<double>((double)(int64_t)o.imm);
  return o.imm;
}
int DecodeCtx::source(const Operand& o, Type t) {
  switch (o.kind) {
    case Operand::REG: return o.reg;
    case Operand::IMM:
      if (t == T_PRED)
        return constant(o.imm ? 0xffffffffu : 0);
      return constant(typeSize(t) >= 8 || t == T_NONE ? immFor(o, t)
                                                      : immFor(o, t) & sizeMask(typeSize(t)));
    case Operand::SYM: return constant(symValue(o));
    case Operand::SINK: return constant(0);
    default: fail("operand kind");
  }
}
int DecodeCtx::dest(const Operand& o) {
  if (o.kind == Operand::REG)
    return o.reg;
  if (o.kind == Operand::SINK)
    return fn.sink;
  fail("destination");
}
std::vector<int> DecodeCtx::sources(const Operand& o, Type t) {
  std::vector<int> v;
  if (o.kind != Operand::VEC) {
    v.push_back(source(o, t));
    return v;
  }
  for (auto& e : o.v)
    v.push_back(source(e, t));
  return v;
}
std::vector<int> DecodeCtx::dests(const Operand& o) {
  std::vector<int> v;
  if (o.kind != Operand::VEC) {
    v.push_back(dest(o));
    return v;
  }
  for (auto& e : o.v)
    v.push_back(dest(e));
  return v;
}
// Memory operand: register base (column) or symbol. sub2: 0 plain, 1 frame-relative (callee
// local/param), 2 entry param.
void DecodeCtx::memory(const Operand& o, int slot) {
  if (o.kind != Operand::MEM)
    fail("memory operand expected");
  const Operand& b = o.v[0];
  ins.offset = o.off;
  if (b.kind == Operand::REG) {
    ins.src[slot] = b.reg;
    return;
  }
  if (b.kind == Operand::IMM) {
    ins.src[slot] = constant(b.imm);
    return;
  }
  if (b.kind != Operand::SYM)
    fail("address");
  if (b.var && b.var->space == SP_PARAM) {
    ins.offset += b.var->offset + b.off;
    ins.variant2 = b.var->isEntryParam ? 2 : 1;
    ins.src[slot] = constant(0);
    return;
  }
  if (b.var && b.var->space == SP_LOCAL) {
    ins.offset += b.var->offset + b.off;
    ins.variant2 = 1;
    ins.src[slot] = constant(0);
    return;
  }
  ins.src[slot] = constant(symValue(b));
}

void execNop(Warp&, const Instr&, uint32_t) {}
namespace {
void execUnknown(Warp& w, const Instr& in, uint32_t m) {
  w.error(in, __builtin_ctz(m), "unsupported instruction");
}

const std::unordered_map<std::string, Decoder>& table() {
  static std::unordered_map<std::string, Decoder>* t = [] {
    auto* x = new std::unordered_map<std::string, Decoder>;
    for (auto add : {registerInteger, registerFloat, registerCompare, registerMove, registerConvert,
                     registerMemory, registerAtomics, registerCpAsync, registerWarp, registerMatrix,
                     registerMbarrier, registerWgmma})
      add(*x);
    return x;
  }();
  return *t;
}

void decodeOne(Module& m, Function& f, const RawInstr& r, Instr& i) {
  DecodeCtx ctx{m, f, r, i};
  i.raw = &r;
  i.guard = r.guard;
  i.guardNegated = r.guardNeg;
  i.ftz = r.has("ftz");
  i.saturate = r.has("sat") || r.has("satfinite");
  for (auto& s : r.mods)
    if (s == "rz" || s == "rzi")
      i.rounding = 'z';
    else if (s == "rm" || s == "rmi")
      i.rounding = 'm';
    else if (s == "rp" || s == "rpi")
      i.rounding = 'p';
    else if (s == "rna")
      i.rounding = 'a';
  auto label = [&](const std::string& s) {
    auto it = f.labels.find(s);
    if (it == f.labels.end())
      ctx.fail("unknown label");
    return it->second;
  };
  if (r.op == "bra") {
    i.control = CTL_BRA;
    i.target = label(r.operands[0].sym);
    return;
  }
  if (r.op == "brx") {
    i.control = CTL_BRX;
    i.src[0] = ctx.source(r.operands[0], T_U32);
    auto it = f.branchTargets.find(r.operands[1].sym);
    if (it == f.branchTargets.end())
      ctx.fail("unknown branch table");
    for (auto& s : it->second)
      i.table.push_back(label(s));
    return;
  }
  if (r.op == "ret") {
    i.control = CTL_RET;
    return;
  }
  if (r.op == "exit") {
    i.control = CTL_EXIT;
    return;
  }
  if (r.op == "call") {
    i.control = CTL_CALL;
    for (auto& a : r.callArg) {
      if (!a.var) {
        if (a.kind == Operand::REG)
          ctx.fail("register call argument");
        ctx.fail("call argument");
      }
      i.srcVec.push_back((int)a.var->offset);
      i.srcVecB.push_back((int)a.var->size);
    }
    for (auto& a : r.callRet) {
      if (!a.var)
        ctx.fail("call result");
      i.dstVec.push_back((int)a.var->offset);
      i.srcVecC.push_back((int)a.var->size);
    }
    if (r.calleeReg >= 0)
      i.src[0] = r.calleeReg;
    else {
      auto it = f.root->callees.find(r.callee);
      i.callee = it == f.root->callees.end() ? nullptr : it->second.get();
    }
    return;
  }
  auto it = table().find(r.op);
  bool ok = it != table().end() && it->second(ctx);
  if (!ok) {
    i.exec = execUnknown;
    i.control = CTL_NONE;
    return;
  }
  if (!i.exec)
    i.exec = execNop;
}

void decodeFunction(Module& m, Function& f) {
  if (f.decoded || !f.defined)
    return;
  f.decoded = true;
  f.sink = f.regs();
  f.regBytes.push_back(8);
  f.code.resize(f.raw.size() + 1);
  for (size_t k = 0; k < f.raw.size(); k++)
    decodeOne(m, f, f.raw[k], f.code[k]);
  static RawInstr* end = [] {
    auto* e = new RawInstr;
    e->op = "ret";
    e->text = "(end of function)";
    return e;
  }();
  f.code.back().control = CTL_RET;
  f.code.back().raw = end;
  f.constCols.resize(f.consts.size() * 32 + 32);
  for (size_t k = 0; k < f.consts.size(); k++)
    for (int l = 0; l < 32; l++)
      f.constCols[k * 32 + l] = f.consts[k];
}
} // namespace

void loadModule(Module& m) {
  if (m.loaded)
    return;
  m.loaded = true;
  auto& dm = DevMem::get();
  for (auto& kv : m.vars) {
    Var& v = *kv.second;
    if ((v.space != SP_GLOBAL && v.space != SP_CONST) || v.addr)
      continue;
    v.addr = dm.alloc(m.device, v.size ? v.size : 8, true);
    if (!v.addr)
      throw SimError("out of memory loading module variables", 2);
    char* p = dm.sim(v.addr, v.size);
    memset(p, 0, v.size);
    memcpy(p, v.init.data(), std::min<size_t>(v.init.size(), v.size));
  }
  for (auto& kv : m.vars) {
    Var& v = *kv.second;
    for (auto& r : v.relocs) {
      uint64_t val = 0;
      auto it = m.vars.find(r.sym);
      if (it != m.vars.end())
        val = it->second->addr + r.add;
      else
        for (size_t k = 0; k < m.funcById.size(); k++)
          if (m.funcById[k]->name == r.sym)
            val = WIN_FUNC + k * 16;
      memcpy(dm.sim(v.addr + r.at, 8), &val, 8);
    }
  }
}

// Parses a kernel and private copies of every function it may call, lays out shared memory, decodes
// all.
void prepare(Module& m, Function& f) {
  if (f.decoded)
    return;
  f.root = &f;
  f.staticShared = m.sharedStatic;
  std::vector<Function*> work{&f}, all;
  while (!work.empty()) {
    Function* g = work.back();
    work.pop_back();
    all.push_back(g);
    parseBody(m, *g);
    for (auto& v : g->locals)
      if (v->space == SP_GLOBAL || v->space == SP_CONST) {
        if (!v->addr) {
          v->addr = DevMem::get().alloc(m.device, v->size, true);
          char* p = DevMem::get().sim(v->addr, v->size);
          memset(p, 0, v->size);
          memcpy(p, v->init.data(), v->init.size());
        }
      }
    bool indirect = false;
    std::vector<std::string> names;
    for (auto& r : g->raw)
      if (r.op == "call") {
        if (r.calleeReg >= 0)
          indirect = true;
        else
          names.push_back(r.callee);
      }
    if (indirect)
      for (auto& kv : m.funcs)
        if (!kv.second->entry && kv.second->defined)
          names.push_back(kv.first);
    for (auto& n : names) {
      if (f.callees.count(n))
        continue;
      auto it = m.funcs.find(n);
      if (it == m.funcs.end())
        continue;
      auto copy = std::make_shared<Function>(*it->second);
      copy->root = &f;
      copy->callees.clear();
      for (auto* list : {&copy->params, &copy->rets})
        for (auto& v : *list)
          v = std::make_shared<Var>(*v);
      f.callees[n] = copy;
      work.push_back(copy.get());
    }
  }
  f.dynBase = (f.staticShared + 15) / 16 * 16;
  for (auto* g : all)
    decodeFunction(m, *g);
}

} // namespace ptx
