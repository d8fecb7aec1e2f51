// SPDX-License-Identifier: Apache-2.0
// ptx.h - PTX in memory: modules, variables, functions; instructions as parsed (RawInstr) and as
// decoded (Instr).
#pragma once
#include "types.h"
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace ptx {

// Every error that the simulated program can cause; code is the cudaError_t to report.
struct SimError : std::runtime_error {
  int code;
  SimError(const std::string& s, int c = 719) : std::runtime_error(s), code(c) {}
};
std::string strf(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

enum Space : uint8_t { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM, SP_CONST, SP_REG };

// A named variable or parameter.
struct Var {
  struct Reloc {
    uint64_t at; // place in the initializer that holds the address of a symbol
    std::string sym;
    int64_t add;
  };
  std::string name;
  Space space = SP_GLOBAL;
  Type ty = T_B8;
  uint64_t size = 0, align = 1;
  uint64_t offset = 0; // in shared memory, in the frame's local or parameter memory
  uint64_t addr = 0;   // global, const: address on the module's device once loaded
  bool isExtern = false, isEntryParam = false, dynShared = false;
  std::vector<uint8_t> init;
  std::vector<Reloc> relocs;
};

struct Operand {
  enum Kind : uint8_t { NONE, REG, IMM, SYM, VEC, MEM, SINK, SREG } kind = NONE;
  bool neg = false, isFloat = false;
  Type ty = T_NONE; // declared type of a register
  int reg = -1;
  uint64_t imm = 0;
  int64_t off = 0;                 // SYM, MEM: displacement
  std::string sym;                 // symbol, label, special register
  std::shared_ptr<Var> var;        // what sym names, if a variable
  std::vector<Operand> v;          // VEC: elements; MEM: v[0] is the base
  std::shared_ptr<Operand> second; // the q of a destination p|q
};

struct RawInstr {
  int line = 0; // of the PTX text
  int loc = -1; // index into Module::sourceLines, from the last .loc directive
  std::string text, op;
  std::vector<std::string> mods; // add.rn.f32 has op "add", mods "rn", "f32"
  int guard = -1;
  bool guardNeg = false;
  std::vector<Operand> operands;
  std::vector<Operand> callRet, callArg;
  std::string callee;
  int calleeReg = -1;
  bool has(const char* m) const {
    for (auto& s : mods)
      if (s == m)
        return true;
    return false;
  }
};

struct Warp;
struct Instr;
struct Function;
using Handler = void (*)(Warp&, const Instr&, uint32_t mask);

// What the warp's run loop does with an instruction itself; CTL_NONE ones are only handed to their
// handler.
enum Control : uint8_t {
  CTL_NONE,
  CTL_BRA,
  CTL_BRX,
  CTL_CALL,
  CTL_RET,
  CTL_EXIT,
  CTL_BAR,
  CTL_COLL, // needs all lanes of its member mask (Warp::collective)
  CTL_YIELD,
  CTL_POLL // may be one turn of a loop that waits for another thread (Warp::polled)
};

// A decoded instruction. Operand columns (dst, src, ...): >= 0 a register, <= -2 an entry of the
// function's constant pool, NOCOL absent. The fields are general; each decoder says what it puts
// into them.
constexpr int NOCOL = -1;
struct Instr {
  Handler exec = nullptr;
  const RawInstr* raw = nullptr;
  Control control = CTL_NONE;
  int guard = -1; // predicate register
  bool guardNegated = false;
  bool ftz = false, saturate = false;
  bool strong = false; // volatile, relaxed, acquire or release access
  char rounding = 'n'; // n nearest even, z zero, m minus infinity, p plus infinity, a nearest away
  uint8_t type = 0, type2 = 0;
  uint8_t variant = 0, variant2 = 0; // which of the forms that share a handler
  uint8_t vecLen = 1, space = 0, elemBytes = 0;
  bool negate[5] = {};
  int dst[2] = {NOCOL, NOCOL};
  int src[5] = {NOCOL, NOCOL, NOCOL, NOCOL, NOCOL};
  int memberMask = NOCOL; // of a warp collective
  int target = -1;        // branch target; free for other instructions
  int64_t offset = 0;     // address displacement
  uint64_t dstMask = ~0ull;
  std::vector<int> dstVec, srcVec, srcVecB, srcVecC; // ld/st.vN, mma fragments, call arguments
  std::vector<int> table;                            // brx targets
  const Function* callee = nullptr;
};

struct Function {
  std::string name;
  bool entry = false, defined = false, decoded = false, usesDynShared = false;
  std::string body; // text, parsed on first use
  int bodyLine = 0;
  std::vector<std::shared_ptr<Var>> params, rets, locals;
  uint64_t paramBytes = 0; // of an entry's parameters
  uint64_t frameParamBytes = 0, frameLocalBytes = 0;
  uint64_t staticShared = 0,
           dynBase = 0; // of a kernel: static shared bytes, start of dynamic shared memory
  int maxntid = 0, reqntid[3] = {0, 0, 0}, clusterX = 0;
  std::vector<RawInstr> raw;
  std::vector<Instr> code;
  std::vector<uint8_t> regBytes; // width of each register; 0 is a predicate
  std::vector<uint64_t> consts;  // constant pool
  std::vector<uint64_t>
      constCols; // constant pool, each value 32 times, so that constants look like registers
  std::unordered_map<uint64_t, int> constIndex;
  std::unordered_map<std::string, int> labels;
  std::unordered_map<std::string, std::vector<std::string>> branchTargets;
  Function* root = nullptr; // the kernel that this function, a private copy, belongs to
  std::map<std::string, std::shared_ptr<Function>> callees; // of a kernel: its private copies
  int sink = -1; // register that swallows results written to _
  int regs() const { return (int)regBytes.size(); }
};

// Where an instruction comes from: a line; of an inlined function, also the line that calls it.
struct SourceLine {
  int file, line, callFile, callLine; // callLine 0: not inlined
  bool operator<(const SourceLine& o) const {
    return std::tie(file, line, callFile, callLine) <
           std::tie(o.file, o.line, o.callFile, o.callLine);
  }
};

// A module as loaded on one device.
struct Module {
  std::string text, target, source;
  int arch = 0, device = 0;
  bool loaded = false;
  std::map<std::string, std::shared_ptr<Var>> vars;
  std::map<std::string, std::shared_ptr<Function>> funcs;
  std::vector<Function*> funcById;              // function pointers are WIN_FUNC + 16 * index
  uint64_t sharedStatic = 0;                    // bytes of module-scope .shared variables
  std::map<int, std::string> files;             // .file directives
  std::vector<SourceLine> sourceLines;          // of the .loc directives
  std::map<SourceLine, int> sourceLineIndex;
};

std::unique_ptr<Module> parseModule(const std::string& text, const std::string& source);
void parseBody(Module&, Function&); // fills raw, labels, registers

} // namespace ptx
